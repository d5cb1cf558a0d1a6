"""Numbering of blocks, and plan.json: round trip, and an error that names the key for everything that can be wrong."""

import hashlib
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
JUDGED = {"kept_blocks": [0], "scores": None}
OVERVIEW = {
    "criteria": {
        "simpler": {"kept_blocks": [0, 1], "scores": {2: 0.25}},
        "block_influence": {"kept_blocks": [0, 3], "scores": None},
    },
    "depths": {1: COST, 2: {**COST, "macs": None, "recovery_r2": None}},
}


PLAN_WITH_OVERVIEW = replace(PLAN, overview={**OVERVIEW, "repaired": [[2, 4, 0.5]]})


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
    ("value", "key", "expected"),
    [
        ([], "overview", "Input should be a valid dictionary"),
        ({"criteria": {}}, "overview.depths", "Field required"),
        ({**OVERVIEW, "more": 1}, "overview.more", "Extra inputs are not permitted"),
        (overview(criteria=[]), "overview.criteria", "Input should be a valid dictionary"),
        (overview(depths=None), "overview.depths", "Input should be a valid dictionary"),
        (overview(criteria={"x" * 101: {}}), "overview.criteria.x+.*", "at most 100 characters"),
        (overview(criteria={str(i): JUDGED for i in range(65)}), "overview.criteria", "at most 64 items"),
        (overview(criteria={"knee": {"kept_blocks": [0]}}), "overview.criteria.knee.scores", "Field required"),
        (overview(criteria={"knee": {**JUDGED, "kept_blocks": [4]}}), "overview.*kept_blocks", "block numbers from 0 to 3"),
        (overview(criteria={"knee": {**JUDGED, "kept_blocks": [1, 0]}}), "overview.*kept_blocks", "in ascending order"),
        (overview(criteria={"knee": {**JUDGED, "kept_blocks": "0"}}), "overview.*kept_blocks", "should be a valid list"),
        (overview(criteria={"knee": {**JUDGED, "scores": {"5": 0.1}}}), "overview.*scores.5.*", "at most 4, the number"),
        (overview(criteria={"knee": {**JUDGED, "scores": {"1": None}}}), "overview.*scores.1", "should be a valid number"),
        (overview(depths={"0": COST}), "overview.depths.0.*", "greater than or equal to 1"),
        (overview(depths={"5": COST}), "overview.depths.5.*", "at most 4, the number of blocks"),
        (overview(depths={"1": {**COST, "more": 1}}), "overview.depths.1.more", "Extra inputs are not permitted"),
        (overview(depths={"1": 5}), "overview.depths.1", "should be a valid dictionary"),
        (overview(depths={"1": {**COST, "parameters": None}}), "overview.depths.1.parameters", "should be a valid integer"),
        (overview(depths={"1": {**COST, "parameters": True}}), "overview.depths.1.parameters", "should be a valid integer"),
        (overview(depths={"1": {**COST, "macs": -1}}), "overview.depths.1.macs", "greater than or equal to 0"),
        (
            overview(depths={"1": {**COST, "macs": 2**63}}),
            "overview.depths.1.macs",
            "less than or equal to 9223372036854775807",
        ),
        (overview(depths={"1": {**COST, "similarity": "high"}}), "overview.depths.1.similarity", "should be a valid number"),
        (
            overview(depths={"1": {**COST, "recovery_r2": "good"}}),
            "overview.depths.1.recovery_r2",
            "should be a valid number",
        ),
        (overview(repaired=[[2, 2, 0.5]]), "overview.repaired.0", "a state, a later state and a number"),
        (overview(repaired=[[2, 5, 0.5]]), "overview.repaired.0.1", "at most 4, the number of blocks"),
        (overview(repaired=[[2, 4]]), "overview.repaired.0.2", "Field required"),
    ],
)
def test_wrong_overview_is_refused(tmp_path, value, key, expected):
    path = PLAN.save(tmp_path / "plan.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "overview": value}))
    with pytest.raises(PlanError, match=rf"for key '{key}' in .*{expected}"):
        SlimmingPlan.load(path)


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
        ("format", "onnx", "Input should be 'terratorch-simpler/plan'"),
        ("version", 2, "Input should be 1, the version this package reads"),
        ("version", True, "Input should be 1"),
        ("backbone", 3, "should be a valid string"),
        ("full_num_blocks", 0, "greater than or equal to 1"),
        ("full_num_blocks", 1025, "less than or equal to 1024"),
        ("full_num_blocks", "4", "should be a valid integer"),
        ("kept_blocks", [0, 4], "distinct block numbers from 0 to 3"),
        ("kept_blocks", [], "distinct block numbers"),
        ("kept_blocks", [1, 1], "distinct block numbers"),
        ("kept_blocks", [1, 0], "in ascending order"),
        ("kept_blocks", [0, 1.5], "should be a valid integer"),
        ("kept_blocks", [True], "should be a valid integer"),
        ("kept_blocks", 2, "should be a valid tuple"),
        *(("width", width, "greater than 0") for width in (0, -0.5)),
        *(("width", width, "less than or equal to 1") for width in (1.5, 1e300)),
        *(("width", width, "should be a valid number") for width in (True, "0.5", None, [0.5])),
        ("recovery", "quadratic", r"should match pattern '\^\(none\|linear\|distill\)"),
        ("criterion", "simpler", "should be a valid dictionary"),
        ("criterion", {"name": "simpler"}, "Field required"),
        ("scores", {"2": "high"}, "should be a valid number"),
        ("scores", {"9": 0.1}, "at most 4, the number of blocks"),
        ("votes", [1.0], "should be a valid dictionary"),
        ("similarity", [[1.0]], "should be a 4 x 4 matrix"),
        ("similarity", [[1.0, 2.0, 3.0, None]] * 4, "should be a valid number"),
        ("tiles_seen", -1, "greater than or equal to 0"),
        ("parameters", {"before": 1}, "Field required"),
        ("macs", {"before": 1, "after": "few"}, "should be a valid integer"),
        ("macs", {"before": 2**63, "after": 1}, "less than or equal to 9223372036854775807"),
        ("tiles_seen", 2**63, "less than or equal to 9223372036854775807"),
        ("data", [], "should be a valid dictionary"),
        ("extra", 1, "Unknown key"),
        ("maps", None, "Unknown key"),
    ],
)
def test_wrong_values_name_the_key(tmp_path, key, value, expected):
    path = PLAN.save(tmp_path / "plan.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(PlanError, match=expected) as error:
        SlimmingPlan.load(path)
    assert f"key '{key}" in str(error.value)
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
    with pytest.raises(PlanError, match=r"^(There is no readable plan at .*, expected|Found .* for key 'format' in) .*"):
        SlimmingPlan.load(path)


def test_text_of_a_plan_file(tmp_path):
    text = PLAN_WITH_OVERVIEW.to_json()
    assert hashlib.sha256(text.encode()).hexdigest() == "8fc60889f2a0fa8179d24522c615c69fa39eb9ae38065e4947ccea4d021e0565"
    again = SlimmingPlan.load(PLAN_WITH_OVERVIEW.save(tmp_path / "plan.json"))
    assert again.to_json() == PLAN_WITH_OVERVIEW.to_json() == (tmp_path / "plan.json").read_text()


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match="There is no readable plan at"):
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
