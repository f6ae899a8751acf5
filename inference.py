"""Labels clips with a trained model.

python inference.py                      the clips of the test folder -> submission.csv
python inference.py a.wav clips/ ...     files, folders, patterns -> a CSV with probabilities on stdout
python inference.py -                    a file from standard input
python inference.py --timeline a.wav     a row for each window of 3 s; picture, page, subtitles in run_dir
python inference.py --segments parts.csv     parts of recordings: filename, start, end, perhaps speaker
python inference.py --adapt me/ a.wav    the same by a model that knows the voice in some recordings
python inference.py --checkpoint a.pth,b.pth ...     the mean of what several models say
python inference.py --export my.onnx     the model, features included, as one file for ONNX Runtime
"""

from config import (
    COLOURS,
    MODEL_FIELDS,
    RUNTIME_FIELDS,
    Config,
    UserError,
    fill_page,
    legible,
    link_to,
    make_parser,
    note,
    parse,
    printable,
    run,
    save_figure,
    save_file,
    save_view,
)

if __name__ == "__main__":  # answers --help, or a bad flag, before the slow imports
    parser = make_parser(__doc__, RUNTIME_FIELDS - {"cache_dir", "batch_size", "manifest"})
    parser.add_argument("paths", nargs="*", help="files, folders, patterns, or -; none: the test folder")
    parser.add_argument("--fill", default="", help="label for test clips that cannot be read; else an error")
    parser.add_argument(
        "--abstain", action="store_true", help="no label for what is unlike the training data"
    )
    parser.add_argument(
        "--adapt", default="", metavar="PATHS", help="recordings of the voice to label: files, folders; a,b"
    )
    parser.add_argument(
        "--export", default="", metavar="FILE", help="write the model: .onnx, or .pth; label nothing"
    )
    parser.add_argument("--segments", default="", metavar="CSV", help="label parts: filename,start,end")
    parser.add_argument("--standard_names", action="store_true", help="Surprised for a class called Suprised")
    parser.add_argument("--timeline", action="store_true", help="a row per window, and a picture per file")
    parser.add_argument("--step", type=float, default=0.0, help="seconds from window to window of --timeline")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of CSV")
    parser.add_argument("--output", default="", help="file for the rows; else stdout")
    ARGS = parse(parser)

