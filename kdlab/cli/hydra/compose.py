"""Composer of plain configs from overrides, with Hydra; every mistake on the way becomes one line.

``student`` and ``teacher`` are groups made from the networks in ``conf/model``, so that ``student=resnet14
student.width=8`` works for a file that the user just wrote.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict

from kdlab.cli.hydra import sweepers
from kdlab.cli.hydra.internals import PATHS, Loader, Refusal
from kdlab.config import options as config_options
from kdlab.config import renamed
from kdlab.config.options import NETWORKS, Options
from kdlab.config.override_text import as_one_text, for_shell
from kdlab.errors import UserError, unknown
from kdlab.system.files import Unreadable, parse_yaml
from kdlab.system.names import check_name

CONFIG = "config"
VERSION_BASE = "1.3"
JOB_NAME = "kdlab"
"""Name of Hydra's job until the experiment's name is known."""

TEACHER_DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "mapping": None,
    "weights": None,
    "data": {},
    "epochs": 30,
    "seed": 0,
    "cache": "auto",
    "top_k": None,
    "draws": None,
    "feature_mib": 1024,
    "members": None,
    "weighting": "mean",
}
"""Default settings of a teacher beside its network and recipe: without a checkpoint it is trained, with every label."""

_OPEN = re.compile(r"^(?:\+\+)?(?=(?:teacher|pretrained)\.data[.=]|stages[.=])")
"""Pattern of overrides of open mappings, to which any key may be added: Hydra wants ``++`` there, users may omit it."""


def add_plus(text: str) -> str:
    """Return an override as Hydra wants it: in an open mapping, ``++`` adds a key that is not there yet.

    Stages are lists of overrides; Hydra wants each of those in quotes, and users need not type them.

    >>> add_plus("stages={soft: [loss.alpha=1, epochs=2]}")
    "++stages={soft: ['loss.alpha=1', 'epochs=2']}"
    """
    key, equals, value = _OPEN.sub("++", text).partition("=")
    if key.lstrip("+") != "stages" or not value.startswith("{"):
        return key + equals + value
    try:
        stages = parse_yaml(value)
    except Unreadable:
        return key + equals + value  # Hydra says what is wrong with it
    if not isinstance(stages, dict) or not all(
        isinstance(item, list) and all(isinstance(t, str) for t in item) for item in stages.values()
    ):
        return key + equals + value
    quoted = (f"{name}: [{', '.join(map(_quoted, stage))}]" for name, stage in stages.items())
    return f"{key}={{{', '.join(quoted)}}}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def as_typed(texts: Iterable[str]) -> list[str]:
    """Return overrides as the user typed them: :func:`add_plus` undone, settings of Hydra's left out."""
    return [_OPEN.sub("", text) for text in texts if not text.startswith(("hydra.", "hydra/"))]


def is_hydras(override: Override) -> bool:
    """Return whether an override is a setting of Hydra's own, in any form: ``hydra.x``, ``+hydra/x``, ``x@hydra.y``."""
    return any(re.split(r"[./@:]", name or "")[0] == "hydra" for name in (override.key_or_group, override.package))


def refuse_hydra(parsed: Iterable[Override]) -> None:
    """Refuse settings of Hydra's own: they hold for a whole command, and say where Hydra finds its code.

    Raises:
        UserError: naming the first.
    """
    for override in parsed:
        if is_hydras(override):
            raise UserError(override.key_or_group, "a setting of Hydra's; accepted here: keys of the experiment")


class UserFolders(SearchPathPlugin):
    """Plugin that lets Hydra look in the user's own config folders before the shipped one."""

    folders: ClassVar[tuple[Path, ...]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the user's folders before the shipped one."""
        for folder in self.folders:
            search_path.prepend("kdlab", f"file://{folder}", SearchPathQuery(provider="main"))


PACKAGES = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
}
"""Option of Hydra's → the package of its own that provides it."""


