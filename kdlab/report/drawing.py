"""Parts that all pictures of runs share: paper, colours, headings, and words.

Drawn through matplotlib's objects, without pyplot: no window, no state left behind, and matplotlib is
imported only where something is drawn. Colours are those of Okabe and Ito (2008), which people with any
kind of colour vision can tell apart, as they can the maps "viridis" and "Blues".
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kdlab.runs.formatting import plural
from kdlab.runs.read import Group, differing, setting, short
from kdlab.system.files import atomic_write

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
    """Figure that is not yet written, with its title and caption."""

    figure: Figure
    title: str
    caption: str


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that is drawn by Agg and lays itself out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heading(figure: Figure, title: str, below: str) -> None:
    """Write the title, and below it in small print the runs that the picture shows."""
    height = figure.get_figheight()
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.56 / height))
    lines = [
        figure.text(0.01, 1 - 0.08 / height, title, va="top", fontsize=12.5, fontweight="bold"),
        figure.text(0.01, 1 - 0.33 / height, below, va="top", fontsize=9, color=QUIET),
    ]
    for line in lines:
        line.set_in_layout(False)


def sample(groups: Iterable[Group]) -> str:
    """Describe the number of runs that a picture shows: ``12 settings, 3 seeds each``."""
    counts = [len(one.runs) for one in groups]
    settings = plural(len(counts), "setting")
    low, high = min(counts), max(counts)
    if low == high:
        return f"{settings}, {plural(high, 'seed')} each"
    return f"{settings}, {low} to {high} seeds each"


def labels(groups: Sequence[Group], keys: Iterable[str], width: int = 44, lines: int = 1) -> list[str]:
    """Return a name for each group, no two alike: all that differs where there is room, else what distinguishes them.

    Args:
        groups: groups of one picture.
        keys: settings that may be named, those first that people look for.
        width: number of characters of a line.
        lines: largest number of lines of a name.
    """
    runs = [one.runs[0] for one in groups]
    known = [key for key in keys if key in set(differing(runs))] or list(keys)
    values = _values(groups, known)
    names = [_name(one, known, values) for one in groups]
    if max(map(len, names), default=0) > width:
        needed, classes = list[str](), 1
        for key in known:
            count = len({one.label([*needed, key]) for one in groups})
            if count > classes:
                needed, classes = [*needed, key], count
        names = [_name(one, needed or known, values) for one in groups]
    names = ["\n".join(textwrap.wrap(name, width, max_lines=lines, placeholder="…") or [name]) for name in names]
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


_LONG = 32
"""Largest number of characters of a value that is shown whole; of a longer one, its end is shown."""


def _values(groups: Sequence[Group], keys: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return (key, value) → the value as it is shown: long ones without the beginning that all of them share."""
    shown = {}
    for key in keys:
        texts = {setting(one.settings[key]) for one in groups if key in one.settings}
        shared = next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), 0)
        for text in texts:
            start = max(shared, len(text) - _LONG + 1) if len(text) > _LONG else 0
            shown[key, text] = f"…{text[start:]}" if start and start < len(text) else cut(text, _LONG)
    return shown


def _name(one: Group, keys: Iterable[str], values: dict[tuple[str, str], str]) -> str:
    known = [f"{short(key)}={values[key, setting(one.settings[key])]}" for key in keys if key in one.settings]
    return " ".join(known) or one.runs[0].label


def legend_columns(names: Sequence[str], width: float) -> int:
    """Return the number of legend columns that fit a figure of ``width`` inches."""
    longest = max((len(line) for name in names for line in name.split("\n")), default=1)
    return max(1, min(len(names), int((width - 0.3) / (0.6 + 0.076 * longest))))


def cut(text: str, length: int) -> str:
    """Return ``text``, shortened to ``length`` with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"
