"""The report's figures, by matplotlib: a run's metrics over its steps, a study's accuracies and learning curves.

Small enough to be read at the width of a phone. Colours are Okabe and Ito's, which colour-blind readers tell apart (less their
yellow, too faint on white); markers and dashes say the same again.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from tinylora.rl.run_directory import Row, is_step
from tinylora.rl.statistics import bootstrap, wilson

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "os^Dv*P", ("-", "--", ":", "-.")
STYLE: Any = {
    "font.size": 10, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.fontsize": 9, "legend.frameon": False, "lines.markersize": 5, "text.parse_math": False, "savefig.dpi": 180,
}  # fmt: skip
POINTS = 60  # of a learning curve; longer ones are means of several steps
SHOWN_V = 16
PANELS: tuple[tuple[str, str, str, dict[str, str]], ...] = (  # file name, title, axis, {metric: label}
    ("reward", "Reward and accuracy", "reward; share of answers that are right", {"reward": "reward", "accuracy": "accuracy"}),
    ("loss", "Loss", "nats a token", {"loss": "loss"}),
    ("length", "Completion length", "tokens", {"completions/mean_length": "mean"}),
    ("entropy", "Entropy", "nats a token", {"entropy": "entropy"}),
    ("grad-norm", "Gradient norm", "norm, before clipping", {"grad_norm": "gradient"}),
    ("v-norm", "Length of v", "norm of v", {"adapter/norm": "v"}),
)


@dataclass(frozen=True)
class Picture:
    name: str  # of the file, without its ending
    title: str
    caption: str
    alt: str  # what is to be seen, for who cannot
    png: bytes


def style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": DASHES[i // 7 % 4]}


def canvas(title: str, x: str, y: str, height: float = 3.1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, 48), fontsize=10, fontweight="bold", loc="left")
    axes.set_xlabel(textwrap.fill(x, 50))
    axes.set_ylabel(y)
    return figure, axes


def picture(figure: Figure, axes: Any, name: str, caption: str, alt: str) -> Picture:
    """The figure as a file, its legend below it."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        labels = [textwrap.fill(label, 28 if len(labels) > 1 else 56) for label in labels]
        columns = min(len(labels), 2 if max(map(len, labels)) > 12 else 4)
        lines = sum(max(label.count("\n") + 1 for label in labels[i : i + columns]) for i in range(0, len(labels), columns))
        figure.set_figheight(figure.get_figheight() + 0.1 + 0.19 * lines)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    title = " ".join(axes.get_title(loc="left").split())
    return Picture(name, title, caption, f"{title}. {alt}", file.getvalue())


# ---- one run ------------------------------------------------------------------------------------------------------------


