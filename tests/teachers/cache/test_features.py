"""Layers of a teacher from a cache, in experiments: the same student, and a network that is left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers.tiny import FEW, MLP, curve, farthest, mistake, result, train, weights
from kdlab.experiment import stage
from kdlab.methods import Method
from kdlab.teachers import FrozenTeacher

torch.set_num_threads(1)
HINT = ("loss=[hinton,fitnets]", "loss.terms.hint.student_layer=layer1", "loss.terms.hint.teacher_layer=layer1")
HINTED = (*MLP, *HINT, "epochs=1", "baseline=false", "data.fraction=0.2")
RESNET = ("experiment=kd_resnet", *FEW, "epochs=2", "baseline=false")


@pytest.fixture
def forwards(monkeypatch):
    """How often teachers' networks answer: ``fit`` in all, and a list of how often in each training step."""
    counts: Counter = Counter()
    steps: list[int] = []
    made, fitted, step = FrozenTeacher.__init__, stage.fit, Method.training_step

    def watched(self, net, *more):
        made(self, net, *more)
        net.register_forward_hook(lambda *_: counts.update(all=1))

    def fit(*args, **named):
        counts.clear(), steps.clear()
        done = fitted(*args, **named)
        counts["fit"] = counts["all"]
        return done

    def training_step(self, *args):
        before = counts["all"]
        loss = step(self, *args)
        steps.append(counts["all"] - before)
        return loss

    training_step.__signature__ = step.__signature__
    monkeypatch.setattr(FrozenTeacher, "__init__", watched)
    monkeypatch.setattr(stage, "fit", fit)
    monkeypatch.setattr(Method, "training_step", training_step)
    return counts, steps


def log_of(run: Path) -> str:
    return (run / "run.log").read_text()


def folders(output: Path) -> set[str]:
    return {path.name for path in (output / "cache").iterdir() if path.is_dir()}


def alike(cached: Path, live: Path, terms: tuple[str, ...]) -> None:
    """Two runs that came to the same, but for rounding."""
    for term in terms:
        assert curve(cached, f"train/{term}") == pytest.approx(curve(live, f"train/{term}"), rel=1e-3, abs=1e-5)
    assert farthest(weights(cached), weights(live)) < 1e-3


@pytest.mark.parametrize("views", [(), ("data.augment=[{crop: {padding: 1}}]", "data.views=2")], ids=["as is", "views"])
def test_a_student_of_cached_layers_is_that_of_a_live_teacher(place, forwards, views):
    counts, steps = forwards
    cached = train(place, "cached", *HINTED, *views)
    assert counts["fit"] == 0 and len(steps) == result(cached)["steps"] and not any(steps)
    live = train(place, "off", *HINTED, *views, "teacher.cache=off")
    assert steps == [1] * result(live)["steps"] and counts["fit"] > len(steps)
    alike(cached, live, ("ce", "kl", "hint"))
    assert "features of layer1" in log_of(cached) and "no cache, as teacher.cache=off asks" in log_of(live)
    told = [result(run)["models"]["teacher"] for run in (cached, live)]
    for split in ("val", "test"):
        assert told[0][split] == pytest.approx(told[1][split], rel=1e-4)


def test_a_teacher_that_no_term_looks_at_is_not_asked_in_training(place, forwards):
    counts, steps = forwards
    run = train(
        place, "labels", *MLP, "loss=ce", "epochs=1", "baseline=false", "data.fraction=0.2", "teacher.cache=off"
    )
    assert steps == [0] * result(run)["steps"] and counts["fit"] > 0, "agreement is measured all the same"
    assert result(run)["models"]["student"]["test"]["agreement"] > 0


@pytest.mark.parametrize("loss", ["attention", "srrl", "crd", "ab"])
def test_terms_of_pictures_by_a_cached_teacher(place, forwards, loss):
    """SRRL uses the teacher's own classifier, AB looks at its modules, CRD remembers every example."""
    counts, steps = forwards
    cached = train(place, f"cached_{loss}", *RESNET, f"loss=[hinton,{loss}]")
    assert counts["fit"] == 0 and "cached teacher: " in log_of(cached) and "features of" in log_of(cached)
    live = train(place, f"live_{loss}", *RESNET, f"loss=[hinton,{loss}]", "teacher.cache=off")
    assert steps == [1] * result(live)["steps"]
    alike(cached, live, ("kl",))


def test_simkd_by_a_cached_teacher(place, forwards):
    words = ("experiment=simkd", *FEW, "epochs=2", "baseline=false")
    cached = train(place, "cached_simkd", *words)
    assert forwards[0]["fit"] == 0 and "features of layer3" in log_of(cached)
    live = train(place, "live_simkd", *words, "teacher.cache=off")
    assert forwards[1] == [1] * result(live)["steps"]
    alike(cached, live, ("simkd",))


def test_logits_are_cached_once_whatever_layers_a_loss_looks_at(place, tmp_path):
    first = train(tmp_path, "soft", *MLP, "epochs=1", "baseline=false", "loss=[hinton]")
    [logits] = folders(tmp_path)
    train(tmp_path, "both", *MLP, "epochs=1", "baseline=false", *HINT)
    assert len(folders(tmp_path)) == 2 and logits in folders(tmp_path)
    again = train(tmp_path, "again", *MLP, "epochs=1", "baseline=false", *HINT, "loss.terms.hint.weight=2")
    assert len(folders(tmp_path)) == 2, "the second student reads what the first one's teacher said"
    assert logits in log_of(first) and logits in log_of(again)


def test_layers_that_take_too_much_room_are_asked_for_live(place, forwards):
    _, steps = forwards
    tight = train(place, "tight", *HINTED, "teacher.feature_mib=0.001")
    assert steps == [1] * result(tight)["steps"]
    assert "no cache, since its layers (layer1) would take" in log_of(tight)
    assert "and teacher.feature_mib is 0.001" in log_of(tight) and "live teacher" in log_of(tight)
    none = train(place, "none", *HINTED, "teacher.feature_mib=0")
    assert steps == [1] * result(none)["steps"]
    assert "since the loss looks at its layers (layer1)" in log_of(none)
    assert farthest(weights(tight), weights(none)) == 0


def test_a_certain_cache_holds_the_logits_and_layers_have_their_own(place, tmp_path, forwards, capsys):
    train(tmp_path, "soft", *MLP, "epochs=1", "baseline=false", "data.fraction=0.2")
    [logits] = folders(tmp_path)
    elsewhere = (tmp_path / "cache" / logits).rename(tmp_path / "kept")
    words = (*HINTED, f"teacher.cache={elsewhere}")
    run = train(tmp_path, "certain", *words)
    assert forwards[0]["fit"] == 0 and str(elsewhere) in log_of(run)
    assert len(folders(tmp_path)) == 1 and logits not in folders(tmp_path)
    features = tmp_path / "cache" / next(iter(folders(tmp_path)))
    train(tmp_path, "tight", *words, "teacher.feature_mib=0.001", status=2)
    assert "accepted: teacher.feature_mib of so many, or teacher.cache=auto" in capsys.readouterr().err
    train(tmp_path, "features", *HINTED, f"teacher.cache={features}", status=2)
    assert "classes is 0 in the cache and 10 here" in capsys.readouterr().err


def test_a_wrong_budget_is_one_line(place, tmp_path, capsys):
    said = mistake(capsys, [*HINTED, "teacher.feature_mib=-1"], tmp_path / "out")
    assert said == "teacher.feature_mib: -1; accepted: a number, at least 0"
