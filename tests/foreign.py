"""Small models of transformers whose weights depend on no library's generator, and adapters that PEFT saves for them.

    PYTHONPATH=PEFT019:. python -m tests.foreign        # PEFT019: pip install peft==0.19.0 --no-deps --target PEFT019

wrote tests/data/peft-0.19: adapters saved by PEFT 0.19.0, whose logits the tests compare with ours.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tinylora import prng

DATA = Path(__file__).parent / "data" / "peft-0.19"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"qwen2": SEVEN, "llama": SEVEN, "gpt2": ("c_attn", "c_proj", "c_fc")}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 30]])


def foreign_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> torch.nn.Module:
    """Two layers of qwen2, llama or gpt2; every parameter is drawn by its place, and biases and norms are no zeros or ones."""
    import transformers

    common = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    decoder = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**common, **sizes, **dropout, **changes}))
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**common, **decoder, **changes}))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**common, **decoder, **changes}))
    with torch.no_grad():
        for place, (name, p) in enumerate(model.named_parameters()):
            drawn = prng.normal(tuple(p.shape), seed, place).float()
            norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            p.copy_(1 + 0.1 * drawn if norm else 0.3 * drawn)
    return model.to(dtype).eval()


def peft_saves(
    directory: Path,
    kind: str,
    dtype: torch.dtype = torch.float32,
    weight_tying: float = 0.0,
    save_projection: bool = True,
    **changes: object,
):
    """Let the installed PEFT save an adapter; returns its model."""
    from peft import TinyLoraConfig, get_peft_model

    settings = {"r": 2, "u": 3, "target_modules": list(TARGETS[kind]), "fan_in_fan_out": kind == "gpt2"} | changes
    config = TinyLoraConfig(weight_tying=weight_tying, save_projection=save_projection, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(foreign_model(kind, dtype), config).eval()
    with torch.no_grad():
        for place, (_, p) in enumerate(x for x in model.named_parameters() if "tinylora_v" in x[0]):
            p.copy_(0.3 * prng.normal(tuple(p.shape), 7, place))
    model.save_pretrained(directory)
    return model


if __name__ == "__main__":
    import peft

    assert peft.__version__ == "0.19.0", peft.__version__
    shutil.rmtree(DATA, ignore_errors=True)
    for kind, ratio, dtype in (("qwen2", 0.6, torch.float32), ("llama", 1.0, torch.float32), ("gpt2", 0.0, torch.bfloat16)):
        saved = peft_saves(DATA / kind, kind, dtype, ratio)
        (DATA / kind / "README.md").unlink()
        with torch.no_grad():
            save_file({"logits": saved(IDS).logits.float()}, DATA / kind / "expected.safetensors")
    sys.exit(0)
