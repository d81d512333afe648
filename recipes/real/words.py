"""Writes words/train.jsonl and words/test.jsonl: one-step sums in plain words, of which a model of 135M gets some right.

    python recipes/real/words.py

Rows are GSM8K's: question and answer, "#### N". Test numbers are never trained on in their order: what is added,
subtracted or multiplied is hashed in order, and the hash says which side it belongs to, so "3 bags of 5" and "5 bags of
3" may part. The files are in the repository; a test writes them again.
"""

import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

NAMES = ("Anna", "Ben", "Leo", "Lucy", "Mia", "Nina", "Sam", "Tom")
# Without it SmolLM2 talks on: at temperature 0.5 it takes 50 tokens and 45 % are cut off at 64, with it 20 and none.
ASK = "Answer in one short sentence."
THINGS = ("apples", "books", "cards", "coins", "marbles", "pencils", "shells", "stamps")
TRAIN, TEST, TEST_SHARE = 1024, 512, 4


def problems(seed: str) -> Iterator[tuple[str, int, bool]]:
    """Question, answer, and whether it is a test problem: an endless stream."""
    rng = random.Random(seed)
    while True:
        name, thing, kind = rng.choice(NAMES), rng.choice(THINGS), rng.choice(("gets", "gives", "bags"))
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        if kind == "gets":
            question, answer = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b
        elif kind == "gives":
            question = f"{name} has {a + b} {thing} and gives away {b}. How many {thing} does {name} have left?"
            answer = a
        else:
            a, b = a % 9 + 2, b % 9 + 2
            question, answer = f"{name} has {a} bags with {b} {thing} in each. How many {thing} does {name} have?", a * b
        yield question, answer, zlib.crc32(f"{kind} {a} {b}".encode()) % TEST_SHARE == 0


def rows(test: bool) -> list[str]:
    """The lines of one file, every question once."""
    found: dict[str, str] = {}
    for question, answer, held_out in problems("words"):
        if held_out == test:
            found[question] = json.dumps({"question": f"{question} {ASK}", "answer": f"#### {answer}"}) + "\n"
        if len(found) == (TEST if test else TRAIN):
            return list(found.values())
    raise AssertionError("the stream has no end")


def main() -> None:
    directory = Path(__file__).parent / "words"
    directory.mkdir(exist_ok=True)
    for name, test in (("train", False), ("test", True)):
        (directory / f"{name}.jsonl").write_text("".join(rows(test)))


if __name__ == "__main__":
    main()
