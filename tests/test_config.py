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

from config import DEMO, Config, UserError, kind_of, make_parser, parse, printable, run
from tests.conftest import ROOT, run_script

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
BELOW_1, ABOVE_0 = math.nextafter(1, 0), math.nextafter(0, 1)


def other_value(name: str) -> Any:
    """A valid value of a field that is not its default."""
    choices = {"split": "speaker", "device": "cuda:1", "precision": "float32", "cmn": "all"}
    choices |= {"recordings": "any", "labels_from": "folders", "extra_labels": "keep"}
    if name in choices:
        return choices[name]
    default = FIELDS[name].default
    if isinstance(default, str):
        return f"{default} é"
    return default + 1 if isinstance(default, int) else (default or 0.2) / 2


# ---- values ----------------------------------------------------------------------------------------------


def test_every_setting_has_a_flag_and_survives_a_checkpoint() -> None:
    changed = Config(**{name: other_value(name) for name in FIELDS})
    parsed, _ = parse(make_parser(""), [f"--{name}={other_value(name)}" for name in FIELDS])
    assert parsed == changed
    assert Config.from_dict(dataclasses.asdict(changed)) == changed


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "3"), ("epochs", 3.0), ("epochs", True), ("dropout", "0.3"), ("split", None)],
)
def test_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{name} = {re.escape(repr(value))}: must be (a |text)"):
        Config(**{name: value})


def test_every_number_has_a_bound() -> None:
    values: dict[Any, list[float]] = {int: [-2], float: [-2.0, math.nan, math.inf], str: []}
    for name, field in FIELDS.items():
        for value in values[kind_of(field)[0]]:
            with pytest.raises(UserError, match=f"^{name} = "):
                Config(**{name: value})


@pytest.mark.parametrize(
    ("name", "allowed", "refused", "others"),
    [
        ("run_dir", [" x"], ["", " \t"], {}),
        ("epochs", [1, 10**6], [0], {}),
        ("batch_size", [2], [1], {}),
        ("sample_rate", [1000], [999], {"duration": 10.0}),
        ("sample_rate", [768_000], [768_001], {"duration": 2.0}),
        ("seed", [0, 2**31 - 1], [-1, 2**31], {}),
        ("warmup", [0], [-1], {}),
        ("num_workers", [-1, 0], [-2], {}),
        ("dropout", [0, 0.0, BELOW_1], [-ABOVE_0, 1.0], {}),
        ("val_fraction", [ABOVE_0, 0.5], [0.0, 1.0], {}),
        ("learning_rate", [ABOVE_0, 1e9], [0.0, math.inf, math.nan], {}),
        ("weight_decay", [0.0, 1e9], [-ABOVE_0, math.inf], {}),
        ("split", ["random", "speaker"], ["", "Speaker"], {}),
        ("precision", ["auto", "float32", "bfloat16"], ["float16"], {}),
        ("device", ["auto", "cpu", "cuda", "cuda:12", "mps"], ["gpu", "cuda:", "cpu\n"], {}),
        # rules between settings
        ("n_mfcc", [128], [129], {}),
        ("duration", [8 * 512 / 22050, 4096 * 512 / 22050 - 1e-4], [0.185, 4096 * 512 / 22050], {}),
        ("test_fraction", [0.8], [0.81], {"val_fraction": 0.1}),  # whatever 0.8 + 0.1 is in binary
    ],
)
def test_rule_allows_its_bound_and_refuses_just_outside(
    name: str, allowed: list[Any], refused: list[Any], others: dict[str, Any]
) -> None:
    for value in allowed:
        assert getattr(Config(**{**others, name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError, match=rf"^{name} = {re.escape(repr(value))}: "):
            Config(**{**others, name: value})


# ---- flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs=0"], "epochs = 0: must be at least 1"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--epochs=3", "--seed=1", "--epochs=4"], "--epochs is given twice"),
        (["--learnig_rate=1"], "unknown argument --learnig_rate=1: did you mean --learning_rate?"),
        (["--lr", "1"], "unknown argument --lr: did you mean --learning_rate?"),
        (["--epoch=3"], "unknown argument --epoch=3: did you mean --epochs?"),  # no abbreviations
        (["--\x1b[2J"], r"unknown argument --\x1b[2J"),
        (["stray.wav"], "unknown argument stray.wav"),
        (["--demo", "--run_dir=x"], "--demo has its own folders: leave out --run_dir"),
    ],
)
def test_bad_flag_is_refused_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(make_parser(""), argv)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")


def test_demo_has_its_own_places() -> None:
    cfg, known = parse(make_parser(""), ["--demo", "--epochs", "3"])
    assert known.demo
    assert cfg.epochs == 3
    for name in DEMO:
        assert Path(getattr(cfg, name)).parts[0] in {"data", "run_demo"}
        assert getattr(cfg, name) != FIELDS[name].default


@pytest.mark.parametrize(
    ("argv", "checkpoint"),
    [
        ([], "best_emotion_model.pth"),
        (["--run_dir=./run"], "best_emotion_model.pth"),
        (["--run_dir=a"], "a/best_emotion_model.pth"),
        (["--run_dir=a", "--checkpoint=b.pth"], "b.pth"),
    ],
)
def test_run_of_its_own_folder_keeps_its_model_there(argv: list[str], checkpoint: str) -> None:
    assert Path(parse(make_parser(""), argv)[0].checkpoint) == Path(checkpoint)


def test_help_says_what_every_setting_is() -> None:
    """Its comment: none has moved off its line."""
    helps = {action.dest: str(action.help) for action in make_parser("")._actions}
    assert not [name for name in FIELDS if helps[name].startswith(" [")]


