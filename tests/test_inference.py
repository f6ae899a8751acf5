"""From a trained model and files to a submission, byte by byte, or to a table of probabilities."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import inference
from config import Config, UserError
from inference import Recognizer, expand_paths
from model import PRETRAINED, Outputs, load_checkpoint, save_checkpoint
from prepare import AudioError, make_demo
from tests.conftest import (
    EMOTIONS,
    PITCH,
    RATE,
    TINY,
    Trained,
    flags,
    run_script,
    run_unread,
    script_command,
    tone,
)

Capture = pytest.CaptureFixture[str]
TEST = Path("data/dataset/Test")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained) -> Path:
    """The working directory: the model, and nothing else yet."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained.cfg.checkpoint, "best_emotion_model.pth")
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


ACTIONS = {
    "fill": "",
    "segments": "",
    "standard_names": False,
    "adapt": "",
    "abstain": False,
    "export": "",
    "timeline": False,
    "step": 0.0,
    "json": False,
    "output": "",
    "demo": False,
}


def label(*paths: object, **settings: Any) -> int:
    """The script's work, in this process."""
    own = {name: value for name, value in settings.items() if name not in ACTIONS}
    cfg = Config(device="cpu", num_workers=0, **own)
    return inference.main(cfg, Namespace(paths=list(map(str, paths)), **{**ACTIONS, **settings}))


def submission(name: str = "submission.csv") -> list[tuple[str, str]]:
    """The rows of a submission, as pandas reads them."""
    table = pd.read_csv(name, dtype=str, keep_default_na=False)
    assert list(table.columns) == ["filename", "emotion"]
    return list(table.itertuples(index=False, name=None))


def printed(text: str) -> pd.DataFrame:
    """The table that was printed, names as text, probabilities as numbers."""
    table = pd.read_csv(io.StringIO(text), dtype={"filename": str}, keep_default_na=False)
    assert list(table.columns) == ["filename", "emotion", "confidence", "seconds", "distance", *EMOTIONS]
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
    assert model.startswith("model: best_emotion_model.pth, 2 networks trained on ")
    assert edited == "note: settings are those of the model, not of config.py"  # which has larger ones
    assert {path.name for path in home.iterdir()} == {"best_emotion_model.pth", "data", "submission.csv"}


def test_edited_config_changes_no_prediction(clips: Path, capsys: Capture) -> None:
    """What shapes features and network is that of the checkpoint; so are the labels and their order."""
    for name in ("Aaa", "Surprised"):
        write_clip(Path("data/dataset") / name / "1.wav", "Angry")
    assert label(clips) == 0
    plain = capsys.readouterr().out
    sizes = {"n_mfcc": 20, "sample_rate": 16000, "duration": 1.0, "ensemble": 3, "gru_hidden": 6}
    assert label(clips, **sizes, batch_size=3) == 0
    assert capsys.readouterr().out == plain


def test_unreadable_clip_keeps_the_earlier_submission(clips: Path, capsys: Capture) -> None:
    """Never a label out of nothing: exit code 1, and the file is named."""
    Path("submission.csv").write_text("precious")
    (clips / "2.wav").write_text("<!DOCTYPE html>" * 200)
    with pytest.raises(UserError, match=r"submission\.csv not written: 1 of 5 .* --fill LABEL") as error:
        label()
    assert error.value.code == 1
    assert f"skipped {clips / '2.wav'}: " in capsys.readouterr().err
    assert Path("submission.csv").read_text() == "precious"


def test_clip_of_any_suffix_is_in_the_submission(clips: Path) -> None:
    """Or there is none: a row less would go unseen."""
    (clips / "2.wav").rename(clips / "2.wavx")
    (clips / "labels.csv").touch()
    (clips / "README").touch()
    assert label() == 0
    assert ("2.wavx", "Angry") in submission()
    assert len(submission()) == 5
    (clips / "5.xyz").write_text("no audio")
    with pytest.raises(UserError, match=r"submission\.csv not written: 1 of 6"):
        label()


def test_fill_labels_unreadable_clips_and_names_each(clips: Path, capsys: Capture) -> None:
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