import contextlib
import copy
import csv
import glob
import itertools
import json
import math
import os
import re
import sys
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TextIO, overload

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from model import (
    MIN_VARIETY,
    PRETRAINED,
    Outputs,
    build_ensemble,
    export_onnx,
    join,
    load_checkpoint,
    resolve_device,
    save_checkpoint,
)
from prepare import (
    AUDIO_SUFFIXES,
    ENVELOPE_RATE,
    AudioError,
    Clip,
    FloatArray,
    Recording,
    check_csv_name,
    class_of,
    emotion_of,
    find_audio,
    make_demo,
    map_files,
    read_csv,
    report_files,
    spool,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCK = 64  # windows that go through the networks at once

# ---- prediction ------------------------------------------------------------------------------------------


class Timeline(NamedTuple):
    """What the model makes of each window of a clip."""

    windows: pd.DataFrame  # start, end (s), emotion, confidence, distance, and the probability of each label
    envelope: FloatArray  # magnitude of the waveform, ENVELOPE_RATE points a second


class Prediction(NamedTuple):
    """What the model makes of one clip."""

    emotion: str  # the label of the greatest probability
    confidence: float  # that probability
    probabilities: dict[str, float]  # label -> the mean over its windows, calibrated
    seconds: float  # of audio in it
    distance: float  # from the training data, of which nearly all is within 1
    warning: str  # what is wrong with it; empty if nothing is
    timeline: Timeline | None = None  # where a step was asked for

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types, for json.dumps; of a timeline the windows, a dictionary each."""
        windows = None if self.timeline is None else self.timeline.windows.to_dict("records")
        return {**self._asdict(), "timeline": windows}


def default_model(cfg: Config, paths: Sequence[Path] = ()) -> Path:
    """The model for some files, where none is named: best_emotion_model.pth, else a bundled one.

    The clips of a competition's test folder are recorded as its training clips are, others in any way.
    """
    own, test = Path(Config.checkpoint), cfg.test_root.resolve()
    if own.exists():
        return own
    is_test = bool(paths) and all(path.resolve().is_relative_to(test) for path in paths)
    return PRETRAINED["same" if is_test else "any"]


_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread for a while: for one window, threads start too slowly.

    How many it uses holds for the whole process, so predictions from several threads take turns.
    """
    with _ONE_AT_A_TIME:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(n_threads)


class Recognizer:
    """A trained model that labels files and arrays.

    Without a checkpoint it takes best_emotion_model.pth where there is one, and says so, else the bundled
    model for any recordings. It writes no files. While it predicts, PyTorch has one thread.

    Args:
        checkpoints: Files that train.py wrote; the probabilities of several are averaged.
        device: As the setting of that name.
        num_workers: Processes that predict_files uses, as the setting of that name.
        standard_names: Call emotions by their usual names, as "Surprised" a class "Suprised".

    Raises:
        UserError: A checkpoint cannot be used, or their classes, features or networks differ.
    """

    def __init__(
        self,
        *checkpoints: str | Path,
        device: str = "auto",
        num_workers: int = 0,
        standard_names: bool = False,
    ) -> None:
        if not all(isinstance(path, str | Path) for path in checkpoints):
            raise UserError("checkpoints: pass paths, one after the other: Recognizer('a.pth', 'b.pth')")
        paths = [Path(path) for path in checkpoints] or [default_model(Config())]
        loaded = [load_checkpoint(path) for path in paths]
        self.checkpoint = join([checkpoint for checkpoint, _ in loaded])
        self.name = f"{', '.join(map(str, paths))}, {self.checkpoint.summary}"
        if not checkpoints and paths[0] not in PRETRAINED.values():
            note(f"model: {self.name}")
        self.labels = self.checkpoint.labels
        if standard_names:
            self.labels = [emotion_of(label) or label for label in self.labels]
        self.device = resolve_device(device)
        if self.device.type != "cpu":  # else features and networks both run in the workers
            num_workers = 0
        model = loaded[0][1] if len(loaded) == 1 else build_ensemble(self.checkpoint)
        self.model = model.to(self.device)
        self.cfg = replace(self.checkpoint.config, device=device, num_workers=num_workers)

    @overload
    def predict(self, clips: Clip, rate: float | None = None, *, step: float = 0.0) -> Prediction: ...

    @overload
    def predict(
        self, clips: list[Any] | tuple[Any, ...], rate: float | None = None, *, step: float = 0.0
    ) -> list[Prediction]: ...

    def predict(
        self, clips: Clip | list[Any] | tuple[Any, ...], rate: float | None = None, *, step: float = 0.0
    ) -> Prediction | list[Prediction]:
        """What the model makes of a clip, or of each of a list of clips.

        Args:
            clips: A path, or the bytes of a file, or a file opened for reading bytes; or samples (n,) or
                (n, channels), float in [-1, 1], int16 or int32; or a list of these.
            rate: Sampling rate of the arrays, 1,000 to 768,000 Hz.
            step: Seconds from window to window, if a timeline is wanted.

        Returns:
            A Prediction for a clip, a list of them for a list.

        Raises:
            AudioError: A clip cannot be used; the message says which and why.
            UserError: The step is below 0.1 s or longer than a window.
        """
        self._check_step(step)
        several = _as_list(clips)
        predictions: list[Prediction] = []
        with one_thread():
            results = self._predict(several, rate=rate, step=step)
        for number, (clip, result) in enumerate(zip(several, results, strict=True)):
            if isinstance(result, AudioError):
                raise AudioError(f"{_name(clip, number)}: {result}")
            predictions.append(result)
        return predictions if isinstance(clips, list | tuple) else predictions[0]

    def adapt(
        self,
        clips: Clip | list[Any] | tuple[Any, ...],
        rate: float | None = None,
        *,
        emotions: Sequence[str] = (),
    ) -> "Recognizer":
        """A Recognizer that knows the voice in some recordings; this one stays as it is.

        The recordings need no labels; a dozen of different emotions are enough, and often they are the very
        clips to be labelled. What they bring is in the README. Notes say where it will not be much.

        Args:
            clips: As for predict, of one person; of each, the first two minutes are heard.
            rate: Sampling rate of the arrays.
            emotions: The label of each recording, if known.

        Raises:
            AudioError: A recording cannot be used.
            UserError: They do not sound like speech, or an emotion is none of the labels.
        """
        several = _as_list(clips)
        if not several:
            raise UserError("no recordings to adapt to")
        if emotions and len(emotions) != len(several):
            raise UserError(f"recordings: {len(several)}, emotions: {len(emotions)}: one for each, or none")
        features, seconds = self._extract(several, rate)
        owner = [number for number, windows in enumerate(features) for _ in windows]
        if unknown := set(emotions) - set(self.labels):
            raise UserError(f"emotions = {', '.join(sorted(unknown))}: must be of {', '.join(self.labels)}")
        shifts = [self.checkpoint.shifts[self.labels.index(emotion)] for emotion in emotions]
        model, variety = self.model.adapt(
            torch.cat(features),
            torch.tensor(owner, device=self.device),
            torch.stack(shifts).to(self.device) if shifts else None,
        )
        if bool((self.model.distance(torch.cat(features)) > 1).all()):
            raise UserError("the recordings to adapt to do not sound like speech (distance above 1)")
        if len(features) < 8 or seconds < 20:
            note(
                f"note: recordings to adapt to: {len(features)}, {seconds:.0f} s: from 8 and 20 s on it pays"
            )
        if variety < MIN_VARIETY and not emotions:
            note("note: the recordings to adapt to sound like one emotion: it helps little")
        adapted = copy.copy(self)
        adapted.model, adapted.name = model, f"{self.name}, adapted to recordings: {len(features)}"
        members = [dict(network.state_dict()) for network in model.members]
        distance, voices = dict(model.distance.state_dict()), dict(model.voices.state_dict())
        adapted.checkpoint = replace(self.checkpoint, members=members, distance=distance, voices=voices)
        return adapted

    @torch.inference_mode()
    def embed(self, clip: Clip, rate: float | None = None) -> FloatArray:
        """What the networks hear in a clip before they decide, for classifiers of one's own.

        Args:
            clip: As for predict; the first two minutes are heard.
            rate: Sampling rate of an array.

        Returns:
            (n_networks * 6 * gru_hidden,) float32: the pooled states of each network, means over the windows.

        Raises:
            AudioError: The clip cannot be used.
        """
        with one_thread():
            (features,), _ = self._extract(_as_list((clip,)), rate)
            deviation = self.model.voices(features)
            states = [network.embed(features, deviation).mean(dim=0) for network in self.model.members]
        return torch.cat(states).cpu().numpy()

    @torch.inference_mode()
    def _extract(self, clips: Sequence[Clip], rate: float | None) -> tuple[list[Tensor], float]:
        """Features (W, F, T) of the first two minutes of each clip, and their seconds together."""
        features: list[Tensor] = []
        seconds = 0.0
        for number, clip in enumerate(clips):
            recording = Recording(clip, self.cfg, rate=rate)
            try:
                windows = np.stack(list(itertools.islice(recording, round(120 / self.cfg.duration))))
            except AudioError as error:
                raise AudioError(f"{_name(clip, number)}: {error}") from None
            features.append(self.model.mfcc(torch.from_numpy(windows).to(self.device)))
            seconds += recording.seconds
        return features, seconds

    def predict_files(
        self, paths: Sequence[str], *, step: float = 0.0
    ) -> Iterator[tuple[str, Prediction | AudioError]]:
        """Yield each path with its prediction, or why there is none, in order and in constant memory."""
        self._check_step(step)
        work = partial(self._predict, step=step)
        return zip(paths, map_files(work, paths, self.cfg), strict=True)

    def predict_segments(
        self, clip: Clip, segments: Sequence[tuple[float, float]], rate: float | None = None
    ) -> list[Prediction | AudioError]:
        """What the model makes of parts of a recording, each from a start to an end in seconds.

        Raises:
            AudioError: The recording cannot be used. That one of its parts cannot be is told in its place.
        """
        with one_thread():
            wave, own_rate = Recording(_as_list(clip)[0], self.cfg, rate=rate).read(), self.cfg.sample_rate
            length = len(wave) / own_rate
            inside = [0 <= start < end <= length + 0.1 for start, end in segments]  # ends may be rounded
            spans = np.rint(np.array([*itertools.compress(segments, inside)]) * own_rate).astype(int)
            results = iter(self._predict([wave[start:end] for start, end in spans], rate=own_rate))
        beyond = AudioError(f"not in the recording, which has {length:.2f} s")
        return [next(results) if is_inside else beyond for is_inside in inside]

    def _check_step(self, step: float) -> None:
        if step and not 0.1 <= step <= self.cfg.duration:
            raise UserError(f"step = {step}: must be 0.1 to {self.cfg.duration} seconds, a window's length")

    @torch.inference_mode()
    def _predict(
        self, clips: Sequence[Clip], *, rate: float | None = None, step: float = 0.0
    ) -> list[Prediction | AudioError]:
        """Predict some clips; their windows go through the networks together, BLOCK at a time."""
        recordings = [Recording(clip, self.cfg, rate=rate, step=step) for clip in clips]
        failures: dict[int, AudioError] = {}

        def windows() -> Iterator[tuple[int, float, FloatArray]]:
            for number, recording in enumerate(recordings):
                try:
                    yield from ((number, recording.seconds, window) for window in recording)
                except AudioError as error:
                    failures[number] = error

        owners: list[int] = []
        ends: list[float] = []
        outputs: list[Outputs] = []
        stream = windows()
        while block := list(itertools.islice(stream, BLOCK)):
            owners += [number for number, _, _ in block]
            ends += [end for _, end, _ in block]
            waves = torch.from_numpy(np.stack([window for *_, window in block])).to(self.device)
            outputs.append(self.model(self.model.mfcc(waves)))
        if not owners:
            return list(failures.values())
        owner, end = torch.tensor(owners), torch.tensor(ends, dtype=torch.double)
        of_windows = Outputs(*(torch.cat(values).cpu() for values in zip(*outputs, strict=True)))
        return [
            failures.get(number)
            or self._sum_up(
                recording, end[owner == number], Outputs(*(v[owner == number] for v in of_windows))
            )
            for number, recording in enumerate(recordings)
        ]

    def _sum_up(self, recording: Recording, end: Tensor, outputs: Outputs) -> Prediction | AudioError:
        """From the ends of a clip's windows (W,), and what the networks make of them."""
        of_clip = Outputs(*(values.mean(dim=0, keepdim=True) for values in outputs))
        row = self.model.calibrated(of_clip)[0]
        if not row.isfinite().all():  # or the label would be the first class
            return AudioError(
                "; ".join(filter(None, ["its probabilities are not finite", recording.warning]))
            )
        values = dict(zip(self.labels, row.tolist(), strict=True))
        best = self.labels[int(row.argmax())]
        short = "shorter than half a second" if recording.seconds < 0.5 else ""
        warning = "; ".join(filter(None, [recording.warning, short]))
        distance = of_clip.distance.item()
        result = Prediction(best, values[best], values, recording.seconds, distance, warning)
        if not recording.step:
            return result
        probabilities = pd.DataFrame(self.model.calibrated(outputs).double().numpy(), columns=self.labels)
        about = {
            "start": (end - self.cfg.duration).clamp(min=0).numpy(),
            "end": end.numpy(),
            "emotion": probabilities.idxmax(axis=1),
            "confidence": probabilities.max(axis=1),
            "distance": outputs.distance.double().numpy(),
        }
        windows = pd.DataFrame(about).join(probabilities)
        return result._replace(timeline=Timeline(windows, np.concatenate(recording.envelope)))


def _as_list(clips: Any) -> list[Any]:  # noqa: ANN401 - whatever a caller passes
    """The clips, one or several.

    Raises:
        AudioError: One is none.
    """
    several = [*clips] if isinstance(clips, list | tuple) else [clips]
    for clip in several:
        if not (isinstance(clip, str | Path | bytes | np.ndarray) or hasattr(clip, "read")):
            kinds = "a path, a file or its bytes, or samples as a NumPy array"
            raise AudioError(f"{type(clip).__name__}: a clip is {kinds}")
    return several


def _name(clip: Clip, number: int) -> str:
    return str(clip) if isinstance(clip, str | Path) else f"clip {number}"


# ---- which clips -----------------------------------------------------------------------------------------


def natural_key(path: Path) -> str:
    """Compare the numbers in names as numbers: 2.wav before 10.wav."""
    return re.sub("[0-9]+", lambda number: number[0].zfill(20), path.as_posix())


def find_test_clips(folder: Path) -> list[Path]:
    """The clips to label for a submission, in natural order.

    Raises:
        UserError: There are none, two have the same name, or no CSV can hold a name.
    """
    if not folder.is_dir():
        raise UserError(f"no test folder {folder}: pass --test_dir DIR, or name files to label")
    paths = sorted(find_audio(folder, all_suffixes=True), key=natural_key)  # a submission needs them all
    if not paths:
        raise UserError(f"no audio files in {folder}")
    name, count = Counter(path.name for path in paths).most_common(1)[0]
    if count > 1:
        raise UserError(f"{name} is in {count} folders of {folder}: ids must differ", code=1)
    for path in paths:
        check_csv_name(path.name)
    return paths


def expand_paths(arguments: Sequence[str], stdin: Path | None = None) -> list[Path]:
    """Files as they are, the clips in folders, and the matches of patterns that the shell left alone.

    For "-" comes the file `stdin`.

    Raises:
        UserError: An argument leads to no file, or no CSV can hold a name.
    """
    paths: list[Path] = []
    for argument in arguments:
        if argument == "-" and stdin:
            paths.append(stdin)
            continue
        # Not with Path, which refuses absolute patterns, names that are too long, and takes "" for here.
        matches = [argument] if os.path.lexists(argument) else sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
        if not matches:
            raise UserError(f"{argument!r}: no such file or folder")
        for match in map(Path, matches):
            found = sorted(find_audio(match), key=natural_key) if match.is_dir() else [match]
            if not found:
                raise UserError(f"no audio files in {match}")
            paths += found
    for path in paths:
        check_csv_name(str(path))
    return paths


def open_stdin() -> IO[bytes]:
    """Standard input, as a file.

    Raises:
        UserError: It is a terminal.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("-: standard input holds no file: pass one with `< clip.wav`")
    return sys.stdin.buffer


# ---- results ---------------------------------------------------------------------------------------------


def report_results(results: Mapping[str, Prediction | AudioError]) -> int:
    """Name files that cannot be read or are warned of, say how many are far off; count the unreadable."""
    failures = {path: str(result) for path, result in results.items() if isinstance(result, AudioError)}
    warnings = {path: getattr(result, "warning", "") for path, result in results.items()}
    report_files({path: warning for path, warning in warnings.items() if warning}, "warning:")
    report_files(failures, "skipped", most=len(failures))
    if n_far := sum(getattr(result, "distance", 0) > 1 for result in results.values()):
        note(
            f"note: recordings unlike the training data (distance above 1): {n_far} of {len(results)}: "
            "another microphone or level, noise, music, no speech; their labels deserve less trust"
        )
    return len(failures)


def to_rows(about: Mapping[str, str], result: Prediction, *, abstain: bool) -> list[dict[str, Any]]:
    """The rows of a clip, after what they say `about` it: one, or one for each window of a timeline.

    Times have two decimals, other numbers four. What is far from the training data has no label, if we may
    abstain.
    """
    whole: dict[Any, Any] = {"emotion": result.emotion, "confidence": result.confidence}
    whole |= {"seconds": result.seconds, "distance": result.distance} | result.probabilities
    rows = [whole] if result.timeline is None else result.timeline.windows.to_dict("records")
    decimals = dict.fromkeys(("start", "end", "seconds", "distance"), 2)
    for row in rows:
        if abstain and row["distance"] > 1:
            row["emotion"] = ""
        row |= {key: round(value, decimals.get(key, 4)) for key, value in row.items() if key != "emotion"}
    return [{**about, **row} for row in rows]


def label_files(
    recognizer: Recognizer, names: Sequence[tuple[str, str]], cfg: Config, flags: Namespace
) -> int:
    """Write a row for each file, or for each window of it; return 1 if one could not be read, else 0.

    `names` are paths, each with what its row calls it.
    """
    step = (flags.step or recognizer.cfg.duration) if flags.timeline else 0.0
    predictions = recognizer.predict_files([path for path, _ in names], step=step)
    abouts = [{"filename": name} for _, name in names]
    titles = unique_stems([name for _, name in names]) if step else [""] * len(names)

    def results() -> Iterator[Prediction | AudioError]:
        for (_, name), title, (path, result) in zip(names, titles, predictions, strict=True):
            yield result
            if not isinstance(result, AudioError) and result.timeline is not None:
                link = link_to(path, Path(cfg.run_dir)) if name == path else ""  # of stdin no file stays
                picture = Path(cfg.run_dir, f"timeline_{title}.png")
                save_timeline(picture, result.timeline, recognizer.labels, name, link)

    return write_rows(recognizer.labels, abouts, results(), flags)


def read_segments(path: Path) -> pd.DataFrame:
    """A table of parts of recordings: filename, start and end in seconds, and perhaps speaker, all text.

    Raises:
        UserError: It cannot be understood, or a row names no file, or times that cannot be.
    """
    table, columns = read_csv(path, "segments"), {"filename", "start", "end"}
    if not columns <= set(table.columns) <= columns | {"speaker"} or table.empty:
        has = ", ".join(table.columns)
        raise UserError(f"segments {path}: needs rows of filename, start, end, perhaps speaker, has {has}")
    times = table[["start", "end"]].apply(pd.to_numeric, errors="coerce")
    rows = zip(table.filename, times.start, times.end, strict=True)
    for line, (name, start, end) in enumerate(rows, start=2):
        where = f"segments {path}, line {line}"
        if "\0" in name or not (path.parent / name).is_file():
            raise UserError(f"{where}: no file {printable(name)} in {path.parent}")
        if not 0 <= start < end < math.inf:  # NaN for what is no number
            raise UserError(f"{where}: start and end must be seconds, one after the other")
    return table


def label_segments(recognizer: Recognizer, path: Path, table: pd.DataFrame, flags: Namespace) -> int:
    """Write a row for each part of a recording, those of one together; return as label_files."""

    def results() -> Iterator[Prediction | AudioError]:
        for name, rows in groups:
            parts = [(float(start), float(end)) for start, end in zip(rows.start, rows.end, strict=True)]
            try:
                yield from recognizer.predict_segments(path.parent / name, parts)
            except AudioError as error:
                yield from [error] * len(parts)

    groups = [*table.groupby("filename", sort=False)]
    abouts = [row for _, rows in groups for row in rows.to_dict("records")]
    return write_rows(recognizer.labels, abouts, results(), flags)


def write_rows(
    labels: Sequence[str],
    abouts: Sequence[Mapping[str, str]],
    results: Iterator[Prediction | AudioError],
    flags: Namespace,
) -> int:
    """Write what there is to say `about` each clip, and its labels; 1 if one could not be read, else 0.

    Rows are written as they come: Ctrl-C keeps them.
    """
    before, after = (["start", "end"], []) if flags.timeline else ([], ["seconds"])
    header = [*abouts[0], *before, "emotion", "confidence", *after, "distance", *labels]
    seen: dict[str, Prediction | AudioError] = {}
    n_rows = 0
    with open_rows(flags.output) as stream:
        shown = printable if stream.isatty() else str  # a name must not steer a terminal
        table = csv.writer(stream, lineterminator="\n")
        if not flags.json:
            table.writerow(map(shown, header))
        quiet = True if stream.isatty() else None  # rows and a bar would mix
        for about, result in zip(tqdm(abouts, "clips", disable=quiet), results, strict=True):
            name = " ".join(about.values())
            if isinstance(result, AudioError):
                seen[name] = result
                continue
            seen[name] = result._replace(timeline=None)
            rows = to_rows(about, result, abstain=flags.abstain)
            n_rows += len(rows)
            if flags.json:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                table.writerows([shown(str(row[column])) for column in header] for row in rows)
            stream.flush()
    n_failures = report_results(seen)
    if flags.output:
        print(f"{n_rows} rows in {flags.output}")
    return 1 if n_failures else 0


@contextlib.contextmanager
def open_rows(output: str) -> Iterator[TextIO]:
    """Where rows go: stdout, or a file that takes its place in one step at the end, also of Ctrl-C."""
    if not output:
        yield sys.stdout
        return
    path = Path(output).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        draft.replace(path)
    except KeyboardInterrupt:  # an earlier file is whole, and stays
        path = path.with_name(f"{path.name}.part") if path.exists() else path
        draft.replace(path)
        note(f"the rows so far are in {path}")
        raise
    finally:
        draft.unlink(missing_ok=True)


def unique_stems(names: Sequence[str]) -> list[str]:
    """The name of each file without folder and suffix, with a number where an earlier one is called so."""
    stems: dict[str, str] = {}  # in small letters, as some file systems see them -> as they are
    for name in names:
        stem = Path(name).stem[:60]  # a path must not become too long
        numbered = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        stem = next(candidate for candidate in numbered if candidate.lower() not in stems)
        stems[stem.lower()] = stem
    return list(stems.values())


# ---- timeline --------------------------------------------------------------------------------------------

PAUSE = 0.03  # a window whose loudest point is below this part of the recording's loud points (-30 dB)
PAUSE_STYLE = {"color": "gainsboro", "label": "pause"}
FAR_STYLE = {
    "facecolor": "darkgrey",
    "edgecolor": "white",
    "hatch": "////",
    "label": "unlike the\ntraining data",
}


def find_pauses(timeline: Timeline) -> npt.NDArray[np.bool_]:
    """Which windows of a timeline are silent against the rest of the recording, (W,)."""
    loud = np.quantile(timeline.envelope, 0.99)  # not the greatest, which may be a click
    points = np.rint(timeline.windows[["start", "end"]] * ENVELOPE_RATE).astype(int).to_numpy()
    peaks = [timeline.envelope[start : max(end, start + 1)].max() for start, end in points]
    return np.array(peaks) < PAUSE * loud


def window_edges(windows: pd.DataFrame) -> npt.NDArray[np.float64]:
    """From where to where each window of a timeline is drawn, in seconds, (W + 1,).

    Windows overlap, and a border is drawn halfway between the middles of two.
    """
    middle = (windows.start + windows.end).to_numpy() / 2
    return np.concatenate([[0], (middle[1:] + middle[:-1]) / 2, windows.end[-1:]])


def label_colours(labels: Sequence[str]) -> list[str]:
    """A colour for each label, as #rrggbb."""
    from matplotlib import colormaps, colors  # takes a second

    if len(labels) <= len(COLOURS):
        return COLOURS[: len(labels)]
    return [colors.to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 1, len(labels)))]


