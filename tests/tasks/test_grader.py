"""The grader's processes: hostile completions, processes that hang, crash or are killed, and nothing else disturbed by them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinylora.errors import InputError
from tinylora.tasks.grader import LIMIT, GraderPool
from tinylora.tasks.grading import Verdict

ROOT_TWO, LARGE = r"\sqrt{2}", 10_000_000
ECHO = r"Put your final answer within \boxed{}. What is 2+3? A: It is 5, so \boxed{5}. What is 3+4?"

# name, completion, gold, strict answer's verdict and flexible's, whether the process has to be killed
HOSTILE = [
    ("deep nesting", r"\boxed{" + "{" * 20_000 + "5" + "}" * 20_000 + "}", ROOT_TWO, (False, False), False),
    ("deep fractions", r"\boxed{" + r"\frac{1}{1+" * 45 + "1" + "}" * 45 + "}", ROOT_TWO, (False, False), None),
    ("10 MB of brackets", "(" * LARGE, "5", (False, False), False),
    ("10 MB of boxes", r"\boxed{" * (LARGE // 7), "5", (False, False), False),
    ("10 MB of digits in a box", r"\boxed{" + "1" * LARGE + "}", "5", (False, False), False),
    ("10 MB and an answer", "x" * LARGE + r" \boxed{5}", "5", (True, True), False),
    ("a Python power tower", r"\boxed{9**9**9}", "5", (False, False), False),
    ("a Python power tower for an expression", r"\boxed{9**9**9}", ROOT_TWO, (False, False), None),
    ("a LaTeX power tower", r"\boxed{9^{9^{9^{9}}}}", ROOT_TWO, (False, False), True),
    ("a large factorial", r"\boxed{99999999!}", ROOT_TWO, (False, False), True),
    ("a large expansion", r"\boxed{(x+y+z+w)^{200}}", "(x+y+z+w)^{199}", (False, False), True),
    ("an integral without a primitive", r"\boxed{\int_0^1 e^{e^{x^x}} dx}", ROOT_TWO, (False, False), None),
    ("a large exponent", r"\boxed{1e999}", "5", (False, False), False),
    ("NUL", "\0\\boxed{5\0}\0", "5", (False, False), False),
    ("NUL beside the box", "\0\\boxed{5}\0", "5", (True, True), False),
    ("lone surrogates of invalid UTF-8", "\udcff\ud800 \\boxed{5} \udc80", "5", (True, True), False),
    ("a replacement character in the box", "\\boxed{5\ufffd}", "5", (False, False), False),
    ("an unclosed box", r"So \boxed{5", "5", (False, True), False),
    ("thousands of boxes", r"\boxed{5}" * 5000 + r"\boxed{7}", "7", (True, True), False),
    ("the prompt echoed with an answer of its own", ECHO, "7", (False, False), False),
    ("and the right one after it", ECHO + r" \boxed{7}", "7", (True, True), False),
    ("an answer in Python", r"\boxed{__import__('os')._exit(1)}", ROOT_TWO, (False, False), False),
]


class CountedPool(GraderPool):
    """Counts the processes that it started."""

    started = 0

    def _process(self, number: int) -> Any:
        self.started += number not in self.processes
        return super()._process(number)


def grade(pool: GraderPool, jobs: list[tuple[str, str, str, float]]) -> list[Verdict]:
    """The verdicts of (text, gold, answer_format, tolerance), in order."""
    futures = [pool.submit(*job) for job in jobs]
    return [future.result() for future in futures]


@pytest.fixture(scope="module")
def pool() -> Iterator[CountedPool]:
    with CountedPool(workers=1) as pool:
        grade(pool, [(r"\boxed{5}", "5", "boxed", 0.0)])  # the process is up
        yield pool


def ready(pool: GraderPool) -> None:
    """Wait until the process that replaces a killed one is up."""
    while 0 not in pool.processes:
        time.sleep(0.01)


@pytest.mark.parametrize(("name", "text", "gold", "right", "killed"), HOSTILE, ids=[case[0] for case in HOSTILE])
def test_hostile_completions(
    pool: CountedPool, name: str, text: str, gold: str, right: tuple[bool, bool], killed: bool | None
) -> None:
    ready(pool)
    before, began = pool.started, time.perf_counter()
    verdict = grade(pool, [(text, gold, "boxed", 0.0)])[0]
    assert time.perf_counter() - began < 2.0
    assert (verdict.right["strict"], verdict.right["flexible"]) == right
    ready(pool)
    if killed is not None:
        assert (verdict.failure, pool.started - before) == (("timeout", 1) if killed else (None, 0))
    assert grade(pool, [(r"\boxed{5}", "5", "boxed", 0.0)])[0].right == {"strict": True, "flexible": True}


def test_two_marks(pool: GraderPool) -> None:
    verdict = grade(pool, [("#### 5 #### 7", "5", "hash", 0.0)])[0]
    assert verdict == Verdict({"strict": "5", "flexible": "7"}, {"strict": True, "flexible": False})


def test_a_process_killed_from_outside_is_replaced(pool: CountedPool) -> None:
    """While it waits, and while it works: no completion's verdict changes."""
    ready(pool)
    victim, before = pool.processes[0].process.pid, pool.started
    os.kill(victim, signal.SIGKILL)
    assert grade(pool, [(r"\boxed{5}", "5", "boxed", 0.0)])[0].right["strict"]
    assert pool.processes[0].process.pid != victim and pool.started == before + 1
    future = pool.submit(r"\boxed{9^{9^{9^{9}}}}", ROOT_TWO, "boxed")
    time.sleep(0.3)
    os.kill(pool.processes[0].process.pid, signal.SIGKILL)
    verdict = future.result()
    assert verdict.failure == "timeout", "tried again on another process, and late there"
    ready(pool)
    assert pool.started == before + 3


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(body)
    return [sys.executable, str(path)]


