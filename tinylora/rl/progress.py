"""The progress line of a run: what its last step says, a dead batch first of all; and lines that name a run going wrong."""

from collections import deque
from collections.abc import Iterable
from typing import Any

WINDOW = 10  # steps over which rewards are averaged before they are compared


def progress_line(row: dict[str, Any]) -> str:
    speed = f"{row['tokens_per_second']:,.0f} tok/s"
    norm = f"|v| {row['adapter/norm']:.3f}, " if "adapter/norm" in row else ""
    if "frac_reward_zero_std" not in row:
        return f"loss {row['loss']:.4f}, {norm}{speed}"
    dead = row["frac_reward_zero_std"]
    if dead == 1:
        right, none = row["frac_reward_zero_std/all_right"], row.get("frac_reward_zero_std/unscored", 0)
        kind = "all right" if right == 1 else "all wrong" if right == 0 else "of equal rewards"
        kind = "without a reward" if none == 1 else kind
        said = f"DEAD BATCH: every group is {kind}, nothing to learn from"
    else:
        said = f"{dead:.0%} dead groups"
    reward = "none" if row["reward"] is None else f"{row['reward']:.3f}"
    accuracy = f"accuracy {row['accuracy']:.1%}, " if "accuracy" in row else ""
    length = f"length {row['completions/mean_length']:.0f}, {row['completions/clipped_ratio']:.0%} cut off, "
    return f"reward {reward}, {accuracy}{said}, {length}{norm}{speed}"


class Alarms:
    """Names a run that goes wrong, when it begins to: a collapsed reward, collapsed answers, answers that are cut off."""

    def __init__(self, steps: Iterable[dict[str, Any]]) -> None:
        """`steps`: the metrics rows that are there already."""
        self.rewards: deque[float] = deque(maxlen=WINDOW)
        self.lengths: list[float] = []  # mean lengths of the first WINDOW steps
        self.best, self.best_step = 0.0, 0  # the highest mean reward of WINDOW steps, and the last of these
        self.count, self.last_wrong = 0, dict[str, int]()  # steps seen; by kind, the last of them that was wrong
        for row in steps:
            self(row)

    def __call__(self, row: dict[str, Any]) -> list[str]:
        """A line for each thing that this step shows to be wrong and none of the WINDOW steps before it did."""
        self.count += 1
        found = self._wrong(row)
        new = [said for kind, said in found.items() if self.count - self.last_wrong.get(kind, -WINDOW) > WINDOW]
        self.last_wrong |= dict.fromkeys(found, self.count)
        return new

    def _wrong(self, row: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        step, length = row["step"], row.get("completions/mean_length")
        if row.get("reward") is not None:
            self.rewards.append(row["reward"])
        if len(self.rewards) == WINDOW:
            mean = sum(self.rewards) / WINDOW
            if mean > self.best:
                self.best, self.best_step = mean, step
            elif self.best > 0 and mean < self.best / 2:
                found["reward"] = (
                    f"step {step}: the mean reward of the last {WINDOW} steps is {mean:.3g}, under half of the best {WINDOW} "
                    f"steps' {self.best:.3g} (up to step {self.best_step})"
                )
        if length is not None and len(self.lengths) < WINDOW:
            self.lengths.append(length)
        elif length is not None and length < (first := sum(self.lengths) / WINDOW) / 4:
            found["length"] = (
                f"step {step}: completions have {length:.3g} tokens on average, under a quarter of the first {WINDOW} steps' "
                f"{first:.3g}; completions/ has them"
            )
        if (cut := row.get("completions/clipped_ratio", 0.0)) > 0.5:
            found["cut off"] = f"step {step}: {cut:.0%} of the completions are cut off; raise --max-completion-length"
        return found
