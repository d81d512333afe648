"""What a study's results say: means over seeds with their spread, and the trained numbers that an accuracy needs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinylora.evaluation.statistics import bootstrap


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval by bootstrap; a single seed has none, and gets its own value."""
    low, high = bootstrap(values) if len(values) > 1 else (values[0], values[0])
    return sum(values) / len(values), low, high


def by(rows: Sequence[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    return {name: [row for row in rows if row[key] == name] for name in dict.fromkeys(row[key] for row in rows)}


def counts(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def shown(x: float, measure: str) -> str:
    """A mean of a study's measure: an accuracy in percent, a reward as it is."""
    return f"{x:.3f}" if measure == "reward" else f"{x:.1%}"


def measure_of(results: Sequence[dict[str, Any]]) -> str:
    """Of a study's results; those of older versions are accuracies."""
    return str(results[0].get("measure", "accuracy"))


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def count_to_reach(counts: Sequence[int], accuracies: Sequence[float], level: float) -> float:
    """The trained numbers at which accuracy first reaches `level`, on a straight line over log count between neighbours.

    The first count where it is there already, so the truth may be less; infinity where no count reaches it.
    """
    if accuracies[0] >= level:
        return float(counts[0])
    for n, m, low, high in zip(counts, counts[1:], accuracies, accuracies[1:], strict=False):
        if high >= level:
            return float(n * (m / n) ** ((level - low) / (high - low)))
    return math.inf


def counts_to_reach(
    counts: Sequence[Sequence[int]],  # of each series, ascending
    accuracies: Sequence[Sequence[Sequence[float]]],  # series, seeds, counts: the same seeds in all of them
    level: float,
    resamples: int = 2000,
) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
    """For each series `count_to_reach` of its mean over seeds, and its ratio to the first series', each (value, low, high) with
    the 95 % interval by bootstrap over the seeds, which all share. The ratio is nan where neither reaches the level, and a
    resample in which neither does may have any, so it widens the interval on both sides."""
    x = [np.asarray(a, dtype=np.float64) for a in accuracies]
    draws = [np.arange(len(x[0])), *np.random.default_rng(0).integers(0, len(x[0]), (resamples, len(x[0])))]
    found = np.array(
        [[count_to_reach(c, a[seeds].mean(axis=0).tolist(), level) for seeds in draws] for c, a in zip(counts, x, strict=True)]
    )
    with np.errstate(invalid="ignore"):
        ratios = found / found[0]
    ratios[0] = 1.0

    def interval(values: "np.ndarray") -> tuple[float, float, float]:  # nearest: an interpolation has no infinity
        unknown = np.isnan(values[1:])
        low, high = (
            np.quantile(np.where(unknown, edge, values[1:]), q, method="nearest") for edge, q in ((0, 0.025), (math.inf, 0.975))
        )
        return float(values[0]), float(low), float(high)

    return [(interval(row), interval(ratio)) for row, ratio in zip(found, ratios, strict=True)]
