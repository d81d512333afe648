"""Decode steps of a model on any backend and device, for the tests of both."""

import torch

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.model.cache import KVCache
from tinylora.model.loader import load_model


def decoded(path, backend, dtype, device, monkeypatch, adapters=1):  # type: ignore[no-untyped-def]
    """Hidden states (4, 8, hidden) of four decode steps of eight slots, one adapter or several."""
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    model = load_model(str(path), device=device, dtype=dtype)
    adapter = Adapter(model, TinyLoRAConfig(r=2, u=3, n_tie=5))
    v = 0.3 * torch.randn(adapters, *adapter.v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = torch.tensor([2, 0, 1, 2, 0, 0, 1, 1], device=device) if adapters > 1 else None
    cache = KVCache(model.config, 8, 8, model.embedding)
    tokens = torch.randint(96, (4, 8), generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad():
        matrices = adapter.matrices(v.to(device, torch.float64 if dtype == "float64" else torch.float32))
        corrections = model.corrections(matrices, rows)
        steps = [model.decode(t, torch.full_like(t, i), cache, i + 1, corrections) for i, t in enumerate(tokens)]
    return torch.stack(steps)
