"""A diagnosis: counts against NumPy, networks rebuilt from run folders, and what is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import FEW, MLP, mistake, result, train, unsealed
from kdlab.cli.main import main
from kdlab.data import tensors
from kdlab.functional import Batch, Outputs
from kdlab.report.diagnosis import diagnosis, examples, pictures, report
from kdlab.tasks import ClassMeasures

FILES = ("diagnosis.json", "diagnosis.html", "diagnosis.png", "diagnosis_classes.png", "diagnosis_calibration.png")
KINDS = ("inherited", "own", "other")


def made_up(classes=5, rows=300, seed=0):
    """Logits of three networks that err together, class ids, and a group for each row."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randperm(rows, generator=generator) % classes
    right = torch.nn.functional.one_hot(targets, classes) * 1.5
    shared = torch.randn(rows, classes, generator=generator)
    noise = [torch.randn(rows, classes, generator=generator) for _ in range(3)]
    teacher, student = (right * 1.5 + shared + 0.4 * noise[0], right + shared + 0.7 * noise[1])
    logits = {"student": student, "teacher": teacher, "baseline": right + noise[2]}
    return logits, targets, [("south", "north", "east")[i % 3] for i in range(rows)]


def test_every_count_is_that_of_numpy():
    logits, targets, groups = made_up()
    names = [f"c{i}" for i in range(5)]
    found = diagnosis.diagnose(logits, targets, names, {"where": groups})
    y = targets.numpy()
    s, t, b = (logits[role].numpy().argmax(1) for role in ("student", "teacher", "baseline"))
    wanted = {
        "inherited": (s != y) & (s == t),
        "own": (s != y) & (t == y),
        "other": (s != y) & (t != y) & (s != t),
        "corrected": (s == y) & (t != y),
    }
    beside = found["against_teacher"]["student"]
    for kind, mask in wanted.items():
        assert beside[kind] == mask.sum() > 0
        assert beside["numbers"][kind] == np.flatnonzero(mask).tolist()
        assert sum(row[kind] for row in found["per_class"]) == sum(row[kind] for row in found["slices"]["where"])
        for number, row in enumerate(found["per_class"]):
            assert row[kind] == (mask & (y == number)).sum()
    assert sum(beside[kind] for kind in KINDS) == found["networks"]["student"]["errors"] == (s != y).sum()
    assert beside["agreement"] == pytest.approx((s == t).mean())
    assert found["against_teacher"]["baseline"]["inherited"] == ((b != y) & (b == t)).sum()
    assert found["against_baseline"]["gained"] == ((s == y) & (b != y)).sum()
    assert found["against_baseline"]["lost"] == ((s != y) & (b == y)).sum()
    assert [row["value"] for row in found["slices"]["where"]] == ["east", "north", "south"]
    for row in found["slices"]["where"]:
        inside = np.array(groups) == row["value"]
        assert row["accuracy"]["teacher"] == pytest.approx((t == y)[inside].mean())
    for row in found["confusions"]:
        true, said = names.index(row["true"]), names.index(row["said"])
        assert (
            row["student"] == ((y == true) & (s == said)).sum() and row["teacher"] == ((y == true) & (t == said)).sum()
        )
    assert sum(row["student"] for row in found["confusions"]) == (s != y).sum()
    assert sum(row["examples"] for row in found["disagreements"]) == (s != t).sum()
    assert found["disagreements"][0]["examples"] == max(row["examples"] for row in found["disagreements"])
    assert found["predictions"]["student"] == s.tolist() and found["targets"] == y.tolist()
    json.dumps(found, allow_nan=False)


def test_a_network_is_measured_as_runs_measure_it():
    logits, targets, _ = made_up(classes=8, seed=3)
    for one in logits.values():
        measures = ClassMeasures(8)
        measures.update(Outputs(one), None, Batch(torch.zeros(len(targets), 1), targets))
        wanted, found = measures.compute(), diagnosis.network(one, targets)
        assert found["ece"] == pytest.approx(wanted["ece"], abs=1e-5)
        assert (found["accuracy"], found["cross_entropy"]) == pytest.approx((wanted["acc"], wanted["ce"]), rel=1e-5)
        assert sum(part["examples"] for part in found["calibration"]) == len(targets)


