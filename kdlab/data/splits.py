"""Which rows of a data set are for training, validation and test, and which of them keep their label.

Every choice is stratified (each class in proportion) and a function of the split seed alone.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdlab.data.raw import Labels, RawDataset, Rows
from kdlab.errors import UserError, unknown
from kdlab.functional.rng import permutation
from kdlab.functional.types import NO_LABEL


def rows_of(amount: int | float, total: int, key: str) -> int:
    """Convert a number of rows, or a fraction (below 1) of ``total`` rows, to a number of rows.

    Raises:
        UserError: if it is no number, negative, or more than there is.
    """
    accepted = f"0..{total} rows, or a fraction of them below 1"
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise UserError(key, f"{amount!r} is no number", accepted)
    if not 0 <= amount <= total:  # also false for nan
        raise UserError(key, f"{amount}; there are {total} rows", accepted)
    if isinstance(amount, float) and amount == 1:
        raise UserError(key, f"{amount}, which is a share of all {total} rows", "1 (one row), or less of them")
    if amount < 1:
        return round(float(amount) * total)
    if amount != int(amount):
        raise UserError(key, f"{amount} is neither a whole number nor a fraction", accepted)
    return int(amount)


def quotas(counts: Tensor, rows: int) -> Tensor:
    """Share ``rows`` out over classes in proportion to ``counts`` (C,), by largest remainder.

    Every class that is there gets at least one row once there are enough rows for all.

    >>> quotas(torch.tensor([50, 30, 20]), 10).tolist()
    [5, 3, 2]
    """
    exact = counts.double() * rows / max(int(counts.sum()), 1)
    share = exact.floor().long()
    present = counts > 0
    if rows >= int(present.sum()):
        share = torch.where(present & (share == 0), 1, share)
    remainder = (exact - share).clone()
    while (missing := rows - int(share.sum())) != 0:
        # one at a time: the class furthest below its share gains, the one furthest above it loses
        step = 1 if missing > 0 else -1
        open_ = (share < counts) if missing > 0 else (share > 1)
        score = torch.where(open_, remainder * step, -torch.inf)
        chosen = int(score.argmax())
        share[chosen] += step
        remainder[chosen] -= step
    return share


def stratified(targets: Tensor, rows: int, seed: int, purpose: str) -> Tensor:
    """Choose ``rows`` rows, stratified by class: (rows,) int64, ascending.

    Args:
        targets: (N,) class ids.
        rows: number of rows to take, at most N.
        seed: seed of the split.
        purpose: a name; different purposes choose independently.
    """
    counts = targets.bincount()
    order = permutation(len(targets), seed, "split", purpose)
    chosen = [order[targets[order] == label][:quota] for label, quota in enumerate(quotas(counts, rows).tolist())]
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.long)


def without(total: int, rows: Tensor) -> Tensor:
    """Return all rows but these: (total - len(rows),) int64, ascending."""
    keep = torch.ones(total, dtype=torch.bool)
    keep[rows] = False
    return keep.nonzero()[:, 0]


def check_labels(labels: int, total: int, classes: int) -> int:
    """Return ``labels`` if that many labels can be kept: none, or at least one a class.

    Fewer labels than classes would leave a class that no student can learn and that stratifying cannot pick
    fairly, so they are refused.
    """
    accepted = f"0 (no labels), {classes}..{total} (at least one for each of the {classes} classes), or null"
    if isinstance(labels, bool) or not isinstance(labels, int):
        raise UserError("data.labels", f"{labels!r} is no whole number", accepted)
    if labels > total:
        raise UserError("data.labels", f"{labels}; there are {total} training rows", accepted)
    if labels < 0 or 0 < labels < classes:
        raise UserError("data.labels", f"{labels}", accepted)
    return labels


def check_classes(kinds: Tensor, asked: Sequence[Labels], name: str) -> None:
    """Refuse training rows (N,) of such kinds that a class has none of.

    Raises:
        UserError: naming the class, and the data set ``name``.
    """
    for one in asked:
        if (lost := one.missing(kinds)) is not None:
            raise UserError(
                "data",
                (
                    f"class {lost!r} of {name} has no training row left of {len(kinds)}; take fewer "
                    "for data.val or data.test, a larger data.fraction, or other data.classes"
                ),
            )


def keep_labels(kinds: Tensor, labels: int | None, asked: Sequence[Labels], seed: int) -> Tensor:
    """Return the kinds (N,) of the training rows, -100 for all but ``labels`` of them, stratified; None keeps all.

    Raises:
        UserError: for a number that leaves a class of what is asked without a label.
    """
    if labels is None:
        return kinds
    count = check_labels(labels, len(kinds), max(len(one.class_names) for one in asked))
    kept = stratified(kinds, count, seed, "labels")
    for one in asked if count else ():
        if (lost := one.missing(kinds[kept])) is not None:
            raise UserError("data.labels", f"{count}, which leave class {lost!r} without one", "more, or null")
    return torch.full_like(kinds, NO_LABEL).index_copy(0, kept, kinds[kept])


def choose_classes(source: RawDataset, classes: Sequence[int | str]) -> RawDataset:
    """Return the rows of some classes, given by id or name, renumbered in the order given.

    Raises:
        UserError: for a class that is not there or named twice, or fewer than two.
    """
    names = source.class_names
    chosen = []
    for wanted in [classes] if isinstance(classes, (int, str)) else classes:
        if isinstance(wanted, str) and wanted in names:
            chosen.append(names.index(wanted))
        elif isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < len(names):
            chosen.append(wanted)
        elif isinstance(wanted, str):
            raise unknown("data.classes", wanted, names, "class")
        else:
            raise UserError("data.classes", f"unknown class {wanted!r}", f"0..{len(names) - 1}, or names")
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise UserError("data.classes", f"{[names[i] for i in chosen]}", "two or more different classes")
    number = torch.full((len(names),), NO_LABEL)
    number[chosen] = torch.arange(len(chosen))

    def keep(rows: Any) -> Any:
        if not isinstance(rows, Rows):
            return rows
        kept = rows.take((number[rows.targets] != NO_LABEL).nonzero()[:, 0])
        return Rows(kept.inputs, number[kept.targets])

    return replace(
        source,
        train=keep(source.train),
        val=keep(source.val),
        test=keep(source.test),
        class_names=[names[i] for i in chosen],
    )


def divide(
    source: RawDataset, val: int | float | None = None, fraction: float | None = None, seed: int = 0
) -> dict[str, Rows | None]:
    """Divide rows into train, val and test; what the publisher did not split off is taken from train.

    Args:
        source: the data set.
        val: validation rows to take from train, a number or a fraction; None is the publisher's, or else a tenth.
        fraction: the share of the remaining training rows to keep.
        seed: seed of the split.

    Raises:
        UserError: for more rows than there are, or validation rows of one's own beside the publisher's.
    """
    train, own, test = source.train, source.val, source.test
    if test is not None and not isinstance(test, Rows):
        train, test = _split_off(train, test, seed, "test")
    if own is None:
        train, own = _split_off(train, 0.1 if val is None else val, seed, "val")
    elif val == 0:
        own = None
    elif val is not None:
        raise UserError(
            "data.val", f"{val}; {source.name} has {len(own)} validation rows of its own", "null (use them) or 0 (none)"
        )
    if fraction is not None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise UserError("data.fraction", f"{fraction!r}", "above 0, up to 1, or null")
        train = train.take(stratified(train.targets, max(1, round(fraction * len(train))), seed, "fraction"))
    return {"train": train, "val": own or None, "test": test or None}


def _split_off(train: Rows, amount: int | float, seed: int, purpose: str) -> tuple[Rows, Rows | None]:
    count = rows_of(amount, len(train), f"data.{purpose}")
    if not count:
        return train, None
    chosen = stratified(train.targets, count, seed, purpose)
    return train.take(without(len(train), chosen)), train.take(chosen)
