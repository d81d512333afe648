"""python -m tinylora.sweep STUDY.toml: a grid of training runs with seeds, and one table of results. `--help` lists the flags.

    title = "How many numbers does RL need?"        question = "..."
    seeds = 8                   runs of each arm: seeds and draws of P 0 .. 7, the same in every arm
    x = "num_parameters"        what the figure's axis shows: num_parameters, bytes, or a setting's name
    [settings]                  of every run, by the names of `tinylora.train --help`
    max_steps = 40
    [[arms]]                    settings of one arm; a list makes an arm of each of its values (of each combination of several)
    name = "RL, {u} numbers"
    series = "RL"               arms of a series are joined by a line
    u = [1, 13]
    [arms.choose]               settings chosen on held-out training rows, by runs with other seeds; never on the test problems
    learning_rate = [0.003, 0.01]
    [quick]                     what --quick changes: seeds, and settings of every run. It chooses nothing: first values stand

Runs of an arm go through the engine together where they can (`rl.trainer`), arms beside each other in processes of their
own. What is finished stays finished: the same command goes on where it was stopped.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinylora.cli import flag, table
from tinylora.errors import InputError
from tinylora.files import write_text
from tinylora.rl.config import TrainConfig
from tinylora.rl.run_directory import changed_settings, is_step
from tinylora.studies.results import measure_of, shown
from tinylora.studies.study import Arm, Study, combinations, config, read_study

CHOICE_SEED = 1000  # of the runs that choose settings: away from those that are reported
CHOICE_RUNS = 2


def run_job(jobs: list[TrainConfig], threads: int) -> None:
    """Train these runs, together where they can be; one that was begun goes on, one that is finished is left."""
    import torch

    from tinylora.rl.trainer import Trainer, train_population

    torch.set_num_threads(threads)
    missing = [c for c in jobs if not finished(c)]
    begun = [c.output_dir for c in missing if _begun(c)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        if len(missing) > 1 and missing[0].method in ("tinylora", "lora_xs"):
            train_population(missing, begun)
        else:
            for each in missing:
                Trainer(each, resume=each.output_dir in begun).train()


def finished(c: TrainConfig) -> bool:
    """Whether the run came to its end, where it is scored: Ctrl-C leaves an adapter too. InputError where the directory holds
    a run of other settings, as when a study was edited."""
    path = Path(c.output_dir or "")
    if not (path / "config.json").exists():
        return False
    stored = json.loads((path / "config.json").read_text())["settings"]
    for name, held, wanted in changed_settings(stored, asdict(c)):
        is_, not_ = f"{flag(name)} {held}", f"{flag(name)} {wanted}"
        raise InputError(f"{path} holds a run with {is_}, not {not_}: delete it, or give another --output-dir")
    rows = _rows(c) if (path / "adapter").is_dir() else []
    last = max((row["step"] for row in rows if is_step(row)), default=None)
    return last in {row["step"] for row in rows if "eval/n" in row or "validation/n" in row}


def _begun(c: TrainConfig) -> bool:
    """Whether the run can go on; what was killed before its first checkpoint is cleared away."""
    path = Path(c.output_dir or "")
    if (path / "config.json").exists() and (path / "checkpoint").is_dir():
        return True
    shutil.rmtree(path, ignore_errors=True)
    return False


def run_all(groups: Sequence[list[TrainConfig]], processes: int, what: str) -> None:
    """Every group's runs, each group in a process; says what is done. InputError with the first that failed."""
    groups = [g for g in groups if not all(map(finished, g))]
    if not groups:
        return
    threads, began = max(1, (os.cpu_count() or 1) // processes), time.perf_counter()

    def say(done: int) -> None:
        print(f"{what}: {done} of {len(groups)} groups of runs, {time.perf_counter() - began:,.0f} s", flush=True)

    if processes == 1:
        for done, group in enumerate(groups, 1):
            run_job(group, threads)
            say(done)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_job, g, threads): g for g in groups}
        for done, future in enumerate(as_completed(futures), 1):
            error = future.exception()
            if error is not None:
                pool.shutdown(cancel_futures=True)
                raise InputError(f"{futures[future][0].output_dir}: {error}") from error
            say(done)


def choose(study: Study, path: Path, out: Path, processes: int) -> list[dict[str, Any]]:
    """The settings that each arm's held-out training rows choose, by mean accuracy over the choosing runs."""
    plans: list[list[tuple[dict[str, Any], list[TrainConfig]]]] = []
    for arm in study.arms:
        options = combinations(arm.choose) if arm.choose else []
        plan = []
        for i, option in enumerate(options):
            settings = arm.settings | option | {"eval_size": 0, "eval_steps": 10**9}
            folder = out / "choice" / arm.folder / f"option-{i}"
            seeds = range(CHOICE_SEED, CHOICE_SEED + CHOICE_RUNS)
            plan.append((option, [config(settings, s, path, str(folder / f"seed-{s}")) for s in seeds]))
        plans.append(plan)
    run_all([runs for plan in plans for _, runs in plan], processes, "choosing settings")
    chosen = []
    for plan in plans:
        scored = [(sum(_validation(c) or 0.0 for c in runs), -i) for i, (_, runs) in enumerate(plan)]
        chosen.append(plan[-max(scored)[1]][0] if plan else {})
    return chosen


