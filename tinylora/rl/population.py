"""Several runs on one base at once: their rollouts go through the engine together, one adapter a row.

A member's completions, rewards and updates are those of its run alone: sampling depends on its own seed and sequence numbers,
and which rows share a batch changes nothing. Only the decode steps are shared, and those are what small batches waste.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from tinylora.errors import InputError
from tinylora.model import load_model
from tinylora.rl.config import TrainConfig, flag
from tinylora.rl.rollout import Completion, rollout
from tinylora.rl.trainer import Request, Trainer

# What the rows of one rollout have in common: the base, its factors, and how tokens are drawn. The rest is each member's own.
SHARED = ("model", "device", "dtype", "dataset", "data", "prompt_style", "r", "target_modules", "basis", "algorithm", "exact",
          "num_generations", "max_completion_length", "temperature", "top_p", "top_k")  # fmt: skip


def train_population(configs: Sequence[TrainConfig]) -> list[Path]:
    """Train a run for each config, as `Trainer(config).train()` would one by one; returns their directories.

    InputError where configs differ in a SHARED setting, or one alone would be refused.
    """
    for name in SHARED:
        values = list(dict.fromkeys(getattr(c, name) for c in configs))
        if len(values) > 1:
            raise InputError(f"{flag(name)} {values[0]} and {values[1]}: runs that train together must have the same")
    model = load_model(configs[0].model, configs[0].device, configs[0].dtype)
    trainers = [Trainer(config, model) for config in configs]
    for trainer in trainers:
        trainer.evaluate_if_due()
    progress = tqdm(total=max(t.max_steps for t in trainers), desc=f"train {len(trainers)} runs", unit="step")
    while running := [t for t in trainers if t.step < t.max_steps and not t.dead]:
        requests = [t.request() for t in running]
        began = time.perf_counter()
        completions = rollout_together(running, requests)
        rollout_time = time.perf_counter() - began
        for trainer, request, own in zip(running, requests, completions, strict=True):
            request.began = time.perf_counter() - rollout_time  # the clock of a step does not count the others' updates
            trainer.keep(trainer.learn(request, own))
            trainer.evaluate_if_due()
        progress.update()
    progress.close()
    for trainer in trainers:
        trainer.finish()
    return [t.run_directory.path for t in trainers]


def rollout_together(trainers: Sequence[Trainer], requests: Sequence[Request]) -> list[list[Completion]]:
    """The completions of every member's request, from one rollout."""
    generations = requests[0].generations
    adapter, first_sequence, seeds, starts = [], [], [], [0]
    adapters = 0
    for r in requests:
        adapter += [adapters + (r.row_adapter[i] if r.row_adapter else 0) for i in range(len(r.prompts))]
        adapters += max(r.row_adapter or [0]) + 1
        first_sequence += [r.first_sequence + i * generations for i in range(len(r.prompts))]
        seeds += [r.sampling.seed] * len(r.prompts)
        starts.append(starts[-1] + len(r.prompts) * generations)
    listeners = [t.early_grading(r) for t, r in zip(trainers, requests, strict=True)]
    done = rollout(
        trainers[0].model,
        [None if parts[0] is None else torch.cat(parts) for parts in zip(*(r.matrices for r in requests), strict=True)],
        [p for r in requests for p in r.prompts],
        generations,
        requests[0].sampling,
        first_sequence,
        adapter,
        seeds=seeds,
        cache_bytes=min(sum(t.plan.cache for t in trainers), trainers[0].plan.free // 2),
        expected=[e for r in requests for e in r.expected],
        on_completion=_dispatch(listeners, starts),
    )
    return [done[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def _dispatch(
    listeners: Sequence[Callable[[int, Completion], None] | None], starts: Sequence[int]
) -> Callable[[int, Completion], None] | None:
    """One listener that hands each member its own completions, by the member's numbers."""
    if not any(listeners):
        return None

    def take(i: int, completion: Completion) -> None:
        member = next(m for m in range(len(listeners)) if i < starts[m + 1])
        listener = listeners[member]
        if listener is not None:
            listener(i - starts[member], completion)

    return take
