"""Mutates audio files of every format and feeds them to the extraction: nothing may crash, hang or raise.

    python tests/fuzz.py --files 10000 --seed 0

prints what became of them by format, exits with 1 if one did what it must not, and keeps those as small files
in tests/cases/, over which tests/test_prepare.py runs. Linux only: its patch reaches workers by fork alone.
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prepare
from config import Config

CASES = Path(__file__).parent / "cases"
SLOW = 1.0  # seconds of processor time that no file may take
HUNG = 10  # seconds after which a worker is killed
LARGE = 400  # MB by which no worker may grow
BATCH = 500  # files on disk at a time

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (suffix, options of soundfile.write)
    **{
        f"wav {subtype}": ("wav", {"format": "WAV", "subtype": subtype})
        for subtype in (
            "PCM_U8 PCM_16 PCM_24 PCM_32 FLOAT DOUBLE ULAW ALAW "
            "IMA_ADPCM MS_ADPCM GSM610 G721_32 NMS_ADPCM_16"
        ).split()
    },
    "wavex": ("wav", {"format": "WAVEX"}),
    "flac": ("flac", {"format": "FLAC"}),
    "flac 24": ("flac", {"format": "FLAC", "subtype": "PCM_24"}),
    "ogg vorbis": ("ogg", {"format": "OGG", "subtype": "VORBIS"}),
    "opus": ("opus", {"format": "OGG", "subtype": "OPUS"}),
    "mp3": ("mp3", {"format": "MP3", "bitrate_mode": "CONSTANT"}),
    "mp3 variable": ("mp3", {"format": "MP3", "bitrate_mode": "VARIABLE"}),
    "aiff": ("aiff", {"format": "AIFF"}),
    "aiff FLOAT": ("aif", {"format": "AIFF", "subtype": "FLOAT"}),
    "aiff IMA_ADPCM": ("aiff", {"format": "AIFF", "subtype": "IMA_ADPCM"}),
    "aiff DWVW_16": ("aiff", {"format": "AIFF", "subtype": "DWVW_16"}),
    "aiff GSM610": ("aiff", {"format": "AIFF", "subtype": "GSM610"}),
    "au": ("au", {"format": "AU"}),
    "au ULAW": ("au", {"format": "AU", "subtype": "ULAW"}),
    "au G721_32": ("au", {"format": "AU", "subtype": "G721_32"}),
    "au DOUBLE": ("au", {"format": "AU", "subtype": "DOUBLE"}),
    "caf": ("caf", {"format": "CAF"}),
    "caf ALAC_16": ("caf", {"format": "CAF", "subtype": "ALAC_16"}),
    "caf ALAC_24": ("caf", {"format": "CAF", "subtype": "ALAC_24"}),
    # libsndfile looks at the content: under an accepted name, these are decoded as well.
    **{
        f"{format_} as wav": ("wav", {"format": format_})
        for format_ in "W64 RF64 VOC IRCAM PAF SVX NIST MAT4 MAT5 PVF AVR HTK MPC2K SDS WVE XI".split()
    },
}
SUBTYPES = {"XI": "DPCM_16", "WVE": "ALAW"}  # where libsndfile has no default

# ---- seeds ----------------------------------------------------------------------------------------------


class Seed(NamedTuple):
    """An honest file to start from."""

    format: str
    suffix: str
    content: bytes


def make_seeds(folder: Path, rng: np.random.Generator) -> list[Seed]:
    """Two clips of every format, one channel and two, of a tone in noise that rises and falls."""
    seeds: list[Seed] = []
    for name, (suffix, options) in FORMATS.items():
        subtype = SUBTYPES.get(options["format"])
        for channels in (1, 2):
            rate = 48000 if name == "opus" else 8000 if "as wav" in name else int(rng.choice([16000, 44100]))
            time_ = np.arange(round(rng.uniform(0.1, 0.4) * rate)) / rate
            wave = np.sin(2 * np.pi * rng.uniform(100, 900) * time_) * np.hanning(time_.size)
            clip = 0.4 * wave[:, None] + 0.02 * rng.normal(size=(time_.size, channels))
            path = folder / f"seed.{suffix}"
            try:
                soundfile.write(path, clip, rate, **{"subtype": subtype, **options})
            except soundfile.SoundFileError:  # a format of one channel, or one that is only read
                continue
            seeds.append(Seed(name, suffix, path.read_bytes()))
    assert FORMATS.keys() == {seed.format for seed in seeds}
    return seeds


# ---- mutations ------------------------------------------------------------------------------------------

EXTREMES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62]
WORDS = [b"\x7f\xff\xff\xff", b"\x7f\x7f\xff\xff", b"\x7f\xc0\x00\x00", b"\x7f\x80\x00\x00", b"\xff" * 4]
TAGS = [b"fmt ", b"data", b"fact", b"LIST", b"COMM", b"SSND", b"desc", b"pakt", b"kuki", b"OggS", b"vorbis"]
Mutation = Callable[[bytearray, bytes, np.random.Generator], bytes | bytearray]


def _place(content: bytes | bytearray, rng: np.random.Generator) -> int:
    """Anywhere; in half of the cases in the header."""
    return int(rng.integers(min(len(content), 128 if rng.random() < 0.5 else len(content)) + 1))


def _put(content: bytearray, start: int, piece: bytes) -> bytearray:
    """Overwrite, without making it longer."""
    piece = piece[: max(0, len(content) - start)]
    content[start : start + len(piece)] = piece
    return content


def flip_bits(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """Up to eight."""
    for _ in range(rng.integers(1, 9)):
        if content:
            content[min(_place(content, rng), len(content) - 1)] ^= 1 << int(rng.integers(8))
    return content


def set_field(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """An extreme number, of any width and order of bytes."""
    size = int(rng.choice([1, 2, 4, 8]))
    number = int(rng.choice(EXTREMES)) + int(rng.integers(-1, 2))
    piece = (number % (1 << 8 * size)).to_bytes(size, "big" if rng.random() < 0.5 else "little")
    return _put(content, _place(content, rng), piece)


def set_chunk(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """A number near the name of a chunk."""
    found = [content.find(tag) for tag in TAGS if tag in content]
    if not found:
        return content
    start = int(rng.choice(found)) + 2 * int(rng.integers(0, 16))
    return _put(content, start, rng.bytes(4) if rng.random() < 0.3 else set_field(bytearray(8), b"", rng)[:4])


def truncate(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """At any place."""
    return content[: _place(content, rng)]


def insert(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """Random bytes."""
    start = _place(content, rng)
    return content[:start] + rng.bytes(int(rng.integers(1, 64))) + content[start:]


def remove(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """A few bytes."""
    start = _place(content, rng)
    return content[:start] + content[start + int(rng.integers(1, 64)) :]


def splice(content: bytearray, other: bytes, rng: np.random.Generator) -> bytes:
    """The start of one file and the end of another."""
    return bytes(content[: _place(content, rng)]) + other[_place(other, rng) :]


def duplicate(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """A piece, up to twenty times."""
    start, end = sorted((_place(content, rng), _place(content, rng)))
    return content[:end] + content[start:end] * int(rng.integers(1, 20)) + content[end:]


def zero(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """A run."""
    return _put(content, _place(content, rng), bytes(int(rng.integers(1, 2000))))


def blast(content: bytearray, _: bytes, rng: np.random.Generator) -> bytearray:
    """A run of the largest, infinite or undefined numbers."""
    word = WORDS[rng.integers(len(WORDS))]
    word = word if rng.random() < 0.5 else word[::-1]
    return _put(content, _place(content, rng), word * int(rng.integers(1, 500)))


MUTATIONS: list[Mutation] = [
    flip_bits,
    set_field,
    set_field,
    set_chunk,
    truncate,
    insert,
    remove,
    splice,
    duplicate,
    zero,
    blast,
]


def _crc_table() -> list[int]:
    table: list[int] = []
    for index in range(256):
        crc = index << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(crc)
    return table


CRC_TABLE = _crc_table()


def mend_ogg(content: bytes | bytearray) -> bytearray:
    """Give every page its right checksum, since a decoder sees nothing of a page with a wrong one."""
    out = bytearray(content)
    start = out.find(b"OggS")
    while start >= 0 and start + 27 <= len(out):
        end = start + 27 + out[start + 26] + sum(out[start + 27 : start + 27 + out[start + 26]])
        out[start + 22 : start + 26] = bytes(4)
        crc = 0
        for byte in out[start:end]:
            crc = (crc << 8 ^ CRC_TABLE[crc >> 24 ^ byte]) & 0xFFFFFFFF
        out[start + 22 : start + 26] = crc.to_bytes(4, "little")
        start = out.find(b"OggS", start + 27)
    return out


def mutate(seed: Seed, other: Seed, rng: np.random.Generator) -> bytes:
    """Apply one mutation, or a few."""
    content: bytes | bytearray = bytearray(seed.content)
    for _ in range(rng.geometric(0.6)):
        content = MUTATIONS[rng.integers(len(MUTATIONS))](bytearray(content), other.content, rng)
    if seed.content[:4] == b"OggS" and rng.random() < 0.8:
        content = mend_ogg(content)
    return bytes(content[: 1 << 20])


# ---- examination ----------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of one file."""

    path: Path
    kind: str  # used, warned, refused; or crashed, raised, not finite, slow, large
    text: str = ""
    seconds: float = 0.0  # of processor time
    megabytes: float = 0.0  # that the worker has grown by


