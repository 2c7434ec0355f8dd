"""Terms that fuse layers, read them with the teacher's classifier, decompose them, or give them branches to logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from helpers.tiny import FEW, curve, train, weights
from helpers.tiny import place as place
from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    align_singular_vectors,
    enhanced_target,
    hierarchical_context,
    right_singular_vectors,
)
from kdlab.losses import KDSVD, OFA, SRRL, Objective, ReviewKD, Term
from kdlab.losses.feature.ofa import branch
from kdlab.models import CifarResNet
from kdlab.models.vision.blocks import BatchNorm

torch.set_num_threads(1)
LABELS = torch.tensor([1, 0, 2, 1])
ROWS = len(LABELS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Head(nn.Module):
    """A teacher of which a term sees the classifier."""

    def __init__(self, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes).double()


@dataclass
class Case:
    """A term, ready, with inputs and the paper's formula in numpy."""

    term: Term
    student: dict[str, torch.Tensor]
    teacher: dict[str, torch.Tensor]
    ours: torch.Tensor = field(default_factory=lambda: normal(ROWS, 3, seed=8))
    theirs: torch.Tensor = field(default_factory=lambda: normal(ROWS, 3, seed=9))

    def __post_init__(self) -> None:
        torch.manual_seed(3)
        self.term.setup(Head(), Head(), None)
        self.term.prepare(Outputs(self.ours, self.student), Outputs(self.theirs, self.teacher))
        self.term.double()
        with torch.no_grad():  # BatchNorm's scale and shift start at 1 and 0, where a mistake in them would not show
            for p in self.term.parameters():
                p.add_(0.1 * torch.randn_like(p))

    def __call__(self, dtype=torch.float64, targets=LABELS, rows=slice(None)) -> torch.Tensor:
        def cast(features):
            return {name: value[rows].to(dtype) for name, value in features.items()}

        student = Outputs(self.ours[rows].to(dtype), cast(self.student))
        teacher = Outputs(self.theirs[rows].to(dtype), cast(self.teacher))
        return self.term(student, teacher, Batch(torch.zeros(len(targets[rows]), 1), targets[rows]))

    def expected(self, name: str) -> np.ndarray:
        arrays = [{k: v.detach().numpy() for k, v in f.items()} for f in (self.student, self.teacher)]
        state = {k: v.detach().numpy() for k, v in self.term.state_dict().items()}
        return REFERENCES[name](self.term, state, *arrays, self.ours.detach().numpy(), self.theirs.numpy())


def review() -> Case:
    student = {"a": normal(ROWS, 3, 8, 8), "b": normal(ROWS, 4, 4, 4, seed=1), "p": normal(ROWS, 6, seed=2)}
    teacher = {"a": normal(ROWS, 5, 8, 8, seed=3), "b": normal(ROWS, 4, 8, 8, seed=4), "p": normal(ROWS, 7, seed=5)}
    return Case(ReviewKD(["a", "b", "p"], ["a", "b", "p"]), student, teacher)


def srrl() -> Case:
    return Case(SRRL("p", "p", regression=0.7), {"p": normal(ROWS, 4)}, {"p": normal(ROWS, 5, seed=1).abs()})


def svd() -> Case:
    student = {"a": normal(ROWS, 3, 4, 4), "b": normal(ROWS, 6, 2, 2, seed=1), "c": normal(ROWS, 5, 3, 2, seed=2)}
    teacher = {
        "a": normal(ROWS, 4, 4, 4, seed=3),
        "b": normal(ROWS, 6, 2, 2, seed=4),
        "c": normal(ROWS, 5, 3, 2, seed=5),
    }
    return Case(KDSVD(["a", "b", "c"], ["a", "b", "c"], components=2), student, teacher)


def ofa() -> Case:
    student = {"a": normal(ROWS, 2, 8, 8), "b": normal(ROWS, 6, 4, 4, seed=1), "p": normal(ROWS, 4, seed=2)}
    return Case(OFA(["a", "p", "b"], gamma=1.5), student, {})


