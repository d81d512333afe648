"""Rollout: what is sampled depends on the sequence alone, and its log-probs are the update's."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tinylora.adapter import Adapter, TinyLoRAConfig
from tinylora.errors import InputError
from tinylora.kernels.correction import CHAIN
from tinylora.kernels.self_check import rms
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model import load_model
from tinylora.model.decoder import KVCache
from tinylora.rl.rollout import Completion, Sampling, Usage, rollout
from tinylora.rl.slots import WIDE, head
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
        {"share_prompts": False},
        {"expected": [3.0, 1.0, 5.0, 2.0, 4.0]},
        {"cache_bytes": 48 * KVCache.bytes_per_token(model.config, 4) + 1},
    ):
        same(whole, rollout(model, matrices, PROMPTS, 4, SAMPLING, slots=slots, page_size=page_size, usage=usage, **options))
    assert usage.tokens == 4 * sum(len(c.tokens) for c in whole)
    if page_size == 4 and slots > 3:
        assert usage.restarted > 0, "the tight cache should have made sequences start over"


def test_a_cache_too_small_for_one_sequence_is_refused(adapted):
    model, _, matrices = adapted
    with pytest.raises(InputError, match="KV cache"):
        rollout(model, matrices, PROMPTS, 4, SAMPLING, cache_bytes=35 * KVCache.bytes_per_token(model.config, 4), page_size=4)
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
    rollout(model, matrices, PROMPTS, 4, SAMPLING, slots=3, share_prompts=False, usage=apart)
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
    monkeypatch.setattr("tinylora.rl.slots.onednn_linear", lambda x, w: calls.append(len(w)) or F.linear(x, w))
    for width, called in ((CHAIN, [WIDE]), (CHAIN + 1, [])):
        hidden, weight = torch.zeros(8, width), torch.zeros(WIDE, width)
        assert head(hidden, SimpleNamespace(head=weight, capacity=None)).shape == (8, WIDE)
        assert calls == called
        calls.clear()


def test_the_caches_room_stays_for_the_next_rollout(adapted):
    """A second call writes over the first one's cache, a smaller one into a part of it, and both sample what they would."""
    model, _, matrices = adapted
    first = rollout(model, matrices, PROMPTS, 4, SAMPLING)
    room = model.kept_room.data_ptr()
    same(first, rollout(model, matrices, PROMPTS, 4, SAMPLING))
    same(first[:4], rollout(model, matrices, PROMPTS[:1], 4, SAMPLING))
    assert model.kept_room.data_ptr() == room
    rollout(model, matrices, PROMPTS, 8, SAMPLING)
    assert model.kept_room.data_ptr() != room, "a larger one needs more"
