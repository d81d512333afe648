"""Raw rows by split: from the hub, or from local files (JSONL, parquet, a save_to_disk folder)."""

import json
from pathlib import Path

from tinylora.errors import InputError
from tinylora.tasks.known import BOTH, KNOWN, Known, Raw


def hub(name: str, known: Known | None, splits: tuple[str, ...]) -> dict[str, list[Raw]]:
    from datasets import load_dataset  # slow to import, and local rows do not need it

    if known is not None:
        path, subset, places = known.hub, known.subset, {s: known.splits[s] for s in splits if s in known.splits}
    else:
        path, _, subset = name.partition(":")
        places = {s: s for s in splits}
    found: dict[str, list[Raw]] = {"train": [], "test": []}
    for ours, theirs in places.items():
        try:
            found[ours] = [dict(row) for row in load_dataset(path, subset or None, split=theirs)]
        except Exception as error:  # the hub client raises a dozen unrelated types
            if known is None and ours == "test" and "train" in splits and found["train"]:
                return _held_out(found["train"])
            raise InputError(
                f"--dataset {name}: the hub did not give {path} {theirs} ({error}); give local rows with --data"
            ) from None
    return found


def local(path: Path, name: str, splits: tuple[str, ...]) -> dict[str, list[Raw]]:
    """Rows of a file, or of a folder's {train,test}.{jsonl,parquet}; a folder may hold one folder for each task."""
    if (path / name).is_dir():
        path = path / name
    if not path.is_dir():
        all_test = path.stem == "test" or (name in KNOWN and "train" not in KNOWN[name].splits)
        return {"train": [], "test": _rows_of(path)} if all_test else _held_out(_rows_of(path))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _from_disk(path)
    found: dict[str, list[Raw]] = {"train": [], "test": []}
    files = {s: file for s in found for kind in ("jsonl", "parquet") if (file := path / f"{s}.{kind}").exists()}
    if not files:
        raise InputError(f"--data: {path} holds neither train nor test as .jsonl or .parquet, nor a save_to_disk data set")
    return {**found, **{s: _rows_of(file) for s, file in files.items() if s in splits}}


def _held_out(rows: list[Raw]) -> dict[str, list[Raw]]:
    """One file serves both commands: every tenth row is held out."""
    return {"train": [r for i, r in enumerate(rows) if i % 10 != 9], "test": rows[9::10]}


def _from_disk(path: Path) -> dict[str, list[Raw]]:
    from datasets import DatasetDict, load_from_disk

    try:
        stored = load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"--data: {path} cannot be read as a save_to_disk data set: {error}") from None
    if not isinstance(stored, DatasetDict):
        return _held_out([dict(row) for row in stored])
    return {s: [dict(row) for row in stored[s]] if s in stored else [] for s in BOTH}


def _rows_of(path: Path) -> list[Raw]:
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    if not rows:
        raise InputError(f"--data: {path} has no rows")
    return rows


def _parquet(path: Path) -> list[Raw]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        return list(read_table(path).to_pylist())
    except (OSError, ArrowException) as error:
        raise InputError(f"--data: {path} cannot be read as parquet: {error}") from None


def _jsonl(path: Path) -> list[Raw]:
    try:
        # not splitlines(), which also cuts at characters that JSON may hold unescaped, such as U+2028
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"--data: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--data: {path} is not UTF-8: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"--data: {path} line {number} is not JSON: {error}") from None
            if not isinstance(rows[-1], dict):
                raise InputError(f"--data: {path} line {number} is not a JSON object")
    return rows
