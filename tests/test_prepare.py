"""Finding clips, reading audio, features against librosa, the cache, and the corpus."""

import itertools
import multiprocessing
import os
import random
import resource
import signal
import socket
import sqlite3
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import prepare
from config import Config, UserError, run
from prepare import MFCC, AudioError, FeatureCache, Recording, extract, find_clips, load_features, map_files
from tests.conftest import CODES, RATE, SPEAKERS, clip_name, flags, make_corpus, run_script, tiny_config, tone

Capture = pytest.CaptureFixture[str]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks a process")
TINY = tiny_config(Path())
WHOLE = Config(sample_rate=RATE)  # windows of 3 s of our clips as they are


def make_mfcc(cfg: Config) -> MFCC:
    return MFCC(prepare.mfcc_constants(cfg), cfg.hop_length)


@pytest.fixture(scope="module")
def mfcc() -> MFCC:
    return make_mfcc(TINY)


def write(path: Path, *, seconds: float = 0.5, rate: int = RATE, seed: int = 0, **options: Any) -> Path:
    """A clip of noise unlike that of any other seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(seed).normal(size=round(seconds * rate))
    soundfile.write(path, wave, rate, **options)
    return path


def write_wave(path: Path, wave: Any, rate: int = RATE) -> None:
    soundfile.write(path, np.asarray(wave, np.float32), rate, subtype="FLOAT", format="WAV")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def put(path: Path, offset: int, content: bytes) -> None:
    """Overwrite a few bytes."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for what happens in another process; fail after half a minute."""
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---- finding clips ---------------------------------------------------------------------------------------


def test_audio_is_found_at_any_depth_and_junk_is_not(tmp_path: Path) -> None:
    audio = ["B.WAV", "a/b/deep.Flac", "a.ogg", "a10.mp3", "a9.opus", "c.aif", "c.aiff", "d.au", "e.caf"]
    audio += ["dir.wav/inside.wav", *(f"foreign{suffix}" for suffix in prepare.FOREIGN_SUFFIXES)]
    junk = ["notes.txt", "._a.wav", ".hidden/a.wav", ".DS_Store", "__MACOSX/a.wav", "wav", "a.wav.bak"]
    touch(tmp_path, *audio, *junk)
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)  # a loop
    assert prepare.find_audio(tmp_path) == sorted(tmp_path / name for name in audio)
    with pytest.raises(FileNotFoundError):  # and not an empty list
        prepare.find_audio(tmp_path / "missing")


@pytest.mark.parametrize("corpus", SPEAKERS)
def test_file_name_tells_corpus_speaker_and_emotion(corpus: str) -> None:
    for number, (emotion, code) in itertools.product(range(len(SPEAKERS[corpus])), CODES[corpus].items()):
        [row] = prepare.parse_names([clip_name(corpus, emotion, number, 0)]).itertuples(index=False)
        speaker = f"{corpus.split(maxsplit=1)[0]} {SPEAKERS[corpus][number]}"
        assert (row.corpus, row.speaker, row.code) == (corpus, speaker, code)


@pytest.mark.parametrize(
    ("stem", "corpus", "speaker", "code"),
    [
        ("1040_ITH_SAD_X", "CREMA-D", "CREMA-D 1040", "SAD"),  # so named in the corpus
        ("03-02-06-01-02-01-12", "RAVDESS song", "RAVDESS 12", "06"),
        ("KL_sa15", "SAVEE", "SAVEE KL", "sa"),
        ("JK_su03", "SAVEE", "SAVEE JK", "su"),
        ("16b10Td", "EmoDB", "EmoDB 16", "T"),
        ("OA_bite_neutral", "TESS", "TESS OA", "neutral"),  # so named in the corpus
        ("YAF_youth_ps", "TESS", "TESS YA", "ps"),
        ("03-03-06-01-02-01-12", "other", "", ""),  # no such channel
        ("02-01-06-01-02-01-12", "other", "", ""),  # video
        ("1001_DFA_ANG_XX (copy)", "other", "", ""),
        ("DC_x01", "other", "", ""),
        ("16b10Xd", "other", "", ""),
        ("recording 7", "other", "", ""),
    ],
)
def test_trap_in_a_file_name(stem: str, corpus: str, speaker: str, code: str) -> None:
    table = prepare.parse_names([f"any.where/1001_DFA_ANG_XX/{stem}.wav"])
    assert table.to_dict("records") == [{"corpus": corpus, "speaker": speaker, "code": code}]


def config_of(root: Path, **changes: Any) -> Config:
    return tiny_config(root.parent, data_dir=str(root), **changes)


def test_table_of_clips_is_sorted_by_file_name(tmp_path: Path) -> None:
    names = ["Angry/deep/1001_AAA_ANG_XX.wav", "Sad/1002_A_x.wav", "Angry/z.wav", "Sad/z.wav"]
    touch(tmp_path / "d", *reversed(names))
    table = find_clips(config_of(tmp_path / "d"))
    assert list(table.columns) == ["path", "emotion", "corpus", "speaker"]
    assert list(table.path) == [str(tmp_path / "d" / name) for name in names]
    assert list(table.emotion) == ["Angry", "Sad", "Angry", "Sad"]
    assert list(table.speaker) == ["CREMA-D 1001", "", "", ""]


