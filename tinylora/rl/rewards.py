"""Rewards beside exact match: controls, and anybody's function with TRL's signature.

A reward function is called once a step with keyword lists, one entry per completion: prompts, completions (each a list with
one assistant message), completion_ids, and every column of the rows; also trainer_state, log_extra and log_metric. It
returns one float per completion, or None for one it cannot score. It may be async.
"""

import asyncio
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from tinylora import prng
from tinylora.errors import InputError

RewardFunction = Callable[..., list[float | None]]

_RANDOM_STREAM = 0x8A2D  # names the stream of random rewards


def random_rewards(count: int, seed: int, step: int) -> list[float]:
    """A fair coin for each completion of a step: 0.0 or 1.0."""
    return (prng.uniform(prng.fold(_RANDOM_STREAM, seed, step) + torch.arange(count)) < 0.5).double().tolist()


def load_reward(spec: str) -> RewardFunction:
    """The function named "package.module:function"; InputError where there is none."""
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a leading dot, as in ./file.py:f
        raise InputError(f"--reward {spec}: {error}; write it as package.module:function") from None
    if not callable(function):
        raise InputError(f"--reward {spec}: {name} is not a function")
    return function


def call_reward(function: RewardFunction, count: int, /, **columns: Any) -> list[float]:
    """Call it and check what comes back: `count` floats, NaN for None. InputError where it raises or miscounts."""
    name = getattr(function, "__name__", repr(function))
    try:
        rewards: Any = function(**columns)
        if inspect.iscoroutine(rewards):
            rewards = asyncio.run(rewards)
    except Exception as error:
        raise InputError(f"the reward function {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        size = len(rewards) if isinstance(rewards, list | tuple) else type(rewards).__name__
        raise InputError(f"the reward function {name} returned {size}, not a list of {count} rewards")
    try:
        values = [math.nan if r is None else float(r) for r in rewards]
    except (TypeError, ValueError):
        raise InputError(f"the reward function {name} returned something that is neither a number nor None") from None
    except OverflowError:  # an int beyond the largest float
        values = [math.inf]
    if any(math.isinf(v) for v in values):
        raise InputError(f"the reward function {name} returned an infinite reward")
    return values
