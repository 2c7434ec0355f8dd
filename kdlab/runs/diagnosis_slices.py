"""Groups of examples: by a column of a file, or of the table that the data come from."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdlab.data.source import Rows, Source
from kdlab.data.splits import choose_classes, divide
from kdlab.errors import UserError, unknown
from kdlab.files import Unreadable, open_text

MOST_GROUPS = 50
"""Different values that a column of words may have."""

_FEW = 12
"""Different numbers up to which each is a group of its own; of more, groups are quarters of the examples."""


def groups(text: str, config: Mapping[str, Any], data: Any, split: str, targets: torch.Tensor) -> list[str]:
    """The group of each example of a split.

    Args:
        text: ``FILE.csv:COLUMN`` with a row for each example, in order; or ``COLUMN`` of the table that ``data`` read.
        config: of the data.
        data: the data module.
        split: of which the examples are.
        targets: (N,) their class ids, in order.

    Raises:
        UserError: for a file or column that is not there, or rows that are not as many.
    """
    file, colon, column = text.rpartition(":")
    if colon:
        table = _read(file, ",")
        values = _column(table, column, file)
        if len(values) != len(targets):
            raise UserError(
                f"diagnose: --slice {text}: {len(values)} rows, and the {split} split has {len(targets)} examples; "
                "accepted: a row for each example, in order"
            )
        return _grouped(values, text)
    if str(config.get("_target_")) != "kdlab.data.csv":
        raise UserError(
            f"diagnose: --slice {text}: data ({data.name}) is no CSV file with columns; accepted: FILE.csv:COLUMN, "
            "with a row for each example, in order"
        )
    return _grouped(_of_table(column, config, data, split, targets), text)


def _of_table(column: str, config: Mapping[str, Any], data: Any, split: str, targets: torch.Tensor) -> list[str]:
    """A column of the rows of a split, which is divided again as ``kdlab.data.csv`` divided the table."""
    files = [str(config["path"]), *([str(config["test_path"])] if config.get("test_path") else [])]
    target = str(config.get("target") or "target")
    tables = [_read(file, str(config.get("delimiter") or ",")) for file in files]
    labels = [_column(table, target, file) for table, file in zip(tables, files, strict=True)]
    names = sorted(set(labels[0]))
    if all(_number(name) is not None for name in names):
        names.sort(key=float)
    changed = UserError(
        f"diagnose: --slice {column}: {files[0]} is no longer what the run read; accepted: the same file"
    )
    rows = []
    for n, own in enumerate(labels):
        if not set(own) <= set(names):
            raise changed
        # in the place of what a row holds, where it stands: (file, line)
        places = torch.stack([torch.full((len(own),), n), torch.arange(len(own))], 1)
        rows.append(Rows(places, torch.tensor([names.index(label) for label in own])))
    test = rows[1] if len(rows) > 1 else config.get("test")
    source = Source(data.name, rows[0], names, test=0.1 if test is None else test)
    if config.get("classes") is not None:
        source = choose_classes(source, config["classes"])
    there = divide(source, config.get("val"), config.get("fraction"), config.get("split_seed") or 0)[split]
    if there is None or not torch.equal(there.targets, targets):
        raise changed
    assert isinstance(there.inputs, torch.Tensor)
    columns = [_column(table, column, file) for table, file in zip(tables, files, strict=True)]
    return [columns[n][line] for n, line in there.inputs.tolist()]


def _read(file: str, delimiter: str) -> list[list[str]]:
    try:
        with open_text(Path(file).expanduser()) as opened:
            lines = [line for line in csv.reader(opened, delimiter=delimiter) if line]
    except (OSError, UnicodeDecodeError, csv.Error, TypeError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"diagnose: --slice: {file} cannot be read ({reason}); accepted: a CSV file") from None
    if len(lines) < 2:
        raise UserError(f"diagnose: --slice: {file} has no rows below its header")
    return lines


def _column(table: Sequence[Sequence[str]], column: str, file: str) -> list[str]:
    header = [name.strip() for name in table[0]]
    if column not in header:
        raise unknown(f"diagnose: --slice: {file}", column, header, "column")
    place = header.index(column)
    for number, line in enumerate(table[1:]):
        if len(line) <= place:
            raise UserError(
                f"diagnose: --slice: {file}, row {number + 1} has {len(line)} values, the header {len(header)}"
            )
    return [line[place].strip() for line in table[1:]]


def _grouped(values: list[str], text: str) -> list[str]:
    """Words and few numbers as they are; of many numbers, the quarter that each is in."""
    numbers = [_number(value) for value in values]
    if len(set(values)) > _FEW and None not in numbers:
        return _quarters([float(value) for value in numbers if value is not None])
    if len(set(values)) > MOST_GROUPS:
        raise UserError(
            f"diagnose: --slice {text}: {len(set(values))} different values; accepted: numbers, or at most "
            f"{MOST_GROUPS} groups"
        )
    return [value or "(empty)" for value in values]


def _quarters(numbers: list[float]) -> list[str]:
    ordered = sorted(numbers)
    cuts = sorted({ordered[round(len(ordered) * share)] for share in (0.25, 0.5, 0.75)})
    bounds = [ordered[0], *(cut for cut in cuts if cut > ordered[0])]
    names = []
    for n, low in enumerate(bounds):
        last = n + 1 == len(bounds)
        high = ordered[-1] if last else bounds[n + 1]
        names.append(f"{low:g} to {high:g}" if last else f"{low:g} to below {high:g}")
    return [names[max(n for n, low in enumerate(bounds) if number >= low)] for number in numbers]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
