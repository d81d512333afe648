"""The CUDA C++ kernels without a GPU: what nvcc makes of them, their arithmetic on a host, and every way not to get them."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from aot import cuobjdump
from torch._subclasses.fake_tensor import FakeTensorMode

from tinylora.errors import BuildError, InputError
from tinylora.files import cache_dir
from tinylora.kernels import build, decode_linear
from tinylora.kernels import library as library_module
from tinylora.kernels.correction import Correction
from tinylora.kernels.frozen import FrozenLinear

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# The PyTorch that is not installed, of the oldest and the newest that pyproject.toml admits, and where its headers are looked
# for: a folder that holds torch/csrc, or "fetch": what was fetched before, or else 500 MB, once.
OTHER = "2.13.0" if torch.__version__.startswith("2.11.") else "2.11.0"
WHERE = os.environ.get("TINYLORA_TORCH_HEADERS")
KEPT = cache_dir() / f"torch-{OTHER}-headers"  # in the user's own cache; tests have another

# ---- compiled -----------------------------------------------------------------------------------------------------------


def compiled(headers: Path, cache: Path) -> Path:
    """The library for all architectures, warnings being errors. Skips, visibly, where there is no nvcc that could."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLORA_CACHE", str(cache))
        patch.setattr(library_module, "HEADERS", headers)
        try:
            library_module.find_nvcc()
        except BuildError as error:
            pytest.skip(f"csrc/ is not compiled: {error}")
        return library_module.cuda_library(ARCHITECTURES)


def fetch_headers() -> None:
    """Headers of the other PyTorch into KEPT, out of its wheel, a CPU's or a GPU's, which is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, f"torch=={OTHER}"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=KEPT.parent, prefix=".headers-") as partial,
            zipfile.ZipFile(next(Path(folder).glob("torch-*.whl"))) as wheel,
        ):
            wheel.extractall(partial, [name for name in wheel.namelist() if name.startswith("torch/include/")])
            os.replace(Path(partial) / "torch" / "include", KEPT)


def other_headers() -> Path:
    """Where the other PyTorch's headers are. Skips, and says why, where they cannot be had or nobody asked for them."""
    if WHERE not in (None, "", "fetch"):
        return Path(WHERE)
    why = "set TINYLORA_TORCH_HEADERS to its include folder, or to fetch (500 MB, once)"
    if not KEPT.exists() and WHERE == "fetch":
        try:
            fetch_headers()
        except subprocess.CalledProcessError as error:
            why = next((line for line in error.stderr.splitlines() if line.startswith("ERROR")), error.stderr.strip()[-200:])
        except (OSError, StopIteration, subprocess.TimeoutExpired, zipfile.BadZipFile) as error:
            why = repr(error)
    if not KEPT.exists():
        pytest.skip(f"no headers of PyTorch {OTHER}: {why}")
    return KEPT


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(library_module.HEADERS, tmp_path_factory.mktemp("csrc"))


@pytest.fixture(scope="module")
def other_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same against the other PyTorch's headers, which must be that one's."""
    headers = other_headers()
    text = (headers / "torch" / "headeronly" / "version.h").read_text()
    version = ".".join(re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text))
    assert version == OTHER, f"{headers} has the headers of PyTorch {version}"
    return compiled(headers, tmp_path_factory.mktemp("other"))


@pytest.mark.parametrize("which", ["library", "other_library"], ids=["these headers", f"headers of {OTHER}"])
def test_every_kernel_is_within_its_budget(which: str, request: pytest.FixtureRequest) -> None:
    """Instances for each dtype, number of n8 tiles and height of W's; no stack, no spills, by ptxas."""
    kernels = library_module.record(request.getfixturevalue(which))["kernels"]
    found = set()
    for k in kernels:
        name = "decode_linear" if "decode_linear" in k["kernel"] else "decode_combine"
        print(f"{k['arch']:8} {k['registers']:>3} registers {k['kernel']}")
        assert k["stack"] == k["spills"] == 0, k
        assert k["registers"] <= decode_linear.BUDGET[name], k
        found.add((k["arch"], re.sub(r"EEvNS.*|^_ZN8tinylora\d+", "", k["kernel"])))
    types = ("6__half", "13__nv_bfloat16")
    tiles = [f"decode_linearI{t}Li{nt}ELi{mt}E" for t in types for nt in (1, 2, 4, 8) for mt in (1, 2)]
    assert found == {(a, k) for a in ARCHITECTURES for k in [*tiles, *(f"decode_combineI{t}" for t in types)]}


