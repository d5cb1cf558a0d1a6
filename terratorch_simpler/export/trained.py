"""A trained task from its checkpoint, with adapters folded into the weights, and an input to compare outputs on."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import terratorch.tasks
import torch
from lightning.pytorch import LightningModule
from terratorch.models.peft_utils import QKVSep
from terratorch.models.utils import TemporalWrapper
from torch import Tensor, nn
from torch.nn.functional import interpolate

from terratorch_simpler.errors import CheckpointError, ConfigurationError, ExportError
from terratorch_simpler.export.contents import arguments_of, check_callbacks, check_contents, check_names
from terratorch_simpler.export.outputs import SEED, Comparison, difference, find_comparison, outputs_of
from terratorch_simpler.extraction import random_state_kept
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.models.checkpoint import load_weights, read_checkpoint

PREFIX = "simpler_"
COARSE = 4
"""Rows and columns of the coarse structure of images to compare outputs on."""
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
        folding: Largest difference that folding adapters in made to an output, as a share of its largest value.
        intact_parameters: Parameters of the intact encoder; None if it was not built, or only with adapters.
    """

    class_path: str
    task: LightningModule
    hparams: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    folding: float = 0.0
    intact_parameters: int | None = None

    @property
    def backbone(self) -> SimplerBackbone:
        """The pruned encoder inside the task."""
        return next(part for part in self.task.modules() if isinstance(part, SimplerBackbone))

    def comparison(self) -> Comparison:
        """Images for which the outputs of the task differ.

        Raises:
            ComparisonError: If none is found.
            ExportError: If the encoder does not know the shape of its input.
        """
        return find_comparison(self.task, lambda scale: self.example(scale=scale))

    def example(self, size: int | None = None, batch: int = 2, scale: float = 1.0) -> Any:
        """Seeded images, which differ as scenes do: in the level of every band, in coarse and in fine structure.

        White noise alone would look the same to a model that averages over tokens.

        Args:
            size: Rows and columns in pixels; by default those of the encoder.
            batch: Number of images.
            scale: Their standard deviation, about.

        Raises:
            ExportError: If the encoder does not know the shape of its input.
        """
        shape = self.backbone.input_shape
        if shape is None:
            msg = (
                f"There is no input shape for '{self.backbone.name}', expected bands and size to compare outputs on: an "
                "encoder described by its block path cannot be exported; write an encoder spec (docs/extend.md)."
            )
            raise ExportError(msg)
        generator = torch.Generator().manual_seed(SEED)
        wrapper = next((part for part in self.task.modules() if isinstance(part, TemporalWrapper)), None)
        frames = None if wrapper is None else self._frames(wrapper)

        def draw(one: tuple[int, ...]) -> Tensor:
            channels, *time, height, width = one
            if frames is not None:
                time = [frames]
            elif time == [1]:
                time = []  # single images come without a time axis
            leading, pixels = (batch, channels, *time), (size or height, size or width)
            level = torch.randn(*leading, 1, 1, generator=generator)
            coarse = torch.randn(1, math.prod(leading), COARSE, COARSE, generator=generator)
            coarse = interpolate(coarse, pixels, mode="bilinear").reshape(*leading, *pixels)
            fine = torch.randn(*leading, *pixels, generator=generator)
            return scale * (0.6 * level + 0.8 * coarse + 0.5 * fine)

        if isinstance(shape, dict):
            images = {name: draw(one) for name, one in shape.items()}
            return images if len(images) > 1 else next(iter(images.values()))
        return draw(shape)

    def _frames(self, wrapper: TemporalWrapper) -> int:
        settings = self.hparams["model_args"]
        inner = settings.get("backbone_kwargs") or {}
        given = settings.get("backbone_temporal_n_timestamps") or inner.get("temporal_n_timestamps")
        return given or (sum(wrapper.subset_lengths) if wrapper.subset_lengths else 2)


@random_state_kept()  # a layer starts from random weights before it gets its own
def load_trained(
    config: Mapping[str, Any], checkpoint: str | Path, width: float | None = None, known: Collection[str] = ()
) -> Trained:
    """Build the task of a checkpoint and load its weights.

    Args:
        config: TerraTorch config; its ``model.class_path`` says which task.
        checkpoint: Checkpoint of a fit; what the task was built with is read from it.
        width: One of the widths that it was trained at; by default the largest.
        known: Keys of the checkpoint that hold nothing of the model, besides Lightning's own and that of the datamodule in
            the config.

    Raises:
        NotCarriedError: If the checkpoint holds something of the model that neither its weights nor its arguments are.
        CheckpointError: If the checkpoint cannot be read, or is not one of TerraTorch with a ``simpler_`` backbone.
        ConfigurationError: If the config names no task, or the checkpoint was not trained at this width.
    """
    content = _read(checkpoint)
    check_contents(content, checkpoint, {*known, _datamodule(config)})
    task_class = _task_class(config)
    saved = content["hyper_parameters"]
    class_of_fit = str(saved.get("_class_path", task_class.__name__))  # only fits of the command line say it
    trained_as = class_of_fit.rpartition(".")[2]
    if trained_as != task_class.__name__:
        msg = (
            f"The checkpoint {checkpoint} is of a {trained_as}, but the config describes a {task_class.__name__}: give the "
            "config of the fit that wrote it."
        )
        raise CheckpointError(msg)
    hparams = arguments_of(task_class, saved, checkpoint)
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
    intact = _intact_parameters(task)
    _load(task, content["state_dict"], checkpoint)
    check_callbacks(content, dict(task.named_parameters()).keys(), checkpoint)
    task.eval()
    if width is not None:
        _take_width(task, width)
    class_path = f"{task_class.__module__}.{task_class.__name__}"
    # Lightning's command line looks there for the class.
    how = {"_class_path": class_path, **{key: value for key, value in saved.items() if key.startswith("_")}}
    others: dict[str, Any] = {"hyper_parameters": how}
    others |= {key: content[key] for key in ("epoch", "global_step", "pytorch-lightning_version") if key in content}
    trained = Trained(class_path, task, hparams, others, intact_parameters=intact)
    return _fold_adapters(trained) if any(hasattr(part, "merge_and_unload") for part in task.modules()) else trained


