"""Rollout: what is sampled depends on the sequence alone, and its log-probs are the update's."""

import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.memory import room_bytes
from tinylora.engine.rollout import Completion, Sampling, Usage, rollout
from tinylora.engine.slots import WIDE, Slots, buckets, head, side_stream
from tinylora.errors import InputError
from tinylora.kernels.accuracy import rms
from tinylora.kernels.launch import arguments
from tinylora.kernels.products import CHAIN
from tinylora.kernels.rope import rope
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.cache import KVCache
from tinylora.model.loader import load_model
from tinylora.rl.update import score

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16], [20, 21]]
SAMPLING = Sampling(30, temperature=1.0, seed=5, eos_ids=(7, 9))


def same(a: list[Completion], b: list[Completion]) -> None:
    assert [c.tokens for c in a] == [c.tokens for c in b]
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(torch.tensor(x.logprobs), torch.tensor(y.logprobs), rtol=0, atol=1e-5)


def test_completions_end_at_the_end_token_or_the_cap(adapted):
    model, _, matrices = adapted
    completions = rollout(model, matrices, PROMPTS, 8, SAMPLING)
    assert len(completions) == 40
    ended = [c for c in completions if c.finished]
    assert 5 < len(ended) < 40, "the case should show both kinds"
    for c in completions:
        assert len(c.tokens) == len(c.logprobs) <= 30
        assert not set(c.tokens[:-1]) & {7, 9}
        assert c.finished == (c.tokens[-1] in (7, 9)) and (c.finished or len(c.tokens) == 30)


def test_batch_mates_do_not_matter(adapted):
    """Each prompt alone, with its own sequence numbers, samples what it samples in the batch; so does any number of turns."""
    model, _, matrices = adapted
    whole = rollout(model, matrices, PROMPTS, 4, SAMPLING)
    alone = [c for i, p in enumerate(PROMPTS) for c in rollout(model, matrices, [p], 4, SAMPLING, first_sequence=4 * i)]
    same(whole, alone)


@pytest.mark.parametrize("page_size", [None, 4, 16])
@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_slots_pages_and_sharing_change_nothing(adapted, slots, page_size):
    """Any number of slots, either cache layout, any order of admission, prompts shared or not, on a roomy or a tight cache."""
    model, _, matrices = adapted
    whole = rollout(model, matrices, PROMPTS, 4, SAMPLING)
    usage = Usage()
    for options in (
        {},
        {"expected": [3.0, 1.0, 5.0, 2.0, 4.0]},
        {"cache_bytes": 48 * model.config.cache_bytes(4) + 1},
    ):
        same(whole, rollout(model, matrices, PROMPTS, 4, SAMPLING, slots=slots, page_size=page_size, usage=usage, **options))
    apart = [p for p in PROMPTS for _ in range(4)]  # each sample's prompt is prefilled for it alone
    same(whole, rollout(model, matrices, apart, 1, SAMPLING, slots=slots, page_size=page_size, usage=usage))
    assert usage.tokens == 4 * sum(len(c.tokens) for c in whole)
    if page_size == 4 and slots > 3:
        assert usage.restarted > 0, "the tight cache should have made sequences start over"


def test_a_cache_too_small_for_one_sequence_is_refused(adapted):
    model, _, matrices = adapted
    with pytest.raises(InputError, match="KV cache"):
        rollout(model, matrices, PROMPTS, 4, SAMPLING, cache_bytes=35 * model.config.cache_bytes(4), page_size=4)
    with pytest.raises(InputError, match="KV cache"):
        rollout(model, matrices, PROMPTS, 4, SAMPLING, cache_bytes=1)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        rollout(model, matrices, [[1], []], 4, SAMPLING)


def test_limits_cut_sequences_one_by_one(adapted):
    model, _, matrices = adapted
    whole, limits = rollout(model, matrices, PROMPTS, 4, SAMPLING), [1 + i % 7 for i in range(20)]
    short = rollout(model, matrices, PROMPTS, 4, SAMPLING, slots=3, limits=limits)
    assert [c.tokens for c in short] == [c.tokens[:n] for c, n in zip(whole, limits, strict=True)]


def test_a_prompt_is_prefilled_once_for_its_samples(adapted):
    model, _, matrices = adapted
    shared, apart = Usage(), Usage()
    rollout(model, matrices, PROMPTS, 4, SAMPLING, slots=3, usage=shared)
    rollout(model, matrices, [p for p in PROMPTS for _ in range(4)], 1, SAMPLING, slots=3, usage=apart)
    assert shared.prefilled == sum(len(p) - 1 for p in PROMPTS) == apart.prefilled // 4


