"""Several tasks at once: labels, heads, terms, teachers, measures, and what the command line makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.tiny import curve, mistake, result, stop_and_go, train, weights, write_cifar
from kdlab.cli.main import main
from kdlab.data import cifar100, csv, digits
from kdlab.data.labels import combine_labels
from kdlab.errors import UserError
from kdlab.functional import NO_LABEL, Batch, Outputs
from kdlab.losses import KL, OFA, SRRL, USKD, CrossEntropy, Hint, Objective
from kdlab.models import MLP, CifarResNet, Heads, freeze, load_weights, save_weights
from kdlab.tasks import Classification
from kdlab.teachers import EnsembleTeacher, FrozenTeacher, TasksTeacher

BOTH = ["digit", "parity"]
WORDS = ["experiment=several_tasks", "epochs=2", "data.fraction=0.2", "logger=none"]
KNOWS_DIGITS = "{data: {label: digit}}"
TEACHER_DEFAULTS = [*WORDS, "teacher.epochs=1"]
LAYERS = ["loss.terms.hint.student_layer=net.layer2", "loss.terms.hint.teacher_layer=net.layer2"]


def test_a_row_has_the_labels_of_all_tasks_or_of_none():
    data = digits(label=BOTH, labels=100, seed=0)
    assert data.network_kwargs["tasks"] == {"digit": 10, "parity": 2} and data.num_classes == 10
    assert data.counts == {"train": 1200, "labelled": 100, "val": 237, "test": 360}
    seen = 0
    for batch in data.train_dataloader():
        assert list(batch.tasks) == BOTH and torch.equal(batch.tasks["digit"], batch.targets)
        known = batch.labelled
        assert torch.equal(batch.tasks["parity"][known], batch.targets[known] % 2)
        assert (batch.tasks["parity"][~known] == NO_LABEL).all()
        seen += int(known.sum())
    assert seen == 100
    whole = next(iter(data.test_dataloader()))
    assert torch.equal(whole.of_task("parity").targets, whole.targets % 2) and whole.of_task("parity").tasks is None


def test_one_label_of_several_is_an_ordinary_task():
    parity, plain = digits(label="parity"), digits()
    assert parity.num_classes == 2 and parity.class_names == ["even", "odd"] and not parity.tasks
    assert parity.name == "digits (parity)" and plain.name == "digits" and plain.class_names[7] == "7"
    assert torch.equal(next(iter(parity.test_dataloader())).targets, next(iter(plain.test_dataloader())).targets % 2)
    assert digits(label=["parity"]).class_names == ["even", "odd"]
    both = digits(label=BOTH)
    both.check_same_classes(parity)
    both.check_same_classes(digits(label="digit"))
    with pytest.raises(UserError, match=r"teacher\.data: 2 classes even, odd, and data has 10"):
        plain.check_same_classes(parity)
    with pytest.raises(UserError, match=r"teacher\.data\.label: digit, parity, and data\.label is one"):
        plain.check_same_classes(both)


def test_the_splits_are_those_of_the_rows_whatever_is_asked_of_them():
    """Else a teacher of one task would have learned from the student's validation rows."""
    both, parity = digits(label=BOTH, val=200, fraction=0.3), digits(label="parity", val=200, fraction=0.3)
    for split in ("train", "val", "test"):
        ours, theirs = (torch.cat([batch.inputs for batch in data.ordered_loader(split)]) for data in (both, parity))
        assert torch.equal(ours, theirs)


def test_every_class_of_every_task_keeps_a_label():
    with pytest.raises(UserError, match=r"data\.labels: 4; accepted: 0 .*at least one for each of the 10 classes"):
        digits(label=["parity", "digit"], labels=4)
    for batch in digits(label=["parity", "digit"], labels=10).ordered_loader("train", batch_size=1200):
        assert batch.tasks["digit"][batch.labelled].bincount().tolist() == [1] * 10


def test_the_fingerprint_knows_what_the_tasks_say(tmp_path):
    found = []
    for number, sides in enumerate(("xyy", "xxy")):
        path = tmp_path / f"{number}" / "people.csv"
        path.parent.mkdir()
        rows = [f"{i},{'abc'[i % 3]},{sides[i % 3]}" for i in range(60)]
        path.write_text("\n".join(["one,kind,side", *rows]))
        found.append(csv(path=str(path), target=["kind", "side"], test=10, val=10).fingerprint)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("digits", r"data\.label: unknown label 'digits'; nearest: digit"),
        (["digit", "digit"], r"data\.label: .*; accepted: different labels"),
        ([], r"data\.label: \[\]; accepted: different labels"),
        ({"digit": 1, "parity": 0}, r"data\.label\.parity: 0; accepted: a finite number above 0"),
        ({"digit": 1, "parity": "half"}, r"data\.label\.parity: 'half'; accepted"),
    ],
)
def test_labels_that_make_no_sense(label, message):
    with pytest.raises(UserError, match=message):
        digits(label=label)


