"""Attention, LM-head log-probs and sampling against their references and fp64."""

import pytest
import torch
import torch.nn.functional as F

from bench.measure import peak_extra_bytes
from tinylora.kernels import token_logprobs as tl
from tinylora.kernels.attention import packed_attention, packed_attention_ref
from tinylora.kernels.decode_attention import CacheView, decode_attention
from tinylora.kernels.packing import Packing
from tinylora.kernels.sampling import sample, uniforms


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def forward_and_gradients(f, inputs, dy):
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def ops():
    """name, ours, reference, inputs with a gradient (fp64)."""

    def case(name, lengths, prefixes=(), capacity=None):
        rows, whole = sum(lengths), len(lengths) - len(prefixes)
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        # the same sequences written out, a suffix behind a copy of what it continues, and its rows of the result
        parts = [range(starts[i], starts[i + 1]) for i in range(len(lengths))]
        full = [*parts[:whole], *([*parts[p], *parts[whole + i]] for i, p in enumerate(prefixes))]
        index, keep, at = torch.tensor([r for f in full for r in f]), [], 0
        for f, part in zip(full, parts, strict=True):
            keep += range(at + len(f) - len(part), at + len(f))
            at += len(f)

        def written_out(attention):
            return lambda q, k, v: attention(q[index], k[index], v[index], [len(f) for f in full])[keep]

        def ours(q, k, v):
            return packed_attention(q, k, v, Packing(lengths, prefixes, q.dtype, q.device, capacity))

        inputs = [randn(rows, heads, 8, seed=i) for i, heads in enumerate((4, 2, 2))]
        return name, ours, written_out(packed_attention_ref), written_out(library_attention), inputs

    return [
        case("short", [5, 1, 6]),
        case("long", [150, 1, 6]),
        case("short, suffixes", [5, 3, 4, 1, 6], (0, 0, 1)),
        case("long, suffixes", [5, 140, 4, 1, 6], (0, 1, 1)),
        case("over a fixed number of keys", [5, 3, 4, 1, 6], (0, 0, 1), 24),
    ]


def library_attention(q, k, v, lengths):
    parts = [x.split(lengths) for x in (q, k, v)]
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
    _, op, ref, plain, inputs = case
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


@pytest.mark.parametrize("paged", [False, True])
def test_decode_attention_is_the_last_row_of_packed_attention(paged):
    """Three slots of different lengths in one cache, each against the causal attention of its whole sequence."""
    lengths, size = [5, 1, 9], 4 if paged else 12
    q, k, v = randn(15, 4, 8), randn(15, 2, 8, seed=1), randn(15, 2, 8, seed=2)
    whole = packed_attention_ref(q, k, v, lengths)
    keys, values = torch.full((8, 2, size, 8), 7.0).double(), torch.full((8, 2, size, 8), 7.0).double()  # stale entries
    table = torch.tensor([[3, 1, 7], [0, 7, 7], [6, 2, 5]], dtype=torch.int32) if paged else None
    if not paged:
        keys[:, :, 9:], values[:, :, 9:] = torch.nan, torch.nan  # beyond `longest` nobody reads
    for slot, (k_, v_) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        for i in range(len(k_)):
            page = slot if table is None else table[slot, i // size]
            keys[page, :, i % size], values[page, :, i % size] = k_[i], v_[i]
    last = torch.tensor(lengths).cumsum(0) - 1
    view = CacheView(torch.tensor(lengths) - 1, table, size, 9, torch.float64)
    out, z = decode_attention(q[last], keys, values, view, None)
    assert z is None
    torch.testing.assert_close(out, whole[last].flatten(1), rtol=1e-12, atol=1e-12)


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
    assert sample(logits.flip(1), 1.0, 1.0, 0, torch.zeros(1))[0].item() == 1, "nor where u is 0 and it comes first"
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
