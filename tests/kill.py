"""Kill the scripts at random moments, and see that nothing is lost: a stress test for Linux.

    python tests/kill.py [--kills N] [--seed N]

runs prepare, train and inference again and again on a small synthetic corpus, and ends them: with kill -9, at
a moment drawn from the whole run or just when a file is being written, and now and then with Ctrl-C and
SIGTERM. After each end every file must be absent, old or new, and whole, and no worker may be left; the next
run must go on from there; and what comes out in the end must equal, to the last bit, what an undisturbed run
makes. It prints a table of where the kills hit, and stops at the first fault.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has none of its parent's other threads

import matplotlib.figure  # with it and torch loaded once, a fork starts in no time
import matplotlib.image
import numpy as np
import torch

import inference
import prepare
import train
from config import Config
from model import load_checkpoint

FLAGS = (
    "--device cpu --precision float32 --num_workers 2 --duration 1 --conv_channels 4 --gru_hidden 8 "
    "--epochs 8 --batch_size 16 --val_fraction 0.2"
).split()
MAINS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare.main,
    "train": train.main,
    "inference": inference.main,
}
OLD = "filename,emotion\nold.wav,Sad\n"  # a submission from before
CODES = {signal.SIGINT: {130, -signal.SIGINT}, signal.SIGTERM: {143, -signal.SIGTERM}}


class Child(NamedTuple):
    """A script that runs in a session of its own, so that its workers can be told from others."""

    pid: int
    log: Path

    @classmethod
    def start(cls, script: str, home: Path, data_dir: Path, *more: str) -> "Child":
        """Fork, which spares the seconds that loading torch takes."""
        argv = ["--data_dir", str(data_dir), "--device", "cpu", "--num_workers", "2", *more]
        argv += FLAGS if script != "inference" else []
        log = home / "log"
        log.write_text("")  # not that of the run before, should this one end before it has begun
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return cls(pid, log)
        os.setsid()
        os.chdir(home)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            os._exit(MAINS[script](argv))
        except BaseException:
            traceback.print_exc()
            os._exit(99)  # without unwinding what belongs to the parent

    def ended(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        """Let it run to its end."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def is_deserted(self) -> bool:
        """Whether no process of its session is left."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(") ")[2].split()[:4]
            except OSError:  # it has just ended
                continue
            if int(session) == self.pid and state not in "ZX":
                return False
        return True


def half_written(home: Path) -> set[str]:
    """Names of what is being written: temporaries, and features without their table."""
    names: set[str] = set()
    for folder in (home, home / "run", *(home / "cache").glob("*")):
        with contextlib.suppress(FileNotFoundError):
            names |= {path.name for path in folder.iterdir()}
    tables = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    features = {name for name in names if name.endswith(".f32") and name.removesuffix(".f32") not in tables}
    return features | {name for name in names if name.endswith(".tmp")}


def end_at(
    child: Child, home: Path, signum: int, rng: np.random.Generator, cost: tuple[float, int]
) -> int | None:
    """Send a signal at a random moment, or at a random one of its writes; the exit code if it was faster."""
    started, seen, before, (seconds, writes) = time.perf_counter(), 0, half_written(home), cost
    at_write = rng.random() < 0.6
    moment, wanted = rng.uniform(0, seconds), int(rng.integers(1, writes + 1))
    while (code := child.ended()) is None:
        if at_write:
            now = half_written(home)
            seen += len(now - before)
            before = now
        if seen >= wanted or (not at_write and time.perf_counter() - started > moment):
            time.sleep(rng.uniform(0, 0.001) if at_write else 0)
            # A terminal sends Ctrl-C to the workers too.
            (os.killpg if signum == signal.SIGINT else os.kill)(child.pid, signum)
            return child.wait() if signum != signal.SIGKILL else (child.wait(), None)[1]
    return code


IN_ORDER = "ended in order"


def kills(hits: Counter[tuple[str, str]]) -> int:
    """How many of the ends were by kill -9."""
    return sum(count for (_, went_on), count in hits.items() if went_on != IN_ORDER)


def describe(script: str, home: Path, stale: set[str]) -> str:
    """Say what a killed run was doing."""
    for name in sorted(half_written(home) - stale):
        what = {".f32": "features", ".tmp": "the table of features"}[Path(name).suffix]
        match = re.fullmatch(r"(.+)\.[^.]+\.\d+\.tmp", name)
        return f"{script}, writing {match[1] if match else what}"
    return f"{script}, between writes"


def epochs_of(home: Path) -> int:
    """Epochs in last.pth; -1 where there is none."""
    path = home / "run" / "last.pth"
    return load_checkpoint(path).epoch if path.exists() else -1


def history(home: Path) -> list[list[str]]:
    """Rows of history.csv without the seconds."""
    path = home / "run" / "history.csv"
    if not path.exists():
        return []
    text = path.read_text()
    assert text.endswith("\n")
    header, *rows = csv.reader(text.splitlines())
    assert all(len(row) == len(header) for row in rows)
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [row[: header.index("seconds")] for row in rows]


def check(home: Path, cfg: Config, submission: str) -> None:
    """Every file is absent, or whole; of those that change in one step, old or new."""
    best, run_dir = home / "best_emotion_model.pth", home / "run"
    n_epochs = epochs_of(home)
    if best.exists():
        assert load_checkpoint(best).epoch <= n_epochs + 1
    assert n_epochs < 0 or n_epochs - 1 <= len(history(home)) <= n_epochs
    if (run_dir / "metrics.json").exists():
        assert json.loads((run_dir / "metrics.json").read_text())["epochs"] == n_epochs
    if (run_dir / "predictions.csv").exists():
        assert (run_dir / "predictions.csv").read_text().endswith("\n")
    for path in run_dir.glob("*.png"):
        assert matplotlib.image.imread(path).size
    if (home / "submission.csv").exists():
        assert (home / "submission.csv").read_text() in {OLD, submission}
    for folder in (home / "cache").glob("*"):
        damaged = [table for table, rows in prepare._read_tables(folder, cfg) if isinstance(rows, str)]
        assert not damaged, damaged


def same(one: Any, other: Any) -> bool:
    """Whether two trees of plain types and tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def outcome(home: Path) -> dict[str, Any]:
    """Everything that a run makes, but for clock and place."""
    best, last = load_checkpoint(home / "best_emotion_model.pth"), load_checkpoint(home / "run" / "last.pth")
    state = {**last.training, "history": history(home)}
    metrics = json.loads((home / "run" / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("best_epoch", "epochs", "split", "val", "holdout")}
    predictions = (home / "run" / "predictions.csv").read_text()
    submission = (home / "submission.csv").read_text()
    return {
        "best": [best.weights, best.epoch, best.scores],
        "last": [last.weights, last.epoch, last.scores],
        "state": state,
        "files": [kept, predictions, submission],
    }


def measure(home: Path, data_dir: Path) -> dict[str, tuple[float, int]]:
    """Run everything undisturbed; seconds and number of writes of each script."""
    cost = {}
    for script in MAINS:
        child, started, writes, before = Child.start(script, home, data_dir), time.perf_counter(), 0, set()
        while (code := child.ended()) is None:
            now = half_written(home)
            writes += len(now - before)
            before = now
        assert code == 0, child.log.read_text()
        cost[script] = (time.perf_counter() - started, max(writes, 1))
    return cost


def disturb(
    home: Path,
    data_dir: Path,
    cost: dict[str, tuple[float, int]],
    *,
    submission: str,
    rng: np.random.Generator,
    n_kills: int,
) -> Counter[tuple[str, str]]:
    """Bring one corpus to a submission, though up to so many kills come in between; count where they hit."""
    hits: Counter[tuple[str, str]] = Counter()
    cfg = Config(duration=1.0)
    (home / "submission.csv").write_text(OLD)
    for script, attempts in (("prepare", 3), ("train", 18), ("inference", 2)):
        stale: set[str] = set()
        for attempt in range(attempts + 1):
            n_epochs = epochs_of(home) if script == "train" else -1
            more = ["--resume"] if n_epochs >= 0 else []
            child = Child.start(script, home, data_dir, *more)
            left = 1.1 - max(n_epochs, 0) / 8
            seconds, writes = left * cost[script][0], max(1, round(left * cost[script][1]))
            signum = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], p=[0.8, 0.1, 0.1])
            if attempt == attempts or kills(hits) >= n_kills:
                code: int | None = child.wait()
            else:
                code = end_at(child, home, int(signum), rng, (seconds, writes))
            deadline = time.perf_counter() + 5
            while not child.is_deserted():
                assert time.perf_counter() < deadline, f"{script} has left a worker"
            log = child.log.read_text()
            assert "Traceback" not in log, log
            check(home, cfg, submission)
            if n_epochs >= 0 and (first := re.search(r"^epoch +(\d+)/", log, re.MULTILINE)):
                assert int(first[1]) == n_epochs + 1, f"resumed at epoch {first[1]}, not {n_epochs + 1}"
            if code == 0:
                break
            if code is None:
                went_on = "resumed" if script == "train" and epochs_of(home) >= 0 else "started again"
                hits[describe(script, home, stale), went_on] += 1
            else:
                assert code in CODES[signal.Signals(int(signum))], (code, log)
                left = half_written(home) - stale
                assert not left, f"{left} left by {script} after signal {signum}"
                hits[f"{script}, {signal.Signals(int(signum)).name}", IN_ORDER] += 1
            stale = half_written(home)
    return hits


