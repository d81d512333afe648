"""results.jsonl -> tables: as the driver writes it, torn and mixed with other machines' lines."""

import json
from pathlib import Path

import pytest
import torch

from bench import gpu_report, models
from bench.models import random_adapter, random_decoder

ABOUT = {
    "stage": "machine",
    "gpu": "NVIDIA H100",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "commit": "abc1234",
    "shape": "qwen7b",
}


def step(bucket: int, adapters: int, x: float, ratio: float | None = None) -> dict:
    row = {"stage": "decode", "bucket": bucket, "context": 384, "adapters": adapters, "ms": 7.5, "x_floor": x}
    return {**row, "tokens_per_second": bucket / 7.5e-3, "x_adapter_off": ratio}


FIRST = [
    ABOUT,
    {"stage": "card", "began": True},
    {"stage": "card", "gemm_tflops": 790.4, "copy_gbytes_per_second": 2987.6},
    {"stage": "card", "ok": True, "seconds": 3.0},
    {"stage": "verdicts", "op": "rope", "dtype": "bfloat16", "error": None, "seconds": 1.0, "same_bits": True}
    | {"closest": {"case": "x", "error": 1e-3, "allowed": 4e-3}},
    {"stage": "verdicts", "op": "swiglu", "dtype": "float16", "error": "ended by signal 6", "closest": None, "same_bits": True},
    step(64, 0, 1.5),
    step(64, 1, 1.52, 1.013),
    step(256, 1, 1.61),
    {"stage": "step", "rollout": 2, "seconds": 4.1, "tokens_per_second": 12345.6, "x_floor": 1.7, "host_share": 0.031},
    {"stage": "step", "update_seconds": 0.93, "tokens_per_second": 17600.0, "mfu": 0.583, "same_bits": False},
    {"stage": "step", "peak_gigabytes": 70.25},
    {"stage": "profiles", "what": "decode", "slots": 64, "kernels": [["gemm", 112, 5000.0], ["_combine", 28, 500.0]]},
    {"stage": "graphs", "failed": "RuntimeError: no", "seconds": 1.0},
    {"stage": "end", "ok": ["card"], "failed": ["graphs"], "skipped": []},
]
SECOND = [
    ABOUT,
    {"stage": "peers", "what": "rollout, transformers + PEFT", "seconds": 9.0, "ours_is_x": 5.25},
    {"stage": "peers", "what": "update, transformers + PEFT", "seconds": 2.0, "ours_is_x": 1.5},
    {"stage": "tests", "tests_passed": 90, "tests_failed": 1, "tests_skipped": 5, "tests_error": 0},
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Both calls in one file after a CPU's, the last line torn in the middle."""
    cpu = [{**ABOUT, "gpu": None}, step(8, 1, 99.0)]
    lines = [json.dumps(fact) for fact in [*cpu, *FIRST, *SECOND, {"stage": "tests", "outcome": "passed"}]]
    (tmp_path / "results.jsonl").write_text("\n".join(lines)[:-9])
    return tmp_path / "results.jsonl"


def test_tables(results: Path) -> None:
    (machine,) = gpu_report.read(results)
    text = gpu_report.tables([machine])
    for line in (
        "### NVIDIA H100, torch 2.11.0+cu130, triton 3.6.0, commit abc1234, qwen7b",
        "Floors from 790 TFLOP/s and 2,988 GB/s.",
        "| 64 | 384 | on | 7.50 | 1.52 | 8,533 | 1.013 |",
        "| rollout | 4.10 | 12,346 | 1.70 x floor | host 3.1% |",
        "| update | 0.93 | 17,600 | MFU 58% | OTHER BITS EACH TIME |",
        "| rope | bfloat16 | 0.25 of what is allowed | yes |",
        "| swiglu | float16 | ended by signal 6 | yes |",
        "| `gemm` | 112 | 5,000 | 91% |",
        "| rollout, transformers + PEFT | 9.00 | 5.25 |",
        "- Peak memory of a step: 70.2 GB.",
        "- GPU tests: 90 passed, 1 failed, 5 skipped.",
        "- Stage graphs failed: RuntimeError: no.",
    ):
        assert line in text.splitlines(), line
    assert "99.0" not in text, "a CPU's numbers are no GPU's"


def test_the_readme_gets_one_row(results: Path) -> None:
    row = gpu_report.row(gpu_report.read(results)).splitlines()[2]
    assert row.split(" | ")[1:] == ["1.52 x floor", "1.61 x floor", "58%", "12,346", "5.2 / 1.5 |"]


def test_without_a_gpu_both_say_so(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("")
    assert gpu_report.tables(gpu_report.read(tmp_path / "results.jsonl")) == gpu_report.row([]) == gpu_report.NOTHING


def test_whatever_was_left_is_shown(tmp_path: Path) -> None:
    """Cut off after any number of lines, the tables are of what is there."""
    lines = [json.dumps(fact) for fact in [*FIRST, *SECOND]]
    for n in range(len(lines)):
        (tmp_path / "results.jsonl").write_text("\n".join([*lines[:n], lines[n][:25]]))
        machines = gpu_report.read(tmp_path / "results.jsonl")
        assert len(machines) == min(n, 1)
        assert gpu_report.row(machines) and gpu_report.tables(machines)


def test_random_7b_weights_come_from_the_device_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On meta, where nothing can be drawn by mistake on a CPU: no generator of a CPU's, no decomposition, no file."""
    torch.empty(1, device="meta").normal_()  # imports what it needs
    asked: list[str] = []

    def refused(name: str):  # type: ignore[no-untyped-def]
        def call(*arguments: object, **named: object) -> None:
            asked.append(name)
            raise AssertionError(f"{name} was called")

        return call

    normal = torch.Tensor.normal_

    def normal_(self: torch.Tensor, *arguments: float, **named: object) -> torch.Tensor:
        assert self.device.type == "meta" and "generator" not in named
        asked.append("normal_")
        return normal(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "normal_", normal_)
    for module, name in [(torch, "randn"), (torch, "rand"), (torch, "randint"), (torch, "Generator"), (torch, "save")]:
        monkeypatch.setattr(module, name, refused(name))
    for name in ("svd", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, refused(name))
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_config", refused("from_config"))
    monkeypatch.chdir(tmp_path)
    decoder = random_decoder("qwen7b", torch.device("meta"), torch.bfloat16)
    adapter = random_adapter(decoder)
    count = sum(g.weight.numel() for layer in decoder.layers for g in layer.groups) + decoder.head.numel()
    assert count == 28 * (4608 + 3584 + 37888 + 18944) * 3584 + 152064 * 3584 and adapter.num_parameters == 13
    assert len(asked) == 28 * (7 + 3) + 2 + 28 * 7 * 2 and set(asked) == {
        "normal_"
    }  # weights and biases, embedding and head, A and B
    assert not list(tmp_path.iterdir())
