"""Rows made without data: the same at the same place in training, exact over a resume, no trace in the networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers.tiny import checkpoint, curve, result, train
from kdlab.batch_transforms.data_free import GeneratedRows, InvertedRows
from kdlab.errors import UserError
from kdlab.functional import NO_LABEL, Batch, StepTotals, kl
from kdlab.models.vision.resnet import CifarResNet
from kdlab.tasks import Classification
from kdlab.teachers import EnsembleTeacher, FrozenTeacher

torch.set_num_threads(1)
TASK = Classification(10)
PLACE = {"in_channels": 1, "image_size": [8, 8]}
SMALL = {"latent": 8, "width": 8, "rows": 16}


def network(seed=0):
    torch.manual_seed(seed)
    net = CifarResNet(8, width=4, in_channels=1)
    net(torch.rand(64, 1, 8, 8))  # statistics that are not those of the start
    return net


def make(kind):
    if kind == "inversion":
        return InvertedRows(**PLACE, num_classes=10, pool=24, rows=16, steps=3)
    return GeneratedRows(**PLACE, **SMALL, goal=kind, every=2 if kind == "zskt" else 1)


KINDS = ["dafl", "zskt", "inversion"]


def batch(rows=12, labelled=5, **options):
    targets = torch.arange(rows) % 10
    targets[labelled:] = NO_LABEL
    return Batch(
        torch.rand(rows, 1, 8, 8, generator=torch.Generator()),
        targets,
        torch.zeros(rows, 2, dtype=torch.int64),
        **options,
    )


def shown(source, student, teacher, steps, start=0, parts=1):
    """The inputs of some steps, one micro-batch after the other."""
    return [
        source(batch(), student, teacher, TASK, 0, step, part)[0].inputs
        for step in range(start, start + steps)
        for part in range(parts)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_replaced_wholly(kind):
    given = batch(hidden_targets=torch.zeros(12, dtype=torch.int64), window=StepTotals(9.0, 30.0, 2))
    found, _ = make(kind)(given, network(), FrozenTeacher(network(1), TASK), TASK, 0, 0, 1)
    assert found.inputs.shape == (12, 1, 8, 8) and not found.inputs.requires_grad
    assert 0 <= float(found.inputs.min()) < float(found.inputs.max()) <= 1
    assert (
        (found.targets == NO_LABEL).all()
        and found.example_id is None
        and found.hidden_targets is None
        and found.teacher_inputs is None
    )
    assert found.window == StepTotals(0.0, 30.0, 2)
    other = Batch(torch.zeros(12, 1, 8, 8), torch.zeros(12, dtype=torch.int64))
    again, _ = make(kind)(other, network(), FrozenTeacher(network(1), TASK), TASK, 0, 0, 1)
    assert again.inputs.equal(found.inputs), "nothing of the data's own rows is used"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_place_in_training_shows_the_same_rows_also_after_a_resume(kind):
    student, teacher = network(), FrozenTeacher(network(1), TASK)
    source = make(kind)
    first = shown(source, student, teacher, 3, parts=2)
    kept = torch.load(_saved(source), weights_only=True)
    rest = shown(source, student, teacher, 3, start=3, parts=2)
    again = make(kind)
    assert all(a.equal(b) for a, b in zip(shown(again, student, teacher, 3, parts=2), first, strict=True))
    fresh = make(kind)
    assert fresh.state_dict() == {}
    fresh.load_state_dict(kept)
    assert fresh.state_dict().keys() == kept.keys(), "a checkpoint before the next step keeps it"
    assert all(a.equal(b) for a, b in zip(shown(fresh, student, teacher, 3, start=3, parts=2), rest, strict=True))
    assert not first[0].equal(first[1]) and not first[0].equal(first[2])


def _saved(source):
    import io

    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_student_or_teacher_moves(kind):
    student, teacher = network().train(), FrozenTeacher(network(1), TASK)
    for p in student.parameters():
        p.grad = torch.full_like(p, 0.5)
    kept = [{k: v.clone() for k, v in net.state_dict().items()} for net in (student, teacher.net)]
    modes, random = [m.training for m in student.modules()], torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        shown(make(kind), student, teacher, 2)
    assert torch.random.get_rng_state().equal(random)
    for net, before in zip((student, teacher.net), kept, strict=True):
        assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in student.modules()] == modes
    assert all((p.grad == 0.5).all() and p.requires_grad for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.net.parameters())
    assert not any(module._forward_pre_hooks for module in teacher.net.modules())


def test_dafls_loss_is_the_papers():
    teacher = network(1).eval()
    x = torch.rand(16, 1, 8, 8)
    source = GeneratedRows(**PLACE, **SMALL, one_hot=0.7, activation=0.2, entropy=3.0)
    found = float(source._loss(x, network(), teacher, TASK).detach())
    features = {}
    teacher.fc.register_forward_pre_hook(lambda m, given: features.update(f=given[0]))
    with torch.no_grad():
        z = teacher(x).double()
    p = z.exp() / z.exp().sum(1, keepdim=True)
    one_hot = -sum(math.log(float(row.max())) for row in p) / 16
    activation = -float(features["f"].abs().double().mean())
    mean = p.mean(0)
    entropy = float((mean * mean.log()).sum())
    assert found == pytest.approx(0.7 * one_hot + 0.2 * activation + 3 * entropy, rel=1e-5)


@pytest.mark.parametrize("goal", ["dafl", "zskt"])
def test_the_generator_gets_better_at_its_goal(goal):
    student, teacher = network().eval(), FrozenTeacher(network(1), TASK)
    source = GeneratedRows(**PLACE, **SMALL, goal=goal, lr=0.01)
    found = [float(source(batch(), student, teacher, TASK, 0, step, 0)[1]["generator"]) for step in range(40)]
    assert sum(found[-5:]) < sum(found[:5])
    if goal == "zskt":
        rows = source(batch(64), student, teacher, TASK, 0, 40, 0)[0].inputs
        fresh = GeneratedRows(**PLACE, **SMALL, goal=goal, lr=1e-9)(batch(64), student, teacher, TASK, 0, 0, 0)[
            0
        ].inputs
        with torch.no_grad():
            apart = [float(kl(student(x), teacher.net(x)).mean()) for x in (rows, fresh)]
        assert apart[0] > apart[1]


def test_inversion_matches_the_statistics_and_the_classes():
    teacher = FrozenTeacher(network(1), TASK)

    def differs(x):
        gaps = []

        def look(m, given):
            gaps.append(float((given[0].mean((0, 2, 3)) - m.running_mean).norm()))

        norms = [m for m in teacher.net.modules() if isinstance(m, nn.BatchNorm2d)]
        handles = [m.register_forward_pre_hook(look) for m in norms]
        with torch.no_grad():
            loss = nn.functional.cross_entropy(teacher.net(x), torch.arange(len(x)) % 10)
        for handle in handles:
            handle.remove()
        return sum(gaps), float(loss)

    pools = []
    for steps in (1, 60):
        source = InvertedRows(**PLACE, num_classes=10, pool=40, rows=40, steps=steps)
        source(batch(), network(), teacher, TASK, 0, 0, 0)
        pools.append(differs(source.pool))
    assert pools[1][0] < pools[0][0] and pools[1][1] < pools[0][1]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: GeneratedRows(**PLACE, goal="gan"), "batch_transform.goal: "),
        (lambda: GeneratedRows(**PLACE, rows=1), "batch_transform.rows: 1; accepted: "),
        (lambda: GeneratedRows(**PLACE, lr=0), "batch_transform.lr: 0; accepted: "),
        (lambda: GeneratedRows(**PLACE, entropy=-1), "batch_transform.entropy: -1; accepted: "),
        (lambda: InvertedRows(**PLACE, num_classes=10, steps=0), "batch_transform.steps: 0; accepted: "),
        (lambda: GeneratedRows(), "batch_transform: makes pictures"),
    ],
)
def test_what_they_refuse(made, said):
    with pytest.raises(UserError, match=said):
        made()


def test_a_live_network_must_teach():
    ensemble = EnsembleTeacher([FrozenTeacher(network(1), TASK)])
    with pytest.raises(UserError, match="no network teaches live"):
        make("dafl")(batch(), network(), ensemble, TASK, 0, 0, 0)
    plain = FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), TASK)
    with pytest.raises(UserError, match="the teacher has none"):
        make("inversion")(batch(), network(), plain, TASK, 0, 0, 0)


@pytest.mark.parametrize("size", [[7, 9], [8, 8], [5, 4]])
def test_pictures_have_the_size_that_is_asked_for(size):
    torch.manual_seed(0)
    teacher = FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], 10)), TASK)
    source = GeneratedRows(in_channels=3, image_size=size, **SMALL)
    found, _ = source(batch(), teacher.net, teacher, TASK, 0, 0, 0)
    assert found.inputs.shape == (12, 3, *size)


# ---- in an experiment

WORDS = ("experiment=data_free", "teacher=resnet8_w4", "teacher.epochs=1", "data.fraction=0.1", "baseline=false")
QUICK = {
    "dafl": (),
    "zskt": (),
    "inversion": ("batch_transform.pool=64", "batch_transform.rows=64", "batch_transform.steps=5"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_learns_without_data(place, kind):
    run = train(place, f"no_data_{kind}", *WORDS, f"batch_transform={kind}", *QUICK[kind], "epochs=2")
    points = curve(run, "train/kl")
    assert points and all(map(math.isfinite, points)) and not curve(run, "train/ce")
    assert result(run)["models"]["student"]["test"]["acc"] >= 0
    assert bool(curve(run, "train/generator")) == (kind != "inversion")
    assert checkpoint(run)["batches"].keys() == ({"pool"} if kind == "inversion" else {"net", "optimizer", "last"})
