"""Frozen linear with a rank-r correction: one frozen weight shared by every adapter of a batch.

    t = x A^T          (T, R)   shrink: all that a frozen linear must keep for its backward
    z = M t            (T, R)   expand, segment by segment: z[s] = M[s] t[s]
    y = x W^T + z B^T  (T, N)
    s = dy B           (T, R)
    dM = s^T t, segment by segment      dx = dy W + (M^T s) A      dW does not exist

Layers that read the same input are one group: qkv has 3 segments, gate+up 2, o and down 1. W (N, K) holds their rows one
below the other, A (R, K) their shrinks, B (N, R) their expands in blocks, with R = segments * r. `row_adapter` (T,) picks
M per row, so any row of a batch may carry any adapter.

On a CPU the rows are padded to a multiple of 8. Where R is one too, as in a Decoder, a row's bits do not depend on how many
rows came with it, because MKL picks the same inner kernel for all of them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.correction import Correction, padded_width, row_stride
from tinylora.kernels.fused_linear import fused_linear
from tinylora.kernels.shrink import shrink, shrink_ref

NARROW = 8  # rows and narrow columns of every CPU GEMM are multiples of this
SPARE = 24  # rank that a buffer has room for from the start: three segments of rank 8


class FrozenLinear:
    """The constants of one group. A and B are absent until an adapter's factors are packed in.

    Where products run over padded buffers (`linear`), weight, A and B are views of one: [[W, B, bias], [A, 0, 0]]. On a CPU it
    is as large as its contents, so that its rows follow one another.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, A: Tensor | None = None, Bt: Tensor | None = None) -> None:
        self.weight = weight  # (N, K)
        self.bias = bias  # (N,)
        self.A = A  # (R, K)
        self.Bt = Bt  # (R, N), B transposed and contiguous: s = F.linear(dy, Bt) is twice as fast as dy @ B
        self.buffer: Tensor | None = None  # (padded N, padded K) or more
        self.carries = True  # whether rows of x come with z: if not, a CPU's buffer has neither B nor bias

    @classmethod
    def empty(
        cls, rows: int, columns: int, bias: bool, dtype: torch.dtype, device: torch.device, carries: bool = True
    ) -> "FrozenLinear":
        """Room for weights to be copied into, in a padded buffer where this device's backend multiplies one."""
        biases = torch.empty(rows, dtype=dtype, device=device) if bias else None
        if dispatch.backend(device.type) in ("reference", "addmm"):
            return cls(torch.empty(rows, columns, dtype=dtype, device=device), biases)
        group = cls(torch.empty(0, dtype=dtype, device=device), biases)
        group.carries = carries
        group._allocate(rows, columns, 0 if device.type == "cpu" else SPARE)
        return group

    def _allocate(self, rows: int, columns: int, rank: int) -> None:
        self.buffer = self.weight.new_zeros(self._shape(rows, columns, rank))
        self.weight = self.buffer[:rows, :columns]

    def _shape(self, rows: int, columns: int, rank: int) -> tuple[int, int]:
        """Of a buffer with room for this rank; 0 on a CPU: none."""
        if not self.weight.is_cpu:
            return padded_width(rows, rank), row_stride(columns, rank)
        if rank == 0:
            return rows, columns
        return padded_width(rows, rank), padded_width(columns, rank) if self.carries else columns

    def pack(self, factors: Sequence[tuple[Tensor, Tensor] | None], sizes: Sequence[int], narrow: int = 1) -> None:
        """Stack the segments' factors (A (r, K), B (n, r)); None is a segment without a correction.

        `sizes` are the segments' rows of W. Zero segments are appended until R is a multiple of `narrow`.
        """
        r = next(f[0].shape[0] for f in factors if f is not None)
        (rows, columns), rank = self.weight.shape, padded_segments(len(factors), r, narrow) * r
        self.A, self.Bt = self.weight.new_zeros(rank, columns), self.weight.new_zeros(rank, rows)
        start = 0
        for segment, (factor, size) in enumerate(zip(factors, sizes, strict=True)):
            if factor is not None:
                own = slice(segment * r, (segment + 1) * r)
                self.A[own] = factor[0].to(self.A)
                self.Bt[own, start : start + size] = factor[1].T.to(self.Bt)
            start += size
        if self.buffer is not None:
            shape, held = self._shape(rows, columns, rank), self.buffer.shape
            if shape != held if self.weight.is_cpu else shape[0] > held[0] or shape[1] > held[1]:
                weight = self.weight
                self._allocate(rows, columns, rank)
                self.weight.copy_(weight)
            self.unpack()
            self.buffer[rows : rows + rank, :columns] = self.A
            if self.buffer.shape[1] > columns:
                self.buffer[:rows, columns : columns + rank] = self.Bt.T
                if self.bias is not None:
                    self.buffer[:rows, columns + rank] = self.bias

    def unpack(self) -> None:
        """Zero everything beside the weights, whatever rank was packed before."""
        rows, columns = self.weight.shape
        if self.buffer is not None:
            self.buffer[rows:] = 0
            self.buffer[:, columns:] = 0

    def __call__(self, x: Tensor, M: Tensor | None = None, row_adapter: Tensor | None = None) -> Tensor:
        """x (T, K) -> (T, N); see `frozen_linear`."""
        return frozen_linear(x, self.weight, self.bias, self.A, self.Bt, M, row_adapter)


