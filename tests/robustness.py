"""How well a model does on the same clips recorded worse: louder, noisier, over the telephone, in a room.

    python tests/robustness.py best_emotion_model.pth --data_dir data/dataset

takes the test part of the model's own split, makes every condition from these clips (with fixed seeds, as
files that go the way of any other file), and prints a row per condition. Not for models of
--folds, whose test part is another one.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import librosa
import numpy as np
import pandas as pd
import scipy.signal
import soundfile
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from config import Config, UserError, make_parser, parse, run
from inference import Recognizer
from prepare import AudioError, FloatArray, load_corpus, split
from train import calibration_error

Change: TypeAlias = Callable[[FloatArray, np.random.Generator], FloatArray]  # of a wave at RATE

RATE = 44100  # Hz of all files; the clips have less
N_TALKERS = 6  # in babble


def gain(wave: FloatArray, _rng: np.random.Generator, *, decibels: float) -> FloatArray:
    """Louder or quieter; the files hold floats, so that nothing clips."""
    return wave * np.float32(10 ** (decibels / 20))


def normalise_peak(wave: FloatArray, _rng: np.random.Generator) -> FloatArray:
    """As loud as a file of whole numbers can be."""
    return wave / max(np.abs(wave).max(), 1e-9)


def pad_front(wave: FloatArray, _rng: np.random.Generator) -> FloatArray:
    """A second of digital silence before the clip."""
    return np.concatenate([np.zeros(RATE, np.float32), wave])


def add_noise(wave: FloatArray, rng: np.random.Generator, *, slope: float, snr: float) -> FloatArray:
    """Noise whose power falls with frequency to this power: 0 white, 1 pink."""
    spectrum = np.fft.rfft(rng.normal(size=len(wave)))
    spectrum /= np.maximum(np.fft.rfftfreq(len(wave), 1 / RATE), 20) ** (slope / 2)
    return mix(wave, np.fft.irfft(spectrum, len(wave)), snr)


def add_babble(
    wave: FloatArray, rng: np.random.Generator, *, talkers: Sequence[FloatArray], snr: float
) -> FloatArray:
    """Other people who talk at the same time."""
    voices = [talkers[number] for number in rng.choice(len(talkers), N_TALKERS, replace=False)]
    return mix(wave, sum(np.resize(voice / voice.std(), len(wave)) for voice in voices), snr)


def mix(wave: FloatArray, noise: Any, snr: float) -> FloatArray:
    """Add noise, `snr` dB below the clip."""
    scale = wave.std() / max(noise.std(), 1e-9) * 10 ** (-snr / 20)
    return (wave + scale * noise).astype(np.float32)


def telephone(wave: FloatArray, _rng: np.random.Generator) -> FloatArray:
    """300 to 3,400 Hz at 8,000 Hz, in the 8 bits of mu-law (ITU-T G.711)."""
    band = scipy.signal.butter(4, (300, 3400), "bandpass", fs=RATE, output="sos")
    narrow = librosa.resample(scipy.signal.sosfilt(band, wave), orig_sr=RATE, target_sr=8000)
    codes = librosa.mu_compress(np.clip(narrow, -1, 1), mu=255, quantize=True)
    wide = librosa.resample(librosa.mu_expand(codes, mu=255, quantize=True), orig_sr=8000, target_sr=RATE)
    return wide.astype(np.float32)


def low_pass(wave: FloatArray, _rng: np.random.Generator) -> FloatArray:
    """Nothing above 4 kHz."""
    band = scipy.signal.butter(10, 4000, fs=RATE, output="sos")
    return scipy.signal.sosfilt(band, wave).astype(np.float32)


def small_room(wave: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Noise that decays by 60 dB in 0.3 s for an echo, 6 dB below the direct sound."""
    seconds = np.arange(int(0.3 * RATE)) / RATE
    echo = rng.normal(size=len(seconds)) * 10 ** (-3 * seconds / 0.3)
    echo *= 0.5 / np.sqrt(np.square(echo).sum())
    echo[0] = 1
    return scipy.signal.fftconvolve(wave, echo)[: len(wave)].astype(np.float32)


