"""Rows of every data set: what becomes the prompt and the gold answer, and what is skipped, counted and named."""

import json
from pathlib import Path
from typing import Any

import pytest

from tinylora.errors import InputError
from tinylora.tasks.known import KNOWN
from tinylora.tasks.prompts import GSM8K_HASH, QWEN_BOXED
from tinylora.tasks.sets import load_task

DATA = Path(__file__).parents[3] / "shared" / "data"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- fields: set, a row as one of its sources has it, question, gold answer ---------------------------------------------

FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    ("gsm8k", {"question": "Q", "answer": "So.\n#### 1,234"}, "Q", "1234"),
    ("math", {"problem": "Q", "solution": r"Thus \boxed{3}.", "level": "Level 5", "type": "Algebra"}, "Q", "3"),
    ("math500", {"problem": "Q", "answer": r"\frac{1}{2}", "solution": r"\boxed{9}", "level": 2}, "Q", r"\frac{1}{2}"),
    ("aime24", {"problem": "Q", "answer": "025", "solution": ""}, "Q", "025"),
    ("aime24", {"problem": "Q", "answer": 25}, "Q", "25"),
    ("amc23", {"problem": "Q", "answer": 27.0}, "Q", "27"),
    ("amc23", {"question": "Q", "answer": "27"}, "Q", "27"),
    ("amc23", {"problem": "Q", "answer": 27.5}, "Q", "27.5"),
    ("minerva_math", {"problem": "Q", "solution": r"\boxed{1}, so \boxed{4.5e33} ergs"}, "Q", "4.5e33"),
    ("minerva_math", {"question": "Q", "answer": "2"}, "Q", "2"),
    ("minerva_math", {"problem": "Q", "solution": r"\boxed{np.arcsin(10/13)}"}, "Q", r"\arcsin(10/13)"),
    ("olympiadbench", {"question": "Q", "final_answer": ["$2n$"], "is_multiple_answer": False}, "Q", "2n"),
    ("olympiadbench", {"question": "Q", "final_answer": ["$69$,$84$"], "is_multiple_answer": True}, "Q", r"\{69,84\}"),
    ("olympiadbench", {"question": "Q", "context": "C", "final_answer": ["5"]}, "C\nQ", "5"),
]


@pytest.mark.parametrize(("name", "row", "question", "gold"), FIELDS)
def test_fields(tmp_path: Path, name: str, row: dict[str, Any], question: str, gold: str) -> None:
    found = load_task(name, write(tmp_path / name / "test.jsonl", [row])).test[0]
    assert (found["question"], found["answer"]) == (question, gold)
    assert found["prompt"] == [{"role": "system", "content": QWEN_BOXED}, {"role": "user", "content": question}]


def test_verls_form_of_math(tmp_path: Path) -> None:
    ask = r" Let's think step by step and output the final answer within \boxed{}."
    row = {"level": "Level 3", "prompt": [{"role": "user", "content": "Q" + ask}], "reward_model": {"ground_truth": "7"}}
    found = load_task("math", write(tmp_path / "rows.jsonl", [row] * 10)).train[0]
    assert (found["question"], found["answer"]) == ("Q", "7"), "their instruction is dropped, ours is put"
    assert found["prompt"] == [{"role": "system", "content": QWEN_BOXED}, {"role": "user", "content": "Q"}]


def test_an_error_column_becomes_a_tolerance(tmp_path: Path) -> None:
    rows = [{"question": "Q", "final_answer": ["4.2"], "error": error} for error in (None, "1e-1")]
    found = load_task("olympiadbench", write(tmp_path / "olympiadbench" / "test.jsonl", rows)).test
    assert [row["tolerance"] for row in found] == [0.0, 0.1]


