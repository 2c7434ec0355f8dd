"""Teachers of a student in one fit: loaded, trained, cached, or the stage before."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kdlab.data import DataModule
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError, within
from kdlab.experiment import build
from kdlab.experiment.from_run import FromRun, load_pretrained
from kdlab.experiment.model_store import Recipe, get_or_train
from kdlab.experiment.schema import Experiment, TeacherSpec
from kdlab.experiment.teacher_cache import cache_obstacle, cached, written
from kdlab.losses import Objective
from kdlab.methods import FineTune
from kdlab.models import load_weights
from kdlab.models.transforms.steps import replay_steps
from kdlab.runs.origin import weights_path
from kdlab.tasks import Task
from kdlab.teachers import (
    CrossTokenizerTeacher,
    EnsembleTeacher,
    FrozenTeacher,
    MultiTeacher,
    TasksTeacher,
    Teacher,
    TokenCache,
)
from kdlab.training import TrainerConfig

log = logging.getLogger("kdlab")


@dataclass
class TrainedModel:
    """Trained network that can teach."""

    net: nn.Module | None
    """Network; None where only its answers are known, or there are several."""
    trained_on: str
    seconds: float | None = None
    """Training time in seconds; None for a checkpoint from elsewhere."""
    fresh: bool = False
    tokenizer: Any = None
    """Tokenizer of a language model; None where it is the data's, or not known."""
    folder: Path | None = None
    """Folder of the store that holds it; None for a stage or a checkpoint."""
    steps: Sequence[Mapping[str, Any]] = ()
    """Recorded steps that change the architecture from what its config says."""
    members: tuple[TrainedModel, ...] = ()
    """Several networks that teach together."""
    classes: tuple[str, ...] = ()
    """Names of its classes in the order of its logits, where these are those of a stage before."""

    @property
    def spent(self) -> float:
        """Seconds of the training that was done just now."""
        return sum(one.spent for one in self.members) + (self.seconds or 0.0 if self.fresh else 0.0)


@dataclass
class ResolvedTeacher:
    """Teacher ready to teach, and the network that it is made of."""

    teacher: Teacher
    source: TrainedModel
    cache_seconds: float = 0.0


def find_teacher(
    experiment: Experiment,
    data: DataModule,
    training: TrainerConfig,
    previous: TrainedModel | None,
    names: Mapping[str, str],
    vocabulary_agnostic: bool = False,
) -> TrainedModel | None:
    """Return the experiment's teacher as a trained network; None where it has none.

    Args:
        experiment: experiment that names the teacher.
        data: data of the student.
        training: trainer settings for a teacher that is not in the store yet.
        previous: student of the stage before, if that is the teacher.
        names: map of group → chosen option, for the name of its folder.
        vocabulary_agnostic: whether its classes may differ from those of ``data``.

    Raises:
        UserError: if its checkpoint does not load, or it has another number of classes than the data.
    """
    spec = experiment.teacher
    if spec is not None and spec.kind == "cached":
        return TrainedModel(None, f"elsewhere (its answers in {spec.cache})")
    if previous is not None or spec is None:
        return previous
    if spec.kind == "several":
        return _find_members(experiment, data, training, names)
    if spec.net is None:
        return None
    if has_weights(spec):
        return external_teacher(experiment, data, vocabulary_agnostic)
    config = build.teacher_data(experiment.data, spec.data)
    own = own_data(experiment, "teacher")
    if not vocabulary_agnostic:
        data.check_same_classes(own)
    recipe = Recipe(
        *(experiment.task, spec.net, config, spec.epochs, spec.seed, spec.optimizer, spec.scheduler, experiment.trainer)
    )
    name = names.get("teacher", "teacher")
    kept = get_or_train("teacher", recipe, Path(experiment.output), training, name, experiment.logger, own)
    return TrainedModel(
        kept.net,
        kept.trained_on,
        kept.seconds,
        kept.fresh,
        getattr(own, "tokenizer", None),
        kept.folder,
        kept.steps,
    )


