"""A run's section of the page: its figures, its accuracies before and after, and its first answers beside the base's."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylora.errors import InputError
from tinylora.evaluation.gains import mean_of, reward_gain, shown_gain
from tinylora.evaluation.statistics import paired_difference, wilson
from tinylora.studies.page import html_figures, html_table
from tinylora.studies.stored import read

if TYPE_CHECKING:
    from tinylora.studies.canvas import Picture


WRITTEN = 2  # completions of a step that a run's page shows


def run_section(path: Path, samples: bool) -> tuple[str, str, list["Picture"]]:
    """Title, HTML and figures of a training run."""
    from tinylora.studies.run_figures import run_pictures

    [config], rows = read(path / "config.json"), read(path / "metrics.jsonl", lines=True)
    settings, done = config["settings"], max(row["step"] for row in rows)
    tiny = {"full": (), "lora": ("r",)}.get(settings.get("method"), ("u", "r", "n_tie", "param_dtype"))  # what its method reads
    names = ("model", "dataset", "method", "algorithm", *tiny, "learning_rate", "seed")
    said = ", ".join(f"{name} {settings[name]}" for name in names if name in settings)
    facts = f"{config['num_parameters']:,} trained numbers, one seed, {done} of {config['max_steps']} steps; {said}."
    pictures = run_pictures(rows, settings)
    parts = [f"<p>{escape(facts)}</p>\n", before_and_after(path, config["max_steps"]), html_figures(pictures)]
    parts.append(written(path))
    if samples:
        parts.append(answers(path, settings))
    return f"Run {'/'.join(path.resolve().parts[-2:])}", "".join(parts), pictures


def before_and_after(path: Path, last: int) -> str:
    files = [path / "evaluations" / f"step-{step:06d}.json" for step in (0, last)]
    if not all(file.exists() for file in files):
        return "<p>The run was not evaluated before and after its training.</p>\n"
    [old], [new] = map(read, files)
    lines = []
    rewards = old.get("rewards") or {}
    for kind, by_name in rewards.items():
        for name, before in by_name.items():
            after = new["rewards"][kind][name]
            cells = ["none" if x is None else f"{x:.3f}" for x in (mean_of(before), mean_of(after))]
            lines.append([f"{kind}, {name}", *cells, shown_gain(reward_gain(before, after))])
    for kind in ("sampled", "greedy") if old["sampled"] else ():
        for extractor in ("strict", "flexible"):
            before, after = old[kind][extractor], new[kind][extractor]
            cells = [f"{kind}, {extractor}"]
            for right in (before, after):
                low, high = wilson(sum(right), len(right))
                cells.append(f"{sum(right) / len(right):.1%} [{low:.1%}, {high:.1%}]")
            gain, low, high = paired_difference(before, after)
            lines.append([*cells, f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]"])
    n = len(rewards["sampled"]["reward"] if rewards else old["sampled"]["strict"])
    return html_table([f"{n:,} held-out problems", "base [95 %]", "trained [95 %]", "paired gain [95 %]"], lines)


def written(path: Path) -> str:
    """What the model wrote: the first completions of the first step, of one in the middle and of the last."""
    files = sorted((path / "completions").glob("step-*.jsonl"))
    if not files:
        return ""
    parts = ["<h3>What it wrote in training</h3>\n<p>The first completions of a step, not chosen.</p>\n"]
    for file in dict.fromkeys((files[0], files[len(files) // 2], files[-1])):
        lines = read(file, lines=True)
        for row in lines[:WRITTEN]:
            rewards = ", ".join(f"{k} {row[k]}" for k in row if k not in ("step", "prompt", "completion"))
            cells = "".join(f"<div><pre>{escape(str(row[k]))}</pre></div>" for k in ("prompt", "completion"))
            parts.append(f'<p>Step {row["step"]}: {escape(rewards)}</p>\n<div class="answers">{cells}</div>\n')
    return "".join(parts)


def answers(path: Path, settings: dict[str, Any]) -> str:
    """The first held-out problems with the greedy answers of base and adapter, or why they are not there."""
    title = "<h3>Answers before and after</h3>\n"
    from tinylora.studies.run_answers import greedy_answers  # it loads torch, which no other part of a report needs

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
