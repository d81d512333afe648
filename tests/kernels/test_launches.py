"""How many kernels the real decode step launches, counted on meta tensors at Qwen2.5-7B's shapes as a GPU would run it."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora.engine.rollout import Sampling
from tinylora.engine.slots import Slots
from tinylora.kernels import add_norm, decode_attention, decode_linear, dispatch, fused_linear, rope, sampling, shrink, swiglu
from tinylora.kernels.frozen import FrozenLinear
from tinylora.model.cache import KVCache
from tinylora.model.config import GROUPS, ModelConfig, module_name
from tinylora.model.decoder import Decoder, Layer

SLOTS = 64
NO_KERNEL = {"empty", "new_empty", "empty_strided", "empty_like", "detach", "lift_fresh"}  # memory alone


def decoder(layers: int) -> Decoder:
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_hidden_layers": layers,
            "vocab_size": 152064,
        }
    )

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    def group(i: int) -> FrozenLinear:
        rows, columns = sum(config.shape(n)[0] for n in GROUPS[i]), config.shape(GROUPS[i][0])[1]
        return FrozenLinear.empty(rows, columns, i == 0, torch.bfloat16, torch.device("meta"))

    norm, vocab = meta(3584), meta(152064, 3584)
    stack = [Layer(norm, group(0), None, None, group(1), norm, group(2), group(3)) for _ in range(layers)]
    model = Decoder(config, vocab, stack, norm, vocab, {}, None)
    names = [(module_name(i, n), config.shape(n)) for i in range(layers) for names in GROUPS for n in names]
    model.pack_factors({name: (meta(2, k), meta(n, 2)) for name, (n, k) in names})
    return model


class Kernels(TorchDispatchMode):
    """Every op that is not a view or an allocation; the launches of Triton kernels are added by `launch`."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in NO_KERNEL:
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def launches(layers: int, adapters: int, monkeypatch: pytest.MonkeyPatch, backend: str = "padded") -> Counter[str]:
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    monkeypatch.setattr(dispatch, "runs_triton", lambda op, x: True)
    monkeypatch.setattr(dispatch, "runs_cuda", lambda op, x: backend == "cuda")
    model, mode = decoder(layers), Kernels()

    def decode_linear_cuda(x, group, c, residual, swiglu):  # its op has shapes alone on meta tensors, and needs nvcc
        mode.count["decode_linear"] += 1
        return x.new_empty(len(x), len(group.weight) // (2 if swiglu else 1))

    monkeypatch.setattr(decode_linear, "decode_linear_cuda", decode_linear_cuda)
    for module in (add_norm, decode_attention, fused_linear, rope, sampling, shrink, swiglu):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: mode.count.update([kernel.__name__]))
    cache = KVCache(model.config, 100, 64, model.embedding, SLOTS, 1024)
    slots = Slots(model, Sampling(512, eos_ids=(1, 2)), SLOTS, cache, adapters)
    sizes = [len(g.A) // 2 for layer in model.layers for g in layer.groups]
    slots.set_matrices([torch.empty(adapters, n, 2, 2, device="meta") for n in sizes])
    slots.corrections(SLOTS)  # made once for a rollout
    with mode, torch.no_grad():
        slots.step(SLOTS, 0)
    return mode.count


@pytest.mark.parametrize("adapters", [1, 3])
def test_a_layer_is_ten_launches(adapters, monkeypatch):
    two, three = (launches(n, adapters, monkeypatch) for n in (2, 3))
    layer = three - two
    assert layer == Counter({"mm": 4, "_forward": 4, "_partial": 1, "_combine": 1}), layer
    assert layer.total() == 10
    rest = two.total() - 2 * 10
    print(f"10 launches a layer and {rest} more a step: {28 * 10 + rest} for 28 layers", dict(two))
    assert rest <= 40, two


def test_a_layer_on_the_decode_linear_is_nine_launches(monkeypatch):
    """Four of them the linears', each with its t, z and B, and with SwiGLU or the residual; a split K adds a launch."""
    two, three = (launches(n, 1, monkeypatch, "cuda") for n in (2, 3))
    assert three - two == Counter({"decode_linear": 4, "_forward": 3, "_partial": 1, "_combine": 1}), three - two
