"""Which implementation an op uses on a device, and the proof it needs first."""

import os

from torch import Tensor

from tinylora.errors import InputError

# reference, addmm: plain PyTorch, the correction as a second product on plain weights. padded, triton, cuda: Triton row
# kernels, and the frozen linear as one product over padded buffers, as the fused Triton kernel, as the CUDA decode kernel.
BACKENDS = ("reference", "addmm", "padded", "triton", "cuda")


def backend(device_type: str) -> str:
    """TINYLORA_BACKEND where it is set; otherwise addmm on a CPU and padded on a GPU."""
    name = os.environ.get("TINYLORA_BACKEND") or ("padded" if device_type == "cuda" else "addmm")
    if name not in BACKENDS:
        raise InputError(f"TINYLORA_BACKEND={name}: choose one of {', '.join(BACKENDS)}")
    return name


def runs_triton(op: str, x: Tensor) -> bool:
    """Whether `op` runs its Triton kernel on tensors like x."""
    return False
