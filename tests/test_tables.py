"""Tables of the terminal at 80 and 100 columns: nothing sticks out, no cell is cut, and what matters most stays."""

from dataclasses import replace

import pytest

from terratorch_simpler.plan import Verdict, format_score
from terratorch_simpler.report import full_table, plan_table, report_page
from terratorch_simpler.report.summary import change, criteria, percent, reasons, score, short
from terratorch_simpler.report.table import Column, FittedTable
from terratorch_simpler.sweep import COLUMNS
from terratorch_simpler.sweep.rows import sweep_table
from tests.test_report import HOSTILE, KINDS, PLAN, printed, sweep_rows

BLOCKS = 24
PROBED = {
    "metric": "mean IoU", "judged_on": "cross-validation", "groups": 38, "best_depth": 20, "intact": 0.612,
    "baseline": 0.213, "errors": dict.fromkeys(range(1, BLOCKS + 1), 0.0312),
}  # fmt: skip
SCORES = {depth: 0.4 + 0.01 * depth for depth in range(1, BLOCKS + 1)}
NAMES = ("land cover", "surface water of the whole year, by month", "cloud and shadow")
LARGE = replace(
    PLAN,
    backbone="prithvi_eo_v2_300_tl",
    full_num_blocks=BLOCKS,
    kept_blocks=tuple(range(20)),
    criterion={"name": "probe", "args": {}},
    scores=SCORES,
    votes={19: 0.25, 20: 0.75},
    similarity=[[1.0] * BLOCKS] * BLOCKS,
    parameters={"before": 303_872_000, "after": 255_860_000},
    macs={"before": 12_412_637_568, "after": 10_400_000_000},
    verdict=Verdict("weak", ("land cover: weak, for want of more places than there are.", "cloud and shadow: clear.")),
    overview={
        "criteria": {
            "probe": {"kept_blocks": list(range(20)), "scores": SCORES},
            "block_influence": {"kept_blocks": list(range(0, BLOCKS, 2)), "scores": None},
        },
        "no_answer": {"cka_intervals": "No two blocks are alike."},
        "depths": {
            depth: {"parameters": 12_000_000 * depth, "macs": 517_000_000 * depth, "similarity": 1.0, "recovery_r2": 0.9}
            for depth in range(1, BLOCKS + 1)
        },
        "label_sets": {
            name: {**PROBED, "depth": 20 - number, "level": "unsettled", "scores": SCORES}
            for number, name in enumerate(NAMES)
        },
    },
)  # fmt: skip
ROWS = [
    *({**dict.fromkeys(COLUMNS), **row} for row in sweep_rows(PLAN)),
    {**dict.fromkeys(COLUMNS), "kind": "slimmed", "name": "x", "depth": 12, "width": 1.0,
     "chosen_by": "cka_intervals angular", "kept": " ".join(map(str, range(0, BLOCKS, 2))),
     "parameters": 303_872_000, "macs": 12_412_637_568},
]  # fmt: skip
TABLES = {
    "plan": plan_table(KINDS["whole"]),
    "plan, long names": plan_table(KINDS["hostile"]),
    "show": full_table(KINDS["inner cut"]),
    "show, large": full_table(LARGE),
    "label sets": plan_table(LARGE),
    "sweep": sweep_table(ROWS),
}


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("table", TABLES)
def test_tables_fit_and_no_cell_is_cut(table, width):
    text = printed(TABLES[table], width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


@pytest.mark.parametrize(("width", "there", "gone"), [
    (80, ["303.9 M", "12.4 G", "0.650", "linear probe", "cka_intervals"], ["tiles/s", "linear probe, 95 %"]),
    (100, ["303.9 M", "12.4 G", "CKA to last", "linear probe", "ms per tile"], ["k-NN, 95 %"]),
    (200, ["R²", "MiB", "0.620 to 0.690", "k-NN, 95 %", "tiles/s"], []),
])  # fmt: skip
def test_what_matters_least_is_left_out_of_a_sweep_first(width, there, gone):
    text = printed(TABLES["sweep"], width=width)
    assert [words for words in there if words not in text] == []
    assert [words for words in gone if words in text] == []


def test_only_what_is_the_plan_is_called_chosen():
    assert "chosen" in printed(full_table(PLAN))
    for other in (replace(PLAN, kept_blocks=(0, 1, 4)), replace(PLAN, width=0.5)):
        text = printed(full_table(other))
        assert "chosen" not in text
        assert "as many blocks" in text


def test_with_a_budget_no_other_depth_is_called_better():
    scores = {2: 0.1, 3: 0.2, 4: 0.3}
    assert "best 0.300" in " ".join(reasons(replace(PLAN, scores=scores)))
    budget = {"name": "block_influence", "args": {"drop_blocks": 3}}
    assert "best" not in " ".join(reasons(replace(PLAN, scores=scores, criterion=budget)))


def test_what_a_criterion_chose_is_shown_whatever_is_kept():
    """on_unsettled: half keeps another number of blocks than the criterion."""
    kept = replace(PLAN, kept_blocks=(0, 1, 2, 3))
    assert {each.name: len(each.kept) for each in criteria(kept)}["simpler"] == 3
    assert "none would keep exactly the same blocks" in report_page(kept)  # knee keeps four
    assert "were given the depth that simpler chose" in report_page(kept)


def test_a_width_in_the_page_builds_the_same_encoder():
    assert f"backbone_width: {1 / 3!r}" in report_page(replace(PLAN, width=1 / 3))


def test_criteria_are_rows():
    lines = [line.split("  ") for line in printed(TABLES["sweep"], width=80).splitlines()]
    keeps = f"blocks {', '.join(map(str, range(0, BLOCKS, 2)))}"
    assert [line[-1].strip() for line in lines if line[0] in ("angular", "cka_intervals")] == [keeps, keeps]


def test_label_sets_keep_depth_score_and_verdict_in_a_narrow_terminal():
    text = printed(TABLES["label sets"], width=80)
    assert "20 of 24  0.600 ± 0.031" in text
    assert "unsettled" in text
    assert "constant" not in text
    assert "constant" in printed(TABLES["label sets"], width=120)


def test_text_of_a_sweep_is_only_text():
    rows = [{**ROWS[-1], "kind": "control", "name": f"[red]{HOSTILE}"}]
    text = printed(sweep_table(rows), width=300, force_terminal=True, color_system=None)
    assert "[red]<script>" in text
    assert "\x1b[31m" not in text


def test_columns_go_by_rank():
    table = FittedTable([Column("a", ["1"]), Column("b" * 10, ["2"], 2), Column("c" * 10, ["3"], 1)])
    heads = [printed(table, width=width).splitlines()[0].split() for width in (30, 15, 5)]
    assert heads == [["a", "b" * 10, "c" * 10], ["a", "c" * 10], ["a"]]


def test_numbers_are_written_in_one_way():
    assert change(4_744_322, 5_634_050) == "-15.8 %"
    assert [change(7, 7), change(8, 4), change(None, 3), change(3, 0)] == ["0.0 %", "+100.0 %", "–", "–"]  # noqa: RUF001
    assert [short(number) for number in (303_872_000, 12_412_637_568, 999_960)] == ["303.9 M", "12.4 G", "1.0 M"]
    assert percent(0.25) == "25.0 %"
    assert score(0.6, 0.0312) == "0.600 ± 0.031"
    assert format_score(1e300) == "1e+300"
    text = printed(TABLES["show, large"], width=100)
    assert "parameters     303.9 M  255.9 M  -15.8 %" in text
    assert "MACs per tile   12.4 G   10.4 G  -16.2 %" in text
