"""Rewards: exact match of a number, and anybody's function with TRL's signature.

A reward function is called once a step with keyword lists, one entry per completion: prompts, completions (each a list with
one assistant message), completion_ids, and every column of the rows; also trainer_state, log_extra and log_metric. It
returns one float per completion, or None for one it cannot score. It may be async.
"""

import asyncio
import importlib
import inspect
import math
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from tinylora.errors import InputError

RewardFunction = Callable[..., list[float | None]]

_STRICT = re.compile(r"#### (-?\$?[0-9.,]+)")
_NUMBER = re.compile(r"-?\$?[0-9][0-9.,]*|-?\$?\.[0-9]+")


def extract_strict(text: str) -> str | None:
    """The first number after "#### ", without commas, dollar sign and final full stop; None where there is none."""
    found = _STRICT.search(text)
    return _clean(found[1]) if found else None


def extract_flexible(text: str) -> str | None:
    """The last number of the text, cleaned the same way; None where there is none."""
    found = _NUMBER.findall(text)
    return _clean(found[-1]) if found else None


def _clean(number: str) -> str | None:
    return number.replace(",", "").replace("$", "").rstrip(".") or None


EXTRACTORS = {"strict": extract_strict, "flexible": extract_flexible}


def same_number(a: str | None, b: str | None) -> bool:
    """Equal in value: 72 and 72.0 are, and nothing equals a missing number."""
    try:
        return a is not None and b is not None and Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


def accuracy_reward(extractor: str) -> RewardFunction:
    """The exact-match reward under "strict" or "flexible" extraction: 1.0 or 0.0."""
    extract = EXTRACTORS[extractor]

    def accuracy(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
        return [float(same_number(extract(c[0]["content"]), gold)) for c, gold in zip(completions, answer, strict=True)]

    return accuracy


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
