"""Floor 1: the terms of the objective, and the objective that weighs them."""

from kdlab.losses.adversarial import Discriminator
from kdlab.losses.boundaries import OFD, ActivationBoundary
from kdlab.losses.branches import OFA
from kdlab.losses.consistency import Consistency
from kdlab.losses.contrast import CRD
from kdlab.losses.correlation import DISTInter, DISTIntra, MLLDBatch, MLLDClass, MLLDInstance
from kdlab.losses.decoupled import DKD, NKD
from kdlab.losses.exits import ExitsCE, ExitsHint, ExitsKL
from kdlab.losses.factors import VID, FactorTransfer
from kdlab.losses.features import AttentionTransfer, Hint, LayerTerm
from kdlab.losses.labels import CrossEntropy
from kdlab.losses.language import ULD, HiddenCosine
from kdlab.losses.maps import FSP, NST
from kdlab.losses.mutual import MutualKL, PeersCE
from kdlab.losses.objective import Losses, Objective
from kdlab.losses.partners import LastStepKL, PartnerKL
from kdlab.losses.relations import (
    ChannelCorrelation,
    CorrelationCongruence,
    ProbabilisticTransfer,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
)
from kdlab.losses.reuse import SRRL, SimKD
from kdlab.losses.review import ReviewKD
from kdlab.losses.several import MultiTeacherKL
from kdlab.losses.soft import (
    JSD,
    KL,
    WSLD,
    Divergence,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SoftTerm,
    SymmetricKL,
    TotalVariation,
)
from kdlab.losses.svd import KDSVD
from kdlab.losses.teacher_free import USKD, ConfidencePenalty, TfKD
from kdlab.losses.temperature import LearnedTemperature, StandardizedTemperature, Temperature
from kdlab.losses.term import LabelTerm, Role, Rows, Term

__all__ = [
    "CRD",
    "DKD",
    "FSP",
    "JSD",
    "KDSVD",
    "KL",
    "NKD",
    "NST",
    "OFA",
    "OFD",
    "SRRL",
    "ULD",
    "USKD",
    "VID",
    "WSLD",
    "ActivationBoundary",
    "AttentionTransfer",
    "ChannelCorrelation",
    "ConfidencePenalty",
    "Consistency",
    "CorrelationCongruence",
    "CrossEntropy",
    "DISTInter",
    "DISTIntra",
    "Discriminator",
    "Divergence",
    "ExitsCE",
    "ExitsHint",
    "ExitsKL",
    "FactorTransfer",
    "HiddenCosine",
    "Hint",
    "LabelTerm",
    "LastStepKL",
    "LayerTerm",
    "LearnedTemperature",
    "LogitMSE",
    "Losses",
    "MLLDBatch",
    "MLLDClass",
    "MLLDInstance",
    "MultiTeacherKL",
    "MutualKL",
    "Objective",
    "PartnerKL",
    "PeersCE",
    "ProbabilisticTransfer",
    "RKDAngle",
    "RKDDistance",
    "ReverseKL",
    "ReviewKD",
    "Role",
    "Rows",
    "SimKD",
    "SimilarityPreserving",
    "SkewKL",
    "SkewReverseKL",
    "SoftTerm",
    "StandardizedTemperature",
    "SymmetricKL",
    "Temperature",
    "Term",
    "TfKD",
    "TotalVariation",
]
