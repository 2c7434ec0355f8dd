"""Handwritten digits that ship with kdlab."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kdlab.data.module import ImageData, common
from kdlab.data.source import Rows, Source

_FILE = Path(__file__).parent.parent / "digits.npz"
_TRAIN, _VAL, _TEST = range(3)


def digits(
    batch_size: int = 64,
    eval_batch_size: int | None = None,
    val: int | float | None = None,
    labels: int | None = None,
    fraction: float | None = None,
    ratio: float | None = None,
    augment: Any = None,
    views: int | Literal["all"] | None = None,
    classes: Sequence[int | str] | None = None,
    seed: int | None = None,
    split_seed: int = 0,
) -> ImageData:
    """1,797 handwritten digits, grey, 8 x 8 (Alpaydin and Kaynak, UCI Machine Learning Repository, 1998; CC BY 4.0).

    A fixed stratified split ships along: 1,200 training, 237 validation and 360 test rows. Another ``val`` divides the
    same 1,437 rows anew; the test rows stay. See :class:`ImageData` for the arguments.
    """
    options = common(locals())
    with np.load(_FILE) as file:
        images, targets = torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["targets"]).long()
        split = torch.from_numpy(file["split"])
    rows = Rows(images, targets)
    train, own = (split == _TRAIN, split == _VAL) if val is None else (split != _TEST, None)
    source = Source(
        "digits",
        rows.take(train.nonzero()[:, 0]),
        [str(digit) for digit in range(10)],
        val=None if own is None else rows.take(own.nonzero()[:, 0]),
        test=rows.take((split == _TEST).nonzero()[:, 0]),
        white=16.0,
        key="data",
    )
    return ImageData(source, **options)
