"""The adapter on our Decoder: v, and how it becomes the matrix M of every adapted module.

    M[module] = sum_i v[group(module), i] P[module, i]        W' = W + B M A

v (groups, u) is all that learns. The adapter knows v, P and tying; it never sees a kernel.
"""

import math
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tinylora.adapter.config import TinyLoRAConfig, stored
from tinylora.adapter.files import save_adapter
from tinylora.adapter.parts import Base, Parts, draw_parts, fill_v
from tinylora.model.decoder import Decoder


class Adapter:
    """v on one model: packs the model's factors at construction and turns v into the matrices its forward takes."""

    def __init__(self, model: Decoder, config: TinyLoRAConfig, parts: Parts | None = None) -> None:
        """`parts` are drawn from the config, unless they came with a file."""
        self.config, self.model = config, model
        self.parts = parts or draw_parts(config, base_of_decoder(model))
        model.pack_factors(self.parts.factors)

        # One P and one group number per segment of every fused linear, in the model's order; absent segments are zero.
        projections: list[Tensor] = []
        group_of_segment: list[int] = []
        self._sizes = model.segments(config.r)
        zero = torch.zeros(config.u, config.r, config.r)
        for own, size in zip(model.modules(), self._sizes, strict=True):
            padding = size - len(own)
            if size:
                projections += [self.parts.projections.get(m, zero) for m in own] + [zero] * padding
                group_of_segment += [self.parts.group_of.get(m, 0) for m in own] + [0] * padding
        self._P = torch.stack(projections).to(model.device)  # (segments of all groups, u, r, r)
        self._group_of_segment = torch.tensor(group_of_segment, device=model.device)
        self.v = torch.zeros(self.parts.groups, config.u, device=model.device, requires_grad=True)  # the fp32 master

    @property
    def base(self) -> Base:
        """Not kept: it would keep weights alive that `pack_factors` has moved."""
        return base_of_decoder(self.model)

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
        names, weights = list(self.parts.group_of), self.model.weights()
        pairs = [self.parts.factors[name] for name in names]
        P = torch.stack([self.parts.projections[name] for name in names])
        groups = torch.tensor(list(self.parts.group_of.values()))
        AA, BB = torch.stack([(A @ A.T).cpu() for A, _ in pairs]), torch.stack([(B.T @ B).cpu() for _, B in pairs])
        norms = [torch.linalg.vector_norm(weights[name], dtype=torch.float32).item() for name in names]
        return P, groups, AA, BB, math.hypot(*norms)

    @torch.no_grad()
    def relative_change(self) -> float:
        """|B M A| / |W|, over all adapted modules together (Frobenius): how far they are from the base's."""
        P, groups, AA, BB, base = self._measures
        M = torch.einsum("mu,muij->mij", self.stored_v().cpu()[groups], P)  # (modules, r, r)
        return (torch.einsum("mij,mij->", BB @ M @ AA, M).clamp_min(0).sqrt() / base).item()

    @torch.no_grad()
    def change_per_rate(self) -> float:
        """|B M A| / |W| where every number of v is 1 or -1, as a root mean square over their signs: what a first step of Adam
        changes, divided by its rate."""
        P, _, AA, BB, base = self._measures
        return (torch.einsum("muij,muij->", BB[:, None] @ P @ AA[:, None], P).clamp_min(0).sqrt() / base).item()

    def save(self, directory: Path) -> None:
        """Write directory/{adapter_config.json, adapter_model.safetensors}; no reader ever sees a half-written adapter."""
        save_adapter(directory, self.config, self.parts, self.v, self.base)

    def load_v(self, v: Tensor) -> None:
        """Set v from a (groups, u) tensor of any float dtype."""
        fill_v(self.v, v)


def base_of_decoder(model: Decoder) -> Base:
    return Base(model.name, model.weights(), model.digests, hashed=model.hashed)
