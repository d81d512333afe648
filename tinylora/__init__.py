"""tinylora: train a handful of numbers on a frozen language model by reinforcement learning."""

from tinylora.adapter import Adapter, TinyLoRAConfig
from tinylora.adapter_files import load_adapter
from tinylora.errors import InputError
from tinylora.layers import AttachedAdapter, attach
from tinylora.model import load_model

__version__ = "0.1.0"
__all__ = ["Adapter", "AttachedAdapter", "InputError", "TinyLoRAConfig", "attach", "load_adapter", "load_model"]