def test_watch_sees_every_token_as_it_comes(adapted):
    model, _, matrices = adapted
    seen: dict[int, list[int]] = {}
    calls = []

    def watch(sequence: int, tokens: list[int]) -> None:
        assert tokens[: len(seen.get(sequence, []))] == seen.get(sequence, []), "a token changed after it was shown"
        seen[sequence] = tokens
        calls.append(sequence)

    whole = rollout(model, matrices, PROMPTS, 2, SAMPLING, slots=3, watch=watch)
    assert [seen[i] for i in range(10)] == [c.tokens for c in whole]
    assert len(calls) == sum(len(c.tokens) for c in whole)


def test_seed_and_sequence_number_change_the_sample(adapted):
    model, _, matrices = adapted
    tokens = [c.tokens for c in rollout(model, matrices, PROMPTS, 2, SAMPLING)]
    other_seed = Sampling(30, seed=6, eos_ids=(7, 9))
    assert tokens != [c.tokens for c in rollout(model, matrices, PROMPTS, 2, other_seed)]
    assert tokens != [c.tokens for c in rollout(model, matrices, PROMPTS, 2, SAMPLING, first_sequence=100)]
    assert tokens[0] != tokens[1], "two samples of a prompt differ"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_updates(adapted, temperature):
    """Scored by the packed forward, every sampled token has the log-prob the rollout gave it, to 1e-5."""
    model, _, matrices = adapted
    s = Sampling(20, temperature=temperature, seed=1)
    for prompt, c in zip(PROMPTS, rollout(model, matrices, PROMPTS, 1, s), strict=True):
        sequence = torch.tensor(prompt + c.tokens)
        hidden = model.packed(sequence[:-1], [len(sequence) - 1], matrices)[len(prompt) - 1 :]
        logp, _ = token_logprobs(hidden, model.head, torch.tensor(c.tokens), temperature)
        torch.testing.assert_close(torch.tensor(c.logprobs), logp, rtol=0, atol=1e-5)


