"""The proofs of kernels: what is to be proven on a device, what a verdict depends on, and the cache of verdicts.

A kernel is matched against its reference on the very device, in a child process (`children`), never in this one: a wrong
barrier hangs for ever and an illegal address poisons the CUDA context. Each verdict is cached on disk, under everything it
depends on, the moment it is known.
"""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tinylora.files import cache_dir
from tinylora.kernels import library
from tinylora.kernels.children import Task, Verdict, check_in_children
from tinylora.kernels.launch import triton

CHECKS = "tinylora.kernels.checks:CHECKS"
CUDA_CHECKS = "tinylora.kernels.checks:CUDA_CHECKS"
NATIVE_CHECKS = "tinylora.kernels.checks:NATIVE_CHECKS"
KERNELS = Path(__file__).parent


@cache  # every op of a decode step asks
def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtypes(op: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """What an op's kernel runs in. Triton's interpreter gets bfloat16 wrong; the C kernels of a CPU are for fp32."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (torch.float32,)
    half = (torch.float16,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    if op == "reduce_dm":  # s and t are fp32 whatever the model is
        return (torch.float32,)
    return half if op == "decode_linear" else (*half, torch.float32)


def tasks_of(checks: str, device: torch.device) -> list[Task]:
    module, name = checks.split(":")
    every: dict[str, Any] = getattr(importlib.import_module(module), name)
    return [(op, name_of(dtype)) for op in every for dtype in dtypes(op, device)]


def verdict_file(key: str) -> Path:
    return cache_dir() / f"self-check-{key}.jsonl"


def cached_or_checked(device: torch.device, checks: str, watch: Callable[[Verdict], None]) -> dict[Task, Verdict]:
    conditions, tasks = _conditions(device, checks), tasks_of(checks, device)
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    path = verdict_file(key)
    stored = _stored(path)
    verdicts = {task: stored[task] for task in tasks if task in stored}
    missing = [task for task in tasks if task not in verdicts]
    if not missing:
        return verdicts
    ops = list(dict.fromkeys(op for op, _ in missing))
    print(
        f"tinylora: matching {len(ops)} kernels against plain PyTorch on {device}, once for these versions: "
        + ("a minute or two" if device.type == "cuda" else "seconds"),
        file=sys.stderr,
        flush=True,
    )
    unwritable = ""

    def found(verdict: Verdict, says_something: bool) -> None:
        nonlocal unwritable
        verdicts[verdict["op"], verdict["dtype"]] = verdict
        watch(verdict)
        if says_something:  # a child that could not even start, or had no memory, says nothing about the kernel
            try:
                _append(path, conditions, verdict)
            except OSError as error:
                unwritable = str(error)

    # The C kernels' checks take a tenth of a second together, less than a child's start.
    shares = [missing] if checks == NATIVE_CHECKS else [[t for t in missing if t[0] == op] for op in ops]
    check_in_children(device, checks, shares, found)
    if unwritable:
        print(f"tinylora: the self-check's verdicts are not cached: {unwritable}", file=sys.stderr)
    return {task: verdicts[task] for task in tasks}


def _stored(path: Path) -> dict[Task, Verdict]:
    """The cache's verdicts, the last of each; a line that is none, as of a process that was killed, counts for nothing."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    verdicts: dict[Task, Verdict] = {}
    for line in lines:
        try:
            verdict = json.loads(line)
            if "error" in verdict:
                verdicts[verdict["op"], verdict["dtype"]] = verdict
        except (ValueError, KeyError, TypeError):
            continue
    return verdicts


def _append(path: Path, conditions: dict[str, Any], verdict: Verdict) -> None:
    """One line in one write, which other processes' lines do not mix with; the file's first line says what it is of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(verdict)
    if not path.exists():
        line = json.dumps({"conditions": conditions}) + "\n" + line
    with open(path, "ab", buffering=0) as file:
        file.write(f"\n{line}\n".encode())


def _conditions(device: torch.device, checks: str) -> dict[str, Any]:
    """Everything a verdict depends on. Not the backend: a check calls its kernel directly."""
    sources = hashlib.sha256()
    for file in [*sorted(KERNELS.rglob("*.py")), importlib.import_module(checks.split(":")[0]).__file__]:
        sources.update(Path(str(file)).read_bytes())
    conditions = {
        "sources": sources.hexdigest(),
        "checks": checks,
        "flags": {k: v for k, v in os.environ.items() if k.startswith("TRITON_") and not k.endswith("_DIR")},
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": device.type,
    }
    if checks == NATIVE_CHECKS:
        conditions["library"] = library.c_identity()
    if checks == CUDA_CHECKS:
        conditions["library"] = library.cuda_library([library.architecture(device)]).name
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        conditions["gpu"] = torch.cuda.get_device_name(device)
        conditions["capability"] = torch.cuda.get_device_capability(device)
        conditions["driver"] = driver.read_text().splitlines()[0] if driver.exists() else None
    return conditions
