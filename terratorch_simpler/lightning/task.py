"""A task outside of fit: its encoder, the trainer's device and precision, and a batch's way to its forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from torch import nn
from torch.utils._pytree import tree_leaves

from terratorch_simpler.data import TILE_KEYS, Batch, GeoTiffTiles, TileSource, batch_transform
from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.extraction import explain
from terratorch_simpler.models.backbone import SimplerBackbone

NOT_INPUT = TILE_KEYS | {"valid", "target"}
"""Keys of a batch that do not go to the encoder."""


def shows_progress(trainer: Trainer) -> bool:
    """Whether this process shows progress bars: rank zero, unless ``enable_progress_bar`` is false."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def outermost_encoder(pl_module: LightningModule, backbone: SimplerBackbone) -> nn.Module:
    """The encoder of the task's model: the backbone, or what wraps it (TemporalWrapper, PEFT)."""
    encoder = getattr(getattr(pl_module, "model", None), "encoder", None)
    if isinstance(encoder, nn.Module) and any(part is backbone for part in encoder.modules()):
        return encoder
    # In a module of the user's own, adapters are to be switched off wherever they are.
    wrappers = [part for part in pl_module.modules() if hasattr(part, "disable_adapter")]
    return next((part for part in wrappers if any(one is backbone for one in part.modules())), backbone)


def task_forward(
    trainer: Trainer, pl_module: LightningModule, backbone: SimplerBackbone, source: TileSource
) -> Callable[[Batch], object]:
    """A function that takes a batch the way of a training step: to the device, normalised, through the task's forward."""
    datamodule: LightningDataModule | None = getattr(trainer, "datamodule", None)
    device = trainer.strategy.root_device
    # A datamodule without such a transform normalises while it reads (Sen4Map).
    if _evaluation_transform(trainer, source) is None and isinstance(source, GeoTiffTiles) and source.means is None:
        warnings.warn(
            "There are neither means in tiles nor a normalisation in the datamodule, expected one of them, since the "
            "encoder was trained on normalised pixels: give tiles means and stds.",
            SimplerWarning,
            stacklevel=2,
        )

    if not isinstance(source, GeoTiffTiles):
        _warn_of_hooks(datamodule)

    def move(inputs: Batch) -> Batch:
        if datamodule is None:
            return move_data_to_device(inputs, device)  # type: ignore[no-any-return]
        return datamodule.transfer_batch_to_device(inputs, device, 0)  # type: ignore[no-any-return]

    transfer = overlap_transfer(move, device) if device.type == "cuda" else move
    normalize = batch_normalizer(trainer, backbone, source)

    def forward(batch: Batch) -> object:
        inputs = normalize(transfer({key: value for key, value in batch.items() if key not in NOT_INPUT}))
        with precision_of(trainer):
            return pl_module(inputs.pop("image"), **inputs)

    return forward


def _warn_of_hooks(datamodule: LightningDataModule | None) -> None:
    """Warn of batch hooks of a user's own: they may look at the state of a trainer that is not there yet."""
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        hook = getattr(type(datamodule), name, None)
        if hook is not None and hook.__module__.partition(".")[0] not in ("lightning", "torchgeo", "terratorch"):
            msg = (
                f"{type(datamodule).__name__}.{name} is not called while tiles are compared, so they may differ from those "
                "of the training: put what it does into the attribute aug, or give SimplerCallback tiles with means and "
                "stds."
            )
            warnings.warn(msg, SimplerWarning, stacklevel=3)


def batch_normalizer(trainer: Trainer, backbone: SimplerBackbone, source: TileSource) -> Callable[[Batch], Batch]:
    """A function that normalises inputs as the datamodule does, unless the tiles are normalised already."""
    transform = _evaluation_transform(trainer, source)
    shape = backbone.input_shape
    modalities = list(shape) if isinstance(shape, dict) and len(shape) == 1 else []
    by_name = isinstance(getattr(transform, "means", None), dict) and modalities

    def normalize(inputs: Batch) -> Batch:
        if by_name and not isinstance(inputs["image"], dict):  # the datamodule knows means by modality only
            inputs["image"] = dict.fromkeys(modalities, inputs["image"])
        if transform is not None:
            image = inputs["image"]
            try:
                inputs["image"] = transform({"image": image})["image"]
            except Exception as err:
                explain(err, backbone, image)
                raise
        return inputs

    return normalize


def _evaluation_transform(trainer: Trainer, source: TileSource) -> Callable[[Batch], Batch] | None:
    """The datamodule's batch transform for evaluation, unless tiles are normalised already."""
    return None if getattr(source, "means", None) is not None else batch_transform(getattr(trainer, "datamodule", None))


def overlap_transfer(move: Callable[[Batch], Batch], device: torch.device) -> Callable[[Batch], Batch]:
    """Transfer on a CUDA stream of its own, while the device still computes the batch before."""
    stream = torch.cuda.Stream(device)

    def transfer(inputs: Batch) -> Batch:
        with torch.cuda.stream(stream):
            moved = move(inputs)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(stream)
        # The memory was allocated on the transfer stream, and must not be reused before the compute stream has read it.
        for tensor in tree_leaves(moved):
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(compute)
        return moved

    return transfer


def precision_of(trainer: Trainer) -> AbstractContextManager[object]:
    """The trainer's precision for one forward pass.

    True half and double precision convert the weights only after setup, and casting them here and back would round them:
    half precision runs as autocast, double precision in the precision of the weights.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision):
        dtype = torch.bfloat16 if plugin.precision == "bf16-true" else torch.float16
        return torch.autocast(trainer.strategy.root_device.type, dtype=dtype)
    return nullcontext() if isinstance(plugin, DoublePrecision) else plugin.forward_context()
