"""How fast it is, as ratios measured side by side in one run; speed is never part of a test.

    python tests/benchmark.py [--data_dir DIR] [--repeats N]
    python tests/benchmark.py --scale N [N ...]
    python tests/benchmark.py --target ACCURACY --data_dir DIR [flags of train.py]
    python tests/benchmark.py --original [flags of train.py]

prints a table and writes benchmark.json into the working directory. Without a data folder it measures on
the demo corpus. What is compared takes turns, after a warm-up, and the figures are medians. --scale measures
time and memory on that many synthetic clips; --target the time from a cold start to a validation accuracy,
ours against that of the original recipe; --original scores that recipe on the clips that train.py holds out.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import librosa
import numpy as np
import soundfile
import soxr
import torch
from torch import nn

from config import SPLIT_FIELDS, Config, parse_config
from inference import predict
from model import build_model, resolve_dtype
from prepare import (
    START_METHOD,
    Corpus,
    FeatureArray,
    IntArray,
    Split,
    dct_matrix,
    extract_features,
    extract_file,
    find_audio,
    iter_features,
    keep_freed_memory,
    load_audio,
    load_corpus,
    mel_bands,
    n_processes,
    split_corpus,
    write_demo,
)
from train import EarlyStopping, Outcome, Run, make_copies, make_loader, make_report, run_epoch


class Row(NamedTuple):
    """One comparison."""

    what: str
    seconds: float  # ours
    baseline: str
    baseline_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the baseline we are."""
        return self.baseline_seconds / self.seconds


