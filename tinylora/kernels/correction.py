"""The correction of one frozen linear in one forward, and the rows that carry it.

    t = x A^T    z = M t    beside x: [x | z]        s = dy B    M^T s    beside dy: [dy | M^T s]

Whoever produces x writes z into the row's pad, so the linear that follows is one constant map of [x | z]; whoever produces dy
in the backward writes M^T s there. A padded row of width K with R columns of z is

    columns 0 .. K-1: x    K .. K+R-1: z    K+R: 1 (the bias rides on it)    then zeros up to a multiple of 16

and lies on a GPU at a row stride that is a multiple of 64 elements: whole cache lines, and the divisibility by 16 without which
Triton gives up wide stores and asynchronous copies. On a CPU one row follows the other, as oneDNN wants it.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tinylora.kernels import dispatch, native

ONEDNN_COLUMNS = 512  # of a CPU's narrow product from which oneDNN beats MKL at any number of rows
CHAIN = 1024  # numbers that oneDNN may sum for an element: it adds them one after another, and its error passes twice MKL's


@dataclass
class Correction:
    """R = segments * r. t and s are slices of the step's buffers, filled by forward and backward; None without gradients."""

    A: Tensor  # (R, K), frozen
    Bt: Tensor  # (R, N), frozen: B transposed
    M: Tensor  # (adapters, segments, r, r), fp32 (fp64 in tests)
    row_adapter: Tensor | None = None  # (T,) integer: the adapter of each row; None: adapter 0 for all
    t: Tensor | None = None  # (T, R) of M's dtype
    s: Tensor | None = None  # (T, R) of M's dtype

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @cached_property
    def dense(self) -> Tensor:  # (R, R)
        """The one adapter's M as a block-diagonal matrix, for plain products."""
        segments, r = self.M.shape[1:3]
        dense = self.M.new_zeros(segments, r, segments, r)
        dense.diagonal(dim1=0, dim2=2).copy_(self.M.detach()[0].permute(1, 2, 0))
        return dense.view(segments * r, -1)

    @cached_property
    def flat_M(self) -> Tensor:
        return self.M.detach().contiguous()

    @cached_property
    def fits_native(self) -> bool:
        """Whether the C kernels take it (`native`)."""
        held = [k for k in (self.A, self.Bt, self.M, self.t, self.s) if k is not None]
        plain = all(k.dtype == torch.float32 and k.stride(-1) == 1 for k in held)
        adapter = self.row_adapter is None or (self.row_adapter.dtype == torch.int64 and self.row_adapter.is_contiguous())
        return plain and adapter and self.M.shape[1] * self.M.shape[2] == self.rank <= native.MOST

    def refresh(self) -> None:
        """M was changed in place: so is what was derived from it, in its place, where a CUDA graph reads it."""
        if (stale := self.__dict__.pop("dense", None)) is not None:
            self.__dict__["dense"] = stale.copy_(self.dense)

    def mix(self, t: Tensor, transposed: bool = False, out: Tensor | None = None) -> Tensor:
        """z = M t, or M^T t, for t (T, R), in M's precision, rounded to t's; into `out` where that is given.

        One adapter is one small product; several are r rank-1 steps, each row with its own M.
        """
        if self.row_adapter is None:
            m = self.dense if transposed else self.dense.T
            if t.dtype == m.dtype and out is not None:
                return torch.mm(t, m, out=out)
            z = torch.mm(t.to(m.dtype), m).to(t.dtype)
        else:
            M = self.M.detach()[self.row_adapter]  # (T, segments, r, r)
            M = M.transpose(-1, -2) if transposed else M
            t_ = t.to(M.dtype).unflatten(1, M.shape[1:3])  # (T, segments, r)
            z = M[..., 0] * t_[..., :1]
            for j in range(1, M.shape[-1]):
                z = z + M[..., j] * t_[..., j : j + 1]
            z = z.flatten(1).to(t.dtype)
        return z if out is None else out.copy_(z)


def padded_width(width: int, rank: int) -> int:
    """Columns of a padded row that a product contracts."""
    return -(-(width + rank + 1) // 16) * 16


def row_stride(width: int, rank: int) -> int:
    """Elements from one padded row to the next, on a GPU."""
    return -(-(width + rank + 1) // 64) * 64


def padded(rows: int, width: int, correction: Correction | None, like: Tensor) -> Tensor:  # (rows, padded width)
    """Uninitialised rows with room for a correction; without one, plain rows of `width`."""
    if correction is None:
        return like.new_empty(rows, width)
    return empty_rows(rows, padded_width(width, correction.rank), like)


def empty_rows(rows: int, columns: int, like: Tensor) -> Tensor:  # (rows, columns)
    """Uninitialised rows, one after another on a CPU, on a GPU at a stride of whole cache lines."""
    return like.new_empty(rows, columns if like.is_cpu else -(-columns // 64) * 64)[:, :columns]


def narrow_product(x: Tensor, factor: Tensor) -> Tensor:
    """x factor^T (T, R) for x (T, K) and the few rows of factor (R, K).

    On a CPU oneDNN takes half of MKL's time for it where K is large. The choice does not depend on T, and neither do a row's
    bits.
    """
    return F.linear(x, factor) if x.shape[1] < ONEDNN_COLUMNS else onednn_linear(x, factor)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN for contiguous fp32 rows on a CPU, where it keeps a row's bits; otherwise by `F.linear`."""
    takes = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and onednn_keeps_rows()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") if takes else F.linear(x, weight, bias)


@cache
def onednn_keeps_rows() -> bool:
    """Whether oneDNN is there, and keeps a row's bits in batches of 8 to 128: PyTorch 2.12 and 2.13 do, 2.11 does not."""
    if not torch.backends.mkldnn.is_available():
        return False
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(192, 512, generator=g, dtype=torch.float32, device="cpu").split([128, 64])
    whole, *parts = (torch.ops.mkldnn._linear_pointwise(x[:n], weight, None, "none", [], "") for n in (128, 8, 16, 32, 64))
    return all(torch.equal(part, whole[: len(part)]) for part in parts)


def write_z(x: Tensor, width: int, c: Correction | None) -> None:
    """The plain version of what a row kernel does in the forward: t and z of x[:, :width], into c.t and x's pad."""
    if c is not None:
        t = F.linear(x[:, :width], c.A)  # (T, R)
        if c.t is not None:
            c.t.copy_(t)
        _write(x, width, c, t, False)


def write_sM(dy: Tensor, width: int, c: Correction | None) -> None:
    """The plain version of what a row kernel does in the backward: s and M^T s of dy[:, :width], into c.s and dy's pad."""
    if c is not None:
        s = F.linear(dy[:, :width], c.Bt)  # (T, R)
        if c.s is not None:
            c.s.copy_(s)
        _write(dy, width, c, s, True)


def _write(x: Tensor, width: int, c: Correction, t: Tensor, transposed: bool) -> None:
    end = width + c.rank
    c.mix(t, transposed, out=x[:, width:end])
    if dispatch.backend(x.device.type) in ("padded", "native", "triton", "cuda"):  # a product over the whole pad will follow
        x[:, end:] = 0
        if not transposed:
            x[:, end] = 1


# ---- for the Triton row kernels ----------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def add_shrunk(  # type: ignore[no-untyped-def]
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


@triton.jit  # type: ignore[untyped-decorator]
def store_mixed(  # type: ignore[no-untyped-def]
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
