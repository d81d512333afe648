"""The C kernels of the CPU: proven here as on first use, planted faults caught, and bits that depend on a row alone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tinylora.adapter import Adapter, TinyLoRAConfig
from tinylora.errors import BuildError
from tinylora.kernels import dispatch, native
from tinylora.kernels.attention import Packing, packed_attention
from tinylora.kernels.correction import Correction
from tinylora.kernels.decode_attention import CacheView, decode_attention
from tinylora.kernels.self_check import NATIVE_CHECKS, rms, verdict
from tinylora.kernels.shrink import shrink, shrink_native
from tinylora.model.loader import load_model
from tinylora.rl.rollout import Completion
from tinylora.rl.update import score

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")

# What is changed in csrc/cpu.c -> the op whose check must fail.
FAULTS = [
    ("squares += s * s;", "squares += s;", "add_norm"),
    ("z[row * inner_rank + i] * load(b", "z[row * inner_rank] * load(b", "add_norm"),
    ("dnew ? d + load(dnew + row * stride_dnew + k) : d", "d", "add_norm"),
    ("slope = sum(products) / width * scale * scale;", "slope = sum(products) / width * scale;", "add_norm"),
    ("k ? 0.0f : one", "one", "add_norm"),
    ("m[b * r + a] : m[a * r + b]", "m[a * r + b] : m[a * r + b]", "swiglu"),
    ("if (c->kept) memcpy", "if (0) memcpy", "shrink"),
    ("c->adapter ? c->adapter[first + i] : 0", "0", "shrink"),
    ("p = p * f + 4.1665795894e-2f;", "p = p * f + 4.18e-2f;", "swiglu"),
    ("s * (1.0f + g * (1.0f - s))", "s * (1.0f + g)", "swiglu"),
    ("store(out + half + k, b * c + a * s);", "store(out + half + k, b * c - a * s);", "rope"),
    ("store(out + k, a * c + b * s);", "store(out + k, a * c - b * s);", "rope"),
    ("a = a * scale * load(w + k)", "a = a * load(w + k)", "rope"),
    ("at / page_size] : row", "0] : row", "decode_attention"),
    ("least(left, c->page_size)", "c->page_size", "decode_attention"),
    ("ps[j] = -INFINITY;", "ps[j] = 0.0f;", "decode_attention"),
    ("(load(dp + j) - delta) * scale", "load(dp + j) * scale", "packed_attention"),
    ("i ? place + 1 : a->length[from[i]]", "i ? place + 1 : 1", "packed_attention"),
    ("gv += p[s * a->room + n]", "gv += p[n]", "packed_attention"),
]  # fmt: skip


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for anew, and the true one again afterwards."""
    for f in (native.identity, native.functions):
        f.cache_clear()
    yield
    for f in (native.identity, native.functions):
        f.cache_clear()


@pytest.mark.parametrize("op", NATIVE_CHECKS)
def test_every_kernel_matches_its_reference(op: str) -> None:
    assert verdict(op, NATIVE_CHECKS[op], CPU, seed=1)["error"] is None
    assert dispatch.prove(CPU)[op, "float32"]["error"] is None, "and so a child found"


