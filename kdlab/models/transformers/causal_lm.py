"""Causal language models of transformers: built from a config, or read from a folder or the hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlab.errors import UserError, unknown
from kdlab.functional import Projected
from kdlab.functional.modes import eval_mode
from kdlab.models.transformers.base import (
    Transformer,
    check_attention,
    check_settings,
    connection,
    read_pretrained,
    refused,
    require,
)
from kdlab.models.transforms.layer_subset import blocks

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""Names of the number of positions in the configs of transformers."""

PROBE = 1000.0
"""Factor on hidden states in the test of an output layer: a soft cap is the identity near zero."""


class CausalLM(Transformer):
    """Causal (decoder-only) language model of transformers.

    What it returns has not been multiplied by the output matrix: losses and measures do that a few rows at a time.
    Where a model changes the logits afterwards (soft caps, scaling), they come dense instead, as transformers makes
    them.

    A matrix that input and output share is stored once: it has one name in the state dict.

    Args:
        architecture: a ``model_type`` of transformers, such as ``gpt2``, ``llama``, ``qwen3``, ``gpt_neox``; not used
            with a ``name``.
        settings: values of the architecture's config, under transformers' names (``n_layer``, ``hidden_size``, ...).
            They win over what the other arguments say. What is not set has transformers' default (GPT-2: dropout 0.1).
        name: a folder, or a model of the hub, to read config and weights from. Code that a repository brings along is
            never run, and pickled weights go through PyTorch's restricted unpickler.
        vocab_size: tokens of the data; a model that is read may have more, never fewer.
        context: positions, the longest input; None is the architecture's default.
        eos_id: end-of-text id of the tokenizer.
        pad_id: padding id of the tokenizer.
        attention: transformers' implementation: ``sdpa``, ``eager``, ``flash_attention_2``; None is the best it has.

    Shape: input_ids (B, T) to :class:`~kdlab.functional.Projected` with hidden (B, T, d), or logits (B, T, V).

    Layers to tap: ``layers``, for GPT-2 ``net.transformer.h.0``, ``net.transformer.h.1``, ..., each (B, T, d).

    Attributes:
        net: transformers' model.
        context: the longest input it takes; None where there is no limit.
        cached: true if :meth:`step` can keep what it has computed.
        tokenizer_name: folder or name of the tokenizer of a model that was read; None for fresh ones.

    Raises:
        UserError: for an architecture, a setting or a model that is not there, or does not fit the data.
    """

    def __init__(
        self,
        architecture: str | None = "gpt2",
        settings: Mapping[str, Any] | None = None,
        name: str | None = None,
        vocab_size: int | None = None,
        context: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        attention: str | None = None,
    ) -> None:
        super().__init__()
        require()
        settings = dict(settings or {})
        if name is None and vocab_size is None:
            raise UserError("vocab_size", "missing", "the number of tokens, which text data give")
        # No pad token: nn.Embedding would never train its row, and here it is usually the end of text.
        special = {"eos_token_id": eos_id, "bos_token_id": eos_id, "pad_token_id": None}
        check_attention(attention)
        with connection():
            if name is not None:
                net = _read(name, settings, attention)
            else:
                net = _build(architecture, settings, {"vocab_size": vocab_size, **special}, context, attention)
        self._adopt(net)
        self.tokenizer_name = name
        self.eos_id, self.pad_id = eos_id, pad_id
        self.context = self._limit(vocab_size, context, name or str(architecture))
        body = inspect.signature(self.net.base_model.forward).parameters
        self._positions = "position_ids" in body
        self.cached = "past_key_values" in body
        try:
            self._check_causal(name or str(architecture))
            self._plain = self._ends_in_a_matrix()
        except UserError:
            raise
        except Exception as error:  # settings that a config accepts and a forward pass does not
            raise refused(name or str(architecture), settings, attention, error, self.context) from None

    def _limit(self, vocab_size: int | None, context: int | None, name: str) -> int | None:
        """Return the longest input, after a check that the data fit."""
        config = self.net.config
        if vocab_size is not None and config.vocab_size < vocab_size:
            raise UserError(
                "vocab_size",
                f"{name} has {config.vocab_size} tokens, the data {vocab_size}",
                "at least as many, of the same tokenizer",
            )
        limit = next((n for key in POSITIONS if isinstance(n := getattr(config, key, None), int)), None)
        if limit is not None and context is not None and limit < context:
            raise UserError("context", f"{name} has {limit} positions, the data {context}", f"at most {limit}")
        return limit

    @property
    def layers(self) -> list[str]:
        """The paths of the blocks, first to last, as ``Taps`` and layer pairs take them."""
        return [f"{path}.{i}" for path, stack in blocks(self).items() for i in range(len(stack))]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Projected | Tensor:
        """Compute the logits of all positions.

        Args:
            input_ids: (B, T) int64, padded on the right: causal attention keeps pads out.
            position_ids: (B, T); they restart at 0 where a row of the batch holds several sequences, which then do
                not see each other. None counts from 0.
            attention_mask: (B, T), zero where an input is a pad; needed only for pads on the left.

        Raises:
            UserError: if several sequences share a row and the architecture has no position ids to say so.
        """
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return self._run(self._placed(given, position_ids))[0]

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Any = None
    ) -> tuple[Tensor, Any]:
        """Compute the logits of the token that follows, with all that came before in a cache.

        Args:
            input_ids: (B, n) int64, the tokens that follow ``past``.
            attention_mask: (B, m + n), zero where an input, past ones included, is a pad.
            position_ids: (B, n).
            past: None at first, then the past that the last call returned.

        Returns:
            logits (B, V) after the last input, and the past that includes this call's.
        """
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": True}
        given["past_key_values"] = past
        if self._positions:
            given["position_ids"] = position_ids
        logits, past = self._run(given)
        if isinstance(logits, Projected):
            logits = replace(logits, hidden=logits.hidden[:, -1:]).dense()
        return logits[:, -1], past

    def _run(self, given: Mapping[str, Any]) -> tuple[Projected | Tensor, Any]:
        head = self.net.get_output_embeddings()
        # an adapter at the output layer makes it more than its matrix
        if not self._plain or type(head) is not nn.Linear:
            out = self.net(**given, return_dict=True)
            return out.logits, getattr(out, "past_key_values", None)
        out = self.net.base_model(**given, return_dict=True)
        return Projected(out.last_hidden_state, head.weight, head.bias), getattr(out, "past_key_values", None)

    def _placed(self, given: dict[str, Any], position_ids: Tensor | None) -> dict[str, Any]:
        if position_ids is None:
            return given
        if self._positions:
            return {**given, "position_ids": position_ids}
        if position_ids.shape[-1] > 1 and bool((position_ids.diff(dim=-1) != 1).any()):
            raise UserError(
                "data.pack",
                (f"true; {self.net.config.model_type} has no position ids to keep packed sequences apart"),
                "false",
            )
        return given

    @torch.no_grad()
    def _check_causal(self, name: str) -> None:
        """Refuse encoders, which transformers counts as causal models: they see the tokens that they are to predict."""
        ids = self.net.get_input_embeddings().weight.new_tensor([[0, 0], [0, 1]]).long() % self.net.config.vocab_size
        with eval_mode(self.net):
            first = self.net(input_ids=ids, use_cache=False, return_dict=True).logits[:, 0]
        if not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-3 * float(first.abs().max())):
            raise UserError("architecture", f"{name} reads what follows a token", "causal models (is_decoder: true)")

    @torch.no_grad()
    def _ends_in_a_matrix(self) -> bool:
        """Return whether the logits are the last hidden states times the output matrix, and nothing more.

        Tried rather than looked up: configs have a dozen names for what models do to their logits.
        """
        head = self.net.get_output_embeddings()
        if type(head) is not nn.Linear:
            return False
        seen: list[Tensor] = []

        def enlarge(_module: nn.Module, _args: tuple, out: Any) -> Any:
            out["last_hidden_state"] = out["last_hidden_state"] * PROBE
            seen.append(out["last_hidden_state"])
            return out

        handle = self.net.base_model.register_forward_hook(enlarge)
        try:
            ids = torch.arange(min(2, self.net.config.vocab_size), device=head.weight.device)[None]
            with eval_mode(self.net):
                logits = self.net(input_ids=ids, use_cache=False, return_dict=True).logits
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0].shape[-1] != head.in_features:
            return False
        expected = F.linear(seen[0], head.weight, head.bias)
        return bool(torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())))


def _build(
    architecture: str | None, settings: dict[str, Any], offered: dict[str, Any], context: int | None, attention: Any
) -> Any:
    """Build a network with fresh weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if architecture is None or architecture not in KNOWN:
        raise unknown("architecture", architecture, KNOWN, "architecture")
    try:
        plain = AutoConfig.for_model(architecture)
        check_settings(settings, plain)
        if context is not None:
            offered = offered | {key: context for key in POSITIONS if key in plain.to_dict()}
        renamed = {plain.attribute_map.get(key, key): value for key, value in settings.items()}
        config = AutoConfig.for_model(architecture, **{**offered, **renamed})
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except UserError:
        raise
    except Exception as error:  # each architecture refuses in its own way
        raise refused(architecture, settings, attention, error) from None


def _read(name: str, settings: dict[str, Any], attention: str | None) -> Any:
    """Load a network with the weights of a folder or of the hub."""
    from transformers import AutoModelForCausalLM

    net = read_pretrained(lambda config: AutoModelForCausalLM, name, settings, attention)
    tokens: Any = net.get_input_embeddings()
    if getattr(tokens, "padding_idx", None) is not None:
        tokens.padding_idx = None  # where the end of text pads too, it would never be trained
    return net
