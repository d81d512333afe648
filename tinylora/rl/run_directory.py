"""A run on disk: config.json, metrics.jsonl, evaluations/, adapter/, checkpoint/. Killed at any moment, it can go on.

A checkpoint is one file, renamed into place before its step's metrics row is appended, and carries that row. Resuming
therefore finds either both, or the row in the checkpoint; rows beyond the checkpoint and a torn last line are dropped.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinylora.errors import InputError
from tinylora.files import PARTIAL, write_safetensors, write_text
from tinylora.rl.config import stored_settings

# The only metrics that two runs of the same settings may differ in.
CLOCK_METRICS = (
    "step_time", "rollout_time", "reward_time", "update_time", "tokens_per_second", "rollout_tokens_per_second", "eval_time",
)  # fmt: skip
# Settings that may change when a run goes on; none of them touches the result.
FREE_SETTINGS = ("output_dir", "save_steps", "logging_steps", "log_completions", "sample_steps")
V_IN_METRICS = 1024  # trained numbers up to which each step's v is in its metrics row; above, in a file of its own

Metrics = dict[str, Any]  # a line of metrics.jsonl, and whatever else is stored as JSON


def is_step(row: Metrics) -> bool:
    """Whether a metrics row is a training step's, and not an evaluation's."""
    return "step_time" in row


def changed_settings(old: Metrics, new: Metrics) -> list[tuple[str, Any, Any]]:
    """(name, stored value, wanted value) of the settings in which a run as stored differs from the one wanted."""
    held, wanted = (json.loads(json.dumps(x)) for x in (stored_settings(old), new))  # as JSON keeps them
    return [(k, held.get(k), v) for k, v in wanted.items() if k not in FREE_SETTINGS and v != held.get(k)]


def _differences(stored: Metrics, about: Metrics, key: str) -> list[str]:
    """The names under a key of config.json whose values are not those stored; what an older run does not say is none."""
    held = stored.get(key, {})
    return [name for name, value in about.get(key, {}).items() if name in held and held[name] != value]


class RunDirectory:
    def __init__(self, path: Path, about: Metrics, resume: bool) -> None:
        """Start a run in `path`, or take up the one that is there. `about` is what config.json says.

        InputError where the directory cannot be written, already holds a run, or holds a different one.
        """
        self.path = path
        self.rows: list[Metrics] = []
        self.checkpoint: tuple[dict[str, Tensor], Metrics] | None = None
        stored = _read_json(path / "config.json")
        if stored is not None and not resume:
            raise InputError(f"--output-dir {path} already holds a run; add --resume to continue it, or choose another")
        if stored is None and resume:
            raise InputError(f"--resume: {path} holds no run")
        if stored is None and path.is_dir() and any(not p.name.endswith(PARTIAL) for p in path.iterdir()):
            raise InputError(f"--output-dir {path} is not empty and holds no run; choose another")
        try:
            if stored is None:
                write_text(path / "config.json", json.dumps(about, indent=2) + "\n")
            else:
                self._take_up(stored, about)
        except OSError as error:
            raise InputError(f"--output-dir {path} cannot be written: {error.strerror}") from None

    def _take_up(self, stored: Metrics, about: Metrics) -> None:
        new = about["settings"]
        changed = changed_settings(stored["settings"], new)
        longer = {name for name, *_ in changed} & {"max_steps", "num_train_epochs"}
        if other := [change for change in changed if change[0] not in longer]:
            said = ", ".join(f"{k} was {old!r}, now {wanted!r}" for k, old, wanted in other)
            raise InputError(
                f"--resume: {self.path} holds a different run: {said}. To go on from its adapter: --init-adapter {self.path}"
            )
        was, steps = stored.get("max_steps", about["max_steps"]), about["max_steps"]
        if longer and steps < was:
            raise InputError(f"--resume: {steps} steps, and the run in {self.path} has {was}: more can be had, fewer not")
        if longer and new["lr_scheduler_type"] != "constant":
            raise InputError(
                f"--resume: the learning rate of {self.path} falls over {was} steps ({new['lr_scheduler_type']}); with {steps} "
                f"its steps would have been others. To go on from its adapter: --init-adapter {self.path}"
            )
        if stored.get("prompt", about.get("prompt")) != about.get("prompt"):
            raise InputError(f"--resume: {self.path} began with other prompts, as those of another day: resume it by itself")
        if stored["base_model_hash"] != about["base_model_hash"]:
            raise InputError(f"--resume: the weights of {new['model']} are not those the run in {self.path} began with")
        if differs := _differences(stored, about, "data"):
            hint = " (the chat template or the tokenizer is another)" if differs == ["prompts' token ids"] else ""
            raise InputError(f"--resume: the data of {self.path} changed since it began, in its {', '.join(differs)}{hint}")
        if differs := _differences(stored, about, "reward_sources"):
            raise InputError(f"--resume: the source of --reward {' '.join(differs)} changed since the run in {self.path} began")
        if longer:
            write_text(self.path / "config.json", json.dumps({**stored, "settings": new, "max_steps": steps}, indent=2) + "\n")
        file = self.path / "checkpoint" / "state.safetensors"
        step = 0
        if file.exists():
            try:
                with safe_open(file, "pt") as state:
                    tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118  not a dict
                    row = json.loads(state.metadata()["row"])
            except (SafetensorError, KeyError, ValueError) as error:
                raise InputError(f"--resume: {file} cannot be read: {error}") from None
            self.checkpoint, step = (tensors, row), row["step"]
        metrics = self.path / "metrics.jsonl"
        for line in metrics.read_text().split("\n") if metrics.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the end, or torn by the kill; nothing follows it
            if row["step"] <= step:
                self.rows.append(row)
        if self.checkpoint and not any(r["step"] == step and is_step(r) for r in self.rows):
            self.rows.append(self.checkpoint[1])
        write_text(metrics, "".join(json.dumps(r) + "\n" for r in self.rows))

    def save_checkpoint(self, tensors: dict[str, Tensor], row: Metrics) -> None:
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        write_safetensors(self.path / "checkpoint" / "state.safetensors", tensors, {"row": json.dumps(row)})

    def keep_v(self, step: int, v: Tensor) -> None:
        """Keep a step's v where it is too long for the metrics."""
        write_safetensors(self.path / "checkpoint" / "v" / f"step-{step:06d}.safetensors", {"v": v.detach().cpu().contiguous()})

    def append(self, row: Metrics) -> None:
        """Add a metrics row; its bytes are handed to the system at once."""
        self.rows.append(row)
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def has_evaluation_row(self, step: int) -> bool:
        return any(r["step"] == step and "eval/n" in r for r in self.rows)

    def load_evaluation(self, step: int) -> Metrics | None:
        return _read_json(self.path / "evaluations" / f"step-{step:06d}.json")

    def save_best(self, row: Metrics) -> None:
        """The scores of the adapter in best/."""
        write_text(self.path / "best" / "validation.json", json.dumps(row) + "\n")

    def save_evaluation(self, step: int, scores: Metrics) -> None:
        write_text(self.path / "evaluations" / f"step-{step:06d}.json", json.dumps(scores) + "\n")


def stored_prompt(path: Path) -> Metrics | None:
    """What makes the prompts of the run in `path`; None where there is no run, or an older one, which does not say."""
    return (_read_json(path / "config.json") or {}).get("prompt")


def v_at_step(path: Path, step: int) -> Tensor:
    """v (flat) as used after training step `step` of the run in `path`; InputError where the run has no such step."""
    if step == 0:
        raise InputError("step 0 is the base model: v is zero")
    file = path / "checkpoint" / "v" / f"step-{step:06d}.safetensors"
    if file.exists():
        with safe_open(file, "pt") as stored:
            return stored.get_tensor("v").flatten()
    try:
        lines = [line for line in (path / "metrics.jsonl").read_text().split("\n") if line]
    except OSError:
        raise InputError(f"{path} holds no run") from None
    for line in lines:
        row = json.loads(line)
        if row["step"] == step and "adapter/v" in row:
            return torch.tensor(row["adapter/v"])
    raise InputError(f"the run in {path} has no step {step}")


def _read_json(path: Path) -> Metrics | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
