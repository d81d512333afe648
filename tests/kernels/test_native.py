"""The C kernels of the CPU: proven here as on first use, planted faults caught, and bits that depend on a row alone."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_csrc import planted

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Completion
from tinylora.errors import BuildError
from tinylora.files import cache_dir
from tinylora.kernels import dispatch, library, native
from tinylora.kernels.accuracy import rms
from tinylora.kernels.attention import packed_attention, packed_attention_ref
from tinylora.kernels.checks import NATIVE_CHECKS
from tinylora.kernels.correction import Correction
from tinylora.kernels.decode_attention import CacheView, decode_attention, rope_into_cache
from tinylora.kernels.packing import Packing
from tinylora.kernels.rope import Heads, _forward_op, rope_native, rope_plain
from tinylora.kernels.self_check import verdict
from tinylora.kernels.shrink import shrink, shrink_native
from tinylora.model.loader import load_model
from tinylora.rl.update import score

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(library.c_compiler() is None, reason="no C compiler")

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
    for f in (library.c_identity, native.functions):
        f.cache_clear()
    yield
    for f in (library.c_identity, native.functions):
        f.cache_clear()


@pytest.mark.parametrize("op", NATIVE_CHECKS)
def test_every_kernel_matches_its_reference(op: str) -> None:
    assert verdict(op, NATIVE_CHECKS[op], CPU, torch.float32, seed=1)["error"] is None
    assert dispatch.prove(CPU)[op, "float32"]["error"] is None, "and so a child found"


@pytest.mark.parametrize("old, new, op", FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_found(
    old: str, new: str, op: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = library.C_SOURCE.read_text()
    assert old in source
    broken = tmp_path / "cpu.c"
    broken.write_text(source.replace(old, new))
    monkeypatch.setattr(library, "C_SOURCE", broken)
    assert verdict(op, NATIVE_CHECKS[op], CPU, torch.float32, seed=1)["error"] is not None


# ---- on any shape -------------------------------------------------------------------------------------------------------

# What an entry asks for before it touches anything -> what it asks for instead.
GUARDS = [
    ("is_multiple(D, 16)", "D / 2 % 8 == 0"),
    ("is_multiple(D, 16)", "is_multiple(D, 8)"),
    ("is_multiple(heads, kv_heads)", "is_multiple(heads, 1)"),
    ("is_multiple(kv_heads, 1)", "1"),
    ("!is_count(T) || !is_multiple(threads, 1)", "!is_count(T)"),
    ("!is_count(T) || !is_multiple(threads, 1)", "!is_multiple(threads, 1)"),
    ("!is_multiple(width, 8) || !is_count(tail)", "!is_count(tail)"),
    ("!is_multiple(width, 8) || !is_count(tail)", "!is_multiple(width, 4) || !is_count(tail)"),
    ("!is_multiple(width, 8) || !is_count(tail)", "!is_multiple(width, 8)"),
    ("c->rank > MOST", "0"),
    ("!is_count(c->rank)", "0"),
    ("c->rank % c->r", "0"),
    ("stride < width + c->rank + tail", "stride < width + c->rank"),
    ("!readable(c->rank, c->factor_stride, width)", "0"),
    ("!apart(T, c->kept_stride, c->rank)", "0"),
    ("is_multiple(c->adapters, 1)", "1"),
    ("within(c->adapter, T, c->adapters)", "1"),
    ("index[i] < 0", "0"),
    ("index[i] >= end", "index[i] > end"),
    ("!takes_rows(T, width, LIMIT, 0, &c, threads) || !readable(T, stride_x, width)",
     "!takes_rows(T, width, LIMIT, 0, &c, threads)"),
    ("!readable(inner_rank, stride_b, width)", "0"),
    ("!readable(T, stride_y, width)", "0"),
    ("!is_count(inner_rank)", "0"),
    ("!readable(T, stride, (heads + 2 * kv_heads) * D)", "0"),
    ("keys && !takes_cache(&cache, T, 0)", "0"),
    ("!is_multiple(c->most, 1)", "0"),
    ("!within(c->position, slots, c->most * c->page_size)", "0"),
    ("slots <= c->pages", "1"),
    ("page >= c->pages", "page > c->pages"),
    ("page < 0", "0"),
    ("every ? 0 : last", "last"),
    ("!qkv || !readable(T, stride_x, width)", "!readable(T, stride_x, width)"),
    ("!readable(T, stride_q, D)", "0"),
    ("!readable(heads, stride_q_head, D)", "0"),
    ("!readable(kv_heads, stride_v_head, D)", "0"),
    ("!readable(T, a->stride_q, a->heads * a->D)", "0"),
    ("!readable(T, a->stride_v, a->kv_heads * a->D)", "0"),
    ("n > least(T, longest)", "n > T"),
    ("a->start[i] > T - n", "0"),
    ("a->start[i] < 0", "0"),
    ("parent >= sequences", "parent > sequences"),
    ("parent < -1", "0"),
    ("a->length[parent] > longest - n", "0"),
    ("!within(sequence, T, sequences)", "0"),
    ("!within(place + row, 1, length[sequence[row]])", "0"),
    ("!within(family, families + 1, sequences + 1)", "0"),
    ("!within(members, sequences, sequences)", "0"),
    ("p && runs && next", "1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def host_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every entry under AddressSanitizer and UBSan; its argument is the guard it runs without, 0 being none."""
    folder, source = tmp_path_factory.mktemp("host"), library.C_SOURCE.read_text()
    assert all(source.count(right) == 1 for right, _ in GUARDS), [r for r, _ in GUARDS if source.count(r) != 1]
    (folder / "cpu.c").write_text("static int fault;\n" + planted(source, dict(enumerate(GUARDS, 1))))
    flags = [*library.CC_FLAGS[1:], "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{folder}"]
    driver = Path(__file__).parents[1] / "host" / "cpu_test.c"
    command = [library.c_compiler(), *flags, str(driver), "-o", str(folder / "test"), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "test"


def run_host(program: Path, fault: int) -> tuple[int, str]:
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # threads of its own, more than there may be cores
    done = subprocess.run([program, str(fault)], capture_output=True, text=True, timeout=60, env=env)
    return done.returncode, done.stdout + done.stderr


def test_every_entry_takes_what_it_can_and_refuses_the_rest(host_test: Path) -> None:
    """3,000 shapes: no sanitizer complains, all that is promised is written, and a refused call changes nothing."""
    status, said = run_host(host_test, 0)
    assert status == 0, said
    found = {name: (int(refused), int(of)) for name, refused, of in re.findall(r"(\w+): (\d+) refused of (\d+)", said)}
    assert found.keys() == native.functions().keys() and all(50 < refused < of - 50 for refused, of in found.values()), said


@pytest.mark.parametrize("guard", range(len(GUARDS)), ids=[f"{right} -> {wrong}" for right, wrong in GUARDS])
def test_a_guard_left_out_is_found(guard: int, host_test: Path) -> None:
    status, said = run_host(host_test, guard + 1)
    assert status != 0
    print(re.findall(r"SUMMARY.*|.*runtime error.*|case.*", said))


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

    exact, plain, native_ = run("addmm", "float64"), run("addmm", "float32"), run("native", "float32")
    for mine, theirs, e in zip(native_, plain, exact, strict=True):
        assert rms(mine.double() - e) <= 2 * rms(theirs.double() - e)


def test_what_they_do_not_take_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise AssertionError("a C kernel ran")

    monkeypatch.setattr(native, "call", none)
    c = Correction(normals(2, 36), normals(2, 36), normals(1, 1, 2, 2))
    shrink(normals(5, 36), c)  # no multiple of 8
    assert not Correction(normals(4, 40), normals(4, 40), c.M).is_plain, "M has half of its segments"
    wide = Correction(normals(2, 40).double(), normals(2, 40).double(), normals(1, 1, 2, 2).double())
    shrink(normals(5, 40).double(), wide)
    with pytest.raises(AssertionError, match="a C kernel ran"):
        shrink(normals(5, 40), Correction(normals(2, 40), normals(2, 40), c.M))


@pytest.mark.parametrize("D", [1, 2, 8, 17, 24, 33, 40])
def test_heads_they_do_not_take_run_plain(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are no multiple of 16; half of 17 and of 33 is one of 8 when it is rounded down."""
    called: list[str] = []
    monkeypatch.setattr(native, "call", lambda name, *_: called.append(name))
    q, k, v = normals(5, 4, D), normals(5, 2, D, seed=1), normals(5, 2, D, seed=2)
    out = packed_attention(q, k, v, Packing([5], [], q.dtype, CPU, None))
    torch.testing.assert_close(out, packed_attention_ref(q, k, v, [5]))
    cells, view = [x.transpose(0, 1)[None].contiguous() for x in (k, v)], CacheView(torch.tensor([4]), None, 5, 5, q.dtype)
    torch.testing.assert_close(decode_attention(q[4:], *cells, view, None)[0], out[4:].flatten(1))
    assert _forward_op(normals(5, 8 * D), Heads(4, 2, D)) is rope_plain
    rope_into_cache(normals(1, 8 * D), normals(1, D), normals(1, D), Heads(4, 2, D), *cells, view)
    assert not called


def test_what_a_function_refuses_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"rope_forward of csrc/cpu.c does not take .*: T 3, heads 4, kv_heads 2, D 17, stride 136"
    ):
        rope_native(normals(3, 136), normals(3, 17), normals(3, 17), Heads(4, 2, 17))
    c = Correction(normals(2, 40), normals(2, 40), normals(3, 1, 2, 2), torch.tensor([0, 2, 3]))
    with pytest.raises(
        ValueError, match="shrink of csrc/cpu.c does not take .*an index points at nothing: T 3, width 40,.* adapters 3,"
    ):
        shrink(normals(3, 40), c)
    q, cells = normals(1, 2, 32), normals(1, 1, 16, 32)
    with pytest.raises(ValueError, match="decode_attention .* page_size 16"):
        decode_attention(q, cells, cells, CacheView(torch.tensor([16]), None, 16, 17, q.dtype), None)
    heads, one = 2**18, torch.tensor([1])
    q, k = torch.zeros(1, heads * 16), torch.zeros(1, 16)
    terms = (q, heads * 16, k, 16, k, 16, 1, one - 1, one, one - 2, one - 1, one - 1, q)
    with pytest.raises(MemoryError, match="packed_attention_forward of csrc/cpu.c got no memory: T 1, heads 262144"):
        native.call("packed_attention_forward", 1, 1, heads, 1, 16, 2**30, *terms)


SCRIPT = """
import torch
from tinylora.kernels.checks import NATIVE_CHECKS
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
    assert "plain PyTorch takes" not in run(tmp_path), "a compiler that came later is used"
    assert len(list(tmp_path.glob("cpu-*.so"))) == 1


def test_a_source_that_does_not_compile(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.c").write_text("int main(void) { return nothing; }")
    monkeypatch.setattr(library, "C_SOURCE", tmp_path / "cpu.c")
    with pytest.raises(BuildError, match="nothing"):
        library.c_library()
    assert not list(cache_dir().glob(".cpu-*"))


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
