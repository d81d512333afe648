"""Evolution strategies: each row is its own adapter's, and the gradient is the formula's."""

import pytest
import torch

from bench.measure import peak_extra_bytes
from tinylora.engine.rollout import rollout
from tinylora.errors import InputError
from tinylora.rl import es as es_module
from tinylora.rl import step as step_module
from tinylora.rl.advantages import compute_advantages
from tinylora.rl.config import TrainConfig, preset
from tinylora.rl.es import noise
from tinylora.rl.trainer import Trainer


def trainer(tmp_path, **changes) -> Trainer:
    algorithm = changes.get("algorithm", "es")
    small = {"max_steps": 4, "eval_size": 0, "prompts_per_step": 4, "num_generations": 4, "output_dir": str(tmp_path)}
    return Trainer(TrainConfig(**(preset("builtin", "tinylora", algorithm) | small | changes)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_a_solo_run_of_its_adapter_and_the_gradient_is_theirs(tmp_path, monkeypatch, temperature):
    """Second step, so that v is not zero; no autograd graph anywhere and no forward beside the rollout's."""
    run, kept = trainer(tmp_path, temperature=temperature), []
    run._train_step()
    v = run.policy.v.detach().clone()
    finish = step_module.finish
    monkeypatch.setattr(es_module, "finish", lambda s, *a: kept.append(s) or finish(s, *a))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a backward pass"))
    run._train_step()
    (share,) = kept
    eps = noise(v, 16, run.config.seed, 1)
    assert torch.equal(eps[0::2], -eps[1::2]) and eps[0::2].std() == pytest.approx(1, abs=0.3)
    prompts = share.repeated()
    for i in (0, 1, 6, 15):
        matrices = [m.detach() for m in run.policy.matrices(v + run.config.sigma * eps[i])]
        (alone,) = rollout(run.model, matrices, [prompts[i]], 1, run.sampling(), 16 + i)
        assert alone.tokens == share.completions[i].tokens
    assert len({tuple(c.tokens) for c in share.completions}) > 4
    advantages = compute_advantages(share.rewards, 4, "batch").values
    want = sum(-a * e.double() for a, e in zip(advantages, eps, strict=True)) / (16 * run.config.sigma)
    torch.testing.assert_close(run.policy.v.grad.double(), want, rtol=1e-5, atol=1e-5)


def test_a_step_takes_no_more_memory_than_its_rollout(tmp_path, monkeypatch):
    """What a step allocates beside the rollout is gone, or smaller, when the rollout is at its peak; GRPO's update is not."""
    run, peaks = trainer(tmp_path / "es", num_generations=8), []
    roll_out = es_module.roll_out
    held = run.policy.v.numel() * 4 * 32 + sum(m.numel() * 4 * 32 for m in run.policy.matrices())  # eps, and each row's M
    run._train_step()
    step = peak_extra_bytes(run._train_step)
    monkeypatch.setattr(es_module, "roll_out", lambda *a, **k: peaks.append(peak_extra_bytes(lambda: roll_out(*a, **k))))
    run._train_step()
    assert peaks[0] > 2**20 and step <= 1.1 * peaks[0] + 4 * held
    grpo = trainer(tmp_path / "grpo", num_generations=8, algorithm="grpo")
    assert peak_extra_bytes(grpo._train_step) > 1.5 * step


def test_settings_that_cannot_be(tmp_path):
    for changes in ({"num_generations": 3}, {"beta": 0.1}, {"sigma": 0.0}):
        with pytest.raises(InputError, match="--algorithm es"):
            trainer(tmp_path, **changes)
