"""Loaders: iterables of Batches whose content is a function of (seed, epoch), ready on the compute device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate as running_sum
from typing import Any

import torch
from torch import Tensor

from kdlab.data.augment import Augmentation
from kdlab.data.mixing import Recipe
from kdlab.data.order import Order, Steps, Views, parts_of
from kdlab.data.raw import Files
from kdlab.errors import UserError
from kdlab.functional.types import Batch, StepTotals


@dataclass
class Split:
    """Rows that a loader shows.

    ``inputs`` is (N, ...) on the compute device, or pictures on disk; ``targets`` (N,) on the CPU, -100 without
    label; ``truth`` all labels, where some are withheld; ``tasks`` the targets of each task, where there are several.
    """

    inputs: Tensor | Files
    targets: Tensor
    truth: Tensor | None = None
    tasks: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)


class EpochSampler:
    """Holder of the epoch; Lightning finds it as ``loader.sampler`` and sets the epoch before its first batch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is shown."""
        self.epoch = epoch


class EpochLoader:
    """Base of the loaders of rows and of sequences, which chooses the examples of this process's micro-batches.

    ``len()`` counts the micro-batches of an epoch in this process. Set before iterating, and all optional:

    - ``sampler.set_epoch(epoch)``: which epoch to show. The same epoch gives the same batches again.
    - ``skip``: how many micro-batches of the next iteration have been seen already; back to 0 once used.

    The epoch is looked at when the first batch is asked for, not by ``iter()``: Lightning calls that first.

    Args:
        examples: number of examples of the split.
        batch_size: examples of one optimizer step, over all micro-batches and processes.
        order: the training order; None goes through the split once, in its order, with nothing left out.
        device: device of the batches.
        accumulate: micro-batches of one optimizer step.
        rank: index of this process.
        world: number of processes.
        least: examples that a micro-batch must have.

    Raises:
        UserError: if a step has too few for its parts.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        *,
        order: Order | None = None,
        device: Any = "cpu",
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        least: int = 2,
    ) -> None:
        self.examples, self.batch_size = examples, batch_size
        self.order, self.device = order, torch.device(device)
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.sampler = EpochSampler()
        self.batch_sampler = None  # Lightning asks for it wherever there is a sampler
        self.skip = 0
        needed = least * world * accumulate
        if order and min(order.sizes) < needed:
            raise UserError(
                "data.batch_size",
                (
                    f"{batch_size} of {examples} rows in {world * accumulate} parts (micro-batches x "
                    f"processes) leaves a part with fewer than {least} row{'s' if least > 1 else ''}"
                ),
                f"at least {needed} rows",
            )

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch."""
        raise TypeError(f"{type(self).__name__} does not say what its batches are: define __iter__")

    def __len__(self) -> int:
        if self.order:
            return len(self.order.sizes) * self.accumulate
        return len(self._once()[1])

    def _once(self) -> tuple[Tensor, list[int]]:
        """Return this process's examples when going through the split once, and how many each of its batches holds."""
        batches = torch.arange(self.examples).split(self.batch_size)
        mine = [batch.tensor_split(self.world)[self.rank] for batch in batches if len(batch)]
        lengths = [len(batch) for batch in mine if len(batch)]
        return torch.cat(mine) if mine else torch.arange(0), lengths

    def _parts(self, sizes: list[int]) -> Iterator[tuple[int, int, int]]:
        """Yield this process's micro-batches of steps of the given sizes: (number of the step, first, last) of each.

        Part m·world + rank of a step is micro-batch m of process ``rank``.
        """
        for number, size in enumerate(sizes):
            inner = [0, *running_sum(parts_of(size, self.accumulate * self.world))]
            for micro in range(self.accumulate):
                part = micro * self.world + self.rank
                yield number, inner[part], inner[part + 1]


@dataclass
class _Plan:
    """Micro-batches of one epoch and process; with mixing, each holds its own rows and then their partners."""

    rows: Tensor
    views: Tensor
    lengths: list[int]
    windows: list[StepTotals | None]
    recipes: list[Recipe] | None = None
    partner: Tensor | None = None
    """Position of each row's partner in its own micro-batch; -1 for none."""