@dataclass
class Composition:
    """Composed config, and what it was composed from."""

    config: dict[str, Any]
    overrides: list[str]
    tree: DictConfig
    """Config as Hydra composed it, interpolations unresolved."""
    hydra: DictConfig
    """Hydra's own settings."""
    stages: dict[str, Composition] = field(default_factory=dict)

    def chosen(self, group: str) -> list[str]:
        """Return the options of a group that the config is made of, those that an option builds on included."""
        return [path.removeprefix(f"{group}/") for path, _ in self._paths if path.startswith(f"{group}/")]

    @property
    def _paths(self) -> list[tuple[str, str]]:
        """Option files, each with the file that names it in its defaults."""
        return self.hydra.runtime.choices[PATHS]

    def choices(self, groups: Iterable[str]) -> dict[str, str]:
        """Return group → the chosen option, several joined by a plus: the names that tables and folders use."""
        # what an option builds on, or brings along for itself, was not chosen
        chosen = [path.rpartition("/") for path, parent in self._paths if parent == CONFIG]
        joined = {
            group: "+".join(name for at, _, name in chosen if at == group) for group in groups if group != NETWORKS
        }
        return {group: names for group, names in joined.items() if names}


class Alias(ConfigNode):
    """A network as an option of ``student`` or ``teacher``; made when asked for, since there are many."""

    def __init__(self, group: str, network: str) -> None:
        self.name, self.group, self.package, self.provider = f"{network}.yaml", group, None, "kdlab"
        self.network = network

    def __getattr__(self, name: str) -> Any:
        if name != "node":
            raise AttributeError(name)
        if self.group == "student":
            return OmegaConf.create({"defaults": [{f"/{NETWORKS}@_here_": self.network}]})
        recipe = [{f"/{NETWORKS}@net": self.network}, {"/optimizer@optimizer": "sgd"}]
        return OmegaConf.create(
            {"defaults": [*recipe, {"/scheduler@scheduler": "cosine"}, "_self_"], **TEACHER_DEFAULTS}
        )


def _untrained(at: str) -> dict[str, Any]:
    """Return a recipe that is not used: experiments choose an optimizer for their teacher, even if it trains none."""
    return {"defaults": [{f"/optimizer{at}optimizer": "sgd"}, {f"/scheduler{at}scheduler": "cosine"}, "_self_"]}


def register(options: Options) -> None:
    """Register with Hydra the options of ``student`` and ``teacher``, the sweepers and the user's config folders."""
    store = ConfigStore.instance()
    store.store(group="teacher", name="none", node={**_untrained("@teacher."), "teacher": None}, package="_global_")
    store.store(group="teacher", name="previous", node={**_untrained("@"), **TEACHER_DEFAULTS, "net": None})
    store.store(group="teacher", name="written", node={**_untrained("@"), "net": None, "cache": "???"})
    for name in options.of(NETWORKS):
        for group in ("student", "teacher"):
            store.repo.setdefault(group, {})[f"{name}.yaml"] = Alias(group, name)
    sweepers.register()
    Plugins.instance().register(UserFolders)


def _refuse_renamed(override: Override) -> None:
    """Refuse a key or value by the name that it had before; arguments of data are left to where nothing takes them."""
    key = str(override.key_or_group)
    if key.startswith(("data.", "teacher.data.", "pretrained.data.")):
        return
    texts = _choices(override) if not override.is_delete() else []
    for value in [*(str(getattr(one, "text", one)) for one in texts), None]:
        if (now := renamed.current(key, value)) is not None:
            raise UserError(override.input_line, "has another name", now)


