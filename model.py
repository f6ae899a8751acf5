"""The network, the dataset that feeds it, and the checkpoint file that holds it."""

import contextlib
import glob
import io
import os
import platform
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from config import Config, UserError, fits_csv

# ---- dataset --------------------------------------------------------------------------------------------


class _Features(Protocol):
    """What the dataset asks of features: an array, in memory or mapped from disk."""

    def __getitem__(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.float32]: ...


class EmotionDataset(Dataset[tuple[Tensor, Tensor]]):
    """Features and class numbers of some of the clips of a corpus."""

    def __init__(
        self,
        features: _Features,
        targets: npt.NDArray[np.int64],
        indices: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Choose the clips.

        Args:
            features: (N, n_features, n_frames) float32; only indexed, never copied as a whole.
            targets: (N,) class numbers.
            indices: (M,) the clips of this dataset; None for all.
        """
        self.features, self.targets = features, targets
        self.indices = np.arange(len(targets)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        """One clip: (n_features, n_frames) float32 and () int64."""
        features, targets = self.__getitems__([item])
        return features[0], targets[0]

    def __getitems__(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch at once, as DataLoader asks for it: (B, n_features, n_frames) float32 and (B,) int64."""
        chosen = self.indices[np.asarray(items)]
        return torch.from_numpy(self.features[chosen]), torch.from_numpy(self.targets[chosen])


# ---- network --------------------------------------------------------------------------------------------


class EmotionCNNGRU(nn.Module):
    """A bidirectional GRU over a convolutional network: (B, F, T) features -> (B, C) logits, any T >= 1.

    The convolutions find local patterns and shorten the clip, the GRU (Chung et al. 2014, arXiv:1412.3555)
    follows them through time. What it says is pooled over time: mean and deviation, weighted by attention
    (Okabe et al. 2018, arXiv:1803.10963), and maximum.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        n_features: int,
        n_classes: int,
        *,
        conv_channels: int,
        conv_blocks: int,
        conv_kernel: int,
        gru_hidden: int,
        gru_layers: int,
        dropout: float,
        conv_dropout: float,
    ) -> None:
        """Build the layers; sizes as in Config."""
        super().__init__()
        # Part of the network, so that nobody can forget to centre and scale. Filled in by build_model.
        self.register_buffer("mean", torch.zeros(n_features, 1))
        self.register_buffer("std", torch.ones(()))
        widths = [n_features, *(conv_channels * (2 + block) // 2 for block in range(conv_blocks))]
        # Over time alone, but as images of one line: PyTorch has faster kernels for these.
        self.conv = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width_in, width_out, (1, conv_kernel), padding="same", bias=False),
                    nn.BatchNorm2d(width_out),
                    nn.LeakyReLU(0.1),
                    nn.MaxPool2d((1, 2), ceil_mode=True),  # ceil: the last frame counts, one frame stays one
                    nn.Dropout(conv_dropout),
                )
                for width_in, width_out in pairwise(widths)
            )
        )
        self.gru = nn.GRU(
            widths[-1],
            gru_hidden,
            gru_layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if gru_layers > 1 else 0.0,
        )
        n_states = 2 * gru_hidden
        self.attention = nn.Sequential(nn.Linear(n_states, 64), nn.Tanh(), nn.Linear(64, 1))
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(3 * n_states, gru_hidden),
            nn.BatchNorm1d(gru_hidden),
            nn.LeakyReLU(0.1),
            nn.Dropout(dropout),
            nn.Linear(gru_hidden, n_classes),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Raw features (B, F, T), as prepare.extract_features gives them -> logits (B, C)."""
        x = ((features - self.mean) / self.std)[:, :, None]  # (B, F, 1, T)
        x = self.conv(x.to(memory_format=torch.channels_last))[:, :, 0]  # (B, channels, T / 2 ** conv_blocks)
        states = self.gru(x.transpose(1, 2))[0].float()  # (B, T', 2 * gru_hidden)
        weights = self.attention(states).float().softmax(dim=1)  # (B, T', 1)
        mean = (weights * states).sum(dim=1)
        variance = (weights * states.square()).sum(dim=1) - mean.square()
        deviation = variance.clamp(min=1e-5).sqrt()  # at 0 the root has no slope
        pooled = torch.cat([mean, deviation, states.amax(dim=1)], dim=1)  # (B, 6 * gru_hidden)
        return self.head(pooled).float()  # type: ignore[no-any-return] # nn.Module is Any


class EmotionEnsemble(nn.Module):
    """Networks that learn side by side and are heard together: the mean of their probabilities.

    They differ in the random weights they start from, and in how their clips are augmented, and so err
    differently (Hansen & Salamon 1990, IEEE Trans. Pattern Analysis and Machine Intelligence 12:993).
    """

    def __init__(self, members: Sequence[EmotionCNNGRU]) -> None:
        """Take the M networks in."""
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, features: Tensor) -> Tensor:
        """Logits for each member's own clips, or what all say of the same clips.

        Training: (M * B, F, T), a batch for each member -> (M * B, C). Evaluation: (B, F, T) -> (B, C)
        logarithms of the mean probabilities, which serve as logits.
        """
        if self.training:
            parts = features.chunk(len(self.members))
            return torch.cat([member(part) for member, part in zip(self.members, parts, strict=True)])
        shares = torch.stack([member(features).softmax(dim=1) for member in self.members]).mean(dim=0)
        return shares.clamp(min=1e-30).log()  # a share that underflows to 0 would make the loss infinite


