"""Answers to held-out problems, sampled and greedy: from the engine, or from the cache where they have been given before.

Completions and verdicts lie on disk by everything that they depend on: an evaluation that is cut off goes on, and one that is
run again generates nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

import tinylora
from tinylora.adapter.on_decoder import Adapter
from tinylora.engine.rollout import Completion, Sampling, rollout
from tinylora.engine.text import Text
from tinylora.evaluation.scores import EXTRACTORS, Answer, Scored, Scores
from tinylora.evaluation.store import Store
from tinylora.hashes import digest
from tinylora.model.decoder import Decoder, Matrices
from tinylora.tasks.grader import Grader
from tinylora.tasks.grading import GRADER_VERSION, Verdict

# Rewards of answers by name, the sum's is "reward": given rows, texts, token ids and verdicts, one of each an answer.
RewardOf = Callable[
    [Sequence[dict[str, Any]], Sequence[str], Sequence[list[int]], Sequence[Verdict | None]], dict[str, list[float | None]]
]

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
    ids: bool = False,
) -> list[list[Answer]]:
    """`generations` answers to each prompt; those that `about` (model, adapter, versions) has seen come from the store, where
    each prompt's are written as they end. `ids`: with their token ids."""
    shared = {**about, "sampling": vars(sampling), "generations": generations}
    store = Store("completions", digest(shared))
    keys = [digest(i, list(prompt)) for i, prompt in enumerate(prompts)]
    missing = [i for i, key in enumerate(keys) if not _has(store.entries.get(key), ids)]
    given: dict[int, dict[int, Answer]] = {i: {} for i in missing}  # by prompt, by sample
    if not missing:
        return [store.entries[key] for key in keys]
    with tqdm(total=len(missing) * generations, desc=label, unit="completion", leave=False) as bar:

        def keep(sequence: int, c: Completion) -> None:
            place, sample_number = divmod(sequence, generations)
            i = missing[place]
            given[i][sample_number] = {"completion": text.decode(c.tokens), "tokens": len(c.tokens), "finished": c.finished}
            given[i][sample_number] |= {"ids": c.tokens} if ids else {}
            if len(given[i]) == generations:
                store.add({keys[i]: [given[i][n] for n in range(generations)]})
            bar.update()

        names = [(sampling.seed, i * generations + n) for i in missing for n in range(generations)]
        rollout(model, matrices, [prompts[i] for i in missing], generations, sampling, names=names, on_completion=keep)
    return [store.entries[key] for key in keys]


def _has(answers: list[Answer] | None, ids: bool) -> bool:
    return answers is not None and (not ids or all("ids" in a for a in answers))


def judge(answers: Sequence[Sequence[Answer]], rows: Sequence[dict[str, Any]], grader: Grader) -> list[list[Verdict]]:
    """The verdict on every answer; those of this grader version come from the store, except where the grader gave up."""
    store = Store("verdicts", digest(GRADER_VERSION, grader.answer_format))
    keys = [
        [digest(a["completion"], *grader.golds(row), row.get("tolerance", 0.0)) for a in given]
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
    grader: Grader | None,
    length: int,
    label: str,
    generations: int = 1,  # sampled, of each problem; 0: greedy answers alone
    temperature: float = 1.0,  # of these
    top_p: float = 1.0,
    seed: int = 0,
    reward: RewardOf | None = None,
) -> Scored:
    """Greedy and sampled answers with their verdicts and rewards, from the cache where they are there; rewards are asked."""
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
    ids = reward is not None
    once = sample(model, matrices, text, prompts, 1, greedy, about, f"{label}, greedy", ids)
    many: list[list[Answer]] = [[] for _ in rows]
    if generations:
        many = sample(model, matrices, text, prompts, generations, warm, about, f"{label}, sampled", ids)
    scored = Scored(once, many)
    if grader is not None:
        scored.greedy_verdicts, scored.sampled_verdicts = judge(once, rows, grader), judge(many, rows, grader)
    if reward is not None:
        for kind, given in (("greedy", once), ("sampled", many if generations else [])):
            flat = [a for answers in given for a in answers]
            verdicts = [v for judged in scored.verdicts(kind) for v in judged]
            asked = [row for row, answers in zip(rows, given, strict=False) for _ in answers]
            values = reward(asked, [a["completion"] for a in flat], [a["ids"] for a in flat], verdicts) if flat else {}
            k = len(given[0]) if given else 1
            scored.rewards[kind] = {name: [v[i : i + k] for i in range(0, len(v), k)] for name, v in values.items()}
    return scored


def evaluate(
    model: Decoder,
    matrices: Matrices | None,
    text: Text,
    rows: Sequence[dict[str, Any]],
    grader: Grader | None,
    extractor: str,
    max_completion_length: int,
    seed: int,
    cache_bytes: int | None = None,  # of `rollout`
    reward: RewardOf | None = None,
) -> Scores:
    """Answer every row once at temperature 1 and once greedily, under `matrices` (None: the base model). Rows without a gold
    answer get no verdict."""
    prompts = [text.prompt(row["prompt"]) for row in rows]
    right: dict[str, dict[str, list[bool]]] = {}
    rewards: dict[str, dict[str, list[float | None]]] = {}
    with tqdm(total=2 * len(rows), desc="evaluate", unit="completion", leave=False) as bar:

        def ended(_: int, completion: Completion) -> None:
            bar.update()

        for kind, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            s = Sampling(max_completion_length, temperature, seed=EVAL_SEED + seed, eos_ids=text.eos_ids)
            found = rollout(model, matrices, prompts, 1, s, cache_bytes=cache_bytes, on_completion=ended)
            answers = [text.decode(c.tokens) for c in found]
            graded = [] if grader is None else grader.grade(answers, rows)
            judged = [v for v in graded if v is not None]
            right[kind] = {name: [v.right[name] for v in judged] for name in EXTRACTORS} if judged else {}
            if reward is not None:
                rewards[kind] = reward(rows, answers, [c.tokens for c in found], graded)
    return Scores(right["sampled"], right["greedy"], extractor, rewards)
