"""The page, the tables and the figure of a plan: its own numbers, all of them, for plans of every kind, and only text."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from terratorch_simpler import criteria
from terratorch_simpler.cli import main
from terratorch_simpler.plan import SlimmingPlan, Verdict
from terratorch_simpler.report import (
    full_table,
    plan_figure,
    plan_markdown,
    plan_table,
    report_page,
    save_figure,
    save_page,
    summary,
)
from terratorch_simpler.report.summary import MISSING, block_ranges, change, percent, short
from terratorch_simpler.report.tradeoffs import cards, draw_trade_off, sweep_figure

BLOCKS = 6
DEPTHS = range(1, BLOCKS + 1)
SIMILARITY = [[round(1 - abs(i - j) * (0.11 if min(i, j) < 2 else 0.017), 3) for j in range(BLOCKS)] for i in range(BLOCKS)]
PLAN = SlimmingPlan(
    backbone="prithvi_eo_v2_tiny_tl",
    full_num_blocks=BLOCKS,
    kept_blocks=(0, 1, 2),
    criterion={"name": "simpler", "args": {}},
    scores={2: 0.1234, 3: 0.2345, 4: -0.0456},
    similarity=SIMILARITY,
    votes={2: 0.125, 3: 0.75, 4: 0.125},
    tiles_seen=384,
    rows_seen=6144,
    parameters={"before": 6_000_600, "after": 3_000_300},
    macs={"before": 777_000_000, "after": 390_000_000},
    data={
        "source": "GeoTiffTiles", "files": 31, "tiles": 400, "fingerprint": "c0ffee", "input_shape": [6, 224, 224],
        "skipped": {"unreadable": 2, "nodata": 14},
    },
    versions={"torch": "2.9.9", "terratorch": "1.2.11"},
    overview={
        "criteria": {
            "simpler": {"kept_blocks": [0, 1, 2], "scores": {2: 0.1234, 3: 0.2345, 4: -0.0456}},
            "knee": {"kept_blocks": [0, 1, 2, 3], "scores": {depth: 0.011 * depth for depth in DEPTHS}},
            "block_influence": {"kept_blocks": [0, 2, 5], "scores": None},
        },
        "depths": {
            depth: {
                "parameters": 600 + 1_000_000 * depth, "macs": 129_500_000 * depth,
                "similarity": SIMILARITY[depth - 1][-1], "recovery_r2": None if depth == BLOCKS else 0.151 * depth,
            }
            for depth in DEPTHS
        },
    },
)  # fmt: skip
HOSTILE = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">\x1b[31m\ud800"\'&|[link](javascript:1)'
KINDS = {
    "whole": PLAN,
    "older": replace(PLAN, overview=None),
    "too few tiles": replace(PLAN, votes=None, tiles_seen=64, overview=None),
    "inner cut": replace(PLAN, kept_blocks=(0, 2, 5), criterion={"name": "block_influence", "args": {"drop_blocks": 3}},
                         scores=None, votes=None, width=0.5, recovery="linear"),
    "by hand": SlimmingPlan("terramind_v1_tiny", 12, (0, 1), {"name": "fixed", "args": {"keep": 2}},
                            parameters={"before": 10, "after": 4}),
    "bare": SlimmingPlan("some", 3, (0, 1, 2), {"name": "own", "args": {}}),
    "nothing before": replace(PLAN, parameters={"before": 0, "after": 0}, macs=None),
    "flat": replace(PLAN, scores=dict.fromkeys((2, 3, 4), 0.0), similarity=[[1.0] * BLOCKS] * BLOCKS, overview=None),
    "huge": replace(PLAN, scores={2: -1e300, 3: 1e300}, similarity=[[-1e300, 1e300] * 3] * BLOCKS, overview=None),
    "hostile": replace(
        PLAN, backbone=HOSTILE, criterion={"name": HOSTILE, "args": {HOSTILE: [HOSTILE]}}, versions={HOSTILE: HOSTILE},
        data={"source": HOSTILE, HOSTILE: {HOSTILE: 1}, "skipped": {HOSTILE: 3}, "input_shape": {HOSTILE: [1]}},
        overview={"criteria": {HOSTILE: {"kept_blocks": [0], "scores": None}, "x": {"kept_blocks": [1], "scores": {1: 0.5}}},
                  "depths": {}},
    ),
}  # fmt: skip


def sweep_rows(plan: SlimmingPlan) -> list[dict]:
    """Rows as a sweep writes them: every depth, two widths of one, an inner cut, two controls."""
    unmeasured = dict.fromkeys(("linear", "linear_low", "linear_high", "knn", "knn_low", "knn_high", "linear_recovered",
                                "knn_recovered", "similarity", "recovery_r2", "linear_gain", "linear_gain_low",
                                "linear_gain_high", "knn_gain", "knn_gain_low", "knn_gain_high"))  # fmt: skip
    costs = {"throughput": 51.5, "batch_size": 8, "peak_memory_mib": 321.0}
    rows = []
    for depth, width, kept in (*((d, 1.0, range(d)) for d in DEPTHS), (3, 0.5, range(3)), (3, 1.0, (0, 2, 5))):
        accuracy = 0.5 + 0.05 * depth * width
        rows.append(
            {
                **costs, "kind": "slimmed", "name": plan.backbone, "depth": depth, "width": width,
                "kept": " ".join(map(str, kept)), "chosen_by": "simpler knee" if depth == 3 else "",
                "parameters": int(1_000_000 * depth * width), "macs": 129_500_000 * depth, "latency_ms": 1.25 * depth,
                "similarity": SIMILARITY[depth - 1][-1], "recovery_r2": 0.15 * depth if depth < BLOCKS else None,
                "linear": accuracy, "linear_low": accuracy - 0.03, "linear_high": accuracy + 0.04,
                "linear_recovered": accuracy + 0.011, "knn": accuracy - 0.1, "knn_low": accuracy - 0.13,
                "knn_high": accuracy - 0.08, "knn_recovered": accuracy - 0.123,
                "linear_gain": 0.011, "linear_gain_low": -0.002, "linear_gain_high": 0.025,
                "knn_gain": -0.023, "knn_gain_low": -0.04, "knn_gain_high": -0.01,
            }
        )  # fmt: skip
    rows += [
        {**unmeasured, **costs, "kind": "control", "name": name, "depth": 12, "width": 1.0, "kept": "0 1", "chosen_by": "",
         "parameters": 2_500_000, "macs": 10**8, "latency_ms": latency}
        for name, latency in (("prithvi_eo_v2_tiny_tl", 2.5), (HOSTILE, None))
    ]  # fmt: skip
    return rows


class Page(HTMLParser):
    """What is in a page: elements with their attributes and text. Raises if an element is closed by another's end."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        item = {"tag": tag, "attributes": dict(attributes), "text": "", "inside": [e["tag"] for e in self.open]}
        assert len(attributes) == len(item["attributes"]), "an attribute is there twice"
        self.elements.append(item)
        if tag not in self.VOID:
            self.open.append(item)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for item in self.open:
            item["text"] += data

    def all(self, tag: str, class_: str | None = None) -> list[dict]:
        named = [item for item in self.elements if item["tag"] == tag]
        return [item for item in named if class_ is None or class_ in item["attributes"].get("class", "").split()]

    def tips(self) -> list[str]:
        return [item["text"] for item in self.all("title") if "svg" in item["inside"]]

    def table(self, number: int = 0) -> list[list[str]]:
        rows, tables = [], -1
        for item in self.elements:
            tables += item["tag"] == "table"
            if tables == number and item["tag"] == "tr":
                rows.append([])
            elif tables == number and item["tag"] in ("th", "td"):
                rows[-1].append(item)
        return [[cell["text"] for cell in row] for row in rows]


