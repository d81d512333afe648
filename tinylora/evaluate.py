"""python -m tinylora.evaluate: score a model, and an adapter beside it, on held-out problems."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import tinylora
from tinylora.adapter.on_decoder import Adapter
from tinylora.adapter.parts import base_hash
from tinylora.cli import run_command, table
from tinylora.demo.problems import BUILTIN_MODELS
from tinylora.engine.rollout import Sampling
from tinylora.engine.text import Text, fitting_rows
from tinylora.errors import InputError
from tinylora.files import write_text
from tinylora.kernels import dispatch
from tinylora.loading import load_adapter
from tinylora.model.decoder import Decoder
from tinylora.model.loader import load_model, resolve_model
from tinylora.rl.config import BUILTIN_PRESET, flag
from tinylora.rl.evaluation import EVAL_SEED
from tinylora.rl.grader_pool import GraderPool
from tinylora.rl.grading import GRADER_VERSION, Verdict
from tinylora.rl.prompts import PromptStyle
from tinylora.rl.rewards import Grader
from tinylora.rl.run_directory import v_at_step
from tinylora.rl.sample_cache import Answer, digest, judge, sample
from tinylora.rl.statistics import (
    bootstrap,
    mcnemar,
    paired_difference,
    pass_at_k,
    smallest_difference,
    standard_error,
    wilson,
)
from tinylora.rl.tasks import Row, load_task

EXTRACTORS = ("strict", "flexible")


@dataclass(frozen=True)
class EvaluateConfig:
    """Answer held-out problems greedily and --num-generations times at --temperature; with --adapter, base and adapter on
    the same problems with the paired difference. What was generated once is kept in the cache, so that an interrupted
    evaluation goes on. The last line is one JSON object."""

    model: str = "builtin"
    """Hugging Face directory or hub id; "builtin" and "builtin-medium" come with the package."""
    adapter: str | None = None
    """A run's output directory, or its adapter/ or best/."""
    adapter_step: int | None = None
    """Score v as it was after this training step of the run in --adapter. Default: the saved adapter."""
    dataset: tuple[str, ...] = ()
    """One or several tasks: builtin, gsm8k, math, math500, aime24, amc23, minerva_math, olympiadbench, or any data with
    columns "prompt" and "answer". Default: builtin for the built-in models, else gsm8k."""
    data: str | None = None
    """Local rows: a JSONL or parquet file, a save_to_disk folder, a folder with test.jsonl or test.parquet, or a folder of
    such folders named by task."""
    prompt_style: PromptStyle = "auto"
    """How a question is asked: qwen-boxed, gsm8k-hash or plain. auto: gsm8k-hash for gsm8k, qwen-boxed for the others."""
    show_prompt: bool = False
    """Print the first prompt of each task as the model gets it, and stop."""
    extractor: Literal["strict", "flexible"] = "strict"
    """How eval/accuracy reads an answer; both are always reported."""
    eval_size: int | None = None
    """The first so many test problems; default: 1024 of the built-in task, all of any other."""
    num_generations: int = 1
    """Sampled completions of each problem: avg@k and pass@k."""
    temperature: float = 1.0
    """Of the sampled completions."""
    top_p: float = 1.0
    """Nucleus sampling of them."""
    max_completion_length: int | None = None
    """Tokens after which a completion is cut off; default: 40 for the built-in task, else 1024."""
    seed: int = 0
    """Of the sampled answers."""
    output_dir: str | None = None
    """Where results.json and samples.jsonl go; without it there is the table alone."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen model; auto: the checkpoint's on CUDA, float32 on a CPU."""

    def __post_init__(self) -> None:
        for name in ("eval_size", "max_completion_length", "num_generations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag(name)} {value}: it must be at least 1")
        if self.temperature <= 0:
            raise InputError(
                f"--temperature {self.temperature}: greedy answers are always given; sampling needs a positive one"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: it must be in (0, 1]")
        if self.adapter_step is not None and self.adapter is None:
            raise InputError("--adapter-step needs --adapter, the run it is a step of")


@dataclass
class Scored:
    """One policy's answers to the problems of one task."""

    greedy: list[list[Answer]]  # one answer a problem
    sampled: list[list[Answer]]  # num_generations answers a problem
    greedy_verdicts: list[list[Verdict]]
    sampled_verdicts: list[list[Verdict]]

    def greedy_right(self, extractor: str) -> list[bool]:
        return [given[0].right[extractor] for given in self.greedy_verdicts]

    def sampled_right(self, extractor: str) -> list[int]:
        """How many of its sampled answers are right, for each problem."""
        return [sum(v.right[extractor] for v in given) for given in self.sampled_verdicts]

    def metrics(self, extractor: str) -> dict[str, float | int]:
        """The names that a training run's evaluation rows have."""
        n, k = len(self.sampled), len(self.sampled[0])
        mean = {e: sum(self.sampled_right(e)) / (n * k) for e in EXTRACTORS}
        shares = [right / k for right in self.sampled_right(extractor)]
        return {
            "eval/accuracy": mean[extractor],
            "eval/accuracy_strict": mean["strict"],
            "eval/accuracy_flexible": mean["flexible"],
            "eval/accuracy_greedy": sum(self.greedy_right(extractor)) / n,
            "eval/stderr": standard_error([s == 1 for s in shares]) if k == 1 else _variance(shares) ** 0.5 / n**0.5,
            "eval/n": n,
        }


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


# ---- scores and differences ---------------------------------------------------------------------------------------------


def score(values: Sequence[int], k: int) -> dict[str, float]:
    """The accuracy of problems that were right `values` times of k, with its 95 % interval over problems."""
    n = len(values)
    low, high = wilson(sum(values), n) if k == 1 else bootstrap([v / k for v in values])
    return {"accuracy": sum(values) / (n * k), "low": low, "high": high}


def difference(before: Sequence[int], after: Sequence[int], k: int) -> dict[str, float]:
    """after minus before on the same problems, its 95 % interval, and the smallest difference this many would show."""
    changes = [(a - b) / k for b, a in zip(before, after, strict=True)]
    found: dict[str, float] = {"gain": sum(changes) / len(changes)}
    if k == 1:
        old, new = [bool(b) for b in before], [bool(a) for a in after]
        _, found["low"], found["high"] = paired_difference(old, new)
        found["mcnemar_p"] = mcnemar(old, new)
    else:
        found["low"], found["high"] = bootstrap(changes)
    found["smallest_visible"] = smallest_difference(len(changes), _variance(changes))
    return found


def compare(base: Scored, trained: Scored | None) -> dict[str, Any]:
    """Everything the table and results.json say of one task."""
    n, k = len(base.sampled), len(base.sampled[0])
    powers = sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})
    rows: dict[str, Any] = {}
    for extractor in EXTRACTORS:
        for name, size, read in (("greedy", 1, Scored.greedy_right), (f"avg@{k}", k, Scored.sampled_right)):
            old: list[int] = [int(v) for v in read(base, extractor)]
            row: dict[str, Any] = {"base": score(old, size)}
            if trained is not None:
                new = [int(v) for v in read(trained, extractor)]
                row |= {"trained": score(new, size), "paired": difference(old, new, size)}
            rows[f"{name}, {extractor}"] = row
        policies = {"base": base, "trained": trained}
        for j in powers if k > 1 else ():
            rows[f"pass@{j}, {extractor}"] = {
                who: {"accuracy": sum(pass_at_k(v, k, j) for v in scored.sampled_right(extractor)) / n}
                for who, scored in policies.items()
                if scored is not None
            }
    return rows