@pytest.mark.parametrize("old, new, op", FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_found(
    old: str, new: str, op: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = native.SOURCE.read_text()
    assert old in source
    broken = tmp_path / "cpu.c"
    broken.write_text(source.replace(old, new))
    monkeypatch.setattr(native, "SOURCE", broken)
    assert verdict(op, NATIVE_CHECKS[op], CPU, seed=1)["error"] is not None


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_decode_and_update_attend_to_the_same_bits() -> None:
    """A sequence's last token: in a pack, as a suffix, in one long page, in pages of any size, in any order."""
    heads, kv_heads, D, n = 6, 2, 48, 37
    q, k, v = normals(n, heads, D), normals(n, kv_heads, D, seed=1), normals(n, kv_heads, D, seed=2)
    for prefix in (0, 1, 8, 13, 36):
        lengths, prefixes = ([prefix, n - prefix], [0]) if prefix else ([n], [])
        packed = packed_attention(q, k, v, Packing(lengths, prefixes, q.dtype, CPU, None))
        for size in (4, 8, 64):
            pages = -(-n // size)
            table = torch.randperm(pages, generator=torch.Generator().manual_seed(size)).to(torch.int32)[None]
            cells = [torch.full((pages, kv_heads, size, D), torch.nan) for _ in range(2)]
            for cell, rows in zip(cells, (k, v), strict=True):
                for i in range(n):
                    cell[table[0, i // size], :, i % size] = rows[i]
            for t in (table, None) if size == 64 else (table,):
                out, _ = decode_attention(q[-1:], *cells, CacheView(torch.tensor([n - 1]), t, size, n, q.dtype), None)
                assert torch.equal(out, packed[-1:].flatten(1)), (prefix, size)


def test_a_row_depends_on_neither_batch_nor_threads() -> None:
    x, A, M = normals(203, 72), normals(6, 72, seed=1), normals(1, 3, 2, 2, seed=2)
    c = Correction(A, A, M)
    whole, threads = shrink_native(x, c), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(shrink_native(x, c), whole)
    finally:
        torch.set_num_threads(threads)
    for rows in (slice(0, 1), slice(5, 8), slice(101, 203)):
        assert torch.equal(shrink_native(x[rows], c), whole[rows])


def test_the_whole_chain_is_as_exact_as_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs and the gradient of v on the built-in base, prompts shared: error against fp64 at most twice plain's, rms."""
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 40, (n,), generator=rng).tolist() for n in (17, 17, 9, 30)]
    tokens = [torch.randint(5, 40, (n,), generator=rng).tolist() for n in (22, 1, 30, 12)]
    prompts, completions = prompts + prompts, [Completion(t, [0.0] * len(t), True) for t in tokens + tokens[::-1]]
    weights = torch.randn(sum(len(c.tokens) for c in completions), generator=rng, dtype=torch.float64)

    def run(backend: str, dtype: str) -> list[torch.Tensor]:
        monkeypatch.setenv("TINYLORA_BACKEND", backend)
        adapter = Adapter(load_model("builtin", "cpu", dtype), TinyLoRAConfig(u=13, n_tie="all"))
        with torch.no_grad():
            adapter.v.copy_(0.1 * torch.arange(1, 14))
        logp, entropy = score(adapter, adapter.matrices(), prompts, completions, range(8), 1.0)
        (logp * weights.to(logp)).sum().backward()
        assert adapter.v.grad is not None
        return [logp.detach(), entropy.detach(), adapter.v.grad]

    exact, plain, native_ = run("reference", "float64"), run("reference", "float32"), run("native", "float32")
    for mine, theirs, e in zip(native_, plain, exact, strict=True):
        assert rms(mine.double() - e) <= 2 * rms(theirs.double() - e)


def test_what_they_do_not_take_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise AssertionError("a C kernel ran")

    monkeypatch.setattr(native, "call", none)
    c = Correction(normals(2, 36), normals(2, 36), normals(1, 1, 2, 2))
    shrink(normals(5, 36), c)  # no multiple of 8
    wide = Correction(normals(2, 40).double(), normals(2, 40).double(), normals(1, 1, 2, 2).double())
    shrink(normals(5, 40).double(), wide)
    with pytest.raises(AssertionError, match="a C kernel ran"):
        shrink(normals(5, 40), Correction(normals(2, 40), normals(2, 40), c.M))


SCRIPT = """
import torch
from tinylora.kernels.correction import Correction
from tinylora.kernels.shrink import shrink, shrink_ref
x = torch.randn(9, 40)
for _ in range(2):
    c = Correction(torch.randn(2, 40), torch.randn(2, 40), torch.randn(1, 1, 2, 2))
    torch.testing.assert_close(shrink(x, c), shrink_ref(x, c))
"""


def run(cache: Path, **environment: str) -> str:
    env = {**os.environ, "TINYLORA_CACHE": str(cache), **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path: Path) -> None:
    said = run(tmp_path, CC="false")
    assert said.count("no C kernels on the CPU") == 1 and "false failed" in said
    assert "tinylora" not in run(tmp_path), "a compiler that came later is used, and nothing is said"
    assert len(list(tmp_path.glob("cpu-*.so"))) == 1


def test_a_source_that_does_not_compile(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.c").write_text("int main(void) { return nothing; }")
    monkeypatch.setattr(native, "SOURCE", tmp_path / "cpu.c")
    with pytest.raises(BuildError, match="nothing"):
        native.build()
    assert not list(native.cache_dir().glob(".cpu-*"))


def test_arguments_are_counted() -> None:
    with pytest.raises(TypeError):
        native.call("shrink", 1, 2, 3)


def test_positions_that_are_missing_are_refused() -> None:
    """Rather than read beyond them: five slots, and rows padded to eight."""
    q, cells, view = (
        normals(8, 2, 32),
        normals(8, 1, 16, 32),
        CacheView(torch.zeros(5, dtype=torch.long), None, 16, 1, torch.float32),
    )
    with pytest.raises(ValueError, match="8 slots, and 5 positions"):
        decode_attention(q, cells, cells, view, None)


def test_freed_memory_is_kept() -> None:
    """After `keep_memory` a block that is freed and allocated again costs no page faults; before, all of them."""
    script = (
        "import resource, torch\n"
        "from tinylora.kernels import native\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): torch.empty(10_000_000).fill_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "before = faults(); native.keep_memory(); faults(); print(before, faults())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 100
