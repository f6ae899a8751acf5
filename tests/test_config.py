"""The settings, the flags made from them, and how a script speaks and ends."""

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config import DEMO, RUNTIME_FIELDS, Config, Interrupted, UserError, make_parser, parse, printable, run
from tests.conftest import ROOT, run_script

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
NUMBERS = [name for name, field in FIELDS.items() if field.type in (int, float)]
BELOW_1, ABOVE_0 = math.nextafter(1, 0), math.nextafter(0, 1)


def other_value(name: str) -> Any:
    """A valid value of a field that is not its default."""
    if name in {"split", "device", "precision"}:
        return {"split": "speaker", "device": "cuda:1", "precision": "float32"}[name]
    default = FIELDS[name].default
    if isinstance(default, str):
        return f"{default} é"
    return default + 1 if isinstance(default, int) else (default or 0.2) / 2


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, fields: Any = None) -> str:
    """The one line on stderr that a bad command line ends with."""
    with pytest.raises(SystemExit) as stopped:
        parse(make_parser("", fields), argv)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# ---- values ----------------------------------------------------------------------------------------------


def test_settings_round_trip_through_a_dict() -> None:
    changed = Config(**{name: other_value(name) for name in FIELDS})
    for cfg in (Config(), changed):
        assert Config.from_dict(dataclasses.asdict(cfg)) == cfg
    assert changed != Config()


@pytest.mark.parametrize(
    ("extra", "missing", "message"),
    [
        ({"batchsize": 3}, "", "missing or unknown batchsize$"),
        ({}, "epochs", "missing or unknown epochs$"),
        ({"a": 1}, "seed", "missing or unknown a, seed$"),
        ({"epochs": 0}, "", "^epochs = 0: must be at least 1$"),
    ],
)
def test_dict_of_another_version_is_refused(extra: dict[str, Any], missing: str, message: str) -> None:
    values = dataclasses.asdict(Config()) | extra
    values.pop(missing, None)
    with pytest.raises(UserError, match=message):
        Config.from_dict(values)


def test_settings_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3  # type: ignore[misc]


