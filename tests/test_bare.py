"""The environment of a bare GPU machine, imitated: no tyro, math-verify, datasets, trl or gguf, and no git on PATH.

bench/README.md says how the real one is made, and runs these tests in it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu

ROOT = Path(__file__).parent.parent
MISSING = ("tyro", "math_verify", "datasets", "trl", "gguf")
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("tinylora", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

# In the child's sitecustomize, so that its own children have it too.
REFUSE = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (as on a bare machine)", name=name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment variables of such a machine."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(REFUSE)
    (tmp_path / "bin").mkdir()
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for tool in folder.iterdir() if folder.is_dir() else ():
            if tool.name not in ("git", "python3") and not (tmp_path / "bin" / tool.name).is_symlink():
                (tmp_path / "bin" / tool.name).symlink_to(tool)
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "PATH": str(tmp_path / "bin")}


def python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


def test_the_imitation_refuses(bare: dict[str, str]) -> None:
    """Also in what a child starts; git is not found."""
    for name in MISSING:
        code = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import {name}']).returncode)"
        done = python(code, bare)
        assert done.returncode == 1 and "as on a bare machine" in done.stderr, name
    assert "FileNotFoundError" in python("import subprocess; subprocess.run(['git'])", bare).stderr


def test_every_module_is_imported(bare: dict[str, str]) -> None:
    code = f"""
import importlib, json
failed = {{}}
for name in {MODULES!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
print(json.dumps(failed))
"""
    done = python(code, bare)
    assert json.loads(done.stdout.splitlines()[-1]) == {}, done.stderr


def test_a_card_without_git(bare: dict[str, str]) -> None:
    code = "import json; from bench.measure import card; print(json.dumps(card()))"
    assert json.loads(python(code, bare).stdout)["commit"] is None
    assert json.loads(python(code, {**bare, "TINYLORA_COMMIT": "abc1234"}).stdout)["commit"] == "abc1234"


ROWS = "".join(json.dumps({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(20))


def test_an_own_reward_needs_no_grader_and_the_tasks_own_says_what_it_lacks(bare: dict[str, str], tmp_path: Path) -> None:
    """Two steps on rows with answers. Without a reward of one's own, math-verify is named in one line."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "site" / "own_rewards.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    code = f"""
import sys
from tinylora.errors import InputError
from tinylora.rl.config import TrainConfig
from tinylora.rl.trainer import Trainer
reward = sys.argv[1] if len(sys.argv) > 1 else None
settings = dict(model="builtin", dataset="gsm8k", data={str(tmp_path / "rows.jsonl")!r}, eval_size=0, max_steps=2)
settings |= dict(prompts_per_step=2, num_generations=2, max_completion_length=8, output_dir={str(tmp_path)!r} + str(reward))
try:
    Trainer(TrainConfig(reward=reward, **settings)).train()
    print("trained")
except InputError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    for arguments, says in ((["own_rewards:one"], "trained"), ([], "No module named 'math_verify'")):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=bare, cwd=ROOT, timeout=300)
        assert done.returncode == 0 and says in done.stdout.splitlines()[-1], done.stdout + done.stderr


