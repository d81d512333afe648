"""A frozen linear as one constant map of rows that carry their correction: forward of [x | z], backward of [dy | sM].

    y = x W^T + z B^T + bias        dx = dy W + sM A

It never sees M: whoever produces x writes z beside it, whoever produces dy writes sM = M^T s beside that (`correction`).
Autograd keeps nothing for it. Three ways to the same product, chosen by the backend:

    addmm     two products on plain weights, the large one added to the small one in place
    padded    one product over the buffer [[W, B, bias], [A, 0, 0]]: the correction enters the accumulator of a stock GEMM;
              cuda does the same, and native, where oneDNN takes half of MKL's time or less on many processors, and multiplies
              bf16 weights with fp32 rows
    triton    one product on plain weights with the rank-R update in its epilogue (`fused_linear`)

Rows without a pad get no correction in the forward: the attention's output, whose z the next kernel adds (`add_norm`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.correction import Correction, empty_rows, padded
from tinylora.kernels.frozen import FrozenLinear
from tinylora.kernels.fused_linear import fused_linear
from tinylora.kernels.products import CHAIN, FEW, onednn_linear, two_products


def linear_ref(x: Tensor, group: FrozenLinear) -> Tensor:
    """The formula as it stands, differentiable by autograd: the oracle. x (T, K) or padded -> (T, N)."""
    width = group.weight.shape[1]
    y = torch.nn.functional.linear(x[:, :width], group.weight, group.bias)
    if x.shape[1] == width or group.Bt is None:
        return y
    return y + x[:, width : width + len(group.Bt)] @ group.Bt


def _by_onednn(x: Tensor, weight: Tensor, columns: int) -> bool:
    """Whether oneDNN multiplies rows like x with weights like these, contracting so many columns: fp32 rows on a CPU, and sums
    that it keeps exact enough, or weights in bf16, beside whose rounding no sum's counts.

    Not a function of how many rows, on which no row's bits depend either, from two on; a Decoder's come in multiples of 8.
    """
    native = x.is_cpu and x.dtype == torch.float32 and dispatch.backend("cpu") == "native"
    return native and (columns <= CHAIN or weight.dtype == torch.bfloat16)


def _pad(x: Tensor, group: FrozenLinear, columns: int) -> Tensor:
    """x (T, K) as rows (T, columns) that carry no z, but a bias."""
    K = x.shape[1]
    x = F.pad(x, (0, columns - K))
    if group.bias is not None and group.A is not None:
        x[:, K + len(group.A)] = 1
    return x


def _forward(x: Tensor, group: FrozenLinear, c: Correction | None) -> Tensor:
    """The map of x (T, K) or (T, padded): (T, N), or with c (T, padded), the pad being anything."""
    (N, K), kind = group.weight.shape, dispatch.backend(x.device.type)
    carries, buffer = x.shape[1] > K, group.buffer
    if buffer is not None and _by_onednn(x, buffer, buffer.shape[1]):
        bias = group.bias if buffer.shape[1] == K else None  # otherwise it lies in the buffer
        if bias is None or c is None or buffer.dtype != x.dtype:
            x = x if x.shape[1] == buffer.shape[1] else _pad(x, group, buffer.shape[1])
            blocks = group.blocks() if c is None and len(x) <= FEW else None
            return onednn_linear(x, buffer[:N] if c is None else buffer, bias, blocks)
    y = padded(len(x), N, c, x)
    if buffer is not None and kind in ("padded", "native", "cuda") and (carries or group.bias is None):
        torch.mm(x, buffer[:N, : x.shape[1]].T, out=y[:, :N])
        return y
    Bt = group.Bt if carries else None
    z = None if Bt is None else x[:, K : K + len(Bt)]
    if kind == "triton" and dispatch.runs_triton("fused_linear", x):
        fused_linear(x[:, :K], z, group.weight, Bt, group.bias, y[:, :N])
    else:
        two_products(x[:, :K], z, group.weight, Bt, group.bias, y[:, :N])
    return y


def linear_backward(dy: Tensor, group: FrozenLinear, columns: int) -> Tensor:
    """dx (T, columns): the transposed map of dy (T, N) or (T, padded). `columns` are x's, and those beyond K are anything."""
    (N, K), kind = group.weight.shape, dispatch.backend(dy.device.type)
    carries, rows = dy.shape[1] > N, None if group.buffer is None else group.buffer[: dy.shape[1]]
    if rows is not None and _by_onednn(dy, rows, len(rows)):
        return onednn_linear(dy.contiguous(), rows.T)[:, :columns]
    dx = empty_rows(len(dy), columns, dy)
    if rows is not None and kind in ("padded", "native", "cuda"):
        torch.mm(dy, rows[:, :K], out=dx[:, :K])
        return dx
    A = group.A if carries else None
    sM = None if A is None else dy[:, N : N + len(A)]
    if kind == "triton" and dispatch.runs_triton("fused_linear", dy):
        fused_linear(dy[:, :N], sM, group.weight.T, A, None, dx[:, :K])
    else:
        two_products(dy[:, :N], sM, group.weight.T, A, None, dx[:, :K])
    return dx


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, c):
        ctx.group, ctx.columns = group, x.shape[1]
        return _forward(x, group, c)

    @staticmethod
    def backward(ctx, dy):
        # The pad has no gradient anyone reads: z's reaches x through sM.
        return linear_backward(dy, ctx.group, ctx.columns), None, None


def linear(
    x: Tensor,  # (T, K), or (T, padded): [x | z | 1 | 0]
    group: FrozenLinear,
    c: Correction | None,  # of this linear
) -> Tensor:  # (T, N); with gradients and a correction (T, padded), the pad being room for the gradient's
    """y = x W^T + z B^T + bias, with a gradient for x out of [dy | sM]."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, group, c)
    return _forward(x, group, None)
