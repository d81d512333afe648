"""Each op beside its alternatives: python -m bench.ops

    us | TFLOP/s | GB/s | x floor | x bare GEMM | peak extra memory

The frozen linear with its correction at real models' shapes, forward and forward + backward (into x and what is trained; W
is frozen, so the bare linear's backward is dy W alone), and RMSNorm, SwiGLU and the LM head's log-probs.

bare              F.linear(x, W): no adapter at all
ours, BACKEND     tinylora.kernels.layer_linear, whole in itself: x in, y out
engine, BACKEND   tinylora.kernels.linear, as the decoder runs it: x and dy come with z and sM beside them, written by the row
                  ops that produce them, whose rows below ("with z") carry that cost
eager             F.linear(x, W) + ((x A^T) M^T) B^T by autograd, and the same compiled
PEFT              its TinyLoRA (r=2) and LoRA (r=8) layers around the fused weight, one adapter for all of its segments:
                  fewer calls than in a real model, where q, k and v are wrapped one by one

Timed in turns within one run, rotating among input sets (weights included) of more than twice the L2 cache on a GPU; on a
CPU, rounds in which other processes used over 4 % of the machine are dropped. Ours and eager must agree, or the run ends.
x bare is the median of each timing's ratio to the bare linear's in the same turn, which a drifting machine moves less than
the ratio of two medians. The floor is the larger of bytes / copy bandwidth and FLOP / GEMM rate, both measured first in the
same run. Peak extra memory is what one call holds beyond its inputs, the result included.
"""

import argparse
import importlib.util
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import truediv
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import card, copy_rate, gemm_rate, in_turns, peak_extra_bytes, print_json, quantiles, write_json
from tinylora.cli import table
from tinylora.kernels import add_norm, dispatch, swiglu
from tinylora.kernels.correction import Correction, padded, write_sM, write_z
from tinylora.kernels.frozen import FrozenLinear, padded_segments
from tinylora.kernels.layer_linear import layer_linear
from tinylora.kernels.linear import linear, linear_backward
from tinylora.kernels.products import NARROW
from tinylora.kernels.rms_norm import rms_norm_ref
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.config import GROUPS, ModelConfig

R = 2  # rank of every segment's correction
NAMES = ("qkv", "o", "gate_up", "down")


def _config(family: str, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": family,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "num_hidden_layers": 1,
        }
    )


MODELS = {
    "Qwen2.5-0.5B": _config("qwen2", 896, 4864, 14, 2, 151936),
    "Qwen2.5-1.5B": _config("qwen2", 1536, 8960, 12, 2, 151936),
    "Qwen2.5-7B": _config("qwen2", 3584, 18944, 28, 4, 152064),
    "Llama-3-8B": _config("llama", 4096, 14336, 32, 8, 128256),
}


@dataclass
class Contender:
    """One implementation on one set of inputs."""

    function: Callable[[Tensor], Tensor]
    trained: list[Tensor] = field(default_factory=list)
    backward: Callable[[Tensor], Any] | None = None  # of dy, by hand; None: by autograd, into x and `trained`

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(x)

    def both(self, x: Tensor, dy: Tensor) -> Any:
        if self.backward is not None:
            return self.forward(x), self.backward(dy)
        x = x.detach().requires_grad_()
        y = self.function(x)
        return y.detach(), *torch.autograd.grad(y, [x, *self.trained], dy)


@dataclass
class Case:
    """One op at one shape: input sets, and on each of them the contenders."""

    name: str
    inputs: list[tuple[Tensor, Tensor]]  # x and dy of each set
    contenders: dict[str, list[Contender]]
    flop: tuple[float, float]  # forward, forward + backward
    bytes: tuple[float, float]  # that must move at least
    agree: tuple[str, ...] = ()  # contenders that compute the same, the first being the measure
    whole: int = 0  # bytes of what a plain implementation materialises: the logits


# ---- the cases ----------------------------------------------------------------------------------------------------------


