"""The counter-based generator against the same arithmetic in Python's own integers and floats."""

import math
from collections.abc import Iterator

import pytest
import torch

from tinylora import prng

MASK = (1 << 64) - 1


def splitmix(counter: int) -> int:
    """Output number `counter` of Vigna's splitmix64.c seeded with 0, unsigned."""
    z = (counter + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def folded(*keys: int) -> int:
    state = 0
    for key in keys:
        state = splitmix(state ^ key & MASK)
    return state


def unit(key: int) -> float:
    return (splitmix(key) >> 11) / (1 << 53)


def polar(key: int) -> Iterator[float]:
    """Marsaglia's polar method with math.log."""
    counter = key
    while True:
        a, b = 2 * unit(counter) - 1, 2 * unit(counter + 1) - 1
        counter += 2
        square = a * a + b * b
        if 0 < square < 1:
            factor = math.sqrt(-2 * math.log(square) / square)
            yield a * factor
            yield b * factor


def unsigned(x: torch.Tensor) -> list[int]:
    return [value & MASK for value in x.tolist()]


def test_splitmix64_golden_values() -> None:
    """The first outputs for seed 0, as printed by the reference implementation."""
    found = unsigned(prng.splitmix64(torch.arange(5)))
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]


def test_splitmix64_equals_integer_arithmetic_everywhere() -> None:
    """Also where a counter or a product has the sign bit set, which int64 would shift in from the left."""
    counters = [0, 1, 2, 12345, 2**31, 2**32 + 7, 2**62, 2**63 - 1, -1, -2, -(2**63), -(2**62) - 5, 0x0123456789ABCDEF]
    assert unsigned(prng.splitmix64(torch.tensor(counters))) == [splitmix(c) for c in counters]
    shaped = prng.splitmix64(torch.tensor(counters[:12]).view(3, 4))
    assert shaped.dtype == torch.int64 and unsigned(shaped.flatten()) == [splitmix(c) for c in counters[:12]]


@pytest.mark.parametrize("keys", [(), (0,), (1, 2), (2, 1), (0, 0), (-1,), (2**64 - 1,), (2**63, 5, 6)])
def test_fold_equals_integer_arithmetic(keys: tuple[int, ...]) -> None:
    assert unsigned(prng.fold(*keys).view(1)) == [folded(*keys)]


def test_fold_of_tensors_is_the_fold_of_their_entries() -> None:
    """A rollout folds a seed, its sequences and their positions into one key each."""
    sequences, positions = torch.arange(3)[:, None], torch.arange(4)
    keys = prng.fold(7, sequences, positions)
    assert keys.shape == (3, 4)
    assert unsigned(keys.flatten()) == [folded(7, s, p) for s in range(3) for p in range(4)]


def test_different_keys_give_different_streams() -> None:
    """Order, value and number of the keys all matter, and no stream runs into another."""
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (-1,), (2,), (0, 0, 0), (2**40,)]
    streams = [tuple(prng.normal((4,), *k).tolist()) for k in keys]
    assert len({value for stream in streams for value in stream}) == 4 * len(keys)


def test_uniform_is_uniform() -> None:
    n = 200_000
    x = prng.uniform(prng.fold(3) + torch.arange(n))
    assert x.dtype == torch.float64 and x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(x.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / n)  # fourth central moment 1/80
    # 53 bits: half of all values need the last one
    odd = (x * 2.0**53).long() % 2
    assert abs(odd.double().mean() - 0.5) < 5 * math.sqrt(0.25 / n)
    # neighbours in the stream, and streams of neighbouring keys, do not correlate
    other = prng.uniform(prng.fold(4) + torch.arange(n))
    for a, b in ((x[1:], x[:-1]), (x, other)):
        assert abs(((a - 0.5) * (b - 0.5)).mean()) < 5 / 12 / math.sqrt(n)


