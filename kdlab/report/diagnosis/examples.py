"""Examples that a diagnosis shows, with the inputs that the networks read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdlab.data import ImageData
from kdlab.data.raw import Files
from kdlab.report.diagnosis.pictures import Example, Shown


def shown(
    most_confident_errors: Mapping[str, tuple[str, list[int]]],
    counted: Mapping[str, Any],
    logits: Mapping[str, Tensor],
    data: ImageData,
    split: str,
    config: Mapping[str, Any],
) -> list[Shown]:
    """Return the examples to look at, with their pictures or values.

    Args:
        most_confident_errors: result of :func:`~kdlab.report.diagnosis.diagnosis.most_confident_errors`.
        counted: result of :func:`~kdlab.report.diagnosis.diagnosis.diagnose`.
        logits: map of role → (N, C).
        data: the data module.
        split: split of the examples.
        config: configuration of the data, which has the names of a table's columns.
    """
    inputs = _inputs(data, split, {number for _, numbers in most_confident_errors.values() for number in numbers})
    names = counted["classes"]
    beside = counted.get("against_teacher", {}).get("student") or counted.get("against_baseline") or {}
    kinds = []
    for kind, (meaning, numbers) in most_confident_errors.items():
        one = Shown(kind, meaning, beside.get(kind, counted["networks"]["student"]["errors"]))
        for number in numbers:
            answers = {}
            for role in counted["networks"]:
                chances = logits[role][number].double().softmax(-1)
                answers[role] = (names[int(chances.argmax())], float(chances.max()))
            example = Example(number, names[counted["targets"][number]], answers)
            if inputs[number].ndim == 3:
                example.picture = _picture(inputs[number])
            else:
                example.values = _unusual(inputs[number], data, config.get("columns") or ())
            one.examples.append(example)
        kinds.append(one)
    return kinds


def _inputs(data: ImageData, split: str, wanted: set[int]) -> dict[int, Tensor]:
    """Return number of an example → its input to the networks; of files, no others are opened."""
    if not wanted:
        return {}
    loader, rows = data.ordered_loader(split), sorted(wanted)
    held = loader.split.inputs
    raw = held.read(rows) if isinstance(held, Files) else held[torch.tensor(rows, device=held.device)]
    return dict(zip(rows, loader.augmentation.to_float(raw).cpu().float(), strict=True))


def _picture(row: Tensor) -> Any:
    """Return (C, H, W) in [0, 1] as an array for drawing: colours for three channels, else their mean in grey."""
    pixels = row.clamp(0, 1)
    return (pixels.permute(1, 2, 0) if len(row) == 3 else pixels.mean(0)).numpy()


def _unusual(row: Tensor, data: ImageData, names: Sequence[str]) -> list[tuple[str, float, float]]:
    """Return (column, value, deviations from the mean of the training rows), the least usual first.

    Columns that nobody named are numbered.
    """
    values = row.flatten().tolist()
    away = [(value - mean) / std for value, mean, std in zip(values, data.mean, data.std, strict=True)]
    if (read := getattr(data, "columns", None)) is not None:
        names = read.names
        values = [v * scale + offset for v, scale, offset in zip(values, read.scale, read.offset, strict=True)]
    if len(names) != len(values):
        names = [f"x{n}" for n in range(len(values))]
    order = sorted(range(len(values)), key=lambda n: -abs(away[n]))
    return [(names[n], values[n], away[n]) for n in order]
