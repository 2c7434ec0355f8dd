"""The example scripts run, and come to something."""

import runpy

import pytest

from helpers.paths import ROOT
from helpers.tiny import MLP, train


def script(name):
    """The names that an example defines."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("KDLAB_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def test_own_loaders(capsys):
    assert script("distill_own_loaders")["main"](epochs=4) > 0.5
    assert capsys.readouterr().out.startswith("teacher ")


def test_an_own_loss(capsys):
    assert set(script("own_loss")["main"](epochs=2)) == {"hinton", "cosine"}
    assert min(script("own_loss")["main"](epochs=2).values()) > 0.2


def test_runs_are_read(place):
    train(place, "read_by_an_example", *MLP, "epochs=1")
    (line,) = script("read_runs")["main"](str(place / "read_by_an_example"))
    assert "T=4.0" in line and "points to the baseline" in line and "last train loss" in line


def test_every_example_is_tested():
    tested = {"distill_own_loaders", "own_loss", "read_runs"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested
