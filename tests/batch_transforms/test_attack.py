"""Attacks stay in their ball and do harm, and leave no trace in the student; accuracy under attack."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import curve, mistake, result, train
from kdlab.batch_transforms.attack import AttackedRows
from kdlab.data import digits
from kdlab.errors import UserError
from kdlab.functional import NO_LABEL, Batch, cross_entropy, kl
from kdlab.functional.attack import pgd
from kdlab.functional.modes import input_gradients
from kdlab.losses import KL, CrossEntropy, Objective
from kdlab.models.vision.resnet import CifarResNet
from kdlab.tasks import Classification
from kdlab.teachers import FrozenTeacher

torch.set_num_threads(1)
TASK = Classification(10)


def network(seed=0):
    torch.manual_seed(seed)
    return CifarResNet(8, width=4, in_channels=1)


def rows(count=16, labelled=16, seed=0, **options):
    gen = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (count,), generator=gen)
    targets[labelled:] = NO_LABEL
    key = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)], 1)
    return Batch(torch.rand(count, 1, 8, 8, generator=gen), targets, key, **options)


def call(source, batch, student, teacher=None, seed=0, step=0, part=0):
    return source(batch, student, teacher, TASK, seed, step, part)[0]


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


# ---- the ascent itself


def test_pgd_of_a_linear_harm_goes_to_the_corner():
    """Of a linear function the worst place in the ball is known: eps away against every sign, cut at 0 and 1."""
    gen = torch.Generator().manual_seed(0)
    slope, x = torch.randn(5, 7, generator=gen), torch.rand(5, 7, generator=gen)
    found = pgd(lambda v: (slope * v).sum(1), x, eps=0.3, steps=10, step_size=0.1)
    expected = np.clip(x.numpy() + 0.3 * np.sign(slope.numpy()), 0, 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_probing_puts_every_module_back():
    net = network()
    net.train()
    net.layer2.eval()
    modes = [module.training for module in net.modules()]
    with torch.no_grad(), input_gradients(net):
        assert not any(module.training for module in net.modules()) and torch.is_grad_enabled()
    assert [module.training for module in net.modules()] == modes
    with pytest.raises(RuntimeError), input_gradients(net):
        raise RuntimeError
    assert [module.training for module in net.modules()] == modes


# ---- the source


@pytest.mark.parametrize("against", ["labels", "teacher"])
def test_an_attack_stays_near_and_raises_what_it_is_against(against):
    student, teacher, batch = network(), FrozenTeacher(network(1), TASK), rows()
    found = call(AttackedRows(against, eps=0.1), batch, student, teacher)
    assert found.teacher_inputs is batch.inputs and found.targets is batch.targets and found.window is batch.window
    assert float((found.inputs - batch.inputs).abs().max()) <= 0.1 + 1e-6
    assert float(found.inputs.min()) >= 0 and float(found.inputs.max()) <= 1
    student.eval()
    with torch.no_grad():
        said = [student(x) for x in (batch.inputs, found.inputs)]
        shown = teacher(batch).logits
    harm = [cross_entropy(z, batch.targets) if against == "labels" else kl(z, shown) for z in said]
    assert (harm[1] > harm[0]).all(), "of every row"


@pytest.mark.parametrize("against", ["labels", "teacher"])
def test_nothing_in_student_or_teacher_moves(against):
    student, teacher, batch = network(), FrozenTeacher(network(1), TASK), rows(labelled=9)
    student.train()
    for p in student.parameters():
        p.grad = torch.full_like(p, 0.5)
    before, modes = (state(student), state(teacher.net)), [m.training for m in student.modules()]
    random = torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        call(AttackedRows(against, clean=0.2), batch, student, teacher)
    assert torch.random.get_rng_state().equal(random)
    for net, kept in zip((student, teacher.net), before, strict=True):
        assert all(value.equal(kept[name]) for name, value in net.state_dict().items())
    assert [m.training for m in student.modules()] == modes
    assert all((p.grad == 0.5).all() and p.requires_grad for p in student.parameters())
    assert all(p.grad is None for p in teacher.net.parameters())


def test_an_attack_depends_on_seed_step_and_example_alone():
    student, batch, source = network().eval(), rows(), AttackedRows(steps=2)
    first = call(source, batch, student, step=3).inputs
    assert call(AttackedRows(steps=2), batch, student, step=3).inputs.equal(first)
    assert not call(source, batch, student, step=4).inputs.equal(first)
    assert not call(source, batch, student, seed=1, step=3).inputs.equal(first)
    halves = [
        call(
            source,
            replace(batch, inputs=batch.inputs[at], targets=batch.targets[at], example_id=batch.example_id[at]),
            *(student, None, 0, 3, part),
        ).inputs
        for part, at in enumerate((slice(0, 8), slice(8, 16)))
    ]
    torch.testing.assert_close(torch.cat(halves), first, rtol=0, atol=1e-6)
    bare = replace(batch, example_id=None)
    assert not call(source, bare, student, part=0).inputs.equal(call(source, bare, student, part=1).inputs)
    assert source.state_dict() == {}


def test_a_row_without_a_label_is_attacked_against_its_own_answer():
    student = network().eval()
    with torch.no_grad():
        own = student(rows().inputs).argmax(-1)
    batch = rows(labelled=0)
    found = call(AttackedRows(), batch, student)
    assert found.inputs.equal(call(AttackedRows(), replace(batch, targets=own), student).inputs)
    assert (found.targets == NO_LABEL).all()
    soft = nn.functional.one_hot(own, 10).float()
    soft[8:] = 0
    assert call(AttackedRows(), replace(batch, targets=soft), student).inputs.equal(found.inputs)


@pytest.mark.parametrize("weighed", [False, True])
def test_clean_and_attacked_rows_weigh_what_one_row_did(weighed):
    """RSLAD's loss: 1/6 of the KL on clean rows and 5/6 on attacked ones, both against the clean teacher."""
    student, teacher = network().eval(), FrozenTeacher(network(1), TASK)
    weight = torch.rand(16, generator=torch.Generator().manual_seed(3)) if weighed else None
    batch = rows(labelled=10, weight=weight)
    found = call(AttackedRows("teacher", clean=1 / 6), batch, student, teacher)
    assert found.window == batch.count() and len(found) == 32 and found.count() == pytest.approx(found.window)
    losses = Objective({"ce": CrossEntropy(), "kl": KL()}, alpha=1.0)(
        TASK.outputs(student, found), teacher(found.clean_view()), found
    )
    with torch.no_grad():
        shown = teacher(batch).logits
        each = [kl(student(x), shown) for x in (batch.inputs, found.inputs[16:])]
    share = (torch.ones(16) if weight is None else weight) / (16 if weight is None else weight.sum())
    expected = float((share * (each[0] / 6 + 5 * each[1] / 6)).sum())
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clean", [0.0, 0.25])
def test_a_step_in_parts_is_the_whole_step(clean):
    totals = []
    for accumulate in (1, 4):
        data, student = digits(batch_size=32, labels=600), network().eval()
        data.to("cpu", accumulate=accumulate)
        objective = Objective({"ce": CrossEntropy(), "kl": KL()}, alpha=0.5)
        teacher, source, total = FrozenTeacher(network(1), TASK), AttackedRows(steps=3, clean=clean), 0.0
        for part, batch in zip(range(accumulate), data.train_dataloader(), strict=False):
            batch = call(source, batch, student, teacher, part=part)
            total += float(objective(TASK.outputs(student, batch), teacher(batch.clean_view()), batch).total.detach())
        totals.append(total / accumulate)
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"against": "nobody"}, "batch_transform.against: "),
        ({"eps": 0}, "batch_transform.eps: 0; accepted: "),
        ({"steps": 0}, "batch_transform.steps: 0; accepted: "),
        ({"step_size": -1}, "batch_transform.step_size: -1; accepted: "),
        ({"clean": 1.0}, "batch_transform.clean: 1.0; accepted: "),
    ],
)
def test_what_an_attack_refuses(options, said):
    with pytest.raises(UserError, match=said):
        AttackedRows(**options)


