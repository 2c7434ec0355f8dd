"""Classes and probabilities for inputs of yours, from a run folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdlab.cli.main import Parser
from kdlab.errors import UserError


def main(argv: Sequence[str]) -> int:
    """``kdlab predict RUN INPUT...``"""
    parser = Parser(prog="kdlab predict", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT", help="an image, or a .npy array of one or more"
    )
    parser.add_argument("--top", type=int, default=3, help="how many classes to show (default 3)")
    parser.add_argument(
        "--trust", action="store_true", help="let the run build modules found here; only for runs you made"
    )
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UserError(f"predict: --top {args.top}; accepted: at least 1")
    for path in (args.run, *args.inputs):
        if not path.exists():
            raise UserError(f"predict: no such file or folder {str(path)!r}; accepted: RUN INPUT...")
    from kdlab.runs.predict import predict

    for found in predict(args.run, args.inputs, trust=args.trust):
        best = sorted(found.probabilities.items(), key=lambda pair: -pair[1])[: args.top]
        print(f"{found.source}: " + ", ".join(f"{name} {share:.1%}" for name, share in best))
    return 0
