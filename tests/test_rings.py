"""The rings of the package: an import may point only to the same ring or a lower one."""

from pathlib import Path

from house import graph, modules, strings

ROOT = Path(__file__).parent.parent

# The longest name that a module begins with says its ring. docs/architecture.md draws them.
RINGS = {
    "tinylora": 5,  # the face: it points at loading and below
    "tinylora.errors": 0,
    "tinylora.files": 0,
    "tinylora.prng": 0,
    "tinylora.cli": 1,
    "tinylora.demo": 1,
    "tinylora.tasks.grading": 1,
    "tinylora.tasks.grader": 1,
    "tinylora.tasks.grader_worker": 1,
    "tinylora.tasks.prompts": 1,
    "tinylora.tasks.sets": 1,
    "tinylora.kernels": 2,
    "tinylora.model": 3,
    "tinylora.adapter": 4,
    "tinylora.adapter.files": 4,
    "tinylora.adapter.basis": 4,
    "tinylora.adapter.attached": 4,
    "tinylora.adapter.peft": 4,
    "tinylora.engine.scheduler": 5,
    "tinylora.engine.slots": 5,
    "tinylora.engine.rollout": 5,
    "tinylora.engine.text": 5,
    "tinylora.evaluation.scores": 6,
    "tinylora.evaluation.answers": 6,
    "tinylora.evaluation.statistics": 6,
    "tinylora.rl": 7,
    "tinylora.train": 8,
    "tinylora.evaluate": 8,
    "tinylora.generate": 8,
    "tinylora.export": 8,
    "tinylora.kernels.build": 8,
    "tinylora.sweep": 9,
    "tinylora.report": 9,
    "tinylora.studies.figures": 9,
    "tinylora.demo.pretrain": 9,
}

# Arrows that still run outwards. This list may only shrink.
OFFENDERS = {
    ("tinylora.kernels.decode_linear", "tinylora.kernels.build"),
    ("tinylora.kernels.dispatch", "tinylora.kernels.build"),
    ("tinylora.kernels.proof", "tinylora.kernels.build"),
    ("tinylora.model.decoder", "tinylora.generate"),
    ("tinylora.evaluation.scores", "tinylora.rl.rewards"),
    ("tinylora.engine.rollout", "tinylora.rl.memory"),
    ("tinylora.evaluation.answers", "tinylora.rl.rewards"),
}


def ring(module: str) -> int:
    return RINGS[max((name for name in RINGS if f"{module}.".startswith(f"{name}.")), key=len)]


def test_every_import_points_to_the_same_ring_or_a_lower_one():
    known = modules(ROOT)
    arrows = {(a, b) for a, targets in graph(ROOT).items() for b in targets | strings(known[a], known)}
    outwards = {(a, b) for a, b in arrows if ring(b) > ring(a)}
    assert outwards - OFFENDERS == set(), "an import that points outwards: move what it needs to a lower ring"
    assert OFFENDERS - outwards == set(), "an offender that is gone: strike it off the list"
