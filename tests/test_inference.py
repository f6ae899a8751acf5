"""From a trained model and files to a submission, byte by byte, or to a table of probabilities."""

import io
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import inference
import train
from config import Config, UserError
from inference import compare_with_sample, expand_paths, predict
from model import load_checkpoint
from prepare import AudioError, make_demo
from tests.conftest import RATE, TINY, flags, make_corpus, run_script, script_command, tiny_config, tone

LABELS = ["Angry", "Sad", "Suprised"]  # the last one spelled as on Kaggle
PITCH = {"Angry": 200, "Suprised": 400, "Sad": 800}  # of make_corpus, where Suprised is Happy
TEST = Path("data/dataset/Test")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that tells the three pitches apart. Read only."""
    folder = tmp_path_factory.mktemp("model")
    (make_corpus(folder / "data") / "Happy").rename(folder / "data" / "Suprised")
    learning = {"epochs": 12, "min_steps": 10, "learning_rate": 1e-2, "ema_decay": 0.9, "conv_channels": 8}
    train.train(tiny_config(folder, dropout=0.0, conv_dropout=0.0, gru_hidden=8, **learning))
    return folder / "best.pth"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Path:
    """The working directory: the model, and nothing else yet."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "best_emotion_model.pth")
    return tmp_path


def write_clip(path: Path, label: str, seconds: float = 0.5) -> None:
    """Write a clip of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.01 * np.random.default_rng(0).normal(size=round(seconds * RATE))
    soundfile.write(path, tone(PITCH[label], seconds) + noise, RATE, format="WAV")


TRUTH = {"10.wav": "Suprised", "2.wav": "Angry", "1.wav": "Sad", "b/3.wav": "Angry", "a/20.wav": "Suprised"}


@pytest.fixture
def clips(home: Path) -> Path:
    """Five test clips, two of them in folders."""
    for name, label in TRUTH.items():
        write_clip(home / TEST / name, label)
    return TEST


def label(*paths: object, fill: str = "", **settings: Any) -> int:
    """The script's work, in this process."""
    cfg = Config(device="cpu", num_workers=0, **settings)
    return inference.main(cfg, Namespace(paths=list(map(str, paths)), fill=fill, demo=False, **settings))


def submission(name: str = "submission.csv") -> list[tuple[str, str]]:
    """The rows of a submission, as pandas reads them."""
    table = pd.read_csv(name, dtype=str, keep_default_na=False)
    assert list(table.columns) == ["filename", "emotion"]
    return list(table.itertuples(index=False, name=None))


def printed(text: str) -> pd.DataFrame:
    """The table that was printed, names as text, probabilities as numbers."""
    table = pd.read_csv(io.StringIO(text), dtype={"filename": str}, keep_default_na=False)
    assert list(table.columns) == ["filename", "emotion", "confidence", "seconds", *LABELS]
    return table


# ---- submission ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clips")
def test_submission_to_the_byte(home: Path) -> None:
    """Header, every file once, 2 before 10 in every folder, labels as the folders were spelled, no CR."""
    result = run_script("inference.py", cwd=home)
    assert result.returncode == 0, result.stderr
    assert Path("submission.csv").read_bytes() == (
        b"filename,emotion\n1.wav,Sad\n2.wav,Angry\n10.wav,Suprised\n20.wav,Suprised\n3.wav,Angry\n"
    )
    assert result.stdout == "5 rows in submission.csv\n"
    model, edited = result.stderr.splitlines()
    assert model == "model: best_emotion_model.pth, 1 network trained on 24 clips of 3 classes"
    assert edited == "note: settings are those of the model, not of config.py"  # which has larger ones
    assert {path.name for path in home.iterdir()} == {"best_emotion_model.pth", "data", "submission.csv"}


def test_order_is_natural(home: Path) -> None:
    """Numbers in names count as numbers, wherever they are."""
    names = ["x10y2.wav", "x9y11.wav", "x10y10.wav", "2.wav", "02b.wav", "100.wav", "a.wav"]
    for name in names:
        write_clip(home / "elsewhere" / name, "Angry")
    assert label(test_dir="elsewhere", submission="out/mine.csv") == 0
    expected = ["2.wav", "02b.wav", "100.wav", "a.wav", "x9y11.wav", "x10y2.wav", "x10y10.wav"]
    assert [name for name, _ in submission("out/mine.csv")] == expected
    assert [path.name for path in Path("out").iterdir()] == ["mine.csv"]


