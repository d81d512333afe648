"""One GRPO step of the built-in task, ours beside the peers': python -m bench.step [--model NAME|DIRECTORY|GGUF]

    rollout     8 completions of 16 prompts: ours; transformers generate on a PEFT TinyLoRA model
    whole step  rollout, reward, update:     ours; TRL's GRPOTrainer on a PEFT TinyLoRA model

All in one process, interleaved step by step, same prompts per step, samples, cap, temperature and trained numbers, on the
built-in base or another model. Rewards on another model alternate, on both sides: with few right answers most groups are dead,
and ours leaves those out of its update while TRL does not. The learning rate is 0, so every policy stays the base and the
completions stay equally long on average (printed). TRL runs without gradient checkpointing and in one microbatch. Rounds in
which other processes used over 4 % of the machine are dropped, and counted. The floor is the step's matrix FLOP (2P a token in
the rollout with prompts once per group, 4P in the update with no group left out) at the rate of a 1024^3 product in our dtype,
measured in the same run.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.measure import Rounds, card, gemm_rate, print_json, quantiles
from bench.memory import alternating
from bench.models import CHOICES, add_dtypes, model_directory, with_peft
from tinylora.cli import table
from tinylora.rl.config import BUILTIN_PRESET, TrainConfig
from tinylora.rl.trainer import Trainer
from tinylora.tasks.grading import grade


def peers(ours: Trainer, directory: Path, steps: int, dtype: torch.dtype, on_round: Any) -> None:
    """Drive TRL's trainer for `steps` steps; after each, call on_round(its seconds, its mean length, the PEFT model)."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    c = ours.config
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ours.model.path, padding_side="left")
    gpu = ours.model.device.type == "cuda"
    model = with_peft(AutoModelForCausalLM.from_pretrained(ours.model.path, dtype=dtype))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == ours.policy.num_parameters, trained
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ours.train_rows[: c.prompts_per_step * (steps + 1)]]
    lengths: list[float] = []

    def accuracy(completions: list[Any], completion_ids: list[Any], answer: list[str], **_: Any) -> list[float | None]:
        lengths.append(statistics.mean(map(len, completion_ids)))
        if c.own_reward:
            return alternating(completions)
        texts = [x[0]["content"] for x in completions]
        return [float(grade(text, gold, "hash").right["strict"]) for text, gold in zip(texts, answer, strict=True)]

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            on_round(time.perf_counter() - self.began, lengths[-1], SimpleNamespace(model=model, tokenizer=tokenizer))

    arguments = GRPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=c.prompts_per_step * c.num_generations,
        num_generations=c.num_generations,
        max_completion_length=c.max_completion_length,
        learning_rate=0.0,
        max_steps=steps,
        beta=0.0,
        loss_type="dapo",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not gpu,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[accuracy],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin", help=CHOICES)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8, help="of each prompt")
    parser.add_argument("--longest", type=int, default=40, help="tokens a completion may get")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender; the first 2 are warm-up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_dtypes(parser, "float32")
    parser.add_argument("--json", help="a file for the last line too")
    o = parser.parse_args()
    rounds, device, count = o.rounds, o.device, o.prompts * o.generations
    warnings.filterwarnings("ignore")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        same = {"num_iterations": 1, "scale_rewards": "group"}  # as TRL's default
        settings = (
            BUILTIN_PRESET | same | {"learning_rate": 0.0, "eval_size": 0, "output_dir": f"{scratch}/run", "max_steps": 10**6}
        )
        settings |= {"model": str(model_directory(o.model, Path(scratch), torch.float32)), "device": device, "dtype": o.dtype}
        settings |= {"prompts_per_step": o.prompts, "num_generations": o.generations, "max_completion_length": o.longest}
        settings |= {"reward": None if o.model == "builtin" else "bench.memory:alternating"}
        ours = Trainer(TrainConfig(**settings))
        seconds: dict[str, list[float]] = {"step/ours": [], "step/trl": [], "rollout/ours": [], "rollout/generate": []}
        tokens: dict[str, list[float]] = {"ours": [], "trl": [], "generate": []}
        counted, state = Rounds(), {"round": 0}
        dead: list[float] = []

        def on_round(trl_seconds: float, trl_length: float, peer: Any) -> None:
            state["round"] += 1
            row = ours._train_step() if state["round"] % 2 else None  # in turns: what comes second finds warm caches
            prompts = [ours.text.prompt(r["prompt"]) for r in (ours.train_rows[i] for i in ours.prompt_order())]
            padded = peer.tokenizer.pad({"input_ids": [p for p in prompts for _ in range(o.generations)]}, return_tensors="pt")
            began = time.perf_counter()
            with torch.no_grad():
                padded = padded.to(peer.model.device)
                sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
                out = peer.model.generate(**padded, **sampling, max_new_tokens=o.longest)
            generate_seconds = time.perf_counter() - began
            row = row or ours._train_step()
            new = out[:, padded["input_ids"].shape[1] :]
            ends = torch.isin(new, torch.tensor(ours.text.eos_ids, device=new.device)).int()
            generated = int(((ends.cumsum(1) - ends) == 0).sum())
            if not counted.keep():
                return
            seconds["step/trl"].append(trl_seconds)
            seconds["step/ours"].append(row["step_time"])
            seconds["rollout/ours"].append(row["rollout_time"])
            seconds["rollout/generate"].append(generate_seconds)
            tokens["trl"].append(trl_length)
            tokens["ours"].append(row["completions/mean_length"])
            tokens["generate"].append(generated / count)
            dead.append(row["frac_reward_zero_std"])

        peers(ours, Path(scratch) / "trl", rounds, getattr(torch, o.peer_dtype), on_round)
        if len(seconds["step/ours"]) < 3:
            raise SystemExit(f"only {len(seconds['step/ours'])} undisturbed rounds of {rounds}; other processes were running")
        rate = gemm_rate(8192 if device.startswith("cuda") else 1024, device=device, dtype=getattr(torch, o.dtype))
        c = ours.model.config
        parameters = sum(g.weight.numel() for layer in ours.model.layers for g in layer.groups) + ours.model.head.numel()
        prompt = statistics.mean(len(ours.text.prompt(r["prompt"])) for r in ours.train_rows[:512])
        length = statistics.mean(tokens["ours"])
        rollout_floor = 2 * parameters * (o.prompts * prompt + count * length) / rate
        step_floor = rollout_floor + 4 * parameters * count * (prompt + length) / rate

    medians = {name: statistics.median(s) for name, s in seconds.items()}
    rate_of = {
        "ours": count * statistics.mean(tokens["ours"]) / medians["rollout/ours"],
        "generate": count * statistics.mean(tokens["generate"]) / medians["rollout/generate"],
    }
    lines = [
        ["rollout, ours", medians["rollout/ours"], tokens["ours"], rate_of["ours"], rollout_floor],
        ["rollout, generate + PEFT", medians["rollout/generate"], tokens["generate"], rate_of["generate"], rollout_floor],
        ["whole step, ours", medians["step/ours"], tokens["ours"], None, step_floor],
        ["whole step, TRL + PEFT", medians["step/trl"], tokens["trl"], None, step_floor],
    ]
    cells = [
        [name, f"{s * 1e3:.0f}", f"{statistics.mean(n):.1f}", f"{r:,.0f}" if r else "", f"{s / floor:.1f}"]
        for name, s, n, r, floor in lines
    ]
    model = Path(o.model).name
    title = f"{model}, {o.prompts} x {o.generations}, {c.num_layers} layers, {o.dtype} beside {o.peer_dtype}"
    print(table([title, "ms", "tokens each", "tokens/s", "x floor"], cells))
    ratios = {
        "rollout": rate_of["ours"] / rate_of["generate"],
        "step": medians["step/trl"] / medians["step/ours"],
    }
    print(
        f"rollout {ratios['rollout']:.2f}x generate + PEFT in tokens/s, whole step {ratios['step']:.2f}x TRL + PEFT; "
        f"{len(seconds['step/ours'])} rounds kept, {counted.dropped} dropped, dead groups {statistics.mean(dead):.0%}"
    )
    print_json(
        {
            "bench": "step",
            **card(),
            "model": model,
            **{k: getattr(o, k) for k in ("prompts", "generations", "longest", "device", "dtype", "peer_dtype")},
            "gemm_gflops": rate / 1e9,
            "floor_dtype": o.dtype,
            "seconds": {name: quantiles(s) for name, s in seconds.items()},
            "tokens_each": {name: statistics.mean(n) for name, n in tokens.items()},
            "rollout_tokens_per_second": rate_of,
            "floor_seconds": {"rollout": rollout_floor, "step": step_floor},
            "ratios": ratios,
            "rounds_kept": len(seconds["step/ours"]),
            "rounds_dropped": counted.dropped,
        },
        o.json,
    )


if __name__ == "__main__":
    main()
