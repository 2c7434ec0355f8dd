"""What every option of ``batch_transform`` keeps: a new option file is tested by being there."""

import copy

import pytest
import torch
from torch import nn

from helpers.options import option
from helpers.paths import CONF
from kdlab.batch_transforms import BatchTransform
from kdlab.data import digits
from kdlab.experiment import build
from kdlab.functional import Batch
from kdlab.models import CifarResNet
from kdlab.tasks import Classification
from kdlab.teachers import FrozenTeacher

TEXT = {"on_policy", "sequence_level"}
"""Transforms of sequences, which the tests of generated text look at."""
OPTIONS = sorted({path.stem for path in (CONF / "batch_transform").glob("[!_]*.yaml")} - TEXT - {"none"})
SHORT = {"inversion": {"steps": 2}, "dafl": {"warmup": 0}, "zskt": {}}
TASK = Classification(10)


@pytest.fixture(params=OPTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def made(name: str) -> BatchTransform:
    config = option("batch_transform", name)
    config |= {key: value for key, value in SHORT.get(name, {}).items() if key in config}
    transform = build.batch_transform(config, digits(batch_size=16).to("cpu"))
    assert transform is not None
    return transform


@pytest.fixture
def batch() -> Batch:
    return next(iter(digits(batch_size=16, labels=400).to("cpu").train_dataloader()))


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, FrozenTeacher]:
    torch.manual_seed(0)
    student, teacher = (CifarResNet(8, num_classes=10, in_channels=1, width=4) for _ in range(2))
    return student, FrozenTeacher(teacher, TASK)


def call(transform: BatchTransform, batch: Batch, nets: tuple[nn.Module, FrozenTeacher], step: int = 3) -> Batch:
    return transform(copy.deepcopy(batch), *nets, TASK, 0, step, 0)[0]


def test_a_batch_comes_back_and_the_networks_stay(name: str, batch: Batch, nets) -> None:
    before = [{key: value.clone() for key, value in net.state_dict().items()} for net in (nets[0], nets[1].net)]
    transform = made(name)
    found = call(transform, batch, nets)
    assert isinstance(found, Batch) and len(found) >= len(batch) and found.inputs.isfinite().all()
    assert found.inputs.min() >= 0 and found.inputs.max() <= 1 and not found.inputs.requires_grad
    assert (found.partner is not None) == transform.makes_partners
    for net, state in zip((nets[0], nets[1].net), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for net in (nets[0], nets[1].net) for p in net.parameters())


def test_a_fresh_one_does_the_same(name: str, batch: Batch, nets) -> None:
    assert torch.equal(call(made(name), batch, nets).inputs, call(made(name), batch, nets).inputs)


def test_a_resumed_run_goes_on_alike(name: str, batch: Batch, nets) -> None:
    whole, resumed = made(name), made(name)
    call(whole, batch, nets)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert torch.equal(call(whole, batch, nets, 4).inputs, call(resumed, batch, nets, 4).inputs)


def test_it_says_what_it_needs(name: str) -> None:
    transform = made(name)
    assert transform.target == "class" and transform.progress == 0.0 and not transform.teacher_writes
    assert transform.needs_teacher or not transform.needs_net


def test_every_option_is_looked_at() -> None:
    assert set(OPTIONS) | TEXT | {"none"} == {path.stem for path in (CONF / "batch_transform").glob("[!_]*.yaml")}
