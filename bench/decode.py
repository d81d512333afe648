"""The decode linear beside its alternatives at 1 to 64 rows: python -m bench.decode

    us | GB/s | share of copy bandwidth | x cuBLAS + low rank

bare                  F.linear(x, W): no adapter at all
cuBLAS + low rank     F.linear, and the correction as three small products
padded                one product over the padded buffer, for rows that carry z already: without what z costs
shrink + padded       the same, z by a kernel of its own; the engine's row kernels compute it on the way
triton                the fused Triton kernel, for rows that carry z, where it is proven
decode_linear         csrc/, t and z included, where it is compiled and proven; on a CPU its reference

Bytes are those that must move at least: W, x, y and the factors once each. The copy whose bandwidth they are a share of is
measured first in the same run, reads and writes both counted. Timed as `bench.ops` times, on the same shapes.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import card, copy_rate, in_turns, print_json, quantiles, write_json
from bench.ops import MODELS, NAMES, R, _backend, _backends, _engine, _sets
from tinylora.cli import table
from tinylora.kernels.correction import Correction, padded
from tinylora.kernels.decode_linear import decode_linear, takes
from tinylora.kernels.frozen import FrozenLinear
from tinylora.kernels.linear import linear
from tinylora.kernels.shrink import shrink
from tinylora.model.config import GROUPS

ROWS = (1, 8, 16, 32, 64)
Call = Callable[[], Tensor]


def contenders(model: str, group: int, rows: int, device: str, dtype: torch.dtype) -> dict[str, Call]:
    """Every implementation on one set of random inputs."""
    sizes = [MODELS[model].shape(p)[0] for p in GROUPS[group]]
    k, n = MODELS[model].shape(GROUPS[group][0])[1], sum(sizes)
    x = torch.randn(rows, k, device=device, dtype=dtype)
    weight = torch.randn(n, k, device=device, dtype=dtype) / k**0.5
    factors = [(torch.randn(R, k) / k**0.5, torch.randn(s, R)) for s in sizes]
    M = torch.randn(1, len(sizes), R, R, device=device)
    with _backend("padded"):
        group_ = FrozenLinear.empty(n, k, False, dtype, torch.device(device))
        group_.weight.copy_(weight)
        group_.pack(factors, sizes)
    assert group_.A is not None and group_.Bt is not None
    A, Bt, c = group_.A, group_.Bt, Correction(group_.A, group_.Bt, M)
    dense = c.dense.to(dtype)

    def shrunk() -> Tensor:
        with _backend("padded"):
            rows_ = padded(rows, k, c, x)
            rows_[:, :k], rows_[:, k + c.rank :] = x, 0
            rows_[:, k : k + c.rank] = shrink(x, c)
            return linear(rows_, group_, c)

    found: dict[str, Call] = {
        "bare": lambda: F.linear(x, weight),
        "cuBLAS + low rank": lambda: F.linear(x, weight).addmm_((x @ A.T) @ dense.T, Bt),
        "shrink + padded": shrunk,
    }
    for name in _backends(device):
        if name != "addmm":
            engine = _engine(name, group_, M, x, torch.zeros(rows, n, device=device, dtype=dtype))
            found["padded" if name == "native" else name] = lambda engine=engine: engine.forward(x)
    with _backend("cuda"):
        if device == "cpu" or takes(rows, group_, c):
            found["decode_linear"] = lambda: decode_linear(x, group_, c)
    return found


def check_agreement(name: str, calls: dict[str, Call]) -> None:
    """All that have the correction give the same, up to the rounding of their dtype. RuntimeError otherwise."""
    want = calls["cuBLAS + low rank"]().double()
    for contender, call in calls.items():
        y = call()
        error = ((y.double() - want).norm() / want.norm()).item()
        if contender != "bare" and not error <= 8 * torch.finfo(y.dtype).eps:
            raise RuntimeError(f"{name}: {contender} differs by {error:.1e}; nothing was timed")


def measure(model: str, group: int, rows: int, copied: float, device: str, dtype: torch.dtype, rounds: int, most: float) -> Any:
    """One row for each contender. copied: bytes/s."""
    n, k = sum(MODELS[model].shape(p)[0] for p in GROUPS[group]), MODELS[model].shape(GROUPS[group][0])[1]
    name = f"{model} {NAMES[group]} {k}->{n}, T {rows}"
    moved = dtype.itemsize * (n * k + (rows + R * len(GROUPS[group])) * (n + k))
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0
    sets = [contenders(model, group, rows, device, dtype) for _ in range(_sets(moved, l2))]
    check_agreement(name, sets[0])
    calls = {c: lambda j, c=c: sets[j][c]() for c in sets[0]}
    seconds, dropped = in_turns(calls, len(sets), rounds, device, most)
    if min(map(len, seconds.values())) < 3:
        raise SystemExit(f"{name}: under 3 timings, {dropped} rounds dropped; other processes were running")
    medians = {c: quantiles(s)["median"] for c, s in seconds.items()}
    return [
        {
            "case": name,
            "rows": rows,
            "implementation": c,
            "us": {q: 1e6 * s for q, s in quantiles(seconds[c]).items()},
            "gbytes_per_second": moved / median / 1e9,
            "share_of_copy": moved / median / copied,
            "x_low_rank": medians["cuBLAS + low rank"] / median,
        }
        for c, median in medians.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"], choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count")
    parser.add_argument("--busy", type=float, default=0.04, help="a CPU round counts if others used at most this share")
    parser.add_argument("--json", help="a file for the last line too")
    options = parser.parse_args(arguments)
    device, gpu = options.device, options.device.startswith("cuda")
    dtype, busy = (torch.bfloat16, math.inf) if gpu else (torch.float32, options.busy)
    torch.manual_seed(0)
    copied = copy_rate(1 << (30 if gpu else 26), 20, device)
    print(f"{copied / 1e9:.0f} GB/s in a copy\n")
    result = {"bench": "decode", **card(), "device": device, "copy_gbytes_per_second": copied / 1e9, "rows": []}
    with torch.no_grad():
        for model in options.models:
            for group in range(len(GROUPS)):
                for rows in options.rows:
                    found = measure(model, group, rows, copied, device, dtype, options.rounds, busy)
                    cells = [
                        [
                            row["implementation"],
                            f"{row['us']['median']:.1f}",
                            f"{row['gbytes_per_second']:.0f}",
                            f"{row['share_of_copy']:.0%}",
                            f"{row['x_low_rank']:.2f}",
                        ]
                        for row in found
                    ]
                    print(table([found[0]["case"], "us", "GB/s", "of copy", "x low rank"], cells), end="\n\n", flush=True)
                    result["rows"] += found
                    write_json(result, options.json)
    print_json(result, options.json)


if __name__ == "__main__":
    main()
