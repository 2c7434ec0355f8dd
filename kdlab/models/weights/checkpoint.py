"""Weights from and to files: strictly, safely, and whole.

Files come from strangers: nothing in them is ever executed (PyTorch's restricted unpickler, or safetensors),
the checksums of a zip archive are verified first, and weights that are not finite are refused.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.errors import UserError, nearest
from kdlab.models.transforms.surgery import classifiers_of, head_of
from kdlab.models.weights.choice import Where, choose
from kdlab.models.weights.contents import WRAPPERS, Entry, State, entries_of, lists_average, of_training_alone
from kdlab.models.weights.keys import read_rules
from kdlab.models.weights.shards import shards_of, weights_in
from kdlab.system import integrity
from kdlab.system.arrays import check_archive
from kdlab.system.files import Unreadable, atomic_write, expanded, open_regular

HASH_FIELD = "kdlab_sha256"
SPREAD_BYTES = 64 * 2**20
"""Bytes that tensors that share their numbers may hold beyond the file's size."""

FOLDER = 0x10
"""Attribute by which a zip archive marks a folder."""


class _Inert:
    """Stand-in for a setting or number stored beside weights, of which nothing is built or looked at."""

    def __new__(cls, *args: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


_INERT: list[Any] = [
    (_Inert, name)
    for name in (
        *("argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path"),
        *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "datetime.datetime", "datetime.timedelta"),
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.ndarray"),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool", "UInt8")),
    )
]
"""Classes of objects that training scripts commonly store beside weights."""


def load_weights(
    net: nn.Module,
    path: str | Path,
    mapping: Mapping[str, str | None] | str | Path | None = None,
    key: str = "checkpoint",
    head: bool = True,
    weights: str | None = None,
) -> str:
    """Load a checkpoint into ``net``, in place and strictly: each tensor has its place, each place a tensor.

    Takes ``torch.save`` files (zip or legacy form) and safetensors, whatever their suffix, and those that an index
    names; weights at the top or under entries such as ``WRAPPERS``; keys with the usual prefixes, of published
    layouts, or with another classifier name. Other layouts need a mapping. What a file holds of losses and metrics
    beside a network is left out, and said. Nothing in ``net`` changes unless all of it fits. A file of a run
    folder is first held against the hash that its run wrote.

    Args:
        net: the network.
        path: the file, or a folder that holds one.
        mapping: {pattern: replacement}, applied in order to the keys: a regular expression that matches the
            beginning of a key (a plain prefix is one), and what comes in its place; None drops the key. Or a
            YAML or JSON file that holds such a mapping.
        key: the config key that ``path`` came from, for messages.
        head: False leaves the network's own classifier, whatever number of classes the file has.
        weights: choice among several in the file: ``plain``, ``ema`` (their average over training), or the name of an
            entry or prefix. None takes the plain ones, or an average where there are no others.

    Returns:
        What was loaded, in one line for the log.

    Raises:
        UserError: the file is missing, damaged, foreign or unsafe, does not fit, holds weights that are not
            finite, or is not what its run wrote.
    """
    integrity.check(path, key)
    where = Where(str(path), key)
    rules = read_rules(mapping, where.other("mapping"))
    state, notes = choose(net, read_entries(path, key), rules, weights, where, head)
    _check_finite(state, path, key)
    target = net.state_dict()
    if not head:
        heads = classifiers_of(net)
        state = {k: target[k] if k.startswith(tuple(f"{name}." for name in heads)) else v for k, v in state.items()}
        notes.append(f"{', '.join(heads)} left as it is")
    _check_shapes(net, state, target, path, key)
    net.load_state_dict(state)
    return "; ".join([f"{len(state)} tensors from {path}", *notes])


def read_state(path: str | Path, key: str = "checkpoint") -> State:
    """Read the weights in a checkpoint file, under the file's own names, on the CPU.

    Raises:
        UserError: the file is missing, damaged, foreign or unsafe, or holds weights that are not finite.
    """
    state = read_entries(path, key)[0].state
    _check_finite(state, path, key)
    return state


def read_entries(path: str | Path, key: str = "checkpoint") -> list[Entry]:
    """Read the state dicts in a checkpoint, on the CPU: at least one, the one that the file is about first.

    Args:
        path: a file, an index of several, or a folder that holds one of these.
        key: the config key that ``path`` came from, for messages.

    Raises:
        UserError: the file is missing, damaged, foreign or unsafe, or holds no weights.
    """
    path = weights_in(expanded(path), key)
    parts = shards_of(path, key)
    if not parts:
        return _read_file(path, key)
    together: State = {}
    for part in parts:
        together |= _read_file(part, key)[0].state
    return [Entry("", together)]


