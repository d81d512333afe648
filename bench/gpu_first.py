"""The stages of bench.gpu's first call, the most valuable first. What each measures goes into facts as it is known."""

import importlib.metadata
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import decode as decode_bench
from bench.facts import Skipped
from bench.gpu_run import Run, decoding, kernels, measured, shown, small_shapes, start, steps_of, update, weight_count
from bench.measure import seconds_in
from bench.models import gsm8k_like
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Completion, Sampling, Usage, _Rollout, rollout
from tinylora.engine.slots import Slots
from tinylora.engine.text import Text
from tinylora.errors import BuildError
from tinylora.kernels import dispatch, library
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.loader import load_model
from tinylora.rl import step as step_module
from tinylora.rl.config import BUILTIN_PRESET, TrainConfig
from tinylora.rl.memory import plan_memory
from tinylora.rl.trainer import Trainer
from tinylora.rl.update import deterministic, hidden_states
from tinylora.tasks.sets import load_task


def card(run: Run) -> None:
    """What is installed here; and the rates that floors are computed from."""
    versions = {}
    for name in ("torch", "triton", "transformers", "peft", "numpy", "tyro", "math-verify", "datasets", "trl"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    smi = None
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit,compute_mode",
            "--format=csv,noheader",
        ]
        smi = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    tools = {name: shutil.which(name) is not None for name in ("git", "gcc", "nvcc", "compute-sanitizer")}
    run.fact(versions=versions, smi=smi, tools=tools)
    run.fact(gemm_tflops=run.rates[0] / 1e12, copy_gbytes_per_second=run.rates[1] / 1e9)


def verdicts(run: Run) -> None:
    """Every op against fp64 in each dtype, as the children say it; what runs next finds them in the cache."""
    told = []

    def watch(verdict: dict[str, Any]) -> None:
        told.append((verdict["op"], verdict["dtype"]))
        run.fact(**shown(verdict))

    began = time.monotonic()
    found = dispatch.prove(run.device, watch=watch)
    seconds = round(time.monotonic() - began, 1)
    for task, verdict in found.items():
        if task not in told:
            run.fact(**shown(verdict), cached=True)
    failed = [" ".join(task) for task, verdict in found.items() if verdict["error"] is not None]
    run.fact(proven=len(found) - len(failed), unproven=failed, wall_seconds=seconds)


@dataclass
class Built:
    """The built-in model's answers: sampled completions, the update's log-probs of given ones, the gradient of v."""

    completions: list[Completion]
    logp: Tensor  # (tokens,) float64
    gradient: Tensor  # (groups, u) float64


def built_in(run: Run, device: str, dtype: str, given: list[Completion] | None = None) -> Built:
    """24 prompts x 8 completions; scores `given` completions where there are any, its own otherwise."""
    model = load_model("builtin", device, dtype)
    text = Text(model.path)
    prompts = [text.prompt(row["prompt"]) for row in load_task("builtin").train[:24]]
    adapter = Adapter(model, TinyLoRAConfig(u=13, n_tie="all"))
    with torch.no_grad():
        adapter.v.copy_(0.05 * torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(1)))
        matrices = adapter.matrices()
    began = time.perf_counter()
    completions = rollout(model, matrices, prompts, 8, Sampling(40, eos_ids=text.eos_ids, seed=5))
    run.fact(on=device, dtype=dtype, rollout_seconds=round(time.perf_counter() - began, 3))
    scored = given or completions
    with deterministic(model.device):
        hidden, tokens = hidden_states(
            model, adapter.matrices(), [p for p in prompts for _ in range(8)], scored, range(len(scored))
        )
        logp, _ = token_logprobs(hidden, model.head, tokens)
        (logp * torch.linspace(-1, 1, len(logp), device=model.device)).sum().backward()
    assert adapter.v.grad is not None
    return Built(completions, logp.detach().double().cpu(), adapter.v.grad.double().cpu())


def tiny(run: Run) -> None:
    """The built-in model in fp32 on this device beside a CPU: sampled tokens, log-probs of both sides, gradient."""
    there = built_in(run, "cpu", "float32")
    here = built_in(run, str(run.device), "float32", there.completions)
    compare(run, here, there)


def bf16(run: Run) -> None:
    """The same in bf16 beside a CPU's fp32, and twice with the same bits."""
    run.needs_gpu("the bf16 kernels are a GPU's")
    there = built_in(run, "cpu", "float32")
    here, again = (built_in(run, str(run.device), "bfloat16", there.completions) for _ in range(2))
    compare(run, here, there)
    same = {"logp": torch.equal(here.logp, again.logp), "gradient": torch.equal(here.gradient, again.gradient)}
    same["tokens"] = [c.tokens for c in here.completions] == [c.tokens for c in again.completions]
    run.fact(same_bits_twice=same)


