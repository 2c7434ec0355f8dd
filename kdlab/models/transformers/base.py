"""What networks of transformers share, whatever their kind: settings checked, models read, weights stored once."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdlab.config.trust import read_only
from kdlab.errors import UserError, unknown

PLAIN_ATTENTION = (None, "eager", "sdpa", "flex_attention")
"""Implementations of attention that are transformers' and torch's own code."""


class Transformer(nn.Module):
    """Base of the networks around a model of transformers, ``net``.

    A matrix that several layers share is stored once: it has one name in the state dict.

    Attributes:
        net: transformers' model.
        published: rules that turn the names in published files into the network's, see
            :func:`~kdlab.models.load_weights`.
    """

    net: Any

    def _adopt(self, net: Any) -> None:
        """Take ``net`` as the model."""
        self.net = net
        self._tied = dict(getattr(net, "all_tied_weights_keys", None) or {})
        self.published = self._published()

    def _published(self) -> tuple[tuple[str, str | None], ...]:
        """Return rules for transformers' names, with or without the body's prefix, and for surplus names in files."""
        body, net = self.net.base_model_prefix, self.net
        own = (net.named_children(), net.named_parameters(recurse=False), net.named_buffers(recurse=False))
        tops = "|".join(dict.fromkeys([body, *(name for part in own for name, _ in part)]))
        extra = [key.removeprefix("^") for key in net._keys_to_ignore_on_load_unexpected or ()]
        return (
            (rf"(?!net\.|(?:{tops})(?:\.|$))", f"net.{body}."),
            (r"(?!net\.)", "net."),
            *((rf"net\..*?\.{key}$", None) for key in extra if not key.startswith("net")),
            *((rf"net\.{key}$", None) for key in self._tied),
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights, each once."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in self._tied:
            state.pop(f"{prefix}net.{name}", None)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, source in self._tied.items():
            if f"{prefix}net.{source}" in state_dict:
                state_dict.setdefault(f"{prefix}net.{name}", state_dict[f"{prefix}net.{source}"])
        super()._load_from_state_dict(state_dict, prefix, *args)


def require() -> None:
    """Check that transformers is installed.

    Raises:
        UserError: if it is not; says how to get it.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError("model", "transformers is not installed", "pip install 'kdlab[text]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of the hub's client and of transformers: if something goes wrong, the error says enough."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", "httpx", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"huggingface_hub|transformers")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def connection() -> Iterator[None]:
    """Allow access to the hub; for a folder that is not trusted, only to the client's cache: no request is sent."""
    if not read_only():
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def check_attention(attention: str | None) -> None:
    """Refuse implementations of attention that may be code from the hub, for a folder that is not trusted.

    Raises:
        UserError: for such a name.
    """
    if read_only() and attention not in PLAIN_ATTENTION:
        accepted = ", ".join(str(name or "null") for name in PLAIN_ATTENTION)
        raise UserError("attention", f"{attention!r}, which may be code from the hub", accepted)


def read_pretrained(
    auto: Any, name: str, settings: Mapping[str, Any], attention: str | None, what: str = "causal language model"
) -> Any:
    """Load a model with the weights of a folder or of the hub, in float32.

    Args:
        auto: config → transformers' auto class for such a model.
        name: a folder, or a model of the hub. Code that it brings along is never run, and pickled weights go through
            PyTorch's restricted unpickler.
        settings: entries of its config to change.
        attention: transformers' implementation; None is the best it has.
        what: description of such a model in words.

    Raises:
        UserError: if it cannot be read.
    """
    with quiet(), connection():
        return _read_pretrained(auto, name, settings, attention, what)


def _read_pretrained(auto: Any, name: str, settings: Mapping[str, Any], attention: str | None, what: str) -> Any:
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    place = str(folder) if folder.is_dir() else name
    try:
        if not folder.is_dir():
            _reachable(name)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        check_settings(settings, config)
        for key, value in settings.items():
            setattr(config, key, value)
        # float32 whatever the file holds: the trainer's precision decides what is computed in
        net = auto(config).from_pretrained(
            place,
            config=config,
            attn_implementation=attention,
            dtype=torch.float32,
            weights_only=True,
            trust_remote_code=False,
        )
    except UserError:
        raise
    except Exception as error:  # of the hub's client, of transformers, of safetensors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            "name",
            f"{name} cannot be read ({lines[0]})",
            (f"a folder with config.json and model.safetensors, or a {what} of the hub (needs a network)"),
        ) from None
    return net


def _reachable(name: str) -> None:
    """Fail at once where neither cache nor hub has a model; the hub's client would try for a minute."""
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if read_only():
        raise UserError("name", f"{name} is not fetched for a folder that is not trusted", "--trust, or a folder")
    get_session().head(f"{constants.ENDPOINT}/{name}/resolve/main/config.json", timeout=10)


def check_settings(settings: Mapping[str, Any], config: Any) -> None:
    """Refuse settings that transformers would take and forget.

    Raises:
        UserError: for a key that the config does not have.
    """
    known = {key for key in (*config.to_dict(), *config.attribute_map) if not key.startswith("_")}
    for key in settings:
        if key not in known:
            raise unknown("settings", key, known, "setting")


def refused(
    architecture: object,
    settings: Mapping[str, Any],
    attention: str | None,
    error: Exception,
    context: int | None = None,
) -> UserError:
    """Return the error for settings that transformers builds no network of, or none for ``context`` tokens."""
    if context is not None and context < 2:
        return UserError("context", f"{context}, here or in data.context; {architecture} is tried with 2", "at least 2")
    if "attention implementation" in str(error):
        return UserError("attention", f"{attention}; {architecture} does not have it", "eager, or null")
    return UserError("settings", f"{dict(settings)}; {architecture} refuses them: {error}")