def test_uniform_stays_below_one_at_the_largest_hash() -> None:
    """The largest of 53 bits maps to 1 - 2^-53; the hash is inverted here to reach it."""

    def unshift(z: int, bits: int) -> int:
        x = z
        for _ in range(64 // bits):
            x = z ^ x >> bits
        return x

    z = unshift(MASK, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    counter = (unshift(z, 30) * pow(0x9E3779B97F4A7C15, -1, 1 << 64) - 1) & MASK
    assert splitmix(counter) == MASK
    assert prng.uniform(torch.tensor(counter - (1 << 64) if counter >> 63 else counter)).item() == 1 - 2.0**-53


def test_normal_is_normal() -> None:
    n = 200_000
    x = prng.normal((n,), 5)
    assert x.dtype == torch.float64
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(x.pow(3).mean()) < 5 * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)  # E x^8 - 9 = 96
    assert abs((x[0::2] * x[1::2]).mean()) < 5 / math.sqrt(n / 2)  # the two of a pair are independent


@pytest.mark.parametrize("keys", [(0,), (1, 2), (123, -4, 5)])
def test_normal_equals_the_same_method_with_math_log(keys: tuple[int, ...]) -> None:
    found, stream = prng.normal((3000,), *keys).tolist(), polar(folded(*keys))
    worst = max(abs(x - next(stream)) / abs(x) for x in found)
    assert worst < 1e-14


def test_log_equals_math_log() -> None:
    """Near 1, where the result is small, and over all exponents that a square of uniforms can have."""
    x = [1 - 2.0**-53, 1 - 1e-9, 0.5, 0.75, 0.4999999, 1e-5, 1e-30, 2.0**-104, 0.9999, 0.3678794411714423]
    for value, found in zip(x, prng._log(torch.tensor(x, dtype=torch.float64)).tolist(), strict=True):
        assert abs(found - math.log(value)) <= 1e-15 * abs(math.log(value))


def test_normals_do_not_depend_on_the_default_dtype() -> None:
    """A caller's torch.set_default_dtype must not change P."""
    expected = prng.normal((100,), 2)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(prng.normal((100,), 2), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 63, 64, 65, 500])
def test_a_shorter_draw_is_the_start_of_a_longer_one(count: int) -> None:
    assert torch.equal(prng.normal((count,), 9, 1), prng.normal((1000,), 9, 1)[:count])


def test_a_shape_only_folds_the_stream() -> None:
    assert torch.equal(prng.normal((3, 5, 2), 8), prng.normal((30,), 8).view(3, 5, 2))


def test_a_stream_with_too_few_accepted_pairs_draws_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never happens by chance, so the acceptance is made worse: the same stream must come out."""
    expected = prng.normal((200,), 11)
    uniform, drawn = prng.uniform, []

    def few_at_first(key: torch.Tensor) -> torch.Tensor:
        drawn.append(len(key))
        return uniform(key) if len(drawn) > 1 else torch.ones(len(key), dtype=torch.float64)

    monkeypatch.setattr(prng, "uniform", few_at_first)
    assert torch.equal(prng.normal((200,), 11), expected)
    assert drawn[1] == 2 * drawn[0]


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_permutation_is_a_permutation(count: int) -> None:
    assert sorted(prng.permutation(count, 3, 1)) == list(range(count))


def test_permutation_depends_on_each_key_and_on_nothing_else() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0), (1, 1, 1)]
    orders = {tuple(prng.permutation(50, *k)) for k in keys}
    assert len(orders) == len(keys)
    torch.manual_seed(1)
    assert tuple(prng.permutation(50, *keys[0])) in orders
    assert prng.permutation(50, 4, 2) == sorted(range(50), key=lambda i: signed(splitmix(folded(4, 2) + i)))


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def test_permutation_puts_every_item_everywhere() -> None:
    """5,000 permutations of 5 items: each of the 25 cells holds a fifth, within 5 standard errors."""
    n = 5000
    counts = torch.zeros(5, 5)
    for key in range(n):
        counts[torch.arange(5), torch.tensor(prng.permutation(5, key))] += 1
    assert (counts / n - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / n)
