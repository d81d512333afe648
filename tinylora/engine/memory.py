"""Memory for keys and values: what is free, what a rollout left behind, and how much of both the next takes."""

import contextlib
import ctypes
from functools import cache
from pathlib import Path

import torch

from tinylora.model.decoder import Decoder

MOST_SLOTS = {"cpu": 2048, "cuda": 256}  # beyond these a step's time grows as fast as its tokens
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST_CACHE = {"cpu": 4 << 30, "cuda": 24 << 30}  # bytes of keys and values, unless the caller says


def free_bytes(model: Decoder) -> int:
    """What this process may still allocate on the model's device; on a GPU with the room of its cache, which is used again."""
    device = model.device
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable + room_bytes(model)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 8 << 30
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def room_bytes(model: Decoder) -> int:
    """Of the cache that a rollout left behind."""
    room = None if model.kept is None else model.kept.room
    return 0 if room is None else room.numel() * room.element_size()


def cache_bytes(model: Decoder, least: int) -> int:
    """For keys and values, where nobody says. On a GPU the room that is there already, so that graphs over it stay, if `least`
    bytes fit; otherwise half of what is free, as prefill and logits want some too."""
    most = MOST_CACHE[model.device.type]
    if model.device.type == "cpu":  # where only what is written takes memory
        return most
    room = room_bytes(model)
    return room if room >= least else min(most, free_bytes(model) // 2)


@cache
def keep_memory() -> None:
    """From now on this process keeps the memory that it frees, for what it allocates next; glibc's alone, elsewhere nothing.

    glibc gives large blocks back to the system, and gets the next ones page by page: half the time of 2,048 sequences' rollout.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**26)  # of larger blocks, caches, only what is used is to take room
