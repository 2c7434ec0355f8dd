"""Runs side by side as one HTML page that needs nothing else: no network, no files beside it.

Names, settings and errors come from run folders that may be anybody's: all of it is escaped, and the page's
own policy admits one script by its hash, so that text which slipped through could still not run.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from urllib.parse import quote

from kdlab.report import table
from kdlab.report.compare.comparison import Comparison, footer, head, row
from kdlab.report.compare.pictures import Picture
from kdlab.runs.formatting import plural
from kdlab.runs.read import DIAGNOSIS, Group, Run, mapping, setting
from kdlab.system.files import write_text
from kdlab.system.terminal import one_line

_SCRIPT = """
document.querySelectorAll('table.sortable').forEach(function (table) {
  table.querySelectorAll('thead button').forEach(function (button, column) {
    button.addEventListener('click', function () {
      var heading = button.parentNode, up = heading.getAttribute('aria-sort') !== 'ascending';
      table.querySelectorAll('thead th').forEach(function (th) { th.removeAttribute('aria-sort'); });
      heading.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      var body = table.tBodies[0], rows = Array.prototype.slice.call(body.rows);
      rows.sort(function (a, b) {
        var x = a.cells[column].dataset.value, y = b.cells[column].dataset.value;
        if (x === '' || y === '') { return (x === '') - (y === ''); }
        var both = !isNaN(x) && !isNaN(y);
        var order = both ? x - y : x.localeCompare(y, undefined, {numeric: true});
        return up ? order : -order;
      });
      rows.forEach(function (tr) { body.appendChild(tr); });
    });
  });
});
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #59636e; --line: #d8dee4; --back: #fff;
  --raised: #f6f8fa; --best: #fff4d6; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9198a1; --line: #30363d;
  --back: #0d1117; --raised: #161b22; --best: #3a2f10; --bad: #ff9c92; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, li, figcaption { max-width: 48rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; margin: .5rem 0; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--raised);
  border-radius: 4px; padding: .15em .35em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0;
  font-size: .9rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th { border-top: 0; background: var(--raised); padding: 0; }
