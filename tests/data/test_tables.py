"""Tables of one's own: read strictly, told apart in float32, and predicted by the names of their columns."""

from __future__ import annotations

import csv as csv_format
import json
import shutil

import numpy as np
import pytest
import torch

from helpers.tiny import QUIET, mistake, train
from kdlab.cli.main import main
from kdlab.data import csv, digits
from kdlab.data.raw import Columns
from kdlab.data.table_file import read_table, separator
from kdlab.errors import UserError
from kdlab.inference.predict import load_model, predict

HEAD = "u,v,target\n"
ROWS = "".join(f"{i},{i % 7}.5,{'ab'[i % 2]}\n" for i in range(60))
TWO = "u,v,kind,side\n" + "".join(f"{i},{i % 7},{'ab'[i % 2]},{'xyz'[i % 3]}\n" for i in range(60))


@pytest.fixture
def put(tmp_path):
    """Writes a file, and returns its path as text."""

    def write(content, name="t.csv"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write


# ---- what is read


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("\ufeff" + HEAD + ROWS, {}),
        ((HEAD + ROWS).replace("\n", "\r\n"), {}),
        ((HEAD + ROWS).replace("\n", "\n\n"), {}),
        (HEAD.replace(",", " , ") + ROWS.replace(",a", ', "a" ').replace(",b", ",  b "), {}),
        ((HEAD + ROWS).replace(",", "\t"), {"delimiter": "\\t"}),
        ((HEAD + ROWS).replace(",", "\t"), {"delimiter": "tab"}),
        ((HEAD + ROWS).replace(",", ";"), {"delimiter": ";"}),
        ((HEAD + ROWS).replace(",", "|"), {"delimiter": "pipe"}),
        ((HEAD + ROWS).replace(",", " "), {"delimiter": "space"}),
    ],
)
def test_the_same_table_in_other_forms(put, content, options):
    plain, other = csv(put(HEAD + ROWS, "plain.csv")), csv(put(content), **options)
    assert other.fingerprint == plain.fingerprint and other.columns.names == ("u", "v") and other.notes == ()


def test_a_tsv_file_has_tabs_and_a_line_says_so(put):
    data = csv(put((HEAD + ROWS).replace(",", "\t"), "t.tsv"))
    assert data.fingerprint == csv(put(HEAD + ROWS)).fingerprint and data.columns.delimiter == "\t"
    assert len(data.notes) == 1 and "with a tab between columns" in data.notes[0]
    assert csv(put(HEAD + ROWS, "commas.tsv")).columns.delimiter == ",", "what is asked for, where it is there"


@pytest.mark.parametrize("missing", ["", "  ", "NA", "n/a", "NaN", "null", "None", "?", "<NA>", "#N/A"])
def test_a_row_without_a_label_is_named(put, missing):
    bad = put(f"{HEAD}{ROWS}1,2,{missing}\n")
    where = rf"row 61, column 'target': '{missing.strip()}' is no label \(1 of 61".replace("?", r"\?").replace("/", "/")
    with pytest.raises(UserError, match=rf"^data\.path: .*t\.csv, {where}"):
        csv(bad)
    with pytest.raises(UserError, match=rf"^data\.test_path: .*t\.csv, {where}"):
        csv(put(HEAD + ROWS, "train.csv"), test_path=bad)
    named = put(TWO + f"1,2,a,{missing}\n", "two.csv")
    for label in (None, "kind"):
        with pytest.raises(UserError, match=r"row 61, column 'side': .* is no label"):
            csv(named, target=["kind", "side"], label=label)


def test_a_class_that_looks_like_no_label_can_be_named(put):
    path = put(HEAD + ROWS.replace(",a", ",None"))
    with pytest.raises(UserError, match=r"30 of 60 rows .*where 'None' is a class, name it in data\.classes"):
        csv(path)
    assert csv(path, classes=["None", "b"]).class_names == ["None", "b"]


