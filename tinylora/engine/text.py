"""Text: chat messages to prompt ids by the model's own template, completion ids to text, and which ids end one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylora.engine.gguf_text import read_tokenizer
from tinylora.errors import InputError


class Text:
    """The tokenizer of a model directory or a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Any
        self.eos_ids: tuple[int, ...]
        self.tokenizer, self.eos_ids = read_tokenizer(path) if path.is_file() else _of_directory(path)
        if self.tokenizer.chat_template is None:
            raise InputError(f"{path} has no chat template; use the model's Instruct version")

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the conversation with the assistant's turn opened. InputError where the template fails."""
        return list(self._applied(messages, return_dict=False))

    def render(self, messages: list[dict[str, str]]) -> str:
        """The same as text, special tokens included."""
        return str(self._applied(messages, tokenize=False))

    def _applied(self, messages: list[dict[str, str]], **options: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        except Exception as error:  # a template is a program, and raises what it likes
            raise InputError(f"{self.path}: its chat template fails: {' '.join(str(error).split())}") from None

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def fitting_rows(
    rows: list[dict[str, Any]], text: Text, positions: int, completion: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The rows whose prompt leaves room for `completion` tokens among the model's `positions`, and their prompts' ids. No
    prompt is ever cut."""
    ids = [text.prompt(row["prompt"]) for row in rows]
    fitting = [i for i, tokens in enumerate(ids) if len(tokens) <= positions - completion]
    return [rows[i] for i in fitting], [ids[i] for i in fitting]


def _of_directory(directory: Path) -> tuple[Any, tuple[int, ...]]:
    # tokenizer.json as it stands: for Qwen2 AutoTokenizer puts a splitter of its own in place of the file's.
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    if not (directory / "tokenizer.json").exists():
        raise InputError(f"{directory} has no tokenizer.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        raise InputError(f"{directory} has no tokenizer that transformers can load: {error}") from None
    return tokenizer, _eos_ids(directory, tokenizer.eos_token_id)


def _eos_ids(directory: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """From generation_config.json, whose sampling fields are not read; else config.json; always the tokenizer's too."""
    ids: set[int] = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids |= set(found) if isinstance(found, list) else {found}
            break
    return tuple(sorted(ids))
