"""The decode linear as Python sees it: its reference, what it takes, and the decode step that runs on it."""

import pytest
import torch
import torch.nn.functional as F
from decoding import decoded

from tinylora.kernels import decode_linear as module
from tinylora.kernels import dispatch
from tinylora.kernels.accuracy import relative_errors
from tinylora.kernels.checks import decode_linear_check
from tinylora.kernels.correction import Correction
from tinylora.kernels.decode_linear import decode_linear, decode_linear_ref, takes
from tinylora.kernels.frozen import FrozenLinear
from tinylora.kernels.layer_linear import layer_linear_ref
from tinylora.model import decoder

CPU = torch.device("cpu")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_reference() -> None:
    """Against the frozen linear's oracle, with each epilogue written out."""
    group, x, residual = FrozenLinear(randn(24, 16), randn(24)), randn(5, 16), randn(5, 24)
    c = Correction(randn(4, 16), randn(4, 24), randn(3, 2, 2, 2), torch.tensor([2, 0, 1, 1, 2]))
    y = layer_linear_ref(x, group.weight, group.bias, c.A, c.Bt, c.M, c.row_adapter)
    torch.testing.assert_close(decode_linear(x, group, c), y)
    torch.testing.assert_close(decode_linear(x, group, c, residual), y + residual)
    torch.testing.assert_close(decode_linear(x, group, c, swiglu=True), F.silu(y[:, :12]) * y[:, 12:])
    torch.testing.assert_close(decode_linear(x, group, None, residual), F.linear(x, group.weight, group.bias) + residual)


def test_its_self_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases that a GPU will run, with the reference in the kernel's place: right, then with each part of it missing."""

    def wrong_cases(kernel) -> set[str]:  # type: ignore[no-untyped-def]
        monkeypatch.setattr(module, "decode_linear_cuda", kernel)
        cases = list(decode_linear_check(CPU, torch.bfloat16, 0))
        assert len(cases) == 10
        errors = {label: relative_errors(ours, plain, exact) for label, ours, plain, exact in cases}
        return {label for label, (mine, _, allowed) in errors.items() if mine > allowed}

    assert not wrong_cases(decode_linear_ref)
    assert len(wrong_cases(lambda x, g, c, r, s: decode_linear_ref(x, g, None, r, s))) == 9  # one has no correction
    no_bias = wrong_cases(lambda x, g, c, r, s: decode_linear_ref(x, FrozenLinear(g.weight), c, r, s))
    no_residual = wrong_cases(lambda x, g, c, r, s: decode_linear_ref(x, g, c, None, s))
    assert all(label.endswith("bias") for label in no_bias) and len(no_bias) == 2
    assert all(label.endswith("residual") for label in no_residual) and len(no_residual) == 3
    one_adapter = lambda x, g, c, r, s: decode_linear_ref(x, g, c and Correction(c.A, c.Bt, c.M), r, s)  # noqa: E731
    assert len(wrong_cases(one_adapter)) == 5
    assert not list(decode_linear_check(CPU, torch.float32, 0))


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.bfloat16
    group, c = FrozenLinear(randn(24, 16).to(half)), Correction(randn(16, 16).to(half), randn(16, 24), randn(1, 2, 8, 8))
    monkeypatch.setattr(dispatch, "runs_cuda", lambda op, x: op == "decode_linear")
    with torch.no_grad():
        assert takes(64, group, c) and takes(1, group, None)
        assert not takes(65, group, c)
        assert not takes(1, FrozenLinear(group.weight.float()), None)
        assert not takes(1, FrozenLinear(randn(24, 20).to(half)[:, :16]), None)  # rows that do not begin on 16 bytes
        assert not takes(1, group, Correction(randn(18, 16).to(half), randn(18, 24), randn(1, 9, 2, 2)))
        assert not takes(1, group, Correction(randn(2, 20).to(half)[:, :16], randn(2, 24), randn(1, 1, 2, 2)))
        monkeypatch.setattr(dispatch, "runs_cuda", lambda op, x: False)
        assert not takes(1, group, c)
    monkeypatch.setattr(dispatch, "runs_cuda", lambda op, x: True)
    assert not takes(1, group, c)  # with gradients


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("adapters", [1, 3])
def test_a_decode_step_on_it_gives_the_same(family, adapters, tiny_model, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """In fp64, by the reference in the kernel's place: the same map, in other pieces."""
    path, used = tiny_model(family), []
    usual = decoded(path, "addmm", "float64", "cpu", monkeypatch, adapters)
    monkeypatch.setattr(decoder, "takes", lambda rows, group, c: used.append(rows) or True)
    whole = decoded(path, "addmm", "float64", "cpu", monkeypatch, adapters)
    assert used == [8] * 4 * 8  # steps times linears
    torch.testing.assert_close(whole, usual, rtol=1e-11, atol=1e-11)
    assert not torch.equal(whole, usual)  # or it was the same way twice
