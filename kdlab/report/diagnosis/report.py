"""Reports of a diagnosis: tables for the terminal, and one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlab.report import html
from kdlab.report.compare.pictures import Picture
from kdlab.report.diagnosis.diagnosis import KINDS
from kdlab.report.diagnosis.pictures import TITLES, Shown, chosen_classes, difference, unusual
from kdlab.report.table import Column, render
from kdlab.runs.formatting import percent, plural

_MOST_ROWS = 20
"""Largest number of classes in the table on a terminal."""
_MOST_PAIRS = 6

Table = tuple[list[dict[str, object]], list[Column]]


def text(found: Mapping[str, Any], width: int | None = None) -> str:
    """Return the tables for a terminal.

    Args:
        found: result of :func:`~kdlab.report.diagnosis.diagnosis.diagnose`.
        width: largest number of characters of a line.
    """

    def shown(table: Table) -> str:
        return render(*table, width=width)

    blocks = [shown(networks(found))]
    blocks.append("\n".join(remarks(found)))
    rows = chosen_classes(found["per_class"], _MOST_ROWS)
    title = "classes" if len(rows) == len(found["classes"]) else f"{len(rows)} of {len(found['classes'])} classes"
    blocks.append(f"{title}\n{shown(parts(rows, 'class', 'class'))}")
    for column, groups in found["slices"].items():
        blocks.append(f"{column}\n{shown(parts(groups, 'value', 'group'))}")
    for name, (table, left) in (("confusions", _confusions(found)), ("disagreements", _disagreements(found))):
        if table[0]:
            more = f" ({left} further pairs in diagnosis.json)" if left else ""
            blocks.append(f"{name}{more}\n{shown(table)}")
    return "\n\n".join(block for block in blocks if block)


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Return the findings of a diagnosis in words, a line each."""
    lines = []
    beside = found.get("against_teacher", {})
    if beside:
        own = beside["student"]
        line = f"student: {plural(own['inherited'], 'error')} inherited from the teacher (the same wrong class)"
        if "baseline" in beside:
            line += f"; the baseline, which learned without it, shares {beside['baseline']['inherited']}"
        lines.append(line)
        lines.append(
            f"student: {own['own']} wrong where the teacher is right, {own['corrected']} right where it is wrong, "
            f"{own['other']} wrong in another class"
        )
    if "against_baseline" in found:
        one = found["against_baseline"]
        chance = "could be chance" if one["p"] > 0.05 else "unlikely to be chance"
        lines.append(
            f"student against baseline: {one['gained']} gained, {one['lost']} lost (sign test p = {one['p']:.2g}: "
            f"{chance})"
        )
    return lines + [f"note: {line}" for line in found.get("notes", ())]


def networks(found: Mapping[str, Any]) -> Table:
    """Return a table with a row for each network."""
    rows: list[dict[str, object]] = []
    for role, one in found["networks"].items():
        beside = found.get("against_teacher", {}).get(role, {})
        rows.append(
            {
                "network": role,
                "accuracy": percent(one["accuracy"]),
                "errors": one["errors"],
                **{kind: beside.get(kind) for kind in KINDS},
                "ece": percent(one["ece"], places=1),
                "over": percent(one["overconfidence"], signed=True, places=1),
                "ce": f"{one['cross_entropy']:.3f}",
            }
        )
    columns = [
        Column("network", "network", right=False),
        Column("accuracy", "acc %"),
        Column("errors", "errors"),
        *_kinds(rows),
        Column("ece", "ECE %"),
        Column("over", "too sure, points"),
        Column("ce", "CE"),
    ]
    return rows, columns


