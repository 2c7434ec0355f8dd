"""Arrays as inputs and targets: every layout and type is read as it is meant and said, or refused with what to type."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from helpers.tiny import mistake, train
from kdlab.cli.main import main
from kdlab.data import array_inputs, tensors
from kdlab.errors import UserError
from kdlab.inference.predict import load_model, read_input

DRAW = np.random.default_rng(0)
TARGETS = np.arange(60) % 3
WORDS = ("experiment=kd_resnet", "method=finetune", "loss=ce", "baseline=false", "epochs=1", "data=tensors")


def levels(*shape):
    return DRAW.integers(0, 256, (60, *shape), np.uint8)


def pixels(data, split="train"):
    return torch.cat([batch.inputs for batch in data.ordered_loader(split)])


def all_rows(inputs, targets=TARGETS, **options):
    return tensors(inputs, targets, val=0, test=0, **options)


# ---- shapes


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (32, 24), (9, 28)])
def test_channels_that_stand_last_are_turned_and_said(size, channels):
    pictures = levels(*size, channels)
    first = all_rows(pictures.transpose(0, 3, 1, 2))
    for last in (all_rows(pictures), all_rows(torch.from_numpy(pictures)), all_rows((pictures / 255).astype("f4"))):
        assert last.input_shape == first.input_shape == (channels, *size)
        assert torch.allclose(pixels(last), pixels(first), atol=1e-7)
        assert last.notes == (f"shape {pictures.shape} is read as (N, H, W, C): the channels stand last",)
    assert first.notes == () and all_rows(pictures).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "shape",
    [(1, 28, 28), (3, 8, 5), (12, 32, 32), (2, 9, 9), (512, 1, 1), (64, 2, 2), (3, 3, 3), (64, 4, 4), (8, 1, 9)],
)
def test_shapes_with_channels_first_stay_and_nothing_is_said(shape):
    data = all_rows(levels(*shape))
    assert data.input_shape == shape and data.notes == ()


@pytest.mark.parametrize("shape", [(3, 32, 3), (1, 28, 1), (16, 4, 3), (5, 5, 1), (4, 8, 3), (64, 64, 12)])
def test_shapes_that_can_be_read_in_two_ways_stay_and_are_said(shape):
    data = all_rows(levels(*shape))
    assert data.input_shape == shape
    (line,) = data.notes
    assert line.startswith(f"shape {(60, *shape)} is read as (N, C, H, W): {shape[0]} channels of ")
    assert "if the channels stand last, turn it: inputs.transpose(0, 3, 1, 2)" in line


def test_every_split_is_turned(tmp_path):
    pictures = levels(16, 12, 3)
    arrays = {"inputs": pictures, "targets": TARGETS, "val_inputs": pictures[:9], "val_targets": TARGETS[:9]}
    np.savez(tmp_path / "x.npz", **arrays, test_inputs=pictures[9:30], test_targets=TARGETS[9:30])
    data = tensors(str(tmp_path / "x.npz"))
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    assert data.input_shape == (3, 16, 12) and len(data.notes) == 3
    for split, rows in (("train", expected), ("val", expected[:9]), ("test", expected[9:30])):
        assert torch.equal(pixels(data, split), rows)


@pytest.mark.parametrize("shape", [(), (3, 0, 8), (3, 8, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(
        UserError, match=r"data\.inputs: shape \(60.*\); accepted: \(N, C, H, W\), \(N, H, W, C\), \(N, H"
    ):
        all_rows(np.zeros((60, *shape), np.float32))


# ---- types


@pytest.mark.parametrize(
    "kind", ["<f4", ">f4", "<f8", ">f8", "f2", "longdouble", "bool", ">i2", "u2", "<u4", "i8", "u1"]
)
def test_numbers_of_any_type_make_the_same_table(kind):
    numbers = DRAW.integers(0, 2, (60, 5))
    data = all_rows(np.asfortranarray(numbers.astype(kind)))
    assert torch.equal(pixels(data), torch.from_numpy(numbers).float())


@pytest.mark.parametrize("kind", ["<f4", ">f4", ">f8", "f2"])
def test_pictures_in_any_byte_and_memory_order(kind):
    pictures = (levels(3, 9, 8) / 255).astype(kind)
    for given in (pictures, np.asfortranarray(pictures), pictures[::-1][::-1]):
        assert torch.equal(pixels(all_rows(given)), torch.from_numpy(pictures.astype("f4")))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (
            levels(3, 8, 8).astype("f4"),
            r"values from 0 to 255; accepted: uint8, or floats in \[0, 1\]; if 255 .* by 255",
        ),
        (levels(3, 8, 8).astype("f4") * 257, "values from 0 to 65535; .*; if 65535 is white: divide by 65535"),
        (levels(3, 8, 8) / 127.5 - 1, r"values from -1 to 1; .*; for values from -1 to 1: \(x \+ 1\) / 2"),
        (levels(3, 8, 8) / 50 - 2, r"values from -2 to 3\.1; .*; give them before standardisation"),
        (levels(8, 8).astype("f4"), "values from 0 to 255"),
        (
            levels(3, 8, 8).astype("i8"),
            r"pictures of torch\.int64; .*from 0 to 255; convert them: \.astype\(np\.uint8\)",
        ),
        (
            levels(3, 8, 8).astype(">u2") * 257,
            r"pictures of torch\.uint16; .* 0 to 65535; if 65535 is white: divide by",
        ),
        (levels(3, 8, 8).astype("i4") - 9, r"pictures of torch\.int32; .* from -9 to 246"),
        (levels(3, 8, 8) > 9, r"pictures of torch\.bool"),
        (levels(3, 8, 8) / 255 + 0j, "complex numbers; accepted: real ones"),
        (np.array([["a"]] * 60), "<U1 values; accepted: numbers"),
        (np.array([[{}]] * 60), "object values; accepted: numbers"),
        ([[1.0]] * 59 + [[1.0, 2.0]], "rows of unequal length"),
        (torch.eye(60).to_sparse(), "a sparse or quantized tensor"),
    ],
)
def test_pictures_that_are_no_shares_of_white_are_refused(inputs, says):
    with pytest.raises(UserError, match=rf"data\.inputs: .*{says}"):
        all_rows(inputs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(5,), (8, 8), (3, 8, 8), (9, 8, 3)])
def test_a_row_that_is_not_finite_is_named(shape, value, tmp_path):
    inputs = (levels(*shape) / 255).astype("f4")
    inputs.reshape(60, -1)[7, 4] = value
    with pytest.raises(UserError, match=r"data\.inputs: row 7 has an input that is not finite"):
        all_rows(inputs)
    named = {"inputs": inputs[:7], "targets": TARGETS[:7], "test_inputs": inputs, "test_targets": TARGETS}
    with pytest.raises(UserError, match=r"data\.inputs: test_inputs: row 7 has"):
        tensors(named)
    np.save(tmp_path / "x.npy", inputs)
    wanted = {(8, 8): (1, 8, 8), (9, 8, 3): (3, 9, 8)}.get(shape, shape)
    with pytest.raises(UserError, match=r"x\.npy: row 7 has an input that is not finite"):
        read_input(tmp_path / "x.npy", wanted)


# ---- targets

ROWS = DRAW.standard_normal((60, 4)).astype("f4")


@pytest.mark.parametrize("kind", ["u1", "i2", ">i4", "u2", "u8", "i8"])
def test_class_ids_of_any_whole_type(kind):
    assert all_rows(ROWS, TARGETS.astype(kind)).fingerprint == all_rows(ROWS, TARGETS).fingerprint


@pytest.mark.parametrize("kind", ["u1", "f4", "bool", "i8"])
def test_one_hot_targets_and_columns_are_read_and_said(kind):
    plain = all_rows(ROWS)
    one_hot = all_rows(ROWS, np.eye(3)[TARGETS].astype(kind))
    assert one_hot.fingerprint == plain.fingerprint
    assert one_hot.notes == ("targets of shape (60, 3) are read as one-hot: the class id is the column of the 1",)
    column = all_rows(ROWS, TARGETS[:, None])
    assert column.fingerprint == plain.fingerprint
    assert column.notes == ("targets of shape (60, 1) are read as a column of class ids",)
    with pytest.raises(UserError, match=r"no training row has class id 3; ids found: 0\.\.2"):
        all_rows(ROWS, np.eye(4)[TARGETS])


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            TARGETS.astype("f4"),
            r"targets of torch\.float32 and shape \(60,\); .*; convert them: targets\.astype\(np\.int64",
        ),
        (
            TARGETS + 0.5,
            r"targets of torch\.float64 and shape \(60,\); accepted: whole class ids \(N,\), or one-hot \(N, C\)$",
        ),
        (TARGETS > 0, r"targets of torch\.bool .*; convert them"),
        (np.full((60, 3), 1 / 3), "; soft targets and several labels of a row are not read"),
        (np.ones((60, 3), int), "; soft targets and several labels of a row are not read"),
        (np.zeros((60, 3), int), "; soft targets and several labels of a row are not read"),
        (np.zeros((60, 2, 2), int), r"of torch\.int64 and shape \(60, 2, 2\)"),
        (np.array(["cat", "dog", "cow"])[TARGETS], "targets of text or objects; accepted: whole class ids"),
        (np.array([{}] * 60), "targets of text or objects"),
        (TARGETS.astype("f4")[:, None], r"targets of torch\.float32 and shape \(60, 1\)"),
    ],
)
def test_targets_that_are_no_class_ids(targets, says):
    with pytest.raises(UserError, match=rf"data\.targets: .*{says}"):
        all_rows(ROWS, targets)


@pytest.mark.parametrize(
    ("ids", "found", "choice"),
    [
        ((1, 2, 3), r"0; ids found: 1\.\.3", [1, 2, 3]),
        ((1, 2, 1), "0; ids found: 1, 2", [1, 2]),
        ((0, 2, 5), "1; ids found: 0, 2, 5", [0, 2, 5]),
        ((10, 20, 500_000), "0; ids found: 10, 20, 500000", [10, 20, 500_000]),
    ],
)
def test_ids_from_1_or_with_gaps_say_what_to_type_which_works(ids, found, choice):
    targets = np.array(ids)[TARGETS]
    typed = rf"data\.classes=\[{','.join(map(str, choice))}\], which renumbers them"
    with pytest.raises(UserError, match=rf"data\.targets: no training row has class id {found}; accepted: .*{typed}"):
        tensors(ROWS, targets)
    data = all_rows(ROWS, targets, classes=choice)
    assert data.class_names == list(map(str, choice)) and data.counts["train"] == 60
    rows = torch.cat([batch.targets for batch in data.ordered_loader("train")])
    assert rows.tolist() == [choice.index(one) for one in targets]


def test_other_ids(tmp_path):
    for targets, options, says in (
        (TARGETS - 1, {}, r"class id -1; accepted: 0\.\.1"),
        (TARGETS * 0, {}, r"no training row has class id 1; ids found: 0; accepted: at least two different ids"),
        (
            np.arange(60) * 3,
            {},
            r"class id 1; ids found: 0, 3, .*, \.\.\.; accepted: .*np\.unique\(targets, return_inverse",
        ),
        (TARGETS * 10**12, {}, r"class id 2000000000000; accepted: below 1,000,000; number the classes: np\.unique"),
        (
            TARGETS + 1,
            {"class_names": list("abc")},
            r"class id 3; accepted: 0\.\.2, which data\.class_names.*found: 1\.\.3",
        ),
        (TARGETS, {"class_names": list("abcd")}, r"no training row has class id 3 \(d\); ids found: 0\.\.2"),
        (TARGETS, {"class_names": "abc"}, r"data\.class_names: 'abc'; accepted: a list of names"),
        (TARGETS, {"class_names": ["a", "b", "a"]}, r"data\.class_names: 'a' stands there twice"),
    ):
        with pytest.raises(UserError, match=says):
            all_rows(ROWS, targets, **options)
    np.savez(tmp_path / "x.npz", inputs=ROWS, targets=TARGETS, class_names=np.array([b"a", b"b", b"c"]))
    assert tensors(str(tmp_path / "x.npz")).class_names == ["a", "b", "c"]
    named = {"inputs": ROWS, "targets": TARGETS % 2, "test_inputs": ROWS, "test_targets": TARGETS}
    with pytest.raises(UserError, match=r"no training row has class id 2; ids found: 0, 1; .*data\.classes=\[0,1\]"):
        tensors(named)
    assert tensors(named, classes=[0, 1]).counts["test"] == 40


# ---- what belongs together


def test_nothing_given_is_left_out_without_a_word(tmp_path):
    for held, says in (
        ({"inputs": ROWS, "targets": TARGETS, "val_inputs": ROWS}, r"data\.targets: there are no val_targets"),
        ({"inputs": ROWS, "targets": TARGETS, "test_targets": TARGETS}, r"data\.inputs: there are no test_inputs"),
        ({"inputs": ROWS, "targets": TARGETS, "test_input": ROWS}, r"unknown array 'test_input'; nearest: test_inputs"),
        ({"inputs": ROWS, "targets": TARGETS[:9]}, "has 60 inputs and 9 targets"),
    ):
        with pytest.raises(UserError, match=says):
            tensors(held)
    np.savez(tmp_path / "all.npz", inputs=ROWS, targets=1 - TARGETS % 2)
    np.savez(tmp_path / "y.npz", targets=TARGETS)
    np.savez(tmp_path / "z.npz", val_targets=TARGETS)
    data = tensors(str(tmp_path / "all.npz"), str(tmp_path / "y.npz"))
    assert data.num_classes == 3 and data.notes == ("the targets are those of data.targets; data.inputs holds others",)
    with pytest.raises(UserError, match=r"data\.targets: .*z\.npz holds val_targets; accepted: one array of class ids"):
        tensors(str(tmp_path / "all.npz"), str(tmp_path / "z.npz"))


def test_a_network_gets_back_the_rows_that_it_was_given():
    grey, colour = torch.rand(5, 9, 8), torch.rand(5, 3, 9, 8)
    for rows, wanted in ((grey, (1, 9, 8)), (grey[:, None], (1, 9, 8)), (grey[0], (1, 9, 8)), (colour, (3, 9, 8))):
        found, turned = array_inputs.fit_channels(rows, wanted)
        assert found.shape[1:] == wanted and not turned
    for rows, wanted in ((colour, (3, 9, 8)), (colour[:1], (3, 9, 8)), (grey[:, None], (1, 9, 8))):
        for given in (rows.movedim(1, -1), rows[0].movedim(0, -1)):
            found, turned = array_inputs.fit_channels(given, wanted)
            assert turned and torch.equal(found, rows[: len(found)])


# ---- for a user


def test_predict_takes_what_training_took(place, tmp_path, capsys, caplog):
    pictures = levels(16, 12, 3)
    np.savez(tmp_path / "x.npz", inputs=pictures, targets=TARGETS)
    run = train(place, "channels_last", *WORDS, f"data.inputs={tmp_path / 'x.npz'}")
    assert "data: shape (60, 16, 12, 3) is read as (N, H, W, C): the channels" in (run / "run.log").read_text()
    forms = {
        "last": pictures,
        "first": pictures.transpose(0, 3, 1, 2),
        "floats": (pictures / 255).astype(">f8"),
        "one": pictures[0],
    }
    assert load_model(run)[1]["input_shape"] == [3, 16, 12]
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    for name, array in forms.items():
        np.save(tmp_path / f"{name}.npy", array)
        rows = read_input(tmp_path / f"{name}.npy", (3, 16, 12))
        assert torch.allclose(rows, expected[: len(rows)], atol=1e-6)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kdlab"):
            assert main(["predict", str(run), str(tmp_path / f"{name}.npy")]) == 0
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"{tmp_path / name}.npy: shape {array.shape} is read with the channels last"] * (
            name != "first"
        )
    capsys.readouterr()
    np.save(tmp_path / "bright.npy", pictures.astype("f4"))
    np.savez(tmp_path / "bright.npz", inputs=pictures.astype("f4"), targets=TARGETS)
    refused = mistake(capsys, ["predict", str(run), str(tmp_path / "bright.npy")])
    words = [*WORDS, f"data.inputs={tmp_path / 'bright.npz'}"]
    before = mistake(capsys, words, tmp_path / "out")
    assert refused.removeprefix(f"{tmp_path / 'bright.npy'}: ") == before.removeprefix("data.inputs: ")


def test_the_choice_of_ids_from_1_can_be_typed(place, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", inputs=ROWS, targets=TARGETS % 2 + 1)
    words = ["experiment=kd_mlp", "data=tensors", f"data.inputs={tmp_path / 'x.npz'}", "epochs=1", "teacher.epochs=1"]
    typed = mistake(capsys, words, tmp_path / "out").split("or ")[-1].split(", which")[0]
    assert typed == "data.classes=[1,2]"
    run = train(place, "ids_from_1", *words, typed, "baseline=false")
    assert load_model(run)[1]["classes"] == ["1", "2"]
