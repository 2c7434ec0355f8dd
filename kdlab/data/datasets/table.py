"""Tables of one's own: a column of classes, and numbers that tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from kdlab.data.labels import Label, combine_labels, requested
from kdlab.data.module import Common, ImageData
from kdlab.data.raw import Columns, RawDataset, Rows
from kdlab.data.table_file import Table, read_table
from kdlab.errors import UserError, unknown

_LOST = 1e-3
"""Rounding error of float32, in standard deviations, from which on a column is read as deviations from its mean."""

_SMALL = 1e-6
"""Standard deviation below which a column would count as constant."""


def csv(
    path: str | None = None,
    target: str | Sequence[str] = "target",
    label: Label | None = None,
    columns: Sequence[str] | None = None,
    test_path: str | None = None,
    test: int | float | None = None,
    delimiter: str = ",",
    **common: Unpack[Common],
) -> ImageData:
    """Load a table with a header line: numbers, and one column that names the class.

    Inputs are the numbers as they are; ``mean`` and ``std`` of the training rows, one for each column, are what a
    network standardises them with. A column whose differences float32 would lose (times in seconds, say) is read as
    its deviations from the mean of the file instead, and a line says so. Classes are the values of the target column,
    sorted. A row without a label is refused: to learn from unlabelled rows, ``labels`` withholds labels that are
    there. A class that is written like a missing value (``none``, ``NA``) has to be named in ``classes``.

    Args:
        path: the file: UTF-8, a point in numbers and no commas, quotes around cells of several lines.
        target: the column of the class; a list of columns for several tasks at once.
        label: targets that are asked for, out of several: a name, a list, or a mapping name → weight. None is all.
        columns: the columns to read; None is all others.
        test_path: another file with the same columns in any order, for the test split.
        test: rows (a number, or a fraction) taken for the test split where there is no such file; None is a tenth.
        delimiter: separator of columns: a character, or ``comma``, ``tab``, ``semicolon``, ``pipe``, ``space``.

    The other arguments are :class:`ImageData`'s.

    Raises:
        UserError: for a missing file, column or label, columns of one name, a value that is no finite number, rows of
            unequal length.
    """
    classes = common.get("classes")
    source, _ = table_source(path, target, label, columns, test_path, test, delimiter, classes)
    return ImageData(source, **common)


def table_source(
    path: str | None = None,
    target: str | Sequence[str] = "target",
    label: Label | None = None,
    columns: Sequence[str] | None = None,
    test_path: str | None = None,
    test: int | float | None = None,
    delimiter: str = ",",
    classes: Sequence[int | str] | None = None,
) -> tuple[RawDataset, list[Table]]:
    """Read the rows of :func:`csv` before they are divided, and the one or two files that they are in, in order.

    The arguments are those of :func:`csv`.
    """
    if path is None:
        raise UserError("data.path", "null", "a CSV file with a header line")
    targets = [target] if isinstance(target, str) else [str(one) for one in target]
    if not targets or len(set(targets)) < len(targets):
        raise UserError("data.target", targets, "different columns, at least one")
    files = [read_table(path, "data.path", delimiter)]
    wanted = _wanted(files[0], targets, columns)
    if test_path is not None:
        files.append(read_table(test_path, "data.test_path", delimiter))
    known = [str(one) for one in ([classes] if isinstance(classes, int | str) else classes or ())]
    written = [
        {name: one.labels(name, None if n else "data.target", known) for name in targets} for n, one in enumerate(files)
    ]
    _check_header(files[0], written[0])
    numbers = [one.numbers(wanted) for one in files]
    offset, scale = _representation(numbers[0])
    ids = {name: _ids(name, files, [part[name] for part in written]) for name in targets}
    kinds, names, known_labels = combine_labels(ids)
    parts = [
        Rows(torch.from_numpy(((one - offset) / scale).astype(np.float32)), own)
        for one, own in zip(numbers, kinds, strict=True)
    ]
    held_out: Rows | int | float = parts[1] if len(parts) > 1 else 0.1 if test is None else test
    source = RawDataset(Path(path).stem, parts[0], names, test=held_out, key="data.path")
    source = requested(source, known_labels, targets if label is None else label)
    source.columns = Columns(
        names=tuple(wanted),
        offset=tuple(offset.tolist()),
        scale=tuple(scale.tolist()),
        targets=tuple(targets),
        asked=tuple(source.asked),
        delimiter=files[0].separator,
    )
    source.notes = [note for one in files for note in one.notes] + _notes(source.columns, files, numbers, kinds)
    return source, files


def _wanted(table: Table, targets: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """Return the names of the columns to read."""
    for target in targets:
        table.column(target, "data.target")
    rest = [name for name in table.header if name not in targets]
    if columns is None:
        if "" in rest:
            raise UserError(
                "data.path",
                f"{table.path}: column {table.header.index('') + 1} has no name",
                "a name for each column that is read, or those to read in data.columns",
            )
        wanted = rest
    else:
        wanted = [columns] if isinstance(columns, str) else [str(name) for name in columns]
        for name in wanted:
            if name not in rest:
                raise unknown("data.columns", name, rest, "column")
    if not wanted or len(set(wanted)) < len(wanted):
        raise UserError("data.columns", wanted, f"different columns beside {', '.join(targets)}, at least one")
    return wanted


def _check_header(table: Table, labels: Mapping[str, Sequence[str]]) -> None:
    """Refuse a first line that seems to be a row: numbers, and a class where the name of the target belongs.

    Raises:
        UserError: unless the names are 0, 1, 2, ..., as some programs write them.
    """
    numbered = table.header == [str(n) for n in range(len(table.header))]
    rest = [name for name in table.header if name not in labels]
    if (
        not numbered
        and all(name in of for name, of in labels.items())
        and all(_amount(one) is not None for one in rest)
    ):
        raise UserError(
            table.key,
            f"{table.path}: its first line, {','.join(table.header)}, looks like a row",
            "a line that names the columns before the rows",
        )


def _ids(name: str, files: Sequence[Table], labels: Sequence[Sequence[str]]) -> tuple[list[Tensor], list[str]]:
    """Return the class ids of a target in each file, and the names of its classes."""
    path = files[0].path
    class_names = _sorted_names(labels[0])
    if len(class_names) < 2 or len(class_names) > max(20, len(labels[0]) // 2):
        raise UserError(
            "data.target",
            (f"column {name!r} of {path} holds {len(class_names)} different values in {len(labels[0])} rows"),
            "a column of classes",
        )
    numbers: dict[float, str] = {}
    for one in class_names:
        if (number := _amount(one)) is not None and (other := numbers.setdefault(number, one)) != one:
            raise UserError(
                "data.target",
                (f"column {name!r} of {path} has classes {other!r} and {one!r}, which are the same number"),
                "one way to write each class",
            )
    place = {one: number for number, one in enumerate(class_names)}
    for table, part in zip(files[1:], labels[1:], strict=True):
        for row, one in enumerate(part):
            if one not in place:
                raise unknown(f"{table.key}: {table.place(row)}, column {name!r}", one, class_names, "class")
    return [torch.tensor([place[one] for one in part]) for part in labels], class_names


def _sorted_names(labels: Sequence[str]) -> list[str]:
    names = sorted(set(labels))
    try:
        return sorted(names, key=float)
    except ValueError:
        return names


def _amount(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ---- numbers as float32


def _representation(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each column's offset and scale (F,) that let float32 tell its values apart; 0 and 1 if it does anyway."""
    largest = np.abs(numbers).max(0)
    unit = np.where(largest > 0, largest, 1.0)
    mean, deviation = (numbers / unit).mean(0), (numbers / unit).std(0)  # of numbers up to 1: no sum overflows
    varies = (numbers.max(0) > numbers.min(0)) & (deviation > 1e-12)
    rounded, beyond = deviation * _LOST < 2.0**-24, unit > 1e30
    lost = varies & (rounded | beyond | (deviation * unit < _SMALL))
    return np.where(lost, mean * unit, 0.0), np.where(lost & (deviation * unit > 0), deviation * unit, 1.0)