CASES = {"review": review, "srrl": srrl, "svd": svd, "ofa": ofa}
every = pytest.mark.parametrize("name", CASES)


# ---- the papers' formulas --------------------------------------------------------------------------------------------


def conv(x, w, stride=1, pad=0, depthwise=False):
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,cij->bchw", windows, w[:, 0]) if depthwise else np.einsum("bchwij,ocij->bohw", windows, w)


def norm(x, state, key):
    axes = (0,) if x.ndim == 2 else (0, 2, 3)
    shape = (1, -1) if x.ndim == 2 else (1, -1, 1, 1)
    x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    return x * state[f"{key}.weight"].reshape(shape) + state[f"{key}.bias"].reshape(shape)


def pooled(x, side):
    rows, channels, h, w = x.shape
    return x.reshape(rows, channels, side, h // side, side, w // side).mean((3, 5))


def paper_hcl(s, t):
    parts, shares = [((s - t) ** 2).reshape(len(s), -1).mean(1)], [1.0]
    for side in (4, 2, 1):
        if side < s.shape[2]:
            parts.append(((pooled(s, side) - pooled(t, side)) ** 2).reshape(len(s), -1).mean(1))
            shares.append(shares[-1] / 2)
    return sum(a * b for a, b in zip(parts, shares, strict=True)) / sum(shares)


def paper_review(term, state, s, t, ours, theirs):
    total, handed = 0, None
    teacher = {"a": t["a"], "b": pooled(t["b"], 4), "p": t["p"][:, :, None, None]}
    for n, layer in ((2, "p"), (1, "b"), (0, "a")):
        x = s[layer] if s[layer].ndim == 4 else s[layer][:, :, None, None]
        x = norm(conv(x, state[f"fusions.{n}.narrow.0.weight"]), state, f"fusions.{n}.narrow.1")
        if handed is not None:
            times = x.shape[2] // handed.shape[2]
            below = handed.repeat(times, 2).repeat(times, 3)
            bias = state[f"fusions.{n}.attention.bias"][None, :, None, None]
            z = conv(np.concatenate([x, below], 1), state[f"fusions.{n}.attention.weight"]) + bias
            share = 1 / (1 + np.exp(-z))
            x = x * share[:, :1] + below * share[:, 1:]
        handed = x
        wide = norm(conv(x, state[f"fusions.{n}.widen.0.weight"], pad=1), state, f"fusions.{n}.widen.1")
        total = total + paper_hcl(wide, teacher[layer])
    return total


def paper_srrl(term, state, s, t, ours, theirs):
    h = np.maximum(norm(s["p"] @ state["connector.0.weight"].T, state, "connector.1"), 0)
    head = term._classifier[0]
    read = h @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    return ((h - t["p"]) ** 2).mean(1) + 0.7 * ((read - theirs) ** 2).mean(1)


def paper_svd(term, state, s, t, ours, theirs):
    k, values = term.components, []
    for row in range(ROWS):
        ours_, theirs_ = [], []
        for n, layer in enumerate(("a", "b", "c")):
            x, y = s[layer][row], t[layer][row]
            if f"projectors.{n}.weight" in state:
                w, b = state[f"projectors.{n}.weight"][:, :, 0, 0], state[f"projectors.{n}.bias"]
                x = np.einsum("oc,chw->ohw", w, x) + b[:, None, None]
            vs = np.linalg.svd(x.reshape(len(x), -1).T)[2][: k + 3]
            _, sigma, vt = np.linalg.svd(y.reshape(len(y), -1).T)
            sigma, vt = sigma[:k] / np.sqrt((sigma[:k] ** 2).sum()), vt[:k]
            vt = np.array([v if v[np.abs(v).argmax()] > 0 else -v for v in vt])
            best = [max(vs[: min(x[0].size, len(x))], key=lambda v, u=u: abs(v @ u)) for u in vt]
            chosen = [v if v @ u > 0 else -v for v, u in zip(best, vt, strict=True)]
            ours_.append(sigma[:, None] * np.array(chosen))
            theirs_.append(sigma[:, None] * vt)
        total = 0.0
        for n in (0, 1):
            for i in range(k):
                g = [np.exp(-((v[n][i][:, None] - v[n + 1][i][None, :]) ** 2) / 8) for v in (ours_, theirs_)]
                total += ((g[0] - g[1]) ** 2).sum()
        values.append(total)
    return np.array(values)


def paper_ofa(term, state, s, t, ours, theirs):
    def log_p(z):
        return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))

    def separable(x, key):
        for at, stride in ((0, 2), (4, 1)):
            x = conv(x, state[f"{key}.{at}.weight"], stride, 1, depthwise=True)
            x = np.maximum(norm(conv(x, state[f"{key}.{at + 1}.weight"]), state, f"{key}.{at + 2}"), 0)
        return x

    def linear(x, key):
        return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    exits = [
        linear(separable(s["a"], "branches.0.0").mean((2, 3)), "branches.0.3"),
        linear(s["p"], "branches.1.0"),
        linear(s["b"].mean((2, 3)), "branches.2.2"),
    ]
    y, p, total = LABELS.numpy(), np.exp(log_p(theirs)), np.zeros(ROWS)
    for z in [*exits, ours]:
        for row in range(ROWS):
            q = log_p(z)[row]
            others = [c for c in range(3) if c != y[row]]
            total[row] -= (1 + p[row, y[row]]) ** 1.5 * q[y[row]] + sum(p[row, c] * q[c] for c in others)
    return total + log_p(ours)[range(ROWS), y]


