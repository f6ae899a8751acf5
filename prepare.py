"""Finds the clips, standardises them and extracts their features into a cache.

    python prepare.py

fills the cache and prints clips and seconds per class, and what was skipped and why.
"""

from config import Config, UserError, command, die_quietly, fits_csv, parse_config, printable, say

if __name__ == "__main__":
    # Answers --help and refuses a bad flag at once: torch takes seconds to load.
    die_quietly()
    parse_config(description=__doc__)

import contextlib
import csv
import ctypes
import functools
import gc
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import uuid
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import filelock
import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

FloatArray: TypeAlias = npt.NDArray[np.float32]
SignalArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

# ---- finding clips --------------------------------------------------------------------------------------

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf"})
FOREIGN_SUFFIXES = frozenset({".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp"})  # not for libsndfile


class Clip(NamedTuple):
    """One labelled audio file."""

    path: str  # a million Path objects would take half a gigabyte
    label: int  # index into the sorted class names


class AudioError(Exception):
    """A file that cannot be used as audio, and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        """Keep both, also across processes."""
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def find_audio(folder: Path, *, strict: bool = False) -> list[str]:
    """List the audio files at any depth below a folder, sorted, without hidden files and linked folders.

    Files in formats that cannot be decoded are listed too, so that they are reported and not overlooked.

    Raises:
        OSError: A folder cannot be listed; unless strict, it is skipped and named on stderr.
    """

    def skip(error: OSError) -> None:
        if strict:
            raise error
        say(f"skipped {error}")

    known = AUDIO_SUFFIXES | FOREIGN_SUFFIXES
    found: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=skip):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        audio = [name for name in files if name[name.rfind(".") :].lower() in known and name[0] != "."]
        found += [f"{parent}{os.sep}{name}" for name in audio]
    return sorted(found, key=lambda path: path.replace(os.sep, "/"))


def find_labels(data_dir: Path, *, skip: Path | None = None) -> tuple[str, ...]:
    """Class names: the folders of data_dir, spelled as on disk, sorted; this order numbers the classes.

    Args:
        data_dir: The folder of the class folders. Test, hidden and junk folders in it are no classes.
        skip: One more folder that is no class: the test folder, where it has another name.

    Raises:
        UserError: There is no such folder, or it holds no class folder.
    """
    if not data_dir.is_dir():
        raise UserError(
            f"no data folder {data_dir}: give one with a folder of clips per emotion, or try --demo"
        )
    folders = [p for p in data_dir.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))]
    # A link to a folder that data_dir is in would make every clip one of another class as well.
    others = [data_dir.resolve(), *data_dir.resolve().parents, skip and Path(os.path.realpath(skip))]
    labels = sorted(p.name for p in folders if p.name.lower() != "test" and p.resolve() not in others)
    if not labels:
        raise UserError(f"no class folders in {data_dir}: expected one folder of clips per emotion")
    for label in labels:
        if not fits_csv(label):
            raise UserError(
                f"class folder {data_dir / label}: its name holds a carriage return or bytes that are not "
                "UTF-8, and so no submission can hold it: rename it"
            )
    return tuple(labels)


def list_clips(data_dir: Path, labels: Sequence[str]) -> list[Clip]:
    """All clips of the class folders, sorted by class and path."""
    return [Clip(path, label) for label, name in enumerate(labels) for path in find_audio(data_dir / name)]


class Source(NamedTuple):
    """Where a clip comes from, as its file name tells."""

    corpus: str
    speaker: str


_NAMING = {  # corpus -> file-name convention; its only group is the speaker
    "CREMA-D": r"(1\d{3})_[A-Z]{3}_(?:ANG|DIS|FEA|HAP|NEU|SAD)_(?:LO|MD|HI|XX?)",
    "RAVDESS speech": r"03-01-\d\d-\d\d-\d\d-\d\d-(\d\d)",
    "RAVDESS song": r"03-02-\d\d-\d\d-\d\d-\d\d-(\d\d)",
    "SAVEE": r"(DC|JE|JK|KL)_(?:a|d|f|h|n|sa|su)\d+",
    "EmoDB": r"(\d\d)[ab]\d\d[AEFLNTW][a-f]?",
    "TESS": r"(OA|YA)F?_[a-z]+_(?:angry|disgust|fear|happy|neutral|ps|sad)",
    "synthetic": r"spk(\d+)_take\d+",
}
_ANY_NAMING = re.compile("|".join(_NAMING.values()))


def source_of(path: str | Path) -> Source:
    """Corpus and speaker by the naming conventions of the common corpora; ("other", "") where none fits.

    The actors of RAVDESS both speak and sing: they have one name in both parts.
    """
    name = os.fspath(path).rpartition(os.sep)[2].rpartition(".")[0]
    match = _ANY_NAMING.fullmatch(name)
    if not (match and match.lastindex):
        return _share_source("other", "")
    corpus = list(_NAMING)[match.lastindex - 1]
    return _share_source(corpus, f"{corpus.split()[0]} {match[match.lastindex]}")


_share_source = functools.lru_cache(Source)  # one object for all clips of a speaker


# ---- audio ----------------------------------------------------------------------------------------------


def load_audio(path: Path, *, sample_rate: int, n_samples: int) -> tuple[FloatArray, str]:
    """Read the start of an audio file as mono float32 at the given rate.

    Channels are averaged, then resampled with soxr's HQ recipe, as librosa.load does. No more of the file is
    read than the result needs, whatever its header claims.

    Args:
        path: A regular file in a format of libsndfile.
        sample_rate: Wanted rate in Hz.
        n_samples: Most samples to return.

    Returns:
        (n,) float32 in about [-1, 1], 0 < n <= n_samples, and what is odd about it: "" if nothing is.

    Raises:
        AudioError: The file is missing, no regular file, no audio, empty, or not finite.
    """
    if path.suffix.lower() in FOREIGN_SUFFIXES:
        raise AudioError(path, f"{path.suffix} cannot be decoded: convert it to wav")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            raise AudioError(path, "not a regular file")
        path.open("rb").close()  # the system says why it will not; libsndfile would say "System error."
        # As bytes, since soundfile encodes text strictly, and a name need not be UTF-8. Windows wants text.
        # Absolute, since "-" would be the standard input.
        name = path if sys.platform == "win32" else os.fsencode(path.absolute())
        with soundfile.SoundFile(name) as file:
            rate, channels = file.samplerate, file.channels
            if not 1000 <= rate <= 768_000 or channels > 16:
                raise AudioError(
                    path, f"{rate} Hz and {channels} channels: not within 1,000 to 768,000 Hz and 16 channels"
                )
            margin = 1024 * max(1, rate / sample_rate)  # for the resampler, which looks ahead
            wanted = math.ceil(n_samples * rate / sample_rate + margin)
            samples, cut = read_samples(file, path, wanted)
    except OSError as error:
        raise AudioError(path, error.strerror or str(error)) from None
    except soundfile.SoundFileError as error:
        raise AudioError(path, _reason(error)) from None
    with np.errstate(over="ignore", invalid="ignore"):  # 1e38 overflows to what is refused below
        wave: FloatArray = samples.mean(axis=1) if channels > 1 else samples[:, 0]
        silence = _silence(wave, samples) if wave.size else ""
    if not np.isfinite(wave).all():
        raise AudioError(path, "holds NaN or infinite samples")
    if rate != sample_rate:
        wave = soxr.resample(wave, rate, sample_rate, quality="HQ")
    if wave.size == 0:
        raise AudioError(path, "holds no samples")
    return wave[:n_samples], "; ".join(filter(None, [cut, silence]))


def _reason(error: soundfile.SoundFileError) -> str:
    """The words of libsndfile, without the name of the file; those on a short mp3 are wrong."""
    reason = str(error).rpartition(": ")[2]
    return "not audio" if not reason or "possibly a pipe" in reason else reason


def _silence(wave: FloatArray, samples: FloatArray) -> str:
    """Say if there is nothing to hear in a wave (n,), the mean of samples (n, channels); else ""."""
    # At -40 dB, since few coders keep opposite channels exactly so; a wide recording stays above -20.
    if samples.shape[1] > 1 and wave.std() < 0.01 * samples.std(axis=0).max():
        return "silent: its channels cancel out"
    return "silent" if np.ptp(wave) < 1e-4 else ""  # three steps of 16 bits; an offset cannot be heard


def read_samples(file: soundfile.SoundFile, path: Path, wanted: int) -> tuple[FloatArray, str]:
    """Read the first `wanted` frames, or all there are: (n, channels) float32, and what is missing or "".

    Raises:
        soundfile.SoundFileError: It is damaged from the first sample on.
    """
    # As long as we want it, not as the header claims. NaN tells what was not written, if it comes to that.
    buffer = np.full((wanted, file.channels), np.nan, np.float32)
    try:
        samples = file.read(out=buffer)
    except soundfile.SoundFileError as error:  # a cut FLAC: use what came before
        samples = buffer[: np.append(np.isnan(buffer[:, -1]), True).argmax()]
        if not samples.size:
            raise
        if "psf_fseek" in str(error):  # all is read; soundfile only cannot stay at the end of a piped FLAC
            return samples, ""
        return samples, f"unreadable after {len(samples) / file.samplerate:.2f} s: {_reason(error)}"
    return samples, _shortage(file, path, len(samples)) if len(samples) < wanted else ""


# What libsndfile notes about samples that should be longer than the file.
_SIZES = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)


def _shortage(file: soundfile.SoundFile, path: Path, n_read: int) -> str:
    """Say if there were more than the n_read frames once, as far as the file tells; else ""."""
    if file.format == "OGG":  # knows no length in advance
        return "" if _has_last_page(path) else "truncated: the end of the stream is missing"
    promised = file.frames
    if sizes := _SIZES.search(file.extra_info):
        claimed, real = map(int, sizes.groups())
        if claimed < 0x7FFF0000:  # else it was recorded into a pipe, and the length not known
            promised = n_read * claimed // max(1, real)
    if promised - n_read <= 0.05 * file.samplerate:  # decoders drop an odd frame
        return ""
    if file.subtype.startswith("MPEG"):
        with path.open("rb") as raw:
            head = raw.read(1 << 16)
        if b"Xing" not in head and b"Info" not in head:  # no length in it: libsndfile guessed
            return ""
    return f"truncated: {n_read / file.samplerate:,.2f} of {promised / file.samplerate:,.2f} s"


def _has_last_page(path: Path) -> bool:
    """Whether an Ogg file ends with a whole page that is marked as its last."""
    with path.open("rb") as raw:
        raw.seek(max(0, path.stat().st_size - (1 << 16)))  # no page is longer
        tail = raw.read()
    page = tail[tail.rfind(b"OggS") :]
    return (
        len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]]) and bool(page[5] & 4)
    )


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep decoders from writing to stderr, as mpg123 does of a cut mp3, and to stdout, among our results."""
    try:
        for stream in (1, 2):
            os.fstat(stream)
        saved = {stream: os.dup(stream) for stream in (1, 2)}
    except OSError:  # one is closed, and its number goes to whatever is opened next
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            for stream in saved:
                os.dup2(nowhere.fileno(), stream)
        yield
    finally:
        _c_library().fflush(None)  # C keeps what it prints to a pipe until the end of the process
        for stream, copy in saved.items():
            os.dup2(copy, stream)
            os.close(copy)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)


