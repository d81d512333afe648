"""The frozen product with a rank-R update in its epilogue, in Triton: y = x W^T + z B^T + bias.

The update is R rank-1 steps on the fp32 accumulator: at R = 2 to 8 a matrix instruction would multiply mostly zeros. Seen
from the other side, dx = dy W + sM A is the same product with W^T for W and A for B^T, so strides say which way W is read.

Two kernels: blocks of pointers anywhere, and on Hopper and later a persistent one that copies tiles by TMA. Which, and in
what tiles, is a pure function of shapes and architecture (`config`), from a frozen table. TINYLORA_AUTOTUNE=1 times the
table's rows on the first call of a shape, prints the winner and uses it: that is how the table is made.
"""

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinylora.kernels.launch import INTERPRETED, launch, tl, triton

BUDGET = {"_pointers": (255, 147_456), "_tma": (184, 229_376)}  # kernel: registers a thread, bytes of shared memory

# Tiles by rows: (at most this many rows, BLOCK_T, BLOCK_N, BLOCK_K, warps, stages).
POINTER_TILES = ((16, 16, 64, 128, 4, 4), (64, 64, 64, 64, 4, 4), (256, 128, 128, 64, 8, 3), (1 << 62, 128, 128, 64, 8, 3))
HOPPER_TILES = ((64, 64, 128, 128, 4, 4), (256, 128, 128, 64, 4, 4), (1 << 62, 128, 256, 64, 8, 3))
# Blackwell's accumulator comes out of tensor memory all at once for the epilogue: more registers than Hopper's tiles leave.
BLACKWELL_TILES = ((64, 64, 128, 128, 8, 4), (1 << 62, 128, 128, 64, 8, 4))
GROUP = 8  # tiles of rows that share their columns of W while those are in the cache


def fused_linear_ref(x: Tensor, z: Tensor | None, weight: Tensor, Bt: Tensor | None, bias: Tensor | None) -> Tensor:
    """The formula as it stands."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if z is None or Bt is None else y + z @ Bt


@triton.jit
def _epilogue(
    tile,  # (BLOCK_T, BLOCK_N) fp32
    rows,  # (BLOCK_T,)
    columns,  # (BLOCK_N,)
    z_ptr,  # (T, R)
    b_ptr,  # (R, N)
    bias_ptr,  # (N,)
    T,
    N,
    stride_z,
    stride_b,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """tile + z B^T + bias, one column of z at a time."""
    for i in tl.static_range(R):
        z = tl.load(z_ptr + rows * stride_z + i, rows < T, 0.0).to(tl.float32)
        b = tl.load(b_ptr + i * stride_b + columns, columns < N, 0.0).to(tl.float32)
        tile += z[:, None] * b[None, :]
    if HAS_BIAS:
        tile += tl.load(bias_ptr + columns, columns < N, 0.0).to(tl.float32)[None, :]
    return tile


@triton.jit
def _place(tile, tiles_t, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, GROUP rows of tiles at a time, column by column."""
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_t - group * GROUP, GROUP)
    return group * GROUP + tile % (GROUP * tiles_n) % height, tile % (GROUP * tiles_n) // height


@triton.jit
def _pointers(
    x_ptr,  # (T, K)
    w_ptr,  # (N, K), either of its strides 1
    y_ptr,  # (T, N)
    z_ptr,
    b_ptr,
    bias_ptr,
    T,
    N,
    K,
    stride_x,
    stride_wn,
    stride_wk,
    stride_y,
    stride_z,
    stride_b,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, column = _place(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N), GROUP)
    rows = row.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end repeat the last one, so the loop needs a mask along K alone.
    x_ptrs = x_ptr + tl.minimum(rows, T - 1)[:, None] * stride_x + k[None, :]
    w_ptrs = w_ptr + tl.minimum(columns, N - 1)[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk
    tile = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, (k < K - start)[None, :], 0.0)
        w = tl.load(w_ptrs, (k < K - start)[:, None], 0.0)
        tile = tl.dot(x, w, tile, input_precision="ieee")  # by default fp32 would be multiplied as TF32
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    tile = _epilogue(tile, rows, columns, z_ptr, b_ptr, bias_ptr, T, N, stride_z, stride_b, R, HAS_BIAS)
    mask = (rows < T)[:, None] & (columns < N)[None, :]
    tl.store(y_ptr + rows[:, None] * stride_y + columns[None, :], tile.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _tma(
    x_desc,  # (T, K) in tiles (BLOCK_T, BLOCK_K)
    w_desc,  # (N, K) in tiles (BLOCK_N, BLOCK_K), or where TRANSPOSED (K, N) in tiles (BLOCK_K, BLOCK_N)
    y_desc,  # (T, N) in tiles (BLOCK_T, BLOCK_N)
    z_ptr,
    b_ptr,
    bias_ptr,
    T,
    N,
    K,
    stride_z,
    stride_b,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_t, tiles_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    for number in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0)):
        row, column = _place(number, tiles_t, tiles_n, GROUP)
        tile = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            x = x_desc.load([row * BLOCK_T, start])
            if TRANSPOSED:
                w = w_desc.load([start, column * BLOCK_N])
                tile = tl.dot(x, w, tile)
            else:
                w = w_desc.load([column * BLOCK_N, start])
                tile = tl.dot(x, w.T, tile)
        rows = row.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # times a stride of 37,952 beyond int32 from 56,584 rows on
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        tile = _epilogue(tile, rows, columns, z_ptr, b_ptr, bias_ptr, T, N, stride_z, stride_b, R, HAS_BIAS)
        y_desc.store([row * BLOCK_T, column * BLOCK_N], tile.to(y_desc.dtype))


