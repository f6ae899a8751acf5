"""Finding clips, reading audio, features against librosa, the cache, and the corpus."""

import errno
import itertools
import multiprocessing
import multiprocessing.pool
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
from collections.abc import Callable, Mapping, Sequence
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
from prepare import (
    MFCC,
    AudioError,
    FeatureCache,
    Recording,
    extract,
    find_clips,
    load_features,
    map_files,
    split,
)
from tests.conftest import (
    EMOTIONS,
    RATE,
    ROOT,
    make_corpus,
    make_mfcc,
    run_script,
    tiny_config,
    tone,
)

Capture = pytest.CaptureFixture[str]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks a process")
TINY = tiny_config(Path())
WHOLE = Config(sample_rate=RATE)  # windows of 3 s of our clips as they are


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


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for what happens in another process; fail after half a minute."""
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---- finding clips ---------------------------------------------------------------------------------------


def test_audio_is_found_at_any_depth_and_junk_is_not(tmp_path: Path) -> None:
    audio = ["B.WAV", "a/b/deep.Flac", "a.ogg", "a10.mp3", "a9.opus", "c.aif", "d.au", "e.caf", "f.m4a"]
    audio += ["dir.wav/inside.wav"]
    junk = ["notes.txt", "._a.wav", ".hidden/a.wav", ".DS_Store", "__MACOSX/a.wav", "wav", "a.wav.bak"]
    touch(tmp_path, *audio, *junk)
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)  # a loop
    assert prepare.find_audio(tmp_path) == sorted(tmp_path / name for name in audio)
    with pytest.raises(FileNotFoundError):  # and not an empty list
        prepare.find_audio(tmp_path / "missing")


def test_files_of_other_suffixes_are_counted(tmp_path: Path, capsys: Capture) -> None:
    """A test clip among them would be missing in a submission; nobody misses a text beside the clips."""
    touch(
        tmp_path, "a.wav", "film.avi", "x.WAVE", "note.3ga", "b/song.weba", "read.me", "b/c.aup3", "b/d.aup3"
    )
    touch(tmp_path, "labels.csv", "b/README", "b/x.TextGrid", "._b.aup3", ".git/e.aup3")
    found = [path.name for path in prepare.find_audio(tmp_path)]
    assert found == ["a.wav", "song.weba", "film.avi", "note.3ga", "x.WAVE"]
    note = f"note: 3 file(s) whose suffix is not known as audio are left out: {tmp_path}/b/c.aup3\n"
    assert capsys.readouterr().err == note


def test_file_name_tells_corpus_speaker_and_emotion() -> None:
    names = {
        "1001_DFA_ANG_XX": ("CREMA-D", "CREMA-D 1001", "ANG"),
        "1040_ITH_SAD_X": ("CREMA-D", "CREMA-D 1040", "SAD"),  # so named in the corpus
        "03-01-06-01-02-01-12": ("RAVDESS speech", "RAVDESS 12", "06"),
        "03-02-06-01-02-01-12": ("RAVDESS song", "RAVDESS 12", "06"),  # who sings also speaks
        "KL_sa15": ("SAVEE", "SAVEE KL", "sa"),
        "JK_su03": ("SAVEE", "SAVEE JK", "su"),
        "16b10Td": ("EmoDB", "EmoDB 16", "T"),
        "OAF_bite_happy": ("TESS", "TESS OA", "happy"),
        "OA_bite_neutral": ("TESS", "TESS OA", "neutral"),  # so named in the corpus
        "YAF_youth_ps": ("TESS", "TESS YA", "ps"),
        "sad_speaker03_07": ("demo", "demo 03", "sad"),
        "02-01-06-01-02-01-12": ("RAVDESS speech", "RAVDESS 12", "06"),  # a film without sound
        "1001_DFA_ANG_XX (copy)": ("other", "", ""),
        "16b10Xd": ("other", "", ""),
    }
    table = prepare.parse_names(f"any.where/1001_DFA_ANG_XX/{name}.wav" for name in names)
    assert list(table[["corpus", "speaker", "code"]].itertuples(index=False, name=None)) == [*names.values()]


def config_of(root: Path, **changes: Any) -> Config:
    return tiny_config(root.parent, data_dir=str(root), **changes)


def test_clips_are_those_in_class_folders_by_file_name(tmp_path: Path, capsys: Capture) -> None:
    """So that the same clips in other folders come in the same order. Other folders are noted or passed."""
    root = tmp_path / "d"
    names = ["Angry/deep/1001_AAA_ANG_XX.wav", "Sad/1002_A_x.wav", "Angry/z.wav", "Sad/z.wav"]
    touch(root, *reversed(names), "stray.wav", "Empty/readme.txt")
    touch(root, "TEST/c.wav", ".git/d.wav", "__MACOSX/e.wav")
    table = find_clips(config_of(root))
    assert list(table.path[table.left_out != ""]) == [str(root / "stray.wav")]
    table = table[table.left_out == ""]
    assert list(table.path) == [str(root / name) for name in names]
    assert list(table.emotion) == ["Angry", "Sad", "Angry", "Sad"]
    assert list(table.speaker) == ["CREMA-D 1001", "", "", ""]
    err = capsys.readouterr().err
    assert f"1 clip(s) that neither manifest, folder nor name label are left out: {root}/stray" in err
    assert f"note: folder {root / 'Empty'} has no clips: left out" in err
    assert f"note: {root / 'TEST'} holds the clips to label: not used here" in err
    assert err.count("\n") == 3


@pytest.mark.parametrize("held", ["held", "Angry/held", "Angry/deep/held", "link"])
def test_clips_below_the_test_folder_are_not_trained_on(held: str, tmp_path: Path, capsys: Capture) -> None:
    """Wherever it lies; but for those that the manifest labels."""
    root = tmp_path / "d"
    touch(root, "Angry/a.wav", "Sad/b.wav", *(f"{held}/{name}.wav" for name in ("x", "sub/y", "z")))
    if held == "link":
        (root / "link").rename(root / "Sad" / "real")
        (root / "link").symlink_to("Sad/real", target_is_directory=True)
    cfg = config_of(root, test_dir=str(root / held))
    assert list(find_clips(cfg).path) == [str(root / name) for name in ("Angry/a.wav", "Sad/b.wav")]
    note = f"note: {root / held} holds the clips to label: not used here\n"
    assert note in capsys.readouterr().err
    (root / "manifest.csv").write_text(f"filename,emotion,speaker\n{held}/x.wav,joy,\n{held}/z.wav,,Ann\n")
    found = find_clips(cfg)
    assert {Path(path).name: emotion for path, emotion in zip(found.path, found.emotion, strict=True)} == {
        "a.wav": "Angry",
        "b.wav": "Sad",
        "x.wav": "joy",
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "no data folder"),
        (["a.wav", "Test/b.wav"], "no clips in .*: expected one folder per emotion"),
        ([], "no clips in"),
        (["Angry/a.wav", "Angry/b\r/c.wav", "Mine/d.wav"], "Mine in .*: no emotions that we know"),
        (
            ["train/a.wav", "Validation/b.wav"],
            "Validation, train in .*: no emotions that we know, nor do names as b.wav tell one",
        ),
        (
            ["Actor_01/a.wav", "Actor_02/a.wav", "Angry/03-01-05-01-01-01-01.wav"],
            "Actor_01, Actor_02 in .*: no emotions that we know, nor do names as a.wav",
        ),
        (
            ["audio/Angry/a.wav", "audio/Sad/b.wav"],
            "class folders are not in .* but in audio: pass --data_dir",
        ),
        (
            ["data/audio/Angry/a.wav", "data/audio/Sad/b.wav"],
            "but in data/audio: pass --data_dir .*d/data/audio$",
        ),
        (
            ["neutral/a.wav", "positive/b.wav", "negative/b.wav"],
            "negative, positive in .*--labels_from folders",
        ),
        (["neutral/a.wav", "stressed/b.wav"], "stressed in .*: no emotions that we know"),
        (
            ["dataset/Angry/1001_DFA_ANG_XX.wav", "dataset/Sad/b.wav", "demo/x.wav"],
            "pass --data_dir .*d/dataset$",
        ),
    ],
)
def test_data_folder_without_classes_is_refused(names: Any, message: str, tmp_path: Path) -> None:
    if names is not None:
        (tmp_path / "d").mkdir()
        touch(tmp_path, *(f"d/{name}" for name in names))
    with pytest.raises(UserError, match=message) as error:
        find_clips(config_of(tmp_path / "d"))
    assert error.value.code == 2


def test_speaker_folders_around_emotion_folders_are_understood(tmp_path: Path, capsys: Capture) -> None:
    """As ESD and CASIA are laid out, under whatever folders; the parts of a data set are no speakers."""
    for prefix in ("", "ESD/", "data/0.0/"):
        root = tmp_path / f"d{prefix.count('/')}"
        names = [
            f"{prefix}{speaker}/{emotion}/x.wav" for speaker in ("01", "02") for emotion in ("Angry", "Sad")
        ]
        touch(root, *names, f"{prefix}01/Happy/train/y.wav", f"{prefix}01/z.wav", f"{prefix}train/Sad/w.wav")
        found = find_clips(config_of(root))
        rows = sorted(zip(found.emotion, found.speaker, strict=True))
        assert rows == [
            ("", ""),
            *itertools.product(["Angry"], ["01", "02"]),
            ("Happy", "01"),
            ("Sad", ""),
            *itertools.product(["Sad"], ["01", "02"]),
        ]
        assert list(found.path[found.left_out == "no label"]) == [f"{root}/{prefix}01/z.wav"]
        assert (
            "note: taken as speakers, since folders of emotions are in them: 01, 02\n"
            in capsys.readouterr().err
        )


def test_folders_that_are_no_emotions_beside_some_that_are_are_left_out(
    tmp_path: Path, capsys: Capture
) -> None:
    """Those of ones own classes can be had; Excited is an emotion, if not of any corpus that names tell."""
    root = tmp_path / "d"
    touch(root, "Angry/a.wav", "Sad/b.wav", "Happy/c.wav", "Excited/e.wav", "Contempt/f.wav")
    touch(root, "#recycle/x.wav", "backup/Angry/a.wav", "backup/Sad/b.wav")
    found = find_clips(config_of(root))
    assert sorted(found.emotion[found.left_out == ""]) == ["Angry", "Contempt", "Excited", "Happy", "Sad"]
    assert (found.left_out == "no label").sum() == 3
    note = (
        f"note: #recycle, backup in {root}: no emotions that we know: left out (--labels_from folders makes"
    )
    assert note in capsys.readouterr().err
    assert {"#recycle", "backup"} < set(find_clips(config_of(root, labels_from="folders")).emotion)


def test_films_of_ravdess_are_used_without_those_that_have_no_sound(tmp_path: Path, capsys: Capture) -> None:
    """As downloaded, half of them have none."""
    for actor, code in itertools.product(("01", "02"), ("03", "04")):
        touch(
            tmp_path / "d", *(f"Actor_{actor}/{kind}-01-{code}-01-01-01-{actor}.mp4" for kind in ("01", "02"))
        )
    found = find_clips(config_of(tmp_path / "d"))
    emotions = found.groupby("left_out").emotion.agg("".join).to_dict()
    assert emotions == dict.fromkeys(("", "silent film"), "HappyHappySadSad")
    assert "note: 4 film(s) without sound, by their names, are left out: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (["Angry", "Angry ", " angry"], "Angry"),
        (
            ["Angry", "Angry (1)", "Angry - Copy", "Angry - Copy (2)", "anger copy 2", "Copy of Angry"],
            "Angry",
        ),
        (["Angry (1)"], "Angry"),
        ([unicodedata.normalize(form, "überglücklich") for form in ("NFC", "NFD")], "überglücklich"),
        (["Suprised", "Suprised ", "suprised"], "Suprised"),
    ],
)
def test_folders_of_one_meaning_are_one_class(
    folders: list[str], name: str, tmp_path: Path, capsys: Capture
) -> None:
    root = tmp_path / "d"
    touch(root, *(f"{folder}/{k}.wav" for k, folder in enumerate([*folders, folders[0]])), "Calm/x.wav")
    labels_from = "folders" if name.startswith("ü") else "auto"
    assert set(find_clips(config_of(root, labels_from=labels_from)).emotion) == {name, "Calm"}
    err = capsys.readouterr().err
    assert err.startswith(f"note: class {name} is spelled ")
    assert err.count(" and ") == len(folders) - 1


def test_numbers_of_ones_own_classes_are_no_copies(tmp_path: Path) -> None:
    touch(tmp_path / "d", "level (1)/a.wav", "level (2)/b.wav")
    found = find_clips(config_of(tmp_path / "d", labels_from="folders"))
    assert set(found.emotion) == {"level (1)", "level (2)"}


@pytest.mark.parametrize(("name", "message"), [(b"a\rb", "carriage return"), (b"\xff\xfe", "not UTF-8")])
def test_class_that_no_csv_can_hold_is_refused(name: bytes, message: str, tmp_path: Path) -> None:
    touch(tmp_path, f"d/{os.fsdecode(name)}/a.wav")
    with pytest.raises(UserError, match=message):
        find_clips(config_of(tmp_path / "d", labels_from="folders"))


# Files of the corpora as their authors lay them out, and what they mean.
OFFICIAL = {
    "Audio_Speech_Actors_01-24/Actor_01/03-01-01-01-01-01-01": ("Neutral", "RAVDESS 01"),
    "Audio_Speech_Actors_01-24/Actor_02/03-01-08-01-01-01-02": ("Surprised", "RAVDESS 02"),
    "Audio_Song_Actors_01-24/Actor_02/03-02-06-01-01-01-02": ("Fearful", "RAVDESS 02"),
    "Actor_03/03-01-03-01-01-01-03": ("Happy", "RAVDESS 03"),
    "Actor_03/03-01-04-01-01-01-03": ("Sad", "RAVDESS 03"),
    "AudioWAV/1040_ITH_SAD_X": ("Sad", "CREMA-D 1040"),
    "AudioWAV/1001_DFA_DIS_XX": ("Disgusted", "CREMA-D 1001"),
    "OAF_Fear/OAF_back_fear": ("Fearful", "TESS OA"),
    "YAF_fear/YAF_back_fear": ("Fearful", "TESS YA"),
    "OAF_neutral/OA_bite_neutral": ("Neutral", "TESS OA"),
    "YAF_pleasant_surprised/YAF_back_ps": ("Surprised", "TESS YA"),
    "AudioData/DC/a01": ("Angry", "SAVEE DC"),
    "AudioData/JE/a01": ("Angry", "SAVEE JE"),
    "AudioData/JE/sa01": ("Sad", "SAVEE JE"),
    "AudioData/JE/su01": ("Surprised", "SAVEE JE"),
    "ALL/KL_n30": ("Neutral", "SAVEE KL"),
    "wav/03a01Wa": ("Angry", "EmoDB 03"),
    "wav/03a01Ea": ("Disgusted", "EmoDB 03"),
    "wav/08a01Ab": ("Fearful", "EmoDB 08"),
    "wav/08a01Fb": ("Happy", "EmoDB 08"),
    "wav/08a01Tb": ("Sad", "EmoDB 08"),
    "wav/08a01Nb": ("Neutral", "EmoDB 08"),
}
EXTRA = {"Actor_03/03-01-02-01-01-01-03": "Calm", "wav/03a01La": "Bored"}


def test_corpora_as_they_come_are_labelled_by_file_name(tmp_path: Path, capsys: Capture) -> None:
    """Side by side, with a class folder whose spelling they take, clips to label, and copies of clips."""
    root = tmp_path / "d"
    copies = ["mirror/Actor_03/03-01-03-01-01-01-03.wav", "AudioWAV/1040_ITH_SAD_X.mp3"]
    copies += ["Actor_03/01-01-03-01-01-01-03.mp4", "Suprised/mine.mp3"]
    touch(root, *(f"{name}.wav" for name in [*OFFICIAL, *EXTRA]), *copies)
    touch(root, "Suprised/mine.wav", "Suprised/more.wav", "wav/notes.wav", "Test/0.wav")
    found = find_clips(config_of(root)).set_index("path")
    used = found[found.left_out == ""]
    expected = {f"{root}/{name}.wav": row for name, row in OFFICIAL.items()}
    told = dict(
        zip(used.index, zip(used.emotion.str.replace("Sup", "Surp"), used.speaker, strict=True), strict=True)
    )
    twice = str(root / "Actor_03/03-01-03-01-01-01-03.wav")  # one of the two is taken
    told[twice] = told.pop(str(root / copies[0]), ("", ""))
    assert told == expected | {f"{root}/Suprised/{name}.wav": ("Surprised", "") for name in ("mine", "more")}
    assert "Surprised" not in set(found.emotion)
    assert found.left_out.value_counts().to_dict() == {"": 24, "extra label": 2, "copy": 4, "no label": 1}
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 10  # one for each corpus, three of what is left out, and one of Test
    assert (
        "note: EmoDB: labels from file names, not folders (--labels_from folders): A = Fearful, E = Disgusted"
        in err[2]
    )
    assert err[-2].startswith(
        "note: 2 clip(s) of calm or boredom are left out (--extra_labels keep takes them)"
    )
    kept = find_clips(config_of(root, extra_labels="keep")).set_index("path")
    assert {name: kept.emotion[f"{root}/{name}.wav"] for name in EXTRA} == EXTRA
    assert (kept.left_out == "").sum() == 26


def test_clips_in_class_folders_or_as_downloaded_get_the_same_parts(tmp_path: Path) -> None:
    """SAVEE, whose file names repeat in the folders of its speakers."""
    for speaker, code, number in itertools.product(["DC", "JE", "JK", "KL"], ["a", "sa", "su"], range(10)):
        emotion = {"a": "Angry", "sa": "Sad", "su": "Suprised"}[code]
        touch(
            tmp_path,
            f"down/{speaker}/{code}{number:02d}.wav",
            f"d/{emotion}/{speaker}_{code}{number:02d}.wav",
        )
    tables = []
    for folder in ("down", "d"):
        clips = find_clips(config_of(tmp_path / folder))
        clips["name"] = clips["audio_hash"] = [prepare.clip_name(path) for path in clips.path]
        clips["at_random"], clips["by_speaker"] = (
            split(clips, Config(split=how)) for how in ("random", "speaker")
        )
        tables.append(clips.drop(columns="path").replace("Suprised", "Surprised"))
    pd.testing.assert_frame_equal(*tables)
    assert set(tables[0].emotion) == {"Angry", "Sad", "Surprised"}
    assert set(tables[0].at_random) == set(tables[0].by_speaker) == {"train", "val", "test"}


NAMES = {  # of a speaker and an emotion, as the authors of the corpora write them
    "RAVDESS speech": "03-01-0{emotion}-01-01-01-0{speaker}.wav",
    "CREMA-D": "100{speaker}_DFA_{emotion}_XX.wav",
    "TESS": "{speaker}_dog_{emotion}.wav",
}
EMOTIONS_OF = {"RAVDESS speech": "3456", "CREMA-D": ["ANG", "HAP", "SAD"], "TESS": ["angry", "happy", "sad"]}


def lay_out(root: Path, corpus: str, folder: Callable[[str, str], str]) -> Config:
    """A corpus of empty files, in folders by speaker and emotion."""
    for speaker, emotion in itertools.product(
        ["OA", "YA"] if corpus == "TESS" else "1234", EMOTIONS_OF[corpus]
    ):
        touch(root, f"{folder(speaker, emotion)}/{NAMES[corpus].format(speaker=speaker, emotion=emotion)}")
    return config_of(root)


@pytest.mark.parametrize(
    ("corpus", "folder", "classes"),
    [
        ("CREMA-D", lambda speaker, _: "one" if speaker in "12" else "two", "Angry Happy Sad"),
        ("CREMA-D", lambda speaker, _: "most" if speaker in "123" else "rest", "Angry Happy Sad"),
        ("RAVDESS speech", lambda speaker, emotion: f"{speaker}_{emotion}", "Angry Fearful Happy Sad"),
        # One stray folder of an actor.
        (
            "RAVDESS speech",
            lambda speaker, emotion: emotion if speaker in "123" else "Actor_04",
            "Angry Fearful Happy Sad",
        ),
        # Folders of emotions that most names contradict.
        ("TESS", lambda _, emotion: {"sad": "Angry"}.get(emotion, "Sad"), "Angry Happy Sad"),
        # Folders of no emotion that we know.
        ("CREMA-D", lambda _, emotion: {"ANG": "Wut"}.get(emotion, "other"), "Angry Happy Sad"),
        ("TESS", lambda _, emotion: {"sad": "angry"}.get(emotion, emotion), "angry happy"),
    ],
)
def test_folders_are_classes_unless_most_file_names_disagree(
    corpus: str, folder: Callable[[str, str], str], classes: str, tmp_path: Path
) -> None:
    clips = find_clips(lay_out(tmp_path / "d", corpus, folder))
    assert sorted(set(clips.emotion)) == classes.split()
    assert set(clips.corpus) == {corpus}


def test_labels_of_folders_can_be_had_whatever_the_names(tmp_path: Path, capsys: Capture) -> None:
    """Folders of listeners' judgements, say; and two spellings of one emotion."""
    cfg = lay_out(tmp_path / "d", "TESS", lambda speaker, _: "fear" if speaker == "OA" else "Fearful")
    touch(tmp_path / "d", "Sad/x.wav", "Fearful/y.wav")
    assert set(find_clips(cfg).emotion) == {"Angry", "Happy", "Sad", "Fearful"}
    assert (
        "labels from file names, not folders (--labels_from folders): angry = Angry"
        in capsys.readouterr().err
    )
    assert set(find_clips(replace(cfg, labels_from="folders")).emotion) == {"Fearful", "Sad"}
    assert capsys.readouterr().err == "note: class Fearful is spelled 'Fearful' and 'fear'\n"


