"""The further terms on outputs, with a teacher and without, against float64 references written from their papers."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from helpers.tiny import MLP, curve, mistake, newest, train, weights
from helpers.tiny import place as place
from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, pearson_distance, zipf_kl
from kdlab.losses import (
    KL,
    NKD,
    USKD,
    WSLD,
    ConfidencePenalty,
    CrossEntropy,
    DISTInter,
    DISTIntra,
    LearnedTemperature,
    MLLDBatch,
    MLLDClass,
    MLLDInstance,
    Objective,
    StandardizedTemperature,
    TfKD,
)

INF = math.inf
POOL = (2.0, 3.0, 6.0)
torch.set_num_threads(1)


def logits(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


S, T, Y = logits(6, 5), logits(6, 5, seed=1), [0, 4, 3, 3, 2, 1]
MIDDLE, W, B = logits(6, 3, 2, 2, seed=2), logits(5, 3, seed=3, scale=0.5), logits(5, seed=4, scale=0.1)


def batch(targets=Y, rows=6):
    return Batch(torch.zeros(rows, 1), torch.as_tensor(targets))


# ---- the papers' formulas, in numpy; what a paper does not differentiate is a constant made beforehand ---------------


def softmax(z, by=1.0):
    e = np.exp(z / by - (z / by).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl_of(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def rho(a, b):
    """Pearson's correlation as numpy has it."""
    return np.corrcoef(a, b)[0, 1]


def but(z, y):
    return np.stack([np.delete(row, c) for row, c in zip(z, y, strict=True)])


def paper_nkd(s, t, by, gamma):
    p, q = softmax(t)[range(6), Y], softmax(s)[range(6), Y]
    return -p * np.log(q) + gamma * by**2 * kl_of(softmax(but(t, Y), by), softmax(but(s, Y), by))


def paper_wsld(s, t, by):
    ours, theirs = (-np.log(softmax(z)[range(6), Y]) for z in (S.numpy(), t))  # S, not s: no gradient through it
    return by**2 * (1 - np.exp(-ours / theirs)) * kl_of(softmax(t, by), softmax(s, by))


def paper_dist_inter(s, t, by):
    return np.array([1 - rho(a, b) for a, b in zip(softmax(s, by), softmax(t, by), strict=True)])


def paper_dist_intra(s, t, by):
    return np.mean([1 - rho(a, b) for a, b in zip(softmax(s, by).T, softmax(t, by).T, strict=True)])


def paper_mlld_batch(s, t):
    return sum(
        np.array([sum((a @ b - c @ d) ** 2 for b, d in zip(p, q, strict=True)) for a, c in zip(p, q, strict=True)])
        for p, q in ((softmax(s, by), softmax(t, by)) for by in POOL)
    )


def paper_mlld_class(s, t):
    total = 0.0
    for by in POOL:
        p, q = softmax(s, by), softmax(t, by)
        total += sum((p[:, c] @ p[:, d] - q[:, c] @ q[:, d]) ** 2 for c in range(5) for d in range(5)) / 5
    return total


def paper_confidence(s, t):
    return math.log(5) + (softmax(s) * np.log(softmax(s))).sum(-1)


def paper_tf_kd(s, t, a, by):
    told = np.full((6, 5), (1 - a) / 4)
    told[range(6), Y] = a
    told = told ** (1 / by)
    return kl_of(told / told.sum(-1, keepdims=True), softmax(s))


def weak_of(middle):
    return middle.mean((2, 3)) @ W.numpy().T + B.numpy()


def paper_uskd(s, middle=None, target=0.3, other=0.2, weak=0.7):
    fixed = softmax(S.numpy())[range(6), Y]
    value = -target * (1 + fixed**2 - (fixed**2).mean()) * np.log(softmax(s)[range(6), Y])
    belief = softmax(but(S.numpy(), Y))
    if middle is not None:
        belief = belief + softmax(but(weak_of(MIDDLE.numpy()), Y))
        smooth = np.full((6, 5), 0.1 / 5)
        smooth[range(6), Y] += 0.9
        value = value - weak * (smooth * np.log(softmax(weak_of(middle)))).sum(-1)
    law = np.array([[1 / (1 + sum(other > mine for other in row)) for mine in row] for row in belief])
    return value + other * kl_of(law / law.sum(-1, keepdims=True), softmax(but(s, Y)))


