"""python -m tinylora.evaluate: score a model, and an adapter beside it, on held-out problems."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from tinylora.adapter import load_adapter
from tinylora.cli import run_command, table
from tinylora.errors import InputError
from tinylora.model import load_model
from tinylora.rl.config import BUILTIN_PRESET, flag
from tinylora.rl.evaluation import evaluate, summary
from tinylora.rl.run_directory import v_at_step
from tinylora.rl.statistics import paired_difference, wilson
from tinylora.rl.tasks import load_task
from tinylora.rl.text import Text


@dataclass(frozen=True)
class EvaluateConfig:
    """Answer held-out problems once at temperature 1 and once greedily; with --adapter, the base and the adapter on the same
    problems with the paired difference. The last line is one JSON object."""

    model: str = "builtin"
    """Hugging Face directory or hub id; "builtin" comes with the package."""
    adapter: str | None = None
    """A run's output directory, or its adapter/."""
    adapter_step: int | None = None
    """Score v as it was after this training step of the run in --adapter. Default: the saved adapter."""
    dataset: Literal["builtin", "gsm8k"] | None = None
    """The task; default: builtin for the built-in model, else gsm8k."""
    data: str | None = None
    """Local rows for the task: a JSONL file, or a folder with train.jsonl and test.jsonl."""
    extractor: Literal["strict", "flexible"] = "strict"
    """How eval/accuracy reads an answer; both are always reported."""
    eval_size: int = 1024
    """The first so many test problems."""
    max_completion_length: int | None = None
    """Tokens after which a completion is cut off; default: 40 for the built-in task, else 1024."""
    seed: int = 0
    """Of the sampled answers."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen model; auto: the checkpoint's on CUDA, float32 on a CPU."""

    def __post_init__(self) -> None:
        for name in ("eval_size", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag(name)} {value}: it must be at least 1")
        if self.adapter_step is not None and self.adapter is None:
            raise InputError("--adapter-step needs --adapter, the run it is a step of")


def main(arguments: list[str]) -> int:
    c = tyro.cli(EvaluateConfig, args=arguments, prog="python -m tinylora.evaluate")
    dataset = c.dataset or ("builtin" if c.model == "builtin" else "gsm8k")
    length = c.max_completion_length or (BUILTIN_PRESET["max_completion_length"] if dataset == "builtin" else 1024)
    rows = load_task(dataset, c.data).test[: c.eval_size]
    model = load_model(c.model, c.device, c.dtype)
    text = Text(model.path)
    adapter = load_adapter(c.adapter, model) if c.adapter else None
    if adapter is not None and c.adapter_step is not None:
        v = v_at_step(Path(c.adapter or ""), c.adapter_step)
        adapter.load_v(v.view_as(adapter.v))
    base = evaluate(model, None, text, rows, c.extractor, length, c.seed)
    if adapter is None:
        n = len(rows)
        cells = [(f"sampled, {name}", sum(v), *wilson(sum(v), n)) for name, v in base.sampled.items()] + [
            (f"greedy, {c.extractor}", sum(base.greedy[c.extractor]), *wilson(sum(base.greedy[c.extractor]), n))
        ]
        lines = [[name, f"{right / n:.1%}", f"[{low:.1%}, {high:.1%}]"] for name, right, low, high in cells]
        print(table([f"{n} held-out problems", "accuracy", "95 %"], lines))
        print(json.dumps(base.metrics()))
        return 0
    with torch.no_grad():
        scores = evaluate(model, adapter.matrices(), text, rows, c.extractor, length, c.seed)
    print(summary(base, scores))
    gain, low, high = paired_difference(base.sampled[c.extractor], scores.sampled[c.extractor])
    result = {
        **scores.metrics(),
        **{f"base/{name}": value for name, value in base.metrics().items()},
        "gain": gain,
        "gain_low": low,
        "gain_high": high,
        "num_parameters": adapter.num_parameters,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_command(main)
