r"""Tasks: rows of a prompt (chat messages), a gold answer and whatever columns came with them.

The known sets come from the hub by their usual ids or from local rows (JSONL, parquet, a save_to_disk folder), in the fields
of either place. Any other data set has a `prompt` column. A row that cannot be used is skipped, counted and named.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinylora.errors import InputError
from tinylora.tasks import builtin as problems
from tinylora.tasks.grader import Grader, GraderPool
from tinylora.tasks.grading import extract_boxed, extract_strict
from tinylora.tasks.prompts import FORMATS, messages

Row = dict[str, Any]  # "prompt": chat messages; "answer": the gold answer as text; plus the data set's own columns

BUILTIN_TRAIN, BUILTIN_TEST = 8192, 4096
NAMED = 8  # skipped rows that a note names one by one


@dataclass
class Task:
    name: str
    train: list[Row]
    test: list[Row]
    answer_format: str = "boxed"  # "hash" or "boxed": what strict extraction asks for
    notes: list[str] = field(default_factory=list)  # what was left out of the rows, and why

    @property
    def has_answers(self) -> bool:
        return all("answer" in row for row in (self.train or self.test)[:1])

    def grader(self) -> Grader:
        """Of this task's answers; close it. The built-in task's are plain numbers, and need no process of their own."""
        return Grader(self.answer_format, None if self.name == "builtin" else GraderPool())


class Unusable(Exception):
    """Why a row is not used."""


@dataclass(frozen=True)
class Known:
    """A data set this project knows: where the hub has it and how its rows are read."""

    hub: str
    subset: str | None
    splits: dict[str, str]  # ours -> the hub's
    read: Callable[[Row], tuple[str, str]]  # question and gold answer; raises Unusable
    style: str = "qwen-boxed"


# ---- fields of the known sets -------------------------------------------------------------------------------------------


def _text(row: Row, *columns: str) -> str:
    """The first of these columns that the row has, as text."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value
    raise Unusable(f"no text column {columns[0]!r} (it has {', '.join(sorted(row))})")


def _gold(row: Row) -> str:
    """An `answer` of any type, or the last box of the solution. 27.0 is 27: AMC's integers are stored as floats."""
    value = row.get("answer")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float | str) and str(value).strip():
        return str(value).strip()
    solution = row.get("solution")
    boxed = extract_boxed(solution) if isinstance(solution, str) else None
    if boxed is None:
        raise Unusable("no gold answer")
    return boxed


def _gsm8k(row: Row) -> tuple[str, str]:
    question, gold = _text(row, "question"), extract_strict(_text(row, "answer"))
    if gold is None:
        raise Unusable("the answer does not end in '#### number'")
    return question, gold


_MATH_SUFFIX = re.compile(r"\s*Let's think step by step and output the final answer within \\boxed\{\}\.\s*$")


def _math(row: Row) -> tuple[str, str]:
    """Levels 3 to 5. The hub's problem and solution, or verl's prompt and reward_model.ground_truth."""
    level = str(row.get("level", "")).removeprefix("Level ").strip()
    if not level.isdigit():
        raise Unusable(f"level {level!r}")
    if int(level) < 3:
        raise Unusable("below level 3")
    if "reward_model" not in row:
        return _text(row, "problem", "question"), _gold({"solution": row.get("solution")})
    gold = (row["reward_model"] or {}).get("ground_truth")
    if not gold or not str(gold).strip():
        raise Unusable("no gold answer")
    return _MATH_SUFFIX.sub("", row["prompt"][-1]["content"]), str(gold).strip()


def _problem(row: Row) -> tuple[str, str]:
    return _text(row, "problem", "question"), _gold(row)


def _minerva(row: Row) -> tuple[str, str]:
    """A few golds are numpy's spelling of LaTeX."""
    question, gold = _problem(row)
    return question, gold.replace("np.", "\\")


