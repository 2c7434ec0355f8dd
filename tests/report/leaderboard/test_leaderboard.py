"""Leaderboards: the statistics, the choice of settings, and a small board from its file to its table."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from helpers.fabricate import model, result
from helpers.paths import CONF
from helpers.tiny import mistake, write_cifar
from kdlab.cli.main import main
from kdlab.cli.start import preflight
from kdlab.cli.verbs.leaderboard import composed
from kdlab.errors import UserError
from kdlab.report.leaderboard.leaderboard import Board, Entry, Results, paired, t_quantile
from kdlab.runs.read import Run

BOARDS = CONF / "leaderboard"


@pytest.mark.parametrize(
    ("p", "freedom", "known"),  # from the printed tables
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.995, 4, 4.604), (0.9995, 4, 8.610), (0.975, 29, 2.045), (0.9, 9, 1.383)],
)
def test_quantiles_are_those_of_the_tables(p, freedom, known):
    assert t_quantile(p, freedom) == pytest.approx(known, abs=6e-4)


def test_the_interval_of_pairs_is_students():
    pairs = [0.02, 0.01, 0.03, 0.00, 0.04]
    found = paired(pairs, 0.95)
    assert found.mean == pytest.approx(0.02) and found.excludes_zero
    assert found.half == pytest.approx(2.7764 * statistics.stdev(pairs) / math.sqrt(5), rel=1e-4)
    assert not paired([-0.01, 0.02, 0.01], 0.95).excludes_zero
    assert paired([0.5], 0.95).half is None and not paired([0.5], 0.95).excludes_zero and paired([], 0.95) is None


def test_the_corrected_interval_covers_all_rows_at_once():
    """Twenty methods that are no better than the reference: one false alarm in twenty boards, not one a board."""
    draw = random.Random(0)
    alarms = [
        any(paired([draw.gauss(0, 1) for _ in range(5)], 1 - 0.05 / 20).excludes_zero for _ in range(20))
        for _ in range(400)
    ]
    assert 0.01 < statistics.fmean(alarms) < 0.10


BOARD = {
    "reference": "hinton",
    "relative_to": "ce",
    "seeds": [0, 1, 2],
    "shared": ["experiment=kd_resnet"],
    "each": ["seed={seed}", "data.split_seed={seed}"],
    "rows": {"ce": ["loss=ce"], "hinton": ["loss=hinton"], "dkd": ["loss=dkd"]},
    "grids": {"hinton": {"loss.temperature": [1, 4], "loss.alpha": [0.5]}},
}


def run_of(entry: Entry, seed: int, val: float, test: float) -> Run:
    return Run(Path(entry.row), result(seed=seed, models={"student": model(10, val, test, agreement=0.9)}))


def results(scores: dict[tuple[str, str], tuple[float, float]], spread: float = 0.001) -> Results:
    """A board whose runs have the given validation and test scores, by row and setting."""
    board = Board("mine", **BOARD)
    runs = {}
    for entry in board.entries():
        val, test = scores[entry.row, entry.setting]
        for seed in board.seeds:
            runs[entry, seed] = run_of(entry, seed, val, test + spread * seed)
    return Results.of(board, runs, {"ce": 1.0, "hinton": 1.05, "dkd": 1.1})


def test_a_board_lists_every_setting_and_fills_in_the_seed():
    entries = list(Board("mine", **BOARD).entries())
    assert [(entry.row, entry.setting) for entry in entries] == [
        ("ce", ""),
        ("hinton", "loss.temperature=1 loss.alpha=0.5"),
        ("hinton", "loss.temperature=4 loss.alpha=0.5"),
        ("dkd", ""),
    ]
    assert Board("mine", **BOARD).overrides(entries[2], 7) == [
        *("experiment=kd_resnet", "seed=7", "data.split_seed=7"),
        *("loss=hinton", "loss.temperature=4", "loss.alpha=0.5"),
    ]
    some = Board("mine", **BOARD).only(["ce"], [3])
    assert list(some.rows) == ["ce", "hinton"] and some.seeds == [3]  # the reference stays


def test_settings_are_chosen_on_validation_and_never_on_the_test():
    scores = {
        ("ce", ""): (0.80, 0.80),
        ("hinton", "loss.temperature=1 loss.alpha=0.5"): (0.85, 0.99),
        ("hinton", "loss.temperature=4 loss.alpha=0.5"): (0.90, 0.82),
        ("dkd", ""): (0.88, 0.83),
    }
    found = results(scores)
    assert [one.row for one in found.standings] == ["hinton", "dkd", "ce"]
    assert found.reference.setting == "loss.temperature=4 loss.alpha=0.5"
    gap = found.difference(found.standings[1])
    assert gap.mean == pytest.approx(0.01) and found.compared == 2 and found.difference(found.reference) is None
    cells = {row["row"].split()[0]: row for row in found.rows()}
    assert cells["dkd"]["difference"] == "+1.00 ± 0.00 better" and cells["dkd"]["n"] == "3"
    assert cells["ce"]["difference"].endswith("worse") and cells["ce"]["time"] == "1"
    assert cells["hinton"]["difference"] is None and cells["hinton"]["test"].startswith("82.10 ± ")
    text = found.markdown()
    assert "| hinton (loss.temperature=4 loss.alpha=0.5) |" in text and "Bonferroni" in text
    record = json.loads(json.dumps(found.record()))
    assert record["rows"][1]["difference"]["mean"] == pytest.approx(0.01) and record["reference"] == "hinton"


def test_a_failed_run_is_left_out_and_said():
    board = Board("mine", **BOARD)
    runs = {(entry, seed): run_of(entry, seed, 0.8, 0.8) for entry in board.entries() for seed in board.seeds}
    last = list(board.entries())[-1]
    runs[last, 2] = Run(Path("x"), {"status": "failed", "error": "out of luck", "seed": 2})
    found = Results.of(board, runs, {})
    dkd = next(one for one in found.standings if one.row == "dkd")
    assert len(dkd.runs) == 2 and found.difference(dkd).mean == 0
    assert any("1 run failed: out of luck" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": "hintn"}, "leaderboard.reference: unknown row 'hintn'; nearest: hinton"),
        ({"grids": {"kd": {}}}, "leaderboard.grids: unknown row 'kd'"),
        ({"seeds": []}, "leaderboard.seeds: none"),
    ],
)
def test_a_board_that_cannot_be_is_refused(change, said):
    with pytest.raises(UserError, match="^" + said.replace(".", r"\.")):
        Board("mine", **{**BOARD, **change})


SMALL = """\
# a board of two methods
reference: hinton
relative_to: ce
seeds: [0, 1]
shared:
  - experiment=kd_resnet
  - student=mlp
  - teacher=mlp
  - teacher.epochs=1
  - epochs=1
  - baseline=false
  - trainer=cpu
  - trainer.progress=none
  - logger=none
