"""What only a GPU can say: python -m pytest -m gpu. Skips, visibly, where there is none.

TINYLORA_GPU_TESTS=cpu runs what it can on a CPU instead, where kernels are plain PyTorch: a test of these tests.
"""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from decoding import decoded

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Completion, Sampling, Usage, rollout
from tinylora.engine.slots import Slots
from tinylora.errors import BuildError
from tinylora.kernels import dispatch, library, proof
from tinylora.kernels.attention import packed_attention, packed_attention_ref
from tinylora.kernels.packing import Packing
from tinylora.kernels.sampling import uniforms
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.loader import load_model
from tinylora.rl import step as step_module
from tinylora.rl.config import BUILTIN_PRESET, TrainConfig
from tinylora.rl.trainer import Trainer
from tinylora.rl.update import deterministic, hidden_states

ON_CPU = os.environ.get("TINYLORA_GPU_TESTS") == "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs a CUDA GPU")]
gpu_alone = pytest.mark.skipif(ON_CPU, reason="a CPU has nothing of it")

DEVICE = torch.device("cpu" if ON_CPU else "cuda")
GPU = torch.device("cuda", 0)
DRAWS = 2 if ON_CPU else 8  # of v and tokens, whose errors are pooled: of one draw alone a ratio over 2 is chance
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """A model and the cache that a rollout left with it hold each other: the collector alone frees them, and seldom comes."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > 1 << 33:
        gc.collect()
        torch.cuda.empty_cache()


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().mean().sqrt()


def at_most_twice_plain(ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """The pooled error of ours against fp64, relative to exact's size, is at most twice plain PyTorch's."""
    o, p, e = (torch.cat([x.double().cpu().flatten() for x in xs]) for xs in (ours, plain, exact))
    mine, theirs = rms(o - e) / rms(e), rms(p - e) / rms(e)
    print(f"relative error {mine:.2e}, plain PyTorch's {theirs:.2e}")
    assert torch.isfinite(o).all() and mine <= 2 * theirs + EPS, (mine, theirs)


# ---- kernels ------------------------------------------------------------------------------------------------------------


@gpu_alone
@pytest.mark.parametrize(("op", "dtype"), proof.tasks_of(proof.CHECKS, GPU))
def test_kernel_is_proven(op, dtype):
    """At real sizes, against fp64, twice with the same bits."""
    found = dispatch.prove(GPU)[op, dtype]
    assert found["error"] is None, found["error"]


@pytest.fixture
def compiled(monkeypatch):
    """TINYLORA_BACKEND=cuda, with its kernels compiled; skips, visibly, where they cannot be."""
    monkeypatch.setenv("TINYLORA_BACKEND", "cuda")
    try:
        library.cuda_library([library.architecture(GPU)])
    except BuildError as error:
        pytest.skip(f"csrc/ is not compiled: {error}")


@gpu_alone
@pytest.mark.parametrize(("op", "dtype"), proof.tasks_of(proof.CUDA_CHECKS, GPU))
def test_cuda_kernel_is_proven(op, dtype, compiled):
    found = dispatch.prove(GPU)[op, dtype]
    assert found["error"] is None, found["error"]


@gpu_alone
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_cuda_kernel_is_clean(tool, compiled):
    """No access out of bounds, no race in shared memory, no divergent barrier. PyTorch's cache of blocks is off: it would
    hide what lies beyond one."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer on PATH")
    check = [sys.executable, "-m", "tinylora.kernels.self_check", "--device", "cuda:0", "--checks", proof.CUDA_CHECKS]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=decode_", *check]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@gpu_alone
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("adapters", [1, 3])
def test_decode_step_by_the_cuda_kernel(family, adapters, compiled, tiny_model, monkeypatch):
    """Hidden states, and the same bits twice."""
    path = tiny_model(family, hidden_size=128, intermediate_size=320, head_dim=32)
    exact, plain, ours, again = (
        decoded(path, *each, monkeypatch, adapters)
        for each in (("addmm", "float64", "cpu"), ("addmm", "bfloat16", "cuda"), *[("cuda", "bfloat16", "cuda")] * 2)
    )
    at_most_twice_plain([ours], [plain], [exact])
    assert torch.equal(ours, again), "two runs gave different bits"


# ---- the update's attention ---------------------------------------------------------------------------------------------

