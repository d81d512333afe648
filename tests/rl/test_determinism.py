"""When which deterministic mode holds: strict around the library's attention backward, lenient around the rest of an update."""

import pytest
import torch

from tinylora.kernels import attention
from tinylora.kernels.attention import packed_attention_ref
from tinylora.kernels.packing import Packing
from tinylora.rl.update import deterministic

LENGTHS, PREFIXES = [5, 3, 4, 2], [0, 1]  # two whole sequences, and a suffix of each
GPU = torch.device("cuda")


def mode() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


class Recorded(torch.autograd.Function):
    """x as it is; its backward notes the mode it runs in."""

    @staticmethod
    def forward(ctx, x, name, seen):
        ctx.name, ctx.seen = name, seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        ctx.seen.append((ctx.name, *mode()))
        return dx, None, None


def library(seen: list):
    """In the place of PyTorch's variable-length attention, which no CPU has: the formula, noting its backward's mode."""

    def attend(q, k, v, ends_q, ends_k, longest_q, longest_k):
        lengths_q, lengths_k = ends_q.diff().tolist(), ends_k.diff().tolist()
        assert (longest_q, longest_k) == (max(lengths_q), max(lengths_k))
        outs = []
        for q_, k_, v_ in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
            before = q_.new_zeros(len(k_) - len(q_), *q_.shape[1:])  # queries of the prefix, which are not asked for
            outs.append(packed_attention_ref(torch.cat([before, q_]), k_, v_, [len(k_)])[len(before) :])
        return Recorded.apply(torch.cat(outs), "attention", seen)

    return attend, {}


def inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, 8, generator=g, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def two_layers(layout: Packing, q, k, v, seen: list) -> torch.Tensor:
    q = Recorded.apply(q, "before", seen)
    out = attention._varlen_attention(q, k, v, layout)
    out = Recorded.apply(out, "between", seen)
    return Recorded.apply(attention._varlen_attention(out, k, v, layout), "after", seen)


@pytest.mark.parametrize("outside", [(False, False), (True, True), (True, False)])
def test_strict_around_the_attention_alone(outside: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """In both of two layers; whatever held before holds everywhere else, and again at the end."""
    seen: list = []
    monkeypatch.setattr(attention, "_varlen", lambda: library(seen))
    layout = Packing(LENGTHS, PREFIXES, torch.float64, torch.device("cpu"), None)
    torch.use_deterministic_algorithms(outside[0], warn_only=outside[1])
    try:
        two_layers(layout, *inputs(), seen).sum().backward()
        assert mode() == outside
    finally:
        torch.use_deterministic_algorithms(False)
    strict = ("attention", True, False)
    assert seen == [("after", *outside), strict, ("between", *outside), strict, ("before", *outside)]


def test_the_gradient_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suffixes and grouped queries included, against whole sequences that repeat their prefixes."""
    monkeypatch.setattr(attention, "_varlen", lambda: library([]))
    layout = Packing(LENGTHS, PREFIXES, torch.float64, torch.device("cpu"), None)
    q, k, v = inputs()
    rows = [*range(8), *range(5), *range(8, 12), *range(5, 8), *range(12, 14)]
    own = [*range(8), *range(13, 17), *range(20, 22)]
    whole = packed_attention_ref(q[rows], k[rows], v[rows], [5, 3, 9, 5])[own]
    dout = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = attention._varlen_attention(q, k, v, layout)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)
    for mine, right in zip(*(torch.autograd.grad(o, (q, k, v), dout) for o in (ours, whole)), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("outside", [(False, False), (True, True), (True, False)])
def test_an_update_leaves_the_mode_it_found(outside: tuple[bool, bool]) -> None:
    """Also where its backward ran out of memory in the middle of the attention's."""
    settings = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(outside[0], warn_only=outside[1])
    try:
        with pytest.raises(torch.OutOfMemoryError), deterministic(GPU):
            assert mode() == (True, True) and not settings.fill_uninitialized_memory
            torch.use_deterministic_algorithms(True)
            raise torch.OutOfMemoryError("in the attention's backward")
        assert mode() == outside and settings.fill_uninitialized_memory == fill
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_cpu_needs_no_mode() -> None:
    with deterministic(torch.device("cpu")):
        assert mode() == (False, False)
