"""bench.gpu's supervisor and its facts, on toy stages: what hangs or dies costs itself alone, and no printed line is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench import gpu, gpu_first, gpu_second

ROOT = Path(__file__).parents[2]


def environment(out: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OUT": str(out), "PYTHONPATH": path}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", *arguments, "--device", "cpu", "--table", "toy_stages"]


def driven(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """What a run of the driver printed, and the facts it left."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(out), timeout=120)
    return done, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def ended(process: int) -> bool:
    """Whether a process is gone, or waits for nobody but its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_stage_costs_itself_alone(tmp_path: Path) -> None:
    """It raises, hangs, dies or loses the device: each says which, what follows runs, and what a hung one started is ended."""
    done, facts = driven(tmp_path)
    outcomes = {
        f["stage"]: f.get("failed", f.get("skipped", "ok")) for f in facts[:-1] if {"ok", "failed", "skipped"} & f.keys()
    }
    assert outcomes == {
        "right": "ok",
        "raises": "ValueError: no such shape",
        "skips": "nothing to do here",
        "hangs": "over its 2 s",
        "aborts": "ended by signal 6",
        "leaves": "its worker ended without a word of it",
        "loses_the_device": "RuntimeError: CUDA error",
        "last": "ok",
    }
    assert done.returncode == 1
    assert facts[-1]["ok"] == ["right", "last"] and facts[-1]["skipped"] == ["skips"] and len(facts[-1]["failed"]) == 5
    assert done.stdout.splitlines()[-1] == "2 ok, 5 failed, 1 skipped"
    (child,) = (f["child"] for f in facts if "child" in f)
    assert ended(child)
    assert len({f["process"] for f in facts if "process" in f}) == 2, "a new worker after those that were lost"


def test_all_stages_right_is_green(tmp_path: Path) -> None:
    done, _ = driven(tmp_path, "--only", "right,skips,last")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "2 ok, 0 failed, 1 skipped"
    assert "a library's chatter" in done.stdout


def test_what_has_no_time_left_is_red(tmp_path: Path) -> None:
    """The hung stage takes all seconds there are; those after it say so."""
    began = time.monotonic()
    done, said = driven(tmp_path, "--only", "hangs,last", "--seconds", "1.5")
    assert done.returncode == 1 and time.monotonic() - began < 20
    failed = {f["stage"]: f["failed"] for f in said[:-1] if "failed" in f}
    assert failed["last"] == "no time left" and failed["hangs"].startswith(("no time left", "over its"))


def test_what_was_printed_is_on_disk_whenever_it_is_killed(tmp_path: Path) -> None:
    """SIGKILL at ten random moments of a stage that says something all the time; its worker ends with it."""
    draw = random.Random(0)
    for turn in range(10):
        out = tmp_path / str(turn)
        process = subprocess.Popen(
            command("second"), stdout=subprocess.PIPE, text=True, env=environment(out), start_new_session=True
        )
        assert process.stdout is not None
        printed = [process.stdout.readline()]  # the worker is there
        until = time.monotonic() + draw.random() / 4
        while time.monotonic() < until:
            printed.append(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        printed += process.stdout.readlines()
        process.wait()
        whole = [line for line in printed if line.startswith('{"stage"') and line.endswith("}\n")]
        text = (out / "results.jsonl").read_text()
        lines = text.splitlines(keepends=True)
        assert whole and set(whole) <= set(lines)
        assert all(json.loads(line) for line in lines[:-1]), "no line is torn but perhaps the last"
        time.sleep(0.1)
        assert (out / "results.jsonl").read_text().startswith(text)
        size = (out / "results.jsonl").stat().st_size
        time.sleep(0.2)
        assert (out / "results.jsonl").stat().st_size == size, "the worker outlived its supervisor"


def test_every_stage_of_the_tables_is_a_function() -> None:
    for table, module in ((gpu.FIRST, gpu_first), (gpu.SECOND, gpu_second)):
        assert all(callable(getattr(module, name)) and getattr(module, name).__doc__ for name in table)
    assert sum(gpu.FIRST[n] for n in ("card", "verdicts", "tiny", "bf16", "model", "decode")) <= 400


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    done = subprocess.run(command("--only", "rigth"), capture_output=True, text=True, env=environment(tmp_path), timeout=60)
    assert done.returncode == 2 and "--only rigth: the first call has right, raises" in done.stderr
