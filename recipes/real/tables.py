"""Committed runs of recipes/real -> their parts of docs/real-models.md and README.md, and a figure and answers of each.

    python -m recipes.real.tables

Reads config.json, metrics.jsonl and evaluation/results.json of every run under docs/real-models, and the first two of the arms
of its grid. evaluation/samples.jsonl is not committed (MB): where it lies, answers.md is written from it. Nothing is measured
here, so running it twice changes nothing.
"""

import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from bench.report import replace_section
from bench.tables import markdown
from tinylora.rl.config import RELATIVE_STEP
from tinylora.rl.run_directory import is_step

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- runs -->", "<!-- /runs -->"
GRID_BEGIN, GRID_END = "<!-- grid -->", "<!-- /grid -->"
RUNS = {  # folder of docs/real-models: what it is
    "qwen-coder-0.5b-gsm8k": "(a) Qwen2.5-Coder-0.5B-Instruct, GSM8K, 13 shared numbers",
    "qwen-coder-0.5b-plain": "(a) with the best other arm of its grid: the plain prompt",
    "smollm2-words": "(b) SmolLM2-135M-Instruct, words, 13 shared numbers",
    "qwen-coder-0.5b-random": "(c) The control of (a): a fair coin for a reward",
    "smollm2-words-random": "(c) The control of (b): a fair coin for a reward",
    "smollm2-words-bottom": "(d) SmolLM2, words, 13 numbers in the bottom singular vectors",
    "smollm2-words-lora-xs": "(d) SmolLM2, words, LoRA-XS: 840 numbers, none shared",
}
GRID = "qwen-coder-0.5b-grid"  # one folder an arm; the arm with the defaults is the beginning of DEFAULT
DEFAULT = "qwen-coder-0.5b-gsm8k"
LONGEST = "qwen-coder-0.5b-plain"  # the arm ahead of the others, run on to DEFAULT's number of steps
TEN = range(0, 400, 40)  # the problems whose answers are shown, chosen before any run
CALCULATION = re.compile(r"\d+ *([-+*x]) *\d+ *=")
PART = 10  # steps of one row of a run's table

Run = dict[str, Any]  # "config", "steps" and, where the run was evaluated, "results"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Rows of JSON lines; one that is being written is not there yet."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def load(folder: Path) -> Run | None:
    """None before the first step. SystemExit for an evaluation that is not of this run's own prompts and temperature."""
    if not (folder / "metrics.jsonl").exists():
        return None
    run: Run = {"config": json.loads((folder / "config.json").read_text())}
    run["steps"] = [row for row in lines_of(folder / "metrics.jsonl") if is_step(row)]
    path = folder / "evaluation" / "results.json"
    if path.exists():
        results, settings = json.loads(path.read_text()), run["config"]["settings"]
        for name in ("prompt_style", "temperature", "max_completion_length", "dtype"):
            if results["settings"][name] != settings[name]:
                raise SystemExit(f"{path}: {name} {results['settings'][name]}, where the run has {settings[name]}")
        if results["settings"]["num_generations"] != 1 or len(results["tasks"]) != 1:
            raise SystemExit(f"{path}: one sampled answer to each problem of one task is wanted")
        [run["results"]] = results["tasks"].values()
    return run if run["steps"] else None


# ---- one run ------------------------------------------------------------------------------------------------------------


def facts(run: Run) -> str:
    s, config, steps = run["config"]["settings"], run["config"], run["steps"]
    seconds, tokens = sum(row["step_time"] for row in steps), steps[-1]["num_tokens"]
    rate = f"rate {steps[-1]['learning_rate']:.2g}"
    if s["learning_rate"] is None:
        rate += f" ({RELATIVE_STEP:.1%} of \\|W\\| by a first step)"
    return (
        f"{len(steps)} of {config['max_steps']} steps of {s['prompts_per_step']} x {s['num_generations']} completions, "
        f"{config['num_parameters']} trained numbers, {rate}, one seed ({s['seed']}), temperature {s['temperature']:g}, "
        f"at most {s['max_completion_length']} tokens, {s['dtype']}. {seconds / 60:.0f} minutes of "
        f"steps, {tokens / seconds:.0f} tokens/s, prompts included."
    )


