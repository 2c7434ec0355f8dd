"""Reading run folders, the tables made of them, and the ``compare`` verb, on made-up folders."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from helpers import fabricate
from helpers.paths import ROOT
from kdlab.cli.verbs.compare import main as compare_main
from kdlab.errors import UserError
from kdlab.report import table
from kdlab.report.compare import summary
from kdlab.report.compare.comparison import Comparison, columns_of, row
from kdlab.runs import read


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


# ---- read


def test_a_tree_a_sweep_and_a_run_are_found(tmp_path: Path) -> None:
    sweep = fabricate.sweep(tmp_path / "outputs/kd/sweep-1", temperatures=(1, 2), alphas=(0.5,))
    single = fabricate.write(tmp_path / "outputs/kd/2025", fabricate.result())
    assert [run.folder for run in read.load([single])] == [single]
    assert [run.folder for run in read.load([single / "result.json"])] == [single]
    assert len(read.load([sweep])) == 2
    assert len(read.load([tmp_path / "outputs"])) == 3
    # Overlapping paths show no run twice.
    assert len(read.load([tmp_path / "outputs", sweep, single])) == 3


def test_stores_are_no_runs_unless_pointed_at(tmp_path: Path) -> None:
    fabricate.write(tmp_path / "kd/run", fabricate.result())
    teacher = fabricate.write(tmp_path / "teachers/resnet20-1", fabricate.result())
    fabricate.write(tmp_path / "baselines/resnet8-1", fabricate.result())
    assert [run.label for run in read.load([tmp_path])] == ["run"]
    assert [run.folder for run in read.load([tmp_path / "teachers"])] == [teacher]


def test_unfinished_and_damaged_folders_are_noted(tmp_path: Path) -> None:
    good = fabricate.write(tmp_path / "good", fabricate.result())
    torn = fabricate.write(tmp_path / "torn", fabricate.result())
    (torn / "result.json").write_text((good / "result.json").read_text()[:200])
    for name, content in (("list", "[1, 2]"), ("deep", "[" * 100_000), ("binary", "\xff\x00")):
        fabricate.write(tmp_path / name, {})
        (tmp_path / name / "result.json").write_bytes(content.encode("latin-1"))
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "config.yaml").write_text("seed: 0\n")
    found = read.scan([tmp_path])
    assert [run.folder for run in found.runs] == [good]
    assert found.unfinished == [killed]
    assert len(found.warnings) == 4
    assert all("\n" not in warning and "left out" in warning for warning in found.warnings)


def test_nothing_to_read_is_an_error_that_names_what_is_near(tmp_path: Path) -> None:
    fabricate.write(tmp_path / "kd_resnet/run", fabricate.result())
    with pytest.raises(UserError, match=r"kd_resnt.*nearest: .*kd_resnet"):
        read.load([tmp_path / "kd_resnt"])
    (tmp_path / "empty/killed").mkdir(parents=True)
    (tmp_path / "empty/killed/config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"no result\.json under .*empty; 1 unfinished, as .*killed"):
        read.load([tmp_path / "empty"])


def test_values_of_the_wrong_kind_read_as_missing(tmp_path: Path) -> None:
    odd = {
        "status": "finished",
        "config_hash": "0a1b",
        "models": {"student": {"test": {"acc": "high"}, "parameters": True}, "teacher": None},
    }
    run = read.load([fabricate.write(tmp_path / "odd", odd | {"seconds": 4})])[0]
    assert run.number("student", "test", "acc") is None and run.number("student", "parameters") is None
    assert list(run.models) == ["student"] and run.config == {} and run.curves == {}
    assert "student" in table.run_table(run.result, run.folder)
    assert "1 run" in summary.sweep_table(tmp_path)
    for entry, value in {"models": [1], "settings": [1], "config_hash": 3, "seconds": "long", "score": {}}.items():
        fabricate.write(tmp_path / "worse", fabricate.result(**{entry: value}))
        assert f"{entry} is {type(value).__name__}" in read.scan([tmp_path]).warnings[0]


def test_curves_survive_a_torn_line_and_a_resumed_run(tmp_path: Path) -> None:
    points = [{"step": 10, "train/kl": 3.0}, {"step": 20, "train/kl": 2.0}, {"step": 20, "train/kl": 1.5}]
    folder = fabricate.write(tmp_path / "run", fabricate.result(), points)
    with (folder / "curves.jsonl").open("a") as file:
        file.write('{"step": 5, "train/kl": NaN, "val/acc": 0.5}\n{"step": 30, "train/k')
        file.write("\n" + "[" * 1_000_000 + '\n[1]\n{"kl": 1}\n')
    run = read.load([folder])[0]
    assert run.curves == {"train/kl": ([10, 20], [3.0, 1.5]), "val/acc": ([5], [0.5])}
    assert run.warnings == [f"{folder / 'curves.jsonl'}: 4 lines hold no point of a curve, left out"]


# ---- seeds and ranks


def test_seeds_are_one_row_with_mean_and_sample_deviation(tmp_path: Path) -> None:
    found = read.scan([fabricate.sweep(tmp_path, temperatures=(1, 4), alphas=(0.5, 0.9), seeds=3)])
    comparison = Comparison.of(found)
    assert len(comparison.groups) == 4 and comparison.differs == [read.TEMPERATURE, read.ALPHA]
    best = comparison.groups[0]
    values = [run.number("student", "val", "acc") for run in best.runs]
    stat = best.stat(comparison.measures["val"].get)
    assert stat is not None and stat.n == 3
    assert stat.mean == pytest.approx(statistics.mean(values))
    assert stat.std == pytest.approx(statistics.stdev(values))
    shown = row(best, comparison, ["val", "parameters"])
    assert shown["val"] == f"{100 * stat.mean:.2f} ± {100 * stat.std:.2f}" and shown["parameters"] == "5,082"
    assert len(Comparison.of(found, each=True).groups) == 12


def test_rank_is_by_validation_whatever_the_test_says(tmp_path: Path) -> None:
    for name, temperature, val, test in (("a", 1, 0.90, 0.99), ("b", 2, 0.95, 0.80), ("c", 4, None, 0.999)):
        content = fabricate.result(temperature)
        content["models"]["student"]["val"]["acc"], content["models"]["student"]["test"]["acc"] = val, test
        fabricate.write(tmp_path / name, content)
    comparison = Comparison.of(read.scan([tmp_path]))
    assert [(one.runs[0].label, one.rank) for one in comparison.groups] == [("b", 1), ("a", 2), ("c", None)]
    text = summary.sweep_table(tmp_path)
    assert "Ranked on validation; the test split is shown, and chooses nothing." in text


def test_a_repeat_is_no_sample_and_an_unlisted_difference_is_no_seed(tmp_path: Path) -> None:
    again = {"config_hash": "same", "settings": fabricate.result()["settings"]}
    fabricate.write(tmp_path / "first", fabricate.result(**again, finished="2025-01-01"))
    fabricate.write(tmp_path / "second", fabricate.result(**again, finished="2025-01-02"))
    comparison = Comparison.of(read.scan([tmp_path]))
    assert [[run.label for run in one.runs] for one in comparison.groups] == [["second"]]
    assert [run.label for run in comparison.repeats] == ["first"]
    fabricate.write(tmp_path / "other", fabricate.result(**again | {"config_hash": "another"}))
    comparison = Comparison.of(read.scan([tmp_path]))
    assert sorted(run.label for one in comparison.groups for run in one.runs) == ["other", "second"]
    assert all(len(one.runs) == 1 for one in comparison.groups)
    assert "other" in summary.sweep_table(tmp_path) and "second" in summary.sweep_table(tmp_path)


def test_four_and_four_point_nought_are_one_setting(tmp_path: Path) -> None:
    fabricate.write(tmp_path / "a", fabricate.result(4, seed=0))
    fabricate.write(tmp_path / "b", fabricate.result(4.0, seed=1))
    assert len(Comparison.of(read.scan([tmp_path])).groups) == 1


# ---- tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.0, "4"),
        ({"start": 8, "end": 1, "shape": "cosine"}, "8→1 cosine"),
        ({"_target_": "kdlab.losses.LearnedTemperature", "low": 1.0}, "LearnedTemperature(low: 1)"),
        (["hinton", "fitnets"], "[hinton, fitnets]"),
        (None, "none"),
        (True, "true"),
    ],
)
def test_settings_read_as_a_person_writes_them(value: object, text: str) -> None:
    assert read.setting(value) == text


def test_numbers_stand_right_and_only_text_is_shortened() -> None:
    columns = [table.Column("name", "name", right=False), table.Column("n", "count")]
    rows = [{"name": "a" * 60, "n": "12,345"}, {"name": "日本", "n": None}]
    text = table.render(rows, columns, width=40).splitlines()
    assert text[2].endswith("…  12,345") and len(text[2]) == 40
    assert text[3] == "日本" + " " * 28 + " " * 7 + "–"  # two cells for each of its characters
    assert table.render([], columns).splitlines()[0] == "name  count"


def test_control_characters_never_reach_the_terminal() -> None:
    assert table.render([{"a": "x\x1b[31m\ny\u202ez\x07"}], [table.Column("a", "a")]).count("\x1b") == 0


def test_a_poor_encoding_spells_signs_out() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    table.show("97.1 ± 0.2  53× – 日", stream)
    stream.flush()
    assert raw.getvalue().decode() == "97.1 +/- 0.2  53x - ?\n"


def test_the_table_that_ends_a_run() -> None:
    content = fabricate.result()
    content["models"]["student"]["test"]["acc"] = 0.9800
    content["models"]["ensemble"] = fabricate.model(10_164, 0.98, 0.985)
    text = table.run_table(content, "outputs/kd_resnet/one", bold=False)
    heads = lines_of(text)
    assert [line.split()[0] for line in heads[2:6]] == ["teacher", "student", "baseline", "ensemble"]
    assert "272,474" in heads[2] and "1.1 MB" in heads[2] and "98.89" in heads[2] and "100.0" in heads[2]
    assert f"{100 * 0.98 / 0.9889:.1f}" in heads[3]
    assert "student − baseline: +0.56 points on test" in text
    assert "54× fewer parameters" in text
    assert "teacher trained on: 1200 labelled rows of digits" in text
    assert heads[-2:] == [
        "run folder: outputs/kd_resnet/one",
        "compare: python -m kdlab compare outputs/kd_resnet",
    ]
    assert "\x1b" not in text and "\x1b[1mstudent" in table.run_table(content, bold=True)
    assert max(map(len, heads)) <= 100


def test_the_table_says_whose_errors_the_student_makes(tmp_path: Path) -> None:
    content = fabricate.result()
    errors = {"split": "test", "examples": 360, "inherited": 4, "own": 3, "other": 2, "corrected": 2}
    content["models"]["student"]["errors"] = errors
    text = table.run_table(content, tmp_path)
    said = "errors of the student on test: 9 of 360; 4 inherited from the teacher (the same wrong class), 3 its own, 2 "
    assert said + "other; 2 corrected\n" in text and "diagnosis: " not in text
    content["models"]["baseline"]["errors"] = {**errors, "inherited": 1}
    (tmp_path / "diagnosis.html").touch()
    text = table.run_table(content, tmp_path)
    assert said + "other; 2 corrected; the baseline, which learned without it, shares 1\n" in text
    assert f"\ndiagnosis: {tmp_path}/diagnosis.html\n" in text
    for damaged in ({**errors, "own": "many"}, ["odd"], {"split": "test"}):
        content["models"]["student"]["errors"] = damaged
        assert "errors of" not in table.run_table(content)


def test_the_table_of_a_run_without_teacher_baseline_or_test() -> None:
    content = fabricate.result()
    content["models"] = {
        "student": content["models"]["student"] | {"test": None},
        "teacher": None,
        "baseline": None,
    }
    content["teacher_trained_on"] = None
    text = table.run_table(content)
    assert "val acc %" in text and "of teacher" not in text and "baseline" not in text and "None" not in text


# ---- the verb


def run_main(*arguments: object) -> int:
    return compare_main([str(argument) for argument in arguments])


def test_compare_prints_what_differs_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fabricate.sweep(tmp_path, temperatures=(1, 4), alphas=(0.1, 0.9))
    fabricate.failed(tmp_path / "bad", error="loss is not finite at step 40")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/config.yaml").write_text("a: 1")
    assert run_main(tmp_path) == 0
    text = capsys.readouterr().out
    heads = lines_of(text)[1].split("  ")
    assert [part.strip() for part in heads if part.strip()][:3] == ["#", "T", "alpha"]
    assert "optimizer.lr" not in text and "kd_resnet · digits · resnet20 → resnet8_w4 · 4 runs" in text
    assert "1 failed:" in text and "bad: loss is not finite at step 40" in text and "1 unfinished" in text
    names = {path.name for path in (tmp_path / "compare").iterdir()}
    assert names == {"index.html", "runs.csv", "heat_map.png", "curves.png", "size.png", "gain.png"}
    # What it wrote is no run: asked again, it finds the same.
    assert run_main(tmp_path, "--no-pictures") == 0
    assert "4 runs" in capsys.readouterr().out


def test_the_page_links_what_runs_have_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, temperature in (("a run & <b>", 1), ("other", 4)):
        content = fabricate.result(temperature=temperature)
        errors = {"split": "test", "examples": 360, "inherited": 4, "own": 3, "other": 2, "corrected": 2}
        content["models"]["student"]["errors"] = errors
        fabricate.write(tmp_path / "runs" / name, content)
    (tmp_path / "runs/a run & <b>/diagnosis.html").write_text("here")
    for out in (tmp_path / "runs/compare", tmp_path / "else/where"):
        assert run_main(tmp_path / "runs", "--out", out) == 0
        html = (out / "index.html").read_text()
        (link,) = re.findall(r'<a href="([^"]*)">(.*?)</a>(.*?)</li>', html)
        assert (out / unquote(link[0])).read_text() == "here" and "://" not in link[0]
        assert link[1] == "T=1 (a run &amp; &lt;b&gt;)" and "9 errors, 4 inherited from the teacher" in link[2]
    assert run_main(tmp_path / "runs/other") == 0
    assert "href" not in (tmp_path / "runs/other/compare/index.html").read_text()
    capsys.readouterr()
    assert run_main(tmp_path / "runs", "--no-pictures") == 0
    assert "inherited" not in capsys.readouterr().out  # a column only where it is asked for
    assert run_main(tmp_path / "runs", "--no-pictures", "--columns", "inherited,own_errors") == 0
    assert "inherited errors" in capsys.readouterr().out


def test_the_csv_holds_every_run_and_every_number(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path / "runs", temperatures=(1, {"start": 8, "end": 1}), alphas=(0.9,), seeds=2)
    fabricate.failed(tmp_path / "runs/bad")
    target = tmp_path / "deep/er/all.csv"
    assert run_main(tmp_path / "runs", "--no-pictures", "--csv", target) == 0
    with target.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and {row["status"] for row in rows} == {"finished", "failed"}
    row = next(row for row in rows if row["status"] == "finished")
    content = json.loads((Path(row["run"]) / "result.json").read_text())
    assert float(row["models.student.test.acc"]) == content["models"]["student"]["test"]["acc"]
    assert row["versions.torch"] == "2.13.0" and row["seconds.total"] == "24.5"
    assert {row["settings.loss.temperature"] for row in rows} >= {"1", '{"start": 8, "end": 1}'}
    assert not (tmp_path / "runs/compare").exists()


def test_columns_and_order_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fabricate.sweep(tmp_path, temperatures=(8, 1, 4), alphas=(0.9,))
    run_main(tmp_path, "--no-pictures", "--sort", "loss.temperature", "--columns", "loss.temperature,val,ece")
    shown = lines_of(capsys.readouterr().out)
    assert shown[1].split() == ["#", "T", "val", "acc", "%", "test", "ECE"]
    assert [line.split()[1] for line in shown[3:6]] == ["1", "4", "8"]
    assert shown[4].split()[0] == "1"  # the rank stays that of validation
    run_main(tmp_path, "--no-pictures", "--sort=-val", "--columns", "loss.temperature,val")
    shown = lines_of(capsys.readouterr().out)
    assert [line.split()[0] for line in shown[3:6]] == ["3", "2", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sort", "vall"], "sort: unknown column 'vall'; nearest: val"),
        (["--columns", "val,tset"], "columns: unknown column 'tset'; nearest: test"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--out", "{file}/x"], "cannot write to"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = fabricate.write(tmp_path / "run", fabricate.result())
    file = folder / "result.json"
    with pytest.raises(UserError) as caught:
        run_main(folder, *[argument.format(file=file) for argument in arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="PATH"):
        compare_main([])


def test_a_sweep_of_failures_alone_still_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fabricate.failed(tmp_path / "one", error="term kl")
    assert "1 failed:" in summary.sweep_table(tmp_path) and "term kl" in summary.sweep_table(tmp_path)
    assert run_main(tmp_path) == 0
    assert "No run has finished." in (tmp_path / "compare/index.html").read_text()
    assert "no result.json" in summary.sweep_table(tmp_path / "compare")


def test_a_setting_that_only_failed_runs_changed_is_a_column(tmp_path: Path) -> None:
    for seed in (0, 1):
        fabricate.write(tmp_path / f"good{seed}", fabricate.result(seed=seed))
        content = fabricate.result(seed=seed) | {"status": "failed", "error": "not finite", "models": {}}
        content["settings"] |= {"optimizer.lr": 1e30, "only.here": 1}
        fabricate.write(tmp_path / f"bad{seed}", content)
    comparison = Comparison.of(read.scan([tmp_path]))
    assert comparison.differs == ["optimizer.lr"]
    assert columns_of(comparison)[:2] == ["optimizer.lr", "n"]


def test_the_table_needs_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path, temperatures=(1, 4), alphas=(0.5,))
    code = (
        "import sys\nfrom kdlab.cli.verbs.compare import main\n"
        "from kdlab.report import table\nfrom kdlab.runs import read\n"
        f"main([{str(tmp_path)!r}, '--no-pictures'])\n"
        "heavy = {'torch', 'matplotlib', 'numpy', 'lightning', 'hydra', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 runs" in done.stdout and "\x1b" not in done.stdout
