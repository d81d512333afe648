"""From a GGUF to a trained adapter and back, by the commands as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf_files import gguf, write_gguf

from tinylora import Adapter, InputError, TinyLoRAConfig, evaluate, export, generate, load_adapter, load_model, train
from tinylora.engine.text import Text

ROOT = Path(__file__).parent.parent.parent
SMOLLM2 = Path.home() / ".cache" / "tinylora-models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
REWARD = """
def length(completions, **columns):
    return [float(len(c[0]["content"]) % 7) for c in completions]
"""


class Place:
    """A directory with data and a reward of its own, and commands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "own.py").write_text(REWARD)
        rows = [{"question": f"What is {i} + {i + 1}?", "answer": f"#### {2 * i + 1}"} for i in range(24)]
        for split in ("train", "test"):
            (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}

    def command(self, module: str, *arguments: object) -> list[str]:
        return [sys.executable, "-m", f"tinylora.{module}", *map(str, arguments)]

    def run(self, module: str, *arguments: object, code: int = 0) -> tuple[str, str]:
        done = subprocess.run(
            self.command(module, *arguments), cwd=self.path, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout, done.stderr

    def train(self, model: Path, output: str, *more: object) -> list[object]:
        sizes = ["--prompts-per-step", 2, "--num-generations", 4, "--max-completion-length", 8, "--u", 3, "--n-tie", "all"]
        task = ["--dataset", "gsm8k", "--data", self.path, "--reward", "own:length", "--eval-size", 0, "--eval-steps", 0]
        rest = ["--learning-rate", 0.3, "--save-steps", 1, "--output-dir", output]
        return ["--model", model, *sizes, *task, *rest, *more]


def journey(place: Place, model: Path, kinds: tuple[str, ...]) -> None:
    """Train, be killed, go on, evaluate, generate, and every export."""
    run = place.path / "run"
    training = subprocess.Popen(
        place.command("train", *place.train(model, "run", "--max-steps", 500)),
        cwd=place.path,
        env=place.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics, waited = run / "metrics.jsonl", time.monotonic()
    while training.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 2):
        assert time.monotonic() - waited < 300
        time.sleep(0.05)
    training.send_signal(signal.SIGKILL)
    training.wait()
    steps = len(metrics.read_text().splitlines())
    assert 2 <= steps < 500
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**stored, "settings": {**stored["settings"], "max_steps": steps + 2}}))
    place.run("train", "--resume", "--output-dir", "run")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == list(range(1, steps + 3))
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)

    task = ["--dataset", "gsm8k", "--data", place.path, "--eval-size", 4, "--max-completion-length", 8]
    said, _ = place.run("evaluate", "--model", model, "--adapter", "run", *task)
    assert json.loads(said.splitlines()[-1])["num_parameters"] == 3
    place.run("generate", "--model", model, "--adapter", "run", "--prompt", "What is 1 + 1?", "--max-completion-length", 8)
    for kind in kinds:
        output = {"gguf-lora": "lora.gguf", "tiny": "tiny.safetensors"}.get(kind, kind)
        said, _ = place.run("export", "--model", model, "--adapter", "run", "--to", kind, "--output", output)
        assert json.loads(said.splitlines()[-1])["num_parameters"] == 3
    assert len(gguf.GGUFReader(place.path / "lora.gguf").tensors) == 2 * len(load_model(str(model), "cpu").weights())
    about = json.loads((place.path / "lora" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(model)


def test_the_journey_of_a_small_file(tmp_path: Path) -> None:
    place = Place(tmp_path)
    model = write_gguf(tmp_path / "base.Q4_K.gguf", "llama", "Q4_K", tied=True)
    journey(place, model, ("peft", "lora", "gguf-lora", "tiny", "merged"))
    whole, base = load_model(str(tmp_path / "merged"), "cpu"), load_model(str(model), "cpu")
    adapter = load_adapter(tmp_path / "run", base)
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged, trained, plain = whole.logits(ids), base.logits(ids, adapter.matrices()), base.logits(ids)
    assert (trained - plain).norm() > 0.01 * plain.norm()
    assert (merged - trained).norm() < 1e-5 * plain.norm()
    with torch.no_grad():
        peft = load_adapter(tmp_path / "peft", base)
        assert (base.logits(ids, peft.matrices()) - trained).norm() < 1e-5 * plain.norm()


@pytest.mark.skipif(not SMOLLM2.exists(), reason="SmolLM2's GGUF is not there")
def test_the_journey_of_a_real_file(tmp_path: Path) -> None:
    journey(Place(tmp_path), SMOLLM2, ("peft", "lora", "gguf-lora"))


def test_refusals_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    good = write_gguf(tmp_path / "good.gguf")
    short = tmp_path / "short.gguf"
    short.write_bytes(good.read_bytes()[:-40])
    other = write_gguf(tmp_path / "other.gguf", "gemma3")
    lacks = write_gguf(tmp_path / "lacks.gguf", leave_out="blk.1.attn_q.weight")
    first = write_gguf(tmp_path / "split.gguf", parts=2)
    (tmp_path / "split-00002-of-00002.gguf").unlink()
    strange = write_gguf(tmp_path / "strange.gguf", pre="klingon")
    cases = {short: "cut short", other: "'gemma3'", lacks: "no tensor blk.1.attn_q.weight", first: "split-00002-of-00002.gguf"}
    cases |= {strange: "'klingon'", tmp_path / "absent.gguf": "no such file"}
    _, error = place.run("generate", "--model", short, "--prompt", "hi", code=2)
    assert error.startswith("error: --model ") and "cut short" in error and len(error.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = {
        generate: lambda path: ["--model", path, "--prompt", "hi"],
        train: lambda path: place.train(path, "run"),
        evaluate: lambda path: ["--model", path, "--dataset", "gsm8k", "--data", tmp_path],
        export: lambda path: ["--model", path, "--adapter", "run", "--to", "lora", "--output", "out"],
    }
    for path, message in cases.items():
        for command, arguments in commands.items():
            if command is export and path == strange:
                continue  # which reads no tokenizer
            with pytest.raises(InputError) as raised:
                command.main([str(a) for a in arguments(path)])
            said = str(raised.value)
            assert message in said and path.name in said and "\n" not in said, (command, said)
    assert not (tmp_path / "run").exists()
    for output, message in (("x.txt", "named NAME.gguf"), ("good.gguf", "exists")):
        with pytest.raises(InputError, match=message):
            export.main(["--model", str(good), "--adapter", "run", "--to", "gguf-lora", "--output", output])


def test_another_quantisation_is_another_base(tmp_path: Path) -> None:
    """Refused with both quantisations named; with --force-base used, with a warning that says how far the factors are."""
    place = Place(tmp_path)
    q8 = write_gguf(tmp_path / "base.Q8_0.gguf", "llama", "Q8_0")
    q4 = write_gguf(tmp_path / "base.Q4_1.gguf", "llama", "Q4_1")  # the same numbers, rounded otherwise
    place.run("train", *place.train(q8, "run", "--max-steps", 2))
    arguments = ["--adapter", "run", "--prompt", "What is 1 + 1?", "--max-completion-length", 8]
    _, error = place.run("generate", "--model", q4, *arguments, code=2)
    assert len(error.splitlines()) == 1
    for part in ("base.Q8_0.gguf (16 Q8_0,", "base.Q4_1.gguf (16 Q4_1,", "Another quantisation", "--force-base"):
        assert part in error, error
    _, error = place.run("generate", "--model", q4, *arguments, "--force-base")
    assert error.startswith("warning: ") and len(error.splitlines()) == 1 and "factors are off by" in error
    place.run("export", "--model", q4, "--adapter", "run", "--to", "peft", "--output", "peft", "--force-base")
    _, error = place.run("train", "--resume", "--output-dir", "run", "--model", q4, code=2)
    assert "model was" in error or "not those the run" in error

    right, wrong = load_model(str(q8), "cpu"), load_model(str(q4), "cpu")
    trained = load_adapter(tmp_path / "run", right)
    with pytest.raises(InputError, match="Another quantisation"):
        load_adapter(tmp_path / "run", wrong)
    with pytest.warns(UserWarning, match="off by"):
        forced = load_adapter(tmp_path / "run", wrong, force_base=True)
    for module, (A, B) in trained.parts.factors.items():  # turned as those that were trained
        signs = (A * forced.parts.factors[module][0]).sum(1)
        assert (signs > 0.5).all() and torch.equal(signs.sign(), (B * forced.parts.factors[module][1]).sum(0).sign()), module
    with pytest.raises(InputError, match="not even --force-base fits it here"):  # of other modules even by force
        load_adapter(tmp_path / "run", load_model(str(write_gguf(tmp_path / "n.gguf", layers=3)), "cpu"), force_base=True)


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_an_adapter_is_read_in_every_precision(trained: str, tmp_path: Path) -> None:
    """A GPU trains in bfloat16 what a CPU exports and evaluates in float32: the factors are of the same rounded weights."""
    path = str(write_gguf(tmp_path / "m.gguf", "llama", "Q4_K"))
    adapter = Adapter(load_model(path, "cpu", trained), TinyLoRAConfig(u=3, n_tie="all"))
    adapter.save(tmp_path / "adapter")
    for dtype in ("float32", "bfloat16", "float16"):
        again = load_adapter(tmp_path / "adapter", load_model(path, "cpu", dtype))
        for module, (A, B) in adapter.parts.factors.items():
            for mine, other in zip((A, B), again.parts.factors[module], strict=True):
                assert (mine - other).norm() < (1e-2 if dtype == "float16" else 1e-5) * mine.norm(), (dtype, module)


def test_a_lora_file_is_neither_a_model_nor_an_adapter(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "m.gguf", "llama")
    model = load_model(str(base), "cpu")
    adapter = Adapter(model, TinyLoRAConfig(u=3, n_tie="all"))
    adapter.save(tmp_path / "adapter")
    arguments = ["--model", str(base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "new" / "l.gguf")]
    export.main([*arguments, "--to", "gguf-lora"])
    with pytest.raises(InputError, match="l.gguf: an adapter, and no model"):
        load_model(str(tmp_path / "new" / "l.gguf"), "cpu")
    with pytest.raises(InputError, match="l.gguf: a LoRA for llama.cpp"):
        load_adapter(tmp_path / "new" / "l.gguf", model)


def test_the_baselines_train_on_a_gguf(tmp_path: Path) -> None:
    """transformers gets the dequantised weights; full fine-tuning leaves a directory that --model takes."""
    place = Place(tmp_path)
    model = write_gguf(tmp_path / "base.gguf", "llama", "Q4_0")
    for method in ("full", "lora"):
        more = ["--method", method, "--max-steps", 1, "--learning-rate", 1e-4]
        place.run("train", *place.train(model, method, *more))
    assert (tmp_path / "lora" / "adapter" / "adapter_config.json").exists()
    whole = load_model(str(tmp_path / "full" / "adapter"), "cpu")
    assert whole.config.family == "llama" and whole.base_hash != load_model(str(model), "cpu").base_hash
    assert Text(tmp_path / "full" / "adapter").tokenizer.get_vocab() == Text(model).tokenizer.get_vocab()


def test_a_dry_run_reads_no_weights(tmp_path: Path) -> None:
    said, _ = Place(tmp_path).run("train", "--model", write_gguf(tmp_path / "m.gguf", "qwen3"), "--dry-run")
    assert "2 layers" in said and "<|im_start|>" in said
