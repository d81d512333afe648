"""TRL's GRPOTrainer on an attached model: 13 numbers of the built-in base, on a CPU in about a minute.

    python examples/trl_grpo.py --output-dir runs/trl-grpo [--max-steps 20] [--resume]

TRL's checkpoints hold v beside the base's weights, so resuming needs nothing special; `adapter.save` writes v alone.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import tinylora
from tinylora.tasks.bases import BUILTIN
from tinylora.tasks.builtin import rows


def right_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the number after #### is the row's answer."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    found = [re.search(r"####\s*(-?\d+)", text) for text in texts]
    return [float(f is not None and f[1] == a) for f, a in zip(found, answer, strict=True)]


def main(arguments: list[str] | None = None) -> tinylora.AttachedAdapter:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--completions", type=int, default=64, help="a step, in groups of 8")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(BUILTIN)
    adapter = tinylora.attach(model, tinylora.TinyLoRAConfig(u=13, n_tie="all"))  # freezes the model; v is its one parameter

    problems = [
        {"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"].rpartition("#### ")[2]}
        for row in rows("train", 2048)
    ]
    trainer = GRPOTrainer(
        model=model,
        processing_class=PreTrainedTokenizerFast.from_pretrained(BUILTIN, padding_side="left"),
        reward_funcs=right_answer,
        train_dataset=Dataset.from_list(problems),
        args=GRPOConfig(
            output_dir=str(options.output_dir),
            max_steps=options.max_steps,
            save_steps=options.save_steps,
            per_device_train_batch_size=options.completions,
            num_generations=8,
            max_completion_length=40,
            learning_rate=0.01,  # v is dimensionless and starts at zero; TRL's default of 1e-6 would never move it
            lr_scheduler_type="constant",
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model()  # TRL's way: the whole model with v in it
    adapter.save(options.output_dir / "adapter")  # ours: v alone
    return adapter


if __name__ == "__main__":
    main()
