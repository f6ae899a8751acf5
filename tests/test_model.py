"""Dataset, augmentation, network, ensemble, and the checkpoint file: damaged or hostile ones too."""

import copy
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

import model
import prepare
from config import Config, UserError, save_file
from model import (
    VERSION,
    Augment,
    Batch,
    Degrade,
    Distance,
    Dropout,
    EmotionCNNGRU,
    EmotionEnsemble,
    Voices,
    calibrate,
    load_checkpoint,
    loud_mean,
    mean_over_windows,
    resolve_device,
    save_checkpoint,
    save_tensors,
)
from prepare import ClipFeatures, FeatureCache
from tests.conftest import EMOTIONS, TINY, Trained, make_mfcc, tiny_config
from train import draw_epoch

TINY_CFG = Config(**TINY)


def make_network(cfg: Config = TINY_CFG, seed: int = 0) -> EmotionCNNGRU:
    """A network of three classes with random weights and statistics, in evaluation mode."""
    torch.manual_seed(seed)
    network = EmotionCNNGRU(cfg, 3)
    network.mean[:] = torch.linspace(-1, 1, cfg.n_features)[:, None]
    network.std[...] = 1.5
    return network.eval()


def noise(n_clips: int, n_frames: int, cfg: Config = TINY_CFG) -> Tensor:
    """Features (n_clips, n_features, n_frames) without a pattern."""
    return torch.randn(n_clips, cfg.n_features, n_frames, generator=torch.Generator().manual_seed(1))


# ---- dataset ---------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> tuple[pd.DataFrame, FeatureCache]:
    """Clips of 3, 1 and 2 windows; each window is filled with its clip's number and its own, as in 2.1."""
    cfg = tiny_config(tmp_path)
    cache = FeatureCache(cfg, make_mfcc(cfg))
    for clip, n_windows in enumerate((3, 1, 2)):
        values = [np.full((cfg.n_features, cfg.n_frames), clip + 0.1 * n) for n in range(n_windows)]
        features = np.stack(values).astype(np.float32)
        cache.add((b"%d" % clip, 0, 0), ClipFeatures(features, 1.0, "", ""))
    rows = [row[:2] for row in cache.lookup().values()]
    clips = pd.DataFrame(rows, columns=["first_window", "n_windows"]).assign(
        emotion=["Sad", "Angry", "Suprised"]
    )
    return clips, cache


def test_training_draws_one_window_of_each_clip(stored: tuple[pd.DataFrame, FeatureCache]) -> None:
    """Any of its own, sooner or later each of them, and never another clip's."""
    loader = draw_epoch(stored[0], EMOTIONS, stored[1], TINY_CFG, seed=0)
    seen: dict[int, set[float]] = {0: set(), 1: set(), 2: set()}
    for _ in range(60):
        for features, _, targets, _ in loader:
            for target, value in zip(targets.tolist(), features[:, 0, 0].tolist(), strict=True):
                seen[target].add(round(value, 1))
    assert seen == {0: {1.0}, 1: {0.0, 0.1, 0.2}, 2: {2.0, 2.1}}  # the first clip is Sad, the second Angry


# ---- augmentation ----------------------------------------------------------------------------------------

STILL = replace(TINY_CFG, vtlp=0, tempo=0, shift=0, n_mfcc=20)  # as many coefficients as bands: no blur


