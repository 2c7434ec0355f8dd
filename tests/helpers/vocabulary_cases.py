"""Students and teachers with a small vocabulary, and one step of an objective on them."""

from __future__ import annotations

import torch

from kdlab.functional import Batch, Outputs
from kdlab.losses import JSD, KL, CrossEntropy, ReverseKL, SkewKL, SkewReverseKL, SymmetricKL, TotalVariation

ROWS, WIDTH, CLASSES = 13, 6, 11


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head(seed, rows=ROWS, bias=True, dtype=torch.float64, width=WIDTH):
    parts = [draw(rows, width, seed=seed), draw(CLASSES, width, seed=seed + 1), draw(CLASSES, seed=seed + 2)]
    return [p.to(dtype).requires_grad_() for p in (parts if bias else parts[:2])]


TARGETS = torch.tensor([1, -100, 0, 10, -100, 4, 2, -100, 3, 3, 9, -100, 5])
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 0.25, 1.0, 1.0, 0.1, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)


def batch(targets=TARGETS, **more):
    return Batch(torch.zeros(len(targets), 1), targets, **more)


def terms():
    return {
        "ce": CrossEntropy(0.1, weight=0.7),
        "kl": KL(),
        "reverse": ReverseKL(weight=0.3),
        "symmetric": SymmetricKL(temperature=2.0),
        "skew": SkewKL(),
        "skew_reverse": SkewReverseKL(),
        "jsd": JSD(beta=0.2),
        "tv": TotalVariation(),
    }


def step(objective, student, teacher, rows, trained):
    """Total, values and gradients of one forward and backward pass."""
    for p in trained:
        p.grad = None
    losses = objective(Outputs(student), teacher if teacher is None else Outputs(teacher), rows)
    (3 * losses.total).backward()  # an upstream gradient that is not 1, as a loss scaler's
    return losses.total.detach(), losses.values, [p.grad.clone() for p in trained]


def same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True) if isinstance(a, list) else ((a, b),):
            bound = tolerance if y.dtype == torch.float64 else max(tolerance, 3e-7)  # the curves are float32
            assert (x - y).abs().max() <= bound * (1 + y.abs().max()), (x, y)
