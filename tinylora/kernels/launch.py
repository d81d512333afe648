"""Triton, where it is installed, and the launch of its kernels.

Kernels are decorated when their files are imported. Without Triton the decorator leaves them plain functions, so that every
file can be imported; nothing launches them, as no GPU runs without it.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda function: function, __version__=None)
    tl = SimpleNamespace(constexpr=None)

__all__ = ["INTERPRETED", "compiled", "launch", "tl", "triton"]

compiled: list[Any] = []  # what launches on meta tensors have compiled, newest last
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as numpy on a CPU


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) with FP fusion pinned, so that equal sources give equal bits in every Triton version.

    On meta tensors the kernel is compiled instead: a test then reads what a GPU would run, through the launcher.
    """
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    options["enable_fp_fusion"] = True
    if any(t.is_meta for t in tensors):
        compiled.append(kernel.warmup(*args, grid=grid, **options))
        return
    if INTERPRETED and any(t.dtype == torch.bfloat16 for t in tensors):
        raise TypeError("Triton's interpreter computes bfloat16 on raw bit patterns, silently wrong; use float32 or float16")
    kernel[grid](*args, **options)