def augment(features: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """Augmented features, and their decibels (B, n_mels, T)."""
    torch.manual_seed(0)
    mfcc = make_mfcc(cfg)
    changed = Augment(mfcc, cfg)(features)
    return changed, mfcc.dct.T @ changed[:, : cfg.n_mfcc]


def from_decibels(decibels: Tensor, cfg: Config) -> Tensor:
    """Features of mel spectra (B, n_mels, T)."""
    mfcc = make_mfcc(cfg)
    return mfcc.add_deltas(mfcc.dct @ decibels)


@pytest.mark.parametrize("n_mfcc", [8, 20])
def test_augmentation_of_no_strength_changes_nothing(n_mfcc: int, rng: np.random.Generator) -> None:
    cfg = replace(STILL, n_mfcc=n_mfcc)
    waves = torch.from_numpy(rng.normal(size=(5, cfg.n_samples)).astype(np.float32))
    features = make_mfcc(cfg)(waves)
    torch.testing.assert_close(augment(features, cfg)[0], features, rtol=0, atol=1e-3)


def test_deltas_are_those_of_the_augmented_coefficients(rng: np.random.Generator) -> None:
    """As librosa computes them."""
    features = torch.from_numpy(rng.normal(size=(4, 24, TINY_CFG.n_frames)).astype(np.float32))
    changed, _ = augment(features, replace(TINY_CFG, vtlp=0.1, tempo=0.2, shift=0.1))
    static, first, second = changed.numpy().reshape(4, 3, 8, -1).swapaxes(0, 1)
    np.testing.assert_allclose(first, librosa.feature.delta(static), atol=1e-3)
    np.testing.assert_allclose(second, librosa.feature.delta(static, order=2), atol=1e-3)


def test_shifted_window_is_filled_up_with_silence() -> None:
    """80 dB below the loudest band, before the clip or after it, and otherwise what was there."""
    cfg = replace(STILL, shift=0.1)  # 6.25 frames
    spectrum = torch.linspace(-30, 5, cfg.n_mels)
    _, decibels = augment(from_decibels(spectrum[None, :, None].expand(64, -1, cfg.n_frames), cfg), cfg)
    is_silent = (decibels + 75).abs().amax(dim=1) < 0.01  # (B, T)
    is_kept = (decibels - spectrum[:, None]).abs().amax(dim=1) < 0.01
    assert (is_silent ^ is_kept).all()
    count = is_silent.sum(dim=1)
    assert 5 <= count.max() <= 7
    assert len(set(count.tolist())) > 3  # each clip has a shift of its own
    at_an_end = [row.tolist() in (sorted(row.tolist()), sorted(row.tolist())[::-1]) for row in is_silent]
    assert all(at_an_end)
    assert is_silent[:, 0].any()
    assert is_silent[:, -1].any()


def test_tempo_changes_by_up_to_the_fraction_given() -> None:
    """A ramp stays one; its slope tells the tempo."""
    cfg = replace(STILL, tempo=0.25)
    ramp = torch.arange(cfg.n_frames).float().expand(64, cfg.n_mels, -1)
    _, decibels = augment(from_decibels(ramp, cfg), cfg)
    steps = decibels[:, 0, 1:].sub(decibels[:, 0, :-1])[:, : int(cfg.n_frames / 1.25) - 2]
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), rtol=0, atol=1e-3)
    slopes = steps[:, 0]
    assert 0.8 <= slopes.min() < 0.9
    assert 1.1 < slopes.max() <= 1.2501


def test_voice_changes_by_up_to_the_fraction_given() -> None:
    """A formant moves by at most so much, up in some clips and down in others, at any frequency."""
    cfg = replace(STILL, vtlp=0.2, n_mels=60, n_mfcc=60, n_fft=1024)
    hertz = librosa.mel_frequencies(cfg.n_mels + 2, fmin=0, fmax=cfg.sample_rate / 2)[1:-1]
    for band in (20, 40):
        bump = torch.from_numpy(-10 * (np.arange(cfg.n_mels) - band) ** 2 / 25).float()
        features = from_decibels(bump[None, :, None].expand(64, -1, cfg.n_frames), cfg)
        found = hertz[augment(features, cfg)[1][:, :, 5].argmax(dim=1)] / hertz[band]
        resolution = hertz[band + 1] / hertz[band]
        assert 1 / 1.2 / resolution <= found.min() < 0.9
        assert 1.1 < found.max() <= 1.2 * resolution


ANY = replace(TINY_CFG, recordings="any")


