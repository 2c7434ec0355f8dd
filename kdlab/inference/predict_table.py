"""Tables in and out of a finished run's model: rows by the names of their columns, and summaries of many rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlab.data.raw import Columns
from kdlab.data.table_file import SUFFIXES, Table, is_missing, read_table
from kdlab.errors import UserError
from kdlab.inference.prediction import Prediction
from kdlab.plain_text import one_line
from kdlab.runs.spreadsheet import write_csv

log = logging.getLogger("kdlab")


@dataclass(frozen=True)
class TableRows:
    """Rows of a table file as a model reads them, with the classes that the file gives them.

    Args:
        inputs: (N, F) float32.
        names: names of the rows, for messages.
        given: the class of each row that the file holds, by task ("" where there is one); "" where a row has none.
    """

    inputs: Tensor
    names: list[str]
    given: dict[str, list[str]]


def read_rows(path: Path, described: Mapping[str, Any], run: Path) -> TableRows:
    """Read the rows of a file, with its columns in the order of the run's, whatever their order in the file.

    Args:
        path: a file with a header; it may have the columns of classes, and others, which are left out with a line.
        described: the run's ``model.json``.
        run: run folder, for messages.

    Raises:
        UserError: if the run names no columns, or the file lacks some, or holds what is no finite number.
    """
    columns = _columns(described, run)
    table = read_table(path, "predict", columns.delimiter, columns.names)
    if missing := [name for name in columns.names if name not in table.header]:
        raise UserError(
            "predict",
            f"{path} has no column {', '.join(map(repr, missing))}",
            (f"the columns of {run}: {', '.join(columns.names)}; there are {', '.join(table.header)}{table.hint}"),
        )
    known = {*columns.names, *columns.targets}
    if more := [name for name in table.header if name and name not in known]:
        log.warning("%s: not read, since %s has learned without: %s", *map(one_line, (path, run, ", ".join(more))))
    for note in table.notes:
        log.warning("%s", one_line(note))
    numbers = table.numbers(columns.names, "accepted: a number in each of these columns")
    with np.errstate(over="ignore"):
        inputs = ((numbers - np.array(columns.offset)) / np.array(columns.scale)).astype(np.float32)
    if not np.isfinite(inputs).all():
        row, place = (int(one) for one in np.argwhere(~np.isfinite(inputs))[0])
        raise UserError(
            "predict",
            f"{table.place(row)}, column {columns.names[place]!r}: {numbers[row, place]:g}",
            "a number that float32 can hold",
        )
    names = [f"{path}, row {n + 1}" for n in range(len(inputs))]
    return TableRows(torch.from_numpy(inputs), names, _given(table, columns, described))


def _columns(described: Mapping[str, Any], run: Path) -> Columns:
    shape = list(described["input_shape"])
    if "table" not in described:
        raise UserError(
            f"{run}/model.json",
            "names no columns (it learned from no table, or is of an earlier version)",
            f"a .npy array of shape (N, {str(shape)[1:-1]}), or the run made again",
        )
    try:
        columns = Columns.of(described["table"])
        if [len(columns.names)] != shape:
            raise ValueError(f"table: {len(columns.names)} columns, and inputs of shape {shape}")
    except ValueError as error:
        raise UserError(f"{run}/model.json", f"damaged ({error})") from None
    return columns


def _given(table: Table, columns: Columns, described: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the classes that the file holds, by task, as the run writes them; "" for a row without one."""
    several = described.get("tasks")
    tasks = several or dict.fromkeys(columns.asked[:1], described["classes"])
    return {
        column if several else "": [_class(cell, classes) for cell in table.cells(column)]
        for column, classes in tasks.items()
        if column in table.header
    }


def _class(cell: str, classes: Sequence[str]) -> str:
    """Return the class that a cell means: ``1.0`` is ``1``."""
    if cell in classes or (number := _amount(cell)) is None:
        return "" if is_missing(cell) and cell not in classes else cell
    return next((name for name in classes if _amount(name) == number), "" if is_missing(cell) else cell)


def _amount(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ---- summaries of many rows


def summaries(found: Sequence[Prediction], tasks: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each table and task: number of rows of each class, and accuracy on rows with a known class.

    Args:
        found: all predictions.
        tasks: the classes of each task; "" where there is one.
    """
    lines = []
    for file in dict.fromkeys(one.file for one in found if Path(one.file).suffix.lower() in SUFFIXES):
        for task, classes in tasks.items():
            rows = [one for one in found if one.file == file and one.task == task]
            counts = Counter(one.label for one in rows)
            shares = ", ".join(f"{name} {counts[name]}" for name in classes if counts[name])
            lines.append(f"{file}: {f'{task}: ' if task else ''}{len(rows)} rows ({shares}){_judged(rows, classes)}")
    return lines


def _judged(rows: Sequence[Prediction], classes: Sequence[str]) -> str:
    """Return the accuracy on the rows whose class is known, in words; empty where the file names no classes."""
    if rows[0].given is None:
        return ""
    right = [one.label == one.given for one in rows if one.given in classes]
    unknown = sorted({one.given for one in rows if one.given and one.given not in classes})
    accuracy = f"; accuracy {sum(right) / len(right):.2%} of {len(right)} rows" if right else "; no row has a class"
    return f"{accuracy}; classes that the run does not know: {', '.join(unknown)}" if unknown else accuracy


def write_predictions(path: Path, found: Sequence[Prediction], tasks: Mapping[str, Sequence[str]]) -> None:
    """Write a CSV file with one input a line: its file and row, and for each task the class and all probabilities.

    Args:
        path: the file, which appears whole.
        found: all predictions.
        tasks: the classes of each task, in the order of the columns; "" where there is one.
    """
    heads = {task: (task, f"{task}=") if task else ("label", "") for task in tasks}
    names = ["input", "row"]
    for task, classes in tasks.items():
        names += [heads[task][0], *(f"p({heads[task][1]}{name})" for name in classes)]
    rows: list[dict[str, Any]] = []
    for one in found:
        if one.task == next(iter(tasks)):
            rows.append({"input": one.file, "row": one.row})
        label, of = heads[one.task]
        shares = {f"p({of}{name})": float(f"{share:.7g}") for name, share in one.probabilities.items()}
        rows[-1] |= {label: one.label} | shares
    try:
        write_csv(path, names, rows)
    except OSError as error:
        raise UserError("predict", f"--out {path}: {error.strerror}", "a file that can be written") from None
