"""Leaderboards: many methods on one task and budget, each compared with a tuned reference, seed by seed.

A board is a YAML file that names its rows by their overrides. Settings of tuned rows are chosen on validation; the test
split is shown and chooses nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from kdlab.errors import UserError, unknown
from kdlab.report import table
from kdlab.runs.formatting import number, percent, plural
from kdlab.runs.measures import Score, score_of
from kdlab.runs.read import Run, Stat, over, setting
from kdlab.system.files import Unreadable, read_mapping
from kdlab.system.names import check_name

LEVEL = 0.95
"""Level of the confidence intervals, before the correction for the number of methods."""

KEYS = {"reference", "shared", "seeds", "rows", "each", "grids", "relative_to"}


@dataclass(frozen=True)
class Entry:
    """Setting of a method, to be run with every seed."""

    row: str
    overrides: tuple[str, ...]
    setting: str = ""
    """Values that a grid chose, in words; empty where nothing is tuned."""


@dataclass(frozen=True)
class Board:
    """Definition of a leaderboard: its rows, seeds, and reference.

    Args:
        name: name of the board, and of the folder of its runs.
        rows: map of method → its overrides.
        reference: row that the others are compared with.
        relative_to: row that times are relative to.
        shared: overrides of all rows.
        seeds: seeds with which each row is run.
        each: overrides of one run, in which ``{seed}`` stands for the seed.
        grids: map of row → key → the values that are tried; the best on validation, over all seeds, is the row's.

    Raises:
        UserError: for rows that are not there, or no seeds.
    """

    name: str
    rows: Mapping[str, Sequence[str]]
    reference: str
    relative_to: str
    shared: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    each: Sequence[str] = ("seed={seed}",)
    grids: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("reference", "relative_to"):
            if getattr(self, key) not in self.rows:
                raise unknown(f"leaderboard.{key}", getattr(self, key), self.rows, "row")
        for row in self.rows:
            check_name("leaderboard.rows", row, "a name for each row")
        for row in self.grids:
            if row not in self.rows:
                raise unknown("leaderboard.grids", row, self.rows, "row")
        if not self.seeds:
            raise UserError("leaderboard.seeds", "none", "at least one whole number")

    @classmethod
    def read(cls, path: Path) -> Board:
        """Read a board from its file.

        Raises:
            UserError: if it is no mapping of the known keys.
        """
        try:
            content = read_mapping(path)
        except (OSError, Unreadable) as error:
            raise UserError(
                "leaderboard", f"{path} cannot be read ({error})", f"a mapping of {', '.join(sorted(KEYS))}"
            ) from None
        for key in content:
            if key not in KEYS:
                raise unknown(f"leaderboard: {path.name}", key, KEYS, "key")
        for key in ("rows", "reference", "relative_to"):
            if key not in content:
                raise UserError("leaderboard", f"{path.name} has no {key}", ", ".join(sorted(KEYS)))
        return cls(path.stem, **content)

    def only(self, rows: Sequence[str] | None, seeds: Sequence[int] | None) -> Board:
        """Return the same board with some of its rows (and those the others need), or other seeds.

        Raises:
            UserError: for a row that is not there.
        """
        for row in rows or ():
            if row not in self.rows:
                raise unknown("rows", row, self.rows, "row")
        wanted = {self.reference, self.relative_to, *(rows if rows is not None else self.rows)}
        kept = {row: overrides for row, overrides in self.rows.items() if row in wanted}
        grids = {row: grid for row, grid in self.grids.items() if row in wanted}
        return Board(
            self.name,
            kept,
            self.reference,
            self.relative_to,
            self.shared,
            self.seeds if seeds is None else seeds,
            self.each,
            grids,
        )

    def entries(self) -> Iterator[Entry]:
        """Yield every setting of every row."""
        for row, overrides in self.rows.items():
            grid = self.grids.get(row, {})
            for values in product(*grid.values()):
                chosen = [f"{key}={_typed(value)}" for key, value in zip(grid, values, strict=True)]
                yield Entry(row, (*overrides, *chosen), " ".join(chosen))

    def overrides(self, entry: Entry, seed: int) -> list[str]:
        """Return all overrides of one run."""
        return [*self.shared, *(text.replace("{seed}", str(seed)) for text in self.each), *entry.overrides]


def _typed(value: object) -> str:
    """Return a value as it is written in an override."""
    return setting(value) if not isinstance(value, Mapping) else json.dumps(dict(value)).replace('"', "")


class Interval(NamedTuple):
    """Mean with its confidence interval."""

    mean: float
    half: float | None
    """Half of the interval's width; None for a single pair."""

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class Standing:
    """Row of a board, with its runs over all seeds."""

    row: str
    setting: str
    runs: list[Run]
    failed: str = ""
    """Reason why there are no runs, or fewer than seeds; else empty."""

    @cached_property
    def seeds(self) -> dict[Any, Run]:
        """Map of seed → run."""
        return {run.seed: run for run in self.runs}

    def stat(self, *path: str) -> Stat | None:
        """Return mean and deviation of a number of the student over the seeds."""
        return over([value for run in self.runs if (value := run.number(run.subject, *path)) is not None])


