"""LoRA adapters, through peft: small matrices beside the network's own, which stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kdlab.errors import UserError, unknown
from kdlab.ranges import share, whole_number
from kdlab.system.files import atomic_write

ADAPTER = "default"
_TRAINED = "_kdlab_trained_before_lora"


def attach_lora(
    net: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> list[str]:
    r"""Give layers of ``net`` low-rank adapters, in place; from then on only those train.

    .. math:: h = W x + \frac{\alpha}{r} B A x, \quad A \in R^{r \times d}, B \in R^{k \times r}, B = 0 \text{ at first}

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022. The names of layers stay, so that taps
    and layer pairs hold; a wrapped layer keeps its own weights in ``base_layer``.

    Args:
        net: a network of transformers (``CausalLM``, ``Seq2SeqLM``), or any other.
        rank: rank r of the adapters.
        alpha: scale; alpha / r multiplies the adapters.
        dropout: dropout on the adapters' inputs.
        targets: the layers, by their paths or the ends of them (``c_attn``, ``q_proj``); None is peft's choice for the
            architecture, or else every linear layer but the output.

    Returns:
        The names of the parameters that train.

    Raises:
        UserError: for values out of range, a target that ``net`` does not have, adapters already there, or no peft.
    """
    whole_number("rank", rank)
    share("dropout", dropout, one=False)
    inner = _inner(net)
    if _adapted(inner):
        raise UserError("lora", "the network has adapters already", "a network without, or merge them first")
    peft = _peft()
    chosen = _targets(net, inner, targets, peft)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    # fan_in_fan_out: whether a layer stores its matrix transposed; peft sets it itself, layer by layer, with a warning
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)
    try:
        peft.inject_adapter_in_model(_with_layout(config, inner), inner, ADAPTER)
    except ValueError as error:
        raise UserError("targets", f"{chosen}; peft refuses them: {error}") from None
    setattr(inner, _TRAINED, trained)
    return [name for name, p in net.named_parameters() if p.requires_grad]


def merge(net: nn.Module) -> None:
    """Add the adapters into the matrices they stand beside: the plain network again, in place, the same function.

    Raises:
        UserError: there are no adapters, or one is not finite.
    """
    inner = _inner(net)
    layers = _adapted(inner)
    if not layers:
        raise UserError("lora", "the network has no adapters to merge", "one that attach_lora() was called on")
    for name, layer in layers.items():
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError("lora", f"{name} cannot be merged: {error}") from None
        base = layer.get_base_layer()
        base.train(layer.training)
        inner.set_submodule(name, base)
    trained = set(getattr(inner, _TRAINED, ()))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained)
    for attribute in (_TRAINED, "peft_config"):
        if hasattr(inner, attribute):
            delattr(inner, attribute)


def save_adapter(net: nn.Module, folder: str | Path) -> Path:
    """Write the adapters as a PEFT folder, which ``PeftModel.from_pretrained(plain_model, folder)`` reads.

    Raises:
        UserError: there are no adapters.
    """
    inner = _inner(net)
    if not _adapted(inner):
        raise UserError("lora", "the network has no adapters to save", "one that attach_lora() was called on")
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = _peft().get_peft_model_state_dict(inner, adapter_name=ADAPTER, save_embedding_layers=False)
    # PeftModel holds the network at this path
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config: Any = inner.peft_config
    config[ADAPTER].save_pretrained(str(folder))
    with atomic_write(folder / "adapter_model.safetensors") as file:
        file.write(save(named, metadata={"format": "pt"}))
    return folder


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("lora", "peft is not installed", "pip install 'kdlab[text]'") from None
    return peft


def _inner(net: nn.Module) -> nn.Module:
    """Return the network that peft sees: transformers' own inside kdlab's, so that others can read the adapter."""
    inner = getattr(net, "net", None)
    return inner if isinstance(inner, nn.Module) and hasattr(inner, "config") else net


def _adapted(inner: nn.Module) -> dict[str, Any]:
    """Return the layers that have adapters, by path."""
    return {name: m for name, m in inner.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")}


def _targets(net: nn.Module, inner: nn.Module, targets: Sequence[str] | None, peft: Any) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PUBLISHED

    kinds = _kinds()
    known = [name for name, module in inner.named_modules() if isinstance(module, kinds) and name]
    if targets is None:
        kind = getattr(getattr(inner, "config", None), "model_type", None)
        if kind is None:
            raise UserError("targets", "missing", f"names of layers, such as {', '.join(known[:5])}")
        if kind in PUBLISHED:
            return list(PUBLISHED[kind])
        output = getattr(inner, "get_output_embeddings", lambda: None)()
        return sorted({n.rpartition(".")[2] for n in known if inner.get_submodule(n) is not output})
    prefix = "" if inner is net else "net."
    chosen = [target.removeprefix(prefix) for target in targets]
    if not chosen:
        raise UserError("targets", "[]", f"names of layers, such as {', '.join(known[:5])}")
    for target in chosen:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            ends = dict.fromkeys([name.rpartition(".")[2] for name in known] + known)
            raise unknown("targets", target, ends, "layer")
    for name in known:
        if any(name == target or name.endswith(f".{target}") for target in chosen) and _shared(inner, name):
            raise UserError(
                "targets",
                (f"{name} shares its matrix with another layer, which an adapter merged into it would change"),
                "layers with a matrix of their own",
            )
    return chosen


def _shared(inner: nn.Module, name: str) -> bool:
    """Return whether a layer's weight is another layer's too, as that of tied embeddings is."""
    weight = inner.get_submodule(name).weight
    return sum(getattr(module, "weight", None) is weight for module in inner.modules()) > 1


def _kinds() -> tuple[type[nn.Module], ...]:
    """Return the classes of layers that LoRA is for."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:  # peft without transformers cannot be, but a plain network needs neither
        return kinds
    return (*kinds, Conv1D)


def _with_layout(config: Any, inner: nn.Module) -> Any:
    """Adapt ``config`` to networks whose matrices are stored transposed (GPT-2's ``Conv1D``)."""
    targets = tuple(config.target_modules)
    aimed = [m for n, m in inner.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)]
    config.fan_in_fan_out = any(type(module).__name__ == "Conv1D" for module in aimed)
    return config
