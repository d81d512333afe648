"""The base and the task of a run: loaded once for all runs on them."""

from dataclasses import dataclass, replace
from typing import Any

from tinylora.engine.text import Text, fitting_rows, prompting, stored_prompting
from tinylora.errors import InputError
from tinylora.model.decoder import Decoder
from tinylora.model.loader import load_model
from tinylora.rl.config import TrainConfig
from tinylora.rl.data_hashes import hashes_of
from tinylora.rl.solutions import solution
from tinylora.tasks.grader import Grader
from tinylora.tasks.sets import Row, load_task


@dataclass
class Inputs:
    """The base and the task, loaded once for all runs on them."""

    model: Decoder
    text: Text
    grader: Grader | None  # None: no answers, or answers that are the own reward's alone to read
    train_rows: list[Row]
    test_rows: list[Row]
    validation_rows: list[Row]
    prompts: list[list[int]]  # of all rows
    hashes: dict[str, Any]  # of what a run knows of its data, by what is told where it has changed


def load_inputs(config: TrainConfig, stored: dict[str, Any] | None = None) -> Inputs:
    """The model and the task's rows; says which rows are not used. `stored`: what makes the prompts of a run that goes on."""
    asked = prompting(config) if stored is None else stored_prompting(stored)
    model = load_model(config.model, config.device, config.dtype)
    task = load_task(config.dataset, config.data, config.prompt_style, needs_answers=config.needs_answers)
    text, most = Text(model.path, replace(asked, prompt_style=task.style)), config.max_completion_length
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

    grader = task.grader() if config.graded and task.has_answers else None
    train = fitting(task.train, "training")
    test = fitting(task.test[: config.eval_size], "test")
    held_out = min(config.validation_size, len(train) // 10) if config.eval_steps else 0
    validation, train = train[:held_out], train[held_out:]
    if config.algorithm == "sft" and config.sft_data != "own":
        solved = [row for row in train if len(solution(row, text, config.sft_data).tokens) <= most]
        if dropped := len(train) - len(solved):
            print(f"{dropped} solutions are longer than --max-completion-length {most} and are not used")
        train = solved
    read = config.own_reward or config.algorithm == "sft"  # these read the other columns
    hashes = hashes_of({"train": train, "test": test, "validation": validation}, prompts, read)
    return Inputs(model, text, grader, train, test, validation, prompts, hashes)
