"""What is trained: v, and how it becomes the matrix M of every adapted module.

    M[module] = sum_i v[group(module), i] P[module, i]        W' = W + B M A

v (groups, u) is all that learns. P (u, r, r) ~ N(0, 1/r) is fixed and drawn per module, so that tied modules still differ.
Which modules share a group is tying: see `TinyLoRAConfig`. The adapter knows v, P and tying; it never sees a kernel.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tinylora import prng
from tinylora.basis import BASES, compute_basis
from tinylora.errors import InputError
from tinylora.files import write_safetensors, write_text
from tinylora.kernels.frozen_linear import padded_segments
from tinylora.model.decoder import GROUPS, PROJECTIONS, Decoder, module_name

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMAT_VERSION = 1
SKETCH = 16  # entries kept of each row of A and column of B
SKETCH_TOLERANCE = 1e-2  # relative; a flipped sign or another singular vector is off by about 1


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

    def __post_init__(self) -> None:
        for name in ("r", "u"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: it must be at least 1")
        if self.n_tie != "all" and (not isinstance(self.n_tie, int) or self.n_tie < 1):
            raise InputError(f"--n-tie {self.n_tie}: it must be a number of modules, at least 1, or all")
        if self.tie_mode not in ("tiled", "structured"):
            raise InputError(f"--tie-mode {self.tie_mode}: choose tiled or structured")
        if self.param_dtype not in _DTYPES:
            raise InputError(f"--param-dtype {self.param_dtype}: choose one of {', '.join(_DTYPES)}")
        if self.basis not in BASES:
            raise InputError(f"--basis {self.basis}: choose one of {', '.join(BASES)}")
        unknown = set(self.target_modules) - set(PROJECTIONS)
        if unknown or not self.target_modules:
            raise InputError(f"--target-modules {sorted(unknown) or '(none)'}: choose from {', '.join(PROJECTIONS)}")

    @property
    def p_seed(self) -> int:
        return self.seed if self.projection_seed is None else self.projection_seed

    def groups(self, num_layers: int) -> dict[str, int]:
        """The group of each adapted module, by module name, in module order."""
        types = [p for p in PROJECTIONS if p in self.target_modules]
        if self.tie_mode == "structured":
            size = num_layers if self.n_tie == "all" else self.n_tie
            per_type = math.ceil(num_layers / size)
            return {
                module_name(layer, name): types.index(name) * per_type + layer // size
                for layer in range(num_layers)
                for name in types
            }
        modules = [module_name(layer, name) for layer in range(num_layers) for name in types]
        size = len(modules) if self.n_tie == "all" else self.n_tie
        return {name: index // size for index, name in enumerate(modules)}

    def num_parameters(self, num_layers: int) -> int:
        """Trained numbers on a model of this many layers; needs no model."""
        return self.u * (max(self.groups(num_layers).values()) + 1)


class Adapter:
    """v on one model: packs the model's factors at construction and turns v into the matrices its forward takes."""

    def __init__(self, model: Decoder, config: TinyLoRAConfig) -> None:
        layers, self.config, self.model = len(model.layers), config, model
        smallest = min(min(w.shape) for w in model.weights(config.target_modules).values())
        if config.r > smallest:
            raise InputError(f"--r {config.r}: the smallest adapted weight has only {smallest} rows or columns")
        self.group_of = config.groups(layers)
        groups = max(self.group_of.values()) + 1
        weights = model.weights(config.target_modules)
        key = _hash(*(model.digests.get(f"{name}.weight", "") for name in weights), str(model.dtype))
        self.factors = compute_basis(weights, config.r, key, config.basis)
        model.pack_factors(self.factors)
        self.projections = {name: _projection(config, name) for name in weights}
        self.projection_hash = _hash(*(p.numpy().tobytes() for p in self.projections.values()))

        # One P and one group number per segment of every fused linear, in the model's order; absent segments are zero.
        parts, group_of_segment, self._sizes = [], [], []
        for layer in range(layers):
            for names in GROUPS:
                modules = [module_name(layer, name) for name in names]
                if not any(m in weights for m in modules):
                    self._sizes.append(0)
                    continue
                size = padded_segments(len(names), config.r, model.narrow)
                zero = torch.zeros(config.u, config.r, config.r)
                parts += [self.projections.get(m, zero) for m in modules] + [zero] * (size - len(names))
                group_of_segment += [self.group_of.get(m, 0) for m in modules] + [0] * (size - len(names))
                self._sizes.append(size)
        self._P = torch.stack(parts).to(model.device)  # (segments of all groups, u, r, r)
        self._group_of_segment = torch.tensor(group_of_segment, device=model.device)
        self.v = torch.zeros(groups, config.u, device=model.device, requires_grad=True)  # the fp32 master

    @property
    def num_parameters(self) -> int:
        return self.v.numel()

    def stored_v(self, v: Tensor | None = None) -> Tensor:
        """v as saved and as used: rounded to param_dtype, with the gradient passed straight through. fp32."""
        v = self.v if v is None else v
        rounded = v.detach().to(_DTYPES[self.config.param_dtype]).to(v.dtype)
        return v + (rounded - v).detach() if self.config.param_dtype != "float32" else v

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

    # ---- files ----------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Write directory/{adapter_config.json, adapter_model.safetensors}; no reader ever sees a half-written adapter."""
        about = {
            "format": "tinylora",
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(self.config),
            "projection_seed": self.config.p_seed,
            "base_model_name_or_path": self.model.path.name,
            "base_model_hash": base_hash(self.model),
            "projection_hash": self.projection_hash,
            "num_parameters": self.num_parameters,
        }
        tensors = {"v": self.v.detach().to("cpu", _DTYPES[self.config.param_dtype]).contiguous()}
        names = list(self.factors)
        for side, sketches in zip("AB", _sketches(self.factors), strict=True):
            tensors[f"sketch.{side}"] = sketches
        # The tensors carry the config in their header, so that the one file is complete in itself. One key only: safetensors
        # writes several in random order, and equal adapters are to be equal files.
        write_safetensors(directory / "adapter_model.safetensors", tensors, {"tinylora": json.dumps(about)})
        write_text(directory / "adapter_config.json", json.dumps({**about, "modules": len(names)}, indent=2) + "\n")

    def load_v(self, v: Tensor) -> None:
        """Set v from a (groups, u) tensor of any float dtype."""
        if tuple(v.shape) != tuple(self.v.shape):
            raise InputError(f"v has shape {tuple(v.shape)}; this adapter's is {tuple(self.v.shape)}")
        with torch.no_grad():
            self.v.copy_(v)


