"""End to end on real satellite tiles with the encoder that ships with the package."""

import numpy as np
import pytest

import terratorch_simpler.demo as demo
from terratorch_simpler import SimplerCallback, SlimmingPlan

BANDS = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning")
def test_hls_water_from_tiles_to_a_trained_model(shared_data, trainer, task, datamodule, tmp_path):
    root = shared_data / "hls_water"
    splits = {
        f"{split}_{key}": root / folder
        for split in ("train", "val", "test")
        for key, folder in (("data_root", "images"), ("label_data_root", "water_mask"), ("split", f"splits/{split}.txt"))
    }
    data = datamodule(
        **splits,
        num_classes=2,
        means=[529.7, 865.58, 1026.29, 2071.0, 1959.32, 1365.22],
        stds=[346.0, 432.91, 589.46, 1065.94, 1226.89, 1002.34],
    )
    module = task(num_classes=2, backbone_bands=BANDS, backbone_ckpt_path=demo.ENCODER, backbone_pretrained=True)
    run = trainer(SimplerCallback(), max_epochs=2)
    run.fit(module, datamodule=data)
    plan = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")
    assert (plan.tiles_seen, plan.rows_seen) == (136, 136 * 16)
    assert plan.votes is not None  # four groups of 32
    assert module.model.encoder.kept == plan.kept_blocks
    # The pretrained encoder's blocks drift apart: neighbours are alike, the ends are not.
    s = np.asarray(plan.similarity)
    assert np.diag(s, 1).min() > 0.8
    assert s[0, -1] < s[0, 1]
    metrics = run.test(module, datamodule=data, verbose=False)[0]
    assert metrics["test/Pixel_Accuracy"] > 0.75
