"""The committed runs of recipes/real: the pages say what their files say, and no recipe promises what a run is not."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tinylora.train import parse

ROOT = Path(__file__).parents[2]
TABLES = runpy.run_path(str(ROOT / "recipes" / "real" / "tables.py"))
RUNS = [name for name in TABLES["RUNS"] if (ROOT / "docs" / "real-models" / name / "metrics.jsonl").exists()]


def test_the_pages_are_what_the_command_writes(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copytree(ROOT / "docs" / "real-models", tmp_path / "docs" / "real-models")
    pages = ("README.md", "docs/real-models.md")
    for page in pages:
        shutil.copy(ROOT / page, tmp_path / page)
    TABLES["main"](tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    assert RUNS and all(f"### {TABLES['RUNS'][name]}\n" in (ROOT / "docs/real-models.md").read_text() for name in RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_of_its_recipe_and_names_no_machine(name: str) -> None:
    """So that --resume goes on from a fresh clone: what is committed has the recipe's settings and no absolute path."""
    folder = ROOT / "docs" / "real-models" / name
    settings = json.loads((folder / "config.json").read_text())["settings"]
    recipe = vars(parse(["--config", str(ROOT / "recipes" / "real" / f"{name}.toml")]))
    assert {k: settings[k] for k in settings if k not in ("data", "output_dir")} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in recipe.items() if k not in ("data", "output_dir")
    }
    assert settings["output_dir"] == f"docs/real-models/{name}" and not Path(settings["data"]).is_absolute()
    assert (folder / "checkpoint").is_dir()
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.name != "samples.jsonl") < 400_000


def run_with(strict: float, flexible: float) -> dict[str, Any]:
    scores = {f"avg@1, {e}": {"paired": {"gain": g}} for e, g in (("strict", strict), ("flexible", flexible))}
    return {"results": {"scores": scores}}


@pytest.mark.parametrize(
    ("strict", "flexible", "says"),
    [
        (0.2, 0.05, "75% of the strict gain is format"),
        (0.2, -0.1, "100% of the strict gain is format"),
        (0.1, 0.12, "0% of the strict gain is format"),
        (-0.01, 0.1, "no strict gain, so none of it is format"),
    ],
)
def test_the_share_that_is_format(strict: float, flexible: float, says: str) -> None:
    assert TABLES["form"](run_with(strict, flexible)).endswith(f": {says}.")
