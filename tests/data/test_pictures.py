"""Picture files of every depth, mode and layout: read as they are meant, or refused by name."""

from __future__ import annotations

import logging
import os
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import FEW, mistake, train
from kdlab.cli.main import main
from kdlab.data import image_folder, pictures
from kdlab.data.datasets.folder_layout import split_of
from kdlab.errors import UserError
from kdlab.inference.predict import read_input
from kdlab.system.files import Unreadable

SHARES = np.linspace(0, 1, 64).reshape(8, 8)
"""A picture of 8 x 8 pixels from black to white."""
EIGHT = np.rint(SHARES * 255).astype(np.uint8)
SIXTEEN = (SHARES * 65535).astype(np.uint16)


def tiff(path, content, bits, photometric=1, sample_format=1, order="<"):
    """A TIFF file of one 8 x 8 picture, of kinds that Pillow reads and does not write."""
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 8)]
    tags += [(279, len(content)), (339, sample_format)]
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(content))
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    path.write_bytes(head + content + struct.pack(order + "H", len(tags)) + entries + bytes(4))


def twelve_bits():
    pairs = (SHARES * 4095).astype(int).reshape(-1, 2)
    return b"".join(bytes([a >> 4, ((a & 15) << 4) | (b >> 8), b & 255]) for a, b in pairs.tolist())


# ---- depth


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("16.png", lambda p: Image.fromarray(SIXTEEN).save(p)),
        ("16.tif", lambda p: Image.fromarray(SIXTEEN).save(p)),
        ("16_lzw.tif", lambda p: Image.fromarray(SIXTEEN).save(p, compression="tiff_lzw")),
        ("16.pgm", lambda p: Image.fromarray(SIXTEEN).save(p)),
        ("16_big_endian.tif", lambda p: tiff(p, SIXTEEN.astype(">u2").tobytes(), 16, order=">")),
        ("16_white_is_zero.tif", lambda p: tiff(p, (65535 - SIXTEEN).astype("<u2").tobytes(), 16, photometric=0)),
        ("12_packed.tif", lambda p: tiff(p, twelve_bits(), 12)),
        ("12.pgm", lambda p: p.write_bytes(b"P5 8 8 4095\n" + (SHARES * 4095).astype(">u2").tobytes())),
        ("10.pgm", lambda p: p.write_text("P2 8 8 1023\n" + " ".join(map(str, (SHARES * 1023).astype(int).ravel())))),
        ("float.tif", lambda p: Image.fromarray(SHARES.astype(np.float32)).save(p)),
        ("float_white_is_zero.tif", lambda p: tiff(p, (1 - SHARES).astype("<f4").tobytes(), 32, 0, 3)),
        ("float.pfm", lambda p: Image.fromarray(SHARES.astype(np.float32)).save(p)),
        ("8.png", lambda p: Image.fromarray(EIGHT).save(p)),
        ("8_white_is_zero.tif", lambda p: tiff(p, (255 - EIGHT).tobytes(), 8, photometric=0)),
        ("colour.png", lambda p: Image.fromarray(EIGHT).convert("RGB").save(p)),
    ],
)
def test_pictures_of_any_depth_give_the_same_levels(tmp_path, name, write, channels):
    write(tmp_path / name)
    found, look = pictures.decode(tmp_path / name, 8, 8, channels)
    assert found.shape == (channels, 8, 8) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - EIGHT).max() <= 1
    expected = {"1": {"deep"}, "f": {"float"}}.get(name[0], set())
    assert look.remarks == pictures.look(tmp_path / name).remarks == expected
    assert look.highest == (65535 if expected == {"deep"} else 0)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (
            lambda p: Image.fromarray((SHARES * 255).astype(np.int32)).save(p),
            "32-bit whole numbers, whose white is not",
        ),
        (lambda p: tiff(p, SIXTEEN.astype("<u4").tobytes(), 32), "32-bit whole numbers"),
        (lambda p: tiff(p, (SHARES * 999).astype("<i2").tobytes(), 16, 1, 2), "16-bit signed whole numbers"),
        (lambda p: Image.fromarray((SHARES * 255).astype(np.float32)).save(p), "values from 0 to 255; accepted: 8 or"),
        (lambda p: Image.fromarray((SHARES - 0.5).astype(np.float32)).save(p), "values from -0.5 to 0.5"),
        (lambda p: Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(p), "values from nan to nan"),
        (lambda p: Image.new("LAB", (8, 8)).save(p), "CIE Lab colours"),
        (lambda p: p.write_bytes(b""), "the file is empty"),
        (lambda p: p.write_text("no picture"), "of no kind that is read; accepted: AVIF, BMP"),
    ],
)
def test_values_without_a_known_scale_are_refused(tmp_path, write, says):
    write(tmp_path / "x.tif")
    with pytest.raises(Unreadable, match=says):
        pictures.decode(tmp_path / "x.tif", 8, 8)
    for kind in "ab":
        (tmp_path / "root" / kind).mkdir(parents=True)
        (tmp_path / "root" / kind / "x.tif").write_bytes((tmp_path / "x.tif").read_bytes())
    with pytest.raises(UserError, match=rf"data\.root: .*/a/x\.tif is no picture that can be decoded \(.*{says}"):
        image_folder(str(tmp_path / "root"))
    with pytest.raises(UserError, match=rf"x\.tif: cannot be read as an image \(.*{says}"):
        read_input(tmp_path / "x.tif", (3, 8, 8))


