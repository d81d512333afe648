"""Evaluation: sampled and greedy answers to held-out problems, each read strictly and flexibly."""

from collections.abc import Sequence
from dataclasses import dataclass

from tinylora.cli import table
from tinylora.engine.rollout import Sampling, rollout
from tinylora.engine.text import Text
from tinylora.model.decoder import Decoder, Matrices
from tinylora.rl.rewards import Grader
from tinylora.rl.statistics import paired_difference, standard_error
from tinylora.rl.tasks import Row

EVAL_SEED = 1 << 32  # sampling streams of evaluations, away from training's


@dataclass
class Scores:
    """Verdicts on the same problems, in order."""

    sampled: dict[str, list[bool]]  # by extractor: "strict" and "flexible" on the same completions
    greedy: dict[str, list[bool]]
    extractor: str

    def metrics(self) -> dict[str, float | int]:
        """The evaluation row: accuracy and its standard error are at temperature 1 under the training extractor."""

        def mean(verdicts: list[bool]) -> float:
            return sum(verdicts) / len(verdicts)

        return {
            "eval/accuracy": mean(self.sampled[self.extractor]),
            "eval/accuracy_strict": mean(self.sampled["strict"]),
            "eval/accuracy_flexible": mean(self.sampled["flexible"]),
            "eval/accuracy_greedy": mean(self.greedy[self.extractor]),
            "eval/stderr": standard_error(self.sampled[self.extractor]),
            "eval/n": len(self.sampled["strict"]),
        }


def evaluate(
    model: Decoder,
    matrices: Matrices | None,
    text: Text,
    rows: Sequence[Row],
    grader: Grader,
    extractor: str,
    max_completion_length: int,
    seed: int,
    cache_bytes: int | None = None,  # of `rollout`
) -> Scores:
    """Answer every row once at temperature 1 and once greedily, under `matrices` (None: the base model)."""
    prompts = [text.prompt(row["prompt"]) for row in rows]

    def verdicts(temperature: float) -> dict[str, list[bool]]:
        s = Sampling(max_completion_length, temperature, seed=EVAL_SEED + seed, eos_ids=text.eos_ids)
        answers = [text.decode(c.tokens) for c in rollout(model, matrices, prompts, 1, s, cache_bytes=cache_bytes)]
        graded = grader.grade(answers, rows)
        return {name: [v.right[name] for v in graded] for name in ("strict", "flexible")}

    return Scores(verdicts(1.0), verdicts(0.0), extractor)


def summary(before: Scores, after: Scores) -> str:
    """The before/after table, with the paired gain and its 95 % interval."""
    rows = []
    for label, name, old, new in (
        ("sampled, strict (#### n)", "strict", before.sampled, after.sampled),
        ("sampled, flexible (last number)", "flexible", before.sampled, after.sampled),
        (f"greedy, {before.extractor}", before.extractor, before.greedy, after.greedy),
    ):
        n = len(old[name])
        gain, low, high = paired_difference(old[name], new[name])
        rows.append([label, f"{sum(old[name]) / n:.1%}", f"{sum(new[name]) / n:.1%}", f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]"])
    n = len(before.sampled["strict"])
    return table([f"{n} held-out problems", "base", "trained", "paired gain [95 %]"], rows)
