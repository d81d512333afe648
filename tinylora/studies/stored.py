"""JSON that a run or a study has left, read; or an error that names its file."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from tinylora.errors import InputError


def read(path: Path, lines: bool = False, needs: Set[str] = frozenset()) -> list[dict[str, Any]]:
    """The JSON object of a file, or of each of its lines. InputError where there is none, one is torn, or lacks a key."""
    try:
        text = path.read_text()
        parts = [line for line in text.split("\n") if line] if lines else [text]  # JSON may hold U+2028 within a line
        found = [dict(json.loads(part)) for part in parts]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is torn or no JSON ({error}); the command that wrote it mends it when it goes on") from None
    if not found:
        raise InputError(f"{path} is empty: nothing has been finished yet")
    for row in found:
        if missing := needs - row.keys():
            raise InputError(f"{path}: a row has no {', '.join(sorted(missing))}")
    return found
