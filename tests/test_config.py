"""The settings, the command line made from them, and the wrapper that turns faults into one line."""

import contextlib
import dataclasses
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import config
from config import (
    RESUMABLE_FIELDS,
    RUNTIME_FIELDS,
    SPLIT_FIELDS,
    Config,
    Interrupted,
    UserError,
    command,
    parse_config,
    parse_runtime_config,
    printable,
)

ROOT = Path(config.__file__).parent
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
SCRIPTS = ["prepare.py", "train.py", "inference.py"]
BACKGROUND = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


# Of the fields that do not take any text or number.
CHOICES: dict[str, list[Any]] = {
    "device": ["auto", "cpu", "cuda", "cuda:1", "mps"],
    "split": ["random", "speaker"],
    "schedule": ["onecycle", "plateau"],
    "precision": ["auto", "bfloat16", "float32"],
    "folds": [0, 2, 100],
}


def other_value(name: str) -> Any:
    """A valid value of a field that is not its default."""
    default = FIELDS[name].default
    if name in CHOICES:
        return next(value for value in CHOICES[name] if value != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return f"{default} é"
    return default + 1 if isinstance(default, int) else (default or 0.2) / 2


def run_python(
    *arguments: str | Path, cwd: Path = ROOT, stdout: int = subprocess.PIPE
) -> "subprocess.CompletedProcess[str]":
    """Run a fresh interpreter that finds the modules of the project, or of the copy in cwd."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), "COLUMNS": "100", "PYTHONUNBUFFERED": ""},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


def edited_copy(folder: Path, line: str) -> Path:
    """A copy of the scripts in which the line of one field in config.py reads otherwise."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    name = line.split(maxsplit=1)[0].rstrip(":")
    text, n_lines = re.subn(
        rf"^    {name}: .*$", lambda _: f"    {line}", (ROOT / "config.py").read_text(), flags=re.MULTILINE
    )
    assert n_lines == 1
    (folder / "config.py").write_text(text)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, runtime: bool = False) -> str:
    """The one line that a bad command line ends with."""
    with pytest.raises(SystemExit) as stopped:
        (parse_runtime_config if runtime else parse_config)(argv)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# ---- values ---------------------------------------------------------------------------------------------


def test_defaults_round_trip() -> None:
    assert Config.from_dict(Config().to_dict()) == Config()
    assert list(Config().to_dict()) == list(FIELDS)


def test_changed_values_round_trip() -> None:
    changed = Config(**{name: other_value(name) for name in FIELDS})
    assert Config.from_dict(changed.to_dict()) == changed != Config()


@pytest.mark.parametrize(
    ("extra", "missing", "named"),
    [
        ({"batchsize": 3}, "", "batchsize"),
        ({}, "epochs", "epochs"),
        ({"a": 1}, "seed", "a, seed"),
        ({3: 4}, "", "3"),
    ],
)
def test_from_dict_refuses_other_fields(extra: dict[Any, Any], missing: str, named: str) -> None:
    values = Config().to_dict() | extra
    values.pop(missing, None)
    with pytest.raises(UserError, match=f"missing or unknown {named}$"):
        Config.from_dict(values)


def test_from_dict_checks_the_values() -> None:
    with pytest.raises(UserError, match="epochs = 0"):
        Config.from_dict(Config().to_dict() | {"epochs": 0})


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3  # type: ignore[misc]


WRONG_VALUES: dict[object, list[object]] = {
    int: [None, "3", 3.0, True],
    float: [None, "0.3", True],
    str: [None, 3, False, b"x"],
    bool: [None, "False", 0, 1.0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in FIELDS for value in WRONG_VALUES[FIELDS[name].type]]
)
def test_wrong_type(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{name} = .*: must be (a |True)"):
        Config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "samples", "frames", "rows"),
    [
        ({}, 66150, 130, 120),
        ({"duration": 1.5}, 33075, 65, 120),
        ({"sample_rate": 16000}, 48000, 94, 120),
        ({"hop_length": 256}, 66150, 259, 120),
        ({"n_mfcc": 13}, 66150, 130, 39),
    ],
)
def test_derived_sizes(changes: dict[str, Any], samples: int, frames: int, rows: int) -> None:
    cfg = Config(**changes)
    assert (cfg.n_samples, cfg.n_frames, cfg.n_features) == (samples, frames, rows)