@dataclass(frozen=True)
class Results:
    """Board with the results of its runs, best first on validation."""

    board: Board
    standings: list[Standing]
    times: Mapping[str, float] = field(default_factory=dict)
    """Map of row → time of a training step, relative to ``board.relative_to``."""

    @classmethod
    def of(cls, board: Board, runs: Mapping[tuple[Entry, int], Run], times: Mapping[str, float]) -> Results:
        """Choose each row's setting on validation, and put the rows in order."""
        standings = []
        for row in board.rows:
            tried = [_standing(entry, board, runs) for entry in board.entries() if entry.row == row]
            score = score_of([run for one in tried for run in one.runs])
            standings.append(max(tried, key=lambda one: _merit(one, score)))
        score = score_of([run for one in standings for run in one.runs])
        return cls(board, sorted(standings, key=lambda one: _merit(one, score), reverse=True), times)

    @cached_property
    def score(self) -> Score:
        """Score that rows are judged by."""
        return score_of([run for one in self.standings for run in one.runs])

    @cached_property
    def reference(self) -> Standing:
        """Row that the others are compared with."""
        return next(one for one in self.standings if one.row == self.board.reference)

    @property
    def compared(self) -> int:
        """Number of rows compared with the reference, for which the intervals are corrected."""
        return max(1, sum(1 for one in self.standings if one.runs and one.row != self.board.reference))

    def difference(self, standing: Standing) -> Interval | None:
        """Return the paired difference to the reference on the test split, over the seeds that both have.

        The interval is Student's, at a level that Bonferroni's correction makes hold for all rows at once. None for
        the reference itself.
        """
        if standing.row == self.board.reference:
            return None
        return paired(self.pairs(standing), 1 - (1 - LEVEL) / self.compared)

    def pairs(self, standing: Standing) -> list[float]:
        """Return the differences to the reference on the test split, seed by seed."""
        differences = []
        for seed, run in standing.seeds.items():
            other = self.reference.seeds.get(seed)
            mine = run.number(run.subject, "test", self.score.key)
            reference = other.number(other.subject, "test", self.score.key) if other else None
            if mine is not None and reference is not None:
                differences.append(mine - reference)
        return differences

    def rows(self) -> list[dict[str, str | None]]:
        """Return the cells of the table."""
        return [self._cells(place, one) for place, one in enumerate(self.standings, 1)]

    def _cells(self, place: int, one: Standing) -> dict[str, str | None]:
        test, gap = one.stat("test", self.score.key), self.difference(one)
        mark = "" if gap is None or not gap.excludes_zero else f" {self.score.verdict(gap.mean)}"
        return {
            "place": str(place) if one.runs else None,
            "row": one.row + (f" ({one.setting})" if one.setting else ""),
            "n": str(len(one.runs)),
            "val": self._scored(one.stat("val", self.score.key)),
            "test": self._scored(test),
            "difference": None if gap is None else _interval(gap, self.score) + mark,
            "agreement": percent(_mean(one.stat("test", "agreement")), places=1),
            "ece": percent(_mean(one.stat("test", "ece")), places=1),
            "time": number(self.times.get(one.row)),
        }

    def _scored(self, stat: Stat | None) -> str | None:
        if stat is None:
            return None
        mean = self.score.form(stat.mean)
        return mean if stat.std is None else f"{mean} ± {self.score.deviation(stat.std, stat.mean)}"

    @property
    def columns(self) -> list[table.Column]:
        """Columns of the table, with their headings."""
        unit = self.score.unit
        return [
            table.Column("place", "#"),
            table.Column("row", "method", right=False),
            table.Column("n", "n"),
            table.Column("val", f"val {unit}"),
            table.Column("test", f"test {unit}"),
            table.Column("difference", f"test against {self.board.reference}"),
            table.Column("agreement", "agreement %"),
            table.Column("ece", "ECE %"),
            table.Column("time", "step time"),
        ]

    @property
    def notes(self) -> list[str]:
        """Notes that a reader needs to read the table rightly."""
        level = f"{100 * LEVEL:g} %"
        notes = [
            "Ranked on validation; the test split is shown, and chooses nothing.",
            f"a ± b: mean and sample standard deviation over n seeds ({plural(len(self.board.seeds), 'seed')} asked).",
            f"test against {self.board.reference}: mean of the paired differences ± half of their {level} confidence "
            f"interval (Student's t), corrected for {plural(self.compared, 'row')} (Bonferroni); better or worse is "
            "said where it leaves out zero.",
            "agreement: with the teacher on the test split; ECE: expected calibration error.",
        ]
        if self.times:
            notes.append(f"step time: of one training step, relative to {self.board.relative_to}.")
        tuned = [row for row in self.board.grids if row in self.board.rows]
        if tuned:
            notes.append(
                f"Tuned on validation over all seeds: {', '.join(tuned)}; the others as their config has them."
            )
        notes += [f"{one.row}: {one.failed}" for one in self.standings if one.failed]
        return notes

    def record(self) -> dict[str, Any]:
        """Return all numbers of the table, for ``leaderboard.json``."""
        rows = []
        for one in self.standings:
            gap = self.difference(one)
            rows.append(
                {
                    "row": one.row,
                    "setting": one.setting,
                    "seeds": list(one.seeds),
                    **{
                        f"{split}_{key}": None if (stat := one.stat(split, key)) is None else stat._asdict()
                        for split in ("val", "test")
                        for key in dict.fromkeys((self.score.key, "agreement", "ece"))
                    },
                    "difference": None if gap is None else gap._asdict(),
                    "step_time": self.times.get(one.row),
                    "failed": one.failed,
                }
            )
        return {
            "board": self.board.name,
            "score": self.score.key,
            "reference": self.board.reference,
            "seeds": list(self.board.seeds),
            "level": LEVEL,
            "compared": self.compared,
            "rows": rows,
        }

    def markdown(self) -> str:
        """Return the table for a README."""
        lines = ["| " + " | ".join(column.title for column in self.columns) + " |"]
        lines.append("|" + "|".join("---:" if column.right else "---" for column in self.columns) + "|")
        for cells in self.rows():
            lines.append("| " + " | ".join(cells[column.key] or "" for column in self.columns) + " |")
        return "\n".join([*lines, "", *self.notes]) + "\n"