GOOD = ("used", "warned", "refused")
EXTRACT = prepare.extract_file


def examine(path: Path, cfg: Config) -> Outcome:
    """Extract a file in a worker and judge what comes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(HUNG)
    size, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    kind, text = "used", ""
    try:
        clip = EXTRACT(path, cfg)
        shape = (cfg.n_features, cfg.n_frames)
        if clip.features.shape != shape or not np.isfinite(clip.features).all() or clip.seconds <= 0:
            kind = "not finite"
        elif clip.warning:
            kind, text = "warned", clip.warning
    except prepare.AudioError as error:
        kind, text = "refused", error.reason
    except Exception as error:
        kind, text = "raised", repr(error)
    finally:
        signal.alarm(0)
    seconds = time.process_time() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size) / 1024
    if megabytes > LARGE:
        kind = "large"
    elif seconds > SLOW:
        kind = "slow"
    return Outcome(path, kind, text, seconds, megabytes)


def examine_all(paths: Sequence[Path], cfg: Config) -> list[Outcome]:
    """In worker processes, the way files are extracted; a crash and a hang cost a file each."""
    extract, prepare.extract_file = prepare.extract_file, examine  # type: ignore[assignment]
    many = len(paths) >= 2 * prepare.CHUNK  # fewer are extracted without a worker, and a crash would be ours
    try:
        results: list[Any] = list((prepare.iter_features if many else prepare._extract_isolated)(paths, cfg))
    finally:
        prepare.extract_file = extract
    return [
        Outcome(result.path, "crashed", result.reason) if isinstance(result, prepare.AudioError) else result
        for result in results
    ]


def minimise(content: bytes, path: Path, kind: str, cfg: Config) -> bytes:
    """Remove what can go with the same outcome, in ever smaller pieces."""

    def still(candidate: bytes) -> bool:
        path.write_bytes(candidate)
        return examine_all([path], cfg)[0].kind == kind

    size = len(content) // 2
    while size > max(8, len(content) // 64):
        start = 0
        while start < len(content):
            candidate = content[:start] + content[start + size :]
            if still(candidate):
                content = candidate
            else:
                start += size
        size //= 2
    return content


# ---- the script -----------------------------------------------------------------------------------------


def fuzz(
    n_files: int, seed: int, cfg: Config
) -> tuple[list[tuple[str, Outcome]], list[tuple[Outcome, bytes]]]:
    """Examine that many mutated files; return (format, outcome) of all, and the content of the finds."""
    rng = np.random.default_rng(seed)
    outcomes: list[tuple[str, Outcome]] = []
    finds: list[tuple[Outcome, bytes]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seeds = make_seeds(folder, rng)
        for first in range(0, n_files, BATCH):
            batch: dict[Path, str] = {}
            for number in range(first, min(first + BATCH, n_files)):
                chosen = seeds[number % len(seeds)]
                path = folder / f"{number}.{chosen.suffix}"
                path.write_bytes(mutate(chosen, seeds[rng.integers(len(seeds))], rng))
                batch[path] = chosen.format
            for outcome in examine_all(list(batch), cfg):
                outcomes.append((batch[outcome.path], outcome))
                if outcome.kind not in GOOD:
                    content = outcome.path.read_bytes()
                    finds.append((outcome, minimise(content, outcome.path, outcome.kind, cfg)))
            for path in batch:
                path.unlink()
            print(f"\r{len(outcomes)} files, {len(finds)} finds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return outcomes, finds


def print_table(outcomes: Sequence[tuple[str, Outcome]]) -> None:
    """What became of the files, by format."""
    kinds = [*GOOD, "crashed", "raised", "not finite", "slow", "large"]
    print(f"{'format':20}{'cases':>7}" + "".join(f"{kind:>11}" for kind in kinds) + "  slowest ms  MB")
    groups: dict[str, list[Outcome]] = {}
    for name, outcome in outcomes:
        groups.setdefault(name, []).append(outcome)
    groups["all"] = [outcome for _, outcome in outcomes]
    for name, group in groups.items():
        counts = Counter(outcome.kind for outcome in group)
        slowest = 1000 * max(outcome.seconds for outcome in group)
        largest = max(outcome.megabytes for outcome in group)
        row = "".join(f"{counts[kind]:11}" for kind in kinds)
        print(f"{name:20}{len(group):7}{row}{slowest:12.0f}{largest:4.0f}")


def main() -> int:
    """Fuzz, print the table, and keep the finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes, finds = fuzz(arguments.files, arguments.seed, Config(num_workers=2))
    print_table(outcomes)
    for number, (outcome, content) in enumerate(finds):
        name = f"{outcome.kind.replace(' ', '-')}-{arguments.seed}-{number}{outcome.path.suffix}"
        where = CASES / name if len(content) <= 2048 else Path(tempfile.gettempdir()) / name
        where.write_bytes(content)
        print(f"{outcome.kind}: {outcome.text}; kept as {where}")
    return 1 if finds else 0


if __name__ == "__main__":
    raise SystemExit(main())
