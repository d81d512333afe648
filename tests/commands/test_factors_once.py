"""One model's factors are computed once, whatever command reads its weights in whatever dtype; other numbers get their own."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from foreign import TARGETS, foreign_model
from safetensors.torch import load_file, save_file
from test_own_task import run
from torch import Tensor, nn

import tinylora
from tinylora import TinyLoRAConfig, evaluate, export, load_adapter, load_model, train
from tinylora.adapter import factors
from tinylora.adapter.attached import base_of
from tinylora.adapter.config import DTYPES
from tinylora.adapter.on_decoder import base_of_decoder
from tinylora.adapter.parts import Base, draw_parts
from tinylora.model.loader import resolve_model

SMALL = [
    "--dataset",
    "builtin",
    "--max-completion-length",
    "24",
    "--prompts-per-step",
    "2",
    "--num-generations",
    "2",
    "--max-steps",
    "1",
    "--eval-size",
    "0",
]
LOW = {name: DTYPES[name] for name in ("bfloat16", "float16", "float32")}


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each weight's SVD was taken, by its sum; the factors' cache is empty, the kernels' is as it was."""
    counts: Counter[int] = Counter()
    svd = factors.truncated_svd

    def count(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
        counts[hash(weight.double().sum().item())] += 1
        return svd(weight, r)

    monkeypatch.setattr(factors, "truncated_svd", count)
    monkeypatch.setattr(factors, "cache_dir", lambda: tmp_path / "cache")
    return counts


def copied(to: Path, dtype: torch.dtype, scale: float = 0.7) -> Path:
    """The built-in model in another dtype; scaled, since its own numbers are of bf16."""
    shutil.copytree(resolve_model("builtin"), to)
    tensors = {name: (scale * t.float()).to(dtype) for name, t in load_file(to / "model.safetensors").items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    about = json.loads((to / "config.json").read_text())
    about |= dict.fromkeys({"dtype", "torch_dtype"} & about.keys() or {"dtype"}, str(dtype).removeprefix("torch."))
    (to / "config.json").write_text(json.dumps(about))
    return to


@pytest.mark.parametrize("name", LOW)
def test_train_export_and_attach_compute_each_weight_once(name: str, tmp_path: Path, computed: Counter[int]) -> None:
    from transformers import AutoModelForCausalLM

    model, path = copied(tmp_path / "model", LOW[name]), tmp_path / "run"
    run(train, "--model", str(model), "--output-dir", str(path), *SMALL)
    modules = len(load_model(str(model)).weights())
    assert len(computed) == modules and computed.total() == modules
    run(export, "--adapter", str(path), "--to", "lora", "--output", str(tmp_path / "lora"))
    run(evaluate, "--adapter", str(path), "--eval-size", "2", "--max-completion-length", "24")
    for dtype in (LOW[name], torch.float32, torch.float64):
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        tinylora.attach(theirs, TinyLoRAConfig()).detach()
        load_adapter(path, theirs)
    assert computed.total() == modules and len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("kind", list(TARGETS))
def test_an_attached_model_meets_in_every_dtype_that_holds_its_numbers(kind: str, computed: Counter[int]) -> None:
    for dtype in LOW.values():
        computed.clear()
        config, narrow = TinyLoRAConfig(target_modules=TARGETS[kind]), foreign_model(kind).to(dtype)
        for wide in (torch.float64, dtype, torch.float32):
            draw_parts(config, base_of(narrow.to(wide)))
        assert set(computed.values()) == {1}, dtype


def test_upcast_files_and_rounded_models_meet_too(tmp_path: Path, computed: Counter[int]) -> None:
    """A file in fp32 with numbers of bf16 is the bf16 file's; one read in bf16 is what it was rounded to."""
    exact = copied(tmp_path / "exact", torch.float32)
    low = copied(tmp_path / "low", torch.bfloat16)
    upcast = copied(tmp_path / "upcast", torch.bfloat16)
    tensors = load_file(upcast / "model.safetensors")
    save_file({name: t.float() for name, t in tensors.items()}, upcast / "model.safetensors", {"format": "pt"})
    keys = [
        hashes(base_of_decoder(load_model(str(path), "cpu", dtype)))
        for path, dtype in ((low, "auto"), (upcast, "float32"), (upcast, "bfloat16"), (exact, "bfloat16"), (exact, "float32"))
    ]
    assert keys[0] == keys[1] == keys[2] == keys[3]
    assert not set(keys[0].values()) & set(keys[4].values())


def hashes(base: Base) -> dict[str, str]:
    found = {name: base.values_hash(name) for name in base.weights}
    assert found == {name: base.values_hash(name) for name in base.weights}, "asked again"
    return found


def test_a_bf16_file_read_in_fp16_is_another_model(tmp_path: Path) -> None:
    """Scaled down, so that fp16 rounds: also where what it rounds to would fit into bf16 again."""
    low = copied(tmp_path / "low", torch.bfloat16, 1e-5)
    wide, rounded = (hashes(base_of_decoder(load_model(str(low), "cpu", name))) for name in ("float32", "float16"))
    assert not set(wide.values()) & set(rounded.values())


def test_one_ulp_of_one_weight_is_another_key(computed: Counter[int]) -> None:
    config = TinyLoRAConfig()
    model = foreign_model("qwen2", torch.bfloat16)
    draw_parts(config, base_of(model))
    before = computed.total()
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(torch.int16)[3, 2] += 1
    changed = draw_parts(config, base_of(model.float())).factors
    assert computed.total() == 2 * before
    wanted = factors.truncated_svd(weight, config.r)
    assert all(torch.equal(a, b) for a, b in zip(changed["model.layers.1.mlp.up_proj"], wanted, strict=True))


def test_numbers_rounded_after_attaching_are_hashed_again(computed: Counter[int]) -> None:
    """An adapter on other modules, added after model.bfloat16(), gets the factors of the rounded weights."""
    model = foreign_model("qwen2")
    draw_parts(TinyLoRAConfig(target_modules=("q_proj",)), base_of(model))
    adapter = tinylora.attach(model, TinyLoRAConfig(target_modules=("v_proj",)))
    model.bfloat16()
    adapter.add_adapter("other", TinyLoRAConfig(target_modules=("q_proj",)))
    name = "model.layers.0.self_attn.q_proj"
    found, wanted = adapter.adapters["other"].parts.factors[name], factors.truncated_svd(model.get_submodule(name).weight, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_tied_head_has_factors_of_its_own_model(computed: Counter[int]) -> None:
    """named_parameters() names a shared weight once, so the head's is in no digest."""
    config = TinyLoRAConfig(target_modules=("lm_head",))
    for seed in (0, 1):
        model = foreign_model("qwen2", seed=seed, tie_word_embeddings=True)
        found = draw_parts(config, base_of(model)).factors["lm_head"]
        assert all(torch.equal(a, b) for a, b in zip(found, factors.truncated_svd(model.lm_head.weight, 2), strict=True))


def test_a_transposed_weight_is_another(computed: Counter[int]) -> None:
    """A Conv1D and a Linear of the same name, shape and numbers: one's matrix is the other's turned."""
    from transformers.pytorch_utils import Conv1D

    conv = nn.ModuleDict({"one": Conv1D(8, 8)})
    linear = nn.ModuleDict({"one": nn.Linear(8, 8)})
    linear["one"].weight.data.copy_(conv["one"].weight)
    first, second = (draw_parts(TinyLoRAConfig(target_modules=("one",)), base_of(m)).factors["one"] for m in (conv, linear))
    assert not torch.allclose(first[0], second[0]) and computed.total() == 2


def test_names_are_part_of_the_key(computed: Counter[int]) -> None:
    """The same layers without the head have other names, and no cache that lacks them."""
    model = foreign_model("qwen2")
    assert all(draw_parts(TinyLoRAConfig(), base_of(m)).factors for m in (model, model.model, model))
    assert set(computed.values()) == {2}