def test_sass_has_the_instructions_meant(library: Path) -> None:
    """Tensor cores, asynchronous copies and matrix loads in every tile; local memory nowhere."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    here = arch = ""
    for line in cuobjdump("-sass", library).splitlines():
        if found := re.match(r"\s*arch = (\w+)|\s*Function : (\w+)", line):
            arch, here = (found[1], here) if found[1] else (arch, found[2])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line):
            counts.setdefault((arch, here), Counter())[found[1]] += 1
    assert len(counts) == len(ARCHITECTURES) * 18
    for (arch, kernel), opcodes in counts.items():
        assert opcodes["LDL"] == opcodes["STL"] == 0, (arch, kernel)
        if tile := re.search(r"decode_linearI.*Li(\d)ELi(\d)E", kernel):
            nt, mt = int(tile[1]), int(tile[2])
            print(arch, kernel, {name: opcodes[name] for name in ("HMMA", "LDGSTS", "LDSM", "BAR")}, opcodes.total())
            # a stage is four steps of K, each multiplying mt m16 tiles of W and, in one warp, A with nt n8 tiles
            assert opcodes["HMMA"] == 4 * nt * (mt + 1) and opcodes["LDSM"] >= 4 * (mt + 1), (arch, kernel, opcodes)
            # a stage's rows, sixteen by an instruction: three times ahead of the loop at least, and once in it
            assert opcodes["LDGSTS"] >= 2 * -(-(64 * mt + 16 + 8 * nt) // 16), (arch, kernel, opcodes)


def test_the_library_loads_without_cuda(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU build of PyTorch: its schema, its shapes for torch.compile and CUDA graphs, and no kernel for a CPU."""
    monkeypatch.setattr(library_module, "architecture", lambda _: "sm_90a")
    monkeypatch.setattr(library_module, "cuda_library", lambda architectures: library if architectures == ["sm_90a"] else None)
    x, w, c = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (5, 48, 2))
    c = Correction(c, torch.empty(2, 48, dtype=x.dtype, device="meta"), torch.empty(1, 1, 2, 2, device="meta"))
    for swiglu, columns in ((False, 48), (True, 24)):
        y = decode_linear.decode_linear_cuda(x, FrozenLinear(w), c, None, swiglu)  # loads it
        assert (y.shape, y.dtype, y.device) == ((5, columns), x.dtype, x.device)
    op = torch.ops.tinylora.decode_linear
    assert str(op.default._schema) == (
        "tinylora::decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? A, Tensor? Bt, Tensor? M, "
        "Tensor? row_adapter, Tensor? residual, bool swiglu) -> Tensor"
    )
    with FakeTensorMode():
        x = torch.empty(5, 64, dtype=torch.bfloat16)
        assert op(x, torch.empty(48, 64), None, None, None, None, None, None, True).shape == (5, 24)
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        op(torch.zeros(1, 8), torch.zeros(8, 8), None, None, None, None, None, None, False)
    compiled = torch.compile(lambda x: op(x, x, None, None, None, None, None, None, False) + 1, backend="eager", fullgraph=True)
    assert compiled(torch.empty(8, 8, device="meta")).shape == (8, 8)


# ---- on a host ----------------------------------------------------------------------------------------------------------