def curve(run: Run) -> str:
    """Means of ten steps a row, of the completions that they trained on; at its end |change| / |W| of the adapted weights."""
    rows = []
    for start in range(0, len(run["steps"]), PART):
        part = run["steps"][start : start + PART]
        shares = ("reward", "accuracy/strict", "accuracy/flexible", "frac_reward_zero_std", "completions/clipped_ratio")
        reward, strict, flexible, dead, cut_off = (fmean(row[name] for row in part) for name in shares)
        cells = [f"{part[0]['step']}-{part[-1]['step']}", f"{reward:.3f}", f"{strict:.1%}", f"{flexible:.1%}"]
        cells += [f"{1 - dead:.0%}", f"{cut_off:.1%}", f"{fmean(row['completions/mean_length'] for row in part):.0f}"]
        rows.append([*cells, f"{part[-1]['adapter/relative_change']:.2%}"])
    header = ["steps", "reward", "strict", "flexible", "live groups", "cut off", "tokens each", "moved so far"]
    return markdown(header, rows)


def gain(cell: dict[str, float]) -> str:
    return f"{cell['gain']:+.1%} [{cell['low']:+.1%}, {cell['high']:+.1%}]"


def base_to_trained(row: dict[str, Any]) -> str:
    return f"{row['base']['accuracy']:.1%} -> {row['trained']['accuracy']:.1%}"


def before_and_after(run: Run) -> str:
    """The base and the trained model on the same held-out problems."""
    results, t = run["results"], run["config"]["settings"]["temperature"]
    scores, lengths = results["scores"], results["lengths"]
    rows = []
    for decoding, key in (("greedy", "greedy"), (f"sampled at {t:g}", "avg@1")):
        for extractor in ("strict", "flexible"):
            row = scores[f"{key}, {extractor}"]
            base, trained = (f"{row[who]['accuracy']:.1%}" for who in ("base", "trained"))
            rows.append([f"{decoding}, {extractor}", base, trained, gain(row["paired"])])
    for decoding in ("greedy", "sampled"):
        cells = [f"{lengths[who][decoding]['cut_off']:.1%} ({lengths[who][decoding]['tokens']:.0f})" for who in lengths]
        rows.append([f"{decoding}, cut off (tokens each)", *cells, ""])
    return markdown([f"{results['n']} held-out problems", "base", "trained", "paired gain [95 %]"], rows) + "\n\n" + form(run)


def form(run: Run) -> str:
    """The share of the sampled gain that is format: what the strict reading gained and the flexible did not."""
    strict, flexible = (run["results"]["scores"][f"avg@1, {extractor}"] for extractor in ("strict", "flexible"))
    gains = strict["paired"]["gain"], flexible["paired"]["gain"]
    if strict["base"]["accuracy"] == strict["trained"]["accuracy"] == 0:
        said = "strict is 0 % throughout, so it says nothing about format"
    elif strict["paired"]["low"] <= 0:
        said = "no strict gain beyond chance, so there is none of which a share could be format"
    else:
        said = f"{min(1.0, max(0.0, 1 - gains[1] / gains[0])):.0%} of the strict gain is format"
    return f"Sampled, strict {gains[0]:+.1%} and flexible {gains[1]:+.1%}: {said}."


def figure(folder: Path, run: Run) -> None:
    if importlib.util.find_spec("matplotlib"):
        from tinylora.studies.run_figures import run_pictures

        (folder / "reward.png").write_bytes(run_pictures(run["steps"], run["config"]["settings"])[0].png)


def answers(folder: Path) -> None:
    """answers.md, from samples.jsonl: greedy answers of base and trained model, and of words by what they calculate."""
    every = lines_of(folder / "evaluation" / "samples.jsonl")
    samples = [line for line in every if line["decoding"] == "greedy"]
    found: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in samples:
        if line["problem"] in TEN:
            found[line["problem"]][line["policy"]] = line
    parts = [f"# Greedy answers before and after: {RUNS[folder.name]}"]
    if "words" in folder.name:
        parts += [operations(samples), clusters(every)]
    parts.append(f"Ten problems, by their numbers: {', '.join(map(str, TEN))}.")
    for problem, pair in found.items():
        parts += [f"## Problem {problem}, gold {pair['base']['gold']}", f"~~~text\n{pair['base']['prompt'].strip()}\n~~~"]
        for who, a in pair.items():
            verdict = ", ".join(f"{e} {'right' if a[e]['right'] else 'wrong'}" for e in ("strict", "flexible"))
            ended = "" if a["finished"] else ", cut off"
            parts += [f"{who}: {verdict}, {a['tokens']} tokens{ended}", f"~~~text\n{a['completion'].strip()}\n~~~"]
    (folder / "answers.md").write_text("\n\n".join(parts) + "\n")


