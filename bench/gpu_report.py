"""results.jsonl of bench.gpu -> the tables of docs/speed.md and one row of the README; `bench.report` writes them there."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.tables import markdown, ops_tables

Fact = dict[str, Any]
NOTHING = "**Nothing here has run on a GPU yet.**"


@dataclass
class Machine:
    """What one GPU said of one commit, over as many calls as it took."""

    about: Fact
    facts: list[Fact] = field(default_factory=list)

    def of(self, stage: str, *keys: str) -> list[Fact]:
        """A stage's facts that have all of these keys."""
        return [f for f in self.facts if f["stage"] == stage and all(f.get(k) is not None for k in keys)]

    @property
    def name(self) -> str:
        a = self.about
        return f"{a['gpu']}, torch {a['torch']}, triton {a['triton']}, commit {a['commit']}, {a['shape']}"


def read(file: Path) -> list[Machine]:
    """The machines of a file, without those that are no GPU. A line that is no JSON, as the last where the driver was killed,
    counts for nothing."""
    machines: dict[str, Machine] = {}
    here: Machine | None = None
    for line in file.read_text(errors="replace").splitlines():
        try:
            fact = json.loads(line)
        except ValueError:
            continue
        if fact.get("stage") == "machine":
            machine = Machine(fact)
            here = machines.setdefault(machine.name, machine) if fact["gpu"] else None
        elif here is not None and "stage" in fact:
            here.facts.append(fact)
    return list(machines.values())


def table(header: str, rows: Sequence[Sequence[Any]]) -> str:
    """Nothing where there are no rows."""
    return markdown(header.split(" | "), [[str(cell) for cell in row] for row in rows]) if rows else ""


def decode_table(m: Machine) -> str:
    rows = [
        (
            f["bucket"],
            f["context"],
            "on" if f["adapters"] else "off",
            f"{f['ms']:.2f}",
            f"{f['x_floor']:.2f}",
            f"{f['tokens_per_second']:,.0f}",
            f"{f['x_adapter_off']:.3f}" if f["x_adapter_off"] else "",
        )
        for f in m.of("decode", "bucket")
    ]
    return table("decode step, slots | context | adapter | ms | x floor | tokens/s | x adapter off", rows)


def step_table(m: Machine) -> str:
    rows = []
    for f in m.of("step", "rollout"):
        floor, host = f"{f['x_floor']:.2f} x floor", f"host {f['host_share']:.1%}"
        rows.append(("rollout", f"{f['seconds']:.2f}", f"{f['tokens_per_second']:,.0f}", floor, host))
    for f in m.of("step", "mfu"):
        same = "same bits each time" if f["same_bits"] else "OTHER BITS EACH TIME"
        rows.append(("update", f"{f['update_seconds']:.2f}", f"{f['tokens_per_second']:,.0f}", f"MFU {f['mfu']:.0%}", same))
    return table("step | s | tokens/s | | ", rows)


def verdict_table(m: Machine) -> str:
    rows = []
    for f in [*m.of("verdicts", "op"), *m.of("csrc_proof", "op")]:
        closest = f.get("closest") or {}
        share = closest["error"] / closest["allowed"] if closest.get("error") is not None else math.inf
        said = f["error"] or f"{share:.2f} of what is allowed"
        rows.append((f["op"], f["dtype"], said, "yes" if f["same_bits"] else "NO"))
    return table("kernel against fp64 | dtype | error | same bits twice", rows)


def peer_table(m: Machine) -> str:
    rows = [(f["what"], f"{f['seconds']:.2f}", f"{f['ours_is_x']:.2f}") for f in m.of("peers", "ours_is_x")]
    return table("beside transformers + PEFT, the same tokens | s | ours is x", rows)


def csrc_table(m: Machine) -> str:
    rows = [
        (f["case"], f["implementation"], f"{f['us']['median']:.1f}", f"{f['share_of_copy']:.0%}", f"{f['x_low_rank']:.2f}")
        for f in m.of("ops", "share_of_copy")
    ]
    return table("a linear of few rows | | us | of copy bandwidth | x cuBLAS + low rank", rows)


