"""Anybody's reward functions: found by name, called, and what they return checked. Errors keep the user's file and line."""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any

from tinylora.errors import InputError

RewardFunction = Callable[..., Any]
SPELLING = "write it as package.module:function or FILE.py:function"


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


def source_of(function: Any) -> str | None:
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
