"""Terms on relations against their papers' formulas in float64: value, gradient, edges, and a training of each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers.tiny import FEW, curve, train, weights
from kdlab.errors import UserError
from kdlab.experiment.distill import recipe
from kdlab.functional import (
    Batch,
    Outputs,
    SequenceBatch,
    channel_correlation,
    correlation_congruence,
    similarity_preserving,
)
from kdlab.functional.relation import rkd
from kdlab.losses import (
    ChannelCorrelation,
    CorrelationCongruence,
    Objective,
    ProbabilisticTransfer,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
)
from kdlab.losses.relation.relation import Relation
from kdlab.models.vision.resnet import CifarResNet

torch.set_num_threads(1)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(s, t):
    rows = len(s)
    return Outputs(torch.zeros(rows, 2), {"a": s}), Outputs(torch.zeros(rows, 2), {"b": t})


def batch(rows, **more):
    return Batch(torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64), **more)


def value(term, s, t, **more):
    return term(*outputs(s, t), batch(len(s), **more))


# ---- the papers' formulas, written over examples one by one


def paper_sp(s, t):
    def similarities(x):
        rows = []
        for i in range(len(x)):
            row = np.array([x[i] @ x[j] for j in range(len(x))])
            rows.append(row / np.sqrt((row**2).sum()))
        return np.array(rows)

    return ((similarities(s) - similarities(t)) ** 2).sum() / len(s) ** 2


def huber(gap):
    return gap**2 / 2 if abs(gap) <= 1 else abs(gap) - 0.5


def distinct(n, size):
    return [at for at in np.ndindex(*[n] * size) if len(set(at)) == size]


def paper_rkd_distance(s, t):
    pairs = distinct(len(s), 2)

    def psi(x):
        found = {(i, j): np.sqrt(((x[i] - x[j]) ** 2).sum()) for i, j in pairs}
        mean = sum(found.values()) / len(pairs)
        return {at: d / mean for at, d in found.items()}

    a, b = psi(s), psi(t)
    return sum(huber(a[at] - b[at]) for at in pairs) / len(pairs)


def paper_rkd_angle(s, t):
    triples = distinct(len(s), 3)

    def cosine(x, i, j, k):
        e, f = x[i] - x[j], x[k] - x[j]
        return (e @ f) / np.sqrt((e @ e) * (f @ f))

    return sum(huber(cosine(s, *at) - cosine(t, *at)) for at in triples) / len(triples)


def paper_cc(s, t, gamma=0.4, order=2):
    def kernel(a, b):
        cosine = (a @ b) / np.sqrt((a @ a) * (b @ b))
        return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1))

    pairs = [(i, j) for i in range(len(s)) for j in range(len(s))]
    return sum((kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i, j in pairs) / len(pairs)


def paper_pkt(s, t):
    n = len(s)

    def neighbours(x):
        k = {(i, j): ((x[i] @ x[j]) / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) + 1) / 2 for i, j in distinct(n, 2)}
        return {(i, j): k[i, j] / sum(k[i, m] for m in range(n) if m != i) for i, j in k}

    q, p = neighbours(s), neighbours(t)
    return sum(p[at] * math.log(p[at] / q[at]) for at in p) / (n * (n - 1))


RELATIONS = {
    "sp": (SimilarityPreserving, paper_sp),
    "rkd_distance": (RKDDistance, paper_rkd_distance),
    "rkd_angle": (RKDAngle, paper_rkd_angle),
    "cc": (CorrelationCongruence, paper_cc),
    "pkt": (ProbabilisticTransfer, paper_pkt),
}
each = pytest.mark.parametrize("name", RELATIONS)


def slope(reference, s, t, step=1e-6):
    """The reference's own gradient, by central differences."""
    grad = np.zeros_like(s)
    for at in np.ndindex(*s.shape):
        up, down = s.copy(), s.copy()
        up[at] += step
        down[at] -= step
        grad[at] = (reference(up, t) - reference(down, t)) / (2 * step)
    return grad


