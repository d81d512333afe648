"""The whole forward and backward of a small model on interpreted kernels, padded and fused, against the plain path."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Sampling, rollout
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.loader import load_model

LENGTHS = [5, 3, 1]
TOKENS = torch.randint(96, (9,), generator=torch.Generator().manual_seed(3))
TARGETS = torch.randint(96, (9,), generator=torch.Generator().manual_seed(4))


def run(path: Path, backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch, adapters: int = 1) -> list[torch.Tensor]:
    """Log-probs of TARGETS and the gradient of v, fp64."""
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    model = load_model(str(path), dtype=dtype)
    adapter = Adapter(model, TinyLoRAConfig(r=2, u=3, n_tie=5))
    v = 0.3 * torch.randn(adapters, *adapter.v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = v.to(torch.float64 if dtype == "float64" else torch.float32).requires_grad_()
    rows = torch.tensor([2, 0, 1]).repeat_interleave(torch.tensor(LENGTHS)) if adapters > 1 else None
    hidden = model.packed(TOKENS, LENGTHS, adapter.matrices(v), rows)
    logp, _ = token_logprobs(hidden, model.head, TARGETS, 1.0)
    (logp * torch.linspace(-1, 1, 9)).sum().backward()
    return [logp.detach().double(), v.grad.double()]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("backend", ["padded", "triton"])
def test_log_probs_and_gradient(
    family: str, adapters: int, backend: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32: error against fp64 at most twice the plain path's (one fp32 rounding on top)."""
    path = tiny_model(family)
    exact = run(path, "addmm", "float64", monkeypatch, adapters)
    plain = run(path, "addmm", "float32", monkeypatch, adapters)
    ours = run(path, backend, "float32", monkeypatch, adapters)
    for o, p, e in zip(ours, plain, exact, strict=True):
        scale = e.square().mean().sqrt()
        mine, theirs = ((x - e).square().mean().sqrt() / scale for x in (o, p))
        assert 0 < mine <= 2 * theirs + torch.finfo(torch.float32).eps, (mine, theirs)
        assert not torch.equal(o, p), "the kernels did not run"


def test_zero_v_is_adapter_off_bitwise(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """M = 0 for every row, and M = 0 for one of several adapters: the same bits, and no other adapter's matter."""
    monkeypatch.setenv("TINYLORA_BACKEND", "padded")
    model = load_model(str(tiny_model("qwen2")))
    adapter = Adapter(model, TinyLoRAConfig(r=2, u=1, n_tie="all"))
    v = torch.tensor([0.0, 0.4, -0.3]).view(3, 1, 1)
    with torch.no_grad():
        off = model.packed(TOKENS, LENGTHS, adapter.matrices(v[0]))
        mixed = model.packed(
            TOKENS, LENGTHS, adapter.matrices(v), torch.tensor([1, 0, 2]).repeat_interleave(torch.tensor(LENGTHS))
        )
        other = model.packed(
            TOKENS, LENGTHS, adapter.matrices(v), torch.tensor([2, 0, 1]).repeat_interleave(torch.tensor(LENGTHS))
        )
    zero = slice(5, 8)
    assert torch.equal(off[zero], mixed[zero]) and torch.equal(mixed[zero], other[zero])
    assert not torch.equal(mixed[:5], off[:5]) and not torch.equal(mixed[:5], other[:5])


def test_rollout(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and decode on interpreted kernels, over one long page a slot and over small ones, sample the tokens that the
    plain path does."""
    path, tokens = tiny_model("qwen2"), []
    for backend, page_size in (("addmm", None), ("padded", None), ("padded", 2)):
        monkeypatch.setenv("TINYLORA_BACKEND", backend)
        model = load_model(str(path))
        matrices = Adapter(model, TinyLoRAConfig(u=2, n_tie="all")).matrices(torch.full((1, 2), 0.2))
        completions = rollout(model, matrices, [[5, 6, 7], [8]], 2, Sampling(4, seed=3), page_size=page_size)
        tokens.append([c.tokens for c in completions])
    assert tokens[0] == tokens[1] == tokens[2]
