"""What a stranger's folder may have built: parts of a kind, by reading alone."""

import contextlib
import importlib
import inspect
import os
import pkgutil
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.paths import ROOT
from kdlab import data
from kdlab.config import builder, slots
from kdlab.config.slots import SLOTS
from kdlab.data import ImageData, TextData
from kdlab.errors import UserError
from kdlab.models import save_weights
from kdlab.models.weights.size_limit import no_larger_than

REACHED = ("network", "data", "task", "loss", "term", "temperature", "schedule", "batch_transform", "auxiliary", "step")
"""Parts that a folder names, or that stand inside of such a part."""

WALKED = ("kdlab", "torch.nn", "torch.optim")
"""Packages whose every public name is tried."""

SKIPPED = ("kdlab.__main__",)

ACTING = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.system",
    "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "socket.bind",
    "urllib.Request", "shutil.rmtree", "shutil.copyfile", "tempfile.mkstemp", "tempfile.mkdtemp",
}  # fmt: skip
"""Audit events of Python's that change files, start programs or ask the network."""

_events: list | None = None


def _hook(event, args):
    if _events is None:
        return
    writes = event == "open" and (
        (isinstance(args[1], str) and set(args[1]) & set("wax+"))
        or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    )
    if event in ACTING or writes:
        _events.append((event, str(args[0])))


sys.addaudithook(_hook)  # cannot be taken away again; it does nothing outside of `watched`


@contextlib.contextmanager
def watched(monkeypatch):
    """Collect what acts on files, programs and the network."""
    global _events
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    _events = []
    try:
        yield _events
    finally:
        _events = None


# ---- the list itself


def test_every_name_of_the_list_is_what_it_says():
    for slot in SLOTS.values():
        for name in filter(None, slot.names if slot.base else ()):
            module, _, own = name.rpartition(".")
            assert getattr(importlib.import_module(module), own) is slots.base_class(slot)
        if slot.base:
            found = slots.base_class(slot)
            assert f"{found.__module__}.{found.__qualname__}" == slot.base
        for name in slot.builders:
            module, _, own = name.rpartition(".")
            made = getattr(importlib.import_module(module), own)
            assert f"{made.__module__}.{made.__qualname__}" == name


def test_the_data_sets_are_those_that_kdlab_data_exports():
    exported = {getattr(data, name) for name in data.__all__ if inspect.isfunction(getattr(data, name))}
    returns = {f: typing.get_type_hints(f).get("return") for f in exported - {data.text_data}}  # takes functions
    assert set(returns.values()) <= {ImageData, TextData}
    assert {f"{f.__module__}.{f.__name__}" for f in returns} == set(SLOTS["data"].builders)


def test_every_option_file_is_accepted_where_it_stands():
    import yaml

    parts = {"model": "network", "optimizer": "optimizer", "data": "data", "task": "task", "method": "method"}
    parts |= {name: name for name in ("trainer", "scheduler", "logger", "batch_transform", "auxiliary")}
    conf, seen = ROOT / "conf", 0
    for group, slot in parts.items():
        for file in (conf / group).glob("*.yaml"):
            target = (yaml.safe_load(file.read_text()) or {}).get("_target_")
            if target:
                builder.parameters({"_target_": target}, group, slot=slot)
                seen += 1
    assert seen > 80


# ---- every public name, tried


def targets() -> dict[str, Any]:
    """Dotted name → class or function, of every public name of every module, re-exports and imports included."""
    found = {}
    for package in WALKED:
        top = importlib.import_module(package)
        names = [package, *(m.name for m in pkgutil.walk_packages(top.__path__, f"{package}.", onerror=lambda _: None))]
        for name in names:
            if name in SKIPPED or any(part.startswith("_") for part in name.split(".")):
                continue
            try:
                module = importlib.import_module(name)
            except Exception:  # needs a package that is not installed
                continue
            found |= {f"{name}.{n}": v for n, v in vars(module).items() if callable(v) and not n.startswith("_")}
    return found


def arguments(found, folder: Path) -> dict:
    """Plausible values for what a class or function takes: every text is a path in ``folder``."""
    try:
        takes = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return {}
    given = {}
    for one in takes:
        hint = str(one.annotation)
        if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL, one.POSITIONAL_ONLY):
            continue
        if "Path" in hint or one.name in ("path", "root", "folder", "file", "save_dir"):
            given[one.name] = str(folder / f"{getattr(found, '__name__', 'x')}.txt")
        elif one.name in ("download", "trust"):
            given[one.name] = True
        elif one.default is not one.empty:
            continue
        elif "Sequence" in hint or "list" in hint or "Iterable" in hint:
            given[one.name] = []
        elif "Mapping" in hint or "dict" in hint:
            given[one.name] = {}
        else:
            given[one.name] = "2" if "str" in hint else 2
    return given


