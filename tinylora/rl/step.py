"""What a step of every algorithm does, for one run or for several that share the base: prompts, rollout, rewards, metrics.

Runs of a population go through one rollout together, one adapter a row: small batches waste decode steps. What each samples
depends on its own seed and sequence numbers, and each is updated by itself, so it becomes what it would become alone.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinylora.engine.rollout import Completion, rollout
from tinylora.rl.advantages import Advantages, compute_advantages
from tinylora.rl.completions import sample_line, write_completions
from tinylora.rl.rewards import Completed, Rewarded
from tinylora.rl.run import Run

Matrices = list[Tensor | None]  # M (adapters, segments, r, r) of each fused linear


@dataclass
class Share:
    """One run's part of a step."""

    run: Run
    order: list[int]  # its prompts among the training rows
    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    completions: list[Completion] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)  # by completion
    verdicts: dict[int, "Future[Any]"] = field(default_factory=dict)
    scored: Rewarded = field(default_factory=lambda: Rewarded(torch.zeros(0, 0), torch.zeros(0)))
    extra: dict[str, float] = field(default_factory=dict)  # metrics of the rewards

    @property
    def count(self) -> int:
        return len(self.prompts) * self.run.config.num_generations

    def take(self, i: int, completion: Completion) -> None:
        """Read completion i, and send it to be graded: not to processes that the user's own reward does not ask."""
        self.answers[i] = self.run.text.decode(completion.tokens)
        grader, c = self.run.grader, self.run.config
        row = self.rows[i // c.num_generations]
        if grader is None or not grader.golds(row):
            return
        if not c.own_reward or self.run.rewards.asks_verdicts or grader.pool is None:
            self.verdicts[i] = grader.submit(self.answers[i], row)

    @property
    def rewards(self) -> Tensor:
        """(completions,) float64, NaN where no function scored one."""
        return self.scored.rewards

    @cached_property
    def rendered(self) -> list[str]:
        """The prompt of every completion, as the model got it."""
        return self.per_completion([self.run.text.render(row["prompt"]) for row in self.rows])

    @cached_property
    def advantages(self) -> Advantages:
        c = self.run.config
        return compute_advantages(self.rewards, c.num_generations, c.scale_rewards)

    def repeated(self) -> list[list[int]]:
        """The prompt of every completion."""
        return self.per_completion(self.prompts)

    def per_completion(self, items: Sequence[Any]) -> list[Any]:
        """What each prompt has, once for each of its completions."""
        return [item for item in items for _ in range(self.run.config.num_generations)]


class Clock:
    """Times of a step; the same for all its runs."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def metrics(self, tokens: int, sampled: int) -> dict[str, Any]:
        began, rolled_out, rewarded, ended = self.marks
        return {
            "step_time": ended - began,
            "rollout_time": rolled_out - began,
            "reward_time": rewarded - rolled_out,
            "update_time": ended - rewarded,
            "tokens_per_second": tokens / (ended - began),
            "rollout_tokens_per_second": sampled / (rolled_out - began),
        }


def draw(runs: Sequence[Run]) -> list[Share]:
    """The step's prompts of each run."""
    shares = []
    for t in runs:
        order = t.prompt_order()
        rows = [t.train_rows[i] for i in order]
        shares.append(Share(t, order, rows, [t.text.prompt(row["prompt"]) for row in rows]))
    return shares


def roll_out(shares: Sequence[Share], matrices: Matrices | None, clock: Clock, own_rows: bool = False) -> None:
    """Completions and rewards of each share, in one rollout. matrices hold an adapter for each share, or with `own_rows` for
    each completion: their prompts are then prefilled once each."""
    first = shares[0].run
    c = first.config
    starts = [0]
    for s in shares:
        starts.append(starts[-1] + s.count)
    owner = [n for n, s in enumerate(shares) for _ in range(s.count)]

    def take(i: int, completion: Completion) -> None:
        shares[owner[i]].take(i - starts[owner[i]], completion)

    early = take if first.grader is not None and first.grader.pool is not None else None  # grading overlaps generation
    repeat = c.num_generations if own_rows else 1
    new = c.max_completion_length  # what is new may be long
    completions = rollout(
        first.model,
        matrices,
        [p for s in shares for p in (s.repeated() if own_rows else s.prompts)],
        1 if own_rows else c.num_generations,
        first.sampling(),
        row_adapter=list(range(starts[-1])) if own_rows else [n for n, s in enumerate(shares) for _ in s.prompts],
        names=[(s.run.config.seed, s.run.step * s.count + i) for s in shares for i in range(s.count)],
        cache_bytes=min(sum(s.run.plan.cache for s in shares), max(first.plan.cache, first.plan.free // 2)),
        expected=[s.run.expected.get(i, new) for s in shares for i in s.order for _ in range(repeat)],
        on_completion=early,
    )
    for n, s in enumerate(shares):
        s.completions = completions[starts[n] : starts[n + 1]]
        for i, row_number in enumerate(s.order):
            own = s.completions[i * c.num_generations : (i + 1) * c.num_generations]
            s.run.expected[row_number] = sum(len(x.tokens) for x in own) / len(own)
    clock.mark()
    for s in shares:
        for i, completion in enumerate(s.completions):
            if i not in s.answers:
                s.take(i, completion)
        _reward(s)
    clock.mark()


def stacked(each: Sequence[Matrices | None]) -> Matrices | None:
    """All their adapters in one: M (adapters, segments, r, r) of each fused linear. None is the base model, alone."""
    whole = [m for m in each if m is not None]
    if len(whole) < 2:
        return each[0]
    return [None if m[0] is None else torch.cat([x for x in m if x is not None]) for m in zip(*whole, strict=True)]


# ---- metrics ------------------------------------------------------------------------------------------------------------


def finish(s: Share, clock: Clock, metrics: dict[str, Any], trained_tokens: int = 0) -> dict[str, Any]:
    """The step's row; the run's counters move on. `trained_tokens`: prompts and solutions, where nothing was sampled."""
    sampled = sum(len(x.tokens) for x in s.completions)
    prompts = sum(map(len, s.prompts)) * s.run.config.num_generations
    tokens = sampled + prompts if s.completions else trained_tokens
    head, adapter = s.run.advance(tokens)
    if s.completions:
        _show(s)
    return {**head, **metrics, **adapter, **clock.metrics(tokens, sampled)}


def dead_groups(a: Advantages) -> dict[str, Any]:
    return {
        "frac_reward_zero_std": a.zero_std,
        "frac_reward_zero_std/all_right": a.all_right,
        "frac_reward_zero_std/all_wrong": a.all_wrong,
        **({"frac_reward_zero_std/unscored": a.unscored} if a.unscored else {}),
    }


def reward_metrics(s: Share) -> dict[str, Any]:
    mean, std = _mean_and_std(s.rewards)
    metrics = {"reward": mean, "reward_std": std}
    for name, column in zip(s.run.rewards.names, s.scored.table.T, strict=True):
        mean, std = _mean_and_std(column)
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
    return metrics


def _mean_and_std(x: Tensor) -> tuple[float | None, float | None]:
    """Of what is scored, n - 1 in the standard deviation; None where too little is."""
    scored = x[~x.isnan()]
    return _number(x.nanmean()), _number(scored.std()) if len(scored) > 1 else None


def length_metrics(s: Share) -> dict[str, Any]:
    lengths = torch.tensor([float(len(x.tokens)) for x in s.completions])
    finished = torch.tensor([x.finished for x in s.completions])
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - finished.double().mean().item(),
        "completions/mean_terminated_length": _number(lengths[finished].mean()),
        **s.extra,
    }


def _number(x: Tensor) -> float | None:
    """JSON has no NaN."""
    return None if x.isnan() else x.item()


# ---- rewards ------------------------------------------------------------------------------------------------------------


def _reward(s: Share) -> None:
    """Ask the run's rewards of the step's completions; what they and the exact match log goes into `extra`."""
    c, extra = s.run.config, s.extra
    verdicts = {i: future.result() for i, future in s.verdicts.items()}
    judged = list(verdicts.values())
    if judged:
        extra["accuracy"] = sum(v.right[c.extractor] for v in judged) / len(judged)
    if judged and c.dataset != "builtin":  # whose completions have one format only
        extra.update({f"accuracy/{e}": sum(v.right[e] for v in judged) / len(judged) for e in ("strict", "flexible")})
        extra.update({f"grader/{why}": sum(v.failure == why for v in judged) for why in ("timeout", "crash")})
    rows = s.per_completion(s.rows)
    texts, ids = [s.answers[i] for i in range(s.count)], [x.tokens for x in s.completions]
    rendered = s.rendered if c.own_reward else []
    s.scored = s.run.rewards(Completed(rows, rendered, texts, ids, verdicts, s.run.step, s.run.max_steps))
    extra.update(s.scored.metrics)


def _show(s: Share) -> None:
    """Write the step's completions, and print one of them every so many steps."""
    c, step = s.run.config, s.run.step
    if c.log_completions:
        texts = [s.answers[i] for i in range(s.count)]
        columns = {"prompt": s.rendered, "completion": texts, **s.scored.columns}
        columns |= {name: column.tolist() for name, column in zip(s.run.rewards.names, s.scored.table.T, strict=True)}
        columns |= {"reward": s.rewards.tolist(), "advantage": s.advantages.values.tolist()}
        write_completions(s.run.run_directory.path, step, columns, c.log_completions)
    if c.sample_steps and step % c.sample_steps == 0:
        tqdm.write(sample_line(step, s.rows[0]["prompt"][-1]["content"], s.answers[0], s.rewards[0].item()))
