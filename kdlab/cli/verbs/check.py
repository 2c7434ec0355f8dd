"""Preflight: everything that can be known before training, checked; nothing is trained or written."""

from __future__ import annotations

from collections.abc import Sequence

from kdlab.cli.main import Parser
from kdlab.plain_text import one_line
from kdlab.system.terminal import say


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab check [-m] OVERRIDES...``; returns the exit status, 2 if anything is wrong."""
    parser = Parser(
        prog="kdlab check",
        description=__doc__,
        epilog="example: kdlab check -m experiment=kd_resnet loss.temperature=1,2,4 seed=0,1,2",
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="check every point of a sweep")
    parser.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="as for an experiment")
    args = parser.parse_intermixed_args(argv)
    from kdlab.cli.console import log_shown
    from kdlab.cli.hydra.plan import Flags, distinct
    from kdlab.cli.hydra.sweep import expected
    from kdlab.cli.start import planned, refuse_unread

    with planned(Flags(tuple(args.overrides), multirun=args.multirun)) as plan, log_shown():
        say(f"ok    config: {plan.jobs} job(s), every key and value bound to its owner")
        from kdlab import experiment

        refuse_unread(plan)
        failed = 0
        stages = {id(stage.config): name for point in plan.points for name, stage in point.stages.items()}
        for config in distinct(plan.points):
            if (name := stages.get(id(config))) is not None:
                say(f"stage {one_line(name)}")
            for finding in experiment.preflight(config, deep=True):
                failed += not finding.ok
                # what is wrong names its key itself
                text = finding.text.removeprefix(f"{finding.name}: ")
                say(f"{'ok' if finding.ok else 'FAIL':<6}{finding.name}: {one_line(text)}")
        say(f"time  {one_line(expected(plan.points[0].config, plan.jobs))}")
        say(f"{failed} problem(s)" if failed else "ready")
    return 2 if failed else 0
