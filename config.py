"""Every knob of the pipeline, and the command line made from them.

Edit a default below, or give it as a flag: `python train.py --learning_rate 5e-4`. inference.py takes only
the flags that say where and on what to run: the rest it finds in the checkpoint.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import os
import re
import reprlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def _any_default(cls: type[T]) -> type[T]:
    """Let a list be a default: dataclass would refuse it with a traceback, __post_init__ does in a line."""
    for name in cls.__annotations__:
        value: Any = vars(cls).get(name)
        if type(value).__hash__ is None:
            setattr(cls, name, dataclasses.field(default_factory=value.copy))
    return cls


@dataclass(frozen=True, kw_only=True)
@_any_default
class Config:
    """All settings of one run; immutable, checked when made.

    Raises:
        UserError: A value has the wrong type or is out of range; the message names field, value and rule.
    """

    # ---- where things are -------------------------------------------------------------------------------
    data_dir: str = "data/dataset"  # one folder of clips per emotion; may be read-only
    test_dir: str = ""  # clips to label for the submission; empty: the folder Test in data_dir
    cache_dir: str = "cache"  # extracted features; safe to delete, made again when missing
    checkpoint: str = "best_emotion_model.pth"  # the model with the best validation accuracy
    submission: str = "submission.csv"  # what inference.py writes for the test clips
    run_dir: str = "run"  # history, metrics, figures and the checkpoint that --resume continues from
    demo: bool = False  # use a small synthetic corpus, made on the spot, in place of data_dir

    # ---- audio: changing these re-extracts the features -------------------------------------------------
    sample_rate: int = 22050  # Hz; every clip is resampled to it
    duration: float = 3.0  # seconds; longer clips are cut, shorter ones zero-padded at the end
    n_mfcc: int = 40  # cepstral coefficients per frame; delta and delta-delta triple them
    n_fft: int = 2048  # samples per analysis window, 93 ms at 22,050 Hz
    hop_length: int = 512  # samples between windows, 23 ms at 22,050 Hz
    n_mels: int = 128  # mel bands under the cepstrum

    # ---- network ----------------------------------------------------------------------------------------
    conv_channels: int = 128  # channels of the first convolution; each further block has half as many more
    conv_blocks: int = 3  # convolution blocks; each halves the number of frames
    conv_kernel: int = 5  # frames that a convolution sees
    gru_hidden: int = 112  # units per direction
    gru_layers: int = 2  # stacked bidirectional layers
    dropout: float = 0.35  # probability, between the GRU layers and in the head
    conv_dropout: float = 0.1  # probability, after each convolution block
    ensemble: int = 3  # such networks, trained side by side; their probabilities are averaged

    # ---- data split: identical audio is kept together ---------------------------------------------------
    split: str = "random"  # random (by clip, each class alike) or speaker (no speaker on both sides)
    manifest: str = ""  # CSV with columns filename and speaker, for data whose file names do not tell
    folds: int = 0  # cross-validation: train this often, each time with another part held out; 0: train once
    val_fraction: float = 0.1  # selects the checkpoint, steers learning rate and stopping
    holdout_fraction: float = 0.1  # scored once, after training; 0: train on these clips too
    seed: int = 0  # of split, initial weights, shuffling, augmentation and dropout

    # ---- training ---------------------------------------------------------------------------------------
    batch_size: int = 64  # clips per step
    epochs: int = 24  # at most; early stopping may end sooner
    learning_rate: float = 3e-3  # of AdamW; its peak for onecycle
    weight_decay: float = 2e-2  # L2: weights shrink by this share of the learning rate at every step
    label_smoothing: float = 0.05  # share of the target spread over all classes
    warp: float = 0.08  # augmentation: formants and pitch are raised or lowered by up to this share
    stretch: float = 0.12  # augmentation: the tempo changes by up to this share
    shift: float = 0.14  # augmentation: seconds, the clip starts earlier or later by up to this
    ema_decay: float = 0.999  # the network that is judged and saved is a running mean over steps; 0: the last
    patience: int = 10  # epochs without a better validation accuracy before training stops
    schedule: str = "onecycle"  # onecycle: the rate rises, then falls to 0; plateau: it falls when stuck
    lr_factor: float = 0.5  # plateau: the learning rate is multiplied by this
    lr_patience: int = 3  # plateau: epochs without a better validation accuracy that the rate survives
    resume: bool = False  # go on with the interrupted run in run_dir

    # ---- machine ----------------------------------------------------------------------------------------
    precision: str = "auto"  # of training: bfloat16, float32, or auto: bfloat16 where that is fast
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, cuda:N or mps
    num_workers: int = -1  # processes that read and extract clips; -1: one per core, 0: none but this one
    fill: str = ""  # label for test clips that cannot be read; empty: their presence is an error

    def __post_init__(self) -> None:
        """Check every value, so that a bad edit or flag stops here and not an hour into a run."""
        fields = dataclasses.fields(self)
        names = {field.name for field in fields}
        plain = {name for name, value in vars(type(self)).items() if type(value) in _KINDS}
        for name in sorted(plain - names - {"__module__", "__doc__"}):
            raise UserError(f"config.py: {name} has no type, so it is no setting: write `{name}: type = ...`")
        for name in sorted((RESUMABLE_FIELDS | SPLIT_FIELDS | _BOUNDS.keys()) - names):
            raise UserError(f"config.py: {name} is missing: write `{name}: type = ...`")
        for field in fields:
            _check(self, field.name, field.type)
        _require(self, "hop_length", self.hop_length <= self.n_fft, f"at most n_fft ({self.n_fft})")
        _require(self, "n_mels", self.n_mels <= self.n_fft // 2 + 1, "at most n_fft / 2 + 1")
        _require(self, "n_mfcc", self.n_mfcc <= self.n_mels, f"at most n_mels ({self.n_mels})")
        frames = f"{MIN_FRAMES} to {MAX_FRAMES} frames of hop_length ({self.hop_length} samples)"
        _require(self, "duration", MIN_FRAMES <= self.n_frames <= MAX_FRAMES, frames)
        room = round(0.9 - self.val_fraction, 9)
        _require(
            self, "holdout_fraction", self.holdout_fraction <= room, f"at most 0.9 - val_fraction ({room:g})"
        )
        _require(self, "split", self.split in {"random", "speaker"}, "random or speaker")
        _require(self, "schedule", self.schedule in {"onecycle", "plateau"}, "onecycle or plateau")
        precisions = {"auto", "bfloat16", "float32"}
        _require(self, "precision", self.precision in precisions, "auto, bfloat16 or float32")
        _require(self, "folds", self.folds != 1, "0 or at least 2")
        named = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device) is not None
        _require(self, "device", named, "auto, cpu, cuda, cuda:N or mps")

    @property
    def n_samples(self) -> int:
        """Samples in a standardised clip: 66,150."""
        return round(self.duration * self.sample_rate)

    @property
    def n_frames(self) -> int:
        """Frames in a standardised clip: 130; windows are centred, hence the extra one."""
        return 1 + self.n_samples // self.hop_length

    @property
    def n_features(self) -> int:
        """Feature rows: MFCC, delta and delta-delta, 120."""
        return 3 * self.n_mfcc

    @property
    def data_root(self) -> Path:
        """Folder of the class folders: data_dir, or that of the demo corpus."""
        return Path("data", "demo") if self.demo else Path(self.data_dir)

    @property
    def test_root(self) -> Path:
        """Folder of the clips to label."""
        return Path(self.test_dir) if self.test_dir and not self.demo else self.data_root / "Test"

    def to_dict(self) -> dict[str, int | float | str | bool]:
        """All fields as plain types, in the order of their definition."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Rebuild what to_dict gave.

        Raises:
            UserError: A field is missing, unknown or bad.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if names != set(values):
            odd = ", ".join(sorted(map(str, names ^ set(values))))
            raise UserError(f"settings do not fit this version of config.py: missing or unknown {odd}")
        return cls(**values)

    def with_runtime(self, other: "Config") -> "Config":
        """Take the RUNTIME_FIELDS from another config: where to run, not what to compute."""
        return dataclasses.replace(self, **{name: getattr(other, name) for name in RUNTIME_FIELDS})

    def differences(self, other: "Config", *, ignore: Iterable[str] = ()) -> list[str]:
        """One `name: mine -> theirs` for each field that differs and is not ignored."""
        mine, theirs = self.to_dict(), other.to_dict()
        changed = [name for name in mine if mine[name] != theirs[name] and name not in set(ignore)]
        return [f"{name}: {mine[name]!r} -> {theirs[name]!r}" for name in changed]


