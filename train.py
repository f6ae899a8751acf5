"""Trains the networks, keeps the best of each, and says how good they are together.

    python train.py

writes best_emotion_model.pth and, into run/, history.csv, metrics.json, predictions.csv, figures, and
mistakes.html to listen to. On several GPUs or machines: `torchrun --nproc_per_node 2 train.py`.

    python train.py --evaluate A B        the same report on other folders of clips, in run/evaluate_A and _B
    python train.py --compare run a b     runs side by side: settings, scores, paired differences
"""

from config import (
    COLOURS,
    MODEL_FIELDS,
    RUNTIME_FIELDS,
    Config,
    Precision,
    UserError,
    fill_page,
    hold_interrupts,
    legible,
    link_to,
    make_parser,
    note,
    parse,
    printable,
    run,
    save_figure,
    save_file,
    save_view,
    say,
)

if __name__ == "__main__":  # answers --help, or a bad flag, before the slow imports
    parser = make_parser(__doc__, Config.__dataclass_fields__.keys() - {"submission"})
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in run_dir")
    parser.add_argument("--config", metavar="FILE", help="take settings from the run.json of another run")
    parser.add_argument("--folds", type=int, default=0, help="cross-validate: test on each of so many parts")
    parser.add_argument("--init", metavar="MODEL", help="start from the weights of a trained model")
    parser.add_argument("--evaluate", metavar="FOLDER", nargs="+", help="score the model on labelled clips")
    parser.add_argument("--own_classes", action="store_true", help="--evaluate: no answers but its classes")
    parser.add_argument("--adapt", action="store_true", help="with --evaluate: also adapted to each speaker")
    parser.add_argument("--compare", metavar="RUN", nargs="+", help="compare run folders with the first one")
    ARGS = parse(parser)

import contextlib
import copy
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import pandas as pd
import soundfile
import torch
from filelock import FileLock, Timeout
from joblib import cpu_count
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, start_processes
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from tqdm import tqdm

from model import (
    PRETRAINED,
    Augment,
    Batch,
    Checkpoint,
    Distance,
    EmotionCNNGRU,
    EmotionDataset,
    EmotionEnsemble,
    Voices,
    build_ensemble,
    calibrate,
    load_checkpoint,
    load_tensors,
    load_weights,
    loud_mean,
    mean_over_windows,
    resolve_device,
    save_checkpoint,
    save_tensors,
    short_hashes,
)
from prepare import (
    MFCC,
    FeatureCache,
    class_of,
    clip_name,
    find_clips,
    load_corpus,
    make_demo,
    member_seed,
    mfcc_constants,
    split,
    start_child,
)

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue
    from multiprocessing.sharedctypes import Synchronized

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Loader: TypeAlias = DataLoader[Batch]
Row: TypeAlias = dict[str, float]  # of history.csv
Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]
OnEpoch: TypeAlias = Callable[[Row], None]
NumberT = TypeVar("NumberT", float, Tensor)

MAX_GRADIENT = 5.0  # norm; a longer gradient is shortened to it
COOL_DOWN, MIN_EPOCHS = 0.75, 24  # with max_minutes: the part of the time after which the learning rate
# falls with every epoch, and the epochs that a network is worth training for
MAX_PER_SPEAKER = 100  # clips of one speaker in an epoch, where any recordings are to be labelled

# ---- one epoch -------------------------------------------------------------------------------------------


def make_loader(clips: pd.DataFrame, labels: Sequence[str], cache: FeatureCache, cfg: Config) -> Loader:
    """All windows of some clips, in the order of the table."""
    dataset = EmotionDataset(clips, labels, cache, one_window=False)
    batches = BatchSampler(SequentialSampler(dataset), cfg.batch_size, drop_last=False)
    return DataLoader(dataset, batch_size=None, sampler=batches)


def draw_clips(clips: pd.DataFrame, cfg: Config, seed: int) -> pd.DataFrame:
    """The clips of an epoch: all; where any recordings are to be labelled, MAX_PER_SPEAKER of each at most.

    TESS has a fifth of all clips from two speakers, whose ways are learnt by heart and then taken for emotion
    in every other clean recording.
    """
    if cfg.recordings == "same":
        return clips
    speakers = clips.speaker.where(clips.speaker != "", clips.path)  # of one that is not known, all
    return clips.sample(frac=1, random_state=seed % 2**32).groupby(speakers).head(MAX_PER_SPEAKER)


def mean_features(clips: pd.DataFrame, cache: FeatureCache, cfg: Config, depth: float) -> Tensor:
    """What is constant in each clip: the mean of its windows' loud_mean, (N, n_features, 1)."""
    loader = make_loader(clips, sorted(set(clips.emotion)), cache, cfg)
    batches = [mean_over_windows(loud_mean(b.features, depth), b.owner, len(b.targets)) for b in loader]
    return torch.cat(batches)


def draw_deviations(clips: pd.DataFrame, means: Tensor, seed: int) -> Tensor:
    """How far each clip is from its speaker's voice, as far as that is known from some of his clips.

    A voice is the mean of 1 to 64 clips, in half of the cases of a random mixture of emotions, since what
    people record is seldom balanced; a quarter of the clips, and those of unknown speakers, have none.
    The fewer clips, the less a voice counts.

    Args:
        clips: With the columns emotion and speaker.
        means: (N, F, 1), of each clip, as mean_features gives them.
        seed: Equal seeds draw the same.

    Returns:
        (N, F, 1).
    """
    rng, values = np.random.default_rng(seed), means.numpy()
    deviations = np.zeros_like(values)
    for speaker, rows in clips.groupby("speaker").indices.items():
        _, classes, counts = np.unique(clips.emotion.iloc[rows], return_inverse=True, return_counts=True)
        for row in rows if speaker else ():
            if rng.random() < 0.25:
                continue
            n_clips, shares = round(64 ** rng.random()), np.ones(len(rows))
            if rng.random() < 0.5:
                shares = rng.dirichlet([0.3] * len(counts))[classes] / counts[classes]
            voice = values[rng.choice(rows, n_clips, p=shares / shares.sum())].mean(axis=0)
            deviations[row] = n_clips / (n_clips + 4) * (values[row] - voice)
    return torch.from_numpy(deviations)


def draw_epoch(
    clips: pd.DataFrame,
    labels: Sequence[str],
    cache: FeatureCache,
    cfg: Config,
    *,
    seed: int,
    means: Tensor | None = None,
) -> Loader:
    """A random window of each clip of an epoch, in random order.

    Where the `means` of all clips are given, with deviations from voices.
    """
    drawn, deviation = draw_clips(clips, cfg, seed), None
    repeats = math.ceil(cfg.min_steps * cfg.batch_size / len(drawn))  # an epoch has min_steps or more
    if means is not None:
        deviation = torch.cat([draw_deviations(clips, means, seed)[drawn.index.tolist()]] * repeats)
    repeated = pd.concat([drawn] * repeats)
    dataset = EmotionDataset(repeated, labels, cache, one_window=True, deviation=deviation)
    # Batch norm cannot learn from a single clip: a last batch of one waits for the next epoch.
    drop_last = len(dataset) % cfg.batch_size == 1
    batches = BatchSampler(RandomSampler(dataset), cfg.batch_size, drop_last)
    return DataLoader(dataset, batch_size=None, sampler=batches)


def class_weights(targets: "pd.Series[str]", labels: Sequence[str]) -> Tensor:
    """Weights inversely proportional to class frequency, (C,) float32; 1 for a class of average size."""
    counts = targets.value_counts().reindex(labels)  # NaN for a class that does not occur
    weights = (len(targets) / (len(labels) * counts)).fillna(1.0)
    return torch.from_numpy(weights.to_numpy(np.float32))


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average (EMA) of weights and batch statistics over the steps.

    A young average forgets faster than `decay`, or it would remember the random start.
    """

    def update(means: Tensors, values: Tensors, n_steps: Tensor | int) -> None:
        if means[0].is_floating_point():
            young = (1 + int(n_steps)) / (10 + int(n_steps))
            torch._foreach_lerp_(means, values, 1 - min(decay, young))
        else:
            torch._foreach_copy_(means, values)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def train_epoch(
    model: nn.Module,
    loader: Loader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    warmup: LinearLR,
    average: AveragedModel,
    augment: nn.Module,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """One pass over the training clips: the mean loss, and the accuracy on augmented clips.

    Raises:
        UserError: A loss is NaN or infinite.
    """
    model.train()
    device = next(model.parameters()).device
    losses: list[Tensor] = []  # on the device: not every step waits for a GPU
    accuracies: list[Tensor] = []
    for batch in loader:
        features, targets = augment(batch.features.to(device)), batch.targets.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(features, batch.deviation.to(device))  # (B, C)
        loss = criterion(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
        optimizer.step()
        warmup.step()  # after the warm-up it changes nothing
        average.update_parameters(model)
        losses.append(loss.detach())
        accuracies.append((logits.detach().argmax(dim=1) == targets).float().mean())
    loss_of_epoch = torch.stack(losses).mean().item()
    if not math.isfinite(loss_of_epoch):
        raise UserError(f"the training loss is {loss_of_epoch}: lower learning_rate", code=1)
    return loss_of_epoch, torch.stack(accuracies).mean().item()


def evaluate_adapted(
    model: EmotionEnsemble, clips: pd.DataFrame, labels: Sequence[str], cache: FeatureCache, cfg: Config
) -> Tensor:
    """Probabilities (N, C) float32 of clips, by models adapted to the speaker of each, without any label.

    Clips of unknown speakers are labelled by the model as it is.
    """
    probabilities, device = torch.zeros(len(clips), len(labels)), next(model.parameters()).device
    for speaker, rows in clips.groupby("speaker").indices.items():
        loader, own = make_loader(clips.iloc[rows], labels, cache, cfg), model
        if speaker:
            batches = list(loader)
            owners = [batch.owner + number * cfg.batch_size for number, batch in enumerate(batches)]
            features = torch.cat([batch.features for batch in batches])
            own, _ = model.adapt(features.to(device), torch.cat(owners).to(device))
        probabilities[rows] = evaluate(own, loader)[0]
    return probabilities


@torch.inference_mode()
def evaluate(
    model: EmotionEnsemble, loader: Loader, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) float32 of all clips, calibrated if the model is, and their classes (N,)."""
    model.eval()
    device = next(model.parameters()).device
    probabilities: list[Tensor] = []
    classes: list[Tensor] = []
    for batch in loader:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            of_windows = model(batch.features.to(device))
        of_clips = of_windows.of_clips(batch.owner.to(device), len(batch.targets))
        probabilities.append(model.calibrated(of_clips).cpu())
        classes.append(batch.targets)
    return torch.cat(probabilities), torch.cat(classes)


