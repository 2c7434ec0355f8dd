"""A diagnosis in pictures: examples that networks get wrong, classes, and calibration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab.report.compare.pictures import Picture
from kdlab.report.drawing import (
    BLUE,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PURPLE,
    QUIET,
    STYLE,
    VERMILION,
    Drawing,
    canvas,
    cut,
    heading,
    save,
)
from kdlab.runs.formatting import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CLASSES = 24
"""Largest number of classes in a chart; of more, those where the student differs most from its teacher."""

COLUMNS, ROWS = 6, 2
"""Layout of the pictures of one kind."""

MARKS = {"teacher": ("s", BLUE), "student": ("o", VERMILION), "baseline": ("^", QUIET)}
COLOURS = {"inherited": ORANGE, "own": VERMILION, "other": PURPLE, "corrected": GREEN}
TITLES = {
    "inherited": "Inherited",
    "own": "Its own",
    "other": "Both wrong, differently",
    "corrected": "Corrected",
    "lost": "Lost",
    "shared": "Shared with the baseline",
    "gained": "Gained",
    "errors": "Errors",
}


@dataclass
class Example:
    """Example of a split, with the class that every network predicts."""

    number: int
    true: str
    said: Mapping[str, tuple[str, float]]
    """Map of role → (class, its probability)."""
    picture: Any = None
    """Array (H, W) or (H, W, 3) in [0, 1]; None for the row of a table."""
    values: Sequence[tuple[str, float, float]] = ()
    """Least usual values of a table's row: (column, value, deviations from the mean)."""


@dataclass
class Shown:
    """Examples of one kind."""

    kind: str
    meaning: str
    total: int
    """Number of examples of this kind, shown or not."""
    examples: list[Example] = field(default_factory=list)


def draw(found: Mapping[str, Any], kinds: Sequence[Shown], title: str, out: Path) -> list[Picture]:
    """Draw every picture that there are numbers for, as ``diagnosis*.png`` files in ``out``."""
    import matplotlib

    drawn: dict[str, Callable[[], Drawing | None]] = {
        "diagnosis": lambda: examples(kinds, title),
        "diagnosis_classes": lambda: classes(found, title),
        "diagnosis_calibration": lambda: calibration(found, title),
    }
    pictures = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for name, make in drawn.items():
            path = out / f"{name}.png"
            path.unlink(missing_ok=True)  # one of an earlier diagnosis would be taken for one of this
            if (drawing := make()) is not None:
                save(drawing.figure, path)
                pictures.append(Picture(path, drawing.title, drawing.caption))
    return pictures


# ---- examples -----------------------------------------------------------------------------------------------------

_CELL, _IMAGE, _LINE, _HEAD, _TOP = 1.62, 1.44, 0.145, 0.5, 0.72
_BETWEEN = 0.18
"""Inches: width of a cell, greatest height of its picture, a line of text, the heading of a kind, and that of the
figure; and what is left free between cells, so that a square picture is as wide as the words below it."""


def examples(kinds: Sequence[Shown], title: str) -> Drawing:
    """Draw examples of every kind, the most confident errors first: pictures, or the rows of a table."""
    none = [TITLES[one.kind].lower() for one in kinds if not one.examples]
    kinds = [one for one in kinds if one.examples]
    width = _CELL * COLUMNS + 0.2
    pictures = any(example.picture is not None for one in kinds for example in one.examples)
    each = [_height(one, pictures) for one in kinds]
    height = _TOP + sum(each) + (0.1 if kinds else 0.4)
    figure = _blank(width, height)
    _write(figure, 0.15, 0.12, "Examples", size=12.5, weight="bold")
    below = f"{title}; no examples of: {', '.join(none)}" if none and kinds else title
    _write(figure, 0.15, 0.37, below, size=9, color=QUIET)
    top = _TOP
    for one, high in zip(kinds, each, strict=True):
        _kind(figure, one, top, width)
        (_grid if pictures else _lines)(figure, one, top + _HEAD)
        top += high
    if not kinds:
        _write(figure, 0.15, _TOP, "No network is wrong on any example.", size=10)
    caption = (
        "The examples of each kind that a network is most sure of, with what each takes them for and how sure it is."
    )
    caption += " Green is right, red is wrong. Numbers count from 0 in the order of the split."
    return Drawing(figure, "examples", caption)


