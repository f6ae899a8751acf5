"""The training loop: determinism, resuming, selection, scores, and what a run leaves behind."""

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import filelock
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import train
from config import Config, Interrupted, UserError
from model import Checkpoint, EmotionEnsemble, build_model, load_checkpoint, save_checkpoint
from prepare import Clip, Corpus, Prepared, extract_file, load_corpus, source_of, split_corpus
from tests.conftest import RATE, tone
from train import (
    EarlyStopping,
    Outcome,
    Run,
    Scores,
    Team,
    bootstrap,
    calibration_error,
    class_weights,
    fit,
    main,
    make_loader,
    run_epoch,
)

REPO = Path(__file__).resolve().parents[1]
save_figure = train.save_figure


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the training here; the tests about figures put it back."""
    monkeypatch.setattr(train, "save_figure", lambda *_: None)


def flags(cfg: Config) -> list[str]:
    """The command line that gives this config."""
    words: list[str] = []
    for name, value in cfg.to_dict().items():
        if value != getattr(Config(), name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def in_folder(cfg: Config, folder: Path) -> Config:
    """The same settings, writing to another folder."""
    return replace(cfg, run_dir=str(folder / "run"), checkpoint=str(folder / "best.pth"))


def history(cfg: Config) -> list[dict[str, str]]:
    """The rows of history.csv without the seconds, which differ every time."""
    with Path(cfg.run_dir, "history.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def last(cfg: Config) -> Checkpoint:
    """The checkpoint that --resume continues from."""
    return load_checkpoint(Path(cfg.run_dir, "last.pth"))


def best(cfg: Config) -> Checkpoint:
    """The checkpoint for inference."""
    return load_checkpoint(Path(cfg.checkpoint))


def same(one: Any, other: Any) -> bool:
    """Whether two trees of plain types and tensors are equal to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_run(one: Config, other: Config) -> None:
    """Two finished runs are equal but for the clock and the place."""
    assert history(one) == history(other)
    assert same(best(one).weights, best(other).weights)
    assert (best(one).epoch, best(one).scores) == (best(other).epoch, best(other).scores)
    assert same(last(one).weights, last(other).weights)
    for part in ("average", "n_steps", "optimizer", "scheduler", "stopping", "best"):
        assert same(last(one).training[part], last(other).training[part]), part


def outcome_of(predictions: np.ndarray, targets: np.ndarray, n_classes: int = 2) -> Outcome:
    """Predictions without a doubt."""
    return Outcome(1.0, np.eye(n_classes, dtype=np.float32)[predictions], targets)


def noise_corpus(rng: np.random.Generator, n_clips: int, n_classes: int = 2) -> Corpus:
    """Clips without a pattern, which can only be learnt by heart."""
    features = rng.normal(size=(n_clips, 120, 20)).astype(np.float32)
    targets = np.arange(n_clips) % n_classes
    clips = [Clip(f"{number}.wav", int(label)) for number, label in enumerate(targets)]
    prepared: Any = Prepared(np.arange(n_clips), features, np.ones(n_clips), [""] * n_clips, [], [])  # type: ignore[arg-type]
    sources = [source_of(clip.path) for clip in clips]
    return Corpus(tuple("ABCDEFG"[:n_classes]), clips, targets, sources, prepared)


# ---- several processes ----------------------------------------------------------------------------------


class Others(Team):
    """A process whose fellows have left their shares, as far as they have come by."""

    shares: list[Any]  # by rank

    def gather(self, mine: Any) -> list[Any]:
        """Leave this one, and take them all."""
        self.shares[self.rank] = mine
        return [mine if share is None else share for share in self.shares]


@pytest.mark.parametrize("n_clips", [1, 8, 9, 11])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_team_scores_every_clip_once(size: int, n_clips: int, rng: np.random.Generator) -> None:
    """Its outcome is that of one process: no clip lost or twice, in order, however the shares turn out."""
    corpus, network = (
        noise_corpus(rng, n_clips, 4),
        build_model(Config(conv_channels=4, gru_hidden=8, ensemble=1), 4),
    )

    def outcome(team: Team) -> Outcome:
        loader = make_loader(corpus, np.arange(n_clips), 6, shuffle=False, team=team)
        return run_epoch(network, loader, nn.CrossEntropyLoss(), team=team)

    alone = outcome(Team())
    Others.shares = [None] * size
    for rank in range(size):
        outcome(Others(rank, size))  # the shares come together
    for rank in range(size):
        together = outcome(Others(rank, size))
        np.testing.assert_array_equal(together.predictions, alone.predictions)
        np.testing.assert_array_equal(together.targets, alone.targets)


def test_shares_of_a_training_epoch(rng: np.random.Generator) -> None:
    """Each clip once, in an order that the epoch and the seed change; batches together as large as asked."""
    corpus = noise_corpus(rng, 24, 24)

    def shares(epoch: int, seed: int = 0) -> list[list[int]]:
        loaders = [
            make_loader(corpus, np.arange(24), 8, shuffle=True, seed=seed, team=Team(rank, 2))
            for rank in range(2)
        ]
        batches = []
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            batches.append([targets.tolist() for _, targets in loader])
        assert [len(batch) for rank in batches for batch in rank] == [4] * 6
        return [[label for batch in rank for label in batch] for rank in batches]

    first = shares(1)
    assert sorted(first[0] + first[1]) == list(range(24))
    assert shares(1) == first
    assert shares(2) != first
    assert shares(1, seed=1) != first


def test_a_loss_that_only_another_process_has_stops_all(rng: np.random.Generator) -> None:
    """Otherwise the rest would wait for it for ever."""
    corpus, network = noise_corpus(rng, 8), build_model(Config(conv_channels=4, gru_hidden=8, ensemble=1), 2)

    class Unlucky(Team):
        def gather(self, mine: Any) -> list[Any]:
            _, *rest = mine
            return [mine, (np.array([1.0, math.nan], np.float32), *rest)]

    team = Unlucky(0, 2)
    loader = make_loader(corpus, np.arange(8), 4, shuffle=False, team=team)
    with pytest.raises(UserError, match="loss is nan at batch 2"):
        run_epoch(network, loader, nn.CrossEntropyLoss(), team=team)


def test_batch_too_small_for_a_team(tiny_cfg: Config) -> None:
    with pytest.raises(UserError, match=r"batch_size = 4: must be at least 2 in each of 3 processes"):
        fit(tiny_cfg, Team(0, 3))


# ---- learning -------------------------------------------------------------------------------------------


def test_learns_eight_clips_by_heart(rng: np.random.Generator) -> None:
    """Random features and labels, no dropout: the loss, its gradient and the optimizer belong together."""
    torch.manual_seed(0)
    corpus = noise_corpus(rng, 8)
    network = build_model(Config(dropout=0, conv_dropout=0, conv_channels=8, gru_hidden=16, ensemble=1), 2)
    optimizer, criterion = torch.optim.Adam(network.parameters(), 1e-2), nn.CrossEntropyLoss()

    def learn(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    loader = make_loader(corpus, np.arange(8), 4, shuffle=True)
    losses = [run_epoch(network, loader, criterion, learn=learn).loss for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]
    checked = run_epoch(network, make_loader(corpus, np.arange(8), 4, shuffle=False), criterion)
    assert checked.predictions.tolist() == checked.targets.tolist() == [0, 1] * 4


@pytest.mark.parametrize("ensemble", [1, 3])
def test_each_member_has_its_own_copies(ensemble: int, rng: np.random.Generator) -> None:
    """The loss is that of all copies; the outcome has one row for each clip, the mean of the members."""
    torch.manual_seed(0)
    cfg = Config(conv_channels=4, gru_hidden=8, dropout=0, conv_dropout=0, ensemble=ensemble)
    corpus, network, losses = noise_corpus(rng, 6), build_model(cfg, 2), []
    factors = torch.linspace(1, 2, ensemble)[:, None, None, None]

    def augment(features: Tensor) -> Tensor:
        return (factors * features).flatten(0, 1)

    loader = make_loader(corpus, np.arange(6), 4, shuffle=False)
    outcome = run_epoch(network, loader, nn.CrossEntropyLoss(), learn=losses.append, augment=augment)
    assert outcome.targets.tolist() == corpus.targets.tolist()
    members = network.members if isinstance(network, EmotionEnsemble) else [network]
    batches = [torch.from_numpy(corpus.prepared.features[part]) for part in (np.arange(4), np.arange(4, 6))]
    logits = torch.stack(
        [
            torch.cat([member(factor[0, 0] * batch) for batch in batches])
            for member, factor in zip(members, factors, strict=True)
        ]
    )
    torch.testing.assert_close(torch.from_numpy(outcome.probabilities), logits.softmax(2).mean(0))
    targets = torch.from_numpy(corpus.targets)
    expected = [
        nn.CrossEntropyLoss()(logits[:, a:b].flatten(0, 1), targets[a:b].repeat(ensemble))
        for a, b in ((0, 4), (4, 6))
    ]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))


