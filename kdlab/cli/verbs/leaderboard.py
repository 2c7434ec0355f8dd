"""Run every method of a board with every seed, and show which of them helps."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab.cli.main import Parser
from kdlab.config import options
from kdlab.errors import UserError, unknown
from kdlab.plain_text import one_line
from kdlab.system.files import read_json
from kdlab.system.integrity import RESULT
from kdlab.system.terminal import say, warn

if TYPE_CHECKING:
    from kdlab.cli.hydra.compose import Composer, Composition
    from kdlab.report.leaderboard.leaderboard import Board, Entry
    from kdlab.runs.read import Run


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab leaderboard [BOARD] [OVERRIDES...]``: what has not run, then the board; returns the exit status."""
    parser = Parser(
        prog="kdlab leaderboard",
        description=__doc__,
        epilog="example: kdlab leaderboard digits --jobs 2; writes leaderboard.md, .json and .png below outputs/; "
        "an interrupted one goes on; a board of your own: conf/leaderboard/NAME.yaml",
    )
    parser.add_argument("board", nargs="?", help="a board; without it, all are listed")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="for all rows, such as epochs=10")
    parser.add_argument("--rows", help="A,B,...: these methods, and the two that others are held against")
    parser.add_argument("--seeds", help="0,1,...: other seeds than the board's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each (default: 1)")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="also time the methods' steps, in N rounds")
    parser.add_argument("--show", action="store_true", help="run nothing; show what has run")
    args = parser.parse_intermixed_args(argv)
    available = options.read(options.folders())
    if args.board is None:
        for name, title in sorted(available.boards.items()):
            say(f"{one_line(name):<12}{one_line(title)}")
        return 0
    board = _board(args, available)
    if args.jobs < 1:
        raise UserError("--jobs", args.jobs, "at least 1")
    with composed(board, args.overrides) as (points, composer):
        folder = _folder(board, args.overrides, points)
        if not args.show:
            _run_all(board, points, composer, folder, args.jobs)
        times = _times(board, points, composer, folder, args.time)
        return _show(board, points, folder, times)


