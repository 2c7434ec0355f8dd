"""Fitting the names of a checkpoint's tensors to a network's, without ever dropping or guessing one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from kdlab.errors import UserError, nearest
from kdlab.models.surgery import head_of

State = dict[str, Tensor]
Rules = Sequence[tuple[str, str | None]]
"""(pattern at the start of a key, replacement); None as a replacement drops the key."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "student.")
"""What DataParallel, torch.compile and training frameworks put before every key."""


def fit(net: nn.Module, state: State, rules: Rules | None, where: str) -> tuple[State, list[str]]:
    """``state`` under the names of ``net``, and what was done to them in words.

    Prefixes that every key has go; then the given rules apply, or else, if they help, those that the
    network's class knows of published checkpoints (its ``published``). A classifier under another name is
    recognised when exactly one layer is left over on either side, and BatchNorm's step counters, which old
    files lack, are filled in.

    Raises:
        UserError: keys are missing or left over, or two become one.
    """
    wanted = net.state_dict()
    state, notes = _strip(state, wanted)
    if rules is not None:
        state = rename(state, rules, where)
        notes.append("keys mapped")
    elif _misfit(state, wanted) and (known := getattr(net, "published", None)):
        renamed = rename(state, known, where)
        if _misfit(renamed, wanted) < _misfit(state, wanted):
            state = renamed
            notes.append("published names mapped")
    state, note = _rename_head(net, state, wanted)
    notes += note
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    if _misfit(state, wanted):
        raise _misfit_error(net, state, wanted, where)
    return {name: state[name] for name in wanted}, notes


def read_rules(mapping: Mapping[str, str | None] | str | Path | None, key: str) -> Rules | None:
    """Renaming rules from a mapping {pattern: replacement}, or from the YAML or JSON file that holds one.

    Raises:
        UserError: the file is not there or holds something else, or a pattern is not a regular expression.
    """
    if mapping is None:
        return None
    source: Any = mapping
    if isinstance(mapping, str | Path):
        try:
            text = Path(mapping).read_text(encoding="utf-8")
            source = json.loads(text) if str(mapping).endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{key}: cannot read {mapping}: {error}") from None
    if not isinstance(source, Mapping):
        raise UserError(f"{key}: expected {{pattern: replacement}}, got {type(source).__name__}")
    for pattern, replacement in source.items():
        if not isinstance(pattern, str) or not isinstance(replacement, str | None):
            raise UserError(f"{key}: {pattern!r}: {replacement!r} is not {{pattern: replacement}} of two texts")
        try:
            re.compile(pattern).sub(replacement or "", "")
        except (re.error, IndexError) as error:
            raise UserError(f"{key}: {pattern!r}: {replacement!r} is no regular expression: {error}") from None
    return list(source.items())


def rename(state: State, rules: Rules, where: str) -> State:
    """``state`` with each rule applied in turn to every key whose beginning matches it.

    Raises:
        UserError: two keys become one.
    """
    renamed: State = {}
    for old, tensor in state.items():
        new: str | None = old
        for pattern, replacement in rules:
            if new is not None and (match := re.match(pattern, new)):
                new = None if replacement is None else match.expand(replacement) + new[match.end() :]
        if new in renamed:
            raise UserError(f"{where}: two keys become {new!r}, one of them {old!r}")
        if new is not None:
            renamed[new] = tensor
    return renamed


def _strip(state: State, wanted: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """Take off the prefixes that all keys of the file have and the network's do not."""
    notes = []
    while found := next((p for p in PREFIXES if state and all(k.startswith(p) for k in state)), None):
        if all(k.startswith(found) for k in wanted):
            break
        state = {k[len(found) :]: v for k, v in state.items()}
        notes.append(f"prefix {found!r} taken off")
    return state, notes


def _rename_head(net: nn.Module, state: State, wanted: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    head = head_of(net)[0]
    extra = {k.rpartition(".")[0] for k in state if k not in wanted}
    if len(extra) != 1 or any(f"{head}.{leaf}" in state for leaf in ("weight", "bias")):
        return state, []
    (found,) = extra
    leaves = {k.rpartition(".")[2] for k in state if k not in wanted}
    if leaves != {k.rpartition(".")[2] for k in wanted if k.rpartition(".")[0] == head}:
        return state, []
    moved = {k if k in wanted else f"{head}.{k.rpartition('.')[2]}": v for k, v in state.items()}
    return moved, [f"{found} read as {head}"]


def _misfit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    return len(state.keys() ^ wanted.keys())


def _misfit_error(net: nn.Module, state: State, wanted: Mapping[str, Tensor], where: str) -> UserError:
    missing = [k for k in wanted if k not in state]
    extra = [k for k in state if k not in wanted]
    parts = [f"{where} does not fit {type(net).__name__}"]
    if missing:
        parts.append(f"{_count(missing)} missing ({_some(missing)})")
    if extra:
        close = nearest(extra[0], missing, n=1)
        hint = f"; nearest to the first: {close[0]}" if close else ""
        parts.append(f"{_count(extra)} unexpected ({_some(extra)}){hint}")
    if missing and not extra and all(".shortcut." in k for k in missing):
        parts.append("a file without shortcut weights is one for shortcut=A")
    elif not missing and all(".shortcut." in k for k in extra):
        parts.append("a file with shortcut weights is one for shortcut=B")
    elif missing and extra:
        parts.append("another depth or family, or names that need a mapping {pattern: replacement}")
    return UserError("; ".join(parts))


def _count(names: Sequence[str]) -> str:
    return "1 key" if len(names) == 1 else f"{len(names)} keys"


def _some(names: Sequence[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
