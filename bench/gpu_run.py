"""What the stages of bench.gpu share: device and rates, the random model in mid-decode, an update, rows of bench.ops."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import measure
from bench import ops as ops_bench
from bench.facts import OUTCOMES, Facts, Skipped
from bench.measure import copy_rate, gemm_rate
from bench.models import random_adapter, random_decoder
from bench.verdicts import worst
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Completion, Sampling
from tinylora.engine.slots import Slots
from tinylora.kernels.products import fp32_sums
from tinylora.kernels.token_logprobs import token_logprobs
from tinylora.model.cache import KVCache
from tinylora.model.decoder import Decoder
from tinylora.rl.update import _microbatches, deterministic, hidden_states

Model = tuple[Decoder, Adapter]


class Run:
    """What stages share: the device, its rates, the random model."""

    def __init__(self, device: str, shape: str, facts: Facts) -> None:
        self.device, self.shape, self.gpu = torch.device(device), shape, device.startswith("cuda")
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.facts, self.stage = facts, ""
        facts("machine", **measure.card(), device=device, shape=shape)

    def fact(self, **data: Any) -> None:
        assert not OUTCOMES & data.keys(), "these are the driver's words"
        self.facts(self.stage, **data)

    def needs_gpu(self, what: str) -> None:
        if not self.gpu:
            raise Skipped(f"{what}; this device is a {self.device.type}")

    @cached_property
    def rates(self) -> tuple[float, float]:
        """FLOP/s of a large product and bytes/s of a copy, reads and writes both counted."""
        kind = str(self.device)
        return gemm_rate(8192 if self.gpu else 1024, 10, kind, self.dtype), copy_rate(1 << (30 if self.gpu else 26), 10, kind)

    @cached_property
    def model(self) -> Model:
        torch.manual_seed(0)
        model = random_decoder(self.shape, self.device, self.dtype)
        return model, random_adapter(model)

    def sync(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def clock(self, call: Callable[[], Any], times: int = 5) -> float:
        """Median seconds of a call, after one that is not counted."""
        call()
        spent = []
        for _ in range(times):
            self.sync()
            began = time.perf_counter()
            call()
            self.sync()
            spent.append(time.perf_counter() - began)
        return statistics.median(spent)

    def check(self) -> None:
        """Raises where the device no longer answers."""
        self.sync()

    def release(self) -> None:
        """What a stage leaves behind, the model's weights aside."""
        if "model" in self.__dict__:
            self.model[0].kept = None  # a rollout's keys, values and graphs
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    @contextmanager
    def backend(self, name: str) -> Iterator[None]:
        with patch.dict(os.environ, {"TINYLORA_BACKEND": name}):
            yield


