"""SwiGLU between gate+up and down: h = silu(g) * u with [g | u] = x, and down's shrunk rows beside it.

    out: [h | z]        sigma = sigmoid(g)    dg = dh u sigma (1 + g (1 - sigma))    du = dh g sigma        out: [dg | du | sM]

z is the outer linear's (down), sM the inner one's (gate+up). Keeps x alone; sigma is computed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch, native
from tinylora.kernels.correction import Correction, padded, write_sM, write_z
from tinylora.kernels.launch import add_shrunk, arguments, launch, row_config, store_mixed, tl, triton

BUDGET = {"_forward": (64, 8192), "_backward": (80, 8192)}  # kernel: registers a thread, bytes of shared memory


def swiglu_ref(x: Tensor) -> Tensor:
    """The formula, differentiable by autograd: the oracle."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_plain(x: Tensor, width: int, outer: Correction | None) -> Tensor:
    """The forward in plain PyTorch."""
    h = padded(len(x), width, outer, x)
    torch.mul(F.silu(x[:, :width]), x[:, width : 2 * width], out=h[:, :width])
    write_z(h, width, outer)
    return h


def swiglu_backward_plain(dh: Tensor, x: Tensor, width: int, inner: Correction | None) -> Tensor:
    """The backward in plain PyTorch."""
    gate, up, dh = x[:, :width], x[:, width : 2 * width], dh[:, :width]
    dx = padded(len(x), 2 * width, inner, x)
    torch.mul(dh, F.silu(gate), out=dx[:, width : 2 * width])
    dx[:, :width] = torch.ops.aten.silu_backward(dh * up, gate)
    write_sM(dx, 2 * width, inner)
    return dx


@triton.jit
def _forward(
    x_ptr,  # (T, 2 width), maybe padded: [g | u]
    a_ptr,  # (R, width): the outer linear's A
    h_ptr,  # (T, padded)
    t_ptr,
    stride_t,
    m_ptr,
    adapter_ptr,
    T,
    width,
    stride_x,
    stride_a,
    stride_h,
    tail,
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
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows < T)[:, None] & (columns < width)[None, :]
        gate_ptr = x_ptr + rows[:, None] * stride_x + columns[None, :]
        gate = tl.load(gate_ptr, mask, 0.0).to(tl.float32)
        up = tl.load(gate_ptr + width, mask, 0.0).to(tl.float32)
        h = (gate * tl.sigmoid(gate) * up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * stride_h + columns[None, :], h, mask)
        if R > 0:
            t = add_shrunk(t, h.to(tl.float32), a_ptr, stride_a, columns, width, R, RP)
    if R > 0:
        store_mixed(
            t, rows, T, t_ptr, stride_t, m_ptr, adapter_ptr, h_ptr + width, stride_h, tail, 1.0,
            KEEP, HAS_ADAPTER, False, R, RANK, RP,
        )  # fmt: skip


