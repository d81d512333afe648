"""Scores: accuracies with their intervals, differences on the same problems, and the tables of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinylora.cli import table
from tinylora.evaluation.gains import mean_of, reward_gain, reward_metrics, shown_gain, variance
from tinylora.evaluation.statistics import (
    bootstrap,
    mcnemar,
    paired_difference,
    pass_at_k,
    smallest_difference,
    standard_error,
    wilson,
)
from tinylora.tasks.grading import Verdict

EXTRACTORS = ("strict", "flexible")

Answer = dict[str, Any]  # "completion": text; "tokens": how many; "finished": whether it ended by itself


# ---- of a training run: one answer a problem, verdicts alone -------------------------------------------------------------


@dataclass
class Scores:
    """Verdicts on the same problems, in order, and what an own reward says of the same answers."""

    sampled: dict[str, list[bool]]  # by extractor: "strict" and "flexible" on the same completions; empty without a grader
    greedy: dict[str, list[bool]]
    extractor: str
    # "sampled" and "greedy": the "reward", and each function's where there are several; empty where exact match is the reward
    rewards: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.rewards["sampled"]["reward"] if self.rewards else self.sampled["strict"])

    def metrics(self) -> dict[str, float | int | None]:
        """The evaluation row: accuracy and its standard error are at temperature 1 under the training extractor, and so is
        the reward."""
        found: dict[str, float | int | None] = {}
        if self.sampled:
            found |= {
                "eval/accuracy": _share(self.sampled[self.extractor]),
                "eval/accuracy_strict": _share(self.sampled["strict"]),
                "eval/accuracy_flexible": _share(self.sampled["flexible"]),
                "eval/accuracy_greedy": _share(self.greedy[self.extractor]),
                "eval/stderr": standard_error(self.sampled[self.extractor]),
            }
        if self.rewards:
            found |= reward_metrics(self.rewards["sampled"], self.rewards["greedy"])
        return found | {"eval/n": self.n}


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def summary(
    before: Scores, after: Scores, answer_format: str, temperature: float = 1.0, names: tuple[str, str] = ("base", "trained")
) -> str:
    """The before/after table, with the paired gain and its 95 % interval. `answer_format`: the grader's, "hash" or "boxed".
    `temperature`: that was trained at; these samples are of temperature 1, which is said where the run's is another."""
    rows, strict = [], {"hash": "#### n"}.get(answer_format, r"\boxed{n}")
    sampled = "sampled" if temperature == 1 else "sampled at 1.0"
    for kind, label in (("sampled", sampled), ("greedy", "greedy")) if before.rewards else ():
        for name, olds in before.rewards[kind].items():
            news = after.rewards[kind][name]
            cells = ["none" if x is None else f"{x:.3f}" for x in (mean_of(olds), mean_of(news))]
            rows.append([f"{label}, {name}", *cells, shown_gain(reward_gain(olds, news))])
    for label, name, old, new in (
        (f"{sampled}, strict ({strict})", "strict", before.sampled, after.sampled),
        (f"{sampled}, flexible (last number)", "flexible", before.sampled, after.sampled),
        (f"greedy, {before.extractor}", before.extractor, before.greedy, after.greedy),
    ):
        if old:
            gain, low, high = paired_difference(old[name], new[name])
            cells = [f"{_share(old[name]):.1%}", f"{_share(new[name]):.1%}"]
            rows.append([label, *cells, f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]"])
    return table([f"{before.n} held-out problems", *names, "paired gain [95 %]"], rows)


# ---- of an evaluation: several answers a problem, and what they say -------------------------------------------------------


@dataclass
class Scored:
    """One policy's answers to the problems of one task."""

    greedy: list[list[Answer]]  # one answer a problem
    sampled: list[list[Answer]]  # num_generations answers a problem, which may be none
    greedy_verdicts: list[list[Verdict]] = field(default_factory=list)  # none without a grader
    sampled_verdicts: list[list[Verdict]] = field(default_factory=list)
    # "greedy" and "sampled": by name of the reward, of each problem, of each of its answers; the sum's name is "reward"
    rewards: dict[str, dict[str, list[list[float | None]]]] = field(default_factory=dict)

    def verdicts(self, kind: str) -> list[list[Verdict]]:
        return self.greedy_verdicts if kind == "greedy" else self.sampled_verdicts

    def mean_rewards(self, kind: str) -> dict[str, list[float | None]]:
        """Of each problem, over its answers."""
        return {name: [mean_of(given) for given in values] for name, values in self.rewards.get(kind, {}).items()}

    def greedy_right(self, extractor: str) -> list[bool]:
        return [given[0].right[extractor] for given in self.greedy_verdicts]

    def sampled_right(self, extractor: str) -> list[int]:
        """How many of its sampled answers are right, for each problem."""
        return [sum(v.right[extractor] for v in given) for given in self.sampled_verdicts]

    def lengths(self) -> dict[str, dict[str, float]]:
        """Of greedy and sampled answers: tokens of one, on average, and the share that was cut off."""
        found = {}
        for decoding, answers in (("greedy", self.greedy), ("sampled", self.sampled)):
            flat = [a for given in answers for a in given]
            if not flat:
                continue
            cut_off = sum(not a["finished"] for a in flat) / len(flat)
            found[decoding] = {"tokens": sum(a["tokens"] for a in flat) / len(flat), "cut_off": cut_off}
        return found

    def metrics(self, extractor: str) -> dict[str, float | int | None]:
        """The names that a training run's evaluation rows have."""
        n, k = len(self.greedy), len(self.sampled[0])
        found: dict[str, float | int | None] = {}
        if self.sampled_verdicts and k:
            mean = {e: sum(self.sampled_right(e)) / (n * k) for e in EXTRACTORS}
            shares = [right / k for right in self.sampled_right(extractor)]
            found |= {
                "eval/accuracy": mean[extractor],
                "eval/accuracy_strict": mean["strict"],
                "eval/accuracy_flexible": mean["flexible"],
                "eval/accuracy_greedy": sum(self.greedy_right(extractor)) / n,
                "eval/stderr": standard_error([s == 1 for s in shares]) if k == 1 else variance(shares) ** 0.5 / n**0.5,
            }
        elif self.greedy_verdicts:
            found["eval/accuracy_greedy"] = sum(self.greedy_right(extractor)) / n
        if self.rewards:
            found |= reward_metrics(self.mean_rewards("sampled"), self.mean_rewards("greedy"))
        return found | {"eval/n": n}


# ---- scores and differences ---------------------------------------------------------------------------------------------


def score(values: Sequence[int], k: int) -> dict[str, float]:
    """The accuracy of problems that were right `values` times of k, with its 95 % interval over problems."""
    n = len(values)
    low, high = wilson(sum(values), n) if k == 1 else bootstrap([v / k for v in values])
    return {"accuracy": sum(values) / (n * k), "low": low, "high": high}


def difference(before: Sequence[int], after: Sequence[int], k: int) -> dict[str, float]:
    """after minus before on the same problems, its 95 % interval, and the smallest difference this many would show."""
    changes = [(a - b) / k for b, a in zip(before, after, strict=True)]
    found: dict[str, float] = {"gain": sum(changes) / len(changes)}
    if k == 1:
        old, new = [bool(b) for b in before], [bool(a) for a in after]
        _, found["low"], found["high"] = paired_difference(old, new)
        found["mcnemar_p"] = mcnemar(old, new)
    else:
        found["low"], found["high"] = bootstrap(changes)
    found["smallest_visible"] = smallest_difference(len(changes), variance(changes))
    return found


def compare(base: Scored, trained: Scored | None) -> dict[str, Any]:
    """Everything the table and results.json say of one task."""
    n, k = len(base.greedy), len(base.sampled[0])
    powers = sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})
    rows: dict[str, Any] = {}
    for kind, name in (("greedy", "greedy"), ("sampled", f"avg@{k}")):
        for reward, before in base.mean_rewards(kind).items():
            rows[f"{name}, {reward}"] = _reward_row(before, trained.mean_rewards(kind)[reward] if trained else None)
    for extractor in EXTRACTORS if base.greedy_verdicts else ():
        for name, size, read in (("greedy", 1, Scored.greedy_right), (f"avg@{k}", k, Scored.sampled_right)):
            if size == 0:
                continue
            old: list[int] = [int(v) for v in read(base, extractor)]
            row: dict[str, Any] = {"base": score(old, size)}
            if trained is not None:
                new = [int(v) for v in read(trained, extractor)]
                row |= {"trained": score(new, size), "paired": difference(old, new, size)}
            rows[f"{name}, {extractor}"] = row
        policies = {"base": base, "trained": trained}
        for j in powers if k > 1 else ():
            rows[f"pass@{j}, {extractor}"] = {
                who: {"accuracy": sum(pass_at_k(v, k, j) for v in scored.sampled_right(extractor)) / n}
                for who, scored in policies.items()
                if scored is not None
            }
    return rows


