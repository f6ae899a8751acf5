"""The network, its dataset and its checkpoint file: a damaged or hostile file above all."""

import errno
import os
import pickle
import platform
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

import config
import model
from config import Config, Interrupted, UserError
from model import (
    Checkpoint,
    EmotionDataset,
    build_model,
    load_checkpoint,
    misfits,
    replace_file,
    resolve_device,
    resolve_dtype,
    restore_model,
    save_checkpoint,
)

REPO = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = Config(n_mfcc=5, conv_channels=4, conv_blocks=2, gru_hidden=6, ensemble=1)
LABELS = ("Angry", "Sad", "Suprised")


def make_model(cfg: Config = SMALL, n_classes: int = 3) -> Any:
    """A network in evaluation mode, with the same random weights for the same config."""
    torch.manual_seed(0)
    mean = np.linspace(-1, 1, cfg.n_features, dtype=np.float32)
    return build_model(cfg, n_classes, mean=mean, std=1.5).eval()


def clips(n_clips: int, n_frames: int, cfg: Config = SMALL) -> torch.Tensor:
    """Random features (n_clips, n_features, n_frames)."""
    return torch.randn(n_clips, cfg.n_features, n_frames, generator=torch.Generator().manual_seed(1))


def make_checkpoint() -> Checkpoint:
    """A checkpoint with something in every field."""
    return Checkpoint(
        config=SMALL,
        labels=LABELS,
        weights=make_model().state_dict(),
        epoch=7,
        scores={"accuracy": 0.75, "uar": 0.5},
        n_clips={"Angry": 3, "Sad": 2, "Suprised": 1},
        files="0123abcd",
        versions={"python": "3.11.0", "torch": "2.13.0"},
        training={"history": [{"epoch": 1}], "best": None, "stopping": {"best": 0.75}},
    )


# ---- network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_clips", [1, 2, 9])
@pytest.mark.parametrize("n_frames", [1, 2, 5, 17, 130, 2600])
def test_one_row_of_finite_logits_per_clip(n_clips: int, n_frames: int) -> None:
    """Any batch and any length pass, from a single frame to a minute."""
    with torch.inference_mode():
        logits = make_model()(clips(n_clips, n_frames))
    assert logits.shape == (n_clips, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conv_channels": 5},
        {"conv_blocks": 1},
        {"conv_blocks": 5},
        {"conv_kernel": 4},
        {"gru_hidden": 10},
        {"gru_layers": 1},
        {"gru_layers": 3, "n_mfcc": 13},
        {"ensemble": 2},
        {"ensemble": 3},
    ],
)
@pytest.mark.parametrize("n_classes", [2, 7])
def test_parameter_count_is_that_of_the_formula(changes: dict[str, int], n_classes: int) -> None:
    """Every size in the config shapes the network, and nothing else does."""
    cfg = replace(SMALL, **changes)
    count, width = 0, cfg.n_features
    for block in range(cfg.conv_blocks):
        out = cfg.conv_channels * (2 + block) // 2
        count += cfg.conv_kernel * width * out + 2 * out  # convolution, batch norm
        width = out
    hidden = cfg.gru_hidden
    for _ in range(cfg.gru_layers):
        count += 2 * 3 * hidden * (width + hidden + 2)  # two directions, three gates, two biases
        width = 2 * hidden
    count += (width + 1) * 64 + 64 + 1  # attention: linear, linear
    count += (3 * width + 1) * hidden + 2 * hidden  # mean, deviation and maximum: linear, batch norm
    count += (hidden + 1) * n_classes
    count *= cfg.ensemble
    assert sum(p.numel() for p in make_model(cfg, n_classes).parameters()) == count


def test_each_network_has_1013224_parameters() -> None:
    """The number that the README states."""
    assert sum(p.numel() for p in build_model(Config(ensemble=1), 7).parameters()) == 1_013_224


