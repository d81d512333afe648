"""A rollout of another policy stops the run; `--exact` is bit for bit, and refused where it is not."""

import math

import pytest
import torch

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Sampling, rollout
from tinylora.errors import InputError
from tinylora.model.loader import load_model
from tinylora.rl import consistency
from tinylora.rl.config import BUILTIN_PRESET, TrainConfig
from tinylora.rl.consistency import fix_capacity, require_same_policy
from tinylora.rl.trainer import Trainer
from tinylora.rl.update import score

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16], [20, 21]]
SAMPLING = Sampling(30, temperature=1.0, seed=5, eos_ids=(7, 9))


@pytest.fixture
def exact(adapted):
    _, adapter, matrices = adapted
    fix_capacity(adapter, PROMPTS, SAMPLING)
    return adapter, matrices


def test_exact_rollouts_are_bitwise_the_same_and_the_updates(exact):
    """Slots, sharing, order, and packs of the update: equal bits."""
    adapter, matrices = exact
    whole = rollout(adapter.model, matrices, PROMPTS, 4, SAMPLING)
    for options in (
        {"slots": 1},
        {"slots": 3},
        {"slots": 8},
        {"slots": 64},
        {"expected": [3, 1, 5, 2, 4]},
    ):
        again = rollout(adapter.model, matrices, PROMPTS, 4, SAMPLING, **options)
        assert [(c.tokens, c.logprobs) for c in again] == [(c.tokens, c.logprobs) for c in whole], options
    prompts = [p for p in PROMPTS for _ in range(4)]
    apart = rollout(adapter.model, matrices, prompts, 1, SAMPLING)  # each sample's prompt is prefilled for it alone
    assert [(c.tokens, c.logprobs) for c in apart] == [(c.tokens, c.logprobs) for c in whole]
    for part in (list(range(20)), [3], [4, 5, 17], list(range(7, 16))):
        with torch.no_grad():
            logp, _ = score(adapter, matrices, prompts, whole, part, 1.0)
        assert logp.tolist() == [x for i in part for x in whole[i].logprobs]


def test_exact_is_refused_where_bits_depend_on_the_batch(tiny_model, monkeypatch):
    model = load_model(str(tiny_model("qwen2")))
    adapter = Adapter(model, TinyLoRAConfig(u=3, n_tie=4))

    def careless(*a, **k):
        found = rollout(*a, **k)
        if k["slots"] == 3:
            found[0].logprobs[-1] = math.nextafter(found[0].logprobs[-1], -1e9) - 1e-7
        return found

    monkeypatch.setattr(consistency, "rollout", careless)
    with pytest.raises(InputError, match="decoded with it"):
        fix_capacity(adapter, PROMPTS, SAMPLING)


def test_evidently_another_policy_stops():
    require_same_policy(1e-6, 1e-4, torch.float32, False, 3)
    require_same_policy(0.01, 2.0, torch.bfloat16, False, 3)
    require_same_policy(None, None, torch.float32, True, 3)
    for mean, dtype in ((0.01, torch.float32), (0.5, torch.bfloat16), (math.nan, torch.float32)):
        with pytest.raises(InputError, match="step 3: the rollout was not sampled"):
            require_same_policy(mean, 1.0, dtype, False, 3)
    with pytest.raises(InputError, match="--exact"):
        require_same_policy(1e-9, 1e-8, torch.float32, True, 3)


def test_a_rollout_of_the_base_model_stops_training(tmp_path, monkeypatch):
    """What a silently unsynchronised engine would do: sample from the base while v is far from 0."""
    from tinylora.rl import step as step_module

    small = {"prompts_per_step": 4, "num_generations": 4, "max_steps": 3, "eval_size": 0, "output_dir": str(tmp_path / "run")}
    trainer = Trainer(TrainConfig(**BUILTIN_PRESET | small))
    with torch.no_grad():
        trainer.policy.v += 0.1
    trainer._train_step()
    stale = lambda model, matrices, *a, **k: rollout(model, None, *a, **k)  # noqa: E731
    monkeypatch.setattr(step_module, "rollout", stale)
    v = trainer.policy.v.detach().clone()
    with pytest.raises(InputError, match="not sampled from the adapter"):
        trainer._train_step()
    assert torch.equal(trainer.policy.v, v), "nothing was learned from it"


def test_training_with_exact(tmp_path):
    small = {"prompts_per_step": 4, "num_generations": 4, "max_steps": 3, "eval_size": 0, "output_dir": str(tmp_path / "run")}
    trainer = Trainer(TrainConfig(**BUILTIN_PRESET | small | {"exact": True}))
    rows = [trainer._train_step() for _ in range(3)]
    assert [row["sampling/sampling_logp_difference/max"] for row in rows] == [0, 0, 0]


def _stopped(tmp_path, monkeypatch, fault, **settings):
    """The step at which a run stops whose rollout got the matrices that `fault` makes of the true ones; None: it did not."""
    from tinylora.rl import step as step_module

    small = {"prompts_per_step": 6, "num_generations": 6, "max_steps": 4, "eval_size": 0, "output_dir": str(tmp_path / "run")}
    trainer = Trainer(TrainConfig(**BUILTIN_PRESET | small | settings))
    planted = lambda model, matrices, *a, **k: rollout(model, fault(trainer.policy, matrices), *a, **k)  # noqa: E731
    monkeypatch.setattr(step_module, "rollout", planted)
    try:
        for _ in range(4):
            trainer._train_step()
    except InputError as error:
        assert "not sampled from the adapter that is trained" in str(error)
        return trainer.step + 1
    return None


def _lost(policy, matrices):
    return None


def _another(policy, matrices):
    v = torch.randn(policy.v.shape, generator=torch.Generator().manual_seed(9)).to(policy.v)
    with torch.no_grad():
        return policy.matrices(v * policy.v.norm() / v.norm())


class _Frozen:
    def __init__(self):
        self.first = None

    def __call__(self, policy, matrices):
        self.first = self.first or matrices
        return self.first


@pytest.mark.filterwarnings("ignore:--dtype bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [_lost, _another, _Frozen])
def test_a_small_adapter_that_the_rollout_has_not_stops_training(tmp_path, monkeypatch, fault, dtype):
    """At step 1 v is 0 and all of them are right; at step 2 it moves log-probs by 3e-4 to 5e-4 nats a token."""
    fault = fault() if fault is _Frozen else fault
    assert _stopped(tmp_path, monkeypatch, fault, learning_rate=1e-4, dtype=dtype) == 2


@pytest.mark.filterwarnings("ignore:--dtype bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["tinylora", "lora"])
def test_an_honest_rollout_does_not_stop(tmp_path, monkeypatch, method, dtype):
    shape = {"u": None, "n_tie": None} if method == "lora" else {}
    settings = {k: v for k, v in BUILTIN_PRESET.items() if k not in shape}
    monkeypatch.setattr(f"{__name__}.BUILTIN_PRESET", settings)
    same = lambda policy, matrices: matrices  # noqa: E731
    assert _stopped(tmp_path, monkeypatch, same, learning_rate=1e-3, dtype=dtype, method=method) is None


def test_the_distance_to_the_base_is_logged(tmp_path):
    small = {"prompts_per_step": 4, "num_generations": 4, "max_steps": 2, "eval_size": 0, "output_dir": str(tmp_path / "run")}
    trainer = Trainer(TrainConfig(**BUILTIN_PRESET | small))
    first, second = (trainer._train_step()["sampling/base_logp_difference/mean"] for _ in range(2))
    assert first <= 1e-6 and second > 1e-3
