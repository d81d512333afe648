"""q/k norm and rotary embedding on the fused qkv output, and the backward that hands qkv's linear its [dqkv | sM].

    q, k = rotate(norm(q)), rotate(norm(k)), the norm where the family has one; v as it is

Hugging Face's half-split convention, pairs (x_i, x_{i + D/2}):

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

The map is a rotation, so its backward is the rotation by the opposite angle. cos and sin come as (T, D), [cos | cos] and
[-sin | sin]: y = x cos + swap(x) sin. Keeps cos, sin, and qkv where there is a norm.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylora.kernels import dispatch, native
from tinylora.kernels.correction import Correction, padded, write_sM
from tinylora.kernels.launch import add_shrunk, arguments, launch, store_mixed, tl, triton
from tinylora.kernels.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_ref

BUDGET = {"_forward": (64, 0), "_backward": (176, 8192)}  # kernel: registers a thread, bytes of shared memory


@dataclass
class Heads:
    """The shape of a fused qkv row, and the norm of its heads."""

    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Tensor | None = None  # (head_dim,)
    k_norm: Tensor | None = None  # (head_dim,)
    eps: float = 0.0

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def rope_ref(qkv: Tensor, cos: Tensor, sin: Tensor, h: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """The formula as it stands, differentiable by autograd: the oracle. qkv (T, width) -> q, k, v (T, heads, D)."""
    q, k, v = qkv.unflatten(1, (-1, h.head_dim)).split((h.heads, h.kv_heads, h.kv_heads), 1)
    if h.q_norm is not None and h.k_norm is not None:
        q, k = rms_norm_ref(q, h.q_norm, h.eps), rms_norm_ref(k, h.k_norm, h.eps)
    cos, sin = cos.chunk(2, -1)[0][:, None], sin.chunk(2, -1)[1][:, None]

    def rotated(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)

    return rotated(q), rotated(k), v


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D) of positions (T,) at frequencies (D/2,), angles in float32."""
    angles = positions[:, None].float() * frequencies  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], 1).to(dtype), torch.cat([-sin, sin], 1).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = x.roll(x.shape[-1] // 2, -1)
    return (x * cos[:, None]).add_(swapped.mul_(sin[:, None]))


def _norms(qk: Tensor, h: Heads) -> tuple[Tensor, Tensor]:
    """qk (T, heads + kv_heads, D) normed, and rstd (T, heads + kv_heads, 1)."""
    assert h.q_norm is not None and h.k_norm is not None
    weights = torch.cat([h.q_norm.expand(h.heads, -1), h.k_norm.expand(h.kv_heads, -1)])  # (heads + kv_heads, D)
    out = torch.empty_like(qk)
    return out, rms_norm_forward(qk, weights, h.eps, out)


def rope_plain(qkv: Tensor, cos: Tensor, sin: Tensor, h: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """The forward in plain PyTorch. v is a view of qkv."""
    rows = qkv[:, : h.width].unflatten(1, (-1, h.head_dim))  # (T, heads + 2 kv_heads, D)
    qk, v = rows.split((h.heads + h.kv_heads, h.kv_heads), 1)
    if h.q_norm is not None:
        qk, _ = _norms(qk, h)
    q, k = _rotate(qk, cos, sin).split((h.heads, h.kv_heads), 1)
    return q, k, v


def rope_backward_plain(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor, h: Heads, inner: Correction | None
) -> Tensor:  # (T, width), or padded where there is an inner correction
    """The backward in plain PyTorch."""
    dqk = _rotate(torch.cat([dq, dk], 1), cos, -sin)
    if qkv is not None and h.q_norm is not None and h.k_norm is not None:
        qk = qkv[:, : dqk[0].numel()].unflatten(1, (-1, h.head_dim))
        weights = torch.cat([h.q_norm.expand(h.heads, -1), h.k_norm.expand(h.kv_heads, -1)])
        _, rstd = _norms(qk, h)
        dqk = rms_norm_backward(dqk, qk, rstd, weights)
    dqkv = padded(len(dq), h.width, inner, dq)
    dqkv[:, : dqk[0].numel()] = dqk.flatten(1)
    dqkv[:, dqk[0].numel() : h.width] = dv.flatten(1)
    write_sM(dqkv, h.width, inner)
    return dqkv


@triton.jit
def _forward(
    x_ptr,  # (T, heads + 2 kv_heads, D), maybe padded
    cos_ptr,  # (T, D)
    sin_ptr,  # (T, D)
    qw_ptr,  # (D,)
    kw_ptr,  # (D,)
    out_ptr,  # (T, heads + 2 kv_heads, D); (T, heads, D) where k and v go into a cache
    keys_ptr,  # (pages, kv_heads, page_size, D)
    values_ptr,  # (pages, kv_heads, page_size, D)
    position_ptr,  # (T,) int64
    table_ptr,  # (T, most) int32: the page of each page_size positions
    most,
    heads,
    qk_heads,
    all_heads,
    half,  # D / 2
    stride_x,
    stride_cos,
    eps,
    NORM: tl.constexpr,
    PAGE: tl.constexpr,  # page_size; 0: no cache
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF)
    inside = d < half
    cos = tl.load(cos_ptr + row * stride_cos + half + d, inside, 0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * stride_cos + half + d, inside, 0.0).to(tl.float32)[None, :]
    for first in range(0, all_heads, HEADS):
        head = first + tl.arange(0, HEADS)
        mask = (head < all_heads)[:, None] & inside[None, :]
        place = head[:, None] * (2 * half) + d[None, :]
        x1 = tl.load(x_ptr + row * stride_x + place, mask, 0.0).to(tl.float32)
        x2 = tl.load(x_ptr + row * stride_x + place + half, mask, 0.0).to(tl.float32)
        turned = (head < qk_heads)[:, None]
        if NORM:
            rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * half) + eps)[:, None]
            is_q = (head < heads)[:, None]
            q1, q2 = tl.load(qw_ptr + d, inside, 0.0), tl.load(qw_ptr + half + d, inside, 0.0)
            k1, k2 = tl.load(kw_ptr + d, inside, 0.0), tl.load(kw_ptr + half + d, inside, 0.0)
            x1 = tl.where(turned, x1 * rstd * tl.where(is_q, q1[None, :], k1[None, :]).to(tl.float32), x1)
            x2 = tl.where(turned, x2 * rstd * tl.where(is_q, q2[None, :], k2[None, :]).to(tl.float32), x2)
        y1 = tl.where(turned, x1 * cos - x2 * sin, x1)
        y2 = tl.where(turned, x2 * cos + x1 * sin, x2)
        y1, y2 = y1.to(out_ptr.dtype.element_ty), y2.to(out_ptr.dtype.element_ty)
        if PAGE > 0:
            y_ptr = out_ptr + row * heads * (2 * half) + place
            to_q = mask & (head < heads)[:, None]
            tl.store(y_ptr, y1, to_q)
            tl.store(y_ptr + half, y2, to_q)
            position, kv_heads = tl.load(position_ptr + row), qk_heads - heads
            page = tl.load(table_ptr + row * most + position // PAGE).to(tl.int64)
            kv_head = (head - heads) % kv_heads  # k's and v's heads follow q's; what is masked may be anything
            cell = ((page * kv_heads + kv_head[:, None]) * PAGE + position % PAGE) * (2 * half) + d[None, :]
            to_k = mask & turned & (head >= heads)[:, None]
            tl.store(keys_ptr + cell, y1, to_k)
            tl.store(keys_ptr + cell + half, y2, to_k)
            to_v = mask & (head >= qk_heads)[:, None]
            tl.store(values_ptr + cell, y1, to_v)
            tl.store(values_ptr + cell + half, y2, to_v)
        else:
            y_ptr = out_ptr + row * all_heads * (2 * half) + place
            tl.store(y_ptr, y1, mask)
            tl.store(y_ptr + half, y2, mask)


@triton.jit
def _backward(
    dq_ptr,  # (T, heads, D)
    dk_ptr,  # (T, kv_heads, D)
    dv_ptr,  # (T, kv_heads, D)
    x_ptr,  # (T, heads + 2 kv_heads, D), maybe padded; read only for the norm
    cos_ptr,  # (T, D)
    sin_ptr,  # (T, D)
    qw_ptr,  # (D,)
    kw_ptr,  # (D,)
    b_ptr,  # (R, width): qkv's B, transposed
    dx_ptr,  # (T, padded)
    s_ptr,
    stride_s,
    m_ptr,
    adapter_ptr,
    T,
    heads,
    qk_heads,
    all_heads,
    half,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_x,
    stride_cos,
    stride_b,
    stride_dx,
    tail,
    eps,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF)
    inside = d < half
    cos = tl.load(cos_ptr + row * stride_cos + half + d, inside, 0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * stride_cos + half + d, inside, 0.0).to(tl.float32)[None, :]
    s = tl.zeros((1, RP), tl.float32)
    for first in range(0, all_heads, HEADS):
        head = first + tl.arange(0, HEADS)
        mask = (head < all_heads)[:, None] & inside[None, :]
        is_q, turned = (head < heads)[:, None], (head < qk_heads)[:, None]
        q_ptr = dq_ptr + row * stride_q + head[:, None] * stride_q_head + d[None, :]
        k_ptr = dk_ptr + row * stride_k + (head[:, None] - heads) * stride_k_head + d[None, :]
        v_ptr = dv_ptr + row * stride_v + (head[:, None] - qk_heads) * stride_v_head + d[None, :]
        from_q, from_k, from_v = mask & is_q, mask & turned & (head >= heads)[:, None], mask & (head >= qk_heads)[:, None]
        # One of the three holds each head; the others read as zero.
        d1 = tl.load(q_ptr, from_q, 0.0) + tl.load(k_ptr, from_k, 0.0) + tl.load(v_ptr, from_v, 0.0)
        d2 = tl.load(q_ptr + half, from_q, 0.0) + tl.load(k_ptr + half, from_k, 0.0) + tl.load(v_ptr + half, from_v, 0.0)
        d1, d2 = d1.to(tl.float32), d2.to(tl.float32)
        g1 = tl.where(turned, d1 * cos + d2 * sin, d1)
        g2 = tl.where(turned, d2 * cos - d1 * sin, d2)
        place = head[:, None] * (2 * half) + d[None, :]
        if NORM:
            x1 = tl.load(x_ptr + row * stride_x + place, mask, 0.0).to(tl.float32)
            x2 = tl.load(x_ptr + row * stride_x + place + half, mask, 0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * half) + eps)[:, None]
            q1, q2 = tl.load(qw_ptr + d, inside, 0.0), tl.load(qw_ptr + half + d, inside, 0.0)
            k1, k2 = tl.load(kw_ptr + d, inside, 0.0), tl.load(kw_ptr + half + d, inside, 0.0)
            w1 = g1 * tl.where(is_q, q1[None, :], k1[None, :]).to(tl.float32)
            w2 = g2 * tl.where(is_q, q2[None, :], k2[None, :]).to(tl.float32)
            slope = (tl.sum(w1 * x1 + w2 * x2, 1) / (2 * half))[:, None] * rstd * rstd
            g1 = tl.where(turned, rstd * (w1 - x1 * slope), g1)
            g2 = tl.where(turned, rstd * (w2 - x2 * slope), g2)
        g1, g2 = g1.to(dx_ptr.dtype.element_ty), g2.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * stride_dx + place, g1, mask)
        tl.store(dx_ptr + row * stride_dx + place + half, g2, mask)
        if R > 0:
            width = all_heads * 2 * half
            # A head's halves lie apart; as columns outside the row they count for nothing.
            c1 = tl.where(mask, place, width).reshape(HEADS * HALF)
            c2 = tl.where(mask, place + half, width).reshape(HEADS * HALF)
            s = add_shrunk(s, g1.to(tl.float32).reshape(1, HEADS * HALF), b_ptr, stride_b, c1, width, R, RP)
            s = add_shrunk(s, g2.to(tl.float32).reshape(1, HEADS * HALF), b_ptr, stride_b, c2, width, R, RP)
    if R > 0:
        store_mixed(
            s, row + tl.arange(0, 1), T, s_ptr, stride_s, m_ptr, adapter_ptr, dx_ptr + all_heads * 2 * half, stride_dx,
            tail, 0.0, KEEP, HAS_ADAPTER, True, R, RANK, RP,
        )  # fmt: skip