@pytest.mark.parametrize("n_frames", [1, 17, 130])
def test_a_clip_alone_equals_the_clip_in_a_batch(n_frames: int) -> None:
    """Nothing leaks between the clips of a batch."""
    network, batch = make_model(Config(), 7), clips(6, n_frames, Config())
    with torch.inference_mode():
        together = network(batch)
        alone = torch.cat([network(clip[None]) for clip in batch])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_frames", [1, 5, 17, 130])
@pytest.mark.parametrize("frame", [0, -1])
def test_first_and_last_frame_influence_the_logits(n_frames: int, frame: int) -> None:
    """By gradient and by perturbation; pooling must not drop the last frame of an odd number."""
    network, batch = make_model(), clips(2, n_frames).requires_grad_()
    logits = network(batch)
    logits.square().sum().backward()
    assert batch.grad is not None
    assert (batch.grad[:, :, frame].abs().sum(dim=1) > 0).all()

    changed = batch.detach().clone()
    changed[:, :, frame] += 3
    assert (network(changed) != logits).any(dim=1).all()


@pytest.mark.parametrize("part", range(4), ids=["mean", "mean back", "deviation", "deviation back"])
@pytest.mark.parametrize("frame", [0, 64, -1])
def test_both_directions_have_seen_the_whole_clip(part: int, frame: int) -> None:
    """The original read the last time step, where the backward direction has seen one frame only."""
    cfg = replace(SMALL, gru_layers=1)  # a lower layer would carry the frames along
    network, batch, seen = make_model(cfg), clips(1, 130).requires_grad_(), []
    network.head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    network(batch)
    seen[0].chunk(6, dim=1)[part].square().sum().backward()
    assert batch.grad is not None
    assert batch.grad[0, :, frame].abs().sum() > 0


@pytest.mark.parametrize("n_frames", [1, 5, 50])
@pytest.mark.parametrize("gru_layers", [1, 2, 3])
def test_head_reads_mean_deviation_and_maximum(gru_layers: int, n_frames: int) -> None:
    """Of the top layer over time, step by step; attention weighs the steps of a clip, which add up to 1."""
    network, seen, states = make_model(replace(SMALL, gru_layers=gru_layers)), [], []
    network.head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    network.gru.register_forward_hook(lambda _module, _inputs, outputs: states.append(outputs[0]))
    with torch.inference_mode():
        network.attention[2].weight *= 200  # the steps weigh very differently
        network(clips(3, n_frames))
        network.double()
        for pooled, steps in zip(seen[0], states[0].double(), strict=True):  # (6 * hidden,), (T, 2 * hidden)
            importance = [float(network.attention(step)) for step in steps]
            shares = [float(np.exp(value)) / sum(map(np.exp, importance)) for value in importance]
            mean = sum(share * step for share, step in zip(shares, steps, strict=True))
            spread = sum(share * (step - mean) ** 2 for share, step in zip(shares, steps, strict=True))
            expected = torch.cat([mean, spread.clamp(min=1e-5).sqrt(), steps.max(dim=0).values])
            torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=1e-4)
            assert n_frames < 50 or max(shares) > 1.5 * min(shares)


@pytest.mark.parametrize("n_frames", [1, 4])
def test_a_clip_of_one_state_has_a_finite_gradient(n_frames: int) -> None:
    """A single state has no deviation, and the root no slope at 0: NaN would go through all weights."""
    network = make_model().train()
    network(clips(3, n_frames)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("n_frames", [1, 17, 130])
def test_bfloat16_gives_nearly_the_same_logits(n_frames: int) -> None:
    """As float32, which loss and softmax need."""
    network, batch = make_model(Config(), 7), clips(3, n_frames, Config())
    with torch.inference_mode():
        exact = network(batch)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(batch)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1 * float(exact.abs().max()))


ENSEMBLE = replace(SMALL, ensemble=3, dropout=0, conv_dropout=0)