def clip_peaks(wave: FloatArray, _rng: np.random.Generator) -> FloatArray:
    """What is above half of the peak is cut off, as by a recorder set 6 dB too high."""
    limit = np.abs(wave).max() / 2
    return np.clip(wave, -limit, limit)


def make_conditions(talkers: Sequence[FloatArray]) -> dict[str, Change]:
    """Name -> what it does to a wave."""
    conditions: dict[str, Change] = {"as recorded": lambda wave, _rng: wave}
    for decibels in (-24, -12, 12, 18):
        conditions[f"{decibels:+d} dB"] = partial(gain, decibels=decibels)
    conditions["peak-normalised"] = normalise_peak
    conditions["1 s of silence in front"] = pad_front
    for snr in (20, 10):
        conditions[f"white noise, {snr} dB"] = partial(add_noise, slope=0, snr=snr)
        conditions[f"pink noise, {snr} dB"] = partial(add_noise, slope=1, snr=snr)
        conditions[f"babble, {snr} dB"] = partial(add_babble, talkers=talkers, snr=snr)
    conditions["telephone"] = telephone
    conditions["nothing above 4 kHz"] = low_pass
    conditions["mp3, 32 kbit/s"] = lambda wave, _rng: wave  # when it is written
    conditions["small room"] = small_room
    conditions["clipped at half the peak"] = clip_peaks
    return conditions


def write_clip(path: Path, wave: FloatArray) -> Path:
    """As floats; or as mp3, where the lowest constant bit rate is 32 kbit/s."""
    if path.suffix == ".mp3":
        soundfile.write(path, wave, RATE, format="MP3", bitrate_mode="CONSTANT", compression_level=0.9999)
    else:
        soundfile.write(path, wave, RATE, subtype="FLOAT")
    return path


def tones(rng: np.random.Generator) -> FloatArray:
    """One to three steady tones."""
    pitches = rng.uniform(80, 4000, size=(rng.integers(1, 4), 1))
    return np.sin(2 * np.pi * pitches * np.arange(3 * RATE) / RATE).mean(axis=0)


def music(rng: np.random.Generator) -> FloatArray:
    """One to four voices of decaying harmonic notes, to a beat."""
    wave, beat = np.zeros(3 * RATE), rng.uniform(0.12, 0.5)
    for _ in range(rng.integers(1, 5)):
        start = 0.0
        while start < 3:
            length = beat * rng.choice([1, 2, 4])
            seconds = np.arange(int(min(1.5 * length, 3 - start) * RATE)) / RATE
            harmonics = np.arange(1, rng.integers(4, 12))[:, None]
            note = np.sin(2 * np.pi * 110 * 2 ** (rng.integers(36) / 12) * harmonics * seconds) / harmonics
            first = int(start * RATE)
            wave[first : first + len(seconds)] += note.sum(axis=0) * np.exp(-seconds / rng.uniform(0.1, 1))
            start += length
    return wave / np.abs(wave).max() * 10 ** rng.uniform(-1.5, 0)


NO_SPEECH: dict[str, Callable[[np.random.Generator], Any]] = {
    "silence": lambda rng: rng.integers(2) * rng.normal(size=3 * RATE) * 10 ** rng.uniform(-5, -3.5),
    "white noise": lambda rng: rng.normal(size=3 * RATE) * 10 ** rng.uniform(-2.5, -0.7),
    "brown noise": lambda rng: add_noise(np.ones(3 * RATE, np.float32), rng, slope=2, snr=-60) / 1e4,
    "tones": tones,
    "music": music,
}


