"""The correction of one frozen linear in one forward, and the rows that carry it.

    t = x A^T    z = M t    beside x: [x | z]        s = dy B    M^T s    beside dy: [dy | M^T s]

Whoever produces x writes z into the row's pad, so the linear that follows is one constant map of [x | z]; whoever produces dy
in the backward writes M^T s there. A padded row of width K with R columns of z is

    columns 0 .. K-1: x    K .. K+R-1: z    K+R: 1 (the bias rides on it)    then zeros up to a multiple of 16

and lies on a GPU at a row stride that is a multiple of 64 elements: whole cache lines, and the divisibility by 16 without which
Triton gives up wide stores and asynchronous copies. On a CPU one row follows the other, as oneDNN wants it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


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
    def is_plain(self) -> bool:
        """Whether all of it is fp32 in contiguous rows, adapter numbers int64, and M as wide as the factors."""
        held = [k for k in (self.A, self.Bt, self.M, self.t, self.s) if k is not None]
        plain = all(k.dtype == torch.float32 and k.stride(-1) == 1 for k in held)
        adapter = self.row_adapter is None or (self.row_adapter.dtype == torch.int64 and self.row_adapter.is_contiguous())
        return plain and adapter and self.M.shape[1] * self.M.shape[2] == self.rank

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
    x[:, end:] = 0  # a product over the whole pad may follow
    if not transposed:
        x[:, end] = 1