WRONG_TYPES: dict[Any, list[object]] = {
    int: [None, "3", 3.0, True],
    float: [None, "0.3", True],
    str: [None, 3, b"x"],
}


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_type_is_refused(name: str) -> None:
    for value in WRONG_TYPES[FIELDS[name].type]:
        with pytest.raises(UserError, match=rf"^{name} = {re.escape(repr(value))}: must be (a |text)"):
            Config(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_bound(name: str) -> None:
    values: list[float] = [-2] if FIELDS[name].type is int else [-2.0, math.nan, math.inf, -math.inf]
    for value in values:
        with pytest.raises(UserError, match=f"^{name} = "):
            Config(**{name: value})


RULES: list[tuple[str, list[Any], list[Any], dict[str, Any]]] = [  # names, allowed, refused, with
    ("data_dir cache_dir run_dir checkpoint submission", ["-", " x"], ["", " ", "\t"], {}),
    ("test_dir manifest", ["", "x"], [], {}),
    ("max_windows ensemble conv_channels conv_blocks conv_kernel gru_layers", [1, 99], [0], {}),
    ("epochs min_steps patience", [1, 10**6], [0], {}),
    ("hop_length", [1], [0], {"duration": 0.1}),
    ("n_mfcc n_mels", [1], [0], {"n_mfcc": 1}),
    ("batch_size gru_hidden", [2], [1], {}),
    ("n_fft", [16], [15], {"n_mels": 9, "n_mfcc": 9, "hop_length": 16, "duration": 2.0}),
    ("sample_rate", [1000], [999], {"duration": 10.0}),
    ("sample_rate", [768_000], [768_001], {"duration": 2.0}),
    ("seed", [0, 2**31 - 1], [-1, 2**31], {}),
    ("warmup lr_patience", [0], [-1], {}),
    ("num_workers", [-1, 0], [-2], {}),
    ("dropout conv_dropout label_smoothing ema_decay vtlp tempo", [0, 0.0, BELOW_1], [-ABOVE_0, 1.0], {}),
    ("test_fraction", [0.0, 0.5], [-ABOVE_0, 1.0], {}),
    ("val_fraction", [ABOVE_0, 0.5], [0.0, 0, 1.0], {}),
    ("lr_factor", [ABOVE_0, BELOW_1], [0.0, 1.0], {}),
    ("learning_rate", [ABOVE_0, 1e9], [0.0, math.inf, math.nan], {}),
    ("weight_decay shift", [0.0, 1e9], [-ABOVE_0, math.inf, math.nan], {}),
    ("split", ["random", "speaker"], ["", "Speaker", "clip"], {}),
    ("precision", ["auto", "float32", "bfloat16"], ["bf16", "float16"], {}),
    ("device", ["auto", "cpu", "cuda", "cuda:12", "mps"], ["gpu", "cuda:", "CPU", "cpu\n"], {}),
    # rules between settings
    ("hop_length", [2048], [2049], {"duration": 20}),
    ("n_mels", [1025], [1026], {}),
    ("n_mfcc", [128], [129], {}),
    ("duration", [8 * 512 / 22050, 4096 * 512 / 22050 - 1e-4], [0.185, 4096 * 512 / 22050, math.inf], {}),
    ("test_fraction", [0.8], [0.81], {"val_fraction": 0.1}),  # whatever 0.8 + 0.1 is in binary
    ("test_fraction", [0.2], [0.21], {"val_fraction": 0.7}),
]


@pytest.mark.parametrize(
    ("name", "allowed", "refused", "others"),
    [pytest.param(name, *rule, id=name) for names, *rule in RULES for name in names.split()],
)
def test_rule_allows_its_bound_and_refuses_just_outside(
    name: str, allowed: list[Any], refused: list[Any], others: dict[str, Any]
) -> None:
    for value in allowed:
        assert getattr(Config(**{**others, name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError, match=rf"^{name} = {re.escape(repr(value))}: "):
            Config(**{**others, name: value})


@pytest.mark.parametrize(
    ("changes", "samples", "frames", "rows"),
    [
        ({}, 66150, 130, 120),
        ({"duration": 1.5}, 33075, 65, 120),
        ({"sample_rate": 16000}, 48000, 94, 120),
        ({"hop_length": 256, "n_mfcc": 13}, 66150, 259, 39),
    ],
)
def test_sizes_follow_from_the_settings(
    changes: dict[str, Any], samples: int, frames: int, rows: int
) -> None:
    cfg = Config(**changes)
    assert (cfg.n_samples, cfg.n_frames, cfg.n_features) == (samples, frames, rows)


# ---- flags -----------------------------------------------------------------------------------------------


def test_every_setting_has_a_flag() -> None:
    for name in FIELDS:
        cfg, _ = parse(make_parser(""), [f"--{name}", str(other_value(name))])
        assert cfg == Config(**{name: other_value(name)})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs=0"], "epochs = 0: must be at least 1"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--epochs=3", "--seed=1", "--epochs=4"], "--epochs is given twice"),
        (["--learnig_rate=1"], "unknown argument --learnig_rate=1: did you mean --learning_rate?"),
        (["--lr", "1"], "unknown argument --lr: did you mean --learning_rate?"),
        (["--epoch=3"], "unknown argument --epoch=3: did you mean --epochs?"),  # no abbreviations
        (["--xyzzy"], "unknown argument --xyzzy ("),
        (["--\x1b[2J"], r"unknown argument --\x1b[2J"),
        (["stray.wav"], "unknown argument stray.wav"),
    ],
)
def test_bad_flag_is_refused_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *argv)


def test_inference_takes_flags_of_places_and_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for name in FIELDS:
        flag = f"--{name}={other_value(name)}"
        if name in RUNTIME_FIELDS:
            cfg, _ = parse(make_parser("", RUNTIME_FIELDS), [flag])
            assert cfg == Config(**{name: other_value(name)})
        else:
            line = refusal(capsys, flag, fields=RUNTIME_FIELDS)
            assert f"--{name} is part of the checkpoint and cannot be changed" in line


def test_demo_has_its_own_places() -> None:
    cfg, known = parse(make_parser(""), ["--demo", "--epochs", "3"])
    assert known.demo
    assert (cfg.epochs, cfg.ensemble) == (3, 2)  # what is asked for, and what makes it quick
    for name in DEMO:
        assert Path(getattr(cfg, name)).parts[0] in {"data", "run_demo"}
        assert getattr(cfg, name) != FIELDS[name].default