@pytest.mark.parametrize(
    ("paths", "settings", "message"),
    [
        ([], {"fill": "Surprised"}, "fill = 'Surprised': must be one of Angry, Sad, Suprised"),
        ([], {"submission": "data"}, "submission = 'data': must be a file"),
        ([], {"test_dir": "empty"}, "no audio files in empty"),
        ([], {"test_dir": "nowhere"}, "no test folder nowhere"),
        ([], {"checkpoint": "mine.pth"}, "no checkpoint mine.pth: train one"),  # and not the bundled one
        ([TEST], {"submission": "mine.csv"}, "--submission is for the test folder: leave it out"),
        ([TEST], {"fill": "Sad"}, "--fill is for the test folder: leave it out"),
        ([], {"json": True}, "--json is for files: name files, folders or patterns"),
        ([TEST], {"step": 1.0}, "--step is for --timeline: leave it out"),
        ([TEST], {"step": 0.5, "timeline": True}, "step = 0.5: must be 0.1 to 0.4 seconds"),
        ([TEST], {"output": "data"}, "output = 'data': must be a file for rows"),
        ([TEST], {"output": "a.wav"}, "output = 'a.wav': must be a file for rows"),
        ([TEST, ""], {}, "'': no such file or folder"),
        ([TEST, "*.flac"], {}, "no such file or folder"),
        ([TEST, "x" * 300], {}, "no such file or folder"),
        ([TEST, "empty"], {}, "no audio files in empty"),
        ([TEST], {"segments": "parts.csv"}, "--segments names what to label: leave out files"),
        ([], {"segments": "nowhere.csv"}, "segments nowhere.csv: "),
        ([], {"standard_names": True}, "--standard_names is for files"),
    ],
)
@pytest.mark.usefixtures("clips")
def test_what_cannot_be_done_is_refused_before_any_work(
    paths: list[object], settings: dict[str, str], message: str, capsys: Capture
) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=f"{re.escape(message)}") as error:
        label(*paths, **settings)
    assert error.value.code == 2
    assert capsys.readouterr().out == ""
    assert not Path("submission.csv").exists()


def test_same_name_in_two_folders_is_refused(clips: Path) -> None:
    """The competition knows clips by their names alone."""
    write_clip(clips / "b" / "1.wav", "Sad")
    with pytest.raises(UserError, match=r"1\.wav is in 2 folders") as error:
        label()
    assert error.value.code == 1
    assert not Path("submission.csv").exists()


SAMPLE = "filename,emotion\n1.wav,Sad\n2.wav,Sad\n3.wav,Sad\n10.wav,Sad\n20.wav,Sad\n"


@pytest.mark.parametrize(
    ("sample", "difference"),
    [
        (SAMPLE, ""),
        (SAMPLE.replace("1.wav,Sad\n", "", 1) + "1.wav,Angry\n", ""),  # any order
        (SAMPLE + "4.wav,Sad\n05.wav,Sad\n", "2 ids without a file: 4.wav, 05.wav"),
        (SAMPLE.replace("2.wav,Sad\n", ""), "1 files without an id: 2.wav"),
        (SAMPLE + "3.wav,Sad\n", "1 ids listed twice: 3.wav"),
        (SAMPLE.replace("3.wav,Sad", "3.wav,Happy"), "1 labels we do not know: Happy"),
        (SAMPLE.replace("filename", "id"), "header id,emotion, not filename,emotion"),
        ("", "not a CSV file: No columns to parse from file"),
    ],
)
@pytest.mark.usefixtures("clips")
def test_sample_submission_beside_the_data_is_compared(sample: str, difference: str, capsys: Capture) -> None:
    """A difference makes an incomplete result, though the submission is written."""
    path = Path("data" if difference else "data/dataset", "sample_submission.csv")
    path.write_text(sample)
    assert label() == bool(difference)
    output = capsys.readouterr()
    verdict = f"; not as in {path}" if difference else f", ids as in {path}"
    assert output.out == f"5 rows in submission.csv{verdict}\n"
    warnings = [line for line in output.err.splitlines() if line.startswith("warning: ")]
    assert warnings == ([f"warning: {path}: {difference}"] if difference else [])
    assert len(submission()) == 5


# ---- names -----------------------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "é.wav") for form in ("NFC", "NFD"))
NAMES = [
    *("a,b.wav", 'say "hi".wav', "two\nlines.wav", " spaces  .wav", "NA.wav", "001.wav", "1.wav"),
    *("=1+1.wav", "-x.wav", "+x.wav", "@x.wav", "tab\t.wav", "#.wav", "';--.wav"),
    *("\N{SNOWMAN}\N{GRINNING FACE}.wav", NFC, NFD),
]


def test_odd_names_come_back_unchanged(home: Path, capsys: Capture) -> None:
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
    name: str, paths: list[Path], clips: Path, capsys: Capture
) -> None:
    (clips / "zz").mkdir()
    shutil.copy(clips / "1.wav", clips / "zz" / name)
    with pytest.raises(UserError, match="which no CSV keeps: rename it") as error:
        label(*paths)
    assert error.value.code == 2
    assert capsys.readouterr().out == ""
    assert not Path("submission.csv").exists()


