"""Labels clips with a trained model.

python inference.py                    the clips of the test folder -> submission.csv
python inference.py a.wav clips/ ...   files, folders, patterns -> a CSV with probabilities on stdout
python inference.py --export my.onnx   the model, features included, as one file for ONNX Runtime
"""

from config import MODEL_FIELDS, RUNTIME_FIELDS, Config, UserError, make_parser, note, parse, printable, run

if __name__ == "__main__":  # answers --help, or a bad flag, before the slow imports
    parser = make_parser(__doc__, RUNTIME_FIELDS - {"run_dir", "cache_dir", "batch_size", "manifest"})
    parser.add_argument("paths", nargs="*", help="files, folders or patterns; none: the test folder")
    parser.add_argument("--fill", default="", help="label for test clips that cannot be read; else an error")
    parser.add_argument("--export", default="", metavar="FILE", help="write the model as ONNX; label nothing")
    ARGS = parse(parser)

import csv
import glob
import io
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from model import (
    EmotionEnsemble,
    calibrate,
    export_onnx,
    load_checkpoint,
    mean_over_windows,
    resolve_device,
    save_file,
)
from prepare import (
    AudioError,
    FloatArray,
    Recording,
    check_csv_name,
    find_audio,
    make_demo,
    map_files,
    report_files,
)

PRETRAINED = Path(__file__).with_name("assets") / "pretrained.pth"
BLOCK = 64  # windows that go through the networks at once

# ---- prediction ------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What the model makes of one file."""

    probabilities: FloatArray  # (C,), the mean over its windows, calibrated
    seconds: float  # of audio in it
    warning: str  # what is odd about it


def predict(
    paths: Sequence[str], model: EmotionEnsemble, cfg: Config
) -> Iterator[tuple[str, Prediction | AudioError]]:
    """Yield each path with its prediction, or why there is none, in order and in constant memory."""
    device = resolve_device(cfg.device)
    if device.type != "cpu":  # else features and networks both run in the workers, which share the model
        cfg = replace(cfg, num_workers=0)
    work = partial(_predict_chunk, model=model.to(device), cfg=cfg)
    return zip(paths, map_files(work, paths, cfg), strict=True)


@torch.inference_mode()
def _predict_chunk(
    paths: Sequence[str], model: EmotionEnsemble, cfg: Config
) -> list[Prediction | AudioError]:
    """Predict some files; their windows go through the networks together, BLOCK at a time."""
    device = model.mfcc.dct.device
    recordings = [Recording(Path(path), cfg) for path in paths]
    failures: dict[int, AudioError] = {}

    def windows() -> Iterator[tuple[int, FloatArray]]:
        for number, recording in enumerate(recordings):
            try:
                yield from ((number, window) for window in recording)
            except AudioError as error:
                failures[number] = error

    owner: list[int] = []
    of_windows: list[Tensor] = []
    stream = windows()
    while block := list(itertools.islice(stream, BLOCK)):
        owner += [number for number, _ in block]
        waves = torch.from_numpy(np.stack([window for _, window in block])).to(device)
        of_windows.append(model(model.mfcc(waves)).cpu())
    if not owner:
        return list(failures.values())
    of_clips = mean_over_windows(torch.cat(of_windows), torch.tensor(owner), len(paths))
    results: list[Prediction | AudioError] = []
    for number, (recording, row) in enumerate(
        zip(recordings, calibrate(of_clips, model.temperature), strict=True)
    ):
        if not row.isfinite().all():  # or the label would be the first class
            failures.setdefault(number, AudioError("its probabilities are not finite"))
        prediction = Prediction(row.numpy(), recording.seconds, recording.warning)
        results.append(failures.get(number, prediction))
    return results


