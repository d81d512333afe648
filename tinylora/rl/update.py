"""Update: score the step's live completions packed under a token budget, and accumulate the gradient of v.

A prompt is scored once for all its completions in a pack; they are its suffixes.

Completions of dead groups carry advantage 0: unless a KL term needs them they never enter the forward, and the gradient is
the same to the last bit of the arithmetic. The rollout's own log-probs are compared with the update's on every token.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinylora.adapter import Adapter
from tinylora.errors import InputError
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.decoder import Matrices
from tinylora.rl.advantages import Advantages
from tinylora.rl.config import TrainConfig
from tinylora.rl.loss import grpo_loss, token_weights
from tinylora.rl.memory import MemoryPlan
from tinylora.rl.rollout import Completion


@dataclass
class Batch:
    """A step's completions, prompt after prompt."""

    prompts: Sequence[Sequence[int]]  # token ids of each completion's prompt
    completions: Sequence[Completion]
    advantages: Advantages
    old_logps: dict[int, Tensor] = field(default_factory=dict)  # by completion: the first iteration's, for later ones


def update(adapter: Adapter, batch: Batch, config: TrainConfig, plan: MemoryPlan) -> dict[str, float | None]:
    """Add the gradient of the step's loss to adapter.v.grad; returns the metrics of its tokens, None where it had none.

    Without live completions there is no forward and the gradient is zero. Where memory runs out, the plan's microbatches
    are halved and the rest goes on with those; InputError where one completion alone is too much.
    """
    lengths = [len(c.tokens) for c in batch.completions]
    if config.mask_truncated_completions:
        lengths = [n if c.finished else 0 for n, c in zip(lengths, batch.completions, strict=True)]
    used = [i for i, n in enumerate(lengths) if n and (config.beta > 0 or batch.advantages.live[i])]
    if adapter.v.grad is None:
        adapter.v.grad = torch.zeros_like(adapter.v)
    stats, total = _Stats(), _Totals(lengths, sum(lengths))
    parts = _microbatches(used, batch, plan.microbatch_tokens)
    while parts:
        before = adapter.v.grad.clone()
        try:
            with deterministic(adapter.model.device):
                _microbatch(adapter, batch, parts[0], config, total, stats)
        except torch.OutOfMemoryError:
            adapter.v.grad = before
            if len(parts[0]) == 1:
                raise InputError(
                    f"one completion of {lengths[parts[0][0]]} tokens is too much for the update's memory; "
                    "lower --max-completion-length"
                ) from None
            plan.microbatch_tokens //= 2
            tqdm.write(f"out of memory in the update: on with microbatches of {plan.microbatch_tokens} tokens")
            parts = _microbatches([i for part in parts for i in part], batch, plan.microbatch_tokens)
        else:
            parts.pop(0)
    return stats.metrics(config)


@dataclass
class _Totals:
    """Loss tokens of each completion of the step, and of all."""

    lengths: list[int]
    tokens: int


def _microbatch(adapter: Adapter, batch: Batch, part: list[int], config: TrainConfig, total: _Totals, stats: "_Stats") -> None:
    """Forward and backward of some completions."""
    counts = torch.tensor([total.lengths[i] for i in part])
    matrices = adapter.matrices()
    logp, entropy = score(adapter, matrices, batch.prompts, batch.completions, part, config.temperature)
    sampled = torch.tensor([x for i in part for x in batch.completions[i].logprobs], dtype=logp.dtype, device=logp.device)
    old = torch.cat([batch.old_logps[i] for i in part]) if part[0] in batch.old_logps else logp.detach()
    ref = None
    if config.beta > 0:
        with torch.no_grad():  # the adapter off: same weights, M = 0
            off = [None if m is None else torch.zeros_like(m) for m in matrices]
            ref, _ = score(adapter, off, batch.prompts, batch.completions, part, config.temperature)
    weights = token_weights(counts, config.loss_type, len(total.lengths), total.tokens, config.max_completion_length)
    terms = grpo_loss(
        logp,
        old,
        sampled if config.importance_sampling_cap > 0 else None,
        ref,
        batch.advantages.values[part].repeat_interleave(counts).to(logp),
        weights.to(logp),
        config.epsilon,
        config.epsilon if config.epsilon_high is None else config.epsilon_high,
        config.beta,
        config.importance_sampling_cap,
    )
    terms.loss.sum().backward()
    if config.num_iterations > 1:
        batch.old_logps.update(zip(part, old.split(counts.tolist()), strict=True))
    stats.add(
        loss=terms.loss.detach().sum(),
        entropy=entropy,
        difference=(logp.detach() - sampled).abs(),
        importance=(old - sampled).exp().clamp_max(config.importance_sampling_cap or math.inf),
        low=terms.clipped_low,
        high=terms.clipped_high,
        kl=terms.kl,
    )


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU the library's attention adds its gradients in a fixed order only where it is told to."""
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # or every allocation costs a pass over it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


