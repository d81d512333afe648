"""The Triton log-probs, entropy and gradient against the reference."""

import pytest
import torch
from accuracy import assert_at_most_twice_plain, randn

from tinylora.kernels import dispatch
from tinylora.kernels import token_logprobs as ops


def problem(seed: int, rows: int = 150, width: int = 41, vocab: int = 2101):
    """hidden, head, dlogp and tokens, the first and the last of the vocabulary among them; logits of deviation 3."""
    tokens = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    tokens[:2] = torch.tensor([0, vocab - 1])
    hidden, head = randn(rows, width, seed=seed), 3 / width**0.5 * randn(vocab, width, seed=seed + 50)
    return hidden, head, randn(rows, seed=seed + 90), tokens


def everything(op, temperature):
    """op -> a function of the problem that returns log-probs, entropies and the gradient of hidden."""

    def run(hidden, head, dlogp, tokens):
        hidden = hidden.detach().requires_grad_()  # a clone would not have its strides
        logp, entropy = op(hidden, head, tokens, temperature)
        assert not head.requires_grad
        logp.backward(dlogp.to(logp.dtype))
        return logp.detach(), entropy.detach(), hidden.grad

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_error(dtype, temperature):
    """33 (fp32) or 17 (fp16) tiles of the vocabulary, the last of them nearly empty, in several shares."""
    pair = (everything(op, temperature) for op in (ops.token_logprobs_triton, ops.token_logprobs_ref))
    assert_at_most_twice_plain(*pair, problem, dtype, draws=2)


@pytest.mark.parametrize("rows, width, vocab", [(1, 3, 5), (3, 130, 64), (65, 32, 65)])
def test_odd_shapes(rows, width, vocab):
    inputs = [x.float() if x.is_floating_point() else x for x in problem(3, rows, width, vocab)] if rows > 1 else None
    if inputs is None:  # one row, the last token
        hidden, head, dlogp, _ = problem(3, 2, width, vocab)
        inputs = [hidden[:1].float(), head.float(), dlogp[:1].float(), torch.tensor([vocab - 1])]
    got = everything(ops.token_logprobs_triton, 1.0)(*inputs)
    want = everything(ops.token_logprobs_ref, 1.0)(*[x.double() if x.is_floating_point() else x for x in inputs])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_peaked_rows_keep_their_entropy():
    """Logits up to 400: the entropy of a nearly certain row must not drown in the difference of two large numbers."""
    hidden, head, _, tokens = problem(1, rows=40)
    hidden = (40 * hidden).float()
    exact = ops.token_logprobs_ref(hidden.double(), head.float().double(), tokens, 1.0)[1]
    entropy = ops.token_logprobs_triton(hidden, head.float(), tokens)[1]
    assert (exact < 0.1).sum() > 5
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-3, atol=1e-7)


def test_bits_do_not_depend_on_the_other_rows():
    """The rows begin a tile: the interpreter's product is numpy's, and on some processors a row's bits depend on its place in
    the tile there. That no place matters is for a GPU to show."""
    first = ops.config(torch.float32)["ROWS"]
    own = slice(first, first + 23)
    hidden, head, _, tokens = problem(2)
    whole = ops.token_logprobs_triton(hidden.float(), head.float(), tokens)
    few = ops.token_logprobs_triton(hidden[own].float(), head.float(), tokens[own])
    for a, b in zip(whole, few, strict=True):
        assert torch.equal(a[own], b)


