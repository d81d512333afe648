"""The packed loss against TRL's own GRPOTrainer._compute_loss, in float64: values, gradients and the metrics of tokens."""

import dataclasses
import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tinylora.rl.loss import LossTerms, grpo_loss, token_weights

BUDGET = 11  # max_completion_length
LENGTHS = torch.tensor([11, 1, 5, 7, 3, 0, 11, 2])  # loss tokens: padded, unequal, one at the budget, one without any
MASK = torch.arange(BUDGET) < LENGTHS[:, None]  # (completions, BUDGET)
GROUP = 4
CAP = 2.0


@pytest.fixture(scope="module")
def trainer() -> Any:
    """TRL's trainer module; takes seconds to import."""
    return pytest.importorskip("trl.trainer.grpo_trainer")


def make_step(seed: int = 0, dead: int | None = None, on_policy: bool = False, corrected: bool = True) -> SimpleNamespace:
    """One step's tokens, (completions, BUDGET) float64; beyond the mask they hold numbers that must not matter.

    Far enough off-policy that both clips and the cap are hit. Completions of group `dead` have advantage 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(size: float) -> Tensor:
        return size * torch.randn(MASK.shape, generator=generator, dtype=torch.float64)

    logp = -noise(1.5).abs()
    old = logp + noise(0.4)
    sampled, ref = (logp if on_policy else old) + noise(0.8), logp + noise(0.5)
    advantages = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64).abs()
    advantages[1::2] *= -1
    if dead is not None:
        advantages[dead * GROUP : (dead + 1) * GROUP] = 0.0
    return SimpleNamespace(
        logp=logp.requires_grad_(),
        old=None if on_policy else old,
        sampled=sampled if corrected else None,
        ref=ref,
        advantages=advantages,
    )


def trl_loss(
    trainer: Any, step: SimpleNamespace, loss_type: str, beta: float, epsilon: float, epsilon_high: float
) -> tuple[Tensor, dict]:
    """TRL's method, unbound, on an object that holds what it reads of a trainer: its own defaults but for the arguments."""
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (step.logp, torch.zeros_like(step.logp), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=epsilon_high,
        epsilon_low=epsilon,
        importance_sampling_level="token",
        loss_type=loss_type,
        max_completion_length=BUDGET,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=step.sampled is not None,
        vllm_importance_sampling_correction=True,
    )
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(len(LENGTHS), 3, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 3, dtype=torch.long),
        "completion_ids": torch.zeros(MASK.shape, dtype=torch.long),
        "completion_mask": MASK.long(),
        "advantages": step.advantages,
        "old_per_token_logps": step.old,
        "ref_per_token_logps": step.ref,
        "num_items_in_batch": LENGTHS.sum(),
    }
    if step.sampled is not None:  # as TRL's token_truncate mode makes it
        old = step.logp.detach() if step.old is None else step.old
        inputs["importance_sampling_ratio"] = torch.clamp(torch.exp((old - step.sampled) * MASK), max=CAP)
    loss = trainer.GRPOTrainer._compute_loss(stand_in, None, inputs)
    return loss, stand_in._metrics["train"]


def our_loss(
    step: SimpleNamespace, loss_type: str, beta: float, epsilon: float, epsilon_high: float, part: list[int] | None = None
) -> LossTerms:
    """The same from tinylora on completions `part`, packed: only their own tokens, one after another."""
    part = list(range(len(LENGTHS))) if part is None else part

    def packed(x: Tensor) -> Tensor:
        return x[part][MASK[part]]

    lengths = LENGTHS[part]
    weights = token_weights(lengths, loss_type, len(LENGTHS), int(LENGTHS.sum()), BUDGET)
    logp = packed(step.logp)
    return grpo_loss(
        logp,
        logp.detach() if step.old is None else packed(step.old),
        None if step.sampled is None else packed(step.sampled),
        packed(step.ref) if beta else None,
        step.advantages[part].repeat_interleave(lengths),
        weights,
        epsilon,
        epsilon_high,
        beta,
        CAP,
    )


def close(found: Tensor, expected: Tensor) -> bool:
    """To 1e-12 of the largest entry."""
    return bool(((found - expected).abs() <= 1e-12 * expected.abs().max()).all())


def gradient(loss: Tensor, step: SimpleNamespace) -> Tensor:
    return torch.autograd.grad(loss, step.logp)[0]