REFERENCES = {"review": paper_review, "srrl": paper_srrl, "svd": paper_svd, "ofa": paper_ofa}


# ---- what all of them must do ----------------------------------------------------------------------------------------


@every
def test_value_and_gradient_are_the_papers(name, monkeypatch):
    # without what keeps the gradient of near-equal singular values finite
    monkeypatch.setattr(
        "kdlab.losses.feature.svd.right_singular_vectors", partial(right_singular_vectors, broadening=1e-9)
    )
    case = CASES[name]()
    inputs = {**case.student, **({"logits": case.ours} if name == "ofa" else {})}
    for x in inputs.values():
        x.requires_grad_()
    got = case()
    assert got.shape == (ROWS,)
    np.testing.assert_allclose(got.detach().numpy(), case.expected(name), rtol=1e-9)
    grads = torch.autograd.grad((got * torch.arange(1, ROWS + 1)).sum(), list(inputs.values()))
    for seed in range(4):  # along random directions, by differences of the reference
        ways = [normal(*x.shape, seed=20 + seed + 7 * n) for n, x in enumerate(inputs.values())]
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                for x, way in zip(inputs.values(), ways, strict=True):
                    x.add_(step * way)
                sides.append((case.expected(name) * np.arange(1, ROWS + 1)).sum())
                for x, way in zip(inputs.values(), ways, strict=True):
                    x.sub_(step * way)
        slope = sum(float((g * way).sum()) for g, way in zip(grads, ways, strict=True))
        assert slope == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6, abs=1e-7)


@every
def test_half_precision_and_autocast(name):
    case = CASES[name]()
    case.term.float()
    if name == "srrl":
        case.term._classifier[0].float()
    exact = case(torch.float32).detach()
    for dtype in (torch.float16, torch.bfloat16):
        got = case(dtype)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.detach(), exact, rtol=5e-2, atol=2e-2)
        got.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in case.term.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case(torch.float32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.detach(), exact, rtol=5e-2, atol=2e-2)


@every
def test_what_trains_is_made_once_and_trains(name):
    case = CASES[name]()
    made = list(case.term.parameters())
    assert made
    case.term.prepare(Outputs(case.ours, case.student), Outputs(case.theirs, case.teacher))
    assert [id(p) for p in case.term.parameters()] == [id(p) for p in made]
    case().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made)
    assert not any("classifier" in key for key in case.term.state_dict())


