"""Pictures in folders, one folder a class."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch

from kdlab.data.module import Common, ImageData, whole
from kdlab.data.source import Files, Rows, Source
from kdlab.errors import UserError, unknown

_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def image_folder(
    root: str = "data/images",
    size: int = 32,
    channels: int = 3,
    test: int | float | None = None,
    memory: float = 2e9,
    workers: int | None = None,
    **common: Unpack[Common],
) -> ImageData:
    """Pictures in class folders: ``root/train/<class>/*``, with ``val`` and ``test`` beside ``train`` or not; or all in
    ``root/<class>/*``, divided here.

    Args:
        root: the folder.
        size: every picture's shorter side is brought to so many pixels, and the middle square cut out.
        channels: 3, or 1 for grey.
        test: rows (a number, or a fraction) taken from train where there is no test folder; None is a tenth.
        memory: up to so many bytes of pictures are decoded once and kept as a tensor on the compute device; larger
            sets stream from disk.
        workers: processes that decode a streamed set; None is one less than there are CPU cores, up to 8.
        val: None is the val folder, or a tenth of train where there is none.

    The other arguments are :class:`ImageData`'s. Classes are numbered in the order of their folders' names.

    Raises:
        UserError: for a missing or empty folder, a class that only val or test has, a picture that cannot be decoded.
    """
    for name, value, accepted in (("size", size, range(1, 4097)), ("channels", channels, (1, 3))):
        if value not in accepted:
            bounds = "1 or 3" if name == "channels" else "1..4096"
            raise UserError(f"data.{name}: {value!r}; accepted: {bounds}")
    if workers is not None:
        whole("data.workers", workers, 0)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.root: there is no folder {folder}; accepted: a folder with a sub-folder for each class")
    places = {
        split: next((folder / name for name in names if (folder / name).is_dir()), None)
        for split, names in _SPLITS.items()
    }
    train = places["train"]
    if train is None:
        train, places = folder, {"train": folder, "val": None, "test": None}
    elif places["test"] is not None and test not in (None, 0):
        raise UserError(f"data.test: {test}; {places['test']} is there; accepted: null (use it) or 0 (none)")
    class_names = sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not class_names:
        raise UserError(f"data.root: {train} has no sub-folders; accepted: one for each class")
    wanted = {split: place for split, place in places.items() if place and not (split == "test" and test == 0)}
    none = Files(folder, [], size, channels, workers)
    rows = {split: _files(none, place, class_names) for split, place in wanted.items()}
    if sum(math.prod(r.inputs.shape) for r in rows.values()) <= memory:
        rows = {split: _decode(r) for split, r in rows.items()}
    source = Source(
        folder.name,
        rows["train"],
        class_names,
        val=rows.get("val"),
        test=rows.get("test", 0.1 if test is None else test),
    )
    return ImageData(source, **common)


def _files(none: Files, place: Path, class_names: list[str]) -> Rows:
    """The pictures of one split, in the order of their names; ``none`` says how they are read."""
    names, targets = [], []
    for folder in sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in class_names:
            raise unknown(f"data.root: {place}", folder.name, class_names, "class folder")
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _ENDINGS and p.is_file())
        if not found:
            endings = ", ".join(sorted(_ENDINGS))
            raise UserError(f"data.root: {folder} has no pictures; accepted: files that end in {endings}")
        names += [str(p.relative_to(none.root)) for p in found]
        targets += [class_names.index(folder.name)] * len(found)
    return Rows(replace(none, names=names), torch.tensor(targets, dtype=torch.long))


def _decode(rows: Rows) -> Rows:
    """The same rows with their pictures in memory."""
    files = rows.inputs
    assert isinstance(files, Files)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        pictures = list(pool.map(lambda row: files.read([row])[0], range(len(files))))
    return Rows(torch.stack(pictures), rows.targets)
