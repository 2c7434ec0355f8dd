"""What is used is checked: a flipped byte, or a whole file of another run, is found before it changes a result."""

import json
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml

from helpers.tiny import QUIET, result, same, weights
from kdlab.cli.main import main
from kdlab.errors import RunFailed, UserError
from kdlab.experiment import error_overlap
from kdlab.inference.predict import load_model
from kdlab.models import weights_hash
from kdlab.runs import folder as folders
from kdlab.system import integrity
from kdlab.system.files import atomic_write, file_hash, remove_leftovers
from kdlab.training import checkpoints

WORDS = (*QUIET, "experiment=kd_mlp", "epochs=2", "teacher.epochs=1", "output=outputs")
STORES = {"teacher": "teachers", "baseline": "baselines"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs that differ in every seed: their folders, stores and caches, and an input."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KDLAB_THREADS", "1")
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setattr(import_module("kdlab.experiment.runner"), "report", lambda *_: None)
        for seed in (0, 1):
            assert main([*WORDS, f"seed={seed}", f"teacher.seed={seed}", f"name=seed{seed}"]) == 0
    np.save(folder / "row.npy", np.linspace(-2, 2, 10, dtype=np.float32))
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of them to damage, as the working folder."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("KDLAB_THREADS", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(made / "state"))
    for draws in ("report", "redraw"):
        monkeypatch.setattr(import_module("kdlab.experiment.runner"), draws, lambda *_: None)
    return Path("outputs")


def run_of(seed: int) -> Path:
    return next(Path(f"outputs/seed{seed}").iterdir())


def kept(kind: str, run: Path) -> Path:
    """The folder in the store of a run's teacher or baseline."""
    seed = yaml.safe_load((run / "config.yaml").read_text())["seed"]
    for folder in Path("outputs", STORES[kind]).iterdir():
        if folder.is_dir() and yaml.safe_load((folder / "config.yaml").read_text())["seed"] == seed:
            return folder
    raise AssertionError("no such folder")


def said(capsys, words, status=2) -> str:
    """What a command prints on standard error."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    return capsys.readouterr().err


def refused(capsys, words, path: Path) -> str:
    """The one line that refuses a file by its name."""
    line = said(capsys, words)
    assert line.startswith("kdlab: error: ") and line.count("\n") == 1 and str(path) in line, line
    return line


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content)) // 4 * 4 + 3] ^= 0x40  # of an array of float32, a bit of an exponent
    path.write_bytes(content)


def edit(path: Path, change) -> None:
    """Change what a JSON file says."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def unchecked(monkeypatch) -> None:
    """Disable every check, to see what it is for."""
    monkeypatch.setattr(integrity, "check", lambda *_, **__: None)
    monkeypatch.setattr(integrity, "damage", lambda _: "")
    monkeypatch.setattr("kdlab.teachers.cache.rows.check_manifest_files", lambda *_: None)
    monkeypatch.setattr(checkpoints.Saver, "check_best", lambda _: None)
    monkeypatch.setattr(checkpoints.Saver, "check_seed", lambda *_: None)


def without_hashes(folder: Path) -> None:
    """As earlier versions left a folder of outputs."""
    for path in [*folder.rglob("result.json"), *folder.rglob("manifest.json")]:
        edit(path, lambda found: [found.pop(name, None) for name in ("files", "checksum")])


# ---- a run's own files


def test_every_file_that_is_used_later_has_a_hash(here):
    run = run_of(0)
    assert set(result(run)["files"]) == {"model.json", "student.pt", "checkpoints/best.pt"}
    assert result(run)["files"]["student.pt"] == file_hash(run / "student.pt")
    for kind in STORES:
        folder = kept(kind, run)
        assert set(result(folder)["files"]) == {"model.json", "model_finetuned.pt", "checkpoints/best.pt"}
        assert folders.read_result(folder) == result(folder)
    assert not integrity.changed(run, result(run)) and not integrity.damage(result(run))