def test_members_are_heard_together() -> None:
    """Softmax of the ensemble's logits is the mean of the members' probabilities; the members differ."""
    network, batch = make_model(ENSEMBLE), clips(4, 20)
    with torch.inference_mode():
        shares = torch.stack([member(batch).softmax(dim=1) for member in network.members])
        torch.testing.assert_close(network(batch).softmax(dim=1), shares.mean(dim=0))
    assert (shares[0] - shares[1]).abs().max() > 1e-3


def test_sure_members_leave_finite_logits() -> None:
    """A probability of 0 has no logarithm, and label smoothing would ask for it."""
    network = make_model(ENSEMBLE)
    with torch.inference_mode():
        network.members[0].head[-1].weight *= 1e6
        for member in network.members:  # of one opinion
            member.load_state_dict(network.members[0].state_dict())
        logits = network(clips(4, 20))
    assert logits.isfinite().all()
    assert (logits.softmax(dim=1).amin(dim=1) < 1e-20).all()


def test_members_learn_apart() -> None:
    """In training each has a batch of its own, and no gradient from another's."""
    network, batch = make_model(ENSEMBLE).train(), clips(12, 20)
    logits = network(batch)
    assert logits.shape == (12, 3)
    for number, member in enumerate(network.members):
        part = slice(4 * number, 4 * number + 4)
        torch.testing.assert_close(logits[part], member(batch[part]))
    logits[:4].square().sum().backward()
    learnt = [any(p.grad is not None and p.grad.any() for p in m.parameters()) for m in network.members]
    assert learnt == [True, False, False]


def smallest() -> Config:
    """The smallest network that the config allows."""
    names = ("conv_channels", "conv_blocks", "conv_kernel", "gru_hidden", "gru_layers")
    return replace(SMALL, **{name: int(config._BOUNDS[name][0]) for name in names})


@pytest.mark.parametrize(
    "cfg", [SMALL, replace(SMALL, gru_layers=1), Config()], ids=["small", "flat", "default"]
)
def test_every_parameter_gets_a_gradient(cfg: Config) -> None:
    """No layer is built and then left out."""
    network = make_model(cfg).train()
    network(clips(8, 20, cfg)).square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A batch norm takes the mean away again, and with it the bias before it; so does a softmax.
    assert not {name for name in idle if not name.endswith(("head.1.bias", "attention.2.bias"))}


def test_smallest_network_tells_clips_apart() -> None:
    """A layer of zero units would give every clip the same logits."""
    with torch.inference_mode():
        logits = make_model(smallest())(50 * clips(16, 20))
    assert len(logits.unique(dim=0)) > 1


def test_mean_and_std_standardise_the_features() -> None:
    """Moving or scaling the features and their statistics alike changes nothing; moving one alone does."""
    network, batch = make_model(), clips(3, 30)
    with torch.inference_mode():
        logits = network(batch)
        network.mean += 5
        torch.testing.assert_close(network(batch + 5), logits, rtol=0, atol=1e-4)
        assert not torch.allclose(network(batch), logits, atol=1e-4)
        network.mean *= 4
        network.std *= 4
        torch.testing.assert_close(network(4 * (batch + 5)), logits, rtol=0, atol=1e-4)


def test_statistics_travel_with_the_weights() -> None:
    """They are buffers: nobody can forget to save them."""
    assert {"mean", "std"} <= set(make_model().state_dict())


def test_mean_is_one_per_row_and_std_one_for_all() -> None:
    """Row f of every frame is centred with mean[f]; a common scale keeps the rows' proportions."""
    network = make_model()
    torch.testing.assert_close(network.mean[:, 0], torch.linspace(-1, 1, SMALL.n_features))
    assert network.mean.shape == (SMALL.n_features, 1)
    assert (network.std.shape, float(network.std)) == ((), 1.5)


# ---- dataset --------------------------------------------------------------------------------------------


class Mapped:
    """Features that, like those in the cache, can do nothing but give out clips by their indices."""

    def __init__(self, array: np.ndarray) -> None:
        """Wrap an array."""
        self._array = array

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        assert isinstance(indices, np.ndarray)
        assert indices.ndim == 1
        return self._array[indices]


