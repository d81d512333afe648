"""Supervised fine-tuning: next-token loss on solutions, packed and scored as GRPO's completions are.

    loss = -sum log p(token) / tokens     over the completion tokens of the step, at temperature 1

--sft-data given: the row's own solution; own: what the base itself samples on the step's prompts and gets right; foreign: the
built-in task's solutions in another style.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.errors import InputError
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.rl.baselines import Baseline
from tinylora.rl.rollout import Completion
from tinylora.rl.step import Clock, Share, draw, finish, length_metrics, reward_metrics, roll_out
from tinylora.rl.tasks import Row
from tinylora.rl.text import Text
from tinylora.rl.update import Policy, Sequences, accumulate, hidden_states, stacked

if TYPE_CHECKING:
    from tinylora.rl.trainer import Trainer

CHUNK = 1024  # tokens whose logits are in memory for the accuracy


def solution(row: Row, text: Text, source: str) -> Completion:
    """The row's solution as tokens with the end token. InputError where the row has none."""
    column = "foreign" if source == "foreign" else "solution"
    if not isinstance(row.get(column), str):
        raise InputError(f"--algorithm sft: a row has no column {column!r} with text (it has {', '.join(sorted(row))})")
    tokens = text.tokenizer(row[column], add_special_tokens=False)["input_ids"]
    return Completion([*tokens, text.tokenizer.eos_token_id], [], True)


def sft_step(trainers: Sequence["Trainer"]) -> list[Row]:
    """One step of each run; returns their metrics rows."""
    c, clock, shares = trainers[0].config, Clock(), draw(trainers)
    if c.sft_data == "own":
        roll_out(shares, None, clock)
        chosen = [[i for i, r in enumerate(s.rewards.tolist()) if r > 0] for s in shares]
        data = [
            ([s.repeated()[i] for i in own], [s.completions[i] for i in own]) for s, own in zip(shares, chosen, strict=True)
        ]
    else:
        data = [(s.prompts, [solution(row, s.trainer.text, c.sft_data) for row in s.rows]) for s in shares]
        clock.mark()
        clock.mark()
    for t in trainers:
        t.optimizer.zero_grad(set_to_none=True)
    metrics = sft_update([t.policy for t in trainers], data, trainers)
    metrics = [{**m, **t.descend()} for t, m in zip(trainers, metrics, strict=True)]
    clock.mark()
    return [finish(s, clock, {**m, **_sampled(s)}, _tokens(d)) for s, m, d in zip(shares, metrics, data, strict=True)]


def _sampled(s: Share) -> Row:
    return {**reward_metrics(s), **length_metrics(s)} if s.completions else {}


def _tokens(data: tuple[list[list[int]], list[Completion]]) -> int:
    return sum(map(len, data[0])) + sum(len(c.tokens) for c in data[1])


def sft_update(
    policies: Sequence[Policy],
    data: Sequence[tuple[list[list[int]], list[Completion]]],  # prompts and completions of each policy
    trainers: Sequence["Trainer"],
) -> list[Row]:
    """Add the gradient of each policy's loss on its own data to its parameters; returns its token metrics."""
    s = Sequences.of(data)
    totals = [sum(len(c.tokens) for c in completions) for _, completions in data]
    sums = torch.zeros(len(policies), 3, dtype=torch.float64)  # loss, entropy, tokens that are the likeliest

    def loss(part: list[int]) -> tuple[Tensor, Callable[[], None]]:
        owner = torch.tensor([s.owners[i] for i in part for _ in s.completions[i].tokens])  # (tokens,)
        logp, entropy, right = _scored(policies, s, part)
        each = -logp / torch.tensor(totals)[owner].to(logp)

        def done() -> None:
            columns = [x.detach().double().cpu() for x in (each, entropy, right)]
            sums.index_add_(0, owner, torch.stack(columns, 1))

        return each.sum(), done

    accumulate(policies, s, range(len(s.completions)), trainers[0].plan, loss)
    rows = zip(sums.tolist(), totals, strict=True)
    return [
        {
            "loss": a,
            "entropy": b / n if n else None,
            "mean_token_accuracy": r / n if n else None,
        }
        for (a, b, r), n in rows
    ]


def _scored(policies: Sequence[Policy], s: Sequences, part: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy, and whether it is the likeliest, of every token of a part: (tokens,) each."""
    first = policies[0]
    if isinstance(first, Baseline):
        return first.score([s.prompts[i] for i in part], [s.completions[i].tokens for i in part], 1.0)
    hidden, targets = hidden_states(first.model, stacked(policies), s.prompts, s.completions, part, s.owners)
    logp, entropy = token_logprobs(hidden, first.model.head, targets)
    with torch.no_grad():
        best = [F.linear(x, first.model.head).argmax(-1) for x in hidden.split(CHUNK)]
    return logp, entropy, torch.cat(best) == targets
