"""What is trained: how many numbers, which modules share them, what they become, and what a saved adapter refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinylora import prng
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.errors import InputError
from tinylora.loading import load_adapter
from tinylora.model.config import PROJECTIONS, module_name
from tinylora.model.decoder import Decoder
from tinylora.model.loader import load_model

# ---- counts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "layers", "modules"),
    [
        ("Qwen2.5-0.5B", 24, 168),
        ("Qwen2.5-1.5B", 28, 196),
        ("Qwen2.5-3B", 36, 252),
        ("Qwen2.5-7B", 28, 196),
        ("Llama-3.2-1B", 16, 112),
        ("Llama-3.2-3B", 28, 196),
        ("Llama-3.1-8B", 32, 224),
        ("Qwen3-0.6B", 28, 196),
        ("Qwen3-1.7B", 28, 196),
        ("Qwen3-4B", 36, 252),
        ("Qwen3-8B", 36, 252),
    ],
)
def test_modules_of_the_models_people_use(model: str, layers: int, modules: int) -> None:
    """Untied, u = 1: one number for each of the seven projections of every layer."""
    assert len(TinyLoRAConfig().groups(layers)) == modules
    for mode in ("tiled", "structured"):
        assert TinyLoRAConfig(n_tie=1, tie_mode=mode).num_parameters(layers) == modules


COUNTS = [
    # figure 1 and the tables, Qwen2.5-7B
    *[(28, 1, n_tie, "tiled", count) for n_tie, count in [(1, 196), (2, 98), (4, 49), (8, 25), (16, 13), (32, 7), (64, 4)]],
    *[(28, 1, n_tie, "tiled", count) for n_tie, count in [(128, 2), (196, 1), (256, 1), ("all", 1)]],
    (28, 13, "all", "tiled", 13),  # the other reading of 13
    (28, 2, 1, "tiled", 392),
    (28, 32, 1, "tiled", 6272),
    (28, 512, 1, "tiled", 100352),
    # figure 8, Qwen2.5-3B and Llama-3.2-3B
    *[(36, u, 1, "tiled", count) for u, count in [(1, 252), (4, 1008), (16, 4032), (64, 16128)]],
    *[(36, u, 8, "tiled", count) for u, count in [(1, 32), (4, 128), (16, 512), (64, 2048)]],
    *[(36, u, 64, "tiled", count) for u, count in [(1, 4), (4, 16), (16, 64), (64, 256)]],
    *[(36, u, 512, "tiled", count) for u, count in [(1, 1), (4, 4), (16, 16), (64, 64)]],
    *[(28, u, 1, "tiled", count) for u, count in [(4, 784), (16, 3136), (64, 12544)]],
    *[(28, u, 8, "tiled", count) for u, count in [(4, 100), (16, 400), (64, 1600)]],
    # figure 4, Qwen2.5-3B: both ways of tying
    *[(36, 1, n_tie, "tiled", count) for n_tie, count in [(32, 8), (16, 16), (8, 32), (4, 63), (2, 126), (1, 252)]],
    *[(36, 1, n_tie, "structured", count) for n_tie, count in [(32, 14), (16, 21), (8, 35), (4, 63), (2, 126), (1, 252)]],
    (36, 1, "all", "structured", 7),
    (36, 5, 8, "structured", 175),
]


@pytest.mark.parametrize(("layers", "u", "n_tie", "mode", "count"), COUNTS)
def test_trained_numbers_as_published(layers: int, u: int, n_tie: int | str, mode: str, count: int) -> None:
    assert TinyLoRAConfig(u=u, n_tie=n_tie, tie_mode=mode).num_parameters(layers) == count


def test_the_adapter_trains_as_many_numbers_as_its_config_says(decoder: Decoder) -> None:
    config = TinyLoRAConfig(u=3, n_tie=4)
    adapter = Adapter(decoder, config)
    assert adapter.num_parameters == config.num_parameters(2) == 12
    assert adapter.v.shape == (4, 3) and adapter.v.requires_grad and adapter.v.dtype == torch.float32
    assert not adapter.v.any()  # zero: step 0 is the base model


# ---- tying ------------------------------------------------------------------------------------------------------------------


def by_layer(config: TinyLoRAConfig, layers: int = 3) -> list[list[int]]:
    """Group numbers, one row for each layer in module order; also checks the names."""
    groups = config.groups(layers)
    types = [p for p in PROJECTIONS if p in config.target_modules]
    assert list(groups) == [module_name(layer, p) for layer in range(layers) for p in types]
    return [[groups[module_name(layer, p)] for p in types] for layer in range(layers)]


def test_module_order_and_names() -> None:
    """As PEFT and the checkpoints name them; a change here would silently retie every saved adapter."""
    assert list(TinyLoRAConfig().groups(2))[5:9] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    assert PROJECTIONS == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # tiled: the list of 21 modules cut into chunks, across the layers' borders; the last chunk may be short
        ({"n_tie": 4}, [[0, 0, 0, 0, 1, 1, 1], [1, 2, 2, 2, 2, 3, 3], [3, 3, 4, 4, 4, 4, 5]]),
        ({"n_tie": 16}, [[0] * 7, [0] * 7, [0, 0, 1, 1, 1, 1, 1]]),
        ({"n_tie": 1}, [list(range(7)), list(range(7, 14)), list(range(14, 21))]),
        ({"n_tie": "all"}, [[0] * 7] * 3),
        # structured: same type, neighbouring layers
        ({"n_tie": 2, "tie_mode": "structured"}, [[0, 2, 4, 6, 8, 10, 12]] * 2 + [[1, 3, 5, 7, 9, 11, 13]]),
        ({"n_tie": 3, "tie_mode": "structured"}, [[0, 1, 2, 3, 4, 5, 6]] * 3),
        ({"n_tie": "all", "tie_mode": "structured"}, [[0, 1, 2, 3, 4, 5, 6]] * 3),
        # fewer types; the order in which the user names them does not matter
        ({"n_tie": 4, "target_modules": ("down_proj", "q_proj")}, [[0, 0], [0, 0], [1, 1]]),
        ({"n_tie": 4, "target_modules": ("q_proj", "down_proj")}, [[0, 0], [0, 0], [1, 1]]),
        ({"n_tie": 2, "tie_mode": "structured", "target_modules": ("down_proj", "q_proj")}, [[0, 2], [0, 2], [1, 3]]),
        ({"n_tie": 2, "target_modules": ("q_proj", "k_proj", "up_proj")}, [[0, 0, 1], [1, 2, 2], [3, 3, 4]]),
    ],
)
def test_groups_of_three_layers(changes: dict[str, object], expected: list[list[int]]) -> None:
    assert by_layer(TinyLoRAConfig(**changes)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "--r 0"),
        ({"u": -1}, "--u -1"),
        ({"n_tie": 0}, "--n-tie 0"),
        ({"n_tie": "some"}, "--n-tie some"),
        ({"tie_mode": "both"}, "--tie-mode both"),
        ({"param_dtype": "int8"}, "--param-dtype int8"),
        ({"target_modules": "q_proj"}, "--target-modules q_proj: it must be a list"),
        ({"target_modules": ()}, "--target-modules"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TinyLoRAConfig(**changes)


def test_rank_above_the_smallest_weight_is_refused(decoder: Decoder) -> None:
    """k and v of the tiny model have 16 rows."""
    with pytest.raises(InputError, match="--r 17: the smallest adapted weight has only 16"):
        Adapter(decoder, TinyLoRAConfig(r=17))
    Adapter(decoder, TinyLoRAConfig(r=17, target_modules=("q_proj",)))


# ---- P and M ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoder(tiny_model: Callable[..., Path]) -> Decoder:
    return load_model(str(tiny_model()), "cpu")


def projection(config: TinyLoRAConfig, layer: int, name: str) -> Tensor:
    """P of one module as documented: normals of the stream (seed, place among all projections), over sqrt(r)."""
    place = 7 * layer + PROJECTIONS.index(name)
    return (prng.normal((config.u, config.r, config.r), config.p_seed, place) / math.sqrt(config.r)).float()


def segments(adapter: Adapter, v: Tensor | None = None) -> dict[str, Tensor]:
    """M of each module of the tiny model's two layers, (adapters, r, r); asserts that all else is zero."""
    fused = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    matrices, found = adapter.matrices(v), {}
    assert len(matrices) == 8
    for i, m in enumerate(matrices):
        names = fused[i % 4]
        adapted = [name for name in names if name in adapter.config.target_modules]
        assert (m is None) == (not adapted)
        if m is None:
            continue
        assert m.shape[1] * adapter.config.r % adapter.model.narrow == 0  # what a CPU's plain products need
        for s in range(m.shape[1]):
            if s < len(names) and names[s] in adapted:
                found[module_name(i // 4, names[s])] = m[:, s]
            else:
                # Padding must not reach y, nor a module that is not adapted.
                assert not m[:, s].any()
    return found


@pytest.mark.parametrize("r", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"u": 5, "n_tie": 3},
        {"u": 2, "n_tie": 1, "tie_mode": "structured"},
        {"u": 13, "n_tie": "all", "target_modules": ("k_proj", "up_proj", "o_proj")},
        {"u": 2, "n_tie": 2, "target_modules": ("v_proj",), "projection_seed": 9},
    ],
)
def test_M_is_the_sum_of_v_times_P(r: int, changes: dict[str, object], decoder: Decoder) -> None:
    config = TinyLoRAConfig(r=r, seed=4, **changes)
    adapter = Adapter(decoder, config)
    groups = config.groups(2)
    v = torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(0))
    found = segments(adapter, v)
    assert list(found) == list(groups)
    for layer in range(2):
        for name in PROJECTIONS:
            if name in config.target_modules:
                module = module_name(layer, name)
                expected = sum(v[groups[module], i] * projection(config, layer, name)[i] for i in range(config.u))
                assert (found[module][0] - expected).abs().max() < 1e-6 * config.u


