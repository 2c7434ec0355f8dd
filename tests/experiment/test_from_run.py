"""A teacher whose weights are in a run folder: classes, normalisation and shapes come with it, and are compared."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import QUIET, mistake, result, train
from kdlab.cli.main import main
from kdlab.data import csv, digits
from kdlab.errors import UserError
from kdlab.experiment.class_order import permutation, reordered
from kdlab.inference.predict import load_model
from kdlab.models import CifarResNet, Heads, weights_hash
from kdlab.runs.origin import run_of, weights_path

FINETUNED = ["method=finetune", "loss=ce", "student=mlp_teacher", "baseline=false", "experiment=kd_mlp"]
MEASURES = re.compile(r"^test .* acc (\d\.\d+)", re.MULTILINE)


def write_csv(path: Path, names: tuple[str, ...], scale: float = 1.0, rows: int = 600) -> Path:
    """Rows of two numbers whose class goes by their sum; two classes of three have few rows."""
    rng = np.random.default_rng(3)
    lines = ["u,v,target"]
    for n, (u, v) in enumerate(rng.normal(size=(rows, 2))):
        name = names[int(u + v > 0)] if len(names) == 2 or n % 4 else names[2]
        lines.append(f"{float(u * scale)!r},{float(v * scale)!r},{name}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def learned(place) -> Path:
    """The run of a teacher that tells neg from pos."""
    folder = place / "signs"
    if not folder.is_dir():
        write_csv(place / "signs.csv", ("neg", "pos"))
        train(place, "signs", *FINETUNED, "data=csv", f"data.path={place / 'signs.csv'}", "epochs=20")
    return next(run for run in folder.iterdir() if run.is_dir())


def evaluated(capsys, file: Path, *words: str) -> tuple[float, str]:
    """The accuracy that ``kdlab evaluate`` prints of the test split, and what it logs."""
    capsys.readouterr()
    assert main(["evaluate", "teacher=mlp_teacher", "data=csv", f"data.path={file}", *words]) == 0
    said = capsys.readouterr()
    found = MEASURES.search(said.out)
    assert found is not None
    return float(found[1]), said.err


def not_evaluated(capsys, file: Path, *words: str) -> str:
    return mistake(capsys, ["evaluate", "teacher=mlp_teacher", "data=csv", f"data.path={file}", *words])


# ---- the run that a file belongs to


def test_the_run_of_a_file(learned, tmp_path):
    inside = [
        learned / "model_finetuned.pt",
        learned / "checkpoints" / "best.pt",
        learned / "checkpoints" / "last.ckpt",
    ]
    assert all(run_of(path) == learned and weights_path(path, "k") == path for path in inside)
    assert run_of(learned) == learned and weights_path(learned, "k") == inside[0]
    copied = shutil.copy(inside[0], tmp_path / "copy.pt")
    assert run_of(copied) is None and run_of(tmp_path) is None and run_of(tmp_path / "no.pt") is None
    (tmp_path / "model.json").write_text('{"format": "graph-model", "weightsManifest": []}')  # another program's
    assert run_of(copied) is None
    (tmp_path / "model.json").write_text('{"network": ')
    with pytest.raises(UserError, match=r"model\.json: damaged .* accepted: a whole run folder"):
        run_of(copied)
    shutil.copy(learned / "model.json", tmp_path)
    with pytest.raises(UserError, match=r"^k: .* has no model_finetuned\.pt; accepted: the folder of a finished run"):
        weights_path(tmp_path, "k")


# ---- classes


def test_classes_in_another_order_are_brought_into_line(learned, place, capsys, tmp_path):
    acc = result(learned)["models"]["student"]["test"]["acc"]
    assert acc > 0.8
    swapped = "data.classes=[pos,neg]"
    file = place / "signs.csv"
    for path in (
        learned,
        learned / "model_finetuned.pt",
        learned / "checkpoints/best.pt",
        learned / "checkpoints/last.ckpt",
    ):
        found, said = evaluated(capsys, file, f"teacher.checkpoint={path}", swapped)
        assert found == pytest.approx(acc, abs=1e-4)
        assert f"from the order of {learned} (neg, pos) into that of the data (pos, neg)" in said
    found, said = evaluated(capsys, file, f"teacher.checkpoint={learned}")
    assert found == pytest.approx(acc, abs=1e-4) and "brought" not in said
    copied = shutil.copy(learned / "model_finetuned.pt", tmp_path / "copy.pt")  # nobody knows its classes any more
    assert evaluated(capsys, file, f"teacher.checkpoint={copied}", swapped)[0] == pytest.approx(1 - acc, abs=1e-4)


@pytest.mark.parametrize(
    "teacher",
    [
        ["teacher.checkpoint={run}"],
        ["teacher.checkpoint={run}", "teacher.cache=off"],
        ["teacher.checkpoint={run}", "init=teacher", "student=mlp_teacher"],
        ["teacher.members=[{{checkpoint: {run}}}, {{checkpoint: {run}/checkpoints/best.pt}}]"],
        ["teacher.members=[{{checkpoint: {run}}}]", "teacher.weighting=confidence", "teacher.cache=off"],
    ],
)
def test_every_teacher_of_a_run_answers_in_the_order_of_the_data(learned, place, teacher):
    words = [word.format(run=learned) for word in teacher]
    file, acc = place / "signs.csv", result(learned)["models"]["student"]["test"]["acc"]
    data = ["data=csv", f"data.path={file}", "data.classes=[pos,neg]"]
    run = train(place, "in_order", "experiment=kd_mlp", "epochs=1", "baseline=false", *data, *words)
    assert result(run)["models"]["teacher"]["test"]["acc"] == pytest.approx(acc)
    assert "from the order of" in (run / "run.log").read_text()


def test_other_classes_are_refused_with_what_to_type(learned, place, capsys):
    three = write_csv(place / "three.csv", ("neg", "pos", "so-so: [maybe]"))
    words = [f"teacher.checkpoint={learned}"]
    said = not_evaluated(capsys, three, *words)
    assert said.startswith(
        f"teacher.checkpoint: {learned} knows 2 classes (neg, pos), and data (three) has 3 (neg, pos, "
    )
    typed = re.search(r'accepted: ("data\.classes=.*?"),', said)
    assert typed is not None
    evaluated(capsys, three, *words, *shlex.split(typed[1]))
    other = write_csv(place / "other.csv", ("no", "yes"))
    said = not_evaluated(capsys, other, *words)
    assert (
        "knows 2 classes (neg, pos), and data (other) has 2 (no, yes)" in said
        and "weights copied out of the folder" in said
    )
    said = mistake(
        capsys,
        [*QUIET, "experiment=kd_mlp", "data=csv", f"data.path={other}", f"teacher.members=[{{checkpoint: {learned}}}]"],
        place / "never",
    )
    assert said.startswith("teacher.members[0].checkpoint: ") and "knows 2 classes" in said


def test_a_teacher_of_more_classes(place, capsys):
    file = write_csv(place / "three.csv", ("neg", "pos", "so-so: [maybe]"))
    run = train(place, "of_three", *FINETUNED, "data=csv", f"data.path={file}", "epochs=1")
    words = [f"teacher.checkpoint={run}"]
    said = not_evaluated(capsys, file, *words, "data.classes=[neg,pos]")
    assert "knows 3 classes (neg, pos, so-so: [maybe]), and data (three) has 2 (neg, pos)" in said
    typed = re.search(r'accepted: ("data\.classes=.*?"),', said)
    assert typed is not None
    evaluated(capsys, file, *words, *shlex.split(typed[1]))
    assert "knows 3 classes" in not_evaluated(capsys, place / "signs.csv", *words)


def test_numbers_that_stand_for_no_name_are_no_evidence(place, capsys):
    x, rng = {}, np.random.default_rng(0)
    for name in ("train", "test"):
        x[name] = rng.normal(size=(200, 2)).astype(np.float32)
    arrays = place / "numbered.npz"
    targets = {name: (values.sum(1) > 0).astype(np.int64) for name, values in x.items()}
    np.savez(arrays, inputs=x["train"], targets=targets["train"], test_inputs=x["test"], test_targets=targets["test"])
    run = train(place, "numbered", *FINETUNED, "data=tensors", f"data.inputs={arrays}", "epochs=2")
    assert json.loads((run / "model.json").read_text())["classes"] == ["0", "1"]
    _, said = evaluated(capsys, place / "signs.csv", f"teacher.checkpoint={run}")
    assert "nothing tells that they are the same in this order" in said
    numbers = write_csv(place / "numbers.csv", ("1", "2"))  # and these are other numbers
    assert "knows 2 classes (0, 1), and data (numbers) has 2 (1, 2)" in not_evaluated(
        capsys, numbers, f"teacher.checkpoint={run}"
    )
    zero = write_csv(place / "zero.csv", ("0", "1"))
    _, said = evaluated(capsys, zero, f"teacher.checkpoint={run}", "data.classes=['1','0']")
    assert "from the order of" in said


def test_permutation():
    assert permutation(["a", "b", "c"], ["c", "a", "b"]) == [2, 0, 1]
    assert permutation(["a", "b"], ["a", "b"]) is permutation(["a", "b"], ["a", "c"]) is None
    assert permutation(["a", "a"], ["a", "a"]) is permutation(["a"], ["a", "b"]) is None


class Scaled(nn.Module):
    """A network whose classes stand in the order of its last layer only until they are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1)) * torch.arange(1.0, 11.0)


