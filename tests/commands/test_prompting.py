"""What makes a prompt, through the commands: template arguments, an own template, a system prompt, no template, the day."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from test_own_task import lines, problems, run, write

from tinylora import evaluate, generate, train
from tinylora.errors import InputError
from tinylora.rl import inputs

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
)
SMALL = ["--prompts-per-step", "2", "--num-generations", "2", "--max-steps", "1", "--max-completion-length", "4"]


@pytest.fixture
def own(tmp_path: Path, text_model: Callable[[list[str]], Path]) -> list[str]:
    """Flags of a run on a small random model and rows of its own; any answer pays by a coin."""
    model = text_model([q for q, _ in problems(40)])
    data = write(tmp_path / "rows.jsonl", [{"prompt": q, "answer": n} for q, n in problems(40)])
    paid = ["--reward", "random", "--learning-rate", "0.01"]
    return ["--model", str(model), "--dataset", "mine", "--data", data, *paid]


def without_template(flags: list[str]) -> None:
    (Path(flags[1]) / "chat_template.jinja").unlink()


def first_prompt(path: Path) -> str:
    return str(lines(path / "completions" / "step-000001.jsonl")[0]["prompt"])


def test_the_adapter_brings_what_made_its_prompts(tmp_path: Path, own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained under an own template, its arguments and a system prompt; evaluated, generated and resumed under them, also after
    the clock has moved a day and the template's file is gone; each flag by itself wins."""
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    flags = [
        "--chat-template",
        str(file),
        "--chat-template-kwargs",
        '{"enable_thinking": false}',
        "--system-prompt",
        "Be kind.",
    ]
    path = tmp_path / "run"
    run(train, *own, *flags, "--output-dir", str(path), *SMALL, "--eval-size", "4")
    day = f"{datetime.now():%d %b %Y}"
    prompt = first_prompt(path)
    assert prompt.startswith("<|system|>Be kind.<|user|>") and prompt.endswith(f"<|assistant|><think></think>{day}")
    stored = json.loads((path / "adapter" / "adapter_config.json").read_text())["prompt"]
    assert stored == json.loads((path / "config.json").read_text())["prompt"]
    assert stored["chat_template_kwargs"] == {"enable_thinking": False} and stored["chat_template"] == TEMPLATE

    clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: datetime(2031, 1, 2))})
    monkeypatch.setattr("tinylora.engine.text.datetime", clock)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
    shown = run(evaluate, "--adapter", str(path), "--show-prompt")
    assert shown.rstrip().endswith(f"<|assistant|><think></think>{day}") and "<|system|>Be kind.<|user|>" in shown
    assert "<|system|>Be brief." in run(evaluate, "--adapter", str(path), "--show-prompt", "--system-prompt", "Be brief.")
    asked: list[list[int]] = []
    complete = generate.generate
    monkeypatch.setattr(generate, "generate", lambda model, ids, *a, **k: asked.extend(ids) or complete(model, ids, *a, **k))
    question = problems(1)[0][0]
    few = ["--adapter", str(path), "--prompt", question, "--max-completion-length", "1"]
    run(generate, *few)
    run(generate, *few, "--chat-template-kwargs", "{}")
    text = inputs.Text(Path(own[1]))
    assert text.tokenizer.decode(asked[0]) == f"<|system|>Be kind.<|user|>{question}<|assistant|><think></think>{day}"
    assert text.tokenizer.decode(asked[1]) == f"<|system|>Be kind.<|user|>{question}<|assistant|>{day}"

    file.unlink()
    run(train, "--output-dir", str(path), "--resume", "--max-steps", "2")
    prompts = {row["prompt"] for row in lines(path / "completions" / "step-000002.jsonl")}
    assert all(p.endswith(f"<|assistant|><think></think>{day}") for p in prompts)


def test_a_base_model_without_a_template(tmp_path: Path, own: list[str]) -> None:
    without_template(own)
    with pytest.raises(
        InputError, match="has no chat template: give one by --chat-template FILE, do without by --prompt-style raw"
    ):
        run(train, *own, "--output-dir", str(tmp_path / "run"), *SMALL)
    run(train, *own, "--output-dir", str(tmp_path / "run"), *SMALL, "--prompt-style", "raw", "--eval-size", "0")
    assert first_prompt(tmp_path / "run") in {q for q, _ in problems(40)}
    assert run(generate, "--model", own[1], "--raw", "--prompt", "1 + 1", "--max-completion-length", "1")
    assert run(generate, "--adapter", str(tmp_path / "run"), "--prompt", "1 + 1", "--max-completion-length", "1")
    with pytest.raises(InputError, match="has no chat template"):
        run(generate, "--model", own[1], "--prompt", "1 + 1")


def test_contents_of_parts_and_null(tmp_path: Path, own: list[str]) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]
    talk = [{"role": "user", "content": "Hm"}, {"role": "assistant", "content": None}, {"role": "user", "content": parts}]
    seen = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    write(tmp_path / "rows.jsonl", [{"prompt": talk, "answer": 2}] * 8 + [{"prompt": seen, "answer": 2}])
    out = run(train, *own, "--output-dir", str(tmp_path / "run"), *SMALL, "--eval-size", "0")
    assert "1 of 9 rows skipped, a part of type 'image' in a message's content: only text is read: row 9" in out
    assert first_prompt(tmp_path / "run") == "<|user|>Hm<|assistant|><|user|>What is 1 + 1?<|assistant|>"


def test_template_arguments_from_a_settings_file(tmp_path: Path, own: list[str]) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    (tmp_path / "run.toml").write_text(
        f'chat-template = "{tmp_path / "own.jinja"}"\n[chat-template-kwargs]\nenable_thinking = false\n'
    )
    run(train, *own, "--config", str(tmp_path / "run.toml"), "--output-dir", str(tmp_path / "run"), *SMALL, "--eval-size", "0")
    assert "<think></think>" in first_prompt(tmp_path / "run")


def test_a_run_that_goes_on_from_an_adapter_is_on_its_model(tmp_path: Path, own: list[str]) -> None:
    run(train, *own, "--output-dir", str(tmp_path / "run"), *SMALL, "--eval-size", "0")
    run(
        train,
        "--init-adapter",
        str(tmp_path / "run"),
        *own[2:],
        "--output-dir",
        str(tmp_path / "more"),
        *SMALL,
        "--eval-size",
        "0",
    )
    assert json.loads((tmp_path / "more" / "config.json").read_text())["settings"]["model"] == own[1]


def test_an_adapter_of_older_versions_is_asked_as_before(tmp_path: Path, own: list[str]) -> None:
    run(train, *own, "--output-dir", str(tmp_path / "run"), *SMALL, "--eval-size", "0")
    for name in ("config.json", "adapter/adapter_config.json"):
        about: dict[str, Any] = json.loads((tmp_path / "run" / name).read_text())
        about.pop("prompt", None)
        (tmp_path / "run" / name).write_text(json.dumps(about))
    assert "<|user|>" in run(evaluate, "--adapter", str(tmp_path / "run"), "--show-prompt")
