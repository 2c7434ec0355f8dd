"""What every teacher keeps: a new class of :mod:`kdlab.teachers` is tested by being exported."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kdlab import teachers
from kdlab.data import digits
from kdlab.functional import Batch, Outputs
from kdlab.models import weights_hash
from kdlab.tasks import Classification
from kdlab.teachers import (
    Arrays,
    CachedTeacher,
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    Manifest,
    SnapshotTeacher,
    TasksTeacher,
    Teacher,
    write_cache,
)

TASK = Classification(10)
ELSEWHERE = {"CrossTokenizerTeacher", "TokenCache"}
"""Teachers of sequences, which the tests of tokenizers and token caches build."""
BASES = {"MovingTeacher", "MultiTeacher", "Teacher"}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10))


def frozen(folder: Path) -> Teacher:
    return FrozenTeacher(net(1), TASK, ["1"])


def cached(folder: Path) -> Teacher:
    data = digits(batch_size=32).to("cpu")
    rows = {"train": (data.counts["train"], data.views or 1), "val": (data.counts["val"], 1)}
    manifest = Manifest(weights_hash(net(1)), data.fingerprint, data.transform, data.num_classes, rows)
    write_cache(folder / manifest.key, manifest, FrozenTeacher(net(1), TASK), data.ordered_loader)
    return CachedTeacher(Arrays(folder / manifest.key, manifest))


MAKERS: dict[str, Callable[[Path], Teacher]] = {
    "CachedTeacher": cached,
    "EMATeacher": lambda folder: EMATeacher(TASK, 0.5),
    "EnsembleTeacher": lambda folder: EnsembleTeacher([FrozenTeacher(net(n), TASK) for n in (1, 2)]),
    "FrozenTeacher": frozen,
    "SnapshotTeacher": lambda folder: SnapshotTeacher(TASK, 0.5),
    "TasksTeacher": lambda folder: TasksTeacher({name: FrozenTeacher(net(n), TASK) for n, name in enumerate("ab")}),
}


@pytest.fixture(params=sorted(MAKERS))
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Teacher:
    return MAKERS[request.param](tmp_path)


@pytest.fixture
def batch() -> Batch:
    return next(iter(digits(batch_size=32).to("cpu").train_dataloader()))


def answer(teacher: Teacher, batch: Batch) -> Outputs:
    """What it says once it has seen a student, in the last of two epochs."""
    for step_done in (False, True):
        teacher.update(net(7), 1, 2, step_done)
    found = teacher(batch)
    assert found is not None
    return found


def test_its_answers_carry_no_gradient_and_repeat(teacher: Teacher, batch: Batch) -> None:
    first = answer(teacher, batch)
    again = teacher(batch)
    assert again is not None
    assert first.logits.shape == (len(batch), 10) and not first.logits.requires_grad
    assert torch.equal(first.logits, again.logits), "in evaluation mode, whoever called train()"
    assert set(first.features) == set(teacher.layers)


def test_it_is_no_part_of_what_trains(teacher: Teacher, batch: Batch) -> None:
    answer(teacher, batch)
    assert not isinstance(teacher, nn.Module)
    assert teacher.net is None or not any(p.requires_grad for p in teacher.net.parameters())


def test_a_resumed_run_takes_back_its_state(request: pytest.FixtureRequest, tmp_path: Path, batch: Batch) -> None:
    for name, make in MAKERS.items():
        for folder in (tmp_path / name / "a", tmp_path / name / "b"):
            folder.mkdir(parents=True)
        one, other = make(tmp_path / name / "a"), make(tmp_path / name / "b")
        expected = answer(one, batch)
        other.restore(one.state_dict(), net(9))
        found = other(batch)
        assert found is not None and torch.equal(found.logits, expected.logits), name


def test_it_says_what_it_is_in_a_line_and_moves(teacher: Teacher) -> None:
    assert teacher.describe() and "\n" not in teacher.describe()
    assert teacher.to(torch.device("cpu")) is teacher
    assert teacher.own_tokenizer is False


def test_every_teacher_is_looked_at() -> None:
    classes = {name for name in teachers.__all__ if inspect.isclass(getattr(teachers, name))}
    kinds = {name for name in classes if issubclass(getattr(teachers, name), Teacher)}
    assert set(MAKERS) | ELSEWHERE | BASES == kinds
