"""The frozen linear of other people's layers against an explicit W + B M A differentiated by fp64 autograd."""

import pytest
import torch
import torch.nn.functional as F

from tinylora.kernels.frozen import FrozenLinear, padded_segments
from tinylora.kernels.layer_linear import layer_linear, layer_linear_ref
from tinylora.kernels.products import pad_rows


def make(
    segments: int,
    r: int,
    adapters: int = 1,
    rows: int = 21,
    k: int = 40,
    n: int = 24,
    seed: int = 0,
    bias: bool = True,
    narrow: int = 8,
):
    """Random constants in fp64 with `segments` equal parts, and the explicit factors of each."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    group = FrozenLinear(randn(n * segments, k) / k**0.5, randn(n * segments) if bias else None)
    factors = [(randn(r, k) / k**0.5, randn(n, r)) for _ in range(segments)]
    group.pack(factors, [n] * segments, narrow)
    M = torch.zeros(adapters, padded_segments(segments, r, narrow), r, r, dtype=torch.float64)
    M[:, :segments] = 0.3 * randn(adapters, segments, r, r)
    return group, factors, M, randn(rows, k), randn(rows, n * segments), torch.randint(adapters, (rows,), generator=g)


def explicit(group: FrozenLinear, factors, M, x, row_adapter):
    """Row by row through its own W + B M A: nothing in common with the op but the formula."""
    rows = []
    for i, xi in enumerate(x):
        deltas = [b @ M[row_adapter[i], s] @ a for s, (a, b) in enumerate(factors)]
        rows.append(F.linear(xi, group.weight + torch.cat(deltas), group.bias))
    return torch.stack(rows)


def through(group: FrozenLinear, x, M, row_adapter=None):
    """The layer's linear on rows in eights, as a Decoder has them."""
    rows = None if row_adapter is None else pad_rows(row_adapter)
    return layer_linear(pad_rows(x), group.weight, group.bias, group.A, group.Bt, M, rows)[: len(x)]


def gradients(f, x, M, dy):
    x, M = x.clone().requires_grad_(), M.clone().requires_grad_()
    y = f(x, M)
    y.backward(dy)
    return y.detach(), x.grad, M.grad


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("adapters", [1, 3])
def test_equals_explicit_weights_in_fp64(segments, r, adapters):
    group, factors, M, x, dy, rows = make(segments, r, adapters, narrow=1 if adapters == 1 else 8)
    row_adapter = rows if adapters > 1 else None
    want = gradients(lambda x, M: explicit(group, factors, M, x, rows), x, M, dy)
    for op in (layer_linear, layer_linear_ref):
        args = (group.weight, group.bias, group.A, group.Bt)
        got = gradients(lambda x, M, op=op, args=args: op(x, *args, M, row_adapter), x, M, dy)
        for ours, theirs in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        # padding segments may get a gradient; nothing reads it, since their P is zero
        torch.testing.assert_close(got[2][:, :segments], want[2][:, :segments], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_fp32_error_at_most_twice_plain_pytorch(segments, r):
    """Against fp64, over 8 draws: root-mean-square error of y, dx and dM at most 2x that of the plain formula in fp32."""
    ours, plain = torch.zeros(3), torch.zeros(3)
    for seed in range(8):
        group, factors, M, x, dy, _ = make(segments, r, rows=64, k=96, n=48, seed=seed)
        args = (group.weight, group.bias, group.A, group.Bt)
        want = gradients(lambda x, M, args=args: layer_linear_ref(x, *args, M), x, M, dy)
        single = [None if t is None else t.float() for t in args]
        for op, error in ((layer_linear, ours), (layer_linear_ref, plain)):
            got = gradients(lambda x, M, op=op, s=single: op(x, *s, M), x.float(), M.float(), dy.float())
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                error[i] += (a.double() - b).square().mean() / b.square().mean()
    assert (ours.sqrt() <= 2 * plain.sqrt()).all(), (ours, plain)


def test_zero_m_is_the_bare_linear_bitwise():
    """v = 0 gives M = 0: the same bits as F.linear in fp32 (a zero is added), and as adapter-off through the same op."""
    group, _, M, x, _, rows = make(3, 2, adapters=2, rows=40)
    group = FrozenLinear(*(t.float() for t in (group.weight, group.bias, group.A, group.Bt)))
    x, M = x.float(), M.float()
    M[0] = 0
    bare = F.linear(x, group.weight, group.bias)
    assert torch.equal(through(group, x, M[:1]), bare)
    mixed = through(group, x, M, rows)
    assert torch.equal(mixed[rows == 0], bare[rows == 0])
    assert not torch.equal(mixed[rows == 1], bare[rows == 1])


def test_one_adapter_and_row_adapter_agree_bitwise():
    group, _, M, x, dy, _ = make(3, 2, adapters=2, rows=24)
    for a in range(2):
        rows = torch.full((24,), a)
        one = gradients(lambda x, M: layer_linear(x, group.weight, group.bias, group.A, group.Bt, M), x, M[a : a + 1], dy)
        many = gradients(lambda x, M, rows=rows: through(group, x, M, rows), x, M, dy)
        assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])


