"""A teacher's logits and features, computed once and read from memory-mapped arrays by (example, view).

The cache is exact where the teacher would see the same inputs again: without random transforms, or with a finite
number of seeded views. What it was made of stands in its manifest, and is held against what is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs
from kdlab.system.arrays import read_array
from kdlab.system.files import Unreadable, lock_file, read_json, reserve
from kdlab.system.integrity import FILES, check_manifest_files, hashes
from kdlab.teachers.teacher import FrozenTeacher, Teacher

FLOAT32_UP_TO = 256 * 2**20
"""Size in bytes as float32 above which float16 is stored (relative error of the KD gradient at T=4: 5e-4)."""

TEACHER_DEFAULTS = "train"
"""Split that terms look at, and so the one whose features are kept."""


@dataclass(frozen=True)
class Manifest:
    """Description of the rows of a cache; two caches with equal manifests hold the same numbers."""

    teacher: str
    """Hash of the teacher's weights."""
    data: str
    """Fingerprint of the data, split included."""
    transform: str
    """Description of how training rows are shown: the random transform, its views and their seed."""
    classes: int
    """Number of classes of the logits; 0 for a cache of features alone."""
    rows: dict[str, tuple[int, int]]
    """Split → (examples, views)."""
    dtype: str = "float32"
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Module path → shape of a row's feature there, where a cache is of features."""

    @property
    def key(self) -> str:
        """A short name for the cache's folder."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:10]

    def plain(self) -> dict:
        """Return the entries as they stand in ``manifest.json``."""
        entries = json.loads(json.dumps(asdict(self)))
        if not self.layers:  # a cache of logits is what it was before there were others
            del entries["layers"]
        return entries

    @property
    def bytes(self) -> int:
        """Size of all arrays."""
        return sum(map(math.prod, self.arrays().values())) * np.dtype(self.dtype).itemsize

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Return the name of each array (``train``, ``train-layer3``) → its shape, (examples, views, ...)."""
        parts: dict[str, tuple[int, ...]] = {"": (self.classes,)} if self.classes else {}
        parts |= {f"-{name}": shape for name, shape in self.layers.items()}
        return {f"{split}{part}": (*many, *shape) for split, many in self.rows.items() for part, shape in parts.items()}


def dtype_for(rows: dict[str, tuple[int, int]], numbers: int) -> str:
    """Choose float32 where rows of so many numbers are small altogether, else float16."""
    return "float32" if sum(n * v for n, v in rows.values()) * numbers * 4 <= FLOAT32_UP_TO else "float16"


class HasPlain(Protocol):
    """Manifest of any kind."""

    def plain(self) -> dict:
        """Return the entries as they stand in ``manifest.json``."""


def check_manifest(folder: Path, wanted: HasPlain, name: str = "manifest.json") -> dict:
    """Hold the manifest in ``folder`` against ``wanted``.

    Args:
        folder: the cache's folder.
        wanted: manifest that is asked for.
        name: name of the manifest's file.

    Returns:
        All entries of the manifest: those that are wanted, and the hashes of the cache's files.

    Raises:
        UserError: if it is missing or damaged, or names the first entry that differs and both values.
    """
    try:
        stored = read_json(folder / name)
    except (OSError, Unreadable) as error:
        raise UserError("teacher.cache", f"{folder} holds no readable {name} ({error})") from None
    if not isinstance(stored, dict):
        raise UserError("teacher.cache", f"{folder} holds no readable {name} (a {type(stored).__name__})")
    for entry, value in wanted.plain().items():
        if stored.get(entry) != value:
            raise UserError(
                "teacher.cache",
                (f"{folder} does not fit: {entry} is {stored.get(entry)!r} in the cache and {value!r} here"),
                "a cache of the same, or teacher.cache=auto",
            )
    return stored


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
        manifest: description of what is stored.
        teacher: teacher that answers, on its device.
        batches: (split, view) → batches of every example of the split in order, with keys.
        report: function that is called with rows done and rows in all.

    Raises:
        UserError: if the disk has not enough room, or what the teacher says is not finite.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(f"{folder}.lock"):
        if (folder / "manifest.json").exists():
            return
        free = shutil.disk_usage(folder.parent).free
        if manifest.bytes * 1.05 > free:
            raise UserError(
                "teacher.cache",
                (f"needs {manifest.bytes / 2**20:.0f} MiB, and {folder.parent} has {free / 2**20:.0f} MiB free"),
                f"more room, fewer data.views, or teacher.{'feature_mib=0' if manifest.layers else 'cache=off'}",
            )
        # under the lock: what killed processes left, and a folder that never got its manifest
        for left in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        try:
            _fill(partial, manifest, teacher, batches, report)
            with open(partial / "manifest.json", "w") as file:
                files = hashes(partial, [f"{name}.npy" for name in manifest.arrays()])
                json.dump({**manifest.plain(), FILES: files}, file, indent=1)
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
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", manifest.dtype, shape)
        for name, shape in manifest.arrays().items()
    }
    for name, array in arrays.items():
        reserve(folder / f"{name}.npy", array.offset + array.nbytes)
    for split, (examples, views) in manifest.rows.items():
        for view in range(views):
            seen = np.zeros(examples, bool)
            for batch in batches(split, view):
                outputs = teacher(batch)
                parts = {split: outputs.logits} if manifest.classes else {}
                parts |= {f"{split}-{name}": outputs.features[name] for name in manifest.layers}
                assert batch.example_id is not None
                example = batch.example_id[:, 0].cpu().numpy()
                for name, part in parts.items():
                    stored = part.to(getattr(torch, manifest.dtype))  # checked as stored: float16 ends at 65504
                    if not torch.isfinite(stored).all():
                        raise _not_finite(name, split, manifest.dtype)
                    arrays[name][example, view] = stored.cpu().numpy()
                seen[example] = True
                done += len(batch)
                report(done, total)
            if not seen.all():  # the others would teach a uniform distribution
                raise UserError(
                    "teacher.cache", f"{seen.sum()} of {examples} examples of the {split} split were shown", "all"
                )
    for array in arrays.values():
        array.flush()


