"""The pruned model in TerraTorch's own words: depth, mapped indices, no wrapper, no callback."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from terratorch.models.necks import NeckSequential
from torch import Tensor, nn

from terratorch_simpler.errors import ConfigurationError, ExportError
from terratorch_simpler.export.outputs import difference
from terratorch_simpler.export.trained import PREFIX, Trained, backbone_arguments, unwrap
from terratorch_simpler.files import atomic_write
from terratorch_simpler.models.backbone import SimplerBackbone

CONFIG_FILE = "config.yaml"
CHECKPOINT_FILE = "model.ckpt"
OURS = ("plan", "keep", "width", "block_path")
RUN_ARGUMENTS = ("config", "ckpt_path", "weights_only", "verbose", "return_predictions")
"""Arguments of single commands such as fit, which the others refuse."""
ALLOWED = 1e-5
"""Largest difference of an output as a share of its largest value: the same operations on the same weights."""
CHECK = Path(__file__).with_name("check_plain.py")


def check_expressible(backbone: SimplerBackbone) -> None:
    """Refuse what TerraTorch cannot build without this package.

    Raises:
        ExportError: If it is narrowed or repaired, or its family has no setting for the depth.
    """
    if backbone.width != 1:
        msg = (
            f"Found '{backbone.name}' at width {backbone.width:g}, expected 1, since TerraTorch has no setting for the "
            "width of attention heads: use --formats onnx or pt2, or keep terratorch_simpler installed where the model runs."
        )
        raise ExportError(msg)
    if backbone.pruned_state.recovered:
        msg = (
            f"Found '{backbone.name}' with a linear map in the place of dropped blocks, expected none, since TerraTorch has "
            "no such layer: use --formats onnx or pt2, or keep terratorch_simpler installed where the model runs."
        )
        raise ExportError(msg)
    if backbone.num_blocks < backbone.full_num_blocks and backbone.terratorch_kwargs() is None:
        msg = (
            f"Found '{backbone.name}' pruned to {backbone.num_blocks} of {backbone.full_num_blocks} blocks, expected an "
            f"encoder whose depth TerraTorch can set: {backbone.family} has no such setting, so keep terratorch_simpler "
            "installed where the model runs, or export it as onnx or pt2."
        )
        raise ExportError(msg)


def check_export_option(backbone: SimplerBackbone, width: float, recovery: str = "none", *, has_checkpoints: bool) -> None:
    """Refuse ``export: true`` of a fit whose model cannot be exported as plain TerraTorch.

    Args:
        backbone: The encoder, before or after pruning.
        width: The width it gets.
        recovery: The recovery it gets; what it has already is known.
        has_checkpoints: Whether the fit writes checkpoints.

    Raises:
        ConfigurationError: If the model is slimmed in width or gets linear maps, its family has no setting for the depth,
            or there are no checkpoints.
    """
    if width != 1:
        msg = (
            "Found export: true with a width below 1.0, expected 1.0, since TerraTorch has no setting for the width of "
            "attention heads: remove export, and use terratorch-simpler export --formats onnx or pt2 afterwards."
        )
        raise ConfigurationError(msg)
    if recovery == "linear" or backbone.pruned_state.recovered:
        msg = (
            "Found export: true with recovery: linear, expected another recovery, since TerraTorch has no layer for a "
            "linear map: remove export, and use terratorch-simpler export --formats onnx or pt2 afterwards."
        )
        raise ConfigurationError(msg)
    if backbone.terratorch_kwargs() is None:
        msg = (
            f"Found export: true for '{backbone.name}', expected an encoder whose depth TerraTorch can set, which "
            f"{backbone.family} is not: remove export, and use terratorch-simpler export --formats onnx or pt2 afterwards."
        )
        raise ConfigurationError(msg)
    if not has_checkpoints:
        msg = "Found export: true without checkpoints, expected some to export the best: set enable_checkpointing: true."
        raise ConfigurationError(msg)


def export_plain(trained: Trained, config: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path, float]:
    """Write a config and a checkpoint that run where this package is not installed.

    Both are tried in a process that cannot import this package before they get their names.

    Args:
        trained: The trained task; it is taken apart.
        config: The config it was trained with.
        folder: Where to write ``config.yaml`` and ``model.ckpt``.

    Returns:
        The two files, and the largest difference of an output, as a share of the largest value; that of folding adapters
        in counts as well.

    Raises:
        ComparisonError: If outputs of the trained model are alike for all images, or like those of fresh weights.
        ExportError: If TerraTorch cannot express the model, or its outputs differ.
    """
    backbone = trained.backbone
    check_expressible(backbone)
    comparison = trained.comparison()
    model_args, shifted = _plain_model_args(trained.hparams["model_args"], backbone)
    hparams = {**trained.hparams, "model_args": model_args}
    state = unwrap(trained.task).state_dict()
    if shifted:
        state = _shift_necks(trained.task, state)
    how = trained.checkpoint["hyper_parameters"]
    checkpoint = {**trained.checkpoint, "hyper_parameters": {**how, **hparams}, "state_dict": state}
    plain = _plain_config(config, trained.class_path, hparams)
    folder = Path(folder)
    with atomic_write(folder / CONFIG_FILE) as new_config, atomic_write(folder / CHECKPOINT_FILE) as new_checkpoint:
        new_config.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        torch.save(checkpoint, new_checkpoint)
        found, untrained = _outputs_without_us(new_config, new_checkpoint, comparison.images)
        gap, allowed = difference(found, comparison.expected), comparison.tolerance(ALLOWED, untrained)
        if not gap <= allowed:
            msg = (
                f"Found outputs of the plain model that differ by {gap:.2g} of the largest value, expected at most "
                f"{allowed:g}: it is not written; please report the config."
            )
            raise ExportError(msg)
    return folder / CONFIG_FILE, folder / CHECKPOINT_FILE, max(gap, trained.folding)


def _plain_model_args(model_args: Mapping[str, Any], backbone: SimplerBackbone) -> tuple[dict[str, Any], bool]:
    """Arguments of TerraTorch's factory, and whether a neck was put in front of the others."""
    arguments, prefix = backbone_arguments(model_args)
    features = list(range(len(backbone.feature_positions)))
    positions, unchanged = features, True  # an intact encoder of a family without such settings is built as it was
    if (host := backbone.terratorch_kwargs()) is not None:
        arguments.pop("out_indices", None)
        arguments.update(host.arguments)
        positions, unchanged = host.positions, host.positions == features and host.num_features == len(features)
    for key in (*OURS, "ckpt_path"):
        arguments.pop(key, None)
    arguments["pretrained"] = False
    plain = {key: value for key, value in model_args.items() if not (prefix and key.startswith(prefix))}
    plain = copy.deepcopy({key: value for key, value in plain.items() if key not in ("peft_config", "pretrained")})
    plain["backbone"] = str(model_args["backbone"]).removeprefix(PREFIX)
    if prefix:
        plain.update({f"{prefix}{key}": value for key, value in arguments.items()})
    else:
        plain["backbone_kwargs"] = arguments
    necks = plain.get("necks") or []
    shifted = False
    if necks and necks[0].get("name") == "SelectIndices":
        necks[0]["indices"] = [positions[i] for i in necks[0]["indices"]]
    elif not unchanged and (necks or not _own_neck(backbone)):
        plain["necks"] = [{"name": "SelectIndices", "indices": positions}, *necks]
        shifted = bool(necks)
    return plain, shifted


