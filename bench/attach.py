"""What an adapter's factors cost at start: python -m bench.attach

The truncated SVD of every projection of a Qwen2.5-0.5B-shaped model (24 layers x 7) with Gaussian weights, the hardest
spectrum there is, by compute_basis as the adapter calls it: cold, then from its cache. And the worst residual of what came
back, |W a - b| and |W^T u - sigma a| relative to sigma_1, each factor as it is stored, in float32.
"""

import argparse
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bench.measure import card, print_json, timed
from bench.ops import MODELS
from tinylora.adapter.factors import compute_basis
from tinylora.model.config import PROJECTIONS, module_name
from tinylora.waiting import Load


def gaussian(layers: int, model: str, device: str) -> dict[str, Tensor]:
    """Weights (N, K) of every projection, by module name, in the adapter's order."""
    config = MODELS[model]
    return {
        module_name(layer, p): torch.randn(config.shape(p), device=device) / config.shape(p)[1] ** 0.5
        for layer in range(layers)
        for p in PROJECTIONS
    }


def residual(weight: Tensor, a: Tensor, b: Tensor) -> float:
    """Worst residual over the triples of A (r, K) and B (N, r), relative to the largest singular value."""
    weight, a, b = weight.double(), a.to(weight).double(), b.to(weight).double()
    sigma = b.norm(dim=0)
    left, right = weight @ a.T - b, weight.T @ (b / sigma) - a.T * sigma
    return (torch.cat([left.norm(dim=0), right.norm(dim=0)]).max() / sigma[0]).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-0.5B", choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--r", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="a file for the last line too")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    weights = gaussian(options.layers, options.model, options.device)
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, {"TINYLORA_CACHE": cache}):
        others = Load()
        cold, factors = timed(lambda: compute_basis(weights, options.r, "bench"))
        load = others.others() / (os.cpu_count() or 1)
        warm, again = timed(lambda: compute_basis(weights, options.r, "bench"))
        (file,) = Path(cache).iterdir()
        size = file.stat().st_size
    if any(not torch.equal(x.cpu(), y.cpu()) for name in weights for x, y in zip(factors[name], again[name], strict=True)):
        raise SystemExit("the cache gave other factors than were computed")
    worst = max(residual(w, *factors[name]) for name, w in weights.items())
    print(
        f"{len(weights)} weights of {options.model}, r={options.r}: {cold:.1f} s cold, {warm:.3f} s from a cache of "
        f"{size / 1e6:.1f} MB, worst residual {worst:.1e} of sigma_1; others used {load:.0%} of the machine meanwhile"
    )
    print_json(
        {
            "bench": "attach",
            **card(),
            "model": options.model,
            "device": options.device,
            "weights": len(weights),
            "r": options.r,
            "cold_seconds": cold,
            "warm_seconds": warm,
            "cache_bytes": size,
            "worst_residual": worst,
            "foreign_load": load,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
