"""The self-check's own cases: every kernel of the package passes them interpreted, and a broken one does not."""

import pytest
import torch

from tinylora.kernels import add_norm, rope, self_check, shrink, swiglu

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", self_check.CHECKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_kernels_pass(op: str, seed: int) -> None:
    found = self_check.verdict(op, self_check.CHECKS[op], CPU, seed)
    assert found["error"] is None and found["cases"]
    assert any(case["error"] > 0 for case in found["cases"]), "compared with itself"


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
    ("fused_linear", self_check, "fused_linear", None),
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
    ("rope", rope, "rope_backward_triton", changed(0, slightly_off)),
    ("rope", rope, "rope_backward_triton", changed(Z, slightly_off)),
    ("reduce_dm", self_check, "reduce_dm_triton", slightly_off),
    ("reduce_dm", self_check, "reduce_dm_triton", transposed),
    ("sampling", self_check, "sample_triton", lambda found: (found[0] + 1, found[1])),
    ("sampling", self_check, "sample_triton", lambda found: (found[0], slightly_off(found[1]))),
    ("token_logprobs", self_check, "token_logprobs_triton", lambda f: (slightly_off(f[0].detach()) + 0 * f[0], f[1])),
    ("token_logprobs", self_check, "token_logprobs_triton", lambda f: (f[0], slightly_off(f[1]))),
    ("token_logprobs", self_check, "token_logprobs_triton", lambda f: (f[0] + 1e-4 * (f[0] - f[0].detach()), f[1])),
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
    assert "relative error" in self_check.verdict(op, self_check.CHECKS[op], CPU, 0)["error"]


def test_every_check_has_a_fault_that_it_sees() -> None:
    assert {op for op, *_ in FAULTS} == self_check.CHECKS.keys()