@pytest.mark.parametrize(
    ("changes", "data", "test"),
    [
        ({"data_dir": "x"}, "x", "x/Test"),
        ({"data_dir": "x", "test_dir": "y"}, "x", "y"),
        ({"demo": True, "data_dir": "x", "test_dir": "y"}, "data/demo", "data/demo/Test"),
    ],
)
def test_derived_folders(changes: dict[str, Any], data: str, test: str) -> None:
    cfg = Config(**changes)
    assert (cfg.data_root, cfg.test_root) == (Path(data), Path(test))


# What else a value at its bound needs.
COMPANIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("sample_rate", "low"): {"duration": 10},
    ("sample_rate", "high"): {"duration": 2},
    ("duration", "high"): {"sample_rate": 8000, "hop_length": 2048},
    ("hop_length", "low"): {"duration": 0.1},
    ("duration", "low"): {"hop_length": 64},
    ("n_mfcc", "high"): {"n_mels": 1024},
    ("n_fft", "low"): {"n_mels": 9, "n_mfcc": 9, "hop_length": 16, "duration": 2},
    ("n_fft", "high"): {},
    ("hop_length", "high"): {"n_fft": 65536, "duration": 60},
    ("n_mels", "low"): {"n_mfcc": 1},
    ("n_mels", "high"): {"n_fft": 8192},
    ("val_fraction", "high"): {"holdout_fraction": 0},
}
SIDES = [(name, side) for name in config._BOUNDS for side in ("low", "high")]


def just_past(name: str, side: str) -> float:
    """The first value of a field's type beyond a bound."""
    bound = config._BOUNDS[name][side == "high"]
    step = 1 if side == "high" else -1
    return bound + step if FIELDS[name].type is int else math.nextafter(bound, step * math.inf)


def test_every_number_has_bounds() -> None:
    assert set(config._BOUNDS) == {name for name, field in FIELDS.items() if field.type in (int, float)}


# Never reached: some validation is always left.
@pytest.mark.parametrize(("name", "side"), [pair for pair in SIDES if pair != ("holdout_fraction", "high")])
def test_bound_is_allowed(name: str, side: str) -> None:
    value = config._BOUNDS[name][side == "high"]
    assert getattr(Config(**COMPANIONS.get((name, side), {}) | {name: value}), name) == value


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_past_a_bound_is_refused(name: str, side: str) -> None:
    value = just_past(name, side)
    with pytest.raises(UserError, match=rf"^{name} = {value!r}: must be between"):
        Config(**COMPANIONS.get((name, side), {}) | {name: value})


@pytest.mark.parametrize("name", [name for name in config._BOUNDS if FIELDS[name].type is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name} = "):
        Config(**{name: value})


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("hop_length", {"hop_length": 2048}, {"hop_length": 2049}),
        ("n_mels", {"n_mels": 1025}, {"n_mels": 1026}),
        ("n_mfcc", {"n_mfcc": 128}, {"n_mfcc": 129}),
        ("duration", {"duration": 8 * 512 / 22050}, {"duration": (8 * 512 - 1) / 22050}),
        ("duration", {"duration": (4096 * 512 - 1) / 22050}, {"duration": 4096 * 512 / 22050}),
        ("holdout_fraction", {"val_fraction": 0.5, "holdout_fraction": 0.4}, {"holdout_fraction": 0.81}),
        ("device", {"device": "cuda:12"}, {"device": "cuda:"}),
        ("device", {"device": "mps"}, {"device": "gpu"}),
        ("device", {"device": "cuda"}, {"device": "cpu\n"}),
        ("data_dir", {"data_dir": " x"}, {"data_dir": " "}),
        ("cache_dir", {"cache_dir": "-"}, {"cache_dir": ""}),
        ("test_dir", {"test_dir": ""}, {"test_dir": "a\0b"}),
        ("fill", {"fill": ""}, {"fill": "\0"}),
    ],
)
def test_rules_between_fields(name: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    Config(**good)
    with pytest.raises(UserError, match=f"^{name} = "):
        Config(**bad)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in CHOICES for value in CHOICES[name]])
