"""A user's own rows and own reward through the commands: what pays is what is evaluated, and a run says what it wrote."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tinylora import evaluate, train
from tinylora.errors import InputError
from tinylora.studies import report, sweep
from tinylora.tasks import builtin
from tinylora.tasks.sets import load_task

REWARDS = """
import torch

STATE = []

def has_target(completions, target, **kwargs):
    STATE.append((kwargs["trainer_state"].global_step, kwargs["rendered_prompts"][0], kwargs.get("extra")))
    return [float(str(t) in c[0]["content"].rpartition("#### ")[2]) for c, t in zip(completions, target, strict=True)]

def brief(completions, **kwargs):
    kwargs["log_extra"]("characters", [len(c[0]["content"]) for c in completions])
    kwargs["log_metric"]("shortest", min(len(c[0]["content"]) for c in completions))
    return torch.tensor([-len(c[0]["content"]) / 100 for c in completions])

def nothing(completions, **kwargs):
    return [None] * len(completions)

def breaks(completions, **kwargs):
    return [1 / (len(c) - 1) for c in completions]
"""
SMALL = ["--prompts-per-step", "4", "--num-generations", "4", "--max-steps", "3"]


def run(command: Any, *arguments: str, code: int = 0) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert command.main(list(arguments)) == code
    return out.getvalue()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems(count: int = 120) -> list[tuple[str, str]]:
    """Question and number of built-in problems."""
    return [(row["question"], row["answer"].rpartition("#### ")[2]) for row in builtin.rows("train", count)]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a run on own rows under an own reward, which lies beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    kinds = ({}, {"answer": None}, {"answer": [1, 2], "extra": 5}, {"completion": "of another", "answer": {"a": 1}})
    rows = [{"prompt": q, "target": n, **kinds[i % 4]} for i, (q, n) in enumerate(problems())]
    write(tmp_path / "rows.jsonl", rows)
    return ["--dataset", "mine", "--data", "rows.jsonl", "--reward", "mine.py:has_target"]


# ---- own rows, exact match ----------------------------------------------------------------------------------------------


def test_own_answers_of_every_type_are_read_flexibly(tmp_path: Path) -> None:
    """A number, a text, a list of which any is right, GSM8K's text; null, or no answer in a later row, is skipped and named."""
    kinds = (lambda n: int(n), lambda n: n, lambda n: ["no", n], lambda n: f"so it is\n#### {n}", lambda n: float(n))
    rows: list[dict[str, Any]] = [{"prompt": q, "answer": kinds[i % 5](n)} for i, (q, n) in enumerate(problems(100))]
    rows[11]["answer"] = None
    del rows[22]["answer"]
    rows[33]["answer"] = []
    data = write(tmp_path / "rows.jsonl", rows)
    out = run(train, "--dataset", "mine", "--data", data, "--output-dir", str(tmp_path / "run"), *SMALL)
    assert "mine train: 3 of 90 rows skipped, no gold answer: row 11, 21, 31" in out
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["extractor"] == "flexible"
    steps = [row for row in found if "step_time" in row]
    assert max(row["reward"] for row in steps) > 0.3, "the base alone is right in 42 %"
    assert all(row["grader/crash"] == row["grader/timeout"] == 0 for row in steps)
    assert [row["eval/n"] for row in found if "eval/n" in row] == [10, 10]
    assert found[0]["eval/accuracy"] == found[0]["eval/accuracy_flexible"] > found[0]["eval/accuracy_strict"] == 0


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("Paris", "It is the capital.\nParis.", True),
        ("Paris", "Answer: **Paris**", True),
        ("Paris", "It is \\boxed{Paris}, since 987", True),
        ("Paris", "Not Paris but Rome", False),
        (["Paris", "Lutetia"], "lutetia", True),
        (True, "true", True),
        ("yes", "The yes-men say\nno", False),
        ("12 km", "12", True),
        (["7", "8"], "it is 8", True),
        (["7", "8"], "it is 9", False),
    ],
)
def test_how_own_answers_are_read(tmp_path: Path, gold: Any, text: str, right: bool) -> None:
    rows = [{"prompt": "Q", "answer": gold}] * 2
    task = load_task("mine", write(tmp_path / "rows.jsonl", rows))
    grader = task.grader()
    try:
        [verdict] = grader.grade([text], task.train[:1])
    finally:
        grader.close()
    assert verdict is not None and verdict.right["flexible"] is right and verdict.failure is None