def test_labels_of_ones_own_are_taken_where_asked_for(tmp_path: Path) -> None:
    cfg = lay_out(tmp_path / "d", "CREMA-D", lambda _, emotion: "Wut" if emotion == "ANG" else "other")
    assert set(find_clips(replace(cfg, labels_from="folders")).emotion) == {"Wut", "other"}


def test_manifest_tells_speakers(tmp_path: Path) -> None:
    root, table = tmp_path / "d", tmp_path / "speakers.csv"
    touch(root, "Sad/NA.wav", "Sad/x/1001_AAA_SAD_XX.wav", "Happy/, é.wav", "Happy/b.wav", "Sad/KL_sa15.wav")
    table.write_text(
        "\ufeffspeaker,filename\nNA,Sad/NA.wav\n001,Sad/x/1001_AAA_SAD_XX.wav\n"
        '" é","Happy/, é.wav"\n001,Sad/x/1001_AAA_SAD_XX.wav\n',
        encoding="utf-8",
    )
    clips = find_clips(config_of(root, manifest=str(table)))
    speakers = {Path(path).name: speaker for path, speaker in zip(clips.path, clips.speaker, strict=True)}
    listed = {"NA.wav": "NA", "1001_AAA_SAD_XX.wav": "001", ", é.wav": "é"}
    assert speakers == listed | {"b.wav": "", "KL_sa15.wav": "SAVEE KL"}