def noisy_speech(n_clips: int, snr: float, cfg: Config) -> Tensor:
    """Features of demo speech, 0.3 s of it and then padding, with white noise so many dB below."""
    rng, length = np.random.default_rng(0), int(0.3 * cfg.sample_rate)
    waves = np.zeros((n_clips, cfg.n_samples), np.float32)
    for number, wave in enumerate(waves):
        emotion = list(prepare.EMOTIONS)[number % 7]
        speech = prepare.synthesize(emotion, 5.0, rng, rate=cfg.sample_rate)[1000 : 1000 + length]
        wave[:length] = speech + rng.normal(size=length) * speech.std() * 10 ** (-snr / 20)
    return make_mfcc(cfg)(torch.from_numpy(waves))


def test_degraded_cepstra_change_towards_those_of_noisy_waves() -> None:
    """In mean, and mean std over time, of all coefficients but the first."""
    clean, noisy = noisy_speech(64, 60, ANY)[:, :8], noisy_speech(64, 15, ANY)[:, :8]
    torch.manual_seed(0)
    degraded = torch.cat([Degrade(ANY)(clean) for _ in range(8)])
    for statistic in (Tensor.mean, Tensor.std):
        before, after, aim = (statistic(x, dim=2).mean(dim=0)[1:] for x in (clean, degraded, noisy))
        assert torch.cosine_similarity(after - before, aim - before, dim=0) > 0.6


def test_degrading_leaves_some_clips_alone_and_most_padding_silent() -> None:
    clean = noisy_speech(64, 60, ANY)[:, :8]
    torch.manual_seed(0)
    degraded = Degrade(ANY)(clean)
    assert degraded.isfinite().all()
    same = (degraded == clean).all(dim=(1, 2))
    assert 0.1 < same.float().mean() < 0.9
    same_padding = (degraded == clean)[:, :, -3:].all(dim=(1, 2))
    assert same_padding.float().mean() > same.float().mean() + 0.1
    assert not same_padding.all()  # some noise outlasts the clip


def test_distance_tells_silence_noise_and_tones_from_speech(rng: np.random.Generator) -> None:
    cfg = Config(recordings="any", sample_rate=8000, duration=1.0)
    time = np.arange(cfg.n_samples) / cfg.sample_rate
    speech = [
        prepare.synthesize(emotion, voice, rng, rate=cfg.sample_rate)[: cfg.n_samples]
        for emotion in prepare.EMOTIONS
        for voice in rng.uniform(-2, 14, size=60)
    ]
    others = [np.zeros_like(time), rng.normal(size=len(time)) * 0.1, np.sin(2 * np.pi * 440 * time)]
    mfcc = make_mfcc(cfg)
    features = mfcc(torch.from_numpy(np.stack(speech).astype(np.float32)))[torch.randperm(420)]
    distance = Distance(cfg)
    distance.fit(features[:250].split(64), features[250:330].split(64))
    assert (distance(features[330:]) <= 1).float().mean() > 0.9
    assert (distance(mfcc(torch.from_numpy(np.stack(others).astype(np.float32)))) > 1).all()
    louder = features.clone()
    louder[:, 0] += 70
    torch.testing.assert_close(distance(features), distance(louder))


def test_augmentation_and_network_move_to_another_device() -> None:
    """Every constant of theirs; "meta" stands for a GPU, which few machines have."""
    for module in (
        Augment(make_mfcc(TINY_CFG), TINY_CFG),
        EmotionEnsemble(make_mfcc(TINY_CFG), [make_network()], Distance(TINY_CFG), Voices(TINY_CFG, 2)),
    ):
        moved = copy.deepcopy(module).to("meta")
        assert {value.device.type for value in moved.state_dict().values()} == {"meta"}
        moved(noise(2, TINY_CFG.n_frames).to("meta"))