class Loader(EpochLoader):
    """Loader of one epoch after the other of a split, as Batches.

    Args:
        split: rows to show.
        augmentation: transforms under which they are shown.
        batch_size: rows of one optimizer step, over all micro-batches and processes.
        views: choice of the view for each showing; None shows every example as it is, under view ``view``.
        view: the number of the one view that is shown, where ``views`` is None.
        clean: leave the augmentation out.
        classes: number of classes.
        **place: order, device, accumulate, rank and world, as :class:`EpochLoader` takes them.
    """

    def __init__(
        self,
        split: Split,
        augmentation: Augmentation,
        batch_size: int,
        *,
        views: Views | None = None,
        view: int = 0,
        clean: bool = False,
        classes: int = 0,
        **place: Any,
    ) -> None:
        super().__init__(len(split), batch_size, **place)
        self.split, self.augmentation = split, augmentation
        self.views, self.view, self.clean, self.classes = views, view, clean, classes
        self._targets = split.targets.to(self.device)
        self._truth = None if split.truth is None else split.truth.to(self.device)
        self._tasks = {name: each.to(self.device) for name, each in split.tasks.items()}

    def __iter__(self) -> Iterator[Batch]:
        skip, self.skip = self.skip, 0
        plan = self._plan(self.sampler.epoch)
        targets = self._targets.index_select(0, plan.rows).split(plan.lengths)
        inputs = self._inputs(plan, skip)
        if plan.recipes is not None:
            yield from self._mixed(plan, skip, inputs, targets)
            return
        keys = torch.stack([plan.rows, plan.views], dim=1).split(plan.lengths)
        partners = None if plan.partner is None else plan.partner.split(plan.lengths)
        truths = None if self._truth is None else self._truth.index_select(0, plan.rows).split(plan.lengths)
        each = {name: of.index_select(0, plan.rows).split(plan.lengths) for name, of in self._tasks.items()}
        for part, shown in enumerate(inputs, start=skip):
            truth = None if truths is None else truths[part]
            partner = None if partners is None else partners[part]
            window, tasks = plan.windows[part], {name: of[part] for name, of in each.items()} or None
            yield Batch(
                shown, targets[part], keys[part], partner=partner, hidden_targets=truth, tasks=tasks, window=window
            )

    def _mixed(self, plan: _Plan, skip: int, inputs: Iterator[Tensor], targets: tuple[Tensor, ...]) -> Iterator[Batch]:
        # no key: a mixture is no example of the split, and no cache has an answer for it
        assert plan.recipes is not None
        for part, shown in enumerate(inputs, start=skip):
            (own, partner), (label, other) = shown.chunk(2), targets[part].chunk(2)
            mixed, soft = plan.recipes[part](own, partner, label, other, self.classes)
            yield Batch(mixed, soft, window=plan.windows[part])

    def _inputs(self, plan: _Plan, skip: int) -> Iterator[Tensor]:
        """Yield the float inputs of each micro-batch from number ``skip`` on."""
        raise TypeError(f"{type(self).__name__} does not say what it does: define _inputs")

    def _show(self, raw: Tensor, rows: Tensor, views: Tensor) -> Tensor:
        if self.clean:
            return self.augmentation.to_float(raw)
        return self.augmentation(raw, rows, views)

    def _plan(self, epoch: int) -> _Plan:
        if self.order is None:
            rows, lengths = self._once()
            views = torch.full_like(rows, self.view)
            return _Plan(rows.to(self.device), views.to(self.device), lengths, [None] * len(lengths))
        steps = self.order.epoch(epoch)
        assert self.views is not None
        views = self.views(steps.rows, steps.showing)
        plan = self._training_plan(self.order, steps, views, epoch)
        partner = None if plan.partner is None else plan.partner.to(self.device)
        return replace(plan, rows=plan.rows.to(self.device), views=plan.views.to(self.device), partner=partner)

    def _training_plan(self, order: Order, steps: Steps, views: Tensor, epoch: int) -> _Plan:
        """Plan an epoch: cut each step into the parts that this process sees."""
        parts = self.accumulate * self.world
        mixings = self.augmentation.mixings
        if parts == 1 and not mixings:
            windows = [StepTotals(n, float(size), 1) for n, size in zip(steps.labelled, steps.sizes, strict=True)]
            partner, partnered = _partners(steps, parts)
            if partner is not None:
                windows = [w._replace(partnered=n) for w, n in zip(windows, partnered, strict=True)]
            return _Plan(steps.rows, views, steps.sizes, list(windows), partner=partner)
        places: list[Tensor] = []
        lengths: list[int] = []
        windows, recipes = [], []
        partner, partnered = _partners(steps, parts) if not mixings else (None, [0.0] * len(steps.sizes))
        starts = [0, *running_sum(steps.sizes)]
        shown = -1
        for number, first, last in self._parts(steps.sizes):
            if number != shown:
                shown, size, recipe, labelled = number, steps.sizes[number], None, steps.labelled[number]
                if mixings:
                    recipe = Recipe(mixings, order.seed, epoch, number, size)
                    known = order.known[steps.rows[starts[number] : starts[number] + size]]
                    labelled = float((known & known[recipe.partner]).sum())
            own = torch.arange(first, last)
            if recipe is not None:
                own = torch.cat([own, recipe.partner[own]])
                recipes.append(recipe)
            places.append(own + starts[number])
            lengths.append(len(own))
            windows.append(StepTotals(labelled, float(size), parts, partnered=partnered[number]))
        place = torch.cat(places)
        partner = None if partner is None else partner[place]
        return _Plan(steps.rows[place], views[place], lengths, list(windows), recipes if mixings else None, partner)