def test_manifest_tells_emotions(tmp_path: Path, capsys: Capture) -> None:
    """Of own clips beside a corpus and class folders; it lies in the data folder. A row may tell one."""
    cfg = lay_out(tmp_path / "d", "CREMA-D", lambda *_: "AudioWAV")
    touch(tmp_path / "d", "me/1.wav", "me/2.wav", "me/3.wav", "4.wav", "Sad/5.wav", "Sad/6.wav")
    (tmp_path / "d" / "manifest.csv").write_text(
        "filename,emotion, speaker\nme/1.wav,joy,Ann\nme/2.wav,Proud,\n4.wav,anger,Bob\n"
        "Sad/6.wav,joy,\nSad/5.wav,,Eve\n"
    )
    found = find_clips(cfg)
    own = found[(found.corpus == "other") & (found.left_out == "")]
    assert dict(
        zip(map(prepare.clip_name, own.path), zip(own.emotion, own.speaker, strict=True), strict=True)
    ) == {
        "1.wav": ("joy", "Ann"),
        "2.wav": ("Proud", ""),
        "4.wav": ("anger", "Bob"),
        "5.wav": ("Sad", "Eve"),
        "6.wav": ("joy", ""),
    }
    assert set(found.emotion[found.corpus == "CREMA-D"]) == {"anger", "joy", "Sad"}
    assert list(found.path[found.left_out == "no label"]) == [str(tmp_path / "d/me/3.wav")]
    assert "14 clips that the manifest does not label are used if folder" in capsys.readouterr().err


