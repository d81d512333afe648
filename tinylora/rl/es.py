"""Evolution strategies: training without a backward pass, because every row of a rollout may carry its own adapter.

    row i is rolled out with v + sigma eps_i      eps in pairs +eps, -eps on the same prompt
    g = -mean_i A_i eps_i / sigma                 the gradient that Adam descends

There are no log-probs to compare, no activations and no autograd: a step is a rollout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinylora import prng
from tinylora.rl.policy import adapter_of
from tinylora.rl.run import Run
from tinylora.rl.step import Clock, dead_groups, draw, finish, length_metrics, reward_metrics, roll_out, stacked

NOISE_STREAM = 0xE5  # names the stream of eps


def noise(v: Tensor, rows: int, seed: int, step: int) -> Tensor:
    """eps (rows, groups, u) in v's dtype: rows 2k and 2k + 1 are each other's negative."""
    half = prng.normal((rows // 2, *v.shape), NOISE_STREAM, seed, step).to(v)
    return torch.stack([half, -half], 1).flatten(0, 1)


@torch.no_grad()
def es_step(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One step of each run; returns their metrics rows."""
    clock, shares = Clock(), draw(runs)
    adapters = [adapter_of(s.run.policy) for s in shares]
    eps = [noise(a.v, s.count, s.run.config.seed, s.run.step) for s, a in zip(shares, adapters, strict=True)]
    each = [a.matrices(a.v + s.run.config.sigma * e) for s, a, e in zip(shares, adapters, eps, strict=True)]
    roll_out(shares, stacked(each), clock, own_rows=True)
    rows = []
    for s, adapter, e in zip(shares, adapters, eps, strict=True):
        advantages = s.advantages
        adapter.v.grad = -torch.einsum("i,igu->gu", advantages.values.to(e), e) / (len(e) * s.run.config.sigma)
        rows.append({**s.run.descend(), **reward_metrics(s), **dead_groups(advantages), **length_metrics(s)})
    clock.mark()
    return [finish(s, clock, row) for s, row in zip(shares, rows, strict=True)]
