"""What runs look like, as PNG files: T × alpha map, curves, score against size, gain over the baseline, and more."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab.runs.comparison import Comparison
from kdlab.runs.curve_pictures import kl_and_ce
from kdlab.runs.drawing import (
    BLUE,
    DPI,
    GREEN,
    INK,
    ORANGE,
    QUIET,
    STYLE,
    VERMILION,
    Drawing,
    canvas,
    cut,
    heading,
    plural,
    sample,
)
from kdlab.runs.measures import Measure
from kdlab.runs.read import ALPHA, TEMPERATURE, Group, Stat, finite, over, setting
from kdlab.runs.step_pictures import match_by_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS, _MOST_MAPS = 24, 6
_GAINS = ("difference", "em_difference", "outside_difference")


@dataclass(frozen=True)
class Picture:
    """A drawn file, and the words that belong beside it."""

    path: Path
    title: str
    caption: str


def draw(comparison: Comparison, out: Path) -> list[Picture]:
    """Every picture that these runs have the numbers for, as PNG files in ``out``."""
    import matplotlib

    kinds: dict[str, Callable[[Comparison], Drawing | None]] = {
        "heat_map": heat_map,
        "curves": kl_and_ce,
        "size": accuracy_and_size,
        "gain": gains,
        "steps": match_by_steps,
    }
    pictures = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A run may be named in a script that the font lacks; its boxes are no reason for a page of warnings.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for name, make in kinds.items():
            path = out / f"{name}.png"
            # A picture of an earlier comparison would be taken for one of this.
            path.unlink(missing_ok=True)
            if (drawing := make(comparison)) is not None:
                drawing.figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
                pictures.append(Picture(path, drawing.title, drawing.caption))
    return pictures


def heat_map(comparison: Comparison) -> Drawing | None:
    """One map for each combination of the other settings; None with fewer than two temperatures or alphas."""
    val = comparison.measures["val"]
    cells = [one for one in comparison.groups if _place(one) is not None]
    places = [place for one in cells if (place := _place(one)) is not None]
    heats, alphas = sorted({heat for heat, _ in places}), sorted({alpha for _, alpha in places})
    means = [stat.mean for one in cells if (stat := one.stat(val.get)) is not None]
    if len(heats) < 2 or len(alphas) < 2 or not means:
        return None
    rest = [key for key in comparison.differs if key not in (TEMPERATURE, ALPHA)]
    maps: dict[str, list[Group]] = {}
    for one in cells:
        maps.setdefault(one.label(rest) if rest else "", []).append(one)
    shown = dict(list(maps.items())[:_MOST_MAPS])

    columns = min(len(shown), 2 if len(heats) > 5 else 3)
    rows = math.ceil(len(shown) / columns)
    width, height = 1.4 + 0.95 * len(heats), 1.0 + 0.72 * len(alphas)
    unit = "in %; " if comparison.score.fraction else ""
    less = "" if comparison.score.higher else "less is better; "
    spread = "± standard deviation over seeds; " if comparison.seeds > 1 else ""
    below = f"{unit}{less}{sample(cells)}; {spread}small print: test split"
    figure = canvas(max(width * columns, 5.6, 0.3 + 0.069 * len(below)), height * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (name, part) in zip(axes, shown.items(), strict=False):
        _map(ax, part, comparison, heats, alphas, (min(means), max(means)))
        ax.set_title(name, fontsize=9, fontweight="normal", color=QUIET)
    for ax in axes[len(shown) :]:
        ax.remove()

    title = f"Validation {comparison.score.long} by temperature and alpha"
    heading(figure, title, below)
    caption = "Darker is better; by the validation score the best cell is framed. The test split is shown, and chooses"
    caption += " nothing. Hatched cells have no finished run."
    if others := len(comparison.groups) - len(cells):
        caption += f" Not in the map: {plural(others, 'setting')} whose temperature or alpha is no number."
    if further := len(maps) - len(shown):
        caption += f" Left out: {plural(further, 'further map')}."
    return Drawing(figure, title, caption)


def _place(one: Group) -> tuple[float, float] | None:
    heat, alpha = finite(one.settings.get(TEMPERATURE)), finite(one.settings.get(ALPHA))
    return None if heat is None or alpha is None else (heat, alpha)


def _map(
    ax: Axes,
    part: Sequence[Group],
    comparison: Comparison,
    heats: Sequence[float],
    alphas: Sequence[float],
    span: tuple[float, float],
) -> None:
    val = comparison.measures["val"]
    low, high = span if val.higher else span[::-1]
    # Groups stand best first; of two in one place, the better one is shown.
    at = {_place(one): one for one in reversed(part)}
    for i, heat in enumerate(heats):
        for j, alpha in enumerate(alphas):
            one = at.get((heat, alpha))
            stat = one.stat(val.get) if one else None
            if one is None or stat is None:
                _tile(ax, i, j, facecolor="#f6f8fa", edgecolor="#b6bec7", hatch="////", lw=0)
                continue
            _cell(ax, i, j, one, stat, comparison, 0.5 if high == low else (stat.mean - low) / (high - low))
            if one is part[0] and len(at) > 1:
                _tile(ax, i, j, 0.91, fill=False, edgecolor=ORANGE, lw=2.4, zorder=3)
    limits = {"xlim": (-0.5, len(heats) - 0.5), "ylim": (-0.5, len(alphas) - 0.5)}
    ax.set(xlabel="temperature T", ylabel="alpha", **limits)
    ax.set_xticks(range(len(heats)), [setting(heat) for heat in heats])
    ax.set_yticks(range(len(alphas)), [setting(alpha) for alpha in alphas])
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _cell(ax: Axes, i: int, j: int, one: Group, stat: Stat, comparison: Comparison, shade: float) -> None:
    from matplotlib import colormaps

    val, test = comparison.measures["val"], comparison.measures["test"]
    colour = colormaps["Blues"](0.06 + 0.86 * shade)
    _tile(ax, i, j, facecolor=colour, edgecolor="white", lw=1.5)
    # Rec. 709 luma: black type on light tiles, white on dark ones.
    ink = INK if 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] > 0.5 else "white"
    tested = one.stat(test.get)
    small = f"test {test.form(tested.mean)}" if tested else ""
    if stat.std is not None:
        small = f"± {val.deviation(stat)}\n{small}"
    type_: dict[str, Any] = {"ha": "center", "color": ink}
    middle = j + (0.1 if stat.std is not None else 0.04)
    ax.text(i, middle, val.form(stat.mean) or "", va="bottom", fontsize=11, fontweight="bold", **type_)
    ax.text(i, middle - 0.06, small, va="top", fontsize=7.5, linespacing=1.15, **type_)


def _tile(ax: Axes, i: int, j: int, side: float = 1.0, **style: object) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((i - side / 2, j - side / 2), side, side, **style))  # type: ignore[arg-type]


_ROLES = {"teacher": ("s", BLUE), "student": ("o", VERMILION), "baseline": ("^", QUIET)}


def accuracy_and_size(comparison: Comparison) -> Drawing | None:
    """Test score against parameters: every model that was measured, the chosen ones by name."""
    points = _points(comparison)
    if len({size for *_, size in points}) < 2:
        return None
    score = comparison.score
    figure = canvas(7.6, 4.9)
    ax = figure.subplots()
    labels = []
    for (role, network, size), values in sorted(points.items()):
        marker, colour = _ROLES.get(role, ("D", GREEN))
        ax.scatter([size] * len(values), values, marker=marker, s=34, color=colour, alpha=0.35, lw=0)
        # Groups stand in the order of validation, so the first is the one that would be chosen.
        ax.scatter(size, values[0], marker=marker, s=58, color=colour, edgecolor="white", lw=0.8, zorder=3)
        name = cut(network if role in ("teacher", "student") else f"{network}, {role.replace('_', ' ')}", 32)
        chosen = ", best on validation" if role == "student" and len(values) > 1 else ""
        value = f"{values[0]:.2f}" if score.fraction else score.form(values[0])
        labels.append((size, values[0], f"{name}{chosen}  {value}", colour))
    _size_axis(ax, [size for size, *_ in labels])
    ax.margins(y=0.14)
    unit = (", %" if score.fraction else "") + ("" if score.higher else " (less is better)")
    ax.set_ylabel(f"test {score.long}{unit}")
    title = f"Test {score.long} against size"
    heading(figure, title, sample(comparison.groups))
    _label(figure, ax, labels)
    caption = (
        "Square: teacher; circle: student; triangle: the same student trained without the teacher; diamond:"
        " others. Pale points are further settings; the named student is the one that validation chooses."
    )
    return Drawing(figure, title, caption)


def _points(comparison: Comparison) -> dict[tuple[str, str, float], list[float]]:
    """(role, network, parameters) → test scores as they are shown, the best on validation first."""
    key, scale = comparison.score.key, 100 if comparison.score.fraction else 1
    points: dict[tuple[str, str, float], list[float]] = {}
    for one in comparison.groups:
        for role in dict.fromkeys(role for run in one.runs for role in run.models):
            sizes = [size for run in one.runs if (size := run.number(role, "parameters"))]
            stat = over([y for run in one.runs if (y := run.number(role, "test", key)) is not None])
            if sizes and stat:
                named = one.settings.get("teacher" if role == "teacher" else "student")
                network = role if named is None else setting(named)
                points.setdefault((role, network, sizes[0]), []).append(scale * stat.mean)
    return points


def _size_axis(ax: Axes, sizes: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.set_xlim(min(sizes) / 1.8, max(sizes) * 1.8)
    ax.set_xlabel("parameters (log scale)")
    # Less than a decade has too few powers of ten to read a size from.
    if max(sizes) / min(sizes) <= 5:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _label(figure: Figure, ax: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write each label on the side of its point nearer the middle, apart from those that it would touch."""
    figure.draw_without_rendering()
    low, high = ax.get_xlim()
    middle = math.sqrt(low * high)
    to_points = 72 / figure.dpi
    for left in (True, False):
        side = sorted((one for one in labels if (one[0] <= middle) == left), key=lambda one: one[1])
        floor = -math.inf
        for x, y, text, colour in side:
            at = ax.transData.transform((x, y))[1] * to_points
            written = max(at, floor + 13)
            floor = written
            ax.annotate(
                text,
                (x, y),
                xytext=(12 if left else -12, written - at),
                textcoords="offset points",
                ha="left" if left else "right",
                va="center",
                fontsize=9,
                color=colour,
            )


