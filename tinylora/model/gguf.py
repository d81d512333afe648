"""A GGUF model under Hugging Face names: its config from the metadata, its tensors as `gguf` dequantises them, row by row.

llama.cpp keeps the rows of q and k of its "llama" architecture pair by pair, x0 y0 x1 y1 ..., where Hugging Face has all x
before all y: they are put back. A tensor of the file that this decoder does not read is an error, as is one that it lacks.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from tinylora.errors import InputError
from tinylora.hashes import digest
from tinylora.model.config import FAMILIES, PROJECTIONS, ModelConfig, module_name
from tinylora.model.gguf_file import GGUF, Place, gguf_package

METADATA = "metadata"  # the name of their hash among the tensors'
CHUNK = 1 << 21  # numbers that are dequantised at a time: 8 MB in float32
_PROJECTIONS = dict(
    zip(PROJECTIONS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True)
)
PAIRED = ("q_proj", "k_proj")  # whose rows are in pairs
_ROPE_DIVISORS = "rope_freqs.weight"
# Numbers of llama.cpp's forward that this decoder does not have, and what each is where it changes nothing.
_PLAIN = {
    "attention.causal": (True,),
    "attention.scale": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
}


def read_head(path: Path) -> tuple[GGUF, ModelConfig]:
    """A file and its config, checked against each other; no weight is read. InputError for what this decoder does not have."""
    file = GGUF(path)
    return file, _config_of(file)


def _config_of(file: GGUF) -> ModelConfig:
    where, metadata = f"--model {file.path}", file.metadata
    family = metadata.get("general.architecture", "unnamed")
    if metadata.get("general.type") == "adapter":
        raise InputError(f"{where}: an adapter, and no model; llama.cpp takes it as --lora")
    if family not in FAMILIES:
        raise InputError(f"{where}: its architecture is {family!r} (supported: {', '.join(FAMILIES)})")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{family}.{key}", default)

    def number(key: str, default: float | None = None) -> float:
        value = get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"{where}: {family}.{key} is {value!r}; it must be a positive number")
        return value

    for key, plain in _PLAIN.items():
        if get(key, plain[0]) not in plain:
            raise InputError(f"{where}: {family}.{key} is {get(key)!r}, which this decoder does not have")
    tokens, embedding = metadata.get("tokenizer.ggml.tokens"), file.tensors.get("token_embd.weight")
    vocabulary = len(tokens) if isinstance(tokens, list) else embedding and embedding.shape[0]
    factor = number("rope.scaling.factor", number("rope.scale_linear", 1.0))
    kind = get("rope.scaling.type", "linear")
    plain_rope = kind == "none" or (kind == "linear" and factor == 1)
    rope = {"rope_type": "default"} if plain_rope else {"rope_type": kind, "factor": factor}
    wanted = {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {**rope, "rope_theta": number("rope.freq_base", 10000.0)},
        "max_position_embeddings": int(number("context_length")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32" if embedding is not None and embedding.type == "F32" else "bfloat16",
    }
    config = ModelConfig.from_dict({k: v for k, v in wanted.items() if v is not None}, f"{where}, by the names of config.json")
    for key, value in (
        ("vocab_size", config.vocab_size),
        ("rope.dimension_count", config.head_dim),
        ("attention.value_length", config.head_dim),
    ):
        if get(key, value) != value:
            raise InputError(f"{where}: {family}.{key} is {get(key)!r}; by its other metadata it is {value}")
    if config.num_layers > len(file.tensors):
        raise InputError(f"{where}: {config.num_layers} layers by its metadata, and {len(file.tensors)} tensors")
    if family != "qwen2":  # where no architecture says it, the tensors do
        qkv, o = (any(f"blk.0.{_PROJECTIONS[p]}.bias" in file.tensors for p in ps) for ps in (PROJECTIONS[:3], ["o_proj"]))
        config = dataclasses.replace(config, qkv_bias=qkv, o_bias=o)
    divided = family == "llama" and _ROPE_DIVISORS in file.tensors
    wanted_shapes = dict(_tensors(config).values()) | ({_ROPE_DIVISORS: (config.head_dim // 2,)} if divided else {})
    for name in sorted(wanted_shapes.keys() - file.tensors.keys()):
        raise InputError(f"{where}: it has no tensor {name}")
    for name, place in file.tensors.items():
        if name not in wanted_shapes:
            raise InputError(f"{where}: its tensor {name} is none that this decoder reads")
        if place.shape != wanted_shapes[name]:
            raise InputError(f"{where}: {name} has shape {place.shape}, its metadata say {wanted_shapes[name]}")
    if divided:
        if config.rope["rope_type"] != "default":
            raise InputError(
                f"{where}: it has {_ROPE_DIVISORS} and {family}.rope.scaling.type {kind!r}; one of the two is read"
            )
        place = file.tensors[_ROPE_DIVISORS]
        [(raw, _)] = _pieces(place, 1)
        divisors = _dequantised(raw, place).flatten().tolist()
        if not all(0 < d < math.inf for d in divisors):
            raise InputError(f"{where}: {_ROPE_DIVISORS} has numbers that are no divisors of a frequency")
        config = dataclasses.replace(config, rope={**config.rope, "rope_type": "divided", "divisors": divisors})
    return config


def file_name(module: str) -> str:
    """blk.I.NAME of a projection model.layers.I.BLOCK.NAME."""
    _, _, layer, _, projection = module.split(".")
    return f"blk.{layer}.{_PROJECTIONS[projection]}"


def from_pairs(x: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * head_dim, ...) in llama.cpp's order, x0 y0 x1 y1 ... of each head, as x0 x1 ... y0 y1 ..."""
    return x.view(-1, head_dim // 2, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def in_pairs(x: Tensor, head_dim: int) -> Tensor:
    """The way back."""
    return x.view(-1, 2, head_dim // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _tensors(c: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file's name and the shape of every tensor of a decoder, by Hugging Face's name."""
    table, width = (c.vocab_size, c.hidden_size), (c.hidden_size,)
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", table),
        "model.norm.weight": ("output_norm.weight", width),
    }
    if not c.tied_head:
        found["lm_head.weight"] = ("output.weight", table)
    for i in range(c.num_layers):
        norms: dict[str, tuple[str, tuple[int, ...]]]
        norms = {"input_layernorm": ("attn_norm", width), "post_attention_layernorm": ("ffn_norm", width)}
        if c.qk_norm:
            norms |= {f"self_attn.{x}_norm": (f"attn_{x}_norm", (c.head_dim,)) for x in "qk"}
        for ours, (theirs, shape) in norms.items():
            found[f"model.layers.{i}.{ours}.weight"] = (f"blk.{i}.{theirs}.weight", shape)
        for projection in PROJECTIONS:
            module, both = module_name(i, projection), c.shape(projection)
            found[f"{module}.weight"] = (f"{file_name(module)}.weight", both)
            if c.o_bias if projection == "o_proj" else c.qkv_bias and projection in PROJECTIONS[:3]:
                found[f"{module}.bias"] = (f"{file_name(module)}.bias", both[:1])
    return found


class Checkpoint:
    """Tensors of a GGUF by Hugging Face's names, each hashed as it is read, with its type: "Q4_K:hash"."""

    def __init__(self, file: GGUF, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.file, self.config, self.device, self.dtype = file, config, device, dtype
        self.names = {ours: theirs for ours, (theirs, _) in _tensors(config).items()}
        own = (f"{config.family}.", "tokenizer.ggml.")  # what enters the function and the ids; names and licences do not
        self.digests = {METADATA: digest({k: v for k, v in file.metadata.items() if k.startswith(own)})}

    def __call__(self, name: str, *shape: int, out: Tensor | None = None) -> Tensor:
        """The tensor, on the device in the dtype asked for; in `out` where that is given."""
        c = self.config
        pairs = c.family == "llama" and name.rpartition(".")[0].endswith(PAIRED)
        whole = torch.empty(shape, dtype=self.dtype, device=self.device) if out is None else out
        place, h = self.file.tensors[self.names[name]], xxhash.xxh3_128()
        for raw, rows in _pieces(place, c.head_dim if pairs else 1):
            h.update(raw.data)
            piece = _dequantised(raw, place).view(-1, *shape[1:])
            if not piece.isfinite().all():
                raise InputError(f"--model {place.file}: {place.name} has numbers that are not finite; download it again")
            whole[rows] = from_pairs(piece, c.head_dim) if pairs else piece
        self.digests[name] = f"{place.type}:{h.hexdigest()}"
        return whole


def _pieces(place: Place, multiple: int) -> Iterator[tuple[np.ndarray, slice]]:
    """The bytes of a tensor, (rows, bytes), CHUNK numbers or so at a time and a multiple of rows; and which rows they are: all
    of a vector."""
    step = -(-CHUNK // place.shape[-1] // multiple) * multiple
    with open(place.file, "rb") as file:
        file.seek(place.offset)
        for start in range(0, place.rows, step):
            rows = min(step, place.rows - start)
            raw = np.fromfile(file, np.uint8, rows * place.row_bytes)
            yield raw.reshape(rows, -1), slice(start, start + rows) if len(place.shape) > 1 else slice(None)


def _dequantised(raw: np.ndarray, place: Place) -> Tensor:
    """float32 (rows, columns) of a tensor's bytes (rows, bytes)."""
    package = gguf_package()
    try:
        with np.errstate(all="ignore"):  # what is not finite is an error of its own
            return torch.from_numpy(package.dequantize(raw, package.GGMLQuantizationType[place.type]))
    except NotImplementedError:
        raise InputError(f"--model {place.file}: {place.name} is {place.type}, which gguf cannot dequantise") from None