def _intact_parameters(task: nn.Module) -> int | None:
    backbone = next(part for part in task.modules() if isinstance(part, SimplerBackbone))
    adapted = any(hasattr(part, "merge_and_unload") for part in task.modules())
    intact = backbone.num_blocks == backbone.full_num_blocks and backbone.width == 1
    return backbone.num_parameters() if intact and not adapted else None


def _load(task: nn.Module, weights: Mapping[str, Tensor], checkpoint: str | Path) -> None:
    try:
        load_weights(task, weights, checkpoint)
    except CheckpointError as err:
        try:
            names = task.load_state_dict(weights, strict=False)
        except RuntimeError:
            raise err from None
        if not names.missing_keys:
            check_names(names.unexpected_keys, checkpoint)
        raise


def _datamodule(config: Mapping[str, Any]) -> str:
    """The key under which Lightning keeps the state of the datamodule."""
    data = config.get("data")
    return str(data.get("class_path") if isinstance(data, Mapping) else "").rpartition(".")[2]


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
    comparison = trained.comparison()
    _merge_adapters(trained.task)
    gap = difference(outputs_of(trained.task, comparison.images), comparison.expected)
    allowed = comparison.tolerance(FOLDING)
    if not gap <= allowed:
        msg = (
            f"Found outputs that differ by {gap:.2g} of the largest value once the adapters are folded into the weights, "
            f"expected at most {allowed:g}: PEFT cannot fold this kind of adapter in, use LoRA."
        )
        raise ExportError(msg)
    return replace(trained, folding=gap)


def _read(path: str | Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    if not {"state_dict", "hyper_parameters"} <= content.keys():
        msg = (
            f"There is no state_dict with hyper_parameters in {path}, expected a checkpoint written by terratorch fit: give "
            "one of these."
        )
        raise CheckpointError(msg)
    return content


def _task_class(config: Mapping[str, Any]) -> type[LightningModule]:
    model = config.get("model")
    path = model.get("class_path") if isinstance(model, Mapping) else None
    if not isinstance(path, str):
        msg = "There is no model.class_path in the config, expected the task that was trained: give the config of the fit."
        raise ConfigurationError(msg)
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module) if module else terratorch.tasks, name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as err:
        msg = f"Found model.class_path '{path}' ({err}), expected a task that can be imported: check the config."
        raise ConfigurationError(msg) from err


def backbone_arguments(model_args: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Arguments of the backbone, of which TerraTorch takes two forms.

    Returns:
        The arguments without their prefix, and the prefix.
    """
    if model_args.get("backbone_kwargs"):
        return dict(model_args["backbone_kwargs"]), ""
    prefix = "backbone_"
    return {key.removeprefix(prefix): value for key, value in model_args.items() if key.startswith(prefix)}, prefix


def _without_downloads(model_args: dict[str, Any] | None) -> None:
    """The weights come from the checkpoint."""
    model_args = {} if model_args is None else model_args
    for settings, prefix in ((model_args, "backbone_"), (model_args.get("backbone_kwargs") or {}, "")):
        for key in (f"{prefix}pretrained", "pretrained"):
            if key in settings:
                settings[key] = False
        file = settings.pop(f"{prefix}ckpt_path", None)  # which may be gone by now
        if file is not None and str(model_args.get("backbone")).startswith(f"{PREFIX}dinov3"):
            settings[f"{prefix}ckpt_path"] = None  # it insists on the argument
        settings.pop(f"{prefix}plan", None)  # the checkpoint knows its shape


def _merge_adapters(task: nn.Module) -> None:
    """Fold the adapters of PEFT into the weights, and joined query, key and value back into one matrix."""
    wrappers = [(name, part) for name, part in task.named_modules() if hasattr(part, "merge_and_unload")]
    # PEFT nests a tuner that has the method as well inside the model that wraps it.
    outermost = [(name, part) for name, part in wrappers if not any(name.startswith(f"{other}.") for other, _ in wrappers)]
    for name, part in outermost:
        _replace(task, name, part.merge_and_unload())
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
