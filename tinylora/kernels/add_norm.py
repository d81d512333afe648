"""Residual and RMSNorm between two linears: adds one's output to the stream, gives the next its normed and shrunk rows.

    x' = x + y + z B^T        h = x' rstd w, rstd = (mean(x'^2) + eps)^-1/2        out: x' and [h | z']

y is the output of the inner linear (o or down); z B^T its correction, where its input could not carry z. z' is for the outer
linear, the one that reads h.

    g = dh w        dx = dx' + rstd (g - x' rstd^2 mean(g x'))        out: dx and [dx | sM], one and the same memory

sM is the inner linear's. Keeps x' and one number a row.
"""

import torch
from torch import Tensor

from tinylora.kernels import dispatch, native
from tinylora.kernels.correction import Correction, padded, write_sM, write_z
from tinylora.kernels.launch import add_shrunk, arguments, launch, row_config, store_mixed, tl, triton
from tinylora.kernels.rms_norm import rms_norm_backward, rms_norm_forward

BUDGET = {"_forward": (64, 8192), "_backward": (80, 8192)}  # kernel: registers a thread, bytes of shared memory


def add_norm_plain(
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    inner: Correction | None,
    outer: Correction | None,
) -> tuple[Tensor, Tensor, Tensor]:  # x', [h | z'], rstd (T, 1)
    """The forward in plain PyTorch."""
    width = x.shape[1]
    if y is not None:
        x = x + y[:, :width]
        if z is not None and inner is not None:
            x.addmm_(z, inner.Bt)
    h = padded(len(x), width, outer, x)
    rstd = rms_norm_forward(x, weight, eps, h[:, :width])
    write_z(h, width, outer)
    return x, h, rstd


def add_norm_backward_plain(
    dx: Tensor | None, dh: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, inner: Correction | None
) -> Tensor:  # (T, width), or padded where there is an inner correction
    """The backward in plain PyTorch."""
    width = x.shape[1]
    out = padded(len(x), width, inner, x)
    d = rms_norm_backward(dh[:, :width], x, rstd, weight)
    out[:, :width] = d if dx is None else d.add_(dx[:, :width])
    write_sM(out, width, inner)
    return out


@triton.jit
def _forward(
    x_ptr,  # (T, width)
    y_ptr,  # (T, width)
    z_ptr,  # (T, RZ)
    b_ptr,  # (RZ, width): the inner linear's B, transposed
    w_ptr,  # (width,)
    a_ptr,  # (R, width): the outer linear's A
    new_ptr,  # (T, width): x'
    h_ptr,  # (T, padded)
    rstd_ptr,  # (T,) fp32
    t_ptr,
    stride_t,
    m_ptr,
    adapter_ptr,
    T,
    width,
    stride_x,
    stride_y,
    stride_z,
    stride_b,
    stride_a,
    stride_h,
    tail,
    eps,
    HAS_Y: tl.constexpr,
    RZ: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (rows < T)[:, None]
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = live & (columns < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask, 0.0).to(tl.float32)
        if HAS_Y:
            x += tl.load(y_ptr + rows[:, None] * stride_y + columns[None, :], mask, 0.0).to(tl.float32)
            for i in tl.static_range(RZ):
                z = tl.load(z_ptr + rows * stride_z + i, rows < T, 0.0).to(tl.float32)
                b = tl.load(b_ptr + i * stride_b + columns, columns < width, 0.0).to(tl.float32)
                x += z[:, None] * b[None, :]
            rounded = x.to(new_ptr.dtype.element_ty)
            tl.store(new_ptr + rows[:, None] * width + columns[None, :], rounded, mask)
            x = rounded.to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 1) / width + eps)  # (ROWS,)
    tl.store(rstd_ptr + rows, rstd, rows < T)
    if HAS_Y:
        tl.debug_barrier()  # x' is read back below, perhaps by other threads than wrote it
    t = tl.zeros((ROWS, RP), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = live & (columns < width)[None, :]
        if HAS_Y:
            x = tl.load(new_ptr + rows[:, None] * width + columns[None, :], mask, 0.0).to(tl.float32)
        else:
            x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask, 0.0).to(tl.float32)
        w = tl.load(w_ptr + columns, columns < width, 0.0).to(tl.float32)
        h = (x * rstd[:, None] * w[None, :]).to(h_ptr.dtype.element_ty)
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
    dnew_ptr,  # (T, width): dx'
    dh_ptr,  # (T, padded)
    x_ptr,  # (T, width): x'
    rstd_ptr,  # (T,) fp32
    w_ptr,  # (width,)
    b_ptr,  # (R, width): the inner linear's B, transposed
    dx_ptr,  # (T, padded)
    s_ptr,
    stride_s,
    m_ptr,
    adapter_ptr,
    T,
    width,
    stride_dnew,
    stride_dh,
    stride_b,
    stride_dx,
    tail,
    HAS_DNEW: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (rows < T)[:, None]
    rstd = tl.load(rstd_ptr + rows, rows < T, 0.0)[:, None]
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = live & (columns < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * width + columns[None, :], mask, 0.0).to(tl.float32)
        dh = tl.load(dh_ptr + rows[:, None] * stride_dh + columns[None, :], mask, 0.0).to(tl.float32)
        w = tl.load(w_ptr + columns, columns < width, 0.0).to(tl.float32)
        products += dh * w[None, :] * x
    slope = tl.sum(products, 1)[:, None] / width * rstd * rstd  # (ROWS, 1)
    s = tl.zeros((ROWS, RP), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = live & (columns < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * width + columns[None, :], mask, 0.0).to(tl.float32)
        dh = tl.load(dh_ptr + rows[:, None] * stride_dh + columns[None, :], mask, 0.0).to(tl.float32)
        w = tl.load(w_ptr + columns, columns < width, 0.0).to(tl.float32)
        dx = rstd * (dh * w[None, :] - x * slope)
        if HAS_DNEW:
            dx += tl.load(dnew_ptr + rows[:, None] * stride_dnew + columns[None, :], mask, 0.0).to(tl.float32)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * stride_dx + columns[None, :], rounded, mask)
        if R > 0:
            s = add_shrunk(s, rounded.to(tl.float32), b_ptr, stride_b, columns, width, R, RP)
    if R > 0:
        store_mixed(
            s, rows, T, s_ptr, stride_s, m_ptr, adapter_ptr, dx_ptr + width, stride_dx, tail, 0.0,
            KEEP, HAS_ADAPTER, True, R, RANK, RP,
        )  # fmt: skip


