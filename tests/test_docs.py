"""docs/architecture.md's tree is the package's: every file has a line, and every line a file."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def drawn(page: str) -> set[str]:
    """The files that the tree of the page names, by path."""
    tree = page.split("## The tree\n")[1].split("\n## ")[0]
    found, folders = set(), []
    for line in tree.splitlines():
        if not (match := re.match(r"    ( *)(\S+(?:, \S+)*)  ", line + "  ")) or line.startswith(" " * 24):
            continue
        depth = len(match[1]) // 2
        for name in match[2].split(", "):
            folders[depth:] = [name]
            if not name.endswith("/"):
                found.add("".join(folders[:depth]) + name)
    return found


def test_the_tree_is_drawn():
    named = drawn((ROOT / "docs" / "architecture.md").read_text())
    files = [f for folder in ("tinylora", "bench") for f in (ROOT / folder).rglob("*.py")]
    real = {str(f.relative_to(ROOT)) for f in files if f.name != "__init__.py" or f.parent.name == "tinylora"}
    ours = {n for n in named if n.startswith(("tinylora/", "bench/")) and n.endswith(".py")}
    assert ours - real == set(), "drawn, and not there"
    assert real - ours - {"bench/__init__.py"} == set(), "there, and not drawn"
