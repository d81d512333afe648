"""The plain versions of the row ops and of the frozen map, against autograd through the formulas; the kernels' launches."""

import pytest
import torch
import torch.nn.functional as F

from tinylora.kernels import add_norm, rope, shrink, swiglu
from tinylora.kernels import frozen as frozen_module
from tinylora.kernels import linear as linear_module
from tinylora.kernels import products as products_module
from tinylora.kernels.accuracy import rms
from tinylora.kernels.correction import Correction, padded, padded_width, row_stride
from tinylora.kernels.frozen import FrozenLinear
from tinylora.kernels.fused_linear import config as linear_config
from tinylora.kernels.launch import row_config
from tinylora.kernels.linear import linear, linear_ref
from tinylora.kernels.products import CHAIN, FEW, TILE, bf16_products, onednn_keeps_rows, onednn_linear
from tinylora.kernels.rms_norm import rms_norm_ref

T = 24  # a multiple of 8, as every plain op gets it


def draw(seed: int):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def correction(randn, width: int, out: int, segments: int, adapters: int = 1) -> Correction:
    """Two numbers a segment, padded to R = 8 as on a CPU."""
    pad = torch.nn.functional.pad
    A, Bt = (pad(randn(2 * segments, n) / n**0.5, (0, 0, 0, 8 - 2 * segments)) for n in (width, out))
    M = pad(randn(adapters, segments, 2, 2), (0, 0, 0, 0, 0, 4 - segments))
    rows = torch.arange(T) % adapters if adapters > 1 else None
    return Correction(A, Bt, M, rows, torch.full((T, 8), torch.nan).double(), torch.full((T, 8), torch.nan).double())


def cast(x, dtype):
    if isinstance(x, Correction):
        t, s = x.t.to(dtype), x.s.to(dtype)
        return Correction(x.A.to(dtype), x.Bt.to(dtype), x.M.to(dtype), x.row_adapter, t.clone(), s.clone())
    if isinstance(x, rope.Heads) and x.q_norm is not None:
        return rope.Heads(x.heads, x.kv_heads, x.head_dim, x.q_norm.to(dtype), x.k_norm.to(dtype), x.eps)
    return x.to(dtype) if isinstance(x, torch.Tensor) else x


def z_of(x, c, transposed=False):
    """t and z by the formula, row by row: [A x] and M of the row's adapter times it."""
    t = x @ (c.Bt if transposed else c.A).T
    zs = []
    for i, row in enumerate(t):
        blocks = c.M[0 if c.row_adapter is None else c.row_adapter[i]]
        m = torch.block_diag(*(b.T if transposed else b for b in blocks))
        zs.append(m @ row)
    return t, torch.stack(zs)


def add_norm_case(randn, adapters):
    inner, outer = correction(randn, 40, 40, 1, adapters), correction(randn, 40, 64, 3, adapters)
    inputs = (randn(T, 40), randn(T, 40), randn(T, 8), randn(40), inner, outer, randn(T, 40), randn(T, 40))

    def ours(x, y, z, w, inner, outer, dnew, dh):
        new, h, rstd = add_norm.add_norm_plain(x, y, z, w, 1e-6, inner, outer)
        dx = add_norm.add_norm_backward_plain(dnew, dh, new, rstd, w, inner)
        return new, h[:, :40], h[:, 40:48], outer.t, dx[:, :40], dx[:, 40:48], inner.s

    def ref(x, y, z, w, inner, outer, dnew, dh):
        new = (x + y + z @ inner.Bt).requires_grad_()
        h = rms_norm_ref(new, w, 1e-6)
        t, z_ = z_of(h, outer)
        (dx,) = torch.autograd.grad((h * dh).sum() + (new * dnew).sum(), new)
        s, sM = z_of(dx, inner, transposed=True)
        return new, h, z_, t, dx, sM, s

    return inputs, ours, ref


