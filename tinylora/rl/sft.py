"""Supervised fine-tuning: next-token loss on solutions, packed and scored as GRPO's completions are.

    loss = -sum log p(token) / tokens     over the completion tokens of the step, at temperature 1

--sft-data given: the row's own solution; own: what the base itself samples on the step's prompts and gets right; foreign: the
built-in task's solutions in another style.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.engine.rollout import Completion
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.rl.memory import MemoryPlan
from tinylora.rl.policy import Policy, baseline_of
from tinylora.rl.run import Run
from tinylora.rl.solutions import solution
from tinylora.rl.step import Clock, Share, draw, finish, length_metrics, reward_metrics, roll_out
from tinylora.rl.update import accumulate, hidden_states

CHUNK = 1024  # tokens whose logits are in memory for the accuracy


def sft_step(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One step of each run; returns their metrics rows."""
    c, clock, shares = runs[0].config, Clock(), draw(runs)
    if c.sft_data == "own":
        roll_out(shares, None, clock)
        chosen = [[i for i, r in enumerate(s.rewards.tolist()) if r > 0] for s in shares]
        data = [
            ([s.repeated()[i] for i in own], [s.completions[i] for i in own]) for s, own in zip(shares, chosen, strict=True)
        ]
    else:
        data = [(s.prompts, [solution(row, s.run.text, c.sft_data) for row in s.rows]) for s in shares]
        clock.mark()
        clock.mark()
    rows = []
    for t, own in zip(runs, data, strict=True):
        t.optimizer.zero_grad(set_to_none=True)
        rows.append({**sft_update(t.policy, *own, t.plan), **t.descend()})
    clock.mark()
    return [finish(s, clock, {**m, **_sampled(s)}, _tokens(d)) for s, m, d in zip(shares, rows, data, strict=True)]


def _sampled(s: Share) -> dict[str, Any]:
    return {**reward_metrics(s), **length_metrics(s)} if s.completions else {}


def _tokens(data: tuple[list[list[int]], list[Completion]]) -> int:
    return sum(map(len, data[0])) + sum(len(c.tokens) for c in data[1])


def sft_update(
    policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], plan: MemoryPlan
) -> dict[str, float | None]:
    """Add the gradient of the loss on these completions to the policy's parameters; returns the metrics of their tokens."""
    total = sum(len(c.tokens) for c in completions)
    sums = torch.zeros(3, dtype=torch.float64)  # loss, entropy, tokens that are the likeliest

    def loss(part: list[int]) -> tuple[Tensor, Callable[[], None]]:
        logp, entropy, right = _scored(policy, prompts, completions, part)
        whole = -logp.sum() / total

        def done() -> None:
            sums.add_(torch.stack([x.detach().double().cpu() for x in (whole, entropy.sum(), right.sum())]))

        return whole, done

    accumulate(policy, prompts, completions, range(len(completions)), plan, loss)
    a, b, r = sums.tolist()
    return {"loss": a, "entropy": b / total if total else None, "mean_token_accuracy": r / total if total else None}


def _scored(
    policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], part: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy, and whether it is the likeliest, of every token of a part: (tokens,) each."""
    if baseline := baseline_of(policy):
        return baseline.score([prompts[i] for i in part], [completions[i].tokens for i in part], 1.0)
    hidden, targets = hidden_states(policy.model, policy.matrices(), prompts, completions, part)
    logp, entropy = token_logprobs(hidden, policy.model.head, targets)
    with torch.no_grad():
        best = [F.linear(x, policy.model.head).argmax(-1) for x in hidden.split(CHUNK)]
    return logp, entropy, torch.cat(best) == targets