def test_choice_is_allowed(name: str, value: object) -> None:
    assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("split", "clip", "random or speaker"),
        ("split", "Speaker", "random or speaker"),
        ("split", "", "not empty"),
        ("manifest", "a\0b", "free of NUL characters"),
        ("folds", 1, "0 or at least 2"),
        ("folds", -1, "between 0 and 100"),
        ("folds", 101, "between 0 and 100"),
        ("folds", 5.0, "a whole number"),
        ("conv_kernel", 0, "between 1 and 255"),
        ("label_smoothing", 1, "between 0 and 0.9"),
        ("ema_decay", 1, "between 0 and 0.999999"),
        ("ema_decay", -0.1, "between 0 and 0.999999"),
        ("schedule", "cosine", "onecycle or plateau"),
        ("schedule", "one-cycle", "onecycle or plateau"),
        ("precision", "float16", "auto, bfloat16 or float32"),
        ("precision", "bf16", "auto, bfloat16 or float32"),
    ],
)
def test_refusal_names_field_value_and_rule(name: str, value: object, rule: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{name} = {value!r}: must be {rule}") + "$"):
        Config(**{name: value})


@pytest.mark.parametrize("tenths", range(1, 10))
def test_the_parts_may_leave_a_tenth_for_training(tenths: int) -> None:
    """0.8 + 0.1 was refused: 0.9 - 0.8 is 0.09999999999999998, and the message said `at most 0.1`."""
    cfg = Config(val_fraction=tenths / 10, holdout_fraction=(9 - tenths) / 10)
    assert cfg.holdout_fraction == (9 - tenths) / 10


def test_sets_of_fields() -> None:
    assert RUNTIME_FIELDS < RESUMABLE_FIELDS < set(FIELDS)
    shapes = {"sample_rate", "duration", "n_mfcc", "n_fft", "hop_length", "n_mels"}
    network = {"conv_channels", "conv_blocks", "conv_kernel", "gru_hidden", "gru_layers"}
    assert not RESUMABLE_FIELDS & (shapes | network | SPLIT_FIELDS | {"schedule"})
    assert {"split", "manifest", "folds", "seed", "val_fraction"} < SPLIT_FIELDS < set(FIELDS)


def test_with_runtime_takes_the_runtime_fields_alone() -> None:
    changed = Config(**{name: other_value(name) for name in FIELDS})
    merged = Config().with_runtime(changed)
    for name in FIELDS:
        assert getattr(merged, name) == getattr(changed if name in RUNTIME_FIELDS else Config(), name)


def test_differences() -> None:
    before, after = Config(epochs=60), Config(epochs=3, fill="Sad")
    assert before.differences(after) == ["epochs: 60 -> 3", "fill: '' -> 'Sad'"]
    assert before.differences(after, ignore=["fill", "seed"]) == ["epochs: 60 -> 3"]
    assert Config().differences(Config()) == []


# ---- flags ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_flag(name: str) -> None:
    value = other_value(name)
    argv = [f"--{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    assert parse_config(argv) == Config(**{name: value})


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.type is bool])
def test_no_turns_a_flag_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(parse_config([f"--{name}", f"--no-{name}"]), name) is False
    assert getattr(parse_config([f"--no-{name}", f"--{name}"]), name) is True
    monkeypatch.setattr(sys, "argv", ["train.py", f"--{name}"])
    assert getattr(parse_config(), name) is True


