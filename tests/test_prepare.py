"""Finding, reading, extracting, caching and splitting clips, against librosa, SciPy and NumPy."""

import contextlib
import errno
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import librosa
import numpy as np
import pytest
import scipy.fft
import soundfile
import torch

import prepare
from config import Config, UserError
from prepare import (
    AudioError,
    Clip,
    ClipFeatures,
    Prepared,
    augment_features,
    cache_key,
    dct_matrix,
    delta_matrix,
    extract_features,
    extract_file,
    feature_stats,
    find_audio,
    find_labels,
    iter_features,
    list_clips,
    load_audio,
    load_corpus,
    load_features,
    make_demo,
    mel_filters,
    source_of,
    split_corpus,
    write_demo,
)

from . import fuzz
from .conftest import RATE, tone

FORK = pytest.mark.skipif(prepare.START_METHOD != "fork", reason="the patch reaches workers by fork alone")
SHORT = Config(duration=0.5, num_workers=0)  # enough for what is not about the features


def write_noise(path: Path, *, seed: int = 0, seconds: float = 0.4, rate: int = RATE, **options: Any) -> Path:
    """A clip unlike that of any other seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.2 * np.random.default_rng(seed).normal(size=round(seconds * rate)).clip(-4, 4)
    soundfile.write(path, wave, rate, **options)
    return path


def write_clips(folder: Path, count: int) -> list[Path]:
    """Several short clips, sorted."""
    return [write_noise(folder / f"{number:02d}.wav", seed=number) for number in range(count)]


def direct(paths: Sequence[Path], cfg: Config = SHORT) -> np.ndarray:
    """The features of the files, without workers and cache."""
    return np.stack([extract_file(path, cfg).features for path in paths])


def all_features(paths: Sequence[Path], cfg: Config) -> np.ndarray:
    """The features of the files, through the cache."""
    prepared = load_features(paths, cfg)
    return prepared.features[np.arange(len(prepared.indices))]


@pytest.fixture
def cached(tmp_path: Path) -> Config:
    """Short clips, and a cache in tmp_path."""
    return Config(duration=0.5, num_workers=0, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were extracted and not taken from the cache."""
    names: list[str] = []

    def recording(paths: Sequence[Path], cfg: Config) -> Iterator[ClipFeatures | AudioError]:
        names.extend(Path(path).name for path in paths)
        return iter_features(paths, cfg)

    monkeypatch.setattr(prepare, "iter_features", recording)
    return names


# ---- finding clips --------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_find_audio(tmp_path: Path) -> None:
    audio = [
        "B.WAV",
        "a/b/deep.Flac",
        "a.ogg",
        "a10.mp3",
        "a9.opus",
        "c.aif",
        "c.aiff",
        "d.au",
        "e.caf",
        "no.m4a",
    ]
    junk = [
        "notes.txt",
        "._a.wav",
        ".hidden/a.wav",
        ".DS_Store",
        "__MACOSX/a.wav",
        "Thumbs.db",
        "wav",
        "a.wav.bak",
    ]
    touch(tmp_path, *audio, *junk)
    (tmp_path / "folder.wav").mkdir()
    touch(tmp_path, "folder.wav/inside.wav")
    found = [Path(path).relative_to(tmp_path).as_posix() for path in find_audio(tmp_path)]
    assert found == sorted([*audio, "folder.wav/inside.wav"])


def test_find_audio_survives_a_loop_of_links(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.wav")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert find_audio(tmp_path) == [str(tmp_path / "a" / "x.wav")]


def test_find_labels_spells_as_on_disk(tmp_path: Path) -> None:
    for name in ("Suprised", "Angry", "sad", "Test", ".git", "__MACOSX", "é"):
        (tmp_path / name).mkdir()
    (tmp_path / "readme.wav").touch()
    assert find_labels(tmp_path) == ("Angry", "Suprised", "sad", "é")


def test_find_labels_leaves_out_the_test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "data/Angry/a.wav", "data/unlabelled/b.wav")
    monkeypatch.chdir(tmp_path)
    assert find_labels(Path("data"), skip=tmp_path / "data" / "unlabelled") == ("Angry",)
    assert find_labels(Path("data"), skip=Path("elsewhere")) == ("Angry", "unlabelled")


def test_links_to_themselves_are_no_classes(tmp_path: Path) -> None:
    """Every clip would be one of the class "all" as well."""
    data = tmp_path / "data"
    touch(data, "Angry/a.wav")
    (tmp_path / "elsewhere").mkdir()
    for name, target in {"all": ".", "above": "..", "loop": "loop", "Sad": "../elsewhere"}.items():
        (data / name).symlink_to(target, target_is_directory=True)
    assert find_labels(data) == ("Angry", "Sad")
    assert find_labels(data, skip=data / "loop") == ("Angry", "Sad")


@pytest.mark.parametrize("made", ["", "file", "Test", ".hidden"])
def test_find_labels_without_classes(made: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    if made == "file":
        folder.touch()
    elif made:
        (folder / made).mkdir(parents=True)
    with pytest.raises(UserError, match=str(folder)) as raised:
        find_labels(folder)
    assert raised.value.code == 2


def test_shuffled_listing_gives_the_same_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{label}/{sub}{k}.wav" for label in "CAB" for sub in ("", "x/", "y/") for k in range(5)]
    touch(tmp_path, *names)
    expected = list_clips(tmp_path, find_labels(tmp_path))
    assert expected == [Clip(str(tmp_path / name), "ABC".index(name[0])) for name in sorted(names)]
    walk, iterdir = os.walk, Path.iterdir

    def shuffled_walk(folder: Path, **_: object) -> Iterator[tuple[str, list[str], list[str]]]:
        for parent, folders, files in walk(folder):
            random.Random(1).shuffle(folders)
            yield parent, folders, random.Random(2).sample(files, len(files))

    monkeypatch.setattr(os, "walk", shuffled_walk)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(iterdir(folder), reverse=True)))
    assert list_clips(tmp_path, find_labels(tmp_path)) == expected


@pytest.mark.parametrize(
    ("stem", "corpus", "speaker"),
    [
        ("1001_DFA_ANG_XX", "CREMA-D", "CREMA-D 1001"),
        ("1040_ITH_SAD_X", "CREMA-D", "CREMA-D 1040"),  # so named in the corpus
        ("1091_WSI_HAP_HI", "CREMA-D", "CREMA-D 1091"),
        ("03-01-06-01-02-01-12", "RAVDESS speech", "RAVDESS 12"),
        ("03-02-06-01-02-01-12", "RAVDESS song", "RAVDESS 12"),
        ("DC_a01", "SAVEE", "SAVEE DC"),
        ("KL_sa15", "SAVEE", "SAVEE KL"),
        ("JK_su03", "SAVEE", "SAVEE JK"),
        ("OAF_back_angry", "TESS", "TESS OA"),
        ("YAF_youth_ps", "TESS", "TESS YA"),
        ("OA_bite_neutral", "TESS", "TESS OA"),  # so named in the corpus
        ("spk03_take01", "synthetic", "synthetic 03"),
        ("recording 7", "other", ""),
        ("1001_DFA_ANG_XX (copy)", "other", ""),
        ("03-03-06-01-02-01-12", "other", ""),
        ("DC_x01", "other", ""),
        ("DC_a01.copy", "other", ""),
    ],
)
def test_source_of(stem: str, corpus: str, speaker: str) -> None:
    assert source_of(Path("any.where") / "deep" / f"{stem}.wav") == (corpus, speaker)


# ---- audio ----------------------------------------------------------------------------------------------


def load(path: Path, n_samples: int = 66150) -> np.ndarray:
    """The samples alone."""
    return load_audio(path, sample_rate=RATE, n_samples=n_samples)[0]


FORMATS = [  # (suffix, rate, channels, options of soundfile.write)
    ("wav", 22050, 1, {}),
    ("wav", 8000, 2, {}),
    ("wav", 16000, 1, {"subtype": "PCM_24"}),
    ("wav", 44100, 2, {"subtype": "FLOAT"}),
    ("wav", 48000, 1, {"subtype": "DOUBLE"}),
    ("wav", 192000, 1, {"subtype": "PCM_U8"}),
    ("flac", 44100, 1, {}),
    ("flac", 8000, 2, {"subtype": "PCM_24"}),
    ("ogg", 44100, 2, {}),
    ("mp3", 44100, 1, {}),
    ("mp3", 48000, 2, {}),
    ("aiff", 48000, 2, {}),
    ("aif", 16000, 1, {"format": "AIFF"}),
    ("au", 8000, 1, {}),
    ("caf", 44100, 6, {}),
    ("opus", 48000, 2, {"format": "OGG", "subtype": "OPUS"}),
]


@pytest.mark.filterwarnings("ignore:'(aifc|audioop|sunau)' is deprecated")  # librosa.load imports audioread
@pytest.mark.parametrize("seconds", [0.7, 4.1])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_load_audio_equals_librosa(
    form: tuple[str, int, int, dict[str, Any]], seconds: float, tmp_path: Path
) -> None:
    suffix, rate, channels, options = form
    path = tmp_path / f"clip.{suffix}"
    rng = np.random.default_rng(0)
    wave = np.stack([tone(300 + 100 * k, seconds, rate) for k in range(channels)], axis=1)
    soundfile.write(path, 0.5 * wave + 0.05 * rng.normal(size=wave.shape), rate, **options)
    expected, _ = librosa.load(path, sr=RATE)
    ours = load(path)
    assert ours.dtype == np.float32
    assert ours.shape == expected[:66150].shape
    assert 0.05 < np.abs(ours).max() < 1
    np.testing.assert_allclose(ours, expected[:66150], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [1000, 8000, 22050, 44100, 48000, 768_000])
