"""Curves of the terms' gradients: right by hand, and training goes on to the same bits."""

import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn

import kdlab.losses.objective as objective_file
from helpers.tiny import MLP, mistake, result, same, train, weights
from kdlab.config.builder import config_hash
from kdlab.data import tensors
from kdlab.functional import Batch, Outputs, Projected
from kdlab.losses import KL, CrossEntropy, Objective
from kdlab.methods import OfflineKD
from kdlab.tasks import Classification
from kdlab.teachers import FrozenTeacher
from kdlab.training import TrainerConfig, fit
from kdlab.training.gradient_stats import Gradients, compare

ALPHA, HEAT, ROWS, WIDE, CLASSES = 0.3, 3.0, 12, 5, 3


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def by_hand(x, y, student, teacher):
    """The weighted gradients of cross-entropy and KL with respect to a linear student's matrix and bias, in float64."""
    x = x.astype(np.float64)
    z, t = (x @ w.T + b for w, b in (student, teacher))
    of_ce = (1 - ALPHA) * (softmax(z) - np.eye(CLASSES)[y]) / len(x)
    of_kl = ALPHA * HEAT * (softmax(z / HEAT) - softmax(t / HEAT)) / len(x)  # T² times 1 / T
    return {name: np.concatenate([(d.T @ x).ravel(), d.sum(0)]) for name, d in (("ce", of_ce), ("kl", of_kl))}


def expected(gradients):
    found = {f"norm/{name}": np.linalg.norm(g) for name, g in gradients.items()}
    found["norm/loss"] = np.linalg.norm(sum(gradients.values()))
    a, b = gradients["ce"], gradients["kl"]
    return {**found, "cosine/ce_kl": a @ b / np.linalg.norm(a) / np.linalg.norm(b)}


def plain(net):
    return [p.detach().double().numpy().copy() for p in net.parameters()]


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return nn.Linear(WIDE, CLASSES), nn.Linear(WIDE, CLASSES)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDE, generator=generator), torch.arange(ROWS) % CLASSES


def objective():
    return Objective({"ce": CrossEntropy(), "kl": KL()}, temperature=HEAT, alpha=ALPHA)


