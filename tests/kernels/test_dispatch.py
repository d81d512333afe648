"""The proof that a kernel needs before it may run: real child processes, on toy kernels that Triton interprets on a CPU."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinylora.errors import InputError
from tinylora.kernels import (
    children,
    dispatch,
    launch,  # noqa: F401  Triton must not be imported for the first time below, where the environment says "interpret"
    library,
    proof,
)
from tinylora.kernels.accuracy import relative_errors
from tinylora.kernels.dispatch import prove, runs_cuda, runs_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TOY = "toy_checks:CHECKS"


def new_process(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As a process that has proved nothing, with an empty cache and kernels that are interpreted."""
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setenv("TINYLORA_CACHE", str(folder / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TINYLORA_BACKEND", "triton")
    monkeypatch.delenv("TINYLORA_SELF_CHECK_SECONDS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    new_process(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def proved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list, str]:
    """All toy kernels checked once: verdicts, the tasks each child was given, what was said on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        new_process(patch, tmp_path_factory.mktemp("verdicts"))
        patch.setenv("TINYLORA_SELF_CHECK_SECONDS", "5")
        given, said, child = [], [], children._Child
        patch.setattr(children, "_Child", lambda *a: given.append(list(a[2])) or child(*a))
        for module in (proof, dispatch):
            patch.setattr(module, "print", lambda *a, file, flush=False: said.append(*a), raising=False)
        prove(CPU, TOY)
        prove(CPU, TOY)
        return dispatch._verdicts[CPU], given, "\n".join(said)


WRONG = {
    "inexact": r"40 numbers, output 0: relative error \d\.\de-05, allowed \d\.\de-07",
    "unwritten": "relative error inf",
    "unsteady": "two runs gave different bits",
    "misshapen": r"shape \(39,\), not \(40,\)",
    "empty": "its check has no cases",
    "hangs": "no answer within 5 s",
    "aborts": "ended by signal 6",
    "leaves": "exit status 0",
    "raises": "exit status 1: ValueError: tile too large",
}
RIGHT = ("right", "chatters", "after a hang", "last")
ONE_DTYPE = {"wide only": "float32", "half only": "float16"}  # the dtype that is right


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_kernel_fails_with_its_reason(proved, op: str) -> None:
    error = proved[0][op, "float32"]["error"]
    assert error is not None
    assert re.search(WRONG[op], error), error


@pytest.mark.parametrize("op", RIGHT)
def test_a_right_kernel_passes_whatever_came_before_it(proved, op: str) -> None:
    assert proved[0][op, "float32"]["error"] is proved[0][op, "float16"]["error"] is None
    (case,) = proved[0][op, "float32"]["cases"]
    # fp32 rounds 3 x + 1 at most twice: far below what is allowed, and not zero, or fp64 was not what it was compared with
    assert 0 < case["error"] <= 2**-23 < case["allowed"] < 1e-6 and case["same_bits"]


@pytest.mark.parametrize("op", ONE_DTYPE)
def test_a_kernel_that_is_wrong_in_one_dtype_runs_in_the_other(proved, op: str) -> None:
    """Wrong by its number or by its end: neither costs the other dtype its kernel."""
    for dtype in ("float16", "float32"):
        assert (proved[0][op, dtype]["error"] is None) == (dtype == ONE_DTYPE[op])


def test_an_op_has_a_child_of_its_own_and_another_after_one_that_ended(proved) -> None:
    ops = [*WRONG, *RIGHT, *ONE_DTYPE]
    assert proved[0].keys() == {(op, dtype) for op in ops for dtype in ("float16", "float32")}
    first, again = (
        [[(op, d) for d in dtypes] for op in of]
        for dtypes, of in (
            (("float16", "float32"), importlib.import_module("toy_checks").CHECKS),
            (("float32",), ("aborts", "leaves", "raises", "hangs", "wide only")),
        )
    )
    assert [c for c in proved[1] if len(c) == 2] == first
    assert sorted(c for c in proved[1] if len(c) == 1) == sorted(again)


def test_each_failure_is_reported_once_with_reason_and_what_to_do(proved) -> None:
    first, *said = proved[2].splitlines()
    assert first == "tinylora: matching 15 kernels against plain PyTorch on cpu, once for these versions: seconds"
    wrong = [*WRONG, *ONE_DTYPE]
    assert len(said) == len(wrong)
    for op in wrong:
        (line,) = [line for line in said if f"{op} runs as plain PyTorch" in line]
        assert "TINYLORA_BACKEND=triton cannot be honoured" in line
        assert f"python -m tinylora.kernels.self_check --device cpu --ops {op}." in line
        for dtype in ("float16", "float32"):
            error = proved[0][op, dtype]["error"]
            assert error is None or (error in line and dtype in line.split("because")[0])


def test_children_run_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As many as there are cores: two that wait for each other both pass where there are two."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("TOY_FOLDER", str(tmp_path))
    assert {v["error"] for v in prove(CPU, "toy_checks:PAIR").values()} == {None}


def test_a_verdict_is_cached_the_moment_it_is_known(tmp_path: Path) -> None:
    """The proof is killed while its last op hangs: what was known by then is not checked again."""
    code = "import torch; from tinylora.kernels import dispatch; dispatch.prove(torch.device('cpu'), 'toy_checks:KILLED')"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not any(proof._stored(f) for f in (tmp_path / "cache").glob("*.jsonl")):
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    (file,) = (tmp_path / "cache").iterdir()
    known = proof._stored(file)
    assert known and {op for op, _ in known} == {"right"} and all(v["error"] is None for v in known.values())


def test_a_child_without_memory_beside_others_runs_again_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And one that has none alone either fails, and is not cached: that says nothing about its kernel."""
    monkeypatch.setenv("TOY_FOLDER", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = prove(CPU, "toy_checks:GREEDY")
    assert found["crowded", "float16"]["error"] is found["crowded", "float32"]["error"] is None
    assert "out of memory" in found["too large", "float16"]["error"]
    (file,) = (tmp_path / "cache").iterdir()
    assert {op for op, _ in proof._stored(file)} == {"crowded"}


def no_child(*_: object) -> None:
    raise AssertionError("a child was started")


DTYPES = ("float16", "float32")


def toy_verdicts(error: str | None):
    """In the place of children: a verdict for each task they would have been given."""

    def check(device, checks, shares, found) -> None:
        for op, dtype in [task for share in shares for task in share]:
            found({"op": op, "dtype": dtype, "error": error}, True)

    return check


@pytest.fixture
def one_op(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A module of one check, in a file that may change."""
    folder = tmp_path / "module"
    folder.mkdir()
    (folder / "one_check.py").write_text("from toy_checks import case, ours\nCHECKS = {'right': case(ours)}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "one_check", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ["PYTHONPATH"]]))
    return folder / "one_check.py"


ONE = "one_check:CHECKS"


def test_the_second_process_starts_no_child(one_op: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = prove(CPU, ONE)
    assert [v["error"] for v in first.values()] == [None, None]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    dispatch._verdicts.clear()
    monkeypatch.setattr(children, "_Child", no_child)
    assert prove(CPU, ONE) == first


def test_failures_are_cached_and_reported_again_by_the_next_process(
    one_op: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proof, "check_in_children", toy_verdicts("too slow"))
    prove(CPU, ONE)
    dispatch._verdicts.clear()
    monkeypatch.setattr(proof, "check_in_children", no_child)
    assert [v["error"] for v in prove(CPU, ONE).values()] == ["too slow"] * 2
    assert capsys.readouterr().err.count("right runs as plain PyTorch on cpu") == 2


@pytest.mark.parametrize("change", ["nothing", "check", "kernel", "flag", "backend", "folder"])
def test_verdicts_are_of_these_sources_and_flags_alone(
    change: str, one_op: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels = tmp_path / "kernels"
    shutil.copytree(proof.KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(proof, "KERNELS", kernels)
    checked = []
    monkeypatch.setattr(proof, "check_in_children", lambda *a: checked.append(1) or toy_verdicts(None)(*a))
    prove(CPU, ONE)
    dispatch._verdicts.clear()
    if change == "check":
        one_op.write_text(one_op.read_text() + "\n")
    elif change == "kernel":
        (kernels / "swiglu.py").write_text((kernels / "swiglu.py").read_text() + "\n")
    elif change == "flag":
        monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    elif change == "backend":
        monkeypatch.setenv("TINYLORA_BACKEND", "padded")
    elif change == "folder":
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # says nothing about the kernels
    prove(CPU, ONE)
    assert len(checked) == (2 if change in ("check", "kernel", "flag") else 1)


@pytest.mark.parametrize("damage", [b"{", b"[]\n", b'{"op": "right"}\n', b"", b"\xff\xfe\x00"])
def test_a_broken_cache_is_checked_again_and_mended(
    damage: bytes, one_op: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checked = []
    monkeypatch.setattr(proof, "check_in_children", lambda *a: checked.append(1) or toy_verdicts(None)(*a))
    for _ in range(3):
        assert {v["error"] for v in prove(CPU, ONE).values()} == {None}
        dispatch._verdicts.clear()
        if len(checked) == 1:
            (file,) = (tmp_path / "cache").iterdir()
            file.write_bytes(damage)
    assert len(checked) == 2


def test_a_torn_last_line_costs_its_own_verdict_alone(one_op: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(proof, "check_in_children", lambda *a: asked.append(list(a[2])) or toy_verdicts(None)(*a))
    prove(CPU, ONE)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    dispatch._verdicts.clear()
    assert {v["error"] for v in prove(CPU, ONE).values()} == {None}
    assert asked == [[[("right", "float16"), ("right", "float32")]], [[("right", "float32")]]]


def test_an_unwritable_cache_costs_time_and_not_the_run(
    one_op: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(proof, "check_in_children", toy_verdicts(None))
    assert [v["error"] for v in prove(CPU, ONE).values()] == [None, None]
    assert "not cached" in capsys.readouterr().err


def gpu_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")


def rows_on(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    return SimpleNamespace(device=device, dtype=dtype)


def test_a_device_that_is_not_there_fails_every_op_and_caches_nothing(
    one_op: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu_of_a_test(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for verdict in prove(GPU, ONE).values():
        assert re.match("the check did not start: exit status 1: .*(CUDA|NVIDIA)", verdict["error"])
    assert not (tmp_path / "cache").exists()
    assert not runs_triton("right", rows_on(GPU))


def test_on_a_gpu_only_what_has_passed_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_of_a_test(monkeypatch)
    found = {(op, "bfloat16"): {"op": op, "error": error} for op, error in (("good", None), ("bad", "wrong"), ("wide", None))}
    found["wide", "float32"] = {"op": "wide", "error": "wrong"}
    asked = []
    monkeypatch.setattr(dispatch, "cached_or_checked", lambda device, checks, _: asked.append((device, checks)) or dict(found))
    for _ in range(3):
        assert runs_triton("good", rows_on(GPU))
        assert not runs_triton("bad", rows_on(GPU))
        assert not runs_triton("unknown", rows_on(GPU))
        assert not runs_triton("good", rows_on(GPU, torch.float64))
        assert runs_triton("wide", rows_on(GPU)) and not runs_triton("wide", rows_on(GPU, torch.float32))
    assert asked == [(GPU, "tinylora.kernels.checks:CHECKS")]
    said = capsys.readouterr().err
    assert [said.count(f"{op} runs as plain PyTorch on cuda:0") for op in ("good", "bad", "unknown")] == [0, 1, 1]
    runs_triton("good", rows_on(torch.device("cuda", 1)))
    monkeypatch.setenv("TINYLORA_BACKEND", "padded")
    assert runs_triton("good", rows_on(GPU))
    assert len(asked) == 2  # another device needs its own proof, another backend does not
    monkeypatch.setenv("TINYLORA_BACKEND", "addmm")
    assert not runs_triton("good", rows_on(GPU)) and prove(GPU) == {}
    assert len(asked) == 2


def test_a_capture_finds_verdicts_or_an_error_never_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of_a_test(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dispatch, "cached_or_checked", no_child)
    with pytest.raises(RuntimeError, match="swiglu is being captured .* call dispatch.prove"):
        runs_triton("swiglu", rows_on(GPU))
    dispatch._verdicts[GPU] = {("swiglu", "bfloat16"): {"op": "swiglu", "error": None}}
    assert runs_triton("swiglu", rows_on(GPU))


@pytest.mark.parametrize(
    ("interpreted", "name", "runs"),
    [("1", "triton", True), ("1", "padded", True), ("1", "addmm", False), ("1", "", False), ("0", "triton", False)],
)
def test_a_cpu_runs_kernels_interpreted_where_both_are_asked_for(
    interpreted: str, name: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setenv("TINYLORA_BACKEND", name)
    monkeypatch.setattr(children, "_Child", no_child)
    assert runs_triton("swiglu", torch.zeros(1)) == runs
    assert not runs_triton("swiglu", torch.zeros(1, device="meta"))


def test_settings_that_are_nonsense_are_input_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("TINYLORA_SELF_CHECK_SECONDS", value)
        with pytest.raises(InputError, match=f"TINYLORA_SELF_CHECK_SECONDS={value}"):
            prove(CPU, TOY)
    monkeypatch.setenv("TINYLORA_BACKEND", "trition")
    with pytest.raises(InputError, match="trition: choose one of"):
        dispatch.backend("cuda")
    monkeypatch.setenv("TINYLORA_BACKEND", "native")
    assert dispatch.backend("cpu") == "native"
    with pytest.raises(InputError, match="native: these kernels are a CPU's"):
        dispatch.backend("cuda")


def test_a_child_without_a_parent_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own alarm: a hung kernel would keep a GPU for ever once the parent has been killed."""
    monkeypatch.setenv("TINYLORA_SELF_CHECK_SECONDS", "1")
    code = "from tinylora.kernels import self_check; self_check.GRACE = 1; self_check.main()"
    command = [sys.executable, "-c", code, "--device", "cpu", "--checks", "toy_checks:ASLEEP"]
    began = time.monotonic()
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == -14 and json.loads(child.stdout) == {"op": "start"}
    assert time.monotonic() - began < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_allowance_is_twice_plain_and_one_rounding_of_fp32(dtype: torch.dtype) -> None:
    """ours 1 + a, plain 1 + b, exact 1: passes up to a = 2 b + 2^-23, whatever the dtype, and not above."""
    one, eps = torch.ones(64, dtype=torch.float64), torch.finfo(dtype).eps
    plain, most = (one * (1 + 8 * eps)).to(dtype), 16 * eps + 2**-23
    for a, passes in ((16 * eps, True), (18 * eps, False)):
        mine, theirs, allowed = relative_errors((one * (1 + a)).to(dtype), plain, one)
        assert (mine <= allowed) == passes and theirs == 8 * eps and allowed == most
    wrong = torch.arange(64)
    assert relative_errors(wrong, wrong, wrong)[0] == 0
    assert relative_errors(wrong, wrong, wrong.clamp(max=62))[0] == 1 / 64


def test_the_cuda_backend_asks_for_a_library_and_its_proof(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled first, then proven like any kernel; what fails is named once, and the Triton kernels run on."""
    gpu_of_a_test(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TINYLORA_BACKEND", "cuda")
    asked, compiled, error = [], [], None

    def checked(_: torch.device, checks: str, watch: object) -> dict[str, dict]:
        asked.append(checks)
        op = "decode_linear" if checks == dispatch.CUDA_CHECKS else "swiglu"
        return {(op, "bfloat16"): {"op": op, "error": error}}

    monkeypatch.setattr(dispatch, "cached_or_checked", checked)
    monkeypatch.setattr(library, "cuda_library", lambda architectures: compiled.append(architectures))
    for _ in range(2):
        assert runs_cuda("decode_linear", rows_on(GPU)) and runs_triton("swiglu", rows_on(GPU))
    assert asked == [dispatch.CHECKS, dispatch.CUDA_CHECKS] and compiled == [["sm_90a"]]
    assert not runs_cuda("decode_linear", rows_on(CPU))
    monkeypatch.setenv("TINYLORA_BACKEND", "padded")
    assert not runs_cuda("decode_linear", rows_on(GPU))

    monkeypatch.setenv("TINYLORA_BACKEND", "cuda")
    dispatch._verdicts.clear()
    error = "wrong"
    assert not runs_cuda("decode_linear", rows_on(GPU)) and not runs_cuda("decode_linear", rows_on(GPU))
    said = capsys.readouterr().err
    assert said.count("decode_linear runs as the padded product and its row kernels on cuda:0") == 1
    assert f"--checks {dispatch.CUDA_CHECKS} --ops decode_linear" in said


@pytest.mark.parametrize("first", ["padded", "cuda"])
def test_the_cuda_backend_without_a_compiler(
    first: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_of_a_test(monkeypatch)
    monkeypatch.setenv("TINYLORA_BACKEND", first)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(dispatch, "cached_or_checked", lambda *_: {("swiglu", "bfloat16"): {"op": "swiglu", "error": None}})
    prove(GPU)  # as a run in the same process that asked for something else
    monkeypatch.setenv("TINYLORA_BACKEND", "cuda")
    for _ in range(3):
        assert runs_triton("swiglu", rows_on(GPU)) and not runs_cuda("decode_linear", rows_on(GPU))
    said = capsys.readouterr().err
    assert said.count("decode_linear runs as the padded product") == said.count("tinylora:") == 1
    assert "it was not compiled: no nvcc on PATH" in said


def test_an_unproven_cuda_kernel_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of_a_test(monkeypatch)
    monkeypatch.setenv("TINYLORA_BACKEND", "cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dispatch, "cached_or_checked", no_child)
    dispatch._verdicts[GPU] = {("swiglu", "bfloat16"): {"op": "swiglu", "error": None}}
    with pytest.raises(RuntimeError, match="decode_linear is being captured .* call dispatch.prove"):
        runs_cuda("decode_linear", rows_on(GPU))


def test_a_cuda_verdict_is_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of_a_test(monkeypatch)
    names = iter(["csrc-a.so", "csrc-b.so"])
    monkeypatch.setattr(library, "cuda_library", lambda _: Path(next(names)))
    one, two = (proof._conditions(GPU, dispatch.CUDA_CHECKS) for _ in range(2))
    assert one.pop("library") != two.pop("library") and one == two
