"""The decoder against transformers with the same random weights, and what it refuses to load."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Sampling, rollout
from tinylora.engine.text import Text
from tinylora.errors import InputError
from tinylora.model.loader import load_model
from tinylora.tasks.bases import BUILTIN_MODELS
from tinylora.tasks.builtin import problems

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "head_dim": 24},  # not hidden / heads
    "llama31": {"family": "llama", "rope_parameters": LLAMA31},
    "llama-linear-biased": {
        "family": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        "attention_bias": True,
    },
    "one-kv-head": {"family": "qwen2", "num_key_value_heads": 1, "vocab_size": 101},
    "no-gqa": {"family": "llama", "num_key_value_heads": 4, "intermediate_size": 44},
}


def pair(tiny_model, case):
    import transformers

    path = tiny_model(**CASES[case])
    return path, transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), load_model(str(path))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tiny_model, case):
    """fp32, odd shapes: within 1e-4 of the largest logit."""
    _, theirs, ours = pair(tiny_model, case)
    for shape in ((1, 1), (3, 17), (2, 101), (5, 8)):
        ids = torch.randint(96, shape, generator=torch.Generator().manual_seed(sum(shape)))
        with torch.no_grad():
            want = theirs(ids).logits
        got = ours.logits(ids)
        assert got.dtype == torch.float32 and got.shape == want.shape
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), shape


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_equals_transformers(tiny_model, case):
    """64 tokens, token by token, through prefill, cache and a batch of prompts of different lengths."""
    _, theirs, ours = pair(tiny_model, case)
    prompts = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [12]]
    got = rollout(ours, None, prompts, 1, Sampling(64, temperature=0.0))
    for prompt, completion in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0
        )
        assert completion.tokens == out[0, len(prompt) :].tolist()
        assert not completion.finished and len(completion.tokens) == 64


def test_llama31_scaling_matters(tiny_model):
    """The oracle test above would be empty if the scaling changed nothing at these lengths."""
    plain = load_model(str(tiny_model("llama")))
    scaled = load_model(str(tiny_model("llama", rope_parameters=LLAMA31)))
    ids = torch.arange(90)[None]
    assert (plain.logits(ids) - scaled.logits(ids)).abs().max() > 1e-2


def test_sharded_checkpoint_loads_the_same(tiny_model, tmp_path):
    path, theirs, ours = pair(tiny_model, "qwen2")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    sharded = load_model(str(tmp_path / "sharded"))
    ids = torch.arange(20)[None]
    assert torch.equal(sharded.logits(ids), ours.logits(ids))
    assert sharded.digests == ours.digests


def test_digests_do_not_depend_on_the_dtype_asked_for(tiny_model):
    path = str(tiny_model("qwen2"))
    low = load_model(path, dtype="bfloat16")
    assert low.weight_dtype == torch.bfloat16
    assert low.digests == load_model(path).digests


@pytest.mark.parametrize("backend", ["native", "addmm"])
@pytest.mark.parametrize("multiplies", [True, False])
def test_bfloat16_that_saves_no_time_is_said(tiny_model, monkeypatch, recwarn, multiplies, backend):
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    monkeypatch.setattr("tinylora.model.loader.bf16_products", lambda: multiplies)
    path = str(tiny_model("qwen2"))
    for dtype in ("float32", "bfloat16"):
        load_model(path, dtype=dtype)
    said = [str(w.message) for w in recwarn.list if "multiplies no bf16" in str(w.message)]
    assert len(said) == (not multiplies) and all("--dtype bfloat16" in line for line in said)


@pytest.mark.parametrize("backend", ["native", "addmm"])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_errs_at_most_twice_as_much_as_transformers(tiny_model, monkeypatch, case, backend):
    """On a CPU, against fp64. With the C kernels rows stay in fp32, and the layers' weights alone are bf16."""
    import transformers

    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    path = tiny_model(**CASES[case])
    ours = load_model(str(path), dtype="bfloat16")
    assert ours.weight_dtype == torch.bfloat16
    assert ours.dtype == ours.head.dtype == (torch.float32 if backend == "native" else torch.bfloat16)
    ids = torch.randint(96, (5, 29), generator=torch.Generator().manual_seed(1))
    plain, exact = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=d).eval() for d in (torch.bfloat16, torch.float64)
    )
    with torch.no_grad():
        want = exact(ids).logits
        allowed = 2 * (plain(ids).logits.double() - want).norm()
    assert (ours.logits(ids).double() - want).norm() <= allowed


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def break_nothing_but(path, what):
    weights = path / "model.safetensors"
    if what == "architecture":
        edit_config(path, model_type="gpt_neox")
    elif what == "rope":
        edit_config(path, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    elif what == "quantized":
        edit_config(path, quantization_config={"bits": 4})
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "corrupt":
        weights.write_bytes(b"\xff" * 4096)
    elif what == "missing tensor":
        edit_config(path, num_hidden_layers=3)
    elif what == "shape":
        edit_config(path, intermediate_size=64)
    elif what == "no weights":
        weights.unlink()
    elif what == "config":
        (path / "config.json").write_text("{")
    elif what == "field":
        raw = json.loads((path / "config.json").read_text())
        del raw["hidden_size"]
        (path / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("architecture", "gpt_neox"),
        ("rope", "yarn"),
        ("quantized", "quantization_config"),
        ("truncated", "model.safetensors"),
        ("corrupt", "model.safetensors"),
        ("missing tensor", "no tensor model.layers.2"),
        ("shape", "gate_proj.weight has shape"),
        ("no weights", "model.safetensors"),
        ("config", "not valid JSON"),
        ("field", "hidden_size"),
    ],
)
def test_broken_models_are_named(tiny_model, what, says):
    path = tiny_model("qwen2")
    break_nothing_but(path, what)
    with pytest.raises(InputError, match=says):
        load_model(str(path))


