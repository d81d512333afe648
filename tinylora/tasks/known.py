"""The known data sets: where the hub has each, and how its rows are read, in the hub's fields or a local file's."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinylora.tasks.extraction import extract_boxed, extract_strict

Raw = dict[str, Any]  # a data row as its source has it


class Unusable(Exception):
    """Why a row is not used."""


@dataclass(frozen=True)
class Known:
    """A data set this project knows: where the hub has it and how its rows are read."""

    hub: str
    subset: str | None
    splits: dict[str, str]  # ours -> the hub's
    read: Callable[[Raw], tuple[str, str]]  # question and gold answer; raises Unusable
    style: str = "qwen-boxed"


def _text(row: Raw, *columns: str) -> str:
    """The first of these columns that the row has, as text."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value
    raise Unusable(f"no text column {columns[0]!r} (it has {', '.join(sorted(row))})")


def gold_answer(row: Raw) -> str:
    """An `answer` of one number or text, or the last box of the solution."""
    gold = _gold_text(row.get("answer"))
    if gold is None:
        solution = row.get("solution")
        gold = extract_boxed(solution) if isinstance(solution, str) else None
    if gold is None:
        raise Unusable("no gold answer")
    return gold


def _gold_text(value: Any) -> str | None:
    """A number or a text as a gold answer. 27.0 is 27: AMC's integers are stored as floats."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None if isinstance(value, int | float | str) else None


def own_golds(row: Raw) -> list[str]:
    r"""The gold answers of a row of one's own, any of which is right: its `answer`, a text, a number, or a list of them, and of
    a text what follows "#### " or is in its last \boxed; else the last box of its solution. Empty where there is none."""
    value = row.get("answer")
    texts = [_gold_text(v) for v in (value if isinstance(value, list | tuple) else [value])]
    golds = [extract_strict(text) or extract_boxed(text) or text for text in texts if text is not None]
    solution = row.get("solution")
    if not golds and isinstance(solution, str):
        golds = [box for box in [extract_boxed(solution)] if box is not None]
    return golds


def gsm8k(row: Raw) -> tuple[str, str]:
    question, gold = _text(row, "question"), extract_strict(_text(row, "answer"))
    if gold is None:
        raise Unusable("the answer does not end in '#### number'")
    return question, gold


_MATH_SUFFIX = re.compile(r"\s*Let's think step by step and output the final answer within \\boxed\{\}\.\s*$")


def _math(row: Raw) -> tuple[str, str]:
    """Levels 3 to 5. The hub's problem and solution, or verl's prompt and reward_model.ground_truth."""
    level = str(row.get("level", "")).removeprefix("Level ").strip()
    if not level.isdigit():
        raise Unusable(f"level {level!r}")
    if int(level) < 3:
        raise Unusable("below level 3")
    if "reward_model" not in row:
        return _text(row, "problem", "question"), gold_answer({"solution": row.get("solution")})
    gold = (row["reward_model"] or {}).get("ground_truth")
    if not gold or not str(gold).strip():
        raise Unusable("no gold answer")
    return _MATH_SUFFIX.sub("", row["prompt"][-1]["content"]), str(gold).strip()


def _problem(row: Raw) -> tuple[str, str]:
    return _text(row, "problem", "question"), gold_answer(row)


def _minerva(row: Raw) -> tuple[str, str]:
    """A few golds are numpy's spelling of LaTeX."""
    question, gold = _problem(row)
    return question, gold.replace("np.", "\\")


def _olympiad(row: Raw) -> tuple[str, str]:
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
    "gsm8k": Known("openai/gsm8k", "main", BOTH, gsm8k),
    "math": Known("DigitalLearningGmbH/MATH-lighteval", None, BOTH, _math),
    "math500": Known("HuggingFaceH4/MATH-500", None, TEST, _problem),
    "aime24": Known("HuggingFaceH4/aime_2024", None, ALL_IS_TEST, _problem),
    "amc23": Known("math-ai/amc23", None, TEST, _problem),
    "minerva_math": Known("math-ai/minervamath", None, TEST, _minerva),
    "olympiadbench": Known("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", ALL_IS_TEST, _olympiad),
}
