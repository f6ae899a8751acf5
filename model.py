"""Dataset, augmentation, network, the ensemble of networks, and the checkpoint that holds it."""

import copy
import dataclasses
import io
import json
import logging
import math
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from config import MODEL_FIELDS, Config, UserError, note, save_file
from prepare import MFCC, FeatureCache, check_csv_name

# ---- dataset ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Some clips."""

    features: Tensor  # (W, n_features, n_frames) float32, of their windows
    owner: Tensor  # (W,) int64, the clip in the batch that each window belongs to
    targets: Tensor  # (B,) int64, the class of each clip
    deviation: Tensor  # (B, n_features, 1) float32, of its mean from its speaker's voice; 0: not known


class EmotionDataset(Dataset[Batch]):
    """Clips whose features lie in the cache; indexed with a list of clips, since it makes whole batches.

    For training a clip gives one of its windows, drawn anew each time; for evaluation it gives them all.
    """

    def __init__(
        self,
        clips: pd.DataFrame,
        labels: Sequence[str],
        cache: FeatureCache,
        *,
        one_window: bool,
        deviation: Tensor | None = None,
    ) -> None:
        self.first_window = clips.first_window.to_numpy(np.int64)
        self.n_windows = clips.n_windows.to_numpy(np.int64)
        self.targets = np.array([labels.index(emotion) for emotion in clips["emotion"]], np.int64)
        self.cache, self.one_window = cache, one_window
        self.deviation = torch.zeros(len(clips), cache.shape[0], 1) if deviation is None else deviation

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, items: Sequence[int]) -> Batch:
        """The batch of these clips."""
        first, windows = self.first_window[items], self.n_windows[items]
        if self.one_window:
            ids = first + (torch.rand(len(items)).numpy() * windows).astype(np.int64)
            owner = np.arange(len(items))
        else:
            owner = np.repeat(np.arange(len(items)), windows)
            ids = np.concatenate(list(map(np.arange, first, first + windows)))
        features = torch.from_numpy(self.cache.read(ids))
        targets = torch.from_numpy(self.targets[items])
        return Batch(features, torch.from_numpy(owner), targets, self.deviation[items])


# ---- augmentation ----------------------------------------------------------------------------------------


