"""Where less is better: selection, search, tables and pictures of language models, on made-up results."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import fabricate
from kdlab.cli.verbs.compare import main as compare_main
from kdlab.report import table
from kdlab.report.compare import page, pictures, summary
from kdlab.report.compare.comparison import Comparison, alike, columns_of, ordered, row
from kdlab.report.compare.curve_pictures import kl_and_ce
from kdlab.report.compare.step_pictures import match_by_steps
from kdlab.report.drawing import labels
from kdlab.runs import read
from kdlab.runs.formatting import decimal
from kdlab.runs.measures import SCORES, gap_closed, score_of

BLUE, VERMILION = (0.0, 0x72 / 255, 0xB2 / 255, 1.0), (0xD5 / 255, 0x5E / 255, 0.0, 1.0)


def comparison_of(folder: Path) -> Comparison:
    return Comparison.of(read.scan([folder]))


def run_with(**scores: tuple[float, float, float]) -> read.Run:
    """A run whose student, teacher and baseline have these test scores."""
    roles = ("student", "teacher", "baseline")
    models = {role: {"test": {key: values[i] for key, values in scores.items()}} for i, role in enumerate(roles)}
    return read.Run(Path("run"), {"status": "finished", "models": models, "score": {"name": "ppl", "greater": False}})


# ---- the best epoch


def judged(tmp_path: Path, epochs: list[dict[str, float]], **settings: Any) -> Any:
    """A Saver that was shown these validation measures, epoch by epoch, until it stops."""
    from kdlab.training.checkpoints import Saver

    saver = Saver(tmp_path, **settings)
    for epoch, measures in enumerate(epochs):
        trainer = SimpleNamespace(current_epoch=epoch, global_step=epoch, is_global_zero=False, should_stop=False)
        saver._judge(trainer, None, measures)
        if trainer.should_stop:
            break
    return saver


def test_the_best_epoch_has_the_least_perplexity(tmp_path: Path) -> None:
    epochs = [{"ppl": p, "ce": math.log(p)} for p in (9.0, 5.0, 7.0, 6.0)]
    saver = judged(tmp_path, epochs, score="ppl", greater=False)
    assert saver.best_epoch == 1 and saver.best_measures["ppl"] == 5.0
    again = type(saver)(tmp_path, "ppl", greater=False)
    again.load_state_dict(saver.state_dict())
    assert again.best == saver.best and again.best_epoch == 1
    assert judged(tmp_path, epochs, score="ppl").best_epoch == 0  # as if more were better


@pytest.mark.parametrize(("greater", "better"), [(False, 0.2), (True, 0.9)])
def test_ties_go_to_the_lower_cross_entropy_then_to_the_earlier_epoch(
    tmp_path: Path, greater: bool, better: float
) -> None:
    measured = [(0.5, 1.0), (better, 2.0), (better, 1.5), (better, 1.5), (better, 1.6)]
    epochs = [{"wer": score, "ce": ce} for score, ce in measured]
    assert judged(tmp_path, epochs, score="wer", greater=greater).best_epoch == 2


def test_patience_counts_epochs_without_less_perplexity(tmp_path: Path) -> None:
    epochs = [{"ppl": p, "ce": 1.0} for p in (9.0, 5.0, 7.0, 6.0, 1.0)]
    saver = judged(tmp_path, epochs, score="ppl", greater=False, patience=2)
    assert saver.stopped and saver.best_epoch == 1


# ---- the search


class Launcher:
    """Runs jobs as a sweep does: each leaves a result, and returns its objective; a negative one fails."""

    def __init__(self, folder: Path, greater: bool | None) -> None:
        self.folder, self.greater, self.asked = folder, greater, list[float]()

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list[Any]:
        from hydra.core.utils import JobReturn, JobStatus

        found = []
        for words in jobs:
            x = float(words[-1].partition("=")[2])
            self.asked.append(x)
            failed = x < 0
            score = {} if self.greater is None else {"score": {"name": "any", "greater": self.greater}}
            result = (
                {"status": "failed"}
                if failed
                else {"status": "finished", "config_hash": "", "models": {}, "seconds": {}, **score}
            )
            job = self.folder / f"x={x:.6g}"
            job.mkdir(parents=True, exist_ok=True)
            (job / "result.json").write_text(json.dumps(result))
            returned = JobReturn()
            returned.status, returned.return_value = JobStatus.COMPLETED, None if failed else (x - 3) ** 2
            found.append(returned)
        return found


def search(folder: Path, greater: bool | None, trials: int, at_once: int = 1, low: int = 0) -> tuple[Any, Launcher]:
    pytest.importorskip("optuna")
    from kdlab.cli.hydra.optuna_sweeper import OptunaSweeper

    sweeper = OptunaSweeper(n_trials=trials, n_jobs=at_once, seed=0, startup=4)
    sweeper.hydra_context = SimpleNamespace(config_loader=None)  # type: ignore[assignment]
    sweeper.config = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=str(folder))))  # type: ignore
    sweeper.launcher = launcher = Launcher(folder, greater)  # type: ignore[assignment]
    return sweeper.sweep([f"x=interval({low}.0,10.0)"]), launcher


def test_a_search_minimises_what_is_better_when_less(tmp_path: Path) -> None:
    study, launcher = search(tmp_path, greater=False, trials=16)
    assert study.direction.name == "MINIMIZE" and len(study.trials) == 16
    assert study.best_value == min((x - 3) ** 2 for x in launcher.asked)
    late = statistics.mean(abs(x - 3) for x in launcher.asked[8:])
    assert late < 2.5, "what is asked for late lies near the best"
    # goes on in the same direction, and asks for new points
    study, launcher = search(tmp_path, greater=False, trials=18)
    assert study.direction.name == "MINIMIZE" and len(study.trials) == 18 and len(launcher.asked) == 2


@pytest.mark.parametrize("greater", [True, None])
def test_a_search_maximises_otherwise(tmp_path: Path, greater: bool | None) -> None:
    study, _ = search(tmp_path, greater=greater, trials=3)
    assert study.direction.name == "MAXIMIZE" and study.best_value == max(trial.value for trial in study.trials)


def test_a_search_turns_after_failures_and_with_jobs_at_a_time(tmp_path: Path) -> None:
    study, launcher = search(tmp_path, greater=False, trials=9, at_once=3, low=-20)
    states = [trial.state.name for trial in study.trials]
    assert study.direction.name == "MINIMIZE" and len(states) == 9
    assert [state == "FAIL" for state in states] == [x < 0 for x in launcher.asked]
    assert "FAIL" in states and "COMPLETE" in states


# ---- order and numbers


def test_runs_are_ranked_by_the_least_perplexity(tmp_path: Path) -> None:
    for name, ppl, em in (("a", 6.0, 0.3), ("b", 4.0, 0.2), ("c", 5.0, 0.4)):
        content = fabricate.language_result(name)
        content["models"]["student"]["val"]["ppl"], content["models"]["student"]["test"]["em"] = ppl, em
        fabricate.write(tmp_path / name, content)
    comparison = comparison_of(tmp_path)
    assert [(one.runs[0].label, one.rank) for one in comparison.groups] == [("b", 1), ("c", 2), ("a", 3)]
    assert [one.runs[0].label for one in ordered(comparison, "-val")] == ["a", "c", "b"]
    assert [one.runs[0].label for one in ordered(comparison, "em")] == ["c", "a", "b"]


def test_what_decides_is_what_the_result_says() -> None:
    both = {"status": "finished", "models": {"student": {"val": {"acc": 0.4, "ppl": 5.0, "em": 0.3}}}}
    said = {"ppl": False, "em": True, "wer": False, "acc": True}
    assert score_of([read.Run(Path("."), both)]).key == "acc"  # as results were written before
    for name, greater in said.items():
        score = score_of([read.Run(Path("."), both | {"score": {"name": name, "greater": greater}})])
        assert (score.key, score.higher, score.fraction) == (name, greater, name != "ppl")
    for odd in (3, {"name": 5}, {"name": "no\x1bsuch"}, [1], {"name": "x" * 9, "greater": "no"}):
        assert score_of([read.Run(Path("."), both | {"score": odd})]).key == "acc"
    own = score_of([read.Run(Path("."), both | {"score": {"name": "bleu\x1b", "greater": True}})])
    assert own.short == "bleu" and own.higher and not own.fraction


def test_the_gap_is_closed_in_either_direction() -> None:
    run = run_with(ppl=(5.0, 4.0, 6.0), em=(0.5, 0.9, 0.1))
    assert gap_closed(run, "test", SCORES["ppl"]) == pytest.approx(0.5)
    assert gap_closed(run, "test", SCORES["em"]) == pytest.approx(0.5)
    worse = run_with(ppl=(7.0, 4.0, 6.0))
    assert gap_closed(worse, "test", SCORES["ppl"]) == pytest.approx(-0.5)
    for teacher in (6.0, 6.5):  # no better than the baseline: there is no gap
        assert gap_closed(run_with(ppl=(5.0, teacher, 6.0)), "test", SCORES["ppl"]) is None


def test_seeds_give_mean_deviation_and_paired_difference(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path, losses=("kl",), seeds=3)
    comparison = comparison_of(tmp_path)
    (one,) = comparison.groups
    results = [json.loads(path.read_text())["models"] for path in tmp_path.glob("*/result.json")]
    for key, scale, form in (("ppl", 1, "{:+.3f}"), ("em", 100, "{:+.2f}")):
        gains = [m["student"]["test"][key] - m["baseline"]["test"][key] for m in results]
        name = "difference" if key == "ppl" else "em_difference"
        stat = one.stat(comparison.measures[name].get)
        assert stat is not None and stat.n == 3
        assert stat.mean == pytest.approx(statistics.mean(gains))
        assert stat.std == pytest.approx(statistics.stdev(gains))
        shown = row(one, comparison, [name])[name] or ""
        assert shown.startswith(form.format(scale * statistics.mean(gains)).replace("-", "−") + " ± ")
        assert shown.endswith(" better") == (key == "ppl")


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.5123, "4.512"), (21.1, "21.10"), (163.44, "163.4"), (1634.2, "1,634"), (3.2e9, "3.2e+09"), (None, None)],
)
def test_perplexities_have_the_decimals_that_matter(value: float | None, text: str | None) -> None:
    assert decimal(value) == text


# ---- what does not compare


def unlike(folder: Path, em: bool = True) -> Comparison:
    """Two runs with steps and, of less perplexity and fewer right answers, two of answers alone."""
    for i, form in enumerate(("steps", "answer", "steps", "answer")):
        content = fabricate.language_result(f"loss_{i}")
        content["settings"] |= {"data": "arithmetic", "data.form": form, f"loss.terms.t{i}.weight": 1.0}
        for split in ("val", "test"):
            content["models"]["student"][split] |= {"ppl": (16.0, 11.0, 17.0, 12.0)[i], "em": (0.5, 0.2, 0.6, 0.3)[i]}
            if not em:
                content["models"]["student"][split].pop("em")
        fabricate.write(folder / str(i), content)
    return comparison_of(folder)


def test_perplexities_of_other_tokens_rank_nothing(tmp_path: Path) -> None:
    comparison = unlike(tmp_path)
    assert [one.runs[0].label for one in comparison.groups] == ["2", "0", "3", "1"]  # by exact match
    columns = columns_of(comparison)
    assert "val_em" in columns and "data.form" in columns
    assert not any(key.startswith("loss.terms") for key in comparison.differs)  # they come with the loss
    text = summary.report(comparison, columns, comparison.groups)
    assert "Ranked by exact match on validation: ppl is of different data or tokens (data.form)" in text
    drawing = pictures.accuracy_and_size(comparison)
    assert drawing is not None and drawing.figure.axes[0].get_ylabel() == "test exact match, %"
    assert any("best on validation  60.00" in note.get_text() for note in drawing.figure.axes[0].texts)


def test_without_exact_match_there_is_no_rank(tmp_path: Path) -> None:
    comparison = unlike(tmp_path, em=False)
    assert all(one.rank is None for one in comparison.groups) and comparison.unlike == ["data.form"]
    text = summary.report(comparison, columns_of(comparison), comparison.groups)
    assert sum(line.startswith("Not ranked: ppl is of different data or tokens") for line in text.splitlines()) == 1
    drawing = pictures.accuracy_and_size(comparison)
    assert drawing is not None and not any("best" in note.get_text() for note in drawing.figure.axes[0].texts)
    compare_main([str(tmp_path)])
    page = (tmp_path / "compare" / "index.html").read_text()
    assert "Not ranked: ppl is" in page and "Settings, not ranked" in page and "class=best" not in page
    rows = list(csv.DictReader((tmp_path / "compare" / "runs.csv").open()))
    assert {row["not_comparable_by"] for row in rows} == {"data.form"} and {row["ranked_by"] for row in rows} == {""}


def test_what_only_training_sees_leaves_runs_comparable(tmp_path: Path) -> None:
    for i, fraction in enumerate((0.1, 1.0)):
        content = fabricate.language_result()
        content["settings"] |= {"data.fraction": fraction, "data.batch_size": 8 * (i + 1)}
        fabricate.write(tmp_path / str(i), content)
    comparison = comparison_of(tmp_path)
    assert not comparison.unlike and [one.rank for one in comparison.groups] == [1, 2]


def test_labels_tell_apart_and_are_short(tmp_path: Path) -> None:
    for i in range(8):
        content = fabricate.language_result("one_long_name_that_all_of_them_begin_with_" + "abcdefgh"[i])
        content["settings"] |= {
            "optimizer.lr": 0.001 * (1 + i % 2),
            "data.max_steps": 4,
            "batch_transform.fraction": 0.5,
        }
        fabricate.write(tmp_path / str(i), content)
    comparison = comparison_of(tmp_path)
    names = labels(comparison.groups, comparison.differs, 44, lines=2)
    assert len(set(names)) == 8 and max(len(line) for name in names for line in name.split("\n")) <= 44
    assert all("max_steps" not in name and "fraction" not in name for name in names)
    drawing = match_by_steps(comparison)
    assert drawing is not None
    figure = drawing.figure
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_one_point_is_no_curve(tmp_path: Path) -> None:
    fabricate.write(tmp_path / "a", fabricate.language_result(), fabricate.language_curves()[-1:])
    assert kl_and_ce(comparison_of(tmp_path)) is None


def test_names_of_sizes_do_not_touch(tmp_path: Path) -> None:
    for i in range(8):
        content = fabricate.language_result(f"l{i}")
        content["settings"]["student"] = f"gpt_student_{i}"
        for role in ("student", "baseline"):
            content["models"][role]["parameters"] = 400_000 + 30_000 * i
        fabricate.write(tmp_path / str(i), content)
    drawing = pictures.accuracy_and_size(comparison_of(tmp_path))
    assert drawing is not None
    boxes = [note.get_window_extent() for note in drawing.figure.axes[0].texts]
    assert len(boxes) == 9 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


# ---- tables


def test_the_table_shows_what_a_language_model_is_judged_by(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path, seeds=2, outside=True)
    comparison = comparison_of(tmp_path)
    columns = columns_of(comparison)
    wanted = ["val", "test", "teacher", "baseline", "difference", "gap", "em", "em_difference", "ood"]
    wanted += ["ood_difference", "agreement", "kl", "parameters", "bytes", "tokens", "seconds"]
    constant = ["teacher", "baseline", "ood", "ood_difference", "parameters", "bytes", "tokens", "seconds"]
    assert list(alike(comparison)) == constant and "acc" not in columns
    assert [key for key in columns if key in wanted] == [key for key in wanted if key not in constant]
    text = summary.report(comparison, columns, comparison.groups)
    heads = text.splitlines()[2]
    for title in ("val ppl", "vs baseline", "test em %", "gap closed %"):
        assert title in heads
    assert "teacher ppl" not in heads and "The same in all rows: teacher ppl 4.386 ± 0.000; " in text
    assert "better" in text and "+0.850 ± 0.071 worse" in text
    alone = Comparison.of(read.scan([next(tmp_path.glob("kl-*"))]))
    assert [key for key in columns_of(alone) if key in wanted] == wanted  # of one row, nothing repeats
    assert "acc" in Comparison.of(read.scan([tmp_path])).measures  # next-token accuracy, if asked for


def test_a_narrow_terminal_gets_the_columns_that_matter_most(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path, seeds=2)
    comparison = comparison_of(tmp_path)
    columns = columns_of(comparison)
    text = summary.report(comparison, columns, comparison.groups, width=110, fit=True)
    body = text.split("\n\n")[1].splitlines()
    assert max(map(len, body)) <= 110 and "val ppl" in body[0] and "vs baseline" in body[0]
    assert "too narrow for: KL, agree %" in text
    assert "too narrow" not in summary.report(comparison, columns, comparison.groups, width=400, fit=True)
    assert "too narrow" not in summary.report(comparison, columns, comparison.groups, width=110)


def test_the_table_that_ends_a_run() -> None:
    content = fabricate.language_result()
    for role, ppl, outside, em in (
        ("student", 5.0, 12.0, 0.6),
        ("teacher", 4.0, 8.0, 0.9),
        ("baseline", 6.0, 11.0, 0.4),
    ):
        content["models"][role]["test"] |= {"ppl": ppl, "em": em, "ppl_word": ppl**5}
        content["models"][role]["ood"] = {"ppl": outside}
    text = table.run_table(content, "outputs/lm/one", bold=False)
    heads, _, teacher, student, baseline = text.splitlines()[:5]
    for title in ("test ppl", "em %", "word ppl", "ood ppl", "agreement %", "KL", "tokens/s"):
        assert title in heads
    assert "of teacher" not in heads  # a share of a perplexity means nothing
    assert "5.000" in student and "3,125" in student and "12.00" in student and "60.00" in student
    assert "4.000" in teacher and "11.00" in baseline
    assert "student − baseline: −1.000 ppl (better) on test, inside the domain" in text
    assert "student − baseline: +1.000 ppl (worse) outside the domain" in text
    assert "student − baseline: +20.00 points em on test" in text
    assert "gap closed: 50 % of the way from baseline to teacher (perplexity)" in text


def test_transcripts_show_their_word_error_rate() -> None:
    content = fabricate.language_result()
    for role, wer in (("student", 0.10), ("teacher", 0.05), ("baseline", 0.15)):
        content["models"][role]["test"]["wer"] = wer
    text = table.run_table(content)
    assert "WER %" in text and "student − baseline: −5.00 points WER (better) on test" in text


def test_the_csv_has_exact_match_by_steps(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path)
    flat = summary.flat(read.load([tmp_path])[0])
    assert flat["models.student.test.em/2"] > flat["models.student.test.em/10"] and flat["score.name"] == "ppl"


# ---- pictures


def test_the_map_is_darkest_where_perplexity_is_least(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path, losses=("kl",), temperatures=(1.0, 2.0, 4.0), alphas=(0.1, 0.5, 0.9))
    comparison = comparison_of(tmp_path)
    drawing = pictures.heat_map(comparison)
    assert drawing is not None and "perplexity" in drawing.title
    tiles = [patch for patch in drawing.figure.axes[0].patches if patch.get_fill()]
    light = {(round(t.get_x() + 0.5), round(t.get_y() + 0.5)): sum(t.get_facecolor()[:3]) for t in tiles}
    least = {one.rank: one.settings for one in comparison.groups}[1]
    assert (least["loss.temperature"], least["loss.alpha"]) == (2.0, 0.9)
    assert min(light, key=light.__getitem__) == (1, 2)  # T = 2, alpha = 0.9
    (frame,) = [patch for patch in drawing.figure.axes[0].patches if not patch.get_fill()]
    assert round(frame.get_x() + 0.455) == 1 and round(frame.get_y() + 0.455) == 2


def test_gains_are_blue_where_they_are_better_whatever_their_sign(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path, losses=("kl",), outside=True)
    drawing = pictures.gains(comparison_of(tmp_path))
    assert drawing is not None
    inside, matches, outside = (ax.patches[0] for ax in drawing.figure.axes)
    assert inside.get_width() < 0 and inside.get_facecolor() == pytest.approx(BLUE)
    assert matches.get_width() > 0 and matches.get_facecolor() == pytest.approx(BLUE)
    assert outside.get_width() == pytest.approx(0.8) and outside.get_facecolor() == pytest.approx(VERMILION)
    assert "less is better" in drawing.figure.axes[0].get_xlabel()


def test_sizes_stand_against_perplexity(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path)
    drawing = pictures.accuracy_and_size(comparison_of(tmp_path))
    assert drawing is not None and drawing.figure.axes[0].get_ylabel() == "test perplexity (less is better)"


def test_curves_have_a_panel_of_perplexity(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path)
    drawing = kl_and_ce(comparison_of(tmp_path))
    assert drawing is not None and len(drawing.figure.axes) == 3
    ax = drawing.figure.axes[2]
    assert "val/ppl" in ax.get_ylabel() and len(ax.lines) == 2
    expected = read.load([tmp_path])[0].curves["val/ppl"][1]
    assert any(list(line.get_ydata()) == pytest.approx(expected) for line in ax.lines)


def test_exact_match_by_steps_of_one_run_and_of_many(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path / "one", losses=("kl",), seeds=2)
    drawing = match_by_steps(comparison_of(tmp_path / "one"))
    assert drawing is not None
    (ax,) = drawing.figure.axes
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["teacher", "student", "baseline"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "3", "4", "6", "10"]  # by number, not by text
    runs = read.load([tmp_path / "one"])
    means = [statistics.mean(100 * run.number("student", "test", f"em/{n}") for run in runs) for n in (2, 3, 4, 6, 10)]
    assert list(lines["student"].get_ydata()) == pytest.approx(means)
    fabricate.language_sweep(tmp_path / "many", losses=("kl", "jsd", "reverse_kl"))
    drawing = match_by_steps(comparison_of(tmp_path / "many"))
    assert drawing is not None
    labels = [line.get_label() for line in drawing.figure.axes[0].lines]
    assert labels[0] == "teacher" and labels[1] == "loss=[kl]" and labels[-1] == "baseline" and len(labels) == 5


def test_no_picture_of_steps_without_groups(tmp_path: Path) -> None:
    fabricate.write(tmp_path / "run", fabricate.result())
    assert match_by_steps(comparison_of(tmp_path)) is None


def test_names_of_groups_may_be_words_or_anything(tmp_path: Path) -> None:
    content = fabricate.language_result()
    for role in ("student", "teacher"):
        content["models"][role]["test"] |= {"em/addition": 0.5, "em/" + "x" * 80: 0.2, "em/nan": 0.1, "em/odd": "no"}
    content["models"]["baseline"] = None
    fabricate.write(tmp_path / "run", content)
    drawing = match_by_steps(comparison_of(tmp_path))
    assert drawing is not None and drawing.figure.axes[0].get_xlabel() == "group of questions"
    assert max(len(tick.get_text()) for tick in drawing.figure.axes[0].get_xticklabels()) <= 14


def test_the_page_has_every_picture(tmp_path: Path) -> None:
    fabricate.language_sweep(tmp_path, losses=("kl",), temperatures=(1.0, 2.0), alphas=(0.5, 0.9))
    comparison = comparison_of(tmp_path)
    drawn = pictures.draw(comparison, tmp_path)
    assert [picture.path.name for picture in drawn] == [
        "heat_map.png",
        "curves.png",
        "size.png",
        "gain.png",
        "steps.png",
    ]
    columns = columns_of(comparison)
    page.write(tmp_path / "index.html", comparison, columns, comparison.groups, drawn, "python -m kdlab compare x")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.count("data:image/png") == 5 and "Exact match by number of steps" in text and "vs baseline" in text
