"""The self-check's own cases: every kernel of the package passes them interpreted, and a broken one does not."""

import pytest
import torch

from tinylora.kernels import self_check

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


# op, launcher that its check calls, and a fault in what that returns
FAULTS = [
    ("reduce_dm", "reduce_dm_triton", slightly_off),
    ("reduce_dm", "reduce_dm_triton", transposed),
    ("sampling", "sample_triton", lambda found: (found[0] + 1, found[1])),
    ("sampling", "sample_triton", lambda found: (found[0], slightly_off(found[1]))),
    ("token_logprobs", "token_logprobs_triton", lambda found: (slightly_off(found[0].detach()) + 0 * found[0], found[1])),
    ("token_logprobs", "token_logprobs_triton", lambda found: (found[0], slightly_off(found[1]))),
    ("token_logprobs", "token_logprobs_triton", lambda found: (found[0] + 1e-4 * (found[0] - found[0].detach()), found[1])),
]


@pytest.mark.parametrize(("op", "launcher", "fault"), FAULTS)
def test_a_faulty_kernel_fails(op: str, launcher: str, fault, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(self_check, launcher)
    monkeypatch.setattr(self_check, launcher, lambda *a: fault(right(*a)))
    assert "relative error" in self_check.verdict(op, self_check.CHECKS[op], CPU, 0)["error"]


def test_every_check_has_a_fault_that_it_sees() -> None:
    assert {op for op, *_ in FAULTS} == self_check.CHECKS.keys()