class Augment(nn.Module):
    """Give each training clip another voice, tempo and start, at random, by changing its cepstra.

    Voice: vocal tract length perturbation (VTLP; Jaitly & Hinton 2013, ICML workshop on deep learning for
    audio), for which the mel axis is read off at other places; with the DCT on either side that is one
    matrix on the cepstrum (Pitz & Ney 2005, IEEE Trans. Speech and Audio Processing 13:930).
    """

    def __init__(self, mfcc: MFCC, cfg: Config) -> None:
        super().__init__()
        import librosa

        self.mfcc, self.tempo = mfcc, cfg.tempo
        self.shift = cfg.shift * cfg.sample_rate / cfg.hop_length  # frames
        # A spectrum that is the same in all bands has but the first coefficient.
        self.silence = nn.Buffer(mfcc.dct @ torch.ones(cfg.n_mels))
        mels = np.linspace(0, librosa.hz_to_mel(cfg.sample_rate / 2), cfg.n_mels + 2)[1:-1]  # of the bands
        bands, dct = np.arange(cfg.n_mels), mfcc.dct.double().numpy()
        warps = []
        for power in np.linspace(-1, 1, 41):  # voices from 1 / (1 + vtlp) to 1 + vtlp
            hertz = librosa.mel_to_hz(mels) * (1 + cfg.vtlp) ** power
            source = np.interp(librosa.hz_to_mel(hertz), mels, bands)  # the band that each comes from
            warps.append(dct @ np.maximum(0, 1 - np.abs(source[:, None] - bands)) @ dct.T)
        self.warps = nn.Buffer(torch.from_numpy(np.stack(warps).astype(np.float32)))
        self.degrade = Degrade(cfg) if cfg.recordings == "any" else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, 3 * n_mfcc, T) float32, any device -> the same shape, each clip changed otherwise.

        What comes into view from before or after the window is silence, 80 dB below its loudest band.
        """
        n_clips, _, n_frames = features.shape
        mfcc = features[:, : len(self.mfcc.dct)]
        loudest = (self.mfcc.dct.T @ mfcc).amax(dim=(1, 2))
        silence = ((loudest - 80)[:, None] * self.silence)[:, :, None]  # (B, n_mfcc, 1)
        mfcc = self.warps[torch.randint(len(self.warps), (n_clips,), device=features.device)] @ mfcc

        tempo, start = 2 * torch.rand(2, n_clips, 1, device=features.device) - 1
        frames = torch.arange(n_frames, device=features.device) - start * self.shift
        source = frames * (1 + self.tempo) ** tempo  # (B, T): the frame that each comes from
        left = source.floor().clamp(0, n_frames - 2)
        index = left.long()[:, None].expand_as(mfcc)
        between = (source - left).clamp(0, 1)[:, None]
        moved = torch.lerp(mfcc.gather(2, index), mfcc.gather(2, index + 1), between)
        inside = (source >= 0) & (source <= n_frames - 1)
        return self.mfcc.add_deltas(self.degrade(torch.where(inside[:, None], moved, silence)))


class Degrade(nn.Module):
    """Record clips worse, at random: in a room, with noise or other voices, through a telephone.

    The inverse DCT of a cepstrum is a smooth spectrum, here in n_mfcc bands. In it noise and echo are powers
    that add up, filters are factors, and the difference goes back through the DCT, so that what so few
    coefficients cannot hold stays as it was. The level needs no augmentation, since the network does not hear
    it (EmotionCNNGRU).
    """

    # Fractions of all clips, and of the changed ones; ranges from which each clip draws evenly.
    CHANGED, NOISY, ECHOING, FILTERED = 0.4, 0.7, 0.33, 0.5
    STEADY = 0.67  # of the noise; the rest are other voices
    ENDING = 0.7  # recordings whose noise ends where they end, short of the window
    SNR = (0, 40)  # dB
    FALL = (0, 6)  # dB per octave by which noise falls
    REVERBERATION = (0.15, 0.8)  # seconds in which an echo falls by 60 dB
    ECHO = (-12, 3)  # dB above the direct sound
    LOW_PASS, LOW_PASS_SLOPE = (1.3, 3.4), (24, 150)  # octaves above 1 kHz: 2.5 to 11 kHz; dB per octave
    HIGH_PASS, HIGH_PASS_SLOPE = (-4, -1), (12, 60)  # 60 to 500 Hz; dB per octave
    FLOOR = (35, 80)  # dB below the loudest band: the noise of the microphone

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        import librosa
        import scipy.fft

        n_bands = cfg.n_mfcc
        dct = scipy.fft.dct(np.eye(n_bands), norm="ortho", axis=0) * math.sqrt(cfg.n_mels / n_bands)
        self.dct = nn.Buffer(torch.from_numpy(dct.astype(np.float32)))  # (n_mfcc, n_bands)
        self.to_bands = nn.Buffer(torch.from_numpy(np.linalg.inv(dct).astype(np.float32)))
        mels = np.linspace(0, librosa.hz_to_mel(cfg.sample_rate / 2), 2 * n_bands + 1)
        hertz, width = librosa.mel_to_hz(mels[1::2]), np.diff(librosa.mel_to_hz(mels[::2]))  # of the bands
        self.octaves = nn.Buffer(torch.from_numpy(np.log2(hertz / 1000).astype(np.float32))[:, None])
        self.width = nn.Buffer(torch.from_numpy((width / width.sum()).astype(np.float32))[:, None])
        # The power of noise in a band varies from frame to frame, the less the more bins a band has.
        bins = np.maximum(width * cfg.n_fft / cfg.sample_rate, 1)
        self.ripple = nn.Buffer(torch.from_numpy((4.3 / np.sqrt(bins)).astype(np.float32))[:, None])
        frames = torch.arange(cfg.n_frames)
        self.age = nn.Buffer((frames[None] - frames[:, None]).float() * cfg.hop_length / cfg.sample_rate)

    def forward(self, mfcc: Tensor) -> Tensor:
        """MFCC (B, n_mfcc, T) float32 -> the same shape."""
        chosen = (torch.rand(len(mfcc), device=mfcc.device) < self.CHANGED).nonzero().flatten()
        if not len(chosen):
            return mfcc
        before = self.to_bands @ mfcc[chosen]  # dB, (B', bands, T)
        loudest = before.amax(dim=(1, 2), keepdim=True)
        silent = before.amax(dim=1, keepdim=True) < loudest - 70  # frames of padding
        power = 10 ** ((before - loudest) / 10)
        power = self._add_noise(self._add_echo(power))
        decibels = 10 * power.clamp(min=1e-12).log10() + self._filter(power)
        floor = decibels.amax(dim=(1, 2), keepdim=True) - self._uniform(power, self.FLOOR)
        decibels = torch.logaddexp(decibels * 0.23, floor * 0.23) / 0.23
        decibels = decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - 80) + loudest
        silent &= self._sometimes(power, self.ENDING)
        change = torch.where(silent, 0.0, decibels - before)
        return mfcc.index_add(0, chosen, self.dct @ change)

    def _uniform(self, like: Tensor, limits: tuple[float, float]) -> Tensor:
        """A random number for each clip, (B, 1, 1)."""
        low, high = limits
        return low + (high - low) * torch.rand(len(like), 1, 1, device=like.device)

    def _sometimes(self, like: Tensor, fraction: float) -> Tensor:
        """True for this fraction of the clips, (B, 1, 1)."""
        return torch.rand(len(like), 1, 1, device=like.device) < fraction

    def _bumps(self, like: Tensor) -> Tensor:
        """A random curve of about 3 dB, smooth over the bands, for each clip: (B, bands, 1)."""
        waves = self.dct[1:5]
        return 5 * (torch.randn(len(like), 1, len(waves), device=like.device) @ waves).mT

    def _add_echo(self, power: Tensor) -> Tensor:
        """In some clips the echo of a room."""
        decay = math.log(1e6) / self._uniform(power, self.REVERBERATION)  # of the power, per second
        echo = torch.where(self.age > 0, torch.exp(-decay * self.age.clamp(min=0)), 0.0)  # (B, T, T)
        echo = echo / echo.sum(dim=2, keepdim=True).amax(dim=1, keepdim=True)
        level = 10 ** (self._uniform(power, self.ECHO) / 10) * self._sometimes(power, self.ECHOING)
        return power + level * (power @ echo)

    def _add_noise(self, power: Tensor) -> Tensor:
        """In most clips noise of any colour, or other voices of the batch."""
        frames = (self.width * power).sum(dim=1, keepdim=True)
        heard = frames > 1e-4 * frames.amax(dim=2, keepdim=True)
        signal = (frames * heard).sum(dim=2, keepdim=True) / heard.sum(dim=2, keepdim=True)
        colour = self._bumps(power) - self._uniform(power, self.FALL) * self.octaves  # dB
        steady = 10 ** ((colour + self.ripple * torch.randn_like(power)) / 10)
        voices = power.roll(1, 0) + power.roll((2, 40), (0, 2)) + power.roll((3, 80), (0, 2))
        noise = torch.where(self._sometimes(power, self.STEADY), steady, voices)
        noise = noise / (self.width * noise).sum(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        level = 10 ** (-self._uniform(power, self.SNR) / 10) * self._sometimes(power, self.NOISY)
        return power + noise * signal * level

    def _filter(self, power: Tensor) -> Tensor:
        """A microphone's response, and in some clips a low-pass or high-pass filter: dB, (B, bands, 1)."""
        above = (self.octaves - self._uniform(power, self.LOW_PASS)).clamp(min=0)
        below = (self._uniform(power, self.HIGH_PASS) - self.octaves).clamp(min=0)
        low_pass = above * self._uniform(power, self.LOW_PASS_SLOPE) * self._sometimes(power, self.FILTERED)
        high_pass = below * self._uniform(power, self.HIGH_PASS_SLOPE) * self._sometimes(power, self.FILTERED)
        return self._bumps(power) - low_pass - high_pass


