"""What kdlab uses of Lightning beyond its documented interface is there, and is still worth it."""

import inspect
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from kdlab.methods.lightning_internals import (
    HOOK_NAME,
    NoProfiler,
    QuickModule,
    at_last_batch,
    batches_done,
    epochs_done,
    set_measures,
    with_signature,
)
from kdlab.methods.method import Method

COUNTS = Counter()


class Profiler(NoProfiler):
    def profile(self, action_name):
        COUNTS["profiler"] += 1
        return super().profile(action_name)


class Module(QuickModule):
    def __init__(self):
        super().__init__()
        self.net, self.seen = torch.nn.Linear(2, 1), []

    def __setattr__(self, name, value):
        COUNTS[name] += 1
        super().__setattr__(name, value)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append((batches_done(self.trainer), at_last_batch(self.trainer)))

    def on_train_epoch_end(self):
        set_measures(self.trainer, {"val/acc": 0.5})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    module, read = Module(), []
    arguments = inspect.getfullargspec
    loader = DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 2)), batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getfullargspec", lambda what: read.append(what) or arguments(what))
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            profiler=Profiler(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path_factory.mktemp("lightning"),
        )
        trainer.fit(module, loader)
    COUNTS["training_step"] = sum(getattr(what, "__name__", "") == "training_step" for what in read)
    return module, trainer


@pytest.mark.parametrize("name", [HOOK_NAME, "profiler", "training_step"])
def test_lightning_still_does_at_every_step_what_is_made_quick(trained, name):
    assert COUNTS[name] >= 6, f"{name}: {COUNTS[name]} times in 6 steps; what makes it quick can go"


def test_batches_are_counted(trained):
    module, _ = trained
    assert module.seen == [(1, False), (2, False), (3, True)] * 2


def test_measures_reach_callbacks(trained):
    _, trainer = trained
    assert trainer.callback_metrics["val/acc"] == 0.5


def test_a_checkpoint_says_how_many_epochs_are_done(trained, tmp_path):
    _, trainer = trained
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert epochs_done(torch.load(tmp_path / "last.ckpt", weights_only=False)) == 2
    with pytest.raises(KeyError):
        epochs_done({"state_dict": {}})


def test_a_hook_is_noted_and_other_attributes_are_registered():
    module = Module()
    setattr(module, HOOK_NAME, "training_step")
    assert getattr(module, HOOK_NAME) == "training_step"
    module.more = torch.nn.Linear(1, 1)
    assert "more" in dict(module.named_children())


def test_a_signature_is_kept():
    def step(self, batch, batch_idx): ...

    assert with_signature(step).__signature__ == inspect.signature(step)
    assert "__signature__" in vars(Method.training_step)