@each
@pytest.mark.parametrize("shape", [((5, 4), (5, 4)), ((6, 3), (6, 7)), ((4, 2, 2, 2), (4, 3, 4, 4))])
def test_the_papers_formula_and_its_gradient(name, shape):
    make, reference = RELATIONS[name]
    s, t = noise(*shape[0]), 2 * noise(*shape[1], seed=1)
    s.requires_grad_()
    got = value(make("a", "b"), s, t)
    assert got.shape == () and got.dtype == torch.float32
    wide_s, wide_t = (x.detach().double().flatten(1).numpy() for x in (s, t))
    assert got.item() == pytest.approx(reference(wide_s, wide_t), rel=2e-5, abs=1e-8)
    got.backward()
    expected = slope(reference, wide_s, wide_t)
    np.testing.assert_allclose(s.grad.flatten(1).numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@each
def test_float64_stays_float64(name):
    make, reference = RELATIONS[name]
    s, t = noise(5, 3).double(), noise(5, 4, seed=1).double()
    assert value(make("a", "b"), s, t).item() == pytest.approx(reference(s.numpy(), t.numpy()), rel=1e-12)


@each
def test_the_teacher_itself_is_the_minimum_at_any_scale(name):
    make, _ = RELATIONS[name]
    s = noise(6, 5).requires_grad_()
    for scale in (1.0, 3.0):
        got = value(make("a", "b"), s, scale * s.detach())
        assert abs(got.item()) < 1e-8
        (grad,) = torch.autograd.grad(got, s)
        assert grad.abs().max() < 1e-6
    assert value(make("a", "b"), s, noise(6, 5, seed=3)) > 1e-4


@each
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows_have_few_relations(name, rows):
    make, _ = RELATIONS[name]
    s = noise(rows, 4).requires_grad_()
    got = value(make("a", "b"), s, noise(rows, 3, seed=1))
    got.backward()
    assert got.isfinite() and s.grad.isfinite().all()
    if rows < 2 or name in ("rkd_distance", "rkd_angle", "pkt"):  # one distance is the mean; one neighbour is certain
        assert got.item() == pytest.approx(0, abs=1e-12)


@each
@pytest.mark.parametrize("case", ["two equal", "all equal", "zeros", "a zero row", "opposite", "tiny", "huge"])
def test_degenerate_rows_keep_value_and_gradient_finite(name, case):
    make, _ = RELATIONS[name]
    s, t = noise(5, 4), noise(5, 6, seed=1)
    if case == "two equal":
        s[1] = s[0]
    elif case == "all equal":
        s[:] = s[0].clone()
    elif case == "zeros":
        s.zero_()
    elif case == "a zero row":
        s[2] = 0
    elif case == "opposite":
        s[1] = -s[0]
    else:
        s *= 1e-12 if case == "tiny" else 1e12
    for student, teacher in ((s, t), (s, s), (t, s)):
        student = student.clone().requires_grad_()
        got = value(make("a", "b"), student, teacher)
        got.backward()
        assert got.isfinite() and student.grad.isfinite().all(), (name, case)
        if case not in ("tiny", "huge"):
            assert student.grad.abs().max() < 10


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(name, dtype):
    make, _ = RELATIONS[name]
    s, t = noise(6, 5).to(dtype).requires_grad_(), noise(6, 4, seed=1).to(dtype)
    expected = value(make("a", "b"), s.detach().float(), t.float())
    got = value(make("a", "b"), s, t)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value(make("a", "b"), s, t), expected, rtol=1e-6, atol=0)
    got.backward()
    assert s.grad.dtype == dtype and s.grad.isfinite().all()


@each
def test_rows_of_weight_0_take_no_part_and_rows_without_a_label_do(name):
    make, _ = RELATIONS[name]
    s, t = noise(7, 5), noise(7, 4, seed=1)
    whole = value(make("a", "b"), s, t)
    padded_s, padded_t = torch.cat([s, torch.full((2, 5), math.nan)]), torch.cat([t, torch.zeros(2, 4)])
    weight = torch.tensor([1.0] * 7 + [0.0] * 2)
    torch.testing.assert_close(value(make("a", "b"), padded_s, padded_t, weight=weight), whole)
    unlabelled = Batch(torch.zeros(7, 1), torch.full((7,), -100))
    torch.testing.assert_close(make("a", "b")(*outputs(s, t), unlabelled), whole)
    total = Objective({"x": make("a", "b", weight=2.0)})(*outputs(s, t), unlabelled).total
    torch.testing.assert_close(total, 2 * whole)


