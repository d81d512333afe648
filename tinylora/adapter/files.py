"""A saved adapter, in our own format and as one file; reading checks that base, P and factors are those it was trained with.

    adapter_config.json          the config, and hashes of base and P
    adapter_model.safetensors    v, sketches of A and B, and the config again in its header

PEFT's directories are `peft`'s; docs/formats.md says what is in the files.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tinylora.adapter import peft
from tinylora.adapter.config import DTYPES, TinyLoRAConfig
from tinylora.adapter.parts import Base, Parts, draw_parts
from tinylora.errors import InputError
from tinylora.files import write_safetensors, write_text
from tinylora.hashes import base_hash, quantisation

FORMAT_VERSION = 1
SKETCH = 16  # entries kept of each row of A and column of B
SKETCH_TOLERANCE = 1e-2  # relative; a flipped sign or another singular vector is off by about 1


def about(config: TinyLoRAConfig, parts: Parts, v: Tensor, base: Base) -> dict[str, Any]:
    """What a saved adapter says of itself: its config, its size, and the hashes that tell its base and its P from others."""
    quantised = quantisation(base.digests.values())
    return {
        "format": "tinylora",
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(config),
        "projection_seed": config.p_seed,
        "base_model_name_or_path": base.name,
        "base_model_hash": base_hash(base.digests),
        **({"base_model_quantization": quantised} if quantised else {}),
        "projection_hash": parts.projection_hash,
        "num_parameters": v.numel(),
        **({} if parts.prompt is None else {"prompt": parts.prompt}),
    }


def save_adapter(directory: Path, config: TinyLoRAConfig, parts: Parts, v: Tensor, base: Base) -> None:
    """Write an adapter in the format it has: ours where everything but v can be drawn again, else PEFT's."""
    if parts.peft is not None:
        peft.write(directory, parts, v, base)
        return
    described = about(config, parts, v, base)
    tensors = {"v": v.detach().to("cpu", DTYPES[config.param_dtype]).contiguous()}
    for side, sketches in zip("AB", _sketches(parts.factors), strict=True):
        tensors[f"sketch.{side}"] = sketches
    # The tensors carry the config in their header, so that the one file is complete in itself. One key only: safetensors
    # writes several in random order, and equal adapters are to be equal files.
    write_safetensors(directory / "adapter_model.safetensors", tensors, {"tinylora": json.dumps(described)})
    modules = {**described, "modules": len(parts.group_of)}
    write_text(directory / "adapter_config.json", json.dumps(modules, indent=2) + "\n")


def save_tiny(path: Path, config: TinyLoRAConfig, parts: Parts, v: Tensor, base: Base) -> int:
    """Write v into one file whose header has the rest; returns the bytes of v.

    Without the directory's sketches of A and B: a reader is told by hash whether base and P are the same, and not whether
    the factors come out alike.
    """
    if parts.peft is not None:
        raise InputError("--to tiny: this adapter came from PEFT with factors of its own, which v alone does not restore")
    payload = v.detach().to("cpu", DTYPES[config.param_dtype]).contiguous()
    described = {**about(config, parts, v, base), "modules": len(parts.group_of)}
    write_safetensors(path, {"v": payload}, {"tinylora": json.dumps(described)})
    return payload.nbytes


def adapter_path(adapter: str | Path) -> Path:
    """An adapter's directory or file, also from a run's directory."""
    path = Path(adapter)
    return path / "adapter" if not (path / "adapter_config.json").exists() and (path / "adapter").is_dir() else path


def read_about(path: Path) -> dict[str, Any]:
    """What a saved adapter of any format says of itself, unchecked; {} where there is nothing to read."""
    try:
        described = _described(path)
    except (OSError, ValueError, SafetensorError):
        return {}
    return described if isinstance(described, dict) else {}


def _described(path: Path) -> Any:
    """The description in an adapter's file, or beside the tensors in its directory."""
    if not _one_file(path):
        return json.loads((path / "adapter_config.json").read_text())
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("tinylora", "{}"))


def _one_file(path: Path) -> bool:
    return path.is_file() and path.suffix == ".safetensors"


def read_adapter(path: Path, base: Base, force_base: bool = False) -> tuple[TinyLoRAConfig, Parts, Tensor]:
    """A saved adapter of any format, checked against a base. force_base: another base of the same modules is a warning, as
    another quantisation is one; the adapter is then that base's own, with its factors turned as those it was trained with."""
    described, tensors = _read_files(path)
    if isinstance(described, dict) and "peft_type" in described:
        return peft.read(path, described, tensors, base, force_base)
    return _read_own(path, described, tensors, base, force_base)