# What is planted, one at a time: in which file, in place of what. Every one must be found, by a wrong number, a bank conflict
# or a sanitizer. Barriers are not among them: a host runs a block's threads one after another.
FAULTS = {
    "a split beyond the end": (
        "plan",
        "static_cast<int>(static_cast<long long>(k_blocks(s)) * split / splits)",
        "ceil_div(k_blocks(s), splits) * split",
    ),
    "a row too many for its tiles": ("plan", "8 * nt < rows", "8 * nt + 1 < rows"),
    "one tile of W too few": ("plan", "ceil_div(s.n, 64 * mt)", "s.n / (64 * mt)"),
    "a tile that does not fit": ("plan", "shared_bytes(mt, p.nt) > d.shared_per_block", "false"),
    "splits by the number of rows": ("plan", "middle.rows = 16", "middle.rows = s.rows"),
    "faster than the memory": ("plan", "most < d.bytes_per_ns ? most : d.bytes_per_ns", "most"),
    "no swizzle": ("tile", "c ^ (row % kChunks)", "c"),
    "a swizzle of every second row": ("tile", "c ^ (row % kChunks)", "c ^ (row / 2 % kChunks)"),
    "a swizzle that is no permutation": ("tile", "c ^ (row % kChunks)", "c | (row % kChunks)"),
    "a row beyond W": ("tile", "n < s.n ? n : -1", "n <= s.n ? n : -1"),
    "a column beyond gate": ("tile", "column < half", "column <= half"),
    "gate and up in other columns": ("tile", "n / 16 * 8 + n % 8", "n / 16 * 8 + n % 16"),
    "gate for up": ("tile", "n % 16 < 8 ? 0 : half", "n % 16 < 8 ? half : 0"),
    "a row beyond A": ("tile", "row - a_begin(mt) < s.rank", "row - a_begin(mt) <= s.rank"),
    "a row beyond x": ("tile", "row - x_begin(mt) < s.rows", "row - x_begin(mt) <= s.rows"),
    "the pad beside K": ("tile", "left < kChunk ? left : kChunk", "kChunk"),
    "a chunk beyond K": ("tile", "left < 0 ? 0 : left < kChunk ? left : kChunk", "left < kChunk && left > 0 ? left : kChunk"),
    "chunks that overlap": ("tile", "block * kBlockK + c * kChunk", "block * kBlockK + c"),
    "rows twice": ("tile", "first + thread / kChunks", "first + thread / kChunks / 2"),
    "a wait too short": ("tile", "machine.template wait<kStages - 2>()", "machine.template wait<kStages - 1>()"),
    "a copy into the wrong stage": ("tile", "(next - first) % kStages", "(next - first + 1) % kStages"),
    "a copy too far ahead": ("tile", "block + kStages - 1", "block + kStages"),
    "the wrong stage multiplied": ("tile", "(block - first) % kStages", "block % kStages"),
    "a lane's wrong row of W": ("tile", "row + lane % 16", "row + lane % 8"),
    "a lane's wrong k of W": ("tile", "2 * step + lane / 16", "2 * step + lane / 8 % 2"),
    "a lane's wrong row of x": ("tile", "row + lane / 16 * 8 + lane % 8", "row + lane / 8 % 2 * 8 + lane % 8"),
    "a lane's wrong k of x": ("tile", "2 * step + lane / 8 % 2", "step + lane / 8 % 2"),
    "an accumulator's wrong place": ("tile", "lane / 4 + c / 2 * 8", "lane / 4 + c % 2 * 8"),
    "an accumulator's wrong row": ("tile", "lane % 4 * 2 + c % 2", "lane % 4 + c % 2 * 4"),
    "M transposed": ("tile", "row[j]", "row[(segment + j - i) * s.r + i - segment]"),
    "another segment's t": ("tile", "t(segment + j)", "t(j)"),
    "another row's adapter": ("tile", "p.adapter ? p.adapter[row] : 0", "p.adapter ? p.adapter[0] : 0"),
    "one warp's part of t": (
        "tile",
        "t += put[(warp * kRank + i) * 8 * NT + row]",
        "t = put[(warp * kRank + i) * 8 * NT + row]",
    ),
    "t of another split": ("tile", "(static_cast<int64_t>(split) * s.rows + row) * kRank + i", "row * kRank + i"),
    "bias in every split": ("tile", "p.splits == 1 ? bias_of(p, n[half]) : 0.0f", "bias_of(p, n[half])"),
    "z without its last": ("tile", "p.splits == 1 && i < s.rank", "p.splits == 1 && i < s.rank - 1"),
    "rows beyond T stored": ("tile", "row >= s.rows || column < 0", "column < 0"),
    "columns beyond N stored": ("tile", "row >= s.rows || column < 0", "row >= s.rows"),
    "columns beyond N combined": ("tile", "column >= columns", "column > columns"),
    "up through silu": ("tile", "silu(gate) * up", "silu(up) * gate"),
    "residual at y's stride": ("tile", "row * p.ldr + n", "row * p.shape.n + n"),
    "partial sums in another order": ("tile", "first[split * stride]", "first[(splits - 1 - split) * stride]"),
    "a split left out": ("tile", "split < splits", "split < splits - 1"),
    "t's wrong stride": ("tile", "static_cast<int64_t>(s.rows) * kRank", "static_cast<int64_t>(s.rows) * s.rank"),
    "up beside its column": ("tile", "column + columns", "column + columns - 1"),
}