def _reward_row(before: list[float | None], after: list[float | None] | None) -> dict[str, Any]:
    """A reward of base and trained, each with its 95 % interval by bootstrap over problems, and the paired gain."""

    def of(values: list[float | None]) -> dict[str, float | None]:
        scored = [x for x in values if x is not None]
        low, high = bootstrap(scored) if scored else (None, None)
        return {"reward": mean_of(values), "low": low, "high": high}

    row: dict[str, Any] = {"base": of(before)}
    if after is not None:
        row["trained"] = of(after)
        gain = reward_gain(before, after)
        row["paired"] = None if gain is None else dict(zip(("gain", "low", "high"), gain, strict=True))
    return row


def comparison_table(task: str, n: int, rows: dict[str, Any]) -> str:
    """The table of one task."""
    lines = []
    for name, row in rows.items():
        cells = [name, *(_interval(row[who]) for who in ("base", "trained") if who in row)]
        if "trained" in row:
            pair = row.get("paired")
            p = "" if pair is None or "mcnemar_p" not in pair else f"{pair['mcnemar_p']:.2g}"
            gain = "" if pair is None else f"{pair['gain']:+.1%} [{pair['low']:+.1%}, {pair['high']:+.1%}]"
            if pair is not None and "reward" in row["base"]:
                gain = shown_gain((pair["gain"], pair["low"], pair["high"]))
            cells += [gain, p, f"{pair['smallest_visible']:.1%}" if pair and "smallest_visible" in pair else ""]
        lines.append(cells)
    trained = ["trained [95 %]", "paired gain [95 %]", "McNemar p", "smallest visible"]
    return table([f"{task}, {n} problems", "base [95 %]", *(trained if len(lines[0]) > 2 else [])], lines)


def lengths_table(limit: int, temperature: float, lengths: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of `Scored.lengths`, by policy."""
    rows = []
    for kind, label in (("greedy", "greedy"), ("sampled", f"sampled at {temperature:g}")):
        if any(kind not in of for of in lengths.values()):
            continue
        cells = [f"{of[kind]['tokens']:.0f} tokens, {of[kind]['cut_off']:.1%} cut off" for of in lengths.values()]
        rows.append([label, *cells])
    return table([f"at most {limit} tokens", *lengths], rows)


def _interval(cell: dict[str, float]) -> str:
    if "reward" in cell:
        return "none" if cell["reward"] is None else f"{cell['reward']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
    return f"{cell['accuracy']:.1%}" + (f" [{cell['low']:.1%}, {cell['high']:.1%}]" if "low" in cell else "")
