"""A callback that writes down what ``terratorch test`` has found."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from terratorch.tasks import MultiLabelClassificationTask
from torchmetrics.classification import MultilabelAveragePrecision

from terratorch_simpler.files import atomic_write
from terratorch_simpler.models.backbone import find_backbone


class WriteScores(Callback):
    """Writes all test metrics and the depth of the encoder; adds mean average precision, which TerraTorch has not.

    Args:
        path: JSON file, written whole or not at all.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Add ``mAP``, the mean over classes of the average precision, to multi-label tasks."""
        if isinstance(pl_module, MultiLabelClassificationTask):
            classes = pl_module.hparams["model_args"]["num_classes"]
            for metrics in (pl_module.val_metrics, *pl_module.test_metrics):
                metrics.add_metrics({"mAP": MultilabelAveragePrecision(num_labels=classes, average="macro")})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if not trainer.is_global_zero:
            return
        backbone = find_backbone(pl_module)
        found = {
            "metrics": {
                name.removeprefix("test/"): value.item()
                for name, value in trainer.callback_metrics.items()
                if name.startswith("test/")
            },
            "blocks": backbone.num_blocks,
            "full_blocks": backbone.full_num_blocks,
            "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
        }
        with atomic_write(self._path) as part:
            part.write_text(json.dumps(found, indent=1), encoding="utf-8")
