"""What a run would train, hold, take and ask, from its settings and the model's config.json alone: no weights are read.

Times are floors, not promises: matrix FLOP and bytes moved at the rates of one H200 (770 TFLOP/s in bf16 and 4.3 TB/s were
measured on one with plain library calls), with every completion as long as it may get.
"""

import math
from pathlib import Path

from tinylora.engine.text import Text, prompting
from tinylora.model.config import PROJECTIONS, ModelConfig
from tinylora.model.loader import load_config, resolve_model
from tinylora.rl.config import LEARNING_RATES, RELATIVE_STEP, TrainConfig
from tinylora.tasks.sets import Row, load_task, sample_row

FLOPS, BANDWIDTH = 770e12, 4.3e12  # of an H200
PROMPT_TOKENS = 200  # of a prompt, where there is no tokenizer to ask


def config_of(model: str, beside: str | None) -> tuple[ModelConfig, Path | None]:
    """The model's config and where it lies; for a recipe, from configs/NAME.json beside it, without network (and place)."""
    shipped = Path(beside).parent / "configs" / f"{model.split('/')[-1]}.json" if beside else None
    if shipped is not None and shipped.exists() and not Path(model).expanduser().exists():
        return ModelConfig.load(shipped), None
    path = resolve_model(model, weights=False)
    return load_config(path), path


def plan(c: TrainConfig, model: ModelConfig, text: Text | None, row: Row | None) -> str:
    """The plan, line by line. `row` is the first of the task, `text` the model's tokenizer, where there are such."""
    groups = c.adapter.groups(model.num_layers)
    count, stored = trained_numbers(c, model), {"float32": 4}.get(c.param_dtype, 2)
    shapes = [model.shape(name) for name in PROJECTIONS]
    matrix = model.num_layers * sum(n * k for n, k in shapes)  # weights that every token is multiplied with
    embedding, weights = model.vocab_size * model.hidden_size, all_weights(model)
    size = {"auto": model.dtype}.get(c.dtype, c.dtype)
    width = 4 if size == "float32" else 2
    adapted = [model.shape(name) for name in PROJECTIONS if name in c.target_modules]
    factors = model.num_layers * sum(c.r * (n + k) for n, k in adapted) * width
    kv = model.cache_bytes(width)
    prompt = len(text.prompt(row["prompt"])) if text and row else PROMPT_TOKENS
    completions = c.prompts_per_step * c.num_generations
    length = prompt + c.max_completion_length
    tokens = completions * length
    per_token = matrix + embedding  # multiply-adds of one forward, the LM head included
    decode = c.max_completion_length * (weights * width + completions * (prompt + c.max_completion_length / 2) * kv) / BANDWIDTH
    decode = max(decode, 2 * per_token * completions * c.max_completion_length / FLOPS)
    prefill = 2 * per_token * c.prompts_per_step * prompt / FLOPS
    passes = 4 + (2 if c.beta else 0)  # FLOP a weight and token: forward, dX, and the base's forward for the KL
    update = c.num_iterations * passes * per_token * tokens / FLOPS
    shown = "\n".join(f"    {m['role']}: {m['content']}" for m in row["prompt"]) if row else ""
    if text and row:
        shown = "    " + text.render(row["prompt"]).replace("\n", "\n    ")
    adapted_as = f"{len(groups)}, in {max(groups.values()) + 1} groups ({c.tie_mode}, n_tie {c.adapter.n_tie}), basis {c.basis}"
    shape = f", r {c.r}, u {c.adapter.u}"
    if c.method in LEARNING_RATES:
        held = _bytes(4 * weights + 12 * count)
        adapted_as = f"every weight, by --method {c.method}" if c.method == "full" else f"{len(groups)}, by LoRA of rank {c.r}"
        shape = f"; a second model, its gradients and Adam's state take {held} more"
    rate = f"{RELATIVE_STEP:.1%} of |W| a step" if c.learning_rate is None else f"{c.learning_rate:g}"
    return "\n".join(
        [
            f"model            {c.model}: {model.num_layers} layers, {weights:,} weights in {size}",
            f"adapted modules  {adapted_as}",
            f"trained numbers  {count} ({count * stored} bytes in {c.param_dtype}){shape}",
            f"memory           weights {_bytes(weights * width)}, factors {_bytes(factors)}, "
            f"keys and values {_bytes(kv)} a token, {_bytes(kv * tokens)} with every completion at its longest",
            f"a step           {c.prompts_per_step} prompts x {c.num_generations} completions, at most {tokens:,} tokens "
            f"({'' if text and row else 'about '}{prompt} of each in the prompt)",
            f"                 floors on an H200, everything at its longest: rollout {decode + prefill:.2f} s, "
            f"update {update:.2f} s",
            f"learning rate    {rate} {c.lr_scheduler_type}, {c.warmup_steps} warm-up steps, beta {c.beta:g}, "
            f"{'no clipping of gradients' if not c.max_grad_norm else f'gradients clipped at {c.max_grad_norm:g}'}",
            f"length           {f'{c.max_steps} steps' if c.max_steps > 0 else f'{c.num_train_epochs:g} epochs'}",
            f"task             {c.dataset}, reward {', '.join(c.reward) or f'exact match, {c.extractor}'}; the prompt:",
            shown,
        ]
    )


def trained_numbers(c: TrainConfig, model: ModelConfig) -> int:
    """What this method trains on such a model."""
    if c.method == "lora":
        return model.num_layers * sum(c.r * sum(model.shape(name)) for name in c.target_modules)
    return all_weights(model) if c.method == "full" else c.adapter.num_parameters(model.num_layers)


def all_weights(model: ModelConfig) -> int:
    """With its biases and norms."""
    shapes = {name: model.shape(name) for name in PROJECTIONS}
    biased = (PROJECTIONS[:3] if model.qkv_bias else ()) + (PROJECTIONS[3:4] if model.o_bias else ())
    layer = sum(n * k for n, k in shapes.values()) + sum(shapes[name][0] for name in biased)
    layer += 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    ends = model.vocab_size * model.hidden_size * (1 if model.tied_head else 2) + model.hidden_size
    return model.num_layers * layer + ends


def _bytes(n: float) -> str:
    power = min(4, int(math.log(max(n, 1), 1000)))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def dry_run(c: TrainConfig, recipe: str | None) -> str:
    """The plan of these settings; `recipe` is the --config file they came from."""
    model, path = config_of(c.model, recipe)
    text = Text(path, prompting(c)) if path is not None and (path.is_file() or (path / "tokenizer.json").exists()) else None
    asked = None if c.data is not None else sample_row(c.dataset, c.prompt_style)  # the hub is not asked
    return plan(c, model, text, asked or first_row(c))


def first_prompt(c: TrainConfig) -> str:
    """The first training prompt as the model gets it."""
    row = first_row(c)
    text = Text(resolve_model(c.model, weights=False), prompting(c))
    return text.render(row["prompt"]) if row else "there are no training rows"


def first_row(c: TrainConfig) -> Row | None:
    """The task's first training row; None where it has none."""
    task = load_task(c.dataset, c.data, c.prompt_style, ("train",), needs_answers=c.needs_answers)
    return task.train[0] if task.train else None
