"""Causal attention with grouped queries over packed sequences, some of which continue others: prefill, scoring and update.

    out = softmax(q k^T / sqrt(D)) v

It is a library's job: PyTorch's variable-length attention on a GPU in half precision, where nothing is padded, elsewhere its
scaled_dot_product_attention over sequences padded on the right, where a causal mask never looks.

Short sequences on a CPU take what decode takes instead. In C that is one query after another, with the same bits as decode's.
In plain operations it is five times faster forward than the library at 40 tokens (half as fast at 400), and, with query rows
padded to a multiple of 8 as for every GEMM, nearly always of decode's bits; over a fixed number of keys (`capacity`) always.
"""

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch, native
from tinylora.kernels.packing import Packing

SHORT = 128  # longest sequence that a CPU attends to in plain products


class _Pad(torch.autograd.Function):
    """(T, ...) -> (cells, ...), row t in cell index[t], zeros elsewhere. The backward is a gather, not a scatter-add."""

    @staticmethod
    def forward(ctx, x, index, cells):
        ctx.save_for_backward(index)
        return x.new_zeros(cells, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx, dy):
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """(cells, ...) -> (T, ...), the inverse of _Pad."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dy):
        return dy.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], dy), None


def packed_attention_ref(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One sequence after another, with the formula as it stands: the oracle. q (T, H, D), k and v (T, Hkv, D)."""
    outs = []
    for q_, k_, v_ in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        share = q.shape[1] // k.shape[1]
        k_, v_ = k_.repeat_interleave(share, 1), v_.repeat_interleave(share, 1)
        scores = torch.einsum("ihd,jhd->hij", q_, k_) / q.shape[-1] ** 0.5
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        outs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v_))
    return torch.cat(outs)


def softmax_scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """q (..., rows, D), k (..., length, D), bias (..., rows, length) -> probabilities (..., rows, length)."""
    return _softmax(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + bias)


def _softmax(scores: Tensor) -> Tensor:
    wide = torch.float32 if scores.dtype in (torch.bfloat16, torch.float16) else scores.dtype
    return scores.softmax(-1, dtype=wide).to(scores.dtype)


class _PlainAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias) v; saves q, k, v and recomputes the probabilities.

    q (B, Hkv, rows, D), k and v (B, Hkv, length, D), bias ([B, 1,] rows, length).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.save_for_backward(q, k, v, bias)
        return torch.matmul(softmax_scores(q, k, bias), v)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, bias = ctx.saved_tensors
        p = softmax_scores(q, k, bias)  # (B, Hkv, rows, length)
        dp = torch.matmul(dout, v.transpose(-1, -2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
        return torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q), torch.matmul(p.transpose(-1, -2), dout), None


class NativeAttention(torch.autograd.Function):
    """In C, query by query as `decode_attention` does and to its bits; saves q, k, v and recomputes the probabilities."""

    @staticmethod
    def forward(ctx, q, k, v, layout):
        ctx.save_for_backward(q, k, v)
        ctx.layout, out = layout, q.new_empty(q.shape)
        where = (layout.sequence, layout.place)
        native.call("packed_attention_forward", q.numel(), *_native_arguments(q, k, v, layout), *where, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        members, family = ctx.layout.families
        dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        grads = (dout.contiguous(), dq, dk, dv, members, family, len(family) - 1)
        native.call("packed_attention_backward", q.numel(), *_native_arguments(q, k, v, ctx.layout), *grads)
        return dq, dk, dv, None


def _native_arguments(q: Tensor, k: Tensor, v: Tensor, layout: Packing) -> tuple[Any, ...]:
    (T, heads, D), kv_heads = q.shape, k.shape[1]
    q, k, v = (x if x.stride(2) == 1 and x.stride(1) == D else x.contiguous() for x in (q, k, v))
    rows = [part for x in (q, k, v) for part in (x, x.stride(0))]
    return T, heads, kv_heads, D, layout.most_keys, *rows, len(layout.lengths), *layout.table


@cache
def _varlen() -> tuple[Any, dict[str, Any]]:
    """PyTorch's variable-length attention and the arguments that make it causal. From 2.12 on it wants to be told of grouped
    queries; before, it takes them without a word."""
    from torch.nn.attention.varlen import varlen_attn

    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn, {"window_size": (-1, 0), **gqa}


class _StrictFrom(torch.autograd.Function):
    """x as it is; from its backward on, nondeterministic operations are refused. `held` keeps the mode before."""

    @staticmethod
    def forward(ctx, x, held):
        ctx.held = held
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        ctx.held.append((torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()))
        torch.use_deterministic_algorithms(True)
        return dx, None


class _StrictUntil(torch.autograd.Function):
    """q, k and v as they are; their backward brings back the mode that `held` keeps."""

    @staticmethod
    def forward(ctx, held, q, k, v):
        ctx.held = held
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, *grads):
        enabled, warn_only = ctx.held.pop()
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        return None, *grads


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: Packing) -> Tensor:
    """The library's, its backward alone in strict deterministic mode: with warn_only it warns, and adds dq up by atomics,
    whose order shows from 257 keys on (read in PyTorch 2.11 and 2.13)."""
    rows, ends_q, ends_k, longest_q, longest_k = layout.varlen
    if layout.prefixes:
        k, v = k.index_select(0, rows), v.index_select(0, rows)
    held: list[tuple[bool, bool]] = []
    q, k, v = _StrictUntil.apply(held, q.contiguous(), k.contiguous(), v.contiguous())
    attention, options = _varlen()
    out = attention(q, k, v, ends_q, ends_k, longest_q, longest_k, **options)
    return _StrictFrom.apply(out, held)


