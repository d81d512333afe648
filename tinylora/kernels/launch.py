"""Triton, where it is installed, the launch of its kernels, and what the row kernels share.

Kernels are decorated when their files are imported. Without Triton the decorator leaves them plain functions, so that every
file can be imported; nothing launches them, as no GPU runs without it. Row kernels share A x summed over pieces of a row,
[M t | 1 | 0] stored beside it, and their arguments and blocks.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tinylora.kernels.correction import Correction

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda function: function, __version__=None)
    tl = SimpleNamespace(constexpr=None)

__all__ = ["INTERPRETED", "add_shrunk", "arguments", "compiled", "launch", "row_config", "store_mixed", "tl", "triton"]

compiled: list[Any] = []  # what launches on meta tensors have compiled, newest last
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as numpy on a CPU


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) with FP fusion pinned, so that equal sources give equal bits in every Triton version.

    On meta tensors the kernel is compiled instead: a test then reads what a GPU would run, through the launcher.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    options["enable_fp_fusion"] = True
    if any(t.is_meta for t in tensors):
        compiled.append(kernel.warmup(*args, grid=grid, **options))
        return
    if INTERPRETED and any(t.dtype == torch.bfloat16 for t in tensors):
        raise TypeError("Triton's interpreter computes bfloat16 on raw bit patterns, silently wrong; use float32 or float16")
    kernel[grid](*args, **options)


@triton.jit
def add_shrunk(
    total,  # (ROWS, RP) fp32: t so far
    x,  # (ROWS, BLOCK) fp32: a piece of each row
    factor_ptr,  # (R, width): A, or B transposed
    stride,
    columns,  # (BLOCK,): the piece's columns
    width,
    R: tl.constexpr,
    RP: tl.constexpr,
):
    """t += A x over one piece of each row."""
    i = tl.arange(0, RP)
    mask = (i < R)[:, None] & (columns < width)[None, :]
    factor = tl.load(factor_ptr + i[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)  # (RP, BLOCK)
    return total + tl.sum(x[:, None, :] * factor[None, :, :], 2)


@triton.jit
def store_mixed(
    t,  # (ROWS, RP) fp32
    rows,  # (ROWS,) int64
    T,
    t_ptr,  # (T, R) fp32; unused unless KEEP
    stride_t,
    m_ptr,  # (adapters, segments, r, r) fp32, contiguous
    adapter_ptr,  # (T,) integer; unused unless HAS_ADAPTER
    out_ptr,  # the first pad column of the padded rows
    stride_out,
    tail,  # pad columns after the R of z
    one,  # what the first of them gets; the others get 0
    KEEP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # M^T t instead of M t
    R: tl.constexpr,
    RANK: tl.constexpr,  # r
    RP: tl.constexpr,  # R rounded up to a power of two
):
    """Keep t, and write [M t | one | 0 ...] into the rows' pad."""
    i = tl.arange(0, RP)
    inside = (rows < T)[:, None] & (i < R)[None, :]
    if KEEP:
        tl.store(t_ptr + rows[:, None] * stride_t + i[None, :], t, inside)
    adapter = tl.zeros_like(rows)
    if HAS_ADAPTER:
        adapter += tl.load(adapter_ptr + rows, rows < T, 0)
    a, b = i[:, None], i[None, :]  # M is block-diagonal: blocks of r, elements (a, b) of a block
    if TRANSPOSED:
        place = a // RANK * RANK * RANK + b % RANK * RANK + a % RANK
    else:
        place = a // RANK * RANK * RANK + a % RANK * RANK + b % RANK
    same = (a // RANK == b // RANK) & (a < R) & (b < R)
    m = tl.load(m_ptr + adapter[:, None, None] * (R * RANK) + place[None, :, :], same[None, :, :], 0.0)  # (ROWS, RP, RP)
    z = tl.sum(m * t[:, None, :], 2)  # (ROWS, RP)
    pad_ptr = out_ptr + rows[:, None] * stride_out
    tl.store(pad_ptr + i[None, :], z.to(out_ptr.dtype.element_ty), inside)
    k = tl.arange(0, 16)[None, :]
    rest = tl.where(k == 0, one, 0.0) + tl.zeros((rows.shape[0], 16), tl.float32)
    tl.store(pad_ptr + R + k, rest.to(out_ptr.dtype.element_ty), (rows < T)[:, None] & (k < tail))


def arguments(c: Correction | None, kept: Tensor | None, like: Tensor) -> tuple[list[Any], dict[str, Any]]:
    """What a row kernel takes of a correction: (kept, its stride, M, adapters) and constants; placeholders for None."""
    if c is None:
        return [like, 0, like, like], {"KEEP": False, "HAS_ADAPTER": False, "R": 0, "RANK": 1, "RP": 2}
    M = c.M.detach().contiguous()
    kept_, adapters = M if kept is None else kept, M if c.row_adapter is None else c.row_adapter
    constants = {"KEEP": kept is not None, "HAS_ADAPTER": c.row_adapter is not None}
    rank = {"R": c.rank, "RANK": M.shape[2], "RP": max(2, triton.next_power_of_2(c.rank))}
    return [kept_, 0 if kept is None else kept.stride(0), M, adapters], {**constants, **rank}


def row_config(rows: int, width: int) -> dict[str, int]:
    """Blocks of a row kernel. Four rows share one read of A where there are rows to fill a GPU; otherwise one row a program,
    in pieces as wide as its threads can hold."""
    several = rows >= 2048
    block = min(triton.next_power_of_2(width), 512 if several else 1024)
    return {"ROWS": 4 if several else 1, "BLOCK": block, "num_warps": 8 if block >= 512 else 4}