def load_adapter(directory: str | Path, model: Decoder) -> Adapter:
    """Load a saved adapter onto the base it was trained on; a run's output directory does as well as its adapter/.

    InputError where it is missing, broken, of another base, or where P or the factors come out differently here.
    """
    directory = Path(directory)
    if not (directory / "adapter_config.json").exists() and (directory / "adapter").is_dir():
        directory = directory / "adapter"
    try:
        about: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise InputError(f"--adapter {directory}: {Path(error.filename or '').name or error} is missing") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--adapter {directory} cannot be read: {error}") from None
    if not isinstance(about, dict) or (about.get("format"), about.get("format_version")) != ("tinylora", FORMAT_VERSION):
        raise InputError(f"--adapter {directory}: not a tinylora adapter of format version {FORMAT_VERSION}")
    names = [f.name for f in dataclasses.fields(TinyLoRAConfig)]
    lacking = {*names, "base_model_hash", "base_model_name_or_path", "projection_hash", "modules"} - about.keys()
    if lacking:
        raise InputError(f"--adapter {directory}: adapter_config.json lacks {', '.join(sorted(lacking))}")
    fields = {name: about[name] for name in names}
    config = TinyLoRAConfig(**{**fields, "target_modules": tuple(fields["target_modules"])})
    if about["base_model_hash"] != base_hash(model):
        raise InputError(
            f"--adapter {directory} was trained on {about['base_model_name_or_path']} (weights {about['base_model_hash']}, "
            f"{about['modules']} modules); this model is {model.path.name} (weights {base_hash(model)}, "
            f"{len(config.groups(len(model.layers)))} modules). Give the base it was trained on."
        )
    adapter = Adapter(model, config)
    if about["projection_hash"] != adapter.projection_hash:
        raise InputError(f"--adapter {directory}: P of seed {config.p_seed} comes out differently in this version of tinylora")
    if {"v", "sketch.A", "sketch.B"} - tensors.keys():
        raise InputError(f"--adapter {directory}: adapter_model.safetensors lacks v or its sketches")
    for side, mine in zip("AB", _sketches(adapter.factors), strict=True):
        theirs = tensors[f"sketch.{side}"]
        # not <=, rather than >, so that NaN fails it
        if theirs.shape != mine.shape or not ((theirs - mine).norm(dim=2) <= SKETCH_TOLERANCE * mine.norm(dim=2)).all():
            raise InputError(f"--adapter {directory}: the factors {side} come out differently on this machine or in this dtype")
    if not tensors["v"].isfinite().all():
        raise InputError(f"--adapter {directory}: v is not finite")
    adapter.load_v(tensors["v"])
    return adapter


def _projection(config: TinyLoRAConfig, module: str) -> Tensor:
    """P (u, r, r) of one module. Its stream is named by the seed and the module's place among all seven projections of
    every layer, so that adapting fewer modules does not change the others' P."""
    layer, projection = int(module.split(".")[2]), module.rsplit(".", 1)[1]
    place = layer * len(PROJECTIONS) + PROJECTIONS.index(projection)
    return (prng.normal((config.u, config.r, config.r), config.p_seed, place) / math.sqrt(config.r)).float()


def base_hash(model: Decoder) -> str:
    return _hash(*(part for item in sorted(model.digests.items()) for part in item))


def _hash(*parts: str | bytes) -> str:
    h = xxhash.xxh3_128()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
    return h.hexdigest()


def _sketches(factors: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """SKETCH evenly spaced entries of each row of A and column of B: (modules, r, SKETCH) each."""

    def sample(rows: Tensor) -> Tensor:  # (r, width) -> (r, SKETCH)
        return rows[:, torch.linspace(0, rows.shape[1] - 1, SKETCH).long()].float().cpu()

    pairs: Sequence[tuple[Tensor, Tensor]] = [(sample(a), sample(b.T)) for a, b in factors.values()]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
