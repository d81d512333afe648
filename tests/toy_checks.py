"""Checks of a toy kernel for test_dispatch.py: one that is right, and one for each way a kernel can be wrong."""

import os
import time
from pathlib import Path

import torch
import triton
import triton.language as tl

from tinylora.kernels.launch import launch

calls = []


@triton.jit
def affine(x, y, n, factor, spin, BLOCK: tl.constexpr):
    """y = factor * x + 1 for x (n,); with spin > 0 it never ends, as with a barrier that is never reached."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    while spin > 0:
        spin += 0
    tl.store(y + i, factor * tl.load(x + i, i < n, 0.0) + 1, i < n)


def ours(x, factor=3.0, spin=0, programs=None):
    y = torch.empty_like(x)
    launch(affine, (programs or triton.cdiv(len(x), 16),), x, y, len(x), factor, spin, BLOCK=16)
    return y


def case(function):
    """The check of an op that computes 3 x + 1 with `function`."""

    def check(device, dtype, seed):
        x = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)
        yield "40 numbers", function(x), 3 * x + 1, 3 * x.double() + 1

    return check


def unsteady(x):
    """Within rounding, and different bits each time."""
    calls.append(1)
    y = ours(x)
    return y * (1 + len(calls) % 2 * torch.finfo(x.dtype).eps)


def abort(x):
    os.abort()


def leave(x):
    os._exit(0)


def complain(x):
    raise ValueError("tile too large")


def chatter(x):
    print("compiling\n{}\nnull")
    return ours(x)


def wide_only(x):
    if x.dtype == torch.float16:
        os.abort()
    return ours(x)


def half_only(x):
    return ours(x, 3.0001 if x.dtype == torch.float32 else 3.0)


def meets(name, other):
    """Waits until the other one is there too."""

    def run(x):
        folder = Path(os.environ["TOY_FOLDER"])
        (folder / name).touch()
        while not (folder / other).exists():
            time.sleep(0.02)
        time.sleep(0.1)
        (folder / name).unlink(missing_ok=True)  # the next dtype waits again
        return ours(x)

    return run


def crowded(x):
    """Has no memory the first time, when it runs beside another."""
    seen = Path(os.environ["TOY_FOLDER"]) / "crowded"
    if not seen.exists():
        seen.touch()
        raise torch.OutOfMemoryError("CUDA out of memory")
    return ours(x)


def too_large(x):
    raise torch.OutOfMemoryError("CUDA out of memory")


CHECKS = {
    "right": case(ours),
    "chatters": case(chatter),
    "inexact": case(lambda x: ours(x, 3.0001)),
    "unwritten": case(lambda x: ours(x, programs=2)),
    "unsteady": case(unsteady),
    "misshapen": case(lambda x: ours(x)[:-1]),
    "empty": lambda device, dtype, seed: iter(()),
    "hangs": case(lambda x: ours(x, spin=1)),
    "after a hang": case(ours),
    "aborts": case(abort),
    "leaves": case(leave),
    "raises": case(complain),
    "wide only": case(wide_only),
    "half only": case(half_only),
    "last": case(ours),
}
PAIR = {"one": case(meets("one", "other")), "other": case(meets("other", "one"))}
KILLED = {"right": case(ours), "sleeps": case(lambda x: time.sleep(600))}
GREEDY = {"crowded": case(crowded), "too large": case(too_large)}
ASLEEP = {"sleeps": case(lambda x: time.sleep(600))}
