"""Small GGUF files with random weights, of every architecture and type that we read, as llama.cpp's converter lays them out."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf: Any = pytest.importorskip("gguf", reason="the package gguf is not installed, as on a bare machine")

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 512, 4, 2, 64, 2  # K-quants want multiples of 256
SCALE = 0.06  # of the weights' spread: 1 / sqrt(HIDDEN), so that no layer is close to the identity
TYPES = ["F32", "F16", *(type_.name for type_ in gguf.quants._type_traits)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Where a block has its float16 scales, for types that gguf can read and not write; IQ1_M has it in pieces.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SCALES |= {name: (0,) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_NL", "IQ4_XS")}


def blocks(type_: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes (rows, bytes) of a random weight in this type, with a spread of about SCALE."""
    kind = gguf.GGMLQuantizationType[type_]
    if type_ not in (*SCALES, "IQ1_M", "NVFP4"):
        return gguf.quantize(rng.normal(0, SCALE, (rows, columns)).astype(np.float32), kind).view(np.uint8).reshape(rows, -1)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * columns // size, width), np.uint8)

    if type_ == "NVFP4":  # four scales of eight bits begin a block: here 2^-7 to 2^-6
        raw[:, :4] = raw[:, :4] % 8 + 8
        return raw.reshape(rows, -1)

    def scaled(scale: float, least: float = 0.0) -> np.ndarray:
        halves = [np.array(number, np.float16) for number in (scale, least)]
        if type_ == "IQ1_M":  # a quarter of the scale in the upper four bits of each of the last four uint16
            for i in range(4):
                raw[:, 49 + 2 * i] = raw[:, 49 + 2 * i] & 0x0F | (int(halves[0].view(np.uint16)) >> 4 * i & 0xF) << 4
        for at, half in zip(SCALES.get(type_, ()), halves, strict=False):
            raw[:, at : at + 2] = np.frombuffer(half.tobytes(), np.uint8)
        return raw.reshape(rows, -1)

    def numbers(*scales: float) -> np.ndarray:
        return gguf.dequantize(scaled(*scales), kind)

    # Random scales and minima are all positive: the minima's scale is what makes the weights' mean zero.
    ratio = float(numbers(1.0).mean() / -numbers(0.0, 1.0).mean()) if len(SCALES.get(type_, ())) == 2 else 0.0
    scale = SCALE / float(numbers(1.0, ratio).std())
    return scaled(scale, ratio * scale)


@cache
def recorded() -> dict[str, Any]:
    """Two small vocabularies, and llama.cpp's ids of some texts under each pre-tokenizer; a name stands for that one's ids."""
    return json.loads((Path(__file__).parent / "data" / "llama_cpp.json").read_text())


def add_tokenizer(writer: Any, pre: str | None, space_prefix: bool | None = None) -> int:
    """Byte-level tokens for a `pre`, else SentencePiece's, with control tokens and one of the user's; returns how many."""
    kind = "gpt2" if pre else "llama"
    vocabulary = recorded()[kind]
    tokens = vocabulary["tokens"]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(vocabulary["types"])
    if pre:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(vocabulary["merges"])
    else:
        writer.add_token_scores(vocabulary["scores"])
        writer.add_unk_token_id(tokens.index("<unk>"))
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    writer.add_bos_token_id(tokens.index("<|endoftext|>" if pre else "<s>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>" if pre else "</s>"))
    writer.add_chat_template(TEMPLATE)
    return len(tokens)


