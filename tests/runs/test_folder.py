"""The run folder: claimed once, written whole or not at all, kept for one process, and known as one's own."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest

from kdlab.config.builder import config_hash
from kdlab.errors import UserError
from kdlab.functional.types import Target
from kdlab.runs import folder as folders
from kdlab.runs.curves import CurvesFile

RESULT = {"status": "finished", "config_hash": "0a1b", "models": {"student": {}}}

CONFIG = {
    "name": "kd",
    "output": "outputs",
    "resume": None,
    "seed": 0,
    "epochs": 30,
    "loss": {"_target_": "kdlab.losses.Objective", "alpha": 0.9, "temperature": 4.0},
    "logger": {"_target_": "kdlab.runs.loggers.tensorboard"},
    "trainer": {"progress": "auto", "log_every": 50, "save_minutes": 10.0, "accumulate": 1},
    "stages": {},
}


@pytest.fixture(autouse=True)
def own_key(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def changed(**keys):
    """The config with some dotted keys replaced."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in keys.items():
        *path, last = key.split("__")
        inner = config
        for name in path:
            inner = inner[name]
        inner[last] = value
    return config


# ---- claiming and holding


def test_no_two_runs_share_a_folder(tmp_path):
    start = threading.Barrier(8)

    def claim(_):
        start.wait()
        return [folders.claim(tmp_path, "kd", CONFIG) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        claimed = [folder for found in pool.map(claim, range(8)) for folder in found]
    assert len(set(claimed)) == 160 and all(folder.is_dir() for folder in claimed)
    assert all(folder.parent == tmp_path / "kd" and config_hash(CONFIG)[:6] in folder.name for folder in claimed)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output: .*/file: .*; accepted: a folder that can be written to$"):
        folders.claim(tmp_path / "file", "kd", CONFIG)


def test_a_folder_is_held_by_one(tmp_path):
    in_use = pytest.raises(UserError, match="is in use by another process; accepted: ")
    with folders.held(tmp_path), in_use, folders.held(tmp_path):
        raise AssertionError("both held it")
    with pytest.raises(ZeroDivisionError), folders.held(tmp_path):
        raise ZeroDivisionError
    with folders.held(tmp_path):
        assert (tmp_path / ".lock").exists()
    lock = (tmp_path / ".lock").stat().st_ino
    with folders.held(tmp_path):
        assert (tmp_path / ".lock").stat().st_ino == lock, "another file of the same name would lock nobody out"


# ---- writing


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    folders.write_text(path, "first")

    def die(*args):
        raise KeyboardInterrupt

    for place in ("os.replace", "os.fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(f"kdlab.runs.folder.{place}", die)
            with pytest.raises(KeyboardInterrupt):
                folders.write_text(path, "second")
        assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    folders.write_text(path, "zwölf 🎓")
    assert path.read_text(encoding="utf-8") == "zwölf 🎓"


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "result.json"
    texts = [json.dumps({**RESULT, "filler": letter * 50_000}) for letter in "ab"]
    folders.write_text(path, texts[0])
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            seen.append(folders.read_result(tmp_path))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        folders.write_text(path, texts[i % 2])
    done.set()
    reader.join()
    assert seen and all(found is not None and found["filler"] in ("a" * 50_000, "b" * 50_000) for found in seen)


def test_only_a_finished_run_has_a_result(tmp_path):
    assert folders.read_result(tmp_path) is None
    for text in ("", "{", "[1]", "null", '{"status": "failed"}', "{}"):
        (tmp_path / "result.json").write_text(text)
        assert folders.read_result(tmp_path) is None
    kept = {"status": "finished", "trained_on": "80 rows", "seconds": 1.5}
    for told in (RESULT, kept):
        folders.write_result(tmp_path, told)
        found = folders.read_result(tmp_path)
        assert found is not None and found.pop("checksum").startswith("sha256:")
        assert found == {**told, "files": {}}


def test_a_failure_is_recorded_beside_what_was_written(tmp_path):
    folder = tmp_path / "job"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"kept")
    folders.record_failure(folder, CONFIG, ["seed=0"], RuntimeError("two\nlines"))
    found = json.loads((folder / "result.json").read_text())
    assert found["status"] == "failed" and found["error"] == "RuntimeError: two lines" and found["models"] == {}
    assert found["config_hash"] == config_hash(CONFIG) and folders.read_result(folder) is None
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == b"kept"
    assert folders.read_config(folder) == CONFIG


# ---- which run is meant


@pytest.mark.parametrize(
    "other",
    [
        changed(name="other"),
        changed(output="elsewhere"),
        changed(resume="auto"),
        changed(logger=None),
        changed(trainer__progress="none", trainer__log_every=1, trainer__save_minutes=0.1),
        changed(loss__temperature=4),
        dict(reversed(list(CONFIG.items()))),
    ],
)
def test_what_changes_no_result_changes_no_hash(other):
    assert config_hash(other) == config_hash(CONFIG)


@pytest.mark.parametrize(
    "other",
    [
        changed(seed=1),
        changed(epochs=31),
        changed(loss__alpha=0.90001),
        changed(loss__temperature={"start": 4, "end": 4}),
        changed(trainer__accumulate=2),
        changed(stages={"a": ["epochs=1"]}),
        {**CONFIG, "more": 1},
    ],
)
def test_what_changes_a_result_changes_the_hash(other):
    assert config_hash(other) != config_hash(CONFIG)


def run_of(output, config, name="kd"):
    folder = folders.claim(output, name, config)
    folders.write_config(folder, config, ["seed=0"])
    return folder


def test_auto_finds_the_newest_run_of_the_same_configuration(tmp_path):
    assert folders.to_resume("auto", tmp_path, "kd", CONFIG) is None
    run_of(tmp_path, changed(seed=1))
    assert folders.to_resume("auto", tmp_path, "kd", CONFIG) is None
    (tmp_path / "kd" / "2020-01-01_00-00-00-abcdef").mkdir()  # claimed, and killed before it wrote anything
    first, second = run_of(tmp_path, CONFIG), run_of(tmp_path, changed(logger=None))
    assert first != second
    assert folders.to_resume("auto", tmp_path, "kd", CONFIG) == second
    assert folders.to_resume("auto", tmp_path, "another", CONFIG) is None


def test_the_newest_of_one_second_is_the_last_claimed(tmp_path, monkeypatch):
    class Still(folders.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2025, 1, 1)

    monkeypatch.setattr(folders, "datetime", Still)
    claimed = [run_of(tmp_path, CONFIG) for _ in range(12)]
    assert folders.to_resume("auto", tmp_path, "kd", CONFIG) == claimed[-1]


def test_a_damaged_neighbour_does_not_stop_auto(tmp_path):
    mine = run_of(tmp_path, CONFIG)
    broken = tmp_path / "kd" / "9999-01-01_00-00-00-abcdef"
    broken.mkdir()
    for text in ("", "a: [", "- 1"):
        (broken / "config.yaml").write_text(text)
        assert folders.to_resume("auto", tmp_path, "kd", CONFIG) == mine


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (changed(loss__alpha=0.5, logger=None, trainer__log_every=3), "loss.alpha is 0.9 there and 0.5 here"),
        (changed(epochs=3, seed=5), "epochs is 30 there and 3 here"),
        ({**CONFIG, "zoo": 1}, "zoo is None there and 1 here"),
    ],
)
def test_a_run_of_another_configuration_is_named(tmp_path, other, says):
    folder = run_of(tmp_path, CONFIG)
    with pytest.raises(UserError) as refused:
        folders.to_resume(str(folder), tmp_path, "kd", other)
    assert str(refused.value) == f"resume: {folder} has another configuration: {says}"
    assert folders.to_resume(str(folder), tmp_path, "kd", changed(logger=None)) == folder


