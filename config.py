"""Every setting of the pipeline, and how a script begins and ends.

Edit a default below, or give it as a flag: `python train.py --learning_rate 5e-4`. Settings that shape the
features or the network are stored in the checkpoint, and inference.py takes them from there.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run; immutable, checked when made.

    Raises:
        UserError: A value has the wrong type or breaks a rule; the message names field, value and rule.
    """

    # ---- places -----------------------------------------------------------------------------------------
    data_dir: str = "data/dataset"  # a folder of clips per emotion, or corpora as they come; may be read-only
    test_dir: str = ""  # unlabelled clips for the submission; empty: the folder Test in data_dir
    cache_dir: str = "cache"  # extracted features; safe to delete
    run_dir: str = "run"  # history, metrics, figures, and what --resume continues from
    checkpoint: str = "best_emotion_model.pth"  # the trained model; of train.py --run_dir A, in A
    submission: str = "submission.csv"  # what inference.py writes for the test clips
    manifest: str = ""  # CSV with filename and emotion or speaker; empty: manifest.csv in data_dir
    labels_from: Literal["auto", "folders", "manifest"] = "auto"  # auto: folders, unless file names disagree
    extra_labels: Literal["drop", "keep"] = "drop"  # calm and boredom, where labels come from file names

    # ---- audio: a change extracts the features anew -----------------------------------------------------
    sample_rate: int = 22050  # Hz; every clip is resampled to it
    duration: float = 3.0  # seconds in a window; a longer clip has several, a shorter one is zero-padded
    max_windows: int = 4  # windows of a clip used in training; 1: its first 3 seconds alone
    n_mfcc: int = 40  # cepstral coefficients; delta and delta-delta make 120 rows of features
    n_fft: int = 2048  # samples per frame, 93 ms at 22,050 Hz
    hop_length: int = 512  # samples from frame to frame, 23 ms at 22,050 Hz
    n_mels: int = 128  # mel bands under the cepstrum

    # ---- network ----------------------------------------------------------------------------------------
    recordings: Literal["same", "any"] = "same"  # to label: like the training clips, or of any quality
    ensemble: int = 8  # networks, each trained from its own seed; their probabilities are averaged
    cmn: Literal["none", "all", "alternate"] = "alternate"  # cepstral mean normalisation, in which networks
    conv_channels: int = 128  # channels of the first convolution; each further block has half as many more
    conv_blocks: int = 3  # convolution blocks; each halves the number of frames
    conv_kernel: int = 5  # frames under a convolution kernel
    gru_hidden: int = 112  # units per direction
    gru_layers: int = 2  # stacked bidirectional layers
    dropout: float = 0.35  # probability, between the GRU layers and in the head
    conv_dropout: float = 0.1  # probability, after each convolution block

    # ---- data split: clips with the same audio stay together --------------------------------------------
    split: Literal["random", "speaker"] = "random"  # by clip, or no speaker in two parts
    val_fraction: float = 0.1  # chooses the epoch, steers learning rate and early stopping
    test_fraction: float = 0.1  # scored once, after training; 0: train on these clips too
    seed: int = 0  # of split, initial weights, shuffling, augmentation and dropout

    # ---- training ---------------------------------------------------------------------------------------
    batch_size: int = 64  # clips per step
    epochs: int = 40  # at most; early stopping may end training sooner
    min_steps: int = 25  # steps per epoch at least: small data sets are repeated within an epoch
    learning_rate: float = 3e-3  # of AdamW
    warmup: int = 2  # epochs in which the learning rate rises linearly to its full value
    weight_decay: float = 2e-2  # L2 (decoupled, as AdamW has it), on weight matrices alone
    label_smoothing: float = 0.05  # part of each target that is spread over all classes
    patience: int = 10  # early stopping: epochs without a better accuracy or a fall of the learning rate
    lr_factor: float = 0.5  # ReduceLROnPlateau: the learning rate is multiplied by this
    lr_patience: int = 2  # ReduceLROnPlateau: epochs without a better validation accuracy before that
    ema_decay: float = 0.999  # per step, of the averaged weights that are evaluated and saved; 0: no average
    vtlp: float = 0.08  # augmentation: formants and pitch move by up to this fraction
    tempo: float = 0.12  # augmentation: tempo changes by up to this fraction
    shift: float = 0.14  # augmentation: seconds by which a window starts earlier or later at most

    # ---- machine ----------------------------------------------------------------------------------------
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, cuda:N or mps
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of training; auto: mixed where that is fast
    num_workers: int = -1  # processes that read clips; -1: one per core, 0: none but this one

    def __post_init__(self) -> None:
        """Check every value, so that a bad edit or flag stops here and not an hour into a run."""
        for field in dataclasses.fields(self):
            value, choices, kind = getattr(self, field.name), get_args(field.type), _kind(field)
            if type(value) is not kind and not (kind is float and type(value) is int):
                self._refuse(field.name, f"must be {_KINDS[kind]}")
            if choices and value not in choices:
                self._refuse(field.name, f"must be {', '.join(choices)}")
        for names, (is_valid, rule) in _RULES.items():
            for name in names.split():
                if not is_valid(getattr(self, name)):
                    self._refuse(name, f"must be {rule}")
        if self.n_mfcc > self.n_mels:
            self._refuse("n_mfcc", f"must be at most n_mels ({self.n_mels})")
        if not 9 <= self.n_frames <= 4096:  # delta spans 9 frames, and is a matrix of n_frames ** 2
            self._refuse("duration", f"gives {self.n_frames} frames of hop_length, must be 9 to 4,096")
        if self.val_fraction + self.test_fraction > 0.9:
            self._refuse("test_fraction", "with val_fraction must be at most 0.9")

    def _refuse(self, name: str, rule: str) -> NoReturn:
        raise UserError(f"{name} = {getattr(self, name)!r}: {rule}")

    @property
    def n_samples(self) -> int:
        """Samples in a window: 66,150."""
        return round(self.duration * self.sample_rate)

    @property
    def n_frames(self) -> int:
        """Frames in a window: 130; frames are centred, hence the extra one."""
        return 1 + self.n_samples // self.hop_length

    @property
    def n_features(self) -> int:
        """Rows of features: MFCC, delta and delta-delta, 120."""
        return 3 * self.n_mfcc

    @property
    def test_root(self) -> Path:
        """Folder of the clips to label for a submission."""
        return Path(self.test_dir) if self.test_dir else Path(self.data_dir, "Test")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Rebuild what dataclasses.asdict gave; a newer field has its default, unless it shapes the model.

        Raises:
            UserError: A field is missing, unknown or bad.
        """
        if odd := (MODEL_FIELDS - set(values)) | (set(values) - set(cls.__dataclass_fields__)):
            raise UserError(f"settings of another version: missing or unknown {', '.join(sorted(odd))}")
        return cls(**values)


# Where and on what to run: these are never part of a trained model.
RUNTIME_FIELDS = frozenset(
    "data_dir test_dir cache_dir run_dir checkpoint submission manifest batch_size device num_workers".split()
)
# What shapes features and network: inference takes it from the checkpoint, whatever config.py says.
MODEL_FIELDS = frozenset(
    "sample_rate duration n_mfcc n_fft hop_length n_mels "
    "ensemble recordings cmn conv_channels conv_blocks conv_kernel gru_hidden gru_layers".split()
)
# Where a demo reads and writes: beside everything real, so that it can neither replace nor shadow it.
DEMO = {
    "data_dir": "data/demo",
    "test_dir": "data/demo/Test",
    "run_dir": "run_demo",
    "cache_dir": "run_demo/cache",
    "checkpoint": "run_demo/best_emotion_model.pth",
    "submission": "run_demo/submission.csv",
}

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text"}
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data_dir cache_dir run_dir checkpoint submission": (lambda v: bool(v.strip()), "not empty"),
    "max_windows n_mfcc n_fft hop_length n_mels ensemble conv_channels conv_blocks conv_kernel gru_layers "
    "epochs min_steps patience": (lambda v: v >= 1, "at least 1"),
    "batch_size gru_hidden": (lambda v: v >= 2, "at least 2"),
    "sample_rate": (lambda v: 1000 <= v <= 768_000, "1,000 to 768,000"),
    "seed": (lambda v: 0 <= v < 2**31, "0 to 2,147,483,647"),
    "warmup lr_patience": (lambda v: v >= 0, "at least 0"),
    "num_workers": (lambda v: v >= -1, "at least -1"),
    "dropout conv_dropout test_fraction label_smoothing ema_decay vtlp tempo": (
        lambda v: 0 <= v < 1,
        "at least 0 and below 1",
    ),
    "val_fraction lr_factor": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "learning_rate duration": (lambda v: 0 < v < float("inf"), "above 0"),
    "weight_decay shift": (lambda v: 0 <= v < float("inf"), "at least 0"),
    "device": (
        lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", v) is not None,
        "auto, cpu, cuda, cuda:N or mps",
    ),
}


def _kind(field: "dataclasses.Field[Any]") -> Any:  # noqa: ANN401 - a type
    """The type of a setting's values."""
    return str if get_args(field.type) else field.type


