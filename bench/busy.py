"""A GRPO step of the built-in job beside a busy process and on a quiet machine: python -m bench.busy

In turns in one process with a thread for every core: a step alone, a step while another process computes on one core. With two
threads on two cores the fair share beside one is 1.5 times as long (3 threads, 2 cores) where work could be moved between
threads at no cost; threads that spin while they wait take the core from those they wait for.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench.measure import card, print_json, quantiles
from tinylora.cli import table
from tinylora.rl.config import TrainConfig, preset
from tinylora.rl.trainer import Trainer
from tinylora.waiting import PERIOD, watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each; one more of each is warm-up")
    parser.add_argument("--json", help="a file for the last line too")
    o = parser.parse_args()
    seconds: dict[str, list[float]] = {"quiet": [], "busy": []}
    watch()
    with tempfile.TemporaryDirectory() as scratch:
        settings: dict[str, Any] = preset() | {"learning_rate": 0.0, "eval_size": 0, "output_dir": f"{scratch}/run"}
        trainer = Trainer(TrainConfig(**settings | {"max_steps": 10**6}))
        for turn in range(o.rounds + 1):
            for name in seconds if turn % 2 else reversed(seconds):
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if name == "busy" else None
                time.sleep(3 * PERIOD)  # the threads have seen it by then
                try:
                    spent = trainer._train_step()["step_time"]
                finally:
                    if other is not None:
                        other.kill()
                        other.wait()
                if turn:
                    seconds[name].append(spent)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    ratio = medians["busy"] / medians["quiet"]
    print(table(["built-in step", "ms"], [[name, f"{m * 1e3:.0f}"] for name, m in medians.items()]))
    print(f"beside a busy process {ratio:.2f} times as long")
    found = {name: quantiles(s) for name, s in seconds.items()}
    print_json({"bench": "busy", **card(), "rounds": o.rounds, "seconds": found, "ratio": ratio}, o.json)


if __name__ == "__main__":
    main()
