"""Figures and pages: what they show, and that it can be read."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import colors, font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import config
import train
from config import legible, save_figure
from inference import Timeline, plot_timeline, shade, subtitles, timeline_page
from prepare import ENVELOPE_RATE
from tests.conftest import ROOT

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    """What save_figure draws with, and as it was afterwards."""
    with mpl.rc_context(config.STYLE):
        yield


def predict(rows: dict[tuple[str, str], int]) -> pd.DataFrame:
    """Predictions of a number of clips for each pair of true and predicted class."""
    pairs = [pair for pair, count in rows.items() for _ in range(count)]
    table = pd.DataFrame(pairs, columns=["emotion", "predicted"])
    return table.assign(corpus="one", speaker=[f"s{n % 9}" for n in range(len(table))], **{"p(A)": 0.7})


def make_timeline(emotions: str, *, far: str = "", silent: str = "") -> Timeline:
    """A window per letter, one second long; the letters at the places of an x are far off, or silent."""
    count = len(emotions)
    table = pd.DataFrame({"start": np.arange(count) * 1.0, "end": np.arange(count) + 1.0})
    distance = [2.0 if mark == "x" else 0.5 for mark in far.ljust(count)]
    table = table.assign(emotion=[*emotions], confidence=1.0, distance=distance)
    table = table.assign(**{label: np.array([*emotions]) == label for label in "AB"}).astype(
        {"A": float, "B": float}
    )
    loud = [0.0 if mark == "x" else 0.5 for mark in silent.ljust(count)]
    return Timeline(table, np.repeat(np.array(loud, np.float32), ENVELOPE_RATE))


def filled(axes: Axes, label: str) -> list[tuple[float, float, float, float]]:
    """What an area of a label covers: left, right, bottom and top of each piece that has a height."""
    found = [area for area in axes.collections if area.get_label() == label]
    boxes = [path.get_extents() for area in found for path in area.get_paths()]
    return [(box.x0, box.x1, box.y0, box.y1) for box in boxes if box.y1 > box.y0]


# ---- the report ------------------------------------------------------------------------------------------


def test_numbers_stand_out_from_their_cells() -> None:
    """At each percentage, by the contrast that WCAG 2.2 asks of text."""
    numbers = range(50, 101)
    table = predict(
        {(f"c{n}", f"c{n}" if right else "z"): n if right else 100 - n for n in numbers for right in (1, 0)}
    )
    axes = train.plot_confusion(table).axes[0]
    image = axes.images[0]
    colour_of = {"white": 1.05, "black": 0.05}
    assert {text.get_text() for text in axes.texts} == {*map(str, range(101))}
    for text in axes.texts:
        red, green, blue, _ = image.cmap(image.norm(float(text.get_text())))
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        cell = float(np.dot(parts, [0.2126, 0.7152, 0.0722])) + 0.05
        ink = colour_of[str(text.get_color())]
        assert max(cell, ink) / min(cell, ink) >= 4.5, text.get_text()


def test_class_without_clips_has_an_empty_row() -> None:
    axes = train.plot_confusion(predict({("A", "A"): 3, ("A", "C"): 1, ("B", "B"): 2})).axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["A (4)", "B (2)", "C (0)"]
    assert [
        [text.get_text() for text in axes.texts if text.get_position()[1] == row] for row in range(3)
    ] == [*(["75", "0", "25"], ["0", "100", "0"], [])]


@pytest.mark.parametrize("n_right", [2, 50, 98])
def test_interval_does_not_strike_its_number_through(n_right: int) -> None:
    figure = train.plot_scores(predict({("A", "A"): n_right, ("A", "B"): 100 - n_right}))
    figure.draw_without_rendering()
    bars = figure.axes[0]
    assert len(bars.lines) == len(bars.texts) == 2
    for line, text in zip(bars.lines, bars.texts, strict=True):
        assert not line.get_window_extent().padded(5).overlaps(text.get_window_extent())


def test_dots_have_a_legend() -> None:
    """The epochs that were kept, and how many clips are behind a confidence."""
    rows = [(network, epoch, 0.5) for network in (1, 2) for epoch in (1, 2, 3)]
    history = pd.DataFrame(rows, columns=["network", "epoch", "learning_rate"])
    history[["train_loss", "val_loss", "train_accuracy", "val_accuracy"]] = 0.5
    figure = train.plot_history(history, [2, 3])
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["training, with dropout", "validation", "epoch kept"]
    for axes in figure.axes[:2]:
        assert [line.get_xdata() for line in axes.lines if line.get_marker() == "o"] == [[2], [3]]
    legend = train.plot_scores(predict({("A", "A"): 4, ("A", "B"): 4})).axes[1].get_legend()
    assert legend is not None
    assert {"95 % interval", "10% of the clips"} <= {text.get_text() for text in legend.get_texts()}


# ---- names -----------------------------------------------------------------------------------------------


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Files of the fonts that are installed beside matplotlib's own: none, until a test adds some."""
    files: list[str] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    for function in (config.find_fonts, config.number_of):
        function.cache_clear()
    yield files
    for function in (config.find_fonts, config.number_of):
        function.cache_clear()


def draw_names(path: Path, names: list[str]) -> list[str]:
    """Write a figure with names, in which no letter may be missing; returns what it shows."""
    shown: list[str] = []

    def draw() -> Figure:
        shown[:] = legible(names)
        figure = Figure()
        figure.subplots().set_yticks(range(len(names)), shown)
        return figure

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_figure(path, draw)
    return shown


