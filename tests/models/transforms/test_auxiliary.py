"""What trains beside a student, and rows that are put together: in training alone, resumable, and in no export."""

import pytest
import torch
from torch import nn

from helpers.tiny import QUIET, checkpoint, curve, mistake, result, stop_and_go, train, weights
from kdlab.cli.main import main
from kdlab.data import digits
from kdlab.errors import UserError
from kdlab.inference.predict import load_model
from kdlab.models import MLP, CifarResNet, weights_hash
from kdlab.models.transforms.auxiliary import Exits, Peers

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SMALL = ("data.fraction=0.15", "baseline=false", "student=mlp", "student.dropout=0.3")
"""180 digits, three steps an epoch."""


def resnet():
    return CifarResNet(depth=8, width=4, in_channels=1)


COMPANIONS = {
    "peers": lambda net: Peers(net, [resnet(), resnet()]),
    "exits": lambda net: Exits(net, ["layer1", "layer2"], IMAGES[:2]),
}


# ---- an auxiliary network


@pytest.mark.parametrize("kind", COMPANIONS)
def test_it_adds_in_training_and_is_silent_in_evaluation(kind):
    net = resnet()
    auxiliary = COMPANIONS[kind](net)
    assert auxiliary.kind == kind and not any(net is module for module in auxiliary.modules())
    mine = {id(p) for p in net.parameters()}
    assert not any(id(p) in mine for p in auxiliary.parameters()) and len(list(auxiliary.parameters()))
    net.eval(), auxiliary.eval()
    assert torch.equal(auxiliary(IMAGES), net(IMAGES))
    auxiliary.training = True
    found = auxiliary(IMAGES)
    assert next(iter(found)) == "logits" and torch.equal(found["logits"], net(IMAGES))
    added = {"peers": {"peer1", "peer2"}, "exits": {"feature", "exit1", "exit1_feature", "exit2", "exit2_feature"}}
    assert set(found) - {"logits"} == added[kind]
    assert all(v.shape == ((4, 16) if "feature" in k else (4, 10)) for k, v in found.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_exits_read_what_the_layers_and_the_head_read():
    net = resnet().eval()
    auxiliary = Exits(net, ["layer1", "layer2"], IMAGES[:2]).eval()
    found = auxiliary.answers(IMAGES)
    assert torch.equal(net.fc(found["feature"]), found["logits"])
    found["exit1"].sum().backward()
    assert net.layer1[0].conv1.weight.grad is not None and net.layer2[0].conv1.weight.grad is None
    flat = Exits(MLP([12, 8], num_classes=10, in_channels=1, image_size=[8, 8]), ["layer1"], IMAGES[:2])
    assert flat.answers(IMAGES)["exit1_feature"].shape == (4, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: Exits(net, ["layer9"], IMAGES[:2]), "layers: unknown layer 'layer9'"),
        (lambda net: Exits(net, [], IMAGES[:2]), "layers: "),
        (lambda net: Peers(net, []), "nets: none"),
        (lambda net: Peers(net, [net]), "the student itself"),
        (lambda net: Exits(nn.Conv2d(1, 2, 1), ["0"], IMAGES[:2]), "layer"),
    ],
)
def test_a_companion_refuses_what_it_cannot_stand_beside(make, message):
    with pytest.raises(UserError, match=message):
        make(resnet())


# ---- a run with one


@pytest.mark.parametrize(("name", "kind"), [("mutual", "peers"), ("be_your_own_teacher", "exits")])
def test_nothing_of_it_is_deployed(place, name, kind):
    words = (f"experiment={name}", "data.fraction=0.1", "epochs=1", "baseline=false")
    run = train(place, f"beside_{name}", *words)
    net, described = load_model(run)
    assert described["network"]["_target_"].endswith("CifarResNet") and "auxiliary" not in described
    for file in ("student.pt", "checkpoints/best.pt"):
        assert weights(run, file).keys() == net.state_dict().keys()
    found = result(run)
    assert found["models"]["student"]["parameters"] == sum(p.numel() for p in net.parameters())
    assert found["settings"]["auxiliary"] == kind and found["models"]["teacher"] is None
    held = checkpoint(run)["state_dict"]
    assert {key.split(".")[0] for key in held} == {"student", "auxiliary"}
    assert not any("student" in key for key in held if key.startswith("auxiliary."))
    if kind == "peers":  # other first weights, and other ones at the end
        peer = {key.removeprefix("auxiliary.nets.0."): v for key, v in held.items() if "nets.0" in key}
        own = {key.removeprefix("student."): v for key, v in held.items() if key.startswith("student.")}
        assert peer.keys() == own.keys() and weights_hash(peer) != weights_hash(own)


