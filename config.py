"""Every setting of the pipeline; how a script begins, speaks, writes files and ends.

Edit a default below, or give it as a flag: `python train.py --learning_rate 5e-4`. Settings that shape the
features or the network are stored in the checkpoint, and inference.py takes them from there.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import glob
import inspect
import io
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn, TextIO, get_args, get_origin
from urllib.parse import quote

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---- kinds of settings -----------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What the values of a setting have to be."""

    is_valid: Callable[[Any], bool]
    text: str  # follows "must be"


Text = Annotated[str, Rule(lambda v: bool(v.strip()), "not empty")]
Device = Annotated[
    str, Rule(lambda v: bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", v)), "auto, cpu, cuda, cuda:N or mps")
]
AtLeast0 = Annotated[int, Rule(lambda v: v >= 0, "at least 0")]
Count = Annotated[int, Rule(lambda v: v >= 1, "at least 1")]
AtLeast2 = Annotated[int, Rule(lambda v: v >= 2, "at least 2")]
Hertz = Annotated[int, Rule(lambda v: 1000 <= v <= 768_000, "1,000 to 768,000")]
Seed = Annotated[int, Rule(lambda v: 0 <= v < 2**31, "0 to 2,147,483,647")]
OwnSeed = Annotated[int, Rule(lambda v: -1 <= v < 2**31, "-1 to 2,147,483,647")]
Workers = Annotated[int, Rule(lambda v: v >= -1, "at least -1")]
Positive = Annotated[float, Rule(lambda v: 0 < v < float("inf"), "above 0")]
NotNegative = Annotated[float, Rule(lambda v: 0 <= v < float("inf"), "at least 0")]
Below1 = Annotated[float, Rule(lambda v: 0 <= v < 1, "at least 0 and below 1")]
Between0And1 = Annotated[float, Rule(lambda v: 0 < v < 1, "above 0 and below 1")]
Precision = Literal["auto", "float32", "bfloat16"]

# ---- settings --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run; immutable, checked when made.

    Raises:
        UserError: A value has the wrong type or breaks a rule; the message names field, value and rule.
    """

    # ---- places -----------------------------------------------------------------------------------------
    data_dir: Text = "data/dataset"  # a folder of clips per emotion, or corpora as they are downloaded
    test_dir: str = ""  # unlabelled clips for the submission; empty: the folder Test in data_dir
    cache_dir: Text = "cache"  # extracted features; safe to delete
    run_dir: Text = "run"  # history, metrics, figures, and what --resume continues from
    checkpoint: Text = "best_emotion_model.pth"  # the trained model; of train.py --run_dir A, in A
    submission: Text = "submission.csv"  # what inference.py writes for the test clips
    manifest: str = ""  # CSV with filename and emotion, speaker or part; empty: manifest.csv in data_dir
    labels_from: Literal["auto", "folders", "manifest"] = "auto"  # auto: folders, unless file names disagree
    extra_labels: Literal["drop", "keep"] = "drop"  # calm and boredom, where labels come from file names

    # ---- audio: a change extracts the features anew -----------------------------------------------------
    sample_rate: Hertz = 22050  # Hz; every clip is resampled to it
    duration: Positive = 3.0  # seconds in a window; a longer clip has several, a shorter one is zero-padded
    max_windows: Count = 4  # windows of a clip used in training; 1: its first 3 seconds alone
    n_mfcc: Count = 40  # cepstral coefficients; delta and delta-delta make 120 rows of features
    n_fft: Count = 2048  # samples per frame, 93 ms at 22,050 Hz
    hop_length: Count = 512  # samples from frame to frame, 23 ms at 22,050 Hz
    n_mels: Count = 128  # mel bands under the cepstrum

    # ---- network ----------------------------------------------------------------------------------------
    recordings: Literal["same", "any"] = "same"  # to label: like the training clips, or of any quality
    ensemble: Count = 8  # networks, each trained from its own seed; their probabilities are averaged
    cmn: Literal["none", "all", "alternate"] = "alternate"  # cepstral mean normalisation, in which networks
    conv_channels: Count = 128  # of the first convolution; each further block has half as many more
    conv_blocks: Count = 3  # convolution blocks; each halves the number of frames
    conv_kernel: Count = 5  # frames under a convolution kernel
    gru_hidden: AtLeast2 = 112  # units per direction
    gru_layers: Count = 2  # stacked bidirectional layers
    dropout: Below1 = 0.35  # probability, between the GRU layers and in the head
    conv_dropout: Below1 = 0.1  # probability, after each convolution block

    # ---- data split: clips with the same audio stay together --------------------------------------------
    split: Literal["random", "speaker"] = "random"  # by clip, or no speaker in two parts
    val_fraction: Between0And1 = 0.1  # chooses the epoch, steers learning rate and early stopping
    test_fraction: Below1 = 0.1  # scored once, after training; 0: train on these clips too
    seed: Seed = 0  # of initial weights, shuffling, augmentation and dropout, and of the split
    split_seed: OwnSeed = -1  # of the split alone; -1: as seed

    # ---- training ---------------------------------------------------------------------------------------
    batch_size: AtLeast2 = 64  # clips per step
    epochs: Count = 40  # at most; early stopping may end training sooner
    max_minutes: NotNegative = 0.0  # from start to report; fewer networks and epochs, if need be; 0: no limit
    min_steps: Count = 25  # steps per epoch at least: small data sets are repeated within an epoch
    learning_rate: Positive = 3e-3  # of AdamW
    warmup: AtLeast0 = 2  # epochs in which the learning rate rises linearly to its full value
    weight_decay: NotNegative = 2e-2  # of AdamW, on weight matrices: decoupled from the gradient, unlike L2
    label_smoothing: Below1 = 0.05  # part of each target that is spread over all classes
    patience: Count = 10  # early stopping: epochs without a better accuracy or a fall of the learning rate
    lr_factor: Between0And1 = 0.5  # ReduceLROnPlateau: the learning rate is multiplied by this
    lr_patience: AtLeast0 = 2  # ReduceLROnPlateau: epochs without a better validation accuracy before that
    ema_decay: Below1 = 0.999  # per step, of the averaged weights that are evaluated and saved; 0: no average
    vtlp: Below1 = 0.08  # augmentation: formants and pitch move by up to this fraction
    tempo: Below1 = 0.12  # augmentation: tempo changes by up to this fraction
    shift: NotNegative = 0.14  # augmentation: seconds by which a window starts earlier or later at most

    # ---- machine ----------------------------------------------------------------------------------------
    device: Device = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, cuda:N or mps
    precision: Precision = "auto"  # of training; auto: the faster, by measurement
    num_workers: Workers = -1  # processes that read clips; -1: one per core, 0: none but this one

    def __post_init__(self) -> None:
        """Check every value, so that a bad edit or flag stops here and not an hour into a run."""
        for field in dataclasses.fields(self):
            value, (kind, rule) = getattr(self, field.name), kind_of(field)
            if type(value) is not kind and not (kind is float and type(value) is int):
                self._refuse(field.name, f"must be {_TYPE_NAMES[kind]}")
            if not rule.is_valid(value):
                self._refuse(field.name, f"must be {rule.text}")
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
        unknown = (MODEL_FIELDS - set(values)) | (set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise UserError(f"settings of another version: missing or unknown {', '.join(sorted(unknown))}")
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
    "checkpoint": "run_demo/best_emotion_model.pth",
    "submission": "run_demo/submission.csv",
}

_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text"}


def kind_of(field: "dataclasses.Field[Any]") -> tuple[Any, Rule]:
    """The type of a setting's values, and their rule, from its annotation."""
    arguments = get_args(field.type)
    if get_origin(field.type) is Annotated:
        return arguments[0], arguments[1]
    if arguments:  # of Literal
        return str, Rule(lambda value: value in arguments, ", ".join(arguments))
    return field.type, Rule(lambda _: True, "")


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
    source = ""
    with contextlib.suppress(OSError):  # a frozen program has none
        source = inspect.getsource(Config)
    # The help texts are the comments beside the settings.
    comments = dict(re.findall(r"^    (\w+): .*? = .*?  # (.*)$", source, re.MULTILINE))
    for field in dataclasses.fields(Config):
        if fields is None or field.name in fields:
            kind, rule = kind_of(field)
            shown = rule.text if get_origin(field.type) is Literal else kind.__name__.upper()
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
    if argv is None:
        _handle_signals(_quit)  # nothing is worth a traceback until run()
    flags = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word[:2] == "--"]
    known, unknown = parser.parse_known_intermixed_args(argv)
    if twice := [flag for flag in flags if flags.count(flag) > 1]:
        how = ": name several models in one, --checkpoint a.pth,b.pth" if twice[0] == "--checkpoint" else ""
        parser.error(f"{twice[0]} is given twice{how}")
    if unknown:
        parser.error(_explain(unknown[0], parser))
    given = {name: value for name, value in vars(known).items() if name in Config.__dataclass_fields__}
    quick, places = ({"ensemble": 2, "epochs": 12, "min_steps": 1}, DEMO) if known.demo else ({}, {})
    if fixed := sorted(places.keys() & given.keys()):
        parser.error(f"--demo has its own folders: leave out --{fixed[0]}")
    own = Path({"run_dir": Config.run_dir, **given, **places}["run_dir"], "run.json")
    begun: dict[str, Any] = {}
    if getattr(known, "config", ""):
        begun = _read_settings(Path(known.config), own.parent, parser)
    elif getattr(known, "resume", False) and own.exists():  # a run goes on as it began, where it lies now
        begun = _read_settings(own, own.parent, parser)
    values = quick | begun | given | places
    run_dir = Path(values.get("run_dir", Config.run_dir))
    if run_dir != Path(Config.run_dir):  # a run of its own folder keeps its model there
        values = {"checkpoint": str(run_dir / Config.checkpoint)} | values
    try:
        return Config(**values), known
    except UserError as error:
        parser.error(str(error))


