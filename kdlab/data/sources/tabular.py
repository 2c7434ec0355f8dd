"""Tables and a generated problem."""

from __future__ import annotations

import csv as csv_format
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from kdlab.data.labels import Label, asked, joint
from kdlab.data.module import Common, ImageData, whole
from kdlab.data.source import Rows, Source
from kdlab.errors import UserError, unknown
from kdlab.files import Unreadable, open_text

_STEPS = 4


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
    """A table with a header line: numbers, and one column that names the class.

    Inputs are the numbers as they are; ``mean`` and ``std`` of the training rows, one for each column, are what a
    network standardises them with. Classes are the values of the target column, sorted.

    Args:
        path: the file.
        target: the column of the class; a list of columns for several tasks at once.
        label: which of several targets are asked for; a name, a list, or a mapping name → weight. None is all.
        columns: the columns to read; None is all others.
        test_path: another file with the same columns, for the test split.
        test: rows (a number, or a fraction) taken for the test split where there is no such file; None is a tenth.
        delimiter: what separates columns.

    The other arguments are :class:`ImageData`'s.

    Raises:
        UserError: for a missing file or column, a value that is no finite number, rows of unequal length.
    """
    if path is None:
        raise UserError("data.path: null; accepted: a CSV file with a header line")
    targets = [target] if isinstance(target, str) else list(target)
    if not targets or len(set(targets)) < len(targets):
        raise UserError(f"data.target: {targets}; accepted: different columns, at least one")
    wanted, features, written = _table(path, "data.path", targets, columns, delimiter)
    inputs, labels = [features], [written]
    if test_path is not None:
        _, features, test_written = _table(test_path, "data.test_path", targets, wanted, delimiter)
        inputs, labels = [*inputs, features], [*labels, test_written]
    columns_of = {}
    for name in targets:
        class_names = _sorted_names(written[name])
        if len(class_names) < 2 or len(class_names) > max(20, len(written[name]) // 2):
            raise UserError(
                f"data.target: column {name!r} of {path} holds {len(class_names)} different values in "
                f"{len(written[name])} rows; accepted: a column of classes"
            )
        for found_there in labels[-1][name]:
            if found_there not in class_names:
                raise unknown(f"data.test_path: {test_path}", found_there, class_names, "class")
        ids = [torch.tensor([class_names.index(one) for one in part[name]]) for part in labels]
        columns_of[name] = ids, class_names
    kinds, names, found = joint(columns_of)
    parts = [Rows(features, ids) for features, ids in zip(inputs, kinds, strict=True)]
    held_out: Rows | int | float = parts[1] if len(parts) > 1 else 0.1 if test is None else test
    source = Source(Path(path).stem, parts[0], names, test=held_out, key="data.path")
    return ImageData(asked(source, found, targets if label is None else label), **common)


def _sorted_names(labels: list[str]) -> list[str]:
    names = sorted(set(labels))
    try:
        return sorted(names, key=float)
    except ValueError:
        return names


def _table(
    path: str, key: str, targets: Sequence[str], columns: Sequence[str] | None, delimiter: str
) -> tuple[list[str], Tensor, dict[str, list[str]]]:
    """Names of the feature columns, features (N, F) float32, and the labels of each target as written."""
    try:
        with open_text(Path(path).expanduser()) as file:
            lines = [line for line in csv_format.reader(file, delimiter=delimiter) if line]
    except OSError as error:
        raise UserError(f"{key}: cannot read {path} ({error.strerror})") from None
    except (UnicodeDecodeError, csv_format.Error, TypeError, Unreadable) as error:
        raise UserError(f"{key}: {path} is no table separated by {delimiter!r} ({error})") from None
    if len(lines) < 2:
        raise UserError(f"{key}: {path} has no rows below its header")
    header = [name.strip() for name in lines[0]]
    for target in targets:
        if target not in header:
            raise unknown("data.target", target, header, "column")
    rest = [name for name in header if name not in targets]
    wanted = rest if columns is None else list(columns)
    for name in wanted:
        if name not in rest:
            raise unknown("data.columns", name, rest, "column")
    places = [header.index(name) for name in wanted]
    features = np.empty((len(lines) - 1, len(wanted)), dtype=np.float32)
    for number, line in enumerate(lines[1:]):
        if len(line) != len(header):
            raise UserError(f"{key}: {path}, row {number + 1} has {len(line)} values, the header {len(header)}")
        for place, column in enumerate(places):
            features[number, place] = _number(
                line[column], f"{key}: {path}, row {number + 1}, column {header[column]!r}"
            )
    labels = {target: [line[header.index(target)].strip() for line in lines[1:]] for target in targets}
    return wanted, torch.from_numpy(features), labels


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise UserError(f"{where}: {text!r} is no finite number; leave the row out, or name others in data.columns")
    return value


def synthetic(
    n: int = 2000,
    features: int = 10,
    noise: float = 0.15,
    num_classes: int = 2,
    data_seed: int = 0,
    **common: Unpack[Common],
) -> ImageData:
    """A generated, nonlinear and noisy problem: which class scores highest over normally distributed features?

    The score of a class is a random sum of four steep steps, each in a random direction of feature space; the class is
    the one with the highest score plus noise. A fifth of the rows is for testing. With the defaults a linear model
    gets 83 % of the test rows right, an MLP with 10 hidden units 90 %.

    Args:
        n: rows in all.
        features: numbers a row.
        noise: deviation of what is added to the scores; 0 makes the classes separable.
        num_classes: how many.
        data_seed: of the generator.

    The other arguments are :class:`ImageData`'s, with ``val`` 0.15 unless given.
    """
    for name, value, least in (("n", n, 20), ("features", features, 1), ("num_classes", num_classes, 2)):
        whole(f"data.{name}", value, least)
    if not 0 <= noise < float("inf"):
        raise UserError(f"data.noise: {noise}; accepted: 0 or more")
    draw = np.random.Generator(np.random.PCG64(data_seed))
    inputs = draw.standard_normal((n, features))
    slopes = 3 * draw.standard_normal((features, _STEPS)) / features**0.5
    scores = np.tanh(inputs @ slopes + draw.standard_normal(_STEPS)) @ draw.standard_normal((_STEPS, num_classes))
    scores = (scores - np.median(scores, axis=0)) / scores.std(axis=0)
    targets = (scores + noise * draw.standard_normal(scores.shape)).argmax(axis=1)
    rows = Rows(torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets))
    common.setdefault("val", 0.15)
    source = Source("synthetic", rows, [str(label) for label in range(num_classes)], test=0.2, key="data")
    return ImageData(source, **common)
