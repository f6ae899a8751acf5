"""Trains the networks, keeps the best of each, and says how good they are together.

    python train.py

writes best_emotion_model.pth and, into run/, history.csv, metrics.json, predictions.csv, figures, and
mistakes.html to listen to. On several GPUs or machines: `torchrun --nproc_per_node 2 train.py`.

    python train.py --evaluate FOLDER     the same report on other labelled clips, in run/evaluate_FOLDER
    python train.py --compare run other   two runs side by side
"""

from config import MODEL_FIELDS, RUNTIME_FIELDS, Config, UserError, make_parser, note, parse, printable, run

if __name__ == "__main__":  # answers --help, or a bad flag, before the slow imports
    parser = make_parser(__doc__, Config.__dataclass_fields__.keys() - {"submission"})
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in run_dir")
    parser.add_argument("--folds", type=int, default=0, help="cross-validate: test on each of so many parts")
    parser.add_argument("--init", metavar="MODEL", help="start from the weights of a trained model")
    parser.add_argument("--evaluate", metavar="FOLDER", help="score the model on labelled clips; no training")
    parser.add_argument("--compare", metavar="RUN", nargs=2, help="compare the run folders of two runs")
    ARGS = parse(parser)

import contextlib
import copy
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias, cast
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib import cpu_count
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler
from tqdm import tqdm

from model import (
    COLOURS,
    PRETRAINED,
    Augment,
    Batch,
    Checkpoint,
    Distance,
    EmotionCNNGRU,
    EmotionDataset,
    EmotionEnsemble,
    broadcast,
    build_ensemble,
    calibrate,
    load_checkpoint,
    load_tensors,
    mean_over_windows,
    rank,
    resolve_device,
    resolve_dtype,
    save_checkpoint,
    save_figure,
    save_file,
    save_tensors,
    save_view,
    torchrun,
)
from prepare import (
    MFCC,
    FeatureCache,
    class_of,
    clip_name,
    load_corpus,
    make_demo,
    member_seed,
    mfcc_constants,
    split,
    start_child,
)

Loader: TypeAlias = DataLoader[Batch]
Row: TypeAlias = dict[str, float]  # of history.csv

MAX_GRADIENT = 5.0  # norm; a longer gradient is shortened to it
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


def make_train_loader(
    clips: pd.DataFrame, labels: Sequence[str], cache: FeatureCache, cfg: Config, seed: int
) -> Loader:
    """A random window of each clip in random order; under torchrun this process's part of every batch."""
    n_processes = distributed.get_world_size() if distributed.is_initialized() else 1
    repeats = math.ceil(cfg.min_steps * cfg.batch_size / len(clips))  # an epoch has min_steps or more
    dataset = EmotionDataset(pd.concat([clips] * repeats), labels, cache, one_window=True)
    sampler: Any = DistributedSampler(dataset, n_processes, rank(), seed=seed)
    size = max(2, cfg.batch_size // n_processes)
    # Batch norm cannot learn from a single clip: a last batch of one waits for the next epoch.
    drop_last = len(sampler) % size == 1
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(sampler, size, drop_last))


def class_weights(targets: "pd.Series[str]", labels: Sequence[str]) -> Tensor:
    """Weights inversely proportional to class frequency, (C,) float32; 1 for a class of average size."""
    counts = targets.value_counts().reindex(labels)  # NaN for a class that does not occur
    weights = (len(targets) / (len(labels) * counts)).fillna(1.0)
    return torch.from_numpy(weights.to_numpy(np.float32))


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average (EMA) of weights and batch statistics over the steps.

    A young average forgets faster than `decay`, or it would remember the random start.
    """

    def update(means: Any, values: Any, n_steps: Tensor | int) -> None:  # noqa: ANN401 - lists of tensors
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
    for features, _, targets in loader:
        features, targets = augment(features.to(device)), targets.to(device)  # noqa: PLW2901
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(features)  # (B, C)
        loss = criterion(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
        optimizer.step()
        warmup.step()  # after the warm-up it changes nothing
        average.update_parameters(getattr(model, "module", model))
        losses.append(loss.detach())
        accuracies.append((logits.detach().argmax(dim=1) == targets).float().mean())
    loss_of_epoch = torch.stack(losses).mean().item()
    if not math.isfinite(loss_of_epoch):
        raise UserError(f"the training loss is {loss_of_epoch}: lower learning_rate", code=1)
    return loss_of_epoch, torch.stack(accuracies).mean().item()


@torch.inference_mode()
def evaluate(
    model: EmotionEnsemble, loader: Loader, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) float32 of all clips, calibrated if the model is, and their classes (N,)."""
    model.eval()
    device = next(model.parameters()).device
    of_clips: list[Tensor] = []
    classes: list[Tensor] = []
    for features, owner, targets in loader:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            of_windows = model(features.to(device))
        of_clips.append(mean_over_windows(of_windows.float(), owner.to(device), len(targets)).cpu())
        classes.append(targets)
    return model.calibrated(torch.cat(of_clips)), torch.cat(classes)


def validate(
    model: EmotionEnsemble, loader: Loader, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float, float]:
    """Probabilities (N, C) of the validation clips, their accuracy, and their cross-entropy.

    The cross-entropy has class weights (C,); all processes get the same numbers.

    Raises:
        UserError: The loss or a weight is NaN or infinite.
    """
    probabilities, targets = evaluate(model, loader, dtype)
    accuracy = (probabilities.argmax(dim=1) == targets).double().mean().item()
    loss = nn.functional.nll_loss(probabilities.clamp(min=1e-12).log(), targets, weights).item()
    accuracy, loss = broadcast([accuracy, loss])
    if not (math.isfinite(loss) and all(bool(v.isfinite().all()) for v in model.state_dict().values())):
        raise UserError(f"weights overflow, the validation loss is {loss}: lower learning_rate", code=1)
    return probabilities, accuracy, loss


