"""Data and networks of a finished run, rebuilt: student, teacher and baseline, from the run folder and the store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.config import builder
from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.experiment import build
from kdlab.experiment.from_run import FromRun, normalised_as_started
from kdlab.experiment.schema import ROOT, Experiment, TeacherSpec
from kdlab.experiment.stage import is_taught, with_generations
from kdlab.experiment.teacher import external_teacher, has_weights
from kdlab.functional import Outputs
from kdlab.inference.predict import load_model
from kdlab.runs import folder as folders
from kdlab.system import integrity
from kdlab.system.names import check_name
from kdlab.tasks import Task

log = logging.getLogger("kdlab")

Nets = Sequence[nn.Module]
"""One network, or several whose probabilities are averaged."""


class ModelMissing(Exception):
    """Reason that a network cannot be rebuilt, in one line."""


@dataclass
class Rebuilt:
    """Data of a run, and those of its networks that could be rebuilt."""

    experiment: Experiment
    """Experiment of the run, or of its last stage."""
    data: DataModule
    task: Task
    nets: dict[str, Nets]
    """Map of role (``student``, ``teacher``, ``baseline``) → networks."""
    notes: list[str] = field(default_factory=list)
    """Reasons why networks are missing, a line each."""

    @torch.no_grad()
    def answers(self, split: str, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
        """Return every network's logits on a split, role → (N, C) float32, and the class ids (N,), on the CPU.

        Raises:
            UserError: if there are no such rows, or a network answers in another number of classes than the data have.
        """
        self.data.to(device)
        collected: dict[str, list[Tensor]] = {role: [] for role in self.nets}
        targets = []
        for nets in self.nets.values():
            for net in nets:
                net.to(device).eval()
        for batch in self.data.ordered_loader(split):
            targets.append(batch.targets.cpu())
            for role, nets in self.nets.items():
                each = [Outputs.of(self.task.outputs(net, batch)).logits.float() for net in nets]
                if each[0].shape[-1] != self.data.num_classes:
                    raise UserError(
                        role,
                        f"{each[0].shape[-1]} classes, and the data have {self.data.num_classes}",
                        "a network of the same classes",
                    )
                one = each[0] if len(each) == 1 else torch.stack([x.log_softmax(-1) for x in each]).logsumexp(0)
                collected[role].append(one.cpu())
        return {role: torch.cat(logits) for role, logits in collected.items()}, torch.cat(targets)


def rebuild(
    run: Path,
    *,
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    teacher: Path | None = None,
    baseline: Path | None = None,
    trust: bool = False,
) -> Rebuilt:
    """Rebuild data and networks of a classifier's run; nothing is trained, and nothing written.

    Args:
        run: run folder.
        stages: composed configuration of each stage, for a run that has some.
        teacher: folder of another network to take for the teacher.
        baseline: folder of another network to take for the baseline.
        trust: whether to build modules of the user's that the folder names.

    Raises:
        UserError: if it is no run folder of a classifier, it has not finished training, or its data are not there.
    """
    described = folders.read_model(run)
    if described["target"] != "class":
        raise UserError("diagnose", f"{run} holds a language model", "the run folder of a classifier")
    config = _config(run)
    student, _ = load_model(run, trust)
    with _trusted(run, trust):
        plan = {check_name("stages", name): _experiment(run, one) for name, one in (stages or {}).items()}
        fits = list(with_generations(plan or {"": _experiment(run, config)}))
        experiment = fits[-1][1]
        try:
            data = build.data(experiment.data, experiment.seed)
            task = build.task(experiment.task, data)
        except UserError as error:
            raise error.inside(f"{run}/config.yaml") from None
        experiment, _ = normalised_as_started(experiment, data)
        fits[-1] = (fits[-1][0], experiment)
    if data.tasks:
        raise UserError(
            "diagnose", f"{run} has several tasks ({', '.join(data.tasks)})", "the run of a classifier with one"
        )
    if list(data.class_names) != list(described["classes"]):
        raise UserError("diagnose", f"{run}: its data have other classes now than its model", "the data it learned")
    rebuilt = Rebuilt(experiment, data, task, {"student": [student]})
    if config.get("stages") and not stages:
        rebuilt.notes.append(
            "stages: not composed as they were; data and teacher are those of the run before its stages"
        )
    wanted: dict[str, tuple[Path | None, Callable[[], Nets | None]]] = {
        "teacher": (teacher, lambda: _teacher(run, fits, data, trust)),
        "baseline": (baseline, lambda: _baseline(run, trust)),
    }
    for role, (given, find) in wanted.items():
        try:
            with _trusted(run, trust):
                nets = find() if given is None else [_given(given, role, data, trust)]
        except (ModelMissing, UserError) as error:
            if given is not None:
                raise
            why = error.found if isinstance(error, UserError) and error.key == role else error
            rebuilt.notes.append(f"{role}: not rebuilt, {why}; --{role} FOLDER names one")
            continue
        if nets:
            rebuilt.nets[role] = nets
    return rebuilt


def _config(run: Path) -> dict[str, Any]:
    """Return the configuration of a run, as it ran.

    Raises:
        UserError: if it cannot be read, or another one stands there now.
    """
    config = folders.read_config(run)
    known = folders.read_result(run) or {}
    if integrity.CHECKSUM in known and known.get("config_hash") != builder.config_hash(config):
        raise UserError(
            f"{run / 'config.yaml'} is not what ran",
            (f"its hash is not the one in {run / integrity.RESULT} (it is damaged, edited, or of another run)"),
            f"the file as it was, {integrity.ON_PURPOSE}",
        )
    return config


def _experiment(run: Path, config: Mapping[str, Any]) -> Experiment:
    try:
        builder.bind(config, target=ROOT)
        return Experiment.of(config)
    except (TypeError, UserError) as error:
        raise UserError(f"{run}/config.yaml", f"damaged, or of another version of kdlab ({error})") from None


@contextmanager
def _trusted(run: Path, trust: bool) -> Iterator[None]:
    """Restrict what may be built: config.yaml bears no signature, so that the user must say whether to trust it.

    Raises:
        UserError: whatever goes wrong with what an untrusted folder asks for.
    """
    with builder.trust(user_modules=trust, read_only=not trust):
        try:
            yield
        except (UserError, ModelMissing, OSError):
            raise
        except Exception as error:
            if trust:
                raise
            raise UserError(
                run,
                f"cannot be rebuilt from its config.yaml ({type(error).__name__}: {error})",
                "a folder as kdlab wrote it",
            ) from error


def _given(folder: Path, role: str, data: DataModule, trust: bool) -> nn.Module:
    """Return the network of a folder that the user names, its classes in the order of the data's."""
    net = load_model(folder, trust)[0]
    origin = FromRun(folder, f"--{role}")
    origin.check_inputs(data)
    origin.line_up(net, data, role)
    return net