@pytest.mark.parametrize("changes", [{}, {"target_modules": ("k_proj", "down_proj")}, {"param_dtype": "bfloat16"}])
def test_the_relative_change_is_that_of_the_dense_weights(changes: dict[str, object], decoder: Decoder) -> None:
    adapter = Adapter(decoder, TinyLoRAConfig(**({"u": 3, "n_tie": 4} | changes)))
    assert adapter.relative_change() == 0
    adapter.load_v(torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(0)))
    moved, whole, v = 0.0, 0.0, adapter.stored_v().detach().double()
    for name, W in decoder.weights().items():
        if name in adapter.parts.group_of:
            A, B = (x.double() for x in adapter.parts.factors[name])
            M = sum(v[adapter.parts.group_of[name], i] * adapter.parts.projections[name][i].double() for i in range(3))
            moved, whole = moved + (B @ M @ A).square().sum().item(), whole + W.double().square().sum().item()
    assert math.isclose(adapter.relative_change(), math.sqrt(moved / whole), rel_tol=1e-5)


def test_gradient_of_v_is_the_inner_product_with_P(decoder: Decoder) -> None:
    """dv[g, i] = sum of <dM, P_i> over the modules of group g, exactly what tying means."""
    config = TinyLoRAConfig(u=2, n_tie=5)
    adapter = Adapter(decoder, config)
    weights = {module: torch.randn(1, 2, 2) for module in config.groups(2)}
    sum((weights[module] * m).sum() for module, m in segments(adapter).items()).backward()
    expected = torch.zeros(3, 2)
    for module, group in config.groups(2).items():
        layer, name = int(module.split(".")[2]), module.split(".")[-1]
        expected[group] += (weights[module] * projection(config, layer, name)).sum((1, 2))
    assert adapter.v.grad is not None and (adapter.v.grad - expected).abs().max() < 1e-5