def _read_files(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """What an adapter's directory or file holds: its description, not yet checked, and its tensors."""
    if path.suffix == ".gguf":
        raise InputError(f"--adapter {path}: a LoRA for llama.cpp, which cannot come back; give the run it was exported from")
    try:
        pickles = [p.name for p in path.glob("adapter_model*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise InputError(f"--adapter {path}: {pickles[0]} is a pickle, which can run code; save as safetensors instead")
        described = _described(path)
        tensors = load_file(path if _one_file(path) else path / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise InputError(f"--adapter {path}: {Path(error.filename or '').name or error} is missing") from None
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--adapter {path} cannot be read: {error}") from None
    return described, tensors


def _read_own(
    path: Path, described: Any, tensors: dict[str, Tensor], base: Base, force_base: bool
) -> tuple[TinyLoRAConfig, Parts, Tensor]:
    if not isinstance(described, dict) or (described.get("format"), described.get("format_version")) != (
        "tinylora",
        FORMAT_VERSION,
    ):
        raise InputError(f"--adapter {path}: not a tinylora adapter of format version {FORMAT_VERSION}")
    names = [f.name for f in dataclasses.fields(TinyLoRAConfig)]
    described.setdefault("projection", "random")  # older files do not say
    lacking = {*names, "base_model_hash", "base_model_name_or_path", "projection_hash", "modules"} - described.keys()
    if lacking:
        raise InputError(f"--adapter {path}: adapter_config.json lacks {', '.join(sorted(lacking))}")
    fields = {name: described[name] for name in names}
    try:
        config = TinyLoRAConfig(**{**fields, "target_modules": tuple(fields["target_modules"])})
    except TypeError as error:
        raise InputError(f"--adapter {path}: adapter_config.json is broken: {error}") from None
    forced = not base.has_hash(described["base_model_hash"])
    if forced:
        said, same_modules = _other_base(described, config, base)
        if not force_base or not same_modules:
            way = ", or --force-base to use this one all the same" if same_modules else ": not even --force-base fits it here"
            raise InputError(f"--adapter {path} was trained on {said} Give the base it was trained on{way}.")
    parts = draw_parts(config, base)
    parts.prompt = described.get("prompt")
    if described["projection_hash"] != parts.projection_hash:
        raise InputError(f"--adapter {path}: P of seed {config.p_seed} comes out differently in this version of tinylora")
    wanted = {"v"} if path.is_file() else {"v", "sketch.A", "sketch.B"}
    if wanted - tensors.keys():
        raise InputError(f"--adapter {path}: adapter_model.safetensors lacks v or its sketches")
    for side, mine in zip("AB", _sketches(parts.factors), strict=True):
        theirs = tensors.get(f"sketch.{side}", mine)
        # not <=, rather than >, so that NaN fails it
        alike = theirs.shape == mine.shape and (
            forced or ((theirs - mine).norm(dim=2) <= SKETCH_TOLERANCE * mine.norm(dim=2)).all()
        )
        if not alike:
            raise InputError(f"--adapter {path}: the factors {side} come out differently on this machine or in this dtype")
    if forced:
        warnings.warn(f"--adapter {path} was trained on {said} {_turn(parts, tensors)}", stacklevel=4)
    if not tensors["v"].isfinite().all():
        raise InputError(f"--adapter {path}: v is not finite")
    shape = (parts.groups, config.u)
    if tuple(tensors["v"].shape) != shape:
        raise InputError(f"--adapter {path}: v has shape {tuple(tensors['v'].shape)}; this adapter's is {shape}")
    return config, parts, tensors["v"]


def _other_base(described: dict[str, Any], config: TinyLoRAConfig, base: Base) -> tuple[str, bool]:
    """What an adapter's base was and what this one is, in words; and whether this has as many modules to adapt."""
    modules = sum(any(m == n or m.endswith(f".{n}") for n in config.target_modules) for m in base.weights)
    was, now = described.get("base_model_quantization", ""), quantisation(base.digests.values())
    kinds = [f"{kind}, " if kind else "" for kind in (was, now)]
    said = (
        f"{described['base_model_name_or_path']} ({kinds[0]}weights {described['base_model_hash']}, "
        f"{described['modules']} modules); this model is {base.name} ({kinds[1]}weights {base_hash(base.digests)}, "
        f"{modules} modules)."
    )
    if was != now and modules == described["modules"]:
        said += " Another quantisation of the same weights is another base."
    return said, modules == described["modules"]


def _turn(parts: Parts, tensors: dict[str, Tensor]) -> str:
    """Give each pair of singular vectors the sign it has in the saved sketches; says how far the vectors are from those."""
    if not {"sketch.A", "sketch.B"} <= tensors.keys():
        return "How far its factors are from those it was trained with, this file cannot tell."
    theirs_A, theirs_B = tensors["sketch.A"], tensors["sketch.B"]  # (modules, r, SKETCH)
    signs = (_sketches(parts.factors)[0] * theirs_A).sum(2).sign()  # (modules, r)
    for sign, (module, (A, B)) in zip(torch.where(signs == 0, 1.0, signs), parts.factors.items(), strict=True):
        parts.factors[module] = (A * sign.to(A.device)[:, None], B * sign.to(B.device))
    off = torch.stack(
        [(t - m).norm(dim=2) / t.norm(dim=2) for t, m in zip((theirs_A, theirs_B), _sketches(parts.factors), strict=True)]
    ).amax((0, 2))  # (modules,)
    return f"Its factors are off by {off.median():.1%} in the median module and {off.max():.1%} in the worst."


def _sketches(factors: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """SKETCH evenly spaced entries of each row of A and column of B: (modules, r, SKETCH) each."""

    def sample(rows: Tensor) -> Tensor:  # (r, width) -> (r, SKETCH)
        return rows[:, torch.linspace(0, rows.shape[1] - 1, SKETCH).long()].float().cpu()

    pairs = [(sample(a), sample(b.T)) for a, b in factors.values()]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
