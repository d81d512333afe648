"""python -m tinylora.export: an adapter leaves, for PEFT, for engines that read LoRA, as a merged checkpoint, as one file."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tinylora.adapter import peft
from tinylora.adapter.export import corrections, load_base, write_lora, write_merged
from tinylora.adapter.files import adapter_path, read_adapter, save_tiny
from tinylora.adapter.gguf_lora import write_gguf_lora
from tinylora.cli import run_command, table
from tinylora.engine.directory import write_directory
from tinylora.errors import InputError
from tinylora.loading import model_of

ENOUGH = 0.95  # of the correction; below it a merged checkpoint is another policy, and the report warns


@dataclass(frozen=True)
class ExportConfig:
    """Write an adapter in another form. peft: a TINYLORA directory for PEFT. lora: an exact LoRA of rank r for PEFT, vLLM and
    converters that read PEFT's LoRA. gguf-lora: the same as a file for llama.cpp's --lora. merged: the whole checkpoint with
    the correction in its weights, a GGUF's in a Hugging Face directory. tiny: one file of v and what tells its base. The last
    line is one JSON object."""

    adapter: str
    """A run's output directory, its adapter/, a TINYLORA directory of PEFT, or a file of --to tiny."""
    to: Literal["peft", "lora", "gguf-lora", "merged", "tiny"]
    """The form."""
    output: str
    """A new directory; for tiny a new file, NAME.safetensors, and for gguf-lora NAME.gguf."""
    model: str | None = None
    """The base it was trained on: Hugging Face directory, hub id or GGUF file; "builtin" and "builtin-medium" come with the
    package. Default: the one that the run or the adapter names."""
    force_base: bool = False
    """Take --adapter on a base with other weights than it was trained on, as another quantisation has, with a warning."""
    rank: int | None = None
    """lora: pad with zeros to this rank, for engines with a floor of 8 or 16. Default: the adapter's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """merged: the precision of the adapted weights; auto: each weight's own in the base, float32 for a GGUF's."""


def export(c: ExportConfig) -> dict[str, Any]:
    """Do it; returns what the last line says."""
    output = Path(c.output)
    ending = {"tiny": ".safetensors", "gguf-lora": ".gguf"}.get(c.to)
    if ending and output.suffix != ending:
        raise InputError(f"--output {output}: one file, named NAME{ending}")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"--output {output} exists; name a new {'file' if ending else 'directory'}")
    if c.rank is not None and c.to != "lora":
        raise InputError("--rank pads a LoRA: add --to lora")
    if c.dtype != "auto" and c.to != "merged":
        raise InputError("--dtype is of a merged checkpoint: add --to merged")
    model = c.model or model_of(c.adapter)
    if model is None:
        raise InputError(f"--adapter {c.adapter} names no model that is here: give --model, the base it was trained on")
    checkpoint, base, decoder = load_base(model)
    config, parts, v = read_adapter(adapter_path(c.adapter), base, c.force_base)
    said: dict[str, Any] = {"to": c.to, "output": str(output), "modules": len(parts.factors), "num_parameters": v.numel()}
    if c.to == "tiny":
        payload = save_tiny(output, config, parts, v, base)
        print(f"{v.numel()} numbers, {payload} bytes; {output} has {output.stat().st_size} with its header")
        return said | {"payload_bytes": payload, "file_bytes": output.stat().st_size}
    if decoder is not None:
        base.name = decoder.public_name
    if c.to == "lora":
        write_lora(output, config, parts, v, base, c.rank)
    elif c.to == "gguf-lora":
        if decoder is None:
            raise InputError(f"--to gguf-lora: {base.name} is of an architecture that only transformers reads; use --to lora")
        family, head_dim = decoder.config.family, decoder.config.head_dim
        write_gguf_lora(output, corrections(config, parts, v), family, head_dim, Path(base.name).name)
    elif c.to == "peft":
        said["tying_kept"] = peft.write(output, parts, v, base)
        if not said["tying_kept"]:
            print(
                "PEFT has no ratio for this tying: every module got a copy of its v. The same function, more numbers to train."
            )
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent) if checkpoint.is_file() else nullcontext(str(checkpoint)) as source:
            if decoder is not None and checkpoint.is_file():  # a GGUF, which is first written as a directory
                write_directory(decoder, Path(source))
            kept = write_merged(output, Path(source), corrections(config, parts, v), base, c.dtype)
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


def main(arguments: list[str]) -> int:
    import tyro  # the commands' alone, as in `train`

    print(json.dumps(export(tyro.cli(ExportConfig, args=arguments, prog="python -m tinylora.export"))))
    return 0


if __name__ == "__main__":
    run_command(main)
