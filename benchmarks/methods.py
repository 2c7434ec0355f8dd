"""What every method costs per training step, against plain cross-entropy on the same student.

    python benchmarks/methods.py [--data digits|pictures] [--rows hinton,fitnets] [--rounds 10] [--steps 10]
    python benchmarks/methods.py --write outputs/leaderboard/digits/times.json     (the step times of that board)

The methods are the rows of a leaderboard (conf/leaderboard/digits.yaml), one setting each; where a row has stages, each
is a line. ``--data digits``: ResNet-20 teaches a ResNet-8 of width 4, 8x8, batch 64. ``--data pictures``: ResNet-56
teaches a ResNet-20, 32x32 made pictures, batch 64. Networks have random weights, and a learning rate near 0.

A step is zero_grad, what the method's ``training_step`` does (teacher, student, objective), backward, optimizer. A
plain step is the same by hand, with ``F.cross_entropy``; validation, checkpoints and Lightning are in neither. In each
round every method in turn makes so many steps, and right beside them as many plain ones. Teachers answer from a cache
where that can be; methods that look at layers are timed with a live teacher too. For every method, each network of a
live teacher must answer once a step, and one behind a cache, or that no term looks at, never; the benchmark stops where
that is not so.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pairs import duration, header, ratio, seconds
from steps import Step, endless
from torch import nn
from torch.nn import functional as F

from kdlab.cli.hydra.compose import Composition, composer
from kdlab.cli.hydra.plan import QUIET
from kdlab.cli.validate import validate
from kdlab.config import builder, options
from kdlab.errors import UserError, unknown
from kdlab.experiment import build
from kdlab.experiment.schema import Experiment, TeacherSpec
from kdlab.experiment.stage import is_taught, is_taught_by_previous
from kdlab.experiment.teacher import TrainedModel, each_member, resolve_teacher
from kdlab.functional import seed_all
from kdlab.methods import Method
from kdlab.methods.method import TermAccumulator
from kdlab.report.leaderboard.leaderboard import Board, Entry
from kdlab.teachers import CachedTeacher, EnsembleTeacher, FrozenTeacher, Teacher

SCALES = {
    "digits": ("data.fraction=null",),
    "pictures": ("data=tensors", "data.val=64", "data.fraction=null", "student=resnet20", "teacher=resnet56"),
}
"""What is laid over a board's own settings."""

SHARED = ("trainer=cpu", "optimizer.lr=1e-5", "data.batch_size=64")
"""Of both scales; weights hardly move, so that no step is of numbers that have overflowed."""

PICTURES = 512 + 64


# ---- what is timed


@dataclass
class Case:
    """One line of the table."""

    row: str
    told: str
    """Where the teacher's answers come from."""
    step: Step
    plain: Step
    times: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    def turn(self, steps: int, first: bool) -> None:
        """Time so many steps and, before or after them, as many plain ones."""
        for action, kept in ((self.step, self.times), (self.plain, self.beside))[:: 1 if first else -1]:
            kept.append(seconds(lambda action=action: [action() for _ in range(steps)]) / steps)  # type: ignore[misc]

    def line(self) -> str:
        """Of the Markdown table."""
        found = ratio(self.times, self.beside)
        spread = f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})"
        took = " : ".join(map(duration, found.seconds))
        return f"| `{self.row}` | {spread} | {found.n} | {self.told} | {took} |"


