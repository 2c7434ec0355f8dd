"""SimKD: a student that ends with its teacher's frozen classifier, and the baseline that trains its own."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import FEW, QUIET, checkpoint, curve, mistake, result, same, stop_and_go, train, weights
from kdlab import models
from kdlab.cli.main import main
from kdlab.config import builder
from kdlab.config import options as config_options
from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Taps
from kdlab.inference.predict import load_model
from kdlab.losses import SimKD
from kdlab.models import SimKDStudent, reuse_teacher_head

torch.set_num_threads(1)
RUN = ("experiment=simkd", *FEW)
IMAGES = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
GREY = {"in_channels": 1, "num_classes": 7}
BACKBONES = {
    "resnet": lambda: models.CifarResNet(8, width=4, **GREY),
    "wrn": lambda: models.WideResNet(10, 1, **GREY),
    "vgg": lambda: models.VGG(8, width=4, image_size=32, **GREY),
    "mobilenet": lambda: models.MobileNetV2(**GREY),
    "shufflenet": lambda: models.ShuffleNetV2(**GREY),
}


def teacher(width=6):
    torch.manual_seed(1)
    return models.CifarResNet(8, width=width, **GREY)


# ---- the network


@pytest.mark.parametrize("name", BACKBONES)
def test_it_is_a_backbone_a_projector_and_a_classifier(name):
    torch.manual_seed(0)
    plain = BACKBONES[name]().eval()
    torch.manual_seed(0)
    net = SimKDStudent(BACKBONES[name](), width=24, num_classes=7).eval()
    read = []
    plain.pool.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    plain(IMAGES)
    with Taps(net, ["net", "connector", "pool"]) as seen:
        logits = net(IMAGES)
    assert torch.equal(seen["net"], read[0]), "what the backbone's own pool would be given"
    assert seen["connector"].shape == (4, 24, *read[0].shape[2:]) and (seen["connector"] >= 0).all()
    assert torch.allclose(seen["pool"], seen["connector"].mean((2, 3)), atol=1e-6)
    assert torch.equal(logits, net.fc(seen["pool"])) and logits.shape == (4, 7)
    assert models.head_of(net)[0] == "fc" and not any(key.startswith("net.fc") for key in net.state_dict())
    net.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_its_projector_is_the_authors():
    c, w = 16, 64
    net = SimKDStudent(BACKBONES["resnet"](), w)
    inner = w // 2
    convolutions = c * inner + 9 * inner * inner + inner * w
    assert models.parameters(net.connector) == convolutions + 2 * (inner + inner + w)
    assert [type(part) for part in net.connector] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    assert not any(part.inplace for part in net.connector if isinstance(part, nn.ReLU))


def test_the_option_says_how_large_it_is():
    text = (config_options.shipped() / "model" / "simkd.yaml").read_text()
    found = int(re.search(r"([\d,]+) parameters \(10 classes, grey\)", text)[1].replace(",", ""))
    inner = {"_target_": "kdlab.models.CifarResNet", "depth": 8, "width": 4, "mean": None}
    config = {"_target_": "kdlab.models.SimKDStudent", "net": inner, "width": 64}
    net = builder.build(
        config, "student", slot="network", offer={"num_classes": 10, "in_channels": 1, "mean": [0.5], "std": [0.25]}
    )
    assert models.parameters(net) == found
    assert net.net.conv1.in_channels == 1, "data say the same to the network inside"
    assert net.net.normalize.mean.flatten().tolist() == [0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimKDStudent(models.MLP([8], num_classes=7, in_features=4), 8), "net: MLP does not end with"),
        (lambda: SimKDStudent(teacher(), 8, factor=9), "width, factor: 8, 9"),
        (lambda: SimKDStudent(teacher(), 8, factor=0), "width, factor: 8, 0"),
        (lambda: reuse_teacher_head(SimKDStudent(teacher(), 8), teacher()), "reads 24 numbers, the student's 8"),
        (lambda: reuse_teacher_head(SimKDStudent(teacher(), 24, num_classes=3), teacher()), r"weight \(3, 24\)"),
    ],
)
def test_mistakes_are_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value) and "accepted: " in str(caught.value)


def test_the_classifier_is_a_frozen_copy():
    theirs, ours = teacher(), SimKDStudent(BACKBONES["resnet"](), 24, num_classes=7)
    assert reuse_teacher_head(ours, theirs) == "fc"
    assert same(ours.fc.state_dict(), theirs.fc.state_dict()) and ours.fc.weight is not theirs.fc.weight
    assert {n for n, p in ours.named_parameters() if not p.requires_grad} == {"fc.weight", "fc.bias"}
    assert all(p.requires_grad for p in theirs.parameters())


# ---- the term


def met(net=None, term=None, layer="layer3"):
    """A term that has met its networks, and what they say of four pictures."""
    theirs, term = (net or teacher()).eval(), term or SimKD("connector", layer)
    torch.manual_seed(2)
    ours = SimKDStudent(BACKBONES["resnet"](), models.head_of(theirs)[1].in_features, num_classes=7).eval()
    reuse_teacher_head(ours, theirs)
    said = []
    for one, layers in ((ours, term.student_layers), (theirs, term.teacher_layers)):
        with torch.no_grad(), Taps(one, layers) as seen:
            said.append(Outputs(one(IMAGES), dict(seen)))
    term.setup(ours, theirs, None)
    term.prepare(*said)
    return term, *said


def test_it_is_the_mean_squared_error_of_each_row_and_looks_at_no_label():
    term, ours, theirs = met()
    s = ours.features["connector"].double().requires_grad_()
    t = theirs.features["layer3"].double()
    batch = Batch(IMAGES, torch.full((4,), -100))
    found = term(Outputs(ours.logits, {"connector": s}), Outputs(theirs.logits, {"layer3": t}), batch)
    gap = s.detach().numpy() - t.numpy()
    assert found.detach().numpy() == pytest.approx((gap**2).mean((1, 2, 3)), rel=1e-12)
    found.sum().backward()
    assert s.grad.numpy() == pytest.approx(2 * gap / gap[0].size, rel=1e-12)
    assert term(Outputs(ours.logits, {"connector": t}), Outputs(theirs.logits, {"layer3": t}), batch).eq(0).all()
    assert not list(term.parameters()) and not term.state_dict()


def test_the_finer_grid_is_averaged_down():
    term, ours, theirs = met()
    t, s = theirs.features["layer3"], ours.features["connector"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    batch = Batch(IMAGES, torch.zeros(4, dtype=torch.long))
    pair = [Outputs(ours.logits, {"connector": s}), Outputs(theirs.logits, {"layer3": t})]
    plain = (ours.features["connector"] - t).pow(2).flatten(1).mean(1)
    assert torch.allclose(term(*pair, batch), plain, rtol=1e-5)


def test_half_precision():
    term, ours, theirs = met()
    batch = Batch(IMAGES, torch.zeros(4, dtype=torch.long))
    full = term(ours, theirs, batch)
    for dtype in (torch.float16, torch.bfloat16):
        pair = [Outputs(o.logits, {k: v.to(dtype) for k, v in o.features.items()}) for o in (ours, theirs)]
        found = term(*pair, batch)
        assert found.dtype == torch.float32 and torch.allclose(found, full, rtol=0.05)


def test_it_knows_the_map_that_the_classifier_reads():
    wide = models.WideResNet(10, 1, **GREY)
    for layer in ("layer2", "layer3", "bn1"):
        with pytest.raises(UserError, match=f"teacher_layer: {layer}, whose average is not"):
            met(wide, SimKD("connector", layer))
    met(wide, SimKD("connector", "bn1", relu=True))
    negative = teacher()
    negative.layer3.append(nn.BatchNorm2d(24))
    nn.init.constant_(negative.layer3[-1].bias, -1.0)
    with pytest.raises(UserError, match="layer3 holds negative numbers"):
        met(negative)
    with pytest.raises(UserError, match="student_layer: 2 layers"):
        SimKD(["a", "b"], ["a", "b"])
    with pytest.raises(UserError, match="call setup"):
        SimKD("connector", "layer3").prepare(*met()[1:])
    with pytest.raises(UserError, match="its classifier is not the teacher's"):
        SimKD("connector", "layer3").setup(SimKDStudent(BACKBONES["resnet"](), 24, num_classes=7), teacher(), None)


# ---- a run


def test_a_run_ends_with_the_teachers_classifier_and_its_folder_is_enough(place, tmp_path, capsys):
    run = train(place, "simkd", *RUN, "epochs=3")
    net, described = load_model(run)
    assert isinstance(net, SimKDStudent) and described["network"]["net"]["_target_"].endswith("CifarResNet")
    held = weights(run)
    assert held.keys() == net.state_dict().keys() == weights(run, "checkpoints/best.pt").keys()
    taught = [weights(t, "model_finetuned.pt") for t in (place / "teachers").glob("resnet20-*") if t.is_dir()]
    assert any(
        torch.equal(held["fc.weight"], t["fc.weight"]) and torch.equal(held["fc.bias"], t["fc.bias"]) for t in taught
    )
    last = checkpoint(run)
    assert torch.equal(last["state_dict"]["student.fc.weight"], held["fc.weight"])
    trained = last["optimizer_states"][0]["param_groups"][0]["params"]
    assert len(trained) == len(list(net.parameters())) - 2, "the classifier is not the optimizer's"
    falls = curve(run, "train/simkd")
    assert falls[-1] < falls[0] and curve(run, "train/loss") == pytest.approx(falls)

    np.save(tmp_path / "rows.npy", IMAGES[:2, :, :8, :8].numpy())
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "rows.npy")]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_its_baseline_learns_the_labels_with_all_of_its_weights(place):
    run = train(place, "simkd_baseline", *RUN)
    found = result(run)["models"]
    assert found["baseline"]["parameters"] == found["student"]["parameters"]
    kept = [f for f in (place / "baselines").glob("simkd-*") if (f / "config.yaml").exists()]
    assert len(kept) >= 1
    for folder in kept:
        moved = checkpoint(folder)
        assert not torch.equal(moved["state_dict"]["student.fc.weight"], weights(run)["fc.weight"])
        groups = moved["optimizer_states"][0]["param_groups"][0]["params"]
        assert len(groups) == len(list(load_model(folder)[0].parameters()))
        assert curve(folder, "train/loss") == curve(folder, "train/ce") and curve(folder, "train/ce")[0] > 1


def test_stopped_inside_an_epoch_it_ends_with_the_same_bits(place, monkeypatch):
    words = (*RUN, "epochs=2", "baseline=false", "trainer.save_minutes=0.0000001", "data.batch_size=40")
    run = stop_and_go(place, monkeypatch, "simkd", words, at=4)
    assert result(run)["steps"] == 6


def test_the_classifier_alone_with_labels_and_no_lesson(place):
    words = ("method=finetune", "loss=ce", "baseline=false", "student=resnet8", "student.width=16")
    run = train(place, "simkd_labels", *RUN, *words)
    assert json.loads((run / "model.json").read_text())["weights"] == "model_finetuned.pt"
    taught = [weights(t, "model_finetuned.pt") for t in (place / "teachers").glob("resnet20-*") if t.is_dir()]
    assert any(torch.equal(weights(run, "model_finetuned.pt")["fc.weight"], t["fc.weight"]) for t in taught)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["student.width=32"], "init: teacher_head, and the teacher's classifier reads 64 numbers, the student's 32"),
        (["teacher=resnet8x4"], "init: teacher_head, and the teacher's classifier reads 256 numbers, the student's 64"),
        (["init=fresh"], "loss.terms.simkd.student: its classifier is not the teacher's, and SimKD trains none"),
        (["loss.terms.simkd.teacher_layer=layer2"], "loss.terms.simkd.teacher_layer: layer2, whose average"),
        (["model@student.net=mlp"], "student.net: MLP does not end with"),
        (["student.net.depht=14"], "student.net.depht: unknown key 'depht'; nearest: depth"),
        (["data=synthetic", "teacher=mlp"], "student: SimKDStudent takes pictures"),
        (["teacher=none", "loss=ce", "method=finetune"], "init: teacher_head, and the experiment has no teacher"),
        (["teacher.members=[{seed: 1}, {seed: 2}]", "loss=[hinton]"], "init: teacher_head, and teacher.members are"),
        (
            ["adapter=lora", "adapter.targets=[net.conv1]"],
            "adapter: trains beside the student's own weights, which are random with init=teacher_head",
        ),
    ],
)
def test_mistakes_of_a_config_are_one_line(place, tmp_path, capsys, words, said):
    assert mistake(capsys, [*QUIET, "experiment=simkd", *words], tmp_path / "out").startswith(said)


def test_another_network_takes_the_place_of_the_one_inside(place, capsys):
    assert main(["check", "experiment=simkd", "model@student.net=vgg8", "student.net.width=8"]) == 0
    assert main(["list", "layers", "experiment=simkd"]) == 0
    assert "connector" in capsys.readouterr().out
