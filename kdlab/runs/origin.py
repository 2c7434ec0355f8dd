"""Run folders that files of weights belong to. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdlab.errors import UserError
from kdlab.runs.folder import read_model
from kdlab.system.files import Unreadable, expanded, read_json

DESCRIPTION = "model.json"
"""File that says how to rebuild a run's network, beside its weights."""

CHECKPOINTS = "checkpoints"
"""Folder inside of a run that holds weights of the same network."""


def run_of(path: str | Path) -> Path | None:
    """Return the folder of a run, of one of its stages, or of a kept network, that ``path`` is or belongs to.

    Args:
        path: path of a file of weights in such a folder or in its ``checkpoints``, or of the folder itself.

    Returns:
        None where there is no ``model.json``, or it is another program's.

    Raises:
        UserError: if it is damaged.
    """
    path = expanded(path)
    places = [path] if path.is_dir() else [path.parent]
    if path.parent.name == CHECKPOINTS and not path.is_dir():
        places.append(path.parent.parent)
    for place in places:
        if (place / DESCRIPTION).is_file() and _is_ours(place):
            return place
    return None


def weights_path(path: str | Path, key: str) -> Path:
    """Return the file of weights that ``path`` names: itself, or that of the run whose folder it is.

    Raises:
        UserError: if the run has no weights yet, or its ``model.json`` is damaged.
    """
    place = expanded(path)
    if not place.is_dir() or run_of(place) is None:
        return place
    name = Path(str(read_model(place)["weights"])).name
    if not (place / name).is_file():
        raise UserError(key, f"{place} has no {name}", "the folder of a finished run")
    return place / name


def _is_ours(folder: Path) -> bool:
    """Return whether ``model.json`` describes a network of kdlab's; other programs have files of that name.

    Raises:
        UserError: if nobody can tell, since it is damaged.
    """
    path = folder / DESCRIPTION
    try:
        described = read_json(path)
    except (OSError, Unreadable) as error:
        raise UserError(
            path,
            f"damaged ({error}), so that nobody knows the classes of the weights beside it",
            "a whole run folder, or the weights in a folder of their own",
        ) from None
    if not isinstance(described, Mapping) or not {"network", "weights"} & described.keys():
        return False
    read_model(folder)
    return True
