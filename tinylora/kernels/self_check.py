"""Match every op's kernel against its reference on a device: python -m tinylora.kernels.self_check --device cuda:0

    rms(ours - exact) <= 2 rms(plain - exact) + 4 eps rms(exact)        finite, and the same bits twice

`exact` is the reference in fp64, `plain` the reference in the kernel's own precision, eps that of the output's dtype.
Integers must be equal to `exact`. Whatever a launcher allocates is filled with NaN first, so an element that no program
writes shows. Prints one JSON object an op, as it goes. Nothing is caught: an op that raises ends the process, because a
CUDA error poisons everything after it; `dispatch.prove` starts a new one for the ops that follow.
"""

import argparse
import importlib
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.reduce_dm import reduce_dm_ref, reduce_dm_triton
from tinylora.kernels.sampling import sample_ref, sample_triton
from tinylora.kernels.token_logprobs import token_logprobs_ref, token_logprobs_triton

Outputs = Tensor | tuple[Tensor, ...]
Case = tuple[str, Outputs, Outputs, Outputs]  # label, ours, plain, exact
Check = Callable[[torch.device, torch.dtype, int], list[Case]]  # device, dtype, seed of the inputs

GRACE = 30  # seconds a child gives its parent to end it, before it ends itself


def normals(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """randn(*shape): one draw after another, the same on every device before it is rounded to dtype.

    `exact` is to be computed from the rounded inputs, widened again: the rounding of inputs is nobody's error.
    """
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def reduce_dm_check(device: torch.device, dtype: torch.dtype, seed: int) -> list[Case]:
    if dtype != torch.float32:
        return []  # it refuses half precision
    randn = normals(device, dtype, seed)
    cases: list[Case] = []
    shapes = ((2, 28, [300, 1, 77, 128], None), (2, 3, [5, 0, 4000], [2, 0, 2]), (3, 9, [70], [1]))
    for r, segments, lengths, adapters in shapes:
        s, t = (randn(sum(lengths) + 3, r * segments) for _ in range(2))
        sequence_adapter = None if adapters is None else torch.tensor(adapters, device=device)
        arguments = (lengths, 1 if adapters is None else 3, sequence_adapter, r)
        ours, plain = reduce_dm_triton(s, t, *arguments), reduce_dm_ref(s, t, *arguments)
        cases.append((f"r {r}, {segments} segments", ours, plain, reduce_dm_ref(s.double(), t.double(), *arguments)))
    return cases


def sampling_check(device: torch.device, dtype: torch.dtype, seed: int) -> list[Case]:
    """u in the middle of some likely token's share of [0, 1), so that rounding cannot change which token it is."""
    randn = normals(device, dtype, seed)
    cases: list[Case] = []
    for rows, vocab in ((7, 9000), (3, 50), (1, 4096)):
        logits = 4 * randn(rows, vocab)
        logits[:, vocab // 3] = 24  # more than any other: no ties
        for temperature in (1.3, 0.0):
            p = (logits.double() / (temperature or 1.0)).softmax(1)
            likely = p.argsort(1, descending=True)[torch.arange(rows), torch.arange(rows) % 4]  # (rows,)
            cdf = p.cumsum(1) - p / 2  # (rows, vocab): the middle of each share
            u = cdf.gather(1, likely[:, None]).squeeze(1)
            ours = sample_triton(logits, temperature, 1.0, 0, u)
            plain = sample_ref(logits, temperature, 1.0, 0, u)
            exact = sample_ref(logits.double(), temperature, 1.0, 0, u)
            cases.append((f"{rows} of {vocab} at temperature {temperature}", ours, plain, exact))
    return cases


def token_logprobs_check(device: torch.device, dtype: torch.dtype, seed: int) -> list[Case]:
    """Log-prob, entropy and the gradient of the hidden states."""
    randn = normals(device, dtype, seed)
    cases: list[Case] = []
    for rows, width, vocab in ((70, 96, 1000), (3, 64, 129)):
        hidden, head, dlogp = randn(rows, width), randn(vocab, width) / 4, randn(rows).float()
        tokens = (randn(rows).double().abs() * vocab / 5).long().clamp(max=vocab - 1)

        def run(op: Callable[..., tuple[Tensor, Tensor]], x: Tensor, w: Tensor, dy: Tensor, y: Tensor = tokens) -> Outputs:
            x = x.detach().requires_grad_()
            logp, entropy = op(x, w, y, 0.7)
            return logp.detach(), entropy.detach(), *torch.autograd.grad(logp, x, dy.to(logp.dtype))

        exact = run(token_logprobs_ref, hidden.double(), head.double(), dlogp)
        ours, plain = (run(op, hidden, head, dlogp) for op in (token_logprobs_triton, token_logprobs_ref))
        cases.append((f"{rows} x {width} x {vocab}", ours, plain, exact))
    return cases


# The check of each op, under the name that the op gives `runs_triton`.
CHECKS: dict[str, Check] = {
    "reduce_dm": reduce_dm_check,
    "sampling": sampling_check,
    "token_logprobs": token_logprobs_check,
}


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What kernels run in. Triton's interpreter, all there is on a CPU, gets bfloat16 wrong."""
    if device.type == "cpu":
        return (torch.float32,)
    return torch.bfloat16, torch.float16, torch.float32


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative_errors(ours: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Error of ours, of plain, and the most that is allowed, each as a share of rms(exact). Infinite for non-finite ours."""
    if not ours.is_floating_point():
        return float((ours.cpu() != exact.cpu()).double().mean()), 0.0, 0.0
    e = exact.double().cpu()
    scale = rms(e) or 1.0
    mine, theirs = rms(ours.double().cpu() - e) / scale, rms(plain.double().cpu() - e) / scale
    return mine if math.isfinite(mine) else math.inf, theirs, 2 * theirs + 4 * torch.finfo(ours.dtype).eps


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def verdict(op: str, check: Check, device: torch.device, seed: int) -> dict[str, Any]:
    """{"op", "error": None or what is wrong first, "seconds", "cases": one row an output}."""
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    error = None
    for dtype in dtypes(device):
        for (label, *outputs), (_, again, _, _) in zip(check(device, dtype, seed), check(device, dtype, seed), strict=True):
            ours, plain, exact = map(_tuple, outputs)
            for i, (o, p, e, o2) in enumerate(zip(ours, plain, exact, _tuple(again), strict=True)):
                name = str(dtype).removeprefix("torch.")
                where = f"{label}, output {i}, {name}"
                if o.shape != e.shape:
                    error = error or f"{where}: shape {tuple(o.shape)}, not {tuple(e.shape)}"
                    continue
                mine, theirs, allowed = relative_errors(o, p, e)
                same = torch.equal(o, o2)
                shown = mine if math.isfinite(mine) else None  # JSON has no infinity
                numbers = {"error": shown, "plain": theirs, "allowed": allowed, "same_bits": same}
                rows.append({"case": f"{label}, output {i}", "dtype": name, **numbers})
                if not mine <= allowed:
                    error = error or f"{where}: relative error {mine:.1e}, allowed {allowed:.1e}"
                elif not same:
                    error = error or f"{where}: two runs gave different bits"
    if not rows:
        error = error or "its check has no cases"
    return {"op": op, "error": error, "seconds": time.perf_counter() - began, "cases": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", default="", help="comma-separated; default: all")
    parser.add_argument("--checks", default=dispatch.CHECKS, help="module:NAME of the dict of checks")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    options = parser.parse_args(arguments)
    limit = math.ceil(dispatch._seconds_per_op()) + GRACE
    # A reference that asks the dispatcher must get plain PyTorch, and start no self-check of its own.
    os.environ["TINYLORA_BACKEND"] = "addmm"
    module, name = options.checks.split(":")
    checks: dict[str, Check] = getattr(importlib.import_module(module), name)
    device = torch.device(options.device)
    torch.empty(1, device=device)  # a device that is not there fails here, before any op is blamed
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    print(json.dumps({"op": "start"}), flush=True)
    for op in options.ops.split(",") if options.ops else checks:
        signal.alarm(limit)  # should the parent have been killed, nobody else ends a hung kernel
        print(json.dumps(verdict(op, checks[op], device, options.seed)), flush=True)


if __name__ == "__main__":
    main()
