"""What the tests share: a generator, tones, and small corpora."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from config import Config
from prepare import write_demo

RATE = 22050


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    """A sine of amplitude 0.5, (n,) float32."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    """Equal in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def tone_corpus(tmp_path: Path) -> Path:
    """data_dir with two classes of eight tones, low and high, and four test clips; easy to tell apart."""
    for name, low in (("Low", 150), ("High", 900)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(8):
            soundfile.write(tmp_path / "data" / name / f"{number}.wav", tone(low + 5 * number), RATE)
    (tmp_path / "data" / "Test").mkdir()
    for number, hertz in enumerate((152, 902, 161, 911)):
        soundfile.write(tmp_path / "data" / "Test" / f"{number}.wav", tone(hertz), RATE)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo corpus: seven classes, six speakers, four takes each, and its Test folder. Read only."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder, n_speakers=6, n_takes=4, seed=0)
    return folder


@pytest.fixture
def tiny_cfg(tmp_path: Path, tone_corpus: Path) -> Config:
    """The tone corpus, a small network, and every path inside tmp_path."""
    return Config(
        data_dir=str(tone_corpus),
        cache_dir=str(tmp_path / "cache"),
        run_dir=str(tmp_path / "run"),
        checkpoint=str(tmp_path / "best.pth"),
        submission=str(tmp_path / "submission.csv"),
        conv_channels=4,
        gru_hidden=8,
        ensemble=2,
        batch_size=4,
        epochs=3,
        learning_rate=1e-3,
        schedule="plateau",
        ema_decay=0.0,
        precision="float32",
        val_fraction=0.25,
        holdout_fraction=0.125,
        num_workers=0,
        device="cpu",
    )
