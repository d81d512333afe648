r"""Grading one completion: what it answers, read strictly and flexibly, and whether that equals the gold answer.

    strict    what the format asked for holds: the number after "#### ", or the content of the last \boxed
    flexible  the content of the last \boxed, else the last number; for a gold answer in words also the last line as it stands

A gold number is compared exactly (`numerals`); tuples, intervals, lists and sets are, element by element (`elements`). Only
expressions go to math-verify (`expressions`). An unevaluated candidate (9*2) never equals a gold number: it counts only where
the gold answer is an expression itself.

This file and the four that it imports load neither torch nor the rest of the package: the grader's processes start with them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from tinylora.tasks.elements import equation, parts_of
from tinylora.tasks.expressions import same_expression
from tinylora.tasks.extraction import extract_boxed, extract_flexible, extract_strict
from tinylora.tasks.numerals import chain, numeral, same_number, same_numeral

GRADER_VERSION = 2  # verdicts are cached by it: raise it with every change that can turn one
LONGEST_TEXT = 100_000  # characters of a completion that are read, from its end
LONGEST_ANSWER = 2_000  # characters of an answer; a longer one is no answer
DEEPEST_ANSWER = 50  # brackets inside brackets; deeper is no answer


@dataclass
class Verdict:
    """What a completion answers and whether it is right, by extractor."""

    answers: dict[str, str | None]  # "strict" and "flexible"
    right: dict[str, bool]
    failure: str | None = None  # "timeout" or "crash" where the grader gave up; both verdicts are False then


def grade(text: str, gold: str | Sequence[str], answer_format: str, tolerance: float = 0.0) -> Verdict:
    """answer_format "hash" or "boxed" is what strict asks for; tolerance is absolute and holds for gold numbers. Of several
    gold answers any is right."""
    if isinstance(gold, str):
        return _grade(text, gold, answer_format, tolerance)
    found = [_grade(text, g, answer_format, tolerance) for g in gold]
    best = {e: next((v for v in found if v.right[e]), found[0]) for e in ("strict", "flexible")}
    return Verdict({e: v.answers[e] for e, v in best.items()}, {e: v.right[e] for e, v in best.items()})


def _grade(text: str, gold: str, answer_format: str, tolerance: float) -> Verdict:
    text = text[-LONGEST_TEXT:]
    boxed = extract_boxed(text)
    flexible = boxed if boxed is not None else extract_flexible(text)
    if answer_format == "hash":
        strict = extract_strict(text)
        strict_right = same_number(strict, gold)
    else:
        strict = boxed
        strict_right = same_answer(gold, strict, tolerance)
    flexible_right = strict_right if flexible == strict else same_answer(gold, flexible, tolerance)
    if boxed is None and not flexible_right and (words := _last_words(text, gold)) is not None:
        flexible, flexible_right = words, True
    return Verdict({"strict": strict, "flexible": flexible}, {"strict": strict_right, "flexible": flexible_right})


def _last_words(text: str, gold: str) -> str | None:
    """The text's last line, or what follows its last colon, where that is a gold answer in words."""
    if numeral(gold := _clean(gold)) is not None or not gold or len(gold) > LONGEST_ANSWER:
        return None
    line = text.rstrip()[-2 * LONGEST_ANSWER :].rpartition("\n")[2]
    said = (_clean(part.strip().strip("*")) for part in (line, line.rpartition(":")[2]))
    return next((words for words in said if _key(words) == _key(gold)), None)