def test_the_sign_test_is_the_binomial_one():
    assert diagnosis.sign_test(5, 1) == pytest.approx(2 * (1 + 6) / 64)
    assert diagnosis.sign_test(0, 0) == diagnosis.sign_test(7, 7) == 1
    assert diagnosis.sign_test(10, 0) == diagnosis.sign_test(0, 10) == pytest.approx(2 / 1024)
    assert diagnosis.sign_test(3000, 2000) < 1e-40


@pytest.mark.parametrize(
    ("roles", "classes"),
    [(("student",), 3), (("student", "baseline"), 3), (("student", "teacher", "baseline"), 100)],
    ids=["alone", "baseline", "all"],
)
def test_pictures_and_pages_of_any_networks(roles, classes, tmp_path):
    logits, targets, groups = made_up(classes, rows=400)
    logits = {role: logits[role] for role in roles}
    names = [f"<b>class {i}</b> & $x^2$" for i in range(classes)]
    found = diagnosis.diagnose(logits, targets, names, {"<i>where</i>": groups})
    images = torch.rand(400, 3, 6, 9)
    data = tensors({"inputs": images, "targets": targets, "test_inputs": images, "test_targets": targets,
                    "class_names": names}, val=0)  # fmt: skip
    telling = diagnosis.most_confident_errors(logits, targets, 7)
    shown = examples.shown(telling, found, logits, data, "test", {})
    for one in shown:
        assert len(one.examples) == min(one.total, 7)
        for example in one.examples:
            assert np.allclose(example.picture, images[example.number].permute(1, 2, 0).numpy())
            assert example.true == names[targets[example.number]]
            assert example.said["student"][0] == names[logits["student"][example.number].argmax()]
    drawn = pictures.draw(found, shown, "title", tmp_path)
    assert [picture.path.name for picture in drawn] == [name for name in FILES if name.endswith(".png")]
    for picture in drawn:
        with Image.open(picture.path) as image:
            assert image.width > 900 and image.convert("L").getextrema()[0] < 60
    report.write_page(tmp_path / "d.html", found, shown, drawn, "title <script>", "command")
    html = (tmp_path / "d.html").read_text()
    assert "<b>class" not in html and "<i>where" not in html and "title <script>" not in html and "://" not in html
    assert html.count("<figure>") == 3 and html.count("&lt;b&gt;class 1&lt;") >= 1
    text = report.text(found, 120)
    assert ("inherited" in text) == ("teacher" in roles) and ("sign test" in text) == ("baseline" in roles)


def test_of_many_classes_a_chart_shows_the_greatest_differences():
    rows = [{"class": str(n), "examples": 4, "accuracy": {"student": n / 100, "teacher": 0.5}} for n in range(100)]
    rows.append({"class": "empty", "examples": 0, "accuracy": {"student": None, "teacher": None}})
    chosen = [int(row["class"]) for row in pictures.chosen_classes(rows, 10)]
    assert chosen == [0, 1, 2, 3, 4, 5, 96, 97, 98, 99]
    assert len(pictures.chosen_classes(rows[:10], 10)) == 10


def diagnosed(run, capsys, *words):
    """What the verb writes about a run, and what it prints."""
    capsys.readouterr()
    assert main(["diagnose", str(run), "--no-pictures", *words]) == 0
    return json.loads((run / "diagnosis.json").read_text()), capsys.readouterr().out