# ---- one network -----------------------------------------------------------------------------------------


def fit(
    cfg: Config, clips: pd.DataFrame, mfcc: MFCC, *, member: int, resume: bool, show: Callable[[Row], None]
) -> None:
    """Train one network of the ensemble; after each epoch its state goes to run_dir/network<member>.pth.

    The network that is kept is of the latest epoch whose validation accuracy is within one standard error of
    the best (Breiman et al. 1984): the highest of 40 accuracies on 1,000 clips is an accident.

    `clips` has the column part, as split gives it for this network, and `show` gets the row of history.csv
    of each epoch.

    Raises:
        UserError: The loss is no longer finite.
    """
    path, seed = Path(cfg.run_dir, f"network{member}.pth"), member_seed(cfg, member)
    device, labels = resolve_device(cfg.device), sorted(set(clips.emotion))
    dtype = resolve_dtype(cfg.precision, device)
    # The augmentation is made on the CPU, and takes the features' constants along to the device.
    cache, augment = FeatureCache(cfg, mfcc), Augment(copy.deepcopy(mfcc), cfg).to(device)
    train_clips, val_clips = clips[clips.part == "train"], clips[clips.part == "val"]
    val_loader = make_loader(val_clips, labels, cache, cfg)
    example = draw_clips(train_clips, cfg, seed)  # every epoch has about as many clips of each class
    weights = class_weights(example.emotion, labels)
    criterion = nn.CrossEntropyLoss(weights, label_smoothing=cfg.label_smoothing).to(device)

    torch.manual_seed(seed)
    all_windows = make_loader(train_clips, labels, cache, cfg)
    model = make_network(cfg, len(labels), member, all_windows).to(device)
    start_from(init_file(cfg), model, member, labels)
    average = make_average(model, cfg.ema_decay)
    optimizer = make_optimizer(model, cfg)
    n_steps = len(make_train_loader(example, labels, cache, cfg, seed))
    warmup, plateau = make_schedules(optimizer, cfg, n_steps)
    parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
    parts |= {"warmup": warmup, "plateau": plateau}
    history: list[Row] = []
    best, bad_epochs, kept = 0.0, 0, {}
    if resume and path.is_file():
        state = load_tensors(path)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        history, best, bad_epochs, kept = (state[name] for name in ("history", "best", "bad_epochs", "kept"))

    ddp_model = DistributedDataParallel(model) if distributed.is_initialized() else model
    averaged = EmotionEnsemble(augment.mfcc, [average.module], Distance(cfg).to(device))
    while len(history) < cfg.epochs and bad_epochs < cfg.patience:
        started, epoch, lr = time.perf_counter(), len(history) + 1, optimizer.param_groups[0]["lr"]
        # Seeded anew each epoch, so that a resumed run needs no state of random generators.
        torch.manual_seed((seed * 10_007 + epoch) * 101 + rank())
        drawn = draw_clips(train_clips, cfg, seed * 10_007 + epoch)
        train_loader = make_train_loader(drawn, labels, cache, cfg, seed + epoch)
        loss, train_accuracy = train_epoch(
            ddp_model,
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
        row = {"network": member, "epoch": epoch, "learning_rate": lr, "train_loss": loss}
        row |= {"train_accuracy": train_accuracy, "val_loss": val_loss, "val_accuracy": accuracy}
        history.append(row | {"seconds": round(time.perf_counter() - started, 2)})
        if rank() == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"history": history, "best": best, "bad_epochs": bad_epochs, "kept": kept}
            save_tensors(path, state)
        show(history[-1])


def init_file(cfg: Config) -> Path:
    """Where a run keeps the model that --init named."""
    return Path(cfg.run_dir, "init.pth")


def start_from(path: Path, model: EmotionCNNGRU, member: int, labels: Sequence[str]) -> None:
    """Give a network the weights of its number in a trained model, mean and std of the features included.

    Where the classes are others, the last layer stays as it is, at random; without a file so does all.
    """
    if path.is_file():
        content, last = load_tensors(path), f"head.{len(model.head) - 1}."
        weights = content["members"][member - 1]
        if not same_classes(content["labels"], labels):
            weights |= {name: own for name, own in model.state_dict().items() if name.startswith(last)}
        model.load_state_dict(weights)


def make_network(cfg: Config, n_classes: int, member: int, loader: Loader) -> EmotionCNNGRU:
    """A network with random weights that knows mean and std of the features of the training clips."""
    model = EmotionCNNGRU(cfg, n_classes)
    if cfg.recordings == "any":
        model.level[0] = 1
    if cfg.cmn == "all" or (cfg.cmn == "alternate" and member % 2 == 0):
        model.cmn[1 : cfg.n_mfcc] = 1  # the first coefficient, which is the loudness, keeps its mean
    total = squares = n_frames = torch.zeros((), dtype=torch.float64)
    for features, _, _ in loader:
        values = model.remove_level(features).double()
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


# ---- several networks ------------------------------------------------------------------------------------


