"""Metrics of the tokens that an update trained on, by TRL's names."""

import torch
from torch import Tensor


class TokenMetrics:
    """Token metrics over the microbatches of a step."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Tensor]] = {}

    def add(self, **columns: Tensor | None) -> None:
        for name, column in columns.items():
            if column is not None:
                self.columns.setdefault(name, []).append(column.detach().double().reshape(-1).cpu())

    def metrics(self, with_kl: bool) -> dict[str, float | None]:
        def of(name: str, reduction: str) -> float | None:
            column = torch.cat(self.columns.get(name, [torch.zeros(0)]))
            return getattr(column, reduction)().item() if len(column) else None

        metrics = {
            "loss": of("loss", "sum") or 0.0,
            "entropy": of("entropy", "mean"),
            "clip_ratio/low_mean": of("low", "mean"),
            "clip_ratio/high_mean": of("high", "mean"),
            "sampling/sampling_logp_difference/mean": of("difference", "mean"),
            "sampling/sampling_logp_difference/max": of("difference", "max"),
            "sampling/importance_sampling_ratio/min": of("importance", "min"),
            "sampling/importance_sampling_ratio/mean": of("importance", "mean"),
            "sampling/importance_sampling_ratio/max": of("importance", "max"),
        }
        return metrics | ({"kl": of("kl", "mean")} if with_kl else {})
