"""The loop: steps of one run, or of several that share the base, each followed by its checkpoint and metrics row.

Every random choice is a function of the seed and a counter (step, sequence, position), so there is no generator state to
save, and a resumed run repeats the uninterrupted one bit for bit.
"""

import dataclasses
import itertools
import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

import tinylora
from tinylora import prng
from tinylora.adapter.on_decoder import Adapter
from tinylora.adapter.parts import base_hash
from tinylora.engine.rollout import Sampling
from tinylora.engine.text import Text, fitting_rows
from tinylora.errors import InputError
from tinylora.evaluation.answers import evaluate
from tinylora.evaluation.scores import Scores
from tinylora.files import write_text
from tinylora.model.decoder import Decoder, Matrices
from tinylora.model.loader import load_model
from tinylora.rl.baselines import Baseline
from tinylora.rl.config import TrainConfig
from tinylora.rl.consistency import fix_capacity
from tinylora.rl.es import es_step
from tinylora.rl.memory import plan_memory
from tinylora.rl.rewards import CONTROLS, load_reward
from tinylora.rl.run_directory import V_IN_METRICS, RunDirectory, is_step
from tinylora.rl.sft import sft_step, solution
from tinylora.rl.step import grpo_step
from tinylora.rl.update import Policy
from tinylora.tasks.builtin import BUILTIN_MODELS
from tinylora.tasks.grader import Grader, GraderPool
from tinylora.tasks.sets import Row, load_task

ORDER_STREAM = 0x0D3  # names the stream of the prompts' order
VALIDATION = "validation/accuracy"


