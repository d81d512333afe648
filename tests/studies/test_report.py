"""python -m tinylora.report: what the page says, that it is whole in itself, and what a browser makes of it."""

import base64
import contextlib
import html
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinylora import train
from tinylora.errors import InputError
from tinylora.evaluation.statistics import wilson
from tinylora.studies import canvas, report, run_figures, study_figures

# accuracies of three seeds, by number of trained numbers
SEEDS = {
    "RL": {2: (0.5, 0.7, 0.65), 13: (0.6, 0.9, 0.85)},
    r"SFT <b>&</b> $\x$": {2: (0.3, 0.4, 0.32), 13: (0.55, 0.45, 0.5)},
    "full": {800_000: (0.95, 0.97, 0.96)},
}


def make(*arguments: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        assert report.main([str(a) for a in arguments]) == 0
    return out.getvalue()


def text(page: str) -> str:
    """A page without its pictures."""
    return re.sub(r"base64,[^\"]*", "base64,", page)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two series at 1 and 13 numbers and full fine-tuning, three seeds each, in no order; SFT samples nothing, and so has no
    rewards."""
    out, rows = tmp_path / "study", []
    for series, points in SEEDS.items():
        for count, values in points.items():
            for seed, value in enumerate(values):
                row = {"arm": f"{series}, {count}", "series": series, "x": count, "seed": seed, "n": 64}
                row |= {"num_parameters": count, "bytes": 4 * count, "settings": {"model": "builtin"}}
                row |= {"base": {"sampled": 0.42 + 0.04 * seed, "greedy": 0.16}, "run": f"runs/{series[:2]}{count}/{seed}"}
                rows.append(row | {"trained": {"sampled": value, "greedy": value / 2}})
                if series == "RL":
                    (out / row["run"]).mkdir(parents=True)
                    steps = [{"step": i, "step_time": 1.0, "reward": i / 10 + seed / 5} for i in range(1, 6 - seed)]
                    (out / row["run"] / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    out.mkdir(exist_ok=True)
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[::-1]))
    about = {"title": "Does <RL> win?", "question": "At 2 & 13?", "x": "num_parameters", "x_label": "numbers", "quick": True}
    (out / "study.json").write_text(json.dumps(about))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "run"
    arguments = ["--max-steps", "2", "--prompts-per-step", "4", "--num-generations", "4", "--eval-size", "32"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*arguments, "--output-dir", str(path)]) == 0
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The axes of every figure by its name."""
    seen, picture = {}, canvas.picture

    def keep(figure: Any, axes: Any, name: str, *rest: Any) -> canvas.Picture:
        seen[name] = axes
        return picture(figure, axes, name, *rest)

    for drawer in (run_figures, study_figures):
        monkeypatch.setattr(drawer, "picture", keep)
    return seen


def check_page(path: Path) -> None:
    """Whole in itself, without scripts, every picture described, embedded and beside it as a file."""
    page = path.read_text()
    assert path.stat().st_size < 3e6 and "http" not in text(page) and "<script" not in page and "url(" not in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    tags = re.findall(r"<img [^>]*>", page)
    files = [(path.parent / "figures" / f.name).read_bytes() for f in (path.parent / "figures").iterdir()]
    assert len(tags) == len(files) > 0 and page.count("<figcaption>") == len(tags)
    for tag in tags:
        assert len(re.search(r'alt="([^"]*)"', tag)[1]) > 30
        assert base64.b64decode(re.search(r'src="data:image/png;base64,([^"]*)"', tag)[1]) in files


def test_a_study(study: Path, drawn: dict[str, Any]) -> None:
    make(study)
    check_page(study / "report.html")
    page = text((study / "report.html").read_text())
    assert "<h1>Does &lt;RL&gt; win?</h1>" in page and "At 2 &amp; 13?" in page and "<b>" not in page
    assert "5 arms, 3 seeds each" in page and "64 problems; a --quick study" in page
    assert "without learning curves: arms of SFT &lt;b&gt;&amp;&lt;/b&gt; $\\x$; full." in page
    # A resample of three values is the least of them alone in 1 case of 27, more than 2.5 %: the interval is their range.
    cells = "<td>13</td><td>64</td><td>3</td><td>78.3% [60.0%, 90.0%]</td><td>39.2% [30.0%, 45.0%]</td>"
    assert f"<td>RL, 13</td>{cells}<td>90.0% (1)</td><td>60.0% (0)</td>" in page
    results, needed = page.split("<h3>Numbers needed</h3>")
    assert [re.findall(r"<td>(.*?)</td>", row)[1] for row in results.split("<tr>")[2:]] == ["2", "13", "2", "13", "800,000"]
    # Half of the way from 46 % to 78.3 % is 62.2 %, which RL passes where log count is 0.005 / 0.167 of the way from 2 to 13.
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in needed.split("<tr>")[2:]]
    assert len(rows) == 12 and rows[0][0] == "sampled 62.2%, 50% of the gain: RL" and rows[0][1].startswith("2.12 [at most 2, ")
    assert rows[0][2] == "1 [1, 1]" and rows[1][1:] == [
        "not reached [not reached, not reached]",
        "not reached [0, not reached]",
    ]
    assert "times RL&#x27;s [95 %]" in needed

    assert drawn.keys() == {"sampled-x", "greedy-x", "curves"}
    axes = drawn["sampled-x"]
    assert axes.get_xscale() == "log" and (axes.get_xlabel(), axes.get_ylabel()) == ("numbers", "accuracy, % of problems")
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2", "13"], "full is a level and needs no place on the axis"
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert np.allclose(lines["RL"].get_ydata(), [1.85 / 3, 2.35 / 3])
    assert np.allclose(lines["base"].get_ydata(), 0.46) and np.allclose(lines["full, 800,000 numbers"].get_ydata(), 0.96)
    apart = lines["RL"].get_xdata() / lines[r"SFT <b>&</b> $\x$"].get_xdata()
    assert (np.abs(apart - 1) > 0.01).all() and (np.abs(apart - 1) < 0.1).all()
    points = [values for name, p in SEEDS.items() if name != "full" for values in p.values()]
    spans = sorted(tuple(np.round(s[:, 1], 6)) for bar in axes.containers for s in bar.lines[2][0].get_segments())
    assert spans == sorted((min(values), max(values)) for values in points)
    dots = sorted(y for line in axes.get_lines() if line.get_marker() == "." for y in line.get_ydata())
    assert dots == sorted(v for values in points for v in values)
    rl, sft = lines["RL"], lines[r"SFT <b>&</b> $\x$"]
    assert rl.get_color() != sft.get_color() and rl.get_marker() != sft.get_marker()

    # The seeds end after 5, 4 and 3 steps; means of i / 10 + 0, 0.2 and 0.4.
    curve = {line.get_label(): line for line in drawn["curves"].get_lines()}["RL, 13"]
    assert curve.get_xdata().tolist() == [1, 2, 3] and np.allclose(curve.get_ydata(), [0.3, 0.4, 0.5])
    assert "RL, 13: cut where its first seed ends." in page
    band = drawn["curves"].collections[0].get_paths()[0].vertices
    assert math.isclose(band[:, 1].min(), 0.1) and math.isclose(band[:, 1].max(), 0.7)


