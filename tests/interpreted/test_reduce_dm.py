"""reduce_dm, the plain and the Triton version: values, and bits that nothing but an adapter's own rows can change."""

import pytest
import torch
from accuracy import assert_at_most_twice_plain, randn

from tinylora.kernels import dispatch
from tinylora.kernels.reduce_dm import config, reduce_dm, reduce_dm_ref, reduce_dm_triton

BOTH = pytest.mark.parametrize("op", [reduce_dm_ref, reduce_dm_triton])
LENGTHS, ADAPTER = [5, 1, 70, 0, 33], torch.tensor([2, 0, 2, 1, 0])


def explicit(s, t, lengths, adapters, adapter, r):
    """Row by row from the formula."""
    dM = s.new_zeros(adapters, s.shape[1] // r, r, r)
    row = 0
    for length, a in zip(lengths, [0] * len(lengths) if adapter is None else adapter.tolist(), strict=True):
        for _ in range(length):
            for g in range(dM.shape[1]):
                dM[a, g] += torch.outer(s[row, g * r : (g + 1) * r], t[row, g * r : (g + 1) * r])
            row += 1
    return dM


@BOTH
@pytest.mark.parametrize("r, segments", [(1, 1), (2, 7), (3, 5), (2, 70)])
@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_equals_the_formula_in_fp64(op, r, segments, adapter):
    """Four adapters, one of them without a sequence, one with an empty one."""
    s, t = randn(109, segments * r), randn(109, segments * r, seed=1)
    got = op(s, t, LENGTHS, 4, adapter, r)
    torch.testing.assert_close(got, explicit(s, t, LENGTHS, 4, adapter, r), rtol=1e-12, atol=1e-12)


@BOTH
def test_error(op):
    """fp32, the only precision of s and t. Plain PyTorch here is one product of matrices; its diagonal blocks are dM."""

    def draw(seed):
        return randn(400, 6, seed=seed), randn(400, 6, seed=100 + seed)

    def plain(s, t):
        blocks = (s.T @ t).view(3, 2, 3, 2)
        return [torch.stack([blocks[g, :, g] for g in range(3)])[None]]

    assert_at_most_twice_plain(lambda s, t: [op(s, t, [90, 310], 1, None, 2)], plain, draw, torch.float32)


@BOTH
def test_bits_repeat_and_do_not_depend_on_batch_mates(op):
    """Adapter 2's dM from the whole pack, from a pack of its sequences alone, and again: equal bits.

    The sums are long enough for another order to show: adding the rows backwards changes bits.
    """
    s, t = randn(109, 14).float(), randn(109, 14, seed=1).float()
    whole = op(s, t, LENGTHS, 3, ADAPTER, 2)
    assert torch.equal(whole, op(s, t, LENGTHS, 3, ADAPTER, 2))
    for adapter in range(3):
        own = [x for x, a in zip(s.split(LENGTHS), ADAPTER, strict=True) if a == adapter]
        mates = [x for x, a in zip(t.split(LENGTHS), ADAPTER, strict=True) if a == adapter]
        alone = op(torch.cat(own), torch.cat(mates), [len(x) for x in own], 1, None, 2)
        assert torch.equal(whole[adapter], alone[0])
    backwards = op(s.flip(0), t.flip(0), LENGTHS[::-1], 3, ADAPTER.flip(0), 2)
    assert not torch.equal(whole, backwards)


@BOTH
def test_padding_and_other_adapters_are_never_read(op):
    s, t = randn(12, 4), randn(12, 4, seed=1)
    want = op(s[:8], t[:8], [3, 5], 2, torch.tensor([1, 0]), 2)
    s[8:], t[8:] = torch.nan, torch.nan
    assert torch.equal(op(s, t, [3, 5], 2, torch.tensor([1, 0]), 2), want)
    s[:3] = torch.nan  # adapter 1's
    assert torch.equal(op(s, t, [3, 5], 2, torch.tensor([1, 0]), 2)[0], want[0])


@BOTH
def test_slices_of_wider_buffers(op):
    wide, narrow = randn(30, 24), randn(24, 30, seed=1)
    s, t = wide[:, 8:16], narrow.T[:, 3:11]
    assert t.stride(1) != 1
    torch.testing.assert_close(op(s, t, [30], 1, None, 2), op(s.contiguous(), t.contiguous(), [30], 1, None, 2))


def test_the_entry_refuses_wrong_shapes_and_asks_the_dispatcher(monkeypatch):
    s = randn(6, 4)
    for bad in (
        (s, s[:, :2], [6], 1, None, 2),
        (s, s, [6], 1, None, 3),
        (s, s, [7], 1, None, 2),
        (s.half(), s, [6], 1, None, 2),
    ):
        with pytest.raises(ValueError, match="do not hold"):
            reduce_dm(*bad)
    asked = []
    for answer, path in ((False, reduce_dm_ref), (True, reduce_dm_triton)):
        monkeypatch.setattr(dispatch, "runs_triton", lambda op, x, answer=answer: asked.append(op) or answer)
        assert torch.equal(reduce_dm(s, s, [6], 1, None, 2), path(s, s, [6], 1, None, 2))
    assert asked == ["reduce_dm"] * 2


def test_config():
    assert config(1) == {"ROWS": 128, "PAIRS": 16, "num_warps": 4}
    assert config(28 * 7 * 4) == {"ROWS": 8, "PAIRS": 256, "num_warps": 4}