@contextmanager
def composer(extra: Path | None = None) -> Iterator[Composer]:
    """Initialise Hydra over the config folders, and yield the :class:`Composer` of their configs."""
    options = config_options.read(config_options.folders(extra))
    register(options)
    shipped = options.folders[-1]
    UserFolders.folders = options.folders[:-1]
    with initialize_config_dir(str(shipped), job_name=JOB_NAME, version_base=VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.config_loader = Loader(hydra.config_loader.get_search_path())
        yield Composer(options)


class Composer:
    """Composer of configs from overrides, to be had from :func:`composer`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._kept: dict[tuple[str, ...], DictConfig] = {}

    def parse(self, texts: Iterable[str]) -> list[Override]:
        """Read overrides with Hydra's own parser, and refuse options that are not there.

        Raises:
            UserError: malformed text, or an unknown option of a known group.
        """
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = []
        for text in texts:
            try:
                parsed += parser.parse_overrides([add_plus(text)])
            except OverrideParseException as error:
                reason = str(error).splitlines()[0].removeprefix("Error parsing override ")
                raise UserError(
                    f"{text!r}",
                    (
                        f"cannot be read ({reason}); {_as_text(parser, text)}accepted: key=value, "
                        "group=option, +key=value, ~key (quote brackets and spaces: 'loss=[a,b]', also "
                        "inside of stages)"
                    ),
                ) from None
        for override in parsed:
            if not override.key_or_group:
                raise UserError(f"{override.input_line!r}", "no key before the '='", "key=value, group=option")
            _refuse_renamed(override)
            self._check_option(override)
        return parsed

    def _check_option(self, override: Override) -> None:
        group = override.key_or_group
        if group not in self.options.groups or override.is_delete():
            return
        if override.value() == []:
            hint = "; labels alone: loss=ce" if group == "loss" else ""
            raise UserError(group, "[]", f"an option (python -m kdlab list {group} shows them){hint}")
        for value in _choices(override):
            if value is None:
                hint = " (no teacher: teacher=none)" if group in ("student", "teacher") else ""
                raise unknown(group, "null", self.options.of(group), "option").with_hint(hint)
            if isinstance(value, dict):
                continue
            name = value.text if isinstance(value, QuotedString) else str(value)
            if name in self.options.groups[group]:
                continue
            error = unknown(group, name, self.options.of(group), "option")
            if re.fullmatch(r"[-+.\de]+", name):
                raise error.with_hint(f" (a number is a value: try loss.{group}={name})")
            raise error

    def compose(self, texts: Sequence[str]) -> Composition:
        """Compose one config, and every stage that it names, from overrides without sweeps.

        Raises:
            UserError: whatever Hydra refuses, in one line.
        """
        return self.with_stages(self._compose(texts))

    def with_stages(self, point: Composition) -> Composition:
        """Compose the stages of a config on top of the overrides that made it; works inside a job too."""
        for name, stage in (point.config.get("stages") or {}).items():
            check_name("stages", name, "a name for each stage")
            if not isinstance(stage, list) or not all(isinstance(text, str) for text in stage):
                raise UserError(f"stages.{name}", f"{stage!r}", "a list of overrides such as [loss.alpha=0]")
            try:
                parsed = self.parse(stage)
                refuse_hydra(parsed)
                texts = [str(override.input_line) for override in parsed]
                point.stages[name] = self._compose([*point.overrides, *texts])
            except UserError as error:
                raise error.inside(f"stages.{name}") from None
        return point

    def _compose(self, texts: Sequence[str]) -> Composition:
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, Loader)
        tree = None
        parsed = self.parse(texts)
        try:
            tree = self._chosen([str(o.input_line) for o in parsed if self._selects(o)])
            loader.set_values([o for o in parsed if not self._selects(o)], tree)
            return composition(tree, texts)
        except Exception as error:  # Hydra and OmegaConf raise many sorts; all are about what the user gave
            raise self._explain(error, tree or loader.tree) from error

    def _chosen(self, selecting: Sequence[str]) -> DictConfig:
        """Return the config of the chosen options alone: the slow part, done once for a sweep over values."""
        key = tuple(selecting)
        if key not in self._kept:
            self._kept[key] = hydra_compose(CONFIG, overrides=list(key), return_hydra_config=True)
        return copy.deepcopy(self._kept[key])

    def _selects(self, override: Override) -> bool:
        """Return whether an override chooses options, or is Hydra's; others set values, which Hydra applies last."""
        return override.key_or_group in self.options.groups or override.is_hydra_override()

    def _explain(self, error: Exception, tree: DictConfig | None) -> UserError:
        """Turn an error of Hydra's into one line that names the key, the value and what is accepted."""
        if isinstance(error, KeyError) and tree is not None and error.args[0] in tree.hydra.job.env_copy:
            return UserError("hydra.job.env_copy", f"{error.args[0]} is not in the environment", "names that are")
        refusal = Refusal.of(error)
        if refusal.option is not None:
            at, name, offered = refusal.option
            if at in self.options.groups:
                return unknown(at, name, self.options.of(at), "option")
            missing = unknown(at, name, offered, f"{at.removeprefix('hydra/')} option")
            package = PACKAGES.get(f"{at}={name}")
            return missing.with_hint(f"; it comes with: pip install {package}") if package else missing
        if refusal.unknown_key is not None:
            return self._unknown_key(refusal.unknown_key, tree)
        if (key := refusal.existing_key) is not None:
            return UserError(key, "exists already", f"{key}=value, without the +")
        return UserError(refusal.text)

    def _unknown_key(self, key: str, tree: DictConfig | None) -> UserError:
        if (now := renamed.current(key)) is not None:
            return UserError(key, "has another name", now)
        node: Any = OmegaConf.create({}) if tree is None else tree  # read key by key
        path, depth, root = key.split("@")[0].split("."), 0, set(node) - {"hydra"}
        while isinstance(node, DictConfig) and depth < len(path) and path[depth] in node:
            node, depth = node[path[depth]], depth + 1
        if depth == len(path):
            return UserError(key, "cannot be overridden", "a key of the config (--cfg job shows it)")
        name = path[depth]
        if path[0] == "hydra":
            return UserError(key, "not a setting of Hydra's", "those of --cfg hydra")
        if depth == 0:
            return unknown(key, name, {*root, *self.options.groups} - {NETWORKS}, "key or group")
        where = ".".join(path[:depth])
        if not isinstance(node, DictConfig):
            held = "null" if node is None else repr(node)
            return UserError(key, f"{where} is {held} here and has no keys", f"{where}=VALUE")
        if key == "loss.alpha":
            others = ", ".join(sorted(str(k) for k in node if k != "_target_"))
            return UserError(
                "loss.alpha", "the recipes chosen by loss= have no alpha", f"a recipe with one, or {others}"
            )
        keys = [k for k in node if k != "_target_"]
        error = unknown(key, name, keys, "key")
        return error.with_hint(self._takes(node, name, key))

    @staticmethod
    def _takes(node: DictConfig, name: str, key: str) -> str:
        """Return a hint for an argument that exists but that the option's file leaves out; else an empty text."""
        from kdlab.config.signatures import NotFound, signature

        try:
            takes = name in signature(str(node.get("_target_"))).parameters
        except NotFound:
            return ""
        return f"; {node.get('_target_')} takes it too: +{key}=..." if takes else ""


def composition(tree: DictConfig, texts: Sequence[str], hydra: DictConfig | None = None) -> Composition:
    """Return a composed tree as plain data; Hydra's settings are taken out of it, or given beside it."""
    if hydra is None:
        hydra = tree.hydra
        with open_dict(tree):
            del tree["hydra"]
    config: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    return Composition(config, list(texts), tree, hydra)


def _as_text(parser: OverridesParser, text: str) -> str:
    """Return a hint to quote a value with characters special to Hydra, such as a file's name; else an empty text."""
    key, _, value = text.partition("=")
    unfinished = value[:1] in ("[", "{") and any(value.count(a) != value.count(b) for a, b in ("[]", "{}"))
    if not re.fullmatch(r"\+*[\w.@/-]+", key) or not value or value[0] in "'\"" or unfinished:
        return ""
    try:
        parser.parse_overrides([as_one_text(text)])
    except OverrideParseException:
        return ""
    special = "= in a value" if "=" in value else "a value with special characters"
    return f"{special} must be quoted: {for_shell(as_one_text(text))}; "


def _choices(override: Override) -> list[Any]:
    """Return all option names that an override asks for, in a sweep or a list."""
    values = list(override.sweep_iterator()) if override.is_discrete_sweep() else [override.value()]
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, list) else [value]
    return flat
