"""Tab completion for the console script: ``eval "$(kdlab -sc install=bash)"``."""

from __future__ import annotations

from collections.abc import Sequence

from kdlab.cli.hydra.compose import CONFIG, composer


def complete(words: Sequence[str]) -> int:
    """Let Hydra install its completion, remove it, or answer: ``install=bash`` and the like."""
    from hydra.core.global_hydra import GlobalHydra

    with composer():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.shell_completion(CONFIG, list(words))
    return 0
