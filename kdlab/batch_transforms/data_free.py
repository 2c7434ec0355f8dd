"""Pictures that nobody took, for a teacher whose training data are gone: made by a generator, or by inversion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kdlab.batch_transforms.base import BatchTransform
from kdlab.errors import UserError, unknown
from kdlab.functional import NO_LABEL, Batch, dense, hash_seed, kl, log_probabilities
from kdlab.functional.modes import input_gradients
from kdlab.models.transforms.surgery import head_of
from kdlab.ranges import at_least_zero, positive, whole_number
from kdlab.tasks import Task
from kdlab.teachers import Teacher

Goal = Literal["dafl", "zskt"]

_WEIGHTS, _LEARN, _SHOW, _INVERT = 0x67656E, 0x6C6561726E, 0x73686F77, 0x696E76
"""Constants that keep the random numbers of different purposes apart."""


class Asked(NamedTuple):
    """Request for made rows: how many, for which networks (both in eval mode), and at which step."""

    rows: int
    student: nn.Module
    teacher: nn.Module
    task: Task
    seed: int
    step: int
    part: int
    device: torch.device


class MadeRows(BatchTransform):
    """Base of the data-free transforms: every row of the batch is replaced, and only their number is taken over.

    A made row has no label, no key and no example that it is: only terms that need none of them count.
    """

    needs_teacher = needs_net = True

    def __init__(self, in_channels: int | None, image_size: Sequence[int] | None) -> None:
        if in_channels is None or image_size is None:
            raise UserError("batch_transform", "makes pictures, and data is no set of them", "batch_transform=none")
        self.shape = (in_channels, *image_size)

    def __call__(
        self, batch: Batch, student: nn.Module, teacher: Teacher | None, task: Task, seed: int, step: int, part: int = 0
    ) -> tuple[Batch, dict[str, Tensor]]:
        """Return as many made rows as the batch has, and curves about how they are made.

        Args:
            batch: batch of the data; only its number of rows is used.
            student: the network that is trained; nothing in it changes.
            teacher: a live :class:`~kdlab.teachers.Teacher` with one network (``net``); nothing in it changes.
            task: task that reads the rows.
            seed: seed of the run.
            step: the optimizer step, counted from 0.
            part: index of the micro-batch within the step.

        Raises:
            UserError: if no live network teaches.
        """
        net = teacher and teacher.net
        if not isinstance(net, nn.Module):
            raise UserError("batch_transform", "rows made after a teacher, and no network teaches live", "teacher=NAME")
        device = batch.targets.device
        with input_gradients(student, net, device=device):
            made, curves = self.make(Asked(len(batch), student, net, task, seed, step, part, device))
        like = batch.inputs if isinstance(batch.inputs, Tensor) else made
        window = batch.window if batch.window is not None else batch.count()
        rows = torch.full((len(batch),), NO_LABEL, dtype=torch.int64, device=device)
        made_batch = Batch(
            made.detach().to(like.dtype),
            rows,
            weight=batch.weight,
            window=window._replace(labelled=0.0, partnered=0.0),
        )
        return made_batch, curves

    def make(self, asked: Asked) -> tuple[Tensor, dict[str, Tensor]]:
        """Return pictures (rows, C, H, W) in [0, 1], and curves."""
        raise TypeError(f"{type(self).__name__} does not say what it makes: define make")


class GeneratedRows(MadeRows):
    r"""Pictures of a generator that trains beside the student, against the teacher.

    ``dafl``: the teacher is to be sure of a picture, and moved by it, and all classes are to come as often:

    .. math:: \mathrm{CE}\big(p^T, \arg\max p^T\big) \;-\; \alpha\, \tfrac1d \|f^T\|_1 \;-\; \beta\, H(\bar p^T)

    with f the d inputs of the teacher's classifier and :math:`\bar p` the mean answer of the batch. Chen et al.,
    *Data-Free Learning of Student Networks*, ICCV 2019; their weights are 1, 0.1 and 5.

    ``zskt``: pictures on which student and teacher differ most, :math:`-\mathrm{KL}(p^T \| p^S)`. Micaelli & Storkey,
    *Zero-shot Knowledge Transfer via Adversarial Belief Matching*, NeurIPS 2019, who let the student learn ten times
    from each picture; here every step sees new ones of the same generator.

    The generator learns by Adam before steps 0, ``every``, 2·``every``, ..., from pictures of its own; all its random
    numbers are a function of (seed, step, part). It reads both networks in eval mode and changes nothing in them.

    Args:
        in_channels: number of channels of the pictures.
        image_size: height and width of the pictures.
        goal: ``dafl`` or ``zskt``.
        latent: random numbers that a picture is made of.
        width: channels inside the generator.
        lr: its learning rate.
        rows: pictures that it learns from at a time.
        every: optimizer steps of the student for each of the generator.
        one_hot: weights of the three parts of ``dafl``.
        activation: see ``one_hot``.
        entropy: see ``one_hot``.

    Raises:
        UserError: for an argument out of its range.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        image_size: Sequence[int] | None = None,
        goal: Goal = "dafl",
        latent: int = 64,
        width: int = 64,
        lr: float = 1e-3,
        rows: int = 64,
        every: int = 1,
        one_hot: float = 1.0,
        activation: float = 0.1,
        entropy: float = 5.0,
    ) -> None:
        super().__init__(in_channels, image_size)
        if goal not in get_args(Goal):
            raise unknown("batch_transform.goal", goal, get_args(Goal))
        _whole(latent=(latent, 1), width=(width, 2), rows=(rows, 2), every=(every, 1))
        _number(above_0={"lr": lr}, least_0={"one_hot": one_hot, "activation": activation, "entropy": entropy})
        self.goal, self.latent, self.width, self.lr = goal, latent, width, lr
        self.rows, self.every = rows, every
        self.one_hot, self.activation, self.entropy = one_hot, activation, entropy
        self.net: PictureGenerator | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._kept: Mapping[str, Any] = {}
        self._last: Tensor | None = None

    @override
    def make(self, asked: Asked) -> tuple[Tensor, dict[str, Tensor]]:
        _, student, teacher, task, seed, step, part, device = asked
        net = self._ready(seed, device)
        if part == 0 and step % self.every == 0:
            z = self._latents(self.rows, device, seed, _LEARN, step)
            loss = self._loss(net(z), student, teacher, task)
            assert self._optimizer is not None
            params = list(net.parameters())
            for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = gradient
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._last = loss.detach()
        with torch.no_grad():
            made = net(self._latents(asked.rows, device, seed, _SHOW, step, part))
        lost = torch.full((), torch.nan, device=device) if self._last is None else self._last
        return made, {"generator": lost}

    def _loss(self, x: Tensor, student: nn.Module, teacher: nn.Module, task: Task) -> Tensor:
        if self.goal == "zskt":
            return -kl(_answer(student, task, x), _answer(teacher, task, x)).mean()
        with _inputs_of([head_of(teacher)[1]]) as seen:
            z = _answer(teacher, task, x)
        log_p = log_probabilities(z)
        sure = -log_p.max(-1).values.mean()
        mean = log_p.exp().mean(0)
        spread = -(mean * mean.clamp(min=1e-12).log()).sum()
        return self.one_hot * sure - self.activation * seen[0].abs().mean() - self.entropy * spread

    def _latents(self, rows: int, device: torch.device, *key: int) -> Tensor:
        draws = torch.Generator().manual_seed(hash_seed(*key))
        return torch.randn(rows, self.latent, generator=draws).to(device)

    def _ready(self, seed: int, device: torch.device) -> PictureGenerator:
        """Return the generator; it is made at the first step, with weights that are a function of the seed."""
        if self.net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash_seed(seed, _WEIGHTS))
                self.net = PictureGenerator(self.shape, self.latent, self.width)
            self.net.to(device)
            self._optimizer = torch.optim.Adam(self.net.parameters(), lr=self.lr, betas=(0.5, 0.999))
            if self._kept:
                self.net.load_state_dict(self._kept["net"])
                self._optimizer.load_state_dict(self._kept["optimizer"])
                self._last = self._kept["last"].to(device)
        return self.net

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator and of its optimizer, and its last loss."""
        if self.net is None or self._optimizer is None or self._last is None:
            return dict(self._kept)
        return {"net": self.net.state_dict(), "optimizer": self._optimizer.state_dict(), "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._kept, self.net, self._optimizer, self._last = state, None, None, None


class InvertedRows(MadeRows):
    r"""Pictures optimised until the teacher takes them for its training data; a pool of them, made once.

    .. math:: \mathrm{CE}(p^T(x), y) + \alpha_{bn} \sum_l \big( \|\mu_l(x) - \hat\mu_l\|_2
        + \|\sigma^2_l(x) - \hat\sigma^2_l\|_2 \big) + \alpha_{tv}\, TV(x) + \alpha_2 \|x\|_2^2

    with random classes y, and for each BatchNorm l of the teacher the mean and variance of its inputs over the batch
    against those that it remembers; TV is the summed squared difference of neighbours. Yin et al., *Dreaming to
    Distill: Data-Free Knowledge Transfer via DeepInversion*, CVPR 2020, without the competition with the student.
    The pool is made at the first step, by Adam, and travels in the checkpoint; a step draws from it at random.

    Args:
        in_channels: number of channels of the pictures.
        image_size: height and width of the pictures.
        num_classes: number of classes of the teacher.
        pool: number of pictures that are made.
        rows: number of pictures that are made at a time; their statistics are those of a batch.
        steps: number of Adam steps for each of them.
        lr: its learning rate.
        bn: the weights :math:`\alpha`; TV and the norm are means over rows.
        tv: see ``bn``.
        l2: see ``bn``.

    Raises:
        UserError: for an argument out of its range, or a teacher without BatchNorm.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        image_size: Sequence[int] | None = None,
        num_classes: int = 10,
        pool: int = 1024,
        rows: int = 256,
        steps: int = 200,
        lr: float = 0.05,
        bn: float = 1.0,
        tv: float = 2.5e-5,
        l2: float = 3e-8,
    ) -> None:
        super().__init__(in_channels, image_size)
        _whole(pool=(pool, 2), rows=(rows, 2), steps=(steps, 1))
        _number(above_0={"lr": lr}, least_0={"bn": bn, "tv": tv, "l2": l2})
        self.classes, self.size, self.rows, self.steps, self.lr = num_classes, pool, min(rows, pool), steps, lr
        self.bn, self.tv, self.l2 = bn, tv, l2
        self.pool: Tensor | None = None

    @override
    def make(self, asked: Asked) -> tuple[Tensor, dict[str, Tensor]]:
        rows, _, teacher, task, seed, step, part, device = asked
        if self.pool is None:
            sizes = [min(self.rows, self.size - first) for first in range(0, self.size, self.rows)]
            made = [self._invert(n, teacher, task, hash_seed(seed, _INVERT, k), device) for k, n in enumerate(sizes)]
            self.pool = torch.cat(made)
        self.pool = self.pool.to(device)
        draws = torch.Generator().manual_seed(hash_seed(seed, _SHOW, step, part))
        chosen = torch.randint(self.size, (rows,), generator=draws).to(device)
        return self.pool[chosen], {}

    def _invert(self, rows: int, teacher: nn.Module, task: Task, seed: int, device: torch.device) -> Tensor:
        norms = [m for m in teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = [m for m in norms if m.running_mean is not None]
        if not norms:
            raise UserError(
                "batch_transform",
                ("inversion matches the statistics that BatchNorm layers remember, and the teacher has none"),
                "a teacher with BatchNorm, or batch_transform=zskt",
            )
        draws = torch.Generator().manual_seed(seed)
        x = torch.rand(rows, *self.shape, generator=draws).to(device).requires_grad_()
        wanted = (torch.arange(rows) % self.classes).to(device)
        optimizer = torch.optim.Adam([x], lr=self.lr)
        for _ in range(self.steps):
            with _inputs_of(norms) as seen:
                loss = F.cross_entropy(_answer(teacher, task, x).float(), wanted)
            loss = loss + self.bn * sum(_unlike(given, norm) for given, norm in zip(seen, norms, strict=True))
            down, right = x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]
            loss = loss + self.tv * (down.pow(2).sum() + right.pow(2).sum()) / rows
            loss = loss + self.l2 * x.pow(2).sum() / rows
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            x.data.clamp_(0, 1)
        return x.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the pool, if it was made already."""
        return {} if self.pool is None else {"pool": self.pool}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.pool = state.get("pool")


class PictureGenerator(nn.Module):
    """Generator of pictures (B, C, H, W) in [0, 1] from random numbers (B, latent), by two doublings of the size.

    Its BatchNorms use the batch's own statistics, and remember none.

    Args:
        shape: (C, H, W).
        latent: width of the input.
        width: channels of the first layers; the last one has half.
    """

    def __init__(self, shape: Sequence[int], latent: int, width: int) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.first = (width, math.ceil(self.height / 4), math.ceil(self.width / 4))
        self.start = nn.Linear(latent, math.prod(self.first))
        self.body = nn.Sequential(
            _norm(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            _norm(width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            _norm(width // 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
        )

    @override
    def forward(self, z: Tensor) -> Tensor:
        x = self.body(self.start(z).unflatten(1, self.first))
        return x[..., : self.height, : self.width].sigmoid()


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)


def _answer(net: nn.Module, task: Task, x: Tensor) -> Tensor:
    dtype = next((p.dtype for p in net.parameters()), x.dtype)
    targets = torch.full((len(x),), NO_LABEL, dtype=torch.int64, device=x.device)
    return dense(task.outputs(net, Batch(x.to(dtype), targets)).logits)


def _unlike(given: Tensor, norm: Any) -> Tensor:
    """Return the distance of the batch statistics of a BatchNorm's input from its running statistics."""
    over = [d for d in range(given.ndim) if d != 1]
    mean, var = given.mean(over), given.var(over, unbiased=False)
    return torch.linalg.vector_norm(mean - norm.running_mean) + torch.linalg.vector_norm(var - norm.running_var)


@contextmanager
def _inputs_of(modules: Sequence[nn.Module]) -> Any:
    """Record the first input of each module, in their order, during a forward pass within the context."""
    seen: list[Any] = [None] * len(modules)

    def keep(number: int) -> Callable:
        def hook(module: nn.Module, given: tuple) -> None:
            seen[number] = given[0]

        return hook

    handles = [module.register_forward_pre_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _whole(**values: tuple[Any, int]) -> None:
    for name, (value, least) in values.items():
        whole_number(f"batch_transform.{name}", value, least)


def _number(above_0: Mapping[str, float], least_0: Mapping[str, float]) -> None:
    for name, value in above_0.items():
        positive(f"batch_transform.{name}", value)
    for name, value in least_0.items():
        at_least_zero(f"batch_transform.{name}", value)
