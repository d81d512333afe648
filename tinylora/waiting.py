"""How PyTorch's threads wait for each other in a command: on a quiet machine they spin, beside other processes they sleep.

libgomp's threads spin for some 3 ms before they sleep, but hardly at all where it manages more threads than there are
processors. A step of the built-in job on two cores takes 265 ms with spinning and 460 without; beside a process that
computes, 1,100 ms with and 540 without. So while others compute, one more team of threads is kept, which never runs. The
number of threads that share a product stays what it was, and so do its bits.
"""

import os
import sys
import threading
import time
from pathlib import Path

PERIOD = 1.0  # seconds between two looks
OTHERS = 0.25  # processors that others use when threads are to sleep
STAT = Path("/proc/stat")


class Load:
    """What other processes use of the machine, look by look; nothing where it has no /proc/stat."""

    def __init__(self) -> None:
        self._busy, self._at = self._now()

    def others(self) -> float:
        """Processors that other processes, children among them, used of those this one may use, since the last look."""
        (busy, at), (before, then) = self._now(), (self._busy, self._at)
        self._busy, self._at = busy, at
        return max(0.0, (busy - before) / (at - then))

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds of processors beside this process's own, and the time."""
        busy = 0.0
        ours = {f"cpu{i}" for i in os.sched_getaffinity(0)} if STAT.exists() else set()
        for line in STAT.read_text().splitlines() if ours else ():
            name, *ticks = line.split()
            if name in ours:  # user nice system idle iowait irq softirq steal
                busy += sum(float(t) for i, t in enumerate(ticks[:8]) if i not in (3, 4)) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time(), time.perf_counter()


class Team:
    """A team of OpenMP threads beside the main thread's, there until it is released."""

    def __init__(self) -> None:
        self._released, there = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(there,), daemon=True)
        self._thread.start()
        there.wait()

    def _hold(self, there: threading.Event) -> None:
        try:
            torch = sys.modules["torch"]
            torch.zeros(torch.get_num_threads() << 16, device="cpu").add_(1)  # so many that every thread gets a part
        finally:
            there.set()
        self._released.wait()

    def release(self) -> None:
        """Its threads end with the one that began them."""
        self._released.set()
        self._thread.join()


def watch() -> None:
    """From now on, until the process ends."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    load, team = Load(), None
    while True:
        time.sleep(PERIOD)
        team = _kept(load.others(), team)


def _kept(others: float, team: Team | None) -> Team | None:
    """The team that is there after a look, given the one before. A process without PyTorch, or with one thread, needs none."""
    threads = getattr(sys.modules.get("torch"), "get_num_threads", lambda: 1)()  # PyTorch may be half imported
    busy = others > OTHERS and threads > 1
    if busy and team is None:
        return Team()
    if team is not None and not busy:
        team.release()
        return None
    return team