MIN_FRAMES = 9  # the delta filter spans nine frames
MAX_FRAMES = 4096  # that filter is a matrix of frames by frames: 67 MB, and twice of it

# Where and on what to run. All others are baked into the checkpoint, so that a new field is safe by default.
RUNTIME_FIELDS = frozenset(
    "data_dir test_dir cache_dir checkpoint submission run_dir demo resume "
    "batch_size device num_workers fill".split()
)
# What a resumed run may change. Any other change would mean other data or another network.
RESUMABLE_FIELDS = RUNTIME_FIELDS | frozenset(
    "epochs learning_rate weight_decay label_smoothing dropout conv_dropout patience lr_factor lr_patience "
    "warp stretch shift ema_decay precision".split()
)
# Which clips train and which judge: they shape neither features nor network.
SPLIT_FIELDS = frozenset({"split", "manifest", "folds", "val_fraction", "holdout_fraction", "seed"})

_BOUNDS: dict[str, tuple[float, float]] = {  # inclusive
    "sample_rate": (1000, 768000),
    "duration": (0.05, 600),
    "n_mfcc": (1, 1024),
    "n_fft": (16, 65536),
    "hop_length": (1, 65536),
    "n_mels": (1, 4096),
    "conv_channels": (1, 4096),
    "conv_blocks": (1, 8),
    "conv_kernel": (1, 255),
    "gru_hidden": (2, 8192),
    "gru_layers": (1, 16),
    "dropout": (0, 0.95),
    "conv_dropout": (0, 0.95),
    "ensemble": (1, 100),
    "folds": (0, 100),
    "val_fraction": (0.001, 0.9),
    "holdout_fraction": (0, 0.9),
    "seed": (0, 2**32 - 1),
    "batch_size": (1, 65536),
    "epochs": (1, 1_000_000),
    "learning_rate": (1e-9, 10),
    "weight_decay": (0, 10),
    "label_smoothing": (0, 0.9),
    "warp": (0, 1),
    "stretch": (0, 1),
    "shift": (0, 600),
    "ema_decay": (0, 0.999999),
    "patience": (1, 1_000_000),
    "lr_factor": (0.001, 0.999),
    "lr_patience": (0, 1_000_000),
    "num_workers": (-1, 1024),
}
_MAY_BE_EMPTY = {"test_dir", "manifest", "fill"}
_KINDS: dict[object, str] = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


