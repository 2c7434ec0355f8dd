"""What a whole training loop costs: kdlab's fit (Lightning) against a loop of a few lines of PyTorch.

    python benchmarks/loop.py [--pairs 7]

kdlab's side has everything on that a run has: TensorBoard and curves.jsonl, measures on the validation split, the best
weights, checkpoints to resume from, a progress bar. The bare side makes the same number of steps on the same tensors
and goes through the validation split with argmax once an epoch. Timed is training, from its first step to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pairs import duration, header, ratio, say
from steps import cache, pictures, resnet
from torch import nn
from torch.nn import functional as F

from kdlab.data import digits, tensors
from kdlab.experiment.build import loggers
from kdlab.losses import KL, CrossEntropy, Objective
from kdlab.methods import FineTune, LearningRate, OfflineKD
from kdlab.models import MLP
from kdlab.tasks import Classification
from kdlab.teachers import Teacher
from kdlab.training import TrainerConfig, fit

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
TENSORBOARD = {"_target_": "kdlab.runs.loggers.tensorboard"}


@dataclass
class Case:
    """One comparison."""

    name: str
    data: Any
    student: Callable[[], nn.Module]
    epochs: int
    threads: int
    teacher: Teacher | None = None
    target: str = ""


def lightning_loop(case: Case, folder: Path) -> float:
    """Seconds of training through ``kdlab.training.fit``."""
    kind, terms = (FineTune, {"ce": CrossEntropy()})
    if case.teacher is not None:
        kind, terms = OfflineKD, {"ce": CrossEntropy(), "kl": KL()}
    method = kind(
        student=case.student(),
        objective=Objective(terms, temperature=4.0, alpha=0.9 if case.teacher else None),
        task=Classification(case.data.num_classes),
        optimizer=SGD,
        scheduler=LearningRate(),
        teacher=case.teacher,
    )
    training = TrainerConfig(accelerator="cpu", precision="32-true", threads=case.threads, progress="bar")
    folder.mkdir(parents=True)
    with contextlib.redirect_stderr(io.StringIO()):  # the bar is drawn, and not looked at
        found = fit(method, case.data, training, folder, case.epochs, loggers(TENSORBOARD, folder, "bench"))
    assert found.steps == case.epochs * len(case.data.train_dataloader())
    return found.seconds


def bare_loop(case: Case) -> float:
    """Seconds of the same training, written by hand."""
    torch.set_num_threads(case.threads)
    case.data.to("cpu")
    train, val = (whole(case.data, split) for split in ("train", "val"))
    told = case.teacher
    net = case.student().train()
    optimizer = SGD(net.parameters())
    start = time.perf_counter()
    for _ in range(case.epochs):
        for rows in torch.randperm(len(train.targets)).split(case.data.batch_size):
            inputs, targets = train.inputs[rows], train.targets[rows]
            optimizer.zero_grad()
            logits = net(inputs)
            loss = F.cross_entropy(logits, targets)
            if told is not None:
                soft = F.log_softmax(told.logits.held["train"][rows, 0] / 4, 1)
                kl = F.kl_div(F.log_softmax(logits / 4, 1), soft, reduction="batchmean", log_target=True)
                loss = 0.1 * loss + 0.9 * 16 * kl
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            for inputs, targets in zip(val.inputs.split(256), val.targets.split(256), strict=True):
                (net(inputs).argmax(1) == targets).sum().item()
        net.train()
    return time.perf_counter() - start


def whole(data: Any, split: str) -> Any:
    """A split as one batch of float inputs."""
    from kdlab.functional import Batch

    parts = list(data.ordered_loader(split))
    return Batch(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]))


def measure(case: Case, pairs: int, folder: Path) -> None:
    steps = case.epochs * len(case.data.train_dataloader())
    ours, bare, whole_fit = [], [], []
    for n in range(pairs + 1):  # the first warms up
        for side in ("ours", "bare") if n % 2 else ("bare", "ours"):
            if side == "bare":
                bare.append(bare_loop(case))
                continue
            start = time.perf_counter()
            ours.append(lightning_loop(case, folder / f"{case.name}-{n}".replace(" ", "_")))
            whole_fit.append(time.perf_counter() - start)
    found = ratio(ours[1:], bare[1:])
    extra = (found.seconds[0] - found.seconds[1]) / steps
    around = sorted(a - b for a, b in zip(whole_fit[1:], ours[1:], strict=True))[pairs // 2]
    say(f"{case.name} ({steps} steps in {case.epochs} epochs)", found, case.target)
    print(
        f"    a step: bare {duration(found.seconds[1] / steps)}, extra {duration(max(extra, 0))};"
        f" around the fit {duration(around)}"
    )


def digits_again(times: int) -> Any:
    """The digits' training rows several times over, so that epochs are long."""
    whole_of = digits(batch_size=128, seed=0)
    whole_of.to("cpu")
    train, val = whole(whole_of, "train"), whole(whole_of, "val")
    repeated = {"inputs": train.inputs.repeat(times, 1, 1, 1), "targets": train.targets.repeat(times)}
    held = {**repeated, "val_inputs": val.inputs, "val_targets": val.targets}
    return tensors(held, batch_size=128, seed=0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=7)
    options.add_argument("--only", default="", help="cases whose name holds this")
    options.add_argument("--threads", type=int, help="for the ResNet; all cores unless given, as on a quiet machine")
    chosen = options.parse_args()
    logging.getLogger("kdlab").setLevel(logging.ERROR)
    header("loop: kdlab's fit against a bare PyTorch loop")
    threads = chosen.threads or torch.get_num_threads()
    small, long, big = digits(batch_size=128, seed=0), digits_again(10), pictures(128 * 12 + 512, 128)
    small.to("cpu"), long.to("cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def mlp() -> nn.Module:
            torch.manual_seed(0)
            return MLP(in_features=64, hidden=[128], num_classes=10)

        cases = [
            Case("digits MLP, long epochs", long, mlp, 6, 1, None, "<= 2.6"),
            Case("digits MLP, long epochs, cached teacher", long, mlp, 6, 1, cache(mlp(), long, folder)),
            Case("digits MLP as it is", small, mlp, 40, 1, None),
            Case("digits MLP as it is, cached teacher", small, mlp, 40, 1, cache(mlp(), small, folder)),
            Case(f"ResNet-20, 32x32, {threads} threads", big, partial(resnet, 20, big), 1, threads, None, "<= 1.03"),
        ]
        for case in cases:
            if chosen.only in case.name:
                measure(case, chosen.pairs, folder)


if __name__ == "__main__":
    main()
