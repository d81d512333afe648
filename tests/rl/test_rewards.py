"""Reading a number out of a text, comparing it with the gold one, and checking what a user's reward function returns."""

import json
import math
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tinylora.errors import InputError
from tinylora.rl.reward_functions import call_reward, load_reward
from tinylora.tasks.extraction import extract_flexible, extract_strict
from tinylora.tasks.grading import grade
from tinylora.tasks.numerals import same_number

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
ROWS = {"train": 7473, "test": 1319}

# text, strict, flexible, why
TEXTS = [
    ("#### 72", "72", "72", "the plain case"),
    ("So she has 5 + 7 = 12.\n#### 12", "12", "12", "numbers before the mark do not count"),
    ("#### 1,234", "1234", "1234", "thousands"),
    ("#### 1,234,567.50", "1234567.50", "1234567.50", "thousands and cents"),
    ("#### $18", "18", "18", "dollars"),
    ("#### -5", "-5", "-5", "negative"),
    ("#### -$5", "-5", "-5", "negative dollars"),
    ("#### $-5", None, "-5", "a sign behind the dollar is not the format"),
    ("#### 72.", "72", "72", "end of a sentence"),
    ("#### 72...", "72", "72", "an ellipsis"),
    ("#### 3.5", "3.5", "3.5", "decimal"),
    ("#### 3.50.", "3.50", "3.50", "decimal at the end of a sentence"),
    ("#### .5", ".5", ".5", "no leading zero"),
    ("#### 72 apples", "72", "72", "a unit"),
    ("#### 72%", "72", "72", "percent"),
    ("#### 72\n#### 73", "72", "73", "strict takes the first mark, flexible the last number"),
    ("#### 72\nThat took 3 steps.", "72", "3", "talk after the answer hurts flexible alone"),
    ("#### 1/2", "1/2", "2", "a fraction"),
    ("#### -$1,000/3.", "-1000/3", "3", "a fraction of dollars at the end of a sentence"),
    ("#### 1e5", "1e5", "5", "an exponent"),
    ("#### 1.5E-3 m", "1.5E-3", "-3", "a negative one, and a unit"),
    ("#### 72abc", None, "72", "letters touch the number"),
    ("#### 72.abc", None, "72", "also behind its full stop"),
    ("#### 72kg", None, "72", "a unit without a blank is letters too"),
    ("#### 72-80", None, "-80", "a range is not its first number"),
    ("#### 9*2", None, "2", "nor is a product"),
    ("#### 10/20/2024", None, "2024", "nor is a date"),
    ("#### 0.5/2", None, "2", "nor is a fraction of decimals"),
    ("#### 1/-2", None, "-2", "a sign belongs in front of a fraction"),
    ("#### 1e5000", None, "5000", "an exponent of more than three digits"),
    ("#### 2\u00b2", None, "2", "a power"),
    ("#### 72abc\n#### 73", None, "73", "what cannot be read is not skipped for a later mark"),
    ("**#### 72**", "72", "72", "marks behind it are no letters"),
    ("#### $72$", "72", "72", "nor is a dollar"),
    ("#### 72)", "72", "72", "nor is a bracket"),
    ("_#### 72_", "72", "72", "nor is an underscore"),
    ("####72", None, "72", "the blank is part of the format"),
    ("####  72", None, "72", "two blanks are not"),
    ("####\n72", None, "72", "nor is a new line"),
    ("### 72", None, "72", "three marks"),
    ("##### 72", "72", "72", "five end in four"),
    ("#### **72**", None, "72", "markdown"),
    ("#### +72", None, "72", "a plus sign is not the format, and is no part of the number"),
    ("#### = 72", None, "72", "something in between"),
    ("#### seventy-two", None, None, "a number in words"),
    ("####", None, None, "nothing follows"),
    ("#### ", None, None, "nothing but a blank follows"),
    ("#### .", None, None, "a full stop is no number"),
    ("#### ,", None, None, "a comma is no number"),
    ("#### \u0667\u0662", None, None, "digits of another script: int() would read them"),
    ("", None, None, "an empty completion"),
    ("no idea", None, None, "no number at all"),
    ("-", None, None, "a lone sign"),
    ("The answer is 72.", None, "72", "flexible needs no mark"),
    ("The answer is \\boxed{72}.", None, "72", "boxed"),
    ("She pays $1,234.50, then leaves.", None, "1234.50", "a comma behind the number"),
    ("10 - 3", None, "3", "a minus with a blank is an operator"),
    ("It is -3", None, "-3", "a minus at the number is a sign"),
    ("between 10-15", None, "-15", "also in a range; verl's pattern reads it so too"),
    ("x2", None, "2", "letters may touch a number"),
    ("in 1e5", None, "5", "no exponents"),
    ("3/4", None, "4", "no fractions"),
    ("72 .", None, "72", "a detached full stop is not taken for the last number"),
    ("0", None, "0", "zero is a number, not nothing"),
    ("1.2.3", None, "1.2.3", "extracted as it stands; it equals no number"),
]