def test_folders_that_are_no_classes_are_left_out(tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "d"
    touch(root, "Angry/a.wav", "Sad/b.wav", "TEST/c.wav", ".git/d.wav", "__MACOSX/e.wav", "held/f.wav")
    touch(root, "stray.wav", "Empty/readme.txt")
    for name, target in {"Self": root, "Up": tmp_path, "Held": root / "held"}.items():
        (root / name).symlink_to(target, target_is_directory=True)
    assert set(find_clips(config_of(root, test_dir=str(root / "held"))).emotion) == {"Angry", "Sad"}
    err = capsys.readouterr().err
    assert f"1 clip(s) in no class folder are left out: {root / 'stray.wav'}" in err
    assert f"class folder {root / 'Empty'} has no clips: left out" in err
    assert err.count("\n") == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "no data folder"),
        ([], "no clips in .*: expected one folder per emotion"),
        (["a.wav", "Test/b.wav"], "no clips in"),
        (["a\rb/a.wav"], "carriage return"),
        ([os.fsdecode(b"\xff\xfe/a.wav")], "not UTF-8"),
        (["train/a.wav", "Validation/b.wav"], "not emotions but Validation, train"),
    ],
)
def test_data_folder_without_classes_is_refused(names: Any, message: str, tmp_path: Path) -> None:
    if names is not None:
        (tmp_path / "d").mkdir()
        touch(tmp_path / "d", *names)
    with pytest.raises(UserError, match=message) as error:
        find_clips(config_of(tmp_path / "d"))
    assert error.value.code == 2


def lay_out(root: Path, corpus: str, folder: Callable[[int, str], str]) -> Config:
    """A corpus of empty files, in folders by number of speaker and emotion."""
    for speaker, emotion, take in itertools.product(range(len(SPEAKERS[corpus])), CODES[corpus], range(3)):
        touch(root, f"{folder(speaker, emotion)}/{clip_name(corpus, emotion, speaker, take)}")
    return config_of(root)


@pytest.mark.parametrize("corpus", SPEAKERS)
@pytest.mark.parametrize(
    "folder",
    [
        lambda speaker, _: f"Actor_{speaker:02d}",  # as RAVDESS comes
        lambda speaker, _: ("AudioWAV", "more")[speaker % 2],  # CREMA-D
        lambda speaker, _: ("one", "two")[speaker % 2],
        lambda speaker, emotion: f"{speaker}_{emotion}",  # TESS
        lambda _, emotion: f"OAF_{emotion}",  # half of TESS
        lambda speaker, emotion: "Actor_01" if speaker else emotion,  # one stray folder
    ],
)
def test_folders_that_are_no_emotions_are_refused(
    corpus: str, folder: Callable[[int, str], str], tmp_path: Path
) -> None:
    cfg = lay_out(tmp_path / "d", corpus, folder)
    with pytest.raises(UserError, match=f"in {cfg.data_dir} not emotions but "):
        find_clips(cfg)


def test_folders_of_emotions_are_taken(tmp_path: Path) -> None:
    for corpus in SPEAKERS:  # all together, and two emotions in one folder
        lay_out(tmp_path / "d", corpus, lambda _, emotion: emotion.replace("Neutral", "Sad"))
    table = find_clips(config_of(tmp_path / "d"))
    assert set(table.corpus) == set(SPEAKERS)
    actors = table[table.corpus.str.startswith("RAVDESS")].speaker
    assert actors.nunique() == len(SPEAKERS["RAVDESS song"])  # who sings also speaks
    touch(tmp_path / "e", *(f"{emotion}/DC_{code}01.wav" for emotion, code in CODES["SAVEE"].items()))
    assert set(find_clips(config_of(tmp_path / "e")).speaker) == {"SAVEE DC"}  # alone in every folder