def linear_case(model: str, group: int, rows: int, device: str, dtype: torch.dtype, compiled: bool, sets: int) -> Case:
    """A fused linear of a model: x (rows, K), W (N, K), and a correction of rank R for each segment."""
    sizes = [MODELS[model].shape(p)[0] for p in GROUPS[group]]
    k, n, rank = MODELS[model].shape(GROUPS[group][0])[1], sum(sizes), R * len(sizes)
    size = dtype.itemsize
    forward_bytes = size * (n * k + rows * (k + n) + rank * (k + n))
    compiled_function = torch.compile(_low_rank, dynamic=False) if compiled else None
    inputs, contenders = [], {}
    for _ in range(sets):
        x, dy = (torch.randn(rows, width, device=device, dtype=dtype) for width in (k, n))
        weight = torch.randn(n, k, device=device, dtype=dtype) / k**0.5
        factors = [(torch.randn(R, k) / k**0.5, torch.randn(s, R)) for s in sizes]
        inputs.append((x, dy))
        for name, contender in _linears(x, dy, weight, factors, sizes, compiled_function).items():
            contenders.setdefault(name, []).append(contender)
    return Case(
        f"{model} {NAMES[group]} {k}->{n}, T {rows}",
        inputs,
        contenders,
        flop=(2 * rows * (n * k + rank * (n + k)), 4 * rows * (n * k + rank * (n + k))),
        bytes=(forward_bytes, 2 * forward_bytes),
        agree=tuple(name for name in contenders if name.startswith(("eager", "ours", "engine", "compiled"))),
    )


def _low_rank(x: Tensor, weight: Tensor, A: Tensor, Bt: Tensor, M: Tensor) -> Tensor:
    return F.linear(x, weight) + ((x @ A.T) @ M.T) @ Bt


def _linears(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    factors: list[tuple[Tensor, Tensor]],
    sizes: list[int],
    compiled: Callable[..., Tensor] | None,
) -> dict[str, Contender]:
    segments, device, dtype = len(factors), weight.device, weight.dtype
    blocks = torch.randn(segments, R, R)
    contenders = {"bare": Contender(lambda x: F.linear(x, weight), backward=lambda dy: dy @ weight)}
    M = torch.zeros(1, padded_segments(segments, R, NARROW if device.type == "cpu" else 1), R, R, device=device)
    M[0, :segments] = blocks.to(device)
    M.requires_grad_()
    for name in _backends(device.type):
        with _backend(name):
            group = FrozenLinear.empty(*weight.shape, False, dtype, device)
            group.weight.copy_(weight)
            group.pack(factors, sizes, NARROW if device.type == "cpu" else 1)  # as a Decoder does
            if name != "padded":  # which is for rows that carry z alone
                contenders[f"ours, {name}"] = Contender(_under(name, group, M), [M])
        contenders[f"engine, {name}"] = _engine(name, group, M, x, dy)
    A = torch.cat([a for a, _ in factors]).to(device, dtype)  # (R segments, K)
    Bt = torch.block_diag(*(b.T for _, b in factors)).to(device, dtype)  # (R segments, N)
    dense = torch.block_diag(*blocks).to(device, dtype).requires_grad_()
    contenders["eager"] = Contender(lambda x: _low_rank(x, weight, A, Bt, dense), [dense])
    if compiled is not None:
        contenders["compiled"] = Contender(lambda x: compiled(x, weight, A, Bt, dense), [dense])
    if importlib.util.find_spec("peft"):
        contenders |= _peft(weight)
    return contenders


def _backends(device: str) -> list[str]:
    """The frozen linear's forms that may run here: the fused kernel only where it has proved itself."""
    with _backend("triton"):
        proven = device == "cuda" and dispatch.runs_triton("fused_linear", torch.zeros(1, device=device, dtype=torch.bfloat16))
    return ["addmm", "padded" if device == "cuda" else "native", *(["triton"] if proven else [])]


def _engine(name: str, group: FrozenLinear, M: Tensor, x: Tensor, dy: Tensor) -> Contender:
    """The frozen map on copies of x and dy that carry z and sM already."""
    assert group.A is not None and group.Bt is not None
    (N, K), c = group.weight.shape, Correction(group.A, group.Bt, M)
    with _backend(name), torch.no_grad():
        x_, dy_ = padded(len(x), K, c, x), padded(len(dy), N, c, dy)
        x_[:, :K], dy_[:, :N] = x, dy
        write_z(x_, K, c)
        write_sM(dy_, N, c)

    def forward(_: Tensor) -> Tensor:
        with _backend(name):
            return linear(x_, group, c)

    def backward(_: Tensor) -> Tensor:
        with _backend(name):
            return linear_backward(dy_, group, x_.shape[1])[:, :K]

    return Contender(forward, backward=backward)


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get("TINYLORA_BACKEND")
    os.environ["TINYLORA_BACKEND"] = name  # one variable: patch.dict sets them all, in 100 us that would be timed
    try:
        yield
    finally:
        if before is None:
            del os.environ["TINYLORA_BACKEND"]
        else:
            os.environ["TINYLORA_BACKEND"] = before


