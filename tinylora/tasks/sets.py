"""Tasks: rows of a prompt (chat messages), a gold answer and whatever columns came with them.

The known sets come from the hub by their usual ids or from local rows, in the fields of either place. Any other data set has a
`prompt` column. A row that cannot be used is skipped, counted and named.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinylora.errors import InputError
from tinylora.tasks import builtin as problems
from tinylora.tasks.contents import plain, unreadable
from tinylora.tasks.grader import Grader, GraderPool, gold_answers
from tinylora.tasks.known import BOTH, KNOWN, Known, Raw, Unusable, gsm8k, own_golds
from tinylora.tasks.prompts import FORMATS, messages
from tinylora.tasks.sources import hub, local

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
    style: str = "auto"  # the prompt style of its questions; of other data sets, whose rows are messages, as it was asked for

    @property
    def known(self) -> bool:
        """Whether its answers are the engine's to read, whatever pays for them."""
        return is_known(self.name)

    @property
    def has_answers(self) -> bool:
        golds = gold_answers if self.known else own_golds
        return any(golds(row) for row in (*self.train, *self.test))

    def grader(self) -> Grader:
        """Of this task's answers; close it. The built-in task's are plain numbers, and need no process of their own."""
        pool = None if self.name == "builtin" else GraderPool()
        return Grader(self.answer_format, pool, gold_answers if self.known else own_golds)


def is_known(name: str) -> bool:
    """Whether this project knows how the set's rows are read."""
    return name == "builtin" or name in KNOWN


def load_task(
    name: str,
    data: str | None = None,
    style: str = "auto",
    splits: tuple[str, ...] = ("train", "test"),
    needs_answers: bool = True,
) -> Task:
    """ "builtin", a known set, or any other: "owner/name[:subset]" on the hub, or any name with `data`.

    needs_answers False keeps rows of other data sets that have no answer: they have a reward function of the user's. A style
    that is named is put on their text prompts too, auto leaves these as they are; InputError where they are conversations.
    InputError for rows that cannot be read, and where none is usable.
    """
    if name == "builtin":
        made = {s: problems.rows(s, n) for s, n in (("train", BUILTIN_TRAIN), ("test", BUILTIN_TEST))}
        known = Known("", None, BOTH, gsm8k, "plain")
        train, test = (_known_rows(made[s], known, "plain", f"builtin {s}", []) for s in BOTH)
        return Task(name, train, test, "hash", style="raw" if style == "raw" else "plain")
    entry = KNOWN.get(name)
    if entry is None and data is None and name.count("/") != 1:
        raise InputError(f"--dataset {name}: choose builtin, {', '.join(KNOWN)}, a hub id like owner/name, or give --data")
    raw = local(Path(data).expanduser(), name, splits) if data is not None else hub(name, entry, splits)
    task = Task(name, [], [], style=style)
    if entry is None:
        task.answer_format = FORMATS.get(style, task.answer_format)
        task.train, task.test = (_other_rows(raw[s], style, f"{name} {s}", needs_answers, task.notes) for s in BOTH)
        return task
    style = task.style = entry.style if style == "auto" else style
    task.answer_format = FORMATS.get(style) or FORMATS[entry.style]
    task.train, task.test = (_known_rows(raw[s], entry, style, f"{name} {s}", task.notes) for s in BOTH)
    return task


def _known_rows(raw: list[Raw], known: Known, style: str, source: str, notes: list[str]) -> list[Row]:
    def use(row: Raw) -> Row:
        row = dict(row)
        question, gold = known.read(row)
        question = question.strip()
        solution = {"solution": row["answer"]} if known.read is gsm8k else {}
        return {**row, "question": question, "prompt": messages(question, style), **solution, "answer": gold}

    return _usable(raw, use, source, notes)


def _other_rows(raw: list[Raw], style: str, source: str, needs_answers: bool, notes: list[str]) -> list[Row]:
    def use(row: Raw) -> Row:
        prompt: Any = row.get("prompt")
        if isinstance(prompt, str) and prompt.strip():
            prompt = messages(prompt, style)
        elif style not in ("auto", "plain", "raw") and isinstance(prompt, list) and prompt:
            raise InputError(f"--prompt-style {style}: {source} has prompts that are conversations already; leave it out")
        good = (
            isinstance(prompt, list) and prompt and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
        )
        if not good:
            raise Unusable(f"no column 'prompt' with text or messages (it has {', '.join(sorted(row))})")
        if why := unreadable(prompt):
            raise Unusable(why)
        if needs_answers and not own_golds(row):
            raise Unusable("no gold answer")
        return {**row, "prompt": plain(prompt)}

    return _usable(raw, use, source, notes)


def _usable(raw: list[Raw], use: Callable[[Raw], Row], source: str, notes: list[str]) -> list[Row]:
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


def sample_row(name: str, style: str = "auto") -> Row | None:
    """A row of a known set with a question of no content, which needs no data. None for any other."""
    if name not in KNOWN:
        return None
    return {"prompt": messages("(the question)", KNOWN[name].style if style == "auto" else style)}
