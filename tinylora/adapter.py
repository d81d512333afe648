"""What is trained: v, and how it becomes the matrix M of every adapted module.

    M[module] = sum_i v[group(module), i] P[module, i]        W' = W + B M A

v (groups, u) is all that learns. P (u, r, r) ~ N(0, 1/r) is fixed and drawn per module, so that tied modules still differ.
Which modules share a group is tying: see `TinyLoRAConfig`. The adapter knows v, P and tying; it never sees a kernel.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from tinylora import prng
from tinylora.basis import BASES, compute_basis
from tinylora.errors import InputError
from tinylora.files import content_hash
from tinylora.kernels.frozen import padded_segments
from tinylora.model.config import GROUPS, PROJECTIONS, module_name
from tinylora.model.decoder import Decoder

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


@dataclass
class Base:
    """A frozen model as an adapter sees it: a Decoder, or any module with linears (`layers.base_of`)."""

    name: str  # of its directory or hub id
    weights: dict[str, Tensor]  # every linear weight that could be adapted, as (N, K), by module name in module order
    digests: dict[str, str]  # content hash of every parameter, by parameter name
    transposed: frozenset[str] = frozenset()  # modules that hold their weight as (K, N)
    tensors: dict[str, Tensor] | None = None  # the parameters, where digests are of what is in memory and not of a file

    @staticmethod
    def of_decoder(model: Decoder) -> "Base":
        return Base(model.path.name, model.weights(PROJECTIONS), model.digests)

    def targets(self, names: Sequence[str]) -> list[str]:
        """The modules that `names` mean, in module order: each is a whole module name or its last parts, as in PEFT.
        InputError for a name that means none."""
        found = [m for m in self.weights if any(m == n or m.endswith(f".{n}") for n in names)]
        for name in names:
            if not any(m == name or m.endswith(f".{name}") for m in found):
                kinds = list(dict.fromkeys(m.rsplit(".", 1)[-1] for m in self.weights))
                raise InputError(f"--target-modules {name}: no such linear in {self.name}, which has {', '.join(kinds)}")
        return found

    def has_hash(self, wanted: str) -> bool:
        """Whether this is the base of that hash; weights read in a wider dtype than they are stored in are the same base."""
        if base_hash(self) == wanted:
            return True
        for dtype in DTYPES.values() if self.tensors else ():
            digests = {}
            for name, tensor in (self.tensors or {}).items():
                narrowed = tensor.detach().to(dtype)
                if not torch.equal(narrowed.to(tensor.dtype), tensor):
                    break
                digests[name] = content_hash(narrowed)
            else:
                if base_hash(dataclasses.replace(self, digests=digests)) == wanted:
                    return True
        return False


@dataclass
class Parts:
    """What an adapter is besides v, for each adapted module, in module order."""

    group_of: dict[str, int]
    projections: dict[str, Tensor]  # P (u, r, r), float32
    factors: dict[str, tuple[Tensor, Tensor]]  # A (r, K) and B (N, r), float32
    peft: dict[str, Any] | None = None  # the adapter_config.json of PEFT that they came with; None: drawn from a config

    @property
    def groups(self) -> int:
        return max(self.group_of.values()) + 1

    @property
    def projection_hash(self) -> str:
        return _hash(*(p.numpy().tobytes() for p in self.projections.values()))


def draw_parts(config: TinyLoRAConfig, base: Base) -> Parts:
    """Groups, P and factors as the config alone says. InputError where a weight is too small for r."""
    weights = {name: base.weights[name] for name in base.targets(config.target_modules)}
    smallest = min(min(w.shape) for w in weights.values())
    if config.r > smallest:
        raise InputError(f"--r {config.r}: the smallest adapted weight has only {smallest} rows or columns")
    first = next(iter(weights.values()))
    key = _hash(*(base.digests.get(f"{name}.weight", "") for name in weights), str(first.dtype))
    factors = compute_basis(weights, config.r, key, config.basis)
    return Parts(config.tie(list(weights)), {name: projection_of(config, name) for name in weights}, factors)


class Adapter:
    """v on one model: packs the model's factors at construction and turns v into the matrices its forward takes."""

    def __init__(self, model: Decoder, config: TinyLoRAConfig, parts: Parts | None = None) -> None:
        """`parts` are drawn from the config, unless they came with a file."""
        layers, self.config, self.model = len(model.layers), config, model
        self.parts = parts or draw_parts(config, Base.of_decoder(model))
        model.pack_factors(self.parts.factors)

        # One P and one group number per segment of every fused linear, in the model's order; absent segments are zero.
        projections: list[Tensor] = []
        group_of_segment: list[int] = []
        self._sizes: list[int] = []
        for layer in range(layers):
            for names in GROUPS:
                modules = [module_name(layer, name) for name in names]
                if not any(m in self.group_of for m in modules):
                    self._sizes.append(0)
                    continue
                size = padded_segments(len(names), config.r, model.narrow)
                zero = torch.zeros(config.u, config.r, config.r)
                projections += [self.projections.get(m, zero) for m in modules] + [zero] * (size - len(names))
                group_of_segment += [self.group_of.get(m, 0) for m in modules] + [0] * (size - len(names))
                self._sizes.append(size)
        self._P = torch.stack(projections).to(model.device)  # (segments of all groups, u, r, r)
        self._group_of_segment = torch.tensor(group_of_segment, device=model.device)
        self.v = torch.zeros(self.parts.groups, config.u, device=model.device, requires_grad=True)  # the fp32 master

    @property
    def base(self) -> Base:
        """Not kept: it would keep weights alive that `pack_factors` has moved."""
        return Base.of_decoder(self.model)

    @property
    def group_of(self) -> dict[str, int]:
        return self.parts.group_of

    @property
    def projections(self) -> dict[str, Tensor]:
        return self.parts.projections

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.parts.factors

    @property
    def projection_hash(self) -> str:
        return self.parts.projection_hash

    @property
    def num_parameters(self) -> int:
        return self.v.numel()

    def named_parameters(self) -> dict[str, Tensor]:
        """What an optimizer gets, by its name in a checkpoint."""
        return {"v": self.v}

    def stored_v(self, v: Tensor | None = None) -> Tensor:
        """v as saved and as used: rounded to param_dtype, with the gradient passed straight through. fp32."""
        return stored(self.v if v is None else v, self.config)

    def matrices(self, v: Tensor | None = None) -> list[Tensor | None]:
        """M (adapters, segments, r, r) for each fused linear of the model, differentiable in v.

        v is (groups, u), this adapter's own by default, or (adapters, groups, u) for several in one batch. A fused linear
        with no adapted module gets None.
        """
        v = self.stored_v(v)
        v = v if v.dim() == 3 else v.unsqueeze(0)
        weights = v[:, self._group_of_segment]  # (adapters, all segments, u)
        m = torch.einsum("asu,suij->asij", weights, self._P.to(v.dtype))
        split = iter(m.split([size for size in self._sizes if size], dim=1))
        return [next(split) if size else None for size in self._sizes]

    @cached_property
    def _measures(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Of each adapted module P (u, r, r), its group, A A^T and B^T B (r, r); and |W| of all together. On the CPU."""
        names, weights = list(self.group_of), self.model.weights(PROJECTIONS)
        pairs = [self.factors[name] for name in names]
        P, groups = torch.stack([self.projections[name] for name in names]), torch.tensor(list(self.group_of.values()))
        AA, BB = torch.stack([(A @ A.T).cpu() for A, _ in pairs]), torch.stack([(B.T @ B).cpu() for _, B in pairs])
        norms = [torch.linalg.vector_norm(weights[name], dtype=torch.float32).item() for name in names]
        return P, groups, AA, BB, math.hypot(*norms)

    @torch.no_grad()
    def relative_change(self) -> float:
        """|B M A| / |W|, over all adapted modules together (Frobenius): how far they are from the base's."""
        P, groups, AA, BB, base = self._measures
        M = torch.einsum("mu,muij->mij", self.stored_v().cpu()[groups], P)  # (modules, r, r)
        return (torch.einsum("mij,mij->", BB @ M @ AA, M).clamp_min(0).sqrt() / base).item()

    def save(self, directory: Path) -> None:
        """Write directory/{adapter_config.json, adapter_model.safetensors}; no reader ever sees a half-written adapter."""
        from tinylora.adapter_files import save_adapter  # it knows this module

        save_adapter(directory, self.config, self.parts, self.v, self.base)

    def load_v(self, v: Tensor) -> None:
        """Set v from a (groups, u) tensor of any float dtype."""
        if tuple(v.shape) != tuple(self.v.shape):
            raise InputError(f"v has shape {tuple(v.shape)}; this adapter's is {tuple(self.v.shape)}")
        with torch.no_grad():
            self.v.copy_(v)


def stored(v: Tensor, config: TinyLoRAConfig) -> Tensor:
    """v rounded to param_dtype, in its own dtype, with the gradient passed straight through."""
    if config.param_dtype == "float32":
        return v
    rounded = v.detach().to(DTYPES[config.param_dtype]).to(v.dtype)
    return v + (rounded - v).detach()


def projection_of(config: TinyLoRAConfig, module: str) -> Tensor:
    """P (u, r, r) of one module. Its stream is named by the seed and the module's place among all seven projections of
    every layer, so that adapting fewer modules does not change the others' P; other modules are named by their names."""
    if config.projection == "identity":
        return torch.eye(config.u).view(config.u, config.r, config.r)
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    projection = module.rsplit(".", 1)[-1]
    if layer and projection in PROJECTIONS and module == module_name(int(layer[1]), projection):
        place = int(layer[1]) * len(PROJECTIONS) + PROJECTIONS.index(projection)
    else:
        place = xxhash.xxh3_64_intdigest(module.encode()) | 1 << 63
    return (prng.normal((config.u, config.r, config.r), config.p_seed, place) / math.sqrt(config.r)).float()


def base_hash(model: Decoder | Base) -> str:
    return _hash(*(part for item in sorted(model.digests.items()) for part in item))


def _hash(*parts: str | bytes) -> str:
    h = xxhash.xxh3_128()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
    return h.hexdigest()