def test_reordering_a_network(place):
    data, order = digits(), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    torch.manual_seed(0)
    net = CifarResNet(8, width=4, in_channels=1, num_classes=10)
    x = torch.rand(3, 1, 8, 8)
    before = net.eval()(x)
    assert reordered(net, order, data)
    torch.testing.assert_close(net(x), before[:, order])
    odd = Scaled()
    known = weights_hash(odd)
    assert not reordered(odd, order, data) and weights_hash(odd) == known
    tasks = digits(label=["digit", "parity"])
    both = Heads(CifarResNet(8, width=4, in_channels=1, num_classes=10), {"digit": 10, "parity": 2}).eval()
    before = both(x)
    assert reordered(both, [1, 0], tasks, "parity")
    torch.testing.assert_close(both(x)["parity"], before["parity"].flip(1))
    torch.testing.assert_close(both(x)["digit"], before["digit"])


def test_the_classes_of_each_of_several_tasks(place, capsys):
    words = [
        "experiment=several_tasks",
        "method=finetune",
        "loss=ce",
        "baseline=false",
        "data.fraction=0.3",
        "epochs=3",
    ]
    run = train(place, "two_tasks", *words)
    described = json.loads((run / "model.json").read_text())
    network = described["network"]["net"]
    teacher = ["data=digits", "data.label=[digit,parity]", "teacher=heads", "data.fraction=0.3"]
    teacher += [f"teacher.net.net.{key}={network[key]}" for key in ("depth", "width") if key in network]

    def parity() -> tuple[float, str]:
        capsys.readouterr()
        assert main(["evaluate", *teacher, f"teacher.checkpoint={run}"]) == 0
        said = capsys.readouterr()
        found = re.search(r"^test .*acc_parity (\d\.\d+)", said.out, re.MULTILINE)
        assert found is not None, said.out
        return float(found[1]), said.err

    plain, said = parity()
    assert "brought" not in said
    described["tasks"]["parity"].reverse()
    (run / "model.json").write_text(json.dumps(described))
    said = mistake(capsys, ["evaluate", *teacher, f"teacher.checkpoint={run}"])
    assert "model.json is not the file that was written" in said
    (run / "result.json").unlink()  # which knows the hash of the description
    swapped, said = parity()
    assert "its classes of parity are brought from the order" in said and swapped == pytest.approx(1 - plain, abs=2e-4)
    single = json.loads((run / "model.json").read_text())
    del single["tasks"]
    (run / "model.json").write_text(json.dumps(single))
    said = mistake(capsys, ["evaluate", *teacher, f"teacher.checkpoint={run}"])
    assert "knows one task, and data (digits) has the tasks digit, parity; accepted: " in said


