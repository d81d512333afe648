"""The loop: steps of one run, or of several that share the base, each followed by its checkpoint and metrics row."""

import dataclasses
import json
import signal
from collections.abc import Container, Sequence
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from tinylora.cli import flag
from tinylora.engine.text import Text, fitting_rows
from tinylora.errors import InputError
from tinylora.evaluation.answers import evaluate
from tinylora.evaluation.scores import Scores
from tinylora.files import write_text
from tinylora.model.decoder import Matrices
from tinylora.model.loader import load_model
from tinylora.rl.config import TrainConfig
from tinylora.rl.es import es_step
from tinylora.rl.grpo import grpo_step
from tinylora.rl.rewards import CONTROLS
from tinylora.rl.run import Inputs, Run
from tinylora.rl.run_directory import Metrics
from tinylora.rl.sft import sft_step, solution
from tinylora.tasks.sets import Row, load_task

STEPS = {"grpo": grpo_step, "sft": sft_step, "es": es_step}
VALIDATION = "validation/accuracy"
# Settings that members may differ in: what is trained and how it is learned, not what a rollout's rows have in common.
OWN = (
    "learning_rate", "seed", "projection_seed", "output_dir", "u", "n_tie", "tie_mode", "param_dtype", "sigma",
    "lr_scheduler_type", "warmup_steps", "max_grad_norm", "max_steps", "num_iterations", "loss_type", "beta", "epsilon",
    "epsilon_high", "scale_rewards", "importance_sampling_cap", "microbatch_tokens", "save_steps", "dead_steps",
)  # fmt: skip


class Trainer(Run):
    """A run that loads itself, and goes to its end."""

    def __init__(self, config: TrainConfig, like: Run | None = None, resume: bool = False) -> None:
        """`like`: a run on the same base and task, which are not loaded again. `resume`: the run in output_dir goes on."""
        super().__init__(config, load_inputs(config) if like is None else like.inputs, resume)

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the end; returns False where Ctrl-C ended it early, after a whole step. A second Ctrl-C interrupts."""
        train_together([self])
        return self.step == self.max_steps

    def record(self, row: Metrics) -> None:
        """Keep a finished step."""
        if self.step % self.config.save_steps == 0 or self.step == self.max_steps or self.stop:
            self.save_checkpoint(row)
        self.run_directory.append(row)
        self._evaluate_if_due()

    def _train_step(self) -> Metrics:
        """One step of this run alone."""
        return STEPS[self.config.algorithm]([self])[0]

    # ---- evaluation -----------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Scores:
        """Scores of the step's adapter on the held-out problems, from the run directory where they are there already."""
        stored = self.run_directory.load_evaluation(step)
        if stored is not None:
            return Scores(**stored)
        with torch.no_grad():
            matrices = self.policy.matrices() if step else None  # step 0 is the base model
        tqdm.write(f"step {step}: evaluating on {len(self.inputs.test_rows)} held-out problems")
        scores = self._scores(self.inputs.test_rows, matrices)
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
        if self.inputs.validation_rows and (last or step % self.config.eval_steps == 0):
            self._validate()
        if self.inputs.test_rows and last and not self.run_directory.has_evaluation_row(step):
            self.run_directory.append({"step": step, **self.evaluate(step).metrics()})

    def _validate(self) -> None:
        """Score the held-out training rows; an adapter that beats the base and all before it is kept in best/."""
        before = {r["step"]: r[VALIDATION] for r in self.run_directory.rows if VALIDATION in r}
        if self.step in before:
            return
        with torch.no_grad():
            matrices = self.policy.matrices() if self.step else None  # step 0 is the base model
        metrics = self._scores(self.inputs.validation_rows, matrices).metrics()
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


def load_inputs(config: TrainConfig) -> Inputs:
    """The model and the task's rows; says which rows are not used."""
    model = load_model(config.model, config.device, config.dtype)
    text, most = Text(model.path), config.max_completion_length
    task = load_task(config.dataset, config.data, config.prompt_style, needs_answers=config.reward in (None, *CONTROLS))
    for note in task.notes:
        print(note)
    if not task.train:
        raise InputError(f"--dataset {config.dataset} has no training rows: it is for evaluation")
    prompts: list[list[int]] = []

    def fitting(rows: list[Row], kind: str) -> list[Row]:
        """The rows whose prompt leaves room for a completion; says how many do not."""
        found, ids = fitting_rows(rows, text, model.config.max_positions, most)
        prompts.extend(ids)
        if dropped := len(rows) - len(found):
            print(f"{dropped} {kind} prompts leave no room for {most} tokens and are not used")
        return found

    grader = task.grader() if task.has_answers else None
    train = fitting(task.train, "training")
    test = fitting(task.test[: config.eval_size], "test") if task.has_answers else []
    held_out = min(config.validation_size, len(train) // 10) if config.eval_steps and task.has_answers else 0
    validation, train = train[:held_out], train[held_out:]
    if config.algorithm == "sft" and config.sft_data != "own":
        solved = [row for row in train if len(solution(row, text, config.sft_data).tokens) <= most]
        if dropped := len(train) - len(solved):
            print(f"{dropped} solutions are longer than --max-completion-length {most} and are not used")
        train = solved
    return Inputs(model, text, grader, train, test, validation, prompts)


# ---- several runs at once: adapters of one base whose rollouts go through the engine together -----------------------------


def train_together(trainers: Sequence[Trainer]) -> None:
    """Run trainers of one base, alike but for OWN, to their ends: one, or a population.

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


def train_population(configs: Sequence[TrainConfig], resume: Container[str | None] = ()) -> list[Path]:
    """Train all members to their ends; returns their run directories, which are as solo runs leave them. Those whose
    output_dir is in `resume` go on where they were.

    InputError where they differ in more than OWN, have no output_dir of their own, or train whole weights.
    """
    if not configs:
        return []
    first = configs[0]
    for c in configs[1:]:
        for f in dataclasses.fields(TrainConfig):
            if f.name not in OWN and getattr(c, f.name) != getattr(first, f.name):
                values = f"{getattr(first, f.name)} and {getattr(c, f.name)}"
                raise InputError(f"{flag(f.name)} {values}: runs that train together must have the same")
    if first.method in ("lora", "full"):
        raise InputError(f"--method {first.method}: a population shares its base, so it is of tinylora or lora_xs adapters")
    if len({c.output_dir for c in configs} - {None}) < len(configs):
        raise InputError("--output-dir: every member of a population needs one of its own")
    trainers = [Trainer(first, resume=first.output_dir in resume)]
    trainers += [Trainer(c, trainers[0], c.output_dir in resume) for c in configs[1:]]
    train_together(trainers)
    return [t.run_directory.path for t in trainers]


def _progress_line(row: Metrics) -> str:
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
