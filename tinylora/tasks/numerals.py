"""Numbers as LaTeX writes them, compared exactly, as fractions.

A number is a sign, digits or a fraction, a percent sign or a base, and a unit, which is ignored.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction


def same_number(a: str | None, b: str | None) -> bool:
    """Equal in value: 72 and 72.0 are, 1/2 and 0.5 are, and nothing equals a missing number."""
    if a is None or b is None:
        return False
    try:
        return Fraction(a) == Fraction(b) if "/" in a + b else Decimal(a) == Decimal(b)
    except (ValueError, ArithmeticError):  # no number; one of more than 4,300 digits; over 0
        return False


@dataclass
class Numeral:
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


def numeral(latex: str) -> Numeral | None:
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
    return Numeral(value, part["percent"] is not None, _BASES.get(base, base) if base else None)


_POWER_GROUPS = tuple(i for i in range(1, _NUMERAL.groups + 1) if i not in _NUMERAL.groupindex.values())


def _fraction(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "").replace(" ", "")))


def same_numeral(gold: Numeral, other: Numeral, tolerance: float) -> bool:
    """Equal in value. A percent sign may be a factor of 1/100 or a unit: 50 % is 0.5 and 50; but 0.5 % is not 0.5."""
    if gold.base and other.base and gold.base != other.base:
        return False
    a, b = gold.value, other.value
    near = abs(a - b) <= Fraction(tolerance) * Fraction(1_000_001, 1_000_000)  # the tolerance itself is decimal
    if gold.percent == other.percent:
        return near
    plain, percent = (b, a) if gold.percent else (a, b)
    return plain == percent / 100 or (near and abs(plain) >= 1)


def chain(latex: str) -> list[str]:
    """The sides of "0.56 = 56 %", where all are numbers; anything else is one side."""
    sides = [side.strip() for side in latex.split("=")]
    return sides if all(numeral(side) for side in sides) else [latex]
