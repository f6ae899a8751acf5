"""Training: which epoch is kept, resuming, what a run leaves behind, and how it is scored."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

import train
from config import Config, UserError
from inference import predict
from model import Checkpoint, load_checkpoint, load_tensors
from prepare import MFCC, AudioError, ClipFeatures, FeatureCache, mfcc_constants
from tests.conftest import (
    EMOTIONS,
    ROOT,
    Trained,
    flags,
    make_corpus,
    run_script,
    script_command,
    tiny_config,
)
from train import Row, bootstrap, calibration_error, class_weights, describe_scores, fit, make_average, score


def same(one: Any, other: Any) -> bool:
    """Whether two trees of plain types and tensors are equal to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            same(one[key], other[key]) for key in one if key != "seconds"
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def state(cfg: Config, member: int = 1) -> dict[str, Any]:
    """What a network's training goes on from."""
    return load_tensors(Path(cfg.run_dir, f"network{member}.pth"))


def best(cfg: Config) -> Checkpoint:
    """The trained model."""
    return load_checkpoint(Path(cfg.checkpoint))[0]


def script(cfg: Config, **settings: Any) -> int:
    """The script's work, in this process."""
    return train.main(cfg, Namespace(**{"demo": False, "resume": False, "folds": 0, **settings}))


# ---- small parts -----------------------------------------------------------------------------------------


def test_class_weights_are_inverse_to_frequency() -> None:
    """1 on the average over clips; a class without clips gets no infinite weight."""
    weights = class_weights(pd.Series(list("AAAAAABBC")), list("ABC"))
    assert weights.tolist() == pytest.approx([9 / (3 * 6), 9 / (3 * 2), 9 / 3])
    assert class_weights(pd.Series(list("AB")), list("ABC")).tolist() == pytest.approx([2 / 3, 2 / 3, 1])


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_average_forgets_the_random_start_and_follows_the_weights(decay: float) -> None:
    """Batch statistics are averaged too; counts are copied."""
    model = nn.BatchNorm1d(2).requires_grad_(False)
    average = make_average(model, decay)
    values = torch.tensor([3.0, -1.0, *range(40)])
    expected = values[0]
    for number, value in enumerate(values):
        model.weight[:] = model.running_mean[:] = value  # type: ignore[index]
        model.num_batches_tracked.fill_(number)  # type: ignore[union-attr]
        average.update_parameters(model)
        share = min(decay, (1 + number) / (10 + number)) if number else 0
        expected = share * expected + (1 - share) * value
        assert average.module.weight.tolist() == pytest.approx([float(expected)] * 2)
        assert average.module.running_mean.tolist() == pytest.approx([float(expected)] * 2)
        assert average.module.num_batches_tracked == number
    assert float(expected) == pytest.approx(39 if decay == 0 else 38, abs=0.01)


# ---- one network -----------------------------------------------------------------------------------------

Toy = tuple[Config, pd.DataFrame, MFCC]
TOY = {"epochs": 12, "dropout": 0.2, "learning_rate": 1e-2, "tempo": 0, "shift": 0}  # no silence


def make_toy(folder: Path, *, signal: float = 0.0, n_train: int = 48, n_val: int = 40, **changes: Any) -> Toy:
    """Random features of two classes that are so far apart."""
    cfg = tiny_config(folder, **{**TOY, **changes})
    mfcc = MFCC(mfcc_constants(cfg), cfg.hop_length)
    generator = np.random.default_rng(0)
    cache, n_clips = FeatureCache(cfg, mfcc), n_train + n_val
    emotions = np.array(["Angry", "Sad"])[np.arange(n_clips) % 2]
    for number in range(n_clips):
        noise = generator.normal(size=(1, cfg.n_mfcc, cfg.n_frames)) + signal * (number % 2)
        features = mfcc.add_deltas(torch.from_numpy(noise).float()).numpy()
        cache.add((b"%d" % number, 0, 0), ClipFeatures(features, 1.0, str(number), ""))
    cache.database.commit()
    parts = ["train"] * n_train + ["val"] * n_val
    columns = {"path": map(str, range(n_clips)), "emotion": emotions, "corpus": "other", "speaker": ""}
    ids = [row[0] for row in cache.lookup().values()]
    return cfg, pd.DataFrame({**columns, "first_window": ids, "n_windows": 1, "part": parts}), mfcc


