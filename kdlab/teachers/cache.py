"""A teacher's logits, computed once and read from a memory-mapped array by (example, view).

The cache is exact where the teacher would see the same inputs again: without random transforms, or with a finite
number of seeded views. What it was made of stands in its manifest, and is held against what is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs
from kdlab.teachers.teacher import FrozenTeacher, Teacher

FLOAT32_UP_TO = 256 * 2**20
"""Bytes of float32 logits above which float16 is stored (relative error of the KD gradient at T=4: 5e-4)."""


@dataclass(frozen=True)
class Manifest:
    """What the rows of a cache are; two caches with equal manifests hold the same numbers."""

    teacher: str
    """Hash of the teacher's weights."""
    data: str
    """Fingerprint of the data, split included."""
    transform: str
    """How training rows are shown, as text: the random transform, its views and their seed."""
    classes: int
    rows: dict[str, tuple[int, int]]
    """split → (examples, views)"""
    dtype: str = "float32"

    @property
    def key(self) -> str:
        """A short name for the cache's folder."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:10]

    def plain(self) -> dict:
        """As it stands in ``manifest.json``."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def bytes(self) -> int:
        """Size of all arrays."""
        return sum(n * v for n, v in self.rows.values()) * self.classes * np.dtype(self.dtype).itemsize


def dtype_for(rows: dict[str, tuple[int, int]], classes: int) -> str:
    """float32 where that is small, else float16."""
    size = sum(n * v for n, v in rows.values()) * classes * 4
    return "float32" if size <= FLOAT32_UP_TO else "float16"


class HasPlain(Protocol):
    """A manifest of any kind."""

    def plain(self) -> dict:
        """As it stands in ``manifest.json``."""


def check_manifest(folder: Path, wanted: HasPlain, name: str = "manifest.json") -> None:
    """Hold the manifest in ``folder`` against ``wanted``.

    Args:
        folder: the cache's folder.
        wanted: what is asked for.
        name: of the file that says what the folder holds.

    Raises:
        UserError: if it is missing or damaged, or names the first entry that differs and both values.
    """
    try:
        found = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"teacher.cache: {folder} holds no readable {name} ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"teacher.cache: {folder} holds no readable {name} (a {type(found).__name__})")
    for entry, value in wanted.plain().items():
        if found.get(entry) != value:
            raise UserError(
                f"teacher.cache: {folder} does not fit: {entry} is {found.get(entry)!r} in the cache and {value!r} "
                "here; accepted: a cache of the same, or teacher.cache=auto"
            )


def write_cache(
    folder: Path,
    manifest: Manifest,
    teacher: FrozenTeacher,
    batches: Callable[[str, int], Iterable[Batch]],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill ``folder`` once; a second process waits, and finds it done.

    Args:
        folder: the cache's folder; written beside itself and renamed, so that it is whole or not there.
        manifest: what is stored.
        teacher: answers, on the device where it is.
        batches: (split, view) → batches of every example of the split in order, with keys.
        report: called with rows done and rows in all.

    Raises:
        UserError: if the disk has not enough room, or the teacher's logits are not finite.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "manifest.json").exists():
            return
        free = shutil.disk_usage(folder.parent).free
        if manifest.bytes * 1.05 > free:
            raise UserError(
                f"teacher.cache: needs {manifest.bytes / 2**20:.0f} MiB, and {folder.parent} has "
                f"{free / 2**20:.0f} MiB free; accepted: more room, fewer data.views, or teacher.cache=off"
            )
        # under the lock: what killed processes left, and a folder that never got its manifest
        for left in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        try:
            _fill(partial, manifest, teacher, batches, report)
            with open(partial / "manifest.json", "w") as file:
                json.dump(manifest.plain(), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _fill(
    folder: Path,
    manifest: Manifest,
    teacher: FrozenTeacher,
    batches: Callable[[str, int], Iterable[Batch]],
    report: Callable[[int, int], None],
) -> None:
    done, total = 0, sum(n * v for n, v in manifest.rows.values())
    for split, (examples, views) in manifest.rows.items():
        shape = (examples, views, manifest.classes)
        array = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", manifest.dtype, shape)
        for view in range(views):
            seen = np.zeros(examples, bool)
            for batch in batches(split, view):
                # checked as stored: float16 ends at 65504
                logits = teacher(batch).logits.to(getattr(torch, manifest.dtype))
                if not torch.isfinite(logits).all():
                    raise UserError(
                        f"teacher: its logits are not finite for a row of the {split} split; accepted: finite numbers"
                    )
                assert batch.key is not None
                example = batch.key[:, 0].cpu().numpy()
                array[example, view] = logits.cpu().numpy()
                seen[example] = True
                done += len(batch)
                report(done, total)
            if not seen.all():  # the others would teach a uniform distribution
                raise UserError(
                    f"teacher.cache: {seen.sum()} of {examples} examples of the {split} split were shown; accepted: all"
                )
        array.flush()


class CachedTeacher(Teacher):
    """Reads logits by the batch's keys instead of computing them.

    Args:
        folder: what :func:`write_cache` made.
        manifest: what is asked for; must equal the folder's.
        on_device: bytes up to which the arrays live on the compute device; larger ones stay memory-mapped.

    Raises:
        UserError: if the manifest differs, or an array is missing or of another shape.
    """

    def __init__(self, folder: Path, manifest: Manifest, on_device: int = 2**30) -> None:
        check_manifest(folder, manifest)
        self.folder, self.manifest = folder, manifest
        self.arrays: dict[str, Tensor] = {}
        self._mapped: dict[str, np.ndarray] = {}
        self._device = torch.device("cpu")
        for split, (examples, views) in manifest.rows.items():
            try:
                array = np.load(folder / f"{split}.npy", mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"teacher.cache: {folder / f'{split}.npy'} cannot be read ({error})") from None
            if array.shape != (examples, views, manifest.classes) or array.dtype != manifest.dtype:
                raise UserError(
                    f"teacher.cache: {folder / f'{split}.npy'} has shape {array.shape} of {array.dtype}; accepted: "
                    f"{(examples, views, manifest.classes)} of {manifest.dtype}"
                )
            if manifest.bytes <= on_device:
                self.arrays[split] = torch.from_numpy(np.array(array))
            else:
                self._mapped[split] = array

    def to(self, device: torch.device) -> CachedTeacher:
        self._device = torch.device(device)
        self.arrays = {split: array.to(device) for split, array in self.arrays.items()}
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs:
        assert batch.key is not None, "a cached teacher needs the batch's keys"
        views = self.manifest.rows[split][1]
        if split in self.arrays:
            array, (example, view) = self.arrays[split], batch.key.unbind(1)
            # a view that is not there is an error, and not the next example
            row = torch.where((view >= 0) & (view < views), example * views + view, -1) if views > 1 else example
            # index_select, since array[example, view] splits even this between threads, and waits for a busy core
            return Outputs(array.flatten(0, 1).index_select(0, row).float())
        example, view = batch.key.cpu().numpy().T
        logits = torch.from_numpy(self._mapped[split][example, view if views > 1 else 0])
        return Outputs(logits.float().to(self._device, non_blocking=True))

    def describe(self) -> str:
        views = self.manifest.rows["train"][1]
        shown = f", {views} views of each example" if views > 1 else ""
        size = self.manifest.bytes / 2**20
        return f"cached teacher: {size:.1f} MiB of {self.manifest.dtype} logits{shown} ({self.folder})"
