"""The base models that come with the package, made for the built-in task."""

from pathlib import Path

BUILTIN = Path(__file__).parent.parent / "demo" / "base"  # the base model of this task
BUILTIN_MODELS = {"builtin": BUILTIN, "builtin-medium": BUILTIN.with_name("base-medium")}
