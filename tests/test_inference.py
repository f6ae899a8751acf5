"""From a checkpoint and files to a submission, byte by byte."""

import io
import itertools
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import inference
import train
from config import RUNTIME_FIELDS, SPLIT_FIELDS, Config
from inference import main
from model import Checkpoint, load_checkpoint, save_checkpoint
from tests.conftest import RATE, tone

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = ("config.py", "prepare.py", "model.py", "train.py", "inference.py")
PITCH = {"Angry": 150, "Neutral": 600, "Suprised": 2400}  # the last one spelled as on Kaggle


def write_tone(path: Path, label: str, number: int = 0) -> None:
    """Write a clip of a class, each number a little higher."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(PITCH[label] * (1 + 0.01 * number)), RATE, format="WAV")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that tells the three pitches apart. Read only."""
    folder = tmp_path_factory.mktemp("model")
    for label, number in itertools.product(PITCH, range(8)):
        write_tone(folder / "data" / label / f"{number}.wav", label, number)
    cfg = Config(
        data_dir=str(folder / "data"),
        cache_dir=str(folder / "cache"),
        run_dir=str(folder / "run"),
        checkpoint=str(folder / "best.pth"),
        conv_channels=8,
        gru_hidden=16,
        ensemble=1,
        dropout=0.0,
        batch_size=8,
        epochs=40,
        patience=40,
        learning_rate=1e-2,
        val_fraction=0.25,
        holdout_fraction=0,
        num_workers=0,
        device="cpu",
    )
    metrics = train.fit(cfg)
    assert metrics["val"]["accuracy"] == 1
    return folder / "best.pth"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Path:
    """The working directory: the model, and nothing else yet."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "best_emotion_model.pth")
    return tmp_path


TEST = Path("data/dataset/Test")
TRUTH = {
    "10.wav": "Suprised",
    "2.wav": "Angry",
    "1.wav": "Neutral",
    "b/3.wav": "Angry",
    "a/20.wav": "Suprised",
}


@pytest.fixture
def clips(home: Path) -> Path:
    """Five test clips, two of them in folders."""
    for name, label in TRUTH.items():
        write_tone(home / TEST / name, label)
    return home / TEST


def label(*arguments: object) -> int:
    """Run the script in this process."""
    return main(["--device", "cpu", "--num_workers", "0", *map(str, arguments)])


@pytest.mark.parametrize("name", [".", "data", "fifo", "best_emotion_model.pth"])
def test_submission_that_would_cost_something_is_refused(
    name: str, clips: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a folder it told after all the work, "." was a traceback; the model and devices were replaced."""
    before = Path("best_emotion_model.pth").read_bytes()
    if name == "fifo":
        os.mkfifo(name)
    assert label("--submission", name) == 2
    assert f"submission = {name!r}: " in capfd.readouterr().err.splitlines()[-1]
    assert Path("best_emotion_model.pth").read_bytes() == before
    assert name != "fifo" or Path(name).is_fifo()
    assert clips.is_dir()


