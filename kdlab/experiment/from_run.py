"""Weights from a run folder, with what belongs to them: network, classes and their order, normalisation, tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from kdlab.config import builder
from kdlab.config.override_text import argument
from kdlab.data import DataModule
from kdlab.data.raw import Columns
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError
from kdlab.experiment.class_order import listed, numbered, permutation, reordered, same_classes
from kdlab.experiment.schema import Experiment, PretrainedSpec
from kdlab.models import load_weights
from kdlab.models.vision.normalize import KNOWN
from kdlab.runs.folder import read_model
from kdlab.runs.origin import run_of, weights_path
from kdlab.system import integrity

log = logging.getLogger("kdlab")

STATISTICS = ("mean", "std")
"""Arguments of a network that determine how it normalises its inputs."""

OF_TEXT = ("vocab_size", "context", "eos_id", "pad_id", "frames")
"""Arguments of a network that follow from the text that it learned."""


class FromRun:
    """Description of the weights in a run folder, from its ``model.json``.

    Args:
        folder: folder of the run.
        key: config key that names the weights, for messages.

    Raises:
        UserError: if the description is damaged, or not the one that the run wrote.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        integrity.check(folder / "model.json", key)
        self.described = read_model(folder)
        given = self.described.get("arguments")
        self.arguments: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
        self._check_stated(self.described["network"])

    @classmethod
    def of(cls, checkpoint: str | Path | None, key: str) -> FromRun | None:
        """Return the description of the run that a checkpoint belongs to; None where it belongs to no run."""
        folder = None if checkpoint is None else run_of(checkpoint)
        return None if folder is None else cls(folder, key)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Steps that its network went through."""
        return list(self.described.get("steps", ()))

    @property
    def reads_text(self) -> bool:
        """Whether its network reads sequences of tokens."""
        return "tokenizer" in self.described

    @property
    def classes(self) -> list[str]:
        """Names of its classes, in the order of its logits; those of the first of several tasks."""
        return [str(name) for name in self.described.get("classes", ())]

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Names of the classes of each of its tasks; empty where it has one."""
        tasks = self.described.get("tasks")
        if not isinstance(tasks, Mapping):
            return {}
        return {str(task): [str(name) for name in names] for task, names in tasks.items()}

    def check_inputs(self, data: DataModule) -> None:
        """Refuse data of another kind or shape than what the network reads.

        Raises:
            UserError: naming both.
        """
        if self.reads_text != bool(data.vocab_size) or (self.described["target"] == "class") != data.classified:
            kinds = ("text", data.kind) if self.reads_text else ("pictures or a table", data.kind)
            raise UserError(
                self.key,
                f"{self.folder} reads {kinds[0]}, and data ({data.name}) is {kinds[1]}",
                "the run of a network for such data",
            )
        if self.reads_text:
            if (mels := self.described.get("mels")) is not None and mels != data.network_kwargs.get("mels"):
                raise UserError(
                    self.key,
                    (
                        f"{self.folder} reads sound of {mels} mels, and data ({data.name}) has "
                        f"{data.network_kwargs.get('mels')}"
                    ),
                    "the run of a network for such data",
                )
            return
        recorded, configured = list(self.described["input_shape"]), list(data.input_shape)
        if recorded != configured:
            raise UserError(
                self.key,
                (
                    f"{self.folder} reads inputs of shape {_shape(recorded)}, and data ({data.name}) has "
                    f"{_shape(configured)}"
                ),
                "the run of a network for such inputs",
            )
        self._check_columns(getattr(data, "columns", None))

    def _check_columns(self, configured: Columns | None) -> None:
        """Refuse a table of other columns, or of the same in another order; earlier versions did not note any."""
        described = self.described.get("table")
        if configured is None or described is None:
            return
        try:
            recorded = Columns.of(described)
        except ValueError as error:
            raise UserError(f"{self.folder}/model.json", f"damaged ({error})") from None
        configured.check_same(recorded, f"{self.key}: {self.folder}")

    def network(self, given: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Return the mapping of a network as configured, with the run's input normalisation.

        Raises:
            UserError: if the run's network is another one, or told to normalise otherwise; names both.
        """
        return _merged(given, self.described["network"], key, self)

    def statistic(self, name: str) -> Any:
        """Return ``mean`` or ``std`` of its training data, by which a network normalises by default."""
        value = self.arguments.get(name)
        self._check_statistic(name, value)
        return value

    def _check_statistic(self, name: str, value: object) -> None:
        """Refuse a value that is no number: it goes into networks that the user names, and trusts."""
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise UserError(f"{self.folder}/model.json", f"damaged: {name} is {value!r}", "numbers")

    def _check_stated(self, network: Mapping[str, Any]) -> None:
        for name in STATISTICS:
            if not (isinstance(network.get(name), str) and network[name] in KNOWN):
                self._check_statistic(name, network.get(name))
        for inner in network.values():
            if isinstance(inner, Mapping):
                self._check_stated(inner)

    def network_kwargs(self, data: DataModule) -> dict[str, Any]:
        """Return the keyword arguments offered to its network's constructor: as at its training, not as of ``data``."""
        known = dict(data.network_kwargs)
        if self.reads_text:
            return known | {name: self.described[name] for name in OF_TEXT if self.described.get(name) is not None}
        return known | {name: self.statistic(name) for name in STATISTICS if name in self.arguments}

    def tokenizer(self) -> Tokenizer:
        """Load its tokenizer from the run folder.

        Raises:
            UserError: if it is not there.
        """
        return Tokenizer.load(self.folder / Path(str(self.described["tokenizer"])).name, self.key)

    def say_normalisation(self, data: DataModule, owner: str) -> None:
        """Log where the network normalises otherwise than the data would have it."""
        if self.reads_text:
            return
        network = self.described["network"]
        recorded = [_known(name, _stated(network, name) or self.statistic(name)) for name in STATISTICS]
        configured = [data.network_kwargs.get(name) for name in STATISTICS]
        if not _close(recorded, configured):
            log.info(
                "%s: keeps the input normalisation of %s (mean %s, std %s; the data's mean is %s, std %s)",
                *(owner, self.folder, *map(_few_numbers, (*recorded, *configured))),
            )

    def check_classes(self, data: DataModule) -> dict[str, tuple[list[str], list[str], list[int] | None]]:
        """Compare its classes with the data's.

        Returns:
            Map of each task (an empty name for the only one) → its classes, the data's, and the index among its classes
            of each of the data's; None for the latter where they are in the same order.

        Raises:
            UserError: if the one has classes or tasks that the other has not.
        """
        recorded, configured = self.tasks, {name: list(one.class_names) for name, one in data.tasks.items()}
        if set(recorded) != set(configured):
            raise UserError(
                self.key,
                f"{self.folder} knows {_tasks(recorded)}, and data ({data.name}) has {_tasks(configured)}",
                "the run of a network for the same",
            )
        pairs = {name: (recorded[name], configured[name]) for name in configured} or {
            "": (self.classes, list(data.class_names))
        }
        return {task: (have, want, self._order(have, want, data, task)) for task, (have, want) in pairs.items()}

    def line_up(self, net: nn.Module, data: DataModule, owner: str) -> None:
        """Bring the classes of a loaded network into the order of the data's, in place, and log it.

        Args:
            net: network to change.
            data: data module whose classes the logits are to stand for.
            owner: owner of the network, for the log.

        Raises:
            UserError: if the classes are others, or its classifier cannot be brought into their order.
        """
        for task, (have, want, order) in self.check_classes(data).items():
            if order is None:
                continue
            if not reordered(net, order, data, task):
                raise UserError(
                    self.key,
                    (
                        f"{self.folder} has the classes {listed(have)}, data has {listed(want)}, and the "
                        "network's classifier cannot be put into that order"
                    ),
                    argument("data.classes", have),
                )
            log.info(
                "%s: its classes%s are brought from the order of %s (%s) into that of the data (%s)",
                *(owner, f" of {task}" if task else "", self.folder, listed(have), listed(want)),
            )

    def _order(self, have: Sequence[str], want: Sequence[str], data: DataModule, task: str) -> list[int] | None:
        """Return the index among the network's classes of each of the data's; None where they are the same already.

        Raises:
            UserError: if the one has classes that the other has not.
        """
        if list(have) == list(want):
            return None
        if (order := permutation(have, want)) is not None:
            return order
        if len(have) == len(want) and (numbered(have, want) or numbered(want, have)):
            log.info(
                "teacher: the classes of %s are %s and the data's are %s: nothing tells that they are the same in this "
                "order, which is taken for granted",
                *(self.folder, listed(have), listed(want)),
            )
            return None
        raise UserError(
            self.key,
            (
                f"{self.folder} knows {len(have)} classes{f' of {task}' if task else ''} ({listed(have)}"
                f"), and data ({data.name}) has {len(want)} ({listed(want)})"
            ),
            same_classes(have, want, data, task),
        )


def load_pretrained(student: nn.Module, spec_: PretrainedSpec, network: Mapping[str, Any], data: DataModule) -> str:
    """Load the student's first weights from ``pretrained.checkpoint``; return a line for the log.

    The classifier of a network for rows stays its own, since classes are the data's; of text the same tokens follow.

    Args:
        student: network to load into.
        spec_: specification with a checkpoint.
        network: mapping of the student.
        data: data module of the student.

    Raises:
        UserError: if the weights do not fit, or are a run's for other inputs or tokens.
    """
    assert spec_.checkpoint is not None
    key = "pretrained.checkpoint"
    if (origin := FromRun.of(spec_.checkpoint, key)) is not None:
        origin.check_inputs(data)
        origin.network(network, "student")
        if origin.reads_text:
            data.same_tokens(origin.tokenizer(), key)
    path = weights_path(spec_.checkpoint, key)
    return load_weights(student, path, spec_.mapping, key=key, head=not data.classified, weights=spec_.weights)


def normalised_as_started(experiment: Experiment, data: DataModule) -> tuple[Experiment, str]:
    """Let a student normalise its inputs as the weights do that it starts from.

    Where these are of a run whose data had another mean or deviation, and the student is told none of its own.

    Returns:
        The experiment, and a line for the log; empty where nothing had to change.
    """
    if not data.classified:
        return experiment, ""
    key, start = {
        "pretrained": ("pretrained.checkpoint", experiment.pretrained),
        "teacher": ("teacher.checkpoint", experiment.teacher),
        "layer_subset": ("teacher.checkpoint", experiment.teacher),
    }.get(experiment.init, ("", None))
    if start is None or (origin := FromRun.of(start.checkpoint, key)) is None:
        return experiment, ""
    network = origin.described["network"]
    mean, std = (_known(name, _stated(network, name) or origin.statistic(name)) for name in STATISTICS)
    if _close([mean, std], [data.network_kwargs.get(name) for name in STATISTICS]):
        return experiment, ""
    student = _with_statistics(experiment.student, {"mean": mean, "std": std})
    if student == experiment.student:
        return experiment, ""
    numbers = f"mean {_few_numbers(mean)}, std {_few_numbers(std)}"
    note = f"student: normalises its inputs as {origin.folder} does, from which it starts ({numbers})"
    return replace(experiment, student=student), note


# ---- networks


def _merged(configured: Mapping[str, Any], recorded: Mapping[str, Any], key: str, origin: FromRun) -> dict[str, Any]:
    if _last(configured) != _last(recorded):
        raise UserError(
            key, f"{_last(configured)}, and {origin.folder} holds a {_last(recorded)}", "the network of that run"
        )
    merged = dict(configured)
    for name in dict.fromkeys([*recorded, *configured]):
        own, other = configured.get(name), recorded.get(name)
        if name == "_target_":
            continue
        if isinstance(own, Mapping) and isinstance(other, Mapping) and "_target_" in own:
            merged[name] = _merged(own, other, f"{key}.{name}", origin)
        elif name in STATISTICS:
            stated = other if other is not None else origin.statistic(name)
            if own is not None and stated is not None and not _alike(*(_known(name, value) for value in (own, stated))):
                raise UserError(
                    f"{key}.{name}",
                    f"{own}, and {origin.folder} normalises by {_few_numbers(stated)}",
                    "null, or the same",
                )
            merged[name] = other if other is not None else own
        elif (
            name in configured and name in recorded and _plain(own) != _plain(other) and not _supplied(name, own, other)
        ):
            typed = argument(f"{key}.{name}", other)
            raise UserError(
                f"{key}.{name}",
                f"{own}, and {origin.folder} holds a {_last(recorded)} of {name} {other}",
                f"the network of that run, such as by {typed}",
            )
    return merged


def _supplied(name: str, own: object, other: object) -> bool:
    """Return whether one of the two is left to the data, which are compared by themselves."""
    return name in builder.SUPPLIED and (own is None or other is None)


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _last(mapping: Mapping[str, Any]) -> str:
    """Return the class of a network, without the module that it is taken from: facades differ."""
    return str(mapping.get("_target_")).rpartition(".")[2]


def _stated(network: Mapping[str, Any], name: str) -> Any:
    """Return the normalisation that a network's mapping states, its own or that of a network inside it."""
    if network.get(name) is not None:
        return network[name]
    inner = (value for value in network.values() if isinstance(value, Mapping) and "_target_" in value)
    return next((stated for value in inner if (stated := _stated(value, name)) is not None), None)


def _with_statistics(network: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's mapping with a normalisation wherever it takes one and states none."""
    takes = builder.signature(str(network.get("_target_"))).parameters
    stated = {name: value for name, value in statistics.items() if name in takes and network.get(name) is None}
    inner = {
        name: _with_statistics(value, statistics)
        for name, value in network.items()
        if isinstance(value, Mapping) and "_target_" in value
    }
    return {**network, **inner, **stated}


# ---- words


def _tasks(tasks: Mapping[str, Any]) -> str:
    return f"the tasks {', '.join(tasks)}" if tasks else "one task"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _few_numbers(value: object) -> str:
    if not isinstance(value, list | tuple):
        return str(value) if not isinstance(value, float) else f"{value:.4g}"
    return "[" + ", ".join(f"{float(n):.4g}" for n in value[:4]) + (", ...]" if len(value) > 4 else "]")


def _known(name: str, value: object) -> Any:
    """Return a mean or deviation as numbers, where it is the name of a data set."""
    return KNOWN[value][STATISTICS.index(name)] if isinstance(value, str) and value in KNOWN else value


def _close(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Return whether two normalisations are the same, but for rounding."""
    return all(_alike(a, b) for a, b in zip(first, second, strict=True))


def _alike(a: object, b: object) -> bool:
    if a is None or b is None or isinstance(a, str) or isinstance(b, str):
        return a == b
    a, b = (value if isinstance(value, list | tuple) else [value] for value in (a, b))
    longest = max(len(a), len(b))
    a, b = (list(value) * (longest if len(value) == 1 else 1) for value in (a, b))
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9) for x, y in zip(a, b, strict=True))