def mean_width(n_windows: int) -> int:
    """Windows in the moving mean of a timeline: an odd number, one where there are few."""
    return n_windows // 60 | 1


def save_timeline(picture: Path, timeline: Timeline, labels: Sequence[str], title: str, link: str) -> None:
    """Write the picture of a timeline, and beside it subtitles, and a page to look at while it plays."""
    page = picture.with_suffix(".html")
    save_view(picture.with_suffix(".srt"), partial(subtitles, timeline))
    drawn = save_figure(picture, partial(plot_timeline, timeline, labels, title))
    if save_view(page, partial(timeline_page, timeline, labels, title, link)) and drawn:
        note(f"timeline of {title}: {picture}; to listen to: {page}")


def timeline_page(timeline: Timeline, labels: Sequence[str], title: str, link: str) -> bytes:
    """HTML with a player, the waveform, the label of each window and the stacked probabilities.

    `link` is the recording, as the page names it; empty if there is no file to play.
    """
    windows, envelope = timeline
    probabilities = windows[[*labels]].to_numpy()
    kinds = [find_pauses(timeline), windows.distance > 1]  # numbered after the labels
    shown = np.select(kinds, [len(labels), len(labels) + 1], probabilities.argmax(axis=1))
    content = {
        "title": title,
        "link": link,
        "labels": [*labels],
        "colours": label_colours(labels),
        "edges": window_edges(windows).round(2).tolist(),
        "shown": shown.tolist(),
        "probabilities": probabilities.round(3).tolist(),
        "width": mean_width(len(windows)),
        "rate": ENVELOPE_RATE,
        "envelope": (100 * envelope / max(envelope.max(), 1e-9)).round().astype(int).tolist(),
    }
    return fill_page("timeline.html", content)


