"""A trained task from its checkpoint, with adapters folded into the weights, and an input to compare answers on."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import terratorch.tasks
import torch
from lightning.pytorch import LightningModule
from terratorch.models.peft_utils import QKVSep
from terratorch.models.utils import TemporalWrapper
from torch import Tensor, nn

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.checkpoint import load_weights, read_checkpoint
from terratorch_simpler.errors import CheckpointError, ConfigurationError, ExportError
from terratorch_simpler.measure import random_state_kept
from terratorch_simpler.similarity import full_float32

PREFIX = "simpler_"
SEED = 0
FOLDING = 1e-4
"""Largest difference that folding adapters in may make: products are added in another order."""


@dataclass(frozen=True)
class Trained:
    """A trained task, on the CPU, in evaluation mode.

    Attributes:
        class_path: Its class.
        task: The task; adapters (LoRA) are folded into the weights.
        hparams: The arguments it was built with, as its checkpoint holds them.
        checkpoint: The rest of the checkpoint, without weights; of its hyper_parameters how Lightning builds the task.
        folding: Largest difference that folding adapters in made to an answer, as a share of its largest value.
    """

    class_path: str
    task: LightningModule
    hparams: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    folding: float = 0.0

    @property
    def backbone(self) -> SimplerBackbone:
        """The slimmed encoder inside the task."""
        return next(part for part in self.task.modules() if isinstance(part, SimplerBackbone))

    def example(self, size: int | None = None, batch: int = 2) -> Any:
        """Seeded noise that the task takes as images.

        Args:
            size: Rows and columns in pixels; by default those of the encoder.
            batch: Number of images.

        Raises:
            ExportError: If the encoder does not tell the shape of its input.
        """
        shape = self.backbone.input_shape
        if shape is None:
            msg = (
                f"Found no input shape for '{self.backbone.name}', expected bands and size to compare answers on: an "
                "encoder described by its block path cannot be exported; write an adapter."
            )
            raise ExportError(msg)
        generator = torch.Generator().manual_seed(SEED)
        wrapper = next((part for part in self.task.modules() if isinstance(part, TemporalWrapper)), None)
        frames = None if wrapper is None else self._frames(wrapper)

        def noise(one: tuple[int, ...]) -> Tensor:
            channels, *time, height, width = one
            if frames is not None:
                time = [frames]
            elif time == [1]:
                time = []  # single images come without a time axis
            return torch.randn(batch, channels, *time, size or height, size or width, generator=generator)

        if isinstance(shape, dict):
            images = {name: noise(one) for name, one in shape.items()}
            return images if len(images) > 1 else next(iter(images.values()))
        return noise(shape)

    def _frames(self, wrapper: TemporalWrapper) -> int:
        settings = self.hparams["model_args"]
        inner = settings.get("backbone_kwargs") or {}
        given = settings.get("backbone_temporal_n_timestamps") or inner.get("temporal_n_timestamps")
        return given or (sum(wrapper.subset_lengths) if wrapper.subset_lengths else 2)


@random_state_kept()  # a layer starts from random weights before it gets its own
def load_trained(config: Mapping[str, Any], checkpoint: str | Path, width: float | None = None) -> Trained:
    """Build the task of a checkpoint and load its weights.

    Args:
        config: TerraTorch config; its ``model.class_path`` says which task.
        checkpoint: Checkpoint of a fit; what the task was built with is read from it.
        width: One of the widths that it was trained at; by default the largest.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or is not one of TerraTorch with a ``simpler_`` backbone.
        ConfigurationError: If the config names no task, or the checkpoint was not trained at this width.
    """
    content = _read(checkpoint)
    task_class = _task_class(config)
    saved = content["hyper_parameters"]
    known = inspect.signature(task_class.__init__).parameters
    hparams = {key: value for key, value in saved.items() if key in known}
    arguments = copy.deepcopy(hparams)
    _without_downloads(arguments.get("model_args"))
    name = (arguments.get("model_args") or {}).get("backbone")
    if not isinstance(name, str) or not name.startswith(PREFIX):
        msg = (
            f"Found backbone {name!r} in checkpoint {checkpoint}, expected one whose name starts with '{PREFIX}': there "
            "is nothing to export, the model is plain TerraTorch already."
        )
        raise CheckpointError(msg)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using PEFT without a pretrained backbone")
        task = task_class(**arguments)
    load_weights(task, content["state_dict"], checkpoint)
    task.eval()
    if width is not None:
        _take_width(task, width)
    class_path = f"{task_class.__module__}.{task_class.__name__}"
    # Lightning's command line looks there for the class.
    how = {"_class_path": class_path, **{key: value for key, value in saved.items() if key.startswith("_")}}
    rest = {key: content[key] for key in ("epoch", "global_step", "pytorch-lightning_version") if key in content}
    trained = Trained(class_path, task, hparams, {**rest, "hyper_parameters": how})
    return _fold_adapters(trained) if any(hasattr(part, "merge_and_unload") for part in task.modules()) else trained


def _take_width(task: nn.Module, width: float) -> None:
    backbone = next(part for part in task.modules() if isinstance(part, SimplerBackbone))
    if not backbone.trained_widths and width != backbone.width:
        msg = (
            f"Found width {width:g} for a checkpoint that was trained at width {backbone.width:g} only, expected that one: "
            "leave the width out, or train with terratorch_simpler.SlimmableTraining."
        )
        raise ConfigurationError(msg)
    backbone.set_width(width)


def _fold_adapters(trained: Trained) -> Trained:
    images = trained.example()
    before = answer(trained.task, images)
    _merge_adapters(trained.task)
    gap = difference(answer(trained.task, images), before)
    if not gap <= FOLDING:
        msg = (
            f"Found answers that differ by {gap:.2g} of the largest value once the adapters are folded into the weights, "
            f"expected at most {FOLDING:g}: PEFT cannot fold this kind of adapter in, use LoRA."
        )
        raise ExportError(msg)
    return replace(trained, folding=gap)


def _read(path: str | Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    if not {"state_dict", "hyper_parameters"} <= content.keys():
        msg = (
            f"Found no state_dict with hyper_parameters in {path}, expected a checkpoint written by terratorch fit: give "
            "one of these."
        )
        raise CheckpointError(msg)
    return content


def _task_class(config: Mapping[str, Any]) -> type[LightningModule]:
    model = config.get("model")
    path = model.get("class_path") if isinstance(model, Mapping) else None
    if not isinstance(path, str):
        msg = "Found no model.class_path in the config, expected the task that was trained: give the config of the fit."
        raise ConfigurationError(msg)
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module) if module else terratorch.tasks, name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as err:
        msg = f"Found model.class_path '{path}' ({err}), expected a task that can be imported: check the config."
        raise ConfigurationError(msg) from err


def _without_downloads(model_args: dict[str, Any] | None) -> None:
    """The weights come from the checkpoint."""
    for settings, prefix in ((model_args or {}, "backbone_"), ((model_args or {}).get("backbone_kwargs") or {}, "")):
        for key in (f"{prefix}pretrained", "pretrained"):
            if key in settings:
                settings[key] = False
        settings.pop(f"{prefix}plan", None)  # the checkpoint knows its shape


def _merge_adapters(task: nn.Module) -> None:
    """Fold the adapters of PEFT into the weights, and joined query, key and value back into one matrix."""
    wrappers = [(name, part) for name, part in task.named_modules() if hasattr(part, "merge_and_unload")]
    # PEFT nests a tuner that has the method as well inside the model that wraps it.
    outermost = [(name, part) for name, part in wrappers if not any(name.startswith(f"{other}.") for other, _ in wrappers)]
    for name, part in outermost:
        _replace(task, name, part.merge_and_unload())  # type: ignore[operator]
    for name, part in list(task.named_modules()):
        if isinstance(part, QKVSep):
            _replace(task, name, _joined(part))


def _joined(separate: QKVSep) -> nn.Linear:
    parts = (separate.q_linear, separate.k_linear, separate.v_linear)
    joined = nn.Linear(separate.in_features, separate.out_features, bias=parts[0].bias is not None)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([part.weight for part in parts]))
        if joined.bias is not None:
            joined.bias.copy_(torch.cat([part.bias for part in parts]))
    return joined


def _replace(root: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, part)


def unwrap(task: nn.Module) -> nn.Module:
    """Replace the SimplerBackbone in a task by the encoder it holds, in place."""
    for name, part in list(task.named_modules()):
        if isinstance(part, SimplerBackbone):
            _replace(task, name, part.encoder)
    return task


def answer(task: nn.Module, images: Any) -> list[Tensor]:
    """What a task answers, as a flat list of tensors.

    Args:
        task: The task, in evaluation mode.
        images: A batch, or modalities by name.
    """
    with random_state_kept(SEED), torch.no_grad(), full_float32():
        return list(_tensors(task(images)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "output"):  # TerraTorch's ModelOutput
        yield from _tensors(output.output)


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference between two answers, as a share of the largest value; infinite if they differ in shape."""
    if [part.shape for part in found] != [part.shape for part in expected]:
        return float("inf")
    largest = max((float(part.abs().max()) for part in expected if part.numel()), default=0.0) or 1.0
    gaps = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True) if b.numel()]
    return max(gaps, default=0.0) / largest
