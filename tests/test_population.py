"""Runs that train together: each is its run alone, bit for bit, whatever shares the batch."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinylora.errors import InputError
from tinylora.rl.config import BUILTIN_PRESET, TrainConfig
from tinylora.rl.population import train_population
from tinylora.rl.run_directory import CLOCK_METRICS
from tinylora.rl.trainer import Trainer

SHORT = TrainConfig(**{**BUILTIN_PRESET, "max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "eval_size": 0})


def timeless(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in rows]


@pytest.mark.parametrize("algorithm", ["grpo", "es"])
def test_each_member_is_its_run_alone(tmp_path, algorithm):
    """Members with other learning rates, seeds, draws of P, sizes and lengths; with --exact every metric and v is the same."""
    base = replace(SHORT, algorithm=algorithm, exact=True)
    members = [
        base,
        replace(base, learning_rate=0.03),
        replace(base, seed=5, max_steps=2),
        replace(base, projection_seed=9, u=1, n_tie=4, param_dtype="bfloat16"),
    ]
    paths = train_population([replace(c, output_dir=str(tmp_path / f"p{i}")) for i, c in enumerate(members)])
    for i, config in enumerate(members):
        alone = Trainer(replace(config, output_dir=str(tmp_path / f"a{i}")))
        with contextlib.redirect_stdout(io.StringIO()):
            assert alone.train()
        assert paths[i] == tmp_path / f"p{i}"
        assert timeless(paths[i]) == timeless(alone.run_directory.path)
        files = [(p / "adapter" / "adapter_model.safetensors").read_bytes() for p in (paths[i], alone.run_directory.path)]
        assert files[0] == files[1]
    assert len({json.dumps(timeless(p)[-1]["adapter/v"]) for p in paths}) == len(members), "the members differ"


def test_members_that_cannot_share_a_rollout_are_refused(tmp_path):
    with pytest.raises(InputError, match="--temperature 1.0 and 0.5"):
        train_population([SHORT, replace(SHORT, temperature=0.5)])


def test_es_row_is_a_run_of_its_perturbed_adapter(tmp_path):
    """Every completion of an ES step is the greedy one of the adapter v + sigma eps alone, and pairs are antithetic."""
    from tinylora.rl.rollout import rollout

    trainer = Trainer(replace(SHORT, algorithm="es", output_dir=str(tmp_path / "run"), exact=True))
    trainer.train()
    trainer.run_directory.path.rename(tmp_path / "old")
    request = trainer.request()
    together = rollout(trainer.model, request.matrices, request.prompts, 1, request.sampling, row_adapter=request.row_adapter)
    assert request.noise is not None and trainer.adapter.v.abs().sum() > 0
    assert torch.equal(request.noise[0::2], -request.noise[1::2]) and len(request.noise) == 16
    for i, completion in enumerate(together):
        own = trainer.adapter.matrices((trainer.adapter.v + trainer.config.sigma * request.noise[i]).detach())
        alone = rollout(trainer.model, own, [request.prompts[i]], 1, request.sampling)[0]
        assert (alone.tokens, alone.logprobs) == (completion.tokens, completion.logprobs)
    assert len({tuple(c.tokens) for c in together}) > 4, "greedy answers to four prompts, moved by the perturbations"
