"""Spoken digits, transcribed: recordings to log-mel features on one side, words on the other.

The features are Whisper's (Radford et al., *Robust Speech Recognition via Large-Scale Weak Supervision*, ICML 2023):
windows of 25 ms every 10 ms, mel bands on Slaney's scale, log10, the range cut at 8 below the loudest, scaled to
about -1 .. 1. At 16 kHz they equal those of transformers' ``WhisperFeatureExtractor``, which is not used here since it
fixes its highest band at 8 kHz: the recordings are made at 8 kHz, and hold nothing above 4.
"""

from __future__ import annotations

import math
import os
import re
import struct
import wave
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from kdlab.data.splits import rows_of, stratified, without
from kdlab.data.text.build import TextCommon, text_data
from kdlab.data.text.module import TextData
from kdlab.data.text.sequence import ANSWER, PROMPT, Question, RawText, Sequence
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError
from kdlab.functional.rng import seed_of
from kdlab.ranges import whole_number
from kdlab.system.arrays import read_arrays
from kdlab.system.files import Unreadable, open_regular

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_RECORDED = 8_000
_TEST_TAKES = 5
_GAP = 0.05
"""Duration of the silence between joined digits in seconds; they are published without any around them."""

_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")
_ARRAYS = ("audio", "offsets", "digit", "speaker", "take", "speaker_names")


@dataclass
class Recordings:
    """All recordings: sound as int16 at 8 kHz, with the digit, speaker and take of each."""

    sound: list[np.ndarray]
    digits: np.ndarray
    speakers: np.ndarray
    takes: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.sound)


def spoken_digits(
    root: str = "data/fsdd",
    val: int | float = 0.1,
    join: int = 1,
    utterances: int | None = None,
    seconds: float | None = None,
    rate: int = 8000,
    mels: int = 40,
    **common: Unpack[TextCommon],
) -> TextData:
    """Load the Free Spoken Digit Dataset (Jackson et al., 2016-2020) to transcribe: 3,000 recordings, 6 speakers.

    Takes 0 to 4 of each speaker and digit are the test part, as published. A sequence is ``start, "seven", end`` and
    has features (mels, frames) for the encoder. Without further arguments it is made of characters, and validation
    rows are for choosing the best epoch.

    Args:
        root: the folder that holds the publisher's ``{digit}_{speaker}_{take}.wav``, or ``recordings`` with these, or
            the same in one ``.npz`` (int16 ``audio`` end to end, ``offsets``, ``digit``, ``speaker``, ``take``,
            ``speaker_names``).
        val: validation recordings (a number, or a share of those that are not test), stratified by digit and speaker.
        join: greatest number of digits of one speaker in an utterance ("three seven one"); which ones is a function of
            ``split_seed`` and the utterance's number, and a digit that no longer fits into ``seconds`` is left out.
        utterances: number of training utterances, each beginning with another recording in turn; None is one each.
        seconds: length of every input: shorter ones end in silence, a longer recording is cut. None is 1 s for single
            digits, else 0.7 s a digit.
        rate: samples a second, 8000 as recorded, or 16000 for networks that were trained on that.
        mels: bands of the features; 80 of Whisper's.

    The other arguments are :class:`TextData`'s.

    Raises:
        UserError: if the files are missing, damaged or others, or for an argument out of range.
    """
    whole_number("data.join", join, 1)
    whole_number("data.mels", mels, 1)
    if utterances is not None:
        whole_number("data.utterances", utterances, 1)
    if rate not in (8000, 16000):
        raise UserError("data.rate", rate, "8000, 16000")
    length = (1.0 if join == 1 else 0.7 * join) if seconds is None else seconds
    frames = round(length * 50) * 2
    if not 0.1 <= length <= 30:
        raise UserError("data.seconds", seconds, "from 0.1 to 30")
    seed = common.get("split_seed", 0)
    recordings = read_recordings(Path(root).expanduser())
    rows = _divide(recordings, val, seed)
    limit = frames * _RECORDED // 100
    spoken = {
        split: _utterances(recordings, chosen, join, utterances if split == "train" else None, limit, seed, split)
        for split, chosen in rows.items()
    }
    # made once, although sequences are made again for every tokenizer
    features = {split: log_mel(_sound(recordings, some, limit), mels, rate).half() for split, some in spoken.items()}

    def read(tokenizer: Tokenizer) -> RawText:
        splits = {
            split: [
                _sequence(tokenizer, recordings, parts, source)
                for parts, source in zip(some, features[split], strict=True)
            ]
            for split, some in spoken.items()
        }
        name = "spoken_digits" if join == 1 else f"spoken_digits (up to {join})"
        return RawText(name, tokenizer, splits, source_length=frames)

    return text_data(read, lambda: [" ".join(WORDS)], alphabet=None, **common)