def test_labels_are_withheld_as_before(put):
    assert csv(put(HEAD + ROWS), labels=10).counts["labelled"] == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("v,v,c,target\n1,1,1,a\n", r"columns 1 and 2 are both named 'v'; accepted: different names"),
        ("u,target,target\n" + ROWS, r"columns 2 and 3 are both named 'target'"),
        (" u ,u,target\n" + ROWS, r"columns 1 and 2 are both named 'u'"),
        ("u,\ufeffu,target\n" + ROWS, r"columns 1 and 2 are both named 'u'"),
        (",v,target\n" + ROWS, r"column 1 has no name; accepted: .*data\.columns"),
        (ROWS, r"unknown column 'target'; .*its first line holds numbers; it must name the columns"),
        ("0,0.5,target\n" + ROWS.replace("b", "target"), r"its first line, 0,0\.5,target, looks like a row"),
        (HEAD + ROWS + '1,2,"a\n3,4,b\n', r"line 62: a quote that is not closed"),
        (HEAD + ROWS + '1,2,"a\n3,4,b"\n', r"row 61 \(line 63\), column 'target': a label of several lines"),
        (HEAD + ROWS + "\n1,2\n", r"row 61 \(line 63\) has 2 values, the header 3"),
        (HEAD + ROWS + "1,2,a,\n", r"row 61 has 4 values, the header 3"),
        (HEAD + ROWS + '"1,000",2,a\n', r"row 61, column 'u': '1,000' is no finite number \(.*no commas\)"),
        (HEAD + ROWS + '1,"0,5",a\n', r"row 61, column 'v': '0,5' is no finite number \(.*no commas\)"),
        (HEAD + ROWS + "1_0,2,a\n", r"row 61, column 'u': '1_0' is no finite number"),
        (HEAD + ROWS + "1,,a\n", r"row 61, column 'v': '' is no finite number \(the cell is empty\)"),
        (HEAD + ROWS + "1,-inf,a\n", r"row 61, column 'v': '-inf' is no finite number"),
        (HEAD + ROWS + "1e400,2,a\n", r"row 61, column 'u': '1e400' is no finite number"),
        ("city,v,hue,target\n" + "P,1,red,a\n" * 9, r"column 'city': 'P' is no finite number \(likewise in 'hue'\)"),
        ((HEAD + ROWS).replace(",a", ",1").replace(",b", ",1.0"), r"classes '1' and '1\.0', which are the same"),
        ((HEAD + ROWS).replace(",", ";"), r"it holds a semicolon where a comma .*data\.delimiter=semicolon reads that"),
        ("target\na\nb\n", r"data\.columns: \[\]; accepted: "),
        ((HEAD + ROWS).encode() + b"1,2,caf\xe9\n", r"line 62 holds the byte 0xe9.*saved as UTF-8"),
        ((HEAD + ROWS).encode("utf-16"), r"line 1 holds a zero byte, as in UTF-16.*saved as UTF-8"),
        (b"PK\x03\x04", r"is an archive or a workbook; accepted: a CSV file"),
        ("", r"has no rows below its header"),
        (HEAD, r"has no rows below its header"),
        (HEAD + ROWS.replace("b", "a"), r"holds 1 different values in 60 rows"),
    ],
)
def test_what_would_lose_something_is_named(put, content, said):
    with pytest.raises(UserError, match=said) as caught:
        csv(put(content))
    assert str(caught.value).startswith(("data.path: ", "data.target: ", "data.columns: "))


@pytest.mark.parametrize("delimiter", ["", "ab", '"', "\n", "a", ".", None])
def test_what_separates_nothing(delimiter):
    with pytest.raises(UserError, match=r"data\.delimiter: .*; accepted: comma, tab, "):
        separator(delimiter)


def test_cells_of_several_lines_and_columns_that_are_not_read(put):
    rows = "".join(f'{i},"x\ny, ""z""",{"ab"[i % 2]}\n' for i in range(40))
    data = csv(put("u,note,target\n" + rows), columns=["u"])
    assert data.counts["train"] + data.counts["val"] + data.counts["test"] == 40
    assert csv(put(",v,target\n" + ROWS), columns=["v"]).input_shape == (1,), "a column without a name, not read"
    assert csv(put("0,1,2\n" + ROWS.replace("a", "2")), target="2").class_names == ["2", "b"], "names by number"