def _find_members(
    experiment: Experiment, data: DataModule, training: TrainerConfig, names: Mapping[str, str]
) -> TrainedModel:
    """Find or train each of several teachers, as a single one is."""
    members = []
    for n, one in enumerate(each_member(experiment)):
        with of_member(n):
            member = find_teacher(one, data, training, None, names)
        assert member is not None
        members.append(member)
    times = [one.seconds for one in members if one.seconds is not None]
    trained_on = "; ".join(dict.fromkeys(one.trained_on for one in members))
    return TrainedModel(None, trained_on, sum(times) if times else None, members=tuple(members))


def each_member(experiment: Experiment) -> list[Experiment]:
    """Return the experiment with each of its several teachers alone; none where it has one teacher, or none."""
    spec = experiment.teacher
    if spec is None or spec.kind != "several":
        return []
    return [replace(experiment, teacher=one) for one in spec.each]


@contextmanager
def of_member(number: int) -> Iterator[None]:
    """Prefix an error's key with the member that it is in: ``teacher.members[1].net`` for ``teacher.net``.

    Arguments to type become keys of the member, since no override reaches into a list.
    """
    try:
        yield
    except UserError as error:
        if not error.key.startswith("teacher."):
            raise
        typed = re.compile(r'"teacher\.([\w.]+)=([^"]*)"|\bteacher\.([\w.]+)=([^\s,;]+)')
        key, found, accepted = (
            typed.sub(_in_member, text) for text in (error.key.removeprefix("teacher."), error.found, error.accepted)
        )
        raise UserError(f"teacher.members[{number}].{key}", found, accepted) from None


def _in_member(match: re.Match[str]) -> str:
    key, value = match[1] or match[3], match[2] or match[4]
    first, *inner = key.split(".")
    for name in reversed(inner):
        value = f"{{{name}: {value}}}"
    return f"{first}: {value} in that member"


def ensemble(experiment: Experiment, members: Sequence[Teacher], data: DataModule) -> MultiTeacher:
    """Combine several teachers into one, weighted as the experiment says; weights that train are the loss's."""
    assert experiment.teacher is not None
    weighting = experiment.teacher.weighting
    if weighting == "tasks":
        return TasksTeacher(dict(zip(tasks_of(experiment), members, strict=True)), next(iter(data.tasks)))
    by_confidence: Any = "confidence" if weighting == "confidence" else "mean"
    return EnsembleTeacher(members, weighting=by_confidence, show=weighting == "learned")


def tasks_of(experiment: Experiment) -> list[str]:
    """Return the task that each of several teachers knows: its ``data.label``.

    Raises:
        UserError: if one names none, or several do the same.
    """
    tasks = []
    for n, one in enumerate(each_member(experiment)):
        assert one.teacher is not None
        label = one.teacher.data.get("label")
        if not isinstance(label, str) or label in tasks:
            raise UserError(
                f"teacher.members[{n}].data.label",
                f"{label!r}, and teacher.weighting is tasks",
                "the name of a task that no other member knows",
            )
        tasks.append(label)
    return tasks


def has_weights(spec: TeacherSpec) -> bool:
    """Return whether a teacher need not be trained: it has a checkpoint, or is one that others published."""
    return spec.checkpoint is not None or (spec.net or {}).get("name") is not None


