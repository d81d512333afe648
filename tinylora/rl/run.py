"""The state of one run, and what a step may do to it.

Every random choice is a function of the seed and a counter (step, sequence, position), so there is no generator state to
save, and a resumed run repeats the uninterrupted one bit for bit.
"""

import dataclasses
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

import tinylora
from tinylora import prng
from tinylora.engine.rollout import Sampling
from tinylora.errors import InputError
from tinylora.rl.config import LEARNING_RATES, RELATIVE_STEP, TrainConfig
from tinylora.rl.consistency import fix_capacity
from tinylora.rl.initial import initial_adapter
from tinylora.rl.inputs import Inputs
from tinylora.rl.memory import plan_memory
from tinylora.rl.policy import Policy, adapter_of, baseline_of, new_policy
from tinylora.rl.rewards import Rewards
from tinylora.rl.run_directory import V_IN_METRICS, Metrics, RunDirectory, is_step, stored_prompt

INITIAL = "init"  # the adapter that a run started from, in its directory
ORDER_STREAM = 0x0D3  # names the stream of the prompts' order


def learning_rate_of(policy: Policy, c: TrainConfig) -> float:
    """The run's, or where it names none the policy's own. InputError where its factors say nothing."""
    if c.learning_rate is not None:
        return c.learning_rate
    if baseline_of(policy):
        return LEARNING_RATES[c.method]
    change = adapter_of(policy).change_per_rate()
    if not change > 0:
        raise InputError("the adapted weights' factors are zero, so no rate follows from them: give --learning-rate")
    return RELATIVE_STEP / change


