"""Lines that name a run going wrong: rewards that collapse, answers that do, answers that are cut off."""

from collections import deque
from collections.abc import Iterable
from typing import Any

WINDOW = 10  # steps over which rewards are averaged before they are compared


class Alarms:
    """Names what goes wrong when it begins to."""

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