def external_teacher(experiment: Experiment, data: DataModule, vocabulary_agnostic: bool) -> TrainedModel:
    """Return a teacher that was trained elsewhere, with its tokenizer where that is known.

    Raises:
        UserError: if its weights do not fit, or it speaks of other tokens than ``data``, unless
        ``vocabulary_agnostic``.
    """
    spec = experiment.teacher
    assert spec is not None and spec.net is not None
    if data.tasks and isinstance(spec.data.get("label"), str):  # it knows one of several tasks
        own = own_data(experiment, "teacher")
        data.check_same_classes(own)
        data = own
    if (origin := FromRun.of(spec.checkpoint, "teacher.checkpoint")) is not None:
        return _teacher_from_run(origin, spec, data, vocabulary_agnostic)
    net = build.network(spec.net, data, spec.seed, "teacher.net")
    tokenizer = None
    if not data.classified and getattr(net, "tokenizer_name", None) is not None:
        tokenizer = Tokenizer.load(str(net.tokenizer_name))
        if not vocabulary_agnostic:
            data.same_tokens(tokenizer, "teacher.net.name")
    if spec.checkpoint is None:
        return TrainedModel(net, f"elsewhere ({spec.net['name']})", tokenizer=tokenizer)
    return TrainedModel(net, _load(net, spec), tokenizer=tokenizer)


def _teacher_from_run(origin: FromRun, spec: TeacherSpec, data: DataModule, vocabulary_agnostic: bool) -> TrainedModel:
    """Return a teacher with weights from a run folder: its own normalisation, its classes in the data's order.

    Raises:
        UserError: if it is another network than ``teacher.net``, or reads other inputs, classes or tokens.
    """
    assert spec.net is not None
    network = origin.network(spec.net, "teacher.net")
    origin.check_inputs(data)
    tokenizer = origin.tokenizer() if origin.reads_text else None
    if tokenizer is not None and not vocabulary_agnostic:
        data.same_tokens(tokenizer, origin.key)
    if tokenizer is None:
        origin.check_classes(data)
    net = build.network(network, data, spec.seed, "teacher.net", origin.network_kwargs(data))
    net = replay_steps(net, origin.steps)
    loaded = _load(net, spec)
    if tokenizer is None:
        origin.say_normalisation(data, "teacher")
        origin.line_up(net, data, "teacher")
    return TrainedModel(net, loaded, tokenizer=tokenizer, steps=origin.steps)


def _load(net: nn.Module, spec: TeacherSpec) -> str:
    """Load a teacher's checkpoint; return its origin in words."""
    assert spec.checkpoint is not None
    key = "teacher.checkpoint"
    path = weights_path(spec.checkpoint, key)
    log.info("teacher: %s", load_weights(net, path, spec.mapping, key=key, weights=spec.weights))
    return f"elsewhere (checkpoint {Path(spec.checkpoint).name})"


def own_data(experiment: Experiment, owner: str) -> Any:
    """Build the data on which a teacher, or what the student starts from, is trained.

    Raises:
        UserError: what the data refuse, or if no row has a label.
    """
    spec = getattr(experiment, owner)
    with within(owner):
        data = build.data(build.teacher_data(experiment.data, spec.data), spec.seed)
    if data.counts["labelled"] == 0:
        raise UserError(f"{owner}.data.labels", "0, and it learns from labels", "above 0, or null")
    return data


def data_in_teacher_tokens(experiment: Experiment) -> Any:
    """Build the data in the tokens of a teacher with a tokenizer of its own.

    Raises:
        UserError: what the data refuse, such as a context with too little room for so many tokens.
    """
    spec = experiment.teacher
    assert spec is not None and spec.net is not None
    if not has_weights(spec):
        return own_data(experiment, "teacher")
    origin = FromRun.of(spec.checkpoint, "teacher.checkpoint")
    tokens = spec.net.get("name") if origin is None else str(origin.folder / "tokenizer.json")
    with within("teacher"):
        return build.data({**build.teacher_data(experiment.data, spec.data), "tokenizer": tokens}, spec.seed)