def test_slices_of_wider_buffers():
    """Rows with other numbers behind them, NaN here, give the bits of rows that stand alone; so do transposed ones."""
    hidden, head, dlogp, tokens = (x.float() if x.is_floating_point() else x for x in problem(7, rows=20, vocab=150))
    want = everything(ops.token_logprobs_triton, 1.0)(hidden, head, dlogp, tokens)
    wide = [torch.cat([x, torch.full((len(x), 87), torch.nan)], 1)[:, :41] for x in (hidden, head)]
    turned, twice = hidden.T.contiguous().T, torch.stack([tokens, tokens], 1)[:, 0]
    for got in (
        everything(ops.token_logprobs_triton, 1.0)(*wide, dlogp, tokens),
        everything(ops.token_logprobs_triton, 1.0)(turned, head, dlogp, twice),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="contiguous"):
        ops.token_logprobs_triton(hidden, head.T.contiguous().T, tokens)


def test_no_rows():
    hidden, head, _, _ = problem(8, rows=2, vocab=70)
    empty = hidden[:0].float(), head.float(), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    logp, entropy, gradient = everything(ops.token_logprobs_triton, 1.0)(*empty)
    assert logp.shape == entropy.shape == (0,) and gradient.shape == (0, 41)


def test_a_token_outside_the_vocabulary_is_not_a_number():
    hidden, head, _, tokens = problem(2, rows=4)
    tokens[1:3] = torch.tensor([-1, len(head)])
    logp, _ = ops.token_logprobs_triton(hidden.float(), head.float(), tokens)
    assert logp.isnan().tolist() == [False, True, True, False]


def test_the_backward_in_chunks_holds_few_logits(monkeypatch):
    """Chunks of 128 rows and one of 22 give the gradient that one chunk gives, from buffers of the chunk's size."""
    inputs = [x.float() if x.is_floating_point() else x for x in problem(5)]
    monkeypatch.setattr(ops, "chunk_rows", lambda rows: rows)
    want = everything(ops.token_logprobs_triton, 0.7)(*inputs)
    monkeypatch.undo()
    buffers, mm, launches, launch = [], torch.mm, [], ops.launch
    monkeypatch.setattr(
        ops, "launch", lambda kernel, *args, **options: launches.append(args[1:]) or launch(kernel, *args, **options)
    )
    monkeypatch.setattr(torch, "mm", lambda a, b, out: buffers.append(a.untyped_storage().nbytes()) or mm(a, b, out=out))
    got = everything(ops.token_logprobs_triton, 0.7)(*inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [(len(a[0]), a[6]) for a in launches[2:]] == [(128, 128), (22, 22)]  # no kernel reads beyond its chunk
    assert buffers == [4 * 128 * 2112] * 2  # float32, 128 rows, 2101 columns rounded up to 64


def test_the_entry_asks_the_dispatcher(monkeypatch):
    inputs = [x.float() if x.is_floating_point() else x for x in problem(6, rows=5)]
    asked = []
    for answer in (False, True):
        monkeypatch.setattr(dispatch, "runs_triton", lambda op, x, answer=answer: asked.append(op) or answer)
        monkeypatch.setattr(ops, "token_logprobs_triton" if not answer else "_TokenLogprobs", None)
        logp, _, _ = everything(ops.token_logprobs, 1.0)(*inputs)
        assert logp.shape == (5,)
        monkeypatch.undo()
    assert asked == ["token_logprobs"] * 2


def test_shares_cover_the_vocabulary_and_none_is_empty():
    for vocab in (1, 64, 65, 2101, 32_000, 128_256, 151_936, 262_144):
        for columns in (64, 128):
            count, tiles = ops.shares(vocab, columns)
            assert (count - 1) * tiles * columns < vocab <= count * tiles * columns and count <= ops.SPLITS
    assert ops.shares(151_936, 128) == (16, 75)


def test_chunks_hold_less_than_a_twentieth_of_the_logits():
    for rows in (1, 128, 2560, 5000, 16_384, 200_000):
        size = ops.chunk_rows(rows)
        assert size % 128 == 0 and 128 <= size <= 1024 and (size == 128 or size <= rows / 20)
    assert ops.chunk_rows(16_384) == 768


def test_config():
    assert ops.config(torch.bfloat16) == {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
    assert ops.config(torch.float32)["COLUMNS"] == 64
