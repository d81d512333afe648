"""The house in numbers: python tests/house.py [DIRECTORY] counts a checkout's import circles, imports a file, and its density.

An import counts wherever it stands: late, or for type checkers alone. Tokens are without comments and line ends. The library is
the package without studies, the report's figures and pretraining.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = "tinylora"
OUTSIDE = ("studies/", "pretrain", "sweep.py", "report.py", "figures.py")  # of the library
SILENT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package under `root`, by its dotted name."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules of the package that a file imports. A package counts only where nothing in it is meant."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; name the module in full"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {name for name in found if name in known and known[name] != path}
    return {n for n in own if known[n].name != "__init__.py" or not any(m.startswith(f"{n}.") for m in found & own)}


def strings(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules that a file names in strings, as importlib and `python -m` are given them: "module" or "module:name"."""
    constants = (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
    named = {c.partition(":")[0] for c in constants if isinstance(c, str)}
    return {n for n in named if n in known and n != PACKAGE and known[n] != path}


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: imports(path, known) for name, path in known.items()}


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach one another."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        reached[start], todo = set(), [start]
        while todo:
            new = edges[todo.pop()] - reached[start]
            reached[start] |= new
            todo += new
    found = [{b for b in edges if b in reached[a] and a in reached[b]} for a in edges if a in reached[a]]
    return [c for i, c in enumerate(found) if c not in found[:i]]


def library(root: Path) -> list[str]:
    """The sources of the library."""
    inside = (p for p in modules(root).values() if not any(part in str(p.relative_to(root)) for part in OUTSIDE))
    return [path.read_text() for path in inside]


def tokens(sources: Iterable[str]) -> int:
    every = (token for text in sources for token in tokenize.generate_tokens(io.StringIO(text).readline))
    return sum(token.type not in SILENT for token in every)


def several(node: ast.Assign) -> bool:
    """Whether it is a, b = x, y: two assignments in one line."""
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def nested(node: ast.AST) -> bool:
    return isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) and len(node.generators) > 1


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    edges, sources = graph(where), library(where)
    sizes = sorted(map(len, circles(edges)), reverse=True)
    lines = [line.rstrip() for text in sources for line in text.splitlines() if line.strip()]
    nodes = [node for text in sources for node in ast.walk(ast.parse(text))]
    assigned = [node for node in nodes if isinstance(node, ast.Assign)]
    counted = tokens(sources)
    for name, value in {
        "import circles": f"{len(sizes)}" + (f": of {', '.join(map(str, sizes))} files" if sizes else ""),
        "imports a file": f"{sum(map(len, edges.values())) / len(edges):.2f}, of {len(edges)} files",
        "tokens a non-blank line": f"{counted / len(lines):.1f}",
        "tuple assignments, share of all": f"{sum(map(several, assigned)) / len(assigned):.1%}",
        "comprehensions with two or more for": f"{sum(map(nested, nodes))}",
        "p95 line length": f"{sorted(map(len, lines))[int(0.95 * len(lines))]}",
        "whole-line comments, share of lines": f"{sum(line.lstrip().startswith('#') for line in lines) / len(lines):.1%}",
        "library, non-blank lines": f"{len(lines) / 1000:.1f}k",
        "library, tokens": f"{counted / 1000:.1f}k",
    }.items():
        print(f"{name:36}{value}")
