"""One grader process: a line of JSON in, a line of JSON out. It is killed from outside when it takes too long.

    python grader_worker.py        {"text", "gold", "answer_format", "tolerance"} -> Verdict's fields

Run as a file: importing the package would load torch, and this needs grading.py alone. The first line it writes says that it
is ready. Memory is limited, so that a huge number ends this process and not the machine.
"""

import dataclasses
import importlib.util
import json
import os
import resource
import signal
import sys
from pathlib import Path

MEMORY = 2 << 30  # bytes of address space beyond what the imports took
ORPHANED = 30  # seconds on one completion after which the process ends itself: nobody is left to kill it


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints stays out of the answers
    spec = importlib.util.spec_from_file_location("grading", Path(__file__).with_name("grading.py"))
    assert spec is not None and spec.loader is not None
    grading = sys.modules["grading"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grading)
    import math_verify  # noqa: F401  now, so that no completion's time limit pays for it

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.alarm(ORPHANED)
        print(json.dumps(dataclasses.asdict(grading.grade(**json.loads(line)))), file=answers, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
