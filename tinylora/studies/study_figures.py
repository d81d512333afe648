"""A study's figures: accuracies against what it varies, and learning curves."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from tinylora.studies.canvas import COLOURS, DASHES, STYLE, Picture, canvas, picture, style
from tinylora.studies.results import by, counts, is_number, measure_of, shown, spread

POINTS = 60  # of a learning curve; longer ones are means of several steps
UNITS = {"accuracy": "accuracy, % of problems", "reward": "mean reward of held-out problems"}
WIDE = 8  # largest over smallest of an axis' values, from which it is logarithmic whatever it shows


def study_pictures(
    about: dict[str, Any], results: Sequence[dict[str, Any]], curves: dict[str, list[list[float]]]
) -> list[Picture]:
    """Figures of a study's results, which are in the table's order; `curves` are each arm's rewards, by seed and step."""
    axis = about.get("x")
    places = {"x": about.get("x_label") or axis or ""}  # where a row's place on the axis is -> what the axis is called
    sizes = {"num_parameters": "trained numbers", "bytes": "bytes of trained numbers"}
    if axis in sizes and len({row["bytes"] / row["num_parameters"] for row in results}) > 1:
        places |= {k: label for k, label in sizes.items() if k != axis}  # precisions: at equal count, and at equal size
    numeric = any(is_number(row["x"]) for row in results)
    with matplotlib.rc_context(STYLE):
        found = []
        for kind in ("sampled", "greedy"):
            against = [_against(results, kind, place, label, axis in sizes) for place, label in places.items() if numeric]
            found += against or [_beside(results, kind)]
        return found + _learning(results, curves)


def _caption(results: Sequence[dict[str, Any]]) -> str:
    seeds = [len(rows) for rows in by(results, "arm").values()]
    few = " With so few seeds the interval is too narrow." if min(seeds) < 8 else ""
    n = counts([row["n"] for row in results])
    return (
        f"Mean over {counts(seeds)} seeds (faint dots), its 95 % interval by bootstrap over them.{few} n = {n} problems a seed."
    )


def _bases(results: Sequence[dict[str, Any]], kind: str) -> dict[str, float]:
    """Accuracy of each base model before training, over all runs."""
    models: dict[str, list[float]] = {}
    for row in results:
        models.setdefault(row["settings"]["model"], []).append(row["base"][kind])
    return {"base" if len(models) == 1 else f"base, {m}": sum(v) / len(v) for m, v in models.items()}


def _point(axes: Any, place: float, values: Sequence[float], i: int, sideways: bool = False) -> float:
    """An arm's seeds, mean and interval, in the style of series i; returns the mean."""
    mean, low, high = spread(values)
    dots, middle = ([place] * len(values), list(values)), ([place], [mean])
    bars = {"xerr" if sideways else "yerr": [[mean - low], [high - mean]]}
    order = -1 if sideways else 1
    axes.plot(*dots[::order], ".", color=COLOURS[i % 7], alpha=0.4, markeredgewidth=0)
    axes.errorbar(*middle[::order], **bars, **{**style(i), "linestyle": "none"}, capsize=3)
    return mean


def _against(results: Sequence[dict[str, Any]], kind: str, place: str, label: str, logarithmic: bool) -> Picture:
    """Accuracy by a numeric x, a line a series; a series without an x, or named full, is a level."""
    measure = measure_of(results)
    figure, axes = canvas(f"{kind.capitalize()} {measure}", label, UNITS[measure], 3.4)
    series, alt, levels = by(results, "series"), [], {}
    flat = {name for name, rows in series.items() if name.lower() == "full" or not all(is_number(r["x"]) for r in rows)}
    xs = sorted({row[place] for row in results if row["series"] not in flat})
    logarithmic = bool(xs) and xs[0] > 0 and (logarithmic or xs[-1] >= WIDE * xs[0])
    scale, back = (math.log, math.exp) if logarithmic else (float, float)
    width = scale(xs[-1]) - scale(xs[0]) if xs else 0
    for i, (name, rows) in enumerate(series.items()):
        if name in flat:
            mean, low, high = spread([row["trained"][kind] for row in rows])
            axes.axhspan(low, high, color=COLOURS[i % 7], alpha=0.15, linewidth=0)
            levels[f"{name}, {counts([row['num_parameters'] for row in rows])} numbers"] = mean, COLOURS[i % 7], "-."
            continue
        aside = width * 0.015 * (i - (len(series) - 1) / 2)  # so that bars of different series do not hide each other
        points = {}
        for x in sorted({row[place] for row in rows}):
            at = back(scale(x) + aside)
            points[at] = _point(axes, at, [row["trained"][kind] for row in rows if row[place] == x], i)
            alt.append(f"{name} at {x:,}: {shown(points[at], measure)}")
        axes.plot(list(points), list(points.values()), **style(i), label=name)
    levels |= {name: (p, "#555555", DASHES[1 + i % 2]) for i, (name, p) in enumerate(_bases(results, kind).items())}
    for name, (p, colour, dash) in levels.items():
        axes.axhline(p, color=colour, linestyle=dash, linewidth=1.3, label=name)
        alt.append(f"{name}: {shown(p, measure)}")
    if logarithmic:
        axes.set_xscale("log")
    ticks = xs[:1]  # at the values that were run, less those too near their neighbour to be read
    ticks += [x for before, x in zip(xs, xs[1:], strict=False) if scale(x) - scale(before) > 0.08 * width]
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if measure == "accuracy":
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    return picture(figure, axes, f"{kind}-{place}", _caption(results) + " Series are drawn a little apart.", alt)


