"""Threads that wait: what others use of the machine, and the team that is kept while they do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinylora import waiting

ROOT = Path(__file__).parent.parent


def test_load_is_what_others_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ten seconds: 2 s of work by all, of which 1 s is ours: others used 0.1 processors. Idle and waiting are no work."""
    stat, tick = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    clock, own = iter([100.0, 110.0]), iter([5.0, 6.0])
    monkeypatch.setattr(waiting, "STAT", stat)
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(waiting.time, "process_time", lambda: next(own))
    monkeypatch.setattr(waiting.os, "sched_getaffinity", lambda _: {0, 2})
    every = f"cpu {99 * tick} 0 0 0 0 0 0 0 0 0\n"  # the sum and a processor that this process may not use are not asked
    stat.write_text(every + "".join(f"cpu{i} {7 * tick} 0 {tick} {50 * tick} 0 0 0 0 0 0\n" for i in range(3)))
    load = waiting.Load()
    rows = ((9, 1, 66, 1), (99, 99, 50, 0), (7, 1, 60, 0))  # 2 s of work in the first, and none in the last
    lines = (f"cpu{i} {u * tick} 0 {s * tick} {d * tick} {w * tick} 0 0 0 0 0\n" for i, (u, s, d, w) in enumerate(rows))
    stat.write_text(every + "".join(lines))
    assert load.others() == pytest.approx(0.1)


def test_there_is_no_load_where_it_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(waiting, "STAT", tmp_path / "none")
    assert waiting.Load().others() == 0


TEAM = """
import os, time, torch
from tinylora import waiting
threads = lambda: len(os.listdir("/proc/self/task"))
torch.zeros(1 << 20).add_(1)
before, team = threads(), None
for others, held in ((0.1, False), (0.9, True), (0.9, True), (0.1, False), (0.1, False), (2.0, True), (0.0, False)):
    team = waiting._kept(others, team)
    assert (team is not None) == held
    until = time.monotonic() + 30  # a released team's threads end by themselves
    while not held and threads() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == before if not held else threads() >= before + 2, (others, threads(), before)
torch.set_num_threads(1)
assert waiting._kept(2.0, None) is None
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc: threads are not counted")
def test_a_team_is_there_while_others_compute() -> None:
    """Its holder and at least one more thread, and neither after it was released."""
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", TEAM], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_command_without_pytorch_keeps_none() -> None:
    code = "import sys\nfrom tinylora import waiting\nassert waiting._kept(2.0, None) is None and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
