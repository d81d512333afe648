"""What a GPU machine without a network is to be sent, made by one command: python -m bench.bring

    .bring/triton.tgz    every Triton kernel that bench.gpu will launch there, compiled here, without a GPU: 23 MB
    .bring/*.whl         the few pure Python packages that such a machine lacks, where pip finds them: 0.7 MB

Run it at the very commit that travels, under that machine's own Triton and Python: Triton's key is a hash of its own files, a
kernel's source, options and target, so the same wheel and checkout find every kernel there, at the same absolute path `CACHE`.
`bench/gpu.sh` unpacks it. 131 s of compiling become 2.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
CACHE = Path("/var/tmp/tinylora-triton")  # Triton's files name each other by absolute paths
WHEELS = (
    "tyro==1.0.17",
    "docstring_parser==0.18.0",
    "typeguard==4.6.1",
    "math_verify==0.9.0",
    "latex2sympy2_extended==1.11.0",
    "antlr4_python3_runtime==4.13.2",
)
os.environ["TRITON_CACHE_DIR"] = str(CACHE)  # which Triton reads when it is imported
os.environ["TINYLORA_BACKEND"] = "padded"
sys.path.insert(0, str(ROOT / "tests"))

# ruff: noqa: E402  (Triton reads the above when it is imported)
import aot
import torch
import triton
from torch import Tensor

import tinylora.engine.slots as slots_module
from bench.models import SHAPES, random_adapter, random_decoder
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Sampling
from tinylora.engine.slots import Slots
from tinylora.kernels import (
    add_norm,
    checks,
    decode_attention,
    dispatch,
    fused_linear,
    products,
    proof,
    reduce_dm,
    rope,
    sampling,
    shrink,
    swiglu,
    token_logprobs,
)
from tinylora.model import decoder as decoder_module
from tinylora.model.cache import KVCache
from tinylora.model.decoder import Decoder
from tinylora.model.loader import load_model

MODULES = (add_norm, swiglu, rope, shrink, decode_attention, fused_linear, reduce_dm, sampling, token_logprobs)
CPU = torch.device("cpu")


class Compiler:
    """In the place of `launch`: compiles what would be launched, and counts."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self.kernels.add(kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **options).hash)


class _Attention(torch.autograd.Function):
    """In the place of the library's attention: shapes alone."""

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        ctx.shapes = q.shape, k.shape, v.shape
        return q.new_zeros(q.shape)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        return tuple(dout.new_zeros(shape) for shape in ctx.shapes)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
    """In the place of torch.mm: nothing is multiplied."""
    return out if out is not None else a.new_zeros(len(a), b.shape[1], dtype=options.get("out_dtype", a.dtype))


@contextmanager
def without_arithmetic(compiler: Compiler) -> Iterator[None]:
    """Every op takes its Triton kernel on a CPU's tensors, and compiles it; products and attention give shapes alone."""
    changes: list[tuple[ModuleType, str, Any]] = [(module, "launch", compiler) for module in MODULES]
    changes += [
        (dispatch, "runs_triton", lambda op, x: True),
        (dispatch, "runs_native", lambda *_, **__: False),
        (torch, "mm", _product),
        (decoder_module, "packed_attention", lambda q, k, v, layout: _Attention.apply(q, k, v)),
        (slots_module, "head", lambda h, model: h.new_zeros(len(h), len(model.head), dtype=torch.float32)),
    ]
    with ExitStack() as stack:
        for module, name, new in changes:
            stack.enter_context(patch.object(module, name, new))
        yield


def compile_checks(compiler: Compiler, architecture: int) -> None:
    """What the self-check launches."""
    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch.object(module, "launch", compiler))
        stack.enter_context(patch.object(fused_linear, "_capability", lambda device: architecture))
        stack.enter_context(patch.object(checks, "sizes", lambda device, small, real: real))
        stack.enter_context(patch.object(checks, "launcher", lambda module, name, _: getattr(module, f"{name}_triton")))
        for op, check in checks.CHECKS.items():
            for dtype in proof.dtypes(op, torch.device("cuda")):
                for _ in check(CPU, dtype, 0):
                    pass


