"""Rollout: sample completions from the adapted model, batched over a KV cache, with the update's own operations.

Each prompt is prefilled once for all its samples. Rows that have ended leave the batch as soon as a quarter have. Nothing
is merged or copied: the adapter is a handful of numbers per row. Which rows share a batch never changes what they sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels.frozen_linear import NARROW, pad_rows
from tinylora.kernels.sampling import sample, uniforms
from tinylora.model.decoder import Decoder, KVCache, Matrices

GROWTH = 64  # positions by which the cache grows
CACHE_BYTES = {"cpu": 4 << 30, "cuda": 24 << 30}  # the cache's budget; more completions than fit take turns


@dataclass
class Sampling:
    """How tokens are drawn. `seed` and a sequence's number fix its uniforms."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    eos_ids: tuple[int, ...] = ()


@dataclass
class Completion:
    tokens: list[int]  # with the end token, where it came to one
    logprobs: list[float]  # of each token, as sampled
    finished: bool  # False: cut off at max_completion_length


@torch.inference_mode()
def rollout(
    model: Decoder,
    matrices: Matrices | None,
    prompts: Sequence[Sequence[int]],
    generations: int,
    sampling: Sampling,
    first_sequence: int = 0,
    row_adapter: Sequence[int] | None = None,  # adapter of each prompt, where matrices hold several
    on_completion: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """`generations` completions of each prompt, prompt after prompt. Sequence i of the call is number first_sequence + i.

    on_completion(i, completion) is called for each that ends by itself, while others still run: grading need not wait.
    """
    longest = max(map(len, prompts)) + sampling.max_completion_length
    c = model.config
    per_row = 2 * c.num_layers * c.num_kv_heads * c.head_dim * longest * model.embedding.element_size()
    turn = max(1, CACHE_BYTES[model.device.type] // per_row // generations)  # prompts at a time
    completions = []
    for start in range(0, len(prompts), turn):
        part = slice(start, start + turn)
        adapters = None if row_adapter is None else row_adapter[part]
        first = first_sequence + start * generations
        done = None if on_completion is None else partial(_shifted, on_completion, start * generations)
        completions += _rollout(model, matrices, prompts[part], generations, sampling, first, adapters, done)
    return completions


def _rollout(
    model: Decoder,
    matrices: Matrices | None,
    prompts: Sequence[Sequence[int]],
    generations: int,
    sampling: Sampling,
    first_sequence: int,
    row_adapter: Sequence[int] | None,
    on_completion: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    device, lengths = model.device, [len(p) for p in prompts]
    tokens = torch.tensor([t for p in prompts for t in p], device=device)
    prompt_adapter = None if row_adapter is None else torch.tensor(row_adapter, device=device)
    token_adapter = None
    if prompt_adapter is not None:
        token_adapter = prompt_adapter.repeat_interleave(torch.tensor(lengths, device=device))
    cache = KVCache(model.config, len(prompts), max(lengths) + min(GROWTH, sampling.max_completion_length), model.embedding)
    hidden = model.packed(tokens, lengths, matrices, token_adapter, cache)
    hidden = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]  # (prompts, hidden)

    # From here on a row is one completion. `row` says which; rows beyond `total` are filler up to a multiple of NARROW.
    total = len(prompts) * generations
    row = _filled(torch.arange(total, device=device))
    prompt = row // generations
    hidden, position = hidden[prompt], torch.tensor(lengths, device=device)[prompt]
    adapter = None if prompt_adapter is None else prompt_adapter[prompt]
    corrections = model.corrections(matrices, adapter)
    cache.select(prompt)
    eos = torch.tensor(sampling.eos_ids, device=device, dtype=torch.long)
    out_tokens = torch.zeros(total, sampling.max_completion_length, dtype=torch.long, device=device)
    out_logprobs = torch.zeros(total, sampling.max_completion_length, device=device)
    length = torch.zeros(total, dtype=torch.long, device=device)
    ended = torch.zeros(total, dtype=torch.bool, device=device)
    sequences = first_sequence + torch.arange(total, device=device)
    u = uniforms(sampling.seed, sequences, sampling.max_completion_length)  # (total, positions)

    for step in range(sampling.max_completion_length):
        logits = F.linear(pad_rows(hidden), model.head)[: len(hidden)]
        new, logp = sample(logits, sampling.temperature, sampling.top_p, sampling.top_k, u[row, step])
        # Rows that have ended stay until the batch is next cut, and write beyond their length; filler rows write the same
        # values as the row they repeat.
        out_tokens[row, step], out_logprobs[row, step] = new, logp.float()
        length[row] += ~ended[row]
        ends = torch.isin(new, eos)
        if on_completion is not None:
            for i in sorted(set(row[ends & ~ended[row]].tolist())):  # a set: filler rows repeat one
                n = int(length[i])
                on_completion(i, Completion(out_tokens[i, :n].tolist(), out_logprobs[i, :n].tolist(), True))
        ended[row] |= ends
        going = (~ended[row]).nonzero().squeeze(1)
        if len(going) == 0 or step + 1 == sampling.max_completion_length:
            break
        if len(going) <= 0.75 * len(row):
            keep = _filled(going)
            row, new, position = row[keep], new[keep], position[keep]
            cache.select(keep)
            if adapter is not None:
                adapter = adapter[keep]
                corrections = model.corrections(matrices, adapter)
        longest = int(position.max()) + 1
        cache.reserve(longest, GROWTH)
        hidden = model.decode(new, position, cache, longest, corrections)
        position = position + 1

    results = []
    for tokens_, logprobs, n, done in zip(
        out_tokens.tolist(), out_logprobs.tolist(), length.tolist(), ended.tolist(), strict=True
    ):
        results.append(Completion(tokens_[:n], logprobs[:n], done))
    return results


def _shifted(on_completion: Callable[[int, Completion], None], start: int, i: int, completion: Completion) -> None:
    on_completion(start + i, completion)


def _filled(rows: Tensor) -> Tensor:
    """Row numbers with the last repeated up to a multiple of NARROW."""
    return torch.cat([rows, rows[-1:].expand(-len(rows) % NARROW)])
