"""RMSNorm with a frozen weight: y = x * rstd * w, rstd = (mean(x^2) + eps)^-1/2, over the last axis.

    g = dy * w        dx = rstd * (g - x * rstd^2 * mean(g * x))        dw does not exist

Saves x and rstd (one number a row). The sum of squares is taken in fp32 for bf16 and fp16 input.
"""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in x's precision, at least fp32; differentiable by autograd: the oracle."""
    x_ = x if x.dtype == torch.float64 else x.float()
    rstd = (x_.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x_ * rstd).to(x.dtype) * weight


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)  # (..., 1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        wide = _wide(x)
        rstd = _rstd(wide, eps)
        ctx.save_for_backward(x, rstd, weight)
        return (wide * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, rstd, weight = ctx.saved_tensors
        wide, g = _wide(x), _wide(dy * weight)
        slope = torch.linalg.vecdot(g, wide).div_(x.shape[-1]).unsqueeze(-1) * rstd.square()  # (..., 1)
        return torch.addcmul(g, wide, slope, value=-1).mul_(rstd).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., width), weight (width,) -> (..., width), with a gradient for x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps)
    wide = _wide(x)
    return (wide * _rstd(wide, eps)).to(x.dtype) * weight
