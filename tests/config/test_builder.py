"""Signatures read without importing, values held against annotations, and what may be built."""

import subprocess
import sys
import textwrap

import pytest

from kdlab.config import builder
from kdlab.config.signatures import NotFound, find, signature
from kdlab.errors import UserError


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of the user's own, and return its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = iter(range(1000))

    def write(source: str) -> str:
        name = f"own_{abs(hash(tmp_path)) % 10**9}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


@pytest.fixture
def trusted():
    with builder.trust(user_modules=True):
        yield


def said(mapping, path="", **more):
    with pytest.raises(UserError) as error:
        builder.check(mapping, path, slot="own", **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- signatures


def test_reading_a_signature_does_not_import():
    code = (
        "import sys; from kdlab.config import builder\n"
        "assert list(builder.signature('torch.optim.SGD').parameters)[:3] == ['params', 'lr', 'momentum']\n"
        "assert 'in_features' in builder.signature('torch.nn.Linear').parameters\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_signatures_follow_reexports_and_bases_as_python_does():
    import inspect

    import torch

    for target, real in {
        "torch.optim.SGD": torch.optim.SGD,
        "torch.optim.AdamW": torch.optim.AdamW,
        "torch.nn.Linear": torch.nn.Linear,
        "torch.nn.Conv2d": torch.nn.Conv2d,
    }.items():
        expected = [p for p in inspect.signature(real).parameters.values() if p.kind != p.VAR_KEYWORD]
        assert [p.name for p in expected] == list(signature(target).parameters), target
        needed = [p.name for p in expected if p.default is p.empty]
        assert [n for n, p in signature(target).parameters.items() if p.required] == needed


def test_kinds_of_owners(module):
    name = module(
        """
        from dataclasses import dataclass, field
        from functools import partial
        from typing import ClassVar, NamedTuple

        class Base:
            def __init__(self, a: int, b: str = "x"): ...

        class Child(Base): ...

        class Passing(Base):
            def __init__(self, c: float = 1.0, **rest):
                super().__init__(**rest)

        @dataclass
        class Parent:
            x: int
            shared: ClassVar[int] = 3

        @dataclass(frozen=True)
        class Fields(Parent):
            y: float = 2.0
            made: list = field(init=False, default_factory=list)

        class Point(NamedTuple):
            u: int
            v: int = 0

        def narrow(depth: int, width: int = 4, *, bias: bool = True): ...
        def wide(**rest): return narrow(depth=8, **rest)
        def anything(**rest): return dict(**rest)

        Alias = Child
        made = partial(narrow, 3)
        """
    )
    names = {n: signature(f"{name}.{n}") for n in ("Child", "Passing", "Fields", "Point", "wide", "Alias")}
    assert list(names["Child"].parameters) == ["a", "b"] == list(names["Alias"].parameters)
    assert set(names["Passing"].parameters) == {"a", "b", "c"} and not names["Passing"].open
    assert {n: p.required for n, p in names["Fields"].parameters.items()} == {"x": True, "y": False}
    assert list(names["Point"].parameters) == ["u", "v"]
    assert set(names["wide"].parameters) == {"width", "bias"} and not names["wide"].open
    assert signature(f"{name}.anything").open and signature(f"{name}.made").open


def test_what_is_not_there_is_said_with_the_nearest():
    with pytest.raises(NotFound):
        signature("kdlab.losses.KLL")
    message = said({"_target_": "kdlab.losses.KLL"}, "loss.terms.kl")
    assert message.startswith("loss.terms.kl._target_: no class or function 'kdlab.losses.KLL'; nearest: ")
    assert "kdlab.losses.KL" in message


def test_find_does_not_import_packages():
    assert find("torch.optim.sgd").name == "sgd.py"
    assert find("no_such_module_at_all") is None
    assert find("kdlab.no_such") is None


# ---- values against annotations


@pytest.fixture
def typed(module, trusted):
    name = module(
        """
        from __future__ import annotations
        from collections.abc import Mapping, Sequence
        from dataclasses import dataclass
        from pathlib import Path
        from typing import Any, Literal, Optional, Union

        Shape = Literal["linear", "cosine"]

        @dataclass
        class Ramp:
            start: float
            end: float
            shape: Shape = "linear"

        Number = Union[float, Ramp]

        def owner(
            whole: int = 1, number: float = 1.0, flag: bool = False, text: str = "", shape: Shape = "linear",
            maybe: int | None = None, old: Optional[float] = None, sizes: list[int] = (),
            pair: tuple[int, int] = (1, 2),
            several: Sequence[str] | str = (), ramp: Number = 1.0, table: dict[str, float] = {},
            path: Path | str = "",
            quoted: "int | None" = None, free: Any = None, bare=None, other: Mapping | None = None,
        ): ...
        """
    )
    return {"_target_": f"{name}.owner"}


@pytest.mark.parametrize(
    ("key", "good"),
    [
        ("whole", 3), ("whole", 8.0), ("number", 3), ("number", "1e-3"), ("flag", True), ("text", "a"),
        ("text", 3), ("shape", "cosine"), ("maybe", None), ("maybe", 2), ("old", 0.5), ("sizes", [1, 2]),
        ("pair", [3, 4]), ("several", ["a"]), ("several", "a"), ("ramp", 2),
        ("ramp", {"start": 1, "end": 2, "shape": "cosine"}),
        ("table", {"a": 1}), ("path", "x/y"), ("quoted", 3), ("free", {"any": ["thing"]}), ("bare", 1),
        ("other", {"k": 1}),
    ],
)  # fmt: skip
def test_values_that_fit(typed, key, good):
    builder.check({**typed, key: good}, slot="own")


@pytest.mark.parametrize(
    ("key", "bad", "accepted"),
    [
        ("whole", "3", "an integer"), ("whole", 1.5, "an integer"), ("whole", True, "an integer"),
        ("whole", None, "an integer"), ("number", "fast", "a number"), ("number", False, "a number"),
        ("flag", 1, "true or false"), ("text", ["a"], "a string"), ("shape", "cosin", "linear, cosine"),
        ("maybe", "x", "an integer, null"), ("sizes", 3, "a list of integers"),
        ("sizes", ["a"], "a list of integers"), ("pair", [1, 2, 3], "a list of integers"),
        ("ramp", "x", "a number, a mapping (Ramp)"),
        ("table", {"a": "b"}, "a mapping"), ("quoted", "x", "an integer, null"),
        ("other", 3, "a mapping, null"), ("whole", 1e40, "an integer"), ("whole", float("nan"), "an integer"),
        ("number", float("nan"), "a finite number"), ("old", float("-inf"), "a finite number, null"),
        ("number", "inf", "a number"), ("table", {"a": float("inf")}, "a mapping"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(typed, key, bad, accepted):
    message = said({**typed, key: bad}, "part")
    assert message.startswith(f"part.{key}: ") and message.endswith(f"accepted: {accepted}")


def test_keys_of_nested_plain_mappings_are_bound_to_their_dataclass(typed):
    assert said({**typed, "ramp": {"start": 1, "ed": 2}}, "p").startswith("p.ramp.ed: unknown key of own_")
    assert "nearest: cosine" in said({**typed, "ramp": {"start": 1, "end": 2, "shape": "cosin"}}, "p")


def test_unknown_keys_are_named_by_their_dotted_path():
    loss = {
        "_target_": "kdlab.losses.Objective",
        "terms": {"kl": {"_target_": "kdlab.losses.KL", "wieght": 1.0}},
    }
    message = said(loss, "loss")
    assert message.startswith("loss.terms.kl.wieght: unknown key of kdlab.losses.KL 'wieght'; nearest: weight;")


def test_a_schedule_is_checked_where_a_number_may_be_one():
    term = {"_target_": "kdlab.losses.KL", "weight": {"start": 1, "end": 0, "shap": "cosine"}}
    assert said(term, "t").startswith("t.weight.shap: unknown key of kdlab.functional.schedule.Schedule 'shap'")


def test_a_missing_value_and_what_code_supplies(typed):
    assert "not set" in said({**typed, "whole": "???"}, "p")
    builder.check({**typed, "whole": None}, slot="own", supplied=["whole"])


# ---- building


def test_build_nested_objects_lists_and_converts(module, trusted):
    name = module(
        """
        class Leaf:
            def __init__(self, value: float): self.value = value
        class Tree:
            def __init__(self, leaves: list, named: dict, depth: int, scale: float = 1.0):
                self.leaves, self.named, self.depth, self.scale = leaves, named, depth, scale
        """
    )
    leaf = {"_target_": f"{name}.Leaf", "value": "1e-2"}
    tree = builder.build(
        {"_target_": f"{name}.Tree", "leaves": [leaf, leaf], "named": {"a": leaf}, "depth": 2.0}, slot="own"
    )
    assert [one.value for one in tree.leaves] == [0.01, 0.01] and tree.leaves[0] is not tree.leaves[1]
    assert tree.named["a"].value == 0.01 and tree.depth == 2 and isinstance(tree.depth, int)


def test_offers_fill_what_the_signature_wants_and_the_config_leaves_open(module, trusted):
    name = module("def net(num_classes: int, width: int = 1): return num_classes, width")
    target = {"_target_": f"{name}.net"}
    assert builder.build(target, slot="own", offer={"num_classes": 10, "mean": 0.5}) == (10, 1)
    assert builder.build({**target, "num_classes": None}, slot="own", offer={"num_classes": 10}) == (10, 1)
    assert builder.build({**target, "num_classes": 3}, slot="own", offer={"num_classes": 10}) == (3, 1)
    assert builder.build(target, slot="own", num_classes=7) == (7, 1)
    with pytest.raises(UserError, match=r"^student.num_classes: missing; own_\S+ needs num_classes$"):
        builder.build(target, "student", slot="own")
    with pytest.raises(UserError, match="takes no argument 'teacher', which kdlab gives it"):
        builder.build({**target, "num_classes": 3}, "student", slot="own", teacher=None)


def test_a_constructors_complaint_gets_its_place(module, trusted):
    name = module(
        """
        from kdlab.errors import UserError
        def picky(width: int):
            if width < 1:
                raise UserError("width", width, "at least 1")
            raise UserError("loss.alpha", "no")
        """
    )
    target = {"_target_": f"{name}.picky"}
    with pytest.raises(UserError, match=r"^student\.net\.width: 0; accepted"):
        builder.build({**target, "width": 0}, "student.net", slot="own")
    with pytest.raises(UserError, match=r"^loss\.alpha: no$"):
        builder.build({**target, "width": 1}, "loss", slot="own")


# ---- what may not be built


@pytest.mark.parametrize(
    "target",
    [
        "torch.load", "os.system", "builtins.eval", "subprocess.run", "pickle.loads", "torch", "kdlab.losses",
        "kdlab.cli.main.main", "kdlab.config.builder.build", "kdlab.losses.objective.torch.load",
        "torch.nn._reduction.get", "torch.nn.modules.module.functools.partial",
        "kdlab.functional.types._private", "torch.utils.data.DataLoader",
    ],
)  # fmt: skip
@pytest.mark.parametrize("user_modules", [False, True])
def test_targets_outside_the_list_are_refused(target, user_modules):
    with builder.trust(user_modules=user_modules):
        for act in (builder.check, builder.build):
            with pytest.raises(UserError, match=r"^x\._target_: .*accepted: "):
                act({"_target_": target}, "x", slot="own")


def test_a_name_that_an_allowed_module_imported_is_refused():
    # kdlab.losses.objective imports Tensor from torch: reached through kdlab, and still not kdlab's
    assert "may not be built" in said({"_target_": "kdlab.losses.objective.Tensor"}, "x")
    assert "may not be built" in said({"_target_": "kdlab.runs.loggers.Path"}, "x")


def test_user_modules_need_trust(module):
    name = module("from os import system\nimport subprocess\ndef mine(): return 'built'\n")
    assert "may not be built" in said({"_target_": f"{name}.mine"}, "x")
    with builder.trust(user_modules=True):
        assert builder.build({"_target_": f"{name}.mine"}, slot="own") == "built"
        for smuggled in ("system", "subprocess.run"):
            with pytest.raises(UserError):
                builder.build({"_target_": f"{name}.{smuggled}", "command": "true"}, slot="own")
    assert "may not be built" in said({"_target_": f"{name}.mine"}, "x")


def test_a_module_that_fails_to_import_is_said_in_one_line(module, trusted):
    name = module("import no_such_package\ndef mine(): ...\n")
    with pytest.raises(UserError, match=rf"^x\._target_: importing '{name}.mine' failed: ModuleNotFoundError"):
        builder.build({"_target_": f"{name}.mine"}, "x", slot="own")


def test_a_mapping_without_a_target():
    assert "accepted: a mapping with _target_" in said({"lr": 1}, "optimizer")


# ---- configs as data


def test_flatten():
    assert builder.flatten({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {"a.b.c": 1, "a.d": [], "e": {}}


def test_the_hash_ignores_order_spelling_and_what_changes_no_result():
    base = {"seed": 0, "loss": {"temperature": 4, "alpha": 0.9}, "name": "a", "trainer": {"progress": "auto"}}
    same = {"loss": {"alpha": 0.9, "temperature": 4.0}, "seed": 0, "name": "b", "output": "elsewhere"}
    assert builder.config_hash(base) == builder.config_hash(same)
    assert builder.config_hash(base) != builder.config_hash({**base, "seed": 1})
    assert builder.config_hash({**base, "stages": {"a": ["x=1"]}}) != builder.config_hash(base)
    assert len(builder.config_hash(base)) == 64
