"""The intervals against published worked values, against their defining equations, and by simulated coverage."""

import math
import random

import pytest

from tinylora.evaluation.statistics import (
    Z80,
    Z95,
    bootstrap,
    mcnemar,
    paired_difference,
    pass_at_k,
    smallest_difference,
    standard_error,
    wilson,
)
from tinylora.studies.results import count_to_reach, counts_to_reach


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


@pytest.mark.parametrize("z", [Z95, 1.0])
def test_wilson_contains_its_share(z: float) -> None:
    """Exactly, at none and all of every n, and at every share of small n: a bar of a figure has no negative length."""
    cases = [(right, n) for n in range(1, 2001) for right in (0, n)]
    cases += [(right, n) for n in range(1, 200) for right in range(n + 1)]
    for right, n in cases:
        low, high = wilson(right, n, z)
        assert 0 <= low <= right / n <= high <= 1 and low < high, (right, n)
        assert (low == 0) == (right == 0) and (high == 1) == (right == n), (right, n)


def test_other_intervals_contain_what_they_are_of() -> None:
    for n in range(1, 200):
        for counts in ((0, n, 0, 0), (0, 0, n, 0), (n, 0, 0, 0), (0, 0, 0, n), (n, 1, 0, 0), (0, 0, 1, n)):
            difference, low, high = paired_difference(*verdicts(*counts))
            assert -1 <= low <= difference <= high <= 1, counts
        for value in (0.1, 0.7, 1 / 3):
            low, high = bootstrap([value] * n, resamples=100)
            assert low <= sum([value] * n) / n <= high, (n, value)


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


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (6, 1, 2 * 8 / 128), (5, 5, 1.0), (10, 2, 2 * 79 / 4096)],
)
def test_mcnemar_is_the_binomial_test(gained: int, lost: int, p: float) -> None:
    """The problems that stayed as they were do not matter."""
    for same in (0, 50):
        assert abs(mcnemar(*verdicts(same, gained, lost, same)) - p) < 1e-12


def test_mcnemar_keeps_its_level() -> None:
    """Where nothing changed in truth, p <= 0.05 comes in at most 5 % of cases: 2,000 trials, standard error 0.005."""
    random_, trials = random.Random(0), 2000
    rejected = 0
    for _ in range(trials):
        gained = sum(random_.random() < 0.5 for _ in range(30))
        rejected += mcnemar(*verdicts(100, gained, 30 - gained, 20)) <= 0.05
    assert 0.01 < rejected / trials <= 0.065


