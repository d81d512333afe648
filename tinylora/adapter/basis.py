"""The frozen factors of every adapted weight: A = V_r^T (r, K) and B = U_r Sigma_r (N, r) of its truncated SVD.

Never a full SVD. Up to `DENSE` on the smaller side, `DENSE_ON_GPU` there: the Gram matrix in fp64 and eigh. Above: block
Lanczos on it without forming it. Both are checked against the same residual, because randomised iteration quietly misses flat
spectra. In fp64 the factors, rounded to fp32, hardly depend on the thread count; their bits still may, so adapters compare them
by tolerance. What is decomposed is small or narrow, and a CPU does that for a GPU too, which would wait on itself.

Two controls keep those singular values and change the directions alone: "bottom" takes the r smallest singular directions,
"random" takes random orthonormal ones.
"""

import zlib

import torch
from torch import Tensor

from tinylora import prng

DENSE = 2048  # smaller sides up to this are solved densely
DENSE_ON_GPU = 512  # on a GPU block Lanczos is tens of fast products, and the dense problem, a CPU's, grows with the cube
TOLERANCE = 1e-6  # of sigma_1, on both residuals
_RANDOM_STREAM = 0xBA515  # names the stream of random directions


def truncated_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, K) with orthonormal rows and B (N, r) with B A the best rank-r approximation of weight (N, K); float32.

    Signs are canonical: the entry of largest magnitude of each row of A is positive.
    Raises RuntimeError where the residual does not reach TOLERANCE.
    """
    w = weight.detach().double()
    tall = w.shape[0] >= w.shape[1]
    x = w if tall else w.T  # (big, small): its right singular vectors live on the smaller side
    dense = x.shape[1] <= (DENSE if x.is_cpu else DENSE_ON_GPU)
    small = _dense(x, r) if dense else _block_lanczos(x, r)  # (small, r), by falling singular value
    # x @ small is (big, r) = singular vectors times sigma. qr, and no division, for weights of a rank below r.
    big, triangle = torch.linalg.qr(x @ small)
    sigma = triangle.diagonal().abs()
    big = big * torch.ones_like(sigma).copysign(triangle.diagonal())
    residual = ((x.T @ big - small * sigma).norm(dim=0) / sigma[0].clamp_min(1e-300)).max().item()
    if not residual <= TOLERANCE:
        raise RuntimeError(f"truncated SVD of a {tuple(weight.shape)} weight stopped at residual {residual:.1e}")
    u, v = (big, small) if tall else (small, big)
    signs = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    return (v * signs).T.float().contiguous(), (u * sigma * signs).float().contiguous()


def control_basis(weight: Tensor, r: int, basis: str, name: str) -> tuple[Tensor, Tensor]:
    """A (r, K) with orthonormal rows and B (N, r) with orthogonal columns as long as the r largest singular values; float32.

    basis "bottom": the r smallest singular directions, smallest first; "random": the same for the same name everywhere.
    """
    sigma = truncated_svd(weight, r)[1].double().norm(dim=0)  # (r,)
    w = weight.detach().double()
    if basis == "bottom":
        tall = w.shape[0] >= w.shape[1]
        x = w if tall else w.T
        small = torch.linalg.eigh(x.T @ x).eigenvectors[:, :r]  # (small, r), dense at every size: it is a control
        big = torch.linalg.qr(x @ small).Q
        u, v = (big, small) if tall else (small, big)
    else:
        keys = _RANDOM_STREAM, zlib.crc32(name.encode())
        u, v = (torch.linalg.qr(prng.normal((size, r), *keys, side)).Q.to(w) for side, size in enumerate(w.shape))
    return v.T.float().contiguous(), (u * sigma).float().contiguous()


def _eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (n, n) of x (n, n), computed on the CPU."""
    values, vectors = torch.linalg.eigh(x.cpu())
    return values.to(x.device), vectors.to(x.device)


def _orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis (n, k) of the columns of x (n, k), computed on the CPU."""
    return torch.linalg.qr(x.cpu()).Q.to(x.device)


def _dense(x: Tensor, r: int) -> Tensor:
    """The r leading right singular vectors (small, r) of x (big, small), from its Gram matrix."""
    return _eigh(x.T @ x)[1].flip(1)[:, :r]


def _block_lanczos(x: Tensor, r: int, block: int = 8, most: int = 800) -> Tensor:
    """The r leading right singular vectors (small, r) of x (big, small): Krylov space of x^T x, reorthogonalised fully.

    The start block is fixed, so the result is repeatable. Stops when the residual is a tenth of TOLERANCE.
    """
    block = max(block, 2 * r)
    start = torch.Generator().manual_seed(0)
    q = torch.randn(x.shape[1], block, generator=start, dtype=torch.float64)
    q = _orthonormal(q).to(x.device)
    basis, images = q, x.T @ (x @ q)  # (small, k) each
    while True:
        full = basis.shape[1] + block > min(most, x.shape[1])
        if full or basis.shape[1] // block % 4 == 1:  # the small eigenproblem is not worth solving for every block
            values, vectors = _eigh(basis.T @ images)
            top, lam = vectors.flip(1)[:, :r], values.flip(0)[:r]
            ritz = basis @ top
            # |x^T x v - lambda v| / lambda_1 is what the caller's residual, relative to sigma_1, comes to
            residual = ((images @ top - ritz * lam).norm(dim=0) / lam[0].clamp_min(1e-300)).max().item()
            if full or residual <= TOLERANCE / 10:
                return ritz
        q = images[:, -block:]
        for _ in range(2):  # once is not enough in floating point, nor are two before the qr where q has a lower rank
            q = _orthonormal(q - basis @ (basis.T @ q))
        basis, images = torch.cat([basis, q], 1), torch.cat([images, x.T @ (x @ q)], 1)