def test_what_is_no_run_folder(tmp_path):
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(
            UserError, match=r"is not a run folder \(no config.yaml\); accepted: a run folder, or auto$"
        ):
            folders.to_resume(str(place), tmp_path, "kd", CONFIG)


def test_settings_are_flat_and_readable():
    config = changed(loss__alpha={"start": 1.0, "end": 0.0, "shape": "step", "at": 0.667})
    config["loss"]["temperature"] = {"_target_": "kdlab.losses.LearnedTemperature", "start": 4.0}
    found = folders.settings(config)
    assert found["loss.alpha"] == "1 → 0 step" and found["loss.temperature"] == "LearnedTemperature"
    assert found["seed"] == 0 and not any("_target_" in key or key.startswith("stages") for key in found)
    assert all(not isinstance(value, dict) for value in found.values())


# ---- whose run it is


def test_a_signature_is_of_this_user_and_this_content(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    run = tmp_path / "run"
    assert not folders.is_mine(run)
    (run / "model.json").write_text('{"network": 1}')
    assert not folders.is_mine(run)
    folders.sign(run)
    assert folders.is_mine(run)
    (run / "model.json").write_text('{"network": 2}')
    assert not folders.is_mine(run)
    folders.sign(run)
    assert folders.is_mine(run)
    key = tmp_path / "state" / "kdlab" / "key"
    assert key.stat().st_mode & 0o077 == 0 and len(bytes.fromhex(key.read_text())) == 32
    assert key.read_text() not in (run / "signature").read_text()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "someone_else"))
    assert not folders.is_mine(run)
    (run / "signature").write_text("")
    assert not folders.is_mine(run)


# ---- curves


def test_curves_are_appended_and_what_a_kill_left_is_dropped(tmp_path):
    path = tmp_path / "curves.jsonl"
    curves = CurvesFile(path)
    for step in range(1, 6):
        curves.log_metrics({"train/ce": step / 3, "val/acc": math_nan()}, step)
    curves.finalize("success")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[1] == {"step": 2, "train/ce": 0.6666667, "val/acc": None}
    with path.open("a") as file:
        file.write('{"step": 6, "train/')
    CurvesFile(path, from_step=3).log_metrics({"train/ce": 9.0}, 4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["train/ce"] == 9.0


def math_nan():
    return float("nan")


def test_what_is_predicted_is_read_and_concluded_only_for_earlier_versions(tmp_path):
    rows = {"weights": "student.pt", "network": {}, "classes": ["a", "b"], "input_shape": [3]}
    text = {"weights": "student.pt", "network": {}, "tokenizer": "tokenizer.json"}
    told = {
        "class": [rows, {**rows, "target": "class"}, {**text, "target": "class", "classes": ["a", "b"]}],
        "next_token": [text],
        "text": [{**text, "target": "text"}],
    }
    for target, each in told.items():
        for described in each:
            (tmp_path / "model.json").write_text(json.dumps(described))
            assert folders.read_model(tmp_path)["target"] == target
    for damaged in ({**rows, "target": "colour"}, {**text, "target": "class"}, {**rows, "target": "text"}):
        (tmp_path / "model.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="damaged or of another program"):
            folders.read_model(tmp_path)


def test_the_targets_are_those_of_the_data():
    assert get_args(Target) == folders.TARGETS