# ---- stages


def test_the_stage_before_teaches_in_the_order_of_the_data(learned, place):
    data = ["data=csv", f"data.path={place / 'signs.csv'}"]
    stages = "stages={{a: [method=finetune, loss=ce, epochs=20], b: [teacher=previous, 'data.classes=[{}]', epochs=1]}}"
    words = ["experiment=kd_mlp", "student=mlp_teacher", "teacher=none", "baseline=false", *data]
    run = train(place, "stages_in_order", *words, stages.format("pos,neg"))
    found = result(run)["models"]
    assert (
        found["teacher"]["test"]["acc"] == pytest.approx(found["a"]["test"]["acc"]) and found["a"]["test"]["acc"] > 0.8
    )


def test_a_stage_of_other_classes_is_refused(place, capsys):
    file = write_csv(place / "three.csv", ("neg", "pos", "so-so: [maybe]"))
    stages = "stages={a: [method=finetune, loss=ce], b: [teacher=previous, 'data.classes=[pos,neg]']}"
    words = ["experiment=kd_mlp", "student=mlp_teacher", "teacher=none", "data=csv", f"data.path={file}", stages]
    said = mistake(capsys, [*QUIET, *words], place / "never")
    assert said.startswith(
        "stages.b: its data have the classes pos, neg, and the stage before, from which it goes on, has"
    )


# ---- normalisation, shapes, networks


