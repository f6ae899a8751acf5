"""Labels clips with a trained checkpoint.

python inference.py                    the clips of the test folder -> submission.csv
python inference.py a.wav clips/ ...   files, folders, patterns -> a CSV with probabilities on stdout
"""

from config import (
    RESUMABLE_FIELDS,
    SPLIT_FIELDS,
    Config,
    UserError,
    command,
    die_quietly,
    fits_csv,
    parse_runtime_config,
    printable,
    say,
)

if __name__ == "__main__":
    # Answers --help and refuses a bad flag at once: torch takes seconds to load.
    die_quietly()
    parse_runtime_config(description=__doc__)

import csv
import glob
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import Checkpoint, Network, load_checkpoint, replace_file, resolve_device, restore_model
from prepare import (
    AudioError,
    ClipFeatures,
    FloatArray,
    find_audio,
    iter_features,
    make_demo,
    report_failures,
    report_warnings,
)


class Prediction(NamedTuple):
    """What became of one file."""

    path: Path
    result: FloatArray | AudioError  # its class probabilities (C,), or why there are none
    warning: str  # what is odd about its audio; "" if nothing is


# ---- which clips ----------------------------------------------------------------------------------------


def find_test_clips(test_dir: Path) -> list[Path]:
    """The clips to label, in natural order: 2.wav before 10.wav.

    Raises:
        UserError: There are none, or two have the same name, or a name cannot be written to a CSV.
        OSError: A folder cannot be listed: its clips would be missing without a word.
    """
    if not test_dir.is_dir():
        raise UserError(f"no test folder {test_dir}: pass --test_dir DIR, or name files to label")
    paths = sorted(map(Path, find_audio(test_dir, strict=True)), key=_natural_key)
    if not paths:
        raise UserError(f"no audio files below {test_dir}")
    counts = Counter(path.name for path in paths)
    if twice := next((path for path in paths if counts[path.name] > 1), None):
        raise UserError(
            f"{twice.name} is in {counts[twice.name]} folders below {test_dir}: ids must differ", code=1
        )
    _check_names(path.name for path in paths)
    return paths


def expand_paths(arguments: Sequence[str]) -> list[Path]:
    """Files as they are, the clips below folders, and the matches of patterns that the shell left alone.

    Raises:
        UserError: An argument leads to no file, or a name cannot be written to a CSV.
        OSError: A folder cannot be listed.
    """
    paths: list[Path] = []
    for argument in arguments:
        if not argument:  # Path("") would be the current folder
            raise UserError("an empty path: name files or folders")
        # Path.glob refuses absolute patterns.
        # Nor does Path.exists take a name that is too long.
        matches = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))  # noqa: PTH110, PTH207
        for match in map(Path, matches):
            found = list(map(Path, find_audio(match, strict=True))) if match.is_dir() else [match]
            if match.is_dir() and not found:
                raise UserError(f"no audio files in {match}")
            paths += sorted(found, key=_natural_key)
        if not matches:
            raise UserError(f"{argument}: no such file or folder")
    _check_names(str(path) for path in paths)
    return paths


def _natural_key(path: Path) -> list[tuple[int, str]]:
    """Compare the numbers in names as numbers."""
    pieces = re.split(r"([0-9]+)", path.as_posix())
    return [(int(piece), "") if index % 2 else (-1, piece) for index, piece in enumerate(pieces)]


def _check_names(names: Iterable[str]) -> None:
    """Refuse, before any work, the few names that would not come back unchanged from a CSV in UTF-8."""
    for name in names:
        if not fits_csv(name):
            raise UserError(f"{name}: holds a carriage return or bytes that are not UTF-8: rename the file")


# ---- predictions ----------------------------------------------------------------------------------------


def predict(
    model: Network, paths: Sequence[Path], *, cfg: Config, device: torch.device
) -> Iterator[Prediction]:
    """Yield the class probabilities of each file, in order; memory does not grow with the files."""
    batch: list[ClipFeatures | AudioError] = []
    for result in iter_features(paths, cfg):
        batch.append(result)
        if len(batch) == cfg.batch_size:
            yield from _predict_batch(model, batch, device)
            batch = []
    yield from _predict_batch(model, batch, device)


