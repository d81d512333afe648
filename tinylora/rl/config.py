"""Every setting of a training run. Names are TRL's and PEFT's where the same thing exists there."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tinylora.adapter.config import TinyLoRAConfig
from tinylora.cli import flag
from tinylora.errors import InputError
from tinylora.model.config import PROJECTIONS
from tinylora.tasks.bases import BUILTIN_MODELS
from tinylora.tasks.known import KNOWN
from tinylora.tasks.prompts import PromptStyle

# The built-in task's recipe: what `python -m tinylora.train` uses where nothing else is said. Everywhere else the defaults
# below hold; docs/real-models.md has what was tried for them on two real models, and what that does not show.
BUILTIN_PRESET: dict[str, Any] = {
    "dataset": "builtin",
    "u": 13,
    "n_tie": "all",
    "learning_rate": 0.01,
    "extractor": "strict",
    "warmup_steps": 0,
    "num_generations": 8,
    "max_steps": 40,
    "max_completion_length": 40,
    # The weakest of seeds 0-4 ended at 68 % sampled, 88 % greedy with one pass over each batch and rewards scaled by group.
    "num_iterations": 2,
    "scale_rewards": "batch",
}

ACCURACY = "accuracy"  # exact match of the answer, as a reward
CONTROLS = ("random", "format-only")  # rewards that know nothing of the answer: what a gain has to be measured against
BUILT_IN_REWARDS = (ACCURACY, *CONTROLS)
GONE = ("show_prompt", "dry_run", "resume")  # settings in the config.json of older versions: now flags of the command alone

# Where nothing is said: full at a tenth of LoRA's rate (Schulman et al. 2025); on the built-in base larger ones.
LEARNING_RATES = {"lora": 1e-5, "full": 1e-6}
# Of tinylora and lora_xs: |change| / |W| of all adapted weights by a step of Adam, at the rate used where none is given.
RELATIVE_STEP = 0.002
BUILTIN_LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}


# Settings that runs which train together may differ in: what is trained and how, not what a rollout's rows have in common.
OWN = (
    "learning_rate", "seed", "projection_seed", "output_dir", "u", "n_tie", "tie_mode", "param_dtype", "sigma",
    "lr_scheduler_type", "warmup_steps", "max_grad_norm", "max_steps", "num_iterations", "loss_type", "beta", "epsilon",
    "epsilon_high", "kl_reference", "scale_rewards", "importance_sampling_cap", "microbatch_tokens", "save_steps", "dead_steps",
)  # fmt: skip


def preset(
    model: str = "builtin", method: str = "tinylora", algorithm: str = "grpo", dataset: str | None = None
) -> dict[str, Any]:
    """These, and the defaults of a run with them where they are not TrainConfig's own. How answers are read is the task's: of
    any other than the built-in one as real models' are."""
    builtin = model in BUILTIN_MODELS
    settings = {**(BUILTIN_PRESET if builtin else {}), "model": model, "method": method, "algorithm": algorithm}
    if dataset is not None:
        settings["dataset"] = dataset
        if dataset != "builtin":
            settings.pop("extractor", None)
    rates = BUILTIN_LEARNING_RATES if builtin else LEARNING_RATES
    if method in rates:
        settings["learning_rate"] = rates[method]
    if algorithm == "es":
        settings["temperature"] = 0.0
    if algorithm == "sft" and builtin:  # as many examples a step as GRPO samples
        settings |= {"prompts_per_step": 128, "num_generations": 1}
    return settings


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run, as its config.json has them. InputError for those that cannot be."""

    model: str = "builtin"
    """Hugging Face directory or hub id of a Qwen2/2.5, Qwen3 or Llama 3.x model, or a GGUF file of one (on the hub
    owner/repo/FILE.gguf); "builtin" and "builtin-medium" come with the package."""
    dataset: str = "gsm8k"
    """The task: builtin, gsm8k, math (levels 3-5); or any data with a column "prompt": a hub id, or any name with --data."""
    data: str | None = None
    """Local rows for the task: a JSONL or parquet file, a folder with train and test of either, or a save_to_disk folder."""
    prompt_style: PromptStyle = "auto"
    """How a question is asked: qwen-boxed, gsm8k-hash, plain, or raw, which is plain without a chat template. auto: plain for
    builtin, qwen-boxed for the others, and own rows as they are."""
    chat_template: str | None = None
    """A file with a chat template, in the place of the model's own."""
    chat_template_kwargs: str | None = None
    """What the chat template is given by name, as a JSON object: '{"enable_thinking": false}'."""
    system_prompt: str | None = None
    """The system message of every prompt, in the place of any other."""
    reward: tuple[str, ...] = ()
    """Your own reward functions with TRL's signature, "FILE.py:function" or "package.module:function"; "accuracy" is exact
    match of the answer, and the default. Controls: "random" is a fair coin, "format-only" pays for any answer in the format
    asked for."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in their sum; default: 1 each."""
    extractor: Literal["strict", "flexible"] = "flexible"
    """How an answer is read for the reward: strict in the format asked for; flexible the last \\boxed, else the last number."""

    algorithm: Literal["grpo", "sft", "es"] = "grpo"
    """grpo; sft: next-token loss on solutions; es: evolution strategies, one perturbed adapter a row, no backward pass."""
    method: Literal["tinylora", "lora_xs", "lora", "full"] = "tinylora"
    """What is trained: tinylora; lora_xs: a whole r x r core for each module; lora (PEFT) and full: plain baselines."""
    init_adapter: str | None = None
    """Start from a saved adapter, also of another task: a run, its adapter/ or best/, or PEFT's TINYLORA directory. Its rank,
    tying and P are the defaults then."""
    sigma: float = 0.02
    """ES: standard deviation of the perturbations of v."""
    sft_data: Literal["given", "own", "foreign"] = "given"
    """SFT on the rows' solutions; on the base's own correct samples; or (builtin) on solutions in a style foreign to it."""

    r: int = 2
    """Rank of the frozen factors; of LoRA."""
    u: int = 13
    """Trained numbers per group. (Like n_tie and tie_mode, of tinylora alone.)"""
    n_tie: int | Literal["all"] = "all"
    """Modules that share one group's numbers; "all" is a single group."""
    tie_mode: Literal["tiled", "structured"] = "tiled"
    """tiled: neighbours in depth share, whatever their type; structured: neighbours of the same type share."""
    target_modules: tuple[str, ...] = PROJECTIONS
    """The projections to adapt."""
    basis: Literal["top", "bottom", "random"] = "top"
    """Singular directions the factors hold. top is the method; bottom and random are controls."""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision v is used and stored in; the optimizer's copy is float32."""

    learning_rate: float | None = None
    """Adam's. Default: the rate at which a step moves the adapted weights by 0.2 % of their norm, which this model's own
    factors say (TRL's 1e-6 would not move v); of lora 1e-5, of full 1e-6."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    max_grad_norm: float = 0.0
    """Clip the gradient of v to this norm; 0 is off."""
    num_train_epochs: float = 3.0
    """Passes over the training prompts, unless --max-steps is given."""
    max_steps: int = -1
    """Number of steps; -1: by --num-train-epochs."""

    prompts_per_step: int = 16
    """PROMPTS per step."""
    num_generations: int = 8
    """Completions sampled for each prompt."""
    num_iterations: int = 1
    """Optimizer steps on each batch of completions."""
    max_completion_length: int = 1024
    """Tokens after which a completion is cut off."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities."""
    top_p: float = 1.0
    """Nucleus sampling; under 1 the importance ratio is biased, as in TRL."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off. Biased like --top-p."""

    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """Normalisation of the token losses: per completion, by the budget, or by the step's tokens."""
    beta: float = 0.0
    """Weight of the KL to --kl-reference (the adapter off, or as it was: no second model)."""
    kl_reference: Literal["base", "initial"] = "base"
    """What the KL is to: the base model, or the adapter of --init-adapter."""
    epsilon: float = 0.2
    """Clip range of the probability ratio."""
    epsilon_high: float | None = None
    """Upper clip range; default: epsilon."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation divides the advantages."""
    importance_sampling_cap: float = 2.0
    """Cap of the per-token weight p(update)/p(rollout); 0 turns the correction off."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss."""
    microbatch_tokens: int | None = None
    """Most tokens in one forward and backward of the update; changes memory and speed, not the result. Default: by the free
    memory."""
    exact: bool = False
    """Make the update's log-probs the rollout's bit for bit (on a CPU): every attention covers the same number of keys.
    Slower with long completions. Checked before the first step, and refused where this machine does not keep to it."""

    eval_size: int = 1024
    """Held-out problems scored before the first and after the last step; 0: no evaluation."""
    eval_steps: int = 0
    """Every so many steps (also --eval-every) score --validation-size held-out training rows and keep the best adapter in
    best/; 0: never."""
    validation_size: int = 256
    """Training rows that --eval-steps holds out and scores. The test rows choose nothing."""
    dead_steps: int = 10
    """Stop after so many steps in a row whose groups all had equal rewards, so that nothing was learned; 0: never."""
    save_steps: int = 1
    """Checkpoint every so many steps. A checkpoint is a few hundred bytes."""
    logging_steps: int = 1
    """Update the progress line every so many steps; metrics.jsonl gets every step."""
    log_completions: int = 128
    """The first so many completions of each step are written to completions/step-NNNNNN.jsonl; 0: none."""
    sample_steps: int = 10
    """Print one completion, of the first prompt, every so many steps; 0: never."""

    seed: int = 0
    """Of the prompts' order, of sampling, and of P unless --projection-seed is given."""
    projection_seed: int | None = None
    """Seed of the random projections P. The draw of P moves results by several points: report several."""
    output_dir: str | None = None
    """Where the run goes; default: runs/MODEL-DATE-TIME."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen model; auto: the checkpoint's on CUDA, float32 on a CPU."""

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, dict):  # a table of a settings file
            object.__setattr__(self, "chat_template_kwargs", json.dumps(self.chat_template_kwargs))
        self.adapter  # noqa: B018  checks r, u, tying and dtype
        if self.reward is None or isinstance(self.reward, str):  # one reward, as older runs name it
            object.__setattr__(self, "reward", () if self.reward is None else (self.reward,))
        if len(set(self.reward)) < len(self.reward):
            raise InputError(f"--reward {' '.join(self.reward)}: each can be given once; weigh it with --reward-weights")
        if self.reward_weights and len(self.reward_weights) != max(1, len(self.reward)):
            raise InputError(f"--reward-weights: {len(self.reward_weights)} weights for {max(1, len(self.reward))} rewards")
        if not all(math.isfinite(w) for w in self.reward_weights):
            raise InputError("--reward-weights: they must be finite")
        for name in (
            "prompts_per_step",
            "num_iterations",
            "max_completion_length",
            "save_steps",
            "logging_steps",
            "validation_size",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{flag(name)} {getattr(self, name)}: it must be at least 1")
        for name in (
            "learning_rate",
            "warmup_steps",
            "max_grad_norm",
            "beta",
            "epsilon",
            "top_k",
            "eval_size",
            "eval_steps",
            "dead_steps",
            "log_completions",
            "sample_steps",
            "importance_sampling_cap",
        ):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{flag(name)} {getattr(self, name)}: it must not be negative")
        if self.microbatch_tokens is not None and self.microbatch_tokens < 1:
            raise InputError(f"--microbatch-tokens {self.microbatch_tokens}: it must be at least 1")
        if self.method in ("lora", "full"):
            if self.algorithm == "es":
                raise InputError(f"--algorithm es perturbs an adapter in every row, --method {self.method} has none there")
            if self.exact or self.param_dtype != "float32":
                raise InputError(f"--exact and --param-dtype are for --method tinylora and lora_xs, not {self.method}")
            if self.init_adapter is not None:
                raise InputError(f"--init-adapter is for --method tinylora and lora_xs, not {self.method}")
            if self.method == "full" and self.beta > 0:
                raise InputError("--beta with --method full would need a second model: use 0")
        if self.algorithm == "es" and (self.beta > 0 or self.num_generations % 2 or self.sigma <= 0):
            raise InputError("--algorithm es needs --beta 0, an even --num-generations (pairs) and a positive --sigma")
        if self.kl_reference == "initial" and self.init_adapter is None:
            raise InputError("--kl-reference initial: there is no --init-adapter; without one the run starts from the base")
        if self.sft_data == "foreign" and self.dataset != "builtin":
            raise InputError("--sft-data foreign: only the builtin task has solutions in another style")
        if self.num_generations < (1 if self.algorithm == "sft" else 2):
            raise InputError(f"--num-generations {self.num_generations}: an advantage needs at least 2 completions a prompt")
        if self.temperature <= 0 and not (self.algorithm == "es" and self.temperature == 0):
            raise InputError(f"--temperature {self.temperature}: training samples, so it must be positive")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: it must be in (0, 1]")
        if self.max_steps < 1 and self.num_train_epochs <= 0:
            raise InputError(f"--num-train-epochs {self.num_train_epochs}: it must be positive, or give --max-steps")
        if self.dataset == "builtin" and self.data is not None:
            raise InputError("--data needs a task that reads rows: add --dataset gsm8k, or any name for rows of your own")
        if "format-only" in self.reward and self.dataset not in ("builtin", *KNOWN):
            raise InputError(f"--reward format-only: {self.dataset} asks for no format of answers")

    def new_directory(self) -> str:
        """Where a run goes that names no --output-dir."""
        return f"runs/{Path(self.model).absolute().name}-{time.strftime('%Y%m%d-%H%M%S')}"

    @property
    def own_reward(self) -> bool:
        """Whether a function of the user's is among the rewards: their sum is then what is evaluated."""
        return has_own(self.reward)

    @property
    def graded(self) -> bool:
        """Whether exact match tells something: own answers beside an own reward are that one's to read."""
        return self.dataset == "builtin" or self.dataset in KNOWN or not self.own_reward or ACCURACY in self.reward

    @property
    def needs_answers(self) -> bool:
        """Whether a row without a gold answer is of no use."""
        return not self.own_reward

    @property
    def adapter(self) -> TinyLoRAConfig:
        xs = self.method == "lora_xs"
        return TinyLoRAConfig(
            r=self.r,
            u=self.r**2 if xs else self.u,
            n_tie=1 if xs else self.n_tie,
            tie_mode="tiled" if xs else self.tie_mode,
            projection="identity" if xs else "random",
            target_modules=tuple(self.target_modules),
            seed=self.seed,
            projection_seed=self.projection_seed,
            param_dtype=self.param_dtype,
            basis=self.basis,
        )


def has_own(rewards: Sequence[str]) -> bool:
    """Whether a function of the user's is among the rewards of these names."""
    return any(spec not in BUILT_IN_REWARDS for spec in rewards)


def stored_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json as this version holds them: one that it lacks is what an older version did."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k not in GONE}
    if unknown := values.keys() - {f.name for f in fields(TrainConfig)}:
        raise InputError(f"config.json has settings of another version of tinylora: {', '.join(sorted(unknown))}")
    return asdict(TrainConfig(**values))


def require_alike(configs: Sequence[TrainConfig]) -> None:
    """InputError where runs that are to train together differ in more than OWN, lack directories, or train whole weights."""
    first = configs[0]
    for c in configs[1:]:
        for f in fields(TrainConfig):
            if f.name not in OWN and getattr(c, f.name) != getattr(first, f.name):
                values = f"{getattr(first, f.name)} and {getattr(c, f.name)}"
                raise InputError(f"{flag(f.name)} {values}: runs that train together must have the same")
    if first.method in ("lora", "full"):
        raise InputError(f"--method {first.method}: a population shares its base, so it is of tinylora or lora_xs adapters")
    if len({c.output_dir for c in configs} - {None}) < len(configs):
        raise InputError("--output-dir: every member of a population needs one of its own")
