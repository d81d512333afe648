"""Compile every Triton kernel for sm_80, sm_90 and sm_100 on a machine without a GPU, and read what came out.

    python tests/aot.py        one line of JSON per kernel and architecture

A launcher called with meta tensors compiles through the real launcher (`tinylora.kernels.launch`), so divisibility and
pointer specialisation are those of a run. Not under TRITON_INTERPRET: interpreter and compiler cannot share a process.

To add a kernel: a function that calls its launcher with `meta(...)` tensors of real sizes, one line in CASES, and BUDGET in
the kernel's module: {kernel's name: (registers a thread, bytes of shared memory)}.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from tinylora.kernels import (
    add_norm,
    decode_attention,
    fused_linear,
    launch,
    reduce_dm,
    rope,
    sampling,
    shrink,
    swiglu,
    token_logprobs,
)
from tinylora.kernels.correction import Correction

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory that a block may ask for
# SASS opcodes worth counting: spills, tensor cores of the three generations, asynchronous copies.
OPCODES = ("LDL", "STL", "HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "UTMASTG")


@dataclass
class Case:
    """`run` calls one launcher; every kernel that it compiles is checked against module.BUDGET."""

    name: str
    module: ModuleType
    run: Callable[[], Any]
    needs: dict[str, dict[int, set[str]]] = field(default_factory=dict)  # kernel -> architecture -> SASS opcodes
    forbids: frozenset[str] = frozenset()  # SASS opcodes that no kernel may have
    architectures: tuple[int, ...] = (80, 90, 100)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _reduce_dm(r: int, segments: int, adapters: int) -> Callable[[], Any]:
    s = meta(16384, segments * r, dtype=torch.float32)
    return lambda: reduce_dm.reduce_dm_triton(s, s, [64] * 256, adapters, meta(256, dtype=torch.int64), r)


def _token_logprobs(dtype: torch.dtype, rows: int = 2048, width: int = 3584, vocab: int = 151_936) -> Callable[[], Any]:
    def run() -> None:
        hidden, head = meta(rows, width, dtype=dtype).requires_grad_(), meta(vocab, width, dtype=dtype)
        logp, _ = token_logprobs.token_logprobs_triton(hidden, head, meta(rows, dtype=torch.int64), 0.7)
        logp.sum().backward()

    return run


def _decode(slots: int = 64, page: int = 64, most: int = 32) -> dict[str, Callable[[], Any]]:
    """One layer of a decode step at Qwen2.5-7B's heads, with an adapter a row: into the cache, and the attention over it."""
    h, o = rope.Heads(28, 4, 128), _correction(slots, 3584, 3584, 1, True)
    keys, values = (meta(slots * most + 1, 4, page, 128) for _ in range(2))
    view = decode_attention.CacheView(
        meta(slots, dtype=torch.int64), meta(slots, most, dtype=torch.int32), page, 0, torch.bfloat16
    )
    qkv, cos, q = meta(slots, h.width + 64), meta(slots, 128), meta(slots, 28, 128)
    return {
        "cache": lambda: rope.rope_cache_triton(qkv, cos, cos, h, keys, values, view.positions, view.table),
        "attention": lambda: decode_attention.decode_attention_triton(q, keys, values, view, o),
    }


def _sample(dtype: torch.dtype, temperature: float) -> Callable[[], Any]:
    logits, u = meta(256, 151_936, dtype=dtype), meta(256, dtype=torch.float64)
    return lambda: sampling.sample_triton(logits, temperature, 1.0, 0, u)


