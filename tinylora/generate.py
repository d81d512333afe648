"""python -m tinylora.generate: complete prompts with a model and adapters on it: one per prompt, or one prompt under each."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinylora.cli import run_command
from tinylora.engine.generate import generate
from tinylora.engine.rollout import Sampling
from tinylora.engine.text import Text, prompting
from tinylora.errors import InputError
from tinylora.loading import load_adapter, model_of
from tinylora.model.loader import load_model
from tinylora.tasks.prompts import PromptStyle, messages


@dataclass(frozen=True)
class GenerateConfig:
    """Complete prompts. Text goes to stdout as it comes for one prompt, and in order, one after another, for several. A
    prompt is a question, asked as --adapter was trained; with --raw it is taken as it stands."""

    model: str | None = None
    """Hugging Face directory, hub id or GGUF file; "builtin" and "builtin-medium" come with the package. Default: the one
    that --adapter was trained on, else builtin."""
    adapter: tuple[str, ...] = ()
    """Run directories or their adapter/; "base" is the model without one, and so is none. One is for every prompt, as many as
    prompts is one each, and several with one prompt complete it under each."""
    force_base: bool = False
    """Take --adapter on a base with other weights than it was trained on, as another quantisation has, with a warning."""
    prompt: tuple[str, ...] = ()
    """Prompts."""
    file: str | None = None
    """A file with a prompt a line."""
    raw: bool = False
    """Take prompts as they stand, instead of as questions."""
    prompt_style: PromptStyle | None = None
    """How a question is asked: qwen-boxed, gsm8k-hash, plain, or raw, which is plain without a chat template. Default: as
    --adapter was trained, else plain."""
    chat_template: str | None = None
    """A file with a chat template. Default: as --adapter was trained, else the model's own."""
    chat_template_kwargs: str | None = None
    """What the chat template is given by name, as a JSON object. Default: as --adapter was trained."""
    system_prompt: str | None = None
    """The system message of every prompt, in the place of any other. Default: as --adapter was trained."""
    max_completion_length: int = 512
    """Tokens after which a completion is cut off."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus sampling."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off."""
    num_return_sequences: int = 1
    """Completions of each prompt."""
    seed: int = 0
    """Of sampling."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen model; auto: the checkpoint's on CUDA, float32 on a CPU."""


class Printer:
    """Prints a completion's text as its tokens come: never half a character, never the same text twice."""

    def __init__(self, text: Text) -> None:
        self.text, self.shown = text, ""

    def __call__(self, _: int, tokens: list[int]) -> None:
        whole = self.text.decode(tokens)
        if not whole.endswith("\ufffd") and whole.startswith(self.shown):  # a character may be several tokens
            sys.stdout.write(whole[len(self.shown) :])
            sys.stdout.flush()
            self.shown = whole


def ask(text: Text, question: str) -> list[int]:
    """The ids of a prompt with this question, in the text's style: plain where it is of no data set."""
    return text.prompt(messages(question, text.prompting.prompt_style))


def main(arguments: list[str]) -> int:
    import tyro  # the commands' alone, as in `train`

    c = tyro.cli(GenerateConfig, args=arguments, prog="python -m tinylora.generate")
    prompts = list(c.prompt)
    if c.file is not None:
        try:
            lines = Path(c.file).read_bytes().decode().replace("\r\n", "\n").split("\n")  # a prompt may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--file {c.file} cannot be read: {error}") from None
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise InputError("nothing to complete: give --prompt TEXT, or --file with a prompt a line")
    asked = prompting(c)
    trained_on = model_of(c.adapter[0]) if c.adapter and c.model is None else None
    if c.raw and (c.prompt_style or c.chat_template or c.chat_template_kwargs or c.system_prompt):
        raise InputError("--raw takes prompts as they stand: leave --prompt-style, --system-prompt and --chat-template... away")
    model = load_model(c.model or trained_on or "builtin", c.device, c.dtype)
    text = Text(model.path, asked)
    adapters = [None if a == "base" else load_adapter(a, model, force_base=c.force_base) for a in c.adapter]
    texts = [text if a is None else text.asking(prompting(c, a.parts.prompt)) for a in adapters] or [text]
    texts = texts if len(texts) == len(prompts) else texts[:1] * len(prompts)
    ids = [list(text.tokenizer.encode(p)) if c.raw else ask(t, p) for t, p in zip(texts, prompts, strict=True)]
    sampling = Sampling(c.max_completion_length, c.temperature, c.top_p, c.top_k, c.seed, text.eos_ids)
    k, labels = c.num_return_sequences, prompts
    # seed and number of each sequence: under each of several adapters a prompt draws what it would alone
    names = [(c.seed, i) for i in range(len(ids) * k)]
    if len(prompts) == 1 < len(adapters):
        labels, ids, names = list(c.adapter), ids * len(adapters), names * len(adapters)
    printer = Printer(text)
    alone = printer if len(names) == 1 else None
    found = generate(model, ids, adapters, sampling, k, watch=alone, names=names)
    for i, completion in enumerate(found):
        if alone:
            sys.stdout.write(text.decode(completion.tokens)[len(printer.shown) :] + "\n")
        else:
            print(f"--- {labels[i // k]}", text.decode(completion.tokens), sep="\n")
    return 0


if __name__ == "__main__":
    run_command(main)
