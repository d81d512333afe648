"""A run that starts from a saved adapter: its settings follow the adapter's, and what does not fit it is refused by name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinylora.adapter.files import adapter_path, read_about, read_adapter
from tinylora.adapter.on_decoder import Adapter, base_of_decoder
from tinylora.errors import InputError
from tinylora.rl.config import TrainConfig

# Settings that an adapter's own config names alike. param_dtype may change: what is trained is fp32.
SHAPE = ("r", "u", "n_tie", "tie_mode", "basis")


def settings_of(adapter: str) -> dict[str, Any]:
    """The settings of a run that starts from this adapter, as far as the adapter says them."""
    described = read_about(adapter_path(adapter))
    if not described:
        raise InputError(f"--init-adapter {adapter}: no run, and no adapter's directory or file")
    found = {name: described[name] for name in (*SHAPE, "param_dtype", "projection_seed") if name in described}
    if "peft_type" in described:
        found = {name: described[name] for name in ("r", "u") if name in described}
    elif described.get("projection") == "identity":
        found = {name: found[name] for name in ("r", "basis", "param_dtype", "projection_seed") if name in found}
        found["method"] = "lora_xs"
    if isinstance(modules := described.get("target_modules"), list):
        found["target_modules"] = tuple(modules)
    return found


def initial_adapter(model: Any, c: TrainConfig, path: Path) -> Adapter:
    """The adapter saved in `path`, a run's directory or its own, on the model, a Decoder.

    InputError where base, P or factors are others, it covers other modules than these settings, or has another shape.
    """
    path, wanted, base = adapter_path(path), c.adapter, base_of_decoder(model)
    config, parts, v = _named(lambda: read_adapter(path, base))
    names = SHAPE if parts.peft is None else ("r", "u")
    for name in names:
        if getattr(config, name) != getattr(wanted, name):
            raise InputError(
                f"--init-adapter {path} has {name} {getattr(config, name)}, and these settings {getattr(wanted, name)}"
            )
    if parts.peft is None and config.projection != wanted.projection:
        raise InputError(f"--init-adapter {path} is of --method {'lora_xs' if config.projection == 'identity' else 'tinylora'}")
    if parts.peft is None and config.p_seed != wanted.p_seed:
        raise InputError(
            f"--init-adapter {path} has P of --projection-seed {config.p_seed}, and these settings {wanted.p_seed}"
        )
    covered, asked = set(parts.factors), set(base.targets(wanted.target_modules))
    for said, modules in (("adapts", covered - asked), ("does not adapt", asked - covered)):
        if modules:
            some = ", ".join(sorted(modules)[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
            raise InputError(f"--init-adapter {path} {said} {some}: --target-modules has to name just what it adapts")
    adapter = Adapter(model, dataclasses.replace(config, param_dtype=wanted.param_dtype), parts)
    adapter.load_v(v)
    return adapter


def _named(read: Callable[[], Any]) -> Any:
    """What `read` gives, with this flag's name in its errors."""
    try:
        return read()
    except InputError as error:
        raise InputError(str(error).replace("--adapter", "--init-adapter", 1)) from None
