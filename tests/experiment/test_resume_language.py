"""Killed at any moment, a language model's run goes on to the same bits: caches, own text, adapters, packing."""

import pytest

from helpers.tiny import OFTEN, checkpoint, curve, result, same, steps, train, weights
from kdlab.experiment import evaluation
from kdlab.training import checkpoints

TINY = (
    *("experiment=reasoning_arithmetic", "student=gpt_tiny", "student.settings.n_layer=1", "teacher=gpt_tiny"),
    *("data.train=60", "data.val=4", "data.test=4", "data.max_steps=3", "data.context=64", "data.batch_size=12"),
    *("teacher.epochs=1", "epochs=2", "task.new_tokens=4", "student.settings.resid_pdrop=0.2", "task.max_questions=2"),
)
"""Five steps an epoch, with dropout."""

CASES = {
    "cached": ("teacher.top_k=6",),
    "own": (
        "batch_transform=on_policy",
        "loss=reverse_kl",
        "batch_transform.new_tokens=6",
        "batch_transform.buffer=40",
        "batch_transform.fraction=0.6",
    ),
    "lora": ("init=teacher", "teacher.net.settings.n_layer=1", "adapter=lora", "adapter.dropout=0.1"),
    "packed": ("data.pack=true", "trainer.accumulate=2"),
}


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Speed is no part of this."""
    monkeypatch.setattr(evaluation, "tokens_per_second", lambda *_: 1.0)
    monkeypatch.setattr(evaluation.cost, "latency_ms", lambda *_: 1.0)


class Gone(Exception):
    """The process is gone: nothing after this moment reaches the disk."""


def die_after(monkeypatch, wanted):
    """End the process's training as soon as a checkpoint of so many steps is on the disk, as a kill would."""
    plain = checkpoints.Saver.on_train_batch_end

    def hook(self, trainer, *more):
        plain(self, trainer, *more)
        if trainer.global_step == wanted:
            raise Gone

    monkeypatch.setattr(checkpoints.Saver, "on_train_batch_end", hook)


@pytest.mark.parametrize("case", CASES)
def test_killed_a_run_ends_with_the_same_bits(place, monkeypatch, case):
    words = (*TINY, *OFTEN, *CASES[case])
    whole = train(place, f"{case}_whole", *words)
    assert result(whole)["steps"] == 10
    for at in (2, 8) if case == "own" else (7,):  # inside an epoch
        with monkeypatch.context() as patched:
            die_after(patched, at)
            cut = train(place, f"{case}_cut", *words, "resume=auto", status=1)
        assert steps(cut) == at and not (cut / "result.json").exists() and not (cut / "student.pt").exists()
    again = train(place, f"{case}_cut", *words, "resume=auto")
    assert again == cut and same(weights(again), weights(whole))
    assert same(checkpoint(again)["state_dict"], checkpoint(whole)["state_dict"])
    own = ("train/own", "train/own_length", "train/own_ended") if case == "own" else ()
    divergence = "val/kl_top6" if case == "cached" else "val/kl"
    for key in ("train/ce", "train/loss", "val/ppl", divergence, *own):
        on_data = curve(whole, "train/own").count(0.0)  # of these steps alone there is a loss on labels
        lengths = (on_data,) if case == "own" and key == "train/ce" else (2, 10)
        assert curve(again, key) == curve(whole, key) and len(curve(whole, key)) in lengths, key
    before, after = result(whole)["models"]["student"], result(again)["models"]["student"]
    assert before["val"] == after["val"] and before["test"] == after["test"]
    if case == "own":
        assert checkpoint(cut)["batches"]["examples"].numel() > 0, "the buffer is part of a checkpoint"
    if case == "lora":
        merged = (folder / "adapter" / "adapter_model.safetensors" for folder in (again, whole))
        assert len({file.read_bytes() for file in merged}) == 1


def test_a_stage_with_an_adapter_that_was_finished_is_not_trained_again(place, monkeypatch):
    low = "low: [init=teacher, teacher.net.settings.n_layer=1, adapter=lora, epochs=1]"
    stages = f"stages={{{low}, all: [init=previous, epochs=1]}}"
    whole = train(place, "stages_whole", *TINY, *OFTEN, stages)
    plain = checkpoints.Saver.on_train_batch_end

    def hook(self, trainer, *more):
        plain(self, trainer, *more)
        if "stages/all" in str(self.folder) and trainer.global_step == 3:
            raise Gone

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Saver, "on_train_batch_end", hook)
        cut = train(place, "stages_cut", *TINY, *OFTEN, stages, status=1)
    low = cut / "stages" / "low"
    before = (low / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = train(place, "stages_cut", *TINY, *OFTEN, stages, "resume=auto")
    assert again == cut and (low / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    for stage in ("stages/low", "stages/all", "."):
        assert same(weights(again / stage), weights(whole / stage)), stage
    assert (low / "adapter" / "adapter_config.json").exists()
