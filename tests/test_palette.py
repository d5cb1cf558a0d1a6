"""Colours of the charts: told apart by readers without the receptors for green or red, from one palette, in all media."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from terratorch_simpler.report import palette, plan_figure, summary
from terratorch_simpler.report.charts import draw_criterion
from terratorch_simpler.report.tradeoffs import cards, draw_trade_off, sweep_figure
from tests.test_report import PLAN, sweep_rows
from tests.test_tables import LARGE

# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
READERS = {
    "no green receptors": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no red receptors": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "all receptors": np.eye(3),
}  # fmt: skip
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
WHITE = TO_XYZ.sum(axis=1)
MEDIA = {"light": palette.LIGHT, "dark": palette.DARK, "print": palette.PRINT}
NEUTRAL = {palette.LIGHT[name] for name in palette.NEUTRAL} | {"#000000", "#ffffff"}


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB."""
    t = TO_XYZ @ np.clip(rgb, 0, 1) / WHITE
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def difference(one: str, other: str, reader: str) -> float:
    """CIE 1976 colour difference as a reader sees it."""
    return float(np.linalg.norm(np.subtract(*(lab(np.array(READERS[reader]) @ linear(each)) for each in (one, other)))))


def contrast(one: str, other: str) -> float:
    dark, light = sorted(float(TO_XYZ[1] @ linear(each)) for each in (one, other))
    return (light + 0.05) / (dark + 0.05)


def test_the_measure_itself():
    assert difference("#ffffff", "#000000", "all receptors") == pytest.approx(100, abs=0.1)
    assert difference("#c2371f", "#8a6d00", "no green receptors") < 5  # a red and a brown of one lightness
    assert contrast("#ffffff", "#000000") == pytest.approx(21)


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("reader", READERS)
def test_any_two_colours_that_mark_data_are_told_apart(reader, medium):
    colours = {name: colour for name, colour in MEDIA[medium].items() if name not in palette.NEUTRAL}
    found = {pair: difference(colours[pair[0]], colours[pair[1]], reader) for pair in combinations(colours, 2)}
    assert {pair: value for pair, value in found.items() if value < 15} == {}


@pytest.mark.parametrize("medium", MEDIA)
def test_lines_and_text_stand_out_from_the_paper(medium):
    colours = MEDIA[medium]
    for paper in (colours["paper"], colours["card"]):
        lines = [name for name in colours if name not in (*palette.NEUTRAL, "votes")]
        assert {name: contrast(colours[name], paper) for name in lines if contrast(colours[name], paper) < 2.9} == {}
        assert min(contrast(colours[name], paper) for name in ("ink", "soft")) >= 4.5


def drawn(figure: Figure) -> set[str]:
    """Colours of lines, markers, areas and texts."""
    found = set()
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            continue
        for line in axes.lines:
            found |= {line.get_color(), line.get_markerfacecolor(), line.get_markeredgecolor()}
        patches = [patch for patch in axes.patches if patch.get_fill() and not str(patch.get_gid()).startswith("cell")]
        found |= {patch.get_facecolor() for patch in patches}
        found |= {tuple(colour) for area in axes.collections for colour in area.get_facecolor()}
        found |= {text.get_color() for text in (*axes.texts, *axes.get_yticklabels())}
    return {to_hex(colour) for colour in found if colour != "none"}


def test_charts_use_the_palette_only():
    rows = [
        {**row, "width": width} for row in sweep_rows(PLAN) for width in (1.0, 0.75, 0.5) if row["depth"] or width == 1.0
    ]
    rows[-1]["name"] = "small"
    chart = Figure()
    draw_criterion(chart.subplots(), LARGE.full_num_blocks, summary.criteria(LARGE)[0], LARGE.votes)
    trade_off = Figure()
    draw_trade_off(trade_off.subplots(), rows, "macs", "linear", PLAN)
    data = {colour for name, colour in palette.LIGHT.items() if name not in palette.NEUTRAL}
    for figure in (plan_figure(PLAN), plan_figure(LARGE), sweep_figure(rows), chart, trade_off):
        assert drawn(figure) - NEUTRAL <= data
        assert len(drawn(figure) & data) >= 2
    for card in cards(PLAN, rows):
        assert "var(--" in card.svg
        assert not any(colour in card.svg for colour in data)  # all of them follow light, dark and print


def test_the_page_has_the_colours_of_all_media():
    style = palette.page_colours()
    for colours in MEDIA.values():
        assert all(f"--{name}: {colour};" in style for name, colour in colours.items())