@pytest.mark.parametrize("n_samples", [1, 1102, 30000])
def test_only_the_start_of_a_long_file_is_read(
    rate: int, n_samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is read is enough: the last samples are those that the whole file gives.

    The margin was counted in samples of the result: 46 of the file at 1,000 Hz, too few for the resampler.
    """
    path = write_noise(tmp_path / "long.wav", seconds=6, rate=rate)
    whole = load(path, 10**7)[:n_samples]
    asked = []
    read = soundfile.SoundFile.read

    def spy(file: soundfile.SoundFile, *, out: np.ndarray) -> np.ndarray:
        asked.append(len(out))
        return read(file, out=out)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    start = load(path, n_samples)
    np.testing.assert_allclose(start, whole, rtol=0, atol=1e-6)
    assert start.size == n_samples
    assert 0 <= sum(asked) - n_samples * rate / RATE <= 2048 * max(1, rate / RATE)


def write_wave(path: Path, wave: Any, rate: int = RATE) -> None:
    soundfile.write(path, np.asarray(wave, np.float32), rate, subtype="FLOAT", format="WAV")


def cut_header(path: Path) -> None:
    write_noise(path)
    path.write_bytes(path.read_bytes()[:20])


def forbid(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    write_noise(path).chmod(0)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {  # (file name, how to make it, reason)
    "empty": ("a.wav", Path.touch, ""),
    "cut header": ("a.wav", cut_header, ""),
    "text": ("a.wav", lambda path: path.write_text("hello " * 99), ""),
    "html as mp3": ("a.mp3", lambda path: path.write_text("<html>" * 99), ""),
    "zeros": ("a.flac", lambda path: path.write_bytes(bytes(5000)), ""),
    "folder": ("a.wav", Path.mkdir, "not a regular file"),
    "missing": ("a.wav", lambda _: None, "No such file"),
    "dangling link": ("a.wav", lambda path: path.symlink_to("nowhere.wav"), "No such file"),
    "loop of links": ("a.wav", lambda path: path.symlink_to("a.wav"), "Too many levels of symbolic links"),
    "link to a device": ("a.wav", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "socket": ("a.wav", make_socket, "not a regular file"),
    "name too long": (300 * "a" + ".wav", lambda _: None, "File name too long"),
    "no permission": ("a.wav", forbid, "Permission denied"),
    "png": ("a.wav", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "not recognised"),
    "NaN": ("a.wav", lambda path: write_wave(path, [0.1, np.nan, 0.2] * 999), "NaN"),
    "infinite": ("a.wav", lambda path: write_wave(path, [0.1, -np.inf, 0.2] * 999), "infinite"),
    "no header of its own": ("a.mp3", lambda path: path.write_bytes(bytes(99)), "not audio"),
    "infinite both ways": ("a.wav", lambda path: write_wave(path, [[np.inf, -np.inf]] * 999), "infinite"),
    "overflow of the mean": ("a.wav", lambda path: write_wave(path, np.full((99, 2), 3e38)), "infinite"),
    "huge": ("a.wav", lambda path: write_wave(path, [1e30, -1e30] * 999), "samples as large as 1e+30"),
    "no samples": ("a.wav", lambda path: write_wave(path, []), "no samples"),
    "17 channels": ("a.wav", lambda path: write_wave(path, np.zeros((999, 17))), "17 channels"),
    "1 Hz": ("a.wav", lambda path: write_wave(path, np.zeros(999), rate=1), "1 Hz"),
    "1 MHz": ("a.wav", lambda path: write_wave(path, np.zeros(999), rate=1_000_000), "1000000 Hz"),
    "m4a": ("a.m4a", lambda path: path.write_bytes(bytes(999)), "m4a cannot be decoded: convert it to wav"),
    "wma in capitals": ("a.WMA", lambda path: path.write_bytes(bytes(999)), "convert it to wav"),
}


@pytest.mark.parametrize(("name", "make", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(name: str, make: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(AudioError) as raised:
        extract_file(tmp_path / name, SHORT)
    assert raised.value.path == tmp_path / name
    assert str(raised.value) == f"{tmp_path / name}: {raised.value.reason}"
    assert "\n" not in raised.value.reason
    assert raised.value.reason
    assert reason in raised.value.reason


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_file_that_cannot_be_opened(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of the system: those of libsndfile were "System error."."""
    path = write_noise(tmp_path / "a.wav")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(AudioError, match=f"a.wav: {os.strerror(code)}$"):
        load(path)


def test_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is named, with its name made safe; the others are listed."""
    touch(tmp_path, "a/x.wav", "b\x1b[2J/x.wav")
    scandir = os.scandir

    def refuse(folder: str) -> Any:
        if Path(folder).name.startswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_audio(tmp_path) == [str(tmp_path / "a" / "x.wav")]
    err = capsys.readouterr().err
    assert "skipped" in err
    assert "Permission denied" in err
    assert r"b\x1b[2J" in err
    assert "\x1b" not in err
    with pytest.raises(PermissionError):
        find_audio(tmp_path, strict=True)


def test_a_file_named_as_standard_input_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder would take it for the standard input, and wait."""
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "a.wav").rename("-")
    assert load(Path("-")).size > 0


@pytest.mark.skipif(os.name == "nt", reason="names are shorter on Windows")
def test_a_path_too_long_for_libsndfile_is_refused(tmp_path: Path) -> None:
    """It takes 1,023 bytes, the system four times that."""
    folder = tmp_path.joinpath(*[200 * "a"] * 6)
    folder.mkdir(parents=True)
    path = write_noise(tmp_path / "a.wav").rename(folder / "a.wav")
    with pytest.raises(AudioError, match="too long"):
        load(path)


@pytest.mark.parametrize("suffix", sorted(prepare.FOREIGN_SUFFIXES))
def test_foreign_formats_are_named(suffix: str, tmp_path: Path) -> None:
    """They are listed, so that they are not overlooked, and refused without being opened."""
    path = tmp_path / f"a{suffix}"
    os.mkfifo(path)
    assert find_audio(tmp_path) == [str(path)]
    with pytest.raises(AudioError, match=rf"{suffix} cannot be decoded: convert it to wav"):
        load(path)


def an_hour_of_silence(path: Path) -> None:
    soundfile.write(path, np.zeros(3600 * 8000, np.int16), 8000, format="FLAC")
    assert path.stat().st_size < 300_000


def lying_flac(path: Path) -> None:
    write_noise(path, format="FLAC")
    put(path, 21, bytes([path.read_bytes()[21] | 0x0F, *[0xFF] * 4]))
    assert soundfile.info(path).frames == 2**36 - 1


def lying_wav(path: Path) -> None:
    write_noise(path)
    put(path, 40, (0x7FFE0000).to_bytes(4, "little"))


def lying_au(path: Path) -> None:
    write_noise(path, format="AU")
    put(path, 8, (0x7FFE0000).to_bytes(4, "big"))


def most_channels_and_samples(path: Path) -> None:
    soundfile.write(path, np.ones((int(3.2 * 768_000), 16), np.int16), 768_000, "PCM_U8", format="WAV")


@FORK
@pytest.mark.parametrize(
    ("make", "megabytes", "kind"),
    [
        (an_hour_of_silence, 50, "warned"),
        (lying_flac, 50, "used"),
        (lying_wav, 50, "warned"),
        (lying_au, 50, "warned"),
        (most_channels_and_samples, 400, "warned"),
    ],
)
def test_time_and_memory_are_bounded(
    make: Callable[[Path], None], megabytes: int, kind: str, tmp_path: Path
) -> None:
    """By the length of a clip, not by what the file holds or claims."""
    make(tmp_path / "a.wav")
    [outcome] = fuzz.examine_all([tmp_path / "a.wav"], Config())
    assert outcome.kind == kind
    assert outcome.seconds < 1
    assert outcome.megabytes < megabytes