def _predict_batch(
    model: Network, batch: Sequence[ClipFeatures | AudioError], device: torch.device
) -> Iterator[Prediction]:
    clips = [result.features for result in batch if isinstance(result, ClipFeatures)]
    rows = iter(())
    if clips:
        with torch.inference_mode():
            shares = model(torch.from_numpy(np.stack(clips)).to(device)).softmax(dim=1).cpu().numpy()
        if not np.isfinite(shares).all():  # or argmax would make it the first class
            raise UserError("the model's probabilities are not finite: train a new one", code=1)
        rows = iter(shares)
    for result in batch:
        if isinstance(result, ClipFeatures):
            yield Prediction(result.path, next(rows), result.warning)
        else:
            yield Prediction(result.path, result, "")


# ---- submission -----------------------------------------------------------------------------------------

HEADER = ["filename", "emotion"]


def compare_with_sample(sample: Path, names: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Say how the competition's sample submission differs from what we are about to write.

    Args:
        sample: CSV with the header and the ids that the competition expects.
        names: Our ids, all different.
        labels: The class names that we predict.
    """
    with sample.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            header, *rows = list(csv.reader(file)) or [[]]
        except csv.Error as error:
            return [f"no CSV: {error}"]
    if header != HEADER:
        return [f"header {','.join(header)}, not {','.join(HEADER)}"]
    expected, ours = Counter(row[0] for row in rows if row), set(names)
    sides = {
        "ids without a file": [name for name in expected if name not in ours],
        "files without an id": [name for name in names if name not in expected],
        "ids listed twice": [name for name, count in expected.items() if count > 1],
        "labels we do not know": sorted({row[1] for row in rows if len(row) > 1} - set(labels)),
    }
    return [f"{len(odd)} {what}: {', '.join(odd[:5])}" for what, odd in sides.items() if odd]


def write_submission(rows: Iterable[tuple[str, str]], path: Path) -> int:
    """Write (file name, emotion) pairs below the header, in one step; return their number.

    Raises:
        OSError: It cannot be written; an earlier submission is as it was.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    n_rows = 0
    for row in rows:
        writer.writerow(row)
        n_rows += 1
    with replace_file(path) as file:
        file.write(text.getvalue().encode())
    return n_rows


def submit(checkpoint: Checkpoint, model: Network, cfg: Config, device: torch.device) -> int:
    """Label the test folder and write the submission.

    Raises:
        UserError: A clip cannot be read and no fill is given; an earlier submission is as it was.
    """
    if cfg.demo != checkpoint.config.demo:
        known, asked = ("the demo", "your") if checkpoint.config.demo else ("your", "the demo")
        raise UserError(
            f"{cfg.checkpoint} was trained on {known} corpus, not on {asked} corpus: "
            "set --demo to match, or name another --checkpoint"
        )
    if cfg.demo:
        make_demo(cfg.data_root)
    target = Path(cfg.submission)
    if target.exists() and not target.is_file():  # to replace a device would take it from the whole system
        raise UserError(f"submission = {cfg.submission!r}: must be a file")
    models = (file for file in (Path(cfg.checkpoint), PRETRAINED) if file.exists())
    if target.exists() and any(target.samefile(file) for file in models):
        raise UserError(f"submission = {cfg.submission!r}: is a checkpoint, must be another file")
    labels = checkpoint.labels
    if cfg.fill and cfg.fill not in labels:
        raise UserError(f"fill = {cfg.fill!r}: must be one of {', '.join(labels)}")
    paths = find_test_clips(cfg.test_root)
    names = [path.name for path in paths]
    beside = [cfg.test_root.parent] if cfg.test_dir else [cfg.data_root, cfg.data_root.parent]
    samples = (folder / "sample_submission.csv" for folder in beside)
    sample = next((sample for sample in samples if sample.is_file()), None)
    differences = compare_with_sample(sample, names, labels) if sample else []
    for difference in differences:
        say(f"warning: {sample}: {difference}")

    rows: list[tuple[str, str]] = []
    failures: list[AudioError] = []
    warnings: list[tuple[Path, str]] = []
    for path, result, warning in tqdm(
        predict(model, paths, cfg=cfg, device=device), "clips", len(paths), disable=None
    ):
        if warning:
            warnings.append((path, warning))
        if isinstance(result, AudioError):
            failures.append(result)
            rows.append((path.name, cfg.fill))
        else:
            rows.append((path.name, labels[int(result.argmax())]))
    report_warnings(warnings)
    report_failures(failures)
    if failures and not cfg.fill:
        raise UserError(
            f"{cfg.submission} not written: {len(failures)} of {len(paths)} clips have no label; "
            f"mend them, or pass --fill LABEL",
            code=1,
        )
    n_rows = write_submission(rows, Path(cfg.submission))
    if failures:
        say(f"warning: {len(failures)} of {n_rows} rows are not predictions but filled with {cfg.fill}")
    verdict = f"; ids not as in {sample}" if differences else f", ids as in {sample}" if sample else ""
    print(printable(f"{n_rows} rows in {cfg.submission}{verdict}"))
    return 1 if differences else 0


def label_paths(
    arguments: Sequence[str], checkpoint: Checkpoint, model: Network, cfg: Config, device: torch.device
) -> int:
    """Print a CSV row with probabilities for each file; return 1 if one could not be read, else 0."""
    paths = expand_paths(arguments)
    # A terminal must not be steered; a file or a pipe gets names to the byte, whatever the locale.
    shown = printable if sys.stdout.isatty() else str
    if not sys.stdout.isatty() and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    labels = list(map(shown, checkpoint.labels))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*HEADER, "confidence", *labels])
    failures: list[AudioError] = []
    warnings: list[tuple[Path, str]] = []
    for path, result, warning in predict(model, paths, cfg=cfg, device=device):
        if warning:
            warnings.append((path, warning))
        if isinstance(result, AudioError):
            failures.append(result)
            continue
        probabilities = [f"{probability:.4f}" for probability in result]
        best = int(result.argmax())
        writer.writerow([shown(str(path)), labels[best], probabilities[best], *probabilities])
    report_warnings(warnings)
    report_failures(failures)
    return 1 if failures else 0


