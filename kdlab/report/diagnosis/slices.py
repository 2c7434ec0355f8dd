"""Groups of examples: by a column of a file, or of the table that the data come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kdlab.data import DataModule
from kdlab.data.datasets.table import table_source
from kdlab.data.labels import select_label
from kdlab.data.raw import Rows
from kdlab.data.splits import choose_classes, divide
from kdlab.data.table_file import read_table
from kdlab.errors import UserError

MOST_GROUPS = 50
"""Largest number of different values in a column of words."""

_FEW = 12
"""Largest number of different numbers that are groups of their own; of more, groups are quarters of the examples."""


def groups(text: str, config: Mapping[str, Any], data: DataModule, split: str, targets: torch.Tensor) -> list[str]:
    """Return the group of each example of a split.

    Args:
        text: column, as ``FILE.csv:COLUMN`` with a row for each example, in order; or ``COLUMN`` of the table that
            ``data`` read.
        config: configuration of the data.
        data: the data module.
        split: split of the examples.
        targets: (N,) class ids of the examples, in order.

    Raises:
        UserError: for a file or column that is not there, or rows that are not as many.
    """
    file, colon, column = text.rpartition(":")
    if colon:
        values = read_table(file, "diagnose: --slice", wanted=[column]).cells(column)
        if len(values) != len(targets):
            raise UserError(
                "diagnose",
                (f"--slice {text}: {len(values)} rows, and the {split} split has {len(targets)} examples"),
                "a row for each example, in order",
            )
        return _grouped(values, text)
    if str(config.get("_target_")) != "kdlab.data.csv":
        raise UserError(
            "diagnose",
            f"--slice {text}: data ({data.name}) is no CSV file with columns",
            "FILE.csv:COLUMN, with a row for each example, in order",
        )
    return _grouped(_of_table(column, config, data, split, targets), text)


def _of_table(column: str, config: Mapping[str, Any], data: DataModule, split: str, targets: torch.Tensor) -> list[str]:
    """Return a column of the rows of a split, which is divided again as ``kdlab.data.csv`` divided the table."""
    names = ("path", "target", "label", "columns", "test_path", "test", "delimiter", "classes")
    changed = f"{config['path']} is no longer what the run read"
    try:
        source, files = table_source(**{name: config[name] for name in names if config.get(name) is not None})
    except UserError as error:
        raise UserError(f"diagnose: --slice {column}", f"{changed} ({error})", "the same file") from None

    def placed(rows: object, file: int) -> Any:
        """Replace the content of each row by its place, (file, row)."""
        if not isinstance(rows, Rows):
            return rows
        return Rows(torch.stack([torch.full((len(rows),), file), torch.arange(len(rows))], 1), rows.targets)

    source = replace(source, train=placed(source.train, 0), test=placed(source.test, 1))
    if config.get("classes") is not None:
        source = choose_classes(select_label(source), config["classes"])
    there = divide(source, config.get("val"), config.get("fraction"), config.get("split_seed") or 0)[split]
    label = next(iter(source.asked.values()), None)  # None where classes were chosen: they are told apart already
    if there is None or not torch.equal((there if label is None else label.rows(there)).targets, targets):
        raise UserError(f"diagnose: --slice {column}", changed, "the same file")
    assert isinstance(there.inputs, torch.Tensor)
    cells = [one.cells(column, f"diagnose: --slice: {one.path}") for one in files]
    return [cells[file][row] for file, row in there.inputs.tolist()]


def _grouped(values: list[str], text: str) -> list[str]:
    """Return words and few numbers unchanged; of many numbers, the quarter that each is in."""
    numbers = [_number(value) for value in values]
    if len(set(values)) > _FEW and None not in numbers:
        return _quarters([float(value) for value in numbers if value is not None])
    if len(set(values)) > MOST_GROUPS:
        raise UserError(
            "diagnose",
            f"--slice {text}: {len(set(values))} different values",
            f"numbers, or at most {MOST_GROUPS} groups",
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
