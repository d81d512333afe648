"""Rewards: exact match of the answer, controls, and anybody's functions with TRL's signature, weighted and summed as in TRL.

A reward function is called once a step with keyword lists, one entry per completion: prompts, completions (each a list with
one assistant message), completion_ids, and every column that any row of the task has, None where a row lacks it; also
rendered_prompts (the prompts as the model got them), trainer_state, log_extra and log_metric. It returns one number for each
completion, in a list, a tensor or whatever can be iterated, or None for one that it cannot score. It may be async.

    reward = sum of weight * value over the functions that scored a completion; NaN where none did
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tinylora import prng
from tinylora.rl.config import ACCURACY, BUILT_IN_REWARDS
from tinylora.rl.reward_functions import call_rewards, load_reward, source_of
from tinylora.tasks.grading import Verdict

_RANDOM_STREAM = 0x8A2D  # names the stream of random rewards
# Names that a function gets from the trainer, TRL's and rendered_prompts: a data column of such a name is not passed.
RESERVED = (
    "prompt", "completion", "prompts", "completions", "completion_ids", "rendered_prompts", "trainer_state", "log_extra",
    "log_metric", "environments",
)  # fmt: skip


Columns = dict[str, list[float | None]]  # values by the name of a reward


@dataclass
class Completed:
    """Completions as rewards see them: lists with one entry a completion."""

    rows: list[dict[str, Any]]
    rendered: list[str]  # the prompt as the model got it
    texts: list[str]
    ids: list[list[int]]
    verdicts: dict[int, Verdict]  # by completion; one that was not graded has none
    step: int  # 0-based
    max_steps: int = 0


@dataclass
class Rewarded:
    """What the rewards said."""

    table: Tensor  # (completions, functions) float64, NaN where a function said None
    rewards: Tensor  # (completions,) float64: the weighted sums
    metrics: dict[str, float] = field(default_factory=dict)  # by log_metric
    columns: dict[str, list[Any]] = field(default_factory=dict)  # by log_extra, for the table of completions


class Rewards:
    """The rewards of a run, by name."""

    def __init__(self, specs: Sequence[str], weights: Sequence[float], extractor: str, seed: int) -> None:
        self.extractor, self.seed = extractor, seed
        specs = specs or (ACCURACY,)
        functions = [None if spec in BUILT_IN_REWARDS else load_reward(spec) for spec in specs]
        plain = [spec if f is None else getattr(f, "__name__", "reward") for spec, f in zip(specs, functions, strict=True)]
        # two functions of one name keep their modules', and "reward" is the sum's
        clear = len(specs) == 1 or (len(set(plain)) == len(plain) and "reward" not in plain)
        self.names = plain if clear else list(specs)
        self.functions = dict(zip(self.names, functions, strict=True))
        self.weights = torch.tensor(list(weights) or [1.0] * len(specs), dtype=torch.float64)  # (functions,)
        self.sources = {spec: source_of(f) for spec, f in zip(specs, functions, strict=True) if f is not None}
        self.columns: list[str] = []

    def take_columns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note the columns that the functions get: all that any of these rows has. One line names those that they do not."""
        found = dict.fromkeys(key for row in rows for key in row)
        self.columns = [key for key in found if key not in RESERVED]
        hidden = [key for key in found if key in RESERVED and key != "prompt"]
        if hidden and any(self.functions.values()):
            print(f"columns of the data that are not passed to the reward, as their names are reserved: {', '.join(hidden)}")

    def __call__(self, c: Completed) -> Rewarded:
        """All functions on these completions. InputError where one raises, miscounts, or returns what is no number."""
        count = len(c.texts)
        logged: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        own = {name: f for name, f in self.functions.items() if f is not None}
        given: dict[str, Any] = {key: [row.get(key) for row in c.rows] for key in self.columns} if own else {}
        given |= {
            "prompts": [row["prompt"] for row in c.rows],
            "completions": [[{"role": "assistant", "content": text}] for text in c.texts],
            "completion_ids": c.ids,
            "rendered_prompts": c.rendered,
            "trainer_state": SimpleNamespace(global_step=c.step, max_steps=c.max_steps),
            "log_extra": lambda column, values: extra.__setitem__(column, list(values)),
            "log_metric": lambda name, value: logged.setdefault(name, []).append(float(value)),
        }
        values = dict(zip(own, call_rewards(list(own.values()), count, given), strict=True))
        for name in self.names:
            values.setdefault(name, self._built_in(name, c))
        table = torch.tensor([values[name] for name in self.names], dtype=torch.float64).T  # (completions, functions)
        sums = torch.where(table.isnan().all(1), torch.nan, (table * self.weights).nansum(1))
        metrics = {name: sum(found) / len(found) for name, found in logged.items()}
        return Rewarded(table, sums, metrics, {key: v for key, v in extra.items() if len(v) == count})

    def scorer(
        self, render: Callable[[Any], str], step: int = 0
    ) -> Callable[[Sequence[dict[str, Any]], Sequence[str], Sequence[list[int]], Sequence[Verdict | None]], Columns]:
        """A function of rows, texts, token ids and verdicts, one of each an answer: the sum's values, "reward", and each
        function's where there are several; None for what was not scored. `render` makes a prompt's text of its messages."""

        def score(
            rows: Sequence[dict[str, Any]],
            texts: Sequence[str],
            ids: Sequence[list[int]],
            verdicts: Sequence[Verdict | None],
        ) -> Columns:
            judged = {i: v for i, v in enumerate(verdicts) if v is not None}
            rendered = [render(row["prompt"]) for row in rows]
            found = self(Completed(list(rows), rendered, list(texts), list(ids), judged, step))
            columns = {"reward": found.rewards}
            if len(self.names) > 1:
                columns |= dict(zip(self.names, found.table.T, strict=True))
            return {name: [None if math.isnan(x) else x for x in column.tolist()] for name, column in columns.items()}

        return score

    @property
    def asks_verdicts(self) -> bool:
        """Whether one of them asks for verdicts."""
        return any(name in (ACCURACY, "format-only") for name in self.names)

    def _built_in(self, name: str, c: Completed) -> list[float]:
        if name == "random":
            return random_rewards(len(c.texts), self.seed, c.step)
        verdicts = [c.verdicts.get(i) for i in range(len(c.texts))]
        if name == "format-only":
            return [math.nan if v is None else float(v.answers["strict"] is not None) for v in verdicts]
        return [math.nan if v is None else float(v.right[self.extractor]) for v in verdicts]


def random_rewards(count: int, seed: int, step: int) -> list[float]:
    """A fair coin for each completion of a step: 0.0 or 1.0."""
    return (prng.uniform(prng.fold(_RANDOM_STREAM, seed, step) + torch.arange(count)) < 0.5).double().tolist()