def test_manifest_tells_speakers(tmp_path: Path) -> None:
    root, table = tmp_path / "d", tmp_path / "speakers.csv"
    touch(root, "Sad/NA.wav", "Sad/x/1001_AAA_SAD_XX.wav", "Happy/, é.wav", "Happy/b.wav", "Sad/KL_sa15.wav")
    table.write_text(
        "\ufeffspeaker,more,filename\nNA,,Sad/NA.wav\n001,1,Sad/x/1001_AAA_SAD_XX.wav\n"
        '" é",,"Happy/, é.wav"\n001,again,Sad/x/1001_AAA_SAD_XX.wav\n',
        encoding="utf-8",
    )
    clips = find_clips(config_of(root, manifest=str(table)))
    speakers = {Path(path).name: speaker for path, speaker in zip(clips.path, clips.speaker, strict=True)}
    listed = {"NA.wav": "NA", "1001_AAA_SAD_XX.wav": "001", ", é.wav": " é"}
    assert speakers == listed | {"b.wav": "", "KL_sa15.wav": "SAVEE KL"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "No columns"),
        (b"\xff\xfe\x00", "decode"),
        (b'filename,speaker\n"a', "EOF"),
        (b"path,who\na.wav,x\n", "needs a header with filename and speaker"),
        (b"filename,speaker\na.wav,\n", "line 2: needs a filename and a speaker"),
        (b"filename,speaker\na.wav,x\n,y\n", "line 3: needs a filename and a speaker"),
        (b"filename,speaker\n/etc/hosts,x\n", "line 2: .*/etc/hosts.* is no file in"),
        (b"filename,speaker\nb/../../a.wav,x\n", "is no file in"),
        (b"filename,speaker\nb.wav,x\n", "line 2: .*b.wav.* is no file in"),
        (b"filename,speaker\na.wav,x\na.wav,y\n", "line 3: a.wav has two speakers"),
    ],
)
def test_bad_manifest_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    if content is not None:
        (tmp_path / "speakers.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"^manifest {tmp_path}/speakers.csv.*{message}"):
        prepare.read_manifest(tmp_path / "speakers.csv", tmp_path)


# ---- audio -----------------------------------------------------------------------------------------------

FORMATS: list[tuple[str, int, int, dict[str, Any]]] = [  # suffix, rate, channels, options of soundfile
    ("wav", 22050, 1, {}),
    ("wav", 8000, 2, {}),
    ("wav", 16000, 1, {"subtype": "PCM_24"}),
    ("wav", 44100, 2, {"subtype": "FLOAT"}),
    ("wav", 48000, 1, {"subtype": "DOUBLE"}),
    ("wav", 192000, 1, {"subtype": "PCM_U8"}),
    ("wav", 8000, 1, {"subtype": "ULAW"}),
    ("wav", 22050, 1, {"subtype": "MS_ADPCM"}),
    ("flac", 44100, 1, {}),
    ("flac", 8000, 2, {"subtype": "PCM_24"}),
    ("ogg", 44100, 2, {}),
    ("opus", 48000, 2, {"format": "OGG", "subtype": "OPUS"}),
    ("mp3", 44100, 1, {}),
    ("mp3", 48000, 2, {}),
    ("aiff", 48000, 2, {}),
    ("au", 11025, 1, {}),
    ("caf", 44100, 6, {}),
]


def windows_of(wave: np.ndarray, cfg: Config) -> np.ndarray:
    """What a Recording of this wave yields, found another way."""
    size = cfg.n_samples
    if len(wave) <= size:
        return np.pad(wave, (0, size - len(wave)))[None]
    starts = list(range(0, len(wave) - size + 1, size))
    if len(wave) - starts[-1] - size >= 0.1 * cfg.sample_rate:
        starts.append(len(wave) - size)
    return np.stack([wave[start : start + size] for start in starts])


@pytest.mark.filterwarnings("ignore:'(aifc|audioop|sunau)' is deprecated")  # librosa.load imports audioread
@pytest.mark.parametrize("seconds", [0.7, 4.1])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_audio_equals_that_of_librosa(form: Any, seconds: float, tmp_path: Path) -> None:
    suffix, rate, channels, options = form
    path = tmp_path / f"clip.{suffix}"
    noise = 0.05 * np.random.default_rng(0).normal(size=(round(seconds * rate), channels))
    waves = np.stack([0.5 * tone(300 + 100 * k, seconds, rate) for k in range(channels)], axis=1)
    soundfile.write(path, waves + noise, rate, **options)
    expected, _ = librosa.load(path, sr=22050)
    recording = Recording(path, Config())
    ours = np.stack(list(recording))
    assert ours.dtype == np.float32
    assert 0.05 < np.abs(ours).max() < 1
    assert recording.seconds == pytest.approx(len(expected) / 22050, abs=1e-4)
    assert recording.warning == ""
    np.testing.assert_allclose(ours, windows_of(expected, Config()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("n_samples", "starts"),  # a window has 24,000 samples, a tenth of a second 800
    [
        (1, [0]),
        (24_000, [0]),
        (24_799, [0]),
        (24_800, [0, 800]),
        (47_999, [0, 23_999]),
        (48_000, [0, 24_000]),
        (48_799, [0, 24_000]),
        (73_600, [0, 24_000, 48_000, 49_600]),
    ],
)
def test_windows_start_every_3_s_and_the_last_ends_at_the_end(
    n_samples: int, starts: list[int], tmp_path: Path
) -> None:
    ramp = np.arange(1, n_samples + 1, dtype=np.float32) / 2**17  # each sample tells its place
    write_wave(tmp_path / "a.wav", ramp)
    recording = Recording(tmp_path / "a.wav", WHOLE)
    for window, start in zip(recording, starts, strict=True):
        expected = ramp[start : start + 24_000]
        np.testing.assert_array_equal(window, np.pad(expected, (0, 24_000 - len(expected))))
    used = n_samples if n_samples < 24_000 else starts[-1] + 24_000
    assert recording.seconds == pytest.approx(used / RATE)


def test_long_file_takes_little_memory(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros((900 * RATE, 2), np.int16), RATE)
    recording = Recording(tmp_path / "a.flac", Config())
    tracemalloc.start()
    count = sum(1 for _ in recording)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (count, recording.seconds) == (300, 900)
    assert peak < 4e6  # the whole of it would be 79 MB


def test_training_reads_only_the_windows_that_it_uses(tmp_path: Path, mfcc: MFCC) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 3 * RATE)
    wave[2 * RATE :] = np.nan  # would be refused if it were read
    write_wave(tmp_path / "a.wav", wave)
    clip = extract(tmp_path / "a.wav", mfcc, TINY)
    assert (clip.features.shape, clip.seconds, clip.warning) == ((2, 24, 26), 0.8, "")
    with pytest.raises(AudioError, match="NaN"):
        extract(tmp_path / "a.wav", mfcc, replace(TINY, max_windows=9))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # the name of a socket has to be short


def forbid(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    write(path).chmod(0)


BAD_FILES: list[tuple[str, Callable[[Path], object], str]] = [  # name, how it is made, reason
    ("empty.wav", Path.touch, ""),
    ("cut header.wav", lambda path: cut(write(path), 0.002), ""),
    ("text.wav", lambda path: path.write_text("hello " * 99), ""),
    ("html.mp3", lambda path: path.write_text("<html>" * 99), ""),
    ("zeros.flac", lambda path: path.write_bytes(bytes(5000)), ""),
    ("png.wav", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "not recognised"),
    ("short.mp3", lambda path: path.write_bytes(bytes(99)), "not audio"),
    ("folder.wav", Path.mkdir, "not a regular file"),
    ("fifo.wav", os.mkfifo, "not a regular file"),
    ("socket.wav", make_socket, "not a regular file"),
    ("device.wav", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    ("missing.wav", lambda _: None, "No such file"),
    ("dangling link.wav", lambda path: path.symlink_to("nowhere.wav"), "No such file"),
    ("loop.wav", lambda path: path.symlink_to("loop.wav"), "Too many levels of symbolic links"),
    (300 * "a" + ".wav", lambda _: None, "File name too long"),
    ("forbidden.wav", forbid, "Permission denied"),
    ("no samples.wav", lambda path: write_wave(path, []), "holds no samples"),
    ("NaN.wav", lambda path: write_wave(path, [0.1, np.nan, 0.2] * 999), "NaN"),
    ("infinite.wav", lambda path: write_wave(path, [0.1, -np.inf, 0.2] * 999), "infinite"),
    ("infinite both ways.wav", lambda path: write_wave(path, [[np.inf, -np.inf]] * 999), "infinite"),
    ("mean overflows.wav", lambda path: write_wave(path, np.full((99, 2), 3e38)), "infinite"),
    ("huge.wav", lambda path: write_wave(path, [1e30, -1e30] * 999), "samples as large as 1e"),
    ("slow.wav", lambda path: write_wave(path, np.zeros(999), 999), "999 Hz: must be"),
    ("fast.wav", lambda path: write_wave(path, np.zeros(999), 768_001), "768001 Hz: must be"),
    ("a.m4a", os.mkfifo, ".m4a cannot be decoded: convert it to wav"),
    ("a.WMA", os.mkfifo, ".WMA cannot be decoded: convert it to wav"),
]


@pytest.mark.parametrize(("name", "make", "reason"), BAD_FILES, ids=[name[:20] for name, *_ in BAD_FILES])
def test_unusable_file_says_why(
    name: str, make: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    with pytest.raises(AudioError, match=f"^[^\n]*{reason}[^\n]*$") as error:
        extract(tmp_path / name, make_mfcc(TINY), TINY)
    assert str(error.value)


def test_mp3_read_in_pieces_is_that_read_at_once(tmp_path: Path) -> None:
    """A seek between two reads loses the bits that its frames borrow from those before."""
    time = np.arange(6 * 22050) / 22050
    bursts = np.random.default_rng(0).normal(0, 0.3, time.size) * (np.sin(2 * np.pi * 3 * time) > 0.9)
    soundfile.write(tmp_path / "a.mp3", 0.3 * np.sin(2 * np.pi * 300 * time) + bursts, 22050)
    whole, _ = soundfile.read(tmp_path / "a.mp3", dtype="float32")
    pieces = np.concatenate(list(Recording(tmp_path / "a.mp3", Config()))[:2])
    assert np.abs(pieces - whole[: len(pieces)]).max() < 1e-4


@pytest.mark.parametrize("channels", [1, 2, 16])
@pytest.mark.parametrize("rate", [1000, 768_000])
def test_odd_rates_and_many_channels_are_read(channels: int, rate: int, tmp_path: Path) -> None:
    level = np.linspace(0.1, 0.4, channels) if channels > 1 else np.array([0.25])
    write_wave(tmp_path / "a.wav", np.tile(level, (rate // 2, 1)), rate)
    recording = Recording(tmp_path / "a.wav", Config())
    [window] = recording
    assert recording.seconds == pytest.approx(0.5, abs=1e-3)
    assert window[5000] == pytest.approx(0.25, abs=0.01)  # the mean of the channels


CUT = [  # suffix, options of soundfile, warning: where libsndfile knows how long it was
    ("wav", {}, ""),
    ("wav", {"subtype": "FLOAT"}, ""),
    ("wav", {"subtype": "IMA_ADPCM"}, ""),
    ("aiff", {}, ""),
    ("au", {}, ""),
    ("ogg", {}, ""),
    ("mp3", {}, "truncated: 1.{} of 2.50 s"),
    ("flac", {}, "unreadable after 1.{} s: flac decoder lost sync."),
]


@pytest.mark.parametrize(("suffix", "options", "warning"), CUT, ids=str)
def test_cut_file_gives_what_it_has(
    suffix: str, options: dict[str, str], warning: str, tmp_path: Path, capfd: Capture
) -> None:
    cfg = Config(sample_rate=48000, hop_length=1024)
    path = write(tmp_path / f"a.{suffix}", seconds=2.5, rate=48000, **options)
    whole, part = Recording(path, cfg), Recording(path, cfg)
    [expected] = whole
    cut(path, 0.7)
    [window] = part
    capfd.readouterr()  # decoders print; workers silence them
    assert whole.warning == ""
    assert part.warning == warning.format(f"{part.seconds:.2f}"[2:])
    assert 0.3 < part.seconds / whole.seconds < 0.8
    same = int(part.seconds * 48000) - 2000  # a decoder may lack its last block
    np.testing.assert_allclose(window[:same], expected[:same], rtol=0, atol=1e-5)


def lie(path: Path, format_: str) -> None:
    """Write a clip of half a second whose header promises as much as it can."""
    write(path, format=format_)
    if format_ == "WAV":
        put(path, 40, (0x7FFE0000).to_bytes(4, "little"))
    elif format_ == "AU":
        put(path, 8, (0x7FFE0000).to_bytes(4, "big"))
    else:
        put(path, 21, bytes([path.read_bytes()[21] | 0x0F, *[0xFF] * 4]))
        assert soundfile.info(path).frames == 2**36 - 1


@pytest.mark.parametrize("format_", ["WAV", "AU", "FLAC"])
def test_header_that_lies_is_not_believed(format_: str, tmp_path: Path) -> None:
    lie(tmp_path / "a.wav", format_)
    recording = Recording(tmp_path / "a.wav", WHOLE)
    [window] = recording
    [expected] = Recording(write(tmp_path / "b.wav"), WHOLE)
    np.testing.assert_allclose(window, expected, rtol=0, atol=1e-4)
    assert recording.seconds == 0.5


@pytest.mark.parametrize("format_", ["WAV", "FLAC", "MP3", "OGG"])
def test_silence_is_told(format_: str, tmp_path: Path, mfcc: MFCC) -> None:
    pair = np.stack([tone(440), -tone(440)], axis=1)
    silent = {"zeros": 0 * pair, "opposite channels": pair, "offset": 0 * pair + 0.1}
    for name, wave in (silent | {"one channel": pair * [1, 0], "uneven": pair * [1, 0.8]}).items():
        soundfile.write(tmp_path / "a.wav", wave, RATE, format=format_)
        clip = extract(tmp_path / "a.wav", mfcc, TINY)
        if name != "offset" or format_ in {"WAV", "FLAC"}:  # the others filter it
            assert clip.warning == ("silent" if name in silent else ""), name
        assert np.isfinite(clip.features).all()


@pytest.mark.parametrize("name", ["-", "é ü.wav", "a\nb.wav", "'\"%s.wav", os.fsdecode(b"\xff\xfe.wav")])
def test_file_of_any_name_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.wav")).rename(name)
    table, failures = load_features(pd.DataFrame({"path": [name]}), tiny_config(tmp_path), make_mfcc(TINY))
    assert (list(table.path), failures) == ([name], {})


# ---- features --------------------------------------------------------------------------------------------

SETTINGS = [
    Config(),
    Config(n_fft=1024, hop_length=256, n_mels=64, n_mfcc=20),
    Config(sample_rate=16000, n_mfcc=13, n_mels=40, n_fft=512, hop_length=160),
    Config(sample_rate=8000, n_fft=2000, hop_length=700, n_mels=90, n_mfcc=90),
    TINY,
]
WAVES: dict[str, Callable[[int], np.ndarray]] = {  # of a sample rate
    "noise": lambda rate: np.random.default_rng(0).normal(0, 0.1, 3 * rate),
    "speech": lambda rate: prepare.synthesize("Happy", 5, np.random.default_rng(0), rate),
    "short tone": lambda rate: tone(300, 0.3, rate),
    "click": lambda _: np.array([1.0]),
    "faint": lambda rate: 1e-5 * np.random.default_rng(0).normal(size=2 * rate),
    "silence": np.zeros,
}


def reference(wave: np.ndarray, cfg: Config) -> np.ndarray:
    """The features as librosa gives them."""
    sizes = {"n_mfcc": cfg.n_mfcc, "n_fft": cfg.n_fft, "hop_length": cfg.hop_length, "n_mels": cfg.n_mels}
    cepstrum = librosa.feature.mfcc(y=wave, sr=cfg.sample_rate, **sizes)
    return np.concatenate([cepstrum, *(librosa.feature.delta(cepstrum, order=order) for order in (1, 2))])


@pytest.mark.filterwarnings("ignore:Empty filters detected")  # librosa's word on many bands at a low rate
@pytest.mark.parametrize("cfg", SETTINGS, ids=lambda cfg: f"{cfg.sample_rate} Hz, {cfg.n_mels} mels")
def test_features_equal_those_of_librosa(cfg: Config) -> None:
    ours = make_mfcc(cfg)
    for name, make in WAVES.items():
        wave = librosa.util.fix_length(make(cfg.sample_rate).astype(np.float32), size=cfg.n_samples)
        features = ours(torch.from_numpy(wave)[None])[0].numpy()
        assert features.shape == (cfg.n_features, cfg.n_frames)
        np.testing.assert_allclose(features, reference(wave, cfg), rtol=0, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("n_frames", [9, 130])
def test_deltas_of_polynomials_are_their_derivatives(n_frames: int) -> None:
    frames = torch.arange(n_frames).float()
    waves = torch.stack([3 - 2 * frames, frames**2 / 10])[None]
    cfg = Config(duration=(n_frames - 1) * 512 / 22050)
    features = make_mfcc(cfg).add_deltas(waves)[0]
    expected = torch.cat([waves[0], 0 * waves[0] - 2, 0 * waves[0]])  # value, slope, bend
    expected[3], expected[5] = frames / 5, 0.2
    inner = slice(4, -4)  # of nine frames; at the ends a parabola is followed by a straight line
    torch.testing.assert_close(features[:, inner], expected[:, inner], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(features[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]], rtol=1e-4, atol=1e-2)


def test_features_do_not_depend_on_the_batch(rng: np.random.Generator) -> None:
    loudness = np.array([1e-4, 1e-2, 0.3, 0.9, 0, 0.1])[:, None]
    waves = torch.from_numpy((loudness * rng.normal(size=(6, 66150))).astype(np.float32))
    ours, before = make_mfcc(Config()), waves.clone()
    together, alone = ours(waves), torch.cat([ours(wave[None]) for wave in waves])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)
    torch.testing.assert_close(waves, before, rtol=0, atol=0)


# ---- many files, all cores -------------------------------------------------------------------------------


def to_numbers(paths: Sequence[str], *, crash: Sequence[str] = (), wait: str = "") -> list[int]:
    """A work for map_files that ends its process at some paths, and waits at another."""
    for path in paths:
        if path in crash:
            os.kill(os.getpid(), signal.SIGKILL)  # as SIGSEGV would, without a report
        if path == wait:
            time.sleep(120)
    return [int(path) for path in paths]


HUNDRED = [str(number) for number in range(100)]
TWO = replace(TINY, num_workers=2)


@pytest.mark.parametrize("n_workers", [0, 1, 3, -1])
@pytest.mark.parametrize("n_paths", [0, 1, 16, 83])
def test_results_come_in_order(n_workers: int, n_paths: int) -> None:
    paths = random.Random(0).sample(HUNDRED, n_paths)
    assert list(map_files(to_numbers, paths, replace(TINY, num_workers=n_workers))) == list(map(int, paths))


@pytest.mark.parametrize(
    ("crash", "lost"),  # a chunk has 16 files
    [
        (["0"], [range(16)]),
        (["37"], [range(32, 48)]),
        (["99"], [range(96, 100)]),
        (["3", "20", "21", "98"], [range(32), range(96, 100)]),
    ],
)
def test_decoder_crash_costs_its_few_neighbours(crash: list[str], lost: list[range]) -> None:
    results = list(map_files(partial(to_numbers, crash=crash), HUNDRED, TWO))
    failures = {number: result for number, result in enumerate(results) if result != number}
    assert len(results) == 100
    assert list(failures) == list(itertools.chain(*lost))
    for failure in failures.values():
        assert isinstance(failure, AudioError)
        assert "crashed the audio decoder" in str(failure)


def test_decoder_crash_while_the_reader_is_busy() -> None:
    results = map_files(partial(to_numbers, crash=["40"]), HUNDRED, TWO)
    first = next(results)
    wait_until(lambda: not multiprocessing.active_children())
    assert [n for n, result in enumerate([first, *results]) if result != n] == list(range(32, 48))


def test_reader_that_stops_early_leaves_no_worker() -> None:
    results = map_files(to_numbers, HUNDRED, TWO)
    next(results)
    results.close()
    wait_until(lambda: not multiprocessing.active_children())


def send_all(work: Any, pipe: Any) -> None:
    for result in map_files(work, HUNDRED, TWO):
        pipe.send(result)


@LINUX
def test_workers_end_with_their_parent() -> None:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    parent = context.Process(target=send_all, args=(partial(to_numbers, wait="20"), writer))
    parent.start()
    writer.close()
    assert [reader.recv() for _ in range(16)] == list(range(16))
    parent.kill()
    parent.join()
    assert reader.poll(30)  # closed when the last who holds its other end is gone
    with pytest.raises(EOFError):
        reader.recv()


# ---- cache -----------------------------------------------------------------------------------------------


def write_clips(folder: Path, count: int) -> pd.DataFrame:
    """A table of short clips."""
    return pd.DataFrame({"path": [str(write(folder / f"{n}.wav", seed=n)) for n in range(count)]})


def rows_in(cfg: Config, mfcc: MFCC) -> dict[Any, Any]:
    """Every file that the cache knows, and what it knows of it."""
    cache = FeatureCache(cfg, mfcc)
    rows = cache.lookup()
    cache.database.close()
    return rows


def read_windows(clips: pd.DataFrame, cfg: Config, mfcc: MFCC) -> np.ndarray:
    cache = FeatureCache(cfg, mfcc)
    ids = [
        first + k for first, n in zip(clips["first_window"], clips.n_windows, strict=True) for k in range(n)
    ]
    windows = cache.read(ids)
    cache.database.close()
    return windows


@pytest.mark.parametrize("n_workers", [0, 2])
def test_cache_gives_what_was_extracted(n_workers: int, tmp_path: Path, mfcc: MFCC) -> None:
    cfg = tiny_config(tmp_path, num_workers=n_workers)
    clips = write_clips(tmp_path / "clips", 40)
    write(tmp_path / "clips" / "3.wav", seconds=0.2)  # one window, and not two as the others have
    table, failures = load_features(clips, cfg, mfcc)
    expected = [extract(Path(path), mfcc, cfg) for path in clips.path]
    assert not failures
    assert list(table.path) == list(clips.path)
    assert list(table.n_windows) == [1 if n == 3 else 2 for n in range(40)]
    assert list(table.seconds) == [clip.seconds for clip in expected]
    assert list(table.audio_hash) == [clip.audio_hash for clip in expected]
    features = np.concatenate([clip.features for clip in expected])
    np.testing.assert_allclose(read_windows(table, cfg, mfcc), features, rtol=0, atol=1e-3)


def test_second_run_reads_no_file(tmp_path: Path, mfcc: MFCC) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 5)
    first, _ = load_features(clips, cfg, mfcc)
    for path in map(Path, clips.path):  # spoilt, but size and time do not tell
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second, failures = load_features(clips[::-1].reset_index(drop=True), cfg, mfcc)
    assert not failures
    pd.testing.assert_frame_equal(second[::-1].reset_index(drop=True), first)


def test_changed_file_costs_itself(tmp_path: Path, mfcc: MFCC) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 5)
    first, _ = load_features(clips, cfg, mfcc)
    old = read_windows(first, cfg, mfcc)
    os.utime(write(Path(clips.path[2]), seed=99), ns=(0, 1))  # of the same size
    write(Path(clips.path[4]), seconds=0.2)
    second, _ = load_features(clips, cfg, mfcc)
    assert list(second.audio_hash == first.audio_hash) == [True, True, False, True, False]
    assert list(second["first_window"] == first["first_window"]) == [True, True, False, True, False]
    assert len(rows_in(cfg, mfcc)) == 7
    np.testing.assert_array_equal(read_windows(first, cfg, mfcc), old)  # for a run that is training


def test_vanished_and_unreadable_files_are_named_on_every_run(tmp_path: Path, mfcc: MFCC) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 5)
    Path(clips.path[1]).write_text("no audio")
    load_features(clips, cfg, mfcc)
    Path(clips.path[3]).unlink()
    for _ in range(2):
        table, failures = load_features(clips, cfg, mfcc)
        assert set(failures) == {clips.path[1], clips.path[3]}
        assert failures[clips.path[3]] == "No such file or directory"
        assert list(table.path) == [clips.path[n] for n in (0, 2, 4)]
        assert list(table.index) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "is_other"),
    [
        ({"sample_rate": 9000}, True),
        ({"duration": 0.5}, True),
        ({"max_windows": 3}, True),
        ({"n_mfcc": 9}, True),
        ({"n_fft": 400}, True),
        ({"hop_length": 120}, True),
        ({"n_mels": 21}, True),
        ({"epochs": 9, "batch_size": 9, "seed": 9, "num_workers": 1}, False),
    ],
)
def test_cache_is_named_by_what_shapes_the_features(
    changes: dict[str, Any], is_other: bool, tmp_path: Path, mfcc: MFCC
) -> None:
    cfg = tiny_config(tmp_path, **changes)
    caches = [FeatureCache(tiny_config(tmp_path), mfcc), FeatureCache(cfg, make_mfcc(cfg))]
    assert (caches[0].path != caches[1].path) == is_other
    for cache in caches:
        cache.database.close()


def fill(clips: pd.DataFrame, cfg: Config, mfcc: MFCC, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(run(lambda: len(load_features(clips, cfg, mfcc)) * 0))


def start(clips: pd.DataFrame, cfg: Config, mfcc: MFCC, limit: int = resource.RLIM_INFINITY) -> Any:
    """Fill the cache in a process of its own, which writes no file larger than the limit."""
    process = multiprocessing.get_context("fork").Process(target=fill, args=(clips, cfg, mfcc, limit))
    process.start()
    return process


@LINUX
def test_two_processes_share_one_cache(tmp_path: Path, mfcc: MFCC) -> None:
    cfg, clips = tiny_config(tmp_path, num_workers=1), write_clips(tmp_path / "clips", 60)
    processes = [start(clips[:40], cfg, mfcc), start(clips[20:].reset_index(drop=True), cfg, mfcc)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    rows = rows_in(cfg, mfcc)
    assert len(rows) == 60
    ids = sorted(first + k for first, windows, *_ in rows.values() for k in range(windows))
    assert ids == list(range(1, 121))  # none twice, so none extracted twice
    table, _ = load_features(clips, cfg, mfcc)
    direct = extract(Path(clips.path[30]), mfcc, cfg).features
    np.testing.assert_allclose(read_windows(table[30:31], cfg, mfcc), direct, rtol=0, atol=1e-3)


@LINUX
def test_kill_while_filling_loses_nothing_committed(tmp_path: Path, mfcc: MFCC) -> None:
    cfg = tiny_config(tmp_path, num_workers=1, max_windows=10**6)
    clip, long = write(tmp_path / "clip.wav"), tmp_path / "long.flac"
    links = [tmp_path / f"{number}.wav" for number in range(300)]
    for link in links:
        link.symlink_to(clip)
    soundfile.write(long, np.zeros(3600 * RATE, np.int16), RATE)  # holds it up after the first commit
    clips = pd.DataFrame({"path": list(map(str, [*links[:272], long, *links[272:]]))})
    process = start(clips, cfg, mfcc)
    wait_until(lambda: len(rows_in(cfg, mfcc)) >= 256)
    process.kill()
    process.join()
    before = rows_in(cfg, mfcc)
    assert 256 <= len(before) < 301
    [path] = Path(cfg.cache_dir).glob("*.sqlite")
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    long.unlink()
    table, failures = load_features(clips, cfg, mfcc)  # and the lock does not outlive its holder
    assert (len(table), list(failures)) == (300, [str(long)])
    assert before.items() <= rows_in(cfg, mfcc).items()


@LINUX
def test_full_disk_is_one_line(tmp_path: Path, mfcc: MFCC, capfd: Capture) -> None:
    cfg, clips = tiny_config(tmp_path, num_workers=1), write_clips(tmp_path / "clips", 60)
    process = start(clips, cfg, mfcc, limit=350_000)
    process.join(60)
    out, err = capfd.readouterr()
    assert (process.exitcode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: cache {cfg.cache_dir}/features-")
    assert len(load_features(clips, cfg, mfcc)[0]) == 60  # once there is room


def damage(path: Path, how: str) -> None:
    if how == "garbage":
        path.write_bytes(random.Random(0).randbytes(200_000))
    elif how == "cut":
        cut(path, 0.5)
    else:
        put(path, int(how) * 65536, bytes(65536))  # a page


@pytest.mark.parametrize("how", ["garbage", "cut", "1"])
def test_damaged_cache_is_named_with_the_remedy(how: str, tmp_path: Path, mfcc: MFCC) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 20)
    load_features(clips, cfg, mfcc)
    [path] = Path(cfg.cache_dir).glob("*.sqlite")
    damage(path, how)
    with pytest.raises(UserError, match=rf"^cache {path}: .*delete the file$") as error:
        load_features(clips, cfg, mfcc)
    assert error.value.code == 1
    path.unlink()
    assert len(load_features(clips, cfg, mfcc)[0]) == 20


def test_damaged_features_are_named_with_the_remedy(tmp_path: Path, mfcc: MFCC) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 20)
    table, _ = load_features(clips, cfg, mfcc)
    [path] = Path(cfg.cache_dir).glob("*.sqlite")
    damage(path, "3")
    assert len(load_features(clips, cfg, mfcc)[0]) == 20  # the table of clips is whole
    with pytest.raises(UserError, match=rf"^cache {path}: .*delete the file$"):
        read_windows(table, cfg, mfcc)


# ---- the corpus ------------------------------------------------------------------------------------------


def corpus_of(tmp_path: Path, **options: Any) -> Config:
    """Settings for a new corpus: five clips of each of three classes."""
    sizes = {"n_speakers": 5, "n_takes": 1, "n_test": 0, **options}
    return config_of(make_corpus(tmp_path / "data", **sizes))


def test_corpus_has_a_row_per_clip(tmp_path: Path, mfcc: MFCC, capsys: Capture) -> None:
    clips = prepare.load_corpus(corpus_of(tmp_path), mfcc)
    columns = [
        "path",
        "emotion",
        "corpus",
        "speaker",
        "first_window",
        "n_windows",
        "seconds",
        "audio_hash",
        "warning",
    ]
    assert list(clips.columns) == columns
    assert clips.emotion.value_counts().to_dict() == {"Angry": 5, "Happy": 5, "Sad": 5}
    assert clips.audio_hash.nunique() == 15
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("n_bad", "code"), [(1, 0), (2, 1), (15, 2)])
def test_too_many_unreadable_clips_are_an_error(
    n_bad: int, code: int, tmp_path: Path, mfcc: MFCC, capsys: Capture
) -> None:
    cfg = corpus_of(tmp_path)
    bad = list(find_clips(cfg).path)[:n_bad]
    for path in bad:
        Path(path).write_text("no audio")
    if code:
        with pytest.raises(UserError, match=f"^{n_bad} of 15 audio files cannot be read") as error:
            prepare.load_corpus(cfg, mfcc)
        assert error.value.code == code
    else:
        assert len(prepare.load_corpus(cfg, mfcc)) == 15 - n_bad
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"skipped {p}" for p in bad
    ]


def test_same_audio_is_told(tmp_path: Path, mfcc: MFCC, capsys: Capture) -> None:
    cfg = corpus_of(tmp_path)
    one, other = map(Path, find_clips(cfg).path[:2])
    copy, contradiction = one.with_name("copy.flac"), tmp_path / "data" / "Sad" / "b.wav"
    wave, rate = soundfile.read(one, dtype="int16")
    soundfile.write(copy, wave, rate)  # the same samples in another format
    contradiction.write_bytes(other.read_bytes())
    assert prepare.load_corpus(cfg, mfcc).audio_hash.nunique() == 15
    notes = capsys.readouterr().err
    assert f"note: same audio: {one}, {copy}\n" in notes
    assert "note: 2 group(s) of clips with the same audio" in notes
    assert f"note: same audio under different labels: {other}, {contradiction}\n" in notes


def test_class_without_a_readable_clip_is_left_out(tmp_path: Path, mfcc: MFCC, capsys: Capture) -> None:
    cfg = corpus_of(tmp_path)
    touch(tmp_path / "data", "Bored/a.wav")
    assert set(prepare.load_corpus(cfg, mfcc).emotion) == {"Angry", "Happy", "Sad"}
    assert "class Bored has no readable clip: left out" in capsys.readouterr().err


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path, mfcc: MFCC) -> None:
    with pytest.raises(UserError, match=r"only one class in .*, Sad") as error:
        prepare.load_corpus(corpus_of(tmp_path, emotions=["Sad"]), mfcc)
    assert error.value.code == 2