@pytest.mark.parametrize("channels", [1, 2, 16])
@pytest.mark.parametrize("rate", [1000, 768_000])
def test_odd_but_allowed(channels: int, rate: int, tmp_path: Path) -> None:
    write_wave(tmp_path / "a.wav", np.full((rate // 2, channels), 0.25), rate)
    wave = load(tmp_path / "a.wav")
    assert wave.size == pytest.approx(RATE / 2, abs=1)
    assert wave[wave.size // 2] == pytest.approx(0.25, abs=0.01)


def cut(path: Path, share: float) -> None:
    """Leave the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def warning_of(path: Path) -> str:
    return load_audio(path, sample_rate=RATE, n_samples=66150)[1]


CUT = [  # (suffix, options of soundfile.write, how the warning begins)
    ("wav", {}, "truncated: "),
    ("wav", {"subtype": "FLOAT"}, "truncated: "),
    ("wav", {"subtype": "IMA_ADPCM"}, "truncated: "),
    ("wav", {"subtype": "ULAW"}, "truncated: "),
    ("aiff", {}, "truncated: "),
    ("au", {}, "truncated: "),
    ("mp3", {}, "truncated: "),
    ("flac", {}, "unreadable after "),
    ("ogg", {}, "truncated: the end of the stream is missing"),
    ("opus", {"format": "OGG", "subtype": "OPUS"}, "truncated: the end of the stream is missing"),
]


@pytest.mark.parametrize(("suffix", "options", "warning"), CUT, ids=str)
def test_a_cut_file_gives_what_it_has(
    suffix: str, options: dict[str, str], warning: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And says so itself: mpg123 wrote to the terminal, and a cut FLAC was refused as a whole."""
    path = write_noise(tmp_path / f"a.{suffix}", seconds=2.5, rate=48000, **options)
    whole, nothing = load_audio(path, sample_rate=RATE, n_samples=66150)
    cut(path, 0.7)
    with prepare.silenced():  # as iter_features does
        part, told = load_audio(path, sample_rate=RATE, n_samples=66150)
    assert nothing == ""
    assert told.startswith(warning)
    assert 0.3 < part.size / whole.size < 0.8
    # The resampler has nothing to look ahead to at the cut; IMA ADPCM decodes half a block differently.
    same = part.size - (2000 if suffix == "wav" else 200)
    np.testing.assert_allclose(part[:same], whole[:same], rtol=0, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_a_warning_tells_how_much_is_there(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "a.wav", seconds=2)
    cut(path, 0.5)
    assert warning_of(path) == "truncated: 1.00 of 2.00 s"
    write_noise(path, seconds=2, format="FLAC")
    cut(path, 0.9)
    assert warning_of(path) == f"unreadable after {load(path).size / RATE:.2f} s: flac decoder lost sync."


@pytest.mark.parametrize(("missing", "warning"), [(1102, ""), (1103, "truncated: 0.95 of 1.00 s")])
def test_a_twentieth_of_a_second_may_be_missing(missing: int, warning: str, tmp_path: Path) -> None:
    """Decoders drop an odd frame at the end."""
    path = write_noise(tmp_path / "a.wav", seconds=1)
    os.truncate(path, path.stat().st_size - 2 * missing)
    assert warning_of(path) == warning


@pytest.mark.parametrize(("suffix", "options", "_"), CUT, ids=str)
def test_a_cut_beyond_what_is_used_does_not_matter(
    suffix: str, options: dict[str, str], _: str, tmp_path: Path
) -> None:
    path = write_noise(tmp_path / f"a.{suffix}", seconds=9, rate=48000, **options)
    whole = load(path)
    cut(path, 0.7)
    part, warning = load_audio(path, sample_rate=RATE, n_samples=66150)
    assert warning == ""
    np.testing.assert_allclose(part, whole, rtol=0, atol=1e-5)


def put(path: Path, offset: int, content: bytes) -> None:
    """Overwrite a few bytes."""
    old = path.read_bytes()
    path.write_bytes(old[:offset] + content + old[offset + len(content) :])


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_from_a_pipe_is_whole(size: int, tmp_path: Path) -> None:
    """Who writes it cannot know the length, and puts the largest there is."""
    path = write_noise(tmp_path / "a.wav", seconds=1)
    put(path, 40, size.to_bytes(4, "little"))
    assert (load(path).size, warning_of(path)) == (RATE, "")


def test_a_flac_from_a_pipe_is_whole(tmp_path: Path) -> None:
    """Its header says 0 samples for "unknown"; soundfile refused it when it came to the end."""
    path = write_noise(tmp_path / "a.flac", seconds=1)
    expected = load(path)
    put(path, 21, bytes([path.read_bytes()[21] & 0xF0, 0, 0, 0, 0]))
    np.testing.assert_array_equal(load(path), expected)
    assert warning_of(path) == ""
    cut(path, 0.6)
    assert warning_of(path).startswith("unreadable after 0.")


def test_an_mp3_without_a_length_promises_none(tmp_path: Path) -> None:
    """It is guessed from the first frame, here a small one, and the size of the file."""
    path = tmp_path / "a.mp3"
    wave = np.concatenate([np.zeros(RATE), 0.2 * np.random.default_rng(0).normal(size=RATE)])
    soundfile.write(path, wave, RATE, bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    frame = content.find(content[:2], 60)  # the first one holds but the length
    path.write_bytes(content[frame:])
    assert warning_of(path) == ""
    with soundfile.SoundFile(path) as file:
        assert file.frames - file.read().size > RATE / 20


@pytest.mark.parametrize("format_", ["WAV", "FLAC", "MP3", "OGG"])
def test_silence_is_told(format_: str, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    silence = np.zeros((RATE, 2))
    soundfile.write(path, silence, RATE, format=format_)
    assert warning_of(path) == "silent"
    assert np.isfinite(extract_file(path, SHORT).features).all()
    soundfile.write(path, silence + 3e-3 * np.stack(2 * [tone(440)], axis=1), RATE, format=format_)
    assert warning_of(path) == ""


def test_an_offset_is_silence_too(tmp_path: Path) -> None:
    """It cannot be heard, and resampling makes it rise and fall at the ends."""
    write_wave(tmp_path / "a.wav", np.full(8000, 0.1), rate=8000)
    assert warning_of(tmp_path / "a.wav") == "silent"


@pytest.mark.parametrize("format_", ["WAV", "FLAC", "MP3", "OGG"])
def test_opposite_channels_are_told(format_: str, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([tone(440), -tone(440)], axis=1), RATE, format=format_)
    assert warning_of(path) == "silent: its channels cancel out"
    assert np.isfinite(extract_file(path, SHORT).features).all()
    for left, right in ((1, -0.8), (1, 0), (1, 1)):
        soundfile.write(path, np.stack([left * tone(440), right * tone(440)], axis=1), RATE, format=format_)
        assert warning_of(path) == ""


def test_an_ogg_file_needs_its_last_page_whole(tmp_path: Path) -> None:
    """Cut between pages and within the last one, which begins with the mark of the end."""
    path = write_noise(tmp_path / "a.ogg", seconds=2.5)
    content = path.read_bytes()
    last = content.rfind(b"OggS")
    for end in (last, last + 4, last + 100, len(content) - 1):
        path.write_bytes(content[:end])
        assert warning_of(path) == "truncated: the end of the stream is missing"
    path.write_bytes(content)
    assert warning_of(path) == ""


def test_two_warnings(tmp_path: Path) -> None:
    write_wave(tmp_path / "a.wav", np.zeros(2 * RATE))
    cut(tmp_path / "a.wav", 0.5)
    assert extract_file(tmp_path / "a.wav", Config()).warning == "truncated: 1.00 of 2.00 s; silent"


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream_is_no_fault(stream: int, tmp_path: Path) -> None:
    """As in `python prepare.py 2>&-`."""
    path = write_noise(tmp_path / "a.wav")
    saved, other = os.dup(stream), os.fstat(3 - stream)
    os.close(stream)
    try:
        assert not isinstance(next(iter_features([path], SHORT)), AudioError)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(stream)
        assert os.fstat(3 - stream) == other
    finally:
        os.dup2(saved, stream)
        os.close(saved)


def test_reading_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """Neither of good nor of bad files."""
    paths = [write_noise(tmp_path / "a.wav"), tmp_path / "b.wav"]
    paths[1].write_text("no audio")
    before = len(list(Path("/dev/fd").iterdir()))
    for path in 10 * paths:
        with contextlib.suppress(AudioError):
            load(path)
    assert len(list(Path("/dev/fd").iterdir())) == before


CASES = sorted((Path(__file__).parent / "cases").iterdir())


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_cases(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Small files that have made trouble, or that tests/fuzz.py kept; the name begins with the outcome."""
    (clip,) = iter_features([path], Config())
    if isinstance(clip, AudioError):
        outcome = "refused"
        assert clip.reason
    else:
        outcome = "warned" if clip.warning else "used"
        assert clip.features.shape == (120, 130)
        assert np.isfinite(clip.features).all()
    assert path.name.startswith(f"{outcome}-")
    assert path.stat().st_size <= 2048
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_to_a_pipe() -> None:
    """Two decoders print to stdout, and C keeps it until the end of the process: it came after our rows."""
    program = """
import sys
from pathlib import Path
from prepare import *
for result in iter_features(sys.argv[1:], Config()):
    pass
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    paths = [str(path) for path in CASES if "prints" in path.name]
    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(
        command, check=True, capture_output=True, cwd=Path(prepare.__file__).parent, env=environment
    )
    assert len(paths) == 2
    assert (done.stdout, done.stderr) == (b"", b"")


@FORK
def test_fuzz() -> None:
    """Two files of every format."""
    outcomes, finds = fuzz.fuzz(2 * len(fuzz.FORMATS), seed=0, cfg=Config(num_workers=2))
    assert not finds
    assert {outcome.kind for _, outcome in outcomes} == {"used", "warned", "refused"}
    assert {name for name, _ in outcomes} == fuzz.FORMATS.keys()


def test_fuzzer_mends_checksums(tmp_path: Path) -> None:
    """Those of an honest file come out as they were."""
    content = write_noise(tmp_path / "a.ogg", seconds=1).read_bytes()
    pages = [match.start() for match in re.finditer(b"OggS", content)]
    broken = bytearray(content)
    for start in pages:
        broken[start + 22 : start + 26] = b"1234"
    assert len(pages) > 2
    assert fuzz.mend_ogg(broken) == content


def misbehave(path: Path, _: Config) -> ClipFeatures:
    """Do what the content says."""
    content = path.read_bytes()
    if b"crash" in content:
        os.kill(os.getpid(), signal.SIGKILL)  # as SIGSEGV, but pytest does not report it at length
    if b"hang" in content:
        time.sleep(60)
    if b"raise" in content:
        raise ValueError
    if b"slow" in content:
        start = time.process_time()
        while time.process_time() < start + 0.2:
            pass
    if b"large" in content:
        np.ones(100_000_000, np.int8)
    return ClipFeatures(path, np.full((120, 130), np.nan if b"NaN" in content else 0), 1.0, "")


@FORK
def test_fuzzer_sees_what_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault in one file among good ones, and it is cut down to what matters."""
    for name, value in {"EXTRACT": misbehave, "HUNG": 2, "SLOW": 0.1, "LARGE": 50}.items():
        monkeypatch.setattr(fuzz, name, value)
    faults = {
        "crash": "crashed",
        "raise": "raised",
        "slow": "slow",
        "large": "large",
        "NaN": "not finite",
    }
    words = [*faults, *["good"] * (64 - len(faults)), "hang"]  # alone in its chunk, as it takes long
    paths = [tmp_path / f"{number}.wav" for number in range(65)]
    for path, word in zip(paths, words, strict=True):
        path.write_bytes(bytes(500) + word.encode() + bytes(500))
    cfg = Config(num_workers=2)
    kinds = [outcome.kind for outcome in fuzz.examine_all(paths, cfg)]
    assert kinds == [*faults.values(), *["used"] * (64 - len(faults)), "crashed"]
    for path in paths[:2]:
        small = fuzz.minimise(path.read_bytes(), path, kinds[paths.index(path)], cfg)
        assert len(small) < 50


@FORK
def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")

    def read() -> None:
        with pytest.raises(AudioError, match="not a regular file"):
            load(tmp_path / "a.wav")

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(30)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.skipif(os.name == "nt", reason="names are text on Windows")
@pytest.mark.parametrize("name", ["é 日本.wav", "a\nb.wav", "'\"%s.wav", os.fsdecode(b"\xff\xfe.wav")])
def test_any_file_name_is_read_and_cached(
    name: str, tmp_path: Path, cached: Config, extracted: list[str]
) -> None:
    """Names that are not UTF-8 ended the run: soundfile raises UnicodeEncodeError for them."""
    path = write_noise(tmp_path / "a.wav").rename(tmp_path / name)
    for _ in range(2):
        np.testing.assert_array_equal(all_features([path], cached), direct([path]))
    assert extracted == [name]


def test_audio_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(AudioError(Path("a.wav"), "empty")))
    assert (error.path, error.reason, str(error)) == (Path("a.wav"), "empty", "a.wav: empty")


# ---- features -------------------------------------------------------------------------------------------

SETTINGS = [
    Config(),
    Config(n_fft=1024, hop_length=256, n_mels=64, n_mfcc=20),
    Config(sample_rate=16000, n_mfcc=13, n_mels=40, n_fft=512, hop_length=160),
    Config(sample_rate=8000, n_fft=2000, hop_length=700, n_mels=90, n_mfcc=90),
    Config(sample_rate=1500, n_fft=256, hop_length=64, n_mels=20, n_mfcc=20),  # all mels are linear
]
WAVES: dict[str, Callable[[int], np.ndarray]] = {  # of a sample rate
    "noise": lambda rate: np.random.default_rng(0).normal(0, 0.1, 3 * rate),
    "tone": functools.partial(tone, 440, 3),
    "short tone": lambda rate: tone(300, 0.8, rate),
    "click": lambda _: np.array([1.0]),
    "faint": lambda rate: 1e-5 * np.random.default_rng(0).normal(size=2 * rate),
    "silence": np.zeros,
}


def reference(wave: np.ndarray, cfg: Config) -> np.ndarray:
    """The features as librosa gives them."""
    mfcc = librosa.feature.mfcc(
        y=wave,
        sr=cfg.sample_rate,
        n_mfcc=cfg.n_mfcc,
        n_fft=cfg.n_fft,
        hop_length=cfg.hop_length,
        n_mels=cfg.n_mels,
    )
    return np.concatenate([mfcc, librosa.feature.delta(mfcc), librosa.feature.delta(mfcc, order=2)])


def ours(wave: np.ndarray, cfg: Config) -> np.ndarray:
    return extract_features(torch.from_numpy(wave)[None], cfg)[0].numpy()


@pytest.mark.filterwarnings("ignore:Empty filters detected")  # librosa's word on many bands at a low rate
@pytest.mark.parametrize("make", WAVES.values(), ids=WAVES)
@pytest.mark.parametrize("cfg", SETTINGS, ids=lambda cfg: str(cfg.sample_rate))
def test_features_equal_librosa(cfg: Config, make: Callable[[int], np.ndarray]) -> None:
    wave = librosa.util.fix_length(make(cfg.sample_rate).astype(np.float32), size=cfg.n_samples)
    features = ours(wave, cfg)
    assert features.shape == (cfg.n_features, cfg.n_frames)
    np.testing.assert_allclose(features, reference(wave, cfg), rtol=0, atol=2e-3)


def test_features_of_speech_like_clips_equal_librosa(demo_corpus: Path) -> None:
    for path in map(Path, find_audio(demo_corpus)[::30]):
        wave = librosa.util.fix_length(load(path), size=66150)
        np.testing.assert_allclose(
            extract_file(path, Config()).features, reference(wave, Config()), atol=2e-3
        )


def test_silence() -> None:
    features = ours(np.zeros(66150, np.float32), Config())
    np.testing.assert_allclose(features[0], -1131.371, atol=1e-2)
    np.testing.assert_allclose(features[1:], 0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Empty filters detected")
@pytest.mark.parametrize(
    ("rate", "n_fft", "n_mels"), [(22050, 2048, 128), (16000, 512, 40), (8000, 400, 80), (1500, 256, 20)]
)
def test_mel_filters_equal_librosa(rate: int, n_fft: int, n_mels: int) -> None:
    expected = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels)
    np.testing.assert_allclose(mel_filters(rate, n_fft, n_mels).numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("n_mfcc", "n_mels"), [(40, 128), (13, 40), (20, 20), (1, 1)])
def test_dct_matrix_equals_scipy(n_mfcc: int, n_mels: int) -> None:
    expected = scipy.fft.dct(np.eye(n_mels), type=2, axis=0, norm="ortho")[:n_mfcc]
    np.testing.assert_allclose(dct_matrix(n_mfcc, n_mels).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("n_frames", [9, 10, 130])
def test_delta_of_polynomials(n_frames: int) -> None:
    """The slope of a ramp and the bend of a parabola, at the ends as well."""
    time = torch.arange(n_frames) / 10
    first, second = delta_matrix(n_frames, 1), delta_matrix(n_frames, 2)
    for slope in (0.0, -2.0, 5.0):
        torch.testing.assert_close(
            (slope * time + 3) @ first, torch.full((n_frames,), slope / 10), rtol=0, atol=1e-4
        )
        torch.testing.assert_close((slope * time + 3) @ second, torch.zeros(n_frames), rtol=0, atol=1e-4)
    bend = (100 * time**2) @ second
    torch.testing.assert_close(bend, torch.full((n_frames,), 2.0), rtol=0, atol=2e-2)


@pytest.mark.parametrize("hertz", [60, 220, 997, 1003, 3000, 9000])
def test_tone_peaks_in_its_mel_band(hertz: int) -> None:
    """With as many coefficients as bands the DCT can be undone."""
    cfg = Config(n_mfcc=128)
    mfcc = ours(tone(hertz, 3), cfg)[:128]
    band = (dct_matrix(128, 128).numpy().T @ mfcc)[:, 60].argmax()
    edges = librosa.mel_frequencies(130, fmin=0, fmax=RATE / 2)
    assert edges[band] < hertz < edges[band + 2]


def test_features_do_not_depend_on_neighbours(rng: np.random.Generator) -> None:
    loudness = np.array([[1e-4], [1e-2], [0.3], [0.9]])
    waves = torch.from_numpy((loudness * rng.normal(size=(4, 66150))).astype(np.float32))
    together = extract_features(waves, Config())
    for k in range(4):
        torch.testing.assert_close(
            together[k], extract_features(waves[k : k + 1], Config())[0], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    "size", [1, 511, 1023, 1024, 1025, 8 * 512, 30_000, 65_125, 65_126, 66149, 66150, 661_500]
)
def test_features_of_any_length_are_those_of_the_standard_length(size: int, rng: np.random.Generator) -> None:
    """Frames in the padding are not transformed: they must come out as if they had been."""
    wave = rng.normal(0, 0.1, size).astype(np.float32)
    standard = librosa.util.fix_length(wave, size=66150)
    features = ours(wave, Config())
    assert features.shape == (120, 130)
    np.testing.assert_allclose(features, ours(standard, Config()), rtol=0, atol=2e-4)
    np.testing.assert_allclose(features, reference(standard, Config()), rtol=0, atol=2e-3)


def test_extraction_leaves_the_wave_alone(rng: np.random.Generator) -> None:
    """It works in place, on arrays of its own."""
    waves = torch.from_numpy(rng.normal(0, 0.1, (2, 66150)).astype(np.float32))
    before = waves.clone()
    first = extract_features(waves, Config())
    torch.testing.assert_close(waves, before, rtol=0, atol=0)
    torch.testing.assert_close(extract_features(waves, Config()), first, rtol=0, atol=0)


# ---- augmentation ---------------------------------------------------------------------------------------


def augmented(features: torch.Tensor, draw: float, **options: float) -> torch.Tensor:
    """augment_features with every random number at `draw` of its range, 0 to 1."""
    cfg = Config(**({"warp": 0.0, "stretch": 0.0, "shift": 0.0} | options))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, draw))
        patch.setattr(torch, "randint", lambda n, shape, **_: torch.full(shape, round(draw * (n - 1))))
        return augment_features(features, cfg)


def some_features(n_clips: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(5)
    waves = rng.normal(0, 0.1, (n_clips, 50_000)) * np.sin(np.linspace(0, 9, 50_000)) ** 2
    return extract_features(torch.from_numpy(waves.astype(np.float32)), Config())


@pytest.mark.parametrize("draw", [0.0, 0.3, 1.0])
def test_no_augmentation_changes_nothing(draw: float) -> None:
    features = some_features()
    torch.testing.assert_close(augmented(features, draw), features, rtol=0, atol=2e-3)


def test_middle_of_the_range_changes_nothing() -> None:
    features = some_features()
    same = augmented(features, 0.5, warp=0.2, stretch=0.3, shift=0.5)
    torch.testing.assert_close(same, features, rtol=0, atol=2e-3)


@pytest.mark.parametrize("draw", [0.0, 0.35, 0.8, 1.0])
def test_frames_are_read_off_in_between(draw: float) -> None:
    """Clip by clip as NumPy does it; silence is 80 dB below the loudest band of the same clip."""
    scale = torch.tensor([30.0, 3.0])[:, None, None]
    features = scale * torch.randn(2, 120, 50, generator=torch.Generator().manual_seed(0))
    changed = augmented(features, draw, stretch=0.25, shift=0.2)
    place = (np.arange(50) - (2 * draw - 1) * 0.2 * RATE / 512) * 1.25 ** (2 * draw - 1)
    inside = (place >= 0) & (place <= 49)
    bands = dct_matrix(40, 128).T @ features[:, :40]
    for clip in range(2):
        for row in range(40):
            expected = np.interp(place, np.arange(50), features[clip, row])
            expected[~inside] = (float(bands[clip].max()) - 80) * np.sqrt(128) if row == 0 else 0
            np.testing.assert_allclose(changed[clip, row], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("frames", [-20, 20])
def test_shift_equals_that_of_the_wave(frames: int) -> None:
    """Up to where a window reaches over the cut: there is silence on one side of it."""
    wave = np.random.default_rng(1).normal(0, 0.1, 66150).astype(np.float32)
    moved = np.roll(wave, frames * 512)
    moved[: frames * 512 if frames > 0 else 0] = 0
    moved[len(moved) + frames * 512 if frames < 0 else len(moved) :] = 0
    shifted = augmented(
        torch.from_numpy(ours(wave, Config()))[None], float(frames > 0), shift=20 * 512 / 22050
    )
    expected = torch.from_numpy(ours(moved, Config()))
    whole = slice(24, 124) if frames > 0 else slice(4, 104)
    torch.testing.assert_close(shifted[0, :40, whole], expected[:40, whole], rtol=0, atol=2e-2)
    silent = slice(0, 15) if frames > 0 else slice(116, 130)
    torch.testing.assert_close(shifted[0, :40, silent], expected[:40, silent], rtol=0, atol=25)
    assert (shifted[0, 1:40, silent] == 0).all()


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_stretch_moves_events(draw: float) -> None:
    """A click at 1 s is heard earlier in a faster clip, by the factor asked for."""
    wave = 1e-3 * np.random.default_rng(1).normal(size=66150)
    wave[22050:22250] += 0.5
    features = torch.from_numpy(ours(wave.astype(np.float32), Config()))[None]
    at = int(augmented(features, draw, stretch=0.25)[0, 0].argmax())
    assert at == pytest.approx(22050 / 512 / 1.25 ** (2 * draw - 1), abs=3)


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_warp_moves_a_tone(draw: float) -> None:
    """With as many coefficients as bands, the DCT can be undone: the tone is in another band."""
    cfg = Config(n_mfcc=128, warp=0.25, stretch=0, shift=0)
    features = torch.from_numpy(ours(tone(2000, 3), cfg))[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda n, shape, **_: torch.full(shape, round(draw * (n - 1))))
        warped = augment_features(features, cfg)[0, :128]
    band = int((dct_matrix(128, 128).T @ warped)[:, 60].argmax())
    edges = librosa.mel_frequencies(130, fmin=0, fmax=RATE / 2)
    assert edges[band] < 2000 / 1.25 ** (2 * draw - 1) < edges[band + 2]


def test_deltas_follow_the_augmented_cepstra() -> None:
    torch.manual_seed(0)
    changed = augment_features(some_features(), Config(warp=0.1, stretch=0.2, shift=0.3))
    for order in (1, 2):
        rows = changed[:, 40 * order : 40 * (order + 1)]
        torch.testing.assert_close(rows, changed[:, :40] @ delta_matrix(130, order), rtol=0, atol=1e-3)


def test_augmentation_is_drawn_for_each_clip_by_the_seed() -> None:
    """And leaves what it was given alone."""
    features = some_features(1).repeat(4, 1, 1)
    before = features.clone()
    torch.manual_seed(3)
    first = augment_features(features, Config())
    torch.manual_seed(3)
    again = augment_features(features, Config())
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert all((first[k] - first[0]).abs().max() > 1 for k in range(1, 4))
    torch.testing.assert_close(features, before, rtol=0, atol=0)
    assert first.isfinite().all()


@pytest.mark.parametrize("seconds", [0.01, 0.5, 2.99, 3.0, 9.0])
def test_extract_file(seconds: float, tmp_path: Path) -> None:
    path = write_noise(tmp_path / "a.wav", seconds=seconds)
    result = extract_file(path, Config())
    assert (result.path, result.features.shape, result.features.dtype) == (path, (120, 130), np.float32)
    assert result.seconds == pytest.approx(min(seconds, 3), abs=1e-3)
    assert result.digest != extract_file(write_noise(tmp_path / "b.wav", seed=1), Config()).digest


# ---- many files, all cores ------------------------------------------------------------------------------

TWO = Config(duration=0.5, num_workers=2)


def results_of(paths: Sequence[Path], cfg: Config) -> list[tuple[Path, bytes | str]]:
    """What iter_features yields, in a form to compare."""
    return [
        (r.path, r.reason if isinstance(r, AudioError) else r.features.tobytes())
        for r in iter_features(paths, cfg)
    ]


@pytest.fixture
def mixed_clips(tmp_path: Path) -> list[Path]:
    """Twenty-three clips, in no sorted order, of which two are unreadable."""
    paths = write_clips(tmp_path / "clips", 23)
    paths[4].write_text("not audio")
    paths[22].unlink()
    return random.Random(0).sample(paths, len(paths))


def test_workers_change_nothing(mixed_clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = results_of(mixed_clips, SHORT)
    assert [path for path, _ in alone] == mixed_clips
    assert sum(isinstance(content, str) for _, content in alone) == 2
    monkeypatch.setattr(prepare, "CHUNK", 2)
    pools = []
    make_pool = prepare._make_pool
    monkeypatch.setattr(prepare, "_make_pool", lambda n: pools.append(n) or make_pool(n))
    assert results_of(mixed_clips, TWO) == alone
    assert pools == [2]


def test_workers_by_spawn(mixed_clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows: a worker starts bare and imports the project."""
    monkeypatch.setattr(prepare, "CHUNK", 5)
    monkeypatch.setattr(prepare, "START_METHOD", "spawn")
    assert results_of(mixed_clips, TWO) == results_of(mixed_clips, SHORT)


@pytest.mark.parametrize(
    ("method", "count", "workers"),
    [("spawn", 32, -1), ("spawn", 64, 1), ("spawn", 64, 0), ("fork", 64, 0), ("fork", 0, -1)],
)
def test_no_process_is_started_for_little(
    method: str, count: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "START_METHOD", method)
    monkeypatch.setattr(prepare, "_make_pool", None)
    monkeypatch.setattr(
        prepare, "extract_file", lambda path, _: ClipFeatures(path, np.zeros((1, 1), "f4"), 0, "")
    )
    paths = [Path(str(k)) for k in range(count)]
    assert [r.path for r in iter_features(paths, Config(num_workers=workers))] == paths


def crash_on(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make the decoder end the process at some files."""
    original = load_audio

    def crashing(path: Path, **options: Any) -> np.ndarray:
        if path.name in names:
            os._exit(139)
        return original(path, **options)

    monkeypatch.setattr(prepare, "load_audio", crashing)
    monkeypatch.setattr(prepare, "CHUNK", 3)


@FORK
@pytest.mark.parametrize("names", [["00.wav"], ["07.wav"], ["22.wav"], ["03.wav", "04.wav", "20.wav"]])
def test_decoder_crash_costs_one_file(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_clips(tmp_path / "clips", 23)
    expected = dict(results_of(paths, SHORT)) | {
        tmp_path / "clips" / n: "crashed the audio decoder" for n in names
    }
    crash_on(monkeypatch, *names)
    assert results_of(paths, TWO) == list(expected.items())


@FORK
def test_decoder_crash_of_the_only_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one file is decoded in a process that may die: it ended the program without a word."""
    (path,) = write_clips(tmp_path / "clips", 1)
    crash_on(monkeypatch, "00.wav")
    assert results_of([path], Config()) == [(path, "crashed the audio decoder")]


@FORK
def test_decoder_crash_while_the_reader_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool was found broken when the next chunk was submitted, outside of the try: BrokenProcessPool."""
    paths = write_clips(tmp_path / "clips", 30)
    crash_on(monkeypatch, "05.wav")
    results = iter_features(paths, TWO)
    first = next(results)
    wait_until(lambda: not multiprocessing.active_children())
    rest = list(results)
    assert [result.path for result in [first, *rest]] == paths
    assert [result.path.name for result in rest if isinstance(result, AudioError)] == ["05.wav"]


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for what happens in another process; fail after half a minute."""
    for _ in range(3000):
        if done():
            return
        time.sleep(0.01)
    pytest.fail("waited in vain")


@FORK
def test_workers_end_with_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe whose other end all of them hold closes when the last of them is gone."""
    monkeypatch.setattr(prepare, "CHUNK", 1)
    monkeypatch.setattr(
        prepare, "load_audio", lambda path, **_: (path.with_suffix(".on").touch(), time.sleep(120))
    )
    paths = write_clips(tmp_path, 4)
    reader, writer = os.pipe()
    parent = multiprocessing.get_context("fork").Process(target=lambda: list(iter_features(paths, TWO)))
    parent.start()
    os.close(writer)
    wait_until(lambda: len(list(tmp_path.glob("*.on"))) == 2)
    parent.kill()
    parent.join()
    assert parent.exitcode == -signal.SIGKILL
    gone, _, _ = select.select([reader], [], [], 30)
    os.close(reader)
    assert gone


@FORK
def test_reader_that_stops_early_leaves_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 1)
    results = iter_features(write_clips(tmp_path, 12), TWO)
    next(results)
    results.close()
    wait_until(lambda: not multiprocessing.active_children())


def test_n_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert [prepare.n_processes(Config(num_workers=n)) for n in (-1, 0, 7)] == [3, 0, 7]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert prepare.n_processes(Config()) == 6


def test_memory_is_kept_where_the_system_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no such switch on macOS and Windows."""
    library = Mock()
    monkeypatch.setattr(prepare, "_c_library", lambda: library)
    prepare.keep_freed_memory()
    assert library.mallopt.call_count == 2
    monkeypatch.setattr(prepare, "_c_library", object)
    prepare.keep_freed_memory()


# ---- cache ----------------------------------------------------------------------------------------------


def test_second_run_extracts_nothing(tmp_path: Path, cached: Config, extracted: list[str]) -> None:
    paths = write_clips(tmp_path / "clips", 5)
    first = load_features(paths, cached)
    assert len(extracted) == 5
    second = load_features(paths, cached)
    assert len(extracted) == 5
    for prepared in (first, second):
        np.testing.assert_array_equal(prepared.features[np.arange(5)], direct(paths))
        np.testing.assert_allclose(prepared.seconds, 0.4, atol=1e-3)
        assert prepared.digests == [extract_file(path, cached).digest for path in paths]
        assert (prepared.indices.tolist(), prepared.failures) == ([0, 1, 2, 3, 4], [])


def test_order_and_choice_of_files_are_free(tmp_path: Path, cached: Config, extracted: list[str]) -> None:
    paths = write_clips(tmp_path / "clips", 5)
    load_features(paths, cached)
    some = [paths[k] for k in (3, 0, 4)]
    np.testing.assert_array_equal(all_features(some, cached), direct(some))
    assert len(extracted) == 5


def overwrite(path: Path) -> None:
    write_noise(path, seed=99)
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {  # (change of 02.wav, what is extracted)
    "nothing": (lambda _: None, []),
    "changed": (overwrite, ["02.wav"]),
    "longer": (lambda path: write_noise(path, seconds=0.45), ["02.wav"]),
    "touched": (lambda path: os.utime(path, ns=(5, 5)), ["02.wav"]),
    "added": (lambda path: write_noise(path.with_name("09.wav"), seed=9), ["09.wav"]),
    "removed": (Path.unlink, []),
    "renamed": (lambda path: path.rename(path.with_name("x.wav")), ["x.wav"]),
}


@pytest.mark.parametrize(("change", "again"), CHANGES.values(), ids=CHANGES)
def test_a_change_costs_one_file(
    change: Callable[[Path], object], again: list[str], tmp_path: Path, cached: Config, extracted: list[str]
) -> None:
    load_features(write_clips(tmp_path / "clips", 5), cached)
    extracted.clear()
    change(tmp_path / "clips" / "02.wav")
    for _ in range(2):
        paths = [Path(path) for path in find_audio(tmp_path / "clips")]
        np.testing.assert_array_equal(all_features(paths, cached), direct(paths))
    assert extracted == again


@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate": 16000},
        {"duration": 0.6},
        {"n_mfcc": 13},
        {"n_fft": 1024},
        {"hop_length": 256},
        {"n_mels": 64},
    ],
    ids=str,
)
def test_audio_settings_have_a_cache_of_their_own(
    change: dict[str, Any], tmp_path: Path, cached: Config, extracted: list[str]
) -> None:
    path = write_noise(tmp_path / "a.wav", seconds=1)
    other = Config(**cached.to_dict() | change)
    assert cache_key(other) != cache_key(cached)
    for cfg in (cached, other, cached, other):
        np.testing.assert_array_equal(all_features([path], cfg), direct([path], cfg))
    assert len(extracted) == 2


def test_other_settings_share_the_cache() -> None:
    other = Config(batch_size=3, epochs=5, num_workers=0, seed=7, dropout=0.1, device="cpu", val_fraction=0.3)
    assert cache_key(other) == cache_key(Config())


def test_new_code_has_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache_key(SHORT)
    monkeypatch.setattr(prepare, "hann_window", lambda n_fft: torch.ones(n_fft) / 2)
    assert cache_key(SHORT) != before


def shard_of(cfg: Config, suffix: str = ".f32") -> Path:
    """The only shard of the cache, or its table."""
    (shard,) = Path(cfg.cache_dir, cache_key(cfg)).glob(f"*{suffix}")
    return shard


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(7, 7))  # at once after the writing the time could be the same


def edit_table(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_row(path: Path, column: int, value: object) -> None:
    table = json.loads(path.read_text())
    table["clips"][2][column] = value
    path.write_text(json.dumps(table))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {  # (which file, what happens to it)
    "truncated shard": (".f32", lambda path: os.truncate(path, 1000)),
    "longer shard": (".f32", lambda path: path.write_bytes(path.read_bytes() + b"1234")),
    "empty shard": (".f32", lambda path: os.truncate(path, 0)),
    "missing shard": (".f32", Path.unlink),
    "flipped bit": (".f32", flip),
    "empty table": (".json", lambda path: path.write_text("")),
    "garbage": (".json", lambda path: path.write_bytes(b"\xff\x00{")),
    "other json": (".json", lambda path: path.write_text("[1, 2]")),
    "null": (".json", lambda path: path.write_text("null")),
    "no clips": (".json", lambda path: path.write_text("{}")),
    "odd rows": (".json", lambda path: edit_table(path, clips=[1, 2, 3, 4, 5])),
    "rows missing": (".json", lambda path: edit_table(path, clips=[])),
    "nested without end": (".json", lambda path: path.write_text("[" * 100_000)),
    "path a list": (".json", lambda path: edit_row(path, 0, [])),
    "path with NUL": (".json", lambda path: edit_row(path, 0, "\0")),
    "seconds a text": (".json", lambda path: edit_row(path, 3, "long")),
    "seconds NaN": (".json", lambda path: edit_row(path, 3, math.nan)),
    "seconds without end": (".json", lambda path: edit_row(path, 3, 10**400)),
    "digest a list": (".json", lambda path: edit_row(path, 4, [])),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_cache_is_mended(
    kind: str,
    tmp_path: Path,
    cached: Config,
    extracted: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = write_clips(tmp_path / "clips", 5)
    load_features(paths, cached)
    suffix, damage = DAMAGES[kind]
    damage(shard_of(cached, suffix))
    np.testing.assert_array_equal(all_features(paths, cached), direct(paths))
    assert len(extracted) == 10
    assert "is damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(all_features(paths, cached), direct(paths))
    assert len(extracted) == 10
    assert "is damaged" not in capsys.readouterr().err
    assert len(list(shard_of(cached).parent.iterdir())) == 3  # shard, table and lock


@pytest.mark.parametrize("year", [1960, 2300])
def test_any_time_of_modification(year: int, tmp_path: Path, cached: Config, extracted: list[str]) -> None:
    """That of a wrong clock, or of a damaged disk, can exceed 64 bits of nanoseconds: OverflowError."""
    (path,) = write_clips(tmp_path / "clips", 1)
    os.utime(path, ((year - 1970) * 31_557_600,) * 2)
    for _ in range(2):
        np.testing.assert_array_equal(all_features([path], cached), direct([path]))
    assert extracted == [path.name]


def test_copied_cache_is_still_good(tmp_path: Path, cached: Config, extracted: list[str]) -> None:
    """A copy may have other times; the checksum tells that it is the same."""
    paths = write_clips(tmp_path / "clips", 5)
    load_features(paths, cached)
    os.utime(shard_of(cached), ns=(7, 7))
    np.testing.assert_array_equal(all_features(paths, cached), direct(paths))
    assert len(extracted) == 5


@pytest.mark.parametrize("leftover", ["abc.f32", "abc.tmp"])
def test_half_written_shard_never_happened(
    leftover: str, tmp_path: Path, cached: Config, extracted: list[str]
) -> None:
    paths = write_clips(tmp_path / "clips", 3)
    load_features(paths[:2], cached)
    (shard_of(cached).parent / leftover).write_bytes(bytes(5000))
    for _ in range(2):
        np.testing.assert_array_equal(all_features(paths, cached), direct(paths))
    assert extracted == ["00.wav", "01.wav", "02.wav"]
    assert not (Path(cached.cache_dir, cache_key(cached)) / leftover).exists()


def test_interrupted_fill_leaves_a_usable_cache(
    tmp_path: Path, cached: Config, extracted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_clips(tmp_path / "clips", 7)
    monkeypatch.setattr(prepare, "SHARD_CLIPS", 2)
    monkeypatch.setattr(prepare, "CHUNK", 1)
    extract_chunk = prepare._extract_chunk

    def interrupt(chunk: Sequence[str | Path], cfg: Config) -> list[ClipFeatures | AudioError]:
        if Path(chunk[0]).name == "05.wav":
            raise KeyboardInterrupt
        return extract_chunk(chunk, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_extract_chunk", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_features(paths, cached)
    extracted.clear()
    np.testing.assert_array_equal(all_features(paths, cached), direct(paths))
    assert extracted == ["04.wav", "05.wav", "06.wav"]
    assert len(list(Path(cached.cache_dir, cache_key(cached)).glob("*.f32"))) == 4


def test_shard_of_deleted_files_is_removed(tmp_path: Path, cached: Config) -> None:
    old, new = write_noise(tmp_path / "clips" / "a.wav"), tmp_path / "clips" / "b.wav"
    load_features([old], cached)
    old.rename(new)
    np.testing.assert_array_equal(all_features([new], cached), direct([new]))
    shard_of(cached)


def test_shard_of_an_unmounted_disk_is_kept(tmp_path: Path, cached: Config, extracted: list[str]) -> None:
    away, here = write_noise(tmp_path / "disk" / "a.wav"), write_noise(tmp_path / "b.wav")
    load_features([away], cached)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    load_features([here], cached)
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    np.testing.assert_array_equal(all_features([away, here], cached), direct([away, here]))
    assert extracted == ["a.wav", "b.wav"]


def test_shard_of_a_forbidden_folder_is_kept(
    tmp_path: Path, cached: Config, extracted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path.exists raises PermissionError: a cache shared with another user's data ended the run."""
    away, here = write_noise(tmp_path / "secret" / "x" / "a.wav"), write_noise(tmp_path / "b.wav")
    load_features([away], cached)
    path_stat = Path.stat

    def forbidding(path: Path, **options: Any) -> os.stat_result:
        if "secret" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return path_stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", forbidding)
        load_features([here], cached)
    np.testing.assert_array_equal(all_features([away, here], cached), direct([away, here]))
    assert extracted == ["a.wav", "b.wav"]


@FORK
def test_two_processes_fill_one_cache(tmp_path: Path, cached: Config) -> None:
    paths = write_clips(tmp_path / "clips", 12)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)

    def fill(number: int) -> None:
        torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
        barrier.wait(30)
        np.save(tmp_path / f"{number}.npy", all_features(paths, cached))

    processes = [context.Process(target=fill, args=(number,), daemon=True) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    for number in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), direct(paths))
    shard_of(cached)  # the second waited, and found the work done


def test_warm_cache_is_only_read(tmp_path: Path, cached: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_clips(tmp_path / "clips", 3)
    load_features(paths, cached)
    folder = shard_of(cached).parent
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setattr(prepare, "_fill_cache", None)  # root may write in spite of chmod
    try:
        np.testing.assert_array_equal(all_features(paths, cached), direct(paths))
    finally:
        folder.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


def test_unreadable_files_are_reported_on_every_run(
    tmp_path: Path, cached: Config, extracted: list[str]
) -> None:
    paths = write_clips(tmp_path / "clips", 4)
    paths[1].write_text("not audio")
    paths[2].unlink()
    for _ in range(2):
        prepared = load_features(paths, cached)
        assert [error.path for error in prepared.failures] == paths[1:3]
        assert prepared.indices.tolist() == [0, 3]
        np.testing.assert_array_equal(prepared.features[np.arange(2)], direct([paths[0], paths[3]]))
    assert extracted == ["00.wav", "01.wav", "03.wav", "01.wav"]


def test_odd_clips_are_named_on_every_run(
    small_corpus: Config, extracted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache remembers what was odd about them."""
    silent = Path(small_corpus.data_dir, "Angry", "silent.wav")
    soundfile.write(silent, np.zeros(RATE), RATE)
    for _ in range(2):
        load_corpus(small_corpus)
        assert f"used {silent}: silent\n" in capsys.readouterr().err
    assert len(extracted) == 13


def test_nothing_readable(tmp_path: Path, cached: Config) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    with pytest.raises(UserError, match="none of 3 audio files") as raised:
        load_features([tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "missing.wav"], cached)
    assert raised.value.code == 2


def test_feature_array_across_shards(tmp_path: Path, cached: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SHARD_CLIPS", 3)
    paths = write_clips(tmp_path / "clips", 8)
    features, expected = load_features(paths, cached).features, direct(paths)
    assert (len(features), features.shape) == (8, expected.shape)
    for chosen in ([0], [7, 0, 3, 3, 5], [], list(range(8))):
        indices = np.array(chosen, np.int64)
        np.testing.assert_array_equal(features[indices], expected[indices])
    copy = features[np.arange(8)]
    copy[:] = 0
    np.testing.assert_array_equal(features[np.arange(8)], expected)
    assert len(list(Path(cached.cache_dir, cache_key(cached)).glob("*.json"))) == 3


# ---- the corpus, and its split --------------------------------------------------------------------------


@pytest.fixture
def small_corpus(tmp_path: Path) -> Config:
    """Two classes of six clips, spelled as in the well-known data set, and their settings."""
    for number, name in enumerate(("Suprised", "Angry")):
        for k in range(6):
            write_noise(tmp_path / "data" / name / f"{k}.wav", seed=10 * number + k)
    return Config(
        data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), duration=0.5, num_workers=0
    )


def test_load_corpus(small_corpus: Config, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = load_corpus(small_corpus)
    assert corpus.labels == ("Angry", "Suprised")
    assert corpus.targets.tolist() == [0] * 6 + [1] * 6
    assert [Path(clip.path).parent.name for clip in corpus.clips] == ["Angry"] * 6 + ["Suprised"] * 6
    expected = direct([Path(clip.path) for clip in corpus.clips])
    np.testing.assert_array_equal(corpus.prepared.features[np.arange(12)], expected)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("content", [None, "text"])
def test_class_without_usable_clip_is_left_out(
    content: str | None, small_corpus: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(small_corpus.data_dir) / "Happy").mkdir()
    if content:
        (Path(small_corpus.data_dir) / "Happy" / "a.wav").write_text(content)
    corpus = load_corpus(small_corpus)
    assert corpus.labels == ("Angry", "Suprised")
    assert corpus.targets.tolist() == [0] * 6 + [1] * 6
    assert "Happy has no usable clip: left out" in capsys.readouterr().err


def test_stray_clip_is_noted(small_corpus: Config, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(Path(small_corpus.data_dir) / "stray.wav")
    assert len(load_corpus(small_corpus).clips) == 12
    assert "stray.wav is in no class folder" in capsys.readouterr().err


@pytest.mark.parametrize(("bad", "code"), [(1, None), (2, 1), (11, 1), (12, 2)])
def test_unreadable_clips(
    bad: int, code: int | None, small_corpus: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of twelve is skipped, more than one in ten is a failure, and nothing usable cannot start."""
    paths = [Path(path) for path in find_audio(Path(small_corpus.data_dir))[:bad]]
    for path in paths:
        path.write_text("not audio")
    if code is None:
        assert len(load_corpus(small_corpus).clips) == 12 - bad
    else:
        with pytest.raises(UserError, match=rf"({bad} of 12|of {bad}) audio") as raised:
            load_corpus(small_corpus)
        assert raised.value.code == code
    err = capsys.readouterr().err
    if code != 2:
        assert all(f"skipped {path}: " in err for path in paths)
        assert f"skipped {bad} unreadable file(s)\n" in err


def test_no_clips_at_all(tmp_path: Path) -> None:
    (tmp_path / "Angry").mkdir()
    with pytest.raises(UserError, match="no audio files below"):
        load_corpus(Config(data_dir=str(tmp_path)))


def test_warnings_are_named_up_to_twenty(capsys: pytest.CaptureFixture[str]) -> None:
    prepare.report_warnings([])
    assert capsys.readouterr().err == ""
    prepare.report_warnings([(Path(f"{number}\x1b.wav"), "silent") for number in range(20)])
    assert capsys.readouterr().err.splitlines() == [rf"used {number}\x1b.wav: silent" for number in range(20)]
    prepare.report_warnings([(Path("a.wav"), "silent")] * 21)
    assert capsys.readouterr().err.splitlines()[19:] == [
        "used a.wav: silent",
        "used 21 odd files, 1 of them not shown",
    ]


def test_every_failure_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    prepare.report_failures([AudioError(Path(f"{k}\n.wav"), "empty") for k in range(25)])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == [rf"skipped {k}\n.wav: empty" for k in range(25)]
    assert lines[-1] == "skipped 25 unreadable file(s)"


@pytest.mark.parametrize("label", ["Angry", "Suprised"])
def test_same_audio_is_reported(label: str, small_corpus: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in another format, and under another label."""
    folder = Path(small_corpus.data_dir)
    wave, rate = soundfile.read(folder / "Angry" / "3.wav", dtype="int16")
    soundfile.write(folder / label / "copy.flac", wave, rate)
    digests = load_corpus(small_corpus).prepared.digests
    assert len(digests) == 1 + len(set(digests)) == 13
    err = capsys.readouterr().err
    assert str(folder / "Angry" / "3.wav") in err
    assert str(folder / label / "copy.flac") in err
    assert ("under different labels" in err) == (label == "Suprised")
    assert "1 group(s) of clips with the same audio" in err


def corpus_of(
    targets: Sequence[int], groups: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> prepare.Corpus:
    """A corpus without audio; each clip in a group of its own, and of no known speaker, unless said."""
    count = len(targets)
    clips = [Clip(name, label) for name, label in zip(names or ["x.wav"] * count, targets, strict=True)]
    digests = list(groups or [f"g{k}" for k in range(count)])
    prepared = Prepared(np.arange(count), np.zeros(0), np.zeros(0), digests, [], [])  # type: ignore[arg-type]
    labels = tuple("ABCDEFGHIJ"[: max(targets, default=0) + 1])
    return prepare.Corpus(
        labels, clips, np.array(targets), [source_of(clip.path) for clip in clips], prepared
    )


def split(
    targets: Sequence[int], groups: Sequence[str] | None = None, *, fold: int = 0, **options: Any
) -> prepare.Split:
    """split_corpus of such a corpus."""
    return split_corpus(corpus_of(targets, groups), Config(**options), fold)


@pytest.mark.parametrize("val_fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("holdout_fraction", [0, 0.1, 0.3])
def test_split_is_stratified_and_complete(val_fraction: float, holdout_fraction: float) -> None:
    targets = np.repeat(np.arange(4), (200, 41, 17, 100))
    parts = split(targets.tolist(), val_fraction=val_fraction, holdout_fraction=holdout_fraction)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(targets)))
    for part in parts:
        assert (np.diff(part) > 0).all()
    for fraction, part in ((val_fraction, parts.val), (holdout_fraction, parts.holdout)):
        counts = np.bincount(targets[part], minlength=4)
        np.testing.assert_allclose(counts, fraction * np.bincount(targets), atol=1)
    assert (parts.holdout.size == 0) == (holdout_fraction == 0)


def test_split_depends_on_the_seed_alone() -> None:
    targets = [0] * 50 + [1] * 50
    once, again, other = split(targets), split(targets), split(targets, seed=1)
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert once.val.tolist() != other.val.tolist()
    assert once.val.tolist() != list(range(len(once.val)))  # shuffled, not cut off


def test_split_does_not_depend_on_the_global_generator() -> None:
    state = np.random.get_state()[1].copy()
    split([0] * 50 + [1] * 50)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("seed", range(20))
def test_groups_never_straddle(seed: int) -> None:
    """Groups of all sizes, some under two labels."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 4, 300)
    groups = [f"g{k}" for k in rng.integers(0, rng.integers(60, 300), 300)]
    parts = split(targets.tolist(), groups, val_fraction=0.2, seed=seed)
    owners = [{groups[k] for k in part} for part in parts]
    for mine, theirs in itertools.combinations(owners, 2):
        assert not mine & theirs
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(300))
    assert min(map(len, parts)) > 0


def test_too_small_validation() -> None:
    with pytest.raises(UserError, match=r"val_fraction = 0\.1: leaves 0 of 8 clips") as raised:
        split([0] * 4 + [1] * 4)
    assert raised.value.code == 2
    assert len(split([0] * 10 + [1] * 10).val) == 2  # as many as classes will do


def test_rare_class_goes_to_training() -> None:
    parts = split([0] * 40 + [1] * 40 + [2])
    assert 80 in parts.train


def test_group_larger_than_a_part_goes_to_training() -> None:
    for seed in range(5):
        parts = split([0] * 60, ["big"] * 30 + [f"g{k}" for k in range(30)], seed=seed)
        assert set(range(30)) <= set(parts.train.tolist())
        assert (len(parts.val), len(parts.holdout)) == (6, 6)


@pytest.mark.parametrize("seed", range(5))
def test_first_class_of_a_group_decides(seed: int) -> None:
    """Thirty clips that sound the same would be dealt again with the only one of them under another label."""
    parts = split([0] * 60 + [1] * 20, ["big"] * 30 + [f"g{k}" for k in range(49)] + ["big"], seed=seed)
    assert {*range(30), 79} <= set(parts.train.tolist())


@pytest.mark.parametrize(
    ("count", "options", "sizes"),
    [
        (4, {"val_fraction": 0.25, "holdout_fraction": 0.25}, (2, 1, 1)),
        (3, {"val_fraction": 0.34, "holdout_fraction": 0.34}, "leave 1 of 3 clips for training"),
        (6, {"val_fraction": 0.34, "folds": 2}, (2, 1, 3)),
        (4, {"val_fraction": 0.5, "folds": 2}, "folds = 2: too many for these 4 clips"),
        (1, {"folds": 2}, "folds = 2: too many for these 1 clips"),
    ],
)
def test_two_clips_are_enough_for_training(
    count: int, options: dict[str, Any], sizes: tuple[int, ...] | str
) -> None:
    """But one is not: batch norm cannot learn from it."""
    if isinstance(sizes, tuple):
        assert tuple(map(len, split([0] * count, **options))) == sizes
    else:
        with pytest.raises(UserError, match=sizes):
            split([0] * count, **options)


def test_feature_stats_equal_numpy(rng: np.random.Generator) -> None:
    """Over more clips than are read at once; those not asked for would spoil the result."""
    features = rng.normal(size=(700, 4, 9)) * [[1], [0.1], [3], [10]] + [[0], [5], [-900], [100]]
    chosen = np.flatnonzero(rng.random(700) < 0.9)
    expected = features[chosen]
    features[np.setdiff1d(np.arange(700), chosen)] = np.nan
    mean, scale = feature_stats(features, chosen)  # type: ignore[arg-type]
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected.mean(axis=(0, 2)), rtol=1e-6, atol=1e-7)
    assert scale == pytest.approx(np.sqrt(expected.var(axis=(0, 2)).mean()), rel=1e-6)


def test_scale_beside_a_large_mean(rng: np.random.Generator) -> None:
    """Small it is, but no rounding error."""
    features = (1000 + 3 * rng.normal(size=(300, 1, 130))).astype(np.float32)
    _, scale = feature_stats(features, np.arange(300))  # type: ignore[arg-type]
    assert scale == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("n_clips", [1, 7, 300])
@pytest.mark.parametrize("value", [0, 0.1, -723.9, -1131.371, 1e4])
def test_scale_of_what_never_varies_is_one(value: float, n_clips: int) -> None:
    """The difference of two large sums left a scale of 1e-5 to divide by, as in c0 of silent clips."""
    features = np.full((n_clips, 1, 130), value, np.float32)
    mean, scale = feature_stats(features, np.arange(n_clips))  # type: ignore[arg-type]
    assert scale == 1
    np.testing.assert_allclose(mean, value, rtol=1e-6)


# ---- demo corpus ----------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_demo_is_the_same_every_time(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo(tmp_path / name, n_speakers=1, n_takes=1, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a if name.endswith(".wav"))
    assert len({a[name] for name in a if name.endswith(".wav")}) == 14


def test_demo_layout(demo_corpus: Path) -> None:
    labels = find_labels(demo_corpus)
    assert labels == ("Angry", "Disgusted", "Fearful", "Happy", "Neutral", "Sad", "Surprised")
    names = [f"spk{speaker:02d}_take{take:02d}.wav" for speaker in range(6) for take in range(1, 5)]
    for label in labels:
        assert [Path(path).name for path in find_audio(demo_corpus / label)] == names
    header, *rows = (demo_corpus / "sample_submission.csv").read_text().splitlines()
    assert header == "filename,emotion"
    assert {row.partition(",")[0] for row in rows} == {
        Path(path).name for path in find_audio(demo_corpus / "Test")
    }
    assert len(rows) == 42
    truth = dict(line.split() for line in (demo_corpus / "SYNTHETIC.txt").read_text().splitlines()[1:])
    assert {label: list(truth.values()).count(label) for label in labels} == dict.fromkeys(labels, 6)


def test_demo_clips(demo_corpus: Path) -> None:
    for path in map(Path, find_audio(demo_corpus)):
        wave, rate = soundfile.read(path)
        assert (rate, wave.ndim) == (22050, 1)
        assert 1.2 - 1e-3 <= wave.size / rate <= 3.5 + 1e-3
        assert 0.02 < np.abs(wave).max() <= 1
        assert wave.std() > 1e-3


def test_demo_leaves_an_existing_folder_alone(tmp_path: Path) -> None:
    touch(tmp_path, "demo/mine.txt")
    make_demo(tmp_path / "demo", n_speakers=1, n_takes=1)
    assert list(contents(tmp_path)) == ["demo/mine.txt"]


def test_interrupted_demo_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def interrupted(*_: object) -> np.ndarray:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return np.zeros(100)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "synthesize_clip", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_demo(tmp_path / "data" / "demo")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".demo.lock"]
    make_demo(tmp_path / "data" / "demo", n_speakers=1, n_takes=1)
    assert len(find_audio(tmp_path / "data")) == 14


# ---- the script -----------------------------------------------------------------------------------------


def flags(cfg: Config) -> list[str]:
    """The settings of small_corpus as a command line."""
    return [f"--{name}={getattr(cfg, name)}" for name in ("data_dir", "cache_dir", "duration", "num_workers")]


def test_main_prints_the_table(small_corpus: Config, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(small_corpus.data_dir)
    shutil.rmtree(folder / "Angry")
    for k in range(4):
        write_noise(folder / "Angry" / f"{k}.wav", seed=50 + k, seconds=2)  # 0.5 s of each is used
    assert prepare.main(flags(small_corpus)) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["class", "clips", "seconds"],
        ["Angry", "4", "2"],
        ["Suprised", "6", "2"],  # 2.4
        ["total", "10", "4"],
    ]
    assert err == ""


def test_main_notes_features_of_other_settings(
    small_corpus: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are never removed without being asked to, and would fill the disk unseen."""
    load_corpus(small_corpus)
    assert prepare.main(flags(replace(small_corpus, duration=0.6))) == 0
    folder = Path(small_corpus.cache_dir, cache_key(small_corpus))
    assert capsys.readouterr().err == (
        f"note: {folder} holds 0 MB of features for other settings: delete it at will\n"
    )
    assert len(list(folder.glob("*.f32"))) == 1


def test_main_shows_names_safely(small_corpus: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Of class folders, which may be hostile."""
    data = Path(small_corpus.data_dir)
    next(path for path in sorted(data.iterdir()) if path.is_dir()).rename(data / "A\x1b[2J")
    assert prepare.main(flags(small_corpus)) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert r"A\x1b[2J" in out


def test_main_with_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "make_demo", functools.partial(make_demo, n_speakers=1, n_takes=2))
    assert prepare.main(["--demo", "--num_workers", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split()[:2] == ["total", "14"]
    assert "synthetic demo corpus, not real speech" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]


@pytest.mark.parametrize(("broken", "code"), [("data", 2), ("clips", 1), ("cache", 1)])
def test_main_fails_with_one_line(
    broken: str, code: int, small_corpus: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(small_corpus.data_dir)
    if broken == "data":
        shutil.rmtree(folder)
    elif broken == "clips":
        touch(folder, *(f"Angry/empty{k}.wav" for k in range(5)))
    else:
        Path(small_corpus.cache_dir).write_text("a file")
    assert prepare.main(flags(small_corpus)) == code
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert {"data": str(folder), "clips": "5 of 17", "cache": small_corpus.cache_dir}[broken] in errors[0]
    assert "Traceback" not in err


def test_split_does_not_depend_on_the_names_of_groups(rng: np.random.Generator) -> None:
    """Digests of features differ between processors and library versions, and must not move the split."""
    targets = rng.integers(3, size=200)
    shared = rng.integers(150, size=200)  # which clips sound the same
    names = rng.permutation(1000)
    one = split(targets.tolist(), [str(group) for group in shared])
    other = split(targets.tolist(), [str(names[group]) for group in shared])
    for part, same in zip(one, other, strict=True):
        np.testing.assert_array_equal(part, same)


# ---- folds and speakers ---------------------------------------------------------------------------------

NAMES = [
    *(f"{1001 + k}_DFA_{emotion}_XX.wav" for k in range(30) for emotion in ("ANG", "SAD", "HAP")),
    *(f"03-0{channel}-05-01-01-01-{k:02d}.wav" for k in range(1, 13) for channel in (1, 2)),
    *(f"{who}_{code}01.wav" for who in ("DC", "JE", "JK", "KL") for code in ("a", "sa", "h")),
    *(f"{who}_back_{emotion}.wav" for who in ("OAF", "YAF") for emotion in ("angry", "sad", "happy")),
]


def by_speaker(digests: Sequence[str] | None = None, fold: int = 0, **options: Any) -> list[set[str]]:
    """The speakers of each part of NAMES."""
    corpus = corpus_of([k % 3 for k in range(len(NAMES))], digests, NAMES)
    parts = split_corpus(corpus, Config(split="speaker", **options), fold)
    assert sorted(np.concatenate(parts)) == list(range(len(NAMES)))
    return [{corpus.sources[index].speaker for index in part} for part in parts]


@pytest.mark.parametrize("seed", range(10))
def test_no_speaker_on_two_sides(seed: int) -> None:
    """Speech and song of one actor included; each corpus with enough speakers is on all sides."""
    train, val, holdout = by_speaker(seed=seed)
    assert not (train & val or train & holdout or val & holdout)
    for part, sizes in (
        (val, {"CREMA-D": 3, "RAVDESS": 1, "SAVEE": 1}),
        (holdout, {"CREMA-D": 3, "RAVDESS": 1, "SAVEE": 1}),
    ):
        assert Counter(name.split()[0] for name in part) == sizes
    assert {"TESS OA", "TESS YA"} <= train  # two speakers cannot be on three sides


def test_speakers_are_drawn_by_seed() -> None:
    assert by_speaker() == by_speaker()
    assert by_speaker() != by_speaker(seed=1)


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_every_speaker_is_held_out_once(n_folds: int) -> None:
    """Also those of corpora with few of them."""
    folds = [by_speaker(fold=fold, folds=n_folds) for fold in range(n_folds)]
    held = [name for _, _, holdout in folds for name in holdout]
    assert len(held) == len(set(held)) == 30 + 12 + 4 + 2
    for train, val, holdout in folds:
        assert not (train & val or train & holdout or val & holdout)
        assert val


def test_speakers_who_share_audio_count_as_one() -> None:
    """Else the same audio would be on both sides; also along a chain of three."""
    digests = [f"g{k}" for k in range(len(NAMES))]
    digests[0] = digests[3] = "same"  # 1001 and 1002
    digests[4] = digests[6] = "more"  # 1002 and 1003
    for seed in range(8):
        parts = by_speaker(digests, seed=seed, holdout_fraction=0.4)
        one = {f"CREMA-D {number}" for number in (1001, 1002, 1003)}
        assert sum(bool(one & part) for part in parts) == 1


def test_validation_is_a_share_of_all_speakers_or_of_what_a_fold_leaves() -> None:
    """Of the thirty of one corpus."""
    for options, count in (({"holdout_fraction": 0.4}, 6), ({"folds": 2}, 3)):
        _, val, _ = by_speaker(val_fraction=0.2, **options)
        assert sum(name.startswith("CREMA-D") for name in val) == count


@pytest.mark.parametrize("n_song", [0, 1, 2])
def test_three_speakers_are_on_three_sides(n_song: int) -> None:
    """Also where some of the actors of RAVDESS only speak and the others only sing."""
    names = [f"03-0{1 + (k < n_song)}-05-01-01-01-{k:02d}.wav" for k in range(3)]
    corpus = corpus_of([0] * 6, names=sorted(2 * names))
    parts = split_corpus(corpus, Config(split="speaker"))
    assert [len({corpus.sources[index].speaker for index in part}) for part in parts] == [1, 1, 1]


def test_unknown_speakers_cannot_be_split() -> None:
    corpus = corpus_of([0, 1] * 20, names=[*NAMES[:39], "recording.wav"])
    with pytest.raises(UserError, match=r"speakers of 1 of 40 clips are not known.*--manifest"):
        split_corpus(corpus, Config(split="speaker"))


@pytest.mark.parametrize("fold", [0, 48])
def test_more_folds_than_speakers(fold: int) -> None:
    """There are 48: a fold without a clip to score was a KeyError after its training."""
    if fold < 48:
        assert len(by_speaker(fold=fold, folds=49)[2]) == 1
    else:
        with pytest.raises(UserError, match="folds = 49: too many"):
            by_speaker(fold=fold, folds=49)


@pytest.mark.parametrize("n_folds", [2, 5])
def test_every_clip_is_held_out_once(n_folds: int) -> None:
    """In each class evenly, audio kept together, and validation clips taken from the rest."""
    targets = np.repeat(np.arange(3), (100, 50, 31))
    groups = [f"g{k // 2}" for k in range(len(targets))]
    splits = [split(targets.tolist(), groups, fold=fold, folds=n_folds) for fold in range(n_folds)]
    np.testing.assert_array_equal(
        np.sort(np.concatenate([parts.holdout for parts in splits])), np.arange(181)
    )
    for parts in splits:
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(181))
        counts = np.bincount(targets[parts.holdout])
        np.testing.assert_allclose(counts, np.array([100, 50, 31]) / n_folds, atol=6)
        np.testing.assert_allclose(len(parts.val), 0.1 * (181 - len(parts.holdout)), atol=4)
        owners = [{groups[k] for k in part} for part in parts]
        assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])


def test_manifest_names_speakers(small_corpus: Config, tmp_path: Path) -> None:
    """Those it does not name keep what their file names tell."""
    manifest = tmp_path / "speakers.csv"
    manifest.write_text("speaker,filename,age\nanna,Angry/0.wav,30\n")
    corpus = load_corpus(replace(small_corpus, manifest=str(manifest)))
    speakers = {clip.path: source.speaker for clip, source in zip(corpus.clips, corpus.sources, strict=True)}
    assert speakers.pop(str(Path(small_corpus.data_dir, "Angry", "0.wav"))) == "anna"
    assert set(speakers.values()) == {""}


@pytest.mark.skipif(os.name == "nt", reason="names are text on Windows")
@pytest.mark.parametrize("name", ["two\r\nlines.wav", 'a,"b".wav', "é.wav", os.fsdecode(b"caf\xe9.wav")])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_manifest_names_any_file(mark: bytes, name: str, small_corpus: Config, tmp_path: Path) -> None:
    """Written by a spreadsheet or not."""
    Path(small_corpus.data_dir, "Angry", "0.wav").rename(Path(small_corpus.data_dir, "Angry", name))
    quoted = name.replace('"', '""')
    row = f'filename,speaker\n"Angry/{quoted}",anna\n'
    (tmp_path / "speakers.csv").write_bytes(mark + os.fsencode(row))
    speakers = prepare.read_manifest(tmp_path / "speakers.csv", Path(small_corpus.data_dir))
    assert speakers == {str(Path(small_corpus.data_dir, "Angry", name)): "anna"}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("filename,speaker\n../secret.wav,a\n", "line 2: .*leads out of"),
        ("filename,speaker\nAngry/../../secret.wav,a\n", "line 2: .*leads out of"),
        ("filename,speaker\n/etc/passwd,a\n", "line 2: .*leads out of"),
        ("filename,speaker\nAngry/0.wav,a\nAngry/gone.wav,a\n", "line 3: no file"),
        ("filename,speaker\nAngry/0.wav,\n", "line 2: needs a filename and a speaker"),
        ("path,speaker\nAngry/0.wav,a\n", "line 2: needs a filename and a speaker"),
        ("", "needs a header"),
        ("Angry/0.wav,a\n", "needs a header"),  # taken for one, and the speakers were those of the names
        ("filename,speaker\nAngry/0.wav,a\nAngry/0.wav,b\n", "line 3: Angry/0.wav has two speakers"),
        (f"filename,speaker\n{'a' * 300},a\n", "line 2: no file"),
        (None, "No such file"),
    ],
)
def test_bad_manifest(content: str | None, match: str, small_corpus: Config, tmp_path: Path) -> None:
    manifest = tmp_path / "speakers.csv"
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(UserError, match=match):
        load_corpus(replace(small_corpus, manifest=str(manifest)))


def test_demo_on_a_full_disk(tmp_path: Path) -> None:
    """The library said "System error.", with a traceback."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            make_demo(tmp_path / "demo", n_speakers=1, n_takes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "demo").exists()


def test_no_other_folder_is_called_a_cache(small_corpus: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """With cache_dir = data_dir it told to delete the clips."""
    cfg = replace(small_corpus, cache_dir=small_corpus.data_dir)
    Path(cfg.cache_dir, "0123456789abcdef").mkdir()
    assert (
        prepare.main([f"--data_dir={cfg.data_dir}", f"--cache_dir={cfg.cache_dir}", "--num_workers=0"]) == 0
    )
    (note,) = [line for line in capfd.readouterr().err.splitlines() if "delete it" in line]
    assert "0123456789abcdef" in note


def test_two_runs_may_make_the_demo_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, and takes what the first has made."""
    folder, drafts = tmp_path / "demo", list[Path]()

    def write(draft: Path, *_: object) -> None:
        drafts.append(draft)
        draft.mkdir()
        time.sleep(0.2)

    monkeypatch.setattr(prepare, "write_demo", write)
    runs = [threading.Thread(target=prepare.make_demo, args=(folder,)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(drafts) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"demo", ".demo.lock"}


def test_demo_of_a_killed_run_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, ".demo-x1/demo/Angry/a.wav", "other/b.wav")
    monkeypatch.setattr(prepare, "write_demo", lambda draft, *_: draft.mkdir())
    prepare.make_demo(tmp_path / "demo")
    assert {path.name for path in tmp_path.iterdir()} == {"demo", ".demo.lock", "other"}


@pytest.mark.parametrize("name", ["Sad\r", "Sad\udcff"])
def test_class_that_no_submission_can_hold_is_refused(name: str, tmp_path: Path) -> None:
    """Before any work: it was a traceback at the very end."""
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="rename it"):
        find_labels(tmp_path)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_fault_while_filling_leaves_nothing_half_written(
    fault: BaseException, tmp_path: Path, cached: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a full disk says where; what was there before stays."""
    first, second = write_clips(tmp_path / "clips", 2)
    load_features([first], cached)
    folder = shard_of(cached).parent
    before = sorted(folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(zlib, "crc32", Mock(side_effect=fault))
        with pytest.raises(type(fault)) as raised:
            load_features([first, second], cached)
    assert sorted(folder.iterdir()) == before
    if isinstance(raised.value, OSError):
        assert str(folder) in str(raised.value.filename)
    np.testing.assert_array_equal(all_features([first, second], cached), direct([first, second]))


def test_test_folder_is_no_class_however_it_is_spelled(tmp_path: Path) -> None:
    for name in ("Angry", "test"):
        (tmp_path / name).mkdir()
    assert find_labels(tmp_path) == ("Angry",)