def test_columns_of_two_files_go_by_name(put):
    train_file = put(HEAD + ROWS, "train.csv")
    test = "target,w,v,u\n" + "".join(f"{'ab'[i % 2]},9,{i % 7}.5,{i + 0.25 * (i > 4)}\n" for i in range(20))
    data = csv(train_file, test_path=put(test, "test.csv"))
    inputs = next(iter(data.ordered_loader("test"))).inputs
    assert inputs[6].tolist() == [6.25, 6.5] and data.class_names == ["a", "b"]
    assert [note.partition("test.csv")[2] for note in data.notes] == [
        f": not read, since {train_file} lacks it: 'w'",
        f" are in {train_file} too: no test of what is new",
    ]
    assert data.notes[1].startswith("5 of 20 rows of ")
    for lines, said in (
        ("target,u\na,1\n", r"data\.test_path: .*test\.csv: unknown column 'v'"),
        ("u,v\n1,1\n", r"data\.test_path: .*test\.csv: unknown column 'target'"),
        (HEAD + "1,1,a\n2,2,z\n", r"data\.test_path: .*test\.csv, row 2, column 'target': unknown class 'z'"),
        ("u,u,v,target\n1,1,1,a\n", r"data\.test_path: .*both named 'u'"),
    ):
        with pytest.raises(UserError, match=said):
            csv(train_file, test_path=put(lines, "test.csv"))


# ---- numbers that float32 would not tell apart


@pytest.mark.parametrize(
    ("cell", "changed"),
    [
        (lambda i: f"{1_700_000_000 + i}", True), (lambda i: f"{1_700_000_000_000 + 1000 * i}", True),
        (lambda i: f"{i}e-12", True), (lambda i: f"{i}e300", True), (lambda i: f"-{10**9 + i}", True),
        (lambda i: f"{2000 + i}", False), (lambda i: f"{1_700_000_000 + 86400 * i}", False),
        (lambda i: f"{i}e5", False),
        (lambda i: "1700000000", False), (lambda i: ("0.3", "0.30000000000000004")[i % 2], False),
    ],
)  # fmt: skip
def test_columns_keep_their_variation(put, cell, changed):
    path = put(HEAD + "".join(f"{cell(i)},{i},{'ab'[i % 2]}\n" for i in range(60)))
    data = csv(path, val=0, test=0)
    inputs = next(iter(data.ordered_loader("train", batch_size=60))).inputs
    assert ((data.columns.offset[0], data.columns.scale[0]) != (0, 1)) == changed
    assert (data.columns.offset[1], data.columns.scale[1]) == (0, 1) and inputs[:, 1].tolist() == list(range(60))
    exact = np.array([float(cell(i)) for i in range(60)])
    if not changed:
        assert np.array_equal(inputs[:, 0].numpy(), exact.astype(np.float32))
        return
    assert len(set(inputs[:, 0].tolist())) == 60 and "float32 would lose" in data.notes[0]
    standardised = (inputs[:, 0].double().numpy() - data.mean[0]) / data.std[0]
    exact = exact / np.abs(exact).max()
    expected = (exact - exact.mean()) / exact.std()
    assert np.allclose(standardised, expected, atol=1e-5)
    with np.errstate(over="ignore"):  # what float32 would make of the cells
        plain = np.array([float(cell(i)) for i in range(60)]).astype(np.float32).astype(np.float64)
    assert len(set(plain.tolist())) < 60 or plain.std() < 1e-7


def test_data_that_read_other_columns_are_refused(put):
    first = csv(put(HEAD + ROWS, "1.csv"))
    turned = csv(put(HEAD + ROWS, "2.csv"), columns=["v", "u"])
    with pytest.raises(UserError, match=r"teacher\.data: columns v, u, and data has u, v; accepted: the same"):
        first.check_same_classes(turned)
    with pytest.raises(UserError, match=r"as with 'data\.columns=\[v,u\]'$"):
        first.check_same_classes(turned)
    first.check_same_classes(csv(put(HEAD + ROWS, "3.csv"), fraction=0.5))
    late = [csv(put(HEAD + "".join(f"{start + i},1,{'ab'[i % 2]}\n" for i in range(60)))) for start in (2**31, 2**32)]
    with pytest.raises(UserError, match=r"teacher\.data: column 'u' is read as \(cell - 4\.29\d+e\+09\) / 17\.3"):
        late[0].check_same_classes(late[1])