@pytest.mark.parametrize(
    ("right", "n", "k", "chance"), [(0, 8, 4, 0.0), (8, 8, 1, 1.0), (2, 8, 1, 0.25), (1, 4, 2, 0.5), (5, 8, 4, 1.0)]
)
def test_pass_at_k(right: int, n: int, k: int, chance: float) -> None:
    assert abs(pass_at_k(right, n, k) - chance) < 1e-12


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over draws of n = 8 is the chance itself, 1 - (1 - p)^4; 1 - (1 - right/n)^4 would be 0.04 off."""
    random_, p, trials = random.Random(0), 0.2, 20_000
    rights = [sum(random_.random() < p for _ in range(8)) for _ in range(trials)]
    truth, sd = 1 - (1 - p) ** 4, 0.35
    assert abs(sum(pass_at_k(right, 8, 4) for right in rights) / trials - truth) < 4 * sd / math.sqrt(trials)
    assert abs(sum(1 - (1 - right / 8) ** 4 for right in rights) / trials - truth) > 0.02


def test_bootstrap_is_repeatable_and_narrows_as_it_should() -> None:
    values = [0.0, 0.25, 0.5, 1.0] * 50
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    low, high = bootstrap(values)
    sd = math.sqrt(sum((v - 0.4375) ** 2 for v in values) / len(values))
    # the width is that of the normal interval, within the noise of 4,000 resamples (standard error of a quantile: 4 %)
    assert abs((high - low) / (2 * Z95 * sd / math.sqrt(len(values))) - 1) < 0.12
    assert bootstrap([1.0] * 30) == (1.0, 1.0)


def test_coverage_of_the_bootstrap() -> None:
    """avg@4 gains over 200 problems of unequal difficulty: 600 trials, standard error 0.009 around 0.95."""
    random_, trials, covered, truth = random.Random(0), 600, 0, 0.1
    for trial in range(trials):
        changes = []
        for _ in range(200):
            p = random_.choice((0.1, 0.4, 0.7))
            before = sum(random_.random() < p for _ in range(4))
            after = sum(random_.random() < p + truth for _ in range(4))
            changes.append((after - before) / 4)
        low, high = bootstrap(changes, resamples=800, seed=trial)
        covered += low <= truth <= high
    assert 0.92 <= covered / trials <= 0.975


def test_the_smallest_difference_is_seen_in_four_cases_of_five() -> None:
    """A gain of that size over 500 problems, a tenth of which change: McNemar's test finds it in about 80 % of 1,500 trials
    (standard error 0.01; the exact test is a little conservative)."""
    n, changing = 500, 0.1
    gain = smallest_difference(n, changing - 0.04**2)
    assert abs(gain - (Z95 + Z80) * math.sqrt(0.0984 / n)) < 1e-12 and 0.039 < gain < 0.040
    random_, found, trials = random.Random(0), 0, 1500
    up = (changing + gain) / 2
    for _ in range(trials):
        draws = [random_.random() for _ in range(n)]
        gained, lost = sum(d < up for d in draws), sum(up <= d < changing for d in draws)
        found += mcnemar(*verdicts(n - gained - lost, gained, lost, 0)) <= 0.05
    assert 0.72 <= found / trials <= 0.85


def test_the_smallest_difference_where_nothing_changed() -> None:
    """Three in n is the 95 % upper bound of a share that was seen in none; it never falls to zero."""
    assert smallest_difference(300, 0.0) == smallest_difference(300, 0.01) > 0
    assert smallest_difference(2, 0.0) == smallest_difference(2, 1.0)


def test_z80_is_the_normal_quantile() -> None:
    assert abs(0.5 * (1 + math.erf(Z80 / math.sqrt(2))) - 0.8) < 1e-15


@pytest.mark.parametrize(("level", "count"), [(0.4, 2), (0.6, 4), (0.7, 8), (0.8, 16), (0.2, 1), (0.1, 1), (0.81, math.inf)])
def test_count_to_reach(level: float, count: float) -> None:
    """Halfway between two counts is their geometric mean."""
    assert math.isclose(count_to_reach([1, 4, 16], [0.2, 0.6, 0.8], level), count)
    assert math.isclose(count_to_reach([1, 4, 16, 64], [0.2, 0.6, 0.8, 0.3], level), count), "the first that reaches it"


def test_counts_to_reach_share_their_seeds() -> None:
    """A series that needs four times the numbers at every seed: the counts are uncertain, the ratio is not."""
    seeds = [-0.2, -0.1, 0.0, 0.1, 0.2]
    first = [[0.3 + 0.1 * math.log2(n) + e for n in (1, 4, 16, 64)] for e in seeds]
    fourfold = [[0.3 + 0.1 * math.log2(n / 4) + e for n in (1, 4, 16, 64)] for e in seeds]
    never = [[0.1, 0.1, 0.1, 0.1] for _ in seeds]
    (one, same), (four, ratio), (none, without) = counts_to_reach([[1, 4, 16, 64]] * 3, [first, fourfold, never], 0.5)
    assert same == (1.0, 1.0, 1.0) and math.isclose(one[0], 4) and math.isclose(four[0], 16)
    assert one[1] < 3 and one[2] > 5 and all(math.isclose(r, 4) for r in ratio)
    assert none == (math.inf,) * 3 and without == (math.inf,) * 3
    _, (_, neither) = counts_to_reach([[1, 4, 16, 64]] * 2, [never, never], 0.5)
    assert math.isnan(neither[0]) and neither[1:] == (0, math.inf)