def _partners(steps: Steps, parts: int) -> tuple[Tensor | None, list[float]]:
    """Return the position of each row's partner in its own micro-batch, and the number of rows with one by step.

    -1 stands for none there.
    """
    if steps.partner is None:
        return None, [0.0] * len(steps.sizes)
    sizes = torch.tensor([rows for size in steps.sizes for rows in parts_of(size, parts)])
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    inside = (steps.partner >= first) & (steps.partner < first + sizes.repeat_interleave(sizes))
    return torch.where(inside, steps.partner - first, -1), [float(n.sum()) for n in inside.split(steps.sizes)]


class TensorLoader(Loader):
    """Loader of a split that lies on the compute device as one tensor.

    Inputs are picked, augmented and converted for several steps at a time where they are small, since then a
    call costs more than its work; that changes no bit, because augmentation does not look at the rest of a batch.
    """

    def _inputs(self, plan: _Plan, skip: int) -> Iterator[Tensor]:
        inputs = self.split.inputs
        assert isinstance(inputs, Tensor)
        budget = 1 << (20 if self.device.type == "cpu" else 25)  # bytes as float; on the CPU, what a cache holds
        most = max(1, budget // (4 * inputs[0].numel()))
        lengths = plan.lengths
        first, row = skip, sum(lengths[:skip])
        while first < len(lengths):
            last, rows = first + 1, lengths[first]
            while last < len(lengths) and rows + lengths[last] <= most:
                rows, last = rows + lengths[last], last + 1
            chosen, views = plan.rows[row : row + rows], plan.views[row : row + rows]
            shown = self._show(inputs.index_select(0, chosen), chosen, views)
            yield from shown.split(lengths[first:last])
            first, row = last, row + rows


class StreamLoader(Loader):
    """Loader of a split of pictures on disk, decoded by worker processes and augmented on the compute device.

    Args:
        workers: decoding processes, kept alive between epochs; 0 decodes in this process.
    """

    def __init__(self, *args: Any, workers: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        assert isinstance(self.split.inputs, Files)
        self._lists = _Lists()
        self._reader = torch.utils.data.DataLoader(
            _Decoder(self.split.inputs),
            batch_sampler=self._lists,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_as_is,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else every epoch would draw from the global generator
        )

    def _inputs(self, plan: _Plan, skip: int) -> Iterator[Tensor]:
        rows, views = plan.rows.split(plan.lengths), plan.views.split(plan.lengths)
        self._lists.batches = [part.tolist() for part in rows[skip:]]
        for part, raw in enumerate(self._reader, start=skip):
            if isinstance(raw, UserError):
                raise raw
            yield self._show(raw.to(self.device, non_blocking=True), rows[part], views[part])


class _Lists:
    """Batch sampler of a StreamLoader: the rows of the micro-batches to come.

    It knows nothing of its loader: in a circle of references, the loader's workers would outlive it until some later
    garbage collection, which may happen in a forked child.
    """

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Decoder(torch.utils.data.Dataset):
    """Pictures by lists of row numbers, as one uint8 tensor a list."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __getitems__(self, rows: list[int]) -> Tensor | UserError:
        try:
            return self.files.read(rows)
        except UserError as error:
            return error  # raised in the main process, where it stays one line


def _as_is(batch: Any) -> Any:
    return batch
