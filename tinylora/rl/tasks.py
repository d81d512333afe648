"""Tasks: rows of a prompt (chat messages), a gold answer and whatever columns came with them.

gsm8k reads the hub's openai/gsm8k or local JSONL; builtin is generated. Both have GSM8K's fields: question, and an answer
that ends in "#### n".
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylora.demo import problems
from tinylora.errors import InputError
from tinylora.rl.rewards import extract_strict

Row = dict[str, Any]  # "prompt": chat messages; "answer": the gold number as text; plus the data set's own columns

BUILTIN_TRAIN, BUILTIN_TEST = 8192, 4096
GSM8K_INSTRUCTION = "\nThink step by step, then give the final answer after ####."


@dataclass
class Task:
    name: str
    train: list[Row]
    test: list[Row]


def load_task(name: str, data: str | None = None) -> Task:
    """ "builtin" or "gsm8k"; InputError for rows that cannot be read or lack a column."""
    if name == "builtin":
        sizes = {"train": BUILTIN_TRAIN, "test": BUILTIN_TEST}
        return Task(name, *(_rows(problems.rows(s, n), "", f"builtin {s}") for s, n in sizes.items()))
    if data is None:
        return Task(name, *(_rows(_from_hub(s), GSM8K_INSTRUCTION, f"openai/gsm8k {s}") for s in ("train", "test")))
    path = Path(data).expanduser()
    if path.is_dir():
        files = [path / f"{split}.jsonl" for split in ("train", "test")]
        return Task(name, *(_rows(_jsonl(file), GSM8K_INSTRUCTION, str(file)) for file in files))
    rows = _rows(_jsonl(path), GSM8K_INSTRUCTION, str(path))
    # One file serves both commands: every tenth row is held out.
    return Task(name, [r for i, r in enumerate(rows) if i % 10 != 9], rows[9::10])


def _from_hub(split: str) -> list[Row]:
    from datasets import load_dataset  # slow to import, and local rows do not need it

    try:
        return [dict(row) for row in load_dataset("openai/gsm8k", "main", split=split)]
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise InputError(f"--dataset gsm8k: the hub did not give openai/gsm8k ({error}); give local rows with --data") from None


def _jsonl(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"--data: cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"--data: {path} line {number} is not JSON: {error}") from None
    return rows


def _rows(raw: list[Row], instruction: str, source: str) -> list[Row]:
    if not raw:
        raise InputError(f"{source} has no rows")
    for column in ("question", "answer"):
        missing = next((i for i, row in enumerate(raw) if not isinstance(row.get(column), str)), None)
        if missing is not None:
            raise InputError(f"{source}: row {missing + 1} has no text column {column!r} (it has {sorted(raw[missing])})")
    rows = []
    for number, row in enumerate(raw, 1):
        gold = extract_strict(row["answer"])
        if gold is None:
            raise InputError(f"{source}: the answer of row {number} does not end in '#### number'")
        prompt = [{"role": "user", "content": row["question"] + instruction}]
        rows.append({**row, "prompt": prompt, "solution": row["answer"], "answer": gold})
    return rows