@pytest.mark.parametrize("mode", ["1", "P", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_colour_modes_are_read_as_pillow_converts_them(tmp_path, mode):
    made = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).convert(mode)
    made.save(tmp_path / "x.tif")
    for channels, wanted in ((1, "L"), (3, "RGB")):
        expected = np.array(made.convert(wanted)).reshape(8, 8, channels).transpose(2, 0, 1)
        assert np.array_equal(pictures.decode(tmp_path / "x.tif", 8, 8, channels)[0], expected)


def test_alpha_is_left_out_and_said_where_something_shows_through(tmp_path):
    solid = Image.fromarray(EIGHT).convert("RGB")
    clear = solid.copy()
    clear.putalpha(Image.fromarray(EIGHT))
    clear.save(tmp_path / "clear.png")
    solid.convert("RGBA").save(tmp_path / "solid.png")
    palette = Image.fromarray(EIGHT).quantize(8)
    palette.save(tmp_path / "palette.png", transparency=3)
    for name, remarks in (("clear", {"alpha"}), ("solid", set()), ("palette", {"alpha"})):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, look = pictures.decode(tmp_path / f"{name}.png", 8, 8)
        assert look.remarks == remarks
        expected = palette.convert("RGB") if name == "palette" else solid
        assert np.array_equal(found, np.array(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_of_several_frames_the_first_is_read(tmp_path, name):
    frames = [Image.new("L", (8, 8), level) for level in (200, 10)]
    options = {"lossless": True} if name == "x.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    found, look = pictures.decode(tmp_path / name, 8, 8, 1)
    assert look.remarks == {"frames"} and (found == 200).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pictures_are_turned_as_others_are(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, pixels in (("deep", SIXTEEN), ("plain", EIGHT)):
        Image.fromarray(pixels[:, :5]).save(tmp_path / f"{name}.png", exif=exif)
    deep, plain = (pictures.decode(tmp_path / f"{name}.png", 8, 8, 1)[0].astype(int) for name in ("deep", "plain"))
    assert np.abs(deep - plain).max() <= 1


def test_the_content_decides_what_a_picture_is_and_nothing_is_run(tmp_path):
    Image.fromarray(EIGHT).save(tmp_path / "named.png", format="BMP")
    assert np.array_equal(pictures.decode(tmp_path / "named.png", 8, 8, 1)[0][0], EIGHT)
    Image.fromarray(EIGHT).save(tmp_path / "x.eps")
    (tmp_path / "eps.png").write_bytes((tmp_path / "x.eps").read_bytes())
    with pytest.raises(Unreadable, match="of no kind that is read"):
        pictures.decode(tmp_path / "eps.png", 8, 8)
    assert not pictures.endings() & {".eps", ".ps", ".wmf", ".pdf", ".h5", ".psd"}
    assert pictures.endings() >= {".jfif", ".jpe", ".jp2", ".tga", ".ppm", ".pgm", ".png", ".tiff", ".webp", ".bmp"}


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(Unreadable, match="no regular file"):
        pictures.decode(tmp_path / "x.png", 8, 8)


# ---- folders


def write(root, counts, pixels=EIGHT, ending="png", **options):
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(pixels).save(root / folder / f"{number:02}.{ending}", **options)
    return root


def folder(root, **options):
    return image_folder(str(root), **{"size": 8, "channels": 1, "batch_size": 8, **options})


def pixels(data):
    return torch.cat([batch.inputs for batch in data.ordered_loader("train")])


@pytest.mark.parametrize("memory", [2e9, 0])
def test_deep_pictures_of_a_folder_are_said(tmp_path, memory):
    sixteen = folder(write(tmp_path / "16", {"a": 6, "b": 6}, SIXTEEN), memory=memory, workers=0)
    eight = folder(write(tmp_path / "8", {"a": 6, "b": 6}), memory=memory, workers=0)
    assert (pixels(sixteen) - pixels(eight)).abs().max() <= 1 / 255 + 1e-6
    (line,) = sixteen.notes
    assert line.startswith(f"12 of 12 pictures{'' if memory else ' looked at'} have 16 bits a channel, scaled to 8")
    assert ("the highest value is 65535" in line) == bool(memory)
    assert eight.notes == ()


def test_what_was_read_otherwise_once_has_another_fingerprint(tmp_path):
    data = folder(write(tmp_path, {"a": 6, "b": 6}, SIXTEEN), memory=0, workers=0)
    assert data._rows["train"].inputs.deep
    found = data.fingerprint
    for rows in data._rows.values():
        rows.inputs.deep = False
    del data.__dict__["fingerprint"]
    assert data.fingerprint != found


def test_fingerprints_of_what_was_read_rightly_stay(tmp_path):
    """The value that was always given, so that teachers and caches that were kept stay valid."""
    rows = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    for number, pixel in enumerate(rows):
        write(
            tmp_path / "set", {f"{('train', 'valid', 'test')[number % 3]}/{'ab'[number // 3 % 2]}/{number}": 1}, pixel
        )
    assert folder(tmp_path / "set").fingerprint == "c8fd309e4e08a168568030f53cc4b9afd578ac223952751882a6196b78e37b7f"


SPELLINGS = [
    ("Train", "Test", "Val"),
    ("TRAIN", "TESTING", "VALIDATION"),
    ("training", "test", "valid"),
    ("Training_Set", "test-set", "dev"),
    ("train_data", "test data", "Eval"),
    ("trainset", "testset", "val_images"),
]


@pytest.mark.parametrize(("train", "test", "val"), SPELLINGS)
def test_splits_in_any_usual_spelling(tmp_path, train, test, val):
    counts = {f"{train}/a": 6, f"{train}/b": 5, f"{test}/a": 2, f"{test}/b": 2, f"{val}/b": 3}
    data = folder(write(tmp_path, counts))
    assert data.class_names == ["a", "b"] and data.counts == {"train": 11, "labelled": 11, "val": 3, "test": 4}
    assert folder(tmp_path, test=0).counts["test"] == 0
    said = " ".join(data.notes)
    assert all(f"{name} is the" in said for name in (train, test, val) if name in ("Train", "dev", "Eval", "trainset"))


@pytest.mark.parametrize("name", ["trains", "contest", "value", "developer", "train2", "t", "attest", "validity"])
def test_other_names_are_no_splits(tmp_path, name):
    assert split_of(name) is None
    assert folder(write(tmp_path, {name: 9, "other": 9})).class_names == sorted([name, "other"])


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"val/a": 2, "Validation/a": 2, "train/a": 2}, r"has Validation and val, which both are the val split"),
        ({"train/a": 2, "Train/a": 2}, r"has Train and train, which both are the train split"),
        ({"Test/a": 2, "Val/a": 2}, r"has split folders \(Val, Test\) and none is train; accepted: one more; where a"),
        ({"train": 2, "test": 2}, r"train has no sub-folders; accepted: one for each class"),
        (
            {"train": 3, "car": 3},
            r"has split folders \(train\) and others with pictures \(car\); .*all class folders into",
        ),
        ({"train/a": 3, "train/b": 3, "holdout/a": 3}, r"\(train\) and others with pictures \(holdout\); accepted"),
        ({"cat": 3, "dog": 3, "Test/cat": 3}, r"\(Test\) and others with pictures \(cat, dog\)"),
        (
            {"train/a": 3, "train/b": 3, "Test": 3},
            r"Test has no sub-folders; accepted: one for each class, or data\.test=0",
        ),
        ({"train/a": 3, "train/b": 3, "val": 3}, r"val has no sub-folders; accepted: one for each class$"),
        (
            {"data/train/a": 3, "data/test/a": 3},
            r"data holds split folders \(test, train\); accepted: data\.root=.*data$",
        ),
        ({"cat/train": 3, "cat/Test": 3, "dog/train": 3}, r"cat holds split folders \(Test, train\).*train/<class>"),
        ({"a": 3}, r"has one sub-folder, a; accepted: two or more classes"),
        ({"train/a": 3, "train/b": 3, "Test/c": 3}, r"Test: unknown class folder 'c'"),
    ],
)
def test_folders_that_are_not_clear(tmp_path, counts, says):
    with pytest.raises(UserError, match=rf"data\.root: .*{says}"):
        folder(write(tmp_path, counts))


