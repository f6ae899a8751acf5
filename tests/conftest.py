"""What the tests share: tiny corpora, quick settings, and one trained model. Import functions from here."""

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
from prepare import MFCC, mfcc_constants

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what is tiny, threads cost more than they give

ROOT = Path(__file__).parent.parent
RATE = 8000  # of the clips and of the tiny settings
EMOTIONS = ("Angry", "Sad", "Suprised")  # the last one spelled as on Kaggle
PITCH = {"Angry": 200, "Sad": 400, "Suprised": 800}  # of their clips, Hz

CODES = {"Angry": "05", "Sad": "04", "Suprised": "08"}  # in the names that RAVDESS gives its clips

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
    name: str, *args: object, cwd: Path, env: Mapping[str, str] | None = None
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
        timeout=600,  # on a busy machine
        check=False,
    )


def run_unread(name: str, *args: object, cwd: Path) -> tuple[int, str]:
    """Run a script whose reader leaves after the first line, as `head -1` does; exit code and stderr."""
    with subprocess.Popen(
        script_command(name, *args), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    return process.returncode, errors


def make_mfcc(cfg: Config) -> MFCC:
    """The features of these settings."""
    return MFCC(mfcc_constants(cfg), cfg.hop_length)


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """A sine of amplitude 0.5, (n,) float32."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def make_corpus(
    root: Path, *, emotions: Sequence[str] = EMOTIONS, n_speakers: int = 4, n_takes: int = 4
) -> Path:
    """Write root/<emotion>/<clip>.wav of half a second, named as in RAVDESS; returns root.

    Each emotion has its pitch, so that a network can tell them apart at once, each clip its noise.
    """
    generator = np.random.default_rng(0)
    for emotion in emotions:
        (root / emotion).mkdir(parents=True)
        for speaker in range(n_speakers):
            wave = tone(PITCH[emotion] * (1 + 0.02 * speaker))
            for take in range(n_takes):
                name = f"03-01-{CODES[emotion]}-01-01-{take + 1:02d}-{speaker + 1:02d}.wav"
                noise = 0.01 * generator.normal(size=len(wave))
                soundfile.write(root / emotion / name, wave + noise, RATE)
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


def flags(cfg: Config) -> list[str]:
    """The flags of all settings that differ from the defaults, and that train.py knows."""
    return [
        f"--{field.name}={getattr(cfg, field.name)}"
        for field in dataclasses.fields(Config)
        if getattr(cfg, field.name) != field.default and field.name != "submission"
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
    """Three classes, four speakers, four takes. Read only."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture
def tiny_cfg(tmp_path: Path, corpus: Path) -> Config:
    """Quick settings on the shared corpus; everything that is written lies in tmp_path."""
    return tiny_config(tmp_path, data_dir=str(corpus))


class Trained(NamedTuple):
    """A finished run of train.py: run/, cache/ and best.pth in a folder, its settings, and its output."""

    folder: Path
    cfg: Config
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One run of train.py, of two networks that tell the pitches apart. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    sizes = {"ensemble": 2, "conv_channels": 8, "gru_hidden": 8, "epochs": 6, "min_steps": 24}
    learning = {"learning_rate": 1e-2, "ema_decay": 0.9, "conv_dropout": 0.0, "lr_patience": 0}
    cfg = tiny_config(folder, data_dir=str(corpus), **sizes, **learning)
    result = run_script("train.py", *flags(cfg), cwd=folder)
    assert result.returncode == 0, result.stderr
    return Trained(folder, cfg, result)