@pytest.mark.parametrize("epsilons", [(0.2, 0.2), (0.2, 0.28), (0.1, 0.5)])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_and_gradient_equal_trl(
    loss_type: str, beta: float, on_policy: bool, corrected: bool, epsilons: tuple[float, float], trainer: Any
) -> None:
    step = make_step(on_policy=on_policy, corrected=corrected)
    expected, metrics = trl_loss(trainer, step, loss_type, beta, *epsilons)
    terms = our_loss(step, loss_type, beta, *epsilons)
    assert terms.loss.dtype == torch.float64 and terms.loss.shape == (40,)
    assert close(terms.loss.sum(), expected) and expected.abs() > 1e-3
    ours, trls = gradient(terms.loss.sum(), step), gradient(expected, step)
    assert close(ours, trls) and trls.abs().max() > 1e-3
    assert not ours[~MASK].any()

    # the metrics of tokens, which TRL averages over the batch in float32 at one place
    for name, ours in (("clip_ratio/low_mean", terms.clipped_low), ("clip_ratio/high_mean", terms.clipped_high)):
        assert abs(ours.double().mean() - metrics[name][0]) < 1e-6
        assert on_policy or ours.any()  # off-policy both clips are at work
    assert (terms.kl is None) == (beta == 0)
    if terms.kl is not None:
        assert abs(terms.kl.mean() - metrics["kl"][0]) < 1e-6 and not terms.kl.requires_grad


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_leaving_out_a_dead_group_is_exact(loss_type: str, on_policy: bool, dead: int, trainer: Any) -> None:
    """TRL runs the dead group through the model; here it only counts among N and T."""
    step = make_step(3, dead, on_policy)
    live = [i for i in range(len(LENGTHS)) if i // GROUP != dead]
    expected, _ = trl_loss(trainer, step, loss_type, 0.0, 0.2, 0.28)
    terms = our_loss(step, loss_type, 0.0, 0.2, 0.28, live)
    assert len(terms.loss) == LENGTHS[live].sum() < LENGTHS.sum()
    assert close(terms.loss.sum(), expected)
    assert close(gradient(terms.loss.sum(), step), gradient(expected, step))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_kl_needs_the_dead_group_too(loss_type: str, trainer: Any) -> None:
    """With beta it pulls every completion to the base, so then nothing is left out, and that equals TRL."""
    step = make_step(4, dead=1)
    expected, _ = trl_loss(trainer, step, loss_type, 0.1, 0.2, 0.28)
    terms = our_loss(step, loss_type, 0.1, 0.2, 0.28)
    assert close(terms.loss.sum(), expected)
    slopes = gradient(terms.loss.sum(), step)
    assert close(slopes, gradient(expected, step))
    assert slopes[GROUP:][MASK[GROUP:]].abs().min() > 0


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_microbatches_sum_to_the_step(loss_type: str, beta: float) -> None:
    """In any order and any cut, for each token's weight counts the whole step."""
    step = make_step(5)
    whole = our_loss(step, loss_type, beta, 0.2, 0.28).loss.sum()
    parts = [our_loss(step, loss_type, beta, 0.2, 0.28, part).loss.sum() for part in ([6], [0, 5, 2], [7, 1, 4, 3])]
    assert close(torch.stack(parts).sum(), whole)
    assert close(gradient(torch.stack(parts).sum(), step), gradient(whole, step))


def test_the_correction_has_no_gradient_and_a_cap() -> None:
    """On-policy the loss of a token is -A w: its slope is the same, and w is exp(old - sampled) up to the cap."""
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    sampled = torch.tensor([-1.0, -2.0, -1.5, -0.5], dtype=torch.float64)  # ratios 1, e, sqrt(e), 1/sqrt(e)
    advantages, ones = torch.tensor([1.0, 1.0, -2.0, 3.0], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    terms = grpo_loss(logp, logp.detach(), sampled, None, advantages, ones, 0.2, 0.2, 0.0, CAP)
    expected = -advantages * torch.tensor([1.0, 2.0, 0.5, -0.5], dtype=torch.float64).where(
        torch.tensor([True, True, False, False]), (logp.detach() - sampled).exp()
    )
    assert close(terms.loss.detach(), expected)
    assert close(torch.autograd.grad(terms.loss.sum(), logp)[0], expected)


def test_clipping_by_hand() -> None:
    """A ratio beyond the range counts as its edge, and only where that makes the loss larger."""
    ratios, signs = [0.5, 0.9, 1.1, 1.5], [1.0, -1.0]
    cases = list(itertools.product(ratios, signs))
    ratio = torch.tensor([r for r, _ in cases], dtype=torch.float64)
    advantages = torch.tensor([a for _, a in cases], dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    zero, one = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    terms = grpo_loss(logp, zero, None, None, advantages, one, 0.2, 0.3, 0.0, CAP)
    #                          0.5 +, 0.5 -, 0.9 +, 0.9 -, 1.1 +, 1.1 -, 1.5 +, 1.5 -
    expected = torch.tensor([-0.5, 0.8, -0.9, 0.9, -1.1, 1.1, -1.3, 1.5], dtype=torch.float64)
    assert close(terms.loss.detach(), expected)
    assert terms.clipped_low.tolist() == [False, True, False, False, False, False, False, False]
    assert terms.clipped_high.tolist() == [False, False, False, False, False, False, True, False]
    slopes = torch.autograd.grad(terms.loss.sum(), logp)[0]
    assert (slopes == 0).tolist() == [False, True, False, False, False, False, True, False]


def test_token_weights_by_hand() -> None:
    """Two completions of 2 and 3 tokens in a step of 4 completions and 10 tokens, budget 5."""
    lengths = torch.tensor([2, 3])
    expected = {"grpo": [1 / 8] * 2 + [1 / 12] * 3, "dapo": [1 / 10] * 5, "dr_grpo": [1 / 20] * 5}
    for loss_type, values in expected.items():
        weights = token_weights(lengths, loss_type, completions=4, tokens=10, max_completion_length=5)
        assert weights.dtype == torch.float64
        assert (weights - torch.tensor(values, dtype=torch.float64)).abs().max() < 1e-16
    assert len(token_weights(torch.tensor([0]), "grpo", 1, 0, 5)) == len(token_weights(torch.tensor([0]), "dapo", 1, 0, 5)) == 0
    with pytest.raises(ValueError, match="'ppo'.*grpo, dr_grpo or dapo"):
        token_weights(lengths, "ppo", 4, 10, 5)


def test_the_comparison_is_with_trls_defaults() -> None:
    """Where one of these changes in TRL, "equal to TRL" needs another look."""
    config = pytest.importorskip("trl").GRPOConfig
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    expected = {
        "beta": 0.0,
        "delta": None,
        "epsilon": 0.2,
        "importance_sampling_level": "token",
        "loss_type": "dapo",
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_bias_correction_kl": True,
    }
    assert {name: defaults[name] for name in expected} == expected