def _notes(
    columns: Columns, files: Sequence[Table], numbers: Sequence[np.ndarray], kinds: Sequence[Tensor]
) -> list[str]:
    """Return lines for the log on a table's columns, and on what two files have in common."""
    path, moves = files[0].path, numbers[0].max(0) > numbers[0].min(0)
    notes = [
        f"column {name!r} of {path} is read as (cell - {offset:g}) / {scale:g}: float32 would lose its differences"
        for name, offset, scale in zip(columns.names, columns.offset, columns.scale, strict=True)
        if (offset, scale) != (0, 1)
    ]
    if constant := [name for name, moving in zip(columns.names, moves, strict=True) if not moving]:
        notes.append(f"{path} has one value in all rows of {', '.join(map(repr, constant))}")
    for test in files[1:]:
        if more := [name for name in test.header if name and name not in files[0].header]:
            notes.append(f"{test.path}: not read, since {path} lacks it: {', '.join(map(repr, more))}")
        # whole rows, labels too: +0.0 is what -0.0 equals
        known, own = (
            [(row.tobytes(), kind) for row, kind in zip(part + 0.0, of.tolist(), strict=True)]
            for part, of in zip(numbers, kinds, strict=True)
        )
        there = set(known)
        if repeated := sum(row in there for row in own):
            notes.append(f"{repeated} of {len(own)} rows of {test.path} are in {path} too: no test of what is new")
    return notes