@pytest.mark.parametrize("arguments", [[], ["data"]])
@pytest.mark.usefixtures("clips")
def test_no_label_without_probabilities(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """A deviation of 0 made them NaN, and every clip one of the first class."""
    path = Path("best_emotion_model.pth")
    checkpoint = load_checkpoint(path)
    checkpoint.weights["std"].zero_()
    save_checkpoint(path, checkpoint)
    assert label(*arguments) == 1
    output = capfd.readouterr()
    assert "error: the model's probabilities are not finite" in output.err
    assert "wav,Angry" not in output.out
    assert not Path("submission.csv").exists()


def test_sample_that_is_no_csv(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A quote that is never closed: "field larger than field limit", with a traceback."""
    (clips.parent / "sample_submission.csv").write_text('filename,emotion\n"' + "1.wav,Angry\n" * 20_000)
    assert label() == 1
    assert "sample_submission.csv: no CSV: field larger" in capfd.readouterr().err
    assert len(submission()) == len(TRUTH)


def test_every_filled_row_is_named(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        (clips / f"bad{number}.wav").write_bytes(b"")
    assert label("--fill", "Neutral") == 0
    errors = capfd.readouterr().err
    assert all(f"bad{number}.wav: " in errors for number in range(30))


def test_empty_folder_beside_others_is_told(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert label(clips, "empty") == 2
    assert "no audio files in empty" in capfd.readouterr().err
    assert label(clips, "x" * 300) == 2


def test_terminal_is_not_steered_by_class_names(
    clips: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path("best_emotion_model.pth")
    save_checkpoint(path, replace(load_checkpoint(path), labels=("\x1b[2J", "b", "c")))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert label(clips) == 0
    output = capfd.readouterr().out
    assert "\x1b" not in output
    assert "\\x1b[2J" in output


@pytest.mark.parametrize("name", ["a\rb", "\ud800"])
def test_class_names_that_no_csv_can_hold(name: str, clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path("best_emotion_model.pth")
    save_checkpoint(path, replace(load_checkpoint(path), labels=(name, "b", "c")))
    assert label(clips) == 2
    assert "class names that no submission can hold" in capfd.readouterr().err


def test_own_copies_of_a_submission_stay(clips: Path) -> None:
    """Whatever was named submission.csv.*.tmp was taken for half a file of a killed run."""
    own = Path("submission.csv.old.tmp")
    own.touch()
    os.utime(own, (1, 1))
    assert clips.is_dir()
    assert label() == 0
    assert own.exists()


def submission(name: str = "submission.csv") -> list[tuple[str, str]]:
    """The rows of a submission, as pandas reads them."""
    table = pd.read_csv(name, dtype=str, keep_default_na=False)
    assert list(table.columns) == ["filename", "emotion"]
    return list(table.itertuples(index=False, name=None))


def printed(capfd: pytest.CaptureFixture[str]) -> pd.DataFrame:
    """The table that was printed, ids as text, probabilities as numbers."""
    table = pd.read_csv(io.StringIO(capfd.readouterr().out), dtype={"filename": str}, keep_default_na=False)
    assert list(table.columns) == ["filename", "emotion", "confidence", *PITCH]
    return table


# ---- submission -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clips")
def test_submission_to_the_byte(capfd: pytest.CaptureFixture[str]) -> None:
    """Header, every file once, 2 before 10 in every folder, labels spelled as in training, no CR."""
    assert label() == 0
    assert Path("submission.csv").read_bytes() == (
        b"filename,emotion\n1.wav,Neutral\n2.wav,Angry\n10.wav,Suprised\n20.wav,Suprised\n3.wav,Angry\n"
    )
    out, err = capfd.readouterr()
    assert out == "5 rows in submission.csv\n"
    assert "\r" not in err


@pytest.mark.usefixtures("clips")
def test_submission_goes_where_it_is_told() -> None:
    """Into a folder that is made for it, beside nothing."""
    assert label("--submission", "out/mine.csv") == 0
    assert len(submission("out/mine.csv")) == 5
    assert not Path("submission.csv").exists()
    assert [path.name for path in Path("out").iterdir()] == ["mine.csv"]


def test_order_is_natural(home: Path) -> None:
    """Numbers in names count as numbers, wherever they are."""
    names = ["x10y2.wav", "x9y11.wav", "x10y10.wav", "2.wav", "02b.wav", "100.wav", "a.wav"]
    for name in names:
        write_tone(home / TEST / name, "Angry")
    assert label() == 0
    expected = ["2.wav", "02b.wav", "100.wav", "a.wav", "x9y11.wav", "x10y2.wav", "x10y10.wav"]
    assert [name for name, _ in submission()] == expected


def test_other_test_folder(home: Path) -> None:
    """As --test_dir says."""
    write_tone(home / "elsewhere" / "7.wav", "Suprised")
    assert label("--test_dir", "elsewhere") == 0
    assert submission() == [("7.wav", "Suprised")]


def test_labels_are_those_of_the_checkpoint(clips: Path) -> None:
    """Class folders that are renamed, added or sorted otherwise since change nothing."""
    for name in ("Zen", "Aaa", "Surprised"):
        write_tone(clips.parent / name / "1.wav", "Angry")
    assert label() == 0
    assert dict(submission()) == {Path(name).name: emotion for name, emotion in TRUTH.items()}


def test_labels_keep_the_order_of_the_checkpoint(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Renaming the labels in the checkpoint renames the predictions, without being sorted."""
    path = Path("best_emotion_model.pth")
    save_checkpoint(path, replace(load_checkpoint(path), labels=("z", "y", "x")))
    assert label(clips / "2.wav") == 0  # an Angry one, class 0
    header, row = capfd.readouterr().out.splitlines()
    assert header == "filename,emotion,confidence,z,y,x"
    assert row.split(",")[1] == "z"


EDITS = {"n_mfcc: int = 40": "n_mfcc: int = 20", "hop_length: int = 512": "hop_length: int = 256"}


@pytest.mark.usefixtures("clips")
def test_edited_config_changes_no_prediction(home: Path) -> None:
    """What shapes features and network is in the checkpoint; one note says that config.py differs."""
    assert label("--submission", "before.csv") == 0
    (home / "repo").mkdir()
    for name in SCRIPTS:
        text = (REPO / name).read_text()
        for old, new in EDITS.items() if name == "config.py" else ():
            assert text.count(old) == 1
            text = text.replace(old, new)
        (home / "repo" / name).write_text(text)
    command = [sys.executable, str(home / "repo" / "inference.py"), "--device", "cpu"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path("submission.csv").read_bytes() == Path("before.csv").read_bytes()
    model, note = (line for line in result.stderr.splitlines() if line.startswith(("model: ", "note: ")))
    assert model.startswith("model: best_emotion_model.pth, ")
    assert "n_mfcc: 20 -> 40; hop_length: 256 -> 512" in note


# ---- files, folders, patterns ---------------------------------------------------------------------------


def test_probabilities(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They sum to 1, the label is the greatest, and its probability the confidence."""
    assert label(clips) == 0
    table = printed(capfd)
    probabilities = table[list(PITCH)]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=2e-4)
    assert table["emotion"].tolist() == probabilities.idxmax(axis=1).tolist()
    assert table["confidence"].tolist() == probabilities.max(axis=1).tolist()
    truth = {str(clips / name): emotion for name, emotion in TRUTH.items()}
    assert dict(zip(table["filename"], table["emotion"], strict=True)) == truth
    assert not Path("submission.csv").exists()


def test_a_clip_alone_equals_the_clip_among_others(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a file, in a folder, in any batch, and in the submission."""
    label(clips)
    together = printed(capfd).set_index("filename")
    label(clips, "--batch_size", 2)
    for_two = printed(capfd).set_index("filename")
    for path in map(str, sorted(clips.rglob("*.wav"))):
        label(path)
        (alone,) = printed(capfd).itertuples(index=False)
        for row in (together.loc[path], for_two.loc[path]):
            assert row["emotion"] == alone.emotion
            np.testing.assert_allclose(row[list(PITCH)].astype(float), alone[3:], rtol=0, atol=1e-4)
    label()
    emotions = {Path(name).name: emotion for name, emotion in together["emotion"].items()}
    assert dict(submission()) == emotions


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data/dataset/Test/2.wav", "data/dataset/Test/1.wav"], ["2.wav", "1.wav"]),
        (["data/dataset/Test/*.wav"], ["1.wav", "10.wav", "2.wav"]),
        (["data/**/2*.wav"], ["2.wav", "20.wav"]),
        (["data/dataset/Test/a", "data/dataset/Test/1.wav"], ["20.wav", "1.wav"]),
    ],
)
@pytest.mark.usefixtures("clips")
def test_files_folders_and_patterns(
    arguments: list[str], expected: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """In the order given; patterns are for shells that leave them alone."""
    assert label(*arguments) == 0
    names = [Path(name).name for name in printed(capfd)["filename"]]
    assert sorted(names) == sorted(expected) if "**" in arguments[0] else names == expected


def test_name_that_looks_like_a_pattern_is_a_file(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It exists, so it is meant."""
    write_tone(home / "[1]*.wav", "Neutral")
    assert label("[1]*.wav") == 0
    assert printed(capfd)["filename"].tolist() == ["[1]*.wav"]


def test_unreadable_file_among_others(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The others are labelled; the exit code tells."""
    (clips / "1.wav").write_text("no audio")
    assert label(clips / "1.wav", clips / "2.wav") == 1
    out, err = capfd.readouterr()
    assert [Path(line.split(",")[0]).name for line in out.splitlines()[1:]] == ["2.wav"]
    assert "1.wav" in err


def test_nothing_but_unreadable_files(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A batch without a clip is none for the network."""
    (clips / "1.wav").write_text("no audio")
    assert label(clips / "1.wav") == 1
    assert capfd.readouterr().out == "filename,emotion,confidence,Angry,Neutral,Suprised\n"


@pytest.mark.parametrize("arguments", [[], [TEST]], ids=["submission", "table"])
def test_odd_clips_are_used_and_named(
    arguments: list[Path], clips: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Cut and silent clips were labelled like any other, without a word."""
    content = (clips / "2.wav").read_bytes()
    (clips / "2.wav").write_bytes(content[: len(content) // 2])
    soundfile.write(clips / "10.wav", np.zeros(RATE), RATE)
    assert label(*arguments) == 0
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("used ")]
    assert lines == [f"used {TEST}/2.wav: truncated: 0.50 of 1.00 s", f"used {TEST}/10.wav: silent"]
    if arguments:
        assert len(out.splitlines()) == 6
    else:
        assert len(submission()) == 5


@pytest.mark.parametrize("arguments", [[], [TEST]], ids=["submission", "table"])
@pytest.mark.usefixtures("clips")
def test_folder_that_cannot_be_listed(
    arguments: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its clips would be missing from the submission, with exit code 0."""
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert label(*arguments) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"error: {TEST}/a: Permission denied"
    assert not Path("submission.csv").exists()


# ---- names ----------------------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "é.wav") for form in ("NFC", "NFD"))
NAMES = [
    "a,b.wav",
    'say "hi".wav',
    "two\nlines.wav",
    " spaces  .wav",
    "NA.wav",
    "001.wav",
    "1.wav",
    "=1+1.wav",
    "-x.wav",
    "+x.wav",
    "@x.wav",
    "tab\t.wav",
    "#.wav",
    "';--.wav",
    "\N{SNOWMAN}\N{GRINNING FACE}.wav",
    NFC,
    NFD,
]


@pytest.fixture
def odd_names(home: Path) -> list[str]:
    """Test clips with names that a CSV can hold, but not every writer of CSVs."""
    for name in NAMES:
        write_tone(home / TEST / name, "Neutral")
    found = {path.name for path in (home / TEST).iterdir()}
    if found != set(NAMES):
        pytest.skip("this file system changes names")
    return NAMES


def test_odd_names_come_back_from_the_submission(odd_names: list[str]) -> None:
    """Unchanged, each once: 001 stays text, NA is not missing, NFC and NFD differ."""
    assert label() == 0
    rows = submission()
    assert sorted(name for name, _ in rows) == sorted(odd_names)
    assert {emotion for _, emotion in rows} == {"Neutral"}


def test_odd_names_come_back_from_the_table(odd_names: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """As paths."""
    assert label(TEST) == 0
    assert sorted(printed(capfd)["filename"]) == sorted(str(TEST / name) for name in odd_names)


@pytest.mark.parametrize(
    ("name", "shown"), [(b"cr\r.wav", r"cr\r.wav"), (b"latin-\xe9.wav", r"latin-\udce9.wav")]
)
@pytest.mark.parametrize("arguments", [[], [TEST]], ids=["submission", "table"])
@pytest.mark.usefixtures("clips")
def test_name_that_no_csv_can_hold_is_refused(
    name: bytes,
    shown: str,
    arguments: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Before any work, by a name that is safe to print."""
    try:
        shutil.copy(TEST / "1.wav", TEST / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system refuses the name itself")
    monkeypatch.setattr(inference, "iter_features", lambda *_: pytest.fail("work was done"))
    assert label(*arguments) == 2
    assert shown in capfd.readouterr().err
    assert not Path("submission.csv").exists()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_terminal_escapes_are_shown_on_a_terminal(
    is_terminal: bool, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name must not clear the screen or set its title; in a pipe it stays what it is."""
    name = "\x1b]0;owned\x07\n.wav"
    write_tone(home / TEST / name, "Neutral")
    write_tone(home / TEST / "x\x1b[2J" / "bad.wav", "Neutral")
    (home / TEST / "x\x1b[2J" / "bad.wav").write_bytes(b"")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert label(TEST) == 1
    out, err = capsys.readouterr()
    assert ("\x1b" in out) is not is_terminal
    assert (r"\x1b]0;owned\x07\n.wav" in out) is is_terminal
    assert "\x1b" not in err
    assert r"x\x1b[2J/bad.wav: " in err


def test_one_name_in_two_folders_is_refused(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ids are file names, so that they would collide."""
    write_tone(clips / "a" / "1.wav", "Angry")
    assert label() == 1
    assert "1.wav is in 2 folders" in capfd.readouterr().err
    assert not Path("submission.csv").exists()


# ---- unreadable clips and failing writes ----------------------------------------------------------------


def test_unreadable_clip_stops_the_submission(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is named, and an earlier submission is as it was: never a default label."""
    Path("submission.csv").write_text("earlier")
    (clips / "2.wav").write_bytes(b"")
    (clips / "10.wav").write_text("<html>")
    assert label() == 1
    err = capfd.readouterr().err
    assert "2.wav: " in err
    assert "10.wav: " in err
    assert "error: submission.csv not written: 2 of 5" in err
    assert Path("submission.csv").read_text() == "earlier"


def test_fill_labels_what_cannot_be_read(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only when asked for, and counted."""
    (clips / "2.wav").write_bytes(b"")
    assert label("--fill", "Neutral") == 0
    assert dict(submission()) == {**{Path(k).name: v for k, v in TRUTH.items()}, "2.wav": "Neutral"}
    err = capfd.readouterr().err
    assert "2.wav: " in err
    assert "1 of 5 rows are not predictions but filled with Neutral" in err


@pytest.mark.usefixtures("clips")
def test_fill_must_be_a_class(capfd: pytest.CaptureFixture[str]) -> None:
    """The right spelling is shown."""
    assert label("--fill", "Surprised") == 2
    assert "fill = 'Surprised': must be one of Angry, Neutral, Suprised" in capfd.readouterr().err


@pytest.mark.usefixtures("clips")
def test_failing_write_leaves_the_earlier_submission(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A full disk, seen at the last moment."""

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device", "submission.csv")

    Path("submission.csv").write_text("earlier")
    monkeypatch.setattr(os, "fsync", full)
    assert label() == 1
    assert "error: submission.csv: No space left on device" in capfd.readouterr().err
    assert Path("submission.csv").read_text() == "earlier"
    assert not list(Path().glob("*.tmp"))


# ---- sample submission ----------------------------------------------------------------------------------

IDS = ["1.wav", "2.wav", "10.wav", "20.wav", "3.wav"]


def sample_of(ids: Sequence[str], header: str = "filename,emotion", emotion: str = "Angry") -> str:
    """The text of a sample submission."""
    return "\n".join([header, *(f"{name},{emotion}" for name in ids)]) + "\n"


BARE = "filename,emotion\n" + "\n\n".join(IDS)  # without labels, and with empty lines


@pytest.mark.parametrize("folder", ["data/dataset", "data"])
@pytest.mark.parametrize("text", [sample_of(IDS), sample_of(IDS[::-1]), "\ufeff" + sample_of(IDS), BARE])
@pytest.mark.usefixtures("clips")
def test_sample_that_agrees(folder: str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In any order, with or without a byte order mark, in data_dir or above it."""
    Path(folder, "sample_submission.csv").write_text(text, encoding="utf-8")
    assert label() == 0
    out, err = capfd.readouterr()
    assert "ids as in" in out
    assert "warning" not in err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (sample_of([*IDS, "77.wav"]), ": 1 ids without a file: 77.wav\n"),
        (sample_of(IDS[:-1]), ": 1 files without an id: 3.wav\n"),
        (sample_of([*IDS, "2.wav"]), ": 1 ids listed twice: 2.wav\n"),
        (sample_of(IDS, "id,label"), ": header id,label, not filename,emotion\n"),
        (sample_of(IDS, emotion="Surprised"), ": 1 labels we do not know: Surprised\n"),
        ("", ": header , not filename,emotion\n"),
        (sample_of([*IDS, *"abcdef"]), ": 6 ids without a file: a, b, c, d, e\n"),
    ],
)
@pytest.mark.usefixtures("clips")
def test_sample_that_differs_is_told(text: str, named: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The submission is written, for a sample can be stale, but the exit code says that it is in doubt."""
    Path("data/dataset/sample_submission.csv").write_text(text)
    assert label() == 1
    out, err = capfd.readouterr()
    assert named in err
    assert "ids as in" not in out
    assert len(submission()) == 5


@pytest.mark.usefixtures("clips")
def test_sample_in_another_encoding_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    """As some spreadsheets write it."""
    Path("data/dataset/sample_submission.csv").write_bytes(sample_of([*IDS, "caf\xe9.wav"]).encode("latin-1"))
    assert label() == 1
    assert r": 1 ids without a file: caf\udce9.wav" in capfd.readouterr().err


# ---- refusals -------------------------------------------------------------------------------------------


def no_test_folder() -> None:
    """Nothing at all."""


def empty_test_folder() -> None:
    """A folder with something else in it."""
    TEST.mkdir(parents=True)
    (TEST / "notes.txt").touch()


@pytest.mark.parametrize(
    ("prepare", "arguments", "named"),
    [
        (no_test_folder, [], "no test folder data/dataset/Test"),
        (empty_test_folder, [], "no audio files below data/dataset/Test"),
        (empty_test_folder, [TEST], "no audio files in data/dataset/Test"),
        (no_test_folder, ["no/*.wav"], "no/*.wav: no such file"),
        (no_test_folder, ["gone.wav"], "gone.wav: no such file"),
        (no_test_folder, ["--checkpoint", "other.pth"], "no checkpoint other.pth: train one with"),
    ],
)
@pytest.mark.usefixtures("home")
def test_nothing_to_work_on(
    prepare: Callable[[], None], arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line, and no submission."""
    prepare()
    assert label(*arguments) == 2
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert named in err[-1]
    assert not Path("submission.csv").exists()


@pytest.fixture
def pretrained(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Right after cloning: no model of one's own, but the one in assets; and a clip."""
    path = home / "assets" / "pretrained.pth"
    path.parent.mkdir()
    Path("best_emotion_model.pth").rename(path)
    monkeypatch.setattr(inference, "PRETRAINED", path)
    write_tone(Path("a.wav"), "Neutral")
    return path


def test_pretrained_model_stands_in(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label("a.wav") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith("a.wav,Neutral,")
    assert "no best_emotion_model.pth yet" in err
    assert f"model: {pretrained}, " in err


def test_own_model_goes_before_the_pretrained_one(
    pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(pretrained, "best_emotion_model.pth")
    pretrained.write_text("damaged")
    assert label("a.wav") == 0
    err = capsys.readouterr().err
    assert "pretrained" not in err
    assert "model: best_emotion_model.pth, " in err


@pytest.mark.parametrize("arguments", [["--checkpoint", "other.pth"], ["--demo"], []])
def test_pretrained_model_is_no_silent_default(
    arguments: list[str], pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not for a model asked for by name, nor for the demo's, nor for one's own that is damaged."""
    if not arguments:
        Path("best_emotion_model.pth").write_text("damaged")
    assert label(*arguments, "a.wav") == 2
    assert pretrained.name not in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--n_mfcc=20", "--gru_hidden=8", "--seed=1", "--epochs=3"])
@pytest.mark.usefixtures("clips")
def test_flag_that_contradicts_the_checkpoint_is_refused(
    flag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is baked into the model cannot be changed after training."""
    with pytest.raises(SystemExit) as stop:
        label(flag)
    assert stop.value.code == 2
    assert flag.strip("-").partition("=")[0] in capfd.readouterr().err
    assert not Path("submission.csv").exists()


@pytest.mark.usefixtures("clips")
def test_weights_of_another_network_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """Config and weights of the checkpoint contradict each other."""
    path = Path("best_emotion_model.pth")
    good: Checkpoint = load_checkpoint(path)
    save_checkpoint(path, replace(good, config=replace(good.config, gru_hidden=32)))
    assert label() == 2
    assert "do not fit the network" in capfd.readouterr().err


# ---- output ---------------------------------------------------------------------------------------------


def buffered() -> dict[str, str]:
    """The environment of most users, where a pipe is written to in blocks and at the end."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("n_lines", [0, 1])
def test_reader_that_leaves_early_is_no_fault(n_lines: int, clips: Path) -> None:
    """As in `python inference.py clips | head -1`: no traceback, not even as the interpreter ends."""
    command = [sys.executable, str(REPO / "inference.py"), "--device", "cpu", str(clips)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered()
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        for _ in range(n_lines):
            run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read()
    assert not [line for line in errors.splitlines() if not line.startswith(("model: ", "note: "))]
    assert run.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_output_that_cannot_be_written_is_an_error(clips: Path) -> None:
    """As in `python inference.py clips > file` on a full disk: half a table must not look like success."""
    command = [sys.executable, str(REPO / "inference.py"), "--device", "cpu", str(clips)]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command, check=False, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered()
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_untrained_network_is_refused(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """last.pth of a run that was stopped in its first epoch."""
    checkpoint = replace(load_checkpoint(Path("best_emotion_model.pth")), epoch=0)
    save_checkpoint(Path("last.pth"), checkpoint)
    assert main(["--checkpoint", "last.pth", "--device", "cpu", str(clips)]) == 2
    assert "untrained" in capfd.readouterr().err


@pytest.mark.usefixtures("clips")
def test_demo_labels_never_replace_real_ones(capfd: pytest.CaptureFixture[str]) -> None:
    """A model of real clips and --demo, or the other way round, is a mistake."""
    Path("submission.csv").write_text("precious")
    assert main(["--demo", "--device", "cpu"]) == 2
    checkpoint = load_checkpoint(Path("best_emotion_model.pth"))
    save_checkpoint(Path("demo.pth"), replace(checkpoint, config=replace(checkpoint.config, demo=True)))
    assert main(["--checkpoint", "demo.pth", "--device", "cpu"]) == 2
    lines = capfd.readouterr().err.splitlines()
    mine, theirs = (line for line in lines if line.startswith("error: "))
    assert "was trained on your corpus, not on the demo corpus: set --demo to match" in mine
    assert "was trained on the demo corpus, not on your corpus: set --demo to match" in theirs
    assert Path("submission.csv").read_text() == "precious"


@pytest.mark.usefixtures("home")
def test_model_of_the_demo_labels_the_demo(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its test clips are made first, and no other ones are labelled; one note says what it is worth."""
    checkpoint = load_checkpoint(Path("best_emotion_model.pth"))
    save_checkpoint(Path("demo.pth"), replace(checkpoint, config=replace(checkpoint.config, demo=True)))
    monkeypatch.setattr(inference, "make_demo", lambda folder: write_tone(folder / "Test/1.wav", "Angry"))
    write_tone(Path("mine/2.wav"), "Angry")
    assert label("--demo", "--checkpoint", "demo.pth", "--test_dir", "mine") == 0
    assert submission() == [("1.wav", "Angry")]
    assert capfd.readouterr().err.count("synthetic demo corpus") == 1


def test_empty_path_is_refused(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An unset shell variable must not label everything below the current folder."""
    assert main(["--device", "cpu", str(clips), ""]) == 2
    assert "empty path" in capfd.readouterr().err


def test_other_test_folder_has_a_sample_of_its_own(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The sample in data_dir lists other clips."""
    Path("data/dataset/sample_submission.csv").write_text(sample_of(["77.wav"]))
    shutil.copytree(clips, "other/clips")
    arguments = ["--test_dir", "other/clips", "--device", "cpu"]
    assert main(arguments) == 0
    Path("other/sample_submission.csv").write_text(sample_of(["78.wav"]))
    assert main(arguments) == 1
    assert "78.wav" in capfd.readouterr().err


@pytest.mark.usefixtures("home")
def test_threads_are_given_back() -> None:
    """It works with one, and whoever trains next in this process wants all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["no_such_clip.wav"]) == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_bundled_model_is_that_of_the_default_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small enough to clone, free of paths of the machine it was made on, and it labels a clip."""
    assert inference.PRETRAINED.stat().st_size < 6 * 2**20
    checkpoint = load_checkpoint(inference.PRETRAINED)
    assert not checkpoint.config.differences(Config(), ignore=RUNTIME_FIELDS | SPLIT_FIELDS)
    texts = [value for value in checkpoint.config.to_dict().values() if isinstance(value, str)]
    assert not any(Path(text).is_absolute() for text in texts)
    write_tone(tmp_path / "a.wav", "Angry")
    assert label("--checkpoint", inference.PRETRAINED, tmp_path / "a.wav") == 0
    _, row = capsys.readouterr().out.splitlines()
    probabilities = [float(value) for value in row.split(",")[3:]]
    assert len(probabilities) == 7
    assert sum(probabilities) == pytest.approx(1, abs=1e-3)