def fit_members(
    cfg: Config, tables: Sequence[pd.DataFrame], mfcc: MFCC, *, resume: bool, show: Callable[[Row], None]
) -> None:
    """Train all networks: on CPU as many at once as there are cores, else one after the other.

    Two networks with a thread each take half the time of one after the other with two threads, since threads
    wait for each other at every small step. Each has a table of clips with parts of its own.

    Raises:
        UserError: A loss is no longer finite, or a process died.
    """
    n_parallel = min(len(tables), cpu_count())
    waiting: list[dict[str, Any]] = [
        {"cfg": cfg, "clips": clips, "mfcc": mfcc, "member": member, "resume": resume}
        for member, clips in enumerate(tables, start=1)
    ]
    if n_parallel == 1 or distributed.is_initialized() or resolve_device(cfg.device).type != "cpu":
        for arguments in waiting:
            fit(**arguments, show=show)
        return
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, BaseProcess] = {}
    try:
        while waiting or running:
            while waiting and len(running) < n_parallel:
                ours, theirs = context.Pipe(duplex=False)
                n_threads = cpu_count() // n_parallel
                running[ours] = context.Process(
                    target=_fit_in_child, args=(theirs, n_threads, waiting.pop(0))
                )
                before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child keeps it while it starts
                running[ours].start()
                signal.signal(signal.SIGINT, before)
                theirs.close()
            for pipe in cast(list[Connection], wait(list(running))):
                try:
                    message = pipe.recv()
                except EOFError:  # it has ended
                    process = running.pop(pipe)
                    process.join()
                    if process.exitcode:
                        raise UserError(f"a training process died ({process.exitcode})", code=1) from None
                else:
                    if isinstance(message, Exception):
                        raise message
                    show(message)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _fit_in_child(pipe: Connection, n_threads: int, arguments: dict[str, Any]) -> None:
    start_child(n_threads)
    try:
        fit(**arguments, show=pipe.send)
    except (UserError, OSError, MemoryError, RuntimeError) as error:  # the parent's run() words them
        pipe.send(error)


# ---- the run ---------------------------------------------------------------------------------------------


def divide(clips: pd.DataFrame, cfg: Config, *, fold: int = 0, n_folds: int = 0) -> list[pd.DataFrame]:
    """For each network, the clips with the column part: which it trains, validates and is tested on."""
    members = range(1, cfg.ensemble + 1)
    return [
        clips.assign(part=split(clips, cfg, member=member, fold=fold, n_folds=n_folds)) for member in members
    ]


def train(
    cfg: Config, mfcc: MFCC, tables: Sequence[pd.DataFrame], *, resume: bool, init: Checkpoint | None
) -> pd.DataFrame:
    """Train the networks, keep the best epoch of each, and report how good they are.

    `tables` is what divide gave, `init` the model to start from, `resume` whether to go on with the run in
    run_dir.

    Returns:
        What predictions.csv holds; under torchrun nothing in all processes but the first.

    Raises:
        UserError: The run cannot be resumed, or its loss is no longer finite.
        KeyboardInterrupt: The finished epochs are saved.
    """
    clips = tables[0]  # the test part is that of all
    about = describe_split(clips, cfg)
    say(about)
    data = hashlib.sha256(clips[["audio_hash", "emotion", "part"]].to_csv(index=False).encode()).hexdigest()
    run_id = start_run(cfg, data, resume=resume, init=init) if rank() == 0 else ""
    try:
        quiet = True if rank() > 0 else None  # None: where there is no terminal
        with tqdm(total=cfg.ensemble * cfg.epochs, unit="epoch", disable=quiet) as bar:
            broadcast([run_id])  # the others wait until an earlier run is set aside
            fit_members(cfg, tables, mfcc, resume=resume, show=lambda row: show_epoch(row, cfg, bar))
    except (KeyboardInterrupt, UserError) as error:  # the networks so far are worth keeping
        with contextlib.suppress(UserError):  # a damaged state, or the error itself once more
            if maker_of(Path(cfg.checkpoint)) not in {None, run_id}:  # a finished model is worth more
                cfg = replace(cfg, checkpoint=str(Path(cfg.run_dir, "unfinished.pth")))
            if rank() == 0 and collect(cfg, tables, mfcc, run_id):
                note(f"the networks so far are kept in {cfg.checkpoint}")
        if isinstance(error, KeyboardInterrupt):
            note("stopped: the same command with --resume goes on after the last finished epoch")
        raise
    if not bar.n:
        note(f"note: nothing was left to train: for more, start a new run with --init {cfg.checkpoint}")
    collected = collect(cfg, tables, mfcc, run_id) if rank() == 0 else None
    Path(cfg.run_dir, "unfinished.pth").unlink(missing_ok=True)
    return report(cfg, clips, *collected, about) if collected else pd.DataFrame()


def describe_split(clips: pd.DataFrame, cfg: Config) -> str:
    """Clips per part, and whether the test speakers are known from training."""
    sizes = ", ".join(f"{(clips.part == part).sum():,} {part}" for part in ("train", "val", "test"))
    speakers = {part: set(group.speaker) - {""} for part, group in clips.groupby("part")}
    heard = speakers.get("test", set()) | speakers["val"]
    shared = f", {len(heard & speakers['train'])} of the {len(heard)} speakers in val and test also in train"
    how = {"random": "split at random", "speaker": "split by speaker"}[cfg.split]
    how += ", val drawn anew for each network" if cfg.ensemble > 1 else ""
    return f"{clips.emotion.nunique()} classes; {sizes} clips, {how}" + (shared if heard else "")