@every
def test_rows_without_a_label_and_a_single_row(name):
    case = CASES[name]()
    for targets in (torch.full((ROWS,), -100), torch.zeros(ROWS, 3)):
        value = case(targets=targets)
        assert value.shape == (ROWS,) and value.isfinite().all()
    alone = case(rows=slice(0, 1))  # BatchNorm has nothing to average over
    assert alone.shape == (1,) and alone.isfinite().all()
    assert (case.term.rows == "labelled") == (name == "ofa") and case.term.role == "other" and not case.term.rowwise


@every
def test_a_term_that_was_not_prepared_says_so(name):
    fresh = {
        "review": ReviewKD("a", "a"),
        "srrl": SRRL("p", "p"),
        "svd": KDSVD(["a", "b"], ["a", "b"]),
        "ofa": OFA("a"),
    }
    case = CASES[name]()
    with pytest.raises(UserError, match="prepare"):
        replace_term(case, fresh[name])()


def replace_term(case: Case, term: Term) -> Any:
    made = object.__new__(Case)
    made.__dict__.update(case.__dict__, term=term)
    return made


# ---- ReviewKD --------------------------------------------------------------------------------------------------------


def test_review_is_zero_where_the_fused_student_is_the_teacher():
    case = review()
    fused = None
    for fusion, layer in ((case.term.fusions[2], "p"), (case.term.fusions[1], "b"), (case.term.fusions[0], "a")):
        x = case.student[layer]
        made, fused = fusion(x if x.ndim == 4 else x[:, :, None, None], fused)
        case.teacher[layer] = made.detach() if x.ndim == 4 else made.detach()[:, :, 0, 0]
    assert case().abs().max() < 1e-20


def test_hierarchical_context_weighs_coarse_differences_more():
    still = torch.zeros(1, 1, 8, 8)
    board = torch.ones(8, 8)
    board[::2, 1::2] = board[1::2, ::2] = -1
    fine = hierarchical_context(board[None, None], still)  # averages out on every coarser grid
    assert fine.item() == pytest.approx(1 / 1.875)
    assert hierarchical_context(torch.ones(1, 1, 8, 8), still).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="differ in shape"):
        hierarchical_context(still, torch.zeros(1, 1, 1, 8))


def test_review_takes_layers_from_shallow_to_deep():
    student = Outputs(normal(2, 3), {"a": normal(2, 3, 4, 4), "b": normal(2, 3, 8, 8), "c": normal(2, 3, 5)})
    with pytest.raises(UserError, match=r"grids of side \[4, 8\]; accepted: layers from the shallowest"):
        ReviewKD(["a", "b"], ["a", "b"]).prepare(student, student)
    with pytest.raises(UserError, match="ReviewKD takes feature maps"):
        ReviewKD("c", "c").prepare(student, student)


# ---- SRRL ------------------------------------------------------------------------------------------------------------


def test_srrl_is_zero_where_the_connected_student_is_the_teacher():
    case = srrl()
    case.teacher["p"] = case.term.connector(case.student["p"]).detach()
    case.theirs = case.term._classifier[0](case.teacher["p"]).detach()
    assert case().abs().max() < 1e-20


def test_srrl_never_trains_or_saves_the_teachers_classifier():
    case = srrl()
    case().sum().backward()
    head = case.term._classifier[0]
    assert head.weight.grad is None and head.bias.grad is None
    assert not any(head is module for module in case.term.modules())


