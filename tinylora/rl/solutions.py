"""What SFT learns from: a row's solution as tokens."""

import re
from typing import Any

from tinylora.engine.rollout import Completion
from tinylora.engine.text import Text
from tinylora.errors import InputError


def solution(row: dict[str, Any], text: Text, source: str) -> Completion:
    """The row's solution as tokens with the end token. InputError where the row has none."""
    column = "foreign" if source == "foreign" else "solution"
    if not isinstance(row.get(column), str):
        raise InputError(f"--algorithm sft: a row has no column {column!r} with text (it has {', '.join(sorted(row))})")
    words = re.sub(r"<<[^>]*>>", "", row[column].strip())  # without GSM8K's calculator marks
    tokens = text.tokenizer(words, add_special_tokens=False)["input_ids"]
    return Completion([*tokens, text.tokenizer.eos_token_id], [], True)