def show_epoch(row: Row, cfg: Config, bar: "tqdm[Any]") -> None:
    """Move the bar; where there is no terminal to draw it on, print a line."""
    bar.n += 1  # also where there is no bar
    bar.set_postfix_str(f"network {row['network']}: {row['val_accuracy']:.1%} of val")
    if bar.disable:
        train = f"train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:5.1%}"
        val = f"val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:5.1%}"
        epoch = f"network {row['network']}  epoch {row['epoch']:2d}/{cfg.epochs}"
        say(f"{epoch}  {train}  {val}  lr {row['learning_rate']:.1e}  {row['seconds']:.1f} s")


RUN_ID = "%Y-%m-%d-%H%M%S"  # when it began
# What a run writes into run_dir, besides the lock and folders of earlier runs.
RUN_FILES = (  # run.json last: while it is there, what is beside it is known to be of an earlier run
    "history.csv metrics.json predictions.csv mistakes.html loss.png confusion_matrix.png scores.png "
    "network*.pth init.pth unfinished.pth fold* evaluate_* run.json"
).split()


def start_run(cfg: Config, data: str, *, resume: bool, init: Checkpoint | None) -> str:
    """Set an earlier run in run_dir aside, or check that it can be resumed; returns the id of the run.

    `data` stands for the clips and their split. The run keeps `init`, the model that it starts from, so that
    it can be resumed when that file is gone, or holds what the run itself has written.

    Raises:
        UserError: There is nothing to resume, or it was another run.
    """
    about, mine = Path(cfg.run_dir, "run.json"), {"data": data, **asdict(cfg)}
    try:
        earlier = json.loads(about.read_text()) if about.is_file() else None
    except ValueError:
        raise UserError(f"{about} is damaged: move {cfg.run_dir} away, or pass another --run_dir") from None
    if not resume:
        if earlier:
            files = [file for pattern in RUN_FILES for file in sorted(about.parent.glob(pattern))]
            set_aside(files, Path(cfg.run_dir, earlier["run"]))
        init_file(cfg).unlink(missing_ok=True)
        if init:
            save_checkpoint(init_file(cfg), init)
        run_id = datetime.now().strftime(RUN_ID)
        save_json(about, {"run": run_id, "init": init.run if init else "", **mine})
        return run_id
    if earlier is None:
        raise UserError(f"no run in {cfg.run_dir} to resume: start one with `python train.py`")
    free = (RUNTIME_FIELDS - {"batch_size"}) | {"epochs", "patience"}
    differences = [
        "the clips or their split" if name == "data" else f"{name}: {earlier.get(name)!r} -> {value!r}"
        for name, value in mine.items()
        if earlier.get(name) != value and name not in free
    ]
    if differences:
        raise UserError(f"cannot resume {cfg.run_dir}, which was another run: {'; '.join(differences)}")
    return str(earlier["run"])


def set_aside(
    files: Sequence[Path], folder: Path, *, by: Callable[[Path, Path], object] = shutil.move
) -> None:
    """Move files of an earlier run into a folder named after its date; nothing there is overwritten."""
    while any((folder / file.name).exists() for file in files):
        folder = folder.with_name(f"{folder.name}-")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        by(file, folder / file.name)  # shutil also reaches another file system
    note(f"note: {', '.join(file.name for file in files)} of an earlier run set aside in {folder}")


def maker_of(checkpoint: Path) -> str | None:
    """The id of the run that made a checkpoint; None where there is none."""
    try:
        return Path(str(load_tensors(checkpoint).get("run"))).name if checkpoint.is_file() else None
    except UserError:  # of another version, perhaps
        return "earlier"


def collect(
    cfg: Config, tables: Sequence[pd.DataFrame], mfcc: MFCC, run_id: str
) -> tuple[Checkpoint, pd.DataFrame] | None:
    """Write the networks kept so far into the checkpoint, and history and curves.

    Returns:
        The checkpoint and the predictions of the validation clips; None if there are no networks yet.
    """
    run_dir, path = Path(cfg.run_dir), Path(cfg.checkpoint)
    networks = [
        (clips, load_tensors(file))
        for member, clips in enumerate(tables, start=1)
        if (file := Path(cfg.run_dir, f"network{member}.pth")).is_file()
    ]
    if not networks:
        return None
    kept = [state["kept"] for _, state in networks]
    labels = sorted(set(tables[0].emotion))
    learnt = tables[0][np.any([clips.part == "train" for clips, _ in networks], axis=0)]
    validated, probabilities, n_networks = out_of_fold(networks)
    targets = torch.tensor([labels.index(emotion) for emotion in validated.emotion])
    temperature = fit_temperature(probabilities, targets, n_networks)
    checkpoint = Checkpoint(
        config=replace(cfg, **{name: getattr(Config(), name) for name in RUNTIME_FIELDS}),
        labels=labels,
        mfcc=mfcc.state_dict() | {"mel": mfcc.mel.to_sparse()},  # nearly all of it is zeros
        members=[best["weights"] for best in kept],
        epochs=[best["epoch"] for best in kept],
        temperature=temperature * softening(len(networks)),
        distance=fit_distance(cfg, networks[0][0], mfcc),
        n_clips={label: int((learnt.emotion == label).sum()) for label in labels},
        versions={"python": platform.python_version(), "torch": str(torch.__version__)},
        run=run_id,
    )
    earlier = maker_of(path)
    if earlier and earlier != run_id:  # a copy, since the old one stays in place until the new one is whole
        set_aside([path], run_dir / earlier, by=shutil.copy2)
    save_checkpoint(path, checkpoint)
    history = pd.DataFrame([row for _, state in networks for row in state["history"]])
    save_table(run_dir / "history.csv", history)
    save_figure(run_dir / "loss.png", lambda: plot_history(history, checkpoint.epochs))
    probabilities = calibrate(probabilities, temperature * softening(n_networks))
    return checkpoint, make_predictions(validated, labels, probabilities)


