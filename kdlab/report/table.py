"""Plain aligned tables for the terminal, and the short table that ends a run.

What is shown may come from somebody else's run folder, so control characters never reach the terminal.
Numbers are never shortened, however narrow the terminal; the tables of rich shrink all columns alike.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kdlab.plain_text import one_line
from kdlab.runs.formatting import count, number, percent, seconds, size
from kdlab.runs.measures import Score, beside, gap_closed, headline, score_of
from kdlab.runs.read import DIAGNOSIS, Run, mapping
from kdlab.system.terminal import say

ABSENT = "–"
_GAP = "  "
_NARROWEST = 10
_PLAIN = {"±": "+/-", "×": "x", "–": "-", "−": "-", "·": "|", "→": "->", "…": "~", "─": "-"}


@dataclass(frozen=True)
class Column:
    """Column of a table: the key of its cells in a row, its heading, and the side it is aligned to."""

    key: str
    title: str
    right: bool = True
    """Whether cells are aligned right, as numbers are; text stands left, and is shortened in a table too wide."""


def render(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[Column],
    *,
    width: int | None = None,
    bold: Collection[int] = (),
) -> str:
    """Return a table as text: a heading, a rule, a line for each row.

    Args:
        rows: cells by column key; a missing or None cell is shown as a dash.
        columns: columns to show, in order.
        width: largest number of characters of a line; text columns are shortened to fit, numbers never. None: no limit.
        bold: rows to emphasise (the caller asks :func:`emphasis` whether the terminal shows it).
    """
    cells = [[ABSENT if row.get(c.key) is None else one_line(row[c.key]) for c in columns] for row in rows]
    titles = [one_line(c.title) for c in columns]
    wide = [max(map(_cells_wide, column)) for column in zip(titles, *cells, strict=True)]
    if width is not None:
        wide = _fit(wide, [c.right for c in columns], width)

    def line(values: Sequence[str]) -> str:
        return _GAP.join(_pad(v, w, c.right) for v, w, c in zip(values, wide, columns, strict=True)).rstrip()

    out = [line(titles), "─" * (sum(wide) + len(_GAP) * (len(wide) - 1))]
    out += [f"\x1b[1m{line(row)}\x1b[0m" if i in bold else line(row) for i, row in enumerate(cells)]
    return "\n".join(out)


def emphasis(stream: TextIO | None = None) -> bool:
    """Return whether ``stream`` (standard output) is a terminal that shows bold type, and the user wants it."""
    stream = stream or sys.stdout
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Return the characters in a line of the terminal, 80 at least; None if the output goes to a file or a pipe."""
    stream = stream or sys.stdout
    return max(80, shutil.get_terminal_size((100, 24)).columns) if stream.isatty() else None