def test_gpu_tests_are_collected(bare: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--co", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, env=bare, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("tests/test_gpu.py::") > 80


def test_gpu_tests_do_what_they_say_on_a_cpu(bare: dict[str, str]) -> None:
    """Their own code, with plain PyTorch in the kernels' place: what needs a GPU skips, the rest passes."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    environment = {**bare, "TINYLORA_GPU_TESTS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    passed, skipped = re.search(r"(\d+) passed, (\d+) skipped", done.stdout).groups()  # type: ignore[union-attr]
    assert int(passed) > 25 and int(skipped) > 50


# ---- the driver ---------------------------------------------------------------------------------------------------------

FIRST = ("card", "verdicts", "tiny", "model", "decode", "step", "training", "csrc_build", "ops")
SKIPPED = {
    "bf16": "the bf16 kernels are a GPU's; this device is a cpu",
    "graphs": "CUDA graphs; this device is a cpu",
    "profiles": "kernel times are a GPU profiler's; this device is a cpu",
    "csrc_proof": "the CUDA C++ kernel is a GPU's; this device is a cpu",
}
SECOND = ("peers", "compiled")
SKIPPED_SECOND = {
    "tests": "every one of its tests does",
    "sanitizer": "compute-sanitizer runs GPU code; this device is a cpu",
    "cuda_backend": "the CUDA C++ kernel is a GPU's; this device is a cpu",
    "autotune": "the fused linear's tiles are a GPU's; this device is a cpu",
    "real_model": "TINYLORA_REAL_MODEL names no directory",
}


def driven(bare: dict[str, str], out: Path, *arguments: str) -> tuple[int, list[dict]]:
    """bench/gpu.sh at tiny shapes on a CPU: its exit status, and what it left."""
    command = ["bash", "bench/gpu.sh", *arguments]
    environment = {**bare, "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert sorted(p.name for p in out.iterdir()) == ["log.txt", "results.jsonl"], done.stderr
    assert (out / "log.txt").read_text() == done.stdout
    return done.returncode, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def ended(facts: list[dict], outcome: str) -> dict[str, object]:
    """What the facts say of the stages that ended so."""
    return {f["stage"]: f[outcome] for f in facts if outcome in f and f["stage"] != "end"}


def numeric(facts: list[dict]) -> set[str]:
    """The stages that left a number beside their bookkeeping."""

    def measured(fact: dict) -> bool:
        return any(isinstance(v, int | float) and not isinstance(v, bool) and k != "at" for k, v in fact.items())

    own = {"ok", "failed", "skipped", "began"}
    return {f["stage"] for f in facts if measured(f) and not own & f.keys() and f["stage"] != "machine"}


@pytest.mark.parametrize(("call", "ran", "skipped"), [("first", FIRST, SKIPPED), ("second", SECOND, SKIPPED_SECOND)])
def test_the_driver_ends_green(call, ran, skipped, bare: dict[str, str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What it skips is this list and says why; every other stage leaves a number."""
    status, facts = driven(bare, tmp_path / "out", call)
    if "csrc_build" in ran and not (tmp_path / "bin" / "nvcc").exists():
        ran, skipped = [n for n in ran if n != "csrc_build"], {**skipped, "csrc_build": ended(facts, "skipped")["csrc_build"]}
    assert ended(facts, "skipped") == skipped
    assert status == 0, ended(facts, "failed")
    assert list(ended(facts, "ok")) == list(ran)
    assert numeric(facts) - skipped.keys() == set(ran)
    assert facts[-1]["stage"] == "end" and facts[-1]["failed"] == []


@pytest.mark.parametrize("which", [0, 1])
def test_an_injected_failure_leaves_the_others_running(which: int, bare: dict[str, str], tmp_path: Path) -> None:
    """In every second stage, then in the others: each fails once while its neighbours run, and the end is red."""
    broken = list(gpu.FIRST)[which::2]
    status, facts = driven(bare, tmp_path / "out", "first", "--fail", ",".join(broken))
    assert status == 1
    assert list(ended(facts, "ok")) == [n for n in FIRST if n not in broken]
    assert list(ended(facts, "skipped")) == [n for n in gpu.FIRST if n in SKIPPED and n not in broken]
    assert ended(facts, "failed") == dict.fromkeys(broken, "RuntimeError: injected")


def test_a_failure_in_the_second_call(bare: dict[str, str], tmp_path: Path) -> None:
    broken = list(gpu.SECOND)[:-1]
    status, facts = driven(bare, tmp_path / "out", "second", "--fail", ",".join(broken))
    assert status == 1 and list(ended(facts, "skipped")) == ["real_model"]
    assert ended(facts, "failed") == dict.fromkeys(broken, "RuntimeError: injected")
