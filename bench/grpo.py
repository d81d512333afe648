"""GRPO steps at a real model's shapes, ours alone: python -m bench.grpo [--model qwen0.5b|qwen7b]

    rollout    tokens/s                      update    tokens/s, and MFU
    step       rollout, reward and update together: tokens/s, and the peak of memory

Random weights, 13 trained numbers tied over all layers, prompts of about 150 tokens, every completion as long as it may get
since random weights end nowhere, and a reward under which no group is dead. The update's tokens are prompts once a group and
completions. Its FLOP are those it cannot do without: two products a weight and token (forward and dX; W is frozen) and as many
of the LM head for completions; attention and what is computed again are not counted. MFU is their share of the rate of a large
product measured in the same run.
"""

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import torch

from bench.measure import card, gemm_rate, print_json, quantiles
from bench.memory import peak, settings
from bench.models import SHAPES, model_directory
from tinylora.cli import table
from tinylora.rl.config import TrainConfig
from tinylora.rl.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="qwen7b" if gpu else "qwen0.5b", choices=["builtin", *SHAPES])
    parser.add_argument("--prompts", type=int, default=16 if gpu else 1)
    parser.add_argument("--samples", type=int, default=16 if gpu else 8)
    parser.add_argument("--longest", type=int, default=256 if gpu else 64, help="tokens of every completion")
    parser.add_argument("--rounds", type=int, default=3, help="steps; the first is warm-up")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--json", help="a file for the last line too")
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    dtype = torch.bfloat16 if o.device.startswith("cuda") else torch.float32
    rate = gemm_rate(8192 if gpu else 1024, device=o.device, dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        path = model_directory(o.model, Path(scratch), dtype)
        config = settings(path, o.prompts, o.samples, o.longest, o.device, Path(scratch))
        trainer = Trainer(TrainConfig(**config | {"microbatch_tokens": None, "max_steps": o.rounds}))
        rows = [trainer._train_step() for _ in range(o.rounds)][1:]
        prompt = statistics.mean(len(trainer.text.prompt(row["prompt"])) for row in trainer.train_rows)
        layers, head = trainer.model.layers, trainer.model.head.numel()
        weights = sum(g.weight.numel() for layer in layers for g in layer.groups)

    completions = statistics.mean(r["completions/mean_length"] for r in rows) * o.prompts * o.samples
    tokens = o.prompts * prompt + completions
    flop = 4 * weights * tokens + 4 * head * completions
    seconds = {name: [r[f"{name}_time"] for r in rows] for name in ("rollout", "update", "step")}
    counts = {"rollout": completions, "update": tokens, "step": o.prompts * o.samples * prompt + completions}
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    lines = [[name, f"{m * 1e3:,.0f}", f"{counts[name] / m:,.0f}"] for name, m in medians.items()]
    print(table([f"{o.model}, {o.prompts} x {o.samples}, {o.longest} tokens each", "ms", "tokens/s"], lines))
    mfu = flop / medians["update"] / rate
    print(f"update: MFU {mfu:.1%} of {rate / 1e12:.2f} TFLOP/s; peak {peak(o.device):.2f} GB; {trainer.plan}")
    print_json(
        {
            "bench": "grpo",
            **card(),
            **{k: getattr(o, k) for k in ("model", "prompts", "samples", "longest", "device")},
            "seconds": {name: quantiles(s) if len(s) > 1 else {"median": s[0]} for name, s in seconds.items()},
            "tokens_per_second": {name: counts[name] / m for name, m in medians.items()},
            "mfu": mfu,
            "gemm_tflops": rate / 1e12,
            "peak_gb": peak(o.device),
        },
        o.json,
    )


if __name__ == "__main__":
    main()
