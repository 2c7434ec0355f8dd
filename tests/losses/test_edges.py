"""Losses at the edges of their range: masked classes, dead layers, one class, one row, rows that do not count."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kdlab import functional as fn
from kdlab import losses as L
from kdlab.functional import NO_LABEL, Batch, Outputs
from kdlab.models.transforms.auxiliary import Exits

torch.set_num_threads(1)
inf = float("inf")


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rows(targets: list[int], **more: Tensor) -> Batch:
    return Batch(torch.zeros(len(targets), 1), torch.tensor(targets), **more)


# ---- classes of probability exactly 0


def test_decoupled_parts_of_a_teacher_that_leaves_the_other_classes_nothing():
    student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, -inf, -inf]])
    target, others = fn.decoupled_kl(student, teacher, torch.tensor([0]))
    assert target.item() == pytest.approx(fn.kl(student, teacher).item(), rel=1e-6) and others.item() == 0


@pytest.mark.parametrize("term", [L.DKD, L.NKD])
@pytest.mark.parametrize("masked", [[1, 2, 3], [2, 3], [0, 1, 2, 3]])
def test_a_row_without_a_label_poisons_no_gradient(term: type, masked: list[int]):
    student = logits(3, 4).requires_grad_()
    teacher = logits(3, 4, seed=1)
    teacher[:, masked] = -inf
    teacher[:, 0] = 0.0
    total = L.Objective({"x": term()})(Outputs(student), Outputs(teacher), rows([NO_LABEL, 1, 2])).total
    (gradient,) = torch.autograd.grad(total, student)
    assert total.isfinite() and gradient.isfinite().all() and (gradient[0] == 0).all()


def test_two_classes_of_which_one_is_masked():
    student = torch.tensor([[1.0, -inf]], requires_grad=True)
    value = L.DKD()(Outputs(student), Outputs(torch.tensor([[2.0, -inf]])), rows([0]))
    value.sum().backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6) and student.grad is not None and student.grad.isfinite().all()


def test_decoupled_parts_still_add_up_to_kl():
    student, teacher, targets = logits(6, 5).double(), logits(6, 5, seed=1).double(), torch.arange(6) % 5
    target, others = fn.decoupled_kl(student, teacher, targets)
    share = 1 - teacher.softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(target + share * others, fn.kl(student, teacher))


OUTPUT_TERMS = {
    "ce": L.CrossEntropy,
    "smooth": partial(L.CrossEntropy, 0.1),
    "kl": L.KL,
    "class mean": partial(L.KL, class_mean=True),
    "reverse": L.ReverseKL,
    "symmetric": L.SymmetricKL,
    "skew": L.SkewKL,
    "skew reverse": L.SkewReverseKL,
    "jsd": L.JSD,
    "tv": L.TotalVariation,
    "mse": L.LogitMSE,
    "wsld": L.WSLD,
    "dkd": L.DKD,
    "nkd": L.NKD,
    "dist": L.DISTInter,
    "dist intra": L.DISTIntra,
    "mlld": L.MLLDInstance,
    "mlld batch": L.MLLDBatch,
    "mlld class": L.MLLDClass,
    "penalty": L.ConfidencePenalty,
    "tf_kd": L.TfKD,
    "uskd": L.USKD,
    "discriminator": L.Discriminator,
    "several": L.MultiTeacherKL,
}
LEARNED = partial(L.LearnedTemperature, until=0.1)
TEMPERATURES = {"1": lambda: 1.0, "4": lambda: 4.0, "learned": LEARNED, "standardized": L.StandardizedTemperature}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", OUTPUT_TERMS)
def test_a_class_masked_in_both_leaves_value_and_gradients_finite(name: str, temperature: str):
    student, teacher = logits(4, 5), logits(4, 5, seed=1)
    student[:, 2] = teacher[:, 2] = -inf
    student.requires_grad_()
    torch.manual_seed(0)
    objective = L.Objective({"x": OUTPUT_TERMS[name]()}, temperature=TEMPERATURES[temperature]())
    objective.progress = 0.5
    taught = Outputs(teacher, heads={"member_0": teacher, "member_1": teacher.flip(0)})
    objective.prepare(Outputs(student.detach()), taught)
    total = objective(Outputs(student), taught, rows([0, 1, 3, NO_LABEL])).total
    total.backward()
    assert total.isfinite() and total < 1e6
    assert student.grad is not None and student.grad.isfinite().all() and (student.grad[:, 2] == 0).all()
    for parameter in objective.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("soft", [False, True])
def test_smoothing_spreads_over_the_classes_that_are_there(soft: bool):
    z = logits(3, 4)
    without = torch.cat([z[:, :2], z[:, 3:]], 1)
    z[:, 2] = -inf
    ids = torch.tensor([0, 1, 2])
    targets, short = (torch.tensor([0, 1, 3]), ids) if not soft else (torch.eye(4)[[0, 1, 3]], torch.eye(3))
    torch.testing.assert_close(fn.cross_entropy(z, targets, 0.1), fn.cross_entropy(without, short, 0.1))
    expected = nn.functional.cross_entropy(without.double(), ids, reduction="none", label_smoothing=0.1).float()
    torch.testing.assert_close(fn.cross_entropy(z, targets, 0.1), expected)


def test_differences_of_logits_leave_masked_classes_out():
    s, t = torch.tensor([[1.0, -inf, 3.0]]), torch.tensor([[2.0, -inf, 5.0]])
    assert fn.logit_squared_error(s, t).item() == pytest.approx((1 + 4) / 2)
    assert fn.logit_squared_error(torch.tensor([[1.0, 7.0, 3.0]]), t).item() == pytest.approx((1 + 4) / 2)
    assert fn.logit_squared_error(torch.tensor([[-inf]]), torch.tensor([[-inf]])).item() == 0


def test_scores_of_a_row_leave_masked_classes_out():
    z = logits(3, 6)
    scores = fn.standardize(torch.cat([z, torch.full((3, 1), -inf)], 1))
    torch.testing.assert_close(scores[:, :6], fn.standardize(z))
    assert (scores[:, 6] == -inf).all()


def test_a_learned_temperature_with_a_masked_class_learns_as_without_it():
    def slope(masked: bool) -> Tensor:
        learned = LEARNED()
        objective = L.Objective({"kl": L.KL()}, temperature=learned)
        objective.progress = 0.5
        z, t = logits(4, 3), logits(4, 3, seed=1)
        if masked:
            z, t = (torch.cat([x, torch.full((4, 1), -inf)], 1) for x in (z, t))
        objective(Outputs(z), Outputs(t), rows([0, 1, 2, 0])).total.backward()
        assert learned.theta.grad is not None
        return learned.theta.grad

    torch.testing.assert_close(slope(True), slope(False))


# ---- layers that are dead, rows that do not count, one of anything


def test_factors_of_zeros_get_no_gradient():
    dead = torch.zeros(2, 9, requires_grad=True)
    target = logits(2, 9)
    value = fn.factor_distance(dead, target)
    value.mean().backward()
    torch.testing.assert_close(value, (target / target.norm(dim=1, keepdim=True)).abs().mean(1))
    assert dead.grad is not None and (dead.grad == 0).all()


def test_uskd_counts_rows_of_weight_zero_nowhere():
    z = logits(4, 5)
    objective = L.Objective({"x": L.USKD()})
    weighed = objective(Outputs(z), None, rows([0, 1, 2, 3], weight=torch.tensor([1.0, 1, 0, 0]))).total
    torch.testing.assert_close(weighed, objective(Outputs(z[:2]), None, rows([0, 1])).total)


@pytest.mark.parametrize("term", [partial(L.OFD, margin="batch"), L.ActivationBoundary, L.FactorTransfer])
def test_a_batch_of_one_row_on_maps_of_one_pixel(term):
    made = term("x", "x")
    made.train()
    many = Outputs(logits(4, 3), {"x": logits(4, 6, 1, 1)})
    made.prepare(many, many)
    made(many, many, rows([0, 1, 2, 0]))
    one = Outputs(logits(1, 3), {"x": logits(1, 6, 1, 1)})
    assert made(one, one, rows([0])).isfinite().all()


def test_exits_take_a_batch_of_one_row():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    exits = Exits(net, ["0"], torch.zeros(2, 1, 2, 2))
    exits.train()
    for count in (4, 1):
        assert all(value.isfinite().all() for value in exits.answers(logits(count, 1, 2, 2)).values())


def test_one_class_costs_nothing_without_a_teacher():
    value = L.TfKD()(Outputs(torch.randn(2, 1)), None, rows([0, 0]))
    assert (value == 0).all()


def test_relations_of_singular_vectors_do_not_depend_on_their_sign(monkeypatch: pytest.MonkeyPatch):
    student = {name: logits(2, 4, 3, 3, seed=n) for n, name in enumerate("ab")}
    teacher = Outputs(logits(2, 3), {name: logits(2, 4, 3, 3, seed=n + 5) for n, name in enumerate("ab")})
    term = L.KDSVD(["a", "b"], ["a", "b"], components=2)
    term.prepare(Outputs(logits(2, 3), student), teacher)

    def outcome() -> tuple[Tensor, Tensor]:
        leaf = {name: x.clone().requires_grad_() for name, x in student.items()}
        value = term(Outputs(logits(2, 3), leaf), teacher, rows([0, 1])).sum()
        return value.detach(), torch.autograd.grad(value, leaf["a"])[0]

    before = outcome()
    plain = fn.right_singular_vectors

    def flipped(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        vectors, values = plain(x, count)
        signs = torch.where(torch.arange(vectors.shape[-1]) % 2 == 0, -1.0, 1.0)
        return vectors * signs, values

    monkeypatch.setattr("kdlab.losses.feature.svd.right_singular_vectors", flipped)
    for found, wanted in zip(outcome(), before, strict=True):
        torch.testing.assert_close(found, wanted)
    monkeypatch.setattr("kdlab.losses.feature.svd.turned_positive", lambda vectors: vectors)
    assert not torch.allclose(outcome()[0], before[0], rtol=1e-3)  # without the rule the sign does matter


# ---- what published code does


def test_kl_by_the_scale_of_torchs_default():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    value = L.KL(temperature=3.0, class_mean=True)(Outputs(student), Outputs(teacher), rows([0] * 6)).mean()
    theirs = nn.KLDivLoss(reduction="mean")((student / 3).log_softmax(1), (teacher / 3).softmax(1)) * 9
    torch.testing.assert_close(value, theirs)


@pytest.mark.parametrize("epoch", [1, 3, 10, 11, 240])
def test_the_published_course_of_a_learned_temperature(epoch: int):
    import math

    learned = L.LearnedTemperature()
    assert learned.now == pytest.approx(1 + 20 / (1 + math.exp(-1)), rel=1e-3)
    learned.progress = epoch / 240
    wanted = 1.0 if epoch >= 10 else (1 - math.cos(math.pi * epoch / 10)) / 2
    assert learned.strength(learned.progress) == pytest.approx(wanted)