# ---- network ---------------------------------------------------------------------------------------------


class Dropout(nn.Dropout):
    """nn.Dropout with cheaper random numbers on CPU, which take a tenth of a training step there.

    64 bits are drawn at once, enough for four numbers; the probability is exact to 1 / 65,536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        if x.device.type != "cpu" or not (self.training and self.p):
            return super().forward(x)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16).as_strided(x.shape, torch.empty_like(x).stride())  # as x lies in memory
        return x * (bits >= round(2**16 * self.p) - 2**15).to(x.dtype).mul_(1 / (1 - self.p))


def loud_mean(features: Tensor, depth: float) -> Tensor:
    """Features (B, F, T) -> their means (B, F, 1) over the frames that are loud.

    These are at most `depth` below the loudest, in the first coefficient.
    """
    loud = (features[:, :1] >= features[:, :1].amax(dim=2, keepdim=True) - depth).float()
    return features @ loud.mT / loud.sum(dim=2, keepdim=True)


class EmotionCNNGRU(nn.Module):
    """A bidirectional GRU over a convolutional network: features (B, F, T) -> logits (B, C), any T >= 1.

    Convolutions find local patterns and shorten the window, the GRU (Chung et al. 2014, arXiv:1412.3555)
    follows them through time, and attentive statistics pooling (Okabe et al. 2018, arXiv:1803.10963) and the
    maximum sum its states up.
    """

    def __init__(self, cfg: Config, n_classes: int) -> None:
        super().__init__()
        # Part of the network, so that nobody can forget to normalise: mean of each row of features, and one
        # std for all of them. With a std of its own the noise in the deltas of high coefficients would weigh
        # as much as the loudness contour, which costs accuracy (assets/experiments.md).
        self.mean = nn.Buffer(torch.zeros(cfg.n_features, 1))
        self.std = nn.Buffer(torch.ones(()))
        # 1 for the rows of which each window's own mean (see depth) is taken away, all MFCC but the first:
        # cepstral mean normalisation (CMN; Atal 1974, J. Acoust. Soc. Am. 55:1304). It hides voice and
        # microphone, so that networks with and without it err differently, most of all on new speakers.
        self.cmn = nn.Buffer(torch.zeros(cfg.n_features, 1))
        # 1 for the row from which the level of the loudest frame is taken away, the first, where loudness
        # must not decide.
        self.level = nn.Buffer(torch.zeros(cfg.n_features, 1))
        # How far below the loudest frame others still count in the window's mean, as a first coefficient: 30
        # dB, so that silence and the noise in it do not shift the mean.
        self.depth = 30 * math.sqrt(cfg.n_mels)
        widths = [cfg.n_features, *(cfg.conv_channels * (2 + block) // 2 for block in range(cfg.conv_blocks))]
        # Over time alone, but as images of one line: PyTorch has faster kernels for these.
        self.conv = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width_in, width_out, (1, cfg.conv_kernel), padding="same", bias=False),
                    nn.BatchNorm2d(width_out),
                    nn.MaxPool2d((1, 2), ceil_mode=True),  # ceil: the last frame counts
                    nn.LeakyReLU(0.1, inplace=True),  # the same before the maximum, but of twice the numbers
                    Dropout(cfg.conv_dropout),
                )
                for width_in, width_out in pairwise(widths)
            )
        )
        self.gru = nn.GRU(
            widths[-1],
            cfg.gru_hidden,
            cfg.gru_layers,
            batch_first=True,
            bidirectional=True,
            dropout=cfg.dropout if cfg.gru_layers > 1 else 0.0,
        )
        n_states = 2 * cfg.gru_hidden
        self.attention = nn.Sequential(nn.Linear(n_states, 64), nn.Tanh(), nn.Linear(64, 1))
        self.head = nn.Sequential(
            Dropout(cfg.dropout),
            nn.Linear(3 * n_states, cfg.gru_hidden),
            nn.BatchNorm1d(cfg.gru_hidden),
            nn.LeakyReLU(0.1),
            Dropout(cfg.dropout),
            nn.Linear(cfg.gru_hidden, n_classes),
        )

    def forward(self, features: Tensor, deviation: Tensor | None = None) -> Tensor:
        """Features (B, F, T) float32, as MFCC gives them -> logits (B, C) float32.

        `deviation` (B, F, 1) is that of each clip from the voice of its speaker, as far as that is known: the
        voice comes in place of the window's own mean. None: not known.
        """
        return self.head(self.embed(features, deviation)).float()  # type: ignore[no-any-return] # Module

    def embed(self, features: Tensor, deviation: Tensor | None = None) -> Tensor:
        """What the head decides from: mean, std and maximum of the states, (B, 6 * gru_hidden) float32."""
        own_mean = loud_mean(features, self.depth)  # (B, F, 1)
        voice = own_mean if deviation is None else own_mean - deviation
        level = self.level * features.amax(dim=2, keepdim=True)
        x = (features - torch.lerp(self.mean + level, voice, self.cmn)) / self.std
        x = x[:, :, None].to(memory_format=torch.channels_last)  # (B, F, 1, T)
        x = self.conv(x)[:, :, 0]  # (B, channels, T / 2 ** conv_blocks)
        states = self.gru(x.transpose(1, 2))[0].float()  # (B, T', 2 * gru_hidden)
        weights = self.attention(states).float().softmax(dim=1)  # (B, T', 1)
        mean = (weights * states).sum(dim=1)
        variance = (weights * states.square()).sum(dim=1) - mean.square()
        std = variance.clamp(min=1e-5).sqrt()  # at 0 the root has no slope
        return torch.cat([mean, std, states.amax(dim=1)], dim=1)

    def remove_level(self, features: Tensor) -> Tensor:
        """Features without the level of the loudest frame, if this network does not hear it."""
        return features - self.level * features.amax(dim=2, keepdim=True)


class Outputs(NamedTuple):
    """What the networks make of N windows; or of N clips, as means over the windows of each."""

    probabilities: Tensor  # (N, C) float32, not calibrated
    distance: Tensor  # (N,) float32, from the training data

    def of_clips(self, owner: Tensor, n_clips: int) -> "Outputs":
        """Means over windows, (W,) of which `owner` says to which of the clips each belongs."""
        return Outputs(*(mean_over_windows(values, owner, n_clips) for values in self))


def mean_over_windows(values: Tensor, owner: Tensor, n_clips: int) -> Tensor:
    """Values of windows (W, ...), and the clip of each (W,) -> means of clips (n_clips, ...)."""
    total = values.new_zeros(n_clips, *values.shape[1:]).index_add(0, owner, values)
    n_windows = torch.bincount(owner, minlength=n_clips)
    return total / n_windows.view(-1, *[1] * (values.ndim - 1))


class Distance(nn.Module):
    """How far a window is from the speech of the training data; 1 is the limit of what is usual there.

    The Mahalanobis distance (as Lee et al. 2018, arXiv:1807.03888, use it) of means and stds over time of the
    first half of the MFCC. Silence, noise, tones and music lie beyond the limit, and much of what is recorded
    in another way. The level counts only where the networks hear it.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.n_rows, self.hears_level = max(1, cfg.n_mfcc // 2), cfg.recordings == "same"
        self.mean = nn.Buffer(torch.zeros(2 * self.n_rows))
        self.whiten = nn.Buffer(torch.zeros(2 * self.n_rows, 2 * self.n_rows))  # until fit(), nothing is far

    def forward(self, features: Tensor) -> Tensor:
        """Features (W, F, T) -> distances (W,)."""
        away: Tensor = (self.statistics(features) - self.mean) @ self.whiten
        return away.square().sum(dim=1).sqrt()

    def statistics(self, features: Tensor) -> Tensor:
        """Means and stds over time of each window, (W, n_mfcc): what the distance is taken of."""
        mfcc = features[:, : self.n_rows]
        means = mfcc.mean(dim=2)
        if not self.hears_level:
            means = torch.cat([means[:, :1] - mfcc[:, 0].amax(dim=1, keepdim=True), means[:, 1:]], dim=1)
        return torch.cat([means, mfcc.std(dim=2)], dim=1)

    def fit(self, train: Iterable[Tensor], val: Iterable[Tensor]) -> None:
        """Learn from batches of training windows; all but 1.5 % of the validation windows are within 1."""
        statistics = torch.cat([self.statistics(features) for features in train]).double()
        covariance = statistics.T.cov()
        covariance += (1e-3 * covariance.diag() + 1e-3).diag()  # one row may follow from others
        self.mean.copy_(statistics.mean(dim=0))
        self.whiten.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)).T)
        limit = torch.cat([self(features) for features in val]).quantile(0.985)
        self.whiten.div_(limit.clamp(min=1e-3))


