"""Score a network on the test split, such as a published checkpoint; nothing else is trained."""

from __future__ import annotations

from collections.abc import Sequence

from kdlab.cli.main import Parser
from kdlab.plain_text import one_line
from kdlab.system.terminal import say


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab evaluate OVERRIDES...``; returns the exit status."""
    parser = Parser(
        prog="kdlab evaluate",
        description=__doc__,
        epilog="example: kdlab evaluate data=cifar10 data.root=DIR teacher=resnet56_a "
        "teacher.checkpoint=FILE teacher.net.mean=imagenet teacher.net.std=imagenet (teacher.weights=ema takes the "
        "average in a file that holds one beside the plain weights; teacher.checkpoint=RUN names a run folder)",
    )
    parser.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="as for an experiment: teacher, data, ...")
    args = parser.parse_args(argv)
    from kdlab.cli.console import log_shown
    from kdlab.cli.hydra.plan import Flags
    from kdlab.cli.start import planned

    with planned(Flags(tuple(args.overrides))) as plan, log_shown():
        from kdlab.experiment import evaluate_teacher

        result = evaluate_teacher(plan.points[0].config)
    say(f"teacher: {result['parameters']:,} parameters, trained on {one_line(result['trained_on'])}")
    for note in result["notes"]:
        say(f"data: {one_line(note)}")
    for split in ("val", "test", "ood"):
        if split in result:
            scores = "  ".join(f"{one_line(name)} {value:.4f}" for name, value in sorted(result[split].items()))
            say(f"{split:<8}{result['counts'][split]:>7,} rows  {scores}")
    return 0