def test_manifest_can_be_the_whole_data_set(tmp_path: Path) -> None:
    cfg = replace(lay_out(tmp_path / "d", "CREMA-D", lambda *_: "AudioWAV"), labels_from="manifest")
    touch(tmp_path / "d", "Sad/5.wav", "me/1.wav")
    with pytest.raises(UserError, match="labels_from = 'manifest': pass a --manifest with the columns"):
        find_clips(cfg)
    table = tmp_path / "d" / "manifest.csv"
    table.write_text("filename,emotion\nme/1.wav,joy\nAudioWAV/1001_DFA_ANG_XX.wav,rage\n")
    found = find_clips(cfg)
    used = found[found.left_out == ""]
    assert dict(zip(used.emotion, used.speaker, strict=True)) == {"joy": "", "rage": "CREMA-D 1001"}
    assert set(found.left_out) == {"", "no label"}


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
def test_manifest_names_files_in_any_form(disk: Any, tmp_path: Path) -> None:
    """Absolute ones too, through a link or not, and those on the disk of a Mac, in another Unicode form."""
    root, link, table = tmp_path / "d", tmp_path / "link", tmp_path / "t.csv"
    names = [f"é/Ä{k}.wav" for k in range(5)]
    touch(root, *(unicodedata.normalize(disk, name) for name in names))
    link.symlink_to(root, target_is_directory=True)
    written = [names[0], f" ./x/../{unicodedata.normalize('NFD', names[1])} "]
    written += [f"{root}/{names[2]}", f"{link}/{names[3]}"]
    table.write_text("filename,emotion\n" + "\n".join(f"{name},Sad" for name in written) + "\n", "utf-8")
    link = link / ".." / "link"
    found = find_clips(config_of(link, manifest=str(table), labels_from="manifest"))
    used = found[found.left_out == ""]
    assert list(used.path) == [str(link / unicodedata.normalize(disk, name)) for name in names[:4]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "decode"),
        (b"path,who\na.wav,x\n", "header with filename and emotion, speaker or part, .* has path, who"),
        (b"filename\na.wav\n", "header with filename and emotion, speaker or part, .* has filename"),
        (b"filename,emotion,split\na.wav,Sad,test\n", "and no more, has filename, emotion, split"),
        (b"filename,emotion\na.wav,x\n./a.wav,y\n", "says two things of .*a.wav"),
        (b"filename,emotion,speaker\na.wav,,\n", "line 2: needs filename, and emotion, speaker or part"),
        (b"filename,speaker\na.wav,x\n,y\n", "line 3: needs filename, and emotion, speaker or part"),
        (b"filename,emotion\na.wav,Sad,very\n", "loss of data"),
        (b"filename,speaker\n/etc/hosts,x\n", "line 2: '/etc/hosts' lies outside"),
        (b"filename,speaker\nb/../../a.wav,x\n", "lies outside"),
        (b"filename,speaker\nb.wav,x\n", "b.wav.* is no file in"),
    ],
)
def test_bad_manifest_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    (tmp_path / "speakers.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"^manifest {tmp_path}/speakers.csv.*{message}"):
        prepare.read_manifest(tmp_path / "speakers.csv", tmp_path)


# ---- audio -----------------------------------------------------------------------------------------------

FORMATS: list[tuple[str, int, int, dict[str, Any]]] = [  # suffix, rate, channels, options of soundfile
    ("wav", 22050, 1, {}),
    ("wav", 44100, 2, {"subtype": "FLOAT"}),
    ("wav", 192000, 1, {"subtype": "PCM_U8"}),
    ("wav", 8000, 1, {"subtype": "ULAW"}),
    ("wav", 22050, 1, {"subtype": "MS_ADPCM"}),
    ("flac", 8000, 2, {"subtype": "PCM_24"}),
    ("ogg", 44100, 2, {}),
    ("opus", 48000, 2, {"format": "OGG", "subtype": "OPUS"}),
    ("mp3", 48000, 2, {}),
    ("aiff", 48000, 2, {}),
    ("au", 11025, 1, {}),
    ("caf", 44100, 6, {}),
    ("wav", 1000, 1, {}),
    ("wav", 768_000, 1, {}),
]


@pytest.mark.filterwarnings("ignore:'(aifc|audioop|sunau)' is deprecated")  # librosa.load imports audioread
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_audio_equals_that_of_librosa(form: Any, tmp_path: Path) -> None:
    suffix, rate, channels, options = form
    path = tmp_path / f"clip.{suffix}"
    noise = 0.05 * np.random.default_rng(0).normal(size=(round(4.1 * rate), channels))
    waves = np.stack([0.5 * tone(300 + 100 * k, 4.1, rate) for k in range(channels)], axis=1)
    soundfile.write(path, waves + noise, rate, **options)
    expected, _ = librosa.load(path, sr=22050)
    recording = Recording(path, Config())
    first, last = recording
    assert 0.05 < np.abs(first).max() < 1
    assert recording.seconds == pytest.approx(len(expected) / 22050, abs=1e-4)
    assert recording.warning == ""
    np.testing.assert_allclose(first, expected[:66150], rtol=0, atol=1e-4)
    np.testing.assert_allclose(last, expected[-66150:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("n_samples", "starts"),  # a window has 24,000 samples, a tenth of a second 800
    [
        (1, [0]),
        (24_799, [0]),
        (24_800, [0, 800]),
        (48_000, [0, 24_000]),
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


@pytest.mark.parametrize("path", sorted(Path(__file__).with_name("cases").iterdir()), ids=lambda p: p.name)
def test_odd_file_is_refused_or_used_as_its_name_says(path: Path, mfcc: MFCC, capfd: Capture) -> None:
    """What lies, breaks off, overflows, is not there, is silent, or makes a decoder print."""
    kind = path.name.partition("-")[0]
    try:
        clip = extract(path, mfcc, replace(TINY, max_windows=99))
    except AudioError:
        found = "refused"
    else:
        found = "warned" if clip.warning else "used"
        assert np.isfinite(clip.features).all()
        assert clip.seconds < 2  # whatever the header promises
    capfd.readouterr()  # decoders print; workers silence them
    assert found == kind


def test_mp3_read_in_pieces_is_that_read_at_once(tmp_path: Path) -> None:
    """A seek between two reads loses the bits that its frames borrow from those before."""
    seconds = np.arange(6 * 22050) / 22050
    bursts = np.random.default_rng(0).normal(0, 0.3, seconds.size) * (np.sin(2 * np.pi * 3 * seconds) > 0.9)
    soundfile.write(tmp_path / "a.mp3", 0.3 * np.sin(2 * np.pi * 300 * seconds) + bursts, 22050)
    whole, _ = soundfile.read(tmp_path / "a.mp3", dtype="float32")
    pieces = np.concatenate(list(Recording(tmp_path / "a.mp3", Config()))[:2])
    assert np.abs(pieces - whole[: len(pieces)]).max() < 1e-4


AU = struct.pack(">4s5I", b".snd", 24, 2**32 - 1, 6, 16000, 2)  # float32, stereo, without end
RAMP = np.arange(16000, dtype=np.float32) / 2**15
SECOND = np.stack([1.5 * RAMP, 0.5 * RAMP], axis=1).astype(">f4").tobytes()


@LINUX
@pytest.mark.parametrize(
    ("output", "then", "reason"),
    [
        (AU + SECOND, "exit 0", ""),
        (AU + SECOND, "exit 3", r"unreadable after 1\.00 s: ffmpeg: no audio \(exit code 3\)"),
        (b"", "exit 1", r"^Format not recognised; ffmpeg: no audio \(exit code 1\)$"),
        (b"", "echo '[mov @ 0x55] no moov' >&2; exit 1", r"; ffmpeg: no moov \(exit code 1\)$"),
        (b"", "echo libx.so: not found >&2; exit 127", r"; ffmpeg: libx.so: not found \(exit code 127\)$"),
        (b"Hello\n" * 99, "exit 0", "ffmpeg: no audio"),
        (AU, "exit 0", "holds no samples"),
        (b"", "exec sleep 60", "ffmpeg: gave nothing for 2 s"),
    ],
)
def test_ffmpeg_decodes_what_libsndfile_cannot(
    output: bytes, then: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the suffix; a program that fails, hangs or prints rubbish costs no more than its file."""
    (tmp_path / "output").write_bytes(output)
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(f"#!/bin/sh\nset -e\ncat '{tmp_path}/output'\n{then}\n")
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.wav").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(99))
    monkeypatch.setattr("prepare.FFMPEG_SECONDS", 2)
    recording = Recording(tmp_path / "a.wav", Config(sample_rate=16000, duration=0.5))
    if SECOND in output:
        np.testing.assert_array_equal(np.concatenate(list(recording)), RAMP)  # the mean of the channels
        assert re.match(f"{reason}$", recording.warning)
    else:
        with pytest.raises(AudioError, match=reason):
            list(recording)


def put_in_path(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch, *, mode: int = 0o755) -> None:
    """An ffmpeg that is a shell script."""
    (folder / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ffmpeg").chmod(mode)
    monkeypatch.setenv("PATH", str(folder))


@LINUX
@pytest.mark.parametrize(
    ("mode", "script", "reason"),
    [
        (0o644, "#!/bin/sh", "ffmpeg cannot be started: Permission denied"),
        (0o755, "\0", "ffmpeg cannot be started: Exec format error"),
        (0, "", "install ffmpeg, or convert it: ffmpeg -i a.m4a a_.wav"),
    ],
)
def test_ffmpeg_that_cannot_be_started_is_told(
    mode: int, script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    if mode:
        (tmp_path / "bin" / "ffmpeg").write_text(script)
        (tmp_path / "bin" / "ffmpeg").chmod(mode)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(99))
    with pytest.raises(AudioError) as error:
        list(Recording(tmp_path / "a.m4a", WHOLE))
    assert str(error.value) == f"Format not recognised; {reason}"


@LINUX
def test_time_limit_of_ffmpeg_leaves_out_the_time_of_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "output").write_bytes(AU + SECOND)  # more than a pipe holds, so ffmpeg lives on
    monkeypatch.setattr("prepare.FFMPEG_SECONDS", 1)
    (tmp_path / "bin").mkdir()
    cat = shutil.which("cat")
    put_in_path(tmp_path / "bin", f"exec {cat} '{tmp_path}/output'", monkeypatch)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(99))
    recording = Recording(tmp_path / "a.m4a", Config(sample_rate=16000, duration=0.5))
    for _ in recording:
        time.sleep(1)
    assert (recording.seconds, recording.warning) == (1, "")


APPLE_DOUBLE = struct.pack(">2I16x H 3I 3I", 0x00051607, 0x20000, 2, 9, 50, 32, 2, 82, 286)
FORK = struct.pack(">4I", 256, 256, 0, 30).ljust(286, b"\0")


def test_a_macs_file_beside_a_clip_does_not_matter(tmp_path: Path) -> None:
    """Libsndfile takes ._a.mp3 for a part of a.mp3, and refuses both."""
    whole = mp3(tmp_path / "a.mp3")
    (tmp_path / "._a.mp3").write_bytes(APPLE_DOUBLE + bytes(32) + FORK)
    assert heard(whole) == (pytest.approx(1, abs=0.1), "")


@pytest.mark.parametrize("suffix", "au snd gsm vox raw sln g722 ul al sw ub aac mp3".split())
@pytest.mark.parametrize("content", [b"<!doctype html><title>404</title>\n" * 300, b"a,b\nc,d\n" * 40])
def test_suffix_makes_no_audio_of_text(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"page.{suffix}"
    path.write_bytes(content)
    with pytest.raises(AudioError, match="Format not recognised"):
        list(Recording(path, WHOLE))


def mp3(path: Path, *options: str, seconds: float = 1.0) -> Path:
    """Noise that grows louder; without options as libsndfile writes it, with a Xing header."""
    n = round(seconds * 22050)
    noise = np.linspace(0.01, 0.5, n) * np.random.default_rng(0).normal(0, 0.5, n)
    soundfile.write(path if not options else path.with_suffix(".wav"), noise, 22050)
    return ffmpeg(path.with_suffix(".wav"), path, *options) if options else path


def ffmpeg(source: Path, target: Path, *options: str) -> Path:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", source, *options, target]
    subprocess.run(command, check=True)
    return target


def heard(path: Path) -> tuple[float, str]:
    """Seconds of audio, and the warning."""
    recording = Recording(path, Config())
    for _ in recording:
        pass
    return recording.seconds, recording.warning


NEEDS_FFMPEG = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
KINDS = {  # what libsndfile refuses, and how ffmpeg makes it
    "m4a.mp3": "-c:a aac -f ipod",
    "webm.wav": "-c:a libopus -f webm",
    "ac3.wav": "-c:a ac3",
    "wma.wav": "-c:a wmav2",
    "alac.caf": "-c:a alac",
    "f.oga": "-c:a flac",
    "double.wav": "-c:a pcm_s64le",
    "film.avi": "-c:a mp3",
}


@NEEDS_FFMPEG
@pytest.mark.parametrize("name", KINDS)
def test_what_libsndfile_refuses_is_decoded_by_ffmpeg(name: str, tmp_path: Path) -> None:
    clip = ffmpeg(write(tmp_path / "a.wav", seconds=1, rate=22050), tmp_path / name, *KINDS[name].split())
    assert heard(clip) == (pytest.approx(1, abs=0.1), "")


def riff(samples: bytes, *, length: int, rate: int = 22050, after: bytes = b"") -> bytes:
    """A wav of 16 bits whose header tells of `length` bytes."""
    chunk = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVE" + chunk + b"data" + struct.pack("<I", length % 2**32) + samples + after
    return b"RIFF" + struct.pack("<I", (36 + length + len(after)) % 2**32) + body


ONE = (3000 * np.random.default_rng(0).normal(size=22050)).astype("<i2").tobytes()  # a second


def ogg(folder: Path) -> bytes:
    return write(folder / "part.ogg", seconds=1, rate=22050).read_bytes()


LONGER: dict[str, Callable[[Path], bytes]] = {  # than what libsndfile reads: two seconds
    "joined.ogg": lambda folder: 2 * ogg(folder),
    "joined.mp3": lambda folder: 2 * mp3(folder / "part.mp3").read_bytes(),
    "joined.wav": lambda _: 2 * riff(ONE, length=44100),
    "killed.wav": lambda _: riff(ONE + ONE, length=0),
    "stale.wav": lambda _: riff(ONE + ONE, length=44100),
    "killed.au": lambda _: struct.pack(">4s5I", b".snd", 24, 0, 3, 22050, 1) + ONE + ONE,
}


@NEEDS_FFMPEG
@pytest.mark.parametrize("name", LONGER)
def test_what_follows_the_end_is_heard(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(LONGER[name](tmp_path))
    assert heard(tmp_path / name) == (pytest.approx(2, abs=0.15), "")


@pytest.mark.parametrize("name", LONGER)
def test_what_follows_the_end_is_told_without_ffmpeg(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = LONGER[name](tmp_path)
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("PATH", "")
    try:
        seconds, reason = heard(tmp_path / name)
        assert seconds == pytest.approx(1, abs=0.1)
        assert reason.startswith("unreadable after ")
        n_bytes = int(re.findall(r"([\d,]+) of", reason)[0].replace(",", ""))
        assert len(content) / 3 < n_bytes < len(content) * 0.6  # a decoder reads some way ahead
    except AudioError as error:
        reason = str(error)
        assert name in {"joined.wav", "killed.wav", "killed.au"}
    assert "install ffmpeg" in reason


@NEEDS_FFMPEG
def test_wav_above_4_gib_is_heard_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "a.wav").open("wb") as file:
        file.write(riff(b"", length=2**32 + len(ONE)) + 5 * ONE)
        file.truncate(44 + 2**32 + len(ONE))  # a hole in the disk
    windows = list(itertools.islice(Recording(tmp_path / "a.wav", Config()), 2))  # the header tells of 1 s
    assert [window.std() > 0.05 for window in windows] == [True, True]


@NEEDS_FFMPEG
def test_ffmpeg_takes_no_commands_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C that a VOC begins with would ask it to read a command."""
    blocks = bytes.fromhex("011f1108040000" + "80c10001019814008300" + "7e7f969dacabbab1" * 8)
    (tmp_path / "a.voc").write_bytes(b"Creative Voice File\x1a\x1a\0\x14" + blocks)
    monkeypatch.setattr("prepare.FFMPEG_SECONDS", 5)
    assert heard(tmp_path / "a.voc")[0] > 0


@pytest.mark.parametrize("after", [b"LIST", b"id3 ", b"_PMX"])
def test_chunk_after_the_samples_is_no_audio(
    after: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = after + struct.pack("<I", 30_000) + bytes(30_000)
    (tmp_path / "a.wav").write_bytes(riff(ONE, length=44100, after=chunk))
    monkeypatch.setenv("PATH", "")
    assert heard(tmp_path / "a.wav") == (1, "")


def id3(kind: bytes, content: bytes) -> bytes:
    """A tag of one frame."""
    size = 10 + len(content)
    head = b"ID3\3\0\0" + bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127])
    return head + kind + struct.pack(">IH", len(content), 0) + content


@NEEDS_FFMPEG
def test_guess_at_the_length_is_no_promise(tmp_path: Path) -> None:
    bare = ("-write_xing", "0", "-id3v2_version", "0")
    plain = mp3(tmp_path / "plain.mp3", "-b:a", "64k", *bare).read_bytes()
    (tmp_path / "cover.mp3").write_bytes(id3(b"APIC", b"\0image/png\0\3\0" + bytes(99_999)) + plain)
    assert heard(tmp_path / "cover.mp3") == (pytest.approx(1, abs=0.1), "")
    variable = mp3(tmp_path / "variable.mp3", "-q:a", "6", *bare)
    assert heard(variable) == (pytest.approx(1, abs=0.1), "")
    # The first frame is as large as they come: libsndfile counts on few, and stops after these.
    large = mp3(tmp_path / "large.mp3", "-b:a", "160k", *bare).read_bytes()
    small = mp3(tmp_path / "small.mp3", "-b:a", "16k", *bare, seconds=4).read_bytes()
    (tmp_path / "early.mp3").write_bytes(large + small)
    assert heard(tmp_path / "early.mp3") == (pytest.approx(5, abs=0.2), "")
    cut(mp3(tmp_path / "cut.mp3"), 0.5)  # this one has a header that counts
    assert "truncated" in heard(tmp_path / "cut.mp3")[1]


def test_steps_of_windows_overlap() -> None:
    """They start at every step, and the last one still ends at the end."""
    ramp = np.arange(1, 40_001, dtype=np.float32) / 2**17  # each sample tells its place
    recording = Recording(ramp, WHOLE, rate=RATE, step=0.75)
    for window, start in zip(recording, [0, 6000, 12_000, 16_000], strict=True):
        np.testing.assert_array_equal(window, ramp[start : start + 24_000])
        assert recording.seconds == (start + 24_000) / RATE
    assert len(np.concatenate(recording.envelope)) == 100  # 20 a second


# ---- features --------------------------------------------------------------------------------------------

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
@pytest.mark.parametrize(
    "cfg",
    [
        Config(),
        Config(sample_rate=16000, n_mfcc=13, n_mels=40, n_fft=512, hop_length=160),
        Config(sample_rate=8000, n_fft=2000, hop_length=700, n_mels=90, n_mfcc=90),
        TINY,
    ],
    ids=lambda cfg: f"{cfg.sample_rate} Hz, {cfg.n_mels} mels",
)
def test_features_equal_those_of_librosa(cfg: Config) -> None:
    ours = make_mfcc(cfg)
    for name, make in WAVES.items():
        wave = librosa.util.fix_length(make(cfg.sample_rate).astype(np.float32), size=cfg.n_samples)
        features = ours(torch.from_numpy(wave)[None])[0].numpy()
        assert features.shape == (cfg.n_features, cfg.n_frames)
        np.testing.assert_allclose(features, reference(wave, cfg), rtol=0, atol=2e-3, err_msg=name)


def test_frame_of_odd_length_gives_as_many_frames() -> None:
    cfg = replace(TINY, n_fft=511)  # n_samples is a multiple of hop_length
    wave = np.random.default_rng(0).normal(0, 0.1, cfg.n_samples).astype(np.float32)
    features = make_mfcc(cfg)(torch.from_numpy(wave)[None])[0].numpy()
    assert features.shape == (cfg.n_features, cfg.n_frames)
    assert cfg.n_samples % cfg.hop_length == 0
    expected = reference(wave, cfg)[: cfg.n_mfcc]
    np.testing.assert_allclose(features[: cfg.n_mfcc, : expected.shape[1]], expected, rtol=0, atol=2e-3)


def run_code(code: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_no_home_is_needed_for_librosas_cache(tmp_path: Path) -> None:
    code = f"""
import prepare
from config import Config
prepare.mfcc_constants(Config(cache_dir={str(tmp_path / "cache")!r}))
from librosa.util import utils
print(getattr(utils, "__shear_dense").stats.cache_path)
"""
    env = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    where = run_code(code, env)
    assert where.stdout.startswith(str(tmp_path / "cache")), where.stderr


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


@pytest.mark.parametrize(
    ("crash", "lost"),  # a chunk has 16 files
    [(["37"], [range(32, 48)]), (["3", "20", "21", "98"], [range(32), range(96, 100)])],
)
def test_decoder_crash_costs_its_few_neighbours(crash: list[str], lost: list[range]) -> None:
    results = list(map_files(partial(to_numbers, crash=crash), HUNDRED, TWO))
    failures = {number: result for number, result in enumerate(results) if result != number}
    assert len(results) == 100
    assert list(failures) == list(itertools.chain(*lost))
    for failure in failures.values():
        assert isinstance(failure, AudioError)
        assert "crashed the audio decoder" in str(failure)


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


def test_error_in_a_worker_arrives_with_its_traceback() -> None:
    with pytest.raises(ValueError, match="invalid literal for int") as error:
        list(map_files(to_numbers, ["1", "x"], TWO))
    assert "in to_numbers" in error.value.__notes__[0]


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_no_processes_are_done_without(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    assert list(map_files(to_numbers, HUNDRED, TWO)) == list(range(100))
    assert "2 of 2 processes that read clips cannot be started: [Errno 11]" in capsys.readouterr().err


def test_no_semaphores_are_needed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("_multiprocessing.SemLock", refuse)
    assert list(map_files(to_numbers, HUNDRED, TWO)) == list(range(100))
    assert capsys.readouterr().err == ""


def extract_all(paths: Sequence[str]) -> list[float]:
    return [extract(Path(path), make_mfcc(TINY), TINY).seconds for path in paths]


def open_in_vain(descriptor: int) -> None:
    with pytest.raises(soundfile.SoundFileError):
        prepare._SoundFile(descriptor)


@LINUX
def test_clip_that_another_thread_opens_does_not_lock_the_workers(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / f"{number}.wav", seconds=0.4)) for number in range(4)]
    reader, writer = os.pipe()  # opening it waits for what comes
    thread = threading.Thread(target=open_in_vain, args=(reader,))
    thread.start()
    wait_until(soundfile.SoundFile._sf_error_lock.locked)
    timer = threading.Timer(1, os.close, [writer])
    timer.start()
    with multiprocessing.pool.ThreadPool(1) as pool:
        results = pool.apply_async(lambda: list(map_files(extract_all, paths, TWO)))
        assert results.get(timeout=30) == [0.4] * 4
    for other in (thread, timer):
        other.join()
    os.close(reader)


@LINUX
def test_features_can_be_had_after_a_fork() -> None:
    """The threads of OpenMP do not come along."""
    code = """
import os, signal, torch
from config import Config
from prepare import MFCC, mfcc_constants
torch.set_num_threads(2)
constants = mfcc_constants(Config())
MFCC(constants, 512)(torch.zeros(1, 66150))
if (child := os.fork()) == 0:
    signal.alarm(20)
    MFCC(constants, 512)(torch.zeros(1, 66150))
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    answer = run_code(code, env)
    assert answer.stdout == "0\n", answer.stderr


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
    """All windows of some clips, from the cache."""
    cache = FeatureCache(cfg, mfcc)
    first = clips["first_window"]
    windows = cache.read(id_ + k for id_, n in zip(first, clips.n_windows, strict=True) for k in range(n))
    cache.database.close()
    return windows


@pytest.mark.parametrize("n_workers", [0, 2])
def test_cache_gives_what_was_extracted(n_workers: int, tmp_path: Path, mfcc: MFCC) -> None:
    cfg = tiny_config(tmp_path, num_workers=n_workers)
    clips = write_clips(tmp_path / "clips", 20)
    write(tmp_path / "clips" / "3.wav", seconds=0.2)  # one window, and not two as the others have
    table, failures = load_features(clips, cfg, mfcc)
    expected = [extract(Path(path), mfcc, cfg) for path in clips.path]
    assert not failures
    assert list(table.path) == list(clips.path)
    assert list(table.n_windows) == [1 if n == 3 else 2 for n in range(20)]
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
    np.testing.assert_array_equal(read_windows(first, cfg, mfcc), old)  # for a run that is training


def test_cache_is_named_by_what_shapes_the_features(tmp_path: Path) -> None:
    def name(**changes: Any) -> Path:
        cfg = tiny_config(tmp_path, **changes)
        cache = FeatureCache(cfg, make_mfcc(cfg))
        cache.database.close()
        return cache.path

    shaping = [{"sample_rate": 9000}, {"duration": 0.401}, {"max_windows": 3}, {"n_fft": 400}, {"n_mels": 21}]
    assert len({name(), *(name(**changes) for changes in shaping)}) == 6
    assert name(epochs=9, batch_size=9, seed=9, num_workers=1) == name()


def test_cache_of_a_bundled_model_is_that_of_the_same_features(tmp_path: Path) -> None:
    """The last bits of the constants differ between machines, and a checkpoint's mel filters are sparse."""
    cfg = tiny_config(tmp_path)

    def name(**changes: torch.Tensor) -> Path:
        return FeatureCache(cfg, MFCC({**prepare.mfcc_constants(cfg), **changes}, cfg.hop_length)).path

    constants = prepare.mfcc_constants(cfg)
    noise = 1e-9 * torch.randn(constants["deltas"].shape, generator=torch.Generator().manual_seed(0))
    assert name(deltas=constants["deltas"] + noise, mel=constants["mel"].to_sparse()) == name()
    assert name(window=torch.hamming_window(cfg.n_fft)) != name()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOLCK, "No locks available"), "drive cannot lock: wait, or choose another"),
        (NotImplementedError(), "drive cannot lock: wait, or choose another"),
        (PermissionError(errno.EACCES, "Permission denied"), "you may not write there: choose another"),
    ],
    ids=repr,
)
def test_cache_that_cannot_be_locked_is_told(
    error: Exception, remedy: str, tmp_path: Path, mfcc: MFCC, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 2)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(prepare.FileLock, "acquire", fail)
    with pytest.raises(UserError, match=rf"^cache {cfg.cache_dir}/\S+: .+: .*{remedy} --cache_dir$"):
        load_features(clips, cfg, mfcc)