def run_pictures(rows: Sequence[Row], settings: Row) -> list[Picture]:
    """The figures of a run, by the metrics that its rows have."""
    steps = [row for row in rows if is_step(row)]
    batch = f"{settings['prompts_per_step']} prompts x {settings['num_generations']} completions"
    caption = f"One run: a point is one step's batch of {batch}."
    found = []
    with matplotlib.rc_context(STYLE):
        for name, title, unit, metrics in PANELS:
            lines = {label: line for metric, label in metrics.items() if (line := _line(steps, metric))[0]}
            wanted = {"v-norm": not any("adapter/v" in r for r in steps), "loss": settings["algorithm"] == "sft"}
            if not lines or not wanted.get(name, True):
                continue
            if len(lines) == 2 and lines["reward"] == lines["accuracy"]:
                lines = {"reward, which is accuracy": lines["reward"]}
            figure, axes = canvas(title, "training step", unit)
            said = caption
            for i, (label, (x, y)) in enumerate(lines.items()):
                mark = {**style(i), "markevery": max(1, len(x) // 12)}
                axes.plot(x, y, **mark, linewidth=1.3, label=label if name in ("reward", "length") else None)
            if name == "reward":
                said += _held_out(axes, rows)
            if name == "length":
                (x, low), (_, high) = (_line(steps, f"completions/{kind}_length") for kind in ("min", "max"))
                axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="shortest to longest")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            alt = "; ".join(
                f"{label} from {y[0]:.3g} at step {x[0]} to {y[-1]:.3g} at {x[-1]}" for label, (x, y) in lines.items()
            )
            found.append(picture(figure, axes, name, said, alt))
        path = [row["adapter/v"] for row in steps if "adapter/v" in row]
        if path:
            found.append(_path(path, steps[0]["step"]))
    return found


def _line(rows: Sequence[Row], metric: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [x for x, _ in found], [y for _, y in found]


def _held_out(axes: Any, rows: Sequence[Row]) -> str:
    """Accuracies on rows that are not trained on, with their intervals; returns what the caption says of them."""
    said = ""
    for i, (kind, label) in enumerate((("eval", "held-out problems"), ("validation", "held-out training rows")), 2):
        scored = [row for row in rows if row.get(f"{kind}/n")]
        if not scored:
            continue
        n, y = scored[0][f"{kind}/n"], [row[f"{kind}/accuracy"] for row in scored]
        limits = [wilson(round(p * n), n) for p in y]
        bars = [[p - low for p, (low, _) in zip(y, limits, strict=True)], [h - p for p, (_, h) in zip(y, limits, strict=True)]]
        mark = {**style(i), "linestyle": "none"}
        axes.errorbar([row["step"] for row in scored], y, bars, **mark, capsize=3, label=f"{label}, sampled (n = {n:,})")
        said += f" {label.capitalize()}: sampled accuracy, n = {n:,}, bars are 95 % (Wilson)."
    return said


def _path(path: Sequence[Sequence[float]], first: int) -> Picture:
    v = np.array(path)  # (steps, numbers)
    shown, steps = min(SHOWN_V, v.shape[1]), [first + i for i in range(len(v))]
    figure, axes = canvas("The path of v", "training step", "value")
    for i in range(shown):
        axes.plot(steps, v[:, i], **style(i), linewidth=1.1, markevery=(i, max(8, len(v) // 6)), label=f"v{i + 1}")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ends = f"From 0 before the first step to values between {v[-1].min():.3g} and {v[-1].max():.3g}"
    rest = f"; the first {shown} of {v.shape[1]:,} are drawn" if shown < v.shape[1] else ""
    return picture(figure, axes, "v", f"The trained numbers after each step, without unit{rest}.", f"{ends}{rest}.")


# ---- a study ------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval by bootstrap; a single seed has none, and gets its own value."""
    low, high = bootstrap(values) if len(values) > 1 else (values[0], values[0])
    return sum(values) / len(values), low, high


def by(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row[key] == name] for name in dict.fromkeys(row[key] for row in rows)}


def percent(p: float) -> str:
    return f"{100 * p:.1f} %"


def counts(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def study_pictures(about: Row, results: Sequence[Row], curves: dict[str, list[list[float]]]) -> list[Picture]:
    """Figures of a study's results, which are in the table's order; `curves` are each arm's rewards, by seed and step."""
    axis, label = about.get("x"), about.get("x_label") or about.get("x") or ""
    places = {"x": label}  # where a row's place on the axis is -> what the axis is called
    if axis in ("num_parameters", "bytes") and len({row["bytes"] / row["num_parameters"] for row in results}) > 1:
        other = (
            "bytes" if axis == "num_parameters" else "num_parameters"
        )  # precisions differ: at equal count, and at equal size
        places[other] = {"bytes": "bytes of trained numbers", "num_parameters": "trained numbers"}[other]
    with matplotlib.rc_context(STYLE):
        found = []
        for kind in ("sampled", "greedy"):
            if any(is_number(row["x"]) for row in results):
                logarithmic = axis in ("num_parameters", "bytes")
                found += [_against(results, kind, place, name, logarithmic) for place, name in places.items()]
            else:
                found.append(_beside(results, kind))
        return found + _learning(results, curves)


def _caption(results: Sequence[Row]) -> str:
    seeds = [len(rows) for rows in by(results, "arm").values()]
    few = " With few seeds such an interval is too narrow." if min(seeds) < 8 else ""
    n = counts([row["n"] for row in results])
    return (
        f"Mean over seeds ({counts(seeds)}) and its 95 % interval by bootstrap over them.{few} n = {n} problems for each seed."
    )


def _bases(results: Sequence[Row], kind: str) -> dict[str, float]:
    """Accuracy of each base model before training, over all runs."""
    models = {row["settings"]["model"]: row for row in results}
    means = {m: [row["base"][kind] for row in results if row["settings"]["model"] == m] for m in models}
    return {"base" if len(models) == 1 else f"base, {m}": sum(v) / len(v) for m, v in means.items()}


def _against(results: Sequence[Row], kind: str, place: str, label: str, logarithmic: bool) -> Picture:
    """Accuracy by a numeric x, a line a series; a series without an x, or named full, is a level."""
    figure, axes = canvas(f"{kind.capitalize()} accuracy", label, "accuracy, % of problems", 3.4)
    flat = {name for name, rows in by(results, "series").items() if name == "full" or not all(is_number(r["x"]) for r in rows)}
    xs = sorted({row[place] for row in results if row["series"] not in flat})
    alt = []
    if logarithmic:
        axes.set_xscale("log")
    span = (xs[-1] / xs[0] if logarithmic else xs[-1] - xs[0]) if xs else 1
    series = by(results, "series")
    for i, (name, rows) in enumerate(series.items()):
        if name in flat:
            mean, low, high = spread([row["trained"][kind] for row in rows])
            axes.axhline(mean, color=COLOURS[i % 7], linestyle="-.", label=f"{name} ({rows[0]['num_parameters']:,} numbers)")
            axes.axhspan(low, high, color=COLOURS[i % 7], alpha=0.12, linewidth=0)
            alt.append(f"{name}: {percent(mean)}")
            continue
        aside = 0.015 * (i - (len(series) - 1) / 2)  # so that bars of different series do not hide each other

        def moved(x: float, aside: float = aside) -> float:
            return x * span**aside if logarithmic else x + span * aside

        points = []
        for x in sorted({row[place] for row in rows}):
            values = [row["trained"][kind] for row in rows if row[place] == x]
            axes.plot([moved(x)] * len(values), values, ".", color=COLOURS[i % 7], alpha=0.3, markeredgewidth=0)
            points.append((x, *spread(values)))
        bars = [[mean - low for _, mean, low, _ in points], [high - mean for _, mean, _, high in points]]
        means = [mean for _, mean, _, _ in points]
        axes.errorbar([moved(x) for x, *_ in points], means, bars, **style(i), capsize=3, linewidth=1.3, label=name)
        alt.append(f"{name}: {percent(means[0])} at {points[0][0]:,} to {percent(means[-1])} at {points[-1][0]:,}")
    for i, (name, p) in enumerate(_bases(results, kind).items()):
        axes.axhline(p, color="#555555", linestyle=DASHES[1 + i % 3], linewidth=1, label=name)
        alt.append(f"{name}: {percent(p)}")
    _ticks(axes, xs, logarithmic)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    said = _caption(results) + " Faint dots are single seeds; points of different series are moved a little apart."
    return picture(figure, axes, f"{kind}-{place}", said, "; ".join(alt) + ".")


def _ticks(axes: Any, xs: Sequence[float], logarithmic: bool) -> None:
    """Ticks at the values that were run, less those too near their neighbour to be read."""
    place = [math.log(x) if logarithmic else x for x in xs]
    kept: list[int] = []
    for i in range(len(xs)):
        if not kept or place[i] - place[kept[-1]] >= 0.1 * (place[-1] - place[0]):
            kept.append(i)
    axes.set_xticks([xs[i] for i in kept], [f"{xs[i]:,}" for i in kept])
    axes.xaxis.set_minor_locator(NullLocator())


def _beside(results: Sequence[Row], kind: str) -> Picture:
    """Accuracy of arms that have no numeric x: a row each."""
    arms, series = by(results, "arm"), list(by(results, "series"))
    figure, axes = canvas(f"{kind.capitalize()} accuracy", "accuracy, % of problems", "", 1.4 + 0.36 * len(arms))
    alt = []
    for y, (name, rows) in enumerate(arms.items()):
        values = [row["trained"][kind] for row in rows]
        mean, low, high = spread(values)
        mark = {**style(series.index(rows[0]["series"])), "linestyle": "none"}
        axes.plot(values, [y + 0.2] * len(values), ".", color=mark["color"], alpha=0.3, markeredgewidth=0)
        axes.errorbar([mean], [y], xerr=[[mean - low], [high - mean]], **mark, capsize=3)
        alt.append(f"{name}: {percent(mean)}")
    for i, (name, p) in enumerate(_bases(results, kind).items()):
        axes.axvline(p, color="#555555", linestyle=DASHES[1 + i % 3], linewidth=1, label=name)
        alt.append(f"{name}: {percent(p)}")
    axes.set_yticks(range(len(arms)), [textwrap.fill(name, 22) for name in arms])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    said = _caption(results) + " Faint dots are single seeds; colours and markers are series."
    return picture(figure, axes, f"{kind}-arms", said, "; ".join(alt) + ".")


def _learning(results: Sequence[Row], curves: dict[str, list[list[float]]]) -> list[Picture]:
    """Reward over steps, an arm a line: in one figure, or where those are too many in one a series."""
    drawn = {arm: np.array([c[: min(map(len, own))] for c in own]) for arm, own in curves.items()}  # (seeds, steps)
    groups = by(results, "series") if len(drawn) > len(COLOURS) else {"": list(results)}
    top, low = max((c.max() for c in drawn.values()), default=1.0), min((c.min() for c in drawn.values()), default=0.0)
    found = []
    for k, (series, rows) in enumerate(groups.items()):
        arms = [arm for arm in by(rows, "arm") if arm in drawn]
        if not arms:
            continue
        figure, axes = canvas("Learning curves" + (f": {series}" if series else ""), "training step", "reward of a step, mean")
        alt, width = [], 1
        for i, arm in enumerate(arms):
            c = drawn[arm]
            width = max(1, math.ceil(c.shape[1] / POINTS))
            starts = range(0, c.shape[1] - width + 1, width)
            points = [spread(c[:, s : s + width].mean(axis=1).tolist()) for s in starts]
            x, mean = [s + (width + 1) / 2 for s in starts], [p[0] for p in points]
            axes.plot(x, mean, **style(i), markevery=(i, max(5, len(x) // 6)), linewidth=1.3, label=arm)
            axes.fill_between(x, [p[1] for p in points], [p[2] for p in points], color=COLOURS[i % 7], alpha=0.15, linewidth=0)
            alt.append(f"{arm}: {mean[0]:.3g} to {mean[-1]:.3g}")
        axes.set_ylim(min(0, low), max(1, top) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        cut = any(len(c) > drawn[arm].shape[1] for arm in arms for c in curves[arm])
        said = f"Mean over seeds ({counts([len(drawn[a]) for a in arms])}); bands: its 95 % interval by bootstrap over seeds."
        said += f" A point is the mean of {width} steps." if width > 1 else ""
        said += " A line ends where its first seed does." if cut else ""
        missing = [arm for arm in by(rows, "arm") if arm not in drawn]
        said += f" Without reward or without its run's directory: {', '.join(missing)}." if missing else ""
        found.append(picture(figure, axes, f"curves-{k}" if series else "curves", said, "; ".join(alt) + "."))
    return found
