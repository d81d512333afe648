"""Evolution strategies: training without a backward pass (Salimans et al. 2017, arXiv 1703.03864).

    row i of the rollout decodes with v + sigma eps_i        g = 1 / (n sigma) sum_i A_i eps_i

An adapter is a few numbers a row, so every completion of a step carries its own perturbed one at no extra cost: no log-probs,
no activations, no autograd. Completions 2j and 2j + 1 of a prompt carry +eps and -eps, so what both earn cancels.
"""

import torch
from torch import Tensor

from tinylora import prng

NOISE_STREAM = 0xE5  # names the stream of the perturbations


def perturbations(v: Tensor, count: int, seed: int, step: int) -> Tensor:
    """eps (count, *v.shape) of a step, in antithetic pairs; count is even."""
    half = prng.normal((count // 2, *v.shape), NOISE_STREAM, seed, step).to(v)
    return torch.stack([half, -half], 1).flatten(0, 1)


def estimate_gradient(noise: Tensor, advantages: Tensor, sigma: float) -> Tensor:
    """What the optimizer descends, the reward's gradient with its sign turned: noise (n, *v.shape), advantages (n,)."""
    return -torch.tensordot(advantages.to(noise), noise, 1) / (len(noise) * sigma)