def test_layers_are_the_students_and_a_teacher_may_teach_too(place):
    words = ("teacher=mlp", "teacher.epochs=1", "method=offline_kd", "loss=[mutual,hinton,fitnets]", "epochs=1")
    layers = ("loss.terms.hint.student_layer=layer1", "loss.terms.hint.teacher_layer=layer1")
    run = train(place, "all_at_once", "experiment=mutual", *SMALL, *words, *layers)
    for term in ("kl", "hint", "peers", "mutual"):
        assert curve(run, f"train/{term}")[-1] > 0
    assert result(run)["models"]["teacher"] is not None


def test_peers_of_another_network(place):
    words = ("+model@auxiliary.net=mlp", "auxiliary.count=2", "auxiliary.net.hidden=[7]", "epochs=1")
    run = train(place, "others", "experiment=mutual", "data.fraction=0.1", "baseline=false", *words)
    held = checkpoint(run)["state_dict"]
    first = [v for key, v in held.items() if key.startswith("auxiliary.nets.") and key.endswith("weight")]
    assert {key.split(".")[2] for key in held if key.startswith("auxiliary")} == {"0", "1"} and len(first[0]) == 7


def test_a_stage_goes_on_from_the_student_alone(place):
    stages = "stages={both: ['epochs=1'], alone: [auxiliary=none, loss=ce, method=finetune, init=previous, epochs=1]}"
    run = train(place, "stages_beside", "experiment=mutual", *SMALL, stages)
    assert {key.split(".")[0] for key in checkpoint(run / "stages" / "alone")["state_dict"]} == {"student"}


# ---- resumed


@pytest.mark.parametrize("name", ["mutual", "ps_kd", "cs_kd", "dlb"])
def test_stopped_inside_an_epoch_it_ends_with_the_same_bits(place, monkeypatch, name):
    words = (f"experiment={name}", *SMALL, "epochs=2", "trainer.save_minutes=0.0000001", "data.batch_size=60")
    run = stop_and_go(place, monkeypatch, name, words, at=4)
    assert result(run)["steps"] == 6


# ---- rows that are put together


def epochs_of(count=3, parts=1, **options):
    data = digits(**options)
    loader = data.to("cpu", accumulate=parts).train_dataloader()
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        yield list(loader)


@pytest.mark.parametrize("labels", [None, 300])
def test_rows_come_in_pairs_of_one_class_each_once(labels):
    partners = []
    for batches in epochs_of(pairing="same_class", labels=labels):
        rows = torch.cat([b.example_id[:, 0] for b in batches])
        assert rows.sort().values.equal(torch.arange(1200)) and [len(b) for b in batches] == [64] * 18 + [48]
        for b in batches:
            has = b.partner >= 0
            assert b.window == b.count() and b.window.partnered == has.sum()
            assert (b.targets[has] == b.targets[b.partner[has]]).all() and (b.targets[has] >= 0).all()
            assert (b.partner[b.partner[has]] == has.nonzero()[:, 0]).all()
            assert (b.partner[has] != has.nonzero()[:, 0]).all()
        alone = sum(float((b.labelled & (b.partner < 0)).sum()) for b in batches)
        assert alone <= 10, "an odd one of each class"
        partners.append(
            {
                int(b.example_id[i, 0]): int(b.example_id[j, 0])
                for b in batches
                for i, j in enumerate(b.partner)
                if j >= 0
            }
        )
    both = partners[0].keys() & partners[1].keys()
    assert sum(partners[0][row] == partners[1][row] for row in both) < len(both) / 10, "drawn anew each epoch"
    first, second = (list(epochs_of(1, pairing="same_class", seed=seed)) for seed in (0, 0))
    assert all(torch.equal(a.example_id, b.example_id) for a, b in zip(first[0], second[0], strict=True))


