"""What the pages say is so: every option has a place, and every command that can be typed as it stands composes."""

import re
import shlex

import pytest

from helpers.paths import CONF
from kdlab.cli.hydra.compose import composer
from kdlab.cli.hydra.plan import make_plan
from kdlab.cli.main import parse_flags

ROOT = CONF.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDER = re.compile(
    r"[=/' ](RUN|DIR|FILE|NAME|FOLDER\w*|THE_SAME|NAMES?)\b|resume=|\.\.\.|optuna|submitit|mysteps"
)
"""Words that stand for a user's own, files that a page writes first, and launchers that not everybody installs."""


def commands() -> list[str]:
    """Every line of the pages that runs an experiment, its comment left out, lines that go on joined."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s{2,}#.*| # .*", "", line).strip().removeprefix("$ ")
                if text.startswith("python -m kdlab ") and "experiment=" in text and not PLACEHOLDER.search(text):
                    found[text] = None
    return [text for text in found if text.split()[3] not in ("check", "list", "diagnose", "compare")]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_composes(command):
    flags = parse_flags(shlex.split(command)[3:])
    with composer() as made:
        assert make_plan(flags, made).points


def test_there_are_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("group", ["loss", "method", "batch_transform"])
def test_every_option_has_a_place_in_the_pages(group):
    pages = "".join(page.read_text() for page in PAGES)
    options = {path.stem for path in (CONF / group).glob("[!_]*.yaml")} - {"none"}
    missing = {name for name in options if not re.search(rf"(?<!\w){name}(?!\w)", pages)}
    assert not missing


def test_temperatures_that_experiments_announce_are_theirs():
    announced = {}
    for path in (CONF / "experiment").glob("[!_]*.yaml"):
        comments = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
        if (match := re.search(r"\bT = ([\d.]+)", comments)) is not None:
            announced[path.stem] = float(match[1].rstrip("."))
    assert announced
    with composer() as made:
        for name, temperature in announced.items():
            assert made.compose([f"experiment={name}"]).config["loss"]["temperature"] == temperature, name
