"""``python -m kdlab compare``: runs side by side, from their folders alone.

Rows stand in the order of their validation score. The test split is shown and chooses nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from kdlab.errors import UserError, unknown
from kdlab.runs import table
from kdlab.runs.read import Found, Group, Run, clean, differing, finite, group, same, scan, setting, short
from kdlab.runs.table import DEFAULT, SCORES, Measure, Score, measures, score_of

_MOST_SETTINGS = 6
"""Differing settings that a terminal table shows; the rest are in the CSV."""

EPILOG = """\
columns: any setting by its dotted name (loss.temperature, optimizer.lr, ...), and
  val test baseline difference agreement parameters seconds bytes flops latency teacher
  val_ce val_kl test_ce test_kl ece best_epoch total_seconds n run

Runs that differ only in their seed are one row: mean and sample standard deviation over n seeds.
Rows are ranked on validation; the test split is shown, and chooses nothing.

examples:
  python -m kdlab compare outputs/kd_resnet
  python -m kdlab compare outputs/kd_resnet/sweep-1a2b3c4d --sort agreement
  python -m kdlab compare RUN_A RUN_B --columns val,test,latency --no-pictures
"""


@dataclass
class Comparison:
    """Runs sorted out: grouped over seeds, ranked, with what differs between them."""

    groups: list[Group]
    measures: dict[str, Measure]
    differs: list[str]
    runs: list[Run]
    """The finished runs that count, those of all groups."""
    failed: list[Run] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    repeats: list[Run] = field(default_factory=list)

    @classmethod
    def of(cls, found: Found, each: bool = False) -> Comparison:
        """Group and rank what was found; ``each`` keeps every run a row of its own."""
        groups, repeats = group(found.finished)
        if each:
            groups = [Group(run.settings, [run]) for run in found.finished]
            repeats = []
        runs = [run for one in groups for run in one.runs]
        numbers = measures(runs)
        differs = differing(runs)
        if each and len({same(run.seed) for run in runs}) > 1:
            differs.append("seed")
        ranking = ranked(groups, numbers["val"])
        return cls(ranking, numbers, differs, runs, found.failed, found.unfinished, repeats)

    @property
    def score(self) -> Score:
        """What the runs are judged by."""
        return SCORES[score_of(self.runs)]

    @property
    def seeds(self) -> int:
        """The most runs that one row stands for."""
        return max((len(one.runs) for one in self.groups), default=0)

    @property
    def title(self) -> str:
        """What is compared, in a line: the settings that all runs share, and how many runs."""
        shared = constant(self.runs, ("name", "data", "teacher", "student"))
        nets = [setting(shared[key]) for key in ("teacher", "student") if shared.get(key) is not None]
        parts = [setting(shared[key]) for key in ("name", "data") if key in shared] + [" → ".join(nets)]
        count = f"{len(self.runs)} run{'s' * (len(self.runs) != 1)}"
        if len(self.groups) != len(self.runs):
            count += f" in {len(self.groups)} setting{'s' * (len(self.groups) != 1)}"
        return " · ".join([part for part in parts if part] + [count])


def constant(runs: Sequence[Run], keys: Iterable[str]) -> dict[str, Any]:
    """Those settings of ``keys`` that all the runs have, with one value."""
    first = runs[0].settings if runs else {}
    return {k: first[k] for k in keys if k in first and len({same(run.settings.get(k)) for run in runs}) == 1}


def ranked(groups: Iterable[Group], measure: Measure) -> list[Group]:
    """The groups, best first by ``measure``, each with its rank; those without it last, unranked."""
    known, unknown = list[tuple[float, Group]](), list[Group]()
    for one in groups:
        stat = one.stat(measure.get)
        if stat is None:
            unknown.append(one)
        else:
            known.append((-stat.mean if measure.higher else stat.mean, one))
    known.sort(key=lambda pair: pair[0])
    for place, (_, one) in enumerate(known, 1):
        one.rank = place
    for one in unknown:
        one.rank = None
    return [one for _, one in known] + unknown


def main(argv: Sequence[str] | None = None) -> int:
    """The ``compare`` verb. Returns the exit status; raises UserError for what a user got wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    found = scan(args.paths)
    for warning in found.warnings:
        print(f"kdlab: warning: {clean(warning)}", file=sys.stderr)
    comparison = Comparison.of(found, each=args.each)
    columns = _columns(comparison, args.columns, limit=_MOST_SETTINGS)
    order = _sorted(comparison, args.sort)
    bold = table.emphasis()
    table.show(report(comparison, columns, order, width=table.terminal_width(), bold=bold))
    if args.csv:
        _write(lambda: write_csv(Path(args.csv), found), args.csv)
        table.show(f"table of every run: {args.csv}")
    if not args.no_pictures:
        command = shlex.join(["python", "-m", "kdlab", "compare", *argv])
        out = Path(args.out) if args.out else _home(Path(args.paths[0])) / "compare"
        _write(lambda: _draw(comparison, found, columns, order, out, command), out)
    return 0


