"""Reading checkpoints, tensors and plain values only, and whether they fit a backbone."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import CheckpointIO
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from terratorch_simpler.errors import CheckpointError
from terratorch_simpler.files import load_tensors
from terratorch_simpler.models.state import DEPTH_KEY, KEPT_KEY, PrunedState, state_in, state_of_callback

if TYPE_CHECKING:
    from terratorch_simpler.models.backbone import SimplerBackbone

FILES_IN_FOLDERS = (
    "meta.pt",  # FSDP with sharded state
    "checkpoint/mp_rank_00_model_states.pt",  # DeepSpeed
    "checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt",  # DeepSpeed, stage 3
)
"""Files of strategies that write folders with everything but the sharded tensors."""

CHECKED_BYTES = 2**20
"""Records up to this size are compared with their checksums even if the weights stay on the disk."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file; nothing in it is executed.

    Args:
        path: A local file.

    Raises:
        CheckpointError: If it is damaged, or holds anything but tensors and plain values.
    """
    try:
        content = load_tensors(path)
    except Exception as err:  # a damaged file raises anything: RuntimeError, EOFError, UnpicklingError, ...
        raise _unreadable(path, err) from err
    if not isinstance(content, dict):
        msg = f"There is no state_dict in {path}, expected a checkpoint written by terratorch fit: give one of these."
        raise CheckpointError(msg)
    return content


def read_pruned_state(path: str | os.PathLike[str], checkpoint_io: CheckpointIO, weights_only: bool = True) -> PrunedState:
    """Pruned state of the encoder that a run resumes with, before the strategy restores it.

    FSDP and DeepSpeed wrap the model before they read the weights, so it has to be pruned by then. The weights of a local
    file stay on the disk, whatever their size.

    Args:
        path: A file, or the folder that FSDP or DeepSpeed has written.
        checkpoint_io: Reads what is not a local file.
        weights_only: Whether to refuse anything but tensors and plain values, as the fit that resumes does.

    Raises:
        CheckpointError: If it is damaged, or not of a SimplerBackbone.
    """
    local = Path(path)
    if local.is_dir():
        return _state_in_folder(local)
    try:
        if local.exists():
            content = load_mapped(local, weights_only)
        else:
            content = checkpoint_io.load_checkpoint(os.fspath(path), weights_only=weights_only)
    except Exception as err:  # a damaged file raises anything
        raise _unreadable(path, err) from err
    return state_in(_weights(content, path), str(path))


def load_mapped(path: str | os.PathLike[str], weights_only: bool = True) -> Any:
    """Load a file that ``torch.save`` has written, with weights that stay on the disk until they are used.

    Raises:
        Exception: Of any kind, if the file is damaged or holds what is not allowed.
    """
    with open(path, "rb") as file:
        mapped = zipfile.is_zipfile(file)  # PyTorch before 1.6 wrote other files
        if mapped:
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.CRC and entry.file_size <= CHECKED_BYTES:
                        archive.read(entry)
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mapped)


def load_weights(task: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Load the weights of a task, all of them.

    Args:
        task: The task.
        weights: What its checkpoint holds.
        source: Where they came from, for messages.

    Raises:
        CheckpointError: If they do not fit.
    """
    try:
        task.load_state_dict(weights, strict=True)
    except RuntimeError as err:
        if isinstance(err, CheckpointError):
            raise
        msg = (
            f"Found weights in checkpoint {source} that do not fit the model ({' '.join(str(err).split())[:200]}), expected "
            "those of a terratorch fit of the same model: check the path."
        )
        raise CheckpointError(msg) from err


