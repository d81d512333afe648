"""The GRPO family's loss on packed completion tokens, equal to TRL's.

    ratio = p(token) / p_old(token)
    l = -min(ratio A, clip(ratio, 1 - eps, 1 + eps_high) A) * w + beta * ratio * kl      w = min(p_old / p_rollout, cap)
    kl = exp(ref - logp) - (ref - logp) - 1

    grpo     1/N sum_completions 1/|o| sum_tokens l
    dapo     1/T sum_tokens l
    dr_grpo  1/(N max_completion_length) sum_tokens l

N completions and T loss tokens count the whole step, dead groups included, so leaving those out of the forward is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LossTerms:
    """What the step's tokens contribute, each (tokens,)."""

    loss: Tensor  # already divided: the sum over all microbatches is the step's loss
    clipped_low: Tensor  # bool
    clipped_high: Tensor  # bool
    kl: Tensor | None  # detached


def token_weights(lengths: Tensor, loss_type: str, completions: int, tokens: int, max_completion_length: int) -> Tensor:
    """The weight of each token's l, for live completions of `lengths` loss tokens: float64 (sum of lengths,).

    `completions` and `tokens` are the whole step's N and T.
    """
    if loss_type == "grpo":
        per_completion = 1.0 / (lengths.clamp_min(1).double() * completions)
    elif loss_type == "dapo":
        per_completion = torch.full(lengths.shape, 1.0 / max(tokens, 1), dtype=torch.float64)
    elif loss_type == "dr_grpo":
        per_completion = torch.full(lengths.shape, 1.0 / (completions * max_completion_length), dtype=torch.float64)
    else:
        raise ValueError(f"loss_type {loss_type!r}: choose grpo, dr_grpo or dapo")
    return per_completion.repeat_interleave(lengths)


def grpo_loss(
    logp: Tensor,  # (tokens,) with gradient
    old_logp: Tensor,  # (tokens,): the policy that the ratio is against; logp.detach() on-policy
    rollout_logp: Tensor | None,  # (tokens,): as sampled; None: no correction
    ref_logp: Tensor | None,  # (tokens,): the base model's; None: no KL
    advantages: Tensor,  # (tokens,): of each token's completion
    weights: Tensor,  # (tokens,): from token_weights
    epsilon: float,
    epsilon_high: float,
    beta: float,
    cap: float,
) -> LossTerms:
    """The loss of each token, weighted and summable."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    if rollout_logp is not None:
        loss = loss * (old_logp - rollout_logp).exp().clamp_max(cap)
    kl = None
    if ref_logp is not None:
        kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        kl = kl * ratio
        loss = loss + beta * kl
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return LossTerms(loss * weights, low, high, None if kl is None else kl.detach())
