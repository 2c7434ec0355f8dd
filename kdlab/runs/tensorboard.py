"""TensorBoard records beyond plain curves: charts of several curves, and every job in the HParams tab.

``SummaryWriter.add_hparams`` would put each job into a sub-folder named by the time, apart from its curves.
Here the same records go into the event file of the run itself, so that one run is one line everywhere.

The record called "experiment", which lists the columns of the HParams tab, is left out on purpose:
TensorBoard takes the first one it comes upon for *all* runs. Settings that this run lacks would vanish,
and where temperature is a number in one run and a schedule in another, the tab would answer with an error.
Without that record TensorBoard gathers the columns, and their types, from every job.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab.errors import UserError
from kdlab.runs.measures import measures, score_of
from kdlab.runs.read import Run, finite, setting

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRIC = "final/"
"""Prefix of the tags of final metrics, so that they never add a point to a curve."""

_STATUS = {"finished": "STATUS_SUCCESS", "failed": "STATUS_FAILURE"}
# The HParams tab opens with the first five metrics by name; a sixth would push one of these out of sight.
_SCORED = ("val", "test", "baseline", "difference")

MAIN = (
    "loss.temperature",
    "loss.alpha",
    "loss",
    "method",
    "student",
    "teacher",
    "data",
    "data.labels",
    "seed",
    "epochs",
)
"""The settings that the HParams tab always lists."""


CHARTS: dict[str, dict[str, list[str]]] = {
    "distillation": {
        "KL and CE, training": ["^train/kl$", "^train/ce$"],
        "KL (T = 1) and CE, validation": ["^val/kl$", "^val/ce$"],
        "accuracy and agreement, validation": ["^val/acc$", "^val/agreement$"],
        "temperature and alpha": ["^train/temperature$", "^train/alpha$"],
    },
    "language": {
        "perplexity, validation": ["^val/ppl$", "^val/ppl_word$"],
        "exact match, validation": ["^val/em$", "^val/em/.*$"],
        "own text: tokens": ["^train/own_length$"],
        "own text: shares that ended, and were cut off": ["^train/own_ended$", "^train/own_truncated$"],
    },
    "gradients": {
        "norm of each weighted term, and of all": ["^grad/norm/.*$"],
        "cosine between terms": ["^grad/cosine/.*$"],
    },
}
"""Map of section → chart → curves of the Custom Scalars tab; the ``$`` is needed as TensorBoard matches prefixes."""


def custom_scalars_layout(curves: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the non-empty charts of the Custom Scalars tab, as ``SummaryWriter.add_custom_scalars`` takes them.

    A chart is the same for every run that has it: TensorBoard merges the layouts of all runs, and equal charts become
    one.

    Args:
        curves: names of the run's curves.
    """
    layout = {}
    for section, charts in CHARTS.items():
        kept = {title: tags for title, tags in charts.items() if _match(tags, curves)}
        if kept:
            layout[section] = {title: ["Multiline", tags] for title, tags in kept.items()}
    return layout


def _match(tags: Iterable[str], curves: Iterable[str]) -> bool:
    return any(re.match(tag, name) for tag in tags for name in curves)


def add_layout(writer: SummaryWriter, curves: Collection[str]) -> None:
    """Write the layout into the run's event file; TensorBoard reads the first that a folder's files hold."""
    if layout := custom_scalars_layout(curves):
        writer.add_custom_scalars(layout)


def log_hparams(
    writer: SummaryWriter,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    status: str = "finished",
    step: int = 0,
) -> None:
    """Write the records by which the HParams tab lists the run, into its own event file.

    Args:
        writer: the run's writer (Lightning: ``TensorBoardLogger.experiment``).
        settings: flat settings; numbers stay numbers, and a schedule or any other mapping is shown as text.
        metrics: final metrics by name, each written as the scalar ``final/<name>``; what is None or not
            finite is left out.
        status: ``finished`` or ``failed``. TensorBoard keeps the first that a folder's files hold, so write
            it when the run ends for good, not when it is stopped to be resumed.
        step: number of optimizer steps done.

    Raises:
        UserError: on an unknown status.
    """
    from torch.utils.tensorboard.summary import hparams

    if status not in _STATUS:
        raise UserError("status", f"unknown value {status!r}", ", ".join(_STATUS))
    shown = {str(key): _plain(value) for key, value in settings.items() if value is not None}
    _experiment, start, _always_success = hparams(shown, {})
    events = writer._get_file_writer()
    events.add_summary(start)
    for name, value in metrics.items():
        if (number := finite(value)) is not None:
            writer.add_scalar(METRIC + name, number, step)
    events.add_summary(_session_end(_STATUS[status]))
    writer.flush()


def log_result(writer: SummaryWriter, result: Mapping[str, Any]) -> None:
    """Call :func:`log_hparams` with the settings that matter and the final metrics of a ``result.json``.

    All settings would fill dozens of columns and hide temperature and alpha among them: shown are those of ``MAIN``,
    and what the user set.
    """
    metrics, status = final_metrics(result), str(result.get("status"))
    settings = result.get("settings") or {}
    typed = {str(text).lstrip("+~").split("=")[0] for text in result.get("overrides") or ()}
    shown = {key: value for key, value in settings.items() if key in MAIN or key in typed}
    log_hparams(writer, shown, metrics, status, int(result.get("steps") or 0))


def final_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that a comparison shows, by name (val, test, baseline, ...), those that were measured.

    Where runs are not judged by accuracy the names say so (``val_ppl``), so that tasks do not share a column; exact
    match then takes the place of the agreement with the teacher, which has a curve.
    """
    run = Run(Path("."), dict(result))
    known, score = measures([run]), score_of([run])
    suffix = "" if score.key == "acc" else f"_{score.key}"
    values = {f"{key}{suffix}": known[key].get(run) for key in _SCORED}
    values |= {key: known[key].get(run) for key in (["em"] if "em" in known else ["agreement"])}
    return {key: value for key, value in values.items() if value is not None}


def _session_end(status: str) -> Any:
    """Return the record that ends a session; torch writes no other status than success."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(status))
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end, version=metadata.PLUGIN_DATA_VERSION)
    data = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=SummaryMetadata(plugin_data=data))
    return Summary(value=[value])


def _plain(value: object) -> float | str:
    """Return a number unchanged; everything else as text, booleans too (TensorBoard would make them 0 and 1)."""
    number = finite(value)
    return setting(value) if number is None else number