@pytest.mark.parametrize("name", DEMO)
def test_demo_with_a_place_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"leave out --{name}" in refusal(capsys, "--demo", f"--{name}=x")


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "inference.py"])
def test_help_and_bad_flags_are_answered_before_slow_imports(script: str, tmp_path: Path) -> None:
    for name in ("torch", "numpy", "pandas"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported too early')\n")
    env = {"PYTHONPATH": str(tmp_path), "COLUMNS": "100"}
    answer = run_script(script, "--help", cwd=tmp_path, env=env)
    assert (answer.returncode, answer.stderr) == (0, "")
    shown = " ".join(answer.stdout.split())
    assert f"none but this one [{Config().num_workers}]" in shown
    assert ("--dropout FLOAT probability" in shown) == (script != "inference.py")
    answer = run_script(script, "--help_me", cwd=tmp_path, env=env)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epochs: int = 0", "error: epochs = 0: must be at least 1"),
        ('learning_rate: float = "1e-3"', "error: learning_rate = '1e-3': must be a number"),
    ],
)
def test_bad_edit_of_a_default_is_named(line: str, message: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "prepare.py", tmp_path)
    name = line.partition(":")[0]
    text = re.sub(rf"^    {name}: .*$", f"    {line}", (ROOT / "config.py").read_text(), flags=re.MULTILINE)
    (tmp_path / "config.py").write_text(text)
    answer = run_script(str(tmp_path / "prepare.py"), cwd=tmp_path)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert answer.stderr.startswith(message)


# ---- messages and endings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("é 日本 😀.wav", "é 日本 😀.wav"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\udcff.wav", r"\udcff.wav"),  # a byte that is not UTF-8, as the file system gives it
        ("\u202e\u200b\x85", r"\u202e\u200b\x85"),  # reverses, hides, and ends lines
    ],
)
def test_names_cannot_steer_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Puts back the signal handlers that run() sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (UserError("no\nway"), 2, r"error: no\nway"),
        (UserError("half done", code=1), 1, "error: half done"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(), 143, "interrupted"),
        (PermissionError(13, "Permission denied", "a/b"), 1, "error: a/b: Permission denied"),
        (OSError("odd"), 1, "error: odd"),
        (MemoryError(), 1, "error: out of memory: lower --batch_size or --num_workers"),
        (RuntimeError("CUDA out of memory."), 1, "error: out of memory: lower --batch_size or --num_workers"),
    ],
)
def test_fault_becomes_one_line(
    fault: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise fault

    assert run(main) == code
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.usefixtures("_handlers")
def test_bug_keeps_its_traceback() -> None:
    def main() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(main)


def run_main(body: str, *, before: str = "", stdout: Any = subprocess.PIPE, **env: str) -> tuple[Any, ...]:
    """Exit code, stdout and stderr of a process whose main has this body."""
    program = (
        f"import os, signal, sys, time\n{before}\nfrom config import note, run\n"
        f"def main():\n    {body}\n    return 0\nraise SystemExit(run(main))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


WAIT = "os.kill(os.getpid(), signal.{}); time.sleep(30)"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_lets_the_run_tidy_up(name: str, code: int) -> None:
    body = f"try: {WAIT.format(name)}\n    finally: print('saved')"
    assert run_main(body) == (code, "saved\n", "interrupted\n")


def test_second_signal_ends_at_once() -> None:
    body = f"try: {WAIT.format('SIGINT')}\n    finally: time.sleep(1.1); {WAIT.format('SIGTERM')}"
    assert run_main(body) == (143, "", "")


def test_signal_that_comes_twice_is_one() -> None:
    """As from tools that signal a process and its group."""
    send = "os.kill(os.getpid(), signal.SIGTERM)"
    body = f"try: {send}; time.sleep(5)\n    finally: {send}; time.sleep(0.1); print('saved')"
    assert run_main(body) == (143, "saved\n", "interrupted\n")


def test_background_job_ignores_ctrl_c() -> None:
    before = "signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as a shell without job control does
    assert run_main("os.kill(os.getpid(), signal.SIGINT)", before=before) == (0, "", "")


@pytest.mark.parametrize("size", [3, 1_000_000])
def test_reader_that_leaves_is_no_fault(size: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        code, _, err = run_main(f"print('x' * {size})", stdout=writer)
    finally:
        os.close(writer)
    assert (code, err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("size", [3, 1_000_000])
def test_full_disk_under_stdout_is_one_line(size: int) -> None:
    with Path("/dev/full").open("w") as full:
        code, _, err = run_main(f"print('x' * {size})", stdout=full)
    assert (code, err.count("\n")) == (1, 1)
    assert "No space left on device" in err


def test_only_the_first_process_of_torchrun_speaks() -> None:
    assert run_main("note('hello')", TORCHELASTIC_RUN_ID="1", RANK="1") == (0, "", "")
    assert run_main("note('hello')", TORCHELASTIC_RUN_ID="1", RANK="0") == (0, "", "hello\n")
    assert run_main("note('hello')", RANK="1") == (0, "", "hello\n")  # some clusters set it for all jobs
