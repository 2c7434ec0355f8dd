"""Floor 1: the terms of the objective, and the objective that weighs them."""

from kdlab.losses.features import AttentionTransfer, Hint, LayerTerm
from kdlab.losses.labels import CrossEntropy
from kdlab.losses.language import ULD, HiddenCosine
from kdlab.losses.objective import Losses, Objective
from kdlab.losses.soft import (
    DKD,
    JSD,
    KL,
    Divergence,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SoftTerm,
    SymmetricKL,
    TotalVariation,
)
from kdlab.losses.temperature import LearnedTemperature, StandardizedTemperature, Temperature
from kdlab.losses.term import LabelTerm, Role, Term

__all__ = [
    "DKD",
    "JSD",
    "KL",
    "ULD",
    "AttentionTransfer",
    "CrossEntropy",
    "Divergence",
    "HiddenCosine",
    "Hint",
    "LabelTerm",
    "LayerTerm",
    "LearnedTemperature",
    "LogitMSE",
    "Losses",
    "Objective",
    "ReverseKL",
    "Role",
    "SkewKL",
    "SkewReverseKL",
    "SoftTerm",
    "StandardizedTemperature",
    "SymmetricKL",
    "Temperature",
    "Term",
    "TotalVariation",
]
