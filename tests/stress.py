"""Looks for rare faults by chance, for minutes; run by hand, on Linux.

    python tests/stress.py --kills 200     kill -9 at random moments of preparing, training and labelling
    python tests/stress.py --files 10000   extract the features of damaged audio files of many formats

prints a small table, and exits with 1 at what must not happen. An equal --seed draws the same files, and the
same moments as far as a machine allows.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure  # noqa: F401 - a process forked from one that has all packages starts in no time
import numpy as np
import pandas as pd
import sklearn.metrics
import sklearn.model_selection  # noqa: F401
import soundfile
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from config import Config, UserError, note, run
from model import load_tensors
from prepare import AUDIO_SUFFIXES, MFCC, AudioError, extract, map_files, mfcc_constants

# ---- kills -----------------------------------------------------------------------------------------------

COMMON = "--data_dir ../data --num_workers 2"
TINY = "--sample_rate 8000 --duration 0.3 --n_fft 256 --hop_length 128 --n_mels 20 --n_mfcc 8"
FLAGS = {
    "prepare": TINY,
    "train": f"{TINY} --conv_channels 4 --conv_blocks 2 --gru_hidden 4 --epochs 8 --min_steps 1 --device cpu "
    "--precision float32 --learning_rate 0.01",
    "inference": "--device cpu",
}
VARIANTS = ("--ensemble 1", "--ensemble 2 --seed 1")  # in one process, and each network in its own
ALONE = {"prepare": 0.7, "train": 0.05, "inference": 0.7}  # share of the starts that nothing disturbs


def write_corpus(folder: Path) -> None:
    """Write 4 classes of 100 short clips, hard to tell apart, and 40 clips to label."""
    rng, seconds = np.random.default_rng(0), np.arange(2400) / 8000
    emotions = ["Angry", "Happy", "Neutral", "Sad"]
    for number in range(440):
        parent = folder / ("Test" if number >= 400 else emotions[number % 4])
        parent.mkdir(parents=True, exist_ok=True)
        tone = 0.2 * np.sin(2 * np.pi * (300 + 60 * (number % 4)) * seconds)
        soundfile.write(parent / f"{number}.wav", tone + 0.2 * rng.normal(size=2400), 8000)


def start(script: str, home: Path, flags: str) -> BaseProcess:
    """Start a script as its command line does, in a session of its own to tell its workers from others."""
    (home / "log").write_bytes(b"")
    words = f"{COMMON} {FLAGS[script]} {flags if script == 'train' else ''}".split()
    process = multiprocessing.get_context("fork").Process(target=_be, args=(script, home, words))
    process.start()
    return process


def _be(script: str, home: Path, flags: Sequence[str]) -> None:
    os.setsid()
    os.chdir(home)
    log = os.open("log", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [f"{script}.py", *flags]
    runpy.run_path(str(REPO / f"{script}.py"), run_name="__main__")


def expect(is_right: bool, fault: str, home: Path) -> None:
    """Stop at a fault, and leave what was found where it can be looked at."""
    if not is_right:
        kept = shutil.copytree(home, tempfile.mkdtemp(prefix="stress-"), dirs_exist_ok=True)
        for line in (home / "log").read_text().splitlines()[-20:]:
            note(line)
        raise UserError(f"{fault}; kept in {kept}", code=1)


def files(home: Path) -> set[tuple[str, int]]:
    """Name, without process id, and time of all that the scripts write, drafts and journals included."""
    found = set()
    for path in itertools.chain(home.glob("*.*"), home.glob("run/*.*"), home.glob("cache/*.*")):
        with contextlib.suppress(FileNotFoundError):
            found.add((re.sub(r"[.]\d+[.]tmp$", ".tmp", path.name), path.stat().st_mtime_ns))
    return found


class Usual(NamedTuple):
    """How a script runs when nothing disturbs it."""

    seconds: float
    names: list[str]  # of the files that it wrote, drafts included


def watch(script: str, home: Path, flags: str) -> Usual:
    """Run a script undisturbed."""
    before, started, names = files(home), time.monotonic(), set[str]()
    process = start(script, home, flags)
    while process.is_alive():
        names |= {name for name, _ in files(home) - before}
        time.sleep(0.0005)
    expect(process.exitcode == 0, f"{script} failed", home)
    return Usual(time.monotonic() - started, sorted(names))


def kill_at_random(process: BaseProcess, home: Path, usual: Usual, rng: np.random.Generator) -> bool:
    """Kill -9 at a random moment, or while a random file is being written; False if the run was faster."""
    before, started, moment = files(home), time.monotonic(), rng.uniform(0, usual.seconds)
    target = str(rng.choice(usual.names)) if usual.names and rng.random() < 0.6 else ""
    if target and "network" not in target:  # the others are written but once
        moment = 0.0
    while process.is_alive():
        is_time = time.monotonic() - started >= moment
        if is_time and (not target or target in {name for name, _ in files(home) - before}):
            time.sleep(rng.uniform(0, 0.002) if target.endswith(".tmp") else 0)
            process.kill()  # its workers are left to end by themselves
            process.join()
            return process.exitcode == -signal.SIGKILL
        time.sleep(0.0005)
    return False


def wait_for_all(process: BaseProcess, home: Path) -> None:
    """Wait until a script has ended, and what it started as well."""
    process.join(600)
    for _ in range(200):
        ps = subprocess.run(["ps", "-o", "stat=", "-s", str(process.pid)], capture_output=True, check=False)
        if all(state.startswith("Z") for state in ps.stdout.decode().split()):
            return
        time.sleep(0.1)
    expect(False, "a script hangs, or has left a worker", home)


def check_files(home: Path) -> None:
    """Every file under its final name is whole."""
    for path in home.rglob("[!.]*.*"):
        match path.suffix:
            case ".pth":
                load_tensors(path)
            case ".json":
                json.loads(path.read_text())
            case ".csv":
                is_whole = path.read_bytes().endswith(b"\n") and len(pd.read_csv(path)) > 0
                expect(is_whole, f"half of {path}", home)
            case ".png":
                expect(path.read_bytes().endswith(b"IEND\xaeB`\x82"), f"half of {path}", home)


def outcome(home: Path) -> dict[str, Any]:
    """All that a run makes, but for clock and name."""
    best = load_tensors(home / "best_emotion_model.pth")
    history = pd.read_csv(home / "run" / "history.csv", dtype=str).drop(columns="seconds")
    content = {"epochs": best["epochs"], "clips": best["n_clips"], "history": history.to_csv(index=False)}
    for number, weights in enumerate([best["mfcc"], *best["members"]]):
        content |= {
            f"{number} {name}": tensor.to_dense().numpy().tobytes() for name, tensor in weights.items()
        }
    files = (home / "submission.csv", home / "run" / "predictions.csv")
    return content | {file.name: file.read_text() for file in files}


def epochs_done(home: Path) -> dict[int, int]:
    """Epochs that each network has behind it."""
    files = (home / "run").glob("network*.pth")
    return {int(file.stem[7:]): len(load_tensors(file)["history"]) for file in files}


def epochs_begun(home: Path) -> dict[int, int]:
    """The first epoch of each network in the latest run, as its log says."""
    lines = re.findall(r"^network (\d+)  epoch +(\d+)/", (home / "log").read_text(), re.MULTILINE)
    return {int(network): int(epoch) for network, epoch in reversed(lines)}


def go_through(
    script: str, home: Path, flags: str, *, usual: Usual, rng: np.random.Generator, n_kills: int
) -> Counter[tuple[str, str]]:
    """Bring a script to its end though it is killed, up to so many times; counts where the kills hit."""
    hits: Counter[tuple[str, str]] = Counter()
    safe = [home / "best_emotion_model.pth", home / "submission.csv"]  # there for ever once they were there
    about, goes_on = home / "run" / "run.json", False  # training begins anew, and sets an earlier run aside
    earlier = about.read_bytes() if about.exists() else b""
    while True:
        done = epochs_done(home) if goes_on else {}
        there, before = [path for path in safe if path.exists()], files(home)
        process = start(script, home, f"{flags} {'--resume' if goes_on else ''}")
        wants = hits.total() < n_kills and rng.random() > ALONE[script]
        is_killed = wants and kill_at_random(process, home, usual, rng)
        wait_for_all(process, home)
        expect("Traceback" not in (home / "log").read_text(), f"{script} crashed", home)
        expect(all(path.exists() for path in there), f"one of {there} is gone", home)
        check_files(home)
        for network, epoch in epochs_begun(home).items():
            right = done.get(network, 0) + 1
            expect(epoch == right, f"network {network} went on at epoch {epoch}, not {right}", home)
        if not is_killed:
            expect(process.exitcode == 0, f"{script} ended with {process.exitcode}", home)
            return hits
        drafts = sorted(name for name, _ in files(home) - before if name.endswith((".tmp", "-journal")))
        where = re.sub(r"^\.|\.tmp$|-\w+\.\w+-journal$|\d", "", drafts[0]) if drafts else ""
        is_ours = script == "train" and about.exists() and about.read_bytes() != earlier
        goes_on = is_ours and rng.random() < 0.75
        where = f"{script}, {f'writing {where}' if where else 'between writes'}"
        hits[where, "resumed" if goes_on else "started again"] += 1
        for draft in home.rglob(".*.tmp"):
            os.utime(draft, (0, 0))  # the next run removes what is older than a minute


def kill(n_kills: int, seed: int) -> None:
    """Kill that often, and print where it hit; runs of two kinds take turns in one folder.

    Raises:
        UserError: A run does not go on, or makes something else than an undisturbed one.
    """
    rng, hits, started, n_runs = np.random.default_rng(seed), Counter[tuple[str, str]](), time.monotonic(), 0
    torch.set_num_threads(1)  # a forked process has none of its parent's other threads
    with tempfile.TemporaryDirectory() as scratch:
        write_corpus(Path(scratch, "data"))
        usual, expected = [], []
        for flags in VARIANTS:
            straight = Path(scratch, flags)
            straight.mkdir()
            usual.append({script: watch(script, straight, flags) for script in ALONE})
            expected.append(outcome(straight))
        home = Path(scratch, "home")
        home.mkdir()
        while hits.total() < n_kills:
            shutil.rmtree(home / "cache", ignore_errors=True)
            for folder in home.glob("run_2*"):  # earlier runs that were set aside
                shutil.rmtree(folder)
            kind = n_runs % len(VARIANTS)
            for script in ALONE:
                left = n_kills - hits.total()
                hits += go_through(
                    script, home, VARIANTS[kind], usual=usual[kind][script], rng=rng, n_kills=left
                )
            made = outcome(home)
            other = sorted(
                name for name in made.keys() | expected[kind] if made.get(name) != expected[kind].get(name)
            )
            expect(not other, f"not as in the undisturbed run: {', '.join(other[:5])}", home)
            drafts = [path for path in home.rglob(".*.tmp") if not path.parent.name.startswith("run_2")]
            expect(not drafts, "a draft is left", home)
            n_runs += 1
    print(f"{'what the kill hit':40}{'kills':>6}  the next run")
    for (where, following), count in sorted(hits.items()):
        print(f"{where:40}{count:6}  {following}")
    print(f"{'all':40}{hits.total():6}  {n_runs} runs, each to the bit as undisturbed")
    print(f"{time.monotonic() - started:.0f} s")


# ---- damaged files ---------------------------------------------------------------------------------------

MOST_SECONDS = 1.0  # of processor time for a file
MOST_MEGABYTES = 200.0  # by which a file may raise the most memory that a worker has had
HUNG = 10  # seconds after which a worker is killed

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62]
WORDS = [b"\x7f\xff\xff\xff", b"\x7f\x7f\xff\xff", b"\x7f\xc0\x00\x00", b"\x7f\x80\x00\x00", bytes(4)]


def make_honest_files(folder: Path, rng: np.random.Generator) -> list[tuple[str, str, bytes]]:
    """Format, suffix and content of short files, in all that libsndfile writes, of one channel and of two."""
    files = []
    for name in sorted(soundfile.available_formats().keys() - {"RAW", "SD2"}):  # no header, or apart
        # It looks at the content, so any format can hide behind .wav.
        suffix = f".{name.lower()}" if f".{name.lower()}" in AUDIO_SUFFIXES else ".wav"
        for subtype, channels in itertools.product(soundfile.available_subtypes(name), (1, 2)):
            rate = int(rng.choice([8000, 16000, 48000]))
            seconds = np.arange(round(rng.uniform(0.1, 0.4) * rate))[:, None] / rate
            tone = 0.4 * np.sin(4000 * seconds) + 0.02 * rng.normal(size=(len(seconds), channels))
            with contextlib.suppress(soundfile.SoundFileError):  # some have one channel, or 8,000 Hz
                soundfile.write(folder / "honest", tone, rate, subtype, format=name)
                files.append((name, suffix, (folder / "honest").read_bytes()))
    return files


def mutate(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Damage a file in one way or a few; half of the damage is in its header."""

    def place(size: int) -> int:
        return int(rng.integers(min(size, 128 if rng.random() < 0.5 else size) + 1))

    is_ogg = content.startswith(b"OggS")
    for _ in range(rng.geometric(0.6)):
        at, word = place(len(content)), WORDS[rng.integers(len(WORDS))][:: rng.choice([1, -1])]
        number, width = int(rng.choice(EXTREMES)) + int(rng.integers(-1, 2)), 2 ** int(rng.integers(4))
        field = (number % 256**width).to_bytes(width, "big" if rng.random() < 0.5 else "little")
        match rng.integers(8):
            case 0:  # one bit
                flipped = bytes(byte ^ 1 << int(rng.integers(8)) for byte in content[at : at + 1])
                content = content[:at] + flipped + content[at + 1 :]
            case 1 | 2:  # an extreme number
                content = content[:at] + field + content[at + width :]
            case 3:
                content = content[:at]
            case 4:  # some bytes more
                content = content[:at] + rng.bytes(int(rng.integers(1, 64))) + content[at:]
            case 5:  # some bytes less
                content = content[:at] + content[at + int(rng.integers(1, 64)) :]
            case 6:  # the end of another file
                content = content[:at] + other[place(len(other)) :]
            case 7:  # a run of the largest, infinite or undefined numbers, or of zeros
                run_ = word * int(rng.integers(1, 500))
                content = content[:at] + run_ + content[at + len(run_) :]
    return mend_ogg(content) if is_ogg and rng.random() < 0.8 else content