def test_several_adapters_are_the_single_ones_stacked(decoder: Decoder) -> None:
    adapter = Adapter(decoder, TinyLoRAConfig(u=3, n_tie=4))
    v = torch.randn(5, *adapter.v.shape, generator=torch.Generator().manual_seed(1))
    for together, *single in zip(adapter.matrices(v), *(adapter.matrices(x) for x in v), strict=True):
        assert together.shape[0] == 5 and torch.equal(together, torch.cat(single))


def test_P_differs_in_every_module_and_seed(decoder: Decoder) -> None:
    """With one v for all, modules differ by P alone; P shared among modules would leave u > r^2 without effect."""

    def draw(**seeds: int) -> list[Tensor]:
        adapter = Adapter(decoder, TinyLoRAConfig(n_tie="all", **seeds))
        return list(segments(adapter, torch.ones(1, 1)).values())

    drawn = draw() + draw(seed=1)
    assert len(drawn) == 28
    for i, first in enumerate(drawn):
        assert all((first - other).abs().max() > 1e-3 for other in drawn[:i])
    # --projection-seed alone names P, whatever the run's seed
    assert all(torch.equal(a, b) for a, b in zip(draw(seed=1), draw(seed=5, projection_seed=1), strict=True))


def test_P_of_a_module_does_not_depend_on_which_others_are_adapted(decoder: Decoder) -> None:
    v = torch.tensor([[0.3, -1.0, 2.0]])
    every = segments(Adapter(decoder, TinyLoRAConfig(u=3, n_tie="all")), v)
    for targets in (("down_proj",), ("v_proj", "gate_proj"), PROJECTIONS[1:]):
        for module, m in segments(Adapter(decoder, TinyLoRAConfig(u=3, n_tie="all", target_modules=targets)), v).items():
            assert torch.equal(m, every[module])