class Voices(nn.Module):
    """The voices that a model knows, and whose a window may be.

    Of many voices, those of the training clips, it guesses: linear discriminant analysis (LDA) of means and
    stds over time of all MFCC, with one class more for somebody unknown, who lies where speakers lie (as in
    PLDA; Prince & Elder 2007, ICCV). One voice alone is that of all windows.
    """

    UNKNOWN = 0.1  # probability, before anything was heard, that none of many speaks

    def __init__(self, cfg: Config, n_speakers: int = 0) -> None:
        super().__init__()
        self.n_mfcc, self.depth, n = cfg.n_mfcc, 30 * math.sqrt(cfg.n_mels), 2 * cfg.n_mfcc
        self.voices = nn.Buffer(torch.zeros(n_speakers, cfg.n_features))  # means of their clips' loud_mean
        self.weights = nn.Buffer(torch.zeros(n_speakers))  # how well each is known: n / (n + 4) of n clips
        self.center = nn.Buffer(torch.zeros(n))
        self.project = nn.Buffer(torch.zeros(n, n))  # to where windows of a speaker vary by 1, uncorrelated
        self.places = nn.Buffer(torch.zeros(n_speakers, n))  # of the speakers there
        self.spread = nn.Buffer(torch.zeros(n))  # their variance

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, F, T) -> how far each window is from its speaker's voice, (B, F, 1).

        Each speaker counts with his probability; nobody known is 0 away.
        """
        probabilities = self.identify(features) * self.weights  # (B, S)
        voice = (probabilities[:, :, None] * self.voices).sum(dim=1)  # not @, which autocast would round
        total = probabilities.sum(dim=1, keepdim=True)
        return total[:, :, None] * loud_mean(features, self.depth) - voice[:, :, None]

    def identify(self, features: Tensor) -> Tensor:
        """Features (B, F, T) -> the probability of each speaker, (B, S)."""
        n_speakers = len(self.weights)
        if n_speakers < 2:
            return features.new_ones(len(features), n_speakers)
        place = ((self.statistics(features) - self.center)[:, :, None] * self.project).sum(dim=1)
        known = -(place[:, None] - self.places).square().sum(dim=2) / 2
        known = known + math.log((1 - self.UNKNOWN) / n_speakers)
        variance = 1 + self.spread
        nobody = math.log(self.UNKNOWN) - (place.square() / variance + variance.log()).sum(dim=1) / 2
        return torch.cat([known, nobody[:, None]], dim=1).softmax(dim=1)[:, :-1]

    def statistics(self, features: Tensor) -> Tensor:
        """Means and stds over time of each window, (W, 2 * n_mfcc)."""
        mfcc = features[:, : self.n_mfcc]
        return torch.cat([mfcc.mean(dim=2), mfcc.std(dim=2)], dim=1)

    def fit(self, batches: Iterable[Batch], speakers: Sequence[str]) -> None:
        """Learn the voices in some clips, by their speakers, of whom there are at least two."""
        names = sorted(set(speakers))
        speaker = torch.tensor([names.index(name) for name in speakers])  # of each clip
        means: list[Tensor] = []
        statistics: list[Tensor] = []
        owners: list[Tensor] = []  # of all windows
        for batch in batches:
            owners.append(batch.owner + sum(map(len, means)))
            statistics.append(self.statistics(batch.features).double())
            own = loud_mean(batch.features, self.depth)
            means.append(mean_over_windows(own, batch.owner, len(batch.targets)))
        values, owner = torch.cat(statistics), speaker[torch.cat(owners)]
        places = mean_over_windows(values, owner, len(names))
        covariance = (values - places[owner]).T.cov()
        covariance += (1e-3 * covariance.diag() + 1e-3).diag()  # one row may follow from others
        whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
        center = places.mean(dim=0)
        spread, axes = torch.linalg.eigh(((places - center) @ whiten).T.cov())
        self.center.copy_(center)
        self.project.copy_(whiten @ axes)
        self.spread.copy_(spread.clamp(min=0))
        self._learn(torch.cat(means), speaker, (places - center) @ whiten @ axes)

    def fit_one(self, means: Tensor) -> None:
        """Learn the one voice of some recordings, from the loud_mean (N, F, 1) of each."""
        one = torch.zeros(len(means), dtype=torch.int64, device=means.device)
        self._learn(means, one, torch.zeros(1, len(self.center)))

    def _learn(self, means: Tensor, speaker: Tensor, places: Tensor) -> None:
        """Know speakers at these places (S, 2 * n_mfcc), from means (N, F, 1) of clips and whose they are."""
        n_clips = torch.bincount(speaker)
        self.voices = nn.Buffer(mean_over_windows(means[:, :, 0], speaker, len(places)))
        self.weights = nn.Buffer(n_clips / (n_clips + 4))
        self.places = nn.Buffer(places.to(self.center))


MIN_VARIETY = 0.5  # nats by which recordings differ in emotion, for batch norms to learn from them


class EmotionEnsemble(nn.Module):
    """Networks whose probabilities are averaged, and the features they were trained on.

    Trained from different seeds they err differently (Hansen & Salamon 1990, IEEE Trans. Pattern Analysis
    and Machine Intelligence 12:993).
    """

    DISTANCE_EXPONENT = 2  # how fast confidence falls with the distance from the training data

    def __init__(
        self,
        mfcc: MFCC,
        members: Sequence[nn.Module],
        distance: Distance,
        voices: Voices,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.mfcc = mfcc
        self.members: Any = nn.ModuleList(members)  # of EmotionCNNGRU
        self.distance, self.voices, self.temperature = distance, voices, temperature

    def forward(self, features: Tensor) -> Outputs:
        """Features (B, F, T) of windows -> what the networks make of each.

        Networks with CMN count the more the better the one voice is known, up to twice.
        """
        known = self.voices.weights.sum() if len(self.voices.weights) == 1 else 0
        weights = torch.stack([1 + known * member.cmn.max() for member in self.members])
        deviation = self.voices(features)
        logits = torch.stack([member(features, deviation) for member in self.members])  # (M, B, C)
        probabilities = logits.softmax(dim=2)
        probabilities = (probabilities * (weights / weights.sum())[:, None, None]).sum(dim=0)
        return Outputs(probabilities, self.distance(features))

    @torch.no_grad()
    def adapt(
        self, features: Tensor, owner: Tensor, shifts: Tensor | None = None
    ) -> tuple["EmotionEnsemble", float]:
        """A model that knows the voice in some recordings, whose emotions need not be known.

        What is constant in a speaker's recordings (voice, microphone, room, language) hides the emotion. In
        networks with CMN the mean of the recordings takes the place of the window's own. In all networks
        batch norms take their statistics from the recordings (AdaBN; Li et al. 2016, arXiv:1603.04779), the
        more the more there are, but not where all sound alike: these would take the emotion away.

        Args:
            features: (W, F, T), of the windows of all recordings.
            owner: (W,) int64, the recording that each window belongs to, from 0.
            shifts: (N, F, 1), by how much the emotion of each recording moves its mean, where that is known.

        Returns:
            The model, and how far the recordings differ in emotion by its own view: the mutual information
            of recording and label in nats, at most log(C).
        """
        adapted, n_windows = copy.deepcopy(self), len(features)
        means = mean_over_windows(loud_mean(features, self.voices.depth), owner, int(owner.max()) + 1)
        adapted.voices.fit_one(means if shifts is None else means - shifts)
        chosen = torch.linspace(0, n_windows - 1, min(n_windows, 128), device=owner.device).long()
        features, owner = features[chosen], torch.unique(owner[chosen], return_inverse=True)[1]
        weight = len(chosen) / (len(chosen) + 16)
        adapted.distance.mean.lerp_(self.distance.statistics(features).mean(dim=0), weight)
        if len(chosen) < 2:  # a batch of one has no statistics
            return adapted, 0.0
        norms = [norm for norm in adapted.modules() if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)]
        running = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        trained = [statistic.clone() for statistic in running]
        for norm in norms:
            norm.train().momentum = weight
        adapted(features)
        adapted.eval()
        probabilities = adapted(features).of_clips(owner, int(owner.max()) + 1).probabilities
        entropy = torch.special.entr(probabilities).sum(dim=1)
        variety = (torch.special.entr(probabilities.mean(dim=0)).sum() - entropy.mean()).item()
        gate = min(1.0, max(0.0, (variety - MIN_VARIETY) / 0.2))
        for statistic, before in zip(running, trained, strict=True):
            statistic.copy_(before.lerp(statistic, gate))
        return adapted, variety

    def calibrated(self, outputs: Outputs) -> Tensor:
        """Outputs of N windows or clips -> probabilities (N, C) that can be believed.

        Beyond the limit of what is usual in the training data they come closer to each other.
        """
        excess = outputs.distance[:, None].clamp(1, 3)  # more would leave no order among them
        return calibrate(outputs.probabilities, self.temperature * excess**self.DISTANCE_EXPONENT)


def calibrate(probabilities: Tensor, temperature: float | Tensor) -> Tensor:
    """Temperature scaling (Guo et al. 2017, arXiv:1706.04599) of probabilities (N, C), for honest confidence.

    Above 1 they come closer to each other; their order, and so the label, stays. One temperature, or (N, 1).
    """
    return (probabilities.clamp(min=1e-12).log() / temperature).softmax(dim=1)


# ---- device ----------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda where it works, else cpu. mps is used only when asked for.

    Raises:
        UserError: The machine has no such device, or this PyTorch has no code for it.
    """
    n_cuda = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if n_cuda else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"device = {name!r}: must be auto, cpu, cuda, cuda:NUMBER or mps") from None
    is_missing = device.type == "cuda" and (device.index or 0) >= n_cuda
    if is_missing or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device = {name!r}: not on this machine, which has cpu and {n_cuda} cuda device(s)")
    try:
        torch.ones(1, device=device).add(1).item()  # an old GPU is listed, and fails at the first kernel
    except RuntimeError as error:
        reason = f"{device} does not work with this PyTorch: {str(error).splitlines()[0]}"
        if name != "auto":
            raise UserError(f"device = {name!r}: {reason}: pass --device cpu") from None
        note(f"note: {reason}: using the cpu")
        return torch.device("cpu")
    return device


