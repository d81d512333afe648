"""A run's files, read back."""

import json
from pathlib import Path

import torch

from tinylora.rl.config import TrainConfig
from tinylora.rl.run_directory import RunDirectory, v_at_step
from tinylora.studies import stored, sweep


def test_a_row_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    """JSON may hold U+2028 and NEL as they are: ours does not, but rows may have been through other hands."""
    about = {"settings": {}, "base_model_hash": "", "max_steps": 2}
    rows = [{"step": i, "step_time": 1.0, "adapter/v": [float(i)], "note": "a\u2028b\x85c"} for i in (1, 2)]
    RunDirectory(tmp_path, about, resume=False).save_checkpoint({"v": torch.ones(1)}, rows[-1])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    assert v_at_step(tmp_path, 2).tolist() == [2.0]
    assert stored.read(tmp_path / "metrics.jsonl", lines=True) == rows
    assert sweep._rows(TrainConfig(output_dir=str(tmp_path))) == rows
    assert RunDirectory(tmp_path, about, resume=True).rows == rows