def gains(comparison: Comparison) -> Drawing | None:
    """Student less baseline on the test split, a bar for each setting in the order of validation.

    Beside it what was gained in exact match, and what was gained or lost outside the domain, where that was measured.
    """
    kinds = [comparison.measures[key] for key in _GAINS if key in comparison.measures]
    kinds = [kind for kind in kinds if any(one.stat(kind.get) is not None for one in comparison.groups)]
    bars = [one for one in comparison.groups if any(one.stat(kind.get) is not None for kind in kinds)]
    if not bars:
        return None
    shown = bars[:_MOST_BARS]
    figure = canvas(7.6 + 3.6 * (len(kinds) - 1), 1.7 + 0.32 * len(shown))
    axes = figure.subplots(1, len(kinds), squeeze=False).ravel()
    for ax, kind in zip(axes, kinds, strict=True):
        _gain_panel(ax, [one.stat(kind.get) for one in shown], kind)
    axes[0].set_yticks(range(len(shown)), [cut(one.label(comparison.differs), 44) for one in shown], fontsize=9)
    for ax in axes[1:]:
        ax.set_yticks([])
    title = "What the teacher adds: student less baseline"
    heading(figure, title, f"{sample(shown)}; best on validation at the top")
    caption = "The same student on the same budget, with its teacher and without."
    if any(not kind.higher for kind in kinds):
        caption += " Blue is better, red is worse, whatever the sign."
    if any(stat.std is not None for kind in kinds for one in shown if (stat := one.stat(kind.get))):
        caption += " Whiskers: standard deviation of the paired difference over seeds."
    else:
        caption += " One seed each, so the spread is not known."
    if further := len(bars) - len(shown):
        caption += f" Left out: {plural(further, 'further setting')}."
    return Drawing(figure, title, caption)


