"""Every config we ship is read by the real command line, and builds its model."""

import sys
from pathlib import Path

import pytest
import yaml
from terratorch.cli_tools import build_lightning_cli

from terratorch_simpler import SimplerCallback
from terratorch_simpler.backbone import SimplerBackbone

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FULL_DEPTH = {"simpler": 24, "simpler_upernet": 24, "hls_water": 12, "demo": 12}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_with_the_real_command_line(path, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["terratorch"])
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(path.read_text())
    settings["model"]["init_args"]["model_args"]["backbone_pretrained"] = False  # the weights are on the Hub
    (tmp_path / "offline.yaml").write_text(yaml.safe_dump(settings))
    cli = build_lightning_cli(["--config", "offline.yaml", "--trainer.accelerator=cpu"], run=False)
    backbone = next(part for part in cli.model.modules() if isinstance(part, SimplerBackbone))
    assert backbone.full_num_blocks == backbone.num_blocks == FULL_DEPTH[path.stem]
    assert sum(isinstance(callback, SimplerCallback) for callback in cli.trainer.callbacks) == 1


def test_there_is_a_row_for_every_config():
    table = (CONFIGS[0].parent / "README.md").read_text()
    assert {path.stem for path in CONFIGS} == FULL_DEPTH.keys()
    assert all(f"`{path.name}`" in table for path in CONFIGS)