def test_a_teacher_from_a_run_reads_the_same_columns(place, tmp_path, capsys):
    """In another order the teacher would take one column for another, and nobody would notice."""
    draw = np.random.default_rng(0).normal(size=(200, 2)).round(4)
    (place / "order.csv").write_text("u,v,target\n" + "".join(f"{u},{v},{'ny'[int(u > 0)]}\n" for u, v in draw))
    data = ("data=csv", f"data.path={place / 'order.csv'}")
    run = train(place, "tables_order", *LEARNED, *data, "data.columns=[v,u]")
    words = [*QUIET, "experiment=kd_mlp", "epochs=1", "baseline=false", *data]
    words += [f"teacher.checkpoint={run / 'model_finetuned.pt'}"]
    said = mistake(capsys, words, tmp_path / "out")
    assert said.startswith("teacher.checkpoint: ") and said.endswith("as with 'data.columns=[v,u]'")
    train(place, "tables_taught", *words[len(QUIET) :], "data.columns=[v,u]")


# ---- prediction


def table(path, header=("a", "b", "t", "target"), rows=120, delimiter=","):
    """Rows that a linear network tells apart, in any order of the columns; returns them as dicts."""
    draw, made = np.random.default_rng(0), []
    for i in range(rows):
        a, b = draw.normal(size=2).round(4).tolist()
        made.append({"a": a, "b": b, "t": 1_700_000_000 + i, "id": i, "target": "yes" if a + b > 0 else "no"})
    with open(path, "w", newline="") as file:
        out = csv_format.DictWriter(file, header, delimiter=delimiter, extrasaction="ignore", lineterminator="\n")
        out.writeheader()
        out.writerows(made)
    return made


LEARNED = ("experiment=kd_mlp", "method=finetune", "loss=ce", "student=mlp_teacher", "epochs=3", "baseline=false")


@pytest.fixture
def run(place, tmp_path):
    """A run's folder with nothing of its data around."""
    table(place / "learned.csv")
    data = ("data=csv", f"data.path={place / 'learned.csv'}")
    return shutil.copytree(train(place, "table", *LEARNED, *data, "resume=auto"), tmp_path / "run")


def probabilities(found):
    return torch.tensor([[one.probabilities[name] for name in ("no", "yes")] for one in found])


def test_rows_are_predicted_by_the_names_of_their_columns(run, tmp_path):
    rows = table(tmp_path / "t.csv")
    found = predict(run, [tmp_path / "t.csv"])
    net, described = load_model(run)
    read = described["table"]
    assert read["names"] == ["a", "b", "t"] and read["targets"] == read["asked"] == ["target"]
    cells = np.array([[row[name] for name in read["names"]] for row in rows])
    inputs = torch.from_numpy(((cells - read["offset"]) / read["scale"]).astype(np.float32))
    with torch.no_grad():
        expected = net(inputs).softmax(-1)
    assert torch.allclose(probabilities(found), expected, atol=1e-6) and expected.std(0).min() > 0.01
    assert [one.given for one in found] == [row["target"] for row in rows] and found[4].row == 5
    table(tmp_path / "turned.csv", ("id", "t", "b", "target", "a"))
    table(tmp_path / "bare.tsv", ("t", "a", "b"), delimiter="\t")
    for name in ("turned.csv", "bare.tsv"):
        assert torch.equal(probabilities(predict(run, [tmp_path / name])), probabilities(found))
    assert found[0].given is not None and predict(run, [tmp_path / "bare.tsv"])[0].given is None


def test_what_the_command_says_and_writes(run, tmp_path, capsys, caplog):
    rows = table(tmp_path / "t.csv", ("id", "a", "b", "t", "target"))
    out = tmp_path / "out.csv"
    assert main(["predict", str(run), str(tmp_path / "t.csv"), "--out", str(out)]) == 0
    *lines, summary, written = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) and lines[0].startswith(f"{tmp_path / 't.csv'}, row 1: ") and "%" in lines[0]
    assert "not read, since" in caplog.text and caplog.text.rstrip().endswith(": id") and str(out) in written
    with out.open(newline="") as file:
        kept = list(csv_format.DictReader(file))
    assert list(kept[0]) == ["input", "row", "label", "p(no)", "p(yes)"] and [r["row"] for r in kept] == [
        str(n + 1) for n in range(len(rows))
    ]
    right = sum(row["target"] == one["label"] for row, one in zip(rows, kept, strict=True))
    yes = sum(one["label"] == "yes" for one in kept)
    counts = f"{len(rows)} rows (no {len(rows) - yes}, yes {yes})"
    assert summary == f"{tmp_path / 't.csv'}: {counts}; accuracy {right / len(rows):.2%} of {len(rows)} rows"
    assert not list(tmp_path.glob(".*.tmp"))