def _rows(c: TrainConfig) -> list[dict[str, Any]]:
    text = (Path(c.output_dir or "") / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]


def _validation(c: TrainConfig) -> float | None:
    """Accuracy, or the own reward, on the held-out training rows after the last step."""
    name = f"validation/{'reward' if c.own_reward else 'accuracy'}"
    found = [row[name] for row in _rows(c) if name in row]
    return found[-1] if found else None


def result(arm: Arm, c: TrainConfig, x: str | None, out: Path, measure: str) -> dict[str, Any]:
    """One line of results.jsonl; `measure` is what the study compares its runs by."""
    path = Path(c.output_dir or "")
    about, rows = json.loads((path / "config.json").read_text()), _rows(c)
    scores = [row for row in rows if "eval/n" in row]
    steps = [row for row in rows if is_step(row)]
    if not scores:
        raise InputError(f"{path} was not evaluated: a study needs eval_size of at least 1")
    count = about["num_parameters"]
    size = count * {"float32": 4, "bfloat16": 2, "float16": 2}[c.param_dtype]
    places = {"num_parameters": count, "bytes": size}
    names = {"sampled": f"eval/{measure}", "greedy": f"eval/{measure}_greedy"}
    base, trained = ({kind: row[name] for kind, name in names.items()} for row in (scores[0], scores[-1]))
    if None in (*base.values(), *trained.values()):
        raise InputError(f"{path}: the reward scored none of the held-out completions, so there is nothing to compare")
    return {
        "arm": arm.name,
        "series": arm.series,
        "x": places.get(x, about["settings"].get(x)) if x else None,
        "seed": c.seed,
        "settings": {k: v for k, v in about["settings"].items() if k != "output_dir"},  # "run" says where, and travels
        "num_parameters": count,
        "bytes": size,
        "n": scores[-1]["eval/n"],
        **({} if measure == "accuracy" else {"measure": measure}),  # of which older results say nothing
        "base": base,
        "trained": trained,
        "validation": _validation(c),
        "steps": len(steps),
        "run": str(path.relative_to(out)),
    }


def summarize(results: Sequence[dict[str, Any]]) -> str:
    """A line an arm: means over seeds, and the worst and best of them."""
    cells = []
    measure = measure_of(results)
    reward = ", reward" if measure == "reward" else ""
    kinds = [f"sampled{reward}", f"greedy{reward}"]
    for arm in dict.fromkeys(r["arm"] for r in results):
        own = [r for r in results if r["arm"] == arm]
        line = [arm, f"{own[0]['num_parameters']:,}", str(len(own))]
        for kind in ("sampled", "greedy"):
            values = [r["trained"][kind] for r in own]
            cells_ = [shown(x, measure) for x in (sum(values) / len(values), min(values), max(values))]
            line.append("{} ({}..{})".format(*cells_))
        cells.append(line)
    return table([f"n = {results[0]['n']} problems", "numbers", "seeds", *(f"{kind} (worst..best)" for kind in kinds)], cells)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m tinylora.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--output-dir", type=Path, help="default: studies/NAME, with -quick for --quick")
    parser.add_argument("--quick", action="store_true", help="the study's [quick] settings")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="groups of runs at once; default: the cores")
    options = parser.parse_args(arguments)
    study = read_study(options.study, options.quick)
    out = options.output_dir or Path("studies") / (options.study.stem + ("-quick" if options.quick else ""))
    chosen = choose(study, options.study, out, options.processes)
    plan = [
        [
            config(arm.settings | own, seed, options.study, str(out / "runs" / arm.folder / f"seed-{seed}"))
            for seed in range(study.seeds)
        ]
        for arm, own in zip(study.arms, chosen, strict=True)
    ]
    run_all(plan, options.processes, "training")
    results = [result(arm, c, study.x, out, study.measure) for arm, runs in zip(study.arms, plan, strict=True) for c in runs]
    about = {"name": out.name, "title": study.title, "question": study.question, "x": study.x, "x_label": study.x_label}
    about |= {"measure": study.measure, "quick": study.quick}
    about["chosen"] = {a.name: c for a, c in zip(study.arms, chosen, strict=True) if c}
    write_text(out / "study.json", json.dumps(about, indent=2) + "\n")
    write_text(out / "results.jsonl", "".join(json.dumps(r) + "\n" for r in results))
    print(f"{study.title}\n\n{summarize(results)}\n\nresults in {out}; a page: python -m tinylora.report {out}")
    return 0