Network: TypeAlias = EmotionCNNGRU | EmotionEnsemble


def build_model(
    cfg: Config,
    n_classes: int,
    *,
    mean: npt.NDArray[np.float32] | None = None,
    std: float = 1.0,
) -> Network:
    """Make the network, or the ensemble of them, that the config describes.

    Args:
        cfg: Gives the sizes.
        n_classes: Logits per clip.
        mean: (n_features,) of the training clips; None for zeros.
        std: Of the training clips, one for all rows, positive.
    """
    members = [_build_member(cfg, n_classes) for _ in range(cfg.ensemble)]
    for member in members:
        if mean is not None:
            member.mean.copy_(torch.from_numpy(mean)[:, None])
        member.std.fill_(std)
    return EmotionEnsemble(members) if len(members) > 1 else members[0]


def _build_member(cfg: Config, n_classes: int) -> EmotionCNNGRU:
    return EmotionCNNGRU(
        cfg.n_features,
        n_classes,
        conv_channels=cfg.conv_channels,
        conv_blocks=cfg.conv_blocks,
        conv_kernel=cfg.conv_kernel,
        gru_hidden=cfg.gru_hidden,
        gru_layers=cfg.gru_layers,
        dropout=cfg.dropout,
        conv_dropout=cfg.conv_dropout,
    )


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda where there is one, else cpu. mps is used only when asked for.

    Raises:
        UserError: The machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    n_cuda = torch.cuda.device_count()
    missing = {
        "cuda": (device.index or 0) >= n_cuda,
        "mps": not torch.backends.mps.is_available(),
        "cpu": False,
    }
    if missing[device.type]:
        raise UserError(f"device = {name!r}: not on this machine, which has cpu and {n_cuda} cuda device(s)")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of that name; `auto` is bfloat16 where the device multiplies it faster than float32.

    bfloat16 has the range of float32 and 8 bits of precision: enough for products, whose sums, and all
    weights, stay float32 (Kalamkar et al. 2019, arXiv:1905.12322).
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        fast = fast or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


# ---- checkpoint -----------------------------------------------------------------------------------------