def fit_toy(toy: Toy, *, resume: bool = False, stop_after: int = 0) -> dict[str, Any]:
    """Train, perhaps until Ctrl-C after so many epochs; returns the state that is left."""
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        if len(rows) == stop_after:
            raise KeyboardInterrupt

    if stop_after:
        with pytest.raises(KeyboardInterrupt):
            fit(toy[0], *toy[1:], member=1, resume=resume, show=show)
    else:
        fit(toy[0], *toy[1:], member=1, resume=resume, show=show)
    assert same(state(toy[0])["history"][-len(rows) :], rows)
    return state(toy[0])


WAVERING = {"signal": 0.15, "n_val": 100, "patience": 100, "ema_decay": 0, "learning_rate": 3e-2}


def test_kept_is_the_latest_epoch_within_one_standard_error_of_the_best(tmp_path: Path) -> None:
    """Accuracies that go up and down, so that neither the best nor the last epoch is always the one."""
    n_other = 0
    for seed in range(3):
        toy = make_toy(tmp_path / str(seed), seed=seed, **WAVERING)
        end = fit_toy(toy)
        accuracy = [row["val_accuracy"] for row in end["history"]]
        error = math.sqrt(max(accuracy) * (1 - max(accuracy)) / 100)
        within = [number for number, value in enumerate(accuracy, 1) if value >= max(accuracy) - error]
        assert len(accuracy) == 12
        assert end["kept"]["epoch"] == within[-1]
        n_other += within[-1] not in {len(accuracy), accuracy.index(max(accuracy)) + 1}
    assert n_other  # or this would not tell the rule from simpler ones


def test_kept_weights_are_those_of_the_kept_epoch(tmp_path: Path) -> None:
    kept = fit_toy(make_toy(tmp_path / "long", **WAVERING))["kept"]
    assert kept["epoch"] < 12
    again = make_toy(tmp_path / "short", epochs=kept["epoch"], **WAVERING)
    average = fit_toy(again)["average"]
    assert all(torch.equal(average[f"module.{name}"], value) for name, value in kept["weights"].items())


@pytest.mark.parametrize("seed", range(3))
def test_learning_rate_falls_and_training_stops_when_validation_stalls(seed: int, tmp_path: Path) -> None:
    """Both rules, worked out again from the accuracies alone; a fall gives training new patience."""
    toy = make_toy(tmp_path, seed=seed, epochs=60, patience=4, lr_patience=1, lr_factor=0.3, warmup=2)
    history = fit_toy(toy)["history"]
    full = toy[0].learning_rate
    rate, best_accuracy, stalled, bad = full, 0.0, 0, 0
    for row in history:
        assert bad < 4
        if row["epoch"] > 2:
            assert row["learning_rate"] == pytest.approx(rate)
        fell = False
        # Validation in the warm-up counts for early stopping, not for the learning rate.
        improved = row["val_accuracy"] > best_accuracy
        best_accuracy = max(best_accuracy, row["val_accuracy"])
        if row["epoch"] > 2:
            after_warmup = [r["val_accuracy"] for r in history[2 : row["epoch"] - 1]]
            stalled = 0 if row["val_accuracy"] > max(after_warmup, default=-1) else stalled + 1
            if stalled > 1:
                stalled, fell = 0, rate > full / 100 * 1.001
                rate = max(0.3 * rate, full / 100)
        bad = 0 if improved or fell else bad + 1
    assert bad == 4
    assert len(history) < 60
    assert rate == pytest.approx(full / 100)  # it has fallen as far as it may before training stops


def test_learning_rate_rises_in_the_warm_up(tmp_path: Path) -> None:
    """Linearly with the steps, 6 an epoch here."""
    toy = make_toy(tmp_path, epochs=4, warmup=2, lr_patience=50)
    rates = [row["learning_rate"] for row in fit_toy(toy)["history"]]
    start = 1 / 12
    assert rates == pytest.approx([0.01 * share for share in (start, start + (1 - start) / 2, 1, 1)])


