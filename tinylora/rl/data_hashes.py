"""What a run knows of its data, so that --resume can tell whether they changed: hashes, by what is told where they differ."""

from collections.abc import Sequence
from typing import Any

from tinylora.hashes import digest


def hashes_of(rows: dict[str, list[dict[str, Any]]], prompts: Sequence[Sequence[int]], columns: bool) -> dict[str, Any]:
    """Of the rows by split and their prompts' token ids; with `columns`, of what else is in the rows."""
    flat = [row for split in rows.values() for row in split]
    found: dict[str, Any] = {
        "rows": [len(split) for split in rows.values()],
        "prompts": digest([row["prompt"] for row in flat]),
        "prompts' token ids": digest(list(prompts)),
        "answers": digest([row.get("answer") for row in flat if _plain(row.get("answer"))]),
    }
    if columns:
        found["columns"] = digest([{k: v for k, v in row.items() if k != "prompt" and _plain(v)} for row in flat])
    return found


def _plain(value: Any) -> bool:
    """Whether JSON holds it."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    return all(map(_plain, value)) if isinstance(value, list | tuple) else isinstance(value, str | int | float | None)