def _under(name: str, group: FrozenLinear, M: Tensor) -> Callable[[Tensor], Tensor]:
    assert group.A is not None and group.Bt is not None
    constants = (group.weight, group.bias, group.A, group.Bt)

    def function(x: Tensor) -> Tensor:
        with _backend(name):
            return layer_linear(x, *constants, M)

    return function


def _peft(weight: Tensor) -> dict[str, Contender]:
    """PEFT's layers on this weight. Its full SVD is replaced by noise: it takes minutes, and no time below depends on it."""
    from peft import LoraConfig, TinyLoraConfig, get_peft_model

    def some_svd(w: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(len(w), R).to(w), torch.ones(R).to(w), torch.randn(R, w.shape[1]).to(w) / w.shape[1] ** 0.5

    contenders = {}
    for name, config in (
        ("PEFT TinyLoRA", TinyLoraConfig(r=R, u=13, target_modules=["linear"])),
        ("PEFT LoRA r=8", LoraConfig(r=8, target_modules=["linear"])),
    ):
        holder = nn.Module()
        holder.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        holder.linear.weight = nn.Parameter(weight, requires_grad=False)
        with patch("torch.linalg.svd", some_svd), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(holder, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        contenders[name] = Contender(model.base_model.model.linear, trained)
    return contenders


def norm_case(model: str, rows: int, device: str, dtype: torch.dtype, sets: int) -> Case:
    """The norm of a sum of two (rows, hidden), and with the z of a qkv beside it."""
    width, eps = MODELS[model].hidden_size, 1e-6
    weight, y = torch.randn(width, device=device, dtype=dtype), torch.randn(rows, width, device=device, dtype=dtype)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda x: rms_norm_ref(x + y, weight, eps),
        "ours": lambda x: add_norm.add_norm(x, y, None, weight, eps, None, None)[1],
        "F.rms_norm": lambda x: F.rms_norm(x + y, (width,), weight, eps),
    }
    if liger := _liger(device):
        functions["Liger"] = lambda x: liger.liger_rms_norm(x + y, weight, eps)
    case = _row_case(f"add_norm {width}, T {rows}", functions, (width, width), (4, 3), rows, device, dtype, sets)
    outer, inner = _correction(width, width, 3, device, dtype), _correction(width, width, 1, device, dtype)
    x_, rstd = torch.randn_like(y), torch.rand(rows, 1, device=device) + 1
    ways = add_norm.add_norm_backward_native, add_norm.add_norm_backward_triton, add_norm.add_norm_backward_plain
    back = dispatch.choose("add_norm", y, *ways, width, c=inner)
    with_z = Contender(
        lambda x: add_norm.add_norm(x, y, None, weight, eps, inner, outer)[1],
        backward=lambda dy: back(None, dy, x_, rstd, weight, inner),
    )
    case.contenders["ours, with z"] = [with_z] * sets
    return case


def swiglu_case(model: str, rows: int, device: str, dtype: torch.dtype, sets: int) -> Case:
    """silu(gate) * up of (rows, 2 * intermediate), and with the z of a down beside it."""
    width = MODELS[model].intermediate_size
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": swiglu.swiglu_ref,
        "ours": lambda x: swiglu.swiglu(x, width, None, None),
    }
    if liger := _liger(device):
        functions["Liger"] = lambda x: liger.liger_swiglu(*(half.contiguous() for half in x.chunk(2, -1)))
    case = _row_case(f"swiglu {width}, T {rows}", functions, (2 * width, width), (3, 5), rows, device, dtype, sets)
    outer, inner = _correction(width, 64, 1, device, dtype), _correction(64, 2 * width, 2, device, dtype)
    x_ = case.inputs[0][0]
    ways = swiglu.swiglu_backward_native, swiglu.swiglu_backward_triton, swiglu.swiglu_backward_plain
    back = dispatch.choose("swiglu", x_, *ways, width, c=inner)
    with_z = Contender(
        lambda x: swiglu.swiglu(x, width, inner, outer),
        backward=lambda dy: back(dy, x_, width, inner),
    )
    case.contenders["ours, with z"] = [with_z] * sets
    return case


