"""What math-verify is asked: whether two expressions are equal.

Nothing here evaluates text as Python: math-verify's LaTeX grammar is asked alone, never its parser of plain expressions.
"""

import logging
import re
from functools import lru_cache
from typing import Any

PLACES = 12  # digits to which the values of two expressions must agree


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


def same_expression(gold: str, candidate: str) -> bool:
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
