"""The examples run as they stand: TRL trains an attached model, saves it, and goes on from a checkpoint with the same v."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tinylora
from tinylora.tasks.bases import BUILTIN

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "more"), [("trl_sft", ["--batch-size", "8"]), ("trl_grpo", ["--completions", "32"])])
def test_trl_trains_saves_and_resumes(name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    main = example(name).main
    arguments = ["--save-steps", "2", "--max-steps", "4", *more, "--output-dir"]
    adapter = main([*arguments, str(tmp_path / "whole")])
    assert adapter.v.abs().max() > 1e-3
    history = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert any(row.get("grad_norm", 0) > 0 for row in history)

    # what save_model wrote: the base's tensors, bit for bit, and v
    saved, base = (
        load_file(tmp_path / "whole" / "model.safetensors"),
        AutoModelForCausalLM.from_pretrained(BUILTIN).state_dict(),
    )
    assert torch.equal(saved.pop("tinylora.adapters.default.v"), adapter.v)
    assert saved and all(torch.equal(tensor, base[key]) for key, tensor in saved.items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")  # it opens as the base, without v
    assert all(torch.equal(tensor, base[key]) for key, tensor in plain.state_dict().items())

    # what adapter.save wrote, on a model of its own
    fresh = AutoModelForCausalLM.from_pretrained(BUILTIN)
    assert torch.equal(tinylora.load_adapter(tmp_path / "whole" / "adapter", fresh).v, adapter.v)

    # resumed from the half-way checkpoint: the same four steps
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    half = load_file(tmp_path / "half" / "checkpoint-2" / "model.safetensors")["tinylora.adapters.default.v"]
    assert half.abs().max() > 0 and not torch.equal(half, adapter.v)
    resumed = main([*arguments, str(tmp_path / "half"), "--resume"])
    torch.testing.assert_close(resumed.v, adapter.v, rtol=1e-5, atol=1e-7)


def test_an_own_task_in_four_commands(tmp_path: Path) -> None:
    """The script as it stands, on the built-in base, a step each: trained, scored on other rows, gone on there, reported."""
    environment = {
        **os.environ,
        "MODEL": "builtin",
        "STEPS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    script = ["bash", str(EXAMPLES / "own_task" / "run.sh"), str(tmp_path / "out")]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = tmp_path / "out" / "first", tmp_path / "out" / "second"
    assert json.loads((first / "config.json").read_text())["settings"]["reward"] == [
        "rewards.py:right",
        "rewards.py:shows_work",
    ]
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval/n"] for row in rows if "eval/reward" in row] == [40, 40]
    scores = json.loads((first / "scores" / "results.json").read_text())["tasks"]["sums"]["scores"]
    assert {"base", "trained", "paired"} == scores["greedy, reward"].keys()
    saved = load_file(first / "adapter" / "adapter_model.safetensors")["v"]
    assert torch.equal(load_file(second / "init" / "adapter_model.safetensors")["v"], saved) and saved.abs().max() > 0
    assert (tmp_path / "out" / "report.html").exists()