def test_predict_refuses_weights_of_another_run(here, capsys, monkeypatch):
    run = run_of(0)
    before = said_of(capsys, run)
    shutil.copy(run_of(1) / "student.pt", run / "student.pt")
    line = refused(capsys, ["predict", run, "row.npy"], run / "student.pt")
    assert "SHA-256" in line and str(run / "result.json") in line
    unchecked(monkeypatch)
    assert said_of(capsys, run) != before  # what the check is for


def said_of(capsys, run: Path) -> str:
    capsys.readouterr()
    assert main(["predict", str(run), "row.npy"]) == 0
    return capsys.readouterr().out


def change_model(found):
    found["classes"] = found["classes"][::-1]


def test_predict_refuses_another_model_json_and_says_how_to_accept_an_edit(here, capsys, monkeypatch):
    run = run_of(0)
    before = said_of(capsys, run)
    edit(run / "model.json", change_model)
    line = refused(capsys, ["predict", run, "row.npy"], run / "model.json")
    assert "if it was edited on purpose, result.json without its entries 'files' and 'checksum'" in line
    with monkeypatch.context() as patch:
        unchecked(patch)
        assert said_of(capsys, run) != before
    edit(run / "result.json", lambda found: [found.pop(name) for name in ("files", "checksum")])
    assert said_of(capsys, run) != before


@pytest.mark.parametrize("name", ["student.pt", "model.json"])
def test_a_flipped_byte_of_a_run_is_found(here, capsys, name):
    for at in (0.1, 0.3, 0.5, 0.7, 0.9):
        shutil.copy(run_of(0) / name, "whole")
        flip(run_of(0) / name, at)
        refused(capsys, ["predict", run_of(0), "row.npy"], run_of(0) / name)
        shutil.copy("whole", run_of(0) / name)
    said_of(capsys, run_of(0))


def test_diagnose_refuses_another_config_and_says_of_a_teacher_that_it_changed(here, capsys):
    run = run_of(0)
    weights_file = kept("teacher", run) / "model_finetuned.pt"
    shutil.copy(kept("teacher", run_of(1)) / "model_finetuned.pt", weights_file)
    capsys.readouterr()
    assert main(["diagnose", str(run), "--no-pictures"]) == 0
    assert f"teacher: not rebuilt, {weights_file.parent}: {weights_file} is not the file" in capsys.readouterr().out
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("output: outputs", "output: elsewhere"))
    assert main(["diagnose", str(run), "--no-pictures"]) == 0  # of no consequence
    (run / "config.yaml").write_text(config.replace("seed: 0", "seed: 7"))
    refused(capsys, ["diagnose", run, "--no-pictures"], run / "config.yaml")


def test_a_finished_run_that_is_shown_again_names_what_changed(here, capsys, caplog):
    run, words = run_of(0), [*WORDS, "seed=0", "teacher.seed=0", "name=seed0", "resume=auto"]
    said(capsys, words, 0)
    assert "is not the file" not in caplog.text
    whole = weights(run)
    shutil.copy(run_of(1) / "student.pt", run / "student.pt")
    said(capsys, words, 0)
    assert f"{run / 'student.pt'} is not the file that this run wrote" in caplog.text
    assert str(run / "result.json") in caplog.text
    (run / "result.json").unlink()  # what that line says
    said(capsys, words, 0)
    assert same(weights(run), whole) and not integrity.changed(run, result(run))


def test_stages_are_those_that_ran(here, capsys):
    words = [*WORDS, "teacher.seed=0", "baseline=false", "stages={a: [epochs=1], b: [epochs=1, init=previous]}"]
    assert main([*words, "name=staged"]) == 0
    run = next(Path("outputs/staged").iterdir())
    weights_files = {"student.pt", "model.json", "checkpoints/best.pt"}
    inside = {f"stages/{name}/{file}" for name in "ab" for file in weights_files}
    assert set(result(run)["files"]) == {"model.json", "stages.yaml", "student.pt", *inside}
    assert main(["diagnose", str(run), "--no-pictures"]) == 0
    path = run / "stages.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 7"))
    refused(capsys, ["diagnose", run, "--no-pictures"], path)


