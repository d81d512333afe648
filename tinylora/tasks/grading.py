r"""Grading one completion: what it answers, read strictly and flexibly, and whether that equals the gold answer.

    strict    what the format asked for holds: the number after "#### ", or the content of the last \boxed
    flexible  the content of the last \boxed, else the last number

A gold number is compared here, exactly, as a fraction; so are tuples, intervals, lists and sets, element by element. Only
expressions go to math-verify. An unevaluated candidate (9*2) never equals a gold number: it counts only where the gold answer
is an expression itself. Units are ignored. Nothing here evaluates text as Python: math-verify's LaTeX grammar is asked alone,
never its parser of plain expressions.

This file imports neither torch nor the rest of the package: the grader's processes start with it.
"""

import logging
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from typing import Any

GRADER_VERSION = 1  # verdicts are cached by it: raise it with every change that can turn one
LONGEST_TEXT = 100_000  # characters of a completion that are read, from its end
LONGEST_ANSWER = 2_000  # characters of an answer; a longer one is no answer
DEEPEST_ANSWER = 50  # brackets inside brackets; deeper is no answer
PLACES = 12  # digits to which the values of two expressions must agree

_STRICT = re.compile(r"#### (-?\$?[0-9.,]+)")
_NUMBER = re.compile(r"-?\$?[0-9][0-9.,]*|-?\$?\.[0-9]+")


# ---- extraction ---------------------------------------------------------------------------------------------------------


def extract_strict(text: str) -> str | None:
    """The first number after "#### ", without commas, dollar sign and final full stop; None where there is none."""
    found = _STRICT.search(text)
    return _plain(found[1]) if found else None


