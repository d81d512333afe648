"""The loop: one step is rollout, reward, advantage, update (GRPO) or climb (ES), then checkpoint and metrics row.

Every random choice is a function of the seed and a counter (step, sequence, position), so there is no generator state to
save, and a resumed run repeats the uninterrupted one bit for bit.
"""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tinylora
from tinylora import prng
from tinylora.adapter import Adapter, base_hash
from tinylora.errors import InputError
from tinylora.files import write_text
from tinylora.model import load_model
from tinylora.model.decoder import Decoder, Matrices
from tinylora.rl.advantages import compute_advantages
from tinylora.rl.config import TrainConfig
from tinylora.rl.consistency import fix_capacity, require_same_policy
from tinylora.rl.es import estimate_gradient, perturbations
from tinylora.rl.evaluation import Scores, evaluate
from tinylora.rl.grader_pool import GraderPool
from tinylora.rl.grading import Verdict
from tinylora.rl.memory import plan_memory
from tinylora.rl.rewards import CONTROLS, Grader, call_reward, load_reward, random_rewards
from tinylora.rl.rollout import Completion, Sampling, rollout
from tinylora.rl.run_directory import V_IN_METRICS, RunDirectory
from tinylora.rl.tasks import Row, load_task
from tinylora.rl.text import Text, fitting_rows
from tinylora.rl.update import Batch, update


@dataclass
class Request:
    """A step's rollout, as it is asked for, and what is known of its answers."""

    order: list[int]  # of the prompts: numbers of training rows
    rows: list[Row]
    prompts: Sequence[Sequence[int]]  # with `generations` completions each
    generations: int
    matrices: Matrices
    row_adapter: list[int] | None  # of each prompt
    sampling: Sampling
    first_sequence: int
    expected: Sequence[float]  # completion length of each prompt
    noise: Tensor | None  # of ES: (completions, groups, u)
    began: float = field(default_factory=time.perf_counter)
    answers: dict[int, str] = field(default_factory=dict)  # by completion
    verdicts: dict[int, Future[Verdict]] = field(default_factory=dict)


ORDER_STREAM = 0x0D3  # names the stream of the prompts' order
VALIDATION = "validation/accuracy"