def planted(text: str, faults: dict[int, tuple[str, str]]) -> str:
    """C++ with `right` as (fault == number ? wrong : right), also where one lies within another."""
    here = [right for right, _ in faults.values() if right in text]
    if not here:
        return text
    longest = max(here, key=len)
    assert text.count(longest) == 1, longest
    others = {n: f for n, f in faults.items() if f[0] != longest}
    before, after = text.split(longest)
    both = planted(longest, others)
    for number, (right, wrong) in faults.items():
        if right == longest:
            both = f"(fault == {number} ? ({wrong}) : ({both}))"
    return planted(before, others) + both + planted(after, others)


@pytest.fixture(scope="module")
def host_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host test under AddressSanitizer and UBSan; its argument is the fault it runs with, 0 being none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ for the host test")
    folder = tmp_path_factory.mktemp("host")
    for name in ("plan", "tile"):
        source = re.sub(r"//.*", "", (library_module.SOURCES / f"decode_{name}.h").read_text())
        of_it = {i: (right, wrong) for i, (where, right, wrong) in enumerate(FAULTS.values(), 1) if where == name}
        assert all(source.count(right) == 1 for right, _ in of_it.values()), [
            r for r, _ in of_it.values() if source.count(r) != 1
        ]
        lead = "#pragma once\ninline int fault = 0;\n" if name == "plan" else ""
        (folder / f"decode_{name}.h").write_text(lead + planted(source, of_it))
    flags = [
        "-std=c++17",
        "-O1",
        "-g1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    source = ROOT / "tests" / "host" / "decode_linear_test.cpp"
    subprocess.run([compiler, *flags, "-DTL_FAULTS", f"-I{folder}", str(source), "-o", folder / "test"], check=True)
    return folder / "test"


def run_host(program: Path, fault: int) -> tuple[int, str]:
    done = subprocess.run([program, str(fault)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_every_thread_of_every_block_on_a_host(host_test: Path) -> None:
    status, said = run_host(host_test, 0)
    print(said)
    assert status == 0, said
    assert "16 classes of plans" in said


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, host_test: Path) -> None:
    status, said = run_host(host_test, list(FAULTS).index(fault) + 1)
    assert status != 0, fault
    print(said.splitlines()[-1] if "Sanitizer" not in said else re.findall(r"SUMMARY.*|.*runtime error.*", said)[0])


# ---- every way not to get it --------------------------------------------------------------------------------------------

# An nvcc of a test: says its version, then does as told. It compiles nothing.
FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.1"; exit; fi
echo compiled >> "{folder}/runs"
{does}
"""
COMPILES = """sleep {seconds}
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "a library" > "$2"; shift; done
echo "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'"
echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
echo "ptxas info    : Used 40 registers, used 1 barriers"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """compiler(does, version): an nvcc that does so, alone on PATH but for the shell's tools, and an empty cache."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_HOME", raising=False)

    def make(does: str = COMPILES.format(seconds=0), version: str = "13.0") -> Path:
        file = tmp_path / "bin" / "nvcc"
        file.parent.mkdir(exist_ok=True)
        file.write_text(FAKE.format(version=version, folder=tmp_path, does=does))
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")
        return tmp_path / "runs"

    return make


def refused(match: str) -> None:
    with pytest.raises(BuildError, match=match) as error:
        library_module.cuda_library(["sm_90a"])
    assert "\n" not in str(error.value)


def test_no_compiler_an_old_one_and_a_strange_one(compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = compiler(version="12.4")
    refused("nvcc is of CUDA 12.4; 12.8 or later is needed")
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho hello")
    refused("nvcc --version names no release")
    (tmp_path / "bin" / "nvcc").write_text("not a program")
    refused("nvcc does not run: .*Exec format error")
    monkeypatch.setenv("PATH", "")
    refused("no nvcc on PATH, and CUDA_HOME is not set")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    refused("nvcc does not run")  # the one in CUDA_HOME comes first
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    refused("no nvcc in CUDA_HOME=.*elsewhere")
    assert not runs.exists() and not (tmp_path / "cache").exists()


def test_a_failed_compile_says_why_and_leaves_no_library(compiler, tmp_path: Path) -> None:
    compiler('echo "csrc/x.cu(3): note" >&2; echo "csrc/x.cu(3): error: expected a \\";\\"" >&2; exit 2')
    refused(r'nvcc failed: csrc/x.cu\(3\): error: expected a ";" \(all of it: .*\.log\)')
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".log", ".lock"}
    compiler("exit 0")  # and writes nothing
    refused("nvcc failed: exit status 0")
    compiler(COMPILES.format(seconds=0).replace("0 bytes stack frame, ", ""))
    refused("ptxas says nothing of _Z1kv that could be read")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_sources_headers_and_cache_that_are_not_there(compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler()
    with monkeypatch.context() as patch:
        patch.setattr(library_module, "SOURCES", tmp_path / "none")
        refused("this installation lacks .*none")
    with monkeypatch.context() as patch:
        patch.setattr(library_module, "HEADERS", tmp_path)
        refused("this PyTorch lacks its headers, .*stable")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file" / "cache"))
    refused("the cache cannot be written: .*Not a directory")


@pytest.mark.parametrize("change", ["nothing", "source", "compiler", "torch", "architecture"])
def test_it_is_compiled_once_for_what_it_depends_on(
    change: str, compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = compiler()
    shutil.copytree(library_module.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(library_module, "SOURCES", tmp_path / "csrc")
    first = library_module.cuda_library(["sm_90a"])
    assert library_module.record(first)["kernels"] == [
        {"kernel": "_Z1kv", "arch": "sm_90a", "registers": 40, "stack": 0, "spills": 0}
    ]
    if change == "source":
        with open(tmp_path / "csrc" / "decode_tile.h", "a") as file:
            file.write("\n")
    elif change == "compiler":
        compiler(version="13.1")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    second = library_module.cuda_library(["sm_80" if change == "architecture" else "sm_90a"])
    assert (second == first) == (change == "nothing")
    assert len(runs.read_text().split()) == (1 if change == "nothing" else 2)


@pytest.mark.parametrize("damage", ["library", "empty library", "record", "record alone"])
def test_a_broken_cache_is_compiled_again(damage: str, compiler, capsys: pytest.CaptureFixture[str]) -> None:
    runs = compiler()
    path = library_module.cuda_library(["sm_90a"])
    capsys.readouterr()
    if damage == "record alone":
        path.unlink()
    else:
        file = path if "library" in damage else path.with_suffix(".json")
        file.write_bytes(b"" if damage == "empty library" else file.read_bytes()[:-1])
    assert library_module.cuda_library(["sm_90a"]) == path and path.read_text() == "a library\n"
    assert len(runs.read_text().split()) == 2
    assert ("is broken and is compiled again" in capsys.readouterr().err) == (damage != "record alone")


def test_of_two_processes_one_compiles_and_both_have_it(compiler) -> None:
    runs = compiler(COMPILES.format(seconds=6))
    command = [sys.executable, "-m", "tinylora.kernels.build", "--arch", "sm_90a"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert len(runs.read_text().split()) == 1
    assert said[0][0] == said[1][0] and said[0][0].splitlines()[-1].endswith(".so")
    assert sorted("waiting for it" in err for _, err in said) == [False, True], said


def test_the_command(compiler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler()
    for arch in ("sm90", "hopper", "sm_90x"):
        with pytest.raises(InputError, match=f"--arch {arch}: name architectures as nvcc does"):
            build.main(["--arch", arch])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="there is no GPU to compile for"):
        build.main([])
    assert build.main(["--arch", "sm_90a"]) == 0
    assert "sm_90a   registers  40 stack   0 spills   0 _Z1kv" in capsys.readouterr().out
    monkeypatch.setenv("PATH", "")
    assert build.main(["--arch", "sm_90a"]) == 1
    assert capsys.readouterr().err == "tinylora: nothing was compiled: no nvcc on PATH, and CUDA_HOME is not set\n"
