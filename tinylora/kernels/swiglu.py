"""SwiGLU on the fused gate+up output: h = silu(g) * u with [g | u] = x.

    sigma = sigmoid(g)    dg = dh * u * sigma * (1 + g * (1 - sigma))    du = dh * g * sigma

Saves x alone; sigma is recomputed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_ref(x: Tensor) -> Tensor:
    """The formula, differentiable by autograd: the oracle."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dh):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, -1)
        torch.mul(dh, F.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dh * up, gate))
        return dx


def swiglu(x: Tensor) -> Tensor:
    """x (T, 2 * width) = [gate | up] -> (T, width), with a gradient for x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _SwiGLU.apply(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)
