"""``backbone_ckpt_path`` for encoders of timm, which TerraTorch builds without one: timm's own conversion, and a count."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from terratorch.registry.timm_registry import TIMM_BACKBONE_REGISTRY
from timm.models import adapt_input_conv, is_model_in_modules, load_state_dict
from torch import Tensor

from terratorch_simpler.errors import CheckpointError
from terratorch_simpler.logger import log
from terratorch_simpler.terratorch.pretrained import ADAPTER_PARTS

MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "beit", "eva")
"""Modules of timm whose encoders are of known families; each has a ``checkpoint_filter_fn``."""
CONTAINERS = ("state_dict", "model", "teacher", "encoder")
"""Keys under which training scripts store the weights; timm looks into the first two, once."""
ANCHOR = "patch_embed.proj.weight"
"""A tensor that every one of these encoders has: what stands before it in a file is the prefix of the encoder."""
RGB = 3
NAMES_SHOWN = 4


def is_timm(source: object, name: str) -> bool:
    """Whether a source of TerraTorch's registry builds ``name`` as a ViT of timm; TerraTorch's Clay is in timm as well."""
    return source is TIMM_BACKBONE_REGISTRY and is_model_in_modules(name.partition(".")[0], MODULES)


def pop_file(name: str, arguments: dict[str, Any]) -> Path | None:
    """Take ``ckpt_path`` out of the arguments of an encoder of timm, which does not know it.

    Args:
        name: Name of the encoder.
        arguments: Arguments of the encoder, changed in place: with a file, ``pretrained`` is false and nothing is fetched.

    Returns:
        The file to load; None if none is set, or ``pretrained: false`` is, as in TerraTorch's deployment config.
    """
    path = arguments.pop("ckpt_path", None)
    if path is None:
        return None
    if arguments.get("pretrained") is False:
        log.warning(f"'{name}' is built with pretrained: false, so its ckpt_path {path} is ignored.")
        return None
    arguments["pretrained"] = False
    return Path(path)


def load_file(encoder: Any, name: str, path: Path) -> None:
    """Load the weights of a file into an encoder of timm and log how many were found.

    Prefixes and containers are removed. timm resamples position and patch embeddings, and repeats the patch embedding of
    three bands for others, as it does with its own weights.

    Args:
        encoder: TerraTorch's wrapper of the encoder.
        name: Name of the encoder, as timm knows it.
        path: A file of safetensors or of ``torch.save``, read with ``weights_only=True``.

    Raises:
        CheckpointError: If the file cannot be read, holds adapters or several encoders, or its weights do not fit.
    """
    model = encoder.model
    weights = _read(path)
    prefix = _prefix(weights, path)
    others = [key for key in weights if not key.startswith(prefix)]
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    try:
        converted = _converted(own, model, name, path)
        result = model.load_state_dict(converted, strict=False)
    except CheckpointError:
        raise
    except Exception as err:  # timm's conversion of foreign weights raises anything
        msg = (
            f"The weights of {path} ({_listed(list(weights))}) do not fit '{name}' ({_reason(err)}), expected those of the "
            "same encoder: change backbone_ckpt_path, or the encoder."
        )
        raise CheckpointError(msg) from err
    needed = list(model.state_dict())
    count = f"{len(needed) - len(result.missing_keys)} of {len(needed)} tensors of {name}"
    if 2 * len(result.missing_keys) > len(needed):
        msg = (
            f"File {path} ({_listed(list(weights))}) holds {count}, expected weights of this encoder "
            f"({_listed(needed)}): change backbone_ckpt_path, or the encoder."
        )
        raise CheckpointError(msg)
    unused = [*result.unexpected_keys, *others]
    rest = f" ({len(unused)} of the file not used: {_listed(unused)})" if unused else ""
    if result.missing_keys:
        log.warning(f"Loaded {count} from {path}{rest}; random as before: {_listed(result.missing_keys)}.")
    else:
        log.info(f"Loaded {count} from {path}{rest}.")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        msg = f"There is no file {path}, expected one with weights: change backbone_ckpt_path."
        raise CheckpointError(msg)
    try:
        content: Mapping[str, Any] = load_state_dict(str(path), weights_only=True)
        while (key := next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)) is not None:
            content = content[key]
    except Exception as err:  # a damaged file raises anything
        msg = (
            f"File {path} cannot be read as weights ({_reason(err)}), expected a state dict of torch.save or safetensors: "
            "change backbone_ckpt_path."
        )
        raise CheckpointError(msg) from err
    weights = {key: value for key, value in content.items() if isinstance(key, str) and torch.is_tensor(value)}
    if not weights:
        msg = (
            f"File {path} holds no tensors by name (its keys: {_listed([str(key) for key in content])}), expected a state "
            "dict: change backbone_ckpt_path."
        )
        raise CheckpointError(msg)
    return weights


def _prefix(weights: Collection[str], path: Path) -> str:
    prefixes = {key.removesuffix(ANCHOR) for key in weights if key == ANCHOR or key.endswith(f".{ANCHOR}")}
    if len(prefixes) > 1 and "" not in prefixes:
        msg = f"File {path} holds {len(prefixes)} encoders ({', '.join(sorted(prefixes))}), expected one: save one of them."
        raise CheckpointError(msg)
    prefix = "" if "" in prefixes else next(iter(prefixes), "")  # none: weights of another layout, which timm may know
    if any(ADAPTER_PARTS & set(key.split(".")) for key in weights if key.startswith(prefix)):
        msg = (
            f"File {path} holds an encoder with adapters (LoRA), expected plain weights: merge the adapters and save those."
        )
        raise CheckpointError(msg)
    return prefix


def _converted(weights: dict[str, Tensor], model: Any, name: str, path: Path) -> dict[str, Tensor]:
    """Weights as timm's own loading converts them, which is within its function that builds a model."""
    convert = sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__].checkpoint_filter_fn
    options = {"interpolation": "bilinear", "antialias": False} if "flexivit" in name else {}  # as timm does
    converted: dict[str, Tensor] = convert(weights, model, **options)
    key = f"{model.pretrained_cfg['first_conv']}.weight"
    if (kernel := converted.get(key)) is not None and kernel.ndim == 4:  # (out, bands, height, width)
        bands, expected = kernel.shape[1], model.get_parameter(key).shape[1]
        if bands == RGB:
            converted[key] = adapt_input_conv(expected, kernel)
        elif bands != expected:
            msg = (
                f"File {path} holds {bands} bands in '{key}', expected {expected}, or {RGB} for timm to repeat: set "
                f"backbone_in_chans to {bands}, or change backbone_ckpt_path."
            )
            raise CheckpointError(msg)
    return converted


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def _reason(err: Exception) -> str:
    return " ".join((str(err) or type(err).__name__).split())[:200]
