"""What only a GPU can say: python -m pytest -m gpu. Skips, visibly, where there is none."""

import shutil
import subprocess
import sys

import pytest
import torch
from test_decode_linear import decoded

from tinylora.adapter import Adapter, TinyLoRAConfig
from tinylora.errors import BuildError
from tinylora.kernels import build, dispatch, self_check
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model import load_model
from tinylora.rl.rollout import Sampling, rollout
from tinylora.rl.slots import Slots

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LENGTHS = [50, 9, 1, 40]
TOKENS = torch.randint(96, (100,), generator=torch.Generator().manual_seed(3))
TARGETS = torch.randint(96, (100,), generator=torch.Generator().manual_seed(4))
SIZES = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}


@pytest.mark.parametrize("op", self_check.CHECKS)
def test_kernel_is_proven(op):
    """In bf16, fp16 and fp32, at real sizes, against fp64, twice with the same bits."""
    found = dispatch.prove(torch.device("cuda"))[op]
    assert found["error"] is None, found["error"]


@pytest.fixture
def compiled(monkeypatch):
    """TINYLORA_BACKEND=cuda, with its kernels compiled; skips, visibly, where they cannot be."""
    monkeypatch.setenv("TINYLORA_BACKEND", "cuda")
    try:
        build.library([build.architecture(torch.device("cuda"))])
    except BuildError as error:
        pytest.skip(f"csrc/ is not compiled: {error}")


@pytest.mark.parametrize("op", self_check.CUDA_CHECKS)
def test_cuda_kernel_is_proven(op, compiled):
    """In bf16 and fp16, against fp64, twice with the same bits."""
    found = dispatch.prove(torch.device("cuda"))[op]
    assert found["error"] is None, found["error"]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_cuda_kernel_is_clean(tool, compiled):
    """No access out of bounds, no race in shared memory, no divergent barrier."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer on PATH")
    check = [sys.executable, "-m", "tinylora.kernels.self_check", "--device", "cuda:0", "--checks", dispatch.CUDA_CHECKS]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=decode_", *check]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("adapters", [1, 3])
def test_decode_step_by_the_cuda_kernel(family, adapters, compiled, tiny_model, monkeypatch):
    """Hidden states: error against fp64 at most twice that of plain PyTorch on the same GPU, and the same bits twice."""
    path = tiny_model(family, **SIZES)
    exact, plain, ours, again = (
        decoded(path, *each, monkeypatch, adapters).double().cpu()
        for each in (("addmm", "float64", "cpu"), ("addmm", "bfloat16", "cuda"), *[("cuda", "bfloat16", "cuda")] * 2)
    )
    mine, theirs = ((x - exact).square().mean().sqrt() / exact.square().mean().sqrt() for x in (ours, plain))
    assert mine <= 2 * theirs, (mine, theirs)
    assert torch.equal(ours, again), "two runs gave different bits"


def run(path, backend, dtype, device, monkeypatch, adapters=1):
    """Log-probs of TARGETS and the gradient of v, fp64 on the CPU."""
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    model = load_model(str(path), device=device, dtype=dtype)
    adapter = Adapter(model, TinyLoRAConfig(r=2, u=3, n_tie=5))
    v = 0.3 * torch.randn(adapters, *adapter.v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = v.to(device, torch.float64 if dtype == "float64" else torch.float32).requires_grad_()
    rows = torch.tensor([2, 0, 1, 2], device=device).repeat_interleave(torch.tensor(LENGTHS, device=device))
    hidden = model.packed(TOKENS.to(device), LENGTHS, adapter.matrices(v), rows if adapters > 1 else None)
    logp, _ = token_logprobs(hidden, model.head, TARGETS.to(device), 1.0)
    (logp * torch.linspace(-1, 1, len(TARGETS), device=device)).sum().backward()
    return [logp.detach().double().cpu(), v.grad.double().cpu()]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["padded", "triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("adapters", [1, 3])
def test_model_and_gradient(family, backend, dtype, adapters, tiny_model, monkeypatch):
    """Error against fp64 at most twice that of plain PyTorch in the same dtype on the same GPU."""
    path = tiny_model(family, **SIZES)
    exact = run(path, "addmm", "float64", "cpu", monkeypatch, adapters)
    plain = run(path, "addmm", dtype, "cuda", monkeypatch, adapters)
    ours = run(path, backend, dtype, "cuda", monkeypatch, adapters)
    again = run(path, backend, dtype, "cuda", monkeypatch, adapters)
    for o, a, p, e in zip(ours, again, plain, exact, strict=True):
        mine, theirs = ((x - e).square().mean().sqrt() / e.square().mean().sqrt() for x in (o, p))
        assert mine <= 2 * theirs + torch.finfo(torch.float32).eps, (mine, theirs)
        assert torch.equal(o, a), "two runs gave different bits"


@pytest.mark.parametrize("backend", ["padded", "triton"])
def test_zero_v_is_adapter_off_bitwise(backend, tiny_model, monkeypatch):
    """M = 0 for all rows and M = 0 for one of several adapters: the same bits, whatever the other rows' adapters."""
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    model = load_model(str(tiny_model("qwen2", **SIZES)), device="cuda", dtype="bfloat16")
    adapter = Adapter(model, TinyLoRAConfig(r=2, u=1, n_tie="all"))
    v = torch.tensor([0.0, 0.4, -0.3], device="cuda").view(3, 1, 1)
    counts = torch.tensor(LENGTHS, device="cuda")
    found = []
    with torch.no_grad():
        off = model.packed(TOKENS.cuda(), LENGTHS, adapter.matrices(v[0]))
        for owners in ([0, 1, 2, 1], [0, 2, 1, 2]):
            rows = torch.tensor(owners, device="cuda").repeat_interleave(counts)
            found.append(model.packed(TOKENS.cuda(), LENGTHS, adapter.matrices(v), rows))
    assert torch.equal(found[0][:50], off[:50]) and torch.equal(found[1][:50], off[:50])
    assert not torch.equal(found[0][50:], off[50:])


