"""python -m tinylora.export: an adapter leaves, for PEFT, for engines that read LoRA, as a merged checkpoint, as one file."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinylora import peft_format
from tinylora.adapter import DTYPES, Base, Parts, TinyLoRAConfig, stored
from tinylora.adapter_files import read_adapter, save_tiny
from tinylora.cli import run_command, table
from tinylora.errors import InputError
from tinylora.files import write_safetensors, write_text
from tinylora.layers import base_of
from tinylora.model.config import FAMILIES, ModelConfig
from tinylora.model.loader import load_model, resolve_model

ENOUGH = 0.95  # of the correction; below it a merged checkpoint is another policy, and the report warns


@dataclass(frozen=True)
class ExportConfig:
    """Write an adapter in another form. peft: a TINYLORA directory for PEFT. lora: an exact LoRA of rank r for PEFT, vLLM and
    converters that read PEFT's LoRA. merged: the whole checkpoint with the correction in its weights. tiny: one file of v and
    what tells its base. The last line is one JSON object."""

    adapter: str
    """A run's output directory, its adapter/, a TINYLORA directory of PEFT, or a file of --to tiny."""
    model: str
    """The base it was trained on: Hugging Face directory or hub id; "builtin" and "builtin-medium" come with the package."""
    to: Literal["peft", "lora", "merged", "tiny"]
    """The form."""
    output: str
    """A new directory; for tiny a new file, NAME.safetensors."""
    rank: int | None = None
    """lora: pad with zeros to this rank, for engines with a floor of 8 or 16. Default: the adapter's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """merged: the precision of the adapted weights; auto: each weight's own in the base."""


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
        tensors[f"{peft_format.PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(A, (0, 0, 0, short)).float()
        tensors[f"{peft_format.PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(BM, (0, short)).float().contiguous()
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
        "target_modules": peft_format.short_names(list(parts.factors), base),
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


def load_base(checkpoint: Path) -> Base:
    """A checkpoint as an adapter sees it: by our loader for the families it knows, else by transformers."""
    try:
        family = json.loads((checkpoint / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        family = FAMILIES[0]  # our loader says what is wrong
    if family in FAMILIES:
        return Base.of_decoder(load_model(str(checkpoint), "cpu", ModelConfig.load(checkpoint).dtype))
    from transformers import AutoModelForCausalLM  # slow to import, and only other families need it

    try:
        return base_of(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {checkpoint}: {error}") from None


def export(c: ExportConfig) -> dict[str, Any]:
    """Do it; returns what the last line says."""
    output = Path(c.output)
    if c.to == "tiny" and output.suffix != ".safetensors":
        raise InputError(f"--output {output}: one file, named NAME.safetensors")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"--output {output} exists; name a new {'file' if c.to == 'tiny' else 'directory'}")
    if c.rank is not None and c.to != "lora":
        raise InputError("--rank pads a LoRA: add --to lora")
    if c.dtype != "auto" and c.to != "merged":
        raise InputError("--dtype is of a merged checkpoint: add --to merged")
    checkpoint = resolve_model(c.model)
    base = load_base(checkpoint)
    config, parts, v = read_adapter(find(c.adapter), base)
    said: dict[str, Any] = {"to": c.to, "output": str(output), "modules": len(parts.factors), "num_parameters": v.numel()}
    if c.to == "tiny":
        payload = save_tiny(output, config, parts, v, base)
        print(f"{v.numel()} numbers, {payload} bytes; {output} has {output.stat().st_size} with its header")
        return said | {"payload_bytes": payload, "file_bytes": output.stat().st_size}
    if c.to == "lora":
        write_lora(output, config, parts, v, base, c.rank)
    elif c.to == "peft":
        said["tying_kept"] = peft_format.write(output, parts, v, base)
        if not said["tying_kept"]:
            print(
                "PEFT has no ratio for this tying: every module got a copy of its v. The same function, more numbers to train."
            )
    else:
        kept = write_merged(output, checkpoint, corrections(config, parts, v), base, c.dtype)
        rows = [[name, f"{k.share:.1%}", f"{k.relative:.2e}"] for name, k in kept.items() if name != "all"]
        rows.append(["all", f"{kept['all'].share:.1%}", f"{kept['all'].relative:.2e}"])
        print(table(["layer", "correction kept", "|correction| / |W|"], rows))
        if kept["all"].share < ENOUGH:
            print(
                f"warning: the merged weights keep {kept['all'].share:.1%} of the correction: in this precision they are not "
                "the policy that was trained. Use --to lora, or --dtype float32."
            )
        said["kept"] = {name: k.share for name, k in kept.items()}
    return said


def find(adapter: str) -> Path:
    """An adapter's directory or file, also from a run's directory."""
    path = Path(adapter)
    return path / "adapter" if not (path / "adapter_config.json").exists() and (path / "adapter").is_dir() else path


def main(arguments: list[str]) -> int:
    import tyro  # the commands' alone, as in `train`

    print(json.dumps(export(tyro.cli(ExportConfig, args=arguments, prog="python -m tinylora.export"))))
    return 0


if __name__ == "__main__":
    run_command(main)
