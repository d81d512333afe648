"""The house in numbers: python tests/house.py [DIRECTORY] counts a checkout's import circles, imports a file and tokens.

An import counts wherever it stands: late, or for type checkers alone. Tokens are the library's, without comments and line ends;
studies, the report and pretraining are not of it.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "tinylora"
OUTSIDE = ("studies/", "pretrain", "sweep.py", "report.py", "figures.py")  # of the library, when tokens are counted
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


def tokens(root: Path) -> Iterator[tokenize.TokenInfo]:
    for path in modules(root).values():
        if not any(part in str(path.relative_to(root)) for part in OUTSIDE):
            text = io.StringIO(path.read_text())
            yield from (t for t in tokenize.generate_tokens(text.readline) if t.type not in SILENT)


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    edges = graph(where)
    sizes = sorted(map(len, circles(edges)), reverse=True)
    print(f"import circles       {len(sizes)}" + (f", of {', '.join(map(str, sizes))} files" if sizes else ""))
    print(f"imports a file       {sum(map(len, edges.values())) / len(edges):.2f} ({len(edges)} files)")
    print(f"tokens of library    {sum(1 for _ in tokens(where)) / 1000:.1f}k")
