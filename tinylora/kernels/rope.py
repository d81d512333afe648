"""Rotary position embedding, Hugging Face's half-split convention: pairs are (x_i, x_{i + D/2}).

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

The map is a rotation, so its backward is the rotation by the opposite angle and saves nothing but cos and sin. Those come
as (T, D), [cos | cos] and [-sin | sin]: then y = x cos + swap(x) sin, with the halves of x swapped, is four operations.
"""

import torch
from torch import Tensor


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula as it stands, differentiable by autograd: the oracle."""
    (x1, x2), cos, sin = x.chunk(2, -1), cos.chunk(2, -1)[0][:, None], sin.chunk(2, -1)[1][:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D) of positions (T,) at frequencies (D/2,), angles in float32."""
    angles = positions[:, None].float() * frequencies  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], 1).to(dtype), torch.cat([-sin, sin], 1).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = x.roll(x.shape[-1] // 2, -1)
    return (x * cos[:, None]).add_(swapped.mul_(sin[:, None]))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, D), cos and sin (T, D) from rope_tables -> (T, heads, D), with a gradient for x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, cos, sin)
    return _rotate(x, cos, sin)
