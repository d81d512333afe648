"""Completions of prompts, each under the adapter that it names: generation for whoever has a model and token ids."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Completion, Sampling, rollout
from tinylora.errors import InputError
from tinylora.model.decoder import Decoder


def generate(
    model: Decoder,
    prompts: list[list[int]],  # token ids
    adapters: Sequence[Adapter | None] | None = None,  # none, one for all prompts, or one each; None is the base
    sampling: Sampling | None = None,
    generations: int = 1,
    **options: object,  # of `rollout`: slots, cache_bytes, watch, ...
) -> list[Completion]:
    """`generations` completions of each prompt, prompt after prompt; prompts with different adapters share every batch.

    Beside adapters the base is one whose v is zero; on a CPU that is the base bit for bit. InputError where adapters and
    prompts do not match, or the adapters are not on `model` or differ in anything but v.
    """
    adapters = list(adapters or [])
    if len(adapters) not in (0, 1, len(prompts)):
        raise InputError(f"{len(adapters)} adapters for {len(prompts)} prompts; give none, one, or one for each prompt")
    distinct = list(dict.fromkeys(adapters))
    real = [a for a in distinct if a is not None]
    if any(a.model is not model or a.parts.projection_hash != real[0].parts.projection_hash for a in real):
        raise InputError("adapters of one batch must be on the same model and differ in v alone: rank, tying and P are shared")
    matrices: list[Tensor | None] | None = None
    owner = None
    if real:
        with torch.no_grad():
            zero = torch.zeros_like(real[0].v)
            matrices = real[0].matrices(torch.stack([zero if a is None else a.stored_v() for a in distinct]))
        owner = [distinct.index(a) for a in (adapters * len(prompts) if len(adapters) == 1 else adapters)]
    return rollout(model, matrices, prompts, generations, sampling or Sampling(512, 0.0), row_adapter=owner, **options)  # type: ignore[arg-type]
