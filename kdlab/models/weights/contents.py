"""What a checkpoint file holds: its state dicts by the entries they are under, and which of them are averages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

State = dict[str, Tensor]

WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "student", "weights"),
    *("model_state", "network", "module", "params"),
)
"""Keys under which training scripts keep the weights, in the order in which they are looked for."""

AVERAGES = frozenset(("ema", "swa", "lawa", "average", "averaged", "averaging", "shadow", "polyak"))
"""Words in the name of an entry or of a prefix that say that the weights are an average over training."""

_NO_WEIGHTS = frozenset(
    ("optimizer", "optimizers", "optim", "scheduler", "schedulers", "scaler", "amp", "loops", "rng", "sampler")
)
"""Words in the name of an entry that holds the state of training."""

_NESTING = 4
"""Number of levels of mappings that are searched for state dicts: callbacks, one of them, its average, a wrapper."""


_NAMES = 100
"""Number of names under which one mapping is searched: a file may hold it under any number, also within itself."""


@dataclass(frozen=True)
class Entry:
    """State dict in a checkpoint."""

    name: str
    """Place in the file, such as ``callbacks.EMA.state_dict``; empty for a file that is a state dict itself."""
    state: State
    average: bool = False
    left_out: tuple[str, ...] = ()
    """Names beside its tensors that hold something else."""

    @property
    def rank(self) -> int:
        """Its place in the order in which weights are looked for, lower first; averages by name come last."""
        if not self.name:
            return 0
        last = self.name.rpartition(".")[2]
        if names_average(self.name):
            return 2 * len(WRAPPERS)
        return WRAPPERS.index(last) if last in WRAPPERS else len(WRAPPERS)


def words_of(name: str) -> set[str]:
    """Return the words of a name, in lower case: ``modelEMA`` and ``state_dict_ema`` both have ``ema``.

    >>> sorted(words_of("callbacks.EMAWeights"))
    ['callbacks', 'ema', 'weights']
    """
    parts = re.split(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", name)
    return {part.lower() for part in parts if part}


def names_average(name: str) -> bool:
    """Return whether a name says that it stands for an average of weights."""
    return bool(words_of(name) & AVERAGES)


def entries_of(content: object) -> list[Entry]:
    """Return the state dicts in the content of a checkpoint file, in the order in which they are looked for."""
    entries = _look(content, (), Counter())
    if any(entry.name == "current_model_state" for entry in entries):
        # Lightning's WeightAveraging stores the average in the place of the weights
        entries = [Entry(e.name, e.state, e.average or e.name == "state_dict", e.left_out) for e in entries]
    return sorted(entries, key=lambda entry: entry.rank)


def lists_average(content: object, levels: int = _NESTING) -> str | None:
    """Return the name of an average that is kept as a list without names (``shadow_params``); None if there is none.

    Args:
        content: content of a file.
        levels: number of levels of mappings that are searched; a mapping may be its own content.
    """
    if not isinstance(content, Mapping) or not levels:
        return None
    for name, inner in list(content.items())[:_NAMES]:
        if isinstance(inner, list) and inner and all(isinstance(v, Tensor) for v in inner) and names_average(str(name)):
            return str(name)
        if (deeper := lists_average(inner, levels - 1)) is not None:
            return f"{name}.{deeper}"
    return None


def of_training_alone(content: object) -> bool:
    """Return whether the content is an optimizer's state, or holds one and nothing else of a network."""
    if not isinstance(content, Mapping):
        return False
    return "param_groups" in content or any(
        words_of(str(name)) & _NO_WEIGHTS and isinstance(inner, Mapping | Sequence) and not isinstance(inner, str)
        for name, inner in content.items()
    )


def _look(content: object, path: tuple[str, ...], looked: Counter[int]) -> list[Entry]:
    if not isinstance(content, Mapping) or len(path) > _NESTING or "param_groups" in content:
        return []
    looked[id(content)] += 1
    if looked[id(content)] > _NAMES:
        return []
    entries = []
    for name, inner in content.items():
        if isinstance(name, str) and isinstance(inner, Mapping) and not words_of(name) & _NO_WEIGHTS:
            entries += _look(inner, (*path, name), looked)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    # loose tensors beside a state dict are numbers such as an accuracy, unless they are named as weights are
    if tensors and all(isinstance(name, str) for name in tensors) and (not entries or any("." in n for n in tensors)):
        name = ".".join(path)
        others = tuple(str(n) for n in content if n not in tensors)
        entries.append(Entry(name, tensors, names_average(name), others))
    return entries