def write_gguf(
    path: Path,
    family: str = "qwen2",
    type_: str = "Q8_0",
    tied: bool = False,
    seed: int = 0,
    pre: str | None = "qwen2",
    bias: bool = False,
    rope_freqs: Sequence[float] | None = None,
    change: Callable[[Any], object] = lambda writer: None,
    leave_out: str = "",
    parts: int = 1,
    layers: int = LAYERS,
) -> Path:
    """A model of this architecture with its linears and embeddings in `type_`; `change` may add or overwrite metadata.

    pre None: a SentencePiece vocabulary. bias: also where the architecture does not demand it. leave_out: a tensor that is not
    written. parts: of a split file; `path` is then NAME.gguf, and the first part's name is returned.
    """
    rng = np.random.default_rng(seed)
    writers = [gguf.GGUFWriter(part_path(path, i, parts), family) for i in range(parts)]
    writer = writers[0]
    writer.add_name("Random")
    vocab = add_tokenizer(writer, pre)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    if family == "qwen3":
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
    change(writer)
    kind, plain = gguf.GGMLQuantizationType[type_], gguf.GGMLQuantizationType.F32
    tensors: list[tuple[str, np.ndarray, Any]] = []

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        if name == leave_out:
            return
        if len(shape) == 1:
            tensors.append((name, rng.normal(mean, 0.1, shape).astype(np.float32), plain))
        else:
            tensors.append((name, blocks(type_, *shape, rng), kind))

    add("token_embd.weight", vocab, HIDDEN)
    if rope_freqs is not None:
        tensors.append(("rope_freqs.weight", np.array(rope_freqs, np.float32), plain))
    for i in range(layers):
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        add(f"blk.{i}.attn_norm.weight", HIDDEN, mean=1.0)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            add(f"blk.{i}.attn_{name}.weight", rows, HIDDEN)
            if family == "qwen2" or bias:
                add(f"blk.{i}.attn_{name}.bias", rows)
        add(f"blk.{i}.attn_output.weight", HIDDEN, q)
        if bias:
            add(f"blk.{i}.attn_output.bias", HIDDEN)
        if family == "qwen3":
            add(f"blk.{i}.attn_q_norm.weight", HEAD_DIM, mean=1.0)
            add(f"blk.{i}.attn_k_norm.weight", HEAD_DIM, mean=1.0)
        add(f"blk.{i}.ffn_norm.weight", HIDDEN, mean=1.0)
        add(f"blk.{i}.ffn_gate.weight", FFN, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", FFN, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, FFN)
    add("output_norm.weight", HIDDEN, mean=1.0)
    if not tied:
        add("output.weight", vocab, HIDDEN)
    for i, (name, data, of_type) in enumerate(tensors):
        writers[i * parts // len(tensors)].add_tensor(name, data, raw_dtype=of_type)
    for i, writer in enumerate(writers):
        if parts > 1:
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(tensors))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return part_path(path, 0, parts)


def part_path(path: Path, i: int, parts: int) -> Path:
    return path if parts == 1 else path.with_name(f"{path.stem}-{i + 1:05d}-of-{parts:05d}.gguf")


def hugging_face(path: Path, dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config and a state dict for transformers, by gguf's own reader and dequantisation: independent of ours."""
    import torch

    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    family = keys["general.architecture"]
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    names |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
    heads = {"attn_q": keys[f"{family}.attention.head_count"], "attn_k": keys[f"{family}.attention.head_count_kv"]}
    state, tied, bias = {}, True, False
    for t in reader.tensors:
        w = gguf.dequantize(np.ascontiguousarray(t.data), t.tensor_type).astype(np.float32).reshape(t.shape[::-1].tolist())
        if t.name.startswith("blk."):
            _, layer, name, side = t.name.split(".")
            bias |= side == "bias"
            if family == "llama" and name in heads:
                w = w.reshape(heads[name], -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
            ours = f"model.layers.{layer}.{names[name]}.{side}"
        elif t.name == "rope_freqs.weight":
            continue
        else:
            tied &= t.name != "output.weight"
            ours = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[t.name.split(".")[0]]
            ours += ".weight"
        state[ours] = torch.from_numpy(np.array(w)).to(dtype)
    config = {
        "model_type": family,
        "vocab_size": len(state["model.embed_tokens.weight"]),
        "hidden_size": keys[f"{family}.embedding_length"],
        "intermediate_size": keys[f"{family}.feed_forward_length"],
        "num_hidden_layers": keys[f"{family}.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": keys.get(f"{family}.attention.key_length", keys[f"{family}.embedding_length"] // heads["attn_q"]),
        "rms_norm_eps": keys[f"{family}.attention.layer_norm_rms_epsilon"],
        "rope_theta": keys[f"{family}.rope.freq_base"],
        "max_position_embeddings": keys[f"{family}.context_length"],
        "tie_word_embeddings": tied,
        "attention_bias": bias,
    }
    return config, state


def transformers_model(path: Path, dtype: Any = None) -> Any:
    """transformers' model with those weights, in float32 or the dtype given."""
    import torch
    import transformers

    config, state = hugging_face(path, dtype or torch.float32)
    kind = config.pop("model_type")
    if kind == "qwen2":
        config.pop("attention_bias")
    theta = config.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    made = transformers.AutoConfig.for_model(kind, rope_parameters=rope, **config)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype or torch.float32)
    lacking, foreign = model.load_state_dict(state, strict=False)
    assert not foreign and set(lacking) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set()), (lacking, foreign)
    return model.eval()
