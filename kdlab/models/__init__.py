"""Networks, and what is done to them: weights in and out, heads replaced, layers frozen, costs measured."""

from kdlab.models.adapters import lora, merge, save_adapter
from kdlab.models.checkpoint import atomic_write, load_weights, read_state, save_weights, weights_hash
from kdlab.models.cut import blocks, cut
from kdlab.models.decode import continuations
from kdlab.models.heads import Heads
from kdlab.models.language import CausalLM
from kdlab.models.measure import flops, latency_ms, parameters, size_bytes
from kdlab.models.mlp import MLP
from kdlab.models.mobilenet import MobileNetV2
from kdlab.models.normalize import Normalize
from kdlab.models.resnet import BottleneckResNet, CifarResNet
from kdlab.models.reused import Reused, reuse_classifier
from kdlab.models.seq2seq import Seq2SeqLM
from kdlab.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from kdlab.models.surgery import freeze, frozen_modules, head_of, keep_frozen_eval, layer_names, replace_head
from kdlab.models.vgg import VGG
from kdlab.models.wrn import WideResNet

__all__ = [
    "MLP",
    "VGG",
    "BottleneckResNet",
    "CausalLM",
    "CifarResNet",
    "Heads",
    "MobileNetV2",
    "Normalize",
    "Reused",
    "Seq2SeqLM",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "WideResNet",
    "atomic_write",
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
    "lora",
    "merge",
    "parameters",
    "read_state",
    "replace_head",
    "reuse_classifier",
    "save_adapter",
    "save_weights",
    "size_bytes",
    "weights_hash",
]
