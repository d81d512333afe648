"""Which implementation an op uses on a device, and the proof it needs first.

On a GPU an op runs its Triton kernel only after a child process has matched it against its reference on that very device, and
in that dtype (`proof`). A failed op runs as plain PyTorch in that dtype, and says so once.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinylora.errors import BuildError, InputError
from tinylora.kernels import library, native
from tinylora.kernels.children import Task, Verdict
from tinylora.kernels.correction import Correction
from tinylora.kernels.proof import CHECKS, CUDA_CHECKS, NATIVE_CHECKS, cached_or_checked, name_of, tasks_of, verdict_file

# addmm: plain PyTorch, the correction as a second product on plain weights. padded, triton, cuda: Triton row
# kernels, and the frozen linear as one product over padded buffers, as the fused Triton kernel, as the CUDA decode kernel.
# native, on a CPU: C row kernels and attention, and the frozen linear as one product over padded buffers.
BACKENDS = ("addmm", "native", "padded", "triton", "cuda")

_verdicts: dict[torch.device, dict[Task, Verdict]] = {}


def backend(device_type: str) -> str:
    """TINYLORA_BACKEND where it is set; otherwise native on a CPU and padded on a GPU. InputError for an unknown name."""
    name = os.environ.get("TINYLORA_BACKEND") or ("padded" if device_type == "cuda" else "native")
    if name == "reference":
        raise InputError("TINYLORA_BACKEND=reference is gone; addmm is plain PyTorch too")
    if name not in BACKENDS:
        raise InputError(f"TINYLORA_BACKEND={name}: choose one of {', '.join(BACKENDS)}")
    if name == "native" and device_type == "cuda":
        raise InputError("TINYLORA_BACKEND=native: these kernels are a CPU's; leave it out, or choose padded")
    return name


def _wants_native(device_type: str) -> bool:
    """Not where Triton is interpreted: the checks are then of its kernels."""
    return device_type == "cpu" and backend("cpu") == "native" and os.environ.get("TRITON_INTERPRET") != "1"


def runs_native(op: str, x: Tensor, *widths: int, c: Correction | None = None) -> bool:
    """Whether `op` runs its C kernel on rows like x, of these widths and with this correction, once that is proven."""
    return _wants_native(x.device.type) and native.takes(x, *widths, c=c) and _proven(op, x)


def choose(
    op: str,
    x: Tensor,
    native_op: Callable[..., Any],
    triton_op: Callable[..., Any],
    plain_op: Callable[..., Any],
    *widths: int,
    c: Correction | None = None,
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
    """Whether `op` runs its Triton kernel on tensors like x: its verdict in x's dtype, which `prove` must have brought before
    a capture.

    RuntimeError where a verdict is missing while a CUDA graph is being captured.
    """
    if not _wants_triton(x.device.type):
        return False
    if x.device.type == "cpu":
        return True  # the tests that interpret kernels are their proof
    return x.dtype != torch.float64 and _proven(op, x)  # no kernel computes in fp64


def runs_cuda(op: str, x: Tensor) -> bool:
    """The same of an op's CUDA C++ kernel, which TINYLORA_BACKEND=cuda alone asks for; compiled before it is proven."""
    return x.device.type == "cuda" and backend("cuda") == "cuda" and _proven(op, x, compiled=True)


def _proven(op: str, x: Tensor, compiled: bool = False) -> bool:
    device, task = x.device, (op, name_of(x.dtype))
    verdicts = _verdicts.get(device)
    if verdicts is None or (compiled and task not in verdicts):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op} is being captured into a CUDA graph unproven; call dispatch.prove(device) before")
        verdicts = prove(device)
    if task not in verdicts:
        error = "no check of its kernel has this dtype"
        verdicts[task] = {"op": op, "dtype": task[1], "error": error}
        _report(op, {task[1]: error}, device)
    return verdicts[task]["error"] is None


def prove(
    device: torch.device,
    checks: str = CHECKS,  # "module:NAME"
    watch: Callable[[Verdict], None] = lambda _: None,  # called with each of the children's as it comes
) -> dict[Task, Verdict]:
    """The verdict on every op and dtype of `checks` on a device: this process's, the cache's, or children's.

    Takes a minute or two where the cache has none, and says so on stderr first: call it at start, before any CUDA graph is
    captured. Nothing where the backend is plain PyTorch; where it is cuda, the CUDA C++ kernels are compiled and proven too.
    Failed ops are reported on stderr once.
    """
    if not _wants_triton(device.type) and not _wants_native(device.type):
        return {}
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if _wants_native(device.type) and checks == CHECKS:
        checks = NATIVE_CHECKS
    known = _verdicts.setdefault(device, {})
    found = {} if known else _checked(device, checks, watch)
    if device.type == "cuda" and backend("cuda") == "cuda" and checks == CHECKS:
        found |= {} if any(op == "decode_linear" for op, _ in known) else _checked(device, CUDA_CHECKS, watch)
    known |= found
    failed: dict[str, dict[str, str]] = {}  # op -> dtype -> what is wrong
    for (op, dtype), verdict in found.items():
        if verdict["error"] is not None and "told" not in verdict:
            failed.setdefault(op, {})[dtype] = verdict["error"]
    for op, errors in failed.items():
        _report(op, errors, device)
    return known


def _checked(device: torch.device, checks: str, watch: Callable[[Verdict], None]) -> dict[Task, Verdict]:
    """What has to be compiled by a compiler of the machine is compiled here, not in a child, whose time is limited."""

    def none(error: str, **more: Any) -> dict[Task, Verdict]:
        return {(op, dtype): {"op": op, "dtype": dtype, "error": error, **more} for op, dtype in tasks_of(checks, device)}

    if checks == CUDA_CHECKS:
        try:
            library.cuda_library([library.architecture(device)])
        except BuildError as error:
            return none(f"it was not compiled: {error}")
    if checks == NATIVE_CHECKS:
        try:
            native.functions()
        except BuildError as error:
            print(f"tinylora: no C kernels on the CPU, plain PyTorch takes their place: {error}", file=sys.stderr)
            return none("it was not compiled", told=True)
    return cached_or_checked(device, checks, watch)


def _report(op: str, errors: dict[str, str], device: torch.device) -> None:
    """errors: by dtype, of one op."""
    override, said = os.environ.get("TINYLORA_BACKEND"), list(dict.fromkeys(errors.values()))
    lead = f"TINYLORA_BACKEND={override} cannot be honoured: " if override else ""
    if op == "decode_linear":
        where, instead = f" --checks {CUDA_CHECKS}", "the padded product and its row kernels"
    else:
        where, instead = f" --checks {NATIVE_CHECKS}" if _wants_native(device.type) else "", "plain PyTorch"
    print(
        f"tinylora: {lead}{op} runs as {instead} on {device} in {', '.join(errors)}, because its kernel failed the self-check "
        f"({'; '.join(said)}). More: python -m tinylora.kernels.self_check --device {device}{where} --ops {op}. "
        f"To check again: delete {verdict_file('*')}",
        file=sys.stderr,
    )