def test_evaluation_leaves_the_network_alone(rng: np.random.Generator) -> None:
    """No weight, no running statistic of batch norm, and no dropout."""
    corpus, network = noise_corpus(rng, 6), build_model(Config(conv_channels=4, gru_hidden=8, ensemble=1), 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    loader = make_loader(corpus, np.arange(6), 4, shuffle=False)
    first, second = (run_epoch(network, loader, nn.CrossEntropyLoss()) for _ in range(2))
    assert same(dict(network.state_dict()), before)
    assert first.loss == second.loss


def test_separable_classes_are_learnt(tiny_cfg: Config) -> None:
    """From audio files to a perfect score on clips that were never trained on."""
    cfg = replace(tiny_cfg, val_fraction=0.5, holdout_fraction=0.25)
    metrics = fit(replace(cfg, epochs=40, patience=40, lr_patience=40, learning_rate=1e-2, dropout=0.1))
    assert metrics["val"]["accuracy"] == metrics["holdout"]["accuracy"] == 1


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(3, [3, 3, 3]), (4, [4, 4, 2]), (9, [9]), (10, [10]), (64, [10])]
)
def test_batches_of_training(batch_size: int, sizes: list[int], rng: np.random.Generator) -> None:
    """A last batch of one is left out, since batch norm cannot learn from it."""
    loader = make_loader(noise_corpus(rng, 12), np.arange(2, 12), batch_size, shuffle=True)
    assert [len(targets) for _, targets in loader] == sizes


@pytest.mark.parametrize("batch_size", [1, 3, 9, 64])
def test_batches_of_evaluation_hold_every_clip_in_order(batch_size: int, rng: np.random.Generator) -> None:
    """Also a last one alone."""
    corpus = noise_corpus(rng, 12, n_classes=7)
    loader = make_loader(corpus, np.arange(2, 12), batch_size, shuffle=False)
    assert torch.cat([targets for _, targets in loader]).tolist() == corpus.targets[2:].tolist()


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_run_with_odd_batch_sizes(batch_size: int, tiny_cfg: Config) -> None:
    """Ten training clips: a last batch of one, and a batch larger than the data."""
    fit(replace(tiny_cfg, epochs=1, batch_size=batch_size))
    assert best(tiny_cfg).epoch == 1


