"""The rings of the package: an import may point only to the same ring or a lower one. docs/architecture.md draws them."""

import ast
from pathlib import Path

import pytest
from house import circles, graph, modules, strings

ROOT = Path(__file__).parent.parent

# The longest name that a module's begins with says its ring.
RINGS = {
    "tinylora.errors": 0,
    "tinylora.files": 0,
    "tinylora.hashes": 0,
    "tinylora.prng": 0,
    "tinylora.waiting": 0,
    "tinylora.cli": 1,
    "tinylora.demo": 1,
    "tinylora.tasks": 1,
    "tinylora.kernels": 2,
    "tinylora.model": 3,
    "tinylora.adapter": 4,
    "tinylora.engine": 5,
    "tinylora.loading": 5,
    "tinylora": 5,  # the face: it points at loading and below
    "tinylora.evaluation": 6,
    "tinylora.rl": 7,
    "tinylora.train": 8,
    "tinylora.evaluate": 8,
    "tinylora.generate": 8,
    "tinylora.export": 8,
    "tinylora.kernels.build": 8,
    "tinylora.studies": 9,
    "tinylora.sweep": 9,  # a shim has the ring of what it points to
    "tinylora.report": 9,
    "tinylora.demo.pretrain": 9,
}
COMMANDS = {name for name, ring in RINGS.items() if ring >= 8} - {"tinylora.studies"}
SHIMS = {"tinylora.sweep": "tinylora.studies.sweep", "tinylora.report": "tinylora.studies.report"}


def ring(module: str) -> int:
    return RINGS[max((name for name in RINGS if f"{module}.".startswith(f"{name}.")), key=len)]


def outwards(root: Path) -> set[tuple[str, str]]:
    """The arrows that point to a higher ring, also by a string as importlib and `python -m` are given it."""
    known = modules(root)
    arrows = {(a, b) for a, targets in graph(root).items() for b in targets | strings(known[a], known)}
    return {(a, b) for a, b in arrows if ring(b) > ring(a)}


def test_every_import_points_to_the_same_ring_or_a_lower_one() -> None:
    assert outwards(ROOT) == set(), "move what is needed to a lower ring"


def test_there_is_no_circle() -> None:
    assert circles(graph(ROOT)) == []


def test_every_module_is_listed_by_its_folder_or_by_itself() -> None:
    """A new file beside the folders has to be given a ring: the face's own does not cover it."""
    alone = {name for name in modules(ROOT) if name.count(".") == 1}
    assert alone <= RINGS.keys()


def test_no_command_imports_a_command() -> None:
    edges = graph(ROOT)
    assert {(a, b) for a in COMMANDS for b in edges[a] & COMMANDS} == set()
    assert {(a, b) for a, targets in edges.items() for b in targets & COMMANDS if a not in SHIMS} == set()


def test_a_shim_points_to_its_command_and_holds_nothing_else() -> None:
    for name, target in SHIMS.items():
        assert ring(name) == ring(target) and graph(ROOT)[name] == {target, "tinylora.cli"}
        assert len(ast.parse(modules(ROOT)[name].read_text()).body) == 4  # docstring, two imports, the call


def test_no_package_but_the_face_re_exports() -> None:
    packages = {name: path for name, path in modules(ROOT).items() if path.name == "__init__.py" and name != "tinylora"}
    assert packages and all(path.read_text().count("import") == 0 for path in packages.values())


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("kernels/shrink.py", "from tinylora.model import decoder", ("tinylora.kernels.shrink", "tinylora.model.decoder")),
        ("model/cache.py", "def late():\n    import tinylora.rl.run", ("tinylora.model.cache", "tinylora.rl.run")),
        ("errors.py", "if TYPE_CHECKING:\n    from tinylora.cli import table", ("tinylora.errors", "tinylora.cli")),
        ("files.py", 'importlib.import_module("tinylora.rl.loss")', ("tinylora.files", "tinylora.rl.loss")),
        ("prng.py", 'CHECKS = "tinylora.kernels.checks:CHECKS"', ("tinylora.prng", "tinylora.kernels.checks")),
    ],
)
def test_an_arrow_outwards_is_seen(file: str, line: str, arrow: tuple[str, str], tmp_path: Path) -> None:
    """Plain, late, for type checkers alone, and by a string: in a copy of the package."""
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "tinylora" / file).write_text(line + "\n")
    assert outwards(tmp_path) == {arrow}


def test_a_file_imports_few_others() -> None:
    """The mean over all files. It was 4.5 of 74 files before there were rings, and may only fall."""
    edges = graph(ROOT)
    assert sum(map(len, edges.values())) / len(edges) <= 3.2
