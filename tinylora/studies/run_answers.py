"""A run's first held-out problems, answered greedily by its base and by what it trained."""

from pathlib import Path
from typing import Any

from tinylora.engine.text import Text, fitting_rows, stored_prompting
from tinylora.errors import InputError
from tinylora.evaluation.answers import answer
from tinylora.loading import load_adapter, run_of
from tinylora.model.loader import load_model
from tinylora.tasks.bases import BUILTIN_MODELS
from tinylora.tasks.sets import load_task

PROBLEMS = 6  # whose answers a run's page shows


def greedy_answers(path: Path, settings: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, bool]]]]:
    """(question, gold answer, (text, right) of base and trained). InputError where the base or the adapter is not at hand."""
    base, data, method = settings["model"], settings["dataset"], settings.get("method")
    if base not in BUILTIN_MODELS and not Path(base).is_dir():
        raise InputError(f"the base {base} is no directory here, and a report downloads nothing")
    if data != "builtin" and settings["data"] is None:
        raise InputError(f"the dataset {data} is not local, and a report downloads nothing")
    if method == "lora":
        raise InputError("the engine does not load PEFT's LoRA adapters")
    model = load_model(base, settings["device"], settings["dtype"])
    asked = stored_prompting(run_of(path).get("prompt") or {"prompt_style": settings["prompt_style"]})
    text, length = Text(model.path, asked), settings["max_completion_length"]
    task = load_task(data, settings["data"], asked.prompt_style, ("test",))
    rows, _ = fitting_rows(task.test[:PROBLEMS], text, model.config.max_positions, length)
    if not rows or not task.has_answers:
        raise InputError("the task has no test rows with answers")
    full = load_model(str(path / "adapter"), settings["device"]) if method == "full" else None  # whose adapter/ is a model
    trained = (full, None) if full is not None else (model, load_adapter(path, model))
    grader = task.grader()
    try:
        scored = [answer(m, adapter, text, rows, grader, length, "answers") for m, adapter in ((model, None), trained)]
    finally:
        grader.close()
    right = [s.greedy_right(settings["extractor"]) for s in scored]
    return [
        (
            row["prompt"][-1]["content"],
            row["answer"],
            [(s.greedy[i][0]["completion"], r[i]) for s, r in zip(scored, right, strict=True)],
        )
        for i, row in enumerate(rows)
    ]
