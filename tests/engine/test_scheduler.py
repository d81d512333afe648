"""The scheduler on a model that is only a length per sequence: nothing leaks, nothing is given twice, everything finishes."""

import random

import pytest

from tinylora.engine.pages import Pages
from tinylora.engine.scheduler import Scheduler
from tinylora.errors import InputError


def play(s: Scheduler, lengths: list[int], burst: int, check: bool = True) -> tuple[list[int], int]:
    """Run a schedule whose sequence i ends after lengths[i] tokens. The order of the ends, and how many started over."""
    done: list[int] = []
    restarts, prefilled = 0, set()
    while s.waiting or s.in_use:
        slots, groups = s.admit()
        prefilled |= set(groups)
        for slot in slots:
            r = s.running[slot]
            assert r.group in prefilled, "a sequence runs on a prompt that nobody prefilled"
        prefilled = {g for g in prefilled if s.groups[g].pages is not None}
        restarts += len(s.grow(burst))
        assert s.in_use, "nothing runs and something waits"
        if check:
            own = [page for r in s.running if r for page in r.own]
            assert len(own) == len(set(own)), "two sequences write to one page"
            shared = {page for r in s.running if r for page in r.shared}
            assert not shared & set(own), "a sequence writes to a shared page"
            held = set(own) | shared | {page for g in s.groups for page in g.pages or []}
            assert held == set(s.pages.holders) and len(held) + len(s.pages.free) == s.pages.count
            for r in s.running:
                if r:
                    last = min(s.position(r) + burst - 1, r.last)
                    assert last < (len(r.shared) + len(r.own)) * s.page_size, "a token has no page to go to"
                    assert len(r.shared) == s.groups[r.group].prompt // s.page_size
        s.advance(burst)
        for slot in s.active:
            r = s.running[slot]
            if s.position(r) - s.groups[r.group].prompt >= lengths[r.sequence]:
                done.append(r.sequence)
                s.end(slot)
        if not s.waiting and s.in_use:
            s.compact(max(1, s.in_use))
            assert s.active == list(range(s.in_use)), "compaction left a hole"
    assert sorted(s.pages.free) == list(range(s.pages.count)), "pages leaked"
    return done, restarts


def random_case(rng: random.Random) -> tuple[Scheduler, list[int], int]:
    groups, samples, longest = rng.randint(1, 6), rng.randint(1, 4), rng.randint(1, 20)
    prompts = [rng.randint(1, 25) for _ in range(groups)]
    page = rng.choice([1, 2, 4, 7, 64])
    least = max(-(-(n - 1 + longest) // page) for n in prompts)
    pages = least + (0 if rng.random() < 0.3 else rng.randint(0, 40))
    expected = None if rng.random() < 0.5 else [rng.random() for _ in prompts]
    s = Scheduler(prompts, samples, longest, rng.randint(1, 9), pages, page, expected)
    return s, [rng.randint(1, longest) for _ in range(groups * samples)], rng.choice([1, 3, 8])


def test_ten_thousand_random_schedules_leak_nothing():
    rng = random.Random(0)
    restarts = 0
    for _ in range(10_000):
        s, lengths, burst = random_case(rng)
        done, again = play(s, lengths, burst)
        assert sorted(done) == list(range(len(lengths)))
        restarts += again
    assert restarts > 1000, "the cases should be tight enough for sequences to start over"


def test_the_longest_expected_goes_first_and_slots_are_refilled_at_once():
    s = Scheduler([5, 5, 5], 2, 10, 2, 100, 4, expected=[1.0, 9.0, 5.0])
    done, restarts = play(s, [3, 3, 10, 2, 4, 4], 1)
    assert restarts == 0
    # 2 and 3 start; 3 ends after 2 tokens and 4 takes its slot, and so on: no slot ever idles
    assert done == [3, 4, 2, 5, 0, 1]
    assert s.clock == 13


def test_a_prompts_pages_are_shared_and_prefilled_once():
    s = Scheduler([9], 3, 4, 3, 100, 4)
    slots, groups = s.admit()
    assert slots == [0, 1, 2] and groups == [0]
    assert {tuple(r.shared) for r in s.running} == {(0, 1)}  # 8 prefilled tokens in pages of 4
    assert s.pages.count - len(s.pages.free) == 2 + 3


def test_too_small_for_one_is_refused_and_too_small_for_all_only_waits():
    with pytest.raises(InputError, match="pages"):
        Scheduler([10, 30], 2, 10, 4, 9, 4)
    tight = Scheduler([10, 30], 2, 10, 4, 10, 4)
    roomy = Scheduler([10, 30], 2, 10, 4, 100, 4)
    lengths = [10, 3, 7, 10]
    assert sorted(play(tight, lengths, 1)[0]) == sorted(play(roomy, lengths, 1)[0])
    assert tight.clock > roomy.clock


def test_a_page_given_back_twice_is_an_error():
    pages = Pages(3)
    taken = pages.take(2)
    pages.hold(taken[:1])
    pages.drop(taken)
    assert len(pages.free) == 2
    pages.drop(taken[:1])
    with pytest.raises(RuntimeError, match="twice"):
        pages.drop(taken[:1])


def test_where_a_sequence_is_one_page_every_page_is_used():
    s = Scheduler([9, 5], 3, 7, 6, 6, 16)
    assert s.admit()[0] == [0, 1, 2, 3, 4, 5]