# ---- files, folders, patterns ----------------------------------------------------------------------------


def test_table_of_probabilities(clips: Path, capsys: Capture) -> None:
    """They sum to 1, the label is the greatest, and its probability the confidence; no file is written."""
    assert label(clips) == 0
    table = printed(capsys.readouterr().out)
    probabilities = table[[*EMOTIONS]]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=2e-4)
    assert table.emotion.tolist() == probabilities.idxmax(axis=1).tolist()
    assert table.confidence.tolist() == probabilities.max(axis=1).tolist()
    assert (table.seconds == 0.5).all()
    truth = {str(clips / name): emotion for name, emotion in TRUTH.items()}
    assert dict(zip(table.filename, table.emotion, strict=True)) == truth
    assert not Path("submission.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["2.wav", "1.wav", "2.wav"], ["2.wav", "1.wav", "2.wav"]),
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


def test_unreadable_file_among_others(clips: Path, capsys: Capture) -> None:
    """The others are labelled; the exit code tells."""
    (clips / "1.wav").write_text("no audio")
    assert label(clips / "1.wav", clips / "2.wav") == 1
    output = capsys.readouterr()
    assert printed(output.out).filename.tolist() == [str(clips / "2.wav")]
    assert f"skipped {clips / '1.wav'}: " in output.err


@pytest.mark.parametrize("paths", [[], [TEST]], ids=["submission", "table"])
def test_odd_clips_are_used_and_warned_of(paths: list[Path], clips: Path, capsys: Capture) -> None:
    soundfile.write(clips / "4.flac", np.random.default_rng(0).normal(size=4 * RATE) / 9, RATE)
    os.truncate(clips / "4.flac", (clips / "4.flac").stat().st_size // 2)
    soundfile.write(clips / "10.wav", np.zeros(RATE), RATE)
    assert label(*paths) == 0
    cut, silent = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert re.match(f"warning: {TEST}/4.flac: (truncated: |unreadable after )[12].", cut)
    assert silent == f"warning: {TEST}/10.wav: silent"


def predictions(paths: list[Path], trained: Trained, **settings: Any) -> list[np.ndarray]:
    """Probabilities of clips."""
    recognizer = Recognizer(trained.cfg.checkpoint, device="cpu", **settings)
    found = []
    for _, result in recognizer.predict_files(list(map(str, paths))):
        assert not isinstance(result, AudioError)
        found.append(np.array(list(result.probabilities.values())))
    return found


def test_clip_alone_equals_the_clip_among_others(clips: Path, trained: Trained, tmp_path: Path) -> None:
    """Long ones among them, in this process or in workers, and read again."""
    write_clip(tmp_path / "long.wav", "Sad", 30)
    paths = [tmp_path / "long.wav", *sorted(clips.rglob("*.wav")) * 4]
    together = predictions(paths, trained)
    assert len({result.argmax() for result in together}) == 3
    alone = [predictions([path], trained)[0] for path in paths]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(predictions(paths, trained, num_workers=2), together, rtol=0, atol=1e-5)


def test_workers_do_not_wait_for_a_lock_of_another_thread(clips: Path, trained: Trained) -> None:
    """As when one thread predicts an array while another one forks workers for files."""
    with inference._ONE_AT_A_TIME:
        assert len(predictions([clips / "1.wav", clips / "2.wav"], trained, num_workers=2)) == 2


def test_every_window_of_a_long_file_counts(trained: Trained, tmp_path: Path) -> None:
    """Twenty seconds of one class and eight of another, 70 windows, in either order."""
    noise = 0.01 * np.random.default_rng(0).normal(size=28 * RATE)  # a pure tone is unlike all training clips
    long, short = tone(PITCH["Angry"], 20) + noise[: 20 * RATE], tone(PITCH["Sad"], 8) + noise[20 * RATE :]
    parts = {"a": [long, short], "b": [short, long], "c": [long], "d": [short]}
    for name, waves in parts.items():
        soundfile.write(tmp_path / f"{name}.wav", np.concatenate(waves), RATE, subtype="FLOAT")
    one, other, angry, sad = predictions([tmp_path / f"{name}.wav" for name in parts], trained)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    for label, value in zip(EMOTIONS, one, strict=True):
        low, high = sorted([angry[EMOTIONS.index(label)], sad[EMOTIONS.index(label)]])
        assert low - 1e-5 <= value <= high + 1e-5, label
    assert angry[0] > one[0] + 1e-3 > sad[0]
    assert one.argmax() == 0


# ---- from Python -----------------------------------------------------------------------------------------


def test_recognizer_in_several_threads_leaves_pytorch_as_it_was(trained: Trained) -> None:
    n_threads, recognizer = torch.get_num_threads(), Recognizer(trained.cfg.checkpoint, device="cpu")
    clips = [np.sin(np.arange(RATE) * pitch).astype(np.float32) for pitch in np.linspace(0.01, 0.1, 12)]
    expected = recognizer.predict(clips, RATE)
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda clip: recognizer.predict(clip, RATE), clips))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(n_threads)
    for result, alone in zip(results, expected, strict=True):
        assert result.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int32"])