def _olympiad(row: Row) -> tuple[str, str]:
    r"""final_answer is a list of one text; several answers in it, with or without $ around each, become a set."""
    answers = row.get("final_answer") or []
    gold = "".join(answers[:1] if isinstance(answers, list) else [str(answers)]).replace("$", "").strip()
    if not gold:
        raise Unusable("no gold answer")
    if re.search(r"\bwhere\b", gold):
        raise Unusable("the gold answer is a sentence")
    row["tolerance"] = float(row.get("error") or 0)
    context = row.get("context")
    question = f"{context}\n{_text(row, 'question')}" if context else _text(row, "question")
    return question, rf"\{{{gold}\}}" if row.get("is_multiple_answer") else gold


BOTH, TEST, ALL_IS_TEST = {"train": "train", "test": "test"}, {"test": "test"}, {"test": "train"}
KNOWN = {
    "gsm8k": Known("openai/gsm8k", "main", BOTH, _gsm8k, "gsm8k-hash"),
    "math": Known("DigitalLearningGmbH/MATH-lighteval", None, BOTH, _math),
    "math500": Known("HuggingFaceH4/MATH-500", None, TEST, _problem),
    "aime24": Known("HuggingFaceH4/aime_2024", None, ALL_IS_TEST, _problem),
    "amc23": Known("math-ai/amc23", None, TEST, _problem),
    "minerva_math": Known("math-ai/minervamath", None, TEST, _minerva),
    "olympiadbench": Known("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", ALL_IS_TEST, _olympiad),
}


# ---- loading ------------------------------------------------------------------------------------------------------------


def load_task(
    name: str,
    data: str | None = None,
    style: str = "auto",
    splits: tuple[str, ...] = ("train", "test"),
    needs_answers: bool = True,
) -> Task:
    """ "builtin", a known set, or any other: "owner/name[:subset]" on the hub, or any name with `data`.

    needs_answers False keeps rows of other data sets that have no answer: they have a reward function of the user's.
    InputError for rows that cannot be read, and where none is usable.
    """
    if name == "builtin":
        made = {s: problems.rows(s, n) for s, n in (("train", BUILTIN_TRAIN), ("test", BUILTIN_TEST))}
        known = Known("", None, BOTH, _gsm8k, "plain")
        train, test = (_known_rows(made[s], known, "plain", f"builtin {s}", []) for s in BOTH)
        return Task(name, train, test, "hash")
    entry = KNOWN.get(name)
    if entry is None and data is None and name.count("/") != 1:
        raise InputError(f"--dataset {name}: choose builtin, {', '.join(KNOWN)}, a hub id like owner/name, or give --data")
    raw = _local(Path(data).expanduser(), name, splits) if data is not None else _hub(name, entry, splits)
    task = Task(name, [], [])
    if entry is None:
        task.train, task.test = (_other_rows(raw[s], f"{name} {s}", needs_answers, task.notes) for s in BOTH)
        return task
    style = entry.style if style == "auto" else style
    task.answer_format = FORMATS.get(style) or FORMATS[entry.style]
    task.train, task.test = (_known_rows(raw[s], entry, style, f"{name} {s}", task.notes) for s in BOTH)
    return task


def _known_rows(raw: list[Row], known: Known, style: str, source: str, notes: list[str]) -> list[Row]:
    def use(row: Row) -> Row:
        row = dict(row)
        question, gold = known.read(row)
        question = question.strip()
        solution = {"solution": row["answer"]} if known.read is _gsm8k else {}
        return {**row, "question": question, "prompt": messages(question, style), **solution, "answer": gold}

    return _usable(raw, use, source, notes)


def _other_rows(raw: list[Row], source: str, needs_answers: bool, notes: list[str]) -> list[Row]:
    def use(row: Row) -> Row:
        prompt = row.get("prompt")
        if isinstance(prompt, str) and prompt.strip():
            prompt = [{"role": "user", "content": prompt}]
        good = (
            isinstance(prompt, list) and prompt and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
        )
        if not good:
            raise Unusable(f"no column 'prompt' with text or messages (it has {', '.join(sorted(row))})")
        return {**row, "prompt": prompt, **({"answer": _gold(row)} if needs_answers else {})}

    return _usable(raw, use, source, notes)


