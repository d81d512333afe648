"""Hashes that tell contents apart: of a tensor, of a model, of anything that JSON holds. No defence against forgery."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import Tensor


def content_hash(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and bytes."""
    h = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    h.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


def base_hash(digests: dict[str, str]) -> str:
    """Of a model whose parameters have these content hashes, by name."""
    return joint_hash(*(part for item in sorted(digests.items()) for part in item))


def quantisation(digests: Iterable[str]) -> str:
    """Of a base with these hashes: how many of its tensors are of which type; "" where they do not come from a GGUF."""
    types = Counter(d.split(":")[0] for d in digests if ":" in d)
    return ", ".join(f"{count} {type_}" for type_, count in sorted(types.items(), key=lambda item: (-item[1], item[0])))


def joint_hash(*parts: str | bytes) -> str:
    """xxh3-128 of these, one after another."""
    h = xxhash.xxh3_128()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
    return h.hexdigest()


def digest(*parts: Any) -> str:
    """Of what JSON holds."""
    return xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest()
