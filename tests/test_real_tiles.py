"""End to end on real satellite tiles with the encoder that ships with the package."""

import numpy as np
import pytest
from terratorch.registry import BACKBONE_REGISTRY

import terratorch_simpler.demo as demo
from terratorch_simpler import GeoTiffTiles, SimplerCallback, SlimmingPlan
from terratorch_simpler.criteria import Bounds, Simpler
from terratorch_simpler.extraction import ExtractionConfig, measure

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


def test_scene_with_nodata_gives_the_plan_of_its_clean_part(shared_data):
    """30 % of the scene are nodata, as wedges that cut through tiles."""
    encoder = BACKBONE_REGISTRY.build(
        "simpler_prithvi_eo_v2_tiny_tl", pretrained=True, ckpt_path=demo.ENCODER, bands=BANDS
    ).eval()

    def choose(**kwargs):
        tiles = GeoTiffTiles(
            str(shared_data / "scenes" / "s2_20m_6band_epsg5070.tif"),
            tile_size=64,
            means=[832.3, 1019.6, 1107.8, 1142.9, 786.5, 484.7],
            stds=[350.7, 772.8, 921.9, 1072.5, 898.6, 598.1],
            **kwargs,
        )
        found = measure(lambda batch: encoder(batch["image"]), encoder, tiles, ExtractionConfig(Simpler(), min_tiles=9999))
        return found, len(Simpler().choose(found.statistics, 12, Bounds()).kept_blocks)

    clean, depth = choose(max_nodata_fraction=0)
    assert clean.rows_seen == 16 * clean.tiles_seen
    for share in (0.5, 1.0):
        gaps, found = choose(max_nodata_fraction=share)
        assert gaps.tiles_seen > clean.tiles_seen
        assert gaps.rows_seen < 16 * gaps.tiles_seen  # patches without data are not compared
        assert found == depth
        assert (gaps.similarity - clean.similarity).abs().max() < 0.01
    blind, _ = choose(max_nodata_fraction=1, nodata=1e9)  # -9999 taken for data
    assert (blind.similarity - clean.similarity).abs().max() > 0.05
