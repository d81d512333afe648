"""Generation beside transformers: python -m bench.rollout [--model NAME|DIRECTORY|GGUF] [--lengths eos|gsm8k|fixed]

    ours         the rollout, 13 trained numbers away from zero, all samples of a prompt in one call
    base         the same without an adapter: what the adapter costs
    generate     transformers' generate on a PEFT TinyLoRA model, same prompts, samples and cap, in one batch
    vLLM         where installed and there is a GPU: its own engine on the base model, same prompts, samples and lengths

In one process, in turns, the same sampling; tokens/s count what is decoded up to the end of each sequence. With `--lengths`
gsm8k or fixed, sequences are cut where a fixed draw says, on both sides (a long tail like GSM8K's completions, or all alike),
since random weights end nowhere. The floor of a decode step is the larger of its bytes (weights once, keys and values once) at
the rate of a copy and its FLOP at the rate of a large product, both measured first in the same run. MBU is the bytes' part of
it: the share of the copy's rate at which the steps move what they must. The host's share of the time is what is left beside
decode steps and prefill, in one more call of its own.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import Rounds, card, copy_rate, gemm_rate, print_json, quantiles, seconds_in, timed
from bench.models import CHOICES, add_dtypes, gsm8k_like, model_directory, with_peft
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.cli import table
from tinylora.engine.rollout import Sampling, Usage, _Rollout, rollout
from tinylora.engine.slots import Slots
from tinylora.engine.text import Text
from tinylora.model.decoder import Decoder
from tinylora.model.loader import load_model
from tinylora.tasks.sets import load_task


def peer(path: Path, dtype: torch.dtype, device: str) -> Any:
    """transformers' model with PEFT's TinyLoRA on all projections."""
    from transformers import AutoModelForCausalLM

    return with_peft(AutoModelForCausalLM.from_pretrained(path, dtype=dtype)).to(device)


def generate(model: Any, prompts: list[list[int]], samples: int, s: Sampling, limits: list[int] | None) -> list[int]:
    """How many tokens transformers decoded for each sequence."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    longest, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts for _ in range(samples)], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts for _ in range(samples)], device=device)

    class Cut(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] - longest >= torch.tensor(limits, device=device)

    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=s.max_completion_length,
            eos_token_id=list(s.eos_ids) or None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Cut()] if limits else []),
        )[:, longest:]
    if limits:
        return [min(n, out.shape[1]) for n in limits]
    ends = torch.isin(out, torch.tensor(s.eos_ids, device=device)).int()
    return [int(n) for n in ((ends.cumsum(1) - ends) == 0).sum(1).tolist()]


def vllm_engine(path: Path) -> Any:
    from vllm import LLM

    return LLM(str(path), skip_tokenizer_init=True, gpu_memory_utilization=0.4, max_model_len=4096)


