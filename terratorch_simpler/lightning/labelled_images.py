"""Features of labelled images of a datamodule, for criteria and probes that need labels."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from terratorch.tasks import (
    ClassificationTask,
    MultiLabelClassificationTask,
    PixelwiseRegressionTask,
    ScalarRegressionTask,
    SemanticSegmentationTask,
)

from terratorch_simpler.criteria import LabelledFeatures
from terratorch_simpler.data import DatamoduleTiles, Split
from terratorch_simpler.data.datamodule import SPLIT_NAMES
from terratorch_simpler.errors import ConfigurationError, LabelsError
from terratorch_simpler.extraction import (
    IMAGES,
    LabelledRows,
    Readout,
    as_pretrained,
    check_labels,
    collect_labelled,
    evaluating,
    layer_normed,
    on_device,
    progress_bar,
    rows_per_image,
)
from terratorch_simpler.functional.scores import LabelKind
from terratorch_simpler.lightning.task import outermost_encoder, shows_progress, task_forward
from terratorch_simpler.models.backbone import find_backbone


def check_split(trainer: Trainer, pl_module: LightningModule, split: Split, seed: int) -> None:
    """Check that the images of a split have labels of two classes at least, before anything is computed.

    Raises:
        LabelsError: If they have not.
    """
    check_labels(labelled_source(trainer, split, seed), _ignore_index(pl_module), SPLIT_NAMES[split])


def labelled_rows(
    trainer: Trainer,
    pl_module: LightningModule,
    split: Split,
    seed: int,
    *,
    tuned: bool = False,
    readout: Readout | None = None,
    class_token: bool = False,
    kind: LabelKind | Literal["classes", "any"] = "classes",
    all_rows: bool = False,
    progress: bool = False,
) -> LabelledRows:
    """Features with labels after every block of a task's encoder; batches go the way of a training step.

    Args:
        trainer: Gives device and precision, and the datamodule.
        pl_module: The task, on the CPU.
        split: Which images of the datamodule; they are read without augmentation.
        seed: Seed of the order of the images and of the sampled patches.
        tuned: Keep adapters (LoRA) and prompts switched on, instead of running the encoder as pretrained.
        readout: Turns the output of a block into features; by default they are its raw output.
        class_token: With labels by image, take the class token, if there is one, instead of the mean of the patches.
        kind: Kind of labels: "classes" takes no other; "any" takes what they look like.
        all_rows: Take more than 16 patches of an image where there are few images.
        progress: Show a progress bar, if the trainer shows any.

    Raises:
        LabelsError: If there are no labels, or of one class only.
    """
    backbone = find_backbone(pl_module)
    source = labelled_source(trainer, split, seed)
    encoder = outermost_encoder(pl_module, backbone)
    with (
        on_device(pl_module, trainer.strategy.root_device),
        evaluating(pl_module, seed),
        nullcontext() if tuned else as_pretrained(encoder, backbone),
        progress_bar(
            progress and shows_progress(trainer),
            min(len(source), IMAGES),
            f"Sampling the labels of the {SPLIT_NAMES[split]}",
        ) as update,
    ):
        return collect_labelled(
            task_forward(trainer, pl_module, backbone, source),
            backbone,
            source,
            encoder,
            what=SPLIT_NAMES[split],
            ignore_index=_ignore_index(pl_module),
            readout=readout,
            class_token=class_token,
            kind=kind,
            rows=rows_per_image(len(source) if all_rows else None),
            seed=seed,
            progress=update,
        )


def labelled_features(trainer: Trainer, pl_module: LightningModule, seed: int) -> LabelledFeatures:
    """Labelled features of the encoder as it was tuned, for criteria that need some; block outputs before any norm."""
    rows = labelled_rows(trainer, pl_module, "train", seed, tuned=True, class_token=True, progress=True)
    return LabelledFeatures(rows.features, rows.labels)


def probed_features(trainer: Trainer, pl_module: LightningModule, seed: int) -> LabelledFeatures:
    """Labelled, LayerNormed features of the encoder as pretrained, of the training and, if there are any, validation images.

    The kind of labels is that of the task.
    """
    kind = _kind_of_task(pl_module)

    def collect(split: Split) -> LabelledFeatures:
        source = labelled_source(trainer, split, seed)
        rows = labelled_rows(trainer, pl_module, split, seed, readout=layer_normed, kind=kind, all_rows=True, progress=True)
        return rows.named(source.name_of)

    train = collect("train")
    try:
        labelled_source(trainer, "val", seed)
    except ConfigurationError:  # a datamodule without validation images
        return train
    return replace(train, validation=collect("val"))


def _kind_of_task(pl_module: LightningModule) -> LabelKind | Literal["any"]:
    kinds: dict[type, LabelKind] = {
        MultiLabelClassificationTask: "multilabel",  # a ClassificationTask as well
        ClassificationTask: "classification",
        SemanticSegmentationTask: "segmentation",
        PixelwiseRegressionTask: "regression",
        ScalarRegressionTask: "regression",
    }
    return next((kind for task, kind in kinds.items() if isinstance(pl_module, task)), "any")


def labelled_source(trainer: Trainer, split: Split, seed: int) -> DatamoduleTiles:
    """The images of a split of the trainer's datamodule, with their labels.

    Raises:
        LabelsError: If there is no datamodule.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        msg = "There is no datamodule, expected one with labels: only the images of a datamodule have labels."
        raise LabelsError(msg)
    return DatamoduleTiles(datamodule, seed, split, labels=True)


def _ignore_index(pl_module: LightningModule) -> int | None:
    return getattr(pl_module, "hparams", {}).get("ignore_index")
