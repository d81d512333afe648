"""Which implementation an op uses on a device, and the proof it needs first.

On a GPU an op runs its Triton kernel only after a child process has matched it against its reference on that very device.
Never in this process: a wrong barrier hangs for ever and an illegal address poisons the CUDA context. The child prints one
verdict an op (`self_check`); where it hangs or dies, the op it was at has failed and a new child goes on with the next.
Verdicts are cached on disk under everything they depend on. A failed op runs as plain PyTorch, and says so once.
"""

import hashlib
import importlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora.errors import BuildError, InputError
from tinylora.files import cache_dir, write_text
from tinylora.kernels import native

if TYPE_CHECKING:
    from tinylora.kernels.correction import Correction

# reference, addmm: plain PyTorch, the correction as a second product on plain weights. padded, triton, cuda: Triton row
# kernels, and the frozen linear as one product over padded buffers, as the fused Triton kernel, as the CUDA decode kernel.
# native, on a CPU: C row kernels and attention, and the frozen linear as one product over padded buffers.
BACKENDS = ("reference", "addmm", "native", "padded", "triton", "cuda")
CHECKS = "tinylora.kernels.self_check:CHECKS"
CUDA_CHECKS = "tinylora.kernels.self_check:CUDA_CHECKS"
NATIVE_CHECKS = "tinylora.kernels.self_check:NATIVE_CHECKS"
START_SECONDS = 180.0  # for a child to import PyTorch and reach the device; an op's own time begins after that
KERNELS = Path(__file__).parent

Verdict = dict[str, Any]  # "op", "error" (None: it may run), and what the child measured
_verdicts: dict[torch.device, dict[str, Verdict]] = {}


def backend(device_type: str) -> str:
    """TINYLORA_BACKEND where it is set; otherwise native on a CPU and padded on a GPU. InputError for an unknown name."""
    name = os.environ.get("TINYLORA_BACKEND") or ("padded" if device_type == "cuda" else "native")
    if name not in BACKENDS:
        raise InputError(f"TINYLORA_BACKEND={name}: choose one of {', '.join(BACKENDS)}")
    if name == "native" and device_type == "cuda":
        raise InputError("TINYLORA_BACKEND=native: these kernels are a CPU's; leave it out, or choose padded")
    return name


def _wants_native(device_type: str) -> bool:
    """Not where Triton is interpreted: the checks are then of its kernels."""
    return device_type == "cpu" and backend("cpu") == "native" and os.environ.get("TRITON_INTERPRET") != "1"


def runs_native(op: str, x: Tensor, *widths: int, c: "Correction | None" = None) -> bool:
    """Whether `op` runs its C kernel on rows like x, of these widths and with this correction, once that is proven."""
    return _wants_native(x.device.type) and native.fits(x, *widths) and (c is None or c.fits_native) and _proven(op, x.device)


def choose(
    op: str,
    x: Tensor,
    native_op: Callable[..., Any],
    triton_op: Callable[..., Any],
    plain_op: Callable[..., Any],
    *widths: int,
    c: "Correction | None" = None,
) -> Callable[..., Any]:
    """The implementation of `op` on rows like x, of these widths and with this correction."""
    if runs_native(op, x, *widths, c=c):
        return native_op
    return triton_op if runs_triton(op, x) else plain_op


def _wants_triton(device_type: str) -> bool:
    """Whether the backend has Triton kernels at all there. A CPU has them only interpreted, for tests."""
    if device_type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and backend("cpu") in ("padded", "triton")
    return device_type == "cuda" and backend("cuda") in ("padded", "triton", "cuda")


def runs_triton(op: str, x: Tensor) -> bool:
    """Whether `op` runs its Triton kernel on tensors like x: its verdict, which `prove` must have brought before a capture.

    RuntimeError where a verdict is missing while a CUDA graph is being captured.
    """
    if not _wants_triton(x.device.type):
        return False
    if x.device.type == "cpu":
        return True  # the tests that interpret kernels are their proof
    return x.dtype != torch.float64 and _proven(op, x.device)  # no kernel computes in fp64


