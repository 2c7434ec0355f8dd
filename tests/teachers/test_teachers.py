"""Frozen, ensemble and moving teachers: what they answer, what they never change, how they resume."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Projected
from kdlab.tasks import Classification
from kdlab.teachers import EMATeacher, EnsembleTeacher, FrozenTeacher, SnapshotTeacher, Teacher
from kdlab.teachers import teacher as teachers

torch.set_num_threads(1)
C = 4


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, C))


def batch(rows=5, seed=0):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    return Batch(x, torch.arange(rows) % C, torch.stack([torch.arange(rows), torch.zeros(rows).long()], 1))


def task():
    return Classification(C)


def saved(state):
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Says(Teacher):
    def __init__(self, logits):
        self.logits = logits

    def __call__(self, batch, split="train"):
        return None if self.logits is None else Outputs(self.logits)


# ---- frozen ----------------------------------------------------------------------------------------------------------


def test_a_frozen_teacher_never_changes():
    net, student = network(), network(1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    teacher = FrozenTeacher(net, task(), layers=["0"])
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    first = teacher(batch())

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher, self.borrowed = student, teacher, net[1]

    parent = Parent()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(3):
        parent.train()  # puts the borrowed BatchNorm, and so a part of the teacher, in train mode
        said = teacher(batch(seed=step))
        loss = (parent.student(batch(seed=step).inputs) - said.logits).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(teacher(batch()).logits, first.logits)
    assert not any(m.training for m in net.modules())


def test_a_frozen_teacher_answers_in_eval_mode_without_gradient():
    net = network()
    teacher = FrozenTeacher(net, task(), layers=["0", "2"])
    net.train()
    out = teacher(batch())
    net.eval()
    torch.testing.assert_close(out.logits, net(batch().inputs), rtol=0, atol=0)
    assert list(out.features) == ["0", "2"] and torch.equal(out.features["0"], net[0](batch().inputs))
    assert not any(t.requires_grad for t in (out.logits, *out.features.values()))
    assert not any(m._forward_hooks for m in net.modules())
    assert teacher.state_dict() == {}


def test_a_teacher_is_no_part_of_a_modules_state():
    import lightning.pytorch as pl

    for base in (nn.Module, pl.LightningModule):

        class Holder(base):
            def __init__(self):
                super().__init__()
                self.student = network(1)
                self.teacher = FrozenTeacher(network(), task())
                self.ensemble = EnsembleTeacher([self.teacher])
                self.ema = EMATeacher(task())
                self.ema.update(self.student, 0, 1, step_done=False)

        holder = Holder()
        assert all(k.startswith("student.") for k in holder.state_dict())
        assert len(list(holder.parameters())) == len(list(holder.student.parameters()))
        holder.train()
        assert not holder.teacher.net.training and not holder.ema.net.training


def test_an_unknown_layer_of_a_teacher():
    with pytest.raises(UserError, match="unknown layer '0x'"):
        FrozenTeacher(network(), task(), layers=["0x"])(batch())


def test_a_teacher_that_does_not_answer_says_so():
    with pytest.raises(TypeError, match="define __call__"):
        Teacher()(batch())
    bare = Teacher()
    bare.update(network(), 0, 1, True)
    bare.restore({}, network())
    assert bare.to(torch.device("cpu")) is bare and bare.state_dict() == {} and bare.describe() == "Teacher"


# ---- ensemble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [1, 2, 5], [0.0, 1.0, 3.0]])
def test_an_ensemble_is_the_mean_of_probabilities(weights):
    logits = [3 * torch.randn(5, C, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    out = EnsembleTeacher([Says(z) for z in logits], weights)(batch())
    share = np.array(weights or [1, 1, 1], float)
    p = [np.exp(z.double().numpy()) / np.exp(z.double().numpy()).sum(-1, keepdims=True) for z in logits]
    mean = sum(w * x for w, x in zip(share / share.sum(), p, strict=True))
    np.testing.assert_allclose(out.logits.double().exp().numpy(), mean, rtol=1e-5)


def test_an_ensemble_of_one_and_of_masked_members():
    z = torch.randn(5, C)
    torch.testing.assert_close(EnsembleTeacher([Says(z)])(batch()).logits.softmax(-1), z.softmax(-1))
    masked = torch.tensor([[1.0, 2.0, 0.0, -torch.inf]])
    out = EnsembleTeacher([Says(masked), Says(masked + 1)], [1, 3])(batch()).logits
    torch.testing.assert_close(out.softmax(-1), masked.softmax(-1))
    assert EnsembleTeacher([Says(z.half())])(batch()).logits.dtype == torch.float32


@pytest.mark.parametrize("projected", [True, False])
def test_an_ensemble_makes_some_rows_of_one_member_at_a_time(monkeypatch, projected):
    rows, made = 11, []
    monkeypatch.setattr(teachers, "AT_ONCE", 3 * C + 1)
    dense = teachers.dense

    def spy(logits):
        made.append(tuple(logits.shape))
        return dense(logits)

    monkeypatch.setattr(teachers, "dense", spy)
    draw = torch.Generator().manual_seed(0)
    heads = [(torch.randn(rows, 5, generator=draw), torch.randn(C, 5, generator=draw)) for _ in range(3)]
    logits = [hidden @ weight.T for hidden, weight in heads]
    given = [Projected(*head) for head in heads] if projected else logits
    out = EnsembleTeacher([Says(one) for one in given], [1, 2, 5])(batch(rows)).logits
    expected = sum(w / 8 * z.double().softmax(-1) for w, z in zip([1, 2, 5], logits, strict=True))
    torch.testing.assert_close(out.double().exp(), expected, rtol=1e-5, atol=1e-7)
    assert out.shape == (rows, C) and made == [(3, C), (3, C), (3, C), (2, C)] * 3
    assert EnsembleTeacher([Says(given[0][:0])])(batch(0)).logits.shape == (0, C)


def test_members_that_do_not_teach_yet_are_left_out():
    z = torch.randn(5, C)
    out = EnsembleTeacher([Says(None), Says(z)], [3, 1])(batch())
    torch.testing.assert_close(out.logits.softmax(-1), z.softmax(-1))
    assert EnsembleTeacher([Says(None)])(batch()) is None


def test_an_ensemble_passes_on_what_its_moving_members_need():
    student = network()
    ensemble = EnsembleTeacher([FrozenTeacher(network(1), task()), EMATeacher(task(), 0.5)])
    assert EnsembleTeacher([FrozenTeacher(network(1), task())]).state_dict() == {}
    ensemble.update(student, 0, 1, step_done=False)
    ensemble.update(student, 0, 1, step_done=True)
    assert ensemble.members[1].net is not None and ensemble.members[1].steps == 1
    again = EnsembleTeacher([FrozenTeacher(network(1), task()), EMATeacher(task(), 0.5)])
    again.restore(saved(ensemble.state_dict()), network(7))
    assert torch.equal(again(batch()).logits, ensemble(batch()).logits) and again.members[1].steps == 1


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_wrong_ensembles_are_refused(weights):
    with pytest.raises(UserError, match=r"teacher\.weights.*2 numbers"):
        EnsembleTeacher([Says(None), Says(None)], weights)
    with pytest.raises(UserError, match="at least one member"):
        EnsembleTeacher([])


# ---- running average -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_ema_is_the_recursion(decay):
    student, teacher = network(), EMATeacher(task(), decay)
    assert teacher(batch()) is None
    teacher.update(student, 0, 1, step_done=False)
    assert teacher.net is not student
    expected = {k: p.detach().double().numpy().copy() for k, p in student.named_parameters()}
    for n in range(12):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
            student[1].running_mean.normal_()
            student[1].num_batches_tracked += 1
        teacher.update(student, 0, 1, step_done=True)
        d = min(decay, (1 + n) / (10 + n))
        for k, p in student.named_parameters():
            expected[k] = d * expected[k] + (1 - d) * p.detach().double().numpy()
        teacher.update(student, n, 12, step_done=False)  # the start of an epoch changes nothing
    for k, p in teacher.net.named_parameters():
        np.testing.assert_allclose(p.double().numpy(), expected[k], rtol=1e-4, atol=1e-6)
    for own, theirs in zip(teacher.net.buffers(), student.buffers(), strict=True):
        assert torch.equal(own, theirs)
    assert not teacher.net.training and not any(p.requires_grad for p in teacher.net.parameters())
    assert student.training and all(p.requires_grad for p in student.parameters())


def test_ema_resumes_as_if_never_stopped():
    straight, student = EMATeacher(task(), 0.9), network()
    straight.update(student, 0, 1, False)
    resumed = None
    for step in range(6):
        if step == 3:
            resumed = EMATeacher(task(), 0.9)
            resumed.restore(saved(straight.state_dict()), copy.deepcopy(student))
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(0.9)
        straight.update(student, 0, 1, True)
        if resumed:
            resumed.update(student, 0, 1, True)
    assert resumed.steps == straight.steps == 6
    for a, b in zip(resumed.net.state_dict().values(), straight.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(resumed(batch()).logits, straight(batch()).logits)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_wrong_decay_is_refused(decay):
    with pytest.raises(UserError, match=f"method.decay: {decay}"):
        EMATeacher(task(), decay)


# ---- snapshots -------------------------------------------------------------------------------------------------------


def snapshots(teacher, epochs):
    """Which epoch's student answers in each epoch; None for nobody."""
    student, course = network(), []
    for epoch in range(epochs):
        with torch.no_grad():
            student[4].bias.fill_(float(epoch))
        teacher.update(student, epoch, epochs, step_done=False)
        with torch.no_grad():
            student[4].bias.fill_(-1.0)
        teacher.update(student, epoch, epochs, step_done=True)
        course.append(None if teacher(batch()) is None else int(teacher.net[4].bias[0]))
    return course


