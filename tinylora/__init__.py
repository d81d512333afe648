"""tinylora: a handful of numbers trained on a frozen language model by reinforcement learning.

The names below are imported when they are first asked for, so that grading and settings load no PyTorch; type checkers read
__init__.pyi.
"""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# A thread that waits for others spins this often before it sleeps. Beside a busy process libgomp's own 300,000 made a step 3.3
# times slower, and these 1.7 times; on a quiet machine both take the same. It is read when PyTorch is imported, which is later.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

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