def test_batches_of_one_are_refused(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """Batch norm cannot learn from one clip, and its own message names no setting."""
    assert main(flags(replace(tiny_cfg, batch_size=1))) == 2
    assert "batch_size = 1" in capfd.readouterr().err


# ---- the same again -------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_run(tiny_cfg: Config, tmp_path: Path) -> None:
    """Bit for bit, whatever the generators did before."""
    other = in_folder(tiny_cfg, tmp_path / "other")
    fit(tiny_cfg)
    torch.rand(7)
    np.random.rand(7)
    fit(other)
    assert_same_run(tiny_cfg, other)


def test_other_seed_gives_another_run(tiny_cfg: Config, tmp_path: Path) -> None:
    """The seed reaches initial weights, dropout and order."""
    other = replace(in_folder(tiny_cfg, tmp_path / "other"), seed=1)
    fit(tiny_cfg)
    fit(other)
    assert not same(last(tiny_cfg).weights, last(other).weights)


def test_every_epoch_is_seeded_differently() -> None:
    """Else each epoch would repeat the order and the dropout of the first."""
    draws = set()
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        train.seed_everything(seed, epoch)
        draws.add(float(torch.rand(())))
    assert len(draws) == 4


# ---- resuming -------------------------------------------------------------------------------------------


@pytest.fixture
def bumpy_cfg(tiny_cfg: Config) -> Config:
    """A run whose learning rate drops early, and whose best epoch is early too."""
    return replace(tiny_cfg, lr_patience=0, epochs=6, learning_rate=3e-3, patience=50)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resumed_run_equals_an_undisturbed_one(cut: int, bumpy_cfg: Config, tmp_path: Path) -> None:
    """Weights, optimizer, scheduler, early stopping, best epoch and history, to the last bit."""
    straight = in_folder(bumpy_cfg, tmp_path / "straight")
    fit(straight)
    fit(replace(bumpy_cfg, epochs=cut))
    fit(replace(bumpy_cfg, resume=True))
    assert_same_run(straight, bumpy_cfg)


def test_the_run_that_is_resumed_is_bumpy(bumpy_cfg: Config) -> None:
    """The test above covers a dropped rate and a best epoch before the interruption."""
    metrics = fit(replace(bumpy_cfg, epochs=3))
    assert metrics["best_epoch"] < 3
    assert last(bumpy_cfg).training["optimizer"]["param_groups"][0]["lr"] < bumpy_cfg.learning_rate


def test_resumed_run_does_not_overwrite_a_better_epoch(tiny_cfg: Config) -> None:
    """The best score travels in last.pth, so that a worse epoch after the interruption stays second."""
    cfg = replace(tiny_cfg, epochs=8, learning_rate=1e-2, dropout=0.1)
    before = fit(cfg)
    assert before["val"]["accuracy"] == 1
    after = fit(replace(cfg, resume=True, epochs=9, learning_rate=0.5))
    assert after["best_epoch"] == before["best_epoch"]
    assert best(cfg).epoch == before["best_epoch"]


@pytest.fixture
def onecycle_cfg(tiny_cfg: Config) -> Config:
    """A run whose rate is laid out for all its epochs, and which saves an average."""
    return replace(tiny_cfg, schedule="onecycle", ema_decay=0.9, epochs=6, patience=50)


@pytest.mark.parametrize(("cut", "precision"), [(1, "float32"), (4, "float32"), (3, "bfloat16")])
def test_resumed_cycle_equals_an_undisturbed_one(
    cut: int, precision: str, onecycle_cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average, its age, and the place on the way up or down are taken up to the last bit."""
    cfg = replace(onecycle_cfg, precision=precision)
    straight = in_folder(cfg, tmp_path / "straight")
    fit(straight)
    with monkeypatch.context() as patch:
        stop_after(cut, patch)
        with pytest.raises(Interrupted):
            fit(cfg)
    assert last(cfg).epoch == cut
    assert not same(last(cfg).weights, last(cfg).training["average"])
    fit(replace(cfg, resume=True))
    assert_same_run(straight, cfg)


@pytest.mark.parametrize("change", [{"epochs": 4}, {"learning_rate": 2e-3}])
@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
def test_a_cycle_cannot_be_laid_out_anew(schedule: str, change: dict[str, Any], tiny_cfg: Config) -> None:
    """Half of one cycle and half of another is neither; on a plateau there is no plan to break."""
    cfg = replace(tiny_cfg, schedule=schedule, epochs=2)
    fit(cfg)
    before = Path(cfg.run_dir, "last.pth").read_bytes()
    resumed = replace(cfg, resume=True, **change)
    if schedule == "plateau":
        assert fit(resumed)["epochs"] == resumed.epochs
        return
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"another run: {name}: {getattr(cfg, name)} -> {value}$") as error:
        fit(resumed)
    assert error.value.code == 2
    assert Path(cfg.run_dir, "last.pth").read_bytes() == before


def test_resume_cannot_change_the_schedule(tiny_cfg: Config) -> None:
    """The state of one means nothing to the other."""
    cfg = replace(tiny_cfg, epochs=2)
    fit(cfg)
    with pytest.raises(UserError, match="schedule: 'plateau' -> 'onecycle'"):
        fit(replace(cfg, resume=True, schedule="onecycle"))


@pytest.fixture
def default_signals() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and so would the children that the tests start in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_all_that_resume_needs(
    signum: int, code: int, bumpy_cfg: Config, tmp_path: Path
) -> None:
    """Stopped in the middle, resumed, and equal to the run that was not."""
    endless = replace(bumpy_cfg, epochs=100_000, patience=100_000)
    command = [sys.executable, str(REPO / "train.py"), *flags(endless)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        for line in run.stdout:
            if line.startswith("epoch   4/"):
                run.send_signal(signum)
                break
        run.stdout.read()
        errors = run.stderr.read()
    assert run.returncode == code, errors
    assert errors.splitlines()[-1] == "interrupted"
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert Path(endless.run_dir, "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.tmp"))

    n_done = last(endless).epoch
    assert n_done >= 4
    assert len(history(endless)) == n_done
    finite = replace(endless, epochs=n_done + 2)
    straight = in_folder(finite, tmp_path / "straight")
    fit(replace(finite, resume=True))
    fit(straight)
    assert_same_run(straight, finite)


def test_resume_without_a_run_is_refused(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """Never a fresh start."""
    assert main(flags(replace(tiny_cfg, resume=True))) == 2
    assert "last.pth to resume from" in capfd.readouterr().err
    assert not Path(tiny_cfg.checkpoint).exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_mfcc": 20}, f"n_mfcc: {Config().n_mfcc} -> 20"),
        ({"duration": 2.0}, r"duration: 3\.0 -> 2\.0"),
        ({"gru_hidden": 16}, "gru_hidden: 8 -> 16"),
        ({"conv_blocks": 8, "gru_layers": 9}, r"conv_blocks: \d -> 8; gru_layers: \d -> 9"),
        ({"conv_kernel": 9}, r"conv_kernel: \d -> 9"),
        ({"seed": 5}, "seed: 0 -> 5.*; clips"),
        ({"val_fraction": 0.5}, r"val_fraction: 0\.25 -> 0\.5.*; clips"),
    ],
)
def test_resume_of_another_run_is_refused(changes: dict[str, Any], named: str, tiny_cfg: Config) -> None:
    """Other features, network or split; all the differences are named, and nothing is overwritten."""
    cfg = replace(tiny_cfg, epochs=1)
    fit(cfg)
    before = Path(cfg.run_dir, "last.pth").read_bytes()
    with pytest.raises(UserError, match=named) as error:
        fit(replace(cfg, resume=True, epochs=2, **changes))
    assert error.value.code == 2
    assert Path(cfg.run_dir, "last.pth").read_bytes() == before


def remove_a_clip(data_dir: Path) -> None:
    """One file fewer."""
    (data_dir / "Low" / "3.wav").unlink()


def rename_a_class(data_dir: Path) -> None:
    """The same files under another name."""
    (data_dir / "Low").rename(data_dir / "Bass")


def swap_two_clips(data_dir: Path) -> None:
    """The same names, but two of them name another class's audio."""
    low, high = data_dir / "Low" / "low.wav", data_dir / "High" / "high.wav"
    (data_dir / "Low" / "3.wav").rename(data_dir / "High" / low.name)
    (data_dir / "High" / "3.wav").rename(data_dir / "Low" / high.name)


@pytest.mark.parametrize("change", [remove_a_clip, rename_a_class, swap_two_clips])
def test_resume_with_other_clips_is_refused(
    change: Callable[[Path], None], tiny_cfg: Config, tone_corpus: Path
) -> None:
    """The split would be another one, and validation clips would have been trained on."""
    cfg = replace(tiny_cfg, epochs=1)
    fit(cfg)
    change(tone_corpus)
    with pytest.raises(UserError, match="clips: not the same") as error:
        fit(replace(cfg, resume=True, epochs=2))
    assert error.value.code == 2


def test_resume_from_a_model_without_a_run_is_refused(tiny_cfg: Config) -> None:
    """best_emotion_model.pth in the place of last.pth has no optimizer to go on with."""
    cfg = replace(tiny_cfg, epochs=1)
    fit(cfg)
    shutil.copy(cfg.checkpoint, Path(cfg.run_dir, "last.pth"))
    with pytest.raises(UserError, match=r"last\.pth") as error:
        fit(replace(cfg, resume=True, epochs=2))
    assert error.value.code == 2


@pytest.mark.parametrize("name", ["best.pth", "last.pth"])
def test_resume_from_a_damaged_file_is_refused(
    name: str, tiny_cfg: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    """A damaged best.pth is no matter: the best epoch is in last.pth too, and is written again."""
    cfg = replace(tiny_cfg, epochs=1)
    fit(cfg)
    path = Path(cfg.checkpoint if name == "best.pth" else Path(cfg.run_dir, name))
    path.write_bytes(b"<html>")
    code = main(flags(replace(cfg, resume=True)))
    assert code == (0 if name == "best.pth" else 2)
    assert (name in capfd.readouterr().err) == (code == 2)
    assert name == "last.pth" or best(cfg).epoch == 1


def other_size(state: dict[str, Any]) -> None:
    """As of a network that is a little larger; without a check it failed in the first step, or worse."""
    state["optimizer"]["state"][2]["exp_avg"] = torch.zeros(5)


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "empty": (dict.clear, "is a finished model"),
    "no optimizer": (lambda state: state.pop("optimizer"), "optimizer is missing"),
    "optimizer no table": (lambda state: state.update(optimizer=[]), "optimizer is a list of 0, not a dict"),
    "moments of another size": (other_size, r"state\.2\.exp_avg is torch.float32 \[5\], not torch.float32 "),
    "moments of nothing": (
        lambda state: state["optimizer"]["state"].clear(),
        r"optimizer\.state\.0 is missing",
    ),
    "rate a text": (
        lambda state: state["optimizer"]["param_groups"][0].update(lr="1"),
        r"param_groups\.0\.lr is a str, not a number",
    ),
    "scheduler with a method": (lambda state: state["scheduler"].update(step=1), "scheduler.step is unknown"),
    "average of another type": (
        lambda state: state["average"].update({"members.0.std": torch.ones((), dtype=torch.float64)}),
        r"average\.members\.0\.std is torch.float64 \[\], not torch.float32 \[\]",
    ),
    "steps none": (lambda state: state.update(n_steps=None), "n_steps is a NoneType, not a number"),
    "history too short": (lambda state: state["history"].pop(), "history is a list of 1, not a list of 2"),
    "row without a column": (lambda state: state["history"][1].pop("epoch"), r"history\.1\.epoch is missing"),
    "patience lost": (lambda state: state["stopping"].pop("patience"), r"stopping\.patience is missing"),
    "stopping lost": (lambda state: state.pop("stopping"), "stopping is missing"),
    "stopping a list": (lambda state: state.update(stopping=[]), "stopping is a list of 0, not a dict"),
    "steps below none": (lambda state: state.update(n_steps=-11), "n_steps cannot be"),  # divided by zero
    "steps NaN": (lambda state: state.update(n_steps=math.nan), "n_steps cannot be"),
    "scheduler far ahead": (
        lambda state: state["scheduler"].update(last_epoch=10**9),
        r"scheduler\.last_epoch cannot be",
    ),
    "patience at an end": (
        lambda state: state["stopping"].update(bad_epochs=math.inf),
        r"stopping\.bad_epochs cannot be",
    ),
    "best to come": (lambda state: state["best"].update(epoch=math.inf), r"best\.epoch cannot be"),
    "an epoch twice": (lambda state: state["history"][1].update(epoch=1), "history cannot be"),
    "best lost": (lambda state: state.update(best=None), "best is a NoneType, not a dict"),
    "best without a weight": (
        lambda state: state["best"]["weights"].pop("members.0.mean"),
        r"weights\.members\.0\.mean is missing",
    ),
    "several": (
        lambda state: [state.pop("best"), state.pop("n_steps")],
        "n_steps is missing; best is missing",
    ),
}


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, bytes]:
    """A run of two epochs, which the tests below damage."""
    folder = tmp_path_factory.mktemp("run")
    for label, hertz in (("Low", 150), ("High", 900)):
        (folder / "data" / label).mkdir(parents=True)
        for number in range(8):
            soundfile.write(folder / "data" / label / f"{number}.wav", tone(hertz + number), RATE)
    cfg = Config(
        data_dir=str(folder / "data"), cache_dir=str(folder / "cache"), conv_channels=4, gru_hidden=8,
        epochs=2, val_fraction=0.25, num_workers=0, device="cpu",
    )  # fmt: skip
    cfg = in_folder(cfg, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_figure", lambda *_: None)
        fit(cfg)
    return cfg, Path(cfg.run_dir, "last.pth").read_bytes()


@pytest.mark.parametrize(("damage", "named"), BAD_STATES.values(), ids=BAD_STATES)
def test_resume_from_a_malformed_state_is_refused(
    damage: Callable[[dict[str, Any]], object],
    named: str,
    two_epochs: tuple[Config, bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A file that is sound but was not written by a run of ours: one line, and what is odd about it."""
    cfg, content = two_epochs
    path = Path(cfg.run_dir, "last.pth")
    path.write_bytes(content)
    checkpoint = load_checkpoint(path)
    damage(checkpoint.training)
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()
    assert main(flags(replace(cfg, resume=True))) == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert re.search(f"error: .*{named}", line)
    assert path.read_bytes() == before
    assert main(flags(replace(cfg, epochs=1))) == 0  # a fresh run minds nothing of it


@pytest.mark.parametrize("name", ["run/../run/last.pth", "link/last.pth", "run/metrics.json", "run/lock"])
def test_checkpoint_among_the_files_of_the_run_is_refused(
    name: str, tiny_cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of the two was overwritten with the other: a model lost, or a run that cannot be resumed."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert main(flags(replace(tiny_cfg, checkpoint=f"{tmp_path}/{name}"))) == 2
    assert "must be another name" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_checkpoint_that_is_no_file_is_refused(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """Root replaced /dev/null with the model."""
    os.mkfifo(tiny_cfg.checkpoint)
    assert main(flags(tiny_cfg)) == 2
    assert "must be a file" in capfd.readouterr().err
    assert Path(tiny_cfg.checkpoint).is_fifo()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_training_outlives_its_reader(
    error: OSError, tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`python train.py | head` ended untrained, with exit code 0; so did a run whose log had no room."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("builtins.print", fail)
    assert main(flags(tiny_cfg)) == 0
    monkeypatch.undo()
    assert best(tiny_cfg).epoch > 0
    assert "error" not in capfd.readouterr().err


def test_folds_resume_only_what_is_there(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a single fold to go on with, --resume began anew."""
    assert main(flags(replace(tiny_cfg, folds=2, resume=True))) == 2
    assert "to resume from" in capfd.readouterr().err
    assert not Path(tiny_cfg.run_dir, "fold1").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_folds_with_a_carriage_return_in_a_name(tiny_cfg: Config) -> None:
    """It ended the row in predictions.csv: a traceback after all folds were trained."""
    Path(tiny_cfg.data_dir, "Low", "0.wav").rename(Path(tiny_cfg.data_dir, "Low", 'a\r"\nb,.wav'))
    assert main(flags(replace(tiny_cfg, folds=2, epochs=1))) == 0


def test_history_that_is_a_row_behind_is_mended(tiny_cfg: Config) -> None:
    """A kill between last.pth and history.csv of the last epoch left it so for good."""
    fit(tiny_cfg)
    path = Path(tiny_cfg.run_dir, "history.csv")
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    fit(replace(tiny_cfg, resume=True))
    assert path.read_bytes() == whole


def test_epoch_that_was_not_saved_is_not_counted(
    tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the second epoch is being saved: --resume goes on after the first."""
    save = Run.save

    def stop(run: Run, path: Path) -> None:
        if len(run.history) == 2:
            raise Interrupted
        save(run, path)

    monkeypatch.setattr(Run, "save", stop)
    assert main(flags(tiny_cfg)) == 130
    assert "stopped after epoch 1: " in capfd.readouterr().err
    assert last(tiny_cfg).epoch == 1


def test_resume_takes_new_training_settings(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """They are noted and honoured, and go into the checkpoint."""
    fit(replace(tiny_cfg, epochs=2))
    capfd.readouterr()
    changed = replace(
        tiny_cfg, resume=True, epochs=4, learning_rate=2e-4, weight_decay=0.5, patience=77, lr_factor=0.1
    )
    fit(changed)
    errors = capfd.readouterr().err
    for note in ("epochs: 2 -> 4", "learning_rate: 0.001 -> 0.0002", f"patience: {Config().patience} -> 77"):
        assert f"note: resuming with another {note}" in errors
    assert [float(row["learning_rate"]) for row in history(tiny_cfg)] == [1e-3, 1e-3, 2e-4, 2e-4]
    state = last(tiny_cfg).training
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert (state["stopping"]["patience"], state["scheduler"]["factor"]) == (77, 0.1)
    assert last(tiny_cfg).config.learning_rate == 2e-4


def test_resume_keeps_a_dropped_learning_rate(bumpy_cfg: Config) -> None:
    """Only another flag sets it anew."""
    fit(replace(bumpy_cfg, epochs=3))
    dropped = last(bumpy_cfg).training["optimizer"]["param_groups"][0]["lr"]
    fit(replace(bumpy_cfg, epochs=4, resume=True))
    assert float(history(bumpy_cfg)[-1]["learning_rate"]) == dropped < bumpy_cfg.learning_rate


def test_resume_of_a_finished_run_reports_again(tiny_cfg: Config) -> None:
    """The same metrics, without another epoch."""
    before = fit(tiny_cfg)
    after = fit(replace(tiny_cfg, resume=True))
    for name in ("epochs", "best_epoch", "val", "holdout", "split"):
        assert json.dumps(after[name]) == json.dumps(before[name])


# ---- one step -------------------------------------------------------------------------------------------


def loss_of(run: Run) -> Tensor:
    """What a network in training makes of six random clips."""
    features = torch.randn(6, 120, 20, generator=torch.Generator().manual_seed(run.n_steps))
    return nn.functional.cross_entropy(run.model.train()(features), torch.arange(6) % 2)


def state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of its weights and buffers."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_average_of_three_steps_by_hand(tiny_cfg: Config) -> None:
    """It forgets faster while it is young; what batch norm has seen is averaged too, and counters copied."""
    run = started(replace(tiny_cfg, ema_decay=0.28))
    mean = {name: value.double() for name, value in state(run.average).items()}
    for decay in (2 / 11, 3 / 12, 0.28):  # the third would be 4 / 13
        run.learn(loss_of(run))
        mean = {name: decay * mean[name] + (1 - decay) * value for name, value in state(run.model).items()}
    average = state(run.average)
    for name, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), mean[name], rtol=1e-5, atol=1e-7)
        else:
            assert value == 3
    moving = {"conv.0.0.weight", "gru.bias_hh_l0", "conv.0.1.running_mean", "head.2.running_var"}
    moving = {f"members.{number}.{name}" for number in range(2) for name in moving}
    assert all(not torch.equal(average[name], run.model.state_dict()[name]) for name in moving)


def test_without_decay_the_average_is_the_network(tiny_cfg: Config) -> None:
    """After every step, to the last bit; yet it is a copy."""
    run = started(replace(tiny_cfg, ema_decay=0))
    for _ in range(3):
        run.learn(loss_of(run))
        assert same(state(run.average), state(run.model))
    assert all(
        one.data_ptr() != other.data_ptr()
        for one, other in zip(run.average.parameters(), run.model.parameters(), strict=True)
    )


def test_the_average_is_validated_and_saved(tiny_cfg: Config) -> None:
    """A score of one network with the weights of another would promise what the file does not hold."""
    cfg = replace(tiny_cfg, epochs=1, ema_decay=0.9)
    metrics = fit(cfg)
    assert same(best(cfg).weights, last(cfg).training["average"])
    assert not same(best(cfg).weights, last(cfg).weights)
    assert float(history(cfg)[0]["val_loss"]) == metrics["val"]["loss"]


def test_weight_decay_shrinks_matrices_alone(tiny_cfg: Config) -> None:
    """Biases and the scales of batch norm are left alone; without a slope nothing else moves."""
    run = started(replace(tiny_cfg, learning_rate=0.1, weight_decay=0.5))
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1)  # biases of batch norm begin at 0, and cannot shrink
    before = state(run.model)
    run.learn(sum((0 * parameter).sum() for parameter in run.model.parameters()))  # type: ignore[arg-type]
    for name, parameter in run.model.named_parameters():
        share = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter.detach(), share * before[name])


@pytest.mark.parametrize("slope", [1e-4, 10.0])
def test_only_a_long_gradient_is_shortened(slope: float, tiny_cfg: Config) -> None:
    """One bad batch must not throw the weights far away; its direction stays."""
    run = started(tiny_cfg)
    run.learn(slope * sum(parameter.sum() for parameter in run.model.parameters()))  # type: ignore[arg-type]
    gradient = torch.cat([parameter.grad.ravel() for parameter in run.model.parameters()])  # type: ignore[union-attr]
    length = min(slope * math.sqrt(len(gradient)), train.MAX_GRADIENT)
    assert (length < train.MAX_GRADIENT) == (slope < 1)
    torch.testing.assert_close(
        gradient, torch.full_like(gradient, length / math.sqrt(len(gradient))), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5])
def test_shortest_cycles(epochs: int, tiny_cfg: Config) -> None:
    """One batch per epoch: of a cycle of four steps torch divided by zero."""
    metrics = fit(replace(tiny_cfg, schedule="onecycle", batch_size=64, epochs=epochs))
    assert metrics["epochs"] == epochs


def test_a_cycle_of_other_steps_is_not_resumed(tiny_cfg: Config) -> None:
    """Another batch size has more steps than the schedule was laid out for, which was a traceback."""
    cfg = replace(tiny_cfg, schedule="onecycle", epochs=4)
    fit(cfg)
    with pytest.raises(UserError, match=r"steps of the schedule: 12 -> 20"):
        fit(replace(cfg, batch_size=2, resume=True))


def test_history_has_the_rate_of_the_start(tiny_cfg: Config) -> None:
    """That after the last step belongs to no step."""
    cfg = replace(tiny_cfg, schedule="onecycle", epochs=3, learning_rate=1e-3)
    fit(cfg)
    rates = [float(row["learning_rate"]) for row in history(cfg)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) <= 1e-3
    assert rates[-1] < rates[-2]


def test_one_cycle_of_the_rate(onecycle_cfg: Config) -> None:
    """Up for the first quarter of all steps, then down to nearly nothing, none left over."""
    run = started(replace(onecycle_cfg, epochs=8))
    n_steps, rates = 8 * 3, []  # ten clips in batches of four
    for _ in range(n_steps):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.learn(loss_of(run))
    top, peak = rates.index(max(rates)), onecycle_cfg.learning_rate
    assert top == n_steps // 4 - 1
    assert rates[0] == pytest.approx(peak / 10)
    assert rates[top] == pytest.approx(peak)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < peak / 500
    assert all(group["lr"] == run.optimizer.param_groups[0]["lr"] for group in run.optimizer.param_groups)


def test_a_run_goes_through_the_whole_cycle(onecycle_cfg: Config) -> None:
    """The plan is made for the batches that there are: 3 of 10 clips, and early stopping does not come."""
    fit(onecycle_cfg)
    state = last(onecycle_cfg).training
    assert state["n_steps"] == state["scheduler"]["total_steps"] == 6 * 3


def test_training_loss_is_weighted_and_smoothed(
    tiny_cfg: Config, tone_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both by hand: a share of the target goes to all classes, and a rare class counts for more."""
    for number in range(4):
        (tone_corpus / "Low" / f"{number}.wav").unlink()
    criteria: list[nn.Module] = []

    def watched(*args: Any, **kwargs: Any) -> Outcome:
        criteria.append(args[2])
        return run_epoch(*args, **kwargs)

    monkeypatch.setattr(train, "run_epoch", watched)
    cfg = replace(tiny_cfg, epochs=1, label_smoothing=0.2, holdout_fraction=0)
    fit(cfg)
    n_clips = np.array(list(best(cfg).n_clips.values()))  # High, Low
    assert n_clips[0] > n_clips[1]
    weights = n_clips.sum() / (2 * n_clips)
    logits, targets = torch.tensor([[2.0, -1.0], [0.5, 1.0], [-3.0, 0.0]]), torch.tensor([0, 0, 1])
    surprise = -logits.double().log_softmax(dim=1).numpy() * weights  # (3, 2)
    expected = 0.8 * surprise[np.arange(3), targets].sum() + 0.2 * surprise.sum() / 2
    assert float(criteria[0](logits, targets)) == pytest.approx(expected / weights[targets].sum(), rel=1e-5)


# ---- weights and scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([0, 1, 2], [1, 1, 1]),
        ([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2], [1, 2, 2 / 3]),  # 12 clips, 3 classes: 4 is average
        ([2, 2, 0, 2], [4 / 3, 1, 4 / 9]),
    ],
)
def test_class_weights_are_inverse_to_frequency(targets: list[int], expected: list[float]) -> None:
    """Computed by hand: clips / (classes * clips of the class)."""
    weights = class_weights(np.array(targets), ["A", "B", "C"])
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_class_without_training_clips_is_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    """By name, and with weight 1 instead of infinity."""
    assert class_weights(np.array([0, 0]), ["Angry", "Sad"]).tolist() == [0.5, 1]
    error = capfd.readouterr().err
    assert "warning: class Sad " in error
    assert "Angry" not in error


def test_validation_batch_of_an_absent_class_is_no_nan(rng: np.random.Generator) -> None:
    """Weights of 0 would make 0 / 0, and end the run with the advice to lower the learning rate."""
    corpus, network = noise_corpus(rng, 6), build_model(Config(conv_channels=4, gru_hidden=8, ensemble=1), 2)
    criterion = nn.CrossEntropyLoss(class_weights(np.array([0, 0]), corpus.labels))
    loader = make_loader(corpus, np.array([0, 2, 1, 3]), 2, shuffle=False)  # classes 0, 0 and 1, 1
    assert math.isfinite(run_epoch(network, loader, criterion).loss)


def test_scores_by_hand() -> None:
    """Three true classes and one that does not occur: it counts for nothing unless it is predicted."""
    confusion = np.array([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 2, 0], [0, 0, 0, 0]])
    true, predicted = np.repeat(np.argwhere(confusion >= 0), confusion.ravel(), axis=0).T
    scores = Scores.of(outcome_of(predicted, true, 4), 4)
    np.testing.assert_array_equal(scores.confusion, confusion)
    assert scores.accuracy == pytest.approx(7 / 10)
    np.testing.assert_allclose(scores.recall, [3 / 4, 2 / 4, 1, np.nan], rtol=1e-6)
    np.testing.assert_allclose(scores.precision, [1, 2 / 3, 2 / 4, np.nan], rtol=1e-6)
    np.testing.assert_allclose(scores.f1, [6 / 7, 4 / 7, 2 / 3, np.nan], rtol=1e-6)
    assert scores.summary() == {
        "accuracy": pytest.approx(7 / 10),
        "uar": pytest.approx((3 / 4 + 2 / 4 + 1) / 3),
        "macro_f1": pytest.approx((6 / 7 + 4 / 7 + 2 / 3) / 3),
    }


# ---- stopping and selecting -----------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.parametrize(
    ("values", "improved", "over_after"),
    [
        ([0.1, 0.2, 0.3], "yyy", None),
        ([0.5, 0.5, 0.4], "ynn", 3),  # an equal is no better
        ([0.5, 0.4, 0.6, 0.6, 0.1], "ynynn", 5),  # a new best starts the count again
        ([NAN, 0.1, NAN, 0.2], "nyny", None),  # NaN is never the best, nor in the way of one
        ([NAN, NAN], "nn", 2),
        ([0.0, 0.0, 0.0], "ynn", 3),
    ],
)
def test_early_stopping(values: list[float], improved: str, over_after: int | None) -> None:
    """With a patience of two."""
    stopping, seen, over = EarlyStopping(patience=2), "", None
    for epoch, value in enumerate(values, start=1):
        seen += "y" if stopping.step(value) else "n"
        over = over or (epoch if stopping.is_over else None)
    assert (seen, over) == (improved, over_after)


def started(cfg: Config) -> Run:
    """A run before its first epoch."""
    corpus = load_corpus(cfg)
    split = split_corpus(corpus, cfg)
    n_batches = len(make_loader(corpus, split.train, cfg.batch_size, shuffle=True))
    return Run.start(cfg, corpus, split, torch.device("cpu"), n_batches)


def finish_epoch(run: Run, n_right: int) -> bool:
    """Pretend an epoch with `n_right` of ten validation clips right."""
    targets = np.arange(10) % 2
    predictions = np.where(np.arange(10) < n_right, targets, 1 - targets)
    return run.finish_epoch(outcome_of(targets, targets), outcome_of(predictions, targets), 0.0)


@pytest.mark.parametrize(
    ("lr_patience", "n_right", "rates"),
    [
        (0, [5, 5, 5, 6, 6], [8, 8, 4, 2, 2]),
        (1, [5, 5, 5, 5, 5], [8, 8, 8, 4, 4]),
        (1, [5, 5, 6, 6, 7], [8, 8, 8, 8, 8]),
    ],
)
def test_learning_rate_halves_on_a_plateau(
    lr_patience: int, n_right: list[int], rates: list[int], tiny_cfg: Config
) -> None:
    """The history holds the rate that an epoch was trained with."""
    run = started(replace(tiny_cfg, lr_patience=lr_patience, learning_rate=8e-3))
    for count in n_right:
        finish_epoch(run, count)
    assert [record.learning_rate * 1000 for record in run.history] == pytest.approx(rates)


def test_best_epoch_is_the_first_of_equals(tiny_cfg: Config) -> None:
    """And its weights are kept as they were, while the network trains on."""
    run = started(tiny_cfg)
    for count in (5, 8, 8, 6):
        run.average.get_buffer("members.0.mean").fill_(len(run.history) + 1)
        finish_epoch(run, count)
    assert run.best is not None
    assert (run.best.epoch, run.best.scores["accuracy"]) == (2, 0.8)
    assert run.best.weights["members.0.mean"].unique().tolist() == [2]
    assert (run.last.epoch, run.last.scores["accuracy"]) == (4, 0.6)


def test_run_ends_when_patience_does(tiny_cfg: Config) -> None:
    """Before the last epoch."""
    run, n_epochs = started(replace(tiny_cfg, patience=2, epochs=9)), 0
    while not run.is_over:
        finish_epoch(run, 5)
        n_epochs += 1
    assert n_epochs == 3


def test_statistics_come_from_training_clips_alone(tiny_cfg: Config) -> None:
    """The mean in the network is that of the clips trained on, computed anew from the files."""
    run = started(tiny_cfg)
    corpus = load_corpus(tiny_cfg)
    split = split_corpus(corpus, tiny_cfg)
    features = np.stack([extract_file(Path(clip.path), tiny_cfg).features for clip in corpus.clips])
    trained_on = features[split.train].astype(np.float64)
    mean, std = trained_on.mean(axis=(0, 2)), np.sqrt(trained_on.var(axis=(0, 2)).mean())
    for number in range(tiny_cfg.ensemble):
        found = run.model.get_buffer(f"members.{number}.mean")
        np.testing.assert_allclose(found[:, 0].numpy(), mean, rtol=1e-4, atol=1e-4)
        assert float(run.model.get_buffer(f"members.{number}.std")) == pytest.approx(std, rel=1e-4)
    assert np.abs(features.mean(axis=(0, 2)) - mean).max() > 0.1  # all clips would give another mean


def test_holdout_is_looked_at_once_and_last(tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training clips train, validation clips select, and only then come the held-out ones."""
    passes: list[tuple[frozenset[int], bool]] = []

    def watched(*args: Any, **kwargs: Any) -> Outcome:
        loader: DataLoader[Any] = args[1]
        passes.append((frozenset(loader.dataset.indices.tolist()), kwargs.get("learn") is not None))
        return run_epoch(*args, **kwargs)

    monkeypatch.setattr(train, "run_epoch", watched)
    fit(tiny_cfg)
    (training, _), (val, _) = passes[:2]
    holdout = passes[-1][0]
    assert passes == [(training, True), (val, False)] * 3 + [(val, False), (holdout, False)]
    assert [len(training), len(val), len(holdout)] == [10, 4, 2]
    assert len(training | val | holdout) == 16


def test_without_holdout_every_other_clip_is_trained_on(tiny_cfg: Config) -> None:
    """And the report is of the validation clips."""
    metrics = fit(replace(tiny_cfg, epochs=1, holdout_fraction=0))
    assert "holdout" not in metrics
    assert sum(best(tiny_cfg).n_clips.values()) == 12


# ---- intervals, calibration, cross-validation -----------------------------------------------------------


def test_interval_of_independent_clips_is_binomial(rng: np.random.Generator) -> None:
    """Unknown speakers: each clip stands for itself."""
    targets = np.zeros(400, np.int64)
    predictions = (rng.random(400) < 0.3).astype(np.int64)
    low, high = bootstrap(outcome_of(predictions, targets), [""] * 400)["accuracy"]
    accuracy = (predictions == 0).mean()
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 400)
    assert (low, high) == (
        pytest.approx(accuracy - half, abs=0.012),
        pytest.approx(accuracy + half, abs=0.012),
    )


def test_interval_knows_that_clips_of_a_speaker_go_together() -> None:
    """Ten speakers, each all right or all wrong: forty clips of one tell no more than one."""
    targets = np.zeros(400, np.int64)
    predictions = np.repeat(np.arange(10) % 2, 40)
    by_speaker = bootstrap(outcome_of(predictions, targets), [str(k // 40) for k in range(400)])["accuracy"]
    low, high = by_speaker
    half = 1.96 * math.sqrt(0.25 / 10)
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.11), pytest.approx(0.5 + half, abs=0.11))


def test_intervals_hold_every_score(rng: np.random.Generator) -> None:
    """And do not change from call to call."""
    targets = rng.integers(3, size=90)
    outcome = outcome_of(rng.integers(3, size=90), targets, 3)
    summary = Scores.of(outcome, 3).summary()
    intervals = bootstrap(outcome, [str(k % 9) for k in range(90)])
    assert intervals.keys() == summary.keys()
    for name, (low, high) in intervals.items():
        assert low < summary[name] < high
    assert intervals == bootstrap(outcome, [str(k % 9) for k in range(90)])


def test_calibration_error_of_known_cases() -> None:
    """Ten clips predicted at 0.8 of which six are right; as many at 0.95 that all are."""
    probabilities = np.array([[0.8, 0.2]] * 10 + [[0.95, 0.05]] * 10, np.float32)
    targets = np.array([0] * 6 + [1] * 4 + [0] * 10)
    error = calibration_error(Outcome(0.0, probabilities, targets))
    assert error == pytest.approx((10 * 0.2 + 10 * 0.05) / 20)
    certain = outcome_of(targets, targets)
    assert calibration_error(certain) == 0


def test_folds_pool_every_clip(tiny_cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """The pooled predictions are each fold's own, and the pooled accuracy is theirs."""
    cfg = replace(tiny_cfg, folds=3, epochs=2)
    assert main(flags(cfg)) == 0
    out = capsys.readouterr().out
    assert "fold 3 of 3" in out
    run_dir = Path(cfg.run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    with (run_dir / "predictions.csv").open(newline="") as file:
        pooled = {row["filename"]: row for row in csv.DictReader(file)}
    assert len(pooled) == 16
    seen: list[str] = []
    for fold in range(1, 4):
        with (run_dir / f"fold{fold}" / "predictions.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                assert pooled[row["filename"]] == row
                seen.append(row["filename"])
        own = json.loads((run_dir / f"fold{fold}" / "metrics.json").read_text())
        assert metrics["folds"][fold - 1]["accuracy"] == own["holdout"]["accuracy"]
        assert load_checkpoint(run_dir / f"fold{fold}" / "best.pth").epoch == own["best_epoch"]
    assert sorted(seen) == sorted(pooled)
    right = sum(row["emotion"] == row["predicted"] for row in pooled.values())
    assert metrics["pooled"]["accuracy"] == pytest.approx(right / 16)
    accuracies = [fold["accuracy"] for fold in metrics["folds"]]
    assert metrics["spread"]["accuracy"] == pytest.approx([np.mean(accuracies), np.std(accuracies, ddof=1)])
    assert not Path(cfg.checkpoint).exists()  # it is no model of all the data


def test_pooling_changes_no_prediction(tiny_cfg: Config, tmp_path: Path) -> None:
    """Rounded to four decimals, the two classes would tie, and the first one win."""
    corpus, path = load_corpus(tiny_cfg), tmp_path / "predictions.csv"
    shares = np.tile(np.array([0.49999, 0.50001], np.float32), (len(corpus.clips), 1))
    outcome = Outcome(0.0, shares, corpus.targets)
    train.write_predictions(path, corpus, np.arange(len(shares)), outcome)
    pooled = train.pool_folds([path], corpus).outcome
    assert np.array_equal(pooled.probabilities, shares)
    assert np.array_equal(pooled.predictions, outcome.predictions)


def test_folds_without_a_clip_are_not_pooled(tiny_cfg: Config, tmp_path: Path) -> None:
    """Its score would be NaN, or that of other clips."""
    corpus, path = load_corpus(tiny_cfg), tmp_path / "run" / "fold1" / "predictions.csv"
    path.parent.mkdir(parents=True)
    rows = [["filename", "emotion", "predicted", "p High", "p Low"]]
    rows += [[clip.path, "Low", "Low", "0.25", "0.75"] for clip in corpus.clips]
    for n_rows in (17, 16):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows[:n_rows])
        if n_rows == 17:
            assert train.pool_folds([path], corpus).to_dict()["accuracy"] == 0.5
        else:
            with pytest.raises(UserError, match=f"{tmp_path / 'run'}: the folds do not hold every clip"):
                train.pool_folds([path], corpus)


def test_classes_named_like_columns(tiny_cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions have columns beside those of the classes; and a class must not steer a terminal."""
    for old, new in (("Low", "predicted"), ("High", "\x1b[31mred")):
        Path(tiny_cfg.data_dir, old).rename(Path(tiny_cfg.data_dir, new))
    assert main(flags(replace(tiny_cfg, folds=2, epochs=1))) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out


def test_impossible_fold_is_told_before_any_training(
    tiny_cfg: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sixteen clips fill no seventeen folds; the first ones could have been trained in vain."""
    assert main(flags(replace(tiny_cfg, folds=17))) == 2
    assert "error: folds = 17: too many for these 16 clips" in capsys.readouterr().err
    assert list(Path(tiny_cfg.run_dir).iterdir()) == [Path(tiny_cfg.run_dir, "lock")]


def test_interrupted_folds_resume(tiny_cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds that are done are not trained again, and the end is that of an undisturbed run."""
    cfg = replace(tiny_cfg, folds=2, epochs=2)
    straight = in_folder(cfg, tmp_path / "straight")
    assert main(flags(straight)) == 0
    calls = 0

    def stop_in_second_fold(*args: Any, **kwargs: Any) -> Outcome:
        nonlocal calls
        calls += 1
        if calls == 7:  # 2 epochs of training and validation, 2 reports, and the second fold begins
            raise Interrupted(signal.SIGINT)
        return run_epoch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "run_epoch", stop_in_second_fold)
        assert main(flags(cfg)) == 130
    assert main([*flags(cfg), "--resume"]) == 0
    names = ("pooled", "folds", "spread")
    one, other = (json.loads(Path(c.run_dir, "metrics.json").read_text()) for c in (cfg, straight))
    assert {name: one[name] for name in names} == {name: other[name] for name in names}


# ---- what a run leaves ----------------------------------------------------------------------------------


def test_files_of_a_run_agree(tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """metrics.json, history.csv, both checkpoints and both figures."""
    monkeypatch.setattr(train, "save_figure", save_figure)
    fit(tiny_cfg)
    folder = Path(tiny_cfg.run_dir)
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = history(tiny_cfg)
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert metrics["best_epoch"] == accuracies.index(max(accuracies)) + 1 == best(tiny_cfg).epoch
    assert metrics["val"]["accuracy"] == max(accuracies) == best(tiny_cfg).scores["accuracy"]
    assert metrics["val"]["loss"] == pytest.approx(float(rows[metrics["best_epoch"] - 1]["val_loss"]))
    assert metrics["epochs"] == last(tiny_cfg).epoch == 3
    assert metrics["config"] == tiny_cfg.to_dict() == best(tiny_cfg).config.to_dict()
    assert best(tiny_cfg).labels == ("High", "Low")
    assert best(tiny_cfg).n_clips == {"High": 5, "Low": 5}
    for name in ("val", "holdout"):
        for table in ("per_class", "per_corpus"):
            n_clips = sum(row["clips"] for row in metrics[name][table].values())
            assert n_clips == {"val": 4, "holdout": 2}[name]
    for name in ("loss.png", "confusion_matrix.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(folder.parent.rglob("*.tmp"))


@pytest.mark.parametrize(("holdout_fraction", "n_clips"), [(0.25, 4), (0, 4)])
def test_predictions_of_the_clips_held_out(holdout_fraction: float, n_clips: int, tiny_cfg: Config) -> None:
    """One row each, with the probability of every class; without held-out clips, those of validation."""
    cfg = replace(tiny_cfg, epochs=2, holdout_fraction=holdout_fraction)
    metrics = fit(cfg)
    corpus = load_corpus(cfg)
    split = split_corpus(corpus, cfg)
    with Path(cfg.run_dir, "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [corpus.clips[index] for index in (split.holdout if holdout_fraction else split.val)]
    assert [row["filename"] for row in rows] == [clip.path for clip in wanted]
    assert [row["emotion"] for row in rows] == [corpus.labels[clip.label] for clip in wanted]
    assert len(rows) == n_clips
    for row in rows:
        assert list(row) == ["filename", "emotion", "predicted", "High", "Low"]
        shares = {label: float(row[label]) for label in corpus.labels}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        assert shares[row["predicted"]] == max(shares.values())
    right = np.mean([row["emotion"] == row["predicted"] for row in rows])
    assert metrics["holdout" if holdout_fraction else "val"]["accuracy"] == pytest.approx(right)


def test_metrics_are_strict_json(tiny_cfg: Config) -> None:
    """A class never predicted has no precision; NaN, as Python writes it, is no JSON to others."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    fit(replace(tiny_cfg, epochs=1, learning_rate=1e-9))  # untrained: one class gets all clips
    json.loads(Path(tiny_cfg.run_dir, "metrics.json").read_text(), parse_constant=refuse)


def test_progress_is_shown_on_a_terminal(tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loss and the accuracy of the last batch."""
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(train.tqdm, "monitor_interval", 0)  # no thread of its own
    monkeypatch.setattr(train.tqdm, "set_postfix", lambda _bar, **values: shown.append(values))
    fit(replace(tiny_cfg, epochs=1))
    assert len(shown) > 3  # batches of training, and those that are only scored
    assert all(re.fullmatch(r"\d+\.\d\d", values["loss"]) for values in shown)
    assert {values["accuracy"] for values in shown} <= {"0%", "25%", "50%", "75%", "100%"}


def test_piped_output_is_plain_lines(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """One per epoch, best ones marked, and no progress bar that overwrites itself."""
    assert main(flags(tiny_cfg)) == 0
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    assert [line.split()[1] for line in out.splitlines() if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert "epoch" not in err
    assert "\nvalidation clips (they chose the epoch, so that this flatters)\naccuracy " in out
    assert "\nheld-out clips (scored once: the score to quote)\naccuracy " in out
    assert re.search(
        r"unweighted average recall \d+\.\d% \[\d+\.\d%, \d+\.\d%\].*, calibration error \d", out
    )


def test_scores_per_corpus(tiny_cfg: Config, tone_corpus: Path) -> None:
    """Corpora are told by their file names."""
    for number in range(8):
        (tone_corpus / "Low" / f"{number}.wav").rename(tone_corpus / "Low" / f"1{number:03}_DFA_SAD_XX.wav")
    metrics = fit(replace(tiny_cfg, epochs=1))
    assert {name: row["clips"] for name, row in metrics["val"]["per_corpus"].items()} == {
        "CREMA-D": 2,
        "other": 2,
    }
    recall = {name: row["recall"] for name, row in metrics["val"]["per_class"].items()}
    accuracy = {name: row["accuracy"] for name, row in metrics["val"]["per_corpus"].items()}
    assert (accuracy["CREMA-D"], accuracy["other"]) == (recall["Low"], recall["High"])


def test_training_reads_and_leaves_the_data(tiny_cfg: Config, tone_corpus: Path) -> None:
    """No file beside the clips."""
    before = sorted(tone_corpus.rglob("*"))
    fit(replace(tiny_cfg, epochs=1))
    assert sorted(tone_corpus.rglob("*")) == before


# ---- faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("fatal_call", "message"),
    [
        (1, "epoch 1: .* at batch 1: lower learning_rate.*there is no checkpoint yet"),
        (6, "epoch 2: .* at batch 2: lower learning_rate.*of epoch 1 is kept"),  # 3 batches, 1 of validation
        (8, "epoch 2: .* at batch 1: lower learning_rate.*of epoch 1 is kept"),
    ],
)
def test_loss_that_is_not_finite_ends_the_run(
    loss: float, fatal_call: int, message: str, tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best checkpoint stays, and epoch, batch and remedy are named."""

    class Failing(nn.CrossEntropyLoss):
        """A loss that fails once."""

        n_calls = 0

        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            """Compute the loss."""
            self.n_calls += 1
            return super().forward(logits, targets) * (loss if self.n_calls == fatal_call else 1)

    monkeypatch.setattr(nn, "CrossEntropyLoss", Failing)
    with pytest.raises(UserError, match=message) as error:
        fit(tiny_cfg)
    assert error.value.code == 1
    assert Path(tiny_cfg.checkpoint).exists() == (fatal_call > 1)
    if fatal_call > 1:
        assert best(tiny_cfg).epoch == last(tiny_cfg).epoch == 1


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError("Unable to allocate 2.00 GiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
    ids=["numpy", "cuda", "cpu"],
)
def test_out_of_memory_keeps_the_finished_epochs(
    fault: Exception,
    tiny_cfg: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It was a traceback; the remedy is named, and where there is room again the run goes on."""
    straight = in_folder(tiny_cfg, tmp_path / "straight")
    fit(straight)
    calls = iter(range(100))

    def forward(self: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == 6:  # in the second epoch
            raise fault
        return criterion(self, logits, targets)

    criterion = nn.CrossEntropyLoss.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.CrossEntropyLoss, "forward", forward)
        assert main(flags(tiny_cfg)) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(
        r"error: epoch 2: out of memory, .* were wanted: lower batch_size.*of epoch 1 is kept", line
    )
    assert last(tiny_cfg).epoch == best(tiny_cfg).epoch == 1
    fit(replace(tiny_cfg, resume=True))
    assert_same_run(straight, tiny_cfg)


def free_of(folder: Path) -> str:
    """How a message tells the space on a disk."""
    return f"({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there)"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    disk, mount = tmp_path / "disk", shutil.which("mount")
    disk.mkdir()
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_disk_that_takes_no_more_loses_nothing(
    fault: str, small_disk: Path, tiny_cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Path, reason and free space are named; what was written stays, and the run can go on later."""
    cfg, straight = in_folder(tiny_cfg, small_disk), in_folder(tiny_cfg, tmp_path / "straight")
    fit(replace(cfg, epochs=1))
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    more = replace(cfg, resume=True)
    if fault == "full":
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        reason = f"{small_disk}.*: No space left on device "
    else:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        reason = f"{small_disk}.*: Read-only file system "
    capfd.readouterr()
    assert main(flags(more)) == 1
    *_, line = capfd.readouterr().err.splitlines()
    assert re.match(f"error: {reason}{re.escape(free_of(small_disk))}$", line)
    after = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path.name not in {"filler", "lock"}} == before
    if fault == "full":
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    fit(more)
    fit(straight)
    assert_same_run(straight, cfg)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_file_size_limit_in_mid_run(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """The first file that is too large ends the run; the model that was there is as it was."""
    import resource

    fit(replace(tiny_cfg, epochs=1))
    old, limits = Path(tiny_cfg.checkpoint).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        code = main(flags(tiny_cfg))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    *_, line = capfd.readouterr().err.splitlines()
    assert code == 1
    assert re.match(r"error: .*last\.pth: File too large \([\d,.]+ MB are free there\)$", line)
    assert Path(tiny_cfg.checkpoint).read_bytes() == old
    assert not list(Path(tiny_cfg.run_dir).parent.rglob("*.tmp"))


def test_one_class_is_refused(tiny_cfg: Config, tone_corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """There is nothing to tell apart."""
    shutil.rmtree(tone_corpus / "High")
    assert main(flags(tiny_cfg)) == 2
    assert "Low" in capfd.readouterr().err


def test_too_few_validation_clips_are_refused(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """Fewer than classes."""
    assert main(flags(replace(tiny_cfg, val_fraction=0.01))) == 2
    assert "val_fraction = 0.01" in capfd.readouterr().err


def test_no_clip_left_for_training_is_refused(
    tmp_path: Path, tiny_cfg: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two clips, and both are needed for validation."""
    for label, hertz in (("A", 200), ("B", 900)):
        (tmp_path / "two" / label).mkdir(parents=True)
        soundfile.write(tmp_path / "two" / label / "1.wav", tone(hertz), RATE)
    cfg = replace(tiny_cfg, data_dir=str(tmp_path / "two"), val_fraction=0.9, holdout_fraction=0)
    assert main(flags(cfg)) == 2
    assert "val_fraction" in capfd.readouterr().err


def test_second_run_in_one_folder_is_refused(tiny_cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """Their histories and checkpoints would mix."""
    Path(tiny_cfg.run_dir).mkdir()
    with filelock.FileLock(Path(tiny_cfg.run_dir, "lock")):
        assert main(flags(tiny_cfg)) == 2
    assert "--run_dir" in capfd.readouterr().err
    assert not Path(tiny_cfg.checkpoint).exists()
    assert main(flags(replace(tiny_cfg, epochs=1))) == 0  # the lock goes with its holder


def test_second_run_with_one_checkpoint_is_refused(
    tiny_cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two folders of runs kept the runs apart, and both wrote one model; folds have models of their own."""
    with filelock.FileLock(tmp_path / ".best.pth.lock"):
        assert main(flags(replace(tiny_cfg, run_dir=str(tmp_path / "other")))) == 2
        assert f"another run is writing to {tiny_cfg.checkpoint}: " in capfd.readouterr().err
        assert not Path(tiny_cfg.checkpoint).exists()
        assert main(flags(replace(tiny_cfg, folds=2, epochs=1))) == 0
    assert main(flags(replace(tiny_cfg, epochs=1))) == 0
    assert not list(tmp_path.glob(".*"))  # nothing is left beside the model


def test_checkpoint_in_the_place_of_the_run_is_refused(tiny_cfg: Config) -> None:
    """Model and run would overwrite each other."""
    path = str(Path(tiny_cfg.run_dir, "last.pth"))
    with pytest.raises(UserError, match=r"last\.pth'"):
        fit(replace(tiny_cfg, checkpoint=path))


def test_fewer_clips_than_processes_are_refused(tiny_cfg: Config) -> None:
    """Each would have a batch of one, which batch norm cannot learn from: no batch at all."""
    with pytest.raises(UserError, match="10 training clips are too few for 10 processes"):
        fit(replace(tiny_cfg, batch_size=64), Team(0, 10))


@pytest.mark.parametrize("field", ["run_dir", "checkpoint", "cache_dir"])
def test_folder_that_cannot_be_made_is_named(
    field: str, tiny_cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A regular file is in its place."""
    (tmp_path / "file").touch()
    assert main(flags(replace(tiny_cfg, **{field: str(tmp_path / "file" / "x")}))) == 1
    assert str(tmp_path / "file") in capfd.readouterr().err


def test_missing_device_is_refused(
    tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before any work."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(flags(replace(tiny_cfg, device="cuda"))) == 2
    assert "device = 'cuda'" in capfd.readouterr().err
    assert not Path(tiny_cfg.cache_dir).exists()


@pytest.mark.parametrize(
    ("trained_on_demo", "demo", "refused"),
    [(False, True, True), (True, True, False), (False, False, False), (None, True, False)],
)
def test_demo_run_spares_a_real_model(
    trained_on_demo: bool | None, demo: bool, refused: bool, tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other pair of old and new model is no loss."""

    class ReachedError(Exception):
        """The run went on to its data."""

    def reach(_cfg: Config) -> None:
        raise ReachedError

    monkeypatch.setattr(train, "load_corpus", reach)
    path = Path(tiny_cfg.checkpoint)
    if trained_on_demo is not None:
        cfg = replace(tiny_cfg, demo=trained_on_demo)
        weights = build_model(cfg, 2).state_dict()
        model = Checkpoint(
            config=cfg,
            labels=("A", "B"),
            weights=weights,
            epoch=1,
            scores={},
            n_clips={},
            files="",
            versions={},
        )
        save_checkpoint(path, model)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(UserError if refused else ReachedError) as error:
        fit(replace(tiny_cfg, demo=demo))
    if refused:
        assert error.value.code == 2
        assert str(path) in str(error.value)
    assert (path.read_bytes() if path.exists() else None) == before


def test_fresh_run_sets_an_unfinished_one_aside(
    tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Forgetting --resume once must not cost the hours before."""
    stop_after(1, monkeypatch)
    with pytest.raises(Interrupted):
        fit(replace(tiny_cfg, epochs=3))
    monkeypatch.undo()
    interrupted = Path(tiny_cfg.run_dir, "last.pth").read_bytes()
    fit(replace(tiny_cfg, epochs=2))
    assert Path(tiny_cfg.run_dir, "unfinished.pth").read_bytes() == interrupted
    assert "unfinished run of 1 epochs" in capfd.readouterr().err
    fit(replace(tiny_cfg, epochs=2))  # the run before this one was finished
    assert Path(tiny_cfg.run_dir, "unfinished.pth").read_bytes() == interrupted


def stop_after(n_epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise Interrupted once an epoch has been told of, as Ctrl-C would."""
    describe = train.describe_epoch

    def stop(run: train.Run) -> str:
        if len(run.history) == n_epochs:
            raise Interrupted
        return describe(run)

    monkeypatch.setattr(train, "describe_epoch", stop)


def test_fresh_run_removes_the_results_of_another(tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics of one run beside the history of another would be believed."""
    monkeypatch.setattr(train, "save_figure", save_figure)
    fit(replace(tiny_cfg, epochs=1))
    stop_after(1, monkeypatch)
    with pytest.raises(Interrupted):
        fit(tiny_cfg)
    assert Path(tiny_cfg.run_dir, "loss.png").exists()
    assert not Path(tiny_cfg.run_dir, "metrics.json").exists()
    assert not Path(tiny_cfg.run_dir, "confusion_matrix.png").exists()


def test_figure_that_cannot_be_drawn_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The model is worth more than its picture."""

    def draw() -> NoReturn:
        raise ValueError("no font")

    save_figure(tmp_path / "loss.png", draw)
    assert "loss.png not drawn: no font" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", ["a$^{$", "日本"])
def test_any_class_name_can_be_drawn(label: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A dollar sign is no mathematics, and a letter that the font lacks no warning."""
    scores = Scores(np.eye(2, dtype=np.int64))
    save_figure(tmp_path / "confusion.png", lambda: train.plot_confusion(scores, [label, "Sad"], label))
    assert (tmp_path / "confusion.png").exists()
    assert not capfd.readouterr().err


def test_checkpoint_path_that_is_a_folder_is_refused_at_once(
    tiny_cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(replace(tiny_cfg, checkpoint=str(tmp_path)))) == 2
    assert "is a folder" in capfd.readouterr().err


def test_class_that_no_clip_judges_is_warned_of(
    tiny_cfg: Config, tone_corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its recall would be missing from the average without a word."""
    (tone_corpus / "Rare").mkdir()
    shutil.copy(tone_corpus / "Test" / "0.wav", tone_corpus / "Rare")
    train.load_data(tiny_cfg)
    errors = capfd.readouterr().err
    assert "no val clip of class Rare" in errors
    assert "no holdout clip of class Rare" in errors
