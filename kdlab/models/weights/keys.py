"""Fitting the names of a checkpoint's tensors to a network's, without ever dropping or guessing one in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdlab.config.override_text import argument
from kdlab.errors import UserError, nearest
from kdlab.models.transforms.surgery import head_of
from kdlab.models.weights.contents import State, names_average, words_of
from kdlab.system.files import Unreadable, read_json, read_yaml

Rules = Sequence[tuple[str, str | None]]
"""Renaming rules (pattern at the start of a key, replacement); None as a replacement drops the key."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "student.")
"""Prefixes that DataParallel, torch.compile and training frameworks put before every key."""

SEGMENTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
"""Parts that torch.compile, FSDP, activation checkpoints and Lightning put in the middle of a key."""

COUNTERS = frozenset(("total_ops", "total_params", "n_averaged"))
"""Last parts of names that hold counts of a profiler or of an average, and no weights."""

MEASURES = frozenset(
    (
        *("criterion", "criterions", "criteria", "loss", "losses", "metric", "metrics", "measure", "measures"),
        *("acc", "accuracy", "auroc", "auc", "f1", "precision", "recall", "confmat", "confusion", "ece"),
    )
)
"""Words in the name of an attribute that holds a loss or a metric beside a network."""


@dataclass
class Fit:
    """Tensors of a file under one prefix, as a network names them."""

    prefix: str
    state: State
    """Tensors under the network's names, step counters of BatchNorm filled in, with those that prevent a fit."""
    missing: list[str]
    extra: list[str]
    """Names under the prefix that the network does not have."""
    ignored: list[str] = field(default_factory=list)
    """Names of the file that belong to no network: those of losses, metrics, profilers, and outside of the prefix."""
    notes: list[str] = field(default_factory=list)
    average: bool = False
    """Whether the weights are an average, by the name of their prefix or a counter beside them."""

    @property
    def fits(self) -> bool:
        """Whether every tensor has its place, and every place a tensor."""
        return not self.missing and not self.extra


def fit(net: nn.Module, state: State, rules: Rules | None, where: str) -> list[Fit]:
    """Rename ``state`` to the names of ``net``, once for each prefix under which all of the network is found.

    Prefixes that every key has go; then the given rules apply, or else, if they help, those that the network's class
    knows of published checkpoints (its ``published``). A classifier under another name is recognised when exactly one
    layer is left over on either side, and BatchNorm's step counters, which old files lack, are filled in.

    Returns:
        The fits; where there is none, the one that comes nearest.

    Raises:
        UserError: ``state`` is split between processes, or two keys become one.
    """
    wanted = net.state_dict()
    if any(key.rpartition(".")[2].lstrip("_").startswith("flat_param") for key in state):
        raise UserError(
            where,
            "holds FSDP's flattened parameters, of which nobody knows the parts",
            "a full state dict (FSDP.state_dict_type(net, StateDictType.FULL_STATE_DICT))",
        )
    state, notes = _strip(*_without_segments(state, wanted), wanted)
    if rules is not None:
        state = rename(state, rules, where)
        notes.append("keys mapped")
    tried = [_fit_under(net, prefix, state, rules is None, where) for prefix in _prefixes(state, wanted)]
    for one in tried:
        one.notes[:0] = notes
    if not (fits := [one for one in tried if one.fits]):
        fits = [min(tried, key=lambda one: (len(one.missing), len(one.extra)))]
    return fits


def misfit(net: nn.Module, found: Fit, where: str, key: str) -> UserError:
    """Return the error for tensors that do not fit a network, with what to type where dropping some would do.

    Args:
        net: the network.
        found: fit that comes nearest.
        where: key and file, for the message.
        key: the config key of a mapping of names.
    """
    missing, extra = found.missing, found.extra
    reasons = [f"{where} does not fit {type(net).__name__}"]
    if missing:
        reasons.append(f"{count(missing)} missing ({some(missing)})")
    if extra:
        close = nearest(extra[0], missing, n=1)
        hint = f"; nearest to the first: {close[0]}" if close else ""
        reasons.append(f"{count(extra)} unexpected ({some(extra)}){hint}")
    children = {name for name, _ in net.named_children()}
    strange = {k.partition(".")[0] for k in extra} - children
    if missing and not extra and all(".shortcut." in k for k in missing):
        reasons.append("a file without shortcut weights is one for shortcut=A")
    elif not missing and all(".shortcut." in k for k in extra):
        reasons.append("a file with shortcut weights is one for shortcut=B")
    elif not missing and len(strange) == len({k.partition(".")[0] for k in extra}):
        whole = {f"{name}." if any(k.startswith(f"{name}.") for k in extra) else name for name in strange}
        dropped = {pattern(found.prefix + name): None for name in sorted(whole)}
        reasons.append(f"if they belong to no network like it, drop them: {argument(key, dropped)}")
    elif missing and extra:
        reasons.append("another depth or family, or names that need a mapping {pattern: replacement}")
    return UserError("; ".join(reasons))


def pattern(name: str) -> str:
    """Return a pattern for keys that begin with ``name``, of characters allowed in a mapping on the command line."""
    return re.sub(r"[^\w.\-/]", ".", name)


