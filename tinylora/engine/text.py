"""Text: chat messages to prompt ids by the model's own template or another, completion ids to text, and which ids end one."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tinylora.engine.gguf_text import read_tokenizer
from tinylora.errors import InputError

# What a template gets from elsewhere, or would return another thing with.
_TAKEN = {"conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding"}
_TAKEN |= {"truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
_DIRECTIVES = [f"-{c}" for c in "dmyHIMSj"] + list("aAbBcCdDeFfGgHIjklmMpPrRSTuUVwWxXyYzZ")  # of strftime


@dataclass(frozen=True)
class Prompting:
    """What makes a prompt of messages, beside the model's tokenizer."""

    prompt_style: str = "auto"  # raw: without a template
    chat_template: str | None = None  # its text; None: the tokenizer's own
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it is given by name
    system_prompt: str | None = None  # the first message, in the place of a system message that is there
    date: str | None = None  # YYYY-MM-DD, what a template that asks is told; None: today

    def said(self) -> dict[str, Any]:
        """What differs from the above, as JSON keeps it."""
        usual = Prompting()
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != getattr(usual, f.name)}


def prompting(flags: Any, stored: Mapping[str, Any] | None = None) -> Prompting:
    """Of a command's four flags; what they do not say is as `stored`, by an adapter. InputError where one is wrong."""
    found = stored_prompting(stored or {})
    if flags.prompt_style is not None:
        found = replace(found, prompt_style=flags.prompt_style)
    if flags.system_prompt is not None:
        found = replace(found, system_prompt=flags.system_prompt)
    if flags.chat_template is not None:
        try:
            found = replace(found, chat_template=Path(flags.chat_template).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat-template {flags.chat_template} cannot be read: {error}") from None
    if flags.chat_template_kwargs is not None:
        found = replace(found, chat_template_kwargs=_template_kwargs(flags.chat_template_kwargs))
    if found.prompt_style == "raw" and (flags.chat_template or flags.chat_template_kwargs):
        raise InputError("--prompt-style raw is without a chat template: leave --chat-template and --chat-template-kwargs away")
    return found


def stored_prompting(stored: Mapping[str, Any]) -> Prompting:
    """As a run or an adapter has it. InputError where that is broken."""
    try:
        found = Prompting(**{f.name: stored[f.name] for f in fields(Prompting) if f.name in stored})
        wrong = [k for k, v in found.said().items() if not isinstance(v, dict if k == "chat_template_kwargs" else str)]
        datetime.fromisoformat(found.date or "2000-01-01")
    except (TypeError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        raise InputError(f"what a run or an adapter says of its prompts is broken: {', '.join(wrong)}")
    return found


def _template_kwargs(text: str) -> dict[str, Any]:
    try:
        kwargs = json.loads(text)
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise InputError(f"--chat-template-kwargs {text}: it must be a JSON object, like '{{\"enable_thinking\": false}}'")
    if taken := sorted(kwargs.keys() & _TAKEN):
        raise InputError(f"--chat-template-kwargs {text}: {taken[0]} is none of a template's arguments here; leave it away")
    return kwargs


class Text:
    """The tokenizer of a model directory or a GGUF file, and what makes a prompt with it."""

    def __init__(self, path: Path, prompting: Prompting | None = None) -> None:
        self.path = path
        self.tokenizer: Any
        self.eos_ids: tuple[int, ...]
        self.tokenizer, self.eos_ids = read_tokenizer(path) if path.is_file() else _of_directory(path)
        self._ask(prompting or Prompting())

    def asking(self, prompting: Prompting) -> "Text":
        """The same tokenizer with other prompts."""
        other = copy.copy(self)
        other._ask(prompting)
        return other

    def _ask(self, prompting: Prompting) -> None:
        template = prompting.chat_template or self.tokenizer.chat_template
        self.template: str | None = template.get("default") if isinstance(template, dict) else template
        dated = self.template is not None and prompting.prompt_style != "raw" and "strftime_now" in self.template
        self.prompting = replace(prompting, date=(prompting.date or f"{datetime.now():%Y-%m-%d}") if dated else None)
        if self.template is not None and self.prompting.date is not None:
            self.template = _on_day(self.template, self.prompting.date)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of the conversation with the assistant's turn opened. InputError where the template fails."""
        if self.prompting.prompt_style == "raw":
            return list(self.tokenizer.encode(self.render(messages)))
        return list(self._applied(messages, return_dict=False))

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The same as text, special tokens included; raw: the messages' texts, with an empty line between two."""
        if self.prompting.prompt_style == "raw":
            return "\n\n".join(m["content"] for m in self._led(messages) if m["content"])
        return str(self._applied(messages, tokenize=False))

    def _led(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, with --system-prompt in front where there is one."""
        if self.prompting.system_prompt is None:
            return messages
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self.prompting.system_prompt}, *rest]

    def _applied(self, messages: list[dict[str, Any]], **options: bool) -> Any:
        if self.template is None:
            raise InputError(
                f"{self.path} has no chat template: give one by --chat-template FILE, do without by --prompt-style raw, or use "
                "the model's Instruct version"
            )
        given = {**self.prompting.chat_template_kwargs, **options, "add_generation_prompt": True}
        try:
            return self.tokenizer.apply_chat_template(self._led(messages), chat_template=self.template, **given)
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


def _on_day(template: str, date: str) -> str:
    """A template whose strftime_now tells this day's midnight. A macro before it, since transformers passes it no function."""
    midnight = datetime.fromisoformat(date)
    said = [("%%", "\ue000"), *((f"%{d}", midnight.strftime(f"%{d}")) for d in _DIRECTIVES), ("\ue000", "%")]
    filters = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in said)
    return "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro %}\n" + template


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