def slope(function, at, step=1e-6):
    """The gradient of the sum of a numpy function, by central differences."""
    grad = np.zeros_like(at)
    for where in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[where] += step
        down[where] -= step
        grad[where] = (np.sum(function(up)) - np.sum(function(down))) / (2 * step)
    return grad


# name: how the term is made, its reference (s, t), and what it gives where teacher and student agree (None: unknown)
CASES = {
    "nkd": (partial(NKD, 3.5, temperature=3.0), partial(paper_nkd, by=3.0, gamma=3.5), None),
    "nkd at 1": (NKD, partial(paper_nkd, by=1.0, gamma=1.5), None),
    "wsld": (partial(WSLD, temperature=4.0), partial(paper_wsld, by=4.0), 0),
    "wsld at 1": (WSLD, partial(paper_wsld, by=1.0), 0),
    "dist_inter": (partial(DISTInter, temperature=4.0), partial(paper_dist_inter, by=4.0), 0),
    "dist_intra": (partial(DISTIntra, temperature=4.0), partial(paper_dist_intra, by=4.0), 0),
    "dist_intra at 1": (DISTIntra, partial(paper_dist_intra, by=1.0), 0),
    "mlld_instance": (
        partial(MLLDInstance, POOL),
        lambda s, t: sum(by**2 * kl_of(softmax(t, by), softmax(s, by)) for by in POOL),
        0,
    ),
    "mlld_batch": (partial(MLLDBatch, POOL), paper_mlld_batch, 0),
    "mlld_class": (partial(MLLDClass, POOL), paper_mlld_class, 0),
    "confidence": (ConfidencePenalty, paper_confidence, None),
    "tf_kd": (TfKD, partial(paper_tf_kd, a=0.99, by=20.0), None),
    "tf_kd at 2": (partial(TfKD, 0.7, 2.0), partial(paper_tf_kd, a=0.7, by=2.0), None),
    "uskd": (partial(USKD, None, 0.3, 0.2), lambda s, t: paper_uskd(s), None),
}
SCALARS = {"dist_intra", "dist_intra at 1", "mlld_class"}
each = pytest.mark.parametrize("name", CASES)


def value(term, s, t=T, targets=Y):
    return term(Outputs(s), Outputs(t), batch(targets, len(s)))


def gradient(term, s, t=T, targets=Y):
    s = s.clone().requires_grad_()
    value(term, s, t, targets).sum().backward()
    return s.grad


@each
def test_value_and_gradient_are_the_papers(name):
    make, paper, _ = CASES[name]
    s, t = S.numpy(), T.numpy()
    expected = paper(s, t)
    assert np.shape(expected) == (() if name in SCALARS else (6,))
    np.testing.assert_allclose(value(make(), S), expected, rtol=1e-5, atol=1e-9)
    grad = slope(lambda z: paper(z, t), s)
    np.testing.assert_allclose(gradient(make(), S), grad, rtol=2e-5, atol=1e-7)
    # and in the precision that networks give
    np.testing.assert_allclose(value(make(), S.float(), T.float()), expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(gradient(make(), S.float(), T.float()), grad, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", [name for name, (*_, least) in CASES.items() if least is not None])
def test_identical_teacher_and_student(name):
    make, *_ = CASES[name]
    assert value(make(), S, S).abs().max() < 1e-12 and gradient(make(), S, S).abs().max() < 1e-6
    assert value(make(), S.float(), S.float()).abs().max() < 2e-6
    assert (value(make(), S, T) > 1e-3).all()


def test_minima_of_the_other_terms():
    """NKD's other classes end at the teacher, the penalty at the uniform output, Tf-KD at its virtual teacher."""
    own = value(NKD(0.0), T)
    torch.testing.assert_close(value(NKD(5.0, temperature=3.0), T), own)
    assert (value(NKD(5.0, temperature=3.0), S) > value(NKD(0.0), S)).all()
    even = torch.ones(6, 5)
    assert (
        value(ConfidencePenalty(), even).abs().max() < 1e-6 and gradient(ConfidencePenalty(), even).abs().max() < 1e-6
    )
    told = (
        torch.full((6, 5), (0.1 / 4) ** 0.5)
        .log()
        .index_put_((torch.arange(6), torch.tensor(Y)), torch.tensor(0.9).log() / 2)
    )
    assert value(TfKD(0.9, 2.0), told).abs().max() < 1e-6
    law = -torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]).log()
    assert zipf_kl(law, by=[law]).abs().max() < 1e-6


