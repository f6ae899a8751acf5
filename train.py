"""Trains the network, keeps the best checkpoint and says how good it is.

    python train.py

writes best_emotion_model.pth and, into run/, history.csv, metrics.json, loss.png and confusion_matrix.png.
On several devices or machines: `torchrun --nproc_per_node 2 train.py`.
"""

from config import (
    RESUMABLE_FIELDS,
    RUNTIME_FIELDS,
    Config,
    Interrupted,
    UserError,
    command,
    die_quietly,
    name_memory,
    parse_config,
    printable,
    say,
    tell,
)

if __name__ == "__main__":
    # Answers --help and refuses a bad flag at once: torch takes seconds to load.
    die_quietly()
    parse_config(description=__doc__)

import contextlib
import copy
import csv
import functools
import hashlib
import io
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import filelock
import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from model import (
    Checkpoint,
    EmotionDataset,
    Network,
    build_model,
    load_checkpoint,
    misfits,
    replace_file,
    resolve_device,
    resolve_dtype,
    save_checkpoint,
)
from prepare import (
    Corpus,
    FloatArray,
    IntArray,
    Split,
    augment_features,
    feature_stats,
    keep_freed_memory,
    load_corpus,
    split_corpus,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Loader: TypeAlias = DataLoader[tuple[Tensor, Tensor]]
T = TypeVar("T")

# ---- processes ------------------------------------------------------------------------------------------


class Team(NamedTuple):
    """The processes that train one network together, as torchrun starts them; one alone without it.

    All load the same data and come to the same decisions; each computes its share of every batch, and the
    first alone writes and prints.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of that name; each process of several has a GPU of its own.

        Raises:
            UserError: The machine has no such device, or fewer than there are processes.
        """
        device = resolve_device(name)
        if self.size > 1 and device.type == "cuda":
            return resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        return device

    def gather(self, mine: T) -> list[T]:
        """What each process has, in the order of ranks; all must ask for it."""
        everyone: list[Any] = [mine] * self.size
        if self.size > 1:
            distributed.all_gather_object(everyone, mine)
        return everyone

    def align(self, model: nn.Module) -> None:
        """Give all processes the first one's weights: each has seen other clips pass its batch norm."""
        for value in model.state_dict().values() if self.size > 1 else ():
            distributed.broadcast(value, 0)


@contextlib.contextmanager
def sole_writer(cfg: Config) -> Iterator[None]:
    """Keep other runs away from the files that this one writes.

    Raises:
        UserError: Another run has the run folder or the checkpoint.
    """
    best = Path(cfg.checkpoint)
    locks = {cfg.run_dir: Path(cfg.run_dir, "lock")}
    if not cfg.folds:  # each has a checkpoint of its own in run_dir
        locks[cfg.checkpoint] = best.parent / f".{best.name}.lock"
    with contextlib.ExitStack() as stack:
        for place, lock in locks.items():
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:  # for a second, as the workers of a run that was killed take to end
                stack.enter_context(filelock.FileLock(lock, timeout=1))
            except filelock.Timeout:
                raise UserError(
                    f"another run is writing to {place}: wait for it, or pass both --run_dir and --checkpoint"
                ) from None
            if place == cfg.checkpoint:
                stack.callback(_remove, lock)  # while it is held: nothing is left beside the model
        yield


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows keeps what is open
        path.unlink()


@contextlib.contextmanager
def join_team(device_name: str) -> Iterator[Team]:
    """Find the other processes, if it is torchrun that started this one."""
    if not distributed.is_torchelastic_launched():
        yield Team()
        return
    on_gpu = resolve_device(device_name).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        team = Team(distributed.get_rank(), distributed.get_world_size())
        with contextlib.nullcontext() if team.leads else contextlib.redirect_stdout(None):
            yield team
    finally:
        distributed.destroy_process_group()


_ALONE = Team()
MAX_GRADIENT = 5.0  # a longer gradient is shortened to this

# ---- one epoch ------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """One pass over a dataset."""

    loss: float  # class-weighted cross-entropy, mean over the batches
    probabilities: FloatArray  # (N, C) in the order of the targets
    targets: IntArray  # (N,) those of all processes

    @property
    def predictions(self) -> IntArray:
        """The most probable class of each clip, (N,)."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)


def seed_everything(seed: int, epoch: int, rank: int = 0) -> None:
    """Seed dropout for one epoch of one process, so that a resumed run needs no state of generators."""
    torch.manual_seed((seed * 1_000_003 + epoch) * 10_007 + rank)


def class_weights(targets: IntArray, labels: Sequence[str]) -> Tensor:
    """Weights inversely proportional to class frequency, (C,) float32; 1 for a class of average size.

    So has a class without clips, with a warning: there is nothing to learn it from.
    """
    counts = np.bincount(targets, minlength=len(labels))
    for label in np.flatnonzero(counts == 0).tolist():
        say(f"warning: class {labels[label]} has no training clip: it will not be learnt")
    weights = np.where(counts > 0, len(targets) / (len(labels) * np.maximum(counts, 1)), 1)
    return torch.from_numpy(weights.astype(np.float32))


def make_loader(
    corpus: Corpus,
    indices: IntArray,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    team: Team = _ALONE,
) -> Loader:
    """Feed this process its share of some clips; for training in an order that each epoch changes.

    Args:
        corpus: Gives features and targets.
        indices: (N,) the clips.
        batch_size: Clips per step of all processes together.
        shuffle: Whether the order is random: seed and epoch decide it, alike in all processes.
        seed: Of the order.
        team: The processes; each gets every team.size-th clip, and the last few get one twice if need be.
    """
    dataset = EmotionDataset(corpus.prepared.features, corpus.targets, indices)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, team.size, team.rank, shuffle=shuffle, seed=seed
    )
    batch_size = max(2, batch_size // team.size)
    # Batch norm cannot learn from a single clip: a last batch of one waits for the next epoch.
    drop_last = shuffle and len(sampler) % batch_size == 1
    pin_memory = torch.cuda.is_available()  # from where a copy to the GPU need not be waited for
    return DataLoader(
        dataset, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=_as_is, pin_memory=pin_memory
    )


def _as_is(batch: Any) -> Any:  # noqa: ANN401 - DataLoader declares a list, and passes what the dataset gave
    """Collate nothing: EmotionDataset makes whole batches."""
    return batch


@name_memory()
def run_epoch(
    model: nn.Module,
    loader: Loader,
    criterion: nn.Module,
    *,
    learn: Callable[[Tensor], None] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    title: str = "",
    team: Team = _ALONE,
) -> Outcome:
    """Pass once over the data: training if there is something to learn with, evaluation if not.

    Nothing in the loop waits for a GPU: losses and predictions stay on the device until the end.

    Args:
        model: Network, or its wrapper that shares the gradients of a team.
        loader: Batches of features and targets.
        criterion: The loss.
        learn: Takes one step with the loss of a batch.
        augment: Changes the features of a batch, on the device; may make several copies of it.
        dtype: In which products are computed.
        title: Of the progress bar.
        team: The processes.

    Returns:
        The outcome of all processes together.

    Raises:
        UserError: A loss is NaN or infinite; the message names the batch. Or the memory is not enough.
    """
    device = next(model.parameters()).device
    model.train(learn is not None)
    losses: list[Tensor] = []
    probabilities: list[Tensor] = []
    targets: list[Tensor] = []
    with torch.set_grad_enabled(learn is not None), tqdm(loader, title, leave=False, disable=None) as bar:
        for features, wanted in bar:
            features = features.to(device, non_blocking=True)  # noqa: PLW2901
            if augment is not None:
                features = augment(features)  # noqa: PLW2901
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(features)  # (B, C)
            copies = len(logits) // len(wanted)  # of an ensemble in training each member has its own
            loss = criterion(logits, wanted.to(device, non_blocking=True).repeat(copies))
            if learn is not None:
                learn(loss)
            losses.append(loss.detach())
            probabilities.append(logits.detach().softmax(dim=1).unflatten(0, (copies, -1)).mean(dim=0))
            targets.append(wanted)
            if not bar.disable:
                right = (probabilities[-1].argmax(dim=1).cpu() == wanted).float().mean()
                bar.set_postfix(loss=f"{loss.item():.2f}", accuracy=f"{right:.0%}", refresh=False)
    mine = (torch.stack(losses), torch.cat(probabilities), torch.cat(targets))
    shares = team.gather(tuple(part.cpu().numpy() for part in mine))
    # Clip by clip in the order of the loader; what a process was given twice is counted once.
    per_batch, predicted, true = (np.stack(parts, axis=1) for parts in zip(*shares, strict=True))
    per_batch = per_batch.mean(axis=1)
    if not np.isfinite(per_batch).all():
        batch = int(np.flatnonzero(~np.isfinite(per_batch))[0])
        raise UserError(f"loss is {per_batch[batch]:g} at batch {batch + 1}: lower learning_rate", code=1)
    n_clips = len(loader.dataset)  # type: ignore[arg-type] # EmotionDataset has a length
    predicted = predicted.reshape(-1, predicted.shape[-1])
    return Outcome(float(per_batch.mean()), predicted[:n_clips], true.ravel()[:n_clips])


# ---- scores ---------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """How well predictions match the labels, from a confusion matrix (C, C) of clips, [true, predicted]."""

    confusion: IntArray

    @classmethod
    def of(cls, outcome: Outcome, n_classes: int) -> "Scores":
        """Count the pairs of true and predicted class."""
        pairs = np.bincount(outcome.targets * n_classes + outcome.predictions, minlength=n_classes**2)
        return cls(pairs.reshape(n_classes, n_classes))

    @property
    def accuracy(self) -> float:
        """Share of clips that are right."""
        return float(np.trace(self.confusion) / max(self.confusion.sum(), 1))

    @property
    def recall(self) -> FloatArray:
        """Share of each true class that is found, (C,); NaN for a class without clips."""
        return _ratio(np.diag(self.confusion), self.confusion.sum(axis=1))

    @property
    def precision(self) -> FloatArray:
        """Share of each predicted class that is right, (C,); NaN for a class never predicted."""
        return _ratio(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def f1(self) -> FloatArray:
        """Harmonic mean of precision and recall, (C,); NaN for a class neither present nor predicted."""
        return _ratio(2 * np.diag(self.confusion), self.confusion.sum(axis=0) + self.confusion.sum(axis=1))

    def summary(self) -> dict[str, float]:
        """Accuracy, unweighted average recall (of the classes that occur) and macro F1."""
        present = self.confusion.sum(axis=1) > 0
        return {
            "accuracy": self.accuracy,
            "uar": float(self.recall[present].mean()),
            "macro_f1": float(np.nanmean(self.f1)),  # a class predicted but absent counts, with 0
        }


def bootstrap(outcome: Outcome, speakers: Sequence[str], *, draws: int = 1000) -> dict[str, list[float]]:
    """95 % intervals of the scores, from resampled speakers (Efron & Tibshirani 1993, ch. 13).

    The clips of one speaker stand or fall together: resampling clips would promise too much. A clip of an
    unknown speaker counts as a speaker of its own.

    Args:
        outcome: Of N clips.
        speakers: N names, "" where unknown.
        draws: Resamples.

    Returns:
        [low, high] of accuracy, uar and macro_f1.
    """
    n_classes = outcome.probabilities.shape[1]
    names = [speaker or f"\0{number}" for number, speaker in enumerate(speakers)]
    unique, speaker_of = np.unique(names, return_inverse=True)
    cells = outcome.targets * n_classes + outcome.predictions
    per_speaker = np.zeros((len(unique), n_classes**2), np.int64)
    np.add.at(per_speaker, (speaker_of, cells), 1)
    rng = np.random.default_rng(0)
    even = np.full(len(unique), 1 / len(unique))
    resamples = (rng.multinomial(len(unique), even) @ per_speaker for _ in range(draws))
    scores = [Scores(cells.reshape(n_classes, n_classes)).summary() for cells in resamples]
    return {
        name: np.quantile([score[name] for score in scores], [0.025, 0.975]).tolist() for name in scores[0]
    }


def calibration_error(outcome: Outcome, *, n_bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy are apart.

    Clips are binned by the probability of the class predicted; the gaps are weighted by the clips in each
    bin (Guo et al. 2017, arXiv:1706.04599).
    """
    confidence = outcome.probabilities.max(axis=1)
    right = outcome.predictions == outcome.targets
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(right))