def test_a_completion_that_crashes_every_process_is_given_up(tmp_path: Path) -> None:
    body = "import os, sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n    os.abort()\n"
    with CountedPool(1, command=script(tmp_path, body)) as pool:
        verdict = grade(pool, [("x", "5", "boxed", 0.0)])[0]
        assert verdict.failure == "crash" and verdict.right == {"strict": False, "flexible": False}
        ready(pool)
        assert pool.started == 3, "two that died, and one for the next completion"


def test_a_late_answer_is_not_the_next_ones(tmp_path: Path) -> None:
    """A process that was late is ended, so that its answer never comes in place of another's."""
    body = (
        "import json, sys, time\nprint('ready', flush=True)\nfor line in sys.stdin:\n    text = json.loads(line)['text']\n"
        "    time.sleep(1.0 if text == 'slow' else 0)\n"
        "    print(json.dumps({'answers': {'strict': text, 'flexible': text}, 'right': {'strict': True, 'flexible': True},"
        " 'failure': None}), flush=True)\n"
    )
    with GraderPool(1, limit=0.4, command=script(tmp_path, body)) as pool:
        found = grade(pool, [(text, "5", "boxed", 0.0) for text in ("a", "slow", "b", "c")])
    assert [v.answers["strict"] for v in found] == ["a", None, "b", "c"]
    assert [v.failure for v in found] == [None, "timeout", None, None]


def test_a_grader_that_cannot_start_says_why(tmp_path: Path) -> None:
    with GraderPool(1, command=script(tmp_path, "raise ImportError('no math_verify here')\n")) as pool:
        with pytest.raises(InputError, match="does not start: ImportError: no math_verify here"):
            grade(pool, [("x", "5", "boxed", 0.0)])
        with pytest.raises(InputError, match="does not start"):
            grade(pool, [("x", "5", "boxed", 0.0)])


def test_there_are_no_processes_before_there_is_work_nor_after_close() -> None:
    with GraderPool(2) as pool:
        assert pool.threads == [] and pool.processes == {}
        grade(pool, [(rf"\boxed{{{i}}}", "5", "boxed", 0.0) for i in range(40)])
        processes = [p.process for p in pool.processes.values()]
        assert 1 <= len(processes) <= 2 and all(p.poll() is None for p in processes)
    assert all(p.poll() is not None for p in processes) and pool.processes == {}


def test_verdicts_come_in_order_from_several_processes() -> None:
    with GraderPool(2) as pool:
        found = grade(pool, [(rf"\boxed{{{i}}}", str(i - i % 2), "boxed", 0.0) for i in range(60)])
    assert [v.answers["strict"] for v in found] == [str(i) for i in range(60)]
    assert [v.right["strict"] for v in found] == [i % 2 == 0 for i in range(60)]


OWN = {"tinylora.tasks"} | {f"tinylora.tasks.{n}" for n in ("grading", "extraction", "numerals", "elements", "expressions")}


def test_the_worker_needs_no_torch_and_ends_with_its_parent() -> None:
    """Its imports are the grader's alone; when nobody holds its standard input any more, it is gone."""
    worker = Path(__file__).parents[2] / "tinylora" / "tasks" / "grader_worker.py"
    code = f"""
import runpy, sys
runpy.run_path({str(worker)!r}, run_name="__main__")
own = {{name for name in sys.modules if name.startswith("tinylora.")}}
assert own == {OWN!r} and "torch" not in sys.modules, own
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], input="", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr


def test_the_limit_leaves_room_for_honest_answers() -> None:
    """The slowest kind of honest comparison we know, an equation of symbols, takes a third of the limit in a fresh process."""
    gold = r"x^{\prime}+\frac{r}{V} x-r c=0"
    with GraderPool(1) as pool:
        grade(pool, [(r"\boxed{5}", "5", "boxed", 0.0)])
        began = time.perf_counter()
        verdict = grade(pool, [(r"\boxed{\frac{r}{V} x + x^{\prime} - r c = 0}", gold, "boxed", 0.0)])[0]
    assert verdict.failure is None and verdict.right["strict"] and time.perf_counter() - began < LIMIT


def test_a_process_that_never_ends_its_line_is_late(tmp_path: Path) -> None:
    """Every piece it writes comes in time; the whole answer does not."""
    body = (
        "import sys, time\nprint('ready', flush=True)\nfor line in sys.stdin:\n"
        "    for _ in range(100):\n        print('.', end='', flush=True)\n        time.sleep(0.02)\n"
    )
    with GraderPool(1, limit=0.3, command=script(tmp_path, body)) as pool:
        assert grade(pool, [("x", "5", "boxed", 0.0)])[0].failure == "timeout"
