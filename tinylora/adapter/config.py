"""An adapter's shape: rank, trained numbers, tying, and the precision they are used in."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinylora.errors import InputError
from tinylora.model.config import PROJECTIONS, module_name

BASES = ("top", "bottom", "random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TinyLoRAConfig:
    """An adapter's shape. Trained numbers = u * groups.

    Modules are listed in (layer, q k v o gate up down) order. tie_mode "tiled" cuts that list into chunks of n_tie;
    "structured" cuts the list of each projection type into chunks of n_tie layers. n_tie "all" is one chunk: one group for
    tiled, one per type for structured. Qwen2.5-7B has 196 modules, so u=1, n_tie=16 trains ceil(196/16) = 13 numbers, and
    u=13, n_tie="all" trains 13 too: the paper's reading and the common one.
    """

    r: int = 2
    u: int = 1
    n_tie: int | Literal["all"] = 16
    tie_mode: Literal["tiled", "structured"] = "tiled"
    target_modules: tuple[str, ...] = PROJECTIONS
    seed: int = 0
    projection_seed: int | None = None  # None: seed
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    basis: Literal["top", "bottom", "random"] = "top"
    projection: Literal["random", "identity"] = "random"  # identity: P_i are the unit matrices, so that v is M: LoRA-XS

    def __post_init__(self) -> None:
        for name in ("r", "u"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: it must be at least 1")
        if self.n_tie != "all" and (not isinstance(self.n_tie, int) or self.n_tie < 1):
            raise InputError(f"--n-tie {self.n_tie}: it must be a number of modules, at least 1, or all")
        if self.tie_mode not in ("tiled", "structured"):
            raise InputError(f"--tie-mode {self.tie_mode}: choose tiled or structured")
        if self.param_dtype not in DTYPES:
            raise InputError(f"--param-dtype {self.param_dtype}: choose one of {', '.join(DTYPES)}")
        if self.projection not in ("random", "identity") or (self.projection == "identity" and self.u != self.r**2):
            raise InputError(f"projection {self.projection}: choose random, or identity with u = r * r")
        if self.basis not in BASES:
            raise InputError(f"--basis {self.basis}: choose one of {', '.join(BASES)}")
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise InputError(f"--target-modules {self.target_modules or '(none)'}: it must be a list of names, at least one")

    @property
    def p_seed(self) -> int:
        return self.seed if self.projection_seed is None else self.projection_seed

    def groups(self, num_layers: int) -> dict[str, int]:
        """The group of each adapted module of one of our decoders, by module name, in module order."""
        unknown = set(self.target_modules) - set(PROJECTIONS)
        if unknown:
            raise InputError(f"--target-modules {sorted(unknown)}: choose from {', '.join(PROJECTIONS)}")
        types = [p for p in PROJECTIONS if p in self.target_modules]
        return self.tie([module_name(layer, name) for layer in range(num_layers) for name in types])

    def tie(self, modules: Sequence[str]) -> dict[str, int]:
        """The group of each of these modules, which are in module order. Modules whose names differ in numbers alone are of
        one type: structured tying cuts each type's modules into chunks of its own."""
        if self.tie_mode == "tiled":
            size = len(modules) if self.n_tie == "all" else self.n_tie
            return {name: index // size for index, name in enumerate(modules)}
        by_type: dict[str, list[str]] = {}
        for name in modules:
            by_type.setdefault(re.sub(r"\d+", "*", name), []).append(name)
        group_of, first = {}, 0
        for names in by_type.values():
            size = len(names) if self.n_tie == "all" else self.n_tie
            group_of.update({name: first + index // size for index, name in enumerate(names)})
            first += math.ceil(len(names) / size)
        return {name: group_of[name] for name in modules}

    def num_parameters(self, num_layers: int) -> int:
        """Trained numbers on a model of this many layers; needs no model."""
        return self.u * (max(self.groups(num_layers).values()) + 1)


def stored(v: Tensor, config: TinyLoRAConfig) -> Tensor:
    """v rounded to param_dtype, in its own dtype, with the gradient passed straight through."""
    if config.param_dtype == "float32":
        return v
    rounded = v.detach().to(DTYPES[config.param_dtype]).to(v.dtype)
    return v + (rounded - v).detach()