class Bench:
    """Builds cases; networks that teach are made once.

    Args:
        folder: where caches go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nets: dict[str, nn.Module] = {}

    def cases(self, row: str, point: Composition) -> Iterator[Case]:
        """A row's fits: each with a teacher as it is, and with a live one too where its layers are looked at."""
        for name, experiment, before in _fits(point):
            label = f"{row}/{name}" if name else row
            usual = self._built(replace(experiment, output=str(self.folder)), before)
            live = self._built(_live(replace(experiment, output=str(self.folder))), before)
            data = build.data(experiment.data, experiment.seed)
            for method, nets in (usual, live):
                _check(label, method, nets, data)
            plain = self._plain(experiment, data)
            told = _told(usual[0])
            yield Case(label, told, _step(usual[0], data), plain)
            if usual[0].objective.teacher_layers and _told(live[0]) != told:
                yield Case(label, _told(live[0]), _step(live[0], data), plain)

    def _built(self, experiment: Experiment, before: Experiment | None) -> tuple[Method, list[nn.Module]]:
        """A method ready to train, as a fit would make it, and the networks that teach in it."""
        training = build.training(experiment.trainer)
        data = build.data(experiment.data, experiment.seed)
        data.to(training.device)
        task, objective = build.task(experiment.task, data), build.objective(experiment.loss, data)
        source = self._source(experiment, before, data) if is_taught(experiment, objective) else None
        lesson = resolve_teacher(source, experiment, data, task, objective, training) if source is not None else None
        student = build.network(experiment.student, data, experiment.seed, "student")
        if experiment.init == "classifier":
            build.init_weights(student, experiment.init, previous=None, teacher=source and source.net, pretrained=None)
        auxiliary = build.auxiliary(experiment, student, data)
        teacher = lesson.teacher if lesson is not None else None
        method = build.method(experiment, student, objective, task, teacher, auxiliary=auxiliary)
        seed_all(experiment.seed)
        method.prepare(next(endless(data)), data.counts["train"])
        method.on_fit_start()
        if method.teacher is not None:  # snapshots are there from the second of two epochs on
            method.teacher.update(student, 1, 2, step_done=False)
        found = [one.net for one in ((source.members or (source,)) if source is not None else ())]
        own = getattr(method.teacher, "net", None)
        return method, [net for net in (found or [own]) if net is not None]

    def _source(self, experiment: Experiment, before: Experiment | None, data: Any) -> TrainedModel:
        """Who teaches, with random weights."""
        if is_taught_by_previous(experiment):
            assert before is not None
            return TrainedModel(self._net(before.student, data, before.seed), "made")
        members = [self._net(one.teacher.net, data, one.teacher.seed) for one in each_member(experiment)]  # type: ignore[union-attr, arg-type]
        if members:
            return TrainedModel(None, "made", members=tuple(TrainedModel(net, "made") for net in members))
        assert experiment.teacher is not None and experiment.teacher.net is not None
        return TrainedModel(self._net(experiment.teacher.net, data, experiment.teacher.seed), "made")

    def _net(self, config: dict, data: Any, seed: int) -> nn.Module:
        """A network that has seen a few batches, so that its BatchNorms keep outputs in bounds, however deep it is."""
        key = json.dumps([config, seed], sort_keys=True)
        if key not in self._nets:
            net = build.network(config, data, seed, "teacher.net").train()
            for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.momentum = None  # the mean over all that it sees
            with torch.no_grad():
                for _, batch in zip(range(4), endless(data), strict=False):
                    net(batch.inputs)
            self._nets[key] = net.eval()
        return self._nets[key]

    def _plain(self, experiment: Experiment, data: Any) -> Step:
        """Cross-entropy on the labels, written by hand, with the experiment's optimizer."""
        net = build.network(experiment.student, data, experiment.seed, "student").train()
        optimizer = build.make_optimizer(experiment.optimizer)(list(net.parameters()))
        batches = endless(data)

        def step() -> None:
            batch = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(net(batch.inputs), batch.targets).backward()
            optimizer.step()

        return step


def _fits(point: Composition) -> Iterator[tuple[str, Experiment, Experiment | None]]:
    """Every fit of a row: its name, its experiment, and that of the fit before; of generations, the second."""
    before = None
    plan = {name: stage.config for name, stage in point.stages.items()} or {"": point.config}
    for name, config in plan.items():
        one = replace(Experiment.of(config), scheduler=None)
        if one.method.get("generations", 1) > 1:
            before = one
        yield name, one, before
        before = one


def _live(experiment: Experiment) -> Experiment:
    return replace(experiment, teacher=replace(experiment.teacher or TeacherSpec(), cache="off"))


def _step(method: Method, data: Any) -> Step:
    """A training step without Lightning around it."""
    optimizer, batches = method.configure_optimizers(), endless(data)
    method._steps = 10**6
    method.train()

    def step() -> None:
        if method._curves is None or method._curves.full:
            method._curves = TermAccumulator(method.objective.names, 50)
        optimizer.zero_grad()
        method.training_step(next(batches), 0).backward()
        optimizer.step()
        if method.teacher is not None:
            method.teacher.update(method.student, 1, 2, step_done=True)

    return step


def _told(method: Method) -> str:
    """Where the teacher's answers come from."""
    if method.teacher is not None:
        return _kind(method.teacher) if method.uses_teacher else "not asked"
    if method.auxiliary is not None:
        return method.auxiliary.kind
    return "itself" if getattr(method, "source", None) == "step" else "nobody"


def _kind(teacher: Teacher) -> str:
    if isinstance(teacher, EnsembleTeacher):  # whose members are all alike
        return f"{len(teacher.members)} x {_kind(teacher.members[0])}"
    if isinstance(teacher, CachedTeacher):
        return "features cached" if teacher.inside is not None else "cache"
    return "live" if isinstance(teacher, FrozenTeacher) else "itself"