def _beside(results: Sequence[dict[str, Any]], kind: str) -> Picture:
    """Accuracy of arms that have no numeric x: a row each."""
    arms, series = by(results, "arm"), list(by(results, "series"))
    names = [textwrap.fill(name, 24) for name in arms]
    tallest = max(name.count("\n") + 1 for name in names)
    height = 1.2 + len(arms) * (0.15 + 0.16 * tallest)
    measure, alt = measure_of(results), []
    figure, axes = canvas(f"{kind.capitalize()} {measure}", UNITS[measure], "arm", height)
    for y, (name, rows) in enumerate(arms.items()):
        mean = _point(axes, y, [row["trained"][kind] for row in rows], series.index(rows[0]["series"]), sideways=True)
        alt.append(f"{name}: {shown(mean, measure)}")
    for i, (name, p) in enumerate(_bases(results, kind).items()):
        axes.axvline(p, color="#555555", linestyle=DASHES[1 + i % 2], label=name)
        alt.append(f"{name}: {shown(p, measure)}")
    axes.set_yticks(range(len(arms)), names, fontsize=9)
    axes.invert_yaxis()
    if measure == "accuracy":
        axes.set_xlim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    return picture(figure, axes, f"{kind}-arms", _caption(results) + " Colours and markers are series.", alt)


def _learning(results: Sequence[dict[str, Any]], curves: dict[str, list[list[float]]]) -> list[Picture]:
    """Reward over steps, an arm a line: in one figure, or where those are too many in one a series."""
    drawn = {arm: np.array([c[: min(map(len, own))] for c in own]) for arm, own in curves.items()}  # (seeds, steps)
    groups = by(results, "series") if len(drawn) > len(COLOURS) else {"": list(results)}
    found = []
    for k, (series, rows) in enumerate(groups.items()):
        arms = [arm for arm in by(rows, "arm") if arm in drawn]
        if not arms:
            continue
        figure, axes = canvas("Learning curves" + (f": {series}" if series else ""), "training step", "mean reward of a step")
        seeds = counts([len(drawn[arm]) for arm in arms])
        alt, said = [], f"Mean over {seeds} seeds; bands are its 95 % interval by bootstrap over them."
        for i, arm in enumerate(arms):
            c = drawn[arm]
            width = math.ceil(c.shape[1] / POINTS)
            starts = range(0, c.shape[1] - width + 1, width)
            mean, low, high = zip(*(spread(c[:, s : s + width].mean(axis=1).tolist()) for s in starts), strict=True)
            x = [s + (width + 1) / 2 for s in starts]
            axes.plot(x, mean, **style(i), markevery=(i % len(x), max(5, len(x) // 6)), label=arm)
            axes.fill_between(x, low, high, color=COLOURS[i % 7], alpha=0.15, linewidth=0)
            alt.append(f"{arm}: {mean[0]:.3g} to {mean[-1]:.3g}")
            said += f" {arm}: a point is {width} steps." if width > 1 else ""
            said += f" {arm}: cut where its first seed ends." if any(len(own) > c.shape[1] for own in curves[arm]) else ""
        axes.set_ylim(min(c.min() for c in drawn.values()), max(c.max() for c in drawn.values()))  # the same for all series
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        found.append(picture(figure, axes, f"curves-{k}" if series else "curves", said, alt))
    return found
