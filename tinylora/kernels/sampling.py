"""Sampling by inverse CDF with one counter-based uniform per (seed, sequence, position).

    token = the first v with  u * sum_w p_w < sum_{w <= v} p_w

A token therefore depends on its own distribution and place alone, never on its batch-mates or on how many there are.

In Triton the vocabulary goes through once, in tiles, each leaving its maximum and its sum of exponentials; the tile in
which the sum passes u is then read again, alone.
"""

from typing import Any

import torch
from torch import Tensor

from tinylora import prng
from tinylora.kernels import dispatch
from tinylora.kernels.launch import launch, tl, triton
from tinylora.kernels.token_logprobs import log_softmax_at

BUDGET = {"_tile_sums": (96, 1024), "_pick": (128, 32_768)}  # kernel: registers a thread, bytes of shared memory


def uniforms(seed: int | Tensor, sequences: Tensor, positions: int) -> Tensor:
    """One uniform for each position of each sequence: sequences (T,) int64 -> (T, positions) float64. One seed, or (T,)."""
    key = seed[:, None] if isinstance(seed, Tensor) else seed
    return prng.uniform(prng.fold(key, sequences[:, None], torch.arange(positions, device=sequences.device)))


def sample_ref(logits: Tensor, temperature: float, top_p: float, top_k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` in plain PyTorch, every cut included."""
    logp = log_softmax_at(logits, temperature or 1.0)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = _truncate(logp.exp(), top_p, top_k).cumsum(-1)  # (T, vocab)
        total = cdf[:, -1:].contiguous()  # (T, 1)
        tokens = torch.searchsorted(cdf, u.to(cdf.dtype)[:, None] * total, right=True).squeeze(1)
        # u * total may round up to total; the last token with any mass is then the one.
        tokens = torch.minimum(tokens, torch.searchsorted(cdf, total).squeeze(1))
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def _truncate(p: Tensor, top_p: float, top_k: int) -> Tensor:
    """p (T, vocab) with the tokens outside the k likeliest, then outside the smallest set of mass top_p, set to zero."""
    if 0 < top_k < p.shape[-1]:
        p = torch.where(p >= p.topk(top_k, -1).values[:, -1:], p, 0.0)
    if top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(-1) - ordered
        kept = torch.where(mass_before < top_p * p.sum(-1, keepdim=True), ordered, 0.0)
        p = torch.zeros_like(p).scatter(-1, order, kept)
    return p


@triton.jit
def _tile_sums(
    logits_ptr,  # (T, vocab)
    tops_ptr,  # (T, tiles): the largest logit
    sums_ptr,  # (T, tiles): sum e^(l - the largest)
    vocab,
    stride,
    temperature,
    TILE: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    logit = tl.load(logits_ptr + row * stride + column, column < vocab, float("-inf")).to(tl.float32) / temperature
    top = tl.max(logit, 0)
    base = tl.where(top == float("-inf"), 0.0, top)  # a tile of impossible tokens sums to 0, not to NaN
    out = row * tl.num_programs(1) + tile
    tl.store(tops_ptr + out, top)
    tl.store(sums_ptr + out, tl.sum(tl.exp(logit - base), 0))


@triton.jit
def _pick(
    logits_ptr,  # (T, vocab)
    tops_ptr,  # (T, tiles)
    sums_ptr,  # (T, tiles)
    u_ptr,  # (T,) float32
    tokens_ptr,  # (T,) int64
    logp_ptr,  # (T,)
    vocab,
    stride,
    tiles,
    temperature,
    GREEDY: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TILES)
    top = tl.load(tops_ptr + row * tiles + index, index < tiles, float("-inf"))
    best = tl.max(top, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    mass = tl.load(sums_ptr + row * tiles + index, index < tiles, 0.0) * tl.exp(top - base)
    total = tl.sum(mass, 0)
    # Sums rounded in another order may rise where there is no mass, or never pass the threshold: what is chosen must have
    # mass of its own, and where nothing passes it is the last that has.
    threshold = tl.load(u_ptr + row) * total
    passed = (top == best) if GREEDY else (tl.cumsum(mass, 0) > threshold)
    first = tl.min(tl.where(passed & (mass > 0), index, TILES), 0)
    tile = tl.minimum(first, tl.max(tl.where(mass > 0, index, 0), 0))
    before = tl.sum(tl.where(index < tile, mass, 0.0), 0)

    place = tl.arange(0, TILE)
    column = tile * TILE + place
    logit = tl.load(logits_ptr + row * stride + column, column < vocab, float("-inf")).to(tl.float32) / temperature
    p = tl.exp(logit - base)
    passed = (logit == best) if GREEDY else (before + tl.cumsum(p, 0) > threshold)
    first = tl.min(tl.where(passed & (p > 0), place, TILE), 0)
    choice = tl.minimum(first, tl.max(tl.where(p > 0, place, 0), 0))
    chosen = tl.sum(tl.where(place == choice, logit, 0.0), 0)
    tl.store(tokens_ptr + row, (tile * TILE + choice).to(tl.int64))
    tl.store(logp_ptr + row, chosen - base - tl.log(total))


def config(vocab: int) -> dict[str, Any]:
    """Tokens in a tile and warps for it; a function of the vocabulary alone, so that a row's bits are too."""
    tile = min(4096, max(16, triton.next_power_of_2(vocab)))
    return {"TILE": tile, "num_warps": max(1, tile // 512)}


def sample_triton(logits: Tensor, temperature: float, top_p: float, top_k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` in two kernels. Raises ValueError where top_p or top_k cuts tokens off, which they do not do."""
    T, vocab = logits.shape
    if top_p < 1 or 0 < top_k < vocab:
        raise ValueError(f"top_p={top_p} and top_k={top_k}: the Triton sampler does not cut the distribution")
    logits, options, scale = logits if logits.stride(1) == 1 else logits.contiguous(), config(vocab), temperature or 1.0
    tiles = triton.cdiv(vocab, options["TILE"])
    tops, sums = logits.new_empty(2, T, tiles, dtype=torch.float32)
    tokens, logp = torch.empty_like(u, dtype=torch.int64), torch.empty_like(u, dtype=torch.float32)
    launch(_tile_sums, (T, tiles), logits, tops, sums, vocab, logits.stride(0), float(scale), **options)
    sizes = {"GREEDY": temperature == 0, "TILES": triton.next_power_of_2(tiles)}
    out = (u.float().contiguous(), tokens, logp)
    launch(_pick, (T,), logits, tops, sums, *out, vocab, logits.stride(0), tiles, float(scale), **sizes, **options)
    return tokens, logp


def sample(
    logits: Tensor,  # (T, vocab)
    temperature: float,  # 0: greedy
    top_p: float,
    top_k: int,
    u: Tensor,  # (T,) in [0, 1), from `uniforms`
) -> tuple[Tensor, Tensor]:  # (T,) int64, (T,) float32
    """Next tokens and their log-probabilities at this temperature (at 1 for greedy), before any top-k or top-p cut."""
    whole = top_p >= 1 and not 0 < top_k < logits.shape[1]
    op = sample_triton if whole and dispatch.runs_triton("sampling", logits) else sample_ref
    return op(logits, temperature, top_p, top_k, u)
