"""Finds the clips, cuts them into windows and extracts their features into a cache.

    python prepare.py

fills the cache and prints how many clips there are of each class, and how many minutes training uses.
"""

from config import Config, UserError, make_parser, note, parse, printable, run

if __name__ == "__main__":  # answers --help, or a bad flag, before the slow imports
    needed = (
        "data_dir test_dir cache_dir manifest labels_from extra_labels num_workers "
        "sample_rate duration max_windows n_mfcc n_fft hop_length n_mels"
    )
    ARGS = parse(make_parser(__doc__, needed.split()))

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import soundfile
import soxr
import torch
from filelock import FileLock, Timeout
from joblib import cpu_count
from torch import Tensor, nn
from tqdm import tqdm

FloatArray: TypeAlias = npt.NDArray[np.float32]

# ---- the table of clips ----------------------------------------------------------------------------------

# What libsndfile reads, and what ffmpeg does besides.
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .bwf .rf64 .w64 .flac .ogg .oga .opus .spx .mp3 .mp2 .mpga .aiff .aif .aifc .au .snd .caf "
    ".voc .sph .m4a .m4b .m4r .mp4 .m4v .mov .mkv .mka .avi .flv .f4v .mpg .mpeg .mts .ogv .wmv .asf .rm .ra "
    ".aac .ac3 .eac3 .dts .wma .webm .weba .amr .awb .gsm .3gp .3ga .3g2 .ape .wv .tta .mpc".split()
)
# What lies beside clips, and nobody misses.
_OTHER_SUFFIXES = frozenset(
    ".csv .tsv .txt .md .json .xml .html .pdf .doc .docx .xls .xlsx .png .jpg .jpeg .db .ini .lab .textgrid "
    ".py .ipynb".split()
)

# What the emotions are called: in words, as TESS and folders do, and in the codes of CREMA-D, RAVDESS, SAVEE
# and EmoDB, no two of which contradict each other.
_NAMES = {
    "Angry": "angry anger ANG 05 a W",
    "Disgusted": "disgusted disgust DIS 07 d E",
    "Fearful": "fearful fear FEA 06 f A",
    "Happy": "happy happiness joy HAP 03 h F",
    "Neutral": "neutral NEU 01 n N",
    "Sad": "sad sadness SAD 04 sa T",
    "Surprised": "surprised surprise suprised suprise ps 08 su",
    "Calm": "calm 02",
    "Bored": "bored boredom L",
    "Amused": "amused amusement",
    "Contempt": "contempt contemptuous",
    "Excited": "excited excitement",
    "Frustrated": "frustrated frustration",
}
EXTRA_LABELS = frozenset({"Calm", "Bored"})  # that few corpora have
_BY_CODE = {name: emotion for emotion, names in _NAMES.items() for name in names.split()}
_BY_WORD = {name.lower(): emotion for name, emotion in _BY_CODE.items() if len(name) > 2}

# What folders of the parts of a data set are called, which are no speakers.
_PARTS = {"train": "train training", "val": "val valid validation dev eval"}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names.split()}

# How the common corpora name their files, RAVDESS with 01 for a film with sound, 02 for one without, and 03
# for the sound alone. A new one also needs its codes in _NAMES.
_CORPORA = {
    "CREMA-D": r"(?P<speaker>1\d{3})_[A-Z]{3}_(?P<code>ANG|DIS|FEA|HAP|NEU|SAD)_(?:LO|MD|HI|XX?)",
    "RAVDESS speech": r"0[1-3]-01-(?P<code>0[1-8])-\d\d-\d\d-\d\d-(?P<speaker>\d\d)",
    "RAVDESS song": r"0[1-3]-02-(?P<code>0[1-8])-\d\d-\d\d-\d\d-(?P<speaker>\d\d)",
    "SAVEE": r"(?P<speaker>DC|JE|JK|KL)_(?P<code>sa|su|a|d|f|h|n)\d\d",
    "EmoDB": r"(?P<speaker>\d\d)[ab]\d\d(?P<code>[AEFLNTW])[a-f]?",
    "TESS": r"(?P<speaker>OA|YA)F?_[a-z]+_(?P<code>angry|disgust|fear|happy|neutral|ps|sad)",
    "demo": r"(?P<code>[a-z]+)_speaker(?P<speaker>\d+)_\d+",
}


def is_visible(name: str) -> bool:
    """Whether a file or folder of that name is neither hidden nor junk of a Mac."""
    return not name.startswith((".", "__MACOSX"))


def is_audio(name: str) -> bool:
    """Whether a file of that name is a clip."""
    return is_visible(name) and Path(name).suffix.lower() in AUDIO_SUFFIXES


