"""Going on: from a saved adapter, for more steps, on other data, by another algorithm; and what --resume refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_own_task import lines, problems, run, write

from tinylora import export, train
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.errors import InputError
from tinylora.loading import load_adapter
from tinylora.model.loader import load_model
from tinylora.rl.config import TrainConfig
from tinylora.rl.run_directory import CLOCK_METRICS, is_step
from tinylora.rl.trainer import Trainer

SMALL = ["--prompts-per-step", "2", "--num-generations", "4", "--eval-size", "16"]


def steps(path: Path) -> list[dict[str, Any]]:
    rows = lines(path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in rows if is_step(row)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    path = tmp_path_factory.mktemp("going-on") / "run"
    run(train, "--output-dir", str(path), *SMALL, "--max-steps", "3")
    return path


def copy(run_: Path, to: Path) -> Path:
    return Path(shutil.copytree(run_, to))


def test_more_steps_are_the_steps_of_a_longer_run(tmp_path: Path, trained: Path) -> None:
    longer = copy(trained, tmp_path / "longer")
    assert "trained" in run(train, "--output-dir", str(longer), "--resume", "--max-steps", "5")
    run(train, "--output-dir", str(tmp_path / "whole"), *SMALL, "--max-steps", "5")
    assert steps(longer) == steps(tmp_path / "whole")
    assert json.loads((longer / "config.json").read_text())["max_steps"] == 5
    assert [row["step"] for row in lines(longer / "metrics.jsonl") if "eval/n" in row] == [0, 3, 5]
    name = "adapter/adapter_model.safetensors"
    assert (longer / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(InputError, match="4 steps, and the run in .* has 5: more can be had, fewer not"):
        run(train, "--output-dir", str(longer), "--resume", "--max-steps", "4")


def test_a_falling_rate_cannot_be_extended(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    run(train, "--output-dir", path, *SMALL, "--max-steps", "1", "--lr-scheduler-type", "linear", "--eval-size", "0")
    with pytest.raises(
        InputError, match="falls over 1 steps .linear.; with 2 its steps would have been others.*--init-adapter"
    ):
        run(train, "--output-dir", path, "--resume", "--max-steps", "2")


def test_the_first_step_is_sampled_from_the_saved_adapter(tmp_path: Path, trained: Path) -> None:
    """With the same prompts, seeds and step number: the rewards of that v, whose run then goes on from there."""
    path = tmp_path / "more"
    out = run(train, "--init-adapter", str(trained), "--output-dir", str(path), *SMALL, "--max-steps", "2")
    by_hand = Trainer(TrainConfig(**_settings(path), output_dir=str(tmp_path / "hand")))  # from the base
    by_hand.policy.load_v(load_adapter(trained, by_hand.model).v)
    first = by_hand._train_step()
    rows = steps(path)
    assert rows[0]["reward"] == first["reward"] and rows[0]["adapter/v"] == first["adapter/v"]
    assert "initial" in out and "trained" in out
    before, base = (next(r for r in lines(p / "metrics.jsonl") if r["step"] == 0) for p in (path, trained))
    after = next(r for r in lines(trained / "metrics.jsonl") if r["step"] == 3 and "eval/n" in r)
    scores = {k: v for k, v in before.items() if k.startswith("eval/")}
    assert scores == {k: v for k, v in after.items() if k.startswith("eval/")} != {k: base[k] for k in scores}


def _settings(path: Path) -> dict[str, Any]:
    settings = json.loads((path / "config.json").read_text())["settings"]
    drop = ("output_dir", "init_adapter")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k not in drop}


def test_it_resumes_without_the_original(tmp_path: Path, trained: Path) -> None:
    original = copy(trained, tmp_path / "original")
    path = tmp_path / "more"
    run(train, "--init-adapter", str(original), "--output-dir", str(path), *SMALL, "--max-steps", "1", "--eval-size", "0")
    shutil.rmtree(original)
    run(train, "--output-dir", str(path), "--resume", "--max-steps", "2")
    whole = ["--init-adapter", str(trained), "--output-dir", str(tmp_path / "whole")]
    run(train, *whole, *SMALL, "--max-steps", "2", "--eval-size", "0")
    assert steps(path) == steps(tmp_path / "whole")


def test_another_data_set_and_sft_before_grpo(tmp_path: Path) -> None:
    sft = ["--algorithm", "sft", "--output-dir", str(tmp_path / "sft"), "--max-steps", "2", "--prompts-per-step", "8"]
    run(train, *sft, "--eval-size", "0", "--u", "4", "--seed", "7")
    data = write(tmp_path / "rows.jsonl", [{"prompt": q, "answer": n} for q, n in problems(60)])
    more = ["--init-adapter", str(tmp_path / "sft" / "adapter"), "--dataset", "mine", "--data", data, "--max-steps", "2"]
    run(train, *more, "--output-dir", str(tmp_path / "grpo"), *SMALL)
    settings = json.loads((tmp_path / "grpo" / "config.json").read_text())["settings"]
    assert (settings["u"], settings["projection_seed"], settings["seed"]) == (4, 7, 0), "the adapter's shape and P"
    start = load_adapter(tmp_path / "grpo" / "init", load_model("builtin", "cpu")).v.flatten().tolist()
    assert start == steps(tmp_path / "sft")[-1]["adapter/v"] != [0.0] * 4


def test_pefts_directory_starts_a_run(tmp_path: Path, trained: Path) -> None:
    run(export, "--adapter", str(trained), "--model", "builtin", "--to", "peft", "--output", str(tmp_path / "peft"))
    path = tmp_path / "more"
    run(train, "--init-adapter", str(tmp_path / "peft"), "--output-dir", str(path), *SMALL, "--max-steps", "1")
    run(train, "--init-adapter", str(trained), "--output-dir", str(tmp_path / "own"), *SMALL, "--max-steps", "1")
    # their factors are split otherwise, so sums round otherwise
    assert steps(path)[0]["reward"] == pytest.approx(steps(tmp_path / "own")[0]["reward"], abs=0.2)
    assert load_adapter(path, load_model("builtin", "cpu")).v.shape == (1, 13)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--u", "5"], "has u 13, and these settings 5"),
        (["--r", "3"], "has r 2, and these settings 3"),
        (["--n-tie", "4"], "has n_tie all, and these settings 4"),
        (["--basis", "bottom"], "has basis top, and these settings bottom"),
        (["--projection-seed", "3"], "has P of --projection-seed 0, and these settings 3"),
        (["--target-modules", "q_proj", "v_proj"], "adapts .*gate_proj.* and .* more: --target-modules has to name"),
        (["--method", "lora_xs"], "has u 13, and these settings 4"),
        (["--method", "lora"], "--init-adapter is for --method tinylora and lora_xs"),
        (["--model", "builtin-medium"], "was trained on .*28 modules.; this model is .*42 modules"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, trained: Path, flags: list[str], says: str) -> None:
    start = ["--init-adapter", str(trained), "--output-dir", str(tmp_path / "more"), *SMALL, "--max-steps", "1"]
    with pytest.raises((InputError, SystemExit), match=says if "is for" not in says else None):
        run(train, *start, *flags)
    assert not (tmp_path / "more").exists()


def test_an_adapter_of_fewer_modules_is_refused(tmp_path: Path) -> None:
    few = Adapter(load_model("builtin", "cpu"), TinyLoRAConfig(u=13, n_tie="all", target_modules=("q_proj", "v_proj")))
    few.save(tmp_path / "few")
    few_ = {"init_adapter": str(tmp_path / "few"), "output_dir": str(tmp_path / "run")}
    config = TrainConfig(dataset="builtin", max_completion_length=40, eval_size=0, **few_)
    with pytest.raises(InputError, match="does not adapt .*: --target-modules has to name just what it adapts"):
        Trainer(config)


def test_the_kl_is_to_the_reference_that_is_asked_for(tmp_path: Path, trained: Path) -> None:
    """At the first step the policy is the initial adapter: its KL to that one is 0 to the bit, and to the base it is not."""
    found = {}
    for reference in ("base", "initial"):
        flags = ["--init-adapter", str(trained), "--output-dir", str(tmp_path / reference), *SMALL, "--max-steps", "1"]
        run(train, *flags, "--eval-size", "0", "--beta", "0.1", "--kl-reference", reference, "--num-iterations", "1")
        found[reference] = steps(tmp_path / reference)[0]["kl"]
    assert found["initial"] == 0 < found["base"]
    with pytest.raises((InputError, SystemExit)):
        run(train, "--kl-reference", "initial", "--output-dir", str(tmp_path / "none"))


# ---- what --resume refuses ----------------------------------------------------------------------------------------------


def _rows(path: Path, change: Callable[[list[dict[str, Any]]], None] = lambda rows: None) -> None:
    rows = [{"prompt": q, "answer": n, "target": n} for q, n in problems(40)]
    change(rows)
    write(path, rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[3].update(prompt="What is 3?"), "the data of .* changed since it began, in its prompts"),
        (lambda rows: rows[9].update(prompt="What is 3?"), "in its prompts"),  # a held-out one
        (lambda rows: rows[3].update(answer="0"), "in its answers"),
        (lambda rows: rows[3].update(target="0"), "in its columns"),
        (lambda rows: rows.pop(), "in its rows, prompts"),
    ],
    ids=["prompt", "held-out prompt", "answer", "column", "row"],
)
def test_resume_refuses_changed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[dict[str, Any]]], None], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(completions, target, **kwargs):\n    return [1.0] * len(target)\n")
    _rows(tmp_path / "rows.jsonl")
    own = ["--dataset", "mine", "--data", "rows.jsonl", "--reward", "mine.py:f", "--output-dir", "run", *SMALL]
    run(train, *own, "--max-steps", "1", "--dead-steps", "0")
    before = (tmp_path / "run" / "config.json").read_bytes()
    _rows(tmp_path / "rows.jsonl", change)
    with pytest.raises(InputError, match=says):
        run(train, "--output-dir", "run", "--resume", "--max-steps", "2")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    _rows(tmp_path / "rows.jsonl")
    (tmp_path / "mine.py").write_text("def f(completions, target, **kwargs):\n    return [0.0] * len(target)\n")
    with pytest.raises(InputError, match="the source of --reward mine.py:f changed since the run in run began"):
        run(train, "--output-dir", "run", "--resume", "--max-steps", "2")


def test_resume_refuses_another_template(tmp_path: Path, text_model: Callable[[list[str]], Path]) -> None:
    model = text_model([q for q, _ in problems(40)])
    _rows(tmp_path / "rows.jsonl")
    own = ["--model", str(model), "--dataset", "mine", "--data", str(tmp_path / "rows.jsonl"), "--max-completion-length", "4"]
    path = str(tmp_path / "run")
    run(train, *own, "--output-dir", path, *SMALL, "--max-steps", "1", "--reward", "random", "--learning-rate", "0.01")
    template = next(model.glob("chat_template.jinja"))
    template.write_text(template.read_text().replace("<|assistant|>", "<|system|><|assistant|>"))
    with pytest.raises(InputError, match="in its prompts' token ids .the chat template or the tokenizer is another"):
        run(train, "--output-dir", path, "--resume", "--max-steps", "2")


def test_a_run_that_says_nothing_of_its_data_goes_on(tmp_path: Path, trained: Path) -> None:
    """As runs of older versions do."""
    old = copy(trained, tmp_path / "old")
    about = json.loads((old / "config.json").read_text())
    for name in ("data", "reward_sources"):
        del about[name]
    for name in ("init_adapter", "kl_reference", "reward_weights", "log_completions", "sample_steps"):
        del about["settings"][name]
    about["settings"]["reward"] = None
    (old / "config.json").write_text(json.dumps(about))
    run(train, "--output-dir", str(old), "--resume", "--max-steps", "4")
    assert [row["step"] for row in steps(old)] == [1, 2, 3, 4] and torch.isfinite(
        torch.tensor(steps(old)[-1]["adapter/v"])
    ).all()
