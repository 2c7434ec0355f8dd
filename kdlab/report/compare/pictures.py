"""Pictures of runs as PNG files: T × alpha map, curves, score against size, gain over the baseline, and more."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab.report.compare.comparison import Comparison
from kdlab.report.compare.curve_pictures import kl_and_ce
from kdlab.report.compare.step_pictures import match_by_steps
from kdlab.report.drawing import (
    BLUE,
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
    labels,
    sample,
    save,
)
from kdlab.runs.formatting import plural
from kdlab.runs.measures import Measure
from kdlab.runs.read import ALPHA, TEMPERATURE, Group, Stat, finite, over, setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS, _MOST_MAPS, _MOST_NAMES = 24, 6, 14
_GAINS = ("difference", "em_difference", "ood_difference")


@dataclass(frozen=True)
class Picture:
    """Drawn file, with its title and caption."""

    path: Path
    title: str
    caption: str


def draw(comparison: Comparison, out: Path) -> list[Picture]:
    """Draw every picture that these runs have the numbers for, as PNG files in ``out``."""
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
                save(drawing.figure, path)
                pictures.append(Picture(path, drawing.title, drawing.caption))
    return pictures


def heat_map(comparison: Comparison) -> Drawing | None:
    """Draw a map for each combination of the other settings; None with fewer than two temperatures or alphas."""
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
        own = [stat.mean for one in part if (stat := one.stat(val.get)) is not None] if comparison.unlike else means
        _map(ax, part, comparison, heats, alphas, (min(own, default=0.0), max(own, default=0.0)))
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
    by_value = sorted(
        ((-stat.mean if val.higher else stat.mean), i) for i, one in enumerate(part) if (stat := one.stat(val.get))
    )
    part = [part[i] for _, i in by_value]
    # Best first: of two in one place, the better one is shown.
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
    """Draw test score against parameters: every model that was measured, the chosen ones by name."""
    points = _points(comparison)
    if len({size for *_, size in points}) < 2:
        return None
    score = comparison.common
    crowd = len(points) > _MOST_NAMES
    figure = canvas(7.6, 4.9 + 0.16 * max(0, min(len(points), _MOST_NAMES) - 6))
    ax = figure.subplots()
    names = []
    for (role, network, size), values in sorted(points.items()):
        marker, colour = _ROLES.get(role, ("D", GREEN))
        ax.scatter([size] * len(values), values, marker=marker, s=34, color=colour, alpha=0.35, lw=0)
        if comparison.ranks is None and len(values) > 1:
            names.append((size, max(values), f"{cut(network, 32)}, {role.replace('_', ' ')}", colour))
            continue
        # Groups stand in the order of validation, so the first is the one that would be chosen.
        ax.scatter(size, values[0], marker=marker, s=58, color=colour, edgecolor="white", lw=0.8, zorder=3)
        if crowd and role == "baseline":
            continue
        name = cut(network if role in ("teacher", "student") else f"{network}, {role.replace('_', ' ')}", 32)
        chosen = ", best on validation" if role == "student" and len(values) > 1 else ""
        value = f"{values[0]:.2f}" if score.fraction else score.form(values[0])
        names.append((size, values[0], f"{name}{chosen}  {value}", colour))
    _size_axis(ax, [size for *_, size in points])
    ax.margins(y=0.14)
    unit = (", %" if score.fraction else "") + ("" if score.higher else " (less is better)")
    ax.set_ylabel(f"test {score.long}{unit}")
    title = f"Test {score.long} against size"
    apart = "" if comparison.ranks else "; of different data or tokens, which do not compare" * bool(comparison.unlike)
    heading(figure, title, sample(comparison.groups) + apart)
    _label(figure, ax, names[: 2 * _MOST_NAMES])
    caption = (
        "Square: teacher; circle: student; triangle: the same student trained without the teacher; diamond: others."
    )
    if comparison.ranks is None:
        caption += " The points are of different data or tokens, and do not compare: none of them is the best."
    else:
        caption += " Pale points are further settings; the named student is the one that validation chooses."
    return Drawing(figure, title, caption)


def _points(comparison: Comparison) -> dict[tuple[str, str, float], list[float]]:
    """Return (role, network, parameters) → test scores as they are shown, the best on validation first."""
    key, scale = comparison.common.key, 100 if comparison.common.fraction else 1
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


def _label(figure: Figure, ax: Axes, names: list[tuple[float, float, str, str]]) -> None:
    """Write each name beside its point, where it touches no point and no other name; further off with a line."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    scale, frame = figure.dpi / 72, ax.get_window_extent(renderer)
    spots = [ax.transData.transform((x, y)) for x, y, *_ in names]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in spots]
    for (x, y, text, colour), (px, py) in sorted(zip(names, spots, strict=True), key=lambda pair: -pair[1][1]):
        note = ax.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=9, color=colour, va="center"
        )
        wide, high = note.get_window_extent(renderer).width, 13 * scale
        places = [
            (left, step * sign * high / 2)
            for step in range(60)
            for sign in (1, -1)
            for left in (px + 11 * scale, px - 11 * scale - wide)
        ]

        def free(
            place: tuple[float, float], px: float = px, py: float = py, wide: float = wide, high: float = high
        ) -> bool:
            left, low = place[0], py + place[1] - high / 2
            inside = frame.x0 <= left and left + wide <= frame.x1 and frame.y0 <= low and low + high <= frame.y1
            return inside and all(
                left + wide <= x0 or x1 <= left or low + high <= y0 or y1 <= low for x0, y0, x1, y1 in taken
            )

        left, up = next(filter(free, places), places[0])
        taken.append((left, py + up - high / 2, left + wide, py + up + high / 2))
        note.set_position(((left - px) / scale, up / scale))
        if abs(up) > high:
            end = (left, py + up) if left > px else (left + wide, py + up)
            to = ax.transData.inverted().transform(end)
            ax.plot([x, to[0]], [y, to[1]], color=colour, lw=0.6, alpha=0.6, scalex=False, scaley=False)


def gains(comparison: Comparison) -> Drawing | None:
    """Draw student less baseline on the test split, a bar for each setting in the order of validation.

    Further panels show the difference in exact match, and outside the domain, where these were measured.
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
    axes[0].set_yticks(range(len(shown)), labels(shown, comparison.differs, 40, lines=2), fontsize=9)
    for ax in axes[1:]:
        ax.set_yticks([])
    title = "What the teacher adds: student less baseline"
    heading(figure, title, f"{sample(shown)}; {comparison.order}")
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
    where = "ood" if kind.key == "ood_difference" else "test"
    ax.set_xlabel(f"student − baseline, {where} {score.long}{', points' if score.fraction else ''}{less}")


def _bars(ax: Axes, stats: Sequence[Stat | None], kind: Measure) -> None:
    """Draw a horizontal bar for each mean, its whisker, and its number beyond the whisker."""
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
