"""The whole model's gradient of v against fp64 autograd through explicit W + B M A weights."""

import pytest
import torch
import torch.nn.functional as F

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.kernels.attention import packed_attention_ref
from tinylora.kernels.rms_norm import rms_norm_ref
from tinylora.kernels.rope import Heads, rope_ref, rope_tables
from tinylora.kernels.swiglu import swiglu_ref
from tinylora.kernels.token_logprobs import token_logprobs, token_logprobs_ref
from tinylora.model.config import GROUPS, module_name
from tinylora.model.loader import load_model

LENGTHS = [5, 9, 1, 12]
TOKENS = torch.randint(96, (27,), generator=torch.Generator().manual_seed(3))
TARGETS = torch.randint(96, (27,), generator=torch.Generator().manual_seed(4))


def reference_logprobs(model, adapter, v):
    """log p of TARGETS, (27,): every weight formed explicitly, plain PyTorch everywhere, one adapter."""
    c, dtype = model.config, v.dtype
    P = {n: p.to(dtype) for n, p in adapter.parts.projections.items()}
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    cos, sin = rope_tables(positions, model.frequencies, dtype)
    x = model.embedding.to(dtype)[TOKENS]

    def linear(i, group, names, x):
        parts = []
        for name, w in zip(names, group.weight.to(dtype).split([model.config.shape(n)[0] for n in names]), strict=True):
            module = module_name(i, name)
            if module in adapter.parts.factors:
                A, B = (f.to(dtype) for f in adapter.parts.factors[module])
                M = torch.einsum("u,uij->ij", v[adapter.parts.group_of[module]], P[module])
                w = w + B @ M @ A
            parts.append(w)
        return F.linear(x, torch.cat(parts), None if group.bias is None else group.bias.to(dtype))

    for i, layer in enumerate(model.layers):
        h = rms_norm_ref(x, layer.input_norm.to(dtype), c.norm_eps)
        norms = [None if w is None else w.to(dtype) for w in (layer.q_norm, layer.k_norm)]
        heads = Heads(c.num_heads, c.num_kv_heads, c.head_dim, *norms, c.norm_eps)
        q, k, value = rope_ref(linear(i, layer.qkv, GROUPS[0], h), cos, sin, heads)
        out = packed_attention_ref(q, k, value, LENGTHS)
        x = x + linear(i, layer.o, GROUPS[1], out.flatten(1))
        h = rms_norm_ref(x, layer.post_norm.to(dtype), c.norm_eps)
        x = x + linear(i, layer.down, GROUPS[3], swiglu_ref(linear(i, layer.gate_up, GROUPS[2], h)))
    hidden = rms_norm_ref(x, model.norm.to(dtype), c.norm_eps)
    return token_logprobs_ref(hidden, model.head.to(dtype), TARGETS, 1.0)[0]


def our_logprobs(model, adapter, v, row_adapter=None):
    hidden = model.packed(TOKENS, LENGTHS, adapter.matrices(v), row_adapter)
    return token_logprobs(hidden, model.head, TARGETS, 1.0)[0]


def gradient(logprobs, model, adapter, v, *args):
    v = v.clone().requires_grad_()
    weights = torch.linspace(-1, 1, len(TARGETS), dtype=v.dtype)
    logp = logprobs(model, adapter, v, *args)
    (logp * weights).sum().backward()
    return logp.detach(), v.grad


def models(tiny_model, family, config):
    """The same adapter on the model in fp64 and in fp32, with one set of (float32) factors."""
    path = str(tiny_model(family))
    wide, single = load_model(path, dtype="float64"), load_model(path, dtype="float32")
    adapters = Adapter(wide, config), Adapter(single, config)
    for name, (A, B) in adapters[0].parts.factors.items():
        torch.testing.assert_close(A, adapters[1].parts.factors[name][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(B, adapters[1].parts.factors[name][1], rtol=1e-5, atol=1e-5)
    return wide, single, *adapters


CONFIGS = {
    "tied r1": TinyLoRAConfig(r=1, u=3, n_tie="all"),
    "tied r2": TinyLoRAConfig(r=2, u=5, n_tie="all"),
    "tied r4": TinyLoRAConfig(r=4, u=2, n_tie=4),
    "untied r2": TinyLoRAConfig(r=2, u=1, n_tie=1),
    "untied r8": TinyLoRAConfig(r=8, u=2, n_tie=1),
    "structured": TinyLoRAConfig(r=2, u=2, n_tie=2, tie_mode="structured"),
    "some modules": TinyLoRAConfig(r=2, u=2, n_tie=3, target_modules=("k_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_of_v(tiny_model, family, name):
    """fp64: within 1e-9 of the largest entry. fp32: root-mean-square error, over 12 draws of v, at most 2x that of plain
    PyTorch in fp32. (The largest error of a handful of numbers is too noisy to compare: it alone varies twofold.)"""
    config = CONFIGS[name]
    wide, single, adapter64, adapter32 = models(tiny_model, family, config)
    adapter32.parts.factors = adapter64.parts.factors
    single.pack_factors(adapter64.parts.factors)
    ours, plain = torch.zeros(2), torch.zeros(2)
    for seed in range(12):
        v = 0.2 * torch.randn(adapter64.v.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        want = gradient(reference_logprobs, wide, adapter64, v)
        got = gradient(our_logprobs, wide, adapter64, v)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 1e-9 * b.abs().max()
        for f, error in ((our_logprobs, ours), (reference_logprobs, plain)):
            for i, (a, b) in enumerate(zip(gradient(f, single, adapter32, v.float()), want, strict=True)):
                error[i] += ((a.double() - b).square().mean() / b.square().mean()).item()
    assert (ours.sqrt() <= 2 * plain.sqrt()).all(), (ours.sqrt(), plain.sqrt())


def test_several_adapters_in_one_batch(tiny_model):
    """Each sequence under its own adapter: log-probs and every adapter's gradient as from the explicit weights."""
    wide, _, adapter, _ = models(tiny_model, "qwen2", CONFIGS["tied r2"])
    vs = 0.2 * torch.randn(3, *adapter.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    owner = torch.tensor([2, 0, 1, 2])  # adapter of each sequence
    rows = owner.repeat_interleave(torch.tensor(LENGTHS))
    logp, grads = gradient(our_logprobs, wide, adapter, vs, rows)
    for a in range(3):
        v = vs[a].clone().requires_grad_()
        mine = rows == a
        want = reference_logprobs(wide, adapter, v)[mine]
        (want * torch.linspace(-1, 1, len(TARGETS), dtype=torch.float64)[mine]).sum().backward()
        torch.testing.assert_close(logp[mine], want.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(grads[a], v.grad, rtol=1e-9, atol=1e-9)


def test_zero_v_is_the_base_bitwise(tiny_model):
    """Step 0: v = 0, the adapter off through the same op, and the model without an adapter have the same bits."""
    path = str(tiny_model("qwen2"))
    model = load_model(path)
    bare = model.logits(TOKENS[None])
    adapter = Adapter(model, TinyLoRAConfig(u=13, n_tie="all"))
    matrices = adapter.matrices()
    assert torch.equal(model.logits(TOKENS[None], matrices), bare)
    off = [None if m is None else torch.zeros_like(m) for m in matrices]
    assert torch.equal(model.logits(TOKENS[None], off), bare)
    with torch.no_grad():
        adapter.v.fill_(0.1)
    assert not torch.equal(model.logits(TOKENS[None], adapter.matrices()), bare)
