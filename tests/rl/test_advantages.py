"""Advantages against TRL's own arithmetic, and dead groups that must be exactly zero."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from tinylora.rl.advantages import compute_advantages

NAN = float("nan")


def trl_advantages(rewards: Tensor, generations: int, scale: str) -> tuple[Tensor, Tensor]:
    """What TRL's GRPOTrainer computes from one reward function: advantages, and which completions have zero std."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    grouped = rewards.view(-1, generations)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(generations)
    std = nanstd(grouped, dim=1).repeat_interleave(generations)
    dead = torch.isclose(std, torch.zeros_like(std))
    if scale == "batch":
        std = nanstd(rewards).expand_as(rewards)
    advantages = rewards - mean
    if scale != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0), dead


def random_rewards(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "right or wrong":
        return (torch.rand(48, generator=generator, dtype=torch.float64) < 0.6).double()
    rewards = torch.randn(48, generator=generator, dtype=torch.float64) * 3 - 1
    if kind == "unscorable":
        rewards[torch.rand(48, generator=generator) < 0.3] = NAN
    return rewards


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["right or wrong", "any value", "unscorable"])
@pytest.mark.parametrize("generations", [2, 4, 8])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_to_trl(scale: str, generations: int, kind: str, seed: int) -> None:
    rewards = random_rewards(kind, seed)
    found = compute_advantages(rewards, generations, scale)
    expected, dead = trl_advantages(rewards, generations, scale)
    # TRL's nanstd divides two integer tensors for n / (n - 1), so that comes out in float32 whatever the rewards are.
    assert ((found.values - expected).abs() <= 2**-23 * expected.abs() + 1e-12).all()
    # TRL calls a group of one scorable reward or none not dead (its std is NaN); it teaches nothing all the same.
    scorable = (~rewards.isnan()).view(-1, generations).sum(1).repeat_interleave(generations)
    assert torch.equal(~found.live, dead | (scorable < 2))
    assert found.values.abs().max() > 0.3 and found.live.any()  # the case is not empty


@pytest.mark.parametrize("kind", ["right or wrong", "any value", "unscorable"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_to_the_formula(scale: str, kind: str) -> None:
    """To float64's precision, with Python's own mean and standard deviation over the scorable rewards."""

    def scorable(x: list[float]) -> list[float]:
        return [r for r in x if not math.isnan(r)]

    rewards = random_rewards(kind, 7).tolist()
    found = compute_advantages(torch.tensor(rewards, dtype=torch.float64), 4, scale)
    assert found.values.shape == (48,) and found.values.dtype == torch.float64
    for i, (reward, advantage) in enumerate(zip(rewards, found.values.tolist(), strict=True)):
        group = scorable(rewards[i // 4 * 4 : i // 4 * 4 + 4])
        expected = 0.0
        if len(set(group)) > 1 and not math.isnan(reward):
            whose = {"group": group, "batch": scorable(rewards), "none": None}[scale]
            expected = (reward - statistics.fmean(group)) / (statistics.stdev(whose) + 1e-4 if whose else 1)
        assert abs(advantage - expected) < 1e-12


def test_by_hand() -> None:
    """Two right of four: mean 1/2, standard deviation with n - 1 is sqrt(1/3)."""
    std = (1 / 3) ** 0.5
    found = compute_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0]), 4, "group")
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0], dtype=torch.float64) / (std + 1e-4)
    assert (found.values - expected).abs().max() < 1e-15
    assert found.live.tolist() == [True] * 4 + [False] * 4
    assert (found.zero_std, found.all_right, found.all_wrong) == (0.5, 0.5, 0.0)
    unscaled = compute_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4, "none")
    assert unscaled.values.tolist() == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -1e-3, 1e9 + 0.3, 1.0, 0.0])
@pytest.mark.parametrize("generations", [3, 6, 7])
def test_dead_groups_are_exactly_zero(generations: int, reward: float, scale: str) -> None:
    """Means of equal numbers round: (0.1 + 0.1 + 0.1) / 3 is not 0.1, and over 1e-4 the error is no longer small."""
    live = torch.tensor([1.0] + [0.0] * (generations - 1), dtype=torch.float64)
    rewards = torch.cat([torch.full((2 * generations,), reward, dtype=torch.float64), live])
    found = compute_advantages(rewards, generations, scale)
    assert found.values[: 2 * generations].tolist() == [0.0] * (2 * generations)
    assert not found.live[: 2 * generations].any() and found.live[2 * generations :].all()
    assert found.values[2 * generations :].ne(0).all()


def test_the_means_above_do_round() -> None:
    """Or the test before this one would pass on any formula."""
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert (rewards - rewards.nanmean()).abs().max() > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unscorable_completions_get_zero_and_do_not_move_the_others(scale: str) -> None:
    rewards = torch.tensor([1.0, NAN, 0.0, NAN, NAN, NAN, NAN, NAN, NAN, NAN, 0.5, NAN, 1.0, 1.0, NAN, 1.0])
    found = compute_advantages(rewards, 4, scale)
    assert found.values[rewards.isnan()].tolist() == [0.0] * 10
    first = found.values[[0, 2]]
    assert first[0] > 0 and first[0] == -first[1]
    # only the first group has two different rewards: nothing, one reward, and equal ones are dead
    assert found.live.tolist() == [True] * 4 + [False] * 12
    assert found.values[4:].tolist() == [0.0] * 12
    if scale == "group":  # the group is as if the unscorable were not there
        assert torch.equal(first, compute_advantages(torch.tensor([1.0, 0.0]), 2, "group").values)


def test_shares_of_dead_groups_add_up() -> None:
    """All right has a positive reward; a group without any reward is neither that nor all wrong, which is the others."""
    groups = [[1, 1], [1, 1], [0, 0], [-1, -1], [NAN, NAN], [0.5, NAN], [0, 1], [-1, 1]]
    found = compute_advantages(torch.tensor(groups).flatten(), 2, "group")
    assert (found.zero_std, found.all_right, found.all_wrong, found.unscored) == (6 / 8, 3 / 8, 2 / 8, 1 / 8)
    for seed in range(20):
        rewards = (torch.rand(60, generator=torch.Generator().manual_seed(seed)) < 0.5).double()
        found = compute_advantages(rewards, 2, "batch")
        counts = rewards.view(-1, 2).sum(1)
        assert found.zero_std == found.all_right + found.all_wrong
        assert abs(found.all_right - (counts == 2).double().mean().item()) < 1e-15
        assert abs(found.all_wrong - (counts == 0).double().mean().item()) < 1e-15


def test_nothing_scorable_at_all() -> None:
    found = compute_advantages(torch.full((6,), NAN), 3, "batch")
    assert found.values.tolist() == [0.0] * 6 and not found.live.any()
    assert (found.zero_std, found.all_right, found.all_wrong, found.unscored) == (1.0, 0.0, 0.0, 1.0)


def test_scale_batch_is_one_divisor_for_all() -> None:
    """Groups of unlike spread keep it; under "group" every group comes out alike."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 10.0])
    batch = compute_advantages(rewards, 2, "batch").values
    assert abs(batch[3] / batch[1] - 10) < 1e-12
    assert abs(batch[1] - 0.5 / (rewards.double().std() + 1e-4)) < 1e-12
    group = compute_advantages(rewards, 2, "group").values
    assert abs(group[3] / group[1] - 1) < 2e-4