def test_resumed_fit_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Over dropout, augmentation, a fall of the learning rate and a stop before and after the kept epoch."""
    changes = {"lr_patience": 0, "patience": 100, "warmup": 1, "shift": 0.1, "tempo": 0.1, "gru_layers": 2}
    straight = fit_toy(make_toy(tmp_path / "straight", **changes))
    assert len({row["learning_rate"] for row in straight["history"][1:]}) > 2
    toy = make_toy(tmp_path / "resumed", **changes)
    fit_toy(toy, stop_after=3)
    fit_toy(toy, resume=True, stop_after=4)
    assert same(fit_toy(toy, resume=True), straight)
    assert not same(fit_toy(make_toy(tmp_path / "other", seed=1, **changes)), straight)


def test_nothing_is_learnt_from_validation_clips(tmp_path: Path) -> None:
    """Not even the mean of the features, whatever the clips that training does not see."""
    mine, theirs = make_toy(tmp_path / "a"), make_toy(tmp_path / "b")
    clips = theirs[1]
    is_val = clips.part == "val"
    clips.loc[is_val, "first_window"] = (
        clips["first_window"][~is_val].iloc[: is_val.sum()].to_numpy()
    )  # other features
    quiet = {"patience": 100, "lr_patience": 100}
    mine, theirs = ((replace(cfg, **quiet), *rest) for cfg, *rest in (mine, theirs))
    one, other = fit_toy(mine), fit_toy(theirs)
    assert same(one["average"], other["average"])
    assert [r["val_loss"] for r in one["history"]] != [r["val_loss"] for r in other["history"]]
    cache = FeatureCache(mine[0], mine[2])
    features = cache.read(mine[1]["first_window"][mine[1].part == "train"]).astype(np.float64)
    mean = one["kept"]["weights"]["mean"].numpy()[:, 0]
    np.testing.assert_allclose(mean, features.mean(axis=(0, 2)), atol=1e-5)
    spread = math.sqrt(features.var(axis=(0, 2)).mean())
    assert float(one["kept"]["weights"]["std"]) == pytest.approx(spread, rel=1e-4)


@pytest.mark.parametrize(("n_train", "batch_size"), [(9, 8), (2, 2), (3, 64), (17, 16)])
def test_batches_of_one_or_larger_than_the_data_are_no_problem(
    n_train: int, batch_size: int, tmp_path: Path
) -> None:
    """Batch norm cannot learn from a single clip."""
    end = fit_toy(make_toy(tmp_path, n_train=n_train, batch_size=batch_size, epochs=2))
    assert [row["epoch"] for row in end["history"]] == [1, 2]


def test_loss_that_diverges_stops_and_keeps_what_was_good(tmp_path: Path) -> None:
    """The weights grow ninefold at each step, until they overflow after a few epochs."""
    toy = make_toy(tmp_path, learning_rate=1e-3, weight_decay=1e4, epochs=100, patience=100)
    with pytest.raises(UserError, match=r"training loss is (nan|inf): lower learning_rate") as fault:
        fit_toy(toy)
    assert fault.value.code == 1
    end = state(toy[0])
    assert end["history"]
    assert all(math.isfinite(row["train_loss"]) for row in end["history"])
    assert all(bool(value.isfinite().all()) for value in end["kept"]["weights"].values())


# ---- a run -----------------------------------------------------------------------------------------------


def test_run_leaves_its_files(trained: Trained) -> None:
    """And nothing beside them, in the folder that it was started from included."""
    assert {path.name for path in trained.folder.iterdir()} == {"run", "cache", "best.pth"}
    visible = {path.name for path in (trained.folder / "run").iterdir() if not path.name.startswith(".")}
    assert visible == {
        *("run.json", "history.csv", "metrics.json", "predictions.csv"),
        *("loss.png", "confusion_matrix.png", "network1.pth", "network2.pth"),
    }
    for name in ("loss.png", "confusion_matrix.png"):
        assert (trained.folder / "run" / name).read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in trained.result.stderr
    assert "\r" not in trained.result.stdout + trained.result.stderr


def test_history_has_a_row_for_each_epoch_of_each_network(trained: Trained) -> None:
    history = pd.read_csv(trained.folder / "run" / "history.csv")
    columns = "network epoch learning_rate train_loss train_accuracy val_loss val_accuracy seconds"
    assert list(history.columns) == columns.split()
    assert history[["network", "epoch"]].to_numpy().tolist() == [[n, e] for n in (1, 2) for e in range(1, 5)]
    printed = re.findall(r"^network (\d)  epoch +(\d)/4 ", trained.result.stdout, re.MULTILINE)
    assert sorted(printed) == [(str(n), str(e)) for n in (1, 2) for e in range(1, 5)]


def test_metrics_are_those_of_the_predictions(trained: Trained) -> None:
    """Every test clip is in predictions.csv, and scoring them again gives what metrics.json says."""
    metrics = json.loads((trained.folder / "run" / "metrics.json").read_text())
    table = pd.read_csv(trained.folder / "run" / "predictions.csv", dtype={"speaker": str})
    probabilities = table[[f"p({emotion})" for emotion in EMOTIONS]]
    assert len(table) == table.path.nunique() == metrics["test"]["clips"] == 12
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.idxmax(axis=1) == "p(" + table.predicted + ")").all()
    assert [Path(path).parent.name for path in table.path] == table.emotion.tolist()
    assert metrics["test"]["accuracy"] == (table.emotion == table.predicted).mean()
    assert metrics["config"] == {**vars(trained.cfg)}
    assert metrics["split"].startswith("3 classes; 24 train, 12 val, 12 test clips, split at random")
    assert metrics["test"]["per_corpus"]["CREMA-D"]["clips"] == 12
    assert f"{metrics['test']['accuracy']:.1%}" in trained.result.stdout


def test_checkpoint_predicts_what_training_reported(trained: Trained) -> None:
    """From the files, without the cache: training and inference see the same features."""
    checkpoint, model = load_checkpoint(Path(trained.cfg.checkpoint))
    assert checkpoint.labels == list(EMOTIONS)
    assert checkpoint.n_clips == dict.fromkeys(EMOTIONS, 8)
    assert len(checkpoint.members) == len(checkpoint.epochs) == 2
    table = pd.read_csv(trained.folder / "run" / "predictions.csv")
    for (_, result), row in zip(
        predict(table.path.tolist(), model, trained.cfg), table.itertuples(), strict=True
    ):
        assert not isinstance(result, AudioError)
        np.testing.assert_allclose(result.probabilities, row[-3:], atol=1e-5)


def test_resumed_ensemble_ends_with_the_bits_of_an_undisturbed_one(trained: Trained, tmp_path: Path) -> None:
    """Each network in a process of its own."""
    places = {"run_dir": str(tmp_path / "run"), "checkpoint": str(tmp_path / "best.pth")}
    short = replace(trained.cfg, epochs=2, **places)
    assert script(short) == 0
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 4
    assert script(replace(short, epochs=4), resume=True) == 0
    for member in (1, 2):
        assert same(state(short, member), state(trained.cfg, member))
    assert same(best(short).members, best(trained.cfg).members)
    assert best(short).epochs == best(trained.cfg).epochs
    theirs = (trained.folder / "run" / "predictions.csv").read_text()
    assert (tmp_path / "run" / "predictions.csv").read_text() == theirs


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Config:
    """The finished run once more, to do with as one likes; its cache is shared."""
    shutil.copytree(trained.folder / "run", tmp_path / "run")
    shutil.copy(trained.folder / "best.pth", tmp_path)
    return replace(trained.cfg, run_dir=str(tmp_path / "run"), checkpoint=str(tmp_path / "best.pth"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"learning_rate": 2e-2}, ["learning_rate: 0.01 -> 0.02"]),
        ({"batch_size": 4, "gru_hidden": 8}, ["batch_size: 8 -> 4", "gru_hidden: 4 -> 8"]),
        ({"n_mels": 24}, ["n_mels: 20 -> 24"]),
        ({"split": "speaker"}, ["split: 'random' -> 'speaker'", "the clips or their split"]),
        ({"ensemble": 1}, ["ensemble: 2 -> 1"]),
    ],
)
def test_resume_of_another_run_is_refused_with_the_differences(
    changes: dict[str, Any], reasons: list[str], copied: Config
) -> None:
    before = contents(Path(copied.run_dir))
    with pytest.raises(UserError) as refusal:
        script(replace(copied, **changes), resume=True)
    assert refusal.value.code == 2
    assert all(reason in str(refusal.value) for reason in reasons)
    assert "epochs" not in str(refusal.value)
    assert contents(Path(copied.run_dir)) == before


def test_resume_with_other_clips_is_refused(copied: Config, tmp_path: Path) -> None:
    other = make_corpus(tmp_path / "other", n_takes=5)
    with pytest.raises(UserError, match=r"cannot resume .*: the clips or their split"):
        script(replace(copied, data_dir=str(other)), resume=True)


def test_resume_of_nothing_is_refused(tiny_cfg: Config) -> None:
    """Never a fresh start."""
    with pytest.raises(UserError, match=r"no run in .* to resume") as refusal:
        script(tiny_cfg, resume=True)
    assert refusal.value.code == 2
    assert not Path(tiny_cfg.checkpoint).exists()


def test_earlier_run_is_set_aside_under_its_date(copied: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, the model included, and the message says so."""
    run_dir = Path(copied.run_dir)
    before = contents(run_dir) | {"best.pth": Path(copied.checkpoint).read_bytes()}
    date = json.loads(before["run.json"])["run"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}", date)
    assert script(replace(copied, ensemble=1, epochs=1)) == 0
    assert {name: content for name, content in before.items() if not name.startswith(".")} == contents(
        run_dir / date
    )
    assert not (run_dir / "network2.pth").exists()
    assert len(pd.read_csv(run_dir / "history.csv")) == 1
    assert len(best(copied).members) == 1
    note = capsys.readouterr().err
    assert "metrics.json, predictions.csv" in note
    assert f"best.pth of an earlier run set aside in {run_dir / date}" in note


