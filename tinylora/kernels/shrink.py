"""z = M t with t = x A^T, for rows that come from a library and carry no pad: the attention's output.

It has no backward of its own: the linear that reads the same x adds its part, (s M) A, to dx.
"""

import torch
from torch import Tensor

from tinylora.kernels import dispatch, native
from tinylora.kernels.correction import Correction
from tinylora.kernels.launch import add_shrunk, arguments, launch, row_config, store_mixed, tl, triton
from tinylora.kernels.products import narrow_product

BUDGET = {"_shrink": (64, 8192)}  # kernel: registers a thread, bytes of shared memory


def shrink_ref(x: Tensor, c: Correction) -> Tensor:
    """Plain PyTorch."""
    t = narrow_product(x, c.A)  # (T, R)
    if c.t is not None:
        c.t.copy_(t)
    return c.mix(t)


@triton.jit
def _shrink(
    x_ptr,  # (T, K)
    a_ptr,  # (R, K)
    z_ptr,  # (T, R)
    t_ptr,
    stride_t,
    m_ptr,
    adapter_ptr,
    T,
    K,
    stride_x,
    stride_a,
    KEEP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = tl.zeros((ROWS, RP), tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows < T)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask, 0.0).to(tl.float32)
        t = add_shrunk(t, x, a_ptr, stride_a, columns, K, R, RP)
    store_mixed(
        t, rows, T, t_ptr, stride_t, m_ptr, adapter_ptr, z_ptr, R, 0, 0.0, KEEP, HAS_ADAPTER, False, R, RANK, RP
    )  # fmt: skip


def shrink_triton(x: Tensor, c: Correction) -> Tensor:
    """`shrink` in one pass over x."""
    (T, K), z = x.shape, x.new_empty(len(x), c.rank)
    tensors, constants = arguments(c, c.t, x)
    config = row_config(T, K)
    grid = (triton.cdiv(T, config["ROWS"]),)
    launch(_shrink, grid, x, c.A, z, *tensors, T, K, x.stride(0), c.A.stride(0), **constants, **config)
    return z


def shrink_native(x: Tensor, c: Correction) -> Tensor:
    """`shrink` in one pass over x, on a CPU."""
    (T, K), z = x.shape, x.new_empty(len(x), c.rank)
    native.call("shrink", x.numel(), T, K, *native.rows(x), z, *native.mixing(c))
    return z


@torch.no_grad()
def shrink(x: Tensor, c: Correction) -> Tensor:
    """x (T, K) -> z (T, R) of x's dtype; t goes into c.t where that is kept."""
    return dispatch.choose("shrink", x, shrink_native, shrink_triton, shrink_ref, x.shape[1], c=c)(x, c)