def swiglu_case(randn, adapters):
    inner, outer = correction(randn, 40, 48, 2, adapters), correction(randn, 24, 40, 1, adapters)
    inputs = (randn(T, 48), randn(T, 24), inner, outer)

    def ours(x, dh, inner, outer):
        h, dx = swiglu.swiglu_plain(x, 24, outer), swiglu.swiglu_backward_plain(dh, x, 24, inner)
        return h[:, :24], h[:, 24:32], outer.t, dx[:, :48], dx[:, 48:56], inner.s

    def ref(x, dh, inner, outer):
        x = x.detach().requires_grad_()
        h = swiglu.swiglu_ref(x)
        t, z = z_of(h, outer)
        (dx,) = torch.autograd.grad(h, x, dh)
        s, sM = z_of(dx, inner, transposed=True)
        return h, z, t, dx, sM, s

    return inputs, ours, ref


def rope_case(norm):
    def case(randn, adapters):
        heads = rope.Heads(3, 1, 8, *((randn(8), randn(8)) if norm else (None, None)), 1e-6)
        inner = correction(randn, 40, heads.width, 3, adapters)
        cos, sin = rope.rope_tables(torch.arange(T), randn(4).exp(), torch.float64)
        inputs = (randn(T, heads.width), cos, sin, heads, inner, *(randn(T, n, 8) for n in (3, 1, 1)))

        def ours(qkv, cos, sin, h, inner, *grads):
            d = rope.rope_backward_plain(*grads, qkv, cos, sin, h, inner)
            return *rope.rope_plain(qkv, cos, sin, h), d[:, : h.width], d[:, h.width : h.width + 8], inner.s

        def ref(qkv, cos, sin, h, inner, *grads):
            qkv = qkv.detach().requires_grad_()
            out = rope.rope_ref(qkv, cos, sin, h)
            (d,) = torch.autograd.grad(out, qkv, grads)
            s, sM = z_of(d, inner, transposed=True)
            return *out, d, sM, s

        return inputs, ours, ref

    return case


def shrink_case(randn, adapters):
    inputs = (randn(T, 40), correction(randn, 40, 16, 3, adapters))
    return inputs, lambda x, c: (shrink.shrink_ref(x, c), c.t), lambda x, c: z_of(x, c)[::-1]


CASES = {
    "add_norm": add_norm_case,
    "swiglu": swiglu_case,
    "rope": rope_case(False),
    "rope, q/k norm": rope_case(True),
    "shrink": shrink_case,
}


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_row_op(name, adapters):
    """fp64: equal to the formula. fp32: root-mean-square error over 8 draws at most 2x that of the formula in fp32."""
    inputs, ours, ref = CASES[name](draw(0), adapters)
    for a, b in zip(ours(*inputs), ref(*inputs), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-11)
    errors = torch.zeros(2, len(ours(*inputs)))
    for seed in range(8):
        inputs, ours, ref = CASES[name](draw(seed), adapters)
        exact = ref(*inputs)
        for row, f in enumerate((ours, ref)):
            for i, (a, b) in enumerate(zip(f(*(cast(x, torch.float32) for x in inputs)), exact, strict=True)):
                assert a.dtype == torch.float32
                errors[row, i] += (a.double() - b).square().mean().item() / b.square().mean().item()
    assert (errors[0].sqrt() <= 2 * errors[1].sqrt()).all(), errors.sqrt()