@pytest.mark.parametrize(
    ("script", "bad", "reason"),
    [
        ("prepare.py", "--help_me", "unknown argument --help_me"),
        ("train.py", "--fill=Sad", "unknown argument --fill"),
        ("inference.py", "--n_mfcc=20", "--n_mfcc has no effect on this script: what it sets is"),
        ("prepare.py", "--learning_rate=1", "--learning_rate has no effect on this script: what"),
        ("inference.py", "--cache_dir=x", "--cache_dir has no effect on this script"),
    ],
)
def test_help_and_bad_flags_are_answered_before_slow_imports(
    script: str, bad: str, reason: str, tmp_path: Path
) -> None:
    for name in ("torch", "numpy", "pandas"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported too early')\n")
    env = {"PYTHONPATH": str(tmp_path), "COLUMNS": "100"}
    answer = run_script(script, "--help", cwd=tmp_path, env=env)
    assert (answer.returncode, answer.stderr) == (0, "")
    shown = " ".join(answer.stdout.split())
    assert f"none but this one [{Config().num_workers}]" in shown  # a comment of config.py, and the default
    assert ("--dropout FLOAT probability" in shown) == (script == "train.py")
    answer = run_script(script, bad, cwd=tmp_path, env=env)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert answer.stderr.startswith(f"error: {reason}")


def test_bad_edit_of_a_default_is_named(tmp_path: Path) -> None:
    shutil.copy(ROOT / "prepare.py", tmp_path)
    text = (ROOT / "config.py").read_text(encoding="utf-8")
    edited = re.sub(r"^    learning_rate: .*$", '    learning_rate: float = "1e-3"', text, flags=re.MULTILINE)
    (tmp_path / "config.py").write_text(edited, encoding="utf-8")
    answer = run_script(str(tmp_path / "prepare.py"), cwd=tmp_path)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert answer.stderr.startswith("error: learning_rate = '1e-3': must be a number")


# ---- messages and endings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("é 日本 😀.wav", "é 日本 😀.wav"),
        ("a\x1b[2J\nb\r\tc", r"a\x1b[2J\nb\r\tc"),
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
        (KeyboardInterrupt(143), 143, "interrupted"),
        (PermissionError(13, "Permission denied", "a/b"), 1, "error: a/b: Permission denied"),
        (OSError("odd"), 1, "error: odd"),
        (BrokenPipeError(32, "Broken pipe", "child"), 1, "error: child: Broken pipe"),  # not that of stdout
        (MemoryError(), 1, "error: out of memory: lower --num_workers, or in training --batch_size"),
        (
            RuntimeError("CUDA out of memory."),
            1,
            "error: out of memory: lower --num_workers, or in training --batch_size",
        ),
    ],
)
def test_fault_becomes_one_line(
    fault: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise fault

    assert run(main) == code
    assert capsys.readouterr() == ("", f"{line}\n")


def test_handlers_of_signals_are_as_before_when_a_script_has_ended() -> None:
    """A console session goes on after it."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run(lambda: 0) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ctrl_c_while_processes_start_comes_after_that() -> None:
    """Not lost, and not in the middle of it; a process that is started then never gets it."""
    child = "import signal, os; os.kill(os.getpid(), signal.SIGINT); print('child goes on', flush=True)"
    body = (
        "from config import hold_interrupts\n"
        "    try:\n"
        "        with hold_interrupts():\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            import subprocess\n"
        f"            subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
        "            print('started', flush=True)\n"
        "        time.sleep(30)\n"
        "    finally: print('ended')"
    )
    before = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    assert run_main(body, before=before) == (130, "child goes on\nstarted\nended\n", "interrupted\n")


def test_name_of_any_bytes_can_be_printed() -> None:
    assert run_main(r"print('\udcff')", PYTHONIOENCODING="ascii") == (0, "\\udcff\n", "")


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


def test_second_signal_ends_at_once() -> None:
    wait = "os.kill(os.getpid(), signal.{}); time.sleep(30)"
    body = f"try: {wait.format('SIGINT')}\n    finally: time.sleep(1.1); {wait.format('SIGTERM')}"
    before = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job ignores it
    assert run_main(body, before=before) == (143, "", "")


def test_signal_that_comes_twice_is_one() -> None:
    """As from tools that signal a process and its group."""
    send = "os.kill(os.getpid(), signal.SIGTERM)"
    body = f"try: {send}; time.sleep(5)\n    finally: {send}; time.sleep(0.1); print('saved')"
    assert run_main(body) == (143, "saved\n", "interrupted\n")


def test_background_job_ignores_ctrl_c() -> None:
    before = "signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as a shell without job control does
    assert run_main("os.kill(os.getpid(), signal.SIGINT)", before=before) == (0, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("size", [3, 1_000_000])  # found out at the end, and before
def test_full_disk_under_stdout_is_one_line(size: int) -> None:
    """Half a table must not look like success."""
    with Path("/dev/full").open("w") as full:
        code, _, err = run_main(f"print('x' * {size})", stdout=full)
    assert (code, err.count("\n")) == (1, 1)
    assert "No space left on device" in err


def test_only_the_first_process_of_torchrun_speaks() -> None:
    assert run_main("note('hello')", TORCHELASTIC_RUN_ID="1", RANK="1") == (0, "", "")
    assert run_main("note('hello')", TORCHELASTIC_RUN_ID="1", RANK="0") == (0, "", "hello\n")
    assert run_main("note('hello')", RANK="1") == (0, "", "hello\n")  # some clusters set it for all jobs
