"""Load a Hugging Face directory of safetensors, or a GGUF, into a Decoder, fusing qkv and gate+up on the way."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinylora.errors import InputError
from tinylora.hashes import content_hash
from tinylora.kernels import dispatch
from tinylora.kernels.frozen import FrozenLinear
from tinylora.kernels.products import bf16_products
from tinylora.model import gguf
from tinylora.model.config import GROUPS, ModelConfig, module_name
from tinylora.model.decoder import Decoder, Layer
from tinylora.tasks.bases import BUILTIN_MODELS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def resolve_model(path_or_id: str, weights: bool = True) -> Path:
    """Where a model lies: the directory of a path, a hub id or a built-in model, or a GGUF file, the hub's as owner/repo/FILE.

    InputError if there is none. weights False: all of a directory but those.
    """
    if path_or_id in BUILTIN_MODELS:
        return BUILTIN_MODELS[path_or_id]
    if not path_or_id:
        raise InputError("--model is empty")
    path = Path(path_or_id).expanduser()
    if path.is_dir() or path.is_file():
        return path
    file = path_or_id.endswith(".gguf")
    slashes = path_or_id.count("/")
    if path.exists() or path_or_id.startswith((".", "/", "~")) or (slashes < 2 if file else slashes != 1):
        wanted = "file, and not one of the hub like Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf"
        wanted = wanted if file else "directory or file, and not a hub id like Qwen/Qwen2.5-0.5B-Instruct"
        ollama = "; of an Ollama model name the file: ollama show --modelfile NAME" if ":" in path_or_id else ""
        raise InputError(f"--model {path_or_id}: no such {wanted}{ollama}")
    from huggingface_hub import snapshot_download  # slow to import, and only hub ids need it

    owner, name, *inside = path_or_id.split("/")
    patterns = ["*.json", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
    if file:
        patterns = [re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-*-of-\1", "/".join(inside))]  # of a split file all parts
    try:
        found = Path(snapshot_download(f"{owner}/{name}", allow_patterns=patterns)).joinpath(*inside)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise InputError(f"--model {path_or_id}: no such directory or file, and the hub did not give it: {error}") from None
    if not found.exists():
        raise InputError(f"--model {path_or_id}: {owner}/{name} has no such file")
    return found


def load_config(path: Path) -> ModelConfig:
    """Of a model that `resolve_model` found. InputError where it is broken, or of another architecture."""
    if path.is_file():
        return gguf.read_head(path)[1]
    files = sorted(f.name for f in path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise InputError(f"--model {path}: no config.json, but GGUF: name one of the files ({', '.join(files)})")
    return ModelConfig.load(path)


def load_model(path_or_id: str, device: str = "auto", dtype: str = "auto") -> Decoder:
    """A frozen Decoder from a directory or hub id ("builtin", "builtin-medium": the models that come with the package), or
    from a GGUF file, on disk or on the hub (owner/repo/FILE.gguf).

    device "auto" is CUDA where there is one; dtype "auto" is the checkpoint's on CUDA, bfloat16 for quantised weights, and
    float32 on a CPU. On a CPU bfloat16 is the layers' weights' alone: everything else, the head included, stays in float32; a
    warning says where the processor multiplies no bf16. InputError for a missing directory, an unsupported architecture, a
    broken or missing file, a missing or misshapen tensor.
    """
    path = resolve_model(path_or_id)
    file, config = gguf.read_head(path) if path.is_file() else (None, load_config(path))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else config.dtype
    if dtype not in _DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of auto, {', '.join(_DTYPES)}")
    dispatch.prove(torch.device(device))  # kernels that are to run there have to be matched against their references first
    weights = _DTYPES[dtype]
    narrow = weights == torch.bfloat16 and device == "cpu"
    if narrow and not bf16_products():
        said = "saves memory and no time here: this processor multiplies no bf16; --dtype float32 is faster"
        warnings.warn(f"--dtype {dtype} {said}", stacklevel=2)
    mixed = narrow and dispatch.backend(device) == "native"
    place = torch.device(device), torch.float32 if mixed else weights
    read = gguf.Checkpoint(file, config, *place) if file else _Checkpoint(path, *place)
    decoder = build_decoder(config, read, file.path if file else path, weights)
    decoder.name = os.path.expanduser(path_or_id)
    decoder.hashed = read.hashed if isinstance(read, _Checkpoint) else {}
    return decoder


class Reader(Protocol):
    """What a decoder is built from: its tensors by Hugging Face's names, and the hashes of those that were read."""

    device: torch.device
    dtype: torch.dtype
    digests: dict[str, str]

    def __call__(self, name: str, *shape: int, out: Tensor | None = None) -> Tensor:
        """The tensor, on the device in the dtype, in `out` where that is given. InputError where it is missing or misshapen."""
        ...