def test_a_row_does_not_depend_on_its_batch_mates():
    """fp32, every batch size from 1 to 40: a row's bits are those it has in a batch of 512."""
    group, _, M, x, _, _ = make(3, 2, rows=512, k=128, n=64)
    group = FrozenLinear(*(t.float() for t in (group.weight, group.bias, group.A, group.Bt)))
    x, M = x.float(), M.float()
    whole = through(group, x, M)
    for size in range(1, 41):
        assert torch.equal(through(group, x[7 : 7 + size], M), whole[7 : 7 + size]), size


def test_other_rows_adapters_do_not_matter():
    group, _, M, x, _, rows = make(2, 2, adapters=3, rows=32)
    changed = (rows + 1) % 3
    changed[5] = rows[5]
    assert torch.equal(through(group, x, M, rows)[5], through(group, x, M, changed)[5])


def test_saves_t_and_not_x():
    """What autograd keeps besides constants and M is (T, R), not (T, K)."""
    group, _, M, x, _, _ = make(3, 2, rows=32, k=200)
    constants = {t.data_ptr() for t in (group.weight, group.bias, group.A, group.Bt, M)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        through(group, x.requires_grad_(), M.requires_grad_())
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in constants] == [(32, 8)]


@pytest.mark.parametrize("adapters", [1, 3])
def test_operator_for_the_compiler(adapters):
    """Schema, fake tensors and autograd as PyTorch's own checker wants them; then the same numbers as in eager."""
    group, _, M, x, dy, rows = make(2, 2, adapters)
    args = (x.requires_grad_(), M.requires_grad_(), group.weight, group.bias, group.A, group.Bt)
    row_adapter = rows if adapters > 1 else None
    torch.library.opcheck(torch.ops.tinylora.layer_linear.default, (*args, row_adapter))
    compiled = torch.compile(layer_linear, fullgraph=True, backend="aot_eager")
    plain = (group.weight, group.bias, group.A, group.Bt)
    want, got = (
        gradients(lambda x, M, op=op: op(x, *plain, M, row_adapter), x.detach(), M.detach(), dy)
        for op in (layer_linear, compiled)
    )
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_constants_of_another_dtype_are_cast_as_they_are_used():
    """What autocast asks for: y and dx of x's dtype, dM of M's, as if the constants had been cast before."""
    group, _, M, x, dy, _ = make(2, 2)
    constants = [t.float() for t in (group.weight, group.bias, group.A, group.Bt)]
    half = [t.bfloat16() for t in constants]
    x, M, dy = x.bfloat16(), M.float(), dy.bfloat16()
    mixed, cast = (gradients(lambda x, M, c=c: layer_linear(x, *c, M), x, M, dy) for c in (constants, half))
    assert [t.dtype for t in mixed] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(mixed, cast, strict=True))


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_factors_wider_than_the_weight_keep_their_precision(adapters: int, half: torch.dtype) -> None:
    """fp32 factors on a half-precision weight: the correction is fp32 both ways, and is rounded once, where it is added."""
    group, _, M, x, dy, rows = make(2, 2, adapters)
    row_adapter = rows if adapters > 1 else None
    x, dy, weight, bias = (t.to(half) for t in (x, dy, group.weight, group.bias))
    A, Bt, M = (t.float() for t in (group.A, group.Bt, M))
    zero, no_bias = torch.zeros_like(weight, dtype=torch.float32), None
    correction, dx, dM = gradients(  # on a weight of zero nothing is left but the correction
        lambda x, M: layer_linear_ref(x, zero, no_bias, A, Bt, M, row_adapter), x.float(), M, dy.float()
    )
    want = ((F.linear(x, weight, bias) + correction).to(half), (dy @ weight + dx).to(half), dM)
    compiled = torch.compile(layer_linear, fullgraph=True, backend="aot_eager")
    for op in (layer_linear, compiled):
        got = gradients(lambda x, M, op=op: op(x, weight, bias, A, Bt, M, row_adapter), x, M, dy)
        assert [t.dtype for t in got] == [half, half, torch.float32]
        # another order of the fp32 sums may turn the last bit of an entry that lies between two, and of few
        assert all((a != b).float().mean() <= 0.01 for a, b in zip(got[:2], want[:2], strict=True))
        torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-4)
