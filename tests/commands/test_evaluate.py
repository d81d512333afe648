"""python -m tinylora.evaluate: the paired table, the files it leaves, going on after a kill, and its cache."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylora import evaluate, train
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Sampling, rollout
from tinylora.errors import InputError
from tinylora.evaluation import answers as sample_cache
from tinylora.model.loader import load_model
from tinylora.tasks.grader import Grader
from tinylora.tasks.grading import Verdict

ROOT = Path(__file__).parents[2]
FILES = ("results.json", "samples.jsonl")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of evaluations; the factors' may stay."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evaluations"


@pytest.fixture
def adapter(tmp_path: Path, cache: Path) -> Path:
    """v as two seconds of training leave it."""
    model = load_model("builtin", "cpu")
    trained = Adapter(model, TinyLoRAConfig(u=13, n_tie="all"))
    with torch.no_grad():
        trained.v.copy_(torch.linspace(-0.05, 0.05, 13).view(1, 13))
    trained.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert evaluate.main(list(arguments)) == 0
    return out.getvalue()


def count_rollouts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of rollout got, from here on."""
    calls: list[int] = []

    def counted(model: Any, matrices: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        return rollout(model, matrices, prompts, *rest, **options)

    monkeypatch.setattr(sample_cache, "rollout", counted)
    return calls


def test_the_paired_table_and_its_files(tmp_path: Path, adapter: Path) -> None:
    out = run("--adapter", str(adapter), "--eval-size", "60", "--num-generations", "4", "--output-dir", str(tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = results["tasks"]["builtin"]["scores"]
    assert list(scores) == [
        f"{name}, {extractor}"
        for extractor in ("strict", "flexible")
        for name in ("greedy", "avg@4", "pass@1", "pass@2", "pass@4")
    ]
    assert results["num_parameters"] == 13 and results["tasks"]["builtin"]["n"] == 60
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 60 * (1 + 4)
    # every figure from the samples' own verdicts
    for who in ("base", "trained"):
        for extractor in ("strict", "flexible"):
            sampled = [line for line in lines if (line["policy"], line["decoding"]) == (who, "sampled")]
            share = sum(line[extractor]["right"] for line in sampled) / 240
            assert scores[f"avg@4, {extractor}"][who]["accuracy"] == pytest.approx(share, abs=1e-12)
            assert scores[f"pass@1, {extractor}"][who]["accuracy"] == pytest.approx(share, abs=1e-12)
            any_right = {line["problem"] for line in sampled if line[extractor]["right"]}
            assert scores[f"pass@4, {extractor}"][who]["accuracy"] == pytest.approx(len(any_right) / 60, abs=1e-12)
    pair = scores["greedy, strict"]["paired"]
    assert pair["low"] <= pair["gain"] <= pair["high"] and 0 <= pair["mcnemar_p"] <= 1 and pair["smallest_visible"] > 0
    assert "mcnemar_p" not in scores["avg@4, strict"]["paired"]
    for who in ("base", "trained"):  # lengths from the samples' own
        flat = [line for line in lines if (line["policy"], line["decoding"]) == (who, "sampled")]
        found = results["tasks"]["builtin"]["lengths"][who]["sampled"]
        assert found["tokens"] == pytest.approx(sum(line["tokens"] for line in flat) / 240, abs=1e-9)
        assert found["cut_off"] == pytest.approx(sum(not line["finished"] for line in flat) / 240, abs=1e-12)
    one = lines[0]
    assert one["prompt"].endswith("<|assistant|>") and one["finished"] and one["strict"]["answer"] in one["completion"]
    table = out.splitlines()[0]
    assert all(
        head in table for head in ("builtin, 60 problems", "base [95 %]", "paired gain [95 %]", "McNemar p", "smallest visible")
    )
    last = json.loads(out.splitlines()[-1])
    assert last["eval/accuracy"] == scores["avg@4, strict"]["trained"]["accuracy"]
    assert last["gain"] == scores["avg@4, strict"]["paired"]["gain"]


def test_run_again_it_generates_nothing(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--adapter", str(adapter), "--eval-size", "20", "--output-dir"]
    first = run(*flags, str(tmp_path / "one"))
    calls = count_rollouts(monkeypatch)
    graded: list[str] = []
    monkeypatch.setattr(Grader, "submit", lambda self, text, row: graded.append(text))
    assert run(*flags, str(tmp_path / "two")) == first
    assert calls == [] and graded == []
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "generated"),
    [
        (["--eval-size", "10"], 0),
        (["--eval-size", "24"], 4 * 4),
        (["--seed", "1"], 4 * 20),
        (["--max-completion-length", "39"], 4 * 20),
        (["--temperature", "0.9"], 2 * 20),
        (["--num-generations", "2"], 2 * 20),
        (["--dtype", "bfloat16"], 4 * 20),
        (["--extractor", "flexible"], 0),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_cache_knows_what_answers_depend_on(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], generated: int
) -> None:
    flags = ["--adapter", str(adapter), "--eval-size", "20"]
    run(*flags)
    calls = count_rollouts(monkeypatch)
    run(*flags, *change)
    assert sum(calls) == generated


def test_another_v_or_version_or_backend_is_another_key(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--adapter", str(adapter), "--eval-size", "8"]
    run(*flags)
    calls = count_rollouts(monkeypatch)
    model = load_model("builtin", "cpu")
    other = Adapter(model, TinyLoRAConfig(u=13, n_tie="all"))
    other.load_v(torch.full((1, 13), 0.01))
    other.save(adapter)
    run(*flags)
    assert sum(calls) == 2 * 8, "the base's answers are still there"
    calls.clear()
    monkeypatch.setattr("tinylora.__version__", "0.0.0")
    run(*flags)
    assert sum(calls) == 4 * 8
    calls.clear()
    monkeypatch.setenv("TINYLORA_BACKEND", "addmm")
    run(*flags)
    assert sum(calls) == 4 * 8


def test_verdicts_are_kept_by_grader_version(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--adapter", str(adapter), "--eval-size", "8"]
    run(*flags)
    calls, graded = count_rollouts(monkeypatch), []
    submit = Grader.submit
    monkeypatch.setattr(Grader, "submit", lambda self, text, row: graded.append(text) or submit(self, text, row))
    monkeypatch.setattr(sample_cache, "GRADER_VERSION", -1)
    run(*flags)
    assert calls == [] and len(graded) >= 8


def test_a_verdict_that_the_grader_gave_up_on_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gave_up = Verdict({"strict": None, "flexible": None}, {"strict": False, "flexible": False}, "timeout")
    with monkeypatch.context() as patch:
        patch.setattr("tinylora.tasks.grader.grade", lambda *_: gave_up)
        assert "the grader gave up on 8 completions, which count as wrong" in run("--eval-size", "4")
    assert "gave up" not in run("--eval-size", "4")


def test_killed_and_resumed_it_gives_the_same_files(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 once some answers are there; what was finished is not generated again."""
    flags = ["--adapter", str(adapter), "--eval-size", "560", "--max-completion-length", "12", "--output-dir"]
    killed = tmp_path / "killed"
    monkeypatch.setenv("TINYLORA_CACHE", str(killed / "cache"))
    command = [sys.executable, "-m", "tinylora.evaluate", *flags, str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((killed / "cache" / "evaluations").glob("completions-*"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.json").exists()
    calls = count_rollouts(monkeypatch)
    run(*flags, str(killed))
    assert 0 < sum(calls) < 4 * 560
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "other"))
    run(*flags, str(tmp_path / "whole"))
    for name in FILES:
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_torn_line_costs_its_own_answers(cache: Path) -> None:
    store = sample_cache.Store("kind", "key")
    store.add({"a": 1, "b": [2]})
    store.path.write_text(store.path.read_text()[:-4])
    torn = sample_cache.Store("kind", "key")
    assert torn.entries == {"a": 1}
    torn.add({"c": 3})
    assert sample_cache.Store("kind", "key").entries == {"a": 1, "c": 3}


def test_answers_are_kept_as_they_end_and_an_interruption_changes_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after its seventh answer: the prompts whose two answers had ended are not generated again."""
    model = load_model("builtin", "cpu")
    prompts = [[1, 5, 6, 7], [2, 9], [3, 3, 8]] * 3
    text = type("T", (), {"decode": staticmethod(str)})()
    sampling = Sampling(12, 1.0, seed=3, eos_ids=(0,))
    whole = sample_cache.sample(model, None, text, prompts, 2, sampling, {"a": 1}, "")

    class Interrupting:
        ended = 0

        def decode(self, tokens: list[int]) -> str:
            self.ended += 1
            if self.ended > 7:
                raise KeyboardInterrupt
            return str(tokens)

    with pytest.raises(KeyboardInterrupt):
        sample_cache.sample(model, None, Interrupting(), prompts, 2, sampling, {"a": 2}, "")
    [kept] = [f for f in cache.glob("completions-*") if len(f.read_text().splitlines()) < len(prompts)]
    before = len(kept.read_text().splitlines())
    assert 1 <= before <= 3
    calls = count_rollouts(monkeypatch)
    assert sample_cache.sample(model, None, text, prompts, 2, sampling, {"a": 2}, "") == whole
    assert calls == [len(prompts) - before]
    assert [a["completion"] for given in whole for a in given] == [
        str(c.tokens) for c in rollout(model, None, prompts, 2, sampling)
    ]


def test_several_tasks_on_a_model_with_its_own_tokenizer(
    tmp_path: Path, cache: Path, tiny_model: Callable[..., Path], text_model: Callable[[list[str]], Path]
) -> None:
    """Two sets in one command, prompts too long for the model dropped and counted, rows without an answer named."""
    rows = [{"problem": f"What is {i} + {i}?", "answer": float(2 * i)} for i in range(6)]
    rows += [{"problem": "word " * 2000, "answer": 1.0}, {"problem": "x", "answer": None}]
    for name in ("amc23", "math500"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = text_model([row["problem"] for row in rows[:6]])
    flags = ["--model", str(model), "--dataset", "amc23", "math500", "--data", str(tmp_path / "data")]
    out = run(*flags, "--max-completion-length", "8", "--output-dir", str(tmp_path / "out"))
    assert "amc23 test: 1 of 8 rows skipped, no gold answer: row 8" in out
    assert "math500: 1 prompts leave no room for 8 tokens and are not used" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [results["tasks"][name]["n"] for name in ("amc23", "math500")] == [6, 6]
    assert results["tasks"]["amc23"]["prompts_too_long"] == 1
    shown = run(*flags, "--show-prompt")
    assert shown.count("within \\boxed{}.") == 2 and "What is 0 + 0?<|assistant|>" in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-generations", "-1"], "--num-generations -1"),
        (["--eval-size", "0"], "--eval-size 0"),
        (["--temperature", "0"], "--temperature 0"),
        (["--top-p", "2"], "--top-p 2"),
        (["--adapter-step", "3"], "--adapter-step needs --adapter"),
        (["--dataset", "gsm9"], "--dataset gsm9: choose builtin"),
        (["--data", "some/rows"], "--data is of other tasks than builtin"),
        (["--max-completion-length", "255"], "no prompt leaves room"),
    ],
)
def test_refusals(cache: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    with pytest.raises((InputError, SystemExit)) as caught:  # what the settings themselves refuse, their parser prints
        run(*flags)
    said = " ".join(capsys.readouterr().err.split()) if isinstance(caught.value, SystemExit) else str(caught.value)
    assert says in said


def test_training_and_evaluating_agree(tmp_path: Path, cache: Path) -> None:
    short = ["--max-steps", "2", "--eval-size", "40", "--prompts-per-step", "4", "--num-generations", "4"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["--output-dir", str(tmp_path / "run"), *short])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = json.loads(run("--adapter", str(tmp_path / "run"), "--eval-size", "40").splitlines()[-1])
    scores = {k: v for k, v in rows[-1].items() if k.startswith("eval/")}
    assert {k: last[k] for k in scores} == scores
    assert last["base/eval/accuracy"] == rows[0]["eval/accuracy"]