# ---- features -------------------------------------------------------------------------------------------


@functools.cache
def hann_window(n_fft: int) -> Tensor:
    """The periodic Hann window, (n_fft,) float32."""
    return torch.hann_window(n_fft)


def to_mel(hertz: SignalArray) -> SignalArray:
    """Slaney's mel scale (1998, Auditory Toolbox): linear to 1 kHz at 200/3 Hz per mel, logarithmic above."""
    return np.where(
        hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4)
    )


def to_hertz(mel: SignalArray) -> SignalArray:
    """The inverse of to_mel."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * np.log(6.4) / 27))


def mel_points(sample_rate: int, n_mels: int) -> SignalArray:
    """Where the mel filters begin, peak and end, (n_mels + 2,) mel: equally spaced up to half the rate."""
    return np.linspace(0, float(to_mel(np.array(sample_rate / 2))), n_mels + 2)


@functools.cache
def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Triangular filters on the mel scale, each of unit area.

    Returns:
        (n_mels, n_fft // 2 + 1) float32: power spectrum -> mel spectrum.
    """
    edges = to_hertz(mel_points(sample_rate, n_mels))
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(triangles.astype(np.float32))


@functools.cache
def mel_bands(sample_rate: int, n_fft: int, n_mels: int) -> list[tuple[slice, Tensor]]:
    """The same filters, transposed, in groups of up to 16, each with the slice of bins that it needs.

    Most of the filter matrix is zero: the groups leave an eighth of the multiplications.
    """
    filters = mel_filters(sample_rate, n_fft, n_mels)
    bands: list[tuple[slice, Tensor]] = []
    for start in range(0, n_mels, 16):
        group = filters[start : start + 16]
        used: list[int] = group.any(dim=0).nonzero().flatten().tolist() or [0]
        bins = slice(used[0], used[-1] + 1)
        bands.append((bins, group[:, bins].T.contiguous()))
    return bands


@functools.cache
def dct_matrix(n_mfcc: int, n_mels: int) -> Tensor:
    """The first n_mfcc rows of the orthonormal type-2 DCT: (n_mfcc, n_mels) float32."""
    angles = np.pi / n_mels * np.outer(np.arange(n_mfcc), np.arange(n_mels) + 0.5)
    rows = math.sqrt(2 / n_mels) * np.cos(angles)
    rows[0] /= math.sqrt(2)
    return torch.from_numpy(rows.astype(np.float32))


