"""Rewards: exact match of the answer, controls, and anybody's functions with TRL's signature, weighted and summed as in TRL.

A reward function is called once a step with keyword lists, one entry per completion: prompts, completions (each a list with
one assistant message), completion_ids, and every column that any row of the task has, None where a row lacks it; also
rendered_prompts (the prompts as the model got them), trainer_state, log_extra and log_metric. It returns one number for each
completion, in a list, a tensor or whatever can be iterated, or None for one that it cannot score. It may be async.

    reward = sum of weight * value over the functions that scored a completion; NaN where none did
"""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tinylora import prng
from tinylora.errors import InputError
from tinylora.rl.config import ACCURACY, BUILT_IN_REWARDS
from tinylora.tasks.grading import Verdict

RewardFunction = Callable[..., Any]

_RANDOM_STREAM = 0x8A2D  # names the stream of random rewards
SPELLING = "write it as package.module:function or FILE.py:function"
# Names that a function gets from the trainer, TRL's and rendered_prompts: a data column of such a name is not passed.
RESERVED = (
    "prompt", "completion", "prompts", "completions", "completion_ids", "rendered_prompts", "trainer_state", "log_extra",
    "log_metric", "environments",
)  # fmt: skip


@dataclass
class Completed:
    """Completions as rewards see them: lists with one entry a completion."""

    rows: list[dict[str, Any]]
    rendered: list[str]  # the prompt as the model got it
    texts: list[str]
    ids: list[list[int]]
    verdicts: dict[int, Verdict]  # by completion; one that was not graded has none
    step: int  # 0-based
    max_steps: int = 0


@dataclass
class Rewarded:
    """What the rewards said."""

    table: Tensor  # (completions, functions) float64, NaN where a function said None
    rewards: Tensor  # (completions,) float64: the weighted sums
    metrics: dict[str, float] = field(default_factory=dict)  # by log_metric
    columns: dict[str, list[Any]] = field(default_factory=dict)  # by log_extra, for the table of completions


class Rewards:
    """The rewards of a run, by name."""

    def __init__(self, specs: Sequence[str], weights: Sequence[float], extractor: str, seed: int) -> None:
        self.extractor, self.seed = extractor, seed
        specs = specs or (ACCURACY,)
        functions = [None if spec in BUILT_IN_REWARDS else load_reward(spec) for spec in specs]
        plain = [spec if f is None else getattr(f, "__name__", "reward") for spec, f in zip(specs, functions, strict=True)]
        # two functions of one name keep their modules', and "reward" is the sum's
        clear = len(specs) == 1 or (len(set(plain)) == len(plain) and "reward" not in plain)
        self.names = plain if clear else list(specs)
        self.functions = dict(zip(self.names, functions, strict=True))
        self.weights = torch.tensor(list(weights) or [1.0] * len(specs), dtype=torch.float64)  # (functions,)
        self.sources = {spec: _source(f) for spec, f in zip(specs, functions, strict=True) if f is not None}
        self.columns: list[str] = []

    def take_columns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note the columns that the functions get: all that any of these rows has. One line names those that they do not."""
        found = dict.fromkeys(key for row in rows for key in row)
        self.columns = [key for key in found if key not in RESERVED]
        hidden = [key for key in found if key in RESERVED and key != "prompt"]
        if hidden and any(self.functions.values()):
            print(f"columns of the data that are not passed to the reward, as their names are reserved: {', '.join(hidden)}")

    def __call__(self, c: Completed) -> Rewarded:
        """All functions on these completions. InputError where one raises, miscounts, or returns what is no number."""
        count = len(c.texts)
        logged: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        own = {name: f for name, f in self.functions.items() if f is not None}
        given: dict[str, Any] = {key: [row.get(key) for row in c.rows] for key in self.columns} if own else {}
        given |= {
            "prompts": [row["prompt"] for row in c.rows],
            "completions": [[{"role": "assistant", "content": text}] for text in c.texts],
            "completion_ids": c.ids,
            "rendered_prompts": c.rendered,
            "trainer_state": SimpleNamespace(global_step=c.step, max_steps=c.max_steps),
            "log_extra": lambda column, values: extra.__setitem__(column, list(values)),
            "log_metric": lambda name, value: logged.setdefault(name, []).append(float(value)),
        }
        values = dict(zip(own, call_rewards(list(own.values()), count, given), strict=True))
        for name in self.names:
            values.setdefault(name, self._built_in(name, c))
        table = torch.tensor([values[name] for name in self.names], dtype=torch.float64).T  # (completions, functions)
        sums = torch.where(table.isnan().all(1), torch.nan, (table * self.weights).nansum(1))
        metrics = {name: sum(found) / len(found) for name, found in logged.items()}
        return Rewarded(table, sums, metrics, {key: v for key, v in extra.items() if len(v) == count})

    def evaluated(
        self,
        rows: Sequence[dict[str, Any]],
        rendered: Sequence[str],
        texts: Sequence[str],
        ids: Sequence[list[int]],
        verdicts: Sequence[Verdict | None],
        step: int = 0,
    ) -> dict[str, list[float | None]]:
        """The sum's values, "reward", and each function's where there are several; None for what was not scored."""
        judged = {i: v for i, v in enumerate(verdicts) if v is not None}
        found = self(Completed(list(rows), list(rendered), list(texts), list(ids), judged, step))
        columns = {"reward": found.rewards}
        if len(self.names) > 1:
            columns |= dict(zip(self.names, found.table.T, strict=True))
        return {name: [None if math.isnan(x) else x for x in column.tolist()] for name, column in columns.items()}

    def _built_in(self, name: str, c: Completed) -> list[float]:
        if name == "random":
            return random_rewards(len(c.texts), self.seed, c.step)
        verdicts = [c.verdicts.get(i) for i in range(len(c.texts))]
        if name == "format-only":
            return [math.nan if v is None else float(v.answers["strict"] is not None) for v in verdicts]
        return [math.nan if v is None else float(v.right[self.extractor]) for v in verdicts]


def random_rewards(count: int, seed: int, step: int) -> list[float]:
    """A fair coin for each completion of a step: 0.0 or 1.0."""
    return (prng.uniform(prng.fold(_RANDOM_STREAM, seed, step) + torch.arange(count)) < 0.5).double().tolist()


# ---- a user's function --------------------------------------------------------------------------------------------------


def load_reward(spec: str) -> RewardFunction:
    """The function named "package.module:function" or "FILE.py:function"; InputError where there is none."""
    file, _, inside = spec.rpartition(".py:")
    module, _, name = (f"{file}.py", "", inside) if file else spec.partition(":")
    try:
        function = getattr(_of_file(Path(module)) if file else importlib.import_module(module), name)
    except Exception as error:  # the user's module is a program, and raises what it likes
        if _misspelt(error, module):
            raise InputError(f"--reward {spec}: {error}; {SPELLING}") from None
        said = f"{type(error).__name__}: {error}" if not isinstance(error, SyntaxError) else f"SyntaxError: {error.msg}"
        raise InputError(f"--reward {spec}: importing it raised {said}{_place(error, {module})}") from error
    if not callable(function):
        raise InputError(f"--reward {spec}: {name} is not a function")
    return function


def _misspelt(error: Exception, module: str) -> bool:
    """Whether it is the name that is wrong, and not what is behind it."""
    if isinstance(error, ModuleNotFoundError):
        return f"{module}.".startswith(f"{error.name}.")
    frames = traceback.extract_tb(error.__traceback__)
    inside = any(f.filename != __file__ and "importlib" not in f.filename for f in frames)
    return not inside and isinstance(error, FileNotFoundError | AttributeError | TypeError | ValueError)


def _of_file(path: Path) -> ModuleType:
    """A file's module, imported once; what lies beside the file can be imported by it."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _source(function: Any) -> str | None:
    """A hash of the file that a function is from; None where it is from no file."""
    file = getattr(sys.modules.get(getattr(function, "__module__", "") or ""), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:32] if file else None