# ---- checkpoint ------------------------------------------------------------------------------------------

VERSION = 7  # of the file's layout
# The bundled models, by their setting `recordings`.
PRETRAINED = {name: Path(__file__).with_name("assets") / f"pretrained_{name}.pth" for name in ("any", "same")}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model, and what is needed to use and to judge it. Plain types and tensors only."""

    config: Config
    labels: list[str]  # class names in the order of the logits
    mfcc: dict[str, Tensor]  # constants of the features
    members: list[dict[str, Tensor]]  # state of each network, mean and std of the features included
    epochs: list[int]  # the epoch that each network is of
    temperature: float  # of calibrate()
    distance: dict[str, Tensor]  # state of Distance
    voices: dict[str, Tensor]  # state of Voices
    shifts: Tensor  # (C, n_features, 1), by how much each emotion moves the mean of a speaker's clips
    n_clips: dict[str, int]  # training clips of each class
    seen: Tensor  # (n,) int64, sorted short hashes of the clips that it was trained on or chosen by
    environment: dict[str, str]  # versions, commit and processor that it was trained with
    run: str  # names the run that made it

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Checkpoint":
        """Rebuild what dataclasses.asdict gave.

        Raises:
            UserError, KeyError, TypeError: It is of another version.
        """
        return cls(**{**content, "config": Config.from_dict(content["config"])})

    @property
    def summary(self) -> str:
        """What the model is, in one line."""
        networks = f"{len(self.members)} networks" if len(self.members) > 1 else "1 network"
        return f"{networks} trained on {sum(self.n_clips.values()):,} clips of {len(self.labels)} classes"

    def count_seen(self, clips: pd.DataFrame) -> int:
        """How many clips (column audio_hash) it knows from training: what it says of them is no test."""
        return int(torch.isin(short_hashes(clips), self.seen).sum())


def short_hashes(clips: pd.DataFrame) -> Tensor:
    """The column audio_hash as sorted int64, each once: enough to tell clips apart, 8 bytes a clip."""
    return torch.tensor(sorted({int(text[:15], 16) for text in clips.audio_hash}), dtype=torch.int64)


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain types and tensors with torch.save, as save_file does."""
    buffer = io.BytesIO()  # in a file, torch.save turns a full disk into a RuntimeError
    torch.save({"version": VERSION, **content}, buffer)
    save_file(path, buffer.getvalue())


