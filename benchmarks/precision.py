"""From which size of network on bf16 and a second thread pay on this CPU: what ``trainer.precision=auto`` goes by.

python benchmarks/precision.py [--pairs 15]
"""

from __future__ import annotations

import argparse

import torch
from pairs import compare, header, say
from steps import pictures, plain_step, resnet

from kdlab.data import digits
from kdlab.models import flops


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=15)
    pairs = options.parse_args().pairs
    header("precision: bf16 and threads against float32 and one thread, by size of network")
    cores = torch.get_num_threads()
    small, big = digits(batch_size=64, seed=0), pictures(2048, 128)
    small.to("cpu")
    for name, data, shape in (
        ("digits ResNet-8 of width 4, 8x8, batch 64", small, {"depth": 8, "width": 4}),
        ("digits ResNet-20, 8x8, batch 64", small, {"depth": 20}),
        ("ResNet-8, 32x32, batch 128", big, {"depth": 8}),
        ("ResNet-20, 32x32, batch 128", big, {"depth": 20}),
    ):
        work = flops(resnet(data=data, **shape), next(iter(data.ordered_loader("val"))).inputs[:1]) * data.batch_size
        print(f"{name}: {work / 1e9:.3g} GFLOP a forward pass")
        full = plain_step(resnet(data=data, **shape), data)
        half = plain_step(resnet(data=data, channels_last=True, **shape), data, bf16=True)
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            say(f"    bf16 and channels last / float32, {threads} threads", compare(half, full, pairs, warmup=2))
        for kind, step in (("float32", full), ("bf16", half)):
            many, one = on(cores, step), on(1, step)
            say(f"    {cores} threads / 1 thread, {kind}", compare(many, one, pairs, warmup=2))


def on(threads: int, step):
    """The step, with so many threads."""

    def run() -> None:
        torch.set_num_threads(threads)
        step()

    return run


if __name__ == "__main__":
    main()
