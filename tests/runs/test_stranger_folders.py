"""Run folders that somebody else made: they are read, and nothing in them acts."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from helpers.tiny import MLP, mistake, train
from kdlab.cli.hydra.recompose import stages_of
from kdlab.cli.main import main
from kdlab.config import builder
from kdlab.models import save_weights

STAGES = "stages={a: [epochs=1], b: [epochs=1]}"


@pytest.fixture
def stranger(place, tmp_path, monkeypatch):
    """The folder of a run with two stages, with another's signature and without hashes."""
    run = train(place, "stranger", *MLP, STAGES, "epochs=1", "baseline=false", "data.fraction=0.1", "resume=auto")
    folder = tmp_path / "theirs"
    shutil.copytree(run, folder)
    (folder / "signature").write_text("0" * 64)
    change(folder / "result.json", lambda said: {k: v for k, v in said.items() if k not in ("files", "checksum")})
    np.save(tmp_path / "row.npy", np.zeros((1, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    return folder


def change(path: Path, edit) -> None:
    """Edit a JSON or YAML file."""
    text = path.read_text()
    if path.suffix == ".json":
        path.write_text(json.dumps(edit(json.loads(text))))
    else:
        path.write_text(yaml.safe_dump(edit(yaml.safe_load(text)), sort_keys=False))


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and its content."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writers(target: Path) -> dict[str, dict]:
    """Functions that write into the file or folder ``target``, as a folder may name them."""
    trace = {"_target_": "kdlab.data.text.datasets.traces.Trace", "question": "$(touch pwned)"}
    return {
        "append": {"_target_": "kdlab.data.text.datasets.traces.append_traces", "path": str(target), "traces": [trace]},
        "write": {"_target_": "kdlab.data.text.datasets.traces.write_traces", "path": str(target), "traces": []},
        "save": {"_target_": "kdlab.models.save_weights", "state": {}, "path": str(target)},
        "state": {"_target_": "kdlab.models.weights.checkpoint.save_weights", "state": {}, "path": str(target)},
        "download": {"_target_": "kdlab.data.cifar10", "root": str(target), "download": True},
        "logger": {"_target_": "kdlab.runs.loggers.csv", "folder": str(target), "name": "x"},
    }


def linear(width: int) -> dict:
    """A square layer."""
    return {"_target_": "torch.nn.Linear", "in_features": width, "out_features": width}


WRITERS = tuple(writers(Path("x")))


@pytest.mark.parametrize("which", WRITERS)
def test_predict_builds_no_function_that_writes(stranger, capsys, tmp_path, which):
    mapping = writers(tmp_path / "target")[which]
    wrapped = {"_target_": "kdlab.models.Heads", "net": mapping, "tasks": {"a": 2}}
    for network in (mapping, wrapped):
        change(stranger / "model.json", lambda said, network=network: said | {"network": network})
        before = files(tmp_path)
        assert "may not be built here" in mistake(capsys, ["predict", str(stranger), "row.npy"])
        assert files(tmp_path) == before
    change(stranger / "model.json", lambda said: said | {"network": {"_target_": "kdlab.models.MLP", "width": mapping}})
    mistake(capsys, ["predict", str(stranger), "row.npy"])
    change(stranger / "model.json", lambda said: said | {"network": {"_target_": "kdlab.models.MLP"}})
    change(stranger / "model.json", lambda said: said | {"arguments": {"in_features": mapping, "num_classes": 10}})
    mistake(capsys, ["predict", str(stranger), "row.npy"])
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("which", ["append", "save", "download"])
@pytest.mark.parametrize("key", ["data", "task", "loss"])
def test_diagnose_builds_no_function_that_writes(stranger, capsys, tmp_path, key, which):
    mapping = writers(tmp_path / "target")[which]
    change(stranger / "config.yaml", lambda config: {**config, "stages": {}, key: mapping})
    status = main(["diagnose", str(stranger), "--no-pictures"])
    said = capsys.readouterr()
    text = " ".join(f"{said.out} {said.err}".split())
    assert "may not be built here" in text or "for a folder that is not trusted" in text
    assert status in (0, 2) and not (tmp_path / "target").exists()  # 0: without its loss, only its teacher is unknown


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"weights": "a\0b"}, "weights: 'a\\x00b'; accepted: the name of a file in the folder"),
        ({"weights": ".."}, "weights: '..'; accepted: the name of a file in the folder"),
        ({"network": linear(2**20)}, "; accepted: "),  # as much as no machine has
        ({"network": linear(2**13)}, "MiB of parameters"),
        ({"network": linear(-2)}, "cannot be built with"),
        ({"network": {"_target_": "kdlab.training.samples.Samples"}}, "may not be built here"),
    ],
)
def test_what_cannot_be_built_is_one_line(stranger, capsys, edit, says):
    change(stranger / "model.json", lambda said: said | edit)
    said = mistake(capsys, ["predict", str(stranger), "row.npy"])
    assert said.startswith(f"{stranger}/model.json: ") and says in said


# ---- stages


def test_stages_are_kept_and_nothing_is_composed(stranger, capsys, monkeypatch):
    monkeypatch.setattr("kdlab.cli.hydra.compose.composer", None)
    found = stages_of(stranger)
    assert list(found) == ["a", "b"] and found["a"]["epochs"] == 1
    change(stranger / "stages.yaml", lambda said: said | {"config_hash": "of another"})
    assert stages_of(stranger) is None
    change(stranger / "stages.yaml", lambda said: [said])
    assert stages_of(stranger) is None


def test_folders_of_earlier_versions_are_composed_again(stranger):
    kept = stages_of(stranger)
    (stranger / "stages.yaml").unlink()
    assert stages_of(stranger) == kept


FORMS = (
    "hydra.searchpath=[pkg://theirs]",
    "+hydra.searchpath=[pkg://theirs]",
    "++hydra.searchpath=[pkg://theirs]",
    "hydra/launcher=basic",
    "+loss@hydra.callbacks.x=dkd",
    "~hydra.searchpath",
)


@pytest.mark.parametrize("text", FORMS)
def test_composing_again_imports_nothing_of_the_folder(stranger, tmp_path, monkeypatch, text):
    kept = stages_of(stranger)
    (stranger / "stages.yaml").unlink()
    (stranger / "__init__.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    (stranger / "loss.yaml").write_text("a: 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    change(stranger / "overrides.yaml", lambda typed: [*typed, text])
    assert stages_of(stranger) == kept  # the setting is left out
    inside = f"stages={{a: ['{text}'], b: [epochs=1]}}"
    change(stranger / "overrides.yaml", lambda typed: [*(t for t in typed if not t.startswith("stages")), inside])
    change(stranger / "config.yaml", lambda config: config | {"stages": {"a": [text], "b": ["epochs=1"]}})
    assert stages_of(stranger) is None
    assert not (tmp_path / "pwned").exists() and "theirs" not in sys.modules


def test_the_search_path_would_import_the_folder(tmp_path, monkeypatch):
    """The control: composed as a command of the user's own, the same text imports the package."""
    package = tmp_path / "theirs_control"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    main(["--cfg", "job", "experiment=kd_mlp", f"hydra.searchpath=[pkg://{package.name}]"])
    assert (tmp_path / "pwned").exists()


def test_composing_again_reads_no_environment(stranger, monkeypatch):
    (stranger / "stages.yaml").unlink()
    monkeypatch.setenv("A_SECRET", "in_the_environment")
    change(stranger / "overrides.yaml", lambda typed: [*typed, "name=${oc.env:A_SECRET}"])
    assert stages_of(stranger) is None


def test_names_of_stages_lead_nowhere_else(stranger, capsys):
    stage = stages_of(stranger)["a"]
    composed = {"stages": {"../../elsewhere": ["epochs=1"]}}
    change(stranger / "config.yaml", lambda config: config | composed)
    config = yaml.safe_load((stranger / "config.yaml").read_text())
    kept = {"config_hash": builder.config_hash(config), "stages": {"../../elsewhere": stage}}
    (stranger / "stages.yaml").write_text(yaml.safe_dump(kept))
    said = mistake(capsys, ["diagnose", str(stranger), "--no-pictures"])
    assert said.startswith("stages: '../../elsewhere'; accepted: a name")


@pytest.mark.parametrize(
    "edit",
    [{"epochs": "many"}, {"method": []}, {"data": 3}, {"task": {"_target_": "os.system"}}, {"no_such_key": 1}],
)
def test_a_damaged_configuration_is_one_line(stranger, capsys, edit):
    change(stranger / "config.yaml", lambda config: {**config, "stages": {}} | edit)
    assert mistake(capsys, ["diagnose", str(stranger), "--no-pictures"]).startswith(f"{stranger}/config.yaml: ")


def test_commands_on_folders_do_not_look_for_modules_in_the_working_folder(stranger, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(Path.cwd()))])
    assert main(["predict", str(stranger), "row.npy"]) == 0
    assert str(Path.cwd()) not in sys.path
    assert main(["--cfg", "job", "experiment=kd_mlp"]) == 0
    assert str(Path.cwd()) in sys.path


def test_the_saved_file_is_what_the_control_writes(tmp_path):
    """The control: called, these functions write."""
    save_weights({}, tmp_path / "saved")
    assert (tmp_path / "saved").exists()
