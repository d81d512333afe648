"""Causal attention with grouped queries: over packed whole sequences, and over a KV cache for one new token a slot.

    out = softmax(q k^T / sqrt(D)) v

Prefill and update attention is a library's job: sequences are padded on the right, where a causal mask never looks, and go
through PyTorch's scaled_dot_product_attention. Decode is a single query per slot, and three plain operations.

Short sequences on a CPU take those same operations in prefill and update too: forward five times faster than the library at
40 tokens (half as fast at 400), and, with query rows padded to a multiple of 8 as for every GEMM, the same bits as decode.
The rollout's log-probs are then exactly the update's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels.frozen_linear import NARROW

SHORT = 128  # longest sequence that a CPU attends to in plain products


class _Pad(torch.autograd.Function):
    """(T, ...) -> (cells, ...), row t in cell index[t], zeros elsewhere. The backward is a gather, not a scatter-add."""

    @staticmethod
    def forward(ctx, x, index, cells):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        return x.new_zeros(cells, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """(cells, ...) -> (T, ...), the inverse of _Pad."""

    @staticmethod
    def forward(ctx, x, index):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
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


def _softmax_scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
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
    def forward(ctx, q, k, v, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, bias)
        return torch.matmul(_softmax_scores(q, k, bias), v)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, bias = ctx.saved_tensors
        p = _softmax_scores(q, k, bias)  # (B, Hkv, rows, length)
        dp = torch.matmul(dout, v.transpose(-1, -2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
        return torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q), torch.matmul(p.transpose(-1, -2), dout), None


def packed_attention(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, Hkv, D)
    v: Tensor,  # (T, Hkv, D)
    index: Tensor,  # (T,): sequence * longest + position
    sequences: int,
    longest: int,
) -> Tensor:  # (T, H, D)
    """Causal attention inside each of the packed sequences, with gradients for q, k and v."""
    heads, kv_heads = q.shape[1], k.shape[1]

    def pad(x: Tensor) -> Tensor:  # (T, heads, D) -> (sequences, heads, longest, D)
        return _Pad.apply(x, index, sequences * longest).unflatten(0, (sequences, longest)).transpose(1, 2)

    if q.device.type != "cpu" or longest > SHORT:
        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True, enable_gqa=heads != kv_heads)
        return _Unpad.apply(out.transpose(1, 2).flatten(0, 1), index)
    share = heads // kv_heads
    rows = pad(q).unflatten(1, (kv_heads, share)).flatten(2, 3)  # (sequences, Hkv, share * longest, D)
    future = torch.full((longest, longest), -torch.inf, dtype=q.dtype).triu(1)
    out = _PlainAttention.apply(rows, pad(k), pad(v), future.repeat(share, 1))
    out = out.unflatten(2, (share, longest)).flatten(1, 2)  # (sequences, H, longest, D)
    return _Unpad.apply(out.transpose(1, 2).flatten(0, 1), index)


def suffix_attention(
    q: Tensor,  # (T', H, D): the suffixes' tokens, one suffix after another
    k: Tensor,  # (T, Hkv, D): of the whole pack
    v: Tensor,  # (T, Hkv, D)
    index: Tensor,  # (T',): suffix * rows + place in the suffix
    keys: Tensor,  # (suffixes, length): rows of k that a suffix may see, its prefix's first
    bias: Tensor,  # (suffixes, rows, length), 0 where a key is visible and -inf where not
) -> Tensor:  # (T', H, D)
    """Attention of sequences that share a prefix: each suffix sees its prefix's keys and, causally, its own. The prefix's
    keys and values get the sum of all their suffixes' gradients."""
    heads, kv_heads, (suffixes, rows, length) = q.shape[1], k.shape[1], bias.shape
    q = _Pad.apply(q, index, suffixes * rows).unflatten(0, (suffixes, rows)).transpose(1, 2)  # (suffixes, H, rows, D)
    k, v = (x.index_select(0, keys.flatten()).unflatten(0, keys.shape).transpose(1, 2) for x in (k, v))
    if q.device.type != "cpu" or length > SHORT:
        out = F.scaled_dot_product_attention(q, k, v, bias[:, None], enable_gqa=heads != kv_heads)
    else:
        share = heads // kv_heads
        q = q.unflatten(1, (kv_heads, share)).flatten(2, 3)  # (suffixes, Hkv, share * rows, D)
        out = _PlainAttention.apply(q, k, v, bias.repeat(1, share, 1)[:, None]).unflatten(2, (share, rows)).flatten(1, 2)
    return _Unpad.apply(out.transpose(1, 2).flatten(0, 1), index)


def decode_attention(
    q: Tensor,  # (slots, H, D)
    keys: Tensor,  # (slots, Hkv, length, D)
    values: Tensor,  # (slots, Hkv, length, D)
    bias: Tensor,  # (slots, length), 0 where a key is visible and -inf where not
) -> Tensor:  # (slots, H, D)
    """One query per slot against its cached keys. The H/Hkv queries that share a key head are rows of one small matmul."""
    share = q.shape[1] // keys.shape[1]
    q = q.unflatten(1, (keys.shape[1], share))  # (slots, Hkv, share, D)
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, keys, values, bias[:, None, None]).flatten(1, 2)
    pad = (0, 0, 0, -share % NARROW)  # for the two products alone
    scores = torch.matmul(F.pad(q * q.shape[-1] ** -0.5, pad), keys.transpose(-1, -2))[:, :, :share]
    p = _softmax(scores + bias[:, None, None])  # (slots, Hkv, share, length)
    return torch.matmul(F.pad(p, pad), values)[:, :, :share].flatten(1, 2)
