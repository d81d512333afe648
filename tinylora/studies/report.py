"""python -m tinylora.report DIR...: one page of training runs and studies, whole in itself, and its figures as PNG files."""

import argparse
import base64
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tinylora.errors import InputError
from tinylora.evaluation.statistics import paired_difference, wilson
from tinylora.files import write_text
from tinylora.rl.run_directory import Metrics
from tinylora.studies.results import by, counts, counts_to_reach, is_number, spread

if TYPE_CHECKING:
    from tinylora.studies.figures import Picture

GAINS = (0.5, 0.8, 0.9)  # of the best arm's, whose cost in trained numbers a study's page compares
NEEDED = """Trained numbers at which a series reaches a share of the gain from the base to the best arm: between the counts that
were run, on a straight line over their logarithm. Intervals are by bootstrap over the seeds, which all series share. At most:
the fewest numbers that were run are enough; a ratio to such a series is at least what it says."""
PROBLEMS = 6  # whose answers a run's page shows
RESULT = {"arm", "series", "x", "seed", "settings", "num_parameters", "bytes", "n", "base", "trained", "run"}
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70em; margin: auto; padding: 16px }}
h1, h2, h3, p, li {{ overflow-wrap: anywhere }}
section + section {{ border-top: 1px solid #ccc; margin-top: 32px }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px }}
figure {{ margin: 0 }} img {{ max-width: 100%; height: auto }} figcaption {{ font-size: 14px; color: #444 }}
.wide {{ overflow-x: auto; margin: 16px 0 }}
table {{ border-collapse: collapse; font-size: 14px; white-space: nowrap }}
th, td {{ padding: 4px 10px; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; min-width: 9em }}
.answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 8px 16px }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: 8px; margin: 4px 0; font-size: 14px }}
</style></head><body>
"""


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls in a box of its own where it is wider than the page."""

    def line(cell: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in cells) + "</tr>\n"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide" tabindex="0"><table>\n{line("th", header)}{body}</table></div>\n'


def html_figures(pictures: Sequence["Picture"]) -> str:
    parts = []
    for p in pictures:
        source = base64.b64encode(p.png).decode()
        image = f'<img src="data:image/png;base64,{source}" alt="{escape(p.alt)}">'
        parts.append(f"<figure>{image}<figcaption>{escape(p.caption)}</figcaption></figure>\n")
    return f'<div class="figures">\n{"".join(parts)}</div>\n'


def read(path: Path, lines: bool = False) -> list[Metrics]:
    """The JSON object of a file, or of each of its lines. InputError where there is none or one is torn."""
    try:
        text = path.read_text()
        found = [dict(json.loads(part)) for part in (text.splitlines() if lines else [text])]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is torn or no JSON ({error}); the command that wrote it mends it when it goes on") from None
    if not found:
        raise InputError(f"{path} is empty: nothing has been finished yet")
    return found


# ---- a study ------------------------------------------------------------------------------------------------------------


def study_section(path: Path) -> tuple[str, str, list["Picture"]]:
    """Title, HTML and figures of a study."""
    from tinylora.studies.figures import study_pictures

    [about], results = read(path / "study.json"), read(path / "results.jsonl", lines=True)
    for row in results:
        if missing := RESULT - row.keys():
            raise InputError(f"{path / 'results.jsonl'}: a row has no {', '.join(sorted(missing))}")
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
    lines = []
    for arm, rows in arms.items():
        ranked = sorted(rows, key=lambda row: row["trained"]["sampled"])
        line = [arm, counts([row["num_parameters"] for row in rows]), counts([row["n"] for row in rows]), str(len(rows))]
        for kind in ("sampled", "greedy"):
            mean, low, high = spread([row["trained"][kind] for row in rows])
            line.append(f"{mean:.1%}" + (f" [{low:.1%}, {high:.1%}]" if len(rows) > 1 else ""))
        line += [f"{row['trained']['sampled']:.1%} ({row['seed']})" for row in (ranked[-1], ranked[0])]
        lines.append(line)
    seeds = [len(rows) for rows in arms.values()]
    facts = f"{len(arms)} arms, {counts(seeds)} seeds each (a seed also draws P), {counts([r['n'] for r in results])} problems"
    facts += "; arms with fewer seeds are not finished" if min(seeds) < max(seeds) else ""
    facts += "; a --quick study: too small to conclude from." if about.get("quick") else "; a whole study, not --quick."
    if uncurved := dict.fromkeys(row["series"] for row in results if row["arm"] not in curves):
        facts += f" Without rewards, or without their runs here, and so without learning curves: arms of {'; '.join(uncurved)}."
    header = ["arm", "trained numbers", "n problems", "seeds", "sampled, mean [95 %]", "greedy, mean [95 %]"]
    table = html_table([*header, "best (seed)", "worst (seed)"], lines)
    title = str(about.get("title") or path.name)
    said = "".join(f"<p>{escape(text)}</p>\n" for text in (str(about.get("question", "")), facts))
    return title, said + html_figures(pictures) + table + numbers_needed(about, results), pictures


def numbers_needed(about: Metrics, results: Sequence[Metrics]) -> str:
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
                cells = [f"{kind} {level:.1%}, {share:.0%} of the gain: {name}"]
                for (value, low, high), least in ((needed, own[0]), (ratio, -math.inf)):
                    cells.append(f"{_count(value, least)} [{_count(low, least)}, {_count(high, least)}]")
                lines.append(cells)
    return f"<h3>Numbers needed</h3>\n<p>{NEEDED}</p>\n" + html_table(
        ["level: series", "numbers [95 %]", f"times {next(iter(series))}'s [95 %]"], lines
    )


def _count(x: float, least: float) -> str:
    return "not reached" if not x < math.inf else f"{'at most ' if x <= least else ''}{x:.3g}"


# ---- a run --------------------------------------------------------------------------------------------------------------


def run_section(path: Path, samples: bool) -> tuple[str, str, list["Picture"]]:
    """Title, HTML and figures of a training run."""
    from tinylora.studies.figures import run_pictures

    [config], rows = read(path / "config.json"), read(path / "metrics.jsonl", lines=True)
    settings, done = config["settings"], max(row["step"] for row in rows)
    tiny = {"full": (), "lora": ("r",)}.get(settings.get("method"), ("u", "r", "n_tie", "param_dtype"))  # what its method reads
    names = ("model", "dataset", "method", "algorithm", *tiny, "learning_rate", "seed")
    said = ", ".join(f"{name} {settings[name]}" for name in names if name in settings)
    facts = f"{config['num_parameters']:,} trained numbers, one seed, {done} of {config['max_steps']} steps; {said}."
    pictures = run_pictures(rows, settings)
    parts = [f"<p>{escape(facts)}</p>\n", before_and_after(path, config["max_steps"]), html_figures(pictures)]
    if samples:
        parts.append(answers(path, settings))
    return f"Run {'/'.join(path.resolve().parts[-2:])}", "".join(parts), pictures


def before_and_after(path: Path, last: int) -> str:
    files = [path / "evaluations" / f"step-{step:06d}.json" for step in (0, last)]
    if not all(file.exists() for file in files):
        return "<p>The run was not evaluated before and after its training.</p>\n"
    [old], [new] = map(read, files)
    lines = []
    for kind in ("sampled", "greedy"):
        for extractor in ("strict", "flexible"):
            before, after = old[kind][extractor], new[kind][extractor]
            cells = [f"{kind}, {extractor}"]
            for right in (before, after):
                low, high = wilson(sum(right), len(right))
                cells.append(f"{sum(right) / len(right):.1%} [{low:.1%}, {high:.1%}]")
            gain, low, high = paired_difference(before, after)
            lines.append([*cells, f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]"])
    n = len(old["sampled"]["strict"])
    return html_table([f"{n:,} held-out problems", "base [95 %]", "trained [95 %]", "paired gain [95 %]"], lines)


def answers(path: Path, settings: Metrics) -> str:
    """The first held-out problems with the greedy answers of base and adapter, or why they are not there."""
    title = "<h3>Answers before and after</h3>\n"
    try:
        found = greedy_answers(path, settings)
    except InputError as error:
        return f"{title}<p>Not generated: {escape(str(error))}</p>\n"
    parts = []
    for question, gold, given in found:
        cells = "".join(
            f"<div>{who}: <strong>{'right' if right else 'wrong'}</strong><pre>{escape(text)}</pre></div>"
            for who, (text, right) in zip(("base", "trained"), given, strict=True)
        )
        parts.append(f'<p>{escape(question)} <em>(gold: {escape(gold)})</em></p>\n<div class="answers">{cells}</div>\n')
    return f"{title}<p>The first {len(found)} held-out problems, not chosen; greedy.</p>\n{''.join(parts)}"


def greedy_answers(path: Path, settings: Metrics) -> list[tuple[str, str, list[tuple[str, bool]]]]:
    """(question, gold answer, (text, right) of base and trained). InputError where the base or the adapter is not at hand."""
    from tinylora.adapter.on_decoder import Adapter  # this and the rest load torch, which no other part of a report needs
    from tinylora.engine.text import Text, fitting_rows
    from tinylora.evaluation.answers import answer
    from tinylora.loading import load_adapter
    from tinylora.model.decoder import Decoder
    from tinylora.model.loader import load_model
    from tinylora.tasks.builtin import BUILTIN_MODELS
    from tinylora.tasks.sets import load_task

    base, data, method = settings["model"], settings["dataset"], settings.get("method")
    if base not in BUILTIN_MODELS and not Path(base).is_dir():
        raise InputError(f"the base {base} is no directory here, and a report downloads nothing")
    if data != "builtin" and settings["data"] is None:
        raise InputError(f"the dataset {data} is not local, and a report downloads nothing")
    if method == "lora":
        raise InputError("the engine does not load PEFT's LoRA adapters")
    model = load_model(base, settings["device"], settings["dtype"])
    text, length = Text(model.path), settings["max_completion_length"]
    task = load_task(data, settings["data"], settings["prompt_style"], ("test",))
    rows, _ = fitting_rows(task.test[:PROBLEMS], text, model.config.max_positions, length)
    if not rows or not task.has_answers:
        raise InputError("the task has no test rows with answers")
    policies: list[tuple[Decoder, Adapter | None]] = [(model, None), (model, None)]
    if method == "full":  # whose adapter/ is a model
        policies[1] = load_model(str(path / "adapter"), settings["device"]), None
    else:
        policies[1] = model, load_adapter(path, model)
    grader = task.grader()
    try:
        scored = [answer(m, adapter, text, rows, grader, length, "answers") for m, adapter in policies]
    finally:
        grader.close()
    right = [s.greedy_right(settings["extractor"]) for s in scored]
    return [
        (
            row["prompt"][-1]["content"],
            row["answer"],
            [(s.greedy[i][0]["completion"], r[i]) for s, r in zip(scored, right, strict=True)],
        )
        for i, row in enumerate(rows)
    ]


# ---- the command --------------------------------------------------------------------------------------------------------


def section(path: Path, samples: bool) -> tuple[str, str, list["Picture"]]:
    if not path.is_dir():
        raise InputError(f"{path}: no such directory")
    if (path / "results.jsonl").exists():
        return study_section(path)
    if (path / "config.json").exists() and (path / "metrics.jsonl").exists():
        return run_section(path, samples)
    raise InputError(f"{path} is neither a study (results.jsonl) nor a training run (config.json, metrics.jsonl)")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tinylora.report", description=__doc__)
    parser.add_argument("directories", metavar="DIR", type=Path, nargs="+", help="a training run's or a study's")
    parser.add_argument("--output", type=Path, help="the page; figures/ comes beside it. Default: report.html in the first DIR")
    parser.add_argument("--no-samples", action="store_true", help="load no model: a run's page is without answers")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401  an extra, needed by no other command
    except ImportError:
        raise InputError('a report needs matplotlib: pip install "tinylora[report]"') from None
    sections = [section(path, not options.no_samples) for path in options.directories]
    output = options.output or options.directories[0] / "report.html"
    heading = sections[0][0] if len(sections) == 1 else f"{len(sections)} studies and runs"
    page = [HEAD.format(title=escape(heading)), f"<h1>{escape(heading)}</h1>\n"]
    for title, body, _ in sections:
        page.append("<section>\n" + (f"<h2>{escape(title)}</h2>\n" if len(sections) > 1 else "") + body + "</section>\n")
    try:
        write_text(output, "".join(page) + "</body></html>\n")
        (output.parent / "figures").mkdir(exist_ok=True)
        for i, (_, _, pictures) in enumerate(sections, 1):
            for p in pictures:
                name = f"{p.name}.png" if len(sections) == 1 else f"{i}-{p.name}.png"
                (output.parent / "figures" / name).write_bytes(p.png)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}") from None
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {sum(len(p) for *_, p in sections)} figures, also in figures/")
    return 0
