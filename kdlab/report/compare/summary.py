"""Runs side by side as text and as CSV, from their folders alone.

Rows stand in the order of their validation score. The test split is shown and chooses nothing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlab.errors import UserError
from kdlab.plain_text import one_line
from kdlab.report import table
from kdlab.report.compare.comparison import Comparison, columns_of, footer, head, row
from kdlab.runs import spreadsheet
from kdlab.runs.measures import WIDE
from kdlab.runs.read import Found, Group, Run, scan
from kdlab.system import integrity
from kdlab.system.terminal import warn

UNFINISHED = "unfinished (running, or killed)"

LISTED = 10
"""Largest number of jobs that never began which are named at the end of a sweep."""


def sweep_table(folder: str | Path, jobs: Sequence[Path] = ()) -> str:
    """Return the table that ends a sweep: every setting ranked on validation, then failed and unfinished runs.

    Args:
        folder: folder of the sweep.
        jobs: folders of its jobs; those that do not exist are named as never begun.
    """
    never = [job for job in jobs if not job.exists()]
    results = Found()
    try:
        results = scan([folder])
    except UserError as error:
        lines = _others(UNFINISHED, [(job, "") for job in jobs if job.exists()])
        return "\n".join([*(lines or [str(error)]), *_others("never began", [(job, "") for job in never], LISTED)])
    for warning in results.warnings:
        warn(warning)
    comparison = Comparison.of(results)
    columns, width = columns_of(comparison), table.terminal_width()
    text = report(comparison, columns, comparison.groups, width=width, bold=table.emphasis(), fit=width is not None)
    text = "\n".join([text, *_others("never began", [(job, "") for job in never], LISTED)])
    path = table.shorten(Path(folder))
    return f"{text}\npictures and CSV: python -m kdlab compare {shlex.quote(str(path))}"


def report(
    comparison: Comparison,
    columns: Sequence[str],
    order: Sequence[Group],
    width: int | None = None,
    bold: bool = False,
    fit: bool = False,
) -> str:
    """Return the comparison as text: a title, the table, notes on reading it, and the failures.

    Args:
        comparison: comparison of the runs.
        columns: keys of the columns.
        order: groups in the order of the rows.
        width: largest number of characters of a line.
        bold: whether to emphasise the best row.
        fit: whether to leave columns out of a table of language models that is wider than that, and say so.
    """
    lines, left_out = [], list[str]()
    if order:
        rows = [row(one, comparison, columns) for one in order]
        if fit and width is not None and comparison.score.key != "acc":
            columns, left_out = _fitting(rows, columns, comparison, width)
        heads = [head(key, comparison) for key in ("rank", *columns)]
        best = [i for i, one in enumerate(order) if one.rank == 1] if bold and len(order) > 1 else []
        lines += [comparison.title, "", table.render(rows, heads, width=width, bold=best), ""]
        lines += footer(comparison, columns)
        if left_out:
            names = ", ".join(comparison.measures[key].title for key in left_out)
            lines.append(f"The terminal is too narrow for: {names} (in the CSV and the page, and --columns).")
    lines += _others("failed", [(run.folder, run.error) for run in comparison.failed])
    lines += _others(UNFINISHED, [(folder, "") for folder in comparison.unfinished])
    return "\n".join(lines)


def _fitting(
    rows: Sequence[dict[str, str | None]], columns: Sequence[str], comparison: Comparison, width: int
) -> tuple[list[str], list[str]]:
    """Return the columns that fit, and those left out."""
    kept, left_out = list(columns), list[str]()
    for key in WIDE:
        heads = [head(one, comparison) for one in ("rank", *kept)]
        if len(table.render(rows, heads, width=width).splitlines()[1]) <= width:
            break
        if key in kept:
            kept.remove(key)
            left_out.append(key)
    return kept, left_out


def write_csv(path: Path, found: Found, comparison: Comparison | None = None) -> None:
    """Write everything known about every run, a line each: failed and unfinished ones too, and never an average.

    Where the score of the runs does not compare, ``ranked_by`` says what does, or is empty.
    """
    rows = [flat(run) for run in found.runs]
    if comparison is not None and comparison.unlike:
        title = "" if comparison.ranks is None else comparison.ranks.title
        rows = [one | {"ranked_by": title, "not_comparable_by": ", ".join(comparison.unlike)} for one in rows]
    rows += [{"run": str(folder), "status": "unfinished"} for folder in found.unfinished]
    names = list(dict.fromkeys(name for one in rows for name in one))
    path.parent.mkdir(parents=True, exist_ok=True)
    spreadsheet.write_csv(path, names, rows)


def flat(run: Run) -> dict[str, Any]:
    """Return a run as one flat row: nested keys joined by dots, lists and schedules as JSON."""
    cells: dict[str, Any] = {"run": str(run.folder)}

    def add(prefix: str, value: object, depth: int) -> None:
        if isinstance(value, dict) and depth:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner, depth - 1)
        else:
            value = "" if value is None else value
            cells[prefix] = json.dumps(value) if isinstance(value, (dict, list)) else value

    # A setting's value stays in one cell: a schedule is one choice, not three. What only the folder needs is no cell.
    left_out = ("settings", "diagnosis", integrity.FILES, integrity.CHECKSUM)
    add("", {key: value for key, value in run.result.items() if key not in left_out}, 4)
    add("settings", run.settings, 1)
    return cells


def _others(what: str, entries: Sequence[tuple[Path, str]], most: int | None = None) -> list[str]:
    if not entries:
        return []
    lines = ["  " + one_line(f"{folder}: {error}" if error else folder) for folder, error in entries[:most]]
    lines += [f"  and {len(entries) - most} more"] if most is not None and len(entries) > most else []
    return ["", f"{len(entries)} {what}:", *lines]