def test_rollout(tiny_model, monkeypatch):
    """Prefill and decode on the kernels: log-probs as the packed forward gives them, in fp32."""
    monkeypatch.setenv("TINYLORA_BACKEND", "padded")
    model = load_model(str(tiny_model("qwen2", **SIZES)), device="cuda", dtype="float32")
    matrices = Adapter(model, TinyLoRAConfig(u=2, n_tie="all")).matrices(torch.full((1, 2), 0.2, device="cuda"))
    prompts = [[5, 6, 7], [8]]
    completions = rollout(model, matrices, prompts, 4, Sampling(12))
    for prompt, c in zip([p for p in prompts for _ in range(4)], completions, strict=True):
        sequence = torch.tensor(prompt + c.tokens, device="cuda")
        with torch.no_grad():
            hidden = model.packed(sequence[:-1], [len(sequence) - 1], matrices)[len(prompt) - 1 :]
            logp, _ = token_logprobs(hidden, model.head, sequence[len(prompt) :])
        torch.testing.assert_close(logp.cpu(), torch.tensor(c.logprobs), rtol=0, atol=1e-4)


def test_graphs_are_kept(tiny_model, monkeypatch):
    """A step's and those of an evaluation, sampled and greedy, of adapter and base, over one room: the second round captures
    nothing, and each samples what a model that was just loaded samples."""
    monkeypatch.setenv("TINYLORA_BACKEND", "padded")
    path, captured, capture = tiny_model("qwen2", **SIZES), [], Slots.capture
    monkeypatch.setattr(Slots, "capture", lambda self, *a: captured.append(self.model) or capture(self, *a))

    def load():
        model = load_model(str(path), device="cuda", dtype="bfloat16")
        return model, Adapter(model, TinyLoRAConfig(u=2, n_tie="all"))

    def completions(model, adapter, v, s):
        matrices = None if v is None else adapter.matrices(torch.full((1, 2), v, device="cuda"))
        return rollout(model, matrices, [[5, 6, 7], [8]], 4, s, cache_bytes=1 << 24)

    kept = load()
    for v in (0.2, -0.4):
        for each, s in ((v, Sampling(12)), *((x, s) for s in (Sampling(8), Sampling(8, 0.0)) for x in (v, None))):
            assert completions(*kept, each, s) == completions(*load(), each, s)
        assert sum(model is kept[0] for model in captured) == 3
