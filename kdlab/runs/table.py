"""Plain aligned tables for the terminal, and the short table that ends a run.

What is shown may come from somebody else's run folder, so control characters never reach the terminal.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from kdlab.runs.read import Run, Stat, clean, finite, mapping

ABSENT = "–"
_GAP = "  "
_NARROWEST = 10
_PLAIN = {"±": "+/-", "×": "x", "–": "-", "−": "-", "·": "|", "→": "->", "…": "~", "─": "-"}


@dataclass(frozen=True)
class Column:
    """One column: the key of its cells in a row, its heading, and the side it is aligned to."""

    key: str
    title: str
    right: bool = True
    """Numbers stand right; text stands left, and is shortened where the table is too wide."""


def render(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[Column],
    *,
    width: int | None = None,
    bold: Collection[int] = (),
) -> str:
    """A table of text: a heading, a rule, a line for each row.

    Args:
        rows: cells by column key; a missing or None cell is shown as a dash.
        columns: which cells, in which order.
        width: characters a line may take; text columns are shortened to fit, numbers never. None: no limit.
        bold: the rows to emphasise (the caller asks :func:`emphasis` whether the terminal shows it).
    """
    cells = [[ABSENT if row.get(c.key) is None else clean(row[c.key]) for c in columns] for row in rows]
    titles = [clean(c.title) for c in columns]
    wide = [max(map(_cells_wide, column)) for column in zip(titles, *cells, strict=True)]
    if width is not None:
        wide = _fit(wide, [c.right for c in columns], width)

    def line(values: Sequence[str]) -> str:
        return _GAP.join(_pad(v, w, c.right) for v, w, c in zip(values, wide, columns, strict=True)).rstrip()

    out = [line(titles), "─" * (sum(wide) + len(_GAP) * (len(wide) - 1))]
    out += [f"\x1b[1m{line(row)}\x1b[0m" if i in bold else line(row) for i, row in enumerate(cells)]
    return "\n".join(out)


def emphasis(stream: TextIO | None = None) -> bool:
    """Whether ``stream`` (standard output) is a terminal that shows bold type, and the user wants it."""
    stream = stream or sys.stdout
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Characters in a line of the terminal, 80 at least; None where the output goes to a file or a pipe."""
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
    print(text, file=stream, flush=True)


def percent(value: float | None, signed: bool = False) -> str | None:
    """A fraction in per cent, two decimals, without the sign: 0.9778 is ``97.78``."""
    if value is None:
        return None
    return f"{100 * value:+.2f}".replace("-", "−") if signed else f"{100 * value:.2f}"


def count(value: float | None) -> str | None:
    """A whole number with thousands apart."""
    return None if value is None else f"{value:,.0f}"


def size(value: float | None) -> str | None:
    """Bytes for people: 21.4 kB, 1.1 MB (powers of 1000)."""
    if value is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def seconds(value: float | None) -> str | None:
    """Seconds with as many decimals as matter."""
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def number(value: float | None, digits: int = 3) -> str | None:
    """A plain number, to ``digits`` significant places."""
    return None if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def run_table(result: Mapping[str, Any], folder: str | os.PathLike[str] | None = None, bold: bool | None = None) -> str:
    """What a run comes to: a row for each model, the difference that distillation made, where to look next.

    Args:
        result: what ``result.json`` holds.
        folder: the run folder, for the last two lines.
        bold: emphasise the trained model; None: if standard output is a terminal.
    """
    run = Run(Path(folder or "."), dict(result))
    subject = run.subject
    roles = [role for role in ("teacher", subject, "baseline") if role in run.models]
    roles += [role for role in run.models if role not in roles]
    split = "test" if any(_score(run, role, "test") is not None for role in roles) else "val"
    title = "test" if split == "test" else "val"
    rows = [_model_row(run, role, split) for role in roles]
    columns = [
        Column("model", "model", right=False),
        Column("parameters", "parameters"),
        Column("size", "size"),
        Column("score", f"{title} acc %" if _percent(run, split) else f"{title} ppl"),
        Column("share", "of teacher %"),
        Column("agreement", "agreement %"),
        Column("latency", "latency ms"),
        Column("seconds", "train s"),
    ]
    columns = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    emphasised = [roles.index(subject)] if subject in roles and (emphasis() if bold is None else bold) else []
    lines = [render(rows, columns, bold=emphasised)] if rows else []
    return "\n".join([*lines, "", *_remarks(run, split, folder)])


