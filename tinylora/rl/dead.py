"""A first step of which nothing can be learned, explained: its rewards, what was cut off, what would have been right."""

from collections.abc import Sequence
from typing import Any

from tinylora.rl.step import Share

SHOWN = 400  # characters of the sample, from each end


def explain_dead(s: Share) -> str:
    """What to do about a step whose groups all had equal rewards."""
    c, count = s.run.config, s.count
    rewards = s.rewards.tolist()
    kind = f"all {count} rewards are {rewards[0]:g}" if len(set(rewards)) == 1 else "in each group all rewards are equal"
    if s.rewards.isnan().all():
        kind = f"no completion got a reward: for all {count} of them {', '.join(s.run.rewards.names)} returned None or NaN"
    lines = [f"step {s.run.step + 1} has nothing to learn from: {kind}."]
    if cut := sum(not x.finished for x in s.completions):
        lines.append(
            f"{cut} of {count} completions were cut off at {c.max_completion_length} tokens: raise --max-completion-length"
        )
    if not c.reward:
        lines += _readings([future.result() for future in s.verdicts.values()], c.extractor, cut > count / 2)
    answer = s.rows[0].get("answer")
    lines.append("a sample" + ("" if answer is None else f", to a problem whose answer is {answer}") + ":")
    text = s.answers[0]
    shown = text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} [...] {text[-SHOWN:]}"
    return "\n  ".join([*lines, *(f"| {line}" for line in shown.splitlines() or ["(nothing)"])])


def _readings(verdicts: Sequence[Any], extractor: str, cut: bool) -> list[str]:
    """What the other way to read answers would have found, and what else helps where most completions were not `cut` off."""
    other = "flexible" if extractor == "strict" else "strict"
    count, right = len(verdicts), sum(v.right[extractor] for v in verdicts)
    found, read = sum(v.right[other] for v in verdicts), sum(v.answers[extractor] is not None for v in verdicts)
    lines = [f"{right} of {count} are right as --extractor {extractor} reads them; {read} hold an answer for it to read."]
    if found > right:
        lines.append(f"{found} of {count} are right as --extractor {other} reads them.")
    elif cut:
        return lines
    elif read < count / 2:
        lines.append("ask for another form of answer: --prompt-style")
    elif right:
        lines.append("the problems are too easy for this model, or samples too few: harder --data, or more --num-generations")
    else:
        lines.append("the problems are too hard for this model, or samples too few: easier --data, or more --num-generations")
    return lines
