"""Update: score the step's live completions packed under a token budget, and accumulate the gradient of what is trained.

A prompt is scored once for all its completions in a pack; they are its suffixes.

Completions of dead groups carry advantage 0: unless a KL term needs them they never enter the forward, and the gradient is
the same to the last bit of the arithmetic. The rollout's own log-probs are compared with the update's on every token.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinylora.adapter import Adapter
from tinylora.errors import InputError
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.decoder import Decoder, Matrices
from tinylora.rl.advantages import Advantages
from tinylora.rl.baselines import Baseline
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


Policy = Adapter | Baseline


def update(policy: Policy, batch: Batch, config: TrainConfig, plan: MemoryPlan) -> dict[str, float | None]:
    """`update_together` of one policy."""
    return update_together([policy], [batch], config, plan)[0]


def update_together(
    policies: Sequence[Policy], batches: Sequence[Batch], config: TrainConfig, plan: MemoryPlan
) -> list[dict[str, float | None]]:
    """Add the gradient of each policy's loss on its own batch to its parameters; returns the metrics of its tokens, None
    where it had none. Several policies are adapters of one model with one `config` but for seeds and learning rates.

    Without live completions there is no forward and the gradient is zero.
    """
    s = Sequences.of([(b.prompts, b.completions) for b in batches])
    lengths = [len(c.tokens) for c in s.completions]
    if config.mask_truncated_completions:
        lengths = [n if c.finished else 0 for n, c in zip(lengths, s.completions, strict=True)]
    live = [bool(x) for b in batches for x in b.advantages.live]
    advantages = torch.cat([b.advantages.values for b in batches])  # (completions,)
    used = [i for i, n in enumerate(lengths) if n and (config.beta > 0 or live[i])]
    stats = [_Stats() for _ in policies]
    totals = [sum(n for n, own in zip(lengths, s.owners, strict=True) if own == p) for p in range(len(policies))]

    def loss(part: list[int]) -> tuple[Tensor, Callable[[], None]]:
        logp, entropy = policy_score(policies, s, part, config.temperature)  # (tokens,) each
        counts = torch.tensor([lengths[i] for i in part])
        sampled = torch.tensor([x for i in part for x in s.completions[i].logprobs], dtype=logp.dtype, device=logp.device)
        known = [batches[s.owners[i]].old_logps.get(s.places[i]) for i in part]
        old = torch.cat([x for x in known if x is not None]) if known[0] is not None else logp.detach()
        ref = None
        if config.beta > 0:
            with torch.no_grad():
                ref, _ = policy_score(policies, s, part, config.temperature, off=True)
        owned = [(p, list(own)) for p, own in itertools.groupby(part, key=lambda i: s.owners[i])]
        weights = []
        for p, own in owned:
            each = torch.tensor([lengths[i] for i in own])
            count = len(batches[p].completions)
            weights.append(token_weights(each, config.loss_type, count, totals[p], config.max_completion_length))
        terms = grpo_loss(
            logp,
            old,
            sampled if config.importance_sampling_cap > 0 else None,
            ref,
            advantages[part].repeat_interleave(counts).to(logp),
            torch.cat(weights).to(logp),
            config.epsilon,
            config.epsilon if config.epsilon_high is None else config.epsilon_high,
            config.beta,
            config.importance_sampling_cap,
        )

        def done() -> None:
            if config.num_iterations > 1:
                for i, x in zip(part, old.split(counts.tolist()), strict=True):
                    batches[s.owners[i]].old_logps[s.places[i]] = x
            columns = {
                "loss": terms.loss,
                "entropy": entropy,
                "difference": (logp.detach() - sampled).abs(),
                "importance": (old - sampled).exp().clamp_max(config.importance_sampling_cap or math.inf),
                "low": terms.clipped_low,
                "high": terms.clipped_high,
                "kl": terms.kl,
            }
            start = 0
            for p, own in owned:
                end = start + sum(lengths[i] for i in own)
                stats[p].add(**{name: None if x is None else x[start:end] for name, x in columns.items()})
                start = end

        return terms.loss.sum(), done

    accumulate(policies, s, used, plan, loss)
    return [x.metrics(config) for x in stats]


@dataclass
class Sequences:
    """Prompts and completions of all policies, numbered through."""

    prompts: list[Sequence[int]]  # of each completion
    completions: list[Completion]
    owners: list[int]  # the policy of each, ascending
    places: list[int]  # its number within its policy's own

    @staticmethod
    def of(parts: Sequence[tuple[Sequence[Sequence[int]], Sequence[Completion]]]) -> "Sequences":
        """Of each policy's prompts and completions."""
        prompts = [x for p, _ in parts for x in p]
        sizes = [len(c) for _, c in parts]
        owners = [p for p, n in enumerate(sizes) for _ in range(n)]
        return Sequences(prompts, [x for _, c in parts for x in c], owners, [i for n in sizes for i in range(n)])


