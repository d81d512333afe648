"""python -m tinylora.sweep: grids, choices that never see the test problems, and going on where it stopped."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tinylora.errors import InputError
from tinylora.rl.trainer import Trainer
from tinylora.studies import sweep
from tinylora.studies.study import config, read_study

STUDY = """
title = "What u does"
seeds = 2
x = "num_parameters"
[settings]
max_steps = 2
prompts_per_step = 2
num_generations = 4
eval_size = 16
validation_size = 16
[[arms]]
name = "RL, {u} numbers"
series = "RL"
u = [1, 3]
choose = {learning_rate = [0.0, 0.05]}
[[arms]]
name = "ES"
algorithm = "es"
sigma = 0.05
[quick]
seeds = 1
max_steps = 1
"""


def run(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert sweep.main(list(arguments)) == 0
    return out.getvalue()


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_study_its_choice_and_going_on(tmp_path):
    study, out = tmp_path / "study.toml", tmp_path / "out"
    study.write_text(STUDY)
    said = run(str(study), "--output-dir", str(out))
    found = results(out)
    assert [(r["arm"], r["seed"], r["x"]) for r in found] == [
        ("RL, 1 numbers", 0, 1), ("RL, 1 numbers", 1, 1), ("RL, 3 numbers", 0, 3), ("RL, 3 numbers", 1, 3),
        ("ES", 0, 13), ("ES", 1, 13),
    ]  # fmt: skip
    assert {r["series"] for r in found} == {"RL", "ES"} and all(r["n"] == 16 and r["steps"] == 2 for r in found)
    assert all(r["settings"]["projection_seed"] == r["seed"] for r in found), "the same draws of P in each arm"
    assert str(tmp_path) not in (out / "results.jsonl").read_text(), "results may be published"
    assert "RL, 3 numbers" in said and "worst..best" in said

    # The choice: by held-out training rows of runs with other seeds, which were never scored on the test problems.
    about = json.loads((out / "study.json").read_text())
    for arm, folder in (("RL, 1 numbers", "rl--1-numbers"), ("RL, 3 numbers", "rl--3-numbers")):
        sums = []
        for option in (0, 1):
            runs = sorted((out / "choice" / folder / f"option-{option}").iterdir())
            assert [p.name for p in runs] == ["seed-1000", "seed-1001"]
            rows = [[json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in runs]
            assert not any("eval/n" in row for run in rows for row in run)
            sums.append(sum([r["validation/accuracy"] for r in run if "validation/accuracy" in r][-1] for run in rows))
        assert about["chosen"][arm] == {"learning_rate": 0.0 if sums[0] >= sums[1] else 0.05}
        assert {r["settings"]["learning_rate"] for r in found if r["arm"] == arm} == set(about["chosen"][arm].values())

    # One run lost and one torn off before its end: the same command makes the same results again, and trains no other.
    kept = (out / "runs" / "es" / "seed-0" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "runs" / "rl--3-numbers" / "seed-0")
    shutil.rmtree(out / "runs" / "rl--3-numbers" / "seed-1" / "adapter")
    # So does one that was interrupted after its first step, which leaves an adapter.
    interrupted = config(json.loads((out / "runs" / "es" / "seed-1" / "config.json").read_text())["settings"], 1, study)
    interrupted = replace(interrupted, output_dir=str(out / "runs" / "es" / "seed-1"))
    assert sweep.finished(interrupted)
    shutil.rmtree(interrupted.output_dir)
    trainer = Trainer(interrupted)
    record = trainer.record
    trainer.record = lambda row: (setattr(trainer, "stop", True), record(row))  # as Ctrl-C does
    assert not trainer.train() and (Path(interrupted.output_dir) / "adapter").is_dir() and not sweep.finished(interrupted)
    run(str(study), "--output-dir", str(out), "--processes", "1")
    assert results(out) == found
    study.write_text(STUDY.replace("sigma = 0.05", "sigma = 0.06"))
    with pytest.raises(InputError, match="seed-0 holds a run with --sigma 0.05, not --sigma 0.06: delete it"):
        sweep.main([str(study), "--output-dir", str(out)])
    assert (out / "runs" / "es" / "seed-0" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == kept


def test_an_arm_is_the_run_of_its_settings(tmp_path):
    """What a study trains in a group is what `tinylora.train` trains alone."""
    study, out = tmp_path / "study.toml", tmp_path / "out"
    study.write_text(STUDY)
    run(str(study), "--output-dir", str(out), "--quick", "--processes", "1")
    settings = {"max_steps": 1, "prompts_per_step": 2, "num_generations": 4, "eval_size": 16, "validation_size": 16}
    alone = Trainer(config(settings | {"algorithm": "es", "sigma": 0.05}, 0, study, str(tmp_path / "alone")))
    assert alone.train()
    files = [p / "adapter" / "adapter_model.safetensors" for p in (tmp_path / "alone", out / "runs" / "es" / "seed-0")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((out / "study.json").read_text())["quick"] and len(results(out)) == 3
    assert not (out / "choice").exists() and {r["settings"]["learning_rate"] for r in results(out)[:2]} == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title =", "titel ="), "unknown keys titel"),
        (("sigma = 0.05", "sigma = -1"), "a positive --sigma"),
        (("sigma = 0.05", "sigmas = 1"), "unknown settings sigmas"),
        (("{u} numbers", "some numbers"), "two arms are named 'RL, some numbers'"),
        (("{u} numbers", "{what} numbers"), "wants 'what'"),
        (("seeds = 2", "seeds = ["), "is not valid TOML"),
        (("0.05]", "-0.05]"), "--learning-rate -0.05"),
    ],
)
def test_a_broken_study_is_refused_before_it_runs(tmp_path, change, message):
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace(*change))
    with pytest.raises(InputError, match=message):
        sweep.main([str(study), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_shipped_studies_can_run():
    """Each is read whole and --quick; whole, an arm has 8 draws of P or more, and SFT's arms are RL's but for the algorithm."""
    files = sorted((Path(sweep.__file__).parents[2] / "recipes" / "studies").glob("*.toml"))
    assert {f.stem for f in files} >= {"parameters", "rl-sft", "tying", "precision", "rank", "es", "scaling"}
    for file in files:
        whole, quick = (read_study(file, quick=q) for q in (False, True))
        assert whole.seeds >= 8 and quick.seeds == 1 and [a.name for a in whole.arms] == [a.name for a in quick.arms]
    arms = read_study(next(f for f in files if f.stem == "rl-sft"), quick=False).arms
    kinds = [{k: v for k, v in a.settings.items() if k not in ("algorithm", "sft_data")} for a in arms]
    assert len(arms) == 16 and all(kinds[i : i + 4] == kinds[:4] for i in (4, 8, 12))
    assert all(a.choose == arms[0].choose for a in arms)
