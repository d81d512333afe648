"""The frozen factors against torch.linalg.svd in float64, and the cache that must never cost a run."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tinylora.adapter import basis, factors
from tinylora.adapter.basis import control_basis, truncated_svd
from tinylora.adapter.config import BASES
from tinylora.adapter.factors import compute_basis
from tinylora.files import cache_dir

SHAPES = [(60, 24), (24, 60), (40, 40), (37, 23), (1, 9), (5, 4)]  # (N, K)


def flat(rows: int, columns: int) -> Tensor:
    """Gaussian: the spectrum is flat, so neighbouring singular values are hard to tell apart."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))


def spiked(rows: int, columns: int) -> Tensor:
    """As trained weights are: a few directions stand out."""
    noise, k = flat(rows, columns), min(rows, columns, 6)
    u, _, vt = torch.linalg.svd(noise, full_matrices=False)
    return 0.05 * noise + (u[:, :k] * torch.tensor([30.0, 20, 14, 10, 7, 5])[:k]) @ vt[:k]


def check_against_svd(weight: Tensor, r: int, found: float) -> None:
    """Every promise of truncated_svd, for factors whose search stopped at a residual of `found` sigma_1 or less."""
    a, b = truncated_svd(weight, r)
    assert a.shape == (r, weight.shape[1]) and b.shape == (weight.shape[0], r)
    assert a.dtype == b.dtype == torch.float32 and a.is_contiguous() and b.is_contiguous()
    a, b, w = a.double(), b.double(), weight.double()
    u, s, vt = torch.linalg.svd(w, full_matrices=False)

    # Orthonormal rows up to float32: each row is rounded by at most 2^-24 of its length.
    assert (a @ a.T - torch.eye(r)).abs().max() < 3 * 2**-24
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()

    # Both residuals from the returned factors. Rounding A and B to float32 adds at most 2^-24 sigma_1 for each of the two
    # that enter, 1.2e-7 in all, and the arithmetic in float64 nothing that counts; so the promised 1e-6 has room for it.
    sigma = b.norm(dim=0)
    assert (sigma - s[:r]).abs().max() < 1e-6 * s[0]
    left, right = w @ a.T - b, w.T @ (b / sigma) - a.T * sigma
    assert left.norm(dim=0).max() <= 1e-6 * s[0]
    assert right.norm(dim=0).max() <= 1e-6 * s[0]

    # A small residual alone would also fit later singular triples. Vector i is the i-th up to residual / gap (Davis and
    # Kahan), the gap being that of w^T w, from which it is found.
    following = torch.cat([s, s.new_zeros(1)])
    gaps = (following[:-1] ** 2 - following[1:] ** 2) / s[0] ** 2
    gap = torch.minimum(gaps[:r], torch.cat([gaps[:1] + 1, gaps])[:r])
    signs = vt[:r].gather(1, vt[:r].abs().argmax(1, keepdim=True)).sign()
    allowed = 4 * 2**-24 + 2 * found / gap
    assert allowed.max() < 0.01  # else the spectrum is too flat for the next two lines to say anything
    assert ((a - vt[:r] * signs).norm(dim=1) <= allowed).all()
    assert ((b - u[:, :r] * s[:r] * signs[:, 0]).norm(dim=0) <= allowed * s[0]).all()


@pytest.mark.parametrize("matrix", [flat, spiked])
@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_factors_are_the_leading_singular_triples(
    matrix: Callable[[int, int], Tensor], r: int, shape: tuple[int, int]
) -> None:
    check_against_svd(matrix(*shape), min(r, *shape), found=1e-12)


@pytest.mark.parametrize("matrix", [flat, spiked])
@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("shape", [(240, 200), (200, 240), (210, 210), (231, 197)])
def test_lanczos_finds_the_same(
    matrix: Callable[[int, int], Tensor], r: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of the large weights, on small ones. It stops at a tenth of TOLERANCE."""
    used = []
    lanczos = basis._block_lanczos
    monkeypatch.setattr(basis, "_block_lanczos", lambda *a: used.append(1) or lanczos(*a))
    monkeypatch.setattr(basis, "DENSE", 16)
    check_against_svd(matrix(*shape), r, found=1e-7)
    assert used


def test_lanczos_stops_early_on_a_spiked_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    """As trained weights have: a few blocks must do, for each costs two products with a weight of a large model."""
    calls = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda m: calls.append(1) or qr(m))  # one to start, two for each further block
    basis._block_lanczos(spiked(400, 300).double(), 2)
    assert 2 <= (len(calls) - 1) // 2 <= 8


@pytest.mark.parametrize("shape", [(60, 24), (24, 60)])
def test_only_the_smaller_side_is_decomposed(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cube of 3,584 is 1/148 of the cube of 18,944."""
    sides = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: sides.append(len(m)) or eigh(m))
    truncated_svd(flat(*shape), 2)
    assert sides == [24]


def test_a_cpu_decomposes_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On shapes alone: eigh and qr get tensors of the CPU, and what comes of them is back on the GPU."""
    where = []
    for name in ("eigh", "qr"):
        solve = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda m, solve=solve: where.append(m.device.type) or solve(m))
    with FakeTensorMode():
        x = torch.empty(60, 24, dtype=torch.float64, device="cuda")
        found = [*basis._eigh(x.T @ x), basis._orthonormal(x)]
    assert where == ["cpu"] * 2 and {f.device.type for f in found} == {"cuda"}


@pytest.mark.parametrize("device, most", [("cpu", basis.DENSE), ("cuda", basis.DENSE_ON_GPU)])
def test_which_sizes_are_dense(device: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(x: Tensor, r: int) -> Tensor:
        raise InterruptedError

    for size, way in ((most, "_dense"), (most + 1, "_block_lanczos")):
        with monkeypatch.context() as patch, FakeTensorMode(), pytest.raises(InterruptedError):
            patch.setattr(basis, way, stop)
            truncated_svd(torch.empty(3000, size, device=device), 2)


def test_too_few_iterations_are_an_error_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat spectrum and a Krylov space of two blocks: the residual says so."""
    monkeypatch.setattr(basis, "DENSE", 16)
    lanczos = basis._block_lanczos
    monkeypatch.setattr(basis, "_block_lanczos", lambda x, r: lanczos(x, r, most=16))
    with pytest.raises(RuntimeError, match=r"\(200, 100\) weight stopped at residual"):
        truncated_svd(flat(200, 100), 2)


