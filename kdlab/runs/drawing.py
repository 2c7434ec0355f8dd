"""What all pictures of runs share: paper, colours, headings, and words.

Drawn through matplotlib's objects, without pyplot: no window, no state left behind, and matplotlib is
imported only where something is drawn. Colours are those of Okabe and Ito (2008), which people with any
kind of colour vision can tell apart, as they can the maps "viridis" and "Blues".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from kdlab.runs.read import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, QUIET, GRID = "#1f2328", "#656d76", "#d8dee4"

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "hatch.color": "#b6bec7",
    "hatch.linewidth": 0.6,
    # Names of runs are shown as they are: a "$" in one is no formula.
    "text.parse_math": False,
}
DPI = 160


class Drawing(NamedTuple):
    """A figure not yet written, and the words that belong beside it."""

    figure: Figure
    title: str
    caption: str


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches, that is drawn by Agg and lays itself out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heading(figure: Figure, title: str, below: str) -> None:
    """The title, and below it in small print what the picture rests on."""
    height = figure.get_figheight()
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.56 / height))
    lines = [
        figure.text(0.01, 1 - 0.08 / height, title, va="top", fontsize=12.5, fontweight="bold"),
        figure.text(0.01, 1 - 0.33 / height, below, va="top", fontsize=9, color=QUIET),
    ]
    for line in lines:
        line.set_in_layout(False)


def sample(groups: Iterable[Group]) -> str:
    """How many runs a picture rests on: ``12 settings, 3 seeds each``."""
    counts = [len(one.runs) for one in groups]
    settings = plural(len(counts), "setting")
    low, high = min(counts), max(counts)
    if low == high:
        return f"{settings}, {plural(high, 'seed')} each"
    return f"{settings}, {low} to {high} seeds each"


def plural(count: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {what}{'s' * (count != 1)}"


def cut(text: str, length: int) -> str:
    """``text``, shortened to ``length`` with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"
