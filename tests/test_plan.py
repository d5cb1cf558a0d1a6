"""Numbering of blocks, and plan.json: round trip, and an error that names the key for everything that can be wrong."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terratorch_simpler.errors import DepthError, PlanError
from terratorch_simpler.indices import feature_position, resolve_keep
from terratorch_simpler.plan import SlimmingPlan

PLAN = SlimmingPlan(
    backbone="prithvi_eo_tiny",
    full_num_blocks=4,
    kept_blocks=(0, 1),
    criterion={"name": "simpler", "args": {}},
    scores={2: 0.25},
    similarity=[[1.0, 0.5, 0.5, 0.5]] * 4,
    votes={2: 1.0},
    tiles_seen=64,
    rows_seen=1024,
    parameters={"before": 10, "after": 5},
    macs={"before": 100, "after": 50},
    data={"source": "test", "fingerprint": "0"},
    versions={"torch": "2"},
)
COST = {"parameters": 5, "macs": 50, "similarity": 0.5, "recovery_r2": 0.9}
OVERVIEW = {
    "criteria": {
        "simpler": {"kept_blocks": [0, 1], "scores": {2: 0.25}},
        "block_influence": {"kept_blocks": [0, 3], "scores": None},
    },
    "depths": {1: COST, 2: {**COST, "macs": None, "recovery_r2": None}},
}


def test_round_trip(tmp_path):
    assert SlimmingPlan.load(PLAN.save(tmp_path / "deep" / "plan.json")) == PLAN


def test_round_trip_of_what_was_not_chosen(tmp_path):
    plan = replace(PLAN, overview=OVERVIEW)
    assert SlimmingPlan.load(plan.save(tmp_path / "plan.json")) == plan


def test_overview_may_be_absent_or_null(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    raw = json.loads(path.read_text())
    assert "overview" not in raw
    path.write_text(json.dumps({**raw, "overview": None}))
    assert SlimmingPlan.load(path) == PLAN


def overview(**changes) -> dict:
    return {**json.loads(json.dumps(OVERVIEW)), **changes}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "expected an object with 'criteria' and 'depths'"),
        ({"criteria": {}}, "expected an object with 'criteria' and 'depths'"),
        ({**OVERVIEW, "more": 1}, "expected an object with 'criteria' and 'depths'"),
        (overview(criteria=[]), "expected an object with 'criteria' and 'depths'"),
        (overview(depths=None), "expected an object with 'criteria' and 'depths'"),
        (overview(criteria={"x" * 101: {}}), "expected at most 64 criteria with names of at most 100 letters"),
        (overview(criteria={str(i): {"kept_blocks": [0], "scores": None} for i in range(65)}), "expected at most 64"),
        (overview(criteria={"knee": {"kept_blocks": [0]}}), "expected an object with 'kept_blocks' and 'scores'"),
        (overview(criteria={"knee": {"kept_blocks": [4], "scores": None}}), "expected distinct block numbers from 0 to 3"),
        (overview(criteria={"knee": {"kept_blocks": [1, 0], "scores": None}}), "expected block numbers in ascending order"),
        (overview(criteria={"knee": {"kept_blocks": "0", "scores": None}}), "expected a list"),
        (overview(criteria={"knee": {"kept_blocks": [0], "scores": {"5": 0.1}}}), "expected numbers by depth from 1 to 4"),
        (overview(criteria={"knee": {"kept_blocks": [0], "scores": {"1": None}}}), "expected numbers by depth from 1 to 4"),
        (overview(depths={"0": COST}), "expected depths from 1 to 4"),
        (overview(depths={"5": COST}), "expected depths from 1 to 4"),
        (overview(depths={"1": {**COST, "more": 1}}), "expected an object with parameters, macs, similarity, recovery_r2"),
        (overview(depths={"1": 5}), "expected an object with parameters, macs, similarity, recovery_r2"),
        (overview(depths={"1": {**COST, "parameters": None}}), "expected a number as 'parameters'"),
        (overview(depths={"1": {**COST, "parameters": True}}), "expected a number as 'parameters'"),
        (overview(depths={"1": {**COST, "macs": -1}}), "expected a number as 'macs'"),
        (overview(depths={"1": {**COST, "macs": 2**63}}), "expected a number as 'macs'"),
        (overview(depths={"1": {**COST, "similarity": None}}), "expected a number as 'similarity'"),
        (overview(depths={"1": {**COST, "recovery_r2": "good"}}), "expected a number as 'recovery_r2'"),
    ],
)
def test_wrong_overview_is_refused(tmp_path, value, expected):
    path = PLAN.save(tmp_path / "plan.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "overview": value}))
    with pytest.raises(PlanError, match=expected) as error:
        SlimmingPlan.load(path)
    assert "key 'overview'" in str(error.value)


def test_missing_votes_and_scores_are_null(tmp_path):
    plan = replace(PLAN, votes=None, scores=None, similarity=None, data=None, macs=None)
    path = plan.save(tmp_path / "plan.json")
    assert json.loads(path.read_text())["votes"] is None
    assert SlimmingPlan.load(path) == plan


def test_file_has_the_documented_keys(tmp_path):
    raw = json.loads(PLAN.save(tmp_path / "plan.json").read_text())
    assert raw["format"] == "terratorch-simpler/plan"
    assert raw["version"] == 1
    assert set(raw) == {
        *("format", "version", "backbone", "full_num_blocks", "kept_blocks", "width", "recovery", "criterion", "scores"),
        *("similarity", "votes", "tiles_seen", "rows_seen", "parameters", "macs", "data", "versions"),
    }


def test_a_failed_save_leaves_the_old_plan_and_nothing_else(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(PLAN, scores={2: math.nan}).save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("format", "onnx", "expected 'terratorch-simpler/plan'"),
        ("version", 2, "expected 1, the version this package reads"),
        ("version", True, "expected 1"),
        ("backbone", 3, "expected a str"),
        ("full_num_blocks", 0, "expected an integer of at least 1"),
        ("full_num_blocks", "4", "expected an integer"),
        ("kept_blocks", [0, 4], "expected distinct block numbers from 0 to 3"),
        ("kept_blocks", [], "expected distinct block numbers"),
        ("kept_blocks", [1, 1], "expected distinct block numbers"),
        ("kept_blocks", [1, 0], "expected block numbers in ascending order"),
        ("kept_blocks", [0, 1.5], "expected distinct block numbers"),
        ("kept_blocks", [True], "expected distinct block numbers"),
        ("kept_blocks", 2, "expected a list"),
        *(
            ("width", width, "expected a number above 0 and at most 1")
            for width in (0, -0.5, 1.5, True, "0.5", None, [0.5], 1e300)
        ),
        ("recovery", "quadratic", "expected one of none, linear"),
        ("criterion", "simpler", "expected a dict"),
        ("criterion", {"name": "simpler"}, "expected an object with 'name' and 'args'"),
        ("scores", {"2": "high"}, "expected numbers by depth from 1 to 4"),
        ("scores", {"9": 0.1}, "expected numbers by depth"),
        ("votes", [1.0], "expected numbers by depth"),
        ("similarity", [[1.0]], "expected a 4 x 4 matrix"),
        ("similarity", [[1.0, 2.0, 3.0, None]] * 4, "expected a 4 x 4 matrix"),
        ("tiles_seen", -1, "expected an integer of at least 0"),
        ("parameters", {"before": 1}, "expected an object with 'before' and 'after'"),
        ("macs", {"before": 1, "after": "few"}, "expected integers"),
        ("macs", {"before": 2**63, "after": 1}, "expected integers"),
        ("tiles_seen", 2**63, "expected an integer of at least 0"),
        ("data", [], "expected a dict"),
        ("extra", 1, "expected no such key"),
    ],
)
def test_wrong_values_name_the_key(tmp_path, key, value, expected):
    path = PLAN.save(tmp_path / "plan.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(PlanError, match=expected) as error:
        SlimmingPlan.load(path)
    assert f"key '{key}'" in str(error.value)
    assert "plan.json" in str(error.value)


def test_missing_key_is_named(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    raw = json.loads(path.read_text())
    del raw["kept_blocks"]
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="key 'kept_blocks'"):
        SlimmingPlan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"scores": NaN}', "\x00\x01"])
def test_damaged_files_are_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"^Found .* expected .*"):
        SlimmingPlan.load(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match="Found no readable plan at"):
        SlimmingPlan.load(tmp_path / "none.json")


def test_plan_for_another_encoder_is_refused():
    with pytest.raises(PlanError, match=r"full_num_blocks 4, expected 'prithvi_eo_v2_300' with 24"):
        PLAN.check_encoder("prithvi_eo_v2_300", 24)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, "Found keep 0, expected 1 to 4"),
        (5, "Found keep 5, expected 1 to 4"),
        ([], "at least one block number"),
        ([4], "between 0 and 3"),
        ([-1], "between 0 and 3"),
        ([1, 1], "a repeated block"),
        (True, "Found keep True"),
        ("3", "Found keep '3'"),
        (2.0, "Found keep 2.0"),
    ],
)
def test_keep_that_does_not_fit_is_refused(keep, expected):
    with pytest.raises(DepthError, match=expected):
        resolve_keep(keep, 4)


def test_feature_positions_of_the_example_in_the_readme():
    assert [feature_position(i, 5, 24) for i in (5, 11, 17, 23)] == [1, 2, 3, 4]
    assert feature_position(-1, 5, 24) == 4


def test_feature_positions_by_hand():
    # ceil((i + 1) * 5 / 12) - 1 for i = 0 .. 11
    assert [feature_position(i, 5, 12) for i in range(12)] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]


@given(st.integers(1, 40).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_feature_positions_cover_the_kept_blocks_in_order(sizes):
    total, kept = sizes
    positions = [feature_position(i, kept, total) for i in range(total)]
    assert positions == sorted(positions)
    assert set(positions) == set(range(kept))
    assert positions[-1] == kept - 1
    assert positions == [feature_position(i - total, kept, total) for i in range(total)]
    if kept == total:
        assert positions == list(range(total))


def test_feature_index_outside_the_encoder_is_refused():
    with pytest.raises(DepthError, match="Found feature index 24, expected -24 to 23"):
        feature_position(24, 5, 24)
