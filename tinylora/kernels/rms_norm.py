"""RMSNorm with a frozen weight: y = x * rstd * w, rstd = (mean(x^2) + eps)^-1/2, over the last axis.

    g = dy * w        dx = rstd * (g - x * rstd^2 * mean(g * x))        dw does not exist

Plain PyTorch, for the heads' q/k norm and as the plain version of `add_norm`. Sums of squares are fp32 for half precision.
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


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """x (..., width) -> out (..., width), and returns rstd (..., 1)."""
    wide = _wide(x)
    rstd = torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)  # (..., 1)
    torch.mul((wide * rstd).to(x.dtype), weight, out=out)
    return rstd


def rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """dy, x (..., width), rstd (..., 1) -> dx (..., width)."""
    wide, g = _wide(x), _wide(dy * weight)
    slope = torch.linalg.vecdot(g, wide).div_(x.shape[-1]).unsqueeze(-1) * rstd.square()  # (..., 1)
    return torch.addcmul(g, wide, slope, value=-1).mul_(rstd).to(x.dtype)