def shown(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict as a fact: its case that comes closest to failing, in place of all of them."""
    cases = verdict.get("cases", [])
    same = all(c["same_bits"] for c in cases)
    kept = {k: verdict[k] for k in ("op", "dtype", "error", "seconds") if k in verdict}
    return kept | {"closest": worst(cases), "same_bits": same}


def weight_count(decoder: Decoder) -> int:
    """Of the weights that a decode step reads."""
    return sum(g.weight.numel() for layer in decoder.layers for g in layer.groups) + decoder.head.numel()


def steps_of(run: Run, slots: int) -> list[int]:
    """Slot counts whose steps are timed; a CPU's rows come in multiples of 8."""
    return [n for n in (1, 8, 16, 64, 128, 256) if n <= slots and (run.gpu or n % 8 == 0)]


@contextmanager
def decoding(run: Run, slots: int, context: int, adapters: int) -> Iterator[Slots]:
    """All slots of the random model in the middle of a sequence, over random keys and values."""
    decoder, adapter = run.model
    most = -(-(context + 512) // 512) * 512 // 64
    with torch.inference_mode(), fp32_sums():
        cache = KVCache(decoder.config, slots * most, 64, decoder.embedding, slots, 64 * most)
        cache.room.uniform_(-0.5, 0.5)
        found = Slots(decoder, Sampling(512), slots, cache, adapters)
        found.set_matrices(adapter.matrices() if adapters else None)
        cache.write_table([list(range(i * most, (i + 1) * most)) for i in range(slots)])
        if run.gpu:
            began = time.monotonic()
            sizes = steps_of(run, slots)
            found.capture(sizes, None)
            run.sync()
            run.fact(slots=slots, adapters=adapters, graphs=len(sizes), capture_seconds=round(time.monotonic() - began, 2))
        start(found, context)
        yield found
    del found, cache
    run.release()


def start(slots: Slots, context: int) -> None:
    """Every slot at this position, with room for 512 tokens."""
    rows = torch.arange(slots.slots, device=slots.token.device)
    slots.token.copy_(rows % 900 + 2)
    slots.position.fill_(context)
    slots.live.fill_(True)
    slots.cell.copy_(rows * 512)
    slots.end.copy_(rows * 512 + 512)
    slots.uniform.copy_(torch.linspace(0.01, 0.99, len(slots.uniform), device=rows.device))


def update(run: Run, prompts: list[list[int]], completions: list[Completion], budget: int, profiled: bool = False) -> None:
    """One microbatch forward and backward: time, MFU, the same bits three times, and the distance from the rollout. Where
    memory runs out, the same of half the tokens."""
    try:
        _update(run, prompts, completions, budget, profiled)
        return
    except torch.OutOfMemoryError as error:
        if budget < 2048:
            raise
        run.fact(out_of_memory=str(error)[:300], tokens=budget)
    gc.collect()
    update(run, prompts, completions, budget // 2, profiled)


def _update(run: Run, prompts: list[list[int]], completions: list[Completion], budget: int, profiled: bool) -> None:
    decoder, adapter = run.model
    part = _microbatches(range(len(completions)), prompts, completions, budget)[0]
    found: list[tuple[Tensor, Tensor]] = []

    def once() -> None:
        adapter.v.grad = None
        with deterministic(decoder.device), fp32_sums():
            hidden, tokens = hidden_states(decoder, adapter.matrices(), prompts, completions, part)
            logp, _ = token_logprobs(hidden, decoder.head, tokens)
            (logp * 1e-3).sum().backward()
        assert adapter.v.grad is not None
        found.append((logp.detach(), adapter.v.grad.clone()))

    if profiled:
        run.fact(what="update", tokens=budget, kernels=kernels(run, once))
        return
    seconds = run.clock(once, 3)
    own = sum(len(completions[i].tokens) for i in part)
    packed = own - len(part) + sum(len(p) for p in {tuple(prompts[i]) for i in part})
    flop = 4 * (weight_count(decoder) - decoder.head.numel()) * packed + 4 * decoder.head.numel() * own
    sampled = torch.tensor([x for i in part for x in completions[i].logprobs], device=decoder.device)
    run.fact(
        update_seconds=seconds,
        packed_tokens=packed,
        completion_tokens=own,
        tokens_per_second=packed / seconds,
        tflops=flop / seconds / 1e12,
        mfu=flop / seconds / run.rates[0],
        same_bits=all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)),
        logp_difference_mean=(found[0][0] - sampled).abs().mean().item(),
    )


def kernels(run: Run, call: Callable[[], Any], most: int = 40) -> list[list[Any]]:
    """[name, calls, microseconds on the device] of what one call launches, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    call()
    run.sync()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        call()
        run.sync()
    rows = sorted(p.key_averages(), key=lambda e: -e.device_time_total)
    return [[e.key[:100], e.count, round(e.device_time_total, 1)] for e in rows[:most]]


def measured(run: Run, compiled: bool) -> None:
    with small_shapes(run.gpu), warnings_off():
        for case in bench_cases(run, compiled):
            for row in ops_bench.measure(case, run.rates, str(run.device), 5, float("inf")):
                run.fact(**row)


def bench_cases(run: Run, compiled: bool) -> Iterator[ops_bench.Case]:
    """bench.ops's cases at the random model's shapes, in the order of what is not known."""
    name, device = ("Qwen2.5-7B" if run.gpu else "tiny"), str(run.device)
    l2 = torch.cuda.get_device_properties(run.device).L2_cache_size if run.gpu else 0
    config = ops_bench.MODELS[name]
    for rows in (2048, 64) if run.gpu else (32,):
        for group in (2, 3, 0, 1):
            n = sum(config.shape(p)[0] for p in ops_bench.GROUPS[group])
            k = config.shape(ops_bench.GROUPS[group][0])[1]
            sets = ops_bench._sets(run.dtype.itemsize * (n * k + rows * (n + k)), l2)
            yield ops_bench.linear_case(name, group, rows, device, run.dtype, compiled, sets)
        if not compiled:
            yield ops_bench.norm_case(name, rows, device, run.dtype, 4)
            yield ops_bench.swiglu_case(name, rows, device, run.dtype, 4)
    if not compiled:
        yield ops_bench.head_case(name, 2048 if run.gpu else 32, device, run.dtype)


@contextmanager
def small_shapes(gpu: bool) -> Iterator[None]:
    """bench.ops's models and a tiny one, whose rounds are as short as they come."""
    tiny = {"tiny": ops_bench._config("qwen2", 128, 320, 4, 2, 1000)}
    with patch.dict(ops_bench.MODELS, tiny), patch.object(measure, "ROUND_SECONDS", 0.25 if gpu else 0.0):
        yield


@contextmanager
def warnings_off() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
