"""The intervals against published worked values, against their defining equations, and by simulated coverage."""

import math
import random

import pytest

from tinylora.rl.statistics import Z95, paired_difference, standard_error, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right, n)
    assert abs(found[0] - low) < 6e-5 and abs(found[1] - high) < 6e-5


@pytest.mark.parametrize(("right", "n"), [(1, 3), (5, 10), (9, 10), (184, 200), (1213, 1319), (700, 1024), (29, 30)])
def test_wilson_ends_where_the_score_test_does(right: int, n: int) -> None:
    """By definition: at both ends the observed share is z standard errors away, those of the end."""
    for end, sign in zip(wilson(right, n), (1, -1), strict=True):
        assert abs((right / n - end) / math.sqrt(end * (1 - end) / n) - sign * Z95) < 1e-9
    assert wilson(right, n)[0] < right / n < wilson(right, n)[1]


@pytest.mark.parametrize("n", [1, 30, 1319])
def test_wilson_at_none_and_all(n: int) -> None:
    """It stays inside [0, 1], keeps a width, and right and wrong are mirror images."""
    low, high = wilson(0, n)
    assert abs(low) < 1e-15 and abs(high - Z95**2 / (n + Z95**2)) < 1e-15
    mirrored = wilson(n, n)
    assert abs(mirrored[0] - (1 - high)) < 1e-15 and abs(mirrored[1] - 1) < 1e-15


def test_z95_is_the_normal_quantile() -> None:
    assert abs(0.5 * (1 + math.erf(Z95 / math.sqrt(2))) - 0.975) < 1e-15


def test_other_levels() -> None:
    """z = 1: the score interval of one standard error."""
    low, high = wilson(8, 10, z=1.0)
    assert abs((0.8 - low) / math.sqrt(low * (1 - low) / 10) - 1) < 1e-9
    assert low > wilson(8, 10)[0] and high < wilson(8, 10)[1]


def test_standard_error() -> None:
    assert standard_error([True, True, True, False]) == math.sqrt(0.75 * 0.25 / 4)
    assert standard_error([True] * 5) == standard_error([False] * 5) == 0
    # GSM8K at 92 %: 0.75 points
    assert abs(standard_error([True] * 1213 + [False] * 106) - 0.0075) < 5e-5


def verdicts(both: int, only_after: int, only_before: int, neither: int) -> tuple[list[bool], list[bool]]:
    """(before, after) with these counts."""
    before = [True] * both + [False] * only_after + [True] * only_before + [False] * neither
    after = [True] * both + [True] * only_after + [False] * only_before + [False] * neither
    return before, after


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 2635, method 10
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((53, 0, 0, 1), -0.0729, 0.0729),
        ((0, 30, 0, 0), 0.8395, 1.0000),
        # Altman, Machin, Bryant and Gardner, Statistics with Confidence (2000), table 6.2
        ((14, 5, 0, 22), 0.011, 0.226),
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017), airway hyper-responsiveness
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_paired_difference_as_published(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    difference, *found = paired_difference(*verdicts(*counts))
    assert abs(difference - (counts[1] - counts[2]) / sum(counts)) < 1e-15
    rounding = 6e-5 if round(low, 3) != low else 6e-4
    assert abs(found[0] - low) < rounding and abs(found[1] - high) < rounding


def newcombe(both: int, only_after: int, only_before: int, neither: int) -> tuple[float, float]:
    """Method 10 from the paper's text: Wilson limits, and phi of the fourfold table with its continuity correction."""
    e, f, g, h = both, only_after, only_before, neither
    n = e + f + g + h

    def limits(right: int) -> tuple[float, float]:
        a, b, c = 2 * right + Z95**2, Z95 * math.sqrt(Z95**2 + 4 * right * (1 - right / n)), 2 * (n + Z95**2)
        return (a - b) / c, (a + b) / c

    margins = (e + f) * (g + h) * (e + g) * (f + h)
    phi = 0.0
    if margins:
        excess = e * h - f * g
        phi = (excess if excess <= 0 else max(excess - n / 2, 0)) / math.sqrt(margins)
    (l2, u2), (l3, u3) = limits(e + f), limits(e + g)
    p2, p3 = (e + f) / n, (e + g) / n
    delta = math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u3 - p3) + (u3 - p3) ** 2)
    epsilon = math.sqrt((u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p3 - l3) + (p3 - l3) ** 2)
    return p2 - p3 - delta, p2 - p3 + epsilon


