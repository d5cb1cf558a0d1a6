"""One run of a study: TerraTorch's task and datamodule, and the callback as users list it."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from terratorch.datamodules import GenericNonGeoSegmentationDataModule
from terratorch.tasks import SemanticSegmentationTask
from torch import nn

from benchmarks.study.data import BANDS, IGNORED, Setup, datamodule_args, encoder_weights, prepare, read_split
from benchmarks.study.probe import probe
from benchmarks.study.runs import Run
from terratorch_simpler import GeoTiffTiles, SimplerCallback, SlimmableTraining
from terratorch_simpler.criteria import Fixed
from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.models.backbone import find_backbone
from terratorch_simpler.sweep.cost import added_memory

LORA = {
    "method": "LORA",
    "replace_qkv": "qkv",
    "peft_config_kwargs": {"target_modules": ["q_linear", "v_linear", "mlp.fc1", "mlp.fc2"], "r": 16, "lora_alpha": 16},
}


def finetune(run: Run, study: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Fine-tune once and test.

    Args:
        run: What.
        study: The study's settings.
        data: Folder ``hls_water``.
        folder: Of the study: prepared tiles and encoders are there.

    Returns:
        Scores, kept blocks, parameters, seconds (the selection included, on a CPU those of the processor) and bytes of a
        training step.
    """
    setup = Setup(name=run.setup, **study["setups"][run.setup])
    root = prepare(data, folder / "tiles", setup.target, setup.size)
    seed_everything(run.seed, verbose=False)
    scratch = folder / "scratch" / run.key
    datamodule = GenericNonGeoSegmentationDataModule(**datamodule_args(data, root, scratch, setup, run.seed, study))
    depth = study["encoders"][run.encoder]["depth"]
    task = SemanticSegmentationTask(
        _model_args(run, setup, study, folder),
        "EncoderDecoderFactory",
        loss="ce",
        ignore_index=IGNORED,
        optimizer="AdamW",
        lr=study["lora_lr"] if run.variant == "lora" else setup.lr,
        optimizer_hparams={"weight_decay": 0.05},
        freeze_backbone=setup.freeze,
        class_names=setup.classes,
        plot_on_val=False,
    )
    callbacks = _callbacks(run, study, depth, root, data, scratch)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=setup.epochs,
        default_root_dir=scratch,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,  # nothing is chosen by validation: what is tested is the last epoch
        num_sanity_val_steps=0,
    )
    # Time of the processor on a CPU: other runs share it.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimplerWarning)
        warnings.filterwarnings("ignore", "The ``compute`` method", UserWarning)  # TerraTorch's, since nothing is validated
        trainer.fit(task, datamodule=datamodule)
    backbone = find_backbone(task)
    seconds = clock() - start
    probed = setup.decoder == "probe"
    scores = probe(backbone, data, root, setup, run.seed, study) if probed else _test(trainer, task, datamodule)
    found = {**scores, "seconds": seconds}
    if run.variant == "slimmable":
        for width in study["slimmable"][:-1]:
            with backbone.at_width(width).applied():
                found[f"test_miou_{width}"] = _test(trainer, task, datamodule)["test_miou"]
    found |= {
        "kept": list(backbone.kept),
        "width": backbone.width,
        "parameters": backbone.num_parameters(),
        "step_bytes": _step_bytes(task.model, len(setup.classes), setup.size, study["batch_size"]),
    }
    shutil.rmtree(scratch, ignore_errors=True)
    return found


def _model_args(run: Run, setup: Setup, study: dict[str, Any], folder: Path) -> dict[str, Any]:
    depth = study["encoders"][run.encoder]["depth"]
    arguments: dict[str, Any] = {
        "backbone": f"simpler_{study['backbone']}",
        "backbone_bands": BANDS,
        "backbone_depth": depth,
        "backbone_pretrained": run.variant != "random",
        "num_classes": len(setup.classes),
    }
    if run.variant != "random":
        arguments["backbone_ckpt_path"] = str(encoder_weights(study, run.encoder, folder))
    if run.depth is not None and run.rule == "first" and run.variant != "recovery":
        arguments |= {"backbone_keep": run.depth, "backbone_width": run.width}
    if run.variant == "lora":
        arguments["peft_config"] = LORA
    if setup.decoder in ("pointwise", "probe"):
        return arguments | {
            "necks": [{"name": "SelectIndices", "indices": [depth - 1]}, {"name": "ReshapeTokensToImage"}],
            "decoder": "IdentityDecoder",
        }
    if setup.decoder == "linear":
        return arguments | {
            "necks": [{"name": "SelectIndices", "indices": [depth - 1]}, {"name": "ReshapeTokensToImage"}],
            "decoder": "LinearDecoder",
            "decoder_upsampling_size": 16,
            "decoder_num_classes": len(setup.classes),
        }
    quarters = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    return arguments | {
        "necks": [
            {"name": "SelectIndices", "indices": quarters},
            {"name": "ReshapeTokensToImage"},
            {"name": "LearnedInterpolateToPyramidal"},
        ],
        "decoder": "UNetDecoder",
        "decoder_channels": [64, 32, 16, 8],
    }


def _callbacks(run: Run, study: dict[str, Any], full: int, root: Path, data: Path, scratch: Path) -> list[Any]:
    """The selection looks at all training images: it needs no labels, so few labels do not limit it."""
    if run.variant == "slimmable":
        return [SlimmableTraining(widths=study["slimmable"], seed=run.seed)]
    if run.rule == "first" and run.variant != "recovery":
        return []
    images = [str(root / f"images/{name}_image.tif") for name in read_split(data, "train")]
    size = study["setups"][run.setup]["size"]
    tiles = GeoTiffTiles(images, size, means=study["means"], stds=study["stds"], num_workers=0)
    drop = None if run.depth is None else full - run.depth
    criterion: Any = Fixed(run.depth) if run.rule == "first" else run.rule
    return [
        SimplerCallback(
            tiles=tiles,
            criterion=criterion,
            drop_blocks=None if run.rule == "first" else drop,
            recovery="linear" if run.variant == "recovery" else "none",
            output_dir=str(scratch / "simpler"),
        )
    ]


def _test(trainer: Trainer, task: SemanticSegmentationTask, datamodule: Any) -> dict[str, float]:
    [scores] = trainer.test(task, datamodule=datamodule, verbose=False)
    return {
        "test_miou": scores["test/mIoU"],
        "test_accuracy": scores["test/Pixel_Accuracy"],
        **{name.replace("test/", "test_"): value for name, value in scores.items() if name.startswith("test/IoU_")},
    }


def _step_bytes(model: nn.Module, classes: int, size: int, batch: int) -> int:
    """Most memory that forward and backward add to the weights."""
    device = next(model.parameters()).device
    image = torch.randn(batch, len(BANDS), size, size, device=device)
    target = torch.randint(classes, (batch, size, size), device=device)
    model.train()

    def step() -> None:
        nn.functional.cross_entropy(model(image).output, target).backward()

    return added_memory(step, [*model.parameters(), *model.buffers()], device)