def load_at_full_depth(task: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of a fit of the intact encoder, such as one that tuned adapters, to prune it afterwards.

    Args:
        task: The same task, with its intact encoder.
        path: A checkpoint file.

    Raises:
        CheckpointError: If it is damaged, of another model, or of a pruned one.
    """
    weights = _weights(read_checkpoint(path), path)
    state = state_in(weights, str(path))
    if state != PrunedState(tuple(range(state.full_num_blocks)), state.full_num_blocks):
        msg = (
            f"The checkpoint {path} holds {len(state.kept)} of {state.full_num_blocks} blocks at width {state.width:g}, "
            "expected one of the intact encoder: give that of the fit at full depth."
        )
        raise CheckpointError(msg)
    load_weights(task, weights, path)


def refuse_plain_weights(backbone: SimplerBackbone, weights: Mapping[str, Any], prefix: str) -> None:
    """Refuse the weights of the same encoder without a SimplerBackbone: none of them would be loaded.

    Raises:
        CheckpointError: If most of them are named as in the encoder itself.
    """
    names = [name for name, _ in backbone.encoder.named_parameters()]
    plain = sum(f"{prefix}{name}" in weights for name in names)
    own = sum(f"{prefix}encoder.{name}" in weights for name in names)
    if plain > max(own, len(names) // 2):
        msg = (
            f"The checkpoint holds '{backbone.name}' without 'simpler_' ({plain} weights at '{prefix}'), expected one "
            "written with it: give the file as backbone_ckpt_path, or load it into the attribute encoder of the backbone."
        )
        raise CheckpointError(msg)


def check_weights(backbone: SimplerBackbone, weights: Mapping[str, Tensor], prefix: str, state: PrunedState) -> None:
    """Check that weights fit a backbone in the pruned state they claim, before it is changed.

    Args:
        backbone: The backbone, in any pruned state.
        weights: Those of a model.
        prefix: Name of the backbone in it, with a dot at the end.
        state: The pruned state that the weights claim.

    Raises:
        CheckpointError: If they are of another encoder, or lack blocks or recovery maps.
    """
    inside = f"{prefix}encoder."
    if not any(isinstance(part, FullyShardedDataParallel) for part in backbone.modules()):  # has shards of its weights only
        slimmed = {} if state.width == backbone.width else backbone.at_width(state.width).shapes()
        by_block = backbone.dimensions_by_block()
        for key, value in backbone.encoder.state_dict(keep_vars=True).items():
            other, shape = weights.get(inside + key), slimmed.get(id(value), value.shape)
            if key in by_block:  # what blocks it holds is that of the checkpoint
                shape = torch.Size(len(state.kept) if axis == by_block[key] else size for axis, size in enumerate(shape))
            if other is not None and other.shape != shape:
                msg = (
                    f"Found '{inside}{key}' of shape {tuple(other.shape)} in the checkpoint, expected {tuple(shape)} of "
                    f"'{backbone.name}': give the configuration the checkpoint was trained with."
                )
                raise CheckpointError(msg)
    if (state.kept, state.width) != (backbone.kept, backbone.width):
        stack = next(name for name, part in backbone.encoder.named_modules() if part is backbone.blocks)
        blocks = f"{inside}{stack}."
        positions = {key.removeprefix(blocks).partition(".")[0] for key in weights if key.startswith(blocks)}
        if missing := [block for position, block in enumerate(state.kept) if str(position) not in positions]:
            msg = (
                f"The checkpoint says that '{backbone.name}' keeps the blocks {list(state.kept)} and holds no weights of "
                f"{missing}, expected those of all: it is damaged, take an earlier one."
            )
            raise CheckpointError(msg)
    for before, width, _ in state.recovered:
        weight = weights.get(f"{prefix}recovery.{before}.patch.weight")
        if weight is None or weight.shape != (width, width):
            msg = (
                f"There is no map of {width} x {width} for '{prefix}recovery.{before}' in the checkpoint, expected one, "
                "since it records a recovery map: the checkpoint is damaged, take an earlier one."
            )
            raise CheckpointError(msg)


def _state_in_folder(folder: Path) -> PrunedState:
    for name in FILES_IN_FOLDERS:
        if (folder / name).is_file():
            try:
                content = load_mapped(folder / name)
            except Exception as err:  # a damaged file raises anything
                raise _unreadable(folder / name, err) from err
            callbacks = content.get("callbacks") if isinstance(content, Mapping) else None
            states = callbacks.values() if isinstance(callbacks, Mapping) else ()
            for state in states:
                if isinstance(state, Mapping) and {KEPT_KEY, DEPTH_KEY} <= state.keys():
                    return state_of_callback(state, str(folder))
    msg = (
        f"There are no kept blocks in {folder}, expected a folder that FSDP or DeepSpeed has written "
        "in a run with SimplerCallback: give a checkpoint file."
    )
    raise CheckpointError(msg)


def _weights(content: object, path: object) -> Mapping[str, Any]:
    weights = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        msg = f"There is no state_dict in {path}, expected a checkpoint written by terratorch fit: give one of these."
        raise CheckpointError(msg)
    return weights


def _unreadable(path: object, err: Exception) -> CheckpointError:
    return CheckpointError(
        f"There is no readable checkpoint at {path} ({' '.join(str(err).split())[:120]}), expected one written by "
        "terratorch fit: check the path, or take an earlier one."
    )