each: ['seed={seed}', 'data.split_seed={seed}']
rows:
  ce: [loss=ce]
  hinton: [loss=hinton]
grids:
  hinton: {loss.temperature: [2, 4]}
"""


def test_a_small_board_from_its_file_to_its_table(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "leaderboard").mkdir(parents=True)
    (tmp_path / "conf" / "leaderboard" / "mine.yaml").write_text(SMALL)
    assert main(["leaderboard"]) == 0
    assert "mine        a board of two methods" in capsys.readouterr().out
    assert "no finished run" in mistake(capsys, ["leaderboard", "mine", "--show", f"output={tmp_path / 'none'}"])
    words = ["leaderboard", "mine", f"output={tmp_path / 'out'}"]
    assert main([*words, "--time", "1"]) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "out" / "leaderboard" / "mine"
    assert "[6/6] hinton loss.temperature=4 seed=1" in shown and "step time" in shown
    assert len(list(folder.glob("*/*/result.json"))) == 6
    record = json.loads((folder / "leaderboard.json").read_text())
    assert {row["row"] for row in record["rows"]} == {"ce", "hinton"} and record["seeds"] == [0, 1]
    assert all(row["step_time"] > 0 and row["test_acc"]["n"] == 2 for row in record["rows"])
    assert (folder / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    assert main(words) == 0  # nothing is run twice
    again = capsys.readouterr().out
    assert again.count("done already") == 6 and "step time" in again


@pytest.mark.parametrize("name", sorted(path.stem for path in BOARDS.glob("*.yaml")))
def test_every_row_of_every_board_can_run(name, tmp_path, monkeypatch):
    """Composed, bound and built as it would be before its first step; nothing is trained."""
    found = Board.read(BOARDS / f"{name}.yaml")
    more = [f"data.root={write_cifar(tmp_path, monkeypatch)}", "data.val=20"] if name.startswith("cifar") else []
    if name.startswith("cifar"):
        more.append("data.fraction=null")
    rows = Board(name, found.rows, found.reference, found.relative_to, found.shared, [0], found.each)
    with composed(rows, [*more, f"output={tmp_path}"]) as (points, _):
        assert {entry.row for entry, _ in points} == set(found.rows)
        for point in points.values():
            preflight([point])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["leaderboard", "digts"], "leaderboard: unknown board 'digts'; nearest: digits"),
        (["leaderboard", "digits", "--rows", "hintn"], "rows: unknown row 'hintn'; nearest: hinton"),
        (["leaderboard", "digits", "--seeds", "a"], "--seeds: 'a'; accepted: whole numbers"),
        (["leaderboard", "digits", "--jobs", "0"], "--jobs: 0; accepted: at least 1"),
        (["leaderboard", "digits", "--rows", "ce", "--seeds", "0", "epochs=0"], "digits, ce: epochs: 0"),
        (["leaderboard", "digits", "--rows", "ce", "--seeds", "0", "epoch=1"], "digits, ce: epoch: unknown key"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, words, said):
    text = mistake(capsys, words, None if "--rows" not in words else tmp_path / "out")
    assert text.startswith(said), text
