"""What a student lost of its teacher and what it inherited, by class and by slice, in pictures."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlab.cli.main import Parser
from kdlab.errors import UserError

EPILOG = """\
Of the student's errors, inherited ones are the teacher's too (the same wrong class), its own are those where
the teacher is right; corrected are those that it gets right and the teacher wrong. Teacher and baseline are looked for
where the run found them; nothing is trained. Written into the run folder: diagnosis.json, .html and .png. A run with
a teacher that is no job of a sweep has written them already, of its test rows.

examples:
  python -m kdlab diagnose outputs/kd_resnet/RUN
  python -m kdlab diagnose RUN --slice people.csv:region --slice age     (age: a column of data=csv)
  python -m kdlab diagnose RUN --teacher outputs/teachers/resnet56-1a2b3c4d5e
"""


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab diagnose RUN``; returns the exit status."""
    parser = Parser(
        prog="kdlab diagnose",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder of a classifier")
    add("--split", choices=("test", "val"), default="test", help="of whose examples (default test)")
    add(
        "--slice",
        action="append",
        default=[],
        metavar="FILE.csv:COLUMN",
        help="count by the groups of a column too: a row for each example in order, or COLUMN of the table of data=csv",
    )
    add("--teacher", type=Path, metavar="FOLDER", help="compare with this network instead of the run's teacher")
    add("--baseline", type=Path, metavar="FOLDER", help="likewise, instead of the run's baseline")
    add("--no-pictures", action="store_true", help="only the table and diagnosis.json")
    add("--out", type=Path, metavar="DIR", help="where to write (default: the run folder)")
    add("--trust", action="store_true", help="let the run build modules found here; only for runs you made")
    args = parser.parse_args(argv)
    for path in (args.run, args.teacher, args.baseline):
        if path is not None and not path.is_dir():
            raise UserError("diagnose", f"no folder {str(path)!r}", "a run folder, such as one under outputs/")
    out = args.out or args.run
    try:
        _diagnose(args, out, shlex.join(["python", "-m", "kdlab", "diagnose", *argv]))
    except OSError as error:
        raise UserError(
            "diagnose", f"cannot write to {out} ({error.strerror or error}); --out names a place"
        ) from error
    return 0


def _diagnose(args: argparse.Namespace, out: Path, command: str) -> None:
    import torch

    from kdlab.cli.hydra.recompose import stages_of
    from kdlab.experiment.reload import rebuild
    from kdlab.report import table
    from kdlab.report.diagnosis import report
    from kdlab.report.diagnosis.inputs import DiagnosisInputs
    from kdlab.report.diagnosis.slices import groups

    stages = stages_of(args.run, args.trust)
    rebuilt = rebuild(args.run, stages=stages, teacher=args.teacher, baseline=args.baseline, trust=args.trust)
    split, data, config = args.split, rebuilt.data, rebuilt.experiment.data
    if not data.counts.get(split):
        raise UserError("diagnose", f"--split {split}, and {data.name} has no such rows", "a split that has some")
    logits, targets = rebuilt.answers(split, "cuda" if torch.cuda.is_available() else "cpu")
    sliced = {text: groups(text, config, data, split, targets) for text in args.slice}
    case = DiagnosisInputs(args.run, rebuilt.experiment.name, data, config, split, logits, targets)
    counted = case.count(sliced)
    counted["notes"] = rebuilt.notes + _other_numbers(args, counted)
    text = f"{case.title}\n\n{report.text(counted, table.terminal_width())}"
    names = case.write(counted, out, command, pictures=not args.no_pictures)
    table.show(f"{text}\n\nwritten to {table.shorten(out)}: {', '.join(names)}")


def _other_numbers(args: argparse.Namespace, counted: Mapping[str, Any]) -> list[str]:
    """Return a note on each network whose accuracy is not the one in ``result.json``: data or weights have changed."""
    from kdlab.runs.folder import read_result

    models = (read_result(args.run) or {}).get("models") or {}
    notes = []
    for role, one in counted["networks"].items():
        measured = ((models.get(role) or {}).get(args.split) or {}).get("acc")
        given = getattr(args, role, None) is not None
        if measured is not None and not given and abs(measured - one["accuracy"]) * counted["examples"] > 1.5:
            notes.append(
                f"{role}: {one['accuracy']:.2%} of the {args.split} split here and {measured:.2%} in result.json; data "
                "or weights are others now"
            )
    return notes