def fit_distance(cfg: Config, clips: pd.DataFrame, mfcc: MFCC) -> dict[str, Tensor]:
    """What Distance learns from the training and validation clips of one network."""
    cache, labels, distance = FeatureCache(cfg, mfcc), sorted(set(clips.emotion)), Distance(cfg)
    train, val = (make_loader(clips[clips.part == part], labels, cache, cfg) for part in ("train", "val"))
    distance.fit((features for features, _, _ in train), (features for features, _, _ in val))
    return distance.state_dict()


def out_of_fold(
    networks: Sequence[tuple[pd.DataFrame, dict[str, Any]]],
) -> tuple[pd.DataFrame, Tensor, Tensor]:
    """The validation clips, as judged by the networks that did not train on them.

    `networks` are of each one the clips with its parts, and the state that fit wrote.

    Returns:
        The rows of the clips, their mean probabilities (N, C), and how many networks these are of, (N, 1).
    """
    judged = pd.concat(
        pd.DataFrame(state["kept"]["val_probabilities"].numpy(), clips.index[clips.part == "val"])
        for clips, state in networks
    ).groupby(level=0)
    mean, count = judged.mean(), torch.tensor(judged.size().to_numpy())
    validated = networks[0][0].loc[mean.index].reset_index(drop=True)
    return validated, torch.tensor(mean.to_numpy()), count[:, None]


def softening(n_networks: float | Tensor) -> Any:  # noqa: ANN401 - as what comes in
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
    from scipy.optimize import minimize_scalar  # noqa: PLC0415

    logits = probabilities.clamp(min=1e-12).log() / softening(n_networks)

    def loss(temperature: float) -> float:
        # The prior, 1 give or take 30 %, counts as one clip: a few that are all right make nothing certain.
        prior = (math.log(temperature) / 0.3) ** 2 / 2
        return nn.functional.cross_entropy(logits / temperature, targets).item() + prior / len(targets)

    return float(minimize_scalar(loss, bounds=(0.2, 5), method="bounded").x)


# ---- the report ------------------------------------------------------------------------------------------


def report(
    cfg: Config, clips: pd.DataFrame, checkpoint: Checkpoint, validated: pd.DataFrame, about: str
) -> pd.DataFrame:
    """Score the model: its predictions of the validation clips, if any, and of the test clips, made here.

    `about` says which clips these are.

    Returns:
        The predictions of the test clips; where there are none, of the validation clips.
    """
    run_dir = Path(cfg.run_dir)
    model = build_ensemble(checkpoint).to(resolve_device(cfg.device))
    metrics: dict[str, Any] = {
        "run": checkpoint.run,
        "split": about,
        "epochs": checkpoint.epochs,
        "temperature": checkpoint.temperature,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": asdict(cfg),
    }
    predictions = validated
    if len(validated):
        metrics["val"] = score(validated)
    test = clips[clips.part == "test"].reset_index(drop=True)
    if len(test):
        loader = make_loader(test, checkpoint.labels, FeatureCache(cfg, model.mfcc), cfg)
        predictions = make_predictions(test, checkpoint.labels, evaluate(model, loader)[0])
        metrics["test"] = score(predictions)
    save_json(run_dir / "metrics.json", metrics)
    save_predictions(run_dir, predictions)
    for part, title in PART_TITLES.items():
        if part in metrics:
            heading = f"\n{title}\n" if "val" in metrics else ""
            say(heading + describe_scores(metrics[part]))
    epochs = ", ".join(map(str, checkpoint.epochs))
    say(f"\n{cfg.checkpoint}: {checkpoint.summary}, of epoch {epochs}; report and figures in {run_dir}")
    return predictions


PART_TITLES = {
    "val": "validation clips, each by the networks that did not train on it (they chose the epochs)",
    "test": "test clips (scored once: the score to quote)",
}


def make_predictions(clips: pd.DataFrame, labels: Sequence[str], probabilities: Tensor) -> pd.DataFrame:
    """A row per clip: path, emotion, corpus, speaker, predicted, and a column p(label) for each class."""
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
    """The scores of all clips, with intervals, of each class that occurs, and of each corpus."""
    from sklearn.metrics import classification_report  # noqa: PLC0415 - takes seconds

    true, labels = predictions.emotion, sorted(set(predictions.emotion))
    per_class = classification_report(
        true, predictions.predicted, labels=labels, output_dict=True, zero_division=0
    )
    return {
        **summarize(predictions),
        "intervals": bootstrap(predictions),
        "per_class": {label: per_class[label] for label in labels},
        "per_corpus": {str(name): summarize(group) for name, group in predictions.groupby("corpus")},
    }


def summarize(predictions: pd.DataFrame) -> dict[str, float]:
    """SCORES, those of classes as means over the classes that occur, and the number of clips."""
    from sklearn.metrics import f1_score, recall_score  # noqa: PLC0415

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


def calibration_error(confidence: Any, right: Any, *, n_bins: int = 15) -> float:  # noqa: ANN401
    """Expected calibration error (ECE, arXiv:1706.04599): how far confidence and accuracy are apart.

    Of the probability of each clip's predicted class, (N,), and whether it is right, (N,).
    """
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    return float(np.abs(np.bincount(bins, weights=confidence - right)).sum() / len(right))


