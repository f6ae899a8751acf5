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
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from filelock import FileLock
from torch import Tensor, nn

import model
import train
from config import Config, UserError, make_parser, parse
from inference import Recognizer
from model import PRETRAINED, load_checkpoint, load_tensors
from prepare import MFCC, AudioError, ClipFeatures, FeatureCache
from tests.conftest import (
    EMOTIONS,
    PITCH,
    RATE,
    ROOT,
    Trained,
    flags,
    make_corpus,
    make_mfcc,
    run_script,
    run_unread,
    script_command,
    tiny_config,
    tone,
)
from train import bootstrap, class_weights, describe_scores, fit, make_average, score


def same(one: Any, other: Any) -> bool:
    """Whether two trees of plain types and tensors are equal to the last bit; times may differ."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def state(cfg: Config, member: int = 1) -> dict[str, Any]:
    """What a network's training goes on from."""
    return load_tensors(Path(cfg.run_dir, f"network{member}.pth"))


ACTIONS = {
    "adapt": False,
    "own_classes": False,
    "demo": False,
    "resume": False,
    "folds": 0,
    "init": None,
    "evaluate": None,
    "compare": None,
    "config": None,
}


def script(cfg: Config, **settings: Any) -> int:
    """The script's work, in this process."""
    return train.main(cfg, Namespace(**{**ACTIONS, **settings}))


# ---- small parts -----------------------------------------------------------------------------------------


def test_class_weights_are_inverse_to_frequency() -> None:
    """1 on the average over clips; a class without clips gets no infinite weight."""
    weights = class_weights(pd.Series(list("AAAAAABBC")), list("ABC"))
    assert weights.tolist() == pytest.approx([9 / (3 * 6), 9 / (3 * 2), 9 / 3])
    assert class_weights(pd.Series(list("AB")), list("ABC")).tolist() == pytest.approx([2 / 3, 2 / 3, 1])


def test_no_speaker_fills_an_epoch_where_any_recordings_are_to_be_labelled() -> None:
    """At most 100 clips of each, others in every epoch; all of those whose speaker is not known."""
    speakers = ["TESS OA"] * 300 + ["CREMA-D 1001"] * 60 + [""] * 150
    clips = pd.DataFrame({"path": map(str, range(510)), "speaker": speakers})
    assert train.draw_clips(clips, Config(), 0) is clips
    one, other = (train.draw_clips(clips, Config(recordings="any"), seed) for seed in (1, 2))
    expected = {"TESS OA": 100, "CREMA-D 1001": 60, "": 150}
    assert one.speaker.value_counts().to_dict() == other.speaker.value_counts().to_dict() == expected
    assert not one.path.duplicated().any()
    of_both = set(one.path[one.speaker == "TESS OA"]) & set(other.path[other.speaker == "TESS OA"])
    assert 10 < len(of_both) < 60  # 33 by chance


def test_average_forgets_the_random_start_and_follows_the_weights() -> None:
    """Batch statistics are averaged too."""
    decay = 0.5
    norm = nn.BatchNorm1d(2).requires_grad_(False)
    average = make_average(norm, decay)
    values = torch.tensor([3.0, -1.0, *range(40)])
    expected = values[0]
    for number, value in enumerate(values):
        norm.weight[:] = norm.running_mean[:] = value  # type: ignore[index]
        average.update_parameters(norm)
        share = min(decay, (1 + number) / (10 + number)) if number else 0
        expected = share * expected + (1 - share) * value
        assert average.module.weight.tolist() == pytest.approx([float(expected)] * 2)
        assert average.module.running_mean.tolist() == pytest.approx([float(expected)] * 2)
    assert float(expected) == pytest.approx(38, abs=0.01)


def test_fitted_temperature_is_the_one_that_the_labels_were_drawn_with() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(20_000, 3, generator=generator)
    targets = torch.multinomial((logits / 2).softmax(dim=1), 1, generator=generator).flatten()
    ones = torch.ones(20_000, 1)
    assert train.fit_temperature(logits.softmax(dim=1), targets, ones) == pytest.approx(2, rel=0.05)
    # Had these been means of eight networks, one of them alone would need more.
    eight = train.fit_temperature(logits.softmax(dim=1), targets, 8 * ones)
    assert eight * train.relative_temperature(8) == pytest.approx(2, rel=0.05)


def test_few_validation_clips_that_are_all_right_make_no_model_certain() -> None:
    probabilities = torch.tensor([[0.6, 0.2, 0.2]] * 7)
    temperature = train.fit_temperature(probabilities, torch.zeros(7, dtype=torch.long), torch.ones(7, 1))
    assert 0.3 < temperature < 1


def test_deviations_are_from_voices_of_a_random_number_of_clips() -> None:
    """None of an unknown speaker, none for a quarter of the clips; one clip tells little of a voice."""
    speakers = ["a"] * 400 + ["b"] + [""] * 50
    clips = pd.DataFrame({"speaker": speakers, "emotion": (["Angry", "Sad"] * 226)[: len(speakers)]})
    means = torch.from_numpy(np.random.default_rng(0).normal(size=(len(clips), 3, 1))).float() + 7
    deviations = train.draw_deviations(clips, means, 1)
    assert torch.equal(deviations, train.draw_deviations(clips, means, 1))
    assert not torch.equal(deviations, train.draw_deviations(clips, means, 2))
    assert deviations[400:].abs().max() == 0  # the only clip of b is its voice
    none = (deviations[:400].abs().amax(dim=(1, 2)) == 0).float().mean().item()
    assert none == pytest.approx(0.25, abs=0.1)
    some = deviations[:400][deviations[:400].abs().amax(dim=(1, 2)) > 0]
    # The voice is near 7, and counts n / (n + 4): deviations follow the means, and are smaller.
    own = (means[:400] - 7)[deviations[:400].abs().amax(dim=(1, 2)) > 0]
    slope = float((some * own).sum() / own.square().sum())
    assert 0.4 < slope < 0.9


