r"""What a text answers: the number after "#### ", the last number, the content of the last \boxed."""

import re

_MARKED = re.compile(r"#### (-?\$?[0-9.,]\S*)")  # up to the next blank
_WHOLE = re.compile(r"(-?\$?(?:[0-9,]++/[0-9,]++|[0-9.,]++(?:[eE][+-]?[0-9]{1,3})?))[\W_]*")  # and no letter or digit behind it
_NUMBER = re.compile(r"-?\$?[0-9][0-9.,]*|-?\$?\.[0-9]+")


def extract_strict(text: str) -> str | None:
    """The first number or fraction after "#### ", without commas, dollar sign and what is no letter or digit behind it.

    None where there is none, and where letters or digits touch it that are no part of it: 72abc is not 72.
    """
    marked = _MARKED.search(text)
    found = _WHOLE.fullmatch(marked[1]) if marked else None
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