def describe_scores(scores: dict[str, Any]) -> str:
    """The scores, laid out for a terminal."""
    lines = []
    for name, text in SCORES.items():
        low, high = scores["intervals"].get(name, (0, 0))
        interval = f"  95 % interval over speakers {low:.1%} to {high:.1%}" if high else ""
        lines.append(f"{text:27}{scores[name]:6.1%}{interval}")
    if not scores["intervals"]:
        lines.append("no intervals: they need five speakers or more, all known (see --manifest, --folds)")
    per_class = pd.DataFrame(scores["per_class"]).T.rename(columns={"f1-score": "F1", "support": "clips"})
    names = {"uar": "UAR", "macro_f1": "F1", "calibration_error": "ECE"}
    per_corpus = pd.DataFrame(scores["per_corpus"]).T.rename(columns=names)
    for table in (per_class, per_corpus):
        formats: dict[str, Any] = dict.fromkeys(table.columns, "{:.1%}".format) | {"clips": "{:.0f}".format}
        lines.append(table.rename(printable).to_string(formatters=formats))
    return "\n".join(lines)


def say(text: str) -> None:
    """Print to stdout, and go on when nobody reads it any more: the model is worth more than the text."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - open until the end


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
    """HTML with the clips that are wrong, the surest first, and a player for each.

    The data go in as JSON without a `<`, so that no name can end the script that holds them.
    """
    wrong = predictions.assign(confidence=confidence_of(predictions))
    wrong = wrong[wrong.emotion != wrong.predicted].sort_values("confidence", ascending=False, kind="stable")
    links = [Path(os.path.relpath(path, run_dir)).as_posix() for path in wrong.path]
    wrong = wrong.assign(link=[quote(link, errors="surrogateescape") for link in links])
    labels = sorted({*predictions.emotion, *predictions.predicted})
    content = {"clips": len(predictions), "labels": labels, "mistakes": wrong.to_dict("records")}
    template = Path(__file__).with_name("assets") / "mistakes.html"
    return template.read_bytes().replace(b"{{data}}", json.dumps(content).replace("<", "\\u003c").encode())


# ---- figures ---------------------------------------------------------------------------------------------

BLUE, ORANGE, SKY = COLOURS[5], COLOURS[0], COLOURS[4]


def plot_history(history: pd.DataFrame, kept: Sequence[int]) -> Any:  # noqa: ANN401 - matplotlib's Figure
    """Loss, accuracy and learning rate, a line per network, and the epochs that were kept."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 3.7))
    panels = figure.subplots(1, 3)
    for number, (_, rows) in enumerate(history.groupby("network")):
        chosen = rows[rows.epoch == kept[number]]
        label = ("training, with dropout", "validation") if number == 0 else (None, None)
        for axes, name in zip(panels, ("loss", "accuracy"), strict=False):
            axes.plot(rows.epoch, rows[f"train_{name}"], color=BLUE, alpha=0.7, label=label[0])
            axes.plot(rows.epoch, rows[f"val_{name}"], color=ORANGE, alpha=0.7, label=label[1])
            axes.plot(chosen.epoch, chosen[f"val_{name}"], "o", color=ORANGE)
        panels[2].plot(rows.epoch, rows.learning_rate, color="black", alpha=0.5)
    for axes, name in zip(panels, ("loss", "accuracy", "learning rate"), strict=True):
        axes.set(xlabel="epoch", title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].legend(fontsize="small")
    panels[2].ticklabel_format(axis="y", scilimits=(0, 0))
    return figure


def plot_confusion(predictions: pd.DataFrame) -> Any:  # noqa: ANN401
    """The confusion matrix, each row the fractions of one true class."""
    from matplotlib.figure import Figure  # noqa: PLC0415
    from sklearn.metrics import ConfusionMatrixDisplay  # noqa: PLC0415

    figure = Figure(figsize=(6.4, 5.8))
    axes = figure.subplots()
    style = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 1}, "colorbar": False, "xticks_rotation": 45}
    style |= {"normalize": "true", "values_format": ".0%", "ax": axes}
    ConfusionMatrixDisplay.from_predictions(predictions.emotion, predictions.predicted, **style)
    axes.grid(visible=False)
    axes.set(xlabel="predicted", ylabel="true", title=f"{len(predictions):,} clips")
    return figure


def plot_scores(predictions: pd.DataFrame) -> Any:  # noqa: ANN401
    """Accuracy of each corpus, and how far confidence can be believed; with 95 % intervals."""
    from matplotlib.figure import Figure  # noqa: PLC0415
    from scipy.stats import binomtest  # noqa: PLC0415

    figure = Figure(figsize=(11, 4.4))
    bars, reliability = figure.subplots(1, 2)
    groups = {"all": predictions} | {str(name): group for name, group in predictions.groupby("corpus")}
    for row, group in enumerate(groups.values()):
        accuracy = float((group.emotion == group.predicted).mean())
        bars.barh(row, accuracy, color=SKY)
        bars.text(0.02, row, f"{accuracy:.1%}", va="center")
        if interval := bootstrap(group).get("accuracy"):
            bars.plot(interval, [row, row], color="black", marker="|")
    bars.set_yticks(range(len(groups)), [f"{name} ({len(group):,})" for name, group in groups.items()])
    bars.invert_yaxis()
    bars.grid(visible=False, axis="y")
    bars.set(xlim=(0, 1), xlabel=f"95 % interval over {MIN_SPEAKERS} speakers or more", title="accuracy")

    confidence = confidence_of(predictions)
    right = predictions.emotion == predictions.predicted
    for _, inside in right.groupby(pd.cut(confidence, np.linspace(0, 1, 16)), observed=True):
        place, test = confidence[inside.index].mean(), binomtest(int(inside.sum()), len(inside))
        reliability.plot([place, place], test.proportion_ci(method="wilson"), color=BLUE)
        reliability.scatter(place, inside.mean(), 20 + 600 * len(inside) / len(right), color=BLUE)
    reliability.plot([0, 1], [0, 1], color="black", linestyle=":")
    error = calibration_error(confidence, right)
    reliability.set(xlabel="confidence", ylabel="accuracy", title=f"calibration error {error:.1%}")
    return figure


