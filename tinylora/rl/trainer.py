"""The GRPO loop: one step is rollout, reward, advantage, update, then checkpoint and metrics row.

Every random choice is a function of the seed and a counter (step, sequence, position), so there is no generator state to
save, and a resumed run repeats the uninterrupted one bit for bit.
"""

import dataclasses
import math
import signal
import time
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
from tinylora.model import load_model
from tinylora.rl.advantages import compute_advantages
from tinylora.rl.config import TrainConfig
from tinylora.rl.consistency import fix_capacity, require_same_policy
from tinylora.rl.evaluation import Scores, evaluate
from tinylora.rl.memory import plan_memory
from tinylora.rl.rewards import EXTRACTORS, accuracy_reward, call_reward, load_reward, same_number
from tinylora.rl.rollout import Completion, Sampling, rollout
from tinylora.rl.run_directory import V_IN_METRICS, RunDirectory
from tinylora.rl.tasks import Row, load_task
from tinylora.rl.text import Text
from tinylora.rl.update import Batch, update

ORDER_STREAM = 0x0D3  # names the stream of the prompts' order


class Trainer:
    """Everything a run holds. Construction loads and checks all inputs; only then is anything written."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        reward = load_reward(config.reward) if config.reward else accuracy_reward(config.extractor)
        self.reward, self.reward_name = reward, getattr(reward, "__name__", "reward")
        self.model = load_model(config.model, config.device, config.dtype)
        self.text = Text(self.model.path)
        task = load_task(config.dataset, config.data)
        self.train_rows, dropped = self._fitting(task.train)
        self.test_rows, _ = self._fitting(task.test[: config.eval_size])
        if dropped:
            print(f"{dropped} training prompts leave no room for {config.max_completion_length} tokens and are not used")
        if len(self.train_rows) < config.prompts_per_step:
            raise InputError(
                f"--prompts-per-step {config.prompts_per_step}: the task has only {len(self.train_rows)} usable prompts"
            )
        self.steps_per_epoch = len(self.train_rows) // config.prompts_per_step
        self.max_steps = config.max_steps
        if self.max_steps < 1:
            self.max_steps = max(1, math.ceil(config.num_train_epochs * self.steps_per_epoch))
        self.adapter = Adapter(self.model, config.adapter)
        tokens = [self.text.prompt(row["prompt"]) for row in (*self.train_rows, *self.test_rows)]
        longest, sequences = max(map(len, tokens)), config.prompts_per_step * config.num_generations
        if config.exact:
            fix_capacity(self.adapter, tokens, self._sampling())
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

    def _fitting(self, rows: list[Row]) -> tuple[list[Row], int]:
        """The rows whose prompt leaves room for a completion, and how many do not."""
        room = self.model.config.max_positions - self.config.max_completion_length
        fitting = [row for row in rows if len(self.text.prompt(row["prompt"])) <= room]
        return fitting, len(rows) - len(fitting)

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the end; returns False where Ctrl-C ended it early, after a whole step. A second Ctrl-C interrupts."""
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            self._evaluate_if_due()
            progress = tqdm(total=self.max_steps, initial=self.step, desc="train", unit="step", dynamic_ncols=True)
            while self.step < self.max_steps and not self.stop:
                row = self._train_step()
                if self.step % self.config.save_steps == 0 or self.step == self.max_steps or self.stop:
                    self._save_checkpoint(row)
                self.run_directory.append(row)
                if self.step % self.config.logging_steps == 0:
                    progress.set_postfix_str(_progress_line(row))
                progress.update()
                self._evaluate_if_due()
            progress.close()
        finally:
            signal.signal(signal.SIGINT, before)
        self.adapter.save(self.run_directory.path / "adapter")
        return self.step == self.max_steps

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        tqdm.write("finishing this step; Ctrl-C again to drop it")

    def _train_step(self) -> Row:
        c, began = self.config, time.perf_counter()
        order = self._prompt_order()
        rows = [self.train_rows[i] for i in order]
        prompts = [self.text.prompt(row["prompt"]) for row in rows]
        with torch.no_grad():
            matrices = self.adapter.matrices()
        count = len(prompts) * c.num_generations
        expected = [self.expected.get(i, c.max_completion_length) for i in order]  # what is new may be long
        memory: dict[str, Any] = {"cache_bytes": self.plan.cache, "expected": expected}
        completions = rollout(self.model, matrices, prompts, c.num_generations, self._sampling(), self.step * count, **memory)
        for i, row_number in enumerate(order):
            own = completions[i * c.num_generations : (i + 1) * c.num_generations]
            self.expected[row_number] = sum(len(x.tokens) for x in own) / len(own)
        rolled_out = time.perf_counter()

        answers = [self.text.decode(x.tokens) for x in completions]
        extra: dict[str, float] = {}
        rewards = self._rewards(rows, completions, answers, extra)
        advantages = compute_advantages(rewards, c.num_generations, c.scale_rewards)
        rewarded = time.perf_counter()

        learning_rate = c.learning_rate * self._schedule(self.step)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        batch = Batch([p for p in prompts for _ in range(c.num_generations)], completions, advantages)
        for iteration in range(c.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            metrics = update(self.adapter, batch, c, self.plan)
            gradient = self.adapter.v.grad
            assert gradient is not None
            if not gradient.isfinite().all():
                raise InputError(f"step {self.step + 1}: the gradient of v is not finite; lower --learning-rate")
            if iteration == 0:
                first, grad_norm = metrics, gradient.norm().item()
                mean, largest = (metrics[f"sampling/sampling_logp_difference/{x}"] for x in ("mean", "max"))
                require_same_policy(mean, largest, self.model.dtype, c.exact, self.step + 1)
            if c.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_([self.adapter.v], c.max_grad_norm)
            self.optimizer.step()
        self.step += 1
        ended = time.perf_counter()

        lengths = torch.tensor([float(len(x.tokens)) for x in completions])
        finished = torch.tensor([x.finished for x in completions])
        tokens = int(lengths.sum()) + sum(map(len, prompts)) * c.num_generations
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
            "step_time": ended - began,
            "rollout_time": rolled_out - began,
            "reward_time": rewarded - rolled_out,
            "update_time": ended - rewarded,
            "tokens_per_second": tokens / (ended - began),
            "rollout_tokens_per_second": lengths.sum().item() / (rolled_out - began),
        }

    def _sampling(self) -> Sampling:
        c = self.config
        return Sampling(c.max_completion_length, c.temperature, c.top_p, c.top_k, c.seed, self.text.eos_ids)

    def _prompt_order(self) -> list[int]:
        """This step's prompts: the next of the epoch's permutation."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = prng.permutation(len(self.train_rows), ORDER_STREAM, self.config.seed, epoch)
        return order[place * self.config.prompts_per_step : (place + 1) * self.config.prompts_per_step]

    def _rewards(self, rows: list[Row], completions: list[Completion], answers: list[str], extra: dict[str, float]) -> Tensor:
        """(completions,) float64, NaN where the function said None; what it and the exact match log goes into `extra`."""
        repeated = [row for row in rows for _ in range(self.config.num_generations)]
        logged: dict[str, list[float]] = {}
        columns: dict[str, Any] = {key: [row[key] for row in repeated] for key in rows[0] if key != "prompt"}
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
        extract = EXTRACTORS[self.config.extractor]
        right = [same_number(extract(answer), row["answer"]) for answer, row in zip(answers, repeated, strict=True)]
        extra["accuracy"] = sum(right) / len(right)
        extra.update({name: sum(values) / len(values) for name, values in logged.items()})
        return torch.tensor(rewards, dtype=torch.float64)

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
        c = self.config
        tqdm.write(f"step {step}: evaluating on {len(self.test_rows)} held-out problems")
        scores = evaluate(self.model, matrices, self.text, self.test_rows, c.extractor, c.max_completion_length, c.seed)
        self.run_directory.save_evaluation(step, dataclasses.asdict(scores))
        return scores

    def _evaluate_if_due(self) -> None:
        c, step = self.config, self.step
        every = c.eval_steps > 0 and step % c.eval_steps == 0
        due = self.test_rows and (step in (0, self.max_steps) or every)
        if due and not self.run_directory.has_evaluation_row(step):
            self.run_directory.append({"step": step, **self.evaluate(step).metrics()})

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
    return f"reward {reward}, accuracy {row['accuracy']:.1%}, {said}, |v| {row['adapter/norm']:.3f}, {speed}"
