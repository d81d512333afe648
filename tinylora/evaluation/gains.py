"""Rewards of answers to held-out problems: means, standard errors, and gains on the same problems."""

from collections.abc import Sequence

from tinylora.evaluation.statistics import bootstrap


def reward_metrics(
    sampled: dict[str, list[float | None]], greedy: dict[str, list[float | None]]
) -> dict[str, float | int | None]:
    """eval/reward and its standard error, of the greedy answers, and of each function; None where nothing was scored."""
    found = {"eval/reward": mean_of(sampled.get("reward", [])), "eval/reward_greedy": mean_of(greedy["reward"])}
    scored = [x for x in sampled.get("reward", []) if x is not None]
    found["eval/reward_stderr"] = (variance(scored) / len(scored)) ** 0.5 if scored else None
    parts = {name: mean_of(values) for name, values in (sampled or greedy).items() if name != "reward"}
    return {**found, **{f"eval/rewards/{name}/mean": mean for name, mean in parts.items()}}


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of those that are scored."""
    scored = [x for x in values if x is not None]
    return sum(scored) / len(scored) if scored else None


def reward_gain(before: Sequence[float | None], after: Sequence[float | None]) -> tuple[float, float, float] | None:
    """after minus before on the problems that both have a reward for: mean and 95 % interval by bootstrap over problems."""
    changes = [a - b for b, a in zip(before, after, strict=True) if a is not None and b is not None]
    return (sum(changes) / len(changes), *bootstrap(changes)) if changes else None


def shown_gain(gain: tuple[float, float, float] | None) -> str:
    """Of a reward."""
    return "none" if gain is None else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"


def variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)
