"""The built-in task: short word problems of two additions or subtractions, with a careful and a hasty answer.

    question  "Ann has 23 pens. Gets 48. Loses 7. How many?"
    careful   "23+48=71. 71-7=64. #### 64"
    hasty     "#### 61"            the answer plus a uniform error of -9..9, so wrong 18 times in 19

Train and test are disjoint by construction: the numbers and operations of a problem, without its names and things, are
hashed, and the hash says which side it belongs to.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = ("Ann", "Ben", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal")
THINGS = ("pens", "cups", "nuts", "figs", "eggs", "hats", "toys", "maps")
CAREFUL_SHARE = 0.40  # of the pretraining answers; the base answers carefully about this often
TEST_SHARE = 8  # one hash value in this many belongs to the test side


@dataclass(frozen=True)
class Problem:
    name: str
    thing: str
    start: int
    changes: tuple[int, int]  # signed: a gain is positive, a loss negative

    @property
    def question(self) -> str:
        verbs = " ".join(f"{'Gets' if c > 0 else 'Loses'} {abs(c)}." for c in self.changes)
        return f"{self.name} has {self.start} {self.thing}. {verbs} How many?"

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)

    @property
    def careful(self) -> str:
        steps, total = [], self.start
        for change in self.changes:
            steps.append(f"{total}{change:+d}={total + change}.")
            total += change
        return f"{' '.join(steps)} #### {total}"

    @property
    def foreign(self) -> str:
        """The same steps told as a story, which is not how the base writes them; in its own words."""
        said, total = [f"{self.name} has {self.start} {self.thing}."], self.start
        for change in self.changes:
            total += change
            said += [f"{'Gets' if change > 0 else 'Loses'} {abs(change)}.", f"{self.name} has {total} {self.thing}."]
        return f"{' '.join(said)} #### {total}"

    def hasty(self, rng: random.Random) -> str:
        return f"#### {max(0, self.answer + rng.randint(-9, 9))}"

    @property
    def split(self) -> str:
        key = f"{self.start},{self.changes[0]},{self.changes[1]}"
        return "test" if zlib.crc32(key.encode()) % TEST_SHARE == 0 else "train"


def problems(split: str, seed: int) -> Iterator[Problem]:
    """An endless stream of problems of one split ("train" or "test"), the same for the same seed everywhere."""
    rng = random.Random(f"tinylora-{split}-{seed}")
    while True:
        name, thing, total = rng.choice(NAMES), rng.choice(THINGS), rng.randint(10, 99)
        start, changes = total, []
        for _ in range(2):
            size = rng.randint(2, 99)
            change = -size if rng.random() < 0.5 and size <= total else size
            changes.append(change)
            total += change
        problem = Problem(name, thing, start, (changes[0], changes[1]))
        if problem.split == split:
            yield problem


def rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` distinct problems as GSM8K-shaped rows: {"question", "answer"}, the answer ending in "#### n"; and "foreign"."""
    found: dict[str, dict[str, str]] = {}
    for problem in problems(split, seed):
        if len(found) == count:
            break
        found.setdefault(
            problem.question, {"question": problem.question, "answer": problem.careful, "foreign": problem.foreign}
        )
    return list(found.values())
