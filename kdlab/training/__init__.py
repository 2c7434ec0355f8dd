"""How a method is trained: one fit, its trainer, checkpoints and progress."""

from kdlab.training.evaluation import evaluate
from kdlab.training.fitting import Fitted, fit
from kdlab.training.trainer import Training

__all__ = ["Fitted", "Training", "evaluate", "fit"]