def _model_row(run: Run, role: str, split: str) -> dict[str, object]:
    score, teacher = _score(run, role, split), _score(run, "teacher", split)
    as_percent = _percent(run, split)
    return {
        "model": role.replace("_", " "),
        "parameters": count(run.number(role, "parameters")),
        "size": size(run.number(role, "bytes")),
        "score": percent(score) if as_percent else number(score, 4),
        "share": f"{100 * score / teacher:.1f}" if as_percent and score is not None and teacher else None,
        "agreement": None if role == "teacher" else percent(run.number(role, split, "agreement")),
        "latency": number(run.number(role, "latency_ms")),
        "seconds": seconds(run.number(role, "seconds")),
    }


def _remarks(run: Run, split: str, folder: str | os.PathLike[str] | None) -> list[str]:
    lines = [f"failed: {clean(run.error)}"] if run.failed else []
    student, baseline = _score(run, run.subject, split), _score(run, "baseline", split)
    if student is not None and baseline is not None:
        gain = student - baseline
        points = f"{percent(gain, True)} points" if _percent(run, split) else f"{gain:+.3g}"
        lines.append(f"{run.subject} − baseline: {points} on {split} (same network and budget, no teacher)")
    ratios = [_ratio(run, "parameters", "fewer parameters"), _ratio(run, "bytes", "smaller")]
    if any(ratios):
        lines.append(f"{run.subject} against teacher: {', '.join(filter(None, ratios))}")
    if run.result.get("teacher_trained_on"):
        lines.append(f"teacher trained on: {clean(run.result['teacher_trained_on'])}")
    if any(run.number(role, "latency_ms") is not None for role in run.models):
        lines.append("latency: one example, one thread")
    if folder is not None:
        path = shorten(Path(folder))
        lines += [f"run folder: {path}", f"compare: python -m kdlab compare {shlex.quote(str(path.parent))}"]
    return lines


def shorten(path: Path) -> Path:
    """``path`` as seen from here, where it lies below; else as it is."""
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


def _score(run: Run, role: str, split: str) -> float | None:
    value = run.number(role, split, "acc")
    return run.number(role, split, "ppl") if value is None else value


def _percent(run: Run, split: str) -> bool:
    models = run.models.values()
    return any(finite(mapping(model.get(split)).get("acc")) is not None for model in models)


def _cells_wide(text: str) -> int:
    """Terminal cells that ``text`` takes: East Asian wide characters take two, combining ones none."""
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
    """Column widths that fit ``width``, taken from the widest text columns first."""
    wide = list(wide)
    excess = sum(wide) + len(_GAP) * (len(wide) - 1) - width
    while excess > 0:
        shrinkable = [i for i, is_number in enumerate(right) if not is_number and wide[i] > _NARROWEST]
        if not shrinkable:
            break
        wide[max(shrinkable, key=lambda i: wide[i])] -= 1
        excess -= 1
    return wide


class Score(NamedTuple):
    """What models are judged by, and how it reads."""

    short: str
    long: str
    fraction: bool
    """Whether it is a fraction that is shown in per cent."""
    higher: bool
    """Whether more is better."""


SCORES = {
    "acc": Score("acc", "accuracy", True, True),
    "ppl": Score("ppl", "perplexity", False, False),
    "ce": Score("CE", "cross-entropy", False, False),
}
"""By key in ``result.json``; the first one measured counts."""