# Whole sequences, then suffixes, and what each suffix continues. PyTorch adds dq up over blocks of 128 keys: up to 256 keys
# two addends have no order to lose.
PACKS = {
    "short": ([60, 3, 1], [20, 1, 7], [0, 1, 0]),
    "400 keys": ([250, 130], [150] * 6 + [40], [0] * 6 + [1]),
    "2048 keys": ([1024, 300], [1024, 1000, 7], [0, 0, 1]),
    "whole sequences": ([400, 1, 130], [], []),
}


@pytest.mark.parametrize("pack", ["short", *(pytest.param(name, marks=gpu_alone) for name in PACKS if name != "short")])
@pytest.mark.parametrize("shape", [(14, 2, 64), (28, 4, 128), (7, 1, 128), (4, 4, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_packs(pack, shape, dtype):
    """Output and gradients at most twice plain PyTorch's error, and equal twice, as the update runs it."""
    heads, kv_heads, D = shape
    whole, suffixes, prefixes = PACKS[pack]
    lengths = [*whole, *suffixes]
    draw = torch.Generator().manual_seed(1)

    def randn(n: int) -> torch.Tensor:
        return torch.randn(sum(lengths), n, D, generator=draw, dtype=torch.float64).to(DEVICE, dtype)

    q, k, v, dout = randn(heads), randn(kv_heads), randn(kv_heads), randn(heads)

    def run(dtype: torch.dtype, plain: bool) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        with deterministic(DEVICE):
            if plain:
                out = repeated(*leaves, whole, suffixes, prefixes)
            else:
                out = packed_attention(*leaves, Packing(lengths, prefixes, dtype, DEVICE, None))
            return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    exact, plain, ours, again = run(torch.float64, True), run(dtype, True), run(dtype, False), run(dtype, False)
    for name, o, a, p, e in zip(("out", "dq", "dk", "dv"), ours, again, plain, exact, strict=True):
        print(name, end=": ")
        at_most_twice_plain([o], [p], [e])
        assert torch.equal(o, a), f"{name}: two runs gave different bits"


def repeated(q, k, v, whole, suffixes, prefixes):  # type: ignore[no-untyped-def]
    """The formula, suffix after suffix, each with a copy of its prefix before it."""
    starts = [0]
    for n in [*whole, *suffixes]:
        starts.append(starts[-1] + n)
    outs = [packed_attention_ref(q[: starts[len(whole)]], k[: starts[len(whole)]], v[: starts[len(whole)]], whole)]
    for i, (n, parent) in enumerate(zip(suffixes, prefixes, strict=True), len(whole)):
        rows = [*range(starts[parent], starts[parent] + whole[parent]), *range(starts[i], starts[i] + n)]
        outs.append(packed_attention_ref(q[rows], k[rows], v[rows], [len(rows)])[whole[parent] :])
    return torch.cat(outs)


# ---- model and gradient -------------------------------------------------------------------------------------------------

LONG = {"max_position_embeddings": 4096}
GROUPED = {"num_attention_heads": 7, "num_key_value_heads": 1}
SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32, **LONG},
    "7 to 1": {"hidden_size": 256, "intermediate_size": 320, "head_dim": 128, **GROUPED, **LONG},
}


def batch(seed: int, prompts: list[int], samples: int, longest: int) -> tuple[list[list[int]], list[Completion]]:
    """Random prompts of these lengths, each with `samples` completions of up to `longest` tokens."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(96, (n,), generator=draw).tolist() for n in prompts]
    lengths = torch.randint(1, longest + 1, (len(ids) * samples,), generator=draw).tolist()
    lengths[0] = longest
    completions = [Completion(torch.randint(96, (n,), generator=draw).tolist(), [0.0] * n, False) for n in lengths]
    return [p for p in ids for _ in range(samples)], completions


def scored(model, adapter, seed, prompts, completions):  # type: ignore[no-untyped-def]
    """Log-probs of the completions and the gradient of v, as the update computes them."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    v = (0.3 * torch.randn(adapter.v.shape, generator=draw, dtype=torch.float64)).to(model.device, wide).requires_grad_()
    with deterministic(model.device):
        hidden, targets = hidden_states(model, adapter.matrices(v), prompts, completions, range(len(completions)))
        logp, _ = token_logprobs(hidden, model.head, targets, 1.0)
        (logp * torch.linspace(-1, 1, len(logp), device=model.device)).sum().backward()
    return logp.detach(), v.grad


@pytest.mark.parametrize(
    ("family", "sizes", "prompts", "samples", "longest"),
    [
        ("qwen2", "small", [50, 9, 1], 3, 40),
        ("qwen3", "small", [50, 9, 1], 3, 40),
        pytest.param("qwen2", "7 to 1", [150, 100], 16, 170, marks=gpu_alone),
        pytest.param("qwen3", "7 to 1", [1500], 2, 548, marks=gpu_alone),
    ],
    ids=["qwen2", "qwen3", "16 suffixes", "2048 keys"],
)
@pytest.mark.parametrize("backend", ["padded", "triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_update(family, sizes, prompts, samples, longest, backend, dtype, tiny_model, monkeypatch):
    """Log-probs and the gradient of v, errors pooled over draws of v and tokens; the same bits twice."""
    path = tiny_model(family, **SIZES[sizes])
    draws = [batch(seed, prompts, samples, longest) for seed in range(DRAWS if longest < 100 else 4)]
    found = []
    twice = [(backend, dtype, DEVICE)] * 2
    for name, type_, device in (("addmm", "float64", "cpu"), ("addmm", dtype, DEVICE), *twice):
        monkeypatch.setenv("TINYLORA_BACKEND", name)
        model = load_model(str(path), str(device), type_)
        adapter = Adapter(model, TinyLoRAConfig(r=2, u=3, n_tie=5))
        found.append([scored(model, adapter, seed, *each) for seed, each in enumerate(draws)])
    for what, exact, plain, ours, again in zip(("log-probs", "gradient"), *(zip(*f, strict=True) for f in found), strict=True):
        print(what, end=": ")
        at_most_twice_plain(ours, plain, exact)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), f"{what}: two runs gave different bits"


@pytest.mark.parametrize("backend", ["padded", "triton"])
def test_zero_v_is_adapter_off_bitwise(backend, tiny_model, monkeypatch):
    """M = 0 for all rows and M = 0 for one of several adapters: the same bits, whatever the other rows' adapters."""
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    model = load_model(str(tiny_model("qwen2", **SIZES["small"])), str(DEVICE), "float32" if ON_CPU else "bfloat16")
    adapter = Adapter(model, TinyLoRAConfig(r=2, u=1, n_tie="all"))
    lengths = [50, 9, 1, 40]
    tokens = torch.randint(96, (100,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    v = torch.tensor([0.0, 0.4, -0.3], device=DEVICE).view(3, 1, 1)
    found = []
    with torch.no_grad():
        off = model.packed(tokens, lengths, adapter.matrices(v[0]))
        for owners in ([0, 1, 2, 1], [0, 2, 1, 2]):
            rows = torch.tensor(owners, device=DEVICE).repeat_interleave(torch.tensor(lengths, device=DEVICE))
            found.append(model.packed(tokens, lengths, adapter.matrices(v), rows))
    assert torch.equal(found[0][:50], off[:50]) and torch.equal(found[1][:50], off[:50])
    assert not torch.equal(found[0][50:], off[50:])


# ---- rollout ------------------------------------------------------------------------------------------------------------


def sampled_and_scored(path, dtype, monkeypatch, backend="padded", **options):  # type: ignore[no-untyped-def]
    """A rollout's completions under one adapter, or where options have row_adapter under two; and what they are of."""
    monkeypatch.setenv("TINYLORA_BACKEND", backend)
    model = load_model(str(path), str(DEVICE), dtype)
    adapter = Adapter(model, TinyLoRAConfig(u=2, n_tie="all"))
    v = torch.tensor([[0.2, -0.1], [-0.3, 0.25]], device=DEVICE).view(2, 1, 2)
    with torch.no_grad():
        matrices = adapter.matrices(v if "row_adapter" in options else v[0])
    return model, adapter, v, rollout(model, matrices, **options)


def scores(model, adapter, v, prompts, completions):  # type: ignore[no-untyped-def]
    """Log-probs of completions as the update gives them, one tensor."""
    with torch.no_grad():
        matrices = adapter.matrices(v.to(model.device, torch.float64 if model.dtype == torch.float64 else torch.float32))
        hidden, targets = hidden_states(model, matrices, prompts, completions, range(len(completions)))
        return token_logprobs(hidden, model.head, targets)[0]


def references(path, dtype, v, prompts, completions, monkeypatch):  # type: ignore[no-untyped-def]
    """The same by plain PyTorch in this dtype, and in fp64 on a CPU."""
    monkeypatch.setenv("TINYLORA_BACKEND", "addmm")
    for type_, device in ((dtype, str(DEVICE)), ("float64", "cpu")):
        model = load_model(str(path), device, type_)
        yield scores(model, Adapter(model, TinyLoRAConfig(u=2, n_tie="all")), v, prompts, completions)


def logprobs(completions: list[Completion]) -> torch.Tensor:
    return torch.tensor([x for c in completions for x in c.logprobs])


PROMPTS = [torch.randint(96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (300, 5, 1, 64, 65)]


@pytest.mark.parametrize("slots", [1, 7, 64, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rollout_logprobs_are_the_updates(slots, dtype, tiny_model, monkeypatch):
    """Neither the rollout's nor the update's are further from fp64 than twice plain PyTorch's update."""
    path = tiny_model("qwen2", **SIZES["7 to 1"])
    samples = {1: 1, 7: 4, 64: 16, 256: 1 if ON_CPU else 64}[slots]
    options = {"prompts": PROMPTS, "generations": samples, "sampling": Sampling(24, seed=3, eos_ids=(7,)), "slots": slots}
    model, adapter, v, completions = sampled_and_scored(path, dtype, monkeypatch, **options)
    prompts = [p for p in PROMPTS for _ in range(samples)]
    updates = scores(model, adapter, v[0], prompts, completions)
    plain, exact = references(path, dtype, v[0], prompts, completions, monkeypatch)
    for found in (logprobs(completions), updates):
        at_most_twice_plain([found], [plain], [exact])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pages_that_move(dtype, tiny_model, monkeypatch):
    """Too few pages for all: sequences give theirs back and start over, others take them; log-probs stay what they were."""
    path = tiny_model("qwen2", **SIZES["small"])
    usage = Usage()
    options = {"prompts": PROMPTS, "generations": 8, "sampling": Sampling(150, seed=4), "page_size": 64, "usage": usage}
    token = 2 * 2 * 2 * 32 * (4 if dtype == "float32" else 2)  # bytes: keys and values, two layers, two heads
    room = {"slots": 24, "cache_bytes": 40 * 64 * token}
    _, _, v, completions = sampled_and_scored(path, dtype, monkeypatch, **options, **room)
    assert usage.restarted > 0
    prompts = [p for p in PROMPTS for _ in range(8)]
    plain, exact = references(path, dtype, v[0], prompts, completions, monkeypatch)
    at_most_twice_plain([logprobs(completions)], [plain], [exact])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_adapters_in_a_batch(dtype, tiny_model, monkeypatch):
    """Each prompt's completions have the log-probs of its own adapter, and not the other's."""
    path = tiny_model("qwen2", **SIZES["small"])
    owners = [0, 1, 1, 0, 1]
    options = {"prompts": PROMPTS, "generations": 4, "sampling": Sampling(20, seed=6), "row_adapter": owners}
    _, _, v, completions = sampled_and_scored(path, dtype, monkeypatch, **options)
    for adapter in (0, 1):
        own = [i for i, owner in enumerate(owners) if owner == adapter]
        theirs = [c for i in own for c in completions[4 * i : 4 * i + 4]]
        prompts = [PROMPTS[i] for i in own for _ in range(4)]
        plain, exact = references(path, dtype, v[adapter], prompts, theirs, monkeypatch)
        at_most_twice_plain([logprobs(theirs)], [plain], [exact])
        _, other = references(path, dtype, v[1 - adapter], prompts, theirs, monkeypatch)
        assert rms(logprobs(theirs) - other) > 10 * rms(logprobs(theirs) - exact)


@gpu_alone
@pytest.mark.parametrize("adapters", [0, 1])
def test_graphs_replay_what_runs_eagerly(adapters, tiny_model, monkeypatch):
    """The same rollout by replays and step by step: equal tokens and log-probs to the bit."""
    path = tiny_model("qwen2", **SIZES["small"])
    found = []
    for eager in (False, True):
        if eager:
            monkeypatch.setattr(Slots, "step", Slots._step)
        model = load_model(str(path), str(DEVICE), "bfloat16")
        adapter = Adapter(model, TinyLoRAConfig(u=2, n_tie="all"))
        with torch.no_grad():
            matrices = adapter.matrices(torch.tensor([[0.2, -0.1]], device=DEVICE)) if adapters else None
        found.append(rollout(model, matrices, PROMPTS, 8, Sampling(40, seed=9, eos_ids=(7,))))
    assert found[0] == found[1]


@gpu_alone
def test_graphs_are_kept(tiny_model, monkeypatch):
    """A step's and those of an evaluation, sampled and greedy, of adapter and base, over one room: the second round captures
    nothing, and each samples what a model that was just loaded samples."""
    monkeypatch.setenv("TINYLORA_BACKEND", "padded")
    path, captured, capture = tiny_model("qwen2", **SIZES["small"]), [], Slots.capture
    monkeypatch.setattr(Slots, "capture", lambda self, *a: captured.append(self.model) or capture(self, *a))

    def load():
        model = load_model(str(path), str(DEVICE), "bfloat16")
        return model, Adapter(model, TinyLoRAConfig(u=2, n_tie="all"))

    def completions(model, adapter, v, s):
        matrices = None if v is None else adapter.matrices(torch.full((1, 2), v, device=DEVICE))
        return rollout(model, matrices, PROMPTS, 4, s, cache_bytes=1 << 26)

    kept = load()
    for v in (0.2, -0.4):
        for each, s in ((v, Sampling(12)), *((x, s) for s in (Sampling(8), Sampling(8, 0.0)) for x in (v, None))):
            assert completions(*kept, each, s) == completions(*load(), each, s)
        assert sum(model is kept[0] for model in captured) == 3


# ---- training -----------------------------------------------------------------------------------------------------------


def test_ten_steps_beside_a_cpu(tmp_path, monkeypatch):
    """The built-in job in fp32: tokens equal to the CPU's until one draw lies within 1e-3 of the edge between two tokens."""
    runs = []
    for device in ("cpu", str(DEVICE)):
        steps: list[list[Completion]] = []
        trainer = Trainer(
            TrainConfig(
                **{**BUILTIN_PRESET, "max_steps": 10, "eval_size": 0},
                device=device,
                dtype="float32",
                output_dir=str(tmp_path / f"{device}-{len(runs)}"),
            )
        )
        vs, prompts = [], []

        def recorded(model, matrices, prompts_, *rest, steps=steps, prompts=prompts, **named):  # type: ignore[no-untyped-def]
            found = rollout(model, matrices, prompts_, *rest, **named)
            steps.append(found)
            prompts.append((prompts_, named["names"]))
            return found

        monkeypatch.setattr(step_module, "rollout", recorded)
        for _ in range(10):
            vs.append(trainer.policy.named_parameters()["v"].detach().double().cpu().clone())
            trainer._train_step()
        runs.append((steps, vs, prompts, trainer))
    (there, v_there, prompts, trainer), (here, v_here, _, _) = runs
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        differ = [j for j, (x, y) in enumerate(zip(a, b, strict=True)) if x.tokens != y.tokens]
        if differ:
            torch.testing.assert_close(v_here[i], v_there[i], rtol=1e-3, atol=1e-5)
            for j in differ:
                at = next(n for n, (x, y) in enumerate(zip(a[j].tokens, b[j].tokens, strict=False)) if x != y)
                print(f"step {i}, completion {j}, token {at}: {a[j].tokens[at]} here, {b[j].tokens[at]} on the CPU")
                assert edge(trainer, v_there[i], prompts[i], j, b[j], at) < 1e-3
            return
    print("all ten steps' tokens are equal")
    torch.testing.assert_close(v_here[-1], v_there[-1], rtol=1e-3, atol=1e-5)


def edge(trainer, v, drawn, number, completion, at):  # type: ignore[no-untyped-def]
    """How far the draw of a token lies from the nearer end of its share of [0, 1)."""
    prompts, names = drawn
    prompt = prompts[number // (len(names) // len(prompts))]
    ids = torch.tensor([*prompt, *completion.tokens[:at]])
    model = trainer.model
    with torch.no_grad():
        hidden = model.packed(ids, [len(ids)], trainer.policy.matrices(v.to(trainer.policy.v)))[-1:]
        cdf = (hidden @ model.head.T).double().softmax(-1).cumsum(-1)[0]  # (vocab,)
    seed, sequence = names[number]
    u = uniforms(seed, torch.tensor([sequence]), at + 1)[0, at]
    return (cdf - u).abs().min().item()