def _outputs(x: Tensor, y: Tensor | None, outer: Correction | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for x' (x itself, where nothing is added), [h | z'] and rstd of a forward kernel."""
    new = x if y is None else x.new_empty(x.shape)
    return new, padded(len(x), x.shape[1], outer, x), x.new_empty(len(x), 1, dtype=torch.float32)


def add_norm_triton(
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    inner: Correction | None,
    outer: Correction | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward in one kernel. x with unit stride in its rows."""
    T, width = x.shape
    new, h, rstd = _outputs(x, y, outer)
    tensors, constants = arguments(outer, outer.t if outer else None, x)
    y_, (z_, b) = x if y is None else y, (x, x) if z is None or inner is None else (z, inner.Bt)
    a = x if outer is None else outer.A
    config = row_config(T, width)
    launch(
        _forward,
        (triton.cdiv(T, config["ROWS"]),),
        *(x, y_, z_, b, weight, a, new, h, rstd, *tensors, T, width),
        *(t.stride(0) for t in (x, y_, z_, b, a, h)),
        h.shape[1] - width - constants["R"],
        eps,
        HAS_Y=y is not None,
        RZ=0 if z is None else z.shape[1],
        **constants,
        **config,
    )
    return new, h, rstd


def add_norm_backward_triton(
    dx: Tensor | None, dh: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, inner: Correction | None
) -> Tensor:
    """The backward in one kernel."""
    T, width = x.shape
    out = padded(T, width, inner, x)
    tensors, constants = arguments(inner, inner.s if inner else None, x)
    dx_, b = dh if dx is None else dx, x if inner is None else inner.Bt
    config = row_config(T, width)
    launch(
        _backward,
        (triton.cdiv(T, config["ROWS"]),),
        *(dx_, dh, x, rstd, weight, b, out, *tensors, T, width),
        *(t.stride(0) for t in (dx_, dh, b, out)),
        out.shape[1] - width - constants["R"],
        HAS_DNEW=dx is not None,
        **constants,
        **config,
    )
    return out


def add_norm_native(
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    inner: Correction | None,
    outer: Correction | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward in C."""
    T, width = x.shape
    new, h, rstd = _outputs(x, y, outer)
    z, b = (None, None) if z is None or inner is None else (z.contiguous(), inner.Bt)
    terms = (*native.rows(x), *native.rows(y), z, 0 if z is None else z.shape[1], *native.rows(b), weight)
    out = (new, *native.carrying(h, width, outer), rstd)
    native.call("add_norm_forward", x.numel(), T, width, eps, *terms, *out, *native.mixing(outer))
    return new, h, rstd


def add_norm_backward_native(
    dx: Tensor | None, dh: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, inner: Correction | None
) -> Tensor:
    """The backward in C."""
    T, width = x.shape
    out = padded(T, width, inner, x)
    terms = (*native.rows(dx), *native.rows(dh), x, rstd, weight)
    carrying = native.carrying(out, width, inner)
    native.call("add_norm_backward", x.numel(), T, width, *terms, *carrying, *native.mixing(inner, True))
    return out


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, z, M, weight, eps, inner, outer):
        ctx.set_materialize_grads(False)
        new, h, rstd = _forward_op(x, outer)(x, y, z, weight, eps, inner, outer)
        ctx.save_for_backward(new, rstd, weight)
        ctx.inner = inner
        return new, h

    @staticmethod
    def backward(ctx, dx, dh):
        x, rstd, weight = ctx.saved_tensors
        ops = (add_norm_backward_native, add_norm_backward_triton, add_norm_backward_plain)
        d = dispatch.choose("add_norm", x, *ops, x.shape[1], c=ctx.inner)(dx, dh, x, rstd, weight, ctx.inner)
        return d[:, : x.shape[1]], d, None, None, None, None, None, None


def _forward_op(x: Tensor, outer: Correction | None):
    return dispatch.choose("add_norm", x, add_norm_native, add_norm_triton, add_norm_plain, x.shape[1], c=outer)


def add_norm(
    x: Tensor,  # (T, width): the residual stream
    y: Tensor | None,  # (T, width) or (T, padded): the inner linear's output; None: there is none below
    z: Tensor | None,  # (T, R of inner): what y still lacks of its correction
    weight: Tensor,  # (width,), frozen
    eps: float,
    inner: Correction | None,  # of the linear that y came out of
    outer: Correction | None,  # of the linear that h goes into
) -> tuple[Tensor, Tensor]:  # x' (T, width); h (T, width), or padded [h | z' | 1 | 0] where there is an outer correction
    """x' = x + y + z B^T and its norm, with gradients for x and y, and s of the inner linear."""
    M = inner.M if inner is not None else None
    if y is not None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, M)):
        return _AddNorm.apply(x, y, z, M, weight, eps, inner, outer)
    new, h, _ = _forward_op(x, outer)(x, y, z, weight, eps, inner, outer)
    return new, h