def show(text: str, stream: TextIO | None = None) -> None:
    """Print ``text``; signs that the stream's encoding lacks are spelled out."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = (
            text.translate({ord(sign): plain for sign, plain in _PLAIN.items()})
            .encode(encoding, "replace")
            .decode(encoding)
        )
    say(text, file=stream)


def run_table(result: Mapping[str, Any], folder: str | os.PathLike[str] | None = None, bold: bool | None = None) -> str:
    """Return the table that ends a run: a row for each model, gains of distillation, and where to look next.

    Args:
        result: content of ``result.json``.
        folder: run folder, for the last two lines.
        bold: whether to emphasise the trained model; None: if standard output is a terminal.
    """
    run = Run(Path(folder or "."), dict(result))
    subject = run.subject
    roles = [role for role in ("teacher", subject, "baseline") if role in run.models]
    roles += [role for role in run.models if role not in roles]
    score, more = score_of([run]), headline([run])
    split = "test" if any(run.number(role, "test", score.key) is not None for role in roles) else "val"
    rows = [_model_row(run, role, split, score, more) for role in roles]
    columns = [
        Column("model", "model", right=False),
        Column("parameters", "parameters"),
        Column("size", "size"),
        Column("score", f"{split} {score.unit}"),
        *(Column(one.key, one.unit) for one in more),
        Column("ood", f"ood {score.unit}"),
        Column("share", "of teacher %"),
        Column("agreement", "agreement %"),
        Column("kl", "KL"),
        Column("tokens", "tokens/s"),
        Column("latency", "latency ms"),
        Column("seconds", "train s"),
    ]
    columns = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    emphasised = [roles.index(subject)] if subject in roles and (emphasis() if bold is None else bold) else []
    lines = [render(rows, columns, bold=emphasised)] if rows else []
    return "\n".join([*lines, "", *_remarks(run, split, folder, score, more)])


def _model_row(run: Run, role: str, split: str, score: Score, more: Sequence[Score]) -> dict[str, object]:
    own, teacher = run.number(role, split, score.key), run.number("teacher", split, score.key)
    share = (
        None if own is None or not teacher or not (score.fraction and score.higher) else f"{100 * own / teacher:.1f}"
    )
    return {
        "model": role.replace("_", " "),
        "parameters": count(run.number(role, "parameters")),
        "size": size(run.number(role, "bytes")),
        "score": score.form(own),
        **{one.key: one.form(run.number(role, split, one.key)) for one in more},
        "ood": score.form(run.number(role, "ood", score.key)),
        "share": share,
        "agreement": None if role == "teacher" else percent(run.number(role, split, "agreement")),
        "kl": None if role == "teacher" or score.key == "acc" else number(run.number(role, split, "kl")),
        "tokens": count(run.number(role, "tokens_per_s")),
        "latency": number(run.number(role, "latency_ms")),
        "seconds": seconds(run.number(role, "seconds")),
    }


def _remarks(
    run: Run, split: str, folder: str | os.PathLike[str] | None, score: Score, more: Sequence[Score]
) -> list[str]:
    lines = [f"failed: {one_line(run.error)}"] if run.failed else []
    warned = run.result.get("warnings")
    lines += [f"warning: {one_line(warning)}" for warning in (warned if isinstance(warned, list) else [])]
    inside = split if run.number(run.subject, "ood", score.key) is None else f"{split}, inside the domain"
    for one in (score, *more):
        if (gained := _gain(run, split, one)) is not None:
            note = " (same network and budget, no teacher)" if one is score else ""
            lines.append(f"{run.subject} − baseline: {gained} on {inside}{note}")
    if (gained := _gain(run, "ood", score)) is not None:
        lines.append(f"{run.subject} − baseline: {gained} outside the domain")
    closed = gap_closed(run, split, score)
    if closed is not None and score.key != "acc":
        lines.append(f"gap closed: {percent(closed, places=0)} % of the way from baseline to teacher ({score.long})")
    if (errors := _errors(run)) is not None:
        lines.append(errors)
    ratios = [_ratio(run, "parameters", "fewer parameters"), _ratio(run, "bytes", "smaller")]
    if any(ratios):
        lines.append(f"{run.subject} against teacher: {', '.join(filter(None, ratios))}")
    if run.result.get("teacher_trained_on"):
        lines.append(f"teacher trained on: {one_line(run.result['teacher_trained_on'])}")
    start = mapping(run.result.get("continued_from"))
    if start:
        lines.append(f"goes on from {one_line(start.get('run'))}, after {one_line(start.get('epochs'))} epochs there")
    if any(run.number(role, "latency_ms") is not None for role in run.models):
        lines.append("latency: one example, one thread")
    if folder is not None:
        path = shorten(Path(folder))
        if (Path(folder) / DIAGNOSIS).is_file():
            lines.append(f"diagnosis: {one_line(path / DIAGNOSIS)}")
        lines += [f"run folder: {one_line(path)}", f"compare: python -m kdlab compare {shlex.quote(str(path.parent))}"]
    return lines


def _errors(run: Run) -> str | None:
    """Describe which errors the student inherited, in words; None where no teacher was measured beside it."""
    kinds = ("examples", "inherited", "own", "other", "corrected")
    numbers = [run.number(run.subject, "errors", kind) for kind in kinds]
    counts = [int(number) for number in numbers if number is not None]
    if len(counts) < len(kinds):
        return None
    examples, inherited, own, other, corrected = counts
    split = one_line(mapping(run.models[run.subject]["errors"]).get("split"))
    line = f"errors of the {run.subject} on {split}: {inherited + own + other} of {examples}"
    line += f"; {inherited} inherited from the teacher (the same wrong class), {own} its own, {other} other"
    line += f"; {corrected} corrected"
    alone = run.number("baseline", "errors", "inherited")
    return line if alone is None else f"{line}; the baseline, which learned without it, shares {alone:.0f}"


def shorten(path: Path) -> Path:
    """Return ``path`` relative to the working folder, where it lies below it; else unchanged."""
    try:
        return path.resolve().relative_to(Path.cwd().resolve())
    except ValueError:
        return path


def _ratio(run: Run, key: str, what: str) -> str | None:
    teacher, student = run.number("teacher", key), run.number(run.subject, key)
    if not teacher or not student or teacher <= student:
        return None
    ratio = teacher / student
    return f"{ratio:.0f}× {what}" if ratio >= 10 else f"{ratio:.1f}× {what}"


def _gain(run: Run, split: str, score: Score) -> str | None:
    """Return the student's score less the baseline's, in words: ``+0.56 points``, ``−1.890 ppl (better)``."""
    gain = beside(run, split, score)
    if gain is None:
        return None
    name = "" if score.key == "acc" else f" {score.short}"
    gained = f"{score.difference(gain)}{' points' if score.fraction else ''}{name}"
    return gained if score.higher else f"{gained} ({score.verdict(gain)})"


def _cells_wide(text: str) -> int:
    """Return the terminal cells that ``text`` takes: East Asian wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    if _cells_wide(text) > width:
        while text and _cells_wide(text) > width - 1:
            text = text[:-1]
        text += "…"
    space = " " * (width - _cells_wide(text))
    return space + text if right else text + space


def _fit(wide: list[int], right: Sequence[bool], width: int) -> list[int]:
    """Return column widths that fit ``width``, taken from the widest text columns first."""
    wide = list(wide)
    excess = sum(wide) + len(_GAP) * (len(wide) - 1) - width
    while excess > 0:
        shrinkable = [i for i, is_number in enumerate(right) if not is_number and wide[i] > _NARROWEST]
        if not shrinkable:
            break
        wide[max(shrinkable, key=lambda i: wide[i])] -= 1
        excess -= 1
    return wide
