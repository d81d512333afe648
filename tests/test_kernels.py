"""Attention, LM-head log-probs and sampling against their references and fp64."""

import pytest
import torch
import torch.nn.functional as F

from bench.measure import peak_extra_bytes
from tinylora.kernels import token_logprobs as tl
from tinylora.kernels.attention import decode_attention, packed_attention, packed_attention_ref
from tinylora.kernels.sampling import sample, uniforms


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def forward_and_gradients(f, inputs, dy):
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def ops():
    """name, ours, reference, inputs with a gradient (fp64)."""
    index, lengths = torch.tensor([*range(5), *range(6, 7), *range(12, 18)]), [5, 1, 6]

    return [
        (
            "short attention",
            lambda q, k, v: packed_attention(q, k, v, index, 3, 6),
            lambda q, k, v: packed_attention_ref(q, k, v, lengths),
            [randn(12, 4, 8), randn(12, 2, 8, seed=1), randn(12, 2, 8, seed=2)],
        ),
        (
            "attention",
            lambda q, k, v: packed_attention(q, k, v, index + torch.tensor([0] * 5 + [194] + [388] * 6), 3, 200),
            lambda q, k, v: packed_attention_ref(q, k, v, lengths),
            [randn(12, 4, 8), randn(12, 2, 8, seed=1), randn(12, 2, 8, seed=2)],
        ),
    ]


def library_attention(q, k, v):
    parts = [x.split([5, 1, 6]) for x in (q, k, v)]
    outs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv), is_causal=True, enable_gqa=True)[0].transpose(
            0, 1
        )
        for qkv in zip(*parts, strict=True)
    ]
    return torch.cat(outs)


