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

from tinylora.engine.rollout import Completion
from tinylora.errors import InputError
from tinylora.kernels.products import fp32_sums
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.decoder import Decoder, Matrices
from tinylora.rl.advantages import Advantages
from tinylora.rl.config import TrainConfig
from tinylora.rl.loss import grpo_loss, token_weights
from tinylora.rl.memory import MemoryPlan
from tinylora.rl.policy import Policy, baseline_of
from tinylora.rl.token_metrics import TokenMetrics


@dataclass
class Batch:
    """A step's completions, prompt after prompt."""

    prompts: Sequence[Sequence[int]]  # token ids of each completion's prompt
    completions: Sequence[Completion]
    advantages: Advantages
    old_logps: dict[int, Tensor] = field(default_factory=dict)  # by completion: the first iteration's


# Of a part of the completions, by number: its loss, summable over parts, and what to do once its gradient is in.
PartLoss = Callable[[list[int]], tuple[Tensor, Callable[[], None]]]


def update(
    policy: Policy, batch: Batch, config: TrainConfig, plan: MemoryPlan, reference: Matrices | None = None
) -> dict[str, float | None]:
    """Add the gradient of the step's loss to the policy's parameters; returns its tokens' metrics, None where it had none.
    `reference` is what the KL is to; None: the base model.

    Without live completions there is no forward and the gradient is zero.
    """
    prompts, completions = batch.prompts, batch.completions
    lengths = [len(c.tokens) for c in completions]
    if config.mask_truncated_completions:
        lengths = [n if c.finished else 0 for n, c in zip(lengths, completions, strict=True)]
    used = [i for i, n in enumerate(lengths) if n and (config.beta > 0 or batch.advantages.live[i])]
    stats, total = TokenMetrics(), sum(lengths)

    def loss(part: list[int]) -> tuple[Tensor, Callable[[], None]]:
        logp, entropy = policy_score(policy, prompts, completions, part, config.temperature)  # (tokens,) each
        counts = torch.tensor([lengths[i] for i in part])
        sampled = torch.tensor([x for i in part for x in completions[i].logprobs], dtype=logp.dtype, device=logp.device)
        old = torch.cat([batch.old_logps[i] for i in part]) if part[0] in batch.old_logps else logp.detach()
        ref = None
        if config.beta > 0:
            with torch.no_grad():
                if reference is None:
                    ref, _ = policy_score(policy, prompts, completions, part, config.temperature, off=True)
                else:
                    ref, _ = score(policy, reference, prompts, completions, part, config.temperature)
        weights = token_weights(counts, config.loss_type, len(completions), total, config.max_completion_length)
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

        def done() -> None:
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

        return terms.loss.sum(), done

    accumulate(policy, prompts, completions, used, plan, loss)
    return stats.metrics(with_kl=config.beta > 0)


def accumulate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],  # of each completion
    completions: Sequence[Completion],
    used: Sequence[int],  # the completions that count, by number
    plan: MemoryPlan,
    loss: PartLoss,
) -> None:
    """Forward and backward of the `used` completions, part by part.

    Where memory runs out, the plan's microbatches are halved and the rest goes on with those; InputError where one completion
    alone is too much.
    """
    parameters = list(policy.named_parameters().values())
    for x in parameters:
        if x.grad is None:
            x.grad = torch.zeros_like(x)
    parts = _microbatches(used, prompts, completions, plan.microbatch_tokens)
    while parts:
        before = [x.grad.clone() for x in parameters if x.grad is not None]
        try:
            done = _descended(loss, parts[0], policy.model.device)
        except torch.OutOfMemoryError:
            for x, grad in zip(parameters, before, strict=True):
                x.grad = grad
            if len(parts[0]) == 1:
                raise InputError(
                    f"one completion of {len(completions[parts[0][0]].tokens)} tokens is too much for the update's memory; "
                    "lower --max-completion-length"
                ) from None
            plan.microbatch_tokens //= 2
            tqdm.write(f"out of memory in the update: on with microbatches of {plan.microbatch_tokens} tokens")
            parts = _microbatches([i for part in parts for i in part], prompts, completions, plan.microbatch_tokens)
        else:
            done()
            parts.pop(0)


def _descended(loss: PartLoss, part: list[int], device: torch.device) -> Callable[[], None]:
    """Forward and backward of a part. A function of its own, so that nothing of a part that ran out of memory stays in it."""
    with deterministic(device), fp32_sums():
        value, done = loss(part)
        value.backward()
    return done


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU rows that are gathered get their gradients in a fixed order only where the library is told to.

    Operations that have no such order stay allowed; attention's own backward is stricter (`attention`).
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # or every allocation costs a pass over it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def _microbatches(
    used: Sequence[int], prompts: Sequence[Sequence[int]], completions: Sequence[Completion], budget: int
) -> list[list[int]]:
    """Completions, prompt after prompt, cut so that each part stays within `budget` tokens with its prompts counted once.
    A completion that exceeds it alone is a part of its own."""
    parts: list[list[int]] = []
    size, prompt = 0, None
    for i in used:
        own = len(completions[i].tokens) - 1
        new = own + (len(prompts[i]) if prompts[i] != prompt else 0)
        if not parts or size + new > budget:
            parts.append([])
            size, new = 0, own + len(prompts[i])
        parts[-1].append(i)
        size, prompt = size + new, prompts[i]
    return parts


def policy_score(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    part: Sequence[int],
    temperature: float,
    off: bool = False,
) -> tuple[Tensor, Tensor]:
    """`score` of completions under a policy; `off`: under the base model."""
    if baseline := baseline_of(policy):
        return baseline.score([prompts[i] for i in part], [completions[i].tokens for i in part], temperature, off)[:2]
    return score(policy, None if off else policy.matrices(), prompts, completions, part, temperature)


@torch.no_grad()
def base_logps(
    policy: Policy,
    prompts: Sequence[Sequence[int]],  # of each completion
    completions: Sequence[Completion],
    temperature: float,
    microbatch_tokens: int,
) -> Tensor:
    """Log-probs of all the completions' tokens under the base model, (tokens,)."""
    parts = _microbatches(range(len(completions)), prompts, completions, microbatch_tokens)
    with deterministic(policy.model.device), fp32_sums():
        return torch.cat([policy_score(policy, prompts, completions, part, temperature, off=True)[0] for part in parts])


def score(
    policy: Policy,
    matrices: Matrices | None,
    prompts: Sequence[Sequence[int]],  # of each completion
    completions: Sequence[Completion],
    part: Sequence[int],  # the completions to score, by number
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the completions' tokens, one after another, (tokens,) each; each prompt is packed once."""
    hidden, targets = hidden_states(policy.model, matrices, prompts, completions, part)
    return token_logprobs(hidden, policy.model.head, targets, temperature)


def hidden_states(
    model: Decoder,
    matrices: Matrices | None,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    part: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The hidden states (tokens, hidden) that predict the completions' tokens, and these (tokens,): what `score` looks at."""
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
    return hidden, torch.tensor(targets, device=model.device)