def test_a_teacher_keeps_its_normalisation(learned, place, capsys):
    wide = write_csv(place / "wide.csv", ("neg", "pos"), scale=1.0, rows=80)
    _, said = evaluated(capsys, wide, f"teacher.checkpoint={learned}")
    kept = json.loads((learned / "model.json").read_text())["arguments"]
    mean = ", ".join(f"{value:.4g}" for value in kept["mean"])
    assert f"keeps the input normalisation of {learned} (mean [{mean}]" in said
    _, said = evaluated(capsys, place / "signs.csv", f"teacher.checkpoint={learned}")
    assert "normalisation" not in said
    # it answers as its run does: by value, far from where the data's own statistics would put them
    far = write_csv(place / "far.csv", ("neg", "pos"), scale=100.0)
    found, _ = evaluated(capsys, far, f"teacher.checkpoint={learned}")
    batch = next(iter(csv(path=str(far)).ordered_loader("test")))
    with torch.no_grad():
        answers = load_model(learned)[0](batch.inputs)
    assert found == pytest.approx(float((answers.argmax(1) == batch.targets).float().mean()), abs=1e-4)
    copied = shutil.copy(learned / "model_finetuned.pt", place / "copied.pt")
    assert evaluated(capsys, far, f"teacher.checkpoint={copied}")[0] != found
    told = f"teacher.net.mean=[{kept['mean'][0]},{kept['mean'][1]}]"
    evaluated(capsys, wide, f"teacher.checkpoint={learned}", told)
    said = not_evaluated(capsys, wide, f"teacher.checkpoint={learned}", "teacher.net.mean=[1,2]")
    assert said.startswith("teacher.net.mean: [1, 2], and ")
    assert said.endswith("accepted: null, or the same")


def test_a_student_normalises_as_what_it_starts_from(learned, place, capsys):
    wide = write_csv(place / "far.csv", ("neg", "pos"), scale=100.0)
    words = [
        "experiment=kd_mlp",
        "data=csv",
        f"data.path={wide}",
        "student=mlp_teacher",
        "teacher.epochs=1",
        "epochs=1",
    ]
    words += ["init=pretrained", "pretrained=trained", f"pretrained.checkpoint={learned}"]
    run = train(place, "starts_normalised", *words)
    kept = json.loads((learned / "model.json").read_text())["arguments"]
    network = json.loads((run / "model.json").read_text())["network"]
    assert network["mean"] == kept["mean"] and network["std"] == kept["std"]
    assert "normalises its inputs as" in (run / "run.log").read_text()
    assert main(["diagnose", str(run), "--no-pictures"]) == 0
    assert json.loads((run / "diagnosis.json").read_text())["notes"] == []
    same = [*words, f"data.path={place / 'signs.csv'}"]
    run = train(place, "starts_alike", *same, "baseline=false")
    assert json.loads((run / "model.json").read_text())["network"]["mean"] is None


def test_other_networks_and_inputs(learned, place, capsys):
    said = not_evaluated(capsys, place / "signs.csv", f"teacher.checkpoint={learned}", "teacher.net.hidden=[10]")
    assert said.startswith(f"teacher.net.hidden: [10], and {learned} holds a MLP of hidden [20]; accepted: ")
    typed = re.search(r'by ("teacher\.net\.hidden=.*?")$', said)
    assert typed is not None and shlex.split(typed[1]) == ["teacher.net.hidden=[20]"]
    said = mistake(capsys, ["evaluate", "teacher=mlp_teacher", "data=digits", f"teacher.checkpoint={learned}"])
    assert said.startswith(f"teacher.checkpoint: {learned} reads inputs of shape 2, and data (digits) has 1x8x8")
    said = mistake(capsys, ["evaluate", "teacher=resnet8", "data=digits", f"teacher.checkpoint={learned}"])
    assert said.startswith(f"teacher.net: CifarResNet, and {learned} holds a MLP; accepted: the network of that run")
    said = mistake(
        capsys,
        ["evaluate", "teacher=gpt_tiny", "data=arithmetic", "task=language_modeling", f"teacher.checkpoint={learned}"],
    )
    assert said.startswith("teacher.net: ") and "holds a MLP" in said


def test_a_named_network_of_diagnose_is_brought_into_line(learned, place, capsys):
    data = ["data=csv", f"data.path={place / 'signs.csv'}", "data.classes=[pos,neg]"]
    run = train(place, "diagnosed_order", *FINETUNED, *data, "epochs=1")
    capsys.readouterr()
    assert main(["diagnose", str(run), "--no-pictures", "--teacher", str(learned)]) == 0
    found = json.loads((run / "diagnosis.json").read_text())
    acc = result(learned)["models"]["student"]["test"]["acc"]
    assert found["networks"]["teacher"]["accuracy"] == pytest.approx(acc)


