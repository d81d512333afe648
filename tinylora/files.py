"""Atomic files: at every moment a path is absent, the old file or the whole new one. Never pickle. And the cache's place."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial"  # ending of the hidden file that a kill may leave beside the whole one


def cache_dir() -> Path:
    """Where what is costly to find out is kept: $TINYLORA_CACHE, or tinylora/ in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TINYLORA_CACHE") or Path(home) / "tinylora")


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda partial: Path(partial).write_text(text))


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    write_file(path, lambda partial: save_file(tensors, partial, metadata))


def write_file(path: Path, write: Callable[[str], object]) -> None:
    """Have `write` fill a hidden file, and give it this path when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    os.close(handle)
    try:
        write(partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