def report(task: str, n: int, rows: dict[str, Any]) -> str:
    """The table of one task."""
    lines = []
    for name, row in rows.items():
        cells = [name, *(_interval(row[who]) for who in ("base", "trained") if who in row)]
        if "trained" in row:
            pair = row.get("paired")
            p = "" if pair is None or "mcnemar_p" not in pair else f"{pair['mcnemar_p']:.2g}"
            gain = "" if pair is None else f"{pair['gain']:+.1%} [{pair['low']:+.1%}, {pair['high']:+.1%}]"
            cells += [gain, p, "" if pair is None else f"{pair['smallest_visible']:.1%}"]
        lines.append(cells)
    trained = ["trained [95 %]", "paired gain [95 %]", "McNemar p", "smallest visible"]
    return table([f"{task}, {n} problems", "base [95 %]", *(trained if len(lines[0]) > 2 else [])], lines)


def _interval(cell: dict[str, float]) -> str:
    return f"{cell['accuracy']:.1%}" + (f" [{cell['low']:.1%}, {cell['high']:.1%}]" if "low" in cell else "")


# ---- the command --------------------------------------------------------------------------------------------------------


def about_adapter(adapter: Adapter) -> dict[str, Any]:
    """What an adapter's answers depend on, itself included."""
    v = adapter.stored_v().detach().flatten().tolist()
    config = adapter.config
    return {"v": v, "P": adapter.parts.projection_hash, "r": config.r, "basis": config.basis, "groups": adapter.parts.group_of}