# ---- the command line


def test_weights_of_an_average(place, capsys):
    torch.manual_seed(1)
    good = CifarResNet(8, width=4, in_channels=1, num_classes=10).state_dict()
    bad = {k: v + 1 if v.is_floating_point() else v for k, v in good.items()}
    torch.save({"state_dict": bad, "state_dict_ema": good}, place / "both.pt")
    torch.save({"ema": good, "step": 5}, place / "only.pt")
    pair = {f"student.{k}": v for k, v in good.items()} | {f"teacher.{k}": v for k, v in bad.items()}
    torch.save({"state_dict": pair}, place / "pair.pt")
    torch.save(good, place / "epoch=3-step=10.ckpt")
    words = ["evaluate", "data=digits", "teacher=resnet8_w4"]

    def entropy(*more: str) -> tuple[float, str]:
        capsys.readouterr()
        assert main([*words, *more]) == 0
        said = capsys.readouterr()
        found = re.search(r"^test .* ce (\d+\.\d+)", said.out, re.MULTILINE)
        assert found is not None
        return float(found[1]), said.err

    right = pytest.approx(2.3555, abs=1e-3)
    found, said = entropy("teacher.checkpoint=both.pt")
    assert found > 1e10 and "average of the weights (state_dict_ema), which teacher.weights=ema takes" in said
    assert entropy("teacher.checkpoint=both.pt", "teacher.weights=ema")[0] == right
    assert entropy("teacher.checkpoint=only.pt")[0] == right
    for number, said in enumerate([mistake(capsys, [*words, "teacher.checkpoint=pair.pt"])] * 2):
        typed = re.findall(r'"teacher\.mapping=.*?"', said)
        found = entropy("teacher.checkpoint=pair.pt", *shlex.split(typed[number]))[0]
        assert len(typed) == 2 and (found == right if number == 0 else found > 1e10)
    said = mistake(capsys, [*words, "teacher.checkpoint=epoch=3-step=10.ckpt"])
    typed = "\"teacher.checkpoint='epoch=3-step=10.ckpt'\""
    assert f"= in a value must be quoted: {typed};" in said
    assert entropy(*shlex.split(typed))[0] == right


@pytest.mark.parametrize(
    "name", ["a=b.pt", "a[1].pt", "a(1).pt", "it's.pt", "é.pt", "~x.pt", "a,b.pt", "a{b}.pt", "x;y&z.pt"]
)
def test_names_of_files_with_special_characters(place, capsys, name):
    words = ["evaluate", "data=digits", "teacher=resnet8_w4"]
    said = mistake(capsys, [*words, f"teacher.checkpoint={name}"])
    typed = re.search(r"(?:must be quoted: |sweep over them, or )(.*?)(?:; accepted| for one name with a comma)", said)
    assert typed is not None, said
    assert f"teacher.checkpoint: no file {name}" in mistake(capsys, [*words, *shlex.split(typed[1])])


def test_members_of_an_ensemble_with_weights_of_their_own(place, capsys):
    torch.manual_seed(1)
    good = CifarResNet(8, width=4, in_channels=1, num_classes=10).state_dict()
    bad = {k: v + 1 if v.is_floating_point() else v for k, v in good.items()}
    torch.save({"student": good, "teacher": bad}, place / "two.pt")
    words = ["evaluate", "data=digits", "teacher=resnet8_w4"]
    said = mistake(capsys, [*words, "teacher.members=[{checkpoint: two.pt}, {checkpoint: two.pt}]"])
    assert said.startswith("teacher.members[0].checkpoint: two.pt: holds several networks that fit")
    assert "accepted: weights: student in that member or weights: teacher in that member" in said
    assert main([*words, "teacher.members=[{checkpoint: two.pt, weights: student}]"]) == 0


def test_weights_of_no_file(place, capsys):
    said = mistake(capsys, [*QUIET, "experiment=kd_mlp", "teacher.weights=ema"], place / "never")
    assert said == "teacher.weights: ema, and teacher.checkpoint names no file; accepted: null"


def test_a_run_of_before_has_the_hash_that_it_had():
    from kdlab.config.builder import config_hash

    before = {"teacher": {"checkpoint": None, "mapping": None}, "seed": 0}
    now = {"teacher": {"checkpoint": None, "mapping": None, "weights": None}, "seed": 0}
    assert config_hash(before) == config_hash(now)
    assert config_hash(now) != config_hash({**now, "teacher": {**now["teacher"], "weights": "ema"}})