def _place(error: BaseException, files: Set[str | None]) -> str:
    """Where it was raised: the last line of these files that it went through, else the last outside this one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "importlib" not in f.filename]
    names = {Path(f).name for f in files if f}
    own = [f for f in frames if Path(f.filename).name in names] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def call_reward(function: RewardFunction, count: int, /, **columns: Any) -> list[float]:
    """`call_rewards` of one function."""
    return call_rewards([function], count, columns)[0]


def call_rewards(functions: Sequence[RewardFunction], count: int, columns: Mapping[str, Any]) -> list[list[float]]:
    """Call each and check what comes back: `count` floats, NaN for None. Those that are async are awaited together.

    InputError where one raises, with its file and line, or miscounts.
    """
    returned: list[Any] = []
    for function in functions:
        try:
            returned.append(function(**columns))
        except Exception as error:
            raise _raised(function, error) from error

    async def together() -> list[Any]:
        waiting = [r for r in returned if inspect.isawaitable(r)]
        return list(await asyncio.gather(*waiting, return_exceptions=True))

    awaited = iter(asyncio.run(together()) if any(map(inspect.isawaitable, returned)) else ())
    returned = [next(awaited) if inspect.isawaitable(r) else r for r in returned]
    for function, found in zip(functions, returned, strict=True):
        if isinstance(found, Exception):
            raise _raised(function, found) from found
    return [_checked(function, found, count) for function, found in zip(functions, returned, strict=True)]


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", repr(function))


def _raised(function: RewardFunction, error: Exception) -> InputError:
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = _place(error, {code.co_filename if code else None})
    if not place and code:  # it was not entered: the arguments do not fit
        place = f" ({code.co_filename}:{code.co_firstlineno})"
    return InputError(f"the reward function {_name(function)} raised {type(error).__name__}: {error}{place}")


def _checked(function: RewardFunction, rewards: Any, count: int) -> list[float]:
    name = _name(function)
    try:
        if isinstance(rewards, str | bytes | Mapping | Set):
            raise TypeError
        rewards = list(rewards)
    except TypeError:
        raise InputError(
            f"the reward function {name} returned {type(rewards).__name__}, not a list of {count} rewards"
        ) from None
    except Exception as error:  # a generator is the user's code too
        raise _raised(function, error) from error
    if len(rewards) != count:
        raise InputError(f"the reward function {name} returned {len(rewards)}, not a list of {count} rewards")
    try:
        values = [math.nan if r is None else float(r) for r in rewards]
    except (TypeError, ValueError):
        raise InputError(f"the reward function {name} returned something that is neither a number nor None") from None
    except OverflowError:  # an int beyond the largest float
        values = [math.inf]
    if any(math.isinf(v) for v in values):
        raise InputError(f"the reward function {name} returned an infinite reward")
    return values