def answer(
    c: EvaluateConfig,
    model: Decoder,
    adapter: Adapter | None,
    text: Text,
    rows: list[Row],
    grader: Grader,
    length: int,
    label: str,
) -> Scored:
    """Greedy and sampled answers and their verdicts, from the cache where they are there."""
    prompts = [text.prompt(row["prompt"]) for row in rows]
    about = {
        "base": base_hash(model.digests),
        "adapter": None if adapter is None else about_adapter(adapter),
        "dtype": str(model.dtype),
        "device": model.device.type if model.device.type == "cpu" else torch.cuda.get_device_name(model.device),
        "backend": dispatch.backend(model.device.type),
        "versions": [tinylora.__version__, torch.__version__],
        "tokenizer": digest(text.tokenizer.get_vocab()),  # the same ids may read differently
    }
    with torch.no_grad():
        matrices = None if adapter is None else adapter.matrices()
    seed = EVAL_SEED + c.seed
    greedy = Sampling(length, 0.0, seed=seed, eos_ids=text.eos_ids)
    warm = Sampling(length, c.temperature, c.top_p, seed=seed, eos_ids=text.eos_ids)
    once = sample(model, matrices, text, prompts, 1, greedy, about, f"{label}, greedy")
    many = sample(model, matrices, text, prompts, c.num_generations, warm, about, f"{label}, sampled")
    return Scored(once, many, judge(once, rows, grader), judge(many, rows, grader))


def samples(task: str, rows: list[Row], text: Text, policies: dict[str, Scored]) -> list[str]:
    """The lines of samples.jsonl for one task."""
    lines = []
    for who, scored in policies.items():
        parts = (("greedy", scored.greedy, scored.greedy_verdicts), ("sampled", scored.sampled, scored.sampled_verdicts))
        for decoding, answers, verdicts in parts:
            for i, (row, given, judged) in enumerate(zip(rows, answers, verdicts, strict=True)):
                for j, (a, v) in enumerate(zip(given, judged, strict=True)):
                    line = {"task": task, "problem": i, "policy": who, "decoding": decoding, "sample": j}
                    line |= {"prompt": text.render(row["prompt"]), **a, "gold": row["answer"]}
                    line |= {e: {"answer": v.answers[e], "right": v.right[e]} for e in EXTRACTORS}
                    lines.append(json.dumps({**line, "failure": v.failure}))
    return lines