def find_audio(*folders: Path, skip: Path | None = None, all_suffixes: bool = False) -> list[Path]:
    """The audio files at any depth below some folders, sorted.

    Hidden files, links to folders and the folder `skip` are left out. Files of a suffix that is known neither
    as audio nor as something else are counted in a note; with `all_suffixes` they may be audio.

    Raises:
        OSError: A folder cannot be listed.
    """

    def stop(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for parent, inside, names in itertools.chain(*(os.walk(folder, onerror=stop) for folder in folders)):
        inside[:] = filter(is_visible, inside)
        for path in [Path(parent, name) for name in inside]:
            if path.is_symlink():
                note(f"note: {path} is a link to a folder: left out")
            elif path.resolve() == skip:
                note(f"note: {path} holds the clips to label: not used here")
                inside.remove(path.name)
        files += [Path(parent, name) for name in filter(is_visible, names)]
    others = [path for path in files if path.suffix.lower() not in {"", *AUDIO_SUFFIXES, *_OTHER_SUFFIXES}]
    if others and not all_suffixes:
        note(f"note: {len(others)} file(s) whose suffix is not known as audio are left out: {min(others)}")
        others = []
    return sorted([*others, *(path for path in files if is_audio(path.name))])


def find_clips(cfg: Config) -> pd.DataFrame:
    """All clips in the data folder, sorted by clip_name, with what is understood of each.

    A clip's label is what the manifest says, else what its folder or its name tells. Labels of one meaning
    become one class, spelled as for most clips. Copies of a clip of a corpus are recognised by name.

    Returns:
        Columns path, emotion, corpus ("other" where no convention fits), speaker ("" where nothing tells),
        given (train, val or test, where manifest or folder tell the part) and left_out: "" for a clip to use,
        else no label, extra label, silent film or copy. The actors of RAVDESS both speak and sing: one
        speaker in both parts.

    Raises:
        UserError: There is no data folder, no clip, a bad manifest, or the folders are no emotions.
    """
    root = Path(cfg.data_dir)
    if not os.path.isdir(root):  # noqa: PTH112 - one whose name is too long is no fault of the system
        raise UserError(f"no data folder {root}: name one with a folder of clips per emotion, or try --demo")
    manifest = pd.DataFrame(columns=["emotion", "speaker", "part"])
    if cfg.manifest or (root / "manifest.csv").is_file():
        manifest = read_manifest(Path(cfg.manifest or root / "manifest.csv"), root)
    clips = _list_clips(cfg, manifest)
    clips["source"] = _choose_sources(clips, cfg)
    _check_folders(clips, root)
    clips["emotion"] = _spell(clips)
    for emotion in sorted(set(clips.emotion)):
        check_csv_name(emotion)
    # By name: the same clips in other folders come in the same order, and so in the same parts.
    clips["file"] = pd.Series(map(clip_name, clips.path), dtype=object)
    clips = clips.sort_values(["file", "emotion", "path"], ignore_index=True)
    clips["left_out"] = _why_left_out(clips, cfg)
    _explain(clips)
    if (clips.left_out != "").all():
        raise UserError(f"no clips in {root}: expected one folder per emotion with audio files in it")
    return clips[["path", "emotion", "corpus", "speaker", "given", "left_out"]]


def _list_clips(cfg: Config, manifest: pd.DataFrame) -> pd.DataFrame:
    """The clips in the data folder, but those in the test folder, sorted by path.

    Returns:
        Columns path, corpus, speaker and code; the label that each source would give, "" for none: manifest,
        name, folder (the top one, "." for none) and inner (the outermost folder that is named after an
        emotion); around, the path of the folder that holds the inner one; and given, the part.
    """
    root, test = Path(cfg.data_dir), cfg.test_root.resolve()
    tops = [path for path in sorted(root.iterdir()) if path.is_dir() and is_visible(path.name)]
    for top in list(tops):
        if top.name.lower() == "test" or top.resolve() == test:
            note(f"note: {top} holds the clips to label: not used here")
            tops.remove(top)
    strays = [path for path in root.iterdir() if is_audio(path.name) and not path.is_dir()]
    listed = manifest.index[manifest.emotion != ""]
    paths = sorted({*map(str, [*strays, *find_audio(*tops, skip=test)]), *listed})
    folders = [Path(path).relative_to(root).parent for path in paths]
    inner = list(map(_emotion_folder, folders))
    columns = {"path": paths, "folder": [(*folder.parts, ".")[0] for folder in folders]}
    columns |= {
        "inner": [folder.name for folder in inner],
        "around": [str(folder.parent) for folder in inner],
    }
    clips = parse_names(paths).rename(columns={"emotion": "name"}).join(pd.DataFrame(columns, dtype=object))
    for top in tops:
        if top.name not in set(clips.folder):
            note(f"note: folder {top} has no clips: left out")
    rows = manifest.reindex(paths, fill_value="").reset_index(drop=True)
    outer = pd.Series([folder.parent.name for folder in inner], dtype=object)
    part = outer.str.lower().map(_PART_OF).fillna("")
    speaker = clips.speaker.mask(clips.speaker == "", outer.mask(part != "", ""))
    part = part if (part == "val").any() else rows.part
    return clips.assign(
        manifest=rows.emotion,
        speaker=speaker.mask(rows.speaker != "", rows.speaker),
        given=part.mask(rows.part != "", rows.part),
    )


def _emotion_folder(folder: Path) -> Path:
    """The outermost of a folder and those around it that is named after an emotion, or "."."""
    return next((path for path in (*folder.parents[::-1], folder) if emotion_of(path.name)), Path())


def clip_name(path: str) -> str:
    """The file name that tells a clip from all others of its corpus.

    SAVEE's DC/a01.wav is DC_a01.wav, and a film of RAVDESS has the name of its sound alone.
    """
    folder, name = Path(path).parent.name, Path(path).name
    full = f"{folder}_{name}"
    if re.fullmatch(_CORPORA["SAVEE"], Path(full).stem):
        return full
    return re.sub(r"^01(-0[12]-0[1-8](-\d\d){4}\.)", r"03\1", name)


def parse_names(paths: Iterable[str]) -> pd.DataFrame:
    """Corpus, speaker, emotion code and emotion of each path as its name tells, in columns so called."""
    stems = pd.Series([Path(clip_name(path)).stem for path in paths], dtype=object)
    table = pd.DataFrame({"corpus": "other", "speaker": "", "code": ""}, index=stems.index, dtype=object)
    for corpus, convention in _CORPORA.items():
        found = stems.str.extract(f"^(?:{convention})\\Z").dropna(subset="code")
        table.loc[found.index, "corpus"] = corpus
        table.loc[found.index, "speaker"] = corpus.split()[0] + " " + found.speaker
        table.loc[found.index, "code"] = found.code
    return table.assign(emotion=[_BY_CODE.get(code, "") for code in table.code])


def emotion_of(word: str) -> str:
    """The emotion that a folder or label means, whatever its spelling: Suprised is Surprised. "" for none."""
    return _BY_WORD.get(re.sub(r"^pleasant[ _-]*", "", _plain(word).lower()), "")


def class_of(label: str) -> str:
    """The emotion that a label means, or else the label in small letters: equal for labels of one class."""
    return emotion_of(label) or _plain(label).lower()


def _plain(label: str) -> str:
    """A label without spaces at its ends, in one Unicode form; Angry of "Angry (1)" and "Copy of Angry"."""
    name = unicodedata.normalize("NFC", label).strip()
    pattern = r"^copy of +|[ _-]+\(?copy\)?( *\(?\d+\)?)?$| *\(\d+\)$"
    original = re.sub(pattern, "", name, flags=re.IGNORECASE)
    return original if original.lower() in _BY_WORD else name


def _choose_sources(clips: pd.DataFrame, cfg: Config) -> "pd.Series[str]":
    """What tells the label of each clip: manifest, name, folder, inner (folder) or nothing.

    What the manifest does not say is decided top folder by top folder. Names tell the labels where most of
    them fit the convention of a corpus and say something else than the folder; of folders named after
    emotions, all names count together.
    """
    if cfg.labels_from == "manifest":
        if not any(clips.manifest):
            raise UserError("labels_from = 'manifest': pass a --manifest with the columns filename, emotion")
        return pd.Series("manifest", index=clips.index)
    meanings = clips.folder.map(emotion_of)
    differs = (clips.name != "") & (clips.name != meanings)
    sources = {}
    for folder, rows in clips.groupby("folder"):
        is_emotion = emotion_of(folder) != ""
        if folder == "." or (any(rows.manifest) and not is_emotion):  # a folder of mixed clips is no class
            sources[folder] = "name"
        elif cfg.labels_from == "folders":
            sources[folder] = "folder"
        elif differs[meanings != "" if is_emotion else rows.index].mean() > 0.5:
            sources[folder] = "name"
        elif is_emotion:
            sources[folder] = "folder"
        else:  # speaker/emotion/clip, unless emotion/clip stands beside it
            sources[folder] = "inner" if any(rows.inner) and not any(meanings) else "nothing"
    source = clips.folder.map(sources).mask(clips.manifest != "", "manifest")
    return source.mask((source == "name") & (clips.name == "") & (meanings != ""), "folder")


def _check_folders(clips: pd.DataFrame, root: Path) -> None:
    """Refuse folders that all lie in another one, and those that are no emotions if most are such."""
    inner = clips[(clips.source == "inner") & (clips.inner != "")]
    if inner.around.nunique() == 1:
        folder = inner.around.iloc[0]
        raise UserError(
            f"the class folders are not in {root} but in {folder}: pass --data_dir {root / folder}"
        )
    if speakers := sorted(set(inner.speaker) - {""}):
        note(f"note: taken as speakers, since folders of emotions are in them: {', '.join(speakers)}")
    unknown = clips[clips.source == "nothing"]
    names = sorted(set(unknown.folder))
    if 2 * len(names) >= max(clips.folder.nunique(), 1):
        example = Path(unknown.path.iloc[0]).name
        raise UserError(
            f"{', '.join(names[:5])} in {root}: no emotions that we know, nor do names as {example} tell "
            "one: list the clips in a --manifest, or pass --labels_from folders if these are the classes"
        )
    if names:
        text = "no emotions that we know: left out (--labels_from folders makes each folder a class)"
        note(f"note: {', '.join(names)} in {root}: {text}")
    if 0 < (n_more := int((clips.source != "manifest").sum())) < len(clips):
        text = "are used if folder or name tell the label (--labels_from manifest leaves them out)"
        note(f"note: {n_more} clips that the manifest does not label {text}")


def _spell(clips: pd.DataFrame) -> "pd.Series[str]":
    """The class of each clip: labels of one meaning are one class, spelled as for most of its clips."""
    label = pd.Series("", index=clips.index, dtype=object)
    for source in ("manifest", "name", "folder", "inner"):
        label = label.mask(clips.source == source, clips[source])
    meanings, spellings = label.map(class_of), {}
    for meaning, same in label[clips.source != "name"].groupby(meanings):
        spellings[meaning] = name = same.map(_plain).mode()[0]
        if (found := sorted(set(same))) != [name]:
            note(f"note: class {name} is spelled {' and '.join(map(repr, found))}")
    return meanings.map(lambda meaning: spellings.get(meaning, meaning))


def _why_left_out(clips: pd.DataFrame, cfg: Config) -> "pd.Series[str]":
    """Why each clip, sorted by file name, is left out; "" if it is used."""
    reason = pd.Series("", index=clips.index, dtype=object)
    if cfg.extra_labels == "drop":
        reason[(clips.source == "name") & clips.emotion.map(emotion_of).isin(EXTRA_LABELS)] = "extra label"
    reason[clips.corpus.str.startswith("RAVDESS") & clips.file.str.startswith("02-")] = "silent film"
    reason[clips.emotion == ""] = "no label"
    rest = clips[reason == ""]
    # What no convention names is a copy only of the file beside it: a wav and an mp3, say.
    own = rest.path.where(rest.corpus == "other", rest.file)
    copies = rest.assign(stem=[os.path.splitext(name)[0] for name in own])  # noqa: PTH122
    # The last is the wav beside an mp3.
    reason[rest.index[copies.duplicated(["stem", "emotion"], keep="last")]] = "copy"
    return reason


def _explain(clips: pd.DataFrame) -> None:
    """Note what file names were taken to mean, and what is left out."""
    for corpus, rows in clips[(clips.source == "name") & (clips.left_out == "")].groupby("corpus"):
        codes = rows.drop_duplicates("code").sort_values("code")
        text = ", ".join(codes.code + " = " + codes.emotion)
        instead = ", not folders (--labels_from folders)" if any(rows.folder != ".") else ""
        note(f"note: {corpus}: labels from file names{instead}: {text}")
    for reason, text in {
        "copy": "further copies of clips, by their names, are left out",
        "extra label": "clip(s) of calm or boredom are left out (--extra_labels keep takes them)",
        "silent film": "film(s) without sound, by their names, are left out",
        "no label": "clip(s) that neither manifest, folder nor name label are left out",
    }.items():
        if len(rows := clips[clips.left_out == reason]):
            note(f"note: {len(rows)} {text}: {rows.path.iloc[0]}")


def read_manifest(path: Path, root: Path) -> pd.DataFrame:
    """What a CSV file with the columns filename and emotion, speaker or part says of clips below `root`.

    Returns:
        Columns emotion, speaker and part (train, val or test), "" where it says nothing, indexed by the path
        of the clip.

    Raises:
        UserError: The file cannot be understood, or a name in it leads out of `root` or to no file.
    """
    table, columns = read_csv(path, "manifest"), ["emotion", "speaker", "part"]
    if not {"filename"} < set(table.columns) <= {"filename", *columns}:
        raise UserError(
            f"manifest {path}: needs a header with filename and emotion, speaker or part, and no more, "
            f"has {', '.join(table.columns)}"
        )
    table = table.reindex(columns=["filename", *columns], fill_value="")
    table[columns] = table[columns].apply(lambda column: column.str.strip())
    paths = []
    for line, (name, *says) in enumerate(table.itertuples(index=False), start=2):
        if not (name and any(says)):
            raise UserError(f"manifest {path}, line {line}: needs filename, and emotion, speaker or part")
        if says[-1] not in {"", "train", "val", "test"}:
            raise UserError(f"manifest {path}, line {line}: part {says[-1]!r} must be train, val or test")
        try:
            paths.append(_locate(name, root))
        except ValueError as error:
            raise UserError(f"manifest {path}, line {line}: {name!r} {error}") from None
    table["filename"] = paths
    table = table.drop_duplicates().set_index("filename")
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise UserError(f"manifest {path}: says two things of {twice}")
    return table


def read_csv(path: Path, what: str) -> pd.DataFrame:
    """A CSV file as it is, all text.

    Raises:
        UserError: It cannot be understood; the message names it, and `what` it is.
    """
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # of too many fields
            table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError, Warning) as error:  # ValueError: whatever is no CSV
        raise UserError(f"{what} {path}: {error}") from None
    return table.rename(columns=str.strip)


