"""The commands end to end: the default job, resuming after kill -9, real text, and every error a user can make."""

import contextlib
import io
import itertools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tinylora import evaluate, train
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.errors import InputError
from tinylora.loading import load_adapter
from tinylora.model.loader import load_model
from tinylora.rl import step as step_module
from tinylora.rl.config import RELATIVE_STEP, TrainConfig
from tinylora.rl.dead import _readings
from tinylora.rl.rewards import random_rewards
from tinylora.rl.run import learning_rate_of
from tinylora.rl.run_directory import CLOCK_METRICS
from tinylora.rl.trainer import Trainer
from tinylora.tasks.grader import GraderPool
from tinylora.tasks.grading import Verdict

ROOT = Path(__file__).parents[2]
SHORT = ["--eval-size", "32", "--prompts-per-step", "4", "--num-generations", "4"]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def timeless(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in rows(path)]


def adapter_bytes(path: Path) -> bytes:
    return b"".join((path / "adapter" / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))


def run(*arguments: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return train.main(list(arguments))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tinylora.train", *arguments]


def test_default_job(tmp_path):
    """`python -m tinylora.train` and nothing else: 13 numbers, and the accuracy the README promises, on 1024 problems."""
    done = subprocess.run(command("--output-dir", str(tmp_path / "run")), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["num_parameters"] == 13 and about["max_steps"] == 40
    metrics = rows(tmp_path / "run")
    before, after = [r for r in metrics if "eval/n" in r]
    assert before["eval/n"] == after["eval/n"] == 1024
    assert 0.35 <= before["eval/accuracy"] <= 0.50 and before["eval/accuracy_greedy"] < 0.30
    assert after["eval/accuracy"] >= 0.65 and after["eval/accuracy_greedy"] >= 0.90
    steps = [r for r in metrics if "reward" in r]
    assert [r["step"] for r in steps] == list(range(1, 41))
    assert max(r["sampling/sampling_logp_difference/max"] for r in steps) < 1e-4
    assert all(len(r["adapter/v"]) == 13 for r in steps)

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert evaluate.main(["--adapter", str(tmp_path / "run")]) == 0
    result = json.loads(out.getvalue().splitlines()[-1])
    scores = {k: v for k, v in after.items() if k.startswith("eval/")}
    assert {k: result[k] for k in scores} == scores
    assert result["gain_low"] >= 0.20, "the paired gain's lower 95 % bound"
    shutil.rmtree(tmp_path / "run" / "adapter")


def test_same_seed_same_bits_other_seed_other(tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run("--output-dir", str(tmp_path / name), "--seed", seed, "--max-steps", "4", *SHORT) == 0
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    assert adapter_bytes(tmp_path / "a") != adapter_bytes(tmp_path / "c")


@pytest.mark.parametrize("save_steps", ["1", "5"])
def test_kill_9_and_resume(tmp_path, save_steps):
    """Killed at random moments (after its first output), resumed each time: the same adapter and metrics, clocks apart."""
    settings = ["--max-steps", "30", "--eval-steps", "10", "--save-steps", save_steps, *SHORT]
    assert run("--output-dir", str(tmp_path / "whole"), *settings) == 0
    broken = tmp_path / "broken"
    chance = random.Random(int(save_steps))
    kills = 0
    for _ in range(5 if save_steps == "1" else 2):
        resume = ["--resume"] if (broken / "config.json").exists() else []
        process = subprocess.Popen(
            command("--output-dir", str(broken), *settings, *resume),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        process.stdout.readline()  # everything is loaded; the run is on
        time.sleep(chance.uniform(0.0, 0.9))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2, "the run ended before it could be killed"
    assert run("--output-dir", str(broken), *settings, "--resume") == 0
    assert adapter_bytes(broken) == adapter_bytes(tmp_path / "whole")
    assert timeless(broken) == timeless(tmp_path / "whole")
    assert {p.name for p in broken.iterdir() if not p.name.endswith(".partial")} == {
        p.name for p in (tmp_path / "whole").iterdir()
    }


def test_torn_row_and_missing_row_are_mended(tmp_path):
    """What a kill can leave: a torn last line, or a checkpoint whose row was never written."""
    settings = ["--max-steps", "4", *SHORT]
    assert run("--output-dir", str(tmp_path / "a"), *settings) == 0
    whole = timeless(tmp_path / "a")
    for tear in (lambda text: text[:-20], lambda text: "".join(text.splitlines(keepends=True)[:-2])):
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        metrics = tmp_path / "b" / "metrics.jsonl"
        metrics.write_text(tear(metrics.read_text()))
        assert run("--output-dir", str(tmp_path / "b"), "--resume") == 0
        assert timeless(tmp_path / "b") == whole
        shutil.rmtree(tmp_path / "b")


def test_ctrl_c_finishes_the_step(tmp_path):
    settings = ["--max-steps", "30", *SHORT]
    process = subprocess.Popen(
        command("--output-dir", str(tmp_path / "run"), *settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    while not (tmp_path / "run" / "checkpoint").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in out
    last = rows(tmp_path / "run")[-1]["step"]
    assert 1 <= last < 30 and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert run("--output-dir", str(tmp_path / "run"), "--resume") == 0
    assert run("--output-dir", str(tmp_path / "whole"), *settings) == 0
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_any_step_can_be_restored(tmp_path):
    """v of step 2 from the metrics of a longer run is the adapter of a run that ended there."""
    path = tmp_path / "run"
    assert run("--output-dir", str(path), "--max-steps", "4", *SHORT) == 0
    assert run("--output-dir", str(tmp_path / "two"), "--max-steps", "2", *SHORT) == 0
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate.main(["--adapter", str(path), "--adapter-step", "2", "--eval-size", "32"])
        evaluate.main(["--adapter", str(tmp_path / "two"), "--eval-size", "32"])
    results = [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")]
    assert results[0] == results[1]
    with pytest.raises(InputError, match="no step 9"):
        evaluate.main(["--adapter", str(path), "--adapter-step", "9"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_param_dtype_is_what_is_saved_and_used(tmp_path, dtype):
    path = tmp_path / "run"
    assert run("--output-dir", str(path), "--max-steps", "3", "--param-dtype", dtype, *SHORT) == 0
    v = torch.tensor(rows(path)[-2]["adapter/v"])
    assert v.abs().max() > 0 and torch.equal(v, v.to(getattr(torch, dtype)).float())


# ---- rewards ------------------------------------------------------------------------------------------------------------


REWARDS = """
def nothing(completions, **_): return [0.0] * len(completions)
def everything(completions, **_): return [1.0] * len(completions)
def unsure(completions, answer, **_): return [None if i % 2 else float(i % 3) for i in range(len(completions))]
async def later(completions, **_): return [float(len(c[0]["content"])) for c in completions]
def raises(completions, **_): return 1 / 0
def short(completions, **_): return [1.0]
def looks(prompts, completions, completion_ids, question, solution, trainer_state, log_metric, **_):
    n = len(completions)
    assert len(prompts) == len(completion_ids) == len(question) == len(solution) == n
    assert completions[0][0]["role"] == "assistant" and prompts[0][-1]["role"] == "user"
    log_metric("seen", trainer_state.global_step)
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


@pytest.mark.parametrize(("name", "kind"), [("nothing", "all wrong"), ("everything", "all right")])
def test_a_dead_batch_is_named(tmp_path, rewards, capsys, name, kind):
    path = tmp_path / "run"
    assert run("--output-dir", str(path), "--max-steps", "2", "--reward", f"my_rewards:{name}", *SHORT) == 0
    for row in rows(path)[1:3]:
        assert row["frac_reward_zero_std"] == 1 and row["frac_reward_zero_std/" + kind.replace(" ", "_")] == 1
        assert row["grad_norm"] == 0 and row["adapter/norm"] == row["adapter/relative_change"] == 0
    assert f"DEAD BATCH: every group is {kind}" in capsys.readouterr().err


def test_a_reward_function_sees_trls_arguments(tmp_path, rewards):
    path = tmp_path / "run"
    assert run("--output-dir", str(path), "--max-steps", "2", "--reward", "my_rewards:looks", *SHORT) == 0
    steps = [r for r in rows(path) if "reward" in r]
    assert [r["seen"] for r in steps] == [0, 1]
    assert all(r["reward"] == pytest.approx(r["completions/mean_length"], rel=1e-6) for r in steps)
    assert all("rewards/looks/mean" in r for r in steps)


def test_an_async_reward_function_is_awaited(tmp_path, rewards):
    assert run("--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--reward", "my_rewards:later", *SHORT) == 0
    assert rows(tmp_path / "run")[1]["rewards/later/mean"] > 1


def test_unscorable_completions_carry_no_gradient(tmp_path, rewards):
    assert run("--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--reward", "my_rewards:unsure", *SHORT) == 0
    row = rows(tmp_path / "run")[1]
    assert row["reward"] == pytest.approx(sum((0, 2, 1, 0, 2, 1, 0, 2)) / 8) and row["grad_norm"] > 0


# ---- real text ----------------------------------------------------------------------------------------------------------


def test_gsm8k_end_to_end(tmp_path, text_model, rewards):
    """Real questions through prompts, template, rollout, grading and update, with a random model and its own tokenizer."""
    data = ROOT.parent / "shared" / "data" / "gsm8k"
    if not data.is_dir():
        pytest.skip(f"needs GSM8K as JSONL in {data}")
    lines = (data / "train.jsonl").read_text().splitlines()[:200]
    model = text_model([json.loads(line)["question"] + json.loads(line)["answer"] for line in lines])
    path = tmp_path / "run"
    base = ["--model", str(model), "--dataset", "gsm8k", "--data", str(data), "--output-dir", str(path), "--max-steps", "2"]
    base += [
        "--max-completion-length",
        "24",
        "--eval-size",
        "8",
        "--u",
        "1",
        "--n-tie",
        "4",
        "--prompts-per-step",
        "4",
        "--extractor",
        "flexible",
    ]
    # A random model is never right, so the length is the reward: what is learned does not matter here, that it moves does.
    assert run(*base, "--reward", "my_rewards:looks") == 0
    metrics = rows(path)
    assert metrics[0]["eval/n"] == 8 and metrics[-1]["eval/n"] == 8
    for name, least in (("adapter/norm", 0), ("adapter/relative_change", 0), ("completions/mean_length", 1)):
        assert metrics[2][name] > least
    assert json.loads((path / "config.json").read_text())["num_parameters"] == 4


GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


def test_twenty_steps_of_gsm8k_through_the_graders_processes(tmp_path, text_model, monkeypatch):
    """Every completion is graded in a process, some while others are still being generated; waiting for verdicts takes
    under 5 % of the steps' time."""
    if not GSM8K.is_dir():
        pytest.skip(f"needs GSM8K as JSONL in {GSM8K}")
    texts = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text().splitlines()[:200]]
    model = text_model([row["question"] + row["answer"] for row in texts])
    during, all_of_them = [], []
    submit, roll_out = GraderPool.submit, step_module.rollout
    generating = [False]

    def watched(self, *job):
        all_of_them.append(job)
        during.extend([job] * generating[0])
        return submit(self, *job)

    def noted(*arguments, **named):
        generating[0] = True
        try:
            return roll_out(*arguments, **named)
        finally:
            generating[0] = False

    monkeypatch.setattr(GraderPool, "submit", watched)
    monkeypatch.setattr(step_module, "rollout", noted)
    flags = ["--model", str(model), "--data", str(GSM8K), "--max-steps", "20", "--max-completion-length", "128"]
    flags += [
        "--num-generations",
        "4",
        "--eval-size",
        "0",
        "--prompts-per-step",
        "8",
        "--extractor",
        "flexible",
        "--dead-steps",
        "0",
        "--temperature",
        "2",
    ]
    assert run("--output-dir", str(tmp_path / "run"), *flags) == 0
    steps = [r for r in rows(tmp_path / "run") if "reward" in r]
    assert len(steps) == 20 and len(all_of_them) == 20 * 8 * 4
    assert all(r["grader/timeout"] == r["grader/crash"] == 0 and 0 <= r["accuracy/flexible"] <= 1 for r in steps)
    assert during, "nothing was graded while the model generated"
    steady = steps[1:]  # the first waits for the processes to come up
    share = sum(r["reward_time"] for r in steady) / sum(r["step_time"] for r in steady)
    print(f"waiting for verdicts took {share:.1%} of the time, {len(during)} of {len(all_of_them)} came while generating")
    assert share < 0.05


@pytest.mark.parametrize("style", ["auto", "qwen-boxed", "gsm8k-hash", "plain"])
def test_show_prompt(tmp_path, text_model, capsys, style):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "What is 1 + 1?", "answer": "#### 2"}\n')
    model = text_model(["What is 1 + 1?"])
    flags = ["--model", str(model), "--data", str(file), "--prompt-style", style, "--output-dir", str(tmp_path / "run")]
    assert train.main([*flags, "--show-prompt"]) == 0
    user = "<|user|>What is 1 + 1?"
    boxed = f"<|system|>Please reason step by step, and put your final answer within \\boxed{{}}.{user}<|assistant|>\n"
    assert (
        capsys.readouterr().out
        == {
            "auto": boxed,
            "qwen-boxed": boxed,
            "gsm8k-hash": user + ' Let\'s think step by step and output the final answer after "####".<|assistant|>\n',
            "plain": user + "<|assistant|>\n",
        }[style]
    )
    assert not (tmp_path / "run").exists()


def test_any_data_with_a_prompt_column(tmp_path, text_model, rewards):
    """No gold answers: the user's function alone, and no accuracy."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {i}", "question": i, "solution": "-"}) + "\n" for i in range(30)))
    flags = ["--model", str(text_model(["Say 1 2 3"])), "--dataset", "mine", "--data", str(file), "--n-tie", "4"]
    flags += ["--max-completion-length", "16", "--max-steps", "2", "--prompts-per-step", "4"]
    assert run("--output-dir", str(tmp_path / "run"), *flags, "--reward", "my_rewards:looks") == 0
    found = rows(tmp_path / "run")
    steps = [r for r in found if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2] and all(r["reward"] > 0 for r in steps)
    assert [r["eval/n"] for r in found if r not in steps] == [3, 3] and not any("accuracy" in k for r in found for k in r)
    with pytest.raises(InputError, match="no gold answer"):
        run("--output-dir", str(tmp_path / "other"), *flags)


# ---- controls -----------------------------------------------------------------------------------------------------------


def test_random_reward_is_a_fair_coin_that_knows_no_answer(tmp_path):
    """And the same coin for the same seed and step."""
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run("--output-dir", str(tmp_path / name), "--reward", "random", "--seed", seed, "--max-steps", "3", *SHORT) == 0
    steps = [r for r in rows(tmp_path / "a") if "reward" in r]
    assert all("rewards/random/mean" in r and 0 < r["reward"] < 1 for r in steps)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    flips = torch.tensor([random_rewards(64, seed, step) for seed in range(10) for step in range(100)])  # (1000, 64)
    assert abs(flips.mean().item() - 0.5) < 4 * 0.5 / 64_000**0.5
    assert len({tuple(row) for row in flips.tolist()}) == 1000


def test_format_only_reward_pays_for_any_answer(tmp_path):
    """Nearly every completion of the built-in base ends with "#### n", with seed 1 all of ten steps: nothing to learn, and it
    stops. (With seed 0 one of the seventh step is "#### 15=8", which strict does not read.)"""
    out = io.StringIO()
    path = tmp_path / "run"
    with contextlib.redirect_stdout(out):
        assert train.main(["--output-dir", str(path), "--reward", "format-only", "--seed", "1", *SHORT]) == 1
    steps = [r for r in rows(path) if "reward" in r]
    assert [r["step"] for r in rows(path) if "eval/n" in r] == [0, 10], "it is scored where it stopped"
    assert "trained" in out.getvalue(), "with the table"
    assert len(steps) == 10 and all(r["reward"] == 1 and r["frac_reward_zero_std/all_right"] == 1 for r in steps)
    assert "stopped after step 10: nothing to learn from in the last 10 steps" in out.getvalue()
    assert "there is no good step" in out.getvalue()


def test_ten_dead_steps_stop_the_run_and_name_the_last_good_one(tmp_path):
    """A learning rate ten times too high ruins the model at its first step. Resumed, the run does not go on for ever."""
    path, out = tmp_path / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert train.main(["--output-dir", str(path), "--learning-rate", "0.1", "--max-steps", "60", "--eval-size", "0"]) == 1
    dead = [r["frac_reward_zero_std"] == 1 for r in rows(path)]
    good = max(i + 1 for i, d in enumerate(dead) if not d)
    assert len(dead) == good + 10 and all(dead[good:])
    assert (
        f"the last good step is {good} (python -m tinylora.evaluate --adapter {path} --adapter-step {good})" in out.getvalue()
    )
    assert run("--output-dir", str(path), "--resume") == 1
    assert len(rows(path)) <= good + 11


def test_the_best_adapter_is_chosen_on_held_out_training_rows(tmp_path, monkeypatch):
    path, scored = tmp_path / "run", []
    original = Trainer._scores

    def noted(self, some, matrices):
        scored.append({row["question"] for row in some})
        return original(self, some, matrices)

    monkeypatch.setattr(Trainer, "_scores", noted)
    flags = [
        "--eval-steps",
        "5",
        "--validation-size",
        "48",
        "--max-steps",
        "15",
        "--eval-size",
        "32",
        "--learning-rate",
        "0.02",
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main(["--output-dir", str(path), *flags]) == 0
    validated = {r["step"]: r["validation/accuracy"] for r in rows(path) if "validation/accuracy" in r}
    assert list(validated) == [0, 5, 10, 15]
    assert [r["step"] for r in rows(path) if "eval/n" in r] == [0, 15], "the test rows are scored before and after alone"
    best = max(validated, key=lambda step: validated[step])
    assert best > 0 and f"best on held-out training rows: step {best}, in {path / 'best'}" in out.getvalue()
    assert json.loads((path / "best" / "validation.json").read_text())["step"] == best
    v = next(r["adapter/v"] for r in rows(path) if r["step"] == best and "adapter/v" in r)
    model = load_model("builtin", "cpu")
    assert load_adapter(path / "best", model).v.flatten().tolist() == v
    trainer = Trainer(train.parse(["--output-dir", str(tmp_path / "other"), *flags]).config())
    held_out = {row["question"] for row in trainer.inputs.validation_rows}
    assert len(held_out) == 48 and not held_out & {row["question"] for row in trainer.train_rows}
    assert {frozenset(s) for s in scored} == {
        frozenset(held_out),
        frozenset(row["question"] for row in trainer.inputs.test_rows),
    }


def test_the_last_checkpoint_is_not_the_best_where_it_got_worse(tmp_path, monkeypatch):
    """Scores of held-out rows as given here: 0.2 for the base, then 0.3, 0.5, 0.4."""
    given = iter([0.2, 0.3, 0.5, 0.4])

    class Given:
        def metrics(self):
            return {"eval/accuracy": next(given)}

    monkeypatch.setattr(Trainer, "_scores", lambda *_: Given())
    path = tmp_path / "run"
    flags = ["--eval-steps", "1", "--max-steps", "3", "--eval-size", "0", "--prompts-per-step", "4"]
    assert run("--output-dir", str(path), *flags) == 0
    assert json.loads((path / "best" / "validation.json").read_text()) == {"step": 2, "validation/accuracy": 0.5}
    assert (path / "best" / "adapter_model.safetensors").read_bytes() != (
        path / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("basis", ["random", "bottom"])
def test_other_subspaces_train_and_load(tmp_path, basis):
    path = tmp_path / "run"
    assert run("--output-dir", str(path), "--basis", basis, "--max-steps", "2", *SHORT) == 0
    assert rows(path)[2]["adapter/norm"] > 0
    assert json.loads((path / "adapter" / "adapter_config.json").read_text())["basis"] == basis
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate.main(["--adapter", str(path), "--eval-size", "32"])
    last = rows(path)[-1]
    assert json.loads(out.getvalue().splitlines()[-1])["eval/accuracy"] == last["eval/accuracy"]


# ---- recipes ------------------------------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_has_a_plan_from_config_files_alone(recipe, capsys, monkeypatch):
    """No weights, no tokenizer, no rows: the trained numbers are those of the file's name, and what a step holds adds up."""
    monkeypatch.setattr("tinylora.train.Trainer", None)
    monkeypatch.setattr("tinylora.rl.dry_run.resolve_model", None)
    monkeypatch.setattr("tinylora.rl.dry_run.load_task", None)
    assert train.main(["--config", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    numbers = int(recipe.stem.rsplit("-", 1)[1])
    assert f"trained numbers  {numbers} ({4 * numbers} bytes in float32)" in out
    config = train.parse(["--config", str(recipe)])
    assert f"model            {config.model}:" in out and "(the question)" in out
    assert f"{config.prompts_per_step} prompts x {config.num_generations} completions" in out
    text = recipe.read_text()
    assert "# The paper gives:" in text and "# It does not give:" in text and "# We chose:" in text
    assert config.learning_rate <= 2e-4 and config.warmup_steps == 10 and config.max_grad_norm == 0


def test_there_is_a_recipe_for_every_run_of_the_paper():
    sizes = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "llama-3.2-3b", "llama-3.1-8b")
    names = {f"gsm8k-{size}-{count}" for size in sizes for count in (1, 13, 196)}
    names |= {f"math-{size}-{count}" for size in ("qwen2.5-3b", "qwen2.5-7b", "qwen2.5-math-7b") for count in (13, 196)}
    assert {path.stem for path in RECIPES} == names
    seven = train.parse(["--config", str(ROOT / "recipes" / "gsm8k-qwen2.5-7b-13.toml")])
    assert (seven.prompts_per_step, seven.num_generations, seven.learning_rate, seven.n_tie, seven.u) == (16, 4, 2e-4, 16, 1)
    assert (seven.lr_scheduler_type, seven.warmup_steps, seven.max_grad_norm, seven.beta) == ("constant", 10, 0.0, 0.0)


def test_the_plans_figures(capsys):
    """Qwen2.5-7B: the 7,615,616,512 weights that its checkpoint has, 57,344 bytes a token."""
    assert train.main(["--config", str(ROOT / "recipes" / "gsm8k-qwen2.5-7b-13.toml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    layer = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944
    assert "28 layers, 7,615,616,512 weights in bfloat16" in out
    assert "weights 15.2 GB" in out and "keys and values 57.3 kB a token" in out
    assert "adapted modules  196, in 13 groups (tiled, n_tie 16), basis top" in out
    assert f"at most {64 * (200 + 4096):,} tokens" in out
    # 4 FLOP for each weight of a layer or of the head and each token, at 770 TFLOP/s
    assert f"update {4 * (28 * layer + 152064 * 3584) * 64 * 4296 / 770e12:.2f} s" in out


def test_a_plan_with_the_models_own_tokenizer(tmp_path, text_model, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "What is 1 + 1?", "answer": "#### 2"}\n')
    model = text_model(["What is 1 + 1?"])
    (model / "model.safetensors").unlink()
    flags = ["--model", str(model), "--data", str(file), "--output-dir", str(tmp_path / "run")]
    assert train.main([*flags, "--num-parameters", "4", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "trained numbers  4 (16 bytes in float32)" in out and "<|user|>What is 1 + 1?" in out
    assert "learning rate    0.2% of |W| a step" in out
    assert not (tmp_path / "run").exists()


# ---- errors -------------------------------------------------------------------------------------------------------------


def fails(capsys, *arguments: str) -> str:
    """Run the real entry point; one clear message, exit code 2. Returns it on one line."""
    from tinylora.cli import run_command

    before, sys.argv = sys.argv, ["tinylora.train", *arguments]
    try:
        with pytest.raises(SystemExit) as caught:
            run_command(train.main)
    finally:
        sys.argv = before
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "/no/such/model"], "--model /no/such/model: no such directory"),
        (["--u", "0"], "--u 0: it must be at least 1"),
        (["--n-tie", "0"], "--n-tie 0"),
        (["--num-generations", "1"], "--num-generations 1"),
        (["--temperature", "0"], "--temperature 0"),
        (["--top-p", "0"], "--top-p 0"),
        (["--r", "1000"], "--r 1000: the smallest adapted weight has only 64"),
        (["--prompts-per-step", "100000"], "--prompts-per-step 100000"),
        (["--max-completion-length", "256"], "0 usable prompts"),
        (["--data", "x.jsonl"], "--data needs a task"),
        (["--dataset", "gsm8k", "--data", "/no/such.jsonl"], "cannot read /no/such.jsonl"),
        (["--reward", "no_such_module:f"], "--reward no_such_module:f"),
        (["--reward", "math"], "--reward math"),
        (["--config", "/no/such.toml"], "--config /no/such.toml"),
        (["--resume"], "--resume needs --output-dir"),
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--learning-rate", "fast"], "learning-rate"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_flags(tmp_path, capsys, arguments, says):
    out = [] if "--resume" in arguments else ["--output-dir", str(tmp_path / "run")]
    assert says in fails(capsys, *arguments, *out)
    assert not list(tmp_path.iterdir()), "nothing may be written"


def test_bad_data(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    for content, says in (
        ('{"prompt": "x", "answer": "#### 1"}\n', "row 1: no text column 'question'"),
        ('{"question": "x", "answer": "1"}\n', "row 1: the answer does not end in '#### number'"),
        ('{"question": "x"\n', "line 1 is not JSON"),
        ("", "has no rows"),
    ):
        file.write_text(content)
        assert says in fails(capsys, "--dataset", "gsm8k", "--data", str(file), "--output-dir", str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_bad_config_file(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("learning-rat = 1\n")
    assert "unknown settings learning_rat" in fails(capsys, "--config", str(file))
    file.write_text("learning-rate = \n")
    assert "not valid TOML" in fails(capsys, "--config", str(file))


def test_config_file_and_flags(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('learning-rate = 0.5\nu = 3\ntarget-modules = ["q_proj", "o_proj"]\nn_tie = 4\n')
    config = train.parse(["--config", str(file), "--u", "2"])
    assert (config.learning_rate, config.u, config.n_tie, config.target_modules) == (0.5, 2, 4, ("q_proj", "o_proj"))
    assert config.dataset == "builtin" and config.num_generations == 8, "the built-in preset holds where nothing is said"
    assert train.parse(["--eval-every", "7"]).eval_steps == train.parse(["--eval-steps", "7"]).eval_steps == 7
    real = train.parse(["--model", "Qwen/Qwen2.5-7B-Instruct"])
    assert (real.dataset, real.u, real.n_tie, real.learning_rate) == ("gsm8k", 13, "all", None)
    assert (real.extractor, config.extractor) == ("flexible", "strict")


def test_num_parameters(tmp_path, capsys):
    config = train.parse(["--num-parameters", "7", "--max-steps", "3"])
    assert (config.u, config.n_tie, config.max_steps, config.num_parameters) == (7, "all", 3, None)
    file = tmp_path / "run.toml"
    file.write_text("num-parameters = 5\n")
    assert train.parse(["--config", str(file)]).u == 5
    assert train.parse(["--config", str(file), "--num_parameters=6"]).u == 6
    for flags in (["--u", "2"], ["--n-tie=4"]):
        assert f"--num-parameters 5 and {flags[0].split('=')[0]}: give one of them (it is in the --config file)" in fails(
            capsys, "--config", str(file), *flags
        )
    file.write_text("n-tie = 4\n")
    assert "--num-parameters 3 and --n-tie" in fails(capsys, "--config", str(file), "--num-parameters", "3")
    assert "--method lora_xs has a count" in fails(capsys, "--num-parameters", "3", "--method", "lora_xs")
    assert "must be a whole number" in fails(capsys, "--num-parameters", "many")
    for few in ("0", "-3"):
        assert f"--num-parameters {few}: it must be a whole number, at least 1" in fails(capsys, f"--num-parameters={few}")


def test_the_command_that_scores_a_step_again(tmp_path):
    """Of the built-in job nothing has to be said; of another run what evaluate would not take by itself."""
    wanted = f"python -m tinylora.evaluate --adapter {tmp_path} --adapter-step 3"
    assert train._evaluation(train.parse([]), tmp_path, 3) == wanted
    flags = ["--model", "M.gguf", "--data", "D", "--prompt-style", "plain", "--temperature", "0.5", "--dtype", "bfloat16"]
    said = train._evaluation(train.parse([*flags, "--dataset", "own"]), tmp_path, 3)
    given = ("--model M.gguf", "--dataset own", "--data D", "--prompt-style plain", "--temperature 0.5", "--dtype bfloat16")
    assert all(one in said for one in given)
    assert "--temperature" not in train._evaluation(train.parse(["--algorithm", "es"]), tmp_path, 3)


def test_the_learning_rate_of_a_model_comes_from_its_factors(tmp_path, tiny_model):
    """A first step of Adam, every number by the rate, changes the adapted weights by RELATIVE_STEP of their norm: as a root
    mean square over all signs."""
    model = load_model(str(tiny_model("qwen2")))
    adapter = Adapter(model, TinyLoRAConfig(u=3, n_tie="all"))
    rate = learning_rate_of(adapter, TrainConfig(model="some", u=3))
    squares = []
    for signs in itertools.product((1.0, -1.0), repeat=3):
        adapter.load_v(rate * torch.tensor([signs]))
        squares.append(adapter.relative_change() ** 2)
    assert math.sqrt(sum(squares) / 8) == pytest.approx(RELATIVE_STEP, rel=1e-4)
    assert learning_rate_of(adapter, TrainConfig(model="some", u=3, learning_rate=0.5)) == 0.5


@pytest.mark.parametrize("extractor", ["strict", "flexible"])
def test_a_dead_first_step_is_explained(tmp_path, text_model, monkeypatch, capsys, extractor):
    """A random model that answers 7 to everything: right, but not in the format; or wrong."""
    file = tmp_path / "rows.jsonl"
    answer = 7 if extractor == "strict" else 8
    rows_ = [{"question": f"What is {i} + {answer - i}?", "answer": f"#### {answer}"} for i in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    model = text_model(["What is 1 + 1?"])
    monkeypatch.setattr("tinylora.engine.text.Text.decode", lambda self, tokens: "I say 7.")
    flags = ["--model", str(model), "--data", str(file), "--eval-size", "0", "--max-completion-length", "4", "--max-steps", "2"]
    flags += ["--prompts-per-step", "2", "--num-generations", "4", "--extractor", extractor, "--dead-steps", "0"]
    assert train.main(["--output-dir", str(tmp_path / "run"), *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("nothing to learn from: all 8 rewards are 0.") == 1, "after the first step, once"
    assert "of 8 completions were cut off at 4 tokens: raise --max-completion-length" in out
    assert f"a sample, to a problem whose answer is {answer}:" in out and "| I say 7." in out
    if extractor == "strict":
        assert "0 of 8 are right as --extractor strict reads them; 0 hold an answer" in out
        assert "8 of 8 are right as --extractor flexible reads them." in out
    else:
        assert "0 of 8 are right as --extractor flexible reads them; 8 hold an answer" in out
        assert "too hard" not in out, "most were cut off, which comes first"


@pytest.mark.parametrize(
    ("answers", "right", "cut", "says"),
    [("7777", "....", False, "too hard"), ("7777", "xxxx", False, "too easy"), ("7...", "....", False, "--prompt-style")]
    + [("7777", "....", True, None)],
)
def test_what_helps_a_dead_step(answers, right, cut, says):
    """By what answers say (. is none), which are right (x), and whether most were cut off."""
    verdicts = [
        Verdict({"strict": None, "flexible": None if a == "." else a}, {"strict": False, "flexible": x == "x"})
        for a, x in zip(answers, right, strict=True)
    ]
    lines = _readings(verdicts, "flexible", cut)
    assert len(lines) == (1 if says is None else 2) and (says is None or says in lines[1])


def test_bad_output_directories(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    short = ["--max-steps", "1", *SHORT]
    assert "cannot be written" in fails(capsys, "--output-dir", str(tmp_path / "file" / "run"), *short)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    assert "is not empty" in fails(capsys, "--output-dir", str(tmp_path / "full"), *short)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert run("--output-dir", str(tmp_path / "run"), *short) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "already holds a run" in fails(capsys, "--output-dir", str(tmp_path / "run"), *short)
    different = fails(capsys, "--output-dir", str(tmp_path / "run"), "--resume", "--learning-rate", "0.5")
    assert "different run: learning_rate was 0.01, now 0.5" in different
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_reward_function_that_fails_names_itself_and_loses_nothing(tmp_path, rewards, capsys):
    for name, says in (("raises", "raised ZeroDivisionError"), ("short", "returned 1, not a list of 32 rewards")):
        path = tmp_path / name
        assert says in fails(capsys, "--output-dir", str(path), "--reward", f"my_rewards:{name}", "--max-steps", "1", *SHORT)
        assert (path / "config.json").exists() and not (path / "adapter").exists()


def test_missing_chat_template(tmp_path, capsys, tiny_model):
    path = tiny_model("qwen2")
    assert "tokenizer.json" in fails(
        capsys, "--model", str(path), "--dataset", "builtin", "--output-dir", str(tmp_path / "run")
    )


def test_trainer_writes_nothing_before_everything_is_checked(tmp_path, monkeypatch):
    """The last thing construction does is to start the run's directory."""
    monkeypatch.setattr("tinylora.rl.inputs.fitting_rows", lambda rows, *_: ([], []))
    with pytest.raises(InputError, match="usable prompts"):
        run("--output-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