def tried(names: dict[str, Any], slot: str, folder: Path) -> dict[str, Any]:
    """What could be built, by name; of several names for one thing one is tried, if any where the part belongs."""
    made = {}
    ordered = sorted(names.items(), key=lambda item: slots.named([SLOTS[slot]], item[0]))
    for name, found in {id(found): (name, found) for name, found in ordered}.values():
        mapping = {"_target_": name, **arguments(found, folder)}
        with contextlib.suppress(UserError):
            made[name] = builder.build(mapping, "part", slot=slot)
    return made


@pytest.fixture(scope="module")
def every_name():
    return targets()


@pytest.mark.slow
def test_no_public_name_acts_when_a_strangers_folder_names_it(every_name, tmp_path, monkeypatch):
    assert len(every_name) > 4000
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDLAB_DATA", str(tmp_path / "data"))
    built = {}
    with watched(monkeypatch) as events, builder.trust(read_only=True):
        for slot in REACHED:
            built[slot] = tried(every_name, slot, tmp_path)
    assert events == [] and list(tmp_path.iterdir()) == []
    for slot, made in built.items():
        wanted = slots.base_class(SLOTS[slot]) if SLOTS[slot].base else object
        assert all(isinstance(one, wanted) for one in made.values())
    kinds = {slot: {type(one).__name__ for one in made.values()} for slot, made in built.items()}
    assert kinds["network"] >= {"Linear", "MLP", "Conv2d"} and len(kinds["network"]) > 100
    assert kinds["term"] >= {"KL", "CRD"} and kinds["schedule"] == {"Schedule"}
    assert kinds["data"] <= {"ImageData", "TextData"} and len(built["data"]) >= 3


def test_what_is_accepted_is_of_the_kind(every_name):
    for slot_name, slot in SLOTS.items():
        for name, found in every_name.items():
            try:
                builder.parameters({"_target_": name}, "part", slot=slot_name)
            except UserError:
                continue
            # torch's bases are not read from the source, so that torch's classes are told apart when they are built
            if name.startswith("torch.") and not slots.accepts_object(slot, found, lambda _: False):
                continue
            defined = f"{found.__module__}.{found.__qualname__}"
            is_kind = inspect.isclass(found) and slot.base and issubclass(found, slots.base_class(slot))
            assert is_kind or defined in slot.builders, f"{name} as {slot_name}"


def test_without_the_check_the_same_trial_finds_what_writes(every_name, tmp_path, monkeypatch):
    """The control: the trial above would see a function that acts."""
    monkeypatch.chdir(tmp_path)
    modules = ("kdlab.data.text.datasets.traces", "kdlab.models.weights.checkpoint", "kdlab.data.datasets")
    some = {name: v for name, v in every_name.items() if name.startswith(modules) and inspect.isfunction(v)}
    some = {name: v for name, v in some.items() if v.__module__.startswith("kdlab.")}
    monkeypatch.setattr(builder, "accepts", lambda *_: True)
    monkeypatch.setattr(builder, "accepts_object", lambda *_: True)
    monkeypatch.setattr(builder, "named", lambda *_: True)
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    with watched(monkeypatch) as events, contextlib.suppress(TypeError):
        for name, found in some.items():
            mapping = {"_target_": name, **arguments(found, tmp_path)}
            with contextlib.suppress(Exception):
                builder.build(mapping, "part", slot="data")
    written = {path.name.removesuffix(".txt") for path in tmp_path.iterdir()}
    assert {"append_traces", "write_traces", "save_weights", "cifar10"} <= written
    assert events


def _no_network(*_args, **_more):
    raise OSError("no network in tests")


# ---- what a value may hold inside


@pytest.mark.parametrize(
    "mapping",
    [
        {"_target_": "kdlab.models.Heads", "net": {"_target_": "kdlab.models.save_weights"}},
        {"_target_": "kdlab.models.Heads", "net": {"_target_": "kdlab.losses.KL"}},
        {"_target_": "kdlab.models.MLP", "hidden": [{"_target_": "torch.nn.Linear"}]},
        {"_target_": "torch.nn.ModuleList", "modules": [{"_target_": "torch.nn.init.zeros_"}]},
        {"_target_": "torch.nn.Linear", "in_features": {"_target_": "kdlab.models.MLP"}},
        {"_target_": "torch.nn.Linear", "dtype": {"_target_": "torch.nn.Linear"}},
        {"_target_": "kdlab.models.CausalLM", "settings": {"a": {"_target_": "kdlab.models.MLP"}}},
    ],
)
def test_an_argument_takes_only_the_part_that_its_annotation_wants(mapping):
    for act in (builder.check, builder.build):
        with pytest.raises(UserError):
            act(mapping, "network", slot="network")


