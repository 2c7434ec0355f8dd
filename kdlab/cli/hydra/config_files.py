"""Option files, looked at before Hydra loads them: a small file can stand for a huge config."""

from __future__ import annotations

from pathlib import Path

import yaml
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult

from kdlab.config.options import shipped
from kdlab.errors import UserError
from kdlab.system.files import Unreadable, check_yaml, read_text

OPTION_VALUES = 20_000
"""Most values of an option file, with every alias counted as what it stands for: OmegaConf takes seconds for these."""


class CheckedRepository(ConfigRepository):
    """Hydra's option files, those of the user checked for size before they are loaded."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Load an option file, checked if it is the user's."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        # by its scheme: Hydra imports the module of its class a second time
        if source is not None and source.scheme() == "file" and Path(source.path) != shipped():
            check(Path(source.path) / source._normalize_file_name(config_path))
        return super().load_config(config_path)


def check(path: Path) -> None:
    """Refuse an option file that is deep, recursive or huge; what else is wrong with it, Hydra says.

    Raises:
        UserError: naming the file.
    """
    try:
        check_yaml(read_text(path), OPTION_VALUES)
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(path, f"cannot be read ({reason})", "an option file in YAML") from None
    except yaml.YAMLError:
        pass
