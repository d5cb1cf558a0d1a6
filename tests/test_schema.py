"""The schema that editors check the callback with: generated from the callback, and right about the configs that ship."""

import runpy
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def generator():
    pytest.importorskip("docstring_parser")
    return runpy.run_path(str(CONFIGS / "schema.py"))


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    schema = yaml.safe_load((CONFIGS / "simpler_callback.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_the_file_is_what_the_callback_gives(generator):
    assert generator["SCHEMA"].read_text() == generator["as_text"](), "run python configs/schema.py"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_configs_that_ship_are_valid(validator, path):
    assert list(validator.iter_errors(yaml.safe_load(path.read_text()))) == []


def config(**init_args):
    return {"trainer": {"callbacks": [{"class_path": "terratorch_simpler.SimplerCallback", "init_args": init_args}]}}


TILES = {"class_path": "terratorch_simpler.GeoTiffTiles", "init_args": {"paths": "scenes", "bands": [1, "RED"]}}


@pytest.mark.parametrize(
    "settings",
    [
        {"tiles": TILES, "criterion": "probe", "recovery": "linear", "recovery_target": "best", "width": 0.5},
        {"criterion": {"class_path": "terratorch_simpler.criteria.Knee"}, "recovery_target": 3, "tiles": None},
    ],
)
def test_what_the_callback_takes_is_valid(validator, settings):
    assert list(validator.iter_errors(config(**settings))) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"critereon": "knee"},
        {"criterion": "knees"},
        {"width": 1.5},
        {"on_unsettled": "stop"},
        {"min_tiles": 0},
        {"tiles": {**TILES, "init_args": {"path": "scenes"}}},
    ],
)
def test_what_the_callback_refuses_is_not(validator, settings):
    assert len(list(validator.iter_errors(config(**settings)))) == 1


def test_other_callbacks_are_not_judged(validator):
    other = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}
    assert list(validator.iter_errors({"trainer": {"callbacks": [other, "ModelSummary"]}})) == []
