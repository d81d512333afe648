"""One grader process: a line of JSON in, a line of JSON out. It is killed from outside when it takes too long.

    python grader_worker.py        {"text", "gold", "answer_format", "tolerance"} -> Verdict's fields

Run as a file: from wherever the package lies, whether it is installed or not. The first line it writes says that it is ready.
Memory is limited, so that a huge number ends this process and not the machine.
"""

import dataclasses
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
    sys.path.append(str(Path(__file__).parent.parent.parent))  # last, so that nothing there takes a library's place
    import math_verify  # noqa: F401  now, so that no completion's time limit pays for it

    from tinylora.tasks.grading import grade

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.alarm(ORPHANED)
        print(json.dumps(dataclasses.asdict(grade(**json.loads(line)))), file=answers, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
