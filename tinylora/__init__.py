"""tinylora: a handful of numbers trained on a frozen language model by reinforcement learning.

The names below are imported when they are first asked for, so that grading and settings load no PyTorch; type checkers read
__init__.pyi.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

PLACES = {
    "Adapter": "tinylora.adapter.on_decoder",
    "AttachedAdapter": "tinylora.adapter.attached",
    "InputError": "tinylora.errors",
    "TinyLoRAConfig": "tinylora.adapter.config",
    "attach": "tinylora.adapter.attached",
    "load_adapter": "tinylora.loading",
    "load_model": "tinylora.model.loader",
}

__all__ = ["Adapter", "AttachedAdapter", "InputError", "TinyLoRAConfig", "attach", "load_adapter", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'tinylora' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(PLACES[name]), name)
    return found