@dataclass(frozen=True)
class Measure:
    """One number of a run: how to get it, what to call it, how to write it."""

    key: str
    title: str
    get: Callable[[Run], float | None]
    form: Callable[[float | None], str | None]
    higher: bool = True
    """Whether more is better, and so comes first where rows are sorted by it."""
    spread: bool = True
    """Whether seeds can move it: the deviation of a parameter count says nothing."""

    def write(self, stat: Stat | None) -> str | None:
        """``mean ± std``; the mean alone for one run; None where there is no number."""
        if stat is None:
            return None
        mean = self.form(stat.mean)
        if stat.std is None or not self.spread:
            return mean
        return f"{mean} ± {(self.form(stat.std) or '').lstrip('+')}"


def score_of(runs: Sequence[Run]) -> str:
    """What these runs are judged by: accuracy, else perplexity, else cross-entropy."""
    for key in SCORES:
        if any(run.number(run.subject, split, key) is not None for run in runs for split in ("val", "test")):
            return key
    return "acc"


def measures(runs: Sequence[Run]) -> dict[str, Measure]:
    """Everything that ``compare`` can show or sort by, by key, with ``val`` first: the one that ranks."""
    score = score_of(runs)
    title, _, fraction, higher = SCORES[score]
    unit = f"{title} %" if fraction else title
    form: Callable[..., str | None] = percent if fraction else lambda v: number(v, 4)

    def of(*path: str, role: str | None = None) -> Callable[[Run], float | None]:
        return lambda run: run.number(role or run.subject, *path)

    def gain(run: Run) -> float | None:
        mine, alone = run.number(run.subject, "test", score), run.number("baseline", "test", score)
        return None if mine is None or alone is None else mine - alone

    def signed(value: float | None) -> str | None:
        return percent(value, True) if fraction else None if value is None else f"{value:+.3g}"

    all_of_them = [
        Measure("val", f"val {unit}", of("val", score), form, higher),
        Measure("test", f"test {unit}", of("test", score), form, higher),
        Measure("baseline", f"baseline {unit}", of("test", score, role="baseline"), form, higher),
        Measure("difference", "gain", gain, signed, higher),
        Measure("agreement", "agree %", lambda run: _either(run, "agreement"), percent),
        Measure("parameters", "params", of("parameters"), count, False, False),
        Measure("seconds", "train s", _seconds, seconds, False),
        Measure("bytes", "size", of("bytes"), size, False, False),
        Measure("flops", "flops", of("flops"), count, False, False),
        Measure("latency", "latency ms", of("latency_ms"), number, False),
        Measure("teacher", f"teacher {unit}", of("test", score, role="teacher"), form, higher),
        Measure("val_ce", "val CE", of("val", "ce"), number, False),
        Measure("val_kl", "val KL", of("val", "kl"), number, False),
        Measure("test_ce", "test CE", of("test", "ce"), number, False),
        Measure("test_kl", "test KL", of("test", "kl"), number, False),
        Measure("ece", "test ECE", of("test", "ece"), number, False),
        Measure("best_epoch", "best epoch", lambda run: finite(run.result.get("best_epoch")), count, False),
        Measure("total_seconds", "total s", lambda run: _clock(run, "total"), seconds, False),
    ]
    return {measure.key: measure for measure in all_of_them}


DEFAULT = ("val", "test", "baseline", "difference", "agreement", "parameters", "seconds")


def _either(run: Run, key: str) -> float | None:
    value = run.number(run.subject, "test", key)
    return run.number(run.subject, "val", key) if value is None else value


def _seconds(run: Run) -> float | None:
    value = run.number(run.subject, "seconds")
    return _clock(run, run.subject) if value is None else value


def _clock(run: Run, key: str) -> float | None:
    spent = run.result.get("seconds")
    return finite(spent.get(key)) if isinstance(spent, Mapping) else None
