"""An adapter leaves: as an exact LoRA for PEFT and engines that read it, or in the weights of a whole checkpoint."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinylora.adapter import peft
from tinylora.adapter.attached import base_of
from tinylora.adapter.config import DTYPES, TinyLoRAConfig, stored
from tinylora.adapter.on_decoder import base_of_decoder
from tinylora.adapter.parts import Base, Parts
from tinylora.errors import InputError
from tinylora.files import write_safetensors, write_text
from tinylora.model.config import FAMILIES, ModelConfig
from tinylora.model.decoder import Decoder
from tinylora.model.loader import load_model, resolve_model


def corrections(config: TinyLoRAConfig, parts: Parts, v: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, K) and B M (N, r) of every module, float64: W' = W + (B M) A."""
    v = stored(v.detach().double().cpu(), config)
    found = {}
    for module, (A, B) in parts.factors.items():
        M = torch.einsum("u,uij->ij", v[parts.group_of[module]], parts.projections[module].double())
        found[module] = (A.double().cpu(), B.double().cpu() @ M)
    return found


def write_lora(directory: Path, config: TinyLoRAConfig, parts: Parts, v: Tensor, base: Base, rank: int | None = None) -> None:
    """PEFT's LoRA: lora_A = A, lora_B = B M, scaling 1. Rows and columns up to `rank` are zero."""
    r = config.r if rank is None else rank
    if r < config.r:
        raise InputError(f"--rank {r}: the adapter's own rank is {config.r}, and padding cannot lower it")
    tensors = {}
    for module, (A, BM) in corrections(config, parts, v).items():
        short = r - config.r
        tensors[f"{peft.PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(A, (0, 0, 0, short)).float()
        tensors[f"{peft.PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(BM, (0, short)).float().contiguous()
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": r,
        "lora_alpha": r,  # the scaling is lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(set(parts.factors) & base.transposed),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": peft.short_names(list(parts.factors), base),
        "use_dora": False,
        "use_rslora": False,
    }
    write_safetensors(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_text(directory / "adapter_config.json", json.dumps(about, indent=2) + "\n")


class Kept:
    """How much of a correction D a rounded weight kept: 1 - |(round(W + D) - round(W)) - D| / |D|, no less than 0."""

    def __init__(self) -> None:
        self.error = self.size = self.weight = 0.0  # sums of squares

    def add(self, error: float, size: float, weight: float) -> None:
        self.error, self.size, self.weight = self.error + error, self.size + size, self.weight + weight

    @property
    def share(self) -> float:
        return max(0.0, 1 - (self.error / self.size) ** 0.5) if self.size else 1.0

    @property
    def relative(self) -> float:
        """|D| / |W|"""
        return (self.size / self.weight) ** 0.5 if self.weight else 0.0


def write_merged(
    directory: Path, checkpoint: Path, moves: dict[str, tuple[Tensor, Tensor]], base: Base, dtype: str = "auto"
) -> dict[str, Kept]:
    """The checkpoint with W + (B M) A for W, computed in float64 from the stored weights and rounded once. Shard by shard.

    Returns what was kept, by layer ("0", "1", ..., or a module's name where it has no number) and "all".
    """
    shards = _shards(checkpoint)
    places = {_stored_name(module, shards, checkpoint): module for module in moves}
    kept: dict[str, Kept] = {"all": Kept()}
    total = 0
    for shard in dict.fromkeys(shards.values()):
        tensors = {}
        for name, weight in _tensors(checkpoint / shard):
            if name in places:
                module = places[name]
                A, BM = moves[module]
                D = BM @ A  # (N, K)
                D = D.T if module in base.transposed else D
                wanted = weight.dtype if dtype == "auto" else DTYPES[dtype]
                merged = (weight.double() + D).to(wanted)
                moved = merged.double() - weight.to(wanted).double()
                squares = [x.square().sum().item() for x in (moved - D, D, weight.double())]
                layer = re.search(r"\.(\d+)\.", f".{module}.")
                for entry in (layer[1] if layer else module, "all"):
                    kept.setdefault(entry, Kept()).add(*squares)
                weight = merged
            elif dtype != "auto" and weight.is_floating_point():
                weight = weight.to(DTYPES[dtype])
            tensors[name] = weight.contiguous()
            total += weight.nbytes
        write_safetensors(directory / shard, tensors, {"format": "pt"})
    for file in checkpoint.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copy(file, directory / file.name)
    if (directory / "model.safetensors.index.json").exists():
        index = {"metadata": {"total_size": total}, "weight_map": shards}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    if dtype != "auto":
        config = json.loads((directory / "config.json").read_text())
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}
        write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
    return kept


def _shards(checkpoint: Path) -> dict[str, str]:
    """The file of each tensor of a checkpoint. InputError for files that lie elsewhere: they would be written elsewhere."""
    index = checkpoint / "model.safetensors.index.json"
    try:
        if not index.exists():
            return {name: "model.safetensors" for name, _ in _tensors(checkpoint / "model.safetensors", names_only=True)}
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        strange = [f for f in shards.values() if Path(f).name != f or Path(f).suffix != ".safetensors"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--model {checkpoint}: no readable model.safetensors (or its index): {error}") from None
    if strange:
        raise InputError(f"--model {checkpoint}: its index names {strange[0]!r}, which is no file of that directory")
    return shards


def _tensors(file: Path, names_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, torch.empty(0) if names_only else opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def _stored_name(module: str, shards: dict[str, str], checkpoint: Path) -> str:
    """A module's weight as the checkpoint names it: some leave the leading parts of the name away."""
    pieces = f"{module}.weight".split(".")
    for start in range(len(pieces) - 2):
        if (name := ".".join(pieces[start:])) in shards:
            return name
    raise InputError(f"--model {checkpoint}: the checkpoint has no tensor {module}.weight to merge into")


def load_base(model: str) -> tuple[Path, Base, Decoder | None]:
    """Where a checkpoint lies, the base as an adapter sees it, and our decoder of it: None where only transformers reads it."""
    checkpoint = resolve_model(model)
    if checkpoint.is_file():  # a GGUF: in float32, where its weights are exact
        decoder = load_model(str(checkpoint), "cpu", "float32")
        decoder.name = model
        return checkpoint, base_of_decoder(decoder), decoder
    try:
        family = json.loads((checkpoint / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        family = FAMILIES[0]  # our loader says what is wrong
    if family in FAMILIES:
        decoder = load_model(str(checkpoint), "cpu", ModelConfig.load(checkpoint).dtype)
        decoder.name = model
        return checkpoint, base_of_decoder(decoder), decoder
    from transformers import AutoModelForCausalLM  # slow to import, and only other families need it

    try:
        base = base_of(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {checkpoint}: {error}") from None
    base.name = model
    return checkpoint, base, None
