"""A frozen linear as one constant map of rows that carry their correction: forward of [x | z], backward of [dy | sM].

    y = x W^T + z B^T + bias        dx = dy W + sM A

It never sees M: whoever produces x writes z beside it, whoever produces dy writes sM = M^T s beside that (`correction`).
Autograd keeps nothing for it. Three ways to the same product, chosen by the backend:

    addmm     two products on plain weights, the large one added to the small one in place
    padded    one product over the buffer [[W, B, bias], [A, 0, 0]]: the correction enters the accumulator of a stock GEMM;
              native and cuda do the same
    triton    one product on plain weights with the rank-R update in its epilogue (`fused_linear`)

Rows without a pad get no correction in the forward: the attention's output, whose z the next kernel adds (`add_norm`).
"""

import torch
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.correction import Correction, padded
from tinylora.kernels.frozen_linear import FrozenLinear, two_products
from tinylora.kernels.fused_linear import fused_linear


def linear_ref(x: Tensor, group: FrozenLinear) -> Tensor:
    """The formula as it stands, differentiable by autograd: the oracle. x (T, K) or padded -> (T, N)."""
    width = group.weight.shape[1]
    y = torch.nn.functional.linear(x[:, :width], group.weight, group.bias)
    if x.shape[1] == width or group.Bt is None:
        return y
    return y + x[:, width : width + len(group.Bt)] @ group.Bt


def _forward(x: Tensor, group: FrozenLinear, y: Tensor) -> None:
    """y (T, N) = the map of x (T, K) or (T, padded)."""
    (N, K), kind = group.weight.shape, dispatch.backend(x.device.type)
    carries = x.shape[1] > K
    if group.buffer is not None and kind in ("padded", "native", "cuda") and (carries or group.bias is None):
        torch.mm(x, group.buffer[:N, : x.shape[1]].T, out=y)
        return
    Bt = group.Bt if carries else None
    z = None if Bt is None else x[:, K : K + len(Bt)]
    if kind == "triton" and dispatch.runs_triton("fused_linear", x):
        fused_linear(x[:, :K], z, group.weight, Bt, group.bias, y)
        return
    two_products(x[:, :K], z, group.weight, Bt, group.bias, y)


def linear_backward(dy: Tensor, group: FrozenLinear, dx: Tensor) -> Tensor:
    """dx (T, K), which is written and returned: the transposed map of dy (T, N) or (T, padded)."""
    (N, K), kind = group.weight.shape, dispatch.backend(dy.device.type)
    carries = dy.shape[1] > N
    if group.buffer is not None and kind in ("padded", "native", "cuda"):
        return torch.mm(dy, group.buffer[: dy.shape[1], :K], out=dx)
    A = group.A if carries else None
    sM = None if A is None else dy[:, N : N + len(A)]
    if kind == "triton" and dispatch.runs_triton("fused_linear", dy):
        fused_linear(dy[:, :N], sM, group.weight.T, A, None, dx)
        return dx
    return two_products(dy[:, :N], sM, group.weight.T, A, None, dx)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, c):  # type: ignore[no-untyped-def]
        ctx.group, ctx.shape = group, x.shape
        y = padded(len(x), len(group.weight), c, x)
        _forward(x, group, y[:, : len(group.weight)])
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        K = ctx.group.weight.shape[1]
        # The pad has no gradient anyone reads: z's reaches x through sM.
        dx = dy.new_empty(len(dy), -(-ctx.shape[1] // 64) * 64)[:, : ctx.shape[1]]
        linear_backward(dy, ctx.group, dx[:, :K])
        return dx, None, None


def linear(
    x: Tensor,  # (T, K), or (T, padded): [x | z | 1 | 0]
    group: FrozenLinear,
    c: Correction | None,  # of this linear
) -> Tensor:  # (T, N); with gradients and a correction (T, padded), the pad being room for the gradient's
    """y = x W^T + z B^T + bias, with a gradient for x out of [dy | sM]."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, group, c)
    y = x.new_empty(len(x), len(group.weight))
    _forward(x, group, y)
    return y