@pytest.mark.parametrize("shape", [(11025,), (44100, 2)])
def test_array_equals_a_file_with_the_same_samples(
    dtype: str, shape: tuple[int, ...], trained: Trained, tmp_path: Path, rng: np.random.Generator
) -> None:
    noise = rng.normal(0, 0.2, shape)
    samples = noise.astype(dtype) if "f" in dtype else (noise * np.iinfo(dtype).max / 2).astype(dtype)
    subtype = {"float32": "FLOAT", "float64": "DOUBLE", "int16": "PCM_16", "int32": "PCM_32"}[dtype]
    soundfile.write(tmp_path / "a.wav", samples, 44100, subtype=subtype)
    n_threads = torch.get_num_threads()
    recognizer = Recognizer(trained.cfg.checkpoint, device="cpu")
    alone, listed = (
        recognizer.predict(samples, 44100),
        recognizer.predict([tmp_path / "a.wav", samples], 44100),
    )
    assert alone == recognizer.predict(str(tmp_path / "a.wav"))
    assert [clip.probabilities for clip in listed] == [pytest.approx(alone.probabilities, abs=1e-5)] * 2
    assert (alone.emotion, alone.confidence) == max(alone.probabilities.items(), key=lambda item: item[1])
    assert alone.seconds == pytest.approx(shape[0] / 44100, abs=1e-4)
    assert torch.get_num_threads() == n_threads
    unscaled = recognizer.predict(noise * 2**15, 44100).warning
    short = "; shorter than half a second" if alone.seconds < 0.5 else ""
    assert re.fullmatch(rf"samples as large as \d\d,\d+, not -1 to 1{short}", unscaled)
    assert alone.warning == short.removeprefix("; ")


@pytest.mark.parametrize(
    ("samples", "rate", "reason"),
    [
        (np.zeros((2, 9000)), 8000, r"shape \(2, 9000\): must be \(n,\) or \(n, channels\), channels last"),
        (np.zeros(9000, np.uint8), 8000, "uint8: must be float in"),
        (np.zeros(9000, np.int64), 8000, "int64: must be float in"),
        (np.zeros(9000), None, "rate = None: an array needs its sampling rate"),
        (np.zeros(9000), 999, "999 Hz: must be 1,000 to 768,000 Hz"),
        (np.zeros(0), 8000, "holds no samples"),
        (np.full(9000, np.nan), 8000, "holds NaN or infinite samples"),
    ],
)
def test_odd_array_is_refused(samples: np.ndarray, rate: int | None, reason: str, trained: Trained) -> None:
    with pytest.raises(AudioError, match=f"^clip 0: .*{reason}"):
        Recognizer(trained.cfg.checkpoint, device="cpu").predict([samples], rate)


def test_content_of_a_file_is_a_clip(clips: Path, trained: Trained) -> None:
    """A service needs no temporary file; what comes back goes into json.dumps."""
    recognizer = Recognizer(trained.cfg.checkpoint, device="cpu")
    path = clips / "2.wav"
    expected = recognizer.predict(path)
    with path.open("rb") as file:
        assert recognizer.predict([path.read_bytes(), file]) == [expected, expected]
    assert json.loads(json.dumps(expected.to_dict()))["probabilities"] == expected.probabilities
    with_windows = json.loads(json.dumps(recognizer.predict(path, step=0.2).to_dict()))
    assert [window["start"] for window in with_windows["timeline"]] == pytest.approx([0, 0.1])
    with pytest.raises(AudioError, match=r"^clip 0: "):
        recognizer.predict(b"no audio")
    with pytest.raises(AudioError, match="int: a clip is a path, a file or its bytes"):
        recognizer.predict(3)  # type: ignore[call-overload]
    with pytest.raises(AudioError, match="list: a clip is a path"):
        recognizer.embed([path])  # type: ignore[arg-type]
    with path.open(encoding="latin-1") as text, pytest.raises(AudioError, match="opened for reading bytes"):
        recognizer.predict(text)  # type: ignore[call-overload]
    with pytest.raises(AudioError, match=r"opened for reading bytes: .* closed file"):
        recognizer.predict(file)
    with pytest.raises(AudioError, match="not a regular file"):
        recognizer.predict("a\0.wav")