def race(*runners: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each, run in turns after one warm-up."""
    times = np.empty((repeats + 1, len(runners)))
    for turn in range(repeats + 1):
        for number, runner in enumerate(runners):
            start = time.perf_counter()
            runner()
            times[turn, number] = time.perf_counter() - start
    return np.median(times[1:], axis=0).tolist()


def librosa_features(path: Path, cfg: Config) -> np.ndarray:
    """What a straightforward script does: (120, 130) float32."""
    wave, _ = librosa.load(path, sr=cfg.sample_rate)
    return librosa_of_wave(librosa.util.fix_length(wave, size=cfg.n_samples), cfg)


def librosa_of_wave(wave: np.ndarray, cfg: Config) -> np.ndarray:
    """The feature step alone."""
    mfcc = librosa.feature.mfcc(
        y=wave, sr=cfg.sample_rate, n_mfcc=cfg.n_mfcc, n_fft=cfg.n_fft, hop_length=cfg.hop_length
    )
    return np.vstack([mfcc, librosa.feature.delta(mfcc), librosa.feature.delta(mfcc, order=2)])


def bare_features(wave: torch.Tensor, cfg: Config) -> Callable[[], object]:
    """The arithmetic that no implementation can do without: FFT, mel products, logarithm, DCT."""
    frames = (
        torch.nn.functional.pad(wave, (cfg.n_fft // 2,) * 2).unfold(-1, cfg.n_fft, cfg.hop_length).clone()
    )
    power = torch.fft.rfft(frames).abs().square()
    bands = mel_bands(cfg.sample_rate, cfg.n_fft, cfg.n_mels)
    mel = torch.cat([power[:, bins] @ filters for bins, filters in bands], dim=1)
    dct = dct_matrix(cfg.n_mfcc, cfg.n_mels)

    def run() -> None:
        torch.fft.rfft(frames)
        for bins, filters in bands:
            power[:, bins] @ filters
        mel.log10()
        dct @ mel.T

    return run


def write_waves(paths: Sequence[Path], folder: Path) -> list[Path]:
    """The same clips as wav files of 48 kHz and 16 bits, as microphones and RAVDESS have them."""
    folder.mkdir()
    copies: list[Path] = []
    for number, path in enumerate(paths):
        clip, rate = soundfile.read(path)
        copies.append(folder / f"{number}.wav")
        soundfile.write(copies[-1], soxr.resample(clip, rate, 48000), 48000)
    return copies


def bare_load(path: Path, cfg: Config) -> None:
    """Decode and resample, and nothing else."""
    with soundfile.SoundFile(path) as file:
        clip = file.read(round(cfg.duration * file.samplerate), dtype="float32")
        if file.samplerate != cfg.sample_rate:
            soxr.resample(clip, file.samplerate, cfg.sample_rate, quality="HQ")


def feature_rows(paths: Sequence[Path], cfg: Config, scratch: Path, repeats: int) -> list[Row]:
    """Single clips, one thread."""
    paths = paths[:100]
    waves = [
        librosa.util.fix_length(
            load_audio(path, sample_rate=cfg.sample_rate, n_samples=cfg.n_samples)[0], size=cfg.n_samples
        )
        for path in paths
    ]
    tensors = [torch.from_numpy(wave)[None] for wave in waves]
    copies = write_waves(paths, scratch / "waves")
    bare = bare_features(tensors[0][0], cfg)
    ours, theirs, least, wav, their_wav, least_wav, step, their_step, floor = race(
        lambda: [extract_file(path, cfg) for path in paths],
        lambda: [librosa_features(path, cfg) for path in paths],
        lambda: [(bare_load(path, cfg), bare()) for path in paths],
        lambda: [extract_file(path, cfg) for path in copies],
        lambda: [librosa_features(path, cfg) for path in copies],
        lambda: [(bare_load(path, cfg), bare()) for path in copies],
        lambda: [extract_features(tensor, cfg) for tensor in tensors],
        lambda: [librosa_of_wave(wave, cfg) for wave in waves],
        lambda: [bare() for _ in paths],
        repeats=repeats,
    )
    what, copy = f"clip: {paths[0].suffix} file to features", "clip: 48 kHz wav file to features"
    return [
        Row(what, ours, "librosa.load, mfcc and two delta", theirs),
        Row(what, ours, "bare decoder, resampler and arithmetic", least),
        Row(copy, wav, "librosa.load, mfcc and two delta", their_wav),
        Row(copy, wav, "bare decoder, resampler and arithmetic", least_wav),
        Row("clip: wave to features", step, "librosa mfcc and two delta", their_step),
        Row("clip: wave to features", step, "bare FFT, mel, log and DCT", floor),
    ]


def core_rows(paths: Sequence[Path], cfg: Config, repeats: int) -> list[Row]:
    """The folder over all cores; the ratios are to be held against the number of cores.

    The second says what the machine has to give: as many processes, each with its share of the files, that
    give nothing back.
    """
    n_cores = n_processes(cfg)
    alone, bare = replace(cfg, num_workers=1), replace(cfg, num_workers=0)
    context = multiprocessing.get_context(START_METHOD)

    def apart() -> None:
        shares = [
            context.Process(target=extract_share, args=(paths[k::n_cores], bare)) for k in range(n_cores)
        ]
        for share in shares:
            share.start()
        for share in shares:
            share.join()

    ours, floor, one = race(
        lambda: list(iter_features(paths, cfg)),
        apart,
        lambda: list(iter_features(paths, alone)),
        repeats=repeats,
    )
    return [
        Row(f"{len(paths)} clips to features, {n_cores} processes", ours, "one process", one),
        Row(f"the same, {n_cores} that give nothing back", floor, "one process", one),
    ]


def extract_share(paths: Sequence[Path], cfg: Config) -> None:
    """Extract features and forget them."""
    torch.set_num_threads(1)
    for _ in iter_features(paths, cfg):
        pass


def training_rows(cfg: Config, repeats: int) -> list[Row]:
    """An epoch of train.py against forward and backward on batches that are ready."""
    corpus = load_corpus(cfg)
    indices = np.arange(len(corpus.clips))[: 10 * cfg.batch_size]
    loader = make_loader(corpus, indices, cfg.batch_size, shuffle=True)
    run = Run.start(cfg, corpus, Split(indices, indices, indices), torch.device("cpu"), 1000 * repeats)
    criterion, dtype = nn.CrossEntropyLoss(), resolve_dtype(cfg.precision, torch.device("cpu"))
    ready = [(make_copies(features, cfg), targets.repeat(cfg.ensemble)) for features, targets in loader]

    def bare() -> None:
        run.model.train()
        for features, targets in ready:
            run.model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = run.model(features)
            criterion(logits, targets).backward()

    def epoch() -> None:
        augment = functools.partial(make_copies, cfg=cfg)
        run_epoch(run.model, loader, criterion, learn=run.learn, augment=augment, dtype=dtype)

    ours, floor = race(epoch, bare, repeats=repeats)
    return [Row(f"epoch of {len(indices)} clips", ours, "bare forward and backward", floor)]


def inference_rows(paths: Sequence[Path], cfg: Config, repeats: int) -> list[Row]:
    """A folder to labels, all cores, against a loop of librosa and single forward passes."""
    model = build_model(cfg, 7).eval()

    def loop() -> None:
        with torch.inference_mode():
            for path in paths:
                model(torch.from_numpy(librosa_features(path, cfg))[None]).argmax()

    ours, theirs = race(
        lambda: list(predict(model, paths, cfg=cfg, device=torch.device("cpu"))), loop, repeats=repeats
    )
    return [
        Row(
            f"folder of {len(paths)} clips to labels, all cores",
            ours,
            "loop of librosa and batches of one",
            theirs,
        )
    ]


def start_rows(clip: Path, scratch: Path, repeats: int) -> list[Row]:
    """How long a command takes to answer, from a cold process."""

    def command(*arguments: str | Path) -> Callable[[], object]:
        words = [sys.executable, *map(str, arguments)]
        return lambda: subprocess.run(words, check=True, capture_output=True, cwd=scratch)

    command(REPO / "train.py", "--demo", "--epochs", "1")()
    answer, label, torch_alone = race(
        command(REPO / "inference.py", "--help"),
        command(REPO / "inference.py", clip.absolute()),
        command("-c", "import torch"),
        repeats=repeats,
    )
    return [
        Row("inference.py --help", answer, "import torch", torch_alone),
        Row("inference.py CLIP", label, "import torch", torch_alone),
    ]


# ---- time to an accuracy --------------------------------------------------------------------------------


class Original(nn.Module):
    """The network of the project that this one follows: 579,367 parameters with seven classes."""

    def __init__(self, n_classes: int) -> None:
        """Build the layers."""
        super().__init__()
        widths = [120, 32, 64, 128]
        self.conv = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(before, after, 3, padding=1),
                    nn.BatchNorm1d(after),
                    nn.LeakyReLU(0.1),
                    nn.MaxPool1d(2),
                )
                for before, after in pairwise(widths)
            )
        )
        self.gru = nn.GRU(128, 128, 2, batch_first=True, bidirectional=True, dropout=0.5)
        self.head = nn.Sequential(
            *(nn.Dropout(0.5), nn.Linear(256, 128), nn.BatchNorm1d(128), nn.LeakyReLU(0.1)),
            *(
                nn.Dropout(0.5),
                nn.Linear(128, 64),
                nn.LeakyReLU(0.1),
                nn.Dropout(0.5),
                nn.Linear(64, n_classes),
            ),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, 120, T) -> logits (B, C)."""
        _, last = self.gru(self.conv(features).transpose(1, 2))
        return self.head(torch.cat([last[-2], last[-1]], dim=1))


def train_original(
    features: torch.Tensor | FeatureArray, corpus: Corpus, split: Split, batch_size: int = 64
) -> Iterator[tuple[Original, float]]:
    """Train by the original recipe in a plain loop; yield network and validation accuracy after each epoch.

    Loss weighted inversely to class frequency, Adam with L2, the rate halved and training stopped on
    validation accuracy.
    """
    targets = torch.from_numpy(corpus.targets)
    counts = torch.bincount(targets[split.train])
    torch.manual_seed(0)
    model, criterion = Original(len(counts)), nn.CrossEntropyLoss(len(split.train) / (len(counts) * counts))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=3)
    rng = np.random.default_rng(0)
    stopping = EarlyStopping(10)
    while not stopping.is_over:
        model.train()
        order = rng.permutation(split.train)
        for start in range(0, len(order) - 1, batch_size):
            batch = order[start : start + batch_size]
            optimizer.zero_grad()
            criterion(model(torch.as_tensor(features[batch])), targets[batch]).backward()
            optimizer.step()
        outcome = judge_original(model, features, corpus, split.val)
        accuracy = float((outcome.predictions == outcome.targets).mean())
        scheduler.step(accuracy)
        stopping.step(accuracy)
        yield model, accuracy