def test_precisions_at_equal_count_and_at_equal_size(study: Path, drawn: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    half = [r | {"bytes": 2 * r["num_parameters"]} if "SFT" in r["series"] else r for r in rows]
    (study / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in half))
    make(study)
    assert drawn.keys() == {"sampled-x", "sampled-bytes", "greedy-x", "greedy-bytes", "curves"}
    assert [t.get_text() for t in drawn["sampled-bytes"].get_xticklabels()] == ["4", "8", "26", "52"]


@pytest.mark.parametrize(("points", "scale"), [((0.01, 0.07), "linear"), ((0.01, 0.08), "log"), ((0.0, 0.08), "linear")])
def test_an_axis_over_a_wide_range_is_logarithmic(study: Path, drawn: dict[str, Any], points: Any, scale: str) -> None:
    rows = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    rows = [r | {"x": points[r["num_parameters"] > 2]} for r in rows]
    (study / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    about = json.loads((study / "study.json").read_text()) | {"x": "sigma", "x_label": "sigma"}
    (study / "study.json").write_text(json.dumps(about))
    make(study)
    assert drawn["sampled-x"].get_xscale() == scale and drawn["sampled-x"].get_xlabel() == "sigma"


def test_arms_without_a_number(study: Path, drawn: dict[str, Any]) -> None:
    """A row each, with intervals along it."""
    rows = [json.loads(line) | {"x": "top"} for line in (study / "results.jsonl").read_text().splitlines()]
    (study / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    make(study)
    assert drawn.keys() == {"sampled-arms", "greedy-arms", "curves"}
    axes = drawn["greedy-arms"]
    names = [" ".join(t.get_text().split()) for t in axes.get_yticklabels()]
    assert names[:2] == ["RL, 2", "RL, 13"] and len(names) == 5
    assert np.allclose(axes.containers[1].lines[2][0].get_segments()[0], [[0.3, 1], [0.45, 1]])


def test_a_run_and_its_answers(run: Path, drawn: dict[str, Any]) -> None:
    make(run)
    check_page(run / "report.html")
    page = text((run / "report.html").read_text())
    assert drawn.keys() == {"reward", "length", "entropy", "grad-norm", "v"}
    assert all(axes.get_xlabel() == "training step" and axes.get_ylabel() for axes in drawn.values())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "step_time" in r]
    paths = [line.get_ydata().tolist() for line in drawn["v"].get_lines()[:13]]
    assert paths == [list(p) for p in zip(*(r["adapter/v"] for r in steps), strict=True)]
    assert drawn["entropy"].get_lines()[0].get_ydata().tolist() == [r["entropy"] for r in steps if r["entropy"] is not None]
    before, after = ([r["eval/accuracy"] for r in rows if r["step"] == s and "eval/n" in r][0] for s in (0, 2))
    bars = [c.lines[2][0].get_segments()[0][:, 1] for c in drawn["reward"].containers]
    assert np.allclose(bars, [wilson(round(p * 32), 32) for p in (before, after)])
    assert f"{before:.1%} [{wilson(round(before * 32), 32)[0]:.1%}" in page

    # The answers' marks are those of the run's own evaluation of these problems.
    marks = re.findall(r"(base|trained): <strong>(right|wrong)", page)
    for who, step in (("base", 0), ("trained", 2)):
        stored = json.loads((run / "evaluations" / f"step-{step:06d}.json").read_text())["greedy"]["strict"][:6]
        assert [mark == "right" for name, mark in marks if name == who] == stored
    assert "<pre>" in page

    make(run, "--no-samples", "--output", run / "other.html")
    assert "Answers before" not in (run / "other.html").read_text()


@pytest.mark.parametrize("n", [6, 7, 10, 32, 1319])
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_a_run_that_solves_none_or_all(run: Path, tmp_path: Path, drawn: dict[str, Any], n: int, accuracy: float) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().split("\n") if line]
    rows = [r | {"eval/n": n, "eval/accuracy": accuracy} if "eval/n" in r else r for r in rows]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    make(copy, "--no-samples")
    bars = [c.lines[2][0].get_segments()[0][:, 1].tolist() for c in drawn["reward"].containers]
    assert len(bars) == 2 and all(min(bar) == 0 if accuracy == 0 else max(bar) == 1 for bar in bars)