class UserError(Exception):
    """An expected fault, for the user to mend: shown as one `error:` line, without a traceback."""

    def __init__(self, message: str, *, code: int = 2) -> None:
        """Keep message (value, rule, remedy) and exit code: 2 could not start, 1 failed on the way."""
        super().__init__(message)
        self.code = code


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the run ends in good order, with exit code 130 or 143."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        """Derive the exit code the way shells do."""
        super().__init__()
        self.code = 128 + signum


_SHORT = reprlib.Repr()  # a config may come from a file made to fill the memory with its message
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def _require(cfg: Config, name: str, condition: bool, rule: str) -> None:
    if not condition:
        raise UserError(f"{name} = {_SHORT.repr(getattr(cfg, name))}: must be {rule}")


def _check(cfg: Config, name: str, kind: object) -> None:
    """Check the type and the bounds of one field."""
    value = getattr(cfg, name)
    _require(cfg, name, kind in list(_KINDS), "declared as int, float, str or bool")
    _require(cfg, name, type(value) is kind or (kind is float and type(value) is int), _KINDS[kind])
    if isinstance(value, str):
        _require(cfg, name, bool(value.strip()) or name in _MAY_BE_EMPTY, "not empty")
        _require(cfg, name, "\0" not in value, "free of NUL characters")
    elif name in _BOUNDS:
        low, high = _BOUNDS[name]
        _require(cfg, name, low <= value <= high, f"between {low} and {high}")  # NaN fails too


# ---- command line ---------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


def parse_config(argv: Sequence[str] | None = None, *, description: str | None = None) -> Config:
    """The defaults above with the flags of the command line laid over them.

    Raises:
        SystemExit: 2 after one line on stderr if a flag or value is bad, 0 after --help.
    """
    parser = _make_parser(Config.__dataclass_fields__, description)
    return _parse(parser, argv)[0]


def parse_runtime_config(
    argv: Sequence[str] | None = None, *, description: str | None = None
) -> tuple[Config, list[str]]:
    """The same for inference: flags for the RUNTIME_FIELDS alone, and any number of paths.

    Raises:
        SystemExit: As parse_config; also for a flag that would contradict the checkpoint.
    """
    parser = _make_parser(RUNTIME_FIELDS, description)
    parser.add_argument("paths", nargs="*", help="files, folders or patterns; none: the test folder")
    return _parse(parser, argv, baked=Config.__dataclass_fields__.keys() - RUNTIME_FIELDS)


def _make_parser(names: Collection[str], description: str | None) -> _Parser:
    """Make a parser with one flag per field; the help texts are the comments in Config."""
    parser = _Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    try:
        Config()
    except (UserError, TypeError, ValueError, AttributeError) as error:  # a bad edit, which no flag may hide
        parser.error(f"config.py: {str(error).removeprefix('config.py: ')}")
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    for field in dataclasses.fields(Config):
        if field.name not in names:
            continue
        kind: Any = field.type
        text = f"{comments.get(field.name, '')} [{field.default!r}]".replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": functools.partial(_convert, kind), "metavar": kind.__name__.upper()}
        parser.add_argument(f"--{field.name}", **options)
    return parser


def _parse(
    parser: _Parser, argv: Sequence[str] | None, *, baked: Collection[str] = ()
) -> tuple[Config, list[str]]:
    values, unknown = parser.parse_known_args(argv)
    paths: list[str] | None = vars(values).pop("paths", None)
    for argument in unknown:
        if argument.removeprefix("--").partition("=")[0] in baked:
            parser.error(f"{argument} is part of the checkpoint and cannot be changed after training")
        if argument.startswith("-") or paths is None:
            parser.error(f"unknown argument {argument}")
        paths.append(argument)  # argparse takes only the first row of them: `a.wav --device cpu b.wav`
    try:
        return Config(**vars(values)), paths or []
    except UserError as error:
        parser.error(str(error))


def _convert(kind: Callable[[str], int | float | str], text: str) -> int | float | str:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {_KINDS[kind]}") from None


def printable(text: str) -> str:
    """Escape control characters and undecodable bytes: a file name must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fits_csv(name: str) -> bool:
    """Whether a name comes back unchanged from a CSV in UTF-8: one with a carriage return does not."""
    return "\r" not in name and not any("\ud800" <= character <= "\udfff" for character in name)