def test_a_threshold_leaves_outputs_alone_that_are_unsure_enough():
    enough = torch.stack([torch.zeros(5), torch.tensor([9.0, 0, 0, 0, 0])])
    got = value(ConfidencePenalty(1.0), enough, enough, [0, 0])
    assert got[0] == 0 and 0.9 < got[1] < 1
    assert gradient(ConfidencePenalty(1.0), enough, enough, [0, 0])[0].abs().max() == 0


@pytest.mark.parametrize("make", [NKD, WSLD, DISTInter, DISTIntra], ids=lambda m: m.__name__)
def test_high_temperatures_neither_vanish_nor_blow_up(make):
    (high, higher), slopes = zip(
        *[
            (value(make(temperature=at), S.float(), T.float()), gradient(make(temperature=at), S.float(), T.float()))
            for at in (1e3, 1e5)
        ],
        strict=True,
    )
    torch.testing.assert_close(high.double(), higher.double(), rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=2e-2, atol=1e-4)
    assert slopes[0].norm() > 1e-2 and higher.isfinite().all()


def test_virtual_teacher_tends_to_label_smoothing_without_the_label():
    even = -torch.log_softmax(S, -1).mean(-1) - math.log(5)
    torch.testing.assert_close(value(TfKD(0.99, 1e5), S), even, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "temperature", [StandardizedTemperature(2.0), LearnedTemperature()], ids=["standardized", "learned"]
)
@pytest.mark.parametrize("make", [NKD, WSLD, DISTInter, DISTIntra], ids=lambda m: m.__name__)
def test_every_kind_of_temperature(make, temperature):
    assert value(make(temperature=temperature), S).isfinite().all()
    assert gradient(make(temperature=temperature), S).isfinite().all()


@each
def test_rows_without_a_label(name):
    term = CASES[name][0]()
    none = torch.full((6,), -100)
    for targets in (none, torch.zeros(6, 5)):
        assert value(term, S, T, targets).isfinite().all() and gradient(term, S, T, targets).isfinite().all()
    some = [0, -100, 3, 3, -100, 1]
    losses = Objective({"ce": CrossEntropy(), "it": term})(Outputs(S), Outputs(T), batch(some))
    assert losses.total.isfinite()
    if term.rows == "labelled":  # what is said of the others counts nothing: with them or without
        kept = [n for n, y in enumerate(some) if y >= 0]
        alone = Objective({"ce": CrossEntropy(), "it": term})(
            Outputs(S[kept]), Outputs(T[kept]), batch([some[n] for n in kept], 4)
        )
        torch.testing.assert_close(losses.values, alone.values)
    favoured = 0.6 * torch.eye(5)[Y] + 0.08
    if not isinstance(term, WSLD):  # whose weight reads the whole distribution
        torch.testing.assert_close(value(term, S, T, favoured), value(term, S, T, Y))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(name, dtype):
    make = CASES[name][0]
    s, t = S.to(dtype), T.to(dtype)
    expected = value(make(), s.float(), t.float())
    torch.testing.assert_close(value(make(), s, t), expected, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value(make(), s, t), expected, rtol=1e-6, atol=1e-6)
    grad = gradient(make(), s, t)
    assert grad.dtype == dtype and grad.isfinite().all()


@each
def test_masked_classes_and_a_gap_of_200(name):
    s, t = torch.tensor([[200.0, 0.0, -INF]] * 2), torch.tensor([[0.0, 200.0, -INF], [1.0, 0.0, 0.0]])
    term = CASES[name][0]()
    assert value(term, s, t, [0, 1]).isfinite().all()
    assert gradient(term, s, t, [0, 1]).isfinite().all()