def subtitles(timeline: Timeline) -> bytes:
    """The labels of a timeline as an .srt file: one for each stretch with the same one, none for pauses."""

    def clock(seconds: float) -> str:
        precise = timedelta(seconds=round(seconds, 3), microseconds=1)  # so that there are decimals
        return f"{precise!s:0>15}"[:12].replace(".", ",")

    windows, edges = timeline.windows, window_edges(timeline.windows)
    silent = find_pauses(timeline) | (windows.distance > 1)
    shown = windows.emotion.mask(silent, "").to_numpy()
    starts = np.flatnonzero(np.r_[True, shown[1:] != shown[:-1]])
    stretches = [pair for pair in pairwise([*starts, len(shown)]) if shown[pair[0]]]
    blocks = [
        f"{number}\n{clock(edges[start])} --> {clock(edges[end])}\n"
        f"{shown[start]} {windows.confidence[start:end].mean():.0%}\n"
        for number, (start, end) in enumerate(stretches, start=1)
    ]
    return "\n".join(blocks).encode()


def plot_timeline(timeline: Timeline, labels: Sequence[str], title: str) -> "Figure":
    """The outline of the waveform, the label of each window, and the stacked probabilities.

    These are a moving mean over windows with speech; pauses and what is unlike the training data are grey.
    """
    from matplotlib.figure import Figure  # takes a second

    windows, envelope = timeline
    *names, title = legible([*labels, title])
    unit, scale = ("minutes", 60) if windows.end.iloc[-1] > 180 else ("seconds", 1)
    edges, times = window_edges(windows) / scale, np.arange(len(envelope)) / ENVELOPE_RATE / scale
    pauses, far = find_pauses(timeline), (windows.distance > 1).to_numpy()
    width, colours = mean_width(len(windows)), label_colours(labels)
    speech = windows.loc[~(pauses | far), [*labels]].reindex(windows.index)
    smooth = speech.rolling(width, center=True, min_periods=1).mean().fillna(0)

    figure = Figure(figsize=(10, 5))
    waveform, strip, stack = figure.subplots(3, 1, sharex=True, height_ratios=[5, 1, 10])
    waveform.fill_between(times, -envelope, envelope, color="black", linewidth=0)
    for label, colour in zip(labels, colours, strict=True):
        shade(strip, edges, windows.emotion == label, {"color": colour})
    heights = pd.concat([smooth, smooth[-1:]]).T  # (C, W + 1)
    stack.stackplot(edges, heights, labels=names, colors=colours, step="post", linewidth=0)
    for axes, order in ((waveform, 0), (strip, 2), (stack, 2)):  # the waveform stays visible
        shade(axes, edges, pauses, PAUSE_STYLE | {"zorder": order})
        shade(axes, edges, far & ~pauses, FAR_STYLE | {"zorder": order})
    waveform.set(title=title, ylabel="waveform")
    strip.set_ylabel("label", rotation=0, ha="right", va="center")
    strip.set(yticks=[], ylim=(0, 1))
    mean = "" if width == 1 else f"\n(mean of {width} windows)"
    stack.set(xlabel=unit, ylabel=f"probability{mean}", xlim=(0, edges[-1]), ylim=(0, 1))
    handles, texts = stack.get_legend_handles_labels()
    figure.legend(handles[::-1], texts[::-1], loc="outside right center")
    return figure


