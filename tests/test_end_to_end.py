"""Both scripts as a user runs them, on a small synthetic corpus, from a folder that is not the repository."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from config import Config
from model import load_checkpoint
from prepare import EMOTIONS, cache_key

REPO = Path(__file__).resolve().parents[1]
SMALL = "--conv_channels 8 --gru_hidden 16 --dropout 0.1 --epochs 14 --learning_rate 3e-3 --batch_size 16"
TRAIN = [*SMALL.split(), "--val_fraction", "0.15", "--holdout_fraction", "0.15"]


def run(script: str | Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository to its end."""
    command = [sys.executable, str(REPO / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file and folder below."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


class Story(NamedTuple):
    """One training and one labelling, in a folder of their own."""

    home: Path
    training: subprocess.CompletedProcess[str]
    labelling: subprocess.CompletedProcess[str]
    data_untouched: bool
    repo_untouched: bool


@pytest.fixture(scope="module")
def read_only_corpus(demo_corpus: Path) -> Iterator[Path]:
    """The corpus as it may lie on a shared disk."""
    for path in [*demo_corpus.rglob("*"), demo_corpus]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield demo_corpus
    for path in [demo_corpus, *demo_corpus.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture(scope="module")
def story(read_only_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Train, then label."""
    home = tmp_path_factory.mktemp("home")
    data, repo = snapshot(read_only_corpus), {path.name for path in REPO.iterdir()}
    place = ["--data_dir", read_only_corpus, "--device", "cpu", "--num_workers", "2"]
    training = run("train.py", *place, *TRAIN, cwd=home)
    labelling = run("inference.py", *place, cwd=home)
    repo_after = {path.name for path in REPO.iterdir()} - {"__pycache__"}
    return Story(home, training, labelling, snapshot(read_only_corpus) == data, repo_after <= repo)


def test_both_scripts_succeed(story: Story) -> None:
    """Without a warning, a traceback or a progress bar in what is piped."""
    for result in (story.training, story.labelling):
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        assert "Warning" not in result.stderr
        assert "\r" not in result.stdout + result.stderr


def test_files_are_where_the_readme_says(story: Story) -> None:
    """Model and submission in the working directory, all else in run/ and cache/."""
    assert {path.name for path in story.home.iterdir()} == {
        "best_emotion_model.pth",
        "submission.csv",
        "run",
        "cache",
    }
    assert {path.name for path in (story.home / "run").iterdir()} == {
        "last.pth",
        "history.csv",
        "metrics.json",
        "predictions.csv",
        "loss.png",
        "confusion_matrix.png",
        "lock",
    }


def test_nothing_else_is_written(story: Story) -> None:
    """The data may be read-only, the repository someone else's."""
    assert story.data_untouched
    assert story.repo_untouched


def test_scores_are_above_chance(story: Story) -> None:
    """On 56 clips that were not trained on; guessing gets more than 2 in 7 right in one run of 600."""
    metrics = json.loads((story.home / "run" / "metrics.json").read_text())
    n_right = sum(28 * metrics[part]["accuracy"] for part in ("val", "holdout"))
    assert n_right > 56 * 2 / 7


def test_submission_is_complete_and_above_chance(story: Story, demo_corpus: Path) -> None:
    """Every test clip once, in natural order, and better than 2 in 7."""
    with (story.home / "submission.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["filename", "emotion"]
    assert [name for name, _ in rows] == [f"{number}.wav" for number in range(42)]
    _, *lines = (demo_corpus / "SYNTHETIC.txt").read_text().splitlines()
    truth = dict(line.split() for line in lines)
    assert len(truth) == 42
    assert sum(truth[name] == emotion for name, emotion in rows) > 42 * 2 / 7
    assert "ids as in" in story.labelling.stdout


def test_history_tells_of_every_epoch(story: Story) -> None:
    """One line printed and one row written each, with a loss that falls."""
    table = pd.read_csv(story.home / "run" / "history.csv")
    printed = [line for line in story.training.stdout.splitlines() if line.startswith("epoch")]
    assert table["epoch"].tolist() == list(range(1, len(printed) + 1))
    assert table["train_loss"].iloc[-1] < table["train_loss"].iloc[0]


def test_checkpoint_describes_the_run(story: Story) -> None:
    """Classes, clip counts, and the settings given as flags."""
    checkpoint = load_checkpoint(story.home / "best_emotion_model.pth")
    assert checkpoint.labels == tuple(EMOTIONS)
    assert checkpoint.n_clips == dict.fromkeys(EMOTIONS, 16)
    assert (checkpoint.config.conv_channels, checkpoint.config.learning_rate) == (8, 3e-3)


def cached(home: Path) -> dict[str, bytes]:
    """The features in a cache, by file."""
    (folder,) = (home / "cache").iterdir()
    found: dict[str, bytes] = {}
    for table in folder.glob("*.json"):
        clips = json.loads(table.read_text())["clips"]
        shard = np.fromfile(table.with_suffix(".f32"), np.float32).reshape(len(clips), -1)
        found |= {clip[0]: row.tobytes() for clip, row in zip(clips, shard, strict=True)}
    return found


DRIVER = """
import sys

import prepare

prepare.START_METHOD = "spawn"
if __name__ == "__main__":
    raise SystemExit(prepare.main(sys.argv[1:]))
"""


def test_prepare_alone(story: Story, read_only_corpus: Path, tmp_path: Path) -> None:
    """A table of clips; worker processes are started as on Windows and macOS, to the same result."""
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "driver.py", "--data_dir", str(read_only_corpus), "--num_workers", "2"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert result.returncode == 0, result.stderr
    header, *rows = (line.split() for line in result.stdout.splitlines())
    assert header == ["class", "clips", "seconds"]
    assert [row[0] for row in rows] == [*EMOTIONS, "total"]
    assert [int(row[1]) for row in rows] == [24] * 7 + [168]
    assert 168 < int(rows[-1][2]) < 3 * 168
    assert cached(tmp_path) == cached(story.home)
    assert (tmp_path / "cache" / cache_key(Config())).is_dir()


def test_prepared_features_are_used_again(story: Story, read_only_corpus: Path, tmp_path: Path) -> None:
    """A second look at the same data extracts nothing."""
    shutil.copytree(story.home / "cache", tmp_path / "cache", copy_function=shutil.copy2)
    before = snapshot(tmp_path / "cache")
    result = run("prepare.py", "--data_dir", read_only_corpus, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert snapshot(tmp_path / "cache") == before


# ---- several processes ----------------------------------------------------------------------------------


def torchrun(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Train with two processes that talk over the loopback interface."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(REPO / "train.py"), *map(str, arguments)],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_one_network(demo_corpus: Path, tmp_path: Path) -> None:
    """They agree at every epoch, one of them writes, and one process alone scores the model as they do."""
    flags = ["--data_dir", demo_corpus, "--device", "cpu", *TRAIN]
    together = torchrun(*flags, cwd=tmp_path)
    assert together.returncode == 0, together.stderr
    lines = [line for line in together.stdout.splitlines() if line.startswith("epoch ")]
    assert [int(line[5:9]) for line in lines] == list(range(1, len(lines) + 1))
    assert list(tmp_path.rglob("*.tmp")) == []
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["val"]["accuracy"] > 2 / 7  # chance is 1/7

    # Nothing is left to train: one process alone loads the best model, and scores it again.
    again = run("train.py", *flags, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    alone = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for part in ("val", "holdout"):
        assert alone[part]["per_class"] == metrics[part]["per_class"]


def test_two_processes_resume_one_run(demo_corpus: Path, tmp_path: Path) -> None:
    """All of them go on where all of them stopped; other epochs would be another plan for a cycle."""
    flags = ["--data_dir", demo_corpus, "--device", "cpu", *TRAIN, "--schedule", "plateau"]
    for epochs, more in ((2, []), (4, ["--resume"])):
        result = torchrun(*flags, *more, "--epochs", str(epochs), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    straight = tmp_path / "straight"
    straight.mkdir()
    assert torchrun(*flags, "--epochs", "4", "--cache_dir", tmp_path / "cache", cwd=straight).returncode == 0
    resumed, expected = (load_checkpoint(home / "run" / "last.pth") for home in (tmp_path, straight))
    for name, value in expected.weights.items():
        assert torch.equal(resumed.weights[name], value)
        assert torch.equal(resumed.training["average"][name], expected.training["average"][name])


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_dead_process_ends_them_all(demo_corpus: Path, story: Story, tmp_path: Path) -> None:
    """The other would wait for its share for ever. What is saved can be resumed."""
    flags = ["--data_dir", demo_corpus, "--cache_dir", story.home / "cache", "--device", "cpu", *TRAIN]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPO / "train.py"), *map(str, flags), "--epochs", "5000", "--patience", "5000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as together:
        assert together.stdout is not None
        ranks = []
        for line in together.stdout:
            if line.startswith("epoch   2/"):
                ranks = children_of(together.pid)
                os.kill(ranks[1], signal.SIGKILL)
                break
        together.stdout.read()
    assert len(ranks) == 2
    assert together.returncode not in {0, None}
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    assert list(tmp_path.rglob("*.tmp")) == []
    assert load_checkpoint(tmp_path / "run" / "last.pth").epoch >= 2


def test_two_processes_complain_once(demo_corpus: Path, tmp_path: Path) -> None:
    result = torchrun("--data_dir", demo_corpus, "--device", "cpu", "--batch_size", "3", cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("error: batch_size = 3: must be at least 2 in each of 2 processes") == 1
    assert "Traceback" not in result.stderr.partition("ChildFailedError")[0].partition("torch/distributed")[0]
