"""Answers taken apart: tuples, intervals, lists, sets, unions and matrices into elements, an equation into its sides."""

import re

_MATRIX = re.compile(r"\\begin\s*\{([pbvB]?matrix|array)\}\s*(?:\{[^{}]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)


def parts_of(latex: str) -> tuple[str, list[str]] | None:
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


_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?|\\angle[A-Za-z_0-9 ]+")


def equation(latex: str) -> tuple[str, str] | None:
    """("x", "5") of "x = 5", where the left side is a mere name."""
    left, equals, right = latex.partition("=")
    ok = equals and right.strip() and "=" not in right and _NAME.fullmatch(left.strip())
    return (left.strip(), right.strip()) if ok else None