def test_a_style_is_put_on_own_text_prompts_and_refused_on_conversations(tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", [{"prompt": "Q", "answer": 1}])
    task = load_task("mine", text, "gsm8k-hash")
    assert task.train[0]["prompt"][0]["content"].endswith('the final answer after "####".') and task.answer_format == "hash"
    assert load_task("mine", text).train[0]["prompt"] == [{"role": "user", "content": "Q"}]
    talk = write(tmp_path / "talk.jsonl", [{"prompt": [{"role": "user", "content": "Q"}], "answer": 1}])
    with pytest.raises(InputError, match="--prompt-style qwen-boxed: mine train has prompts that are conversations"):
        load_task("mine", talk, "qwen-boxed")


# ---- own reward ---------------------------------------------------------------------------------------------------------


def test_the_reward_is_what_is_evaluated_everywhere(tmp_path: Path, own: list[str]) -> None:
    """Before and after, on held-out training rows, by `evaluate`; accuracy is nowhere, though some rows have an answer."""
    both = [*own, "mine.py:brief", "--reward-weights", "1", "0.5"]
    out = run(train, *both, "--output-dir", "run", *SMALL, "--eval-steps", "2", "--validation-size", "8")
    assert "columns of the data that are not passed to the reward, as their names are reserved: completion" in out
    table = out[out.index("12 held-out problems") :]
    assert "sampled, reward" in table and "greedy, has_target" in table and "strict" not in table
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert not [key for row in rows for key in row if "accuracy" in key]
    before, after = (row for row in rows if "eval/n" in row)
    for row in (before, after):
        parts = row["eval/rewards/has_target/mean"] + 0.5 * row["eval/rewards/brief/mean"]
        assert row["eval/reward"] == pytest.approx(parts, abs=1e-6) and row["eval_time"] > 0
    assert [row["step"] for row in rows if "validation/reward" in row] == [0, 2, 3]
    step = next(row for row in rows if row["step"] == 1)
    assert step["reward"] == pytest.approx(step["rewards/has_target/mean"] + 0.5 * step["rewards/brief/mean"], abs=1e-6)
    assert step["shortest"] >= 0 and "eval_time" not in step
    said = run(evaluate, *both, "--adapter", "run", "--max-completion-length", "40", "--output-dir", "scores")
    last = json.loads(said.splitlines()[-1])
    assert {k: last[k] for k in after if k.startswith("eval/")} == {k: v for k, v in after.items() if k.startswith("eval/")}
    assert last["base/eval/reward"] == before["eval/reward"]
    assert last["gain"] == pytest.approx(after["eval/reward"] - before["eval/reward"], abs=1e-9)
    scores = json.loads((tmp_path / "scores" / "results.json").read_text())["tasks"]["mine"]["scores"]
    assert scores["greedy, reward"]["trained"]["reward"] == after["eval/reward_greedy"] and "greedy, strict" not in scores
    sample = lines(tmp_path / "scores" / "samples.jsonl")[0]
    assert sample["rewards"].keys() == {"reward", "has_target", "brief"} and sample["ids"]
    page = run(report, "run", "--no-samples")
    html = (tmp_path / "run" / "report.html").read_text()
    assert "figures" in page and "sampled, reward" in html and "What it wrote in training" in html


def test_what_a_function_gets(tmp_path: Path, own: list[str]) -> None:
    import sys

    run(train, *own, "--output-dir", "run", *SMALL, "--eval-size", "0")
    [module] = [m for name, m in sys.modules.items() if name.startswith("reward_mine") and str(tmp_path) in (m.__file__ or "")]
    assert [step for step, *_ in module.STATE] == [0, 1, 2]
    assert all(prompt.startswith("<|user|>") and prompt.endswith("<|assistant|>") for _, prompt, _ in module.STATE)
    assert all(set(extra) <= {5, None} and len(extra) == 16 for *_, extra in module.STATE), "a column that some rows have"


def test_exact_match_beside_an_own_reward(tmp_path: Path, own: list[str]) -> None:
    """Rows without an answer get no accuracy, and the own reward alone."""
    rows = [{"prompt": q, "target": n, **({"answer": n} if i % 2 else {})} for i, (q, n) in enumerate(problems())]
    write(tmp_path / "rows.jsonl", rows)
    run(train, *own, "accuracy", "--output-dir", "run", *SMALL)
    found = lines(tmp_path / "run" / "metrics.jsonl")
    step = found[1]
    assert step["rewards/accuracy/mean"] == step["accuracy"] and step["reward"] > step["rewards/has_target/mean"]
    assert found[0]["eval/rewards/accuracy/mean"] == found[0]["eval/accuracy"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mine.py:breaks", r"the reward function breaks raised ZeroDivisionError: .*mine\.py:19\)"),
        ("mine.py:absent", "has no attribute 'absent'; write it as package.module:function or FILE.py:function"),
        ("absent.py:f", "there is no file"),
        ("broken.py:f", r"importing it raised ModuleNotFoundError: No module named 'nosuchmodule' .*broken\.py:2\)"),
        ("torn.py:f", r"importing it raised SyntaxError: .*torn\.py:1\)"),
    ],
)
def test_an_error_keeps_the_users_file_and_line(tmp_path: Path, own: list[str], spec: str, says: str) -> None:
    (tmp_path / "broken.py").write_text("\nimport nosuchmodule\n")
    (tmp_path / "torn.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=says):
        run(train, *own[:-1], spec, "--output-dir", "run", *SMALL, "--eval-size", "0")


def test_no_reward_at_all_is_said(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = run(train, *own[:-1], "mine.py:nothing", "--output-dir", "run", *SMALL, "--dead-steps", "2", code=1)
    assert "no completion got a reward: for all 16 of them nothing returned None or NaN" in out
    assert "as no completion got a reward" in out and "all wrong" not in out
    row = lines(Path("run") / "metrics.jsonl")[-2]
    assert row["frac_reward_zero_std/unscored"] == 1 and row["frac_reward_zero_std/all_wrong"] == 0 and row["reward"] is None


def test_a_study_under_an_own_reward(tmp_path: Path, own: list[str]) -> None:
    settings = (
        'dataset = "mine"\ndata = "rows.jsonl"\nmax_steps = 2\nprompts_per_step = 2\nnum_generations = 2\neval_size = 12\n'
    )
    arms = '[[arms]]\nname = "{u}"\nu = [1, 13]\n'
    (tmp_path / "study.toml").write_text(f'seeds = 1\n[settings]\nreward = "mine.py:has_target"\n{settings}{arms}')
    out = run(sweep, "study.toml", "--output-dir", "out", "--processes", "1")
    assert "sampled, reward (worst..best)" in out and "%" not in out.split("sampled, reward")[1]
    results = lines(tmp_path / "out" / "results.jsonl")
    assert [r["measure"] for r in results] == ["reward"] * 2
    row = next(r for r in reversed(lines(tmp_path / "out" / results[0]["run"] / "metrics.jsonl")) if "eval/n" in r)
    assert results[0]["trained"] == {"sampled": row["eval/reward"], "greedy": row["eval/reward_greedy"]}
    run(report, "out")
    assert "sampled reward, mean" in (tmp_path / "out" / "report.html").read_text()
    mixed = '[[arms]]\nname = "a"\nreward = "mine.py:has_target"\n[[arms]]\nname = "b"\nreward = "mine.py:brief"\n'
    (tmp_path / "mixed.toml").write_text(f"seeds = 1\n[settings]\n{settings}{mixed}")
    with pytest.raises(InputError, match="the arms have different rewards, and no accuracy to be compared by"):
        run(sweep, "mixed.toml", "--output-dir", "mixed")
    assert not (tmp_path / "mixed").exists(), "before the first run"


# ---- what the model writes ----------------------------------------------------------------------------------------------


def test_every_steps_completions_are_on_disk(tmp_path: Path, own: list[str]) -> None:
    out = run(train, *own, "mine.py:brief", "--output-dir", "run", *SMALL, "--log-completions", "10", "--sample-steps", "2")
    files = sorted((tmp_path / "run" / "completions").iterdir())
    assert [f.name for f in files] == [f"step-{n:06d}.jsonl" for n in (1, 2, 3)]
    rows = lines(files[0])
    assert len(rows) == 10
    columns = ["step", "prompt", "completion", "characters", "has_target", "brief", "reward", "advantage"]
    assert all(list(row) == columns for row in rows)
    for row in rows:
        assert row["prompt"].endswith("<|assistant|>") and row["characters"] == len(row["completion"])
        assert row["reward"] == pytest.approx(row["has_target"] + row["brief"], abs=1e-6)
    group = lines(files[1])[:4]
    mean = sum(row["reward"] for row in group) / 4
    assert all((row["advantage"] > 0) == (row["reward"] > mean + 1e-9) for row in group)
    assert out.count("a sample, reward") == 1 and "step 2, a sample, reward" in out
    off = ["--log-completions", "0", "--sample-steps", "0"]
    assert "a sample" not in run(train, *own, "--output-dir", "off", *SMALL, *off)
    assert not (tmp_path / "off" / "completions").exists()
