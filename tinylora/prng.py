"""Counter-based random numbers that are the same on every machine, device and library version.

splitmix64 (Steele, Lea and Flood 2014) hashes a 64-bit counter; there is no state to carry or restore. Normals use only
operations that IEEE 754 rounds exactly (+ - * / sqrt), so their bits do not depend on anybody's libm.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch wants."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MIX1, _MIX2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> on int64 keeps the sign; the mask makes it logical


def splitmix64(counter: Tensor) -> Tensor:
    """Hash of each int64 counter; the arithmetic wraps modulo 2^64. Same shape, int64."""
    x = counter * _GOLDEN + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def fold(*keys: int | Tensor) -> Tensor:
    """One int64 stream key out of several integers or broadcastable int64 tensors; the order matters."""
    state = torch.tensor(0)
    for key in keys:
        state = splitmix64(state ^ (key if isinstance(key, Tensor) else torch.tensor(_signed(key))))
    return state


def uniform(key: Tensor) -> Tensor:
    """A float64 in [0, 1) with 53 random bits for each int64 key. Same shape."""
    return _shift(splitmix64(key), 11).double() * 2.0**-53


def permutation(count: int, *keys: int) -> list[int]:
    """A permutation of range(count) that depends on `keys` alone."""
    hashes = splitmix64(fold(*keys) + torch.arange(count))
    return torch.argsort(hashes, stable=True).tolist()


def normal(shape: Sequence[int], *keys: int) -> Tensor:
    """Standard normals (float64) of `shape` from the stream named by `keys`, by Marsaglia's polar method.

    Candidate pair i uses counters 2i and 2i+1; accepted pairs are taken in order, so the stream has a fixed start and any
    length.
    """
    count, key = math.prod(shape), fold(*keys)
    pairs = math.ceil(count / 2)
    candidates = 2 * pairs + 64  # pi/4 of them are accepted
    while True:
        points = 2 * uniform(key + torch.arange(2 * candidates)).view(candidates, 2) - 1
        square = (points * points).sum(1)
        accepted = (square > 0) & (square < 1)
        if int(accepted.sum()) >= pairs:
            break
        candidates *= 2
    points, square = points[accepted][:pairs], square[accepted][:pairs]
    return (points * (-2 * _log(square) / square).sqrt()[:, None]).flatten()[:count].view(*shape)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive float64 numbers from exactly rounded operations: 2 atanh((m-1)/(m+1)) + e ln 2."""
    mantissa, exponent = torch.frexp(x)  # m in [0.5, 1): |w| <= 1/3, and 18 terms leave 1e-18
    w = (mantissa - 1) / (mantissa + 1)
    square, total = w * w, torch.zeros_like(w)
    for k in range(17, -1, -1):
        total = total * square + 1 / (2 * k + 1)
    return 2 * w * total + exponent.double() * math.log(2)
