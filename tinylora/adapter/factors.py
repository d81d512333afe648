"""The factors of all adapted weights: from the cache on disk where they have been computed before."""

import warnings

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tinylora.adapter.basis import control_basis, truncated_svd
from tinylora.files import cache_dir, write_safetensors

_CACHE_VERSION = 1


def compute_basis(
    weights: dict[str, Tensor], r: int, key: str, basis: str = "top", rounded: torch.dtype | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each named weight, `rounded` first where that is given: from the cache file `key` if it is whole, else
    computed and cached.

    `key` must tell the weights' names and numbers from others. A cache that cannot be read or written costs time, never the
    run.
    """
    kind = "" if basis == "top" else f"-{basis}"
    path = cache_dir() / f"basis-{key}-r{r}{kind}-v{_CACHE_VERSION}.safetensors"
    try:
        stored = load_file(path)
        # MKL's bits depend on where a matrix begins: a copy begins at a multiple of 64 bytes, as a computed factor does.
        return {name: (stored[f"{name}.A"].clone(), stored[f"{name}.B"].clone()) for name in weights}
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, KeyError) as error:
        warnings.warn(f"ignoring the unreadable factor cache {path}: {error}", stacklevel=2)
    names = tqdm(weights, desc="factors", unit="weight", leave=False, delay=2)
    factors = {}
    for name in names:
        weight = weights[name] if rounded is None else weights[name].to(rounded)
        factors[name] = truncated_svd(weight, r) if basis == "top" else control_basis(weight, r, basis, name)
    tensors = {f"{name}.{side}": f for name, pair in factors.items() for side, f in zip("AB", pair, strict=True)}
    try:
        write_safetensors(path, {name: t.cpu() for name, t in tensors.items()})
    except OSError as error:
        warnings.warn(f"factors are not cached: {error}", stacklevel=2)
    return factors
