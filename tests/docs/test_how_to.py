"""The pages that say how to add a part work as they are written: their code runs in a folder of a user's own."""

import re

import pytest
import torch

from helpers.paths import ROOT
from helpers.tiny import QUIET, result
from kdlab.cli.main import main

HOW_TO = ROOT / "docs" / "how_to"
QUICK = ("epochs=1", "data.fraction=0.2", "teacher.data.fraction=0.2", "teacher.epochs=1", "baseline=false")


def blocks(page, language):
    """The code blocks of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (HOW_TO / page).read_text(), flags=re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KDLAB_THREADS", "1")
    return tmp_path


def runs(folder, *words):
    """Run an experiment in the user's folder; returns its result."""
    assert main([*QUIET, "experiment=kd_resnet", *words, "name=mine"]) == 0
    (run,) = (folder / "outputs" / "mine").iterdir()
    return result(run)


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_loss(folder):
    (code,), (option,) = blocks("add_a_loss.md", "python"), blocks("add_a_loss.md", "yaml")
    write(folder, {"myloss.py": code, "conf/loss/cosine.yaml": option})
    found = runs(folder, "student=mlp", "teacher=mlp", "loss=[hinton,cosine]", *QUICK)
    assert found["status"] == "finished"
    curves = next((folder / "outputs" / "mine").iterdir()) / "curves.jsonl"
    assert "train/cosine" in curves.read_text()


def test_a_network(folder):
    (code,), (option,) = blocks("add_a_network.md", "python"), blocks("add_a_network.md", "yaml")
    write(folder, {"mynet.py": code, "conf/model/mynet.yaml": option})
    assert runs(folder, "student=mynet", "student.hidden=64", "teacher=mlp", *QUICK)["status"] == "finished"


def test_a_data_set(folder):
    (code,) = blocks("add_a_data_set.md", "python")
    option = "# rings\n_target_: mydata.rings\nbatch_size: 64\n"
    write(folder, {"mydata.py": code, "conf/data/rings.yaml": option})
    words = ("data=rings", "student=mlp_student", "teacher=mlp_teacher", "epochs=1", "teacher.epochs=1")
    assert runs(folder, *words)["status"] == "finished"
    assert next((folder / "outputs" / "mine").iterdir()).joinpath("student.pt").exists()


def test_a_teacher(folder, capsys):
    (code,) = blocks("add_a_teacher.md", "python")
    torch.manual_seed(0)
    exec(compile(code, "add_a_teacher.md", "exec"), {"__name__": "page"})
    assert float(capsys.readouterr().out.split("%")[0].split()[-1]) > 80


def test_a_network_step(folder):
    (code,) = blocks("add_a_network_step.md", "python")
    write(folder, {"mysteps.py": code})
    command = re.search(r"python -m kdlab experiment=kd_resnet (.*)", (HOW_TO / "add_a_network_step.md").read_text())[1]
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]
    found = runs(folder, *words, *QUICK)
    assert found["models"]["student"]["parameters"] < found["models"]["teacher"]["parameters"]