def extract_flexible(text: str) -> str | None:
    """The last number of the text, cleaned the same way; None where there is none."""
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str | None:
    return number.replace(",", "").replace("$", "").rstrip(".") or None


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed and not empty; None where there is none. One pass."""
    if "boxed" not in text:
        return None
    opened: list[int | None] = []  # where each open brace's content starts if it is a box's
    answer = None
    for mark in re.finditer(r"\\f?boxed\s*\{|\\[{}\\]|[{}]", text):
        if mark[0][-1] == "{" and mark[0] != r"\{":
            opened.append(mark.end() if len(mark[0]) > 1 else None)
        elif mark[0] == "}" and opened:
            start = opened.pop()
            if start is not None and text[start : mark.start()].strip():
                answer = text[start : mark.start()].strip()
    return answer


def same_number(a: str | None, b: str | None) -> bool:
    """Equal in value: 72 and 72.0 are, and nothing equals a missing number."""
    try:
        return a is not None and b is not None and Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


@dataclass
class Verdict:
    """What a completion answers and whether it is right, by extractor."""

    answers: dict[str, str | None]  # "strict" and "flexible"
    right: dict[str, bool]
    failure: str | None = None  # "timeout" or "crash" where the grader gave up; both verdicts are False then


def grade(text: str, gold: str, answer_format: str, tolerance: float = 0.0) -> Verdict:
    """answer_format "hash" or "boxed" is what strict asks for; tolerance is absolute and holds for gold numbers."""
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
    return Verdict({"strict": strict, "flexible": flexible}, {"strict": strict_right, "flexible": flexible_right})


_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")

# ---- comparison ---------------------------------------------------------------------------------------------------------

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
    gold = _chain(gold)[-1]
    if len(sides := _chain(candidate)) > 1:
        return all(_same(gold, side, tolerance) for side in sides)
    number = _numeral(gold)
    if number is None:
        parts = _parts(gold)
        if parts is not None:
            return _same_parts(parts, _parts(candidate) or ("list", [candidate]), tolerance)
    elif (parts := _parts(candidate)) is not None and _numeral(candidate) is None:
        return parts[0] == "list" and len(parts[1]) == 1 and _same(gold, parts[1][0], tolerance)
    left, right = _equation(gold), _equation(candidate)
    if left and right and _key(left[0]) == _key(right[0]):
        return _same(left[1], right[1], tolerance)
    if left and "=" not in candidate:
        return _same(left[1], candidate, tolerance)
    if right and "=" not in gold:
        return _same(gold, right[1], tolerance)
    if number is not None:
        other = _numeral(candidate)
        return other is not None and _same_numeral(number, other, tolerance)
    return _math_verify(gold, candidate)


def _key(latex: str) -> str:
    """A form in which answers that are the same but for blanks, \\text and the brackets of a choice are the same text."""
    key = re.sub(r"\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", latex)
    key = re.sub(r"\s+", "", key)
    key = re.sub(r"^\(([A-Za-z])\)$", r"\1", key)
    key = re.sub(r"([\^_])\{(\w)\}", r"\1\2", key)
    return key.lower() if len(key) > 1 and key.isalpha() else key


# -- numbers: sign, digits or a fraction, a percent sign or a base, a unit


@dataclass
class _Numeral:
    value: Fraction
    percent: bool
    base: str | None


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_POWER = r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4}))|[eE]([+-]?\d{1,3})(?![\d.]))"
_UNIT = (
    r"(?:\\(?:text|textrm|mathrm|mbox|rm|textit|operatorname)\s*\{[^{}]*\}|\\AA|\\mu|/|(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z]))"
)
_NUMERAL = re.compile(
    rf"""\s*(?P<sign>[+-]?)\s*(?:
        (?P<whole>\d+)?\s*\\frac\s*(?:\{{\s*(?P<top>[+-]?\s*{_DIGITS})\s*\}}\s*\{{\s*(?P<bottom>[+-]?\s*{_DIGITS})\s*\}}
            |(?P<top1>\d)\s*(?P<bottom1>\d)|\{{\s*(?P<top2>{_DIGITS})\s*\}}\s*(?P<bottom2>\d))
        |(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})
        |(?P<digits>{_DIGITS}){_POWER}?
    )\s*(?:_\s*\{{?\s*(?:\\text\s*\{{\s*)?(?P<base>\d+|[a-z]{{3,7}})\s*\}}?\}}?)?\s*(?P<percent>\\?%|percent(?![a-z]))?
    \s*(?:\^\s*\{{?\s*\\circ\s*\}}?)?\s*(?:{_UNIT}(?:\s*\^\s*(?:\{{[+-]?\d\}}|\d))?\s*)*""",
    re.VERBOSE,
)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def _numeral(latex: str) -> _Numeral | None:
    """The number that this is, or None: sums, products, powers and roots are not numbers yet."""
    found = _NUMERAL.fullmatch(latex)
    if not found:
        return None
    part = found.groupdict()
    if part["digits"]:
        exponent = next((found[i] for i in _POWER_GROUPS if found[i]), "0")
        value = _fraction(part["digits"]) * Fraction(10) ** int(exponent)
    else:
        top = part["top"] or part["top1"] or part["top2"] or part["over"]
        bottom = _fraction(part["bottom"] or part["bottom1"] or part["bottom2"] or part["under"])
        if bottom == 0:
            return None
        value = int(part["whole"] or 0) + _fraction(top) / bottom
    if part["sign"] == "-":
        value = -value
    base = part["base"]
    return _Numeral(value, part["percent"] is not None, _BASES.get(base, base) if base else None)


_POWER_GROUPS = tuple(i for i in range(1, _NUMERAL.groups + 1) if i not in _NUMERAL.groupindex.values())


def _fraction(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "").replace(" ", "")))


def _same_numeral(gold: _Numeral, other: _Numeral, tolerance: float) -> bool:
    """Equal in value. A percent sign may be a factor of 1/100 or a unit: 50 % is 0.5 and 50; but 0.5 % is not 0.5."""
    if gold.base and other.base and gold.base != other.base:
        return False
    a, b = gold.value, other.value
    near = abs(a - b) <= Fraction(tolerance) * Fraction(1_000_001, 1_000_000)  # the tolerance itself is decimal
    if gold.percent == other.percent:
        return near
    plain, percent = (b, a) if gold.percent else (a, b)
    return plain == percent / 100 or (near and abs(plain) >= 1)


def _chain(latex: str) -> list[str]:
    """The sides of "0.56 = 56 %", where all are numbers; anything else is one side."""
    sides = [side.strip() for side in latex.split("=")]
    return sides if all(_numeral(side) for side in sides) else [latex]


# -- tuples, intervals, sets, lists, unions, matrices

_MATRIX = re.compile(r"\\begin\s*\{([pbvB]?matrix|array)\}\s*(?:\{[^{}]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)


def _parts(latex: str) -> tuple[str, list[str]] | None:
    r"""("(]", elements) of a tuple or interval by its brackets, ("list", elements) of a set or bare list, ("union", parts).

    A matrix is ("2 rows", cells). Anything that has no elements is None. "a \pm b" is two elements.
    """
    if matrix := _MATRIX.fullmatch(latex):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2].strip()) if row.strip()]
        return f"{len(rows)} rows", [cell.strip() for row in rows for cell in row]
    if re.search(r"\\cup(?![A-Za-z])|∪", latex):
        return "union", [part.strip() for part in re.split(r"\\cup(?![A-Za-z])|∪", latex)]
    inside = re.fullmatch(r"\\?\{(.*?)\\?\}", latex, re.DOTALL) if latex.startswith(r"\{") else None
    if inside and _split(inside[1]) is not None:
        return "list", _elements(_split(inside[1]) or [])
    if len(latex) > 1 and latex[0] in "([" and latex[-1] in ")]":
        elements = _split(latex[1:-1])
        if elements is not None and len(elements) > 1:
            return latex[0] + latex[-1], elements
    elements = _split(latex)
    if elements is None:
        return None
    elements = _elements(elements)
    return ("list", elements) if len(elements) > 1 else None


def _elements(parts: list[str]) -> list[str]:
    """Empty ones left out, and a single \\pm written out."""
    found = []
    for part in parts:
        if not part:
            continue
        if part.count(r"\pm") == 1:
            before, after = re.split(r"\\pm(?![A-Za-z])", part) if re.search(r"\\pm(?![A-Za-z])", part) else (part, "")
            found += [f"{before}+{after}" if before.strip() else after.strip(), f"{before}-{after}".strip()]
        else:
            found.append(part)
    return found


def _split(latex: str) -> list[str] | None:
    """The pieces between commas outside all brackets; None where brackets do not match."""
    depth, start, pieces = 0, 0, []
    for i, character in enumerate(latex):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif character in ",;" and depth == 0:
            pieces.append(latex[start:i].strip())
            start = i + 1
    return [*pieces, latex[start:].strip()] if depth == 0 else None


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


_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?|\\angle[A-Za-z_0-9 ]+")


def _equation(latex: str) -> tuple[str, str] | None:
    """("x", "5") of "x = 5", where the left side is a mere name."""
    left, equals, right = latex.partition("=")
    ok = equals and right.strip() and "=" not in right and _NAME.fullmatch(left.strip())
    return (left.strip(), right.strip()) if ok else None


# -- everything else


@lru_cache(maxsize=4096)
def _parsed(latex: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse  # a second to import, and most answers are numbers

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    latex = re.sub(r"(?<![A-Za-z])\s+|\s+(?![A-Za-z])", "", latex)  # it takes the c of "a + b + c" for a unit
    if latex[-1:].isalpha() and not re.search("[=<>]|\\\\[lg]e", latex):
        latex = f"({latex})"
    boxed = rf"\boxed{{{latex}}}"
    return tuple(parse(boxed, config, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None))


def _math_verify(gold: str, candidate: str) -> bool:
    """math-verify's judgement of two expressions, to PLACES decimals. It has no time limit of its own: the pool has."""
    from math_verify import verify

    try:
        a, b = _parsed(gold), _parsed(candidate)
        return bool(verify(list(a), list(b), float_rounding=PLACES, timeout_seconds=None)) and _near(a, b)
    except Exception:  # sympy raises whatever it likes on nonsense; nonsense is wrong
        return False


def _near(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Of two values: PLACES digits agree. math-verify rounds to decimal places, which makes all small values equal."""
    if not all(getattr(x[0], "is_number", False) for x in (a, b)):
        return True
    x, y = (z[0].evalf(30) for z in (a, b))  # sympy's own numbers: 1/2004! is not 0
    return bool(abs(x - y) <= max(abs(x), abs(y)) / 10**PLACES)