def test_no_part_of_a_step_cuts_a_pair():
    whole = next(epochs_of(1, pairing="same_class"))
    parts = next(epochs_of(1, parts=4, pairing="same_class"))
    assert torch.equal(torch.cat([b.example_id for b in parts]), torch.cat([b.example_id for b in whole]))
    count = [sum(float((b.partner >= 0).sum()) for b in found) for found in (whole, parts)]
    assert count[0] == count[1] and parts[0].window.partnered == whole[0].window.partnered


def test_half_of_each_step_is_what_was_new_in_the_one_before():
    before, shown = None, []
    for epoch, batches in enumerate(epochs_of(5, pairing="repeat_half", augment=[{"crop": {"padding": 1}}])):
        assert len(batches) == 19 and all(len(b) == 64 and b.window.labelled == 64 for b in batches)
        for b in batches:
            again, new = b.example_id[:32], b.example_id[32:]
            if before is not None:
                assert torch.equal(again[:, 0], before[:, 0]) and not torch.equal(again[:, 1], before[:, 1]), epoch
            before = new
            shown.append(new[:, 0])
    rows = torch.cat(shown)
    assert rows[:1200].sort().values.equal(torch.arange(1200)) and not rows[:1200].equal(rows[1200:2400])
    assert rows[1200:2400].sort().values.equal(torch.arange(1200)), "the pool goes round"
    late = list(epochs_of(4, pairing="repeat_half"))[3]
    data = digits(pairing="repeat_half").train_dataloader()
    data.sampler.set_epoch(3)
    assert all(torch.equal(a.example_id, b.example_id) for a, b in zip(late, data, strict=True)), (
        "a function of (seed, epoch)"
    )


# ---- what does not go together


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=mutual", "auxiliary=none"], "auxiliary: none, and loss.terms.peers looks at peers"),
        (["experiment=mutual", "auxiliary=exits"], "auxiliary: exits, and loss.terms.peers looks at peers"),
        (
            ["experiment=be_your_own_teacher", "auxiliary=peers"],
            "auxiliary: peers, and loss.terms.exits looks at exits",
        ),
        (["experiment=kd_resnet", "auxiliary=peers"], "auxiliary: peers, and no term of the loss looks at it"),
        (["experiment=mutual", "auxiliary.count=0"], "auxiliary.count: 0"),
        (["experiment=be_your_own_teacher", "auxiliary.layers=[layer9]"], "auxiliary.layers: unknown layer 'layer9'"),
        (["experiment=mutual", "loss=[mutual,hinton]"], "method.self_teacher: none has no teacher"),
        (["experiment=cs_kd", "data=digits"], "data.pairing: null, and loss.terms.class_wise"),
        (["experiment=dlb", "data=digits_pairs"], "data.pairing: same_class, and loss.terms.last_batch"),
        (["experiment=dlb", "data.pairing=twice"], "data.pairing: 'twice'"),
        (["experiment=dlb", "data.batch_size=33"], "data.batch_size: 33, with data.pairing=repeat_half"),
        (
            ["experiment=cs_kd", "data.labels=100", "data.unlabelled_ratio=7"],
            "data.unlabelled_ratio: 7, and data.pairing=same_class",
        ),
        (["experiment=cs_kd", "data.augment=[{mixup: {alpha: 0.2}}]"], "data.pairing: same_class; mixup"),
        (["experiment=lm_shakespeare", "auxiliary=peers", "loss=[hinton,mutual]"], "auxiliary: peers stands"),
    ],
)
def test_what_does_not_fit_is_one_line(place, capsys, monkeypatch, tmp_path, words, message):
    if "lm_shakespeare" in words[0]:
        from helpers.tiny_text import write_shakespeare

        words = [*words, f"data.root={write_shakespeare(tmp_path, monkeypatch)}"]
    said = mistake(capsys, [*QUIET, *words], tmp_path / "out")
    assert said.startswith(message), said


def test_a_check_says_what_stands_beside(place, capsys):
    assert main(["check", "experiment=be_your_own_teacher", "trainer=cpu"]) == 0
    assert "parameters beside the student" in capsys.readouterr().out
