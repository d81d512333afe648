"""Advantages: each completion's reward against its group, as in TRL.

    A = (r - mean(group)) / (std + 1e-4)     std of the group (n - 1), of the whole batch, or none

A group is dead when its largest reward equals its smallest: its advantages are exactly 0, not a rounding error over 1e-4,
and unless something else needs it, it never enters the update's forward. A NaN reward (unscorable) gets advantage 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Advantages:
    values: Tensor  # (prompts * generations,) float64
    live: Tensor  # (prompts * generations,) bool: False for every completion of a dead group
    zero_std: float  # share of dead groups
    all_right: float  # share of dead groups with a positive reward
    all_wrong: float  # share of the others that have a reward
    unscored: float = 0.0  # share of groups without one; zero_std = all_right + all_wrong + unscored


def compute_advantages(rewards: Tensor, generations: int, scale: str) -> Advantages:
    """rewards (prompts * generations,), NaN where unscorable; scale "group", "batch" or "none"."""
    groups = rewards.double().view(-1, generations)  # (prompts, generations)
    low = groups.nan_to_num(nan=torch.inf).amin(1)
    high = groups.nan_to_num(nan=-torch.inf).amax(1)
    dead = low >= high  # also a group of NaN alone
    values = groups - groups.nanmean(1, keepdim=True)
    if scale == "group":
        values = values / (_nanstd(groups, 1) + 1e-4)
    elif scale == "batch":
        values = values / (_nanstd(groups.flatten(), 0) + 1e-4)
    values = torch.where(dead[:, None], 0.0, values.nan_to_num(nan=0.0))
    right, none = (dead & (high > 0)).double().mean().item(), groups.isnan().all(1).double().mean().item()
    zero = dead.double().mean().item()
    return Advantages(values.flatten(), ~dead.repeat_interleave(generations), zero, right, max(0.0, zero - right - none), none)


def _nanstd(x: Tensor, dim: int) -> Tensor:
    """Standard deviation with n - 1, over the entries that are not NaN; keeps `dim`."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    return ((x - x.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