@pytest.mark.parametrize("r", [1, 2, 4])
def test_P_has_standard_deviation_one_over_sqrt_r(r: int, decoder: Decoder) -> None:
    """Read back through M with one unit of v at a time; r and u do not change the size of a step."""
    u = 256
    adapter = Adapter(decoder, TinyLoRAConfig(r=r, u=u, n_tie="all"))
    entries = torch.cat([m.flatten() for m in segments(adapter, torch.eye(u).unsqueeze(1)).values()]).double()
    n = len(entries)
    assert n == 14 * u * r * r
    assert abs(entries.mean()) < 5 / math.sqrt(r * n)
    assert abs(entries.std() - 1 / math.sqrt(r)) < 5 / math.sqrt(2 * r * n)


# ---- precision --------------------------------------------------------------------------------------------------------------

HARD = [0.1, -0.3, 1.0000001, 3.14159274, 1e-3, -6.1e-5, 5e-8, 1e-9, 0.0, 1234.56, -65500.0, 2.0**-25 * 1.01]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("name", DTYPES)
def test_stored_v_is_rounded_and_its_gradient_passes_straight_through(name: str, decoder: Decoder) -> None:
    adapter = Adapter(decoder, TinyLoRAConfig(u=len(HARD), n_tie="all", param_dtype=name))
    adapter.load_v(torch.tensor([HARD]))
    assert torch.equal(adapter.v.detach(), torch.tensor([HARD]))  # the master keeps fp32
    stored = adapter.stored_v()
    assert stored.dtype == torch.float32
    assert torch.equal(stored.detach(), torch.tensor([HARD]).to(DTYPES[name]).float())
    assert (stored.detach() != adapter.v.detach()).sum() >= 7  # or the line above says nothing
    slopes = torch.arange(1.0, len(HARD) + 1)
    (stored * slopes).sum().backward()
    assert adapter.v.grad is not None and torch.equal(adapter.v.grad, slopes.unsqueeze(0))


def test_float32_v_is_not_touched(decoder: Decoder) -> None:
    adapter = Adapter(decoder, TinyLoRAConfig(u=len(HARD), n_tie="all"))
    adapter.load_v(torch.tensor([HARD]))
    assert torch.equal(adapter.stored_v().detach(), torch.tensor([HARD]))


@pytest.mark.parametrize("name", DTYPES)
def test_forward_uses_the_rounded_v(name: str, decoder: Decoder) -> None:
    """What is trained and evaluated is what will be on disk."""
    adapter = Adapter(decoder, TinyLoRAConfig(u=2, n_tie=3, param_dtype=name))
    v = torch.randn(adapter.v.shape)
    exact = Adapter(decoder, TinyLoRAConfig(u=2, n_tie=3))
    for rounded, expected in zip(adapter.matrices(v), exact.matrices(v.to(DTYPES[name]).float()), strict=True):
        assert torch.equal(rounded, expected)


# ---- files ------------------------------------------------------------------------------------------------------------------

TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))


