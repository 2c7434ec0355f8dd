"""Inputs and class ids that are arrays already, in files or in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from kdlab.data import array_inputs
from kdlab.data.module import Common, ImageData
from kdlab.data.raw import RawDataset, Rows
from kdlab.errors import UserError, unknown
from kdlab.system.arrays import read_array, read_arrays
from kdlab.system.files import Unreadable

_KEYS = ("inputs", "targets", "val_inputs", "val_targets", "test_inputs", "test_targets", "class_names")
_MOST_CLASSES = 1_000_000
"""Maximum number of classes that ids may number; more of them are ids of something else."""


def tensors(
    inputs: Any = None,
    targets: Any = None,
    test: int | float | None = None,
    class_names: Sequence[str] | None = None,
    **common: Unpack[Common],
) -> ImageData:
    """Load inputs and class ids from files or from Python.

    Args:
        inputs: a tensor or array, a ``.npy`` file, or a ``.pt`` or ``.npz`` file that holds ``inputs`` and ``targets``
            (and perhaps ``val_inputs``, ``val_targets``, ``test_inputs``, ``test_targets``, ``class_names``). Pictures
            (N, C, H, W), (N, H, W, C) as :func:`~kdlab.data.array_inputs.channels_first` tells them apart, or grey
            (N, H, W): uint8, or float in [0, 1]. Tables (N, F).
        targets: class ids (N,) from 0 on without gaps, a column (N, 1) of them, or one-hot (N, C); as a tensor, array
            or ``.npy`` file, where ``inputs`` does not hold them. Other ids are chosen and renumbered by ``classes``.
        test: rows (a number, or a fraction) taken from train where no test rows are given; None is a tenth.
        class_names: names of the classes, in the order of the ids; None numbers them.

    The other arguments are :class:`ImageData`'s.

    Raises:
        UserError: for files that are missing, damaged or hold something else, and rows that make no sense.
    """
    if inputs is None:
        raise UserError("data.inputs", "null", "a .pt, .npz or .npy file (or, in Python, a tensor)")
    held, notes = _load(inputs, "data.inputs"), []
    if targets is not None:
        if "targets" in held:
            notes.append("the targets are those of data.targets; data.inputs holds others")
        held["targets"] = _targets_alone(targets)
    splits: dict[str, Rows] = {}
    classes = 2
    for split in ("", "val_", "test_"):
        names = f"{split}inputs", f"{split}targets"
        missing = [name for name in names if held.get(name) is None]
        if len(missing) == 1 or (missing and not split):
            raise UserError(
                f"data.{missing[0].removeprefix(split)}",
                f"there are no {missing[0]}; the data hold {', '.join(held) or 'nothing'}",
            )
        if not missing:
            splits[split], columns, lines = _rows(held, *names)
            notes += lines
            classes = max(classes, columns)
    class_names = _names(class_names if class_names is not None else held.get("class_names"), splits, classes)
    if common.get("classes") is None:
        _check_ids(splits, class_names)
    source = RawDataset(
        Path(inputs).stem if isinstance(inputs, (str, Path)) else "tensors",
        splits[""],
        class_names,
        val=splits.get("val_"),
        test=splits.get("test_", 0.1 if test is None else test),
        key="data.inputs",
        notes=list(dict.fromkeys(notes)),
    )
    return ImageData(source, **common)


def _targets_alone(value: Any) -> Any:
    """Return the targets that ``data.targets`` names: an array, or a file with one."""
    held = _load(value, "data.targets")
    if isinstance(value, (str, Path)) and "inputs" not in held and "targets" in held:
        return held["targets"]
    if set(held) != {"inputs"}:
        raise UserError("data.targets", f"{value} holds {', '.join(held) or 'nothing'}", "one array of class ids")
    return held["inputs"]


def _load(value: Any, key: str) -> dict[str, Any]:
    """Read the arrays of a file, by name; a bare tensor is called ``inputs``."""
    if not isinstance(value, (str, Path)):
        return _known(dict(value), key) if isinstance(value, dict) else {"inputs": value}
    path = Path(value).expanduser()
    if not path.is_file():
        raise UserError(key, f"there is no file {path}", "a .pt, .npz or .npy file")
    try:
        if path.suffix in (".npz", ".npy"):
            content = read_arrays(path) if path.suffix == ".npz" else read_array(path)
        elif path.suffix in (".pt", ".pth"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UserError(key, f"{path} is of no known kind", ".pt, .npz and .npy files")
    except UserError:
        raise
    except Exception as error:  # damaged files raise almost anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(key, f"{path} is truncated, damaged or holds more than plain tensors ({first})") from None
    return _known(content, f"{key}: {path}") if isinstance(content, dict) else {"inputs": content}


def _known(content: dict[str, Any], where: str) -> dict[str, Any]:
    if strange := [name for name in content if name not in _KEYS]:
        raise unknown(where, strange[0], _KEYS, "array")
    return content


def _rows(held: dict[str, Any], inputs: str, targets: str) -> tuple[Rows, int, list[str]]:
    """Return inputs and class ids of one split, its number of classes if known, and lines on how they are read."""
    try:
        values, of_shape = _inputs(array_inputs.to_tensor(held[inputs]))
    except Unreadable as error:
        which = "" if inputs == "inputs" else f"{inputs}: "
        raise UserError("data.inputs", f"{which}{error}") from None
    try:
        ids, classes, of_ids = array_inputs.as_class_ids(held[targets])
    except (Unreadable, ValueError) as error:
        raise UserError("data.targets", f"{targets} {error}") from None
    return Rows(values, ids), classes, [line for line in (of_shape, of_ids) if line]


def _inputs(inputs: Tensor) -> tuple[Tensor, str]:
    """Convert inputs to uint8 or float pictures (N, C, H, W) or a float table, with a line on how their shape is read.

    Raises:
        Unreadable: for another shape, and values that are not accepted.
    """
    if inputs.ndim not in (2, 3, 4) or 0 in inputs.shape[1:]:
        raise Unreadable(
            f"shape {array_inputs.shape(inputs)}; accepted: (N, C, H, W), (N, H, W, C), (N, H, W), or (N, F) for a "
            "table"
        )
    if inputs.ndim == 2:
        return array_inputs.as_table(inputs), ""
    inputs, note = (inputs[:, None], "") if inputs.ndim == 3 else array_inputs.channels_first(inputs)
    return array_inputs.as_pictures(inputs), note


def _names(given: Any, splits: dict[str, Rows], least: int) -> list[str]:
    """Return the names of the classes, or the numbers of ``least`` or more where there are no names."""
    if given is None:
        highest = max((int(rows.targets.max()) for rows in splits.values() if len(rows)), default=1)
        if highest >= _MOST_CLASSES:
            raise UserError(
                "data.targets",
                f"class id {highest}",
                (f"below {_MOST_CLASSES:,}; number the classes: np.unique(targets, return_inverse=True)[1]"),
            )
        return [str(number) for number in range(max(highest + 1, least))]
    if isinstance(given, str):
        raise UserError("data.class_names", f"{given!r}", "a list of names, in the order of the ids")
    names = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError("data.class_names", f"{twice!r} stands there twice", "a different name for each class")
    return names


def _check_ids(splits: dict[str, Rows], class_names: Sequence[str]) -> None:
    """Refuse class ids that have no name, or leave one of the classes without a training row.

    Raises:
        UserError: naming the ids found, and what to type.
    """
    ids = splits[""].targets.unique().tolist()
    if not ids or ids[0] < 0:
        return
    if ids[-1] >= len(class_names):
        raise UserError(
            "data.targets",
            f"a row has class id {ids[-1]}",
            f"0..{len(class_names) - 1}, which data.class_names names; ids found: {_ranges(ids)}",
        )
    known = set(ids)
    missing = next((number for number in range(len(class_names)) if number not in known), None)
    if missing is None:
        return
    named = "" if class_names[missing] == str(missing) else f" ({class_names[missing]})"
    if len(ids) == 1:
        advice = "at least two different ids"
    elif len(ids) > 20:
        advice = "ids from 0 on without gaps: np.unique(targets, return_inverse=True)[1]"
    else:
        advice = f"ids from 0 on without gaps, or data.classes=[{','.join(map(str, ids))}], which renumbers them"
    raise UserError("data.targets", f"no training row has class id {missing}{named}; ids found: {_ranges(ids)}", advice)


def _ranges(ids: Sequence[int]) -> str:
    """Format ascending ids, runs of three or more as ``first..last``.

    >>> _ranges([1, 2, 4, 5, 6])
    '1, 2, 4..6'
    """
    parts: list[list[int]] = []
    for number in ids:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    shown = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in parts]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")