def printed(what, width=100, **kwargs) -> str:
    out = StringIO()
    Console(file=out, width=width, **kwargs).print(what)
    return out.getvalue()


with_rows = pytest.mark.parametrize("rows", [False, True], ids=["plan", "sweep"])


@with_rows
@pytest.mark.parametrize("kind", KINDS)
def test_page_is_whole_and_needs_nothing_else(kind, rows):
    plan = KINDS[kind]
    text = report_page(plan, sweep_rows(plan) if rows else None)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    text.encode("utf-8")
    page = Page(text)
    for item in page.elements:
        for name, value in item["attributes"].items():
            assert not name.startswith("on"), name
            assert name != "style", "the page's policy forbids it"
            if name in ("src", "href", "srcset", "data", "action", "xlink:href"):
                allowed = {"a": ("https://arxiv.org/abs/",), "use": ("#",)}.get(
                    item["tag"], ("data:,", "data:image/png;base64,")
                )
                assert value.startswith(allowed), (item["tag"], value)
    assert not {"iframe", "object", "embed", "base", "form", "img"} & {e["tag"] for e in page.elements}
    (style,), (script,) = page.all("style"), page.all("script")
    assert not any(word in style["text"] for word in ("@import", "url(", "http"))
    assert not any(word in script["text"] for word in ("fetch", "XMLHttp", "http", "import", "innerHTML", "eval"))
    assert page.all("h1")[0]["text"]
    assert len(page.all("h2")) >= 4