def trained(model: Decoder, **changes: object) -> Adapter:
    adapter = Adapter(model, TinyLoRAConfig(**{"u": 2, "n_tie": 4, "seed": 6, **changes}))
    adapter.load_v(0.5 * torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(2)))
    return adapter


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"param_dtype": "bfloat16"},
        {"param_dtype": "float16", "r": 3, "tie_mode": "structured", "n_tie": "all", "projection_seed": 1},
        {"target_modules": ("down_proj", "q_proj"), "r": 1},
    ],
)
def test_saved_adapter_loads_to_the_same_bits(
    family: str, changes: dict[str, object], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Onto a freshly loaded base, from the adapter's directory or from the run's."""
    base = tiny_model(family)
    model = load_model(str(base), "cpu")
    adapter = trained(model, **changes)
    adapter.save(tmp_path / "run" / "adapter")
    logits = model.logits(TOKENS, adapter.matrices())
    assert (logits - model.logits(TOKENS)).abs().max() > 0.05  # the adapter does something

    fresh = load_model(str(base), "cpu")
    for directory in (tmp_path / "run" / "adapter", str(tmp_path / "run")):
        loaded = load_adapter(directory, fresh)
        # projection_seed is written out as what it came to
        assert loaded.config.p_seed == adapter.config.p_seed
        assert loaded.parts.group_of == adapter.parts.group_of and loaded.parts.projection_hash == adapter.parts.projection_hash
        assert torch.equal(loaded.v, adapter.stored_v()) and loaded.v.requires_grad
        assert torch.equal(fresh.logits(TOKENS, loaded.matrices()), logits)


def test_saved_files(decoder: Decoder, tmp_path: Path) -> None:
    """A few numbers in the declared precision, a config that says what they are, and no path but the one that was typed."""
    adapter = trained(decoder, param_dtype="bfloat16")
    adapter.save(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "v": (4, 2),
        "sketch.A": (14, 2, 16),
        "sketch.B": (14, 2, 16),
    }
    assert tensors["v"].dtype == torch.bfloat16
    assert torch.equal(tensors["v"], adapter.v.detach().bfloat16())
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    about = json.loads(text)
    expected = {"r": 2, "u": 2, "n_tie": 4, "tie_mode": "tiled", "seed": 6, "projection_seed": 6, "param_dtype": "bfloat16"}
    assert expected.items() <= about.items()
    assert (about["num_parameters"], about["modules"], about["format"]) == (8, 14, "tinylora")
    assert about["base_model_name_or_path"] == str(decoder.path)
    assert text.count(str(decoder.path.parent)) == 1


def test_saving_again_replaces(decoder: Decoder, tmp_path: Path) -> None:
    adapter = trained(decoder)
    adapter.save(tmp_path / "a")
    adapter.load_v(adapter.v.detach() * 2)
    adapter.save(tmp_path / "a")
    assert torch.equal(load_adapter(tmp_path / "a", decoder).v, adapter.v)
    assert len(list((tmp_path / "a").iterdir())) == 2


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_another_base_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The message names both bases; one changed weight is enough, wherever it is."""
    base = tiny_model()
    trained(load_model(str(base), "cpu")).save(tmp_path / "a")
    other = tiny_model(seed=1)
    with pytest.raises(InputError, match=f"was trained on {base} .*this model is {other} .*Give the base"):
        load_adapter(tmp_path / "a", load_model(str(other), "cpu"))
    deeper = tiny_model(num_hidden_layers=3)
    with pytest.raises(InputError, match=r"14 modules\); this model is .* 21 modules\)"):
        load_adapter(tmp_path / "a", load_model(str(deeper), "cpu"))
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        tensors = load_file(base / "model.safetensors")
        original = tensors[name].clone()
        tensors[name].view(-1)[-1] += 1e-3
        save_file(tensors, base / "model.safetensors")
        with pytest.raises(InputError, match="was trained on"):
            load_adapter(tmp_path / "a", load_model(str(base), "cpu"))
        tensors[name] = original
        save_file(tensors, base / "model.safetensors")
    load_adapter(tmp_path / "a", load_model(str(base), "cpu"))  # all else alike it loads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_hash": "0" * 32}, "P of seed 6 comes out differently"),
        ({"projection_seed": 7}, "P of seed 7 comes out differently"),
        ({"format": "peft"}, "not a tinylora adapter of format version 1"),
        ({"format_version": 2}, "not a tinylora adapter of format version 1"),
        ({"tie_mode": "both"}, "--tie-mode both"),
        ({"u": 0}, "--u 0"),
        ({"n_tie": 5}, r"v has shape \(4, 2\); this adapter's is \(3, 2\)"),
    ],
)
def test_edited_config_is_refused(change: dict[str, object], message: str, decoder: Decoder, tmp_path: Path) -> None:
    trained(decoder).save(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(InputError, match=message):
        load_adapter(tmp_path, decoder)


@pytest.mark.parametrize("text", ["{", "", "[]", "3", '"tinylora"', "{}", "null", "\x00"])
def test_config_that_is_not_a_json_object_is_refused(text: str, decoder: Decoder, tmp_path: Path) -> None:
    trained(decoder).save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match="cannot be read|not a tinylora adapter"):
        load_adapter(tmp_path, decoder)


