"""All uses of Hydra and OmegaConf beyond their documented interfaces, in one place.

A test fails where a version moves it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from hydra._internal import core_plugins
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from kdlab.config.options import shipped
from kdlab.errors import UserError
from kdlab.system.files import Unreadable, check_yaml, read_text

# ---- loading

OPTION_VALUES = 20_000
"""Largest number of values in an option file, aliases counted as what they stand for: it takes OmegaConf seconds."""


class CheckedRepository(ConfigRepository):
    """Repository of Hydra's option files, those of the user checked for size before they are loaded."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Load an option file, checked if it is the user's."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        # by its scheme: Hydra imports the module of its class a second time
        if source is not None and source.scheme() == "file" and Path(source.path) != shipped():
            check_option_file(Path(source.path) / source._normalize_file_name(config_path))
        return super().load_config(config_path)


def check_option_file(path: Path) -> None:
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


PATHS = "kdlab"
"""Key of the option files of a config, noted among the choices that Hydra records; it forgets those in lists."""


class Loader(ConfigLoaderImpl):
    """Hydra's config loader, which also notes which files a config is made of."""

    tree: DictConfig | None = None
    """The last config, as far as it got: with the options, and the values up to one that was refused."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = CheckedRepository(config_search_path)

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        self.tree = super()._compose_config_from_defaults_list(defaults, repo)
        if any(default.config_path == "teacher/none" for default in defaults):
            self.tree.teacher = None  # whatever else an experiment says of its teacher
        self.tree.hydra.runtime.choices[PATHS] = [[d.config_path, d.parent] for d in defaults if d.config_path]
        return self.tree

    @staticmethod
    def set_values(overrides: Sequence[Override], tree: DictConfig) -> None:
        """Apply overrides that choose no options to a composed config."""
        ConfigLoaderImpl._apply_overrides_to_config(list(overrides), tree)


def unresolved(tree: DictConfig, key: str) -> str:
    """Return a value as it was written, interpolations and all."""
    node: Any = tree
    for name in key.split("."):
        node = node._get_node(name)
    return str(node._value())


# ---- plugins


def register_plugin(module: ModuleType, plugin: type) -> str:
    """Let Hydra build a plugin; returns its target. Hydra builds one only if its name lies in a package of its own."""
    home = f"{core_plugins.__name__}.kdlab"
    sys.modules[home] = module
    vars(core_plugins)["kdlab"] = module
    target = f"{home}.{plugin.__name__}"
    Plugins.instance().class_name_to_class[target] = plugin  # type: ignore[assignment]
    return target


# ---- errors


@dataclass(frozen=True)
class Refusal:
    """Refusal of Hydra or OmegaConf, read from the text of its error, which holds it nowhere else.

    Attributes:
        text: one line.
        option: the group, the option that it has not, and those that it has.
        unknown_key: key of a value that nothing takes.
        existing_key: key of a value that was to be added.
    """

    text: str
    option: tuple[str, str, list[str]] | None = None
    unknown_key: str | None = None
    existing_key: str | None = None

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """Read an error of composing."""
        text = " ".join(f"{error} {error.__cause__ or ''}".split())
        if match := re.match(r"Error merging override ([^=\s]+)=(\S*) (.*)", text):
            text = f"{match[1]}: {match[2]}; {re.sub(r'field .* is not Optional', 'accepted: a value', match[3])}"
        if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
            offered = re.search(r"Available options in '[^']+': (.*?)(?: Config search path|$)", text)
            return cls(text, option=(match[1], match[2], offered[1].split() if offered else []))
        if match := re.search(r"Could not override '([^']+)'", text):
            return cls(text, unknown_key=match[1])
        if (full := getattr(error, "full_key", None)) and not text.startswith(str(full)):
            text = f"{full}: {text}"
        if match := re.search(r"already at '([^']+)'", text):
            return cls(text, existing_key=match[1])
        return cls(re.sub(r" ?(full_key|object_type|reference_type)[:=].*", "", text))
