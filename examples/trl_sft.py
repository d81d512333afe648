"""TRL's SFTTrainer on an attached model: worked solutions instead of rewards, 13 numbers, a few seconds on a CPU.

python examples/trl_sft.py --output-dir runs/trl-sft [--max-steps 20] [--resume]
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import tinylora
from tinylora.tasks.bases import BUILTIN
from tinylora.tasks.builtin import rows


def main(arguments: list[str] | None = None) -> tinylora.AttachedAdapter:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(BUILTIN)
    adapter = tinylora.attach(model, tinylora.TinyLoRAConfig(u=13, n_tie="all"))  # freezes the model; v is its one parameter

    solved = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows("train", 2048)
    ]
    trainer = SFTTrainer(
        model=model,
        processing_class=PreTrainedTokenizerFast.from_pretrained(BUILTIN),
        train_dataset=Dataset.from_list(solved),
        args=SFTConfig(
            output_dir=str(options.output_dir),
            max_steps=options.max_steps,
            save_steps=options.save_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=0.01,  # v is dimensionless and starts at zero
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
