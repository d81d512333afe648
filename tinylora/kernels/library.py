"""A file of csrc/, compiled once: cpu.c by the machine's own C compiler, the CUDA C++ by nvcc.

Nothing is compiled on `pip install`. The C takes seconds, on its first use. The CUDA C++ takes up to a minute:
TINYLORA_BACKEND=cuda compiles for the GPU that is there before its first use; `python -m tinylora.kernels.build` does so
beforehand. What comes out is kept in the cache, under a hash of source, flags, compiler and processor or PyTorch; it appears
whole or not at all. Of several processes one runs nvcc while the others wait.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tinylora.errors import BuildError
from tinylora.files import cache_dir, write_text

SOURCES = Path(__file__).parent.parent / "csrc"  # a link to csrc/ in a checkout, a folder in an installed package
C_SOURCE = SOURCES / "cpu.c"
# Vectors are written out. Left to the compiler, a loop has several paths, and a row's bits may depend on which it takes.
CC_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-tree-vectorize", "-fno-math-errno", "-fopenmp", "-fPIC")
TORCH = Path(torch.__file__).parent
HEADERS = TORCH / "include"
OLDEST = (12, 8)  # the first nvcc that compiles for Blackwell
NVCC_FLAGS = ("-O3", "--threads=0", "-std=c++17", "-shared", "-Xcompiler=-fPIC,-Wall", "-Werror=all-warnings", "-Xptxas=-v")
STABLE = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")  # 2.11: what is built serves it and later versions


def c_compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")


@cache
def c_identity() -> str:
    """What the library of cpu.c depends on, as a hash: also the processor, for which it is compiled."""
    cc = c_compiler()
    version = subprocess.run([cc, "--version"], capture_output=True, text=True).stdout if cc else ""
    info = Path("/proc/cpuinfo")
    about = re.search(r"^(flags|Features).*$", info.read_text(), re.MULTILINE) if info.exists() else None
    parts = (C_SOURCE.read_text(), *CC_FLAGS, version, platform.machine(), about[0] if about else "")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def c_library() -> Path:
    """The library of cpu.c, from the cache or from the compiler. BuildError, in one line, where it cannot be had."""
    cc, path = c_compiler(), cache_dir() / f"cpu-{c_identity()}.so"
    if path.exists():
        return path
    if cc is None:
        raise BuildError("no C compiler: neither CC nor cc, gcc or clang")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".cpu-") as folder:
            object_, library = Path(folder) / "cpu.o", Path(folder) / "cpu.so"
            # In two steps: the second without -fopenmp, or a second runtime would be loaded.
            for command in (
                [cc, *CC_FLAGS, "-c", str(C_SOURCE), "-o", str(object_)],
                [cc, "-shared", str(object_), "-o", str(library)],
            ):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    said = next(
                        (line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}"
                    )
                    raise BuildError(f"{cc} failed: {said.strip()[:200]}")
            os.replace(library, path)
    except OSError as error:
        raise BuildError(f"{cc} cannot be run, or the cache not written: {error}") from None
    return path


def openmp() -> str:
    """The OpenMP runtime that PyTorch has loaded, whose threads cpu.c shares. BuildError where there is none."""
    maps = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
    loaded = [line.split()[-1] for line in maps if re.search("lib[gi]omp", line)]
    if not loaded:
        raise BuildError("this PyTorch has loaded no OpenMP runtime")
    return loaded[0]


def architecture(device: torch.device) -> str:
    """Of a CUDA device, as nvcc names it."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def find_nvcc() -> tuple[str, str]:
    """The compiler's path and its version."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise BuildError(f"no nvcc {f'in CUDA_HOME={home}' if home else 'on PATH, and CUDA_HOME is not set'}")
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from None
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise BuildError(f"{nvcc} --version names no release")
    version = int(found[1]), int(found[2])
    if version < OLDEST:
        raise BuildError(f"{nvcc} is of CUDA {found[1]}.{found[2]}; {OLDEST[0]}.{OLDEST[1]} or later is needed")
    return nvcc, f"{found[1]}.{found[2]}"


def _command(nvcc: str, architectures: Sequence[str]) -> list[str]:
    codes = [f"-gencode=arch=compute_{a.removeprefix('sm_')},code={a}" for a in architectures]
    # By way of libtorch.so, which needs whatever this PyTorch has: with CUDA the stream's function is then found, without not.
    torch_ = [f"-isystem={HEADERS}", f"-L{TORCH / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch"]
    return [nvcc, *NVCC_FLAGS, *STABLE, *codes, *torch_, str(SOURCES / "registration.cu")]


def resources(log: str) -> list[dict[str, Any]]:
    """What `ptxas -v` says of every kernel: name, architecture, registers, and bytes of stack and spills."""
    found = []
    for entry in log.split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(\w+)' for '(\w+)'", entry).groups()  # type: ignore[union-attr]
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        if numbers is None or registers is None:
            raise BuildError(f"ptxas says nothing of {name} that could be read")
        stack, stores, loads = map(int, numbers.groups())
        found.append({"kernel": name, "arch": arch, "registers": int(registers[1]), "stack": stack, "spills": stores + loads})
    return found


def cuda_library(architectures: Sequence[str]) -> Path:
    """The library of the CUDA C++ for these architectures, from the cache or from nvcc, which takes up to a minute.

    BuildError, in one line, where it cannot be had.
    """
    if not (SOURCES / "registration.cu").exists():
        raise BuildError(f"this installation lacks {SOURCES}")
    if not (HEADERS / "torch" / "csrc" / "stable" / "library.h").exists():
        raise BuildError(f"this PyTorch lacks its headers, {HEADERS / 'torch' / 'csrc' / 'stable'}")
    nvcc, version = find_nvcc()
    command = _command(nvcc, architectures)
    key = hashlib.sha256(json.dumps([command[1:], version, torch.__version__]).encode())
    for file in sorted(f for f in SOURCES.glob("*") if f.suffix != ".c"):
        key.update(file.name.encode() + b"\0" + file.read_bytes())
    path = cache_dir() / f"csrc-{'-'.join(architectures)}-{key.hexdigest()[:16]}.so"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"another process compiles {path.name}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _whole(path):
                _compile(command, version, path)
    except OSError as error:
        raise BuildError(f"the cache cannot be written: {error}") from None
    return path


def _say(line: str) -> None:
    print(f"tinylora: {line}", file=sys.stderr, flush=True)


def load_cuda(device: torch.device) -> None:
    """Load the library for a device into this process, where its operators register themselves. BuildError where it cannot."""
    path = cuda_library([architecture(device)])
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BuildError(f"{path} does not load: {error.__cause__ or error}") from None


def record(path: Path) -> dict[str, Any]:
    """What is kept beside a library: "sha256" of it, the "kernels" as ptxas reports them, "seconds"."""
    kept: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return kept


def _whole(path: Path) -> bool:
    """Whether the library is there as it was written: loading a truncated one would kill the process."""
    if not path.exists():
        return False
    try:
        if record(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest():
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    _say(f"{path} is broken and is compiled again")
    return False


def _compile(command: list[str], version: str, path: Path) -> None:
    _say(f"compiling {path.name} with nvcc {version}, once; up to a minute")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".csrc-") as folder:
        partial = Path(folder) / "library.so"
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        log = done.stdout + done.stderr
        if done.returncode or not partial.exists():
            kept = path.with_suffix(".log")
            write_text(kept, log)
            first = next(
                (line for line in log.splitlines() if "error" in line or "fatal" in line), f"exit status {done.returncode}"
            )
            raise BuildError(f"nvcc failed: {first.strip()[:200]} (all of it: {kept})")
        kernels, seconds = resources(log), time.monotonic() - began
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        # The record first: a kill between the two leaves a library that does not match, which is compiled again.
        write_text(path.with_suffix(".json"), json.dumps({"sha256": digest, "kernels": kernels, "seconds": seconds}, indent=1))
        os.replace(partial, path)
    _say(f"compiled in {seconds:.0f} s: {path}")