def test_run_says_what_it_waits_for(tmp_path: Path, mfcc: MFCC, capsys: Capture) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 2)
    cache = FeatureCache(cfg, mfcc)
    with cache.lock():
        thread = threading.Thread(target=load_features, args=(clips, cfg, mfcc))
        thread.start()
        said = ""

        def has_said() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return bool(said)

        wait_until(has_said)
        assert said.startswith(f"note: waiting for another run that fills the cache {cache.path}; ")
        assert said.endswith("its drive cannot lock: choose another --cache_dir\n")
        assert cache.lookup() == {}
    thread.join(60)
    assert len(cache.lookup()) == 2


def test_time_of_a_file_may_be_far_off(tmp_path: Path, mfcc: MFCC) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 2)
    os.utime(clips.path[0], ns=(0, 2**63 + 10**9))  # in the year 2262
    os.utime(clips.path[1], ns=(0, -(10**18)))
    if Path(clips.path[0]).stat().st_mtime_ns < 2**63:
        pytest.skip("no such times on this drive")
    for _ in range(2):
        assert len(load_features(clips, cfg, mfcc)[0]) == 2


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
def test_full_disk_is_one_line(tmp_path: Path, mfcc: MFCC, capfd: Capture) -> None:
    cfg, clips = tiny_config(tmp_path, num_workers=1), write_clips(tmp_path / "clips", 60)
    process = start(clips, cfg, mfcc, limit=350_000)
    process.join(60)
    out, err = capfd.readouterr()
    assert (process.exitcode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: cache {cfg.cache_dir}/features-")
    assert len(load_features(clips, cfg, mfcc)[0]) == 60  # once there is room


@pytest.mark.parametrize("damage", ["garbage", "table of clips", "features"])
def test_damaged_cache_is_named_with_the_remedy(damage: str, tmp_path: Path, mfcc: MFCC) -> None:
    cfg, clips = tiny_config(tmp_path), write_clips(tmp_path / "clips", 20)
    table, _ = load_features(clips, cfg, mfcc)
    [path] = Path(cfg.cache_dir).glob("*.sqlite")
    if damage == "garbage":
        path.write_bytes(random.Random(0).randbytes(200_000))
    else:  # one page of 64 kB
        content = path.read_bytes()
        start_of_page = {"table of clips": 1, "features": 3}[damage] * 65536
        path.write_bytes(content[:start_of_page] + bytes(65536) + content[start_of_page + 65536 :])
    with pytest.raises(UserError, match=rf"^cache {path}: .*delete the file$") as error:
        if damage == "features":  # found out when they are read
            read_windows(table, cfg, mfcc)
        load_features(clips, cfg, mfcc)
    assert error.value.code == 1
    path.unlink()
    assert len(load_features(clips, cfg, mfcc)[0]) == 20


# ---- the corpus ------------------------------------------------------------------------------------------


def corpus_of(tmp_path: Path, **options: Any) -> Config:
    """Settings for a new corpus: five clips of each of three classes."""
    return config_of(make_corpus(tmp_path / "data", **{"n_speakers": 5, "n_takes": 1, **options}))


@pytest.mark.parametrize(("n_bad", "code"), [(0, 0), (1, 0), (2, 1), (15, 2)])
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
        prepare.load_corpus(cfg, mfcc)
        capsys.readouterr()
        assert len(prepare.load_corpus(cfg, mfcc)) == 15 - n_bad  # named on every run
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"skipped {path}" for path in bad]


