"""python -m tinylora.export: what leaves is the same function, and the report says what rounding took."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import IDS, TARGETS, foreign_model
from safetensors.torch import load_file, save_file

import tinylora
from tinylora import InputError, TinyLoRAConfig, evaluate, export, generate, load_adapter, load_model, train
from tinylora.adapter.on_decoder import Adapter
from tinylora.prng import normal

LIMIT = 1e-5


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(tmp_path: Path, kind: str, dtype: torch.dtype = torch.float32, scale: float = 0.3, **changes: object):
    """Saves base and adapter; returns the adapted model in fp32 and its logits."""
    foreign_model(kind, dtype).save_pretrained(tmp_path / "base")
    model = foreign_model(kind, dtype)
    config = {"u": 3, "n_tie": 4, "target_modules": TARGETS[kind]} | changes
    adapter = tinylora.attach(model, TinyLoRAConfig(**config))
    adapter.load_v(scale * normal(tuple(adapter.v.shape), 3).float())
    adapter.save(tmp_path / "adapter")
    return adapter, logits(model)


def run(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    output = str(tmp_path / "out") + (".safetensors" if to == "tiny" else "")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--to", to, "--output", output]
    capsys.readouterr()
    assert export.main([*arguments, *more]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("rank", [None, 8])
def test_lora_in_peft_is_the_adapter(kind: str, rank: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    _, want = trained(tmp_path, kind)
    said = run(tmp_path, "lora", capsys, *(["--rank", str(rank)] if rank else []))
    assert said["modules"] == (8 if kind == "gpt2" else 14)
    model = PeftModel.from_pretrained(foreign_model(kind), str(tmp_path / "out"))
    assert (logits(model) - want).abs().max() <= LIMIT
    assert (logits(foreign_model(kind)) - want).abs().max() > 0.1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == (rank or 2)  # engines scale by lora_alpha / r
    assert set(config["target_modules"]) == set(TARGETS[kind])
    shapes = {t.shape[0] for n, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_A" in n}
    assert shapes == {rank or 2}


@pytest.mark.parametrize("kind", list(TARGETS))
def test_peft_is_the_adapter(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    _, want = trained(tmp_path, kind, n_tie=2 if kind == "gpt2" else 5)
    said = run(tmp_path, "peft", capsys)
    assert said["tying_kept"] == (kind == "gpt2")  # 14 modules in fives leave 4: PEFT's last group is never the smaller
    model = PeftModel.from_pretrained(foreign_model(kind), str(tmp_path / "out"))
    assert (logits(model) - want).abs().max() <= LIMIT


@pytest.mark.parametrize("kind", list(TARGETS))
def test_merged_in_transformers_is_the_adapter(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    _, want = trained(tmp_path, kind)
    said = run(tmp_path, "merged", capsys)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(merged) - want).abs().max() <= LIMIT
    assert set(said["kept"]) == {"0", "1", "all"} and min(said["kept"].values()) > 0.999
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (tmp_path / "base").iterdir())


@pytest.mark.parametrize(("scale", "low", "high"), [(1.0, 0.95, 1.0), (1e-2, 0.3, 0.95), (1e-4, 0.0, 0.2)])
def test_report_of_a_bf16_merge_is_what_a_direct_measurement_finds(
    scale: float, low: float, high: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = trained(tmp_path, "qwen2", torch.bfloat16, scale, param_dtype="float32")
    said = run(tmp_path, "merged", capsys)
    base, merged = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    wanted, found = {"0": [], "1": [], "all": []}, {"0": [], "1": [], "all": []}
    for module, (A, B) in adapter.parts.factors.items():
        M = sum(
            v * P for v, P in zip(adapter.v[adapter.parts.group_of[module]], adapter.parts.projections[module], strict=True)
        )
        name = f"{module}.weight"
        assert merged[name].dtype == torch.bfloat16
        for entry in (module.split(".")[2], "all"):
            wanted[entry].append((B.double() @ M.detach().double() @ A.double()).flatten())
            found[entry].append((merged[name].double() - base[name].double()).flatten())
    for entry in wanted:
        D, moved = torch.cat(wanted[entry]), torch.cat(found[entry])
        assert said["kept"][entry] == pytest.approx(max(0.0, 1 - ((moved - D).norm() / D.norm()).item()), abs=1e-6)
    assert low <= said["kept"]["all"] <= high
    others = [n for n in base if n.removesuffix(".weight") not in adapter.parts.factors]
    assert all(torch.equal(base[n], merged[n]) for n in others) and len(others) > 5


def test_merge_warns_below_95_percent_and_fp32_keeps_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "qwen2", torch.bfloat16, 1e-4)
    arguments = ["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--to", "merged", "--output"]
    export.main([*arguments, str(tmp_path / "half")])
    assert "warning: the merged weights keep" in capsys.readouterr().out
    export.main([*arguments, str(tmp_path / "whole"), "--dtype", "float32"])
    out = capsys.readouterr().out
    assert "warning" not in out and json.loads(out.splitlines()[-1])["kept"]["all"] > 0.999
    assert {t.dtype for t in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"


def test_sharded_checkpoints_stay_sharded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    _, want = trained(tmp_path, "llama")
    (tmp_path / "base" / "model.safetensors").unlink()
    foreign_model("llama").save_pretrained(tmp_path / "base", max_shard_size="10KB")
    files = sorted(p.name for p in (tmp_path / "base").iterdir())
    assert len(files) > 3
    run(tmp_path, "merged", capsys)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - want).abs().max() <= LIMIT


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_tiny_is_v_and_what_tells_its_base(param_dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, want = trained(tmp_path, "qwen2", u=13, n_tie="all", param_dtype=param_dtype)
    said = run(tmp_path, "tiny", capsys)
    size = {"float32": 52, "bfloat16": 26}[param_dtype]
    assert said["payload_bytes"] == size and said["file_bytes"] == (tmp_path / "out.safetensors").stat().st_size < 1200
    assert list(load_file(tmp_path / "out.safetensors")) == ["v"]
    fresh = foreign_model("qwen2")
    load_adapter(tmp_path / "out.safetensors", fresh)
    assert torch.equal(logits(fresh), want)
    decoder = load_model(str(tmp_path / "base"), "cpu")
    loaded = load_adapter(tmp_path / "out.safetensors", decoder)
    assert isinstance(loaded, Adapter) and (decoder.logits(IDS, loaded.matrices()) - want).abs().max() <= LIMIT
    other = foreign_model("qwen2", seed=1)
    with pytest.raises(InputError, match="was trained on"):
        load_adapter(tmp_path / "out.safetensors", other)
    whole = (tmp_path / "out.safetensors").read_bytes()
    (tmp_path / "out.safetensors").write_bytes(whole[:-3])
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(tmp_path / "out.safetensors", fresh)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "qwen2")
    for more, message in (
        (["--to", "lora", "--rank", "1"], "own rank is 2"),
        (["--to", "peft", "--rank", "8"], "--rank pads a LoRA"),
        (["--to", "lora", "--dtype", "float32"], "--dtype is of a merged checkpoint"),
        (["--to", "tiny"], "named NAME.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            export.main(
                [
                    "--adapter",
                    str(tmp_path / "adapter"),
                    "--model",
                    str(tmp_path / "base"),
                    "--output",
                    str(tmp_path / "o"),
                    *more,
                ]
            )
    for taken in ("base", "adapter"):  # never over the base or the adapter itself
        before = {p.name: p.read_bytes() for p in (tmp_path / taken).iterdir()}
        with pytest.raises(InputError, match="exists; name a new directory"):
            export.main(
                ["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--to", "merged"]
                + ["--output", str(tmp_path / taken)]
            )
        assert {p.name: p.read_bytes() for p in (tmp_path / taken).iterdir()} == before


def test_an_index_that_points_out_of_its_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "elsewhere.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="'../elsewhere.safetensors', which is no file of that directory"):
        run(tmp_path, "merged", capsys)
    assert not (tmp_path / "out").exists()


# ---- names ------------------------------------------------------------------------------------------------------------------


def train_flags(model: Path | str) -> list[str]:
    """Of one step on a model, or on the built-in one."""
    sizes = ["--prompts-per-step", "2", "--num-generations", "2", "--max-steps", "1", "--eval-size", "0"]
    task = [] if str(model) == "builtin" else ["--dataset", "own", "--max-completion-length", "4", "--learning-rate", "0.1"]
    return ["--model", str(model), *task, *sizes]


def a_run(path: Path, model: Path | str, *more: str) -> Path:
    assert train.main([*train_flags(model), "--output-dir", str(path), *more]) == 0
    return path


def own_rows(path: Path) -> list[str]:
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    for split in ("train", "test"):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(path)]


@pytest.mark.parametrize("typed", ["absolute", "relative"])
def test_the_model_is_named_as_it_was_typed(
    typed: str, text_model: Callable[[list[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoPeftModel follows the name, and generate and export find the model by it."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    rows = own_rows(tmp_path)
    path = text_model(["What is 1 + 1?"])
    monkeypatch.chdir(path.parent)
    model = str(path) if typed == "absolute" else path.name
    run_path = a_run(tmp_path / "run", model, *rows)
    about = json.loads((run_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == model
    assert tinylora.attach(AutoModelForCausalLM.from_pretrained(model), TinyLoRAConfig()).base.name == model
    for to in ("peft", "lora"):
        assert export.main(["--adapter", str(run_path), "--to", to, "--output", str(tmp_path / to)]) == 0
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / to)
        decoder = load_model(model, "cpu")
        want = decoder.logits(IDS, load_adapter(run_path, decoder).matrices())
        assert (logits(loaded) - want).abs().max() <= 1e-4
    for where in (run_path, run_path / "adapter", tmp_path / "peft"):  # that of the run, and each adapter's own
        flags = ["--adapter", str(where), "--prompt", "What is 1 + 1?", "--max-completion-length", "4"]
        assert generate.main(flags) == 0
    (run_path / "config.json").unlink()
    assert generate.main(["--adapter", str(run_path), "--prompt", "x", "--max-completion-length", "4"]) == 0


def test_a_model_of_the_hub_is_named_by_its_id(
    text_model: Callable[[list[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the commit that its directory in the hub's cache is named after."""
    path = text_model(["What is 1 + 1?"])
    snapshot = path.rename(path.with_name("0d1f5a"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.chdir(tmp_path)
    assert train.main([*train_flags("owner/name"), *own_rows(tmp_path)]) == 0
    [run_path] = Path("runs").iterdir()
    assert run_path.name.startswith("name-")
    for to in ("peft", "lora"):
        export.main(["--adapter", str(run_path), "--to", to, "--output", to])
        assert json.loads(Path(to, "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"
    lora = a_run(tmp_path / "by-peft", "owner/name", *own_rows(tmp_path), "--method", "lora")
    assert json.loads((lora / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"


def test_a_builtin_model_has_a_directory_for_other_programs(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    run_path = a_run(tmp_path / "run", "builtin")
    assert json.loads((run_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "builtin"
    export.main(["--adapter", str(run_path), "--to", "lora", "--output", str(tmp_path / "lora")])
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    export.main(["--adapter", str(run_path), "--to", "tiny", "--output", str(tmp_path / "t.safetensors")])
    export.main(["--adapter", str(tmp_path / "t.safetensors"), "--to", "peft", "--output", str(tmp_path / "peft")])
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")


def test_evaluate_takes_model_and_task_from_the_run(
    text_model: Callable[[list[str]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = text_model(["What is 1 + 1?"])
    run_path = a_run(tmp_path / "run", model, *own_rows(tmp_path))
    capsys.readouterr()
    more = ["--max-completion-length", "4", "--output-dir", str(tmp_path / "results")]
    assert evaluate.main(["--adapter", str(run_path), *more]) == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["model"] == results["settings"]["model"] == str(model) and list(results["tasks"]) == ["own"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval/n"] == 8


def test_an_adapter_that_names_no_model_here_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "qwen2")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "c5a7f0"}))  # as older ones do
    out = ["--to", "lora", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="names no model that is here: give --model"):
        export.main(["--adapter", str(tmp_path / "adapter"), *out])
    (tmp_path / "adapter").rename(tmp_path / "base" / "adapter")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"settings": {"model": "gone"}}))
    with pytest.raises(InputError, match="--model gone: no such directory"):
        export.main(["--adapter", str(tmp_path / "base"), *out])
