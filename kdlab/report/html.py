"""HTML pages that need nothing else: no network, no files beside them.

Names, settings and errors come from run folders that may be anybody's: templates escape all of it, and the page's own
policy admits one script by its hash, so that text which slipped through could still not run.
"""

from __future__ import annotations

import base64
import hashlib
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdlab.plain_text import one_line
from kdlab.report.table import ABSENT, Column
from kdlab.system.files import write_text


@dataclass(frozen=True)
class Cell:
    """Cell of a table: the text that it shows, and its sort key; both empty where there is nothing."""

    text: str
    sort_key: str


@dataclass(frozen=True)
class Table:
    """Table for the templates.

    Attributes:
        rows: maps of column's key → cell.
        best: numbers of the rows to point out.
    """

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    best: Collection[int] = ()

    @classmethod
    def of(
        cls,
        rows: Sequence[Mapping[str, object]],
        columns: Sequence[Column],
        sort_key: Callable[[int, str], str] | None = None,
        best: Collection[int] = (),
    ) -> Table:
        """Make a table of values.

        Args:
            rows: maps of column's key → value, or None.
            columns: columns, in order.
            sort_key: function of a row's number and a column's key; None: the value itself.
            best: numbers of the rows to point out.
        """

        def cell(number: int, row: Mapping[str, object], key: str) -> Cell:
            value = row.get(key)
            # a number with a typographic minus is no number to a browser
            own = "" if value is None else str(value).replace("−", "-")
            shown = ABSENT if value is None or value == "" else str(value)
            return Cell(shown, own if sort_key is None else sort_key(number, key))

        filled = [{column.key: cell(i, row, column.key) for column in columns} for i, row in enumerate(rows)]
        return cls(columns, filled, best)


def write_page(path: Path, template: str, *, title: str, command: str, facts: Mapping[str, str], **values: Any) -> None:
    """Write a page from a template.

    Args:
        path: path of the page.
        template: name of the template in ``templates/``.
        title: title of the page.
        command: command that was typed to make it.
        facts: map of name → text, for the head of the page; those without a text are left out.
        values: further names that the template uses.
    """
    templates = _environment()
    script = templates.get_template("sort.js").render()
    versions = f"kdlab {_version()}, Python {platform.python_version()}"
    page = templates.get_template(template).render(
        title=title,
        command=command,
        made_on=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, {versions}",
        facts=facts,
        style=Markup(templates.get_template("style.css").render()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
    write_text(path, page)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("kdlab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if hasattr(value, "__html__") else one_line(value),
    )
    made.filters["data_url"] = lambda path: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return made


def _version() -> str:
    try:
        return metadata.version("kdlab")
    except metadata.PackageNotFoundError:
        return "(not installed)"
