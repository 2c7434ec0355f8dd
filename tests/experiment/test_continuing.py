"""Longer training: a run that starts from the last state of an old one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.tiny import MLP, curve, mistake, newest, result, same, train, weights
from kdlab.cli.main import main

CONSTANT = (*MLP, "student.dropout=0.2", "scheduler=constant", "baseline=false")


def longer(place: Path, name: str, run: Path, *words: str, status: int = 0) -> Path:
    return train(place, name, *words, f"resume={run}", status=status)


def test_without_a_schedule_it_is_the_run_that_never_ended(place):
    whole = train(place, "longer_whole", *CONSTANT, "epochs=4")
    short = train(place, "longer", *CONSTANT, "epochs=2")
    before = (short / "result.json").read_bytes()
    run = longer(place, "longer", short, *CONSTANT, "epochs=4")
    assert run != short and (short / "result.json").read_bytes() == before
    assert same(weights(run), weights(whole)) and not same(weights(run), weights(short))
    for name in ("train/kl", "val/acc"):
        assert curve(run, name) == curve(whole, name)  # the first part's points are there too
    told = result(run)["continued_from"]
    assert Path(told["run"]) == short and told["epochs"] == 2 and told["changed"] == {"epochs": [2, 4]}
    assert told["config_hash"] == result(short)["config_hash"] != result(run)["config_hash"]
    assert result(run)["config_hash"] != result(whole)["config_hash"]  # no repeat of a run in one go
    assert result(run)["epochs"] == 4 and result(run)["steps"] == result(whole)["steps"]


def test_the_same_command_again_is_the_same_run(place, capsys):
    short = train(place, "longer_again", *CONSTANT, "epochs=1")
    run = longer(place, "longer_again", short, *CONSTANT, "epochs=2")
    (run / "result.json").unlink()  # as if it had been killed at its end
    assert longer(place, "longer_again", short, *CONSTANT, "epochs=2") == run and (run / "result.json").exists()
    assert longer(place, "longer_again", run, *CONSTANT, "epochs=2") == run  # by its own name
    capsys.readouterr()
    further = longer(place, "longer_again", run, *CONSTANT, "epochs=3")
    assert f"goes on from {run}, after 2 epochs there" in " ".join(capsys.readouterr().out.split())
    assert result(further)["continued_from"]["epochs"] == 2 and result(further)["epochs"] == 3


def test_it_needs_the_first_run_no_more_once_it_has_begun(place):
    words = tuple(word for word in CONSTANT if word != "baseline=false")
    short = train(place, "longer_alone", *words, "epochs=1")
    run = longer(place, "longer_alone", short, *words, "epochs=2")
    whole = result(run)
    (run / "result.json").unlink()  # as if it had been killed at its end, and its first part removed since
    shutil.rmtree(short)
    assert longer(place, "longer_alone", run, *words, "epochs=2") == run
    told = result(run)["continued_from"]
    assert told == {key: whole["continued_from"][key] for key in ("run", "epochs", "state")}
    assert result(run)["models"]["student"]["test"] == whole["models"]["student"]["test"]


def test_another_rate_and_schedule_are_taken(place):
    short = train(place, "longer_rate", *CONSTANT, "epochs=1", "optimizer.lr=0.1")
    run = longer(place, "longer_rate", short, *CONSTANT, "epochs=2", "optimizer.lr=0.01", "optimizer.weight_decay=0.5")
    rates = curve(run, "train/lr")
    assert set(rates[: len(rates) // 2]) == {0.1} and set(rates[len(rates) // 2 :]) == {0.01}
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert state["param_groups"][0]["weight_decay"] == 0.5
    cosine = [word for word in CONSTANT if not word.startswith("scheduler")]
    bent = longer(place, "longer_rate", short, *cosine, "scheduler=cosine", "epochs=2", "optimizer.lr=0.1")
    rates = curve(bent, "train/lr")[len(rates) // 2 :]
    assert rates[0] == pytest.approx(0.05, abs=0.02) and rates == sorted(rates, reverse=True) and rates[-1] < 0.01


def test_the_baseline_is_trained_in_the_same_parts(place):
    words = tuple(word for word in CONSTANT if word != "baseline=false")
    whole = train(place, "longer_base_whole", *words, "epochs=3")
    short = train(place, "longer_base", *words, "epochs=2")
    run = longer(place, "longer_base", short, *words, "epochs=3")
    a, b = (Path(result(one)["models"]["baseline"]["folder"]) for one in (run, whole))
    assert a != b and same(weights(a, "model_finetuned.pt"), weights(b, "model_finetuned.pt"))


def test_early_stopping_ended_the_first_part_alone(place):
    words = (*CONSTANT, "method=finetune", "loss=ce", "method.patience=1", "optimizer.lr=1e-8")
    short = train(place, "longer_patience", *words, "epochs=6")
    assert result(short)["epochs"] < 6
    again = tuple(word for word in words if not word.startswith("optimizer"))
    run = longer(place, "longer_patience", short, *again, "optimizer.lr=0.1", "epochs=7")
    assert result(run)["epochs"] > result(short)["epochs"]


def test_what_cannot_be_trained_longer_is_said(place, capsys):
    short = train(place, "longer_no", *CONSTANT, "epochs=2")

    def refused(*words: str) -> str:
        there = set((place / "longer_no").iterdir())
        said = mistake(capsys, [*words, f"resume={short}", f"output={place}", "name=longer_no", "logger=none"])
        assert set((place / "longer_no").iterdir()) == there
        return said

    tests = ("trainer=cpu", "trainer.progress=none", "trainer.log_every=1")
    assert "epochs: 1, and" in refused(*tests, *CONSTANT, "epochs=1")
    assert "optimizer: torch.optim.AdamW" in refused(*tests, *CONSTANT, "epochs=4", "optimizer=adamw")
    said = refused(*tests, *CONSTANT, "epochs=4", "seed=5")
    assert "seed is 0 there and 5 here" in said and "epochs, optimizer, scheduler" in said
    (short / "checkpoints" / "last.ckpt").unlink()
    assert "still has its checkpoint" in refused(*tests, *CONSTANT, "epochs=4")


def test_a_run_of_several_fits_is_refused(place, capsys):
    run = train(place, "longer_stages", *CONSTANT, "epochs=1", "stages={a: [epochs=1], b: [epochs=1, init=previous]}")
    words = ["epochs=2", f"resume={run}", f"output={place}", "name=longer_stages"]
    words += ["trainer=cpu", "trainer.progress=none", "trainer.log_every=1", "logger=none"]
    said = mistake(capsys, [*CONSTANT, "stages={a: [epochs=1], b: [epochs=1, init=previous]}", *words])
    assert "several fits" in said and "pretrained.checkpoint=" in said


def test_diagnosis_of_a_longer_run_finds_its_baseline(place):
    words = tuple(word for word in CONSTANT if word != "baseline=false")
    short = train(place, "longer_diagnosed", *words, "epochs=1")
    run = longer(place, "longer_diagnosed", short, *words, "epochs=2")
    assert main(["diagnose", str(run), "--no-pictures"]) == 0
    told = json.loads((run / "diagnosis.json").read_text())
    assert {"student", "teacher", "baseline"} <= set(told["networks"]) and not told["notes"]
    assert newest(place, "longer_diagnosed").is_dir()
