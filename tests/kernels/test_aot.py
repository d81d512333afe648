"""Every Triton kernel compiles for three generations of GPUs, within its budget and with the instructions it is built on."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "tinylora" / "kernels"


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "aot.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(report: dict) -> list[str]:
    """What is wrong with one compiled kernel."""
    opcodes, expected = report["opcodes"], report["expected"]
    spills = opcodes.get("LDL", 0) + opcodes.get("STL", 0)
    # ptxas gives a healthy tcgen05 kernel on sm_100 a few bytes of stack; elsewhere any local memory is a spill.
    found = [f"{spills} local loads and stores"] if spills > (4 if report["architecture"] == 100 else 0) else []
    found += [f"{report[k]} {k}, budget {expected[k]}" for k in ("registers", "shared") if report[k] > expected[k]]
    found += [f"no {name}" for name in expected["needs"] if name not in opcodes]
    return found + [f"{name}, which it must not use" for name in expected["forbids"] if name in opcodes]


def test_every_kernel_is_within_its_budget(reports):
    bad = []
    for report in reports:
        opcodes = " ".join(f"{name} {count}" for name, count in report["opcodes"].items())
        line = (
            f"sm_{report['architecture']:<3} {report['case']:<32} {report['kernel']:<16} registers {report['registers']:>3} "
            f"shared {report['shared']:>6} instructions {report['instructions']:>5} {opcodes}"
        )
        print(line)
        bad += [f"{line}: {fault}" for fault in faults(report)]
    assert not bad, "\n".join(bad)


def test_every_kernel_is_compiled(reports):
    """The kernels in tinylora/kernels, for each architecture: functions under @triton.jit that no other such one calls."""
    jitted = [
        (path.stem, node)
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    called = {ast.unparse(node.func) for _, f in jitted for node in ast.walk(f) if isinstance(node, ast.Call)}
    kernels = {(module, f.name) for module, f in jitted if f.name not in called}
    for architecture in (80, 90, 100):
        wanted = kernels - {("fused_linear", "_tma")} if architecture == 80 else kernels
        assert wanted == {(r["module"], r["kernel"]) for r in reports if r["architecture"] == architecture}


def test_faults_are_found():
    """A report of each kind of fault, so that the test above is known to be able to fail."""
    report = {
        "architecture": 90,
        "registers": 64,
        "shared": 1024,
        "opcodes": {"HGMMA": 4},
        "expected": {"registers": 64, "shared": 1024, "needs": ["HGMMA"], "forbids": ["HMMA"]},
    }
    assert not faults(report)
    for change in (
        {"registers": 65},
        {"shared": 1025},
        {"opcodes": {}},
        {"opcodes": {"HGMMA": 4, "STL": 1}},
        {"opcodes": {"HGMMA": 4, "HMMA": 1}},
    ):
        assert len(faults(report | change)) == 1, change
    four = report | {"opcodes": {"HGMMA": 4, "STL": 2, "LDL": 2}}
    assert faults(four) and not faults(four | {"architecture": 100})
    assert faults(four | {"architecture": 100, "opcodes": {"HGMMA": 4, "LDL": 5}})
