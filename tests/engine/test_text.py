"""Prompts: ids equal transformers' for the shapes of templates that people meet, whatever the day is."""

from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinylora.engine.text import Prompting, Text, prompting, stored_prompting
from tinylora.errors import InputError

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA32 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}
{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + content + '<|end|>' }}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""
# Every directive that names a day, a directive that is quoted, and a beginning that blocks could eat.
DATES = """
  {% if true %}
on {{ strftime_now("%A %a %B %b %d %-d %m %y %Y %j %U %F %D %x, %%d %H:%M:%S") }}
{% endif %}{% macro year() %}{{ strftime_now('%Y') }}{% endmacro %}  {{ year() }}{{ messages[0].content }}"""
TEMPLATES = {"qwen3": QWEN3, "llama32": LLAMA32, "deepseek": DEEPSEEK, "dates": DATES, "none": None}
SYSTEM = [{"role": "system", "content": "Be brief."}]
ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
TALK = [*ASKED, {"role": "assistant", "content": "<think>two, three</think>5"}, {"role": "user", "content": "And 4?"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: the directory of a byte-level tokenizer with one of the templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(kind: str) -> Path:
        directory = tmp_path_factory.mktemp(kind)
        vocabulary = ["<|begin|>", "<|end|>", "<|im_start|>", "<|eot_id|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer.add_special_tokens(vocabulary[:4])
        ends = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends, chat_template=TEMPLATES[kind]).save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the clock, transformers' and ours, to midnight of 30 June 2026 and so many days."""

    def go(days: int) -> None:
        moment = datetime(2026, 6, 30) + timedelta(days)
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: moment)})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        monkeypatch.setattr("tinylora.engine.text.datetime", clock)

    go(0)
    return go


def theirs(path: Path, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs))


@pytest.mark.parametrize("messages", [ASKED, SYSTEM + ASKED, TALK], ids=["asked", "system", "talk"])
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("qwen3", {}),
        ("qwen3", {"enable_thinking": False}),
        ("qwen3", {"enable_thinking": True}),
        ("llama32", {}),
        ("llama32", {"date_string": "26 Jul 2024"}),
        ("deepseek", {}),
        ("dates", {}),
    ],
)
def test_ids_are_transformers(path: Any, today: Any, kind: str, kwargs: dict[str, Any], messages: Any) -> None:
    where = path(kind)
    text = Text(where, Prompting(chat_template_kwargs=kwargs))
    found = text.prompt(messages)
    assert found == theirs(where, messages, **kwargs)
    assert text.tokenizer.decode(found) == text.render(messages)
    assert text.render(messages) == text.tokenizer.decode(theirs(where, messages, **kwargs))
    if kwargs.get("enable_thinking") is False:
        assert found != Text(where).prompt(messages)
    if kind == "deepseek":
        assert text.render(messages).endswith("<think>\n") and "two, three" not in text.render(messages)


@pytest.mark.parametrize("kind", ["llama32", "dates"])
def test_the_day_is_the_one_it_began_on(path: Any, today: Any, kind: str) -> None:
    """Also in another process, by what a run stores; without that it is today's, as transformers has it."""
    where = path(kind)
    text = Text(where)
    first, stored = text.prompt(ASKED), text.prompting.said()
    assert stored == {"date": "2026-06-30"}
    today(1)
    assert text.prompt(ASKED) == first
    assert Text(where, stored_prompting(stored)).prompt(ASKED) == first
    assert Text(where).prompt(ASKED) == theirs(where, ASKED) != first


def test_a_template_that_does_not_ask_for_the_day_has_none(path: Any) -> None:
    assert Text(path("qwen3")).prompting.date is None and Text(path("llama32"), Prompting("raw")).prompting.date is None


def test_without_a_template(path: Any, tmp_path: Path) -> None:
    """Refused with every way out; and the ways: raw, and a file."""
    where = path("none")
    said = (
        "has no chat template: give one by --chat-template FILE, do without by --prompt-style raw, or use the model's Instruct"
    )
    with pytest.raises(InputError, match=said):
        Text(where).prompt(ASKED)
    raw = Text(where, Prompting("raw"))
    assert raw.render(ASKED) == "What is 2 + 3?" and raw.prompt(ASKED) == raw.tokenizer.encode("What is 2 + 3?")
    assert raw.render(SYSTEM + ASKED) == "Be brief.\n\nWhat is 2 + 3?"
    (tmp_path / "own.jinja").write_text(QWEN3)
    flags = of(chat_template=str(tmp_path / "own.jinja"), chat_template_kwargs='{"enable_thinking": false}')
    own = Text(where, prompting(flags))
    assert own.prompt(ASKED) == theirs(where, ASKED, chat_template=QWEN3, enable_thinking=False)


def test_a_system_prompt_is_the_first_message(path: Any) -> None:
    """In front of messages that have none, and in the place of one that is there."""
    where = path("qwen3")
    text = Text(where, Prompting(system_prompt="Be kind."))
    want = theirs(where, [{"role": "system", "content": "Be kind."}, *TALK])
    assert text.prompt(TALK) == text.prompt(SYSTEM + TALK) == want
    assert Text(where, Prompting("raw", system_prompt="Be kind.")).render(ASKED) == "Be kind.\n\nWhat is 2 + 3?"


def of(**said: Any) -> Any:
    """A command's flags."""
    flags = dict.fromkeys(("prompt_style", "chat_template", "chat_template_kwargs", "system_prompt"))
    return SimpleNamespace(**{**flags, **said})


def test_each_flag_wins_by_itself(tmp_path: Path) -> None:
    stored = Prompting("gsm8k-hash", "T", {"a": 1}, "S", "2026-06-30")
    assert prompting(of(), stored.said()) == stored and prompting(of()) == Prompting()
    (tmp_path / "t").write_text("other")
    for flag, value, field, wanted in (
        ("prompt_style", "plain", "prompt_style", "plain"),
        ("chat_template", str(tmp_path / "t"), "chat_template", "other"),
        ("chat_template_kwargs", '{"b": [2]}', "chat_template_kwargs", {"b": [2]}),
        ("system_prompt", "", "system_prompt", ""),
    ):
        assert vars(prompting(of(**{flag: value}), stored.said())) == {**vars(stored), field: wanted}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"chat_template": "/nowhere"}, "--chat-template /nowhere cannot be read"),
        ({"chat_template_kwargs": "x=1"}, "--chat-template-kwargs x=1: it must be a JSON object, like"),
        ({"chat_template_kwargs": "[1]"}, r"--chat-template-kwargs \[1\]: it must be a JSON object"),
        ({"chat_template_kwargs": '{"tokenize": false}'}, "tokenize is none of a template's arguments"),
        ({"prompt_style": "raw", "chat_template_kwargs": "{}"}, "--prompt-style raw is without a chat template"),
    ],
)
def test_refusals(flags: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        prompting(of(**flags))


@pytest.mark.parametrize(
    "stored", [{"date": "yesterday"}, {"date": 3}, {"chat_template": 1}, {"chat_template_kwargs": "{}"}, 3]
)
def test_what_is_stored_is_checked(stored: Any) -> None:
    with pytest.raises(InputError, match="what a run or an adapter says of its prompts is broken"):
        stored_prompting(stored)