# ---- result.json


def test_a_changed_result_is_left_out_with_a_warning(here, capsys, monkeypatch):
    path = run_of(0) / "result.json"
    edit(path, lambda found: found["models"]["student"]["val"].update(acc=0.999))
    warning = said(capsys, ["compare", "outputs", "--no-pictures"], 0)
    assert warning == f"kdlab: warning: {path}: damaged, left out (its checksum does not fit what it says)\n"
    unchecked(monkeypatch)
    capsys.readouterr()
    assert main(["compare", "outputs", "--no-pictures"]) == 0
    assert "99.90" in capsys.readouterr().out


def test_layout_and_order_are_no_damage(here):
    path = run_of(0) / "result.json"
    found = result(run_of(0))
    path.write_text(json.dumps(dict(reversed(found.items())), indent=4, sort_keys=False))
    assert folders.read_result(run_of(0)) == found
    edit(path, lambda found: found.update(note="mine"))
    assert folders.read_result(run_of(0)) is None


def test_every_entry_of_a_result_is_covered(here):
    found = result(run_of(0))

    def leaves(value, at=()):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            yield at
        for key, inner in items or ():
            yield from leaves(inner, (*at, key))

    places = list(leaves(found))
    assert len(places) > 50
    for at in places:
        changed = json.loads(json.dumps(found))
        inner = changed
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = "other"
        assert integrity.damage(changed), at


def test_what_is_not_finite_and_what_no_run_wrote():
    sealed = integrity.sealed(Path("nowhere"), {"status": "finished", "ppl": float("nan"), 3: "a key that is text"})
    again = json.loads(json.dumps(sealed))
    assert not integrity.damage(again) and not integrity.damage({"status": "finished"})
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    assert integrity.damage({"checksum": "x", "deep": deep})
    while deep:  # piece by piece: a nest this deep is not freed at once
        deep = deep.pop("a")


def test_a_damaged_result_is_neither_believed_nor_written_over(here, capsys):
    run, words = run_of(0), [*WORDS, "seed=0", "teacher.seed=0", "name=seed0"]
    before = result(run)
    edit(run / "result.json", lambda found: found["models"]["student"]["test"].update(acc=0.999))
    line = refused(capsys, [*words, f"resume={run}"], run / "result.json")
    assert "its checksum does not fit what it says" in line and "accepted: without it (remove it)" in line
    text = said(capsys, [*words, "resume=auto"], 0)
    assert f"{run / 'result.json'}: damaged" in text and "passed over" in text
    assert result(run)["models"]["student"]["test"]["acc"] == 0.999 and len(list(Path("outputs/seed0").iterdir())) == 2
    (run / "result.json").unlink()
    said(capsys, [*words, f"resume={run}"], 0)
    assert result(run)["models"]["student"]["test"] == before["models"]["student"]["test"]


def test_a_failure_carries_a_checksum_too(tmp_path):
    folders.record_failure(tmp_path / "run", {"name": "kd", "seed": 3}, [], RunFailed("why"))
    found = result(tmp_path / "run")
    assert found["checksum"] == integrity.checksum(found) and found["files"] == {}


# ---- kept networks, and checkpoints of runs


@pytest.mark.parametrize("kind", STORES)
def test_kept_weights_of_another_seed_stop_the_run(here, capsys, kind, monkeypatch):
    run = run_of(0)
    folder = kept(kind, run)
    before = weights(folder, "model_finetuned.pt")
    shutil.copy(kept(kind, run_of(1)) / "model_finetuned.pt", folder / "model_finetuned.pt")
    words = [*WORDS, "seed=0", "teacher.seed=0", "name=again"]
    with monkeypatch.context() as patch:
        unchecked(patch)
        said(capsys, [*words[:-1], "name=blind"], 0)
    blind, role = result(next(Path("outputs/blind").iterdir())), kind
    assert blind["models"][role]["test"] != result(run)["models"][role]["test"]
    shutil.rmtree("outputs/cache")
    line = said(capsys, words).splitlines()[-1]
    assert f"error: {kind}: {folder / 'model_finetuned.pt'} is not the file that was written" in line
    assert f"the folder {folder} removed (it is trained again)" in line
    shutil.rmtree(folder)
    said(capsys, words, 0)
    assert same(weights(folder, "model_finetuned.pt"), before)