@pytest.fixture
def run(place, tmp_path):
    """A run with teacher and baseline, its folder moved elsewhere."""
    found = train(place, "to_diagnose", "experiment=kd_resnet", *FEW, "resume=auto")
    return shutil.copytree(found, tmp_path / "run")


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_run_is_rebuilt_from_its_folder(run, capsys, split):
    found, said = diagnosed(run, capsys, "--split", split)
    models = result(run)["models"]
    assert found["notes"] == [] and set(found["networks"]) == {"student", "teacher", "baseline"}
    for role, one in found["networks"].items():
        assert one["accuracy"] == pytest.approx(models[role][split]["acc"], abs=1e-6)
        assert one["cross_entropy"] == pytest.approx(models[role][split]["ce"], rel=1e-4)
    assert found["against_teacher"]["student"]["agreement"] == pytest.approx(models["student"][split]["agreement"])
    assert "inherited from the teacher" in said and "sign test" in said and not (run / "diagnosis.png").exists()
    if split == "test":
        assert main(["diagnose", str(run)]) == 0 and "diagnosis_classes.png" in capsys.readouterr().out
        assert all((run / name).stat().st_size > 500 for name in FILES)
        assert not list(run.glob(".*.tmp"))
        assert json.loads((run / "diagnosis.json").read_text()) == found


def test_what_cannot_be_rebuilt_is_said_and_may_be_named(run, place, capsys):
    told = json.loads((run / "result.json").read_text())
    named = told["models"]["teacher"]["folder"]
    told["models"]["teacher"]["folder"] = "elsewhere/teachers/none"
    (run / "result.json").write_text(json.dumps(told))
    unsealed(run)
    found, said = diagnosed(run, capsys)
    assert list(found["networks"]) == ["student", "baseline"]
    assert [note.split(":")[0] for note in found["notes"]] == ["teacher"]
    assert said.count("note: ") == 1 and "--teacher FOLDER" in said
    found, _ = diagnosed(run, capsys, "--teacher", named)
    assert list(found["networks"]) == ["teacher", "student", "baseline"] and not found["notes"]
    told["models"]["baseline"].pop("folder")  # as an earlier version left it
    (run / "result.json").write_text(json.dumps(told))
    unsealed(run)
    found, _ = diagnosed(run, capsys, "--teacher", named)
    assert [note.split(":")[0] for note in found["notes"]] == ["baseline"]


def test_a_teacher_from_a_checkpoint_and_no_baseline(place, capsys):
    first = train(place, "gives_checkpoint", *MLP, "epochs=1", "resume=auto", "data.fraction=0.1")
    file = first / "student.pt"
    run = train(place, "from_checkpoint", *MLP, "epochs=1", "baseline=false", f"teacher.checkpoint={file}",
                "data.fraction=0.1")  # fmt: skip
    found, _ = diagnosed(run, capsys)
    assert list(found["networks"]) == ["teacher", "student"] and found["notes"] == []
    assert found["networks"]["teacher"]["accuracy"] == pytest.approx(result(first)["models"]["student"]["test"]["acc"])


STAGES = "stages={a: ['teacher.epochs=1'], b: ['init=previous', 'teacher=previous']}"
CASES = {
    "labels": (("experiment=kd_resnet", "student=mlp", "teacher=none", "method=finetune", "loss=ce"), ["student"]),
    "from_teacher": ((*MLP, "init=teacher"), ["teacher", "student", "baseline"]),
    "stages": (("experiment=kd_resnet", "student=mlp", "teacher=mlp", STAGES), ["teacher", "student", "baseline"]),
}


@pytest.mark.parametrize("case", CASES)
def test_runs_of_other_kinds(place, capsys, case):
    words, roles = CASES[case]
    run = train(place, f"diagnose_{case}", *words, "epochs=1", "data.fraction=0.1")
    found, _ = diagnosed(run, capsys)
    models = result(run)["models"]
    assert list(found["networks"]) == roles
    assert [note for note in found["notes"] if "baseline: not rebuilt" not in note] == []
    for role, one in found["networks"].items():
        if models.get(role):
            assert one["accuracy"] == pytest.approx(models[role]["test"]["acc"], abs=1e-6)


def test_born_again_networks_are_taught_by_the_generation_before(place, capsys):
    run = train(place, "diagnose_again", "experiment=born_again", "student=mlp", "epochs=1", "data.fraction=0.1",
                "method.generations=2")  # fmt: skip
    found, _ = diagnosed(run, capsys)
    models = result(run)["models"]
    assert found["networks"]["teacher"]["accuracy"] == pytest.approx(models["teacher"]["test"]["acc"], abs=1e-6)