# ---- network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [1, 2, 17, 1000])
def test_clip_of_any_length_alone_has_the_logits_that_it_has_in_a_batch(n_frames: int) -> None:
    network, batch = make_network(), noise(6, n_frames)
    with torch.inference_mode():
        together = network(batch)
        alone = torch.cat([network(clip[None]) for clip in batch])
    assert together.shape == (6, 3)
    assert together.isfinite().all()
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_frames", [1, 17, 26])
def test_first_and_last_frame_count(n_frames: int) -> None:
    """Pooling must not drop the last frame of an odd number."""
    batch = noise(2, n_frames).requires_grad_()
    make_network()(batch).square().sum().backward()
    assert batch.grad is not None
    assert (batch.grad[:, :, [0, -1]].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("n_frames", [1, 26])
def test_every_weight_learns_from_finite_gradients(n_frames: int) -> None:
    """A single state has no deviation, and the root no slope at 0: NaN would go through all weights."""
    network = make_network().train()
    network(noise(8, n_frames)).square().sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    # Batch norm takes the mean away again, and with it the bias before it; so does softmax.
    idle = [name for name, g in gradients.items() if g is not None and g.abs().max() < 1e-12]
    idle = [name for name in idle if not name.endswith(("head.1.bias", "attention.2.bias"))]
    assert not idle or n_frames == 1  # one state: attention has nothing to choose from


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_its_share_and_keeps_the_mean(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.ones(30, 40, 7, 11).to(memory_format=layout)  # no multiple of four
    y = Dropout(0.1).train()(x)
    assert y.is_contiguous(memory_format=layout)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)  # five standard errors
    assert (y == 0).float().mean(dim=(0, 2, 3)).max() < 0.15  # none of the channels more than others
    assert torch.equal(Dropout(0.1).eval()(x), x)


def make_together(cfg: Config, members: list[EmotionCNNGRU]) -> EmotionEnsemble:
    """An ensemble that finds nothing far, and knows no voice."""
    return EmotionEnsemble(make_mfcc(cfg), members, Distance(cfg), Voices(cfg))


def test_ensemble_gives_the_mean_of_probabilities() -> None:
    members = [make_network(seed=seed) for seed in range(3)]
    with torch.inference_mode():
        shares = torch.stack([member(noise(4, 26)).softmax(dim=1) for member in members])
        together = make_together(TINY_CFG, members)(noise(4, 26))
    assert (shares[0] - shares[1]).abs().max() > 1e-3
    torch.testing.assert_close(together.probabilities, shares.mean(dim=0))


def make_ensemble(cmn: int) -> EmotionEnsemble:
    """Two networks for any recordings, with CMN or without, whose batch norms have seen some features."""
    cfg = replace(TINY_CFG, recordings="any")
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        member = EmotionCNNGRU(cfg, 3)
        member.cmn[1 : cfg.n_mfcc] = cmn
        member.train()(noise(16, 26))
        members.append(member.eval())
    return make_together(cfg, members).eval()


@torch.no_grad()
def test_adapted_model_hears_what_is_constant_in_the_recordings_no_more() -> None:
    """Another microphone adds a constant to each coefficient."""
    ensemble, features, owner = make_ensemble(cmn=1), noise(12, 26), torch.arange(12)
    microphone = torch.zeros(TINY_CFG.n_features, 1)
    microphone[1 : TINY_CFG.n_mfcc] = torch.randn(TINY_CFG.n_mfcc - 1, 1)
    here, _ = ensemble.adapt(features, owner)
    there, _ = ensemble.adapt(features + microphone, owner)
    one, other = here(features).probabilities, there(features + microphone).probabilities
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert not torch.allclose(one, here(features + microphone).probabilities, atol=1e-4)
    assert not torch.allclose(one, ensemble(features).probabilities, atol=1e-4)
    assert len(ensemble.voices.weights) == 0  # it stays as it was


@torch.no_grad()
def test_batch_norms_learn_from_varied_recordings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings of one emotion would teach them that emotion, and take it away."""
    ensemble, features = make_ensemble(cmn=0), noise(12, 26)
    before = ensemble.members[0].conv[0][1].running_mean.clone()
    alike, variety = ensemble.adapt(features[:1].expand(12, -1, -1) + 5, torch.arange(12))
    assert variety == pytest.approx(0, abs=1e-5)
    assert torch.equal(alike.members[0].conv[0][1].running_mean, before)
    monkeypatch.setattr(model, "MIN_VARIETY", -1.0)  # as if they differed as much as they can
    varied, _ = ensemble.adapt(features + 5, torch.arange(12))
    after = varied.members[0].conv[0][1].running_mean
    expected = ensemble.members[0].conv[0][0](varied.members[0].std * 0 + _normalised(varied, features + 5))
    torch.testing.assert_close(
        after, before.lerp(expected.mean(dim=(0, 2, 3)), 12 / (12 + 16)), atol=1e-4, rtol=1e-4
    )


def _normalised(ensemble: EmotionEnsemble, features: Tensor) -> Tensor:
    """What the first convolution of a network without CMN gets."""
    member = ensemble.members[0]
    return ((features - member.mean) / member.std)[:, :, None]


@torch.no_grad()
def test_known_emotions_of_the_recordings_are_taken_off_their_voice() -> None:
    ensemble, features = make_ensemble(cmn=1), noise(6, 26)
    shifts = torch.randn(6, TINY_CFG.n_features, 1)
    plain, _ = ensemble.adapt(features, torch.arange(6))
    told, _ = ensemble.adapt(features, torch.arange(6), shifts)
    torch.testing.assert_close(told.voices.voices, plain.voices.voices - shifts.mean(dim=0).T)


def speak(speaker: int, n_clips: int) -> Tensor:
    """Features of a speaker, who is a mean of each MFCC; clips differ a little."""
    generator = torch.Generator().manual_seed(speaker)
    voice = 3 * torch.randn(1, TINY_CFG.n_features, 1, generator=generator)
    return voice + torch.randn(n_clips, TINY_CFG.n_features, 26, generator=generator)


def learn_voices(n_speakers: int) -> tuple[Voices, Tensor]:
    """Voices of some speakers, of 40 clips each, and their true means."""
    voices, features = Voices(TINY_CFG), [speak(number, 40) for number in range(n_speakers)]
    zeros = torch.zeros(40, dtype=torch.int64)
    batches = [Batch(clips, torch.arange(40), zeros, zeros) for clips in features]
    voices.fit(batches, [f"{number:02}" for number in range(n_speakers) for _ in range(40)])
    return voices, torch.stack([loud_mean(clips, voices.depth).mean(dim=0) for clips in features])


def test_speakers_are_told_apart_as_by_discriminant_analysis() -> None:
    """By scikit-learn's, where only speakers who are known come."""
    voices, _ = learn_voices(12)
    train = torch.cat([speak(number, 40) for number in range(12)])
    analysis = LinearDiscriminantAnalysis(solver="eigen")
    analysis.fit(voices.statistics(train).numpy(), np.repeat(np.arange(12), 40))
    heard = torch.cat([speak(number, 44)[40:] for number in range(12)])
    expected = analysis.predict_proba(voices.statistics(heard).numpy())
    probabilities = voices.identify(heard)
    assert (probabilities.argmax(dim=1) == torch.arange(12).repeat_interleave(4)).all()
    known = probabilities / probabilities.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(known.numpy(), expected, atol=0.02)


def test_window_of_a_known_speaker_is_taken_from_his_voice_and_that_of_a_stranger_from_none() -> None:
    voices, means = learn_voices(12)
    heard = speak(3, 44)[40:]
    expected = 40 / 44 * (loud_mean(heard, voices.depth) - means[3])
    torch.testing.assert_close(voices(heard), expected, atol=1e-2, rtol=0)
    stranger = speak(99, 4)
    assert voices(stranger).abs().max() < 0.05 * loud_mean(stranger, voices.depth).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(voices(heard), expected, atol=0.1, rtol=0)


def test_mean_over_windows_is_a_mean_per_clip() -> None:
    windows = torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.4, 0.6], [0.5, 0.5]])
    expected = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(mean_over_windows(windows, torch.tensor([1, 0, 0, 2]), 3), expected)


