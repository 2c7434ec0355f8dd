"""Every term against its paper's formula in float64: value, gradient, temperature, edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs
from kdlab.losses import DKD, KL, AttentionTransfer, CrossEntropy, Hint, LabelTerm, LogitMSE, Term

INF = math.inf
torch.set_num_threads(1)


def logits(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def batch(targets):
    return Batch(torch.zeros(len(targets), 1), torch.as_tensor(targets))


def term_gradient(term, student, teacher, targets):
    student = student.clone().requires_grad_()
    term(Outputs(student), Outputs(teacher), batch(targets)).sum().backward()
    return student.grad


def value(term, student, teacher, targets=None):
    targets = [0] * len(student) if targets is None else targets
    return term(Outputs(student), Outputs(teacher), batch(targets)).detach()


def probabilities(z, temperature=1.0):
    e = np.exp(z / temperature - (z / temperature).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def paper_kl(s, t, temperature):
    """T² KL, and its gradient T (q - p)."""
    q, p = probabilities(s, temperature), probabilities(t, temperature)
    return temperature**2 * (p * np.log(p / q)).sum(-1), temperature * (q - p)


def paper_dkd(s, t, targets, temperature, target_weight, other_weight):
    """The published loss and its gradient, which for a softmax is again a difference of probabilities."""
    values, grads = [], []
    for zs, zt, y in zip(s, t, targets, strict=True):
        q, p = probabilities(zs, temperature), probabilities(zt, temperature)
        others = np.arange(len(zs)) != y
        qo, po = probabilities(zs[others], temperature), probabilities(zt[others], temperature)
        tckd = p[y] * np.log(p[y] / q[y]) + p[others].sum() * np.log(p[others].sum() / q[others].sum())
        nckd = (po * np.log(po / qo)).sum()
        values.append(temperature**2 * (target_weight * tckd + other_weight * nckd))
        grad = np.zeros_like(zs)
        # d TCKD / dz: the binary problem's q_t - p_t on the target, spread over the others by their share
        grad[y] += target_weight * (q[y] - p[y])
        grad[others] += target_weight * (p[y] - q[y]) * qo
        grad[others] += other_weight * (qo - po)
        grads.append(temperature * grad)
    return np.array(values), np.array(grads)


# ---- KL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(1, 3), (6, 10), (3, 100)])
def test_kl_is_t_squared_kl(temperature, shape):
    s, t = logits(*shape), logits(*shape, seed=1)
    expected, grad = paper_kl(s.double().numpy(), t.double().numpy(), temperature)
    term = KL(temperature=temperature)
    np.testing.assert_allclose(value(term, s, t).numpy(), expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(term_gradient(term, s, t, [0] * shape[0]).numpy(), grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("temperature", "tolerance"), [(1e4, 1e-3), (1e5, 2e-3)])
def test_t_squared_kl_tends_to_half_the_centred_variance(temperature, tolerance):
    s, t = logits(8, 10), logits(8, 10, seed=1)
    gap = (s - t).double()
    gap = gap - gap.mean(-1, keepdim=True)
    got = value(KL(temperature=temperature), s, t).double()
    torch.testing.assert_close(got, 0.5 * gap.pow(2).mean(-1), rtol=tolerance, atol=0)
    grad = term_gradient(KL(temperature=temperature), s, t, [0] * 8)
    torch.testing.assert_close(grad.double(), gap / 10, rtol=1e-3, atol=1e-5)
    # and so LogitMSE of centred logits is twice the limit
    centred = value(LogitMSE(), s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)).double()
    torch.testing.assert_close(centred, 2 * got, rtol=2 * tolerance, atol=0)


@pytest.mark.parametrize("gap", [0.01, 1.0])
def test_rounding_stays_small_at_every_temperature(gap):
    """Why float64 above T = 64: in float32 the error of T²·KL grows with T², to 10 % of a nat at T = 1,000."""
    t = logits(64, 100)
    s = t + gap * logits(64, 100, seed=1, scale=1.0)
    for temperature in (1.0, 4.0, 20.0, 64.0, 65.0, 1e3, 1e4):
        got = value(KL(temperature=temperature), s, t).double().numpy()
        q, p = (torch.log_softmax(x.double() / temperature, -1) for x in (s, t))
        expected = (temperature**2 * (p.exp() * (p - q)).sum(-1)).numpy()
        allowed = 6e-7 * min(temperature, 64.0) ** 2 if temperature <= 64 else 1e-6
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=allowed)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 1e4])
@pytest.mark.parametrize("term", [KL, DKD, LogitMSE], ids=lambda t: t.__name__)
def test_identical_teacher_and_student_are_the_minimum(term, temperature):
    built = term() if term is LogitMSE else term(temperature=temperature)
    s = logits(5, 7)
    assert value(built, s, s, [0, 1, 2, 3, 4]).abs().max() == 0
    assert term_gradient(built, s, s, [0, 1, 2, 3, 4]).abs().max() < 1e-5 * temperature
    assert (value(built, s + logits(5, 7, seed=4, scale=1.0), s, [0, 1, 2, 3, 4]) > 0).all()


def test_cross_entropy_is_least_at_the_labels():
    far = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert value(CrossEntropy(), far, far, [0, 1]).abs().max() < 1e-6
    soft = torch.tensor([[0.25, 0.75]])  # least where softmax(z) = targets: the entropy
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert value(CrossEntropy(), soft.log(), soft, soft).item() == pytest.approx(entropy, rel=1e-6)
    assert term_gradient(CrossEntropy(), soft.log(), soft, soft).abs().max() < 1e-6


def test_masked_classes_and_a_gap_of_200():
    s, t = torch.tensor([[200.0, 0.0, -INF]]), torch.tensor([[0.0, 200.0, -INF]])
    bare = paper_kl(np.array([[200.0, 0.0]]), np.array([[0.0, 200.0]]) / 1.0, 4.0)
    got = value(KL(temperature=4.0), s, t)
    np.testing.assert_allclose(got.numpy(), bare[0], rtol=1e-5)
    for term in (KL(temperature=4.0), DKD(temperature=4.0), CrossEntropy(), KL(temperature=1e4)):
        assert value(term, s, t).isfinite().all()
        assert term_gradient(term, s, t, [0]).isfinite().all()
    one_side = torch.tensor([[0.0, 1.0, 2.0]])  # only the teacher rules a class out
    assert term_gradient(KL(temperature=4.0), one_side, t, [0]).isfinite().all()


# ---- DKD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("target_weight", "other_weight"), [(1.0, 8.0), (0.0, 1.0), (2.0, 0.0)])
def test_dkd(temperature, target_weight, other_weight):
    s, t, y = logits(6, 10), logits(6, 10, seed=1), [0, 9, 3, 3, 5, 1]
    expected, grad = paper_dkd(s.double().numpy(), t.double().numpy(), y, temperature, target_weight, other_weight)
    term = DKD(target_weight, other_weight, temperature=temperature)
    np.testing.assert_allclose(value(term, s, t, y).numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(term_gradient(term, s, t, y).numpy(), grad, rtol=1e-3, atol=1e-4)
    # soft targets name the class that they favour
    soft = 0.6 * torch.eye(10)[y] + 0.04
    torch.testing.assert_close(value(term, s, t, soft), value(term, s, t, y))


def test_dkd_answers_for_unlabelled_rows_without_failing():
    s, t = logits(3, 4), logits(3, 4, seed=1)
    for targets in (torch.full((3,), -100), torch.zeros(3, 4)):
        assert value(DKD(), s, t, targets).shape == (3,)
    assert DKD.rows == "labelled" and DKD.role == "other"


# ---- labels and logits -----------------------------------------------------------------------------------------------


def test_logit_mse():
    s, t = logits(4, 6), logits(4, 6, seed=1)
    expected = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 6 for x, y in zip(s.tolist(), t.tolist(), strict=True)
    ]
    assert value(LogitMSE(), s, t).tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(term_gradient(LogitMSE(), s, t, [0] * 4), 2 * (s - t) / 6)


def test_cross_entropy_term():
    s, y = logits(4, 6), [1, -100, 5, 0]
    p = probabilities(s.double().numpy())
    expected = [0.0 if c < 0 else -math.log(p[i, c]) for i, c in enumerate(y)]
    assert value(CrossEntropy(), s, s, y).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert CrossEntropy()(Outputs(s), None, batch(y)).shape == (4,)
    smooth = value(CrossEntropy(0.1), s, s, y)[0].item()
    assert smooth == pytest.approx(0.9 * expected[0] - 0.1 * np.log(p[0]).mean(), rel=1e-5)


@pytest.mark.parametrize("make", [KL, DKD, LogitMSE, CrossEntropy], ids=lambda t: t.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(make, dtype):
    s, t, y = logits(5, 7).to(dtype), logits(5, 7, seed=1).to(dtype), [0, 1, 2, 3, 4]
    expected = value(make(), s.float(), t.float(), y)
    torch.testing.assert_close(value(make(), s, t, y), expected, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value(make(), s, t, y), expected, rtol=1e-6, atol=1e-6)
    assert term_gradient(make(), s, t, y).dtype == dtype


@pytest.mark.parametrize("make", [KL, DKD, LogitMSE], ids=lambda t: t.__name__)
@pytest.mark.parametrize("shape", [(4, 1), (6,)])
def test_a_teacher_that_would_broadcast_is_refused(make, shape):
    with pytest.raises(ValueError, match="differ in shape"):
        value(make(), logits(4, 6), logits(*shape))


@pytest.mark.parametrize("make", [KL, DKD, LogitMSE, CrossEntropy], ids=lambda t: t.__name__)
def test_one_value_per_row_of_that_row_alone(make):
    s, t, y = logits(6, 5), logits(6, 5, seed=1), torch.arange(6) % 5
    whole = value(make(), s, t, y)
    assert whole.shape == (6,)
    for i in range(6):
        torch.testing.assert_close(value(make(), s[i : i + 1], t[i : i + 1], y[i : i + 1]), whole[i : i + 1])


# ---- features --------------------------------------------------------------------------------------------------------


def features(s, t):
    rows = s.shape[0]
    return Outputs(torch.zeros(rows, 2), {"a": s}), Outputs(torch.zeros(rows, 2), {"b": t}), batch([0] * rows)


def test_hint_on_feature_maps():
    s, t = logits(3, 4, 2, 2), logits(3, 6, 4, 4, seed=1)
    student, teacher, rows = features(s.requires_grad_(), t)
    term = Hint("a", "b")
    assert term.student_layers == ("a",) and term.teacher_layers == ("b",) and not list(term.parameters())
    term.prepare(student, teacher)
    weight, bias = (p.detach().double().numpy() for p in term.projectors.parameters())
    pooled = t.double().numpy().reshape(3, 6, 2, 2, 2, 2).mean((3, 5))  # the teacher comes down to the student's grid
    projected = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], s.detach().double().numpy()) + bias[:, None, None]
    got = term(student, teacher, rows)
    np.testing.assert_allclose(got.detach().numpy(), ((projected - pooled) ** 2).reshape(3, -1).mean(1), rtol=1e-4)
    got.sum().backward()
    grad = 2 * np.einsum("oc,bohw->bchw", weight[:, :, 0, 0], projected - pooled) / 24
    np.testing.assert_allclose(s.grad.numpy(), grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    made = term.projectors[0]
    term.prepare(student, teacher)
    assert term.projectors[0] is made  # a second call must not throw away what has trained


@pytest.mark.parametrize("shape", [((5, 4), (5, 7)), ((2, 3, 4), (2, 3, 7))], ids=["vectors", "tokens"])
def test_hint_on_vectors_and_tokens(shape):
    s, t = logits(*shape[0]), logits(*shape[1], seed=1)
    student, teacher, rows = features(s, t)
    term = Hint("a", "b")
    term.prepare(student, teacher)
    weight, bias = (p.detach().double().numpy() for p in term.projectors.parameters())
    gap = s.double().numpy() @ weight.T + bias - t.double().numpy()
    expected = (gap**2).reshape(len(s), -1).mean(1)
    np.testing.assert_allclose(term(student, teacher, rows).detach().numpy(), expected, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = term(student, teacher, rows)
    assert rough.dtype == torch.float32
    np.testing.assert_allclose(rough.detach().numpy(), expected, rtol=3e-2)
    half = term(Outputs(student.logits, {"a": s.half()}), Outputs(teacher.logits, {"b": t.half()}), rows)
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half.detach().numpy(), expected, rtol=1e-2)


def test_several_pairs_are_summed():
    wide = [logits(3, 4, 4, 4, seed=n) for n in range(4)]
    student = Outputs(torch.zeros(3, 2), {"a": wide[0], "b": wide[1]})
    teacher = Outputs(torch.zeros(3, 2), {"c": wide[2], "d": wide[3]})
    for make in (Hint, AttentionTransfer):
        both, first, second = make(["a", "b"], ["c", "d"]), make("a", "c"), make("b", "d")
        assert both.student_layers == ("a", "b") and both.teacher_layers == ("c", "d")
        for term in (both, first, second):
            term.prepare(student, teacher)
        if make is Hint:
            for mine, theirs in zip(both.projectors, (first, second), strict=True):
                mine.load_state_dict(theirs.projectors[0].state_dict())
        rows = batch([0] * 3)
        expected = first(student, teacher, rows) + second(student, teacher, rows)
        torch.testing.assert_close(both(student, teacher, rows), expected)
    with pytest.raises(UserError, match="2 and 1 layers; accepted: pairs"):
        Hint(["a", "b"], "c")


def test_hint_is_zero_where_the_projected_student_is_the_teacher():
    s = logits(3, 4)
    term = Hint("a", "b")
    student, teacher, rows = features(s, logits(3, 5))
    term.prepare(student, teacher)
    teacher.features["b"] = term.projectors[0](s).detach()
    assert term(student, teacher, rows).abs().max() == 0


def test_hint_makes_its_projector_where_the_features_are():
    student, teacher, _ = features(torch.zeros(2, 3, device="meta"), torch.zeros(2, 4, device="meta"))
    term = Hint("a", "b")
    term.prepare(student, teacher)
    assert {p.device.type for p in term.parameters()} == {"meta"}


@pytest.mark.parametrize("grids", [((4, 4), (4, 4)), ((4, 4), (2, 2)), ((2, 2), (4, 4))])
def test_attention_transfer(grids):
    s, t = logits(3, 4, *grids[0]), logits(3, 6, *grids[1], seed=1)
    student, teacher, rows = features(s.requires_grad_(), t)
    term = AttentionTransfer("a", "b")
    term.prepare(student, teacher)

    def pooled(x, to):
        x, k = x.detach().double(), x.shape[2] // to
        return x.unfold(2, k, k).unfold(3, k, k).mean((-1, -2))

    def reference(x):
        side = min(grids[0][0], grids[1][0])
        k = x.shape[2] // side
        a = x.unfold(2, k, k).unfold(3, k, k).mean((-1, -2)).square().mean(1).flatten(1)
        b = pooled(t, side).square().mean(1).flatten(1)
        unit_a, unit_b = (m / m.square().sum(1, keepdim=True).sqrt() for m in (a, b))
        return (unit_a - unit_b).square().sum(1) / side**2

    wide = s.detach().double().requires_grad_()
    expected = reference(wide)
    expected.sum().backward()
    got = term(student, teacher, rows)
    got.sum().backward()
    torch.testing.assert_close(got.detach().double(), expected.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(s.grad.double(), wide.grad, rtol=1e-3, atol=1e-7)
    same = features(s.detach(), 3 * s.detach())  # the map is normalised: scale does not count
    assert term(*same).abs().max() < 1e-12
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(term(*features(s.detach(), t)), got.detach())


@pytest.mark.parametrize(
    ("s", "t", "make", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 4, 4), Hint, "2 and 4 dimensions"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 6, 3), Hint, "differs in width alone"),
        (torch.zeros(2, 3), torch.zeros(2, 3), AttentionTransfer, "feature maps"),
    ],
)
def test_layer_pairs_that_do_not_fit(s, t, make, says):
    student, teacher, _ = features(s, t)
    with pytest.raises(UserError, match=f"student_layer, teacher_layer.*{says}"):
        make("a", "b").prepare(student, teacher)


def test_a_layer_that_was_not_captured_and_a_projector_that_was_not_made():
    student, teacher, rows = features(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(UserError, match="student_layer: no output of layer 'x'"):
        Hint("x", "b").prepare(student, teacher)
    with pytest.raises(UserError, match="teacher_layer: no output of layer 'b'"):
        Hint("a", "b").prepare(student, None)
    with pytest.raises(UserError, match="prepare"):
        Hint("a", "b")(student, teacher, rows)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KL(weight=-1), "weight: -1"),
        (lambda: KL(weight=INF), "weight: inf"),
        (lambda: KL(weight="2"), "weight: '2'"),
        (lambda: KL(temperature=0), "loss.temperature: 0"),
        (lambda: KL(temperature={"start": 4, "end": 0}), "loss.temperature: 0"),
        (lambda: CrossEntropy(1.0), "label_smoothing: 1.0"),
        (lambda: CrossEntropy(-0.1), "label_smoothing: -0.1"),
        (lambda: CrossEntropy(math.nan), "label_smoothing: nan"),
        (lambda: DKD(target_weight=-1), "target_weight: -1"),
        (lambda: DKD(other_weight=math.nan), "other_weight: nan"),
        (lambda: DKD(other_weight=INF), "other_weight: inf"),
    ],
)
def test_wrong_values_are_refused(make, says):
    with pytest.raises(UserError) as caught:
        make()
    assert says in str(caught.value) and "accepted" in str(caught.value) and "\n" not in str(caught.value)


def test_a_term_that_measures_nothing_says_so():
    s = Outputs(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="define forward"):
        Term()(s, s, batch([0]))
    assert LabelTerm.rows == "labelled" and LabelTerm.role == "label" and not LabelTerm.needs_teacher
