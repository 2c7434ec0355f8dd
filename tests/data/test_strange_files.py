"""Damaged and hostile files in run folders: a line, and never a hang, a crash, or a write outside of the folder."""

import json
import os
import random
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import MLP, QUIET, train, unsealed
from kdlab.cli.main import main
from kdlab.data import image_folder
from kdlab.errors import UserError
from kdlab.models import read_state
from kdlab.runs import folder as folders
from kdlab.runs import read
from kdlab.runs.curves import CurvesFile
from kdlab.runs.result import load_result
from kdlab.system.files import Unreadable

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")]

BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]" for n in range(10))

STRANGE = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "random": lambda path: path.symlink_to("/dev/random"),
    "bomb": lambda path: path.write_text(BOMB),
    "recursive": lambda path: path.write_text("a: &a {b: *a}"),
    "deep": lambda path: path.write_text("[" * 1_000_000),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00" * 50),
    "digits": lambda path: path.write_text('{"status": "finished", "seed": ' + "1" * 5000 + "}"),
    "bare": lambda path: path.write_text('{"status": "finished"}'),
    "list": lambda path: path.write_text('{"status": "finished", "config_hash": "0", "models": [1]}'),
}
"""What may stand in the place of a file of a run."""

RUN = (*QUIET, *MLP, "epochs=1", "baseline=false")


@pytest.fixture
def run(place, tmp_path):
    """A finished run without hashes, alone in a tree of runs of one name; what is written there stays there."""
    found = train(place, "strange", *RUN, "resume=auto")
    return unsealed(Path(shutil.copytree(found, tmp_path / "out" / "strange" / found.name)))


def put(path: Path, kind: str) -> None:
    """Let something strange stand at ``path``."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    STRANGE[kind](path)


def line(capsys, words: list) -> str:
    """The one line of standard error with which a command ends in status 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("kdlab: error: ") and sum(one.startswith("kdlab: error") for one in said) == 1, said
    return said[-1]


# ---- whole files that are something else


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_file_is_a_line_and_the_neighbours_go_on(run, capsys, kind):
    config = read.read_mapping(run / "config.yaml")
    output, other = run.parents[1], run.parent / "2020-01-01_00-00-00-000000"
    assert folders.to_resume("auto", output, "strange", config) == run  # the control: nothing is strange yet
    for name in ("config.yaml", "result.json", "curves.jsonl"):
        shutil.copytree(run, other, symlinks=True)
        put(other / name, kind)
        # the strange one is the newest: it is looked at first, and passed over
        newest = other.rename(run.parent / f"9{other.name[1:]}-{name}")
        found = folders.to_resume("auto", output, "strange", config)
        harmless = name == "curves.jsonl" and kind not in ("pipe", "device", "random")
        assert found == (newest if harmless else run)
        warned = capsys.readouterr().err
        another = name == "config.yaml" and kind in ("bare", "list")  # a mapping, and so just another configuration
        assert ("passed over" in warned) == (not harmless and not another)
        if not harmless:
            with pytest.raises(UserError, match=name if not another else "another configuration"):
                folders.to_resume(str(newest), output, "strange", config)
        assert main(["compare", str(run.parent)]) == 0
        warned = capsys.readouterr().err
        assert (name in warned) == (name != "config.yaml"), (name, warned)
        shutil.rmtree(newest)
        shutil.rmtree(run.parent / "compare")


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["model.json", "student.pt"])
def test_predict_and_diagnose_on_a_strange_model_are_a_line(run, capsys, tmp_path, name, kind):
    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8), np.float32))
    assert main(["predict", str(run), str(tmp_path / "x.npy")]) == 0
    put(run / name, kind)
    assert name in line(capsys, ["predict", run, tmp_path / "x.npy"])
    assert name in line(capsys, ["diagnose", run, "--no-pictures"])