def _sequence(tokenizer: Tokenizer, recordings: Recordings, parts: list[int], source: Tensor) -> Sequence:
    """Build the transcript of joined recordings, which starts with the end token, as decoders expect."""
    words = " ".join(WORDS[recordings.digits[part]] for part in parts)
    start = [tokenizer.eos_id]
    question = Question(
        torch.tensor(start, dtype=torch.int32),
        words,
        group=str(len(parts)),
        text=" ".join(recordings.names[part] for part in parts),
        source=source,
    )
    pieces = [(start, PROMPT), ([*tokenizer.encode(words), tokenizer.eos_id], ANSWER)]
    return Sequence.of(pieces, question=question, source=source)


# ---- which recordings


def _divide(recordings: Recordings, val: int | float, seed: int) -> dict[str, Tensor]:
    """Return the numbers of the recordings of each split."""
    test = torch.from_numpy(recordings.takes < _TEST_TAKES)
    rest = (~test).nonzero()[:, 0]
    cells = torch.from_numpy(recordings.speakers * len(WORDS) + recordings.digits)[rest]
    if not len(rest):
        raise UserError("data.root", "only takes 0 to 4, which are the test part", "the whole set")
    held = stratified(cells, rows_of(val, len(rest), "data.val"), seed, "val")
    rows = {"train": rest[without(len(rest), held)], "val": rest[held], "test": test.nonzero()[:, 0]}
    if not len(rows["train"]):
        raise UserError("data.val", f"{val}; there are {len(rest)} rows that are not test", "fewer")
    return {split: chosen for split, chosen in rows.items() if len(chosen)}


def _utterances(
    recordings: Recordings, rows: Tensor, join: int, count: int | None, limit: int, seed: int, split: str
) -> list[list[int]]:
    """Choose the recordings that are joined, for each utterance."""
    chosen = rows.tolist()
    by_speaker: dict[int, list[int]] = {}
    for row in chosen:
        by_speaker.setdefault(int(recordings.speakers[row]), []).append(row)
    gap = round(_GAP * _RECORDED)
    spoken = []
    for number in range(len(chosen) if count is None else count):
        parts = [chosen[number % len(chosen)]]
        pool = by_speaker[int(recordings.speakers[parts[0]])]
        used = len(recordings.sound[parts[0]])
        more = seed_of(seed, "join", split, number) % join
        for place in range(more):
            part = pool[seed_of(seed, "join", split, number, place) % len(pool)]
            used += gap + len(recordings.sound[part])
            if used > limit:
                break
            parts.append(part)
        spoken.append(parts)
    return spoken


def _sound(recordings: Recordings, spoken: list[list[int]], limit: int) -> Tensor:
    """Join recordings, with gaps between them and silence after the last: (utterances, limit) float32 in -1 .. 1."""
    gap = np.zeros(round(_GAP * _RECORDED), dtype=np.int16)
    sound = np.zeros((len(spoken), limit), dtype=np.int16)
    for row, parts in zip(sound, spoken, strict=True):
        pieces = [piece for part in parts for piece in (gap, recordings.sound[part])][1:]
        joined = np.concatenate(pieces)[:limit]
        row[: len(joined)] = joined
    return torch.from_numpy(sound).float() / 32768


# ---- files


def read_recordings(root: Path) -> Recordings:
    """Read all recordings of the publisher's folder, in the order of digit, speaker and take.

    Raises:
        UserError: naming the file that is missing, damaged or something else.
    """
    for folder in (root, root / "recordings"):
        if paths := sorted(folder.glob("*.wav")):
            recordings = _read_folder(paths)
            break
    else:
        arrays = sorted(root.glob("*.npz")) if root.is_dir() else [root] if root.suffix == ".npz" else []
        if not arrays or not arrays[0].is_file():
            raise UserError(
                "data.root",
                f"no recordings in {root}",
                "a folder with the publisher's {digit}_{speaker}_{take}.wav"
                " (github.com/Jakobovski/free-spoken-digit-dataset), or one .npz of them",
            )
        recordings = _read_arrays(arrays[0])
    order = np.lexsort((recordings.takes, recordings.speakers, recordings.digits))
    return Recordings(
        [recordings.sound[i] for i in order],
        recordings.digits[order],
        recordings.speakers[order],
        recordings.takes[order],
        [recordings.names[i] for i in order],
    )


def _read_folder(paths: list[Path]) -> Recordings:
    parts = []
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise UserError("data.root", f"{path} has another name", "{digit}_{speaker}_{take}.wav")
        parts.append(match.groups())
    people = sorted({speaker for _, speaker, _ in parts})
    return Recordings(
        [read_wav(path) for path in paths],
        np.array([int(digit) for digit, _, _ in parts]),
        np.array([people.index(speaker) for _, speaker, _ in parts]),
        np.array([int(take) for _, _, take in parts]),
        [path.name for path in paths],
    )