def _height(one: Shown, pictures: bool) -> float:
    if not pictures:
        return _HEAD + 0.2 * (len(one.examples) + 1) + 0.15
    return _HEAD + math.ceil(len(one.examples) / COLUMNS) * _cell(one.examples[0])


def _cell(example: Example) -> float:
    """Return the height of a picture, the lines below it, and the gap to the next, in inches."""
    return _image_height(example) + _LINE * (2 + len(example.said)) + 0.16


def _image_height(example: Example) -> float:
    high, wide = example.picture.shape[:2]
    return min(_IMAGE, max(0.2, (_CELL - _BETWEEN) * high / wide))


def _kind(figure: Figure, one: Shown, top: float, width: float) -> None:
    colour = COLOURS.get(
        one.kind, VERMILION if one.kind in ("lost", "errors") else GREEN if one.kind == "gained" else QUIET
    )
    _rule(figure, 0.15, top + 0.06, width - 0.3, GRID, 0.8)
    _box(figure, 0.15, top + 0.18, 0.1, 0.14, colour)
    _write(figure, 0.32, top + 0.16, f"{TITLES[one.kind]}: {plural(one.total, 'example')}", size=10.5, weight="bold")
    more = f"; the {len(one.examples)} surest" if one.total > len(one.examples) else ""
    _write(figure, width - 0.15, top + 0.175, f"{one.meaning}{more}", size=8.5, color=QUIET, ha="right")


def _grid(figure: Figure, one: Shown, top: float) -> None:
    for n, example in enumerate(one.examples):
        row, column = divmod(n, COLUMNS)
        x, y = 0.15 + column * _CELL, top + row * _cell(example)
        _image(figure, example, x, y)
        y += _image_height(example) + 0.06
        _pair(figure, x, y, "true", example.true, f"#{example.number}", INK)
        for i, (role, (name, sure)) in enumerate(example.said.items()):
            colour = GREEN if name == example.true else VERMILION
            _pair(figure, x, y + _LINE * (i + 1), role, name, f"{100 * sure:.0f}%", colour)


def _image(figure: Figure, example: Example, x: float, y: float) -> None:
    picture, tall = example.picture, _image_height(example)
    wide, high = figure.get_size_inches()
    ax = figure.add_axes((x / wide, 1 - (y + tall) / high, (_CELL - _BETWEEN) / wide, tall / high))
    grey: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1} if picture.ndim == 2 else {}
    small = max(picture.shape[:2]) <= 96
    ax.imshow(picture, interpolation="nearest" if small else "antialiased", **grey)
    ax.set_anchor("W")
    ax.set_axis_off()


def _pair(figure: Figure, x: float, y: float, role: str, name: str, beside: str, colour: str) -> None:
    _write(figure, x, y, role, size=6.6, color=QUIET)
    room = _CELL - _BETWEEN - 0.46 - _long(figure, beside, 6.6, "normal") - 0.06
    name, size = _fitted(figure, name, room)
    _write(figure, x + 0.46, y - 0.008, name, size=size, color=colour, weight="bold")
    _write(figure, x + _CELL - _BETWEEN, y, beside, size=6.6, color=QUIET, ha="right")


def _fitted(figure: Figure, name: str, room: float) -> tuple[str, float]:
    """Return a class's name in bold type that fits so many inches, and its size.

    Smaller where it is long, shortened where that is not enough.
    """
    for size in (7.4, 6.6, 5.8):
        if len(name) < 40 and _long(figure, name, size, "bold") <= room:
            return name, size
    length = min(len(name), 40)
    while length > 1 and _long(figure, cut(name, length), size, "bold") > room:
        length -= 1
    return cut(name, length), size


def _long(figure: Figure, text: str, size: float, weight: str) -> float:
    """Return the width of a line of text in inches."""
    from matplotlib.font_manager import FontProperties

    canvas: Any = figure.canvas
    font = FontProperties(size=size, weight=weight)
    return float(canvas.get_renderer().get_text_width_height_descent(text, font, False)[0] / figure.dpi)