def _ratio(part: IntArray, whole: IntArray) -> FloatArray:
    return np.divide(
        part, whole, out=np.full(len(part), np.nan, np.float32), where=whole > 0, casting="same_kind"
    )


# ---- the run --------------------------------------------------------------------------------------------


@dataclass
class EarlyStopping:
    """Watch the validation accuracy, for a new best and for a rise that is too long in coming."""

    patience: int
    best: float = -math.inf
    bad_epochs: int = 0

    def step(self, value: float) -> bool:
        """Take in one epoch; True if it is the best so far, which NaN never is."""
        improved = value > self.best
        self.best, self.bad_epochs = (value, 0) if improved else (self.best, self.bad_epochs + 1)
        return improved

    @property
    def is_over(self) -> bool:
        """Whether `patience` epochs in a row brought nothing."""
        return self.bad_epochs >= self.patience


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """A row of history.csv."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    val_uar: float
    seconds: float


@dataclass
class Run:
    """All that changes while training, and so all that an interrupted run must find again."""

    model: Network
    average: Network  # running mean of `model` over the steps: the one that is judged and saved
    optimizer: torch.optim.AdamW
    scheduler: OneCycleLR | ReduceLROnPlateau
    stopping: EarlyStopping
    last: Checkpoint  # of the latest finished epoch; weights are those of `model`, not a copy
    best: Checkpoint | None = None  # of the epoch with the best validation accuracy
    history: list[EpochRecord] = field(default_factory=list)
    n_steps: int = 0
    rate: float = field(init=False)  # learning rate at the start of the epoch

    def __post_init__(self) -> None:
        """Note the first rate, and what is averaged."""
        self.rate = self.optimizer.param_groups[0]["lr"]
        states = (self.average.state_dict().values(), self.model.state_dict().values())
        self._pairs = list(zip(*states, strict=True))  # these tensors stay; only their values change

    @classmethod
    def start(cls, cfg: Config, corpus: Corpus, split: Split, device: torch.device, n_batches: int) -> "Run":
        """Make a fresh network and optimizer; mean and deviation come from the training clips alone."""
        seed_everything(cfg.seed, 0)
        mean, std = feature_stats(corpus.prepared.features, split.train)
        model = build_model(cfg, len(corpus.labels), mean=mean, std=std).to(device)
        weights = [weight for weight in model.parameters() if weight.ndim > 1]
        others = [weight for weight in model.parameters() if weight.ndim <= 1]  # to shrink them helps nobody
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, cfg.learning_rate, weight_decay=cfg.weight_decay, fused=device.type in {"cpu", "cuda"}
        )
        scheduler: OneCycleLR | ReduceLROnPlateau
        if cfg.schedule == "onecycle":  # Smith & Topin 2018, arXiv:1708.07120
            scheduler = OneCycleLR(
                optimizer,
                cfg.learning_rate,
                total_steps=max(5, cfg.epochs * n_batches),  # of four it would divide by zero
                pct_start=0.25,
                div_factor=10,
                final_div_factor=100,
            )
        else:
            scheduler = ReduceLROnPlateau(
                optimizer, mode="max", factor=cfg.lr_factor, patience=cfg.lr_patience, threshold=0
            )
        counts = np.bincount(corpus.targets[split.train], minlength=len(corpus.labels)).tolist()
        last = Checkpoint(
            config=cfg,
            labels=corpus.labels,
            weights=model.state_dict(),
            epoch=0,
            scores={},
            n_clips=dict(zip(corpus.labels, counts, strict=True)),
            files=_hash_files(corpus, split),
            versions=_versions(),
        )
        return cls(model, copy.deepcopy(model), optimizer, scheduler, EarlyStopping(cfg.patience), last)

    def learn(self, loss: Tensor) -> None:
        """Take one step downhill, and the average after it."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT)
        self.optimizer.step()
        if isinstance(self.scheduler, OneCycleLR):
            self.scheduler.step()
        self.n_steps += 1
        # Young averages forget faster, or they would remember the random start.
        decay = min(self.last.config.ema_decay, (1 + self.n_steps) / (10 + self.n_steps))
        with torch.no_grad():
            for mean, value in self._pairs:
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - decay)
                else:
                    mean.copy_(value)

    def resume(self, path: Path) -> None:
        """Take up the state that save() left, with the training settings of now.

        Raises:
            UserError: There is nothing to resume, or it was another run: other clips, features or network.
        """
        if not path.is_file():
            raise UserError(f"no {path} to resume from: start with `python train.py`")
        cfg, last = self.last.config, load_checkpoint(path)
        state = last.training
        if not state:
            raise UserError(f"{path} is a finished model, not a run that can be resumed")
        laid_out = {"epochs", "learning_rate"} if cfg.schedule == "onecycle" else set()  # by the schedule
        differences = last.config.differences(cfg, ignore=RESUMABLE_FIELDS - laid_out)
        if last.files != self.last.files or last.labels != self.last.labels:
            differences.append("clips: not the same files, classes or split")
        if not differences and (
            odd := misfits(state, self._pattern(last.epoch)) or self._contradictions(state, last.epoch)
        ):
            raise UserError(f"cannot resume {path}, whose state is damaged: {'; '.join(odd[:5])}")
        if not differences and isinstance(self.scheduler, OneCycleLR):
            planned, steps = state["scheduler"]["total_steps"], self.scheduler.total_steps
            if planned != steps:
                differences.append(f"steps of the schedule: {planned} -> {steps}")
        if differences:
            raise UserError(f"cannot resume {path}, which was another run: {'; '.join(differences)}")
        for difference in last.config.differences(cfg, ignore=RUNTIME_FIELDS - {"batch_size"}):
            say(f"note: resuming with another {difference}")
        self.model.load_state_dict(last.weights)
        self.average.load_state_dict(state["average"])
        self.n_steps = state["n_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.factor, self.scheduler.patience = cfg.lr_factor, cfg.lr_patience
        self.optimizer.param_groups[0]["weight_decay"] = cfg.weight_decay
        for group in self.optimizer.param_groups:
            if cfg.learning_rate != last.config.learning_rate:
                group["lr"] = cfg.learning_rate
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.stopping = EarlyStopping(**{**state["stopping"], "patience": cfg.patience})
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.last = replace(self.last, epoch=last.epoch, scores=last.scores)
        if state["best"]:
            self.best = replace(self.last, **state["best"])

    def save(self, path: Path) -> None:
        """Write everything that resume() needs."""
        save_checkpoint(path, replace(self.last, training=self._state()))

    def _state(self) -> dict[str, Any]:
        best = self.best and {name: getattr(self.best, name) for name in ("weights", "epoch", "scores")}
        return {
            "average": self.average.state_dict(),
            "n_steps": self.n_steps,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "stopping": asdict(self.stopping),
            "history": [asdict(record) for record in self.history],
            "best": best,
        }

    def _pattern(self, n_epochs: int) -> dict[str, Any]:
        """What the state of this run is built like after that many epochs."""
        state = self._state()
        if n_epochs:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            state["optimizer"]["state"] = {
                number: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                for number, parameter in enumerate(parameters)
            }
            scores = dict.fromkeys(("accuracy", "uar", "macro_f1"), 0.0)
            state["best"] = {"weights": state["average"], "epoch": 0, "scores": scores}
        row = dict.fromkeys((column.name for column in fields(EpochRecord)), 0.0)
        return {**state, "history": [row] * min(n_epochs, 1_000_000)}  # more than config.py allows

    def _contradictions(self, state: dict[str, Any], n_epochs: int) -> list[str]:
        """What no run can have counted; of some the scheduler would raise, or the average divide by zero."""
        steps, best = state["n_steps"], state["best"]
        n_scheduled = steps if isinstance(self.scheduler, OneCycleLR) else n_epochs
        sound = {
            "n_steps": type(steps) is int and steps >= 0,
            "scheduler.last_epoch": state["scheduler"]["last_epoch"] == n_scheduled,
            "stopping.bad_epochs": state["stopping"]["bad_epochs"] <= n_epochs,
            "best.epoch": best is None or best["epoch"] in range(1, n_epochs + 1),
            "history": [row["epoch"] for row in state["history"]] == list(range(1, n_epochs + 1)),
        }
        return [f"{name} cannot be" for name, is_so in sound.items() if not is_so]

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or early stopping says so."""
        return len(self.history) >= self.last.config.epochs or self.stopping.is_over

    def take_best(self) -> Checkpoint:
        """Go back to the weights of the best epoch, and return its checkpoint."""
        assert self.best is not None  # the first finished epoch is the best so far
        self.model.load_state_dict(self.best.weights)
        return self.best

    def finish_epoch(self, trained: Outcome, checked: Outcome, seconds: float) -> bool:
        """Take in an epoch's results; True if it is the best so far."""
        scores = Scores.of(checked, len(self.last.labels)).summary()
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(scores["accuracy"])
        is_best = self.stopping.step(scores["accuracy"])
        self.history.append(
            EpochRecord(
                epoch=len(self.history) + 1,
                learning_rate=self.rate,
                train_loss=trained.loss,
                train_accuracy=float((trained.predictions == trained.targets).mean()),
                val_loss=checked.loss,
                val_accuracy=scores["accuracy"],
                val_uar=scores["uar"],
                seconds=seconds,
            )
        )
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.last = replace(self.last, epoch=len(self.history), scores=scores)
        if is_best:
            weights = {name: value.cpu().clone() for name, value in self.average.state_dict().items()}
            self.best = replace(self.last, weights=weights)
        return is_best


def load_data(cfg: Config, team: Team = _ALONE, *, fold: int = 0) -> tuple[Corpus, Split]:
    """Load the corpus and split it.

    Raises:
        UserError: There is nothing to learn from, or the settings cannot train.
    """
    if cfg.batch_size < 2 * team.size:
        each = f" in each of {team.size} processes" if team.size > 1 else ""
        raise UserError(
            f"batch_size = {cfg.batch_size}: must be at least 2{each} to train, for batch norm's sake"
        )
    corpus = load_corpus(cfg)
    if len(corpus.labels) < 2:
        raise UserError(f"only one class in {cfg.data_root}, {corpus.labels[0]}: nothing to tell apart")
    split = split_corpus(corpus, cfg, fold)
    if len(split.train) <= team.size:  # a batch of one is no batch
        raise UserError(f"{len(split.train)} training clips are too few for {team.size} processes")
    for name, part in (("val", split.val), ("holdout", split.holdout)):
        absent = np.setdiff1d(corpus.targets, corpus.targets[part]).tolist() if len(part) else []
        for label in absent:
            say(f"warning: no {name} clip of class {corpus.labels[label]}: it has too few clips")
    return corpus, split


def fit(cfg: Config, team: Team = _ALONE, *, fold: int = 0) -> dict[str, Any]:
    """Train as the config says: data, split, network, epochs, report; with folds, the one of that number.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: Data, settings or checkpoint do not allow the run, or its loss is no longer finite.
        Interrupted: Ctrl-C or SIGTERM; the finished epochs are saved.
    """
    keep_freed_memory()
    device = team.device(cfg.device)
    run_dir, best_path, last_path = Path(cfg.run_dir), Path(cfg.checkpoint), Path(cfg.run_dir, "last.pth")
    if best_path.is_dir():
        raise UserError(f"checkpoint = {cfg.checkpoint!r}: is a folder, must be a file")
    if best_path.exists() and not best_path.is_file():  # to replace a device takes it from the whole system
        raise UserError(f"checkpoint = {cfg.checkpoint!r}: must be a file")
    # The folders resolved, for a link or `..` in the name leads to the same file.
    if best_path.parent.resolve() == run_dir.resolve() and best_path.name in {*_RUN_FILES, *_KEPT_FILES}:
        raise UserError(
            f"checkpoint = {cfg.checkpoint!r}: the run keeps {best_path.name} there, must be another name"
        )
    _spare_real_model(cfg)
    corpus, split = load_data(cfg, team, fold=fold)
    tell(describe_split(corpus, split, cfg))
    loaders = [
        make_loader(corpus, part, cfg.batch_size, shuffle=part is split.train, seed=cfg.seed, team=team)
        for part in split
    ]
    weights = class_weights(corpus.targets[split.train], corpus.labels)
    criterion = nn.CrossEntropyLoss(weights, label_smoothing=cfg.label_smoothing).to(device)
    run = Run.start(cfg, corpus, split, device, len(loaders[0]))
    if cfg.resume:
        run.resume(last_path)
        if run.history and team.leads:  # a kill between the two left it a row behind
            write_history(run_dir / "history.csv", run.history)
    elif team.leads:
        _clear(run_dir)
        run.save(last_path)
    model = DistributedDataParallel(run.model) if team.size > 1 else run.model
    train_epochs(run, model, loaders, criterion, team=team)
    best = run.take_best()
    if team.leads:
        save_checkpoint(best_path, best)  # again, since a resumed run may find another model there
    reports = {  # in float32, as inference computes
        name: measure(run.model, corpus, part, loader, criterion, team=team)
        for (name, part), loader in zip(split._asdict().items(), loaders, strict=True)
        if name != "train" and len(part)
    }
    for name, report in reports.items():
        tell(report.table(_PARTS[name]))
    metrics = summarize(run, corpus, split, reports, team=team)
    if team.leads:
        write_json(run_dir / "metrics.json", metrics)
        name, report = list(reports.items())[-1]  # the held-out clips, if there are any
        write_predictions(run_dir / "predictions.csv", corpus, getattr(split, name), report.outcome)
        title = f"{metrics['corpus']}, {len(getattr(split, name)):,} {name} clips"
        save_figure(
            run_dir / "confusion_matrix.png", lambda: plot_confusion(report.scores, corpus.labels, title)
        )
    tell(f"best epoch {metrics['best_epoch']} in {best_path}; figures, history and metrics in {run_dir}")
    return metrics


def make_copies(features: Tensor, cfg: Config) -> Tensor:
    """Copy a batch (B, F, T) for each member of the ensemble, every clip augmented anew: (M * B, F, T)."""
    copies = features.repeat(cfg.ensemble, 1, 1)
    return augment_features(copies, cfg) if cfg.warp or cfg.stretch or cfg.shift else copies


def train_epochs(
    run: Run, model: nn.Module, loaders: Sequence[Loader], criterion: nn.Module, *, team: Team = _ALONE
) -> None:
    """Train until the epochs are done or early stopping says so, and save after each.

    Args:
        run: Where it stands; brought up to date.
        model: run.model, or its wrapper that shares the gradients of a team.
        loaders: Of the training and the validation clips.
        criterion: The loss.
        team: The processes.

    Raises:
        UserError: The loss is no longer finite; says which checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM; the finished epochs are saved.
    """
    cfg = run.last.config
    run_dir, best_path = Path(cfg.run_dir), Path(cfg.checkpoint)
    dtype = resolve_dtype(cfg.precision, next(model.parameters()).device)
    n_saved = len(run.history)
    augment = functools.partial(make_copies, cfg=cfg)
    try:
        while not run.is_over:
            started = time.perf_counter()
            epoch = len(run.history) + 1
            seed_everything(cfg.seed, epoch, team.rank)
            loaders[0].sampler.set_epoch(epoch)  # type: ignore[attr-defined] # it is a DistributedSampler
            trained = run_epoch(
                model,
                loaders[0],
                criterion,
                learn=run.learn,
                augment=augment,
                dtype=dtype,
                title=f"epoch {epoch}",
                team=team,
            )
            team.align(run.average)
            checked = run_epoch(
                run.average, loaders[1], criterion, title="validation", dtype=dtype, team=team
            )
            is_best = run.finish_epoch(trained, checked, time.perf_counter() - started)
            if team.leads:
                if is_best and run.best:
                    save_checkpoint(best_path, run.best)
                run.save(run_dir / "last.pth")
                n_saved = len(run.history)
                write_history(run_dir / "history.csv", run.history)
            tell(describe_epoch(run))
    except UserError as error:
        kept = f"{best_path} of epoch {run.best.epoch} is kept" if run.best else "there is no checkpoint yet"
        raise UserError(f"epoch {len(run.history) + 1}: {error} ({kept})", code=error.code) from None
    except Interrupted:
        say(f"stopped after epoch {n_saved}: the same command with --resume goes on from there")
        raise
    finally:
        if run.history and team.leads:
            save_figure(run_dir / "loss.png", lambda: plot_history(run.history, corpus_name(cfg)))


def _spare_real_model(cfg: Config) -> None:
    """Refuse to let a demo run overwrite a model of real data, or its run."""
    for path in (Path(cfg.checkpoint), Path(cfg.run_dir, "last.pth")) if cfg.demo else ():
        try:
            is_real = not load_checkpoint(path).config.demo
        except UserError:  # there is none to spare
            continue
        if is_real:
            raise UserError(
                f"{path} was not trained on the demo corpus: "
                "pass --checkpoint demo.pth --run_dir run_demo to keep it"
            )


# What a run writes into run_dir, and what stays there from one run to the next.
_RUN_FILES = (
    "last.pth",
    "history.csv",
    "metrics.json",
    "predictions.csv",
    "loss.png",
    "confusion_matrix.png",
)
_KEPT_FILES = ("unfinished.pth", "lock")


def _clear(run_dir: Path) -> None:
    """Remove what an earlier run left, so that two never mix; an unfinished one is set aside."""
    last_path = run_dir / "last.pth"
    with contextlib.suppress(UserError, KeyError, TypeError):  # there is none, or it is damaged
        last = load_checkpoint(last_path)
        bad_epochs = last.training["stopping"]["bad_epochs"] if last.training else 0
        if 0 < last.epoch < last.config.epochs and bad_epochs < last.config.patience:
            aside = last_path.with_name("unfinished.pth")
            last_path.replace(aside)
            say(f"note: {last_path} of an unfinished run of {last.epoch} epochs is set aside as {aside}")
    for name in _RUN_FILES:
        (run_dir / name).unlink(missing_ok=True)


def _hash_files(corpus: Corpus, split: Split) -> str:
    """Stand for the audio of all clips, their classes, and the part each is in."""
    text = repr((corpus.prepared.digests, corpus.targets.tolist(), [part.tolist() for part in split]))
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


# ---- the report -----------------------------------------------------------------------------------------


_PARTS = {
    "val": "validation clips (they chose the epoch, so that this flatters)",
    "holdout": "held-out clips (scored once: the score to quote)",
}


class Report(NamedTuple):
    """Scores of a model on one part of the data."""

    outcome: Outcome
    scores: Scores
    overall: dict[str, float]  # accuracy, uar, macro_f1, calibration_error, loss
    intervals: dict[str, list[float]]  # 95 % of accuracy, uar and macro_f1
    per_class: dict[str, dict[str, float]]  # precision, recall, f1, clips
    per_corpus: dict[str, dict[str, float]]  # accuracy, clips

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        tables = {"per_class": self.per_class, "per_corpus": self.per_corpus}
        return {**self.overall, "intervals": self.intervals, **tables}

    def table(self, title: str) -> str:
        """Lay the scores out for a terminal."""
        width = max(len(printable(name)) for name in [*self.per_class, *self.per_corpus, "per corpus"])
        names = {"accuracy": "accuracy", "uar": "unweighted average recall", "macro_f1": "macro F1"}
        overall = [
            f"{text} {self.overall[name]:.1%} [{low:.1%}, {high:.1%}]"
            for (name, text), (low, high) in zip(names.items(), self.intervals.values(), strict=True)
        ]
        lines = [
            f"\n{title}",
            f"{', '.join(overall)}, calibration error {self.overall['calibration_error']:.1%}",
            f"{'per class':{width}}  precision  recall     F1  clips",
        ]
        for name, row in self.per_class.items():
            shares = (
                f"{_percent(row['precision']):>9}  {_percent(row['recall']):>6}  {_percent(row['f1']):>5}"
            )
            lines.append(f"{printable(name):{width}}  {shares}  {row['clips']:5d}")
        lines.append(f"{'per corpus':{width}}  accuracy  clips")
        for name, row in self.per_corpus.items():
            lines.append(f"{name:{width}}  {row['accuracy']:8.1%}  {row['clips']:5d}")
        return "\n".join(lines)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def measure(
    model: nn.Module,
    corpus: Corpus,
    indices: IntArray,
    loader: Loader,
    criterion: nn.Module,
    *,
    team: Team = _ALONE,
) -> Report:
    """Score a model on some clips: as a whole, per class, and per corpus as the file names tell."""
    return make_report(run_epoch(model, loader, criterion, team=team), corpus, indices)


def make_report(outcome: Outcome, corpus: Corpus, indices: IntArray) -> Report:
    """Score what became of the clips `indices` of a corpus."""
    scores = Scores.of(outcome, len(corpus.labels))
    columns = zip(scores.precision, scores.recall, scores.f1, scores.confusion.sum(axis=1), strict=True)
    per_class = {
        label: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "clips": int(clips)}
        for label, (precision, recall, f1, clips) in zip(corpus.labels, columns, strict=True)
    }
    right = outcome.predictions == outcome.targets
    names = np.array([corpus.sources[index].corpus for index in indices])
    per_corpus = {
        str(name): {"accuracy": float(right[names == name].mean()), "clips": int((names == name).sum())}
        for name in np.unique(names)
    }
    overall = {**scores.summary(), "calibration_error": calibration_error(outcome), "loss": outcome.loss}
    intervals = bootstrap(outcome, [corpus.sources[index].speaker for index in indices])
    return Report(outcome, scores, overall, intervals, per_class, per_corpus)


