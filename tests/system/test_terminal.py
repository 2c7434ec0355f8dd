"""What is printed controls no terminal, and what is written for a spreadsheet computes nothing."""

import csv
import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers import fabricate
from helpers.tiny import MLP, QUIET, train
from kdlab.cli.console import log_shown
from kdlab.cli.main import main
from kdlab.report import table
from kdlab.runs.loggers import csv as csv_logger
from kdlab.runs.spreadsheet import cell, write_csv
from kdlab.system.terminal import LineFormatter, say

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31mred\x00\u202e\ud800"
"""Escapes of both kinds, line ends, a direction mark and half a character."""


def clean(text: str) -> bool:
    """Whether a text holds nothing that a terminal acts on, but for line breaks."""
    return all(sign in "\n\u00a0" or (sign.isprintable() and sign not in "\u202e\x9b\x1b") for sign in text)


FORMULAS = (
    *('=HYPERLINK("http://x")', "+1+cmd|' /C calc'!A0", "@SUM(1)", "-2+3+cmd", "\t=1", "\r=1", "\n=1", " =1", '"=1"'),
    *("'=1", "\u00a0=1", "＝1", "- 1", "-2.5.1", "+", "-1e3x", "=1\x1b[0m", "\x00=1", "\ufeff=1"),
)
PLAIN = (
    "-2.5",
    "1e-3",
    "+4",
    "-.5",
    "-1E+5",
    "inf",
    "-inf",
    "nan",
    "kl",
    "8→1 cosine",
    "[hinton, fitnets]",
    "a=b",
    "",
    "1-2",
)


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_a_text_in_a_spreadsheet(text, tmp_path):
    assert str(cell(text)).lstrip(" ").startswith("'")
    write_csv(tmp_path / "a.csv", [text], [{text: text}])
    content = (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert clean(content.replace("\r\n", "\n").replace("\t", ""))
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert [row[0][0] for row in csv.reader(file)] == ["'", "'"]


@pytest.mark.parametrize("text", PLAIN)
def test_numbers_and_words_stay_as_they_are(text):
    assert cell(text) == text


def test_numbers_stay_numbers_and_separators_split_no_cell():
    assert [cell(value) for value in (-2.5, 3, True, None, 1e-3)] == [-2.5, 3, True, "", 1e-3]
    assert cell("a;=1") == "a;'=1" and cell("a\n+1") == "a\n'+1" and cell("a; b") == "a; b"


def test_the_csv_of_curves_names_no_formula(tmp_path):
    logger = csv_logger(tmp_path, "x")
    logger.log_metrics({"=cmd": 1.0, "train/kl": -2.0}, 1)
    logger.save()
    lines = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert "'=cmd" in lines[0] and ",=cmd" not in lines[0] and "-2.0" in lines[1]


def test_say_keeps_bold_type_and_nothing_else_that_a_terminal_acts_on():
    stream = io.StringIO()
    say(f"\x1b[1mbold\x1b[0m {HOSTILE}", file=stream)
    assert stream.getvalue().startswith("\x1b[1mbold\x1b[0m ]0;owned")
    assert clean(stream.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", ""))
    table.show(HOSTILE, stream := io.StringIO())
    assert clean(stream.getvalue())


def test_a_log_record_is_one_line_and_its_traceback_is_clean():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("test of lines")
    logger.propagate = False
    logger.addHandler(handler)
    logger.warning("name: %s  end", f"a{HOSTILE}b")
    assert stream.getvalue().count("\n") == 1 and clean(stream.getvalue()) and "  end" in stream.getvalue()
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("it failed")
    assert clean(stream.getvalue()) and "Traceback" in stream.getvalue()


def test_compare_prints_and_writes_hostile_settings_as_texts(tmp_path, capsys):
    whole = fabricate.result()
    bad = {"name": f"n{HOSTILE}", "error": f"=1{HOSTILE}", "commit": HOSTILE, "teacher_trained_on": HOSTILE}
    settings = {**whole["settings"], f"=k{HOSTILE}": "=HYPERLINK()", "student": f"@SUM(1){HOSTILE}"}
    run = fabricate.write(tmp_path / "a", whole)
    (run / "result.json").write_text(json.dumps({**whole, **bad, "settings": settings}))
    fabricate.write(tmp_path / "b", fabricate.result(2.0))
    fabricate.write(tmp_path / "c", fabricate.result(1.0) | {"status": "failed", "error": f"-2+3{HOSTILE}"})
    (tmp_path / "b" / "curves.jsonl").write_text(HOSTILE, encoding="utf-8", errors="replace")
    assert main(["compare", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert clean(said.out) and clean(said.err) and "owned" in said.out
    content = (tmp_path / "compare" / "runs.csv").read_bytes().decode()
    assert clean(content.replace("\r\n", "\n"))
    for row in csv.reader(io.StringIO(content)):
        assert not any(one[:1] in "=@+" for one in row if one), row
        assert all(one[:1] != "-" or float(one) is not None for one in row), row
    page = (tmp_path / "compare" / "index.html").read_text(encoding="utf-8")
    assert "\x1b" not in page and "\u202e" not in page


def test_predict_prints_hostile_names_clean(place, tmp_path, capsys):
    found = train(place, "strange", *QUIET, *MLP, "epochs=1", "baseline=false", "resume=auto")
    run = Path(shutil.copytree(found, tmp_path / "run"))
    (run / "result.json").unlink()  # it holds the hash of the description
    described = json.loads((run / "model.json").read_text())
    described["classes"][:] = [f"{n}{HOSTILE}" for n in range(10)]
    (run / "model.json").write_text(json.dumps(described))
    name = "a\x1b]0;owned\x07\x9b31m\nb.npy"
    np.save(tmp_path / name, np.zeros((2, 8, 8), np.float32))
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / name)]) == 0
    said = capsys.readouterr()
    assert clean(said.out) and said.out.count("\n") == 2 and "owned" in said.out and not said.err


@pytest.mark.parametrize("words", [["student=\x1b[2J"], ["=\x1b[2J"], ["loss.terms.\x1b[2J=1"], ["name=\x1b[2J\n"]])
def test_overrides_are_repeated_clean(words, capsys):
    assert main(["experiment=kd_mlp", *words, "--cfg", "job"]) in (0, 2)
    said = capsys.readouterr()
    assert clean(said.out) and clean(said.err)
    assert main([f"{HOSTILE}", "x"]) == 2
    assert clean(capsys.readouterr().err)


def test_verbs_that_show_the_log_print_hostile_names_clean(capsys):
    with log_shown():
        logging.getLogger("kdlab").info("data: %s", f"a{HOSTILE}")
    shown = capsys.readouterr().err
    assert shown.startswith("data: a") and shown.count("\n") == 1 and clean(shown)