def _read_settings(path: Path, run_dir: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings in a run.json; its checkpoint only where its run_dir is the folder of this run, too."""
    try:
        content = json.loads(path.read_text())
        settings = {name: content[name] for name in Config.__dataclass_fields__ if name in content}
        if Path(settings.pop("run_dir")) != run_dir:
            del settings["checkpoint"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        parser.error(f"{path} holds no settings of a run: {error}")
    return settings


def _explain(argument: str, parser: argparse.ArgumentParser) -> str:
    """Say what is wrong with an argument that the parser does not know, with the likeliest right one."""
    name = argument.partition("=")[0].removeprefix("--")
    flags = [option.removeprefix("--") for option in parser._option_string_actions]
    if name in Config.__dataclass_fields__:
        why = "" if name in RUNTIME_FIELDS else ": what it sets is settled when train.py runs"
        return f"--{name} has no effect on this script{why}"
    if os.path.lexists(argument):
        how = f"a file is named ./{argument}" if argument[0] == "-" else "clips are named with --data_dir"
        return f"unknown argument {argument}: {how}"
    initials = {"".join(word[0] for word in flag.split("_")): flag for flag in flags if "_" in flag}
    hint = next(iter([*filter(None, [initials.get(name)]), *difflib.get_close_matches(name, flags)]), "")
    return f"unknown argument {argument}" + (f": did you mean --{hint}?" if hint else "")


# ---- messages --------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Escape control characters and undecodable bytes: a file name must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def note(message: str) -> None:
    """Print one line to stderr, since stdout is for results; under torchrun the first process speaks."""
    if os.environ.get("TORCHELASTIC_RUN_ID") is None or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # whoever reads the messages may have left
            print(printable(message), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print results to stdout, and go on when nobody reads it any more: the model is worth more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - open until the end


# ---- files -----------------------------------------------------------------------------------------------


def save_file(path: Path, content: bytes) -> None:
    """Write a file in one step: whatever happens, the old or the new one is there, never half of one.

    Raises:
        OSError: It cannot be written, or is no regular file; the old file is as it was.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():  # /dev/null would become a file
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(glob.escape(f".{path.name}.") + "*.tmp"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 60:
                stale.unlink()
    # In the same folder, or it could not be moved in one step.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def save_view(path: Path, make: Callable[[], bytes]) -> bool:
    """Write what is only to look at, and say whether that went well.

    Whatever goes wrong is a warning, since the model, or the rows, are worth more.
    """
    try:
        save_file(path, make())
    except Exception as error:
        note(f"warning: {path} not made: {error}")
        return False
    return True


def fill_page(name: str, content: Mapping[str, Any]) -> bytes:
    """A page of assets/ with its data: as JSON without `<`, or a name could end the script that holds it."""
    template = Path(__file__).with_name("assets") / name
    return template.read_bytes().replace(b"{{data}}", json.dumps(content).replace("<", "\\u003c").encode())


def link_to(path: str | Path, folder: Path) -> str:
    """The address of a file in a page of a folder."""
    return quote(Path(os.path.relpath(path, folder)).as_posix(), errors="surrogateescape")


# ---- figures ---------------------------------------------------------------------------------------------

# Colours that the colour-blind can tell apart (Okabe & Ito 2008, Color Universal Design).
COLOURS = "#d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #0072b2 #f0e442 #000000".split()
STYLE: Any = {
    "font.size": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def save_figure(path: Path, draw: "Callable[[], Figure]") -> bool:
    """Draw a figure and write it as PNG, and as PDF beside it, as save_view does."""

    def make() -> bytes:
        import matplotlib as mpl  # takes a second; pyplot would want a display

        png, pdf = io.BytesIO(), io.BytesIO()
        with mpl.rc_context(STYLE):
            figure = draw()
            figure.savefig(png, format="png", dpi=150)
            figure.savefig(pdf, format="pdf", dpi=300)
        save_file(path.with_suffix(".pdf"), pdf.getvalue())
        return png.getvalue()

    return save_view(path, make)


def legible(names: Sequence[str]) -> list[str]:
    """Names as a figure can show them: in fonts that have their letters, else as numbers, with a note.

    To be called once by what save_figure draws, before it makes the figure, whose fonts this chooses.
    """
    import matplotlib as mpl

    names = [printable(name) for name in names]
    families, missing = find_fonts("".join(sorted(set("".join(names)))))
    mpl.rcParams["font.family"] = list(families)  # save_figure puts it back
    shown = [number_of(name) if missing & set(name) else name for name in names]
    return [name.replace("$", r"\$") for name in shown]  # or it would be a formula


@cache
def find_fonts(text: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families of fonts that have the characters of a text, and the characters that no installed one has.

    matplotlib looks for each character in one family after another; its own font comes first.
    """
    from matplotlib import font_manager

    families: list[str] = []
    missing = set(text)
    # Not its list of fonts, which does not know those installed since it was made.
    files = sorted(font_manager.findSystemFonts(), key=lambda f: ("Regular" not in f, "Sans" not in f, f))
    for file in [font_manager.findfont("DejaVu Sans"), *files]:
        with contextlib.suppress(OSError, RuntimeError):  # a font that matplotlib cannot use
            font = font_manager.get_font(file)
            found = {character for character in missing if font.get_char_index(ord(character))}
            if found or not families:
                font_manager.fontManager.addfont(file)
                families.append(font.family_name)
                missing -= found
        if not missing:
            break
    return tuple(families), frozenset(missing)


@cache
def number_of(name: str) -> str:
    """What the figures call a name that no font can show; the first time a note tells it."""
    number = f"#{number_of.cache_info().currsize + 1}"
    note(f"note: {name} is {number} in the figures: no installed font has its letters")
    return number


# ---- how a script ends -----------------------------------------------------------------------------------


_HANDLERS: dict[int, Any] = {}  # of signals, as they were before a script began


def _handle_signals(handler: Callable[[int, Any], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        before = _HANDLERS.setdefault(number, signal.getsignal(number))
        if before is not signal.SIG_IGN:  # a background job of a shell ignores SIGINT
            signal.signal(number, handler)


def _quit(signum: int, _frame: object) -> NoReturn:
    note("interrupted")
    os._exit(128 + signum)


def _interrupt(signum: int, _frame: object) -> NoReturn:
    started = time.monotonic()

    def again(signum: int, _frame: object) -> None:
        if time.monotonic() - started > 1:  # sooner it is the same one: some tools signal a group twice
            os._exit(128 + signum)

    signal.signal(signal.SIGINT, again)
    signal.signal(signal.SIGTERM, again)
    raise KeyboardInterrupt(128 + signum)  # SIGTERM ends a run the way Ctrl-C does


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off to the end of a block; processes started in it never get Ctrl-C."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which children inherit
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for number, handler in before.items():
            signal.signal(number, handler)
    for signum in came[:1]:
        signal.raise_signal(signum)


def run(main: Callable[..., int], *args: object) -> int:
    """Call a script's main; expected faults become one `error:` line.

    Returns:
        The exit code: 0 done, 1 failed on the way, 2 could not start, 130 Ctrl-C, 143 SIGTERM.
    """
    _handle_signals(_interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in any script and of any bytes, whatever the locale
        encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        return _end(main, *args)
    finally:  # a console session goes on, with its own
        while _HANDLERS:
            signal.signal(*_HANDLERS.popitem())


def _end(main: Callable[..., int], *args: object) -> int:
    try:
        code = main(*args)
        sys.stdout.flush()
    except UserError as error:
        note(f"error: {error}")
        return error.code
    except KeyboardInterrupt as error:
        note("interrupted")
        return int(error.args[0]) if error.args else 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # as `head` leaves: no fault
            return 0
        note(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        note("error: out of memory: lower --num_workers, or in training --batch_size")
        return 1
    return code


def _nobody_reads(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)  # an error is told unasked
    except OSError:  # the stream of a notebook is no file
        return False
    return bool(poll.poll(0))
