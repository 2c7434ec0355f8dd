"""Strong views of rows: what a batch becomes, what it counts, and what a student learns of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.tiny import curve, mistake, result, train
from kdlab.batch_transforms.strong_view import StrongViews
from kdlab.data import digits, synthetic
from kdlab.errors import UserError
from kdlab.functional import NO_LABEL, Batch, StepTotals
from kdlab.losses import KL, Consistency, CrossEntropy, Objective
from kdlab.tasks import Classification
from kdlab.teachers import FrozenTeacher

torch.set_num_threads(1)
STRONG = [{"randaugment": {"ops": 2}}, "cutout"]
TASK = Classification(10)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def scarce(**options):
    return digits(**{"labels": 100, "unlabelled_ratio": 3, "batch_size": 32, **options})


def parts(data, accumulate=1, steps=1):
    data.to("cpu", accumulate=accumulate)
    found = []
    for batch in data.train_dataloader():
        found.append(batch)
        if len(found) == accumulate * steps:
            return found
    raise AssertionError


def views(data, **options):
    return StrongViews(data, **{"augment": STRONG, **options})


def call(source, batch, seed=0, step=0, part=0):
    return source(batch, None, None, TASK, seed, step, part)[0]


@pytest.mark.parametrize("of", ["all", "unlabelled"])
def test_strong_rows_come_after_the_weak_ones_and_point_at_them(of):
    data = scarce()
    (batch,) = parts(data)
    found = call(views(data, of=of), batch)
    chosen = torch.arange(32) if of == "all" else (~batch.labelled).nonzero()[:, 0]
    rows = 32 + len(chosen)
    assert (
        len(found)
        == len(found.inputs)
        == len(found.partner)
        == len(found.example_id)
        == len(found.hidden_targets)
        == rows
    )
    assert found.inputs[:32].equal(batch.inputs) and found.targets[:32].equal(batch.targets)
    assert found.partner.tolist() == [-1] * 32 + chosen.tolist()
    assert (found.targets[32:] == NO_LABEL).all()
    assert found.example_id[32:].equal(batch.example_id[chosen]) and found.hidden_targets[32:].equal(
        batch.hidden_targets[chosen]
    )
    assert found.teacher_inputs.equal(torch.cat([batch.inputs, batch.inputs[chosen]])), "a teacher reads the weak view"
    assert (found.inputs[32:] != batch.inputs[chosen]).flatten(1).any(1).float().mean() > 0.9
    assert float(found.inputs.min()) >= 0 and float(found.inputs.max()) <= 1
    assert found.window == StepTotals(8.0, rows, 1, 0.0, float(len(chosen))) and found.count() == found.window


def test_a_view_depends_on_seed_of_the_run_step_and_example_alone():
    data = scarce()
    (batch,) = parts(data)
    source = views(data)
    before = torch.random.get_rng_state()
    first = call(source, batch, step=3)
    assert torch.random.get_rng_state().equal(before)
    assert call(views(data), batch, step=3, part=5).inputs.equal(first.inputs)
    assert not call(source, batch, step=4).inputs.equal(first.inputs)
    assert not call(source, batch, seed=1, step=3).inputs.equal(first.inputs)
    order = torch.randperm(32)
    turned = replace(
        batch,
        inputs=batch.inputs[order],
        targets=batch.targets[order],
        example_id=batch.example_id[order],
        hidden_targets=batch.hidden_targets[order],
    )
    assert call(source, turned, step=3).inputs[32:].equal(first.inputs[32:][order])
    assert source.state_dict() == {}


def test_instead_shows_the_strong_view_to_the_student_and_the_weak_one_to_the_teacher():
    data = scarce()
    (batch,) = parts(data)
    found = call(views(data, instead=True), batch)
    assert found.teacher_inputs is batch.inputs and found.targets is batch.targets and found.window == batch.window
    assert found.inputs.equal(call(views(data), batch).inputs[32:]) and found.partner is None
    some = call(views(data, instead=True, of="unlabelled"), batch)
    assert some.inputs[batch.labelled].equal(batch.inputs[batch.labelled])


@pytest.mark.parametrize("of", ["all", "unlabelled"])
def test_a_step_in_parts_is_the_whole_step(of):
    """The same rows in one micro-batch or in four: the same objective and the same gradient."""
    grads, totals = [], []
    for accumulate in (1, 4):
        data, student = scarce(), net()
        objective = Objective({"ce": CrossEntropy(), "c": Consistency(threshold=0.1), "kl": KL()}, alpha=0.5)
        teacher, source = FrozenTeacher(net(1), TASK), views(data, of=of)
        total = 0.0
        for part, batch in enumerate(parts(data, accumulate)):
            batch = call(source, batch, part=part)
            losses = objective(TASK.outputs(student, batch), teacher(batch.clean_view()), batch)
            (losses.total / accumulate).backward()
            total += float(losses.total) / accumulate
        totals.append(total)
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5) and totals[0] > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"of": "some"}, "batch_transform.of: "),
        ({"augment": None}, "batch_transform.augment: none"),
        ({"augment": ["sharpest"]}, "batch_transform.augment: "),
        ({"augment": [{"cutout": {"size": 99}}]}, "batch_transform.augment.cutout.size: 99"),
    ],
)
def test_what_strong_views_refuse(options, said):
    with pytest.raises(UserError, match=said):
        views(scarce(), **options)


def test_strong_views_need_pictures_that_are_examples():
    with pytest.raises(UserError, match="needs pictures"):
        views(synthetic())
    data = digits(augment=["mixup"], batch_size=32)
    with pytest.raises(UserError, match="without mixup and cutmix"):
        call(views(data), parts(data)[0])
    (batch,) = parts(scarce())
    with pytest.raises(UserError, match="have others already"):
        call(views(scarce()), replace(batch, partner=torch.full((32,), -1)))


def test_soft_targets_get_rows_without_any():
    (batch,) = parts(scarce())
    soft = nn.functional.one_hot(batch.hidden_targets, 10).float()
    found = call(views(scarce()), Batch(batch.inputs, soft, batch.example_id))
    assert found.targets.shape == (64, 10) and found.labelled.tolist() == [True] * 32 + [False] * 32


# ---- in an experiment

WORDS = ("experiment=fixmatch", "student=mlp", "epochs=3", "data.fraction=0.3", "data.labels=60", "baseline=false")


@pytest.mark.parametrize("loss", ["fixmatch", "uda"])
def test_a_student_learns_to_agree_with_itself(place, loss):
    run = train(place, f"agree_{loss}", *WORDS, f"loss={loss}", "loss.terms.consistency.threshold=0.3")
    points = curve(run, "train/consistency")
    assert points and all(point >= 0 for point in points) and max(points) > 0
    assert result(run)["models"]["teacher"] is None


def test_a_teacher_may_teach_beside(place):
    words = (
        "method=semi_supervised_kd",
        "teacher=mlp",
        "teacher.epochs=1",
        "loss=[hinton,fixmatch]",
        "temperature=none",
    )
    run = train(place, "agree_taught", *WORDS, *words)
    assert curve(run, "train/kl")[-1] < curve(run, "train/kl")[0] and curve(run, "train/consistency")
    assert "since batch_transform makes rows that nobody has seen before" in (run / "run.log").read_text()


def test_noise_is_for_the_student_alone(place):
    run = train(
        place,
        "noise",
        *WORDS,
        "method=semi_supervised_kd",
        "teacher=mlp",
        "teacher.epochs=1",
        "loss=hinton",
        "batch_transform=noise",
    )
    assert curve(run, "train/kl")[-1] < curve(run, "train/kl")[0]


def test_what_learns_from_more_than_labels_has_a_baseline(place):
    words = [word for word in WORDS if word != "baseline=false"]
    found = result(train(place, "agree_baseline", *words, "epochs=1"))["models"]
    assert found["baseline"] is not None and found["baseline"]["parameters"] == found["student"]["parameters"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("batch_transform=none",),
            "loss.terms.consistency: compares two views of a row; accepted: with batch_transform=strong_view",
        ),
        (
            ("batch_transform=noise",),
            "loss.terms.consistency: compares two views of a row, and batch_transform shows one",
        ),
        (("data=synthetic", "batch_transform=strong_view"), "batch_transform.augment: randaugment needs pictures"),
        (("batch_transform.augment=[sharpest]",), "batch_transform.augment: "),
        (
            ("loss=ce", "batch_transform=dafl"),
            "batch_transform: GeneratedRows asks a teacher, and no network teaches; accepted: teacher=",
        ),
        (("loss=ce", "batch_transform=attack_teacher"), "batch_transform: AttackedRows asks a teacher"),
        (
            ("method=snapshot", "teacher=resnet20", "loss=balanced", "batch_transform=dafl"),
            "batch_transform: GeneratedRows asks a teacher, and no network teaches",
        ),
        (
            ("loss=ce", "data=synthetic", "batch_transform=dafl"),
            "batch_transform: makes pictures, and data is no set of them",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(capsys, tmp_path, words, said):
    assert mistake(capsys, ["experiment=fixmatch", "student=mlp", *words], tmp_path / "out").startswith(said)