def config(h: Heads) -> dict[str, int]:
    """Eight heads at a time, one row a program."""
    return {"HEADS": 8, "HALF": triton.next_power_of_2(h.head_dim // 2), "num_warps": 4}


def _launch_forward(qkv: Tensor, cos: Tensor, sin: Tensor, h: Heads, out: Tensor, cache: tuple[Tensor, ...]) -> None:
    """cache: keys, values, positions, table; or nothing."""
    qw, kw = (cos, cos) if h.q_norm is None or h.k_norm is None else (h.q_norm, h.k_norm)
    counts = (h.heads, h.heads + h.kv_heads, h.heads + 2 * h.kv_heads, h.head_dim // 2)
    most, page = (cache[3].shape[1], cache[0].shape[2]) if cache else (0, 0)
    launch(
        _forward,
        (len(qkv),),
        *(qkv, cos, sin, qw, kw, out, *(cache or (out, out, out, out)), most),
        *(*counts, qkv.stride(0), cos.stride(0), h.eps),
        NORM=h.q_norm is not None,
        PAGE=page,
        **config(h),
    )


def rope_triton(qkv: Tensor, cos: Tensor, sin: Tensor, h: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """The forward in one kernel; q, k and v are parts of one new tensor."""
    out = qkv.new_empty(len(qkv), h.heads + 2 * h.kv_heads, h.head_dim)
    _launch_forward(qkv, cos, sin, h, out, ())
    q, k, v = out.split((h.heads, h.kv_heads, h.kv_heads), 1)
    return q, k, v


def rope_cache_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, h: Heads, keys: Tensor, values: Tensor, positions: Tensor, table: Tensor
) -> Tensor:  # q (T, heads, D)
    """The forward in one kernel that puts k and v where a paged cache wants them (`decode_attention`)."""
    out = qkv.new_empty(len(qkv), h.heads, h.head_dim)
    _launch_forward(qkv, cos, sin, h, out, (keys, values, positions, table))
    return out


def rope_backward_triton(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor, h: Heads, inner: Correction | None
) -> Tensor:
    """The backward in one kernel."""
    dq, dk, dv = (x if x.stride(2) == 1 else x.contiguous() for x in (dq, dk, dv))
    T, every = len(dq), h.heads + 2 * h.kv_heads
    dx = padded(T, h.width, inner, dq)
    tensors, constants = arguments(inner, inner.s if inner else None, dq)
    qw, kw = (cos, cos) if h.q_norm is None or h.k_norm is None else (h.q_norm, h.k_norm)
    x, b = dq if qkv is None else qkv, dq if inner is None else inner.Bt
    launch(
        _backward,
        (T,),
        *(dq, dk, dv, x, cos, sin, qw, kw, b, dx, *tensors, T),
        *(h.heads, h.heads + h.kv_heads, every, h.head_dim // 2),
        *(stride for g in (dq, dk, dv) for stride in g.stride()[:2]),
        *(t.stride(0) for t in (x, cos, b, dx)),
        dx.shape[1] - h.width - constants["R"],
        h.eps,
        NORM=h.q_norm is not None,
        **constants,
        **config(h),
    )
    return dx


def rope_native(qkv: Tensor, cos: Tensor, sin: Tensor, h: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """The forward in C. v is a view of qkv."""
    out = qkv.new_empty(len(qkv), h.heads + h.kv_heads, h.head_dim)
    _call_native(qkv, cos, sin, h, out, (None, None, None, None, 0, 0, 0))
    q, k = out.split((h.heads, h.kv_heads), 1)
    return q, k, qkv[:, : h.width].unflatten(1, (-1, h.head_dim))[:, h.heads + h.kv_heads :]


def rope_cache_native(
    qkv: Tensor, cos: Tensor, sin: Tensor, h: Heads, keys: Tensor, values: Tensor, positions: Tensor, table: Tensor | None
) -> Tensor:  # q (T, heads, D)
    """The forward in C that puts k and v where a cache wants them, with a table of pages or without (`decode_attention`)."""
    out = qkv.new_empty(len(qkv), h.heads, h.head_dim)
    _call_native(qkv, cos, sin, h, out, native.cells(len(qkv), keys, values, positions, table))
    return out


def _call_native(qkv: Tensor, cos: Tensor, sin: Tensor, h: Heads, out: Tensor, cache: tuple[Any, ...]) -> None:
    sizes = (len(qkv), h.heads, h.kv_heads, h.head_dim, h.eps)
    native.call("rope_forward", qkv.numel(), *sizes, *native.rows(qkv), cos, sin, h.q_norm, h.k_norm, out, *cache)


def rope_backward_native(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor, h: Heads, inner: Correction | None
) -> Tensor:
    """The backward in C."""
    dq, dk, dv = (x if x.stride(2) == 1 else x.contiguous() for x in (dq, dk, dv))
    dx = padded(len(dq), h.width, inner, dq)
    grads = [part for g in (dq, dk, dv) for part in (g, g.stride(0), g.stride(1))]
    norms = (None, None) if qkv is None else (h.q_norm, h.k_norm)
    sizes = (len(dq), h.heads, h.kv_heads, h.head_dim, h.eps)
    terms = (*grads, *native.rows(qkv), cos, sin, *norms, *native.carrying(dx, h.width, inner))
    native.call("rope_backward", dx.numel(), *sizes, *terms, *native.mixing(inner, True))
    return dx


def _forward_op(qkv: Tensor, h: Heads):
    return dispatch.choose("rope", qkv, rope_native, rope_triton, rope_plain, h.head_dim, h.head_dim // 2)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, M, cos, sin, h, inner):
        ctx.save_for_backward(cos, sin, qkv if h.q_norm is not None else None)
        ctx.heads, ctx.inner, ctx.width = h, inner, qkv.shape[1]
        return _forward_op(qkv, h)(qkv, cos, sin, h)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        cos, sin, qkv = ctx.saved_tensors
        ops = (rope_backward_native, rope_backward_triton, rope_backward_plain)
        D = ctx.heads.head_dim
        op = dispatch.choose("rope", dq, *ops, D, D // 2, c=ctx.inner)
        dqkv = op(dq, dk, dv, qkv, cos, sin, ctx.heads, ctx.inner)
        return dqkv[:, : ctx.width], None, None, None, None, None


def rope(
    qkv: Tensor,  # (T, (heads + 2 kv_heads) D) or (T, padded): qkv's output
    cos: Tensor,  # (T, D), from rope_tables
    sin: Tensor,  # (T, D)
    h: Heads,
    inner: Correction | None,  # of qkv
) -> tuple[Tensor, Tensor, Tensor]:  # q (T, heads, D), k (T, kv_heads, D), v (T, kv_heads, D)
    """The rows that attention reads, with a gradient for qkv, and s of its linear."""
    M = inner.M if inner is not None else None
    if torch.is_grad_enabled() and (qkv.requires_grad or (M is not None and M.requires_grad)):
        return _Rope.apply(qkv, M, cos, sin, h, inner)
    return _forward_op(qkv, h)(qkv, cos, sin, h)