def shade(axes: "Axes", edges: npt.ArrayLike, where: npt.ArrayLike, style: dict[str, Any]) -> None:
    """Fill the windows of a timeline where something holds, (W,), from the bottom to the top of a panel."""
    sides, chosen = np.repeat(edges, 2)[1:-1], np.repeat(where, 2)  # left and right of each window
    across = axes.get_xaxis_transform()
    axes.fill_between(sides, 0, 1, where=chosen, transform=across, linewidth=0, **style)


# ---- submission ------------------------------------------------------------------------------------------


def submit(recognizer: Recognizer, cfg: Config, fill: str) -> int:
    """Label the test folder and write the submission; return 1 if its ids are not the sample's, else 0.

    Raises:
        UserError: A clip cannot be read and there is no label to fill in; an earlier submission stays.
    """
    target, labels = Path(cfg.submission), recognizer.labels
    if target.exists() and not target.is_file():
        raise UserError(f"submission = {cfg.submission!r}: must be a file")
    if fill and fill not in labels:
        raise UserError(f"fill = {fill!r}: must be one of {', '.join(labels)}")
    paths = find_test_clips(cfg.test_root)
    predictions = recognizer.predict_files(list(map(str, paths)))
    results = dict(tqdm(predictions, "clips", len(paths), disable=None))
    rows = [
        (Path(path).name, fill if isinstance(result, AudioError) else result.emotion)
        for path, result in results.items()
    ]
    n_failures = report_results(results)
    if n_failures and not fill:
        raise UserError(
            f"{target} not written: {n_failures} of {len(paths)} clips have no label: "
            "repair or remove them, or pass --fill LABEL",
            code=1,
        )
    submission = pd.DataFrame(rows, columns=["filename", "emotion"])
    save_file(target, submission.to_csv(index=False, lineterminator="\n").encode())
    if n_failures:
        note(f"warning: {n_failures} of {len(rows)} rows are no predictions but filled with {fill}")
    beside = (folder / "sample_submission.csv" for folder in list(cfg.test_root.parents)[:2])  # the data
    sample = next((path for path in beside if path.is_file()), None)
    differences = compare_with_sample(sample, submission, labels) if sample else []
    for difference in differences:
        note(f"warning: {sample}: {difference}")
    verdict = f"; not as in {sample}" if differences else f", ids as in {sample}" if sample else ""
    print(printable(f"{len(rows)} rows in {target}{verdict}"))
    return 1 if differences else 0


