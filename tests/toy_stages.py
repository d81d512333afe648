"""Stages for test_gpu_driver.py: one that is right, and one for each way a stage can end badly."""

import os
import subprocess
import sys
import time

from bench.facts import Facts, Skipped

FIRST = {"right": 20, "raises": 20, "skips": 20, "hangs": 2, "aborts": 20, "leaves": 20, "loses_the_device": 20, "last": 20}
SECOND = {"many": 60}


class Run:
    def __init__(self, device: str, shape: str, facts: Facts) -> None:
        self.facts, self.stage, self.lost = facts, "", False

    def check(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def release(self) -> None:
        pass


def right(run: Run) -> None:
    print("a library's chatter")
    print('{"stage": torn')
    run.facts(run.stage, process=os.getpid(), value=1.5)


def raises(run: Run) -> None:
    run.facts(run.stage, value=1)
    raise ValueError("no such shape")


def skips(run: Run) -> None:
    raise Skipped("nothing to do here")


def hangs(run: Run) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    run.facts(run.stage, child=child.pid)
    time.sleep(600)


def aborts(run: Run) -> None:
    os.abort()


def leaves(run: Run) -> None:
    os._exit(0)


def loses_the_device(run: Run) -> None:
    run.lost = True
    raise RuntimeError("CUDA error")


def last(run: Run) -> None:
    run.facts(run.stage, process=os.getpid())


def many(run: Run) -> None:
    for i in range(100_000):
        run.facts(run.stage, i=i, text="x" * 200)
        time.sleep(0.001)  # or it would be ahead of what the supervisor has printed
