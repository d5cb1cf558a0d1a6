"""Weights of a file named in the config: a pruned encoder is rebuilt, and a file that does not fit is an error."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from terratorch_simpler.errors import CheckpointError, SimplerWarning
from terratorch_simpler.indices import resolve_keep
from terratorch_simpler.logger import log
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.models.checkpoint import load_mapped
from terratorch_simpler.models.state import prefixes_of_states, state_in
from terratorch_simpler.plan import SlimmingPlan

FILE_ARGUMENTS = ("ckpt_path", "ckpt_data", "checkpoint_path")
"""Arguments of TerraTorch's and timm's encoders that name a file of weights."""
SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
"""Of local files of weights; TerraTorch takes other text for names of its own, or fails on it in its own words."""
FINGERPRINT_LENGTH = 8
"""Leading values of a tensor that identify it in a file."""
ADAPTER_PARTS = {"base_layer", "q_linear", "k_linear", "v_linear"}
"""Parts of layers with LoRA, and of those that TerraTorch splits for it."""

Weights = Mapping[str, Any]
Files = Mapping[str, tuple[Path, object]]
"""Path and content of the local files of weights, by argument."""


def read_files(arguments: Mapping[str, Any]) -> Files:
    """Read the local files of weights among the arguments of an encoder, once; tensors stay on the disk until they are used.

    A file that cannot be read is left out: the encoder reports it.
    """
    files: dict[str, tuple[Path, object]] = {}
    for argument in FILE_ARGUMENTS:
        value = arguments.get(argument)
        if isinstance(value, str | Path) and (path := Path(value)).is_file():
            with suppress(Exception):  # a damaged file raises anything
                files[argument] = path, load_state_dict(str(path)) if path.suffix == ".safetensors" else load_mapped(path)
    return files


def check_files(arguments: Mapping[str, Any]) -> None:
    """Refuse a file of weights that does not exist; what may be a name of TerraTorch's or timm's own is left to them.

    Args:
        arguments: Arguments of an encoder that reads it.

    Raises:
        CheckpointError: If there is one.
    """
    for argument in FILE_ARGUMENTS:
        value = arguments.get(argument)
        if isinstance(value, str) and ":" not in value and Path(value).suffix in SUFFIXES and not Path(value).exists():
            msg = f"There is no file {value}, expected one with weights: change backbone_{argument}."
            raise CheckpointError(msg)


def pop_pruned_weights(name: str, arguments: dict[str, Any], files: Files) -> Weights | None:
    """Weights of a SimplerBackbone, if one of the files holds some.

    Args:
        name: Name of the encoder.
        arguments: Arguments of the encoder, changed in place: the file is removed and ``pretrained`` set to false.
        files: What :func:`read_files` has returned for them.

    Returns:
        The weights of the backbone; None if there is no such file.

    Raises:
        CheckpointError: If the file holds adapters, or several backbones.
    """
    for argument, (path, content) in files.items():
        if (weights := _weights_in(content, path)) is not None:
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
    *,
    state_only: bool = False,
) -> None:
    """Load the pruned state and the weights of a pruned backbone into an intact one, then prune it further if asked to.

    Args:
        backbone: An intact backbone.
        weights: What :func:`pop_pruned_weights` has returned.
        keep: Blocks to keep of those.
        plan: Plan to apply; no-op if the weights are pruned as it says.
        width: Width; 1 for that of the weights.
        state_only: Take the pruned state only, and leave the weights as they are, since ``pretrained`` is false.

    Warns:
        SimplerWarning: If weights are left out.

    Raises:
        CheckpointError: If the weights are of another encoder.
        DepthError: If a block to keep is not among them.
        ConfigurationError: If they are narrower than the width.
    """
    state = state_in(weights, "of backbone_ckpt_path")
    if state_only:
        msg = (
            "backbone_pretrained is false: blocks and width are taken from backbone_ckpt_path, its weights are not loaded; "
            "set backbone_pretrained: true to load them."
        )
        warnings.warn(msg, SimplerWarning, stacklevel=2)
        backbone.match_checkpoint(state)
    else:
        _load(backbone, weights, min(width, state.width) if state.trained_widths else None)
        backbone.pretrained = True
    backbone.mark_trained_widths(())  # what is trained from them is not trained at several widths
    backbone.blocks_given = keep is not None or plan is not None
    if keep is not None:
        backbone.prune_depth(resolve_keep(keep, backbone.full_num_blocks))
    if plan is not None:
        loaded = SlimmingPlan.load(plan)
        if (loaded.kept_blocks, loaded.width) != (backbone.kept, backbone.width):
            backbone.slim(loaded)
        elif loaded.maps and set(loaded.maps) != {before for before, *_ in backbone.pruned_state.recovered}:
            msg = (
                f"The weights of backbone_ckpt_path are pruned as backbone_plan ({plan}) says, and lack its recovery maps, "
                "expected one of them: leave out backbone_plan, or give the weights of the intact encoder."
            )
            raise CheckpointError(msg)
    if width != 1:
        backbone.set_width(width)


def _load(backbone: SimplerBackbone, weights: Weights, width: float | None) -> None:
    if width is not None:
        backbone.set_width(width)  # loads the slices of this width
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


def check_loaded(encoder: nn.Module, name: str, arguments: Mapping[str, Any], files: Files) -> None:
    """Refuse a file of weights that most of the encoder was not loaded from, which TerraTorch at most logs; log the count.

    Args:
        encoder: The encoder that TerraTorch has built.
        name: Its name.
        arguments: What it was built with.
        files: What :func:`read_files` has returned for them.

    Raises:
        CheckpointError: If fewer than half of its matrices are those of the file.
    """
    if name.startswith("prithvi") and not arguments.get("pretrained"):
        return  # TerraTorch reads no file then, and says so
    for argument, (path, content) in files.items():
        in_file = {_fingerprint(value) for value in filter(torch.is_tensor, tree_leaves(content))}
        matrices = [value for value in encoder.parameters() if value.ndim > 1]
        loaded = sum(_fingerprint(value) in in_file for value in matrices)
        if 2 * loaded < len(matrices):
            msg = (
                f"File {path} has left {len(matrices) - loaded} of {len(matrices)} matrices of '{name}' as they were, "
                f"expected weights of this encoder: change backbone_{argument}, or the encoder."
            )
            raise CheckpointError(msg)
        log.info(f"Loaded {loaded} of {len(matrices)} matrices of {name} from {path}.")


def _weights_in(content: object, path: Path) -> Weights | None:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        return None
    prefixes = sorted(set(prefixes_of_states(state)))
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


def _fingerprint(value: Tensor) -> tuple[float, ...]:
    return (float(value.numel()), *value.detach().flatten()[:FINGERPRINT_LENGTH].float().tolist())
