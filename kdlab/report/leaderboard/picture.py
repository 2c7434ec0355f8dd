"""Picture of a board: every method's difference to the reference, with its confidence interval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdlab.report.drawing import BLUE, DPI, GREEN, INK, QUIET, STYLE, VERMILION, canvas, heading
from kdlab.report.leaderboard.leaderboard import LEVEL, Interval, Results, Standing
from kdlab.runs.formatting import plural
from kdlab.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(results: Results, path: Path) -> None:
    """Write the picture of a board: a line a method, best on validation at the top."""
    import io

    import matplotlib

    with matplotlib.rc_context(STYLE):
        known = [(one, results.difference(one)) for one in results.standings if one.runs]
        figure = canvas(9.0, 1.6 + 0.27 * len(known))
        ax = figure.subplots()
        scale = 100 if results.score.fraction else 1
        low, high = _range([gap for _, gap in known if gap is not None], scale)
        ax.set_xlim(low, high)
        for place, (one, gap) in enumerate(known):
            _line(ax, place, one, gap, scale, results)
        ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
        ax.set_yticks(range(len(known)), [one.row for one, _ in known])
        ax.set_ylim(len(known) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        better = "more" if results.score.higher else "less"
        unit = "points" if results.score.fraction else ""
        ax.set_xlabel(
            f"difference of test {results.score.short} to {results.board.reference}, {unit} ({better} is better)"
        )
        heading(
            figure,
            f"{results.board.name}: every method against {results.board.reference}",
            f"{plural(len(results.board.seeds), 'seed')}, paired; bars: {100 * LEVEL:g} % confidence, corrected for "
            f"{plural(results.compared, 'method')}; dots: each seed; order: validation",
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _range(gaps: list[Interval], scale: float) -> tuple[float, float]:
    """Return the limits of the axis: nine tenths of the intervals; one outlier would press all others together."""
    ends = [sorted(scale * (gap.mean + sign * (gap.half or 0)) for gap in gaps) for sign in (-1, 1)]
    if not gaps:
        return -1.0, 1.0
    low, high = min(ends[0][len(gaps) // 10], 0.0), max(ends[1][-1 - len(gaps) // 10], 0.0)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _line(ax: Axes, place: int, one: Standing, gap: Interval | None, scale: float, results: Results) -> None:
    if gap is None:
        ax.plot([0], [place], "D", color=INK, markersize=5)
        return
    good = results.score.verdict(gap.mean) == "better"
    colour = QUIET if not gap.excludes_zero else GREEN if good else VERMILION
    if gap.half is not None:
        ends = [(gap.mean - gap.half) * scale, (gap.mean + gap.half) * scale]
        ax.plot(ends, [place, place], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.8)
    each = results.pairs(one)
    ax.plot([value * scale for value in each], [place] * len(each), ".", color=BLUE, markersize=4, alpha=0.45)
    low, high = ax.get_xlim()
    if low <= gap.mean * scale <= high:
        ax.plot([gap.mean * scale], [place], "o", color=colour, markersize=5.5)
        return
    left = gap.mean * scale < low
    text = results.score.difference(gap.mean) or ""
    ax.text(
        low if left else high,
        place,
        f" ◂ {text}" if left else f"{text} ▸ ",
        color=colour,
        va="center",
        ha="left" if left else "right",
        fontsize="small",
        backgroundcolor="white",
    )