# ---- cross-validation ------------------------------------------------------------------------------------


def cross_validate(
    cfg: Config, mfcc: MFCC, clips: pd.DataFrame, n_folds: int, *, resume: bool, init: Checkpoint | None
) -> None:
    """Train once per fold, and score every clip by the networks that never saw it.

    Each fold is a run of its own in run_dir/fold<n>, its checkpoint included.
    """
    folds = [divide(clips, cfg, fold=fold, n_folds=n_folds) for fold in range(n_folds)]
    run_dir, tables = Path(cfg.run_dir), []
    if rank() == 0:
        start_run(cfg, f"{n_folds} folds", resume=resume, init=init)
    for fold, parts in enumerate(folds):
        home = run_dir / f"fold{fold + 1}"
        say(f"\nfold {fold + 1} of {n_folds}")
        own = replace(cfg, run_dir=str(home), checkpoint=str(home / "best_emotion_model.pth"))
        goes_on = resume and (home / "run.json").is_file()
        tables.append(train(own, mfcc, parts, resume=goes_on, init=init).assign(fold=fold + 1))
    if rank() > 0:
        return
    predictions = pd.concat(tables, ignore_index=True)
    pooled = score(predictions)
    say(
        f"\nall {len(predictions):,} clips, each by the networks that never saw it\n{describe_scores(pooled)}"
    )
    per_fold = pd.DataFrame(map(summarize, tables), index=[f"fold {n + 1}" for n in range(n_folds)])
    per_fold = per_fold.drop(columns="clips")
    per_fold = pd.concat([per_fold, per_fold.agg(["mean", "std"])])
    say(f"\n{per_fold.to_string(float_format='{:.1%}'.format)}")
    scores = {"pooled": pooled, "folds": [*map(score, tables)], "config": asdict(cfg)}
    save_json(run_dir / "metrics.json", scores)
    save_predictions(run_dir, predictions)


# ---- other models, other clips ---------------------------------------------------------------------------


