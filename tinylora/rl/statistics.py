"""Intervals for accuracies: Wilson for one, Newcombe's for the difference of two on the same problems.

Sources: Wilson 1927; Newcombe, Statistics in Medicine 17 (1998) 2635, method 10. Both stay honest near 0 and 1, where the
usual normal interval does not.
"""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def standard_error(verdicts: Sequence[bool]) -> float:
    """sqrt(p (1 - p) / n)."""
    p = sum(verdicts) / len(verdicts)
    return math.sqrt(p * (1 - p) / len(verdicts))


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The 95 % interval of right / n."""
    p = right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


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
    return difference, difference - low, difference + high
