"""A student cut from its teacher: the same network with some of the blocks left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlab.errors import UserError, unknown

Layers = Sequence[int] | Mapping[str, Sequence[int]]
"""Numbers of the teacher's blocks to take, for every stack alike or by the stack's path."""


def blocks(net: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the stacks of blocks of ``net`` by their paths: its lists of modules, less those inside a block.

    >>> blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}))
    {'layers': ModuleList(
      (0): Linear(in_features=2, out_features=2, bias=True)
    )}
    """
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{p}.") for p in stacks):
            stacks[name] = module
    return stacks


def cut(student: nn.Module, teacher: nn.Module, layers: Layers | None = None) -> dict[str, list[int]]:
    """Start ``student`` from ``teacher``: embeddings, final norm and head, and some of its blocks.

    Sanh et al., *DistilBERT, a distilled version of BERT*, NeurIPS 2019 workshop on Energy Efficient Machine Learning:
    the student takes one layer out of two. By default block i of s comes from the teacher's block
    ``round(i (t - 1) / (s - 1))`` of t: evenly spaced, first and last included. For 12 to 6 these are 0, 2, 4, 7, 9,
    11, the choice with which DistilGPT-2 and DistilBERT were made.

    Any two networks with the same names will do, encoder-decoders included, if they differ in nothing but the number of
    blocks. A table of positions may be shorter than the teacher's: its first rows are taken.

    Args:
        student: network that is changed in place.
        teacher: network that is left as it is; nothing is shared with it.
        layers: the teacher's blocks to take, in order; or {path of a stack: blocks}. None spaces them evenly.

    Returns:
        {path of a stack: the teacher's blocks it was made of}.

    Raises:
        UserError: the networks differ in width or form, the student is the deeper one, or ``layers`` names a block
            that is not there or not as many as the student has.
    """
    chosen = _choose(student, teacher, layers)
    teacher_state = teacher.state_dict()
    state = {}
    for name, value in student.state_dict().items():
        source = _source(name, chosen)
        # what only the first block of a stack has (T5's relative positions) stays with the first block
        source = source if source in teacher_state else name
        if source not in teacher_state:
            raise UserError("cut", f"the teacher has no {source}", "a teacher of the student's architecture")
        state[name] = _fitted(name, value, teacher_state[source])
    with torch.no_grad():
        student.load_state_dict(state)
    return chosen


def spaced(count: int, total: int) -> list[int]:
    """Choose ``count`` of ``total`` blocks, evenly spaced, first and last included.

    >>> spaced(6, 12), spaced(1, 12)
    ([0, 2, 4, 7, 9, 11], [0])
    """
    steps = max(count - 1, 1)
    return [(2 * i * (total - 1) + steps) // (2 * steps) for i in range(count)]


def _choose(student: nn.Module, teacher: nn.Module, layers: Layers | None) -> dict[str, list[int]]:
    """Choose the teacher's blocks for each stack: {path of a stack: blocks}."""
    student_stacks, teacher_stacks = blocks(student), blocks(teacher)
    if not student_stacks:
        raise UserError("cut", f"{type(student).__name__} has no list of blocks", "networks that have one")
    given = layers if isinstance(layers, Mapping) else dict.fromkeys(student_stacks, layers)
    for path in given:
        if path not in student_stacks:
            raise unknown("cut.layers", path, student_stacks, "stack of blocks")
    chosen = {}
    for path, stack in student_stacks.items():
        if path not in teacher_stacks:
            raise UserError("cut", f"the teacher has no {path}", "a teacher of the student's architecture")
        count, total = len(stack), len(teacher_stacks[path])
        if count > total:
            raise UserError("cut", f"{path}: the student has {count} blocks, the teacher {total}", f"at most {total}")
        take = given.get(path)
        picked = spaced(count, total) if take is None else [int(i) for i in take]
        if len(picked) != count or not all(0 <= i < total for i in picked):
            raise UserError("cut.layers", f"{picked} for {path}", f"{count} numbers from 0 to {total - 1}")
        chosen[path] = picked
    return chosen


def _source(name: str, chosen: Mapping[str, Sequence[int]]) -> str:
    """Return the teacher's name for what the student calls ``name``."""
    for path, picked in chosen.items():
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            return f"{path}.{picked[int(index)]}.{rest}"
    return name


def _fitted(name: str, student_tensor: Tensor, teacher_tensor: Tensor) -> Tensor:
    parts = name.split(".")
    table = len(parts) > 1 and (parts[-2] == "wpe" or "pos" in parts[-2])
    if (
        table
        and student_tensor.ndim == 2
        and student_tensor.shape[1:] == teacher_tensor.shape[1:]
        and len(student_tensor) <= len(teacher_tensor)
    ):
        return teacher_tensor[: len(student_tensor)]
    if student_tensor.shape != teacher_tensor.shape:
        raise UserError(
            "cut",
            f"{name} is {tuple(student_tensor.shape)} in the student and {tuple(teacher_tensor.shape)} in the teacher",
            "a student of the teacher's widths, heads and vocabulary, with fewer blocks",
        )
    return teacher_tensor
