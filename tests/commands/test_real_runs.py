"""The committed runs of recipes/real: the pages say what their files say, and no recipe promises what a run is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from recipes.real import tables
from tinylora.rl.config import stored_settings
from tinylora.train import parse

ROOT = Path(__file__).parents[2]
GRID = ROOT / "docs" / "real-models" / tables.GRID
RUNS = [name for name in tables.RUNS if (ROOT / "docs" / "real-models" / name / "metrics.jsonl").exists()]


def test_the_pages_are_what_the_command_writes(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copytree(ROOT / "docs" / "real-models", tmp_path / "docs" / "real-models")
    pages = ("README.md", "docs/real-models.md")
    for page in pages:
        shutil.copy(ROOT / page, tmp_path / page)
    tables.main(tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    assert RUNS and all(f"### {tables.RUNS[name]}\n" in (ROOT / "docs/real-models.md").read_text() for name in RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_of_its_recipe_and_names_no_machine(name: str) -> None:
    """So that --resume goes on from a fresh clone: what is committed has the recipe's settings and no absolute path."""
    folder = ROOT / "docs" / "real-models" / name
    settings = stored_settings(json.loads((folder / "config.json").read_text())["settings"])
    recipe = vars(parse(["--config", str(ROOT / "recipes" / "real" / f"{name}.toml")]).config())
    assert settings | {"data": None, "output_dir": None} == recipe | {"data": None, "output_dir": None}
    assert settings["output_dir"] == f"docs/real-models/{name}" and not Path(settings["data"]).is_absolute()
    assert (folder / "checkpoint").is_dir()
    if (folder / "evaluation").exists():
        settings = json.loads((folder / "evaluation" / "results.json").read_text())["settings"]
        assert not any(str(settings[name]).startswith("/") for name in ("model", "data", "adapter"))
    config = json.loads((folder / "config.json").read_text())
    v = 60 * 25 * config["num_parameters"]  # bytes of every step's v in metrics.jsonl
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.name != "samples.jsonl") < 400_000 + v


def test_the_grid_is_of_one_recipe_and_equal_budgets() -> None:
    """Three rates under each of two prompts, all else as in the default's run, the same problems in the same steps."""
    default = tables.load(GRID.parent / tables.DEFAULT)
    arms = [tables.load(folder) for folder in sorted(GRID.iterdir())]
    assert default is not None and len(arms) == 5
    of = ("prompt_style", "learning_rate", "output_dir")
    settings = default["config"]["settings"]
    seen = {(settings["prompt_style"], round(default["steps"][0]["learning_rate"], 5))}
    for arm in arms:
        assert arm is not None and len(arm["steps"]) == 7
        assert {k: v for k, v in arm["config"]["settings"].items() if k not in of} == {
            k: v for k, v in settings.items() if k not in of
        }
        seen.add((tables.prompt_of(arm), arm["config"]["settings"]["learning_rate"]))
    assert seen == {(prompt, rate) for prompt in ("qwen-boxed", "plain") for rate in (0.001, 0.00303, 0.01)}


SCORED = {"avg@1": 0.5, "greedy": 0.75}


def arm(prompt: str, rate: float, rewards: list[float]) -> dict[str, Any]:
    shares = {"frac_reward_zero_std": 0.25, "completions/clipped_ratio": 0.125, "adapter/relative_change": 0.01}
    steps = [{"reward": reward, "learning_rate": rate, **shares} for reward in rewards]
    return {"config": {"settings": {"prompt_style": prompt}}, "steps": steps}


def test_a_grid_compares_the_later_steps_that_all_arms_took() -> None:
    default, other = arm("b", 0.003, [0.5, 0.1, 0.2, 0.3, 0.9]), arm("b", 0.001, [0.5, 0.2, 0.2, 0.5])
    arms, pooled = tables.grid(default, [other, arm("a", 0.003, [0.4, 0.1, 0.2, 0.3])]).split("\n\n")
    lines = [line.split(" | ") for line in arms.splitlines()[2:]]
    assert [line[4:7] for line in lines] == [
        ["40.0%", "20.0%", "+0.0% ± 0.0%"],
        ["50.0%", "30.0%", "+10.0% ± 5.8%"],  # 10, 0 and 20 points: 10, and 10 / sqrt(3)
        ["50.0%", "20.0%", "the default"],
    ]
    assert all(line[7:] == ["75%", "12.5% |"] for line in lines)
    assert pooled.splitlines()[2:] == [
        "| 0.001 against 0.003 | +10.0% ± 5.8% | +8.8% ± 4.3% |",  # of both prompts' 0.003, 45, 10, 20 and 30 %: 5, 10, 0, 20
        "| a against b | -5.0% ± 2.9% | -6.2% ± 2.4% |",
    ]


def test_the_longest_arm_is_compared_over_the_steps_of_both() -> None:
    default, other = arm("b", 0.003, [0.5, 0.1, 0.9]), arm("a", 0.003, [0.4, 0.4])
    scores = {f"{key}, flexible": {"base": {"accuracy": 0.25}, "trained": {"accuracy": by}} for key, by in SCORED.items()}
    lines = tables.longest(default | {"results": {"scores": scores}}, other).splitlines()
    assert lines[0].split(" | ")[2] == "reward, steps 1-2"
    assert lines[2:] == [
        "| b | 0.003 | 30.0% | the default | 25.0% -> 50.0% | 25.0% -> 75.0% |",
        "| a | 0.003 | 40.0% | +10.0% ± 20.0% | not evaluated | not evaluated |",  # -10 and +30 points
    ]


def run_with(strict: tuple[float, float, float], flexible: float) -> dict[str, Any]:
    """strict: base, trained, and the low end of its paired interval."""
    base, trained, low = strict
    cell = {"base": {"accuracy": base}, "trained": {"accuracy": trained}, "paired": {"gain": trained - base, "low": low}}
    return {"results": {"scores": {"avg@1, strict": cell, "avg@1, flexible": {"paired": {"gain": flexible}}}}}


@pytest.mark.parametrize(
    ("strict", "flexible", "says"),
    [
        ((0.1, 0.3, 0.1), 0.05, "75% of the strict gain is format"),
        ((0.1, 0.3, 0.1), -0.1, "100% of the strict gain is format"),
        ((0.1, 0.2, 0.05), 0.12, "0% of the strict gain is format"),
        ((0.2, 0.21, -0.02), -0.03, "no strict gain beyond chance, so there is none of which a share could be format"),
        ((0.0, 0.0, 0.0), 0.1, "strict is 0 % throughout, so it says nothing about format"),
    ],
)
def test_the_share_that_is_format(strict: tuple[float, float, float], flexible: float, says: str) -> None:
    assert tables.form(run_with(strict, flexible)).endswith(f": {says}.")


def test_an_evaluation_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Other temperature than the run's, several samples, and a run without a step."""
    folder = tmp_path / RUNS[0]
    shutil.copytree(ROOT / "docs" / "real-models" / "smollm2-words", folder)
    path = folder / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    for name, value, says in (("temperature", 1.0, "temperature 1.0, where"), ("num_generations", 4, "one sampled answer")):
        path.write_text(json.dumps(results | {"settings": results["settings"] | {name: value}}))
        with pytest.raises(SystemExit, match=says):
            tables.load(folder)
    path.unlink()
    rows = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(rows + '{"step": 61, "rew')  # being written
    assert len(tables.load(folder)["steps"]) == 60
    (folder / "metrics.jsonl").write_text(rows.splitlines()[0] + "\n")  # step 0's evaluation alone
    assert tables.load(folder) is None
