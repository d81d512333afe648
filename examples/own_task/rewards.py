"""Two rewards with TRL's signature: what the answer is worth, and a little for showing the way to it."""

import re
from typing import Any

Messages = list[list[dict[str, str]]]  # of each completion: one assistant message


def right(completions: Messages, total: list[int], **kwargs: Any) -> list[float]:
    """1 where the last number is the row's `total`."""
    said = [re.findall(r"\d+", message[0]["content"]) for message in completions]
    return [float(bool(numbers) and int(numbers[-1]) == want) for numbers, want in zip(said, total, strict=True)]


def shows_work(completions: Messages, between: list[int | None], **kwargs: Any) -> list[float | None]:
    """1 where the number on the way is there; None for rows that have none, which this function does not score."""
    texts = [message[0]["content"] for message in completions]
    return [None if n is None else float(str(n) in re.findall(r"\d+", t)) for t, n in zip(texts, between, strict=True)]