@pytest.mark.parametrize("wrap", [np.asarray, Mapped], ids=["array", "mapped"])
def test_dataset_gives_the_chosen_clips(wrap: Callable[[np.ndarray], Any], rng: np.random.Generator) -> None:
    """Item k is the clip indices[k], alone or in a batch."""
    features = rng.normal(size=(6, 4, 9)).astype(np.float32)
    targets = np.array([0, 1, 2, 3, 4, 5])
    dataset = EmotionDataset(wrap(features), targets, np.array([5, 0, 3]))
    assert len(dataset) == 3
    batch, batch_targets = dataset.__getitems__([2, 0, 1])
    assert batch_targets.tolist() == [3, 5, 0]
    assert (batch.dtype, batch_targets.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(batch.numpy(), features[[3, 5, 0]])
    for row, item in enumerate([2, 0, 1]):
        one, target = dataset[item]
        assert torch.equal(one, batch[row])
        assert (target.shape, target) == ((), batch_targets[row])


def test_dataset_without_indices_has_every_clip(rng: np.random.Generator) -> None:
    """In the order of the features."""
    features = rng.normal(size=(3, 4, 9)).astype(np.float32)
    dataset = EmotionDataset(features, np.array([1, 0, 1]))
    assert [int(dataset[item][1]) for item in range(len(dataset))] == [1, 0, 1]


# ---- device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_cuda", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_device_that_exists(name: str, n_cuda: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes cuda where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(("name", "n_cuda"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2), ("mps", 1)])
def test_device_that_is_missing_is_named(name: str, n_cuda: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a silent fallback to another device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"'{name}'.* {n_cuda} cuda") as error:
        resolve_device(name)
    assert error.value.code == 2


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_precision_that_is_named_is_taken(name: str, dtype: torch.dtype, device: str) -> None:
    """Whatever the device is good at."""
    assert resolve_dtype(name, torch.device(device)) == dtype


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("fast", ["cpu", "cuda", ""])
def test_auto_precision_is_bfloat16_where_that_is_fast(
    device: str, fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one device of the machine can do says nothing of another; emulated it is slower than float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast == "cpu")
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or fast == "cuda",
    )
    expected = torch.bfloat16 if device == fast else torch.float32
    assert resolve_dtype("auto", torch.device(device)) == expected


# ---- checkpoint: round trip -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good checkpoint file."""
    save_checkpoint(tmp_path / "best.pth", make_checkpoint())
    return tmp_path / "best.pth"


def test_checkpoint_comes_back_unchanged(saved: Path) -> None:
    """Every field is equal, the weights to the last bit."""
    before, after = make_checkpoint(), load_checkpoint(saved)
    assert list(after.weights) == list(before.weights)
    assert all(torch.equal(after.weights[name], before.weights[name]) for name in before.weights)
    assert all(after.weights[name].dtype == before.weights[name].dtype for name in before.weights)
    assert replace(after, weights={}) == replace(before, weights={})


def test_checkpoint_holds_plain_types_and_tensors(saved: Path) -> None:
    """So that the safe loader reads it, and any later version of this code."""

    def kinds(value: object) -> Iterator[type]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from kinds(key)
                yield from kinds(item)
        elif isinstance(value, list):
            for item in value:
                yield from kinds(item)
        else:
            yield type(value)

    content = torch.load(saved, weights_only=True)
    assert set(kinds(dict(content))) <= {str, int, float, bool, type(None), torch.Tensor}


def test_weights_may_be_stored_in_half_precision(saved: Path) -> None:
    """Half the file, float32 in memory, and the logits that the rounding leaves."""
    whole = load_checkpoint(saved)
    size = saved.stat().st_size
    halves = {
        name: value.half() if name.endswith("weight") else value for name, value in whole.weights.items()
    }
    save_checkpoint(saved, replace(whole, weights=halves))
    assert saved.stat().st_size < size
    network = restore_model(load_checkpoint(saved), CPU)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    with torch.inference_mode():
        logits = restore_model(whole, CPU)(clips(3, 20))
        torch.testing.assert_close(network(clips(3, 20)), logits, rtol=0, atol=2e-3)
        assert not torch.equal(network(clips(3, 20)), logits)