def test_srrl_refuses_what_the_classifier_does_not_read():
    ours, wide = Outputs(normal(2, 3), {"p": normal(2, 4)}), Outputs(normal(2, 3), {"p": normal(2, 6).abs()})
    with pytest.raises(UserError, match="setup"):
        SRRL("p", "p").prepare(ours, wide)

    def met(teacher, **settings):
        term = SRRL("p", "p", **settings)
        term.setup(Head(), teacher, None)
        return term

    with pytest.raises(UserError, match="teacher: its classifier cannot be seen"):
        met(None)
    with pytest.raises(UserError, match="'0' is a Conv2d; accepted: a linear layer"):
        met(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(UserError, match=r"teacher_layer: p has 6 numbers.*reads 5"):
        met(Head()).prepare(ours, wide)
    with pytest.raises(UserError, match="takes the vectors"):
        maps = Outputs(normal(2, 3), {"p": normal(2, 5, 2, 2)})
        met(Head()).prepare(maps, maps)
    negative = Outputs(normal(2, 3), {"p": -normal(2, 5).abs()})
    with pytest.raises(UserError, match=r"relu: true.*accepted: false"):
        met(Head()).prepare(ours, negative)
    plain = met(Head(), relu=False)
    plain.prepare(ours, negative)
    assert not any(isinstance(module, nn.ReLU) for module in plain.modules())


# ---- KD-SVD ----------------------------------------------------------------------------------------------------------


def test_svd_is_zero_for_the_teachers_own_features():
    same = {"a": normal(ROWS, 5, 4, 4).requires_grad_(), "b": normal(ROWS, 5, 2, 2, seed=1).requires_grad_()}
    case = Case.__new__(Case)
    term = KDSVD(["a", "b"], ["a", "b"], components=2)
    case.__dict__.update(term=term, student=same, teacher=same, ours=normal(ROWS, 3), theirs=normal(ROWS, 3))
    term.prepare(Outputs(case.ours, same), Outputs(case.theirs, same))
    assert not list(term.parameters())
    value = case()
    value.sum().backward()
    assert value.abs().max() < 1e-20 and all(x.grad.abs().max() < 1e-12 for x in same.values())


@pytest.mark.parametrize(("rows", "columns", "count"), [(6, 4, 2), (4, 7, 2), (5, 5, 3), (3, 8, 3), (8, 3, 3)])
def test_gradient_of_singular_vectors(rows, columns, count):
    x = normal(2, rows, columns).requires_grad_()

    def projections(x):  # the sign of a vector is arbitrary
        v = right_singular_vectors(x, count, 1e-9)[0]
        return v.unsqueeze(-2) * v.unsqueeze(-3)

    assert torch.autograd.gradcheck(projections, (x,), atol=1e-5)


def test_gradients_stay_finite_where_singular_values_meet_or_vanish():
    flat = torch.eye(4).repeat(2, 1, 1)[:, :, :3]  # all values are 1
    line = torch.ones(2, 6, 1) @ torch.arange(1.0, 5).expand(2, 1, 4)  # one value, and zeros
    for x in (flat, line, torch.zeros(2, 5, 3), 1e-18 * normal(2, 5, 3).float(), 1e15 * normal(2, 5, 3).float()):
        x = x.clone().requires_grad_()
        v, values = right_singular_vectors(x, 3)
        assert v.shape == (2, x.shape[2], 3) and values.shape == (2, 3)
        (v * normal(*v.shape).float()).sum().backward()
        assert x.grad.isfinite().all()
    near = torch.diag(torch.tensor([1.0, 1.0 - 1e-7, 0.5])).expand(1, 3, 3).clone().requires_grad_()
    (right_singular_vectors(near, 2)[0] * normal(1, 3, 2).float()).sum().backward()
    assert near.grad.abs().max() < 1e4  # the true one is near 1e7


def test_alignment_takes_the_nearest_direction_and_its_side():
    teacher = torch.eye(3)[None, :, :2]
    student = torch.eye(3)[None, :, [2, 1, 0]] * torch.tensor([1.0, 1.0, -1.0])
    assert torch.equal(align_singular_vectors(student, teacher), teacher)


def test_a_row_that_is_not_finite_is_named_and_harms_no_other():
    case = svd()
    expected = case().detach()
    case.student["a"][1, 0, 0, 0] = math.inf
    got = case()
    assert got[1].isnan() and torch.allclose(got[[0, 2, 3]], expected[[0, 2, 3]])


def test_svd_refuses_what_it_cannot_relate():
    with pytest.raises(UserError, match="student_layer: one layer; accepted: two or more"):
        KDSVD("a", "a")
    for wrong in (0, True, 1.5):
        with pytest.raises(UserError, match=r"components: .*; accepted: a whole number"):
            KDSVD(["a", "b"], ["a", "b"], components=wrong)
    vectors = Outputs(normal(2, 3), {"a": normal(2, 4), "b": normal(2, 4)})
    with pytest.raises(UserError, match="KD-SVD takes feature maps"):
        KDSVD(["a", "b"], ["a", "b"]).prepare(vectors, vectors)


# ---- OFA-KD ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 1.5, 3.0])
def test_enhanced_target_is_least_at_its_own_weights(gamma):
    teacher, y = normal(ROWS, 3), LABELS
    p = teacher.softmax(1)
    w = torch.where(nn.functional.one_hot(y, 3).bool(), (1 + p) ** gamma, p)
    best = w.log().requires_grad_()
    enhanced_target(best, teacher, y, gamma).sum().backward()
    assert best.grad.abs().max() < 1e-12
    least = enhanced_target(best, teacher, y, gamma)
    assert (enhanced_target(best + normal(ROWS, 3, seed=1), teacher, y, gamma) > least).all()
    if gamma == 1:  # both cross-entropies
        both = nn.functional.cross_entropy(teacher, y, reduction="none") - (p * p.log()).sum(1)
        torch.testing.assert_close(enhanced_target(teacher, teacher, y, 1.0), both)
    with pytest.raises(ValueError, match="differ in shape"):
        enhanced_target(teacher, teacher[:, :1], y)


def test_a_branch_for_every_kind_of_layer():
    last = normal(2, 8, 2, 2)
    kinds = [(2, 3, 8, 8), (2, 3, 16, 16), (2, 7, 5), (2, 6), (2, 8, 2, 2)]
    for shape, halvings in zip(kinds, (2, 3, 0, 0, 0), strict=True):
        made = branch(normal(*shape), 4, last)
        assert sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in made.modules()) == halvings, shape
        assert made(normal(*shape).float()).shape == (2, 4)
    assert branch(normal(2, 3, 8, 8), 4, normal(2, 9))[0][5].out_channels == 6
    with pytest.raises(UserError, match="5 dimensions; accepted: maps"):
        branch(normal(2, 3, 4, 4, 4), 4, last)


