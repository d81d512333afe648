"""python -m tinylora.train: train a handful of numbers on a frozen model. `--help` lists every setting."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tinylora.cli import flag, read_settings, run_command, split_flag
from tinylora.errors import InputError
from tinylora.loading import model_of
from tinylora.rl.config import TrainConfig, preset, stored_settings
from tinylora.rl.dry_run import dry_run, first_prompt
from tinylora.rl.initial import settings_of
from tinylora.rl.trainer import Trainer


@dataclass(frozen=True)
class TrainCommand(TrainConfig):
    """Train a handful of numbers on a frozen model by GRPO. With no flags: 13 numbers on the built-in base, 12 to 35 seconds
    on two cores. A step's batch is --prompts-per-step PROMPTS times --num-generations completions (TRL counts completions).
    --config FILE.toml gives settings by these names; flags win over it."""

    num_parameters: int | None = None
    """Trained numbers in all: this many in one group, in the place of --u and --n-tie."""
    show_prompt: bool = False
    """Print the first prompt as the model gets it, and stop."""
    dry_run: bool = False
    """Print the plan of this run from the model's config.json alone, and stop."""
    resume: bool = False
    """Continue the run in --output-dir, bit for bit. Its settings are the defaults then; --max-steps may be larger where the
    learning rate is constant."""

    def config(self) -> TrainConfig:
        """The run's settings without the command's flags."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})


ALIASES = {"--eval-every": "--eval-steps"}


def parse(arguments: list[str]) -> TrainCommand:
    """Flags over the --config file over, with --resume, the run's own settings, over the model's preset."""
    import tyro  # the commands' alone: the trainer is imported where it is not installed

    arguments = [dashed(a) for a in arguments]
    path, arguments = split_flag(arguments, "--config")
    output_dir, _ = split_flag(arguments, "--output-dir")
    epochs, _ = split_flag(arguments, "--num-train-epochs")
    settings: dict[str, Any] = read_settings(path, TrainCommand) if path else {}
    settings, arguments = _counted(settings, arguments)
    if "--resume" in arguments:
        if output_dir is None:
            raise InputError("--resume needs --output-dir, the run to continue")
        settings = {**_stored_settings(Path(output_dir)), **settings}
    else:
        said = {n: split_flag(arguments, f"--{n}")[0] or settings.get(n) for n in ("model", "method", "algorithm", "dataset")}
        initial = split_flag(arguments, "--init-adapter")[0] or settings.get("init_adapter")
        if initial and not said["model"]:
            said["model"] = model_of(initial)
        usual = preset(**{name: value for name, value in said.items() if value})
        usual |= settings_of(initial) if initial else {}
        settings = {**usual, **settings}
    if epochs:
        settings["max_steps"] = -1
    program = "python -m tinylora.train"
    return tyro.cli(TrainCommand, args=arguments, default=TrainCommand(**settings), prog=program)


def _counted(settings: dict[str, Any], arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The --config file's settings and the flags, with --num-parameters as u and n_tie, beside which it is refused."""
    said, arguments = split_flag(arguments, "--num-parameters")
    written = settings.pop("num_parameters", None)
    count = written if said is None else said
    if count is None:
        return settings, arguments
    where = " (it is in the --config file)" if said is None else ""
    for name in ("u", "n_tie"):
        if name in settings or split_flag(arguments, flag(name))[0] is not None:
            raise InputError(f"--num-parameters {count} and {flag(name)}: give one of them{where}")
    method = split_flag(arguments, "--method")[0] or settings.get("method", "tinylora")
    if method != "tinylora":
        raise InputError(f"--num-parameters {count}: --method {method} has a count of its own, by --r{where}")
    if not str(count).isdecimal() or int(count) < 1:
        raise InputError(f"--num-parameters {count}: it must be a whole number, at least 1")
    return settings | {"u": int(count), "n_tie": "all"}, arguments


def dashed(argument: str) -> str:
    """--output_dir=a_b as --output-dir=a_b, a flag's other name as the flag; anything that is no flag as it is."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    name = name.replace("_", "-")
    return ALIASES.get(name, name) + equals + value


def _stored_settings(path: Path) -> dict[str, Any]:
    try:
        return stored_settings(json.loads((path / "config.json").read_text())["settings"])
    except (OSError, ValueError, KeyError):
        raise InputError(f"--resume: {path} holds no run") from None


def describe(trainer: Trainer) -> str:
    c, count = trainer.config, trainer.policy.num_parameters
    batch = f"{c.prompts_per_step} prompts x {c.num_generations} completions"
    task = f"{c.dataset} of {c.data}" if c.data else c.dataset
    return (
        f"training {count} number{'s' if count > 1 else ''} ({c.method}, {c.algorithm}) on {c.model}, "
        f"{task}, {trainer.max_steps} steps of {batch}, learning rate {trainer.learning_rate:.2g}, "
        f"into {trainer.run_directory.path}"
    )


def _evaluation(c: TrainConfig, path: Path, step: int) -> str:
    """The command that scores the adapter after a step of this run: the settings that are not the model's usual ones."""
    usual = {f.name: f.default for f in fields(TrainConfig)} | preset(c.model) | {"model": TrainConfig.model, "reward": ()}
    asked = ["model", "dataset", "data", "prompt_style", "max_completion_length", "dtype"]
    asked += ["temperature"] if c.temperature else []  # greedy answers are always given
    asked += ["reward"] if c.own_reward else []
    said = {name: getattr(c, name) for name in asked if getattr(c, name) != usual[name]}
    given = [f"{flag(name)} {' '.join(v) if isinstance(v, tuple) else v}" for name, v in said.items()]
    return " ".join(["python -m tinylora.evaluate", *given, f"--adapter {path} --adapter-step {step}"])


def main(arguments: list[str]) -> int:
    command = parse(arguments)
    config = command.config()
    if command.dry_run:
        print(dry_run(config, split_flag([dashed(a) for a in arguments], "--config")[0]))
        return 0
    if command.show_prompt:
        print(first_prompt(config))
        return 0
    trainer = Trainer(config, resume=command.resume)
    if trainer.step == trainer.max_steps:
        print(f"the run in {trainer.run_directory.path} is whole: {trainer.step} of {trainer.max_steps} steps")
    print(describe(trainer), trainer.plan, sep="\n", flush=True)
    finished = trainer.train()
    path = trainer.run_directory.path
    if (finished or trainer.dead) and trainer.inputs.test_rows:
        print("\n" + trainer.before_and_after())
    if not finished and trainer.dead:
        unscored = trainer.last_step.get("frac_reward_zero_std/unscored")
        good = trainer.step - trainer.steps_since_gradient()
        again = _evaluation(config, path, good)
        print(
            f"\nstopped after step {trainer.step}: nothing to learn from in the last {trainer.config.dead_steps} steps, as "
            + ("no completion got a reward; " if unscored == 1 else "every group's rewards were equal; ")
            + (f"the last good step is {good} ({again})" if good else "there is no good step")
        )
        return 1
    if not finished:
        print(f"stopped after step {trainer.step} of {trainer.max_steps}; go on with --output-dir {path} --resume")
        return 130
    if trainer.config.eval_steps:
        best = trainer.best_step()
        said = f"step {best}, in {path / 'best'}" if best else "the base; there is no best/"
        print(f"\nbest on held-out training rows: {said}")
    size = sum(t.numel() * t.element_size() for t in trainer.policy.named_parameters().values())
    print(f"\n{trainer.policy.num_parameters} trained numbers ({size} bytes) in {path / 'adapter'}")
    return 0


if __name__ == "__main__":
    run_command(main)
