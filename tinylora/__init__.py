"""tinylora: train a handful of numbers on a frozen language model by reinforcement learning."""

from tinylora.adapter.attached import AttachedAdapter, attach
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.errors import InputError
from tinylora.loading import load_adapter
from tinylora.model.loader import load_model

__version__ = "0.1.0"
__all__ = ["Adapter", "AttachedAdapter", "InputError", "TinyLoRAConfig", "attach", "load_adapter", "load_model"]