def load_tensors(path: Path) -> dict[str, Any]:
    """Read what save_tensors wrote; nothing in the file is executed, and its checksums are verified.

    Raises:
        UserError: There is no such file, or it is damaged, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: train one with `python train.py`, or name one that is there")
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not look at them
            damaged = archive.testzip()
        with warnings.catch_warnings(action="ignore"):  # torch's, about types that we do not write
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and content.pop("version", 0) == VERSION and not damaged:
            return content
        reason = f"{damaged} has changed" if damaged else f"not a checkpoint of layout {VERSION}"
    except Exception as error:  # whatever a broken or hostile file provokes
        reason = type(error).__name__  # not its text: torch's advises to load the file unsafely
    raise UserError(f"checkpoint {path} cannot be used ({reason}): train a new one with `python train.py`")


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a trained model, as save_file does."""
    save_tensors(path, dataclasses.asdict(checkpoint))


def load_checkpoint(path: Path) -> tuple[Checkpoint, EmotionEnsemble]:
    """Read a trained model, and build it, ready for prediction.

    Raises:
        UserError: The file is missing, damaged, or not a trained model.
    """
    content = load_tensors(path)
    try:
        checkpoint = Checkpoint.from_dict(content)
        for label in checkpoint.labels:
            check_csv_name(label)
        is_whole = bool(checkpoint.members and checkpoint.summary) and 0 < checkpoint.temperature < math.inf
        model = build_ensemble(checkpoint)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {error}"
        raise UserError(f"checkpoint {path} cannot be used: {reason}") from None
    if not is_whole:
        raise UserError(f"checkpoint {path} is no trained model: it has no networks or no temperature")
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise UserError(f"checkpoint {path} cannot be used: its weights are not finite")
    return checkpoint, model


