"""Rewards and advantages beside TRL's own trainer: the same functions on the same completions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylora.rl.advantages import compute_advantages
from tinylora.rl.rewards import Completed, Rewards

FUNCTIONS = '''
import torch

def as_list(completions, **kwargs):
    return [len(c[0]["content"]) % 5 for c in completions]

def as_tensor(completions, **kwargs):
    return torch.tensor([float(sum(map(ord, c[0]["content"])) % 7) for c in completions])

def as_generator(completions, **kwargs):
    return (len(c[0]["content"]) / 3 for c in completions)

def sometimes(completions, **kwargs):
    return [None if len(c[0]["content"]) % 2 else len(c[0]["content"]) % 5 for c in completions]

def by_column(completions, bonus, **kwargs):
    """A column that some rows lack."""
    assert "completion" not in kwargs and "prompt" not in kwargs, "reserved by TRL"
    return [None if b is None else float(b) + len(c[0]["content"]) % 3 for c, b in zip(completions, bonus, strict=True)]

async def waits(completions, **kwargs):
    return [float("nan") if len(c[0]["content"]) % 3 else 2.0 for c in completions]
'''
NAMES = ("as_list", "as_tensor", "as_generator", "sometimes", "by_column", "waits")
# functions, weights, whose spread divides
CASES = [
    (NAMES, (), "group"),
    (NAMES, (1.0, 0.5, -0.25, 2.0, 0.1, 3.0), "batch"),
    (("sometimes",), (), "group"),  # None for whole completions: unscorable ones
    (("waits", "sometimes"), (0.5, 2.0), "none"),
    (("as_tensor",), (0.1,), "group"),
]
ROWS = [{"prompt": f"{n} apples and {n} pears", "completion": "reserved", **({"bonus": n} if n % 2 else {})} for n in range(4)]


@pytest.mark.parametrize(("names", "weights", "scale"), CASES, ids=["all", "weighted", "none", "two with none", "one weighted"])
def test_rewards_and_advantages_are_trls(
    names: tuple[str, ...], weights: tuple[float, ...], scale: str, tmp_path: Path, text_model: Callable[[list[str]], Path]
) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "mine.py").write_text(FUNCTIONS)
    model = text_model([row["prompt"] for row in ROWS])
    ours = Rewards([f"{tmp_path / 'mine.py'}:{name}" for name in names], weights, "flexible", 0)
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=8,
        max_steps=1,
        learning_rate=0.0,
        scale_rewards=scale,
        reward_weights=list(weights) or None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    columns = {key for row in rows for key in row}
    trainer = trl.GRPOTrainer(
        model=str(model),
        reward_funcs=[ours.functions[name] for name in names],
        args=arguments,
        train_dataset=Dataset.from_list([{key: row.get(key) for key in columns} for row in rows]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
    )
    seen: dict[str, Any] = {}
    calculate = trainer._calculate_rewards

    def keep(inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
        seen.update(inputs=inputs, completions=completions, ids=ids, table=calculate(inputs, prompts, completions, ids))
        return seen["table"]

    trainer._calculate_rewards = keep
    generate = trainer._generate_and_score_completions

    def kept(inputs: Any) -> Any:
        return seen.setdefault("batch", generate(inputs))

    trainer._generate_and_score_completions = kept
    trainer.train()

    ours.take_columns(rows)
    asked = [next(row for row in rows if row["prompt"] == given["prompt"]) for given in seen["inputs"]]
    texts = [c[0]["content"] for c in seen["completions"]]
    assert len(set(texts)) > 4
    found = ours(Completed(asked, [""] * len(texts), texts, seen["ids"], {}, 0, 1))
    torch.testing.assert_close(found.table.float(), seen["table"], equal_nan=True, rtol=1e-6, atol=1e-6)  # theirs are float32
    advantages = compute_advantages(found.rewards, 4, scale).values.float()
    # TRL shuffles the batch afterwards, ids and all; a row's tokens find it again. Its groups' mean and spread are float32.
    batch = seen["batch"]
    length = batch["completion_mask"].sum(1).tolist()
    theirs = {}
    for tokens, n, a in zip(batch["completion_ids"].tolist(), length, batch["advantages"].tolist(), strict=True):
        theirs.setdefault(tuple(tokens[:n]), []).append(a)
    mine: dict[tuple[int, ...], list[float]] = {}
    for tokens, a in zip(seen["ids"], advantages.tolist(), strict=True):
        mine.setdefault(tuple(tokens), []).append(a)
    assert mine.keys() == theirs.keys()
    for tokens in mine:
        assert sorted(mine[tokens]) == pytest.approx(sorted(theirs[tokens]), abs=2e-5)
    assert advantages.abs().max() > 0.1
