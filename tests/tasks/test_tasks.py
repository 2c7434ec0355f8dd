"""Classification: how a network is run, and every measure against NumPy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs
from kdlab.tasks import Classification, ClassMeasures

torch.set_num_threads(1)


def draw(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(student, labels, teacher=None):
    """Every measure from its definition, over all rows at once."""
    s = student.double().numpy()
    p, y, rows = softmax(s), np.asarray(labels), np.arange(len(labels))
    first = s.argmax(-1)
    found = {"acc": (first == y).mean(), "ce": -np.log(p[rows, y]).mean()}
    confidence, found["ece"] = p.max(-1), 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            found["ece"] += inside.mean() * abs((first == y)[inside].mean() - confidence[inside].mean())
    if s.shape[1] > 5:
        found["acc5"] = np.mean([label in np.argsort(-z)[:5] for z, label in zip(s, y, strict=True)])
    if teacher is not None:
        t = teacher.double().numpy()
        q = softmax(t)
        found["agreement"] = (first == t.argmax(-1)).mean()
        found["kl"] = (q * np.log(q / p)).sum(-1).mean()
    return found


def measured(student, targets, teacher=None, sizes=(7, 20, 1, 36)):
    measures, at = ClassMeasures(student.shape[1]), 0
    for size in sizes:
        rows = slice(at, at + size)
        said = None if teacher is None else Outputs(teacher[rows])
        measures.update(Outputs(student[rows]), said, Batch(torch.zeros(size, 1), targets[rows]))
        at += size
    assert at == len(student) == measures.rows
    return measures.compute()


@pytest.mark.parametrize("classes", [2, 5, 6, 10])
@pytest.mark.parametrize("taught", [False, True])
def test_measures_against_numpy(classes, taught):
    s, t = draw(64, classes), draw(64, classes, seed=1) if taught else None
    labels = torch.randint(classes, (64,), generator=torch.Generator().manual_seed(2))
    found, expected = measured(s, labels, t), reference(s, labels, t)
    assert set(found) == set(expected) and all(isinstance(v, float) for v in found.values())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    # batches of other sizes are the same split
    assert measured(s, labels, t, (64,)) == pytest.approx(found, rel=1e-5, abs=1e-6)


def test_measures_read_soft_targets_and_half_precision():
    s, labels = draw(64, 7), torch.arange(64) % 7
    soft = 0.7 * torch.eye(7)[labels] + 0.3 / 7
    assert measured(s, soft) == pytest.approx(measured(s, labels))
    half = s.half()
    assert measured(half, labels, half) == pytest.approx(
        reference(half.float(), labels, half.float()), rel=1e-3, abs=1e-6
    )


@pytest.mark.parametrize("classes", [4, 7])
@pytest.mark.parametrize("soft", [False, True])
def test_rows_without_a_label_count_for_the_agreement_alone(classes, soft):
    s, t, labels = draw(64, classes), draw(64, classes, seed=1), torch.arange(64) % classes
    known = torch.arange(64) % 3 == 0
    known[20:27] = False  # so that one whole batch below has none
    targets = torch.where(known, labels, -100)
    if soft:
        targets = torch.eye(classes)[labels] * known[:, None]
    found = measured(s, targets, t, sizes=(20, 7, 37))
    expected = reference(s[known], labels[known])
    expected |= {k: v for k, v in reference(s, labels, t).items() if k in ("kl", "agreement")}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_student_that_broke_on_some_rows_does_not_look_fine():
    s, labels = draw(64, 4), torch.arange(64) % 4
    s[3] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured(s, labels, draw(64, 4, seed=1))
    assert math.isnan(found["ce"]) and math.isnan(found["kl"])


def test_a_perfect_student_and_one_that_is_its_teacher():
    labels = torch.arange(64) % 6
    found = measured(100 * torch.eye(6)[labels], labels, 100 * torch.eye(6)[labels])
    assert found == pytest.approx({"acc": 1, "acc5": 1, "ce": 0, "ece": 0, "kl": 0, "agreement": 1}, abs=1e-6)


def test_kl_is_at_temperature_one_of_the_student_from_the_teacher():
    s, t = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    found = measured(s, torch.tensor([0]), t, sizes=(1,))
    assert found["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)


def test_fresh_measures_each_pass():
    task = Classification(6)
    first = task.measures()
    first.update(Outputs(draw(3, 6)), Outputs(draw(3, 6)), Batch(torch.zeros(3, 1), torch.tensor([0, 1, 2])))
    assert task.measures().rows == 0 and not task.measures().compared
    assert task.score == "acc" and task.num_classes == 6


# ---- running a network -----------------------------------------------------------------------------------------------


def test_outputs_of_a_network_and_its_layers():
    net, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), draw(4, 3)
    task, batch = Classification(2), Batch(x, torch.zeros(4).long())
    out = task.outputs(net, batch)
    assert torch.equal(out.logits, net(x)) and out.features == {} and out.logits.requires_grad
    tapped = task.outputs(net, batch, (name for name in ("0", "1")))
    assert torch.equal(tapped.features["0"], net[0](x)) and list(tapped.features) == ["0", "1"]
    tapped.features["0"].sum().backward()
    assert net[0].weight.grad is not None
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(UserError, match="unknown layer 'nope'"):
        task.outputs(net, batch, ["nope"])
