"""Store of networks that are trained once and kept: teachers, pretrained networks, baselines.

Each has a folder named by a key made of its configuration, data and seed. A file lock guards it, so that jobs of a
sweep that want the same one wait for the first; one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout
from torch import nn

from kdlab.config import builder
from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.experiment import build
from kdlab.experiment.continuing import LAST, copy_training_state
from kdlab.methods import FineTune
from kdlab.models import StepContext, load_weights
from kdlab.models.transforms.steps import apply_steps, describe_steps, finish_steps, repeated, replay_steps
from kdlab.runs import folder as folders
from kdlab.runs.formatting import plural
from kdlab.system import integrity
from kdlab.system.files import lock_file, remove_leftovers
from kdlab.training import TrainerConfig, fit

log = logging.getLogger("kdlab")


LABELS = {"ce": {"_target_": "kdlab.losses.CrossEntropy"}}
"""Loss terms that teachers learn by: plain cross-entropy."""

STORES = {"teacher": "teachers", "pretrained": "pretrained", "baseline": "baselines"}
"""Map of kind → its folder in the store."""

RUNTIME_KEYS = (
    "accelerator",
    "channels_last",
    "threads",
    "deterministic",
    "log_every",
    "gradients",
    "progress",
    "save_minutes",
)
"""Keys of the trainer that change how a network is computed, not its weights."""


@dataclass(frozen=True)
class Recipe:
    """Settings that determine a network trained on labels alone."""

    task: Mapping[str, Any]
    network: Mapping[str, Any]
    data: Mapping[str, Any]
    epochs: int
    seed: int
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    trainer: Mapping[str, Any]
    terms: Mapping[str, Any] = field(default_factory=lambda: dict(LABELS))
    """Label terms of its objective."""
    adapter: Mapping[str, Any] | None = None
    """Step that trains in the place of the network's own weights."""
    steps: Sequence[Mapping[str, Any]] = ()
    """Further changes to the network before it trains."""
    repeats: Sequence[Mapping[str, Any]] = ()
    """Recorded steps of the network whose weights it starts from."""
    begin: str = ""
    """Origin of its first weights, if they are not random."""

    def key(self, fingerprint: str) -> str:
        """Return a short name: equal recipes on equal data have equal keys."""
        computed = {k: v for k, v in self.trainer.items() if k not in RUNTIME_KEYS}
        data = {k: v for k, v in self.data.items() if k != "label" or v is not None}  # what there was before labels
        what = [self.network, data, self.epochs, self.seed, self.optimizer, self.scheduler, computed, fingerprint]
        # how answers are generated and measured is no matter of the weights
        task = {k: v for k, v in self.task.items() if k in ("_target_", "num_classes", "vocab_size", "score")}
        what += [self.terms, task, self.adapter, self.begin]
        what += [list(steps) for steps in (self.steps, self.repeats) if steps]
        text = json.dumps(what, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass
class StoredModel:
    """Network from the store, with its folder and how it was trained."""

    net: nn.Module
    folder: Path
    trained_on: str
    seconds: float
    """Training time in seconds, whenever it was trained."""
    fresh: bool
    """Whether it was trained just now."""
    steps: Sequence[Mapping[str, Any]] = ()
    """Steps that its ``model.json`` records."""


def get_or_train(
    kind: str,
    recipe: Recipe,
    output: Path,
    training: TrainerConfig,
    name: str,
    logger: Mapping[str, Any] | None = None,
    data: DataModule | None = None,
    begin: Callable[[nn.Module], Any] = lambda net: None,
    shorter: Path | None = None,
) -> StoredModel:
    """Load the network of ``recipe`` from the store, or train it now and keep it.

    Args:
        kind: kind of network: ``teacher``, ``pretrained`` or ``baseline``.
        recipe: recipe of the network.
        output: folder of all outputs; the store is ``output/<kind>s``.
        training: trainer settings.
        name: name of the network, for the folder's name.
        logger: mapping of the logger.
        data: data module of ``recipe.data``, if there is one already.
        begin: function that gives the network its first weights, where ``recipe.begin`` says that they are not random.
        shorter: folder of a shorter training, from whose last state this one starts; None starts from the weights.

    Raises:
        UserError: what data or network refuse, or if the weights that were kept are not those that were trained.
    """
    data = data if data is not None else build.data(recipe.data, recipe.seed)
    net = build.network(recipe.network, data, recipe.seed, kind)
    folder = output / STORES[kind] / f"{name}-{recipe.key(data.fingerprint)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_file(f"{folder}.lock")
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another run is training it; waiting", kind)
        lock.acquire()
    except OSError as error:
        raise UserError(kind, f"{folder}.lock: cannot be locked ({error})", "without that file") from None
    try:
        remove_leftovers(folder)
        known = folders.read_result(folder)
        if known is None:
            net = replay_steps(net, recipe.repeats)
            begin(net)
            if shorter is not None and not (folder / LAST).exists():
                log.info("%s: goes on from the last state of %s", kind, shorter)
                copy_training_state(shorter, folder)
            net, known = _train(kind, recipe, folder, training, net, data, logger, continued=shorter is not None)
            steps = recorded_steps(folder)
            return StoredModel(net, folder, known["trained_on"], known["seconds"], fresh=True, steps=steps)
    finally:
        lock.release()
    weights = folder / FineTune.weights_file
    integrity.check(weights, kind, cure=f"the folder {folder} removed (it is trained again)")
    steps = recorded_steps(folder)
    net = replay_steps(net, steps)
    load_weights(net, weights, key=kind)
    log.info("%s: %s, trained before (%s)", kind, name, folder)
    return StoredModel(net.eval(), folder, known["trained_on"], known["seconds"], fresh=False, steps=steps)


def _train(
    kind: str,
    recipe: Recipe,
    folder: Path,
    training: TrainerConfig,
    net: nn.Module,
    data: DataModule,
    logger: Mapping[str, Any] | None,
    continued: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a network into its folder; return it, and the content of ``result.json``."""
    if data.counts["labelled"] == 0:
        raise UserError(kind, "its data have no label (labels=0)", f"{kind}.data.labels above 0, or null")
    log.info("%s: training %s on %s", kind, plural(recipe.epochs, "epoch"), data.describe())
    for note in data.notes:
        log.info("%s's data: %s", kind, note)
    folder.mkdir(parents=True, exist_ok=True)
    folders.check_links(folder)
    plain = {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}
    folders.write_config(folder, {k: dict(v) if isinstance(v, Mapping) else v for k, v in plain.items()}, [])
    configured = build.configured_steps(recipe.steps, recipe.adapter)
    context = StepContext(seed=recipe.seed, batches=data.train_dataloader)
    net, steps = apply_steps(net, configured, context), {**repeated(recipe.repeats), **configured}
    method = FineTune(
        student=net,
        objective=build.labels_only(recipe.terms, data),
        task=build.task(recipe.task, data),
        optimizer=build.make_optimizer(recipe.optimizer),
        scheduler=None if recipe.scheduler is None else builder.build(recipe.scheduler, "scheduler", slot="scheduler"),
        seed=recipe.seed,
    )
    made = build.loggers(logger, folder, kind)
    fitted = fit(method, data, training, folder, recipe.epochs, made, kind, continued)
    net = finish_steps(net, steps, context, fitted.weights)
    write_model(folder, recipe.network, data, fitted.weights.name, describe_steps(steps))
    return net, folders.write_result(
        folder,
        {
            "format": folders.FORMAT,
            "status": "finished",
            "trained_on": data.describe(),
            "seconds": fitted.seconds,
            "best_epoch": fitted.best_epoch,
            "epochs": fitted.epochs,
            "val": fitted.measures,
            "finished": folders.now(),
        },
    )


def recorded_steps(folder: Path) -> list[dict[str, Any]]:
    """Return the steps that a folder's ``model.json`` records."""
    return list(folders.read_model(folder).get("steps", ()))


def write_model(
    folder: Path, network: Mapping[str, Any], data: DataModule, weights: str, steps: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write ``model.json``, which with the weights suffices to rebuild the network and to read its output."""
    described = {
        "network": dict(network),
        "arguments": data.network_kwargs,
        **({"steps": list(steps)} if steps else {}),
        "weights": weights,
        "modality": data.modality,
        "target": data.target,
        **data.inference_metadata(folder),
    }
    folders.write_text(folder / "model.json", json.dumps(described, indent=1, ensure_ascii=False, default=str) + "\n")
    folders.sign(folder)