def sweep_table(folder: str | Path) -> str:
    """The table that ends a sweep: every setting ranked on validation, then what failed or did not finish."""
    found = Found()
    try:
        found = scan([folder])
    except UserError as error:
        return str(error)
    comparison = Comparison.of(found)
    columns = _columns(comparison, None, limit=_MOST_SETTINGS)
    text = report(comparison, columns, comparison.groups, width=table.terminal_width(), bold=table.emphasis())
    path = table.shorten(Path(folder))
    return f"{text}\npictures and CSV: python -m kdlab compare {shlex.quote(str(path))}"


def report(
    comparison: Comparison,
    columns: Sequence[str],
    order: Sequence[Group],
    width: int | None = None,
    bold: bool = False,
) -> str:
    """The comparison as text: a title, the table, what it means, and what failed."""
    lines = []
    if order:
        rows = [row(one, comparison, columns) for one in order]
        heads = [head(key, comparison) for key in ("rank", *columns)]
        best = [i for i, one in enumerate(order) if one.rank == 1] if bold and len(order) > 1 else []
        lines += [comparison.title, "", table.render(rows, heads, width=width, bold=best), ""]
        lines += footer(comparison, columns)
    lines += _others("failed", [(run.folder, run.error) for run in comparison.failed])
    lines += _others("unfinished (running, or killed)", [(folder, "") for folder in comparison.unfinished])
    return "\n".join(lines)


def row(one: Group, comparison: Comparison, columns: Iterable[str]) -> dict[str, str | None]:
    """The cells of a group, written out, by column key."""
    cells: dict[str, str | None] = {"rank": None if one.rank is None else str(one.rank)}
    for key in columns:
        if key in comparison.measures:
            measure = comparison.measures[key]
            cells[key] = measure.write(one.stat(measure.get))
        elif key == "n":
            cells[key] = str(len(one.runs))
        elif key == "run":
            cells[key] = one.runs[0].label + (f" and {len(one.runs) - 1} more" if len(one.runs) > 1 else "")
        elif key in one.settings:
            cells[key] = setting(one.settings[key])
    return cells


def head(key: str, comparison: Comparison) -> table.Column:
    """The heading of a column, and the side its cells stand on."""
    if key in comparison.measures:
        return table.Column(key, comparison.measures[key].title)
    if key in ("rank", "n"):
        return table.Column(key, "#" if key == "rank" else key)
    numbers = all(isinstance(one.settings.get(key), (int, float, type(None))) for one in comparison.groups)
    return table.Column(key, short(key), right=numbers and key != "run")


def footer(comparison: Comparison, columns: Sequence[str]) -> list[str]:
    """What a reader must know to read the table rightly."""
    lines = ["Ranked on validation; the test split is shown, and chooses nothing."]
    if all(one.rank is None for one in comparison.groups):
        lines = ["Nothing was validated, so nothing is ranked; the test split is shown, and chooses nothing."]
    if comparison.seeds > 1:
        lines.append(f"a ± b: mean and sample standard deviation over n seeds (up to {comparison.seeds}).")
    if "difference" in columns:
        lines.append("gain: test score of the student, less that of the same student trained without a teacher.")
    hidden = [key for key in comparison.differs if key not in columns]
    if hidden:
        shown = ", ".join(map(clean, hidden[:4])) + (", ..." if len(hidden) > 4 else "")
        lines.append(f"{len(hidden)} more settings differ ({shown}): see the CSV, or --columns.")
    if comparison.repeats:
        lines.append(f"{len(comparison.repeats)} repeated runs left out (same config, same seed: the latest counts).")
    return lines