def test_shifts_are_what_emotions_add_to_the_mean_of_a_speaker(tiny_cfg: Config) -> None:
    """Whatever the speaker, and however many clips of each emotion he has."""
    cfg, mfcc = tiny_cfg, make_mfcc(tiny_cfg)
    cache, rows = FeatureCache(cfg, mfcc), []
    for number, (speaker, emotion) in enumerate(
        [("a", "Angry"), ("a", "Sad"), ("a", "Sad"), ("b", "Angry"), ("b", "Sad")]
    ):
        value = {"a": 3.0, "b": -5.0}[speaker] + {"Angry": 1.0, "Sad": -1.0}[emotion]
        features = np.full((1, cfg.n_features, cfg.n_frames), value, np.float32)
        cache.add((b"%d" % number, 0, 0), ClipFeatures(features, 1.0, str(number), ""))
        rows.append((speaker, emotion, "train"))
    cache.database.commit()
    clips = pd.DataFrame(rows, columns=["speaker", "emotion", "part"]).assign(
        first_window=[row[0] for row in cache.lookup().values()], n_windows=1
    )
    shifts = train.fit_shifts(cfg, clips, mfcc, ["Angry", "Happy", "Sad"])
    np.testing.assert_allclose(shifts[:, :, 0].mean(dim=1), [1, 0, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("minutes", "n_networks", "epochs"), [(100, 8, 40), (11, 8, 28), (6, 4, 31), (3, 2, 31), (1, 2, 10)]
)
def test_plan_fits_the_time_there_is(
    minutes: float,
    n_networks: int,
    epochs: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two workers, epochs of 5.7 s: fewer networks first, as long as each has 24 epochs."""
    monkeypatch.setattr(train, "time_steps", lambda *_: {"float32": 0.04})
    monkeypatch.setattr(train, "own_devices", lambda _: ["cpu", "cpu"])
    cfg = Config(max_minutes=minutes)
    parts = {train.Job(0, member): ["train"] * 6400 for member in range(1, 9)}
    clips = pd.DataFrame({"emotion": ["Angry", "Sad"] * 3200})
    inputs = train.Inputs(clips, parts, None, None, None, time.time() + 60 * minutes)  # type: ignore[arg-type]
    plan = train.make_plan(cfg, inputs)
    assert plan == ("float32", n_networks)
    assert n_networks / 2 * epochs * 5.7 <= 60 * minutes
    assert f"{n_networks} of 8 networks, about {epochs} epochs each" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"3 s are left for training, and an epoch takes 5\.7"):
        train.make_plan(replace(cfg, max_minutes=0.05), inputs._replace(deadline=time.time() + 3))


# ---- one network -----------------------------------------------------------------------------------------


def test_learning_rate_falls_as_the_end_of_the_time_comes_near(tmp_path: Path) -> None:
    """In the last quarter; and no epoch begins after it."""
    toy = make_toy(tmp_path, epochs=10_000, patience=10_000, lr_patience=10_000)
    started = time.time()
    fit(*toy, deadline=started + 4)
    assert 4 < time.time() - started < 6
    table = pd.DataFrame(state(toy[0])["history"])
    share = (table.index + 1) / len(table)  # of the time, about
    assert (table.learning_rate[share < 0.6] >= toy[0].learning_rate * 0.99).iloc[3:].all()
    assert table.learning_rate.iloc[-1] <= toy[0].learning_rate / 99


Toy = tuple[Config, pd.DataFrame, MFCC]


def make_toy(folder: Path, *, signal: float = 0.0, n_train: int = 48, n_val: int = 40, **changes: Any) -> Toy:
    """Random features of two classes that are so far apart."""
    cfg = tiny_config(folder, **{"epochs": 12, "dropout": 0.2, "learning_rate": 1e-2, **changes})
    mfcc, generator = make_mfcc(cfg), np.random.default_rng(0)
    cache, n_clips = FeatureCache(cfg, mfcc), n_train + n_val
    for number in range(n_clips):
        noise = generator.normal(size=(1, cfg.n_mfcc, cfg.n_frames)) + signal * (number % 2)
        features = mfcc.add_deltas(torch.from_numpy(noise).float()).numpy()
        cache.add((b"%d" % number, 0, 0), ClipFeatures(features, 1.0, str(number), ""))
    cache.database.commit()
    clips = pd.DataFrame({"emotion": ["Angry", "Sad"] * (n_clips // 2 + 1)}).head(n_clips)
    parts = ["train"] * n_train + ["val"] * n_val
    ids = [row[0] for row in cache.lookup().values()]
    return cfg, clips.assign(first_window=ids, n_windows=1, part=parts, speaker=""), mfcc


def fit_toy(toy: Toy) -> dict[str, Any]:
    """Train; returns the state that is left."""
    fit(*toy)
    return state(toy[0])


# Accuracies go up and down, so that neither the best nor the last epoch is always the one to keep.
WAVERING = {"signal": 0.15, "n_val": 100, "patience": 100, "ema_decay": 0, "learning_rate": 0.1}
WAVERING |= {"tempo": 0, "shift": 0}


def test_kept_is_the_latest_epoch_within_one_standard_error_of_the_best(tmp_path: Path) -> None:
    others = []
    for seed in range(12):
        toy, rows = make_toy(tmp_path / str(seed), seed=seed, **WAVERING), list[train.Row]()
        fit(*toy, on_epoch=rows.append)
        end = state(toy[0])
        accuracy = [row["val_accuracy"] for row in end["history"]]
        error = math.sqrt(max(accuracy) * (1 - max(accuracy)) / 100)
        within = [number for number, value in enumerate(accuracy, 1) if value >= max(accuracy) - error]
        assert len(accuracy) == 12
        assert end["kept"]["epoch"] == within[-1] == max(row["epoch"] for row in rows if row["kept"])
        assert all(row["kept"] for row in rows) == (min(accuracy) >= max(accuracy) - error)
        if within[-1] not in {len(accuracy), accuracy.index(max(accuracy)) + 1}:
            others.append((seed, end["kept"]))
    seed, kept = others[0]  # or this would not tell the rule from simpler ones
    again = fit_toy(make_toy(tmp_path / "again", seed=seed, **WAVERING, epochs=kept["epoch"]))["average"]
    assert all(torch.equal(again[f"module.{name}"], value) for name, value in kept["weights"].items())


def test_learning_rate_rises_and_falls_and_training_stops_when_validation_stalls(tmp_path: Path) -> None:
    """Both rules, worked out again from the accuracies alone; a fall gives training new patience."""
    toy = make_toy(tmp_path, epochs=60, patience=4, lr_patience=1, lr_factor=0.3, warmup=2)
    history = fit_toy(toy)["history"]
    full = toy[0].learning_rate
    start = 1 / 12  # the warm-up is linear over two epochs of six steps
    assert [row["learning_rate"] for row in history[:2]] == pytest.approx(
        [full * start, full * (1 + start) / 2]
    )
    rate, highest, stalled, bad = full, 0.0, 0, 0
    for row in history:
        assert bad < 4
        fell = False
        # Validation in the warm-up counts for early stopping, not for the learning rate.
        if row["epoch"] > 2:
            assert row["learning_rate"] == pytest.approx(rate)
            after_warmup = [r["val_accuracy"] for r in history[2 : row["epoch"] - 1]]
            stalled = 0 if row["val_accuracy"] > max(after_warmup, default=-1) else stalled + 1
            if stalled > 1:
                stalled, fell = 0, rate > full / 100 * 1.001
                rate = max(0.3 * rate, full / 100)
        bad = 0 if row["val_accuracy"] > highest or fell else bad + 1
        highest = max(highest, row["val_accuracy"])
    assert bad == 4
    assert len(history) < 60
    assert rate == pytest.approx(full / 100)  # it has fallen as far as it may before training stops


def test_nothing_is_learnt_from_validation_clips(tmp_path: Path) -> None:
    """Not even the mean of the features, whatever the clips that training does not see."""
    quiet = {"patience": 100, "lr_patience": 100, "epochs": 5}
    mine, theirs = (make_toy(tmp_path / name, **quiet) for name in "ab")
    ids = theirs[1]["first_window"].to_numpy().copy()
    ids[48:] = ids[:40]  # they validate on other features
    one, other = fit_toy(mine), fit_toy((theirs[0], theirs[1].assign(first_window=ids), theirs[2]))
    assert same(one["average"], other["average"])
    assert [r["val_loss"] for r in one["history"]] != [r["val_loss"] for r in other["history"]]
    features = FeatureCache(mine[0], mine[2]).read(ids[:48]).astype(np.float64)
    mean, std = (one["kept"]["weights"][name].numpy() for name in ("mean", "std"))
    np.testing.assert_allclose(mean[:, 0], features.mean(axis=(0, 2)), atol=1e-5)
    assert float(std) == pytest.approx(math.sqrt(features.var(axis=(0, 2)).mean()), rel=1e-4)


@pytest.mark.parametrize(("n_train", "batch_size"), [(9, 8), (2, 2), (3, 64)])
def test_batches_of_one_or_larger_than_the_data_are_no_problem(
    n_train: int, batch_size: int, tmp_path: Path
) -> None:
    """Batch norm cannot learn from a single clip."""
    end = fit_toy(make_toy(tmp_path, n_train=n_train, batch_size=batch_size, epochs=2))
    assert [row["epoch"] for row in end["history"]] == [1, 2]


# ---- a run -----------------------------------------------------------------------------------------------


def test_run_leaves_its_files(trained: Trained) -> None:
    """And nothing beside them, in the folder that it was started from included."""
    run_dir = trained.folder / "run"
    assert {path.name for path in trained.folder.iterdir()} == {"run", "cache", "best.pth", ".run.lock"}
    assert {path.name for path in run_dir.iterdir() if not path.name.startswith(".")} == {
        *("run.json", "history.csv", "metrics.json", "predictions.csv"),
        *(f"{name}.{kind}" for name in ("loss", "confusion_matrix", "scores") for kind in ("png", "pdf")),
        *("mistakes.html", "network1.pth", "network2.pth"),
        "best_emotion_model.pth",
    }
    assert (run_dir / "best_emotion_model.pth").read_bytes() == (trained.folder / "best.pth").read_bytes()
    for name in ("loss.png", "confusion_matrix.png", "scores.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")
    assert "\r" not in trained.result.stdout + trained.result.stderr  # no bars where there is no terminal
    history = pd.read_csv(run_dir / "history.csv")
    columns = "network epoch learning_rate train_loss train_accuracy val_loss val_accuracy seconds"
    assert list(history.columns) == columns.split()
    assert history[["network", "epoch"]].to_numpy().tolist() == [[n, e] for n in (1, 2) for e in range(1, 7)]
    printed = re.findall(r"^network (\d)  epoch +(\d)/6 ", trained.result.stdout, re.MULTILINE)
    assert sorted(printed) == [(str(n), str(e)) for n in (1, 2) for e in range(1, 7)]
    kept = re.findall(r"^network (\d)  epoch +(\d)/6 .* s, kept$", trained.result.stdout, re.MULTILINE)
    epochs = load_checkpoint(Path(trained.cfg.checkpoint))[0].epochs
    assert [dict(kept)[str(n)] for n in (1, 2)] == [str(epoch) for epoch in epochs]  # the last ones marked


def test_metrics_are_those_of_the_predictions(trained: Trained) -> None:
    """Every test clip is in predictions.csv, and scoring them again gives what metrics.json says."""
    metrics = json.loads((trained.folder / "run" / "metrics.json").read_text())
    table = pd.read_csv(trained.folder / "run" / "predictions.csv")
    probabilities = table[[f"p({emotion})" for emotion in EMOTIONS]]
    assert len(table) == table.path.nunique() == metrics["test"]["clips"] == 12
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.idxmax(axis=1) == "p(" + table.predicted + ")").all()
    assert [Path(path).parent.name for path in table.path] == table.emotion.tolist()
    assert metrics["test"]["accuracy"] == (table.emotion == table.predicted).mean() > 0.5
    assert metrics["config"] | {"submission": ""} == vars(trained.cfg) | {"submission": ""}
    assert metrics["split"].startswith(
        "3 classes (Angry, Sad, Suprised); 24 train, 12 val, 12 test clips, split at random"
    )
    assert f"{metrics['test']['accuracy']:.1%}" in trained.result.stdout


def test_checkpoint_predicts_what_training_reported(trained: Trained) -> None:
    """From the files, without the cache: training and inference see the same features."""
    checkpoint, _ = load_checkpoint(Path(trained.cfg.checkpoint))
    assert [float(member["cmn"].sum()) for member in checkpoint.members] == [0, trained.cfg.n_mfcc - 1]
    assert tuple(checkpoint.labels) == EMOTIONS
    assert len(checkpoint.members) == len(checkpoint.epochs) == 2
    table = pd.read_csv(trained.folder / "run" / "predictions.csv")
    results = Recognizer(trained.cfg.checkpoint, device="cpu").predict_files(table.path.tolist())
    for (_, result), row in zip(results, table.itertuples(), strict=True):
        assert not isinstance(result, AudioError)
        np.testing.assert_allclose(list(result.probabilities.values()), row[-3:], atol=1e-5)


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Config:
    """The finished run once more, to do with as one likes; its cache is shared."""
    shutil.copytree(trained.folder / "run", tmp_path / "run")
    shutil.copy(trained.folder / "best.pth", tmp_path)
    return replace(trained.cfg, run_dir=str(tmp_path / "run"), checkpoint=str(tmp_path / "best.pth"))


def contents(folder: str) -> dict[str, bytes]:
    """The files in a folder, hidden ones left out."""
    files = [path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"learning_rate": 2e-2}, ["learning_rate: 0.01 -> 0.02"]),
        ({"batch_size": 4, "gru_hidden": 4}, ["batch_size: 8 -> 4", "gru_hidden: 8 -> 4"]),
        ({"split": "speaker"}, ["split: 'random' -> 'speaker'", "the clips or their split"]),
        ({"data_dir": "other"}, ["the clips or their split"]),
    ],
)
def test_resume_of_another_run_is_refused_with_the_differences(
    changes: dict[str, Any], reasons: list[str], copied: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(copied.run_dir).parent)
    make_corpus(Path("other"), n_takes=5)
    before = contents(copied.run_dir)
    with pytest.raises(UserError) as refusal:
        script(replace(copied, **changes), resume=True)
    assert refusal.value.code == 2
    assert all(reason in str(refusal.value) for reason in reasons)
    assert contents(copied.run_dir) == before


def test_resume_of_nothing_is_refused(tiny_cfg: Config) -> None:
    """Never a fresh start."""
    with pytest.raises(UserError, match=r"no run in .* to resume") as refusal:
        script(tiny_cfg, resume=True)
    assert refusal.value.code == 2
    assert not Path(tiny_cfg.checkpoint).exists()


def test_settings_of_a_run_repeat_it_and_resume_it(copied: Config, tmp_path: Path) -> None:
    """With flags laid over them; a run is resumed where it lies now."""
    parser = make_parser(None, Config.__dataclass_fields__.keys())
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--config")
    source = str(Path(copied.run_dir, "run.json"))
    again, _ = parse(parser, ["--config", source, "--epochs=9", "--seed=3"])
    begun = json.loads(Path(source).read_text())
    places = {"run_dir": "run", "checkpoint": "best_emotion_model.pth", "epochs": 9, "seed": 3}
    assert again == Config(**{name: begun[name] for name in vars(copied)} | places)
    moved = shutil.move(copied.run_dir, tmp_path / "moved")
    resumed, _ = parse(parser, ["--resume", f"--run_dir={moved}"])
    own = {"run_dir": str(moved), "checkpoint": str(moved / "best_emotion_model.pth")}
    assert resumed == replace(copied, **own, submission=Config.submission)
    assert script(resumed, resume=True) == 0
    with pytest.raises(SystemExit):  # a wrong name must not mean the defaults
        parse(parser, ["--config", "nowhere.json"])
    Path(source).parent.mkdir()
    Path(source).write_text("{")
    with pytest.raises(SystemExit):
        parse(parser, ["--config", source])


def test_earlier_run_is_renamed_after_its_date(copied: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """In one step, with all that is in it, and the message says so."""
    run_dir = Path(copied.run_dir)
    (run_dir / "network_notes.txt").write_text("mine")
    before = contents(copied.run_dir)
    date = json.loads(before["run.json"])["run"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}-\d{6}", date)
    assert script(replace(copied, ensemble=1, epochs=1)) == 0
    assert contents(f"{run_dir}_{date}") == before
    assert not (run_dir / "network2.pth").exists()
    assert len(pd.read_csv(run_dir / "history.csv")) == 1
    assert len(load_checkpoint(Path(copied.checkpoint))[0].members) == 1
    assert f"run is of an earlier run: it is run_{date} now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "actions", "reason"),
    [
        ({"device": "cuda:7"}, {}, "device = 'cuda:7': not on this machine"),
        ({"val_fraction": 0.01, "test_fraction": 0.89}, {}, "for validation"),
        ({}, {"folds": 100}, "folds = 100: each tests clips of its own, and there are only 48"),
        ({}, {"init": "none.pth"}, "no checkpoint none.pth"),
        ({"run_dir": "."}, {}, "run_dir = '.': holds '.'"),
        ({"run_dir": "best.pth"}, {}, "run_dir = 'best.pth': best.pth is no folder"),
        ({"run_dir": "best.pth/run"}, {"evaluate": ["."]}, "run_dir = 'best.pth/run/evaluate_"),
        ({"data_dir": "run", "run_dir": "run/new"}, {}, "run_dir = 'run/new': lies in 'run'"),
        ({}, {"own_classes": True}, "--own_classes is for --evaluate"),
    ],
)
def test_run_that_cannot_begin_touches_nothing(
    changes: dict[str, Any],
    actions: dict[str, Any],
    reason: str,
    copied: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a finished run, nor the folder beside it."""
    folder = Path(copied.run_dir).parent
    monkeypatch.chdir(folder)
    before = contents(copied.run_dir)
    with pytest.raises(UserError, match=re.escape(reason)) as refusal:
        script(replace(copied, **changes), **actions)
    assert refusal.value.code == 2
    assert contents(copied.run_dir) == before
    assert {path.name for path in folder.iterdir()} == {"run", "best.pth"}


def test_files_of_no_run_are_not_written_over(copied: Config) -> None:
    Path(copied.run_dir, "run.json").unlink()
    before = contents(copied.run_dir)
    with pytest.raises(UserError, match=r"has a metrics\.json of no run: name another folder"):
        script(copied)
    assert contents(copied.run_dir) == before


def test_second_run_in_one_folder_is_refused(copied: Config) -> None:
    before = contents(copied.run_dir)
    message = f"another run is writing to {copied.run_dir}"
    with (
        FileLock(f"{Path(copied.run_dir).parent}/.run.lock"),
        pytest.raises(UserError, match=message) as refusal,
    ):
        script(copied)
    assert refusal.value.code == 2
    assert contents(copied.run_dir) == before


def test_run_that_diverges_at_once_keeps_the_earlier_model(copied: Config) -> None:
    """NaN is never the best; exit code 1."""
    before = Path(copied.checkpoint).read_bytes()
    with pytest.raises(UserError, match=r"loss is (nan|inf): lower learning_rate") as fault:
        script(replace(copied, ensemble=1, learning_rate=1e38, weight_decay=0))
    assert fault.value.code == 1
    assert Path(copied.checkpoint).read_bytes() == before


def test_run_that_diverges_later_keeps_what_was_good(tiny_cfg: Config) -> None:
    """The weights grow a hundredfold at each step, until they overflow after a few epochs."""
    growing = {"learning_rate": 1e-3, "weight_decay": 1e5, "epochs": 100, "patience": 100}
    with pytest.raises(UserError, match=r"loss is (nan|inf): lower learning_rate"):
        script(replace(tiny_cfg, **growing))
    history = pd.read_csv(Path(tiny_cfg.run_dir, "history.csv"))
    assert 0 < len(history) < 100
    assert np.isfinite(history.train_loss).all()
    assert load_checkpoint(Path(tiny_cfg.checkpoint))[0].epochs[0] <= len(
        history
    )  # refuses what is not finite


def test_unfinished_run_leaves_the_model_of_a_finished_one(copied: Config) -> None:
    """It keeps what it has in its own folder."""
    before = Path(copied.checkpoint).read_bytes()
    growing = {"learning_rate": 1e-3, "weight_decay": 1e5, "epochs": 100, "patience": 100}
    growing |= {"ensemble": 1, "min_steps": 1}
    with pytest.raises(UserError, match="lower learning_rate"):
        script(replace(copied, **growing))
    assert Path(copied.checkpoint).read_bytes() == before
    assert load_checkpoint(Path(copied.run_dir, Config.checkpoint))[0].config.weight_decay == 1e5


def interrupt(cfg: Config, signum: signal.Signals) -> int:
    """Start a run and end it by a signal after the first epoch, as Ctrl-C or `kill` do; its exit code."""
    with subprocess.Popen(
        script_command("train.py", *flags(cfg)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("network ") for line in process.stdout)
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)  # a terminal sends it to all processes
        else:
            process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert errors.splitlines() == [
        f"the networks so far are kept in {Path(cfg.run_dir, Config.checkpoint)}",
        "stopped: the same command with --resume goes on after the last finished epoch",
        "interrupted",
    ]
    for _ in range(100):  # multiprocessing's own helper ends a moment later
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode
        time.sleep(0.05)
    pytest.fail("a process is left")


def test_interrupted_run_ends_after_resuming_with_the_bits_of_an_undisturbed_one(
    trained: Trained, tmp_path: Path
) -> None:
    """Over dropout, augmentation and falls of the learning rate, each network in a process of its own."""
    places = {"run_dir": str(tmp_path / "run"), "checkpoint": str(tmp_path / "best.pth")}
    cfg = replace(trained.cfg, **places)
    assert interrupt(cfg, signal.SIGINT) == 130
    assert load_checkpoint(Path(cfg.checkpoint))[0].members
    assert 0 < len(pd.read_csv(tmp_path / "run" / "history.csv")) < 12
    assert not (tmp_path / "run" / "inputs.pickle").exists()
    assert script(cfg, resume=True) == 0
    for member in (1, 2):
        end = state(cfg, member)
        assert same(end, state(trained.cfg, member))
        rates = [row["learning_rate"] for row in end["history"]]
        assert rates[0] > rates[-1]
    theirs = (trained.folder / "run" / "predictions.csv").read_text()
    assert (tmp_path / "run" / "predictions.csv").read_text() == theirs


def test_sigterm_ends_a_run_as_ctrl_c_does(tiny_cfg: Config) -> None:
    """It can go on longer than was asked for at first."""
    cfg = replace(tiny_cfg, epochs=100_000, patience=100_000)
    assert interrupt(cfg, signal.SIGTERM) == 143
    history = pd.read_csv(Path(cfg.run_dir, "history.csv"))
    assert Path(cfg.run_dir, "loss.png").exists()
    assert script(replace(cfg, epochs=len(history) + 1), resume=True) == 0
    again = pd.read_csv(Path(cfg.run_dir, "history.csv"))
    pd.testing.assert_frame_equal(again[:-1], history)


def test_training_goes_on_when_nobody_reads_its_output(tiny_cfg: Config, tmp_path: Path) -> None:
    """As in `python train.py | head -1`, without a traceback."""
    answer = run_unread("train.py", *flags(replace(tiny_cfg, epochs=8)), cwd=tmp_path)
    assert answer == (0, "")
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 8
    assert (tmp_path / "run" / "metrics.json").exists()


def test_two_processes_of_torchrun_share_the_networks(trained: Trained, tmp_path: Path) -> None:
    """They become what one process makes of them; the first alone prints and reports."""
    cfg = replace(trained.cfg, run_dir=str(tmp_path / "run"), checkpoint=str(tmp_path / "best.pth"))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    result = subprocess.run(
        [sys.executable, *command, *flags(cfg)],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^network 1  epoch", result.stdout, re.MULTILINE)) == 6
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 12
    assert result.stdout.count("best.pth: 2 networks trained on") == 1
    assert all(same(state(cfg, member), state(trained.cfg, member)) for member in (1, 2))


def test_bug_in_a_training_process_comes_with_its_traceback(trained: Trained, tmp_path: Path) -> None:
    """So that whoever edits model.py sees where; nothing is left running."""
    for name in ("config", "prepare", "model", "train"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    text = (tmp_path / "model.py").read_text()
    (tmp_path / "model.py").write_text(text.replace("x = self.conv(x)", "x = self.conv(x[:, :3])"))
    cfg = replace(trained.cfg, run_dir=str(tmp_path / "run"), checkpoint=str(tmp_path / "best.pth"))
    result = run_script(str(tmp_path / "train.py"), *flags(cfg), cwd=tmp_path)
    assert result.returncode == 1
    assert "x = self.conv(x[:, :3])" in result.stderr


def test_run_folder_that_cannot_be_made_is_named_before_any_work(tiny_cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "place").touch()
    cfg = replace(tiny_cfg, run_dir=str(tmp_path / "place" / "run"))
    result = run_script("train.py", *flags(cfg), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: run_dir = '{cfg.run_dir}': {tmp_path}/place is no folder: pass another --run_dir\n"
    )


# ---- split by speaker and folds --------------------------------------------------------------------------


def test_run_by_speaker_is_tested_on_speakers_never_heard(tiny_cfg: Config) -> None:
    assert script(replace(tiny_cfg, split="speaker", epochs=1)) == 0
    metrics = json.loads(Path(tiny_cfg.run_dir, "metrics.json").read_text())
    assert pd.read_csv(Path(tiny_cfg.run_dir, "predictions.csv")).speaker.nunique() == 1
    how = "split by speaker, 0 of the 2 speakers in val and test also in train"
    assert metrics["split"] == (f"3 classes (Angry, Sad, Suprised); 24 train, 12 val, 12 test clips, {how}")


def test_two_speakers_are_enough_to_test_on_one_of_them(tiny_cfg: Config, tmp_path: Path) -> None:
    """The networks validate on other clips of the one that they train on, and the report says so."""
    make_corpus(tmp_path / "data", n_speakers=2, n_takes=6)
    cfg = replace(tiny_cfg, data_dir=str(tmp_path / "data"), split="speaker", epochs=1)
    assert script(cfg) == 0
    metrics = json.loads(Path(cfg.run_dir, "metrics.json").read_text())
    assert "12 train, 6 val, 18 test clips, split by speaker, val other clips of the few" in metrics["split"]
    assert metrics["split"].endswith("1 of the 2 speakers in val and test also in train")


def test_folds_score_every_clip_by_networks_that_never_saw_it(
    copied: Config, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fold is a run of its own; their predictions are pooled and scored together."""
    run_dir, before_model = Path(copied.run_dir), Path(copied.checkpoint).read_bytes()
    before = contents(copied.run_dir)
    cfg = replace(copied, epochs=1, ensemble=1, checkpoint=Config().checkpoint)
    assert script(cfg, folds=3) == 0
    assert contents(f"{run_dir}_{json.loads(before['run.json'])['run']}") == before
    table = pd.read_csv(run_dir / "predictions.csv")
    everything = [str(path) for emotion in EMOTIONS for path in (corpus / emotion).iterdir()]
    assert sorted(table.path) == sorted(everything)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert [fold["fold"] for fold in metrics["folds"]] == [f"fold {n} of 3" for n in (1, 2, 3)]
    assert metrics["pooled"]["accuracy"] == (table.emotion == table.predicted).mean()
    for fold in (1, 2, 3):
        checkpoint, _ = load_checkpoint(run_dir / f"fold{fold}" / "best_emotion_model.pth")
        tested = pd.read_csv(run_dir / f"fold{fold}" / "predictions.csv")
        assert len(tested) == 16
        assert sum(checkpoint.n_clips.values()) + len(tested) <= 48
    assert Path(copied.checkpoint).read_bytes() == before_model
    assert "all 48 clips, each by the networks that never saw it" in capsys.readouterr().out
    (run_dir / "metrics.json").unlink()
    shutil.rmtree(run_dir / "fold3")  # as if it had been stopped there
    assert script(cfg, folds=3, resume=True) == 0
    assert json.loads((run_dir / "metrics.json").read_text())["pooled"] == metrics["pooled"]


def test_folds_of_few_speakers_are_named_after_them(
    tiny_cfg: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """In what is printed and in metrics.json."""
    assert script(replace(tiny_cfg, split="speaker", epochs=1), folds=4) == 0
    out, names = capsys.readouterr().out, set()
    for number in (1, 2, 3, 4):
        [speaker] = set(pd.read_csv(Path(tiny_cfg.run_dir, f"fold{number}", "predictions.csv")).speaker)
        names.add(name := f"fold {number} of 4 ({speaker})")
        assert f"\n{name}\n" in out
        assert re.search(rf"^{re.escape(name)} +\d+\.\d% ", out, re.MULTILINE)
    folds = json.loads(Path(tiny_cfg.run_dir, "metrics.json").read_text())["folds"]
    assert {fold["fold"] for fold in folds} == names


# ---- scores ----------------------------------------------------------------------------------------------


def make_predictions(true: str, predicted: str, labels: str = "ABC") -> pd.DataFrame:
    """A letter per clip; the probability of the predicted class is 0.8."""
    rest = 0.2 / (len(labels) - 1)
    sure = {f"p({label})": [0.8 if p == label else rest for p in predicted] for label in labels}
    table = pd.DataFrame({"emotion": list(true), "predicted": list(predicted), **sure})
    return table.assign(corpus="one", speaker="")


def test_scores_worked_out_by_hand() -> None:
    """Recalls 2/3, 1/2 and 1; precisions 2/3, 1/2 and 1; four of six right at a confidence of 0.8."""
    predictions = make_predictions("AAABBC", "AABBAC", labels="ABCD")  # D has no clips and does not count
    predictions.loc[3:, "corpus"] = "two"
    scores = score(predictions)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["uar"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores["calibration_error"] == pytest.approx(0.8 - 4 / 6)
    row = {"precision": 2 / 3, "recall": 2 / 3, "f1-score": 2 / 3, "support": 3}
    assert scores["per_class"]["A"] == pytest.approx(row)
    assert set(scores["per_class"]) == set("ABC")
    row = {"accuracy": 2 / 3, "uar": 3 / 4, "macro_f1": (2 / 3 + 1) / 2, "clips": 3}
    row["calibration_error"] = 0.8 - 2 / 3
    assert scores["per_corpus"]["two"] == pytest.approx(row)


def by_speakers(n_right: list[int]) -> pd.DataFrame:
    """Five clips of class A and five of B of each speaker, so many of each right."""
    tables = []
    for number, count in enumerate(n_right):
        predicted = "A" * count + "B" * (5 - count) + "B" * count + "A" * (5 - count)
        tables.append(make_predictions("AAAAABBBBB", predicted, "AB").assign(speaker=f"s{number}"))
    return pd.concat(tables, ignore_index=True)


def test_speakers_have_a_table_of_which_the_worst_and_best_are_shown() -> None:
    """Of up to twelve all; the unknown have no row."""
    scores = score(by_speakers([5, 0, 3]))
    row = {"accuracy": 3 / 5, "uar": 3 / 5, "clips": 10}
    assert {name: scores["per_speaker"]["s2"][name] for name in row} == pytest.approx(row)
    rows = re.findall(r"^(s\d+) +(\d+\.\d)% +\2% +10$", describe_scores(scores), re.MULTILINE)
    assert rows == [("s1", "0.0"), ("s2", "60.0"), ("s0", "100.0")]
    many = by_speakers([3, 3, 3, 5, 0, 1, 4, 3, 3, 2, 3, 3, 5])
    text = describe_scores(score(many))
    assert "worst, best of 13" in text
    assert re.findall(r"^s(\d+) ", text, re.MULTILINE) == ["4", "5", "9", "0", "8", "6", "12", "3"]
    assert score(many.assign(speaker=many.speaker.replace("s0", "")))["per_speaker"].keys() == {
        f"s{number}" for number in range(1, 13)
    }


def test_intervals_resample_speakers_and_not_clips() -> None:
    """Half of 40 speakers all right, half all wrong: the deviation is that of 40 draws, not of 400."""
    intervals = bootstrap(by_speakers([5, 0] * 20))
    deviation = math.sqrt(0.25 / 40)
    for interval in (intervals["accuracy"], intervals["uar"]):
        assert interval == pytest.approx([0.5 - 1.96 * deviation, 0.5 + 1.96 * deviation], abs=0.03)
    intervals = bootstrap(by_speakers([4] * 6))  # equal speakers: a point
    assert intervals["accuracy"] == intervals["uar"] == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize("n_speakers", [4, 6])
def test_intervals_need_five_known_speakers(n_speakers: int) -> None:
    """Four are too few, and six where one clip is of nobody known; the text says why, and what helps."""
    predictions = by_speakers([4] * n_speakers)
    if n_speakers == 6:
        predictions.loc[0, "speaker"] = ""
    scores = score(predictions)
    assert scores["intervals"] == {}
    assert "no intervals: they need five speakers or more, all known" in describe_scores(scores)


# ---- other models, other clips ---------------------------------------------------------------------------


def test_evaluate_scores_a_model_on_any_labelled_folder(
    copied: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips of classes that it does not know are left out, and the run it is of stays as it was."""
    folder, before = (
        make_corpus(tmp_path / "mine", emotions=("Angry", "Sad"), n_takes=1),
        contents(copied.run_dir),
    )
    (folder / "Suprised").mkdir()
    shutil.copytree(folder / "Sad", folder / "Bored")
    assert script(copied, evaluate=[str(folder)]) == 0
    out, err = capsys.readouterr()
    assert f"4 clips left out: classes of {folder}: Angry, Bored, Sad; classes of" in err
    assert (
        "not a score: 1 of 8 clips were seen in training" in out
    )  # the first, which equals one of the corpus
    assert contents(copied.run_dir) == before
    report = Path(copied.run_dir, "evaluate_mine")
    assert {path.name for path in report.iterdir()} >= {"confusion_matrix.png", "scores.png", "mistakes.html"}
    metrics = json.loads((report / "metrics.json").read_text())
    assert (metrics["test"]["clips"], metrics["test"]["seen"]) == (8, 1)
    assert metrics["test"]["accuracy"] > 0.7
    assert metrics["split"] == f"8 clips of {folder}, 4 of other classes left out"
    assert metrics["config"]["n_mfcc"] == copied.n_mfcc
    # The same without a model of one's own: the bundled one.
    monkeypatch.setitem(PRETRAINED, "any", Path(copied.checkpoint))
    places = {"run_dir": str(tmp_path / "new"), "checkpoint": "none.pth", "cache_dir": copied.cache_dir}
    assert script(Config(num_workers=0, device="cpu", **places), evaluate=[str(folder)]) == 0
    assert (tmp_path / "new" / "evaluate_mine" / "predictions.csv").read_text() == (
        report / "predictions.csv"
    ).read_text()
    # A second report of that name sets the first aside.
    assert script(copied, evaluate=[str(folder)]) == 0
    assert "evaluate_mine is of an earlier run: it is evaluate_mine_" in capsys.readouterr().err
    assert len(list(Path(copied.run_dir).glob("evaluate_mine_*/metrics.json"))) == 1
    # One class is enough, and what the model did not see is a score.
    shutil.rmtree(folder)
    (folder / "Sad").mkdir(parents=True)
    noise = 0.01 * np.random.default_rng(9).normal(size=RATE // 2)
    soundfile.write(folder / "Sad" / "new.wav", tone(PITCH["Sad"]) + noise, RATE)
    capsys.readouterr()
    assert script(copied, evaluate=[str(folder)]) == 0
    assert "not a score" not in capsys.readouterr().out


def test_folders_are_evaluated_together_and_end_in_a_table(
    copied: Config, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row per folder, of the scores in its own report."""
    two = make_corpus(tmp_path / "two", emotions=("Angry", "Sad"), n_takes=2)
    assert script(copied, evaluate=[str(corpus), str(two)], adapt=True) == 0
    out = capsys.readouterr().out
    assert out.count("\ntest clips, the model adapted to each speaker") == 2
    header, *rows = out.splitlines()[-3:]
    names = ["accuracy", "UAR", "ECE"]
    assert header.split() == ["clips", *names, *(word for name in names for word in ("adapted", name))]
    for folder, row in zip((corpus, two), rows, strict=True):
        metrics = json.loads(Path(copied.run_dir, f"evaluate_{folder.name}", "metrics.json").read_text())
        scores = [
            metrics[p][s] for p in ("test", "adapted") for s in ("accuracy", "uar", "calibration_error")
        ]
        assert row.split() == [str(folder), str(metrics["test"]["clips"]), *(f"{s:.1%}" for s in scores)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("nowhere", "no data folder nowhere"),
        ("a" * 300, "no data folder aaa"),
        ("good/../good", "two reports would be evaluate_good"),
        ("one", "--own_classes: one has only one class of the model, Sad"),
    ],
)
def test_no_folder_is_evaluated_where_one_cannot_be(
    bad: str, reason: str, copied: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(copied.run_dir).parent)
    make_corpus(Path("good"), n_takes=1)
    make_corpus(Path("one"), emotions=["Sad"], n_takes=1)
    with pytest.raises(UserError, match=reason) as refusal:
        script(copied, evaluate=["good", bad], own_classes=bad == "one")
    assert refusal.value.code == 2
    assert not Path(copied.run_dir, "evaluate_good").exists()


def test_answers_can_be_kept_to_the_classes_of_a_folder(copied: Config, tmp_path: Path) -> None:
    """Their probabilities are divided by their sum; the report and --compare say so."""
    folder = make_corpus(tmp_path / "two", emotions=("Angry", "Sad"), n_takes=1)
    report, other = Path(copied.run_dir, "evaluate_two"), tmp_path / "all_classes"
    assert script(copied, evaluate=[str(folder)]) == 0
    report.rename(other)
    assert script(copied, evaluate=[str(folder)], own_classes=True, adapt=True) == 0
    own, every = (pd.read_csv(place / "predictions.csv") for place in (report, other))
    assert own.columns[-2:].tolist() == ["p(Angry)", "p(Sad)"]
    both = every[["p(Angry)", "p(Sad)"]]
    np.testing.assert_allclose(own[both.columns], both.div(both.sum(axis=1), axis=0), atol=1e-6)
    assert (own.predicted == both.idxmax(axis=1).str[2:-1]).all()
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["split"] == f"8 clips of {folder}, labelled as Angry or Sad, no other class"
    assert "Suprised" not in metrics["adapted"]["per_class"]
    assert [train.read_run(str(place))[0]["own_classes"] for place in (report, other)] == [True, False]


def test_model_for_any_recordings_hears_no_level(tmp_path: Path, corpus: Path) -> None:
    """The same clip 12 dB quieter is the same to it, as it is not to the default."""
    noise = 0.05 * np.random.default_rng(0).normal(size=RATE // 2).astype(np.float32)
    clip = tone(PITCH["Sad"]) + noise
    learns = {"gru_hidden": 8, "epochs": 4, "min_steps": 24, "learning_rate": 1e-2, "ema_decay": 0.9}
    differ = {}
    for recordings in ("same", "any"):
        cfg = tiny_config(tmp_path / recordings, data_dir=str(corpus), recordings=recordings, **learns)
        assert script(cfg) == 0
        recognizer = Recognizer(cfg.checkpoint, device="cpu")
        loud, quiet = recognizer.predict([clip, clip / 4], RATE)
        assert (loud.distance == pytest.approx(quiet.distance, abs=1e-3)) == (recordings == "any")
        one, other = (np.array([*found.probabilities.values()]) for found in (loud, quiet))
        differ[recordings] = np.abs(one - other).max()
    assert differ["any"] < 1e-3 < differ["same"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"evaluate": ["other"], "epochs": 3}, "--epochs has no effect on --evaluate"),
        ({"evaluate": ["other"], "init": "best.pth"}, "--init has no effect on --evaluate"),
        ({"evaluate": ["other"]}, "classes of other: Calm, Joy; classes of .*: Angry, .*: none in common"),
        ({"evaluate": ["other"], "checkpoint": "none.pth"}, "no checkpoint none.pth"),
        ({"compare": ["run", "other"]}, "other holds no finished run"),
        ({"init": "best.pth", "n_mfcc": 10, "ensemble": 3}, "pass --n_mfcc 8 --ensemble 2"),
        ({"init": "best.pth", "resume": True}, "--resume goes on with what the run started from"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    settings: dict[str, Any], reason: str, copied: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(copied.run_dir).parent)
    make_corpus(Path("other"), emotions=("Angry", "Sad"), n_takes=1)
    for number, path in enumerate(Path("other").rglob("*.wav")):  # names that tell no emotion
        path.rename(path.with_name(f"{number}.wav"))
    Path("other/Angry").rename("other/Calm")
    Path("other/Sad").rename("other/Joy")
    before = contents(copied.run_dir)
    changes = {name: value for name, value in settings.items() if name not in ACTIONS}
    with pytest.raises(UserError, match=reason) as refusal:
        script(replace(copied, **changes), **settings)
    assert refusal.value.code == 2
    assert contents(copied.run_dir) == before


def test_init_starts_where_the_model_was(copied: Config, tmp_path: Path) -> None:
    """With its features' mean, and when it is resumed after the model has been replaced."""
    cfg = replace(copied, run_dir=str(tmp_path / "more"), epochs=1, learning_rate=1e-4, seed=1)
    theirs = load_tensors(Path(copied.checkpoint))["members"]
    assert script(cfg, init=cfg.checkpoint) == 0
    assert all(
        row["val_accuracy"] > 0.7 for row in pd.read_csv(f"{cfg.run_dir}/history.csv").to_dict("records")
    )
    straight = [state(cfg, member) for member in (1, 2)]
    for end, weights in zip(straight, theirs, strict=True):
        assert torch.equal(end["model"]["mean"], weights["mean"])
    Path(cfg.run_dir, "network2.pth").unlink()  # as if it had been stopped there
    assert script(cfg, resume=True) == 0
    assert all(same(state(cfg, member), straight[member - 1]) for member in (1, 2))
    # A later run without --init does not find what the earlier one started from.
    assert script(cfg) == 0
    assert not same(state(cfg), straight[0])


def test_init_with_other_classes_has_a_new_last_layer(copied: Config) -> None:
    labels = ["Bored", "Calm", "Sad"]
    checkpoint, ensemble = load_checkpoint(Path(copied.checkpoint))
    network = train.EmotionCNNGRU(copied, 3)
    fresh = {name: value.clone() for name, value in network.state_dict().items()}
    train.start_from(checkpoint, network, 1, labels)
    for name, value in network.state_dict().items():
        source = fresh if name.startswith("head.5.") else ensemble.members[0].state_dict()
        assert torch.equal(value, source[name]), name


def test_score_on_clips_that_init_knew_is_none(copied: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Another seed divides the clips otherwise: what tests it, the first model was trained on."""
    folder = Path(copied.run_dir).parent
    cfg = replace(copied, seed=1, epochs=1, run_dir=str(folder / "more"), checkpoint=str(folder / "more.pth"))
    assert script(cfg, init=copied.checkpoint) == 0
    seen = json.loads((folder / "more" / "metrics.json").read_text())["test"]["seen"]
    assert 0 < seen <= 12
    assert f"not a score: {seen} of 12 clips were seen in training" in capsys.readouterr().out
    train.read_run(cfg.run_dir)  # as --compare does
    assert f"{cfg.run_dir}: not a score: {seen} of its test clips" in capsys.readouterr().err


def test_weights_of_an_edited_network_are_named(copied: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first edit that everybody makes is a layer more."""

    class Edited(model.EmotionCNNGRU):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.extra = nn.Linear(3, 3)

    monkeypatch.setattr(model, "EmotionCNNGRU", Edited)
    monkeypatch.setattr(train, "EmotionCNNGRU", Edited)
    fits_not = (
        r"weights do not fit the network in model\.py: extra\.weight, extra\.bias missing: undo the edit"
    )
    with pytest.raises(UserError, match=fits_not):
        Recognizer(copied.checkpoint)
    with pytest.raises(UserError, match=fits_not):
        script(replace(copied, epochs=9), resume=True)


def test_resume_of_a_finished_run_points_to_init(copied: Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = (Path(copied.run_dir) / "predictions.csv").read_text()
    assert script(copied, resume=True) == 0
    assert f"a new run with --init {copied.checkpoint}" in capsys.readouterr().err
    assert (Path(copied.run_dir) / "predictions.csv").read_text() == before


def write_run(folder: Path, n_right: list[int], **config: Any) -> str:
    """What a run leaves for --compare: predictions as by_speakers gives them, in files of their own names."""
    table = by_speakers(n_right).assign(path=[f"{number}.wav" for number in range(10 * len(n_right))])
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"config": config, "test": {}}))
    train.save_table(folder / "predictions.csv", table)
    return str(folder)


def test_compare_pairs_the_clips_that_both_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each speaker is 20 % better: speakers that differ much do not blur the difference."""
    one = write_run(tmp_path / "a", [4, 0] * 3, epochs=3, run_dir="a", seed=0)
    other = write_run(tmp_path / "b", [5, 1] * 3 + [0], epochs=9, run_dir="b", seed=0)
    train.compare([one, other])
    out = capsys.readouterr().out
    assert re.search(r"^epochs +3 +9$", out, re.MULTILINE)
    assert "seed" not in out
    assert "run_dir" not in out
    assert f"60 clips that both tested, of 60 in {one} and 70 in {other}" in out
    assert re.search(r"^accuracy +40.0% +60.0% +\+20.0% +\+20.0% +\+20.0%$", out, re.MULTILINE)
    assert "resampled by 6 speakers" in out
    train.compare([write_run(tmp_path / "a", [4, 0]), write_run(tmp_path / "b", [5, 1])])
    out = capsys.readouterr().out
    assert "no setting differs" in out
    assert "resampled by clips, as fewer than five speakers are known" in out
    low, high = re.findall(r"^accuracy .* \+20.0% +([+-][\d.]+)% +([+-][\d.]+)%$", out, re.MULTILINE)[0]
    deviation = 100 * math.sqrt(0.2 * 0.8 / 20)  # of 20 differences, four of them 1, the others 0
    assert (float(low), float(high)) == pytest.approx((20 - 1.96 * deviation, 20 + 1.96 * deviation), abs=4)


def test_runs_that_differ_in_the_seed_alone_have_a_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a std; each has a paired difference to the first."""
    runs = [write_run(tmp_path / str(n), [4 + n, n] * 3, seed=n, epochs=3) for n in (0, 1)]
    runs.append(write_run(tmp_path / "2", [4, 0] * 3, seed=2, epochs=3))
    train.compare(runs)
    out = capsys.readouterr().out
    assert out.count("clips that both tested") == 2
    assert re.search(r"^mean +46.7%", out, re.MULTILINE)
    assert re.search(r"^std +11.5%", out, re.MULTILINE)
    write_run(tmp_path / "2", [4, 0] * 3, seed=2, epochs=4)
    train.compare(runs)
    assert "mean" not in capsys.readouterr().out


def test_names_cannot_inject_markup_into_the_page_of_mistakes(tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>.wav", "a&b?c#d %41.wav", "<!--", "right.wav"]
    table = make_predictions("AABB", "BBAB", "AB").assign(
        path=[str(tmp_path / "clips" / name) for name in names]
    )
    table.loc[1, ["p(A)", "p(B)"]] = [0.05, 0.95]
    page = train.mistakes_page(tmp_path / "run", table).decode()
    template = (ROOT / "assets" / "mistakes.html").read_text()
    assert page.count("<") == template.count("<")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])
    assert data["clips"] == 4
    assert Path(data["mistakes"][0]["path"]).name == names[1]  # the surest first
    for clip in data["mistakes"]:
        assert re.fullmatch(r"[\w/.%~-]+", clip["link"])
        assert (tmp_path / "run" / unquote(clip["link"])).resolve() == Path(clip["path"]).resolve()