# ---- the teacher --------------------------------------------------------------------------------------------------


def _teacher(run: Path, fits: Sequence[tuple[str, Experiment]], data: DataModule, trust: bool) -> Nets | None:
    """Return the networks that taught the last fit; None where there was no teacher.

    Raises:
        ModelMissing: if that network is not there any more.
    """
    experiment = fits[-1][1]
    if experiment.past_teaches:
        raise ModelMissing("it was the student itself, earlier")
    if not is_taught(experiment, build.objective(experiment.loss)):
        return None
    if experiment.previous_teaches and len(fits) > 1:
        return [load_model(run / "stages" / fits[-2][0], trust)[0]]
    spec = experiment.teacher
    if spec is None:
        return None
    if spec.kind != "several":
        return [_one_teacher(run, experiment, spec, "teacher", data, trust)]
    return [_one_teacher(run, experiment, one, f"teacher_{n}", data, trust) for n, one in enumerate(spec.each)]


def _one_teacher(
    run: Path, experiment: Experiment, spec: TeacherSpec, role: str, data: DataModule, trust: bool
) -> nn.Module:
    if spec.net is None:
        raise ModelMissing("only its answers are known")
    if has_weights(spec):
        net = external_teacher(replace(experiment, teacher=spec), data, False).net
        assert net is not None
        return net.eval()
    return _recorded(run, role, trust)


def _baseline(run: Path, trust: bool) -> Nets | None:
    """Return the same student without its teacher; None where the run has none.

    Raises:
        ModelMissing: if it is not there any more, or the run does not say where it is.
    """
    models = (folders.read_result(run) or {}).get("models") or {}
    return None if models.get("baseline") is None else [_recorded(run, "baseline", trust)]


def _recorded(run: Path, role: str, trust: bool) -> nn.Module:
    """Return a network of the run, from the folder that ``result.json`` names: in the run's stages, or in the store.

    The store is looked for where the run was started, and in every folder above the run.

    Raises:
        ModelMissing: if no folder is recorded (by an earlier version), or it is not there any more.
    """
    models = (folders.read_result(run) or {}).get("models") or {}
    recorded = (models.get(role) or {}).get("folder")
    if not isinstance(recorded, str):
        raise ModelMissing("the run does not say in which folder it is")
    folder = Path(recorded)
    for place in (run, Path(), *list(run.resolve().parents)[:5]):
        for known in (place / folder, place / Path(*folder.parts[-2:])):
            if (known / "model.json").is_file():
                return load_model(known, trust)[0]
    raise ModelMissing(f"there is no {folder}")
