"""Sixteen adapters that train together beside one after another: python -m bench.population

    together    one step of 16 runs (4 learning rates x 4 seeds) whose rollouts share the decode steps
    solo        the same runs' steps one by one
    one         the same rows under one adapter, and under as many copies of it (alike): what an adapter for each row costs
    es          a step of evolution strategies beside one of GRPO, at the same rollouts

On the built-in model, 16 prompts x 8 completions each, in turns within one run; the runs go on while they are measured, so
both sides see the same lengths.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import Rounds, card, print_json
from tinylora.cli import table
from tinylora.engine.rollout import rollout
from tinylora.rl.config import TrainConfig, preset
from tinylora.rl.grpo import grpo_step
from tinylora.rl.step import draw, stacked
from tinylora.rl.trainer import Trainer

LEARNING_RATES, SEEDS = (0.003, 0.005, 0.01, 0.02), range(4)


def trainers(folder: Path, algorithm: str, rates: tuple[float, ...], seeds: range) -> list[Trainer]:
    found: list[Trainer] = []
    for lr in rates:
        for seed in seeds:
            own = {"learning_rate": lr, "seed": seed, "output_dir": str(folder / f"{algorithm}-{lr}-{seed}"), "eval_size": 0}
            config = TrainConfig(**preset("builtin", "tinylora", algorithm) | own | {"max_steps": 1000})
            found.append(Trainer(config, like=found[0] if found else None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=4, help="learning rates, and seeds: so many of each")
    parser.add_argument("--rounds", type=int, default=7, help="of each contender; the first is warm-up")
    parser.add_argument("--busy", type=float, default=0.04, help="a round counts if others used at most this share of the CPU")
    parser.add_argument("--json", help="a file for the last line too")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = trainers(Path(scratch), "grpo", LEARNING_RATES[: o.members], SEEDS[: o.members])
        (es,) = trainers(Path(scratch), "es", (0.01,), range(1))

        def rows(group: list[Trainer], owners: list[Trainer]) -> None:
            """The rollout alone of the group's prompts, under the adapters of `owners`, dealt out in turn."""
            shares = draw(group)
            with torch.no_grad():
                matrices = stacked([t.policy.matrices() for t in owners])
            prompts = [p for s in shares for p in s.prompts]
            names = [(s.run.config.seed, s.run.step * s.count + i) for s in shares for i in range(s.count)]
            owner = [i % len(owners) for i, s in enumerate(shares) for _ in s.prompts]
            expected = [s.run.expected.get(i, s.run.config.max_completion_length) for s in shares for i in s.order]
            first, n = group[0], group[0].config.num_generations
            rollout(first.model, matrices, prompts, n, first.sampling(), row_adapter=owner, names=names, expected=expected)

        calls: dict[str, Callable[[], Any]] = {
            "rollout/together": lambda: rows(runs, runs),
            "rollout/solo": lambda: [rows([t], [t]) for t in runs],
            "rollout/alike": lambda: rows(runs, runs[:1] * len(runs)),
            "rollout/one": lambda: rows(runs, runs[:1]),
            "step/together": lambda: grpo_step(runs),
            "step/solo": lambda: [t._train_step() for t in runs],
            "single/grpo": runs[0]._train_step,
            "single/es": es._train_step,
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        counted = Rounds(warm_up=1, most=o.busy)
        for turn in range(3 * o.rounds):
            spent = {}
            for i in range(len(calls)):
                name = list(calls)[(i + turn) % len(calls)]
                began = time.perf_counter()
                calls[name]()
                spent[name] = time.perf_counter() - began
            if counted.keep():
                for name, s in spent.items():
                    seconds[name].append(s)
            if counted.kept == o.rounds:
                break
    if counted.kept < 2:
        raise SystemExit(f"only {counted.kept} undisturbed rounds, {counted.dropped} dropped; other processes were running")

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    ratios = {
        "rollout, together / solo": ratio("rollout/together", "rollout/solo"),
        "rollout, an adapter for each row / one": ratio("rollout/alike", "rollout/one"),
        "step, together / solo": ratio("step/together", "step/solo"),
        "step, GRPO / ES": ratio("single/grpo", "single/es"),
    }
    print(table(["", "ms"], [[name, f"{statistics.median(s) * 1e3:,.0f}"] for name, s in seconds.items()]))
    print(table(["", "ratio"], [[name, f"{r:.2f}"] for name, r in ratios.items()]))
    print(f"{len(runs)} members; {counted.kept} rounds kept, {counted.dropped} dropped")
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    print_json({"bench": "population", **card(), "members": len(runs), "seconds": medians, "ratios": ratios}, o.json)


if __name__ == "__main__":
    main()