def resolve_teacher(
    source: TrainedModel,
    experiment: Experiment,
    data: DataModule,
    task: Task,
    objective: Objective,
    training: TrainerConfig,
) -> ResolvedTeacher:
    """Make a frozen teacher of a trained network: answering from its cache where possible, else live; log which.

    Raises:
        UserError: if it has another vocabulary than the student, and the objective compares token by token.
    """
    if source.members:
        return _give_members(source, experiment, data, task, objective, training)
    if source.net is None:
        kept = written(experiment, data, objective)
        log.info(kept.describe())
        return ResolvedTeacher(kept, source)
    live = FrozenTeacher(source.net, task, objective.teacher_layers)
    if objective.vocabulary_agnostic and source.tokenizer is not None:
        translated = CrossTokenizerTeacher(source.net, task, source.tokenizer, data.tokenizer)
        log.info(translated.describe())
        return ResolvedTeacher(translated, source)
    why_not = cache_obstacle(experiment, data, objective)
    if why_not:
        log.info("%s; no cache, %s", live.describe(), why_not)
        return ResolvedTeacher(live, source)
    started = time.monotonic()
    teacher = cached(live, experiment, data, training)
    log.info(teacher.describe())
    if objective.uses_temperature and isinstance(teacher, TokenCache) and not teacher.manifest.plain_logits:
        log.warning(
            "teacher: a temperature other than 1 softens the %d cached tokens and one bucket of all "
            "others, which is "
            "another objective than softening the whole vocabulary; temperature=none is what the cache is made for",
            teacher.manifest.k,
        )
    return ResolvedTeacher(teacher, source, time.monotonic() - started)


def _give_members(
    source: TrainedModel,
    experiment: Experiment,
    data: DataModule,
    task: Task,
    objective: Objective,
    training: TrainerConfig,
) -> ResolvedTeacher:
    """Make one teacher of several; each answers from its own cache where possible."""
    started = time.monotonic()
    members: list[Teacher] = []
    for n, (trained, one) in enumerate(zip(source.members, each_member(experiment), strict=True)):
        assert trained.net is not None
        live = FrozenTeacher(trained.net, task)
        with of_member(n):
            why_not = cache_obstacle(one, data, objective)
            members.append(live if why_not else cached(live, one, data, training))
        if why_not:
            log.info("teacher.members[%d]: no cache, %s", n, why_not)
    teacher = ensemble(experiment, members, data)
    log.info(teacher.describe())
    return ResolvedTeacher(teacher, source, time.monotonic() - started)


@dataclass
class Pretrained:
    """Network that a student starts from with ``init=pretrained``."""

    load: Callable[[nn.Module], None]
    """Function that gives a network the weights, in place; it keeps its own head where classes differ."""
    steps: Sequence[Mapping[str, Any]] = ()
    """Recorded steps of the network that the weights are of."""


def find_pretrained(
    experiment: Experiment, data: DataModule, training: TrainerConfig, names: Mapping[str, str]
) -> Pretrained | None:
    """Return what the student starts from: a checkpoint, or a network of the store; None with another ``init``.

    Raises:
        UserError: if the experiment names none.
    """
    if experiment.init != "pretrained":
        return None
    spec = experiment.pretrained
    if spec is None:
        raise UserError("init", "pretrained, and the experiment has none", "pretrained=trained, or init=fresh")
    if spec.checkpoint is not None:
        origin = FromRun.of(spec.checkpoint, "pretrained.checkpoint")

        def load_checkpoint(student: nn.Module) -> None:
            log.info("pretrained: %s", load_pretrained(student, spec, experiment.student, data))

        return Pretrained(load_checkpoint, () if origin is None else origin.steps)

    keeps_head = not data.classified  # the same tokens follow in any text; classes are the data's own
    recipe = Recipe(
        task=experiment.task,
        network=experiment.student,
        data=build.teacher_data(experiment.data, spec.data),
        epochs=spec.epochs,
        seed=spec.seed,
        optimizer=spec.optimizer,
        scheduler=spec.scheduler,
        trainer=experiment.trainer,
    )

    def load_kept(student: nn.Module) -> None:
        name = names.get("student", "student")
        kept = get_or_train("pretrained", recipe, Path(experiment.output), training, name, experiment.logger)
        load_weights(student, kept.folder / FineTune.weights_file, key="pretrained", head=keeps_head)
        log.info("pretrained: on %s%s", kept.trained_on, "" if keeps_head else "; a new head")

    return Pretrained(load_kept)