def label(recognizer: Recognizer, waves: Iterable[FloatArray], suffix: str = ".wav") -> pd.DataFrame:
    """What the model says of waves that go through files: columns emotion, confidence, distance."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [
            str(write_clip(Path(scratch, f"{number}{suffix}"), wave)) for number, wave in enumerate(waves)
        ]
        results = [result for _, result in recognizer.predict_files(paths)]
    if failed := [result for result in results if isinstance(result, AudioError)]:
        raise UserError(f"{failed[0]}")
    return pd.DataFrame(results)[["emotion", "confidence", "distance"]]


def describe(found: pd.DataFrame, clean: pd.DataFrame, emotions: "pd.Series[str]") -> dict[str, str]:
    """A condition's row of the table."""
    right, usual = found.emotion == emotions, clean.emotion == emotions
    difference = right.astype(float) - usual
    gained = found.emotion.value_counts().sub(clean.emotion.value_counts(), fill_value=0)
    auroc = roc_auc_score(right, found.confidence) if right.nunique() == 2 else float("nan")
    return {
        "right": f"{100 * right.mean():.1f}",
        "change": f"{100 * difference.mean():+.1f} ± {196 * difference.std() / len(right) ** 0.5:.1f}",
        "confidence": f"{100 * found.confidence.mean():.1f}",
        "ECE": f"{100 * calibration_error(found.confidence.to_numpy(), right.to_numpy()):.1f}",
        "AUROC": f"{auroc:.2f}",
        "far": f"{100 * (found.distance > 1).mean():.1f}",
        "most gained": f"{gained.idxmax()} {gained.max():+.0f}" if gained.max() else "",
    }


def main(cfg: Config, flags: Any) -> int:
    """Print the tables."""
    recognizer = Recognizer(flags.model, device=cfg.device, num_workers=cfg.num_workers)
    places = {name: getattr(cfg, name) for name in ("data_dir", "cache_dir", "num_workers")}
    own = replace(recognizer.cfg, **places)  # what the model was trained with, or the split would be another
    clips = load_corpus(own, recognizer.model.mfcc)
    clips["part"] = split(clips, own)
    test = clips[clips.part == "test"].reset_index(drop=True)
    if not len(test):
        raise UserError(f"{flags.model} was trained on all clips: none is left to test on")
    if flags.clips:
        test = test.sample(min(flags.clips, len(test)), random_state=0).reset_index(drop=True)
    load = partial(librosa.load, sr=RATE)
    waves = [load(path)[0] for path in tqdm(test.path, "clips", disable=None)]
    voices = clips[clips.part == "train"].path.sample(40, random_state=0)

    rows: dict[str, dict[str, str]] = {}
    clean: Any = None
    conditions = make_conditions([load(path)[0] for path in voices])
    for name, change in tqdm(conditions.items(), "conditions", disable=None):
        changed = (change(wave, np.random.default_rng(number)) for number, wave in enumerate(waves))
        found = label(recognizer, changed, ".mp3" if "mp3" in name else ".wav")
        clean = found if clean is None else clean
        rows[name] = describe(found, clean, test.emotion)
    print(f"{len(test)} test clips; change with its paired 95 % interval; ECE: calibration error; AUROC: of")
    print("confidence, right clips against wrong ones; far: clips with a distance above 1; all in percent")
    print(pd.DataFrame(rows).T.to_string())

    print("\n50 clips each without speech")
    silent = {
        name: label(recognizer, (make(np.random.default_rng(number)) for number in range(50)))
        for name, make in NO_SPEECH.items()
    }
    print(
        pd.DataFrame(
            {
                name: {
                    "far": f"{100 * (found.distance > 1).mean():.1f}",
                    "confidence": f"{100 * found.confidence.mean():.1f}",
                }
                for name, found in silent.items()
            }
        ).T.to_string()
    )
    return 0


if __name__ == "__main__":
    parser = make_parser(__doc__, ["data_dir", "cache_dir", "num_workers", "device"])
    parser.add_argument("model", help="a checkpoint of train.py")
    parser.add_argument("--clips", type=int, default=0, help="test so many clips alone; 0: all")
    raise SystemExit(run(main, *parse(parser)))