def _usable(raw: list[Row], use: Callable[[Row], Row], source: str, notes: list[str]) -> list[Row]:
    """The rows that `use` accepts; the others are counted and named in `notes`. InputError where none is left."""
    rows: list[Row] = []
    skipped: dict[str, list[int]] = {}
    for number, row in enumerate(raw, 1):
        try:
            rows.append(use(row))
        except Unusable as error:
            skipped.setdefault(str(error), []).append(number)
    if raw and not rows:
        reason, numbers = next(iter(skipped.items()))
        raise InputError(f"{source} has no usable rows; row {numbers[0]}: {reason}")
    for reason, numbers in skipped.items():
        said = ", ".join(map(str, numbers[:NAMED])) + (f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else "")
        notes.append(f"{source}: {len(numbers)} of {len(raw)} rows skipped, {reason}: row {said}")
    return rows


def _hub(name: str, known: Known | None, splits: tuple[str, ...]) -> dict[str, list[Row]]:
    from datasets import load_dataset  # slow to import, and local rows do not need it

    if known is not None:
        path, subset, places = known.hub, known.subset, {s: known.splits[s] for s in splits if s in known.splits}
    else:
        path, _, subset = name.partition(":")
        places = {s: s for s in splits}
    found: dict[str, list[Row]] = {"train": [], "test": []}
    for ours, theirs in places.items():
        try:
            found[ours] = [dict(row) for row in load_dataset(path, subset or None, split=theirs)]
        except Exception as error:  # the hub client raises a dozen unrelated types
            if known is None and ours == "test" and "train" in splits and found["train"]:
                return _held_out(found["train"])
            raise InputError(
                f"--dataset {name}: the hub did not give {path} {theirs} ({error}); give local rows with --data"
            ) from None
    return found


def _local(path: Path, name: str, splits: tuple[str, ...]) -> dict[str, list[Row]]:
    """Rows of a file, or of a folder's {train,test}.{jsonl,parquet}; a folder may hold one folder for each task."""
    if (path / name).is_dir():
        path = path / name
    if not path.is_dir():
        all_test = path.stem == "test" or (name in KNOWN and "train" not in KNOWN[name].splits)
        return {"train": [], "test": _rows_of(path)} if all_test else _held_out(_rows_of(path))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _from_disk(path)
    found: dict[str, list[Row]] = {"train": [], "test": []}
    files = {s: file for s in found for kind in ("jsonl", "parquet") if (file := path / f"{s}.{kind}").exists()}
    if not files:
        raise InputError(f"--data: {path} holds neither train nor test as .jsonl or .parquet, nor a save_to_disk data set")
    return {**found, **{s: _rows_of(file) for s, file in files.items() if s in splits}}


def _held_out(rows: list[Row]) -> dict[str, list[Row]]:
    """One file serves both commands: every tenth row is held out."""
    return {"train": [r for i, r in enumerate(rows) if i % 10 != 9], "test": rows[9::10]}


def _from_disk(path: Path) -> dict[str, list[Row]]:
    from datasets import DatasetDict, load_from_disk

    try:
        stored = load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"--data: {path} cannot be read as a save_to_disk data set: {error}") from None
    if not isinstance(stored, DatasetDict):
        return _held_out([dict(row) for row in stored])
    return {s: [dict(row) for row in stored[s]] if s in stored else [] for s in BOTH}


def _rows_of(path: Path) -> list[Row]:
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    if not rows:
        raise InputError(f"--data: {path} has no rows")
    return rows


def _parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        return list(read_table(path).to_pylist())
    except (OSError, ArrowException) as error:
        raise InputError(f"--data: {path} cannot be read as parquet: {error}") from None


def _jsonl(path: Path) -> list[Row]:
    try:
        # not splitlines(), which also cuts at characters that JSON may hold unescaped, such as U+2028
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"--data: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--data: {path} is not UTF-8: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"--data: {path} line {number} is not JSON: {error}") from None
            if not isinstance(rows[-1], dict):
                raise InputError(f"--data: {path} line {number} is not a JSON object")
    return rows
