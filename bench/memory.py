"""Peak memory of one GRPO step, ours beside TRL's, each in a process of its own: python -m bench.memory

Of --model NAME|DIRECTORY|GGUF. One prompt of about 150 tokens, 8 completions of up to --longest, fp32 on a CPU and bf16 on a
GPU where --dtype and --peer-dtype say nothing else, one microbatch, no gradient checkpointing, the same trained numbers. On a
CPU what is reported is the process's peak resident size beyond what it held with the model loaded and the trainer built; on a
GPU the allocator's.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.measure import card, print_json
from bench.models import CHOICES, add_dtypes, model_directory
from tinylora.cli import table

SAMPLES = 8


def peak(device: str) -> float:
    """GB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    # getrusage's peak begins at that of the parent, which has made the model
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def held(device: str) -> float:
    """GB that this process holds now."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated() / 1e9
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def rows(count: int) -> list[dict[str, Any]]:
    from tinylora.tasks import builtin as problems

    text = [row["question"] for row in problems.rows("train", 8 * count)]
    return [{"question": " ".join(text[8 * i : 8 * i + 8]), "answer": "#### 1"} for i in range(count)]


def settings(path: Path, prompts: int, samples: int, longest: int, device: str, scratch: Path) -> dict[str, Any]:
    """Of a run in which no group is dead, in one microbatch; its rows are written into `scratch`."""
    (scratch / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(max(20, 2 * prompts))))
    found: dict[str, Any] = {"model": str(path), "dataset": "gsm8k", "data": str(scratch / "rows.jsonl"), "eval_size": 0}
    found["prompt_style"] = "plain"  # as the peers' rows are
    found |= {
        "u": 13,
        "n_tie": "all",
        "prompts_per_step": prompts,
        "num_generations": samples,
        "max_steps": 1,
        "device": device,
    }
    found |= {"max_completion_length": longest, "microbatch_tokens": 10**6, "output_dir": str(scratch / "run")}
    return found | {"reward": "bench.memory:alternating", "dtype": "float32" if device == "cpu" else "bfloat16"}


def ours(path: Path, longest: int, device: str, dtype: str, scratch: Path) -> dict[str, float]:
    from tinylora.rl.config import TrainConfig
    from tinylora.rl.trainer import Trainer

    trainer = Trainer(TrainConfig(**settings(path, 1, SAMPLES, longest, device, scratch) | {"dtype": dtype}))
    before = held(device)
    row = trainer._train_step()
    return {"before": before, "peak": peak(device), "tokens": row["completions/mean_length"], "seconds": row["step_time"]}


def alternating(completions: list[Any], **_: Any) -> list[float | None]:
    """A reward under which no group is dead."""
    return [float(i % 2) for i in range(len(completions))]


def trl(path: Path, longest: int, device: str, dtype: str, scratch: Path) -> dict[str, float]:
    import time

    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from bench.rollout import peer

    model = peer(path, getattr(torch, dtype), device)
    lengths: list[int] = []

    def reward(completion_ids: list[Any], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(i % 2) for i in range(len(completion_ids))]

    marks: dict[str, float] = {}

    class Mark(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks["before"], marks["began"] = held(device), time.perf_counter()

    arguments = GRPOConfig(
        output_dir=str(scratch / "trl"),
        per_device_train_batch_size=SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=longest,
        max_steps=1,
        beta=0.0,
        gradient_checkpointing=False,
        bf16=device != "cpu",
        use_cpu=device == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": r["question"]}]} for r in rows(4)])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, padding_side="left")
    GRPOTrainer(
        model=model, reward_funcs=[reward], args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Mark()]
    ).train()
    seconds = time.perf_counter() - marks["began"]
    return {"before": marks["before"], "peak": peak(device), "tokens": sum(lengths) / len(lengths), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen0.5b", help=CHOICES)
    parser.add_argument("--longest", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_dtypes(parser, "bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--json", help="a file for the last line too")
    parser.add_argument("--only", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if o.only:
            warnings.filterwarnings("ignore")
            print(json.dumps({"ours": ours, "trl": trl}[o.only](Path(o.path), o.longest, o.device, o.dtype, Path(scratch))))
            return
        dtype = torch.float32 if o.device == "cpu" else torch.bfloat16
        path, found = model_directory(o.model, Path(scratch), dtype), {}
        for name, own in (("ours", o.dtype), ("trl", o.peer_dtype)):
            command = [sys.executable, "-m", "bench.memory", "--only", name, "--path", str(path), "--device", o.device]
            done = subprocess.run([*command, "--longest", str(o.longest), "--dtype", own], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
    o.model = Path(o.model).name  # in the table and the result
    cells = [
        [n, *(f"{f[k]:.2f}" for k in ("before", "peak")), f"{f['peak'] - f['before']:.2f}", f"{f['tokens']:.0f}"]
        for n, f in found.items()
    ]
    title = f"{o.model}, 1 x {SAMPLES}, {o.dtype} beside {o.peer_dtype}"
    print(table([title, "GB before", "GB peak", "GB of the step", "tokens each"], cells))
    extra = {name: f["peak"] - f["before"] for name, f in found.items()}
    ratios = {"peak": found["trl"]["peak"] / found["ours"]["peak"], "step": extra["trl"] / extra["ours"]}
    about = {k: getattr(o, k) for k in ("model", "device", "dtype", "peer_dtype")}
    print_json({"bench": "memory", **card(), **about, "found": found, "ratios": ratios}, o.json)


if __name__ == "__main__":
    main()
