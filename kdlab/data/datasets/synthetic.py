"""A generated problem."""

from __future__ import annotations

from typing import Unpack

import numpy as np
import torch

from kdlab.data.module import Common, ImageData
from kdlab.data.raw import RawDataset, Rows
from kdlab.errors import UserError
from kdlab.ranges import whole_number
from kdlab.system import memory

_STEPS = 4


def synthetic(
    n: int = 2000,
    features: int = 10,
    noise: float = 0.15,
    num_classes: int = 2,
    data_seed: int = 0,
    **common: Unpack[Common],
) -> ImageData:
    """Generate a nonlinear and noisy problem: which class scores highest over normally distributed features?

    The score of a class is a random sum of four steep steps, each in a random direction of feature space; the class is
    the one with the highest score plus noise. A fifth of the rows is for testing. With the defaults a linear model
    gets 83 % of the test rows right, an MLP with 10 hidden units 90 %.

    Args:
        n: rows in all.
        features: numbers a row.
        noise: deviation of what is added to the scores; 0 makes the classes separable.
        num_classes: number of classes.
        data_seed: seed of the generator.

    The other arguments are :class:`ImageData`'s, with ``val`` 0.15 unless given.
    """
    for name, value, least in (("n", n, 20), ("features", features, 1), ("num_classes", num_classes, 2)):
        whole_number(f"data.{name}", value, least)
    if not 0 <= noise < float("inf"):
        raise UserError("data.noise", noise, "0 or more")
    memory.refuse_larger("data.n", n * 16 * (features + num_classes), f"{n:,} rows of {features:,} features")
    draw = np.random.Generator(np.random.PCG64(data_seed))
    inputs = draw.standard_normal((n, features))
    slopes = 3 * draw.standard_normal((features, _STEPS)) / features**0.5
    scores = np.tanh(inputs @ slopes + draw.standard_normal(_STEPS)) @ draw.standard_normal((_STEPS, num_classes))
    scores = (scores - np.median(scores, axis=0)) / scores.std(axis=0)
    targets = (scores + noise * draw.standard_normal(scores.shape)).argmax(axis=1)
    rows = Rows(torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets))
    common.setdefault("val", 0.15)
    source = RawDataset("synthetic", rows, [str(label) for label in range(num_classes)], test=0.2, key="data")
    return ImageData(source, **common)
