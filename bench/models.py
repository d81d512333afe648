"""Models for benchmarks: the built-in one, and random weights at Qwen2.5-0.5B's or 7B's shapes, which need no download."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tinylora.model.loader import BUILTIN

SHAPES = {  # hidden, intermediate, layers, heads, kv_heads, vocabulary, tied head
    "qwen0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen7b": (3584, 18944, 28, 28, 4, 152064, False),
}


def model_directory(name: str, scratch: Path, dtype: torch.dtype) -> Path:
    """A directory with the model and the built-in tokenizer; its end tokens are never likelier than any other."""
    if name == "builtin":
        return BUILTIN
    hidden, ffn, layers, heads, kv_heads, vocab, tied = SHAPES[name]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    path = scratch / name
    model.save_pretrained(path)
    for file in BUILTIN.glob("tokenizer*"):
        shutil.copy(file, path)
    shutil.copy(BUILTIN / "chat_template.jinja", path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": vocab - 1}))
    return path


def gsm8k_like(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of a long-tailed distribution like GSM8K's completions: median 170, mean about 200, cut at `longest`."""
    g = torch.Generator().manual_seed(seed)
    return (170 * (0.55 * torch.randn(count, generator=g)).exp()).clamp(8, longest).int().tolist()
