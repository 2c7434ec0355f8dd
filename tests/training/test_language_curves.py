"""Training curves of steps that not every term counts in: labels, the student's own text, a teacher that comes late."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from kdlab.errors import RunFailed
from kdlab.functional import Batch, Outputs, StepTotals
from kdlab.losses import KL, CrossEntropy, Objective
from kdlab.methods.method import TermAccumulator

torch.set_num_threads(1)
ONE = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
ROWS, CLASSES = 6, 7
NAMES = ["ce", "kl"]


def draw(seed):
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed))


def step(curves, objective, seed, labels, parts=1, teacher=True):
    """One optimizer step of some micro-batches; the mean of each term over its rows."""
    student, other = draw(seed), draw(seed + 100)
    targets = torch.full((ROWS,), -100) if not labels else torch.arange(ROWS)
    window = StepTotals(float(ROWS if labels else 0), float(ROWS), parts)
    for rows in torch.arange(ROWS).chunk(parts):
        batch = Batch(torch.zeros(len(rows), 1), targets[rows], weight=torch.ones(len(rows)), window=window)
        losses = objective(Outputs(student[rows]), Outputs(other[rows]) if teacher else None, batch)
        curves.add(losses.total, losses.values, losses.counted, parts, {})
    nats = -student.log_softmax(-1)
    p = other.softmax(-1)
    ce = nats[torch.arange(ROWS), torch.arange(ROWS)].mean()
    return {"ce": float(ce), "kl": float((p * (p.log() + nats)).sum(-1).mean())}


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("parts", [1, 3])
def test_steps_without_labels_do_not_dilute_the_loss_on_labels(parts):
    curves, objective = TermAccumulator(NAMES, 10 * parts), Objective({"ce": CrossEntropy(), "kl": KL()}, alpha=0.5)
    labels = [True, False, False, True, False]
    steps = [step(curves, objective, seed, known, parts) for seed, known in enumerate(labels)]
    found = curves.take(5, parts, ONE)
    assert found["ce"] == pytest.approx(mean([s["ce"] for s, known in zip(steps, labels, strict=True) if known]))
    assert found["kl"] == pytest.approx(mean([s["kl"] for s in steps]))
    totals = [(s["ce"] * known + s["kl"]) / 2 for s, known in zip(steps, labels, strict=True)]
    assert found["loss"] == pytest.approx(mean(totals), rel=1e-5)

    own = step(curves, objective, 9, False, parts)  # what was taken is forgotten
    found = curves.take(6, parts, ONE)
    assert "ce" not in found and found["kl"] == pytest.approx(own["kl"])
    assert curves.take(6, parts, ONE) == {}


def test_steps_before_there_is_a_teacher_do_not_dilute_the_divergence():
    curves, objective = TermAccumulator(NAMES, 10), Objective({"ce": CrossEntropy(), "kl": KL()}, alpha=0.5)
    steps = [step(curves, objective, seed, True, teacher=seed > 2) for seed in range(4)]
    found = curves.take(4, 1, ONE)
    assert found["kl"] == pytest.approx(steps[3]["kl"]) and found["ce"] == pytest.approx(mean([s["ce"] for s in steps]))


def test_processes_weigh_by_what_they_count():
    """One process's step has labels, the other's has none; both report the same."""
    objective = Objective({"ce": CrossEntropy(), "kl": KL()})
    both, told = [TermAccumulator(NAMES, 10) for _ in range(2)], []
    first = [step(both[0], objective, seed, True) for seed in range(2)]
    second = [step(both[1], objective, 5 + seed, seed == 0) for seed in range(2)]
    for curves in both:
        curves.take(2, 1, SimpleNamespace(reduce=lambda tensor, reduce_op: told.append(tensor) or tensor))
    for seed in range(2):
        step(both[0], objective, seed, True)
    found = both[0].take(2, 1, SimpleNamespace(reduce=lambda tensor, reduce_op: torch.stack(told).mean(0)))
    assert found["ce"] == pytest.approx(mean([first[0]["ce"], first[1]["ce"], second[0]["ce"]]))
    assert found["kl"] == pytest.approx(mean([s["kl"] for s in (*first, *second)]))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_found_whether_it_counts_or_not(counted, broken):
    curves = TermAccumulator(NAMES, 10)
    for _ in range(2):
        curves.add(torch.tensor(1.0), torch.tensor([0.0, 1.0]), (False, True), 1, {})
    curves.add(torch.tensor(1.0), torch.tensor([broken, 1.0]), (counted, True), 1, {})
    curves.add(torch.tensor(1.0), torch.tensor([1.0, 1.0]), (True, True), 1, {})
    with pytest.raises(RunFailed, match=rf"the loss is not finite at step 43: ce = {broken:g};"):
        curves.take(44, 1, ONE)
    curves = TermAccumulator(NAMES, 10)
    curves.add(torch.tensor(broken), torch.tensor([0.0, 1.0]), (False, True), 1, {})
    with pytest.raises(RunFailed, match=rf"the loss is not finite at step 7: loss = {broken:g};"):
        curves.take(7, 1, ONE)


def test_a_broken_network_is_found_in_a_step_without_labels():
    curves, objective = TermAccumulator(NAMES, 10), Objective({"ce": CrossEntropy(), "kl": KL()})
    step(curves, objective, 0, True)
    batch = Batch(torch.zeros(1, 1), torch.tensor([-100]), window=StepTotals(0.0, 1.0))
    losses = objective(Outputs(torch.full((1, CLASSES), math.nan)), Outputs(torch.zeros(1, CLASSES)), batch)
    assert losses.counted == (False, True)
    curves.add(losses.total, losses.values, losses.counted, 1, {})
    with pytest.raises(RunFailed, match=r"not finite at step 2: .*kl = nan"):
        curves.take(2, 1, ONE)


def test_a_step_does_not_wait_for_the_device():
    """A tensor of the meta device has no value to wait for: reading one raises."""
    curves = TermAccumulator(NAMES, 4)
    total, values = torch.zeros((), device="meta"), torch.zeros(2, device="meta")
    with pytest.raises(RuntimeError):
        total.item()
    for _ in range(4):
        curves.add(total, values, (False, True), 2, {})
    assert curves.full
