"""Launch a Triton kernel. On meta tensors compile it instead: a test then reads what a GPU would run, through the launcher."""

from typing import Any

import torch
import triton

compiled: list[Any] = []  # what launches on meta tensors have compiled, newest last
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run as numpy on a CPU


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) with FP fusion pinned, so that equal sources give equal bits in every Triton version."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    options["enable_fp_fusion"] = True
    if any(t.is_meta for t in tensors):
        compiled.append(kernel.warmup(*args, grid=grid, **options))
        return
    if INTERPRETED and any(t.dtype == torch.bfloat16 for t in tensors):
        raise TypeError("Triton's interpreter computes bfloat16 on raw bit patterns, silently wrong; use float32 or float16")
    kernel[grid](*args, **options)
