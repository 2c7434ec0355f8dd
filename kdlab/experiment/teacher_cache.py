"""Cache of a teacher's answers: whether one can be used, what it holds, and filling it once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from tqdm import tqdm

from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.experiment.schema import Experiment, TeacherSpec
from kdlab.losses import Objective
from kdlab.models import weights_hash
from kdlab.teachers import (
    Arrays,
    CachedTeacher,
    FrozenTeacher,
    Manifest,
    Teacher,
    TokenCache,
    TokenManifest,
    dtype_for,
    write_cache,
    write_tokens,
)
from kdlab.training import TrainerConfig

log = logging.getLogger("kdlab")

MEASURED = ("val", "test", "ood")
"""Splits that a result reports; ``ood`` is of another domain than training."""

WHOLE_ROWS = 257
"""Largest vocabulary of which a cache of sequences holds all tokens, and so leaves out nothing."""


def cache_obstacle(experiment: Experiment, data: DataModule, objective: Objective) -> str:
    """Return why a teacher answers live; empty where it can answer from a cache.

    Raises:
        UserError: if a certain cache is asked for, and cannot be used or is not there.
    """
    spec = experiment.teacher if experiment.teacher is not None else TeacherSpec()
    asked, layers = spec.cache, objective.teacher_layers
    sparse = _sparse(spec, data)
    if spec.feature_mib < 0:
        raise UserError("teacher.feature_mib", spec.feature_mib, "a number, at least 0")
    if asked == "off":
        return "as teacher.cache=off asks"
    reasons = []
    if layers and (not data.classified or not spec.feature_mib):
        reasons.append(f"the loss looks at its layers ({', '.join(layers)})")
    if data.views is None:
        reasons.append(str(data.uncacheable_reason))
    if experiment.batch_transform is not None:
        makes = "makes rows" if data.classified else "writes sequences"
        reasons.append(f"batch_transform {makes} that nobody has seen before")
    if data.tasks and not isinstance(spec.data.get("label"), str):
        reasons.append("it answers several tasks, and a cache holds one answer")
    if objective.vocabulary_agnostic:
        reasons.append("it reads the text in tokens of its own")
    if reasons and (asked != "auto" or sparse):
        key, value = ("cache", asked) if asked != "auto" else (sparse, getattr(spec, sparse))
        why = f"{value}, and {' and '.join(reasons)}"
        raise UserError(f"teacher.{key}", why, "teacher.cache=auto or off, without it")
    if asked == "auto" and not data.classified and not sparse and data.vocab_size > WHOLE_ROWS:
        reasons.append(
            f"it would hold {data.vocab_size} numbers a token (teacher.top_k=32 keeps the most probable ones)"
        )
    if asked != "auto" and not (Path(asked) / "manifest.json").is_file():
        raise UserError("teacher.cache", f"{asked} holds no manifest.json", "auto, off, or the folder of a cache")
    return " and ".join(f"since {reason}" for reason in reasons)


def _sparse(spec: TeacherSpec, data: DataModule) -> str:
    """Return the key that asks for a cache of some tokens a position; empty where neither does.

    Raises:
        UserError: if it is out of range, both do, or the data are no sequences.
    """
    given = [name for name in ("top_k", "draws") if getattr(spec, name) is not None]
    if not given:
        return ""
    name, value = given[0], getattr(spec, given[0])
    if len(given) > 1:
        raise UserError("teacher.top_k", f"{spec.top_k}, and teacher.draws: {spec.draws}", "one of them")
    if data.classified:
        raise UserError(f"teacher.{name}", f"{value}, and data ({data.name}) is no text", "null")
    most = data.vocab_size if name == "top_k" else 4096
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(f"teacher.{name}", f"{value!r}", f"a whole number from 1 to {most}, or null")
    return name


def written(experiment: Experiment, data: DataModule, objective: Objective) -> TokenCache:
    """Return a teacher of which nothing is known but a cache of its answers.

    Raises:
        UserError: if there is no such cache, it is of other tokens than ``data``, or the objective wants more of it.
    """
    spec = experiment.teacher
    assert spec is not None
    if data.classified:
        raise UserError("teacher.cache", f"{spec.cache}, and data ({data.name}) is no text", "teacher=NAME")
    cache_obstacle(experiment, data, objective)
    manifest = TokenManifest.read(Path(spec.cache))
    known = (data.fingerprint, data.tokenizer.identity)
    if manifest.classes != data.vocab_size or manifest.data not in known:
        raise UserError(
            "teacher.cache",
            (
                f"{spec.cache} is of {manifest.data} ({manifest.classes} tokens), and data of {known[1]}"
                f" ({data.vocab_size} tokens)"
            ),
            "the data.tokenizer that it was written with",
        )
    cache = TokenCache(Path(spec.cache), manifest)
    unknown, total = 0, 0
    for batch in data.ordered_loader("train"):
        missing, among = cache.missing(batch)
        unknown, total = unknown + missing, total + among
    if unknown:
        raise UserError(
            "teacher.cache",
            f"{spec.cache} lacks {unknown} of the {total} training sequences of {data.name}",
            ("data it was written for (of kdlab generate: OUT.filtered.jsonl with data.form=steps)"),
        )
    return cache


def cached(live: FrozenTeacher, experiment: Experiment, data: DataModule, training: TrainerConfig) -> Teacher:
    """Return the teacher answering from its cache, which is filled first if it does not exist.

    The teacher answers live where the cache would be too large.
    """
    spec = experiment.teacher if experiment.teacher is not None else TeacherSpec()
    data.to(training.device)
    live.to(training.device)
    kept = Path(experiment.output) / "cache"
    if not data.classified:
        tokens = describe_tokens(live.net, data, spec)
        folder = kept / tokens.key if spec.cache == "auto" else Path(spec.cache)
        if spec.cache == "auto" and not (folder / "manifest.json").exists():
            with _progress() as report:
                rows = sum(data.rows(split) for split in tokens.splits)
                write_tokens(folder, tokens, live, data.ordered_loader, report, rows)
        return TokenCache(folder, tokens)
    inside = describe_features(live, data) if live.layers else None
    if inside is not None and inside.bytes > spec.feature_mib * 2**20:
        size = f"its layers ({', '.join(live.layers)}) would take {inside.bytes / 2**20:.0f} MiB"
        if spec.cache != "auto":
            raise UserError(
                "teacher.cache", f"{spec.cache}, and {size}", "teacher.feature_mib of so many, or teacher.cache=auto"
            )
        log.info("teacher: no cache, since %s, and teacher.feature_mib is %g", size, spec.feature_mib)
        return live
    logits = _filled(kept, describe_rows(live, data), live, data, None if spec.cache == "auto" else spec.cache)
    features = None if inside is None else _filled(kept, inside, live, data)
    return CachedTeacher(logits, features, live.net)


def _filled(kept: Path, manifest: Manifest, live: FrozenTeacher, data: DataModule, folder: str | None = None) -> Arrays:
    """Return the arrays of a manifest, in ``folder``, or else below ``kept``, where they are made if missing."""
    at = kept / manifest.key if folder is None else Path(folder)
    if folder is None and not (at / "manifest.json").exists():
        with _progress() as report:
            write_cache(at, manifest, live, data.ordered_loader, report)
    return Arrays(at, manifest)


def describe_rows(live: FrozenTeacher, data: DataModule) -> Manifest:
    """Return the manifest of a cache of a teacher's answers to rows: its logits, of all splits."""
    example = next(iter(data.ordered_loader("train", batch_size=2)))
    rows = {"train": (data.counts["train"], data.views or 1)}
    rows.update({split: (data.counts[split], 1) for split in MEASURED if data.counts.get(split)})
    return _manifest(live.net, data, rows, live(example).logits.shape[-1])