def judge_original(
    model: Original, features: torch.Tensor | FeatureArray, corpus: Corpus, indices: IntArray
) -> Outcome:
    """What the network makes of some clips."""
    model.eval()
    with torch.no_grad():
        batches = np.split(indices, range(256, len(indices), 256))
        logits = torch.cat([model(torch.as_tensor(features[batch])) for batch in batches])
    return Outcome(0.0, logits.softmax(dim=1).numpy(), corpus.targets[indices])


def original_time_to(target: float, corpus: Corpus, split: Split, cfg: Config) -> tuple[float, float]:
    """Seconds of librosa clip by clip, then a plain loop, to a validation accuracy; and the accuracy then."""
    start, best = time.perf_counter(), 0.0
    features = torch.empty(len(corpus.clips), cfg.n_features, cfg.n_frames)
    for index in np.concatenate([split.train, split.val]).tolist():
        features[index] = torch.from_numpy(librosa_features(Path(corpus.clips[index].path), cfg))
    for _, accuracy in train_original(features, corpus, split):
        best = max(best, accuracy)
        print(f"original: {time.perf_counter() - start:6.0f} s  {accuracy:.1%}", flush=True)
        if best >= target:
            break
    return time.perf_counter() - start, best


def score_original(cfg: Config) -> list[dict[str, object]]:
    """The original recipe on the clips that train.py with the same flags would hold out."""
    corpus = load_corpus(cfg)
    table: list[dict[str, object]] = []
    for fold in range(cfg.folds or 1):
        split = split_corpus(corpus, cfg, fold)
        best, outcome, epoch = 0.0, None, 0
        start = time.perf_counter()
        for n_epochs, (model, accuracy) in enumerate(train_original(corpus.prepared.features, corpus, split)):
            if accuracy > best:
                best, epoch = accuracy, n_epochs + 1
                outcome = judge_original(model, corpus.prepared.features, corpus, split.holdout)
        assert outcome is not None
        report = make_report(outcome, corpus, split.holdout)
        row = {"fold": fold, "best_epoch": epoch, "minutes": (time.perf_counter() - start) / 60, "val": best}
        table.append(row | report.to_dict())
        corpora = ", ".join(f"{name} {part['accuracy']:.1%}" for name, part in report.per_corpus.items())
        scores = f"accuracy {report.overall['accuracy']:.1%}, uar {report.overall['uar']:.1%}"
        print(f"fold {fold}: {scores} ({corpora}), epoch {epoch}, validation {best:.1%}", flush=True)
    accuracies = [row["accuracy"] for row in table]
    print(f"mean accuracy {np.mean(accuracies):.2%}, standard deviation {np.std(accuracies):.2%}")
    return table


