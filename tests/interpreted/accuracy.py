"""The one rule of accuracy: an op's error against fp64 is at most twice that of plain PyTorch in the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Op = Callable[..., Sequence[Tensor]]  # inputs -> outputs, gradients among them


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """f's output and the gradients of its inputs for the output's gradient dy."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def assert_at_most_twice_plain(
    op: Op,
    plain: Op,
    draw: Callable[[int], Sequence[Tensor]],  # seed -> float64 inputs
    dtype: torch.dtype,
    draws: int = 4,
) -> None:
    """Relative root-mean-square error of each output over several draws, against `plain` in fp64 on the same inputs.

    One fp32 rounding is allowed on top, since plain PyTorch may be exact by luck.
    """
    square: list[list[float]] = [[], []]  # op, plain: sum over draws for each output
    for seed in range(draws):
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in draw(seed)]
        exact = plain(*[x.double() if x.is_floating_point() else x for x in inputs])
        for total, f in zip(square, (op, plain), strict=True):
            got = f(*inputs)
            total.extend([0.0] * (len(exact) - len(total)))
            for k, (a, b) in enumerate(zip(got, exact, strict=True)):
                assert a.shape == b.shape and a.isfinite().all()
                total[k] += ((a.double() - b).square().mean() / b.square().mean()).item()
    ours, theirs = (torch.tensor(total).div(draws).sqrt() for total in square)
    assert (ours <= 2 * theirs + torch.finfo(torch.float32).eps).all(), f"ours {ours.tolist()}, plain {theirs.tolist()}"
