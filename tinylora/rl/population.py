"""Several runs at once: adapters of one base whose rollouts go through the engine together.

Each has its own prompts, sampling, optimizer and run directory, and becomes what it would have become alone.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tinylora.errors import InputError
from tinylora.rl.config import TrainConfig, flag
from tinylora.rl.trainer import Trainer, train_together

# Settings that members may differ in: what is trained and how it is learned, not what a rollout's rows have in common.
OWN = (
    "learning_rate", "seed", "projection_seed", "output_dir", "resume", "u", "n_tie", "tie_mode", "param_dtype", "sigma",
    "lr_scheduler_type", "warmup_steps", "max_grad_norm", "max_steps", "num_iterations", "loss_type", "beta", "epsilon",
    "epsilon_high", "scale_rewards", "importance_sampling_cap", "microbatch_tokens", "save_steps", "dead_steps",
)  # fmt: skip


def train_population(configs: Sequence[TrainConfig]) -> list[Path]:
    """Train all members to their ends; returns their run directories, which are as solo runs leave them.

    InputError where they differ in more than OWN, have no output_dir of their own, or train whole weights.
    """
    if not configs:
        return []
    first = configs[0]
    for c in configs[1:]:
        for f in dataclasses.fields(TrainConfig):
            if f.name not in OWN and getattr(c, f.name) != getattr(first, f.name):
                values = f"{getattr(first, f.name)} and {getattr(c, f.name)}"
                raise InputError(f"{flag(f.name)} {values}: runs that train together must have the same")
    if first.method in ("lora", "full"):
        raise InputError(f"--method {first.method}: a population shares its base, so it is of tinylora or lora_xs adapters")
    if len({c.output_dir for c in configs} - {None}) < len(configs):
        raise InputError("--output-dir: every member of a population needs one of its own")
    trainers = [Trainer(first)]
    trainers += [Trainer(c, like=trainers[0]) for c in configs[1:]]
    train_together(trainers)
    return [t.run_directory.path for t in trainers]