FAIRNESS = "only clips that it was not trained on test it fairly"


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether they mean the same, however they are spelled: Suprised is Surprised."""
    return list(map(class_of, one)) == list(map(class_of, other))


def load_init(path: Path, cfg: Config, labels: Sequence[str]) -> Checkpoint:
    """The model to start from.

    Raises:
        UserError: It cannot be read, or the settings of its networks are not those of the run.
    """
    checkpoint, _ = load_checkpoint(path)
    theirs, n_networks = checkpoint.config, len(checkpoint.members)
    names = sorted(name for name in MODEL_FIELDS if getattr(theirs, name) != getattr(cfg, name))
    wanted = [f"--{name} {getattr(theirs, name)}" for name in names if name != "ensemble"]
    wanted += [f"--ensemble {n_networks}"] * (cfg.ensemble > n_networks)
    if wanted:
        raise UserError(f"what shapes the networks must be as in {path}: pass {' '.join(wanted)}")
    if not same_classes(checkpoint.labels, labels):
        classes = f"{', '.join(labels)}, not as in {path} {', '.join(checkpoint.labels)}"
        note(f"note: classes {classes}: starts with a new last layer")
    note(f"note: starts from {path}: {FAIRNESS}")
    return checkpoint


def evaluate_folder(cfg: Config, folder: str, *, is_named: bool) -> None:
    """Score a model on a folder of labelled clips; the report goes to run_dir/evaluate_<folder>.

    Raises:
        UserError: There is no such model, or it knows no class of the folder.
    """
    path = Path(cfg.checkpoint)
    path = path if is_named or path.exists() else PRETRAINED["any"]
    checkpoint, model = load_checkpoint(path)
    note(f"model: {path}, {checkpoint.summary}")
    home, place = Path(cfg.run_dir), Path(folder).resolve()
    own = {name: getattr(cfg, name) for name in RUNTIME_FIELDS} | {"checkpoint": str(path)}
    own |= {name: getattr(cfg, name) for name in ("labels_from", "extra_labels")}
    own |= {"data_dir": folder, "run_dir": str(home / f"evaluate_{place.name}")}
    cfg = replace(checkpoint.config, **own)
    found = load_corpus(cfg, model.mfcc)
    spelling = {class_of(label): label for label in checkpoint.labels}  # Suprised is Surprised
    clips = found.assign(emotion=[spelling.get(class_of(name), name) for name in found.emotion])
    clips = clips[clips.emotion.isin(checkpoint.labels)]
    classes = f"classes of {folder}: {', '.join(sorted(set(found.emotion)))}"
    classes += f"; classes of {path}: {', '.join(checkpoint.labels)}"
    if clips.empty:
        raise UserError(f"{classes}: none in common")
    if len(clips) < len(found):
        note(f"note: {len(found) - len(clips)} clips left out: {classes}")
    about = f"{len(clips):,} of {len(found):,} clips of {folder}; {FAIRNESS}"
    with contextlib.suppress(OSError, ValueError, LookupError):  # the run may be elsewhere, or of long ago
        earlier = json.loads((home / "run.json").read_text())
        if earlier["run"] == checkpoint.run and Path(earlier["data_dir"]).resolve() == place:
            about += f", and it was trained on clips of {folder}"
    say(about)
    metrics = Path(cfg.run_dir, "metrics.json")  # of another folder of that name, or another model
    if metrics.is_file():
        date = datetime.fromtimestamp(metrics.stat().st_mtime)
        set_aside([metrics.parent], home / date.strftime(RUN_ID))
    report(cfg, clips.assign(part="test"), checkpoint, pd.DataFrame(), about)


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
        how = {"init": run.get("init", ""), "folds": len(metrics.get("folds", []))}
        return metrics["config"] | how, table
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{folder} holds no finished run: {error}") from None


def compare(one: str, other: str) -> None:
    """Print in which settings two runs differ, and their scores on the clips that both tested.

    Raises:
        UserError: One is no finished run, or they have no clip in common.
    """
    if Path(one).resolve() == Path(other).resolve():
        raise UserError(f"--compare needs two runs, not {one} twice")
    (mine, a), (theirs, b) = read_run(one), read_run(other)
    settings = pd.DataFrame({one: pd.Series(mine, dtype=object), other: pd.Series(theirs, dtype=object)})
    settings = settings.drop(["run_dir", "cache_dir", "checkpoint", "submission"], errors="ignore")
    differ = settings[settings[one] != settings[other]]
    common = a.index.intersection(b.index)
    sizes = f"{len(common):,} clips that both tested, of {len(a):,} in {one} and {len(b):,} in {other}"
    if common.empty:
        raise UserError(f"no clip was tested in both {one} and {other}: nothing to compare")
    a, b = a.loc[common], b.loc[common]
    if n_odd := int((a.emotion != b.emotion).sum()):
        raise UserError(f"{n_odd} of {sizes} have another true class there: nothing to compare")
    unit, units = pd.Series(common, index=common), "clips, as fewer than five speakers are known"
    if speakers_known(a):
        unit, units = a.speaker, f"{a.speaker.nunique()} speakers"
    table = pd.DataFrame({one: summarize(a), other: summarize(b)}).loc[list(SCORES)].rename(index=SCORES)
    table["difference"] = table[other] - table[one]
    change = (resample(b, unit) - resample(a, unit)).rename(columns=SCORES)
    table[["95 % from", "to"]] = change.quantile([0.025, 0.975]).T
    formats = dict.fromkeys([one, other], "{:.1%}".format)
    say("no setting differs" if differ.empty else differ.map(repr).to_string())
    say(f"\n{sizes}")
    say(table.to_string(formatters=formats, float_format="{:+.1%}".format, na_rep=""))
    say(f"95 % interval of the difference: resampled by {units}")


# ---- the script ------------------------------------------------------------------------------------------


def main(cfg: Config, flags: Any) -> int:  # noqa: ANN401 - argparse.Namespace
    """Train, or score and compare what was trained."""
    if flags.compare:
        refuse_others(flags, "compare", set())
        compare(*flags.compare)
        return 0
    if flags.evaluate is not None:
        about_labels = {"labels_from", "extra_labels"}
        refuse_others(flags, "evaluate", (RUNTIME_FIELDS - {"data_dir", "submission"}) | about_labels)
        is_named = flags.demo or bool({"checkpoint", "run_dir"} & vars(flags).keys())
        evaluate_folder(cfg, flags.evaluate, is_named=is_named)
        return 0
    if flags.folds == 1 or flags.folds < 0:
        raise UserError(f"folds = {flags.folds}: must be 0 or at least 2")
    if flags.folds and hasattr(flags, "checkpoint"):
        raise UserError("--folds keeps a checkpoint of each fold in run_dir: leave out --checkpoint")
    if flags.resume and flags.init and not init_file(cfg).is_file():
        raise UserError(f"the run in {cfg.run_dir} did not start from a model: leave out --resume, or --init")
    if Path(cfg.checkpoint).is_dir():
        raise UserError(f"checkpoint = {cfg.checkpoint!r}: is a folder, must be a file")
    with torchrun(cfg), contextlib.ExitStack() as stack:
        if flags.demo and rank() == 0:
            make_demo(Path(cfg.data_dir))
        broadcast([None])  # the others wait for the demo corpus
        mfcc = MFCC(mfcc_constants(cfg), cfg.hop_length)
        clips, init = load_corpus(cfg, mfcc), None
        if rank() == 0:
            Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(Path(cfg.run_dir, ".lock"), timeout=1))
            except Timeout:
                raise UserError(f"another run is writing to {cfg.run_dir}: wait, or pass --run_dir") from None
        start = init_file(cfg) if flags.resume else Path(flags.init or "")  # a resumed run has its own
        if start.is_file() or (flags.init and not flags.resume):
            init = load_init(start, cfg, sorted(set(clips.emotion)))
        if flags.folds:
            cross_validate(cfg, mfcc, clips, flags.folds, resume=flags.resume, init=init)
        else:
            train(cfg, mfcc, divide(clips, cfg), resume=flags.resume, init=init)
    return 0


def refuse_others(flags: Any, action: str, allowed: Collection[str]) -> None:  # noqa: ANN401
    """Refuse flags that have no effect on what the script is told to do.

    Raises:
        UserError: Naming the first one.
    """
    for name, value in vars(flags).items():
        if name not in {*allowed, action, "demo"} and (value or name in Config.__dataclass_fields__):
            raise UserError(f"--{name} has no effect on --{action}: leave it out")


if __name__ == "__main__":
    raise SystemExit(run(main, *ARGS))
