"""Match every op's kernel against its reference on a device: python -m tinylora.kernels.self_check --device cuda:0

    rms(ours - exact) <= 2 rms(plain - exact) + eps rms(exact)        finite, and the same bits twice

`exact` is the reference in fp64, `plain` the reference in the kernel's own precision, eps that of float32.
Integers must be equal to `exact`. Whatever a launcher allocates is filled with NaN first, so an element that no program
writes shows. Prints one JSON object an op and dtype, as it goes. Nothing is caught: an op that raises ends the process,
because a CUDA error poisons everything after it; `proof` starts a new one for what follows.
"""

import argparse
import ctypes
import importlib
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinylora.kernels.accuracy import Check, Outputs, relative_errors
from tinylora.kernels.children import seconds_per_task
from tinylora.kernels.proof import CHECKS as CHECKS_NAME
from tinylora.kernels.proof import dtypes, name_of

GRACE = 30  # seconds a child gives its parent to end it, before it ends itself


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def verdict(op: str, check: Check, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """{"op", "dtype", "error": None or what is wrong first, "seconds", "cases": one row an output}."""
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    error = None
    for (label, *outputs), (_, again, _, _) in zip(check(device, dtype, seed), check(device, dtype, seed), strict=True):
        ours, plain, exact = map(_tuple, outputs)
        for i, (o, p, e, o2) in enumerate(zip(ours, plain, exact, _tuple(again), strict=True)):
            where = f"{label}, output {i}"
            if o.shape != e.shape:
                error = error or f"{where}: shape {tuple(o.shape)}, not {tuple(e.shape)}"
                continue
            mine, theirs, allowed = relative_errors(o, p, e)
            same = torch.equal(o, o2)
            shown = mine if math.isfinite(mine) else None  # JSON has no infinity
            rows.append({"case": where, "error": shown, "plain": theirs, "allowed": allowed, "same_bits": same})
            if not mine <= allowed:
                error = error or f"{where}: relative error {mine:.1e}, allowed {allowed:.1e}"
            elif not same:
                error = error or f"{where}: two runs gave different bits"
    if not rows:
        error = error or "its check has no cases"
    return {"op": op, "dtype": name_of(dtype), "error": error, "seconds": time.perf_counter() - began, "cases": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", default="", help="comma-separated, each an op or op:dtype; default: all in every dtype")
    parser.add_argument("--checks", default=CHECKS_NAME, help="module:NAME of the dict of checks")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    options = parser.parse_args(arguments)
    if sys.platform == "linux":  # a killed parent's child would go on compiling beside whatever runs next
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    limit = math.ceil(seconds_per_task()) + GRACE
    # A reference that asks the dispatcher must get plain PyTorch, and start no self-check of its own.
    os.environ["TINYLORA_BACKEND"] = "addmm"
    module, name = options.checks.split(":")
    checks: dict[str, Check] = getattr(importlib.import_module(module), name)
    device = torch.device(options.device)
    torch.empty(1, device=device)  # a device that is not there fails here, before any op is blamed
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    print(json.dumps({"op": "start"}), flush=True)
    for said in options.ops.split(",") if options.ops else checks:
        op, _, only = said.partition(":")
        for dtype in [getattr(torch, only)] if only else dtypes(op, device):
            signal.alarm(limit)  # should the parent have been killed, nobody else ends a hung kernel
            print(json.dumps(verdict(op, checks[op], device, dtype, options.seed)), flush=True)


if __name__ == "__main__":
    main()