SETTINGS = {
    "n_mfcc": 20,
    "sample_rate": 16000,
    "duration": 1.0,
    "ensemble": 2,
    "gru_hidden": 6,
    "batch_size": 3,
}


@pytest.mark.usefixtures("clips")
def test_edited_config_changes_no_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    """What shapes features and network is that of the checkpoint; so are the labels and their order."""
    for name in ("Aaa", "Surprised"):
        write_clip(Path("data/dataset") / name / "1.wav", "Angry")
    assert label(TEST) == 0
    plain = capsys.readouterr().out
    assert label(TEST, **SETTINGS) == 0
    assert capsys.readouterr().out == plain
    assert label(**SETTINGS) == 0
    assert dict(submission()) == {Path(name).name: emotion for name, emotion in TRUTH.items()}


@pytest.mark.parametrize("damage", ["empty", "text", "gone"])
def test_unreadable_clip_keeps_the_earlier_submission(
    damage: str, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never a label out of nothing: exit code 1, and the file is named."""
    Path("submission.csv").write_text("precious")
    if damage == "gone":
        (clips / "2.wav").unlink()
        (clips / "2.wav").symlink_to("nowhere.wav")
    else:
        (clips / "2.wav").write_text("" if damage == "empty" else "<!DOCTYPE html>" * 200)
    with pytest.raises(UserError, match=r"submission\.csv not written: 1 of 5 .* --fill LABEL") as error:
        label()
    assert error.value.code == 1
    assert f"skipped {clips / '2.wav'}: " in capsys.readouterr().err
    assert Path("submission.csv").read_text() == "precious"


def test_fill_labels_unreadable_clips_and_names_each(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [f"bad{number}.wav" for number in range(30)]
    for name in bad:
        (clips / name).write_bytes(b"")
    assert label(fill="Sad") == 0
    rows = dict(submission())
    assert {rows.pop(name) for name in bad} == {"Sad"}
    assert rows == {Path(name).name: emotion for name, emotion in TRUTH.items()}
    errors = capsys.readouterr().err
    assert all(f"skipped {clips / name}: " in errors for name in bad)
    assert "warning: 30 of 35 rows are no predictions but filled with Sad" in errors


@pytest.mark.usefixtures("clips")
def test_fill_with_an_unknown_label_is_refused() -> None:
    with pytest.raises(UserError, match="fill = 'Surprised': must be one of Angry, Sad, Suprised") as error:
        label(fill="Surprised")
    assert error.value.code == 2
    assert not Path("submission.csv").exists()


@pytest.mark.parametrize("settings", [{"fill": "Sad"}, {"submission": "mine.csv"}, {"test_dir": "clips"}])
def test_options_of_the_submission_beside_paths_are_refused(settings: dict[str, str], clips: Path) -> None:
    """Whoever gives both expects a file that would not be written."""
    with pytest.raises(UserError, match="is for the test folder: leave it out, or the files") as error:
        label(clips, **settings)
    assert error.value.code == 2


def test_same_name_in_two_folders_is_refused(clips: Path) -> None:
    """The competition knows clips by their names alone."""
    write_clip(clips / "b" / "1.wav", "Sad")
    with pytest.raises(UserError, match=r"1\.wav is in 2 folders") as error:
        label()
    assert error.value.code == 1
    assert not Path("submission.csv").exists()


@pytest.mark.usefixtures("clips")
def test_submission_in_the_place_of_a_folder_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="submission = 'data': must be a file"):
        label(submission="data")


SAMPLE = "filename,emotion\n1.wav,Sad\n2.wav,Sad\n3.wav,Sad\n"


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (SAMPLE, []),
        (SAMPLE.replace("1.wav,Sad\n", "") + "1.wav,Angry\n", []),  # any order
        (SAMPLE + "4.wav,Sad\n05.wav,Sad\n", ["2 ids without a file: 4.wav, 05.wav"]),
        (SAMPLE.replace("2.wav,Sad\n", ""), ["1 files without an id: 2.wav"]),
        (SAMPLE + "3.wav,Sad\n", ["1 ids listed twice: 3.wav"]),
        (SAMPLE.replace("3.wav,Sad", "3.wav,Happy"), ["1 labels we do not know: Happy"]),
        (SAMPLE.replace("filename", "id"), ["header id,emotion, not filename,emotion"]),
        ("", ["not a CSV file: No columns to parse from file"]),
    ],
)
def test_sample_submission_is_compared(sample: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text(sample)
    ours = pd.DataFrame({"filename": ["1.wav", "2.wav", "3.wav"], "emotion": "Sad"})
    assert compare_with_sample(tmp_path / "sample.csv", ours, LABELS) == expected


@pytest.mark.parametrize("folder", ["data/dataset", "data"])
@pytest.mark.usefixtures("clips")
def test_sample_beside_the_data_is_found(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal ids are told; others are an incomplete result, though the submission is written."""
    sample = Path(folder, "sample_submission.csv")
    names = ["1.wav", "2.wav", "3.wav", "10.wav", "20.wav"]
    sample.write_text("filename,emotion\n" + "".join(f"{name},Sad\n" for name in names))
    assert label() == 0
    assert capsys.readouterr().out == f"5 rows in submission.csv, ids as in {sample}\n"
    sample.write_text("filename,emotion\n" + "".join(f"{name},Sad\n" for name in names[1:]))
    assert label() == 1
    output = capsys.readouterr()
    assert output.out == f"5 rows in submission.csv; not as in {sample}\n"
    assert f"warning: {sample}: 1 files without an id: 1.wav\n" in output.err
    assert len(submission()) == 5


# ---- names -----------------------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "é.wav") for form in ("NFC", "NFD"))
NAMES = [
    *("a,b.wav", 'say "hi".wav', "two\nlines.wav", " spaces  .wav", "NA.wav", "001.wav", "1.wav"),
    *("=1+1.wav", "-x.wav", "+x.wav", "@x.wav", "tab\t.wav", "#.wav", "';--.wav"),
    *("\N{SNOWMAN}\N{GRINNING FACE}.wav", NFC, NFD),
]


def test_odd_names_come_back_unchanged(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the submission and from the table: 001 stays text, NA is not missing, NFC and NFD differ."""
    for name in NAMES:
        write_clip(home / TEST / name, "Sad")
    if {path.name for path in TEST.iterdir()} != set(NAMES):
        pytest.skip("this file system changes names")
    assert label() == 0
    assert sorted(submission()) == sorted((name, "Sad") for name in NAMES)
    capsys.readouterr()
    assert label(TEST) == 0
    table = printed(capsys.readouterr().out)
    assert sorted(table.filename) == sorted(str(TEST / name) for name in NAMES)


@pytest.mark.skipif(sys.platform in {"win32", "darwin"}, reason="such names cannot be")
@pytest.mark.parametrize("name", ["cr\rx.wav", os.fsdecode(b"\xff.wav")])
@pytest.mark.parametrize("paths", [[], [TEST]], ids=["submission", "table"])
def test_name_that_no_csv_keeps_is_refused_before_any_work(
    name: str, paths: list[Path], clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (clips / "zz").mkdir()
    shutil.copy(clips / "1.wav", clips / "zz" / name)
    with pytest.raises(UserError, match="which no CSV keeps: rename it") as error:
        label(*paths)
    assert error.value.code == 2
    assert capsys.readouterr().out == ""
    assert not Path("submission.csv").exists()


# ---- files, folders, patterns ----------------------------------------------------------------------------


def test_table_of_probabilities(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They sum to 1, the label is the greatest, and its probability the confidence; no file is written."""
    assert label(clips) == 0
    table = printed(capsys.readouterr().out)
    np.testing.assert_allclose(table[LABELS].sum(axis=1), 1, atol=2e-4)
    assert table.emotion.tolist() == table[LABELS].idxmax(axis=1).tolist()
    assert table.confidence.tolist() == table[LABELS].max(axis=1).tolist()
    assert (table.seconds == 0.5).all()
    truth = {str(clips / name): emotion for name, emotion in TRUTH.items()}
    assert dict(zip(table.filename, table.emotion, strict=True)) == truth
    assert not Path("submission.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["2.wav", "1.wav", "2.wav"], ["2.wav", "1.wav", "2.wav"]),
        (["*.wav"], ["1.wav", "10.wav", "2.wav"]),
        (["**/2*.wav"], ["2.wav", "a/20.wav"]),
        (["a", "1.wav"], ["a/20.wav", "1.wav"]),
        (["."], ["1.wav", "2.wav", "10.wav", "a/20.wav", "b/3.wav"]),
        (["[1]*.wav"], ["[1]*.wav"]),  # a file of that name is meant
    ],
)
def test_files_folders_and_patterns(
    arguments: list[str], expected: list[str], clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order given, folders in natural order; patterns are for shells that leave them alone."""
    monkeypatch.chdir(clips)
    if arguments == expected:
        shutil.copy("1.wav", expected[-1])
    assert [path.as_posix() for path in expand_paths(arguments)] == expected


@pytest.mark.parametrize("argument", ["", "nothing.wav", "*.flac", "empty", "x" * 300])
def test_path_that_leads_to_no_clip_is_refused(argument: str, clips: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"no such file or folder|no audio files in empty") as error:
        label(clips, argument)
    assert error.value.code == 2


@pytest.mark.parametrize("folder", ["empty", "nowhere"])
@pytest.mark.usefixtures("home")
def test_test_folder_without_clips_is_refused(folder: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=f"no (audio files in|test folder) {folder}") as error:
        label(test_dir=folder)
    assert error.value.code == 2


def test_unreadable_file_among_others(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are labelled; the exit code tells."""
    (clips / "1.wav").write_text("no audio")
    assert label(clips / "1.wav", clips / "2.wav") == 1
    output = capsys.readouterr()
    assert printed(output.out).filename.tolist() == [str(clips / "2.wav")]
    assert f"skipped {clips / '1.wav'}: " in output.err


@pytest.mark.parametrize("paths", [[], [TEST]], ids=["submission", "table"])
def test_odd_clips_are_used_and_warned_of(
    paths: list[Path], clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(clips / "4.flac", np.random.default_rng(0).normal(size=4 * RATE) / 9, RATE)
    content = (clips / "4.flac").read_bytes()
    (clips / "4.flac").write_bytes(content[: len(content) // 2])
    soundfile.write(clips / "10.wav", np.zeros(RATE), RATE)
    assert label(*paths) == 0
    cut, silent = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert re.match(f"warning: {TEST}/4.flac: (truncated: |unreadable after )[12].", cut)
    assert silent == f"warning: {TEST}/10.wav: silent"


def predictions(paths: list[Path], checkpoint: Path, **settings: Any) -> list[np.ndarray]:
    """Probabilities of clips."""
    stored, model = load_checkpoint(checkpoint)
    cfg = Config(**{**vars(stored.config), "num_workers": 0, **settings})
    found = []
    for _, result in predict(list(map(str, paths)), model, cfg):
        assert not isinstance(result, AudioError)
        found.append(result.probabilities)
    return found


def test_clip_alone_equals_the_clip_among_others(clips: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Long ones among them, in this process or in workers, and read again."""
    write_clip(tmp_path / "long.wav", "Sad", 30)
    paths = [tmp_path / "long.wav", *sorted(clips.rglob("*.wav")) * 4]
    together = predictions(paths, checkpoint)
    assert len({result.argmax() for result in together}) == 3
    alone = [predictions([path], checkpoint)[0] for path in paths]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(predictions(paths, checkpoint, num_workers=2), together, rtol=0, atol=1e-5)


def test_long_file_averages_all_its_windows(checkpoint: Path, tmp_path: Path) -> None:
    """Ten seconds of one class and five of another, 37 full windows and one up to the end."""
    wave = np.concatenate([tone(PITCH["Angry"], 10), tone(PITCH["Sad"], 5)])
    soundfile.write(tmp_path / "long.wav", wave, RATE, subtype="FLOAT")
    _, model = load_checkpoint(checkpoint)
    size = round(TINY["duration"] * RATE)
    windows = [*wave[: 37 * size].reshape(37, size), wave[-size:]]
    with torch.inference_mode():
        expected = model(model.mfcc(torch.from_numpy(np.stack(windows)))).mean(dim=0).numpy()
    (found,) = predictions([tmp_path / "long.wav"], checkpoint)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert 0.5 < found[LABELS.index("Angry")] < 0.8
    assert 0.2 < found[LABELS.index("Sad")] < 0.5


# ---- the script ------------------------------------------------------------------------------------------


def test_setting_of_the_checkpoint_is_no_flag(home: Path) -> None:
    result = run_script("inference.py", "--n_mfcc", 20, cwd=home)
    assert (result.returncode, result.stdout) == (2, "")
    reason = "--n_mfcc is part of the checkpoint and cannot be changed after training"
    assert result.stderr.startswith(f"error: {reason}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("clips")
def test_model_that_was_asked_for_is_never_replaced_by_another() -> None:
    for name in ("mine.pth", "best_emotion_model.pth"):  # also by its usual name
        Path(name).unlink(missing_ok=True)
        with pytest.raises(UserError, match=rf"no checkpoint {name}: train one") as error:
            label(checkpoint=name)
        assert error.value.code == 2


def test_bundled_model_labels_where_there_is_no_other(
    clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so; it was trained with the default features."""
    Path("best_emotion_model.pth").unlink()
    assert label(clips / "1.wav") == 0
    output = capsys.readouterr()
    assert f"model: {inference.PRETRAINED}, " in output.err
    header, row = output.out.splitlines()
    assert header.split(",")[4:] == "Angry Disgusted Fearful Happy Neutral Sad Suprised".split()
    assert sum(map(float, row.split(",")[4:])) == pytest.approx(1, abs=1e-3)


def test_reader_that_leaves_early_is_no_fault(clips: Path, home: Path) -> None:
    """As in `python inference.py clips | head -1`: no traceback, not even as the interpreter ends."""
    for number in range(40):
        write_clip(home / "long" / f"{number}.wav", "Sad")
    with subprocess.Popen(
        script_command("inference.py", clips, *["long"] * 40),  # more than a pipe holds
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("filename,emotion,")
        process.stdout.close()
        errors = process.stderr.read().splitlines()
    assert [line for line in errors if not line.startswith(("model: ", "note: "))] == []
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_output_that_cannot_be_written_is_an_error(clips: Path, home: Path) -> None:
    """Half a table on a full disk must not look like success."""
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            script_command("inference.py", clips),
            cwd=home,
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*No space left on device", result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr


def test_demo_touches_nothing_beside_its_own_folders(tmp_path: Path) -> None:
    """Neither a real model nor a real submission; it ends with a submission whose ids are the sample's."""
    precious = {name: tmp_path / name for name in ("best_emotion_model.pth", "submission.csv")}
    for path in precious.values():
        path.write_text("precious")
    (tmp_path / "run").mkdir()
    make_demo(tmp_path / "data" / "demo", n_speakers=3, n_takes=4)  # a smaller one, which it leaves as it is
    training = run_script("train.py", "--demo", *flags(Config(**TINY)), cwd=tmp_path)
    assert training.returncode == 0, training.stderr
    labelling = run_script("inference.py", "--demo", cwd=tmp_path)
    assert labelling.returncode == 0, labelling.stderr
    assert "synthetic demo corpus, not real speech" in training.stderr
    assert labelling.stdout.startswith("21 rows in run_demo/submission.csv, ids as in data/demo/sample_sub")
    assert all(path.read_text() == "precious" for path in precious.values())
    assert {path.name for path in tmp_path.iterdir()} == {*precious, "data", "run", "run_demo"}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["demo"]
    assert not list((tmp_path / "run").iterdir())
    with (tmp_path / "run_demo" / "submission.csv").open() as file:
        assert file.readline() == "filename,emotion\n"
