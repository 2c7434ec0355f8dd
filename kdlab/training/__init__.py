"""Training of a method: one fit, its trainer, checkpoints and progress."""

from kdlab.training.evaluation import evaluate
from kdlab.training.fitting import FitResult, fit
from kdlab.training.trainer import TrainerConfig

__all__ = ["FitResult", "TrainerConfig", "evaluate", "fit"]
