"""The layout of a pack: where its sequences lie, what continues what, and which keys each query sees."""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels.products import NARROW


class Packing:
    """Where everything lies in a pack of whole sequences and of suffixes that continue some of them.

    A suffix sees its prefix's keys and, causally, its own, so a prompt is scored once for all its completions; the prefix's
    keys and values get the sum of all their suffixes' gradients.
    """

    def __init__(
        self,
        lengths: Sequence[int],  # of the whole sequences, then of the suffixes; they sum to T
        prefixes: Sequence[int],  # of each suffix: the sequence it continues
        dtype: torch.dtype,
        device: torch.device,
        capacity: int | None,  # keys to cover, for bits that do not depend on the pack; None: as many as there are
    ) -> None:
        self.whole, self.capacity = len(lengths) - len(prefixes), capacity
        before = [0] * self.whole + [lengths[p] for p in prefixes]  # tokens ahead of each sequence or suffix
        self.lengths, self.before, self.prefixes, self.dtype, self.device = lengths, before, prefixes, dtype, device
        self.split = sum(lengths[: self.whole])  # rows of whole sequences
        self.longest = capacity or max(lengths[: self.whole])
        own = torch.tensor(lengths, device=device)  # (sequences,)
        self.starts = own.cumsum(0) - own  # (sequences,)
        self.sequence = torch.arange(len(lengths), device=device).repeat_interleave(own)  # (T,)
        self.place = torch.arange(sum(lengths), device=device) - self.starts[self.sequence]  # (T,)
        self.positions = self.place + torch.tensor(before, device=device)[self.sequence]  # (T,)

    @cached_property
    def index(self) -> Tensor:  # (split,): sequence * longest + position
        return self.sequence[: self.split] * self.longest + self.place[: self.split]

    @cached_property
    def suffixes(self) -> tuple[Tensor, Tensor, Tensor]:
        """index (T',): suffix * rows + place in it; keys (suffixes, length): the rows of k that a suffix may see, its prefix's
        first; bias (suffixes, rows, length): 0 where a key is visible and -inf where not."""
        own = torch.tensor(self.lengths[self.whole :], device=self.device)
        ahead = torch.tensor(self.before[self.whole :], device=self.device)[:, None]  # (suffixes, 1)
        rows = int(own.max()) + int(-own.max() % NARROW)
        length = self.capacity or int((own + ahead[:, 0]).max())
        position = torch.arange(length, device=self.device)  # (length,)
        parents = torch.tensor(self.prefixes, device=self.device)
        keys = torch.where(
            position < ahead, self.starts[parents, None] + position, self.starts[self.whole :, None] + position - ahead
        )
        keys = keys.clamp_max(len(self.sequence) - 1)  # beyond its own tokens a suffix sees nothing; any row will do
        future = position > ahead[:, :, None] + torch.arange(rows, device=self.device)[:, None]  # (suffixes, rows, length)
        bias = torch.zeros(future.shape, dtype=self.dtype, device=self.device).masked_fill_(future, -torch.inf)
        index = (self.sequence[self.split :] - self.whole) * rows + self.place[self.split :]
        return index, keys, bias

    @cached_property
    def most_keys(self) -> int:
        """That any query sees."""
        return max(n + b for n, b in zip(self.lengths, self.before, strict=True))

    @cached_property
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """start, length and prefix (-1: none) of each sequence and suffix, (sequences,) int64 each."""
        parents = [-1] * self.whole + list(self.prefixes)
        return self.starts, torch.tensor(self.lengths), torch.tensor(parents)

    @cached_property
    def families(self) -> tuple[Tensor, Tensor]:
        """Sequences and suffixes ordered by the sequence that they are or continue, (sequences,) int64, and where each such
        family begins among them, with the end, (families + 1,) int64."""
        heads = torch.tensor([*range(self.whole), *self.prefixes])
        members = heads.argsort(stable=True)
        return members, F.pad(heads.bincount(minlength=self.whole).cumsum(0), (1, 0))

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """keys (T'',): the rows of k that each sequence or suffix sees, one after another; ends of queries and of keys
        (sequences + 1,) int32; the longest of each."""
        starts, rows = self.starts.tolist(), []
        for i, n in enumerate(self.lengths):
            if i >= self.whole:
                parent = self.prefixes[i - self.whole]
                rows.append(torch.arange(starts[parent], starts[parent] + self.lengths[parent]))
            rows.append(torch.arange(starts[i], starts[i] + n))
        seen = [n + b for n, b in zip(self.lengths, self.before, strict=True)]
        ends = [F.pad(torch.tensor(x).cumsum(0), (1, 0)).to(self.device, torch.int32) for x in (self.lengths, seen)]
        return torch.cat(rows).to(self.device), ends[0], ends[1], max(self.lengths), max(seen)
