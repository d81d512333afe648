"""The tokenizer of a GGUF: llama.cpp's ids, which were recorded, and llama.cpp itself where it is installed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import TEMPLATE, add_tokenizer, gguf, recorded

from tinylora import InputError
from tinylora.engine.gguf_text import read_tokenizer
from tinylora.engine.pretokenizers import PRETOKENIZERS, WHOLE_WORDS
from tinylora.engine.text import Text

ROOT = Path(__file__).parent.parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
REAL = sorted((Path.home() / ".cache" / "tinylora-models").glob("*.gguf"))
NAMES = [*PRETOKENIZERS, "spm-True", "spm-False"]


def write(path: Path, name: str, change: Callable[[Any], object] = lambda writer: None) -> Path:
    """A file of metadata alone, with the vocabulary of this name."""
    writer = gguf.GGUFWriter(path, "llama")
    spm = name.startswith("spm")
    add_tokenizer(writer, None if spm else name, name == "spm-True" if spm else None)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(name: str) -> list[list[int]]:
    ids = recorded()["ids"][name]
    return recorded()["ids"][ids] if isinstance(ids, str) else ids


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_llama_cpps(name: str, tmp_path: Path) -> None:
    tokenizer, ends = read_tokenizer(write(tmp_path / "m.gguf", name))
    for text, ids in zip(recorded()["texts"], theirs(name), strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if name != "spm-True" or "<|" not in text:  # which has a space behind every special token, in llama.cpp as well
            assert tokenizer.decode(ids) == text
    assert list(ends) == recorded()["ends"][name]
    begins = tokenizer.encode("hi")[0] == tokenizer.bos_token_id
    assert begins == (name in recorded()["begins"])


def test_texts_tell_the_families_apart() -> None:
    """Or the test above would pass with another family's expressions."""
    alike = {json.dumps(theirs(name)): (patterns, name in WHOLE_WORDS) for name, patterns in PRETOKENIZERS.items()}
    assert len(alike) == len({(patterns, name in WHOLE_WORDS) for name, patterns in PRETOKENIZERS.items()}) == 15


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem[:7]) for p in REAL] or [None])
def test_prompts_of_a_real_file(path: Path | None, tmp_path: Path) -> None:
    """200 GSM8K prompts: transformers' ids from the same file, but for SmolLM2, where it cuts "  2/5" as GPT-2 does."""
    if path is None or not GSM8K.exists():
        pytest.skip("no real GGUF file or no GSM8K here")
    from transformers import AutoTokenizer

    rows = [json.loads(line)["question"] for line in sorted(GSM8K.rglob("*test*.jsonl"))[0].read_text().splitlines()[:200]]
    prompts = [[{"role": "user", "content": question}] for question in rows]
    text, other = Text(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    differ = 0
    for prompt in prompts:
        ids = list(other.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        differ += text.prompt(prompt) != ids
        assert other.decode(text.prompt(prompt)) == text.render(prompt)
    assert differ == ("SmolLM2" in path.name)
    try:
        from llama_cpp import Llama
    except ImportError:
        return
    model = Llama(str(path), vocab_only=True, verbose=False)
    for prompt in prompts:
        assert model.tokenize(text.render(prompt).encode(), add_bos=False, special=True) == text.prompt(prompt)


def test_the_begin_token(tmp_path: Path) -> None:
    """Once, where the file wants it, whether or not the template writes it; never where it does not."""
    message = [{"role": "user", "content": "hi"}]
    without = Text(write(tmp_path / "a.gguf", "spm-True", lambda w: w.add_add_bos_token(False)))
    wants = Text(write(tmp_path / "b.gguf", "spm-True"))
    template = "{{ bos_token }}" + TEMPLATE
    writes = Text(
        write(
            tmp_path / "c.gguf",
            "spm-True",
            lambda w: (w.kv_data[0].pop("tokenizer.chat_template"), w.add_chat_template(template)),
        )
    )
    begin = wants.tokenizer.bos_token_id
    assert wants.prompt(message) == writes.prompt(message) == [begin, *without.prompt(message)]
    assert wants.render(message) == "<s>" + without.render(message)
    assert without.tokenizer.encode("hi") == wants.tokenizer.encode("hi")[1:] and wants.prompt(message).count(begin) == 1


BROKEN = {
    "an unknown pre": ("pre", "klingon-bpe", "pre is 'klingon-bpe', which is not known here"),
    "another kind": ("model", "bert", r"model is 'bert' \(supported: gpt2, llama\)"),
    "no kind": ("model", None, "model is missing"),
    "no tokens": ("tokens", None, "tokens is missing"),
    "no merges": ("merges", None, "merges is missing"),
    "half a merge": ("merges", ["a"], "merges has 'a', which is no pair"),
    "a foreign merge": ("merges", ["a klingon"], "tokens and merges make no tokenizer"),
    "tokens twice": ("tokens", ["a", "a"], "tokens has a token twice"),
    "tokens that are numbers": ("tokens", [1, 2], "tokens is no list of texts"),
    "types of others": ("token_type", [1, 1], "token_type has 2 entries for"),
    "begin or not": ("add_bos_token", "yes", "add_bos_token is a str, not a bool"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_honoured(name: str, tmp_path: Path) -> None:
    key, value, message = BROKEN[name]

    def change(writer: Any) -> None:
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            writer.add_string(f"tokenizer.ggml.{key}", value)

    with pytest.raises(InputError, match=message) as error:
        read_tokenizer(write(tmp_path / "m.gguf", "qwen2", change))
    assert str(error.value).count("m.gguf") == 1 and "\n" not in str(error.value)


def test_a_token_that_only_llama_cpp_could_merge(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[next(i for i, t in enumerate(tokens) if len(t) == 2)] = "\u4e01\u4e02"

    with pytest.raises(InputError, match="has '\u4e01\u4e02' and not both its characters"):
        read_tokenizer(write(tmp_path / "m.gguf", "spm-True", change))


def test_templates_that_fail(tmp_path: Path) -> None:
    """In one line, when they are used; a template that is no text at once."""
    for i, template in enumerate(("{% for m in messages %}", "{{ raise_exception('no\nsuch role') }}", "{{ messages.x.y }}")):

        def change(writer: Any, template: str = template) -> None:
            writer.kv_data[0].pop("tokenizer.chat_template")
            writer.add_chat_template(template)

        text = Text(write(tmp_path / f"{i}.gguf", "qwen2", change))
        for use in (text.prompt, text.render):
            with pytest.raises(InputError, match="its chat template fails: ") as error:
                use([{"role": "user", "content": "hi"}])
            assert f"{i}.gguf" in str(error.value) and "\n" not in str(error.value)

    def number(writer: Any) -> None:
        writer.kv_data[0].pop("tokenizer.chat_template")
        writer.add_uint32("tokenizer.chat_template", 3)

    with pytest.raises(InputError, match="chat_template is no text"):
        Text(write(tmp_path / "n.gguf", "qwen2", number))


def test_no_template(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "qwen2", lambda w: w.kv_data[0].pop("tokenizer.chat_template"))
    with pytest.raises(InputError, match="m.gguf has no chat template: give one by --chat-template FILE, do without by"):
        Text(path).prompt([{"role": "user", "content": "x"}])