@pytest.mark.parametrize("case", ops(), ids=lambda c: c[0])
def test_forward_and_gradients(case):
    """fp64: equal to the reference. fp32: root-mean-square error against fp64 at most 2x plain PyTorch's, over 8 draws.

    Plain PyTorch is the reference; for attention it is the library's own attention, one sequence at a time.
    """
    name, op, ref, inputs = case
    plain = library_attention if "attention" in name else ref
    dy = randn(*ref(*inputs).shape, seed=77)
    want = forward_and_gradients(ref, inputs, dy)
    for ours, theirs in zip(forward_and_gradients(op, inputs, dy), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    error = torch.zeros(2, len(want))
    for seed in range(8):
        inputs = [randn(*x.shape, seed=100 * seed + i) for i, x in enumerate(inputs)]
        want = forward_and_gradients(ref, inputs, dy)
        for row, f in enumerate((op, plain)):
            got = forward_and_gradients(f, [x.float() for x in inputs], dy.float())
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                error[row, i] += (a.double() - b).square().mean() / b.square().mean()
    assert (error[0].sqrt() <= 2 * error[1].sqrt()).all(), error


def test_decode_attention_is_the_last_row_of_packed_attention():
    """Three slots of different lengths in one cache, each against the causal attention of its whole sequence."""
    lengths, capacity = [5, 1, 9], 12
    q, k, v = randn(15, 4, 8), randn(15, 2, 8, seed=1), randn(15, 2, 8, seed=2)
    whole = packed_attention_ref(q, k, v, lengths)
    keys, values = torch.full((3, 2, capacity, 8), torch.nan).double(), torch.full((3, 2, capacity, 8), torch.nan).double()
    keys[:, :, :9], values[:, :, :9] = 7.0, 7.0  # stale entries beyond a slot's length must not matter
    last = torch.tensor(lengths).cumsum(0) - 1
    for slot, (k_, v_) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        keys[slot, :, : len(k_)], values[slot, :, : len(v_)] = k_.transpose(0, 1), v_.transpose(0, 1)
    hidden = torch.arange(9) >= torch.tensor(lengths)[:, None]
    bias = torch.zeros(3, 9, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    out = decode_attention(q[last], keys[:, :, :9], values[:, :, :9], bias)
    torch.testing.assert_close(out, whole[last], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "tile"), [(512, 1024), (16, 1024), (512, 24), (16, 7)])
def test_token_logprobs(monkeypatch, temperature, rows, tile):
    """fp64 against all logits at once: one block and tile, and several with a rest in either direction."""
    monkeypatch.setattr(tl, "ROWS", rows)
    monkeypatch.setattr(tl, "TILE", tile)
    hidden, head, tokens = randn(27, 12), randn(50, 12, seed=1), torch.randint(50, (27,))
    dy = randn(27, seed=3)
    h1, h2 = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logp, entropy = tl.token_logprobs(h1, head, tokens, temperature)
    want, want_entropy = tl.token_logprobs_ref(h2, head, tokens, temperature)
    logp.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(logp, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h1.grad, h2.grad, rtol=1e-11, atol=1e-12)
    assert not entropy.requires_grad


def test_token_logprobs_fp32_error_at_most_twice_plain_pytorch(monkeypatch):
    """Logits up to about 30, where the running sums have work to do. Root-mean-square over 8 draws, against fp64."""
    monkeypatch.setattr(tl, "TILE", 16)
    errors = torch.zeros(2, 3)
    for seed in range(8):
        hidden, head, dy = randn(24, 12, seed=seed), 3 * randn(90, 12, seed=seed + 50), randn(24, seed=seed + 99)
        tokens = torch.randint(90, (24,), generator=torch.Generator().manual_seed(seed))

        def run(op, x, w, dy, tokens=tokens):
            x = x.clone().requires_grad_()
            logp, entropy = op(x, w, tokens, 0.9)
            return logp.detach(), entropy.detach(), *torch.autograd.grad(logp, x, dy)

        exact = run(tl.token_logprobs_ref, hidden, head, dy)
        for row, op in enumerate((tl.token_logprobs, tl.token_logprobs_ref)):
            for i, (a, b) in enumerate(zip(run(op, hidden.float(), head.float(), dy.float()), exact, strict=True)):
                errors[row, i] += (a.double() - b).square().mean() / b.square().mean()
    assert (errors[0].sqrt() <= 2 * errors[1].sqrt()).all(), errors.sqrt()


def test_token_logprobs_hold_a_twentieth_of_the_logits():
    """Forward and backward, 256 rows of a vocabulary of 65,536: peak memory beyond the inputs, as the allocator saw it."""
    hidden, head, tokens = randn(256, 8).float(), randn(65_536, 8).float(), torch.arange(256)

    def both():
        x = hidden.clone().requires_grad_()
        return torch.autograd.grad(tl.token_logprobs(x, head, tokens)[0].sum(), x)

    logits = 4 * 256 * 65_536
    assert peak_extra_bytes(both, "cpu") < logits / 20 < peak_extra_bytes(lambda: hidden @ head.T, "cpu")


def test_sampling_follows_the_distribution():
    """200,000 draws over 11 tokens: chi-square with 10 degrees of freedom under its 99.99 % point, 35.6; wrong p fails."""
    logits = randn(1, 11, seed=4, dtype=torch.float32) * 2
    u = uniforms(7, torch.arange(200_000), 1)[:, 0]
    tokens, logp = sample(logits.expand(200_000, -1), 0.8, 1.0, 0, u)
    p = (logits[0].double() / 0.8).softmax(0)
    counts = torch.bincount(tokens, minlength=11).double()
    chi2 = ((counts - 200_000 * p).square() / (200_000 * p)).sum().item()
    assert chi2 < 35.6, chi2
    torch.testing.assert_close(logp.double(), p.log()[tokens], rtol=1e-5, atol=1e-6)
    wrong = logits[0].double().softmax(0)
    assert ((counts - 200_000 * wrong).square() / (200_000 * wrong)).sum().item() > 1000


def test_sampling_edges():
    logits = torch.tensor([[0.0, 3.0, 1.0, -torch.inf]])
    one = torch.tensor([1 - 2.0**-53])
    assert sample(logits, 1.0, 1.0, 0, torch.zeros(1))[0].item() == 0
    assert sample(logits, 1.0, 1.0, 0, one)[0].item() == 2, "the last token with any mass, never the impossible one"
    assert sample(logits, 0.0, 1.0, 0, one)[0].item() == 1, "temperature 0 is greedy"
    u = uniforms(1, torch.arange(4000), 1)[:, 0]
    drawn = {
        k: set(sample(logits.expand(4000, -1), 1.0, p, k_, u)[0].tolist())
        for k, (p, k_) in {"k": (1.0, 2), "p": (0.85, 0)}.items()
    }
    assert drawn == {"k": {1, 2}, "p": {1, 2}}  # p: 0.84 of the mass is token 1, so 0.85 needs token 2 as well
    assert set(sample(logits.expand(4000, -1), 1.0, 0.8, 0, u)[0].tolist()) == {1}


def test_uniforms_depend_on_seed_sequence_and_position_alone():
    u = uniforms(3, torch.arange(10), 6)
    assert torch.equal(uniforms(3, torch.tensor([4, 2]), 3), u[[4, 2], :3])
    assert not torch.isin(uniforms(4, torch.arange(10), 6), u).any()
