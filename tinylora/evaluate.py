"""python -m tinylora.evaluate: score a model, and an adapter beside it, on held-out problems."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tinylora.cli import flag, run_command
from tinylora.engine.text import Text, fitting_rows, prompting
from tinylora.errors import InputError
from tinylora.evaluation.answers import RewardOf, answer, versions
from tinylora.evaluation.scores import EXTRACTORS, Scored, compare, comparison_table, lengths_table
from tinylora.files import write_text
from tinylora.loading import load_adapter, model_of, prompt_of, run_of
from tinylora.model.loader import load_model, resolve_model
from tinylora.rl.config import ACCURACY, BUILTIN_PRESET, TrainConfig, has_own, preset
from tinylora.rl.rewards import Rewards
from tinylora.rl.run_directory import v_at_step
from tinylora.tasks.prompts import PromptStyle
from tinylora.tasks.sets import Row, is_known, load_task


@dataclass(frozen=True)
class EvaluateConfig:
    """Answer held-out problems greedily and --num-generations times at --temperature; with --adapter, base and adapter on
    the same problems with the paired difference; with --reward, by that. What was generated once is kept in the cache, so that
    an interrupted evaluation goes on. The last line is one JSON object."""

    model: str | None = None
    """Hugging Face directory, hub id or GGUF file; "builtin" and "builtin-medium" come with the package. Default: the one
    that --adapter was trained on, else builtin."""
    adapter: str | None = None
    """A run's output directory, or its adapter/ or best/."""
    adapter_step: int | None = None
    """Score v as it was after this training step of the run in --adapter. Default: the saved adapter."""
    force_base: bool = False
    """Take --adapter on a base with other weights than it was trained on, as another quantisation has, with a warning."""
    dataset: tuple[str, ...] = ()
    """One or several tasks: builtin, gsm8k, math, math500, aime24, amc23, minerva_math, olympiadbench, or any data with
    columns "prompt" and "answer". Default: what the run in --adapter was trained on, with its --data; without one builtin
    for the built-in models, else gsm8k."""
    data: str | None = None
    """Local rows: a JSONL or parquet file, a save_to_disk folder, a folder with test.jsonl or test.parquet, or a folder of
    such folders named by task."""
    prompt_style: PromptStyle | None = None
    """How a question is asked: qwen-boxed, gsm8k-hash, plain, or raw, which is plain without a chat template. Default: as
    --adapter was trained, else auto: plain for builtin,
    qwen-boxed for the others."""
    chat_template: str | None = None
    """A file with a chat template. Default: as --adapter was trained, else the model's own."""
    chat_template_kwargs: str | None = None
    """What the chat template is given by name, as a JSON object. Default: as --adapter was trained."""
    system_prompt: str | None = None
    """The system message of every prompt, in the place of any other. Default: as --adapter was trained."""
    show_prompt: bool = False
    """Print the first prompt of each task as the model gets it, and stop."""
    extractor: Literal["strict", "flexible"] | None = None
    """How eval/accuracy reads an answer; both are always reported. Default: strict for the built-in models, else flexible."""
    eval_size: int | None = None
    """The first so many test problems; default: 1024 of the built-in task, all of any other."""
    reward: tuple[str, ...] = ()
    """Score by your own reward functions, as in training: "FILE.py:function" or "package.module:function"; "accuracy" is exact
    match of the answer."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in their sum; default: 1 each."""
    num_generations: int = 1
    """Sampled completions of each problem: avg@k and pass@k; 0: greedy answers alone."""
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
        for name, least in (("eval_size", 1), ("max_completion_length", 1), ("num_generations", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{flag(name)} {value}: it must be at least {least}")
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise InputError(f"--reward-weights: {len(self.reward_weights)} weights for {len(self.reward)} rewards")
        if self.temperature <= 0:
            raise InputError(
                f"--temperature {self.temperature}: greedy answers are always given; sampling needs a positive one"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: it must be in (0, 1]")
        if self.adapter_step is not None and self.adapter is None:
            raise InputError("--adapter-step needs --adapter, the run it is a step of")


# ---- the command --------------------------------------------------------------------------------------------------------


def samples(task: str, rows: list[Row], text: Text, policies: dict[str, Scored]) -> list[str]:
    """The lines of samples.jsonl for one task."""
    lines = []
    for who, scored in policies.items():
        for decoding, answers in (("greedy", scored.greedy), ("sampled", scored.sampled)):
            verdicts, rewards = scored.verdicts(decoding), scored.rewards.get(decoding, {})
            for i, (row, given) in enumerate(zip(rows, answers, strict=True)):
                for j, a in enumerate(given):
                    line = {"task": task, "problem": i, "policy": who, "decoding": decoding, "sample": j}
                    line |= {"prompt": text.render(row["prompt"]), **a, "gold": row.get("answer")}
                    if verdicts:
                        v = verdicts[i][j]
                        line |= {e: {"answer": v.answers[e], "right": v.right[e]} for e in EXTRACTORS} | {"failure": v.failure}
                    line |= {"rewards": {name: values[i][j] for name, values in rewards.items()}} if rewards else {}
                    lines.append(json.dumps(line))
    return lines


def _rewards(c: EvaluateConfig, rows: list[Row], text: Text, extractor: str) -> RewardOf | None:
    """What --reward says of answers to these rows; None where it is exact match, which is always told."""
    if not has_own(c.reward):
        return None
    rewards = Rewards(c.reward, c.reward_weights, extractor, c.seed)
    rewards.take_columns(rows)
    return rewards.scorer(text.render)


def main(arguments: list[str]) -> int:
    import tyro  # the commands' alone, as in `train`

    c = tyro.cli(EvaluateConfig, args=arguments, prog="python -m tinylora.evaluate")
    run = run_of(c.adapter).get("settings", {}) if c.adapter else {}
    if not c.dataset and "dataset" in run:
        under = [run["reward"]] if isinstance(run.get("reward"), str) else run.get("reward") or []
        if not c.reward and has_own(under):
            raise InputError(f"--adapter {c.adapter}: trained under an own reward: --reward {' '.join(under)}, or --dataset")
        c = replace(c, dataset=(run["dataset"],), data=c.data or run.get("data"))
    c = replace(c, model=c.model or (model_of(c.adapter) if c.adapter else None) or "builtin")
    model_name = c.model or ""
    names = c.dataset or (preset(model_name).get("dataset", TrainConfig.dataset),)
    extractor = c.extractor or preset(model_name, dataset=names[0]).get("extractor", TrainConfig.extractor)
    own = has_own(c.reward)
    if c.data is not None and names == ("builtin",):
        raise InputError("--data is of other tasks than builtin, which the built-in models have: say --dataset, and --model")
    needed = not own or ACCURACY in c.reward
    asked = prompting(c, prompt_of(c.adapter) if c.adapter else None)
    tasks = {}
    for name in names:  # own rows that the adapter was not trained on are put as they are, unless a style is named
        given = c.prompt_style is not None or is_known(name) or name == run.get("dataset") or asked.prompt_style == "raw"
        style = asked.prompt_style if given else "auto"
        tasks[name] = load_task(name, None if name == "builtin" else c.data, style, ("test",), needed)
    if empty := [name for name, task in tasks.items() if not task.test]:
        raise InputError(f"--dataset {empty[0]}: there are no test rows")
    if c.show_prompt:
        text = Text(resolve_model(model_name), asked)
        print("\n\n".join(f"{name}:\n{text.render(task.test[0]['prompt'])}" for name, task in tasks.items()))
        return 0
    model = load_model(model_name, c.device, c.dtype)
    text = Text(model.path, asked)
    adapter = load_adapter(c.adapter, model, force_base=c.force_base) if c.adapter else None
    if adapter is not None and c.adapter_step is not None:
        v = v_at_step(Path(c.adapter or ""), c.adapter_step)
        adapter.load_v(v.view_as(adapter.v))
    results: dict[str, Any] = {
        "model": c.model,
        "base_model_hash": model.base_hash,
        "num_parameters": adapter.num_parameters if adapter else 0,
        "settings": {k: v for k, v in vars(c).items() if k not in ("output_dir", "show_prompt")},
        "prompt": text.prompting.said(),
        "versions": versions(),
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
        grader = task.grader() if needed or task.known else None
        try:
            kinds = (c.num_generations, c.temperature, c.top_p, c.seed, _rewards(c, fitting, text, extractor))
            base = answer(model, None, text, fitting, grader, length, f"{name}, base", *kinds)
            trained = answer(model, adapter, text, fitting, grader, length, f"{name}, trained", *kinds) if adapter else None
        finally:
            if grader is not None:
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
        lengths = {who: scored.lengths() for who, scored in policies.items()}
        print(
            comparison_table(f"{name} of {c.data}" if c.data else name, len(fitting), comparison)
            + "\n\n"
            + lengths_table(length, c.temperature, lengths)
            + "\n"
        )
        metrics = (trained or base).metrics(extractor)
        results["tasks"][name] = {
            "n": len(fitting),
            "prompts_too_long": dropped,
            "notes": task.notes,
            "answer_format": task.answer_format,
            "grader_failures": failures,
            "scores": comparison,
            "lengths": lengths,
        }
        lines += samples(name, fitting, text, policies)
        last[name] = metrics
        if trained is not None:
            kind = f"avg@{c.num_generations}" if c.num_generations else "greedy"
            pair = comparison[f"{kind}, {'reward' if own else extractor}"]["paired"] or dict.fromkeys(("gain", "low", "high"))
            last[name] = {
                **metrics,
                **{f"base/{key}": value for key, value in base.metrics(extractor).items()},
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
