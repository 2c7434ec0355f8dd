"""Text of ``kdlab --help``: quick, since it reads file names and first lines only."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter

from kdlab.cli import verbs
from kdlab.config import options

_FAMILY = 6
"""Largest number of options with one beginning that are named one by one."""

_LEAD = ("experiment", "student", "teacher", "data", "loss", "temperature", "method")


def helptext() -> str:
    """Return the help text: verbs, groups with their options, keys and examples."""
    available = options.read(options.folders())
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    parts = [
        "kdlab trains a small student from a large teacher, and compares every way of doing so.",
        "",
        "usage: kdlab [-m] [--cfg job] group=option ... key=value ...   run an experiment (-m: a sweep)",
        "       kdlab VERB [--help] ...          (kdlab, or python -m kdlab; --hydra-help: Hydra's own settings)",
        "",
        "verbs",
        *_verbs(width),
        "",
        "groups: group=option (python -m kdlab list GROUP says what each option is)",
        *_groups(available, width),
        "",
        "keys: key=value; python -m kdlab experiment=kd_resnet --cfg job prints all of them",
        "  seed=0  epochs=30  name=my_run  output=outputs  resume=auto|RUN  baseline=true",
        "  loss.alpha=0.9  loss.temperature=4 or '{start: 8, end: 1, shape: cosine}'  data.labels=100",
        "  teacher.checkpoint=FILE  teacher.data.labels=100  student.width=8  optimizer.lr=0.1",
        "",
        "examples",
        "  python -m kdlab experiment=kd_resnet",
        "  python -m kdlab experiment=kd_resnet loss=dkd student=resnet8 teacher=wrn_40_2 data=cifar100",
        "  python -m kdlab -m experiment=kd_resnet loss.temperature=1,2,4,8 loss.alpha=0.1,0.5,0.9",
        "  python -m kdlab -m experiment=kd_resnet hydra/launcher=joblib seed=0,1,2,3",
        "  python -m kdlab -m experiment=kd_resnet hydra/sweeper=optuna hydra.sweeper.n_trials=20 \\",
        "      'loss.temperature=interval(1,10)' 'optimizer.lr=tag(log,interval(0.001,0.1))'",
        "  python -m kdlab check experiment=kd_resnet        python -m kdlab compare outputs/kd_resnet",
        "",
        "Your own options: a file such as ./conf/model/mynet.yaml is found first, and gives student=mynet.",
    ]
    return "\n".join(parts)


def _verbs(width: int) -> list[str]:
    summaries = verbs.summaries()
    column = max(map(len, summaries)) + 2
    return [
        line
        for name, text in summaries.items()
        for line in textwrap.wrap(
            text, width, initial_indent=f"  {name:<{column}}", subsequent_indent=" " * (column + 2)
        )
    ]


def _groups(available: options.Options, width: int) -> list[str]:
    names = [g for g in _LEAD if g in available.groups]
    names += [g for g in available.groups if g not in names and g != options.NETWORKS]
    lines, widest = [], max(map(len, names))
    for name in names:
        shown = available.of(name)
        if name == "teacher":
            shown = ["any student", *options.EXTRA["teacher"]]
        shown = _short(shown)
        first, rest = f"  {name:<{widest + 1}}", " " * (widest + 3)
        lines += textwrap.wrap(" ".join(shown), width, initial_indent=first, subsequent_indent=rest)
    return lines


def _short(names: list[str]) -> list[str]:
    """Return sorted names, those of a family of many (``cifar100_TEACHER_STUDENT``) as one."""
    families = Counter(name.partition("_")[0] for name in names)
    many = {family: count for family, count in families.items() if count > _FAMILY}
    kept = [name for name in names if name.partition("_")[0] not in many]
    return sorted([*kept, *(f"{family}_... ({count} of them)" for family, count in many.items())])