def kind_of(prompt: str) -> str:
    """Of a problem of words.py."""
    return "bags" if " bags " in prompt else "gives" if " gives away " in prompt else "gets"


def operations(samples: list[dict[str, Any]]) -> str:
    """Of the kinds of words.py: the share whose first calculation is of the right kind, and what is right of these."""
    rows = []
    for kind, signs in (("gets", "+"), ("gives", "-"), ("bags", "*x")):
        cells: list[str] = []
        for who in ("base", "trained"):
            of = [line for line in samples if line["policy"] == who and kind_of(line["prompt"]) == kind]
            fits = [line for line in of if (m := CALCULATION.search(line["completion"])) and m[1] in signs]
            right, right_of_fits = (sum(line["flexible"]["right"] for line in part) for part in (of, fits))
            cells += [f"{right} of {len(of)}", f"{len(fits)}", f"{right_of_fits} of {len(fits)}"]
        rows.append([kind, *(f"{base} -> {trained}" for base, trained in zip(cells[:3], cells[3:], strict=True))])
    return markdown(["greedy", "right", "first calculation of the right kind", "right, of these"], rows)


def clusters(samples: list[dict[str, Any]]) -> str:
    """Paired gains with intervals over sets of numbers: problems that differ in name and thing alone are not independent. And
    of those whose numbers are trained on in no order: words.py keeps apart 3 bags of 5, not 5 bags of 3."""
    trained = {numbers_of(row["question"]) for row in lines_of(ROOT / "recipes" / "real" / "words" / "train.jsonl")}
    rows = []
    for decoding in ("greedy", "sampled"):
        cells = [decoding]
        for every in (True, False):
            change: dict[Any, list[int]] = defaultdict(lambda: [0, 0])  # by kind and numbers: gained, and problems
            for line in samples:
                key = numbers_of(line["prompt"].split("<|im_start|>user")[1])
                if line["decoding"] == decoding and (every or key not in trained):
                    change[key][0] += line["flexible"]["right"] * (1 if line["policy"] == "trained" else -1)
                    change[key][1] += line["policy"] == "base"
            sums = np.array(list(change.values()))  # (sets, 2)
            drawn = sums[np.random.default_rng(0).integers(0, len(sums), (4000, len(sums)))].sum(1)  # (4000, 2)
            low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
            total = sums.sum(0)
            cells += [f"{total[0] / total[1]:+.1%} [{low:+.1%}, {high:+.1%}]", f"{total[1]} of {len(sums)} sets"]
        rows.append(cells)
    return markdown(
        ["paired gain [95 % over sets]", "all", "problems", "numbers never trained on, in any order", "problems"], rows
    )


def numbers_of(question: str) -> tuple[Any, ...]:
    """Kind and numbers of a problem of words.py, the numbers in order where it makes no difference."""
    numbers = [int(n) for n in re.findall(r"[0-9]+", question)]
    kind = kind_of(question)
    return kind, *(numbers if kind == "gives" else sorted(numbers))


# ---- all of them --------------------------------------------------------------------------------------------------------


