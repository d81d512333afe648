"""Completions and verdicts on disk, by everything that they depend on: an evaluation that is cut off goes on, and one that
is run again generates nothing.

A store is one file of JSON lines, named by a hash of what all its entries share. Lines are appended as they come; one that a
kill tore is dropped.
"""

import json
from collections.abc import Sequence
from typing import Any

import xxhash
from tqdm import tqdm

from tinylora.engine.rollout import Sampling, rollout
from tinylora.engine.text import Text
from tinylora.files import cache_dir
from tinylora.model.decoder import Decoder, Matrices
from tinylora.rl.grading import GRADER_VERSION, Verdict
from tinylora.rl.rewards import Grader
from tinylora.rl.tasks import Row

CHUNK = 512  # completions generated between two writes

Answer = dict[str, Any]  # "completion": text; "tokens": how many; "finished": whether it ended by itself


def digest(*parts: Any) -> str:
    return xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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


def sample(
    model: Decoder,
    matrices: Matrices | None,
    text: Text,
    prompts: Sequence[Sequence[int]],
    generations: int,
    sampling: Sampling,
    about: dict[str, Any],
    label: str,
) -> list[list[Answer]]:
    """`generations` answers to each prompt; those that `about` (model, adapter, versions) has seen come from the store."""
    shared = {**about, "sampling": vars(sampling), "generations": generations}
    store = Store("completions", digest(shared))
    keys = [digest(i, list(prompt)) for i, prompt in enumerate(prompts)]
    step = max(1, CHUNK // generations)
    starts = [s for s in range(0, len(prompts), step) if any(k not in store.entries for k in keys[s : s + step])]
    for start in tqdm(starts, desc=label, unit="chunk", leave=False):
        part = prompts[start : start + step]
        completions = rollout(model, matrices, part, generations, sampling, start * generations)
        answers = [{"completion": text.decode(c.tokens), "tokens": len(c.tokens), "finished": c.finished} for c in completions]
        store.add({keys[start + i]: answers[i * generations : (i + 1) * generations] for i in range(len(part))})
    return [store.entries[key] for key in keys]


def judge(answers: Sequence[Sequence[Answer]], rows: Sequence[Row], grader: Grader) -> list[list[Verdict]]:
    """The verdict on every answer; those of this grader version come from the store, except where the grader gave up."""
    store = Store("verdicts", digest(GRADER_VERSION, grader.answer_format))
    keys = [
        [digest(a["completion"], row["answer"], row.get("tolerance", 0.0)) for a in given]
        for given, row in zip(answers, rows, strict=True)
    ]
    futures = {
        key: grader.submit(a["completion"], row)
        for given, row, names in zip(answers, rows, keys, strict=True)
        for a, key in zip(given, names, strict=True)
        if key not in store.entries
    }
    verdicts = {key: future.result() for key, future in futures.items()}
    store.add({key: vars(v) for key, v in verdicts.items() if v.failure is None})
    return [[verdicts.get(key) or Verdict(**store.entries[key]) for key in names] for names in keys]
