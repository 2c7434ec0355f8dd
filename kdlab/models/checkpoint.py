"""Weights from and to files: strictly, safely, and whole.

Files come from strangers: nothing in them is ever executed (PyTorch's restricted unpickler, or safetensors),
the checksums of a zip archive are verified first, and weights that are not finite are refused.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlab import integrity
from kdlab.errors import UserError, nearest
from kdlab.files import atomic_write
from kdlab.models.keys import State, fit, read_rules
from kdlab.models.surgery import classifiers_of, head_of

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "student", "weights")
"""Keys under which training scripts keep the weights, in the order in which they are looked for."""

HASH_FIELD = "kdlab_sha256"
FOLDER = 0x10
"""The attribute by which a zip archive marks a folder."""


def load_weights(
    net: nn.Module,
    path: str | Path,
    mapping: Mapping[str, str | None] | str | Path | None = None,
    key: str = "checkpoint",
    head: bool = True,
) -> str:
    """Load a checkpoint into ``net``, in place and strictly: each tensor has its place, each place a tensor.

    Takes ``torch.save`` files (zip or legacy form) and safetensors, whatever their suffix; weights at the top
    or under one of ``WRAPPERS``; keys with the usual prefixes, of published layouts, or with another
    classifier name. Other layouts need a mapping. Nothing in ``net`` changes unless all of it fits. A file of a run
    folder is first held against the hash that its run wrote.

    Args:
        net: the network.
        path: the file.
        mapping: {pattern: replacement}, applied in order to the keys: a regular expression that matches the
            beginning of a key (a plain prefix is one), and what comes in its place; None drops the key. Or a
            YAML or JSON file that holds such a mapping.
        key: the config key that ``path`` came from, for messages.
        head: False leaves the network's own classifier, whatever number of classes the file has.

    Returns:
        What was loaded, in one line for the log.

    Raises:
        UserError: the file is missing, damaged, foreign or unsafe, does not fit, holds weights that are not
            finite, or is not what its run wrote.
    """
    integrity.check(path, key)
    parent, _, _ = key.rpartition(".")
    rules = read_rules(mapping, f"{parent}.mapping" if parent else "mapping")
    state, notes = fit(net, read_state(path, key), rules, f"{key}: {path}")
    target = net.state_dict()
    if not head:
        heads = classifiers_of(net)
        state = {k: target[k] if k.startswith(tuple(f"{name}." for name in heads)) else v for k, v in state.items()}
        notes.append(f"{', '.join(heads)} left as it is")
    _check_shapes(net, state, target, path, key)
    net.load_state_dict(state)
    return "; ".join([f"{len(state)} tensors from {path}", *notes])


def read_state(path: str | Path, key: str = "checkpoint") -> State:
    """The weights in a checkpoint file, under the file's own names, on the CPU.

    Raises:
        UserError: the file is missing, damaged, foreign or unsafe, or holds weights that are not finite.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise _not_there(path, key) from None
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
    if not start:
        raise UserError(f"{key}: {path} is empty")
    if start[8:] == b"{":
        state = _read_safetensors(path, key)
    else:
        if start[:2] == b"PK":
            _check_zip(path, key)
        elif start[:1] != pickle.PROTO:
            raise UserError(f"{key}: {path} is not a checkpoint; accepted: torch.save files and safetensors")
        state = _unwrap(_read_torch(path, key), path, key)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{key}: {path} holds weights that are not finite, first in {name}")
    return state


def save_weights(state: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict (or a network's) as plain contiguous CPU tensors, whole or not at all.

    A path that ends in ``.safetensors`` is written in that format, with a checksum that ``read_state``
    verifies (the format itself has none).
    """
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    # A clone owns its memory: torch.save would otherwise write all that a view belongs to.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with atomic_write(path) as file:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import save

            file.write(save(plain, metadata={HASH_FIELD: weights_hash(plain)}))
        else:
            torch.save(plain, file)


def weights_hash(state: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of a state dict (or of a network's), in any order.

    A network's input normalisation is not part of its state dict, and so not of the hash.
    """
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_shapes(net: nn.Module, state: State, target: Mapping[str, Tensor], path: str | Path, key: str) -> None:
    wrong = [k for k in state if state[k].shape != target[k].shape]
    head = head_of(net)[0]
    if wrong and all(k.startswith(f"{head}.") and state[k].shape[1:] == target[k].shape[1:] for k in wrong):
        theirs, ours = state[wrong[0]].shape[0], target[wrong[0]].shape[0]
        raise UserError(f"{key}: has {theirs} classes, data has {ours} ({path})")
    if wrong:
        shown = ", ".join(f"{k} is {_shape(state[k])}, not {_shape(target[k])}" for k in wrong[:3])
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{key}: {path} does not fit {type(net).__name__}: {shown}{more}")
    for name, tensor in state.items():
        if tensor.is_floating_point() != target[name].is_floating_point():
            raise UserError(f"{key}: {name} in {path} is {tensor.dtype}, the network's {target[name].dtype}")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _not_there(path: Path, key: str) -> UserError:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, siblings)
    return UserError(f"{key}: no file {path}" + (f"; nearest: {', '.join(close)}" if close else ""))


def _check_zip(path: Path, key: str) -> None:
    """Compare every member with its checksum; torch.load itself does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            folders = [member.filename for member in archive.infolist() if member.external_attr & FOLDER]
    except Exception:  # whatever damaged bytes make the reader do
        raise UserError(f"{key}: {path} is damaged or cut off: not a whole zip archive") from None
    if damaged is not None:
        raise UserError(f"{key}: {path} is damaged: the checksum of {damaged} is wrong")
    if folders:  # torch.load would take what happens to be in memory for the contents of one
        raise UserError(f"{key}: {path} is damaged: {folders[0]} is marked as a folder")


def _read_torch(path: Path, key: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, which no user can act on
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises many kinds on bytes that are not its own
        name = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class (?:\S*\.)?([\w.]+) was not", str(error))
        if name:
            raise UserError(
                f"{key}: {path} refused: it wants to run code ({name[1]}); save the state_dict alone"
            ) from None
        raise UserError(
            f"{key}: {path} is damaged, cut off or no checkpoint; accepted: torch.save files, safetensors"
        ) from None


def _read_safetensors(path: Path, key: str) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{key}: {path} is damaged or cut off: {error}") from None
    if HASH_FIELD in metadata and metadata[HASH_FIELD] != weights_hash(state):
        raise UserError(f"{key}: {path} is damaged: its checksum is wrong")
    return state


def _unwrap(content: Any, path: Path, key: str) -> State:
    """The state dict in ``content``, under as many wrappers as there are."""
    while isinstance(content, Mapping):
        if content and all(isinstance(v, Tensor) for v in content.values()):
            return {str(name): tensor for name, tensor in content.items()}
        inner = next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = inner
    if isinstance(content, Mapping):
        held = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise UserError(
            f"{key}: {path} holds no weights: expected tensors, or one of {', '.join(WRAPPERS)}; found {held}"
        )
    raise UserError(f"{key}: {path} holds no weights but a {type(content).__name__}")