def test_one_adapter_per_prompt(adapted):
    """Three adapters in one batch: each prompt's completions are those of its adapter alone."""
    model, adapter, _ = adapted
    vs = 0.3 * torch.randn(3, *adapter.v.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        stacked = adapter.matrices(vs)
        owner = [2, 0, 1, 2, 0]
        mixed = rollout(model, stacked, PROMPTS, 4, SAMPLING, row_adapter=owner)
        for i, (prompt, a) in enumerate(zip(PROMPTS, owner, strict=True)):
            alone = rollout(model, adapter.matrices(vs[a]), [prompt], 4, SAMPLING, first_sequence=4 * i)
            same(mixed[4 * i : 4 * i + 4], alone)


@pytest.mark.parametrize("slots", [None, 3])
def test_completions_are_handed_over_as_they_end(adapted, slots):
    """Each once, as it is returned in the end; all at once, and with refill."""
    model, _, matrices = adapted
    given: list[tuple[int, Completion]] = []
    completions = rollout(model, matrices, PROMPTS, 8, SAMPLING, slots=slots, on_completion=lambda i, c: given.append((i, c)))
    same(completions, rollout(model, matrices, PROMPTS, 8, SAMPLING))
    assert sorted(i for i, _ in given) == list(range(40))
    assert all(c == completions[i] for i, c in given)
    lengths = [len(c.tokens) for _, c in given]
    assert slots or lengths == sorted(lengths), "the shortest come first"


def test_a_large_vocabulary(tiny_model):
    """Whose logits another library computes: the same tokens for any number of slots, and the update's log-probs."""
    model = load_model(str(tiny_model("qwen2", vocab_size=WIDE + 5)))
    adapter = Adapter(model, TinyLoRAConfig(u=3, n_tie=4))
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    exact = hidden.double() @ model.head.double().T
    ours, plain = (rms(logits.double() - exact) for logits in (head(hidden, model), F.linear(hidden, model.head)))
    assert ours <= 2 * plain
    for rows in (8, 16, 24):
        assert torch.equal(head(hidden[:rows], model), head(hidden, model)[:rows])
    sampling = Sampling(12, seed=3)
    whole = rollout(model, adapter.matrices(), PROMPTS, 4, sampling)
    for slots in (1, 8):
        same(rollout(model, adapter.matrices(), PROMPTS, 4, sampling, slots=slots), whole)
    with torch.no_grad():
        logp, _ = score(adapter, adapter.matrices(), [p for p in PROMPTS for _ in range(4)], whole, range(len(whole)), 1.0)
    torch.testing.assert_close(logp, torch.tensor([x for c in whole for x in c.logprobs]), rtol=0, atol=1e-5)


def test_a_wide_hidden_state_is_not_onednns(monkeypatch):
    """Where a logit sums so many numbers that oneDNN's error may pass twice MKL's, the head is `F.linear`."""
    calls = []
    monkeypatch.setattr("tinylora.engine.slots.onednn_linear", lambda x, w: calls.append(len(w)) or F.linear(x, w))
    for width, called in ((CHAIN, [WIDE]), (CHAIN + 1, [])):
        hidden, weight = torch.zeros(8, width), torch.zeros(WIDE, width)
        assert head(hidden, SimpleNamespace(head=weight, capacity=None)).shape == (8, WIDE)
        assert calls == called
        calls.clear()


def test_the_caches_room_stays_for_the_next_rollout(adapted):
    """A second call writes over the first one's cache, a smaller one into a part of it, and both sample what they would."""
    model, _, matrices = adapted
    first = rollout(model, matrices, PROMPTS, 4, SAMPLING)
    room = model.kept.room.data_ptr()
    same(first, rollout(model, matrices, PROMPTS, 4, SAMPLING))
    same(first[:4], rollout(model, matrices, PROMPTS[:1], 4, SAMPLING))
    assert model.kept.room.data_ptr() == room
    rollout(model, matrices, PROMPTS, 8, SAMPLING)
    assert model.kept.room.data_ptr() != room, "a larger one needs more"


# ---- what is kept for the next rollout on a GPU, shown on a CPU ---------------------------------------------------------

PLAIN = pytest.mark.parametrize("adapted", [("native", 32)], indirect=True)


@contextmanager
def keeping() -> Iterator[list[Slots]]:
    """Slots are kept as on a GPU. A capture is noted and captures nothing: each step then runs as on a CPU."""
    captured: list[Slots] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinylora.engine.rollout.keeps_slots", lambda model: True)
        patch.setattr(Slots, "capture", lambda self, sizes, pool: captured.append(self))
        yield captured


def room(model, tokens: int) -> dict[str, int]:
    """Options of a rollout in pages of 4."""
    return {"page_size": 4, "cache_bytes": tokens * model.config.cache_bytes(4)}


@PLAIN
def test_evaluations_between_steps_capture_nothing(adapted):
    """A training step, two evaluations of base and adapter, sampled and greedy, and so on: three captures, all in the first
    round. The second has another v, and samples what that samples."""
    model, _, matrices = adapted
    warm = replace(SAMPLING, max_completion_length=20, seed=8)
    greedy = replace(warm, temperature=0.0)
    rounds = [
        [(m, SAMPLING), *[(each, s) for each in (None, m) for s in (warm, greedy)] * 2]
        for m in (matrices, [-2 * m for m in matrices])
    ]
    wanted = [[rollout(model, m, PROMPTS, 4, s) for m, s in calls] for calls in rounds]
    with keeping() as captured:
        for calls, completions in zip(rounds, wanted, strict=True):
            for (m, s), each in zip(calls, completions, strict=True):
                same(rollout(model, m, PROMPTS, 4, s, **room(model, 400)), each)
            assert len(captured) == 3
    assert wanted[0][0] != wanted[1][0] and wanted[0][1] != wanted[0][3], "another v should show"
    assert list(model.kept.slots.values()) == captured
    assert {s.cache.room.data_ptr() for s in captured} == {model.kept.room.data_ptr()}


@PLAIN
def test_kept_slots_are_dropped(adapted, monkeypatch):
    """The oldest where there are too many; all of them where their room grows, or other factors come."""
    model, adapter, matrices = adapted
    monkeypatch.setattr("tinylora.engine.rollout.MOST_KEPT", 2)

    monkeypatch.setattr("tinylora.engine.memory.cache_bytes", lambda model, least: room_bytes(model))  # as on a GPU

    def run(length: int, tokens: int = 400) -> None:
        options = {"page_size": 4} if tokens == 0 else room(model, tokens)
        rollout(model, matrices, PROMPTS, 4, replace(SAMPLING, max_completion_length=length), **options)
        assert all(2 * s.cache.keys.numel() == len(model.kept.room) for s in model.kept.slots.values()), (
            "all see the whole room"
        )

    def lengths() -> list[int]:
        return [s.sampling.max_completion_length for s in model.kept.slots.values()]

    with keeping() as captured:
        for length in (10, 11, 10, 12):
            run(length)
        assert lengths() == [10, 12] and len(captured) == 3, "11 was used before 10 was again"
        run(10, 300)
        run(10, 0)
        assert lengths() == [12, 10] and len(captured) == 3, (
            "a call that asks for less, or for nothing, takes the room as it is"
        )
        run(13, 300)
        assert lengths() == [10, 13] and len(captured) == 4
        run(10, 800)
        assert lengths() == [10] and len(captured) == 5
        model.pack_factors(adapter.parts.factors)
        assert lengths() == []


@PLAIN
@pytest.mark.parametrize("place", ["on_completion", "step"])
def test_a_rollout_that_raises_leaves_nothing_running(adapted, place, monkeypatch):
    """The next call of the same kind, which would take its slots, samples what it would have sampled; slots of others stay.

    The first eight sequences get one token and end together, so that the next eight have the outputs' rows in another order: if
    their slots ran on, they would write over the four sequences of the next call.
    """
    model, _, matrices = adapted
    options = {"slots": 8, **room(model, 400)}
    other, endless, step = replace(SAMPLING, temperature=0.0), replace(SAMPLING, eos_ids=()), Slots.step
    wanted = rollout(model, matrices, PROMPTS[:1], 4, endless)
    steps = []

    def stop(*arguments) -> None:
        steps.append(1)
        if place == "on_completion" and len(steps) == 8 or place == "step" and len(steps) == 2:
            raise KeyboardInterrupt
        if place == "step":
            step(*arguments)

    with keeping() as captured:
        for s in (other, endless):
            rollout(model, matrices, PROMPTS, 4, s, **options)
        held = model.kept.room.data_ptr()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if place == "step":
                patch.setattr(Slots, "step", stop)
            watch = stop if place == "on_completion" else None
            rollout(model, matrices, PROMPTS, 4, endless, limits=[1] * 20, on_completion=watch, **options)
        same(rollout(model, matrices, PROMPTS[:1], 4, endless, **options), wanted)
        rollout(model, matrices, PROMPTS, 4, other, **options)
    assert model.kept.room.data_ptr() == held and len(captured) == 3
    assert list(model.kept.slots.values()) == [captured[2], captured[0]]


def test_captures_share_a_pool_and_a_stream(adapted, monkeypatch):
    """Each bucket is warmed up and captured on one stream, into the pool that the slots before it made."""
    model, _, matrices = adapted
    streams, pools, used = [], [], []

    class Stream:
        def __init__(self, device=None) -> None:
            streams.append(self)

        def wait_stream(self, other) -> None: ...

    def graph(graph, pool, stream):
        used.append((pool, stream))
        return nullcontext()

    current = Stream()
    for name, fake in {
        "Stream": Stream,
        "current_stream": lambda: current,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": graph,
        "graph_pool_handle": lambda: pools.append(object()) or pools[-1],
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    side_stream.cache_clear()
    pool = None
    with torch.inference_mode():
        for _ in range(2):
            slots = Slots(model, SAMPLING, 24, KVCache(model.config, 24, 40, model.embedding), 1)
            slots.set_matrices(matrices)
            slots.capture([8, 16, 24], pool)
            pool = slots.pool
    side_stream.cache_clear()
    assert len(streams) == 2 and used == [(pools[0], streams[1])] * 6


def test_buckets_of_a_gpu():
    assert buckets(256, "cuda") == [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256]
    assert buckets(40, "cuda") == [1, 2, 4, 8, 16, 32, 40] and buckets(1, "cuda") == [1]


def test_a_launch_copies_no_matrices(adapted):
    """Several adapters' matrices come as slices of one tensor; slots hold each by itself, as a kernel reads it."""
    model, adapter, _ = adapted
    with torch.no_grad():
        matrices = adapter.matrices(torch.randn(3, *adapter.v.shape, generator=torch.Generator().manual_seed(2)))
    assert not all(m.is_contiguous() for m in matrices)
    slots = Slots(model, SAMPLING, 8, KVCache(model.config, 8, 40, model.embedding), 3)
    slots.set_matrices(matrices)
    for correction, m in zip(slots.corrections(8), matrices, strict=True):
        launched = arguments(correction, None, model.embedding)[0][2]
        assert torch.equal(launched, m) and launched.data_ptr() == correction.M.data_ptr()


def test_slots_take_other_matrices_in_place(adapted):
    """What a graph reads stays where it is and follows."""
    model, _, matrices = adapted
    slots = Slots(model, SAMPLING, 8, KVCache(model.config, 8, 40, model.embedding), 1)
    slots.set_matrices(matrices)
    corrections = list(slots.corrections(8))
    before = [(c.M.data_ptr(), c.dense.data_ptr()) for c in corrections]
    slots.set_matrices([-2 * m for m in matrices])
    for c, m, pointers in zip(slots.corrections(8), matrices, before, strict=True):
        assert (c.M.data_ptr(), c.dense.data_ptr()) == pointers
        assert torch.equal(c.M, -2 * m) and torch.equal(c.dense, replace(c).dense)


def test_the_table_is_written_when_it_changes(adapted, monkeypatch):
    """And not before every step: 30 tokens a sequence in pages of 16, all admitted at once, take one or two pages each."""
    model, _, matrices = adapted
    written: list[list[list[int]]] = []
    write = KVCache.write_table
    monkeypatch.setattr(KVCache, "write_table", lambda self, rows: written.append(rows) or write(self, rows))
    endless, usage = replace(SAMPLING, eos_ids=()), Usage()
    rollout(model, matrices, PROMPTS[:1], 8, endless, page_size=16, usage=usage)
    assert usage.steps == 30 and [{len(row) for row in rows} for rows in written] == [{1}, {2}]
    written.clear()
    same(rollout(model, matrices, PROMPTS, 4, SAMPLING, page_size=16), rollout(model, matrices, PROMPTS, 4, SAMPLING))
    assert all(a != b for a, b in zip(written, written[1:], strict=False))


def test_prefill_keeps_keys_and_values_alone(adapted, monkeypatch):
    """Whatever rope made them in, q beside them, is gone after its layer."""
    model, _, matrices = adapted
    made: list[weakref.ref] = []

    def tracked(*arguments):
        parts = rope(*arguments)
        held = np.concatenate([x.numpy() for x in parts], 1)  # (T, all heads, D)
        made.append(weakref.ref(held))
        return torch.from_numpy(held).split([x.shape[1] for x in parts], 1)

    c, tokens = model.config, torch.arange(11)
    kept = torch.empty(2, c.num_layers, 11, c.num_kv_heads, c.head_dim)
    expected = torch.empty_like(kept)
    with torch.no_grad():
        model.packed(tokens, [4, 7], matrices, kept=expected.unbind())
        monkeypatch.setattr("tinylora.model.decoder.rope", tracked)
        model.packed(tokens, [4, 7], matrices, kept=kept.unbind())
    assert torch.equal(kept, expected)
    assert len(made) == c.num_layers and not any(each() is not None for each in made)


def test_no_sum_is_rounded_to_half_precision(adapted):
    """While a rollout runs; the process's own settings are as before it, also where it raised."""
    model, _, matrices = adapted
    matmul = torch.backends.cuda.matmul

    def settings() -> list[bool]:
        names = (f"allow_{x}_reduced_precision_reduction{y}" for x in ("bf16", "fp16") for y in ("", "_split_k"))
        return [getattr(matmul, name) for name in names]

    seen = []

    def look(sequence: int, completion: Completion) -> None:
        seen.append(settings())
        raise KeyboardInterrupt

    before = settings()
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    try:
        with pytest.raises(KeyboardInterrupt):
            rollout(model, matrices, PROMPTS, 4, SAMPLING, on_completion=look)
        assert seen == [[False, True, False, False]] and settings() == [*before[:2], False, False]
    finally:
        matmul.allow_fp16_reduced_precision_reduction = (before[2], before[3])


def test_freed_memory_is_kept() -> None:
    """After `keep_memory` a block that is freed and allocated again costs no page faults; before, all of them."""
    script = (
        "import resource, torch\n"
        "from tinylora.engine import memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): torch.empty(10_000_000).fill_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "before = faults(); memory.keep_memory(); faults(); print(before, faults())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 100