def padded_segments(segments: int, r: int, narrow: int) -> int:
    """The least number of segments, at least `segments`, that makes R = segments * r a multiple of `narrow`."""
    while segments * r % narrow:
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


def reduce_dM(s: Tensor, t: Tensor, M: Tensor, row_adapter: Tensor | None) -> Tensor:
    """dM (adapters, segments, r, r) = sum over the rows of each adapter of s t^T, in M's precision."""
    segments, r = M.shape[1:3]
    s, t = s.to(M.dtype), t.to(M.dtype)
    if row_adapter is None:
        outer = (s.T @ t).view(segments, r, segments, r)
        return outer.diagonal(dim1=0, dim2=2).permute(2, 0, 1).unsqueeze(0)
    outer = s.view(-1, segments, r, 1) * t.view(-1, segments, 1, r)  # (T, segments, r, r)
    return torch.zeros_like(M).index_add_(0, row_adapter, outer)


def two_products(x: Tensor, z: Tensor | None, weight: Tensor, Bt: Tensor | None, bias: Tensor | None, y: Tensor) -> Tensor:
    """y = z B^T + bias, then y += x W^T, for weight (N, K) or the transpose of a (K, N). Writes and returns y (T, N).

    In this order the large product adds to y as it writes it, instead of a pass over y of its own; and in half precision the
    correction enters before y is rounded. At z = 0 the bits are those of x W^T + bias.
    """
    if z is not None and Bt is not None:
        torch.mm(z, Bt, out=y) if bias is None else torch.addmm(bias, z, Bt, out=y)
        return y.addmm_(x, weight.T)
    return torch.mm(x, weight.T, out=y) if bias is None else torch.addmm(bias, x, weight.T, out=y)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, where it is on: between large products every needless call costs tens of microseconds of cold code."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _shrunk(x: Tensor, weight: Tensor, c: Correction) -> Tensor:
    """z (T, R) in x's dtype; in the factors' where they are wider than the weight, as fp32 ones are on a bf16 base."""
    if c.A.itemsize > weight.itemsize:
        return shrink_ref(x.to(c.A.dtype), c)
    return shrink(x, c if c.A.dtype == x.dtype else replace(c, A=c.A.to(x.dtype)))


def _product(x: Tensor, z: Tensor, weight: Tensor, Bt: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + z B^T + bias for weight (N, K) or the transpose of a (K, N). Where z is wider than x, its product is computed and
    added in z's precision, and the sum rounded once: op for op what PEFT does, and its bits."""
    weight, Bt, bias = weight.to(x.dtype), Bt.to(z.dtype), None if bias is None else bias.to(x.dtype)
    if z.dtype != x.dtype:
        return F.linear(x, weight, bias).add_(z @ Bt)
    kind, y = dispatch.backend(x.device.type), x.new_empty(len(x), len(weight))
    if kind == "reference":
        return F.linear(x, weight, bias) + z @ Bt
    if kind == "triton" and dispatch.runs_triton("fused_linear", x):
        fused_linear(x, z, weight, Bt, bias, y)
        return y
    return two_products(x, z, weight, Bt, bias, y)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    M: Tensor,
    row_adapter: Tensor | None,
    t: Tensor | None,
) -> Tensor:
    """y (T, N). t (T, R) is filled for the backward; None where there will be none."""
    with _no_autocast(x.device.type):  # M stays in its own precision; x comes in the one wanted
        z = _shrunk(x, weight, Correction(A, Bt, M, row_adapter, t))
        return _product(x, z, weight, Bt, bias)