VERSION = 2  # of the file's layout


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model and everything needed to use it, judge it or train it further."""

    config: Config
    labels: tuple[str, ...]  # class names in the order of the logits
    weights: dict[str, Tensor]  # state of the Network, feature statistics (mean, std) included
    epoch: int  # finished epochs when it was made
    scores: dict[str, float]  # of this epoch on the validation clips: accuracy, uar, macro_f1
    n_clips: dict[str, int]  # training clips per class
    files: str  # hash of the features of all clips, their classes and their split
    versions: dict[str, str]  # of Python and the libraries
    training: dict[str, Any] = field(default_factory=dict)  # state of the run, for --resume only


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` when all is written: old or new, never half.

    Raises:
        OSError: It cannot be written; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for half in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        if _is_stale(half):
            with contextlib.suppress(OSError):
                half.unlink()
    # In the same folder, for from another file system it could not be replaced in a single step.
    half = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with half.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses to remove even what is not there
            half.unlink()


def _is_stale(half: Path) -> bool:
    """Whether the process that was writing this temporary file is gone."""
    pid = half.suffixes[-2][1:]
    if not pid.isdecimal():  # not of this program: perhaps the user's own copy
        return False
    is_ours = half.name.endswith(f".{platform.node()}.{pid}.tmp")
    try:
        if is_ours and os.name == "posix":  # elsewhere signal 0 is more than a question
            os.kill(int(pid), 0)
        return time.time() - half.stat().st_mtime > 60  # no write takes a minute
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is another user's, or has just been removed
        return False


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in one step; it holds plain types and tensors only.

    Raises:
        OSError: It cannot be written; the old file is as it was.
    """
    content = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    content |= {"version": VERSION, "config": checkpoint.config.to_dict(), "labels": list(checkpoint.labels)}
    # Through memory: torch.save turns what befalls it in a file, full disk or Ctrl-C, into a RuntimeError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replace_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed, and its checksums are verified.

    Raises:
        UserError: There is no such file, or it is damaged or not one of ours.
    """
    if not path.is_file():
        raise UserError(
            f"no checkpoint {path}: train one with `python train.py`, or name one with --checkpoint"
        )
    try:
        return _read_checkpoint(path)
    except (zipfile.BadZipFile, UserError, OSError) as error:
        reason = str(error)[:500]
    except Exception as error:  # whatever a broken or hostile file provokes
        reason = type(error).__name__  # not its text: torch's advises to load the file unsafely
    raise UserError(f"checkpoint {path} cannot be used ({reason}): train a new one with `python train.py`")


def _read_checkpoint(path: Path) -> Checkpoint:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not look at them
        if sum(entry.file_size for entry in archive.infolist()) > size:  # torch.save does not compress
            raise UserError("it would unpack to more than its size")
        if broken := archive.testzip():
            raise UserError(f"{broken} has changed")
    with warnings.catch_warnings(action="ignore"):  # of torch's, about types that we do not write
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.pop("version", None) != VERSION:
        raise UserError(f"not a checkpoint of layout {VERSION}")
    kinds: dict[str, type] = {"epoch": int, "labels": list, "files": str}  # the others are tables
    names = Checkpoint.__dataclass_fields__.keys() | content.keys()
    if odd := [name for name in names if not isinstance(content.get(name), kinds.get(name, dict))]:
        raise UserError(f"bad fields {', '.join(sorted(map(str, odd)))}")
    config, labels = Config.from_dict(content.pop("config")), content.pop("labels")
    if not (labels and all(isinstance(label, str) for label in labels) and len(set(labels)) == len(labels)):
        raise UserError("no class names")
    if not all(map(fits_csv, labels)):
        raise UserError("class names that no submission can hold")  # prepare.find_labels lets none pass
    weights = content["weights"]
    if sum(value.nbytes for value in weights.values()) > size:  # few numbers, repeated by their strides
        raise UserError("weights are larger than the file")
    for name, value in weights.items():
        if value.dtype == torch.float16:  # a file may hold them at half its size
            weights[name] = value.float()
    with torch.device("meta"):  # where tensors have shapes alone: the file may ask for a huge network
        expected = build_model(config, len(labels)).state_dict()
    if odd := misfits(weights, dict(expected)):
        raise UserError(f"weights do not fit the network: {'; '.join(odd[:5])}")
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise UserError("weights are not finite")
    return Checkpoint(config=config, labels=tuple(labels), **content)


def misfits(value: Any, pattern: Any, name: str = "") -> list[str]:  # noqa: ANN401 - whatever a file can hold
    """Where plain types and tensors are not built like those of a pattern: other keys, types or shapes.

    Args:
        value: As found.
        pattern: As wanted; what it holds otherwise does not matter, nor does the device of its tensors.
        name: What the value is called.

    Returns:
        One `name: found, not wanted` for each place.
    """
    odd: list[str] = []
    pairs: list[tuple[Any, Any, Any]]
    if isinstance(value, dict) and isinstance(pattern, dict):
        odd += [f"{name}{key} is missing" for key in pattern if key not in value]
        odd += [f"{name}{key} is unknown" for key in value if key not in pattern]
        pairs = [(key, value[key], pattern[key]) for key in pattern if key in value]
    elif isinstance(value, list | tuple) and isinstance(pattern, list | tuple) and len(value) == len(pattern):
        pairs = [(number, *pair) for number, pair in enumerate(zip(value, pattern, strict=True))]
    else:
        found, wanted = _kind(value), _kind(pattern)
        return [] if found == wanted else [f"{name.removesuffix('.')} is {found}, not {wanted}"]
    for key, found, wanted in pairs:
        odd += misfits(found, wanted, f"{name}{key}.")
    return odd


def _kind(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, Tensor):
        is_plain = value.layout == torch.strided and not value.is_nested
        return f"{value.dtype} {list(value.shape)}" if is_plain else str(value.layout)
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "a number" if type(value) in {int, float} else f"a {type(value).__name__}"


def restore_model(checkpoint: Checkpoint, device: torch.device) -> Network:
    """Rebuild the trained network, ready for prediction."""
    model = build_model(checkpoint.config, len(checkpoint.labels))
    model.load_state_dict(checkpoint.weights)
    return model.to(device).eval()