class _Checkpoint:
    """Tensors of a safetensors checkpoint by name, one file or sharded, each hashed as it is read."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.directory, self.device, self.dtype = directory, device, dtype
        self.digests: dict[str, str] = {}
        self.hashed: dict[str, tuple[torch.dtype, str]] = {}
        index = directory / "model.safetensors.index.json"
        try:
            if index.exists():
                self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            else:
                with safe_open(directory / "model.safetensors", "pt") as file:
                    self.files = dict.fromkeys(file.keys(), "model.safetensors")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{directory}: no readable model.safetensors (or its index): {error}") from None

    def __call__(self, name: str, *shape: int, out: Tensor | None = None) -> Tensor:
        """The tensor, on the device in the dtype asked for; in `out` where that is given."""
        if name not in self.files:
            raise InputError(f"{self.directory}: the checkpoint has no tensor {name}")
        path = self.directory / self.files[name]
        try:
            with safe_open(path, "pt") as file:  # for one tensor: an open file keeps every page in memory that was read
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}); download it again") from None
        if tuple(tensor.shape) != shape:
            raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, its config.json says {shape}")
        self.digests[name] = content_hash(tensor)
        self.hashed[name] = tensor.dtype, self.digests[name]
        if out is None:
            return tensor.to(self.device, self.dtype, copy=True)  # or it would keep the file's pages too
        return out.copy_(tensor)


def build_decoder(config: ModelConfig, read: Reader, path: Path, weights: torch.dtype | None = None) -> Decoder:
    """Read every tensor the config calls for, segment by segment into its fused buffer. `weights`: the dtype of the layers'
    linears, where it is not the reader's."""
    c = config

    def linear(layer: int, types: tuple[str, ...], bias: bool) -> FrozenLinear:
        rows, columns = [c.shape(t)[0] for t in types], c.shape(types[0])[1]
        carries, around = types != GROUPS[1], read.dtype
        group = FrozenLinear.empty(sum(rows), columns, bias, weights or around, read.device, carries, around)
        start = 0
        for type_, size in zip(types, rows, strict=True):
            name = module_name(layer, type_)
            read(f"{name}.weight", size, columns, out=group.weight[start : start + size])
            if group.bias is not None:
                read(f"{name}.bias", size, out=group.bias[start : start + size])
            start += size
        return group

    layers = []
    for i in range(c.num_layers):
        prefix, (qkv, o, gate_up, down) = f"model.layers.{i}", GROUPS
        layers.append(
            Layer(
                input_norm=read(f"{prefix}.input_layernorm.weight", c.hidden_size),
                qkv=linear(i, qkv, c.qkv_bias),
                q_norm=read(f"{prefix}.self_attn.q_norm.weight", c.head_dim) if c.qk_norm else None,
                k_norm=read(f"{prefix}.self_attn.k_norm.weight", c.head_dim) if c.qk_norm else None,
                o=linear(i, o, c.o_bias),
                post_norm=read(f"{prefix}.post_attention_layernorm.weight", c.hidden_size),
                gate_up=linear(i, gate_up, False),
                down=linear(i, down, False),
            )
        )
    embedding = read("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
    norm = read("model.norm.weight", c.hidden_size)
    head = embedding if c.tied_head else read("lm_head.weight", c.vocab_size, c.hidden_size)
    return Decoder(config, embedding, layers, norm, head, read.digests, path)