class Run:
    """What one run holds: settings, the policy and its optimizer, the rows, the counters, its directory."""

    def __init__(self, config: TrainConfig, inputs: Inputs, resume: bool) -> None:
        """Checks all settings against the inputs; only then is anything written."""
        self.config, self.inputs = config, inputs
        self.model, self.text, self.grader = inputs.model, inputs.text, inputs.grader
        self.train_rows = inputs.train_rows
        self.rewards = Rewards(config.reward, config.reward_weights, config.extractor, config.seed)
        self.rewards.take_columns([*inputs.train_rows, *inputs.validation_rows, *inputs.test_rows])
        if len(self.train_rows) < config.prompts_per_step:
            raise InputError(
                f"--prompts-per-step {config.prompts_per_step}: the task has only {len(self.train_rows)} usable prompts"
            )
        self.steps_per_epoch = len(self.train_rows) // config.prompts_per_step
        self.max_steps = config.max_steps
        if self.max_steps < 1:
            self.max_steps = max(1, math.ceil(config.num_train_epochs * self.steps_per_epoch))
        self.initial_v: Tensor | None = None  # of --init-adapter
        if config.init_adapter is None:
            self.policy: Policy = new_policy(self.model, config)
        else:
            kept = Path(config.output_dir or "") / INITIAL  # what the run began with; the original may be gone by now
            self.policy = initial_adapter(self.model, config, kept if resume and kept.is_dir() else Path(config.init_adapter))
            self.initial_v = self.policy.v.detach().clone()
        prompt = self.text.prompting.said()
        if not baseline_of(self.policy):
            adapter_of(self.policy).parts.prompt = prompt
        longest, sequences = max(map(len, inputs.prompts)), config.prompts_per_step * config.num_generations
        if config.exact and self.model.capacity is None:
            fix_capacity(self.policy, inputs.prompts, self.sampling())
        self.plan = plan_memory(self.model, longest + config.max_completion_length, sequences, config.microbatch_tokens)
        self.expected: dict[int, float] = {}  # mean completion length of each training row, as last sampled
        self.learning_rate = learning_rate_of(self.policy, config)
        self.optimizer = torch.optim.Adam(self.policy.named_parameters().values(), lr=self.learning_rate)
        self.step, self.num_tokens = 0, 0
        self.rounding: float | None = None  # of the base's log-probs: `consistency.measured_rounding`, by the first step
        self.stop = False
        about = {
            "settings": dataclasses.asdict(config),
            "num_parameters": self.policy.num_parameters,
            "max_steps": self.max_steps,
            "base_model_hash": self.model.base_hash,
            "data": inputs.hashes,
            "reward_sources": self.rewards.sources,
            "prompt": prompt,
            "versions": {"tinylora": tinylora.__version__, "torch": torch.__version__},
        }
        self.run_directory = RunDirectory(Path(config.output_dir or config.new_directory()), about, resume)
        if self.initial_v is not None and not (self.run_directory.path / INITIAL).is_dir():
            self.policy.save(self.run_directory.path / INITIAL)
        if self.run_directory.checkpoint is not None:
            self._restore(*self.run_directory.checkpoint)

    @staticmethod
    def stored_prompt(output_dir: str | None) -> Metrics | None:
        """What makes the prompts of the run that is there; None where none says so."""
        return stored_prompt(Path(output_dir)) if output_dir else None

    # ---- where it is ----------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.step < self.max_steps and not self.stop and not self.dead

    @property
    def dead(self) -> bool:
        """Whether --dead-steps says to stop."""
        return 0 < self.config.dead_steps <= self.steps_since_gradient()

    def steps(self) -> list[Metrics]:
        """The metrics rows of its steps."""
        return [r for r in self.run_directory.rows if is_step(r)]

    @property
    def last_step(self) -> Metrics:
        return next(r for r in reversed(self.run_directory.rows) if is_step(r))

    def steps_since_gradient(self) -> int:
        """How many of the last steps in a row had only dead groups."""
        steps = (r for r in reversed(self.run_directory.rows) if is_step(r))
        return sum(1 for _ in itertools.takewhile(lambda r: r.get("frac_reward_zero_std", 0) >= 1, steps))

    def sampling(self) -> Sampling:
        c = self.config
        return Sampling(c.max_completion_length, c.temperature, c.top_p, c.top_k, c.seed, self.text.eos_ids)

    def prompt_order(self) -> list[int]:
        """This step's prompts: the next of the epoch's permutation."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = prng.permutation(len(self.train_rows), ORDER_STREAM, self.config.seed, epoch)
        return order[place * self.config.prompts_per_step : (place + 1) * self.config.prompts_per_step]

    def matrices_before(self) -> list[Tensor | None] | None:
        """Of the adapter that the run started from; None: it started from the base."""
        return None if self.initial_v is None else adapter_of(self.policy).matrices(self.initial_v)

    # ---- how it moves on ------------------------------------------------------------------------------------------------

    def descend(self) -> Metrics:
        """One step of Adam on the gradients that are there; InputError where one is not finite."""
        parameters = list(self.policy.named_parameters().values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        if not math.isfinite(norm):
            raise InputError(f"step {self.step + 1}: the gradient is not finite; lower --learning-rate")
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        learning_rate = self.learning_rate * self._schedule(self.step)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        return {"grad_norm": norm, "learning_rate": learning_rate}

    def advance(self, tokens: int) -> tuple[Metrics, Metrics]:
        """Count a finished step: the metrics that begin its row, and those of the adapter."""
        self.step += 1
        self.num_tokens += tokens
        head = {"step": self.step, "epoch": self.step / self.steps_per_epoch, "num_tokens": self.num_tokens}
        if baseline_of(self.policy):
            return head, {}
        adapter = adapter_of(self.policy)
        v = adapter.stored_v().detach()
        if v.numel() > V_IN_METRICS:
            self.run_directory.keep_v(self.step, v)
        own = {"adapter/v": v.flatten().tolist()} if v.numel() <= V_IN_METRICS else {}
        return head, {"adapter/norm": v.norm().item(), "adapter/relative_change": adapter.relative_change(), **own}

    def _schedule(self, step: int) -> float:
        """The learning rate's factor at 0-based `step`."""
        c = self.config
        if step < c.warmup_steps:
            return (step + 1) / c.warmup_steps
        done = (step - c.warmup_steps) / max(1, self.max_steps - c.warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[c.lr_scheduler_type]

    # ---- its checkpoint -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, row: Metrics) -> None:
        named = self.policy.named_parameters()
        tensors = dict(named)
        for name, p in named.items():
            tensors |= {f"adam.{k}.{name}": self.optimizer.state[p][k] for k in ("step", "exp_avg", "exp_avg_sq")}
        self.run_directory.save_checkpoint(tensors, row)

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor], row: Metrics) -> None:
        for name, p in self.policy.named_parameters().items():
            p.copy_(tensors[name])
            state = {k: tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {k: t if k == "step" else t.to(p) for k, t in state.items()}
        self.step, self.num_tokens = row["step"], row["num_tokens"]