@triton.jit
def _backward(
    dh_ptr,  # (T, width), maybe padded
    x_ptr,  # (T, 2 width), maybe padded
    b_ptr,  # (R, 2 width): the inner linear's B, transposed
    dx_ptr,  # (T, padded): [dg | du | sM]
    s_ptr,
    stride_s,
    m_ptr,
    adapter_ptr,
    T,
    width,
    stride_dh,
    stride_x,
    stride_b,
    stride_dx,
    tail,
    KEEP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s = tl.zeros((ROWS, RP), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows < T)[:, None] & (columns < width)[None, :]
        gate_ptr = x_ptr + rows[:, None] * stride_x + columns[None, :]
        gate = tl.load(gate_ptr, mask, 0.0).to(tl.float32)
        up = tl.load(gate_ptr + width, mask, 0.0).to(tl.float32)
        dh = tl.load(dh_ptr + rows[:, None] * stride_dh + columns[None, :], mask, 0.0).to(tl.float32)
        sigma = tl.sigmoid(gate)
        dgate = (dh * up * sigma * (1 + gate * (1 - sigma))).to(dx_ptr.dtype.element_ty)
        dup = (dh * gate * sigma).to(dx_ptr.dtype.element_ty)
        dgate_ptr = dx_ptr + rows[:, None] * stride_dx + columns[None, :]
        tl.store(dgate_ptr, dgate, mask)
        tl.store(dgate_ptr + width, dup, mask)
        if R > 0:
            s = add_shrunk(s, dgate.to(tl.float32), b_ptr, stride_b, columns, width, R, RP)
            s = add_shrunk(s, dup.to(tl.float32), b_ptr + width, stride_b, columns, width, R, RP)
    if R > 0:
        store_mixed(
            s, rows, T, s_ptr, stride_s, m_ptr, adapter_ptr, dx_ptr + 2 * width, stride_dx, tail, 0.0,
            KEEP, HAS_ADAPTER, True, R, RANK, RP,
        )  # fmt: skip


def swiglu_triton(x: Tensor, width: int, outer: Correction | None) -> Tensor:
    """The forward in one kernel."""
    T, h = len(x), padded(len(x), width, outer, x)
    tensors, constants = arguments(outer, outer.t if outer else None, x)
    a, config = x if outer is None else outer.A, row_config(T, width)
    launch(
        _forward,
        (triton.cdiv(T, config["ROWS"]),),
        *(x, a, h, *tensors, T, width, x.stride(0), a.stride(0), h.stride(0), h.shape[1] - width - constants["R"]),
        **constants,
        **config,
    )
    return h


def swiglu_backward_triton(dh: Tensor, x: Tensor, width: int, inner: Correction | None) -> Tensor:
    """The backward in one kernel."""
    T, dx = len(x), padded(len(x), 2 * width, inner, x)
    tensors, constants = arguments(inner, inner.s if inner else None, x)
    b, config = x if inner is None else inner.Bt, row_config(T, width)
    launch(
        _backward,
        (triton.cdiv(T, config["ROWS"]),),
        *(dh, x, b, dx, *tensors, T, width),
        *(t.stride(0) for t in (dh, x, b, dx)),
        dx.shape[1] - 2 * width - constants["R"],
        **constants,
        **config,
    )
    return dx


def swiglu_native(x: Tensor, width: int, outer: Correction | None) -> Tensor:
    """The forward in C."""
    h = padded(len(x), width, outer, x)
    terms = (*native.rows(x), *native.carrying(h, width, outer))
    native.call("swiglu_forward", x.numel(), len(x), width, *terms, *native.mixing(outer))
    return h


def swiglu_backward_native(dh: Tensor, x: Tensor, width: int, inner: Correction | None) -> Tensor:
    """The backward in C."""
    dx = padded(len(x), 2 * width, inner, x)
    terms = (*native.rows(dh), *native.rows(x), *native.carrying(dx, 2 * width, inner))
    native.call("swiglu_backward", x.numel(), len(x), width, *terms, *native.mixing(inner, True))
    return dx


def _forward_op(x: Tensor, width: int, outer: Correction | None):
    return dispatch.choose("swiglu", x, swiglu_native, swiglu_triton, swiglu_plain, width, c=outer)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, M, width, inner, outer):
        ctx.save_for_backward(x)
        ctx.width, ctx.inner = width, inner
        return _forward_op(x, width, outer)(x, width, outer)

    @staticmethod
    def backward(ctx, dh):
        (x,) = ctx.saved_tensors
        ops = (swiglu_backward_native, swiglu_backward_triton, swiglu_backward_plain)
        dx = dispatch.choose("swiglu", x, *ops, ctx.width, c=ctx.inner)(dh, x, ctx.width, ctx.inner)
        return dx[:, : x.shape[1]], None, None, None, None


def swiglu(
    x: Tensor,  # (T, 2 width) or (T, padded): gate+up's output
    width: int,
    inner: Correction | None,  # of gate+up
    outer: Correction | None,  # of down
) -> Tensor:  # (T, width), or padded [h | z | 1 | 0] where there is an outer correction
    """h = silu(g) u, with a gradient for x, and s of the inner linear."""
    M = inner.M if inner is not None else None
    if torch.is_grad_enabled() and (x.requires_grad or (M is not None and M.requires_grad)):
        return _SwiGLU.apply(x, M, width, inner, outer)
    return _forward_op(x, width, outer)(x, width, outer)
