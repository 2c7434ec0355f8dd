"""Distil one network into another with nothing but PyTorch: own networks, own loaders, no configuration.

python examples/distill_own_loaders.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab


def spirals(rows: int, seed: int) -> TensorDataset:
    """Return points on two spirals, and which of the two each is on."""
    random = torch.Generator().manual_seed(seed)
    angle = 6 * torch.rand(rows, generator=random)
    side = torch.randint(2, (rows,), generator=random)
    points = torch.stack([angle.cos(), angle.sin()], 1) * angle[:, None] * (1 - 2 * side[:, None])
    return TensorDataset(points + 0.2 * torch.randn(rows, 2, generator=random), side)


def perceptron(width: int) -> nn.Sequential:
    """Return a perceptron with two hidden layers."""
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def main(epochs: int = 20) -> float:
    """Train a teacher on labels, distil it, and return the student's accuracy."""
    torch.manual_seed(0)
    train = DataLoader(spirals(1000, 0), batch_size=50, shuffle=True)
    val = DataLoader(spirals(500, 1), batch_size=500)
    teacher, student = perceptron(64), perceptron(8)
    taught = kdlab.distill(teacher, None, train, val, loss={}, epochs=epochs)
    done = kdlab.distill(student, teacher, train, val, loss="hinton", temperature=4, alpha=0.9, epochs=epochs)
    print(f"teacher {taught.val['acc']:.1%}, student {done.val['acc']:.1%} (agrees on {done.val['agreement']:.1%})")
    return done.val["acc"]


if __name__ == "__main__":
    main()