class Trainer:
    """Everything a run holds. Construction loads and checks all inputs; only then is anything written."""

    def __init__(self, config: TrainConfig, like: "Trainer | None" = None) -> None:
        """`like`: a trainer of the same base and task, which are not loaded again."""
        self.config = config
        own = config.reward not in (None, *CONTROLS)
        self.reward = load_reward(config.reward or "") if own else None
        self.reward_name = getattr(self.reward, "__name__", "reward") if own else (config.reward or "accuracy")
        self.model: Decoder
        self.text: Text
        self.grader: Grader | None
        self.prompts: list[list[int]] = []  # of all rows
        self.train_rows: list[Row]
        self.test_rows: list[Row]
        self.validation_rows: list[Row]
        if like is None:
            self._load(own)
        else:
            self.model, self.text, self.grader, self.prompts = like.model, like.text, like.grader, like.prompts
            self.train_rows, self.test_rows, self.validation_rows = like.train_rows, like.test_rows, like.validation_rows
        if len(self.train_rows) < config.prompts_per_step:
            raise InputError(
                f"--prompts-per-step {config.prompts_per_step}: the task has only {len(self.train_rows)} usable prompts"
            )
        self.steps_per_epoch = len(self.train_rows) // config.prompts_per_step
        self.max_steps = config.max_steps
        if self.max_steps < 1:
            self.max_steps = max(1, math.ceil(config.num_train_epochs * self.steps_per_epoch))
        self.policy: Policy
        if config.method in ("lora", "full"):
            self.policy = Baseline(self.model, config.method, config.r, config.target_modules, config.seed)
        else:
            self.policy = Adapter(self.model, config.adapter)
        longest, sequences = max(map(len, self.prompts)), config.prompts_per_step * config.num_generations
        if config.exact and isinstance(self.policy, Adapter) and like is None:
            fix_capacity(self.policy, self.prompts, self.sampling())
        self.plan = plan_memory(self.model, longest + config.max_completion_length, sequences, config.microbatch_tokens)
        self.expected: dict[int, float] = {}  # mean completion length of each training row, as last sampled
        self.optimizer = torch.optim.Adam(self.policy.named_parameters().values(), lr=config.learning_rate)
        self.step, self.num_tokens = 0, 0
        self.stop = False
        name = f"{config.model if config.model in BUILTIN_MODELS else self.model.path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        about = {
            "settings": dataclasses.asdict(config),
            "num_parameters": self.policy.num_parameters,
            "max_steps": self.max_steps,
            "base_model_hash": base_hash(self.model.digests),
            "versions": {"tinylora": tinylora.__version__, "torch": torch.__version__},
        }
        self.run_directory = RunDirectory(Path(config.output_dir or f"runs/{name}"), about, config.resume)
        if self.run_directory.checkpoint is not None:
            self._restore(*self.run_directory.checkpoint)

    def _load(self, own_reward: bool) -> None:
        """The model and the task's rows."""
        config = self.config
        self.model = load_model(config.model, config.device, config.dtype)
        self.text = Text(self.model.path)
        task = load_task(config.dataset, config.data, config.prompt_style, needs_answers=not own_reward)
        for note in task.notes:
            print(note)
        if not task.train:
            raise InputError(f"--dataset {config.dataset} has no training rows: it is for evaluation")
        # The built-in task's answers are plain numbers, and need no process of their own.
        pool = GraderPool() if task.has_answers and config.dataset != "builtin" else None
        self.grader = Grader(task.answer_format, pool) if task.has_answers else None
        self.train_rows = self._fitting(task.train, "training")
        self.test_rows = self._fitting(task.test[: config.eval_size], "test") if task.has_answers else []
        held_out = min(config.validation_size, len(self.train_rows) // 10) if config.eval_steps and task.has_answers else 0
        self.validation_rows, self.train_rows = self.train_rows[:held_out], self.train_rows[held_out:]
        if config.algorithm == "sft" and config.sft_data != "own":
            most, before = config.max_completion_length, len(self.train_rows)
            solved = [len(solution(row, self.text, config.sft_data).tokens) <= most for row in self.train_rows]
            self.train_rows = [row for row, good in zip(self.train_rows, solved, strict=True) if good]
            if dropped := before - len(self.train_rows):
                print(f"{dropped} solutions are longer than --max-completion-length {most} and are not used")

    def _fitting(self, rows: list[Row], kind: str) -> list[Row]:
        """The rows whose prompt leaves room for a completion; says how many do not."""
        positions, completion = self.model.config.max_positions, self.config.max_completion_length
        fitting, ids = fitting_rows(rows, self.text, positions, completion)
        self.prompts += ids
        if dropped := len(rows) - len(fitting):
            print(f"{dropped} {kind} prompts leave no room for {self.config.max_completion_length} tokens and are not used")
        return fitting

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the end; returns False where Ctrl-C ended it early, after a whole step. A second Ctrl-C interrupts."""
        train_together([self])
        return self.step == self.max_steps

    @property
    def running(self) -> bool:
        return self.step < self.max_steps and not self.stop and not self.dead

    @property
    def dead(self) -> bool:
        """Whether --dead-steps says to stop."""
        return 0 < self.config.dead_steps <= self.steps_since_gradient()

    def record(self, row: Row) -> None:
        """Keep a finished step."""
        if self.step % self.config.save_steps == 0 or self.step == self.max_steps or self.stop:
            self._save_checkpoint(row)
        self.run_directory.append(row)
        self._evaluate_if_due()

    @property
    def last_step(self) -> Row:
        return next(r for r in reversed(self.run_directory.rows) if is_step(r))

    def steps_since_gradient(self) -> int:
        """How many of the last steps in a row had only dead groups."""
        steps = (r for r in reversed(self.run_directory.rows) if is_step(r))
        return sum(1 for _ in itertools.takewhile(lambda r: r.get("frac_reward_zero_std", 0) >= 1, steps))

    def _train_step(self) -> Row:
        """One step of this run alone."""
        return STEPS[self.config.algorithm]([self])[0]

    def descend(self) -> Row:
        """One step of Adam on the gradients that are there; InputError where one is not finite."""
        parameters = list(self.policy.named_parameters().values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        if not math.isfinite(norm):
            raise InputError(f"step {self.step + 1}: the gradient is not finite; lower --learning-rate")
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        learning_rate = self.config.learning_rate * self._schedule(self.step)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        return {"grad_norm": norm, "learning_rate": learning_rate}

    def advance(self, tokens: int) -> tuple[Row, Row]:
        """Count a finished step: the metrics that begin its row, and those of the adapter."""
        self.step += 1
        self.num_tokens += tokens
        head = {"step": self.step, "epoch": self.step / self.steps_per_epoch, "num_tokens": self.num_tokens}
        if isinstance(self.policy, Baseline):
            return head, {}
        v = self.policy.stored_v().detach()
        if v.numel() > V_IN_METRICS:
            self.run_directory.keep_v(self.step, v)
        own = {"adapter/v": v.flatten().tolist()} if v.numel() <= V_IN_METRICS else {}
        return head, {"adapter/norm": v.norm().item(), "adapter/relative_change": self.policy.relative_change(), **own}

    def sampling(self) -> Sampling:
        c = self.config
        return Sampling(c.max_completion_length, c.temperature, c.top_p, c.top_k, c.seed, self.text.eos_ids)

    def prompt_order(self) -> list[int]:
        """This step's prompts: the next of the epoch's permutation."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = prng.permutation(len(self.train_rows), ORDER_STREAM, self.config.seed, epoch)
        return order[place * self.config.prompts_per_step : (place + 1) * self.config.prompts_per_step]

    def _schedule(self, step: int) -> float:
        """The learning rate's factor at 0-based `step`."""
        c = self.config
        if step < c.warmup_steps:
            return (step + 1) / c.warmup_steps
        done = (step - c.warmup_steps) / max(1, self.max_steps - c.warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[c.lr_scheduler_type]

    # ---- evaluation and state -------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Scores:
        """Scores of the step's adapter on the held-out problems, from the run directory where they are there already."""
        stored = self.run_directory.load_evaluation(step)
        if stored is not None:
            return Scores(**stored)
        with torch.no_grad():
            matrices = self.policy.matrices() if step else None  # step 0 is the base model
        tqdm.write(f"step {step}: evaluating on {len(self.test_rows)} held-out problems")
        scores = self._scores(self.test_rows, matrices)
        self.run_directory.save_evaluation(step, dataclasses.asdict(scores))
        return scores

    def _scores(self, rows: list[Row], matrices: Matrices | None) -> Scores:
        c = self.config
        assert self.grader is not None
        # On a GPU in the room that training has, where its graphs are; on a CPU in as much as pays.
        cache = self.plan.cache if self.model.device.type == "cuda" else None
        length = c.max_completion_length
        return evaluate(self.model, matrices, self.text, rows, self.grader, c.extractor, length, c.seed, cache)

    def _evaluate_if_due(self) -> None:
        step, last = self.step, self.step in (0, self.max_steps) or self.dead
        if self.validation_rows and (last or step % self.config.eval_steps == 0):
            self._validate()
        if self.test_rows and last and not self.run_directory.has_evaluation_row(step):
            self.run_directory.append({"step": step, **self.evaluate(step).metrics()})

    def _validate(self) -> None:
        """Score the held-out training rows; an adapter that beats the base and all before it is kept in best/."""
        before = {r["step"]: r[VALIDATION] for r in self.run_directory.rows if VALIDATION in r}
        if self.step in before:
            return
        with torch.no_grad():
            matrices = self.policy.matrices() if self.step else None  # step 0 is the base model
        metrics = self._scores(self.validation_rows, matrices).metrics()
        row = {"step": self.step, **{name.replace("eval/", "validation/"): value for name, value in metrics.items()}}
        if before and row[VALIDATION] > max(before.values()):
            self.policy.save(self.run_directory.path / "best")
            write_text(self.run_directory.path / "best" / "validation.json", json.dumps(row) + "\n")
        self.run_directory.append(row)

    def best_step(self) -> int | None:
        """The step whose adapter is in best/; None where none beat the base, or none was looked for."""
        scores = {r["step"]: r[VALIDATION] for r in self.run_directory.rows if VALIDATION in r}
        best = max(scores.values(), default=0.0)
        step = next((step for step, score in scores.items() if score == best), 0)
        return step or None

    def _save_checkpoint(self, row: Row) -> None:
        named = self.policy.named_parameters()
        tensors = dict(named)
        for name, p in named.items():
            tensors |= {f"adam.{k}.{name}": self.optimizer.state[p][k] for k in ("step", "exp_avg", "exp_avg_sq")}
        self.run_directory.save_checkpoint(tensors, row)

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor], row: Row) -> None:
        for name, p in self.policy.named_parameters().items():
            p.copy_(tensors[name])
            state = {k: tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {k: t if k == "step" else t.to(p) for k, t in state.items()}
        self.step, self.num_tokens = row["step"], row["num_tokens"]


STEPS = {"grpo": grpo_step, "sft": sft_step, "es": es_step}


def train_together(trainers: Sequence[Trainer]) -> None:
    """Run trainers of one base, alike but for population.OWN, to their ends: one, or a population.

    Ctrl-C ends them after a whole step; a second one interrupts."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if trainers[0].stop:
            raise KeyboardInterrupt
        for t in trainers:
            t.stop = True
        tqdm.write("finishing this step; Ctrl-C again to drop it")

    first = trainers[0]
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for t in trainers:
            t._evaluate_if_due()
        progress = tqdm(
            total=max(t.max_steps for t in trainers), initial=first.step, desc="train", unit="step", dynamic_ncols=True
        )
        while running := [t for t in trainers if t.running]:
            for t, row in zip(running, STEPS[first.config.algorithm](running), strict=True):
                t.record(row)
            if running[0].step % first.config.logging_steps == 0:
                progress.set_postfix_str(_progress_line(running[0].last_step))
            progress.update()
        progress.close()
    finally:
        signal.signal(signal.SIGINT, before)
        if first.grader is not None:
            first.grader.close()
    for t in trainers:
        t.policy.save(t.run_directory.path / "adapter")


def _progress_line(row: Row) -> str:
    speed = f"{row['tokens_per_second']:,.0f} tok/s"
    norm = f"|v| {row['adapter/norm']:.3f}, " if "adapter/norm" in row else ""
    if "frac_reward_zero_std" not in row:
        return f"loss {row['loss']:.4f}, {norm}{speed}"
    dead = row["frac_reward_zero_std"]
    if dead == 1:
        right = row["frac_reward_zero_std/all_right"]
        kind = "all right" if right == 1 else "all wrong" if right == 0 else "each all right or all wrong"
        said = f"DEAD BATCH: every group is {kind}, nothing to learn from"
    else:
        said = f"{dead:.0%} dead groups"
    reward = "none" if row["reward"] is None else f"{row['reward']:.3f}"
    accuracy = f"accuracy {row['accuracy']:.1%}, " if "accuracy" in row else ""
    return f"reward {reward}, {accuracy}{said}, {norm}{speed}"
