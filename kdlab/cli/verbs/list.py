"""What every group offers, a line each; or the layers of student and teacher, and pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kdlab.cli import layers
from kdlab.cli.main import Parser
from kdlab.config import options
from kdlab.errors import UserError, unknown
from kdlab.plain_text import one_line
from kdlab.system.terminal import say

if TYPE_CHECKING:
    from kdlab.data import DataModule

LAYERS = "layers"


def main(argv: Sequence[str]) -> int:
    """Run ``kdlab list [GROUP]`` or ``kdlab list layers OVERRIDES...``; returns the exit status."""
    parser = Parser(
        prog="kdlab list",
        description=__doc__,
        epilog="example: kdlab list layers student=resnet8 teacher=resnet50 (module paths, and pairs to type)",
    )
    parser.add_argument("group", nargs="?", help="one group, or the word layers")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="after layers: which networks")
    args = parser.parse_args(argv)
    if args.group == LAYERS:
        return _layers(args.overrides)
    if args.overrides:
        raise UserError("list", f"{args.overrides[0]!r} is one word too many", "one group, or layers OVERRIDE...")
    available = options.read(options.folders())
    if args.group is not None and args.group not in available.groups:
        raise unknown("list", args.group, [*available.groups, LAYERS], "group")
    for group in [args.group] if args.group else [g for g in available.groups if g != options.NETWORKS]:
        say(group)
        if args.group is None and group == "teacher":
            say("  (any student, and)")
            shown = options.EXTRA["teacher"]
        else:
            shown = available.groups[group]
        width = max((len(name) for name in shown), default=0) + 2
        for name in sorted(shown):
            say(f"  {one_line(name):<{width}}{one_line(shown[name])}".rstrip())
    return 0


def _layers(chosen: Sequence[str]) -> int:
    """Show the module trees of student and teacher, with the shapes that they put out for one example; and pairs."""
    from kdlab.cli.hydra.plan import Flags
    from kdlab.cli.start import planned

    with planned(Flags(tuple(chosen))) as plan:
        from kdlab.experiment import build

        config = plan.points[0].config
        data = build.data(config["data"], config["seed"])
        example = next(iter(data.ordered_loader("train", batch_size=1))).to("cpu").inputs
        networks = {"student": config["student"], "teacher.net": (config.get("teacher") or {}).get("net")}
        traced, nets = {}, []
        for role, mapping in networks.items():
            if mapping is None:
                continue
            nets.append(build.network(mapping, data, 0, role))
            traced[role] = layers.trace(nets[-1], example)
            width = max(len(layer.path) for layer in traced[role].layers) + 2
            say(f"{role}: {mapping['_target_']}")
            for layer in traced[role].layers:
                say(f"  {layer.path:<{width}}{layer.kind:<20}{layer.said}".rstrip())
        if len(traced) == 2:
            fits = _fitting(nets[0], nets[1], data, build.task(config["task"], data))
            _show_pairs(layers.suggest(*traced.values()), config["loss"].get("terms") or {}, fits)
    return 0


Fits = Callable[[str, Mapping[str, Any]], bool]


def _fitting(student: Any, teacher: Any, data: DataModule, task: Any) -> Fits:
    """Return a function that says whether a term takes the layers that it is configured for."""
    import torch

    from kdlab.config import builder
    from kdlab.models import reuse_teacher_head

    with suppress(UserError):  # a term may want it (SimKD), and to others a classifier is as good as another
        reuse_teacher_head(student, teacher)
    rows = next(iter(data.ordered_loader("train", batch_size=2))).to("cpu")

    def fits(name: str, config: Mapping[str, Any]) -> bool:
        try:
            term = builder.build(config, f"loss.terms.{name}", slot="term")
            term.setup(student, teacher, data.counts["train"])
            with torch.no_grad():
                student_outputs = task.outputs(student.eval(), rows, term.student_layers)
                term.prepare(student_outputs, task.outputs(teacher.eval(), rows, term.teacher_layers))
        except UserError:
            return False
        return True

    return fits


def _show_pairs(suggested: Sequence[layers.Pairs], terms: Mapping[str, Any], fits: Fits) -> None:
    """Show pairs of layers, a table each, and the overrides that name them to the loss."""
    for pairs in suggested:
        say(f"pairs of {pairs.what}: student, teacher")
        rows = [(share, s.path, s.said, t.path, t.said) for share, s, t in pairs.each]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True) if width]
            say(f"  {'  '.join(cells)}".rstrip())
        for line in layers.overrides(pairs, terms, fits) or ["(no term of the loss takes these)"]:
            say(f"  {line}")
    if not suggested:
        say("pairs: none that are alike; a term on the student's layers alone takes any teacher (loss=ofa)")
