"""The decode step: from each slot's newest token to its next one, with all bookkeeping on the device.

One step is embedding, every layer, head, sampling, end of sequence and position, for the first `bucket` slots, in place on
fixed buffers. On a GPU it is one CUDA graph for each bucket, captured largest first into one memory pool before anything runs;
on a CPU the same function is called. A slot out of use runs along and writes where nobody reads.

All graphs of a model share one pool, whichever `Slots` they are of: they replay one after another on one stream, and what has
to outlive a step is in buffers outside the pool.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import dispatch
from tinylora.kernels.correction import Correction
from tinylora.kernels.products import CHAIN, NARROW, onednn_linear
from tinylora.kernels.sampling import sample
from tinylora.model.cache import KVCache
from tinylora.model.decoder import Decoder, Matrices

WIDE = 4096  # tokens of a large vocabulary
GPU_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)  # a graph each: capturing one of a 7B model takes 40 ms of the host


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `seed` and a sequence's number fix its uniforms."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    eos_ids: tuple[int, ...] = ()


def buckets(slots: int, device_type: str) -> list[int]:
    """Slot counts that a step may run for, ascending. A function of these two alone."""
    sizes = GPU_BUCKETS if device_type == "cuda" else range(NARROW, slots, NARROW)
    return [n for n in sizes if n < slots] + [slots]


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """For every warm-up and capture: cuBLAS keeps 32 MB for each stream it has worked on."""
    return torch.cuda.Stream(device)


class Slots:
    """Buffers of all slots, and the step on them."""

    def __init__(
        self,
        model: Decoder,
        sampling: Sampling,
        slots: int,  # a multiple of NARROW on a CPU
        cache: KVCache,
        adapters: int,  # 0: the base model
    ) -> None:
        device, length = model.device, sampling.max_completion_length
        self.model, self.sampling, self.slots, self.cache = model, sampling, slots, cache
        self.eos = torch.tensor(sampling.eos_ids, device=device, dtype=torch.long)

        def integers() -> Tensor:
            return torch.zeros(slots, dtype=torch.long, device=device)

        self.token, self.position, self.adapter = integers(), integers(), integers()
        self.live = torch.zeros(slots, dtype=torch.bool, device=device)
        # A completion has a row of the outputs; `cell` is where in them a slot writes next, `end` one beyond its row's last.
        # The last row is for slots out of use.
        self.rubbish = slots * length
        self.cell, self.end = integers().fill_(self.rubbish), integers().fill_(self.rubbish)
        self.uniform = torch.zeros(self.rubbish + 1, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(self.rubbish + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(self.rubbish + 1, device=device)
        self.adapters = adapters
        self._matrices: list[Tensor | None] | None = None
        self._corrections: dict[int, Sequence[Correction | None]] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None  # of the graphs' memory

    # ---- adapters -------------------------------------------------------------------------------------------------------

    def set_matrices(self, matrices: Matrices | None) -> None:
        """The adapters of the steps to come; from the second call on copied into the first one's buffers, which graphs read."""
        if self._matrices is not None and matrices is not None:
            for kept, new in zip(self._matrices, matrices, strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)
            for correction in itertools.chain.from_iterable(self._corrections.values()):
                if correction is not None:
                    correction.refresh()
            return
        # Contiguous, as kernels read them (`correction.arguments`): several adapters' come as slices of one tensor.
        plain = torch.contiguous_format
        held = [None if m is None else m.detach().clone(memory_format=plain) for m in matrices or []]
        self._matrices = None if matrices is None else held
        self._corrections = {}

    def corrections(self, bucket: int) -> Sequence[Correction | None]:
        if bucket not in self._corrections:
            rows = self.adapter[:bucket] if self.adapters > 1 else None
            self._corrections[bucket] = self.model.corrections(self._matrices, rows)
        return self._corrections[bucket]

    # ---- the step -------------------------------------------------------------------------------------------------------

    def step(self, bucket: int, longest: int) -> None:
        """One token more for each of the first `bucket` slots. longest: more than every position, where there is no table."""
        if bucket in self._graphs:
            self._graphs[bucket].replay()
        else:
            self._step(bucket, longest)

    def _step(self, bucket: int, longest: int) -> None:
        s, first = self.sampling, slice(bucket)
        cell, live = self.cell[first], self.live[first]
        token, position = self.token[first], self.position[first]  # (bucket,) each, views
        hidden = self.model.decode(token, position, self.cache, longest, self.corrections(bucket))
        new, logp = sample(head(hidden, self.model), s.temperature, s.top_p, s.top_k, self.uniform.index_select(0, cell))
        self.tokens.index_copy_(0, cell, new)
        self.logprobs.index_copy_(0, cell, logp.float())
        token.copy_(new)
        position.add_(live)
        cell.add_(live)
        live.logical_and_(cell != self.end[first])
        for eos in self.eos:
            live.logical_and_(new != eos)
        cell.masked_fill_(~live, self.rubbish)

    def capture(self, sizes: Sequence[int], pool: Any) -> None:
        """CUDA graphs of the step, while every slot is out of use; every kernel must have been proven before.

        `pool` is that of other `Slots` of the model, whose graphs still exist; None: a new one.
        """
        dispatch.prove(self.model.device)
        stream, self.pool = side_stream(self.model.device), pool or torch.cuda.graph_pool_handle()
        for bucket in sorted(sizes, reverse=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, and lets libraries allocate
                    self._step(bucket, 0)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=stream):
                self._step(bucket, 0)
            self._graphs[bucket] = graph

    # ---- what the host does between steps -------------------------------------------------------------------------------

    def fill(
        self,
        slots: Sequence[int],
        rows: Sequence[int],  # of the outputs, one a slot
        tokens: Sequence[int],  # the last of each prompt
        positions: Sequence[int],  # its position
        adapters: Sequence[int],
        limits: Sequence[int],  # tokens each may get, at most max_completion_length
        uniforms: Tensor,  # (len(slots), max_completion_length)
    ) -> None:
        """Put sequences into slots."""
        length, device = self.sampling.max_completion_length, self.token.device
        columns = torch.tensor([slots, tokens, positions, adapters, rows, limits], device=device)  # (6, n)
        index, start = columns[0], columns[4] * length
        self.token[index], self.position[index], self.adapter[index] = columns[1], columns[2], columns[3]
        self.cell[index], self.end[index], self.live[index] = start, start + columns[5], True
        self.uniform[:-1].view(-1, length)[columns[4]] = uniforms

    def clear(self, slots: Sequence[int]) -> None:
        """Take slots out of use: a slot that has lost its pages must not run on."""
        index = torch.tensor(slots, device=self.token.device)
        self.live[index], self.cell[index], self.position[index] = False, self.rubbish, 0

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Slots' sequences into other slots, (from, to) each; what they leave is out of use."""
        source, target = torch.tensor(moves, device=self.token.device).unbind(1)
        for state in (self.token, self.position, self.adapter, self.live, self.cell, self.end):
            state[target] = state[source]
        self.clear([a for a, _ in moves])

    def finished(self, rows: Sequence[int], counts: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probs of rows of the outputs, `counts` of each at most, cut after the end token."""
        length, most = self.sampling.max_completion_length, max(counts)
        index = torch.tensor(rows, device=self.token.device)
        tokens, logprobs = (x[:-1].view(-1, length)[index, :most].tolist() for x in (self.tokens, self.logprobs))
        stop, out = set(self.sampling.eos_ids), []
        for t, p, n in zip(tokens, logprobs, counts, strict=True):
            n = next((i + 1 for i in range(n) if t[i] in stop), n)
            out.append((t[:n], p[:n]))
        return out


@dataclass
class Kept:
    """What a rollout leaves for the next."""

    room: Tensor | None = None  # (elements,): of the cache, whose contents nobody needs any more
    slots: dict[Any, Slots] = field(default_factory=dict)  # over that room, by what they are for, the last used last


def head(hidden: Tensor, model: Decoder) -> Tensor:
    """Logits (T, vocab) of hidden states (T, hidden); in float32 on a GPU, as the update's log-probs are.

    A large vocabulary takes oneDNN's product on a CPU, where its sums are short enough: 97 ms where MKL takes 210 to 330, for
    32 rows of 896 and 151,936 tokens.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, model.head.T, out_dtype=torch.float32)
    wide = len(model.head) >= WIDE and model.head.shape[1] <= CHAIN and model.capacity is None
    return onednn_linear(hidden, model.head) if wide else F.linear(hidden, model.head)