def _read_file(path: Path, key: str) -> list[Entry]:
    try:
        with open_regular(path) as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise _not_there(path, key) from None
    except (OSError, Unreadable) as error:
        raise UserError(key, f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not start:
        raise UserError(key, f"{path} is empty")
    if start[8:] == b"{":
        return [Entry("", _read_safetensors(path, key))]
    if start[:2] == b"PK":
        _check_zip(path, key, size)
    elif start[:1] != pickle.PROTO:
        raise UserError(key, f"{path} is not a checkpoint", "torch.save files and safetensors")
    content = _read_torch(path, key)
    entries = entries_of(content)
    if not entries:
        raise _no_weights(content, path, key)
    for entry in entries:
        _check_spread(entry.state, size, path, key)
    return entries


def _check_spread(state: Mapping[str, Tensor], size: int, path: Path, key: str) -> None:
    """Refuse views that make a small file into a large network: a view can be of any size, of one stored number."""
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if held > SPREAD_BYTES + 4 * size:
        raise UserError(
            key, (f"{path} is damaged: {size / 2**20:.1f} MiB that hold {held / 2**20:,.0f} MiB of weights")
        )


def _check_finite(state: Mapping[str, Tensor], path: str | Path, key: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(key, f"{path} holds weights that are not finite, first in {name}")


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
    """Compute the SHA-256 of the names, types, shapes and bytes of a state dict (or of a network's), in any order.

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
    if wrong and all(not state[k].numel() for k in wrong):
        raise UserError(
            key,
            (f"{path} holds empty tensors, those of a network split between processes (DeepSpeed's ZeRO-3)"),
            "the file that zero_to_fp32.py makes of all parts",
        )
    head = head_of(net)[0]
    if wrong and all(k.startswith(f"{head}.") and state[k].shape[1:] == target[k].shape[1:] for k in wrong):
        file_classes, data_classes = state[wrong[0]].shape[0], target[wrong[0]].shape[0]
        raise UserError(key, f"has {file_classes} classes, data has {data_classes} ({path})")
    if wrong:
        shown = ", ".join(f"{k} is {_shape(state[k])}, not {_shape(target[k])}" for k in wrong[:3])
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(key, f"{path} does not fit {type(net).__name__}: {shown}{more}")
    for name, tensor in state.items():
        if tensor.is_floating_point() != target[name].is_floating_point():
            raise UserError(key, f"{name} in {path} is {tensor.dtype}, the network's {target[name].dtype}")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _not_there(path: Path, key: str) -> UserError:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, siblings)
    return UserError(key, f"no file {path}" + (f"; nearest: {', '.join(close)}" if close else ""))


def _check_zip(path: Path, key: str, size: int) -> None:
    """Compare every member with its checksum; torch.load itself does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, size)
            damaged = archive.testzip()
            folders = [member.filename for member in archive.infolist() if member.external_attr & FOLDER]
    except Unreadable as error:
        raise UserError(key, f"{path} is refused: {error}") from None
    except Exception:  # whatever damaged bytes make the reader do
        raise UserError(key, f"{path} is damaged or cut off: not a whole zip archive") from None
    if damaged is not None:
        raise UserError(key, f"{path} is damaged: the checksum of {damaged} is wrong")
    if folders:  # torch.load would take what happens to be in memory for the contents of one
        raise UserError(key, f"{path} is damaged: {folders[0]} is marked as a folder")


def _read_torch(path: Path, key: str) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
            warnings.simplefilter("ignore")  # about pickle protocols, which no user can act on
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises many kinds on bytes that are not its own
        name = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class (?:\S*\.)?([\w.]+) was not", str(error))
        if name:
            raise UserError(
                key, f"{path} refused: it wants to run code ({name[1]}); save the state_dict alone"
            ) from None
        raise UserError(key, f"{path} is damaged, cut off or no checkpoint", "torch.save files, safetensors") from None


def _read_safetensors(path: Path, key: str) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(key, f"{path} is damaged or cut off: {error}") from None
    if HASH_FIELD in metadata and metadata[HASH_FIELD] != weights_hash(state):
        raise UserError(key, f"{path} is damaged: its checksum is wrong")
    return state


def _no_weights(content: object, path: Path, key: str) -> UserError:
    """Return the error for a file that holds no state dict, with what it holds instead."""
    if not isinstance(content, Mapping):
        return UserError(key, f"{path} holds no weights but a {type(content).__name__}")
    held = ", ".join(map(str, list(content)[:5])) or "nothing"
    if (listed := lists_average(content)) is not None:
        return UserError(
            key,
            (f"{path} holds an average as a list without names ({listed}), of which nobody knows the layers"),
            "a state dict",
        )
    if of_training_alone(content):
        return UserError(
            key,
            f"{path} holds the state of an optimizer and no weights (found {held})",
            "the file with the network's state dict",
        )
    return UserError(key, f"{path} holds no weights: expected tensors, or one of {', '.join(WRAPPERS)}; found {held}")
