"""The divergences beside KL, and their terms, against plain-loop float64 references: value, gradient, limits, edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    jsd,
    kl,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from kdlab.losses import JSD, KL, Divergence, Objective, ReverseKL, SkewKL, SkewReverseKL, SymmetricKL, TotalVariation

INF = math.inf
torch.set_num_threads(1)
quick = settings(max_examples=60, deadline=None, derandomize=True)


# ---- references: plain loops over Python floats, from each paper's definition ----------------------------------------


def softmax_of(row):
    top = max(row)
    e = [math.exp(z - top) for z in row]
    return [x / math.fsum(e) for x in e]


def kl_of(p, q):
    return math.fsum(a * (math.log(a) - math.log(b)) if b > 0 else INF for a, b in zip(p, q, strict=True) if a > 0)


def mix(a, b, share_of_a):
    return [share_of_a * x + (1 - share_of_a) * y for x, y in zip(a, b, strict=True)]


def jsd_of(p, q, beta):
    m = mix(p, q, beta)
    return (beta * kl_of(p, m) + (1 - beta) * kl_of(q, m)) / (beta * (1 - beta))


def tv_of(p, q):
    return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


CASES = {
    "reverse": (reverse_kl, lambda p, q: kl_of(q, p)),
    "symmetric": (symmetric_kl, lambda p, q: (kl_of(p, q) + kl_of(q, p)) / 2),
    "skew 0": (lambda s, t: skew_kl(s, t, 0), kl_of),
    "skew 0.1": (skew_kl, lambda p, q: kl_of(p, mix(p, q, 0.1))),
    "skew 0.7": (lambda s, t: skew_kl(s, t, 0.7), lambda p, q: kl_of(p, mix(p, q, 0.7))),
    "skew reverse 0.1": (skew_reverse_kl, lambda p, q: kl_of(q, mix(q, p, 0.1))),
    "skew reverse 0.9": (lambda s, t: skew_reverse_kl(s, t, 0.9), lambda p, q: kl_of(q, mix(q, p, 0.9))),
    "jsd 0.5": (jsd, lambda p, q: jsd_of(p, q, 0.5)),
    "jsd 0.1": (lambda s, t: jsd(s, t, 0.1), lambda p, q: jsd_of(p, q, 0.1)),
    "jsd 0.95": (lambda s, t: jsd(s, t, 0.95), lambda p, q: jsd_of(p, q, 0.95)),
    "tv": (total_variation, tv_of),
}
BOUNDED = ("skew 0.1", "skew 0.7", "skew reverse 0.1", "skew reverse 0.9", "jsd 0.5", "jsd 0.1", "jsd 0.95", "tv")
each = pytest.mark.parametrize("name", CASES)


def reference(name, student, teacher):
    of = CASES[name][1]
    return [of(softmax_of(t), softmax_of(s)) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]


def numeric_gradient(name, student, teacher, eps=1e-6):
    grad = np.zeros(student.shape)
    for at in np.ndindex(*student.shape):
        step = torch.zeros(student.shape, dtype=torch.float64)
        step[at] = eps
        up, down = (sum(reference(name, student.double() + sign * step, teacher)) for sign in (1, -1))
        grad[at] = (up - down) / (2 * eps)
    return grad


def gradient(f, x):
    x = x.clone().requires_grad_()
    f(x).sum().backward()
    return x.grad


def logits(*shape, seed=0, scale=3.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


# ---- values and gradients --------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-11)])
def test_value_and_gradient(name, dtype, tolerance):
    s, t = logits(4, 7, dtype=dtype), logits(4, 7, seed=1, dtype=dtype)
    f = CASES[name][0]
    assert f(s, t).shape == (4,) and f(s, t).dtype == dtype
    np.testing.assert_allclose(f(s, t).numpy(), reference(name, s, t), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gradient(lambda x: f(x, t), s), numeric_gradient(name, s, t), rtol=1e-4, atol=1e-5)
    # the teacher's side has a gradient too: a learned temperature reaches the loss through both
    both = torch.autograd.gradcheck(f, (s.double().requires_grad_(), t.double().requires_grad_()))
    assert both


@each
def test_leading_dimensions_and_half_precision(name):
    f = CASES[name][0]
    s, t = logits(2, 3, 6), logits(2, 3, 6, seed=1)
    torch.testing.assert_close(f(s, t), f(s.view(6, 6), t.view(6, 6)).view(2, 3))
    for dtype in (torch.float16, torch.bfloat16):
        a, b = s.to(dtype), t.to(dtype)
        assert f(a, b).dtype == torch.float32 and gradient(lambda x, b=b: f(x, b), a).dtype == dtype
        torch.testing.assert_close(f(a, b), f(a.float(), b.float()), rtol=0, atol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(f(a, b), f(a.float(), b.float()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="differ in shape"):
        f(s, t[..., :1])


@each
def test_a_gap_of_200_and_masked_classes(name):
    f = CASES[name][0]
    s, t = torch.tensor([[200.0, 0.0, -3.0]]), torch.tensor([[0.0, 200.0, 5.0]])
    expected = reference(name, s, t)[0]
    assert f(s, t).item() == pytest.approx(expected, rel=1e-5) if expected < 1e9 else f(s, t).item() > 190
    assert gradient(lambda x: f(x, t), s).isfinite().all()
    assert f(s, s).item() == 0 and (gradient(lambda x: f(x, s), s) == 0).all()
    # a class that both rule out adds nothing
    a, b = torch.tensor([[1.0, 2.0, 0.3, -INF]]), torch.tensor([[0.5, -1.0, 0.2, -INF]])
    assert f(a, b).item() == pytest.approx(f(a[:, :3], b[:, :3]).item(), rel=1e-6)
    inside = gradient(lambda x: f(x, b[:, :3]), a[:, :3])
    torch.testing.assert_close(gradient(lambda x: f(x, b), a)[:, :3], inside, rtol=1e-5, atol=1e-6)
    for one, other in ((a, b), (b, a)):  # ruled out by one of them alone: finite where the divergence is bounded
        other = other.nan_to_num(neginf=0.0)
        if name in BOUNDED:
            assert f(one, other).item() == pytest.approx(reference(name, one, other)[0], rel=1e-5)
            assert f(other, one).item() == pytest.approx(reference(name, other, one)[0], rel=1e-5)
        assert not f(one, other).isnan().any() and not f(other, one).isnan().any()
        assert not gradient(lambda x, other=other: f(x, other), one).isnan().any()
        assert not gradient(lambda x, one=one: f(x, one), other).isnan().any()


@quick
@given(*[arrays(np.float64, (3, 5), elements=st.floats(-30, 30))] * 2, st.floats(-40, 40), st.floats(-40, 40))
def test_all_are_divergences(s, t, a, b):
    s, t = torch.tensor(s), torch.tensor(t)
    for name, (f, _) in CASES.items():
        value = f(s, t)
        assert (value >= -1e-12).all() and (f(s, s) == 0).all(), name
        torch.testing.assert_close(f(s + a, t + b), value, rtol=1e-8, atol=1e-10, msg=name)
    assert (total_variation(s, t) <= 1 + 1e-12).all()
    assert (skew_kl(s, t, 0.3) <= -math.log(0.3) + 1e-12).all()
    assert (jsd(s, t) <= 4 * math.log(2) + 1e-12).all()


# ---- the ends of skew and beta ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jsd_tends_to_both_kls_instead_of_vanishing(dtype):
    s, t = logits(6, 8, scale=1.0, dtype=dtype), logits(6, 8, seed=1, scale=1.0, dtype=dtype)
    assert torch.equal(jsd(s, t, 0), kl(s, t)) and torch.equal(jsd(s, t, 1), reverse_kl(s, t))
    noise = 5e-6 if dtype == torch.float32 else 1e-12
    for beta in (1e-3, 1e-5, 1e-7):  # the distance to the limit goes down with beta, and drowns in no rounding
        assert (jsd(s, t, beta) - kl(s, t)).abs().max() < 100 * beta + noise
        near = gradient(lambda x, beta=beta: jsd(x, t, beta), s) - gradient(lambda x: kl(x, t), s)
        assert near.abs().max() < 100 * beta + noise
        if dtype == torch.float64:  # 1 - 1e-7 has seven digits fewer in what is left of 1
            assert (jsd(s, t, 1 - beta) - reverse_kl(s, t)).abs().max() < 100 * beta + 1e-8
    assert (jsd(s, t, 0.999) - reverse_kl(s, t)).abs().max() < 0.1


def test_skew_0_is_kl_and_the_skewed_ones_mirror_each_other():
    s, t = logits(6, 8), logits(6, 8, seed=1)
    assert torch.equal(skew_kl(s, t, 0), kl(s, t)) and torch.equal(skew_reverse_kl(s, t, 0), reverse_kl(s, t))
    assert torch.equal(skew_kl(s, t, 0.2), skew_reverse_kl(t, s, 0.2))
    torch.testing.assert_close(skew_kl(s, t, 1e-6), kl(s, t), rtol=1e-2, atol=1e-3)
    # 1 - 1e-6 leaves a float32 one digit of the 1e-6 that decides here
    apart = torch.tensor([[0.0, 200.0]]), torch.tensor([[200.0, 0.0]])
    assert skew_kl(*apart, 1e-6).item() == pytest.approx(-math.log(1e-6), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_near_the_teacher_all_have_the_scale_of_kl(beta):
    t = logits(5, 6, dtype=torch.float64)
    s = t + 1e-4 * logits(5, 6, seed=1, dtype=torch.float64)
    torch.testing.assert_close(jsd(s, t, beta), kl(s, t), rtol=1e-3, atol=0)
    torch.testing.assert_close(symmetric_kl(s, t), kl(s, t), rtol=1e-3, atol=0)
    torch.testing.assert_close(skew_kl(s, t, 0.1), 0.81 * kl(s, t), rtol=1e-3, atol=0)


def test_precise_next_to_the_teacher_in_float32():
    t = logits(5, 10)
    s = t + 0.01 * logits(5, 10, seed=1)
    for name, (f, _) in CASES.items():
        found, wide = gradient(lambda x, f=f: f(x, t), s), gradient(lambda x, f=f: f(x, t.double()), s.double())
        torch.testing.assert_close(found.double(), wide, rtol=2e-3, atol=2e-6, msg=name)


# ---- terms -----------------------------------------------------------------------------------------------------------

TERMS = {
    "reverse": (ReverseKL, 2),
    "symmetric": (SymmetricKL, 2),
    "skew 0.1": (SkewKL, 2),
    "skew 0.7": (lambda **more: SkewKL(skew=0.7, **more), 2),
    "skew reverse 0.1": (SkewReverseKL, 2),
    "jsd 0.5": (JSD, 2),
    "jsd 0.1": (lambda **more: JSD(beta=0.1, **more), 2),
    "tv": (TotalVariation, 1),
}


def value(term, s, t):
    return term(Outputs(s), Outputs(t), Batch(torch.zeros(len(s), 1), torch.zeros(len(s), dtype=torch.long)))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 500.0])
def test_terms_are_the_divergence_of_softened_outputs_times_a_power_of_t(name, temperature):
    s, t = logits(4, 6), logits(4, 6, seed=1)
    make, order = TERMS[name]
    expected = np.array(reference(name, s.double() / temperature, t.double() / temperature)) * temperature**order
    np.testing.assert_allclose(value(make(temperature=temperature), s, t).numpy(), expected, rtol=1e-4, atol=1e-6)
    shared = make()
    objective = Objective({"it": shared}, temperature=temperature, alpha=0.25)
    assert shared.role == "soft" and shared.rowwise and objective.weights() == [0.25]
    np.testing.assert_allclose(value(shared, s, t).numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_keeps_its_size_as_t_grows(name):
    s, t = logits(4, 6, scale=1.0), logits(4, 6, seed=1, scale=1.0)
    make, _ = TERMS[name]
    sizes = [gradient(lambda x, T=T: value(make(temperature=T), x, t), s).norm().item() for T in (100.0, 1e4)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05) and sizes[1] > 0.01


@pytest.mark.parametrize("name", TERMS)
def test_a_class_that_the_student_rules_out_makes_no_nan_at_any_temperature(name):
    t = torch.tensor([[0.5, -1.0, 0.3]])
    for out, temperature in itertools.product((-INF, torch.finfo(torch.float32).min), (0.5, 4.0, 64.0, 1000.0)):
        s, term = torch.tensor([[1.0, 2.0, out]]), TERMS[name][0](temperature=temperature)
        assert value(term, s, t).item() >= 0
        assert gradient(lambda x, term=term: 100 * value(term, x, t), s).isfinite().all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SkewKL(skew=1.0), "skew: 1.0"),
        (lambda: SkewReverseKL(skew=-0.1), "skew: -0.1"),
        (lambda: JSD(beta=1.5), "beta: 1.5"),
        (lambda: JSD(beta=math.nan), "beta: nan"),
        (lambda: TotalVariation(weight=-1), "weight: -1"),
    ],
)
def test_wrong_values_are_refused(make, says):
    with pytest.raises(UserError) as caught:
        make()
    assert says in str(caught.value) and "accepted" in str(caught.value) and "\n" not in str(caught.value)


def test_a_divergence_of_ones_own_takes_one_method():
    class Squared(Divergence):
        def divergence(self, student, teacher):
            return (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)

    s, t = logits(4, 6), logits(4, 6, seed=1)
    expected = 9 * ((s / 3).softmax(-1) - (t / 3).softmax(-1)).square().sum(-1)
    torch.testing.assert_close(value(Squared(temperature=3), s, t), expected)
    assert isinstance(KL(), Divergence)
    with pytest.raises(TypeError, match="define divergence"):
        value(Divergence(), s, t)
