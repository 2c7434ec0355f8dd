"""A student cut from its teacher: the same network with some of the blocks left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlab.errors import UserError, unknown

Layers = Sequence[int] | Mapping[str, Sequence[int]]
"""Which of the teacher's blocks to take, for every stack alike or by the stack's path."""


def blocks(net: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of blocks of ``net`` by their paths: its lists of modules, less those inside a block.

    >>> blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}))
    {'layers': ModuleList(
      (0): Linear(in_features=2, out_features=2, bias=True)
    )}
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{p}.") for p in found):
            found[name] = module
    return found


def cut(student: nn.Module, teacher: nn.Module, layers: Layers | None = None) -> dict[str, list[int]]:
    """Start ``student`` from ``teacher``: embeddings, final norm and head, and some of its blocks.

    Sanh et al., *DistilBERT, a distilled version of BERT*, NeurIPS 2019 workshop on Energy Efficient Machine Learning:
    the student takes one layer out of two. By default block i of s comes from the teacher's block
    ``round(i (t - 1) / (s - 1))`` of t: evenly spaced, first and last included. For 12 to 6 these are 0, 2, 4, 7, 9,
    11, the choice with which DistilGPT-2 and DistilBERT were made.

    Any two networks with the same names will do, encoder-decoders included, if they differ in nothing but the number of
    blocks. A table of positions may be shorter than the teacher's: its first rows are taken.

    Args:
        student: changed in place.
        teacher: left as it is; not shared with.
        layers: the teacher's blocks to take, in order; or {path of a stack: blocks}. None spaces them evenly.

    Returns:
        {path of a stack: the teacher's blocks it was made of}.

    Raises:
        UserError: the networks differ in width or form, the student is the deeper one, or ``layers`` names a block
            that is not there or not as many as the student has.
    """
    chosen = _choose(student, teacher, layers)
    theirs = teacher.state_dict()
    state = {}
    for name, value in student.state_dict().items():
        source = _source(name, chosen)
        # what only the first block of a stack has (T5's relative positions) stays with the first block
        source = source if source in theirs else name
        if source not in theirs:
            raise UserError("cut", f"the teacher has no {source}", "a teacher of the student's architecture")
        state[name] = _fitted(name, value, theirs[source])
    with torch.no_grad():
        student.load_state_dict(state)
    return chosen


def spaced(count: int, total: int) -> list[int]:
    """``count`` of ``total`` blocks, evenly spaced, first and last included.

    >>> spaced(6, 12), spaced(1, 12)
    ([0, 2, 4, 7, 9, 11], [0])
    """
    steps = max(count - 1, 1)
    return [(2 * i * (total - 1) + steps) // (2 * steps) for i in range(count)]


def _choose(student: nn.Module, teacher: nn.Module, layers: Layers | None) -> dict[str, list[int]]:
    """{path of a stack: the teacher's blocks}."""
    ours, theirs = blocks(student), blocks(teacher)
    if not ours:
        raise UserError("cut", f"{type(student).__name__} has no list of blocks", "networks that have one")
    given = layers if isinstance(layers, Mapping) else dict.fromkeys(ours, layers)
    for path in given:
        if path not in ours:
            raise unknown("cut.layers", path, ours, "stack of blocks")
    chosen = {}
    for path, stack in ours.items():
        if path not in theirs:
            raise UserError("cut", f"the teacher has no {path}", "a teacher of the student's architecture")
        count, total = len(stack), len(theirs[path])
        if count > total:
            raise UserError("cut", f"{path}: the student has {count} blocks, the teacher {total}", f"at most {total}")
        take = given.get(path)
        picked = spaced(count, total) if take is None else [int(i) for i in take]
        if len(picked) != count or not all(0 <= i < total for i in picked):
            raise UserError("cut.layers", f"{picked} for {path}", f"{count} numbers from 0 to {total - 1}")
        chosen[path] = picked
    return chosen


def _source(name: str, chosen: Mapping[str, Sequence[int]]) -> str:
    """The teacher's name for what the student calls ``name``."""
    for path, picked in chosen.items():
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            return f"{path}.{picked[int(index)]}.{rest}"
    return name


def _fitted(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    parts = name.split(".")
    table = len(parts) > 1 and (parts[-2] == "wpe" or "pos" in parts[-2])
    if table and ours.ndim == 2 and ours.shape[1:] == theirs.shape[1:] and len(ours) <= len(theirs):
        return theirs[: len(ours)]
    if ours.shape != theirs.shape:
        raise UserError(
            "cut",
            (f"{name} is {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher"),
            "a student of the teacher's widths, heads and vocabulary, with fewer blocks",
        )
    return theirs