def test_restored_model_gives_the_same_logits(saved: Path) -> None:
    """Bit for bit, ready for prediction."""
    restored, batch = restore_model(load_checkpoint(saved), CPU), clips(4, 40)
    assert not restored.training
    assert torch.equal(restored(batch), make_model()(batch))


# ---- checkpoint: damage ---------------------------------------------------------------------------------


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Make a damage that changes the content of a checkpoint and leaves the file sound."""

    def damage(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return damage


def flip_a_weight(path: Path) -> None:
    """Flip one bit in the middle of the largest weight."""
    content = bytearray(path.read_bytes())
    weight = max(make_model().state_dict().values(), key=torch.numel).numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 1
    path.write_bytes(content)


def become_a_folder(path: Path) -> None:
    """Put a folder in the file's place."""
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    """Keep the first half, as an aborted copy does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def repeat_weights(content: dict[str, Any]) -> None:
    """Claim a network of 200 MB, of which each weight is one number with strides of 0."""
    cfg = Config(gru_hidden=1024, gru_layers=3)
    with torch.device("meta"):
        expected = build_model(cfg, 3).state_dict()
    content["config"] = cfg.to_dict()
    content["weights"] = {
        name: torch.ones((), dtype=value.dtype).expand(value.shape) for name, value in expected.items()
    }


def bomb(path: Path) -> None:
    """Compress the file: one of a megabyte could fill the memory a thousand times over."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(parts)).partition("/")[0]
    parts[f"{folder}/data/999"] = bytes(10_000_000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": cut,
    "last byte gone": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "html": lambda path: path.write_text("<!DOCTYPE html>\n<html>404\nnot found</html>\n"),
    "folder": become_a_folder,
    "flipped bit": flip_a_weight,
    "list": lambda path: torch.save([1, 2], path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "bare weights": lambda path: torch.save(make_model().state_dict(), path),
    "other keys": lambda path: torch.save({"model": {}, "epoch": 3}, path),
    "legacy format": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
    "other version": edit(lambda content: content.update(version=model.VERSION - 1)),
    "later version": edit(lambda content: content.update(version=model.VERSION + 1)),
    "no version": edit(lambda content: content.pop("version")),
    "no labels": edit(lambda content: content.update(labels=[])),
    "labels twice": edit(lambda content: content.update(labels=["Sad", "Sad", "Angry"])),
    "numbers as labels": edit(lambda content: content.update(labels=[0, 1, 2])),
    "a number among labels": edit(lambda content: content.update(labels=["Angry", "Sad", 3])),
    "fewer labels": edit(lambda content: content.update(labels=["Angry", "Sad"])),
    "labels missing": edit(lambda content: content.pop("labels")),
    "weights missing": edit(lambda content: content.pop("weights")),
    "weights no table": edit(lambda content: content.update(weights=[1.0])),
    "epoch missing": edit(lambda content: content.pop("epoch")),
    "key too many": edit(lambda content: content.update(surprise=1)),
    "config field missing": edit(lambda content: content["config"].pop("n_mfcc")),
    "name without end": edit(lambda content: content["config"].update({"x" * 1_000_000: 1})),
    "config field too many": edit(lambda content: content["config"].update(n_heads=8)),
    "config value bad": edit(lambda content: content["config"].update(n_mfcc=-1)),
    "config other sizes": edit(lambda content: content["config"].update(gru_hidden=12)),
    "weight missing": edit(lambda content: content["weights"].pop("head.5.weight")),
    "weight too many": edit(lambda content: content["weights"].update(extra=torch.zeros(1))),
    "weight of other shape": edit(lambda content: content["weights"].update(mean=torch.zeros(7, 1))),
    "weight no tensor": edit(lambda content: content["weights"].update(mean=0.0)),
    "weight NaN": edit(lambda content: content["weights"]["head.5.weight"].fill_(torch.nan)),
    "one NaN in a weight": edit(lambda content: content["weights"]["head.5.weight"][0, :1].fill_(torch.nan)),
    "weight of other type": edit(lambda content: content["weights"].update(std=torch.ones(()).double())),
    "weight sparse": edit(
        lambda content: content["weights"].update(mean=content["weights"]["mean"].to_sparse())
    ),
    "weight without numbers": edit(
        lambda content: content["weights"].update(std=torch.ones((), device="meta"))
    ),
    "weights repeated": edit(repeat_weights),
    "labels a text": edit(lambda content: content.update(labels="abc")),
    "labels a table": edit(lambda content: content.update(labels={"Angry": 0, "Sad": 1, "Happy": 2})),
    "epoch a text": edit(lambda content: content.update(epoch="7")),
    "training a list": edit(lambda content: content.update(training=[1])),
    "config a list": edit(lambda content: content.update(config=[1])),
    "config of a network too large": edit(
        lambda content: content["config"].update(gru_hidden=8192, gru_layers=16, conv_channels=4096)
    ),
    "compressed": bomb,
    "weight infinite": edit(lambda content: content["weights"]["std"].fill_(torch.inf)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_refused_in_one_line(damage: Callable[[Path], object], saved: Path) -> None:
    """Exit code 2, no traceback of torch's, and not the advice to read the file unsafely."""
    damage(saved)
    with pytest.raises(UserError) as error:
        restore_model(load_checkpoint(saved), CPU)
    assert error.value.code == 2
    assert "checkpoint" in str(error.value)
    assert len(str(error.value)) < len(str(saved)) + 1000
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("missing", "no checkpoint .*best.pth: train one"),
        ("config field missing", "n_mfcc"),
        ("config field too many", "n_heads"),
        ("config value bad", "n_mfcc = -1"),
        ("weight missing", "head.5.weight"),
        ("weight of other shape", "mean"),
        ("other version", f"layout {model.VERSION}"),
        ("key too many", "bad fields surprise"),
        ("labels a text", "bad fields labels"),
        ("weight too many", "extra is unknown"),
        ("weight of other type", "std is torch.float64 .., not torch.float32 .."),
        ("config other sizes", "gru.weight_ih_l0 is .*; gru.weight_hh_l0 is "),
        ("config of a network too large", "gru.weight_ih_l2 is missing"),
        ("compressed", "unpack to more than its size"),
        ("weights repeated", "weights are larger than the file"),
    ],
)
def test_refusal_names_what_is_wrong(damage: str, named: str, saved: Path) -> None:
    """Where there is a name to give."""
    DAMAGE[damage](saved)
    with pytest.raises(UserError, match=named):
        restore_model(load_checkpoint(saved), CPU)


@pytest.mark.parametrize("share", np.linspace(0, 0.999, 25))
def test_checkpoint_cut_anywhere_is_refused(share: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="cannot be used"):
        load_checkpoint(saved)


def test_checkpoint_with_a_flipped_bit_is_refused_or_the_same(saved: Path, rng: np.random.Generator) -> None:
    """Only the padding between the parts and a few notes of the archive mean nothing."""
    content, before, n_refused = saved.read_bytes(), load_checkpoint(saved), 0
    for place in rng.choice(len(content), 200, replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        saved.write_bytes(changed)
        try:
            after = load_checkpoint(saved)
        except UserError:
            n_refused += 1
            continue
        assert all(torch.equal(after.weights[name], value) for name, value in before.weights.items())
        assert replace(after, weights={}) == replace(before, weights={})
    assert n_refused > 50


@pytest.mark.parametrize(
    ("value", "pattern", "expected"),
    [
        (3, 4.5, []),
        (True, 1, ["x is a bool, not a number"]),
        (None, 1.0, ["x is a NoneType, not a number"]),
        ([1, "a"], (2, "b"), []),
        ([1], [1, 2], ["x is a list of 1, not a list of 2"]),
        ({"a": 1}, {"b": 1}, ["x.b is missing", "x.a is unknown"]),
        ({"a": {"b": [0, "c"]}}, {"a": {"b": [0, 1]}}, ["x.a.b.1 is a str, not a number"]),
        (torch.zeros(2, 3), torch.ones(2, 3), []),
        (torch.zeros(2), torch.zeros(3), ["x is torch.float32 [2], not torch.float32 [3]"]),
        (torch.zeros(2), [0.0, 0.0], ["x is torch.float32 [2], not a list of 2"]),
        (torch.zeros(2).to_sparse(), torch.zeros(2), ["x is torch.sparse_coo, not torch.float32 [2]"]),
        ({"a": 1}, 2, ["x is a dict, not a number"]),
        ([1], 2, ["x is a list of 1, not a number"]),
    ],
)
def test_misfits(value: object, pattern: object, expected: list[str]) -> None:
    """Values may differ, what holds them may not."""
    assert misfits(value, pattern, "x.") == expected


class Hostile:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        """Say which folder."""
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_hostile_file_would_act_on_a_naive_reader(tmp_path: Path) -> None:
    """The proof that the next test can fail."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("zipped", [True, False], ids=["torch", "pickle"])
@pytest.mark.parametrize("field", [None, "config", "weights", "training"])
def test_hostile_file_is_not_executed(zipped: bool, field: str | None, saved: Path) -> None:
    """Nor does the message advise to turn the safety off, as torch's does."""
    marker = saved.with_name("marker")
    content: Any = Hostile(marker)
    if field is not None:
        content = {**torch.load(saved, weights_only=True), field: content}
    if zipped:
        torch.save(content, saved)
    else:
        saved.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError) as error:
        load_checkpoint(saved)
    assert not marker.exists()
    assert error.value.code == 2
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


# ---- writing in one step --------------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), Interrupted(15), ValueError()])
def test_failed_write_leaves_the_old_file(fault: BaseException, tmp_path: Path) -> None:
    """And nothing half written beside it."""
    path = tmp_path / "best.pth"
    path.write_bytes(b"old")
    with pytest.raises(type(fault)), replace_file(path) as file:
        file.write(b"half of the ne")
        raise fault
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["best.pth"]


def test_new_content_is_invisible_until_it_is_complete(tmp_path: Path) -> None:
    """A reader sees the old file to the last moment; folders are made as needed."""
    path = tmp_path / "new" / "folder" / "best.pth"
    with replace_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert listing(path.parent) == ["best.pth"]


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), Interrupted(15)], ids=["full", "stop"]
)
@pytest.mark.parametrize("room", [0, 100, 5000])
def test_fault_inside_torch_save_keeps_its_kind(
    fault: BaseException, room: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk stays an OSError (exit 1) and a signal a signal (exit 143), though torch is in between."""

    class Failing:
        """A file that takes no more than `room` bytes."""

        def __init__(self, file: BinaryIO) -> None:
            self.file, self.left = file, room

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise fault
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    @contextmanager
    def failing_file(path: Path) -> Iterator[Failing]:
        with replace_file(path) as file:
            yield Failing(file)

    old = saved.read_bytes()
    monkeypatch.setattr(model, "replace_file", failing_file)
    with pytest.raises(type(fault)):
        save_checkpoint(saved, make_checkpoint())
    assert saved.read_bytes() == old
    assert listing(saved.parent) == [saved.name]


@pytest.mark.parametrize("name", ["best.pth", "[a] *.pth"])
def test_temporary_files_of_killed_runs_are_removed(name: str, tmp_path: Path) -> None:
    """At once if their process is gone, else after a minute; not those of a run beside us, nor of others."""
    node, gone = platform.node(), subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = [f"{name}.{node}.{gone.pid}.tmp", f"{name}.elsewhere.{gone.pid}.tmp", f"{name}.1.tmp"]
    fresh = [f"{name}.{node}.{os.getppid()}.tmp", f"{name}.far.away.{gone.pid}.tmp", f"{name}.2.tmp"]
    fresh.append(f"{name}.{node}.{10**30}.tmp")  # a number that no process can have
    other = f"a.pth.{node}.{gone.pid}.tmp"
    for file in (*stale, *fresh, other):
        (tmp_path / file).touch()
    for file in (*stale[1:], other):
        os.utime(tmp_path / file, (time.time() - 90, time.time() - 90))
    with replace_file(tmp_path / name):
        pass
    assert listing(tmp_path) == sorted([name, *fresh, other])


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be opened")
def test_folder_is_synced_after_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut could otherwise bring the old file back, though the run has gone on from the new one."""
    steps: list[tuple[bool, bool]] = []  # whether a folder is synced, whether the new file is in place

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        steps.append((stat.S_ISDIR(status.st_mode), (tmp_path / "best.pth").exists()))
        assert steps[-1][0] or status.st_size == len(b"new")  # nothing waits in a buffer

    monkeypatch.setattr(os, "fsync", fsync)
    with replace_file(tmp_path / "best.pth") as file:
        file.write(b"new")
    assert steps == [(False, False), (True, True)]


def test_system_that_syncs_no_folder_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    with monkeypatch.context() as patch, replace_file(tmp_path / "best.pth") as file:
        file.write(b"new")
        patch.setattr(os, "open", refuse)
    assert (tmp_path / "best.pth").read_bytes() == b"new"


def test_read_only_disk_is_told_of_the_file_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a disk refuses even to remove what is not there, and the message named the temporary file."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as error, replace_file(tmp_path / "best.pth"):
        pass
    assert error.value.filename == str(tmp_path / "best.pth")
    assert error.value.strerror == "Read-only file system"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_file_size_limit_leaves_the_old_file(saved: Path) -> None:
    """Of a batch system: torch itself destroys the old file, and says nothing of a limit."""
    resource = pytest.importorskip("resource")
    old, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*best\.pth") as error:
            save_checkpoint(saved, make_checkpoint())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert saved.read_bytes() == old
    assert listing(saved.parent) == [saved.name]


def test_file_in_the_place_of_the_folder_is_an_os_error(tmp_path: Path) -> None:
    """Which the scripts report with its path."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_checkpoint(tmp_path / "file" / "best.pth", make_checkpoint())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_an_os_error(saved: Path) -> None:
    """And the old file is as it was."""
    old = saved.read_bytes()
    saved.parent.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"best\.pth"):
            save_checkpoint(saved, make_checkpoint())
    finally:
        saved.parent.chmod(0o755)
    assert saved.read_bytes() == old


KILLER = """
import multiprocessing, sys, time
from dataclasses import replace
from pathlib import Path
from model import load_checkpoint, save_checkpoint
from tests.test_model import make_checkpoint

def save_for_ever(path, checkpoint, started):
    while True:
        checkpoint = replace(checkpoint, epoch=checkpoint.epoch + 1)
        save_checkpoint(path, checkpoint)
        started.set()

path = Path(sys.argv[1])
fork = multiprocessing.get_context("fork")
for kill in range(12):
    started = fork.Event()
    saver = fork.Process(target=save_for_ever, args=(path, make_checkpoint(), started))
    saver.start()
    started.wait()
    time.sleep(0.003 * kill)
    saver.kill()
    saver.join()
    print(load_checkpoint(path).epoch)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kill_while_saving_always_leaves_a_good_file(tmp_path: Path) -> None:
    """A process that does nothing but save is killed a dozen times, each a little later."""
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "best.pth")],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert result.returncode == 0, result.stderr
    epochs = [int(line) for line in result.stdout.split()]
    assert len(epochs) == 12
    assert max(epochs) > 8  # some were killed after many a save
