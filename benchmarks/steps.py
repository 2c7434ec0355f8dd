"""What distillation costs per optimizer step, with a cached and with a live teacher.

    python benchmarks/steps.py [--pairs 40]

A plain step is zero_grad, forward, F.cross_entropy, backward, optimizer step. A distillation step does the same through
kdlab's task, objective (CE and KL) and teacher. Both take the same batches from the same loader.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from pairs import compare, header, say
from torch import nn
from torch.nn import functional as F

from kdlab.data import digits, tensors
from kdlab.functional import Batch
from kdlab.losses import KL, CrossEntropy, Objective
from kdlab.models import CifarResNet, weights_hash
from kdlab.tasks import Classification
from kdlab.teachers import Arrays, CachedTeacher, FrozenTeacher, Manifest, Teacher, write_cache

Step = Callable[[], None]


def pictures(rows: int, batch_size: int, views: int | None = None, val: int = 512):
    """Random uint8 pictures in the shape of CIFAR's."""
    make = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=make)
    held = {"inputs": inputs, "targets": torch.arange(rows) % 10}
    held |= {"test_inputs": inputs[:256], "test_targets": held["targets"][:256]}
    augment = ["crop", "flip"] if views else None
    data = tensors(held, batch_size=batch_size, val=val, augment=augment, views=views, seed=0)
    data.to("cpu")
    return data


def resnet(depth: int, data, width: int = 16, channels_last: bool = False) -> nn.Module:
    """A CIFAR ResNet for the shapes of ``data``."""
    torch.manual_seed(0)
    net = CifarResNet(depth, width=width, num_classes=data.num_classes, in_channels=data.input_shape[0])
    return net.to(memory_format=torch.channels_last) if channels_last else net


def cache(net: nn.Module, data, folder: Path) -> CachedTeacher:
    """The teacher's logits, as a run would store and read them."""
    rows = {"train": (data.counts["train"], data.views or 1)}
    if data.counts["val"]:
        rows["val"] = (data.counts["val"], 1)
    manifest = Manifest(weights_hash(net), data.fingerprint, data.transform, data.num_classes, rows)
    write_cache(
        folder / manifest.key, manifest, FrozenTeacher(net, Classification(data.num_classes)), data.ordered_loader
    )
    return CachedTeacher(Arrays(folder / manifest.key, manifest))


def endless(data) -> Iterator[Batch]:
    """The training batches of epoch 0, again and again."""
    kept = [batch for batch in data.train_dataloader() if len(batch) == data.batch_size]
    return cycle(kept)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)


def autocast(bf16: bool) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=True)


def plain_step(net: nn.Module, data, bf16: bool = False) -> Step:
    """Cross-entropy on the labels, written by hand."""
    optimizer, batches = optimizer_of(net.train()), endless(data)

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        with autocast(bf16):
            loss = F.cross_entropy(net(batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()

    return step


def distill_step(net: nn.Module, teacher: Teacher, data, bf16: bool = False) -> Step:
    """Cross-entropy and KL, through kdlab."""
    optimizer, batches = optimizer_of(net.train()), endless(data)
    task = Classification(data.num_classes)
    objective = Objective({"ce": CrossEntropy(), "kl": KL()}, temperature=4.0, alpha=0.9)

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        with autocast(bf16):
            told = teacher(batch)
            losses = objective(task.outputs(net, batch), told, batch)
        losses.total.backward()
        optimizer.step()

    return step


def cached(name: str, data, student: dict, teacher: dict, pairs: int, folder: Path, bf16: bool, target: str) -> None:
    told = cache(resnet(data=data, **teacher), data, folder)
    a = distill_step(resnet(data=data, channels_last=bf16, **student), told, data, bf16)
    b = plain_step(resnet(data=data, channels_last=bf16, **student), data, bf16)
    how = f"{'bf16, channels last' if bf16 else 'float32'}, {torch.get_num_threads()} threads"
    say(f"{name}, {how}: cached teacher / cross-entropy", compare(a, b, pairs, warmup=3), target)


def live(data, student: dict, teacher: dict, pairs: int) -> None:
    net, calls = resnet(data=data, **teacher), []
    net.register_forward_hook(lambda *_: calls.append(1))
    task = Classification(data.num_classes)
    frozen = FrozenTeacher(net, task)
    a = distill_step(resnet(data=data, **student), frozen, data)
    plain, batches = plain_step(resnet(data=data, **student), data), endless(data)

    def parts() -> None:
        with torch.no_grad():
            net(next(batches).inputs)
        plain()

    a()
    per_step = len(calls)
    found = compare(a, parts, pairs, warmup=2)
    say("live ResNet-56, float32: step / (one teacher forward + one plain step)", found, "about 1")
    say("live ResNet-56: teacher forward passes per step", per_step, "1")
    say("live ResNet-56: teacher outputs that carry a gradient", int(frozen(next(batches)).logits.requires_grad), "0")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=40)
    options.add_argument(
        "--threads", type=int, help="for 32x32 pictures; all cores unless given, as on a quiet machine"
    )
    chosen = options.parse_args()
    pairs, threads = chosen.pairs, chosen.threads or torch.get_num_threads()
    header("steps: a distillation step against a cross-entropy step")
    with tempfile.TemporaryDirectory() as place:
        folder, big = Path(place), pictures(2048, 128)
        torch.set_num_threads(threads)
        for bf16 in (False, True):
            cached("ResNet-20, 32x32, batch 128", big, {"depth": 20}, {"depth": 56}, pairs, folder, bf16, "<= 1.02")
        torch.set_num_threads(1)  # as kdlab does for networks this small
        small = digits(batch_size=64, seed=0)
        small.to("cpu")
        cached("digits ResNet-20, 8x8, batch 64", small, {"depth": 20}, {"depth": 20}, 4 * pairs, folder, False, "")
        tiny = {"depth": 8, "width": 4}
        cached("digits ResNet-8 of width 4", small, tiny, {"depth": 20}, 8 * pairs, folder, False, "")
        torch.set_num_threads(threads)
        live(big, {"depth": 20}, {"depth": 56}, max(pairs // 2, 8))


if __name__ == "__main__":
    main()