@pytest.mark.parametrize("kind", ["pipe", "deep"])
def test_a_sweep_runs_a_job_with_a_strange_result_again(place, capsys, tmp_path, kind):
    words = ["-m", *RUN, "seed=0,1", f"output={place}", "name=strange_sweep"]
    assert main(words) == 0
    capsys.readouterr()
    (sweep,) = (place / "strange_sweep").iterdir()
    first = next(path for path in sweep.iterdir() if path.name.startswith("seed_0"[:4]) and path.is_dir())
    put(first / "result.json", kind)
    put(sweep / "sweep.yaml", kind)
    status = main(words)
    linked = kind in ("pipe", "device")
    assert status == (1 if linked else 0)  # a run does not go on in a folder with links, and says so
    said = capsys.readouterr()
    assert "done already" in said.out and ("is a link, a pipe" in said.out) == linked
    shutil.rmtree(sweep)


def test_options_of_ones_own_are_checked_before_they_are_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    for kind in ("bomb", "recursive", "deep"):
        put(tmp_path / "conf" / "optimizer" / "mine.yaml", kind)
        assert "conf/optimizer/mine.yaml: cannot be read" in line(capsys, ["experiment=kd_mlp", "optimizer=mine"])
    (tmp_path / "conf" / "optimizer" / "mine.yaml").write_text("_target_: torch.optim.SGD\nlr: 0.1\n")
    assert main(["experiment=kd_mlp", "optimizer=mine", "--cfg", "job"]) == 0


# ---- damage by the byte


def damages(content: bytes, count: int = 100):
    """(what was done, the damaged bytes): the same for the same content."""
    draw = random.Random(len(content))
    for n in range(count):
        at = draw.randrange(1, len(content))
        long = min(len(content), at + draw.choice((1, 8, 64)))
        kind = ("cut", "high bit", "zeros", "brackets", "line break", "bytes")[n % 6]
        middle = {
            "high bit": bytes([content[at] | 0x80]) + content[at + 1 :],
            "zeros": bytes(long - at) + content[long:],
            "brackets": b"[" * 5_000 + content[at:],
            "line break": b"\n" + content[at:],
            "bytes": b"\xff\xfe" + content[long:],
        }
        yield f"{kind} at {at}", content[:at] + middle.get(kind, b"")


def test_damaged_curves_lose_lines_that_are_counted_and_never_stop_a_resume(run, tmp_path, caplog):
    content = (run / "curves.jsonl").read_bytes()
    points = [json.loads(one) for one in content.splitlines()]
    assert read.Run(run, {}).curves and len(points) > 3
    unseen = 0
    for what, damaged in damages(content):
        (tmp_path / "curves.jsonl").write_bytes(damaged)
        found = read.Run(tmp_path, {})
        lines = [one for one in damaged.splitlines() if one.strip()]
        whole = [one for one in lines if one in content.splitlines()]
        assert found.curves is not None, what
        lost = int(found.warnings[0].split("curves.jsonl: ")[1].split()[0]) if found.warnings else 0
        assert lost <= len(lines) - len(whole), what
        unseen += lost == 0 and len(whole) < len(lines)
        caplog.clear()
        CurvesFile(tmp_path / "curves.jsonl", from_step=10**6).log_metrics({"train/loss": 1.0}, 10**6)
        kept = (tmp_path / "curves.jsonl").read_bytes().splitlines()
        assert [one for one in kept if one in content.splitlines()] == [one for one in whole if one], what
        assert (lost > 0) == ("left out" in caplog.text), what
        assert json.loads(kept[-1]) == {"step": 10**6, "train/loss": 1.0}
    assert unseen == 0


@pytest.mark.parametrize("name", ["result.json", "config.yaml", "model.json"])
def test_damaged_documents_are_refused_or_read_as_they_are(run, tmp_path, name):
    readers = {"result.json": load_result, "config.yaml": folders.read_config, "model.json": folders.read_model}
    content = (run / name).read_bytes()
    whole, refused = readers[name](run), 0
    for what, damaged in [*damages(content), ("none", content)]:
        (tmp_path / name).write_bytes(damaged)
        try:
            found = readers[name](tmp_path)
        except (UserError, Unreadable) as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        assert isinstance(found, dict), what
        assert what != "none" or found == whole
    assert 60 < refused < 101  # a line break between two words of YAML or JSON is no damage