def compare_with_sample(sample: Path, submission: pd.DataFrame, labels: Sequence[str]) -> list[str]:
    """Say how the competition's sample submission differs from ours (columns filename and emotion)."""
    try:
        expected = pd.read_csv(sample, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError) as error:
        return [f"not a CSV file: {error}"]
    if list(expected.columns) != list(submission.columns):
        return [f"header {','.join(expected.columns)}, not {','.join(submission.columns)}"]
    ids, files = expected.filename, submission.filename
    differences = {
        "ids without a file": ids[~ids.isin(files)],
        "files without an id": files[~files.isin(ids)],
        "ids listed twice": ids[ids.duplicated()],
        "labels we do not know": expected.emotion[~expected.emotion.isin(labels)].drop_duplicates(),
    }
    return [
        f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in differences.items() if len(names)
    ]


# ---- the script ------------------------------------------------------------------------------------------


def check_flags(flags: Namespace) -> None:
    """Refuse flags that have no effect on what was asked for.

    Raises:
        UserError: There is such a flag, or its value is bad.
    """
    if flags.export and flags.paths:
        raise UserError("--export labels nothing: leave out files and folders")
    if flags.segments and (flags.paths or flags.export or flags.timeline):
        raise UserError("--segments names what to label: leave out files, --export and --timeline")
    no_test = flags.paths or flags.export or flags.segments
    for names, is_useless, why in (
        ("submission data_dir test_dir fill", no_test, "is for the test folder: leave it out"),
        (
            "timeline json output abstain standard_names",
            not (flags.paths or flags.segments),
            "is for files: name files, folders or patterns",
        ),
        ("step", not flags.timeline, "is for --timeline: leave it out, or add --timeline"),
        ("run_dir", not flags.timeline, "is for --timeline: a run's model is named with --checkpoint"),
    ):
        for name in names.split():
            if is_useless and getattr(flags, name, ""):
                raise UserError(f"--{name} {why}")
    output = Path(flags.output)
    is_other = output.exists() and not output.is_file()
    if flags.output and (is_other or output.suffix.lower() in AUDIO_SUFFIXES | {".pth"}):
        raise UserError(f"output = {flags.output!r}: must be a file for rows: no folder, audio or model")


