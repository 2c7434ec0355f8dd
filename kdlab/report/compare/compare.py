"""``python -m kdlab compare``: runs side by side, from their folders alone.

Rows stand in the order of their validation score. The test split is shown and chooses nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from kdlab.errors import UserError
from kdlab.plain_text import one_line
from kdlab.report import table
from kdlab.report.compare import page, pictures
from kdlab.report.compare.comparison import Comparison, columns_of, footer, head, ordered, row
from kdlab.runs import spreadsheet
from kdlab.runs.measures import WIDE
from kdlab.runs.read import Found, Group, Run, scan
from kdlab.system import integrity
from kdlab.system.files import make_folder
from kdlab.system.terminal import warn

EPILOG = """\
columns: any setting by its dotted name (loss.temperature, optimizer.lr, ...), and
  val test baseline difference gap agreement parameters seconds bytes flops latency tokens teacher
  val_ce val_kl test_ce test_kl kl ece best_epoch total_seconds n run
  inherited own_errors corrected inherited_baseline (errors beside the teacher's)
  ood ood_teacher ood_baseline ood_difference
  val_em em ppl ppl_word wer cer pass@K where measured; each with _teacher, _baseline and _difference too

Runs that differ only in their seed are one row: mean and sample standard deviation over n seeds.
Rows are ranked on validation; the test split is shown, and chooses nothing. Perplexities of different data or target
tokens are not ranked: exact match on validation ranks such runs, if all of them have it.

examples:
  python -m kdlab compare outputs/kd_resnet
  python -m kdlab compare outputs/kd_resnet/sweep-1a2b3c4d --sort agreement
  python -m kdlab compare RUN_A RUN_B --columns val,test,latency --no-pictures
"""

UNFINISHED = "unfinished (running, or killed)"

LISTED = 10
"""Largest number of jobs that never began which are named at the end of a sweep."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``compare`` verb, and return the exit status; UserError is raised for what a user got wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    results = scan(args.paths)
    for warning in results.warnings:
        warn(warning)
    comparison = Comparison.of(results, each=args.each)
    columns, order = columns_of(comparison, args.columns), ordered(comparison, args.sort)
    bold = table.emphasis()
    width = table.terminal_width()
    fit = width is not None and args.columns is None
    table.show(report(comparison, columns, order, width=width, bold=bold, fit=fit))
    if args.csv:
        _write(lambda: write_csv(Path(args.csv), results, comparison), args.csv)
        table.show(f"table of every run: {args.csv}")
    if not args.no_pictures:
        command = shlex.join(["python", "-m", "kdlab", "compare", *argv])
        out = Path(args.out) if args.out else _home(Path(args.paths[0])) / "compare"
        # a folder that the user names may be a link; one that is found inside of somebody's runs may not
        _write(lambda: out.mkdir(parents=True, exist_ok=True) if args.out else make_folder(out), out)
        _write(lambda: _draw(comparison, results, columns, order, out, command), out)
    for warning in (text for run in results.runs for text in run.warnings):
        warn(warning)
    return 0


def sweep_table(folder: str | Path, jobs: Sequence[Path] = ()) -> str:
    """Return the table that ends a sweep: every setting ranked on validation, then failed and unfinished runs.

    Args:
        folder: folder of the sweep.
        jobs: folders of its jobs; those that do not exist are named as never begun.
    """
    never = [job for job in jobs if not job.exists()]
    results = Found()
    try:
        results = scan([folder])
    except UserError as error:
        lines = _others(UNFINISHED, [(job, "") for job in jobs if job.exists()])
        return "\n".join([*(lines or [str(error)]), *_others("never began", [(job, "") for job in never], LISTED)])
    for warning in results.warnings:
        warn(warning)
    comparison = Comparison.of(results)
    columns, width = columns_of(comparison), table.terminal_width()
    text = report(comparison, columns, comparison.groups, width=width, bold=table.emphasis(), fit=width is not None)
    text = "\n".join([text, *_others("never began", [(job, "") for job in never], LISTED)])
    path = table.shorten(Path(folder))
    return f"{text}\npictures and CSV: python -m kdlab compare {shlex.quote(str(path))}"


def report(
    comparison: Comparison,
    columns: Sequence[str],
    order: Sequence[Group],
    width: int | None = None,
    bold: bool = False,
    fit: bool = False,
) -> str:
    """Return the comparison as text: a title, the table, notes on reading it, and the failures.

    Args:
        comparison: comparison of the runs.
        columns: keys of the columns.
        order: groups in the order of the rows.
        width: largest number of characters of a line.
        bold: whether to emphasise the best row.
        fit: whether to leave columns out of a table of language models that is wider than that, and say so.
    """
    lines, left_out = [], list[str]()
    if order:
        rows = [row(one, comparison, columns) for one in order]
        if fit and width is not None and comparison.score.key != "acc":
            columns, left_out = _fitting(rows, columns, comparison, width)
        heads = [head(key, comparison) for key in ("rank", *columns)]
        best = [i for i, one in enumerate(order) if one.rank == 1] if bold and len(order) > 1 else []
        lines += [comparison.title, "", table.render(rows, heads, width=width, bold=best), ""]
        lines += footer(comparison, columns)
        if left_out:
            names = ", ".join(comparison.measures[key].title for key in left_out)
            lines.append(f"The terminal is too narrow for: {names} (in the CSV and the page, and --columns).")
    lines += _others("failed", [(run.folder, run.error) for run in comparison.failed])
    lines += _others(UNFINISHED, [(folder, "") for folder in comparison.unfinished])
    return "\n".join(lines)


def _fitting(
    rows: Sequence[dict[str, str | None]], columns: Sequence[str], comparison: Comparison, width: int
) -> tuple[list[str], list[str]]:
    """Return the columns that fit, and those left out."""
    kept, left_out = list(columns), list[str]()
    for key in WIDE:
        heads = [head(one, comparison) for one in ("rank", *kept)]
        if len(table.render(rows, heads, width=width).splitlines()[1]) <= width:
            break
        if key in kept:
            kept.remove(key)
            left_out.append(key)
    return kept, left_out


def write_csv(path: Path, found: Found, comparison: Comparison | None = None) -> None:
    """Write everything known about every run, a line each: failed and unfinished ones too, and never an average.

    Where the score of the runs does not compare, ``ranked_by`` says what does, or is empty.
    """
    rows = [flat(run) for run in found.runs]
    if comparison is not None and comparison.unlike:
        title = "" if comparison.ranks is None else comparison.ranks.title
        rows = [one | {"ranked_by": title, "not_comparable_by": ", ".join(comparison.unlike)} for one in rows]
    rows += [{"run": str(folder), "status": "unfinished"} for folder in found.unfinished]
    names = list(dict.fromkeys(name for one in rows for name in one))
    path.parent.mkdir(parents=True, exist_ok=True)
    spreadsheet.write_csv(path, names, rows)


def flat(run: Run) -> dict[str, Any]:
    """Return a run as one flat row: nested keys joined by dots, lists and schedules as JSON."""
    cells: dict[str, Any] = {"run": str(run.folder)}

    def add(prefix: str, value: object, depth: int) -> None:
        if isinstance(value, dict) and depth:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner, depth - 1)
        else:
            value = "" if value is None else value
            cells[prefix] = json.dumps(value) if isinstance(value, (dict, list)) else value

    # A setting's value stays in one cell: a schedule is one choice, not three. What only the folder needs is no cell.
    left_out = ("settings", "diagnosis", integrity.FILES, integrity.CHECKSUM)
    add("", {key: value for key, value in run.result.items() if key not in left_out}, 4)
    add("settings", run.settings, 1)
    return cells


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("compare", f"{message}; see python -m kdlab compare --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m kdlab compare",
        description="Compare runs from their folders alone: a table, a CSV, pictures, and one HTML page.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="run folders, sweep folders, or trees of them")
    add("--out", metavar="DIR", help="where pictures, CSV and page go (default: PATH/compare)")
    add("--csv", metavar="FILE", help="write the CSV of every run to FILE")
    add("--sort", metavar="KEY", help="order rows by a column instead, best first (--sort=-KEY: reversed)")
    add("--columns", metavar="A,B,...", help="show these columns (default: what differs, and the scores)")
    add("--each", action="store_true", help="a row for every run, seeds not brought together")
    add("--no-pictures", action="store_true", help="only the table; write nothing but --csv")
    return parser


def _others(what: str, entries: Sequence[tuple[Path, str]], most: int | None = None) -> list[str]:
    if not entries:
        return []
    lines = ["  " + one_line(f"{folder}: {error}" if error else folder) for folder, error in entries[:most]]
    lines += [f"  and {len(entries) - most} more"] if most is not None and len(entries) > most else []
    return ["", f"{len(entries)} {what}:", *lines]


def _home(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _draw(
    comparison: Comparison,
    results: Found,
    columns: Sequence[str],
    order: Sequence[Group],
    out: Path,
    command: str,
) -> None:
    write_csv(out / "runs.csv", results, comparison)
    drawn = pictures.draw(comparison, out)
    page.write(out / "index.html", comparison, columns, order, drawn, command)
    where = table.shorten(out)
    names = ", ".join(picture.path.name for picture in drawn)
    table.show(f"\nwritten to {where}: index.html, runs.csv{', ' if names else ''}{names}")


def _write(action: Any, where: object) -> None:
    try:
        action()
    except OSError as error:
        reason = error.strerror or error
        raise UserError("compare", f"cannot write to {str(where)!r} ({reason}); choose another place") from error
