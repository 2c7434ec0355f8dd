"""What a loss over a vocabulary costs in chunks of rows, against logits that exist all at once: peak memory and time.

    python benchmarks/vocabulary.py [--rows 2048] [--classes 50257] [--width 256] [--pairs 5]

All are one forward and backward pass of the same objective (CE and KL) from hidden states of student and teacher; the
teacher, without gradient, is part of them. Dense: logits by ``F.linear``, compared all at once, as is usual. Softmaxes
in chunks: the same logits, as kdlab compares them. Chunked: ``Projected`` logits.

Memory is the peak resident set of a process of its own (``VmHWM``; ``ru_maxrss`` starts with that of the parent), less
that of a process that holds the same hidden states, matrices and gradients and computes the same of four rows.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from pairs import compare, header, say
from torch.nn import functional as F

from kdlab.functional import Batch, Outputs, Projected
from kdlab.losses import KL, CrossEntropy, Objective, objective

AT_ONCE = objective.AT_ONCE
KINDS = ("baseline", "dense", "softmaxes", "chunked")


class Pass:
    """One forward and backward pass over ``rows`` rows."""

    def __init__(self, rows: int, classes: int, width: int, chunk: int) -> None:
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, rows, width, generator=draw)
        matrix = torch.randn(2, classes, width, generator=draw) / width**0.5
        self.student = [x.clone().requires_grad_() for x in (hidden[0], matrix[0])]
        self.teacher = [hidden[1].clone(), matrix[1].clone()]
        self.targets = torch.randint(classes, (rows,), generator=draw)
        self.objective = Objective({"ce": CrossEntropy(), "kl": KL()}, 2.0, 0.5, chunk_rows=chunk)

    def run(self, kind: str, rows: int | None = None) -> torch.Tensor:
        objective.AT_ONCE = sys.maxsize if kind == "dense" else AT_ONCE
        for x in self.student:
            x.grad = None
        (s, a), (t, b) = self.student, self.teacher
        s, t, targets = s[:rows], t[:rows], self.targets[:rows]
        if kind in ("chunked", "baseline"):
            student, teacher = Outputs(Projected(s, a)), Outputs(Projected(t, b))
        else:
            student, teacher = Outputs(F.linear(s, a)), Outputs(F.linear(t, b))
        losses = self.objective(student, teacher, Batch(s, targets))
        losses.total.backward()
        return losses.total.detach()


def peak() -> int:
    """Bytes that this process held at most."""
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(told["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of(kind: str, args: argparse.Namespace) -> int:
    """Bytes that a process of one pass held at most."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("rows", "classes", "width", "chunk", "threads")]
    done = subprocess.run([sys.executable, __file__, "--one", kind, *sizes], capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="tokens")
    parser.add_argument("--classes", type=int, default=50257, help="size of the vocabulary")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states of both")
    parser.add_argument("--chunk", type=int, default=128, help="rows of a chunk")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = Pass(args.rows, args.classes, args.width, args.chunk)
    if args.one:
        made.run(args.one, 4 if args.one == "baseline" else None)
        print(peak())
        return
    header(f"{args.rows} tokens, {args.classes} classes, width {args.width}, float32, {args.threads} thread(s)")
    found = {kind: statistics.median(peak_of(kind, args) for _ in range(3)) for kind in KINDS}
    base = found["baseline"]
    for kind, title, goal in (("chunked", "chunked", "at most 0.17"), ("softmaxes", "softmaxes in chunks", "")):
        part, whole = found[kind] - base, found["dense"] - base
        sizes = f"{part / 2**20:.0f} MiB : {whole / 2**20:.0f} MiB (over {base / 2**20:.0f} MiB)"
        say(f"peak memory, {title} : dense", f"{part / whole:.3f}  {sizes}", goal)
    say("loss: dense, softmaxes in chunks, chunked", " ".join(f"{float(made.run(kind)):.6f}" for kind in KINDS[1:]))
    for kind, title, goal in (("chunked", "chunked", "at most 0.75"), ("softmaxes", "softmaxes in chunks", "")):
        said = compare(lambda kind=kind: made.run(kind), lambda: made.run("dense"), args.pairs)
        say(f"time, {title} : dense", said, goal)


if __name__ == "__main__":
    main()
