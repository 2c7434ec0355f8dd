"""Classes and probabilities for inputs of yours, or what a language model writes, from a run folder alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kdlab.cli.main import Parser
from kdlab.errors import UserError
from kdlab.plain_text import one_line
from kdlab.runs.folder import read_model
from kdlab.system.terminal import say


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab predict RUN INPUT...``; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.top is not None and args.top < 1:
        raise UserError("predict", f"--top {args.top}", "at least 1")
    _exists(args.run)
    if _writes(args.run):
        for option in ("top", "out"):
            if (value := getattr(args, option)) is not None:
                raise UserError("predict", f"--{option} {value}, and {args.run} holds a language model", "without it")
        _text(args)
    else:
        _classes(args)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="kdlab predict", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run folder")
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="an image, a .npy array of one or more, or a .csv table with the run's columns; for a language model a "
        "text to go on with, or a file",
    )
    add("--out", type=Path, metavar="FILE.csv", help="classes: write the class and all probabilities of each input")
    add("--top", type=int, help="classes: how many to show (default 3)")
    add(
        "--new-tokens",
        type=int,
        help="text: the most tokens to write, 1 to the model's context (default 64, at most half of the context)",
    )
    add("--temperature", type=float, default=0.0, help="text: 0, the default, writes the most probable token")
    add("--samples", type=int, default=1, help="text: how many continuations of each (default 1)")
    add("--seed", type=int, default=0, help="text: of what is drawn (default 0)")
    add("--trust", action="store_true", help="let the run build modules found here; only for runs you made")
    return parser


def _classes(args: argparse.Namespace) -> None:
    """Show the most probable classes of each input, and write all of them where ``--out`` says."""
    paths = [Path(path) for path in args.inputs]
    for path in paths:
        _exists(path)
    if args.out is not None:
        _can_write(args.out, [args.run, *paths])
    from kdlab.inference.predict import predict
    from kdlab.inference.predict_table import summaries, write_predictions

    predictions = predict(args.run, paths, trust=args.trust)
    for one in predictions:
        best = sorted(one.probabilities.items(), key=lambda pair: -pair[1])[: args.top or 3]
        task = f"{one_line(one.task)}: " if one.task else ""
        say(f"{one_line(one.source)}: {task}" + ", ".join(f"{one_line(name)} {share:.1%}" for name, share in best))
    described = read_model(args.run)
    tasks = described.get("tasks") or {"": described["classes"]}
    for line in summaries(predictions, tasks):
        say(one_line(line))
    if args.out is not None:
        write_predictions(args.out, predictions, tasks)
        say(f"written to {one_line(args.out)}")


def _can_write(out: Path, used: Sequence[Path]) -> None:
    """Refuse a file that cannot be written, or that is read, before anything is computed."""
    if out.suffix.lower() != ".csv" or out.is_dir() or not out.parent.is_dir():
        raise UserError("predict", f"--out {out}", "a .csv file, in a folder that is there")
    if any(out.exists() and out.samefile(path) for path in used):
        raise UserError("predict", f"--out {out} is an input as well", "another file")


def _exists(path: Path) -> None:
    if not path.exists():
        raise UserError("predict", f"no such file or folder {str(path)!r}", "RUN INPUT...")


def _writes(run: Path) -> bool:
    """Return whether the run's model writes text; what is wrong with its folder is said where it is loaded."""
    try:
        return read_model(run)["target"] != "class"
    except UserError:
        return False


def _text(args: argparse.Namespace) -> None:
    """Show what a language model writes after each input."""
    if not 0 <= args.temperature < float("inf"):
        raise UserError("predict", f"--temperature {args.temperature:g}", "0 or more")
    if args.new_tokens is not None and args.new_tokens < 1:
        raise UserError("predict", f"--new-tokens {args.new_tokens}", "at least 1")
    from kdlab.inference.generate_text import complete

    completions = complete(
        args.run,
        args.inputs,
        new_tokens=args.new_tokens,
        temperature=args.temperature,
        samples=args.samples,
        seed=args.seed,
        trust=args.trust,
    )
    for place, one in enumerate(completions):
        if len(completions) > 1:
            number = f" ({one.sample + 1})" if args.samples > 1 else ""
            say(f"{chr(10) * (place > 0)}{one_line(one.source)}{number}:")
        say(one.prompt + one.text)