def build_ensemble(checkpoint: Checkpoint) -> EmotionEnsemble:
    """The trained network or networks, in float32 (a file may hold half precision) and evaluation mode.

    Raises:
        UserError: The network in this file is not the one that was trained.
    """
    mfcc = MFCC(checkpoint.mfcc, checkpoint.config.hop_length)
    members = [EmotionCNNGRU(checkpoint.config, len(checkpoint.labels)) for _ in checkpoint.members]
    for member, weights in zip(members, checkpoint.members, strict=True):
        load_weights(member, weights)  # float32 whatever the file holds
    distance = Distance(checkpoint.config)
    load_weights(distance, checkpoint.distance)
    voices = Voices(checkpoint.config, len(checkpoint.voices["weights"]))
    load_weights(voices, checkpoint.voices)
    return EmotionEnsemble(mfcc, members, distance, voices, checkpoint.temperature).eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model its weights, all of them.

    Raises:
        UserError: They are of another network, as after an edit of this file; the message names some.
    """
    own = model.state_dict()
    wrong = {
        "unknown": [name for name in weights if name not in own],
        "missing": [name for name in own if name not in weights],
        "of another shape": [n for n, value in weights.items() if n in own and value.shape != own[n].shape],
    }
    reasons = [f"{', '.join(names[:3])} {what}" for what, names in wrong.items() if names]
    if reasons:
        what = "; ".join(reasons)
        raise UserError(f"weights do not fit the network in model.py: {what}: undo the edit, or train anew")
    model.load_state_dict(weights)


def join(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """One model of the networks of several, whose probabilities are averaged.

    Raises:
        UserError: Their classes, features or networks differ.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        names = [
            n
            for n in MODEL_FIELDS - {"ensemble", "cmn"}
            if getattr(other.config, n) != getattr(first.config, n)
        ]
        if names or other.labels != first.labels:
            what = ", ".join(sorted(names)) or "classes"
            raise UserError(
                f"models of other {what}, of runs {first.run} and {other.run}: they cannot be joined"
            )
    members = [weights for checkpoint in checkpoints for weights in checkpoint.members]
    return dataclasses.replace(
        first,
        config=dataclasses.replace(first.config, ensemble=len(members)),
        members=members,
        epochs=[epoch for checkpoint in checkpoints for epoch in checkpoint.epochs],
        temperature=sum(checkpoint.temperature for checkpoint in checkpoints) / len(checkpoints),
        seen=torch.unique(torch.cat([checkpoint.seen for checkpoint in checkpoints])),
        run=", ".join(checkpoint.run for checkpoint in checkpoints),
    )