# ---- comparison ---------------------------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_REPLACED = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1"),
        (r"\\\$|(?<!\\)\$|(?<!\\)\\[()\[\]!]|\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|limits)(?![A-Za-z])", ""),
        (r"(?<=\d)(?:\{,\}|\\,|\{\\,\})(?=\d{3})", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\\[a-z]+|\d)\s*(\\[a-z]+|\d)(?![a-z])", r"\\frac{\1}{\2}"),
        (r"\\phantom\s*(?:\{[^{}]*\}|\S)", ""),
        (r"\\(?:textbf|textit|mathbf|boldsymbol|bm|rm)\s*\{([^{}]*)\}", r"\1"),
        (
            r"\\(?:text|textrm|mathrm|mbox|rm|textit|operatorname)\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z])",
            ",",
        ),
        (r"−|–", "-"),
        (r"×", r"\\times "),
        (r"π", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"°|\\degree(?![A-Za-z])", r"^\\circ"),
        (r"√", r"\\sqrt"),
        (r"\\leqslant|≤", r"\\le "),
        (r"\\geqslant|≥", r"\\ge "),
        (r"^\s*(?:\\approx|\\sim(?:eq)?)", ""),
        (r"^\s*[A-Za-z]\s*(?:\\in(?![A-Za-z])|∈)", ""),
        (r"\s+", " "),
    )
]


def _clean(latex: str) -> str:
    for pattern, by in _REPLACED:
        latex = pattern.sub(by, latex)
    return latex.strip().rstrip(".,;").rstrip()


def same_answer(gold: str, candidate: str | None, tolerance: float = 0.0) -> bool:
    """Whether the candidate is the gold answer; both LaTeX or plain."""
    if candidate is None or len(candidate) > LONGEST_ANSWER:
        return False
    if tolerance == 0 and _DECIMAL.fullmatch(gold) and _DECIMAL.fullmatch(candidate):  # nearly all of GSM8K, 20 times faster
        return Decimal(gold) == Decimal(candidate)
    if _depth(candidate) > DEEPEST_ANSWER:
        return False
    return _same(_clean(gold), _clean(candidate), tolerance)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _same(gold: str, candidate: str, tolerance: float) -> bool:
    if _key(gold) == _key(candidate):
        return True
    gold = chain(gold)[-1]
    if len(sides := chain(candidate)) > 1:
        return all(_same(gold, side, tolerance) for side in sides)
    number = numeral(gold)
    if number is None:
        parts = parts_of(gold)
        if parts is not None:
            return _same_parts(parts, parts_of(candidate) or ("list", [candidate]), tolerance)
    elif (parts := parts_of(candidate)) is not None and numeral(candidate) is None:
        return parts[0] == "list" and len(parts[1]) == 1 and _same(gold, parts[1][0], tolerance)
    left, right = equation(gold), equation(candidate)
    if left and right and _key(left[0]) == _key(right[0]):
        return _same(left[1], right[1], tolerance)
    if left and "=" not in candidate:
        return _same(left[1], candidate, tolerance)
    if right and "=" not in gold:
        return _same(gold, right[1], tolerance)
    if number is not None:
        other = numeral(candidate)
        return other is not None and same_numeral(number, other, tolerance)
    return same_expression(gold, candidate)


def _key(latex: str) -> str:
    """A form in which answers that are the same but for blanks, \\text and the brackets of a choice are the same text."""
    key = re.sub(r"\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", latex)
    key = re.sub(r"\s+", "", key)
    key = re.sub(r"^\(([A-Za-z])\)$", r"\1", key)
    key = re.sub(r"([\^_])\{(\w)\}", r"\1\2", key)
    return key.lower() if len(key) > 1 and key.isalpha() else key


def _same_parts(gold: tuple[str, list[str]], candidate: tuple[str, list[str]], tolerance: float) -> bool:
    if gold[0] != candidate[0] or len(gold[1]) != len(candidate[1]):
        return False
    if gold[0] not in ("list", "union"):
        return all(_same(a, b, tolerance) for a, b in zip(gold[1], candidate[1], strict=True))
    rest = list(candidate[1])
    for element in gold[1]:  # in any order
        match = next((i for i, other in enumerate(rest) if _same(element, other, tolerance)), None)
        if match is None:
            return False
        del rest[match]
    return True
