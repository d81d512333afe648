"""A store: a dictionary in one file of JSON lines, named by a hash of what all its entries share.

Lines are appended as they come; one that a kill tore is dropped.
"""

import json
from typing import Any

from tinylora.files import cache_dir


class Store:
    """A dictionary that lives in evaluations/KIND-KEY.jsonl of the cache's folder."""

    def __init__(self, kind: str, key: str) -> None:
        self.path = cache_dir() / "evaluations" / f"{kind}-{key}.jsonl"
        self.entries: dict[str, Any] = {}
        try:
            whole, _, torn = self.path.read_text().rpartition("\n")
        except OSError:
            return
        for line in whole.split("\n"):
            try:
                self.entries.update([json.loads(line)])
            except ValueError:
                continue
        if torn:
            with open(self.path, "a") as file:
                file.write("\n")  # so that what follows starts a line of its own

    def add(self, entries: dict[str, Any]) -> None:
        self.entries.update(entries)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries.items()))
