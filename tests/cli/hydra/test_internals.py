"""What kdlab uses of Hydra and OmegaConf beyond their documented interfaces is where it was."""

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from kdlab.cli.hydra import sweepers
from kdlab.cli.hydra.compose import CONFIG, composer
from kdlab.cli.hydra.internals import PATHS, CheckedRepository, Loader, Refusal, register_plugin, unresolved
from kdlab.errors import UserError


class Mine(Sweeper):
    def setup(self, **more): ...
    def sweep(self, arguments): ...


@pytest.fixture
def composing():
    with composer() as made:
        yield made


def test_hydra_composes_through_our_loader_and_notes_the_files(composing):
    found = composing.compose(["experiment=kd_mlp", "epochs=2"])
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, Loader) and isinstance(loader.repository, CheckedRepository)
    paths = found.hydra.runtime.choices[PATHS]
    assert ["experiment/kd_mlp", CONFIG] in paths and found.config["epochs"] == 2
    assert loader.tree is not None and loader.tree.student is not None


def test_an_option_file_of_the_users_is_looked_at_before_it_is_loaded(tmp_path):
    file = tmp_path / "loss" / "deep.yaml"
    file.parent.mkdir()
    file.write_text("a: " + "[" * 5000 + "]" * 5000)
    with composer(tmp_path) as made, pytest.raises(UserError, match=r"deep.yaml: cannot be read"):
        made.compose(["experiment=kd_mlp", "loss=[deep]"])


def test_an_unresolved_value():
    tree = OmegaConf.create({"a": {"b": "${c}/x"}, "c": "y"})
    assert unresolved(tree, "a.b") == "${c}/x" and tree.a.b == "y/x"


def test_hydra_builds_a_registered_plugin():
    target = register_plugin(sys.modules[__name__], Mine)
    built = Plugins.instance()._instantiate(OmegaConf.create({"_target_": target}))
    assert type(built).__name__ == "Mine" and target.startswith("hydra._internal.core_plugins.")
    sweepers.register()


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("hydra/launcher=nothing", "option", ("hydra/launcher", "nothing")),
        ("epoch=3", "unknown_key", "epoch"),
        ("+epochs=3", "existing_key", "epochs"),
    ],
)
def test_refusals_are_read(composing, monkeypatch, text, field, expected):
    read = []
    of = Refusal.of
    monkeypatch.setattr(Refusal, "of", lambda error: read.append(of(error)) or read[-1])
    with pytest.raises(UserError):
        composing.compose(["experiment=kd_mlp", text])
    found = getattr(read[-1], field)
    assert (found[:2] if field == "option" else found) == expected
    assert field != "option" or "basic" in found[2]
    assert sum(value is not None for value in (read[-1].option, read[-1].unknown_key, read[-1].existing_key)) == 1


def test_a_value_of_another_type_names_key_and_value(composing):
    with pytest.raises(UserError) as caught:
        composing.compose(["experiment=kd_mlp", "hydra.job.chdir=soon"])
    assert str(caught.value).startswith("hydra.job.chdir: soon; ")
