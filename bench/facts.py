"""What is known, a line of JSON each, on disk before anybody reads of it."""

import json
import os
import time
from pathlib import Path
from typing import Any

OUTCOMES = {"began", "ok", "failed", "skipped"}  # of a stage: no fact in it uses these words


class Skipped(Exception):
    """A stage that this machine cannot run, and why."""


class Facts:
    """Lines of a file, each synced before it is printed."""

    def __init__(self, path: Path, began: float) -> None:
        self.began = began  # time.monotonic() at the supervisor's start
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def __call__(self, stage: str, **data: Any) -> None:
        line = json.dumps({"stage": stage, "at": round(time.monotonic() - self.began, 1), **data})
        os.write(self.file, f"{line}\n".encode())
        os.fsync(self.file)
        print(line, flush=True)