def of_two_layers(shape: str) -> tuple[Decoder, Adapter]:
    """A random model in bf16; two layers stand for all."""
    hidden, ffn, _, *rest = SHAPES[shape]
    with patch.dict(SHAPES, {shape: (hidden, ffn, 2, *rest)}):
        model = random_decoder(shape, CPU, torch.bfloat16)
    return model, random_adapter(model)


def built_in(dtype: str) -> tuple[Decoder, Adapter]:
    """The built-in model, by which bench.gpu compares a GPU with a CPU."""
    model = load_model("builtin", "cpu", dtype)
    return model, Adapter(model, TinyLoRAConfig(u=13, n_tie="all"))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Neither rows nor ranks are padded to a multiple of 8, as they are on a CPU: both are in a kernel's key."""
    with patch.object(products, "NARROW", 1), patch.object(decoder_module, "NARROW", 1):
        yield


def compile_engine(
    compiler: Compiler, model: Decoder, adapter: Adapter, rows: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    """What rollout and update launch at these slot counts and tokens, and a step of the base at these slot counts."""
    with without_arithmetic(compiler):
        with torch.inference_mode():
            for count in rows:
                cache = KVCache(model.config, 16 * count, 64, model.embedding, count, 1024)
                for temperature, adapters in ((1.0, 1), (0.0, 1), (1.0, 0)):
                    slots = Slots(model, Sampling(64, temperature, eos_ids=(1,)), count, cache, adapters)
                    slots.set_matrices(adapter.matrices() if adapters else None)
                    slots._step(count, 0)
        for count in tokens:
            sequences = 16 if count % 16 == 0 else 5
            lengths = [count + 1 - sequences, *[1] * (sequences - 1)]
            hidden_states = model.packed(torch.zeros(count, dtype=torch.long), lengths, adapter.matrices())
            logp, _ = token_logprobs.token_logprobs_triton(hidden_states, model.head, torch.zeros(count, dtype=torch.long))
            logp.sum().backward()
            with torch.inference_mode():
                model.packed(torch.zeros(count, dtype=torch.long), [count], adapter.matrices())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="the GPU's compute capability, as sm_90")
    parser.add_argument("--into", type=Path, default=ROOT / ".bring")
    parser.add_argument("--shapes", nargs="*", default=["qwen7b"], choices=list(SHAPES), help="of bench.models, in bf16")
    o = parser.parse_args(arguments)
    o.into.mkdir(exist_ok=True)
    shutil.rmtree(CACHE, ignore_errors=True)  # an older commit's kernels would travel too
    triton.runtime.driver.set_active(aot.FakeDriver(o.arch))
    compiler, began = Compiler(), time.monotonic()
    compile_checks(compiler, o.arch)
    print(f"{len(compiler.kernels)} kernels of the self-check, {time.monotonic() - began:.0f} s", flush=True)
    models = {shape: partial(of_two_layers, shape) for shape in o.shapes}
    models |= {f"the built-in model in {dtype}": partial(built_in, dtype) for dtype in ("float32", "bfloat16")}
    for name, model in models.items():
        with as_on_a_gpu():
            compile_engine(compiler, *model(), (1, 2, 16), (150, 160, 2304, 2311))
        print(f"{len(compiler.kernels)} kernels with {name}, {time.monotonic() - began:.0f} s", flush=True)
    with tarfile.open(o.into / "triton.tgz", "w:gz") as archive:
        archive.add(CACHE, arcname=".")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(o.into), *WHEELS]
    if subprocess.run(command).returncode:
        print("the wheels were not had: bench.gpu does without them")
    print(f"{sum(f.stat().st_size for f in o.into.iterdir()) / 1e6:.1f} MB in {o.into}, under Triton {triton.__version__}")


if __name__ == "__main__":
    main()
