"""What the tiny adapters are compared with: LoRA by PEFT and full fine-tuning, in plain transformers and float32.

The transformers model of the same directory is what is trained and what scores the update, padded as transformers wants it.
For rollouts its weights are written into the Decoder, in place, so that generation and grading are the adapters' own.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tinylora.engine.directory import copy_tokenizer, write_directory
from tinylora.errors import InputError
from tinylora.model.decoder import Decoder

LORA_ALPHA = 32  # with PEFT's alpha / r: Schulman et al. 2025, where the best learning rate does not depend on the rank


class Baseline:
    """method "lora": rank r on `targets`, by PEFT; "full": every weight. The model's own precision has to hold the weights."""

    def __init__(self, model: Decoder, method: str, r: int, targets: Sequence[str], seed: int) -> None:
        from transformers import AutoModelForCausalLM  # takes seconds to import

        self.model, self.method = model, method
        with TemporaryDirectory() if model.path.is_file() else nullcontext(str(model.path)) as source:
            if model.path.is_file():  # a GGUF
                write_directory(model, Path(source))
            network: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        network = network.to(model.device).eval()
        if method == "lora":
            try:
                from peft import LoraConfig, get_peft_model
            except ImportError:
                raise InputError("--method lora needs PEFT: pip install peft") from None
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = get_peft_model(network, LoraConfig(r=r, lora_alpha=LORA_ALPHA, target_modules=list(targets)))
            network.peft_config["default"].base_model_name_or_path = model.public_name
        self.network = network

    def named_parameters(self) -> dict[str, Tensor]:
        """What is trained, by its name in a checkpoint."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.named_parameters().values())

    @torch.no_grad()
    def matrices(self, off: bool = False) -> None:
        """Write the present weights into the Decoder; it then needs no matrices. `off`: LoRA off."""
        if self.method == "full":
            own = dict(self.network.named_parameters())
            for name, view in self.model.tensors().items():
                view.copy_(own[name])
            return
        base = self.network.get_base_model()
        for name, view in self.model.weights().items():
            layer = base.get_submodule(name)
            if hasattr(layer, "get_delta_weight"):
                weight = layer.base_layer.weight
                view.copy_(weight if off else weight + layer.get_delta_weight("default"))

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], temperature: float, off: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob and entropy of every completion token, and whether it is the likeliest: (tokens,) each. `off`: LoRA off."""
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)  # (B, L)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        with self.network.disable_adapter() if off else nullcontext():
            logits = self.network(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, L, vocab)
        index = torch.tensor([i for i, c in enumerate(completions) for _ in c])
        place = torch.tensor([len(p) + j for p, c in zip(prompts, completions, strict=True) for j in range(len(c))])
        targets = ids[index, place]  # (tokens,)
        logp = (logits[index, place - 1] / temperature).log_softmax(-1)  # (tokens, vocab)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), entropy, logp.detach().argmax(-1) == targets

    def save(self, directory: Path) -> None:
        """PEFT's adapter directory for LoRA; for full a Hugging Face directory that --model takes."""
        if self.method == "lora":
            self.network.save_pretrained(directory, save_embedding_layers=False)
            return
        self.network.save_pretrained(directory)
        copy_tokenizer(self.model, directory)