def test_same_audio_is_told(tmp_path: Path, mfcc: MFCC, capsys: Capture) -> None:
    cfg = corpus_of(tmp_path)
    one, other = map(Path, find_clips(cfg).path[:2])
    copy, contradiction = one.with_name("copy.flac"), tmp_path / "data" / "Suprised" / "b.wav"
    wave, rate = soundfile.read(one, dtype="int16")
    soundfile.write(copy, wave, rate)  # the same samples in another format
    contradiction.write_bytes(other.read_bytes())
    again = one.parent / "mirror" / one.name
    again.parent.mkdir()
    again.write_bytes(one.read_bytes())
    found = find_clips(cfg)
    clips = prepare.load_corpus(cfg, mfcc, found)
    assert (len(clips), clips.audio_hash.nunique()) == (17, 15)
    counts = prepare.describe_corpora(found, clips)[["copy", "used"]]
    assert counts.T.to_dict("list") == {"RAVDESS speech": [1, 15], "other": [0, 2]}
    notes = capsys.readouterr().err
    assert "note: 2 group(s) of clips with the same audio" in notes
    assert f"note: same audio under different labels: {other}, {contradiction}\n" in notes


def test_class_without_a_readable_clip_is_left_out(tmp_path: Path, mfcc: MFCC, capsys: Capture) -> None:
    """A single class is enough to score a model on, but not to train one."""
    cfg = corpus_of(tmp_path, emotions=["Angry", "Sad"])
    touch(tmp_path / "data", "Bored/a.wav")
    assert set(prepare.load_corpus(cfg, mfcc).emotion) == {"Angry", "Sad"}
    assert "class Bored has no readable clip: left out" in capsys.readouterr().err
    (tmp_path / "data" / "Bored" / "a.wav").unlink()
    (tmp_path / "data" / "Sad").rename(tmp_path / "data" / "Test")
    clips = prepare.load_corpus(cfg, mfcc)
    assert set(clips.emotion) == {"Angry"}
    with pytest.raises(UserError, match=r"only one class in .*, Angry") as error:
        split(clips, cfg)
    assert error.value.code == 2