@pytest.mark.parametrize("backend", ["addmm", "native", "padded"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [2, 8])
def test_linear(backend, bias, r, monkeypatch):
    """y from [x | z] and dx from [dy | sM], over plain weights and over one padded buffer, which also grows for rank 24."""
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    randn, sizes = draw(1), [24, 8, 8]
    group = FrozenLinear.empty(40, 56, bias, torch.float64, torch.device("cpu"))
    assert (group.buffer is not None) == (backend in ("native", "padded"))
    group.weight.copy_(randn(40, 56))
    if bias:
        group.bias.copy_(randn(40))
    group.pack([(randn(r, 56), randn(n, r)) for n in sizes], sizes)
    R = len(group.A)
    c = Correction(group.A, group.Bt, randn(1, R // r, r, r))
    x = torch.full((T, row_stride(56, R)), torch.nan).double()[:, : padded_width(56, R)]
    x[:, :56], x[:, 56 : 56 + R] = randn(T, 56), randn(T, R)
    if backend in ("native", "padded"):  # the whole pad is multiplied
        x[:, 56 + R], x[:, 57 + R :] = 1, 0
    x.requires_grad_()
    y = linear(x, group, c)
    want = group.weight @ x[:, :56].T + group.Bt.T @ x[:, 56 : 56 + R].T
    want = want.T + (group.bias if bias else 0)
    torch.testing.assert_close(y[:, :40].detach(), want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear_ref(x, group), want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(linear(x, group, c), y[:, :40])
    dy = torch.zeros(T, y.shape[1]).double()
    dy[:, :40], dy[:, 40 : 40 + R] = randn(T, 40), randn(T, R)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx[:, :56], dy[:, :40] @ group.weight + dy[:, 40 : 40 + R] @ group.A, rtol=1e-12, atol=1e-12)
    dense = randn(T, 56).requires_grad_()  # rows without a pad, and a linear whose adapter is off
    torch.testing.assert_close(linear(dense, group, c)[:, :40], linear(dense, group, None))
    (dx,) = torch.autograd.grad(linear(dense, group, None), dense, dy[:, :40].contiguous())
    torch.testing.assert_close(dx, dy[:, :40] @ group.weight)


@pytest.fixture
def products(monkeypatch):
    """The native backend, and how often oneDNN was asked for a product."""
    monkeypatch.setenv("TINYLORA_BACKEND", "native")
    calls, onednn = [], linear_module.onednn_linear

    def counted(x, *rest):
        calls.append(x.shape)
        return onednn(x, *rest)

    monkeypatch.setattr(linear_module, "onednn_linear", counted)
    return calls


@pytest.fixture(params=["", "widened"])
def processor(request, monkeypatch):
    """As this one is, and one without bf16 products."""
    if request.param:
        for module in (products_module, frozen_module):
            monkeypatch.setattr(module, "bf16_products", lambda: False)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("carries", [False, True])
def test_products_by_onednn(products, bias, carries, weights):
    """y and dx of fp32 rows, adapter on and off: error at most twice the plain formula's in the weights' dtype, and a row's
    bits the same in any batch."""
    randn, sizes, rows, K, N = draw(3), [24, 8, 8], 200, 56, 40
    group = FrozenLinear.empty(N, K, bias, weights, torch.device("cpu"), carries, torch.float32)
    group.weight.copy_(randn(N, K))
    if bias:
        group.bias.copy_(randn(N))
    group.pack([(randn(2, K), randn(n, 2)) for n in sizes], sizes)
    assert group.A.dtype == group.Bt.dtype == torch.float32 and group.weight.dtype == weights
    c = Correction(group.A, group.Bt, randn(1, 3, 2, 2).float())
    x = padded(rows, K, c, group.A) if carries else group.A.new_empty(rows, K)
    x[:, :K] = randn(rows, K)
    if carries:
        x[:, K : K + 6], x[:, K + 6 :], x[:, K + 6] = randn(rows, 6), 0, 1
    dy = padded(rows, N, c, group.A)
    dy[:, :N], dy[:, N : N + 6], dy[:, N + 6 :] = randn(rows, N), randn(rows, 6), 0

    def formula(dtype):
        W, A, Bt, x_, dy_ = (t.to(dtype) for t in (group.weight, group.A, group.Bt, x, dy))
        off = x_[:, :K] @ W.T + (group.bias.to(dtype) if bias else 0)
        on = off + x_[:, K : K + 6] @ Bt if carries else off
        return on, off, dy_[:, :N] @ W + dy_[:, N : N + 6] @ A

    leaf = x.clone().requires_grad_()
    y = linear(leaf, group, c)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    with torch.no_grad():
        off = linear(x[:, :K].contiguous(), group, None)
        for some in (slice(0, 8), slice(3, 27), slice(100, 164)):
            assert torch.equal(linear(x[some], group, c), y[some, :N])
    without = bias and not carries and weights == torch.float32
    assert len(products) == 6 - without, "a padded y has no room for a bias that x does not carry"
    for ours, plain, exact in zip((y[:, :N], off, dx[:, :K]), formula(weights), formula(torch.float64), strict=True):
        assert ours.dtype == torch.float32
        assert rms(ours.detach().double() - exact) <= 2 * rms(plain.double() - exact)


def bf16_group(N, K):
    group = FrozenLinear.empty(N, K, False, torch.bfloat16, torch.device("cpu"), around=torch.float32)
    group.weight.copy_(draw(8)(N, K))
    return group


@pytest.mark.skipif(not bf16_products(), reason="this processor has no bf16 products")
@pytest.mark.parametrize("N, K", [(1152, 896), (896, 4864), (56, 72)])
def test_few_rows_of_bf16_read_blocks(monkeypatch, N, K):
    """Up to FEW rows, to the bit what more rows get; and never weights that were there before."""
    group, x, counts = bf16_group(N, K), draw(9)(FEW + 8, K).float(), []
    by_blocks = products_module._by_blocks
    monkeypatch.setattr(products_module, "_by_blocks", lambda x, blocks: counts.append(len(x)) or by_blocks(x, blocks))
    y = linear(x, group, None)
    assert not counts
    group.blocks()
    counts.clear()  # of the comparison
    for rows in (*range(8, FEW + 1, 24), FEW):
        assert torch.equal(linear(x[:rows], group, None), y[:rows])
        assert counts == [rows]
        counts.clear()
    group.weight.mul_(2)  # in place, as a baseline writes what it has trained
    assert torch.equal(linear(x[:8], group, None), 2 * y[:8])
    randn = draw(10)
    group.pack([(randn(2, K), randn(N, 2))], [N])  # into a larger buffer
    assert torch.equal(linear(x[:8], group, None), linear(x, group, None)[:8])


def test_blocks_whose_bits_are_others_are_left_out(monkeypatch):
    group, x = bf16_group(64, 64), draw(9)(8, 64).float()
    y = linear(x, group, None)
    group.weight.mul_(1)  # blocks are made anew
    by_blocks = products_module._by_blocks
    monkeypatch.setattr(products_module, "_by_blocks", lambda x, blocks: by_blocks(x, blocks) * (1 + (len(x) < 16) * 0.02))
    assert group.blocks() is None and torch.equal(linear(x, group, None), y)


def test_long_sums_are_not_onednns(products):
    for K, dtype, called in ((CHAIN, torch.float32, 1), (CHAIN + 16, torch.float32, 0), (CHAIN + 16, torch.bfloat16, 1)):
        group = FrozenLinear.empty(8, K, False, dtype, torch.device("cpu"), around=torch.float32)
        group.weight.zero_()
        linear(torch.zeros(8, K), group, None)
        assert len(products) == called
        products.clear()


@pytest.mark.parametrize("K, N", [(64, 24), (TILE // 16, 40), (TILE, 24)])
def test_without_bf16_products_sums_are_fp32s(monkeypatch, K, N):
    """By tiles of the weight, none larger than TILE unless 8 of its rows are, and rounded once, as plain bf16 is."""
    monkeypatch.setattr(products_module, "bf16_products", lambda: False)
    dtypes, sizes, linear_ = set(), [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: dtypes.update((x.dtype, w.dtype)) or sizes.append(w.numel()) or linear_(x, w))
    x, weight = draw(11)(8, K).float(), draw(12)(N, K).bfloat16()
    for w in (weight, weight.T.contiguous().T):
        dtypes.clear(), sizes.clear()
        y = onednn_linear(x, w)
        assert dtypes == {torch.float32} and sum(sizes) == N * K and max(sizes) <= max(TILE, 8 * K)
        exact = x.bfloat16().double() @ w.double().T
        assert y.dtype == torch.float32 and torch.equal(y, y.bfloat16().float())
        assert rms(y - exact) <= 2 * rms(exact.bfloat16() - exact)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("rows", [8, 24, 64, 96])
@pytest.mark.parametrize("width, columns", [(64, 64), (400, 128), (512, 16), (896, 1152), (896, 1240)])
def test_a_rows_bits_are_its_own(rows, width, columns):
    """Whichever library multiplies here, in a weight as it lies and transposed, of fp32 and of bf16."""
    randn = draw(5)
    x, weight, transposed = randn(256, width).float(), randn(columns, width).float(), randn(width, columns).float().T
    for w in (weight, transposed, weight.bfloat16(), transposed.bfloat16()):
        assert torch.equal(onednn_linear(x[:rows], w), onednn_linear(x, w)[:rows])


def test_onednn_is_left_out_where_rows_depend_on_the_batch(monkeypatch):
    """As in PyTorch 2.11: MKL's bits then, which a oneDNN that is wrong in small batches shows."""
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, *rest: real(x, *rest) + (len(x) < 16) * 1e-6)
    keeps = onednn_keeps_rows.__wrapped__()
    assert not keeps
    monkeypatch.setattr(products_module, "onednn_keeps_rows", lambda: keeps)
    x, weight = draw(6)(8, 64).float(), draw(7)(64, 64).float()
    assert torch.equal(onednn_linear(x, weight), F.linear(x, weight))


def test_repacking_leaves_nothing_of_the_adapter_before(monkeypatch):
    """Rank 8 in three segments, then rank 1 in one: the buffer's products are the second adapter's."""
    monkeypatch.setenv("TINYLORA_BACKEND", "padded")
    randn = draw(2)
    group = FrozenLinear.empty(40, 56, True, torch.float64, torch.device("cpu"))
    group.weight.copy_(randn(40, 56))
    group.bias.copy_(randn(40))
    group.pack([(randn(8, 56), randn(n, 8)) for n in (24, 8, 8)], [24, 8, 8], 8)
    group.pack([(randn(1, 56), randn(40, 1))], [40], 8)
    fresh = FrozenLinear.empty(40, 56, True, torch.float64, torch.device("cpu"))
    fresh.weight.copy_(group.weight)
    fresh.bias.copy_(group.bias)
    fresh.pack([(group.A[:1], group.Bt[:1].T)], [40], 8)
    height, width = min(len(fresh.buffer), len(group.buffer)), min(fresh.buffer.shape[1], group.buffer.shape[1])
    assert torch.equal(group.buffer[:height, :width], fresh.buffer[:height, :width])
    assert not group.buffer[height:].any() and not group.buffer[:, width:].any()


def test_mix_rounds_once_and_per_segment():
    t = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    M = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    for rows in (None, torch.tensor([0])):
        c, out = Correction(t, t, M, rows), torch.full((1, 6), torch.nan)
        assert c.mix(t).tolist() == c.mix(t, out=out[:, 1:5]).tolist() == out[:, 1:5].tolist() == [[5.0, 11.0, 4.0, 3.0]]
        assert c.mix(t, transposed=True).tolist() == [[7.0, 10.0, 4.0, 3.0]]
        assert c.mix(t.bfloat16(), out=torch.empty(1, 4).bfloat16()).dtype == torch.bfloat16


def test_launches_are_functions_of_shapes():
    assert [padded_width(k, r) for k, r in ((3584, 2), (3584, 15), (3584, 16), (896, 24))] == [3600, 3600, 3616, 928]
    assert [row_stride(k, r) for k, r in ((3584, 2), (896, 24), (896, 64))] == [3648, 960, 1024]
    for k in (896, 3584, 4864, 18944):  # whole cache lines, and what Triton and TMA need
        assert padded_width(k, 6) % 16 == 0 and row_stride(k, 6) % 64 == 0 and row_stride(k, 6) >= padded_width(k, 6)
    assert row_config(64, 3584) == {"ROWS": 1, "BLOCK": 1024, "num_warps": 8}
    assert row_config(16384, 18944) == {"ROWS": 4, "BLOCK": 512, "num_warps": 8}
    assert row_config(1, 40) == {"ROWS": 1, "BLOCK": 64, "num_warps": 4}
    tile = {"BLOCK_T": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    assert linear_config(16384, 90, True, False) == tile
    assert linear_config(16384, 100, True, False) == {**tile, "BLOCK_N": 128, "num_stages": 4}
    assert linear_config(16384, 80, False, False) == {**tile, "BLOCK_N": 128}
    assert linear_config(5, 80, False, False)["BLOCK_T"] == 16
    assert linear_config(16384, 90, False, True)["BLOCK_T"] == 32, "fp32 goes without tensor cores"
