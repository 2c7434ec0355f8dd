"""Tables in text files: a line of column names, and rows of cells.

Read strictly: what would lose or misplace a row, a column or a label is refused with the place where it stands.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdlab.errors import UserError, unknown
from kdlab.plain_text import printable
from kdlab.system.files import Unreadable, open_regular

SUFFIXES = (".csv", ".tsv", ".tab")
"""Endings of file names that mean a table."""

SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|", "space": " "}
"""Separators of columns by name."""

_NO_SEPARATOR = set("\"'\r\n\0.+-_")
_END = "\x03"
_MISSING = frozenset(("", "na", "n/a", "#n/a", "<na>", "nan", "#nan", "null", "none", "nil", "?"))
"""Texts by which programs mark a missing value, in small letters."""
_ADVICE = "leave the row out, or name others in data.columns"
_ENTRY = re.compile(r"\s*[-+]?[\d.]")


@dataclass(frozen=True)
class Table:
    """Content of a table file.

    Args:
        path: the file, as it was named.
        key: the config key or command that named it: how messages start.
        separator: the character between columns.
        header: the names of the columns.
        rows: the cells of each row, without the space around them; as many as there are names.
        lines: the line of the file that each row ends on.
        notes: lines for the log on how it was read.
    """

    path: str
    key: str
    separator: str
    header: list[str]
    rows: list[list[str]] = field(repr=False)
    lines: list[int] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def hint(self) -> str:
        """Hint in brackets on why names may be missing from the header; empty where there is none."""
        if len(self.header) == 1 and (other := [n for n, mark in SEPARATORS.items() if mark in self.header[0]]):
            typed = f"; data.delimiter={other[0]} reads that" if self.key.startswith("data.") else ""
            return f" (it holds a {other[0]} where {_called(self.separator)} was to separate columns{typed})"
        if any(_number(one) is not None for one in self.header):
            return " (its first line holds numbers; it must name the columns)"
        return ""

    def place(self, row: int) -> str:
        """Return the file and line of a row (from 0), for messages."""
        return f"{self.path}, {_row(row, self.lines[row])}"

    def column(self, name: str, key: str | None = None) -> int:
        """Return the number of a column.

        Raises:
            UserError: naming ``key``, if there is none of this name.
        """
        if name in self.header:
            return self.header.index(name)
        raise unknown(key or f"{self.key}: {self.path}", name, self.header, "column").with_hint(self.hint)

    def cells(self, name: str, key: str | None = None) -> list[str]:
        """Return the cells of a column.

        Raises:
            UserError: naming ``key``, if there is none of this name.
        """
        place = self.column(name, key)
        return [row[place] for row in self.rows]

    def labels(self, name: str, key: str | None = None, classes: Collection[str] = ()) -> list[str]:
        """Return the cells of a column of classes.

        Args:
            name: name of the column.
            key: config key to name if there is no such column.
            classes: texts that are known to be classes, though they look like a missing value.

        Raises:
            UserError: for a missing column, or the first row without a label.
        """
        labels = self.cells(name, key)
        for number, label in enumerate(labels):
            where = f"{self.key}: {self.place(number)}, column {name!r}"
            if is_missing(label) and label not in classes:
                count = sum(is_missing(one) and one not in classes for one in labels)
                named = f"; where {label!r} is a class, name it in data.classes" if label else ""
                raise UserError(
                    where,
                    f"{label!r} is no label ({count} of {len(labels)} rows have none)",
                    f"a class in every row (data.labels=N withholds all but N labels){named}",
                )
            if "\n" in label or "\r" in label:
                raise UserError(where, "a label of several lines", "one line (is a quote not closed?)")
        return labels

    def numbers(self, names: Sequence[str], advice: str = _ADVICE) -> np.ndarray:
        """Return the cells of some columns as numbers: (rows, len(names)) float64.

        Raises:
            UserError: for a missing column, or a cell that is no finite number; it names all such columns, and says
                ``advice``.
        """
        values = np.empty((len(self.rows), len(names)))
        bad: list[tuple[str, int]] = []
        for n, name in enumerate(names):
            place = self.column(name)
            numbers = [_number(row[place]) for row in self.rows]
            if None in numbers:
                bad.append((name, numbers.index(None)))
            else:
                values[:, n] = numbers
        if bad:
            name, row = bad[0]
            cell, where = self.rows[row][self.column(name)], f"{self.key}: {self.place(row)}, column {name!r}"
            also = f" (likewise in {', '.join(repr(name) for name, _ in bad[1:])})" if bad[1:] else ""
            raise UserError(where, f"{cell!r} is no finite number{_why(cell)}{also}; {advice}")
        return values


def read_table(path: str | Path, key: str, delimiter: str = ",", wanted: Collection[str] = ()) -> Table:
    """Read a file of UTF-8 text whose first line names the columns.

    Args:
        path: the file.
        key: the config key or command that named it.
        delimiter: separator of columns; a ``.tsv`` file without a comma in its first line has tabs all the same.
        wanted: columns that must be there: where only another separator finds them, that is taken.

    Raises:
        UserError: for a file that cannot be read or is no such table, columns of one name, rows of other lengths.
    """
    content = _content(path, key)
    asked = separator(delimiter)
    mark = _suited(content, path, asked, wanted)
    notes = () if mark == asked else (f"{path} is read with {_called(mark)} between columns",)
    header: list[str] | None = None
    rows: list[list[str]] = []
    lines: list[int] = []
    blank = 0
    for line, cells in _lines(content, path, key, mark):
        if header is None:
            header = _header(cells, path, key) if cells else None
        elif not cells or (len(header) > 1 and cells == [""]):
            blank = blank or line
        else:
            if len(header) == 1 and blank:
                raise UserError(key, f"{path}, line {blank} is empty", "a value in every row")
            if len(cells) != len(header):
                where = _row(len(rows), line)
                raise UserError(key, f"{path}, {where} has {len(cells)} values, the header {len(header)}")
            rows.append(cells)
            lines.append(line)
    if header is None or not rows:
        raise UserError(key, f"{path} has no rows below its header")
    return Table(str(path), key, mark, header, rows, lines, notes)


def separator(text: str, key: str = "data.delimiter") -> str:
    r"""Return the character that a delimiter, its name, or its escape stands for.

    >>> separator("\\t") == separator("tab") == "\t"
    True

    Raises:
        UserError: if it can separate nothing.
    """
    mark = SEPARATORS.get(text, "\t" if text == "\\t" else text)
    if not isinstance(mark, str) or len(mark) != 1 or mark.isalnum() or mark in _NO_SEPARATOR:
        raise UserError(key, f"{text!r}", f"{', '.join(SEPARATORS)}, or another character such as ':'")
    return mark


def is_missing(label: str) -> bool:
    """Return whether a cell marks a missing value."""
    return label.strip().casefold() in _MISSING


# ---- reading


def _content(path: str | Path, key: str) -> bytes:
    try:
        with open_regular(Path(path).expanduser()) as file:
            content = file.read()
    except Unreadable as error:
        raise UserError(key, f"cannot read {path} ({error})", "a CSV file") from None
    except (OSError, ValueError) as error:
        raise UserError(key, f"cannot read {path} ({getattr(error, 'strerror', None) or error})") from None
    if content[:4] == b"PK\x03\x04":
        raise UserError(key, f"{path} is an archive or a workbook", "a CSV file, saved from it")
    try:
        if b"\0" not in content:
            content.decode("utf-8-sig")
            return content
        line, what = content[: content.index(b"\0")].count(b"\n") + 1, "a zero byte, as in UTF-16"
    except UnicodeDecodeError as error:
        line, what = content[: error.start].count(b"\n") + 1, f"the byte 0x{content[error.start]:02x}"
    raise UserError(key, f"{path}, line {line} holds {what}, and is no UTF-8 text", "a table saved as UTF-8")


def _lines(content: bytes, path: str | Path, key: str, mark: str) -> list[tuple[int, list[str]]]:
    """Read (last line, cells) of every row, the header and blank ones too."""
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
    # the reader takes a quote that is never closed for one of a single cell: what comes last is then no row of its own
    reader = csv.reader(itertools.chain(text, [_END]), delimiter=mark, skipinitialspace=mark != " ")
    rows = []
    try:
        for cells in reader:
            rows.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise UserError(key, f"{path}, line {reader.line_num}: {error}", "a table of shorter cells") from None
    if rows.pop()[1] != [_END]:
        line = rows[-1][0] + 1 if rows else 1
        raise UserError(key, f"{path}, line {line}: a quote that is not closed", "quotes in pairs")
    return rows


def _header(cells: Sequence[str], path: str | Path, key: str) -> list[str]:
    names = [_name(cell) for cell in cells]
    for number, name in enumerate(names):
        if name and name in names[:number]:
            raise UserError(
                key,
                f"{path}: columns {names.index(name) + 1} and {number + 1} are both named {name!r}",
                "different names",
            )
    return names


def _suited(content: bytes, path: str | Path, mark: str, wanted: Collection[str]) -> str:
    """Return the separator to read with: another one than asked for only where that finds one column."""
    first = next((line for line in io.BytesIO(content) if line.strip()), b"").decode("utf-8-sig")
    if mark in first:
        return mark
    if Path(path).suffix.lower() in (".tsv", ".tab") and "\t" in first:
        return "\t"
    for other in SEPARATORS.values() if wanted else ():
        names = {_name(cell) for cell in next(csv.reader([first], delimiter=other))}
        if other in first and names.issuperset(wanted):
            return other
    return mark


def _name(cell: str) -> str:
    return printable(cell).strip()


def _row(number: int, line: int) -> str:
    """Name a row by its number from 1, with its line where that is not the next number."""
    return f"row {number + 1}" if line == number + 2 else f"row {number + 1} (line {line})"


def _called(mark: str) -> str:
    return next((f"a {name}" for name, one in SEPARATORS.items() if one == mark), repr(mark))


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if np.isfinite(value) and "_" not in cell else None


def _why(cell: str) -> str:
    if not cell:
        return " (the cell is empty)"
    return " (numbers have a decimal point, and no commas)" if "," in cell and _ENTRY.match(cell) else ""