def test_where_a_teacher_learned_is_covered(here, capsys):
    folder = kept("teacher", run_of(0))
    edit(folder / "result.json", lambda found: found.update(trained_on="9 labelled rows of nothing"))
    text = said(capsys, [*WORDS, "seed=0", "teacher.seed=0", "name=again"], 0)
    assert f"{folder / 'result.json'}: damaged, and not used" in text
    assert result(next(Path("outputs/again").iterdir()))["teacher_trained_on"] != "9 labelled rows of nothing"
    assert not integrity.damage(result(folder))


@pytest.mark.parametrize("name", ["student.pt", "checkpoints/best.pt"])
def test_a_run_s_weights_as_a_teacher(here, capsys, name):
    run = run_of(0)
    words = [*WORDS, "teacher=mlp_student", f"teacher.checkpoint={run / name}", "baseline=false"]
    said(capsys, [*words, "name=whole"], 0)
    shutil.copy(run_of(1) / name, run / name)
    line = refused(capsys, [*words, "name=swapped"], run / name)
    assert line.startswith(f"kdlab: error: teacher.checkpoint: {run / name} is not the file")
    assert not Path("outputs/swapped").exists()
    link = Path("link.pt")
    link.symlink_to(run / name)
    refused(capsys, [*words[:-2], "teacher.checkpoint=link.pt", "name=swapped"], link)
    shutil.copy(run / name, "elsewhere.pt")
    said(capsys, [*words[:-2], "teacher.checkpoint=elsewhere.pt", "baseline=false", "name=elsewhere"], 0)


def test_what_a_student_starts_from(here, capsys):
    run = run_of(0)
    words = [*WORDS, "init=pretrained", f"pretrained.checkpoint={run / 'student.pt'}", "baseline=false"]
    words += ["pretrained=trained"]
    shutil.copy(run_of(1) / "student.pt", run / "student.pt")
    line = refused(capsys, [*words, "name=swapped"], run / "student.pt")
    assert "pretrained.checkpoint: " in line