def test_letters_that_no_font_has_become_numbers_with_a_note(
    tmp_path: Path, fonts: list[str], capsys: Capture
) -> None:
    """One number for a name in all figures of a run; what can be shown stays, a formula as it is written."""
    assert not fonts
    assert draw_names(tmp_path / "a.png", ["Sad", "愤怒", "नाम", "$x$"]) == ["Sad", "#1", "#2", r"\$x\$"]
    assert draw_names(tmp_path / "b.png", ["नाम", "Ärger"]) == ["#2", "Ärger"]
    assert capsys.readouterr().err.splitlines() == [
        f"note: {name} is {number} in the figures: no installed font has its letters"
        for name, number in (("愤怒", "#1"), ("नाम", "#2"))
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.pdf", "b.png", "b.pdf"}


def test_letters_are_taken_from_an_installed_font_that_has_them(
    tmp_path: Path, fonts: list[str], capsys: Capture
) -> None:
    """One that cannot be read is no obstacle."""
    (tmp_path / "Sans-Regular.ttf").write_bytes(b"no font")
    stix = Path(mpl.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")
    fonts += [str(tmp_path / "Sans-Regular.ttf"), str(stix)]
    assert draw_names(tmp_path / "a.png", ["Sad", "ᶁad"]) == ["Sad", "ᶁad"]
    assert not capsys.readouterr().err
    assert config.find_fonts("aᶁ")[0] == ("DejaVu Sans", "STIXGeneral")
    assert mpl.rcParams["font.family"] == ["sans-serif"]  # as it was


# ---- timeline --------------------------------------------------------------------------------------------


def test_every_window_is_drawn() -> None:
    """The last one of a pause, and a lone one, too."""
    axes = Figure().subplots()
    shade(axes, np.arange(6.0), [True, False, True, True, False], {"label": "pause"})
    assert filled(axes, "pause") == [(0, 1, 0, 1), (2, 4, 0, 1)]


def test_mean_leaves_out_pauses_and_what_is_far_off() -> None:
    """B was found in these alone; a pause that is far off, too, is a pause."""
    emotions, far, silent = "AAABAABBAA" * 12, "   x  xx  " * 12, "      xx  " * 12
    waveform, strip, stack = plot_timeline(
        make_timeline(emotions, far=far, silent=silent), ["A", "B"], "x"
    ).axes
    assert stack.get_ylabel() == "probability\n(mean of 3 windows)"
    assert filled(stack, "B") == []
    for axes in (waveform, strip, stack):
        pauses, unlike = (filled(axes, label) for label in ("pause", "unlike the\ntraining data"))
        assert pauses[:2] == [(6, 8, 0, 1), (16, 18, 0, 1)]
        assert unlike[:2] == [(3, 4, 0, 1), (13, 14, 0, 1)]
    labels = [text.get_text() for text in stack.figure.legends[0].get_texts()]
    assert labels == ["unlike the\ntraining data", "pause", "B", "A"]


def test_strip_has_the_colour_of_the_label_of_each_window() -> None:
    strip, stack = plot_timeline(make_timeline("AABAB"), ["A", "B"], "x").axes[1:]
    assert stack.get_ylabel() == "probability"  # of so few windows no mean is taken
    areas = {
        colors.to_hex(area.get_facecolor()[0]): area for area in strip.collections if len(area.get_paths())
    }
    spans = {
        colour: [tuple(path.get_extents().intervalx) for path in area.get_paths()]
        for colour, area in areas.items()
    }
    assert spans == {config.COLOURS[0]: [(0, 2), (3, 4)], config.COLOURS[1]: [(2, 3), (4, 5)]}


def test_names_cannot_inject_markup_into_the_page_of_a_timeline() -> None:
    """Labels, the title and the address of the recording are the user's."""
    evil = "</script><script>alert(1)</script><!--"
    timeline = make_timeline("AABA", far="x   ", silent=" x  ")
    renamed = timeline._replace(windows=timeline.windows.rename(columns={"B": evil}))
    page = timeline_page(renamed, ["A", evil], evil, "../a%20b.wav").decode()
    template = (ROOT / "assets" / "timeline.html").read_text()
    assert page.count("<") == template.count("<")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])
    assert (data["title"], data["labels"], data["link"]) == (evil, ["A", evil], "../a%20b.wav")
    assert data["shown"] == [3, 2, 1, 0]  # far off, a pause, the second and the first label
    assert data["edges"] == [0, 1, 2, 3, 4]
    assert len(data["envelope"]) == 4 * data["rate"]


@pytest.mark.parametrize("name", ["mistakes.html", "timeline.html"])
def test_pages_need_nothing_from_elsewhere(name: str) -> None:
    page = (ROOT / "assets" / name).read_text()
    assert page.count("{{data}}") == 1
    assert not re.search(r"https?://|@import|<link|\bsrc=|\bfetch\(", page)


def test_subtitles_have_a_caption_for_each_stretch_of_one_label() -> None:
    """None where it is silent, or unlike the training data."""
    captions = subtitles(make_timeline("AABBBA", far="     x", silent="   x")).decode()
    assert captions == (
        "1\n00:00:00,000 --> 00:00:02,000\nA 100%\n\n"
        "2\n00:00:02,000 --> 00:00:03,000\nB 100%\n\n"
        "3\n00:00:04,000 --> 00:00:05,000\nB 100%\n"
    )
    longer = make_timeline("A" * 3700)
    assert "00:00:00,000 --> 01:01:40,000" in subtitles(longer).decode()