def mend_ogg(content: bytes) -> bytes:
    """Give every page its right checksum: a decoder sees nothing of a page with a wrong one."""
    out = bytearray(content)
    start = out.find(b"OggS")
    while start >= 0 and start + 27 <= len(out):
        end = start + 27 + out[start + 26] + sum(out[start + 27 : start + 27 + out[start + 26]])
        out[start + 22 : start + 26] = bytes(4)
        crc = 0
        for byte in out[start:end]:
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
        out[start + 22 : start + 26] = crc.to_bytes(4, "little")
        start = out.find(b"OggS", start + 27)
    return bytes(out)


class Verdict(NamedTuple):
    """What became of one file."""

    kind: str  # used, warned or refused; or a fault
    text: str = ""
    seconds: float = 0.0  # of processor time
    megabytes: float = 0.0  # by which it raised the most memory that the worker has had


KINDS = ("used", "warned", "refused", "crashed or hung", "raised", "not finite", "slow", "large")


def examine(paths: Sequence[str], mfcc: MFCC, cfg: Config) -> list[Verdict]:
    """Extract files one by one, in a worker, and judge what comes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    verdicts = []
    for path in paths:
        most, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        signal.alarm(HUNG)
        try:
            clip = extract(Path(path), mfcc, cfg)
            kind, text = ("warned" if clip.warning else "used"), clip.warning
            is_whole = clip.features.shape[1:] == (cfg.n_features, cfg.n_frames) and clip.seconds > 0
            kind = kind if is_whole and np.isfinite(clip.features).all() else "not finite"
        except AudioError as error:
            kind, text = "refused", str(error)
        except Exception as error:
            kind, text = "raised", repr(error)
        signal.alarm(0)
        seconds = time.process_time() - started
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) / 1024
        kind = "large" if megabytes > MOST_MEGABYTES else "slow" if seconds > MOST_SECONDS else kind
        verdicts.append(Verdict(kind, text, seconds, megabytes))
    return verdicts


def fuzz(n_files: int, seed: int) -> None:
    """Extract that many damaged files, and print what became of them by format.

    Raises:
        UserError: A file does what it must not.
    """
    rng, cfg = np.random.default_rng(seed), Config(num_workers=2)
    work = partial(examine, mfcc=MFCC(mfcc_constants(cfg), cfg.hop_length), cfg=cfg)
    rows: list[tuple[str, Verdict]] = []
    kept: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        honest = make_honest_files(Path(scratch), rng)
        formats = sorted({name for name, _, _ in honest})
        for first in range(0, n_files, 512):
            names: dict[str, str] = {}
            for number in range(first, min(first + 512, n_files)):
                name = formats[number % len(formats)]
                alike = [file for file in honest if file[0] == name]
                _, suffix, content = alike[rng.integers(len(alike))]
                other = honest[rng.integers(len(honest))][2]
                path = Path(scratch, f"{number}{suffix}")
                path.write_bytes(mutate(content, other, rng)[: 1 << 20])
                names[str(path)] = name
            verdicts = dict(zip(names, map_files(work, list(names), cfg), strict=True))
            for name, verdict in verdicts.items():
                if isinstance(verdict, AudioError):  # of the files that were read with it, which was it?
                    (alone,) = map_files(work, [name], cfg)
                    verdicts[name] = Verdict("crashed or hung") if isinstance(alone, AudioError) else alone
            rows += [(names[name], verdict) for name, verdict in verdicts.items()]
            for name, verdict in verdicts.items():
                if verdict.kind not in KINDS[:3]:
                    kept.append(f"{tempfile.gettempdir()}/stress-{seed}-{Path(name).name}")
                    shutil.copy(name, kept[-1])
                    note(f"{kept[-1]}: {verdict.kind}: {verdict.text}")
                Path(name).unlink()
    print_verdicts(rows)
    if kept:
        raise UserError(f"{len(kept)} of {n_files} files did what none must", code=1)


def print_verdicts(rows: Sequence[tuple[str, Verdict]]) -> None:
    """Lay out what became of the files, a row per format."""
    table = pd.DataFrame([{"format": name, **verdict._asdict()} for name, verdict in rows])
    table = pd.concat([table, table.assign(format="all")])
    counts = pd.crosstab(table.format, table.kind).reindex(columns=KINDS, fill_value=0)
    most = table.groupby("format")[["seconds", "megabytes"]].max().round(2).add_prefix("most ")
    print(counts.join(most).loc[list(dict.fromkeys(table.format))].rename_axis(index=None).to_string())


def main(flags: argparse.Namespace) -> int:
    """Kill, damage, or both."""
    if flags.files:
        fuzz(flags.files, flags.seed)
    if flags.kills:
        kill(flags.kills, flags.seed)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, help="how often a script is killed")
    parser.add_argument("--files", type=int, default=0, help="how many damaged files are read")
    parser.add_argument("--seed", type=int, default=0)
    ARGS = parser.parse_args()
    if not ARGS.kills and not ARGS.files:
        parser.error("give --kills N, --files N, or both")
    raise SystemExit(run(main, ARGS))
