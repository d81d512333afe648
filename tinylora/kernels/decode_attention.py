"""One new token a slot: rotate its q and k, put k and v into the cache, attend to all before it, shrink for o.

    out = softmax(q K^T / sqrt(D)) V        z = M (out A^T)

The cache is paged: keys (pages, Hkv, page_size, D), and a table (slots, most pages) says in which page a slot's positions
lie; without a table a slot owns one long page, the one of its own number. In Triton a position's way is

    _rope            (slots,)                     q out, k and v straight into their page
    _partial         (slots, Hkv, splits)         `SPLIT` pages each: running maximum, sum, and weighted values
    _combine         (slots,)                     the splits in their order, out, and o's z

so a layer's attention is three launches, and a row's bits depend on its own length and the cache's page size alone: not on
the slots, nor on how far other slots have come.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch, native
from tinylora.kernels.attention import softmax_scores
from tinylora.kernels.correction import Correction
from tinylora.kernels.launch import add_shrunk, arguments, launch, store_mixed, tl, triton
from tinylora.kernels.products import NARROW
from tinylora.kernels.rope import Heads, rope, rope_cache_native, rope_cache_triton
from tinylora.kernels.shrink import shrink

BUDGET = {"_partial": (128, 40_960), "_combine": (64, 4096)}  # kernel: registers a thread, bytes of shared memory
SPLIT = 4  # pages that one program attends to


@dataclass
class CacheView:
    """Where one step's tokens lie in the cache. The same for all layers."""

    positions: Tensor  # (slots,) int64: of the token that comes in
    table: Tensor | None  # (slots or more, most pages) int32; None: slot i owns page i
    page_size: int
    longest: int  # without a table: how many keys are read
    dtype: torch.dtype

    @cached_property
    def bias(self) -> Tensor:  # (slots, 1, 1, keys), 0 where a key is visible and -inf where not
        length = self.longest if self.table is None else self.table.shape[1] * self.page_size
        future = torch.arange(length, device=self.positions.device) > self.positions[:, None]
        bias = torch.zeros(future.shape, dtype=self.dtype, device=future.device)
        return bias.masked_fill_(future, -torch.inf)[:, None, None]

    @cached_property
    def place(self) -> tuple[Tensor, Tensor]:
        """The page of each slot's new token and its place in it, (slots,) int64 each."""
        slots = torch.arange(len(self.positions), device=self.positions.device)
        if self.table is None:
            return slots, self.positions
        return self.table[slots, self.positions // self.page_size].long(), self.positions % self.page_size


def rope_into_cache(
    qkv: Tensor,  # (slots, width) or (slots, padded)
    cos: Tensor,  # (slots, D)
    sin: Tensor,  # (slots, D)
    h: Heads,
    keys: Tensor,  # (pages, Hkv, page_size, D): written
    values: Tensor,  # (pages, Hkv, page_size, D): written
    view: CacheView,
) -> Tensor:  # q (slots, H, D)
    """The tokens' q; their k and v go into the cache."""
    if view.table is not None and dispatch.runs_triton("decode_attention", qkv):
        return rope_cache_triton(qkv, cos, sin, h, keys, values, view.positions, view.table)
    if dispatch.runs_native("decode_attention", qkv, h.head_dim, h.head_dim // 2):
        return rope_cache_native(qkv, cos, sin, h, keys, values, view.positions, view.table)
    q, k, v = rope(qkv, cos, sin, h, None)
    page, place = view.place
    keys[page, :, place] = k
    values[page, :, place] = v
    return q


def decode_attention_plain(
    q: Tensor, keys: Tensor, values: Tensor, view: CacheView, o: Correction | None
) -> tuple[Tensor, Tensor | None]:
    """In plain PyTorch: the H / Hkv queries that share a key head are rows of one small product."""
    slots, heads, D = q.shape
    if view.table is None:
        keys, values = keys[:slots, :, : view.longest], values[:slots, :, : view.longest]
    else:
        pages = view.table[:slots].long()  # (slots, most)
        keys, values = (x[pages].transpose(1, 2).flatten(2, 3) for x in (keys, values))  # (slots, Hkv, keys, D)
    share = heads // keys.shape[1]
    q = q.unflatten(1, (keys.shape[1], share))  # (slots, Hkv, share, D)
    if q.device.type == "cpu":
        q = F.pad(q, (0, 0, 0, -share % NARROW))  # rows of the two products
    out = torch.matmul(softmax_scores(q, keys, view.bias), values)[:, :, :share].flatten(1)  # (slots, H * D)
    return out, None if o is None else shrink(out, o)


@triton.jit
def _partial(
    q_ptr,  # (slots, H, D)
    k_ptr,  # (pages, Hkv, page_size, D)
    v_ptr,  # (pages, Hkv, page_size, D)
    table_ptr,  # (slots, most) int32
    position_ptr,  # (slots,) int64
    out_ptr,  # (slots, H, splits, D) fp32: weighted values, not yet divided
    top_ptr,  # (slots, H, splits) fp32
    sum_ptr,  # (slots, H, splits) fp32
    most,
    share,  # H / Hkv
    D,
    scale,
    stride_q,
    stride_q_head,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
    SHARE: tl.constexpr,
    DP: tl.constexpr,
):
    slot, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(position_ptr + slot) + 1
    i, d, j = tl.arange(0, SHARE), tl.arange(0, DP), tl.arange(0, PAGE)
    q_head = head * share + i
    live = (i < share)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + slot * stride_q + q_head[:, None] * stride_q_head + d[None, :], live, 0.0)
    top = tl.full((SHARE,), float("-inf"), tl.float32)
    total = tl.zeros((SHARE,), tl.float32)
    acc = tl.zeros((SHARE, DP), tl.float32)
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, tl.cdiv(length, PAGE))
    for number in range(first, last):
        page = tl.load(table_ptr + slot * most + number).to(tl.int64)
        base = (page * kv_heads + head) * (PAGE * D)  # int64, and the places in the page int32: 40 registers less
        place = j[:, None] * D + d[None, :]  # (PAGE, DP)
        inside = (number * PAGE + j < length)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + base + place, inside, 0.0)  # (PAGE, DP)
        v = tl.load(v_ptr + base + place, inside, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (SHARE, PAGE)
        scores = tl.where((number * PAGE + j < length)[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        shrunk = tl.exp(top - new)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    row = (slot * kv_heads * share + q_head) * splits + split
    tl.store(out_ptr + row[:, None] * D + d[None, :], acc, live)
    tl.store(top_ptr + row, top, i < share)
    tl.store(sum_ptr + row, total, i < share)


@triton.jit
def _combine(
    partial_ptr,  # (slots, H, splits, D) fp32
    top_ptr,  # (slots, H, splits) fp32
    sum_ptr,  # (slots, H, splits) fp32
    out_ptr,  # (slots, H * D)
    a_ptr,  # (R, H * D)
    z_ptr,  # (slots, R)
    t_ptr,
    stride_t,
    m_ptr,
    adapter_ptr,
    slots,
    heads,
    D,
    splits,
    stride_a,
    KEEP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    SPLITS: tl.constexpr,
    DP: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, DP)
    t = tl.zeros((1, RP), tl.float32)
    for head in range(0, heads):
        row = (slot * heads + head) * splits
        top = tl.load(top_ptr + row + s, s < splits, float("-inf"))
        share = tl.exp(top - tl.max(top, 0))  # a split without keys counts for nothing
        total = tl.sum(share * tl.load(sum_ptr + row + s, s < splits, 0.0), 0)
        inside = (s < splits)[:, None] & (d < D)[None, :]
        part = tl.load(partial_ptr + (row + s)[:, None] * D + d[None, :], inside, 0.0)
        out = (tl.sum(part * share[:, None], 0) / total).to(out_ptr.dtype.element_ty)  # (DP,)
        column = head * D + d
        tl.store(out_ptr + slot * heads * D + column, out, d < D)
        if R > 0:
            width = heads * D
            t = add_shrunk(t, out.to(tl.float32)[None, :], a_ptr, stride_a, tl.where(d < D, column, width), width, R, RP)
    if R > 0:
        store_mixed(
            t, slot + tl.arange(0, 1), slots, t_ptr, stride_t, m_ptr, adapter_ptr, z_ptr, R, 0, 0.0,
            KEEP, HAS_ADAPTER, False, R, RANK, RP,
        )  # fmt: skip


def splits(most: int) -> int:
    """Programs for a slot's pages: a function of the cache's table alone."""
    return triton.cdiv(most, SPLIT)


def decode_attention_triton(
    q: Tensor, keys: Tensor, values: Tensor, view: CacheView, o: Correction | None
) -> tuple[Tensor, Tensor | None]:
    """In two kernels."""
    assert view.table is not None
    (slots, heads, D), kv_heads, most = q.shape, keys.shape[1], view.table.shape[1]
    share, parts, dp = heads // kv_heads, splits(most), triton.next_power_of_2(D)
    partial = q.new_empty(slots, heads, parts, D, dtype=torch.float32)
    top, total = q.new_empty(2, slots, heads, parts, dtype=torch.float32)
    scale = float(D) ** -0.5
    launch(
        _partial,
        (slots, kv_heads, parts),
        *(q, keys, values, view.table, view.positions, partial, top, total, most, share, D, scale, q.stride(0), q.stride(1)),
        SPLIT=SPLIT,
        PAGE=view.page_size,
        SHARE=max(16, triton.next_power_of_2(share)),  # a product on tensor cores has 16 rows
        DP=dp,
        num_warps=4,
    )
    out = q.new_empty(slots, heads * D)
    tensors, constants = arguments(o, None, q)
    a, z = (q, q) if o is None else (o.A, q.new_empty(slots, o.rank))
    launch(
        _combine,
        (slots,),
        *(partial, top, total, out, a, z, *tensors, slots, heads, D, parts, a.stride(0)),
        SPLITS=triton.next_power_of_2(parts),
        DP=dp,
        **constants,
        num_warps=4,
    )
    return out, None if o is None else z


def decode_attention_native(
    q: Tensor, keys: Tensor, values: Tensor, view: CacheView, o: Correction | None
) -> tuple[Tensor, Tensor | None]:
    """In C. Every slot reads its own keys alone."""
    (slots, heads, D), kv_heads = q.shape, keys.shape[1]
    out, where = q.new_empty(slots, heads * D), native.cells(slots, keys, values, view.positions, view.table)
    native.call("decode_attention", slots * native.PARALLEL // 8, slots, heads, kv_heads, D, q.contiguous(), *where, out)
    return out, None if o is None else shrink(out, o)


def decode_attention(
    q: Tensor,  # (slots, H, D)
    keys: Tensor,  # (pages, Hkv, page_size, D)
    values: Tensor,  # (pages, Hkv, page_size, D)
    view: CacheView,
    o: Correction | None,  # of the linear that reads out
) -> tuple[Tensor, Tensor | None]:  # out (slots, H * D), z (slots, R)
    """One query per slot against its cached keys up to and with its own position."""
    if view.table is not None and dispatch.runs_triton("decode_attention", q):
        return decode_attention_triton(q, keys, values, view, o)
    if dispatch.runs_native("decode_attention", q, q.shape[2], q.shape[2] // 2, c=o):
        return decode_attention_native(q, keys, values, view, o)
    return decode_attention_plain(q, keys, values, view, o)
