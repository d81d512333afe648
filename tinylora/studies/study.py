"""A study's file, read: its arms, and the settings of each run. `python -m tinylora.sweep --help` says what it holds."""

import itertools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tinylora.errors import InputError
from tinylora.rl.config import TrainConfig, preset
from tinylora.rl.rewards import Rewards

TOP = {"title", "question", "seeds", "x", "x_label", "settings", "arms", "quick"}
SETTINGS = {f.name for f in fields(TrainConfig)} - {"output_dir", "seed", "projection_seed"}


@dataclass
class Arm:
    """Runs that differ in their seeds alone."""

    name: str
    series: str
    settings: dict[str, Any]
    choose: dict[str, list[Any]]

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() or c in ".-=" else "-" for c in self.name.lower()).strip("-")


@dataclass
class Study:
    title: str
    question: str
    seeds: int
    x: str | None
    x_label: str
    quick: bool
    arms: list[Arm]
    measure: str = "accuracy"  # or "reward": what its runs are compared by


def read_study(path: Path, quick: bool) -> Study:
    """InputError for what is missing, unknown, or would be refused by the trainer."""
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    if unknown := raw.keys() - TOP:
        raise InputError(f"{path}: unknown keys {', '.join(sorted(unknown))}; known are {', '.join(sorted(TOP))}")
    shared, faster = dict(raw.get("settings", {})), dict(raw.get("quick", {}))
    seeds = raw.get("seeds", 8)
    if quick:
        seeds = faster.pop("seeds", seeds)
        shared |= faster
    arms = [arm for table_ in raw.get("arms", []) for arm in _arms(path, table_, shared)]
    if quick:
        arms = [replace(a, settings=a.settings | {k: v[0] for k, v in a.choose.items()}, choose={}) for a in arms]
    if not arms:
        raise InputError(f"{path}: a study needs at least one [[arms]]")
    twice = [a.name for i, a in enumerate(arms) if a.folder in {b.folder for b in arms[:i]}]
    if twice:
        raise InputError(f"{path}: two arms are named {twice[0]!r}; put what differs into the name, as {{u}} for u")
    x = raw.get("x")
    study = Study(raw.get("title", path.stem), raw.get("question", ""), seeds, x, raw.get("x_label", x or ""), quick, arms)
    # every error before the first run
    configs = [config(arm.settings | chosen, 0, path) for arm in arms for chosen in combinations(arm.choose)]
    study.measure = measure_of(configs)
    for c in configs:
        Rewards(c.reward, c.reward_weights, c.extractor, c.seed)
    return study


def _arms(path: Path, raw: dict[str, Any], shared: dict[str, Any]) -> Iterator[Arm]:
    own = {k: v for k, v in raw.items() if k not in ("name", "series", "choose")}
    choose = raw.get("choose", {})
    if unknown := (own.keys() | shared.keys() | choose.keys()) - SETTINGS:
        raise InputError(f"{path}: unknown settings {', '.join(sorted(unknown))}; see python -m tinylora.train --help")
    axes = {k: v if isinstance(v, list) and k != "target_modules" else [v] for k, v in own.items()}
    for values in combinations(axes):
        settings = shared | values
        try:
            name = str(raw.get("name", ", ".join(f"{k} {v}" for k, v in values.items()) or "base")).format(**settings)
            yield Arm(name, str(raw.get("series", name)).format(**settings), settings, choose)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(f"{path}: the arm's name {raw.get('name')!r} wants {error}, which no setting gives") from None


def combinations(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def measure_of(configs: Sequence[TrainConfig]) -> str:
    """What a study compares its runs by: "reward" where all have the same own one, else "accuracy". InputError where there is
    nothing that all of them are scored by."""
    rewards = {(c.reward, c.reward_weights) for c in configs}
    if all(c.own_reward for c in configs) and len(rewards) == 1:
        return "reward"
    if all(c.graded for c in configs):
        return "accuracy"
    raise InputError("the arms have different rewards, and no accuracy to be compared by: add accuracy to each arm's reward")


def config(settings: dict[str, Any], seed: int, where: Path, output_dir: str | None = None) -> TrainConfig:
    """A run's settings. InputError that names the study where they are refused."""
    usual = preset(**{name: settings[name] for name in ("model", "method", "algorithm", "dataset") if name in settings})
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        return TrainConfig(**usual | values | {"seed": seed, "projection_seed": seed, "output_dir": output_dir})
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None
