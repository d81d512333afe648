"""The decode linear in CUDA C++ (csrc/): 1 to 64 rows times W, with their correction, in one pass over W.

    t = x A^T    z = M t    y = x W^T + z B^T + bias        then y + residual, or silu(gate) * up of y = [gate | up]

It computes its own t, so x carries no z: on this path the row kernels write plain rows. x is read from L2 by every tile, W
from memory once: 2 (N K + (T + R) K + T N) bytes. t, z and all sums are fp32, and y is rounded once, which two products and
a row kernel do two or three times. Where W's tiles do not fill the chip, K is split and a second kernel sums the splits in
their order; how, is the C++ planner's business (`csrc/decode_plan.h`), and a row's bits do not depend on the rows beside it.

Only TINYLORA_BACKEND=cuda asks for it: it has never run on a GPU. Inference alone; it has no backward.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch, library
from tinylora.kernels.correction import Correction
from tinylora.kernels.frozen import FrozenLinear
from tinylora.kernels.shrink import shrink_ref

BUDGET = {"decode_linear": 208, "decode_combine": 40}  # kernel: registers a thread; shared memory: csrc/decode_linear.cuh
MOST_ROWS = 64
MOST_RANK = 16  # R = segments * r


def decode_linear_ref(
    x: Tensor,  # (T, K)
    group: FrozenLinear,
    c: Correction | None,
    residual: Tensor | None = None,  # (T, N)
    swiglu: bool = False,
) -> Tensor:  # (T, N), or (T, N / 2) under SwiGLU
    """The formula as it stands, in any dtype: the oracle."""
    y = F.linear(x, group.weight, group.bias)
    if c is not None:
        y = y + shrink_ref(x, c) @ c.Bt
    if swiglu:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    return y if residual is None else y + residual


@cache
def load(device: torch.device) -> None:
    """Register torch.ops.tinylora.decode_linear from the library for a device. BuildError where there is none."""
    library.load_cuda(device)

    @torch.library.register_fake("tinylora::decode_linear")
    def _(x, weight, bias, A, Bt, M, row_adapter, residual, swiglu):
        return x.new_empty(x.shape[0], weight.shape[0] // 2 if swiglu else weight.shape[0])


def decode_linear_cuda(
    x: Tensor, group: FrozenLinear, c: Correction | None, residual: Tensor | None = None, swiglu: bool = False
) -> Tensor:
    """`decode_linear` by the kernel. bf16 or fp16; rows of x, W and A begin on 16 bytes."""
    load(x.device)
    correction = (None,) * 4 if c is None else (c.A, c.Bt, c.M.contiguous(), c.row_adapter)
    y: Tensor = torch.ops.tinylora.decode_linear(x, group.weight, group.bias, *correction, residual, swiglu)
    return y


def decode_linear(
    x: Tensor,  # (T, K)
    group: FrozenLinear,
    c: Correction | None,  # of this linear
    residual: Tensor | None = None,  # (T, N), added
    swiglu: bool = False,  # silu(gate) * up of a group whose rows are [gate, up]
) -> Tensor:  # (T, N), or (T, N / 2) under SwiGLU
    """For rows that `takes` has found fit for the kernel."""
    return (decode_linear_ref if x.device.type == "cpu" else decode_linear_cuda)(x, group, c, residual, swiglu)


def takes(rows: int, group: FrozenLinear, c: Correction | None) -> bool:
    """Whether the kernel may run for so many rows of this linear: the backend asks for it, it is proven, and it fits."""
    w = group.weight
    return (
        rows <= MOST_ROWS
        and not torch.is_grad_enabled()
        and w.element_size() == 2
        and w.stride(0) % 8 == 0
        and (c is None or (c.rank <= MOST_RANK and c.A.stride(0) % 8 == 0))
        and dispatch.runs_cuda("decode_linear", w)
    )
