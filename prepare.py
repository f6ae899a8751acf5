"""Finds the clips, cuts them into windows and extracts their features into a cache.

    python prepare.py

fills the cache and prints how many clips and minutes there are of each class.
"""

from config import Config, UserError, make_parser, note, parse, printable, run

if __name__ == "__main__":  # answers --help, or a bad flag, before the slow imports
    ARGS = parse(make_parser(__doc__))

import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import soundfile
import soxr
import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

FloatArray: TypeAlias = npt.NDArray[np.float32]

# ---- the table of clips ----------------------------------------------------------------------------------

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf"})
# Formats that libsndfile cannot read, but ffmpeg can.
FOREIGN_SUFFIXES = frozenset({".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp"})

_CONVENTIONS = {  # how the common corpora name their files: groups are speaker and emotion code, in any order
    "CREMA-D": r"(?P<speaker>1\d{3})_[A-Z]{3}_(?P<code>ANG|DIS|FEA|HAP|NEU|SAD)_(?:LO|MD|HI|XX?)",
    "RAVDESS speech": r"03-01-(?P<code>\d\d)-\d\d-\d\d-\d\d-(?P<speaker>\d\d)",
    "RAVDESS song": r"03-02-(?P<code>\d\d)-\d\d-\d\d-\d\d-(?P<speaker>\d\d)",
    "SAVEE": r"(?:(?P<speaker>DC|JE|JK|KL)_)?(?P<code>sa|su|a|d|f|h|n)\d\d",
    "EmoDB": r"(?P<speaker>\d\d)[ab]\d\d(?P<code>[AEFLNTW])[a-f]?",
    "TESS": r"(?P<speaker>OA|YA)F?_[a-z]+_(?P<code>angry|disgust|fear|happy|neutral|ps|sad)",
    "demo": r"(?P<code>[a-z]+)_speaker(?P<speaker>\d+)_\d+",
}


def find_audio(folder: Path) -> list[Path]:
    """The audio files at any depth below a folder, sorted, without hidden files and linked folders.

    Raises:
        OSError: A folder cannot be listed.
    """

    def stop(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in AUDIO_SUFFIXES | FOREIGN_SUFFIXES)


def find_clips(cfg: Config) -> pd.DataFrame:
    """All labelled clips, sorted by file name: columns path, emotion (its class folder), corpus, speaker.

    Corpus and speaker come from the file names of the common corpora ("other" and "" where none fits), the
    speaker also from the manifest. The actors of RAVDESS both speak and sing: one speaker in both parts.

    Raises:
        UserError: There is no data folder, no class folder or no clip, or the folders are no emotions.
    """
    root = Path(cfg.data_dir)
    if not root.is_dir():
        raise UserError(
            f"no data folder {root}: give --data_dir a folder of clips per emotion, or try --demo"
        )
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and _is_class(path, cfg)]
    rows = [(str(path), folder.name) for folder in folders for path in find_audio(folder)]
    # By file name: the same clips in other folders come in the same order, and so in the same parts.
    rows.sort(key=lambda row: (Path(row[0]).name, row))
    clips = pd.DataFrame(rows, columns=["path", "emotion"], dtype=object)
    if not rows:
        raise UserError(
            f"no clips in {root}: expected one folder per emotion with {' '.join(sorted(AUDIO_SUFFIXES))}"
        )
    for emotion in sorted(set(clips.emotion)):
        check_csv_name(emotion)
    stray = [path for path in root.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()]
    if stray:
        note(f"note: {len(stray)} clip(s) in no class folder are left out: {stray[0]}")
    for folder in folders:
        if folder.name not in set(clips.emotion):
            note(f"note: class folder {folder} has no clips: left out")
    clips = clips.join(parse_names(clips.path))
    _check_classes(clips, root)
    if cfg.manifest:
        speakers = dict(zip(clips.path, clips.speaker, strict=True))
        clips["speaker"] = clips.path.map(speakers | read_manifest(Path(cfg.manifest), root))
    return clips.drop(columns="code")


def _is_class(folder: Path, cfg: Config) -> bool:
    """Whether a folder in data_dir is a class: not the test folder, hidden, junk, or a link upwards."""
    if folder.name.startswith((".", "__MACOSX")) or folder.name.lower() == "test":
        return False
    real, root = folder.resolve(), Path(cfg.data_dir).resolve()
    return real != cfg.test_root.resolve() and real != root and real not in root.parents


def parse_names(paths: Iterable[str]) -> pd.DataFrame:
    """Corpus, speaker and emotion code of each path as its file name tells, in columns of these names."""
    stems = pd.Series([Path(path).stem for path in paths], dtype=object)
    table = pd.DataFrame({"corpus": "other", "speaker": "", "code": ""}, index=stems.index, dtype=object)
    for corpus, convention in _CONVENTIONS.items():
        found = stems.str.extract(f"^(?:{convention})\\Z").dropna(subset="code")
        table.loc[found.index, "corpus"] = corpus
        table.loc[found.index, "speaker"] = (corpus.split()[0] + " " + found.speaker).fillna("")
        table.loc[found.index, "code"] = found.code
    return table


