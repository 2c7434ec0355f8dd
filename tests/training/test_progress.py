"""What a fit says while it runs, where there is no terminal."""

from types import SimpleNamespace

from kdlab.training import progress
from kdlab.training.progress import Progress


def test_a_long_epoch_says_at_which_step_it_is(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    trainer = SimpleNamespace(
        estimated_stepping_batches=30, is_global_zero=True, global_step=0, current_epoch=0, max_epochs=1,
        accumulate_grad_batches=1, callback_metrics={},
    )  # fmt: skip
    shown = Progress("student", "lines")
    with caplog.at_level("INFO", logger="kdlab"):
        shown.on_train_start(trainer, None)
        for step in range(30):
            now[0] += 7.0
            trainer.global_step = step + 1
            shown.on_train_batch_end(trainer, None, None, None, step)
        shown.on_train_epoch_end(trainer, None)
        shown.on_train_end(trainer, None)
    steps = [f"student: step {n} of 30" for n in (9, 18, 27)]
    assert [line.strip() for line in caplog.messages] == [*steps, "student: epoch 1 of 1"]
