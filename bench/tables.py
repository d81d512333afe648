"""Tables in Markdown, and those of bench.ops's rows."""

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)).replace("|  |", "| |")


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
