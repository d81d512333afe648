"""A study's section of the page: its figures, its arms with their accuracies, and the trained numbers each series needs."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylora.studies.page import html_figures, html_table
from tinylora.studies.results import by, counts, counts_to_reach, is_number, measure_of, shown, spread
from tinylora.studies.stored import read

if TYPE_CHECKING:
    from tinylora.studies.canvas import Picture

GAINS = (0.5, 0.8, 0.9)  # of the best arm's, whose cost in trained numbers a study's page compares
NEEDED = """Trained numbers at which a series reaches a share of the gain from the base to the best arm: between the counts that
were run, on a straight line over their logarithm. Intervals are by bootstrap over the seeds, which all series share. At most:
the fewest numbers that were run are enough; a ratio to such a series is at least what it says."""
RESULT = {"arm", "series", "x", "seed", "settings", "num_parameters", "bytes", "n", "base", "trained", "run"}


def study_section(path: Path) -> tuple[str, str, list["Picture"]]:
    """Title, HTML and figures of a study."""
    from tinylora.studies.study_figures import study_pictures

    [about], results = read(path / "study.json"), read(path / "results.jsonl", lines=True, needs=RESULT)
    results.sort(
        key=lambda r: (r["series"], r["x"] if is_number(r["x"]) else r["num_parameters"], str(r["x"]), r["arm"], r["seed"])
    )
    arms, curves = by(results, "arm"), {}
    for arm, rows in arms.items():
        files = [path / row["run"] / "metrics.jsonl" for row in rows]
        runs = [[r["reward"] for r in read(f, lines=True) if r.get("reward") is not None] for f in files if f.exists()]
        if any(runs):
            curves[arm] = [rewards for rewards in runs if rewards]
    pictures = study_pictures(about, results, curves)
    measure = measure_of(results)
    lines = []
    for arm, rows in arms.items():
        ranked = sorted(rows, key=lambda row: row["trained"]["sampled"])
        line = [arm, counts([row["num_parameters"] for row in rows]), counts([row["n"] for row in rows]), str(len(rows))]
        for kind in ("sampled", "greedy"):
            mean, low, high = spread([row["trained"][kind] for row in rows])
            interval = f" [{shown(low, measure)}, {shown(high, measure)}]" if len(rows) > 1 else ""
            line.append(shown(mean, measure) + interval)
        line += [f"{shown(row['trained']['sampled'], measure)} ({row['seed']})" for row in (ranked[-1], ranked[0])]
        lines.append(line)
    seeds = [len(rows) for rows in arms.values()]
    facts = f"{len(arms)} arms, {counts(seeds)} seeds each (a seed also draws P), {counts([r['n'] for r in results])} problems"
    facts += "; arms with fewer seeds are not finished" if min(seeds) < max(seeds) else ""
    facts += "; a --quick study: too small to conclude from." if about.get("quick") else "; a whole study, not --quick."
    if uncurved := dict.fromkeys(row["series"] for row in results if row["arm"] not in curves):
        facts += f" Without rewards, or without their runs here, and so without learning curves: arms of {'; '.join(uncurved)}."
    of = " reward" if measure == "reward" else ""
    header = ["arm", "trained numbers", "n problems", "seeds", f"sampled{of}, mean [95 %]", f"greedy{of}, mean [95 %]"]
    table = html_table([*header, "best (seed)", "worst (seed)"], lines)
    title = str(about.get("title") or path.name)
    said = "".join(f"<p>{escape(text)}</p>\n" for text in (str(about.get("question", "")), facts))
    return title, said + html_figures(pictures) + table + numbers_needed(about, results), pictures


def numbers_needed(about: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """How many trained numbers each series needs for a share of the best arm's gain, beside the first series.

    Empty where the study is not about that, or its series do not share two seeds or more.
    """

    series = {name: rows for name, rows in by(results, "series").items() if len({r["num_parameters"] for r in rows}) > 1}
    seeds = sorted({row["seed"] for rows in series.values() for row in rows})
    counts = [sorted({row["num_parameters"] for row in rows}) for rows in series.values()]
    whole = all(len(rows) == len(seeds) * len(c) for rows, c in zip(series.values(), counts, strict=True))
    if about.get("x") != "num_parameters" or len(series) < 2 or len(seeds) < 2 or not whole:
        return ""
    lines = []
    for kind in ("sampled", "greedy"):
        accuracies = []  # series, seeds, counts
        for rows, own in zip(series.values(), counts, strict=True):
            of = {(row["seed"], row["num_parameters"]): row["trained"][kind] for row in rows}
            accuracies.append([[of[seed, n] for n in own] for seed in seeds])
        base = sum(row["base"][kind] for row in results) / len(results)
        best = max(sum(arm) / len(seeds) for one in accuracies for arm in zip(*one, strict=True))
        for share in GAINS:
            level = base + share * (best - base)
            found = counts_to_reach(counts, accuracies, level)
            for name, own, (needed, ratio) in zip(series, counts, found, strict=True):
                cells = [f"{kind} {shown(level, measure_of(results))}, {share:.0%} of the gain: {name}"]
                for (value, low, high), least in ((needed, own[0]), (ratio, -math.inf)):
                    cells.append(f"{_count(value, least)} [{_count(low, least)}, {_count(high, least)}]")
                lines.append(cells)
    return f"<h3>Numbers needed</h3>\n<p>{NEEDED}</p>\n" + html_table(
        ["level: series", "numbers [95 %]", f"times {next(iter(series))}'s [95 %]"], lines
    )


def _count(x: float, least: float) -> str:
    return "not reached" if not x < math.inf else f"{'at most ' if x <= least else ''}{x:.3g}"
