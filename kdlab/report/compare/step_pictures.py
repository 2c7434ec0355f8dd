"""Exact match by the number of reasoning steps that a question needs: where small models lose most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kdlab.report.compare.comparison import Comparison
from kdlab.report.drawing import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    QUIET,
    SKY,
    VERMILION,
    Drawing,
    canvas,
    cut,
    heading,
    labels,
    legend_columns,
    sample,
)
from kdlab.runs.formatting import plural
from kdlab.runs.read import Run, Stat, finite, mapping, over

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PREFIX = "em/"
_MOST_GROUPS, _MOST_LINES = 24, 6
_PALETTE = (VERMILION, GREEN, PURPLE, ORANGE, SKY, "#8c6d31")


def match_by_steps(comparison: Comparison) -> Drawing | None:
    """Draw teacher, students and baseline over the groups of questions; None with fewer than two groups."""
    measured = [(split, _groups(comparison.runs, split)) for split in ("test", "val")]
    split, steps = next(((split, names) for split, names in measured if len(names) > 1), ("", []))
    if not split:
        return None
    steps, left_out = steps[:_MOST_GROUPS], len(steps) - _MOST_GROUPS
    lines = _lines(comparison, split)
    width = max(7.6, 0.42 * len(steps) + 3)
    columns = min(3, legend_columns([label for label, *_ in lines], width))
    height = 4.5 + 0.21 * sum(max(_height(lines[i:], columns), 1) for i in range(0, len(lines), columns))
    figure = canvas(width, height)
    ax = figure.subplots()
    for place, (label, runs, role, style) in enumerate(lines):
        _line(ax, steps, [_stat(runs, role, split, step) for step in steps], label, style, place, len(lines))
    ax.set_xticks(range(len(steps)), [cut(step, 14) for step in steps])
    ax.set_xlim(-0.4, len(steps) - 0.6)
    ax.set_ylim(-3, 103)
    numbers = all(_amount(step) is not None for step in steps)
    ax.set(xlabel="steps that the question needs" if numbers else "group of questions", ylabel="exact match, %")
    ax.grid(False, axis="x")
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9)

    title = f"Exact match by number of steps, {split}" if numbers else f"Exact match by group of questions, {split}"
    heading(figure, title, f"{sample(comparison.groups)}; {comparison.order}")
    caption = (
        "Greedy answers that are exactly right. Squares: teacher; triangles: the same student trained without the"
        " teacher; circles: students."
    )
    if comparison.seeds > 1:
        caption += " Whiskers: standard deviation over seeds."
    students = sum(role not in ("teacher", "baseline") for _, _, role, _ in lines)
    if (further := len(comparison.groups) - students) > 0:
        caption += f" Left out: {plural(further, 'further setting')}."
    if left_out > 0:
        caption += f" Left out: {plural(left_out, 'further group')}."
    return Drawing(figure, title, caption)


def _height(lines: Sequence[tuple[str, Any, Any, Any]], columns: int) -> int:
    """Return the number of lines of text in a row of the legend."""
    return max(label.count("\n") + 1 for label, *_ in lines[:columns])


def _groups(runs: Sequence[Run], split: str) -> list[str]:
    """Return the groups that any model was measured on, by number where they are numbers."""
    measured = (mapping(model.get(split)) for run in runs for model in run.models.values())
    names = {str(key).removeprefix(_PREFIX) for one in measured for key in one if str(key).startswith(_PREFIX)}
    return sorted(names, key=lambda name: (_amount(name) is None, _amount(name) or 0.0, name))


def _amount(name: str) -> float | None:
    try:
        return finite(float(name))
    except ValueError:
        return None


def _lines(comparison: Comparison, split: str) -> list[tuple[str, Sequence[Run], str, dict[str, Any]]]:
    """Return (label, runs, role, style) of each line: students by validation score, between teacher and baseline."""
    groups = [one for one in comparison.groups if any(_measured(run, run.subject, split) for run in one.runs)]
    runs = comparison.runs
    lines: list[tuple[str, Sequence[Run], str, dict[str, Any]]] = []
    if any(_measured(run, "teacher", split) for run in runs):
        lines.append((_reference("teacher", comparison), runs, "teacher", {"color": BLUE, "marker": "s"}))
    names = ["student"] if len(groups) == 1 else labels(groups[:_MOST_LINES], comparison.differs, 44, lines=2)
    for one, colour, label in zip(groups, _PALETTE, names, strict=False):
        lines.append((label, one.runs, one.runs[0].subject, {"color": colour, "marker": "o"}))
    if any(_measured(run, "baseline", split) for run in runs):
        style = {"color": QUIET, "marker": "^", "ls": "--"}
        lines.append((_reference("baseline", comparison), runs, "baseline", style))
    return lines


def _reference(role: str, comparison: Comparison) -> str:
    """Return the name of the line for all teachers, or all baselines: they may not be the same network."""
    network = "teacher" if role == "teacher" else "student"
    mixed = {network, "data", "name"} & set(comparison.differs)
    return f"{role}, mean of all runs" if mixed else role


def _measured(run: Run, role: str, split: str) -> bool:
    return any(str(key).startswith(_PREFIX) for key in mapping(mapping(run.models.get(role)).get(split)))


def _stat(runs: Sequence[Run], role: str, split: str, step: str) -> Stat | None:
    get: Callable[[Run], float | None] = lambda run: run.number(role, split, f"{_PREFIX}{step}")  # noqa: E731
    return over([100 * value for value in map(get, runs) if value is not None])


def _line(
    ax: Axes, steps: Sequence[str], stats: Sequence[Stat | None], label: str, style: dict[str, Any], place: int, of: int
) -> None:
    # Side by side within a step: whiskers on one spot could not be told apart.
    shift = 0.05 * (place - (of - 1) / 2)
    known = [(i + shift, stat) for i, stat in enumerate(stats) if stat is not None]
    x, y = [at for at, _ in known], [stat.mean for _, stat in known]
    ax.plot(x, y, lw=1.7, ms=6.5, mec="white", mew=0.7, zorder=3, label=label, **style)
    spread = [stat.std or 0.0 for _, stat in known]
    if any(spread):
        ax.errorbar(x, y, yerr=spread, fmt="none", ecolor=style["color"], elinewidth=1, capsize=2.5, zorder=2)