PRETRAINED = Path(__file__).with_name("assets") / "pretrained.pth"  # of the default recipe, see README.md


def find_checkpoint(runtime: Config) -> Path:
    """The user's own model; where there is none yet, and none is asked for by name, the one that we bring."""
    own = Path(runtime.checkpoint)
    if own.exists() or runtime.demo or runtime.checkpoint != Config().checkpoint or not PRETRAINED.is_file():
        return own
    say(f"note: no {own} yet: taking the model that comes with the project")
    return PRETRAINED


def label(runtime: Config, paths: Sequence[str]) -> int:
    """Do what main was asked for; return its exit code.

    Raises:
        UserError: Checkpoint, settings or clips do not allow it.
    """
    path = find_checkpoint(runtime)
    checkpoint = load_checkpoint(path)
    cfg = checkpoint.config.with_runtime(runtime)
    if checkpoint.epoch == 0:
        raise UserError(f"{path} holds an untrained network: its run ended before the first epoch")
    say(f"model: {path}, as it was after epoch {checkpoint.epoch}")
    if differences := runtime.differences(cfg, ignore=RESUMABLE_FIELDS | SPLIT_FIELDS):
        say(f"note: settings are those of the checkpoint, not of config.py ({'; '.join(differences)})")
    if checkpoint.config.demo:
        say("note: this model knows only the synthetic demo corpus: on real speech it guesses")
    device = resolve_device(cfg.device)
    model = restore_model(checkpoint, device)
    if paths:
        return label_paths(paths, checkpoint, model, cfg, device)
    return submit(checkpoint, model, cfg, device)


# ---- the script -----------------------------------------------------------------------------------------


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Label a test folder for a submission, or the files named."""
    runtime, paths = parse_runtime_config(argv, description=__doc__)
    # The cores belong to the workers; and for one clip, starting more threads takes longer than the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return label(runtime, paths)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    raise SystemExit(main())
