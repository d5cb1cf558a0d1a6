"""Results on fixed inputs are those of the record."""

import json

import pytest

from tests.golden import FITS, RECORD, differences, record

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::terratorch_simpler.errors.{name}")
    for name in ("FewTilesWarning", "UntrainedEncoderWarning")
]
EXPECTED = json.loads(RECORD.read_text())


@pytest.mark.parametrize("name", [*FITS, "sweep"])
def test_results_are_those_of_the_record(name, scenes, tmp_path):
    assert differences(record(name, scenes, tmp_path), EXPECTED[name]) == []


def test_the_record_holds_nothing_else():
    assert EXPECTED.keys() == {*FITS, "sweep"}


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        ({"a": [1.0, 2]}, {"a": [1.0 + 1e-7, 2]}, []),
        ({"a": [1.0, 2]}, {"a": [1.01, 2]}, ["/a/0: 1.0, expected 1.01"]),
        ({"a": [1.0, 2]}, {"a": [1.0, 3]}, ["/a/1: 2, expected 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["/a: [1], expected [1, 2]"]),
        ({"a": 1}, {"b": 1}, ["/a: only in one", "/b: only in one"]),
        ("12", "13", [": 12, expected 13"]),
        ("0.12", "0.1200001", []),
        ("0 1", "0 2", [": 0 1, expected 0 2"]),
        (1, True, [": 1, expected True"]),
        (None, 0.0, [": None, expected 0.0"]),
    ],
)
def test_differences(found, expected, said):
    assert differences(found, expected) == said