@pytest.mark.parametrize(
    ("begin", "every", "epochs", "expected"),
    [
        (0.5, None, 6, [None, None, None, 3, 3, 3]),
        (0.5, 2, 8, [None] * 4 + [4, 4, 6, 6]),
        (0.5, 2, 6, [None, None, None, 3, 3, 5]),
        (0.25, 1, 4, [None, 1, 2, 3]),
        (0.01, None, 4, [None, 1, 1, 1]),
        (0.5, 3, 2, [None, 1]),
    ],
)
def test_snapshots_are_taken_at_their_marks(begin, every, epochs, expected):
    assert snapshots(SnapshotTeacher(task(), begin, every), epochs) == expected


def test_snapshot_state_round_trip():
    teacher, student = SnapshotTeacher(task(), 0.5), network()
    assert teacher.state_dict() == {}
    fresh = SnapshotTeacher(task(), 0.5)
    fresh.restore({}, student)
    assert fresh(batch()) is None
    teacher.update(student, 1, 2, step_done=False)
    fresh.restore(saved(teacher.state_dict()), network(5))
    assert torch.equal(fresh(batch()).logits, teacher(batch()).logits)
    assert not fresh.net.training and not any(p.requires_grad for p in fresh.net.parameters())


@pytest.mark.parametrize(
    ("given", "says"), [({"begin": 0}, "begin: 0"), ({"begin": 1.0}, "begin: 1.0"), ({"every": 0}, "every: 0")]
)
def test_wrong_snapshots_are_refused(given, says):
    with pytest.raises(UserError, match=f"method.{says}"):
        SnapshotTeacher(task(), **given)
