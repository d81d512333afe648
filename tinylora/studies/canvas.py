"""What the report's figures share, by matplotlib: a style, an empty canvas, and a finished one as a picture with its caption.

Small enough to be read at the width of a phone. Colours are Okabe and Ito's, which colour-blind readers tell apart (less their
yellow, too faint on white); markers and dashes say the same again.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "os^Dv*P", ("-", "--", ":", "-.")
STYLE: Any = {
    "font.size": 10, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.fontsize": 9, "legend.frameon": False, "lines.markersize": 5, "text.parse_math": False, "savefig.dpi": 180,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    name: str  # of the file, without its ending
    caption: str
    alt: str  # what is to be seen, for who cannot
    png: bytes


def style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": DASHES[i // 7 % 4], "linewidth": 1.3}


def canvas(title: str, x: str, y: str, height: float = 3.1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, 48), fontsize=10, fontweight="bold", loc="left")
    axes.set_xlabel(textwrap.fill(x, 50))
    axes.set_ylabel(y)
    return figure, axes


def picture(figure: Figure, axes: Any, name: str, caption: str, alt: Sequence[str]) -> Picture:
    """The figure as a file, its legend below it."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        labels = [textwrap.fill(label, 24) for label in labels]
        columns = 4 if max(map(len, labels)) < 4 else 2
        figure.set_figheight(figure.get_figheight() + 0.2 * sum(label.count("\n") + 1 for label in labels) / columns + 0.2)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    title = " ".join(axes.get_title(loc="left").split())
    return Picture(name, caption, f"{title}. {'; '.join(alt)}.", file.getvalue())
