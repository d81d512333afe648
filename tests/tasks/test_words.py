"""The words of recipes/real: the files are what the script writes, and no test problem is trained on."""

import json
import re
import runpy
from pathlib import Path

import pytest

from tinylora.tasks.sets import load_task
from tinylora.train import parse

REAL = Path(__file__).parents[2] / "recipes" / "real"
WORDS = runpy.run_path(str(REAL / "words.py"))


@pytest.mark.parametrize(("name", "test", "count"), [("train", False, WORDS["TRAIN"]), ("test", True, WORDS["TEST"])])
def test_the_files_are_what_the_script_writes(name: str, test: bool, count: int) -> None:
    lines = WORDS["rows"](test)
    assert (REAL / "words" / f"{name}.jsonl").read_text() == "".join(lines)
    assert len(set(lines)) == count


def solved(question: str) -> tuple[str, int, int, int]:
    """Kind, both numbers and the answer, worked out from the question alone."""
    a, b = (int(n) for n in re.findall(r"\d+", question))
    kind = "bags" if "bags" in question else "gives" if "gives away" in question else "gets"
    return kind, a, b, {"bags": a * b, "gives": a - b, "gets": a + b}[kind]


def test_answers_are_right_and_test_numbers_are_never_trained_on() -> None:
    seen = []
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (REAL / "words" / f"{name}.jsonl").read_text().splitlines()]
        assert all(row["answer"] == f"#### {solved(row['question'])[3]}" for row in rows)
        seen.append({solved(row["question"])[:3] for row in rows})
    assert not seen[0] & seen[1] and len(seen[1]) > 100


@pytest.mark.parametrize("recipe", sorted(REAL.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_of_real_models(recipe: Path) -> None:
    """They name every setting whose default has changed before, and give at least 64 completions a step."""
    config = parse(["--config", str(recipe)])
    assert config.prompts_per_step * config.num_generations >= 64 and config.max_steps >= 40
    text = recipe.read_text()
    numbers = "method" if config.method == "lora_xs" else "num-parameters"
    named = (numbers, "prompt-style", "extractor", "warmup-steps", "num-generations")
    assert all(f"\n{name} =" in text for name in named)
    if config.data is not None:
        task = load_task(config.dataset, str(REAL.parents[1] / config.data), config.prompt_style)
        assert len(task.train) == 1024 and len(task.test) == config.eval_size == 512
