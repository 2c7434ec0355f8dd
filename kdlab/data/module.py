"""ImageData: the one interface of every data set of pictures or tables."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.data.augment import Augmentation
from kdlab.data.contract import DataModule, Modality
from kdlab.data.labels import select_label
from kdlab.data.loader import Loader, Split, StreamLoader, TensorLoader
from kdlab.data.order import Order, Pairing, Views
from kdlab.data.raw import Files, Labels, RawDataset, Rows, fingerprint, statistics
from kdlab.data.splits import check_classes, choose_classes, divide, keep_labels
from kdlab.errors import UserError, unknown
from kdlab.functional.types import NO_LABEL
from kdlab.ranges import whole_number

CLEAN = -1
"""View number of a training example that is shown without the augmentation that training gives it."""


class Common(TypedDict, total=False):
    """Arguments that every data set takes beside its own; :class:`ImageData` says what they mean."""

    batch_size: int
    eval_batch_size: int | None
    val: int | float | None
    labels: int | None
    fraction: float | None
    unlabelled_ratio: float | None
    pairing: Pairing | None
    augment: Any
    views: int | Literal["all"] | None
    classes: Sequence[int | str] | None
    seed: int | None
    split_seed: int


class ImageData(DataModule):
    """Training, validation and test rows of a classification data set, ready to be shown.

    A row of a split is an *example*, numbered from 0 in the order of the split. Which rows are in which split depends
    on the source and ``split_seed`` only, never on ``seed``. A *view* numbers the ways to show an example: see
    :mod:`kdlab.data.augment`. Batches carry (example, view) as ``key``.

    Args:
        source: content of the data set.
        batch_size: rows of ONE optimizer step, over all its micro-batches and processes.
        eval_batch_size: rows of a batch in evaluation; None is ``batch_size``, but at least 256.
        val: validation rows (a number, or a fraction), stratified from train; 0 for none. None takes the data set's
            own validation split, or a tenth of train where it has none.
        labels: keep so many training labels, stratified by ``split_seed``; the other rows stay, with target -100 and
            their label in ``Batch.hidden_targets``. 0 keeps none, None keeps all.
        fraction: train on this stratified share of the training rows only.
        unlabelled_ratio: unlabelled rows for each labelled row of a batch; 0 shows labelled rows only, None takes them
            as they come. An epoch has ceil(training rows / batch_size) steps all the same; the pools go round. Without
            effect unless there are labelled rows and unlabelled ones.
        pairing: arrangement of rows in training, other than as they come: ``same_class`` in pairs of one class,
            ``repeat_half`` with half of each step from the one before; see :class:`~kdlab.data.order.Order`.
        augment: random transforms of training rows, by name: ``[crop, flip]``, ``[{crop: {padding: 4}}, flip]``.
        views: number of views of an example: None for a new one each time, a number K, or ``all`` outcomes of
            transforms that can be counted.
        classes: keep these classes only (ids or names), renumbered in this order.
        seed: seed of the order of examples and of augmentation.
        split_seed: seed of the splits, and of the choice of labels.

    Attributes:
        tasks (name → its labels, where there are several; class_names are then the first's),
        columns (of a table read from a file, how its cells become inputs; else None),
        label (which of several labels the classes are, else None), chosen (whether ``classes`` named some),
        name, class_names, num_classes, input_shape ((C, H, W), or (F,) for a table),
        counts ({train, labelled, val, test}),
        views (number of views of an example, 1 if it is always shown the same way, None if there is no end to them),
        uncacheable_reason (why there is no end, else None), transform (how training rows are shown, as a stable text),
        notes (lines that the log should have on how the data were read).

    Raises:
        UserError: for any argument that does not fit the data.
    """

    def __init__(
        self,
        source: RawDataset,
        *,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val: int | float | None = None,
        labels: int | None = None,
        fraction: float | None = None,
        unlabelled_ratio: float | None = None,
        pairing: Pairing | None = None,
        augment: Any = None,
        views: int | Literal["all"] | None = None,
        classes: Sequence[int | str] | None = None,
        seed: int | None = None,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.name = source.name
        self.notes = tuple(source.notes)
        self.seed, self.split_seed = seed or 0, split_seed
        self.batch_size = whole_number("data.batch_size", batch_size, 2)
        self.eval_batch_size = whole_number(
            "data.eval_batch_size", max(batch_size, 256) if eval_batch_size is None else eval_batch_size, 1
        )
        if unlabelled_ratio is not None and not (
            isinstance(unlabelled_ratio, (int, float)) and 0 <= unlabelled_ratio < float("inf")
        ):
            raise UserError(
                "data.unlabelled_ratio", f"{unlabelled_ratio!r}", "0 or more unlabelled rows per labelled one, or null"
            )
        self.unlabelled_ratio, self.pairing = unlabelled_ratio, pairing
        self._white = source.white
        self.columns = source.columns

        source = source.check()
        names = list(source.asked)
        self.label = names[0] if len(names) == 1 else None
        self.tasks = dict(source.asked) if len(names) > 1 else {}
        self.chosen = classes is not None
        if classes is not None:
            source = choose_classes(select_label(source), classes)
        rows = divide(source, val, fraction, split_seed)
        train = rows["train"]
        assert train is not None
        self.input_shape = tuple(train.inputs.shape[1:])
        whole_classes = Labels(source.class_names, torch.arange(len(source.class_names)))
        labels_of = list(source.asked.values()) or [whole_classes]
        self.class_names = list(labels_of[0].class_names)
        self.num_classes = len(self.class_names)
        check_classes(train.targets, labels_of, self.name)
        kept = keep_labels(train.targets, labels, labels_of, split_seed)
        # of one label nobody needs to know any more what kind of row it was
        self._rows: dict[str, Rows | None] = rows if self.tasks else {k: labels_of[0].rows(v) for k, v in rows.items()}
        self._targets = kept if self.tasks else labels_of[0](kept)
        self.counts = {
            "train": len(train),
            "labelled": int((self._targets != NO_LABEL).sum()),
            "val": len(rows["val"] or ()),
            "test": len(rows["test"] or ()),
        }
        self._augment(augment, views)
        self.to("cpu")

    # ---- what it says of itself

    target = "class"
    class_names: list[str]
    input_shape: tuple[int, ...]

    @property
    @override
    def modality(self) -> Modality:  # type: ignore[override]
        return "image" if len(self.input_shape) == 3 else "table"

    @property
    def kind(self) -> str:
        """Description of an example for messages."""
        return "a set of pictures" if len(self.input_shape) == 3 else "a table"

    @property
    def network_kwargs(self) -> dict[str, Any]:
        """Arguments that a network's constructor may take from the data."""
        known: dict[str, Any] = {"num_classes": self.num_classes, "mean": self.mean, "std": self.std}
        if self.tasks:
            known["tasks"] = {name: len(one.class_names) for name, one in self.tasks.items()}
        if len(self.input_shape) == 3:
            return {**known, "in_channels": self.input_shape[0], "image_size": list(self.input_shape[1:])}
        return {**known, "in_features": self.input_shape[0]}

    def check_same_classes(self, other: DataModule) -> None:
        """Refuse a teacher's data of other classes than these, or of the same in another order.

        One teacher of several may know one of several tasks.

        Raises:
            UserError: naming both.
        """
        if not isinstance(other, ImageData):
            raise UserError("teacher.data", f"{other.name} is {other.kind}", f"{self.kind}, as data ({self.name}) is")
        if list(other.tasks) and list(other.tasks) != list(self.tasks):
            raise UserError(
                "teacher.data.label",
                f"{', '.join(other.tasks)}, and data.label is {', '.join(self.tasks) or 'one'}",
                "the same",
            )
        own = self.tasks[str(other.label)].class_names if other.label in self.tasks else self.class_names
        if own != other.class_names:
            raise UserError(
                "teacher.data",
                f"{other.num_classes} classes {_few(other.class_names)}, and data has {len(own)}: {_few(own)}",
                "the same classes in the same order",
            )
        if self.columns is not None and other.columns is not None:
            self.columns.check_same(other.columns, "teacher.data")

    def inference_metadata(self, folder: Path) -> dict[str, Any]:
        """Return the metadata that a run folder needs to read inputs and outputs again."""
        known: dict[str, Any] = {"classes": list(self.class_names), "input_shape": list(self.input_shape)}
        if self.tasks:
            known["tasks"] = {name: list(one.class_names) for name, one in self.tasks.items()}
        if self.columns is not None:
            known["table"] = asdict(self.columns)
        return known

    # ---- what is in the splits

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        train = self._rows["train"]
        assert train is not None
        return statistics(train.inputs, self._white)

    @property
    def mean(self) -> list[float]:
        """Mean of each channel (or feature) of the training rows, in [0, 1] units."""
        return self._statistics[0]

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel (or feature) of the training rows, in [0, 1] units."""
        return self._statistics[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content of all splits and of the classes; the same in every process."""
        digest = fingerprint(self._rows, self.class_names, self._white)
        if self.tasks:  # rows alike may be of other classes in another task
            task_classes = [(name, one.class_names, one.of.tolist()) for name, one in self.tasks.items()]
            digest = hashlib.sha256(f"{digest} {task_classes}".encode()).hexdigest()
        return digest

    def describe(self) -> str:
        """Return one line on the number and kind of rows that training sees.

        >>> digits(labels=100).describe()  # doctest: +SKIP
        '100 labelled and 1100 unlabelled rows of digits'
        """
        labelled, rest = self.counts["labelled"], self.counts["train"] - self.counts["labelled"]
        kinds = [f"{n} {kind}" for n, kind in ((labelled, "labelled"), (rest, "unlabelled")) if n]
        chosen = f" (classes {', '.join(self.class_names)})" if self.chosen else ""
        chosen = f" ({' and '.join(self.tasks)})" if self.tasks else chosen
        return f"{' and '.join(kinds)} rows of {self.name}{chosen}"

    # ---- how they are shown

    def _augment(self, augment: Any, views: Any) -> None:
        if (
            views is not None
            and views != "all"
            and (isinstance(views, bool) or not isinstance(views, int) or views < 1)
        ):
            raise UserError("data.views", f"{views!r}", "null (no end of them), a number from 1 on, or all")
        shown = Augmentation(augment, self.input_shape, self.seed, views == "all", self._white)
        if views is not None and shown.mixings:
            raise UserError(
                "data.views",
                (
                    f"{views}; {shown.mixings[0].name} in data.augment mixes each example with ever "
                    "other ones, which no number of views covers; accepted with it: null"
                ),
            )
        if self.tasks and shown.mixings:
            raise UserError(
                "data.label",
                (
                    f"{', '.join(self.tasks)}; {shown.mixings[0].name} in data.augment mixes the labels of "
                    "one task; accepted with it: one label"
                ),
            )
        if self.pairing is not None and shown.mixings:
            raise UserError(
                "data.pairing",
                (f"{self.pairing}; {shown.mixings[0].name} in data.augment mixes rows; accepted with it: null"),
            )
        self._augmentation = shown
        count = 1 if not shown.transforms else shown.finite if views == "all" else views
        self._views = Views(count, hashed=views == "all", seed=self.seed)
        self.views: int | None = None if shown.mixings else count
        self.uncacheable_reason: str | None = None
        if self.views is None:
            self.uncacheable_reason = (
                f"data.augment ({shown.text}) mixes rows"
                if shown.mixings
                else f"data.augment ({shown.text}) shows a new view of every example each time; set data.views"
            )
        self.transform = shown.text
        if shown.transforms or shown.mixings:
            number = "unlimited" if self.views is None else f"all {count}" if views == "all" else str(count)
            # enumerated views look the same under every seed; which of them is shown is no matter of the transform
            self.transform += f"; views={number}" + ("" if views == "all" else f"; seed={self.seed}")

    def augmented(self, images: Tensor, example: Tensor, view: Tensor | int, augment: Any = None) -> Tensor:
        """Show given pictures under a view, by the training transforms or by others (say, a strong view).

        Args:
            images: (B, C, H, W), uint8 levels of this data set or float in [0, 1].
            example: (B,) int64: which example each is.
            view: (B,) int64, or one number for all.
            augment: other transforms, as in the constructor; mixing is left out.

        Returns:
            (B, C, H, W) float in [0, 1].
        """
        shown = self._augmentation
        if augment is not None:
            shown = Augmentation(augment, self.input_shape, self.seed, white=self._white)
        return shown(images, example.to(images.device), view)

    # ---- loaders

    @override
    def _forget_device(self) -> None:
        self._splits_there: dict[str, Split] = {}

    @override
    def _training_loader(self, parts: int) -> Loader:
        order = Order(self._targets, self.batch_size, self.unlabelled_ratio, self.seed, parts, pairing=self.pairing)
        accumulate = self._place["accumulate"]
        return self._loader("train", self.batch_size, order=order, views=self._views, accumulate=accumulate)

    @override
    def _evaluation_loader(self, split: str) -> Loader:
        return self._loader(split, self.eval_batch_size, clean=True)

    def ordered_loader(self, split: str = "train", view: int | None = None, batch_size: int | None = None) -> Loader:
        """Return all examples of a split, in order, in this process, none left out: to fill a cache, or to predict.

        Args:
            split: ``train``, ``val`` or ``test``.
            view: show each under this view of training rows; validation and test rows have view 0 only, which is the
                row as it is. None shows any row as it is; its key then has view 0, or :data:`CLEAN` for training rows
                that training would augment.
            batch_size: rows of a batch; None is ``eval_batch_size``.

        Raises:
            UserError: if there is no such split, or no such view.
        """
        if split not in self._rows:
            raise unknown("split", split, self._rows, "split")
        if self._rows[split] is None:
            raise UserError("split", f"{split}; {self.name} has no {split} rows here")
        plain = split != "train" or not self._augmentation.transforms
        count = 1 if plain else self._views.count
        if view is not None and (view < 0 or (count is not None and view >= count)):
            raise UserError("view", view, f"0..{'' if count is None else count - 1} of the {split} split")
        number = (0 if plain else CLEAN) if view is None else view
        clean = plain or view is None
        return self._loader(split, batch_size or self.eval_batch_size, view=number, clean=clean, rank=0, world=1)

    def _loader(self, split: str, batch_size: int, **options: Any) -> Loader:
        options = self._where({"classes": self.num_classes, **options})
        there = self._there(split)
        if isinstance(there.inputs, Files):
            spare = min(8, max(1, (os.cpu_count() or 1) - 1))
            workers = spare if there.inputs.workers is None else there.inputs.workers
            return StreamLoader(there, self._augmentation, batch_size, workers=workers, **options)
        return TensorLoader(there, self._augmentation, batch_size, **options)

    def _there(self, split: str) -> Split:
        """Return the split with its tensor on the device; it is moved once."""
        if split not in self._splits_there:
            rows = self._rows[split]
            assert rows is not None
            inputs = rows.inputs if isinstance(rows.inputs, Files) else rows.inputs.to(self._place["device"])
            withheld = split == "train" and self.counts["labelled"] < self.counts["train"]
            shown, truth = self._targets if split == "train" else rows.targets, rows.targets if withheld else None
            tasks = {name: one(shown) for name, one in self.tasks.items()}
            first = next(iter(self.tasks.values()), lambda kinds: kinds)
            self._splits_there[split] = Split(inputs, first(shown), None if truth is None else first(truth), tasks)
        return self._splits_there[split]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def published(*, source: RawDataset, **common: Unpack[Common]) -> ImageData:
    """Build data shown by the protocol of published results: steps of 128 rows, 5,000 rows held out to validate."""
    common.setdefault("batch_size", 128)
    common.setdefault("val", 5000)
    return ImageData(source, **common)
