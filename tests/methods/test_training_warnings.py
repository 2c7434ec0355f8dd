"""Fits whose figures are finite and mean nothing are said, in the log, in the table and in ``result.json``."""

import math

import pytest
import torch
from torch import nn

from helpers.tiny import MLP, curve, result, train
from kdlab.functional import Batch, Outputs
from kdlab.losses import KL, CrossEntropy, Objective, Term
from kdlab.methods import training_warnings
from kdlab.tasks import Classification

TASK = Classification(10)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.lr=0"], "student: nothing was learned: no weight changed in "),
        (["loss.alpha=1", "loss.terms.kl.weight=1e-12"], "student: nothing was learned: no gradient was above "),
        (["optimizer=adam", "optimizer.lr=1e6"], "student: it diverged: val ce "),
    ],
)
def test_a_run_that_learns_nothing_says_so(place, capsys, words, said):
    run = train(place, "idle", *MLP, "epochs=1", "baseline=false", *words)
    (warning,) = result(run)["warnings"]
    assert warning.startswith(said)
    shown = capsys.readouterr()
    assert f"warning: {warning}" in shown.out and warning in shown.err and warning in (run / "run.log").read_text()


def test_an_ordinary_run_warns_of_nothing(place, capsys):
    run = train(place, "busy", *MLP, "epochs=2", "baseline=false")
    assert result(run)["warnings"] == [] and "warning" not in capsys.readouterr().out


def test_what_counts_as_no_use():
    assert training_warnings.no_use({"acc": 0.11, "ce": 2.3}, TASK) is None
    assert training_warnings.no_use({}, TASK) is None  # no validation data
    none = str(training_warnings.no_use({"acc": 0.1, "ce": 2.3}, TASK))
    assert "no better than chance: val acc 0.1, chance 0.1" in none
    assert "diverged: val ce 2e+09" in str(training_warnings.no_use({"acc": 0.5, "ce": 2e9}, TASK))


def test_traces_are_equal_only_if_no_weight_changed():
    net = nn.Linear(300, 300)
    net.bias.requires_grad = False
    before = training_warnings.trace(net)
    with torch.no_grad():
        net.bias += 1  # which does not train
        assert torch.equal(before, training_warnings.trace(net))
        net.weight[7, 9] = torch.nextafter(net.weight[7, 9], torch.tensor(9.0))
    assert not torch.equal(before, training_warnings.trace(net))
    found = training_warnings.greatest([torch.tensor([1.0, -3.0]), torch.zeros(0), torch.ones(2, 2)])
    assert found is not None and float(found) == 3 and training_warnings.greatest([torch.zeros(0)]) is None


def test_log_every_may_be_larger_than_memory(place):
    run = train(place, "seldom", *MLP, "epochs=1", "baseline=false", "trainer.log_every=1000000000000")
    assert len(curve(run, "train/loss")) == 1  # the mean of the epoch, at its end


# ---- a term of the user's


class Returns(Term):
    needs_teacher = False

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, student, teacher, batch):
        return self.value() if callable(self.value) else self.value


def ask(value, logits=None):
    logits = torch.randn(4, 3) if logits is None else logits
    objective = Objective({"ce": CrossEntropy(), "bad": Returns(value)})
    return objective(Outputs(logits), None, Batch(torch.zeros(4, 1), torch.tensor([0, 1, 2, 0])))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None"),
        (3.0, "float"),
        (torch.zeros(4, 1), r"\(4, 1\)"),
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(1), r"\(1,\)"),
    ],
)
def test_a_term_that_returns_something_else_is_named(value, said):
    with pytest.raises(ValueError, match=rf"^loss.terms.bad: Returns returned {said}; accepted: one value per row"):
        ask(value)
    assert math.isfinite(ask(torch.zeros(4)).total) and math.isfinite(ask(torch.zeros(())).total)


def test_an_error_inside_of_a_term_carries_its_name():
    def broken():
        raise KeyError("layer9")

    with pytest.raises(KeyError) as raised:
        ask(broken)
    assert raised.value.__notes__ == ["loss.terms.bad"]


def test_a_users_term_is_named_on_the_command_line(place, capsys, monkeypatch):
    (place / "terms_of_mine.py").write_text(
        "from kdlab.losses import Term\n\n\nclass Bad(Term):\n    needs_teacher = False\n\n"
        "    def forward(self, student, teacher, batch):\n        return None\n\n\n"
        "class Worse(Bad):\n    def forward(self, student, teacher, batch):\n        return student.nothing\n"
    )
    words = [*MLP, "epochs=1", "baseline=false"]
    for name, said in (
        ("Bad", "kdlab: error: ValueError: loss.terms.bad: Bad returned None; accepted: one value per row"),
        ("Worse", "kdlab: error: loss.terms.bad: AttributeError: "),
    ):
        from kdlab.cli.main import main

        assert main([*words, f"output={place}", f"+loss.terms.bad._target_=terms_of_mine.{name}"]) == 1
        assert said in capsys.readouterr().err


def test_settings_that_some_jobs_read_are_said(place, capsys, monkeypatch):
    from kdlab.cli.main import main

    words = ["check", "-m", *MLP, "baseline=false"]
    assert main([*words, "loss=ce,hinton", "loss.temperature=3"]) == 0
    assert "loss.temperature=3 is not read in 1 of 2 jobs: no term of the loss softens" in capsys.readouterr().err
    assert main([*words[:1], *words[2:], "loss=ce", "temperature=constant"]) == 0
    assert "is not read" not in capsys.readouterr().err


def test_soft_terms_move_a_network_at_both_ends_of_the_temperatures():
    for temperature in (0.01, 1e6):
        logits = (3 * torch.randn(8, 5)).requires_grad_()
        told = Outputs(5 * torch.randn(8, 5))
        batch = Batch(torch.zeros(8, 1), torch.zeros(8, dtype=torch.long))
        Objective({"kl": KL()}, temperature=temperature)(Outputs(logits), told, batch).total.backward()
        exact = logits.detach().double().requires_grad_()
        wide = Outputs(told.logits.double())
        Objective({"kl": KL()}, temperature=temperature)(Outputs(exact), wide, batch).total.backward()
        assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
        assert float(logits.grad.abs().max()) > 1e-5
