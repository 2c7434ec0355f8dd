"""Divergences against plain-loop references in float64, value and gradient; schedules, taps, seeds, batches."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdlab.functional import (
    Batch,
    Outputs,
    attention_map,
    cross_entropy,
    decoupled_kl,
    kl,
    log_probabilities,
    reverse_gradient,
    squared_error,
    standardize,
)

INF = math.inf
torch.set_num_threads(1)
quick = settings(max_examples=60, deadline=None, derandomize=True)
rows_of_logits = arrays(np.float64, (3, 5), elements=st.floats(-30, 30))


# ---- references: plain loops over Python floats ----------------------------------------------------------------------


def log_softmax_of(row):
    top = max(row)
    return [z - top - math.log(math.fsum(math.exp(x - top) for x in row)) for z in row]


def kl_of(student, teacher):
    total = 0.0
    for log_q, log_p in zip(log_softmax_of(student), log_softmax_of(teacher), strict=True):
        if log_p > -INF:
            total += math.exp(log_p) * (log_p - log_q)
    return total


def ce_of(row, target, smoothing=0.0):
    """``target`` is a list of probabilities."""
    log_q, classes = log_softmax_of(row), len(row)
    smooth = [(1 - smoothing) * t + smoothing / classes for t in target]
    return -math.fsum(t * q for t, q in zip(smooth, log_q, strict=True) if t > 0)


def dkd_parts_of(student, teacher, target):
    """TCKD and NCKD as Zhao et al. define them (equations 3 to 7)."""

    def split(row):
        p = [math.exp(x) for x in log_softmax_of(row)]
        others = [z for i, z in enumerate(row) if i != target]
        return p[target], math.fsum(x for i, x in enumerate(p) if i != target), others

    (pt, rest_t, others_t), (ps, rest_s, others_s) = split(teacher), split(student)
    tckd = sum(a * math.log(a / b) for a, b in ((pt, ps), (rest_t, rest_s)) if a > 0)
    return tckd, kl_of(others_s, others_t)


def numeric_gradient(f, x, eps=1e-6):
    """Central differences of a scalar function of an array."""
    grad = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[at] += eps
        down[at] -= eps
        grad[at] = (f(up) - f(down)) / (2 * eps)
    return grad


def gradient(f, x):
    x = x.clone().requires_grad_()
    f(x).sum().backward()
    return x.grad


def logits(*shape, seed=0, scale=3.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


# ---- KL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (4, 100)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_kl_value_and_gradient(shape, dtype, tolerance):
    s, t = logits(*shape, dtype=dtype), logits(*shape, seed=1, dtype=dtype)
    expected = torch.tensor([kl_of(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True)], dtype=torch.float64)
    assert kl(s, t).shape == (shape[0],) and kl(s, t).dtype == dtype
    torch.testing.assert_close(kl(s, t).double(), expected, rtol=tolerance, atol=tolerance)
    # analytic: dKL/ds = softmax(s) - softmax(t)
    q, p = (np.exp([log_softmax_of(r) for r in x.tolist()]) for x in (s, t))
    torch.testing.assert_close(gradient(lambda x: kl(x, t), s).double(), torch.tensor(q - p), rtol=1e-5, atol=tolerance)


def test_kl_sums_over_classes_and_leaves_rows_apart():
    s, t = logits(4, 6), logits(4, 6, seed=1)
    # every class twice: probabilities halve, ratios stay, so the sum stays; a mean over classes would halve
    torch.testing.assert_close(kl(s.repeat(1, 2), t.repeat(1, 2)), kl(s, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl(s.repeat(3, 1), t.repeat(3, 1)), kl(s, t).repeat(3), rtol=0, atol=0)
    torch.testing.assert_close(kl(s[2:3], t[2:3]), kl(s, t)[2:3], rtol=0, atol=1e-7)
    tokens = kl(s.view(2, 2, 6), t.view(2, 2, 6))
    torch.testing.assert_close(tokens, kl(s, t).view(2, 2), rtol=0, atol=1e-7)


def test_kl_is_of_the_student_from_the_teacher_and_not_the_reverse():
    s, t = torch.tensor([[math.log(0.9), math.log(0.1)]]), torch.tensor([[math.log(0.5), math.log(0.5)]])
    assert kl(s, t).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)


def test_kl_with_masked_classes():
    both = kl(torch.tensor([[1.0, 2.0, -INF]]), torch.tensor([[0.5, -1.0, -INF]]))
    assert both.item() == pytest.approx(kl_of([1.0, 2.0], [0.5, -1.0]), rel=1e-5)
    s, t = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 1.0, -INF]])
    assert kl(s, t).item() == pytest.approx(kl_of([1.0, 2.0, 3.0], [0.0, 1.0, -INF]), rel=1e-5)
    for student in (s, torch.tensor([[1.0, 2.0, -INF]])):
        grad = gradient(lambda x: kl(x, t), student)
        expected = student.double().softmax(-1) - t.double().softmax(-1)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)
    # the student rules out what the teacher believes: infinitely bad, said without NaN
    wrong = torch.tensor([[1.0, 2.0, -INF]])
    assert kl(wrong, s).item() > 1e30
    assert gradient(lambda x: kl(x, s), wrong).isfinite().all()


def test_kl_at_a_logit_gap_of_200():
    s, t = torch.tensor([[200.0, 0.0, -3.0]]), torch.tensor([[0.0, 200.0, 5.0]])
    assert kl(s, t).item() == pytest.approx(kl_of(s[0].tolist(), t[0].tolist()), rel=1e-6)
    torch.testing.assert_close(gradient(lambda x: kl(x, t), s), torch.tensor([[1.0, -1.0, 0.0]]), rtol=0, atol=1e-6)
    assert kl(s, s).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    s, t = logits(5, 7).to(dtype), logits(5, 7, seed=1).to(dtype)
    y = torch.tensor([0, 3, 6, 1, 2])
    for f in (kl, squared_error, lambda a, b: cross_entropy(a, y), lambda a, b: sum(decoupled_kl(a, b, y))):
        assert f(s, t).dtype == torch.float32
        torch.testing.assert_close(f(s, t), f(s.float(), t.float()), rtol=1e-6, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = f(s, t)
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, f(s.float(), t.float()), rtol=1e-6, atol=1e-6)
        assert gradient(lambda x, f=f: f(x, t), s).dtype == dtype


@pytest.mark.parametrize("f", [kl, squared_error, lambda s, t: decoupled_kl(s, t, torch.zeros(4, dtype=torch.long))])
@pytest.mark.parametrize("shape", [(4, 1), (6,), (1, 6), (3, 6)])
def test_a_teacher_of_another_shape_is_refused(f, shape):
    with pytest.raises(ValueError, match="differ in shape"):
        f(logits(4, 6), logits(*shape))


@quick
@given(rows_of_logits, rows_of_logits, st.floats(-40, 40), st.floats(-40, 40), st.integers(0, 4))
def test_kl_properties(s, t, a, b, target):
    s, t = torch.tensor(s), torch.tensor(t)
    value = kl(s, t)
    assert (value >= -1e-13).all() and (kl(s, s) == 0).all()
    torch.testing.assert_close(kl(s + a, t + b), value, rtol=1e-9, atol=1e-11)
    # KL = TCKD + (1 - p_t) NCKD
    tckd, nckd = decoupled_kl(s, t, torch.full((3,), target))
    rest = t.softmax(-1).sum(-1) - t.softmax(-1)[:, target]
    torch.testing.assert_close(tckd + rest * nckd, value, rtol=1e-8, atol=1e-10)
    assert (tckd >= -1e-13).all() and (nckd >= -1e-13).all()


@quick
@given(arrays(np.float32, (3, 5), elements=st.floats(-30, 30, width=32)), st.floats(-1000, 1000))
def test_log_probabilities_sum_to_one_and_ignore_a_shift(z, shift):
    z = torch.tensor(z)
    torch.testing.assert_close(log_probabilities(z).exp().sum(-1), torch.ones(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_probabilities(z + shift), log_probabilities(z), rtol=1e-4, atol=5e-4)


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_cross_entropy_value_and_gradient(smoothing, kind):
    x, classes = logits(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    weights = logits(6, 5, seed=3).softmax(-1) if kind == "soft" else torch.eye(5)[classes]
    target = weights if kind == "soft" else classes
    expected = [ce_of(r, w, smoothing) for r, w in zip(x.tolist(), weights.tolist(), strict=True)]
    got = cross_entropy(x, target, smoothing)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    smooth = (1 - smoothing) * weights.double() + smoothing / 5
    q = torch.tensor([[math.exp(v) for v in log_softmax_of(r)] for r in x.tolist()], dtype=torch.float64)
    grad = gradient(lambda z: cross_entropy(z, target, smoothing), x)
    torch.testing.assert_close(grad.double(), q - smooth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [torch.full((3,), -100), torch.zeros(3, 5)], ids=["hard", "soft"])
def test_cross_entropy_of_unlabelled_rows_is_zero_with_zero_gradient(smoothing, target):
    x = logits(3, 5)
    assert (cross_entropy(x, target, smoothing) == 0).all()
    assert (gradient(lambda z: cross_entropy(z, target, smoothing), x) == 0).all()


@pytest.mark.parametrize("target", [torch.tensor([1]), torch.tensor([[0.25, 0.75, 0.0]])], ids=["hard", "soft"])
def test_cross_entropy_with_a_masked_class(target):
    x = torch.tensor([[1.0, 2.0, -INF]])
    p = [0.25, 0.75] if target.ndim == 2 else [0.0, 1.0]
    assert cross_entropy(x, target).item() == pytest.approx(ce_of([1.0, 2.0], p), rel=1e-5)
    assert gradient(lambda z: cross_entropy(z, target), x).isfinite().all()


def test_cross_entropy_takes_soft_targets_in_half_precision_and_a_gap_of_200():
    x, t = logits(3, 4), logits(3, 4, seed=2).softmax(-1)
    torch.testing.assert_close(cross_entropy(x.half(), t.half()), cross_entropy(x.half().float(), t.half().float()))
    assert cross_entropy(torch.tensor([[200.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(200.0)


# ---- the others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 5), (2, 3, 4, 4), (1, 1)])
def test_squared_error_value_and_gradient(shape):
    s, t = logits(*shape), logits(*shape, seed=1)
    expected = [np.mean((a - b) ** 2) for a, b in zip(s.double().numpy(), t.double().numpy(), strict=True)]
    torch.testing.assert_close(squared_error(s, t).double(), torch.tensor(np.array(expected)), rtol=1e-5, atol=1e-7)
    per_row = math.prod(shape[1:])
    torch.testing.assert_close(gradient(lambda x: squared_error(x, t), s), 2 * (s - t) / per_row)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_decoupled_kl_value_and_gradient(classes):
    s, t = logits(5, classes), logits(5, classes, seed=1)
    y = torch.arange(5) % classes
    rows = list(zip(s.tolist(), t.tolist(), y.tolist(), strict=True))
    expected = torch.tensor([dkd_parts_of(*row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(decoupled_kl(s, t, y), -1).double(), expected, rtol=1e-4, atol=1e-5)
    for part in range(2):
        grad = gradient(lambda x, part=part: decoupled_kl(x, t, y)[part], s).double().numpy()
        for i, (a, b, c) in enumerate(rows):
            own = numeric_gradient(lambda x, b=b, c=c, part=part: dkd_parts_of(x.tolist(), b, c)[part], np.array(a))
            np.testing.assert_allclose(grad[i], own, rtol=1e-3, atol=1e-5)


def test_decoupled_kl_at_edges():
    s, t = torch.tensor([[200.0, 0.0, -5.0]]), torch.tensor([[150.0, 0.0, 3.0]])
    for target in range(3):
        y = torch.tensor([target])
        got = [float(x) for x in decoupled_kl(s, t, y)]
        assert got == pytest.approx(dkd_parts_of(s[0].tolist(), t[0].tolist(), target), rel=1e-4, abs=1e-6)
        assert gradient(lambda x, y=y: sum(decoupled_kl(x, t, y)), s).isfinite().all()
        same = decoupled_kl(s, s, y)
        assert same[0].item() == same[1].item() == 0
    masked, partner = torch.tensor([[1.0, 2.0, 0.5, -INF]]), torch.tensor([[0.3, -1.0, 2.0, -INF]])
    got = [float(x) for x in decoupled_kl(masked, partner, torch.tensor([1]))]
    assert got == pytest.approx(dkd_parts_of(masked[0, :3].tolist(), partner[0, :3].tolist(), 1), rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attention_map(power):
    f = logits(2, 3, 2, 4)
    maps = np.zeros((2, 8))
    for b, c, h, w in itertools.product(range(2), range(3), range(2), range(4)):
        maps[b, h * 4 + w] += abs(float(f[b, c, h, w])) ** power / 3
    maps /= np.sqrt((maps**2).sum(1, keepdims=True))
    np.testing.assert_allclose(attention_map(f, power).numpy(), maps, rtol=1e-5)
    dead = gradient(attention_map, torch.zeros(1, 3, 2, 2))  # a layer of dead units must not make NaN
    assert (dead == 0).all()
    assert attention_map(f.half()).dtype == torch.float32


def test_standardize():
    z = logits(4, 6)
    rows = z.double().numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True))
    np.testing.assert_allclose(standardize(z).numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(standardize(5 * z + 3).numpy(), expected, rtol=1e-3, atol=1e-5)
    flat = torch.ones(2, 5)
    assert (standardize(flat) == 0).all() and gradient(lambda x: standardize(x)[:, 0], flat).isfinite().all()


def test_reverse_gradient():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reverse_gradient(x, 0.25)
    (3 * y).sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, torch.tensor([-0.75, -0.75]))


def test_a_teacher_reads_the_clean_inputs():
    plain = Batch(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))
    assert plain.clean_view() is plain
    attacked = Batch(torch.ones(2, 3), torch.zeros(2, dtype=torch.long), teacher_inputs=torch.zeros(2, 3))
    assert attacked.clean_view().inputs.sum() == 0 and attacked.clean_view().teacher_inputs is None
    assert attacked.inputs.sum() == 6


def test_what_else_a_network_says_becomes_heads():
    found = Outputs.of({"logits": torch.zeros(2, 3), "exit": torch.ones(2, 3)})
    assert found.logits.sum() == 0 and list(found.heads) == ["exit"] and found.heads["exit"].sum() == 6