def _correction(width: int, out: int, segments: int, device: str, dtype: torch.dtype) -> Correction:
    rank = R * padded_segments(segments, R, 1 if device.startswith("cuda") else NARROW)
    A, Bt = (torch.randn(rank, n, device=device, dtype=dtype) / n**0.5 for n in (width, out))
    return Correction(A, Bt, torch.randn(1, rank // R, R, R, device=device))


def _row_case(
    name: str,
    functions: dict[str, Callable[[Tensor], Tensor]],
    widths: tuple[int, int],  # of x and of dy
    moved: tuple[int, int],  # rows of dy's width that forward and backward read and write at least
    rows: int,
    device: str,
    dtype: torch.dtype,
    sets: int,
) -> Case:
    """Each input read once and each output written once; the arithmetic is free."""
    inputs = [tuple(torch.randn(rows, w, device=device, dtype=dtype) for w in widths) for _ in range(sets)]
    forward, backward = (rows * widths[1] * n for n in moved)
    return Case(
        name,
        inputs,  # type: ignore[arg-type]
        {n: [Contender(f)] * sets for n, f in functions.items()},
        flop=(0, 0),
        bytes=(dtype.itemsize * forward, dtype.itemsize * (forward + backward)),
        agree=tuple(functions),
    )


def head_case(model: str, rows: int, device: str, dtype: torch.dtype) -> Case:
    """Log-prob of one given token a row: h (rows, hidden), head (vocab, hidden). The head alone is beyond any L2 cache."""
    vocab, hidden = MODELS[model].vocab_size, MODELS[model].hidden_size
    head = torch.randn(vocab, hidden, device=device, dtype=dtype) / hidden**0.5
    tokens = torch.randint(vocab, (rows,), device=device)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda h: F.log_softmax(F.linear(h, head), -1, dtype=torch.float32).gather(1, tokens[:, None]).squeeze(1),
        "ours": lambda h: token_logprobs(h, head, tokens)[0],
    }
    if liger := _liger(device):
        loss = liger.liger_fused_linear_cross_entropy
        functions["Liger"] = lambda h: -loss(h, head, tokens, reduction="none")
    x, dy = torch.randn(rows, hidden, device=device, dtype=dtype), torch.randn(rows, device=device)
    forward, size = dtype.itemsize * (vocab * hidden + rows * hidden), 2 * rows * vocab * hidden
    return Case(
        f"log-prob {model} {hidden}->{vocab}, T {rows}",
        [(x, dy)],
        {n: [Contender(f)] for n, f in functions.items()},
        flop=(size, 2 * size),
        bytes=(forward, 2 * forward),
        agree=tuple(functions),
        whole=rows * vocab * dtype.itemsize,
    )


def _liger(device: str) -> Any:
    """Liger's functional module, where there is one and a GPU for it."""
    if not device.startswith("cuda") or not importlib.util.find_spec("liger_kernel"):
        return None
    return importlib.import_module("liger_kernel.transformers.functional")


# ---- measuring ----------------------------------------------------------------------------------------------------------


def check_agreement(case: Case) -> None:
    """The contenders named in `agree` give the same y and dx, up to the rounding of their dtype. RuntimeError otherwise."""
    x, dy = case.inputs[0]
    want: tuple[Tensor, Tensor] | None = None
    for name in case.agree:
        y, dx = case.contenders[name][0].both(x, dy)[:2]
        want = want or (y, dx)
        for found, wanted in zip((y, dx), want, strict=True):
            error = ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
            if not error <= 8 * torch.finfo(x.dtype).eps:
                raise RuntimeError(f"{case.name}: {name} differs from {case.agree[0]} by {error:.1e}; nothing was timed")


def measure(case: Case, rates: tuple[float, float], device: str, rounds: int, most: float = 0.04) -> list[dict[str, Any]]:
    """One row for each contender and pass. rates: GEMM FLOP/s and copied bytes/s."""
    check_agreement(case)
    rows = []
    for i, what in enumerate(("forward", "forward+backward")):

        def call(contenders: list[Contender], what: str = what) -> Callable[[int], Any]:
            if what == "forward":
                return lambda j: contenders[j].forward(case.inputs[j][0])
            return lambda j: contenders[j].both(*case.inputs[j])

        calls = {name: call(contenders) for name, contenders in case.contenders.items()}
        seconds, dropped = in_turns(calls, len(case.inputs), rounds, device, most)
        if min(map(len, seconds.values())) < 3:
            raise SystemExit(f"{case.name}: under 3 timings, {dropped} rounds dropped; other processes were running")
        floor = max(case.flop[i] / rates[0], case.bytes[i] / rates[1])
        medians = {name: quantiles(s)["median"] for name, s in seconds.items()}
        for name, spent in seconds.items():
            rows.append(
                {
                    "case": case.name,
                    "pass": what,
                    "implementation": name,
                    "us": {q: 1e6 * s for q, s in quantiles(spent).items()},
                    "tflops": case.flop[i] / medians[name] / 1e12,
                    "gbytes_per_second": case.bytes[i] / medians[name] / 1e9,
                    "x_floor": medians[name] / floor,
                    "x_bare": statistics.median(map(truediv, spent, seconds["bare"])) if "bare" in seconds else None,
                    "peak_extra_bytes": peak_extra_bytes(lambda call=calls[name]: call(0), device),
                    "share_of_logits": None,
                    "timings": len(spent),
                    "rounds_dropped": dropped,
                }
            )
            if case.whole:
                rows[-1]["share_of_logits"] = rows[-1]["peak_extra_bytes"] / case.whole
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    header = [f"{rows[0]['case']}", "us", "20..80 %", "TFLOP/s", "GB/s", "x floor", "x bare", "extra MB", "of logits"]
    cells = [
        [
            f"{r['pass']:16s} {r['implementation']}",
            f"{r['us']['median']:.1f}",
            f"{r['us']['p20']:.1f}..{r['us']['p80']:.1f}",
            f"{r['tflops']:.3g}" if r["tflops"] else "",
            f"{r['gbytes_per_second']:.3g}",
            f"{r['x_floor']:.2f}",
            f"{r['x_bare']:.3f}" if r["x_bare"] else "",
            f"{r['peak_extra_bytes'] / 1e6:.1f}",
            f"{r['share_of_logits']:.1%}" if r["share_of_logits"] else "",
        ]
        for r in rows
    ]
    print(table(header, cells), end="\n\n", flush=True)


def cases(device: str, dtype: torch.dtype, quick: bool, compiled: bool) -> Iterator[Case]:
    """All cases of a run, one built at a time."""
    gpu = device.startswith("cuda")
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if gpu else 0
    models = ["Qwen2.5-7B" if gpu else "Qwen2.5-0.5B"] if quick else list(MODELS) if gpu else ["Qwen2.5-0.5B"]
    rows_of = ([64, 2048] if quick else [64, 256, 2048, 16384]) if gpu else [256 if quick else 2048]
    for model in models:
        hidden, width = MODELS[model].hidden_size, MODELS[model].intermediate_size
        for rows in rows_of:
            for group, projections in enumerate(GROUPS):
                n, k = sum(MODELS[model].shape(p)[0] for p in projections), MODELS[model].shape(projections[0])[1]
                one = dtype.itemsize * (n * k + rows * (n + k))
                if compiled:  # a limit on recompilations would otherwise leave later shapes uncompiled
                    torch._dynamo.reset()
                yield linear_case(model, group, rows, device, dtype, compiled, _sets(one, l2))
            yield norm_case(model, rows, device, dtype, _sets(dtype.itemsize * rows * hidden * 2, l2))
            yield swiglu_case(model, rows, device, dtype, _sets(dtype.itemsize * rows * width * 3, l2))
        yield head_case(model, 2048 if gpu else 64 if quick else 256, device, dtype)


def _sets(one: int, l2: int) -> int:
    """Input sets of `one` byte each that together are over twice the cache: 2 to 64."""
    return min(64, max(2, math.ceil(2 * l2 / one) + 1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one model and few rows")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of eager; default: on a GPU")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count")
    parser.add_argument("--busy", type=float, default=0.04, help="a CPU round counts if others used at most this share")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", help="a file for the last line too")
    options = parser.parse_args(arguments)
    device, gpu = options.device, options.device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    compiled = gpu if options.compile is None else options.compile
    rates = gemm_rate(8192 if gpu else 1024, 20, device, dtype), copy_rate(1 << (30 if gpu else 26), 20, device)
    print(f"floors: {rates[0] / 1e12:.3g} TFLOP/s in a {str(dtype)[6:]} product, {rates[1] / 1e9:.0f} GB/s in a copy\n")
    result = {
        "bench": "ops",
        **card(),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "gemm_gflops": rates[0] / 1e9,
        "copy_gbytes_per_second": rates[1] / 1e9,
        "rows": [],
    }
    for case in cases(device, dtype, options.quick, compiled):
        if options.only in case.name:
            found = measure(case, rates, device, options.rounds, options.busy if not gpu else math.inf)
            print_rows(found)
            result["rows"] += found
            write_json(result, options.json)  # what a time limit leaves of a long run
    print_json(result, options.json)


if __name__ == "__main__":
    main()