def runs_cuda(op: str, x: Tensor) -> bool:
    """The same of an op's CUDA C++ kernel, which TINYLORA_BACKEND=cuda alone asks for; compiled before it is proven."""
    return x.device.type == "cuda" and backend("cuda") == "cuda" and _proven(op, x.device, compiled=True)


def _proven(op: str, device: torch.device, compiled: bool = False) -> bool:
    verdicts = _verdicts.get(device)
    if verdicts is None or (compiled and op not in verdicts):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op} is being captured into a CUDA graph unproven; call dispatch.prove(device) before")
        verdicts = prove(device)
    if op not in verdicts:
        verdicts[op] = {"op": op, "error": "self_check.CHECKS has no check of it"}
        _report(verdicts[op], device)
    return verdicts[op]["error"] is None


def prove(device: torch.device, checks: str = CHECKS) -> dict[str, Verdict]:
    """The verdict on every op of `checks` ("module:NAME") on a device, from this process, the cache, or child processes.

    Takes minutes at worst, the first time: call it at start, before any CUDA graph is captured. Nothing where the backend
    is plain PyTorch; where it is cuda, the CUDA C++ kernels are compiled and proven too. Failed ops are reported on stderr
    once.
    """
    if not _wants_triton(device.type) and not _wants_native(device.type):
        return {}
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if _wants_native(device.type) and checks == CHECKS:
        checks = NATIVE_CHECKS
    known = _verdicts.setdefault(device, {})
    found = {} if known else _checked(device, checks)
    if device.type == "cuda" and backend("cuda") == "cuda" and checks == CHECKS and "decode_linear" not in known:
        found |= _checked(device, CUDA_CHECKS)
    known |= found
    for verdict in found.values():
        if verdict["error"] is not None and "told" not in verdict:
            _report(verdict, device)
    return known


def _checked(device: torch.device, checks: str) -> dict[str, Verdict]:
    """What has to be compiled is compiled here, not in the child, whose time is limited."""
    from tinylora.kernels import build  # not above: it is a command too, and the package must not have imported it by then

    if checks == CUDA_CHECKS:
        try:
            build.library([build.architecture(device)])
        except BuildError as error:
            return {"decode_linear": {"op": "decode_linear", "error": f"it was not compiled: {error}"}}
    if checks == NATIVE_CHECKS:
        try:
            native.functions()
        except BuildError as error:
            print(f"tinylora: no C kernels on the CPU, plain PyTorch takes their place: {error}", file=sys.stderr)
            names = importlib.import_module(checks.split(":")[0]).NATIVE_CHECKS
            return {op: {"op": op, "error": "it was not compiled", "told": True} for op in names}
    return _cached_or_checked(device, checks)


def _report(verdict: Verdict, device: torch.device) -> None:
    op, override = verdict["op"], os.environ.get("TINYLORA_BACKEND")
    lead = f"TINYLORA_BACKEND={override} cannot be honoured: " if override else ""
    if op == "decode_linear":
        where, instead = f" --checks {CUDA_CHECKS}", "the padded product and its row kernels"
    else:
        where, instead = f" --checks {NATIVE_CHECKS}" if _wants_native(device.type) else "", "plain PyTorch"
    print(
        f"tinylora: {lead}{op} runs as {instead} on {device}, because its kernel failed the self-check "
        f"({verdict['error']}). More: python -m tinylora.kernels.self_check --device {device}{where} --ops {op}. "
        f"To check again: delete {cache_dir()}/self-check-*.json",
        file=sys.stderr,
    )


def _cached_or_checked(device: torch.device, checks: str) -> dict[str, Verdict]:
    module, name = checks.split(":")
    ops = list(getattr(importlib.import_module(module), name))
    conditions = _conditions(device, checks)
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / f"self-check-{key}.json"
    try:
        stored: dict[str, Verdict] = {v["op"]: v for v in json.loads(path.read_text())["verdicts"] if "error" in v}
        if stored.keys() == set(ops):
            return stored
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"tinylora: ignoring the unreadable {path}: {error}", file=sys.stderr)
    verdicts, started = _check_in_children(device, checks, ops)
    if started:  # a child that could not even start says nothing about the kernels
        try:
            write_text(path, json.dumps({"conditions": conditions, "verdicts": list(verdicts.values())}, indent=1))
        except OSError as error:
            print(f"tinylora: the self-check's verdicts are not cached: {error}", file=sys.stderr)
    return verdicts


