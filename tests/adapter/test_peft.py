"""PEFT's TINYLORA directories: what PEFT saves gives our models its logits, what we save gives PEFT's models ours.

"live" is the installed PEFT; what 0.19.0 saved is committed under data/ (see foreign.py).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import DATA, IDS, TARGETS, foreign_model, peft_saves
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinylora
from tinylora import InputError, TinyLoRAConfig, load_adapter, load_model
from tinylora.adapter import peft as peft_format
from tinylora.adapter.attached import base_of
from tinylora.adapter.on_decoder import base_of_decoder

KINDS = list(TARGETS)
# Of logits of order 1 to 10 in fp32, from other orders of the same sums. On a bf16 base one bit of an activation is 100 times
# that: there the limit is met because every op and its order are PEFT's.
LIMIT = 1e-5


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def untouched(model: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    classes = {type(m).__module__.split(".")[0] for m in model.modules()}
    return (
        list(after) == list(before) and all(torch.equal(after[n], t) for n, t in before.items()) and "tinylora" not in classes
    )


def correction(adapter: tinylora.AttachedAdapter) -> dict[str, Tensor]:
    """B M A of every module, float64."""
    from tinylora.export import corrections

    return {m: BM @ A for m, (A, BM) in corrections(adapter.config, adapter.parts, adapter.v).items()}


# ---- theirs gives ours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_saves_gives_our_layers_its_logits_and_back(
    kind: str, ratio: float, save_projection: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    from peft import PeftModel

    want = logits(peft_saves(tmp_path / "theirs", kind, dtype, ratio, save_projection))
    has_P = any("tinylora_P" in name for name in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert has_P == save_projection
    model = foreign_model(kind, dtype)
    base = logits(model)
    adapter = load_adapter(tmp_path / "theirs", model)
    modules = {"gpt2": 8}.get(kind, 14)
    assert adapter.num_parameters == 3 * max(1, round(modules * (1 - ratio)))
    assert (want - base).abs().max() > 0.1  # the adapter does something
    assert (logits(model) - want).abs().max() <= LIMIT
    adapter.save(tmp_path / "back")
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["weight_tying"]
    assert peft_format.tying(modules, written) == peft_format.tying(modules, ratio)
    back = PeftModel.from_pretrained(foreign_model(kind, dtype), str(tmp_path / "back"))
    assert (logits(back) - want).abs().max() <= LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_0_19_saved(kind: str) -> None:
    """qwen2 partly tied, llama tied, gpt2 untied on a bf16 base."""
    from peft import PeftModel

    dtype = torch.bfloat16 if kind == "gpt2" else torch.float32
    model, want = foreign_model(kind, dtype), load_file(DATA / kind / "expected.safetensors")["logits"]
    base = logits(model)
    load_adapter(DATA / kind, model)
    moved = (want - base).abs().max()
    assert moved > 0.1
    # a processor that multiplies bf16 in its own way rounds the base's products at other places than the one that wrote `want`
    assert (logits(model) - want).abs().max() <= (LIMIT if dtype == torch.float32 else 0.1 * moved)
    theirs = PeftModel.from_pretrained(foreign_model(kind, dtype), str(DATA / kind))
    assert (logits(model) - logits(theirs)).abs().max() <= LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_on_a_bf16_base_is_as_exact_as_pefts(kind: str, tmp_path: Path) -> None:
    """dv against fp64: PEFT rounds dx twice a layer, we once."""
    theirs = peft_saves(tmp_path, kind, torch.bfloat16, 0.0)
    model, exact = foreign_model(kind, torch.bfloat16), foreign_model(kind, torch.bfloat16)
    adapter, truth = load_adapter(tmp_path, model), load_adapter(tmp_path, exact)
    exact.double()
    for m in (theirs, model, exact):
        torch.nn.functional.cross_entropy(m(IDS).logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten()).backward()
    dv = torch.stack([theirs.base_model.tinylora_v["default"][str(g)].grad for g in range(len(adapter.v))])
    assert truth.v.grad.dtype == torch.float64 and dv.dtype == adapter.v.grad.dtype == torch.float32
    errors = [(g.double() - truth.v.grad).norm() / truth.v.grad.norm() for g in (adapter.v.grad, dv)]
    assert errors[0] <= 1.2 * errors[1], errors


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("targets", [TARGETS["qwen2"], ("q_proj", "down_proj")])
def test_on_our_own_decoder(save_projection: bool, targets: tuple[str, ...], tmp_path: Path) -> None:
    changes = {"target_modules": list(targets), "r": 3}
    want = logits(peft_saves(tmp_path / "a", "qwen2", weight_tying=0.5, save_projection=save_projection, **changes))
    foreign_model("qwen2").save_pretrained(tmp_path / "base")
    decoder = load_model(str(tmp_path / "base"), "cpu")
    adapter = load_adapter(tmp_path / "a", decoder)
    assert (decoder.logits(IDS, adapter.matrices()) - want).abs().max() <= LIMIT
    assert (decoder.logits(IDS) - want).abs().max() > 0.1
    adapter.save(tmp_path / "back")
    assert (decoder.logits(IDS, load_adapter(tmp_path / "back", decoder).matrices()) - want).abs().max() <= LIMIT


def test_rank_above_a_small_weight_is_clipped_as_in_peft(tmp_path: Path) -> None:
    """k_proj has 8 rows; PEFT gives it rank 8 where the others have 12."""
    want = logits(peft_saves(tmp_path / "a", "qwen2", save_projection=False, r=12))
    model = foreign_model("qwen2")
    load_adapter(tmp_path / "a", model)
    assert (logits(model) - want).abs().max() <= LIMIT


# ---- ours gives theirs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_tie", "mode", "kept"), [("all", "tiled", True), (1, "tiled", True), (3, "structured", False)])
def test_what_we_write_gives_peft_our_logits(
    kind: str, n_tie: int, mode: str, kept: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = foreign_model(kind, dtype)
    config = TinyLoRAConfig(u=3, n_tie=n_tie, tie_mode=mode, target_modules=TARGETS[kind])
    adapter = tinylora.attach(model, config)
    adapter.load_v(0.3 * torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(1)))
    ours = logits(model)
    assert peft_format.write(tmp_path, adapter.parts, adapter.v, adapter.base) == kept
    theirs = PeftModel.from_pretrained(foreign_model(kind, dtype), str(tmp_path))
    assert (logits(theirs) - ours).abs().max() <= LIMIT
    assert sum(p.numel() for n, p in theirs.named_parameters() if "tinylora_v" in n) == (
        adapter.num_parameters if kept else 3 * len(adapter.parts.factors)
    )
    again = load_adapter(tmp_path, foreign_model(kind, dtype))
    for name, D in correction(adapter).items():
        assert (correction(again)[name] - D).abs().max() <= 1e-5 * D.abs().max()


def test_tying_is_pefts() -> None:
    """The cases of PEFT's own uneven groups, and that a ratio is found wherever there is one."""
    sizes = [peft_format.tying(196, 0.9).count(g) for g in range(20)]
    assert sizes[0] == 9 and sizes[-1] == 25
    assert max(peft_format.tying(252, 0.4).count(g) for g in range(151)) == 102
    for modules in (1, 7, 14, 196):
        for groups in range(1, modules + 1):
            wanted = peft_format.tying(modules, 1 - groups / modules)
            ratio = peft_format.weight_tying(wanted)
            assert ratio is not None and peft_format.tying(modules, ratio) == wanted
    assert peft_format.weight_tying([0] * 16 + [1] * 16 + [2] * 4) is None


