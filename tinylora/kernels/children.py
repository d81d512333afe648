"""The child processes that check kernels, each of which may hang or die.

Every op has a child of its own, as many at once as there are cores. It prints one verdict a dtype (`self_check`); where it
hangs or dies, the dtype it was at has failed and a new child goes on with the next.
"""

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
from pathlib import Path
from typing import Any

import torch

from tinylora.errors import InputError

START_SECONDS = 180.0  # for a child to import PyTorch and reach the device; its first op's own time begins after that
ROOT = Path(__file__).parent.parent.parent  # where a child finds the package

Task = tuple[str, str]  # an op and the name of a dtype
Verdict = dict[str, Any]  # "op", "dtype", "error" (None: it may run), and what the child measured


def check_in_children(
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
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
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