def test_recognizer_says_what_is_wrong_with_its_arguments(trained: Trained) -> None:
    with pytest.raises(UserError, match="checkpoints: pass paths, one after the other"):
        Recognizer([trained.cfg.checkpoint])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="device = 'gpu': must be auto, cpu"):
        Recognizer(trained.cfg.checkpoint, device="gpu")


def test_program_with_a_config_of_its_own_has_a_process_for_it(clips: Path) -> None:
    """Whose modules are those of the folder that inference.py is in."""
    Path("config.py").write_text("import model\nNAME = 'mine'\n")
    Path("model.py").touch()
    command = script_command("inference.py", "--json", "--device=cpu", clips / "2.wav")
    Path("program.py").write_text(
        f"import json, subprocess, config\n"
        f"answer = subprocess.run({command}, stdout=subprocess.PIPE, check=True)\n"
        f"rows = [json.loads(line) for line in answer.stdout.splitlines()]\n"
        f"print(config.NAME, rows[0]['emotion'])\n"
    )
    output = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, check=False)
    assert output.stdout == "mine Angry\n", output.stderr


def test_embedding_is_what_the_heads_decide_from(clips: Path, trained: Trained) -> None:
    recognizer = Recognizer(trained.cfg.checkpoint, device="cpu")
    states = torch.from_numpy(recognizer.embed(clips / "2.wav")).split(6 * trained.cfg.gru_hidden)
    assert len(states) == 2
    with torch.inference_mode():
        logits = [
            member.head(state[None]) for member, state in zip(recognizer.model.members, states, strict=True)
        ]
        probabilities = recognizer.model.calibrated(
            Outputs(torch.cat(logits).softmax(dim=1).mean(dim=0, keepdim=True), torch.zeros(1))
        )[0]
    write_clip(Path("short.wav"), "Angry", 0.4)  # of one window, the mean of its probabilities is its own
    assert probabilities.argmax() == 0
    assert recognizer.embed("short.wav").dtype == np.float32


# ---- a known voice ---------------------------------------------------------------------------------------