POSITIVE = "it must be a positive integer"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head_dim": 17}, "head_dim is 17; it must be even"),
        ({"head_dim": 1}, "head_dim is 1; it must be even"),
        ({"head_dim": 0}, f"head_dim is 0; {POSITIVE}"),
        ({"head_dim": -8}, f"head_dim is -8; {POSITIVE}"),
        ({"head_dim": False}, f"head_dim is false; {POSITIVE}"),
        ({"head_dim": 8.0}, f"head_dim is 8.0; {POSITIVE}"),
        ({"head_dim": "8"}, f'head_dim is "8"; {POSITIVE}'),
        ({"head_dim": None, "hidden_size": 36}, "head_dim is 9, hidden_size 36 / num_attention_heads 4; it must be even"),
        (
            {"head_dim": None, "hidden_size": 33},
            "hidden_size is 33; without head_dim it must be a multiple of num_attention_heads, 4",
        ),
        (
            {"head_dim": None, "hidden_size": 2},
            "hidden_size is 2; without head_dim it must be a multiple of num_attention_heads, 4",
        ),
        ({"num_attention_heads": 0}, f"num_attention_heads is 0; {POSITIVE}"),
        ({"num_attention_heads": None}, f"num_attention_heads is null; {POSITIVE}"),
        ({"num_attention_heads": True}, f"num_attention_heads is true; {POSITIVE}"),
        ({"num_attention_heads": [4]}, f"num_attention_heads is [4]; {POSITIVE}"),
        ({"num_key_value_heads": 0}, f"num_key_value_heads is 0; {POSITIVE}"),
        ({"num_key_value_heads": -2}, f"num_key_value_heads is -2; {POSITIVE}"),
        ({"num_key_value_heads": 2.5}, f"num_key_value_heads is 2.5; {POSITIVE}"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads, 4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8; it must divide num_attention_heads, 4"),
        ({"hidden_size": 0}, f"hidden_size is 0; {POSITIVE}"),
        ({"hidden_size": None}, f"hidden_size is null; {POSITIVE}"),
        ({"intermediate_size": -48}, f"intermediate_size is -48; {POSITIVE}"),
        ({"num_hidden_layers": 0}, f"num_hidden_layers is 0; {POSITIVE}"),
        ({"vocab_size": "96\n"}, f'vocab_size is "96\\n"; {POSITIVE}'),
    ],
)
def test_counts_and_widths_of_a_config_are_checked(tiny_model, changes, says):
    path = tiny_model("qwen2")
    edit_config(path, **changes)
    with pytest.raises(InputError) as error:
        load_model(str(path))
    assert str(error.value) == f"{path}/config.json: {says}"


def test_what_a_config_leaves_out_follows_from_the_rest(tiny_model):
    path = tiny_model("qwen2", num_key_value_heads=4)
    edit_config(path, num_key_value_heads=None, head_dim=None)
    config = load_model(str(path)).config
    assert (config.num_kv_heads, config.head_dim) == (4, 8)


@pytest.mark.parametrize("head_dim", [17, 33, 1])
def test_an_odd_head_dim_is_one_line_and_no_crash(text_model, head_dim):
    """Weights that fit it, so that nothing but the config is wrong: the C kernels once wrote beyond every head."""
    path = text_model(["one two three"])
    tensors = load_file(path / "model.safetensors")
    rows = {"q_proj": 4 * head_dim, "k_proj": 2 * head_dim, "v_proj": 2 * head_dim}
    for name, tensor in tensors.items():
        if (projection := name.split(".")[-2]) in rows:
            tensors[name] = torch.randn(rows[projection], *tensor.shape[1:])
        elif projection == "o_proj":
            tensors[name] = torch.randn(len(tensor), 4 * head_dim)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_config(path, head_dim=head_dim)
    command = [sys.executable, "-m", "tinylora.generate", "--model", str(path), "--prompt", "one", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr == f"error: {path}/config.json: head_dim is {head_dim}; it must be even\n"


@pytest.mark.parametrize("path", ["/no/such/directory", "./nothing", "nothing"])
def test_missing_directory(path):
    with pytest.raises(InputError, match="no such directory"):
        load_model(path)


def test_dtype_is_checked(tiny_model):
    with pytest.raises(InputError, match="--dtype int8"):
        load_model(str(tiny_model("qwen2")), dtype="int8")


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_a_built_in_base_can_solve_its_task(name):
    """A careful answer to a test problem, once begun, is completed with probability 0.9 or more (in the geometric mean)."""
    model, text, total = load_model(name, "cpu"), Text(BUILTIN_MODELS[name]), 0.0
    for problem, _ in zip(problems("test", 5), range(64), strict=False):
        prompt = text.prompt([{"role": "user", "content": problem.question}])
        answer = text.tokenizer(problem.careful)["input_ids"] + [*text.eos_ids]
        logp = model.logits(torch.tensor([prompt + answer])).log_softmax(-1)[0]
        places = torch.arange(len(prompt), len(prompt) + len(answer) - 1)
        total -= logp[places, torch.tensor(answer[1:])].sum().item()
    assert total / 64 < 0.105


def test_neither_the_file_nor_moved_weights_are_kept(tiny_model):
    path = tiny_model("qwen2")
    model = load_model(str(path), "cpu", "float32")
    assert str(path) not in Path("/proc/self/maps").read_text(), "one tensor of the mapped file keeps all of it in memory"
    buffers = [weakref.ref(g.buffer) for layer in model.layers for g in layer.groups]
    adapter = Adapter(model, TinyLoRAConfig())
    gc.collect()
    assert adapter.base.weights and not any(b() is not None for b in buffers)
