"""ResNet-56 teaches ResNet-20 on pictures like CIFAR's: images a second, kdlab's way and the field's usual way.

    python benchmarks/throughput.py [--pairs 5] [--data DIR]

kdlab: ``trainer=cpu`` chooses precision, layout and threads; crop and flip as tensor operations in 16 seeded views, the
teacher from its cache; the whole of ``fit``, checkpoints and curves included. The usual script: float32, channels
first, a teacher in eval mode whose gradients are recorded and then cut off, a DataLoader that shows each picture alone.
Pictures are random unless ``--data`` names a folder with CIFAR-10's python files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pairs import header, ratio, say, seconds
from steps import cache, pictures, resnet
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from kdlab.data import cifar10
from kdlab.experiment.build import loggers
from kdlab.losses import KL, CrossEntropy, Objective
from kdlab.methods import LearningRate, OfflineKD
from kdlab.tasks import Classification
from kdlab.teachers import FrozenTeacher
from kdlab.training import TrainerConfig, fit

STEPS, BATCH, VIEWS = 8, 128, 16
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)


def ours(data: Any, teacher: Any, folder: Path, training: TrainerConfig) -> float:
    """Images a second of kdlab's fit."""
    method = OfflineKD(
        student=resnet(20, data),
        objective=Objective({"ce": CrossEntropy(), "kl": KL()}, temperature=4.0, alpha=0.9),
        task=Classification(10),
        optimizer=SGD,
        scheduler=LearningRate(),
        teacher=teacher,
    )
    folder.mkdir(parents=True)
    tensorboard = {"_target_": "kdlab.runs.loggers.tensorboard"}
    with contextlib.redirect_stderr(io.StringIO()):
        found = fit(method, data, training, folder, 1, loggers(tensorboard, folder, "bench"))
    return data.counts["train"] / found.seconds


class Cropped(Dataset):
    """Padded, cropped and flipped picture by picture, as the field's scripts do."""

    def __init__(self, pictures: torch.Tensor, targets: torch.Tensor) -> None:
        self.pictures, self.targets = F.pad(pictures, (4, 4, 4, 4)), targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        top, left, flip = (int(torch.randint(n, ())) for n in (9, 9, 2))
        picture = self.pictures[row, :, top : top + 32, left : left + 32].float() / 255
        return picture.flip(-1) if flip else picture, int(self.targets[row])


def usual(pictures: torch.Tensor, targets: torch.Tensor, student: nn.Module, teacher: nn.Module) -> float:
    """Images a second of the usual script."""
    torch.set_num_threads(CORES)
    teacher.eval().requires_grad_(True)
    optimizer = SGD(student.train().parameters())
    start = time.perf_counter()
    for inputs, labels in DataLoader(Cropped(pictures, targets), BATCH, shuffle=True):
        logits = student(inputs)
        told = teacher(inputs).detach()
        kl = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(told / 4, 1), reduction="batchmean")
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * 16 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(targets) / (time.perf_counter() - start)


def real(folder: str, rows: int) -> Any:
    """A part of CIFAR-10."""
    share = rows / 50000
    data = cifar10(root=folder, batch_size=BATCH, val=0, fraction=share, augment=["crop", "flip"], views=VIEWS, seed=0)
    data.to("cpu")
    return data


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--data", help="folder of CIFAR-10's python files")
    chosen = options.parse_args()
    logging.getLogger("kdlab").setLevel(logging.ERROR)
    header("throughput: ResNet-56 teaches ResNet-20, 32x32, batch 128")
    rows = STEPS * BATCH
    data = real(chosen.data, rows) if chosen.data else pictures(rows, BATCH, VIEWS, val=0)
    raw = torch.cat([b.inputs for b in data.ordered_loader("train", 0)]).mul(255).byte()
    targets = torch.cat([b.targets for b in data.ordered_loader("train", 0)])
    big = resnet(56, data)
    with tempfile.TemporaryDirectory() as place:
        told = cache(resnet(8, data), data, Path(place))  # whose numbers they are changes nothing about reading them
        batch, teacher = next(iter(data.ordered_loader("train", 0))), FrozenTeacher(big, Classification(10))
        filling = sorted(seconds(lambda: teacher(batch)) for _ in range(5))[2] / len(batch)
        say("filling the cache with ResNet-56, float32", f"{1 / filling:.0f} images/s (median of 5 batches)")
        auto = TrainerConfig(accelerator="cpu", progress="none")
        plain = TrainerConfig(accelerator="cpu", precision="32-true", channels_last=False, progress="none")
        fast, full, slow = [], [], []
        for n in range(chosen.pairs + 1):
            fast.append(ours(data, told, Path(place) / f"auto{n}", auto))
            slow.append(usual(raw, targets, resnet(20, data), big))
            full.append(ours(data, told, Path(place) / f"plain{n}", plain))
    unit = "images/s"
    for name, speeds, target in (
        ("kdlab, trainer=cpu", fast, "> 1,100"),
        ("kdlab, float32 and channels first", full, ""),
        ("the usual script", slow, "about 220"),
    ):
        measured = sorted(speeds[1:])
        middle = measured[len(measured) // 2]
        say(name, f"{middle:.0f} {unit} (from {measured[0]:.0f} to {measured[-1]:.0f}, n={len(measured)})", target)
    say("kdlab, trainer=cpu / the usual script", ratio(fast[1:], slow[1:]).spread(), "about 5")


CORES = torch.get_num_threads()

if __name__ == "__main__":
    main()
