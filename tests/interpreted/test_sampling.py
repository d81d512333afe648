"""The Triton sampler: the tokens that an exact CDF gives, log-probs, and every edge of the plain one."""

import pytest
import torch
from accuracy import assert_at_most_twice_plain, randn

from tinylora.kernels import dispatch, sampling
from tinylora.kernels.sampling import config, sample, sample_ref, sample_triton, uniforms

VOCAB = 4096 * 3 + 45  # four tiles
# Rounding of a place on [0, 1): the interpreter adds the 4096 terms of a tile one after another, a walk of 64 roundings.
NEAR = 64 * torch.finfo(torch.float32).eps


def problem(rows: int, seed: int, dtype: torch.dtype):
    """Logits (rows, VOCAB), a tenth of them impossible, and the exact CDF of softmax(logits / 0.7)."""
    logits = (3 * randn(rows, VOCAB, seed=seed)).to(dtype)
    logits[randn(rows, VOCAB, seed=seed + 1) < -1.28] = -torch.inf
    return logits, (logits.double() / 0.7).softmax(1).cumsum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_are_those_of_the_reference_in_fp64(dtype):
    """Except where u is within rounding of an edge of the CDF."""
    logits, cdf = problem(100, 3, dtype)
    u = uniforms(1, torch.arange(100), 1)[:, 0]
    tokens, _ = sample_triton(logits, 0.7, 1.0, 0, u)
    want, _ = sample_ref(logits.double(), 0.7, 1.0, 0, u)
    near = (cdf - u[:, None]).abs().amin(1) < NEAR
    assert (tokens[~near] == want[~near]).all() and near.sum() < 10
    assert cdf.gather(1, tokens[:, None]).squeeze(1).add(NEAR).ge(u).all()


def test_tokens_at_the_edges_of_the_cdf():
    """u just inside either end of a token's piece of [0, 1): that token, in tiles at the start, middle and end."""
    logits, cdf = problem(60, 5, torch.float32)
    p = torch.diff(cdf, dim=1, prepend=torch.zeros(60, 1))
    tokens = torch.tensor([(p[i, k:] > 3 * NEAR).nonzero()[0, 0] + k for i, k in enumerate(range(0, VOCAB - 1000, 190))][:60])
    rows = torch.arange(len(tokens))
    ends = cdf[rows, tokens] - NEAR, cdf[rows, tokens] - p[rows, tokens] + NEAR
    for u in ends:
        assert torch.equal(sample_triton(logits[rows], 0.7, 1.0, 0, u)[0], tokens)
    assert set((tokens // 4096).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_logprob_error(dtype, temperature):
    u = uniforms(2, torch.arange(20), 1)[:, 0]

    def run(op):
        return lambda logits: [op(logits, temperature, 1.0, 0, u)[1]]

    assert_at_most_twice_plain(run(sample_triton), run(sample_ref), lambda seed: [problem(20, 7 * seed, dtype)[0]], dtype, 3)


def test_frequencies():
    """500 draws over 11 tokens: chi-square with 10 degrees of freedom under its 99.99 % point, 35.6; wrong p fails."""
    logits = randn(1, 11, seed=4).float() * 2
    tokens, _ = sample_triton(logits.expand(500, -1), 0.5, 1.0, 0, uniforms(7, torch.arange(500), 1)[:, 0])
    counts = torch.bincount(tokens, minlength=11).double()

    def chi2(temperature: float) -> float:
        expected = 500 * (logits[0].double() / temperature).softmax(0)
        return ((counts - expected).square() / expected).sum().item()

    assert chi2(0.5) < 35.6 < chi2(1.0), (chi2(0.5), chi2(1.0))


def test_edges():
    """Impossible tokens at the start, at the end and in whole tiles are never drawn, whatever u."""
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 4096 + torch.tensor([7, 8, 100, 4096])] = torch.tensor([0.0, -torch.inf, 3.0, 1.0])
    for u, token in ((0.0, 4103), (1 - 2.0**-53, 8192), (0.5, 4196)):
        got, logp = sample_triton(logits, 1.0, 1.0, 0, torch.tensor([u], dtype=torch.float64))
        assert got.item() == token
        assert logp.item() == pytest.approx(logits.double().log_softmax(1)[0, token].item(), abs=1e-6)
    one = torch.tensor([[0.0, 3.0, 1.0, -torch.inf]])
    assert sample_triton(one, 1.0, 1.0, 0, torch.ones(1, dtype=torch.float64))[0].item() == 2


def test_rounding_draws_no_impossible_token(monkeypatch):
    """u within two roundings of where a tile begins, and the first token of every tile impossible.

    The sum of the tiles before may then exceed a threshold that the running sum over tiles did not reach.
    """
    monkeypatch.setattr(sampling, "config", lambda vocab: {"TILE": 16, "num_warps": 1})
    logits = 3 * randn(1, 256, seed=6).float()
    logits[:, ::16] = -torch.inf
    edges = logits[0].softmax(0).cumsum(0)[15:-1:16]
    u = torch.cat([edges * (1 + k * torch.finfo(torch.float32).eps) for k in (-2, 0, 1, 2)])
    tokens, _ = sample_triton(logits.expand(len(u), -1), 1.0, 1.0, 0, u.double())
    assert logits[0, tokens].isfinite().all()


def test_greedy_takes_the_first_of_equals():
    logits = randn(3, VOCAB).float()
    for row, columns in enumerate(([9000, 100, 4095], [12332], [4096, 8191])):
        logits[row, columns] = 7.0
    tokens, logp = sample_triton(logits, 0.0, 1.0, 0, torch.full((3,), 0.9, dtype=torch.float64))
    assert tokens.tolist() == [100, 12332, 4096]
    want = logits.double().log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=2e-6)


def test_a_row_does_not_depend_on_the_others_or_on_strides():
    logits, _ = problem(6, 11, torch.float32)
    u = uniforms(3, torch.arange(6), 1)[:, 0]
    whole = sample_triton(logits, 0.7, 1.0, 0, u)
    alone = sample_triton(logits[4:5], 0.7, 1.0, 0, u[4:5])
    wide = sample_triton(torch.cat([logits, logits], 1)[:, :VOCAB], 0.7, 1.0, 0, u)
    turned = sample_triton(logits.T.contiguous().T, 0.7, 1.0, 0, torch.stack([u, u], 1)[:, 1])
    for i in (0, 1):
        assert torch.equal(whole[i][4:5], alone[i]) and torch.equal(whole[i], wide[i]) and torch.equal(whole[i], turned[i])


def test_cuts_stay_with_the_reference(monkeypatch):
    logits, u = randn(40, 30).float(), uniforms(5, torch.arange(40), 1)[:, 0]
    for cut in ((0.9, 0), (1.0, 3)):
        with pytest.raises(ValueError, match="does not cut"):
            sample_triton(logits, 1.0, *cut, u)
    asked, used = [], []
    monkeypatch.setattr(dispatch, "runs_triton", lambda op, x: asked.append(op) or True)
    monkeypatch.setattr(sampling, "sample_triton", lambda *a: used.append(a) or sample_triton(*a))
    for cut in ((0.9, 0), (1.0, 3), (1.0, 0), (1.0, 30)):
        tokens, _ = sample(logits, 1.0, *cut, u)
        assert torch.equal(tokens, sample_ref(logits, 1.0, *cut, u)[0])
    assert len(used) == 2 and set(asked) == {"sampling"}


def test_config():
    assert config(151_936) == {"TILE": 4096, "num_warps": 8}
    assert config(11) == {"TILE": 16, "num_warps": 1}
