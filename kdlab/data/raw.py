"""What a data set hands over: the rows of its splits, read and checked, before anything is chosen or shuffled."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlab.data import pictures
from kdlab.data.pictures import Look
from kdlab.errors import UserError
from kdlab.functional.rng import permutation
from kdlab.functional.types import NO_LABEL
from kdlab.system.files import Unreadable

_SAMPLE = 512
"""Number of pictures on disk that are looked at to estimate statistics."""


def sample_of(total: int) -> list[int]:
    """Return the rows of a fixed sample of pictures on disk, for their mean and deviation."""
    return permutation(total, 0, "statistics")[:_SAMPLE].tolist()


@dataclass
class Files:
    """Pictures that stay on disk.

    Args:
        root: the folder that the names are relative to.
        names: one file a row.
        size: height and width that every picture is brought to.
        channels: 3, or 1 for grey.
        workers: processes that decode; None is one less than there are CPU cores, up to 8.
        deep: some have more than 8 bits a channel; enters the fingerprint, since such files were read as white once.
    """

    root: Path
    names: list[str]
    size: int
    channels: int = 3
    workers: int | None = None
    deep: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (N, C, H, W) that a tensor of all pictures would have."""
        return (len(self), self.channels, self.size, self.size)

    def take(self, rows: Tensor) -> Files:
        """Return some of the files, by number."""
        return replace(self, names=[self.names[i] for i in rows.tolist()])

    def picture(self, row: int) -> tuple[Tensor, Look]:
        """Decode a picture (C, H, W) uint8, with remarks on how the file is read.

        Raises:
            UserError: naming the file that is no picture.
        """
        path = self.root / self.names[row]
        try:
            pixels, look = pictures.decode(path, self.size, self.size, self.channels)
        except Unreadable as error:
            raise UserError("data.root", f"{path} is no picture that can be decoded ({error})") from None
        return torch.from_numpy(pixels), look

    def read(self, rows: list[int]) -> Tensor:
        """Decode the pictures of some rows: (len(rows), C, H, W) uint8.

        Raises:
            UserError: naming the file that is no picture.
        """
        return torch.stack([self.picture(row)[0] for row in rows])


@dataclass
class Rows:
    """Inputs (N, C, H, W) uint8 or (N, ...) float, or files, and class ids (N,) int64."""

    inputs: Tensor | Files
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Tensor) -> Rows:
        """Return some of the rows, by number."""
        inputs = self.inputs.take(rows) if isinstance(self.inputs, Files) else self.inputs[rows]
        return Rows(inputs, self.targets[rows])


@dataclass(frozen=True)
class Labels:
    """One of several labels of the rows of a source.

    Args:
        class_names: name of class 0, 1, ...
        of: (kinds,) int64: the class of each of ``RawDataset.class_names``, which are then kinds of rows.
        weight: weight of the label, where it is one of several tasks.
    """

    class_names: list[str]
    of: Tensor
    weight: float = 1.0

    def __call__(self, kinds: Tensor) -> Tensor:
        """Return the class ids (N,) of rows of these kinds; -100 stays."""
        return torch.where(kinds == NO_LABEL, NO_LABEL, self.of[kinds.clamp(min=0)])

    def missing(self, kinds: Tensor) -> str | None:
        """Return a class without any row of these kinds; None if there is none."""
        present = self(kinds).bincount(minlength=len(self.class_names))
        empty = (present == 0).nonzero()[:, 0].tolist()
        return self.class_names[empty[0]] if empty else None

    def rows(self, rows: Any) -> Any:
        """Return rows with these labels; anything but :class:`Rows` stays as it is."""
        return Rows(rows.inputs, self(rows.targets)) if isinstance(rows, Rows) else rows


@dataclass(frozen=True)
class Columns:
    """Columns of a table, and the way they become inputs: (cell - offset) / scale of each column.

    Args:
        names: names of the columns that are read, in the order of the inputs.
        offset: offset of each column; 0 but for columns whose values float32 would not tell apart otherwise.
        scale: scale of each column; 1 but for these.
        targets: names of the columns of classes, whether they are asked for or not.
        asked: names of those of them that are asked for.
        delimiter: the character between columns.
    """

    names: tuple[str, ...]
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    targets: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    delimiter: str = ","

    @classmethod
    def of(cls, described: Any) -> Columns:
        """Build columns from the mapping that a run's ``model.json`` holds under ``table``.

        Raises:
            ValueError: if it is none, or damaged.
        """
        try:
            fields: Any = {key: tuple(one) if isinstance(one, list) else one for key, one in dict(described).items()}
            columns = cls(**fields)
            texts = (*columns.names, *columns.targets, *columns.asked, columns.delimiter)
            numbers = all(math.isfinite(one) for one in columns.offset) and all(
                0 < one < math.inf for one in columns.scale
            )
        except TypeError as error:
            raise ValueError(f"table: {error}") from None
        if not numbers or not all(isinstance(one, str) for one in texts):
            raise ValueError("table: names that are no text, or numbers that are not finite")
        if not len(columns.names) == len(columns.offset) == len(columns.scale):
            raise ValueError("table: not as many names as numbers")
        return columns

    def check_same(self, other: Columns, key: str) -> None:
        """Refuse other columns, another order, or other offsets: a network of these would misread the others' rows.

        Raises:
            UserError: naming ``key``, of which ``other`` are.
        """
        if self.names != other.names:
            turned = f", as with 'data.columns=[{','.join(other.names)}]'" if {*self.names} >= {*other.names} else ""
            raise UserError(
                key,
                f"columns {', '.join(other.names)}, and data has {', '.join(self.names)}",
                f"the same in the same order{turned}",
            )
        mine, others = (list(zip(one.offset, one.scale, strict=True)) for one in (self, other))
        for name, (offset, scale), (their_offset, their_scale) in zip(self.names, mine, others, strict=True):
            if (offset, scale) != (their_offset, their_scale):
                raise UserError(
                    key,
                    (
                        f"column {name!r} is read as (cell - {their_offset:g}) / {their_scale:g}, and by "
                        f"data as (cell - {offset:g}) / {scale:g}"
                    ),
                    "the same file",
                )


