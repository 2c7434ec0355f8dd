"""Networks, and what is done to them: weights in and out, heads replaced, layers frozen, costs measured."""

from kdlab.models.cost import flops, latency_ms, parameters, size_bytes
from kdlab.models.transformers.causal_lm import CausalLM
from kdlab.models.transformers.generation import continuations
from kdlab.models.transformers.seq2seq import Seq2SeqLM
from kdlab.models.transforms.auxiliary import Exits, peers
from kdlab.models.transforms.layer_subset import blocks, cut
from kdlab.models.transforms.lora import attach_lora, merge, save_adapter
from kdlab.models.transforms.multi_task import Heads
from kdlab.models.transforms.simkd import SimKDStudent, reuse_teacher_head
from kdlab.models.transforms.steps import (
    Freeze,
    LayerSubset,
    LoadWeights,
    LoRA,
    NetworkStep,
    ReplaceHead,
    StepContext,
    TeacherHead,
)
from kdlab.models.transforms.surgery import freeze, frozen_modules, head_of, keep_frozen_eval, layer_names, replace_head
from kdlab.models.vision.mlp import MLP
from kdlab.models.vision.mobilenet import MobileNetV2
from kdlab.models.vision.normalize import Normalize
from kdlab.models.vision.resnet import BottleneckResNet, CifarResNet
from kdlab.models.vision.shufflenet import ShuffleNetV1, ShuffleNetV2
from kdlab.models.vision.vgg import VGG
from kdlab.models.vision.wrn import WideResNet
from kdlab.models.weights.checkpoint import atomic_write, load_weights, read_state, save_weights, weights_hash

__all__ = [
    "MLP",
    "VGG",
    "BottleneckResNet",
    "CausalLM",
    "CifarResNet",
    "Exits",
    "Freeze",
    "Heads",
    "LayerSubset",
    "LoRA",
    "LoadWeights",
    "MobileNetV2",
    "NetworkStep",
    "Normalize",
    "ReplaceHead",
    "Seq2SeqLM",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "SimKDStudent",
    "StepContext",
    "TeacherHead",
    "WideResNet",
    "atomic_write",
    "attach_lora",
    "blocks",
    "continuations",
    "cut",
    "flops",
    "freeze",
    "frozen_modules",
    "head_of",
    "keep_frozen_eval",
    "latency_ms",
    "layer_names",
    "load_weights",
    "merge",
    "parameters",
    "peers",
    "read_state",
    "replace_head",
    "reuse_teacher_head",
    "save_adapter",
    "save_weights",
    "size_bytes",
    "weights_hash",
]
