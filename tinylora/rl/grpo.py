"""GRPO: a rollout, advantages of each prompt's group, and the optimizer's steps on the group-relative loss."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from tinylora.rl.consistency import measured_rounding, require_own_adapter, require_same_policy
from tinylora.rl.dead import explain_dead
from tinylora.rl.run import Run
from tinylora.rl.step import Clock, dead_groups, draw, finish, length_metrics, reward_metrics, roll_out, stacked
from tinylora.rl.update import Batch, update


def grpo_step(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One step of each run; returns their metrics rows."""
    clock, shares = Clock(), draw(runs)
    if runs[0].rounding is None and runs[0].config.method != "full":
        t, plan = runs[0], runs[0].plan
        what = (t.policy, shares[0].prompts, t.config.num_generations, t.sampling())
        found = measured_rounding(*what, plan.cache, plan.microbatch_tokens)
        for t in runs:
            t.rounding = found
    with torch.no_grad():
        matrices = stacked([t.policy.matrices() for t in runs])
    roll_out(shares, matrices, clock)
    advantages = [s.advantages for s in shares]
    for s, a in zip(shares, advantages, strict=True):
        if s.run.step == 0 and a.zero_std == 1:
            tqdm.write(explain_dead(s))
    batches = [Batch(s.repeated(), s.completions, a) for s, a in zip(shares, advantages, strict=True)]
    first = [_descend(s.run, b) for s, b in zip(shares, batches, strict=True)]
    clock.mark()
    return [
        finish(s, clock, {**m, **reward_metrics(s), **dead_groups(a), **length_metrics(s)})
        for s, m, a in zip(shares, first, advantages, strict=True)
    ]


def _descend(t: Run, batch: Batch) -> dict[str, Any]:
    """A run's optimizer steps on its batch; the metrics of the first."""
    first: dict[str, Any] = {}
    with torch.no_grad():
        reference = t.matrices_before() if t.config.kl_reference == "initial" else None
    for iteration in range(t.config.num_iterations):
        t.optimizer.zero_grad(set_to_none=True)
        metrics = update(t.policy, batch, t.config, t.plan, reference)
        if iteration == 0:
            mean, largest = (metrics[f"sampling/sampling_logp_difference/{x}"] for x in ("mean", "max"))
            require_same_policy(mean, largest, t.model.weight_dtype, t.config.exact, t.step + 1)
            if t.rounding is not None:
                few = (t.policy, batch, t.config.temperature, t.plan.microbatch_tokens)
                size = require_own_adapter(*few, mean, t.rounding, t.step + 1)
                metrics["sampling/base_logp_difference/mean"] = size
        norm = t.descend()
        first = first or {**metrics, **norm}
    return first