def _microbatches(used: list[int], batch: Batch, budget: int) -> list[list[int]]:
    """Completions, prompt after prompt, cut so that each part stays within `budget` tokens with its prompts counted once.
    A completion that exceeds it alone is a part of its own."""
    parts: list[list[int]] = []
    size, prompt = 0, None
    for i in used:
        own = len(batch.completions[i].tokens) - 1
        new = own + (len(batch.prompts[i]) if batch.prompts[i] != prompt else 0)
        if not parts or size + new > budget:
            parts.append([])
            size, new = 0, own + len(batch.prompts[i])
        parts[-1].append(i)
        size, prompt = size + new, batch.prompts[i]
    return parts


def score(
    adapter: Adapter,
    matrices: Matrices | None,
    prompts: Sequence[Sequence[int]],  # of each completion
    completions: Sequence[Completion],
    part: Sequence[int],  # the completions to score, by number
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the completions' tokens, one after another, (tokens,) each; each prompt is packed once."""
    model = adapter.model
    distinct = list(dict.fromkeys(tuple(prompts[i]) for i in part))
    number = {p: n for n, p in enumerate(distinct)}
    ends = dict(zip(distinct, itertools.accumulate(map(len, distinct)), strict=True))
    tokens = [t for p in distinct for t in p]
    lengths, prefixes = [len(p) for p in distinct], []
    targets: list[int] = []
    rows: list[int] = []  # of the hidden states that predict the targets
    for i in part:
        prompt, completion = tuple(prompts[i]), completions[i].tokens
        rows += [ends[prompt] - 1, *range(len(tokens), len(tokens) + len(completion) - 1)]
        targets += completion
        if len(completion) > 1:  # the last token is predicted and predicts nothing
            tokens += completion[:-1]
            lengths.append(len(completion) - 1)
            prefixes.append(number[prompt])
    hidden = model.packed(torch.tensor(tokens, device=model.device), lengths, matrices, prefixes=prefixes)
    hidden = hidden.index_select(0, torch.tensor(rows, device=model.device))
    return token_logprobs(hidden, model.head, torch.tensor(targets, device=model.device), temperature)


class _Stats:
    """Token metrics over the microbatches of a step."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Tensor]] = {}

    def add(self, **columns: Tensor | None) -> None:
        for name, column in columns.items():
            if column is not None:
                self.columns.setdefault(name, []).append(column.detach().double().reshape(-1).cpu())

    def metrics(self, config: TrainConfig) -> dict[str, float | None]:
        def of(name: str, reduction: str) -> float | None:
            column = torch.cat(self.columns.get(name, [torch.zeros(0)]))
            return getattr(column, reduction)().item() if len(column) else None

        metrics = {
            "loss": of("loss", "sum") or 0.0,
            "entropy": of("entropy", "mean"),
            "clip_ratio/low_mean": of("low", "mean"),
            "clip_ratio/high_mean": of("high", "mean"),
            "sampling/sampling_logp_difference/mean": of("difference", "mean"),
            "sampling/sampling_logp_difference/max": of("difference", "max"),
            "sampling/importance_sampling_ratio/min": of("importance", "min"),
            "sampling/importance_sampling_ratio/mean": of("importance", "mean"),
            "sampling/importance_sampling_ratio/max": of("importance", "max"),
        }
        return metrics | ({"kl": of("kl", "mean")} if config.beta > 0 else {})