# ---- slices ---------------------------------------------------------------------------------------------------------


def test_slices_by_a_file(run, capsys, tmp_path):
    rows = len(diagnosed(run, capsys)[0]["targets"])
    file = tmp_path / "more.csv"
    file.write_text("hand,size\n" + "".join(f"{('left', 'right')[i % 2]},{i}\n" for i in range(rows)))
    found, said = diagnosed(run, capsys, "--slice", f"{file}:hand", "--slice", f"{file}:size")
    by_hand, by_size = found["slices"].values()
    assert [(row["value"], row["examples"]) for row in by_hand] == [("left", (rows + 1) // 2), ("right", rows // 2)]
    assert len(by_size) == 4 and sum(row["examples"] for row in by_size) == rows and "left" in said
    wrong = np.array(found["predictions"]["student"]) != np.array(found["targets"])
    assert by_hand[0]["accuracy"]["student"] == pytest.approx(1 - wrong[::2].mean())
    file.write_text("hand\nleft\n")
    assert "1 rows, and the test split has" in mistake(capsys, ["diagnose", str(run), "--slice", f"{file}:hand"])
    assert "foot" in mistake(capsys, ["diagnose", str(run), "--slice", f"{file}:foot"])
    assert "data (digits) is no CSV file" in mistake(capsys, ["diagnose", str(run), "--slice", "hand"])


@pytest.mark.parametrize("own_test", [False, True])
def test_slices_by_a_column_of_the_table(place, capsys, tmp_path, own_test):
    generator = np.random.default_rng(0)

    def write(path, rows):
        lines = ["a,b,where,kind"]
        for _ in range(rows):
            a, b, where = generator.normal(), generator.normal(), generator.integers(1, 4)
            lines.append(f"{a:.4f},{b:.4f},{where},{'no' if a + 0.2 * b < 0 else 'yes'}")
        path.write_text("\n".join(lines) + "\n")
        return path

    table = write(tmp_path / "table.csv", 200)
    test = tmp_path / "test.csv"
    words = [f"data.test_path={write(test, 40)}"] if own_test else ["data.test=0.2"]
    run = train(place, f"table_{own_test}", "experiment=kd_mlp", "data=csv", f"data.path={table}", "data.target=kind",
                "data.columns=[b,a]", "epochs=1", "teacher.epochs=1", *words)  # fmt: skip
    found, said = diagnosed(run, capsys, "--slice", "where", "--slice", "a")
    assert found["notes"] == [] and len(found["targets"]) == 40
    # the class follows from a almost everywhere, so a wrong order would show
    by_a = found["slices"]["a"]
    assert [row["examples"] for row in by_a] and len(by_a) == 4
    if own_test:
        every = [line.split(",") for line in test.read_text().splitlines()[1:]]
        counts = {value: sum(line[2] == value for line in every) for value in "123"}
        assert {row["value"]: row["examples"] for row in found["slices"]["where"]} == counts
    assert main(["diagnose", str(run)]) == 0
    html = (run / "diagnosis.html").read_text()
    assert "values, least usual first" in html and " (+" in html
    assert "no such" not in said
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *lines[::-1]]))
    changed = test if own_test else table
    changed.write_text(changed.read_text().replace("no", "maybe") if own_test else changed.read_text())
    assert "no longer what the run read" in mistake(capsys, ["diagnose", str(run), "--slice", "where"])


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(run, capsys, tmp_path):
    assert "accepted: a run folder" in mistake(capsys, ["diagnose", str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    assert "no run folder" in mistake(capsys, ["diagnose", str(tmp_path / "empty")])
    described = json.loads((run / "model.json").read_text())
    edited = {**described, "tokenizer": "tokenizer.json", "target": "next_token"}
    (run / "model.json").write_text(json.dumps(edited))
    said = mistake(capsys, ["diagnose", str(run)])
    assert said.endswith("accepted: the run folder of a classifier") and Path(run).name in said
