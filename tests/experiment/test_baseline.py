"""The baseline is the run without its teacher: the same start, stages, adapters and steps."""

import json

import pytest
import yaml

from helpers.tiny import result, train

WORDS = [
    "experiment=reasoning_arithmetic",
    "student=gpt_tiny",
    "data.val=10",
    "data.test=10",
    "task.max_questions=2",
]
TEACHER_DEFAULTS = [*WORDS, "teacher=gpt_tiny", "teacher.epochs=1"]
ALONE = [*WORDS, "method=finetune", "loss=[ce]", "teacher=none"]


def fits(run):
    """The baseline's fits, as its store keeps them: (config, result) of each, in their order."""
    folders = [p for p in (run.parents[1] / "baselines").iterdir() if (p / "result.json").exists()]
    found = [
        (yaml.safe_load((p / "config.yaml").read_text()), json.loads((p / "result.json").read_text()), p)
        for p in folders
    ]
    return sorted(found, key=lambda fit: fit[0]["begin"])  # what goes on from nothing is first


@pytest.fixture
def apart(place, tmp_path):
    """A store of its own, so that its baselines are those of one run."""
    return tmp_path


def test_stages_that_differ_are_gone_through_one_by_one(apart):
    stages = (
        "stages={sft: ['data.train=60', 'epochs=2'], own: [init=previous, adapter=lora, 'loss.alpha=1', 'epochs=1']}"
    )
    run = train(apart, "adapters", *TEACHER_DEFAULTS, "data.train=30", "teacher.data.train=30", stages)
    (first, before, _), (second, after, _) = fits(run)
    assert first["adapter"] is None and first["epochs"] == 2 and first["data"]["train"] == 60 and first["begin"] == ""
    assert second["adapter"]["_target_"].endswith(".LoRA") and second["epochs"] == 1 and second["data"]["train"] == 30
    assert second["begin"].startswith("from ") and before["finished"] <= after["finished"]
    assert (run / "stages" / "own" / "adapter").is_dir() and (fits(run)[1][2] / "adapter").is_dir()


def test_stages_that_differ_in_their_teacher_alone_are_one_fit(apart):
    stages = "stages={soft: ['loss.alpha=1', 'epochs=2'], labels: ['loss.alpha=0', init=previous, 'epochs=1']}"
    run = train(apart, "one", *TEACHER_DEFAULTS, "data.train=30", stages)
    [(only, kept, _)] = fits(run)
    assert only["epochs"] == 3 == kept["epochs"] and result(run)["epochs"] == 3


def test_what_a_taught_student_starts_from_is_the_start_of_its_baseline(apart):
    words = ["pretrained=trained", "pretrained.epochs=1", "init=pretrained", "adapter=lora", "epochs=1"]
    run = train(apart, "starts_pretrained", *TEACHER_DEFAULTS, "data.train=30", *words)
    [(only, _, _)] = fits(run)
    assert only["begin"].startswith("from ") and only["adapter"] is not None
    ppl = {role: result(run)["models"][role]["test"]["ppl"] for role in ("student", "baseline")}
    assert ppl["baseline"] == pytest.approx(ppl["student"], rel=0.1)


def test_a_teacher_assistant_chain_gives_its_steps_to_the_last_student(apart):
    last = "last: [method=offline_kd, 'loss=[balanced]', teacher=previous, epochs=1]"
    run = train(apart, "chain", *ALONE, "data.train=30", f"stages={{assistant: [data.train=90, epochs=1], {last}}}")
    [(only, kept, _)] = fits(run)
    assert only["data"]["train"] == 30 and only["epochs"] == kept["epochs"] == 1 + 3  # 3 steps of the first stage


def test_nobody_taught_and_started_fresh_is_the_baseline_itself(apart):
    run = train(apart, "alone", *ALONE, "data.train=30", "epochs=1")
    assert result(run)["models"]["baseline"] is None
    assert not (apart / "baselines").exists()