@with_rows
def test_text_of_a_plan_is_only_text(rows):
    plan = KINDS["hostile"]
    text = report_page(plan, sweep_rows(plan) if rows else None)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert "hacked" not in page.all("script")[0]["text"]
    assert page.all("h1")[0]["text"].startswith('<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">')
    assert "\x1b" not in text


def test_terminal_is_not_steered_by_a_plan():
    text = printed(full_table(KINDS["hostile"]), force_terminal=True, color_system=None)
    assert "\x1b[31m" not in text
    assert "<script>window.hacked = 1</script>" in text
    text.encode("utf-8")


def test_markdown_of_a_plan_is_only_text():
    text = plan_markdown(KINDS["hostile"])
    assert not set("<[") & set(text.replace("**", ""))
    assert all(line.count("|") in (0, 5) for line in text.splitlines())


def test_numbers_of_the_page_are_those_of_the_plan():
    page = Page(report_page(PLAN))
    told = page.tips()
    for i in range(BLOCKS):
        for j in range(BLOCKS):
            assert f"blocks {i} and {j}: {SIMILARITY[i][j]:.3f}" in told
    for depth, score in PLAN.scores.items():
        assert f"{depth} blocks kept: score {score:.3f}\n{percent(PLAN.votes[depth])} of resamples" in told
        assert f"{depth} blocks kept: {percent(PLAN.votes[depth])} of resamples" in told
    for depth in DEPTHS:
        assert f"{depth} blocks kept: score {0.011 * depth:.3f}" in told
    head, *rows = page.table()
    assert head == ["blocks kept", "score", "votes", "parameters", "MACs per tile", "CKA to the last block",
                    "R² of linear recovery"]  # fmt: skip
    for depth, row in zip(DEPTHS, rows, strict=True):
        cost = PLAN.overview["depths"][depth]
        assert row == [
            f"{depth} (chosen)" if depth == 3 else str(depth),
            f"{PLAN.scores[depth]:.3f}" if depth in PLAN.scores else MISSING,
            percent(PLAN.votes[depth]) if depth in PLAN.votes else MISSING,
            f"{short(cost['parameters'])} ({change(cost['parameters'], 6_000_600)})",
            f"{short(cost['macs'])} ({change(cost['macs'], 777_000_000)})",
            f"{SIMILARITY[depth - 1][-1]:.3f}",
            MISSING if depth == BLOCKS else f"{0.151 * depth:.3f}",
        ]  # fmt: skip
    facts = {item["text"] for item in page.all("dd")}
    assert {
        "3 of 6-50.0 % of the depth",
        "-50.0 %3.0 M of 6.0 M",
        "-49.8 %390.0 M of 777.0 M",
        "75.0 %of resamples choose this depth",
    } <= facts
    assert {
        "384",
        "6,144",
        "GeoTiffTiles",
        "31",
        "400",
        "6 x 224 x 224",
        "2 unreadable, 14 nodata",
        "c0ffee",
        "2.9.9",
    } <= facts
    text = page.all("main")[0]["text"]
    assert "3 blocks (3-5) of the encoder's 6 transformer blocks are deleted before fine-tuning." in text
    assert "gives this depth in 75.0 % of the cases, and 2 blocks in 12.5 %. Look at the whole curve" in text
    assert "Of 2 other criteria, asked on the same tiles, none would keep exactly the same blocks" in text
    assert "from 3 to 4" in text
    assert "Keeps 3 blocks: 0, 2, 5." in text
    assert "backbone: simpler_prithvi_eo_v2_tiny_tl\nbackbone_plan: plan.json" in text
    assert "backbone_keep: 3" in text
    # Without either of these TerraTorch knows no such name.
    assert "trainer:\n  callbacks:\n    - class_path: terratorch_simpler.SimplerCallback" in text
    assert "import terratorch_simpler first:" in text


