"""The terms of the objective, and the objective that weighs them."""

from kdlab.losses.feature.ab import ActivationBoundary
from kdlab.losses.feature.attention import AttentionTransfer
from kdlab.losses.feature.factor_transfer import FactorTransfer
from kdlab.losses.feature.fitnets import Hint
from kdlab.losses.feature.fsp import FSP
from kdlab.losses.feature.hidden_states import HiddenCosine
from kdlab.losses.feature.layer_term import LayerTerm
from kdlab.losses.feature.nst import NST
from kdlab.losses.feature.ofa import OFA
from kdlab.losses.feature.ofd import OFD
from kdlab.losses.feature.review import ReviewKD
from kdlab.losses.feature.simkd import SimKD
from kdlab.losses.feature.srrl import SRRL
from kdlab.losses.feature.svd import KDSVD
from kdlab.losses.feature.vid import VID
from kdlab.losses.objective import Losses, Objective
from kdlab.losses.online.byot import ExitsCE, ExitsHint, ExitsKL
from kdlab.losses.online.cs_kd import CSKD
from kdlab.losses.online.dlb import DLB
from kdlab.losses.online.mutual import MutualKL, PeersCE
from kdlab.losses.relation.correlation_congruence import CorrelationCongruence
from kdlab.losses.relation.crd import CRD
from kdlab.losses.relation.ickd import ChannelCorrelation
from kdlab.losses.relation.pkt import ProbabilisticTransfer
from kdlab.losses.relation.rkd import RKDAngle, RKDDistance
from kdlab.losses.relation.similarity import SimilarityPreserving
from kdlab.losses.response.adversarial import Discriminator
from kdlab.losses.response.consistency import Consistency
from kdlab.losses.response.cross_entropy import CrossEntropy
from kdlab.losses.response.dist import DISTInter, DISTIntra
from kdlab.losses.response.divergence import (
    JSD,
    KL,
    Divergence,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from kdlab.losses.response.dkd import DKD
from kdlab.losses.response.mlld import MLLDBatch, MLLDClass, MLLDInstance
from kdlab.losses.response.multi_teacher import MultiTeacherKL
from kdlab.losses.response.nkd import NKD
from kdlab.losses.response.soft_term import SoftTerm
from kdlab.losses.response.teacher_free import ConfidencePenalty, TfKD
from kdlab.losses.response.uld import ULD
from kdlab.losses.response.uskd import USKD
from kdlab.losses.response.wsld import WSLD
from kdlab.losses.temperature import LearnedTemperature, StandardizedTemperature, Temperature
from kdlab.losses.term import LabelTerm, Role, Rows, Term

__all__ = [
    "CRD",
    "CSKD",
    "DKD",
    "DLB",
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
