"""Curves of many runs over each other: KL, CE and perplexity, coloured by temperature or by what else differs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdlab.report.compare.comparison import Comparison
from kdlab.report.drawing import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    QUIET,
    SKY,
    VERMILION,
    Drawing,
    canvas,
    cut,
    heading,
    legend_columns,
)
from kdlab.runs.formatting import plural
from kdlab.runs.read import TEMPERATURE, Run, finite, same, setting, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 400
_SPLITS = ("train", "val")


def kl_and_ce(comparison: Comparison) -> Drawing | None:
    """Draw KL and CE, training left, validation right, coloured by temperature; None where no run has such curves.

    Runs that were validated by perplexity have a third panel for it. What was measured once is no curve.
    """
    runs = [run for run in comparison.runs if any(_drawn([run], f"{s}/{m}") for s in _SPLITS for m in ("kl", "ce"))]
    if not runs:
        return None
    splits = [split for split in _SPLITS if _drawn(runs, f"{split}/kl") or _drawn(runs, f"{split}/ce")]
    key, colours = _colours(comparison, runs)
    perplexity = _drawn(runs, "val/ppl")
    figure = canvas(5.4 * (len(splits) + perplexity) + 0.8, 4.6)
    axes = figure.subplots(1, len(splits) + perplexity, squeeze=False).ravel()
    for ax, split in zip(axes, splits, strict=False):
        for term, dash in (("kl", "-"), ("ce", (0, (3, 1.6)))):
            _lines(ax, runs, f"{split}/{term}", key, colours, dash)
        _log_if_wide(ax)
        at = "each run at its own T" if split == "train" else "KL at T = 1"
        ax.set_title("training" if split == "train" else "validation", pad=10)
        ax.set(xlabel="optimizer steps", ylabel=f"{split}/kl and {split}/ce, nats ({at})")
    if perplexity:
        _perplexity(axes[-1], runs, key, colours)
    _legend(figure, key, colours)
    with_kl = any({"train/kl", "val/kl"} & set(run.curves) for run in runs)
    title = "KL and CE over each other" if with_kl else "Cross-entropy while training"
    mean = "; thin: each run, thick: mean of its colour" if _crowded(runs, key) else ""
    heading(figure, title, plural(len(runs), "run") + mean)
    caption = (
        "Solid: KL from the teacher; dashed: cross-entropy with the labels; both without their weights. The"
        " training KL is at each run's own temperature, the validation KL at T = 1, so that those compare."
    )
    return Drawing(figure, title, caption)


def _drawn(runs: Sequence[Run], name: str) -> bool:
    """Return whether any of the runs has two points of a curve or more."""
    return any(len(run.curves[name][0]) > 1 for run in runs if name in run.curves)


def _perplexity(ax: Axes, runs: Sequence[Run], key: str, colours: dict[str, str]) -> None:
    _lines(ax, runs, "val/ppl", key, colours, "-")
    _log_if_wide(ax)
    ax.set_title("validation, perplexity", pad=10)
    ax.set(xlabel="optimizer steps", ylabel="val/ppl (less is better)")


def _colours(comparison: Comparison, runs: Sequence[Run]) -> tuple[str, dict[str, str]]:
    """Return the setting that lines are coloured by, and the colour of each of its values, in their order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    keys = [TEMPERATURE, *comparison.differs]
    key = next((k for k in keys if len({same(run.settings.get(k)) for run in runs}) > 1), TEMPERATURE)
    values = {same(run.settings.get(key)): run.settings.get(key) for run in runs}
    numbers = {name: finite(value) for name, value in values.items()}
    ordered = sorted(values, key=lambda n: (numbers[n] is None, numbers[n] or 0.0, n))
    if len(ordered) <= 1:
        return key, dict.fromkeys(ordered, BLUE)
    if len(ordered) <= 6 and any(numbers[name] is None for name in ordered):
        palette = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY]
    else:
        # The yellow end of viridis is too pale for a line on white.
        palette = [to_hex(colormaps["viridis"](0.85 * i / (len(ordered) - 1))) for i in range(len(ordered))]
    return key, dict(zip(ordered, palette, strict=False))


def _crowded(runs: Sequence[Run], key: str) -> bool:
    by_colour = [same(run.settings.get(key)) for run in runs]
    return len(by_colour) > len(set(by_colour))


def _lines(ax: Axes, runs: Sequence[Run], name: str, key: str, colours: dict[str, str], dash: object) -> None:
    parts: dict[str, list[tuple[list[float], list[float]]]] = {}
    for run in runs:
        if name in run.curves:
            parts.setdefault(same(run.settings.get(key)), []).append(_thin(*run.curves[name]))
    for value, lines in parts.items():
        colour = colours.get(value, QUIET)
        together = len(lines) > 1
        for steps, values in lines:
            alpha, width = (0.28, 0.7) if together else (0.95, 1.7)
            ax.plot(
                steps,
                values,
                color=colour,
                ls=dash,
                lw=width,
                alpha=alpha,
                marker="." if len(steps) == 1 else "",
            )
        if together:
            steps = sorted(set.intersection(*(set(s) for s, _ in lines)))
            by_step = [dict(zip(s, v, strict=True)) for s, v in lines]
            mean = [statistics.fmean(one[step] for one in by_step) for step in steps]
            ax.plot(steps, mean, color=colour, ls=dash, lw=2.0, zorder=3)


def _legend(figure: Figure, key: str, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=INK, lw=1.8, label="KL"),
        Line2D([], [], color=INK, lw=1.8, ls="--", label="CE"),
    ]
    if len(colours) > 1:
        names = list(colours)
        # A legend of many numbers shows some of them; the eye fills in the rest of the scale.
        keep = names if len(names) <= 12 else [names[round(i * (len(names) - 1) / 9)] for i in range(10)]
        for name in keep:
            label = f"{short(key)} = {setting(json.loads(name))}"
            handles.append(Line2D([], [], color=colours[name], lw=3, label=cut(label, 40)))
    columns = min(7, legend_columns([str(handle.get_label()) for handle in handles], figure.get_figwidth()))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)


def _log_if_wide(ax: Axes) -> None:
    """Make the axis logarithmic where values span more than 20 to 1, as loss curves do."""
    import numpy as np

    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > 20:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ax.set_yscale("log")
        decades = math.log10(values.max() / values.min())
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Return at most 400 points of a curve, since more would not be seen. The last one always stays."""
    stride = math.ceil(len(steps) / _MOST_POINTS)
    if stride <= 1:
        return steps, values
    keep = [*range(0, len(steps) - 1, stride), len(steps) - 1]
    return [steps[i] for i in keep], [values[i] for i in keep]