def test_report_shows_the_first_of_many(capsys: Capture) -> None:
    prepare.report_files({f"{n}\x1b.wav": "odd" for n in range(25)}, "used")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == r"used 0\x1b.wav: odd"
    assert lines[20:] == ["used 25 such files, 5 of them not shown"]


def test_script_prints_the_table_and_names_odd_files(tmp_path: Path) -> None:
    cfg = replace(corpus_of(tmp_path, n_takes=10), num_workers=1)
    names = ["cut.mp3", "fifo.wav", "folder.wav", "silent\n.wav", "text.wav"]
    mp3, fifo, folder, silent, text = (Path(cfg.data_dir, "Sad", name) for name in names)
    cut(write(mp3, seconds=1, rate=44100), 0.6)  # its decoder prints
    os.mkfifo(fifo)
    folder.mkdir()
    write_wave(silent, np.zeros(RATE))
    text.write_text("no audio")
    answer = run_script("prepare.py", *flags(cfg), cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert rows[0] == ["CREMA-D", "other", "clips", "minutes", "speakers"]
    assert rows[1] == ["Angry", "50", "0", "50", "0.4", "5"]
    assert rows[3][:4] == ["Sad", "50", "2", "52"]
    assert rows[4][:4] == ["total", "150", "2", "152"]
    lines = answer.stderr.splitlines()
    assert lines[:2] == [f"skipped {fifo}: not a regular file", f"skipped {text}: Format not recognised."]
    assert f" {mp3}: truncated: 0." in lines[2]
    assert f" {silent}: silent".replace("\n", r"\n") in lines[3]
    assert len(lines) == 4


# ---- demo corpus -----------------------------------------------------------------------------------------


def test_demo_is_a_corpus_that_we_understand(tmp_path: Path) -> None:
    root, emotions = tmp_path / "new" / "demo", prepare.EMOTIONS
    prepare.make_demo(root, n_speakers=2, n_takes=1)
    clips = find_clips(config_of(root))
    assert list(root.parent.iterdir()) == [root]  # no draft is left
    assert set(clips.emotion) == set(emotions)
    assert set(clips.speaker) == {"demo 00", "demo 01"}
    answers, sample = (pd.read_csv(root / name) for name in ("test_answers.csv", "sample_submission.csv"))
    names = {path.name for path in prepare.find_audio(root / "Test")}
    assert set(answers.filename) == set(sample.filename) == names
    assert answers.emotion.value_counts().to_dict() == dict.fromkeys(emotions, 2)
    waves = [soundfile.read(path)[0] for path in prepare.find_audio(root)]
    assert len({wave.tobytes() for wave in waves}) == len(waves) == 28
    assert all(1 < len(wave) / 22050 < 6 and 0.01 < np.abs(wave).max() <= 1 for wave in waves)


def test_demo_is_the_same_each_time_and_never_replaced(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        prepare.make_demo(root, n_speakers=1, n_takes=0)
    files = [[path.read_bytes() for path in sorted(root.rglob("*.*"))] for root in roots]
    assert files[0] == files[1]
    (roots[0] / "Test" / "0.wav").write_text("mine")
    prepare.make_demo(roots[0], n_speakers=1, n_takes=0)
    assert (roots[0] / "Test" / "0.wav").read_text() == "mine"
