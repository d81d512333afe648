"""The loop: steps of one run, or of several that share the base, each followed by its checkpoint and metrics row."""

import dataclasses
import math
import signal
import time
from collections.abc import Container, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from tinylora.evaluation.answers import evaluate
from tinylora.evaluation.scores import Scores, summary
from tinylora.rl.alarms import Alarms
from tinylora.rl.config import TrainConfig, require_alike
from tinylora.rl.es import es_step
from tinylora.rl.grpo import grpo_step
from tinylora.rl.inputs import load_inputs
from tinylora.rl.progress import progress_line
from tinylora.rl.run import Run
from tinylora.rl.sft import sft_step

STEPS = {"grpo": grpo_step, "sft": sft_step, "es": es_step}


class Trainer(Run):
    """A run that loads itself, and goes to its end."""

    def __init__(
        self, config: TrainConfig, like: Run | None = None, resume: bool = False, stored: dict[str, Any] | None = None
    ) -> None:
        """`like`: a run on the same base and task, which are not loaded again. `resume`: the run in output_dir goes on.
        `stored`: what makes its prompts, where it begins beside runs that go on."""
        stored = self.stored_prompt(config.output_dir) if resume and stored is None else stored
        super().__init__(config, load_inputs(config, stored) if like is None else like.inputs, resume)
        self.alarms = Alarms(self.steps())

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the end; returns False where Ctrl-C ended it early, after a whole step. A second Ctrl-C interrupts."""
        train_together([self])
        return self.step == self.max_steps

    def record(self, row: dict[str, Any]) -> None:
        """Keep a finished step."""
        if self.step % self.config.save_steps == 0 or self.step == self.max_steps or self.stop:
            self.save_checkpoint(row)
        self.run_directory.append(row)
        self._evaluate_if_due()

    def _train_step(self) -> dict[str, Any]:
        """One step of this run alone."""
        return STEPS[self.config.algorithm]([self])[0]

    # ---- evaluation -----------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Scores:
        """Scores of the step's adapter on the held-out problems, from the run directory where they are there already."""
        stored = self.run_directory.load_evaluation(step)
        if stored is not None:
            return Scores(**stored)
        tqdm.write(f"step {step}: evaluating on {len(self.inputs.test_rows)} held-out problems")
        scores = self._scores(self.inputs.test_rows, step)
        self.run_directory.save_evaluation(step, dataclasses.asdict(scores))
        return scores

    def before_and_after(self) -> str:
        """The table of the base and of the adapter as it is now."""
        answer_format = self.grader.answer_format if self.grader else ""
        names = ("base" if self.initial_v is None else "initial", "trained")
        return summary(self.evaluate(0), self.evaluate(self.step), answer_format, self.config.temperature, names)

    def _scores(self, rows: list[dict[str, Any]], step: int) -> Scores:
        c = self.config
        with torch.no_grad():
            matrices = self.policy.matrices() if step else self.matrices_before()  # step 0 is the base model, unless it was not
        # On a GPU in the room that training has, where its graphs are; on a CPU in as much as pays.
        cache = self.plan.cache if self.model.device.type == "cuda" else None
        length = c.max_completion_length
        reward = self.rewards.scorer(self.text.render, self.step) if c.own_reward else None
        return evaluate(self.model, matrices, self.text, rows, self.grader, c.extractor, length, c.seed, cache, reward)

    def _evaluate_if_due(self) -> None:
        step, last = self.step, self.step in (0, self.max_steps) or self.dead
        if self.inputs.validation_rows and (last or step % self.config.eval_steps == 0):
            self._validate()
        if self.inputs.test_rows and last and not self.run_directory.has_evaluation_row(step):
            began = time.perf_counter()
            metrics = self.evaluate(step).metrics()
            self.run_directory.append({"step": step, **metrics, "eval_time": time.perf_counter() - began})

    def _validate(self) -> None:
        """Score the held-out training rows; an adapter that beats the base and all before it is kept in best/."""
        before = self._validations()
        if self.step in before:
            return
        began = time.perf_counter()
        metrics = self._scores(self.inputs.validation_rows, self.step).metrics()
        row = {"step": self.step, **{name.replace("eval/", "validation/"): value for name, value in metrics.items()}}
        spent = time.perf_counter() - began
        score = row[self._validation]
        if before and score is not None and score > max((x for x in before.values() if x is not None), default=-math.inf):
            self.policy.save(self.run_directory.path / "best")
            self.run_directory.save_best(row)
        self.run_directory.append({**row, "eval_time": spent})

    def best_step(self) -> int | None:
        """The step whose adapter is in best/; None where none beat the base, or none was looked for."""
        scores = {step: score for step, score in self._validations().items() if score is not None}
        best = max(scores.values(), default=0.0)
        step = next((step for step, score in scores.items() if score == best), 0)
        return step or None

    @property
    def _validation(self) -> str:
        """The metric by which the best adapter is chosen."""
        return "validation/reward" if self.config.own_reward else "validation/accuracy"

    def _validations(self) -> dict[int, float | None]:
        """By step."""
        return {r["step"]: r[self._validation] for r in self.run_directory.rows if self._validation in r}


# ---- several runs at once: adapters of one base whose rollouts go through the engine together -----------------------------


def train_together(trainers: Sequence[Trainer]) -> None:
    """Run trainers of one base, alike but for config.OWN, to their ends: one, or a population.

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
                for said in t.alarms(row):
                    tqdm.write(said)
            if running[0].step % first.config.logging_steps == 0:
                progress.set_postfix_str(progress_line(running[0].last_step))
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

    InputError where they differ in more than config.OWN, have no output_dir of their own, or train whole weights.
    """
    if not configs:
        return []
    require_alike(configs)
    first = configs[0]
    begun = (Run.stored_prompt(c.output_dir) for c in configs if c.output_dir in resume)
    trainers = [Trainer(first, None, first.output_dir in resume, next((p for p in begun if p is not None), None))]
    trainers += [Trainer(c, trainers[0], c.output_dir in resume) for c in configs[1:]]
    train_together(trainers)
    return [t.run_directory.path for t in trainers]
