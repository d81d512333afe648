"""The constants of one frozen linear, W, A, B and bias, in one buffer where a stock product runs over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.correction import padded_width, row_stride
from tinylora.kernels.products import bf16_products, onednn_blocks

SPARE = 24  # rank that a buffer has room for from the start: three segments of rank 8


class FrozenLinear:
    """The constants of one group. A and B are absent until an adapter's factors are packed in.

    Where products run over padded buffers (`linear`), weight, A and B are views of one: [[W, B, bias], [A, 0, 0]]. On a CPU it
    is as large as its contents, so that its rows follow one another. There the weights may be bf16 and all else fp32: rows are
    then rounded for the product alone, and A and B, which row kernels read too, are held in fp32 beside the buffer.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, A: Tensor | None = None, Bt: Tensor | None = None) -> None:
        self.weight = weight  # (N, K), of the rows' dtype or narrower
        self.bias = bias  # (N,)
        self.A = A  # (R, K)
        self.Bt = Bt  # (R, N), B transposed and contiguous: s = F.linear(dy, Bt) is twice as fast as dy @ B
        self.buffer: Tensor | None = None  # (padded N, padded K) or more
        self.around = weight.dtype  # dtype of A and B
        self._blocks: tuple[int, Tensor | None] | None = None  # of `blocks`: the buffer's version, and what was made of it
        self.carries = True  # whether rows of x come with z: if not, a CPU's buffer has neither B nor bias

    @classmethod
    def empty(
        cls,
        rows: int,
        columns: int,
        bias: bool,
        dtype: torch.dtype,  # of the weights
        device: torch.device,
        carries: bool = True,
        around: torch.dtype | None = None,  # of bias, A and B, and of the rows that come; None: the weights'
    ) -> "FrozenLinear":
        """Room for weights to be copied into, in a padded buffer where this device's backend multiplies one."""
        biases = torch.empty(rows, dtype=around or dtype, device=device) if bias else None
        if dispatch.backend(device.type) == "addmm":
            return cls(torch.empty(rows, columns, dtype=dtype, device=device), biases)
        group = cls(torch.empty(0, dtype=dtype, device=device), biases)
        group.carries, group.around = carries, around or dtype
        group._allocate(rows, columns, 0 if device.type == "cpu" else SPARE)
        return group

    def _allocate(self, rows: int, columns: int, rank: int) -> None:
        self.buffer = self.weight.new_zeros(self._shape(rows, columns, rank))
        self.weight, self._blocks = self.buffer[:rows, :columns], None

    @property
    def has_blocks(self) -> bool:
        """Whether few rows are multiplied with a second copy of the weights: bf16 ones for fp32 rows, on a CPU that can."""
        return self.buffer is not None and self.buffer.dtype != self.around and bf16_products()

    def blocks(self) -> Tensor | None:
        """That copy, made anew where the buffer has changed since; None where the weights serve as they lie."""
        if self.buffer is None or not self.has_blocks:
            return None
        if self._blocks is None or self._blocks[0] != self.buffer._version:
            self._blocks = self.buffer._version, onednn_blocks(self.buffer[: len(self.weight)])
        return self._blocks[1]

    def _shape(self, rows: int, columns: int, rank: int) -> tuple[int, int]:
        """Of a buffer with room for this rank; 0 on a CPU: none."""
        if not self.weight.is_cpu:
            return padded_width(rows, rank), row_stride(columns, rank)
        if rank == 0:
            return rows, columns
        return padded_width(rows, rank), padded_width(columns, rank) if self.carries else columns

    def pack(self, factors: Sequence[tuple[Tensor, Tensor] | None], sizes: Sequence[int], narrow: int = 1) -> None:
        """Stack the segments' factors (A (r, K), B (n, r)); None is a segment without a correction.

        `sizes` are the segments' rows of W. Zero segments are appended until R is a multiple of `narrow`.
        """
        r = next(f[0].shape[0] for f in factors if f is not None)
        (rows, columns), rank = self.weight.shape, padded_segments(len(factors), r, narrow) * r
        self.A, self.Bt = (self.weight.new_zeros(rank, n, dtype=self.around) for n in (columns, rows))
        start = 0
        for segment, (factor, size) in enumerate(zip(factors, sizes, strict=True)):
            if factor is not None:
                own = slice(segment * r, (segment + 1) * r)
                self.A[own] = factor[0].to(self.A)
                self.Bt[own, start : start + size] = factor[1].T.to(self.Bt)
            start += size
        if self.buffer is not None:
            shape, held = self._shape(rows, columns, rank), self.buffer.shape
            if shape != held if self.weight.is_cpu else shape[0] > held[0] or shape[1] > held[1]:
                weight = self.weight
                self._allocate(rows, columns, rank)
                self.weight.copy_(weight)
            self.unpack()
            self.buffer[rows : rows + rank, :columns] = self.A
            if self.buffer.shape[1] > columns:
                self.buffer[:rows, columns : columns + rank] = self.Bt.T
                if self.bias is not None:
                    self.buffer[:rows, columns + rank] = self.bias

    def unpack(self) -> None:
        """Zero everything beside the weights, whatever rank was packed before."""
        rows, columns = self.weight.shape
        if self.buffer is not None:
            self.buffer[rows:] = 0
            self.buffer[:, columns:] = 0


def padded_segments(segments: int, r: int, narrow: int) -> int:
    """The least number of segments, at least `segments`, that makes R = segments * r a multiple of `narrow`."""
    while segments * r % narrow:
        segments += 1
    return segments