def validate(
    model: EmotionEnsemble, loader: Loader, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float, float]:
    """Probabilities (N, C) of the validation clips, their accuracy, and their cross-entropy.

    The cross-entropy has class weights (C,).

    Raises:
        UserError: The loss or a weight is NaN or infinite.
    """
    probabilities, targets = evaluate(model, loader, dtype)
    accuracy = (probabilities.argmax(dim=1) == targets).double().mean().item()
    loss = nn.functional.nll_loss(probabilities.clamp(min=1e-12).log(), targets, weights).item()
    if not (math.isfinite(loss) and all(bool(v.isfinite().all()) for v in model.state_dict().values())):
        raise UserError(f"weights overflow, the validation loss is {loss}: lower learning_rate", code=1)
    return probabilities, accuracy, loss


# ---- one network -----------------------------------------------------------------------------------------


def fit(
    cfg: Config,
    clips: pd.DataFrame,
    mfcc: MFCC,
    *,
    member: int = 1,
    init: Checkpoint | None = None,
    resume: bool = False,
    deadline: float = math.inf,
    on_epoch: OnEpoch = lambda _: None,
) -> None:
    """Train one network of the ensemble; after each epoch its state goes to run_dir/network<member>.pth.

    The network that is kept is of the latest epoch whose validation accuracy is within one standard error of
    the best (Breiman et al. 1984): the highest of 40 accuracies on 1,000 clips is an accident.

    Args:
        cfg: The settings; precision is not auto.
        clips: As load_corpus gives them, with the column part, as split gives it for this network.
        mfcc: The features, in the cache.
        member: Which network, from 1.
        init: The model to start from.
        resume: Whether to go on with the state of an interrupted run.
        deadline: The time, as time.time() gives it, after which no epoch begins. The rate falls before.
        on_epoch: Gets the row of history.csv of each epoch, and as kept whether it is the one to keep so far.

    Raises:
        UserError: The loss is no longer finite, or the state is of another network.
    """
    path, seed = Path(cfg.run_dir, f"network{member}.pth"), member_seed(cfg, member)
    device, labels = resolve_device(cfg.device), sorted(set(clips.emotion))
    dtype = getattr(torch, cfg.precision)
    # The augmentation is made on the CPU, and takes the features' constants along to the device.
    cache, augment = FeatureCache(cfg, mfcc), Augment(copy.deepcopy(mfcc), cfg).to(device)
    train_clips, val_clips = (clips[clips.part == part].reset_index(drop=True) for part in ("train", "val"))
    val_loader = make_loader(val_clips, labels, cache, cfg)
    # Every epoch has about as many clips of each class.
    weights = class_weights(draw_clips(train_clips, cfg, seed).emotion, labels)
    criterion = nn.CrossEntropyLoss(weights, label_smoothing=cfg.label_smoothing).to(device)

    torch.manual_seed(seed)
    model = make_network(cfg, len(labels), member, make_loader(train_clips, labels, cache, cfg)).to(device)
    if init:
        start_from(init, model, member, labels)
    means = mean_features(train_clips, cache, cfg, model.depth) if bool(model.cmn.any()) else None
    voices = fit_voices(cfg, train_clips, cache).to(device)
    average = make_average(model, cfg.ema_decay)
    optimizer = make_optimizer(model, cfg)
    n_steps = len(draw_epoch(train_clips, labels, cache, cfg, seed=seed))
    warmup, plateau = make_schedules(optimizer, cfg, n_steps)
    stateful: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
    stateful |= {"warmup": warmup, "plateau": plateau}
    history: list[Row] = []
    best, bad_epochs, kept, begun = 0.0, 0, {}, time.time()
    if resume and path.is_file():
        state = load_tensors(path)
        load_weights(model, state["model"])  # says what does not fit, after an edit of the network
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        history, best, bad_epochs, kept = (state[name] for name in ("history", "best", "bad_epochs", "kept"))

    averaged = EmotionEnsemble(augment.mfcc, [average.module], Distance(cfg).to(device), voices)
    while len(history) < cfg.epochs and bad_epochs < cfg.patience and time.time() < deadline:
        started, epoch, lr = time.perf_counter(), len(history) + 1, optimizer.param_groups[0]["lr"]
        # Seeded anew each epoch, so that a resumed run needs no state of random generators.
        torch.manual_seed(epoch_seed := seed * 10_007 + epoch)
        train_loader = draw_epoch(train_clips, labels, cache, cfg, seed=epoch_seed, means=means)
        loss, train_accuracy = train_epoch(
            model,
            train_loader,
            criterion,
            optimizer,
            warmup=warmup,
            average=average,
            augment=augment,
            dtype=dtype,
        )
        probabilities, accuracy, val_loss = validate(averaged, val_loader, weights, dtype)

        if epoch > cfg.warmup:
            plateau.step(accuracy)
        if time.time() > begun + COOL_DOWN * (deadline - begun):  # there is no time to wait for a plateau
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr * cfg.lr_factor
        # Early stopping waits until the learning rate has fallen as far as it will, or it would cut that off.
        has_fallen = epoch > cfg.warmup and optimizer.param_groups[0]["lr"] < lr
        bad_epochs = 0 if accuracy > best or has_fallen else bad_epochs + 1
        best = max(best, accuracy)
        if accuracy >= best - math.sqrt(best * (1 - best) / len(val_clips)):
            kept = {
                "epoch": epoch,
                "weights": copy.deepcopy(average.module.state_dict()),
                "val_probabilities": probabilities,
            }
        history.append(
            {
                "network": member,
                "epoch": epoch,
                "learning_rate": lr,
                "train_loss": loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": accuracy,
                "seconds": round(time.perf_counter() - started, 2),
            }
        )
        state = {name: part.state_dict() for name, part in stateful.items()}
        state |= {"history": history, "best": best, "bad_epochs": bad_epochs, "kept": kept}
        save_tensors(path, state)
        on_epoch(history[-1] | {"kept": kept["epoch"] == epoch})


def start_from(init: Checkpoint, model: EmotionCNNGRU, member: int, labels: Sequence[str]) -> None:
    """Give a network the weights of its number in a trained model, mean and std of the features included.

    Where the classes are others, the last layer stays as it is, at random.
    """
    weights, last_layer = dict(init.members[member - 1]), f"head.{len(model.head) - 1}."
    if not same_classes(init.labels, labels):
        weights |= {name: own for name, own in model.state_dict().items() if name.startswith(last_layer)}
    load_weights(model, weights)


def make_network(cfg: Config, n_classes: int, member: int, loader: Loader) -> EmotionCNNGRU:
    """A network with random weights that knows mean and std of the features of the training clips."""
    model = EmotionCNNGRU(cfg, n_classes)
    if cfg.recordings == "any":
        model.level[0] = 1
    if cfg.cmn == "all" or (cfg.cmn == "alternate" and member % 2 == 0):
        model.cmn[1 : cfg.n_mfcc] = 1  # the first coefficient, which is the loudness, keeps its mean
    total = squares = n_frames = torch.zeros((), dtype=torch.float64)
    for batch in loader:
        values = model.remove_level(batch.features).double()
        total = total + values.sum(dim=(0, 2))
        squares = squares + values.square().sum(dim=(0, 2))
        n_frames = n_frames + values.shape[0] * values.shape[2]
    model.mean[:, 0] = total / n_frames
    # One std for all rows, the root of their mean variance.
    model.std[...] = (squares / n_frames - model.mean[:, 0].square()).mean().clamp(min=1e-6).sqrt()
    return model


def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """AdamW; weights decay, biases and batch norms do not, as that would help nobody."""
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    no_decay = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)


def make_schedules(
    optimizer: torch.optim.Optimizer, cfg: Config, steps_per_epoch: int
) -> tuple[LinearLR, ReduceLROnPlateau]:
    """The warm-up, which steps with every batch, and the plateau, which steps with every epoch after it."""
    n_steps = max(1, cfg.warmup * steps_per_epoch)
    warmup = LinearLR(optimizer, 1 / n_steps, total_iters=n_steps)
    floor = cfg.learning_rate / 100
    return warmup, ReduceLROnPlateau(
        optimizer, "max", cfg.lr_factor, cfg.lr_patience, threshold=0, min_lr=floor
    )


# ---- many networks: jobs over cores, GPUs and machines ---------------------------------------------------


class Job(NamedTuple):
    """A network to train: of the ensemble that is tested on a fold (0: there are no folds)."""

    fold: int
    member: int


class Plan(NamedTuple):
    """How a run is trained, as far as that is settled when it begins."""

    precision: Precision  # not auto
    n_networks: int  # of the ensemble