def test_script_prints_the_table_and_names_odd_files(tmp_path: Path) -> None:
    """Whatever is in their place, and whatever their names hold."""
    cfg = replace(corpus_of(tmp_path, n_takes=5), num_workers=1)
    sad = Path(cfg.data_dir, "Sad")
    os.mkfifo(sad / "a.wav")
    (sad / "b.wav").symlink_to("/dev/zero")
    (sad / "c.wav").symlink_to("nowhere.wav")
    (sad / "d.wav").symlink_to("d.wav")
    os.mkfifo(sad / "e.WMA")
    (sad / "f.wav").write_text("no audio")
    cut(write(sad / "g.mp3", seconds=1, rate=44100), 0.6)  # its decoder prints
    write_wave(sad / "h.wav", np.zeros(RATE))
    (sad / "h.wav").rename(sad / os.fsdecode(b"h\xff\n.wav"))
    own = [f"--data_dir={cfg.data_dir}", f"--sample_rate={RATE}", "--num_workers=1"]
    answer = run_script("prepare.py", *own, cwd=tmp_path, env={"PATH": str(tmp_path)})  # no ffmpeg
    assert answer.returncode == 0, answer.stderr
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert rows[0] == ["RAVDESS", "speech", "other", "clips", "minutes", "used"]
    assert rows[1] == ["Angry", "25", "0", "25", "0.2"]
    assert rows[2][:4] == ["Sad", "25", "2", "27"]
    assert rows[4][:4] == ["total", "75", "2", "77"]
    assert [*rows[-3:]] == [
        "speakers unreadable used same audio in other corpora".split(),
        "RAVDESS speech 5 0 75 0 0".split(),
        "other 0 6 2 0 0".split(),
    ]
    lines = answer.stderr.splitlines()
    assert lines[:6] == [
        f"skipped {sad}/c.wav: No such file or directory",
        f"skipped {sad}/d.wav: Too many levels of symbolic links",
        f"skipped {sad}/a.wav: not a regular file",
        f"skipped {sad}/b.wav: not a regular file",
        f"skipped {sad}/e.WMA: not a regular file",
        f"skipped {sad}/f.wav: Format not recognised; install ffmpeg, or convert it: ffmpeg -i f.wav f_.wav",
    ]
    assert lines[6].startswith(f"warning: {sad}/g.mp3: truncated: 0.")
    assert lines[7:] == [rf"warning: {sad}/h\udcff\n.wav: silent"]