@pytest.mark.parametrize(("text", "strict", "flexible", "why"), TEXTS, ids=[why for *_, why in TEXTS])
def test_extraction(text: str, strict: str | None, flexible: str | None, why: str) -> None:
    assert (extract_strict(text), extract_flexible(text)) == (strict, flexible), why


# a, b, equal, why
NUMBERS = [
    ("72", "72", True, "the same text"),
    ("72", "72.0", True, "equal in value"),
    ("72.00", "72", True, "cents"),
    ("007", "7", True, "leading zeros, as in AIME answers"),
    (".5", "0.50", True, "no leading zero"),
    ("-0", "0", True, "zero has no sign"),
    ("72", "73", False, "another number"),
    ("72", "-72", False, "another sign"),
    ("72", "7.2", False, "another size"),
    ("0.1", "0.1000000000000000055511151231257827", False, "equal as floats only"),
    ("9007199254740993", "9007199254740992", False, "equal as floats only, and large"),
    ("1" + "0" * 40, "1" + "0" * 39 + "1", False, "more digits than a Decimal context keeps"),
    ("1/2", "0.5", True, "a fraction and a decimal"),
    ("-3/6", "-1/2", True, "two fractions"),
    ("1/3", "0.333", False, "a decimal near a fraction"),
    ("100000", "1e5", True, "an exponent"),
    ("1/0", "1/0", False, "over zero"),
    ("1" * 5000 + "/1", "1" * 5000, False, "a fraction of more digits than int() reads"),
    (None, "72", False, "nothing extracted"),
    ("72", None, False, "no gold answer"),
    (None, None, False, "nothing equals nothing"),
    ("1.2.3", "1.2.3", False, "not a number, though equal as text"),
    ("-", "-", False, "nor is this"),
    ("", "", False, "nor this"),
    ("NaN", "NaN", False, "nor this"),
]


@pytest.mark.parametrize(("a", "b", "equal", "why"), NUMBERS, ids=[why for *_, why in NUMBERS])
def test_comparison(a: str | None, b: str | None, equal: bool, why: str) -> None:
    assert same_number(a, b) is equal, why
    assert same_number(b, a) is equal, why


