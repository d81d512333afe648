"""What an adapter is besides v: the base that it is on, P, the factors A and B, and the hashes that tell them from others.

P (u, r, r) ~ N(0, 1/r) is fixed and drawn per module, so that tied modules still differ.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from tinylora import prng
from tinylora.adapter.config import DTYPES, TinyLoRAConfig
from tinylora.adapter.factors import compute_basis
from tinylora.errors import InputError
from tinylora.hashes import base_hash, content_hash, digest, holds, joint_hash, narrowest, quantisation
from tinylora.model.config import PROJECTIONS, module_name


@dataclass
class Base:
    """A frozen model as an adapter sees it: a Decoder, or any module with linears (`attached.base_of`)."""

    name: str  # its path or hub id, as it was typed
    weights: dict[str, Tensor]  # every linear weight that could be adapted, as (N, K), by module name in module order
    digests: dict[str, str]  # content hash of every parameter, by parameter name
    transposed: frozenset[str] = frozenset()  # modules that hold their weight as (K, N)
    tensors: dict[str, Tensor] | None = None  # the parameters, where digests are of what is in memory and not of a file
    # a content hash of a parameter's numbers with the dtype it was taken in; `values_hash` puts the narrowest in its place
    hashed: dict[str, tuple[torch.dtype, str]] = field(default_factory=dict)

    def targets(self, names: Sequence[str]) -> list[str]:
        """The modules that `names` mean, in module order: each is a whole module name or its last parts, as in PEFT.
        InputError for a name that means none."""
        found = [m for m in self.weights if any(m == n or m.endswith(f".{n}") for n in names)]
        for name in names:
            if not any(m == name or m.endswith(f".{name}") for m in found):
                kinds = list(dict.fromkeys(m.rsplit(".", 1)[-1] for m in self.weights))
                raise InputError(f"--target-modules {name}: no such linear in {self.name}, which has {', '.join(kinds)}")
        return found

    def values_hash(self, module: str) -> str:
        """Of a weight's numbers, whatever floating dtype they are in: the content hash in the narrowest that holds them all."""
        weight = self.weights[module].T if module in self.transposed else self.weights[module]
        taken, found = self.hashed.get(f"{module}.weight", (None, ""))
        if taken is None or not holds(weight.dtype, taken):  # of none, or of numbers that were rounded since
            taken = None
        dtype = narrowest(weight, taken)
        if dtype != taken:
            found = content_hash(weight.to(dtype))
            self.hashed[f"{module}.weight"] = dtype, found
        return found

    def has_hash(self, wanted: str) -> bool:
        """Whether this is the base of that hash; weights read in a wider dtype than they are stored in are the same base."""
        if base_hash(self.digests) == wanted:
            return True
        for dtype in DTYPES.values() if self.tensors else ():
            digests = {}
            for name, tensor in (self.tensors or {}).items():
                narrowed = tensor.detach().to(dtype)
                if not torch.equal(narrowed.to(tensor.dtype), tensor):
                    break
                digests[name] = content_hash(narrowed)
            else:
                if base_hash(digests) == wanted:
                    return True
        return False


@dataclass
class Parts:
    """What an adapter is besides v, for each adapted module, in module order."""

    group_of: dict[str, int]
    projections: dict[str, Tensor]  # P (u, r, r), float32
    factors: dict[str, tuple[Tensor, Tensor]]  # A (r, K) and B (N, r), float32
    peft: dict[str, Any] | None = None  # the adapter_config.json of PEFT that they came with; None: drawn from a config
    prompt: dict[str, Any] | None = None  # what makes the prompts it was trained on, as JSON; None: nobody says

    @property
    def groups(self) -> int:
        return max(self.group_of.values()) + 1

    @property
    def projection_hash(self) -> str:
        return joint_hash(*(p.numpy().tobytes() for p in self.projections.values()))


def draw_parts(config: TinyLoRAConfig, base: Base) -> Parts:
    """Groups, P and factors as the config alone says. InputError where a weight is too small for r."""
    weights = {name: base.weights[name] for name in base.targets(config.target_modules)}
    smallest = min(min(w.shape) for w in weights.values())
    if config.r > smallest:
        raise InputError(f"--r {config.r}: the smallest adapted weight has only {smallest} rows or columns")
    # A GGUF is read in whatever precision a device wants, and its adapters are to be read in any: their factors are of one.
    rounded = torch.bfloat16 if quantisation(base.digests.values()) else None
    hashes = {name: base.digests[f"{name}.weight"] if rounded else base.values_hash(name) for name in weights}
    key = digest(hashes, sorted(base.transposed & weights.keys()), str(rounded))
    factors = compute_basis(weights, config.r, key, config.basis, rounded)
    return Parts(config.tie(list(weights)), {name: projection_of(config, name) for name in weights}, factors)


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


def fill_v(v: Tensor, values: Tensor) -> None:
    """Set an adapter's v (groups, u) from values of any float dtype. InputError where they have another shape."""
    if tuple(values.shape) != tuple(v.shape):
        raise InputError(f"v has shape {tuple(values.shape)}; this adapter's is {tuple(v.shape)}")
    with torch.no_grad():
        v.copy_(values)
