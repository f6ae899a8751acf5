"""What the tests share. Import the functions from here: `from tests.conftest import run_script`.

    run_script(name, *args, cwd)          run a script of the project; stdout and stderr are text
    script_command(name, *args)           the same as a list for subprocess.Popen
    tone(hertz, seconds, rate)            a sine of amplitude 0.5, (n,) float32
    clip_name(corpus, emotion, speaker, take)   a file name as one of the known corpora writes it
    make_corpus(root, ...)                a data folder of real wav files; see there for the defaults
    tiny_config(folder, **changes)        a Config of quick settings, every place inside `folder`
    flags(cfg)                            the flags that give a script this Config

Fixtures:

    corpus    (session, read only)  make_corpus with its defaults: 3 classes of 16 clips, Test of 4
    trained   (session, read only)  Trained(folder, cfg, result): train.py ran once on `corpus` with the
              settings cfg, two networks; folder holds run/, cache/ and best.pth; result has its output
    rng       a generator, equal in every test
    tiny_cfg  tiny_config(tmp_path) on `corpus`
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch

from config import Config

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what is tiny, threads cost more than they give

ROOT = Path(__file__).parent.parent
RATE = 8000  # of the clips and of the tiny settings
EMOTIONS = ("Angry", "Happy", "Sad")

# Corpus -> two speakers or more and a code per emotion, as its authors write them.
SPEAKERS = {
    "CREMA-D": ["1001", "1002", "1003", "1004", "1005", "1006"],
    "RAVDESS speech": ["01", "02", "03", "04", "23", "24"],
    "RAVDESS song": ["01", "02", "03", "04", "23", "24"],
    "SAVEE": ["DC", "JE", "JK", "KL"],
    "EmoDB": ["03", "08", "09", "10", "11", "12"],
    "TESS": ["OA", "YA"],
    "demo": ["00", "01", "02", "03", "04", "05"],
}
CODES = {
    "CREMA-D": {"Angry": "ANG", "Happy": "HAP", "Sad": "SAD", "Neutral": "NEU"},
    "RAVDESS speech": {"Angry": "05", "Happy": "03", "Sad": "04", "Neutral": "01"},
    "RAVDESS song": {"Angry": "05", "Happy": "03", "Sad": "04", "Neutral": "01"},
    "SAVEE": {"Angry": "a", "Happy": "h", "Sad": "sa", "Neutral": "n"},
    "EmoDB": {"Angry": "W", "Happy": "F", "Sad": "T", "Neutral": "N"},
    "TESS": {"Angry": "angry", "Happy": "happy", "Sad": "sad", "Neutral": "neutral"},
    "demo": {"Angry": "angry", "Happy": "happy", "Sad": "sad", "Neutral": "neutral"},
}
_TEMPLATES = {
    "CREMA-D": "{speaker}_{word}_{code}_XX.wav",
    "RAVDESS speech": "03-01-{code}-01-01-{take:02d}-{speaker}.wav",
    "RAVDESS song": "03-02-{code}-01-01-{take:02d}-{speaker}.wav",
    "SAVEE": "{speaker}_{code}{take:02d}.wav",
    "EmoDB": "{speaker}a{take:02d}{code}a.wav",
    "TESS": "{speaker}F_{lower}_{code}.wav",
    "demo": "{code}_speaker{speaker}_{take:02d}.wav",
}

# Trains in seconds: two windows of 0.4 s (26 frames, 24 features) of each clip of 0.5 s.
TINY: Mapping[str, Any] = {
    "sample_rate": RATE,
    "duration": 0.4,
    "max_windows": 2,
    "n_mfcc": 8,
    "n_fft": 512,
    "hop_length": 128,
    "n_mels": 20,
    "ensemble": 1,
    "conv_channels": 4,
    "conv_blocks": 2,
    "gru_hidden": 4,
    "gru_layers": 1,
    "val_fraction": 0.25,
    "test_fraction": 0.25,
    "batch_size": 8,
    "epochs": 2,
    "min_steps": 1,
    "warmup": 0,
    "device": "cpu",
    "precision": "float32",
    "num_workers": 0,
}


def script_command(name: str, *args: object) -> list[str]:
    """The command that runs a script of the project with these arguments."""
    return [sys.executable, str(ROOT / name), *map(str, args)]


def run_script(
    name: str, *args: object, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder to its end; `env` is laid over the environment. Never raises for its code."""
    return subprocess.run(
        script_command(name, *args),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=timeout,
        check=False,
    )


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """A sine of amplitude 0.5, (n,) float32."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def clip_name(corpus: str, emotion: str, speaker: int, take: int) -> str:
    """The file name of a clip; `speaker` counts from 0 in SPEAKERS[corpus]."""
    word = "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[take // 26**power % 26] for power in (2, 1, 0))
    return _TEMPLATES[corpus].format(
        speaker=SPEAKERS[corpus][speaker],
        code=CODES[corpus][emotion],
        take=take + 1,
        word=word,
        lower=word.lower(),
    )


def make_corpus(
    root: Path,
    *,
    corpus: str = "CREMA-D",
    emotions: Sequence[str] = EMOTIONS,
    n_speakers: int = 4,
    n_takes: int = 4,
    n_test: int = 4,
    seconds: float = 0.5,
) -> Path:
    """Write root/<emotion>/<clip>.wav and root/Test/<number>.wav; returns root.

    Each emotion has its pitch (200, 400, 800 Hz, ...), so that a network can tell them apart at once, and
    each clip its noise, so that no two are equal. Test clip number n is of emotion n % len(emotions).
    """
    generator = np.random.default_rng(0)

    def write(path: Path, emotion: int, speaker: int) -> None:
        wave = tone(200 * 2**emotion * (1 + 0.02 * speaker), seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave + 0.01 * generator.normal(size=len(wave)), RATE)

    for number, emotion in enumerate(emotions):
        for speaker in range(n_speakers):
            for take in range(n_takes):
                write(root / emotion / clip_name(corpus, emotion, speaker, take), number, speaker)
    for number in range(n_test):
        write(root / "Test" / f"{number}.wav", number % len(emotions), 0)
    return root


def tiny_config(folder: Path, **changes: Any) -> Config:
    """Quick settings; data, cache/, run/, best.pth and submission.csv lie in `folder` unless changed."""
    places = {
        "data_dir": str(folder / "data"),
        "cache_dir": str(folder / "cache"),
        "run_dir": str(folder / "run"),
        "checkpoint": str(folder / "best.pth"),
        "submission": str(folder / "submission.csv"),
    }
    return Config(**{**TINY, **places, **changes})


def flags(cfg: Config, only: Sequence[str] | None = None) -> list[str]:
    """The flags of all settings that differ from the defaults; of those named in `only` alone, if given."""
    return [
        f"--{field.name}={getattr(cfg, field.name)}"
        for field in dataclasses.fields(Config)
        if getattr(cfg, field.name) != field.default and (only is None or field.name in only)
    ]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small networks are faster with one, on a busy machine tenfold; inference.py sets it for good."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def rng() -> np.random.Generator:
    """Equal in every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, four speakers, four takes, four test clips. Read only."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture
def tiny_cfg(tmp_path: Path, corpus: Path) -> Config:
    """Quick settings on the shared corpus; everything that is written lies in tmp_path."""
    return tiny_config(tmp_path, data_dir=str(corpus))


class Trained(NamedTuple):
    """A finished run of train.py."""

    folder: Path
    cfg: Config
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One run of train.py that tests of results share. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = tiny_config(folder, data_dir=str(corpus), ensemble=2, epochs=4, learning_rate=1e-2, dropout=0.0)
    result = run_script("train.py", *flags(cfg), cwd=folder)
    assert result.returncode == 0, result.stderr
    return Trained(folder, cfg, result)