def our_time_to(target: float, flags: Sequence[str | Path], scratch: Path) -> tuple[float, float]:
    """Seconds that train.py takes from a cold start and an empty cache; and the accuracy then."""
    start, best = time.perf_counter(), 0.0
    command = [sys.executable, "-u", REPO / "train.py", "--cache_dir", scratch / "fresh", *flags]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=scratch) as process:
        for line in process.stdout or ():
            if found := re.search(r"^epoch.* val loss \S+ accuracy +([\d.]+)%", line):
                best = max(best, float(found[1]) / 100)
                print(f"ours:     {time.perf_counter() - start:6.0f} s  {best:.1%}", flush=True)
                if best >= target:
                    break
        process.terminate()
    return time.perf_counter() - start, best


def measure_race(target: float, data_dir: Path, flags: Sequence[str], scratch: Path) -> dict[str, float]:
    """Ours and the original, one after the other, to the same validation accuracy on the same clips."""
    cfg = Config(data_dir=str(data_dir.absolute()), cache_dir=str(scratch / "cache"), device="cpu")
    given = parse_config(flags)
    cfg = replace(cfg, **{name: getattr(given, name) for name in SPLIT_FIELDS})
    seconds, accuracy = our_time_to(target, ["--data_dir", cfg.data_dir, *flags], scratch)
    corpus = load_corpus(cfg)
    theirs, their_accuracy = original_time_to(target, corpus, split_corpus(corpus, cfg), cfg)
    print(
        f"ours {seconds:.0f} s ({accuracy:.1%}), original {theirs:.0f} s ({their_accuracy:.1%}): "
        f"{theirs / seconds:.1f} x"
    )
    return {
        "seconds": seconds,
        "accuracy": accuracy,
        "their_seconds": theirs,
        "their_accuracy": their_accuracy,
    }


# ---- scale ----------------------------------------------------------------------------------------------

# Short clips and small features, so that the numbers of clips are large and not the bytes.
SMALL = (
    "--sample_rate 8000 --duration 0.3 --n_fft 256 --hop_length 128 --n_mels 40 --n_mfcc 13 --batch_size 512 "
    "--epochs 1 --conv_channels 4 --conv_blocks 2 --gru_hidden 16 --gru_layers 1"
)


class Usage(NamedTuple):
    """What a command took."""

    seconds: float
    megabytes: float  # most memory of its own at any time, all its processes; mapped files are not counted


