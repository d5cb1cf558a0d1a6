"""What the checks look at: generated scenes, the demo's encoder, one of the benchmarks' size, and plans for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from lightning.pytorch import Trainer
from terratorch.tasks import SemanticSegmentationTask

import terratorch_simpler  # noqa: F401  makes simpler_ known
from benchmarks.gpu.check import Settings
from terratorch_simpler.criteria import Bounds, Simpler
from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.demo import CONFIG, ENCODER
from terratorch_simpler.demo.scenes import write_scenes
from terratorch_simpler.distributed import Processes
from terratorch_simpler.lightning.selection import select
from terratorch_simpler.models.backbone import find_backbone
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.selection_config import SelectionConfig

DEMO = yaml.safe_load(CONFIG.read_text())


def scenes(settings: Settings) -> Path:
    """Generated scenes, written by the first check that asks for them: 64 to train on, or fewer and smaller ones."""
    folder = settings.scratch / "scenes"
    with FileLock(settings.scratch / "scenes.lock"):
        if not folder.exists():
            splits = {"train": 40, "val": 4, "test": 4} if settings.small else {"train": 64, "val": 8, "test": 8}
            write_scenes(settings.scratch / "unfinished", splits, size=64 if settings.small else 128)
            (settings.scratch / "unfinished").rename(folder)
    return folder


def tiles(settings: Settings, tile_size: int, batch_size: int) -> GeoTiffTiles:
    """The scenes as tiles, normalised as the demo's datamodule does, in page-locked memory for a GPU."""
    data = DEMO["data"]["init_args"]
    return GeoTiffTiles(
        str(scenes(settings) / "images"), tile_size, means=data["means"], stds=data["stds"], batch_size=batch_size,
        pin_memory=settings.cuda,
    )  # fmt: skip


def trained_task() -> SemanticSegmentationTask:
    """The demo's task, whose encoder was pretrained, so that the choice means something."""
    arguments = DEMO["model"]["init_args"]
    model_args = arguments["model_args"] | {"backbone_ckpt_path": str(ENCODER)}
    return SemanticSegmentationTask(**arguments | {"model_args": model_args})


def large_task(settings: Settings) -> SemanticSegmentationTask:
    """A task around Prithvi-EO-2.0-300M's shape with random weights, or around a narrow encoder."""
    torch.manual_seed(0)
    backbone: dict[str, Any] = {"backbone": "simpler_prithvi_eo_v2_300"}
    if settings.small:
        backbone = {"backbone": "simpler_prithvi_eo_v2_tiny_tl", "backbone_embed_dim": 48, "backbone_num_heads": 3}
    blocks = 12 if settings.small else 24
    necks = [{"name": "SelectIndices", "indices": [blocks - 1]}, {"name": "ReshapeTokensToImage"}]
    model_args = {
        **backbone, "backbone_pretrained": False, "necks": necks, "decoder": "LinearDecoder", "decoder_upsampling_size": 16,
        "decoder_num_classes": 6, "num_classes": 6,
    }  # fmt: skip
    return SemanticSegmentationTask(model_args, "EncoderDecoderFactory", loss="ce")


def plan_of(
    task: SemanticSegmentationTask, source: GeoTiffTiles, count: int, device: str, precision: str = "32-true"
) -> SlimmingPlan:
    """Choose as the callback does, over so many tiles, and prune.

    Args:
        task: With an intact encoder, on the CPU.
        source: The tiles.
        count: How many of them are streamed.
        device: As PyTorch names it.
        precision: As Lightning names it.
    """
    where = torch.device(device)
    trainer = Trainer(
        accelerator="gpu" if where.type == "cuda" else where.type,
        devices=[where.index or 0] if where.type == "cuda" else 1,
        precision=precision, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    how = SelectionConfig(Simpler(), Bounds(), 1.0, "patch", min_tiles=count, max_tiles=count, seed=0)
    return select(trainer, task, find_backbone(task), source, how, Processes())