def test_rows_without_a_class_or_with_another_one(run, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("a,b,t,target\n3,3,1700000050,yes\n3,3,1700000050,\n3,3,1700000050,maybe\n")
    assert main(["predict", str(run), str(tmp_path / "t.csv")]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith("% of 1 rows; classes that the run does not know: maybe")
    (tmp_path / "t.csv").write_text("a,b,t,target\n3,3,1700000050,?\n")
    assert main(["predict", str(run), str(tmp_path / "t.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 1); no row has a class")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,t,target\n1,2,yes\n", "has no column 'b'; accepted: the columns of "),
        ("x,y\n1,2\n", "has no column 'a', 'b', 't'; accepted: the columns of "),
        ("1.5,2,3\n1,2,3\n", "(its first line holds numbers; it must name the columns)"),
        ("a,a,b,t\n1,1,2,3\n", "columns 1 and 2 are both named 'a'"),
        ("a,b,t\n1,2,3\n1,,3\n", "row 2, column 'b': '' is no finite number (the cell is empty)"),
        ("a,b,t\n1e60,2,3\n", "row 1, column 'a': 1e+60; accepted: a number that float32 can hold"),
        ("a,b,t\n1,2\n", "row 1 has 2 values, the header 3"),
        ("a,b,t\n", "has no rows below its header"),
        ("a;b;x\n1;2;3\n", "has no column 'a', 'b', 't'"),
        (b"a,b,t\n\xff,1,1\n", "line 2 holds the byte 0xff"),
    ],
)
def test_tables_that_do_not_fit(run, tmp_path, capsys, content, said):
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = mistake(capsys, ["predict", str(run), str(tmp_path / "t.csv")])
    assert line.startswith("predict: ") and said in line


def test_places_that_cannot_be_written(run, tmp_path, capsys):
    table(tmp_path / "t.csv")
    before = (tmp_path / "t.csv").read_bytes()
    for out, said in (
        (tmp_path / "t.csv", "is an input as well"),
        (tmp_path / "none" / "x.csv", "accepted: a .csv file, in a folder that is there"),
        (run / "model.json", "accepted: a .csv file"),
        (tmp_path, "accepted: a .csv file"),
    ):
        assert said in mistake(capsys, ["predict", str(run), str(tmp_path / "t.csv"), "--out", str(out)])
    assert (tmp_path / "t.csv").read_bytes() == before


@pytest.mark.parametrize("of", ["earlier", "damaged", "other shape"])
def test_folders_that_do_not_say_which_columns(run, tmp_path, capsys, of):
    table(tmp_path / "t.csv")
    (run / "result.json").unlink()  # which has the hash of model.json
    described = json.loads((run / "model.json").read_text())
    if of == "earlier":
        del described["table"]
    elif of == "damaged":
        described["table"]["scale"][0] = 0
    else:
        for name in ("names", "offset", "scale"):
            described["table"][name].pop()
    (run / "model.json").write_text(json.dumps(described))
    line = mistake(capsys, ["predict", str(run), str(tmp_path / "t.csv")])
    assert "model.json" in line and ("names no columns (" if of == "earlier" else "damaged (table: ") in line


@pytest.mark.parametrize("wrong", [None, 3, "abc", [], {}, {"names": ["a"]}, {"names": 3, "offset": [0], "scale": [1]},
                                   {"names": ["a"], "offset": ["0"], "scale": [1]}])  # fmt: skip
def test_what_is_no_description_of_columns(wrong):
    with pytest.raises(ValueError, match=r"."):
        Columns.of(wrong)


def test_several_tasks(place, tmp_path, capsys):
    rows = "".join(f"{i % 5},{i % 7},{'ab'[i % 2]},{'xyz'[i % 3]}\n" for i in range(60))
    (place / "two.csv").write_text("u,v,kind,side\n" + rows)
    words = (
        "teacher=none",
        "student=heads",
        "model@student.net=mlp_teacher",
        "data=csv",
        f"data.path={place / 'two.csv'}",
    )
    plain = [word for word in LEARNED if not word.startswith("student=")]
    run = train(place, "tables_two", *plain, *words, "data.target=[kind,side]")
    (tmp_path / "t.csv").write_text("side,v,u\nx,1,2\ny,2,3\n")
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "t.csv"), "--out", str(tmp_path / "o.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and ", row 1: kind: " in lines[0] and ", row 1: side: " in lines[1]
    assert "t.csv: kind: 2 rows" in lines[4] and "accuracy" not in lines[4]
    assert "t.csv: side: 2 rows" in lines[5] and "accuracy" in lines[5]
    assert (tmp_path / "o.csv").read_text().splitlines()[0] == (
        "input,row,kind,p(kind=a),p(kind=b),side,p(side=x),p(side=y),p(side=z)"
    )


def test_names_from_a_table_are_no_formulas_and_control_no_terminal(place, tmp_path, capsys):
    rows = "".join(f"{i % 5},{i % 7},{('=1+1', chr(27) + '[31mb')[i % 2]}\n" for i in range(60))
    (place / "odd.csv").write_text("u,v,target\n" + rows)
    run = train(place, "tables_odd", *LEARNED, "data=csv", f"data.path={place / 'odd.csv'}")
    capsys.readouterr()
    assert main(["predict", str(run), str(place / "odd.csv"), "--out", str(tmp_path / "o.csv")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    written = (tmp_path / "o.csv").read_text()
    assert "\x1b" not in written and "'=1+1" in written and ",=1+1" not in written


def test_a_run_of_pictures_takes_no_table(place, tmp_path, capsys):
    run = train(place, "to_predict", "experiment=kd_resnet", "data.fraction=0.1", "teacher.data.fraction=0.1",
                "teacher.epochs=1", "epochs=1", "baseline=false", "resume=auto")  # fmt: skip
    table(tmp_path / "t.csv")
    assert "cannot be read as input of shape (1, 8, 8)" in mistake(
        capsys, ["predict", str(run), str(tmp_path / "t.csv")]
    )
    assert digits().columns is None


# ---- on the command line


def test_the_usual_mistakes_before_anything_is_written(place, put, tmp_path, capsys):
    words = [*QUIET, *LEARNED, "data=csv"]
    bad = put(HEAD + ROWS + "1,2,\n")
    assert "t.csv, row 61, column 'target': '' is no label" in mistake(
        capsys, [*words, f"data.path={bad}"], tmp_path / "o"
    )
    assert main(["check", *words, f"data.path={put((HEAD + ROWS).replace(',', chr(9)))}", "data.delimiter=\\t"]) == 0


def test_a_column_slices_a_run_of_several_labels(place, put, capsys):
    """The split is by both labels, whichever is asked for."""
    path = put(TWO, "slices.csv")
    words = ("data=csv", f"data.path={path}", "data.target=[kind,side]", "data.label=side", "data.test=0.3")
    run = train(place, "tables_slices", *LEARNED, *words)
    capsys.readouterr()
    assert main(["diagnose", str(run), "--no-pictures", "--slice", "side", "--slice", "kind"]) == 0
    found = json.loads((run / "diagnosis.json").read_text())
    sides = {row["value"]: row["examples"] for row in found["slices"]["side"]}
    assert sides == {name: found["targets"].count(n) for n, name in enumerate(found["classes"])}


def test_a_table_is_read_for_what_it_holds(put):
    held = read_table(put("a;b\n1;x\n\n2;y\n"), "key", wanted=["a", "b"])
    assert held.separator == ";" and held.cells("b") == ["x", "y"] and held.place(1).endswith("row 2 (line 4)")
    assert held.notes and read_table(put("a,b\n1,x\n"), "key").notes == ()
    with pytest.raises(UserError, match="line 3 is empty"):
        read_table(put("a\n1\n\n2\n"), "key")