def test_boundaries_of_kept_blocks_are_drawn():
    def lines(plan):
        return len(Page(report_page(plan)).all("g", "boundary")) // 2  # each across and down

    assert lines(PLAN) == 1
    assert lines(KINDS["inner cut"]) == 4
    assert lines(replace(PLAN, kept_blocks=tuple(range(BLOCKS)))) == 0


def test_sentences_fit_the_plan():
    text = {kind: Page(report_page(plan)).all("main")[0]["text"] for kind, plan in KINDS.items()}
    assert "there have to be 128" in text["too few tiles"]
    assert "Only 64 tiles were seen" in text["too few tiles"]
    assert "Only" not in text["whole"]
    assert "Nothing was measured for this plan" in text["by hand"]
    assert "All 3 transformer blocks of the encoder are kept: nothing gets cheaper." in text["bare"]
    assert "backbone_keep: [0, 2, 5]\nbackbone_width: 0.5" in text["inner cut"]
    assert "either of these builds the same" in text["whole"]
    assert f"What {len(summary.criteria(PLAN))} criteria would keep" in text["whole"]
    assert "Why this depth" in text["by hand"]
    assert "the second without recovery" in text["inner cut"]
    assert "arXiv 2601.22841" in text["inner cut"]
    assert "arXiv 2601.22841" not in text["whole"]
    assert all("arXiv 2603.19873" in told and "more than 10 %" in told for told in text.values())
    firm = Page(report_page(replace(PLAN, votes={3: 0.96, 2: 0.04}))).all("main")[0]["text"]
    assert "in 96.0 % of the cases: it depends little on which tiles were seen" in firm


def test_numbers_of_a_sweep():
    rows = sweep_rows(PLAN)
    page = Page(report_page(PLAN, rows))
    head, *table = page.table(1)
    assert len(table) == len(rows)
    for row, shown in zip(rows, table, strict=True):
        cells = dict(zip(head, shown, strict=True))
        assert cells["parameters"] == short(row["parameters"])
        assert cells["MACs"] == short(row["macs"])
        assert cells["latency, ms"] == (MISSING if row["latency_ms"] is None else f"{row['latency_ms']:.2f}")
        if row["kind"] == "slimmed":
            assert cells["linear probe"] == f"{row['linear']:.3f} ({row['linear_low']:.3f} to {row['linear_high']:.3f})"
            assert cells["k-NN, recovered"] == f"{row['knn_recovered']:.3f}"
        else:
            assert cells["linear probe"] == cells["CKA to the last block"] == MISSING
    picked = [item for item in page.all("tr", "picked") if "simpler knee" in item["text"]]
    assert len(picked) == 1  # not the narrow one, nor the one of inner blocks
    told = page.tips()
    assert "depth 3, blocks 0-2\n3.0 M parameters\naccuracy of a linear probe: 0.650 (0.620 to 0.690)" in told
    assert "depth 3, width 0.5, blocks 0-2\n0.575 (0.545 to 0.615)" in told
    assert "control: prithvi_eo_v2_tiny_tl\n2.50 ms for one tile\nquality not measured" in told
    assert "depth 3, linear: +0.011 (-0.002 to +0.025)" in told
    assert "depth 3, k-NN: -0.023 (-0.040 to -0.010)" in told
    assert "depth 3, R²: 0.450" in told
    assert len([tip for tip in told if "knee" in tip]) == 0
    costs = [f"{cost} against accuracy" for cost in ("Parameters", "MACs", "Latency")]
    series = ["Accuracy by depth", "Quality by width", "Recovery without training", "What recovery gains"]
    assert [item["text"] for item in page.all("h3")][-7:] == costs + series


def test_large_control_does_not_push_the_others_together():
    rows = sweep_rows(PLAN)
    for largest, scale in ((6_000_000, "linear"), (600_000_000, "log")):
        rows[-1]["parameters"] = largest
        axes = Figure().subplots()
        draw_trade_off(axes, rows, "parameters", "linear", PLAN)
        assert axes.get_xscale() == scale


def test_quality_by_width_is_not_a_thicket():
    plan = replace(PLAN, full_num_blocks=24, similarity=None, overview=None)  # plan of 3 blocks
    rows = [{**sweep_rows(PLAN)[0], "depth": depth, "width": width, "linear": 0.5 + 0.02 * depth * width,
             "kept": " ".join(map(str, range(depth)))} for depth in range(1, 25) for width in (1.0, 0.5)]  # fmt: skip
    (card,) = [card for card in cards(plan, rows) if card.title == "Quality by width"]
    svg = Page(card.svg)
    depths = {dot["text"].split("\n")[0].partition(",")[0] for dot in svg.all("title")}
    assert 3 <= len(depths) <= 6  # of 24; that of the plan among them, in the colour of the plan
    assert "depth 3" in depths
    dots = [dot for dot in svg.all("use") if dot["attributes"].get("fill") == "var(--chosen)"]
    assert len(dots) == 2
    assert len(svg.all("use")) - len(svg.all("title")) < 30  # besides the values only ticks


