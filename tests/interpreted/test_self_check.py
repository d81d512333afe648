"""The self-check's own cases: every kernel of the package passes them interpreted, and a broken one does not."""

import pytest
import torch

from tinylora.kernels import add_norm, checks, decode_attention, fused_linear, proof, rope, shrink, swiglu
from tinylora.kernels.accuracy import relative_errors
from tinylora.kernels.self_check import verdict

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", checks.CHECKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_kernels_pass(op: str, seed: int) -> None:
    every = [verdict(op, checks.CHECKS[op], CPU, dtype, seed) for dtype in proof.dtypes(op, CPU)]
    for found in every:
        assert found["error"] is None and found["cases"]
    assert any(case["error"] > 0 for found in every for case in found["cases"]), "compared with itself"


def slightly_off(outputs):
    return outputs * (1 + 1e-4)


def transposed(outputs):
    return outputs.transpose(-1, -2)


def changed(column: int, change, which: int | None = None):
    """One column of an output (of several: the one numbered `which`) put through `change`."""

    def fault(found):
        out = found if which is None else found[which]
        out[:, column] = change(out[:, column])
        return found

    return fault


def one_more(x):
    return x + 1


# In the cases that a CPU gets, z begins 8 columns before a padded row's end, and zeros fill the last ones.
Z, TAIL = -8, -1

# op, where its check finds the launcher, the launcher, and a fault in what that returns
FAULTS = [
    ("fused_linear", checks, "fused_linear", None),
    ("shrink", shrink, "shrink_triton", slightly_off),
    ("add_norm", add_norm, "add_norm_triton", changed(0, slightly_off, 0)),
    ("add_norm", add_norm, "add_norm_triton", changed(0, slightly_off, 1)),
    ("add_norm", add_norm, "add_norm_triton", changed(Z, slightly_off, 1)),
    ("add_norm", add_norm, "add_norm_triton", changed(TAIL, one_more, 1)),
    ("add_norm", add_norm, "add_norm_backward_triton", changed(0, slightly_off)),
    ("add_norm", add_norm, "add_norm_backward_triton", changed(Z, slightly_off)),
    ("add_norm", add_norm, "add_norm_backward_triton", changed(TAIL, one_more)),
    ("swiglu", swiglu, "swiglu_triton", changed(Z, slightly_off)),
    ("swiglu", swiglu, "swiglu_backward_triton", changed(Z, slightly_off)),
    ("rope", rope, "rope_triton", lambda found: (slightly_off(found[0]), *found[1:])),
    ("rope", rope, "rope_triton", lambda found: (*found[:2], slightly_off(found[2]))),
    ("decode_attention", rope, "rope_cache_triton", slightly_off),
    ("decode_attention", decode_attention, "decode_attention_triton", lambda found: (slightly_off(found[0]), found[1])),
    ("decode_attention", decode_attention, "decode_attention_triton", lambda found: (found[0], slightly_off(found[1]))),
    ("rope", rope, "rope_backward_triton", changed(0, slightly_off)),
    ("rope", rope, "rope_backward_triton", changed(Z, slightly_off)),
    ("reduce_dm", checks, "reduce_dm_triton", slightly_off),
    ("reduce_dm", checks, "reduce_dm_triton", transposed),
    ("sampling", checks, "sample_triton", lambda found: (found[0] + 1, found[1])),
    ("sampling", checks, "sample_triton", lambda found: (found[0], slightly_off(found[1]))),
    ("token_logprobs", checks, "token_logprobs_triton", lambda f: (slightly_off(f[0].detach()) + 0 * f[0], f[1])),
    ("token_logprobs", checks, "token_logprobs_triton", lambda f: (f[0], slightly_off(f[1]))),
    ("token_logprobs", checks, "token_logprobs_triton", lambda f: (f[0] + 1e-4 * (f[0] - f[0].detach()), f[1])),
]


@pytest.mark.parametrize(("op", "place", "launcher", "fault"), FAULTS)
def test_a_faulty_kernel_fails(op: str, place, launcher: str, fault, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(place, launcher)

    def wrong(*arguments):
        if fault is not None:
            return fault(right(*arguments))
        right(*arguments)
        arguments[-1].mul_(1 + 1e-4)  # this one writes into its last argument

    monkeypatch.setattr(place, launcher, wrong)
    for dtype in proof.dtypes(op, CPU):
        error = verdict(op, checks.CHECKS[op], CPU, dtype, 0)["error"]
        assert dtype == torch.float16 or "relative error" in error


def test_every_check_has_a_fault_that_it_sees() -> None:
    assert {op for op, *_ in FAULTS} == checks.CHECKS.keys()


@pytest.mark.parametrize("op", [shrink, add_norm, swiglu])
def test_row_kernels_in_many_pieces(op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows a program and sixteen columns a piece, as long rows and many of them are taken on a GPU."""
    monkeypatch.setattr(op, "row_config", lambda rows, width: {"ROWS": 4, "BLOCK": 16, "num_warps": 4})
    name = op.__name__.rpartition(".")[2]
    for dtype in proof.dtypes(name, CPU):
        assert verdict(name, checks.CHECKS[name], CPU, dtype, 0)["error"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_tma_kernel(dtype: torch.dtype, transposed: bool) -> None:
    """The fused linear by descriptors, which no CPU chooses: rests in every direction, more tiles than programs."""
    randn = checks.normals(CPU, dtype, 0)
    T, N, K, R = 70, 72, 88, 3
    weight = randn(K, N + 16)[:, :N].T if transposed else randn(N, K + 8)[:, :K]
    x, z, Bt, bias = randn(T, K + 8)[:, :K], randn(T, 5)[:, :R], randn(R, N), randn(N)
    y = torch.full((T, N + 8), torch.nan, dtype=dtype)[:, :N]
    options = {"BLOCK_T": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_linear, "_processors", lambda device: 4)
        fused_linear._run_tma(x, z, weight, Bt, bias, y, options)
    wide = [t.double() for t in (x, z, weight, Bt, bias)]
    plain = fused_linear.fused_linear_ref(x, z, weight, Bt, bias)
    mine, _, allowed = relative_errors(y, plain, fused_linear.fused_linear_ref(*wide))
    assert 0 < mine <= allowed
