"""What the benchmarks share: a machine card, quantiles, the GEMM rate that floors are computed from."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def card() -> dict[str, Any]:
    """Who measured: processor or GPU, threads, versions, commit."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
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
        "commit": commit.stdout.strip() or None,
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


def gemm_rate(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a square fp32 matrix product on random data: the rate of the floors. Best of `repeats`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return max(2 * size**3 / timed(lambda: a @ b)[0] for _ in range(repeats))


def foreign_load(before: tuple[float, float] | None) -> tuple[tuple[float, float], float]:
    """Share of the machine that other processes used since `before`, from /proc/stat; 0 where there is none."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return (0.0, time.perf_counter()), 0.0
    ticks = [float(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()
    now = (busy, time.perf_counter())
    if before is None:
        return now, 0.0
    return now, max(0.0, (now[0] - before[0]) / ((now[1] - before[1]) * (os.cpu_count() or 1)))


def print_json(result: dict[str, Any]) -> None:
    """The last line of a benchmark."""
    print(json.dumps(result))