def _lines(figure: Figure, one: Shown, top: float) -> None:
    """Draw the rows of a table, a line each."""
    roles = list(one.examples[0].said)
    places = [0.15, 0.75, *(1.9 + 1.4 * n for n in range(len(roles)))]
    last = 1.9 + 1.4 * len(roles)
    for place, text in zip(places, ["number", "true", *roles], strict=True):
        _write(figure, place, top, text, size=7.5, color=QUIET)
    _write(figure, last, top, "least usual values (standard deviations from the mean)", size=7.5, color=QUIET)
    for n, example in enumerate(one.examples):
        y = top + 0.2 * (n + 1)
        _write(figure, places[0], y, f"#{example.number}", size=8)
        _write(figure, places[1], y, cut(example.true, 15), size=8, weight="bold")
        for place, (name, sure) in zip(places[2:], example.said.values(), strict=True):
            colour = GREEN if name == example.true else VERMILION
            _write(figure, place, y, f"{cut(name, 13)} {100 * sure:.0f}%", size=8, color=colour)
        _write(figure, last, y, unusual(example, int((_CELL * COLUMNS - last) / 0.058)), size=7.5)


def unusual(example: Example, room: int) -> str:
    """Return the values of a table's row that are furthest from the mean, as many as fit ``room`` characters."""
    text = ""
    for name, value, away in example.values:
        longer = f"{text}{', ' if text else ''}{cut(name, 14)} {value:.4g} ({away:+.1f})"
        if len(longer) > room and text:
            return text
        text = longer
    return text


def _blank(width: float, height: float) -> Figure:
    figure = canvas(width, height)
    figure.set_layout_engine("none")
    return figure


def _write(figure: Figure, x: float, y: float, text: str, size: float, **style: Any) -> None:
    """Write text at inches from the left and the top."""
    wide, high = figure.get_size_inches()
    figure.text(x / wide, 1 - y / high, text, va="top", fontsize=size, **style)


def _rule(figure: Figure, x: float, y: float, length: float, colour: str, thick: float) -> None:
    from matplotlib.lines import Line2D

    wide, high = figure.get_size_inches()
    at = [1 - y / high] * 2
    figure.add_artist(Line2D([x / wide, (x + length) / wide], at, color=colour, lw=thick))


