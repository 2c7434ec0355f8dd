"""Which of several labels the rows of a data set are asked for; or all of them at once, each a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdlab.data.source import Labels, Rows, Source
from kdlab.errors import UserError, unknown

Label = str | list | dict
"""The name of a label; several, each a task; or several with how much each counts."""


def asked(source: Source, known: Mapping[str, Labels], label: Label | None) -> Source:
    """A source that is asked for one of its labels, or for several at once.

    Args:
        source: its classes are kinds of rows.
        known: what each label says of a kind, by name; the first is what is asked for by default.
        label: a name, several, or several with their weights; None is the first.

    Raises:
        UserError: for a label that is not there, one named twice, or a weight that is no number above 0.
    """
    names = [next(iter(known))] if label is None else [label] if isinstance(label, str) else list(label)
    if not names or len(set(names)) < len(names):
        raise UserError(f"data.label: {names}; accepted: different labels, at least one of {', '.join(known)}")
    chosen = {}
    for name in names:
        if name not in known:
            raise unknown("data.label", str(name), known, "label")
        weight = label[name] if isinstance(label, dict) else 1.0
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"data.label.{name}: {weight!r}; accepted: a finite number above 0")
        chosen[name] = replace(known[name], weight=float(weight))
    if len(chosen) > 1:
        return replace(source, tasks=chosen)
    (name, one) = next(iter(chosen.items()))

    def again(rows: Any) -> Any:
        return Rows(rows.inputs, one.of[rows.targets]) if isinstance(rows, Rows) else rows

    return replace(
        source,
        name=source.name if name == next(iter(known)) else f"{source.name} ({name})",
        train=again(source.train),
        val=again(source.val),
        test=again(source.test),
        class_names=list(one.class_names),
        label=name,
    )


def joint(
    columns: Mapping[str, tuple[Sequence[Tensor], list[str]]], key: str = "data"
) -> tuple[list[Tensor], list[str], dict[str, Labels]]:
    """Several labels of the same rows as one: each combination that occurs is a kind of row.

    Args:
        columns: name → class ids (N,) of each split, and the names of the classes.
        key: the config key to name when the content is wrong.

    Returns:
        The kinds (N,) of each split, the name of each kind, and what each label says of them.

    Raises:
        UserError: for a class id out of range.

    >>> a, b = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    >>> kinds, names, found = joint({"a": ([a], ["x", "y"]), "b": ([b], ["u", "v"])})
    >>> kinds[0].tolist(), names, found["b"].of.tolist()
    ([0, 1, 2], ['x, u', 'y, u', 'y, v'], [0, 0, 1])
    """
    for name, (splits, names) in columns.items():
        for ids in splits:
            if len(bad := ids[(ids < 0) | (ids >= len(names))]):
                raise UserError(f"{key}: {name} has class id {int(bad[0])}; accepted: 0..{len(names) - 1}")
    stacked = torch.stack([torch.cat(list(splits)) for splits, _ in columns.values()], 1)
    kinds, number = stacked.unique(dim=0, return_inverse=True)
    named = [names for _, names in columns.values()]
    names = [", ".join(of[i] for of, i in zip(named, kind, strict=True)) for kind in kinds.tolist()]
    found = {name: Labels(named[k], kinds[:, k].contiguous()) for k, name in enumerate(columns)}
    lengths = [len(split) for split in next(iter(columns.values()))[0]]
    return list(number.split(lengths)), names, found
