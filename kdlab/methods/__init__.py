"""The four LightningModules, and the learning rate that their optimizer follows."""

from kdlab.methods.finetune import FineTune
from kdlab.methods.learning_rate import LearningRate
from kdlab.methods.method import Method
from kdlab.methods.offline import OfflineKD
from kdlab.methods.self_distillation import SelfDistillation
from kdlab.methods.semi_supervised import SemiSupervisedKD

__all__ = [
    "FineTune",
    "LearningRate",
    "Method",
    "OfflineKD",
    "SelfDistillation",
    "SemiSupervisedKD",
]
