"""A training step of an attached model beside its bare base and PEFT's TinyLoRA: python -m bench.layers

    bare        forward and backward of the frozen base into its input embeddings: no adapter at all
    attached    the same, and into v: tinylora.attach, 13 numbers
    PEFT        the same through PEFT's TinyLoRA, 13 numbers

transformers' Qwen2 at the shapes of a real model, four layers, one sequence. The vocabulary has 1,024 tokens, so that the head
does not hide what the layers cost. Where --model is a Hugging Face directory or a GGUF file, it is that model's own first four
layers, and its own vocabulary, so that every time has its head in it. Every contender gets input embeddings that require a
gradient, so that all do the base's whole backward. In turns within one process, who begins moves on. Rounds in which other
processes used over 4 % of the machine do not count for the wall clock; processor time is given for all rounds beside it. Peak
extra memory is what one step holds beyond model, adapter and inputs.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import Rounds, card, peak_extra_bytes, print_json, quantiles
from bench.models import CHOICES, model_directory
from bench.ops import MODELS
from tinylora.cli import table

VOCABULARY = 1024


def make_model(name: str, layers: int) -> nn.Module:
    """A frozen model: a random Qwen2 of a real model's shapes, or the first layers of one that is a file."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    if name not in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            path = model_directory(name, Path(scratch), torch.float32, choices=", ".join([*MODELS, CHOICES]))
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = len(model.model.layers)
        return model.requires_grad_(False)
    c = MODELS[name]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
        )
    )
    return model.requires_grad_(False)


def contenders(name: str, layers: int) -> dict[str, nn.Module]:
    from peft import TinyLoraConfig, get_peft_model

    import tinylora
    from tinylora.model.config import PROJECTIONS

    base = make_model(name, layers)
    attached = copy.deepcopy(base)
    adapter = tinylora.attach(attached, tinylora.TinyLoRAConfig(u=13, n_tie="all"))
    settings: dict[str, Any] = {"r": 2, "u": 13, "weight_tying": 1.0, "target_modules": list(PROJECTIONS)}
    peft = get_peft_model(copy.deepcopy(base), TinyLoraConfig(**settings))
    models = {"bare": copy.deepcopy(base), "attached": attached, "PEFT": peft}
    for key, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == (0 if key == "bare" else adapter.num_parameters), (key, trained)
    return models


def step(model: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Forward, loss and backward of one step; gradients of v are dropped, as an optimizer would after its step."""
    x = embeddings.detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    for p in model.parameters():
        p.grad = None
    return loss.detach()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-0.5B", help=", ".join([*MODELS, CHOICES]))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=12, help="undisturbed rounds wanted; at most three times as many are run")
    parser.add_argument("--json", help="a file for the last line too")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    models = contenders(options.model, options.layers)
    config, options.model = models["bare"].config, Path(options.model).name
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(1, options.tokens, config.hidden_size, generator=generator)
    labels = torch.randint(config.vocab_size, (1, options.tokens), generator=generator)
    calls: dict[str, Callable[[], Tensor]] = {k: lambda m=m: step(m, embeddings, labels) for k, m in models.items()}
    losses = {name: call().item() for name, call in calls.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-5 * max(losses.values()), losses  # v = 0: all three are the base
    wall: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    names, load, turn = list(calls), Rounds(warm_up=1), 0
    while load.kept < options.rounds and load.kept + load.dropped < 3 * options.rounds:
        found = []
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            began, busy = time.perf_counter(), time.process_time()
            calls[name]()
            found.append((name, time.perf_counter() - began, time.process_time() - busy))
        turn += 1
        kept = load.keep()
        for name, seconds, busy in found:
            if turn > 1:
                processor[name].append(busy)
            if kept:
                wall[name].append(seconds)
    peaks = {name: peak_extra_bytes(call) for name, call in calls.items()}
    rows, result = [], {}
    for name in names:
        entry: dict[str, Any] = {"processor_seconds": quantiles(processor[name]), "peak_extra_bytes": peaks[name]}
        ratios = [statistics.median(processor[name]) / statistics.median(processor["bare"])]
        if load.kept >= 3:
            entry["seconds"] = quantiles(wall[name])
            ratios.insert(0, statistics.median(wall[name]) / statistics.median(wall["bare"]))
            entry["x_bare"] = ratios[0]
        entry["x_bare_processor"] = ratios[-1]
        result[name] = entry
        clock = f"{entry['seconds']['median'] * 1e3:.0f}" if load.kept >= 3 else ""
        first = f"{ratios[0]:.3f}" if load.kept >= 3 else ""
        busy_ms = f"{entry['processor_seconds']['median'] * 1e3:.0f}"
        rows.append([name, clock, first, busy_ms, f"{ratios[-1]:.3f}", f"{peaks[name] / 1e6:.0f}"])
    title = f"{options.model}, {config.num_hidden_layers} layers, T {options.tokens}"
    print(table([title, "ms", "x bare", "processor ms", "x bare", "peak extra MB"], rows))
    print_json(
        {
            "bench": "layers",
            **card(),
            "model": options.model,
            "layers": config.num_hidden_layers,
            "tokens": options.tokens,
            "contenders": result,
            "rounds_kept": load.kept,
            "rounds_dropped": load.dropped,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