def summarize(
    run: Run, corpus: Corpus, split: Split, reports: dict[str, Report], *, team: Team = _ALONE
) -> dict[str, Any]:
    """Everything worth keeping about a finished run, for metrics.json."""
    cfg, device = run.last.config, next(run.model.parameters()).device
    assert run.best is not None
    return {
        "corpus": corpus_name(cfg),
        "split": describe_split(corpus, split, cfg),
        "best_epoch": run.best.epoch,
        "epochs": len(run.history),
        "training_minutes": round(sum(record.seconds for record in run.history) / 60, 2),
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "hardware": f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
        "processes": team.size,
        "versions": run.last.versions,
        "config": cfg.to_dict(),
        **{name: report.to_dict() for name, report in reports.items()},
    }


def corpus_name(cfg: Config) -> str:
    """What the data are called in figures and metrics."""
    return "synthetic demo corpus" if cfg.demo else Path(cfg.data_dir).resolve().name


def describe_split(corpus: Corpus, split: Split, cfg: Config) -> str:
    """Say how many clips each part has, and whether its speakers are known from training."""
    train, *others = ({corpus.sources[index].speaker for index in part} for part in split)
    judges = set().union(*others) - {""}
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in split._asdict().items())
    how = {"random": "split at random, each class alike", "speaker": "split by speaker"}[cfg.split]
    text = f"{len(corpus.labels)} classes; {sizes} clips, {how}"
    shared = f"; {len(judges & train)} of the {len(judges)} speakers in val and holdout are also in train"
    return text + shared if judges else text