def main() -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="how often a script is killed [200]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prepare.SHARD_CLIPS = prepare.CHUNK = 16  # many shards and chunks, though the clips are few
    rng, started = np.random.default_rng(arguments.seed), time.perf_counter()
    hits: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        data_dir, straight = Path(scratch, "data"), Path(scratch, "straight")
        prepare.write_demo(data_dir, 3, 4, 0)
        straight.mkdir()
        cost = measure(straight, data_dir)
        expected, n_stories = outcome(straight), 0
        while (n_kills := kills(hits)) < arguments.kills:
            home = Path(scratch, str(n_stories))
            home.mkdir()
            submission, left = expected["files"][2], arguments.kills - n_kills
            hits += disturb(home, data_dir, cost, submission=submission, rng=rng, n_kills=left)
            assert same(outcome(home), expected), "not the outcome of an undisturbed run"
            litter = [*half_written(home), *home.glob(".*")]
            assert not litter, litter
            n_stories += 1
    print(f"{'stage that was hit':48} {'ends':>5}  the next run")
    for (stage, went_on), count in sorted(hits.items()):
        print(f"{stage:48} {count:5d}  {went_on}")
    print(f"{'all kill -9':48} {kills(hits):5d}  {n_stories} runs, each to the bit as the undisturbed one")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