def adapt_to_files(recognizer: Recognizer, paths: Sequence[Path]) -> Recognizer:
    """A Recognizer that knows the voice in some files; folders named after emotions tell their labels.

    Files that cannot be used are skipped with a note.

    Raises:
        UserError: No file can be used, or none sounds like speech.
    """
    heard = recognizer.predict_files([*map(str, paths)])
    failures = {path: str(result) for path, result in heard if isinstance(result, AudioError)}
    report_files(failures, "skipped")
    paths = [path for path in paths if str(path) not in failures]
    spelling = {class_of(label): label for label in recognizer.labels}  # Suprised is Surprised
    emotions = [spelling.get(class_of(path.parent.name), "") for path in paths]
    if is_labelled := bool(paths) and all(emotions):
        note(f"note: the folders tell what they are labelled: {', '.join(sorted(set(emotions)))}")
    return recognizer.adapt(paths, emotions=emotions if is_labelled else ())


def export(recognizer: Recognizer, path: Path) -> int:
    """Write the model as ONNX, or, adapted, as a checkpoint.

    Raises:
        UserError: The path is no name for it, or a package is missing.
    """
    if path.suffix == ".pth" and not path.exists():
        save_checkpoint(path, recognizer.checkpoint)
        print(f"{path}: {recognizer.name}")
        return 0
    export_onnx(path, recognizer.checkpoint, recognizer.model.cpu())
    cfg = recognizer.cfg
    shape = f"(any number, {cfg.n_samples}) at {cfg.sample_rate} Hz"
    print(f"{path}: windows {shape} -> probabilities of {len(recognizer.labels)} classes")
    return 0