def _box(figure: Figure, x: float, y: float, wide: float, high: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    w, h = figure.get_size_inches()
    figure.add_artist(
        Rectangle((x / w, 1 - (y + high) / h), wide / w, high / h, color=colour, transform=figure.transFigure)
    )


# ---- classes ------------------------------------------------------------------------------------------------------


def chosen_classes(rows: Sequence[Mapping[str, Any]], most: int = MOST_CLASSES) -> list[Mapping[str, Any]]:
    """Return all classes in order; of many, those where the student differs most from its reference, losses first."""
    rows = [row for row in rows if row["examples"]]
    if len(rows) <= most:
        return list(rows)
    kept = sorted(rows, key=lambda row: (-abs(difference(row)), row["accuracy"]["student"]))[:most]
    return sorted(kept, key=difference)


def difference(row: Mapping[str, Any]) -> float:
    """Return the student's accuracy less the teacher's, or the baseline's, or that of a perfect network."""
    accuracy = row["accuracy"]
    return float(accuracy["student"] - accuracy.get("teacher", accuracy.get("baseline", 1.0)))


def classes(found: Mapping[str, Any], title: str) -> Drawing:
    """Draw the accuracy of every network on each class, and the student's errors by their kind."""
    rows = chosen_classes(found["per_class"])
    taught = "teacher" in found["networks"]
    figure = canvas(9.9, 1.75 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
    _accuracies(left, rows, list(found["networks"]))
    _errors(right, rows, taught)
    names = [cut(str(row["class"]), 22) for row in rows]
    left.set_yticks(range(len(rows)), names, fontsize=8.5)
    left.set_ylim(len(rows) - 0.4, -0.6)
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, handletextpad=0.3, columnspacing=1.1,
                  borderaxespad=0.2)  # fmt: skip
    total = len([row for row in found["per_class"] if row["examples"]])
    some = f"{len(rows)} of {total} classes: the greatest differences; " if len(rows) < total else ""
    heading(figure, "Classes", f"{some}{title}")
    caption = "Left: how often each network is right."
    caption += (
        " Right: the student's errors by what the teacher says of the same example, and to the left of 0 what the "
        "student gets right and the teacher wrong."
        if taught
        else " Right: how often the student is wrong."
    )
    if some:
        caption += " The table below holds every class."
    return Drawing(figure, "classes", caption)


_OVER = {"baseline": 3, "teacher": 4, "student": 5}


def _accuracies(ax: Axes, rows: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> None:
    for y, row in enumerate(rows):
        values = [100 * row["accuracy"][role] for role in roles]
        ax.plot([min(values), max(values)], [y, y], color=GRID, lw=2.2, zorder=1, solid_capstyle="round")
    for role in roles:
        marker, colour = MARKS[role]
        xs = [100 * row["accuracy"][role] for row in rows]
        ax.scatter(xs, range(len(rows)), marker=marker, s=46 if role == "teacher" else 30, color=colour, label=role,
                   edgecolor="white", lw=0.6, zorder=_OVER[role], clip_on=False)  # fmt: skip
    ax.set_xlabel("accuracy, %")
    low, high = ax.get_xlim()
    ax.set_xlim(max(low, 0), min(high, 100.0))


def _errors(ax: Axes, rows: Sequence[Mapping[str, Any]], taught: bool) -> None:
    ys = range(len(rows))
    if not taught:
        wrong = [100 * (1 - row["accuracy"]["student"]) for row in rows]
        ax.barh(ys, wrong, height=0.62, color=VERMILION, label="wrong")
    else:
        start = [0.0] * len(rows)
        for kind, label in (("inherited", "inherited"), ("other", "both wrong, differently"), ("own", "its own")):
            shares = [100 * row[kind] / row["examples"] for row in rows]
            ax.barh(ys, shares, left=start, height=0.62, color=COLOURS[kind], label=label)
            start = [a + b for a, b in zip(start, shares, strict=True)]
        corrected = [-100 * row["corrected"] / row["examples"] for row in rows]
        ax.barh(ys, corrected, height=0.62, color=COLOURS["corrected"], label="corrected")
    ax.axvline(0, color=INK, lw=0.9)
    ax.set_xlabel("of the class's examples, %")
    ax.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    low, high = ax.get_xlim()
    if high - low < 4:  # nothing or next to nothing is wrong
        ax.set_xlim(min(low, -0.5), max(high, 4.0))


# ---- calibration --------------------------------------------------------------------------------------------------


def calibration(found: Mapping[str, Any], title: str) -> Drawing:
    """Draw the accuracy of each network against its confidence: on the diagonal, it is well calibrated."""
    networks = found["networks"]
    width = 3.3 * len(networks)
    figure = canvas(max(width, 6.6), 4.6)
    axes = figure.subplots(1, max(len(networks), 2), sharey=True, squeeze=False).ravel()
    for ax in axes[len(networks) :]:
        ax.remove()
    for ax, (role, one) in zip(axes, networks.items(), strict=False):
        _reliability(ax, role, one)
    axes[0].set_ylabel("right, %")
    heading(figure, "Calibration", title)
    caption = "Of the examples that a network is so sure of, how many it gets right; the area of a point counts them."
    caption += " Below the diagonal it is surer than it should be."
    return Drawing(figure, "calibration", caption)


def _reliability(ax: Axes, role: str, one: Mapping[str, Any]) -> None:
    bins = one["calibration"]
    total = sum(part["examples"] for part in bins)
    xs, ys = ([100 * part[key] for part in bins] for key in ("confidence", "accuracy"))
    colour = MARKS[role][1]
    ax.plot([0, 100], [0, 100], color=QUIET, lw=0.9, ls=(0, (4, 3)), zorder=1)
    for x, y in zip(xs, ys, strict=True):
        ax.plot([x, x], [x, y], color=colour, lw=1.1, alpha=0.45, zorder=2)
    sizes = [14 + 260 * part["examples"] / total for part in bins]
    ax.scatter(xs, ys, s=sizes, color=colour, alpha=0.85, edgecolor="white", lw=0.7, zorder=3, clip_on=False)
    ax.set(xlim=(0, 102), ylim=(0, 102), xlabel="confidence, %")
    ax.set_box_aspect(1)
    ax.set_title(role, fontsize=10, pad=20)
    over = 100 * one["overconfidence"]
    label = f"ECE {100 * one['ece']:.1f} %, {abs(over):.1f} points too {'sure' if over > 0 else 'unsure'}"
    ax.annotate(label, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=QUIET)