# ---- deployment ------------------------------------------------------------------------------------------


class WaveModel(nn.Module):
    """From samples to calibrated probabilities, features included: what export_onnx() writes."""

    def __init__(self, model: EmotionEnsemble) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows (B, n_samples) float32 -> probabilities of each (B, C), and of the clip they make up (C,).

        The clip is calibrated after the mean over its windows, as inference.py does. Third, the distances of
        the windows from the training data, (B,).
        """
        outputs = self.model(self.model.mfcc(windows))
        clip = Outputs(*(values.mean(dim=0, keepdim=True) for values in outputs))
        return self.model.calibrated(outputs), self.model.calibrated(clip)[0], outputs.distance


def export_onnx(path: Path, checkpoint: Checkpoint, model: EmotionEnsemble) -> None:
    """Write a trained model as one ONNX file, for any number of windows, as save_file does.

    Input `windows`, outputs `probabilities`, `clip` and `distance`, as of WaveModel. The metadata, all text,
    are labels (JSON, in the order of the probabilities), sample_rate (Hz), n_samples (of a window),
    temperature (already applied) and model (what it is).

    Raises:
        UserError: The path is no name for it, or a package is missing.
        OSError: It cannot be written.
    """
    if path.suffix != ".onnx" or path.is_dir():  # a checkpoint named by mistake would be lost
        raise UserError(f"export = {str(path)!r}: must be a file whose name ends in .onnx, or a new .pth")
    cfg = checkpoint.config
    example = torch.zeros(2, cfg.n_samples)  # of one window, it would export a model for one
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # packages that are not needed
    try:
        with warnings.catch_warnings(action="ignore"):  # about what is within torch
            program = torch.onnx.export(
                WaveModel(model).eval(),
                (example,),
                input_names=["windows"],
                output_names=["probabilities", "clip", "distance"],
                dynamic_shapes=({0: "batch"},),
                dynamo=True,
                verbose=False,
            )
    except ModuleNotFoundError as error:
        raise UserError(f"export needs {error.name}: pip install --upgrade onnx onnxscript") from None
    assert program is not None
    program.model.metadata_props.update(
        labels=json.dumps(checkpoint.labels, ensure_ascii=False),
        sample_rate=str(cfg.sample_rate),
        n_samples=str(cfg.n_samples),
        temperature=str(checkpoint.temperature),
        model=checkpoint.summary,
    )
    file = program.model_proto
    for part in (*file.graph.node, *file.graph.input, *file.graph.output, *file.graph.value_info):
        part.ClearField("metadata_props")  # a megabyte of source lines and of paths on this machine
    save_file(path, file.SerializeToString())