def profile_tables(m: Machine) -> str:
    """The ten kernels that take longest of each profile, as shares of all that is listed."""
    parts = []
    for f in m.of("profiles", "kernels"):
        whole = sum(us for _, _, us in f["kernels"]) or 1.0
        rows = [(f"`{name[:60]}`", calls, f"{us:,.0f}", f"{us / whole:.0%}") for name, calls, us in f["kernels"][:10]]
        size = f"{f['slots']} slots" if "slots" in f else f"{f['tokens']} tokens"
        parts.append(table(f"{f['what']}, {size} | calls | us | share", rows))
    return "\n\n".join(parts)


def other_lines(m: Machine) -> str:
    lines = []
    for f in [*m.of("tiny", "equal_to_cpu"), *m.of("bf16", "equal_to_cpu")]:
        dtype, far = "bf16" if f["stage"] == "bf16" else "fp32", f["update_logp_difference_max"]
        lines.append(
            f"- Built-in model, {dtype}: {f['equal_to_cpu']} of {f['completions']} completions are a CPU's fp32 ones; "
            f"log-probs differ by {far:.1e} at most, the gradient by {f['gradient_relative_error']:.1e}."
        )
    for f in m.of("training", "equal_steps"):
        lines.append(f"- Ten steps in fp32 beside a CPU's: tokens equal for {f['equal_steps']} of them.")
    for f in m.of("graphs", "replay_equals_eager"):
        lines.append(f"- Graph replays equal eager steps to the bit: {'yes' if f['replay_equals_eager'] else 'NO'}.")
    for f in m.of("step", "peak_gigabytes"):
        lines.append(f"- Peak memory of a step: {f['peak_gigabytes']:.1f} GB.")
    for f in m.of("tests", "tests_passed"):
        lines.append(f"- GPU tests: {f['tests_passed']} passed, {f['tests_failed']} failed, {f['tests_skipped']} skipped.")
    for word in ("failed", "skipped"):
        lines += [f"- Stage {f['stage']} {word}: {f[word]}." for f in m.facts if f.get(word) and f["stage"] != "end"]
    return "\n".join(lines)


def tables(machines: Sequence[Machine]) -> str:
    """Of every machine, in Markdown."""
    if not machines:
        return NOTHING
    parts = []
    for m in machines:
        found = [(f["gemm_tflops"], f["copy_gbytes_per_second"]) for f in m.of("card", "gemm_tflops")]
        rates = f"{found[-1][0]:.0f} TFLOP/s and {found[-1][1]:,.0f} GB/s" if found else "rates that were not measured"
        parts.append(f"### {m.name}\n\nFloors from {rates}.")
        parts += [decode_table(m), step_table(m), peer_table(m), csrc_table(m)]
        parts += [ops_tables({"rows": [*m.of("ops", "pass"), *m.of("compiled", "pass")]}), profile_tables(m), verdict_table(m)]
        parts.append(other_lines(m))
    return "\n\n".join(part for part in parts if part)


def row(machines: Sequence[Machine]) -> str:
    """The README's: the newest machine's numbers, or that there are none."""
    if not machines:
        return NOTHING
    m = machines[-1]
    cells = [m.name]
    for slots in (64, 256):
        found = [f["x_floor"] for f in m.of("decode", "bucket") if f["bucket"] == slots and f["adapters"]]
        cells.append(f"{found[0]:.2f} x floor" if found else "")
    cells.append("".join(f"{f['mfu']:.0%}" for f in m.of("step", "mfu")[-1:]))
    cells.append("".join(f"{f['tokens_per_second']:,.0f}" for f in m.of("step", "rollout")[-1:]))
    cells.append(" / ".join(f"{f['ours_is_x']:.1f}" for f in m.of("peers", "ours_is_x")))
    header = "GPU | decode, 64 slots | 256 slots | update, MFU | rollout, tokens/s | x transformers + PEFT, rollout / update"
    return table(header, [cells]) + "\n\n`bash bench/gpu.sh`; all of it in [docs/speed.md](docs/speed.md)."