def read_wav(path: Path) -> np.ndarray:
    """Read a recording at 8 kHz with one channel of 16 bits: (samples,) int16.

    Raises:
        UserError: if it is anything else, or shorter than it says.
    """
    try:
        with open_regular(path) as opened, wave.open(opened) as file:
            form = (file.getframerate(), file.getnchannels(), file.getsampwidth() * 8)
            announced, there = file.getnframes(), os.fstat(opened.fileno()).st_size  # all of it is one recording
            data = file.readframes(min(announced, there))
    except (wave.Error, EOFError, OSError, Unreadable, struct.error, ZeroDivisionError) as error:
        raise UserError(
            "data.root", f"{path} is truncated, damaged or no wav file ({error or 'it ends early'})"
        ) from None
    if form != (_RECORDED, 1, 16):
        raise UserError(
            "data.root",
            f"{path} has {form[0]} Hz, {form[1]} channels, {form[2]} bits",
            f"{_RECORDED} Hz, one channel, 16 bits",
        )
    if len(data) != 2 * announced or not announced:
        raise UserError("data.root", f"{path} holds {len(data) // 2} of {announced} samples; fetch it again")
    return np.frombuffer(data, dtype="<i2")


def _read_arrays(path: Path) -> Recordings:
    try:
        held = read_arrays(path, _ARRAYS)
    except (OSError, Unreadable) as error:
        raise UserError(
            "data.root", f"{path} is no .npz of whole arrays ({error})", f"an .npz of {', '.join(_ARRAYS)}"
        ) from None
    audio, offsets = held["audio"], held["offsets"]
    rows = len(offsets) - 1
    fitting = (
        audio.dtype == np.int16
        and all(held[name].shape == (rows,) for name in ("digit", "speaker", "take"))
        and all(held[name].dtype.kind in "iu" for name in ("offsets", "digit", "speaker", "take"))
        and rows > 0
        and offsets[0] >= 0
        and (np.diff(offsets.astype(np.int64)) > 0).all()
        and offsets[-1] <= len(audio)
        and held["digit"].max() < len(WORDS)
        and held["speaker"].max() < len(held["speaker_names"])
    )
    if not fitting:
        raise UserError("data.root", f"the arrays of {path} do not belong together", "the set as it was packed")
    digits, speakers, takes = (held[name].astype(np.int64) for name in ("digit", "speaker", "take"))
    people = [str(person) for person in held["speaker_names"]]
    # speakers are numbered in the order of their names, as they are when read from a folder
    rank = np.array([sorted(people).index(person) for person in people])
    return Recordings(
        [audio[a:b] for a, b in pairwise(offsets)],
        digits,
        rank[speakers],
        takes,
        [f"{d}_{people[s]}_{t}.wav" for d, s, t in zip(digits, speakers, takes, strict=True)],
    )


# ---- features


def log_mel(sound: Tensor, mels: int, rate: int) -> Tensor:
    """Compute Whisper's features of sound that was recorded at 8 kHz.

    Args:
        sound: (N, samples) float in -1 .. 1.
        mels: bands, up to half of ``rate``.
        rate: samples a second that features are made at; 16000 is Whisper's, and leaves the upper bands empty here.

    Returns:
        (N, mels, frames) float32, 100 frames a second.
    """
    window, hop = rate // 40, rate // 100
    filters = mel_filters(mels, window, rate)
    hann = torch.hann_window(window)
    made = []
    for some in sound.split(256):
        power = (
            torch.stft(some if rate == _RECORDED else doubled(some), window, hop, window=hann, return_complex=True)[
                ..., :-1
            ]
            .abs()
            .square()
        )
        log = (filters @ power).clamp(min=1e-10).log10()
        log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8)
        made.append((log + 4) / 4)
    return torch.cat(made)


def doubled(sound: Tensor) -> Tensor:
    """Resample (N, samples) to twice the rate, (N, 2 · samples), with nothing at frequencies that were not recorded."""
    return torch.fft.irfft(torch.fft.rfft(sound), sound.shape[1] * 2) * 2


def mel_filters(mels: int, window: int, rate: int) -> Tensor:
    """Return the filters (mels, window // 2 + 1): triangles of equal area, evenly spaced on Slaney's mel scale.

    They are float32 and end at rate / 2. The scale is linear below 1000 Hz (3 mel for 200 Hz) and logarithmic above (27
    mel for a factor of 6.4); M. Slaney, *Auditory Toolbox*, Interval Research Technical Report 1998-010.
    """
    step = math.log(6.4) / 27
    top = 15 + math.log(rate / 2 / 1000) / step
    mel = np.linspace(0, top, mels + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (np.maximum(mel, 15) - 15)))
    bins = np.linspace(0, rate / 2, window // 2 + 1)
    low, middle, high = (edges[i : mels + i, None] for i in range(3))
    triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(min=0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()
