"""Committed results -> tables in README.md and docs/, and a figure: python -m bench.report

Reads every JSON under bench/results. All of it becomes the tables between the `bench` comments of docs/benchmarks.md, and at
most five rows of it the table between the `bench` comments of README.md. Where matplotlib is installed it also draws
bench/results/linear.svg. What bench.gpu left, every results.jsonl, goes between the `gpu` comments of docs/speed.md, and as one
row between those of README.md. Nothing is measured here, so running it twice changes nothing.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import gpu_report
from bench.tables import by_case, implementations, markdown, ops_tables

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
GPU = "<!-- gpu -->", "<!-- /gpu -->"
PAGES = "README.md", "docs/benchmarks.md", "docs/speed.md"
Result = dict[str, Any]


def machine(result: Result) -> str:
    on_gpu = str(result.get("device", "cpu")).startswith("cuda")
    processor = result["gpu"] if on_gpu else f"{result['cpu']}, {result['threads']} threads"
    return f"{processor}, torch {result['torch']}, commit {result['commit']}"


def step_table(result: Result) -> str:
    ms, floor, rate = result["seconds"], result["floor_seconds"], result["rollout_tokens_per_second"]
    what = f"{result['model']}, {result['prompts']} x {result['generations']}, {dtypes(result)}"
    lines = (
        ("rollout, tinylora", "rollout/ours", rate["ours"], f"{result['ratios']['rollout']:.1f}x in tokens/s"),
        ("rollout, transformers `generate` + PEFT", "rollout/generate", rate["generate"], ""),
        ("whole step, tinylora", "step/ours", None, f"{result['ratios']['step']:.1f}x"),
        ("whole step, TRL `GRPOTrainer` + PEFT", "step/trl", None, ""),
    )
    rows = []
    for label, name, tokens, ratio in lines:
        seconds = ms[name]["median"]
        per_second = f"{tokens:,.0f}" if tokens else ""
        rows.append([label, f"{seconds * 1e3:,.0f}", per_second, f"{seconds / floor[name.split('/')[0]]:.1f}", ratio])
    floors = f"x floor of {result.get('floor_dtype', 'float32')} products"
    return markdown([what, "ms", "tokens/s", floors, "ratio"], rows)


def dtypes(result: Result) -> str:
    """Each side's, the peers' where they are not ours."""
    ours, theirs = result["dtype"], result["peer_dtype"]
    return ours if ours == theirs else f"{ours} beside {theirs}"


def busy_line(result: Result) -> str:
    quiet, busy = (result["seconds"][name]["median"] * 1e3 for name in ("quiet", "busy"))
    ratio = f"{result['ratio']:.2f} times as long"
    return f"A step of the built-in job beside a busy process: {busy:.0f} ms, quiet {quiet:.0f} ms, {ratio}."


def attach_line(result: Result) -> str:
    return (
        f"Factors of {result['weights']} weights of {result['model']}: {result['cold_seconds']:.1f} s, "
        f"{result['warm_seconds']:.2f} s from the cache, worst residual {result['worst_residual']:.0e} of sigma_1."
    )


def rollout_table(result: Result) -> str:
    what = f"{result['model']}, {result['prompts']} x {result['samples']}, lengths {result['lengths']}"
    rate = result["tokens_per_second"]
    rows = []
    for name, seconds in result["seconds"].items():
        floor = f"{seconds['median'] / result['floor_seconds']:.1f}" if name in ("ours", "base") else ""
        rows.append([name, f"{seconds['median'] * 1e3:,.0f}", f"{rate[name]:,.0f}", floor, f"{rate['ours'] / rate[name]:.2f}"])
    return markdown([what, "ms", "tokens/s", "x floor", "ours is x"], rows)


def memory_line(result: Result) -> str:
    ours, trl = (result["found"][name]["peak"] for name in ("ours", "trl"))
    return (
        f"Peak memory of a process that loads {result['model']} and makes one step of 8 completions, {dtypes(result)}: "
        f"{ours:.1f} GB, with TRL and PEFT {trl:.1f} GB: {ours / trl:.2f} of it."
    )


def layers_table(result: Result) -> str:
    rows = []
    for name, entry in result["contenders"].items():
        seconds, ratio = entry["seconds"]["median"], entry["x_bare"]
        rows.append([name, f"{seconds * 1e3:,.0f}", f"{ratio:.2f}", f"{entry['peak_extra_bytes'] / 1e6:,.0f}"])
    title = f"training step of transformers' {result['model']}, {result['layers']} layers, T {result['tokens']}"
    return markdown([title, "ms", "x bare", "peak extra MB"], rows)


def population_table(result: Result) -> str:
    bars = {
        "rollout, together / solo": "at most 0.6",
        "rollout, an adapter for each row / one": "at most 1.1",
        "step, together / solo": "at most 0.85",
        "step, GRPO / ES": "at least 1.3",
    }
    rows = [[name, f"{ratio:.2f}", bars[name]] for name, ratio in result["ratios"].items()]
    return markdown([f"{result['members']} adapters that train together, builtin, 16 x 8 each", "ratio", "wanted"], rows)


WRITERS = {
    "step": step_table,
    "rollout": rollout_table,
    "population": population_table,
    "memory": memory_line,
    "busy": busy_line,
    "layers": layers_table,
    "ops": ops_tables,
    "attach": attach_line,
}


def section(results: Sequence[Result]) -> str:
    """Markdown of all results that have a writer, in the writers' order."""
    parts = []
    for kind, write in WRITERS.items():
        parts += [f"{write(r)}\n\n`bench.{kind}` on {machine(r)}." for r in results if r["bench"] == kind]
    return "\n\n".join(parts)