def tiles(capability: int, tma: bool) -> tuple[tuple[int, ...], ...]:
    """The table of an architecture."""
    if not tma:
        return POINTER_TILES
    return HOPPER_TILES if capability < 100 else BLACKWELL_TILES


def config(rows: int, capability: int, tma: bool, wide: bool) -> dict[str, int]:
    """Tiles for this many rows. `wide` operands (fp32) are multiplied without tensor cores, in smaller tiles."""
    if wide:
        return {"BLOCK_T": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return _options(next(entry for entry in tiles(capability, tma) if rows <= entry[0]))


def _options(entry: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("BLOCK_T", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), entry[1:], strict=True))


def takes_tma(capability: int, *tensors: Tensor) -> bool:
    """Whether TMA can copy tiles of all of these: Hopper or later, half precision, rows and bases on 16 bytes."""
    return capability >= 90 and all(
        t.element_size() == 2 and 1 in t.stride() and max(t.stride()) % 8 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def _capability(device: torch.device) -> int:
    if device.type == "cuda":
        return 10 * _major(device)
    return 80 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)  # meta: what to compile for


@lru_cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def fused_linear(
    x: Tensor,  # (T, K), unit stride in its rows
    z: Tensor | None,  # (T, R), unit stride in its rows
    weight: Tensor,  # (N, K), or the transpose of such a (K, N)
    Bt: Tensor | None,  # (R, N), unit stride in its rows
    bias: Tensor | None,  # (N,)
    y: Tensor,  # (T, N), written; unit stride in its rows
) -> None:
    """y = x W^T + z B^T + bias."""
    capability = _capability(x.device)
    tma = takes_tma(capability, x, weight, y)
    run = _run_tma if tma else _run_pointers
    if os.environ.get("TINYLORA_AUTOTUNE") == "1" and x.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        key = (len(x), *weight.shape, weight.stride(0) == 1, tma)
        if key not in _tuned:
            _tuned[key] = _tune(key, run, (x, z, weight, Bt, bias, y), tiles(capability, tma))
        run(x, z, weight, Bt, bias, y, _tuned[key])
        return
    run(x, z, weight, Bt, bias, y, config(len(x), capability, tma, x.element_size() > 2))


def _run_pointers(
    x: Tensor, z: Tensor | None, weight: Tensor, Bt: Tensor | None, bias: Tensor | None, y: Tensor, options: dict[str, int]
) -> None:
    (T, K), N = x.shape, len(weight)
    z_, b = (x, x) if z is None or Bt is None else (z, Bt)
    tiles = triton.cdiv(T, options["BLOCK_T"]) * triton.cdiv(N, options["BLOCK_N"])
    strides = (x.stride(0), *weight.stride(), y.stride(0), z_.stride(0), b.stride(0))
    constants = {"R": 0 if z is None else z.shape[1], "HAS_BIAS": bias is not None, "GROUP": GROUP}
    tensors = (x, weight, y, z_, b, x if bias is None else bias)
    launch(_pointers, (tiles,), *tensors, T, N, K, *strides, **constants, **options)


def _run_tma(
    x: Tensor, z: Tensor | None, weight: Tensor, Bt: Tensor | None, bias: Tensor | None, y: Tensor, options: dict[str, int]
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (T, K), N, transposed = x.shape, len(weight), weight.stride(0) == 1
    z_, b = (x, x) if z is None or Bt is None else (z, Bt)
    t, n, k = (options[f"BLOCK_{axis}"] for axis in "TNK")
    tiles = triton.cdiv(T, t) * triton.cdiv(N, n)
    w = weight.T if transposed else weight
    descriptors = [
        TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
        for tensor, block in ((x, (t, k)), (w, (k, n) if transposed else (n, k)), (y, (t, n)))
    ]
    constants = {"R": 0 if z is None else z.shape[1], "HAS_BIAS": bias is not None, "TRANSPOSED": transposed, "GROUP": GROUP}
    tensors = (z_, b, x if bias is None else bias)
    grid = (min(tiles, _processors(x.device)),)
    launch(_tma, grid, *descriptors, *tensors, T, N, K, z_.stride(0), b.stride(0), **constants, **options)


_tuned: dict[tuple[Any, ...], dict[str, int]] = {}


def _tune(key: tuple[Any, ...], run: Any, arguments: tuple[Any, ...], table: tuple[tuple[int, ...], ...]) -> dict[str, int]:
    """Time every entry of the table on this shape; print and return the fastest."""
    from triton.testing import do_bench

    timed = []
    for entry in table:
        timed.append((do_bench(lambda entry=entry: run(*arguments, _options(entry)), return_mode="median"), entry))
    best = min(timed)
    print(f"tinylora: fused_linear {key}: {best[1][1:]} {best[0] * 1e3:.0f} us of {[f'{t * 1e3:.0f}' for t, _ in timed]}")
    return _options(best[1])