def packed_attention(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, Hkv, D)
    v: Tensor,  # (T, Hkv, D)
    layout: Packing,
) -> Tensor:  # (T, H, D)
    """Causal attention inside each of the packed sequences and suffixes, with gradients for q, k and v."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen_attention(q, k, v, layout)
    D = q.shape[2]
    if _plain(q, layout.most_keys, layout) and dispatch.runs_native("packed_attention", q, D, D // 2):
        return NativeAttention.apply(q, k, v, layout)
    split = layout.split
    out = _whole(q[:split], k[:split], v[:split], layout)
    return torch.cat([out, _suffixes(q[split:], k, v, layout)]) if layout.prefixes else out


def _plain(q: Tensor, length: int, layout: Packing) -> bool:
    return q.device.type == "cpu" and (length <= SHORT or layout.capacity is not None)


def _whole(q: Tensor, k: Tensor, v: Tensor, layout: Packing) -> Tensor:
    heads, kv_heads, sequences, longest = q.shape[1], k.shape[1], layout.whole, layout.longest

    def pad(x: Tensor) -> Tensor:  # (T, heads, D) -> (sequences, heads, longest, D)
        return _Pad.apply(x, layout.index, sequences * longest).unflatten(0, (sequences, longest)).transpose(1, 2)

    if not _plain(q, longest, layout):
        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True, enable_gqa=heads != kv_heads)
        return _Unpad.apply(out.transpose(1, 2).flatten(0, 1), layout.index)
    share = heads // kv_heads
    rows = pad(q).unflatten(1, (kv_heads, share)).flatten(2, 3)  # (sequences, Hkv, share * longest, D)
    future = torch.full((longest, longest), -torch.inf, dtype=q.dtype).triu(1)
    out = _PlainAttention.apply(rows, pad(k), pad(v), future.repeat(share, 1))
    out = out.unflatten(2, (share, longest)).flatten(1, 2)  # (sequences, H, longest, D)
    return _Unpad.apply(out.transpose(1, 2).flatten(0, 1), layout.index)


def _suffixes(q: Tensor, k: Tensor, v: Tensor, layout: Packing) -> Tensor:
    """q (T', H, D): the suffixes' tokens; k and v (T, Hkv, D): of the whole pack."""
    index, keys, bias = layout.suffixes
    heads, kv_heads, (suffixes, rows, length) = q.shape[1], k.shape[1], bias.shape
    q = _Pad.apply(q, index, suffixes * rows).unflatten(0, (suffixes, rows)).transpose(1, 2)  # (suffixes, H, rows, D)
    k, v = (x.index_select(0, keys.flatten()).unflatten(0, keys.shape).transpose(1, 2) for x in (k, v))
    if not _plain(q, length, layout):
        out = F.scaled_dot_product_attention(q, k, v, bias[:, None], enable_gqa=heads != kv_heads)
    else:
        share = heads // kv_heads
        q = q.unflatten(1, (kv_heads, share)).flatten(2, 3)  # (suffixes, Hkv, share * rows, D)
        out = _PlainAttention.apply(q, k, v, bias.repeat(1, share, 1)[:, None]).unflatten(2, (share, rows)).flatten(1, 2)
    return _Unpad.apply(out.transpose(1, 2).flatten(0, 1), index)
