"""The update's gradient against the formula written out, one completion at a time, nothing skipped."""

import math
import weakref

import pytest
import torch

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Completion
from tinylora.errors import InputError
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.loader import load_model
from tinylora.rl import update as update_module
from tinylora.rl.advantages import compute_advantages
from tinylora.rl.config import TrainConfig
from tinylora.rl.memory import MemoryPlan
from tinylora.rl.update import Batch, _descended, update

GENERATIONS, CAP = 4, 12


def config(**changes) -> TrainConfig:
    settings = {"num_generations": GENERATIONS, "max_completion_length": CAP, "microbatch_tokens": 10**6}
    return TrainConfig(**(settings | changes))


@pytest.fixture
def case(tiny_model):
    """fp64; three prompts of four completions, the second group dead, lengths 1 to 12, some cut off."""
    model = load_model(str(tiny_model("qwen2")), dtype="float64")
    adapter = Adapter(model, TinyLoRAConfig(u=3, n_tie=4))
    adapter.v = (
        0.2 * torch.randn(adapter.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    g = torch.Generator().manual_seed(1)
    prompts, completions = [], []
    for p in range(3):
        prompt = torch.randint(96, (3 + 2 * p,), generator=g).tolist()
        for _ in range(GENERATIONS):
            n = int(torch.randint(1, CAP + 1, (1,), generator=g))
            tokens = torch.randint(96, (n,), generator=g).tolist()
            prompts.append(prompt)
            completions.append(Completion(tokens, [], finished=n < CAP - 1))
    with torch.no_grad():  # as sampled by a policy a little off the present one
        for prompt, c in zip(prompts, completions, strict=True):
            logp = logprobs(adapter, adapter.matrices(1.1 * adapter.v), prompt, c.tokens)
            c.logprobs = logp.tolist()
    rewards = torch.tensor([0, 1, 0, 0.5, 1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.float64)
    assert any(c.finished for c in completions) and not all(c.finished for c in completions)
    return adapter, prompts, completions, rewards


def logprobs(adapter, matrices, prompt, tokens):
    hidden = adapter.model.packed(torch.tensor(prompt + tokens)[:-1], [len(prompt) + len(tokens) - 1], matrices)
    return token_logprobs(hidden[len(prompt) - 1 :], adapter.model.head, torch.tensor(tokens))[0]


def naive(case, c: TrainConfig, old=None):
    """Loss and gradient from the definition; `old` are the log-probs the ratio is against."""
    adapter, prompts, completions, rewards = case
    advantages = compute_advantages(rewards, GENERATIONS, c.scale_rewards).values
    v = adapter.v.detach().clone().requires_grad_()
    masked = [c.mask_truncated_completions and not x.finished for x in completions]
    total = sum(len(x.tokens) for x, m in zip(completions, masked, strict=True) if not m)
    loss = torch.zeros((), dtype=torch.float64)
    for i, (prompt, x) in enumerate(zip(prompts, completions, strict=True)):
        if masked[i]:
            continue
        logp = logprobs(adapter, adapter.matrices(v), prompt, x.tokens)
        old_i = logp.detach() if old is None else old[i]
        ratio = (logp - old_i).exp()
        high = c.epsilon if c.epsilon_high is None else c.epsilon_high
        token = -torch.minimum(ratio * advantages[i], ratio.clamp(1 - c.epsilon, 1 + high) * advantages[i])
        if c.importance_sampling_cap:
            token = token * (old_i - torch.tensor(x.logprobs, dtype=torch.float64)).exp().clamp(max=c.importance_sampling_cap)
        if c.beta:
            with torch.no_grad():
                ref = logprobs(adapter, None, prompt, x.tokens)
            token = token + c.beta * ratio * ((ref - logp).exp() - (ref - logp) - 1)
        n = len(x.tokens)
        loss = loss + {
            "grpo": token.mean() / len(completions),
            "dapo": token.sum() / total,
            "dr_grpo": token.sum() / (len(completions) * c.max_completion_length),
        }[c.loss_type] * (n / n)
    loss.backward()
    return loss.item(), v.grad


def ours(case, c: TrainConfig, old=None):
    adapter, prompts, completions, rewards = case
    batch = Batch(prompts, completions, compute_advantages(rewards, GENERATIONS, c.scale_rewards))
    if old is not None:
        batch.old_logps.update(old)
    adapter.v.grad = None
    metrics = update(adapter, batch, c, MemoryPlan(0, 0, 0, 1, c.microbatch_tokens, 0))
    return metrics, adapter.v.grad.clone(), batch


CHANGES = [
    {},
    {"loss_type": "grpo"},
    {"loss_type": "dr_grpo"},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"beta": 0.1},
    {"beta": 0.1, "loss_type": "grpo"},
    {"importance_sampling_cap": 0.0},
    {"importance_sampling_cap": 1.05},
    {"mask_truncated_completions": True},
    {"mask_truncated_completions": True, "loss_type": "grpo"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("microbatch", [10**6, 40, 1])
def test_gradient_equals_the_definition(case, changes, microbatch):
    """fp64 rounding, for one microbatch, several, and one completion each; the dead group is not in our forward."""
    c = config(**changes, microbatch_tokens=microbatch)
    loss, gradient = naive(case, c)
    metrics, got, _ = ours(case, c)
    torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-11)
    assert math.isclose(metrics["loss"], loss, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_later_iterations_are_against_the_first_policy(case, loss_type):
    """Old log-probs from another v, far enough that both clips bite."""
    adapter, prompts, completions, _ = case
    c = config(loss_type=loss_type, num_iterations=2, epsilon=0.02, epsilon_high=0.05)
    with torch.no_grad():
        old = {
            i: logprobs(adapter, adapter.matrices(0.8 * adapter.v), p, x.tokens)
            for i, (p, x) in enumerate(zip(prompts, completions, strict=True))
        }
    loss, gradient = naive(case, c, old)
    metrics, got, _ = ours(case, c, old)
    torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-11)
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert not torch.allclose(gradient, naive(case, c)[1], rtol=1e-3)


def test_first_iteration_keeps_its_logprobs(case):
    c = config(num_iterations=2, microbatch_tokens=40)
    _, _, batch = ours(case, c)
    live = [i for i in range(12) if not 4 <= i < 8]
    assert sorted(batch.old_logps) == live
    adapter, prompts, completions, _ = case
    with torch.no_grad():
        torch.testing.assert_close(batch.old_logps[9], logprobs(adapter, adapter.matrices(), prompts[9], completions[9].tokens))


def test_dead_groups_are_skipped_only_where_that_is_exact(case, monkeypatch):
    scored = []
    score = update_module.score
    monkeypatch.setattr(update_module, "score", lambda *a: scored.append(a[4]) or score(*a))
    ours(case, config())
    assert scored == [[0, 1, 2, 3, 8, 9, 10, 11]]
    scored.clear()
    ours(case, config(beta=0.1))
    assert scored == [list(range(12))] * 2, "the policy and the base, on every completion"


def test_a_prompt_is_packed_once_for_its_completions(case, monkeypatch):
    adapter, prompts, completions, _ = case
    packed, sizes = adapter.model.packed, []
    monkeypatch.setattr(adapter.model, "packed", lambda tokens, *a, **k: sizes.append(len(tokens)) or packed(tokens, *a, **k))
    ours(case, config())
    live = [i for i in range(12) if not 4 <= i < 8]
    assert sizes == [len(prompts[0]) + len(prompts[8]) + sum(len(completions[i].tokens) - 1 for i in live)]


def test_an_all_dead_batch_has_a_zero_gradient_and_no_forward(case, monkeypatch):
    adapter, prompts, completions, _ = case
    monkeypatch.setattr(adapter.model, "packed", lambda *a: pytest.fail("a dead batch was scored"))
    metrics, gradient, _ = ours((adapter, prompts, completions, torch.ones(12)), config())
    assert gradient.count_nonzero() == 0 and metrics["loss"] == 0 and metrics["entropy"] is None


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_out_of_memory_halves_the_microbatch_and_loses_nothing(case, monkeypatch, when):
    """Microbatches of over 60 tokens run out of memory, in the forward or in the backward of what is scored."""
    adapter, prompts, completions, rewards = case
    packed = adapter.model.packed

    refused = []  # what the graphs that were too much hold

    class Activation:
        pass

    class TooMuch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = Activation()
            refused.append(weakref.ref(ctx.kept))
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dx):
            raise torch.OutOfMemoryError("pretended")

    def tight(tokens, *a, **k):
        assert not any(kept() for kept in refused), "the graph that was too much is still in memory"
        if when == "forward" and len(tokens) > 60:
            raise torch.OutOfMemoryError("pretended")
        hidden = packed(tokens, *a, **k)
        return TooMuch.apply(hidden) if len(tokens) > 60 else hidden

    c = config(microbatch_tokens=200)
    loss, gradient = naive(case, c)
    monkeypatch.setattr(adapter.model, "packed", tight)
    plan = MemoryPlan(0, 0, 0, 1, 200, 0)
    adapter.v.grad = None
    batch = Batch(prompts, completions, compute_advantages(rewards, GENERATIONS, c.scale_rewards))
    metrics = update(adapter, batch, c, plan)
    torch.testing.assert_close(adapter.v.grad, gradient, rtol=1e-9, atol=1e-11)
    assert math.isclose(metrics["loss"], loss, rel_tol=1e-9) and plan.microbatch_tokens == 50
    monkeypatch.setattr(adapter.model, "packed", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("pretended")))
    before = adapter.v.grad.clone()
    with pytest.raises(InputError, match="one completion"):
        update(adapter, batch, c, plan)
    assert torch.equal(adapter.v.grad, before)


def test_no_sum_is_rounded_to_half_precision():
    """While a part's loss and gradient are computed; the process's own setting is put back."""
    matmul, seen, x = torch.backends.cuda.matmul, [], torch.ones(2, requires_grad=True)

    def loss(part):
        seen.append(matmul.allow_bf16_reduced_precision_reduction)
        return x.sum(), None

    _descended(loss, [0], torch.device("cpu"))
    assert seen == [False] and matmul.allow_bf16_reduced_precision_reduction and torch.equal(x.grad, torch.ones(2))