@each
def test_pairs_of_layers_are_summed_and_positions_of_sequences_are_rows(name):
    make, _ = RELATIONS[name]
    s, t = noise(5, 4), noise(5, 3, seed=1)
    student, teacher = outputs(s, t)
    student.features["c"], teacher.features["d"] = t, s
    both = make(["a", "c"], ["b", "d"])(student, teacher, batch(5))
    torch.testing.assert_close(both, value(make("a", "b"), s, t) + value(make("a", "b"), t, s))
    where = torch.tensor([[True, True, False], [True, True, True]])
    long_s, long_t = torch.zeros(2, 3, 4), torch.zeros(2, 3, 3)
    long_s[where], long_t[where] = s, t
    picked = make("a", "b")(
        *outputs(long_s, long_t), SequenceBatch(torch.zeros(5, 1), torch.zeros(5).long(), loss_mask=where)
    )
    torch.testing.assert_close(picked, value(make("a", "b"), s, t))


def test_angles_in_parts_are_the_same(monkeypatch):
    s, t = noise(9, 5).requires_grad_(), noise(9, 4, seed=1)
    whole = value(RKDAngle("a", "b"), s, t)
    (grad,) = torch.autograd.grad(whole, s)
    monkeypatch.setattr(rkd, "AT_ONCE", 9 * 9 * 2)
    parts = value(RKDAngle("a", "b"), s, t)
    (again,) = torch.autograd.grad(parts, s)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(again, grad)


def test_the_expansion_tends_to_the_kernel():
    x = noise(6, 5).double()
    x = x / x.norm(dim=1, keepdim=True)
    gaussian = torch.exp(-0.4 * torch.cdist(x, x).square())
    y = noise(6, 5, seed=1).double()
    y = y / y.norm(dim=1, keepdim=True)
    expected = (gaussian - torch.exp(-0.4 * torch.cdist(y, y).square())).square().mean()
    torch.testing.assert_close(correlation_congruence(x, y, order=20), expected)
    assert value(CorrelationCongruence("a", "b", gamma=0.7, order=5), x, y).item() == pytest.approx(
        paper_cc(x.numpy(), y.numpy(), 0.7, 5)
    )


# ---- ICKD ------------------------------------------------------------------------------------------------------------


def paper_ickd(s, t):
    """Of (C, HW) channels of one example."""

    def correlations(f):
        g = np.array([[a @ b for b in f] for a in f])
        return g / np.sqrt((g**2).sum(1, keepdims=True))

    return ((correlations(s) - correlations(t)) ** 2).sum() / len(s)


def test_ickd():
    s, t = noise(3, 4, 2, 2).requires_grad_(), noise(3, 6, 4, 4, seed=1)
    term = ChannelCorrelation("a", "b")
    with pytest.raises(UserError, match="prepare"):
        value(term, s, t)
    term.prepare(*outputs(s, t))
    made = term.projectors[0]
    term.prepare(*outputs(s, t))
    assert term.projectors[0] is made
    weight, bias = (p.detach().double().numpy() for p in made.parameters())

    def reference(x, y):
        projected = np.einsum("oc,bcp->bop", weight[:, :, 0, 0], x.reshape(3, 4, 4)) + bias[:, None]
        return [paper_ickd(a, b) for a, b in zip(projected, y.reshape(3, 6, 16), strict=True)]

    wide_s, wide_t = s.detach().double().numpy(), t.double().numpy()
    got = value(term, s, t)
    np.testing.assert_allclose(got.detach().numpy(), reference(wide_s, wide_t), rtol=1e-4)
    got.sum().backward()
    expected = slope(lambda a, b: sum(reference(a, b)), wide_s, wide_t)
    np.testing.assert_allclose(s.grad.numpy(), expected, rtol=1e-3, atol=1e-5)
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = value(term, s.detach().bfloat16(), t.bfloat16())
    assert rough.dtype == torch.float32
    np.testing.assert_allclose(rough.detach().numpy(), got.detach().numpy(), rtol=5e-2)
    half = value(term, s.detach().half(), t.half())
    np.testing.assert_allclose(half.detach().numpy(), got.detach().numpy(), rtol=5e-3)