@functools.cache
def delta_matrix(n_frames: int, order: int) -> Tensor:
    """The derivative along time as a matrix: features (..., T) @ matrix (T, T) -> derivative (..., T).

    A polynomial of degree `order` is fitted to the nine frames around each frame - at either end to the
    outermost nine - and derived `order` times (Savitzky & Golay 1964, Analytical Chemistry 36:1627).
    """
    width = 9
    fit = np.linalg.pinv(np.vander(np.arange(width) - width // 2, order + 1, increasing=True))
    # A polynomial of degree n has one n-th derivative, wherever in the nine frames it is taken.
    weights = math.factorial(order) * fit[order]
    matrix = np.zeros((n_frames, n_frames))
    for frame in range(n_frames):
        start = min(max(frame - width // 2, 0), n_frames - width)
        matrix[start : start + width, frame] = weights
    return torch.from_numpy(matrix.astype(np.float32))


def extract_features(waves: Tensor, cfg: Config) -> Tensor:
    """MFCC, delta and delta-delta of the first cfg.duration seconds, numerically those of librosa.feature.

    Power spectrum of centred Hann windows -> mel -> decibels, at most 80 below the loudest value of the
    clip -> orthonormal DCT; delta-delta is a second derivative, not the delta of the delta.

    Args:
        waves: (B, n) float32 in about [-1, 1], n >= 1, cut or zero-padded to cfg.n_samples; any device.
        cfg: Gives sample_rate, duration, n_fft, hop_length, n_mels and n_mfcc.

    Returns:
        (B, cfg.n_features, cfg.n_frames) float32 on the same device.
    """
    device, reach = waves.device, cfg.n_fft // 2
    waves = waves[:, : cfg.n_samples]
    # Frames that lie wholly in the padding are silent: there is nothing to transform.
    n_sounding = min(cfg.n_frames, -(-(waves.shape[1] + reach) // cfg.hop_length))
    n_padded = (n_sounding - 1) * cfg.hop_length + cfg.n_fft
    padded = torch.nn.functional.pad(waves, (reach, n_padded - reach - waves.shape[1]))
    frames = padded.unfold(-1, cfg.n_fft, cfg.hop_length) * hann_window(cfg.n_fft).to(device)  # (B, t, n_fft)
    # In place, and with one sum: these arrays take a megabyte per clip, and making them half of the time.
    squares = torch.view_as_real(torch.fft.rfft(frames)).square_()
    power = squares[..., 0] + squares[..., 1]  # (B, t, n_fft // 2 + 1)
    bands = mel_bands(cfg.sample_rate, cfg.n_fft, cfg.n_mels)
    mel = torch.cat([power[..., bins] @ filters.to(device) for bins, filters in bands], dim=-1)
    mel = torch.nn.functional.pad(mel, (0, 0, 0, cfg.n_frames - n_sounding))  # (B, T, n_mels)
    decibels = mel.clamp_(min=1e-10).log10_().mul_(10)
    decibels = decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - 80)
    mfcc = dct_matrix(cfg.n_mfcc, cfg.n_mels).to(device) @ decibels.mT  # (B, n_mfcc, T)
    deltas = [mfcc @ delta_matrix(cfg.n_frames, order).to(device) for order in (1, 2)]
    return torch.cat([mfcc, *deltas], dim=1)


# ---- augmentation ---------------------------------------------------------------------------------------


@functools.cache
def warp_matrices(cfg: Config) -> Tensor:
    """What cepstra become when the spectrum is stretched by (1 + cfg.warp) ** g, for 41 g from -1 to 1.

    The mel axis is read off at other places, so that with the DCT on either side it is one linear map
    (Pitz & Ney 2005, IEEE Transactions on Speech and Audio Processing 13:930).

    Returns:
        (41, n_mfcc, n_mfcc) float32.
    """
    points = mel_points(cfg.sample_rate, cfg.n_mels)
    dct = dct_matrix(cfg.n_mfcc, cfg.n_mels).double().numpy()
    bands = np.arange(cfg.n_mels)
    matrices: list[SignalArray] = []
    for power in np.linspace(-1, 1, 41):
        hertz = to_hertz(points[1:-1]) * (1 + cfg.warp) ** power
        place = np.interp(to_mel(hertz), points[1:-1], bands)  # past the last band it is the last
        matrices.append(dct @ np.maximum(0, 1 - np.abs(place[:, None] - bands)) @ dct.T)
    return torch.from_numpy(np.stack(matrices).astype(np.float32))


def augment_features(features: Tensor, cfg: Config) -> Tensor:
    """Make each clip one of another voice, tempo and start, at random: for training clips only.

    Formants and pitch move together, by up to cfg.warp; the tempo changes by up to cfg.stretch and the start
    by up to cfg.shift. It is done on the cepstra, for a fiftieth of what it costs on the waves. What comes
    into view from before or after the clip is silence.

    Args:
        features: (B, F, T) float32, as extract_features gives them; any device.
        cfg: Gives warp, stretch and shift, and what the features are made of.

    Returns:
        (B, F, T) float32.
    """
    n_clips, _, n_frames = features.shape
    mfcc = features[:, : cfg.n_mfcc]
    dct = dct_matrix(cfg.n_mfcc, cfg.n_mels).to(features)
    silence = torch.zeros_like(mfcc[:, :, :1])
    # 80 dB below the loudest band; a constant spectrum has but the first coefficient.
    silence[:, 0, 0] = ((dct.T @ mfcc).amax(dim=(1, 2)) - 80) * math.sqrt(cfg.n_mels)

    warps = warp_matrices(cfg).to(features)
    mfcc = warps[torch.randint(len(warps), (n_clips,), device=features.device)] @ mfcc

    tempo, start = 2 * torch.rand(2, n_clips, 1, device=features.device) - 1
    start = start * cfg.shift * cfg.sample_rate / cfg.hop_length
    place = (torch.arange(n_frames, device=features.device) - start) * (1 + cfg.stretch) ** tempo  # (B, T)
    left = place.floor().clamp(0, n_frames - 2)
    index = left.long()[:, None].expand_as(mfcc)
    between = (place - left).clamp(0, 1)[:, None]
    moved = torch.lerp(mfcc.gather(2, index), mfcc.gather(2, index + 1), between)
    inside = (place >= 0) & (place <= n_frames - 1)
    mfcc = torch.where(inside[:, None], moved, silence)
    return torch.cat([mfcc, *(mfcc @ delta_matrix(n_frames, order).to(features) for order in (1, 2))], dim=1)


# ---- many files, all cores ------------------------------------------------------------------------------


class ClipFeatures(NamedTuple):
    """What one audio file became."""

    path: Path
    features: FloatArray  # (n_features, n_frames)
    seconds: float  # of audio in it, at most cfg.duration
    digest: str  # equal for clips that sound the same to the network
    warning: str = ""  # what is odd about the audio, as that it is silent


CHUNK = 32  # files per task of a worker: long enough to hide the task's own cost
# A forked worker starts at once, and does nothing that fork makes unsafe; elsewhere than on Linux, others do.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def extract_file(path: Path, cfg: Config) -> ClipFeatures:
    """Read and standardise one file and extract its features.

    Raises:
        AudioError: The file cannot be used.
    """
    wave, warning = load_audio(path, sample_rate=cfg.sample_rate, n_samples=cfg.n_samples)
    # One clip at a time: it fits the processor's cache, and its features cannot depend on its neighbours.
    features = extract_features(torch.from_numpy(wave)[None], cfg)[0].numpy()
    if not np.isfinite(features).all():
        raise AudioError(path, f"samples as large as {np.abs(wave).max():.0e}: features are not finite")
    digest = hashlib.sha256(features.tobytes()).hexdigest()[:32]
    return ClipFeatures(path, features, wave.size / cfg.sample_rate, digest, warning)


def iter_features(
    paths: Sequence[str | Path], cfg: Config
) -> Generator[ClipFeatures | AudioError, None, None]:
    """Yield the features of every file, or why there are none, in order; memory does not grow with the files.

    A file whose decoder crashes costs itself only: its worker dies, and its chunk is tried again in parts.
    """
    n_workers = min(n_processes(cfg), -(-len(paths) // CHUNK))
    chunks = deque(paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK))
    if n_workers < (1 if START_METHOD == "fork" else 2):  # elsewhere the start of one takes seconds
        keep_freed_memory()
        for chunk in chunks:
            yield from _extract_chunk(chunk, cfg)
        return
    pool = _make_pool(n_workers)
    pending: deque[tuple[Sequence[str | Path], Future[list[ClipFeatures | AudioError]]]] = deque()
    try:
        while chunks or pending:
            try:
                while chunks and len(pending) < 2 * n_workers:
                    pending.append((chunks[0], pool.submit(_extract_chunk, chunks[0], cfg)))
                    chunks.popleft()
                results = pending[0][1].result()
                pending.popleft()
            except BrokenProcessPool:  # nothing that is pending will come
                chunks.extendleft(chunk for chunk, _ in reversed(pending))
                pending.clear()
                results = _extract_isolated(chunks.popleft(), cfg)
                pool = _make_pool(n_workers)
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for what comes next, where it can be told to.

    glibc gives megabytes back to the system at once, and gets them again page by page: that took a third of
    the time of a clip, and a twentieth of a training step.
    """
    tell = getattr(_c_library(), "mallopt", None)
    if tell is not None:
        tell(-3, 1 << 25)  # M_MMAP_THRESHOLD: below 32 MB, the most there is, from the heap
        tell(-1, 1 << 28)  # M_TRIM_THRESHOLD: up to 256 MB are kept


def n_processes(cfg: Config) -> int:
    """Worker processes to use: cfg.num_workers, or one per core this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cfg.num_workers < 0 else cfg.num_workers


def _extract_chunk(paths: Sequence[str | Path], cfg: Config) -> list[ClipFeatures | AudioError]:
    results: list[ClipFeatures | AudioError] = []
    with silenced():
        for path in paths:
            try:
                results.append(extract_file(Path(path), cfg))
            except AudioError as error:
                results.append(error)
    return results


def _extract_isolated(paths: Sequence[str | Path], cfg: Config) -> list[ClipFeatures | AudioError]:
    """Extract in a process of its own, and halve the list until the file that crashes it stands alone."""
    try:
        with _make_pool(1) as pool:
            return pool.submit(_extract_chunk, paths, cfg).result()
    except BrokenProcessPool:
        if len(paths) == 1:
            return [AudioError(Path(paths[0]), "crashed the audio decoder")]
    middle = len(paths) // 2
    return _extract_isolated(paths[:middle], cfg) + _extract_isolated(paths[middle:], cfg)


def _make_pool(n_workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context(START_METHOD)
    return ProcessPoolExecutor(n_workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    """Leave signals to the parent, use one core, and end with the parent, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    keep_freed_memory()
    gc.freeze()  # or the collector would write to, and so copy, all that the parent has: a list of all files
    torch.set_num_threads(1)  # also since a forked process would wait for threads that only its parent has
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


# ---- cache ----------------------------------------------------------------------------------------------
#
# cache_dir/<key>/<shard>.f32   features of up to SHARD_CLIPS clips, raw float32
# cache_dir/<key>/<shard>.json  its table: which file, in which state, is in which row; written last, so
#                               that a shard without a table never happened. Neither is written again
#
# The key stands for everything that shapes a feature except the file. A file's state is path, size and time
# of modification: a file that changed is simply not found, and is extracted into a new shard.

SHARD_CLIPS = 4096


class FeatureArray:
    """Features of N clips, memory-mapped: an array (N, n_features, n_frames) that may exceed the memory."""

    def __init__(self, shards: Sequence[Path], where: IntArray, shape: tuple[int, int]) -> None:
        """Map the shards; the clips are at `where`, (N, 2): number of the shard, row in it."""
        self.shape = (len(where), *shape)
        used, number = np.unique(where[:, 0], return_inverse=True)
        self._shards = [np.memmap(shards[k], np.float32, mode="r").reshape(-1, *shape) for k in used]
        self._where = np.stack([number, where[:, 1]], axis=1)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: IntArray) -> FloatArray:
        """Copy the features of the given clips, (B,) int64, into memory: (B, n_features, n_frames)."""
        where = self._where[indices]
        out = np.empty((len(where), *self.shape[1:]), np.float32)
        for shard in np.unique(where[:, 0]):
            chosen = where[:, 0] == shard
            out[chosen] = self._shards[shard][where[chosen, 1]]
        return out


def cache_key(cfg: Config) -> str:
    """Name the settings, the code and the libraries that shape the features, in 16 hex digits."""
    code: list[Callable[..., object]] = [
        load_audio,
        read_samples,
        _silence,
        _shortage,
        _has_last_page,
        hann_window,
        to_mel,
        to_hertz,
        mel_points,
        mel_filters,
        mel_bands,
        dct_matrix,
        delta_matrix,
        extract_features,
        extract_file,
    ]
    parts = [cfg.sample_rate, cfg.n_samples, cfg.n_fft, cfg.hop_length, cfg.n_mels, cfg.n_mfcc]
    libraries = [np.__version__, torch.__version__, soxr.__version__, soundfile.__libsndfile_version__]
    text = repr((parts, libraries, [inspect.getsource(function) for function in code]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Prepared(NamedTuple):
    """The readable ones of the files asked for, in the same order."""

    indices: IntArray  # (N,) into the paths asked for
    features: FeatureArray  # (N, n_features, n_frames)
    seconds: FloatArray  # (N,)
    digests: list[str]  # N
    failures: list[AudioError]
    warnings: list[tuple[Path, str]]  # of files that are used although something is odd about them


def load_features(paths: Sequence[str | Path], cfg: Config) -> Prepared:
    """Features of the files, from the cache where it has them; what it lacks is extracted and added.

    Raises:
        OSError: The cache cannot be written.
        UserError: No file can be read.
    """
    index = CacheIndex(paths, Path(cfg.cache_dir, cache_key(cfg)))
    failures = index.failures
    for table, rows in _read_tables(index.folder, cfg):
        if not isinstance(rows, str):
            index.take(table.with_suffix(".f32"), rows)
    if index.missing:
        failures = failures + _fill_cache(index, cfg)
    found = np.flatnonzero(index.where[:, 0] >= 0)
    if not found.size:
        raise UserError(f"none of {len(paths)} audio files can be read: {'; '.join(map(str, failures[:3]))}")
    features = FeatureArray(index.shards, index.where[found], (cfg.n_features, cfg.n_frames))
    digests = [index.digests[number] for number in found]
    warnings = [(Path(paths[number]), index.warnings[number]) for number in sorted(index.warnings)]
    return Prepared(found, features, index.seconds[found], digests, sorted(failures, key=str), warnings)


class CacheRow(NamedTuple):
    """What a table says of one row of its shard."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int
    seconds: float
    digest: str
    warning: str


def _mtime_ns(status: os.stat_result) -> int:
    """Time of modification within 64 bits, which a year after 2262 would leave."""
    return status.st_mtime_ns % 2**63


class CacheIndex:
    """Where the features of N files are in the cache, as far as they are there.

    In arrays, since an object for each of a million files would take more memory than their features in use.
    """

    def __init__(self, paths: Sequence[str | Path], folder: Path) -> None:
        """Note in which state the files are now."""
        self.paths, self.folder = paths, folder
        self.failures: list[AudioError] = []  # files that are gone, or out of reach
        self._sizes, self._times = array("q"), array("q")
        self._number: dict[str, int] = {}
        here = str(Path.cwd())
        for number, path in enumerate(paths):
            try:
                status = os.stat(path)  # noqa: PTH116 - to make a Path takes longer than to look at the file
            except OSError as error:
                self.failures.append(AudioError(Path(path), error.strerror or str(error)))
                self._sizes.append(-1)
                self._times.append(-1)
            else:
                self._sizes.append(status.st_size)
                self._times.append(_mtime_ns(status))
                self._number[os.path.join(here, path)] = number  # noqa: PTH118
        self.forget()

    def forget(self) -> None:
        """Start anew with the tables: nothing is found yet."""
        self.shards: list[Path] = []
        self.where = np.full((len(self.paths), 2), -1, np.int64)  # number of the shard, row in it
        self.seconds = np.zeros(len(self.paths), np.float32)
        self.digests = [""] * len(self.paths)
        self.warnings: dict[int, str] = {}

    def take(self, shard: Path, rows: Iterable[CacheRow]) -> None:
        """Note the rows of a shard that belong to our files as they are now."""
        for place, row in enumerate(rows):
            number = self._number.get(row.path)
            if number is not None and (self._sizes[number], self._times[number]) == (row.size, row.mtime_ns):
                self.where[number] = len(self.shards), place
                self.seconds[number], self.digests[number] = row.seconds, row.digest
                if row.warning:
                    self.warnings[number] = row.warning
        self.shards.append(shard)

    @property
    def missing(self) -> dict[str, int]:
        """The files that are not in the cache: absolute path -> number."""
        return {path: number for path, number in self._number.items() if self.where[number, 0] < 0}

    def row(self, path: str, features: ClipFeatures) -> CacheRow:
        """What a table shall say of a file; its absolute path says which."""
        size, mtime_ns = self._sizes[self._number[path]], self._times[self._number[path]]
        return CacheRow(path, size, mtime_ns, features.seconds, features.digest, features.warning)


def _read_tables(folder: Path, cfg: Config) -> Iterator[tuple[Path, list[CacheRow] | str]]:
    """Yield the tables in the cache with what they hold, or why they cannot be used."""
    for table in sorted(folder.glob("*.json")):
        try:
            content = json.loads(table.read_text(encoding="utf-8"))
            _check_shard(table.with_suffix(".f32"), content, cfg)
            rows = [CacheRow(*row) for row in content["clips"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            yield table, str(error)
        else:
            yield table, rows


def _check_shard(shard: Path, content: Mapping[str, Any], cfg: Config) -> None:
    """Raise ValueError unless the shard is as it was written; its bytes are read only if it was touched."""
    status = shard.stat()
    if status.st_size != 4 * len(content["clips"]) * cfg.n_features * cfg.n_frames:
        raise ValueError(f"{shard.name} has {status.st_size} bytes")
    kinds = [str, int, int, float, str, str]  # of a CacheRow; its path has no NUL, its seconds are few
    if not all(
        list(map(type, row)) == kinds and "\0" not in row[0] and 0 <= row[3] <= 600
        for row in content["clips"]
    ):
        raise ValueError("rows of another kind")
    if status.st_mtime_ns != content["mtime_ns"] and _checksum(shard) != content["crc32"]:
        raise ValueError(f"{shard.name} was changed")


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _fill_cache(index: CacheIndex, cfg: Config) -> list[AudioError]:
    """Extract what the cache lacks, shard by shard; a shard once written stays, whatever comes after."""
    index.folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(index.folder / "lock")  # of the operating system: it goes with its process
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"note: another run is filling {index.folder}: waiting for it")
        lock.acquire()
    failures: list[AudioError] = []
    try:
        _clean_cache(index, cfg)
        missing = list(index.missing)
        with contextlib.closing(
            iter_features([index.paths[n] for n in index.missing.values()], cfg)
        ) as results:
            pairs = zip(missing, results, strict=True)
            with tqdm(pairs, "features", len(missing), unit="clip", disable=None) as progress:
                for _ in range(0, len(missing), SHARD_CLIPS):
                    failures += _write_shard(index, islice(progress, SHARD_CLIPS))
    finally:
        lock.release()
    return failures


def _clean_cache(index: CacheIndex, cfg: Config) -> None:
    """Read the tables anew; remove what is damaged, half written, or of files that are gone or changed."""
    index.forget()
    for table, rows in _read_tables(index.folder, cfg):
        if isinstance(rows, str):
            say(f"note: cache {table} is damaged ({rows}): its clips are extracted again")
        elif any(map(_may_be_wanted, rows)):
            index.take(table.with_suffix(".f32"), rows)
    for path in index.folder.iterdir():
        if path.name != "lock" and path.with_suffix(".f32") not in index.shards:
            with contextlib.suppress(OSError):  # Windows keeps a file that another run has mapped
                path.unlink()


def _may_be_wanted(row: CacheRow) -> bool:
    path = Path(row.path)
    try:
        status = path.stat()
    except FileNotFoundError:
        return not path.parent.exists()  # a disk that is not mounted today may be so tomorrow
    except OSError:  # not ours to read, perhaps another's
        return True
    return (status.st_size, _mtime_ns(status)) == (row.size, row.mtime_ns)


def _write_shard(
    index: CacheIndex, results: Iterable[tuple[str, ClipFeatures | AudioError]]
) -> list[AudioError]:
    """Write one shard, its table after it; note its rows in the index and return what could not be read."""
    shard = index.folder / f"{uuid.uuid4().hex}.f32"
    rows: list[CacheRow] = []
    failures: list[AudioError] = []
    crc = 0
    half = shard.with_suffix(".tmp")  # of the table
    try:
        with shard.open("wb") as file:
            for path, result in results:
                if isinstance(result, AudioError):
                    failures.append(result)
                    continue
                content = result.features.tobytes()
                file.write(content)
                crc = zlib.crc32(content, crc)
                rows.append(index.row(path, result))
            file.flush()
            os.fsync(file.fileno())
        if rows:
            table = {"mtime_ns": shard.stat().st_mtime_ns, "crc32": crc, "clips": rows}
            half.write_text(json.dumps(table), encoding="utf-8")
            half.replace(shard.with_suffix(".json"))
            index.take(shard, rows)
    except OSError as error:  # that of a failing write does not say where
        raise OSError(error.errno, error.strerror or str(error), str(shard)) from None
    finally:
        if not shard.with_suffix(".json").exists():  # nothing was readable, or it did not come to the end
            half.unlink(missing_ok=True)
            shard.unlink(missing_ok=True)
    return failures


# ---- the corpus, and its split --------------------------------------------------------------------------

MAX_UNREADABLE = 0.1  # of the files: with more, something is wrong with the data as a whole


class Corpus(NamedTuple):
    """All readable labelled clips."""

    labels: tuple[str, ...]
    clips: list[Clip]  # N
    targets: IntArray  # (N,) their class numbers
    sources: list[Source]  # N
    prepared: Prepared


def load_corpus(cfg: Config) -> Corpus:
    """Find and prepare all labelled clips, and report on stderr what is odd about them.

    Raises:
        UserError: There are no clips, or too many cannot be read.
    """
    if cfg.demo:
        make_demo(cfg.data_root)
    labels = find_labels(cfg.data_root, skip=cfg.test_root)
    clips = list_clips(cfg.data_root, labels)
    if not clips:
        raise UserError(
            f"no audio files below {cfg.data_root}: looked for {' '.join(sorted(AUDIO_SUFFIXES))}"
        )
    for path in sorted(cfg.data_root.glob("*")):
        if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
            say(f"note: {path} is in no class folder: left out")
    prepared = load_features([clip.path for clip in clips], cfg)
    report_failures(prepared.failures)
    report_warnings(prepared.warnings)
    if len(prepared.failures) > MAX_UNREADABLE * len(clips):
        raise UserError(
            f"{len(prepared.failures)} of {len(clips)} audio files cannot be read, more than one in ten: "
            "mend or remove them",
            code=1,
        )
    clips = [clips[index] for index in prepared.indices]
    used, targets = np.unique([clip.label for clip in clips], return_inverse=True)
    for label in np.setdiff1d(range(len(labels)), used):
        say(f"note: class folder {cfg.data_root / labels[label]} has no usable clip: left out")
    if len(used) < len(labels):
        clips = [Clip(clip.path, int(label)) for clip, label in zip(clips, targets, strict=True)]
    _report_duplicates(clips, prepared.digests)
    speakers = read_manifest(Path(cfg.manifest), cfg.data_root) if cfg.manifest and not cfg.demo else {}
    sources = [source_of(clip.path) for clip in clips]
    if speakers:
        sources = [
            _share_source(source.corpus, speakers.get(clip.path, source.speaker))
            for clip, source in zip(clips, sources, strict=True)
        ]
    return Corpus(tuple(labels[label] for label in used), clips, targets, sources, prepared)


def read_manifest(path: Path, root: Path) -> dict[str, str]:
    """Speakers by clip, from a CSV file with the columns filename (below `root`) and speaker.

    Raises:
        UserError: The file cannot be understood, or a name in it leads out of `root` or to no file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error) as error:
        raise UserError(f"manifest {path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise UserError(f"manifest {path}: needs a header, filename,speaker, and a row for each clip")
    speakers: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        name, speaker = row.get("filename"), row.get("speaker")
        if not (name and speaker):
            raise UserError(f"manifest {path}, line {number}: needs a filename and a speaker")
        clip = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"manifest {path}, line {number}: {name} leads out of {root}")
        if not os.path.isfile(clip):  # noqa: PTH113 - Path.is_file raises OSError for a name that is too long
            raise UserError(f"manifest {path}, line {number}: no file {clip}")
        if speakers.setdefault(str(clip), speaker) != speaker:
            raise UserError(f"manifest {path}, line {number}: {name} has two speakers")
    return speakers


def report_failures(failures: Sequence[AudioError]) -> None:
    """Name every file that could not be used, and their number."""
    for error in failures:
        say(f"skipped {error}")
    if failures:
        say(f"skipped {len(failures)} unreadable file(s)")


def report_warnings(warnings: Sequence[tuple[Path, str]]) -> None:
    """Name the files that were used but are odd, the first twenty of many."""
    for path, warning in warnings[:20]:
        say(f"used {path}: {warning}")
    if len(warnings) > 20:
        say(f"used {len(warnings)} odd files, {len(warnings) - 20} of them not shown")


def _report_duplicates(clips: Sequence[Clip], digests: Sequence[str]) -> None:
    shared = {digest for digest, count in Counter(digests).items() if count > 1}
    same: dict[str, list[Clip]] = {}
    for clip, digest in zip(clips, digests, strict=True):
        if digest in shared:
            same.setdefault(digest, []).append(clip)
    groups = list(same.values())
    for group in groups[:5]:
        contradiction = " under different labels" if len({clip.label for clip in group}) > 1 else ""
        say(f"note: same audio{contradiction}: {', '.join(clip.path for clip in group)}")
    if groups:
        say(f"note: {len(groups)} group(s) of clips with the same audio; each stays on one side of the split")


class Split(NamedTuple):
    """Ascending indices of the clips of each part; the parts share no clip and no audio."""

    train: IntArray  # all that is fitted is fitted to these
    val: IntArray  # select the checkpoint and steer the training
    holdout: IntArray  # scored once, at the end; may be empty


def split_corpus(corpus: Corpus, cfg: Config, fold: int = 0) -> Split:
    """Split as the config says, by clip or by speaker; `fold` is which of cfg.folds parts is held out.

    Raises:
        UserError: Parts would be too small, or a speaker is not known.
    """
    n_clips = len(corpus.clips)
    assign = (
        functools.partial(assign_speakers, corpus.sources)
        if cfg.split == "speaker"
        else functools.partial(assign_clips, corpus.targets)
    )
    part_of_clip = assign(
        corpus.prepared.digests,
        val_fraction=cfg.val_fraction,
        holdout_fraction=cfg.holdout_fraction,
        seed=cfg.seed,
        fold=fold,
        n_folds=cfg.folds,
    )
    split = Split(*(np.flatnonzero(part_of_clip == part) for part in range(3)))
    if cfg.folds and (len(split.train) < 2 or not len(split.holdout)):
        raise UserError(f"folds = {cfg.folds}: too many for these {n_clips} clips: lower it")
    if len(split.train) < 2:
        raise UserError(
            f"val_fraction = {cfg.val_fraction}, holdout_fraction = {cfg.holdout_fraction}: leave "
            f"{len(split.train)} of {n_clips} clips for training: lower them or add clips"
        )
    if len(split.val) < len(corpus.labels):
        raise UserError(
            f"val_fraction = {cfg.val_fraction}: leaves {len(split.val)} of {n_clips} clips for validation, "
            f"fewer than the {len(corpus.labels)} classes: raise it or add clips"
        )
    return split


def assign_clips(
    targets: IntArray,
    digests: Sequence[str],
    *,
    val_fraction: float,
    holdout_fraction: float,
    seed: int,
    fold: int = 0,
    n_folds: int = 0,
) -> IntArray:
    """Assign clips at random to training (0), validation (1) and held out (2), in every class alike.

    Args:
        targets: (N,) class of each clip.
        digests: N names; clips of one name (the same audio) stay together.
        val_fraction: Share of each class for validation; with folds, of what the fold leaves.
        holdout_fraction: Share of each class held out until the end; with folds they decide.
        seed: Equal seeds and clips give equal parts.
        fold: Which fold is held out.
        n_folds: How many there are; together they hold every clip once. 0: none.

    Returns:
        (N,) the parts.
    """
    rng = np.random.default_rng(seed)
    # Numbered as they come: sorted by name, they would let the last bits of a feature shuffle the split.
    numbers: dict[str, int] = {}
    group_of = np.array([numbers.setdefault(digest, len(numbers)) for digest in digests])
    if not n_folds:
        return _deal(targets, group_of, {1: val_fraction, 2: holdout_fraction}, rng)
    dealt = _deal(targets, group_of, dict.fromkeys(range(1, n_folds), 1 / n_folds), rng)
    parts = np.where(dealt == fold, 2, 0)
    rest = np.flatnonzero(parts == 0)
    parts[rest] = _deal(targets[rest], group_of[rest], {1: val_fraction}, rng)
    return parts


def _deal(
    targets: IntArray, group_of: IntArray, shares: Mapping[int, float], rng: np.random.Generator
) -> IntArray:
    """Deal groups at random to parts, each part its share of each class, and part 0 the rest."""
    part_of_group = np.full(group_of.max(initial=0) + 1, -1)
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        quota = {part: round(share * len(members)) for part, share in shares.items()}
        groups, sizes = np.unique(group_of[members], return_counts=True)
        for index in rng.permutation(len(groups)):
            group, size = groups[index], int(sizes[index])
            if part_of_group[group] >= 0:  # taken by another class: the same audio under two labels
                continue
            part = next((part for part in quota if size <= quota[part]), 0)
            part_of_group[group] = part
            if part:
                quota[part] -= size
    return part_of_group[group_of]


def assign_speakers(
    sources: Sequence[Source],
    digests: Sequence[str],
    *,
    val_fraction: float,
    holdout_fraction: float,
    seed: int,
    fold: int = 0,
    n_folds: int = 0,
) -> IntArray:
    """Assign whole speakers to training (0), validation (1) and held out (2), in every corpus alike.

    A corpus of fewer than three speakers stays in training as a whole, except that folds hold every speaker
    out once.

    Args:
        sources: N origins of clips.
        digests: N names; speakers who share a name (the same audio) count as one.
        val_fraction: Share of the speakers of each corpus for validation, at least one.
        holdout_fraction: Share of them held out until the end, at least one unless it is 0.
        seed: Equal seeds and clips give equal parts.
        fold: Which fold is held out.
        n_folds: How many there are. 0: none.

    Returns:
        (N,) the parts.

    Raises:
        UserError: The speaker of a clip is not known.
    """
    unknown = sum(not source.speaker for source in sources)
    if unknown:
        raise UserError(
            f"split = 'speaker': the speakers of {unknown} of {len(sources)} clips are not known: name files "
            "as RAVDESS, CREMA-D, TESS, SAVEE or EmoDB do, or pass --manifest"
        )
    first_with: dict[str, str] = {}  # audio -> the speaker it was first found with
    same_as = {source.speaker: source.speaker for source in sources}
    for source, digest in zip(sources, digests, strict=True):
        other = first_with.setdefault(digest, source.speaker)
        if same_as[other] != same_as[source.speaker]:
            old = same_as[source.speaker]
            same_as = {name: same_as[other] if who == old else who for name, who in same_as.items()}
    # By the first word of the corpus: the actors of RAVDESS both speak and sing.
    corpus_of = {same_as[source.speaker]: source.corpus.split()[0] for source in reversed(sources)}
    rng = np.random.default_rng(seed)
    part_of: dict[str, int] = {}
    turn = 0
    for corpus in sorted(set(corpus_of.values())):
        speakers = rng.permutation(sorted(name for name, where in corpus_of.items() if where == corpus))
        if n_folds:
            held = [(turn + index) % n_folds == fold for index in range(len(speakers))]
            turn += len(speakers)  # the small corpora's few speakers go to different folds
        else:
            held = [index < _count(holdout_fraction, len(speakers)) for index in range(len(speakers))]
        rest = [name for name, out in zip(speakers, held, strict=True) if not out]
        n_val = _count(val_fraction, len(speakers) if not n_folds else len(rest))
        part_of |= {str(name): 2 for name, out in zip(speakers, held, strict=True) if out}
        part_of |= {str(name): int(index < n_val) for index, name in enumerate(rest)}
    return np.array([part_of[same_as[source.speaker]] for source in sources], np.int64)


def _count(fraction: float, n_speakers: int) -> int:
    """How many speakers of a corpus a fraction is."""
    return max(1, round(fraction * n_speakers)) if fraction and n_speakers > 2 else 0


def feature_stats(features: FeatureArray, indices: IntArray) -> tuple[FloatArray, float]:
    """What centres and scales the features, from the frames of the given clips alone.

    The scale is one for all rows: with its own for each row, the noise in the deltas of high coefficients
    would weigh as much as the loudness contour, and costs accuracy (assets/experiments.md).

    Returns:
        The mean of each row, (n_features,) float32, and the root of the mean variance of the rows, > 0.
    """
    total = np.zeros(features.shape[1])
    squares = np.zeros(features.shape[1])
    for start in range(0, len(indices), 256):
        block = features[indices[start : start + 256]].astype(np.float64)
        total += block.sum(axis=(0, 2))
        squares += np.square(block).sum(axis=(0, 2))
    n_frames = len(indices) * features.shape[2]
    mean = total / n_frames
    variance = float(np.mean(squares / n_frames - mean**2))
    is_noise = variance <= 1e-12 * float(np.mean(squares / n_frames))  # what rounding leaves of no variance
    return mean.astype(np.float32), 1.0 if is_noise else math.sqrt(variance)


# ---- demo corpus ----------------------------------------------------------------------------------------
#
# Synthetic speech-like clips to try the pipeline with: a glottal pulse train and breath (the source) through
# moving formants (the filter), in several voices. What a model learns from it says nothing about real speech.


ResponseArray: TypeAlias = npt.NDArray[np.complex64]
DEMO_RATE = 22050  # Hz
HOP = 256  # samples between the frames that the formants move by


# How each class is spoken, relative to the speaker. The directions are from the literature, the sizes are
# ours, tuned until the classes overlap. Angry, Fearful, Happy, Sad: Juslin & Laukka 2003, Psychological
# Bulletin 129:770 (anger fast, loud, bright, pitch high and variable; fear fast, soft, high, little
# variability; happiness fast, variable, rising; sadness slow, soft, dull, low, falling). Disgusted: Murray &
# Arnott 1993, J. Acoust. Soc. Am. 93:1097 (very slow, low, falling, grumbled). Surprised (high, wide,
# rising), and every breath and jitter but the grumble: our guesses.
#   pitch      mean, semitones                      rate    log2 of the tempo ratio
#   span       spread of the accents, semitones     tilt    dB per octave above 300 Hz, added to the pulse's
#   contour    gained from start to end, semitones  breath  aspiration noise relative to the pulses, dB
#   energy     dB                                   jitter  % of variation between cycles; shimmer is triple
EMOTIONS = {  # pitch, span, contour, energy, rate, tilt, breath, jitter
    "Angry": [2.5, 3.0, -1.5, 4.2, 0.20, 1.6, -27, 2.0],
    "Disgusted": [-2.2, 2.2, -4.0, -1.0, -0.30, -0.3, -23, 2.7],
    "Fearful": [4.5, 1.3, 0.0, -3.0, 0.35, -0.5, -19, 2.2],
    "Happy": [4.0, 3.2, 3.0, 3.0, 0.25, 1.0, -28, 0.7],
    "Neutral": [0.0, 1.6, -2.0, 0.0, 0.0, 0.2, -29, 0.8],
    "Sad": [-1.5, 1.1, -3.0, -5.0, -0.28, -2.0, -21, 1.0],
    "Surprised": [5.5, 3.8, 6.0, 1.0, -0.10, 0.5, -23, 0.9],
}
SPREAD = np.array([1.4, 0.65, 1.6, 2.1, 0.14, 1.0, 2.6, 0.5])  # of one clip around its class mean

# Hz. Men's mean F1, F2, F3 in heed hid head had hod hawed hood who'd hud heard: Peterson & Barney 1952.
# (J. Acoust. Soc. Am. 24:175)
F1 = [270, 390, 530, 660, 730, 570, 440, 300, 640, 490]
F2 = [2290, 1990, 1840, 1720, 1090, 840, 1020, 870, 1190, 1350]
F3 = [3010, 2550, 2480, 2410, 2440, 2410, 2240, 2240, 2390, 1690]
VOWELS = np.array([F1, F2, F3])
LOCI = np.array([[250, 250, 250], [900, 1750, 2100], [2300, 2650, 2400]])  # lips, tongue tip, tongue back


class Voice(NamedTuple):
    """A speaker."""

    pitch: float  # Hz
    tract: float  # formants relative to the men's averages: a shorter tract has higher ones
    habits: SignalArray  # (8,) offsets that the speaker adds to every class's row


def make_voice(rng: np.random.Generator) -> Voice:
    """Draw a speaker of 90 to 230 Hz; higher voices tend to have shorter vocal tracts."""
    pitch = 90 * (230 / 90) ** rng.random()
    tract = (pitch / 115) ** 0.22 * rng.normal(1, 0.03)
    return Voice(pitch, tract, 0.5 * SPREAD * rng.normal(size=SPREAD.size))


def draw_syllables(rate: float, rng: np.random.Generator) -> tuple[SignalArray, float]:
    """Lay out 6 to 10 syllables of five knots each, at `rate` times the usual tempo.

    Returns rows (7, knots): time (s), levels of voice and hiss, accent, F1, F2, F3 (Hz); and the length (s).
    """
    n = int(rng.integers(6, 11))
    lengths = rng.uniform(0.14, 0.28, n)
    gaps = np.where(rng.random(n + 1) < 0.15, rng.uniform(0.08, 0.25, n + 1), 0)
    gaps[[0, -1]] = rng.uniform(0.08, 0.2, 2)  # room noise before and after
    total = float(lengths.sum() + gaps.sum())
    scale = min(max(total / rate, 1.2), 3.5) / total
    starts = np.cumsum(gaps[:-1] + np.append(0, lengths[:-1]))
    time = (starts[:, None] + lengths[:, None] * [0, 0.3, 0.45, 0.8, 0.99]) * scale
    unvoiced, stress = rng.random((n, 1)) < 0.3, rng.uniform(0.6, 1, (n, 1))
    level = stress * np.where(unvoiced, [0, 0, 1, 0.7, 0.15], [0.15, 0.6, 1, 0.7, 0.15])
    level[gaps[:-1] > 0, 0] = level[gaps[1:] > 0, 4] = 0
    noise = unvoiced * rng.uniform(0.1, 0.3, (n, 1)) * [0, 1, 0, 0, 0]
    accent = rng.normal(size=(n, 1)) * [0.4, 0.9, 1.2, 1.0, 0.6]
    vowel, locus = VOWELS[:, rng.integers(10, size=n)], LOCI[:, rng.integers(3, size=n)]
    leaving = (vowel + np.roll(locus, -1, axis=1)) / 2  # on the way to the next consonant
    formants = np.stack([locus, vowel, vowel, vowel, leaving], axis=2)
    return np.stack([time, level, noise, accent, *formants]).reshape(7, -1), total * scale


def glottal_source(f0: SignalArray, breath: float, jitter: float, rng: np.random.Generator) -> SignalArray:
    """Turn a pitch contour (n,), in cycles per sample, into glottal flow derivative plus breath (n,)."""
    cycle = np.cumsum(f0).astype(np.intp)
    wobble = np.exp(rng.normal(0, jitter / 100, (2, cycle[-1] + 1)))  # one draw per cycle
    phase = np.cumsum(f0 * wobble[0, cycle]) % 1
    opening, closing = 0.5 - 0.5 * np.cos(np.pi * phase / 0.4), np.cos(np.pi / 2 * (phase - 0.4) / 0.16)
    flow = np.where(phase < 0.4, opening, np.where(phase < 0.56, closing, 0))  # Rosenberg 1971
    # A difference of the flow is its derivative averaged over a sample, which aliases less than its value.
    pulses = np.diff(flow, prepend=0) * wobble[1, cycle] ** 3
    noise = rng.normal(size=f0.size) * (0.3 + flow)  # the air rushes while the glottis is open
    return np.asarray(pulses / pulses.std() + 10 ** (breath / 20) * noise / noise.std())


def resonance(formant: SignalArray, sample_rate: int, delay: ResponseArray) -> ResponseArray:
    """Give the response (m, bins), 1 at 0 Hz, of resonators at (m,) Hz; `delay` (bins,) is one sample's."""
    radius = np.exp(-np.pi * (50 + 0.04 * formant) / sample_rate)  # the bandwidth grows with the frequency
    a = (-2 * radius * np.cos(2 * np.pi * formant / sample_rate)).astype(np.float32)[:, None]
    b = (radius**2).astype(np.float32)[:, None]
    return (1 + a + b) / (1 + delay * (a + b * delay))


def vocal_tract(
    source: SignalArray, formants: SignalArray, fixed: SignalArray, tilt: float, sample_rate: int
) -> SignalArray:
    """Filter (n,) by resonators, moving (3, frames) and fixed (m,), in Hz; a frame is centred every HOP."""
    count = formants.shape[1]
    padded = np.pad(source, (HOP, 3 * HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[::HOP][:count]
    frames = (frames * np.hanning(2 * HOP + 1)[:-1]).astype(np.float32)
    hertz = np.fft.rfftfreq(4 * HOP, 1 / sample_rate)  # twice the window, for the formants to ring out
    delay = np.exp(-2j * np.pi * hertz / sample_rate).astype(np.complex64)
    gain = resonance(fixed, sample_rate, delay).prod(axis=0) * (np.maximum(hertz, 300) / 300) ** (tilt / 6.02)
    spectrum = np.fft.rfft(frames, 4 * HOP) * gain.astype(np.complex64)
    for formant in formants:
        spectrum *= resonance(formant, sample_rate, delay)
    pieces = np.fft.irfft(spectrum).reshape(count, 4, HOP)
    out = np.zeros((count + 3, HOP))
    for k in range(4):
        out[k : k + count] += pieces[:, k]
    return out.ravel()[HOP : HOP + source.size]


def synthesize_clip(emotion: str, voice: Voice, rng: np.random.Generator, sample_rate: int) -> FloatArray:
    """Synthesize one utterance (n,) float32 in [-1, 1], 1.2 to 3.5 s long."""
    traits = EMOTIONS[emotion] + voice.habits + SPREAD * rng.normal(size=SPREAD.size)
    pitch, span, contour, energy, rate, tilt, breath, jitter = traits.tolist()
    (knots, *levels, f1, f2, f3), length = draw_syllables(2**rate, rng)
    time = np.arange(round(length * sample_rate)) / sample_rate
    level, hiss, accent = (np.interp(time, knots, values) for values in levels)
    semitones = pitch + contour * (time / length - 0.5) + max(span, 0.3) * accent
    f0 = np.clip(voice.pitch * 2 ** (semitones / 12), 60, 600)
    centres = np.arange(0, time.size + HOP, HOP) / sample_rate
    moving = voice.tract * np.stack([np.interp(centres, knots, values) for values in (f1, f2, f3)])
    fixed = voice.tract * np.arange(3500, sample_rate / 2 / voice.tract, 1000)  # as in a tube of 17 cm
    source = level * glottal_source(f0 / sample_rate, breath, max(jitter, 0.2), rng)
    voiced = vocal_tract(source, moving, fixed, tilt, sample_rate)
    band = np.hanning(18) * np.cos(2 * np.pi * rng.uniform(3000, 7000) / sample_rate * np.arange(18))
    hissed = hiss * np.convolve(rng.normal(size=time.size), band, "same")
    room = 10 ** rng.uniform(-3.6, -3.0) * rng.normal(size=time.size)
    speech = 0.05 * 10 ** (energy / 20) * (voiced / voiced.std() + hissed)
    return np.asarray(np.tanh(speech + room), dtype=np.float32)


def make_demo(folder: Path, *, n_speakers: int = 10, n_takes: int = 9, seed: int = 0) -> None:
    """Write the corpus into `folder`, all of it or nothing; an existing `folder` is left as it is."""
    say(f"note: synthetic demo corpus, not real speech, in {folder}")
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
        for stale in folder.parent.glob(f".{folder.name}-*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        if not folder.exists():  # else another run has made it meanwhile
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
                draft = Path(scratch) / folder.name
                write_demo(draft, n_speakers, n_takes, seed)
                draft.replace(folder)


def write_demo(folder: Path, n_speakers: int, n_takes: int, seed: int) -> None:
    """Write <Emotion>/spkNN_takeNN.wav, Test/<k>.wav, and the two lists that go with Test."""
    for name in [*EMOTIONS, "Test"]:
        (folder / name).mkdir(parents=True)
    # Each random stream has a key of its own, of four numbers because NumPy pads shorter keys with zeros.
    other = len(EMOTIONS)
    order = np.random.default_rng([seed, other, 0, 1]).permutation(n_speakers * len(EMOTIONS))
    truth = dict.fromkeys(range(len(order)), "")  # of the test clips
    for number, (speaker, index) in zip(order, np.ndindex(n_speakers, len(EMOTIONS)), strict=True):
        voice = make_voice(np.random.default_rng([seed, other, speaker, 0]))
        truth[int(number)] = emotion = list(EMOTIONS)[index]
        for take in range(n_takes + 1):  # take 0 goes to Test
            rng = np.random.default_rng([seed, index, speaker, take])
            name = f"{emotion}/spk{speaker:02d}_take{take:02d}.wav" if take else f"Test/{number}.wav"
            clip = synthesize_clip(emotion, voice, rng, DEMO_RATE)
            content = io.BytesIO()  # libsndfile would not say of a full disk that it is full
            soundfile.write(content, clip, DEMO_RATE, format="WAV", subtype="PCM_16")
            (folder / name).write_bytes(content.getvalue())
    submission = ["filename,emotion", *(f"{k}.wav,Neutral" for k in truth)]
    (folder / "sample_submission.csv").write_text("\n".join(submission) + "\n")
    notice = "Synthetic speech made by prepare.py to try the pipeline: not real speech. The truth for Test:"
    answers = [notice, *(f"{k}.wav {emotion}" for k, emotion in truth.items())]
    (folder / "SYNTHETIC.txt").write_text("\n".join(answers) + "\n")


# ---- the script -----------------------------------------------------------------------------------------


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fill the cache and print the table of classes."""
    cfg = parse_config(argv, description=__doc__)
    corpus = load_corpus(cfg)
    seconds = np.bincount(corpus.targets, corpus.prepared.seconds)
    counts = np.bincount(corpus.targets)
    names = [printable(label) for label in corpus.labels]
    width = max(len("total"), *map(len, names))
    print(f"{'class':{width}}  clips  seconds")
    for row in zip(names, counts, seconds, strict=True):
        print("{:{width}}  {:5d}  {:7.0f}".format(*row, width=width))
    print(f"{'total':{width}}  {counts.sum():5d}  {seconds.sum():7.0f}")
    for folder in sorted(path for path in Path(cfg.cache_dir).iterdir() if path.is_dir()):
        # Only what is named as a cache: there may be other folders here, up to those of the clips themselves.
        if re.fullmatch("[0-9a-f]{16}", folder.name) and folder.name != cache_key(cfg):
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            say(f"note: {folder} holds {size:.0f} MB of features for other settings: delete it at will")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
