"""Calling the C kernels of csrc/cpu.c: its library is loaded into this process, and its functions are called by name.

They are for fp32 on a CPU. Threads are PyTorch's: the library is linked to no OpenMP runtime and finds the one that PyTorch
has loaded.
"""

import ctypes
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tinylora.kernels import library
from tinylora.kernels.correction import Correction

MOST, NO_MEMORY = 512, 2  # columns of a correction, and what a function returns; as the source knows too
PARALLEL = 4096  # numbers from which threads pay
TYPES = {"l64": ctypes.c_int64, "float": ctypes.c_float}


@cache
def functions() -> dict[str, Any]:
    """Every function of the library, with the argument types that its source declares."""
    ctypes.CDLL(library.openmp(), mode=ctypes.RTLD_GLOBAL)
    kernels, source = ctypes.CDLL(str(library.c_library())), library.C_SOURCE.read_text()
    shared = dict(re.findall(r"#define (PACK|CORRECTION|CACHE) ((?:.*\\\n)*.*)\n", source))
    found = {}
    for name, parameters in re.findall(r"^int (\w+)\(([^)]*)\)", source, re.MULTILINE):
        for macro, text in shared.items():
            parameters = re.sub(rf"\b{macro}\b", text, parameters)
        function = found[name] = getattr(kernels, name)
        function.argtypes = [ctypes.c_void_p if "*" in p else TYPES[p.split()[-2]] for p in parameters.split(",")]
        function.restype, function.parameters = ctypes.c_int, [p.split()[-1] for p in parameters.split(",")]
    return found


def call(name: str, work: int, *arguments: Any) -> None:
    """Run a function on tensors, numbers and None (NULL), threaded where `work`, about the numbers it touches, is worth it.

    Tensors must stay alive until it returns, and how large they are is not checked. ValueError where the function does not take
    a width, a count or a stride, or where an index, of an adapter, a position or a page, points at nothing; it has then changed
    nothing.
    """
    threads, function = torch.get_num_threads() if work >= PARALLEL else 1, functions()[name]
    status = function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], threads)
    if status:
        named = zip(function.parameters, arguments, strict=False)
        numbers = ", ".join(f"{parameter} {a}" for parameter, a in named if isinstance(a, int))
        if status == NO_MEMORY:
            raise MemoryError(f"{name} of csrc/cpu.c got no memory: {numbers}")
        raise ValueError(f"{name} of csrc/cpu.c does not take these numbers, or an index points at nothing: {numbers}")


def takes(x: Tensor, *widths: int, c: Correction | None = None) -> bool:
    """Whether the kernels take rows like x with this correction. `widths`: all that they walk in eights, of a head both D and
    D / 2."""
    rows_fit = x.dtype == torch.float32 and all(n > 0 and n % 8 == 0 for n in widths)
    return rows_fit and (c is None or (c.rank <= MOST and c.is_plain))


def rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x (T, ...) as a function takes it, with its row stride; None: NULL. Each row must be contiguous, and is made so."""
    if x is None:
        return None, 0
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0)


def carrying(x: Tensor, width: int, c: Correction | None) -> tuple[Tensor, int, int]:
    """Rows that a function writes with what they carry: x, its row stride, and the columns that follow z or sM."""
    return x, x.stride(0), x.shape[1] - width - (c.rank if c is not None else 0)


def cells(slots: int, keys: Tensor, values: Tensor, positions: Tensor, table: Tensor | None) -> tuple[Any, ...]:
    """What a function takes of a cache. ValueError where the slots' positions are not all there: it would read beyond them."""
    if len(positions) != slots or (table is not None and len(table) < slots):
        raise ValueError(
            f"{slots} slots, and {len(positions)} positions; rows of a decode step come in multiples of 8 on a CPU"
        )
    return keys, values, positions, table, len(keys), 0 if table is None else table.shape[1], keys.shape[2]


def mixing(c: Correction | None, transposed: bool = False) -> tuple[Any, ...]:
    """What a function takes of a correction, for z in the forward or for sM in the backward. `c` keeps it all alive."""
    if c is None:
        return None, 0, None, None, None, 0, 0, 0, 1, 0
    factor, kept = (c.Bt, c.s) if transposed else (c.A, c.t)
    return factor, factor.stride(0), c.flat_M, c.row_adapter, *rows(kept), len(c.M), c.rank, c.M.shape[2], int(transposed)