class Inputs(NamedTuple):
    """What the processes of a run read from a file that the first of them has just written."""

    clips: pd.DataFrame  # as load_corpus gives them
    parts: dict[Job, list[str]]  # of the clips, as split gives them, for each network
    mfcc: MFCC
    init: Checkpoint | None  # the model to start from
    plan: Plan
    deadline: float  # as time.time() gives it

    def clips_of(self, job: Job) -> pd.DataFrame:
        """The clips with the column part: which a network trains, validates and is tested on."""
        return self.clips.assign(part=self.parts[job])

    @property
    def folds(self) -> list[int]:
        """The numbers of the folds; [0] where there are none."""
        return sorted({job.fold for job in self.parts})

    @property
    def jobs(self) -> list[Job]:
        """The networks that the plan has time for; under torchrun those of this process, every so many-th."""
        return [job for job in self.parts if job.member <= self.plan.n_networks][rank() :: world_size()]


def divide(clips: pd.DataFrame, cfg: Config, n_folds: int) -> dict[Job, list[str]]:
    """The part of each clip for each network of a run.

    Raises:
        UserError: Parts would be too small, or a speaker is not known.
    """
    jobs = itertools.product(range(1, n_folds + 1) or [0], range(1, cfg.ensemble + 1))
    return {
        Job(fold, member): split(clips, cfg, member=member, fold=fold - 1, n_folds=n_folds).tolist()
        for fold, member in jobs
    }


def fold_config(cfg: Config, fold: int) -> Config:
    """The settings with the folder of a fold, and the model in it; where there are no folds, as they are."""
    if not fold:
        return cfg
    run_dir = Path(cfg.run_dir, f"fold{fold}")
    return replace(cfg, run_dir=str(run_dir), checkpoint=str(run_dir / MODEL))


def read_inputs(cfg: Config) -> Inputs:
    """What start_run has written."""
    inputs: Inputs = pickle.loads(Path(cfg.run_dir, INPUTS).read_bytes())
    return inputs


def run_job(cfg: Config, job: Job, inputs: Inputs, *, rounds: int, resume: bool, on_epoch: OnEpoch) -> None:
    """Train the network of a job, in its share of the time that is left for so many, one after the other."""
    now = time.time()
    fit(
        replace(fold_config(cfg, job.fold), precision=inputs.plan.precision),
        inputs.clips_of(job),
        inputs.mfcc,
        member=job.member,
        init=inputs.init,
        resume=resume,
        deadline=now + (inputs.deadline - now) / rounds,
        on_epoch=on_epoch,
    )


def own_devices(cfg: Config) -> list[str]:
    """The devices that this process trains on, a network on each at a time: the cores, or the GPUs.

    Processes that torchrun started on one machine share them.
    """
    device, devices = resolve_device(cfg.device), [cfg.device]
    if device.type == "cpu":
        devices = ["cpu"] * cpu_count()
    elif cfg.device in {"auto", "cuda"}:
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    first, step = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return devices[first::step] or [devices[first % len(devices)]]