def main(arguments: list[str]) -> int:
    import tyro  # the commands' alone, as in `train`

    c = tyro.cli(EvaluateConfig, args=arguments, prog="python -m tinylora.evaluate")
    names = c.dataset or (("builtin" if c.model in BUILTIN_MODELS else "gsm8k"),)
    tasks = {name: load_task(name, None if name == "builtin" else c.data, c.prompt_style, ("test",)) for name in names}
    if empty := [name for name, task in tasks.items() if not task.test]:
        raise InputError(f"--dataset {empty[0]}: there are no test rows")
    if c.show_prompt:
        text = Text(resolve_model(c.model))
        print("\n\n".join(f"{name}:\n{text.render(task.test[0]['prompt'])}" for name, task in tasks.items()))
        return 0
    model = load_model(c.model, c.device, c.dtype)
    text = Text(model.path)
    adapter = load_adapter(c.adapter, model) if c.adapter else None
    if adapter is not None and c.adapter_step is not None:
        v = v_at_step(Path(c.adapter or ""), c.adapter_step)
        adapter.load_v(v.view_as(adapter.v))
    results: dict[str, Any] = {
        "model": c.model,
        "base_model_hash": base_hash(model.digests),
        "num_parameters": adapter.num_parameters if adapter else 0,
        "settings": {k: v for k, v in vars(c).items() if k not in ("output_dir", "show_prompt")},
        "versions": {"tinylora": tinylora.__version__, "torch": torch.__version__, "grader": GRADER_VERSION},
        "tasks": {},
    }
    lines: list[str] = []
    last: dict[str, Any] = {}
    for name, task in tasks.items():
        for note in task.notes:
            print(note)
        length = c.max_completion_length or (BUILTIN_PRESET["max_completion_length"] if name == "builtin" else 1024)
        rows = task.test[: c.eval_size or (1024 if name == "builtin" else None)]
        fitting, _ = fitting_rows(rows, text, model.config.max_positions, length)
        if not fitting:
            raise InputError(f"--dataset {name}: no prompt leaves room for --max-completion-length {length} tokens")
        if dropped := len(rows) - len(fitting):
            print(f"{name}: {dropped} prompts leave no room for {length} tokens and are not used")
        grader = Grader(task.answer_format, None if name == "builtin" else GraderPool())
        try:
            base = answer(c, model, None, text, fitting, grader, length, f"{name}, base")
            trained = answer(c, model, adapter, text, fitting, grader, length, f"{name}, trained") if adapter else None
        finally:
            grader.close()
        policies = {"base": base, **({"trained": trained} if trained else {})}
        failures = sum(
            v.failure is not None
            for s in policies.values()
            for given in (*s.greedy_verdicts, *s.sampled_verdicts)
            for v in given
        )
        if failures:
            print(f"{name}: the grader gave up on {failures} completions, which count as wrong")
        comparison = compare(base, trained)
        print(report(name, len(fitting), comparison) + "\n")
        metrics = (trained or base).metrics(c.extractor)
        results["tasks"][name] = {
            "n": len(fitting),
            "prompts_too_long": dropped,
            "notes": task.notes,
            "answer_format": task.answer_format,
            "grader_failures": failures,
            "scores": comparison,
        }
        lines += samples(name, fitting, text, policies)
        last[name] = metrics
        if trained is not None:
            pair = comparison[f"avg@{c.num_generations}, {c.extractor}"]["paired"]
            last[name] = {
                **metrics,
                **{f"base/{key}": value for key, value in base.metrics(c.extractor).items()},
                **{key: pair[short] for key, short in (("gain", "gain"), ("gain_low", "low"), ("gain_high", "high"))},
                "num_parameters": results["num_parameters"],
            }
    if c.output_dir:
        try:
            write_text(Path(c.output_dir) / "samples.jsonl", "".join(line + "\n" for line in lines))
            write_text(Path(c.output_dir) / "results.json", json.dumps(results, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"--output-dir {c.output_dir} cannot be written: {error.strerror}") from None
    print(json.dumps(last[names[0]] if len(names) == 1 else last))
    return 0


if __name__ == "__main__":
    run_command(main)
