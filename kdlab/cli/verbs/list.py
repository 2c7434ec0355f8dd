"""What every group offers, a line each; or the layers of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdlab.cli import options
from kdlab.cli.main import Parser
from kdlab.errors import UserError, unknown

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
    if args.overrides:
        raise UserError(f"list: {args.overrides[0]!r} is one word too many; accepted: one group, or layers OVERRIDE...")
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
    """The module tree of student and teacher, with the shape that each module puts out for one example."""
    from kdlab.cli.plan import Flags
    from kdlab.cli.start import planned

    with planned(Flags(tuple(overrides))) as plan:
        from kdlab.experiment import parts

        config = plan.points[0].config
        data = parts.data(config["data"], config["seed"])
        example = next(iter(data.sequential("train", batch_size=1))).to("cpu").inputs
        networks = {"student": config["student"], "teacher.net": (config.get("teacher") or {}).get("net")}
        for role, mapping in networks.items():
            if mapping is None:
                continue
            rows = _modules(parts.network(mapping, data, 0, role), example)
            width = max(len(path) for path, _, _ in rows) + 2
            print(f"{role}: {mapping['_target_']}")
            for path, kind, shape in rows:
                print(f"  {path:<{width}}{kind:<20}{shape}".rstrip())
    return 0


def _modules(net: Any, example: Any) -> list[tuple[str, str, str]]:
    """(path, class, output shape) of every module; the shape is empty where the forward does not pass."""
    import torch

    shapes: dict[str, str] = {}

    def note(path: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                shapes[path] = " x ".join(map(str, first.shape[1:]))

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in net.named_modules() if path]
    with torch.no_grad():
        net.eval()(**example) if isinstance(example, dict) else net.eval()(example)
    for handle in handles:
        handle.remove()
    return [(path, type(m).__name__, shapes.get(path, "")) for path, m in net.named_modules() if path]
