"""Log-probability and entropy of given tokens under a frozen LM head, without all logits in memory at once.

    l = h W^T / temperature    logp = l[token] - logsumexp(l)    entropy = logsumexp(l) - sum_v softmax(l)_v l_v
    dh = (g (onehot(token) - softmax(l)) / temperature) W          dW does not exist; entropy is a metric, without gradient

Rows go through in chunks; the backward recomputes each chunk's logits instead of keeping them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels.frozen_linear import NARROW, pad_rows

CHUNK = 1 << 22  # logits in memory at a time


def token_logprobs_ref(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formula with all logits at once, differentiable by autograd: the oracle."""
    logp = log_softmax_at(F.linear(hidden, head), temperature)
    return logp.gather(1, tokens[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def log_softmax_at(logits: Tensor, temperature: float) -> Tensor:
    """log softmax of logits / temperature in at least fp32; rollout and update share it."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(wide / temperature, -1)


def _chunks(rows: int, vocab: int) -> list[slice]:
    size = max(NARROW, CHUNK // vocab // NARROW * NARROW)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, tokens, temperature):  # type: ignore[no-untyped-def]
        logps, entropies = [], []
        for rows in _chunks(len(hidden), len(head)):
            logp, entropy = token_logprobs_ref(hidden[rows], head, tokens[rows], temperature)
            logps.append(logp)
            entropies.append(entropy)
        ctx.save_for_backward(hidden, head, tokens)
        ctx.temperature = temperature
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx, dlogp, _):  # type: ignore[no-untyped-def]
        hidden, head, tokens = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        for rows in _chunks(len(hidden), len(head)):
            g = dlogp[rows, None] / ctx.temperature  # (chunk, 1)
            dlogits = log_softmax_at(F.linear(hidden[rows], head), ctx.temperature).exp_().mul_(-g)
            dlogits.scatter_add_(1, tokens[rows, None], g)
            torch.mm(dlogits.to(head.dtype), head, out=dhidden[rows])
        return dhidden, None, None, None


def token_logprobs(
    hidden: Tensor,  # (T, hidden)
    head: Tensor,  # (vocab, hidden), frozen
    tokens: Tensor,  # (T,) int64
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (T,), (T,), at least fp32
    """Log-probability of tokens[i] after hidden[i], and the entropy there, with a gradient for hidden through the first."""
    rows = len(hidden)
    logp, entropy = _TokenLogprobs.apply(pad_rows(hidden), head, pad_rows(tokens), temperature)
    return logp[:rows], entropy[:rows]