def test_recognizer_adapts_to_a_voice(clips: Path, trained: Trained, capsys: Capture) -> None:
    """A new one, which can be saved and exported as any other; notes where it will not be much."""
    recordings = [clips / name for name in TRUTH]
    plain = Recognizer(trained.cfg.checkpoint, device="cpu")
    before = plain.predict(recordings[0])
    adapted = plain.adapt(recordings)
    assert "recordings to adapt to: 5, 2 s: from 8 and 20 s on it pays" in capsys.readouterr().err
    assert plain.predict(recordings[0]) == before
    assert adapted.predict(recordings[0]) != before
    arrays = plain.adapt([soundfile.read(path, dtype="float32")[0] for path in recordings], RATE)
    assert arrays.predict(recordings[0]) == adapted.predict(recordings[0])
    plain.adapt([recordings[1]] * 60)
    assert "sound like one emotion" in capsys.readouterr().err
    noise = 0.3 * np.random.default_rng(0).normal(size=RATE // 2).astype(np.float32)
    with pytest.raises(UserError, match="do not sound like speech"):
        plain.adapt([noise], RATE)
    with pytest.raises(UserError, match="emotions = Bored: must be of Angry, Sad, Suprised"):
        plain.adapt(recordings, emotions=["Bored"] * 5)
    names = ",".join(map(str, recordings))
    assert label(adapt=names, export="me.pth", checkpoint=trained.cfg.checkpoint) == 0
    assert Recognizer("me.pth", device="cpu").predict(recordings[0]) == adapted.predict(recordings[0])
    assert label(recordings[0], adapt=names, checkpoint=trained.cfg.checkpoint) == 0
    output = capsys.readouterr()
    assert "adapted to recordings: 5" in output.err
    assert f",{round(adapted.predict(recordings[0]).confidence, 4)}," in output.out


def test_folders_of_emotions_tell_the_labels_of_recordings(
    clips: Path, trained: Trained, capsys: Capture
) -> None:
    for folder in ("Angry", "Surprised"):
        write_clip(Path("mine") / folder / "1.wav", folder.replace("rpr", "pr"))
    assert label(clips / "1.wav", adapt="mine", checkpoint=trained.cfg.checkpoint) == 0
    assert "the folders tell what they are labelled: Angry, Suprised" in capsys.readouterr().err
    Path("mine/Angry/1.wav").write_text("no audio")
    assert label(clips / "1.wav", adapt="mine", checkpoint=trained.cfg.checkpoint) == 0
    errors = capsys.readouterr().err
    assert "skipped mine/Angry/1.wav: " in errors
    assert "the folders tell what they are labelled: Suprised" in errors
    with pytest.raises(UserError, match="no recordings to adapt to"):
        label(clips / "1.wav", adapt="mine/Angry", checkpoint=trained.cfg.checkpoint)


# ---- parts of recordings, names of labels ----------------------------------------------------------------


def write_segments(text: str) -> Path:
    """Two seconds of Angry, then two of Sad, and a table of parts of them beside it."""
    wave = np.concatenate([tone(PITCH["Angry"], 2), tone(PITCH["Sad"], 2)])
    Path("talks").mkdir(exist_ok=True)
    soundfile.write("talks/a.wav", wave, RATE)
    path = Path("talks/parts.csv")
    path.write_text(text)
    return path


@pytest.mark.usefixtures("home")
def test_parts_of_recordings_have_rows_of_their_own(capsys: Capture) -> None:
    """A part is labelled as a file that holds it alone; a speaker in the table stays beside it."""
    path = write_segments(
        "filename,start,end,speaker\na.wav,0.5,1.5,Ann\nb.wav,0,1,Ann\na.wav,2.50,4.05,Bo\na.wav,3,9,Bo\n"
    )
    Path("talks/b.wav").write_text("no audio")
    assert label(segments=str(path)) == 1
    output = capsys.readouterr()
    rows = pd.read_csv(io.StringIO(output.out), dtype={"start": str, "end": str})
    about = ["filename", "start", "end", "speaker", "emotion", "confidence", "seconds", "distance"]
    assert list(rows.columns) == [*about, *EMOTIONS]
    assert rows[about[:5]].to_numpy().tolist() == [
        ["a.wav", "0.5", "1.5", "Ann", "Angry"],
        ["a.wav", "2.50", "4.05", "Bo", "Sad"],
    ]
    assert "a.wav 3 9 Bo: not in the recording, which has 4.00 s" in output.err
    assert "b.wav 0 1 Ann: " in output.err
    wave = soundfile.read("talks/a.wav", dtype="float32")[0]
    alone = Recognizer(device="cpu").predict(wave[RATE // 2 : 3 * RATE // 2], RATE)
    assert rows.confidence[0] == pytest.approx(alone.confidence, abs=1e-4)
    found = Recognizer(device="cpu").predict_segments("talks/a.wav", [(-3.5, 3), (0, 1), (1, 1), (5, 6)])
    assert [isinstance(result, AudioError) for result in found] == [True, False, True, True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("filename,start\na.wav,1\n", "needs rows of filename, start, end"),
        ("filename,start,end\n", "needs rows of filename, start, end"),
        ("filename,start,end,mood\na.wav,1,2,x\n", "has filename, start, end, mood"),
        ("filename,start,end\na.wav,0,1\na.wav,1,1\n", "line 3: start and end must be seconds"),
        ("filename,start,end\na.wav,x,1\n", "line 2: start and end must be seconds"),
        ("filename,start,end\na.wav,-1,1\n", "line 2: start and end must be seconds"),
        ("filename,start,end\nc.wav,0,1\n", "line 2: no file c.wav in talks"),
    ],
)
@pytest.mark.usefixtures("home")
def test_table_of_parts_is_refused_before_any_work(text: str, reason: str, capsys: Capture) -> None:
    with pytest.raises(UserError, match=re.escape(f"{reason}")):
        label(segments=str(write_segments(text)))
    assert capsys.readouterr().out == ""


def test_labels_have_their_usual_names_where_asked_for(clips: Path, capsys: Capture) -> None:
    assert label(clips / "10.wav", standard_names=True) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(table.columns)[-3:] == ["Angry", "Sad", "Surprised"]
    assert list(table.emotion) == ["Surprised"]


# ---- several models --------------------------------------------------------------------------------------


def test_several_models_are_joined_to_one(clips: Path, capsys: Capture) -> None:
    """Split in two, a model says what it said before; other classes or networks are refused."""
    stored, _ = load_checkpoint(Path("best_emotion_model.pth"))
    for number, member in enumerate(stored.members):
        save_checkpoint(Path(f"{number}.pth"), replace(stored, members=[member]))
    tables = []
    for names in ("best_emotion_model.pth", "0.pth,1.pth", "0.pth"):
        assert label(clips, checkpoint=names) == 0
        tables.append(printed(capsys.readouterr().out)[[*EMOTIONS]].to_numpy())
    np.testing.assert_allclose(tables[1], tables[0], atol=1e-4)
    assert np.abs(tables[2] - tables[0]).max() > 0.01
    save_checkpoint(Path("1.pth"), replace(stored, labels=["Sad", "Angry", "Suprised"]))
    with pytest.raises(UserError, match=r"^models of other classes, of runs .*: they cannot be joined"):
        label(clips, checkpoint="0.pth,1.pth")
    save_checkpoint(Path("1.pth"), replace(stored, config=replace(stored.config, duration=0.5)))
    with pytest.raises(UserError, match=r"^models of other duration, .*: they cannot be joined"):
        Recognizer("0.pth", "1.pth")


# ---- timeline, JSON, output, standard input --------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_timeline_has_a_row_for_every_window_and_a_picture(capsys: Capture) -> None:
    """Rows tell when Angry turned into Sad; files of one name have pictures of their own, if need be."""
    silence = np.zeros(RATE)
    wave = np.concatenate([tone(PITCH["Angry"], 2), silence, tone(PITCH["Sad"], 2.15)])
    soundfile.write("a.wav", wave, RATE)
    write_clip(Path("b/a.wav"), "Sad", 0.3)
    write_clip(Path("b/a_2.wav"), "Sad", 0.3)
    assert label("a.wav", "b/a_2.wav", "b/a.wav", timeline=True, step=0.2, run_dir="pictures") == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(table.columns) == ["filename", "start", "end", "emotion", "confidence", "distance", *EMOTIONS]
    rows = table[table.filename == "a.wav"]
    starts = [*np.arange(0, 4.7, 0.2), 4.75]
    np.testing.assert_allclose(rows.start, starts, atol=1e-6)
    np.testing.assert_allclose(rows.end, np.array(starts) + 0.4, atol=1e-6)
    assert set(rows.emotion[rows.end < 1.9]) == {"Angry"}
    assert set(rows.emotion[rows.start > 3.1]) == {"Sad"}
    assert table[table.filename == "b/a.wav"][["start", "end"]].to_numpy().tolist() == [[0, 0.3]]
    stems = ("timeline_a", "timeline_a_2", "timeline_a_3")
    names = {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "html", "srt")}
    assert {path.name for path in Path("pictures").iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in Path("pictures").glob("*.png"))
    assert '"link": "../b/a.wav"' in Path("pictures", "timeline_a_3.html").read_text()
    timeline = Recognizer(device="cpu").predict("a.wav", step=0.2).timeline
    paused = inference.find_pauses(timeline)
    assert timeline.windows.start[paused].tolist() == pytest.approx([2.0, 2.2, 2.4, 2.6], abs=1e-5)


def test_json_and_output_hold_what_the_table_holds(clips: Path, capsys: Capture) -> None:
    """One object per line; a file in one step, which an unreadable clip does not lose."""
    (clips / "9.wav").write_text("no audio")
    assert label(clips) == 1
    table = capsys.readouterr().out
    assert label(clips, output="rows.csv") == 1
    assert capsys.readouterr().out == "5 rows in rows.csv\n"
    assert Path("rows.csv").read_text() == table
    assert label(clips, json=True) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    pd.testing.assert_frame_equal(pd.DataFrame(rows), printed(table))


def test_standard_input_is_a_file(clips: Path, home: Path) -> None:
    """Whole, cut short, or empty."""
    whole = (clips / "2.wav").read_bytes()
    soundfile.write("long.flac", tone(200, 4) + np.random.default_rng(0).normal(0, 0.01, 4 * RATE), RATE)
    flac = Path("long.flac").read_bytes()
    for content, code, row, message in (
        (whole, 0, "-,Angry,", ""),
        (flac[: len(flac) // 2], 0, "-,Angry,", "warning: -: "),
        (b"", 1, "", "skipped -: empty file"),
        (b"no audio", 1, "", "skipped -: "),
    ):
        command = script_command("inference.py", "-", "--device=cpu")
        answer = subprocess.run(command, cwd=home, input=content, capture_output=True, check=False)
        assert answer.returncode == code, answer.stderr
        assert row in answer.stdout.decode()
        assert message in answer.stderr.decode()


# ---- the script ------------------------------------------------------------------------------------------


def test_bundled_model_labels_where_there_is_no_other(clips: Path, capsys: Capture) -> None:
    """And says so; it was trained with the default features."""
    Path("best_emotion_model.pth").unlink()
    assert label(shutil.copy(clips / "1.wav", "mine.wav")) == 0
    output = capsys.readouterr()
    assert f"model: {PRETRAINED['any']}, " in output.err
    header, row = output.out.splitlines()
    assert header.split(",")[5:] == "Angry Disgusted Fearful Happy Neutral Sad Suprised".split()
    assert sum(map(float, row.split(",")[5:])) == pytest.approx(1, abs=1e-3)


def test_test_folder_is_labelled_by_the_bundled_model_for_it(clips: Path, capsys: Capture) -> None:
    """Whether its rows go to the submission or elsewhere."""
    Path("best_emotion_model.pth").unlink()
    assert label() == 0
    assert f"model: {PRETRAINED['same']}, " in capsys.readouterr().err
    assert label(clips, clips / "1.wav") == 0
    output = capsys.readouterr()
    assert f"model: {PRETRAINED['same']}, " in output.err
    rows = [tuple(row.split(",")[:2]) for row in output.out.splitlines()[1:-1]]
    assert [(Path(name).name, emotion) for name, emotion in rows] == submission()


@pytest.mark.usefixtures("home")
def test_model_of_the_current_folder_is_not_taken_without_a_word(capsys: Capture) -> None:
    Recognizer(device="cpu")
    assert capsys.readouterr().err.startswith("model: best_emotion_model.pth, 2 networks trained on ")
    assert inference.default_model(Config(run_dir="a", checkpoint="a/best_emotion_model.pth")) == Path(
        "best_emotion_model.pth"
    )  # --run_dir says where a timeline goes
    Recognizer("best_emotion_model.pth", device="cpu")
    Path("best_emotion_model.pth").unlink()
    Recognizer(device="cpu")
    assert capsys.readouterr().err == ""


def test_noise_is_far_and_gets_no_label_where_we_may_abstain(home: Path, capsys: Capture) -> None:
    """Nor much confidence; a clip like those of training keeps its label."""
    write_clip(home / "sad.wav", "Sad")
    noise = 0.3 * np.random.default_rng(0).normal(size=RATE // 2)
    soundfile.write(home / "noise.wav", noise, RATE)
    assert label("noise.wav", "sad.wav") == 0
    plain = printed(capsys.readouterr().out)
    assert label("noise.wav", "sad.wav", abstain=True) == 0
    output = capsys.readouterr()
    table = printed(output.out)
    assert table.distance[0] > 1 >= table.distance[1]
    assert table.emotion.tolist() == ["", "Sad"]
    assert (table.drop(columns="emotion") == plain.drop(columns="emotion")).all(axis=None)
    assert plain.emotion[0] in EMOTIONS
    assert "distance above 1): 1 of 2" in output.err


def test_confidence_falls_beyond_the_limit(trained: Trained) -> None:
    _, model = load_checkpoint(Path(trained.cfg.checkpoint))
    outputs = Outputs(torch.tensor([[0.8, 0.1, 0.1]] * 5), torch.tensor([0.0, 1.0, 1.5, 3.0, 9.0]))
    first = model.calibrated(outputs)[:, 0].tolist()
    assert first[0] == first[1] > first[2] > first[3] == first[4] > 1 / 3


def test_reader_that_leaves_early_is_no_fault(clips: Path, home: Path) -> None:
    """As in `python inference.py clips | head -1`: no traceback, not even as the interpreter ends."""
    for number in range(40):
        write_clip(home / "long" / f"{number}.wav", "Sad")
    code, errors = run_unread("inference.py", clips, *["long"] * 40, cwd=home)  # more than a pipe holds
    assert code == 0
    assert all(line.startswith(("model: ", "note: ")) for line in errors.splitlines())


def test_demo_touches_nothing_beside_its_own_folders(tmp_path: Path) -> None:
    """Neither a real model nor a real submission; it ends with a submission whose ids are the sample's."""
    precious = {name: tmp_path / name for name in ("best_emotion_model.pth", "submission.csv")}
    for path in precious.values():
        path.write_text("precious")
    make_demo(tmp_path / "data" / "demo", n_speakers=3, n_takes=4)  # a smaller one, which it leaves as it is
    training = run_script("train.py", "--demo", *flags(Config(**TINY)), cwd=tmp_path)
    assert training.returncode == 0, training.stderr
    labelling = run_script("inference.py", "--demo", cwd=tmp_path)
    assert labelling.returncode == 0, labelling.stderr
    assert "synthetic demo corpus, not real speech" in training.stderr
    assert labelling.stdout.startswith("21 rows in run_demo/submission.csv, ids as in data/demo/sample_sub")
    assert all(path.read_text() == "precious" for path in precious.values())
    assert {path.name for path in tmp_path.iterdir()} == {
        *precious,
        "data",
        "run_demo",
        "cache",
        ".run_demo.lock",
    }
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["demo"]
    assert len(submission(str(tmp_path / "run_demo" / "submission.csv"))) == 21
