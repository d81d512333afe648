"""Committed results -> the README's tables and a figure: python -m bench.report

Reads every JSON under bench/results, writes Markdown between the two `bench` comments of README.md and, where matplotlib is
installed, bench/results/linear.svg. Nothing is measured here, so running it twice changes nothing.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
Result = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)).replace("|  |", "| |")


def machine(result: Result) -> str:
    on_gpu = str(result.get("device", "cpu")).startswith("cuda")
    processor = result["gpu"] if on_gpu else f"{result['cpu']}, {result['threads']} threads"
    return f"{processor}, torch {result['torch']}, commit {result['commit']}"


def step_table(result: Result) -> str:
    ms, floor, rate = result["seconds"], result["floor_seconds"], result["rollout_tokens_per_second"]
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
        rows.append([label, f"{seconds * 1e3:.0f}", per_second, f"{seconds / floor[name.split('/')[0]]:.1f}", ratio])
    return markdown(["", "ms", "tokens/s", "x floor", "ratio"], rows)


def by_case(result: Result) -> dict[str, dict[tuple[str, str], Result]]:
    """case -> (pass, implementation) -> row."""
    cases: dict[str, dict[tuple[str, str], Result]] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], {})[row["pass"], row["implementation"]] = row
    return cases


def implementations(cases: Sequence[dict[tuple[str, str], Result]]) -> list[str]:
    return list(dict.fromkeys(name for rows in cases for _, name in rows if name != "bare"))


def ops_tables(result: Result) -> str:
    """Linears as multiples of the bare product, forward / forward + backward; the others in microseconds and megabytes."""
    linear, other = {}, {}
    for case, rows in by_case(result).items():
        (linear if ("forward", "bare") in rows else other)[case] = rows
    parts = []
    if linear:
        names = implementations(list(linear.values()))
        table = []
        for case, rows in linear.items():
            pairs = [[rows.get((p, name)) for p in ("forward", "forward+backward")] for name in names]
            table.append([case, *(" / ".join(f"{r['x_bare']:.2f}" if r else "" for r in pair) for pair in pairs)])
        parts.append(markdown(["x bare linear: forward / forward + backward", *names], table))
    if other:
        names = implementations(list(other.values()))
        table = []
        for case, rows in other.items():
            found = [rows.get(("forward+backward", name)) for name in names]
            cells = [f"{r['us']['median']:,.0f} us, {r['peak_extra_bytes'] / 1e6:,.0f} MB" if r else "" for r in found]
            table.append([case, *cells])
        parts.append(markdown(["forward + backward, and peak extra memory", *names], table))
    return "\n\n".join(parts)


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
        f"Peak memory of a process that loads {result['model']} and makes one step of 8 completions: {ours:.1f} GB, "
        f"with TRL and PEFT {trl:.1f} GB: {ours / trl:.2f} of it."
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


def replace_section(text: str, new: str) -> str:
    """text with what lies between the two comments replaced. ValueError where they are not there once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README needs one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


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
    readme = root / "README.md"
    readme.write_text(replace_section(readme.read_text(), section([r for r in results if "bench" in r])))
    linears = [r for r in results if r.get("bench") == "ops" and any(row["x_bare"] for row in r["rows"])]
    if linears and importlib.util.find_spec("matplotlib"):
        draw(linears, root / "bench" / "results" / "linear.svg")
    elif linears:
        print("matplotlib is not installed: no figure")


if __name__ == "__main__":
    main()