def usage(command: Sequence[str | Path]) -> Usage:
    """Run a command and watch its memory, as Linux tells it."""
    start, most = time.perf_counter(), 0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, sum(map(_kilobytes, _family(process.pid))))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return Usage(time.perf_counter() - start, most / 1024)


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = [
            int(child)
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except OSError:  # it has ended
        return []
    return [pid, *(member for child in children for member in _family(child))]


def _kilobytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def write_noise(folder: Path, n_clips: int) -> None:
    """Write 0.1 s clips in four classes."""
    rng = np.random.default_rng(0)
    for number in range(n_clips):
        parent = folder / f"class{number % 4}"
        if number < 4:
            parent.mkdir(parents=True)
        with wave.open(str(parent / f"spk{number % 500:03d}_take{number:07d}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(rng.integers(-9000, 9000, 800, dtype=np.int16).tobytes())


def measure_scale(sizes: Sequence[int], scratch: Path) -> list[dict[str, float]]:
    """Fill the cache, find it filled, train an epoch: seconds and memory for each number of clips."""
    table: list[dict[str, float]] = []
    for n_clips in sizes:
        home = scratch / str(n_clips)
        write_noise(home / "data", n_clips)
        places = ("data_dir", "cache_dir", "run_dir", "checkpoint")
        flags = [*SMALL.split(), *(word for name in places for word in (f"--{name}", home / name[:-4]))]
        row: dict[str, float] = {"clips": n_clips}
        for step, script in (("fill", "prepare.py"), ("find", "prepare.py"), ("train", "train.py")):
            used = usage([sys.executable, REPO / script, *flags])
            row |= {f"{step}_seconds": used.seconds, f"{step}_megabytes": used.megabytes}
            print(
                f"{n_clips:9,} clips  {step:5}  {used.seconds:7.1f} s  {used.megabytes:6.0f} MB", flush=True
            )
        table.append(row)
    for step in ("fill", "find", "train") if len(table) > 1 else ():
        first, last = table[0], table[-1]
        slope = (last[f"{step}_megabytes"] - first[f"{step}_megabytes"]) / (last["clips"] - first["clips"])
        print(f"{step:5}: {1024 * slope:.2f} kB more memory per clip")
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, help="class folders; none: the demo corpus")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=int, nargs="+", metavar="N", help="numbers of synthetic clips")
    parser.add_argument("--target", type=float, help="validation accuracy to race the original recipe to")
    parser.add_argument("--original", action="store_true", help="score the original recipe")
    arguments, flags = parser.parse_known_args()
    if flags and not (arguments.original or arguments.target):  # a misspelt --data_dir would measure the demo
        parser.error(f"unknown arguments {' '.join(flags)}")
    if arguments.target and not arguments.data_dir:
        parser.error("--target needs --data_dir")
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.original:
        if arguments.data_dir:
            flags += ["--data_dir", str(arguments.data_dir)]
        cfg = parse_config(flags)
        if not cfg.holdout_fraction and not cfg.folds:
            parser.error("--original scores held-out clips: holdout_fraction must not be 0")
        write_json({"config": cfg.to_dict(), "original": score_original(cfg)})
        return
    if arguments.scale:
        with tempfile.TemporaryDirectory() as scratch:
            write_json({"scale": measure_scale(arguments.scale, Path(scratch))})
        return
    if arguments.target:
        with tempfile.TemporaryDirectory() as scratch:
            write_json(measure_race(arguments.target, arguments.data_dir, flags, Path(scratch)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = arguments.data_dir or Path(scratch, "demo")
        if not arguments.data_dir:
            write_demo(data_dir, n_speakers=10, n_takes=9, seed=0)
        cfg = Config(data_dir=str(data_dir), cache_dir=str(Path(scratch, "cache")), device="cpu")
        every = [Path(path) for path in find_audio(data_dir)]
        paths = every[:: max(1, len(every) // 600)]
        keep_freed_memory()  # as the workers do; the baselines in this process profit too
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows = feature_rows(paths, cfg, Path(scratch), arguments.repeats)
        rows += core_rows(every[:: max(1, len(every) // 6000)], cfg, arguments.repeats)
        torch.set_num_threads(threads)
        rows += inference_rows(paths, cfg, arguments.repeats)
        rows += training_rows(cfg, arguments.repeats)
        rows += start_rows(paths[0], Path(scratch), arguments.repeats)
    for row in rows:
        theirs = f"{row.baseline} ({row.baseline_seconds:.3f} s)"
        print(f"{row.what:42} {row.seconds:8.3f} s  {row.ratio:5.2f} x  {theirs}")
    write_json(
        {
            "corpus": arguments.data_dir.name if arguments.data_dir else "synthetic demo corpus",
            "repeats": arguments.repeats,
            "rows": [{**row._asdict(), "ratio": row.ratio} for row in rows],
        }
    )


def write_json(content: dict[str, object]) -> None:
    """Keep the results, with what they were measured on."""
    machine = {"cores": os.cpu_count(), "torch": torch.__version__}
    Path("benchmark.json").write_text(json.dumps(machine | content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