def messages(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def right(texts: list[str], gold: list[str], extractor: str) -> list[bool]:
    return [grade(text, answer, "hash").right[extractor] for text, answer in zip(texts, gold, strict=True)]


def test_an_answer_is_right_or_wrong() -> None:
    texts, gold = ["#### 72", "72", "#### 72.0", "none", "#### 7\n72"], ["72"] * 5
    assert right(texts, gold, "strict") == [True, False, True, False, False]
    assert right(texts, gold, "flexible") == [True, True, True, False, True]
    assert right(["#### 1", "#### 1"], ["1", "2"], "strict") == [True, False]


@pytest.fixture(params=ROWS)
def gsm8k(request: pytest.FixtureRequest) -> list[str]:
    """The answer texts of a split; they come with neither the repository nor the network."""
    if not GSM8K.is_dir():
        pytest.skip("no ../shared/data/gsm8k beside the repository: real answers are not graded")
    lines = (GSM8K / f"{request.param}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == ROWS[request.param]
    return [json.loads(line)["answer"] for line in lines]


@pytest.mark.parametrize("extractor", ["strict", "flexible"])
def test_every_gsm8k_answer_is_right_against_itself(extractor: str, gsm8k: list[str]) -> None:
    """The gold number is read here by splitting, not by the code under test."""
    gold = [text.rpartition("####")[2].strip().replace(",", "") for text in gsm8k]
    assert all(right(gsm8k, gold, extractor))


@pytest.mark.parametrize("extractor", ["strict", "flexible"])
def test_every_gsm8k_answer_is_wrong_with_its_number_plus_one(extractor: str, gsm8k: list[str]) -> None:
    parts = [text.rpartition("#### ") for text in gsm8k]
    gold = [number.replace(",", "") for *_, number in parts]
    changed = [f"{before}{mark}{Decimal(g) + 1:,}" for (before, mark, _), g in zip(parts, gold, strict=True)]
    assert not any(right(changed, gold, extractor))
    # the changed text is graded, not refused as a whole
    assert all(right(changed, [str(Decimal(g) + 1) for g in gold], extractor))


def test_reward_gets_the_columns_and_none_becomes_nan() -> None:
    seen: dict[str, Any] = {}

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        seen.update(columns, completions=completions)
        return [1, None, 0.5, True, float("nan")]  # type: ignore[list-item]

    found = call_reward(reward, 5, completions=["a"] * 5, answer=["1"] * 5)
    assert seen == {"completions": ["a"] * 5, "answer": ["1"] * 5}
    assert found[0] == 1.0 and found[2:4] == [0.5, 1.0] and math.isnan(found[1]) and math.isnan(found[4])
    assert all(type(r) is float for r in found)
    assert call_reward(lambda: (0.0, 1.0), 2) == [0.0, 1.0]  # a tuple will do


def raises(**_: Any) -> list[float]:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, "the reward function raises raised KeyError: 'answer'"),
        (lambda **_: [1.0, 2.0], "returned 2, not a list of 3 rewards"),
        (lambda **_: [1.0] * 4, "returned 4, not a list of 3 rewards"),
        (lambda **_: [], "returned 0, not a list of 3 rewards"),
        (lambda **_: 1.0, "returned float, not a list of 3 rewards"),
        (lambda **_: None, "returned NoneType, not a list of 3 rewards"),
        (lambda **_: "abc", "returned str, not a list of 3 rewards"),
        (lambda **_: {1: 1, 2: 2, 3: 3}, "returned dict, not a list of 3 rewards"),
        (lambda **_: [1.0, "good", 0.0], "neither a number nor None"),
        (lambda **_: [1.0, [0.0], 0.0], "neither a number nor None"),
        (lambda **_: [1.0, 1j, 0.0], "neither a number nor None"),
        (lambda **_: [1.0, math.inf, 0.0], "infinite reward"),
        (lambda **_: [1.0, None, -math.inf], "infinite reward"),
        (lambda **_: [1.0, 0.0, 10**400], "infinite reward"),
        (lambda completions: [1.0] * 3, "raised TypeError: .*answer"),
    ],
)
def test_a_reward_function_that_misbehaves_is_named(reward: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call_reward(reward, 3, completions=[""] * 3, answer=[""] * 3)


def test_what_a_reward_function_raised_is_kept_as_the_cause() -> None:
    with pytest.raises(InputError) as caught:
        call_reward(raises, 1)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_without_a_name_is_shown_as_it_is() -> None:
    with pytest.raises(InputError, match="the reward function functools.partial"):
        call_reward(partial(lambda x: [x, x], 0.5), 1)


def test_load_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tl_mine").mkdir()
    (tmp_path / "tl_mine" / "__init__.py").write_text("")
    (tmp_path / "tl_mine" / "rewards.py").write_text(
        "def brief(completions, **_):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert call_reward(load_reward("tl_mine.rewards:brief"), 2, completions=["a", "bcd"]) == [-1.0, -3.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nosuchmodule:f", "No module named 'nosuchmodule'.*package.module:function"),
        ("math:nosuch", "no attribute 'nosuch'.*package.module:function"),
        ("math", "package.module:function"),
        ("math:", "package.module:function"),
        (":sqrt", "package.module:function"),
        ("", "package.module:function"),
        (".rewards:f", "package.module:function"),
        ("./rewards.py:f", "package.module:function"),
        ("/rewards.py:f", "package.module:function"),
        ("math:sqrt:f", "package.module:function"),
        ("math:pi", "pi is not a function"),
    ],
)
def test_load_reward_refuses(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=f"--reward {spec}: .*{message}"):
        load_reward(spec)