def _locate(name: str, root: Path) -> str:
    """The path of the clip in `root` with that name, absolute or not, in either Unicode form.

    Raises:
        ValueError: There is none.
    """
    home = Path(os.path.normpath(root.absolute()))
    path = Path(os.path.normpath(home / name))
    homes = [folder for folder in (home, root.resolve()) if path.is_relative_to(folder)]
    if not homes:
        raise ValueError(f"lies outside {root}")
    inside = str(path.relative_to(homes[0]))
    for form in (inside, *(unicodedata.normalize(form, inside.strip()) for form in ("NFC", "NFD"))):
        if (root / form).is_file():
            return str(root / form)
    raise ValueError(f"is no file in {root}")


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

FEATURES_VERSION = 4  # part of the cache key: raise it when Recording or MFCC gives other numbers
MIN_REMAINDER = 0.1  # seconds after the last full window that are worth a window of their own
FFMPEG_SECONDS = 120  # that ffmpeg may take for half a second of audio
ENVELOPE_RATE = 20  # points a second of the waveform's outline


class AudioError(Exception):
    """Why a file cannot be used as audio."""


# Soundfile holds a lock of its own as long as this one, and a forked worker must find it free.
_OPENING = threading.Lock()


class _SoundFile(soundfile.SoundFile):  # type: ignore[misc] # soundfile has no types
    """A file that libsndfile knows by its number alone.

    By name it would go by the suffix, and look for a Mac's files beside this one.
    """

    def __init__(self, descriptor: int) -> None:
        with _OPENING:
            super().__init__(descriptor, closefd=False)

    def seekable(self) -> bool:
        """No: soundfile seeks after every read, and in an mp3 that damages what is decoded next."""
        return False

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Its samples (n, channels) float32; where it breaks off, those of the last block are lost."""
        n_left, size = self.frames, max(1, self.samplerate // 2)
        while n_left > 0:
            n_wanted = min(size, n_left)  # no more, or it would read on into what follows
            try:
                samples = self.read(n_wanted, dtype="float32", always_2d=True)
            except soundfile.SoundFileError as error:
                raise AudioError(_reason(error)) from None
            yield samples
            n_left = n_left - n_wanted if len(samples) == n_wanted else 0


# A file, by its path, its content, or opened for reading bytes; or samples.
Clip: TypeAlias = str | Path | bytes | IO[bytes] | npt.NDArray[Any]


class Source(NamedTuple):
    """Samples that come block by block."""

    rate: int  # Hz
    n_frames: int  # as promised; 0: nothing is
    blocks: Iterator[npt.NDArray[Any]]  # (n, channels) float32; AudioError where they break off


class Recording:
    """An audio file or an array, read window by window in constant memory.

    Iteration yields (n_samples,) float32 windows in about [-1, 1], mono, at cfg.sample_rate. They start at 0,
    3, 6, ... s (with `step` at 0, step, 2 * step, ... s); the last one ends where the clip ends, and a clip
    shorter than a window is zero-padded. Channels are averaged, then resampled with soxr's HQ recipe, as
    librosa.load does. Neither length, header nor suffix is trusted: what comes out is what is there.

    Args:
        source: A path, or the bytes of a file, or a file opened for reading bytes; or samples (n,) or
            (n, channels), float in about [-1, 1], int16 or int32.
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
        self.envelope: list[FloatArray] = []  # with a step: magnitudes so far, ENVELOPE_RATE a second
        self._low, self._high, self._broken = math.inf, -math.inf, ""

    @property
    def warning(self) -> str:
        """What is odd about the audio read so far; empty if nothing is."""
        silent = "silent" if self._high - self._low < 1e-4 else ""  # three steps of 16 bits
        peak = max(self._high, -self._low)  # 16-bit numbers as float, say
        loud = f"samples as large as {peak:,.0f}, not -1 to 1" if peak > 16 else ""
        return "; ".join(filter(None, [self._broken, silent, loud]))

    def __iter__(self) -> Iterator[FloatArray]:
        with self._opened() as source:
            yield from self._windows(source)

    def read(self) -> FloatArray:
        """All samples at once, (n,), in place of windows."""
        with self._opened() as source:
            return np.concatenate([np.empty(0, np.float32), *self._blocks(source)])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Source]:
        try:
            with _open(self.source, self.rate) as source:
                yield source
        except OSError as error:
            raise AudioError(error.strerror or str(error)) from None

    def _windows(self, source: Source) -> Iterator[FloatArray]:
        size, rate = self.cfg.n_samples, self.cfg.sample_rate
        step = min(size, max(1, round(self.step * rate))) if self.step else size
        window = np.empty(0, np.float32)  # the latest full one
        pieces = [window]  # samples from the next one on
        n_read = n_used = 0
        for block in self._blocks(source):
            pieces.append(block)
            n_read += len(block)
            while n_read - n_used + (size - step) * (n_used > 0) >= size:
                rest = np.concatenate(pieces)
                window, pieces = rest[:size], [rest[step:]]
                n_used += step if n_used else size
                self.seconds = n_used / rate
                yield window
        if n_read == 0:
            raise AudioError("holds no samples")
        if n_used == 0 or n_read - n_used >= MIN_REMAINDER * rate:
            self.seconds = n_read / rate
            last = np.concatenate([window[:step], *pieces])[-size:]
            yield np.pad(last, (0, size - len(last)))

    def _blocks(self, source: Source) -> Iterator[FloatArray]:
        """Mono blocks (n,) at cfg.sample_rate."""
        rate, same = source.rate, source.rate == self.cfg.sample_rate
        if not 1000 <= rate <= 768_000:
            raise AudioError(f"{rate} Hz: must be 1,000 to 768,000 Hz")
        resampler = soxr.ResampleStream(rate, self.cfg.sample_rate, 1, dtype="float32", quality="HQ")
        for samples in self._until_it_breaks(source):
            with np.errstate(over="ignore", invalid="ignore"):  # 1e38 overflows to what is refused here
                wave = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
            if len(wave):
                low, high = float(wave.min()), float(wave.max())  # NaN if one sample is
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise AudioError("holds NaN or infinite samples")
                self._low, self._high = min(self._low, low), max(self._high, high)
                if self.step:
                    starts = np.arange(0, len(wave), rate / ENVELOPE_RATE).astype(int)
                    self.envelope.append(np.maximum.reduceat(np.abs(wave), starts))
            yield wave if same else resampler.resample_chunk(wave)
        if not same:
            yield resampler.resample_chunk(np.empty(0, np.float32), last=True)

    def _until_it_breaks(self, source: Source) -> Iterator[npt.NDArray[Any]]:
        """The blocks of a source, with a warning where they break off or are fewer than promised."""
        n_read, rate = 0, source.rate
        try:
            for samples in source.blocks:
                n_read += len(samples)
                yield samples
        except AudioError as error:  # a cut FLAC, for one
            if not n_read:
                raise
            self._broken = f"unreadable after {n_read / rate:,.2f} s: {error}"
        else:
            if source.n_frames - n_read > 0.05 * rate:
                self._broken = f"truncated: {n_read / rate:,.2f} of {source.n_frames / rate:,.2f} s"