def _own_neck(backbone: SimplerBackbone) -> bool:
    """Whether TerraTorch, if no necks are given, lets the encoder shape its features, which a neck would end."""
    prepare = getattr(backbone, "prepare_features_for_image_model", None)
    marker = [torch.zeros(1)]
    try:
        return prepare is not None and prepare(marker) is not marker
    except (IndexError, ValueError, RuntimeError):
        return True


def _shift_necks(task: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Number the weights of the necks one higher, since there is one more in front."""
    names = [name for name, part in task.named_modules() if isinstance(part, NeckSequential)]
    pattern = re.compile(rf"^({'|'.join(map(re.escape, names))})\.(\d+)\.")
    return {pattern.sub(lambda m: f"{m[1]}.{int(m[2]) + 1}.", key): value for key, value in state.items()}


def _plain_config(config: Mapping[str, Any], class_path: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    plain = copy.deepcopy(dict(config))
    trainer = plain.get("trainer") or {}
    callbacks = [entry for entry in trainer.get("callbacks") or [] if "terratorch_simpler" not in str(_class_of(entry))]
    plain["trainer"] = {**trainer, "callbacks": callbacks}
    model = plain.get("model") or {}
    # What was given on the command line of the fit is in the checkpoint, not in the file.
    plain["model"] = {"class_path": class_path, "init_args": {**(model.get("init_args") or {}), **hparams}}
    for key in RUN_ARGUMENTS:
        plain.pop(key, None)
    modules = plain.get("custom_modules_path")
    if isinstance(modules, str) and Path(modules).name == "terratorch_simpler":
        plain.pop("custom_modules_path")
    return plain


def _class_of(entry: object) -> object:
    return entry.get("class_path") if isinstance(entry, Mapping) else entry


def _outputs_without_us(config: Path, checkpoint: Path, images: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Answers of a process that cannot import this package, with the weights and with fresh ones."""
    with tempfile.TemporaryDirectory() as folder:
        question, reply = Path(folder) / "images.pt", Path(folder) / "outputs.pt"
        torch.save(images, question)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(CHECK), str(config), str(checkpoint), str(question), str(reply)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not reply.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
            msg = (
                f"Found that TerraTorch cannot build the model without this package ({said[0][:300]}), expected it to: it "
                "is not written; please report the config."
            )
            raise ExportError(msg)
        outputs = torch.load(reply, weights_only=True)
    return outputs["trained"], outputs["untrained"]