def read_rules(mapping: Mapping[str, str | None] | str | Path | None, key: str) -> Rules | None:
    """Read renaming rules from a mapping {pattern: replacement}, or from the YAML or JSON file that holds one.

    Raises:
        UserError: the file is not there or holds something else, or a pattern is not a regular expression.
    """
    if mapping is None:
        return None
    source: Any = mapping
    if isinstance(mapping, str | Path):
        try:
            source = read_json(mapping) if str(mapping).endswith(".json") else read_yaml(mapping)
        except (OSError, Unreadable) as error:
            raise UserError(key, f"cannot read {mapping}: {error}") from None
    if not isinstance(source, Mapping):
        raise UserError(key, f"expected {{pattern: replacement}}, got {type(source).__name__}")
    for old, replacement in source.items():
        if not isinstance(old, str) or not isinstance(replacement, str | None):
            raise UserError(key, f"{old!r}: {replacement!r} is not {{pattern: replacement}} of two texts")
        try:
            re.compile(old).sub(replacement or "", "")
        except (re.error, IndexError) as error:
            raise UserError(key, f"{old!r}: {replacement!r} is no regular expression: {error}") from None
    return list(source.items())


def rename(state: State, rules: Rules, where: str) -> State:
    """Rename ``state`` by each rule in turn, applied to every key whose beginning matches it.

    Raises:
        UserError: two keys become one.
    """
    renamed: State = {}
    for old, tensor in state.items():
        new: str | None = old
        for start, replacement in rules:
            if new is not None and (match := re.match(start, new)):
                new = None if replacement is None else match.expand(replacement) + new[match.end() :]
        if new in renamed:
            raise UserError(where, f"two keys become {new!r}, one of them {old!r}")
        if new is not None:
            renamed[new] = tensor
    return renamed


def some(names: Sequence[str], n: int = 3) -> str:
    """Join the first names of many.

    >>> some(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def _without_segments(state: State, wanted: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """Remove from the middle of names the parts that wrappers of inner modules put there."""
    parts = [
        part
        for part in SEGMENTS
        if not any(part in k for k in wanted) and any(part in k and not k.startswith(part) for k in state)
    ]
    short = {re.sub("|".join(map(re.escape, parts)), "", key): tensor for key, tensor in state.items()}
    if not parts or len(short) < len(state):
        return state, []
    return short, [f"{', '.join(parts)} taken out of names"]


def _strip(state: State, notes: list[str], wanted: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """Take off the prefixes that all keys of the file have and the network's do not."""
    prefixes = (*PREFIXES, *SEGMENTS)
    while prefix := next((p for p in prefixes if state and all(k.startswith(p) for k in state)), None):
        if all(k.startswith(prefix) for k in wanted):
            break
        state = {k[len(prefix) :]: v for k, v in state.items()}
        notes.append(f"prefix {prefix!r} taken off")
    return state, notes


def _prefixes(state: State, wanted: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes under which a whole network may be: those of at least as many keys as it has tensors."""
    counts: dict[str, int] = {}
    for key in state:
        for match in re.finditer(r"\.", key):
            start = key[: match.end()]
            counts[start] = counts.get(start, 0) + 1
    least = sum(not key.endswith("num_batches_tracked") for key in wanted)
    return ["", *(start for start, count in counts.items() if count >= least)]


def _fit_under(net: nn.Module, prefix: str, state: State, publish: bool, where: str) -> Fit:
    wanted = net.state_dict()
    inside = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    ignored = [key for key in state if not key.startswith(prefix)]
    children = {name for name, _ in net.named_children()}
    for key in [k for k in inside if k not in wanted and _no_weights(k, children)]:
        del inside[key]
        ignored.append(prefix + key)
    notes = []
    if publish and _differences(inside, wanted) and (known := getattr(net, "published", None)):
        renamed = rename(inside, known, where)
        if _differences(renamed, wanted) < _differences(inside, wanted):
            inside = renamed
            notes.append("published names mapped")
    inside, note = _rename_head(net, inside, wanted)
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            inside.setdefault(name, tensor)
    return Fit(
        prefix,
        inside,
        missing=[k for k in wanted if k not in inside],
        extra=[k for k in inside if k not in wanted],
        ignored=ignored,
        notes=[*notes, *note],
        # AveragedModel keeps its counter beside the network
        average=names_average(prefix) or f"{prefix.removesuffix('module.')}n_averaged" in ignored,
    )


def _no_weights(key: str, children: set[str]) -> bool:
    """Return whether a name says that it belongs to a loss, a metric or a profiler."""
    first, _, _ = key.partition(".")
    return key.rpartition(".")[2] in COUNTERS or (first not in children and bool(words_of(first) & MEASURES))


def _rename_head(net: nn.Module, state: State, wanted: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    head = head_of(net)[0]
    extra = {k.rpartition(".")[0] for k in state if k not in wanted}
    if len(extra) != 1 or any(f"{head}.{leaf}" in state for leaf in ("weight", "bias")):
        return state, []
    (other,) = extra
    leaves = {k.rpartition(".")[2] for k in state if k not in wanted}
    if leaves != {k.rpartition(".")[2] for k in wanted if k.rpartition(".")[0] == head}:
        return state, []
    moved = {k if k in wanted else f"{head}.{k.rpartition('.')[2]}": v for k, v in state.items()}
    return moved, [f"{other} read as {head}"]


def _differences(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    return len(state.keys() ^ wanted.keys())


def count(names: Sequence[str]) -> str:
    """Format the number of keys."""
    return "1 key" if len(names) == 1 else f"{len(names)} keys"