# Folders of speakers (of RAVDESS, TESS), of a whole corpus (CREMA-D), and of parts of a data set.
_NO_EMOTION = re.compile(
    r"(actor|speaker|spk)[ _-]?\d+|[oy]af?_.+|audiowav|train(ing)?|val(id(ation)?)?|dev", re.IGNORECASE
)


def _check_classes(clips: pd.DataFrame, root: Path) -> None:
    """Refuse folders that say who speaks, or which part a clip belongs to, and not what is felt."""
    odd = [name for name in sorted(set(clips.emotion)) if _NO_EMOTION.fullmatch(name)]
    known = clips[clips.code != ""]
    if not odd and len(known) > len(clips) / 2:
        codes = pd.crosstab([known.corpus, known.code], known.emotion)  # by file name, and by folder
        in_one_folder = codes.max(axis=1).sum() / len(known)
        of_one_code = codes.groupby(level="corpus").max().to_numpy().sum() / len(known)
        one_speaker = known.speaker.nunique() > 1 == known.groupby("emotion").speaker.nunique().max()
        if in_one_folder < 0.7 and (of_one_code < 0.7 or one_speaker):
            odd = sorted(set(known.emotion))
    if odd:
        names = ", ".join(odd[:4]) + ", ..." * (len(odd) > 4)
        raise UserError(f"in {root} not emotions but {names}: put the clips into one folder per emotion")


