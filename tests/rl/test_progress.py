"""What the progress line says, and when a run that goes wrong is named."""

from typing import Any

from tinylora.rl.alarms import Alarms
from tinylora.rl.progress import progress_line


def row(step: int, reward: float | None = 0.5, length: float = 100.0, cut: float = 0.0) -> dict[str, Any]:
    return {"step": step, "reward": reward, "completions/mean_length": length, "completions/clipped_ratio": cut}


def test_the_line_has_length_and_cut_off() -> None:
    speed = {"tokens_per_second": 10.0, "frac_reward_zero_std": 0.25}
    assert progress_line(row(1, 0.5, 31.4, 0.125) | speed) == "reward 0.500, 25% dead groups, length 31, 12% cut off, 10 tok/s"


def test_a_reward_under_half_of_its_best_is_named_once() -> None:
    """20 steps at 0.8, then 0.2: the mean of ten is under 0.4 when seven of them are low."""
    alarms = Alarms([])
    said = [alarms(row(n, 0.8 if n <= 20 else 0.2)) for n in range(1, 40)]
    [(step, [line])] = [(n, found) for n, found in enumerate(said, 1) if found]
    assert step == 27
    assert line == "step 27: the mean reward of the last 10 steps is 0.38, under half of the best 10 steps' 0.8 (up to step 10)"


def test_rewards_that_were_never_good_are_not_named() -> None:
    alarms = Alarms([])
    assert not any(alarms(row(n, -1.0 - n)) for n in range(1, 40))
    assert not any(Alarms([])(row(n, None)) for n in range(1, 5))


def test_answers_that_collapse_are_named_and_again_after_ten_good_steps() -> None:
    lengths = [80.0] * 12 + [19.0] * 3 + [30.0] * 12 + [0.0]
    alarms = Alarms([])
    said = {n: alarms(row(n, length=length)) for n, length in enumerate(lengths, 1)}
    assert [n for n, found in said.items() if found] == [13, 28]
    assert said[13] == [
        "step 13: completions have 19 tokens on average, under a quarter of the first 10 steps' 80; completions/ has them"
    ]


def test_cut_off_answers_are_named_at_once() -> None:
    alarms = Alarms([])
    assert alarms(row(1, cut=0.5)) == []
    assert alarms(row(2, cut=0.51)) == ["step 2: 51% of the completions are cut off; raise --max-completion-length"]
    assert alarms(row(3, cut=1.0)) == []


def test_a_resumed_run_knows_what_was_said() -> None:
    steps = [row(n, 0.8 if n <= 20 else 0.2) for n in range(1, 30)]
    assert Alarms(steps)(row(30, 0.2)) == []
    assert Alarms(steps[:26])(row(27, 0.2)) != []