def test_every_entry_of_a_result_and_a_model_may_be_of_another_type(run, capsys, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8), np.float32))
    strange = (None, 3, -1.5, "text", [], [1], {}, {"a": [1]}, True, [[[]]])
    for name, command in (
        ("result.json", ["compare", run.parent, "--no-pictures"]),
        ("model.json", ["predict", run, "x.npy"]),
    ):
        whole = json.loads((run / name).read_text())
        command = [str(tmp_path / word) if word == "x.npy" else str(word) for word in command]
        for key in whole:
            for value in strange:
                (run / name).write_text(json.dumps({**whole, key: value}))
                assert main(command) in (0, 2), (name, key, value)
                said = capsys.readouterr().err
                assert "Error:" not in said and "Traceback" not in said, (name, key, value, said)
            (run / name).write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
            assert main(command) in (0, 2), (name, key)
        (run / name).write_text(json.dumps(whole))
        assert main(command) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"input_shape": [1, 10**6, 10**6]},
        {"input_shape": [1, -8, 8]},
        {"input_shape": []},
        {"input_shape": "8"},
        {"classes": "abc"},
        {"classes": [["a"]]},
        {"classes": [str(n) for n in range(10**5)]},
        {"weights": "a\0b"},
        {"weights": ""},
        {"weights": ".."},
        {"tasks": [1]},
    ],
)
def test_an_absurd_model_description_is_a_line(run, capsys, tmp_path, change):
    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8), np.float32))
    whole = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps({**whole, **change}))
    assert str(run) in line(capsys, ["predict", run, tmp_path / "x.npy"])


# ---- links inside of a run folder


@pytest.mark.parametrize(
    ("name", "dangling"),
    [
        *[(name, False) for name in ("run.log", "curves.jsonl", ".lock", "student.pt", "checkpoints")],
        *[(name, True) for name in ("run.log", "hparams.yaml", "checkpoints")],
    ],
)
def test_a_resumed_run_writes_through_no_link(run, capsys, tmp_path, name, dangling):
    (run / "result.json").unlink()
    words = [*RUN, f"output={run.parents[1]}", "name=strange", f"resume={run}"]
    target = tmp_path / "precious"
    keep = run / name
    if name == "checkpoints":
        (shutil.rmtree(keep) or keep.symlink_to(target)) if dangling else (keep.rename(target), keep.symlink_to(target))
    else:
        content = keep.read_bytes() if keep.exists() else b"kept"
        keep.unlink(missing_ok=True)
        keep.symlink_to(target)
        if not dangling:
            target.write_bytes(content)
    before = target.stat().st_mtime_ns if target.exists() else None
    assert f"{keep} is a link" in line(capsys, words)
    assert (target.stat().st_mtime_ns if target.exists() else None) == before
    # the control: the same command without the link
    keep.unlink()
    assert main(words) == 0