# ---- how often a teacher's networks answer


def _check(row: str, method: Method, nets: Sequence[nn.Module], data: Any) -> None:
    """Make a few steps, and count.

    Raises:
        SystemExit: if a network of a live teacher does not answer exactly once a step, or one behind a cache does.
    """
    step = _step(method, data)
    kind, steps = _told(method), 2
    with _counted(nets) as counts:
        for _ in range(steps):
            step()
    wanted = steps * (0 if "cache" in kind or not method.uses_teacher else 1)
    if any(count != wanted for count in counts):
        raise SystemExit(
            f"{row} ({kind}): its teacher's networks answered {counts} times in {steps} steps, and not {wanted} each"
        )


@contextmanager
def _counted(nets: Sequence[nn.Module]) -> Iterator[list[int]]:
    """How often each network is called inside."""
    counts = [0] * len(nets)

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    handles = [net.register_forward_hook(count(number)) for number, net in enumerate(nets)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# ---- all of it


def composed(board: Board, rows: Sequence[str], more: Sequence[str]) -> Iterator[tuple[str, Composition]]:
    """Each row of a board at its first seed, with ``more`` laid beneath the row's own settings."""
    quiet = [f"{key}={value}" for key, value in QUIET.items()]
    under = replace(board, shared=[*board.shared, *more])
    with composer() as made, builder.trust(user_modules=True):
        for row in rows:
            try:
                parsed = made.parse(under.overrides(Entry(row, tuple(board.rows[row])), board.seeds[0]))
                point = made.compose([*quiet, *(str(one.input_line) for one in parsed)])
                validate(point, made)
            except UserError as error:
                raise UserError(f"{board.name}, {row}: {error}") from None
            yield row, point


def made_pictures(folder: Path) -> str:
    """Random pictures in the shape of CIFAR's, as an override that reads them."""
    make = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (PICTURES, 3, 32, 32), dtype=torch.uint8, generator=make)
    targets = torch.arange(PICTURES) % 10
    file = folder / "pictures.pt"
    torch.save({"inputs": inputs, "targets": targets, "test_inputs": inputs[:64], "test_targets": targets[:64]}, file)
    return f"data.inputs={file}"


def read_board(name: str) -> Board:
    """A board by its name."""
    found = options.read(options.folders())
    path = found.file(options.BOARDS, name)
    if path is None:
        raise unknown("board", name, found.boards, "board")
    return Board.read(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SCALES, default="digits")
    parser.add_argument("--rows", help="A,B,...: these methods; all of the board unless given")
    parser.add_argument("--rounds", type=int, default=10, help="times that every method is timed")
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--board", default="digits", help="whose rows are the methods")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--write", type=Path, help="a file for each row's ratio, as `kdlab leaderboard --time` writes it"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    logging.getLogger("kdlab").setLevel(logging.ERROR)
    board = read_board(args.board)
    rows = [row for row in (args.rows or ",".join(board.rows)).split(",") if row]
    board.only(rows, None)  # refuses what is no row
    header(f"methods: a training step against plain cross-entropy ({args.data}, {args.threads} thread(s), float32)")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        more = [*SCALES[args.data], *SHARED, *([made_pictures(folder)] if args.data == "pictures" else [])]
        bench = Bench(folder)
        cases = [case for row, point in composed(board, rows, more) for case in bench.cases(row, point)]
        for case in cases:
            case.plain()
        print(f"each network of a live teacher answered once a step, one behind a cache never ({len(cases)} lines)\n")
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
            for case in cases[:: -1 if number % 2 else 1]:
                case.turn(args.steps, first=number % 2 == 0)
    print("| method | step : plain step (95 % interval) | n | the teacher's answers | times |")
    print("|---|---|---|---|---|")
    for case in cases:
        print(case.line())
    if args.write is not None:
        args.write.write_text(json.dumps(of_rows(cases), indent=1))


def of_rows(cases: Sequence[Case]) -> dict[str, float]:
    """Each row's ratio, with its teacher as it is; the mean of its fits, where it has several."""
    usual: dict[str, float] = {}
    for case in cases:
        usual.setdefault(case.row, ratio(case.times, case.beside).median)
    rows: dict[str, list[float]] = {}
    for label, found in usual.items():
        rows.setdefault(label.split("/")[0], []).append(found)
    return {row: statistics.fmean(each) for row, each in rows.items()}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