def _backward(
    dy: Tensor, t: Tensor, M: Tensor, weight: Tensor, A: Tensor, Bt: Tensor, row_adapter: Tensor | None, wants_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """dx (T, K), where it is wanted, and dM."""
    with _no_autocast(dy.device.type):
        dy, s = dy.contiguous(), torch.empty_like(t)  # (T, R)
        sM = _shrunk(dy, weight, Correction(Bt, A, M.transpose(-1, -2), row_adapter, s))
        return _product(dy, sM, weight.T, A, None) if wants_dx else None, reduce_dM(s, t, M, row_adapter)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, M, weight, bias, A, Bt, row_adapter):  # type: ignore[no-untyped-def]
        t = M.new_empty(len(x), len(A))  # (T, R)
        y = _forward(x, weight, bias, A, Bt, M, row_adapter, t)
        ctx.save_for_backward(t, M, weight, A, Bt, row_adapter)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        t, M, weight, A, Bt, row_adapter = ctx.saved_tensors
        dx, dM = _backward(dy, t, M, weight, A, Bt, row_adapter, ctx.needs_input_grad[0])
        return dx, dM, None, None, None, None, None


# The same for torch.compile, which sees one opaque operator each way.


@torch.library.custom_op("tinylora::frozen_linear", mutates_args=())
def _op(
    x: Tensor, M: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, Bt: Tensor, row_adapter: Tensor | None
) -> tuple[Tensor, Tensor]:
    t = M.new_empty(len(x), len(A))  # (T, R)
    return _forward(x, weight, bias, A, Bt, M, row_adapter, t), t


@_op.register_fake
def _(x, M, weight, bias, A, Bt, row_adapter):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), M.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("tinylora::frozen_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor, t: Tensor, M: Tensor, weight: Tensor, A: Tensor, Bt: Tensor, row_adapter: Tensor | None, wants_dx: bool
) -> tuple[Tensor, Tensor]:
    dx, dM = _backward(dy, t, M, weight, A, Bt, row_adapter, wants_dx)
    return dy.new_empty(0) if dx is None else dx, dM.clone() if dM._is_view() else dM


@_backward_op.register_fake
def _(dy, t, M, weight, A, Bt, row_adapter, wants_dx):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], weight.shape[1]) if wants_dx else dy.new_empty(0), torch.empty_like(M)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, M, weight, _, A, Bt, row_adapter = inputs
    ctx.save_for_backward(output[1], M, weight, A, Bt, row_adapter)


def _op_backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    wants_dx = ctx.needs_input_grad[0]
    dx, dM = _backward_op(dy, *ctx.saved_tensors, wants_dx)
    return dx if wants_dx else None, dM, None, None, None, None, None


_op.register_autograd(_op_backward, setup_context=_keep)


def padded_rows(rows: int, device: torch.device) -> int:
    """`rows`, rounded up to a multiple of NARROW on a CPU."""
    return rows + -rows % NARROW if device.type == "cpu" else rows


def pad_rows(x: Tensor) -> Tensor:
    """x (T, ...) with zero rows appended up to `padded_rows`; x itself where nothing is to do."""
    missing = padded_rows(len(x), x.device) - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def frozen_linear(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K), frozen
    bias: Tensor | None,  # (N,), frozen
    A: Tensor | None,  # (R, K), frozen
    Bt: Tensor | None,  # (R, N), frozen
    M: Tensor | None,  # (adapters, segments, r, r), fp32 (fp64 in tests); None: the bare linear
    row_adapter: Tensor | None = None,  # (T,) integer: the adapter of each row; None: adapter 0 for all
    pad: bool = True,  # rows to a multiple of NARROW on a CPU; False: as they come, for models whose other ops do not either
) -> Tensor:  # (T, N)
    """y = x W^T + bias + (M x A^T) B^T, with gradients for x and M. Saves t and the constants, not x.

    Constants of another dtype than x's are cast as they are used, and y is of x's: what autocast asks for. Factors wider than
    the weight are not: the correction then runs in their dtype, and is added to the rounded x W^T + bias. So PEFT computes it.
    """
    rows = len(x)
    if pad:
        x = pad_rows(x)
        row_adapter = None if row_adapter is None else pad_rows(row_adapter)
    if M is None:
        y = F.linear(x, weight, bias)
    elif A is None or Bt is None:
        raise ValueError("M was given to a frozen linear that holds no factors; pack them first")
    elif torch.compiler.is_compiling():
        y, _ = _op(x, M, weight, bias, A, Bt, row_adapter)
    elif torch.is_grad_enabled() and (x.requires_grad or M.requires_grad):
        y = _FrozenLinear.apply(x, M, weight, bias, A, Bt, row_adapter)
    else:
        y = _forward(x, weight, bias, A, Bt, M, row_adapter, None)
    return y if len(y) == rows else y[:rows]  # a slice's backward would copy dy
