"""Frozen linear with a rank-r correction: one frozen weight shared by every adapter of a batch.

    t = x A^T          (T, R)   shrink: all that a frozen linear must keep for its backward
    z = M t            (T, R)   expand, segment by segment: z[s] = M[s] t[s]
    y = x W^T + z B^T  (T, N)
    s = dy B           (T, R)
    dM = s^T t, segment by segment      dx = dy W + (M^T s) A      dW does not exist

Layers that read the same input are one group: qkv has 3 segments, gate+up 2, o and down 1. W (N, K) holds their rows one
below the other, A (R, K) their shrinks, B (N, R) their expands in blocks, with R = segments * r. `row_adapter` (T,) picks
M per row, so any row of a batch may carry any adapter.

On a CPU the rows are padded to a multiple of 8 and R is one: a row's bits then do not depend on how many rows came with
it, because MKL picks the same inner kernel for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW = 8  # rows and narrow columns of every CPU GEMM are multiples of this


@dataclass
class FrozenLinear:
    """The constants of one group. A and B are absent until an adapter's factors are packed in."""

    weight: Tensor  # (N, K)
    bias: Tensor | None = None  # (N,)
    A: Tensor | None = None  # (R, K)
    Bt: Tensor | None = None  # (R, N), B transposed and contiguous: s = F.linear(dy, Bt) is twice as fast as dy @ B

    def pack(self, factors: Sequence[tuple[Tensor, Tensor] | None], sizes: Sequence[int]) -> None:
        """Stack the segments' factors (A (r, K), B (n, r)); None is a segment without a correction.

        `sizes` are the segments' rows of W. Zero segments are appended up to `padded_segments`.
        """
        r = next(f[0].shape[0] for f in factors if f is not None)
        rank = padded_segments(len(factors), r) * r
        self.A = self.weight.new_zeros(rank, self.weight.shape[1])
        self.Bt = self.weight.new_zeros(rank, self.weight.shape[0])
        row = 0
        for segment, (factor, size) in enumerate(zip(factors, sizes, strict=True)):
            if factor is not None:
                rows = slice(segment * r, (segment + 1) * r)
                self.A[rows] = factor[0].to(self.A)
                self.Bt[rows, row : row + size] = factor[1].T.to(self.Bt)
            row += size

    def __call__(self, x: Tensor, M: Tensor | None = None, row_adapter: Tensor | None = None) -> Tensor:
        """x (T, K) -> (T, N); see `frozen_linear`."""
        return frozen_linear(x, self.weight, self.bias, self.A, self.Bt, M, row_adapter)


def padded_segments(segments: int, r: int) -> int:
    """The least number of segments, at least `segments`, that makes R = segments * r a multiple of NARROW."""
    while segments * r % NARROW:
        segments += 1
    return segments


def frozen_linear_ref(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    A: Tensor | None,  # (R, K)
    Bt: Tensor | None,  # (R, N)
    M: Tensor | None,  # (adapters, segments, r, r)
    row_adapter: Tensor | None = None,  # (T,)
) -> Tensor:  # (T, N)
    """The formula as it stands, in any dtype, differentiable by autograd: the oracle."""
    y = F.linear(x, weight, bias)
    if M is None or A is None or Bt is None:
        return y
    rows = row_adapter if row_adapter is not None else torch.zeros(len(x), dtype=torch.long, device=x.device)
    t = (x @ A.T).unflatten(-1, M.shape[1:3])  # (T, segments, r)
    z = torch.einsum("tsij,tsj->tsi", M[rows], t).flatten(1)  # (T, R)
    return y + z @ Bt


def mix(t: Tensor, M: Tensor, row_adapter: Tensor | None) -> Tensor:
    """z[s] = M[s] t[s] for t (T, R) and M (adapters, segments, r, r), in M's precision, rounded to t's.

    One adapter is one small product with the block-diagonal M; several are r rank-1 steps, each row with its own M.
    """
    segments, r = M.shape[1:3]
    if row_adapter is None:
        dense = M.new_zeros(segments, r, segments, r)
        dense.diagonal(dim1=0, dim2=2).copy_(M[0].permute(1, 2, 0))
        return torch.mm(t.to(M.dtype), dense.view(segments * r, -1).T).to(t.dtype)
    m = M[row_adapter]  # (T, segments, r, r)
    t_ = t.to(M.dtype).unflatten(1, (segments, r))  # (T, segments, r)
    z = m[..., 0] * t_[..., :1]
    for j in range(1, M.shape[-1]):
        z = z + m[..., j] * t_[..., j : j + 1]
    return z.flatten(1).to(t.dtype)


def reduce_dM(s: Tensor, t: Tensor, M: Tensor, row_adapter: Tensor | None) -> Tensor:
    """dM (adapters, segments, r, r) = sum over the rows of each adapter of s t^T, in M's precision."""
    segments, r = M.shape[1:3]
    s, t = s.to(M.dtype), t.to(M.dtype)
    if row_adapter is None:
        outer = (s.T @ t).view(segments, r, segments, r)
        return outer.diagonal(dim1=0, dim2=2).permute(2, 0, 1).unsqueeze(0)
    outer = s.view(-1, segments, r, 1) * t.view(-1, segments, 1, r)  # (T, segments, r, r)
    return torch.zeros_like(M).index_add_(0, row_adapter, outer)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, Bt: Tensor, M: Tensor, row_adapter: Tensor | None
) -> tuple[Tensor, Tensor]:
    t = F.linear(x, A)
    y = F.linear(x, weight, bias)
    y.addmm_(mix(t, M, row_adapter), Bt)
    return y, t


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, M, weight, bias, A, Bt, row_adapter):  # type: ignore[no-untyped-def]
        y, t = _forward(x, weight, bias, A, Bt, M, row_adapter)
        ctx.save_for_backward(t, M, weight, A, Bt, row_adapter)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        t, M, weight, A, Bt, row_adapter = ctx.saved_tensors
        s = F.linear(dy, Bt)  # (T, R)
        dx = dM = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.addmm_(mix(s, M.transpose(-1, -2), row_adapter), A)
        if ctx.needs_input_grad[1]:
            dM = reduce_dM(s, t, M, row_adapter)
        return dx, dM, None, None, None, None, None


def pad_rows(x: Tensor) -> Tensor:
    """x (T, ...) with zero rows appended on a CPU up to a multiple of NARROW; x itself where nothing is to do."""
    missing = -len(x) % NARROW if x.device.type == "cpu" else 0
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def frozen_linear(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K), frozen
    bias: Tensor | None,  # (N,), frozen
    A: Tensor | None,  # (R, K), frozen
    Bt: Tensor | None,  # (R, N), frozen
    M: Tensor | None,  # (adapters, segments, r, r), fp32 (fp64 in tests); None: the bare linear
    row_adapter: Tensor | None = None,  # (T,) integer: the adapter of each row; None: adapter 0 for all
) -> Tensor:  # (T, N)
    """y = x W^T + bias + (M x A^T) B^T, with gradients for x and M. Saves t and the constants, not x."""
    rows = len(x)
    x = pad_rows(x)
    if row_adapter is not None:
        row_adapter = pad_rows(row_adapter)
    if M is None:
        y = F.linear(x, weight, bias)
    elif A is None or Bt is None:
        raise ValueError("M was given to a frozen linear that holds no factors; pack them first")
    elif torch.is_grad_enabled() and (x.requires_grad or M.requires_grad):
        y = _FrozenLinear.apply(x, M, weight, bias, A, Bt, row_adapter)
    else:
        y, _ = _forward(x, weight, bias, A, Bt, M, row_adapter)
    return y[:rows]
