"""Encoder-decoder networks of transformers: text to text (T5, BART) and speech to text (Whisper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdlab.errors import UserError, unknown
from kdlab.functional import Projected
from kdlab.models.transformers.base import (
    Transformer,
    check_attention,
    check_settings,
    connection,
    read_pretrained,
    refused,
)
from kdlab.models.transforms.layer_subset import blocks

STACKS = ("longt5", "mt5", "t5", "umt5")
"""Architectures whose network holds encoder and decoder itself, and may rescale before its output matrix."""

WRAPPED = ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "whisper")
"""Architectures whose network is ``model``, then the output matrix, then perhaps ``final_logits_bias``."""


class Seq2SeqLM(Transformer):
    """Encoder-decoder language model of transformers, built from its config or read from a folder or the hub.

    What it returns has not been multiplied by the output matrix: losses and measures do that a few rows at a time.
    Architectures that are not known to end in one matrix return dense logits instead; the values are transformers' own
    in either case.

    The decoder reads ``start, t1, t2, ...`` as the data hands it over; nothing is shifted here.

    Args:
        architecture: a ``model_type`` of transformers, such as ``t5``, ``bart`` or ``whisper``; not used with a
            ``name``.
        settings: values of the architecture's config, under transformers' names (``d_model``, ``encoder_layers``, ...).
            They win over what the other arguments say. What is not set has transformers' default (T5: dropout 0.1).
        name: a folder, or a model of the hub, to read config and weights from. Code that a repository brings along is
            never run, and pickled weights go through PyTorch's restricted unpickler.
        vocab_size: tokens of the data; a model that is read may have more, never fewer.
        context: positions of the decoder, where an architecture has a table of them (BART: of the encoder too).
        eos_id: end-of-text id of the tokenizer; also the decoder's start token, which the data puts first.
        pad_id: padding id of the tokenizer.
        mels: bands of the features, of an architecture that reads speech.
        frames: frames of these features.
        attention: transformers' implementation: ``sdpa``, ``eager``, ``flash_attention_2``; None is the best it has.

    Shape: decoder_input_ids (B, T) to :class:`~kdlab.functional.Projected` with hidden (B, T, d), or logits (B, T, V).

    Attributes:
        net: transformers' model.
        speech: true if it reads ``input_features`` rather than ``input_ids``.
        context: greatest number of positions of its decoder; None where there is no limit.
        tokenizer_name: folder or name of the tokenizer of a model that was read; None for fresh ones.

    Raises:
        UserError: for an architecture, a setting or a model that is not there, or does not fit the data.
    """

    def __init__(
        self,
        architecture: str | None = "t5",
        settings: Mapping[str, Any] | None = None,
        name: str | None = None,
        vocab_size: int | None = None,
        context: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        mels: int | None = None,
        frames: int | None = None,
        attention: str | None = None,
    ) -> None:
        super().__init__()
        settings = dict(settings or {})
        check_attention(attention)
        if name is not None:
            net = read_pretrained(_auto, name, settings, attention, "encoder-decoder model")
        else:
            if vocab_size is None:
                raise UserError("vocab_size", "missing", "the number of tokens, which text data give")
            offered = {
                "vocab_size": vocab_size,
                "max_target_positions": context,
                "max_position_embeddings": context,
                "num_mel_bins": mels,
                "max_source_positions": None if frames is None else frames // 2,
            }
            with connection():
                net = _build(architecture, settings, offered, eos_id, attention)
        _train_pads(net)
        self._adopt(net)
        self.tokenizer_name = name
        self.eos_id, self.pad_id = eos_id, pad_id
        self.speech = net.main_input_name == "input_features"
        config = net.config
        table = (getattr(config, key, None) for key in ("max_target_positions", "max_position_embeddings"))
        self.context: int | None = next((size for size in table if isinstance(size, int)), None)
        self._fits(name or str(architecture), vocab_size, context, mels, frames)

    def _fits(
        self, name: str, vocab_size: int | None, context: int | None, mels: int | None, frames: int | None
    ) -> None:
        """Say at once that the data do not fit, rather than at the first batch."""
        config = self.net.config
        if vocab_size is not None and config.vocab_size < vocab_size:
            raise UserError(
                "vocab_size",
                f"{name} has {config.vocab_size} tokens, the data {vocab_size}",
                "at least as many, of the same tokenizer",
            )
        if self.context is not None and context is not None and self.context < context:
            raise UserError(
                "context", f"{name} has {self.context} positions, the data {context}", f"at most {self.context}"
            )
        if self.speech and mels is not None and getattr(config, "num_mel_bins", mels) != mels:
            raise UserError("mels", f"{name} reads {config.num_mel_bins}, the data have {mels}", "the same")
        if config.model_type == "whisper" and frames is not None and config.max_source_positions * 2 != frames:
            raise UserError(
                "frames",
                f"{name} reads {config.max_source_positions * 2}, the data have {frames}",
                f"the same, which data.seconds={config.max_source_positions / 50:g} makes",
            )

    @property
    def layers(self) -> list[str]:
        """The paths of the blocks of encoder and decoder, first to last, as ``Taps`` and layer pairs take them."""
        return [f"{path}.{i}" for path, stack in blocks(self).items() for i in range(len(stack))]

    def forward(
        self,
        decoder_input_ids: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
    ) -> Projected | Tensor:
        """Compute the logits of all decoder positions.

        Args:
            decoder_input_ids: (B, T) int64, padded on the right: causal attention keeps pads out.
            input_ids: (B, S) int64, what the encoder reads; or
            input_features: (B, mels, frames), of an architecture that reads speech.
            attention_mask: (B, S), zero where the encoder's input is a pad; None where nothing is padded.

        Raises:
            UserError: if it is given text and reads speech, or the other way round, or more than it has positions for.
        """
        encoded = self.encode(input_ids, attention_mask, input_features)
        return self.decode(decoder_input_ids, encoded, attention_mask)[0]

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
    ) -> Any:
        """Run the encoder once for any number of :meth:`decode`; arguments as in :meth:`forward`.

        Returns:
            transformers' output, whose first entry is (B, S', d).
        """
        source = input_features if self.speech else input_ids
        config = self.net.config
        if source is None:
            reads, held = ("speech", "text") if self.speech else ("text", "speech")
            raise UserError("data", f"{held}, and {config.model_type} reads {reads}", f"a network for {held}")
        if self.speech:
            source = source.to(self.net.dtype)
        elif (limit := getattr(config, "max_position_embeddings", None)) is not None and source.shape[1] > limit:
            raise UserError(
                "context",
                (f"{config.model_type} has {limit} positions, and a source of the data {source.shape[1]} tokens"),
                f"settings.max_position_embeddings={source.shape[1]} or more",
            )
        return self.net.get_encoder()(source, attention_mask=attention_mask, return_dict=True)

    def decode(
        self,
        decoder_input_ids: Tensor,
        encoded: Any,
        attention_mask: Tensor | None = None,
        past: Any = None,
    ) -> tuple[Projected | Tensor, Any]:
        """Compute the logits of ``decoder_input_ids``, which follow what ``past`` has seen.

        Args:
            decoder_input_ids: (B, T) int64.
            encoded: output of :meth:`encode` for the same B inputs.
            attention_mask: (B, S), the encoder's.
            past: None keeps none; else :meth:`cache`'s, which grows in place.

        Returns:
            logits as :meth:`forward`'s, and ``past``.
        """
        given: dict[str, Any] = {"past_key_values": past, "use_cache": past is not None, "return_dict": True}
        kind = self.net.config.model_type
        if kind in STACKS:
            hidden = self.net.decoder(
                decoder_input_ids,
                encoder_hidden_states=encoded[0],
                encoder_attention_mask=attention_mask,
                **given,
            )[0]
            hidden = hidden * self.net.config.d_model**-0.5 if self._rescales() else hidden
        else:
            given.update(encoder_outputs=encoded, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids)
            if kind not in WRAPPED:
                return self.net(**given).logits, past
            hidden = self.net.model(**given)[0]
        head = self.net.get_output_embeddings()
        if type(head) is not nn.Linear:  # an adapter makes it more than its matrix
            extra = getattr(self.net, "final_logits_bias", 0.0)
            return head(hidden) + extra, past
        bias = getattr(self.net, "final_logits_bias", None)
        return Projected(hidden, head.weight, head.bias if bias is None else bias[0]), past

    def _rescales(self) -> bool:
        """Return whether a T5-like network scales by d^-0.5 before its output matrix, which is also its embedding."""
        config = self.net.config
        if config.model_type == "mt5":
            return False
        return bool(config.tie_word_embeddings if config.model_type == "umt5" else config.scale_decoder_outputs)

    @staticmethod
    def cache() -> Any:
        """Return an empty past for :meth:`decode`."""
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _build(
    architecture: str | None,
    settings: dict[str, Any],
    offered: Mapping[str, Any],
    eos_id: int | None,
    attention: str | None,
) -> Any:
    """Build a network with fresh weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as WRITTEN
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES as SPOKEN

    if architecture is None or architecture not in {*WRITTEN, *SPOKEN}:
        raise unknown("architecture", architecture, {*STACKS, *WRAPPED}, "architecture")
    try:
        plain = AutoConfig.for_model(architecture)
        check_settings(settings, plain)
        known = plain.to_dict()
        renamed = {plain.attribute_map.get(key, key): value for key, value in settings.items()}
        chosen = {key: value for key, value in offered.items() if key in known and value is not None}
        ends = ("eos_token_id", "bos_token_id", "decoder_start_token_id")
        special = {} if eos_id is None else dict.fromkeys(ends, eos_id)
        config = AutoConfig.for_model(
            architecture, **{**special, "pad_token_id": None, "forced_eos_token_id": None, **chosen, **renamed}
        )
        return _auto(config).from_config(config, attn_implementation=attention)
    except UserError:
        raise
    except Exception as error:  # each architecture refuses in its own way
        raise refused(architecture, settings, attention, error) from None


def _auto(config: Any) -> Any:
    """Return the class of transformers that makes such a network."""
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES as SPOKEN

    return AutoModelForSpeechSeq2Seq if config.model_type in SPOKEN else AutoModelForSeq2SeqLM


def _train_pads(net: nn.Module) -> None:
    """Let embeddings learn the pad's row: here the pad is usually the end of text, and starts the decoder too."""
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
