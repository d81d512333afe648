"""The cache of keys and values: pages that slots share, or on a CPU one page a slot."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinylora.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer in pages: (layers, pages, kv_heads, page_size, head_dim) each.

    Paged, `table` says which pages a slot's positions lie in, and one page more than asked for, the last, takes what slots
    out of use write. Without a table a slot owns one page as long as any sequence, the one of its own number: on a CPU no
    step then gathers pages.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int,
        like: Tensor,
        slots: int = 0,
        longest: int = 0,
        kept: Tensor | None = None,  # the room of a cache before, which is taken where it is enough
    ) -> None:
        shape = (2, config.num_layers, pages + (slots > 0), config.num_kv_heads, page_size, config.head_dim)
        size = math.prod(shape)
        self.room = kept if kept is not None and len(kept) >= size else lazy_zeros(size, like)  # (elements,)
        self.keys, self.values = self.room[:size].view(shape)
        self.page_size = page_size
        self.table: Tensor | None = None
        if slots:  # (slots, most pages of a sequence)
            self.table = torch.full((slots, -(-longest // page_size)), pages, dtype=torch.int32, device=like.device)

    @property
    def paged(self) -> bool:
        return self.table is not None

    def write_prompt(
        self,
        keys: Tensor,  # (layers, tokens, kv_heads, head_dim)
        values: Tensor,  # (layers, tokens, kv_heads, head_dim)
        pages: Sequence[int],  # that the tokens fill, one after another
        tails: Sequence[int],  # or: pages that get a copy of the tokens each
    ) -> None:
        """Put a prefilled prompt, or a part of it, into pages."""
        first, n = tails[0] if tails else 0, len(tails)
        run = list(tails) == list(range(first, first + n))
        for cells, rows in ((self.keys, keys), (self.values, values)):
            rows = rows.transpose(1, 2)  # (layers, kv_heads, tokens, head_dim)
            for i, page in enumerate(pages):
                cells[:, page] = rows[:, :, i * self.page_size : (i + 1) * self.page_size]
            if n and run:
                cells[:, first : first + n, :, : rows.shape[2]] = rows[:, None]
            else:
                for page in tails:
                    cells[:, page, :, : rows.shape[2]] = rows

    def write_table(self, rows: Sequence[Sequence[int]]) -> None:
        """The pages of the first slots, those of each in their order."""
        assert self.table is not None
        slots, most = self.table.shape
        rubbish = self.keys.shape[1] - 1
        full = [[*row, *[rubbish] * (most - len(row))] for row in [*rows, *[[]] * (slots - len(rows))]]
        # pinned, or the copy would wait for the device
        self.table.copy_(torch.tensor(full, dtype=torch.int32, pin_memory=self.table.is_cuda), non_blocking=True)

    def move(self, moves: Sequence[tuple[int, int]], longest: int) -> None:
        """Without a table: copy the first `longest` positions of slots to others, (from, to) each."""
        for cells in (self.keys, self.values):
            for source, target in moves:
                cells[:, target, :, :longest] = cells[:, source, :, :longest]


def lazy_zeros(size: int, like: Tensor) -> Tensor:
    """Zeros (size,) of like's dtype and device; on a CPU memory that takes no room until it is written."""
    if like.device.type != "cpu":
        return like.new_zeros(size)
    return torch.from_numpy(np.zeros(size * like.element_size(), np.uint8)).view(like.dtype)