def read_manifest(path: Path, root: Path) -> dict[str, str]:
    """Speaker of each clip (path below `root`) from a CSV file with the columns filename and speaker.

    Raises:
        UserError: The file cannot be understood, or a name in it leads out of `root` or to no file.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError) as error:  # pandas raises kinds of ValueError for whatever is no CSV
        raise UserError(f"manifest {path}: {error}") from None
    if not {"filename", "speaker"} <= set(table.columns):
        raise UserError(f"manifest {path}: needs a header with filename and speaker")
    speakers: dict[str, str] = {}
    for number, (name, speaker) in enumerate(zip(table.filename, table.speaker, strict=True), start=2):
        where, clip = f"manifest {path}, line {number}", root / name
        if not (name and speaker):
            raise UserError(f"{where}: needs a filename and a speaker")
        if ".." in Path(name).parts or Path(name).is_absolute() or not clip.is_file():
            raise UserError(f"{where}: {name!r} is no file in {root}")
        if speakers.setdefault(str(clip), speaker) != speaker:
            raise UserError(f"{where}: {name} has two speakers")
    return speakers


def check_csv_name(name: str) -> None:
    """Refuse, before any work, a name that would not come back unchanged from a CSV file in UTF-8.

    Raises:
        UserError: It holds a carriage return, a NUL or bytes that are not UTF-8.
    """
    if "\r" in name or "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
        raise UserError(
            f"{name}: holds a carriage return or bytes that are not UTF-8, which no CSV keeps: rename it"
        )


# ---- audio -----------------------------------------------------------------------------------------------

FEATURES_VERSION = 3  # part of the cache key: raise it when Recording or MFCC gives other numbers
MIN_REMAINDER = 0.1  # seconds after the last full window that are worth a window of their own
ENVELOPE_RATE = 20  # points a second of the waveform's outline


class AudioError(Exception):
    """Why a file cannot be used as audio."""


class _SoundFile(soundfile.SoundFile):  # type: ignore[misc] # soundfile has no types
    def seekable(self) -> bool:
        """No: soundfile seeks after every read, and in an mp3 that damages what is decoded next."""
        return False


Clip: TypeAlias = str | Path | npt.NDArray[Any]  # a file, or samples


class Source(NamedTuple):
    """Samples that are read block by block."""

    rate: int  # Hz
    n_frames: int  # as promised; 0: nothing is
    read: Callable[[int], npt.NDArray[Any]]  # n -> (n, channels) float32, fewer at the end; or AudioError


class Recording:
    """An audio file or an array, read window by window in constant memory.

    Iteration yields (n_samples,) float32 windows in about [-1, 1], mono, at cfg.sample_rate. They start at 0,
    3, 6, ... s (with `step` at 0, step, 2 * step, ... s); the last one ends where the clip ends, and a clip
    shorter than a window is zero-padded. Channels are averaged, then resampled with soxr's HQ recipe, as
    librosa.load does. Neither length, header nor suffix is trusted: what comes out is what is there.

    Args:
        source: A path; or samples (n,) or (n, channels), float in about [-1, 1], int16 or int32.
        cfg: Sampling rate and length of the windows.
        rate: Of an array, in Hz; a file brings its own.
        step: Seconds from window to window, at most cfg.duration; 0: cfg.duration.

    Raises, while iterated:
        AudioError: The file is missing, no regular file, no audio, empty, or not finite; or the array has
            another shape or type, or no rate.
    """

    def __init__(self, source: Clip, cfg: Config, *, rate: float | None = None, step: float = 0.0) -> None:
        self.source, self.cfg, self.rate, self.step = source, cfg, rate, step
        self.seconds = 0.0  # of the audio in the windows so far; the latest window ends there
        self.envelope: list[FloatArray] = []  # magnitudes so far, ENVELOPE_RATE a second
        self._low, self._high, self._broken = math.inf, -math.inf, ""

    @property
    def warning(self) -> str:
        """What is odd about the audio read so far; empty if nothing is."""
        silent = "silent" if self._high - self._low < 1e-4 else ""  # three steps of 16 bits
        peak = max(self._high, -self._low)  # 16-bit numbers as float, say
        loud = f"samples as large as {peak:,.0f}, not -1 to 1" if peak > 16 else ""
        return "; ".join(filter(None, [self._broken, silent, loud]))

    def __iter__(self) -> Iterator[FloatArray]:
        clip = self.source
        opened = _open_file(Path(clip)) if isinstance(clip, str | Path) else _open_array(clip, self.rate)
        try:
            with opened as source:
                yield from self._windows(source)
        except OSError as error:
            raise AudioError(error.strerror or str(error)) from None

    def _windows(self, source: Source) -> Iterator[FloatArray]:
        size, rate = self.cfg.n_samples, self.cfg.sample_rate
        step = min(size, max(1, round(self.step * rate))) if self.step else size
        window = rest = np.empty(0, np.float32)  # the latest full one, and the samples from the next one on
        n_read = n_used = 0
        for block in self._blocks(source):
            rest = np.concatenate([rest, block])
            n_read += len(block)
            while len(rest) >= size:
                window, rest = rest[:size], rest[step:]
                n_used = n_read - len(rest) + size - step
                self.seconds = n_used / rate
                yield window
        if n_read == 0:
            raise AudioError("holds no samples")
        if n_used == 0 or n_read - n_used >= MIN_REMAINDER * rate:
            self.seconds = n_read / rate
            last = np.concatenate([window[:step], rest])[-size:]
            yield np.pad(last, (0, size - len(last)))

    def _blocks(self, source: Source) -> Iterator[FloatArray]:
        """Mono blocks (n,) at cfg.sample_rate; a file that breaks off gives what came before."""
        rate, n_read, is_last = source.rate, 0, False
        if not 1000 <= rate <= 768_000:
            raise AudioError(f"{rate} Hz: must be 1,000 to 768,000 Hz")
        resampler = soxr.ResampleStream(rate, self.cfg.sample_rate, 1, dtype="float32", quality="HQ")
        while not is_last:
            try:
                samples = source.read(rate // 2)
            except AudioError as error:  # a cut FLAC, for one
                if not n_read:
                    raise
                samples = np.empty((0, 1), np.float32)
                self._broken = f"unreadable after {n_read / rate:.2f} s: {error}"
            n_read += len(samples)
            is_last = len(samples) < rate // 2
            promised = source.n_frames if source.n_frames < 2**40 else 0  # more is no promise but "unknown"
            if is_last and not self._broken and promised - n_read > 0.05 * rate:
                self._broken = f"truncated: {n_read / rate:,.2f} of {promised / rate:,.2f} s"
            with np.errstate(over="ignore", invalid="ignore"):  # 1e38 overflows to what is refused here
                wave = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
            if len(wave):
                low, high = float(wave.min()), float(wave.max())  # NaN if one sample is
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise AudioError("holds NaN or infinite samples")
                self._low, self._high = min(self._low, low), max(self._high, high)
                places = np.arange(0, len(wave), rate / ENVELOPE_RATE).astype(int)
                self.envelope.append(np.maximum.reduceat(np.abs(wave), places))
            yield wave if rate == self.cfg.sample_rate else resampler.resample_chunk(wave, last=is_last)


@contextlib.contextmanager
def _open_array(samples: npt.NDArray[Any], rate: float | None) -> Iterator[Source]:
    """Samples in memory, with the numbers that a file of the same samples gives."""
    array = np.asarray(samples)
    kind = array.dtype.kind + str(array.dtype.itemsize)
    if array.dtype.kind != "f" and kind not in {"i2", "i4"}:
        raise AudioError(f"samples of {array.dtype}: must be float in [-1, 1], int16 or int32")
    if array.ndim not in {1, 2} or (array.ndim == 2 and 0 < len(array) < array.shape[1]):
        raise AudioError(f"samples of shape {array.shape}: must be (n,) or (n, channels), channels last")
    if rate is None or rate % 1:  # NaN too
        raise AudioError(f"rate = {rate}: an array needs its sampling rate, a whole number of Hz")
    scale = np.float32({"i2": 2.0**-15, "i4": 2.0**-31}.get(kind, 1.0))
    columns, place = array if array.ndim == 2 else array[:, None], 0

    def read(n: int) -> npt.NDArray[Any]:
        nonlocal place
        place += n
        with np.errstate(over="ignore"):  # of float64: infinite samples are refused
            return columns[place - n : place].astype(np.float32) * scale

    yield Source(int(rate), len(array), read)


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[Source]:
    """A file as libsndfile reads it, or else ffmpeg."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
        raise AudioError("not a regular file")
    with path.open("rb") as file:  # the system says why it will not; libsndfile says "System error."
        if not file.read(1):
            raise AudioError("empty file")
    # Absolute, since "-" would be the standard input; bytes, since a name need not be UTF-8.
    name = path if sys.platform == "win32" else os.fsencode(path.absolute())
    try:
        sound = _SoundFile(name)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: of a suffix .raw
        if getattr(error, "code", _UNKNOWN_FORMAT) != _UNKNOWN_FORMAT:
            raise AudioError(_reason(error)) from None
        sound = None
    if sound is None:
        with _open_ffmpeg(path) as source:
            yield source
        return

    def read(n: int) -> npt.NDArray[Any]:
        try:
            return sound.read(n, dtype="float32", always_2d=True)  # type: ignore[no-any-return]
        except soundfile.SoundFileError as error:
            raise AudioError(_reason(error)) from None

    with sound:
        yield Source(sound.samplerate, sound.frames, read)