def test_inputs_must_be_numbers_in_the_unit_interval():
    batch = rows()
    with pytest.raises(UserError, match="stays in"):
        call(AttackedRows(), replace(batch, inputs=2 * batch.inputs), network())
    with pytest.raises(UserError, match="changes pictures or tables"):
        call(AttackedRows(), replace(batch, inputs={"x": batch.inputs}), network())


# ---- accuracy under attack


def test_robust_accuracy_of_a_linear_network_is_known():
    """Two classes by the sign of w·x + b: an attack wins where the margin is below eps times the L1 norm of w."""
    w, b, eps = torch.tensor([0.8, -0.5, 0.3]), -0.25, 0.15
    x = 0.2 + 0.6 * torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.stack([-w / 2, w / 2]))
        net.bias.copy_(torch.tensor([-b / 2, b / 2]))
    margin = x @ w + b
    y = (margin > 0).long()
    y[:20] = 1 - y[:20]
    y[20:40] = NO_LABEL

    class Held:
        def ordered_loader(self, split):
            return [Batch(x[:90], y[:90]), Batch(x[90:], y[90:])]

    task = Classification(2, {"eps": eps, "steps": 10})
    net.train().requires_grad_(False)
    found = task.further(net, Held(), "test", torch.device("cpu"))
    right = (y == (margin > 0).long()) & (margin.abs() > eps * w.abs().sum())
    assert found == {"robust_acc": pytest.approx(int(right.sum()) / 180)}
    assert 0.1 < found["robust_acc"] < 0.85 and net.training
    assert Classification(2).further(net, Held(), "test", torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({"eps": 0.1, "step": 3}, "task.attack"),
        ({"steps": 3}, "task.attack.eps: None; accepted: above 0"),
        ({"eps": 2}, "task.attack.eps: 2; accepted: "),
        ({"eps": 0.1, "steps": 0.5}, "task.attack.steps: 0.5; accepted: "),
        ({"eps": 0.1, "step_size": 0}, "task.attack.step_size: 0; accepted: "),
    ],
)
def test_what_the_measure_refuses(attack, said):
    with pytest.raises(UserError, match=said):
        Classification(10, attack)


