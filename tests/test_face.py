"""What an import costs and needs: the face and grading load no PyTorch, and no file needs Triton to be imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from house import modules

import tinylora

ROOT = Path(__file__).parent.parent
REFUSE = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is refused")
sys.meta_path.insert(0, Refused())
"""


def without(names: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which these packages cannot be imported."""
    whole = REFUSE.format(names=names) + code
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.parametrize("module", ["tinylora", "tinylora.cli", "tinylora.tasks.grading", "tinylora.tasks.grader"])
def test_the_face_and_grading_load_no_torch(module: str) -> None:
    done = without(["torch", "triton", "transformers", "numpy"], f"import {module}\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_importing_the_face_takes_no_time() -> None:
    """0.3 s of the interpreter's own count, in the best of three processes; 0.01 s where this was written."""
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import tinylora"], capture_output=True, text=True, cwd=ROOT
        )
        line = next(line for line in done.stderr.splitlines() if line.endswith("| tinylora"))
        seconds.append(int(line.split("|")[1]) / 1e6)
    assert min(seconds) < 0.3


def test_every_file_imports_without_triton_and_training_runs() -> None:
    """Matplotlib's and PEFT's files are no exception: both are imported where they are used."""
    drawn = {f"tinylora.studies.{name}" for name in ("canvas", "run_figures", "study_figures")}
    names = [name for name in modules(ROOT) if name not in {*drawn, "tinylora.demo.pretrain"}]
    code = f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
assert "triton" not in sys.modules
from tinylora.engine.generate import generate
from tinylora import load_model
found = generate(load_model("builtin", "cpu"), [[1, 2, 3]])
assert len(found) == 1 and found[0].tokens
"""
    done = without(["triton"], code)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_face_is_there() -> None:
    assert set(tinylora.__all__) == set(tinylora.PLACES)
    for name in tinylora.__all__:
        assert getattr(tinylora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tinylora.nothing  # noqa: B018
