"""Atomic files: at every moment a path is absent, the old file or the whole new one. Never pickle. And the cache's place, and
what tells one tensor's contents from another's."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial"  # ending of the hidden file that a kill may leave beside the whole one


def cache_dir() -> Path:
    """Where what is costly to find out is kept: $TINYLORA_CACHE, or tinylora/ in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TINYLORA_CACHE") or Path(home) / "tinylora")


def content_hash(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and bytes: tells contents apart; it is no defence against forgery."""
    h = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    h.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


def base_hash(digests: dict[str, str]) -> str:
    """Of a model whose parameters have these content hashes, by name."""
    return joint_hash(*(part for item in sorted(digests.items()) for part in item))


def joint_hash(*parts: str | bytes) -> str:
    """xxh3-128 of these, one after another."""
    h = xxhash.xxh3_128()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
    return h.hexdigest()


def write_text(path: Path, text: str) -> None:
    _replace(path, lambda partial: Path(partial).write_text(text))


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    _replace(path, lambda partial: save_file(tensors, partial, metadata))


def _replace(path: Path, write: Callable[[str], object]) -> None:
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
