"""What every option of ``loss`` keeps: a new option file is tested by being there."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.paths import CONF
from kdlab.cli.hydra.compose import composer
from kdlab.experiment import build
from kdlab.functional import NO_LABEL, Batch, Outputs
from kdlab.losses import Objective
from kdlab.models import CifarResNet
from kdlab.models.transforms.auxiliary import Auxiliary, Exits, peers
from kdlab.tasks import Classification

TEXT = {"distilgpt2", "hidden_cosine", "uld"}
"""Losses of language models, whose layers and tokens the tests of language models have."""
OWN_STUDENT = {"simkd"}
"""Losses whose student is made of the teacher."""
OPTIONS = sorted({path.stem for path in (CONF / "loss").glob("[!_]*.yaml")} - TEXT - OWN_STUDENT)
CLASSES, ROWS = 5, 8
TASK = Classification(CLASSES)


@pytest.fixture(scope="module")
def composing() -> Iterator[Callable[[str], dict[str, Any]]]:
    with composer() as made:
        yield cache(lambda name: made.compose(["experiment=kd_resnet", f"loss=[{name}]"]).config["loss"])


def pictures(labelled: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(ROWS) // 2 % CLASSES if labelled else torch.full((ROWS,), NO_LABEL)
    return Batch(
        torch.rand(ROWS, 1, 8, 8, generator=generator),
        targets,
        torch.stack([torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)], 1),
        partner=torch.arange(ROWS) ^ 1,
    )


class Case:
    """An objective, the networks that it compares, and their answers."""

    def __init__(self, config: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.objective: Objective = build.objective(config)
        self.student, self.teacher = (
            CifarResNet(depth, num_classes=CLASSES, in_channels=1, width=4) for depth in (8, 20)
        )
        self.auxiliary = self._auxiliary()
        self.objective.setup(self.student, self.teacher, 64)
        self.objective.progress = 0.5
        with torch.no_grad():
            self.objective.prepare(*self.answers(pictures()))

    def _auxiliary(self) -> Auxiliary | None:
        kinds = {term.auxiliary for term in self.objective.terms.values()} - {""}
        example = pictures().inputs
        if "exits" in kinds:
            return Exits(self.student, ["layer1", "layer2"], example)
        if "peers" in kinds:
            return peers(self.student, lambda _: CifarResNet(8, num_classes=CLASSES, in_channels=1, width=4), count=2)
        return None

    def answers(self, batch: Batch) -> tuple[Outputs, Outputs]:
        net = self.student if self.auxiliary is None else self.auxiliary
        student = TASK.outputs(net, batch, self.objective.student_layers)
        with torch.no_grad():
            teacher = TASK.outputs(self.teacher.eval(), batch, self.objective.teacher_layers)
        teacher.heads |= {"member_0": teacher.logits, "member_1": teacher.logits.flip(0)}
        return student, teacher

    def total(self, batch: Batch, teacher: bool = True) -> Tensor:
        own, shown = self.answers(batch)
        return self.objective(own, shown if teacher else None, batch).total


@pytest.fixture(params=OPTIONS)
def case(request: pytest.FixtureRequest, composing: Callable[[str], dict[str, Any]]) -> Case:
    return Case(composing(request.param))


def gradients(case: Case) -> list[Tensor]:
    return [p.grad for p in case.student.parameters() if p.grad is not None]


def test_a_loss_teaches_the_student_and_leaves_the_teacher(case: Case) -> None:
    before = [p.detach().clone() for p in case.teacher.parameters()]
    total = case.total(pictures())
    total.backward()
    assert total.ndim == 0 and total.isfinite()
    assert all(g.isfinite().all() for g in gradients(case)) and any(g.any() for g in gradients(case))
    assert all(p.grad is None for p in case.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, case.teacher.parameters(), strict=True))
    networks = {id(p) for net in (case.student, case.teacher) for p in net.parameters()}
    assert not networks & {id(p) for p in case.objective.parameters()}, "a loss keeps no network among its parameters"


def test_rows_without_a_label_poison_nothing(case: Case) -> None:
    total = case.total(pictures(labelled=False))
    assert total.isfinite()
    if total.requires_grad:
        total.backward()
    assert all(g.isfinite().all() for g in gradients(case))


def halved(outputs: Outputs) -> Outputs:
    """The outputs as a network in half precision gives them."""
    features, heads = ({k: v.bfloat16() for k, v in d.items()} for d in (outputs.features, outputs.heads))
    return Outputs(outputs.logits.bfloat16(), features, heads)


def test_half_precision_is_finite_and_close(case: Case) -> None:
    batch = pictures()
    student, teacher = case.answers(batch)
    whole = case.objective(student, teacher, batch).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = case.objective(halved(student), halved(teacher), batch).total
    assert half.isfinite() and half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=0.2, abs=0.2)


def test_a_loss_that_needs_no_teacher_has_none(case: Case) -> None:
    if not case.objective.needs_teacher:
        assert case.total(pictures(), teacher=False).isfinite()
    else:
        assert any(term.needs_teacher for term in case.objective.terms.values())


def test_what_a_loss_learns_is_saved_and_loaded(case: Case) -> None:
    state = {name: value.clone() for name, value in case.objective.state_dict().items()}
    with torch.no_grad():
        for parameter in case.objective.parameters():
            parameter.add_(1.0)
    case.objective.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in case.objective.state_dict().items())


def test_every_option_is_looked_at() -> None:
    assert set(OPTIONS) | TEXT | OWN_STUDENT == {path.stem for path in (CONF / "loss").glob("[!_]*.yaml")}
