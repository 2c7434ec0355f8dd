"""Terms that need no teacher's answer to a row: agreement of two views, and the game of the discriminator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.functional import NO_LABEL, Batch, Outputs, StepTotals
from kdlab.losses import Consistency, CrossEntropy, Discriminator, Objective

torch.set_num_threads(1)


def logits(rows, classes=5, seed=0, scale=3.0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def paired(rows):
    """Weak rows, of which the first has a label, and then a strong view of each."""
    targets = torch.full((2 * rows,), NO_LABEL)
    targets[0] = 1
    partner = torch.cat([torch.full((rows,), -1), torch.arange(rows)])
    return Batch(torch.zeros(2 * rows, 1), targets, partner=partner)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def paper(z, partner, target, threshold, sharpen):
    """FixMatch's and UDA's unsupervised loss of each row, and its gradient."""
    values, grads = np.zeros(len(z)), np.zeros_like(z)
    for i, j in enumerate(partner):
        if j < 0 or (q := softmax(z[j])).max() < threshold:
            continue
        p = softmax(z[i])
        if target == "hard":
            wanted = np.eye(len(p))[q.argmax()]
            values[i] = -np.log(p[q.argmax()])
        else:
            wanted = softmax(z[j] / sharpen)
            values[i] = (wanted * (np.log(wanted) - np.log(p))).sum()
        grads[i] = p - wanted
    return values, grads


@pytest.mark.parametrize(
    ("target", "threshold", "sharpen"), [("hard", 0.95, 1.0), ("hard", 0.0, 1.0), ("soft", 0.8, 0.4), ("soft", 0, 1)]
)
def test_consistency_is_the_papers(target, threshold, sharpen):
    batch, z = paired(12), logits(24).requires_grad_()
    found = Consistency(target, threshold, sharpen)(Outputs(z), None, batch)
    values, grads = paper(z.detach().numpy(), batch.partner.tolist(), target, threshold, sharpen)
    if threshold:
        assert 0 < (values > 0).sum() < 12, "some rows are sure, some are not"
    np.testing.assert_allclose(found.detach().numpy(), values, rtol=1e-9, atol=1e-12)
    found.sum().backward()
    np.testing.assert_allclose(z.grad.numpy(), grads, rtol=1e-9, atol=1e-12)
    assert not z.grad[:12].any(), "nothing flows into the weak view"


def test_a_view_that_agrees_costs_nothing():
    half = logits(6)
    found = Consistency("soft", 0.0)(Outputs(torch.cat([half, half])), None, paired(6))
    assert found.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_consistency_in_half_precision(dtype):
    batch, z = paired(8), logits(16).to(dtype)
    for term in (Consistency(), Consistency("soft", 0.5, 0.4)):
        whole = term(Outputs(z.double()), None, batch)
        torch.testing.assert_close(term(Outputs(z), None, batch).double(), whole, rtol=1e-3, atol=1e-3)


def test_the_objective_averages_over_the_rows_that_have_partners():
    batch, z = paired(10), logits(20)
    objective = Objective({"ce": CrossEntropy(), "consistency": Consistency(threshold=0.5)})
    losses = objective(Outputs(z), None, batch)
    values, _ = paper(z.numpy(), batch.partner.tolist(), "hard", 0.5, 1.0)
    assert float(losses.values[1]) == pytest.approx(values[10:].mean(), rel=1e-5)
    assert float(losses.values[0]) == pytest.approx(-np.log(softmax(z[0].numpy())[1]), rel=1e-5)
    assert batch.count() == StepTotals(1.0, 20.0, 1, 0.0, 10.0)
    weights = torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weighed = Batch(batch.inputs, batch.targets, weight=weights, partner=batch.partner)
    expected = (values * weights.numpy())[10:].sum() / weights[10:].sum()
    assert float(objective(Outputs(z), None, weighed).values[1]) == pytest.approx(float(expected), rel=1e-5)


def test_a_step_without_partners_counts_nothing():
    batch = Batch(torch.zeros(3, 1), torch.tensor([0, 1, 2]), partner=torch.full((3,), -1))
    losses = Objective({"consistency": Consistency()})(Outputs(logits(3).requires_grad_()), None, batch)
    assert float(losses.total.detach()) == 0 and losses.counted == (False,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "both"}, "target: "),
        ({"threshold": 1.0}, "threshold: 1.0; accepted: "),
        ({"sharpen": 0}, "sharpen: 0; accepted: "),
    ],
)
def test_what_consistency_refuses(options, said):
    with pytest.raises(UserError, match=said):
        Consistency(**options)


def test_consistency_asks_for_partners():
    with pytest.raises(UserError, match="accepted: with batch_transform=strong_view"):
        Consistency()(Outputs(logits(2)), None, Batch(torch.zeros(2, 1), torch.tensor([0, 1])))


# ---- the discriminator


def discriminator(ours, theirs, **options):
    torch.manual_seed(0)
    term = Discriminator(hidden=[7], **options)
    term.prepare(ours, theirs)
    return term.double()


def judged(term, x):
    """What the discriminator says of (rows, width), in numpy."""
    first, last = term.judge[0], term.judge[2]
    weights = [p.detach().numpy() for layer in (first, last) for p in (layer.weight, layer.bias)]
    inner = x @ weights[0].T + weights[1]
    inner = np.where(inner > 0, inner, 0.2 * inner)
    return 1 / (1 + np.exp(-(inner @ weights[2].T + weights[3])[:, 0]))


def test_the_discriminator_is_one_cross_entropy_a_row_and_the_student_gets_its_reverse():
    s, t = logits(6).requires_grad_(), logits(6, seed=1)
    batch = Batch(torch.zeros(6, 1), torch.full((6,), NO_LABEL))
    term = discriminator(Outputs(s), Outputs(t), strength=0.3)

    def value(x):
        return -(np.log(judged(term, t.numpy())) + np.log(1 - judged(term, x))) / 2

    found = term(Outputs(s), Outputs(t), batch)
    np.testing.assert_allclose(found.detach().numpy(), value(s.detach().numpy()), rtol=1e-9)
    found.sum().backward()
    for i, c in ((0, 0), (3, 2), (5, 4)):
        moved = [s.detach().numpy().copy() for _ in range(2)]
        moved[0][i, c] += 1e-6
        moved[1][i, c] -= 1e-6
        slope = (value(moved[0]) - value(moved[1])).sum() / 2e-6
        assert float(s.grad[i, c]) == pytest.approx(-0.3 * slope, rel=1e-4, abs=1e-9)
    bias, step = term.judge[2].bias, 1e-6
    with torch.no_grad():
        bias += step
    higher = value(s.detach().numpy()).sum()
    with torch.no_grad():
        bias -= 2 * step
    slope = (higher - value(s.detach().numpy()).sum()) / (2 * step)
    assert float(bias.grad) == pytest.approx(slope, rel=1e-4), "its own gradient is not reversed"


def test_a_discriminator_that_knows_nothing_says_log_2():
    z = logits(4)
    term = discriminator(Outputs(z), Outputs(z))
    nn.init.zeros_(term.judge[2].weight)
    nn.init.zeros_(term.judge[2].bias)
    found = term(Outputs(z), Outputs(z), Batch(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)))
    assert found.tolist() == pytest.approx([math.log(2)] * 4)


def test_the_discriminator_learns_and_the_student_moves_against_it():
    """Alternating is not needed: one backward pass lowers D's loss in D, and raises it in the student."""
    s, t = logits(64, scale=1.0) - 1, logits(64, seed=1, scale=1.0) + 1
    batch = Batch(torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64))
    term = discriminator(Outputs(s), Outputs(t))
    optimizer = torch.optim.Adam(term.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = term(Outputs(s), Outputs(t), batch).mean()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.3
    x = s.clone().requires_grad_()
    term(Outputs(x), Outputs(t), batch).mean().backward()
    fooled = (x - 100 * x.grad).detach()
    assert float(term(Outputs(fooled), Outputs(t), batch).mean()) > float(loss)


def test_the_discriminator_on_layers_fits_their_widths_once():
    gen = torch.Generator().manual_seed(2)
    ours, theirs = (torch.randn(4, c, 2, 2, generator=gen, dtype=torch.float64) for c in (3, 6))
    s, t = Outputs(logits(4), {"a": ours.requires_grad_()}), Outputs(logits(4), {"b": theirs})
    term = discriminator(s, t, student_layer="a", teacher_layer="b")
    assert term.student_layers == ("a",) and term.teacher_layers == ("b",) and not term.rowwise
    before = term.fit
    term.prepare(s, t)
    assert term.fit is before
    value = term(s, t, Batch(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)))
    assert value.shape == (4,)
    value.sum().backward()
    assert ours.grad.abs().sum() > 0 and term.fit.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_discriminator_in_half_precision(dtype):
    s, t = logits(6).to(dtype), logits(6, seed=1).to(dtype)
    batch = Batch(torch.zeros(6, 1), torch.zeros(6, dtype=torch.int64))
    term = discriminator(Outputs(s), Outputs(t)).float()
    expected = term(Outputs(s.float()), Outputs(t.float()), batch)
    torch.testing.assert_close(term(Outputs(s), Outputs(t), batch), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(term(Outputs(s), Outputs(t), batch).float(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden": [0]}, "hidden: "),
        ({"strength": -1}, "strength: -1; accepted: "),
        ({"student_layer": "a"}, "student_layer, teacher_layer: a and None; accepted: both, or neither"),
    ],
)
def test_what_the_discriminator_refuses(options, said):
    with pytest.raises(UserError, match=said):
        Discriminator(**options)