@pytest.mark.parametrize("place", ["file", "file/cache"])
def test_cache_that_cannot_be_made_names_its_flag(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cfg = tiny_config(tmp_path, cache_dir=str(tmp_path / place))
    with pytest.raises(UserError, match=r"no folder can be made there: choose another --cache_dir"):
        FeatureCache(cfg, make_mfcc(cfg))


# ---- the split -------------------------------------------------------------------------------------------


def make_table(
    counts: dict[tuple[str, str], int] | None = None, n_speakers: int = 10, n_copies: int = 0
) -> pd.DataFrame:
    """Clips as load_corpus gives them, so many of each (corpus, emotion); two of n_copies are copies."""
    counts = counts or {(corpus, label): 40 for corpus in ("CREMA-D", "SAVEE") for label in EMOTIONS}
    rows = [
        (f"{corpus}-{emotion}-{number:03d}.wav", emotion, corpus, f"{corpus} {number % n_speakers}")
        for (corpus, emotion), count in counts.items()
        for number in range(count)
    ]
    clips = pd.DataFrame(rows, columns=["path", "emotion", "corpus", "speaker"], dtype=object)
    clips["audio_hash"] = clips.path
    if n_copies:  # of the clip before it, and of one anywhere
        clips.loc[1::n_copies, "audio_hash"] = clips.audio_hash[::n_copies].to_numpy()
        clips.loc[2::n_copies, "audio_hash"] = np.roll(clips.audio_hash[::n_copies], 7)
    return clips


def test_split_keeps_same_audio_in_one_part() -> None:
    """By speaker it is refused where two speakers have it, as one of them would be on both sides."""
    clips = make_table(n_copies=5)
    assert clips.audio_hash.duplicated().sum() > 40
    parts = split(clips, replace(TINY, split="random"))
    assert set(parts) == {"train", "val", "test"}
    assert parts.groupby(clips.audio_hash).nunique().max() == 1
    with pytest.raises(
        UserError, match=r"same audio under two speakers: .* of CREMA-D 0 and .* of CREMA-D 1"
    ):
        split(clips, replace(TINY, split="speaker"))


def test_split_by_speaker_divides_no_speaker() -> None:
    """The actors of RAVDESS both speak and sing: one speaker in two corpora."""
    clips = make_table({("RAVDESS speech", "Sad"): 60, ("RAVDESS song", "Angry"): 60}, n_speakers=12)
    clips["speaker"] = clips.speaker.str.replace(" speech| song", "", regex=True)
    for seed in range(3):
        parts = split(clips, replace(TINY, split="speaker", seed=seed))
        assert parts.groupby(clips.speaker).nunique().max() == 1
        sizes = parts.groupby(clips.speaker).first().value_counts().to_dict()
        assert sizes == {"train": 6, "val": 3, "test": 3}


@pytest.mark.parametrize("how", ["random", "speaker"])
def test_networks_share_the_test_part_and_together_train_on_all_other_clips(how: str) -> None:
    clips = make_table(n_speakers=20)
    parts = [split(clips, replace(TINY, split=how), member=member) for member in range(1, 9)]
    is_test = parts[0] == "test"
    assert all(((part == "test") == is_test).all() for part in parts)
    assert (np.any([part == "train" for part in parts], axis=0) == ~is_test).all()
    assert len({tuple(part) for part in parts}) == 8


def test_split_by_speaker_deals_each_corpus_alike_and_keeps_small_ones_in_training() -> None:
    clips = make_table({("CREMA-D", "Sad"): 40, ("SAVEE", "Sad"): 40, ("TESS", "Angry"): 40})
    clips.loc[clips.corpus == "TESS", "speaker"] = ["TESS OA", "TESS YA"] * 20
    parts = split(clips, Config(split="speaker", val_fraction=0.2, test_fraction=0.1))
    table = clips.groupby(["corpus", parts]).speaker.nunique().unstack(fill_value=0)
    assert table.loc["CREMA-D"].to_dict() == table.loc["SAVEE"].to_dict() == {"train": 7, "val": 2, "test": 1}
    assert table.loc["TESS"].to_dict() == {"train": 2, "val": 0, "test": 0}


@pytest.mark.parametrize(("n_speakers", "n_folds"), [(2, 0), (2, 2), (3, 0), (3, 3), (4, 2)])
def test_few_speakers_are_validated_on_their_other_clips(n_speakers: int, n_folds: int) -> None:
    """The test speaker is in no other part; the networks validate on other clips of those they train on."""
    clips = make_table({("other", emotion): 40 for emotion in EMOTIONS}, n_speakers, n_copies=8)
    clips["audio_hash"] += clips.speaker
    tested = []
    for fold in range(n_folds or 1):
        parts = [
            split(clips, replace(TINY, split="speaker"), member=member, fold=fold, n_folds=n_folds)
            for member in (1, 2)
        ]
        assert (parts[0] != parts[1]).any()
        speakers = clips.speaker.groupby(parts[0]).agg(set)
        assert speakers["train"] == speakers["val"] == set(clips.speaker) - speakers["test"]
        assert parts[0].groupby(clips.audio_hash).nunique().max() == 1
        n_val = clips[parts[0] == "val"].groupby("emotion").size() / (parts[0] != "test").sum()
        assert n_val.tolist() == pytest.approx([0.25 / 3] * 3, abs=0.05)
        tested += sorted(speakers["test"])
    assert sorted(tested) == sorted(set(clips.speaker)) if n_folds else len(tested) == 1


def test_two_small_corpora_have_a_speaker_to_test_on() -> None:
    clips = make_table({("TESS", "Sad"): 20, ("mine", "Sad"): 20, ("mine", "Angry"): 20}, n_speakers=2)
    parts = split(clips, replace(TINY, split="speaker"))
    assert clips.speaker[parts == "test"].nunique() == 1
    given = clips.speaker.map({"mine 0": "test"}).fillna("train")
    with pytest.raises(UserError, match="0 of 60 clips for validation"):  # these are for training alone
        split(clips.assign(given=given), replace(TINY, split="speaker"))


def test_split_at_random_deals_each_class_of_each_corpus_alike() -> None:
    counts = {("CREMA-D", "Sad"): 200, ("SAVEE", "Sad"): 60, ("SAVEE", "Angry"): 100, ("TESS", "Angry"): 33}
    clips = make_table(counts)
    parts = split(clips, Config(val_fraction=0.1, test_fraction=0.2))
    for (corpus, emotion), count in counts.items():
        shares = parts[(clips.corpus == corpus) & (clips.emotion == emotion)].value_counts()
        assert shares["test"] == pytest.approx(0.2 * count, abs=1)
        assert shares["val"] == pytest.approx(0.1 * count, abs=1)


@pytest.mark.parametrize(
    ("count", "absent"),
    [(1, ["val", "test"]), (2, ["val", "test"]), (3, ["val"]), (4, [])],
)
def test_split_draws_at_least_one_of_three(
    count: int, absent: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenth of three clips would be none; of fewer, training gets all, which is told."""
    clips = make_table({("other", "Angry"): 60, ("other", "Rare"): count})
    parts = split(clips, Config())
    assert set(parts[clips.emotion == "Rare"]) == {"train", "val", "test"} - set(absent)
    lines = [f"warning: no clip of Rare in {part}: too few clips\n" for part in absent]
    assert capsys.readouterr().err == "".join(lines)


@pytest.mark.parametrize("how", ["random", "speaker"])
def test_folds_test_every_clip_once(how: str) -> None:
    clips = make_table(n_copies=8 if how == "random" else 0)
    folds = [split(clips, replace(TINY, split=how), fold=fold, n_folds=5) for fold in range(5)]
    assert (sum((parts == "test").astype(int) for parts in folds) == 1).all()
    for parts in folds:
        assert parts.groupby(clips.audio_hash).nunique().max() == 1
        assert (parts == "test").mean() == pytest.approx(0.2, abs=0.06)
        assert (parts == "val").mean() == pytest.approx(0.25, abs=0.12)


@pytest.mark.parametrize("rare", [1, 2, 4])
def test_folds_share_out_what_is_rarer_than_folds_without_a_word(rare: int, capsys: Capture) -> None:
    """scikit-learn would warn of it."""
    clips = make_table({("other", "Angry"): 40, ("other", "Sad"): 60, ("other", "Rare"): rare})
    folds = [split(clips, TINY, fold=fold, n_folds=5) for fold in range(5)]
    assert (sum((parts == "test").astype(int) for parts in folds) == 1).all()
    for parts in folds:
        assert (parts[clips.emotion == "Angry"] == "test").sum() == 8
    assert set(capsys.readouterr().err.splitlines()) <= {
        f"warning: no clip of Rare in {part}: too few clips" for part in ("train", "val", "test")
    }


def test_given_parts_are_kept_and_the_rest_is_drawn() -> None:
    """As of an official split, or of pseudo-labelled clips that stay in training."""
    clips, n = make_table(), 240
    given = pd.Series("", index=clips.index)
    given[:100], given[100:110] = "train", "test"
    parts = split(clips.assign(given=given), TINY)
    assert (parts[:100] == "train").all()
    assert parts[parts == "test"].index.tolist() == list(range(100, 110))
    assert (parts[110:] == "val").sum() > 20
    given[110:130] = "val"
    parts = split(clips.assign(given=given), TINY)
    assert parts.value_counts().to_dict() == {"train": n - 30, "test": 10, "val": 20}
    with pytest.raises(UserError, match="the parts are given"):
        split(clips.assign(given=given), TINY, n_folds=2)
    with pytest.raises(UserError, match="is given to test and train and val: it can be in one part alone"):
        split(clips.assign(given=given, audio_hash=clips.audio_hash.where(given == "", "same")), TINY)


def test_manifest_and_folders_tell_the_part(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data" / "train", n_speakers=1, n_takes=2)
    make_corpus(tmp_path / "data" / "val", n_speakers=2, n_takes=1)
    found = find_clips(tiny_config(tmp_path))
    assert found.given.tolist() == [Path(path).parts[-3] for path in found.path]
    assert set(found.given) == {"train", "val"}
    some = [str(Path(path).relative_to(tmp_path / "data")) for path in found.path[:2]]
    pd.DataFrame({"filename": some, "part": ["test", "train"]}).to_csv(
        tmp_path / "data" / "manifest.csv", index=False
    )
    assert find_clips(tiny_config(tmp_path)).given[:2].tolist() == ["test", "train"]
    Path(tmp_path, "data", "manifest.csv").write_text(f"filename,part\n{some[0]},holdout\n")
    with pytest.raises(UserError, match="line 2: part 'holdout' must be train, val or test"):
        find_clips(tiny_config(tmp_path))


def test_seed_of_the_split_is_a_matter_of_its_own() -> None:
    clips, cfg = make_table(), TINY
    own = split(clips, replace(cfg, seed=1, split_seed=5), member=2)
    assert own.equals(split(clips, replace(cfg, seed=2, split_seed=5), member=2))
    assert own.equals(split(clips, replace(cfg, seed=5), member=2))
    assert not own.equals(split(clips, replace(cfg, seed=5, split_seed=1), member=2))


def test_equal_seeds_give_equal_parts_whatever_the_order_of_the_clips() -> None:
    clips = make_table()
    parts = split(clips, TINY)
    shuffled = clips.sample(frac=1, random_state=0)
    pd.testing.assert_series_equal(split(shuffled, TINY).sort_index(), parts)
    assert (split(clips, replace(TINY, seed=1)) != parts).sum() > 40
    without_test = split(clips, replace(TINY, test_fraction=0))
    assert without_test.value_counts().to_dict() == {"train": 180, "val": 60}


BY_SPEAKER = {"split": "speaker"}
PAIR = {"Sad": 15, "Angry": 15}


@pytest.mark.parametrize(
    ("counts", "n_speakers", "changes", "n_folds", "reason"),
    [
        ({"Sad": 9}, 3, {}, 0, "only one class in data, Sad: nothing to tell apart"),
        (PAIR, 1, BY_SPEAKER, 0, "there is only one: add another, or pass --split random"),
        ({"Sad": 2, "Angry": 2}, 2, {}, 0, "0 of 4 clips for validation, fewer than"),
        (dict.fromkeys("ABCDE", 3), 1, {}, 0, "5 classes: outside the test part a class needs three clips"),
        (PAIR, 3, {}, 31, "folds = 31: each tests clips of its own, and there are only 30"),
        (PAIR, 4, BY_SPEAKER, 5, "folds = 5: each tests speakers of its own, and there are only 4"),
        ({"Sad": 4, "Angry": 2}, 2, BY_SPEAKER, 0, "outside the test part a class needs three clips"),
        (
            {"A": 4, "B": 4, "C": 2, "D": 1},
            4,
            BY_SPEAKER | {"seed": 2},
            0,
            "4 classes: val_fraction = 0.25: raise it or add clips",
        ),
        (
            {"Sad": 3, "Angry": 2},
            3,
            BY_SPEAKER | {"test_fraction": 0, "val_fraction": 0.9, "seed": 12},
            0,
            "1 of 5 clips for training: lower the fractions",
        ),
    ],
)
def test_too_small_parts_are_refused_with_the_reason(
    counts: dict[str, int], n_speakers: int, changes: dict[str, Any], n_folds: int, reason: str
) -> None:
    clips = make_table({("other", emotion): count for emotion, count in counts.items()}, n_speakers)
    with pytest.raises(UserError) as refusal:
        split(clips, replace(TINY, **changes), n_folds=n_folds)
    assert reason in str(refusal.value)
    assert refusal.value.code == 2


def test_split_by_speaker_refuses_unknown_speakers() -> None:
    clips = make_table()
    clips.loc[:6, "speaker"] = ""
    with pytest.raises(UserError, match=r"speakers of 7 of 240 clips are not known.*--manifest"):
        split(clips, replace(TINY, split="speaker"))
    assert set(split(clips, TINY)) == {"train", "val", "test"}


# ---- demo corpus -----------------------------------------------------------------------------------------


def test_demo_is_a_corpus_that_we_understand(tmp_path: Path) -> None:
    """The same each time, and never replaced."""
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
    again = tmp_path / "again"
    prepare.make_demo(again, n_speakers=2, n_takes=1)
    files, same = ([path.read_bytes() for path in sorted(r.rglob("*.*"))] for r in (root, again))
    assert files == same
    (root / "Test" / "0.wav").write_text("mine")
    prepare.make_demo(root, n_speakers=2, n_takes=1)
    assert (root / "Test" / "0.wav").read_text() == "mine"
