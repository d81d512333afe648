"""A Decoder as a Hugging Face directory, for those who read nothing else: transformers, PEFT, TRL."""

import json
import shutil
from pathlib import Path

from tinylora.engine.text import Text
from tinylora.files import write_safetensors, write_text
from tinylora.model.decoder import Decoder


def write_directory(model: Decoder, directory: Path) -> None:
    """config.json, the weights in the precision that the decoder holds them in, tokenizer, template and end tokens.

    InputError where the model says something that a config.json cannot.
    """
    config = {**model.config.to_dict(), "dtype": str(model.embedding.dtype).removeprefix("torch.")}
    text = Text(model.path)
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(directory / "generation_config.json", json.dumps({"eos_token_id": list(text.eos_ids)}) + "\n")
    tensors = {name: t.cpu().contiguous() for name, t in model.tensors().items()}
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    text.tokenizer.save_pretrained(directory)


def copy_tokenizer(model: Decoder, directory: Path) -> None:
    """What belongs to the tokenizer: a directory's files as they are, a GGUF's as transformers writes them."""
    if model.path.is_file():
        Text(model.path).tokenizer.save_pretrained(directory)
        return
    for file in model.path.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens", "vocab", "merges")):
            shutil.copy(file, directory)
