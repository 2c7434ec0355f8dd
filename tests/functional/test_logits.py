"""Projected, sparse and sampled logits against dense ones: losses, bounds, unbiasedness, errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers.vocabulary_cases import CLASSES, ROWS, TARGETS, batch, draw, head, same, step, terms
from kdlab.errors import UserError
from kdlab.functional import Outputs, Projected, Sampled, Sparse, align_logits, dense, kl
from kdlab.losses import (
    DKD,
    JSD,
    KL,
    CrossEntropy,
    LogitMSE,
    Objective,
    ReverseKL,
    SkewKL,
    StandardizedTemperature,
    SymmetricKL,
    Temperature,
    TotalVariation,
)

INF = math.inf
torch.set_num_threads(1)


# ---- sparse ----------------------------------------------------------------------------------------------------------


def log_softmax_of(row):
    top = max(row)
    return [z - top - math.log(math.fsum(math.exp(x - top) for x in row)) for z in row]


@pytest.mark.parametrize("k", [1, 3, CLASSES])
def test_sparse_of_dense(k):
    z = draw(4, CLASSES) * 3
    found = Sparse.of(z, k)
    assert found.shape == (4, CLASSES) and found.log_probs.shape == (4, k) and len(found) == 4
    for row, ids, kept, tail in zip(z.tolist(), found.ids, found.log_probs, found.tail, strict=True):
        log_p = log_softmax_of(row)
        assert sorted(ids.tolist()) == sorted(sorted(range(CLASSES), key=lambda c: -row[c])[:k])
        assert kept.tolist() == pytest.approx([log_p[i] for i in ids.tolist()])
        rest = math.fsum(math.exp(x) for c, x in enumerate(log_p) if c not in ids.tolist())
        assert (tail == -INF) == (k == CLASSES)
        assert math.exp(tail) == pytest.approx(rest, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("name", list(terms()))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0])
def test_all_classes_are_the_dense_loss(name, temperature):
    s, t = draw(6, CLASSES) * 3, draw(6, CLASSES, seed=1) * 3
    results = []
    for teacher in (t, Sparse.of(t, CLASSES)):
        term, x = terms()[name], s.clone().requires_grad_()
        if name != "ce":
            term.temperature = Temperature(temperature)
        value = term(Outputs(x), Outputs(teacher), batch(TARGETS[:6]))
        value.sum().backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in terms() if n != "ce"])
def test_fewer_classes_are_a_lower_bound_that_grows_with_k(name):
    s, t = draw(20, CLASSES) * 2, draw(20, CLASSES, seed=1) * 2
    term = terms()[name]
    if name == "symmetric":
        term.temperature = Temperature(1.0)
    values = [
        term(Outputs(s), Outputs(Sparse.of(t, k)), batch(torch.zeros(20, dtype=torch.long)))
        for k in range(1, CLASSES + 1)
    ]
    for less, more in itertools.pairwise(values):
        assert (less <= more + 1e-12).all()
    assert (values[1] < values[-1] - 1e-3).any()


def test_sparse_kl_is_that_of_the_buckets():
    s, t, k = draw(5, CLASSES) * 2, draw(5, CLASSES, seed=1) * 2, 3
    value = kl(*align_logits(s, Sparse.of(t, k)))
    for i in range(5):
        q, p = (np.exp(log_softmax_of(z[i].tolist())) for z in (s, t))
        top = np.argsort(-p)[:k]
        buckets = [(p[c], q[c]) for c in top] + [(1 - p[top].sum(), 1 - q[top].sum())]
        assert value[i].item() == pytest.approx(sum(a * math.log(a / b) for a, b in buckets), rel=1e-9)


def test_a_small_tail_and_narrow_types_are_kept():
    z = torch.tensor([[40.0, 0.0, 0.0, 1.0]])
    found = Sparse.of(z, 1)
    assert found.tail.exp().item() == pytest.approx((2 + math.e) * math.exp(-40), rel=1e-4)
    stored = Sparse(found.ids.int(), found.log_probs.half(), found.tail.half(), 4)
    s = torch.tensor([[1.0, 2.0, 0.5, -INF]], requires_grad=True)
    for ours in (s, s.half(), s.bfloat16()):
        value = kl(*align_logits(ours, stored))
        assert value.item() == pytest.approx(-math.log(math.e / (math.e + math.e**2 + math.e**0.5)), rel=1e-2)
        value.sum().backward()
    assert s.grad.isfinite().all()
    all_of_it = Sparse.of(torch.tensor([[3.0, 1.0]]).half(), 2)
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    for term in (KL(), ReverseKL(), JSD(), SymmetricKL(), TotalVariation(), SkewKL(temperature=3.0)):
        value = term(Outputs(x), Outputs(all_of_it), batch(TARGETS[:1]))
        value.sum().backward()
        assert value.isfinite().all() and x.grad.isfinite().all()


# ---- sampled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [1.0, 0.7, 0.0])
def test_sampled_targets_are_unbiased_in_value_and_gradient(flatten):
    s, t, draws = draw(1, CLASSES), draw(1, CLASSES, seed=1), 40_000
    generator = torch.Generator().manual_seed(0)
    sampled = Sampled.of(t.expand(draws, -1), 3, flatten, generator)
    x = s.clone().requires_grad_()
    term = KL()
    values = term(Outputs(x.expand(draws, -1)), Outputs(sampled), batch(torch.zeros(draws, dtype=torch.long)))
    error = values.std().item() / math.sqrt(draws)
    assert values.mean().item() == pytest.approx(kl(s, t).item(), abs=4 * error) and 0 < error < 0.02
    values.mean().backward()
    torch.testing.assert_close(x.grad, s.softmax(-1) - t.softmax(-1), rtol=0, atol=0.01)
    # of a function that lives in the tail, which the most probable classes never reach
    rare = t.argmin().item()
    hits = (sampled.weights * (sampled.ids == rare)).sum(1).mean()
    assert hits.item() == pytest.approx(t.softmax(-1)[0, rare].item(), rel=0.2)
    bare = Sampled(sampled.ids, sampled.weights, CLASSES)
    p = t.softmax(-1)
    torch.testing.assert_close(bare.kl(s.expand(draws, -1)) - values.detach(), -(p * p.log()).sum(-1).expand(draws))


def test_sampled_targets_in_chunks_and_with_masked_classes():
    ours, t = head(0), draw(ROWS, CLASSES, seed=1)
    t[:, 2] = -INF
    for flatten in (1.0, 0.0):
        sampled = Sampled.of(t, 5, flatten, torch.Generator().manual_seed(0))
        assert (sampled.weights[sampled.ids == 2] == 0).all() and sampled.entropy.isfinite().all()
        if flatten == 1:
            torch.testing.assert_close(sampled.weights, torch.full((ROWS, 5), 0.2, dtype=torch.float64))
        objective = Objective({"ce": CrossEntropy(), "kl": KL()}, alpha=0.5, chunk_rows=4)
        expected = step(objective, F.linear(*ours), sampled, batch(), ours)
        same(step(objective, Projected(*ours), sampled, batch(), ours), expected, 1e-10)


# ---- the forms and their errors --------------------------------------------------------------------------------------


def test_the_forms_share_shape_slices_and_detach():
    t = draw(ROWS, CLASSES)
    for form in (Projected(*head(0)), Sparse.of(t, 3), Sampled.of(t, 3)):
        assert form.shape == (ROWS, CLASSES) and form[2:5].shape == (3, CLASSES) and len(form) == ROWS
        assert form[t[:, 0] > 0].shape[0] == int((t[:, 0] > 0).sum())
        assert form.dtype == torch.float64 and form.device.type == "cpu" and form.to("meta").device.type == "meta"
        assert Outputs.of(form).logits is form and Outputs.of({"logits": form}).detach().logits.shape == form.shape
    assert not Projected(*head(0)).detach().weight.requires_grad
    torch.testing.assert_close(dense(Projected(*head(0))[2:5]), F.linear(*head(0))[2:5])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Projected(draw(3, 4), draw(5, 3)), "width 4, a matrix of width 3"),
        (lambda: Projected(draw(3, 4), draw(5, 4), draw(4)), "5 classes"),
        (lambda: Sparse(torch.zeros(3, 2), draw(3, 3), draw(3), 5), "differ in shape"),
        (lambda: Sparse(torch.zeros(3, 2), draw(3, 2), draw(3, 1), 5), "one value a row"),
        (lambda: Sampled(torch.zeros(3, 2), draw(3, 3), 5), "differ in shape"),
    ],
)
def test_parts_that_do_not_fit(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_losses_that_need_every_class_say_so():
    t = draw(ROWS, CLASSES)
    sparse, sampled = Sparse.of(t, 3), Sampled.of(t, 3)
    for term in (DKD(), LogitMSE(), KL(temperature=StandardizedTemperature(2.0))):
        with pytest.raises(UserError, match="logits of all classes"):
            term(Outputs(t), Outputs(sparse), batch())
    with pytest.raises(UserError, match="sampled ones, of 3 classes a row"):
        JSD()(Outputs(t), Outputs(sampled), batch())
    with pytest.raises(UserError, match=r"loss.temperature: .* of 4 with sampled targets; accepted: 1"):
        KL(temperature=4)(Outputs(t), Outputs(sampled), batch())
    with pytest.raises(UserError, match="same number of classes"):
        Objective({"kl": KL()})(Outputs(Projected(*head(0))), Outputs(Sparse.of(t[:, :9], 3)), batch())
