"""Classes and probabilities of a finished run's model, from its folder alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.config import builder
from kdlab.data import array_inputs, pictures
from kdlab.data.pictures import Look
from kdlab.data.table_file import SUFFIXES as TABLES
from kdlab.errors import UserError
from kdlab.functional import Outputs
from kdlab.inference.predict_table import read_rows
from kdlab.inference.prediction import Prediction
from kdlab.models import load_weights
from kdlab.models.transforms.steps import replay_steps
from kdlab.models.weights.size_limit import no_larger_than
from kdlab.plain_text import one_line
from kdlab.runs.folder import is_mine, read_model
from kdlab.system import integrity
from kdlab.system.arrays import read_array
from kdlab.system.files import Unreadable
from kdlab.system.names import check_name

log = logging.getLogger("kdlab")

BATCH = 4096
"""Number of rows in one forward pass of the network."""


def load_model(run: Path, trust: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a run's deployable model and load its weights.

    Args:
        run: a run folder (or that of a kept teacher or baseline).
        trust: whether to build what the folder names even if it is neither kdlab's, torch's, nor this user's own run.

    Returns:
        The network in eval mode, and the content of ``model.json``.

    Raises:
        UserError: if it is no run folder, its weights or ``model.json`` are not as they were written, or it asks for
            code that is not trusted.
    """
    described = read_model(run)
    integrity.check(run / "model.json")
    trusted = trust or is_mine(run)
    try:
        weights = run / check_name("weights", Path(described["weights"]).name, "the name of a file in the folder")
        bounded = nullcontext() if trusted else no_larger_than(weights)
        with builder.trust(user_modules=trusted, read_only=not trusted), bounded:
            net = _build(described)
    except UserError as error:
        raise error.inside(f"{run}/model.json") from None
    load_weights(net, weights, key=str(run))
    return net.eval(), described


def _build(described: Mapping[str, Any]) -> nn.Module:
    try:
        net = builder.build(described["network"], "network", slot="network", offer=described.get("arguments"))
        return replay_steps(net, described.get("steps", ()))
    except RecursionError:
        raise UserError("network", "nested too deeply", "a network as kdlab describes it") from None


def predict(run: Path, inputs: Sequence[Path], trust: bool = False) -> list[Prediction]:
    """Classify images, arrays or tables; for a network with several tasks, return a prediction for each in turn.

    Args:
        run: a run folder.
        inputs: image files; or ``.npy`` arrays of one row or many, uint8 or floats in [0, 1], with channels first
            (C, H, W) or last (H, W, C), or (H, W) for one channel, or (F,) for vectors; or tables (.csv, .tsv) for the
            run of a table.
        trust: whether to trust the run folder, see :func:`load_model`.

    Raises:
        UserError: for an input that is missing, unreadable or of another shape.
    """
    net, described = load_model(run, trust)
    if "classes" not in described:
        raise UserError(f"{run}/model.json", "names no classes", "the run folder of a classifier")
    shape = tuple(described["input_shape"])
    predictions: list[Prediction] = []
    looks = []
    for path in inputs:
        if path.suffix.lower() in TABLES and len(shape) == 1:
            table = read_rows(path, described, run)
            rows, sources, given = table.inputs, table.names, table.given
        else:
            rows, look = _read(path, shape)
            looks += [] if look is None else [look]
            sources, given = [f"{path}[{i}]" for i in range(len(rows))] if len(rows) > 1 else [str(path)], {}
        tasks = described.get("tasks") or {"": described["classes"]}
        answers = _answers(net, rows, tasks, run)
        for i, source in enumerate(sources):
            for task, names in tasks.items():
                row = answers[task][i]
                named = {names[c]: float(row[c]) for c in row.argsort(descending=True).tolist()}
                label = given[task][i] if task in given else None
                predictions.append(Prediction(source, next(iter(named)), named, task, str(path), i + 1, label))
    for line in pictures.summary(looks):
        log.warning(line)
    return predictions


@torch.no_grad()
def _answers(net: nn.Module, rows: Tensor, tasks: Mapping[str, Sequence[str]], run: Path) -> dict[str, Tensor]:
    """Return (N, C) probabilities of the classes of each task, by task."""
    probabilities: dict[str, list[Tensor]] = {task: [] for task in tasks}
    for part in rows.split(BATCH):
        outputs = Outputs.of(net(part))
        for task, names in tasks.items():
            probabilities[task].append(_shares(outputs, task, names, run))
    return {task: torch.cat(parts) for task, parts in probabilities.items()}


def _shares(outputs: Outputs, task: str, names: Sequence[str], run: Path) -> Tensor:
    """Return (N, C) probabilities of the classes of a task.

    Raises:
        UserError: if the network has another number of them, or no such task.
    """
    logits = outputs.heads.get(task) if task else outputs.logits
    width = 0 if logits is None else logits.shape[-1]
    if logits is None or width != len(names):
        of = f" of {task}" if task else ""
        raise UserError(f"{run}/model.json", f"names {len(names)} classes{of}, and the network has {width}")
    return logits.float().softmax(-1)


def read_input(path: Path, shape: tuple[int, ...]) -> Tensor:
    r"""Read a file as a batch (N, \*shape) of floats, as training data are read.

    Raises:
        UserError: if it is of another kind or shape, or cannot be read.
    """
    return _read(path, shape)[0]


def _read(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Look | None]:
    """Read a file as :func:`read_input` does, and return also what to report about a picture."""
    accepted = f"an image ({pictures.listed()}) or a .npy array" if len(shape) == 3 else "a .npy array"
    if not path.is_file():
        what = "is a folder, a pipe or a device" if path.exists() else "does not exist"
        raise UserError(path, what, accepted)
    if path.suffix.lower() == ".npy":
        return _from_array(path, shape), None
    if path.suffix.lower() in pictures.endings() and len(shape) == 3:
        return _from_image(path, shape)
    raise UserError(path, f"cannot be read as input of shape {shape}", accepted)


def _from_array(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        array = read_array(path)
    except (OSError, Unreadable) as error:
        raise UserError(path, f"cannot be read as an array ({error})") from None
    try:
        rows, turned = array_inputs.to_tensor(array), False
        if len(shape) == 3:
            rows, turned = array_inputs.fit_channels(rows, shape)
        elif rows.ndim == len(shape):
            rows = rows[None]
        if tuple(rows.shape[1:]) != shape:
            raise Unreadable(f"has shape {tuple(array.shape)}; accepted: {shape}, or (N, {str(shape)[1:]}")
        rows = array_inputs.as_pictures(rows) if len(shape) == 3 else array_inputs.as_table(rows)
    except Unreadable as error:
        raise UserError(path, str(error)) from None
    if turned:
        log.warning("%s: shape %s is read with the channels last", one_line(path), tuple(array.shape))
    return rows / 255 if rows.dtype == torch.uint8 else rows


def _from_image(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Look]:
    channels, height, width = shape
    try:
        pixels, look = pictures.decode(path, height, width, channels)
    except Unreadable as error:
        raise UserError(path, f"cannot be read as an image ({error})") from None
    return torch.from_numpy(pixels)[None] / 255, look