def test_ofa_counts_labelled_rows_and_takes_another_architecture():
    case = ofa()
    objective = Objective({"ofa": case.term})
    targets = torch.tensor([1, -100, 2, -100])
    student, teacher = Outputs(case.ours, case.student), Outputs(case.theirs)
    losses = objective(student, teacher, Batch(torch.zeros(ROWS, 1), targets))
    expected = case.expected("ofa")[[0, 2]].mean()
    assert losses.total.item() == pytest.approx(expected)
    assert case.term.teacher_layers == ()  # so that a teacher's answers may come from a cache


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: OFA("a", gamma=0.5), "gamma: 0.5"),
        (lambda: OFA("a", gamma=math.nan), "gamma: nan"),
        (lambda: OFA([]), "student_layer: none"),
        (lambda: SRRL("a", "b", regression=-1), "regression: -1"),
        (lambda: SRRL(["a", "b"], ["a", "b"]), "student_layer: 2 layers"),
    ],
)
def test_wrong_values_are_refused(make, says):
    with pytest.raises(UserError) as caught:
        make()
    assert says in str(caught.value) and "accepted" in str(caught.value) and "\n" not in str(caught.value)


def test_norm_is_batch_norm():
    plain, ours = nn.BatchNorm2d(3), BatchNorm(3)
    x = normal(4, 3, 2, 2).float()
    assert torch.equal(ours(x), plain(x))
    for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    plain.eval()
    torch.testing.assert_close(ours(x[:1, :, :1, :1]), plain(x[:1, :, :1, :1]))  # still in training


# ---- in an experiment ------------------------------------------------------------------------------------------------


def test_all_of_them_train_a_student(place):
    words = (*FEW, "epochs=6", "loss=[review,srrl,svd,ofa]", "baseline=false", "optimizer.lr=0.02")
    run = train(place, "review", "experiment=kd_resnet", *words)
    for name in CASES:
        points = curve(run, f"train/{name}")
        assert all(math.isfinite(point) for point in points)
        assert np.mean(points[-4:]) < np.mean(points[:4]), (name, points)
    assert weights(run).keys() == CifarResNet(8, width=4).state_dict().keys()