def test_unusable_rows_are_counted_and_named(tmp_path: Path) -> None:
    row = {"problem": "Q", "level": "Level 4", "solution": r"\boxed{1}"}
    rows = [{**row, "level": "Level 2"}, row, {**row, "level": "Level ?"}, {**row, "solution": "none"}, {**row, "problem": " "}]
    task = load_task("math", write(tmp_path / "math" / "test.jsonl", rows + [{**row, "level": "Level 1"}] * 12))
    assert len(task.test) == 1
    assert task.notes == [
        "math test: 13 of 17 rows skipped, below level 3: row 1, 6, 7, 8, 9, 10, 11, 12 and 5 more",
        "math test: 1 of 17 rows skipped, level '?': row 3",
        "math test: 1 of 17 rows skipped, no gold answer: row 4",
        "math test: 1 of 17 rows skipped, no text column 'problem' (it has level, problem, solution): row 5",
    ]


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "amc23" / "test.jsonl", [{"problem": "Q", "answer": None}] * 3)
    with pytest.raises(InputError, match="amc23 test has no usable rows; row 1: no gold answer"):
        load_task("amc23", path.removesuffix("/test.jsonl"))


# ---- styles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "prompt", "answer_format"),
    [
        ("auto", [{"role": "system", "content": QWEN_BOXED}, {"role": "user", "content": "Q"}], "boxed"),
        ("gsm8k-hash", [{"role": "user", "content": "Q" + GSM8K_HASH}], "hash"),
        ("qwen-boxed", [{"role": "system", "content": QWEN_BOXED}, {"role": "user", "content": "Q"}], "boxed"),
        ("plain", [{"role": "user", "content": "Q"}], "boxed"),
    ],
)
def test_styles(tmp_path: Path, style: str, prompt: list[dict[str, str]], answer_format: str) -> None:
    task = load_task("gsm8k", write(tmp_path / "gsm8k" / "test.jsonl", [{"question": "Q", "answer": "#### 1"}]), style)
    assert (task.test[0]["prompt"], task.answer_format) == (prompt, answer_format)


def test_plain_keeps_a_sets_own_format(tmp_path: Path) -> None:
    path = write(tmp_path / "amc23" / "test.jsonl", [{"problem": "Q", "answer": 1.0}])
    assert load_task("amc23", path, "plain").answer_format == "boxed"


# ---- sources ------------------------------------------------------------------------------------------------------------

OTHER = [{"prompt": f"Q{i}", "answer": str(i), "mine": i} for i in range(20)]


def test_other_data_with_a_prompt_column(tmp_path: Path) -> None:
    task = load_task("mine", write(tmp_path / "rows.jsonl", OTHER))
    assert (len(task.train), len(task.test), task.answer_format) == (18, 2, "boxed")
    assert task.train[0] == {"prompt": [{"role": "user", "content": "Q0"}], "answer": "0", "mine": 0}
    assert [row["mine"] for row in task.test] == [9, 19], "every tenth row is held out"


def test_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert load_task("mine", write(tmp_path / "rows.jsonl", [{"prompt": talk, "answer": "1"}])).train[0]["prompt"] == talk


