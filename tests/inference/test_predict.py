"""From a run folder alone: the model is rebuilt, and what it says of a file is what the network says of the row."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import FEW, MLP, mistake, train, weights
from kdlab.cli.main import main
from kdlab.data import digits, image_folder
from kdlab.errors import UserError
from kdlab.inference.predict import load_model, predict, read_input
from kdlab.models import CifarResNet
from kdlab.runs import folder as folders


@pytest.fixture
def run(place, tmp_path):
    """A copy of a run's folder with nothing else of it around: no data, no teacher, no cache."""
    found = train(place, "to_predict", "experiment=kd_resnet", *FEW, "baseline=false", "resume=auto")
    for name in ("model.json", "student.pt", "signature"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(found / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.fixture
def rows():
    """Three digits as the data module shows them, (3, 1, 8, 8) in [0, 1]."""
    return next(iter(digits().ordered_loader("test"))).inputs[:3]


@pytest.fixture
def expected(run, rows):
    """What the network says, made by hand and given the run's weights."""
    data = digits(fraction=0.1)
    net = CifarResNet(depth=8, width=4, num_classes=10, in_channels=1, mean=data.mean, std=data.std)
    net.load_state_dict(weights(run))
    with torch.no_grad():
        return net.eval()(rows).softmax(-1)


def probabilities(found):
    return torch.tensor([[p.probabilities[str(digit)] for digit in range(10)] for p in found])


def test_arrays_of_every_form(run, rows, expected, tmp_path):
    np.save(tmp_path / "many.npy", rows.numpy())
    np.save(tmp_path / "flat.npy", rows[:, 0].numpy())
    np.save(tmp_path / "one.npy", rows[1].numpy())
    np.save(tmp_path / "grey.npy", rows[1, 0].double().numpy())
    found = predict(run, [tmp_path / f"{name}.npy" for name in ("many", "flat", "one", "grey")])
    assert torch.allclose(
        probabilities(found), torch.cat([expected, expected, expected[1:2], expected[1:2]]), atol=1e-6
    )
    assert [p.source for p in found[:3]] == [f"{tmp_path / 'many.npy'}[{i}]" for i in range(3)]
    assert found[6].source == str(tmp_path / "one.npy")
    for one, row in zip(found, torch.cat([expected, expected]), strict=False):
        assert one.label == str(int(row.argmax())) == next(iter(one.probabilities))
        shares = list(one.probabilities.values())
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)


def test_a_picture_is_its_bytes_over_255(run, rows, tmp_path):
    levels = (rows[0, 0] * 255).round().to(torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "digit.png")
    Image.fromarray(levels.numpy()).convert("RGB").save(tmp_path / "colour.png")
    np.save(tmp_path / "digit.npy", levels.numpy())
    np.save(tmp_path / "float.npy", levels.numpy() / 255)
    names = ("digit.png", "colour.png", "digit.npy", "float.npy")
    found = probabilities(predict(run, [tmp_path / name for name in names]))
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-6)
    net, described = load_model(run)
    assert described["input_shape"] == [1, 8, 8] and described["classes"] == [str(i) for i in range(10)]
    with torch.no_grad():
        assert torch.allclose(found[0], net(levels[None, None] / 255).softmax(-1)[0], atol=1e-6)


def test_pictures_are_read_as_image_folders_are(tmp_path):
    """Oblong, turned by EXIF, larger than the network's input: the same middle, the same way up, the same filter."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            pixels = draw.integers(0, 256, (30 + 9 * i, 40, 3), dtype=np.uint8)
            exif = Image.Exif()
            exif[0x0112] = 6 if i % 2 else 1
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png", exif=exif)
    data = image_folder(str(tmp_path), size=16, val=0, test=0, batch_size=4)
    shown = next(iter(data.ordered_loader("train"))).inputs
    files = sorted((tmp_path / "train").rglob("*.png"))
    read = torch.cat([read_input(path, (3, 16, 16)) for path in files])
    assert torch.allclose(read, shown, atol=1e-6)


def test_vectors(place, tmp_path):
    run = train(place, "vectors", "experiment=kd_mlp", "epochs=1", "teacher.epochs=1", "baseline=false", "resume=auto")
    row = np.linspace(-1, 1, 10, dtype=np.float32)
    np.save(tmp_path / "row.npy", row)
    (found,) = predict(run, [tmp_path / "row.npy"])
    net, _ = load_model(run)
    with torch.no_grad():
        expected = net(torch.from_numpy(row)[None]).softmax(-1)[0]
    assert [found.probabilities[name] for name in ("0", "1")] == pytest.approx(expected.tolist(), abs=1e-6)
    with pytest.raises(UserError, match=r"accepted: a \.npy array$"):
        read_input(tmp_path / "run.png" if (tmp_path / "run.png").write_bytes(b"x") else tmp_path, (10,))


def test_kept_teachers_and_stages_predict_too(place, rows, tmp_path):
    np.save(tmp_path / "row.npy", rows[0].numpy())
    train(place, "kept", *MLP, "epochs=1", "resume=auto")
    stores = [next(iter((place / kind).glob("mlp-*[!k]"))) for kind in ("teachers", "baselines")]
    for folder in stores:
        (found,) = predict(folder, [tmp_path / "row.npy"])
        assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert folders.is_mine(folder)


def test_on_the_command_line(run, rows, capsys, tmp_path):
    np.save(tmp_path / "rows.npy", rows.numpy())
    assert main(["predict", str(run), str(tmp_path / "rows.npy"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.count("%") == 2 for line in lines)
    assert lines[0].startswith(f"{tmp_path / 'rows.npy'}[0]: ")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 9, 9), np.float32), "has shape (3, 9, 9); accepted: (1, 8, 8), or (N, 1, 8, 8)"),
        (np.zeros((64,), np.float32), "has shape (64,); accepted: "),
        (np.full((8, 8), np.nan, np.float32), "row 0 has an input that is not finite"),
        (np.array([["a"] * 8] * 8), "accepted: numbers"),
        (np.array([{}]), "cannot be read as an array"),
    ],
)
def test_arrays_that_do_not_fit(run, capsys, tmp_path, array, says):
    np.save(tmp_path / "row.npy", array, allow_pickle=True)
    said = mistake(capsys, ["predict", str(run), str(tmp_path / "row.npy")])
    assert said.startswith(f"{tmp_path / 'row.npy'}: ") and says in said


def test_files_that_are_no_input(run, capsys, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    said = mistake(capsys, ["predict", str(run), str(tmp_path / "page.png")])
    assert said.startswith(f"{tmp_path / 'page.png'}: cannot be read as an image (")
    (tmp_path / "notes.txt").write_text("hello")
    said = mistake(capsys, ["predict", str(run), str(tmp_path / "notes.txt")])
    assert "cannot be read as input of shape (1, 8, 8); accepted: an image (.png, " in said
    said = mistake(capsys, ["predict", str(run), str(tmp_path / "nothing.png")])
    assert said.startswith("predict: no such file or folder ")
    said = mistake(capsys, ["predict", str(tmp_path), str(tmp_path / "notes.txt")])
    assert said.startswith(f"{tmp_path}: no run folder (no model.json); accepted: ")


def test_the_model_file_says_all_that_is_needed(run):
    described = json.loads((run / "model.json").read_text())
    assert set(described) == {"network", "arguments", "classes", "input_shape", "weights", "modality", "target"}
    assert described["weights"] == "student.pt" and described["network"]["_target_"] == "kdlab.models.CifarResNet"