def _standing(entry: Entry, board: Board, runs: Mapping[tuple[Entry, int], Run]) -> Standing:
    tried = [runs[entry, seed] for seed in board.seeds if (entry, seed) in runs]
    failed = [run for run in tried if run.failed]
    good = [run for run in tried if not run.failed]
    reason = f"{plural(len(failed), 'run')} failed: {failed[0].error}" if failed else ""
    return Standing(entry.row, entry.setting, good, reason)


def _merit(one: Standing, score: Score) -> float:
    """Return the number that rows are ordered by: their mean on validation; those never validated come last."""
    stat = one.stat("val", score.key)
    if stat is None:
        return -math.inf
    return stat.mean if score.higher else -stat.mean


def _interval(gap: Interval, score: Score) -> str:
    mean = score.difference(gap.mean) or ""
    return mean if gap.half is None else f"{mean} ± {score.deviation(gap.half, gap.mean)}"


def _mean(stat: Stat | None) -> float | None:
    return None if stat is None else stat.mean


def paired(differences: Sequence[float], level: float) -> Interval | None:
    r"""Return the mean of paired differences with Student's confidence interval; None if there are none.

    Half of the interval is :math:`t_{n-1,(1+level)/2}\, s / \sqrt n`.

    >>> paired([1.0, 2.0, 3.0], 0.95)
    Interval(mean=2.0, half=2.484...)
    """
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Interval(mean, None)
    return Interval(mean, t_quantile((1 + level) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n))


@cache
def t_quantile(p: float, freedom: int) -> float:
    r"""Return the p-quantile of Student's t, for p in [1/2, 1), found by bisection.

    ``scipy.stats.t.ppf`` would be the library's; nothing else of kdlab needs scipy, a package of 35 MB.

    With :math:`t = \sqrt\nu \tan\theta`, the distribution function is

    .. math:: \tfrac12 + \frac{\Gamma((\nu+1)/2)}{\sqrt\pi\,\Gamma(\nu/2)} \int_0^\theta \cos^{\nu-1}\varphi\,d\varphi.

    >>> round(t_quantile(0.975, 4), 3), round(t_quantile(0.995, 9), 3)
    (2.776, 3.25)
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def reached(theta: float, steps: int = 400) -> float:
        width = theta / steps  # Simpson's rule
        values = [math.cos(i * width) ** (freedom - 1) for i in range(steps + 1)]
        return 0.5 + scale * width / 3 * (values[0] + values[-1] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < p else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
