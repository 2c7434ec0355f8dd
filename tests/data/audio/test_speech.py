"""Spoken digits: files as published, splits, joined utterances, and features that are Whisper's."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch

from kdlab.data import spoken_digits
from kdlab.data.audio.speech import WORDS, doubled, log_mel, mel_filters, read_recordings
from kdlab.errors import UserError

SPEAKERS, TAKES = ("ada", "bo"), 10


def sound(digit, speaker, take):
    """A tone that tells digit, speaker and take, 0.2 to 0.29 s long."""
    seconds = np.arange(1600 + 80 * take) / 8000
    return (8000 * np.sin(2 * np.pi * (200 + 150 * digit + 40 * speaker + take) * seconds)).astype(np.int16)


def write_wav(path, samples, rate=8000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The publisher's layout, with 2 speakers and 10 takes."""
    root = tmp_path_factory.mktemp("fsdd")
    (root / "recordings").mkdir()
    for digit in range(10):
        for number, speaker in enumerate(SPEAKERS):
            for take in range(TAKES):
                write_wav(root / "recordings" / f"{digit}_{speaker}_{take}.wav", sound(digit, number, take))
    return root


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The same recordings in one file, in another order."""
    rows = [(d, s, t) for t in range(TAKES) for s in (1, 0) for d in range(10)]
    audio = [sound(*row) for row in rows]
    path = tmp_path_factory.mktemp("packed") / "fsdd.npz"
    # speakers numbered in another order than by name
    digit, speaker, take = (np.array([row[i] for row in rows], np.uint8) for i in range(3))
    np.savez(
        path,
        audio=np.concatenate(audio),
        offsets=np.cumsum([0, *map(len, audio)]),
        digit=digit,
        speaker=1 - speaker,
        take=take,
        speaker_names=np.array(SPEAKERS[::-1]),
    )
    return path


def test_wav_files_and_the_packed_form_are_the_same_set(published, packed):
    one, other = read_recordings(published), read_recordings(packed.parent)
    assert one.names == other.names and len(one) == 200
    assert one.names[0] == "0_ada_0.wav" and one.names[-1] == "9_bo_9.wav"
    for a, b in zip(one.sound, other.sound, strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(one.sound[one.names.index("7_bo_3.wav")], sound(7, 1, 3))
    assert spoken_digits(str(published)).fingerprint == spoken_digits(str(packed)).fingerprint


def test_takes_0_to_4_are_test_and_validation_is_stratified(published):
    data = spoken_digits(str(published), val=20)
    assert data.counts == {"train": 80, "labelled": 80, "val": 20, "test": 100, "ood": 0}
    takes = {split: [q.text.split("_")[2] for q in data.questions(split)] for split in ("train", "val", "test")}
    assert {int(take.removesuffix(".wav")) for take in takes["test"]} == {0, 1, 2, 3, 4}
    assert {int(take.removesuffix(".wav")) for take in takes["train"] + takes["val"]} == {5, 6, 7, 8, 9}
    held = [q.text.rpartition("_")[0] for q in data.questions("val")]
    assert len(set(held)) == 20  # one of each digit and speaker
    names = {split: {q.text for q in data.questions(split)} for split in ("train", "val", "test")}
    assert not names["train"] & names["val"] and not names["test"] & (names["train"] | names["val"])
    other = spoken_digits(str(published), val=20, split_seed=1)
    assert {q.text for q in other.questions("val")} != names["val"]
    assert {q.text for q in other.questions("test")} == names["test"]


def test_a_batch_is_features_and_a_transcript(published):
    data = spoken_digits(str(published), mels=12, seconds=0.5, batch_size=5, context=8)
    assert data.target == "text" and data.network_kwargs["mels"] == 12 and data.network_kwargs["frames"] == 50
    batch = next(iter(data.ordered_loader("test")))
    features, ids = batch.inputs["input_features"], batch.inputs["decoder_input_ids"]
    assert features.shape == (5, 12, 50) and features.is_floating_point()
    eos = data.tokenizer.eos_id
    assert (ids[:, 0] == eos).all()
    start = 0
    for row, counted in enumerate(batch.loss_mask.sum(1).tolist()):
        targets = batch.targets[start : start + counted].tolist()
        assert data.tokenizer.decode(targets[:-1]) == data.questions("test")[row].answer and targets[-1] == eos
        start += counted
    assert {q.answer for q in data.questions("test")} == set(WORDS)


def test_joined_digits_are_one_speakers_and_of_the_same_split(published):
    data = spoken_digits(str(published), join=3, seconds=1.0)
    again = spoken_digits(str(published), join=3, seconds=1.0)
    assert data.fingerprint == again.fingerprint != spoken_digits(str(published), join=3, split_seed=1).fingerprint
    for split in ("train", "val", "test"):
        for question in data.questions(split):
            parts = [name.removesuffix(".wav").split("_") for name in question.text.split()]
            assert question.answer == " ".join(WORDS[int(digit)] for digit, _, _ in parts)
            assert len({speaker for _, speaker, _ in parts}) == 1 and question.group == str(len(parts))
            assert all((int(take) < 5) == (split == "test") for _, _, take in parts)
    groups = {question.group for question in data.questions("test")}
    assert groups == {"1", "2", "3"}


def test_a_digit_that_does_not_fit_is_left_out(published):
    data = spoken_digits(str(published), join=4, seconds=0.6)  # 0.2 to 0.29 s each, 0.05 s between
    assert {question.group for question in data.questions("train")} == {"1", "2"}
    for question in data.questions("train"):
        takes = [int(name.removesuffix(".wav").split("_")[2]) for name in question.text.split()]
        assert sum(1600 + 80 * take for take in takes) + 400 * (len(takes) - 1) <= 4800


def test_more_utterances_than_recordings(published):
    data = spoken_digits(str(published), join=3, utterances=250, val=0)
    assert data.counts["train"] == 250 and data.counts["val"] == 0 and data.counts["test"] == 100
    texts = [question.text for question in data.questions("train")]
    assert len(set(texts)) > 180 and texts[0].split()[0] == texts[100].split()[0]


def test_joined_sound_is_the_recordings_with_silence_between(published):
    from kdlab.data.audio.speech import _sound

    recordings = read_recordings(published)
    joined = _sound(recordings, [[3, 50]], 8000)[0]
    first, second = recordings.sound[3], recordings.sound[50]
    at = len(first) + 400
    assert torch.equal(joined[: len(first)] * 32768, torch.from_numpy(first.copy()).float())
    assert not joined[len(first) : at].any() and not joined[at + len(second) :].any()
    assert torch.equal(joined[at : at + len(second)] * 32768, torch.from_numpy(second.copy()).float())


def test_features_are_whispers():
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80, sampling_rate=16000, chunk_length=1)
    assert torch.allclose(mel_filters(80, 400, 16000), torch.tensor(extractor.mel_filters.T).float(), atol=1e-7)
    recorded = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (3, 8000))).float()
    recorded[1, 3000:] = 0
    wanted = extractor(list(doubled(recorded).numpy()), sampling_rate=16000, return_tensors="pt").input_features
    assert torch.allclose(log_mel(recorded, 80, 16000), wanted, atol=1e-5)


def test_resampling_keeps_a_tone():
    tone, fine = (
        torch.sin(2 * torch.pi * 440 * torch.arange(n, dtype=torch.float64) / n).float() for n in (8000, 16000)
    )
    assert torch.allclose(doubled(tone[None])[0], fine, atol=1e-5)
    loudest = log_mel(tone[None], 40, 8000)[0].mean(1).argmax()
    centre = mel_filters(40, 200, 8000)[loudest].argmax() * 40
    assert abs(int(centre) - 440) <= 60


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"join": 0}, "data.join: 0"),
        ({"rate": 44100}, "data.rate: 44100; accepted: 8000, 16000"),
        ({"seconds": 40}, "data.seconds: 40"),
        ({"mels": 0}, "data.mels: 0"),
        ({"utterances": -1}, "data.utterances: -1"),
        ({"val": 1000}, "data.val: 1000; there are 100 rows"),
        ({"root": "/nowhere"}, "data.root: no recordings in /nowhere"),
    ],
)
def test_arguments_out_of_range_are_named(published, change, said):
    with pytest.raises(UserError) as error:
        spoken_digits(**{"root": str(published), **change})
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_short, "1100 of 1600 samples"),
        (cut_in_the_header, "truncated, damaged or no wav file"),
        (lambda path: path.write_bytes(b"no sound at all"), "truncated, damaged or no wav file"),
        (lambda path: write_wav(path, sound(0, 0, 0), rate=16000), "16000 Hz"),
        (lambda path: write_wav(path, sound(0, 0, 0), channels=2), "2 channels"),
        (lambda path: write_wav(path, sound(0, 0, 0)[:0]), "0 of 0 samples"),
        (lambda path: path.rename(path.with_name("zero.wav")), "{digit}_{speaker}_{take}.wav"),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path, damage, said):
    for take in range(6):
        write_wav(tmp_path / f"0_ada_{take}.wav", sound(0, 0, 0))
    damage(tmp_path / "0_ada_3.wav")
    with pytest.raises(UserError) as error:
        spoken_digits(str(tmp_path))
    assert str(error.value).startswith("data.root: ") and said in str(error.value) and "\n" not in str(error.value)
    assert ("zero.wav" if "{digit}" in said else "0_ada_3.wav") in str(error.value)


def test_only_test_takes_is_an_error(tmp_path):
    write_wav(tmp_path / "0_ada_3.wav", sound(0, 0, 0))
    with pytest.raises(UserError, match="only takes 0 to 4"):
        spoken_digits(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "pickle", "lacks", "offsets"])
def test_damaged_arrays_are_named(packed, tmp_path, damage):
    path = tmp_path / "fsdd.npz"
    held = dict(np.load(packed))
    if damage == "cut":
        path.write_bytes(packed.read_bytes()[:5000])
    else:
        if damage == "pickle":
            held["speaker_names"] = np.array(list(SPEAKERS), dtype=object)
        elif damage == "lacks":
            del held["take"]
        else:
            held["offsets"] = held["offsets"] * 2
        np.savez(path, **held)
    with pytest.raises(UserError) as error:
        spoken_digits(str(path))
    assert str(error.value).startswith("data.root: ") and "\n" not in str(error.value)