def test_no_flags_give_the_defaults() -> None:
    assert parse_config([]) == Config()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batchsize", "3"], "--batchsize"),
        (["--epoch", "3"], "--epoch"),  # abbreviated
        (["--learning-rate", "3"], "--learning-rate"),
        (["--epochs", "3.5"], "--epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--epochs", "0"], "epochs = 0"),
        (["--epochs", "-3"], "epochs = -3"),
        (["--duration", "long"], "--duration"),
        (["--learning_rate", "nan"], "learning_rate = nan"),
        (["--learning_rate", "inf"], "learning_rate = inf"),
        (["--device", "tpu"], "device = 'tpu'"),
        (["--split", "clip"], "split = 'clip'"),
        (["--schedule", "cosine"], "schedule = 'cosine'"),
        (["--precision", "float16"], "precision = 'float16'"),
        (["--folds", "1"], "folds = 1"),
        (["--ema_decay", "1"], "ema_decay = 1"),
        (["--data_dir", ""], "data_dir = ''"),
        (["--demo=yes"], "--demo"),
        (["--no-epochs"], "--no-epochs"),
        (["-e", "3"], "-e"),
        (["clip.wav"], "clip.wav"),
        (["--a\x1b[2Jb\nc"], r"--a\x1b[2Jb\nc"),
        (["--device", "a\nb"], r"'a\nb'"),
        (["--n_mfcc", "200"], "n_mfcc = 200"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flag(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refusal(capsys, *argv)


@pytest.mark.parametrize(("flag", "runtime"), [("--no-epochs", False), ("--no-data_dir", True)])
def test_only_a_baked_flag_is_part_of_the_checkpoint(
    flag: str, runtime: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train.py --no-epochs` was told that epochs cannot be changed after training."""
    assert f"unknown argument {flag}" in refusal(capsys, flag, runtime=runtime)


def test_inference_takes_paths_and_runtime_flags() -> None:
    argv = ["--device", "cpu", "a.wav", "b c", "--no-demo"]
    assert parse_runtime_config(argv) == (Config(device="cpu"), ["a.wav", "b c"])
    between = ["a.wav", "--device", "cpu", "b c"]
    assert parse_runtime_config(between) == (Config(device="cpu"), ["a.wav", "b c"])
    assert parse_runtime_config([]) == (Config(), [])
    assert parse_runtime_config(["--", "-x.wav"]) == (Config(), ["-x.wav"])


@pytest.mark.parametrize("name", sorted(set(FIELDS) - RUNTIME_FIELDS))
@pytest.mark.parametrize("joined", [True, False])
def test_inference_refuses_a_baked_flag(name: str, joined: bool, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--{name}=1"] if joined else ["a.wav", f"--{name}", "1"]
    line = refusal(capsys, *argv, runtime=True)
    assert f"--{name}" in line
    assert "part of the checkpoint" in line


def test_inference_refuses_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown argument --tta" in refusal(capsys, "--tta", "a.wav", runtime=True)


# ---- edits of config.py ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_the_live_default(script: str, tmp_path: Path) -> None:
    """Default and comment are those of the edited file; model.py is not there, so nothing is loaded."""
    copy = edited_copy(tmp_path, "batch_size: int = 48  # 100% of a step")
    result = run_python(script, "--help", cwd=copy)
    assert (result.returncode, result.stderr) == (0, "")
    shown = " ".join(result.stdout.split())
    assert "--batch_size INT 100% of a step [48]" in shown
    names = RUNTIME_FIELDS if script == "inference.py" else set(FIELDS)
    assert {name for name in FIELDS if f" --{name} " in shown.replace(",", " ")} == names


def test_an_edited_default_arrives(tmp_path: Path) -> None:
    copy = edited_copy(tmp_path, "epochs: int = 7")
    result = run_python("-c", "import config; print(config.parse_config(['--seed', '3']).epochs)", cwd=copy)
    assert (result.stdout, result.stderr) == ("7\n", "")


BAD_EDITS = [  # (line of config.py, what the message names)
    ("batch_size = 64", "batch_size has no type"),
    ("dropout = 0.5  # probability, between", "dropout has no type"),
    ("epochs: int = 60\n    warmup = 5", "warmup has no type"),
    ('learning_rate: float = "1e-3"', "learning_rate = '1e-3'"),
    ("epochs: int = 60.0", "epochs = 60.0"),
    ("epochs: int = 0", "epochs = 0"),
    ("epochs: int = None", "epochs = None"),
    ("n_mfcc: int = 300", "n_mfcc = 300"),
    ('demo: bool = "False"', "demo = 'False'"),
    ("demo: bool = 0", "demo = 0"),
    ('data_dir: str = ""', "data_dir = ''"),
    ('device: str = "GPU"', "device = 'GPU'"),
    ("seed: tuple = (0, 1)", "seed = (0, 1)"),
    ("seed: int = -1", "seed = -1"),
    ('split: str = "speakers"', "split = 'speakers'"),
    ('schedule: str = ""', "schedule = ''"),
    ('precision: str = "float64"', "precision = 'float64'"),
    ("folds: int = 1", "folds = 1"),
    ("manifest: str = None", "manifest = None"),
    ("ema_decay: float = 1.0", "ema_decay = 1.0"),
    ("epochs: list = [20, 40]", "epochs = [20, 40]"),
    ("epochs: dict = {}", "epochs = {}"),
    ("epochs: int | None = None", "epochs = None"),
    ("epochs: [int] = 3", "epochs = 3"),
    ("epochs: 'int' = 3", "epochs = 3"),
    ("epochs: int = 3,", "epochs = (3,)"),
    ("epochs: int = lambda: 3", "epochs = <function"),
    ("epochs = lambda: 3", "epochs is missing"),
    ("epochs: int", "'epochs'"),
    ("schedule = max", "schedule = <built-in"),
    ("fill = max", "fill is missing"),
    ("epochs: int = 10**5000", "config.py"),
]


@pytest.mark.parametrize(("line", "named"), BAD_EDITS, ids=[line for line, _ in BAD_EDITS])
def test_bad_edit(line: str, named: str, tmp_path: Path) -> None:
    result = run_python("prepare.py", cwd=edited_copy(tmp_path, line))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert named in result.stderr


def test_untyped_runtime_line_at_inference(tmp_path: Path) -> None:
    """The parser looked up the field before Config could complain: KeyError with a traceback."""
    result = run_python("inference.py", cwd=edited_copy(tmp_path, "batch_size = 64"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "batch_size has no type" in result.stderr


def test_message_about_a_huge_value_is_short() -> None:
    """A config may come from a checkpoint that was made to fill the memory when it is shown."""
    laughs: list[Any] = ["ha"] * 10
    for _ in range(50):
        laughs = [laughs] * 10
    for value in (laughs, "ha" * 10**6, 10**4000):
        with pytest.raises(UserError, match="epochs = ") as error:
            Config(epochs=value)  # type: ignore[arg-type]
        assert len(str(error.value)) < 5000


# ---- messages and endings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b.wav", "a b.wav"),
        ("é 日本 😀", "é 日本 😀"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\udcff.wav", r"\udcff.wav"),  # a byte that is not UTF-8, as the file system gives it
        ("\u202e\u200b\x85", r"\u202e\u200b\x85"),  # reverses, hides, and ends lines
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (UserError("no\nway"), 2, r"error: no\nway"),
        (UserError("half done", code=1), 1, "error: half done"),
        (Interrupted(signal.SIGINT), 130, "interrupted"),
        (Interrupted(signal.SIGTERM), 143, "interrupted"),
        (PermissionError(13, "Permission denied", "a/b"), 1, "error: a/b: Permission denied"),
        (OSError("odd"), 1, "error: odd"),
    ],
)
def test_command_turns_faults_into_one_line(
    fault: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(_argv: list[str]) -> int:
        raise fault

    assert main([]) == code
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("name", ["best.pth", "not/yet/made/best.pth"])
def test_disk_that_takes_no_more_is_described(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With path, reason, and the space that is left where it happened."""

    @command
    def main(_argv: list[str]) -> int:
        raise OSError(code, os.strerror(code), str(tmp_path / name))

    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return shutil._ntuple_diskusage(9, 9, 1_234_567_890)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert main([]) == 1
    line = f"error: {tmp_path / name}: {os.strerror(code)} (1,234.6 MB are free there)\n"
    assert capsys.readouterr() == ("", line)
    assert asked == [tmp_path]


OUT_OF_MEMORY = [
    (MemoryError(), ""),
    (MemoryError("Unable to allocate 7.28 TiB for an array"), ", 7.28 TiB more were wanted"),
    (
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes. Error 12"
        ),
        ", 4000 bytes more were wanted",
    ),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU"), ", 2.00 GiB more were wanted"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
    (RuntimeError("MPS backend out of memory"), ""),
]


@pytest.mark.parametrize(("fault", "amount"), OUT_OF_MEMORY)
def test_out_of_memory_names_the_remedy(
    fault: Exception, amount: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a traceback, and differs from library to library."""

    @command
    def main(_argv: list[str]) -> int:
        raise fault

    assert main([]) == 1
    line = f"error: out of memory{amount}: lower batch_size or num_workers\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("bug"), ValueError("bug"), KeyError("bug"), KeyboardInterrupt(), SystemExit(5)],
)
def test_command_passes_what_it_does_not_expect(fault: BaseException) -> None:
    @command
    def main(_argv: list[str]) -> int:
        raise fault

    with pytest.raises(type(fault)):
        main([])


def test_command_returns_the_code_and_passes_the_arguments() -> None:
    @command
    def main(argv: list[str]) -> int:
        return len(argv)

    assert main(["a", "b", "c"]) == 3
    assert main.__name__ == "main"


@pytest.mark.parametrize("fault", [None, UserError("x"), ValueError("x")])
def test_command_restores_the_handlers(fault: Exception | None) -> None:
    seen = []

    @command
    def main(_argv: list[str]) -> int:
        seen.append(signal.getsignal(signal.SIGTERM))
        if fault:
            raise fault
        return 0

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="x") if isinstance(fault, ValueError) else contextlib.nullcontext():
        main([])
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert seen != before[1:]


SCRIPT = """
import os, signal, time
{before}
from config import command

@command
def main(argv):
    {body}
    return 0

raise SystemExit(main())
"""


def run_main(body: str, before: str = "", **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a wrapped main with this body in a process of its own."""
    return run_python("-c", SCRIPT.format(body=body, before=before), **options)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_ends_in_good_order(name: str, code: int) -> None:
    result = run_main(
        f"""
    try:
        os.kill(os.getpid(), signal.{name}); time.sleep(30)
    finally:
        print("saved")"""
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, "saved\n", "interrupted\n")


def test_signal_that_python_ignores_is_sent_again() -> None:
    """In a finalizer, or beside a fork, the exception was printed and forgotten, and the run went on."""
    result = run_main(
        """
    class Late:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)
    Late()
    started = time.monotonic()
    try:
        time.sleep(30)
    finally:
        assert time.monotonic() - started < 10"""
    )
    assert (result.returncode, result.stdout, result.stderr) == (143, "", "interrupted\n")


def test_other_lost_exceptions_are_still_told() -> None:
    result = run_main(
        """
    class Bug:
        def __del__(self):
            raise ValueError("lost")
    Bug()"""
    )
    assert result.returncode == 0
    assert "ValueError: lost" in result.stderr


@pytest.mark.parametrize("before", ["", BACKGROUND])
@pytest.mark.parametrize("script", ["prepare.py", "train.py", "inference.py"])
def test_ctrl_c_while_torch_is_loading_is_quiet(script: str, before: str, tmp_path: Path) -> None:
    """It was a traceback of thirty lines; there is nothing to save yet. A background job ignores it."""
    for name in ("config.py", script):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("filelock", "numpy", "torch"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    start = f"{before}\nimport runpy\nrunpy.run_path({script!r}, run_name='__main__')"
    result = run_python("-c", start, cwd=tmp_path)
    assert result.returncode == (1 if before else -signal.SIGINT)  # numpy is not what it was
    assert ("Error" in result.stderr) if before else not result.stderr


def test_second_signal_kills_at_once() -> None:
    result = run_main(
        """
    try:
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)
    finally:
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"""
    )
    assert result.returncode == -signal.SIGTERM


def test_background_job_keeps_ignoring_ctrl_c() -> None:
    assert run_main("os.kill(os.getpid(), signal.SIGINT)", before=BACKGROUND).returncode == 0


@pytest.mark.parametrize("size", [3, 1_000_000])
def test_closed_pipe_is_quiet(size: int) -> None:
    """A short text stayed in the buffer until the interpreter ended, with 120 and a complaint."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run_main(f"print('x' * {size})", stdout=writer)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_closed_streams_are_as_good_as_any(streams: tuple[str, ...]) -> None:
    """As of a daemon: Python has None for them, and a message without stderr went among the results."""
    before = "import sys; " + "; ".join(f"sys.{name} = None" for name in streams)
    result = run_main("import config; config.say('note'); print('result')", before)
    out, err = "" if "stdout" in streams else "result\n", "" if "stderr" in streams else "note\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, out, err)


def test_any_letter_can_be_printed() -> None:
    """A class name ended a run in its last line, where the locale lacks a letter of it."""
    before = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')"
    result = run_main("print(chr(0xe9) + chr(0xdcff))", before)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\xe9\\udcff\n", "")


def test_a_rank_without_torchrun_silences_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clusters set RANK for all that they start: an error left no word then."""
    monkeypatch.setenv("RANK", "1")
    result = run_main("import config; raise config.UserError('bad')")
    assert (result.returncode, result.stderr) == (2, "error: bad\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_under_stdout_is_one_line() -> None:
    """As with the closed pipe: a short text was lost with exit code 120 and a complaint."""
    with Path("/dev/full").open("w") as full:
        result = run_main("print('x')", stdout=full.fileno())
    assert (result.returncode, result.stderr) == (1, "error: No space left on device\n")