@pytest.mark.parametrize("dense", [2048, 16])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_a_weight_of_lower_rank_than_r_has_factors_too(
    shape: tuple[int, int], dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruned layers exist: their factors' product is the weight itself, and A still has orthonormal rows."""
    monkeypatch.setattr(basis, "DENSE", dense)
    one = torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1))  # integers: of rank 1 exactly
    for weight in (one, torch.zeros(shape)):
        a, b = truncated_svd(weight, 2)
        assert (b @ a - weight).norm() <= 1e-6 * one.norm()
        assert (a @ a.T - torch.eye(2)).abs().max() < 1e-6


def test_factors_do_not_depend_on_the_dtype_of_the_weight() -> None:
    """A bfloat16 weight is widened, not computed with."""
    w = flat(30, 20).bfloat16()
    for narrow, wide in zip(truncated_svd(w, 2), truncated_svd(w.double(), 2), strict=True):
        assert torch.equal(narrow, wide)


def weights() -> dict[str, Tensor]:
    return {"one": flat(12, 8), "two": spiked(8, 12)}


def equal(first: dict[str, tuple[Tensor, Tensor]], second: dict[str, tuple[Tensor, Tensor]]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(x, y) for name in first for x, y in zip(first[name], second[name], strict=True)
    )


def refuse(*_: object) -> None:
    raise AssertionError("computed again")


def test_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "new" / "cache"))
    first = compute_basis(weights(), 2, "key")
    assert [p.name for p in (tmp_path / "new" / "cache").iterdir()] == ["basis-key-r2-v1.safetensors"]  # and no partial
    monkeypatch.setattr(factors, "truncated_svd", refuse)
    again = compute_basis(weights(), 2, "key")
    assert equal(again, first)
    assert not any(f.data_ptr() % 64 for pair in again.values() for f in pair), "where computed factors begin, for MKL's bits"
    with pytest.raises(AssertionError, match="computed again"):
        compute_basis(weights(), 1, "key")  # another r
    with pytest.raises(AssertionError, match="computed again"):
        compute_basis(weights(), 2, "other")  # other weights


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "lacks a weight"])
def test_broken_cache_only_warns_and_is_rewritten(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path))
    first = compute_basis(weights(), 2, "key")
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "lacks a weight":
        compute_basis({"one": flat(12, 8)}, 2, "part")
        (tmp_path / "basis-part-r2-v1.safetensors").replace(file)
    else:
        file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "noise": b"\xff" * len(whole)}[damage])
    with pytest.warns(UserWarning, match="ignoring the unreadable factor cache"):
        assert equal(compute_basis(weights(), 2, "key"), first)
    assert file.read_bytes() == whole
    monkeypatch.setattr(factors, "truncated_svd", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(compute_basis(weights(), 2, "key"), first)


def test_unwritable_cache_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder below a regular file can neither be read nor made, not even by root."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="factors are not cached"):
        found = compute_basis(weights(), 2, "key")
    assert equal(found, {name: truncated_svd(w, 2) for name, w in weights().items()})
    assert (tmp_path / "file").read_text() == "in the way"


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("TINYLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "tinylora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "tinylora"


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("kind", ["bottom", "random"])
def test_control_subspaces(shape: tuple[int, int], kind: str) -> None:
    """The sizes are the largest singular values, and only the directions differ: bottom ones span the smallest singular
    directions, random ones hold no more of the weight than chance gives."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, sigma, vh = torch.linalg.svd(w.double(), full_matrices=False)
    a, b = (x.double() for x in control_basis(w, 2, kind, "model.layers.0.mlp.up_proj"))
    torch.testing.assert_close(a @ a.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(b.T @ b, torch.diag(sigma[:2] ** 2), rtol=1e-5, atol=1e-5)
    inside = ((vh[-2:] @ a.T) ** 2).sum().item(), (((u[:, -2:].T @ b) / sigma[:2]) ** 2).sum().item()
    if kind == "bottom":
        assert inside[0] > 2 - 1e-5 and inside[1] > 2 - 1e-5
    else:
        assert max(inside) < 1.0, "two random directions of 24 or more share about 2 * 2 / 24 of two others"
    again = control_basis(w, 2, kind, "model.layers.0.mlp.up_proj")
    other = control_basis(w, 2, kind, "model.layers.1.mlp.up_proj")
    assert torch.equal(again[0].double(), a) and torch.equal(other[0].double(), a) is (kind == "bottom")


def test_controls_are_cached_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path))
    weights = {"m": torch.randn(12, 8, generator=torch.Generator().manual_seed(0))}
    found = {kind: compute_basis(weights, 2, "key", kind)["m"][0] for kind in BASES}
    assert len(list(tmp_path.glob("basis-key-*"))) == 3
    for kind in BASES:
        assert torch.equal(compute_basis(weights, 2, "key", kind)["m"][0], found[kind])
    assert not torch.equal(found["top"], found["bottom"]) and not torch.equal(found["top"], found["random"])