def _not_finite(name: str, split: str, dtype: str) -> UserError:
    what = "logits" if name == split else f"features ({name.removeprefix(f'{split}-')})"
    live = ", or teacher.cache=off, since those of a cache this large end at 65504" if dtype == "float16" else ""
    return UserError("teacher", f"its {what} are not finite for a row of the {split} split", f"finite numbers{live}")


class Arrays:
    """Arrays of a cache, read by (example, view).

    Args:
        folder: folder that :func:`write_cache` made.
        manifest: manifest that is asked for; must equal the folder's.
        on_device: bytes up to which they live on the compute device; larger ones stay memory-mapped.

    Raises:
        UserError: if the manifest differs, or an array is missing, damaged or of another shape.
    """

    def __init__(self, folder: Path, manifest: Manifest, on_device: int = 2**30) -> None:
        stored = check_manifest(folder, manifest)
        check_manifest_files(folder, stored, [f"{name}.npy" for name in manifest.arrays()], "teacher.cache")
        self.folder, self.manifest = folder, manifest
        self.held: dict[str, Tensor] = {}
        self._mapped: dict[str, np.ndarray] = {}
        self._device = torch.device("cpu")
        for name, shape in manifest.arrays().items():
            file = folder / f"{name}.npy"
            try:
                array = read_array(file, mapped=True)
            except (OSError, ValueError) as error:
                raise UserError(
                    "teacher.cache",
                    f"{file} cannot be read ({error})",
                    f"a whole cache; remove the folder {folder}: it is made again",
                ) from None
            if array.shape != shape or array.dtype != manifest.dtype:
                raise UserError(
                    "teacher.cache", f"{file} has shape {array.shape} of {array.dtype}", f"{shape} of {manifest.dtype}"
                )
            if manifest.bytes <= on_device:
                self.held[name] = torch.from_numpy(np.array(array))
            else:
                self._mapped[name] = array

    def to(self, device: torch.device) -> None:
        """Move what is held to ``device``, where all that is read goes."""
        self._device = torch.device(device)
        self.held = {name: array.to(device) for name, array in self.held.items()}

    def read(self, names: Iterable[str], key: Tensor, split: str) -> dict[str, Tensor]:
        """Read the entries (rows, ...) of each array as float32, for a batch's ``key`` (rows, 2)."""
        views = self.manifest.rows[split][1]
        if not self._mapped:
            example, view = key.unbind(1)
            # a view that is not there is an error, and not the next example
            row = torch.where((view >= 0) & (view < views), example * views + view, -1) if views > 1 else example
            # index_select, since array[example, view] splits even this between threads, and waits for a busy core
            return {name: self.held[name].flatten(0, 1).index_select(0, row).float() for name in names}
        example, view = key.cpu().numpy().T
        if views > 1 and (view < 0).any():  # numpy would count from the end
            raise IndexError(f"view {view.min()} of {views}")
        at = example, view if views > 1 else 0
        parts = {name: torch.from_numpy(self._mapped[name][at]) for name in names}
        return {name: part.float().to(self._device, non_blocking=True) for name, part in parts.items()}

    def describe(self) -> str:
        """Return size and place in words."""
        shown = f", {views} views of each example" if (views := self.manifest.rows[TEACHER_DEFAULTS][1]) > 1 else ""
        what = f"features of {', '.join(self.manifest.layers)}" if self.manifest.layers else "logits"
        return f"{self.manifest.bytes / 2**20:.1f} MiB of {self.manifest.dtype} {what}{shown} ({self.folder})"


class CachedTeacher(Teacher):
    """Teacher that reads logits, and features of training rows, by the batch's keys instead of computing them.

    Args:
        logits: logits of all splits.
        inside: features of training rows; None where no term looks at any.
        net: network whose outputs are cached, for terms that use a part of it; None where it is not there.
    """

    def __init__(self, logits: Arrays, inside: Arrays | None = None, net: nn.Module | None = None) -> None:
        self.logits, self.inside, self.net = logits, inside, net
        self.layers = tuple(inside.manifest.layers) if inside is not None else ()

    @override
    def to(self, device: torch.device) -> CachedTeacher:
        for arrays in filter(None, (self.logits, self.inside)):
            arrays.to(device)
        if self.inside is not None and self.net is not None:  # terms that look inside use parts of it
            self.net.to(device)
        return self

    @override
    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = TEACHER_DEFAULTS) -> Outputs:
        assert batch.example_id is not None, "a cached teacher needs the batch's keys"
        logits = self.logits.read([split], batch.example_id, split)[split]
        if self.inside is None or split != TEACHER_DEFAULTS:
            return Outputs(logits)
        features = self.inside.read(self.inside.manifest.arrays(), batch.example_id, split)
        return Outputs(logits, {name.removeprefix(f"{split}-"): feature for name, feature in features.items()})

    @override
    def describe(self) -> str:
        return "cached teacher: " + "; ".join(one.describe() for one in (self.logits, self.inside) if one is not None)
