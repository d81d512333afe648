"""What a decoder needs to know of a Hugging Face config.json. Differences between families are data here, not classes."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylora.errors import InputError

FAMILIES = ("qwen2", "qwen3", "llama")
# The seven projections of a layer, as the four groups that share an input; reading order is the adapter's module order.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PROJECTIONS = tuple(name for group in GROUPS for name in group)


def module_name(layer: int, projection: str) -> str:
    """The Hugging Face name of a projection, without ".weight"."""
    block = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{projection}"


@dataclass(frozen=True)
class ModelConfig:
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tied_head: bool
    rope: dict[str, Any]  # rope_type, rope_theta and the type's own numbers
    max_positions: int
    dtype: str  # of the checkpoint

    def shape(self, projection: str) -> tuple[int, int]:
        """Rows and columns of a projection's weight."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden_size),
            "k_proj": (kv, self.hidden_size),
            "v_proj": (kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[projection]

    def cache_bytes(self, element_size: int) -> int:
        """Of one position's keys and values, in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size

    def to_dict(self) -> dict[str, Any]:
        """A config.json of this model. InputError for what Hugging Face's has no word for."""
        rope = self.rope
        if rope["rope_type"] == "divided":  # the numbers of Llama 3.1 and later give such divisors
            factor, numbers = max(rope["divisors"]), {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope = {"rope_type": "llama3", "rope_theta": rope["rope_theta"], "factor": factor, **numbers}
            rope["original_max_position_embeddings"] = 8192
            theirs = rope_frequencies(dataclasses.replace(self, rope=rope))
            if not torch.allclose(theirs, rope_frequencies(self), rtol=1e-4, atol=0):
                raise InputError("the frequencies of this model's rope are not Llama 3.1's: a config.json cannot say them")
        if self.family != "qwen2" and self.qkv_bias != self.o_bias:
            raise InputError("this model has biases in some of q, k, v and o only: a config.json cannot say that")
        return {
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "attention_bias": self.o_bias,
            "tie_word_embeddings": self.tied_head,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_positions,
            "dtype": self.dtype,
        }

    @staticmethod
    def load(directory: Path) -> "ModelConfig":
        """Read directory/config.json, or a .json file itself; InputError where it is missing, broken or of another family."""
        path = directory if directory.suffix == ".json" else directory / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{directory} is not a model directory: it has no config.json") from None
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, or an integer of thousands of digits
            raise InputError(f"{path} is not valid JSON: {error}") from None
        return ModelConfig.from_dict(raw, str(path))

    @staticmethod
    def from_dict(raw: dict[str, Any], source: str = "config") -> "ModelConfig":
        family = raw.get("model_type", "unnamed")
        unsupported = []
        if family not in FAMILIES:
            unsupported.append(f"model_type {family!r} (supported: {', '.join(FAMILIES)})")
        if raw.get("hidden_act", "silu") != "silu":
            unsupported.append(f"hidden_act {raw['hidden_act']!r}")
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if rope["rope_type"] not in ("default", "linear", "llama3"):
            unsupported.append(f"rope scaling {rope['rope_type']!r}")
        for flag in ("use_sliding_window", "mlp_bias", "quantization_config"):
            if raw.get(flag):
                unsupported.append(flag)
        if unsupported:
            raise InputError(f"{source} asks for what this decoder does not have: {'; '.join(unsupported)}")

        def count(field: str, default: int | None = None) -> int:
            value = raw[field] if default is None else raw.get(field)
            if value is None and default is not None:
                return default
            if type(value) is not int or value < 1:  # True is an int too
                raise InputError(f"{source}: {field} is {json.dumps(value)}; it must be a positive integer")
            return value

        try:
            heads, hidden = count("num_attention_heads"), count("hidden_size")
            kv_heads, head_dim = count("num_key_value_heads", heads), count("head_dim", hidden // heads or 1)
            derived = raw.get("head_dim") is None
            if heads % kv_heads:
                raise InputError(f"{source}: num_key_value_heads is {kv_heads}; it must divide num_attention_heads, {heads}")
            if derived and hidden % heads:
                raise InputError(
                    f"{source}: hidden_size is {hidden}; without head_dim it must be a multiple of num_attention_heads, {heads}"
                )
            if head_dim % 2:
                why = f", hidden_size {hidden} / num_attention_heads {heads}" if derived else ""
                raise InputError(f"{source}: head_dim is {head_dim}{why}; it must be even")
            return ModelConfig(
                family=family,
                vocab_size=count("vocab_size"),
                hidden_size=hidden,
                intermediate_size=count("intermediate_size"),
                num_layers=count("num_hidden_layers"),
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                norm_eps=raw.get("rms_norm_eps", 1e-6),
                qkv_bias=family == "qwen2" or raw.get("attention_bias", False),
                o_bias=family != "qwen2" and raw.get("attention_bias", False),
                qk_norm=family == "qwen3",
                tied_head=raw.get("tie_word_embeddings", False),
                rope=rope,
                max_positions=raw.get("max_position_embeddings", 2048),
                dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
            )
        except KeyError as error:
            raise InputError(f"{source} has no {error}") from None


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Rotation per position of each of the head_dim/2 pairs: float32 (head_dim/2,).

    "llama3" (Llama 3.1) slows the frequencies whose wavelength exceeds the original context and blends the band between;
    "divided" is the same as a GGUF has it, the divisor of each frequency.
    """
    rope, half = config.rope, torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** half
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "divided":
        return frequencies / torch.tensor(rope["divisors"])
    if rope["rope_type"] == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
        blend = blend.clamp(0, 1)  # 0: slowed by the factor; 1: left alone
        return frequencies * blend + frequencies / rope["factor"] * (1 - blend)
    return frequencies