def test_ickd_is_0_for_the_projected_student_and_finite_for_dead_channels():
    s = noise(3, 4, 2, 2)
    term = ChannelCorrelation("a", "b")
    term.prepare(*outputs(s, noise(3, 6, 2, 2)))
    assert value(term, s, 2 * term.projectors[0](s).detach()).abs().max() < 1e-10
    dead = torch.zeros(3, 4, 2, 2, requires_grad=True)
    torch.nn.init.zeros_(term.projectors[0].bias)
    got = value(term, dead, torch.zeros(3, 6, 2, 2))
    got.sum().backward()
    assert got.abs().max() == 0 and dead.grad.abs().max() == 0
    one = value(term, s[:1], noise(1, 6, 3, 3))
    assert one.shape == (1,) and one.isfinite().all()


# ---- arguments and configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: CorrelationCongruence("a", "b", gamma=0), "gamma: 0"),
        (lambda: CorrelationCongruence("a", "b", gamma=math.nan), "gamma: nan"),
        (lambda: CorrelationCongruence("a", "b", order=0), "order: 0"),
        (lambda: CorrelationCongruence("a", "b", order=1.5), "order: 1.5"),
        (lambda: value(SimilarityPreserving("x", "b"), noise(2, 3), noise(2, 3)), "student_layer: no output of layer"),
        (
            lambda: SimilarityPreserving("a", "b")(*outputs(noise(6, 3), noise(6, 3)), batch(3)),
            "student_layer, teacher_layer: an output of shape (6, 3)",
        ),
        (
            lambda: ChannelCorrelation("a", "b").prepare(*outputs(noise(2, 3), noise(2, 3))),
            "student_layer, teacher_layer: inter-channel correlation takes feature maps",
        ),
    ],
)
def test_mistakes_are_one_line(act, says):
    with pytest.raises(UserError) as caught:
        act()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="differ in rows: 3 and 2"):
        similarity_preserving(noise(3, 2), noise(2, 2))
    with pytest.raises(ValueError, match="differ in channels: 3 and 4"):
        channel_correlation(noise(2, 3, 2, 2), noise(2, 4, 2, 2))
    with pytest.raises(TypeError, match="define distance"):
        value(Relation("a", "b"), noise(2, 2), noise(2, 2))


def test_recipes_combine_and_a_doubled_term_is_an_error():
    assert recipe(["rkd_distance", "rkd_angle"]) == recipe("rkd")
    found = recipe(["hinton", "sp", "rkd", "cc", "pkt", "ickd", "crd"])
    assert list(found["terms"]) == ["kl", "sp", "rkd_distance", "rkd_angle", "cc", "pkt", "ickd", "crd"]
    with pytest.raises(UserError, match="fills the term 'rkd_angle' again"):
        recipe(["rkd", "rkd_angle"])


def test_all_train_beside_each_other(place):
    lower = ("optimizer.lr=0.01", "baseline=false", "experiment=kd_resnet", *FEW, "epochs=6")
    run = train(place, "relations", *lower, "loss=[sp,rkd,cc,pkt,ickd]")
    assert weights(run).keys() == CifarResNet(8, 4, in_channels=1).state_dict().keys(), "projectors are not exported"
    for name in ("sp", "rkd_distance", "rkd_angle", "cc", "pkt", "ickd"):
        points = curve(run, f"train/{name}")
        assert np.isfinite(points).all(), name
        assert np.mean(points[-4:]) < np.mean(points[:4]), (name, points)