class Trainer:
    """Everything a run holds. Construction loads and checks all inputs; only then is anything written."""

    def __init__(self, config: TrainConfig, model: Decoder | None = None) -> None:
        """`model` is the config's, where several runs share it."""
        self.config = config
        own = config.reward not in (None, *CONTROLS)
        self.reward = load_reward(config.reward or "") if own else None
        self.reward_name = getattr(self.reward, "__name__", "reward") if own else (config.reward or "accuracy")
        self.model = model or load_model(config.model, config.device, config.dtype)
        self.text = Text(self.model.path)
        task = load_task(config.dataset, config.data, config.prompt_style, needs_answers=not own)
        for note in task.notes:
            print(note)
        if not task.train:
            raise InputError(f"--dataset {config.dataset} has no training rows: it is for evaluation")
        # The built-in task's answers are plain numbers, and need no process of their own.
        pool = GraderPool() if task.has_answers and config.dataset != "builtin" else None
        self.grader = Grader(task.answer_format, pool) if task.has_answers else None
        self.prompts: list[list[int]] = []  # of all rows below
        self.train_rows = self._fitting(task.train, "training")
        self.test_rows = self._fitting(task.test[: config.eval_size], "test") if task.has_answers else []
        held_out = min(config.validation_size, len(self.train_rows) // 10) if config.eval_steps and task.has_answers else 0
        self.validation_rows, self.train_rows = self.train_rows[:held_out], self.train_rows[held_out:]
        if len(self.train_rows) < config.prompts_per_step:
            raise InputError(
                f"--prompts-per-step {config.prompts_per_step}: the task has only {len(self.train_rows)} usable prompts"
            )
        self.steps_per_epoch = len(self.train_rows) // config.prompts_per_step
        self.max_steps = config.max_steps
        if self.max_steps < 1:
            self.max_steps = max(1, math.ceil(config.num_train_epochs * self.steps_per_epoch))
        self.adapter = Adapter(self.model, config.adapter)
        longest, sequences = max(map(len, self.prompts)), config.prompts_per_step * config.num_generations
        if config.exact:
            fix_capacity(self.adapter, self.prompts, self._sampling())
        self.plan = plan_memory(self.model, longest + config.max_completion_length, sequences, config.microbatch_tokens)
        self.expected: dict[int, float] = {}  # mean completion length of each training row, as last sampled
        self.optimizer = torch.optim.Adam([self.adapter.v], lr=config.learning_rate)
        self.step, self.num_tokens = 0, 0
        self.stop = False
        name = f"{self.model.path.name if config.model != 'builtin' else 'builtin'}-{time.strftime('%Y%m%d-%H%M%S')}"
        about = {
            "settings": dataclasses.asdict(config),
            "num_parameters": self.adapter.num_parameters,
            "max_steps": self.max_steps,
            "base_model_hash": base_hash(self.model),
            "versions": {"tinylora": tinylora.__version__, "torch": torch.__version__},
        }
        self.run_directory = RunDirectory(Path(config.output_dir or f"runs/{name}"), about, config.resume)
        if self.run_directory.checkpoint is not None:
            self._restore(*self.run_directory.checkpoint)

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
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            self.evaluate_if_due()
            progress = tqdm(total=self.max_steps, initial=self.step, desc="train", unit="step", dynamic_ncols=True)
            while self.step < self.max_steps and not self.stop:
                row = self._train_step()
                self.keep(row)
                if self.step % self.config.logging_steps == 0:
                    progress.set_postfix_str(_progress_line(row))
                progress.update()
                self.evaluate_if_due()
                if self.dead:
                    break
            progress.close()
        finally:
            signal.signal(signal.SIGINT, before)
            if self.grader is not None:
                self.grader.close()
        self.finish()
        return self.step == self.max_steps

    def finish(self) -> None:
        """Save the adapter, and end the grading processes."""
        if self.grader is not None:
            self.grader.close()
        self.adapter.save(self.run_directory.path / "adapter")

    @property
    def dead(self) -> bool:
        """Whether --dead-steps says to stop."""
        return 0 < self.config.dead_steps <= self.steps_since_gradient()

    def keep(self, row: Row) -> None:
        """Put a step's metrics row, and where one is due its checkpoint, on disk."""
        if self.step % self.config.save_steps == 0 or self.step == self.max_steps or self.stop:
            self._save_checkpoint(row)
        self.run_directory.append(row)

    def steps_since_gradient(self) -> int:
        """How many of the last steps in a row had only dead groups."""
        steps = [r for r in self.run_directory.rows if "reward" in r]
        return next((i for i, row in enumerate(reversed(steps)) if row["frac_reward_zero_std"] < 1), len(steps))

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        tqdm.write("finishing this step; Ctrl-C again to drop it")

    def _train_step(self) -> Row:
        r = self.request()
        completions = rollout(
            self.model,
            r.matrices,
            r.prompts,
            r.generations,
            r.sampling,
            r.first_sequence,
            r.row_adapter,
            cache_bytes=self.plan.cache,
            expected=r.expected,
            on_completion=self.early_grading(r),
        )
        return self.learn(r, completions)

    def request(self) -> Request:
        """The rollout of the next step."""
        c = self.config
        order = self._prompt_order()
        rows = [self.train_rows[i] for i in order]
        prompts = [self.text.prompt(row["prompt"]) for row in rows]
        expected = [self.expected.get(i, c.max_completion_length) for i in order]  # what is new may be long
        count, v, noise, row_adapter, generations = len(prompts) * c.num_generations, None, None, None, c.num_generations
        if c.algorithm == "es":  # every completion has an adapter of its own, so its prompt's keys and values are its own too
            noise = perturbations(self.adapter.v, count, c.seed, self.step)
            v, row_adapter = self.adapter.v + c.sigma * noise, list(range(count))
            prompts = [p for p in prompts for _ in range(c.num_generations)]
            expected = [e for e in expected for _ in range(c.num_generations)]
            generations = 1
        with torch.no_grad():
            matrices = self.adapter.matrices(v)
        return Request(
            order, rows, prompts, generations, matrices, row_adapter, self._sampling(), self.step * count, expected, noise
        )

    def early_grading(self, request: Request) -> Callable[[int, Completion], None] | None:
        """What to call as completions end, where grading has processes of its own and overlaps generation."""
        if self.grader is None or self.grader.pool is None:
            return None
        return lambda i, completion: self._take(request, i, completion)

    def _take(self, request: Request, i: int, completion: Completion) -> None:
        request.answers[i] = self.text.decode(completion.tokens)
        if self.grader is not None:
            request.verdicts[i] = self.grader.submit(request.answers[i], request.rows[i // self.config.num_generations])

    def learn(self, request: Request, completions: list[Completion]) -> Row:
        """The rest of a step: rewards, advantages, update. Returns its metrics row."""
        c, rows, rolled_out = self.config, request.rows, time.perf_counter()
        count = len(completions)
        for i, row_number in enumerate(request.order):
            own = completions[i * c.num_generations : (i + 1) * c.num_generations]
            self.expected[row_number] = sum(len(x.tokens) for x in own) / len(own)
        for i, completion in enumerate(completions):
            if i not in request.answers:
                self._take(request, i, completion)
        extra: dict[str, float] = {}
        graded = [request.verdicts[i].result() for i in range(count)] if request.verdicts else []
        rewards = self._rewards(rows, completions, [request.answers[i] for i in range(count)], graded, extra)
        advantages = compute_advantages(rewards, c.num_generations, c.scale_rewards)
        rewarded = time.perf_counter()

        learning_rate = c.learning_rate * self._schedule(self.step)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        prompts = [p for p in request.prompts for _ in range(request.generations)]
        first: dict[str, float | None]
        if request.noise is not None:
            self.adapter.v.grad = estimate_gradient(request.noise, advantages.values, c.sigma)
            first, grad_norm = {}, self._optimize()
        else:
            first, grad_norm = self._descend(Batch(prompts, completions, advantages))
        self.step += 1
        ended = time.perf_counter()

        lengths = torch.tensor([float(len(x.tokens)) for x in completions])
        finished = torch.tensor([x.finished for x in completions])
        tokens = int(lengths.sum()) + sum(map(len, prompts))
        self.num_tokens += tokens
        v = self.adapter.stored_v().detach()
        if v.numel() > V_IN_METRICS:
            self.run_directory.keep_v(self.step, v)
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "num_tokens": self.num_tokens,
            **first,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "reward": _number(rewards.nanmean()),
            "reward_std": _number(rewards[~rewards.isnan()].std()),
            f"rewards/{self.reward_name}/mean": _number(rewards.nanmean()),
            f"rewards/{self.reward_name}/std": _number(rewards[~rewards.isnan()].std()),
            "frac_reward_zero_std": advantages.zero_std,
            "frac_reward_zero_std/all_right": advantages.all_right,
            "frac_reward_zero_std/all_wrong": advantages.all_wrong,
            "completions/mean_length": lengths.mean().item(),
            "completions/min_length": lengths.min().item(),
            "completions/max_length": lengths.max().item(),
            "completions/clipped_ratio": 1 - finished.double().mean().item(),
            "completions/mean_terminated_length": _number(lengths[finished].mean()),
            **extra,
            "adapter/norm": v.norm().item(),
            **({"adapter/v": v.flatten().tolist()} if v.numel() <= V_IN_METRICS else {}),
            "step_time": ended - request.began,
            "rollout_time": rolled_out - request.began,
            "reward_time": rewarded - rolled_out,
            "update_time": ended - rewarded,
            "tokens_per_second": tokens / (ended - request.began),
            "rollout_tokens_per_second": lengths.sum().item() / (rolled_out - request.began),
        }

    def _descend(self, batch: Batch) -> tuple[dict[str, float | None], float]:
        """GRPO's optimizer steps on a batch: the metrics of the first, and its gradient's norm."""
        c = self.config
        for iteration in range(c.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            metrics = update(self.adapter, batch, c, self.plan)
            if iteration == 0:
                mean, largest = (metrics[f"sampling/sampling_logp_difference/{x}"] for x in ("mean", "max"))
                require_same_policy(mean, largest, self.model.dtype, c.exact, self.step + 1)
            norm = self._optimize()
            if iteration == 0:
                first, grad_norm = metrics, norm
        return first, grad_norm

    def _optimize(self) -> float:
        """One step of the optimizer; returns the gradient's norm, before it is clipped. InputError where it is not finite."""
        gradient = self.adapter.v.grad
        assert gradient is not None
        if not gradient.isfinite().all():
            raise InputError(f"step {self.step + 1}: the gradient of v is not finite; lower --learning-rate")
        norm = gradient.norm().item()
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_([self.adapter.v], self.config.max_grad_norm)
        self.optimizer.step()
        return norm

    def _sampling(self) -> Sampling:
        c = self.config
        temperature = 0.0 if c.algorithm == "es" else c.temperature
        return Sampling(c.max_completion_length, temperature, c.top_p, c.top_k, c.seed, self.text.eos_ids)

    def _prompt_order(self) -> list[int]:
        """This step's prompts: the next of the epoch's permutation."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = prng.permutation(len(self.train_rows), ORDER_STREAM, self.config.seed, epoch)
        return order[place * self.config.prompts_per_step : (place + 1) * self.config.prompts_per_step]

    def _rewards(
        self,
        rows: list[Row],
        completions: list[Completion],
        answers: list[str],
        verdicts: list[Verdict],
        extra: dict[str, float],
    ) -> Tensor:
        """(completions,) float64, NaN where the function said None; what it and the exact match log goes into `extra`."""
        c = self.config
        if verdicts:
            extra["accuracy"] = sum(v.right[c.extractor] for v in verdicts) / len(verdicts)
        if verdicts and c.dataset != "builtin":  # whose completions have one format only
            extra.update({f"accuracy/{e}": sum(v.right[e] for v in verdicts) / len(verdicts) for e in ("strict", "flexible")})
            extra.update({f"grader/{why}": sum(v.failure == why for v in verdicts) for why in ("timeout", "crash")})
        if c.reward is None:
            rewards = [float(v.right[c.extractor]) for v in verdicts]
        elif c.reward == "random":
            rewards = random_rewards(len(completions), c.seed, self.step)
        elif c.reward == "format-only":
            rewards = [float(v.answers["strict"] is not None) for v in verdicts]
        else:
            rewards = self._own_rewards(rows, completions, answers, extra)
        return torch.tensor(rewards, dtype=torch.float64)

    def _own_rewards(
        self, rows: list[Row], completions: list[Completion], answers: list[str], extra: dict[str, float]
    ) -> list[float]:
        """What the user's function says."""
        assert self.reward is not None
        repeated = [row for row in rows for _ in range(self.config.num_generations)]
        logged: dict[str, list[float]] = {}
        columns: dict[str, Any] = {key: [row.get(key) for row in repeated] for key in rows[0] if key != "prompt"}
        rewards = call_reward(
            self.reward,
            len(completions),
            prompts=[row["prompt"] for row in repeated],
            completions=[[{"role": "assistant", "content": answer}] for answer in answers],
            completion_ids=[c.tokens for c in completions],
            trainer_state=SimpleNamespace(global_step=self.step, max_steps=self.max_steps),
            log_extra=lambda column, values: None,  # TRL's table of completions is not written here
            log_metric=lambda name, value: logged.setdefault(name, []).append(float(value)),
            **columns,
        )
        extra.update({name: sum(values) / len(values) for name, values in logged.items()})
        return rewards

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
            matrices = self.adapter.matrices() if step else None  # step 0 is the base model
        tqdm.write(f"step {step}: evaluating on {len(self.test_rows)} held-out problems")
        scores = self._scores(self.test_rows, matrices)
        self.run_directory.save_evaluation(step, dataclasses.asdict(scores))
        return scores

    def _scores(self, rows: list[Row], matrices: Matrices | None) -> Scores:
        c = self.config
        assert self.grader is not None
        return evaluate(self.model, matrices, self.text, rows, self.grader, c.extractor, c.max_completion_length, c.seed)

    def evaluate_if_due(self) -> None:
        step, last = self.step, self.step in (0, self.max_steps)
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
            matrices = self.adapter.matrices() if self.step else None  # step 0 is the base model
        metrics = self._scores(self.validation_rows, matrices).metrics()
        row = {"step": self.step, **{name.replace("eval/", "validation/"): value for name, value in metrics.items()}}
        if before and row[VALIDATION] > max(before.values()):
            self.adapter.save(self.run_directory.path / "best")
            write_text(self.run_directory.path / "best" / "validation.json", json.dumps(row) + "\n")
        self.run_directory.append(row)

    def best_step(self) -> int | None:
        """The step whose adapter is in best/; None where none beat the base, or none was looked for."""
        scores = {r["step"]: r[VALIDATION] for r in self.run_directory.rows if VALIDATION in r}
        best = max(scores.values(), default=0.0)
        step = next((step for step, score in scores.items() if score == best), 0)
        return step or None

    def _save_checkpoint(self, row: Row) -> None:
        state = self.optimizer.state[self.adapter.v]
        tensors = {"v": self.adapter.v, **{f"adam.{k}": state[k] for k in ("step", "exp_avg", "exp_avg_sq")}}
        self.run_directory.save_checkpoint(tensors, row)

    def _restore(self, tensors: dict[str, Tensor], row: Row) -> None:
        self.adapter.load_v(tensors["v"])
        state = {k.removeprefix("adam."): t for k, t in tensors.items() if k.startswith("adam.")}
        self.optimizer.state[self.adapter.v] = {k: t if k == "step" else t.to(self.adapter.v) for k, t in state.items()}
        self.step, self.num_tokens = row["step"], row["num_tokens"]


def _number(x: Tensor) -> float | None:
    """JSON has no NaN."""
    return None if x.isnan() else x.item()


def _progress_line(row: Row) -> str:
    dead = row["frac_reward_zero_std"]
    if dead == 1:
        right = row["frac_reward_zero_std/all_right"]
        kind = "all right" if right == 1 else "all wrong" if right == 0 else "each all right or all wrong"
        said = f"DEAD BATCH: every group is {kind}, nothing to learn from"
    else:
        said = f"{dead:.0%} dead groups"
    reward = "none" if row["reward"] is None else f"{row['reward']:.3f}"
    speed = f"{row['tokens_per_second']:,.0f} tok/s"
    accuracy = f"accuracy {row['accuracy']:.1%}, " if "accuracy" in row else ""
    return f"reward {reward}, {accuracy}{said}, |v| {row['adapter/norm']:.3f}, {speed}"
