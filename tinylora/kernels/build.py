"""Compile the CUDA C++ kernels of csrc/ beforehand: python -m tinylora.kernels.build

For the GPU that is there, or for others by --arch. TINYLORA_BACKEND=cuda does so before its first use.
"""

import argparse
import re
import sys

import torch

from tinylora.cli import run_command
from tinylora.errors import BuildError, InputError
from tinylora.kernels.library import architecture, cuda_library, record


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=[], help="sm_80, sm_90a, sm_100 ...; default: of the GPU that is there")
    options = parser.parse_args(arguments)
    for arch in options.arch:
        if not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
            raise InputError(f"--arch {arch}: name architectures as nvcc does, for example --arch sm_90a")
    if not options.arch and not torch.cuda.is_available():
        raise InputError("there is no GPU to compile for; name architectures, for example --arch sm_90a")
    try:
        path = cuda_library(options.arch or [architecture(torch.device("cuda"))])
    except BuildError as error:
        print(f"tinylora: nothing was compiled: {error}", file=sys.stderr)
        return 1
    for k in record(path)["kernels"]:
        print(f"{k['arch']:8} registers {k['registers']:>3} stack {k['stack']:>3} spills {k['spills']:>3} {k['kernel']}")
    print(path)
    return 0


if __name__ == "__main__":
    run_command(main)
