"""What the benchmarks share: a machine card, quantiles, timing in turns, the rates that floors are computed from."""

import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tinylora.kernels.products import onednn_linear
from tinylora.waiting import Load

ROUND_SECONDS = 0.25  # least length of a CPU round: the kernel tells who used the cores in ticks of 10 ms


def commit() -> str | None:
    """The checkout's, by git or, where that is not installed, by TINYLORA_COMMIT; None where neither says."""
    said = os.environ.get("TINYLORA_COMMIT", "")
    with contextlib.suppress(FileNotFoundError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout or said
    return said.strip() or None


def card() -> dict[str, Any]:
    """Who measured: processor or GPU, threads, versions, commit."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit(),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median with 20 and 80 % quantiles."""
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "p20": cuts[0], "p80": cuts[3]}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def gemm_rate(size: int = 1024, repeats: int = 5, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square product on random data: the rate of the floors. Best of `repeats`, on a CPU of two libraries'."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = (lambda _: a @ b, lambda _: onednn_linear(a, b))
    return 2 * size**3 / min(call_seconds(call, 0, 1, device) for call in products for _ in range(repeats))


def copy_rate(bytes_: int = 1 << 26, repeats: int = 5, device: str = "cpu") -> float:
    """Bytes/s of a copy, reads and writes both counted. Best of `repeats`; bytes_ should be far beyond the caches."""
    a = torch.zeros(bytes_, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * bytes_ / min(call_seconds(lambda _: b.copy_(a), 0, 1, device) for _ in range(repeats))


def call_seconds(call: Callable[[int], Any], first: int, times: int, device: str) -> float:
    """Seconds a call of call(first), call(first + 1), ...: the GPU's own on CUDA, where a sleeping kernel lets the host run
    ahead, so that launches cost what they would in a captured graph; the wall's on a CPU."""
    if not device.startswith("cuda"):
        return timed(lambda: [call(first + i) for i in range(times)])[0] / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)  # cycles: about 5 ms
    begin.record()
    for i in range(times):
        call(first + i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


@contextmanager
def seconds_in(methods: Sequence[tuple[type, str]], device: str) -> Iterator[Callable[[], float]]:
    """Within the block, counts seconds in calls of these methods: the GPU's between events around each, the wall's on a CPU.

    Yields a function that returns them, to be asked when the work is done.
    """
    spent: list[Callable[[], float]] = []

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not device.startswith("cuda"):
                seconds, result = timed(lambda: method(*arguments, **named))
                spent.append(lambda: seconds)
                return result
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = method(*arguments, **named)
            end.record()
            spent.append(lambda: begin.elapsed_time(end) / 1e3)
            return result

        return call

    with ExitStack() as stack:
        for owner, name in methods:
            stack.enter_context(patch.object(owner, name, counted(getattr(owner, name))))
        yield lambda: sum(one() for one in spent)


class Rounds:
    """Which rounds of a benchmark count: not the first ones, nor those in which other processes used much of the machine."""

    def __init__(self, warm_up: int = 2, most: float = 0.04) -> None:
        """most: the share of all cores that others may use in a round that counts."""
        self.kept = self.dropped = 0
        self._warm_up, self._most = warm_up, most
        self._load = Load()

    def keep(self) -> bool:
        """At the end of a round: whether it counts."""
        load = self._load.others() / (os.cpu_count() or 1)
        if self._warm_up > 0:
            self._warm_up -= 1
            return False
        self.kept, self.dropped = (self.kept + 1, self.dropped) if load <= self._most else (self.kept, self.dropped + 1)
        return load <= self._most


def in_turns(
    calls: dict[str, Callable[[int], Any]],  # each takes the number of the input set it is to use
    sets: int,
    rounds: int,
    device: str = "cpu",
    most: float = 0.04,
) -> tuple[dict[str, list[float]], int]:
    """Seconds of each call in undisturbed rounds, and how many rounds were dropped; gives up after 3 times `rounds`.

    In a round every call is timed in turn, who begins moves on, and each timing takes other inputs than the last.
    """
    times = min(sets, 4) if device.startswith("cuda") else 1  # of an event's resolution, one small kernel is too little
    for call in calls.values():
        call(0)
    one_pass = sum(call_seconds(call, 0, 1, device) for call in calls.values())
    passes = 1 if device.startswith("cuda") else max(1, round(ROUND_SECONDS / one_pass))
    names, load = list(calls), Rounds(warm_up=1, most=most)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turn = 0
    while load.kept < rounds and load.kept + load.dropped < 3 * rounds:
        found: list[tuple[str, float]] = []
        for _ in range(passes):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                found.append((name, call_seconds(lambda j, call=calls[name]: call(j % sets), turn * times, times, device)))
            turn += 1
        if load.keep():
            for name, spent in found:
                seconds[name].append(spent)
    return seconds, load.dropped


@contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler's library writes two lines there for each profile, whatever the log level."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_extra_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most that `call` holds at one moment beyond what was there before.

    On CUDA the caching allocator's own peak. On a CPU the profiler's record of every allocation and release that PyTorch's
    allocator reports, summed in time order: it sees tensors that only autograd holds, which Python cannot, and leaves out
    what never goes through PyTorch's allocator, as the matrix library's own scratch.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _no_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def write_json(result: dict[str, Any], path: str | None) -> None:
    """Into a file, where one is named; its folder is made."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def print_json(result: dict[str, Any], path: str | None = None) -> None:
    """The last line of a benchmark, also into a file where one is named."""
    write_json(result, path)
    print(json.dumps(result))
