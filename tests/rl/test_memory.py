"""The memory plan: close to what is measured, kept within what is free, and refused up front where nothing fits."""

from types import SimpleNamespace

import pytest
import torch

from bench.measure import peak_extra_bytes
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.memory import cache_bytes, free_bytes
from tinylora.engine.slots import Kept
from tinylora.errors import InputError
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.loader import load_model
from tinylora.rl.memory import activation_bytes, plan_memory


@pytest.fixture
def model(tiny_model):
    sizes = {"hidden_size": 128, "intermediate_size": 448, "head_dim": 32, "num_hidden_layers": 6}
    model = load_model(str(tiny_model("qwen2", **sizes)))
    Adapter(model, TinyLoRAConfig())
    return model


@pytest.mark.parametrize("lengths", [[16] * 64, [150] * 8])
def test_the_plan_is_what_an_update_takes(model, lengths):
    """Forward and backward of a pack: the measured peak is within a quarter of the plan, short sequences and long."""
    adapter = Adapter(model, TinyLoRAConfig())
    tokens = torch.arange(sum(lengths)) % 90

    def step():
        hidden = model.packed(tokens, lengths, adapter.matrices())
        logp, _ = token_logprobs(hidden, model.head, tokens)
        logp.sum().backward()

    step()
    planned, measured = activation_bytes(model) * len(tokens), peak_extra_bytes(step)
    print(f"planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert 0.75 * planned <= measured <= 1.25 * planned


def test_it_fits_what_is_free(model):
    per_token, per_position = activation_bytes(model), model.config.cache_bytes(4)
    roomy = plan_memory(model, 100, 64, None, free=1 << 32)
    assert roomy.microbatch_tokens == 4096 and roomy.cache == 64 * 100 * per_position
    tight = plan_memory(model, 100, 64, None, free=300 * (per_token + per_position))
    assert 100 <= tight.microbatch_tokens < 4096
    assert tight.activations + tight.cache <= 0.9 * tight.free and tight.cache >= 100 * per_position
    little = plan_memory(model, 100, 4, None, free=300 * (per_token + per_position))  # what so small a cache leaves
    assert little.cache == 400 * per_position and little.activations + little.cache > 0.9 * little.free - per_token
    assert plan_memory(model, 100, 64, 777, free=1 << 32).microbatch_tokens == 777
    with pytest.raises(InputError, match="out of memory before the first step"):
        plan_memory(model, 100, 64, None, free=90 * (per_token + per_position))
    assert "weights" in str(roomy) and "decode step reads" in str(roomy)


@pytest.mark.parametrize("multiplies", [True, False])
def test_bf16_weights_on_a_cpu_lie_there_twice(tiny_model, monkeypatch, multiplies):
    """Where the processor multiplies bf16: as they are, and once more in the order that few rows read; that copy comes out of
    what is free."""
    monkeypatch.setenv("TINYLORA_BACKEND", "native")
    monkeypatch.setattr("tinylora.kernels.frozen.bf16_products", lambda: multiplies)
    path = str(tiny_model("qwen2", hidden_size=128, intermediate_size=448, head_dim=32))
    plain, narrow = (
        plan_memory(load_model(path, "cpu", dtype), 100, 64, None, free=1 << 30) for dtype in ("float32", "bfloat16")
    )
    model = load_model(path, "cpu", "bfloat16")
    copies = sum(g.weight.numel() * 2 for layer in model.layers for g in layer.groups)
    if multiplies:
        assert narrow.weights == plain.weights and narrow.free == plain.free - copies
    else:
        assert narrow.weights == plain.weights - copies and narrow.free == plain.free


def test_a_gpus_cache_is_of_what_is_free(monkeypatch):
    """Half of it where nobody says, and 24 GiB at most; the room of a cache before counts as free, and is taken if it does."""
    gb, gpu = 1 << 30, SimpleNamespace(device=torch.device("cuda"), kept=None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * gb, 80 * gb))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * gb)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * gb)
    assert free_bytes(gpu) == 12 * gb and cache_bytes(gpu, 1) == 6 * gb
    gpu.kept = Kept(torch.empty(gb, dtype=torch.bfloat16, device="meta"))
    assert free_bytes(gpu) == 14 * gb and cache_bytes(gpu, 2 * gb) == 2 * gb and cache_bytes(gpu, 2 * gb + 1) == 7 * gb
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * gb, 80 * gb))
    assert cache_bytes(gpu, 3 * gb) == 24 * gb
    assert cache_bytes(SimpleNamespace(device=torch.device("cpu"), kept=gpu.kept), 1) == 4 * gb
