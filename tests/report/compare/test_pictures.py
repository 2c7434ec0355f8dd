"""Pictures and the HTML page of a comparison."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers import fabricate
from helpers.paths import ROOT
from kdlab.report.compare import page, pictures
from kdlab.report.compare.comparison import Comparison
from kdlab.report.compare.curve_pictures import kl_and_ce
from kdlab.report.drawing import Drawing
from kdlab.runs import read

PNG = b"\x89PNG\r\n\x1a\n"


def comparison_of(folder: Path) -> Comparison:
    return Comparison.of(read.scan([folder]))


def texts(drawing: Drawing) -> list[str]:
    """Everything written inside the axes of a figure."""
    return [text.get_text() for ax in drawing.figure.axes for text in ax.texts]


def test_the_map_shows_validation_large_test_small_and_holes_hatched(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path, temperatures=(1, 2, 4), alphas=(0.1, 0.9))
    hole = next(run.folder for run in read.load([tmp_path]) if "temperature=2,loss.alpha=0.1" in run.label)
    (hole / "result.json").unlink()
    comparison = comparison_of(tmp_path)
    drawing = pictures.heat_map(comparison)
    assert drawing is not None
    shown = texts(drawing)
    assert len(shown) == 10  # five cells, two texts each
    best = comparison.groups[0].runs[0]
    assert f"{100 * best.number('student', 'val', 'acc'):.2f}" in shown
    assert f"test {100 * best.number('student', 'test', 'acc'):.2f}" in shown
    assert sum(patch.get_hatch() is not None for patch in drawing.figure.axes[0].patches) == 1


def test_the_map_averages_seeds_and_splits_by_the_rest(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path / "a", temperatures=(1, 4), alphas=(0.5, 0.9), seeds=2)
    for run in read.load([tmp_path / "a"]):
        settings = run.result["settings"] | {"student": "resnet14"}
        fabricate.write(tmp_path / "b" / run.label, run.result | {"settings": settings})
    fabricate.write(tmp_path / "c", fabricate.result({"start": 8, "end": 1}))
    drawing = pictures.heat_map(comparison_of(tmp_path))
    assert drawing is not None
    assert sorted(ax.get_title() for ax in drawing.figure.axes) == ["student=resnet14", "student=resnet8_w4"]
    assert sum(text.startswith("± ") for text in texts(drawing)) == 8
    assert "Not in the map: 1 setting" in drawing.caption


def test_no_map_without_two_temperatures_and_two_alphas(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path, temperatures=(1, 4), alphas=(0.9,))
    assert pictures.heat_map(comparison_of(tmp_path)) is None


def test_kl_and_ce_lie_over_each_other_in_the_colour_of_their_temperature(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path, temperatures=(1, 4), alphas=(0.9,))
    drawing = kl_and_ce(comparison_of(tmp_path))
    assert drawing is not None
    for ax in drawing.figure.axes:  # training, validation
        assert len(ax.lines) == 4  # two temperatures, KL and CE
        assert len({line.get_color() for line in ax.lines}) == 2
        assert {line.get_linestyle() for line in ax.lines} == {"-", "--"}
    (legend,) = drawing.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["KL", "CE", "T = 1", "T = 4"]


def test_gain_bars_are_paired_differences_with_their_deviation(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path, temperatures=(1, 4), alphas=(0.9,), seeds=3)
    comparison = comparison_of(tmp_path)
    drawing = pictures.gains(comparison)
    assert drawing is not None
    stat = comparison.groups[0].stat(comparison.measures["difference"].get)
    assert stat is not None
    assert drawing.figure.axes[0].patches[0].get_width() == pytest.approx(100 * stat.mean)
    assert "standard deviation" in drawing.caption


@pytest.mark.parametrize("odd", ["name $x_{", "日本 <b>", "a" * 300])
def test_any_name_can_be_drawn(tmp_path: Path, odd: str, recwarn: pytest.WarningsRecorder) -> None:
    for seed, student in enumerate((odd, "resnet8")):
        content = fabricate.result(seed=seed)
        content["settings"]["student"] = student
        fabricate.write(tmp_path / f"run{seed}", content, fabricate.curves(seed=seed))
    drawn = pictures.draw(comparison_of(tmp_path), tmp_path)
    assert [picture.path.name for picture in drawn] == ["curves.png", "size.png", "gain.png"]
    assert all(picture.path.read_bytes().startswith(PNG) for picture in drawn)
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_pictures_of_an_earlier_comparison_do_not_stay(tmp_path: Path) -> None:
    fabricate.write(tmp_path / "run", fabricate.result())
    (tmp_path / "heat_map.png").write_bytes(PNG)
    pictures.draw(comparison_of(tmp_path / "run"), tmp_path)
    assert not (tmp_path / "heat_map.png").exists()


def test_drawing_leaves_no_global_state(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path, temperatures=(1, 4), alphas=(0.5, 0.9))
    code = (
        "import sys\nfrom kdlab.cli.verbs.compare import main\nimport matplotlib\n"
        # dict.items, since asking rcParams for its backend would itself import pyplot.
        "before = list(dict.items(matplotlib.rcParams.copy()))\n"
        f"main([{str(tmp_path)!r}])\n"
        "assert list(dict.items(matplotlib.rcParams.copy())) == before\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Reader(HTMLParser):
    """Collects tags and the addresses that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]


def write_page(folder: Path, command: str = "python -m kdlab compare x") -> str:
    comparison = comparison_of(folder)
    drawn = pictures.draw(comparison, folder)
    columns = ["student", "val", "test"]
    page.write(folder / "index.html", comparison, columns, comparison.groups, drawn, command)
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    fabricate.sweep(tmp_path, temperatures=(1, 4), alphas=(0.5, 0.9))
    text = write_page(tmp_path)
    reader = Reader()
    reader.feed(text)
    assert len(reader.addresses) == 4 and all(a.startswith("data:image/png;base64,") for a in reader.addresses)
    assert base64.b64decode(reader.addresses[0].partition(",")[2]).startswith(PNG)
    assert "url(" not in text and "@import" not in text and "link" not in reader.tags
    for fact in ("torch 2.13.0", "a processor, cpu, 2 threads", "1200 labelled rows of digits", "0123abc"):
        assert fact in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count("<tr") == 5 and 'data-value="1"' in text


def test_what_comes_from_run_folders_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>\"' onload=x <img src=x>"
    content = fabricate.result(teacher_trained_on=attack, hardware={"name": attack}, versions={attack: attack})
    content["settings"]["student"] = attack
    fabricate.write(tmp_path / "run", content | {"name": attack, "commit": attack})
    fabricate.failed(tmp_path / "bad", error=attack)
    text = write_page(tmp_path, command=attack)
    reader = Reader()
    reader.feed(text)
    assert reader.tags.count("script") == 1 and reader.tags.count("img") == text.count("data:image/png")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39; onload=x" in text


def test_the_policy_admits_the_script_of_the_page_alone(tmp_path: Path) -> None:
    fabricate.write(tmp_path / "run", fabricate.result())
    text = write_page(tmp_path)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
