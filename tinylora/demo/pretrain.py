"""Rebuild a built-in base model, or a larger one by the same recipe: python -m tinylora.demo.pretrain --output-dir DIR

A Qwen2 of 0.8 M parameters (2.7 M and 6.3 M with --size) learns the problems of `problems.py`, 40 % of them answered carefully
and 60 % hastily, with the loss on the answer alone. It ends up able to solve them and usually not doing so. Pretraining trains
every weight, so it uses the transformers model; everything else in this project uses ours.
"""

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tinylora.tasks.builtin import CAREFUL_SHARE, NAMES, THINGS, Problem, problems

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Whole words with their spaces are one token, so that a problem is 17 tokens and a careful answer about 22.
PIECES = r"#### | has | [a-z]+\. |Gets |Loses |\. |How many\?|[A-Z][a-z]+|\d|."


SIZES = {"small": (128, 4), "medium": (192, 6), "large": (256, 8)}  # hidden size, a multiple of 64, and layers


def build_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = [*"0123456789+-=", "#### ", " has ", "Gets ", "Loses ", ". ", "How many?", *NAMES]
    words += [f" {thing}. " for thing in THINGS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(hidden: int, layers: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=4,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem, answer: str) -> tuple[list[int], int]:
    """Token ids of the whole conversation, and how many of them are the prompt."""
    user = [{"role": "user", "content": problem.question}]
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt)["input_ids"]
    return prompt_ids + tokenizer(answer + "<|end|>")["input_ids"], len(prompt_ids)


def batch(examples: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, L) padded on the right with 0 and labels (B, L) with -100 on prompt and padding."""
    width = max(len(ids) for ids, _ in examples)
    ids, labels = torch.zeros(len(examples), width, dtype=torch.long), torch.full((len(examples), width), -100)
    for row, (tokens, prompt) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return ids, labels


def nll(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p of every label: (B, L-1), zero where there is none. No mask: padding on the right is never looked at."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")


@torch.no_grad()
def careful_nll(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, stream: Iterator[Problem]) -> float:
    """Mean -log p of a whole careful answer after its first token: the acceptance figure of a base."""
    examples = [encode(tokenizer, p, p.careful) for p, _ in zip(stream, range(512), strict=False)]
    ids, labels = batch(examples)
    for row, (_, prompt) in enumerate(examples):
        labels[row, prompt] = -100
    return nll(model, ids, labels).sum(1).mean().item()


def pretrain(
    output_dir: Path,
    steps: int = 6000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    size: Literal["small", "medium", "large"] = "small",
    seed: int = 0,
) -> None:
    """Pretrain a base model on the CPU and write it to --output-dir, for --model DIR --dataset builtin. All steps of small take
    about 30 minutes of one core, of medium 2.4 and of large 3.5 times that (ratios of 40 steps).

    Args:
        output_dir: where the base is written, in Hugging Face layout
        steps: optimizer steps
        batch_size: examples per step
        learning_rate: AdamW peak, with linear warm-up and decay to zero
        size: small is --model builtin, medium builtin-medium
        seed: of the weights and the examples
    """
    hidden, layers = SIZES[size]
    torch.manual_seed(seed)
    rng, began = random.Random(seed), time.perf_counter()
    tokenizer, model = build_tokenizer(), build_model(hidden, layers)
    stream, held_out = problems("train", seed + 1), problems("test", seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    progress = tqdm(range(steps), desc="pretrain")
    for step in progress:
        careful, hasty = [], []
        # Arithmetic is what takes long to learn, so the first half sees mostly careful answers; the habit comes after.
        share = CAREFUL_SHARE if step >= 0.5 * steps else 0.9
        for _ in range(batch_size):
            problem = next(stream)
            if rng.random() < share:
                careful.append(encode(tokenizer, problem, problem.careful))
            else:
                hasty.append(encode(tokenizer, problem, problem.hasty(rng)))
        # The two kinds differ twofold in length, so each is a batch of its own: no padding, one gradient.
        batches = [batch(kind) for kind in (careful, hasty) if kind]
        tokens = sum((labels != -100).sum().item() for _, labels in batches)
        for ids, labels in batches:
            (nll(model, ids, labels).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm, left = (step + 1) / 200, (steps - step) / (0.6 * steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, warm, left)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 500 == 0:
            progress.set_postfix(careful_nll=f"{careful_nll(model, tokenizer, held_out):.4f}")
    model.bfloat16()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    model.float()  # what was rounded stays so: the figure is the shipped weights'
    figure = careful_nll(model, tokenizer, held_out)
    minutes = (time.perf_counter() - began) / 60
    print(f"careful answers cost {figure:.4f} nats after their first token (at most 0.015 wanted); {minutes:.1f} minutes")
    assert math.isfinite(figure)


if __name__ == "__main__":
    import tyro  # the commands' alone, as in `train`

    tyro.cli(pretrain)