def test_projection_is_pefts() -> None:
    from peft import TinyLoraConfig, get_peft_model

    model = get_peft_model(foreign_model("llama"), TinyLoraConfig(r=2, u=5, projection_seed=11, target_modules=["v_proj"]))
    for place in (0, 1):
        theirs = model.base_model.model.model.layers[place].self_attn.v_proj.tinylora_P["default"]
        assert torch.equal(peft_format.draw_projection(5, 2, 11 + place), theirs)


def test_short_names() -> None:
    base = base_of(foreign_model("gpt2"))
    attention = [m for m in base.weights if m.endswith("attn.c_proj")]
    assert peft_format.short_names([m for m in base.weights if m.endswith("c_proj")], base) == ["c_proj"]
    assert peft_format.short_names(attention, base) == attention  # "c_proj" alone would mean the MLP's too


# ---- refused ----------------------------------------------------------------------------------------------------------------


def edit(directory: Path, tensors: Callable[[dict[str, Tensor]], object] | None = None, **config: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors is not None:
        held = load_file(directory / "adapter_model.safetensors")
        tensors(held)
        save_file(held, directory / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_"
EDITS: list[tuple[str, str, Callable[[Path], object]]] = [
    ("a LoRA", "of type LORA; only TINYLORA", lambda d: edit(d, peft_type="LORA")),
    ("extra modules", "modules_to_save is .'lm_head'", lambda d: edit(d, modules_to_save=["lm_head"])),
    ("biases", "bias is 'all'", lambda d: edit(d, bias="all")),
    ("no u", "lacks u, projection_seed or weight_tying", lambda d: edit(d, u=None)),
    ("a wild ratio", "lacks u, projection_seed or weight_tying", lambda d: edit(d, weight_tying=7)),
    ("another ratio", "v do not fit 14 modules", lambda d: edit(d, weight_tying=1.0)),
    ("another u", "v do not fit .* of 4 numbers", lambda d: edit(d, u=4)),
    ("lost group", "v do not fit", lambda d: edit(d, lambda t: t.pop("base_model.tinylora_v.2"))),
    ("lost A", "A, B and P name different modules", lambda d: edit(d, lambda t: t.pop(Q + "A"))),
    ("lost P of one", "A, B and P name different modules", lambda d: edit(d, lambda t: t.pop(Q + "P"))),
    ("wrong shape of A", "q_proj: A has shape", lambda d: edit(d, lambda t: t.update({Q + "A": torch.ones(2, 15)}))),
    ("wrong shape of B", "q_proj: B has shape", lambda d: edit(d, lambda t: t.update({Q + "B": torch.ones(16, 3)}))),
    ("wrong shape of P", "q_proj: P has shape", lambda d: edit(d, lambda t: t.update({Q + "P": torch.ones(3, 2, 3)}))),
    ("NaN", "is not finite", lambda d: edit(d, lambda t: t[Q + "B"].view(-1)[3].fill_(torch.nan))),
    ("strange tensor", "unknown tensor ../../etc", lambda d: edit(d, lambda t: t.update({"../../etc/passwd": torch.ones(2)}))),
    ("other factors", "factors of .*q_proj are not those", lambda d: edit(d, lambda t: t[Q + "A"][0].mul_(-1))),
    ("swapped vectors", "factors of .*q_proj are not those", lambda d: edit(d, lambda t: t[Q + "A"].copy_(t[Q + "A"].flip(0)))),
    ("0.19 without P", "P is lost", lambda d: edit(d, lambda t: [t.pop(n) for n in [*t] if n.endswith("_P")])),
    ("truncated", "cannot be read", lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")),
    ("a pickle by name", "adapter_model.bin is a pickle", lambda d: torch.save({}, d / "adapter_model.bin")),
    ("a pickle in disguise", "cannot be read", lambda d: torch.save({}, d / "adapter_model.safetensors")),
    ("no tensors", "adapter_model.safetensors is missing", lambda d: (d / "adapter_model.safetensors").unlink()),
    ("broken json", "cannot be read", lambda d: (d / "adapter_config.json").write_text("{")),
]


@pytest.mark.parametrize(("message", "damage"), [e[1:] for e in EDITS], ids=[e[0] for e in EDITS])
def test_broken_directories_are_refused_and_the_model_is_untouched(
    message: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    directory = tmp_path / "adapter_dir"
    shutil.copytree(DATA / "qwen2", directory)
    model = foreign_model("qwen2")
    before = weights_of(model)
    damage(directory)
    with pytest.raises(InputError, match=message):
        load_adapter(directory, model)
    assert untouched(model, before)


@pytest.mark.parametrize(
    ("message", "kind", "changes"),
    [
        ("factors of .* are not those of", "qwen2", {"seed": 1}),
        ("wants|v do not fit", "qwen2", {"hidden_size": 24, "head_dim": 6}),
        ("is no linear of|v do not fit", "qwen2", {"num_hidden_layers": 1}),
        ("is no linear of", "gpt2", {}),
    ],
)
def test_other_bases_are_refused(message: str, kind: str, changes: dict[str, object]) -> None:
    model = foreign_model(kind, **changes)
    before = weights_of(model)
    with pytest.raises(InputError, match=message):
        load_adapter(DATA / "qwen2", model)
    assert untouched(model, before)


def test_a_decoder_is_untouched_too(tmp_path: Path) -> None:
    foreign_model("qwen2", seed=1).save_pretrained(tmp_path / "base")
    decoder = load_model(str(tmp_path / "base"), "cpu")
    before = decoder.logits(IDS)
    with pytest.raises(InputError, match="not those of .*base"):
        load_adapter(DATA / "qwen2", decoder)
    assert all(g.A is None for layer in decoder.layers for g in layer.groups) and torch.equal(decoder.logits(IDS), before)
    assert base_of_decoder(decoder).weights.keys() == base_of(foreign_model("qwen2")).weights.keys() - {"lm_head"}