def span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds * 1e3:.0f} ms"


def short(model: str) -> str:
    """A model file's name without its kind: Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf is Qwen2.5-Coder-0.5B."""
    return model.split("-Instruct")[0]


def beside(result: Result) -> list[list[str]]:
    """The README's rows of a result: what, ours, what stands beside it, and its ratio. None of most results."""
    kind = result["bench"]
    if kind == "step":
        rate, seconds = result["rollout_tokens_per_second"], result["seconds"]
        ours, trl = (span(seconds[f"step/{name}"]["median"]) for name in ("ours", "trl"))
        rollout, step = (f"{result['ratios'][name]:.1f}x as fast" for name in ("rollout", "step"))
        if result["model"] == "builtin":
            return [["whole GRPO step, the job above", ours, f"{trl}, TRL + PEFT", step]]
        peer = f"{rate['generate']:,.0f} tokens/s, transformers + PEFT"
        return [
            [f"rollout, {short(result['model'])}", f"{rate['ours']:,.0f} tokens/s", peer, rollout],
            [f"whole GRPO step, {short(result['model'])}", ours, f"{trl}, TRL + PEFT", step],
        ]
    if kind == "memory":
        ours, trl = (result["found"][name]["peak"] for name in ("ours", "trl"))
        what = f"peak memory of a step, {short(result['model'])}"
        return [[what, f"{ours:.1f} GB", f"{trl:.1f} GB, TRL + PEFT", f"{ours / trl:.2f} of it"]]
    if kind == "layers":
        attached, peft = (result["contenders"][name]["x_bare"] for name in ("attached", "PEFT"))
        what = f"training step of transformers' {result['model']}, {result['layers']} layers, attached"
        return [[what, f"{attached:.2f} x bare", f"{peft:.2f} x bare, PEFT", f"{attached / peft:.2f} of it"]]
    return []


def summary(results: Sequence[Result]) -> str:
    """The README's table: five rows of all results at most."""
    rows = [row for kind in WRITERS for r in results if r["bench"] == kind for row in beside(r)]
    return markdown(["", "tinylora", "beside it", "ratio"], rows)


def replace_section(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """text with what lies between the two comments replaced. ValueError where they are not there once each."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page needs one {begin} and one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def draw(results: Sequence[Result], path: Path) -> None:
    """One panel for each bench.ops result: forward + backward of each adapted linear, as multiples of the bare one."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tinylora"  # the same file from the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(results), 1, figsize=(10, 4 * len(results)), squeeze=False)
    for result, axes in zip(results, panels[:, 0], strict=True):
        cases = {case: rows for case, rows in by_case(result).items() if ("forward", "bare") in rows}
        names = implementations(list(cases.values()))
        for i, name in enumerate(names):
            rows = [cases[case].get(("forward+backward", name)) for case in cases]
            places = [k + (i - len(names) / 2) * 0.8 / len(names) for k in range(len(cases))]
            axes.bar(places, [r["x_bare"] if r else 0.0 for r in rows], 0.8 / len(names), label=name, align="edge")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(cases)), list(cases), rotation=20, ha="right", fontsize=7)
        axes.set_ylabel("x bare linear")
        axes.set_title(machine(result), fontsize=8)
        axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(root: Path = ROOT) -> None:
    files = sorted((root / "bench" / "results").rglob("*.json"))
    results = [json.loads(file.read_text()) for file in files]
    machines = [m for file in sorted((root / "bench" / "results").rglob("results.jsonl")) for m in gpu_report.read(file)]
    measured = [r for r in results if "bench" in r]
    readme, benchmarks, speed = (root / page for page in PAGES)
    text = replace_section(readme.read_text(), summary(measured))
    readme.write_text(replace_section(text, gpu_report.row(machines), *GPU))
    benchmarks.write_text(replace_section(benchmarks.read_text(), section(measured)))
    speed.write_text(replace_section(speed.read_text(), gpu_report.tables(machines), *GPU))
    linears = [r for r in results if r.get("bench") == "ops" and any(row["x_bare"] for row in r["rows"])]
    if linears and importlib.util.find_spec("matplotlib"):
        draw(linears, root / "bench" / "results" / "linear.svg")
    elif linears:
        print("matplotlib is not installed: no figure")


if __name__ == "__main__":
    main()