@each
def test_one_value_per_row_of_that_row_alone(name):
    term = CASES[name][0]()
    whole = value(term, S)
    if not term.rowwise:
        assert name in SCALARS or "batch" in name or "uskd" in name
        return
    for i in range(6):
        torch.testing.assert_close(value(term, S[i : i + 1], T[i : i + 1], Y[i : i + 1]), whole[i : i + 1])


@each
def test_a_teacher_that_would_broadcast_is_refused(name):
    term = CASES[name][0]()
    if term.needs_teacher:
        with pytest.raises(ValueError, match="differ in shape"):
            value(term, S, T[:, :1])
    else:
        assert term(Outputs(S), None, batch()).shape == (6,)


# ---- DIST ------------------------------------------------------------------------------------------------------------


def test_correlation_is_blind_to_scale_and_shift_and_ignores_constants():
    a, b = logits(4, 9), logits(4, 9, seed=1)
    torch.testing.assert_close(pearson_distance(3 * a + 7, b), pearson_distance(a, b))
    torch.testing.assert_close(pearson_distance(-a, a), torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(pearson_distance(1e-20 * a.float(), a.float()), torch.zeros(4), atol=1e-5, rtol=0)
    for flat in (torch.zeros(4, 9), torch.full((4, 9), 0.1)):
        flat.requires_grad_()
        distance = pearson_distance(flat, b.float())
        assert (distance == 1).all()
        distance.sum().backward()
        assert (flat.grad == 0).all()
    assert gradient(DISTIntra(), S[:1], T[:1], [0]).abs().max() == 0  # one row correlates with nothing


@pytest.mark.parametrize("make", [DISTIntra, MLLDBatch, MLLDClass])
def test_rows_of_weight_0_correlate_with_nothing(make):
    s, t, term = logits(6, 5, seed=1), logits(6, 5, seed=2), make()
    there = torch.tensor([True, False, True, True, False, True])
    some = Batch(torch.zeros(6, 1), torch.tensor(Y), weight=there.float())
    s.requires_grad_(True)
    value = term(Outputs(s), Outputs(t), some)
    alone = term(Outputs(s[there]), Outputs(t[there]), batch([0, 3, 3, 1], 4))
    torch.testing.assert_close(value[there] if value.ndim else value, alone)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert (gradient[~there] == 0).all() and (gradient[there] != 0).any()


def test_a_split_step_correlates_each_part_alone():
    """Documented: of all terms of DIST and MLLD, those by row are the same however a step is split."""
    window = batch().count()._replace(parts=2)
    for term, same in ((DISTInter(), True), (MLLDInstance(), True), (DISTIntra(), False), (MLLDBatch(), False)):
        objective = Objective({"it": term})
        whole = objective(Outputs(S), Outputs(T), batch()).values
        halves = torch.zeros(1)
        for part in (slice(0, 3), slice(3, 6)):
            rows = batch(Y[part], 3)
            rows.window = window
            halves = halves + objective(Outputs(S[part]), Outputs(T[part]), rows).values
        assert torch.allclose(whole, halves) == same


# ---- USKD's weak output ----------------------------------------------------------------------------------------------


def weak(middle=MIDDLE, dtype=torch.float64, **words):
    term = USKD("mid", 0.3, 0.2, 0.7, **words)
    outputs = Outputs(S.to(dtype), {"mid": middle.to(dtype)})
    term.prepare(outputs, None)
    term.weak.to(dtype if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        term.weak.weight.copy_(W)
        term.weak.bias.copy_(B)
    return term, outputs


def test_uskd_with_its_weak_output():
    term, _ = weak()
    assert term.student_layers == ("mid",) and term.teacher_layers == () and not term.needs_teacher
    s, middle = S.clone().requires_grad_(), MIDDLE.clone().requires_grad_()
    got = term(Outputs(s, {"mid": middle}), None, batch())
    np.testing.assert_allclose(got.detach(), paper_uskd(S.numpy(), MIDDLE.numpy()), rtol=1e-9)
    got.sum().backward()
    np.testing.assert_allclose(s.grad, slope(lambda z: paper_uskd(z, MIDDLE.numpy()), S.numpy()), atol=1e-7)
    np.testing.assert_allclose(middle.grad, slope(lambda m: paper_uskd(S.numpy(), m), MIDDLE.numpy()), atol=1e-7)
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())
    made = term.weak
    term.prepare(Outputs(S, {"mid": MIDDLE}), None)
    assert term.weak is made  # a second call must not throw away what has trained


def test_uskd_weak_output_in_half_precision_on_vectors_and_unlabelled_rows():
    term, outputs = weak(dtype=torch.float32)
    expected = term(outputs, None, batch()).detach()
    half = Outputs(S.half(), {"mid": MIDDLE.half()})
    torch.testing.assert_close(term(half, None, batch()).detach(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = term(outputs, None, batch()).detach()
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, expected, rtol=3e-2, atol=3e-2)
    vectors, _ = weak(MIDDLE.mean((2, 3)), torch.float32)
    flat = Outputs(outputs.logits, {"mid": MIDDLE.mean((2, 3)).float()})
    torch.testing.assert_close(vectors(flat, None, batch()).detach(), expected)
    assert term(outputs, None, batch([-100] * 6)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NKD(other_weight=-1), "other_weight: -1"),
        (lambda: USKD(weak_weight=math.nan), "weak_weight: nan"),
        (lambda: ConfidencePenalty(0.0), "threshold: 0.0"),
        (lambda: TfKD(1.0), "correct: 1.0"),
        (lambda: TfKD(temperature=0.0), "temperature: 0"),
        (lambda: MLLDBatch([]), r"temperatures: \[\]"),
        (lambda: MLLDClass([2.0, -1.0]), r"temperatures: \[2.0, -1.0\]"),
        (lambda: USKD("absent").prepare(Outputs(S), None), "student_layer: no output of layer 'absent'"),
        (lambda: USKD("mid").prepare(Outputs(S, {"mid": torch.zeros(6, 2, 3)}), None), "student_layer: 'mid' gives"),
        (lambda: USKD("mid")(Outputs(S, {"mid": MIDDLE}), None, batch()), "USKD: call prepare"),
    ],
)
def test_mistakes(make, said):
    with pytest.raises(UserError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_soft_terms_say_that_they_soften():
    assert Objective({"it": MLLDClass()}).uses_temperature and not Objective({"it": MLLDClass([1.0])}).uses_temperature
    shared = Objective({"kl": KL(), "it": DISTInter()}, temperature=3.0, alpha=0.5)
    assert shared.terms["it"].temperature is shared.temperature
    # of DIST, alpha says nothing; MLLD takes its share
    assert shared.weights() == [0.5, 1.0]
    assert Objective({"it": MLLDBatch()}, alpha=0.25).weights() == [0.25]


# ---- as a user names them --------------------------------------------------------------------------------------------

WITH = (*MLP, "epochs=4", "baseline=false", "optimizer.lr=0.02")
ALONE = ("experiment=kd_resnet", "student=mlp", "method=finetune", "teacher=none", "epochs=4")


@pytest.mark.parametrize(
    ("loss", "words", "falling"),
    [
        ("nkd,wsld,mlld", WITH, ("nkd", "wsld", "mlld_instance", "mlld_batch", "mlld_class")),
        ("hinton,dist", WITH, ("dist_inter", "dist_intra")),
        ("uskd,confidence_penalty", (*ALONE, "loss.terms.uskd.student_layer=layer1"), ("ce", "uskd")),
        ("label_smoothing", ALONE, ("ce",)),
        ("tf_kd", ALONE, ("ce",)),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_short_training(place, loss, words, falling):
    run = train(place, f"soft_{loss.replace(',', '_')}", *words, f"loss=[{loss}]")
    for term in falling:
        points = curve(run, f"train/{term}")
        assert all(map(math.isfinite, points))
        assert np.mean(points[-8:]) < 0.8 * np.mean(points[:4]), (term, points)
    if not (place / "soft_plain").exists():
        train(place, "soft_plain", *ALONE, "loss=ce", "epochs=1")
    plain = weights(newest(place, "soft_plain"), "model_finetuned.pt")
    file = "student.pt" if words == WITH else "model_finetuned.pt"
    assert weights(run, file).keys() == plain.keys()  # USKD's weak output stays behind


def test_recipes_that_fill_the_same_term_are_refused(capsys):
    said = mistake(capsys, ["experiment=kd_resnet", "loss=[label_smoothing,tf_kd]"])
    assert "both fill loss.terms.ce" in said
