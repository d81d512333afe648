"""python -m tinylora.report DIR...: one page of training runs and studies, whole in itself, and its figures as PNG files."""

import argparse
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tinylora.errors import InputError
from tinylora.files import write_text
from tinylora.studies.page import HEAD
from tinylora.studies.run_section import run_section
from tinylora.studies.study_section import study_section

if TYPE_CHECKING:
    from tinylora.studies.canvas import Picture


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