def parts(rows: Sequence[Mapping[str, Any]], key: str, title: str) -> Table:
    """Return a table with a row for each class, or each group of a slice."""
    shown: list[dict[str, object]] = []
    roles = list(rows[0]["accuracy"]) if rows else []
    for row in rows:
        values = {role: percent(row["accuracy"][role], places=1) for role in roles}
        less = percent(difference(row), signed=True, places=1) if row["examples"] and len(roles) > 1 else None
        counts = {kind: row.get(kind) for kind in KINDS}
        shown.append({"name": row[key], "examples": row["examples"], **values, "less": less, **counts})
    columns = [Column("name", title, right=False), Column("examples", "examples")]
    columns += [Column(role, f"{role} %") for role in roles]
    if len(roles) > 1:
        columns.append(Column("less", f"student − {'teacher' if 'teacher' in roles else 'baseline'}"))
    return shown, [*columns, *_kinds(shown)]


def _kinds(rows: Sequence[Mapping[str, object]]) -> list[Column]:
    titles = {"inherited": "inherited", "own": "its own", "other": "other class", "corrected": "corrected"}
    return [Column(kind, titles[kind]) for kind in KINDS if any(row.get(kind) is not None for row in rows)]


def _confusions(counted: Mapping[str, Any], most: int = _MOST_PAIRS) -> tuple[Table, int]:
    """Return the table of classes that networks confuse, the student's most frequent first, and how many are left."""
    rows = counted["confusions"]
    columns = [Column("true", "true", right=False), Column("said", "taken for", right=False)]
    columns += [Column(role, role) for role in counted["networks"]]
    return (rows[:most], columns), max(len(rows) - most, 0)


def _disagreements(counted: Mapping[str, Any], most: int = _MOST_PAIRS) -> tuple[Table, int]:
    """Return the table of classes in which student and teacher differ, and how many rows are left out."""
    rows = counted["disagreements"]
    columns = [
        Column("teacher", "teacher says", right=False),
        Column("student", "student says", right=False),
        Column("examples", "examples"),
        Column("teacher_right", "teacher right"),
        Column("student_right", "student right"),
    ]
    return (rows[:most], columns), max(len(rows) - most, 0)


def write_page(
    path: Path,
    found: Mapping[str, Any],
    kinds: Sequence[Shown],
    pictures: Sequence[Picture],
    title: str,
    command: str,
) -> None:
    """Write ``diagnosis.html``: findings, pictures, and every table whole."""
    examples = f"{found['examples']} of the {found.get('split', 'test')} split"
    confusions, disagreements = _confusions(found, 100), _disagreements(found, 100)
    html.write_page(
        path,
        "diagnosis.html",
        title=title,
        command=command,
        facts={"run": str(found.get("run", "")), "examples": examples},
        networks=html.Table.of(*networks(found)),
        remarks=remarks(found),
        kinds=[(TITLES[kind], meaning) for kind, meaning in KINDS.items()] if "against_teacher" in found else [],
        pictures=pictures,
        examples=html.Table.of(*_rows(kinds, list(found["networks"]))),
        classes=html.Table.of(*parts(found["per_class"], "class", "class")),
        slices={column: html.Table.of(*parts(rows, "value", "group")) for column, rows in found["slices"].items()},
        confusions=(html.Table.of(*confusions[0]), confusions[1]),
        disagreements=(html.Table.of(*disagreements[0]), disagreements[1]),
    )


def _rows(kinds: Sequence[Shown], roles: Sequence[str]) -> Table:
    """Return the examples shown of a table's rows, with their values; no rows for pictures."""
    rows: list[dict[str, object]] = []
    for one in kinds:
        for example in one.examples:
            if example.picture is None:
                answers = {role: f"{name} {100 * sure:.0f} %" for role, (name, sure) in example.said.items()}
                known = {"kind": TITLES[one.kind], "number": example.number, "true": example.true}
                rows.append({**known, **answers, "values": unusual(example, 240)})
    columns = [Column("kind", "kind", right=False), Column("number", "number"), Column("true", "true", right=False)]
    columns += [Column(role, role, right=False) for role in roles]
    columns.append(Column("values", "values, least usual first (standard deviations from the mean)", right=False))
    return rows, columns
