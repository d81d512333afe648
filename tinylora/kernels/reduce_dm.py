"""dM of every fused linear of a model at once, in an order that no batch-mate changes.

    D[b, g, i, j] = sum over the rows of sequence b of s[row, g r + i] t[row, g r + j]
    dM[a] = sum over the sequences b of adapter a, first to last, of D[b]

s = dy B and t = x A^T of all groups lie side by side, r columns a segment. The order inside a sequence depends on its length
alone, and there are no atomics: equal inputs give equal bits, and the bits of an adapter's dM do not depend on the other
adapters' sequences in the pack.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.launch import launch, tl, triton

BUDGET = {"_partials": (160, 8192), "_ordered_sum": (40, 0)}  # kernel: registers a thread, bytes of shared memory


def reduce_dm_ref(
    s: Tensor,  # (rows, segments * r)
    t: Tensor,  # (rows, segments * r)
    lengths: Sequence[int],
    adapters: int,
    sequence_adapter: Tensor | None,  # (sequences,) int64
    r: int,
) -> Tensor:  # (adapters, segments, r, r)
    """Plain PyTorch, one pass over planes (i, j), whose rows are contiguous: six times faster than one broadcast product."""
    total, segments = sum(lengths), s.shape[1] // r
    products = s.new_empty(total, r, r, segments)
    for i in range(r):
        for j in range(r):
            torch.mul(s[:total, i::r], t[:total, j::r], out=products[:, i, j])
    sequence = torch.arange(len(lengths), device=s.device)
    rows = sequence.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=s.device))  # (total,)
    # On a CPU index_add_ adds one row after another.
    partials = s.new_zeros(len(lengths), r, r, segments).index_add_(0, rows, products)
    adapter = torch.zeros_like(sequence) if sequence_adapter is None else sequence_adapter
    return s.new_zeros(adapters, r, r, segments).index_add_(0, adapter, partials).permute(0, 3, 1, 2).contiguous()


@triton.jit
def _partials(
    s_ptr,  # (rows, segments * r)
    t_ptr,  # (rows, segments * r)
    starts_ptr,  # (sequences + 1,) int64
    out_ptr,  # (sequences, pairs), pair = (g, i, j)
    stride_s,
    stride_t,
    pairs,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    i = pair // R  # column of s: g R + i
    j = pair // (R * R) * R + pair % R  # column of t: g R + j
    first = tl.load(starts_ptr + sequence)
    end = tl.load(starts_ptr + sequence + 1)
    # Lane k of ROWS adds up rows k, k + ROWS, ... of the sequence, and the lanes are summed at its end: an order that depends
    # on the sequence's length alone.
    total = tl.zeros((ROWS, PAIRS), dtype=s_ptr.dtype.element_ty)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & inside
        total += tl.load(s_ptr + row * stride_s + i, mask, 0.0) * tl.load(t_ptr + row * stride_t + j, mask, 0.0)
    tl.store(out_ptr + sequence * pairs + pair, tl.sum(total, 0), inside)


@triton.jit
def _ordered_sum(
    partials_ptr,  # (sequences, pairs)
    adapter_ptr,  # (sequences,) int64
    out_ptr,  # (adapters, pairs)
    sequences,
    pairs,
    PAIRS: tl.constexpr,
):
    adapter = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    total = tl.zeros((PAIRS,), dtype=partials_ptr.dtype.element_ty)
    pointers = partials_ptr + pair
    for sequence in range(sequences):
        # A foreign sequence adds zero, which leaves the bits alone, whatever its own numbers are.
        mine = tl.load(adapter_ptr + sequence) == adapter
        total += tl.where(mine, tl.load(pointers, inside, 0.0), 0.0)
        pointers += pairs
    tl.store(out_ptr + adapter * pairs + pair, total, inside)


def config(pairs: int) -> dict[str, Any]:
    """Blocks for `pairs` = segments * r * r sums a sequence: narrow inputs get fewer columns and more rows a step."""
    width = min(256, max(16, triton.next_power_of_2(pairs)))
    return {"ROWS": 2048 // width, "PAIRS": width, "num_warps": 4}


def reduce_dm_triton(
    s: Tensor, t: Tensor, lengths: Sequence[int], adapters: int, sequence_adapter: Tensor | None, r: int
) -> Tensor:
    """`reduce_dm` in two kernels: sums of each sequence, then of each adapter."""
    s, t = (x if x.stride(1) == 1 else x.contiguous() for x in (s, t))
    pairs, sequences = s.shape[1] * r, len(lengths)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64).to(s.device)  # (sequences + 1,)
    adapter = starts.new_zeros(sequences) if sequence_adapter is None else sequence_adapter
    partials, dM = s.new_empty(sequences, pairs), s.new_empty(adapters, s.shape[1] // r, r, r)
    options = config(pairs)
    blocks = triton.cdiv(pairs, options["PAIRS"])
    launch(_partials, (sequences, blocks), s, t, starts, partials, s.stride(0), t.stride(0), pairs, R=r, **options)
    launch(_ordered_sum, (adapters, triton.cdiv(pairs, 128)), partials, adapter, dM, sequences, pairs, PAIRS=128, num_warps=4)
    return dM


def reduce_dm(
    s: Tensor,  # (rows, segments * r), fp32 (fp64 in tests)
    t: Tensor,  # (rows, segments * r), of s's dtype
    lengths: Sequence[int],  # rows of each packed sequence; rows beyond their sum are padding and never read
    adapters: int,
    sequence_adapter: Tensor | None,  # (sequences,) int64: the adapter of each sequence; None: adapter 0 for all
    r: int,  # rank: columns of a segment
) -> Tensor:  # (adapters, segments, r, r), zero for an adapter without a sequence
    """dM = s^T t, segment by segment, summed over each adapter's rows in a fixed order.

    Raises ValueError on wrong shapes and on half precision, whose sums would be worthless.
    """
    if s.shape != t.shape or s.shape[1] % r or sum(lengths) > len(s):
        raise ValueError(f"s {tuple(s.shape)} and t {tuple(t.shape)} do not hold {sum(lengths)} rows of segments of {r}")
    if s.dtype != t.dtype or s.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"s and t are {s.dtype} and {t.dtype}; they do not hold sums of many rows in less than float32")
    op = reduce_dm_triton if dispatch.runs_triton("reduce_dm", s) else reduce_dm_ref
    return op(s, t, lengths, adapters, sequence_adapter, r)


class _Reduced(torch.autograd.Function):
    """The matrices as they are; their gradient is one reduction over the s and t of all linears, when the last s is there."""

    @staticmethod
    def forward(ctx, s, t, lengths, sequence_adapter, *matrices):
        ctx.s, ctx.t, ctx.lengths, ctx.sequence_adapter = s, t, lengths, sequence_adapter
        ctx.shapes = [m.shape for m in matrices]
        ctx.set_materialize_grads(False)  # none of them gets a gradient of its own
        return tuple(m.view_as(m) for m in matrices)

    @staticmethod
    def backward(ctx, *_):
        adapters, _, r, _ = ctx.shapes[0]
        dM = reduce_dm(ctx.s, ctx.t, ctx.lengths, adapters, ctx.sequence_adapter, r)
        return (None, None, None, None, *dM.split([shape[1] for shape in ctx.shapes], 1))


def reduced_together(
    s: Tensor,  # (T, columns) fp32, of all linears, filled by the backward
    t: Tensor,  # (T, columns) fp32, filled by the forward
    lengths: Sequence[int],  # of the packed sequences
    sequence_adapter: Tensor | None,  # (sequences,)
    matrices: Sequence[Tensor],  # M (adapters, segments, r, r) of each linear
) -> list[Tensor]:
    """These matrices, whose gradients come out of one `reduce_dm`."""
    return list(_Reduced.apply(s, t, lengths, sequence_adapter, *matrices))