@pytest.mark.parametrize("options", [{"augment": [{"mixup": {"alpha": 0.2}}]}, {"classes": [1, 2]}])
def test_what_several_tasks_do_not_go_with(options):
    with pytest.raises(UserError, match=r"data\.label"):
        digits(label=BOTH, **options)


def test_both_labels_of_cifar100(tmp_path, monkeypatch):
    root = write_cifar(tmp_path, monkeypatch)
    data = cifar100(str(root), label=["fine", "coarse"], val=0)
    fine, coarse = cifar100(str(root), val=0), cifar100(str(root), label="coarse", val=0)
    assert data.network_kwargs["tasks"] == {"fine": 10, "coarse": 5} and coarse.name == "cifar100 (coarse)"
    both, one, other = (next(iter(d.ordered_loader("train"))) for d in (data, fine, coarse))
    assert torch.equal(both.tasks["fine"], one.targets) and torch.equal(both.tasks["coarse"], other.targets)
    assert torch.equal(both.inputs, one.inputs)


def test_two_columns_of_a_table(tmp_path):
    path = tmp_path / "people.csv"
    rows = [f"{i},{i % 7},{'abc'[i % 3]},{'xy'[i % 2]}" for i in range(60)]
    path.write_text("\n".join(["one,two,kind,side", *rows]))
    data = csv(path=str(path), target=["kind", "side"], test=10, val=10)
    assert data.network_kwargs["tasks"] == {"kind": 3, "side": 2} and data.input_shape == (2,)
    for batch in data.ordered_loader("train"):
        first = batch.inputs[:, 0].long()
        assert torch.equal(batch.tasks["kind"], first % 3) and torch.equal(batch.tasks["side"], first % 2)
    side = csv(path=str(path), target=["kind", "side"], label="side", test=10, val=10)
    assert side.class_names == ["x", "y"] and side.input_shape == (2,), "the other label is nothing to learn from"
    assert torch.equal(next(iter(side.ordered_loader("val"))).inputs, next(iter(data.ordered_loader("val"))).inputs)
    weighed = csv(path=str(path), target=["kind", "side"], label={"kind": 1.0, "side": 0.5}, test=10, val=10)
    assert [one.weight for one in weighed.tasks.values()] == [1.0, 0.5]
    with pytest.raises(UserError, match=r"data\.target: unknown column 'sides'"):
        csv(path=str(path), target=["kind", "sides"])


def test_a_class_id_out_of_range_is_named():
    with pytest.raises(UserError, match=r"data\.root: coarse has class id 7; accepted: 0\.\.1"):
        combine_labels({"coarse": ([torch.tensor([0, 7])], ["a", "b"])}, "data.root")


# ---- the network -----------------------------------------------------------------------------------------------------


def test_heads_share_a_trunk():
    torch.manual_seed(0)
    plain = CifarResNet(8, width=4, num_classes=10, in_channels=1)
    net = Heads(CifarResNet(8, width=4, num_classes=10, in_channels=1), {"digit": 10, "parity": 2}).eval()
    said = Outputs.of(net(torch.rand(3, 1, 8, 8)))
    assert said.heads["digit"].shape == (3, 10) and said.heads["parity"].shape == (3, 2)
    assert said.logits is said.heads["digit"]
    width = plain.fc.in_features
    more = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == (width + 1) * 2


@pytest.mark.parametrize(
    ("net", "tasks", "message"),
    [
        (lambda: MLP([4, 3, 2]), {"a": 2}, "tasks: .*accepted: two or more"),
        (lambda: MLP([4, 3, 2]), None, "tasks: .*accepted: two or more"),
        (lambda: nn.Linear(4, 2), {"a": 2, "b": 2}, "net: Linear does not end"),
        (lambda: MLP([4, 3, 2]), {"logits": 2, "b": 2}, "tasks: 'logits'; accepted: letters"),
        (lambda: MLP([4, 3, 2]), {"a.b": 2, "b": 2}, r"tasks: 'a\.b'; accepted: letters"),
        (lambda: MLP([4, 3, 2]), {"type": 2, "b": 2}, r"tasks: 'type'; accepted: letters"),
    ],
)
def test_networks_that_cannot_have_heads(net, tasks, message):
    with pytest.raises(UserError, match=message):
        Heads(net(), tasks)