@contextlib.contextmanager
def _open(clip: Clip, rate: float | None) -> Iterator[Source]:
    """Whatever a clip is."""
    with contextlib.ExitStack() as stack:
        if isinstance(clip, np.ndarray):
            yield stack.enter_context(_open_array(clip, rate))
        elif isinstance(clip, str | Path):
            yield stack.enter_context(_open_file(Path(clip)))
        else:
            path = stack.enter_context(spool(io.BytesIO(clip) if isinstance(clip, bytes) else clip))
            yield stack.enter_context(_open_file(path))


@contextlib.contextmanager
def spool(stream: IO[bytes]) -> Iterator[Path]:
    """A temporary file with what a stream holds: a decoder has to go back and forth in it."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "clip")
        try:
            with path.open("wb") as file:
                shutil.copyfileobj(stream, file)
        except (TypeError, ValueError) as error:  # it is closed, or gives text
            raise AudioError(f"no file opened for reading bytes: {error}") from None
        yield path


@contextlib.contextmanager
def _open_array(samples: npt.NDArray[Any], rate: float | None) -> Iterator[Source]:
    """Samples in memory, with the numbers that a file of the same samples gives."""
    kind, bits = samples.dtype.kind, 8 * samples.itemsize
    if kind != "f" and (kind, bits) not in {("i", 16), ("i", 32)}:
        raise AudioError(f"samples of {samples.dtype}: must be float in [-1, 1], int16 or int32")
    if samples.ndim not in {1, 2} or (samples.ndim == 2 and not 0 < samples.shape[1] <= len(samples)):
        raise AudioError(f"samples of shape {samples.shape}: must be (n,) or (n, channels), channels last")
    if not isinstance(rate, int | float | np.number) or not 0 < rate < math.inf:
        raise AudioError(f"rate = {rate}: an array needs its sampling rate in Hz")
    scale, size = np.float32(2.0 ** (1 - bits) if kind == "i" else 1), max(1, int(rate) // 2)
    columns = samples if samples.ndim == 2 else samples[:, None]

    def blocks() -> Iterator[npt.NDArray[Any]]:
        for start in range(0, len(columns), size):
            with np.errstate(over="ignore"):  # of float64: infinite samples are refused
                block = columns[start : start + size].astype(np.float32) * scale
            yield block

    yield Source(int(rate), len(samples), blocks())


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[Source]:
    """A file as libsndfile reads it; ffmpeg reads what that cannot open, and what follows where it ends."""
    if "\0" in str(path) or not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
        raise AudioError("not a regular file")
    with path.open("rb", buffering=0) as file, contextlib.ExitStack() as stack:
        if not file.read(1):
            raise AudioError("empty file")
        file.seek(0)
        try:
            sound = stack.enter_context(_SoundFile(file.fileno()))
            source = Source(sound.samplerate, _promised(sound, file), _all_of(sound, file))
        except soundfile.SoundFileError as error:
            try:  # to the end where libsndfile finds that another file is joined to a wav
                source = stack.enter_context(_open_ffmpeg(file, to_end="'RIFF'" in str(error)))
            except AudioError as other:
                raise AudioError(f"{_reason(error)}; {other}") from None
        yield source


def _reason(error: Exception) -> str:
    """Libsndfile's message without the file's number."""
    return str(error).rpartition(": ")[2].rstrip(".")


def _promised(sound: _SoundFile, file: io.FileIO) -> int:
    """The frames that a file says it holds, 0 where it does not: libsndfile guesses from the size, then."""
    if sound.subtype.startswith("MPEG"):
        here = file.tell()  # behind the first frame, which may count the others
        file.seek(max(0, here - 4096))
        beginning = file.read(min(here, 4096))
        file.seek(here)
        if not re.search(rb"(Xing|Info)\0\0\0[\1\3\5\7\11\13\15\17]|VBRI", beginning):
            return 0
    return int(sound.frames) if sound.frames < 2**40 else 0  # more means "unknown"


# What follows the samples of a whole file: the name of a further chunk, or of a tag. The others begin a file.
_TAG = re.compile(rb"\0?(?!RIFF|FORM|OggS|fLaC)[\w ]{4}")


def _all_of(sound: _SoundFile, file: io.FileIO) -> Iterator[npt.NDArray[Any]]:
    """What libsndfile reads, then what follows: Ogg and mp3 may be joined, and the length in a wav wrong."""
    n_read, least = 0, MIN_REMAINDER * sound.samplerate
    for samples in sound.blocks():
        n_read += len(samples)
        yield samples
    here, size = file.tell(), os.fstat(file.fileno()).st_size
    following = file.read(5)
    if not following or _TAG.match(following) or (n_read and (size - here) * n_read / here < least):
        return
    n_before, n_more, problem = n_read, 0, ""
    like = ["-ar", str(sound.samplerate), "-ac", str(sound.channels)]
    to_end = sound.format.startswith("WAV") and b"RIFF" not in following
    try:
        with _open_ffmpeg(file, like, to_end=to_end) as whole:
            for samples in whole.blocks:
                more = samples[n_before:]
                n_before -= len(samples) - len(more)
                n_more += len(more)
                yield more
    except AudioError as error:
        problem = str(error)
    if problem or n_more < least:
        problem = problem or "ffmpeg finds no audio in them"
        raise AudioError(f"{size - here:,} of {size:,} bytes follow; {problem}")


@contextlib.contextmanager
def _open_ffmpeg(file: io.FileIO, outputs: Sequence[str] = (), *, to_end: bool = False) -> Iterator[Source]:
    """A file as ffmpeg decodes it, through a pipe in Sun's au format, which has no end.

    With `to_end` it is a wav whose length is not believed.
    """
    # Standard input has no suffix to go by. Local files alone: a playlist must not make it fetch others.
    name = Path(os.fsdecode(file.name))
    whole = f"file:{name.absolute()}" if sys.platform == "win32" else "file:/dev/stdin"
    inputs = ["file", "-i", whole] if not to_end else "pipe -ignore_length 1 -f wav -i pipe:0".split()
    command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", *inputs, "-map", "0:a:0", *outputs]
    # The limit, of processor time, is for one that is left alone since its reader was killed.
    command += "-c:a pcm_f32be -timelimit 1800 -f au pipe:1".split()
    file.seek(0)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        try:  # in a process group of its own, or Ctrl-C would end it before we know of it
            process: Any = subprocess.Popen(command, stdin=file, stdout=-1, stderr=log, process_group=0)
        except FileNotFoundError:
            convert = f"ffmpeg -i {name.name} {name.stem}_.wav"
            raise AudioError(f"install ffmpeg, or convert it: {convert}") from None
        except OSError as error:
            raise AudioError(f"ffmpeg cannot be started: {error.strerror}") from None
        stack.enter_context(process)
        stack.callback(process.kill)

        def wait_for(step: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the step returns
            timer = threading.Timer(FFMPEG_SECONDS, process.kill)
            timer.start()
            try:
                return step()
            finally:
                timer.cancel()

        def fault() -> AudioError:
            process.stdout.close()  # whatever it still writes ends it
            code = wait_for(process.wait)
            log.seek(0)
            line = re.sub(rb"^\[.*?\] |^file:/dev/stdin: ", b"", log.readline()).decode(errors="replace")
            reason = f"gave nothing for {FFMPEG_SECONDS} s" if code == -9 else line.strip() or "no audio"
            return AudioError(f"ffmpeg: {reason}" + f" (exit code {code})" * (code > 0))

        def blocks() -> Iterator[npt.NDArray[Any]]:
            decoded = sound.blocks()
            while (samples := wait_for(partial(next, decoded, None))) is not None:
                yield samples
            if wait_for(process.wait):
                raise fault()

        try:
            sound = stack.enter_context(wait_for(partial(_SoundFile, process.stdout.fileno())))
        except soundfile.SoundFileError:
            raise fault() from None
        yield Source(sound.samplerate, 0, blocks())


# ---- features --------------------------------------------------------------------------------------------


def mfcc_constants(cfg: Config) -> dict[str, Tensor]:
    """What librosa and SciPy define MFCC and its deltas by, as float32 matrices.

    Returns:
        window (n_fft,), mel (n_fft // 2 + 1, n_mels), dct (n_mfcc, n_mels) and deltas (2, T, T), which turn
        (..., T) coefficients into first and second derivatives: a Savitzky-Golay filter over nine frames is
        linear, so filtering the identity gives its matrix.
    """
    # Under librosa, numba needs a folder for its cache, and there may be no home.
    os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(cfg.cache_dir, "numba").absolute()))
    import librosa  # takes seconds, and a trained model brings its constants along
    import scipy.fft

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
        # Sparse in a checkpoint; here each filter lies in one piece, for fast products.
        self.mel = nn.Buffer(constants["mel"].to_dense().float().T.contiguous().T)
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
        if torch.compiler.is_exporting():  # to a graph for any B, which cannot loop over chunks
            return self._features(waves)
        chunk = 4 if waves.device.type == "cpu" else 1024  # four windows fit the processor's cache
        return torch.cat([self._features(few) for few in torch.split(waves, chunk)])

    def _features(self, waves: Tensor) -> Tensor:
        n_fft = len(self.window)
        padded = nn.functional.pad(waves, (n_fft // 2, n_fft - n_fft // 2))  # an odd one, too, in all
        frames = padded.unfold(-1, n_fft, self.hop_length)
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

CHUNK = 16  # files that a worker reads at a time, at most
Work: TypeAlias = Callable[[Sequence[str]], list[Any]]  # paths -> results, one per path

if hasattr(os, "register_at_fork"):
    # A forked process lacks OpenMP's threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
    os.register_at_fork(
        before=_OPENING.acquire, after_in_parent=_OPENING.release, after_in_child=_OPENING.release
    )


def map_files(work: Work, paths: Sequence[str], cfg: Config) -> Generator[Any, None, None]:
    """Call `work` on chunks of the paths in worker processes, and yield its results, in order, one per path.

    A file whose decoder crashes costs its chunk: each file in it becomes an AudioError. Where no process can
    be started, this one does the work.
    """
    n_workers = min(cfg.num_workers if cfg.num_workers >= 0 else cpu_count(), len(paths))
    size = max(1, min(CHUNK, len(paths) // max(1, n_workers)))  # a few long files have all cores
    chunks = [paths[start : start + size] for start in range(0, len(paths), size)]
    todo, done = deque(range(len(chunks))), dict[int, list[Any]]()
    workers = _start_workers(work, n_workers)
    busy = dict[Any, int]()  # pipe -> number of the chunk
    try:
        for number in range(len(chunks)):
            while True:
                for pipe in workers.keys() - busy.keys():  # first, so that none waits while results are used
                    if todo and todo[0] < number + 4 * n_workers:  # none runs far ahead
                        busy[pipe] = todo.popleft()
                        with contextlib.suppress(OSError):  # it may have crashed
                            pipe.send(chunks[busy[pipe]])
                if number in done:
                    break
                if not workers:
                    following = todo.popleft()
                    done[following] = work(chunks[following])
                ready: list[Any] = multiprocessing.connection.wait(list(busy), None if busy else 0)
                for pipe in ready:
                    finished = busy.pop(pipe)
                    try:
                        answer = pipe.recv()
                    except (EOFError, OSError):
                        answer = [AudioError("this file, or one read with it, crashed the audio decoder")]
                        answer *= len(chunks[finished])
                        workers.pop(pipe).join()
                        workers |= _start_workers(work, 1)
                    if isinstance(answer, Exception):
                        raise answer
                    done[finished] = answer
            yield from done.pop(number)
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _start_workers(work: Work, count: int) -> dict[Any, Any]:
    """Processes, as many as the system allows, by the pipes to them: no queues, which need semaphores."""
    # A forked worker starts at once; elsewhere than on Linux forking is not safe.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers: dict[Any, Any] = {}
    try:
        for _ in range(count):
            pipe, other_end = context.Pipe()
            process = context.Process(target=_serve, args=(other_end, work), daemon=True)
            process.start()
            other_end.close()
            workers[pipe] = process
    except (OSError, AssertionError) as error:  # AssertionError: a daemon may have no children
        note(f"note: {count - len(workers)} of {count} processes that read clips cannot be started: {error}")
    return workers


def _serve(pipe: Any, work: Work) -> None:  # noqa: ANN401 - a Connection
    """What a worker does: results for chunks, until its parent has enough."""
    start_child(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # decoders print: to stderr, and some to stdout, among the results
    os.dup2(silence, 2)
    while True:
        chunk = pipe.recv()
        try:
            pipe.send(work(chunk))
        except Exception as error:  # whatever it is, the parent is told
            error.add_note(traceback.format_exc())
            pipe.send(error)


def start_child(n_threads: int) -> None:
    """Make this child process leave signals to its parent, end with it, and use so many threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(n_threads)
    with contextlib.suppress(RuntimeError):  # where no thread is to be had it ends when it reads or writes
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
    with torch.inference_mode():
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

    It is named by all that shapes the features: settings, constants, and what decodes and resamples audio.

    Raises:
        UserError: The file cannot be used; the message says why, and what to do.
    """

    def __init__(self, cfg: Config, mfcc: MFCC) -> None:
        self.shape = (cfg.n_features, cfg.n_frames)
        settings = [cfg.sample_rate, cfg.n_samples, cfg.max_windows, cfg.n_fft, cfg.hop_length, cfg.n_mels]
        # Rounded, since the last bits of a constant are other ones on another machine.
        constants = [f"{constant.cpu().double().norm():.3g}" for constant in mfcc.state_dict().values()]
        libraries = [soxr.__version__, soundfile.__libsndfile_version__]
        key = hashlib.sha256(repr([FEATURES_VERSION, self.shape, settings, constants, libraries]).encode())
        self.path = Path(cfg.cache_dir, f"features-{key.hexdigest()[:16]}.sqlite")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(self.path, timeout=10)
            self.database.execute("PRAGMA page_size = 65536")  # a window of 62 kB fits one page
            self.database.executescript(_TABLES)
            self.database.execute("PRAGMA busy_timeout = 60000")  # ms: others hold it for a commit at a time
        except (sqlite3.Error, OSError) as error:
            raise self.fault(error) from None

    def fault(self, error: Exception) -> UserError:
        """What to raise when SQLite fails."""
        remedy = "choose another --cache_dir, free disk space, or delete the file"
        if isinstance(error, PermissionError) or re.search("readonly|unable to open", str(error)):
            remedy = "you may not write there: choose another --cache_dir"
        elif isinstance(error, FileExistsError | FileNotFoundError | NotADirectoryError):
            remedy = "no folder can be made there: choose another --cache_dir"
        elif not isinstance(error, sqlite3.Error) or "locked" in str(error):
            remedy = "another run has it, or its drive cannot lock: wait, or choose another --cache_dir"
        reason = str(getattr(error, "strerror", error)) or "no locks"
        return UserError(f"cache {self.path}: {reason}: {remedy}", code=1)

    def lock(self) -> AbstractContextManager[Any]:
        """Be the one that fills it, after any other that does."""
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            remedy = "if there is none, its drive cannot lock: choose another --cache_dir"
            note(f"note: waiting for another run that fills the cache {self.path}; {remedy}")
            return lock.acquire()

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
                found = self.database.execute(query, (int(number),)).fetchone()
                if found is None:
                    raise UserError(f"cache {self.path} was changed while in use: start again", code=1)
                row[...] = np.frombuffer(found[0], np.float32).reshape(self.shape)
        except sqlite3.Error as error:
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
            time = status.st_mtime_ns % 2**63  # SQLite has no more
            states[path] = (os.fsencode(Path(path).absolute()), status.st_size, time)
        except OSError as error:
            failures[path] = error.strerror or str(error)
    try:
        known = cache.lookup()
        if any(state not in known for state in states.values()):
            with cache.lock():
                known = cache.lookup()  # another run may have filled it meanwhile
                missing = {path: state for path, state in states.items() if state not in known}
                failures |= _fill(cache, missing, cfg, mfcc)
            known = cache.lookup()
        cache.database.close()
    except (sqlite3.Error, OSError, NotImplementedError) as error:  # of the lock, on some network drives
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


def load_corpus(cfg: Config, mfcc: MFCC, found: pd.DataFrame | None = None) -> pd.DataFrame:
    """Find all labelled clips, unless find_clips has, and extract their features.

    Files that cannot be read, or are silent, cut off or doubled, are named on stderr.

    Returns:
        A row per readable clip: path, emotion, corpus, speaker, first_window (its id in the cache),
        n_windows, seconds, audio_hash (equal for the same audio) and warning.

    Raises:
        UserError: There are no clips, or too many cannot be read.
    """
    found = find_clips(cfg) if found is None else found
    found = found[found.left_out == ""].drop(columns="left_out").reset_index(drop=True)
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
    copies = clips[clips.audio_hash.duplicated(keep=False)]
    for _, group in copies.groupby("audio_hash"):
        if group.emotion.nunique() > 1:
            note(f"note: same audio under different labels: {', '.join(group.path)}")
    if len(copies):
        groups = f"{copies.audio_hash.nunique()} group(s) of clips with the same audio, each in one part"
        note(f"note: {groups}: {copies.path.iloc[0]} and others")
    return clips


def describe_corpora(found: pd.DataFrame, clips: pd.DataFrame) -> pd.DataFrame:
    """A row per corpus: its speakers, what became of the clips that find_clips found, and the same audio.

    `clips` are those that load_corpus could use.
    """
    used = pd.Series("unreadable", index=found.index).mask(found.path.isin(clips.path), "used")
    table = pd.crosstab(found.corpus, found.left_out.where(found.left_out != "", used))
    speakers = found[found.speaker != ""].groupby("corpus").speaker.nunique()
    table.insert(0, "speakers", speakers.reindex(table.index, fill_value=0))
    doubled = clips.duplicated(["corpus", "audio_hash"], keep=False)
    shared = clips.groupby("audio_hash").corpus.transform("nunique") > 1
    for column, rows in {"same audio": doubled, "in other corpora": shared}.items():
        table[column] = clips.corpus[rows].value_counts().reindex(table.index, fill_value=0)
    return table.rename_axis(index=None, columns=None)


def report_files(reasons: Mapping[str, str], verb: str, *, most: int = 20) -> None:
    """Name files and what is wrong with them, the first of many."""
    for path, reason in itertools.islice(reasons.items(), most):
        note(f"{verb} {path}: {reason}")
    if len(reasons) > most:
        note(f"{verb} {len(reasons)} such files, {len(reasons) - most} of them not shown")


# ---- the split -------------------------------------------------------------------------------------------


def split(
    clips: pd.DataFrame, cfg: Config, *, member: int = 1, fold: int = 0, n_folds: int = 0
) -> "pd.Series[str]":
    """The part of each clip, train, val or test, drawn at random: all that is fitted is fitted to train.

    The networks of an ensemble have the same test part, but each draws its own clips to validate on, so that
    several together train on nearly all the others.

    By clip, each class of each corpus is divided alike; by speaker, the speakers of each corpus are, and
    (without folds) a corpus of fewer than three stays in training as a whole. Where every corpus is that
    small, one speaker of all is for testing, and where no speaker is left to validate on, other clips of the
    training speakers are. Clips with the same audio are never divided. The test parts of all folds together
    hold every clip once. Equal seeds and clips give equal parts.

    Raises:
        UserError: There is only one class, parts would be too small, or a speaker is not known.
    """
    if cfg.split_seed >= 0:
        cfg = dataclasses.replace(cfg, seed=cfg.split_seed)
    if clips.emotion.nunique() < 2:
        raise UserError(f"only one class in {cfg.data_dir}, {clips.emotion.iloc[0]}: nothing to tell apart")
    if cfg.split == "speaker":
        _check_speakers(clips)
    unit, strata = _units(clips, cfg.split)
    given = _given_parts(clips, unit)[strata.index]
    test, val = (given.index[given == part] for part in ("test", "val"))
    if n_folds and (len(test) or len(val)):
        raise UserError("folds: the parts are given, by a manifest or by folders: leave out --folds")
    free = strata[given == ""]
    if n_folds:
        test = _draw_fold(strata, cfg, fold, n_folds)
    elif test.empty:
        test = _draw(free, cfg.test_fraction, cfg.seed)
        if cfg.split == "speaker" and test.empty and val.empty:
            test = _draw(free.where(free == "", ""), cfg.test_fraction, cfg.seed, least=2)
    seed, free = member_seed(cfg, member), free.drop(test, errors="ignore")
    part = pd.Series("train", index=strata.index)
    part[test], part[val] = "test", "val"
    parts = unit.map(part)
    if val.empty:
        fraction = cfg.val_fraction * (1 if n_folds else len(strata) / max(len(free), 1))
        val = _draw(free, fraction, seed)
        if cfg.split == "speaker" and val.empty:  # too few speakers
            unit, free = _units(clips[unit.isin(free.index)], "random")
            val = _draw(free, cfg.val_fraction, seed)
        parts[unit.index[unit.isin(val)]] = "val"
    _check_parts(clips.assign(part=parts), cfg, member)
    return parts


def _units(clips: pd.DataFrame, how: str) -> tuple["pd.Series[str]", "pd.Series[str]"]:
    """For each clip what it is never divided from, and the stratum of each such unit, by their names."""
    corpus = clips.corpus.str.split().str[0]  # RAVDESS speech and song share their actors
    if how == "speaker":
        unit, stratum = clips.speaker, corpus
    else:
        unit = clips.groupby("audio_hash")["path"].transform("first")
        stratum = corpus + " " + clips.emotion
    strata = stratum.groupby(unit).first()
    # By file name, so that the same clips in other folders get the same parts.
    return unit, strata.loc[sorted(strata.index, key=lambda name: (clip_name(name), name))]


def _given_parts(clips: pd.DataFrame, unit: "pd.Series[str]") -> "pd.Series[str]":
    """The part that is given for each unit, "" for none; `unit` is what the clips are never divided by."""
    if "given" not in clips:
        return pd.Series("", index=pd.unique(unit))
    given = clips.given[clips.given != ""]
    parts = given.groupby(unit).agg(lambda same: " and ".join(sorted(set(same))))
    if len(divided := parts[parts.str.contains(" ")]):
        raise UserError(f"{divided.index[0]} is given to {divided.iloc[0]}: it can be in one part alone")
    return parts.reindex(pd.unique(unit), fill_value="")


def member_seed(cfg: Config, member: int) -> int:
    """The seed of a network of the ensemble, which are counted from 1."""
    return cfg.seed * 1000 + member


def _check_speakers(clips: pd.DataFrame) -> None:
    """Refuse clips that cannot be divided by speaker."""
    if unknown := int((clips.speaker == "").sum()):
        raise UserError(
            f"split = speaker: the speakers of {unknown} of {len(clips)} clips are not known: name files as "
            "RAVDESS, CREMA-D, TESS, SAVEE or EmoDB do, or pass --manifest"
        )
    shared = clips[clips.groupby("audio_hash").speaker.transform("nunique") > 1].sort_values("audio_hash")
    if len(shared):
        names = " and ".join(f"{clip.path} of {clip.speaker}" for clip in shared[:2].itertuples())
        raise UserError(f"split = speaker: the same audio under two speakers: {names}: remove one")


def _draw(strata: "pd.Series[str]", fraction: float, seed: int, *, least: int = 3) -> "pd.Index[str]":
    """Draw a fraction of each stratum, at least one of `least` or more, none of fewer."""
    drawn: list[str] = []
    for _, stratum in strata.groupby(strata):
        if fraction and len(stratum) >= least:
            size = min(max(1, round(fraction * len(stratum))), len(stratum) - 1)
            drawn += stratum.sample(size, random_state=seed % 2**32).index.tolist()
    return pd.Index(drawn, dtype=object)


def _draw_fold(strata: "pd.Series[str]", cfg: Config, fold: int, n_folds: int) -> "pd.Index[str]":
    """One of n_folds equal shares of each stratum; of one that is smaller, some folds have none."""
    from sklearn.model_selection import StratifiedKFold

    if n_folds > len(strata):
        unit = {"random": "clip", "speaker": "speaker"}[cfg.split]
        raise UserError(f"folds = {n_folds}: each tests {unit}s of its own, and there are only {len(strata)}")
    is_small = strata.map(strata.value_counts()) < n_folds
    shared = strata.mask(is_small, "rest")
    if is_small.sum() < n_folds:  # too few for a stratum of their own
        shared = shared.mask(is_small, shared.mode()[0])
    splitter = StratifiedKFold(n_folds, shuffle=True, random_state=cfg.seed)
    return strata.index[list(splitter.split(strata, shared))[fold][1]]


def _check_parts(clips: pd.DataFrame, cfg: Config, member: int) -> None:
    """Refuse parts that are too small; `clips` with the part of each."""
    sizes, n_classes = clips.part.value_counts(), clips.emotion.nunique()
    if cfg.split == "speaker" and clips.speaker.nunique() < 2:
        raise UserError("split = speaker: there is only one: add another, or pass --split random")
    if (n_val := sizes.get("val", 0)) < n_classes:
        why = f"val_fraction = {cfg.val_fraction}: raise it or add clips"
        if clips[clips.part != "test"].groupby(["corpus", "emotion"]).size().max() < 3:
            why = "outside the test part a class needs three clips: add clips"
        raise UserError(
            f"network {member}: {n_val} of {len(clips)} clips for validation, "
            f"fewer than the {n_classes} classes: {why}"
        )
    if (n_train := sizes.get("train", 0)) < 2:
        raise UserError(f"{n_train} of {len(clips)} clips for training: lower the fractions")
    for part in ("train", "val", "test"):
        absent = set(clips.emotion) - set(clips.emotion[clips.part == part])
        if absent and part in sizes and member == 1:  # one warning is enough
            note(f"warning: no clip of {', '.join(sorted(absent))} in {part}: too few clips")


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
    from scipy import signal as dsp

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
    """Fill the cache, and print clips and minutes used per class, and what was found of each corpus."""
    if flags.demo:
        make_demo(Path(cfg.data_dir))
    mfcc = MFCC(mfcc_constants(cfg), cfg.hop_length)
    found = find_clips(cfg)
    clips = load_corpus(cfg, mfcc, found)
    table = pd.crosstab(clips.emotion.map(printable), clips.corpus)
    table.loc["total"] = table.sum()
    table["clips"] = table.sum(axis=1)
    minutes = clips.groupby("emotion").seconds.sum() / 60
    table["minutes used"] = [*minutes.round(1), round(minutes.sum(), 1)]
    print(table.rename_axis(index=None, columns=None).to_string())
    print(f"\n{describe_corpora(found, clips).to_string()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main, *ARGS))
