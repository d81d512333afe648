"""Rollout: completions of prompts under the adapted model, with continuous refill, and with the update's own operations.

The scheduler says which sequence is in which slot; the slots decode; between bursts of steps the host looks who has ended.
Nothing is merged or copied: the adapter is a handful of numbers per row. Which rows share a batch does not enter what they
sample: slots, pages, order of admission and prompt sharing are matters of speed alone. On a CPU that holds to the bit; on a GPU
cuBLAS takes other kernels at other row counts, so a row's bits, and tokens that all but tie, change with the bucket.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.engine import memory
from tinylora.engine.memory import MOST_SLOTS
from tinylora.engine.scheduler import Running, Scheduler
from tinylora.engine.slots import Kept, Sampling, Slots, buckets
from tinylora.errors import InputError
from tinylora.kernels.products import NARROW, fp32_sums
from tinylora.kernels.sampling import uniforms
from tinylora.model.cache import KVCache
from tinylora.model.decoder import Decoder, Matrices

MOST_KEPT = 8  # slots with their graphs: training's and, sampled and greedy, those of evaluations at two lengths are five
PAGE = 64  # positions in a page on a GPU
BURST = {"cpu": 1, "cuda": 8}  # steps between two looks of the host
PREFILL_TOKENS = 8192  # prompt tokens in one forward

__all__ = ["Completion", "Sampling", "rollout"]


@dataclass
class Completion:
    tokens: list[int]  # with the end token, where it came to one
    logprobs: list[float]  # of each token, as sampled
    finished: bool  # False: cut off at max_completion_length


@dataclass
class Usage:
    """What a rollout did: for benchmarks and the progress line."""

    steps: int = 0
    rows: int = 0  # slots that the steps ran for
    tokens: int = 0  # that they decoded
    prefilled: int = 0  # prompt tokens
    restarted: int = 0  # sequences that gave their pages back and started over


@torch.inference_mode()
@fp32_sums()
def rollout(
    model: Decoder,
    matrices: Matrices | None,
    prompts: Sequence[Sequence[int]],
    generations: int,
    sampling: Sampling,
    first_sequence: int = 0,
    row_adapter: Sequence[int] | None = None,  # adapter of each prompt, where matrices hold several
    *,
    slots: int | None = None,  # sequences that decode at once; None: as many as pay and fit
    cache_bytes: int | None = None,  # for keys and values; None: `memory.cache_bytes`
    page_size: int | None = None,  # positions in a page; None: PAGE on a GPU, on a CPU one page a slot
    expected: Sequence[float] | None = None,  # completion length of each prompt, longest first; None: longest prompt first
    names: Sequence[tuple[int, int]] | None = None,  # seed and number of each sequence; None: the sampling's, and as below
    limits: Sequence[int] | None = None,  # tokens each sequence may get at most, where that is less than the sampling's
    watch: Callable[[int, list[int]], None] | None = None,  # called with (sequence of the call, all its tokens) as they come
    on_completion: Callable[[int, Completion], None] | None = None,  # called with each as it ends, while others still run
    usage: Usage | None = None,  # counted into
) -> list[Completion]:
    """`generations` completions of each prompt, prompt after prompt. Sequence i of the call is number first_sequence + i.

    InputError where a prompt is empty, or the cache too small for one sequence.
    """
    if not all(prompts):
        raise InputError(f"prompt {[bool(p) for p in prompts].index(False)} is empty; a prompt needs at least one token")
    run = _Rollout(model, matrices, prompts, generations, sampling, first_sequence, row_adapter)
    run.limits = limits
    run.names = names
    run.allocate(slots, cache_bytes, page_size, expected)
    try:
        completions = run.go(watch, on_completion, usage or Usage())
        run.keep_slots()  # not where anything was raised: their sequences would still be live
    finally:
        model.kept = run.kept
    return completions


def keeps_slots(model: Decoder) -> bool:
    """Whether slots are worth keeping for the next call: for their CUDA graphs."""
    return model.device.type == "cuda"


class _Rollout:
    """One call's host side."""

    def __init__(
        self,
        model: Decoder,
        matrices: Matrices | None,
        prompts: Sequence[Sequence[int]],
        generations: int,
        sampling: Sampling,
        first_sequence: int,
        row_adapter: Sequence[int] | None,
    ) -> None:
        # The base as v = 0 runs the adapter's graphs: on a GPU adapter off to the bit, as it is the same op with z = 0.
        matrices = model.zero_matrices() if matrices is None and keeps_slots(model) else matrices
        self.model, self.matrices, self.sampling = model, matrices, sampling
        self.prompts, self.generations, self.first_sequence = prompts, generations, first_sequence
        self.row_adapter = row_adapter or [0] * len(prompts)
        used = [m for m in matrices or [] if m is not None]
        self.adapters = len(used[0]) if used else 0
        # Prefilled prompts of which samples wait: keys and values of the tokens that fill no page, (layers, n, Hkv, D) each
        self.prompt_rows: dict[int, tuple[Tensor, Tensor]] = {}
        self.limits: Sequence[int] | None = None
        self.names: Sequence[tuple[int, int]] | None = None
        self.row_of: dict[int, int] = {}  # a running sequence's row of the outputs
        self.table_rows: list[list[int]] | None = None  # the pages of each slot, as the table has them; None: of a call before

    def allocate(
        self, slots: int | None, cache_bytes: int | None, page_size: int | None, expected: Sequence[float] | None
    ) -> None:
        """Scheduler, cache and slots. Without pages a slot's cells are as long as any sequence, and only what is written
        takes memory."""
        model, kind = self.model, self.model.device.type
        if kind == "cpu":
            memory.keep_memory()
        length, longest = self.sampling.max_completion_length, max(map(len, self.prompts)) - 1
        capacity = longest + length + -(longest + length) % NARROW
        if model.capacity is not None:
            if capacity > model.capacity:
                raise InputError(f"--exact was prepared for {model.capacity} tokens a sequence, and one may have {capacity}")
            capacity = model.capacity
        count = min(slots or MOST_SLOTS[kind], len(self.prompts) * self.generations)
        paged = kind != "cpu" or page_size is not None
        size = (page_size or PAGE) if paged else capacity
        page_bytes = size * model.config.cache_bytes(model.embedding.element_size())
        least = page_bytes * (1 + -(-(longest + length) // size))
        pages = (cache_bytes or memory.cache_bytes(model, least)) // page_bytes
        if keeps_slots(model):  # shapes that stay from call to call, so that graphs do; whatever the cache's room allows
            count, capacity = min(slots or MOST_SLOTS[kind], max(16, count)), capacity + -capacity % (8 * size)
            pages -= cache_bytes is None  # a room has a page for slots out of use beside those that were asked for
        elif paged:  # no more than the sequences can fill
            pages = min(pages, count * -(-(longest + length) // size) + len(self.prompts) * (longest // size))
        else:
            pages = count = min(count, pages)
        lengths = [len(p) for p in self.prompts]
        self.scheduler = Scheduler(lengths, self.generations, length, count, pages, size, expected)
        rows = count + (-count % NARROW if kind == "cpu" else 0)
        self.buckets, self.free_rows = buckets(rows, kind), list(range(rows - 1, -1, -1))
        self.kept, model.kept = model.kept or Kept(), None
        self.slots = self._slots(pages if paged else rows, size, rows, capacity if paged else 0)
        self.cache = self.slots.cache

    def _slots(self, pages: int, size: int, rows: int, longest: int) -> Slots:
        """Slots over a cache of so many pages or more, with a table where `longest` is not 0. On a GPU those of an earlier call
        where they are alike; all that are kept share one room, and see as many pages as it holds."""
        model, config, kept, graphs = self.model, self.model.config, self.kept, keeps_slots(self.model)
        sampling = dataclasses.replace(self.sampling, seed=0, eos_ids=tuple(self.sampling.eos_ids))
        self.key = (size, rows, longest, self.adapters, sampling)
        if graphs:
            held = 0 if kept.room is None else len(kept.room) // (size * config.cache_bytes(1)) - 1
            if held < pages:  # the old room goes before the new one comes, and the graphs that read it
                kept.room = None
                kept.slots.clear()
            pages = max(pages, held)
        if self.key in kept.slots:
            slots = kept.slots.pop(self.key)
            slots.set_matrices(self.matrices)
            return slots
        while len(kept.slots) >= MOST_KEPT:
            del kept.slots[next(iter(kept.slots))]
        cache = KVCache(config, pages, size, model.embedding, rows if longest else 0, longest, kept.room)
        kept.room = cache.room
        slots = Slots(model, self.sampling, rows, cache, self.adapters)
        slots.set_matrices(self.matrices)
        if graphs:
            slots.capture(self.buckets, next((s.pool for s in kept.slots.values()), None))
        return slots

    def keep_slots(self) -> None:
        """For the next call that is like this one."""
        if keeps_slots(self.model):
            self.kept.slots[self.key] = self.slots

    def go(
        self,
        watch: Callable[[int, list[int]], None] | None,
        on_completion: Callable[[int, Completion], None] | None,
        usage: Usage,
    ) -> list[Completion]:
        """Run everything. The completions in the order of the prompts."""
        s, burst = self.scheduler, BURST[self.model.device.type]
        results: dict[int, Completion] = {}
        bucket = longest = 0
        changed = True  # whether other sequences run than in the last burst
        while s.waiting or s.in_use:
            slots, groups = s.admit()
            if slots:
                usage.prefilled += self._prefill(groups, slots)
                self._fill(slots)
                bucket = max(bucket, self._bucket(slots[-1] + 1))
            evicted = s.grow(burst)
            if evicted:
                usage.restarted += len(evicted)
                self._release(evicted)
            if not s.waiting:
                bucket = self._compact(bucket, s.in_use)
            if changed or slots or evicted:
                longest = s.longest
            if self.cache.paged:
                self._write_table()
            for _ in range(burst):
                self.slots.step(bucket, longest)
                longest += 1
            s.advance(burst)
            usage.steps, usage.rows = usage.steps + burst, usage.rows + burst * bucket
            changed = self._look(bucket, results, watch, on_completion)
        usage.tokens += sum(len(c.tokens) for c in results.values())
        return [results[i] for i in range(len(self.prompts) * self.generations)]

    def _bucket(self, slots: int) -> int:
        return next(b for b in self.buckets if b >= slots)

    def _compact(self, bucket: int, active: int) -> int:
        """With nothing left to admit: the smaller bucket that is worth moving to, its slots filled from beyond."""
        smaller = self._bucket(max(active, 1))
        if smaller > (bucket - 1 if self.cache.paged else 0.75 * bucket):  # without pages, keys and values have to be moved too
            return bucket
        moves = self.scheduler.compact(smaller)
        if moves:
            if not self.cache.paged:
                self.cache.move(moves, self.scheduler.longest)
            self.slots.move(moves)
        return smaller

    # ---- admission ------------------------------------------------------------------------------------------------------

    def _prefill(self, groups: Sequence[int], slots: Sequence[int]) -> int:
        """Keys and values of the prompts of groups but for their last tokens, into the pages that the sequences just admitted
        to `slots` share; how many tokens they were."""
        pages = {r.group: r.shared for slot in slots if (r := self.scheduler.running[slot]) is not None}
        groups = [g for g in groups if len(self.prompts[g]) > 1]
        start, count = 0, 0
        while start < len(groups):
            stop, tokens = start, 0
            while stop < len(groups) and (stop == start or tokens + len(self.prompts[groups[stop]]) <= PREFILL_TOKENS):
                tokens += len(self.prompts[groups[stop]]) - 1
                stop += 1
            self._prefill_pack({g: pages[g] for g in groups[start:stop]})
            start, count = stop, count + tokens
        return count

    def _prefill_pack(self, groups: dict[int, list[int]]) -> None:
        device = self.model.device
        parts = [self.prompts[g][:-1] for g in groups]
        lengths = [len(p) for p in parts]
        adapter = None
        if self.adapters > 1:
            own = torch.tensor([self.row_adapter[g] for g in groups], device=device)
            adapter = own.repeat_interleave(torch.tensor(lengths, device=device))
        c, tokens = self.model.config, torch.tensor([t for p in parts for t in p], device=device)  # (T,)
        keys, values = self.model.embedding.new_empty(2, c.num_layers, len(tokens), c.num_kv_heads, c.head_dim)
        self.model.packed(tokens, lengths, self.matrices, adapter, kept=(keys, values))
        for (g, pages), k, v in zip(groups.items(), keys.split(lengths, 1), values.split(lengths, 1), strict=True):
            full = len(pages) * self.cache.page_size
            if pages:
                self.cache.write_prompt(k[:, :full], v[:, :full], pages, [])
            self.prompt_rows[g] = (k[:, full:], v[:, full:])

    def _fill(self, slots: Sequence[int]) -> None:
        s = self.scheduler
        running = [s.running[slot] for slot in slots]
        by_group: dict[int, list[int]] = {}
        for slot, r in zip(slots, running, strict=True):
            assert r is not None
            by_group.setdefault(r.group, []).append(r.own[0] if self.cache.paged else slot)
        for g, pages in by_group.items():
            if g in self.prompt_rows:
                self.cache.write_prompt(*self.prompt_rows[g], [], pages)
        live = [r for r in running if r is not None]
        rows = [self.free_rows.pop() for _ in live]
        self.row_of.update((r.sequence, row) for r, row in zip(live, rows, strict=True))
        numbers = torch.tensor([self.first_sequence + r.sequence for r in live], device=self.model.device)
        seeds: int | Tensor = self.sampling.seed
        if self.names is not None:
            seeds, numbers = torch.tensor([self.names[r.sequence] for r in live], device=self.model.device).unbind(1)
        u = uniforms(seeds, numbers, self.sampling.max_completion_length)
        tokens = [self.prompts[r.group][-1] for r in live]
        adapters = [self.row_adapter[r.group] for r in live]
        most = self.sampling.max_completion_length
        limits = [most if self.limits is None else min(most, self.limits[r.sequence]) for r in live]
        self.slots.fill(slots, rows, tokens, [s.position(r) for r in live], adapters, limits, u)
        self.prompt_rows = {g: x for g, x in self.prompt_rows.items() if s.groups[g].pages is not None}

    def _write_table(self) -> None:
        rows = [[] if r is None else r.shared + r.own for r in self.scheduler.running]
        if rows != self.table_rows:
            self.cache.write_table(rows)
            self.table_rows = rows

    # ---- the end of sequences -------------------------------------------------------------------------------------------

    def _release(self, slots: Sequence[int]) -> None:
        """Slots whose sequences the scheduler has taken away."""
        self.slots.clear(slots)
        running = {r.sequence for r in self.scheduler.running if r is not None}
        gone = [q for q in self.row_of if q not in running]
        self.free_rows += [self.row_of.pop(q) for q in gone]

    def _look(
        self,
        bucket: int,
        results: dict[int, Completion],
        watch: Callable[[int, list[int]], None] | None,
        on_completion: Callable[[int, Completion], None] | None,
    ) -> bool:
        """Collect the sequences that have ended; whether there were any."""
        s = self.scheduler
        stopped = self.slots.live[:bucket].logical_not().nonzero().flatten().tolist()
        ended = [slot for slot in stopped if slot < len(s.running) and s.running[slot] is not None]
        if watch is not None:
            for r, (tokens, _) in self._read([slot for slot in s.active if slot not in set(ended)]):
                watch(r.sequence, tokens)
        stop = set(self.sampling.eos_ids)
        for r, (tokens, logprobs) in self._read(ended):
            results[r.sequence] = Completion(tokens, logprobs, tokens[-1] in stop)
            if watch is not None:
                watch(r.sequence, tokens)
            if on_completion is not None:
                on_completion(r.sequence, results[r.sequence])
        for slot in ended:
            s.end(slot)
        if ended:
            self._release(ended)
        return bool(ended)

    def _read(self, slots: Sequence[int]) -> list[tuple[Running, tuple[list[int], list[float]]]]:
        """The sequences in these slots, with their tokens and log-probs so far."""
        s, running = self.scheduler, [self.scheduler.running[slot] for slot in slots]
        live = [r for r in running if r is not None]
        if not live:
            return []
        counts = [s.position(r) - s.groups[r.group].prompt for r in live]
        return list(zip(live, self.slots.finished([self.row_of[r.sequence] for r in live], counts), strict=True))