class UserError(Exception):
    """An expected fault: shown as one `error:` line, without a traceback."""

    def __init__(self, message: str, *, code: int = 2) -> None:
        """Keep message (value, rule, remedy) and exit code: 2 could not start, 1 failed on the way."""
        super().__init__(message)
        self.code = code


# ---- how a script begins ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


def make_parser(description: str | None, fields: Collection[str] | None = None) -> argparse.ArgumentParser:
    """A parser with --demo and a flag for each setting, or each of those named; scripts add their own."""
    parser = _Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", action="store_true", help="use a small synthetic corpus, in data/demo")
    # The help texts are the comments beside the settings.
    comments = dict(re.findall(r"^    (\w+): .*? = .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    for field in dataclasses.fields(Config):
        if fields is None or field.name in fields:
            kind = _kind(field)
            shown = ", ".join(get_args(field.type)) or kind.__name__.upper()
            text = f"{comments.get(field.name, '')} [{field.default!r}]".replace("%", "%%")
            parser.add_argument(
                f"--{field.name}", default=argparse.SUPPRESS, type=kind, metavar=shown, help=text
            )
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """Config with the flags of the command line laid over it, and the script's own flags.

    Raises:
        SystemExit: 2 after one line on stderr if a flag or value is bad, 0 after --help.
    """
    flags = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word[:2] == "--"]
    known, unknown = parser.parse_known_intermixed_args(argv)
    if twice := [flag for flag in flags if flags.count(flag) > 1]:
        parser.error(f"{twice[0]} is given twice")
    if unknown:
        parser.error(_explain(unknown[0], parser))
    names = [field.name for field in dataclasses.fields(Config)]
    values = {name: value for name, value in vars(known).items() if name in names}
    if known.demo:
        if places := sorted(DEMO.keys() & values.keys()):
            parser.error(f"--demo has its own folders: leave out --{places[0]}")
        values = {"ensemble": 2, "epochs": 12, "min_steps": 1} | values | DEMO  # quick
    home = Path(values.get("run_dir", Config.run_dir))
    if home != Path(Config.run_dir):  # a run of its own folder keeps its model there
        values = {"checkpoint": str(home / Config.checkpoint)} | values
    try:
        return Config(**values), known
    except UserError as error:
        parser.error(str(error))


def _explain(argument: str, parser: argparse.ArgumentParser) -> str:
    """Say what is wrong with an argument that the parser does not know, with the likeliest right one."""
    name = argument.partition("=")[0].removeprefix("--")
    flags = [option.removeprefix("--") for option in parser._option_string_actions]
    if name in Config.__dataclass_fields__:
        why = "" if name in RUNTIME_FIELDS else ": what it sets is settled when train.py runs"
        return f"--{name} has no effect on this script{why}"
    if Path(argument).exists():  # its name begins with a dash
        return f"unknown argument {argument}: if it is a file, name it ./{argument}"
    initials = {"".join(word[0] for word in flag.split("_")): flag for flag in flags if "_" in flag}
    hint = next(iter([*filter(None, [initials.get(name)]), *difflib.get_close_matches(name, flags)]), "")
    return f"unknown argument {argument}" + (f": did you mean --{hint}?" if hint else "")


# ---- messages, and how a script ends ---------------------------------------------------------------------


def printable(text: str) -> str:
    """Escape control characters and undecodable bytes: a file name must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def note(message: str) -> None:
    """Print one line to stderr, since stdout is for results; under torchrun the first process speaks."""
    if os.environ.get("TORCHELASTIC_RUN_ID") is None or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # whoever reads the messages may have left
            print(printable(message), file=sys.stderr, flush=True)


def _interrupt(signum: int, _frame: object) -> NoReturn:
    started = time.monotonic()

    def again(signum: int, _frame: object) -> None:
        if time.monotonic() - started > 1:  # sooner it is the same one: some tools signal a group twice
            os._exit(128 + signum)

    signal.signal(signal.SIGINT, again)
    signal.signal(signal.SIGTERM, again)
    raise KeyboardInterrupt(128 + signum)  # SIGTERM ends a run the way Ctrl-C does


def run(main: Callable[..., int], *args: object) -> int:
    """Call a script's main; expected faults become one `error:` line.

    Returns:
        The exit code: 0 done, 1 failed on the way, 2 could not start, 130 Ctrl-C, 143 SIGTERM.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # a background job of a shell ignores SIGINT
            signal.signal(signum, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale
    try:
        code = main(*args)
        sys.stdout.flush()
    except UserError as error:
        note(f"error: {error}")
        return error.code
    except KeyboardInterrupt as error:
        note("interrupted")
        return int(error.args[0]) if error.args else 130
    except BrokenPipeError:  # the reader has left, as `head` does: nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        note(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        note("error: out of memory: lower --num_workers, or in training --batch_size")
        return 1
    return code
