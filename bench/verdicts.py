"""What this machine says of every kernel, against fp64 and twice: python -m bench.verdicts

The proofs that `dispatch` asks for before it lets a kernel run, with their numbers: for each op and dtype the case that comes
closest to failing, its error, plain PyTorch's, what is allowed, and whether two runs gave the same bits. Exit status 1 where
an op failed or nothing could be checked. They stay in the cache: what runs next need not check again.
"""

import argparse
import sys
from typing import Any

import torch

from bench.measure import card, print_json
from tinylora.cli import table
from tinylora.kernels import dispatch


def worst(cases: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The case whose error is the largest share of what it is allowed; a non-finite error beats all. None of none."""
    return max(cases, key=lambda c: (c["error"] is None, (c["error"] or 0.0) / (c["allowed"] or 1e-300)), default=None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checks", default=dispatch.CHECKS, help="module:NAME of the dict of checks")
    parser.add_argument("--json", help="a file for the last line too")
    options = parser.parse_args(arguments)
    verdicts = list(dispatch.prove(torch.device(options.device), options.checks).values())
    rows = []
    for verdict in verdicts:
        row = [f"{verdict['op']} {verdict['dtype']}: {verdict['error'] or 'passed'}"]
        if w := worst(verdict.get("cases", [])):
            error = "not finite" if w["error"] is None else f"{w['error']:.1e}"
            same = "yes" if all(c["same_bits"] for c in verdict["cases"]) else "no"
            row += [error, f"{w['plain']:.1e}", f"{w['allowed']:.1e}", same, w["case"]]
        rows.append(row + [""] * (6 - len(row)))
    print(table(["kernel", "error", "plain", "allowed", "same bits", "worst case"], rows))
    print_json({"bench": "verdicts", **card(), "device": options.device, "verdicts": verdicts}, options.json)
    return 0 if verdicts and all(v["error"] is None for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