def test_temperature_scaling_takes_the_root_of_probabilities() -> None:
    """As dividing the logits by it does: the label stays, 0 and 1 are no trouble."""
    before = torch.tensor([[0.64, 0.36, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(calibrate(before, 1.0), before)
    torch.testing.assert_close(
        calibrate(before, 2.0)[0], torch.tensor([0.8, 0.6, 0.0]) / 1.4, atol=1e-5, rtol=0
    )
    assert calibrate(before, 0.5)[0, 0] > 0.75
    assert calibrate(before, 3.0)[1].argmax() == 0


def test_cepstral_mean_normalisation_hides_what_is_constant_in_a_window() -> None:
    """But for the first coefficient, the loudness."""
    network, features = make_network(), noise(4, 24)
    voice = torch.randn(4, TINY_CFG.n_features, 1, generator=torch.Generator().manual_seed(2))
    voice[:, 0] = voice[:, TINY_CFG.n_mfcc :] = 0
    with torch.inference_mode():
        assert not torch.allclose(network(features), network(features + voice), atol=1e-2)
        network.cmn[1 : TINY_CFG.n_mfcc] = 1
        torch.testing.assert_close(network(features), network(features + voice), atol=1e-4, rtol=0)
        features[:, 0] += 1
        assert not torch.allclose(network(features), network(features - 1), atol=1e-2)


def test_network_that_does_not_hear_the_level_ignores_any_gain() -> None:
    network, features = make_network(), noise(4, 24)
    louder = features.clone()
    louder[:, 0] += 30
    with torch.inference_mode():
        assert not torch.allclose(network(features), network(louder), atol=1e-2)
        network.level[0] = 1
        torch.testing.assert_close(network(features), network(louder), atol=1e-4, rtol=0)


def test_silence_does_not_shift_the_mean_of_speech() -> None:
    """Frames more than 30 dB below the loudest are silence."""
    network = EmotionCNNGRU(TINY_CFG, n_classes=3).eval()
    network.cmn[1 : TINY_CFG.n_mfcc] = 1
    seen: list[Tensor] = []
    network.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    speech = noise(4, 24)
    silence = torch.randn(4, TINY_CFG.n_features, 8, generator=torch.Generator().manual_seed(2))
    silence[:, 0] = speech[:, 0].min() - 31 * TINY_CFG.n_mels**0.5
    with torch.inference_mode():
        network(torch.cat([speech, silence], dim=2))
        network(torch.cat([speech, silence + (torch.arange(TINY_CFG.n_features) % 2)[:, None]], dim=2))
    one, other = (inputs[..., :24] for inputs in seen)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_missing_device_is_refused_by_name() -> None:
    """Never another device in silence."""
    with pytest.raises(UserError, match="device = 'cuda:99': not on this machine"):
        resolve_device("cuda:99")
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# ---- checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(trained: Trained, tmp_path: Path) -> Path:
    """A checkpoint file, to do with as one likes."""
    return Path(shutil.copy(trained.cfg.checkpoint, tmp_path))


def test_checkpoint_comes_back_as_it_was_saved(saved: Path) -> None:
    """Fields and predictions, from the wave on: it brings the constants of its features along."""
    before, straight = load_checkpoint(saved)
    save_checkpoint(saved, before)
    after, model = load_checkpoint(saved)
    for name in ("config", "labels", "epochs", "n_clips", "environment", "run", "summary"):
        assert getattr(after, name) == getattr(before, name)
    assert not model.training
    waves = torch.randn(2, TINY_CFG.n_samples, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert all(map(torch.equal, model(model.mfcc(waves)), straight(straight.mfcc(waves))))


def test_file_of_half_precision_gives_the_same_labels(saved: Path) -> None:
    """As README makes the bundled model."""
    full, model = load_checkpoint(saved)
    halves = [{n: v.half() if v.ndim > 1 else v for n, v in member.items()} for member in full.members]
    save_checkpoint(saved, replace(full, members=halves))
    rounded_model = load_checkpoint(saved)[1]
    with torch.inference_mode():
        exact, rounded = (each(30 * noise(50, 26)).probabilities for each in (model, rounded_model))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=2e-2)
    clear = exact.topk(2).values.diff().abs()[:, 0] > 0.04
    assert clear.sum() > 10
    assert torch.equal(rounded.argmax(dim=1)[clear], exact.argmax(dim=1)[clear])


class Hostile:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        """Say which folder."""
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.marker,)  # type: ignore[return-value]


def change(path: Path, **fields: Any) -> None:
    """Write other fields into a checkpoint."""
    save_tensors(path, {**torch.load(path, weights_only=True), **fields})


def flip_a_bit_of_a_weight(path: Path) -> None:
    """Torch itself loads such a file without a word."""
    weights = load_checkpoint(path)[0].members[1]["gru.weight_ih_l0"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weights) + 10] ^= 4
    path.write_bytes(content)


def make_network_another(path: Path) -> None:
    full, _ = load_checkpoint(path)
    save_checkpoint(path, replace(full, config=replace(full.config, gru_hidden=6)))


def make_weights_nan(path: Path) -> None:
    full, _ = load_checkpoint(path)
    save_checkpoint(path, replace(full, members=[{**full.members[0], "std": torch.tensor(np.nan)}]))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "cut late": lambda path: os.truncate(path, path.stat().st_size - 9),
    "flipped bit": flip_a_bit_of_a_weight,
    "other version": lambda path: change(path, version=VERSION - 1),
    "settings of another version": lambda path: change(path, config={"n_mfcc": 8}),
    "no temperature": lambda path: change(path, temperature=float("nan")),
    "no networks": lambda path: change(path, members=[]),
    "clips of no class": lambda path: change(path, n_clips=[1]),
    "another network": make_network_another,
    "diverged": make_weights_nan,
    "a state dict": lambda path: torch.save(make_network().state_dict(), path),
    "hostile": lambda path: torch.save({"version": VERSION, "run": Hostile(path.with_name("marker"))}, path),
    "hostile pickle": lambda path: path.write_bytes(pickle.dumps(Hostile(path.with_name("marker")))),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_bad_checkpoint_is_refused_in_one_line(damage: Callable[[Path], object], saved: Path) -> None:
    """Nothing in it is executed, and the message does not advise to load it unsafely, as torch's does."""
    damage(saved)
    with pytest.raises(UserError) as refusal:
        load_checkpoint(saved)
    message = str(refusal.value)
    assert refusal.value.code == 2
    assert "checkpoint" in message
    assert str(saved) in message
    assert "\n" not in message
    assert "weights_only" not in message
    assert not saved.with_name("marker").exists()


def test_failed_save_leaves_the_old_file(saved: Path) -> None:
    """Under a limit on the size of files, as on a full disk; and nothing half written beside it."""
    checkpoint, _ = load_checkpoint(saved)
    old, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as fault:
            save_checkpoint(saved, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fault.value.filename == str(saved)
    assert saved.read_bytes() == old
    assert [path.name for path in saved.parent.iterdir()] == ["best.pth"]


def test_save_replaces_files_alone(tmp_path: Path) -> None:
    """Not a device, say; and a link still leads to its file."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        save_file(pipe, b"new")
    assert pipe.is_fifo()
    link.symlink_to(tmp_path / "file")
    save_file(link, b"new")
    assert link.is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_save_makes_folders_and_cleans_up_after_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.csv"
    save_file(path, b"old")
    stale = path.with_name(".file.csv.123.tmp")
    stale.write_bytes(b"half of a fi")
    os.utime(stale, (0, 0))
    save_file(path, b"new")
    assert {other.name: other.read_bytes() for other in path.parent.iterdir()} == {"file.csv": b"new"}