def describe_epoch(run: Run) -> str:
    """One line of scores for the latest epoch; a star marks the best so far."""
    record = run.history[-1]
    star = " *" if run.best and run.best.epoch == record.epoch else ""
    return (
        f"epoch {record.epoch:3d}/{run.last.config.epochs}  "
        f"train loss {record.train_loss:.3f} accuracy {record.train_accuracy:5.1%}  "
        f"val loss {record.val_loss:.3f} accuracy {record.val_accuracy:5.1%}  "
        f"lr {record.learning_rate:.1e}  {record.seconds:.1f} s{star}"
    )


def write_history(path: Path, history: Sequence[EpochRecord]) -> None:
    """Write one CSV row per finished epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(history[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in history)
    with replace_file(path) as file:
        file.write(text.getvalue().encode())


def write_predictions(path: Path, corpus: Corpus, indices: IntArray, outcome: Outcome) -> None:
    """Write what the network made of each clip: file, class, class predicted, probabilities."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)  # or a lone CR would end a row
    writer.writerow(["filename", "emotion", "predicted", *corpus.labels])
    for index, row, predicted in zip(indices, outcome.probabilities, outcome.predictions, strict=True):
        clip = corpus.clips[index]
        shares = [f"{probability:.9g}" for probability in row]
        writer.writerow([clip.path, corpus.labels[clip.label], corpus.labels[predicted], *shares])
    with replace_file(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, with null for NaN, which JSON does not know."""
    with replace_file(path) as file:
        file.write(json.dumps(_without_nan(content), indent=2, allow_nan=False).encode())


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def plot_history(history: Sequence[EpochRecord], title: str) -> "Figure":
    """Draw loss and accuracy of training and validation, with the best epoch marked."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second; and pyplot would want a display

    best = max(history, key=lambda record: record.val_accuracy)  # the first of equals
    epochs = [record.epoch for record in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(
            epochs, [getattr(record, f"train_{name}") for record in history], label="training, with dropout"
        )
        axes.plot(epochs, [getattr(record, f"val_{name}") for record in history], label="validation")
        axes.axvline(best.epoch, color="grey", linestyle=":", label=f"best: epoch {best.epoch}")
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def plot_confusion(scores: Scores, labels: Sequence[str], title: str) -> "Figure":
    """Draw the confusion matrix: counts, coloured by the share of the true class."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    counts = scores.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(ticks, labels, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"{title}: {scores.accuracy:.1%} right", parse_math=False)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    return figure


def save_figure(path: Path, draw: Callable[[], "Figure"]) -> None:
    """Draw a figure and write it as PNG; whatever goes wrong is a warning, since a model is worth more."""
    try:
        with warnings.catch_warnings(), replace_file(path) as file:
            warnings.filterwarnings("ignore", "Glyph")  # a class name in a script that the font lacks
            draw().savefig(file, format="png", dpi=150)
    except Exception as error:
        say(f"warning: {path} not drawn: {error}")


# ---- cross-validation ---------------------------------------------------------------------------------


def cross_validate(cfg: Config, team: Team = _ALONE) -> None:
    """Train once for each fold, held out in turn, and score the network on every clip when it was held out.

    Each fold is a run of its own in run_dir/fold<n>, its model included; with --resume those that are done
    are only scored again. The pooled scores go to run_dir/metrics.json, the predictions beside them.

    Raises:
        UserError: As fit.
        Interrupted: As fit.
    """
    run_dir = Path(cfg.run_dir)
    corpus = load_corpus(cfg)
    if cfg.resume and not any(run_dir.glob("fold*/last.pth")):
        raise UserError(f"no {run_dir}/fold*/last.pth to resume from: start without --resume")
    for fold in range(cfg.folds):  # a fold that cannot be is told now, and not after hours of others
        split_corpus(corpus, cfg, fold)
    rows: list[dict[str, Any]] = []
    for fold in range(cfg.folds):
        home = run_dir / f"fold{fold + 1}"
        tell(f"\nfold {fold + 1} of {cfg.folds}")
        resume = cfg.resume and (home / "last.pth").is_file()
        own = replace(cfg, run_dir=str(home), checkpoint=str(home / "best.pth"), resume=resume)
        rows.append(fit(own, team, fold=fold))
    if not team.leads:
        return
    report = pool_folds(
        [run_dir / f"fold{fold + 1}" / "predictions.csv" for fold in range(cfg.folds)], corpus
    )
    tell(report.table(f"all {len(corpus.clips):,} clips, each scored by the network that never saw it"))
    tell("\nfold  clips  accuracy    UAR  macro F1  best epoch")
    names = ("accuracy", "uar", "macro_f1")
    for fold, row in enumerate(rows):
        scores = "  ".join(f"{row['holdout'][name]:8.1%}" for name in names)
        clips = sum(part["clips"] for part in row["holdout"]["per_class"].values())
        tell(f"{fold + 1:4d}  {clips:5d}  {scores}  {row['best_epoch']:10d}")
    spread = {name: _mean_and_deviation([row["holdout"][name] for row in rows]) for name in names}
    tell(
        "mean "
        + ", ".join(f"{name} {mean:.1%} +/- {deviation:.1%}" for name, (mean, deviation) in spread.items())
    )
    folds = [{"best_epoch": row["best_epoch"], **row["holdout"]} for row in rows]
    head = {name: rows[0][name] for name in ("corpus", "parameters", "hardware", "versions", "config")}
    minutes = sum(row["training_minutes"] for row in rows)
    pooled = {"training_minutes": minutes, "spread": spread, "pooled": report.to_dict(), "folds": folds}
    write_json(run_dir / "metrics.json", head | pooled)
    write_predictions(run_dir / "predictions.csv", corpus, np.arange(len(corpus.clips)), report.outcome)


def pool_folds(paths: Sequence[Path], corpus: Corpus) -> Report:
    """Score the predictions that the folds wrote, all together.

    Raises:
        UserError: They do not hold every clip once.
    """
    probabilities = np.full((len(corpus.clips), len(corpus.labels)), np.nan, np.float32)
    number = {clip.path: index for index, clip in enumerate(corpus.clips)}
    for path in paths:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for path_of_clip, _, _, *shares in islice(csv.reader(file), 1, None):
                probabilities[number[path_of_clip]] = list(map(float, shares))
    if np.isnan(probabilities).any():
        raise UserError(f"{paths[0].parent.parent}: the folds do not hold every clip once")
    true = probabilities[np.arange(len(corpus.clips)), corpus.targets]
    loss = float(-np.log(np.maximum(true, 1e-30)).mean())  # unweighted
    return make_report(Outcome(loss, probabilities, corpus.targets), corpus, np.arange(len(corpus.clips)))


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1))


# ---- the script -----------------------------------------------------------------------------------------


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train."""
    cfg = parse_config(argv, description=__doc__)
    with join_team(cfg.device) as team:
        work = cross_validate if cfg.folds else fit
        if not team.leads:
            work(cfg, team)
            return 0
        with sole_writer(cfg):
            work(cfg, team)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