def test_stages_are_the_run_s(tmp_path):
    run = tmp_path / "run"
    for name in ("student.pt", "stages/a/student.pt", "stages/a/checkpoints/best.pt", "adapter/adapter_config.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    folders.write_result(run, {"status": "finished"})
    for name in result(run)["files"]:
        integrity.check(run / name)
        (run / name).write_text("other")
        with pytest.raises(UserError, match="is not the file that was written"):
            integrity.check(run / name)
    assert len(result(run)["files"]) == 4
    (run / "mine.pt").write_text("no file of the run's")
    integrity.check(run / "mine.pt")
    integrity.check(run / "missing.pt")
    (run / "student.pt").unlink()
    integrity.check(run / "student.pt")  # its reader says that it is missing
    os.mkfifo(run / "student.pt")
    with pytest.raises(UserError, match=r"student\.pt cannot be read \(no regular file\)"):
        integrity.check(run / "student.pt")


def test_a_damaged_result_does_not_vouch(here, capsys, caplog):
    run = run_of(0)
    edit(run / "result.json", lambda found: found["files"].update({"student.pt": "sha256:0"}))
    line = refused(capsys, ["predict", run, "row.npy"], run / "student.pt")
    assert f"{run / 'result.json'} is damaged (its checksum does not fit what it says)" in line
    (run / "result.json").write_text("{")
    said_of(capsys, run)
    assert any("result.json is damaged" in one.message for one in caplog.records)


def test_folders_of_earlier_versions_work_as_before(here, capsys):
    without_hashes(here)
    said_of(capsys, run_of(0))
    assert said(capsys, ["compare", "outputs", "--no-pictures"], 0) == ""
    text = said(capsys, [*WORDS, "seed=0", "teacher.seed=0", "name=again"], 0)
    assert "carries no hashes (an earlier version wrote it)" in text and "trained before" in text
    again = next(Path("outputs/again").iterdir())
    assert same(weights(again), weights(run_of(0)))


# ---- checkpoints that a run goes on from


@pytest.mark.parametrize(
    ("name", "line"), [("last.ckpt", "is of seed 1, and this fit of seed 0"), ("best.pt", "SHA-256")]
)
def test_a_checkpoint_of_another_seed_is_not_gone_on_from(here, capsys, monkeypatch, name, line):
    run, words = run_of(0), [*WORDS, "seed=0", "teacher.seed=0", "name=seed0", "resume=auto"]
    before = weights(run)
    shutil.copy(run_of(1) / "checkpoints" / name, run / "checkpoints" / name)
    (run / "result.json").unlink()  # killed before it was written
    found = said(capsys, words).splitlines()[-1]
    assert f"error: resume: {run / 'checkpoints' / name} " in found and line in found and "accepted: " in found
    with monkeypatch.context() as patch:
        unchecked(patch)
        said(capsys, words, 0)
    assert name == "last.ckpt" or not same(weights(run), before)


# ---- what killed processes leave


class Killed(BaseException):
    """What ends a process here."""


def killed(*_):
    raise Killed


def test_a_run_killed_before_its_diagnosis_draws_it_when_it_is_asked_again(here, capsys, monkeypatch):
    module = import_module("kdlab.experiment.runner")
    words = [*WORDS, "baseline=false", "seed=0", "teacher.seed=0"]
    monkeypatch.setattr(module, "report", error_overlap.report)
    assert main([*words, "name=whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "report", killed)
        with pytest.raises(Killed):
            main([*words, "name=killed"])
    whole, run = (next(Path("outputs", name).iterdir()) for name in ("whole", "killed"))
    drawn = {path.name for path in whole.glob("diagnosis*")}
    assert len(drawn) >= 4 and not list(run.glob("diagnosis*"))
    before = (run / "result.json").read_bytes()
    (run / "diagnosis.png").write_bytes((whole / "diagnosis.png").read_bytes()[:100])  # torn
    assert main([*words, "name=killed", "resume=auto"]) == 0  # without redrawing, as the fixture has it
    assert not (run / "diagnosis.html").exists()
    monkeypatch.setattr(module, "redraw", error_overlap.redraw)
    text = said(capsys, [*words, "name=killed", "resume=auto"], 0)
    assert "diagnosis: the run ended before it was drawn; drawing it" in text
    assert {path.name for path in run.glob("diagnosis*")} == drawn
    assert (run / "diagnosis.png").read_bytes()[-8:-4] == b"IEND"
    counts = [json.loads((folder / "diagnosis.json").read_text()) for folder in (whole, run)]
    assert {**counts[0], "run": ""} == {**counts[1], "run": ""}
    assert (run / "result.json").read_bytes() == before
    monkeypatch.setattr(module, "redraw", killed)
    assert main([*words, "name=killed", "resume=auto"]) == 0  # once is enough


def test_a_run_that_nobody_taught_has_no_diagnosis_to_draw(here, monkeypatch):
    words = [*WORDS, "method=finetune", "loss=ce", "baseline=false", "name=alone"]
    assert main(words) == 0
    run = next(Path("outputs/alone").iterdir())
    assert result(run)["diagnosis"] is None and result(run_of(0))["diagnosis"] == "diagnosis.html"
    monkeypatch.setattr(import_module("kdlab.experiment.runner"), "redraw", killed)
    assert main([*words, "resume=auto"]) == 0


def leave(*folders: Path) -> list[Path]:
    """Temporary files as a killed process leaves them."""
    found = [folder / name for folder in folders for name in (".last.ckpt.0123abcd.tmp", ".signature.89abcdef.tmp")]
    for path in found:
        path.write_bytes(b"half")
    return found


def test_what_killed_processes_left_goes_with_the_next_command(here):
    run = run_of(0)
    stores = [kept(kind, run) for kind in STORES]
    left = leave(run, run / "checkpoints", *stores, *(folder / "checkpoints" for folder in stores))
    words = [*WORDS, "seed=0", "teacher.seed=0", "name=seed0", "resume=auto"]
    assert main(words) == 0  # a finished run is only shown
    assert [path.exists() for path in left] == [False] * 4 + [True] * 8
    assert main([*words[:-2], "name=again"]) == 0
    assert not any(path.exists() for path in left)


def test_a_sweep_s_jobs_that_are_done_are_tidied(here):
    words = ["-m", *WORDS, "baseline=false", "seed=0", "teacher.seed=0", "name=swept", "loss.alpha=0.5,0.9"]
    assert main(words) == 0
    left = leave(*(path.parent for path in Path("outputs/swept").glob("sweep-*/*/result.json")))
    assert len(left) == 4 and main(words) == 0
    assert not any(path.exists() for path in left)


def test_what_a_live_process_writes_stays(tmp_path):
    left = leave(tmp_path)
    other = tmp_path / ".notes.tmp"  # not one of ours
    other.write_text("mine")
    (tmp_path / ".a.0123abcd.tmp").symlink_to(other)
    with atomic_write(tmp_path / "result.json") as file:
        file.write(b"whole")
        remove_leftovers(tmp_path)
    assert (tmp_path / "result.json").read_bytes() == b"whole" and other.exists()
    assert not any(path.exists() for path in left) and (tmp_path / ".a.0123abcd.tmp").is_symlink()
    remove_leftovers(tmp_path / "nowhere")


def test_a_run_in_use_is_left_alone(tmp_path):
    left = leave(tmp_path)
    with folders.held(tmp_path):
        assert not any(path.exists() for path in left)
        left = leave(tmp_path)
        folders.tidy(tmp_path)
        assert all(path.exists() for path in left)
    folders.tidy(tmp_path)
    assert not any(path.exists() for path in left)


# ---- a teacher's cache, by the command; its parts in test_teacher_cache and test_token_cache


def test_a_flipped_byte_of_a_cache_stops_the_run_before_it_trains(here, capsys, monkeypatch):
    run = run_of(0)
    (cache,) = (path.parent for path in Path("outputs/cache").glob("*/train.npy") if _teaches(path.parent, run))
    words = [*WORDS, "baseline=false", "seed=0", "teacher.seed=0"]
    flip(cache / "train.npy")
    line = said(capsys, [*words, "name=flipped"]).splitlines()[-1]
    assert f"error: teacher.cache: {cache / 'train.npy'} is damaged, or of another cache" in line
    assert f"remove the folder {cache}: it is made again" in line
    assert not list(Path("outputs/flipped").glob("*/student.pt"))
    named = [*words, f"teacher.cache={cache}", "name=named"]
    assert f"{cache / 'train.npy'} is damaged" in said(capsys, named)
    with monkeypatch.context() as patch:
        unchecked(patch)
        said(capsys, [*words, "name=blind"], 0)
    assert not same(weights(next(Path("outputs/blind").iterdir())), weights(run))
    shutil.rmtree(cache)
    said(capsys, [*words, "name=healed"], 0)
    assert same(weights(next(Path("outputs/healed").iterdir())), weights(run))


def _teaches(cache: Path, run: Path) -> bool:
    net, _ = load_model(kept("teacher", run))
    said_by = weights_hash({**net.state_dict(), **dict(net.named_buffers())})
    return json.loads((cache / "manifest.json").read_text())["teacher"] == said_by
