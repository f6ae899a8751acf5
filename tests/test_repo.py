"""The repository itself: its shape, its packages, and the commands and examples of its pages."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import requires
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

import config
import train
from config import Config
from inference import Recognizer
from prepare import AUDIO_SUFFIXES, FeatureCache, extract
from tests.conftest import PITCH, RATE, ROOT, TINY, Trained, tone

SCRIPTS = ("config", "prepare", "model", "train", "inference")
OTHERS = {"requirements.txt", "README.md", "LICENSE", "assets", "tests"}


@cache
def tracked() -> tuple[Path, ...]:
    """The files that git knows and that are there, relative to the repository."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    result = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"git: {result.stderr}")
    names = (Path(name) for name in result.stdout.split("\0") if name)
    return tuple(name for name in names if (ROOT / name).exists())


@cache
def imported(script: str) -> set[str]:
    """The top-level modules that a script imports, at its head or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def required(path: str) -> dict[str, str]:
    """The packages of a file of requirements, and their bounds."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    pattern = re.compile(r"(\w[\w-]*)\s*([<>=!~][^#]*)?")
    found = (pattern.match(line) for line in lines)
    return {match[1]: (match[2] or "").strip() for match in found if match}


def test_top_level_holds_five_scripts_and_what_goes_with_them() -> None:
    """Names that begin with a dot are free."""
    found = {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")}
    assert found == OTHERS | {f"{name}.py" for name in SCRIPTS}


def test_no_clip_and_no_result_is_tracked() -> None:
    """The corpora are licensed for research only; tests/cases holds broken scraps of synthetic tones."""
    clips = [path for path in tracked() if path.suffix.lower() in AUDIO_SUFFIXES]
    assert {path.parent for path in clips} <= {Path("tests/cases")}
    assert all((ROOT / path).stat().st_size <= 2048 for path in clips)
    models = [path for path in tracked() if path.suffix == ".pth" or path.name == "submission.csv"]
    assert models == [Path("assets/pretrained_any.pth"), Path("assets/pretrained_same.pth")]


def test_requirements_are_what_the_scripts_import() -> None:
    """None too many; what is not named comes with librosa. Bounds: what is needed, and what was tested."""
    packages = set(required("requirements.txt"))
    brought = {re.split(r"[^\w-]", text)[0] for text in requires("librosa") or [] if "extra ==" not in text}
    used = set().union(*map(imported, SCRIPTS)) - sys.stdlib_module_names - set(SCRIPTS)
    used = {{"sklearn": "scikit-learn"}.get(name, name) for name in used}
    assert packages <= used
    assert used <= packages | brought
    for path in ("requirements.txt", "tests/requirements.txt"):
        for name, bounds in required(path).items():
            assert re.fullmatch(r">=[\d.]+, ?<=?[\d.]+", bounds), name


@pytest.mark.parametrize("mark", ["run", "test"])
def test_gate_runs_the_commands_of_the_readme(mark: str) -> None:
    """Literally, so that they are known to work."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^<!-- ci: {mark} -->\n```bash\n(.*?)\n```$", readme, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    assert f"\n{blocks[0]}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "assets/python.md", "assets/experiments.md"])
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    """To a file of the repository, or to a heading of this page or another."""
    path = ROOT / page
    links = re.findall(r"\]\((?!https://)([^)]+)\)", path.read_text(encoding="utf-8"))
    assert links
    for file, _, heading in (link.partition("#") for link in links):
        target = path.parent / file if file else path
        assert target.is_file(), file
        if heading:
            names = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {name.lower().replace(" ", "-") for name in names}


def test_no_path_of_one_machine_is_tracked() -> None:
    """It would work there only."""
    place = re.compile(r"(?<![\w.:/-])(/" + "(home|Users|root|work)" + r"|[A-Z]:\\Users)[/\\]\w")
    for path in tracked():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        assert not place.search(text), path


# ---- the examples of the pages ---------------------------------------------------------------------------


def python_blocks(page: str) -> list[str]:
    """The Python code of a page, block by block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def block_with(page: str, word: str) -> str:
    """The one block of a page that has this word."""
    (block,) = [block for block in python_blocks(page) if word in block]
    return block


def n_lines(block: str) -> int:
    """Lines of code, without blank ones."""
    return sum(bool(line.strip()) for line in block.splitlines())


Run = Callable[[str], dict[str, Any]]  # a block of code -> the names that it leaves


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The code runs as it stands: data/demo has the tiny corpus, Config tiny settings where it names none."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus, "data/demo")
    monkeypatch.setattr(config, "Config", partial(Config, **TINY))
    monkeypatch.setattr(train, "Config", config.Config)

    def execute(block: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(block, "example", "exec"), names)
        return names

    return execute


@pytest.fixture
def run_with_model(run: Run, trained: Trained) -> Run:
    """The same where there is a best_emotion_model.pth."""
    shutil.copy(trained.cfg.checkpoint, "best_emotion_model.pth")
    return run


def test_example_trains_and_has_the_scores_of_validation_and_test(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a row of history.csv for each epoch, as the page lists its columns."""
    names = run(block_with("assets/python.md", "on_epoch=print"))
    metrics = json.loads(Path("run_a/metrics.json").read_text())
    assert names["scores"]["val"] == metrics["val"]
    printed = capsys.readouterr().out.splitlines()
    rows = [ast.literal_eval(line) for line in printed if line.startswith("{")]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert printed[-1] == f"{metrics['val']['accuracy']} {metrics['test']['accuracy']}"
    page = (ROOT / "assets" / "python.md").read_text(encoding="utf-8")
    assert {*rows[0], *metrics["val"]} <= set(re.findall(r"`(\w+)`", page))
    assert Path("run_a/model.pth").is_file()


def test_example_draws_curves_in_tensorboard(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In five lines: a point for each epoch of each network."""
    points: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            assert log_dir == "run_curves"

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            points.append((tag, scalar_value, global_step))

    stub: Any = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    block = block_with("assets/python.md", "tensorboard")
    assert n_lines(block) <= 5
    run(block)
    history = pd.read_csv("run/history.csv")
    assert len(history) == 2
    assert points == [("1", value, epoch + 1) for epoch, value in enumerate(history.val_loss)]


def test_example_searches_by_validation_and_touches_no_model(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 15 lines."""
    values: list[float] = []

    class Trial:
        def __init__(self, number: int) -> None:
            self.number = number

        def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
            assert hasattr(Config, name)
            assert low < high
            return [low, math.sqrt(low * high) if log else (low + high) / 2][self.number]

    class Study:
        best_params: ClassVar[dict[str, float]] = {}

        def optimize(self, objective: Callable[[Trial], float], n_trials: int) -> None:
            assert n_trials > 1
            values.extend(objective(Trial(number)) for number in range(2))

    def create_study(*, direction: str) -> Study:
        assert direction == "maximize"
        return Study()

    stub: Any = types.ModuleType("optuna")
    stub.Trial, stub.create_study = Trial, create_study
    monkeypatch.setitem(sys.modules, "optuna", stub)
    block = block_with("assets/python.md", "optuna")
    assert n_lines(block) <= 15
    run(block)
    metrics = [json.loads(Path(f"run_{number}/metrics.json").read_text()) for number in range(2)]
    assert values == [part["val"]["accuracy"] for part in metrics]
    assert metrics[0]["config"]["learning_rate"] != metrics[1]["config"]["learning_rate"]
    tests = [set(pd.read_csv(f"run_{number}/predictions.csv").path) for number in range(2)]
    assert tests[0] == tests[1]
    assert not Path("best_emotion_model.pth").exists()


def test_example_has_features_and_their_table(run: Run) -> None:
    """In five lines and the imports; row by row they are those of the clip."""
    block = block_with("assets/python.md", "FeatureCache")
    assert n_lines(block) <= 7
    names = run(block)
    clips, features, cfg = names["clips"], names["features"], names["cfg"]
    assert features.shape == (len(clips), cfg.n_features, cfg.n_frames)
    clip = clips.iloc[-1]
    expected = extract(Path(clip.path), names["mfcc"], cfg).features
    assert np.array_equal(features[-1], expected[0])
    ids = range(clip.first_window, clip.first_window + clip.n_windows)
    assert np.array_equal(FeatureCache(cfg, names["mfcc"]).read(ids), expected)


def test_example_classifies_embeddings(run_with_model: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("assets").mkdir()
    shutil.copy("best_emotion_model.pth", "assets/pretrained_any.pth")
    names = run_with_model(block_with("assets/python.md", "embed("))
    assert len(names["embeddings"]) == len(names["clips"])
    assert float(capsys.readouterr().out) > 0.9  # the tiny corpus is easy


def test_example_labels_and_adapts(run_with_model: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name, label in {"clip": "Angry", "a": "Angry", "b": "Sad"}.items():
        shutil.copy(next(Path("data/demo", label).iterdir()), f"{name}.wav")
    names = run_with_model(block_with("README.md", ".adapt("))
    assert capsys.readouterr().out.startswith("Angry ")
    assert names["mine"].predict("clip.wav") != names["result"]


def test_example_saves_an_adapted_model(run_with_model: Run) -> None:
    Path("run_demo").mkdir()
    shutil.move("best_emotion_model.pth", "run_demo")
    names = run_with_model(block_with("assets/python.md", "save_checkpoint"))
    clip = names["recordings"][0]
    assert Recognizer("me.pth", device="cpu").predict(clip) == names["mine"].predict(clip)
    assert Recognizer("run_demo/best_emotion_model.pth").predict(clip) != names["mine"].predict(clip)


def test_example_halves_the_weights_of_a_bundled_model(run_with_model: Run) -> None:
    Path("assets").mkdir()
    run_with_model(block_with("tests/README.md", "half()"))
    full, half = Path("best_emotion_model.pth"), Path("assets/pretrained_same.pth")
    assert half.stat().st_size < full.stat().st_size
    clip = str(next(Path("data/demo/Sad").iterdir()))
    found, expected = (Recognizer(path, device="cpu").predict(clip).confidence for path in (half, full))
    assert found == pytest.approx(expected, abs=0.02)


class Microphone:
    """A sounddevice.InputStream of a recording, until somebody presses Ctrl-C."""

    recording: ClassVar[npt.NDArray[np.float32]]

    def __init__(self, samplerate: float, *, channels: int, dtype: str) -> None:
        assert (samplerate, channels, dtype) == (RATE, 1, "float32")
        self.position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def read(self, frames: int) -> tuple[npt.NDArray[np.float32], bool]:
        """The next samples (frames, 1), and whether some were lost."""
        start, self.position = self.position, self.position + frames
        if self.position > len(self.recording):
            raise KeyboardInterrupt
        return self.recording[start : self.position, None], False


def test_example_hears_a_microphone(
    run_with_model: Run,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In 20 lines: a window that slides by a sixth, and the mean of what five say; silence is no speech."""
    speech = np.concatenate([tone(PITCH[label], 2.0) for label in ("Angry", "Sad")])
    speech += 0.01 * rng.normal(size=len(speech)).astype(np.float32)
    Microphone.recording = np.append(speech, np.zeros(RATE, np.float32))
    stub: Any = types.ModuleType("sounddevice")
    stub.InputStream = Microphone
    monkeypatch.setitem(sys.modules, "sounddevice", stub)
    block = block_with("assets/python.md", "sounddevice")
    assert n_lines(block) <= 20
    with pytest.raises(KeyboardInterrupt):
        run_with_model(block)
    recognizer = Recognizer("best_emotion_model.pth", device="cpu")
    size, expected = recognizer.cfg.n_samples, []
    recent: list[Any] = []
    for end in range(size // 6, len(Microphone.recording) + 1, size // 6):
        result = recognizer.predict(Microphone.recording[max(0, end - size) : end], RATE)
        recent = [*recent, list(result.probabilities.values())][-5:] if result.distance <= 1 else []
        mean = np.mean(recent, axis=0) if recent else []
        best = f"{recognizer.labels[int(np.argmax(mean))]} {max(mean):.0%}" if recent else "no clear speech"
        expected.append(best)
    assert capsys.readouterr().out.split("\n")[:-1] == expected
    assert expected[10].startswith("Angry ")
    assert expected[-1] == "no clear speech"