@dataclass
class RawDataset:
    """Data set as published.

    Args:
        name: name of the data set.
        train: training rows.
        class_names: name of class 0, 1, ...
        val: the publisher's validation rows, if any.
        test: test rows; or how many to take from train (a number, or a fraction); or None.
        white: the uint8 level that means 1.
        key: the config key to name when the content is wrong.
        notes: lines that the log should have on how it was read.
        asked: labels of the rows that are asked for, by name; several are as many tasks. None asks for the classes as
            they are.
        columns: columns of a table that was read from a file, and the way they become inputs.
    """

    name: str
    train: Rows
    class_names: list[str]
    val: Rows | None = None
    test: Rows | int | float | None = None
    white: float = 255.0
    key: str = "data.root"
    notes: Sequence[str] = ()
    asked: Mapping[str, Labels] = field(default_factory=dict)
    columns: Columns | None = None

    def check(self) -> RawDataset:
        """Return this source, if its rows make sense.

        Raises:
            UserError: for no rows, counts or shapes that differ, class ids out of range, inputs that are not finite.
        """
        shape = tuple(self.train.inputs.shape[1:])
        for split in ("train", "val", "test"):
            rows = getattr(self, split)
            if not isinstance(rows, Rows):
                continue
            where = f"{self.name} ({split})"
            if not len(rows):
                raise UserError(self.key, f"{where} has no rows")
            if len(rows.inputs) != len(rows.targets):
                raise UserError(self.key, f"{where} has {len(rows.inputs)} inputs and {len(rows.targets)} targets")
            if tuple(rows.inputs.shape[1:]) != shape:
                raise UserError(
                    self.key, f"{where} has inputs of shape {tuple(rows.inputs.shape[1:])}, train has {shape}"
                )
            low, high = int(rows.targets.min()), int(rows.targets.max())
            if low < 0 or high >= len(self.class_names):
                bad = low if low < 0 else high
                raise UserError(self.key, f"{where} has class id {bad}", f"0..{len(self.class_names) - 1}")
            if isinstance(rows.inputs, Tensor) and rows.inputs.is_floating_point():
                bad_rows = (~rows.inputs.isfinite().flatten(1).all(1)).nonzero()[:, 0]
                if len(bad_rows):
                    raise UserError(where, f"row {int(bad_rows[0])} has an input that is not finite")
        return self


def statistics(inputs: Tensor | Files, white: float) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each channel (or feature) in [0, 1] units; 1 for a constant one.

    Exact for tensors; files are estimated from a fixed sample of 512 pictures.
    """
    if isinstance(inputs, Files):
        inputs = inputs.read(sample_of(len(inputs)))
    if inputs.dtype == torch.uint8:
        # by histogram: exact, and without a float copy of the set
        levels = torch.arange(256, dtype=torch.float64) / white
        shares = [c.flatten().bincount(minlength=256).double() / c.numel() for c in inputs.unbind(1)]
        mean = torch.stack([(levels * s).sum() for s in shares])
        square = torch.stack([(levels**2 * s).sum() for s in shares])
    else:
        other = [d for d in range(inputs.ndim) if d != 1]
        mean = inputs.double().mean(other)
        square = inputs.double().pow(2).mean(other)
    std = (square - mean**2).clamp(min=0).sqrt()
    std = torch.where(std > 1e-7, std, 1.0)
    return mean.tolist(), std.tolist()


def fingerprint(splits: dict[str, Rows | None], class_names: list[str], white: float) -> str:
    """Compute the SHA-256 of the content of the splits, in order: inputs, labels and classes.

    Files count by name and length, since reading them all would take as long as an epoch. Which labels are withheld
    does not enter: it changes neither which example a number means nor what a teacher says about it.
    """
    total = hashlib.sha256(repr((sorted(k for k, v in splits.items() if v), class_names, float(white))).encode())
    for name in sorted(splits):
        rows = splits[name]
        if rows is None:
            continue
        total.update(f"{name} {tuple(rows.inputs.shape)} ".encode())
        if isinstance(rows.inputs, Files):
            if rows.inputs.deep:
                total.update(b"more than 8 bits a channel\n")
            for file in rows.inputs.names:
                # a name that is no UTF-8 enters by its bytes
                total.update(f"{file} {(rows.inputs.root / file).stat().st_size}\n".encode(errors="surrogateescape"))
        else:
            total.update(str(rows.inputs.dtype).encode())
            total.update(rows.inputs.contiguous().numpy().data)
        total.update(rows.targets.contiguous().numpy().data)
    return total.hexdigest()
