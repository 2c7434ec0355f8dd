"""What the real TensorBoard server says about runs written with kdlab's helpers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from helpers import fabricate
from kdlab.errors import UserError
from kdlab.runs import tensorboard as helpers

SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

COSINE = {"start": 8, "end": 1, "shape": "cosine"}
RUNS: dict[str, tuple[Any, float, str]] = {
    "a": (4.0, 0.9, "finished"),
    "b": (COSINE, 0.5, "finished"),
    "c": (2.0, 0.1, "failed"),
}


class Server:
    """A TensorBoard on this machine alone, asked over HTTP."""

    def __init__(self, logdir: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}/data/plugin/{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def wait(self, runs: int, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "TensorBoard ended by itself"
            try:
                if len(self.ask("scalars/tags")) == runs:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise AssertionError("TensorBoard did not show the runs in time")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    logdir = tmp_path_factory.mktemp("outputs")
    for name, (temperature, alpha, status) in RUNS.items():
        writer = SummaryWriter(str(logdir / name))
        curves = {tag for line in fabricate.curves(temperature, alpha) for tag in line}
        helpers.add_layout(writer, {*curves, "train/temperature"})
        for line in fabricate.curves(temperature, alpha):
            for tag, value in line.items():
                writer.add_scalar(tag, value, line["step"])
        helpers.log_result(writer, fabricate.result(temperature, alpha, status=status))
        writer.close()
    running = Server(logdir)
    try:
        running.wait(len(RUNS))
        yield running
    finally:
        running.process.terminate()
        running.process.wait(10)


def test_one_run_is_one_folder(server: Server) -> None:
    tags = server.ask("scalars/tags")
    assert set(tags) == set(RUNS)  # no sub-folder of its own for the settings
    assert {"train/kl", "train/ce", "val/kl", "val/ce", "final/val", "final/test"} <= set(tags["a"])


def test_kl_and_ce_share_a_chart(server: Server) -> None:
    categories = {one["title"]: one for one in server.ask("custom_scalars/layout")["category"]}
    assert list(categories) == ["distillation"], "no section without a curve"
    category = categories["distillation"]
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
    # Three runs wrote the layout, and each chart is there once.
    assert len(charts) == len(category["chart"]) == 4
    assert charts["KL and CE, training"] == ["^train/kl$", "^train/ce$"]
    for tag in charts["KL and CE, training"]:
        points = server.ask(f"custom_scalars/scalars?run=a&tag={tag}")["tag_to_events"]
        assert {name: len(events) for name, events in points.items()} == {tag.strip("^$"): 30}


def test_language_models_have_charts_of_their_own(tmp_path: Path) -> None:
    import re

    logged = {name for line in fabricate.language_curves() for name in line}
    layout = helpers.custom_scalars_layout(logged)["language"]
    assert list(layout) == [
        "perplexity, validation",
        "own text: tokens",
        "own text: shares that ended, and were cut off",
    ]
    tags = {tag for _, patterns in layout.values() for tag in patterns}
    shown = {name for name in logged for tag in tags if re.match(tag, name)}
    assert shown == {"val/ppl", "train/own_length", "train/own_ended"}


def test_the_layout_waits_for_the_first_point_of_every_curve() -> None:
    from kdlab.runs.tensorboard_layout import Layout

    class Board:
        experiment = property(lambda self: self)
        layouts: ClassVar[list[Any]] = []

        def add_custom_scalars(self, layout: Any) -> None:
            self.layouts.append(layout)

    layout = Layout(Board())  # type: ignore[arg-type]
    layout.finalize("success")
    assert not Board.layouts, "no curve, no layout"
    layout.log_metrics({"train/loss": 1.0, "train/ce": 1.0}, 50)
    layout.log_metrics({"val/acc": 0.5, "val/ce": 1.0}, 60)
    assert not Board.layouts
    layout.log_metrics({"train/loss": 1.0, "train/ce": 1.0, "grad/norm/ce": 1.0}, 60)
    layout.log_metrics({"val/ppl": 1.0}, 120)
    layout.finalize("success")
    (written,) = Board.layouts
    assert list(written) == ["distillation", "gradients"] and "temperature and alpha" not in written["distillation"]


def test_final_metrics_of_language_models_say_what_they_are() -> None:
    result = fabricate.language_result()
    student, baseline = (result["models"][role]["test"] for role in ("student", "baseline"))
    assert helpers.final_metrics(result) == {
        "val_ppl": result["models"]["student"]["val"]["ppl"],
        "test_ppl": student["ppl"],
        "baseline_ppl": baseline["ppl"],
        "difference_ppl": student["ppl"] - baseline["ppl"],
        "em": student["em"],
    }


def test_hparams_tab_lists_every_job(server: Server) -> None:
    experiment = server.ask("hparams/experiment", {"experimentName": ""})
    types = {info["name"]: info["type"] for info in experiment["hparamInfos"]}
    assert types["loss.alpha"] == "DATA_TYPE_FLOAT64"
    assert types["loss.temperature"] == "DATA_TYPE_STRING"  # numbers beside a schedule
    filters = {"DATA_TYPE_FLOAT64": {"filterInterval": {"minValue": "-Infinity", "maxValue": "Infinity"}}}
    query = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE"],
        "colParams": [{"hparam": name, **filters.get(kind, {})} for name, kind in types.items()],
        "startIndex": 0,
        "sliceSize": 100,
    }
    groups = {group["name"]: group for group in server.ask("hparams/session_groups", query)["sessionGroups"]}
    assert set(groups) == set(RUNS)
    assert {name: group["hparams"]["loss.temperature"] for name, group in groups.items()} == {
        "a": 4.0,
        "b": "8→1 cosine",
        "c": 2.0,
    }
    for name, (temperature, alpha, status) in RUNS.items():
        (session,) = groups[name]["sessions"]
        assert session["status"] == ("STATUS_FAILURE" if status == "failed" else "STATUS_SUCCESS")
        assert groups[name]["hparams"]["loss.alpha"] == alpha
        shown = {value["name"]["tag"]: value["value"] for value in groups[name]["metricValues"]}
        models = fabricate.result(temperature, alpha)["models"]
        assert shown["final/val"] == pytest.approx(models["student"]["val"]["acc"], abs=1e-6)
        assert shown["final/test"] == pytest.approx(models["student"]["test"]["acc"], abs=1e-6)
        gain = models["student"]["test"]["acc"] - models["baseline"]["test"]["acc"]
        assert shown["final/difference"] == pytest.approx(gain, abs=1e-6)


def test_an_unknown_status_is_named(tmp_path: Path) -> None:
    with (
        SummaryWriter(str(tmp_path)) as writer,
        pytest.raises(UserError, match=r"status.*'done'.*finished, failed"),
    ):
        helpers.log_hparams(writer, {}, {}, status="done")


def test_what_is_not_a_number_is_left_out() -> None:
    result = fabricate.result()
    result["models"]["baseline"] = None
    result["models"]["student"]["val"]["acc"] = float("nan")
    final = helpers.final_metrics(result)
    assert "val" not in final and "baseline" not in final and "difference" not in final
    assert final["test"] == result["models"]["student"]["test"]["acc"]
