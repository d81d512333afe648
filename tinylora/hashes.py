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


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of the narrow dtype is one of the wide dtype. float16 does not hold bfloat16, nor the reverse."""
    return wide == narrow or wide.itemsize > max(narrow.itemsize, 2)


def narrowest(tensor: Tensor, known: torch.dtype | None = None) -> torch.dtype:
    """The first of bfloat16, float16 and float32 that holds every number of a tensor (N, K); its own dtype where none does.

    `known`: a dtype of which that is known. Others are tried on 256 rows at a time, and most end at the first.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype == known or all(torch.equal(rows.to(dtype).to(rows.dtype), rows) for rows in tensor.split(256)):
            return dtype
    return tensor.dtype


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