@pytest.mark.parametrize("field", ["target_modules", "base_model_hash", "projection_hash", "r"])
def test_config_that_lacks_a_field_is_refused(field: str, decoder: Decoder, tmp_path: Path) -> None:
    """A default in its place could be wrong without a word."""
    trained(decoder).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    about = json.loads(path.read_text())
    del about[field]
    path.write_text(json.dumps(about))
    with pytest.raises(InputError, match=f"adapter_config.json lacks .*{field}"):
        load_adapter(tmp_path, decoder)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("module", range(14))
def test_flipped_sign_of_one_vector_is_refused(side: str, module: int, decoder: Decoder, tmp_path: Path) -> None:
    """A flipped singular vector turns a trained v into another function; one row of one module is enough."""
    trained(decoder).save(tmp_path)

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[f"sketch.{side}"][module, 1].neg_()

    edit_tensors(tmp_path, flip)
    with pytest.raises(InputError, match=f"the factors {side} come out differently"):
        load_adapter(tmp_path, decoder)


def test_flipped_sign_is_refused_however_small_the_vector(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Singular values of one model span orders of magnitude, so each vector counts relative to itself."""
    base = tiny_model()
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e-4
    save_file(weights, base / "model.safetensors")
    decoder = load_model(str(base), "cpu")
    trained(decoder).save(tmp_path / "a")
    load_adapter(tmp_path / "a", decoder)

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["sketch.B"][6, 0].neg_()

    edit_tensors(tmp_path / "a", flip)
    with pytest.raises(InputError, match="the factors B come out differently"):
        load_adapter(tmp_path / "a", decoder)


def test_rounding_of_the_factors_is_no_reason_to_refuse(decoder: Decoder, tmp_path: Path) -> None:
    """Another thread count or machine changes their last bits."""
    trained(decoder).save(tmp_path)

    def disturb(tensors: dict[str, Tensor]) -> None:
        for side in "AB":
            sketch = tensors[f"sketch.{side}"]
            tensors[f"sketch.{side}"] = sketch * (1 + 1e-5 * torch.randn_like(sketch))

    edit_tensors(tmp_path, disturb)
    load_adapter(tmp_path, decoder)


@pytest.mark.parametrize("name", ["v", "sketch.A", "sketch.B"])
def test_tensors_that_lack_one_are_refused(name: str, decoder: Decoder, tmp_path: Path) -> None:
    trained(decoder).save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match="adapter_model.safetensors lacks"):
        load_adapter(tmp_path, decoder)


@pytest.mark.parametrize("name", ["v", "sketch.A", "sketch.B"])
def test_tensors_that_are_not_finite_are_refused(name: str, decoder: Decoder, tmp_path: Path) -> None:
    """NaN compares with nothing, so a check by tolerance is easily passed by it."""
    trained(decoder).save(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] = torch.nan

    edit_tensors(tmp_path, spoil)
    with pytest.raises(InputError, match="not finite|come out differently"):
        load_adapter(tmp_path, decoder)


def test_sketch_of_another_shape_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    trained(decoder).save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"sketch.A": tensors["sketch.A"][:, :, :8].contiguous()}))
    with pytest.raises(InputError, match="the factors A come out differently"):
        load_adapter(tmp_path, decoder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(name: str, decoder: Decoder, tmp_path: Path) -> None:
    trained(decoder).save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"--adapter .*{name} is missing"):
        load_adapter(tmp_path, decoder)


def test_missing_directory_is_named(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--adapter .*nowhere"):
        load_adapter(tmp_path / "nowhere", decoder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--adapter .*file cannot be read"):
        load_adapter(tmp_path / "file", decoder)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_tensors_are_refused(keep: float, decoder: Decoder, tmp_path: Path) -> None:
    trained(decoder).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(tmp_path, decoder)


def test_v_of_another_shape_is_refused(decoder: Decoder) -> None:
    with pytest.raises(InputError, match=r"v has shape \(3, 1\); this adapter's is \(1, 1\)"):
        Adapter(decoder, TinyLoRAConfig()).load_v(torch.zeros(3, 1))


def test_targets_that_a_decoder_does_not_have_are_refused(decoder: Decoder) -> None:
    with pytest.raises(InputError, match="--target-modules lm_head: no such linear"):
        Adapter(decoder, TinyLoRAConfig(target_modules=("q_proj", "lm_head")))
    with pytest.raises(InputError, match="lm_head.*choose from q_proj"):
        TinyLoRAConfig(target_modules=("q_proj", "lm_head")).num_parameters(2)
