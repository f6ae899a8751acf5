"""The model as an ONNX file: the same probabilities as PyTorch's, and where there is no PyTorch."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import inference
from config import Config, UserError
from model import load_checkpoint
from tests.conftest import EMOTIONS, PITCH, RATE, ROOT, Trained, run_script, tone


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, written by the script to its own folder as model.onnx. Read only."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -r tests/requirements.txt")
    folder = tmp_path_factory.mktemp("exported")
    result = run_script(
        "inference.py", "--export", "model.onnx", "--checkpoint", trained.cfg.checkpoint, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("model.onnx: windows (any number, 3200) at 8000 Hz -> "), result.stdout
    assert len(result.stderr.splitlines()) == 2, result.stderr  # which model; nothing from within torch
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    return folder / "model.onnx"


def test_any_number_of_windows_gives_what_pytorch_gives(
    exported: Path, trained: Trained, rng: np.random.Generator
) -> None:
    import onnxruntime

    checkpoint, model = load_checkpoint(Path(trained.cfg.checkpoint))
    session = onnxruntime.InferenceSession(exported)
    cfg = checkpoint.config
    for n_windows in (1, 2, 3, 5, 9):
        tones = [tone(PITCH[label], cfg.duration) for label in rng.choice(EMOTIONS, n_windows)]
        windows = np.float32(tones + 0.01 * rng.normal(size=(n_windows, cfg.n_samples)))
        probabilities, clip, distance = session.run(None, {"windows": windows})
        with torch.inference_mode():
            outputs = model(model.mfcc(torch.from_numpy(windows)))
            of_clip = outputs.of_clips(torch.zeros(n_windows, dtype=torch.long), 1)
            expected = (model.calibrated(outputs), model.calibrated(of_clip)[0], outputs.distance)
        for found, of_torch in zip((probabilities, clip, distance), expected, strict=True):
            np.testing.assert_allclose(found, of_torch.numpy(), rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["labels"]) == checkpoint.labels
    assert float(about["temperature"]) == checkpoint.temperature
    assert str(ROOT).encode() not in exported.read_bytes()  # it is for others


def test_example_needs_no_torch(exported: Path, trained: Trained, tmp_path: Path) -> None:
    """And prints what inference.py prints, of clips of one window, two, and six with the end of a clip."""
    page = (ROOT / "assets" / "python.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnx" in code]
    for seconds in (0.3, 0.5, 2.05):
        wave = np.concatenate([tone(PITCH["Angry"], seconds / 2), tone(PITCH["Sad"], seconds / 2)])
        soundfile.write(tmp_path / "a.wav", wave, RATE)
        clip = tmp_path / "a.wav"
        command = [sys.executable, "-c", f"{example}\nassert 'torch' not in sys.modules", str(clip)]
        printed = subprocess.run(command, cwd=exported.parent, capture_output=True, text=True, check=True)
        found = dict(line.split(",") for line in printed.stdout.splitlines())
        expected = inference.Recognizer(trained.cfg.checkpoint, device="cpu").predict(clip).probabilities
        assert {label: float(value) for label, value in found.items()} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"export": "model.pth"},
            "export = 'model.pth': must be a file whose name ends in .onnx, or a new .pth",
        ),
        ({"export": "folder.onnx"}, "export = 'folder.onnx': must be a file"),
        ({"export": "model.onnx", "paths": ["a.wav"]}, "--export labels nothing: leave out files"),
        ({"export": "model.onnx"}, "export needs onnxscript: pip install --upgrade onnx onnxscript"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    flags: dict[str, Any], message: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as where it is not installed
    Path("folder.onnx").mkdir()
    Path("model.pth").write_text("precious")
    settings = {"checkpoint": trained.cfg.checkpoint}
    names = "adapt demo fill timeline step json output abstain segments standard_names"
    unused = dict.fromkeys(names.split(), "")
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        inference.main(Config(**settings), Namespace(**{"paths": [], **unused, **flags, **settings}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.onnx", "model.pth"]
    assert Path("model.pth").read_text() == "precious"
