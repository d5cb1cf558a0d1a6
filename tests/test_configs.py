"""Every config we ship is read by the real command line, builds its model, and runs on small data of its layout."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from terratorch.__main__ import main as terratorch_main
from terratorch.cli_tools import build_lightning_cli

from terratorch_simpler import SimplerCallback, SlimmingPlan
from terratorch_simpler.demo import ENCODER
from terratorch_simpler.models.backbone import SimplerBackbone
from tests import layouts
from tests.checkpoints import kept_in
from tests.extras import needs_peft

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FULL_DEPTH = {
    "simpler": 24,
    "simpler_upernet": 24,
    "cluster": 24,
    "hls_water": 12,
    "hls_water_lora": 12,
    "hls_water_vpt": 12,
    "demo": 12,
    "terramind_multimodal": 12,
    "vit_mae_cifar100": 12,
    "bigearthnet": 24,
    "sen4map": 24,
    "mados": 24,
}
NARROW = {"backbone_embed_dim": 48, "backbone_num_heads": 3}
# What makes a config small enough for a test: data of its layout, settings of model_args, which of it is real.
RUNS = {
    "hls_water": (layouts.hls_water, {"decoder_channels": [16, 8, 8, 4], "backbone_ckpt_path": str(ENCODER)}),
    "hls_water_lora": (layouts.hls_water, {"decoder_channels": [16, 8, 8, 4], "backbone_ckpt_path": str(ENCODER)}),
    "hls_water_vpt": (layouts.hls_water, {"decoder_channels": [16, 8, 8, 4], "backbone_ckpt_path": str(ENCODER)}),
    "terramind_multimodal": (
        layouts.land_cover,
        {"backbone": "simpler_terramind_v1_tiny", "decoder_channels": [16, 8, 8, 4], "backbone_pretrained": False},
    ),
    "vit_mae_cifar100": (layouts.cifar100, {**NARROW, "backbone_pretrained": False}),
    "bigearthnet": (layouts.bigearthnet, {**NARROW, "backbone_pretrained": False}),
    "sen4map": (layouts.sen4map, {**NARROW, "backbone_pretrained": False}),
    "mados": (layouts.mados, {**NARROW, "backbone_pretrained": False}),
}


def marks(name):
    return needs_peft if name == "hls_water_lora" else ()


def terratorch(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["terratorch", *map(str, args)])
        terratorch_main()


def without_this_package(*args):
    """TerraTorch's command where this package is not installed."""
    code = "import sys; sys.modules['terratorch_simpler'] = None; from terratorch.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def read(path):
    with rasterio.open(path) as source:
        return source.read()


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=marks(path.stem)) for path in CONFIGS])
@pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone")
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


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning")
@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in RUNS])
def test_config_runs(name, request, monkeypatch, tmp_path):
    layout, model_args = RUNS[name]
    real = layout in (layouts.hls_water, layouts.land_cover)
    layout(tmp_path, request.getfixturevalue("shared_data") if real else None)
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text())
    settings["trainer"].update(
        accelerator="cpu", precision="32-true", max_epochs=1, limit_train_batches=2, limit_val_batches=1,
        limit_test_batches=1, enable_progress_bar=False, enable_model_summary=False, logger=False,
    )  # fmt: skip
    settings["data"]["init_args"].update(num_workers=0, batch_size=4)
    if name == "sen4map":
        settings["data"]["init_args"]["prefetch_factor"] = None  # PyTorch allows none without workers
        # TerraTorch 1.2.11 compares an HDF5 dataset with a number, which h5py does not do.
        monkeypatch.setattr("h5py.Dataset.__lt__", lambda self, other: self[()] < other, raising=False)
    settings["model"]["init_args"]["model_args"].update(model_args)
    Path("small.yaml").write_text(yaml.safe_dump(settings))
    terratorch("fit", "--config", "small.yaml")
    plan = SlimmingPlan.load("simpler/plan.json")
    assert 2 <= len(plan.kept_blocks) < plan.full_num_blocks == FULL_DEPTH[name]
    assert plan.macs["after"] < plan.macs["before"]
    full = next(path for path in Path("checkpoints").glob("*.ckpt") if "state_dict" not in path.name)
    state = torch.load(full, weights_only=True)["state_dict"]
    assert kept_in(state) == plan.kept_blocks
    terratorch("test", "--config", "small.yaml", "--ckpt_path", full)
    assert Path("simpler/plain/model.ckpt").is_file() == (name == "hls_water_lora")
    if name == "hls_water_lora":
        few = ("--trainer.limit_predict_batches", 3)
        terratorch("predict", "--config", "small.yaml", "--ckpt_path", full, "--predict_output_dir", "ours", *few)
        # As the model card says, whose files are in the folder of the card.
        inside = Path("simpler/plain")
        command = re.search(r"^terratorch (predict .*)$", (inside / "README.md").read_text(), re.MULTILINE)[1]
        without_this_package(*(inside / word if (inside / word).is_file() else word for word in command.split()), *few)
        names = sorted(path.name for path in Path("ours").iterdir())
        assert len(names) == 12
        assert names == sorted(path.name for path in Path("predictions").iterdir())
        same = [read(f"ours/{name}") == read(f"predictions/{name}") for name in names]
        assert np.mean(same) > 0.999  # folding the adapters in rounds
