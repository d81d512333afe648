"""Sampling by inverse CDF with one counter-based uniform per (seed, sequence, position).

    token = the first v with  u * sum_w p_w < sum_{w <= v} p_w

A token therefore depends on its own distribution and place alone, never on its batch-mates or on how many there are.
"""

import torch
from torch import Tensor

from tinylora import prng
from tinylora.kernels.token_logprobs import log_softmax_at


def uniforms(seed: int, sequences: Tensor, positions: int) -> Tensor:
    """One uniform for each position of each sequence: sequences (T,) int64 -> (T, positions) float64."""
    return prng.uniform(prng.fold(seed, sequences[:, None], torch.arange(positions, device=sequences.device)))


def sample(
    logits: Tensor,  # (T, vocab)
    temperature: float,  # 0: greedy
    top_p: float,
    top_k: int,
    u: Tensor,  # (T,) in [0, 1), from `uniforms`
) -> tuple[Tensor, Tensor]:  # (T,) int64, (T,) float32
    """Next tokens and their log-probabilities at this temperature (at 1 for greedy), before any top-k or top-p cut."""
    logp = log_softmax_at(logits, temperature or 1.0)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = _truncate(logp.exp(), top_p, top_k).cumsum(-1)  # (T, vocab)
        threshold = u.to(cdf.dtype) * cdf[:, -1]
        tokens = (cdf <= threshold[:, None]).sum(-1)
        # u * total may round up to total; the last token with any mass is then the one.
        tokens = torch.minimum(tokens, (cdf < cdf[:, -1:]).sum(-1))
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