def test_second_run_in_one_folder_is_refused(copied: Config) -> None:
    before = contents(Path(copied.run_dir))
    with FileLock(Path(copied.run_dir, ".lock")), pytest.raises(UserError) as refusal:
        script(copied)
    assert refusal.value.code == 2
    assert f"another run is writing to {copied.run_dir}" in str(refusal.value)
    assert contents(Path(copied.run_dir)) == before


@pytest.mark.parametrize("batch_size", [8, 24])
def test_run_that_diverges_at_once_keeps_the_earlier_model(batch_size: int, copied: Config) -> None:
    """NaN is never the best; exit code 1."""
    before = Path(copied.checkpoint).read_bytes()
    with pytest.raises(UserError, match=r"loss is (nan|inf): lower learning_rate") as fault:
        script(replace(copied, ensemble=1, learning_rate=1e38, weight_decay=0, batch_size=batch_size))
    assert fault.value.code == 1
    assert Path(copied.checkpoint).read_bytes() == before


@pytest.mark.parametrize(
    ("signum", "code", "n_networks"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)], ids=["INT", "TERM"]
)
def test_signal_saves_what_there_is_and_leaves_no_process(
    signum: signal.Signals, code: int, n_networks: int, tiny_cfg: Config, tmp_path: Path
) -> None:
    """The model so far, history and curves; --resume goes on from there."""
    cfg = replace(tiny_cfg, ensemble=n_networks, epochs=100_000, patience=100_000)
    with subprocess.Popen(
        script_command("train.py", *flags(cfg)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        assert process.stdout is not None
        trained = set()
        for line in process.stdout:
            if found := re.match(r"network (\d)  epoch +[2-9]/", line):
                trained.add(found[1])
            if len(trained) == n_networks:
                break
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.splitlines()[-2:] == [
        "stopped: the same command with --resume goes on after the last finished epoch",
        "interrupted",
    ]
    for _ in range(100):  # multiprocessing's own helper ends a moment later
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process is left")
    history = pd.read_csv(Path(cfg.run_dir, "history.csv"))
    assert len(best(cfg).members) == history.network.nunique() == n_networks
    assert Path(cfg.run_dir, "loss.png").exists()
    if signum == signal.SIGINT:
        n_epochs = len(history) + 1
        assert script(replace(cfg, epochs=n_epochs), resume=True) == 0
        again = pd.read_csv(Path(cfg.run_dir, "history.csv"))
        assert len(again) == n_epochs
        pd.testing.assert_frame_equal(again[:-1], history)
        assert Path(cfg.run_dir, "metrics.json").exists()


def test_training_goes_on_when_nobody_reads_its_output(tiny_cfg: Config, tmp_path: Path) -> None:
    """As in `python train.py | head -1`, without a traceback."""
    with subprocess.Popen(
        script_command("train.py", *flags(replace(tiny_cfg, epochs=8))),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 8
    assert (tmp_path / "run" / "metrics.json").exists()


def test_two_processes_train_one_network(tiny_cfg: Config, tmp_path: Path) -> None:
    """The first alone prints and writes: a line and a row per epoch."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    result = subprocess.run(
        [sys.executable, *command, *flags(tiny_cfg)],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^network 1  epoch", result.stdout, re.MULTILINE)) == 2
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2
    assert result.stdout.count("best.pth: 1 network trained on 24 clips of 3 classes") == 1
    assert load_checkpoint(tmp_path / "best.pth")[0].epochs[0] in {1, 2}


def remove_permission(path: Path) -> None:
    """A folder that nothing can be written to."""
    path.mkdir()
    path.chmod(0o555)


@pytest.mark.parametrize(
    "obstacle",
    [
        Path.touch,
        pytest.param(
            remove_permission,
            marks=pytest.mark.skipif(
                os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere"
            ),
        ),
    ],
    ids=["a file", "read-only"],
)
def test_run_folder_that_cannot_be_written_is_named(
    obstacle: Callable[[Path], object], tiny_cfg: Config, tmp_path: Path
) -> None:
    """In one line, before any work."""
    obstacle(tmp_path / "place")
    cfg = replace(tiny_cfg, run_dir=str(tmp_path / "place" / "run"))
    result = run_script("train.py", *flags(cfg), cwd=tmp_path)
    (tmp_path / "place").chmod(0o755)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert str(tmp_path / "place") in result.stderr
    assert len(result.stderr.splitlines()) == 1


# ---- split by speaker and folds --------------------------------------------------------------------------


def test_run_by_speaker_is_tested_on_speakers_never_heard(tiny_cfg: Config) -> None:
    assert script(replace(tiny_cfg, split="speaker", epochs=1)) == 0
    metrics = json.loads(Path(tiny_cfg.run_dir, "metrics.json").read_text())
    table = pd.read_csv(Path(tiny_cfg.run_dir, "predictions.csv"))
    assert table.speaker.nunique() == 1
    how = "split by speaker, 0 of the 2 speakers in val and test also in train"
    assert metrics["split"] == f"3 classes; 24 train, 12 val, 12 test clips, {how}"


def test_folds_score_every_clip_by_networks_that_never_saw_it(
    copied: Config, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fold is a run of its own; their predictions are pooled and scored together."""
    run_dir, model = Path(copied.run_dir), Path(copied.checkpoint).read_bytes()
    before = contents(run_dir)
    cfg = replace(copied, epochs=1, ensemble=1, checkpoint=Config().checkpoint)
    assert script(cfg, folds=3) == 0
    aside = contents(run_dir / json.loads(before["run.json"])["run"])
    assert all(aside[name] == before[name] for name in ("metrics.json", "predictions.csv", "network1.pth"))
    table = pd.read_csv(run_dir / "predictions.csv")
    everything = {str(path) for emotion in EMOTIONS for path in (corpus / emotion).iterdir()}
    assert len(table) == 48
    assert set(table.path) == everything
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["pooled"]["clips"] == 48
    assert metrics["pooled"]["accuracy"] == (table.emotion == table.predicted).mean()
    assert [fold["test"]["clips"] for fold in metrics["folds"]] == [16, 16, 16]
    for number in (1, 2, 3):
        own = pd.read_csv(run_dir / f"fold{number}" / "predictions.csv")
        assert len(own) == 16
        assert (
            sum(load_checkpoint(run_dir / f"fold{number}" / "best_emotion_model.pth")[0].n_clips.values())
            < 32
        )
    assert Path(copied.checkpoint).read_bytes() == model
    assert "all 48 clips, each by the networks that never saw it" in capsys.readouterr().out
    (run_dir / "metrics.json").unlink()
    shutil.rmtree(run_dir / "fold3")  # as if it had been stopped there
    assert script(cfg, folds=3, resume=True) == 0
    assert json.loads((run_dir / "metrics.json").read_text())["pooled"] == metrics["pooled"]


@pytest.mark.parametrize("folds", [1, -2])
def test_folds_that_are_none_are_refused(folds: int, tiny_cfg: Config) -> None:
    with pytest.raises(UserError, match=f"folds = {folds}: must be 0 or at least 2"):
        script(tiny_cfg, folds=folds)


# ---- scores ----------------------------------------------------------------------------------------------


def make_predictions(true: str, predicted: str, labels: str = "ABC") -> pd.DataFrame:
    """A letter per clip; the probability of the predicted class is 0.8."""
    sure = {
        f"p({label})": [0.8 if p == label else 0.2 / (len(labels) - 1) for p in predicted] for label in labels
    }
    table = pd.DataFrame({"emotion": list(true), "predicted": list(predicted), **sure})
    return table.assign(corpus="one", speaker="")


def test_scores_worked_out_by_hand() -> None:
    """Recalls 2/3, 1/2 and 1; precisions 2/3, 1/2 and 1; four of six right at a confidence of 0.8."""
    predictions = make_predictions("AAABBC", "AABBAC")
    predictions.loc[3:, "corpus"] = "two"
    scores = score(predictions, list("ABC"))
    assert scores["clips"] == 6
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["uar"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores["calibration_error"] == pytest.approx(0.8 - 4 / 6)
    assert scores["per_class"]["A"] == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1-score": 2 / 3, "support": 3}
    )
    assert set(scores["per_class"]) == set("ABC")
    assert scores["per_corpus"]["one"] == pytest.approx(
        {"accuracy": 2 / 3, "uar": 2 / 3, "macro_f1": 0.8, "clips": 3}
    )
    assert scores["per_corpus"]["two"] == pytest.approx(
        {"accuracy": 2 / 3, "uar": 3 / 4, "macro_f1": (2 / 3 + 1) / 2, "clips": 3}
    )


def test_classes_without_clips_do_not_lower_the_recall() -> None:
    scores = score(make_predictions("AABB", "AAAB"), list("ABC"))
    assert scores["uar"] == pytest.approx(0.75)
    assert scores["per_class"]["C"]["support"] == 0


@pytest.mark.parametrize(
    ("confidence", "right", "expected"),
    [
        ([0.9] * 10, [1] * 9 + [0], 0),
        ([0.9] * 10, [1] * 5 + [0] * 5, 0.4),
        ([1.0] * 4, [1, 1, 0, 0], 0.5),
        ([0.5, 0.5, 0.95, 0.95], [1, 1, 1, 0], 0.475),  # two gaps, of 0.5 and 0.45
        ([0.62, 0.64], [0, 1], 0.13),  # in one bin, where the errors cancel out in part
    ],
)
def test_calibration_error_of_known_cases(confidence: list[float], right: list[int], expected: float) -> None:
    assert calibration_error(np.array(confidence), np.array(right)) == pytest.approx(expected, abs=1e-9)


def by_speakers(n_right: list[int], n_clips: int = 10) -> pd.DataFrame:
    """So many clips of each speaker, half of class A and half of B, so many of each half right."""
    half = n_clips // 2
    tables = []
    for number, count in enumerate(n_right):
        right = "A" * count + "B" * (half - count) + "B" * count + "A" * (half - count)
        tables.append(make_predictions("A" * half + "B" * half, right, "AB").assign(speaker=f"s{number}"))
    return pd.concat(tables, ignore_index=True)


def test_intervals_resample_speakers_and_not_clips() -> None:
    """Half of 40 speakers all right, half all wrong: the deviation is that of 40 draws, not of 400."""
    intervals = bootstrap(by_speakers([5, 0] * 20))
    deviation = math.sqrt(0.25 / 40)
    for low, high in (intervals["accuracy"], intervals["uar"]):
        assert low == pytest.approx(0.5 - 1.96 * deviation, abs=0.03)
        assert high == pytest.approx(0.5 + 1.96 * deviation, abs=0.03)


def test_interval_of_equal_speakers_is_a_point() -> None:
    intervals = bootstrap(by_speakers([4] * 6))
    assert intervals["accuracy"] == intervals["uar"] == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize("case", ["four speakers", "one clip of nobody"])
def test_intervals_need_five_known_speakers(case: str) -> None:
    """Else the text says why, and what helps."""
    predictions = by_speakers([4] * (4 if case == "four speakers" else 6))
    if case == "one clip of nobody":
        predictions.loc[0, "speaker"] = ""
    scores = score(predictions, list("AB"))
    assert scores["intervals"] == {}
    assert "no intervals: they need five speakers or more, all known" in describe_scores(scores)
