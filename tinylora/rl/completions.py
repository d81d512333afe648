"""What a step's completions say: a file of them for each step, by TRL's column names, and a line of one for the terminal.

completions/step-000012.jsonl      step, prompt, completion, each reward by its name, reward, advantage; own columns
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylora.files import write_text

SHOWN = 160  # characters of a sample's line, of prompt and of completion


def write_completions(directory: Path, step: int, columns: Mapping[str, Sequence[Any]], most: int) -> None:
    """The first `most` completions of a step, a line each; `columns` have an entry for every completion."""
    count = min(most, len(columns["completion"]))
    if count == 0:
        return
    rows = [{"step": step, **{name: _plain(values[i]) for name, values in columns.items()}} for i in range(count)]
    path = directory / "completions" / f"step-{step:06d}.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _plain(value: Any) -> Any:
    """As JSON holds it, which has no NaN; what it does not hold is told as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def sample_line(step: int, prompt: str, completion: str, reward: float) -> str:
    """One completion in one line, cut in the middle where it is long."""
    said = "none" if math.isnan(reward) else f"{reward:g}"
    return f"step {step}, a sample, reward {said}: {_short(prompt)} -> {_short(completion)}"


def _short(text: str) -> str:
    text = json.dumps(text, ensure_ascii=False)
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} [...] {text[-half:]}"