def run_jobs(cfg: Config, jobs: Sequence[Job], *, resume: bool, on_epoch: OnEpoch) -> None:
    """Train all networks, as many at once as there are cores or GPUs.

    Two networks with a thread each take half the time of one after the other with two threads, since threads
    wait for each other at every small step.

    Raises:
        UserError: A loss is no longer finite, or a process died.
        ProcessRaisedException: There is a bug; the message holds the traceback of the process.
    """
    devices = own_devices(cfg)
    n_threads = max(1, len(devices) // max(1, len(jobs)))
    devices = devices[: len(jobs)]
    if len(devices) < 2:
        for number, job in enumerate(jobs):
            own, rounds = replace(cfg, device=devices[0]), len(jobs) - number
            run_job(own, job, read_inputs(cfg), rounds=rounds, resume=resume, on_epoch=on_epoch)
        return
    context, others = multiprocessing.get_context("spawn"), {*multiprocessing.active_children()}
    try:
        # First, since their first semaphore starts a process that lets Ctrl-C through again.
        n_taken, rows = context.Value("i", 0), context.SimpleQueue()
        with hold_interrupts():
            configs = [replace(cfg, device=device) for device in devices]
            work = partial(_work, configs, jobs, n_threads=n_threads, resume=resume)
            children: ProcessContext = start_processes(  # type: ignore[no-untyped-call] # torch's
                work, (n_taken, rows), len(configs), join=False, start_method="spawn"
            )
        all_ended = False
        while not all_ended:
            all_ended = children.join(timeout=0.5)
            while not rows.empty():
                row = rows.get()
                if isinstance(row, Exception):
                    raise row
                on_epoch(row)
    except ProcessExitedException as error:
        raise UserError(f"a training process died: {error}", code=1) from None
    finally:
        for process in {*multiprocessing.active_children()} - others:
            process.kill()  # files are written in one step: it leaves none half-written
            process.join()


def _work(
    configs: Sequence[Config],
    jobs: Sequence[Job],
    number: int,
    n_taken: "Synchronized[int]",
    rows: "SimpleQueue[Row | Exception]",
    *,
    n_threads: int,
    resume: bool,
) -> None:
    """A training process: takes one job after the other, until none is left."""
    start_child(n_threads)
    cfg = configs[number]
    try:
        while True:
            with n_taken.get_lock():
                next_job, n_taken.value = n_taken.value, n_taken.value + 1
            if next_job >= len(jobs):
                return
            job, rounds = jobs[next_job], math.ceil((len(jobs) - next_job) / len(configs))
            run_job(cfg, job, read_inputs(cfg), rounds=rounds, resume=resume, on_epoch=rows.put)
    except (UserError, OSError, MemoryError) as error:  # the parent's run() words them
        rows.put(error)


def time_steps(cfg: Config, n_classes: int) -> dict[Precision, float]:
    """Seconds of a training step of this network on this machine, in float32 and in mixed precision.

    bfloat16 has the range of float32 and 8 bits of precision; sums and all weights stay float32 (Kalamkar et
    al. 2019, arXiv:1905.12322). That a processor has it does not mean that it is fast.
    """
    device, n_threads = resolve_device(own_devices(cfg)[0]), torch.get_num_threads()
    model = EmotionCNNGRU(cfg, n_classes).to(device)
    features = torch.randn(cfg.batch_size, cfg.n_features, cfg.n_frames, device=device)
    precisions: tuple[Precision, ...] = (
        ("float32", "bfloat16") if cfg.precision == "auto" else (cfg.precision,)
    )
    seconds = dict.fromkeys(precisions, math.inf)
    torch.set_num_threads(1)
    for _ in range(4):
        for name, fastest in seconds.items():
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
                loss = model(features).square().mean()
            loss.backward()
            loss.item()  # waits for a GPU
            seconds[name] = min(fastest, time.perf_counter() - started)
    torch.set_num_threads(n_threads)
    return seconds


def make_plan(cfg: Config, inputs: Inputs) -> Plan:
    """The faster precision, and as many networks as max_minutes allow.

    Raises:
        UserError: There is no time for a single epoch.
    """
    if cfg.precision != "auto" and not cfg.max_minutes:
        return Plan(cfg.precision, cfg.ensemble)
    seconds = time_steps(cfg, inputs.clips.emotion.nunique())
    precision = min(seconds, key=lambda name: seconds[name])
    if len(seconds) > 1:
        times = " and ".join(f"{1000 * value:.0f} ms in {name}" for name, value in seconds.items())
        note(f"note: trains in {precision}: a step takes {times}")
    if not cfg.max_minutes:
        return Plan(precision, cfg.ensemble)
    clips = inputs.clips_of(min(inputs.parts))
    n_drawn = len(draw_clips(clips[clips.part == "train"], cfg, 0))
    n_steps = max(cfg.min_steps, n_drawn // cfg.batch_size)
    epoch = 0.1 + 1.4 * n_steps * seconds[precision]  # with augmentation, validation and saving
    n_workers, left = world_size() * len(own_devices(cfg)), inputs.deadline - time.time()
    if left < epoch:
        what = f"{max(0, left):.0f} s are left for training, and an epoch takes {epoch:.1f} s"
        raise UserError(f"max_minutes = {cfg.max_minutes}: {what}: raise it")
    n_jobs = max(1, int(left / epoch / MIN_EPOCHS)) * n_workers  # a worker trains one after the other
    n_networks = min(cfg.ensemble, max(1, n_jobs // len(inputs.folds)))
    n_epochs = int(left / epoch / math.ceil(n_networks * len(inputs.folds) / n_workers))
    what = f"{n_networks} of {cfg.ensemble} networks, about {min(cfg.epochs, n_epochs)} epochs each"
    note(f"note: max_minutes = {cfg.max_minutes}: {what}")
    return Plan(precision, n_networks)


@contextlib.contextmanager
def torchrun() -> Iterator[None]:
    """Join the processes that torchrun started, if it did: each trains its part of the networks."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        with contextlib.nullcontext() if rank() == 0 else contextlib.redirect_stdout(None):
            yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Number of this process of torchrun; the first one, 0, reads the corpus and reports."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes torchrun started, on all machines."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_others() -> None:
    """Return when all processes of torchrun have come here."""
    if distributed.is_initialized():
        arrival = distributed.barrier(async_op=True)
        while not arrival.is_completed():  # a plain barrier is deaf to Ctrl-C
            time.sleep(0.1)


# ---- the run folder --------------------------------------------------------------------------------------
#
# A run is a folder: run.json, what it is; network<n>.pth, what --resume goes on from; init.pth, the model it
# started from, if any; its model; its report. With folds, each has a folder in it for its networks, model and
# report. While it trains, inputs.pickle is there for its processes.

RUN_ID = "%Y-%m-%d-%H%M%S-%f"  # when it began
INPUTS, INIT, MODEL = "inputs.pickle", "init.pth", "best_emotion_model.pth"


def read_about(cfg: Config) -> dict[str, Any]:
    """What run.json says of the run in the run folder; empty where there is none.

    Raises:
        UserError: It is damaged.
    """
    path = Path(cfg.run_dir, "run.json")
    try:
        about = json.loads(path.read_text()) if path.is_file() else {}
        return about if not about or about["run"] else {}
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path} is damaged: move {cfg.run_dir} away, or pass another --run_dir") from None


def check_place(run_dir: str) -> None:
    """Refuse a folder for results that is a file, or would lie in one."""
    for path in (Path(run_dir), *Path(run_dir).parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"run_dir = {run_dir!r}: {path} is no folder: pass another --run_dir")


def check_run_dir(cfg: Config) -> None:
    """Refuse a run folder that cannot be made, or cannot be renamed when the next run begins.

    Raises:
        UserError: It is a file, lies in the data, or holds the data, the cache, or the current folder.
    """
    check_place(cfg.run_dir)
    run_dir = Path(cfg.run_dir).resolve()
    if run_dir.is_relative_to(Path(cfg.data_dir).resolve()):
        raise UserError(f"run_dir = {cfg.run_dir!r}: lies in {cfg.data_dir!r}: pass another --run_dir")
    for path in (".", cfg.data_dir, cfg.cache_dir):
        if Path(path).resolve().is_relative_to(run_dir):
            raise UserError(f"run_dir = {cfg.run_dir!r}: holds {path!r}: a run needs a folder of its own")
    if not (run_dir / "run.json").exists():
        for name in ("metrics.json", "predictions.csv", "history.csv"):
            if (run_dir / name).exists():
                raise UserError(f"run_dir = {cfg.run_dir!r}: has a {name} of no run: name another folder")


def check_resume(cfg: Config, about: dict[str, Any], mine: dict[str, Any]) -> None:
    """Refuse to go on with a run that was another one.

    Raises:
        UserError: There is none, or its settings, clips or split differ from `mine`.
    """
    if not about:
        raise UserError(f"no run in {cfg.run_dir} to resume: start one with `python train.py`")
    free = RUNTIME_FIELDS - {"batch_size"} | {"epochs", "patience"}
    differences = [
        "the clips or their split" if name == "data" else f"{name}: {about.get(name)!r} -> {value!r}"
        for name, value in mine.items()
        if about.get(name) != value and name not in free
    ]
    if differences:
        raise UserError(f"cannot resume {cfg.run_dir}, which was another run: {'; '.join(differences)}")


def set_aside(folder: Path, date: str) -> None:
    """Rename a folder of results to <its name>_<date>, since new ones will take its place."""
    folder = folder.resolve()  # a link stays one
    new = folder.with_name(f"{folder.name}_{date}")
    folder.rename(new)
    note(f"note: {folder.name} is of an earlier run: it is {new.name} now")


@contextlib.contextmanager
def run_lock(cfg: Config) -> Iterator[None]:
    """Keep other runs out of the run folder; the lock lies beside it, since the folder may be renamed.

    Raises:
        UserError: Another run is writing there.
    """
    folder = Path(cfg.run_dir).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=1):
            yield
    except Timeout:
        raise UserError(f"another run is writing to {cfg.run_dir}: wait, or pass --run_dir") from None


def start_run(cfg: Config, inputs: Inputs, *, resume: bool) -> None:
    """Set an earlier run aside and begin a new one, or check that it can be resumed.

    Raises:
        UserError: The run cannot be resumed.
    """
    about, kept_init = read_about(cfg), Path(cfg.run_dir, INIT)
    mine = {"folds": max(inputs.folds), "data": digest(inputs), **asdict(cfg)}
    if resume:
        check_resume(cfg, about, mine)
        init = load_checkpoint(kept_init)[0] if about["init"] else None
        inputs = inputs._replace(init=init, plan=Plan(**about["plan"]))
    else:
        inputs = inputs._replace(plan=make_plan(cfg, inputs))
        if about:
            set_aside(Path(cfg.run_dir), about["run"])
        if inputs.init:  # its own copy, to be resumed from when the file is gone or replaced
            save_checkpoint(kept_init, inputs.init)
        new: dict[str, Any] = {"run": datetime.now().strftime(RUN_ID)}
        new |= {
            "init": inputs.init.run if inputs.init else "",
            "plan": inputs.plan._asdict(),
            "environment": describe_environment(),
        }
        save_json(Path(cfg.run_dir, "run.json"), new | mine)
    save_file(Path(cfg.run_dir, INPUTS), pickle.dumps(inputs))


def describe_environment() -> dict[str, str]:
    """What scores and speed depend on besides the settings: versions, commit, processor, cores."""
    packages = ("torch", "librosa", "numpy", "pandas", "scikit-learn", "soundfile", "soxr")
    about = {"python": platform.python_version()} | {name: version(name) for name in packages}
    about |= {"libsndfile": soundfile.__libsndfile_version__, "cores": str(cpu_count())}
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    about["processor"] = found[1] if found else platform.processor()
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        git = subprocess.run(command, capture_output=True, text=True, check=False)
        about["commit"] = git.stdout.strip()  # -dirty: with changes
    return about


def digest(inputs: Inputs) -> str:
    """A hash of the clips and their split."""
    table = inputs.clips[["audio_hash", "emotion"]].to_csv(index=False)
    return hashlib.sha256(f"{table} {[*inputs.parts.values()]}".encode()).hexdigest()


# ---- training, from clips to report ----------------------------------------------------------------------


def train(
    cfg: Config,
    *,
    n_folds: int = 0,
    resume: bool = False,
    init: str = "",
    on_epoch: OnEpoch = lambda _: None,
) -> dict[str, Any]:
    """Train the networks, keep the best epoch of each, and report how good they are together.

    Args:
        cfg: The settings.
        n_folds: Cross-validate: train once per fold, and score every clip by networks that never saw it.
        resume: Go on with the interrupted run in run_dir.
        init: A trained model to start from.
        on_epoch: Gets what fit gives it, for each epoch.

    Returns:
        What metrics.json holds; under torchrun nothing in all processes but the first.

    Raises:
        UserError: The run cannot begin, and nothing was touched; or its loss is no longer finite.
        KeyboardInterrupt: The finished epochs are saved.
    """
    deadline = time.time() + 54 * cfg.max_minutes if cfg.max_minutes else math.inf  # the report takes a tenth
    with torchrun(), contextlib.ExitStack() as stack:
        if rank() == 0:
            check_run_dir(cfg)
            resolve_device(cfg.device)
            mfcc = MFCC(mfcc_constants(cfg), cfg.hop_length)
            clips = load_corpus(cfg, mfcc)
            start = load_init(Path(init), cfg, sorted(set(clips.emotion))) if init else None
            limits = Plan(cfg.precision, cfg.ensemble)
            inputs = Inputs(clips, divide(clips, cfg, n_folds), mfcc, start, limits, deadline)
            stack.enter_context(run_lock(cfg))
            start_run(cfg, inputs, resume=resume)
        wait_for_others()
        inputs = read_inputs(cfg)
        say(describe_split(inputs.clips_of(min(inputs.parts)), cfg))
        try:
            train_networks(cfg, inputs, resume=resume, on_epoch=on_epoch)
        except (KeyboardInterrupt, UserError) as error:
            if rank() == 0:
                keep_networks(cfg, inputs)
                Path(cfg.run_dir, INPUTS).unlink()
            if isinstance(error, KeyboardInterrupt):
                note("stopped: the same command with --resume goes on after the last finished epoch")
            raise
        wait_for_others()
        if rank() > 0:
            return {}
        Path(cfg.run_dir, INPUTS).unlink()
        return finish(cfg, inputs)


def train_networks(cfg: Config, inputs: Inputs, *, resume: bool, on_epoch: OnEpoch) -> None:
    """Train the networks of this process, and show how far they are."""
    jobs = inputs.jobs
    with tqdm(total=len(jobs) * cfg.epochs, unit="epoch", disable=True if rank() else None) as bar:

        def show(row: Row) -> None:
            show_epoch(row, cfg.epochs, bar)
            on_epoch(row)

        run_jobs(cfg, jobs, resume=resume, on_epoch=show)
    if jobs and not bar.n:
        more = f": for more, start a new run with --init {cfg.checkpoint}" if inputs.folds == [0] else ""
        note(f"note: nothing was left to train{more}")


def describe_split(clips: pd.DataFrame, cfg: Config) -> str:
    """The classes, clips per part, and whether the test speakers are known from training."""
    classes = sorted(set(clips.emotion))
    sizes = ", ".join(f"{(clips.part == part).sum():,} {part}" for part in ("train", "val", "test"))
    speakers = {part: set(group.speaker) - {""} for part, group in clips.groupby("part")}
    heard = speakers.get("test", set()) | speakers["val"]
    shared = f", {len(heard & speakers['train'])} of the {len(heard)} speakers in val and test also in train"
    how = {"random": "split at random", "speaker": "split by speaker"}[cfg.split]
    if cfg.split == "speaker" and speakers["val"] & speakers["train"]:
        how += ", val other clips of the few speakers in train"
    how += ", val drawn anew for each network" if cfg.ensemble > 1 else ""
    if "given" in clips and (clips.given != "").any():
        how = f"parts as given, where they are, else {how}"
    names = printable(f"{len(classes)} classes ({', '.join(classes)})")
    return f"{names}; {sizes} clips, {how}" + (shared if heard else "")


def show_epoch(row: Row, n_epochs: int, bar: "tqdm[Any]") -> None:
    """Move the bar; where there is no terminal to draw it on, print a line."""
    bar.n += 1  # also where there is no bar
    kept = ", kept" if row["kept"] else ""  # until a later epoch is
    bar.set_postfix_str(f"network {row['network']}: {row['val_accuracy']:.1%} of val{kept}")
    if bar.disable:
        train = f"train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:5.1%}"
        val = f"val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:5.1%}"
        epoch = f"network {row['network']}  epoch {row['epoch']:2d}/{n_epochs}"
        say(f"{epoch}  {train}  {val}  lr {row['learning_rate']:.1e}  {row['seconds']:.1f} s{kept}")


def finish(cfg: Config, inputs: Inputs) -> dict[str, Any]:
    """Make the model, or that of each fold, and report how good it is; returns what metrics.json holds."""
    tables: dict[str, pd.DataFrame] = {}
    for fold in inputs.folds:
        made = make_model(cfg, inputs, fold=fold)
        clips, name = made[1], f"fold {fold} of {len(inputs.folds)}"
        speakers = sorted(set(clips.speaker[clips.part == "test"]))
        if cfg.split == "speaker" and len(speakers) <= 3:
            name += f" ({', '.join(speakers)})"
        if fold:
            say(f"\n{printable(name)}")
        metrics, tables[name] = report(fold_config(cfg, fold), *made, adapt=cfg.split == "speaker")
    if inputs.folds != [0]:
        return report_folds(cfg, tables)
    copy_model(cfg)
    return metrics


def copy_model(cfg: Config) -> None:
    """Put the model of a run where inference.py looks for it."""
    made = Path(cfg.run_dir, MODEL)
    if made.resolve() != Path(cfg.checkpoint).resolve():
        save_file(Path(cfg.checkpoint), made.read_bytes())


def keep_networks(cfg: Config, inputs: Inputs) -> None:
    """Make models of the networks so far, since the run ends early; none replaces that of a finished run."""
    for fold in inputs.folds:
        with contextlib.suppress(UserError):  # of a state that is damaged, or not there yet
            make_model(cfg, inputs, fold=fold)
            note(f"the networks so far are kept in {Path(fold_config(cfg, fold).run_dir, MODEL)}")
            if not (fold or Path(cfg.checkpoint).exists()):
                copy_model(cfg)


class Network(NamedTuple):
    """A trained network."""

    clips: pd.DataFrame  # with its parts
    state: dict[str, Any]  # what fit wrote

    @property
    def val_probabilities(self) -> pd.DataFrame:
        """Of the validation clips, (N, C), by their row in the table of clips."""
        probabilities = self.state["kept"]["val_probabilities"]
        return pd.DataFrame(probabilities.numpy(), self.clips.index[self.clips.part == "val"])


def load_networks(cfg: Config, inputs: Inputs, fold: int) -> list[Network]:
    """The networks of a fold that have come to the end of an epoch.

    Raises:
        UserError: There are none, or a file is damaged.
    """
    folder = Path(fold_config(cfg, fold).run_dir)
    paths = {job: folder / f"network{job.member}.pth" for job in inputs.parts if job.fold == fold}
    networks = [
        Network(inputs.clips_of(job), load_tensors(path)) for job, path in paths.items() if path.is_file()
    ]
    if not networks:
        raise UserError(f"no network in {folder} has come to the end of an epoch", code=1)
    return networks


def make_model(cfg: Config, inputs: Inputs, *, fold: int) -> tuple[Checkpoint, pd.DataFrame, pd.DataFrame]:
    """Write the networks of a run or fold into its checkpoint, and its history and curves beside it.

    Returns:
        The checkpoint, the clips with their parts, and the predictions of the validation clips.

    Raises:
        UserError: There is no network yet, or a file is damaged.
    """
    networks, mfcc, about = load_networks(cfg, inputs, fold), inputs.mfcc, read_about(cfg)
    clips, kept = networks[0].clips, [network.state["kept"] for network in networks]
    labels = sorted(set(clips.emotion))
    learnt = clips[np.any([network.clips.part == "train" for network in networks], axis=0)]
    validated, probabilities, n_networks = out_of_bag(networks)
    targets = torch.tensor([labels.index(emotion) for emotion in validated.emotion])
    temperature = fit_temperature(probabilities, targets, n_networks)
    seen = [short_hashes(clips[clips.part != "test"]), *([inputs.init.seen] if inputs.init else [])]
    checkpoint = Checkpoint(
        config=replace(cfg, **{name: getattr(Config(), name) for name in RUNTIME_FIELDS}),
        labels=labels,
        mfcc=mfcc.state_dict() | {"mel": mfcc.mel.to_sparse()},  # nearly all of it is zeros
        members=[best["weights"] for best in kept],
        epochs=[best["epoch"] for best in kept],
        temperature=temperature * relative_temperature(len(networks)),
        distance=fit_distance(cfg, clips, mfcc),
        voices=dict(fit_voices(cfg, learnt, FeatureCache(cfg, mfcc)).state_dict()),
        shifts=fit_shifts(cfg, clips, mfcc, labels),
        n_clips={label: int((learnt.emotion == label).sum()) for label in labels},
        seen=torch.unique(torch.cat(seen)),
        environment=about["environment"],
        run=about["run"],
    )
    own = fold_config(cfg, fold)
    save_checkpoint(Path(own.run_dir, MODEL), checkpoint)
    history = pd.DataFrame([row for network in networks for row in network.state["history"]])
    save_table(Path(own.run_dir, "history.csv"), history)
    save_figure(Path(own.run_dir, "loss.png"), lambda: plot_history(history, checkpoint.epochs))
    probabilities = calibrate(probabilities, temperature * relative_temperature(n_networks))
    return checkpoint, clips, make_predictions(validated, labels, probabilities)


def fit_distance(cfg: Config, clips: pd.DataFrame, mfcc: MFCC) -> dict[str, Tensor]:
    """What Distance learns from the training and validation clips of one network."""
    cache, labels, distance = FeatureCache(cfg, mfcc), sorted(set(clips.emotion)), Distance(cfg)
    train, val = (make_loader(clips[clips.part == part], labels, cache, cfg) for part in ("train", "val"))
    distance.fit((batch.features for batch in train), (batch.features for batch in val))
    return distance.state_dict()


def fit_voices(cfg: Config, clips: pd.DataFrame, cache: FeatureCache) -> Voices:
    """The voices of training clips; empty where others are to be labelled, or no network asks for them."""
    known, voices = clips[clips.speaker != ""], Voices(cfg)
    if cfg.recordings == "same" and cfg.cmn != "none" and known.speaker.nunique() > 1:
        voices.fit(make_loader(known, sorted(set(known.emotion)), cache, cfg), known.speaker.tolist())
    return voices


def fit_shifts(cfg: Config, clips: pd.DataFrame, mfcc: MFCC, labels: Sequence[str]) -> Tensor:
    """By how much each emotion moves the mean of a speaker's clips, (C, n_features, 1)."""
    known = clips[(clips.part == "train") & (clips.speaker != "")]
    shifts = torch.zeros(len(labels), cfg.n_features, 1)
    if len(known):
        means = mean_features(known, FeatureCache(cfg, mfcc), cfg, EmotionCNNGRU(cfg, len(labels)).depth)
        table = pd.DataFrame(means[:, :, 0].numpy(), index=known.index)
        by_class = table.groupby([known.speaker, known.emotion]).mean()
        moved = by_class - by_class.groupby(level=0).mean()  # of each speaker, every class counting alike
        for emotion, rows in moved.groupby(level=1):
            shifts[labels.index(emotion), :, 0] = torch.from_numpy(rows.mean().to_numpy(copy=True))
    return shifts


def out_of_bag(networks: Sequence[Network]) -> tuple[pd.DataFrame, Tensor, Tensor]:
    """Predictions of the validation clips, each by the networks that did not train on it.

    Returns:
        The rows of the clips, their mean probabilities (N, C), and how many networks these are of, (N, 1).
    """
    by_clip = pd.concat([network.val_probabilities for network in networks]).groupby(level=0)
    mean, count = by_clip.mean(), torch.tensor(by_clip.size().to_numpy())
    validated = networks[0].clips.loc[mean.index].reset_index(drop=True)
    return validated, torch.tensor(mean.to_numpy()), count[:, None]


def relative_temperature(n_networks: NumberT) -> NumberT:
    """The temperature that a mean of so many networks needs, as a part of what one alone needs.

    The mean is less sure of itself than each of them. Measured (assets/experiments.md): 1 for one network,
    0.9 for two, 0.83 for eight.
    """
    return 0.8 + 0.2 / n_networks


def fit_temperature(probabilities: Tensor, targets: Tensor, n_networks: Tensor) -> float:
    """The temperature of one network, fitted to clips that were not trained on.

    Args:
        probabilities: (N, C), not calibrated, means over networks.
        targets: (N,) true classes.
        n_networks: (N, 1) how many networks.
    """
    from scipy.optimize import minimize_scalar

    logits = probabilities.clamp(min=1e-12).log() / relative_temperature(n_networks)

    def loss(temperature: float) -> float:
        # The prior, 1 give or take 30 %, counts as one clip: a few that are all right make nothing certain.
        prior = (math.log(temperature) / 0.3) ** 2 / 2
        return nn.functional.cross_entropy(logits / temperature, targets).item() + prior / len(targets)

    return float(minimize_scalar(loss, bounds=(0.2, 5), method="bounded").x)


# ---- the report ------------------------------------------------------------------------------------------


def report(
    cfg: Config,
    checkpoint: Checkpoint,
    clips: pd.DataFrame,
    validated: pd.DataFrame,
    *,
    about: str = "",
    adapt: bool = False,
    own_classes: bool = False,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Score a model on the test clips among those given, and write metrics, predictions and figures.

    Args:
        cfg: Its run_dir is where the report goes.
        checkpoint: The model.
        clips: As load_corpus gives them, with the column part.
        validated: Its predictions of the validation clips, if any.
        about: Which clips these are; empty: what describe_split says.
        adapt: Whether to score the test clips a second time, by models adapted to their speakers.
        own_classes: Whether to label them with nothing but the classes that they have.

    Returns:
        What metrics.json holds, and the predictions of the test clips; where there are none, of the
        validation clips.
    """
    run_dir = Path(cfg.run_dir)
    model = build_ensemble(checkpoint).to(resolve_device(cfg.device))
    metrics: dict[str, Any] = {
        "run": checkpoint.run,
        "split": about or describe_split(clips, cfg),
        "epochs": checkpoint.epochs,
        "temperature": checkpoint.temperature,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "own_classes": own_classes,
        "config": asdict(cfg),
    }
    predictions = validated
    if len(validated):
        metrics["val"] = score(validated)
    test = clips[clips.part == "test"].reset_index(drop=True)
    if len(test):
        cache, labels = FeatureCache(cfg, model.mfcc), checkpoint.labels
        label = partial(make_predictions, test, labels, own_classes=own_classes)
        predictions = label(evaluate(model, make_loader(test, labels, cache, cfg))[0])
        metrics["test"] = score(predictions) | {"seen": checkpoint.count_seen(test)}
        if adapt:
            metrics["adapted"] = score(label(evaluate_adapted(model, test, labels, cache, cfg)))
    save_json(run_dir / "metrics.json", metrics)
    save_predictions(run_dir, predictions)
    for part, title in PART_TITLES.items():
        if part in metrics:
            heading = f"\n{title}\n" if {"val", "adapted"} & metrics.keys() else ""
            say(heading + describe_scores(metrics[part]))
    epochs = ", ".join(map(str, checkpoint.epochs))
    say(f"\n{cfg.checkpoint}: {checkpoint.summary}, of epoch {epochs}; report and figures in {run_dir}")
    return metrics, predictions


PART_TITLES = {
    "val": "validation clips, each by the networks that did not train on it (they chose the epochs)",
    "test": "test clips, scored once",
    "adapted": "test clips, the model adapted to each speaker by his test clips, without their labels",
}


def make_predictions(
    clips: pd.DataFrame, labels: Sequence[str], probabilities: Tensor, *, own_classes: bool = False
) -> pd.DataFrame:
    """A row per clip: path, emotion, corpus, speaker, predicted, and a column p(label) for each class.

    With `own_classes` for those alone that the clips have: their probabilities, divided by their sum.
    """
    if own_classes:
        own = [number for number, label in enumerate(labels) if label in set(clips.emotion)]
        labels = [labels[number] for number in own]
        probabilities = nn.functional.normalize(probabilities[:, own], p=1, dim=1)
    columns = {f"p({label})": probabilities[:, number].numpy() for number, label in enumerate(labels)}
    predicted = np.array(labels, dtype=object)[probabilities.argmax(dim=1)]
    return clips[["path", "emotion", "corpus", "speaker"]].assign(predicted=predicted, **columns)


def confidence_of(predictions: pd.DataFrame) -> "pd.Series[float]":
    """The probability of the predicted class of each clip."""
    return predictions.filter(like="p(").astype(float).max(axis=1)


SCORES = {
    "accuracy": "accuracy",
    "uar": "unweighted average recall",
    "macro_f1": "macro F1",
    "calibration_error": "calibration error",
}


def score(predictions: pd.DataFrame) -> dict[str, Any]:
    """The scores of all clips, with intervals, of each class that occurs, each corpus, each known speaker."""
    from sklearn.metrics import classification_report  # takes seconds

    true, labels = predictions.emotion, sorted(set(predictions.emotion))
    per_class = classification_report(
        true, predictions.predicted, labels=labels, output_dict=True, zero_division=0
    )
    known = predictions[predictions.speaker != ""]
    return {
        **summarize(predictions),
        "intervals": bootstrap(predictions),
        "per_class": {label: per_class[label] for label in labels},
        "per_corpus": {str(name): summarize(group) for name, group in predictions.groupby("corpus")},
        "per_speaker": {str(name): summarize(group) for name, group in known.groupby("speaker")},
    }


def summarize(predictions: pd.DataFrame) -> dict[str, float]:
    """SCORES, those of classes as means over the classes that occur, and the number of clips."""
    from sklearn.metrics import f1_score, recall_score

    true, predicted = predictions.emotion, predictions.predicted
    macro = {"labels": sorted(set(true)), "average": "macro", "zero_division": 0}
    return {
        "accuracy": float((true == predicted).mean()),
        "uar": float(recall_score(true, predicted, **macro)),
        "macro_f1": float(f1_score(true, predicted, **macro)),
        "calibration_error": calibration_error(confidence_of(predictions), true == predicted),
        "clips": len(predictions),
    }


MIN_SPEAKERS = 5  # behind an interval: fewer say nothing about the next speaker


def speakers_known(predictions: pd.DataFrame) -> bool:
    """Whether all speakers are known, and are enough to resample."""
    return "" not in set(predictions.speaker) and predictions.speaker.nunique() >= MIN_SPEAKERS


def bootstrap(predictions: pd.DataFrame) -> dict[str, list[float]]:
    """95 % intervals of accuracy, UAR and macro F1, from resampled speakers.

    The clips of one speaker stand or fall together: resampling clips would promise too much. Empty where
    fewer than five speakers are known, or some are not.
    """
    if not speakers_known(predictions):
        return {}
    quantiles = resample(predictions, predictions.speaker).quantile([0.025, 0.975])
    return {name: values.tolist() for name, values in quantiles.items()}


def resample(predictions: pd.DataFrame, unit: "pd.Series[str]", *, draws: int = 1000) -> pd.DataFrame:
    """Scores of units (speakers, or clips) drawn with replacement (Efron & Tibshirani 1993, ch. 13).

    `unit` (N,) says what each clip is drawn with. Tables with the same units get the same draws, a row for
    each, so that their scores can be subtracted.
    """
    right = predictions.predicted == predictions.emotion
    counts = pd.crosstab(unit, predictions.emotion)  # (units, classes)
    hits = pd.crosstab(unit, predictions.emotion, right, aggfunc="sum").fillna(0)
    guesses = pd.crosstab(unit, predictions.predicted).reindex(columns=counts.columns, fill_value=0)
    drawn = np.random.default_rng(0).integers(len(counts), size=(draws, len(counts)))
    times = np.stack([np.bincount(row, minlength=len(counts)) for row in drawn])  # (draws, units)
    total, found, guessed = (times @ table.to_numpy(np.int64) for table in (counts, hits, guesses))
    with np.errstate(invalid="ignore"):  # a class that no drawn unit has
        recall, f1 = found / total, np.where(total > 0, 2 * found / (total + guessed), np.nan)
    accuracy = found.sum(axis=1) / total.sum(axis=1)
    scores = {"accuracy": accuracy, "uar": np.nanmean(recall, axis=1), "macro_f1": np.nanmean(f1, axis=1)}
    return pd.DataFrame(scores)


def calibration_error(confidence: "pd.Series[float]", right: "pd.Series[bool]", *, n_bins: int = 15) -> float:
    """Expected calibration error (ECE, arXiv:1706.04599): how far confidence and accuracy are apart.

    Of the probability of each clip's predicted class, (N,), and whether it is right, (N,).
    """
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    return float(np.abs(np.bincount(bins, weights=confidence - right)).sum() / len(right))


def describe_scores(scores: dict[str, Any]) -> str:
    """The scores, laid out for a terminal."""
    lines = []
    if scores.get("seen"):
        lines.append(f"not a score: {scores['seen']} of {scores['clips']} clips were seen in training")
    for name, text in SCORES.items():
        low, high = scores["intervals"].get(name, (0, 0))
        interval = f"  95 % interval over speakers {low:.1%} to {high:.1%}" if high else ""
        lines.append(f"{text:27}{scores[name]:6.1%}{interval}")
    if not scores["intervals"]:
        lines.append("no intervals: they need five speakers or more, all known (see --manifest, --folds)")
    per_class = pd.DataFrame(scores["per_class"]).T.rename(columns={"f1-score": "F1", "support": "clips"})
    names = {"uar": "UAR", "macro_f1": "F1", "calibration_error": "ECE"}
    per_corpus = pd.DataFrame(scores["per_corpus"]).T.rename(columns=names)
    tables = [per_class, per_corpus]
    if (n_speakers := len(scores["per_speaker"])) > 1:  # calibration says nothing on so few clips
        table = pd.DataFrame(scores["per_speaker"]).T.rename(columns=names)[["accuracy", "UAR", "clips"]]
        table = table.sort_values("accuracy", kind="stable")
        if n_speakers > 12:
            table = pd.concat([table.head(4), table.tail(4)]).rename_axis(f"worst, best of {n_speakers}")
        tables.append(table)
    for table in tables:
        formats: dict[str, Any] = dict.fromkeys(table.columns, "{:.1%}".format) | {"clips": "{:.0f}".format}
        lines.append(table.rename(printable).to_string(formatters=formats))
    return "\n".join(lines)


def save_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV in one step; everything is quoted, or pandas would let a lone CR end a row."""
    save_file(path, table.to_csv(index=False, quoting=1).encode("utf-8", "surrogateescape"))


def save_predictions(run_dir: Path, predictions: pd.DataFrame) -> None:
    """Write predictions.csv, draw its figures, and write a page to listen to the mistakes."""
    save_table(run_dir / "predictions.csv", predictions)
    save_figure(run_dir / "confusion_matrix.png", lambda: plot_confusion(predictions))
    save_figure(run_dir / "scores.png", lambda: plot_scores(predictions))
    save_view(run_dir / "mistakes.html", lambda: mistakes_page(run_dir, predictions))


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one step."""
    save_file(path, json.dumps(content, indent=2).encode())


def mistakes_page(run_dir: Path, predictions: pd.DataFrame) -> bytes:
    """HTML with the clips that are wrong, the surest first, and a player for each."""
    wrong = predictions.assign(confidence=confidence_of(predictions))
    wrong = wrong[wrong.emotion != wrong.predicted].sort_values("confidence", ascending=False, kind="stable")
    wrong = wrong.assign(link=[link_to(path, run_dir) for path in wrong.path])
    labels = sorted({*predictions.emotion, *predictions.predicted})
    content = {"clips": len(predictions), "labels": labels, "mistakes": wrong.to_dict("records")}
    return fill_page("mistakes.html", content)


# ---- figures ---------------------------------------------------------------------------------------------

BLUE, ORANGE, SKY = COLOURS[5], COLOURS[0], COLOURS[4]


def plot_history(history: pd.DataFrame, kept: Sequence[int]) -> "Figure":
    """Loss, accuracy and learning rate, a line per network, and the epochs that were kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.9))
    panels = dict(zip(("loss", "accuracy", "learning rate"), figure.subplots(1, 3), strict=True))
    parts = (("train", BLUE, "training, with dropout"), ("val", ORANGE, "validation"))
    for number, (_, rows) in enumerate(history.groupby("network")):
        chosen = rows[rows.epoch == kept[number]]
        hidden = "_" if number else ""  # in the legend: one network stands for all
        for name in ("loss", "accuracy"):
            for part, colour, label in parts:
                values, style = rows[f"{part}_{name}"], {"color": colour, "alpha": 0.6}
                panels[name].plot(rows.epoch, values, label=hidden + label, **style)
            style = {"color": ORANGE, "markeredgecolor": "black", "zorder": 3}
            panels[name].plot(chosen.epoch, chosen[f"val_{name}"], "o", label=f"{hidden}epoch kept", **style)
        panels["learning rate"].plot(rows.epoch, rows.learning_rate, color="black", alpha=0.5)
    for name, axes in panels.items():
        axes.set(xlabel="epoch", title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels["loss"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    panels["learning rate"].ticklabel_format(axis="y", scilimits=(0, 0))
    return figure


def plot_confusion(predictions: pd.DataFrame) -> "Figure":
    """The confusion matrix, each row the percentages of one true class; empty for one without clips."""
    from matplotlib.figure import Figure

    labels = sorted({*predictions.emotion, *predictions.predicted})
    counts = pd.crosstab(predictions.emotion, predictions.predicted)
    counts = counts.reindex(index=labels, columns=labels, fill_value=0)
    totals = counts.sum(axis=1)
    percent = (100 * counts.div(totals.where(totals > 0), axis=0)).to_numpy()
    names = legible(labels)
    size = 2 + 0.65 * len(labels)
    figure = Figure(figsize=(size + 0.5, size))
    axes = figure.subplots()
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.argwhere(~np.isnan(percent)):
        value = percent[row, column]
        colour = "white" if value > DARK else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(labels)), names, rotation=45, ha="right", rotation_mode="anchor")
    rows = [f"{name} ({total:,})" for name, total in zip(names, totals, strict=True)]
    axes.set_yticks(range(len(labels)), rows)
    axes.grid(visible=False)
    axes.set(xlabel="predicted", ylabel="true (clips)", title=f"% of each class, {len(predictions):,} clips")
    return figure


DARK = 71  # percent: where white on the colour map Blues has more contrast than black


def plot_scores(predictions: pd.DataFrame) -> "Figure":
    """Accuracy of each corpus, and how far confidence can be believed; with 95 % intervals."""
    from matplotlib.figure import Figure

    groups = {"all": predictions} | {str(name): group for name, group in predictions.groupby("corpus")}
    names = legible([*groups])
    figure = Figure(figsize=(12, 4.6))
    bars, reliability = figure.subplots(1, 2)
    for row, group in enumerate(groups.values()):
        accuracy = float((group.emotion == group.predicted).mean())
        bars.barh(row, accuracy, color=SKY)
        bars.text(1.02, row, f"{accuracy:.1%}", va="center")
        if interval := bootstrap(group).get("accuracy"):
            bars.plot(interval, [row, row], color="black", marker="|")
    sizes = [f"{name} ({len(group):,})" for name, group in zip(names, groups.values(), strict=True)]
    bars.set_yticks(range(len(groups)), sizes)
    bars.invert_yaxis()
    bars.grid(visible=False, axis="y")
    bars.set(xlim=(0, 1), xlabel=f"95 % interval over {MIN_SPEAKERS} speakers or more", title="accuracy")
    plot_reliability(reliability, confidence_of(predictions), predictions.emotion == predictions.predicted)
    return figure


def plot_reliability(axes: "Axes", confidence: "pd.Series[float]", right: "pd.Series[bool]") -> None:
    """Accuracy against confidence, in 15 bins: a dot's area is the number of its clips."""
    from scipy.stats import binomtest

    for _, inside in right.groupby(pd.cut(confidence, np.linspace(0, 1, 16)), observed=True):
        place, test = confidence[inside.index].mean(), binomtest(int(inside.sum()), len(inside))
        axes.plot([place, place], test.proportion_ci(method="wilson"), color=BLUE)
        axes.scatter(place, inside.mean(), 20 + 600 * len(inside) / len(right), color=BLUE)
    axes.plot([], [], color=BLUE, label="95 % interval")
    for share in (0.01, 0.1, 0.3):
        axes.scatter([], [], 20 + 600 * share, color=BLUE, label=f"{share:.0%} of the clips")
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", label="confidence = accuracy")
    axes.legend(fontsize="small", labelspacing=0.7)
    error = calibration_error(confidence, right)
    axes.set(
        xlabel="confidence", ylabel="accuracy", title=f"calibration error {error:.1%}", ylim=(-0.02, 1.02)
    )


# ---- cross-validation ------------------------------------------------------------------------------------


def report_folds(cfg: Config, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Score the clips of all folds together, each labelled by networks that never saw it.

    `tables` are the predictions of each fold, by its name; returns what metrics.json holds.
    """
    predictions = pd.concat(
        [table.assign(fold=fold) for fold, table in enumerate(tables.values(), 1)], ignore_index=True
    )
    pooled = score(predictions)
    heading = f"all {len(predictions):,} clips, each by the networks that never saw it"
    say(f"\n{heading}\n{describe_scores(pooled)}")
    per_fold = pd.DataFrame(map(summarize, tables.values()), index=[*map(printable, tables)])
    per_fold = per_fold.drop(columns="clips")
    per_fold = pd.concat([per_fold, per_fold.agg(["mean", "std"])])
    say(f"\n{per_fold.to_string(float_format='{:.1%}'.format)}")
    folds = [{"fold": name} | score(table) for name, table in tables.items()]
    metrics = {"pooled": pooled, "folds": folds, "config": asdict(cfg)}
    save_json(Path(cfg.run_dir, "metrics.json"), metrics)
    save_predictions(Path(cfg.run_dir), predictions)
    return metrics


# ---- other models, other clips ---------------------------------------------------------------------------


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether they mean the same, however they are spelled: Suprised is Surprised."""
    return list(map(class_of, one)) == list(map(class_of, other))


def load_init(path: Path, cfg: Config, labels: Sequence[str]) -> Checkpoint:
    """The model to start from.

    Raises:
        UserError: It cannot be read, or the settings of its networks are not those of the run.
    """
    checkpoint, _ = load_checkpoint(path)
    n_networks = len(checkpoint.members)
    names = [n for n in sorted(MODEL_FIELDS) if getattr(checkpoint.config, n) != getattr(cfg, n)]
    needed = [f"--{name} {getattr(checkpoint.config, name)}" for name in names if name != "ensemble"]
    needed += [f"--ensemble {n_networks}"] * (cfg.ensemble > n_networks)
    if needed:
        raise UserError(f"what shapes the networks must be as in {path}: pass {' '.join(needed)}")
    if not same_classes(checkpoint.labels, labels):
        classes = f"{', '.join(labels)}, not as in {path} {', '.join(checkpoint.labels)}"
        note(f"note: classes {classes}: starts with a new last layer")
    return checkpoint


def evaluate_folders(
    cfg: Config, folders: Sequence[str], path: Path, *, adapt: bool, own_classes: bool
) -> None:
    """Score a model on folders of labelled clips; the report of each goes to run_dir/evaluate_<folder>.

    With `adapt` also by models adapted to each speaker; with `own_classes` no clip gets a class that its
    folder does not have.

    Raises:
        UserError: The model or a folder cannot be used; no report is made.
    """
    checkpoint, model = load_checkpoint(path)
    note(f"model: {path}, {checkpoint.summary}")
    kept = RUNTIME_FIELDS - {"data_dir", "run_dir", "checkpoint"} | {"labels_from", "extra_labels"}
    model_cfg = replace(
        checkpoint.config, **{name: getattr(cfg, name) for name in kept}, checkpoint=str(path)
    )
    names = [re.sub(r"[^\w.-]", "_", Path(folder).resolve().name)[:80] for folder in folders]
    if same := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--evaluate: two reports would be evaluate_{same.pop()}: name one folder alone")
    jobs = []
    for folder, name in zip(folders, names, strict=True):
        jobs.append(replace(model_cfg, data_dir=folder, run_dir=f"{cfg.run_dir}/evaluate_{name}"))
        check_place(jobs[-1].run_dir)
    all_found = [find_known(own, checkpoint, own_classes=own_classes) for own in jobs]
    rows = {}
    for own, (found, about) in zip(jobs, all_found, strict=True):
        clips, run_dir = load_corpus(own, model.mfcc, found).assign(part="test"), Path(own.run_dir)
        if run_dir.exists():  # of another folder of that name, or another model
            set_aside(run_dir, datetime.fromtimestamp(run_dir.stat().st_mtime).strftime(RUN_ID))
        said: dict[str, Any] = {"about": f"{len(clips):,} clips of {about}", "own_classes": own_classes}
        say(printable(said["about"]))
        metrics, _ = report(own, checkpoint, clips, pd.DataFrame(), **said, adapt=adapt)
        rows[printable(own.data_dir)] = row_of(metrics)
    if len(rows) > 1:
        table = pd.DataFrame(rows).T
        say(f"\n{table.to_string(formatters={'clips': '{:.0f}'.format}, float_format='{:.1%}'.format)}")


def row_of(metrics: dict[str, Any]) -> dict[str, float]:
    """The scores of a folder in the table of all."""
    names = {"accuracy": "accuracy", "uar": "UAR", "calibration_error": "ECE"}
    return {"clips": metrics["test"]["clips"]} | {
        f"{prefix}{text}": metrics[part][name]
        for part, prefix in (("test", ""), ("adapted", "adapted "))
        for name, text in names.items()
        if part in metrics
    }


def find_known(cfg: Config, checkpoint: Checkpoint, *, own_classes: bool) -> tuple[pd.DataFrame, str]:
    """The clips in a folder that are of classes of a model, as find_clips gives them, and what they are.

    Raises:
        UserError: There are none, or with `own_classes` fewer than two classes.
    """
    found = find_clips(cfg)
    found = found[found.left_out == ""]
    spelling = {class_of(label): label for label in checkpoint.labels}  # Suprised is Surprised
    clips = found.assign(emotion=[spelling.get(class_of(name), "") for name in found.emotion])
    clips = clips[clips.emotion != ""]
    classes = f"classes of {cfg.data_dir}: {', '.join(sorted(set(found.emotion)))}"
    classes += f"; classes of {cfg.checkpoint}: {', '.join(checkpoint.labels)}"
    if clips.empty:
        raise UserError(f"{classes}: none in common")
    about, own, n_others = cfg.data_dir, sorted(set(clips.emotion)), len(found) - len(clips)
    if n_others:
        note(f"note: {n_others} clips left out: {classes}")
        about += f", {n_others:,} of other classes left out"
    if own_classes:
        if len(own) < 2:
            raise UserError(f"--own_classes: {cfg.data_dir} has only one class of the model, {own[0]}")
        about += f", labelled as {', '.join(own[:-1])} or {own[-1]}, no other class"
    return clips, about


def read_run(folder: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """Settings and predictions of a finished run, the latter by the place or name of the file.

    Raises:
        UserError: The folder does not hold them.
    """
    as_they_are: Any = {"dtype": str, "keep_default_na": False, "encoding_errors": "surrogateescape"}
    try:
        metrics = json.loads(Path(folder, "metrics.json").read_text())
        table = pd.read_csv(Path(folder, "predictions.csv"), **as_they_are)
        # The clips of the common corpora are known by name, wherever they lie.
        places = zip(table.path, table.corpus, strict=True)
        keys = [str(Path(p).resolve()) if corpus == "other" else clip_name(p) for p, corpus in places]
        table.index = pd.Index(keys)
        table = table[~table.index.duplicated(keep=False)].copy()  # one name under two labels
        for column in ("emotion", "predicted"):  # Suprised is Surprised
            table[column] = table[column].map(class_of)
        if "val" in metrics and "test" not in metrics:
            note(f"note: {folder} has no test part: its validation clips are compared")
        run = json.loads(about.read_text()) if (about := Path(folder, "run.json")).is_file() else {}
        if seen := metrics.get("test", {}).get("seen"):
            note(f"warning: {folder}: not a score: {seen} of its test clips were seen in training")
        how = {"init": run.get("init", ""), "folds": len(metrics.get("folds", []))}
        how["own_classes"] = metrics.get("own_classes", False)
        return metrics["config"] | how | run.get("environment", {}), table
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{folder} holds no finished run: {error}") from None


def compare(folders: Sequence[str]) -> None:
    """Print in which settings runs differ, and the scores of each beside those of the first.

    Raises:
        UserError: One is no finished run, or has no clip in common with the first.
    """
    if len({Path(folder).resolve() for folder in folders}) < max(2, len(folders)):
        raise UserError("--compare needs two runs or more, each once")
    runs = {folder: read_run(folder) for folder in folders}
    settings = pd.DataFrame({f: pd.Series(about, dtype=object) for f, (about, _) in runs.items()}).map(repr)
    settings = settings.drop(["run_dir", "cache_dir", "checkpoint", "submission"], errors="ignore")
    differ = settings[settings.nunique(axis=1) > 1]
    say("no setting differs" if differ.empty else differ.to_string())
    first, *others = folders
    for other in others:
        compare_pair(first, runs[first][1], other, runs[other][1])
    if len(others) > 1 and set(differ.index) <= {"seed", "split_seed"}:
        scores = pd.DataFrame({folder: summarize(table) for folder, (_, table) in runs.items()}).T
        scores = scores[list(SCORES)].rename(columns=SCORES)
        scores = pd.concat([scores, scores.agg(["mean", "std"])])
        say(f"\neach on its own test clips\n{scores.to_string(float_format='{:.1%}'.format)}")


def compare_pair(one: str, a: pd.DataFrame, other: str, b: pd.DataFrame) -> None:
    """Print the scores of two runs on the clips that both tested; the tables are as read_run gives them.

    Raises:
        UserError: They have no clip in common, or disagree about the class of one.
    """
    common = a.index.intersection(b.index)
    sizes = f"{len(common):,} clips that both tested, of {len(a):,} in {one} and {len(b):,} in {other}"
    if common.empty:
        raise UserError(f"no clip was tested in both {one} and {other}: nothing to compare")
    a, b = a.loc[common], b.loc[common]
    if n_other := int((a.emotion != b.emotion).sum()):
        raise UserError(f"{n_other} of {sizes} have another true class there: nothing to compare")
    unit, units = pd.Series(common, index=common), "clips, as fewer than five speakers are known"
    if speakers_known(a):
        unit, units = a.speaker, f"{a.speaker.nunique()} speakers"
    table = pd.DataFrame({one: summarize(a), other: summarize(b)}).loc[list(SCORES)].rename(index=SCORES)
    table["difference"] = table[other] - table[one]
    change = (resample(b, unit) - resample(a, unit)).rename(columns=SCORES)
    table[["95 % from", "to"]] = change.quantile([0.025, 0.975]).T
    formats = dict.fromkeys([one, other], "{:.1%}".format)
    say(f"\n{sizes}")
    say(table.to_string(formatters=formats, float_format="{:+.1%}".format, na_rep=""))
    say(f"95 % interval of the difference: resampled by {units}")


# ---- the script ------------------------------------------------------------------------------------------


def main(cfg: Config, flags: Namespace) -> int:
    """Train, or score and compare what was trained."""
    if flags.compare:
        refuse_others(flags, "compare", set())
        compare(flags.compare)
    elif flags.evaluate:
        about = {"labels_from", "extra_labels", "adapt", "own_classes", "demo"}
        refuse_others(flags, "evaluate", RUNTIME_FIELDS - {"data_dir", "submission"} | about)
        is_named = flags.demo or {"checkpoint", "run_dir"} & vars(flags).keys()
        path = Path(cfg.checkpoint)
        path = path if is_named or path.exists() else PRETRAINED["any"]
        evaluate_folders(cfg, flags.evaluate, path, adapt=flags.adapt, own_classes=flags.own_classes)
    else:
        check_flags(cfg, flags)
        if flags.demo and os.environ.get("RANK", "0") == "0":
            make_demo(Path(cfg.data_dir))
        n_folds = flags.folds or (read_about(cfg).get("folds", 0) if flags.resume else 0)
        train(cfg, n_folds=n_folds, resume=flags.resume, init=flags.init or "")
    return 0


def check_flags(cfg: Config, flags: Namespace) -> None:
    """Refuse flags that make no sense together.

    Raises:
        UserError: Naming them.
    """
    if flags.folds == 1 or flags.folds < 0:
        raise UserError(f"folds = {flags.folds}: must be 0 or at least 2")
    if flags.folds and hasattr(flags, "checkpoint"):
        raise UserError("--folds keeps a checkpoint of each fold in run_dir: leave out --checkpoint")
    if flags.adapt:
        raise UserError("--adapt is for --evaluate; --split speaker reports it anyway: leave it out")
    if flags.own_classes:
        raise UserError("--own_classes is for --evaluate: leave it out")
    if flags.resume and flags.init:
        raise UserError("--resume goes on with what the run started from: leave out --init")
    if Path(cfg.checkpoint).is_dir():
        raise UserError(f"checkpoint = {cfg.checkpoint!r}: is a folder, must be a file")


def refuse_others(flags: Namespace, action: str, allowed: Collection[str]) -> None:
    """Refuse flags that have no effect on what the script is told to do.

    Raises:
        UserError: Naming the first one.
    """
    for name, value in vars(flags).items():
        if name not in {*allowed, action} and (value or name in Config.__dataclass_fields__):
            raise UserError(f"--{name} has no effect on --{action}: leave it out")


if __name__ == "__main__":
    raise SystemExit(run(main, *ARGS))
