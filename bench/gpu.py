"""All that a GPU has to say of this checkout, most valuable first: bash bench/gpu.sh [first|second]

A supervisor without PyTorch starts a worker that runs the stages one after another, in one process, so that imports, weights
and graphs are paid for once. Every fact is a line of results.jsonl, written and synced before it is printed. A stage that
raises costs itself alone; one that hangs, dies or leaves a broken CUDA context costs its worker too, and a new worker goes on
with the next. Exit status 1 where a stage failed or had no time left; what was skipped says why.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.facts import Facts, Skipped

# Functions of bench.gpu_first, in the order of their worth, and the most seconds each may take on a GPU.
FIRST = {
    "card": 25,
    "verdicts": 140,
    "tiny": 80,  # where nothing was brought, this and the next compile a hundred kernels each
    "bf16": 55,
    "model": 25,
    "decode": 75,
    "graphs": 45,
    "step": 75,
    "profiles": 45,
    "training": 60,
    "csrc_build": 90,
    "csrc_proof": 90,
    "ops": 90,
}
SECOND = {  # of bench.gpu_second
    "peers": 120,
    "tests": 260,
    "sanitizer": 120,
    "cuda_backend": 60,
    "autotune": 60,
    "compiled": 90,
    "real_model": 60,
}
START_SECONDS = 90  # for a worker to import PyTorch and reach the device
ROOT = Path(__file__).parent.parent


# ---- the supervisor -----------------------------------------------------------------------------------------------------


def supervise(o: argparse.Namespace, stages: dict[str, float], facts: Facts) -> bool:
    """Run the stages, each within its seconds and all within o.seconds; whether none failed."""
    waiting, outcomes = list(stages), dict[str, str]()
    while waiting:
        lines: queue.Queue[str | None] = queue.Queue()
        worker = _start(o, waiting, facts.began, lines)
        at, deadline = "", time.monotonic() + START_SECONDS
        failure = ""
        try:
            while True:
                left = min(deadline, facts.began + o.seconds) - time.monotonic()
                line = lines.get(timeout=max(0.0, left))
                if line is None:
                    status = worker.wait()
                    failure = f"ended by signal {-status}" if status < 0 else f"exit status {status}" if status else ""
                    break
                print(line, flush=True)
                said = _fact(line)
                if said.get("began"):
                    at, deadline = said["stage"], time.monotonic() + stages[said["stage"]]
                elif at and said.get("stage") == at:
                    for outcome in ("ok", "failed", "skipped"):
                        if outcome in said:
                            outcomes[at] = outcome
        except queue.Empty:
            late = f"over its {stages.get(at, START_SECONDS):g} s"
            failure = late if deadline <= time.monotonic() else f"no time left: {o.seconds:g} s in all"
        finally:  # also on Ctrl-C and where a time limit of the caller's ends this process
            _end(worker)
        if not failure and at not in outcomes:
            failure = "its worker ended without a word of it"
        if failure and at not in outcomes:  # otherwise it died between two stages
            at = at or waiting[0]
            outcomes[at] = "failed"
            facts(at, failed=failure)
        waiting = [name for name in waiting if name not in outcomes]
        if time.monotonic() > facts.began + o.seconds - 5:
            for at in waiting:
                outcomes[at] = "failed"
                facts(at, failed="no time left")
            waiting = []
    count = {outcome: [name for name, found in outcomes.items() if found == outcome] for outcome in ("ok", "failed", "skipped")}
    facts("end", seconds=round(time.monotonic() - facts.began, 1), **count)
    print(", ".join(f"{len(names)} {outcome}" for outcome, names in count.items()), flush=True)
    return not count["failed"]


def _start(o: argparse.Namespace, names: Sequence[str], began: float, lines: "queue.Queue[str | None]") -> Any:
    flags = [x for name in ("device", "shape", "fail", "table") for x in (f"--{name}", getattr(o, name))]
    command = [sys.executable, "-m", "bench.gpu", o.call, "--worker", str(began), "--only", ",".join(names), *flags]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def read() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return worker


def _end(worker: "subprocess.Popen[str]") -> None:
    """With what it started: a compiler, a proof, a test."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _fact(line: str) -> dict[str, Any]:
    """The line as a fact; {} where it is a library's chatter."""
    try:
        said = json.loads(line) if line.startswith('{"stage":') else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


# ---- the worker ---------------------------------------------------------------------------------------------------------


def work(o: argparse.Namespace, facts: Facts) -> None:
    """Run stages in this process; ends it where a failed one left a device that no longer answers."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody else would end it if the supervisor were killed
    module = importlib.import_module(o.table or f"bench.gpu_{o.call}")  # whose Run is the stages' only argument
    run = module.Run(o.device, o.shape, facts)
    for name in o.only.split(","):
        facts(name, began=True)
        run.stage, began = name, time.monotonic()
        try:
            if name in o.fail.split(","):
                raise RuntimeError("injected")
            getattr(module, name)(run)
            facts(name, ok=True, seconds=round(time.monotonic() - began, 2))
        except Skipped as reason:
            facts(name, skipped=str(reason))
        except Exception as error:
            where = "".join(traceback.format_exception(error))[-1500:]
            facts(
                name, failed=f"{type(error).__name__}: {error}"[:500], where=where, seconds=round(time.monotonic() - began, 2)
            )
            del error
            run.check()  # raises where the device is lost, and this process with it
        run.release()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "call", nargs="?", default="first", choices=["first", "second"], help="the first stages, or the slower ones"
    )
    parser.add_argument("--only", default="", help="comma-separated stages; default: all of the call")
    parser.add_argument("--device", default="", help="default: cuda where nvidia-smi is, else cpu")
    parser.add_argument("--shape", default="", help="of the random model; default: qwen7b on a GPU, tiny on a CPU")
    parser.add_argument("--seconds", type=float, default=400, help="for all stages together")
    parser.add_argument("--fail", default="", help="stages that are to raise, to see that the others run")
    parser.add_argument("--table", default="", help="the module of the stages' functions; default: the call's own")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # when its supervisor began
    o = parser.parse_args(arguments)
    facts = Facts(
        Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu") / "results.jsonl", o.worker or time.monotonic()
    )
    if o.worker:
        work(o, facts)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    o.device = o.device or ("cuda" if shutil.which("nvidia-smi") else "cpu")
    o.shape = o.shape or ("qwen7b" if o.device == "cuda" else "tiny")
    own = importlib.import_module(o.table) if o.table else sys.modules[__name__]
    limits: dict[str, float] = getattr(own, o.call.upper())
    chosen = o.only.split(",") if o.only else list(limits)
    if unknown := set(chosen) - limits.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: the {o.call} call has {', '.join(limits)}")
    return 0 if supervise(o, {name: limits[name] for name in chosen}, facts) else 1


if __name__ == "__main__":
    sys.exit(main())
