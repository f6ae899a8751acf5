"""How fast it is and how good, each figure beside a baseline that is measured in the same run.

    python tests/benchmark.py                the speed: a table of ratios
    python tests/benchmark.py --original     the accuracy of the original recipe on the clips that we test on

takes the flags of train.py, --data_dir and --demo among them. What is compared takes turns, after a warm-up,
and the figures are medians.
"""

import argparse
import copy
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import librosa
import numpy as np
import pandas as pd
import soundfile
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from config import Config, UserError, make_parser, parse, run
from inference import Recognizer
from model import (
    Checkpoint,
    Distance,
    EmotionCNNGRU,
    EmotionEnsemble,
    Voices,
    save_checkpoint,
)
from prepare import (
    MFCC,
    FeatureCache,
    FloatArray,
    extract,
    find_clips,
    load_corpus,
    load_features,
    make_demo,
    mfcc_constants,
    split,
)
from train import class_weights, describe_split, fit, make_loader


class Row(NamedTuple):
    """One comparison."""

    what: str
    seconds: float
    baseline: str
    baseline_seconds: float


def race(*runners: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each, run in turns after one warm-up."""
    times = np.empty((repeats + 1, len(runners)))
    for turn in range(repeats + 1):
        for number, runner in enumerate(runners):
            started = time.perf_counter()
            runner()
            times[turn, number] = time.perf_counter() - started
    return list(np.median(times[1:], axis=0))


# ---- baselines -------------------------------------------------------------------------------------------


def librosa_features(path: str, cfg: Config) -> FloatArray:
    """What a plain script does with a clip: (120, 130) float32 of its first 3 seconds."""
    wave, _ = librosa.load(path, sr=cfg.sample_rate, duration=cfg.duration)
    return librosa_of_wave(librosa.util.fix_length(wave, size=cfg.n_samples), cfg)


def librosa_of_wave(wave: FloatArray, cfg: Config) -> FloatArray:
    """MFCC and its two derivatives."""
    mfcc = librosa.feature.mfcc(
        y=wave, sr=cfg.sample_rate, n_mfcc=cfg.n_mfcc, n_fft=cfg.n_fft, hop_length=cfg.hop_length
    )
    return np.vstack([mfcc, librosa.feature.delta(mfcc), librosa.feature.delta(mfcc, order=2)])


@torch.inference_mode()
def plain_loop(paths: Sequence[str], model: EmotionEnsemble, cfg: Config) -> None:
    """Label clips one by one."""
    for path in paths:
        model(torch.from_numpy(librosa_features(path, cfg))[None]).probabilities.argmax()


# ---- the comparisons -------------------------------------------------------------------------------------


def feature_rows(paths: Sequence[str], mfcc: MFCC, cfg: Config, *, scratch: Path, repeats: int) -> list[Row]:
    """One clip after the other, one thread, the first 3 seconds on either side."""
    cfg = replace(cfg, max_windows=1)
    waves, copies = [], []
    for number, path in enumerate(paths):
        wave, rate = librosa.load(path, sr=None, duration=cfg.duration)
        copies.append(str(scratch / f"{number}.wav"))  # 16 bits at 48 kHz, as microphones have it
        soundfile.write(copies[-1], librosa.resample(wave, orig_sr=rate, target_sr=48000), 48000)
        wave = librosa.resample(wave, orig_sr=rate, target_sr=cfg.sample_rate)
        waves.append(librosa.util.fix_length(wave, size=cfg.n_samples))
    kind = Path(paths[0]).suffix.removeprefix(".")
    pairs: dict[str, tuple[Callable[[], object], str, Callable[[], object]]] = {
        "wave to features": (
            lambda: [mfcc(torch.from_numpy(wave)[None]) for wave in waves],
            "librosa: mfcc, 2 x delta",
            lambda: [librosa_of_wave(wave, cfg) for wave in waves],
        ),
        f"{kind} file to features": (
            lambda: [extract(Path(path), mfcc, cfg) for path in paths],
            "librosa: load, mfcc, 2 x delta",
            lambda: [librosa_features(path, cfg) for path in paths],
        ),
        "48 kHz wav file to features": (
            lambda: [extract(Path(path), mfcc, cfg) for path in copies],
            "librosa: load, mfcc, 2 x delta",
            lambda: [librosa_features(path, cfg) for path in copies],
        ),
    }
    rows = []
    for what, (ours, baseline, theirs) in pairs.items():
        seconds = race(ours, theirs, repeats=repeats)
        rows.append(Row(f"{what}, {len(paths)} clips", seconds[0], baseline, seconds[1]))
    return rows


def process_row(clips: pd.DataFrame, mfcc: MFCC, cfg: Config, *, scratch: Path, repeats: int) -> Row:
    """Fill a new cache, with two processes and with one."""

    def fill(n_workers: int) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            load_features(clips, replace(cfg, cache_dir=folder, num_workers=n_workers), mfcc)

    two, one = race(lambda: fill(2), lambda: fill(1), repeats=repeats)
    return Row(f"{len(clips)} files into the cache, two processes", two, "one process", one)


def training_row(clips: pd.DataFrame, mfcc: MFCC, cfg: Config, *, scratch: Path, repeats: int) -> Row:
    """Epochs of one network as they are trained, and after each the same steps without all that is around."""
    parts = clips.assign(part=split(clips, cfg)).groupby("part")
    few = pd.concat([parts.get_group("train").head(20 * cfg.batch_size), parts.get_group("val").head(160)])
    cfg = replace(cfg, epochs=repeats + 1, patience=repeats + 1, min_steps=1, run_dir=str(scratch / "run"))
    train_clips, labels = few[few.part == "train"], sorted(set(few.emotion))
    ready = list(make_loader(train_clips.assign(n_windows=1), labels, FeatureCache(cfg, mfcc), cfg))
    model, criterion = EmotionCNNGRU(cfg, len(labels)), nn.CrossEntropyLoss()
    dtype = getattr(torch, cfg.precision)
    ours, bare = [], []

    def forward_and_backward(row: dict[str, float]) -> None:
        ours.append(row["seconds"])
        started = time.perf_counter()
        for batch in ready:
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(batch.features)
            criterion(logits, batch.targets).backward()
        bare.append(time.perf_counter() - started)

    fit(cfg, few, mfcc, on_epoch=forward_and_backward)
    what = f"epoch of {len(train_clips)} clips, and validation ({cfg.precision})"
    return Row(what, float(np.median(ours[1:])), "bare forward and backward", float(np.median(bare[1:])))


def label_row(
    paths: Sequence[str], checkpoint: Path, model: EmotionEnsemble, cfg: Config, *, repeats: int
) -> Row:
    """A folder to labels; ours takes in all of a clip, the loop its first 3 seconds."""
    two, n_networks = Recognizer(checkpoint, device="cpu", num_workers=2), len(model.members)
    ours, loop = race(
        lambda: list(two.predict_files(paths)), lambda: plain_loop(paths, model, cfg), repeats=repeats
    )
    what = f"{len(paths)} files to labels, networks: {n_networks}, processes: 2"
    return Row(what, ours, "loop of librosa, batches of one", loop)


def start_rows(clip: str, checkpoint: Path, *, repeats: int) -> list[Row]:
    """How long a command takes to answer, from a cold process."""

    def command(*arguments: str | Path) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    script = REPO / "inference.py"
    answer, label, torch_alone, python = race(
        command(script, "--help"),
        command(script, clip, "--checkpoint", checkpoint, "--device", "cpu"),
        command("-c", "import torch"),
        command("-c", "pass"),
        repeats=repeats,
    )
    return [
        Row("inference.py CLIP", label, "python -c 'import torch'", torch_alone),
        Row("inference.py --help", answer, "python -c pass", python),
    ]


def measure_speed(cfg: Config, repeats: int) -> Iterator[Row]:
    """All comparisons; on the CPU, in a folder that is removed afterwards."""
    cfg, threads = replace(cfg, device="cpu", batch_size=64), torch.get_num_threads()
    mfcc = MFCC(mfcc_constants(cfg), cfg.hop_length)
    found = find_clips(cfg).sample(frac=1, random_state=0, ignore_index=True)
    paths = found.path.tolist()
    labels = sorted(set(found.emotion))
    # NumPy's threads slow librosa down more than they help, and on a busy machine many times over.
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1, user_api="blas"):
        scratch = Path(folder)
        torch.set_num_threads(1)
        yield from feature_rows(paths[:50], mfcc, cfg, scratch=scratch, repeats=repeats)
        yield process_row(found[:500], mfcc, cfg, scratch=scratch, repeats=repeats)
        clips, precisions = load_corpus(cfg, mfcc), ("float32", "bfloat16")
        for own in (replace(cfg, precision=p) for p in precisions if cfg.precision in ("auto", p)):
            yield training_row(clips, mfcc, own, scratch=scratch, repeats=repeats)
        torch.set_num_threads(threads)
        for n_networks in sorted({1, cfg.ensemble}):
            own = replace(cfg, ensemble=n_networks)
            model = save_random_model(scratch / f"{n_networks}.pth", own, labels, mfcc)
            yield label_row(paths[:100], scratch / f"{n_networks}.pth", model, own, repeats=repeats)
        yield from start_rows(paths[0], scratch / f"{cfg.ensemble}.pth", repeats=repeats)


def save_random_model(path: Path, cfg: Config, labels: list[str], mfcc: MFCC) -> EmotionEnsemble:
    """A model that has learnt nothing, as fast as one that has."""
    networks = [EmotionCNNGRU(cfg, len(labels)) for _ in range(cfg.ensemble)]
    checkpoint = Checkpoint(
        config=cfg,
        labels=labels,
        mfcc=dict(mfcc.state_dict()),
        members=[dict(network.state_dict()) for network in networks],
        epochs=[0] * cfg.ensemble,
        n_clips=dict.fromkeys(labels, 0),
        temperature=1.0,
        distance=dict(Distance(cfg).state_dict()),
        voices=dict(Voices(cfg).state_dict()),
        shifts=torch.zeros(len(labels), cfg.n_features, 1),
        seen=torch.empty(0, dtype=torch.int64),
        environment={},
        run="benchmark",
    )
    save_checkpoint(path, checkpoint)
    return EmotionEnsemble(mfcc, networks, Distance(cfg), Voices(cfg)).eval()


# ---- the original recipe ---------------------------------------------------------------------------------

LEARNING_RATE, WEIGHT_DECAY, BATCH, DROPOUT, SLOPE = 1e-3, 1e-4, 64, 0.5, 0.1
EPOCHS, PATIENCE, LR_FACTOR, LR_PATIENCE = 60, 10, 0.5, 5


class Original(nn.Module):
    """The network of the project that this one follows: 579,367 parameters with seven classes."""

    def __init__(self, n_classes: int) -> None:
        """Build the layers."""
        super().__init__()
        blocks = [
            [
                nn.Conv1d(before, after, 3, padding=1),
                nn.BatchNorm1d(after),
                nn.LeakyReLU(SLOPE),
                nn.MaxPool1d(2),
            ]
            for before, after in pairwise([120, 32, 64, 128])
        ]
        self.conv = nn.Sequential(*(layer for block in blocks for layer in block))
        self.gru = nn.GRU(128, 128, 2, batch_first=True, bidirectional=True, dropout=DROPOUT)
        self.head = nn.Sequential(
            *(nn.Dropout(DROPOUT), nn.Linear(256, 128), nn.BatchNorm1d(128), nn.LeakyReLU(SLOPE)),
            *(nn.Dropout(DROPOUT), nn.Linear(128, 64), nn.LeakyReLU(SLOPE)),
            *(nn.Dropout(DROPOUT), nn.Linear(64, n_classes)),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Raw features (B, 120, T) -> logits (B, C), from the states at the last time step."""
        return self.head(self.gru(self.conv(features).transpose(1, 2))[0][:, -1])  # type: ignore[no-any-return]


@torch.inference_mode()
def accuracy(model: nn.Module, features: Tensor, targets: Tensor) -> float:
    """Share of the clips that are right."""
    model.eval()
    guesses = torch.cat([model(batch).argmax(dim=1) for batch in features.split(256)])
    return (guesses == targets).double().mean().item()


def train_original(cfg: Config) -> None:
    """Train it, let the validation clips choose the epoch, and score it on the test clips."""
    if (cfg.n_features, cfg.test_fraction > 0) != (120, True):
        raise UserError("--original needs n_mfcc = 40 and a test_fraction above 0")
    mfcc = MFCC(mfcc_constants(cfg), cfg.hop_length)
    clips = load_corpus(cfg, mfcc)
    clips["part"] = split(clips, cfg)
    print(describe_split(clips, cfg), flush=True)
    labels, cache, data = sorted(set(clips.emotion)), FeatureCache(cfg, mfcc), {}
    for part, group in clips.groupby("part"):
        batches = list(make_loader(group.assign(n_windows=1), labels, cache, cfg))  # the first window alone
        data[part] = [torch.cat([batch[number] for batch in batches]) for number in (0, 2)]
    torch.manual_seed(cfg.seed)
    features, targets = data["train"]
    model = Original(len(labels))
    criterion = nn.CrossEntropyLoss(class_weights(clips[clips.part == "train"].emotion, labels))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", LR_FACTOR, LR_PATIENCE)
    best, best_epoch, kept, started = -math.inf, 0, model.state_dict(), time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for batch in torch.randperm(len(targets)).split(BATCH):
            if len(batch) > 1:  # batch norm cannot learn from one
                optimizer.zero_grad()
                criterion(model(features[batch]), targets[batch]).backward()
                optimizer.step()
        val = accuracy(model, *data["val"])
        plateau.step(val)
        print(f"epoch {epoch:2}  val accuracy {val:.1%}  {time.perf_counter() - started:.0f} s", flush=True)
        if val > best:
            best, best_epoch, kept = val, epoch, copy.deepcopy(model.state_dict())
        if epoch - best_epoch >= PATIENCE:
            break
    model.load_state_dict(kept)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"the original recipe, {n_parameters:,} parameters, epoch {best_epoch}, val accuracy {best:.1%}")
    print(f"test accuracy {accuracy(model, *data['test']):.2%} of {len(data['test'][1]):,} clips")


# ---- the script ------------------------------------------------------------------------------------------


def main(cfg: Config, flags: argparse.Namespace) -> int:
    """Measure one or the other."""
    if flags.repeats < 1:
        raise UserError(f"repeats = {flags.repeats}: must be at least 1")
    if flags.demo:
        make_demo(Path(cfg.data_dir))
    if flags.original:
        train_original(cfg)
        return 0
    print(f"{'':52}{'seconds':>8}  {'ratio':>6}  baseline, seconds")
    for what, seconds, baseline, theirs in measure_speed(cfg, flags.repeats):
        print(f"{what:52}{seconds:8.3f}  {theirs / seconds:6.2f}  {baseline}, {theirs:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured [5]")
    parser.add_argument("--original", action="store_true", help="train and score the original recipe")
    raise SystemExit(run(main, *parse(parser)))
