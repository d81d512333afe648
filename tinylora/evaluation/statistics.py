"""Intervals for accuracies: Wilson for one, Newcombe's for the difference of two on the same problems; and the usual tests.

Sources: Wilson 1927; Newcombe, Statistics in Medicine 17 (1998) 2635, method 10. Both stay honest near 0 and 1, where the
usual normal interval does not.
"""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
Z80 = 0.8416212335729143  # power of 80 %


def standard_error(verdicts: Sequence[bool]) -> float:
    """sqrt(p (1 - p) / n)."""
    p = sum(verdicts) / len(verdicts)
    return math.sqrt(p * (1 - p) / len(verdicts))


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The 95 % interval of right / n, within [0, 1], and cut to contain it: rounding leaves both by 1e-16."""
    p = right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """after's accuracy minus before's on the same problems, and its 95 % interval: (difference, low, high)."""
    n = len(before)
    both = sum(a and b for a, b in zip(after, before, strict=True))
    only_after, only_before = sum(after) - both, sum(before) - both
    neither = n - both - only_after - only_before
    p_after, p_before = sum(after) / n, sum(before) / n
    low_a, high_a = wilson(sum(after), n)
    low_b, high_b = wilson(sum(before), n)
    # Newcombe's correlation, with the continuity correction where it is positive.
    product = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    numerator = float(both * neither - only_after * only_before)
    if numerator > 0:
        numerator = max(0.0, numerator - n / 2)
    phi = numerator / math.sqrt(product) if product else 0.0
    da, ua, db, ub = p_after - low_a, high_a - p_after, p_before - low_b, high_b - p_before
    low = math.sqrt(max(0.0, da * da - 2 * phi * da * ub + ub * ub))
    high = math.sqrt(max(0.0, ua * ua - 2 * phi * ua * db + db * db))
    difference = p_after - p_before
    return difference, max(-1.0, difference - low), min(1.0, difference + high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided p of no difference: the problems that changed are coin tosses. McNemar 1947, binomial form."""
    gained = sum(a and not b for a, b in zip(after, before, strict=True))
    lost = sum(b and not a for a, b in zip(after, before, strict=True))
    tail = sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1))
    return min(1.0, tail / 2 ** (gained + lost - 1)) if gained + lost else 1.0


def pass_at_k(right: int, n: int, k: int) -> float:
    """The unbiased chance that k of n completions, `right` of them right, hold a right one. Chen et al. 2021."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def bootstrap(values: Sequence[float], resamples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over problems, each value a problem's; the same for the same values.

    It contains the mean, to the last bit: resamples of equal values have other roundings than their sum.
    """
    x = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    low, high = np.quantile(x[draws].mean(axis=1), (0.025, 0.975))
    mean = sum(values) / len(values)
    return min(float(low), mean), max(float(high), mean)


def smallest_difference(n: int, variance: float) -> float:
    """The difference that n problems show at 5 % in four cases of five, by the variance of a problem's own difference.

    Where no problem differed, the variance is taken at its 95 % upper bound, 3 / n.
    """
    return (Z95 + Z80) * math.sqrt((variance or min(1.0, 3 / n)) / n)