_UNKNOWN_FORMAT = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT


def _reason(error: Exception) -> str:
    """Libsndfile's message without the file name; its message on a short mp3 is wrong."""
    reason = str(error).rpartition(": ")[2]
    return "not audio" if not reason or "possibly a pipe" in reason else reason


@contextlib.contextmanager
def _open_ffmpeg(path: Path) -> Iterator[Source]:
    """A file as ffmpeg decodes it, into a pipe, at its own rate.

    Through the pipe comes Sun's au format: a header of six numbers, then samples without end.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        copy = path.with_suffix(".wav") if path.suffix.lower() != ".wav" else path.with_suffix(".new.wav")
        remedy = shlex.join(["ffmpeg", "-i", str(path), str(copy)])
        raise AudioError(f"unknown format: install ffmpeg, or convert it with `{remedy}`")
    # Local files alone: a playlist must not make it fetch others. Metadata would lengthen the header.
    inputs = [*"-nostdin -v quiet -protocol_whitelist file -i".split(), f"file:{path.absolute()}"]
    outputs = "-map 0:a:0 -map_metadata -1 -c:a pcm_f32be -f au pipe:1".split()
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([program, *inputs, *outputs], process_group=0, **pipes) as process:
        try:
            header = _read_pipe(process, 24)
            magic, offset, _, encoding, rate, channels = struct.unpack(">4s5I", header.ljust(24, b"\0"))
            if magic != b".snd" or encoding != 6 or not 24 <= offset < 2**16 or not 1 <= channels <= 256:
                raise AudioError("ffmpeg finds no audio in it")
            _read_pipe(process, offset - 24)

            def read(n: int) -> npt.NDArray[Any]:
                content = _read_pipe(process, 4 * channels * n)
                whole = len(content) // (4 * channels) * channels
                return np.frombuffer(content, ">f4", whole).astype(np.float32).reshape(-1, channels)

            yield Source(rate, 0, read)
        finally:
            if process.poll() is None:
                _kill(process)


FFMPEG_PATIENCE = 30.0  # seconds that ffmpeg may take for its next half second of audio


def _read_pipe(process: "subprocess.Popen[bytes]", size: int) -> bytes:
    """The next bytes, fewer at the end; an AudioError if ffmpeg hangs or fails."""
    assert process.stdout is not None
    started, timer = time.monotonic(), threading.Timer(FFMPEG_PATIENCE, _kill, [process])
    timer.start()
    try:
        content = process.stdout.read(size)
        code = process.wait() if len(content) < size else 0
    finally:
        timer.cancel()
    if time.monotonic() - started >= FFMPEG_PATIENCE:
        raise AudioError(f"ffmpeg gave nothing for {FFMPEG_PATIENCE:.0f} s")
    if code:
        raise AudioError(f"ffmpeg cannot decode it (exit code {code})")
    return content


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End ffmpeg, and what it may have started, where there are process groups."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()


# ---- features --------------------------------------------------------------------------------------------


def mfcc_constants(cfg: Config) -> dict[str, Tensor]:
    """What librosa and SciPy define MFCC and its deltas by, as float32 matrices.

    Returns:
        window (n_fft,), mel (n_fft // 2 + 1, n_mels), dct (n_mfcc, n_mels) and deltas (2, T, T), which turn
        (..., T) coefficients into first and second derivatives: a Savitzky-Golay filter over nine frames is
        linear, so filtering the identity gives its matrix.
    """
    import librosa  # noqa: PLC0415 - takes seconds, and a trained model brings its constants along
    import scipy.fft  # noqa: PLC0415

    identity = np.eye(cfg.n_frames)
    constants = {
        "window": librosa.filters.get_window("hann", cfg.n_fft, fftbins=True),
        "mel": librosa.filters.mel(sr=cfg.sample_rate, n_fft=cfg.n_fft, n_mels=cfg.n_mels).T.copy(),
        "dct": scipy.fft.dct(np.eye(cfg.n_mels), norm="ortho", axis=0)[: cfg.n_mfcc],
        "deltas": np.stack([librosa.feature.delta(identity, order=order) for order in (1, 2)]),
    }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in constants.items()}


class MFCC(nn.Module):
    """MFCC, delta and delta-delta as librosa computes them, for a batch of windows on any device.

    The constants come from librosa when a model is trained and are saved with its weights, so a checkpoint
    computes the very features that it was trained on, wherever it is loaded, without librosa.
    """

    def __init__(self, constants: Mapping[str, Tensor], hop_length: int) -> None:
        super().__init__()
        self.window = nn.Buffer(constants["window"].float())
        self.mel = nn.Buffer(constants["mel"].to_dense().float())
        self.dct = nn.Buffer(constants["dct"].float())
        self.deltas = nn.Buffer(constants["deltas"].float())
        self.hop_length = hop_length
        # Most of the filter matrix is zero: products of 16 filters at a time with the bins that they need
        # leave an eighth of the multiplications.
        self.bands: list[tuple[slice, slice]] = []
        for start in range(0, self.mel.shape[1], 16):
            used = self.mel[:, start : start + 16].any(dim=1).nonzero().flatten().tolist() or [0]
            self.bands.append((slice(used[0], used[-1] + 1), slice(start, start + 16)))

    def forward(self, waves: Tensor) -> Tensor:
        """Windows (B, n_samples) float32 -> features (B, 3 * n_mfcc, n_frames) float32."""
        chunk = 4 if waves.device.type == "cpu" else 1024  # four windows fit the processor's cache
        return torch.cat([self._features(part) for part in torch.split(waves, chunk)])

    def _features(self, waves: Tensor) -> Tensor:
        n_fft = len(self.window)
        frames = nn.functional.pad(waves, (n_fft // 2, n_fft // 2)).unfold(-1, n_fft, self.hop_length)
        spectrum = torch.view_as_real(torch.fft.rfft(frames * self.window)).square_()
        power = spectrum[..., 0] + spectrum[..., 1]  # (B, T, n_fft // 2 + 1)
        mel = torch.cat([power[..., bins] @ self.mel[bins, bands] for bins, bands in self.bands], dim=-1)
        decibels = mel.clamp_(min=1e-10).log10_().mul_(10)  # (B, T, n_mels)
        decibels = decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - 80)  # as power_to_db's top_db
        return self.add_deltas(self.dct @ decibels.mT)

    def add_deltas(self, mfcc: Tensor) -> Tensor:
        """MFCC (B, n_mfcc, T) -> with its first and second derivatives below it, (B, 3 * n_mfcc, T)."""
        return torch.cat([mfcc, mfcc @ self.deltas[0], mfcc @ self.deltas[1]], dim=1)


# ---- many files, all cores -------------------------------------------------------------------------------

CHUNK = 16  # files per task of a worker
Work: TypeAlias = Callable[[Sequence[str]], list[Any]]  # paths -> results, one per path


def map_files(work: Work, paths: Sequence[str], cfg: Config) -> Generator[Any, None, None]:
    """Call `work` on chunks of the paths in worker processes, and yield its results, in order, one per path.

    A file whose decoder crashes costs its chunk: each file in it becomes an AudioError.
    """
    chunks = deque(paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK))
    n_workers = min(cfg.num_workers if cfg.num_workers >= 0 else n_cores(), len(chunks))
    if n_workers == 0:
        for chunk in chunks:
            yield from work(chunk)
        return
    while chunks:
        pool, ahead = _make_pool(n_workers, work), deque[Future[list[Any]]]()
        try:
            while chunks:
                for chunk in itertools.islice(chunks, len(ahead), 2 * n_workers):
                    ahead.append(pool.submit(_call_work, chunk))
                results = ahead.popleft().result()
                chunks.popleft()
                yield from results
        except BrokenProcessPool:  # a chunk killed its worker: the first by itself, then the rest once more
            yield from _map_alone(work, chunks.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _map_alone(work: Work, chunk: Sequence[str]) -> list[Any]:
    with _make_pool(1, work) as pool:
        try:
            return pool.submit(_call_work, chunk).result()
        except BrokenProcessPool:
            return [AudioError("this file, or one read with it, crashed the audio decoder")] * len(chunk)


def n_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: Work  # what a worker does, set when it starts


def _make_pool(n_workers: int, work: Work) -> ProcessPoolExecutor:
    # A forked worker starts at once; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(n_workers, context, initializer=_start_worker, initargs=(work,))


def _start_worker(work: Work) -> None:
    global _work  # noqa: PLW0603 - sent once, and not with every chunk
    _work = work
    start_child(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # decoders print: to stderr, and some to stdout, among the results
    os.dup2(silence, 2)


def _call_work(chunk: Sequence[str]) -> list[Any]:
    return _work(chunk)


def start_child(n_threads: int) -> None:
    """Make this child process leave signals to its parent, end with it, and use so many threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(n_threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class ClipFeatures(NamedTuple):
    """What one audio file became."""

    features: FloatArray  # (windows, n_features, n_frames)
    seconds: float  # of audio in them
    audio_hash: str  # equal for files with the same audio
    warning: str


def extract(path: Path, mfcc: MFCC, cfg: Config) -> ClipFeatures:
    """The features of a file's first cfg.max_windows windows.

    Raises:
        AudioError: The file cannot be used.
    """
    recording = Recording(path, cfg)
    windows = np.stack(list(itertools.islice(recording, cfg.max_windows)))
    features = mfcc(torch.from_numpy(windows)).numpy()
    if not np.isfinite(features).all():
        raise AudioError(f"samples as large as {np.abs(windows).max():.0e}: features are not finite")
    audio_hash = hashlib.sha256(windows[:, ::8].tobytes()).hexdigest()[:32]  # an eighth tells clips apart
    return ClipFeatures(features, recording.seconds, audio_hash, recording.warning)


def _extract_chunk(paths: Sequence[str], mfcc: MFCC, cfg: Config) -> list[ClipFeatures | AudioError]:
    results: list[ClipFeatures | AudioError] = []
    for path in paths:
        try:
            results.append(extract(Path(path), mfcc, cfg))
        except AudioError as error:
            results.append(error)
    return results


# ---- cache -----------------------------------------------------------------------------------------------
#
# One SQLite file per set of features, cache_dir/features-<key>.sqlite. Nothing in it is ever changed: a file
# with another size or time of modification has a row of its own. So a run that is training keeps its rows
# whatever other runs add, and a kill loses no more than the clips since the last commit.

_TABLES = """
CREATE TABLE IF NOT EXISTS clips (
    path BLOB, size INTEGER, mtime_ns INTEGER,
    first_window INTEGER, n_windows INTEGER, seconds REAL, audio_hash TEXT, warning TEXT,
    PRIMARY KEY (path, size, mtime_ns));
CREATE TABLE IF NOT EXISTS windows (id INTEGER PRIMARY KEY, features BLOB);
"""
FileState: TypeAlias = tuple[bytes, int, int]  # absolute path, bytes, nanoseconds


class FeatureCache:
    """Features of clips on disk: several readers, one writer that others wait for.

    It is named by all that shapes the features: their constants, and what decodes and resamples audio.
    """

    def __init__(self, cfg: Config, mfcc: MFCC) -> None:
        self.shape = (cfg.n_features, cfg.n_frames)
        parts = [FEATURES_VERSION, cfg.sample_rate, cfg.n_samples, cfg.hop_length, cfg.max_windows]
        key = hashlib.sha256(repr([*parts, soxr.__version__, soundfile.__libsndfile_version__]).encode())
        for constant in mfcc.state_dict().values():
            key.update(constant.cpu().numpy().tobytes())
        self.path = Path(cfg.cache_dir, f"features-{key.hexdigest()[:16]}.sqlite")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.database = sqlite3.connect(self.path, timeout=600)
            self.database.execute("PRAGMA page_size = 65536")  # a window of 62 kB fits one page
            self.database.executescript(_TABLES)
        except sqlite3.Error as error:
            raise self.fault(error) from None

    def fault(self, error: Exception) -> UserError:
        """What to raise when SQLite fails."""
        return UserError(f"cache {self.path}: {error}: free disk space, or delete the file", code=1)

    def lookup(self) -> dict[FileState, tuple[Any, ...]]:
        """Known files -> first_window (its id), n_windows, seconds, audio_hash, warning."""
        return {row[:3]: row[3:] for row in self.database.execute("SELECT * FROM clips")}

    def add(self, state: FileState, clip: ClipFeatures) -> None:
        """Add a file; a commit makes it permanent."""
        insert = "INSERT INTO windows (features) VALUES (?)"
        ids = [self.database.execute(insert, (window.tobytes(),)).lastrowid for window in clip.features]
        row = (*state, ids[0], len(ids), clip.seconds, clip.audio_hash, clip.warning)
        self.database.execute("INSERT INTO clips VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def read(self, ids: Iterable[int]) -> FloatArray:
        """Windows by id: (B, n_features, n_frames) float32."""
        query = "SELECT features FROM windows WHERE id = ?"
        numbers = list(ids)
        out = np.empty((len(numbers), *self.shape), np.float32)
        try:
            for row, number in zip(out, numbers, strict=True):
                (blob,) = self.database.execute(query, (int(number),)).fetchone()
                row[...] = np.frombuffer(blob, np.float32).reshape(self.shape)
        except (sqlite3.Error, TypeError) as error:  # TypeError: no such row, since somebody deleted it
            raise self.fault(error) from None
        return out


def load_features(clips: pd.DataFrame, cfg: Config, mfcc: MFCC) -> tuple[pd.DataFrame, dict[str, str]]:
    """Extract what the cache lacks, and add columns first_window, n_windows, seconds, audio_hash, warning.

    Returns:
        The rows of the readable files, and for the others path -> reason.

    Raises:
        UserError: The cache is damaged, or the disk is full.
    """
    cache = FeatureCache(cfg, mfcc)
    failures: dict[str, str] = {}
    states: dict[str, FileState] = {}
    for path in clips.path:
        try:
            status = Path(path).stat()
            states[path] = (os.fsencode(Path(path).absolute()), status.st_size, status.st_mtime_ns)
        except OSError as error:
            failures[path] = error.strerror or str(error)
    try:
        known = cache.lookup()
        if any(state not in known for state in states.values()):
            with FileLock(cache.path.with_suffix(".lock")):  # a second run waits
                known = cache.lookup()  # another run may have filled it meanwhile
                missing = {path: state for path, state in states.items() if state not in known}
                failures |= _fill(cache, missing, cfg, mfcc)
            known = cache.lookup()
        cache.database.close()
    except sqlite3.Error as error:
        raise cache.fault(error) from None
    found = [path not in failures for path in clips.path]
    columns = ["first_window", "n_windows", "seconds", "audio_hash", "warning"]
    clips = clips[found].reset_index(drop=True)
    rows = [known[states[path]] for path in clips.path]
    return clips.join(pd.DataFrame(rows, columns=columns, index=clips.index)), failures


def _fill(cache: FeatureCache, missing: Mapping[str, FileState], cfg: Config, mfcc: MFCC) -> dict[str, str]:
    """Extract files into the cache; returns path -> reason of those that cannot be read."""
    failures: dict[str, str] = {}
    results = map_files(partial(_extract_chunk, mfcc=mfcc, cfg=cfg), list(missing), cfg)
    with contextlib.closing(results), tqdm(missing.items(), "features", unit="clip", disable=None) as bar:
        for number, ((path, state), result) in enumerate(zip(bar, results, strict=True)):
            if isinstance(result, AudioError):
                failures[path] = str(result)
            else:
                cache.add(state, result)
            if number % 256 == 255:
                cache.database.commit()
    cache.database.commit()
    return failures


# ---- the corpus ------------------------------------------------------------------------------------------

MAX_UNREADABLE = 0.1  # of the files: with more, something is wrong with the data as a whole


def load_corpus(cfg: Config, mfcc: MFCC) -> pd.DataFrame:
    """Find all labelled clips and extract their features; odd ones are named on stderr.

    Returns:
        A row per readable clip: path, emotion, corpus, speaker, first_window (its id in the cache),
        n_windows, seconds, audio_hash (equal for the same audio) and warning.

    Raises:
        UserError: There are no clips, too many cannot be read, or there is but one class.
    """
    found = find_clips(cfg)
    clips, failures = load_features(found, cfg, mfcc)
    report_files(failures, "skipped")
    report_files({clip.path: clip.warning for clip in clips.itertuples() if clip.warning}, "warning:")
    if len(failures) > MAX_UNREADABLE * len(found):
        raise UserError(
            f"{len(failures)} of {len(found)} audio files cannot be read: repair or remove them",
            code=1 if len(clips) else 2,
        )
    for emotion in sorted(set(found.emotion) - set(clips.emotion)):
        note(f"note: class {emotion} has no readable clip: left out")
    if clips.emotion.nunique() < 2:
        raise UserError(f"only one class in {cfg.data_dir}, {clips.emotion[0]}: nothing to tell apart")
    copies = clips[clips.audio_hash.duplicated(keep=False)]
    for _, group in itertools.islice(copies.groupby("audio_hash"), 5):
        contradiction = " under different labels" if group.emotion.nunique() > 1 else ""
        note(f"note: same audio{contradiction}: {', '.join(group.path)}")
    if len(copies):
        note(f"note: {copies.audio_hash.nunique()} group(s) of clips with the same audio, each in one part")
    return clips


def report_files(reasons: Mapping[str, str], verb: str, *, most: int = 20) -> None:
    """Name files and what is wrong with them, the first of many."""
    for path, reason in itertools.islice(reasons.items(), most):
        note(f"{verb} {path}: {reason}")
    if len(reasons) > most:
        note(f"{verb} {len(reasons)} such files, {len(reasons) - most} of them not shown")


# ---- demo corpus -----------------------------------------------------------------------------------------
#
# Synthetic speech-like clips to try the pipeline with: a buzz through three resonances, in syllables. What a
# model learns from them says nothing about real speech.

# Pitch and its slope (semitones), level (dB) and syllables per second, in directions that Juslin & Laukka
# 2003 (Psychological Bulletin 129:770) report.
EMOTIONS = {
    "Angry": (3, -2, 5, 4.6),
    "Disgusted": (-2, -4, -1, 3.0),
    "Fearful": (5, 0, -3, 5.2),
    "Happy": (4, 3, 3, 4.4),
    "Neutral": (0, -2, 0, 3.8),
    "Sad": (-2, -3, -5, 2.8),
    "Surprised": (6, 7, 1, 3.6),
}


def synthesize(emotion: str, voice: float, rng: np.random.Generator, rate: int = 22050) -> FloatArray:
    """A synthetic utterance, (n,) float32 in [-1, 1], 1.5 to 3.5 s long; `voice`: semitones above 100 Hz."""
    from scipy import signal as dsp  # noqa: PLC0415

    pitch, slope, level, tempo = EMOTIONS[emotion] + rng.normal(0, [1.5, 1.6, 2.0, 0.4])
    seconds = np.arange(int(rng.uniform(1.5, 3.5) * rate)) / rate
    contour = voice + pitch + slope * (seconds / seconds[-1] - 0.5)
    wave = dsp.sawtooth(2 * np.pi * np.cumsum(100 * 2 ** (contour / 12)) / rate)
    for formant in (660, 1720, 2410):  # Hz, as in the vowel of "bat"
        wave = dsp.lfilter(*dsp.iirpeak(formant * (1 + voice / 100), 8, fs=rate), wave)
    wave *= 0.05 * 10 ** (level / 20) / wave.std() * np.sin(np.pi * tempo * seconds) ** 2
    wave += 10 ** rng.uniform(-3.6, -3) * rng.normal(size=wave.size)
    return np.asarray(np.tanh(wave), np.float32)


def make_demo(folder: Path, *, n_speakers: int = 10, n_takes: int = 9) -> None:
    """Write the demo corpus, all of it or nothing; an existing folder is left as it is."""
    note(f"note: synthetic demo corpus, not real speech, in {folder}")
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as scratch:
        draft = Path(scratch, folder.name)
        answers: list[tuple[str, str]] = []
        for speaker, emotion in itertools.product(range(n_speakers), EMOTIONS):
            voice = np.random.default_rng(speaker).uniform(-2, 14)
            for take in range(n_takes + 1):
                rng = np.random.default_rng([speaker, list(EMOTIONS).index(emotion), take])
                path = draft / emotion / f"{emotion.lower()}_speaker{speaker:02d}_{take:02d}.wav"
                if take == n_takes:  # the last take is to be labelled
                    path = draft / "Test" / f"{len(answers)}.wav"
                    answers.append((path.name, emotion))
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, synthesize(emotion, voice, rng), 22050)
        table = pd.DataFrame(answers, columns=["filename", "emotion"])
        table.to_csv(draft / "test_answers.csv", index=False)
        table.assign(emotion="Neutral").to_csv(draft / "sample_submission.csv", index=False)
        with contextlib.suppress(OSError):  # another run was quicker
            draft.rename(folder)


# ---- the script ------------------------------------------------------------------------------------------


def main(cfg: Config, flags: Any) -> int:  # noqa: ANN401 - argparse.Namespace
    """Fill the cache and print clips and minutes per class and corpus."""
    if flags.demo:
        make_demo(Path(cfg.data_dir))
    mfcc = MFCC(mfcc_constants(cfg), cfg.hop_length)
    clips = load_corpus(cfg, mfcc)
    table = pd.crosstab(clips.emotion.map(printable), clips.corpus)
    table.loc["total"] = table.sum()
    table["clips"] = table.sum(axis=1)
    minutes = clips.groupby("emotion").seconds.sum() / 60
    table["minutes"] = [*minutes.round(1), round(minutes.sum(), 1)]
    known = clips[clips.speaker != ""]
    speakers = known.groupby("emotion").speaker.nunique().reindex(minutes.index, fill_value=0)
    table["speakers"] = [*speakers, known.speaker.nunique()]
    print(table.rename_axis(index=None, columns=None).to_string())
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main, *ARGS))