def compare(run: Run, here: Built, there: Built) -> None:
    equal = sum(a.tokens == b.tokens for a, b in zip(here.completions, there.completions, strict=True))
    sampled = torch.tensor([x for c in there.completions for x in c.logprobs], dtype=torch.float64)
    run.fact(
        completions=len(here.completions),
        equal_to_cpu=equal,
        update_logp_difference_max=(here.logp - there.logp).abs().max().item(),
        rollout_logp_difference_max=(here.logp - sampled).abs().max().item(),
        gradient_relative_error=((here.gradient - there.gradient).norm() / there.gradient.norm()).item(),
    )


def model(run: Run) -> None:
    """Random weights and factors, made on the device."""
    run.__dict__.pop("model", None)
    began = time.monotonic()
    decoder, _ = run.model
    run.sync()
    held = torch.cuda.memory_allocated() / 1e9 if run.gpu else None
    run.fact(shape=run.shape, seconds=round(time.monotonic() - began, 2), gigabytes=held, numbers=weight_count(decoder))


def decode(run: Run) -> None:
    """A step's time by bucket and context, its floor, and what the adapter costs."""
    decoder, _ = run.model
    size = decoder.embedding.element_size()
    sizes = ((256, 384), (64, 1024)) if run.gpu else ((16, 64),)
    plain: dict[tuple[int, int], float] = {}
    for adapters, shapes in ((0, sizes[:1]), (1, sizes)):
        for slots, context in shapes:
            with decoding(run, slots, context, adapters) as s:
                for bucket in steps_of(run, slots):
                    start(s, context)
                    ms = run.clock(lambda s=s, b=bucket, c=context: [s.step(b, c + 64) for _ in range(8)], 5) / 8 * 1e3
                    moved = weight_count(decoder) * size + bucket * context * decoder.config.cache_bytes(size)
                    flop = 2 * weight_count(decoder) * bucket
                    floor = max(moved / run.rates[1], flop / run.rates[0]) * 1e3
                    row = {"adapters": adapters, "bucket": bucket, "context": context, "ms": ms, "floor_ms": floor}
                    if not adapters:
                        plain[bucket, context] = ms
                    ratio = ms / plain[bucket, context] if adapters and (bucket, context) in plain else None
                    run.fact(**row, x_floor=ms / floor, tokens_per_second=bucket / ms * 1e3, x_adapter_off=ratio)


def graphs(run: Run) -> None:
    """Replays beside the same steps run eagerly, to the bit; and how many captures evaluations between steps cost."""
    run.needs_gpu("CUDA graphs")
    context, bucket = 300, 16
    found = []
    with decoding(run, bucket, context, 1) as s:
        room = s.cache.room.clone()
        for step in (s.step, s._step):
            s.cache.room.copy_(room)
            start(s, context)
            for _ in range(16):
                step(bucket, context + 64)
            found.append((s.tokens.clone(), s.logprobs.clone()))
    run.fact(replay_equals_eager=all(torch.equal(a, b) for a, b in zip(*found, strict=True)), steps=16)
    small = load_model("builtin", str(run.device), "bfloat16")
    adapter = Adapter(small, TinyLoRAConfig(u=13, n_tie="all"))
    captures: list[int] = []
    kept = Slots.capture

    def counted(self: Slots, *arguments: Any) -> None:
        captures.append(1)
        kept(self, *arguments)

    with patch.object(Slots, "capture", counted), torch.no_grad():
        for turn in range(3):
            captures.clear()
            for evaluating in (False, True, True):
                for m in (adapter.matrices(), None) if evaluating else (adapter.matrices(),):
                    for temperature in (1.0, 0.0) if evaluating else (1.0,):
                        rollout(small, m, [[1, 2, 3]] * 32, 1, Sampling(40, temperature))
            run.fact(turn=turn, captures=len(captures))


def step(run: Run) -> None:
    """Rollout and update as the trainer runs them: 16 prompts x 16, lengths like GSM8K's."""
    decoder, adapter = run.model
    groups, samples, prompt, longest = (16, 16, 150, 512) if run.gpu else (2, 4, 20, 24)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 900, (prompt,), generator=draw).tolist() for _ in range(groups)]
    limits = gsm8k_like(groups * samples, longest)
    plan = plan_memory(decoder, prompt + longest, groups * samples, None)
    run.fact(
        plan=str(plan),
        microbatch_tokens=plan.microbatch_tokens,
        planned_gigabytes=(plan.weights + plan.activations + plan.cache) / 1e9,
    )
    with torch.no_grad():
        matrices = adapter.matrices()
    if run.gpu:
        torch.cuda.reset_peak_memory_stats()
    size = decoder.embedding.element_size()
    sample = partial(rollout, decoder, matrices, prompts, samples, cache_bytes=plan.cache)
    sample(Sampling(longest), limits=[2] * len(limits))  # captures and compiles what the timed ones replay
    for turn in range(3):
        usage = Usage()
        run.sync()
        began = time.perf_counter()
        with seconds_in([(Slots, "step"), (_Rollout, "_prefill")], str(run.device)) as busy:
            completions = sample(Sampling(longest, seed=turn), limits=limits, usage=usage)
            run.sync()
            spent = time.perf_counter() - began
            host = 1 - busy() / spent
        cached = decoder.config.cache_bytes(size) * (prompt + usage.tokens / len(completions) / 2)
        floor = (usage.steps * weight_count(decoder) * size + usage.tokens * cached) / run.rates[1]
        rate = {"tokens_per_second": usage.tokens / spent, "ms_a_step": spent / usage.steps * 1e3, "x_floor": spent / floor}
        run.fact(
            rollout=turn,
            seconds=spent,
            tokens=usage.tokens,
            steps=usage.steps,
            occupied=usage.tokens / usage.rows,
            host_share=host,
            **rate,
        )
    update(run, [p for p in prompts for _ in range(samples)], completions, plan.microbatch_tokens)
    if run.gpu:
        run.fact(peak_gigabytes=torch.cuda.max_memory_allocated() / 1e9)


