"""Runs side by side: a table, CSV, and pictures."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab.cli.main import Parser
from kdlab.errors import UserError
from kdlab.system.files import make_folder
from kdlab.system.terminal import warn

if TYPE_CHECKING:
    from kdlab.report.compare.comparison import Comparison
    from kdlab.runs.read import Found, Group

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


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab compare PATH...``; returns the exit status."""
    args = _parser().parse_args(argv)
    from kdlab.report import table
    from kdlab.report.compare.comparison import Comparison, columns_of, ordered
    from kdlab.report.compare.summary import report, write_csv
    from kdlab.runs.read import scan

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


def _parser() -> Parser:
    parser = Parser(
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
    from kdlab.report import table
    from kdlab.report.compare import page, pictures
    from kdlab.report.compare.summary import write_csv

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