def section(runs: dict[str, Run]) -> str:
    parts = []
    for name, run in runs.items():
        parts += [f"### {RUNS[name]}", facts(run), curve(run), f"![reward](real-models/{name}/reward.png)"]
        if "results" in run:
            parts += [before_and_after(run), f"[Answers before and after](real-models/{name}/answers.md)"]
    missing = [what for name, what in RUNS.items() if name not in runs]
    if missing:
        parts.append(f"Not begun: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def readme(runs: dict[str, Run]) -> str:
    """What the real models gained, for the README's first screen."""
    rows = []
    for name, run in runs.items():
        if "results" in run:
            cells = [RUNS[name]]
            for key in ("greedy", "avg@1"):
                row = run["results"]["scores"][f"{key}, flexible"]
                cells += [base_to_trained(row), gain(row["paired"])]
            rows.append(cells)
    return markdown(["", "greedy", "paired gain [95 %]", "sampled", "paired gain [95 %]"], rows)


def prompt_of(run: Run) -> str:
    return str(run["config"]["settings"]["prompt_style"])


def rate_of(run: Run) -> str:
    return f"{run['steps'][0]['learning_rate']:.2g}"


def rewards(run: Run) -> list[float]:
    return [row["reward"] for row in run["steps"]]


def change(runs: list[Run], others: list[Run], steps: slice) -> str:
    """Mean reward of runs less that of the others, step by step; ± is one standard error over the steps."""
    curves = [[fmean(at) for at in zip(*(rewards(run)[steps] for run in part), strict=True)] for part in (runs, others)]
    changes = [one - other for one, other in zip(*curves, strict=True)]
    return f"{fmean(changes):+.1%} ± {stdev(changes) / len(changes) ** 0.5:.1%}"


def grid(default: Run, arms: list[Run]) -> str:
    """Arms of one recipe that differ in prompt and rate, over the steps that all of them took, on the same problems. A step's
    first completions come before any update, so they tell prompts apart and not rates; differences are of the later ones."""
    arms = sorted([default, *arms], key=lambda run: (prompt_of(run), float(rate_of(run))))
    n = min(len(run["steps"]) for run in arms)
    later, every = slice(1, n), slice(n)
    rows = []
    for run in arms:
        steps = run["steps"][:n]
        against = change([run], [default], later) if run is not default else "the default"
        dead, cut_off = (fmean(row[name] for row in steps) for name in ("frac_reward_zero_std", "completions/clipped_ratio"))
        cells = [prompt_of(run), rate_of(run)]
        cells += [f"{steps[k]['adapter/relative_change']:.2%}" for k in (0, -1)]
        cells += [f"{steps[0]['reward']:.1%}", f"{fmean(rewards(run)[later]):.1%}", against]
        rows.append([*cells, f"{1 - dead:.0%}", f"{cut_off:.1%}"])
    header = ["prompt", "rate", "moved by step 1", f"by step {n}", "reward, step 1", f"steps 2-{n}", "against the default"]
    effects = []
    for of in (rate_of, prompt_of):
        others = [run for run in arms if of(run) == of(default)]
        for value in sorted({of(run) for run in arms} - {of(default)}):
            runs = [run for run in arms if of(run) == value]
            effects.append([f"{value} against {of(default)}", change(runs, others, later), change(runs, others, every)])
    pooled = markdown(["averaged over the other's arms", f"steps 2-{n}", f"steps 1-{n}"], effects)
    return markdown([*header, "live groups", "cut off"], rows) + "\n\n" + pooled


def longest(default: Run, other: Run) -> str:
    """The arm that was run on beside the default, over the steps that both took, and what each answers held out."""
    n = min(len(default["steps"]), len(other["steps"]))
    rows = []
    for run in (default, other):
        against = change([run], [default], slice(n)) if run is not default else "the default"
        cells = [prompt_of(run), rate_of(run), f"{fmean(rewards(run)[:n]):.1%}", against]
        for key in ("avg@1", "greedy"):
            scores = run["results"]["scores"] if "results" in run else None
            cells.append(base_to_trained(scores[f"{key}, flexible"]) if scores else "not evaluated")
        rows.append(cells)
    header = ["prompt", "rate", f"reward, steps 1-{n}", "against the default", "held out, sampled at 1", "greedily"]
    return markdown(header, rows)


def main(root: Path = ROOT) -> None:
    folders = [root / "docs" / "real-models" / name for name in RUNS]
    runs = {f.name: run for f in folders if (run := load(f)) is not None}
    for folder in folders:
        if folder.name in runs:
            figure(folder, runs[folder.name])
        if (folder / "evaluation" / "samples.jsonl").exists():
            answers(folder)
    arms = [run for folder in sorted((root / "docs" / "real-models" / GRID).iterdir()) if (run := load(folder)) is not None]
    tried = grid(runs[DEFAULT], arms) + "\n\n" + longest(runs[DEFAULT], runs[LONGEST])
    for page, inner, begin, end in (
        ("docs/real-models.md", section(runs), BEGIN, END),
        ("docs/real-models.md", tried, GRID_BEGIN, GRID_END),
        ("README.md", readme(runs), BEGIN, END),
    ):
        path = root / page
        path.write_text(replace_section(path.read_text(), f"\n{inner}\n", begin, end))


if __name__ == "__main__":
    main()
