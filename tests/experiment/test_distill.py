"""``kdlab.distill``: networks and loaders of one's own, with what trains beside the student."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab
from kdlab.config.options import shipped
from kdlab.errors import UserError
from kdlab.experiment.distill import _objective
from kdlab.losses import CrossEntropy, MutualKL, PeersCE
from kdlab.models import CifarResNet, weights_hash
from kdlab.models.transforms.auxiliary import Exits, Peers

torch.set_num_threads(1)
QUIET = {"accelerator": "cpu", "progress": "none", "threads": 1}
DRAWN = torch.Generator().manual_seed(0)
TARGETS = torch.arange(48) % 3
IMAGES = torch.rand(48, 1, 8, 8, generator=DRAWN) * 0.3 + TARGETS[:, None, None, None] * 0.3


def loader(rows=48):
    return DataLoader(TensorDataset(IMAGES[:rows], TARGETS[:rows]), batch_size=16)


def resnet(seed=0):
    torch.manual_seed(seed)
    return CifarResNet(depth=8, width=4, in_channels=1, num_classes=3)


def distilled(student, teacher=None, **more):
    return kdlab.distill(student, teacher, loader(), loader(24), epochs=2, trainer=QUIET, **more)


def test_mutual_learning_trains_peers_and_leaves_them_behind():
    student, peer = resnet(), resnet(1)
    names, before = set(student.state_dict()), weights_hash(peer)
    done = distilled(student, loss="mutual", auxiliary=Peers(student, [peer]))
    assert done.student is student and set(student.state_dict()) == names and not student.training
    assert weights_hash(peer) != before and isinstance(student(IMAGES), torch.Tensor)
    assert done.teacher_val == {} and 0 <= done.val["acc"] <= 1
    alone = resnet()
    distilled(alone)
    assert weights_hash(alone) != weights_hash(student), "the peer has taught something"


def test_exits_teach_the_inside_of_a_student():
    student = resnet()
    auxiliary = Exits(student, ["layer1", "layer2"], IMAGES[:2])
    before = weights_hash(auxiliary)
    done = distilled(student, loss="byot", auxiliary=auxiliary)
    assert weights_hash(auxiliary) != before and 0 <= done.val["acc"] <= 1


def test_a_teacher_and_peers_at_once():
    student, teacher = resnet(), resnet(2)
    before = weights_hash(teacher)
    done = distilled(student, teacher, loss=["hinton", "mutual"], auxiliary=Peers(student, [resnet(1)]))
    assert weights_hash(teacher) == before and done.val["kl"] > 0 and done.teacher_val["acc"] >= 0


def test_without_a_teacher_terms_that_need_none_train():
    plain, smooth, soft = resnet(), resnet(), resnet()
    distilled(plain, loss={"ce": CrossEntropy()})
    distilled(smooth, loss="label_smoothing")
    distilled(soft, loss="dkd")  # which nobody can teach
    assert weights_hash(plain) == weights_hash(soft) != weights_hash(smooth)


OTHER = resnet(5)
WRONG = {
    "none of peers": (
        "mutual",
        None,
        "loss.terms.mutual looks at peers; accepted: kdlab.models.transforms.auxiliary.Peers(",
    ),
    "none of exits": (
        "byot",
        None,
        "loss.terms.exits_hint looks at exits; accepted: kdlab.models.transforms.auxiliary.Exits(",
    ),
    "of one's own terms": ({"peers": PeersCE(), "kl": MutualKL()}, None, "loss.terms.kl looks at peers; accepted: "),
    "another kind": ("byot", lambda net: Peers(net, [resnet(1)]), "looks at exits; accepted: "),
    "nobody looks": ("hinton", lambda net: Peers(net, [resnet(1)]), "peers, and no term of the loss looks at it; "),
    "another's": ("mutual", lambda net: Peers(OTHER, [resnet(1)]), "stands beside another network; accepted: "),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("taught", [False, True])
def test_a_companion_that_does_not_belong_is_one_line(name, taught):
    loss, make, said = WRONG[name]
    student = resnet()
    before = weights_hash(student)
    with pytest.raises(UserError) as error:
        distilled(student, resnet(2) if taught else None, loss=loss, auxiliary=make(student) if make else None)
    assert str(error.value).startswith("auxiliary: ") and said in str(error.value) and "\n" not in str(error.value)
    assert weights_hash(student) == before


def test_beside_peers_a_teacher_that_is_missing_is_named():
    student = resnet()
    with pytest.raises(UserError, match=r"^teacher: None, and the loss has terms that need one; accepted: a teacher"):
        distilled(student, None, loss=["hinton", "mutual"], auxiliary=Peers(student, [resnet(1)]))


def test_every_recipe_can_be_named():
    for path in sorted((shipped() / "loss").glob("*.yaml")):
        assert _objective(path.stem, None, None).names, path.stem


def test_networks_of_ones_own():
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 3)) for n in (32, 4))
    done = distilled(student, teacher, loss="dkd", temperature=4)
    assert done.student is student and done.seconds > 0 and set(done.teacher_val) >= {"acc", "ce"}
