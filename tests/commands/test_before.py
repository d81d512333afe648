"""Files that an earlier commit wrote are still loaded, resumed, evaluated and taken as finished: tests/data/before.

Only commands and what `import tinylora` gives are used, so that the test outlives the places of modules.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tinylora

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data" / "before"
EXPECTED = json.loads((DATA / "expected.json").read_text())
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SHARED = "--seed 1 --projection-seed 5"
RUNS = {
    "grpo": "--prompts-per-step 4 --num-generations 4 --eval-size 8 --eval-steps 2 --validation-size 8",
    "sft": "--algorithm sft --prompts-per-step 8 --eval-size 0",
    "es": "--algorithm es --prompts-per-step 4 --num-generations 4 --eval-size 0",
}
SAME_V = 1e-5  # other instruction sets move the last v by 1.3e-7, lost moments of Adam's by about the learning rate, 1e-2
SAME_LOGITS = 1e-3  # of what the adapter changes: rounding is 1e-5 of it, another P, sign or tying as large as it
PROBLEM = 1 / 8  # one of the eight evaluated: a near tie may fall otherwise


def command(name: str, *arguments: object) -> str:
    """What a command prints, on the CPU as when the files were written."""
    line = [sys.executable, "-m", f"tinylora.{name}", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def vs(path: Path) -> dict[int, list[float]]:
    """v after each step of a run."""
    return {row["step"]: row["adapter/v"] for row in rows(path) if "adapter/v" in row}


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def foreign_model() -> torch.nn.Module:
    """One layer of transformers' Llama, each weight a fraction of integers, which every machine rounds to the same bits."""
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))
    with torch.no_grad():
        for place, (name, p) in enumerate(sorted(model.named_parameters())):
            n = torch.arange(p.numel()) + 1000 * place
            fractions = (n * n * 37 + n // 3 * 501 + n * 3919) % 2003 / 2003 - 0.5  # in [-0.5, 0.5)
            p.copy_(fractions.view_as(p) + (1 if "norm" in name else 0))
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of the token after IDS: (vocabulary,)."""
    with torch.no_grad():
        return model(IDS, use_cache=False).logits[0, -1]


def engine_logits(model, adapter: tinylora.Adapter | None) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The same on our own decoder; None: of the base."""
    with torch.no_grad():
        return model.logits(IDS, adapter.matrices() if adapter else None)[0, -1]


def check(found: torch.Tensor, base: torch.Tensor, kind: str) -> None:
    """Logits are those of the commit that wrote the adapter, and not the base's."""
    want = torch.tensor(EXPECTED["logits"][kind])
    moved = (want - base).abs().max()
    assert moved > 0.1
    assert (found - want).abs().max() <= SAME_LOGITS * moved


# ---- adapters ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["grpo/best", "many/adapter", "many", "study/runs/rl--3-numbers/seed-0"])
def test_an_adapter_of_a_run(path: str) -> None:
    """Of 13, 3 and 1,025 numbers, by its own directory and by the run's."""
    model = tinylora.load_model("builtin", "cpu")
    base = engine_logits(model, None)
    adapter = tinylora.load_adapter(DATA / path, model)
    if path == "grpo/best":
        assert adapter.v.flatten().tolist() == vs(DATA / "grpo")[2]
    elif path.startswith("study"):
        assert adapter.v.flatten().tolist() == vs(DATA / path)[2]
    else:
        assert adapter.v.shape == (1, 1025) and torch.equal(adapter.v, adapter.v.bfloat16().float())
    check(engine_logits(model, adapter), base, path.removesuffix("/adapter"))


@pytest.mark.parametrize("path", ["adapter", "tiny.safetensors", "peft"])
def test_an_adapter_of_another_model(path: str, tmp_path: Path) -> None:
    """What `AttachedAdapter.save` and exports of it wrote loads onto the model, and onto our decoder of its weights."""
    model = foreign_model()
    base = logits(model)
    adapter = tinylora.load_adapter(DATA / "foreign" / path, model)
    assert isinstance(adapter, tinylora.AttachedAdapter) and adapter.v.tolist() == EXPECTED["foreign v"]
    check(logits(model), base, "foreign")
    foreign_model().save_pretrained(tmp_path)
    decoder = tinylora.load_model(str(tmp_path), "cpu")
    own = tinylora.load_adapter(DATA / "foreign" / path, decoder)
    assert own.v.tolist() == EXPECTED["foreign v"]
    check(engine_logits(decoder, own), base, "foreign")


def test_attach_draws_the_same_adapter() -> None:
    """Config and v alone give the function that was saved, because P, tying and factors are drawn as they were."""
    model = foreign_model()
    base = logits(model)
    adapter = tinylora.attach(model, tinylora.TinyLoRAConfig(**EXPECTED["foreign config"]))
    adapter.load_v(torch.tensor(EXPECTED["foreign v"]))
    check(logits(model), base, "foreign")


@pytest.mark.parametrize("name", ["grpo/best", "many, step 1"])
def test_evaluate(name: str) -> None:
    """A run's best adapter, and v of a step that has a file of its own, score as on the commit that wrote them."""
    path, _, step = name.partition(", step ")
    flags = ["--adapter", DATA / path, *(["--adapter-step", step] if step else []), "--eval-size", 8]
    found, want = json.loads(command("evaluate", *flags).splitlines()[-1]), EXPECTED["scores"][name]
    assert found["num_parameters"] == (1025 if step else 13) and found["eval/n"] == 8
    assert {key: found[key] for key in want} == pytest.approx(want, abs=PROBLEM)


# ---- runs -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(RUNS))
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a run that was killed after two of its four steps, and where it went on to its end."""
    path = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(DATA / request.param, path)
    command("train", "--output-dir", path, "--resume")
    return request.param, path


def test_a_killed_run_goes_on(resumed: tuple[str, Path]) -> None:
    """It keeps what was written, and ends with the v that a run which nothing killed had on the commit that wrote it."""
    name, path = resumed
    before, after = rows(DATA / name), rows(path)
    assert after[: len(before)] == before and list(vs(path)) == [1, 2, 3, 4]
    assert vs(path)[4] == pytest.approx(EXPECTED["last v"][name], rel=0, abs=SAME_V)
    assert tinylora.load_adapter(path, tinylora.load_model("builtin", "cpu")).v.flatten().tolist() == vs(path)[4]
    if name == "grpo":
        assert [(row["step"], row["eval/n"]) for row in after if "eval/n" in row] == [(0, 8), (4, 8)]
        assert [row["step"] for row in after if "validation/n" in row] == [0, 2, 4]


def started(name: str, steps: int, path: Path) -> Path:
    """A run of the same settings, as new."""
    command("train", "--output-dir", path, "--max-steps", steps, *f"{SHARED} {RUNS[name]}".split())
    return path


def test_a_killed_run_goes_on_bit_for_bit(resumed: tuple[str, Path], tmp_path: Path) -> None:
    """The last v has the recorded bits, or, on another processor, those of a run here that nothing kills."""
    name, path = resumed
    if vs(path)[4] == EXPECTED["last v"][name]:
        return
    state = "checkpoint/state.safetensors"
    start, wanted = load_file(started(name, 2, tmp_path / "start") / state), load_file(DATA / name / state)
    if not all(torch.equal(start[key], tensor) for key, tensor in wanted.items()):
        pytest.skip(f"{name}: here the first two steps have other bits than where the run was written")
    assert vs(path) == vs(started(name, 4, tmp_path / "whole"))


def test_a_finished_study_is_taken_as_it_is(tmp_path: Path) -> None:
    """No run is trained again, the results are the recorded ones, and a page is made of it and of a run."""
    study = tmp_path / "study"
    shutil.copytree(DATA / "study", study)
    said = command("sweep", DATA / "study.toml", "--output-dir", study, "--processes", 1)
    assert "RL, 3 numbers" in said and "groups of runs" not in said
    assert contents(study / "runs") == contents(DATA / "study" / "runs")
    old, new = (json.loads((path / "results.jsonl").read_text()) for path in (DATA / "study", study))
    kept = old["settings"].keys() & new["settings"].keys()  # another version may know others
    assert len(kept) > 20 and all(old["settings"][key] == new["settings"][key] for key in kept)
    assert old | {"settings": None} == new | {"settings": None}
    pytest.importorskip("matplotlib")
    command("report", study, DATA / "grpo", "--no-samples", "--output", tmp_path / "page.html")
    assert "How many numbers?" in (tmp_path / "page.html").read_text()
