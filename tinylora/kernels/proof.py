"""A kernel's proof: matched against its reference on the very device, in a child process that may hang or die.

Never in this process: a wrong barrier hangs for ever and an illegal address poisons the CUDA context. Every op has a child of
its own, as many at once as there are cores. It prints one verdict a dtype (`self_check`); where it hangs or dies, the dtype it
was at has failed and a new child goes on with the next. Each verdict is cached on disk, under everything it depends on, the
moment it is known.
"""

import hashlib
import importlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tinylora.errors import InputError
from tinylora.files import cache_dir
from tinylora.kernels import library, native
from tinylora.kernels.launch import triton

CHECKS = "tinylora.kernels.checks:CHECKS"
CUDA_CHECKS = "tinylora.kernels.checks:CUDA_CHECKS"
NATIVE_CHECKS = "tinylora.kernels.checks:NATIVE_CHECKS"
START_SECONDS = 180.0  # for a child to import PyTorch and reach the device; its first op's own time begins after that
KERNELS = Path(__file__).parent

Task = tuple[str, str]  # an op and the name of a dtype
Verdict = dict[str, Any]  # "op", "dtype", "error" (None: it may run), and what the child measured


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


def cached_or_checked(device: torch.device, checks: str, watch: Callable[[Verdict], None]) -> dict[Task, Verdict]:
    conditions, tasks = _conditions(device, checks), tasks_of(checks, device)
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / f"self-check-{key}.jsonl"
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
    _check_in_children(device, checks, shares, found)
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
        conditions["library"] = native.identity()
    if checks == CUDA_CHECKS:
        conditions["library"] = library.library([library.architecture(device)]).name
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        conditions["gpu"] = torch.cuda.get_device_name(device)
        conditions["capability"] = torch.cuda.get_device_capability(device)
        conditions["driver"] = driver.read_text().splitlines()[0] if driver.exists() else None
    return conditions


def _check_in_children(
    device: torch.device,
    checks: str,
    shares: Sequence[Sequence[Task]],  # of each child
    found: Callable[[Verdict, bool], None],  # called with each verdict as it comes, and whether it is of the kernel itself
) -> None:
    limit, most = seconds_per_task(), os.cpu_count() or 1
    messages: queue.Queue[tuple[_Child, Verdict | None]] = queue.Queue()
    waiting, alone, running = deque(map(list, shares)), deque[list[Task]](), set[_Child]()
    try:
        while waiting or alone or running:
            if not waiting and not running:  # those that had too little memory beside others
                waiting, alone, most = alone, deque(), 1
            while waiting and len(running) < most:
                running.add(_Child(device, checks, waiting.popleft(), messages))
            next_deadline = min(child.deadline for child in running)
            try:
                child, verdict = messages.get(timeout=max(0.0, next_deadline - time.monotonic()))
                if child not in running:  # the end of one that was ended
                    continue
                failure = "" if verdict is not None else child.last_words(limit)
            except queue.Empty:
                child = min(running, key=lambda c: c.deadline)
                failure = f"no answer within {limit:g} s" if child.reached else "no answer within its time limit"
            if not failure:
                assert verdict is not None
                child.deadline = time.monotonic() + limit
                if child.reached:
                    child.tasks.pop(0)
                    found(verdict, True)
                child.reached = True
                if child.tasks:
                    continue
            child.end()
            running.remove(child)
            short = "out of memory" in failure
            if short and most > 1:
                alone.append(child.tasks)
            elif not child.reached:
                for op, dtype in child.tasks:
                    found({"op": op, "dtype": dtype, "error": f"the check did not start: {failure}"}, False)
            elif child.tasks:
                (op, dtype), *rest = child.tasks
                found({"op": op, "dtype": dtype, "error": failure}, not short)
                if rest:
                    waiting.appendleft(rest)
    finally:  # also on Ctrl-C: a hung kernel would keep the GPU
        for child in running:
            child.end()


def seconds_per_task() -> float:
    value = os.environ.get("TINYLORA_SELF_CHECK_SECONDS") or "120"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise InputError(f"TINYLORA_SELF_CHECK_SECONDS={value}: it must be a positive number of seconds")
    return seconds


class _Child:
    """A process at work on `tasks`, the first of which is the one it is at, once it has `reached` the device."""

    def __init__(
        self, device: torch.device, checks: str, tasks: list[Task], messages: "queue.Queue[tuple[_Child, Verdict | None]]"
    ) -> None:
        self.tasks, self.reached, self.deadline = tasks, False, time.monotonic() + START_SECONDS
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in `end`
        command = [sys.executable, "-m", "tinylora.kernels.self_check", "--device", str(device), "--checks", checks]
        path = [str(KERNELS.parent.parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [*command, "--ops", ",".join(f"{op}:{dtype}" for op, dtype in tasks)],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            start_new_session=True,  # so that what it started, a compiler say, can be ended with it
        )
        threading.Thread(target=self._read, args=(messages,), daemon=True).start()

    def _read(self, messages: "queue.Queue[tuple[_Child, Verdict | None]]") -> None:
        """Its verdicts, and None at its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"op":'):  # anything else is a kernel's or a library's chatter
                messages.put((self, json.loads(line)))
        messages.put((self, None))

    def last_words(self, limit: float) -> str:
        try:
            status = self.process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"no answer within {limit:g} s"
        self.errors.seek(0)
        said = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{ended}: {said[-1][:300]}" if said else ended

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()
