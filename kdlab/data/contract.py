"""What the rest of kdlab may ask of any data module, and the loaders that all have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from kdlab.data.loader import EpochLoader
from kdlab.errors import UserError
from kdlab.functional.types import Target

if TYPE_CHECKING:
    from kdlab.data.text.tokenizer import Tokenizer

Modality = Literal["image", "table", "text", "audio"]
"""Kind of an example."""


class TrainingData(Protocol):
    """Data that a fit needs: a :class:`DataModule`, or any two loaders."""

    counts: dict[str, int]
    """Examples, or batches, of the splits."""
    batch_size: int
    """Examples of one optimizer step."""
    has_questions: bool
    """Whether examples may be questions that are answered by generated text."""

    def to(self, device: Any, *, accumulate: int = 1) -> Any:
        """Say where batches are wanted, and into how many parts a step is split."""

    def train_dataloader(self) -> Any:
        """Return the training loader."""

    def val_dataloader(self) -> Any:
        """Return the validation loader."""


class DataModule(LightningDataModule):
    """Training, validation and test examples of one modality, with one thing to predict.

    What an example is (``modality``) and what is predicted of it (``target``) are two things: a text can be classified,
    continued, or answered by another text. Members that only some data have are empty in the others.
    """

    name: str
    """Name of the data set."""
    modality: Modality
    """Kind of an example."""
    target: Target
    """Target that is predicted for an example."""
    counts: dict[str, int]
    """Examples of each split (``train``, ``val``, ``test``, of text ``ood``), and of ``train`` those ``labelled``."""
    num_classes: int = 0
    """Classes of the (first) task; 0 where none are predicted."""
    notes: Sequence[str] = ()
    """Lines that the log should have on how the data were read."""
    batch_size: int
    """Examples of one optimizer step."""
    views: int | None = 1
    """Ways in which a training example is shown; None where there is no end of them."""
    uncacheable_reason: str | None = None
    """Reason why a teacher's answers about training rows cannot be cached; None where they can."""
    transform: str = "none"
    """Description of how training rows are shown, as a stable text."""

    class_names: Sequence[str] = ()
    """Names of the classes, in the order of their ids."""
    tasks: Mapping[str, Any] = {}
    """Name of each of several tasks → its classes; none where there is one."""
    input_shape: Sequence[int] = ()
    """Shape of an example's tensor; empty for text."""
    chosen: bool = False
    """Whether only some classes of the data set are in it."""
    columns: Any = None
    """Columns of a table; None elsewhere."""

    label: str | None = None
    """Label that is the class, where a data set has several; None for its only one."""
    tokenizer: Tokenizer
    """Tokenizer of text; other data have none."""
    context: int = 0
    """Positions that a network reads at once; 0 where there are no sequences."""
    vocab_size: int = 0
    """Tokens of the tokenizer; 0 where there is none."""
    has_questions: bool = False
    """Whether examples may be questions that are answered by generated text."""
    pack: bool = False
    """Whether a row of training holds several sequences."""

    DEFAULT_TASK: ClassVar[Mapping[Target, str]] = {
        "class": "classification",
        "next_token": "language_modeling",
        "text": "text_to_text",
    }
    """Target that is predicted → the option of ``task`` for it."""

    def __init__(self) -> None:
        super().__init__()
        self._place: dict[str, Any] = {}
        self._loaders: dict[str, EpochLoader] = {}

    # ---- what it says of itself

    @property
    def classified(self) -> bool:
        """Whether a class is predicted of each example."""
        return self.target == "class"

    @property
    def default_task(self) -> str:
        """Option of ``task`` that reads these data."""
        return self.DEFAULT_TASK[self.target]

    @property
    @abstractmethod
    def kind(self) -> str:
        """Description of the data for messages, such as ``a table``."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the content of all splits; the same in every process."""

    @property
    @abstractmethod
    def network_kwargs(self) -> dict[str, Any]:
        """Arguments that a network's constructor may take from the data."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line: how much of what training sees."""

    @abstractmethod
    def inference_metadata(self, folder: Path) -> dict[str, Any]:
        """Return what a run folder must know to read inputs and outputs again, written into ``model.json``."""

    @abstractmethod
    def check_same_classes(self, other: DataModule) -> None:
        """Refuse the data of a teacher whose logits mean other classes or tokens.

        Raises:
            UserError: naming both.
        """

    def check_reads(self, net: nn.Module, key: str) -> None:
        """Refuse a network that cannot read such examples.

        Args:
            net: the network.
            key: its config key, for messages.

        Raises:
            UserError: naming ``key``.
        """

    def same_tokens(self, other: Tokenizer, key: str) -> None:
        """Refuse the tokenizer of another network: logits of the same column would mean different tokens.

        Raises:
            UserError: naming ``key``; data without a tokenizer refuse any.
        """
        raise UserError(key, f"reads text, and data ({self.name}) is {self.kind}", "a network for such data")

    def rows(self, split: str) -> int:
        """Return how many predictions of a split count: one an example, or one a token."""
        return self.counts[split]

    def words(self, split: str) -> int | None:
        """Return how many words a split's text has; None for what is no text."""
        return None

    # ---- loaders

    def to(self, device: Any, accumulate: int = 1, rank: int = 0, world: int = 1) -> Self:
        """Say where batches are wanted and how a step is split; before fitting, and before any loader is asked for.

        Args:
            device: device of the tensors and batches.
            accumulate: micro-batches of one optimizer step.
            rank: index of this process.
            world: number of processes.
        """
        device = torch.device(device)
        if device != self._place.get("device"):
            self._forget_device()
        self._place = {"device": device, "accumulate": accumulate, "rank": rank, "world": world}
        self._loaders = {}
        return self

    def train_dataloader(self) -> EpochLoader:
        """Return the training loader: the same object every time until :meth:`to` is called."""
        if "train" not in self._loaders:
            self._loaders["train"] = self._training_loader(self._place["accumulate"] * self._place["world"])
        return self._loaders["train"]

    def val_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Return validation examples in order; an empty list, which Lightning takes for none, without any."""
        return self._evaluation("val")

    def test_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Return test examples in order; an empty list without any."""
        return self._evaluation("test")

    def ood_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Return test examples of another domain, in order; an empty list without any."""
        return self._evaluation("ood")

    @abstractmethod
    def ordered_loader(self, split: str = "train", view: int | None = None, batch_size: int | None = None) -> Any:
        """Return all examples of a split, in order and in this process: to fill a cache, or to predict.

        Args:
            split: name of the split.
            view: number of the view of training examples; None shows them as they are.
            batch_size: examples of a batch; None is that of evaluation.

        Raises:
            UserError: if there is no such split, or no such view.
        """

    def _evaluation(self, split: str) -> EpochLoader | list[EpochLoader]:
        if not self.counts.get(split):
            return []
        if split not in self._loaders:
            self._loaders[split] = self._evaluation_loader(split)
        return self._loaders[split]

    def _where(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a loader: those given, on top of its device, rank and number of processes."""
        return {**{key: self._place[key] for key in ("device", "rank", "world")}, **options}

    @abstractmethod
    def _forget_device(self) -> None:
        """Drop what lies on the device of before."""

    @abstractmethod
    def _training_loader(self, parts: int) -> EpochLoader:
        """Make the training loader, of steps that are split into so many parts."""

    @abstractmethod
    def _evaluation_loader(self, split: str) -> EpochLoader:
        """Make the loader of a split that is measured."""