def _board(args: argparse.Namespace, available: options.Options) -> Board:
    from kdlab.report.leaderboard.leaderboard import Board

    path = available.file(options.BOARDS, args.board)
    if path is None:
        raise unknown("leaderboard", args.board, available.boards, "board")
    rows = None if args.rows is None else [row.strip() for row in args.rows.split(",") if row.strip()]
    try:
        seeds = None if args.seeds is None else [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError("--seeds", f"{args.seeds!r}", "whole numbers, such as 0,1,2") from None
    return Board.read(path).only(rows, seeds)


Points = dict[tuple["Entry", int], "Composition"]
"""Composition of each run of a board, by entry and seed."""


@contextmanager
def composed(board: Board, more: Sequence[str]) -> Iterator[tuple[Points, Composer]]:
    """Compose and validate every run of a board, before anything is written; yields them, and their composer."""
    from kdlab.cli.hydra.compose import composer, refuse_hydra
    from kdlab.cli.hydra.plan import QUIET, refuse_sweeps
    from kdlab.cli.hydra.sweep import check_writable
    from kdlab.cli.validate import validate
    from kdlab.config import builder

    quiet = [f"{key}={value}" for key, value in QUIET.items()]
    points: Points = {}
    with composer() as made, builder.trust(user_modules=True):
        for entry in board.entries():
            for seed in board.seeds:
                try:
                    parsed = made.parse([*board.overrides(entry, seed), *more])
                    refuse_sweeps(parsed)
                    refuse_hydra(parsed)
                    points[entry, seed] = made.compose([*quiet, *(str(one.input_line) for one in parsed)])
                    validate(points[entry, seed], made)
                except UserError as error:
                    raise error.inside(f"{board.name}, {entry.row}") from None
                if len(points) == 1:  # composing the others takes a while
                    check_writable(Path(str(points[entry, seed].config["output"])))
        yield points, made


def _folder(board: Board, more: Sequence[str], points: Points) -> Path:
    """Return the folder of a board's runs, named by the board and a hash of what was added to it."""
    from kdlab.config import builder

    first = next(iter(points.values())).config
    kept = [text for text in more if not text.startswith("output=")]
    name = board.name if not kept else f"{board.name}-{builder.config_hash({'overrides': sorted(kept)})[:6]}"
    return Path(str(first["output"])) / options.BOARDS / name


def _place(folder: Path, entry: Entry, seed: int, point: Composition) -> Path:
    from kdlab.config import builder

    return folder / entry.row / f"seed-{seed}-{builder.config_hash(point.config)[:8]}"


def _run_all(board: Board, points: Points, composer: Composer, folder: Path, jobs: int) -> None:
    """Run what has not run, ``jobs`` runs at a time, and leave to other processes what they are at."""
    from kdlab.cli.hydra.job import note_end, run_or_skip
    from kdlab.cli.hydra.sweep import WRITABLE, read_any
    from kdlab.cli.hydra.workers import pool

    # seed by seed, so that a board that is cut short has all methods over fewer seeds
    ordered = sorted(points.items(), key=lambda item: board.seeds.index(item[0][1]))
    runs = []
    for number, ((entry, seed), point) in enumerate(ordered, 1):
        words = " ".join(filter(None, (f"[{number}/{len(points)}]", entry.row, entry.setting, f"seed={seed}")))
        runs.append((point, _place(folder, entry, seed, point), words))
    # what failed before runs last: it might keep others from running
    runs.sort(key=lambda one: read_any(one[1]).get("status") == "failed")

    def work(number: int | None) -> None:
        if number is None:
            return _check_all(board, points)
        point, place, words = runs[number]
        run_or_skip(point, composer, place, words)
        return None

    with pool(jobs, work) as workers:
        workers.call(None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("output", f"{folder}: {error.strerror}; {WRITABLE}") from None
        say(f"{len(points)} runs ({len(board.rows)} methods) in {one_line(folder)}")
        for number, outcome in workers.run(range(len(runs))):
            if outcome.error is not None:
                point, place, words = runs[number]
                note_end(point, place, words, outcome)


def _check_all(board: Board, points: Points) -> None:
    """Let the parts of every row refuse values, before anything is written."""
    from kdlab.cli.start import preflight

    for entry in board.entries():
        try:
            preflight([points[entry, board.seeds[0]]])
        except UserError as error:
            raise error.inside(f"{board.name}, {entry.row}") from None


def _times(board: Board, points: Points, composer: Composer, folder: Path, rounds: int) -> dict[str, float]:
    """Return row → the median time of a step relative to ``board.relative_to``; it is kept beside the runs.

    The methods take turns, and each is held against the other of its own round, since machines have moods.
    """
    from kdlab.cli.hydra.workers import pool
    from kdlab.system.files import atomic_write

    path = folder / "times.json"
    if rounds < 1:
        return _known_times(path)
    chosen = {entry.row: points[entry, board.seeds[0]] for entry in reversed(list(board.entries()))}
    ratios: dict[str, list[float]] = {row: [] for row in board.rows}
    with tempfile.TemporaryDirectory() as place, pool(1, partial(_step, chosen, composer, Path(place))) as worker:
        for number in range(rounds):
            say(f"timing, round {number + 1} of {rounds}")
            spent = {row: worker.call((number, row)) for row in board.rows}
            for row, seconds in spent.items():
                ratios[row].append(seconds / spent[board.relative_to])
    medians = {row: statistics.median(each) for row, each in ratios.items()}
    with atomic_write(path) as file:
        file.write(json.dumps(medians, indent=1).encode())
    return medians


def _known_times(path: Path) -> dict[str, float]:
    """Return the times that an earlier command measured; none, with a warning, where they cannot be read."""
    try:
        times = read_json(path) if path.exists() else {}
        return {row: float(ratio) for row, ratio in times.items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        warn(f"{path}: damaged, not shown ({error})")
        return {}


def _step(chosen: dict[str, Composition], composer: Composer, place: Path, asked: tuple[int, str]) -> float:
    """Measure the seconds of one training step of a row, in a run without baseline and validation."""
    from kdlab.cli.hydra.job import run

    number, row = asked
    again = composer.compose([*chosen[row].overrides, "baseline=false", "data.val=0"])
    result = run(again, composer, place / f"{number}-{row}")
    return float(result["seconds"]["student"]) / float(result["steps"])


def _show(board: Board, points: Points, folder: Path, times: dict[str, float]) -> int:
    from kdlab.cli.hydra.sweep import read_any
    from kdlab.config import builder
    from kdlab.report import table
    from kdlab.report.leaderboard.leaderboard import Results
    from kdlab.report.leaderboard.picture import draw
    from kdlab.runs.read import Run
    from kdlab.system.files import atomic_write

    runs: dict[tuple[Any, int], Run] = {}
    for (entry, seed), point in points.items():
        place = _place(folder, entry, seed, point)
        result = read_any(place)
        if not result and (place / RESULT).exists():
            warn(f"{place / RESULT}: damaged, left out")
        if result and result.get("config_hash", builder.config_hash(point.config)) == builder.config_hash(point.config):
            runs[entry, seed] = Run(place, result)
    if not any(not run.failed for run in runs.values()):
        raise UserError("leaderboard", f"no finished run in {folder}", "without --show, which runs them")
    results = Results.of(board, runs, times)
    table.show("\n" + table.render(results.rows(), results.columns, width=table.terminal_width()))
    table.show("\n" + "\n".join(results.notes))
    with atomic_write(folder / "leaderboard.md") as file:
        file.write(results.markdown().encode())
    with atomic_write(folder / "leaderboard.json") as file:
        file.write(json.dumps(results.record(), indent=1).encode())
    draw(results, folder / "leaderboard.png")
    say(f"\nwritten: {one_line(folder / 'leaderboard.md')}, .json, .png")
    missing = len(points) - sum(not run.failed for run in runs.values())
    if missing:
        say(f"kdlab: error: {missing} of {len(points)} runs are missing; the same command runs them", file=sys.stderr)
    return 1 if missing else 0