def test_arguments_take_the_parts_that_they_want():
    inner = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    listed = builder.build({"_target_": "torch.nn.ModuleList", "modules": [inner]}, "network", slot="network")
    assert isinstance(listed[0], torch.nn.Linear)
    term = {
        "_target_": "kdlab.losses.KL",
        "weight": {"_target_": "kdlab.functional.Schedule", "start": 1, "end": 0},
        "temperature": {"_target_": "kdlab.losses.LearnedTemperature"},
    }
    loss = builder.build({"_target_": "kdlab.losses.Objective", "terms": {"kl": term}}, "loss", slot="loss")
    assert type(loss.terms["kl"].temperature).__name__ == "LearnedTemperature"


def test_what_code_offers_is_given_and_never_built(tmp_path):
    offer = {"num_classes": {"_target_": "kdlab.models.save_weights", "state": {}, "path": str(tmp_path / "x")}}
    with (
        builder.trust(read_only=True),
        pytest.raises(UserError, match=r"^network: kdlab.models.MLP cannot be built with"),
    ):
        builder.build({"_target_": "kdlab.models.MLP", "in_features": 3}, "network", slot="network", offer=offer)
    assert not (tmp_path / "x").exists()


def test_the_users_own_may_be_any_part_if_it_makes_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_slots.py").write_text(
        "from torch import nn\nfrom kdlab.losses import Term\nfrom kdlab.models import save_weights\n"
        "class Net(nn.Sequential):\n    pass\n"
        "class Other: ...\n"
        "class Mine(Term):\n    pass\n"
        "def net(inner=None): return nn.Sequential(inner)\n"
        "def wrong(): return 3\n"
    )
    made = {"_target_": "own_slots.net", "inner": {"_target_": "own_slots.Net"}}
    with builder.trust(user_modules=True):
        assert isinstance(builder.build(made, "student", slot="network")[0], torch.nn.Sequential)
        assert builder.build({"_target_": "own_slots.Mine"}, "loss.terms.a", slot="term").weight.start == 1
        for target, slot in (("Other", "network"), ("Mine", "task"), ("save_weights", "network")):
            with pytest.raises(UserError, match="may not be built here"):
                builder.check({"_target_": f"own_slots.{target}"}, "x", slot=slot)
        with pytest.raises(UserError, match=r"^student._target_: 'own_slots.wrong' made a int; accepted: a network"):
            builder.build({"_target_": "own_slots.wrong"}, "student", slot="network")


# ---- what a stranger's folder gets


def test_nothing_is_fetched_or_unpacked_for_a_folder_that_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"")
    named = [f"kdlab.data.{name}" for name in ("cifar10", "cifar100", "mnist", "fashion_mnist", "shakespeare")]
    with watched(monkeypatch) as events, builder.trust(read_only=True):
        for target in named:
            mapping = {"_target_": target, "root": str(tmp_path), "download": True}
            with pytest.raises(UserError, match="for a folder that is not trusted"):
                builder.build(mapping, "data", slot="data")
        for net in ({"name": "some/model"}, {"vocab_size": 9, "attention": "kernels-community/flash-attn"}):
            with pytest.raises(UserError, match=r"not trusted|code from the hub"):
                builder.build({"_target_": "kdlab.models.CausalLM", **net}, "network", slot="network")
        with pytest.raises(UserError, match="cannot be had from the hub"):
            mapping = {"_target_": "kdlab.data.text_files", "path": __file__, "tokenizer": "some/model"}
            builder.build(mapping, "data", slot="data")
    assert not [event for event in events if "socket" in event[0] or str(tmp_path) in event[1]]


def test_a_network_far_larger_than_its_weights_is_stopped_before_it_takes_memory(tmp_path):
    save_weights(torch.nn.Linear(3, 3), tmp_path / "w.pt")
    wide = {"_target_": "torch.nn.Linear", "in_features": 2**13, "out_features": 2**13}
    deep = {"_target_": "kdlab.models.CifarResNet", "depth": 6 * 10**6 + 2, "width": 1, "num_classes": 2}
    for mapping, said in ((wide, "MiB of parameters"), (deep, "MiB of parameters|2,0.. layers")):
        with no_larger_than(tmp_path / "w.pt"), pytest.raises(UserError, match=said):
            builder.build(mapping, "network", slot="network")
    with no_larger_than(tmp_path / "w.pt"):
        builder.build({**wide, "in_features": 3}, "network", slot="network")
    builder.build(wide, "network", slot="network")  # no limit outlives its block