def floors(model: Decoder, usage: Usage, mean_length: float, rates: tuple[float, float]) -> tuple[float, float]:
    """Least seconds of a rollout's decode steps by what they move, every step the weights and every token its keys and values,
    and by their FLOP."""
    weights = [g.weight for layer in model.layers for g in layer.groups] + [model.head]
    cached = model.config.cache_bytes(model.embedding.element_size()) * mean_length
    moved = usage.steps * sum(w.nbytes for w in weights) + usage.tokens * cached
    return moved / rates[1], 2 * sum(w.numel() for w in weights) * usage.tokens / rates[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="qwen7b" if gpu else "builtin", help=CHOICES)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--lengths", default="eos", choices=["eos", "gsm8k", "fixed"])
    parser.add_argument("--longest", type=int, default=40, help="tokens a sequence may get")
    parser.add_argument("--slots", type=int, help="ours: sequences that decode at once; default: as the trainer would")
    parser.add_argument("--rounds", type=int, default=5, help="of each contender, after a short warm-up")
    parser.add_argument("--busy", type=float, default=0.04, help="a CPU round counts if others used at most this share")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    add_dtypes(parser, "bfloat16" if gpu else "float32")
    parser.add_argument("--json", help="a file for the last line too")
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    dtype = torch.bfloat16 if o.device.startswith("cuda") else torch.float32  # of what is written and of the floor's product
    rates = gemm_rate(8192 if gpu else 1024, 5, o.device, dtype), copy_rate(1 << (30 if gpu else 26), 5, o.device)
    with tempfile.TemporaryDirectory() as scratch:
        path = model_directory(o.model, Path(scratch), dtype)
        o.model = Path(o.model).name  # in the table and the result
        model, text = load_model(str(path), o.device, o.dtype), Text(path)
        adapter = Adapter(model, TinyLoRAConfig(u=13, n_tie="all"))
        with torch.no_grad():
            matrices = adapter.matrices(torch.full_like(adapter.v, 0.01))
        rows = load_task("builtin").train[: o.prompts]
        prompts = [text.prompt(row["prompt"]) for row in rows]
        count, eos = len(prompts) * o.samples, text.eos_ids
        limits = {"eos": None, "gsm8k": gsm8k_like(count, o.longest), "fixed": [o.longest] * count}[o.lengths]
        if limits is not None:  # GSM8K's prompts are about 150 tokens; these are repeated to that
            prompts, eos = [(p * 8)[:150] for p in prompts], ()
        s = Sampling(o.longest, eos_ids=eos)
        theirs = peer(path, getattr(torch, o.peer_dtype), o.device)
        engine = vllm_engine(path) if gpu and importlib.util.find_spec("vllm") else None

        usages: dict[str, Usage] = {}

        def ours(name: str, m: Any, limits: list[int] | None) -> int:
            usages[name] = Usage()
            found = rollout(model, m, prompts, o.samples, s, slots=o.slots, limits=limits, usage=usages[name])
            return sum(len(c.tokens) for c in found)

        def by_vllm(limits: list[int] | None) -> int:
            from vllm import SamplingParams

            ids = [{"prompt_token_ids": p} for p in prompts for _ in range(o.samples)]
            most = limits or [o.longest] * count
            options = [SamplingParams(max_tokens=n, ignore_eos=limits is not None, stop_token_ids=list(eos)) for n in most]
            return sum(len(r.outputs[0].token_ids) for r in engine.generate(ids, options, use_tqdm=False))

        calls: dict[str, Callable[[list[int] | None], int]] = {
            "ours": lambda limits: ours("ours", matrices, limits),
            "base": lambda limits: ours("base", None, limits),
            "generate + PEFT": lambda limits: sum(generate(theirs, prompts, o.samples, s, limits)),
            **({"vLLM, base model": by_vllm} if engine is not None else {}),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        tokens: dict[str, list[int]] = {name: [] for name in calls}
        for call in calls.values():
            call([2] * count)  # warm-up
        counted = Rounds(warm_up=0, most=o.busy)
        for turn in range(o.rounds):
            found = {}
            for i in range(len(calls)):
                name = list(calls)[(i + turn) % len(calls)]
                if gpu:
                    torch.cuda.synchronize()
                began = time.perf_counter()
                n = calls[name](limits)
                if gpu:
                    torch.cuda.synchronize()
                found[name] = (time.perf_counter() - began, n)
            if counted.keep():
                for name, (spent, n) in found.items():
                    seconds[name].append(spent)
                    tokens[name].append(n)
        if counted.kept < 2:
            raise SystemExit(f"only {counted.kept} undisturbed rounds of {o.rounds}; other processes were running")
        usage = usages["ours"]
        mean = statistics.mean(map(len, prompts)) + usage.tokens / count / 2
        by_bytes, by_flop = floors(model, usage, mean, rates)
        floor = max(by_bytes, by_flop)
        with seconds_in([(Slots, "step"), (_Rollout, "_prefill")], o.device) as on_device:
            whole, _ = timed(lambda: calls["ours"](limits))
        host = 1 - on_device() / whole

    rate = {name: statistics.mean(tokens[name]) / statistics.median(seconds[name]) for name in calls}
    lines = [
        [name, f"{statistics.median(x) * 1e3:,.0f}", f"{rate[name]:,.0f}", f"{rate['ours'] / rate[name]:.2f}"]
        for name, x in seconds.items()
    ]
    title = f"{o.model}, {o.prompts} x {o.samples}, lengths {o.lengths}, {o.dtype} beside {o.peer_dtype}"
    print(table([title, "ms", "tokens/s", "ours is x"], lines))
    occupied = usage.tokens / usage.rows
    spent = statistics.median(seconds["ours"])
    print(
        f"ours: {usage.steps} steps of {spent / usage.steps * 1e3:.2f} ms, {spent / floor:.1f} x floor, "
        f"MBU {by_bytes / spent:.0%}, host {host:.1%} of the time, slots {occupied:.0%} occupied, {usage.restarted} restarts, "
        f"{usage.prefilled} prompt tokens; {counted.kept} rounds kept, {counted.dropped} dropped; "
        f"floors from {rates[0] / 1e9:,.0f} GFLOP/s and {rates[1] / 1e9:,.0f} GB/s"
    )
    print_json(
        {
            "bench": "rollout",
            **card(),
            **{
                k: getattr(o, k) for k in ("model", "prompts", "samples", "lengths", "longest", "device", "dtype", "peer_dtype")
            },
            "seconds": {name: quantiles(x) for name, x in seconds.items()},
            "tokens": {name: statistics.mean(x) for name, x in tokens.items()},
            "tokens_per_second": rate,
            "steps": usage.steps,
            "floor_seconds": floor,
            "mbu": by_bytes / spent,
            "host_share": host,
            "occupied": occupied,
            "adapter_overhead": rate["base"] / rate["ours"] - 1,
            "ratio": rate["ours"] / rate["generate + PEFT"],
            "rounds_kept": counted.kept,
            "rounds_dropped": counted.dropped,
        },
        o.json,
    )


if __name__ == "__main__":
    main()
