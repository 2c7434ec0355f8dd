"""Loggers of curves besides ``curves.jsonl``: Lightning's own, each imported only when it is chosen."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Map of logger → the module it needs."""

_PACKAGES = {"mlflow": "mlflow-skinny"}


def require(logger: str) -> None:
    """Refuse a logger whose package is not installed, without importing it.

    Raises:
        UserError: says what to install.
    """
    module = NEEDS.get(logger)
    if module is not None and importlib.util.find_spec(module) is None:
        raise UserError(
            "logger",
            (
                f"{logger!r} needs a package that is not installed (pip install "
                f"{_PACKAGES.get(module, module)}); accepted without it: tensorboard, csv, none"
            ),
        )


def tensorboard(folder: str | Path, name: str) -> Logger:
    """Return a TensorBoard logger that writes to the run folder itself, so that TensorBoard shows the folder's name."""
    require("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=str(folder), name="", version="", default_hp_metric=False)


def csv(folder: str | Path, name: str) -> Logger:
    """Return a logger that writes ``csv/metrics.csv`` in the run folder."""
    from lightning.pytorch.loggers import CSVLogger

    from kdlab.runs.spreadsheet import cell

    class Headed(CSVLogger):
        """A table whose headings, which name the terms of a loss, are never taken for formulas."""

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            super().log_metrics({str(cell(name)): value for name, value in metrics.items()}, step)

    return Headed(save_dir=str(folder), name="", version="csv")


def wandb(
    folder: str | Path,
    name: str,
    project: str = "kdlab",
    entity: str | None = None,
    group: str | None = None,
    offline: bool = False,
) -> Logger:
    """Return a Weights & Biases logger; a resumed run goes on under the same id, which is the run folder's name."""
    require("wandb")
    from lightning.pytorch.loggers import WandbLogger

    extra: dict[str, Any] = {k: v for k, v in {"entity": entity, "group": group}.items() if v is not None}
    run = f"{Path(folder).parent.name}-{Path(folder).name}"
    return WandbLogger(
        name=run,
        id=run[-64:],
        save_dir=str(folder),
        project=project,
        offline=offline,
        resume="allow",
        **extra,
    )


def mlflow(folder: str | Path, name: str, tracking_uri: str | None = None) -> Logger:
    """Return an MLflow logger: one experiment per kdlab experiment, one run per run folder."""
    require("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    return MLFlowLogger(experiment_name=name, run_name=Path(folder).name, tracking_uri=tracking_uri)


def none(folder: str | Path, name: str) -> None:
    """Return no logger: the curves go to ``curves.jsonl`` alone."""