def test_the_users_own_links_lead_to_their_runs(run, tmp_path, capsys):
    (tmp_path / "linked").symlink_to(run.parents[1])
    (tmp_path / "the_run").symlink_to(run)
    for words in (["resume=auto"], [f"resume={tmp_path / 'the_run'}"]):
        assert main([*RUN, f"output={tmp_path / 'linked'}", "name=strange", *words]) == 0
    assert [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.parametrize("name", ["compare", "compare/runs.csv", "compare/index.html", "compare/curves.png"])
def test_compare_writes_through_no_link(run, tmp_path, capsys, name):
    target = tmp_path / "precious"
    link = run.parent / name
    if name == "compare":
        target.mkdir()
        (target / "runs.csv").write_text("kept")
    else:
        target.write_text("kept")
        link.parent.mkdir()
    link.symlink_to(target)
    if name == "compare":
        assert "a link or a file stands where" in line(capsys, ["compare", run.parent])
        assert [path.name for path in target.iterdir()] == ["runs.csv"]
        target /= "runs.csv"
        assert main(["compare", str(run.parent), "--out", str(link)]) == 0  # what the user names may be a link
        assert target.read_text() != "kept"
    else:
        assert main(["compare", str(run.parent)]) == 0
        assert target.read_text() == "kept" and not link.is_symlink()


# ---- inputs of predict


def announced(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header


def png(width: int, height: int) -> bytes:
    """A PNG file of some bytes that announces so many pixels."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"b")


def write_arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


ODD = {
    "empty.npy": lambda path: path.write_bytes(b""),
    "huge.npy": lambda path: path.write_bytes(announced((10**11,)) + bytes(100)),
    "more.npy": lambda path: path.write_bytes(announced((2, 1, 8, 8)) + bytes(100)),
    "nothing.npy": lambda path: path.write_bytes(announced((10**11,), "|V0")),
    "objects.npy": lambda path: path.write_bytes(announced((1,), "|O") + bytes(100)),
    "version.npy": lambda path: path.write_bytes(b"\x93NUMPY\7\7" + bytes(100)),
    "header.npy": lambda path: path.write_bytes(b"\x93NUMPY\1\0\x10\0{'descr': ((((((" + bytes(100)),
    "archive.npy": write_arrays,
    "zip.npy": write_zip,
    "rubbish.npy": lambda path: path.write_bytes(b"PK\3\4" + bytes(range(200))),
    "text.npy": lambda path: path.write_text("1 2 3"),
    "folder.npy": lambda path: path.mkdir(),
    "pipe.npy": os.mkfifo,
    "device.npy": lambda path: path.symlink_to("/dev/zero"),
    "bomb.png": lambda path: Image.new("1", (9_000, 9_000)).save(path),
    "header.png": lambda path: path.write_bytes(png(100_000, 100_000)),
    "broken.png": lambda path: path.write_bytes(png(8, 8) + bytes(50)),
    "empty.png": lambda path: path.write_bytes(b""),
    "program.png": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    "text.jpg": lambda path: path.write_text("no picture"),
    "folder.png": lambda path: path.mkdir(),
    "pipe.png": os.mkfifo,
    "device.png": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_inputs_of_predict_are_a_line(run, capsys, tmp_path, name):
    ODD[name](tmp_path / name)
    assert str(tmp_path / name) in line(capsys, ["predict", run, tmp_path / name])
    np.save(tmp_path / "right.npy", np.zeros((1, 1, 8, 8), np.float32))
    Image.new("L", (600, 400)).save(tmp_path / "right.png")
    assert main(["predict", str(run), str(tmp_path / "right.npy"), str(tmp_path / "right.png")]) == 0


def test_a_truncated_picture_is_a_line(run, capsys, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for ending in ("png", "jpg", "webp", "bmp", "tif"):
        Image.fromarray(noise).save(path := tmp_path / f"a.{ending}")
        assert main(["predict", str(run), str(path)]) == 0
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert str(path) in line(capsys, ["predict", run, path])


def test_image_folders_have_the_same_limit(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for n in range(3):
            Image.new("L", (8, 8), n).save(tmp_path / split / name / f"{n}.png")
    image_folder(str(tmp_path), size=8, val=0)
    (tmp_path / "train" / "a" / "1.png").write_bytes(png(9_000, 9_000))
    with pytest.raises(UserError, match="9000 x 9000, more than 64 Mi pixels"):
        next(iter(image_folder(str(tmp_path), size=8, val=0).ordered_loader("train")))


# ---- weights


def test_weights_that_stand_for_more_than_the_file_holds_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "view.pt")
    with pytest.raises(UserError, match="MiB of weights"):
        read_state(tmp_path / "view.pt")
    torch.save({"w": torch.ones(1).expand(10, 10)}, tmp_path / "small.pt")
    assert read_state(tmp_path / "small.pt")["w"].shape == (10, 10)
    with (
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a/data.pkl", "w", force_zip64=True) as member,
    ):
        for _ in range(33):
            member.write(bytes(2**25))
    with pytest.raises(UserError, match="that unpack to"):
        read_state(tmp_path / "bomb.pt")
    own: dict = {"step": 3}
    own |= {f"state_dict{n}": own for n in range(50)}
    own["state_dict"] = own
    torch.save(own, tmp_path / "own.pt")
    with pytest.raises(UserError, match="holds no weights"):
        read_state(tmp_path / "own.pt")