def test_sweep_without_probes_is_judged_by_similarity():
    keep = {"kind", "name", "depth", "width", "kept", "parameters", "similarity"}
    rows = [{key: value if key in keep else None for key, value in row.items()} for row in sweep_rows(PLAN)]
    titles = [item["text"] for item in Page(report_page(PLAN, rows)).all("h3")]
    assert "Parameters against CKA" in titles
    assert not {"Accuracy by depth", "Latency against CKA", "What recovery gains"} & set(titles)


@pytest.mark.parametrize("rows", [[], [{}], [{"kind": "slimmed", "kept": "a b", "depth": float("nan"), "linear": 1}]])
def test_rows_with_little_in_them(rows):
    assert Page(report_page(PLAN, rows)).all("h1")


def test_page_is_written_whole_or_not_at_all(tmp_path):
    path = save_page(report_page(PLAN), tmp_path / "deep" / "report.html")
    assert Page(path.read_text(encoding="utf-8")).all("h1")
    with pytest.raises(UnicodeEncodeError):
        save_page("\ud800", path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert "<h1>" in path.read_text(encoding="utf-8")


def test_same_plan_same_page():
    assert report_page(PLAN) == report_page(PLAN)


def test_encoder_of_very_many_blocks_has_no_million_cells():
    plan = SlimmingPlan("deep", 300, tuple(range(100)), {"name": "simpler", "args": {}}, similarity=[[0.5] * 300] * 300)
    assert len(report_page(plan)) < 300_000


# --- terminal and figure


def test_terminal_tells_every_depth_and_every_rule():
    text = printed(full_table(PLAN))
    (line,) = [line for line in text.splitlines() if "chosen" in line]
    assert line.split() == ["3", "0.234", "75.0", "%", "3.0", "M", "████░░░░", "388.5", "M", "0.949", "0.453", "chosen"]
    assert "knee                  4  0-3" in text
    assert "block_influence       3  0, 2, 5" in text
    assert "  3  67 78 98 ** 98 97" in text
    assert "\x1b" not in text  # no colours in a pipe


def test_heat_map_has_colours_in_a_terminal_and_is_left_out_of_a_narrow_one():
    assert "48;2;253;231;37" in printed(full_table(PLAN), force_terminal=True, color_system="truecolor")
    assert "Similarity of block outputs" not in printed(full_table(PLAN), width=20)


@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_has_tables_and_a_figure(kind, tmp_path):
    plan = KINDS[kind]
    assert "blocks kept" in printed(plan_table(plan), width=400)
    assert printed(full_table(plan), width=80)
    assert max(map(len, printed(full_table(plan), width=80).splitlines())) <= 80
    if plan.similarity is not None:
        assert save_figure(plan_figure(plan), tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["whole", "inner cut", "older", "huge"])
def test_every_panel_names_its_axes(kind):
    for axes in plan_figure(KINDS[kind]).axes:
        texts = " ".join([axes.get_ylabel(), *(text.get_text() for text in axes.texts)])
        assert axes.get_xlabel() or axes.yaxis.label.get_text()  # a scale of colours, or of votes, has one axis
        assert axes.get_xlabel() == "" or texts.strip()
    for axes in sweep_figure(sweep_rows(PLAN)).axes:
        assert axes.get_xlabel() in ("milliseconds for one tile", "MACs per tile in billions")
    assert sweep_figure(sweep_rows(PLAN)).axes[0].get_ylabel() == "accuracy of a linear probe"


def test_trade_offs_say_what_they_show_and_every_point_its_depth():
    rows = sweep_rows(PLAN)
    sentence = "Each point is an encoder with its depth, upper left is better; it shows accuracy of a linear probe on frozen"
    figure = sweep_figure(rows)
    assert sentence in figure.get_suptitle()
    assert {text.get_text() for text in figure.axes[0].texts} == {str(depth) for depth in DEPTHS}
    over_cost = [card for card in cards(PLAN, rows) if " against " in card.title]
    assert len(over_cost) == 3
    for card in over_cost:
        assert sentence in card.words[0][1]
        points = [tip for tip in Page(card.svg).tips() if "accuracy of a linear probe: " in tip]
        assert len(points) == len(rows) - 2  # without the controls
        assert all(tip.startswith("depth ") and " to 0." in tip for tip in points)


def test_points_that_are_close_together_have_their_depth_at_the_end_of_a_line():
    rows = [
        {**row, "latency_ms": 1.0 + 0.004 * number, "linear": 0.6 + 0.0005 * (number % 5), "depth": number + 1}
        for number, row in enumerate(sweep_rows(PLAN)[:1] * 24)
    ]
    rows.append({**rows[0], "latency_ms": 9.0, "linear": 0.9, "depth": 25})
    axes = sweep_figure(rows).axes[0]
    assert sorted(int(text.get_text()) for text in axes.texts) == list(range(1, 26))
    lines = [text.arrow_patch for text in axes.texts if text.arrow_patch is not None]
    assert 5 < len(lines) < 25
    axes.get_figure().draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # of the words alone, without the line
    centres = np.array([((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes])
    apart = np.abs(centres[:, None] - centres) / [min(box.width for box in boxes), min(box.height for box in boxes)]
    assert apart.max(-1)[~np.eye(len(boxes), dtype=bool)].min() > 0.8


def test_intervals_and_baselines_are_drawn():
    axes = Figure().subplots()
    draw_trade_off(axes, sweep_rows(PLAN), "parameters", "linear", PLAN)
    upright = [line for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
    ends = {tuple(line.get_ydata()) for line in upright}
    assert {(row["linear_low"], row["linear_high"]) for row in sweep_rows(PLAN)[:-2]} <= ends
    assert 0.8 in {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"}  # that of all blocks


def test_the_page_gives_the_reasons_of_a_verdict_once():
    reason = "75 % of the resamples choose it."
    plan = replace(PLAN, verdict=Verdict("clear", (reason,)))
    text = Page(report_page(plan)).all("main")[0]["text"]
    assert text.count(reason) == 1
    assert "in 75.0 % of the cases" not in text
    assert "Of the other depths, 2 wins most often, in 12.5 % of the resamples." in text


def test_figure_marks_what_is_kept_and_shows_other_rules():
    figure = plan_figure(KINDS["inner cut"])
    heat = figure.axes[0]
    assert figure.get_suptitle() == (
        "prithvi_eo_v2_tiny_tl: blocks 0, 2, 5 of 6 blocks kept at width 0.5, linear recovery, 384 tiles"
    )
    vertical = {line.get_xdata()[0] for line in heat.lines if line.get_xdata()[0] == line.get_xdata()[-1]} - {-0.02}
    assert {0.5, 1.5, 2.5, 4.5} <= vertical
    others = next(axes for axes in figure.axes if "other criteria" in axes.get_title())
    assert [label.get_text() for label in others.get_yticklabels()] == ["knee: 4", "simpler: 3"]
    assert len([axes for axes in plan_figure(KINDS["older"]).axes if axes.get_title()]) == 2


def test_show_prints_it_all(tmp_path, capsys):
    path = PLAN.save(tmp_path / "plan.json")
    assert main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "first 3 of 6 blocks kept" in out
    assert "What each criterion would keep" in out
    assert "\x1b" not in out


def test_small_words():
    assert block_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert [short(n) for n in (None, 0, 999, 1000, 64_558_080, 322_637_568, 5.9e10)] == [
        *(MISSING, "0", "999", "1.0 k", "64.6 M", "322.6 M", "59.0 G")
    ]  # fmt: skip
    assert json.loads(json.dumps(sweep_rows(PLAN)))  # plain values, as read from a CSV


def test_a_users_own_criterion_brings_its_description_and_papers(monkeypatch):
    class Own(criteria.Fixed):
        name = "own"
        description = "Keeps what <b>I</b> like."
        papers = {"2501.00001": "where I found it"}  # noqa: RUF012

    plan = replace(PLAN, criterion={"name": "own", "args": {}})
    assert "A criterion that is not part of the package." in report_page(plan)
    monkeypatch.setitem(criteria.base._CRITERIA, "own", Own)
    page = report_page(plan)
    assert "Keeps what &lt;b&gt;I&lt;/b&gt; like." in page
    assert "A criterion that is not part of the package." not in page
    assert "2501.00001" in page
    assert ": where I found it" in page