def accumulate(
    policies: Sequence[Policy],
    s: Sequences,
    used: Sequence[int],
    plan: MemoryPlan,
    loss: Callable[[list[int]], tuple[Tensor, Callable[[], None]]],
) -> None:
    """Forward and backward of the `used` sequences, part by part. loss(part) gives the part's loss, summable over parts, and
    what to do once its gradient is in.

    Where memory runs out, the plan's microbatches are halved and the rest goes on with those; InputError where one completion
    alone is too much.
    """
    parameters = [x for p in policies for x in p.named_parameters().values()]
    for x in parameters:
        if x.grad is None:
            x.grad = torch.zeros_like(x)
    parts = _microbatches(used, s, plan.microbatch_tokens)
    while parts:
        before = [x.grad.clone() for x in parameters if x.grad is not None]
        try:
            with deterministic(policies[0].model.device):
                value, done = loss(parts[0])
                value.backward()
        except torch.OutOfMemoryError:
            for x, grad in zip(parameters, before, strict=True):
                x.grad = grad
            if len(parts[0]) == 1:
                raise InputError(
                    f"one completion of {len(s.completions[parts[0][0]].tokens)} tokens is too much for the update's memory; "
                    "lower --max-completion-length"
                ) from None
            plan.microbatch_tokens //= 2
            tqdm.write(f"out of memory in the update: on with microbatches of {plan.microbatch_tokens} tokens")
            parts = _microbatches([i for part in parts for i in part], s, plan.microbatch_tokens)
        else:
            done()
            parts.pop(0)


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


def _microbatches(used: Sequence[int], s: Sequences, budget: int) -> list[list[int]]:
    """Completions, prompt after prompt, cut so that each part stays within `budget` tokens with its prompts counted once.
    A completion that exceeds it alone is a part of its own."""
    parts: list[list[int]] = []
    size, prompt = 0, None
    for i in used:
        own, its = len(s.completions[i].tokens) - 1, (s.owners[i], s.prompts[i])
        new = own + (len(s.prompts[i]) if its != prompt else 0)
        if not parts or size + new > budget:
            parts.append([])
            size, new = 0, own + len(s.prompts[i])
        parts[-1].append(i)
        size, prompt = size + new, its
    return parts


def policy_score(
    policies: Sequence[Policy], s: Sequences, part: Sequence[int], temperature: float, off: bool = False
) -> tuple[Tensor, Tensor]:
    """`score` of sequences under their own policies; `off`: under the base model."""
    first = policies[0]
    if isinstance(first, Baseline):
        return first.score([s.prompts[i] for i in part], [s.completions[i].tokens for i in part], temperature, off)[:2]
    return score(first, None if off else stacked(policies), s.prompts, s.completions, part, temperature, s.owners)


def stacked(policies: Sequence[Policy]) -> Matrices | None:
    """The matrices of all policies, one adapter each: M (policies, segments, r, r) of each fused linear."""
    each = [p.matrices() for p in policies]
    if len(each) == 1 or each[0] is None:
        return each[0]
    return [None if m[0] is None else torch.cat(m) for m in zip(*each, strict=True)]


def score(
    adapter: Adapter,
    matrices: Matrices | None,
    prompts: Sequence[Sequence[int]],  # of each completion
    completions: Sequence[Completion],
    part: Sequence[int],  # the completions to score, by number
    temperature: float,
    owners: Sequence[int] | None = None,  # adapter of each completion, where matrices hold several
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the completions' tokens, one after another, (tokens,) each; each prompt is packed once."""
    hidden, targets = hidden_states(adapter.model, matrices, prompts, completions, part, owners)
    return token_logprobs(hidden, adapter.model.head, targets, temperature)


def hidden_states(
    model: Decoder,
    matrices: Matrices | None,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    part: Sequence[int],
    owners: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """The hidden states (tokens, hidden) that predict the completions' tokens, and these (tokens,): what `score` looks at."""
    keys = [(0 if owners is None else owners[i], tuple(prompts[i])) for i in part]
    distinct = list(dict.fromkeys(keys))
    number = {key: n for n, key in enumerate(distinct)}
    ends = dict(zip(distinct, itertools.accumulate(len(p) for _, p in distinct), strict=True))
    tokens = [t for _, p in distinct for t in p]
    lengths, adapters, prefixes = [len(p) for _, p in distinct], [a for a, _ in distinct], []
    targets: list[int] = []
    rows: list[int] = []  # of the hidden states that predict the targets
    for i, key in zip(part, keys, strict=True):
        completion = completions[i].tokens
        rows += [ends[key] - 1, *range(len(tokens), len(tokens) + len(completion) - 1)]
        targets += completion
        if len(completion) > 1:  # the last token is predicted and predicts nothing
            tokens += completion[:-1]
            lengths.append(len(completion) - 1)
            adapters.append(key[0])
            prefixes.append(number[key])
    row_adapter = None
    if any(m is not None and len(m) > 1 for m in matrices or ()):
        row_adapter = torch.tensor(adapters, device=model.device).repeat_interleave(torch.tensor(lengths, device=model.device))
    hidden = model.packed(torch.tensor(tokens, device=model.device), lengths, matrices, row_adapter, prefixes=prefixes)
    hidden = hidden.index_select(0, torch.tensor(rows, device=model.device))
    return hidden, torch.tensor(targets, device=model.device)


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
