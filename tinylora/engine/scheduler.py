"""Which sequence decodes in which slot, and in which pages of the KV cache. Pure Python: no model and no device.

A group is a prompt and its samples. Its prompt is prefilled once; the pages it fills are shared by its samples, and what is
left of it, less than a page, is copied into each sample's own first page. Sequences are admitted in a fixed order, longest
expected first, as slots and pages become free; a slot that ends is refilled at once, across groups.

Pages are taken as sequences grow, not for the longest they might become. Where none is left the youngest sequence gives its
own back and starts over later: its tokens depend on seed, sequence and position alone, so they come out the same.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinylora.engine.pages import Pages
from tinylora.errors import InputError


@dataclass
class Group:
    """A prompt and how many of its samples wait."""

    prompt: int  # tokens of it that are prefilled: all but the last, which is the first that is decoded
    waiting: int
    pages: list[int] | None = None  # full pages of the prompt, shared; None: not in the cache


@dataclass
class Running:
    """A sequence in a slot."""

    sequence: int
    group: int
    age: int  # admissions before it
    base: int  # position of the token it decodes next, less the scheduler's clock
    last: int  # the last position it can come to
    shared: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)


class Scheduler:
    """Hands out slots and pages. The engine calls `admit`, then `grow` before every burst of steps, `end` after it."""

    def __init__(
        self,
        prompts: Sequence[int],  # tokens of each group's prompt, at least 1
        samples: int,  # of each prompt: sequences 0 .. samples-1 are the first group's
        longest: int,  # tokens that a sample may get
        slots: int,
        pages: int,
        page_size: int,
        expected: Sequence[float] | None = None,  # length of each group's samples, for the order; None: its prompt's
    ) -> None:
        self.samples, self.page_size, self.longest_sample = samples, page_size, longest
        self.pages = Pages(pages)
        self.groups = [Group(n - 1, samples) for n in prompts]
        self.most = max(self._pages_of(n - 1 + longest) for n in prompts)  # of a sequence; its last token is never decoded
        if self.most > pages:
            raise InputError(
                f"the KV cache has {pages} pages of {page_size} tokens, and one sequence may need {self.most}; "
                f"give it more memory, or shorten the prompts or --max-completion-length"
            )
        key = prompts if expected is None else expected
        order = sorted(range(len(prompts)), key=lambda g: (-key[g], g))
        self.waiting = deque(g * samples + i for g in order for i in range(samples))
        self.running: list[Running | None] = [None] * slots
        self.in_use = self.admissions = 0
        self.clock = 0  # steps so far; all running sequences advance together
        self.room = 0  # steps for which no sequence needs another page

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def active(self) -> list[int]:
        """Slots in use, ascending."""
        return [slot for slot, r in enumerate(self.running) if r is not None]

    def position(self, r: Running) -> int:
        """Of the token that the sequence decodes next; one beyond its last at the end."""
        return min(r.base + self.clock, r.last + 1)

    @property
    def longest(self) -> int:
        """One more than every position that is decoded next."""
        return 1 + max((self.position(r) for r in self.running if r is not None), default=-1)

    def admit(self) -> tuple[list[int], list[int]]:
        """Fill free slots: (slots newly in use, ascending; groups whose prompts must be prefilled for them).

        A sequence is admitted only where a page is left for every other, so that few have to start over.
        """
        slots: list[int] = []
        prefill: list[int] = []
        if not self.waiting or self.in_use == len(self.running):
            return slots, prefill
        free = deque(slot for slot, r in enumerate(self.running) if r is None)
        while free and self.waiting:
            sequence = self.waiting[0]
            number = sequence // self.samples
            group = self.groups[number]
            full = group.prompt // self.page_size
            need = 1 + (full if group.pages is None else 0)
            reserve = self.in_use if self.most > 1 else 0  # a page for each to grow into
            if need + reserve > len(self.pages.free):
                if self.in_use or not self._forget_prompts(number):
                    break
                continue
            self.waiting.popleft()
            if group.pages is None:
                group.pages = self.pages.take(full)  # held by the group for as long as a sample of it waits
                prefill.append(number)
            self.pages.hold(group.pages)
            slot = free.popleft()
            base, last = group.prompt - self.clock, group.prompt + self.longest_sample - 1
            shared, own = list(group.pages), self.pages.take(1)
            self.running[slot] = Running(sequence, number, self.admissions, base, last, shared, own)
            self.admissions, self.in_use = self.admissions + 1, self.in_use + 1
            slots.append(slot)
            group.waiting -= 1
            if not group.waiting:
                self.pages.drop(group.pages)
                group.pages = None
        if slots:
            self.room = 0
        return slots, prefill

    def _forget_prompts(self, but: int | None = None) -> bool:
        """Give back the prompts that groups hold for waiting samples, to be prefilled again; whether there were any."""
        held = [g for i, g in enumerate(self.groups) if g.pages and i != but]
        for group in held:
            self.pages.drop(group.pages or [])
            group.pages = None
        return bool(held)

    def grow(self, steps: int) -> list[int]:
        """Pages for the next `steps` positions of every slot, oldest first. Returns the slots that had to start over."""
        evicted: list[int] = []
        if steps <= self.room:
            return evicted
        for slot in sorted(self.active, key=lambda s: self._at(s).age):
            r = self.running[slot]
            if r is None:
                continue
            need = self._pages_of(min(self.position(r) + steps, r.last + 1)) - len(r.shared) - len(r.own)
            while need > len(self.pages.free):
                if self._forget_prompts():
                    continue
                youngest = max(self.active, key=lambda s: self._at(s).age)
                self._give_back(youngest)
                evicted.append(youngest)
                if youngest == slot:
                    break
            else:
                if need > 0:
                    r.own += self.pages.take(need)
        held = [r for r in self.running if r is not None]
        full = [(len(r.shared) + len(r.own)) * self.page_size for r in held]
        rooms = [n - self.position(r) for n, r in zip(full, held, strict=True) if n <= r.last]
        self.room = min(rooms, default=self.longest_sample)
        return evicted

    def advance(self, steps: int) -> None:
        """Every slot decoded this many tokens."""
        self.clock, self.room = self.clock + steps, self.room - steps

    def _at(self, slot: int) -> Running:
        r = self.running[slot]
        assert r is not None
        return r

    def _give_back(self, slot: int) -> None:
        r = self._at(slot)
        self.end(slot)
        self.waiting.appendleft(r.sequence)
        self.groups[r.group].waiting += 1

    def end(self, slot: int) -> None:
        """The slot's sequence is finished: its pages and the slot are free."""
        r = self._at(slot)
        self.pages.drop(r.own)
        self.pages.drop(r.shared)
        self.running[slot] = None
        self.in_use -= 1

    def compact(self, bucket: int) -> list[tuple[int, int]]:
        """Move sequences from slots beyond `bucket` into free ones below it: (from, to) pairs. There must be room."""
        free = (slot for slot in range(bucket) if self.running[slot] is None)
        moves = []
        for slot in self.active:
            if slot >= bucket:
                to = next(free)
                self.running[to], self.running[slot] = self.running[slot], None
                moves.append((slot, to))
        return moves