def profiles(run: Run) -> None:
    """Time by kernel name of a decode step at 64 and at 256 slots, and of an update of 16k tokens."""
    run.needs_gpu("kernel times are a GPU profiler's")
    for slots in (64, 256):
        profile_step(run, slots)
    draw = torch.Generator().manual_seed(0)
    prompts = [p for p in torch.randint(2, 900, (10, 150), generator=draw).tolist() for _ in range(8)]
    completions = [Completion(t, [0.0] * 200, False) for t in torch.randint(2, 900, (80, 200), generator=draw).tolist()]
    update(run, prompts, completions, 16384, profiled=True)


def profile_step(run: Run, slots: int) -> None:
    """A function of its own: the slots' 15 GB of keys and values are gone before the update wants them."""
    with decoding(run, slots, 384, 1) as s:
        run.fact(what="decode", slots=slots, context=384, kernels=kernels(run, lambda: s.step(slots, 448)))


def training(run: Run) -> None:
    """The built-in job in fp32, ten steps here beside a CPU's: where sampled tokens first differ, and how v moves."""
    steps = 10 if run.gpu else 2
    traces: list[tuple[list[list[list[int]]], list[Tensor], list[float]]] = []
    for device in ("cpu", str(run.device)):
        tokens: list[list[list[int]]] = []

        def recorded(*arguments: Any, tokens: list[Any] = tokens, **named: Any) -> list[Completion]:
            found = rollout(*arguments, **named)
            tokens.append([c.tokens for c in found])
            return found

        with tempfile.TemporaryDirectory() as scratch, patch.object(step_module, "rollout", recorded):
            settings = {**BUILTIN_PRESET, "max_steps": steps, "eval_size": 0, "device": device, "dtype": "float32"}
            trainer = Trainer(TrainConfig(**settings, output_dir=f"{scratch}/run"))
            began, vs, rewards = time.perf_counter(), [], []
            for _ in range(steps):
                row = trainer._train_step()
                rewards.append(row["reward"])
                vs.append(trainer.policy.named_parameters()["v"].detach().double().cpu().clone())
            run.fact(on=device, seconds=time.perf_counter() - began, reward_first=rewards[0], reward_last=rewards[-1])
        traces.append((tokens, vs, rewards))
    (there, v_there, _), (here, v_here, _) = traces
    differs = next((i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b), None)
    pairs = list(zip(here[differs], there[differs], strict=True)) if differs is not None else []
    run.fact(
        equal_steps=steps if differs is None else differs,
        completions_that_differ_there=sum(a != b for a, b in pairs),
        of=len(here[0]),
        v_relative_difference=[((a - b).norm() / b.norm()).item() for a, b in zip(v_here, v_there, strict=True)],
    )


def csrc_build(run: Run) -> None:
    """The CUDA C++ library, by this machine's nvcc against this PyTorch's headers."""
    try:
        library.find_nvcc()
    except BuildError as error:
        raise Skipped(str(error)) from None
    began = time.monotonic()
    architecture = library.architecture(run.device) if run.gpu else "sm_90a"
    found = library.record(library.cuda_library([architecture]))["kernels"]
    most = max(k["registers"] for k in found)
    spills = sum(k["spills"] for k in found)
    seconds = round(time.monotonic() - began, 1)
    run.fact(architecture=architecture, kernels=len(found), registers=most, spills=spills, seconds=seconds)


def csrc_proof(run: Run) -> None:
    """Its kernel against fp64."""
    run.needs_gpu("the CUDA C++ kernel is a GPU's")
    with run.backend("cuda"):
        found = dispatch.prove(run.device, watch=lambda v: run.fact(**shown(v)))
    run.fact(unproven=[f"{op} {dtype}" for (op, dtype), v in found.items() if op == "decode_linear" and v["error"]])


def ops(run: Run) -> None:
    """The decode linear beside cuBLAS, and every op beside its alternatives, each row as it is measured."""
    name = "Qwen2.5-7B" if run.gpu else "tiny"
    with small_shapes(run.gpu), torch.no_grad():
        for rows in (16, 64) if run.gpu else (8,):
            for group in (2, 3, 0, 1):
                for row in decode_bench.measure(name, group, rows, run.rates[1], str(run.device), run.dtype, 5, float("inf")):
                    run.fact(**row)
    measured(run, compiled=False)