def _gain_panel(ax: Axes, stats: Sequence[Stat | None], kind: Measure) -> None:
    score = kind.score
    assert score is not None
    _bars(ax, stats, kind)
    less = "" if score.higher else "\n(less is better)"
    where = "outside" if kind.key == "outside_difference" else "test"
    ax.set_xlabel(f"student − baseline, {where} {score.long}{', points' if score.fraction else ''}{less}")


def _bars(ax: Axes, stats: Sequence[Stat | None], kind: Measure) -> None:
    """A horizontal bar for each mean, its whisker, and its number beyond the whisker."""
    assert kind.score is not None
    scale, higher = 100 if kind.score.fraction else 1, kind.higher
    for place, stat in enumerate(stats):
        if stat is None:
            continue
        value, spread = scale * stat.mean, scale * (stat.std or 0.0)
        right = value >= 0
        ax.barh(place, value, height=0.66, color=BLUE if right == higher or not value else VERMILION, zorder=2)
        if stat.std is not None:
            ax.errorbar(value, place, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.1, capsize=3, zorder=3)
        ax.annotate(
            kind.form(stat.mean) or "",
            (value + (spread if right else -spread), place),
            (6 if right else -6, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8.5,
        )
    ax.axvline(0, color=INK, lw=1, zorder=4)
    ax.set_ylim(len(stats) - 0.4, -0.6)
    ax.margins(x=0.16)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)


def _compact(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"
