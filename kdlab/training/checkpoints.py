"""Saving so that a run can be killed at any moment, and go on to the same weights."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from kdlab.errors import RunFailed, UserError
from kdlab.methods.lightning_internals import at_last_batch, epochs_done
from kdlab.models.weights.checkpoint import atomic_write, save_weights
from kdlab.system.arrays import check_archive
from kdlab.system.files import file_hash, open_regular
from kdlab.system.termination import Terminated

CURE = "try a smaller optimizer.lr, or trainer.clip=1, and look at the inputs"
"""Advice against a loss that is not finite."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoint I/O that writes beside the target, syncs, and renames: a kill leaves the last good checkpoint.

    Lightning's own goes through ``$TMPDIR`` and a move, which tears on another file system.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location or "cpu")


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a run's ``last.ckpt``, and check it against its own checksums.

    torch reads a file with a flipped bit without a word; the zip container's CRC finds it.

    Raises:
        UserError: if the file is missing, truncated, damaged, or of another program.
    """
    accepted = "a whole file (without it, training begins anew)"
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            check_archive(archive, os.fstat(file.fileno()).st_size)
            damaged = archive.testzip()
        if damaged:
            raise UserError("resume", f"{path} is damaged at {damaged}", accepted)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError("resume", f"{path} does not exist") from None
    except Exception:  # whatever damaged bytes make the readers do
        raise UserError("resume", f"{path} is truncated, or not a checkpoint", accepted) from None
    if not isinstance(checkpoint, dict) or not {"callbacks", "loops", "global_step"} <= set(checkpoint):
        raise UserError("resume", f"{path} was not written by kdlab", "checkpoints/last.ckpt of a run")
    try:
        checkpoint["callbacks"].get(""), int(checkpoint["global_step"])
        epochs_done(checkpoint)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError("resume", f"{path} was not written by kdlab", "checkpoints/last.ckpt of a run") from None
    return checkpoint


class Saver(Checkpoint):
    """Callback that keeps ``last.ckpt`` (everything, to resume) and ``best.pt`` (the student's best weights).

    The best epoch has the best ``score``, ties broken by the lower cross-entropy, then by being earlier; without a
    validation split the last epoch counts. Saved at every epoch's end and, in long epochs, every ``minutes``. On
    SIGTERM it saves after the current step and exits with status 143.

    Args:
        folder: folder ``checkpoints/`` of the run.
        score: name of the deciding measure, such as ``acc`` or ``ppl``.
        minutes: number of minutes between checkpoints inside an epoch.
        patience: number of epochs without a better score after which training stops; None never stops early.
        greater: whether a greater score is better: yes for accuracy, no for perplexity.
        seed: seed of the method; a checkpoint of another seed is refused. None skips this check.
    """

    def __init__(
        self,
        folder: Path,
        score: str,
        minutes: float = 10.0,
        patience: int | None = None,
        greater: bool = True,
        seed: int | None = None,
    ) -> None:
        self.seed = seed
        self.folder, self.score, self.minutes, self.patience = folder, score, minutes, patience
        self.greater = greater
        self.best: tuple[float, float] | None = None
        """Score and cross-entropy of the best epoch, each with the sign that makes greater better."""
        self.best_epoch = -1
        self.best_measures: dict[str, float] = {}
        self.best_hash: str | None = None
        """Hash of ``best.pt``; None before there is one, and in checkpoints of earlier versions."""
        self.epochs = 0
        """Number of epochs trained so far."""
        self.seconds = 0.0
        self.stopped = False
        self.resumed_seconds = 0.0
        self._started = self._saved = time.monotonic()
        self._terminate = False
        self._handler: Any = None

    # ---- state that goes into the checkpoint --------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "best": list(self.best) if self.best else None,
            "best_epoch": self.best_epoch,
            "best_measures": self.best_measures,
            "best_hash": self.best_hash,
            "seed": self.seed,
            "epochs": self.epochs,
            "seconds": self.resumed_seconds + time.monotonic() - self._started,
            "stopped": self.stopped,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = tuple(state["best"]) if state["best"] else None
        self.best_epoch, self.best_measures = state["best_epoch"], dict(state["best_measures"])
        self.resumed_seconds, self.stopped, self.epochs = state["seconds"], state["stopped"], state["epochs"]
        self.best_hash = state.get("best_hash")

    def check_seed(self, state: dict[str, Any]) -> None:
        """Refuse to resume from a checkpoint of another seed.

        Raises:
            UserError: if its state is of another seed.
        """
        recorded = state.get("seed")
        if None not in (recorded, self.seed) and recorded != self.seed:
            raise UserError(
                "resume",
                f"{self.folder / 'last.ckpt'} is of seed {recorded}, and this fit of seed {self.seed}",
                "its own checkpoint (without it, training begins anew)",
            )

    def check_best(self) -> None:
        """Check ``best.pt`` against its hash in the checkpoint.

        Raises:
            UserError: if it is damaged, or of another run.
        """
        best = self.folder / "best.pt"
        if self.best_hash is not None and best.is_file() and file_hash(best) != self.best_hash:
            raise UserError(
                "resume",
                (f"{best} is not the file that was written: its SHA-256 is not the one in last.ckpt"),
                f"the file as it was (without {self.folder}, training begins anew)",
            )

    # ---- hooks --------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._started = self._saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # after Lightning's own handler, which would end with status 0 and no checkpoint
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._terminate = True

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # never on the last batch of an epoch: there Lightning's counters resume an epoch too early or too late
        last = at_last_batch(trainer)
        mid_step = (batch_idx + 1) % trainer.accumulate_grad_batches
        if last or mid_step:
            return
        if self._terminate:
            self._save(trainer, pl_module)
            raise Terminated
        if time.monotonic() - self._saved > 60 * self.minutes:
            self._save(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.flush_curves()
        measures = {
            name[4:]: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }
        validated = (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0  # type: ignore[operator]
        self.epochs = trainer.current_epoch + 1
        if self.score in measures and validated:
            self._judge(trainer, pl_module, measures)
        elif self.best is None:  # after a resume, measures of the epochs before are not there
            self._keep(trainer, pl_module, measures)
        self._save(trainer, pl_module)
        if self._terminate:
            raise Terminated

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.seconds = self.resumed_seconds + time.monotonic() - self._started
        self._restore_handler()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    # ---- deciding and writing -----------------------------------------------------------------------------------

    def _judge(self, trainer: pl.Trainer, module: object, measures: dict[str, float]) -> None:
        broken = [f"val/{name} = {measures[name]:g}" for name in ("ce", "kl") if not _finite(measures, name)]
        if broken:  # weights that broke in the step after the last loss
            raise RunFailed(f"the loss is not finite at step {trainer.global_step}: {', '.join(broken)}; {CURE}")
        score = measures[self.score]
        rank = (score if self.greater else -score, -measures.get("ce", 0.0))
        if self.best is None or rank > self.best:
            self.best = rank
            self._keep(trainer, module, measures)
        elif self.patience is not None and trainer.current_epoch - self.best_epoch >= self.patience:
            self.stopped = trainer.should_stop = True

    def _keep(self, trainer: pl.Trainer, module: Any, measures: dict[str, float]) -> None:
        self.best_epoch, self.best_measures = trainer.current_epoch, measures
        if trainer.is_global_zero:
            save_weights({k: v.detach() for k, v in module.student.state_dict().items()}, self.folder / "best.pt")
            self.best_hash = file_hash(self.folder / "best.pt")

    def _save(self, trainer: pl.Trainer, module: Any) -> None:
        # a checkpoint after a step that was not finite would be resumed from
        module.flush_curves()
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._saved = time.monotonic()


def _finite(measures: dict[str, float], name: str) -> bool:
    return math.isfinite(measures.get(name, 0.0))
