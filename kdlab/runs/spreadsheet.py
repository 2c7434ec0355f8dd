"""CSV files that a spreadsheet shows and never computes. Imports no torch."""

from __future__ import annotations

import csv
import io
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlab.plain_text import printable
from kdlab.system.files import atomic_write

_FORMULA = re.compile(r"""[\s"'`]*[=+\-@＝＋－＠]|[\t\r\n]""")
"""Pattern of a text's beginning that some spreadsheets compute, also after white space and quotes."""

_INSIDE = re.compile(r"""([;\t\n][\s"'`]*)(?=[=+\-@＝＋－＠])""")
"""Pattern of such a beginning after a separator of cells, where the comma is a decimal point."""

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")


def cell(value: object) -> object:
    """Return a value as a cell that is only shown: numbers unchanged, text that could be a formula after an apostrophe.

    >>> cell("=1+1"), cell(-2.5), cell("-2.5"), cell("-2+3"), cell("kl")
    ("'=1+1", -2.5, '-2.5', "'-2+3", 'kl')
    """
    if value is None or isinstance(value, bool | int | float):
        return "" if value is None else value
    text = _INSIDE.sub(r"\1'", printable(str(value).replace("\r", "\n")))
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a CSV file with a heading; what a row lacks is an empty cell.

    Args:
        path: path of the file, which appears whole, in the place of a link too; or a device or pipe, such as
            ``/dev/stdout``.
        names: the headings, which are the keys of the rows.
        rows: rows of the table.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([cell(name) for name in names])
    writer.writerows([cell(row.get(name)) for name in names] for row in rows)
    content = text.getvalue().encode()
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(content)
        return
    with atomic_write(path) as file:
        file.write(content)
