"""Arrays of pictures, numbers or class ids as tensors, read alike for training and for predicting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlab.system.files import Unreadable

_FEW_CHANNELS = 4
"""Maximum number of channels of a picture whose channels may stand last: grey, grey and alpha, RGB, RGB and alpha."""
_LEAST_SIDE = 8
"""Least height and width of a picture whose channels are taken to stand last for having few at the end."""


def to_tensor(value: Any) -> Tensor:
    """Convert numbers or truth values in any byte order, memory order and nesting to a tensor on the CPU.

    Raises:
        Unreadable: if it holds something else, or is complex.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        if tensor.is_sparse or tensor.is_quantized:
            raise Unreadable("a sparse or quantized tensor; accepted: a plain one")
    else:
        try:
            array = np.asarray(value)
        except ValueError:
            raise Unreadable("rows of unequal length; accepted: an array") from None
        if array.dtype.kind not in "biufc":
            raise Unreadable(f"{array.dtype} values; accepted: numbers")
        if array.dtype.itemsize > 8 and array.dtype.kind == "f":  # long double, which torch does not know
            array = array.astype(np.float64)
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if tensor.is_complex():
        raise Unreadable("complex numbers; accepted: real ones")
    return tensor


def as_pictures(inputs: Tensor) -> Tensor:
    """Convert pictures (N, C, H, W) to what is shown: uint8, or float32 in [0, 1].

    Raises:
        Unreadable: for whole numbers of another kind, and floats that are not finite or outside [0, 1].
    """
    if inputs.dtype == torch.uint8:
        return inputs.contiguous()
    kind = str(inputs.dtype).removeprefix("torch.")
    if not inputs.is_floating_point():
        low, high = _range(inputs.double())
        advice = "; convert them: .astype(np.uint8)" if low >= 0 and high <= 255 else _scaling(low, high)
        accepted = "uint8, or floats in [0, 1]"
        raise Unreadable(f"pictures of torch.{kind}; accepted: {accepted}; these are from {low:g} to {high:g}{advice}")
    inputs = inputs.float().contiguous()
    check_finite(inputs)
    low, high = _range(inputs)
    if low < 0 or high > 1:
        raise Unreadable(
            f"pictures with values from {low:g} to {high:g}; accepted: uint8, or floats in [0, 1]{_scaling(low, high)}"
        )
    return inputs


def as_table(inputs: Tensor) -> Tensor:
    """Convert rows (N, F) of numbers to float32, unscaled.

    Raises:
        Unreadable: for numbers that are not finite.
    """
    inputs = inputs.float().contiguous()
    check_finite(inputs)
    return inputs


def check_finite(inputs: Tensor) -> None:
    """Refuse rows (N, ...) of floats with one that is not finite, by its number.

    Raises:
        Unreadable: naming the first such row.
    """
    bad = (~inputs.isfinite().flatten(1).all(1)).nonzero().flatten().tolist() if len(inputs) else []
    if bad:
        raise Unreadable(f"row {bad[0]} has an input that is not finite")


def _range(inputs: Tensor) -> tuple[float, float]:
    if not inputs.numel():
        return 0.0, 0.0
    return float(inputs.min()), float(inputs.max())


def _scaling(low: float, high: float) -> str:
    """Return advice on scaling floats that are not in [0, 1], where their range tells the scale; else an empty text."""
    if low >= 0:
        full = next((full for full in (255, 65535) if high <= full), None)
        return f"; if {full} is white: divide by {full}" if full else ""
    return (
        "; for values from -1 to 1: (x + 1) / 2"
        if low >= -1 and high <= 1
        else ("; give them before standardisation, which a network does by itself")
    )


def channels_first(inputs: Tensor) -> tuple[Tensor, str]:
    """Return pictures given as (N, C, H, W) or (N, H, W, C) as the former, and a line on how their shape is read.

    Channels stand last where there are 1 to 4 numbers at the end and no side is shorter than 8 pixels otherwise.
    Shapes that can be read in both ways count as (N, C, H, W), and the line says so.

    >>> channels_first(torch.zeros(5, 32, 24, 3))[0].shape
    torch.Size([5, 3, 32, 24])
    """
    _, first, height, last = inputs.shape
    many = first > _FEW_CHANNELS
    if last <= _FEW_CHANNELS and many and min(first, height) >= _LEAST_SIDE:
        return inputs.movedim(-1, 1), f"shape {shape(inputs)} is read as (N, H, W, C): the channels stand last"
    either = last <= _FEW_CHANNELS and height > last  # the end could be channels
    if either or (many and first == height and last < first):
        return inputs, (
            f"shape {shape(inputs)} is read as (N, C, H, W): {first} channels of {height} x {last} pixels; if the "
            "channels stand last, turn it: inputs.transpose(0, 3, 1, 2)"
        )
    return inputs, ""


def fit_channels(inputs: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor, bool]:
    r"""Return pictures in the shape (N, \\*wanted) that a network reads, and whether their channels stood last.

    Args:
        inputs: one picture or many; (H, W, C) or (C, H, W), and (H, W) where there is one channel.
        wanted: (C, H, W).
    """
    if inputs.ndim in (2, 3) and wanted[0] == 1 and tuple(inputs.shape[-2:]) == wanted[1:]:
        return inputs.reshape(-1, *wanted), False
    rows = inputs[None] if inputs.ndim == 3 else inputs
    if rows.ndim == 4 and tuple(rows.shape[1:]) != wanted and tuple(rows.movedim(-1, 1).shape[1:]) == wanted:
        return rows.movedim(-1, 1), True
    return rows, False


def shape(inputs: Tensor) -> str:
    """Return the shape of a tensor as text."""
    return str(tuple(inputs.shape))


def as_class_ids(value: Any) -> tuple[Tensor, int, str]:
    """Convert class ids given as (N,), as a column (N, 1), or one-hot as (N, C), to (N,) int64.

    Returns:
        The ids, the number of classes where the shape tells it (else 0), and a line on how the ids are read.

    Raises:
        Unreadable: for anything else, such as floats and soft targets.
    """
    if not isinstance(value, Tensor) and np.asarray(value).dtype.kind in "OUS":
        raise Unreadable(
            "of text or objects; accepted: whole class ids (N,), such as names, ids = np.unique(targets, "
            "return_inverse=True), and the names in class_names"
        )
    ids, note = to_tensor(value), ""
    size = shape(ids)
    if ids.ndim == 2 and ids.shape[1] == 1:
        ids, note = ids[:, 0], f"targets of shape {size} are read as a column of class ids"
    elif ids.ndim == 2 and len(ids) and _is_one_hot(ids):
        note = f"targets of shape {size} are read as one-hot: the class id is the column of the 1"
        return ids.double().argmax(1), ids.shape[1], note
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        advice = "; soft targets and several labels of a row are not read" if ids.ndim == 2 else ""
        if ids.ndim == 1 and _whole(ids):
            advice = "; convert them: targets.astype(np.int64)"
        raise Unreadable(f"of {ids.dtype} and shape {size}; accepted: whole class ids (N,), or one-hot (N, C){advice}")
    return ids.long(), 0, note


def _is_one_hot(rows: Tensor) -> bool:
    rows = rows.double()
    return bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(1) == 1).all())


def _whole(ids: Tensor) -> bool:
    return bool((ids.double() == ids.double().round()).all())
