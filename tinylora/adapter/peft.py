"""PEFT's TINYLORA directory, both ways.

    adapter_config.json         peft_type TINYLORA, r, u, weight_tying, projection_seed, save_projection, target_modules
    adapter_model.safetensors   base_model.model.MODULE.tinylora_A (r, K), .tinylora_B (N, r), .tinylora_P (u, r, r)
                                base_model.tinylora_v.GROUP (u,)

PEFT splits the singular values, A = sqrt(S) V^T and B = U sqrt(S), and reads both back from the file, as it does P; so any
A, B and P travel, and only its way of tying is narrower than ours (`tying`). Of P it may leave out what it can draw again.
"""

import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.parts import Base, Parts
from tinylora.errors import InputError
from tinylora.files import write_safetensors, write_text

PREFIX = "base_model.model."
V = "base_model.tinylora_v."
RESIDUAL = 1e-3  # |W a - |a|^2 b| / (|a|^2 |b|): zero where a and b are singular vectors of W; an SVD in fp32 leaves 1e-5
RESIDUAL_BF16 = 5e-2  # the same for factors rounded to bf16, as PEFT's are on a bf16 base: each entry is off by up to 2^-7


def tying(modules: int, weight_tying: float) -> list[int]:
    """PEFT's group of each module, in module order: even groups, of which the last takes what is left over."""
    groups = max(1, round(modules * (1.0 - weight_tying)))
    size = max(1, modules // groups)
    return [min(index // size, groups - 1) for index in range(modules)]


def weight_tying(group_of: Sequence[int]) -> float | None:
    """The ratio that makes PEFT tie these modules just so; None where there is none."""
    ratio = 1.0 - len(set(group_of)) / len(group_of)
    return ratio if tying(len(group_of), ratio) == list(group_of) else None


def draw_projection(u: int, r: int, seed: int) -> Tensor:
    """P (u, r, r) as PEFT draws it for the module with this seed: projection_seed + the module's place."""
    return torch.normal(0.0, 1.0 / math.sqrt(r), (u, r, r), generator=torch.Generator().manual_seed(seed))


def read(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor], base: Base, force_base: bool = False
) -> tuple[TinyLoRAConfig, Parts, Tensor]:
    """An adapter from what was read of PEFT's directory. InputError where it does not fit the base, or is not whole.

    force_base: factors of other weights are a warning; the correction is the one that was trained.
    """

    def refuse(why: str) -> InputError:
        return InputError(f"--adapter {path}: {why}")

    if config["peft_type"] != "TINYLORA":
        raise refuse(f"a PEFT adapter of type {config['peft_type']}; only TINYLORA can be read")
    for name, plain in (("modules_to_save", None), ("bias", "none")):
        if config.get(name) not in (plain, [], None):
            raise refuse(f"{name} is {config[name]!r}: it changes weights of the base, which stay frozen here")
    u, seed, ratio = config.get("u"), config.get("projection_seed"), config.get("weight_tying")
    if not isinstance(u, int) or not isinstance(seed, int) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise refuse("adapter_config.json lacks u, projection_seed or weight_tying, or they are no such numbers")

    parts: dict[str, dict[str, Tensor]] = {"tinylora_A": {}, "tinylora_B": {}, "tinylora_P": {}}
    vs: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        group = re.fullmatch(re.escape(V) + r"(\d+)", key)
        module, _, side = key.removeprefix(PREFIX).rpartition(".")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise refuse(f"{key} is not finite, or no floating-point tensor")
        if group:
            vs[int(group[1])] = tensor
        elif key.startswith(PREFIX) and side in parts:
            parts[side][module] = tensor.float()
        else:
            raise refuse(f"unknown tensor {key}")
    A, B, P = parts.values()
    foreign = [m for m in A if m not in base.weights]
    if foreign or not A:
        raise refuse(f"it adapts {foreign[0] if foreign else 'nothing'}, which is no linear of {base.name}; give its own base")
    if A.keys() != B.keys() or (P and A.keys() != P.keys()):
        raise refuse("adapter_model.safetensors is not whole: A, B and P name different modules")
    modules = [m for m in base.weights if m in A]
    groups = tying(len(modules), ratio)
    if sorted(vs) != sorted(set(groups)) or any(tuple(v.shape) != (u,) for v in vs.values()):
        raise refuse(f"its v do not fit {len(modules)} modules of {base.name} in {max(groups) + 1} groups of {u} numbers")
    if not P and str(config.get("peft_version", "")).startswith("0.19."):
        raise refuse("it was saved without P by PEFT 0.19, whose seeds differ from process to process: P is lost")
    for place, module in enumerate(modules):
        rows, columns = base.weights[module].shape
        r = A[module].shape[0]
        if not P or module not in P:
            P[module] = draw_projection(u, r, seed + place).to(base.weights[module].dtype).float()  # as PEFT keeps it
        wanted = {"A": (r, columns), "B": (rows, r), "P": (u, r, r)}
        found = {"A": A[module].shape, "B": B[module].shape, "P": P[module].shape}
        wrong = [name for name in wanted if tuple(found[name]) != wanted[name]]
        if wrong:
            name = wrong[0]
            raise refuse(f"{module}: {name} has shape {tuple(found[name])}, and {base.name} wants {wanted[name]}")
    try:
        _check_base(path, modules, A, B, base)
    except InputError as error:
        if not force_base:
            raise
        warnings.warn(str(error), stacklevel=2)

    rank = max(A[m].shape[0] for m in modules)
    for m in modules:  # a small weight may have a lower rank; zeros change nothing
        short = rank - A[m].shape[0]
        A[m] = torch.nn.functional.pad(A[m], (0, 0, 0, short))
        B[m] = torch.nn.functional.pad(B[m], (0, short))
        P[m] = torch.nn.functional.pad(P[m], (0, short, 0, short))
    ours = TinyLoRAConfig(r=rank, u=u, n_tie=1, target_modules=tuple(modules), seed=seed)
    group_of = dict(zip(modules, groups, strict=True))
    built = Parts(group_of, {m: P[m] for m in modules}, {m: (A[m], B[m]) for m in modules}, config)
    return ours, built, torch.stack([vs[g].float() for g in range(len(vs))])


def _check_base(path: Path, modules: Sequence[str], A: dict[str, Tensor], B: dict[str, Tensor], base: Base) -> None:
    """PEFT's files say nothing of their base's content; but their factors are singular vectors of its weights."""
    for m in modules:
        W = base.weights[m]
        a, b = A[m].to(W.device, torch.float32), B[m].to(W.device, torch.float32)
        stretch = a.square().sum(1)  # (r,): 1, or sigma where it is split
        off = (W.float() @ a.T - b * stretch).norm(dim=0) / (b.norm(dim=0) * stretch).clamp_min(1e-30)
        limit = RESIDUAL_BF16 if torch.equal(a.bfloat16().float(), a) else RESIDUAL
        # vectors of a singular value that is nothing beside the first are noise on both sides
        counts = b.norm(dim=0) * stretch.sqrt() > 1e-4 * (b.norm(dim=0) * stretch.sqrt()).max()
        if not (off[counts] <= limit).all():
            raise InputError(
                f"--adapter {path}: its factors of {m} are not those of {base.name} (off by {off[counts].max():.1g}, at most "
                f"{limit:g} is rounding). Give the base it was trained on, or --force-base to use this one all the same."
            )


def write(directory: Path, parts: Parts, v: Tensor, base: Base) -> bool:
    """Write an adapter as PEFT saves it, P included. v is (groups, u). Returns whether the tying could be kept: where PEFT
    has no ratio for it, every module gets a copy of its v, which is the same function with more trained numbers."""
    modules = list(parts.factors)
    groups = [parts.group_of[m] for m in modules]
    ratio = weight_tying(groups)
    v = v.detach().float().cpu()
    vs = v if ratio is not None else v[groups]  # (PEFT's groups, u)
    tensors = {f"{V}{g}": row.clone() for g, row in enumerate(vs)}
    for m in modules:
        A, B = parts.factors[m]
        tensors |= {f"{PREFIX}{m}.tinylora_A": A.cpu().contiguous(), f"{PREFIX}{m}.tinylora_B": B.cpu().contiguous()}
        tensors[f"{PREFIX}{m}.tinylora_P"] = parts.projections[m].cpu().contiguous()
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": bool(set(modules) & base.transposed),
        "inference_mode": True,
        "init_v_bound": 0.02,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "TINYLORA",
        "projection_seed": 42,
        "r": parts.projections[modules[0]].shape[1],
        "revision": None,
        "save_projection": True,
        "target_modules": short_names(modules, base),
        "task_type": "CAUSAL_LM",
        "tinylora_dropout": 0.0,
        "u": v.shape[1],
        "weight_tying": 0.0 if ratio is None else ratio,
    }
    if parts.peft is not None:  # what it said of itself when it came, but for what is written anew
        kept = ("auto_mapping", "projection_seed", "task_type", "base_model_name_or_path", "tinylora_dropout", "peft_version")
        config |= {name: parts.peft[name] for name in kept if name in parts.peft}
    write_safetensors(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_text(directory / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return ratio is not None


def short_names(modules: Sequence[str], base: Base) -> list[str]:
    """target_modules for PEFT and engines that read it: last names where they mean these modules and no other."""
    found = []
    for name in dict.fromkeys(m.rsplit(".", 1)[-1] for m in modules):
        meant = [m for m in base.weights if m.rsplit(".", 1)[-1] == name]
        adapted = [m for m in meant if m in modules]
        found += [name] if adapted == meant else adapted
    return found