def say(message: str) -> None:
    """Print one line to stderr; stdout is for results. Of the processes of torchrun the first one speaks."""
    # Some clusters set RANK for all that they start; and whoever reads the messages may leave before the end.
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(printable(message), file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Print a result of a run that goes on when nobody can have it: its model is worth more."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # of which to be quiet is the custom
            say(f"warning: no output from here on: {error.strerror}")
        _drop_output()


def _describe(error: OSError) -> str:
    """Path and reason; of a disk that takes no more, also how much it could."""
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    if error.filename and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}:
        path = Path(os.fsdecode(error.filename)).absolute()
        folder = next(parent for parent in path.parents if parent.is_dir())
        text += f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there)"
    return text


@contextlib.contextmanager
def name_memory() -> Iterator[None]:
    """Give the many ways in which NumPy, PyTorch and CUDA run out of memory one message.

    Raises:
        UserError: The memory is not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = re.search(r"out of memory|allocate memory|not enough memory|ALLOC_FAILED", str(error))
        if not known and not isinstance(error, MemoryError):
            raise
        amount = re.search(r"(?:[Tt]ried|Unable) to allocate ([\d.]+ \w+)", str(error))
        wanted = f", {amount[1]} more were wanted" if amount else ""
        raise UserError(f"out of memory{wanted}: lower batch_size or num_workers", code=1) from None


def die_quietly() -> None:
    """Let Ctrl-C end the process without a traceback while it has nothing to save; `command` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _send(signum: int) -> None:
    """Signal this process so that its main thread wakes up from whatever it waits for."""
    if os.name == "posix":
        os.kill(os.getpid(), signum)
    else:  # where os.kill would end the process
        signal.raise_signal(signum)


def _mend_output() -> None:
    """Have streams that take any text: none may be closed, and none refuse a letter after hours of work."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - open until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Empty the buffer of stdout, into nowhere if it cannot go out: at exit Python would complain of it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a script's main: expected faults become one `error:` line, and signals an orderly end.

    The first Ctrl-C or SIGTERM raises Interrupted; a second one kills at once.
    """

    def stop(signum: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signum, signal.SIG_DFL)
        raise Interrupted(signum)

    def run(argv: Sequence[str] | None) -> int:
        # A background job of a shell has SIGINT ignored, and must keep it so.
        signals = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.getsignal(s) for s in signals}
        hook = sys.unraisablehook

        def again(lost: "sys.UnraisableHookArgs") -> None:
            # In a finalizer or around a fork Python prints an exception and goes on, as if nobody had asked.
            if isinstance(lost.exc_value, Interrupted):
                signum = lost.exc_value.code - 128
                signal.signal(signum, stop)
                threading.Timer(0.01, _send, [signum]).start()
            else:
                hook(lost)

        try:
            sys.unraisablehook = again
            for signum in signals:
                signal.signal(signum, stop)
            with name_memory():
                code = main(argv)
            sys.stdout.flush()  # here a closed pipe or a full disk can still be told; at exit it cannot
            return code
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            sys.unraisablehook = hook
            _drop_output()

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:  # around all of run: a signal may come at its first and at its last line
            _mend_output()
            return run(argv)
        except UserError as error:
            say(f"error: {error}")
            return error.code
        except Interrupted as stopped:
            say("interrupted")
            return stopped.code
        except BrokenPipeError:  # the reader of our output has left, as `head` does
            return 0
        except OSError as error:
            say(f"error: {_describe(error)}")
            return 1

    return wrapped
