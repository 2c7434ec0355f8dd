"""Runs side by side as one HTML page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from kdlab.report.compare.comparison import Comparison, footer, head, row
from kdlab.report.compare.pictures import Picture
from kdlab.report.html import Table, write_page
from kdlab.runs.formatting import plural
from kdlab.runs.read import DIAGNOSIS, Group, Run, mapping, setting


def write(
    path: Path,
    comparison: Comparison,
    columns: Sequence[str],
    order: Sequence[Group],
    pictures: Sequence[Picture],
    command: str,
) -> None:
    """Write the page to ``path``: header, table, pictures, and failed runs."""
    runs = [*comparison.runs, *comparison.failed]
    facts = {
        "runs finished": _when(runs),
        "trained with": _distinct(_versions(run) for run in runs),
        "hardware": _distinct(_hardware(run) for run in runs),
        "teacher trained on": _distinct(str(run.result.get("teacher_trained_on") or "") for run in runs),
        "commit": _distinct(str(run.result.get("commit") or "") for run in runs),
    }
    keys = ["rank", *columns]
    settings = Table.of(
        [row(one, comparison, keys) for one in order],
        [head(key, comparison) for key in keys],
        lambda number, key: _sort_value(order[number], key, comparison),
        best=[number for number, one in enumerate(order) if one.rank == 1],
    )
    write_page(
        path,
        "compare.html",
        title=comparison.title,
        command=command,
        facts=facts,
        order=comparison.order,
        settings=settings,
        notes=footer(comparison, columns) if order else [],
        pictures=pictures,
        diagnoses=_diagnoses(comparison, order, path.parent),
        failed=comparison.failed,
        unfinished=comparison.unfinished,
    )


def _sort_value(one: Group, key: str, comparison: Comparison) -> str:
    """Return the value that a cell is sorted by: the number itself, not its rounded form; empty where there is none."""
    if key in comparison.measures:
        stat = one.stat(comparison.measures[key].get)
        return "" if stat is None else repr(stat.mean)
    special = {"rank": one.rank, "n": len(one.runs), "run": one.runs[0].label}
    value = special.get(key, one.settings.get(key))
    return "" if value is None else setting(value)


def _diagnoses(comparison: Comparison, order: Sequence[Group], home: Path) -> list[dict[str, str]]:
    """Return name, link and number of errors of every run that has a diagnosis in its folder."""
    rows = []
    for run in (run for one in order for run in one.runs):
        if (run.folder / DIAGNOSIS).is_file():
            name = Group(run.settings, [run]).label(comparison.differs)
            label = run.label if name == run.label else f"{name} ({run.label})"
            rows.append({"name": label, "link": _link(run.folder / DIAGNOSIS, home), "errors": _errors(run)})
    return rows


def _errors(run: Run) -> str:
    wrong = [run.number(run.subject, "errors", kind) for kind in ("inherited", "own", "other")]
    counts = [int(number) for number in wrong if number is not None]
    if len(counts) < len(wrong):
        return ""
    return f"{plural(sum(counts), 'error')}, {counts[0]} inherited from the teacher"


def _link(path: Path, home: Path) -> str:
    """Return a file's address relative to the page's folder."""
    try:
        return quote(Path(os.path.relpath(path.resolve(), home.resolve())).as_posix())
    except ValueError:  # on another drive
        return path.resolve().as_uri()


def _distinct(values: Iterable[str]) -> str:
    """Return the different values in one text; a list of more than three is cut short, and says so."""
    distinct = list(dict.fromkeys(value for value in values if value))
    return "; ".join(distinct[:3]) + (f"; and {len(distinct) - 3} more" if len(distinct) > 3 else "")


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in mapping(run.result.get("versions")).items())


def _hardware(run: Run) -> str:
    facts = dict(mapping(run.result.get("hardware")))
    threads = facts.pop("threads", None)
    parts = [str(facts.pop("name", "") or ""), str(facts.pop("device", "") or "")]
    parts += [
        plural(threads, "thread") if isinstance(threads, int) else "",
        *(str(value) for value in facts.values() if value),
    ]
    return ", ".join(part for part in parts if part)


def _when(runs: Sequence[Run]) -> str:
    times = sorted(str(run.result["finished"])[:16].replace("T", " ") for run in runs if run.result.get("finished"))
    return "" if not times else times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
