"""Temperatures: constant, scheduled, standardised, learned against the student."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule
from kdlab.losses import KL, LearnedTemperature, Objective, StandardizedTemperature, Temperature

torch.set_num_threads(1)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def logits(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def loss_of(temperature, s, t):
    rows = Batch(torch.zeros(len(s), 1), torch.zeros(len(s), dtype=torch.long))
    return KL(temperature=temperature)(Outputs(s), Outputs(t), rows)


def reference(s, t, temperature):
    """T² KL(softmax(t / T) || softmax(s / T)) per row, float64 NumPy."""

    def log_p(z):
        z = z / temperature
        return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)

    p, q = log_p(np.asarray(t, float)), log_p(np.asarray(s, float))
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)


def test_constant_and_scheduled():
    s, t = logits(4, 6), logits(4, 6, seed=1)
    assert Temperature(4).now == 4.0
    course = Temperature({"start": 8, "end": 2, "shape": "linear"})
    for progress, now in ((0.0, 8.0), (0.5, 5.0), (1.0, 2.0)):
        course.progress = progress
        assert course.now == now
        np.testing.assert_allclose(loss_of(course, s, t).numpy(), reference(s, t, now), rtol=1e-3)
    assert Temperature(Schedule(3, 1)).now == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [4.0, 1e4])
def test_softened_logits_are_at_least_float32(dtype, temperature):
    s = logits(2, 3).to(dtype)
    a, b, factor = Temperature(temperature).soften(s, s)
    assert a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64) and factor == temperature**2
    if temperature > 64 or dtype == torch.float64:
        assert a.dtype == torch.float64
    torch.testing.assert_close(a.double() * temperature, s.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", [1.0, 2.0, 5.0])
def test_standardized(base):
    s, t = logits(5, 8), logits(5, 8, seed=1, scale=9.0)

    def z(x):
        x = x.double().numpy()
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)

    got = loss_of(StandardizedTemperature(base), s, t)
    np.testing.assert_allclose(got.numpy(), reference(z(s), z(t), base), rtol=1e-3, atol=1e-6)
    # neither side's scale nor shift counts
    again = loss_of(StandardizedTemperature(base), 7 * s + 2, 0.1 * t - 4)
    torch.testing.assert_close(again, got, rtol=1e-3, atol=1e-5)
    assert loss_of(StandardizedTemperature(base), s, 3 * s + 1).abs().max() < 1e-5


def test_standardized_gradient():
    s, t = logits(3, 5), logits(3, 5, seed=1)
    x = s.clone().requires_grad_()
    loss_of(StandardizedTemperature(2.0), x, t).sum().backward()

    def f(v):
        z = [(a - a.mean(1, keepdims=True)) / a.std(1, keepdims=True) for a in (v, t.double().numpy())]
        return reference(*z, 2.0).sum()

    wide, eps = s.double().numpy(), 1e-6
    expected = np.zeros_like(wide)
    for at in np.ndindex(*wide.shape):
        step = np.zeros_like(wide)
        step[at] = eps
        expected[at] = (f(wide + step) - f(wide - step)) / (2 * eps)
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_standardized_follows_a_schedule():
    t = StandardizedTemperature({"start": 4, "end": 2})
    t.progress = 0.5
    assert t.soften(logits(2, 3), logits(2, 3))[2] == 9.0


def numeric_slope(temperature, s, t):
    """d loss / d theta of the plain (not reversed) formula, by central differences in float64."""
    low, high, theta, eps = temperature.low, temperature.high, float(temperature.theta.detach()), 1e-5

    def at(x):
        return reference(s, t, low + (high - low) / (1 + math.exp(-x))).sum()

    return (at(theta + eps) - at(theta - eps)) / (2 * eps)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_learned_temperature_gets_the_reversed_gradient(progress, strength):
    s, t = logits(6, 5), logits(6, 5, seed=1)
    learned = LearnedTemperature(start=4.0, strength=strength, until=1.0)
    learned.progress = progress
    loss_of(learned, s, t).sum().backward()
    now = strength * (1 - math.cos(math.pi * progress)) / 2  # 0 at first, all at the end
    expected = -now * numeric_slope(learned, s.double(), t.double())
    assert float(learned.theta.grad) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    if progress:
        assert expected != 0


def test_learned_temperature_leaves_the_students_gradient_alone():
    s, t = logits(6, 5), logits(6, 5, seed=1)
    learned = LearnedTemperature(start=4.0)
    learned.progress = 1.0
    grads = []
    for temperature in (learned, 4.0):
        x = s.clone().requires_grad_()
        loss = loss_of(temperature, x, t)
        np.testing.assert_allclose(loss.detach().numpy(), reference(s, t, 4.0), rtol=1e-4)
        loss.sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_learned_temperature_climbs_the_loss_and_stays_inside():
    s, t = logits(6, 5), logits(6, 5, seed=1)
    learned = LearnedTemperature(start=4.0, low=2.0, high=8.0)
    learned.progress = 1.0
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.1)
    before = float(loss_of(learned, s, t).sum().detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(learned, s, t).sum().backward()
        optimizer.step()
        assert 2.0 <= learned.now <= 8.0
    assert float(loss_of(learned, s, t).sum().detach()) > before


@quick
@given(st.floats(-1e3, 1e3))
def test_learned_temperature_never_leaves_its_range(theta):
    learned = LearnedTemperature(start=4.0, low=0.5, high=8.0)
    with torch.no_grad():
        learned.theta.fill_(theta)
    assert 0.5 <= learned.now <= 8.0


@quick
@given(st.floats(0.02, 0.98), st.floats(0.1, 10), st.floats(1, 100))
def test_learned_temperature_starts_where_told(share, low, width):
    start = low + share * width
    assert LearnedTemperature(start, low, low + width).now == pytest.approx(start, rel=1e-4)


def test_learned_temperature_is_precise_at_high_temperatures():
    s, t = logits(8, 10), logits(8, 10, seed=1)
    learned = LearnedTemperature(start=500.0, low=1.0, high=1000.0)
    got = loss_of(learned, s, t).detach().double().numpy()
    np.testing.assert_allclose(got, reference(s.double(), t.double(), learned.now), rtol=1e-5)


def test_learned_temperature_is_one_parameter_of_the_objective():
    learned = LearnedTemperature()
    objective = Objective({"a": KL(), "b": KL()}, temperature=learned)
    assert [id(p) for p in objective.parameters()] == [id(learned.theta)]
    objective.progress = 0.5
    assert learned.progress == 0.5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Temperature(0), "loss.temperature: 0"),
        (lambda: Temperature(-2), "loss.temperature: -2"),
        (lambda: Temperature(math.inf), "loss.temperature: inf"),
        (lambda: Temperature({"start": 4, "end": 0}), "loss.temperature: 0"),
        (lambda: StandardizedTemperature(0), "loss.temperature: 0"),
        (lambda: LearnedTemperature(start=30.0), "start 30.0, low 1.0, high 21.0"),
        (lambda: LearnedTemperature(start=1.0), "start 1.0, low 1.0"),
        (lambda: LearnedTemperature(low=0.0), "low 0.0"),
        (lambda: LearnedTemperature(high=math.inf), "high inf"),
        (lambda: LearnedTemperature(low="1"), "low 1"),
        (lambda: LearnedTemperature(start={"start": 4, "end": 1}), "loss.temperature: start {"),
        (lambda: LearnedTemperature(strength=-1.0), "loss.temperature.strength: -1"),
        (lambda: LearnedTemperature(strength=math.inf), "loss.temperature.strength.end: inf"),
        (lambda: LearnedTemperature(until=0.0), "loss.temperature.strength.begin, until: 0.0, 0.0"),
    ],
)
def test_wrong_temperatures_are_refused(make, says):
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith("loss.temperature") and says in message and "\n" not in message