def test_answers_are_not_needed_with_a_reward_function(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Q", "mine": 1}])
    task = load_task("mine", path, needs_answers=False)
    assert task.train[0]["mine"] == 1 and not task.has_answers
    with pytest.raises(InputError, match="row 1: no gold answer"):
        load_task("mine", path)


@pytest.mark.parametrize("prompt", [None, "", " ", [], ["Q"], [{"role": "user"}], 7])
def test_rows_without_a_prompt_are_skipped(tmp_path: Path, prompt: Any) -> None:
    task = load_task("mine", write(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": "1"}, *OTHER]))
    assert task.notes == [
        "mine train: 1 of 19 rows skipped, no column 'prompt' with text or messages (it has answer, prompt): row 1"
    ]


def test_parquet_and_save_to_disk_hold_the_same_rows(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = DatasetDict({"train": Dataset.from_list(OTHER[:15]), "test": Dataset.from_list(OTHER[15:])})
    data.save_to_disk(tmp_path / "disk")
    for split, rows in (("train", OTHER[:15]), ("test", OTHER[15:])):
        write(tmp_path / "lines" / f"{split}.jsonl", rows)
        (tmp_path / "tables").mkdir(exist_ok=True)
        data[split].to_parquet(tmp_path / "tables" / f"{split}.parquet")
    found = [load_task("mine", str(tmp_path / kind)) for kind in ("lines", "tables", "disk")]
    assert [(len(t.train), len(t.test)) for t in found] == [(15, 5)] * 3
    assert found[0].train == found[1].train == found[2].train and found[0].test == found[1].test == found[2].test
    data["train"].save_to_disk(tmp_path / "one")
    assert len(load_task("mine", str(tmp_path / "one")).train) == 14
    assert len(load_task("mine", str(tmp_path / "tables" / "train.parquet")).train) == 14


def test_a_folder_may_hold_a_folder_for_each_task(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "test.jsonl", [{"question": "Q", "answer": "#### 1"}])
    write(tmp_path / "amc23" / "test.jsonl", [{"problem": "P", "answer": 2.0}])
    assert [load_task(name, str(tmp_path)).test[0]["answer"] for name in ("gsm8k", "amc23")] == ["1", "2"]


def test_lines_are_cut_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a\u2028b", "answer": "1"}\n{"prompt": "c", "answer": "2"}\n', encoding="utf-8"
    )
    assert [r["prompt"][0]["content"] for r in load_task("mine", str(tmp_path / "rows.jsonl")).train] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "line 1 is not JSON"), (b"", "has no rows"), (b"\xff\xfe", "not UTF-8"), (b"[1]\n", "line 1 is not a JSON object")],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=says):
        load_task("mine", str(tmp_path / "rows.jsonl"))


def test_paths_that_hold_no_data(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "state.json").write_text("{}")
    for path, says in (
        ("none.jsonl", "cannot read"),
        ("bad.parquet", "as parquet"),
        (".", "holds neither"),
        ("disk", "save_to_disk"),
    ):
        with pytest.raises(InputError, match=says):
            load_task("mine", str(tmp_path / path))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="--dataset gsm8: choose builtin, gsm8k, math"):
        load_task("gsm8")


def test_the_hub_is_asked_by_the_usual_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, subset, split))
        if path == "me/mine" and split == "test":
            raise ValueError("no such split")
        return [
            {
                "question": "Q",
                "answer": "#### 1",
                "level": "Level 5",
                "solution": r"\boxed{1}",
                "final_answer": ["1"],
                "prompt": "P",
            }
        ]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in KNOWN:
        assert load_task(name, splits=("test",)).test[0]["answer"] in ("1", "#### 1")
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("DigitalLearningGmbH/MATH-lighteval", None, "test"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("math-ai/amc23", None, "test"),
        ("math-ai/minervamath", None, "test"),
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    ]
    assert load_task("math500").train == [], "it has no training rows"
    asked.clear()
    assert len(load_task("me/mine:small").train) == 1
    assert asked == [("me/mine", "small", "train"), ("me/mine", "small", "test")]
    with pytest.raises(InputError, match="the hub did not give me/mine test .no such split."):
        load_task("me/mine", splits=("test",))


# ---- the real sets ------------------------------------------------------------------------------------------------------

ROWS = {
    "gsm8k": (7473, 1319, 0),
    "math": (5584, 3669, 3247),
    "math500": (0, 500, 0),
    "aime24": (0, 30, 0),
    "amc23": (0, 40, 0),
    "minerva_math": (0, 272, 0),
    "olympiadbench": (0, 674, 1),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_loaded_or_skipped_with_a_reason(name: str) -> None:
    if not DATA.is_dir():
        pytest.skip("no ../shared/data beside the repository: real rows are not loaded")
    task = load_task(name, str(DATA))
    skipped = sum(int(note.split(": ")[1].split(" of ")[0]) for note in task.notes)
    assert (len(task.train), len(task.test), skipped) == ROWS[name]
    read = {"gsm8k": 8792, "math": 12500, "olympiadbench": 675}.get(name, len(task.test))
    assert len(task.train) + len(task.test) + skipped == read
    for row in task.train + task.test:
        assert row["prompt"][-1]["content"].startswith(row["question"]) and row["answer"].strip()
    if name == "math":
        assert {str(row["level"]).removeprefix("Level ") for row in task.train} == {"3", "4", "5"}
        assert not any("Let's think step by step" in row["question"] for row in task.train)
