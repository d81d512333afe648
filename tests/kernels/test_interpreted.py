"""The Triton kernels on a CPU: tests/interpreted under Triton's interpreter, which needs a process of its own.

One process runs the folder; each of its tests is seen here by its name, and fails here with its own words.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[1] / "interpreted"
TESTS = [
    f"{path.stem}::{node.name}"
    for path in sorted(FOLDER.glob("test_*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """Of every test of the folder: its cases, each with what went wrong, if anything did."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=FOLDER.parents[1])
    assert done.returncode in (0, 1), f"the interpreted tests did not run:\n{done.stdout}{done.stderr}"
    found: dict[str, list[tuple[str, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = "".join(f"{part.get('message')}\n{part.text}" for part in case if part.tag in ("failure", "error", "skipped"))
        name = f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name'].partition('[')[0]}"
        found.setdefault(name, []).append((case.attrib["name"], wrong))
    return found


@pytest.mark.parametrize("test", TESTS)
def test_interpreted(test: str, outcomes: dict[str, list[tuple[str, str]]]) -> None:
    wrong = [f"{case}: {said}" for case, said in outcomes[test] if said]
    assert not wrong, "\n\n".join(wrong)


def test_nothing_of_the_folder_is_unseen(outcomes: dict[str, list[tuple[str, str]]]) -> None:
    assert TESTS and outcomes.keys() == set(TESTS)
