"""Models for benchmarks: the built-in one, random weights at Qwen2.5's shapes, which need no download, and files."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter, base_of_decoder
from tinylora.adapter.parts import Parts, projection_of
from tinylora.engine.directory import write_directory
from tinylora.errors import InputError
from tinylora.model.config import ModelConfig
from tinylora.model.decoder import Decoder
from tinylora.model.loader import build_decoder, load_model
from tinylora.tasks.bases import BUILTIN

SHAPES = {  # hidden, intermediate, layers, heads, kv_heads, vocabulary, tied head
    "tiny": (128, 320, 2, 4, 2, 1000, False),
    "qwen0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen7b": (3584, 18944, 28, 28, 4, 152064, False),
}
CHOICES = f"{', '.join(['builtin', *SHAPES])}, a Hugging Face directory or a GGUF file"  # of --model


def add_dtypes(parser: argparse.ArgumentParser, default: str) -> None:
    """Each side's own: what is fastest for one need not be for the other."""
    for name, whose in (("--dtype", "ours"), ("--peer-dtype", "the peer's")):
        parser.add_argument(name, default=default, choices=["float32", "bfloat16"], help=f"{whose}; default {default}")


def qwen2_config(name: str) -> Qwen2Config:
    hidden, ffn, layers, heads, kv_heads, vocab, tied = SHAPES[name]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )


class _Drawn:
    """In the place of a checkpoint: tensors drawn on the device, where 7 billion numbers take a second."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.digests: dict[str, str] = {}

    def __call__(self, name: str, *shape: int, out: Tensor | None = None) -> Tensor:
        self.digests[name] = name
        out = torch.empty(shape, device=self.device, dtype=self.dtype) if out is None else out
        return out.fill_(1) if "norm" in name else out.normal_(0, 0.02)


def random_decoder(name: str, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Random weights of SHAPES[name]: no CPU's generator, no file. Its path names no directory."""
    return build_decoder(ModelConfig.from_dict(qwen2_config(name).to_dict()), _Drawn(device, dtype), Path(name))


def random_adapter(model: Decoder) -> Adapter:
    """13 numbers tied over all layers, at 0.01; factors are drawn, of a weight's scale: no SVD."""
    config = TinyLoRAConfig(u=13, n_tie="all")
    base = base_of_decoder(model)
    names = base.targets(config.target_modules)

    def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
        (n, k), top = weight.shape, 0.02 * (weight.shape[0] ** 0.5 + weight.shape[1] ** 0.5)  # of a random matrix
        A, B = torch.empty(config.r, k, device=weight.device), torch.empty(n, config.r, device=weight.device)
        return A.normal_(0, k**-0.5), B.normal_(0, top * n**-0.5)

    projections = {name: projection_of(config, name) for name in names}
    adapter = Adapter(model, config, Parts(config.tie(names), projections, {n: factors(base.weights[n]) for n in names}))
    with torch.no_grad():
        adapter.v.fill_(0.01)
    return adapter


def with_peft(base: Any) -> Any:
    """PEFT's TinyLoRA where it has one, else its LoRA at rank 2; a full SVD is replaced by noise, which no time depends on."""
    import peft

    def some_svd(w: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(len(w), 2).to(w) / 1e3, torch.ones(2).to(w), torch.randn(2, w.shape[1]).to(w) / 1e3

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if hasattr(peft, "TinyLoraConfig"):
        config = peft.TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules=targets)
    else:
        config = peft.LoraConfig(r=2, target_modules=targets)
    with patch("torch.linalg.svd", some_svd):
        return peft.get_peft_model(base, config).eval()


def model_directory(name: str, scratch: Path, dtype: torch.dtype, choices: str = CHOICES) -> Path:
    """The Hugging Face directory of a model: "builtin", one of SHAPES, a directory as it is, or what a GGUF file holds.

    A GGUF's weights are written into `scratch` in `dtype`. Quantised ones are thus dequantised for both sides: who measures
    loads the same numbers from the same directory. Of anything else the error names the `choices`.
    """
    path = Path(name).expanduser()
    if name == "builtin":
        return BUILTIN
    if name in SHAPES:
        return _random_directory(name, scratch, dtype)
    if (path / "config.json").exists():
        return path
    if not path.is_file():
        raise SystemExit(f"--model {name}: choose {choices}")
    try:
        write_directory(load_model(str(path), "cpu", str(dtype).removeprefix("torch.")), scratch / "model")
    except InputError as error:
        raise SystemExit(str(error)) from None
    return scratch / "model"


def _random_directory(name: str, scratch: Path, dtype: torch.dtype) -> Path:
    """Random weights and the built-in tokenizer; its end tokens are never likelier than any other."""
    config = qwen2_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    path = scratch / name
    model.save_pretrained(path)
    for file in BUILTIN.glob("tokenizer*"):
        shutil.copy(file, path)
    shutil.copy(BUILTIN / "chat_template.jinja", path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": config.vocab_size - 1}))
    return path


def gsm8k_like(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of a long-tailed distribution like GSM8K's completions: median 170, mean about 200, cut at `longest`."""
    g = torch.Generator().manual_seed(seed)
    return (170 * (0.55 * torch.randn(count, generator=g)).exp()).clamp(8, longest).int().tolist()
