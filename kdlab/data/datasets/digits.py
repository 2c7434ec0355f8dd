"""Handwritten digits that ship with kdlab."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from kdlab.data.labels import Label, requested
from kdlab.data.module import Common, ImageData
from kdlab.data.raw import Labels, RawDataset, Rows

_FILE = Path(__file__).parent.parent / "digits.npz"
_TRAIN, _VAL, _TEST = range(3)
_LABELS = {
    "digit": Labels([str(digit) for digit in range(10)], torch.arange(10)),
    "parity": Labels(["even", "odd"], torch.arange(10) % 2),
}


def digits(label: Label | None = None, **common: Unpack[Common]) -> ImageData:
    """Load 1,797 handwritten digits, grey, 8 x 8 (Alpaydin and Kaynak, UCI ML Repository, 1998; CC BY 4.0).

    A fixed stratified split ships along: 1,200 training, 237 validation and 360 test rows. Another ``val`` divides the
    same 1,437 rows anew; the test rows stay. See :class:`ImageData` for the arguments.

    Args:
        label: ``digit``, ``parity`` (even or odd), or a list of both for two tasks at once; None is ``digit``.
    """
    with np.load(_FILE) as file:
        images, targets = torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["targets"]).long()
        split = torch.from_numpy(file["split"])
    rows = Rows(images, targets)
    fixed = common.get("val") is None
    train, own = (split == _TRAIN, split == _VAL) if fixed else (split != _TEST, None)
    source = RawDataset(
        "digits",
        rows.take(train.nonzero()[:, 0]),
        [str(digit) for digit in range(10)],
        val=None if own is None else rows.take(own.nonzero()[:, 0]),
        test=rows.take((split == _TEST).nonzero()[:, 0]),
        white=16.0,
        key="data",
    )
    return ImageData(requested(source, _LABELS, label), **common)
