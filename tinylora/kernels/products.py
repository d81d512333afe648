"""What stock libraries multiply: rows in eights, by oneDNN where it keeps a row's bits, two products into one tensor.

A CPU's rows come in multiples of 8. Where the widths do too, as in a Decoder, a row's bits do not depend on how many rows came
with it, because MKL picks the same inner kernel for all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW = 8  # rows and narrow columns of every CPU GEMM are multiples of this
ONEDNN_COLUMNS = 512  # inner size from which oneDNN's narrow product was faster than MKL's at every number of rows measured
FEW = 128  # rows up to which a bf16 weight in oneDNN's own order is worth a second copy of it
TILE = 1 << 20  # numbers of a bf16 weight that are widened to fp32 at a time: 4 MB, which a cache holds
CHAIN = 1024  # longest sum given to oneDNN: it adds in one chain, and its error passes twice MKL's beyond about 1,500 terms


def padded_rows(rows: int, device: torch.device) -> int:
    """`rows`, rounded up to a multiple of NARROW on a CPU."""
    return rows + -rows % NARROW if device.type == "cpu" else rows


def pad_rows(x: Tensor) -> Tensor:
    """x (T, ...) with zero rows appended up to `padded_rows`; x itself where nothing is to do."""
    missing = padded_rows(len(x), x.device) - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def narrow_product(x: Tensor, factor: Tensor) -> Tensor:
    """x factor^T (T, R) for x (T, K) and the few rows of factor (R, K).

    On a CPU oneDNN takes half of MKL's time for it where K is large. The choice does not depend on T, and neither do a row's
    bits.
    """
    return F.linear(x, factor) if x.shape[1] < ONEDNN_COLUMNS else onednn_linear(x, factor)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, blocks: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN for contiguous fp32 rows on a CPU, where it keeps a row's bits; otherwise by `F.linear`.

    With a bf16 weight x is rounded to it, and the sums, which are fp32's, once more: what plain bf16 does, in fp32 rows. bias
    (n,) is fp32 then and added to the first n columns. `blocks`: the weight as `onednn_blocks` has it, for few rows.
    """
    if weight.dtype != x.dtype:
        narrow = x.to(weight.dtype)
        product = F.linear if bf16_products() else _widened
        y = (product(narrow, weight) if blocks is None else _by_blocks(narrow, blocks)).to(x.dtype)
        if bias is not None:
            y[:, : len(bias)] += bias
        return y
    takes = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and onednn_keeps_rows()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") if takes else F.linear(x, weight, bias)


def onednn_blocks(weight: Tensor) -> Tensor | None:
    """A bf16 weight (N, K) in the order in which oneDNN reads it, where up to FEW rows then get the bits of `F.linear`.

    For a processor with `bf16_products`. From a weight as it lies oneDNN copies it so at every call: of a 0.5B model's layers
    that is 148 of 220 ms at 32 rows. None where the bits differ.
    """
    blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    x = torch.randn(FEW, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    y = F.linear(x, weight)
    return blocks if all(torch.equal(_by_blocks(x[:n], blocks), y[:n]) for n in (NARROW, FEW // 2, FEW)) else None


def _by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T (T, N), rounded to bf16, of bf16 x (T, K) and weight (N, K): products in fp32, of one tile of the weight after
    another."""
    rows = max(NARROW, TILE // weight.shape[1] // NARROW * NARROW)
    x = x.float()  # (T, K)
    return torch.cat([F.linear(x, tile.float()).bfloat16() for tile in weight.split(rows)], 1)


@cache
def bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 on this processor, as with AVX512 or AMX. Without, PyTorch's products of bf16 took 1.2 to
    12 times as long as fp32's: 16 GFLOP/s beside 120."""
    mkldnn: Any = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and bool(mkldnn._is_mkldnn_bf16_supported())


@cache
def onednn_keeps_rows() -> bool:
    """Whether oneDNN is there, and keeps a row's bits in batches of 8 to 128: PyTorch 2.12 and 2.13 do, 2.11 does not."""
    if not torch.backends.mkldnn.is_available():
        return False
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(192, 512, generator=g, dtype=torch.float32, device="cpu").split([128, 64])
    whole, *parts = (torch.ops.mkldnn._linear_pointwise(x[:n], weight, None, "none", [], "") for n in (128, 8, 16, 32, 64))
    return all(torch.equal(part, whole[: len(part)]) for part in parts)


def two_products(x: Tensor, z: Tensor | None, weight: Tensor, Bt: Tensor | None, bias: Tensor | None, y: Tensor) -> Tensor:
    """y = z B^T + bias, then y += x W^T, for weight (N, K) or the transpose of a (K, N). Writes and returns y (T, N).

    In this order the large product adds to y as it writes it, instead of a pass over y of its own; and in half precision the
    correction enters before y is rounded. At z = 0 the bits are those of x W^T + bias.
    """
    if z is not None and Bt is not None:
        torch.mm(z, Bt, out=y) if bias is None else torch.addmm(bias, z, Bt, out=y)
        return y.addmm_(x, weight.T)
    return torch.mm(x, weight.T, out=y) if bias is None else torch.addmm(bias, x, weight.T, out=y)


@contextmanager
def fp32_sums() -> Iterator[None]:
    """Rollout and update run under it: where cuBLAS splits K, its partial sums are not rounded to half precision. The setting
    is the whole process's, so it is put back."""
    matmul: Any = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]  # the second: may it split at all
    for name, (_, split) in zip(names, before, strict=True):
        setattr(matmul, name, (False, split))
    try:
        yield
    finally:
        for name, setting in zip(names, before, strict=True):
            setattr(matmul, name, setting)
