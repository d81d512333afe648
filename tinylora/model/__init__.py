"""One hand-written decoder for Qwen2/2.5, Qwen3 and Llama 3.x."""

from tinylora.model.decoder import Decoder
from tinylora.model.loader import load_model

__all__ = ["Decoder", "load_model"]