def _conditions(device: torch.device, checks: str) -> dict[str, Any]:
    """Everything a verdict depends on. Not the backend: a check calls its kernel directly."""
    import triton

    from tinylora.kernels import build

    sources = hashlib.sha256()
    for file in [*sorted(KERNELS.rglob("*.py")), importlib.import_module(checks.split(":")[0]).__file__]:
        sources.update(Path(str(file)).read_bytes())
    conditions = {
        "sources": sources.hexdigest(),
        "checks": checks,
        "flags": {k: v for k, v in os.environ.items() if k.startswith("TRITON_") and not k.endswith("_DIR")},
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": device.type,
    }
    if checks == NATIVE_CHECKS:
        conditions["library"] = native.identity()
    if checks == CUDA_CHECKS:
        conditions["library"] = build.library([build.architecture(device)]).name
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        conditions["gpu"] = torch.cuda.get_device_name(device)
        conditions["capability"] = torch.cuda.get_device_capability(device)
        conditions["driver"] = driver.read_text().splitlines()[0] if driver.exists() else None
    return conditions


def _check_in_children(device: torch.device, checks: str, ops: Sequence[str]) -> tuple[dict[str, Verdict], bool]:
    """A verdict on each op, and whether every child came as far as the device."""
    limit = _seconds_per_op()
    verdicts: dict[str, Verdict] = {}
    waiting = list(ops)
    while waiting:
        with tempfile.TemporaryFile("w+") as errors:
            child, lines = _start(device, checks, waiting, errors)
            at, failure = "start", ""
            try:
                for at in ("start", *waiting):
                    verdict = lines.get(timeout=START_SECONDS if at == "start" else limit)
                    if verdict is None:
                        failure = _last_words(child, errors, limit)
                        break
                    if at != "start":
                        verdicts[at] = verdict
            except (queue.Empty, subprocess.TimeoutExpired):
                failure = "no answer within its time limit" if at == "start" else f"no answer within {limit:g} s"
            finally:  # also on Ctrl-C: a hung kernel would keep the GPU
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if failure and at == "start":
            return verdicts | {op: {"op": op, "error": f"the check did not start: {failure}"} for op in waiting}, False
        if failure:
            verdicts[at] = {"op": at, "error": failure}
        waiting = waiting[waiting.index(at) + 1 :]
    return verdicts, True


def _seconds_per_op() -> float:
    value = os.environ.get("TINYLORA_SELF_CHECK_SECONDS") or "120"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise InputError(f"TINYLORA_SELF_CHECK_SECONDS={value}: it must be a positive number of seconds")
    return seconds


def _start(
    device: torch.device, checks: str, ops: Sequence[str], errors: IO[str]
) -> tuple[subprocess.Popen[str], "queue.Queue[Verdict | None]"]:
    """A child at work on `ops`, and a queue of its verdicts; None is its end."""
    command = [sys.executable, "-m", "tinylora.kernels.self_check", "--device", str(device), "--checks", checks]
    path = [str(KERNELS.parent.parent), os.environ.get("PYTHONPATH", "")]
    child = subprocess.Popen(
        [*command, "--ops", ",".join(ops)],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        start_new_session=True,  # so that what it started, a compiler say, can be ended with it
    )
    lines: queue.Queue[Verdict | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith('{"op":'):  # anything else is a kernel's or a library's chatter
                lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return child, lines


def _last_words(child: "subprocess.Popen[str]", errors: IO[str], limit: float) -> str:
    status = child.wait(timeout=limit)
    errors.seek(0)
    said = [line.strip() for line in errors.read().splitlines() if line.strip()]
    ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}: {said[-1][:300]}" if said else ended
