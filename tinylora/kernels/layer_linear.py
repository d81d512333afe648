"""The frozen linear of other people's layers: whole in itself, one frozen weight shared by every adapter of a batch.

    t = x A^T          (T, R)   shrink: all that a frozen linear must keep for its backward
    z = M t            (T, R)   mix, segment by segment: z[s] = M[s] t[s]
    y = x W^T + z B^T  (T, N)   expand: the product with B^T
    s = dy B           (T, R)
    dM = s^T t, segment by segment      dx = dy W + (M^T s) A      dW does not exist

Layers that read the same input are one group: qkv has 3 segments, gate+up 2, o and down 1. W (N, K) holds their rows one
below the other, A (R, K) their shrinks, B (N, R) their expands in blocks, with R = segments * r. `row_adapter` (T,) picks
M per row, so any row of a batch may carry any adapter.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.correction import Correction
from tinylora.kernels.fused_linear import fused_linear
from tinylora.kernels.products import two_products
from tinylora.kernels.shrink import shrink, shrink_ref


def layer_linear_ref(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    A: Tensor,  # (R, K)
    Bt: Tensor,  # (R, N)
    M: Tensor,  # (adapters, segments, r, r)
    row_adapter: Tensor | None = None,  # (T,)
) -> Tensor:  # (T, N)
    """The formula as it stands, in any dtype, differentiable by autograd: the oracle."""
    rows = row_adapter if row_adapter is not None else torch.zeros(len(x), dtype=torch.long, device=x.device)
    t = (x @ A.T).unflatten(-1, M.shape[1:3])  # (T, segments, r)
    z = torch.einsum("tsij,tsj->tsi", M[rows], t).flatten(1)  # (T, R)
    return F.linear(x, weight, bias) + z @ Bt


def outer_sums(s: Tensor, t: Tensor, M: Tensor, row_adapter: Tensor | None) -> Tensor:
    """dM (adapters, segments, r, r) = sum over the rows of each adapter of s t^T, in M's precision."""
    segments, r = M.shape[1:3]
    s, t = s.to(M.dtype), t.to(M.dtype)
    if row_adapter is None:
        outer = (s.T @ t).view(segments, r, segments, r)
        return outer.diagonal(dim1=0, dim2=2).permute(2, 0, 1).unsqueeze(0)
    outer = s.view(-1, segments, r, 1) * t.view(-1, segments, 1, r)  # (T, segments, r, r)
    return torch.zeros_like(M).index_add_(0, row_adapter, outer)


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
    y = x.new_empty(len(x), len(weight))
    if dispatch.backend(x.device.type) == "triton" and dispatch.runs_triton("fused_linear", x):
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
        return _product(dy, sM, weight.T, A, None) if wants_dx else None, outer_sums(s, t, M, row_adapter)


class _LayerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, M, weight, bias, A, Bt, row_adapter):
        t = M.new_empty(len(x), len(A))  # (T, R)
        y = _forward(x, weight, bias, A, Bt, M, row_adapter, t)
        ctx.save_for_backward(t, M, weight, A, Bt, row_adapter)
        return y

    @staticmethod
    def backward(ctx, dy):
        t, M, weight, A, Bt, row_adapter = ctx.saved_tensors
        dx, dM = _backward(dy, t, M, weight, A, Bt, row_adapter, ctx.needs_input_grad[0])
        return dx, dM, None, None, None, None, None


# The same for torch.compile, which sees one opaque operator each way.


@torch.library.custom_op("tinylora::layer_linear", mutates_args=())
def _op(
    x: Tensor, M: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, Bt: Tensor, row_adapter: Tensor | None
) -> tuple[Tensor, Tensor]:
    t = M.new_empty(len(x), len(A))  # (T, R)
    return _forward(x, weight, bias, A, Bt, M, row_adapter, t), t


@_op.register_fake
def _(x, M, weight, bias, A, Bt, row_adapter):
    return x.new_empty(x.shape[0], weight.shape[0]), M.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("tinylora::layer_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor, t: Tensor, M: Tensor, weight: Tensor, A: Tensor, Bt: Tensor, row_adapter: Tensor | None, wants_dx: bool
) -> tuple[Tensor, Tensor]:
    dx, dM = _backward(dy, t, M, weight, A, Bt, row_adapter, wants_dx)
    return dy.new_empty(0) if dx is None else dx, dM.clone() if dM._is_view() else dM


@_backward_op.register_fake
def _(dy, t, M, weight, A, Bt, row_adapter, wants_dx):
    return dy.new_empty(dy.shape[0], weight.shape[1]) if wants_dx else dy.new_empty(0), torch.empty_like(M)


def _keep(ctx, inputs, output):
    _, M, weight, _, A, Bt, row_adapter = inputs
    ctx.save_for_backward(output[1], M, weight, A, Bt, row_adapter)


def _op_backward(ctx, dy, _):
    wants_dx = ctx.needs_input_grad[0]
    dx, dM = _backward_op(dy, *ctx.saved_tensors, wants_dx)
    return dx if wants_dx else None, dM, None, None, None, None, None


_op.register_autograd(_op_backward, setup_context=_keep)


def layer_linear(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K), frozen
    bias: Tensor | None,  # (N,), frozen
    A: Tensor,  # (R, K), frozen
    Bt: Tensor,  # (R, N), frozen
    M: Tensor,  # (adapters, segments, r, r), fp32 (fp64 in tests)
    row_adapter: Tensor | None = None,  # (T,) integer: the adapter of each row; None: adapter 0 for all
) -> Tensor:  # (T, N)
    """y = x W^T + bias + (M x A^T) B^T, with gradients for x and M. Saves t and the constants, not x.

    Constants of another dtype than x's are cast as they are used, and y is of x's: what autocast asks for. Factors wider than
    the weight are not: the correction then runs in their dtype, and is added to the rounded x W^T + bias. So PEFT computes it.
    """
    if torch.compiler.is_compiling():
        y, _ = _op(x, M, weight, bias, A, Bt, row_adapter)
        return y
    if torch.is_grad_enabled() and (x.requires_grad or M.requires_grad):
        y = _LayerLinear.apply(x, M, weight, bias, A, Bt, row_adapter)
        return y
    return _forward(x, weight, bias, A, Bt, M, row_adapter, None)
