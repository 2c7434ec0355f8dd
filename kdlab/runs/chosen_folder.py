"""Run and sweep folders that the user named by ``hydra.run.dir`` or ``hydra.sweep.dir``: free, or already their own.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdlab.errors import UserError
from kdlab.runs import folder as folders

KEY = "hydra.run.dir"

BEGUN = (".lock", "run.log")
"""Files that a run has in its folder before anything that says which run it is."""


def refuse_others(key: str, folder: Path, ignored: Collection[str] = ()) -> None:
    """Refuse a folder that holds anything, and a path that is no folder.

    Args:
        key: name of the setting that names the folder.
        folder: folder to check; it may be missing.
        ignored: names of files that may be in it.

    Raises:
        UserError: names what is there.
    """
    accepted = "a new folder, or an empty one"
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(key, f"{folder} is a file", accepted)
        others = sorted({path.name for path in folder.iterdir()} - set(ignored))
    except OSError as error:
        raise UserError(key, f"{folder}: {error.strerror}", accepted) from None
    if others:
        shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        raise UserError(key, f"{folder} holds other files ({shown})", accepted)


def check(folder: Path, config: Mapping[str, Any]) -> str:
    """Check that a run may have the folder that the user named.

    Args:
        folder: folder to check; it may be missing.
        config: configuration of the run.

    Returns:
        What the log should say about it; nothing where it is new, or holds the finished run.

    Raises:
        UserError: if it holds other files, another run, or an unfinished one and ``resume`` is not given.
    """
    resume, output = config.get("resume"), Path(str(config.get("output")))
    named = resume not in (None, "auto")
    longer = config.get("continued_from")  # a new run, which starts from the last state of the one that resume names
    if named and not longer and Path(str(resume)).resolve() != folder.resolve():
        raise UserError(KEY, f"{folder}, and resume goes on in {resume}", "one of them")
    if folder.resolve() == output.resolve():
        raise UserError(KEY, f"{folder} is output, where teachers and caches lie", "a folder of its own")
    if not (folder / "config.yaml").is_file():
        if named and not longer:
            folders.to_resume(str(resume), output, str(config.get("name")), config)
        refuse_others(KEY, folder, BEGUN)
        return "resume=auto: no run in it yet; a new one" if resume == "auto" else ""
    try:
        folders.to_resume(str(folder), output, str(config.get("name")), config)
    except UserError as error:
        raise UserError(KEY, error.found if error.key == "resume" else str(error), "another folder") from None
    if folders.read_result(folder) is not None:
        return ""
    if resume is None:
        raise UserError(
            KEY,
            f"{folder} holds an unfinished run of this configuration",
            "resume=auto, which goes on in it, or another folder",
        )
    return f"going on in {folder}"


@contextmanager
def still_free(folder: Path | None, config: Mapping[str, Any]) -> Iterator[None]:
    """Check once more, with the folder locked: another process may have run in it since."""
    if folder is not None:
        check(folder, config)
    yield


def make(folder: Path) -> Path:
    """Make the folder, and return it.

    Raises:
        UserError: if that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(KEY, f"{folder}: {error.strerror}", "a folder that can be written to") from None
    return folder
