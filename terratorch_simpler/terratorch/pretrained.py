"""Weights for an encoder from a file of the user's: a pruned encoder rebuilds its shape, and an unread file is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from terratorch_simpler.errors import CheckpointError
from terratorch_simpler.indices import resolve_keep
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.models.checkpoint import load_mapped
from terratorch_simpler.models.state import prefixes_of_states, state_in
from terratorch_simpler.plan import SlimmingPlan

FILE_ARGUMENTS = ("ckpt_path", "ckpt_data", "checkpoint_path")
"""What TerraTorch's and timm's encoders call the file of weights."""
COMPARED = 8
"""Numbers at the start of a tensor by which it is recognised in a file."""
ADAPTER_PARTS = {"base_layer", "q_linear", "k_linear", "v_linear"}
"""Parts of layers with LoRA, and of those that TerraTorch splits for it."""

Weights = Mapping[str, Any]


def take_pruned_weights(name: str, arguments: dict[str, Any]) -> Weights | None:
    """Weights of a SimplerBackbone, if that is what the file among the arguments of an encoder holds.

    Args:
        name: Name of the encoder.
        arguments: Arguments of the encoder. If so, the file is taken out, and nothing else is to be fetched.

    Returns:
        The weights of the backbone; None if the file is another one, or there is none.

    Raises:
        CheckpointError: If they cannot be taken from it: adapters, or several backbones.
    """
    for argument in FILE_ARGUMENTS:
        if (path := _local(arguments.get(argument))) is None:
            continue
        weights = _weights_in(_content(path), path)
        if weights is not None:
            del arguments[argument]
            if name.startswith("dinov3"):
                arguments[argument] = None  # it insists on the argument
            if "pretrained" in arguments:
                arguments["pretrained"] = False
            return weights
    return None


def load_pruned(
    backbone: SimplerBackbone,
    weights: Weights,
    keep: int | Sequence[int] | None = None,
    plan: str | Path | None = None,
    width: float = 1.0,
) -> None:
    """Give an intact backbone the shape and the weights of a pruned one, then prune it further if asked to.

    Args:
        backbone: An intact backbone.
        weights: What :func:`take_pruned_weights` has found.
        keep: Blocks to keep of those.
        plan: Plan to apply; one that the weights follow already changes nothing.
        width: Width; 1 for that of the weights.

    Raises:
        CheckpointError: If the weights are of another encoder.
        DepthError: If a block to keep is not among them.
        ConfigurationError: If they are narrower than the width.
    """
    shape = state_in(weights, "of backbone_ckpt_path")
    if shape.trained_widths:
        backbone.set_width(min(width, shape.width))  # loads the slices of this width
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as err:
        if isinstance(err, CheckpointError):
            raise
        msg = (
            f"The weights of backbone_ckpt_path do not fit '{backbone.name}' ({' '.join(str(err).split())[:200]}), expected "
            "those of the same encoder: give the settings it was trained with."
        )
        raise CheckpointError(msg) from err
    backbone.pretrained = True
    if keep is not None:
        backbone.prune_depth(resolve_keep(keep, backbone.full_num_blocks))
    if plan is not None:
        wanted = SlimmingPlan.load(plan)
        if (wanted.kept_blocks, wanted.width) != (backbone.kept, backbone.width):
            backbone.slim(wanted)
    if width != 1:
        backbone.set_width(width)


def check_loaded(encoder: nn.Module, name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a file of weights of which most of the encoder has taken nothing; TerraTorch logs that at best.

    Args:
        encoder: The encoder that TerraTorch has built.
        name: Its name.
        arguments: What it was built with.

    Raises:
        CheckpointError: If fewer than half of its matrices are those of the file.
    """
    if name.startswith("prithvi") and not arguments.get("pretrained"):
        return  # TerraTorch reads no file then, and says so
    for argument in FILE_ARGUMENTS:
        if (path := _local(arguments.get(argument))) is None or (content := _content(path)) is None:
            continue
        known = {_mark(value) for value in filter(torch.is_tensor, tree_leaves(content))}
        matrices = [value for value in encoder.parameters() if value.ndim > 1]
        found = sum(_mark(value) in known for value in matrices)
        if 2 * found < len(matrices):
            msg = (
                f"File {path} has left {len(matrices) - found} of {len(matrices)} matrices of '{name}' as they were, "
                f"expected weights of this encoder: change backbone_{argument}, or the encoder."
            )
            raise CheckpointError(msg)


def _local(path: object) -> Path | None:
    found = Path(path) if isinstance(path, str | Path) else None
    return found if found is not None and found.is_file() else None


def _content(path: Path) -> object:
    """What is in a file; None if it cannot be read, about which the encoder will complain."""
    try:
        return load_mapped(path)
    except Exception:  # a damaged file raises anything
        return None


def _weights_in(content: object, path: Path) -> Weights | None:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    prefixes = sorted(set(prefixes_of_states(state))) if isinstance(state, Mapping) else []
    if not prefixes:
        return None
    if len(prefixes) > 1:
        msg = f"File {path} holds {len(prefixes)} pruned encoders ({', '.join(prefixes)}), expected one: save one of them."
        raise CheckpointError(msg)
    [prefix] = prefixes
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if any(ADAPTER_PARTS & set(key.split(".")) for key in weights):
        msg = (
            f"File {path} holds a pruned encoder with adapters (LoRA), expected plain weights: resume from it with "
            "--ckpt_path, or merge the adapters into the weights and save those."
        )
        raise CheckpointError(msg)
    return weights


def _mark(value: Tensor) -> tuple[float, ...]:
    return (float(value.numel()), *value.detach().flatten()[:COMPARED].float().tolist())
