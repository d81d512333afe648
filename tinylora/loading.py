"""A saved adapter, loaded onto our Decoder or onto anybody's model; and the model and the run that it came from."""

import json
from pathlib import Path
from typing import Any, overload

import torch

from tinylora.adapter import attached
from tinylora.adapter.attached import AttachedAdapter
from tinylora.adapter.files import adapter_path, read_about, read_adapter
from tinylora.adapter.on_decoder import Adapter, base_of_decoder
from tinylora.model.decoder import Decoder
from tinylora.tasks.bases import BUILTIN_MODELS


@overload
def load_adapter(directory: str | Path, model: Decoder, *, force_base: bool = False) -> Adapter: ...
@overload
def load_adapter(
    directory: str | Path, model: torch.nn.Module, name: str = "default", force_base: bool = False
) -> AttachedAdapter: ...


def load_adapter(
    directory: str | Path, model: Decoder | torch.nn.Module, name: str = "default", force_base: bool = False
) -> Adapter | AttachedAdapter:
    """Load a saved adapter onto the base it was trained on: an `Adapter` on a Decoder, attached layers on any other model.

    `directory` is an adapter's, a run's (its adapter/), PEFT's of a TINYLORA adapter, or a file of `export --to tiny`.
    `name` is the adapter's among several on an attached model. force_base: a base with other weights, as another quantisation
    has, is a warning and no error, where it has the same modules. InputError where it is missing, broken, of another base, or
    where P or the factors come out differently here; the model is then as it was.
    """
    path = adapter_path(directory)
    if isinstance(model, Decoder):
        config, parts, v = read_adapter(path, base_of_decoder(model), force_base)
        adapter = Adapter(model, config, parts)
        adapter.load_v(v)
        return adapter
    return attached.load(path, model, name, force_base)


def run_of(adapter: str | Path) -> dict[str, Any]:
    """config.json of the run that an adapter is of, by the run's directory or its adapter/ or best/; {} where it is of none."""
    path = Path(adapter)
    for place in (path, path.parent) if path.name in ("adapter", "best") else (path,):
        try:
            about = json.loads((place / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(about, dict) and isinstance(about.get("settings"), dict):
            return about
    return {}


def prompt_of(adapter: str | Path) -> dict[str, Any] | None:
    """What makes the prompts that an adapter was trained on, by itself or by its run; None where neither says."""
    return read_about(adapter_path(adapter)).get("prompt", run_of(adapter).get("prompt"))


def model_of(adapter: str | Path) -> str | None:
    """The model that an adapter was trained on, as it was typed: from its run's config.json, else from its own. None where
    that names none which comes with the package, is on disk or may be on the hub: older ones have the last part of a path."""
    typed = run_of(adapter).get("settings", {}).get("model")
    if isinstance(typed, str):
        return typed
    named = str(read_about(adapter_path(adapter)).get("base_model_name_or_path", ""))
    named = {str(path): name for name, path in BUILTIN_MODELS.items()}.get(named, named)  # exports give these their directory
    on_hub = "/" in named and not named.startswith((".", "/", "~"))
    return named if named and (named in BUILTIN_MODELS or on_hub or Path(named).exists()) else None
