"""python -m tinylora.generate, and several adapters in one batch."""

from pathlib import Path

import pytest
import torch

from tinylora import generate as generate_module
from tinylora.adapter.config import TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.generate import generate
from tinylora.engine.rollout import Sampling, rollout
from tinylora.errors import InputError
from tinylora.generate import Printer, main
from tinylora.model.loader import load_model

PROBLEM = "Ann has 23 pens. Gets 48. Loses 7. How many?"
PROMPTS = [[1, 2, 3], [5, 6, 7, 8], [12]]


@pytest.fixture
def adapters(tiny_model):
    model = load_model(str(tiny_model("qwen2")))
    found = [Adapter(model, TinyLoRAConfig(u=3, n_tie=4)) for _ in PROMPTS]
    with torch.no_grad():
        for i, a in enumerate(found):
            a.v.copy_(0.3 * torch.randn(a.v.shape, generator=torch.Generator().manual_seed(i)))
    return model, found


def test_one_adapter_each_is_each_alone(adapters):
    model, found = adapters
    s = Sampling(12, seed=3)
    mixed = generate(model, PROMPTS, adapters=found, sampling=s, generations=2)
    for i, (prompt, a) in enumerate(zip(PROMPTS, found, strict=True)):
        with torch.no_grad():
            alone = rollout(model, a.matrices(), [prompt], 2, s, first_sequence=2 * i)
        assert [c.tokens for c in mixed[2 * i : 2 * i + 2]] == [c.tokens for c in alone]
    one = generate(model, PROMPTS, adapters=found[:1], sampling=s)
    assert [c.tokens for c in one] != [c.tokens for c in generate(model, PROMPTS, sampling=s)]


def test_the_base_shares_a_batch_with_adapters(adapters):
    """Bit for bit what it says alone, also in its log-probs."""
    model, found = adapters
    s = Sampling(12, 1.0, seed=3)
    mixed = generate(model, PROMPTS, [None, found[0], None], s, 2)
    base, own = generate(model, PROMPTS, None, s, 2), generate(model, PROMPTS, found[:1], s, 2)
    assert mixed == base[:2] + own[2:4] + base[4:] and base != own
    assert generate(model, PROMPTS, [None], s, 2) == base


def test_adapters_that_do_not_fit_are_refused(adapters):
    model, found = adapters
    with pytest.raises(InputError, match="2 adapters for 3 prompts"):
        generate(model, PROMPTS, adapters=found[:2])
    other = Adapter(model, TinyLoRAConfig(u=3, n_tie=4, seed=9))
    with pytest.raises(InputError, match="differ in v alone"):
        generate(model, PROMPTS, adapters=[*found[:2], other])


def test_the_command_streams_and_says_the_same_in_a_batch(capsys, tmp_path, monkeypatch):
    calls = []
    show = Printer.__call__
    monkeypatch.setattr(Printer, "__call__", lambda self, i, tokens: calls.append(len(tokens)) or show(self, i, tokens))
    assert main(["--prompt", PROBLEM]) == 0
    alone = capsys.readouterr().out
    assert "####" in alone and calls == list(range(1, len(calls) + 1)) and len(calls) > 3
    (tmp_path / "prompts").write_text(f"{PROBLEM}\n\n{PROBLEM}\n")
    assert main(["--file", str(tmp_path / "prompts")]) == 0
    assert capsys.readouterr().out == f"--- {PROBLEM}\n{alone}" * 2


def test_one_prompt_under_the_base_and_under_adapters(capsys, tmp_path):
    """Labelled, in the order given, and each as it is alone; sampled too, where each draws the numbers it would draw alone."""
    model, paths = load_model("builtin"), [str(tmp_path / name) for name in "ab"]
    for i, path in enumerate(paths):
        adapter = Adapter(model, TinyLoRAConfig(u=13, n_tie="all"))
        adapter.load_v(0.1 * torch.randn(1, 13, generator=torch.Generator().manual_seed(i)))
        adapter.save(Path(path))

    def said(*arguments):
        assert main([*arguments, "--prompt", PROBLEM, "--max-completion-length", "24"]) == 0
        return capsys.readouterr().out

    greedy = [said(), *(said("--adapter", path) for path in paths)]
    assert len(set(greedy)) == 3 and said("--adapter", "base") == greedy[0]
    names = ["base", *paths]
    assert said("--adapter", *names) == "".join(f"--- {n}\n{text}" for n, text in zip(names, greedy, strict=True))
    assert said("--adapter", *names[::-1]) == "".join(
        f"--- {n}\n{text}" for n, text in zip(names[::-1], greedy[::-1], strict=True)
    )
    sampled = ["--temperature", "1", "--num-return-sequences", "3"]
    alone = [said(*sampled, "--adapter", n).replace(f"--- {PROBLEM}", f"--- {n}") for n in names]
    assert said(*sampled, "--adapter", *names) == "".join(alone)
    (tmp_path / "prompts").write_text(f"{PROBLEM}\n{PROBLEM}\n")
    with pytest.raises(InputError, match="2 adapters for 3 prompts"):
        said("--file", str(tmp_path / "prompts"), "--adapter", "base", paths[0])


def test_a_prompt_ends_at_a_line_end_alone(capsys, tmp_path):
    """Not at U+2028, NEL, a vertical tab, a file separator or a lone carriage return, where str.splitlines ends one too."""
    odd = "Ann\u2028has\x8523\x0bpens.\x1cGets\r48."
    (tmp_path / "prompts").write_bytes(f"{odd}\r\n \r\n{PROBLEM}\n".encode())
    assert main(["--file", str(tmp_path / "prompts"), "--max-completion-length", "2"]) == 0
    said = [line[4:] for line in capsys.readouterr().out.split("\n") if line.startswith("--- ")]
    assert said == [odd, PROBLEM]


def test_characters_of_several_tokens_come_whole(capsys):
    class Bytes:
        def decode(self, tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    printer = Printer(Bytes())
    data = "a€b".encode()
    shown = []
    for n in range(1, len(data) + 1):
        printer(0, list(data[:n]))
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "", "€", "b"]


def test_nothing_to_complete_is_one_line():
    with pytest.raises(InputError, match="--prompt"):
        main([])
    with pytest.raises(InputError, match="--file"):
        main(["--file", "/nowhere"])
    assert generate_module.GenerateConfig().temperature == 0