def main(cfg: Config, flags: Namespace) -> int:
    """Label a test folder for a submission, or the files named."""
    check_flags(flags)
    if flags.demo:
        make_demo(Path(cfg.data_dir))
    torch.set_num_threads(1)  # the cores belong to the workers
    with spool(open_stdin()) if "-" in flags.paths else contextlib.nullcontext() as stdin:
        paths = expand_paths(flags.paths, stdin)
        segments = read_segments(Path(flags.segments)) if flags.segments else None
        is_test = not (flags.paths or flags.export or flags.segments)
        models = [str(default_model(cfg, [cfg.test_root] if is_test else paths))]
        if flags.demo or hasattr(flags, "checkpoint"):
            models = cfg.checkpoint.split(",")
        recognizer = Recognizer(
            *models, device=cfg.device, num_workers=cfg.num_workers, standard_names=flags.standard_names
        )
        if flags.adapt:
            recognizer = adapt_to_files(recognizer, expand_paths(flags.adapt.split(",")))
        note(f"model: {recognizer.name}")
        own, fields = recognizer.cfg, MODEL_FIELDS - {"ensemble"}
        if Path(models[0]) not in PRETRAINED.values() and any(
            getattr(own, name) != getattr(cfg, name) for name in fields
        ):
            note("note: settings are those of the model, not of config.py")
        if flags.export:
            return export(recognizer, Path(flags.export))
        if segments is not None:
            return label_segments(recognizer, Path(flags.segments), segments, flags)
        if not flags.paths:
            return submit(recognizer, cfg, flags.fill)
        names = [(str(path), "-" if path == stdin else str(path)) for path in paths]
        return label_files(recognizer, names, cfg, flags)


if __name__ == "__main__":
    raise SystemExit(run(main, *ARGS))
