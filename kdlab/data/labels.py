"""Which of several labels the rows of a data set are asked for; or all of them at once, each a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdlab.data.raw import Labels, RawDataset
from kdlab.errors import UserError, unknown

Label = str | list | dict
"""Name of a label; a list of several, each a task; or a mapping of several to their weights."""


def names_of(label: Label | None, known: Iterable[str]) -> list[str]:
    """Return the names of the labels that are asked for; None is the first.

    Raises:
        UserError: for a label that is not there, or one named twice.
    """
    known = list(known)
    names = known[:1] if label is None else [label] if isinstance(label, str) else [str(name) for name in label]
    if not names or len(set(names)) < len(names):
        raise UserError("data.label", names, f"different labels, at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown("data.label", name, known, "label")
    return names


def requested(source: RawDataset, known: Mapping[str, Labels], label: Label | None) -> RawDataset:
    """Return a source that is asked for one of its labels, or for several at once.

    Args:
        source: source whose classes are kinds of rows, which decide its splits, whatever is asked.
        known: labels by name, with the class that each gives to a kind; the first is asked for by default.
        label: a name, several, or several with their weights; None is the first.

    Raises:
        UserError: for a label that is not there, one named twice, or a weight that is no number above 0.
    """
    chosen = {}
    for name in names_of(label, known):
        weight = label[name] if isinstance(label, dict) else 1.0
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"data.label.{name}", f"{weight!r}", "a finite number above 0")
        chosen[name] = replace(known[name], weight=float(weight))
    other = len(chosen) == 1 and next(iter(chosen)) != next(iter(known))
    return replace(source, name=f"{source.name} ({next(iter(chosen))})" if other else source.name, asked=chosen)


def select_label(source: RawDataset) -> RawDataset:
    """Return a source of one label, whose classes are those of the label; its splits are then by them.

    Raises:
        UserError: if several are asked for.
    """
    if len(source.asked) > 1:
        raise UserError("data.label", f"{', '.join(source.asked)}, and data.classes chooses some", "one label")
    for one in source.asked.values():
        splits = {split: one.rows(getattr(source, split)) for split in ("train", "val", "test")}
        return replace(source, **splits, class_names=list(one.class_names), asked={})
    return source


def combine_labels(
    columns: Mapping[str, tuple[Sequence[Tensor], list[str]]], key: str = "data"
) -> tuple[list[Tensor], list[str], dict[str, Labels]]:
    """Combine several labels of the same rows into one: each combination that occurs is a kind of row.

    Args:
        columns: name → class ids (N,) of each split, and the names of the classes.
        key: the config key to name when the content is wrong.

    Returns:
        The kinds (N,) of each split, the name of each kind, and the labels, which map kinds to classes.

    Raises:
        UserError: for a class id out of range.

    >>> a, b = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    >>> kinds, names, found = combine_labels({"a": ([a], ["x", "y"]), "b": ([b], ["u", "v"])})
    >>> kinds[0].tolist(), names, found["b"].of.tolist()
    ([0, 1, 2], ['x, u', 'y, u', 'y, v'], [0, 0, 1])
    """
    for name, (splits, names) in columns.items():
        for ids in splits:
            if len(bad := ids[(ids < 0) | (ids >= len(names))]):
                raise UserError(key, f"{name} has class id {int(bad[0])}", f"0..{len(names) - 1}")
    stacked = torch.stack([torch.cat(list(splits)) for splits, _ in columns.values()], 1)
    kinds, number = stacked.unique(dim=0, return_inverse=True)
    named = [names for _, names in columns.values()]
    names = [", ".join(of[i] for of, i in zip(named, kind, strict=True)) for kind in kinds.tolist()]
    labels = {name: Labels(named[k], kinds[:, k].contiguous()) for k, name in enumerate(columns)}
    lengths = [len(split) for split in next(iter(columns.values()))[0]]
    return list(number.split(lengths)), names, labels