def taken_apart(made, outputs, teacher, targets, parameters):
    made.per_term = {}
    total = made(Outputs(outputs), Outputs(teacher), Batch(torch.zeros(len(targets), 1), targets)).total
    shares, made.per_term = made.per_term, None
    assert float(sum(shares.values()).detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    return {n: torch.autograd.grad(s, parameters, retain_graph=True, allow_unused=True) for n, s in shares.items()}


def test_norms_and_cosines_are_those_computed_by_hand(networks, rows):
    (student, teacher), (x, y) = (net.double() for net in networks), rows
    found = taken_apart(objective(), student(x.double()), teacher(x.double()).detach(), y, list(student.parameters()))
    wanted = expected(by_hand(x.numpy(), y.numpy(), plain(student), plain(teacher)))
    assert compare(found, ["ce", "kl"]) == pytest.approx(wanted, rel=1e-12)


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.points = []

    name = version = "kept"

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.points.append({**metrics, "step": step})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_logs_those_of_the_whole_step(networks, rows, tmp_path, accumulate):
    (student, teacher), (x, y) = networks, rows
    data = tensors(inputs=x, targets=y, test=0, val=0, batch_size=ROWS)
    method = OfflineKD(
        student=student,
        objective=objective(),
        task=Classification(CLASSES),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        teacher=FrozenTeacher(teacher, Classification(CLASSES)),
    )
    wanted = expected(by_hand(x.numpy(), y.numpy(), plain(student), plain(teacher)))
    training = TrainerConfig(accelerator="cpu", progress="none", gradients=2, accumulate=accumulate)
    kept = Kept()
    fit(method, data, training, tmp_path, 5, [kept])
    points = [point for point in kept.points if "grad/norm/ce" in point]
    assert [point["step"] for point in points] == [1, 3, 5]
    first = {name.removeprefix("grad/"): value for name, value in points[0].items() if name.startswith("grad/")}
    assert first == pytest.approx(wanted, rel=1e-5)
    assert points[0]["grad/norm/ce"] != points[1]["grad/norm/ce"]


CASES = {
    "dropout": (*MLP, "student.dropout=0.3", "data.fraction=0.2", "epochs=2"),
    "batchnorm": (*MLP, "student=resnet8_w4", "data.fraction=0.1", "trainer.accumulate=2", "epochs=2"),
    "bf16": (*MLP, "student=resnet8_w4", "data.fraction=0.1", "trainer.precision=bf16-mixed", "trainer.clip=1"),
    "layers": (*MLP, "student=resnet8_w4", "teacher=resnet8", "loss=[hinton,fitnets]", "temperature=learned",
               "data.fraction=0.1", "teacher.data.fraction=0.1", "epochs=1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_to_the_same_bits(place, case):
    words = [*CASES[case], "baseline=false"]
    words += ["epochs=1"] if case == "bf16" else []
    without = train(place, f"without_{case}", *words)
    measured = train(place, f"measured_{case}", *words, "trainer.gradients=1")
    assert same(weights(without), weights(measured))
    lines = [
        [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()] for run in (without, measured)
    ]
    found = [point for point in lines[1] if "grad/norm/ce" in point]
    assert len(found) == result(measured)["steps"]
    assert lines[0] == [point for point in lines[1] if "grad/norm/ce" not in point]
    names = {name for point in found for name in point}
    assert {"grad/norm/ce", "grad/norm/kl", "grad/norm/loss", "grad/cosine/ce_kl"} <= names
    assert ("grad/cosine/kl_hint" in names) == (case == "layers")
    assert all(math.isfinite(value) for point in found for value in point.values())
    for point in found:
        parts = [value for name, value in point.items() if name.startswith("grad/norm/") and name != "grad/norm/loss"]
        assert point["grad/norm/loss"] <= sum(parts) * (1 + 1e-5)
        assert all(abs(value) <= 1 + 1e-5 for name, value in point.items() if "cosine" in name)


def test_a_weight_that_is_too_small_shows(place):
    run = train(place, "small_weight", *MLP, "loss.terms.kl.weight=0.00001", "data.fraction=0.1", "epochs=1",
                "baseline=false", "trainer.gradients=1")  # fmt: skip
    points = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()]
    ratios = [p["grad/norm/kl"] / p["grad/norm/ce"] for p in points if "grad/norm/kl" in p]
    assert ratios and max(ratios) < 1e-2


def test_a_term_of_weight_zero_has_norm_zero_and_no_cosine():
    found = compare({"ce": [torch.tensor([3.0, 4.0]), None]}, ["ce", "kl"])
    assert found == {"norm/ce": 5.0, "norm/kl": 0.0, "norm/loss": 5.0}
    assert "norm/ce" not in compare({"ce": [torch.tensor([math.inf])]}, ["ce"])
    opposed = compare({"a": [torch.tensor([1.0, 0.0])], "b": [torch.tensor([-1.0, 0.0])]}, ["a", "b"])
    assert opposed["cosine/a_b"] == -1 and opposed["norm/loss"] == 0


@pytest.mark.parametrize("kind", ["projected", "dense"])
def test_terms_that_see_chunks_of_rows_are_taken_apart_too(networks, rows, monkeypatch, kind):
    (student, teacher), (x, y) = (net.double() for net in networks), rows
    x, parameters = x.double(), list(student.parameters())
    wanted = taken_apart(objective(), student(x), teacher(x).detach(), y, parameters)
    if kind == "dense":
        monkeypatch.setattr(objective_file, "AT_ONCE", 1)
    made = objective()
    made.chunk_rows = 5
    outputs = student(x) if kind == "dense" else Projected(x, student.weight, student.bias)
    found = taken_apart(made, outputs, teacher(x).detach(), y, parameters)
    assert compare(found, ["ce", "kl"]) == pytest.approx(compare(wanted, ["ce", "kl"]), rel=1e-10)


def test_off_by_default_and_no_matter_of_the_result(tmp_path):
    assert TrainerConfig().gradients is None
    plain_config, measured = {"trainer": {"clip": 1}}, {"trainer": {"clip": 1, "gradients": 10}}
    assert config_hash(plain_config) == config_hash(measured)
    assert Gradients(3).every == 3


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true"])
def test_what_is_no_number_of_steps_is_said_in_one_line(capsys, tmp_path, value):
    said = mistake(capsys, ["experiment=kd_resnet", f"trainer.gradients={value}"], tmp_path / "none")
    assert said.startswith("trainer.gradients: ")
