"""Floor 3: the LightningModules, and how they are trained."""

from kdlab.methods.finetune import FineTune
from kdlab.methods.fit import Fitted, evaluate, fit
from kdlab.methods.learning_rate import LearningRate
from kdlab.methods.method import Method
from kdlab.methods.offline import OfflineKD
from kdlab.methods.self_distillation import SelfDistillation
from kdlab.methods.semi_supervised import SemiSupervisedKD
from kdlab.methods.training import Training

__all__ = [
    "FineTune",
    "Fitted",
    "LearningRate",
    "Method",
    "OfflineKD",
    "SelfDistillation",
    "SemiSupervisedKD",
    "Training",
    "evaluate",
    "fit",
]