th.text, td.text { text-align: left; }
th button { all: unset; box-sizing: border-box; width: 100%; display: block; padding: .5rem .75rem;
  cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; outline-offset: -2px; border-radius: 8px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.best td { background: var(--best); font-weight: 600; }
figure { margin: 1rem 0 2rem; }
figure img { display: block; max-width: min(100%, 60rem); height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
.bad { color: var(--bad); }
ul { padding-left: 1.2rem; }
li { overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; } th button, td { padding: .35rem .5rem; } td { font-size: .82rem; } }
"""


def write(
    path: Path,
    comparison: Comparison,
    columns: Sequence[str],
    order: Sequence[Group],
    pictures: Sequence[Picture],
    command: str,
) -> None:
    """Write the page to ``path``: header, table, pictures, and what failed."""
    parts = [
        _header(comparison, command),
        _settings(comparison, columns, order),
        *(figure(picture) for picture in pictures),
        _diagnoses(comparison, order, path.parent),
        _list("Failed", [(run.folder, run.error) for run in comparison.failed], bad=True),
        _list("Unfinished: running, or killed", [(folder, "") for folder in comparison.unfinished]),
    ]
    write_text(path, document(comparison.title, parts))


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts that are HTML already; those that are empty are left out."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>",
        *parts,
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def facts(title: str, known: Mapping[str, str]) -> str:
    """The head of a page: its title, and names with what belongs to them (HTML); those without are left out."""
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in known.items() if value)
    return f"<header><h1>{escaped(title)}</h1><dl>{rows}</dl></header>"


def _header(comparison: Comparison, command: str) -> str:
    runs = [*comparison.runs, *comparison.failed]
    known = {
        "made by": f"<code>{escaped(command)}</code>",
        "made on": made_on(),
        "runs finished": escaped(_when(runs)),
        "trained with": escaped(_distinct(_versions(run) for run in runs)),
        "hardware": escaped(_distinct(_hardware(run) for run in runs)),
        "teacher trained on": escaped(_distinct(str(run.result.get("teacher_trained_on") or "") for run in runs)),
        "commit": escaped(_distinct(str(run.result.get("commit") or "") for run in runs)),
    }
    return facts(comparison.title, known)


def made_on() -> str:
    """When a page was made, and by which versions."""
    when = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    return escaped(f"{when}, kdlab {_version()}, Python {platform.python_version()}")


def _settings(comparison: Comparison, columns: Sequence[str], order: Sequence[Group]) -> str:
    if not order:
        return "<p>No run has finished.</p>"
    keys = ["rank", *columns]
    heads = [head(key, comparison) for key in keys]
    titles = "".join(
        f'<th scope="col"{_side(one)}><button type="button">{escaped(one.title)}</button></th>' for one in heads
    )
    body = []
    for one in order:
        cells = row(one, comparison, keys)
        line = "".join(
            f'<td{_side(column)} data-value="{escaped(_sort_value(one, column.key, comparison))}">'
            f"{escaped(cells.get(column.key) or table.ABSENT)}</td>"
            for column in heads
        )
        body.append(f"<tr{' class=best' if one.rank == 1 else ''}>{line}</tr>")
    notes = "".join(f"<p class=quiet>{escaped(line)}</p>" for line in footer(comparison, columns))
    return (
        f"<h2>Settings, {comparison.order}</h2><p class=quiet>A click on a heading sorts by it.</p>"
        f"<div class=scroll><table class=sortable><thead><tr>{titles}</tr></thead><tbody>"
        f"{''.join(body)}</tbody></table></div>{notes}"
    )


def _sort_value(one: Group, key: str, comparison: Comparison) -> str:
    """What a cell sorts by: the number itself, not its rounded form; empty where there is none."""
    if key in comparison.measures:
        stat = one.stat(comparison.measures[key].get)
        return "" if stat is None else repr(stat.mean)
    special = {"rank": one.rank, "n": len(one.runs), "run": one.runs[0].label}
    value = special.get(key, one.settings.get(key))
    return "" if value is None else setting(value)


def figure(picture: Picture) -> str:
    """A picture inside the page, with its heading and caption."""
    data = base64.b64encode(picture.path.read_bytes()).decode()
    title, caption = escaped(picture.title), escaped(picture.caption)
    heading = title[:1].upper() + title[1:]
    image = f'<img alt="{title}. {caption}" src="data:image/png;base64,{data}">'
    return f"<h2>{heading}</h2><figure>{image}<figcaption>{caption}</figcaption></figure>"


def _diagnoses(comparison: Comparison, order: Sequence[Group], home: Path) -> str:
    """Links to what runs have beside them of the errors that they inherited; a line for each run that has it."""
    items = []
    for run in (run for one in order for run in one.runs):
        if (run.folder / DIAGNOSIS).is_file():
            name = Group(run.settings, [run]).label(comparison.differs)
            named = run.label if name == run.label else f"{name} ({run.label})"
            items.append(f'<li><a href="{_link(run.folder / DIAGNOSIS, home)}">{escaped(named)}</a>{_errors(run)}</li>')
    if not items:
        return ""
    return f"<h2>Diagnoses: whose errors a student makes ({len(items)})</h2><ul>{''.join(items)}</ul>"


def _errors(run: Run) -> str:
    wrong = [run.number(run.subject, "errors", kind) for kind in ("inherited", "own", "other")]
    counts = [int(number) for number in wrong if number is not None]
    if len(counts) < len(wrong):
        return ""
    return f" <span class=quiet>{plural(sum(counts), 'error')}, {counts[0]} inherited from the teacher</span>"


def _link(path: Path, home: Path) -> str:
    """Where a file lies, seen from the page's folder, as a link."""
    try:
        return escaped(quote(Path(os.path.relpath(path.resolve(), home.resolve())).as_posix()))
    except ValueError:  # on another drive
        return escaped(path.resolve().as_uri())


def _list(title: str, entries: Sequence[tuple[Path, str]], bad: bool = False) -> str:
    if not entries:
        return ""
    error_class = "bad" if bad else "quiet"
    items = "".join(
        f"<li><code>{escaped(folder)}</code> <span class={error_class}>{escaped(error)}</span></li>"
        for folder, error in entries
    )
    return f"<h2>{escaped(title)} ({len(entries)})</h2><ul>{items}</ul>"


def _side(column: table.Column) -> str:
    return "" if column.right else " class=text"


def escaped(value: object) -> str:
    """Text as HTML that can only be read."""
    return escape(one_line(value), quote=True)


def _distinct(values: object) -> str:
    """The different values, most of them one; a long list is cut short, and says so."""
    found = list(dict.fromkeys(value for value in values if value))  # type: ignore[attr-defined]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in mapping(run.result.get("versions")).items())


def _hardware(run: Run) -> str:
    facts = dict(mapping(run.result.get("hardware")))
    threads = facts.pop("threads", None)
    parts = [str(facts.pop("name", "") or ""), str(facts.pop("device", "") or "")]
    parts += [
        plural(threads, "thread") if isinstance(threads, int) else "",
        *(str(value) for value in facts.values() if value),
    ]
    return ", ".join(part for part in parts if part)


def _when(runs: Sequence[Run]) -> str:
    times = sorted(str(run.result["finished"])[:16].replace("T", " ") for run in runs if run.result.get("finished"))
    return "" if not times else times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"


def _version() -> str:
    from importlib import metadata  # slow, and only a page needs it

    try:
        return metadata.version("kdlab")
    except metadata.PackageNotFoundError:
        return "(not installed)"