def test_paired_difference_equals_a_direct_implementation() -> None:
    """On 300 random tables, small and with empty cells too."""
    random_ = random.Random(0)
    kinds = set()
    for _ in range(300):
        counts = [random_.choice([0, 1, 2, 5, 20, 100]) + random_.randrange(3) for _ in range(4)]
        if sum(counts) == 0:
            continue
        e, f, g, h = counts
        excess = e * h - f * g
        kinds.add("negative" if excess < 0 else "cut to zero" if excess <= sum(counts) / 2 else "positive")
        _, low, high = paired_difference(*verdicts(*counts))
        expected = newcombe(*counts)
        assert abs(low - expected[0]) < 1e-12 and abs(high - expected[1]) < 1e-12
    assert len(kinds) == 3


def test_paired_difference_turns_around() -> None:
    """Swapping before and after mirrors the interval; the order of the problems does not matter."""
    before, after = verdicts(40, 15, 5, 20)
    difference, low, high = paired_difference(before, after)
    mirrored = paired_difference(after, before)
    assert all(abs(x + y) < 1e-15 for x, y in zip(mirrored, (difference, high, low), strict=True))
    order = random.Random(1).sample(range(80), 80)
    assert paired_difference([before[i] for i in order], [after[i] for i in order]) == (difference, low, high)


def test_pairing_narrows_the_interval() -> None:
    """Agreement on most problems makes a small gain visible that two separate samples would not show."""
    _, low, high = paired_difference(*verdicts(60, 12, 2, 26))
    _, loose_low, loose_high = paired_difference(*verdicts(45, 27, 17, 11))  # the same margins, without correlation
    assert low > 0 > loose_low and high - low < 0.75 * (loose_high - loose_low)


def test_the_same_verdicts_twice() -> None:
    before, _ = verdicts(50, 0, 0, 50)
    difference, low, high = paired_difference(before, before)
    assert difference == 0 and -0.05 < low < 0 < high < 0.05


def test_verdicts_of_different_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        paired_difference([True, False], [True])


@pytest.mark.parametrize("p", [0.5, 0.92])
def test_coverage_of_wilson(p: float) -> None:
    """4,000 accuracies of 200 problems: standard error 0.0035, so 0.93 is 5 below 0.95 less its own ripple."""
    random_, n, trials = random.Random(0), 200, 4000
    covered = 0
    for _ in range(trials):
        low, high = wilson(sum(random_.random() < p for _ in range(n)), n)
        covered += low <= p <= high
    assert 0.93 <= covered / trials <= 0.97


@pytest.mark.parametrize(("p", "gain", "kept"), [(0.5, 0.0, 0.8), (0.5, 0.1, 0.8), (0.92, 0.0, 0.95), (0.92, 0.03, 0.99)])
def test_coverage_of_the_paired_difference(p: float, gain: float, kept: float) -> None:
    """`kept` of what was right stays right, and what was wrong improves as much as makes the gain."""
    gained = (p + gain - p * kept) / (1 - p)
    random_, n, trials = random.Random(0), 200, 2000
    covered = 0
    for _ in range(trials):
        before = [random_.random() < p for _ in range(n)]
        after = [random_.random() < (kept if right else gained) for right in before]
        _, low, high = paired_difference(before, after)
        covered += low <= gain <= high
    assert 0.93 <= covered / trials <= 0.98
