"""What every run of a classifier says of the errors that its student inherited, and what one that is alone draws."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
import yaml

from helpers.tiny import FEW, MLP, QUIET, newest, result, train
from kdlab.cli.main import main
from kdlab.experiment import error_overlap
from kdlab.experiment.error_overlap import PredictionRecorder
from kdlab.experiment.reload import rebuild
from kdlab.functional import Batch, Outputs
from kdlab.report.diagnosis.diagnosis import KINDS
from kdlab.tasks import Classification, ClassMeasures, TokenMeasures

DRAWN = ("diagnosis.json", "diagnosis.html", "diagnosis.png", "diagnosis_classes.png", "diagnosis_calibration.png")
QUICK = (*MLP, "epochs=1", "data.fraction=0.1")


def counted(said, teacher, targets):
    """The kinds of errors, by NumPy alone."""
    wrong, taught = said != targets, teacher != targets
    return {
        "inherited": (wrong & (said == teacher)).sum(),
        "own": (wrong & ~taught).sum(),
        "other": (wrong & taught & (said != teacher)).sum(),
        "corrected": (~wrong & taught).sum(),
    }


def asked_again(run, split, stages=None):
    """Role → the classes that its network, rebuilt from the run folder, names of a split; and the true ones."""
    logits, targets = rebuild(run, stages=stages).answers(split)
    return {role: one.argmax(-1).numpy() for role, one in logits.items()}, targets.numpy()


def test_a_run_counts_whose_errors_it_makes(drawing, capsys):
    run = train(drawing, "inherits", "experiment=kd_resnet", *FEW)
    shown, models = capsys.readouterr().out, result(run)["models"]
    said, targets = asked_again(run, "test")
    assert "errors" not in models["teacher"]
    for role in ("student", "baseline"):
        wanted = counted(said[role], said["teacher"], targets)
        assert models[role]["errors"] == {"split": "test", "examples": len(targets), **wanted}
        wrong = sum(wanted[kind] for kind in ("inherited", "own", "other"))
        assert wrong == round((1 - models[role]["test"]["acc"]) * len(targets)) > 0
    own, alone = models["student"]["errors"], models["baseline"]["errors"]
    wrong = own["inherited"] + own["own"] + own["other"]
    assert [line for line in shown.splitlines() if line.startswith("errors of")] == [
        f"errors of the student on test: {wrong} of {len(targets)}; {own['inherited']} inherited from the teacher (the "
        f"same wrong class), {own['own']} its own, {own['other']} other; {own['corrected']} corrected; the baseline, "
        f"which learned without it, shares {alone['inherited']}"
    ]
    assert all((run / name).stat().st_size > 500 for name in DRAWN)
    assert f"\ndiagnosis: {run.relative_to(drawing) / 'diagnosis.html'}\n" in shown
    drawn = json.loads((run / "diagnosis.json").read_text())
    assert {kind: drawn["against_teacher"]["student"][kind] for kind in KINDS} == {kind: own[kind] for kind in KINDS}
    assert main(["diagnose", str(run), "--no-pictures"]) == 0
    again = json.loads((run / "diagnosis.json").read_text())
    assert again["predictions"] == drawn["predictions"] and again["per_class"] == drawn["per_class"]
    assert "experiment=kd_resnet" in (run / "diagnosis.html").read_text()


def test_nothing_is_asked_twice(drawing, monkeypatch):
    calls = []
    plain = Classification.outputs

    def counting(self, net, batch, layers=()):
        calls.append(type(net).__name__)
        return plain(self, net, batch, layers)

    monkeypatch.setattr(Classification, "outputs", counting)
    train(drawing, "counts_first", *QUICK)  # the teacher and the baseline are there from now on
    runs = []
    for draws in (error_overlap.report, lambda *_: None):
        monkeypatch.setattr(import_module("kdlab.experiment.runner"), "report", draws)
        calls.clear()
        run = train(drawing, "counts_forwards", *QUICK)
        runs.append((sorted(calls), (run / "diagnosis.png").exists()))
    (with_it, drawn), (without, not_drawn) = runs
    assert with_it == without and with_it and drawn and not not_drawn


def test_of_several_jobs_none_draws(drawing, capsys):
    assert main([*QUIET, "-m", *QUICK, "seed=0,1", f"output={drawing}", "name=inherits_twice"]) == 0
    (sweep,) = (drawing / "inherits_twice").glob("sweep-*")
    jobs = [file.parent for file in sweep.rglob("result.json")]
    assert len(jobs) == 2 and not list(sweep.rglob("diagnosis*"))
    assert all(result(job)["models"]["student"]["errors"]["examples"] == 360 for job in jobs)
    capsys.readouterr()
    csv = drawing / "inherits_twice.csv"
    columns = "seed,inherited,own_errors,corrected,inherited_baseline"
    words = ["--no-pictures", "--each", "--csv", str(csv), "--columns", columns]
    assert main(["compare", str(sweep), *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    for job in jobs:
        models, seed = result(job)["models"], str(result(job)["seed"])
        own, alone = models["student"]["errors"], models["baseline"]["errors"]
        numbers = [own["inherited"], own["own"], own["corrected"], alone["inherited"]]
        assert [seed, *map(str, numbers)] in [row[1:] for row in rows]
    assert "models.baseline.errors.inherited" in csv.read_text().splitlines()[0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("odd data")])
def test_a_run_that_cannot_draw_has_been_measured_all_the_same(drawing, monkeypatch, capsys, error):
    def fail(*_):
        (run,) = [path for path in (drawing / "cannot_draw").iterdir() if not (path / "seen").exists()]
        (run / "seen").touch()
        assert result(run)["status"] == "finished"  # by then it is written
        raise error

    monkeypatch.setattr(import_module("kdlab.report.diagnosis.pictures"), "draw", fail)
    run = train(drawing, "cannot_draw", *QUICK)
    (warning,) = [line for line in (run / "run.log").read_text().splitlines() if "WARNING" in line]
    said = f"diagnosis: not drawn ({type(error).__name__}: {error}); python -m kdlab diagnose"
    assert said in warning and result(run)["models"]["student"]["errors"]["examples"] == 360
    shown = capsys.readouterr().out
    assert "errors of the student on test" in shown and "\ndiagnosis: " not in shown
    assert not (run / "diagnosis.html").exists()


CASES = {
    "no teacher": ("experiment=kd_resnet", "student=mlp", "teacher=none", "method=finetune", "loss=ce"),
    "own average": ("experiment=ema", "student=mlp"),
    "no test rows": (*MLP, "data=csv", "data.path=PATH", "data.test=0"),
    "no baseline": (*MLP, "baseline=false"),
    "generations": ("experiment=born_again", "student=mlp", "method.generations=2"),
    "stages": (*MLP, "stages={a: ['teacher.epochs=1'], b: ['init=previous', 'teacher=previous']}"),
    "auxiliary": ("experiment=simkd", *FEW),
    "several": ("experiment=several_teachers", *FEW),
    "live": (*MLP, "teacher.cache=off"),
}


@pytest.mark.parametrize("case", CASES)
def test_runs_of_other_kinds(drawing, tmp_path, capsys, case):
    table = tmp_path / "table.csv"
    rows = torch.randn(120, 2, generator=torch.Generator().manual_seed(0)).tolist()
    lines = [f"{a:.3f},{b:.3f},{'no' if a + b / 3 < 0 else 'yes'}" for a, b in rows]
    table.write_text("\n".join(["a,b,target", *lines]) + "\n")
    words = [word.replace("PATH", str(table)) for word in CASES[case]]
    few = ["epochs=1"] if "data=csv" in words else ["epochs=1", "data.fraction=0.1"]
    run = train(drawing, f"inherits_{case.replace(' ', '_')}", *words, *few)
    models, shown = result(run)["models"], capsys.readouterr().out
    untaught = case in ("no teacher", "own average")
    assert (run / "diagnosis.html").exists() != untaught and ("\nerrors of" in shown) != untaught
    assert "not drawn" not in (run / "run.log").read_text()
    counting = {role for role, model in models.items() if model and "errors" in model}
    # the first of two generations is baseline and teacher at once: what it shares with itself says nothing
    alone = {"baseline"} if models["baseline"] is not None and case != "generations" else set()
    assert counting == (set() if untaught else {"student", *alone})
    if untaught:
        return
    split = "val" if case == "no test rows" else "test"
    drawn = json.loads((run / "diagnosis.json").read_text())
    assert drawn["split"] == split and set(drawn["networks"]) == {"teacher", *counting}
    for role in drawn["networks"]:
        assert drawn["networks"][role]["accuracy"] == pytest.approx(models[role][split]["acc"], abs=1e-6)
    said = {role: np.array(one) for role, one in drawn["predictions"].items()}
    for role in counting:
        wanted = counted(said[role], said["teacher"], np.array(drawn["targets"]))
        assert models[role]["errors"] == {"split": split, "examples": len(drawn["targets"]), **wanted}
    assert ("shares" in shown) == bool(alone)


def measured(logits, targets):
    measures = ClassMeasures(logits.shape[-1])
    for part, own in zip(logits.split(7), targets.split(7), strict=True):
        measures.update(Outputs(part), None, Batch(torch.zeros(len(own), 1), own))
    return measures


def test_what_is_heard_is_what_was_measured_in_order():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (50,), generator=generator)
    targets[::10] = -100
    logits = {role: torch.randn(50, 4, generator=generator) for role in ("student", "teacher", "baseline")}
    heard = PredictionRecorder("test", whole=True)
    for role, one in logits.items():
        heard.of(role)("val", measured(one.roll(1, 0), targets))
        heard.of(role)("test", measured(one, targets))
    assert all(torch.equal(heard.logits[role], one) for role, one in logits.items())
    known = targets != -100
    said = {role: one.argmax(-1)[known].numpy() for role, one in logits.items()}
    for role, found in heard.errors().items():
        wanted = counted(said[role], said["teacher"], targets[known].numpy())
        assert found == {"split": "test", "examples": 45, **wanted}
    heard.of("baseline")("test", TokenMeasures())  # no answers to hear
    other = PredictionRecorder("test")
    other.of("student")("test", measured(logits["student"], targets))
    other.of("teacher")("test", measured(logits["teacher"], targets.roll(1)))
    assert not other.taught and other.errors() == {} and other.logits == {}


def test_logits_that_would_fill_the_memory_are_not_held(drawing, monkeypatch):
    monkeypatch.setattr(error_overlap, "LARGEST", 100)
    run = train(drawing, "too_large", *QUICK)
    assert "diagnosis: not drawn, since" in (run / "run.log").read_text() and not list(run.glob("diagnosis*"))
    assert result(run)["models"]["student"]["errors"]["examples"] == 360


def test_a_finished_run_that_is_asked_for_again_names_what_it_drew(drawing, capsys):
    run = train(drawing, "asked_again", *QUICK)
    capsys.readouterr()
    assert train(drawing, "asked_again", *QUICK, f"resume={run}") == run == newest(drawing, "asked_again")
    assert "\ndiagnosis: " in capsys.readouterr().out
    assert yaml.safe_load((run / "overrides.yaml").read_text())
