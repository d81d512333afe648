"""A population's members become what they would have become alone."""

import json

import pytest
import torch

from tinylora.errors import InputError
from tinylora.rl import step as step_module
from tinylora.rl.config import TrainConfig, preset
from tinylora.rl.population import train_population
from tinylora.rl.run_directory import CLOCK_METRICS
from tinylora.rl.trainer import Trainer

MEMBERS = [(0.01, 0, None), (0.02, 0, None), (0.01, 1, None), (0.01, 0, 7)]  # learning rate, seed, projection seed


def configs(path, algorithm, **changes):
    small = {"max_steps": 3, "eval_size": 16, "prompts_per_step": 4, "num_generations": 4, "algorithm": algorithm}
    small = preset("builtin", "tinylora", algorithm) | small | changes
    return [
        TrainConfig(**(small | {"learning_rate": lr, "seed": s, "projection_seed": p, "output_dir": str(path / str(i))}))
        for i, (lr, s, p) in enumerate(MEMBERS)
    ]


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "es"])
def test_each_member_is_its_solo_run(tmp_path, monkeypatch, algorithm):
    exact, sampled = algorithm == "grpo", {}
    finish = step_module.finish

    def keep(s, *a):
        key = (s.trainer.run_directory.path.parent.name, s.trainer.run_directory.path.name, s.trainer.step)
        sampled[key] = [c.tokens for c in s.completions]
        return finish(s, *a)

    for module in ("step", "es", "sft"):
        monkeypatch.setattr(f"tinylora.rl.{module}.finish", keep)
    paths = train_population(configs(tmp_path / "together", algorithm, exact=exact))
    for config, path in zip(configs(tmp_path / "alone", algorithm, exact=exact), paths, strict=True):
        solo = Trainer(config)
        assert solo.train()
        for step in range(3):
            assert sampled["together", path.name, step] == sampled["alone", path.name, step]
        mine, its = rows(path), rows(solo.run_directory.path)
        assert [sorted(r) for r in mine] == [sorted(r) for r in its]
        for a, b in zip(mine, its, strict=True):
            for name in a.keys() - set(CLOCK_METRICS) - {"adapter/v"}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
            if "adapter/v" in a:  # Adam divides by the gradient's size: a relative rounding of 1e-6 moves v by lr * 1e-6
                torch.testing.assert_close(torch.tensor(a["adapter/v"]), torch.tensor(b["adapter/v"]), rtol=1e-5, atol=1e-6)
        names = {p.name for p in path.rglob("*") if p.is_file()}
        assert names == {p.name for p in solo.run_directory.path.rglob("*") if p.is_file()}
    assert len({tuple(rows(p)[3].get("adapter/v", ())) for p in paths}) == len(paths), "the members differ"


def test_members_that_cannot_train_together(tmp_path):
    first, second, *_ = configs(tmp_path, "grpo")
    other = TrainConfig(**{**vars(second), "u": 2})
    with pytest.raises(InputError, match="--u"):
        train_population([first, other])
    with pytest.raises(InputError, match="--output-dir"):
        train_population([first, TrainConfig(**{**vars(second), "output_dir": first.output_dir})])
