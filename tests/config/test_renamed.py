"""Names of before: one line that says what is typed now, and results of earlier runs under the names of now."""

import importlib
import json

import pytest

from kdlab.cli.main import main
from kdlab.config.renamed import TARGETS
from kdlab.runs.result import load_result


@pytest.mark.parametrize(
    ("word", "now"),
    [
        ("source=attack", "batch_transform"),
        ("source.eps=0.1", "batch_transform.eps"),
        ("companion=peers", "auxiliary"),
        ("method.source=step", "method.self_teacher=none"),
        ("method.source=ema", "method.self_teacher"),
        ("teacher.weighing=mean", "teacher.weighting"),
        ("data.arrange=same_class", "data.pairing"),
        ("teacher.data.ratio=3", "teacher.data.unlabelled_ratio"),
        ("init=cut", "init=layer_subset"),
        ("init=classifier", "init=teacher_head"),
        ("temperature=one", "temperature=none, or loss.temperature=1"),
        ("temperature=five", "loss.temperature=5"),
        ("stages={a: [data.ratio=0]}", "data.unlabelled_ratio"),
        ("trainer._target_=kdlab.methods.Training", "kdlab.training.TrainerConfig"),
    ],
)
def test_a_name_of_before_is_answered_with_the_name_of_now(word, now, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment=kd_resnet", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"has another name; accepted: {now}"), line
    assert not list(tmp_path.iterdir())


def test_a_key_of_before_in_an_option_file_is_answered_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf" / "data" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# my digits\ndefaults: [digits, _self_]\nratio: 3\n")
    assert main(["experiment=kd_resnet", "data=mine"]) == 2
    assert "data.ratio: has another name; accepted: data.unlabelled_ratio" in capsys.readouterr().err


def test_an_argument_of_a_data_set_of_ones_own_may_have_such_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ratio_data.py").write_text(
        "from kdlab.data import digits\n\n\n"
        "def made(ratio: int = 1, seed: int | None = None):\n    return digits(seed=seed)\n"
    )
    file = tmp_path / "conf" / "data" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# mine\n_target_: ratio_data.made\nratio: 1\n")
    assert main(["experiment=kd_resnet", "data=mine", "data.ratio=3", "--cfg", "job"]) == 0
    assert "ratio: 3" in capsys.readouterr().out


@pytest.mark.parametrize("target", TARGETS.values())
def test_every_new_target_is_there(target):
    module, _, name = target.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_result_of_before_is_read_by_the_names_of_now(tmp_path):
    measured = {"val": {"acc": 0.5}, "outside": {"ppl": 9.0}}
    result = {
        "status": "finished",
        "config_hash": "0",
        "models": {"student": measured, "teacher": None},
        "settings": {"source.eps": 0.1, "data.ratio": 7, "loss.alpha": 0.5},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    found = load_result(tmp_path)
    assert found["settings"] == {"batch_transform.eps": 0.1, "data.unlabelled_ratio": 7, "loss.alpha": 0.5}
    assert found["models"]["student"] == {"val": {"acc": 0.5}, "ood": {"ppl": 9.0}}
