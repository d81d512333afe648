"""Answers to held-out problems, sampled and greedy: from the engine, or from the cache where they have been given before.

Completions and verdicts lie on disk by everything that they depend on: an evaluation that is cut off goes on, and one that is
run again generates nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

import tinylora
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Sampling, rollout
from tinylora.engine.text import Text
from tinylora.evaluation.scores import Answer, Scored, Scores
from tinylora.evaluation.store import Store
from tinylora.hashes import digest
from tinylora.model.decoder import Decoder, Matrices
from tinylora.tasks.grader import Grader
from tinylora.tasks.grading import GRADER_VERSION, Verdict

CHUNK = 512  # completions generated between two writes

EVAL_SEED = 1 << 32  # sampling streams of evaluations, away from training's


def versions() -> dict[str, Any]:
    """Of what an evaluation's results depend on."""
    return {"tinylora": tinylora.__version__, "torch": torch.__version__, "grader": GRADER_VERSION}


def sample(
    model: Decoder,
    matrices: Matrices | None,
    text: Text,
    prompts: Sequence[Sequence[int]],
    generations: int,
    sampling: Sampling,
    about: dict[str, Any],
    label: str,
) -> list[list[Answer]]:
    """`generations` answers to each prompt; those that `about` (model, adapter, versions) has seen come from the store."""
    shared = {**about, "sampling": vars(sampling), "generations": generations}
    store = Store("completions", digest(shared))
    keys = [digest(i, list(prompt)) for i, prompt in enumerate(prompts)]
    step = max(1, CHUNK // generations)
    starts = [s for s in range(0, len(prompts), step) if any(k not in store.entries for k in keys[s : s + step])]
    for start in tqdm(starts, desc=label, unit="chunk", leave=False):
        part = prompts[start : start + step]
        completions = rollout(model, matrices, part, generations, sampling, start * generations)
        answers = [{"completion": text.decode(c.tokens), "tokens": len(c.tokens), "finished": c.finished} for c in completions]
        store.add({keys[start + i]: answers[i * generations : (i + 1) * generations] for i in range(len(part))})
    return [store.entries[key] for key in keys]


def judge(answers: Sequence[Sequence[Answer]], rows: Sequence[dict[str, Any]], grader: Grader) -> list[list[Verdict]]:
    """The verdict on every answer; those of this grader version come from the store, except where the grader gave up."""
    store = Store("verdicts", digest(GRADER_VERSION, grader.answer_format))
    keys = [
        [digest(a["completion"], row["answer"], row.get("tolerance", 0.0)) for a in given]
        for given, row in zip(answers, rows, strict=True)
    ]
    futures = {
        key: grader.submit(a["completion"], row)
        for given, row, names in zip(answers, rows, keys, strict=True)
        for a, key in zip(given, names, strict=True)
        if key not in store.entries
    }
    verdicts = {key: future.result() for key, future in futures.items()}
    store.add({key: vars(v) for key, v in verdicts.items() if v.failure is None})
    return [[verdicts.get(key) or Verdict(**store.entries[key]) for key in names] for names in keys]


def about_adapter(adapter: Adapter) -> dict[str, Any]:
    """What an adapter's answers depend on, itself included."""
    v = adapter.stored_v().detach().flatten().tolist()
    config = adapter.config
    return {"v": v, "P": adapter.parts.projection_hash, "r": config.r, "basis": config.basis, "groups": adapter.parts.group_of}


def answer(
    model: Decoder,
    adapter: Adapter | None,
    text: Text,
    rows: list[dict[str, Any]],
    grader: Grader,
    length: int,
    label: str,
    generations: int = 1,  # sampled, of each problem
    temperature: float = 1.0,  # of these
    top_p: float = 1.0,
    seed: int = 0,
) -> Scored:
    """Greedy and sampled answers and their verdicts, from the cache where they are there."""
    prompts = [text.prompt(row["prompt"]) for row in rows]
    about = {
        "base": model.base_hash,
        "adapter": None if adapter is None else about_adapter(adapter),
        "dtype": [str(model.dtype), str(model.weight_dtype)],
        "device": model.device.type if model.device.type == "cpu" else torch.cuda.get_device_name(model.device),
        "backend": model.backend,
        "versions": [tinylora.__version__, torch.__version__],
        "tokenizer": digest(text.tokenizer.get_vocab()),  # the same ids may read differently
    }
    with torch.no_grad():
        matrices = None if adapter is None else adapter.matrices()
    stream = EVAL_SEED + seed
    greedy = Sampling(length, 0.0, seed=stream, eos_ids=text.eos_ids)
    warm = Sampling(length, temperature, top_p, seed=stream, eos_ids=text.eos_ids)
    once = sample(model, matrices, text, prompts, 1, greedy, about, f"{label}, greedy")
    many = sample(model, matrices, text, prompts, generations, warm, about, f"{label}, sampled")
    return Scored(once, many, judge(once, rows, grader), judge(many, rows, grader))


def evaluate(
    model: Decoder,
    matrices: Matrices | None,
    text: Text,
    rows: Sequence[dict[str, Any]],
    grader: Grader,
    extractor: str,
    max_completion_length: int,
    seed: int,
    cache_bytes: int | None = None,  # of `rollout`
) -> Scores:
    """Answer every row once at temperature 1 and once greedily, under `matrices` (None: the base model)."""
    prompts = [text.prompt(row["prompt"]) for row in rows]

    def verdicts(temperature: float) -> dict[str, list[bool]]:
        s = Sampling(max_completion_length, temperature, seed=EVAL_SEED + seed, eos_ids=text.eos_ids)
        answers = [text.decode(c.tokens) for c in rollout(model, matrices, prompts, 1, s, cache_bytes=cache_bytes)]
        graded = grader.grade(answers, rows)
        return {name: [v.right[name] for v in graded] for name in ("strict", "flexible")}

    return Scores(verdicts(1.0), verdicts(0.0), extractor)