# ---- which clips -----------------------------------------------------------------------------------------


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Compare the numbers in names as numbers: 2.wav before 10.wav."""
    pieces = re.split(r"([0-9]+)", path.as_posix())
    return [(int(piece), "") if index % 2 else (-1, piece) for index, piece in enumerate(pieces)]


def find_test_clips(folder: Path) -> list[Path]:
    """The clips to label for a submission, in natural order.

    Raises:
        UserError: There are none, two have the same name, or no CSV can hold a name.
    """
    if not folder.is_dir():
        raise UserError(f"no test folder {folder}: pass --test_dir DIR, or name files to label")
    paths = sorted(find_audio(folder), key=natural_key)
    if not paths:
        raise UserError(f"no audio files in {folder}")
    name, count = Counter(path.name for path in paths).most_common(1)[0]
    if count > 1:
        raise UserError(f"{name} is in {count} folders of {folder}: ids must differ", code=1)
    for path in paths:
        check_csv_name(path.name)
    return paths


def expand_paths(arguments: Sequence[str]) -> list[Path]:
    """Files as they are, the clips in folders, and the matches of patterns that the shell left alone.

    Raises:
        UserError: An argument leads to no file, or no CSV can hold a name.
    """
    paths: list[Path] = []
    for argument in arguments:
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


# ---- results ---------------------------------------------------------------------------------------------


def report_odd(results: Mapping[str, Prediction | AudioError]) -> int:
    """Name the files that are odd or cannot be read, and count the latter."""
    failures = {path: str(result) for path, result in results.items() if isinstance(result, AudioError)}
    warnings = {path: getattr(result, "warning", "") for path, result in results.items()}
    report_files({path: warning for path, warning in warnings.items() if warning}, "warning:")
    report_files(failures, "skipped", most=len(failures))
    return len(failures)


def print_table(paths: Sequence[Path], model: EmotionEnsemble, labels: Sequence[str], cfg: Config) -> int:
    """Print a CSV row with probabilities for each file; return 1 if one could not be read, else 0."""
    shown = printable if sys.stdout.isatty() else str  # a name must not steer a terminal
    if not sys.stdout.isatty() and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["filename", "emotion", "confidence", "seconds", *map(shown, labels)])
    results: dict[str, Prediction | AudioError] = {}
    for path, result in predict(list(map(str, paths)), model, cfg):
        results[path] = result
        if isinstance(result, AudioError):
            continue
        best = int(result.probabilities.argmax())
        numbers = [f"{value:.4f}" for value in result.probabilities]
        writer.writerow([shown(path), shown(labels[best]), numbers[best], f"{result.seconds:.2f}", *numbers])
    return 1 if report_odd(results) else 0


def submit(model: EmotionEnsemble, labels: Sequence[str], cfg: Config, fill: str) -> int:
    """Label the test folder and write the submission; return 1 if its ids are not the sample's, else 0.

    Raises:
        UserError: A clip cannot be read and there is no label to fill in; an earlier submission stays.
    """
    target = Path(cfg.submission)
    if target.exists() and not target.is_file():
        raise UserError(f"submission = {cfg.submission!r}: must be a file")
    if fill and fill not in labels:
        raise UserError(f"fill = {fill!r}: must be one of {', '.join(labels)}")
    paths = find_test_clips(cfg.test_root)
    results = dict(tqdm(predict(list(map(str, paths)), model, cfg), "clips", len(paths), disable=None))
    rows = [
        (Path(path).name, fill if isinstance(result, AudioError) else labels[result.probabilities.argmax()])
        for path, result in results.items()
    ]
    n_failures = report_odd(results)
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
    sample = find_sample(cfg)
    differences = compare_with_sample(sample, submission, labels) if sample else []
    for difference in differences:
        note(f"warning: {sample}: {difference}")
    verdict = f"; not as in {sample}" if differences else f", ids as in {sample}" if sample else ""
    print(printable(f"{len(rows)} rows in {target}{verdict}"))
    return 1 if differences else 0


def find_sample(cfg: Config) -> Path | None:
    """The competition's sample submission, where it lies beside the data."""
    folders = [cfg.test_root.parent, cfg.test_root.parent.parent]
    samples = (folder / "sample_submission.csv" for folder in folders)
    return next((sample for sample in samples if sample.is_file()), None)


def compare_with_sample(sample: Path, submission: pd.DataFrame, labels: Sequence[str]) -> list[str]:
    """Say how the competition's sample submission differs from ours (columns filename and emotion)."""
    try:
        theirs = pd.read_csv(sample, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError) as error:
        return [f"not a CSV file: {error}"]
    if list(theirs.columns) != list(submission.columns):
        return [f"header {','.join(theirs.columns)}, not {','.join(submission.columns)}"]
    ours, expected = submission.filename, theirs.filename
    sides = {
        "ids without a file": expected[~expected.isin(ours)],
        "files without an id": ours[~ours.isin(expected)],
        "ids listed twice": expected[expected.duplicated()],
        "labels we do not know": theirs.emotion[~theirs.emotion.isin(labels)].drop_duplicates(),
    }
    return [f"{len(odd)} {what}: {', '.join(odd[:5])}" for what, odd in sides.items() if len(odd)]


# ---- the script ------------------------------------------------------------------------------------------


def main(cfg: Config, flags: Any) -> int:  # noqa: ANN401 - argparse.Namespace
    """Label a test folder for a submission, or the files named."""
    for name in ("submission", "test_dir", "fill"):
        if flags.paths and getattr(flags, name, ""):
            raise UserError(f"--{name} is for the test folder: leave it out, or the files")
    export = getattr(flags, "export", "")
    if flags.paths and export:
        raise UserError("--export labels nothing: leave it out, or the files")
    if flags.demo:
        make_demo(Path(cfg.data_dir))
    torch.set_num_threads(1)  # the cores belong to the workers; for one clip, threads start too slowly
    path = Path(cfg.checkpoint)
    if not (path.exists() or flags.demo or hasattr(flags, "checkpoint")):  # none yet, and none asked for
        path = PRETRAINED
    checkpoint, model = load_checkpoint(path)
    note(f"model: {path}, {checkpoint.summary}")
    trained = replace(checkpoint.config, **{name: getattr(cfg, name) for name in RUNTIME_FIELDS})
    if any(getattr(trained, name) != getattr(cfg, name) for name in MODEL_FIELDS):
        note("note: settings are those of the model, not of config.py")
    if export:
        export_onnx(Path(export), checkpoint, model)
        shape = f"(any number, {trained.n_samples}) at {trained.sample_rate} Hz"
        print(printable(f"{export}: windows {shape} -> probabilities of {len(checkpoint.labels)} classes"))
        return 0
    if flags.paths:
        return print_table(expand_paths(flags.paths), model, checkpoint.labels, trained)
    return submit(model, checkpoint.labels, trained, flags.fill)


if __name__ == "__main__":
    raise SystemExit(run(main, *ARGS))
