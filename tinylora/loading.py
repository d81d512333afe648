"""A saved adapter, loaded onto our Decoder or onto anybody's model."""

from pathlib import Path
from typing import overload

import torch

from tinylora.adapter import attached
from tinylora.adapter.attached import AttachedAdapter
from tinylora.adapter.files import adapter_path, read_adapter
from tinylora.adapter.on_decoder import Adapter, base_of_decoder
from tinylora.model.decoder import Decoder


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
