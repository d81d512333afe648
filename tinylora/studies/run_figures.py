"""A run's figures: its metrics over its steps, and the path of v."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from tinylora.evaluation.statistics import Z95, wilson
from tinylora.rl.run_directory import is_step
from tinylora.studies.canvas import COLOURS, STYLE, Picture, canvas, picture, style

SHOWN_V = 16
PANELS = (  # of a run: file name, title, axis, {metric: label}
    ("reward", "Reward and accuracy", "reward; share that is right", {"reward": "reward", "accuracy": "accuracy"}),
    ("likeliest", "Solutions' tokens that are the likeliest", "share of tokens", {"mean_token_accuracy": "accuracy"}),
    ("length", "Completion length", "tokens", {"completions/mean_length": "mean"}),
    ("entropy", "Entropy", "nats a token", {"entropy": "entropy"}),
    ("grad-norm", "Gradient norm", "norm, before clipping", {"grad_norm": "gradient"}),
)


def run_pictures(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[Picture]:
    """The figures of a run, by the metrics that its rows have."""
    steps = [row for row in rows if is_step(row)]
    batch = f"{settings['prompts_per_step']} prompts x {settings['num_generations']} completions"
    found = []
    with matplotlib.rc_context(STYLE):
        for name, title, unit, metrics in PANELS:
            lines = {label: line for metric, label in metrics.items() if (line := _line(steps, metric))[0]}
            if not lines:
                continue
            if len(lines) == 2 and lines["reward"] == lines["accuracy"]:
                lines = {"reward, which is accuracy": lines["reward"]}
            figure, axes = canvas(title, "training step", unit)
            caption = f"One run: a point is one step, of {batch}."
            for i, (label, (x, y)) in enumerate(lines.items()):
                axes.plot(
                    x, y, **style(i), markevery=max(1, len(x) // 12), label=label if name in ("reward", "length") else None
                )
            if name == "reward":
                caption += _held_out(axes, rows)
            if name == "length":
                (x, low), (_, high) = (_line(steps, f"completions/{kind}_length") for kind in ("min", "max"))
                axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="shortest to longest")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            alt = [f"{label} from {y[0]:.3g} at step {x[0]} to {y[-1]:.3g} at {x[-1]}" for label, (x, y) in lines.items()]
            found.append(picture(figure, axes, name, caption, alt))
        if path := [row["adapter/v"] for row in steps if "adapter/v" in row]:
            found.append(_path(np.array(path)))
    return found


def _line(rows: Sequence[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [x for x, _ in found], [y for _, y in found]


def _held_out(axes: Any, rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies on rows that are not trained on, with their intervals; returns what the caption says of them."""
    said = ""
    for i, (kind, label) in enumerate((("eval", "held-out problems"), ("validation", "held-out training rows")), 2):
        for k, row in enumerate(row for row in rows if row.get(f"{kind}/reward") is not None):
            n, p, error = row[f"{kind}/n"], row[f"{kind}/reward"], Z95 * (row[f"{kind}/reward_stderr"] or 0.0)
            mark = {**style(i), "linestyle": "none", "label": None if k else f"{label}, reward, n\u00a0=\u00a0{n:,}"}
            axes.errorbar(row["step"], p, error, **mark, capsize=3)
            said = " Others: sampled answers where nothing is trained, bars are 95 %."
        graded = [row for row in rows if row.get(f"{kind}/n") and f"{kind}/accuracy" in row and f"{kind}/reward" not in row]
        for k, row in enumerate(graded):
            n, p = row[f"{kind}/n"], row[f"{kind}/accuracy"]
            low, high = wilson(round(p * n), n)
            mark = {**style(i), "linestyle": "none", "label": None if k else f"{label}, n\u00a0=\u00a0{n:,}"}
            axes.errorbar(row["step"], p, [[p - low], [high - p]], **mark, capsize=3)
            said = " Others: sampled accuracy where nothing is trained, bars are 95 % (Wilson)."
    return said


def _path(v: Any) -> Picture:
    """v is (steps, numbers)."""
    figure, axes = canvas("The path of v", "training step", "value, without unit")
    for i in range(min(SHOWN_V, v.shape[1])):
        axes.plot(range(1, len(v) + 1), v[:, i], **style(i), markevery=(i % len(v), max(8, len(v) // 6)), label=f"v{i + 1}")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    said = (
        f"The trained numbers after each step; all are 0 before the first. Drawn: {min(SHOWN_V, v.shape[1])} of {v.shape[1]:,}."
    )
    return picture(figure, axes, "v", said, [f"At the end between {v[-1].min():.3g} and {v[-1].max():.3g}"])