# ---- in an experiment

WORDS = ("experiment=kd_resnet", "student=mlp", "teacher=mlp", "teacher.epochs=1", "epochs=2", "data.fraction=0.1")


@pytest.mark.parametrize(
    "words", [("loss=ard", "batch_transform=attack"), ("loss=rslad", "batch_transform=attack_teacher")]
)
def test_robust_distillation_trains_and_its_accuracy_under_attack_is_in_the_table(place, capsys, words):
    run = train(place, "robust", *WORDS, *words, "batch_transform.steps=3", "task.attack={eps: 0.1, steps: 5}")
    models = result(run)["models"]
    for model in (models["student"], models["teacher"], models["baseline"]):
        assert 0 <= model["test"]["robust_acc"] <= model["test"]["acc"]
    assert curve(run, "train/kl")[-1] < curve(run, "train/kl")[0]
    assert "robust %" in capsys.readouterr().out


def test_a_discriminator_trains_beside(place):
    run = train(place, "judged", *WORDS, "loss=[hinton,adversarial]", "baseline=false")
    assert all(0 < point < 5 for point in curve(run, "train/adversarial"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("task.attack={eps: 0.1, step: 2}",), "task.attack"),
        (("batch_transform=attack", "batch_transform.eps=0"), "batch_transform.eps: 0"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(capsys, tmp_path, words, said):
    assert mistake(capsys, ["experiment=kd_resnet", *words], tmp_path / "out").startswith(said)
