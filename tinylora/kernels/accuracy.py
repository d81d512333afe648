"""The rule of accuracy: a kernel's error against fp64 is at most twice plain PyTorch's, plus one rounding of fp32.

    rms(ours - exact) <= 2 rms(plain - exact) + eps rms(exact)

`exact` is the reference in fp64, `plain` the reference in the kernel's own precision.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
Case = tuple[str, Outputs, Outputs, Outputs]  # label, ours, plain, exact
Check = Callable[[torch.device, torch.dtype, int], Iterator[Case]]  # device, dtype, seed of the inputs


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative_errors(ours: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Error of ours, of plain, and the most that is allowed, each as a share of rms(exact). Infinite for non-finite ours."""
    if not ours.is_floating_point():
        return float((ours != exact).double().mean()), 0.0, 0.0
    e = exact.double()
    scale = rms(e) or 1.0
    mine, theirs = rms(ours.double() - e) / scale, rms(plain.double() - e) / scale
    return mine if math.isfinite(mine) else math.inf, theirs, 2 * theirs + torch.finfo(torch.float32).eps