def test_all_heads_are_no_backbone():
    net = Heads(MLP([4, 3, 2]), {"a": 2, "b": 3})
    freeze(net, "backbone")
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        f"heads.{task}.{part}" for task in "ab" for part in ("weight", "bias")
    ]


def test_all_heads_are_left_as_they_are(tmp_path):
    old, new = (Heads(MLP([4, 3, 2]), {"a": 2, "b": 3}) for _ in range(2))
    save_weights(old, tmp_path / "old.pt")
    before = {name: value.clone() for name, value in new.state_dict().items()}
    load_weights(new, tmp_path / "old.pt", head=False)
    for name, value in new.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("heads.") else old.state_dict()[name]), name


# ---- the objective ---------------------------------------------------------------------------------------------------


def answers(seed: int, rows: int = 6) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(rows, 4, generator=make).double(), "b": torch.randn(rows, 3, generator=make).double()}


def batch_of(rows: int = 6) -> Batch:
    tasks = {"a": torch.tensor([0, 1, 2, 3, NO_LABEL, NO_LABEL]), "b": torch.tensor([2, 1, 0, 0, NO_LABEL, NO_LABEL])}
    return Batch(torch.zeros(rows, 1), tasks["a"], tasks=tasks)


def test_the_objective_is_the_weighed_sum_over_tasks_in_value_and_gradient():
    """Against the sum written out by hand, in float64; weights of 3 and 1 are brought to a mean of 1."""
    temperature, alpha = 3.0, 0.7
    told, batch = answers(1), batch_of()
    objective = Objective({"ce": CrossEntropy(), "kl": KL()}, temperature, alpha, tasks={"a": 3.0, "b": 1.0})
    assert objective.names == ["ce_a", "ce_b", "kl_a", "kl_b"]
    found = []
    for by_hand in (False, True):
        own = {name: value.requires_grad_() for name, value in answers(0).items()}
        if by_hand:
            total = torch.zeros((), dtype=torch.float64)
            for name, weight in (("a", 1.5), ("b", 0.5)):
                known = batch.tasks[name] != NO_LABEL
                ce = F.cross_entropy(own[name][known], batch.tasks[name][known])
                p = (told[name] / temperature).softmax(-1)
                kl = (p * (p.log() - (own[name] / temperature).log_softmax(-1))).sum(-1).mean()
                total = total + weight * ((1 - alpha) * ce + alpha * temperature**2 * kl)
        else:
            total = objective(Outputs(own["a"], heads=own), Outputs(told["a"], heads=told), batch).total
        total.backward()
        found.append((total.detach(), own["a"].grad, own["b"].grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_like_teacher_and_student_have_no_divergence_for_any_task():
    objective = Objective({"kl": KL()}, 2.0, tasks={"a": 1.0, "b": 1.0})
    both = answers(0)
    losses = objective(Outputs(both["a"], heads=both), Outputs(both["a"], heads=both), batch_of())
    assert losses.total.abs() < 1e-9 and losses.values.abs().max() < 1e-9


def test_terms_on_layers_are_of_all_tasks_together():
    objective = Objective({"ce": CrossEntropy(), "hint": Hint("x", "y")}, tasks={"a": 1.0, "b": 1.0})
    assert objective.names == ["ce_a", "ce_b", "hint"] and objective.teacher_layers == ["y"]


@pytest.mark.parametrize("term", [OFA(["x"]), USKD(student_layer="x"), SRRL("x", "y")], ids=["ofa", "uskd", "srrl"])
def test_terms_on_layers_and_an_output_are_refused(term):
    with pytest.raises(UserError, match=r"loss\.terms\.it: looks at an output beside layers"):
        Objective({"it": term}, tasks={"a": 1.0, "b": 1.0})


def test_tasks_of_equally_many_classes_keep_to_their_own():
    own, told = (
        {
            name: torch.randn(4, 3, generator=torch.Generator().manual_seed(s + n)).double()
            for n, name in enumerate("ab")
        }
        for s in (0, 10)
    )
    tasks = {name: torch.tensor([0, 1, 2, NO_LABEL]) for name in "ab"}
    objective = Objective({"kl": KL()}, 1.0, tasks={"a": 1.0, "b": 1.0})
    batch = Batch(torch.zeros(4, 1), tasks["a"], tasks=tasks)
    values = objective(Outputs(own["a"], heads=own), Outputs(told["b"], heads=told), batch).values
    for value, name in zip(values, "ab", strict=True):
        p = told[name].softmax(-1)
        wanted = (p * (p.log() - own[name].log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match=r"heads of b of shape \(4, 3\) and \(4, 2\)"):
        told["b"] = told["b"][:, :2]
        objective(Outputs(own["a"], heads=own), Outputs(told["a"], heads=told), batch)


def test_a_head_that_is_missing_is_named():
    objective = Objective({"ce": CrossEntropy()}, tasks={"a": 1.0, "c": 1.0})
    own = answers(0)
    with pytest.raises(UserError, match="unknown head of the network 'c'"):
        objective(Outputs(own["a"], heads=own), None, batch_of())


def test_copies_of_a_term_have_states_of_their_own_and_one_temperature():
    objective = Objective({"kl": KL()}, 5.0, tasks={"a": 1.0, "b": 1.0})
    first, second = objective.terms["kl_a"].term, objective.terms["kl_b"].term
    assert first is not second and first.temperature is second.temperature is objective.temperature


# ---- teachers and measures -------------------------------------------------------------------------------------------


def test_a_teacher_a_task():
    nets = {"a": nn.Linear(5, 4), "b": nn.Linear(5, 3)}
    teacher = TasksTeacher({name: FrozenTeacher(net, Classification(4)) for name, net in nets.items()})
    batch = Batch(torch.rand(2, 5), torch.zeros(2).long())
    said = teacher(batch)
    for name, net in nets.items():
        torch.testing.assert_close(said.heads[name], net(batch.inputs))
    assert said.logits is said.heads["a"] and not said.logits.requires_grad and "a: live" in teacher.describe()


def test_several_networks_of_all_tasks_are_averaged_head_by_head():
    nets = [Heads(MLP([4], in_features=5), {"a": 4, "b": 3}).eval() for _ in range(2)]
    task = Classification(4, tasks={"a": 4, "b": 3})
    batch = Batch(torch.rand(2, 5), torch.zeros(2).long())
    said = EnsembleTeacher([FrozenTeacher(net, task) for net in nets])(batch)
    for name in "ab":
        mean = torch.stack([net(batch.inputs)[name].softmax(-1) for net in nets]).mean(0)
        torch.testing.assert_close(said.heads[name].softmax(-1), mean)


def test_measures_of_each_task_and_their_mean():
    task = Classification(4, tasks={"a": 4, "b": 3})
    assert task.chance == pytest.approx((1 / 4 + 1 / 3) / 2)
    own, told, batch = answers(0), answers(1), batch_of()
    measures = task.measures()
    measures.update(Outputs(own["a"], heads=own), Outputs(told["a"], heads=told), batch)
    found = measures.compute()
    for name in "ab":
        right = (own[name].argmax(-1) == batch.tasks[name])[:4].double().mean()
        assert found[f"acc_{name}"] == pytest.approx(float(right))
        same = (own[name].argmax(-1) == told[name].argmax(-1)).double().mean()
        assert found[f"agreement_{name}"] == pytest.approx(float(same))
    assert found["acc"] == pytest.approx((found["acc_a"] + found["acc_b"]) / 2)
    alone = task.measures()
    alone.update(Outputs(own["b"], heads={"b": own["b"]}), None, batch)
    assert alone.compute()["acc"] == pytest.approx(found["acc_b"]) and "acc_a" not in alone.compute()


# ---- an experiment ---------------------------------------------------------------------------------------------------


def test_an_experiment_with_two_tasks(place, capsys):
    run = train(place, "two", *TEACHER_DEFAULTS)
    models = result(run)["models"]
    for role in ("student", "baseline", "teacher"):
        both = [models[role]["test"][f"acc_{name}"] for name in BOTH]
        assert models[role]["test"]["acc"] == pytest.approx(sum(both) / 2)
    assert "acc_digit" in models["teacher_0"]["test"] and "acc_parity" not in models["teacher_0"]["test"]
    points = [curve(run, f"train/{name}") for name in ("ce_digit", "ce_parity", "kl_digit", "kl_parity")]
    assert all(points)
    assert {"heads.digit.weight", "heads.parity.weight"} <= weights(run).keys()
    np.save(place / "row.npy", np.zeros((1, 8, 8), dtype=np.uint8))
    capsys.readouterr()
    assert main(["predict", str(run), str(place / "row.npy")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "digit: " in said[0] and "parity: " in said[1] and ("even" in said[1] and "odd" in said[1])
    assert "has several tasks (digit, parity); accepted: the run of a classifier with one" in mistake(
        capsys, ["diagnose", str(run)]
    )
    described = json.loads((run / "model.json").read_text())
    assert described["tasks"]["parity"] == ["even", "odd"]


def test_training_lowers_every_term(place):
    run = train(place, "lower", *WORDS, "epochs=8", "teacher.epochs=3", "baseline=false", "trainer.log_every=4")
    for name in ("ce_digit", "ce_parity", "kl_digit"):
        points = curve(run, f"train/{name}")
        assert points[-1] < points[0], name


@pytest.mark.parametrize(
    "words",
    [
        ["data.label=[parity,digit]"],
        ["method=ema", "loss=balanced", "teacher=none"],
        ["method=born_again", "method.generations=2", "teacher=none"],
        ["method=semi_supervised_kd", "data.labels=60"],
        ["loss=[hinton,dkd,dist]"],
        ["method=finetune", "loss=ce", "teacher=none"],
        # one teacher that knows both, looked at inside as well
        ["teacher=heads", "teacher.members=null", "teacher.weighting=mean", "loss=[hinton,fitnets]", *LAYERS],
    ],
    ids=lambda words: words[0],
)
def test_methods_with_two_tasks(place, words):
    run = train(place, "method", *(WORDS if "teacher=none" in words else TEACHER_DEFAULTS), "baseline=false", *words)
    for role, model in result(run)["models"].items():
        assert model is None or role.startswith("teacher_") or {"acc_digit", "acc_parity"} <= model["test"].keys(), role


@pytest.mark.slow
def test_teachers_of_one_task_from_checkpoints(tmp_path, capsys):
    first = train(tmp_path, "two", *TEACHER_DEFAULTS, "baseline=false")
    known = {}
    for folder in (tmp_path / "teachers").glob("resnet20-*/"):
        if folder.is_dir():
            classes = json.loads((folder / "model.json").read_text())["classes"]
            known["parity" if classes == ["even", "odd"] else "digit"] = folder / "model_finetuned.pt"
    members = ", ".join(f"{{checkpoint: {file}, data: {{label: {name}}}}}" for name, file in known.items())
    words = [*WORDS, "baseline=false", f"teacher.members=[{members}]"]
    again = train(tmp_path, "files", *words)
    for split in ("val", "test"):
        ours, theirs = (result(run)["models"]["teacher"][split] for run in (again, first))
        assert ours["acc_parity"] == theirs["acc_parity"] and ours["acc_digit"] == theirs["acc_digit"]
    capsys.readouterr()
    status = main(["check", *words, f"output={tmp_path}"])  # after one epoch they may know no more than chance
    said = capsys.readouterr()
    assert status in (0, 2) and "on the val split (chance is" in said.out + said.err


def test_a_run_of_two_tasks_resumes_to_the_same_bits(place, monkeypatch):
    words = [*TEACHER_DEFAULTS, "baseline=false", "temperature=learned", "trainer.save_minutes=0.00001"]
    stop_and_go(place, monkeypatch, "resumed", words, at=5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch_transform=attack"], "batch_transform: "),
        (["loss=mutual", "auxiliary=peers", "method=self_distillation", "teacher=none"], "auxiliary: peers, and data"),
        (["method=pseudo_labels", "data.labels=60"], "method.labels: hard, and data.label names several tasks"),
        (["student=resnet8_w4"], "unknown head of the network 'digit'"),
        (["data=digits", "student=resnet8_w4"], "teacher.weighting: tasks, and data.label is None; accepted: mean"),
        (["method=finetune", "loss=ce", "teacher=none", "student=resnet8_w4"], "unknown head of the network 'digit'"),
        (
            ["method=semi_supervised_kd", "method.threshold=0.9", "data.labels=60"],
            "method.threshold: 0.9 of one answer",
        ),
        (["teacher=heads", "teacher.weighting=learned", "loss=several"], "teacher.weighting: learned, and data.label"),
        (["init=teacher_head"], "init: teacher_head, and data.label"),
        ([f"teacher.members=[{KNOWS_DIGITS}]"], "teacher.members: know digit, and data.label names digit, parity"),
        (
            ["teacher.members=[{data: {label: digit}}, {data: {label: digit}}]"],
            "teacher.members[1].data.label: 'digit'",
        ),
        (["teacher.members=[{seed: 0}, {seed: 1}]"], "teacher.members[0].data.label: None"),
        (["task=classification_attacked"], "task.attack"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_several_tasks_refuse(place, capsys, words, message):
    assert message in mistake(capsys, [*WORDS, *words], Path("nothing"))