def test_seeds_that_are_all_equal(study: Path) -> None:
    """Nine accuracies of 0.7, whose mean rounds below each resample's."""
    rows = [json.loads(line) for line in (study / "results.jsonl").read_text().split("\n") if line]
    same = [r | {"seed": seed, "trained": {"sampled": 0.7, "greedy": 0.1}} for seed, r in enumerate(rows[-1:] * 9)]
    (study / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in same))
    make(study)
    check_page(study / "report.html")


def test_a_run_whose_base_is_not_here(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["model"] = "some/model"
    (copy / "config.json").write_text(json.dumps(config))
    make(copy)
    assert "Not generated: the base some/model is no directory here" in (copy / "report.html").read_text()
    assert len(list((copy / "figures").iterdir())) == 5


def test_several_on_one_page(study: Path, run: Path, tmp_path: Path) -> None:
    """Their figures do not overwrite each other, and the same input gives the same bytes."""
    other = shutil.copytree(study, tmp_path / "copy")
    pages = []
    for name in ("a", "b"):
        make(study, other, run, "--no-samples", "--output", tmp_path / name / "page.html")
        check_page(tmp_path / name / "page.html")
        pages.append((tmp_path / name / "page.html").read_text())
    assert pages[0] == pages[1] and pages[0].count("<h2>") == 3 and pages[0].count("<img") == 11


def test_errors_name_the_path(study: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: object) -> str:
        with pytest.raises(InputError) as error:
            make(*arguments)
        return str(error.value)

    assert f"{tmp_path / 'none'}: no such directory" in said(study, tmp_path / "none")
    assert f"{tmp_path} is neither a study" in said(tmp_path)
    copy = shutil.copytree(run, tmp_path / "run")
    whole = (copy / "metrics.jsonl").read_text()
    for broken, why in ((whole[:-20], "is torn"), ("", "is empty"), (whole + "7\n", "is torn")):
        (copy / "metrics.jsonl").write_text(broken)
        assert f"{copy / 'metrics.jsonl'} {why}" in said(copy)
    metrics = study / "runs" / "RL2" / "0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-3])
    assert f"{metrics} is torn" in said(study)
    metrics.unlink()
    (study / "figures").write_text("in the way")
    assert f"--output {study / 'report.html'} cannot be written" in said(study)
    (study / "results.jsonl").write_text('{"arm": "x"}\n')
    assert "results.jsonl: a row has no base, bytes" in said(study)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert 'pip install "tinylora[report]"' in said(study)


# In a frame, since a window is never narrower than 500 pixels.
PROBE = """<!doctype html><iframe width="{width}" height="1600" style="border: 0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{ const {{innerWidth, document: d}} = document.querySelector("iframe").contentWindow
document.title = JSON.stringify({{ inner: innerWidth, page: d.documentElement.scrollWidth,
images: [...d.images].map(i => [i.naturalWidth, i.clientWidth]),
boxes: [...d.querySelectorAll(".wide")].map(b => b.clientWidth) }})
}})</script>"""


@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(study: Path, run: Path, tmp_path: Path, width: int) -> None:
    """Offline: nothing makes the page scroll sideways, every figure is decoded, and its smallest text has 9 pixels or more."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on PATH")
    page, probe, image = (tmp_path / name for name in ("page.html", "probe.html", "page.png"))
    make(study, run, "--output", page)
    probe.write_text(PROBE.format(width=width, page=html.escape(page.read_text())))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},1600", "--hide-scrollbars"]

    def browse(what: str, file: Path) -> str:
        profile = f"--user-data-dir={tmp_path / file.stem}"
        done = subprocess.run([browser, *flags, profile, what, file.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", browse("--dump-dom", probe))[1]))
    assert found["inner"] == width and found["page"] <= width, found
    assert len(found["images"]) == 8 and all(natural > 0 for natural, _ in found["images"])
    assert all(box <= width - 32 for box in found["boxes"]) and len(found["boxes"]) == 3
    inches = canvas.STYLE["legend.fontsize"] / 72
    dots = canvas.STYLE["savefig.dpi"]  # to the inch, of the file's own pixels
    assert all(shown <= width - 32 and inches * dots * shown / natural > 9 for natural, shown in found["images"]), found

    browse(f"--screenshot={image}", page)
    pixels = np.asarray(Image.open(image).convert("RGB"))  # (height, width, 3)
    assert pixels.shape == (1600, width, 3)
    blue = (pixels == [0x00, 0x72, 0xB2]).all(axis=2).sum()
    assert blue > 100, "the first series' colour is to be seen"