def test_the_advice_for_classes_named_like_splits_works(tmp_path):
    data = folder(write(tmp_path, {"train/train": 9, "train/car": 9}))
    assert data.class_names == ["car", "train"] and data.counts["test"] == 2


def test_a_folder_without_pictures_may_stand_beside_splits(tmp_path):
    write(tmp_path, {"train/a": 6, "train/b": 6})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.xml").write_text("<x/>")
    assert folder(tmp_path).class_names == ["a", "b"]


def test_classes_that_differ_in_capitals_are_said(tmp_path):
    data = folder(write(tmp_path, {"Cat": 6, "cat": 6, "dog": 6}))
    assert data.num_classes == 3
    assert data.notes == ("classes that differ in capitals only: Cat, cat; they count as different",)


def test_nothing_hidden_is_read_at_any_depth(tmp_path):
    write(tmp_path, {"a": 10, "b": 10, "b/inside": 5})
    clean = folder(tmp_path).fingerprint
    write(tmp_path, {"a/.ipynb_checkpoints": 2, "b/inside/.cache/deep": 2, ".trash": 3, "__MACOSX/a": 2, "a/@eaDir": 1})
    for name in ("a/._0.png", "a/.DS_Store", "a/Thumbs.db", "b/desktop.ini", ".DS_Store", "b/inside/._x.jpg"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    data = folder(tmp_path)
    assert data.class_names == ["a", "b"] and data.fingerprint == clean
    assert data.notes == ("left out: 2 hidden (the name begins with a dot)",)


def test_what_is_no_picture_is_counted(tmp_path):
    write(tmp_path, {"a": 5, "b": 5})
    write(tmp_path, {"b/more": 5}, ending="jfif", format="JPEG")
    write(tmp_path, {"a/more": 5}, ending="TGA")
    for name in ("a/1.txt", "a/2.txt", "b/3.heic", "b/README", "a/more/x.png.part"):
        (tmp_path / name).write_text("x")
    Image.fromarray(EIGHT).save(tmp_path / "stray.png")
    (tmp_path / "labels.csv").write_text("x")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    data = folder(tmp_path, val=0, test=0)
    assert data.counts["train"] == 20
    (line,) = data.notes
    assert line.startswith("left out: 5 files of other endings (.txt 2, ")
    assert all(part in line for part in (".heic 1", "none 1", ".part 1"))
    assert line.endswith("1 linked folder inside of a class, 1 picture in no class folder")


def test_a_class_of_other_endings_says_which(tmp_path):
    write(tmp_path, {"a": 5})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.heic").write_text("x")
    with pytest.raises(UserError, match=r"b has no pictures \(it has 1 \.heic\); accepted: files that end in \.png, "):
        folder(tmp_path)


def test_links_pipes_and_names_that_are_no_text(tmp_path):
    write(tmp_path, {"a": 5, "b": 5})
    for make, says in (
        (lambda path: path.symlink_to(tmp_path / "gone.png"), "is a link to nothing"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.write_bytes(b""), r"is no picture .*the file is empty"),
    ):
        make(tmp_path / "a" / "x.png")
        with pytest.raises(UserError, match=rf"data\.root: .*a/x\.png {says}"):
            folder(tmp_path)
        (tmp_path / "a" / "x.png").unlink()
    (tmp_path / "a" / "linked.png").symlink_to(tmp_path / "b" / "00.png")
    odd = os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png")
    Image.fromarray(EIGHT).save(odd)
    for memory in (2e9, 0):
        data = folder(tmp_path, val=0, test=0, memory=memory, workers=0)
        assert len(pixels(data)) == 12 and len(data.fingerprint) == 64
    os.mkdir(os.fsencode(tmp_path) + b"/\xfe")
    with pytest.raises(UserError, match=r"a folder whose name is not in UTF-8 \(\\xfe\); rename it"):
        folder(tmp_path)


# ---- for a user


@pytest.fixture
def run(place):
    return train(place, "to_read", "experiment=kd_resnet", *FEW, "baseline=false", "resume=auto")


@pytest.mark.parametrize("ending", ["png", "jfif", "pgm", "tga", "bmp", "jp2"])
def test_predict_reads_what_training_reads(run, tmp_path, ending):
    write(tmp_path, {"a": 1, "b": 1}, ending=ending, **({"format": "JPEG"} if ending == "jfif" else {}))
    shown = pixels(folder(tmp_path, val=0, test=0))
    assert torch.equal(read_input(tmp_path / "a" / f"00.{ending}", (1, 8, 8)), shown[:1])
    assert main(["predict", str(run), str(tmp_path / "a" / f"00.{ending}")]) == 0


def test_predict_says_how_it_reads(run, tmp_path, caplog, capsys):
    Image.fromarray(SIXTEEN).save(tmp_path / "deep.png")
    Image.fromarray(EIGHT).save(tmp_path / "plain.png")
    with caplog.at_level(logging.WARNING, "kdlab"):
        assert main(["predict", str(run), str(tmp_path / "deep.png"), str(tmp_path / "plain.png")]) == 0
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("1 of 2 pictures have 16 bits a channel, scaled to 8 (full scale, 65535, becomes 255); ")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_check_and_the_log_say_how_data_were_read(place, tmp_path, capsys):
    rows = np.random.default_rng(0).integers(0, 65536, (8, 8), np.uint16)
    root = write(tmp_path, {"Train/a": 9, "Train/b": 9, "Test/a": 4, "Test/b": 4}, rows)
    words = ["experiment=kd_resnet", "data=image_folder", f"data.root={root}", "data.size=8", "data.channels=1"]
    words += ["method=finetune", "loss=ce", "baseline=false", "epochs=1"]
    assert main(["check", *words]) == 0
    assert "ok    data: Train is the train split, Test is the test split" in capsys.readouterr().out
    log = (train(place, "said", *words) / "run.log").read_text()
    assert log.count("data: 26 of 26 pictures have 16 bits a channel") == 1
    said = mistake(capsys, [*words[:2], f"data.root={root / 'Train' / 'a'}"], tmp_path / "out")
    assert said.startswith("data.root: ") and "has no sub-folders" in said
