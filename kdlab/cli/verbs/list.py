"""What every group offers, a line each; or the layers of a network."""

from __future__ import annotations

from collections.abc import Sequence

from kdlab.cli import options
from kdlab.cli.main import Parser
from kdlab.errors import unknown

LAYERS = "layers"


def main(argv: Sequence[str]) -> int:
    """``kdlab list [GROUP]`` or ``kdlab list layers OVERRIDES...``"""
    parser = Parser(
        prog="kdlab list",
        description=__doc__,
        epilog="example: kdlab list layers student=resnet8 data=cifar10 (module paths for student_layer=...)",
    )
    parser.add_argument("group", nargs="?", help="one group, or the word layers")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="after layers: which networks")
    args = parser.parse_args(argv)
    if args.group == LAYERS:
        return _layers(args.overrides)
    found = options.read(options.folders())
    if args.group is not None and args.group not in found.groups:
        raise unknown("list", args.group, [*found.groups, LAYERS], "group")
    for group in [args.group] if args.group else [g for g in found.groups if g != options.NETWORKS]:
        print(group)
        if args.group is None and group == "teacher":
            print("  (any student, and)")
            shown = options.EXTRA["teacher"]
        else:
            shown = found.groups[group]
        width = max((len(name) for name in shown), default=0) + 2
        for name in sorted(shown):
            print(f"  {name:<{width}}{shown[name]}".rstrip())
    return 0


def _layers(overrides: Sequence[str]) -> int:
    from kdlab.cli.start import Flags, planned

    with planned(Flags(tuple(overrides))) as plan:
        from kdlab import experiment

        for role, rows in experiment.layers(plan.points[0].config).items():
            print(role)
            width = max((len(name) for name, _, _ in rows), default=0) + 2
            for name, kind, shape in rows:
                print(f"  {name:<{width}}{kind:<20}{'x'.join(map(str, shape))}")
    return 0