def describe_features(live: FrozenTeacher, data: DataModule) -> Manifest:
    """Return the manifest of a cache of the layers that ``live`` captures: for training rows alone."""
    example = next(iter(data.ordered_loader("train", batch_size=2)))
    layers = {name: tuple(feature.shape[1:]) for name, feature in live(example).features.items()}
    return _manifest(live.net, data, {"train": (data.counts["train"], data.views or 1)}, 0, layers)


def _manifest(
    net: nn.Module,
    data: DataModule,
    rows: dict[str, tuple[int, int]],
    classes: int,
    layers: dict[str, tuple[int, ...]] | None = None,
) -> Manifest:
    numbers = classes + sum(math.prod(shape) for shape in (layers or {}).values())
    return Manifest(
        teacher=weights_fingerprint(net),
        data=data.fingerprint,
        transform=data.transform,
        classes=classes,
        rows=rows,
        dtype=dtype_for(rows, numbers),
        layers=layers or {},
    )


def describe_tokens(net: nn.Module, data: DataModule, spec: TeacherSpec) -> TokenManifest:
    """Return the manifest of a cache of ``net`` on sequences.

    Logits of the whole vocabulary are float32, as the teacher gives them, where that takes up to 256 MiB, and else
    float16; a few tokens a position and draws, which are estimates anyway, are always float16.
    """
    drawn = spec.draws is not None
    k = spec.draws or spec.top_k or data.vocab_size
    splits = tuple(split for split in ("train", *MEASURED) if data.counts[split])
    whole = not drawn and k == data.vocab_size
    rows = {split: (data.rows(split), 1) for split in splits} if whole else {}
    return TokenManifest(
        teacher=weights_fingerprint(net),
        data=data.fingerprint,
        form="sampled" if drawn else "topk",
        k=k,
        classes=data.vocab_size,
        dtype=dtype_for(rows, data.vocab_size) if whole else "float16",
        seed=spec.seed if drawn else 0,
        splits=splits,
    )


def weights_fingerprint(net: nn.Module) -> str:
    """Return a hash of all that decides what a network answers."""
    # the input normalisation is no part of a state dict, but it is of what the teacher says
    return weights_hash({**net.state_dict(), **dict(net.named_buffers())})


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    with tqdm(total=1, desc="teacher cache", unit="row", leave=False, disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
