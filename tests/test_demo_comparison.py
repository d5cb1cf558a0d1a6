"""The demo's table: what it says of given figures, how models are timed, and the line on SIMPLER's choice."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
import yaml
from rich.console import Console
from terratorch.tasks import SemanticSegmentationTask

from terratorch_simpler import SlimmingPlan, demo
from terratorch_simpler.demo.comparison import Compared, Times, choices, compare, comparison_table
from terratorch_simpler.plan import Verdict

INTACT = Compared("intact", 12, 5_634_050, Times(200.0, 20.0), (0.50, 0.52, 0.54))
PRUNED = Compared("pruned", 4, 2_075_138, Times(100.0, 9.0), (0.49, 0.53, 0.54))


def said(*models: Compared) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison_table(*models, batch_size=8))
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_table_holds_both_models_and_the_change():
    lines = said(INTACT, PRUNED)
    for line in (
        "blocks 12 4 -67%",
        "encoder parameters 5,634,050 2,075,138 -63%",
        "training step of 8 tiles 200 ms 100 ms -50%",
        "inference, one tile 20.0 ms 9.0 ms -55%",
        "test mIoU 0.520 ± 0.020 0.520 ± 0.026 +0.000 ± 0.010",
    ):
        assert line in lines
    assert any("3 seeds of the fine-tuning" in line for line in lines)


def test_a_loss_is_told():
    lines = said(INTACT, replace(PRUNED, scores=(0.40, 0.42, 0.44)))
    assert "test mIoU 0.520 ± 0.020 0.420 ± 0.020 -0.100 ± 0.000" in lines


def task(keep: int) -> SemanticSegmentationTask:
    arguments = {
        "backbone": "simpler_prithvi_eo_v2_tiny_tl", "backbone_pretrained": False, "backbone_embed_dim": 48,
        "backbone_num_heads": 3, "backbone_keep": keep, "necks": [{"name": "SelectIndices", "indices": [11]},
        {"name": "ReshapeTokensToImage"}], "decoder": "FCNDecoder", "decoder_channels": 8, "num_classes": 3,
    }  # fmt: skip
    return SemanticSegmentationTask(model_factory="EncoderDecoderFactory", model_args=arguments, ignore_index=-1)


def test_models_are_timed_without_training_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("terratorch_simpler.sweep.cost.WARM_UPS", 1)
    models = {"intact": (task(12), [0.5, 0.6]), "pruned": (task(2), [0.5, 0.7])}
    before = {name: [value.clone() for value in model.parameters()] for name, (model, _) in models.items()}
    batch = {"image": torch.randn(2, 6, 32, 32), "mask": torch.randint(0, 3, (2, 32, 32))}
    intact, pruned = compare(models, batch)
    assert (intact.num_blocks, pruned.num_blocks) == (12, 2)
    assert pruned.parameters < intact.parameters
    assert pruned.scores == (0.5, 0.7)
    assert 0 < pruned.times.step < intact.times.step
    assert 0 < pruned.times.tile < intact.times.tile
    for name, (model, _) in models.items():
        for one, other in zip(before[name], model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_both_choices_are_told_with_their_verdicts():
    simpler = {"kept_blocks": list(range(10)), "scores": None, "verdict": {"level": "weak", "reasons": ["Few tiles."]}}
    plan = SlimmingPlan(
        backbone="encoder", full_num_blocks=12, kept_blocks=(0, 1, 2, 3), width=1.0, criterion={"name": "probe", "args": {}},
        recovery="none", scores=None, similarity=None, votes=None, tiles_seen=0, rows_seen=0,
        parameters={"before": 12, "after": 4}, macs=None, data=None, versions={}, verdict=Verdict("clear"),
        overview={"criteria": {"simpler": simpler}, "depths": {}},
    )  # fmt: skip
    assert SlimmingPlan.from_dict(json.loads(plan.to_json())).overview == plan.overview
    assert choices(plan) == [
        "By labels (probe):  4 of 12 blocks; verdict clear.",
        "Without (SIMPLER):  10 of 12 blocks; verdict weak. Few tiles.",
    ]


def test_the_demo_gives_the_same_scores_each_time():
    """No seed reaches the random transforms of Albumentations, of which TerraTorch's YAML takes a list only."""
    assert "train_transform" not in yaml.safe_load(demo.CONFIG.read_text())["data"]["init_args"]