def write_csv(path: Path, found: Found) -> None:
    """Everything known about every run, a line each: failed and unfinished ones too, and never an average."""
    rows = [flat(run) for run in found.runs]
    rows += [{"run": str(folder), "status": "unfinished"} for folder in found.unfinished]
    names = list(dict.fromkeys(name for one in rows for name in one))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def flat(run: Run) -> dict[str, Any]:
    """A run as one flat row: nested keys joined by dots, lists and schedules as JSON."""
    cells: dict[str, Any] = {"run": str(run.folder)}

    def add(prefix: str, value: Any, depth: int) -> None:
        if isinstance(value, dict) and depth:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner, depth - 1)
        else:
            value = "" if value is None else value
            cells[prefix] = json.dumps(value) if isinstance(value, (dict, list)) else value

    # A setting's value stays in one cell: a schedule is one choice, not three.
    add("", {key: value for key, value in run.result.items() if key != "settings"}, 4)
    add("settings", run.settings, 1)
    return cells


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"compare: {message}; see python -m kdlab compare --help")


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


def _columns(comparison: Comparison, wanted: str | None, limit: int) -> list[str]:
    if wanted is not None:
        return [_known("columns", key.strip(), comparison) for key in wanted.split(",") if key.strip()]
    scores = [key for key in DEFAULT if _measured(key, comparison)]
    if len(comparison.groups) == 1 or not comparison.differs:
        return ["run", *scores]
    # Runs kept apart for a difference that no setting shows are told apart by their folders.
    labels = [one.label(comparison.differs) for one in comparison.groups]
    extra = ["run"] if len(set(labels)) < len(labels) else []
    many = ["n"] if comparison.seeds > 1 else []
    return [*comparison.differs[:limit], *extra, *many, *scores]


def _measured(key: str, comparison: Comparison) -> bool:
    return any(comparison.measures[key].get(run) is not None for run in comparison.runs)


def _known(option: str, key: str, comparison: Comparison) -> str:
    settings = {name for run in comparison.runs for name in run.settings}
    accepted = {*comparison.measures, *settings, "n", "run"}
    if key not in accepted:
        raise unknown(option, key, accepted, "column")
    return key


def _sorted(comparison: Comparison, wanted: str | None) -> list[Group]:
    """The groups in the order asked for; ranks stay those of validation."""
    if not wanted:
        return comparison.groups
    backwards, key = wanted.startswith("-"), _known("sort", wanted.removeprefix("-"), comparison)
    measure = comparison.measures.get(key)

    def place(one: Group) -> tuple[int, float, str]:
        stat = one.stat(measure.get) if measure else None
        if measure:
            return (0, -stat.mean if measure.higher else stat.mean, "") if stat else (1, 0.0, "")
        value = len(one.runs) if key == "n" else one.runs[0].label if key == "run" else one.settings.get(key)
        amount = finite(value)
        return (0, amount, "") if amount is not None else (1 + (value is None), 0.0, setting(value))

    known = sorted(comparison.groups, key=place)
    if not backwards:
        return known
    absent = [one for one in known if measure and one.stat(measure.get) is None]
    return [one for one in reversed(known) if one not in absent] + absent


def _others(what: str, entries: Sequence[tuple[Path, str]]) -> list[str]:
    if not entries:
        return []
    lines = ["  " + clean(f"{folder}: {error}" if error else folder) for folder, error in entries]
    return ["", f"{len(entries)} {what}:", *lines]


def _home(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _draw(
    comparison: Comparison,
    found: Found,
    columns: Sequence[str],
    order: Sequence[Group],
    out: Path,
    command: str,
) -> None:
    from kdlab.runs import page, pictures

    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "runs.csv", found)
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
        raise UserError(f"compare: cannot write to {str(where)!r} ({reason}); choose another place") from error
