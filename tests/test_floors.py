"""Imports go down the floors only, and the way to a config error passes no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kdlab

ROOT = Path(kdlab.__file__).parent

FLOORS = {
    part: floor
    for floor, parts in enumerate(
        (
            ("plain_text",),
            ("errors",),
            ("ranges",),
            ("system", "config", "functional"),
            ("models", "runs"),
            ("data", "losses"),
            ("tasks", "report", "inference"),
            ("teachers",),
            ("batch_transforms", "traces"),
            ("methods",),
            ("training",),
            ("experiment",),
            ("cli",),
            ("__main__",),
        )
    )
    for part in parts
}
"""Part → its floor: it imports from floors below its own, and from no other part of its own."""

LIGHT = ("plain_text", "errors", "ranges", "system", "config", "cli", "__init__", "__main__")
"""Parts that must not import torch or lightning at the top of any module."""

HEAVY_FILES = ("system/arrays.py",)
"""Modules of these parts that only heavy parts import."""

HEAVY = {"torch", "lightning", "torchmetrics", "matplotlib", "numpy", "scipy", "optuna", "tensorboard"}
COMMAND_LINE = {"hydra", "omegaconf"}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if "conf" not in path.relative_to(ROOT).parts)


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Dotted names of what a module imports (with ``top_only``, when it is itself imported)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["kdlab", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    found: set[str] = set()
    for node in _top(tree.body) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _top(body):
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try):
            yield from _top([*node.body, *node.orelse])
        else:
            yield node


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = part(path)
    if own == "__init__":
        return  # the package itself only names what it loads lazily
    assert own in FLOORS, f"{own}: give it a floor"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "kdlab" and rest and rest[0] in FLOORS:
            below = rest[0] == own or FLOORS[rest[0]] < FLOORS[own]
            assert below, f"{path.relative_to(ROOT)} imports {name}, which is no floor below"
        assert top not in COMMAND_LINE or own == "cli", f"{path.relative_to(ROOT)} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    names = {".".join(["kdlab", *path.relative_to(ROOT).with_suffix("").parts]): path for path in modules()}
    graph = {name: {other for other in imports(path) if other in names} - {name} for name, path in names.items()}
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    assert not graph, {name: others for name, others in graph.items() if others & graph.keys()}


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if part(p) in LIGHT and str(p.relative_to(ROOT)) not in HEAVY_FILES],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_the_way_to_a_config_error_is_light(path):
    heavy = {name for name in imports(path, top_only=True) if name.split(".")[0] in HEAVY}
    assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} when it is imported"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["list"], 0),
        (["check", "--help"], 0),
        (["--cfg", "job", "experiment=kd_resnet"], 0),
        (["experiment=kd_resnet", "loss.temprature=4"], 2),
        (["experiment=kd_resnet", "stages.a=['loss.alpha=x']"], 2),
        (["-m", "experiment=kd_resnet", "loss.temperature=1,oops"], 2),
        (["nonsense"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_quick_answers_import_no_torch(words, status, tmp_path):
    code = (
        "import sys; from kdlab.cli.main import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as stop: status = stop.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"assert status == {status}, status"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT.parent), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == (1 if status else 0), done.stderr
    assert not list(tmp_path.iterdir())


def test_every_floor_is_of_a_part_that_is_there():
    assert {part(path) for path in modules()} - {"__init__"} == set(FLOORS)
    assert all((ROOT / file).exists() for file in HEAVY_FILES)


def test_public_names_load_lazily():
    code = (
        "import sys, kdlab\n"
        "assert 'torch' not in sys.modules\n"
        "import kdlab.experiment, kdlab.runs, kdlab.cli\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(kdlab.__all__) <= set(dir(kdlab))\n"
        "for name in kdlab.__all__: getattr(kdlab, name)\n"
        "assert callable(kdlab.distill)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