def _linear(T: int, N: int, K: int, transposed: bool = False, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
    """Qwen2.5-7B's o, 3584 x 3584, or wider; operands are views of padded buffers."""

    def run() -> None:
        weight = meta(N + 16, K + 64, dtype=dtype)[:N, :K]
        if transposed:
            x, z, y, B = (
                meta(T, N + 64, dtype=dtype)[:, :N],
                meta(T, N + 64)[:, N : N + 2],
                meta(T, K + 64, dtype=dtype),
                meta(2, K),
            )
            fused_linear.fused_linear(x, z, weight.T, B, None, y[:, :K])
        else:
            x, z, y, B = (
                meta(T, K + 64, dtype=dtype)[:, :K],
                meta(T, K + 64)[:, K : K + 2],
                meta(T, N + 64, dtype=dtype),
                meta(2, N),
            )
            fused_linear.fused_linear(x, z, weight, B, meta(N, dtype=dtype), y[:, :N])

    return run


def _correction(T: int, K: int, N: int, segments: int, adapters: bool = False) -> Correction:
    t, s = (meta(T, 400, dtype=torch.float32)[:, : 2 * segments] for _ in range(2))
    M, rows = meta(4 if adapters else 1, segments, 2, 2, dtype=torch.float32), meta(T, dtype=torch.int64)
    return Correction(meta(2 * segments, K), meta(2 * segments, N), M, rows if adapters else None, t, s)


def _rows(T: int, adapters: bool = False, width: int = 3584, ffn: int = 18944) -> dict[str, Callable[[], Any]]:
    """Each row op at Qwen2.5-7B's sizes, by name."""
    heads = rope.Heads(28, 4, 128, meta(128), meta(128), 1e-6)
    qkv = _correction(T, width, heads.width, 3, adapters)
    o, gate_up, down = (_correction(T, *shape, adapters) for shape in ((width, width, 1), (width, 2 * ffn, 2), (ffn, width, 1)))
    x, w, rstd, cos = meta(T, width), meta(width), meta(T, 1, dtype=torch.float32), meta(T, 128)
    y, wide, h = meta(T, width + 64)[:, : width + 16], meta(T, 2 * ffn + 64)[:, : 2 * ffn + 16], meta(T, ffn + 64)
    grads = [meta(n, T, 128).transpose(0, 1) for n in (28, 4, 4)]
    return {
        "shrink": lambda: shrink.shrink_triton(x, o),
        "add_norm": lambda: add_norm.add_norm_triton(x, y, meta(T, 2), w, 1e-6, o, gate_up),
        "add_norm backward": lambda: add_norm.add_norm_backward_triton(y, y, x, rstd, w, o),
        "swiglu": lambda: swiglu.swiglu_triton(wide, ffn, down),
        "swiglu backward": lambda: swiglu.swiglu_backward_triton(h, wide, ffn, gate_up),
        "rope": lambda: rope.rope_triton(meta(T, heads.width + 64), cos, cos, heads),
        "rope backward": lambda: rope.rope_backward_triton(*grads, meta(T, heads.width + 64), cos, cos, heads, qkv),
    }


MODULES = {"shrink": shrink, "add_norm": add_norm, "swiglu": swiglu, "rope": rope}

# Tiles of a product are copied asynchronously and multiplied by each generation's tensor cores.
PRODUCT = {80: {"LDGSTS", "HMMA"}, 90: {"LDGSTS", "HGMMA"}, 100: {"LDGSTS", "UTCHMMA"}}

# In fp32 they would multiply TF32, which only a GPU would notice: the interpreter computes true fp32.
TENSOR_CORES = frozenset({"HMMA", "HGMMA", "UTCHMMA"})

# By TMA, the tiles are copied by the engine instead; a TMA kernel is not compiled for sm_80, where it would spill.
TMA = {90: {"UTMALDG", "UTMASTG", "HGMMA"}, 100: {"UTMALDG", "UTMASTG", "UTCHMMA"}}

CASES = [
    *(
        Case(f"fused_linear T={T} pointers", fused_linear, _linear(T, 3584, 3584), {"_pointers": PRODUCT}, architectures=(80,))
        for T in (16, 64, 4096)
    ),
    Case(
        "fused_linear W^T pointers", fused_linear, _linear(4096, 3584, 3584, True), {"_pointers": PRODUCT}, architectures=(80,)
    ),
    Case("fused_linear fp32", fused_linear, _linear(4096, 3584, 3584, dtype=torch.float32), forbids=TENSOR_CORES),
    *(
        Case(f"fused_linear T={T} tma", fused_linear, _linear(T, 3584, 3584), {"_tma": TMA}, architectures=(90, 100))
        for T in (64, 256, 4096)
    ),
    Case("fused_linear W^T tma", fused_linear, _linear(4096, 3584, 3584, True), {"_tma": TMA}, architectures=(90, 100)),
    *(Case(f"{name} T=64", MODULES[name.split()[0]], run) for name, run in _rows(64, adapters=True).items()),
    *(Case(f"{name} T=16384", MODULES[name.split()[0]], run) for name, run in _rows(16384).items()),
    Case("rope into the cache", rope, _decode()["cache"]),
    Case(
        "decode attention",
        decode_attention,
        _decode()["attention"],
        {"_partial": dict.fromkeys(SHARED, {"LDGSTS", "HMMA"})},
    ),
    Case("token_logprobs bf16", token_logprobs, _token_logprobs(torch.bfloat16), {"_share": PRODUCT, "_dlogits": PRODUCT}),
    Case("token_logprobs fp32", token_logprobs, _token_logprobs(torch.float32), forbids=TENSOR_CORES),
    Case("sampling bf16", sampling, _sample(torch.bfloat16, 0.7)),
    Case("sampling fp32", sampling, _sample(torch.float32, 0.7)),
    Case("sampling fp32, greedy", sampling, _sample(torch.float32, 0.0)),
    Case("reduce_dm r=2, 28 layers", reduce_dm, _reduce_dm(2, 28 * 7, 16)),
    Case("reduce_dm r=1, 1 segment", reduce_dm, _reduce_dm(1, 1, 1)),
]


class FakeDriver:
    """What Triton's launcher asks of a GPU before it compiles."""

    def __init__(self, architecture: int):
        self.architecture = architecture
        properties = {"max_shared_mem": SHARED[architecture], "multiprocessor_count": 132}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # a device of its own for each architecture: compiled kernels are kept per device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.architecture, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def inspect(kernel: Any) -> dict[str, Any]:
    """Registers, stack, shared memory and instruction counts of one compiled kernel."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK):(\d+)", cuobjdump("-res-usage", cubin)))
        sass = cuobjdump("-sass", cubin)
    # /*0070*/  @!P0 LDG.E.128 R4, ... ;
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.MULTILINE))
    return {
        "kernel": kernel.metadata.name,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "shared": kernel.metadata.shared,
        "instructions": opcodes.total(),
        "opcodes": {name: opcodes[name] for name in OPCODES if opcodes[name]},
    }


def reports() -> Iterator[dict[str, Any]]:
    for architecture in SHARED:
        triton.runtime.driver.set_active(FakeDriver(architecture))
        for case in CASES:
            if architecture not in case.architectures:
                continue
            launch.compiled.clear()
            case.run()
            for kernel in {kernel.hash: kernel for kernel in launch.compiled}.values():  # each once, however often launched
                report = inspect(kernel)
                registers, shared = case.module.BUDGET[report["kernel"]]
                needs = case.needs.get(report["kernel"], {}).get(architecture, set())
                expected = {"registers": registers, "shared": shared, "needs": sorted(needs), "forbids": sorted(case.forbids)}
                module = case.module.__name__.rpartition(".")[2]
                yield {"case": case.name, "module": module, "architecture": architecture, **report, "expected": expected}


if __name__ == "__main__":
    for report in reports():
        print(json.dumps(report), flush=True)
