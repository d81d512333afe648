"""Runs that train together: each is its run alone, bit for bit, whatever shares the batch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinylora.errors import InputError
from tinylora.rl.config import TrainConfig, preset
from tinylora.rl.run_directory import CLOCK_METRICS
from tinylora.rl.trainer import Trainer, train_population


def short(algorithm: str) -> TrainConfig:
    few = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "eval_size": 0, "algorithm": algorithm}
    return TrainConfig(**preset("builtin", "tinylora", algorithm) | few)


def timeless(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in rows]


@pytest.mark.parametrize("algorithm", ["grpo", "es", "sft"])
def test_each_member_is_its_run_alone(tmp_path, algorithm):
    """Members with other learning rates, seeds, draws of P, sizes and lengths; with --exact every metric and v is the same."""
    base = replace(short(algorithm), exact=True)
    members = [
        base,
        replace(base, learning_rate=0.03),
        replace(base, seed=5, max_steps=2),
        replace(base, projection_seed=9, u=1, n_tie=4, param_dtype="bfloat16"),
    ]
    paths = train_population([replace(c, output_dir=str(tmp_path / f"p{i}")) for i, c in enumerate(members)])
    for i, config in enumerate(members):
        alone = Trainer(replace(config, output_dir=str(tmp_path / f"a{i}")))
        assert alone.train()
        assert paths[i] == tmp_path / f"p{i}"
        assert timeless(paths[i]) == timeless(alone.run_directory.path)
        names = [sorted(str(f.relative_to(p)) for f in p.rglob("*")) for p in (paths[i], alone.run_directory.path)]
        assert names[0] == names[1]
        files = [(p / "adapter" / "adapter_model.safetensors").read_bytes() for p in (paths[i], alone.run_directory.path)]
        assert files[0] == files[1]
    assert len({json.dumps(timeless(p)[-1]["adapter/v"]) for p in paths}) == len(members), "the members differ"


def test_a_population_goes_on_where_it_was_stopped(tmp_path):
    """One member had gone further than the other when both were killed."""
    base = short("grpo")
    members = [replace(base, seed=i, output_dir=str(tmp_path / f"p{i}")) for i in range(2)]
    whole = [replace(c, output_dir=str(tmp_path / f"w{i}")) for i, c in enumerate(members)]
    train_population(whole)
    for config, steps in zip(members, (1, 2), strict=True):
        trainer = Trainer(config)
        for _ in range(steps):
            trainer.record(trainer._train_step())
    train_population(members, [c.output_dir for c in members])
    for i in range(2):
        files = [(tmp_path / f"{kind}{i}" / "adapter" / "adapter_model.safetensors").read_bytes() for kind in "pw"]
        assert files[0] == files[1]


def test_members_that_cannot_train_together_are_refused(tmp_path):
    first = replace(short("grpo"), output_dir=str(tmp_path / "a"))
    with pytest.raises(InputError, match="--temperature 1.0 and 0.5"):
        train_population([first, replace(first, temperature=0.5, output_dir=str(tmp_path / "b"))])
    with pytest.raises(InputError, match="--output-dir"):
        train_population([first, first])
    lora = replace(first, method="lora")
    with pytest.raises(InputError, match="--method lora"):
        train_population([lora, replace(lora, output_dir=str(tmp_path / "b"))])
