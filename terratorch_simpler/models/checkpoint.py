"""Reading checkpoints, never more of them than tensors and plain values, and the shape that they say they have."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO
from torch import Tensor, nn

from terratorch_simpler.errors import CheckpointError
from terratorch_simpler.files import load_tensors
from terratorch_simpler.models.state import DEPTH_KEY, KEPT_KEY, PrunedState, state_in, state_of_callback

FILES_IN_FOLDERS = (
    "meta.pt",  # FSDP with sharded state
    "checkpoint/mp_rank_00_model_states.pt",  # DeepSpeed
    "checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt",  # DeepSpeed, stage 3
)
"""Where strategies that write folders keep what is not a sharded tensor."""

CHECKED_BYTES = 2**20
"""Records of a file up to this size are compared with their checksums even if the weights stay on the disk."""


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
        msg = f"Found no state_dict in {path}, expected a checkpoint written by terratorch fit: give one of these."
        raise CheckpointError(msg)
    return content


def read_pruned_state(path: str | os.PathLike[str], checkpoint_io: CheckpointIO, weights_only: bool = True) -> PrunedState:
    """Shape of the encoder that a run resumes with, before the strategy restores it.

    FSDP and DeepSpeed wrap the model before they read the weights, so it has to be pruned by then. Of a local file no
    weights are read: they stay on the disk, whatever their size.

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
            content = checkpoint_io.load_checkpoint(path, weights_only=weights_only)
    except Exception as err:  # a damaged file raises anything
        raise _unreadable(path, err) from err
    return state_in(_weights(content, path), str(path))


def load_mapped(path: str | os.PathLike[str], weights_only: bool = True) -> Any:
    """Load a file that ``torch.save`` has written, with weights that stay on the disk until they are used.

    Raises:
        Exception: Of any kind, if the file is damaged or holds what is not allowed.
    """
    if not zipfile.is_zipfile(path):  # PyTorch before 1.6
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.CRC and entry.file_size <= CHECKED_BYTES:
                archive.read(entry)
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)


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
    """Load the weights of a fit in which nothing was cut, such as one that tuned adapters, to choose a cut after it.

    Args:
        task: The same task, with its intact encoder.
        path: A checkpoint file.

    Raises:
        CheckpointError: If it is damaged, of another model, or of one that was cut.
    """
    weights = _weights(read_checkpoint(path), path)
    shape = state_in(weights, str(path))
    if shape != PrunedState(tuple(range(shape.total)), shape.total):
        msg = (
            f"Found a checkpoint of {len(shape.kept)} of {shape.total} blocks and width {shape.width:g} at {path}, expected "
            "one in which nothing was cut: give that of the fit at full depth."
        )
        raise CheckpointError(msg)
    load_weights(task, weights, path)


def _state_in_folder(folder: Path) -> PrunedState:
    for name in FILES_IN_FOLDERS:
        if (folder / name).is_file():
            callbacks = read_checkpoint(folder / name).get("callbacks")
            states = callbacks.values() if isinstance(callbacks, Mapping) else ()
            for state in states:
                if isinstance(state, Mapping) and {KEPT_KEY, DEPTH_KEY} <= state.keys():
                    return state_of_callback(state, str(folder))
    msg = (
        f"Found nothing in {folder} that tells which blocks were kept, expected a folder that FSDP or DeepSpeed has written "
        "in a run with SimplerCallback: give a checkpoint file."
    )
    raise CheckpointError(msg)


def _weights(content: object, path: object) -> Mapping[str, Any]:
    weights = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        msg = f"Found no state_dict in {path}, expected a checkpoint written by terratorch fit: give one of these."
        raise CheckpointError(msg)
    return weights


def _unreadable(path: object, err: Exception) -> CheckpointError:
    return CheckpointError(
        f"Found no readable checkpoint at {path} ({' '.join(str(err).split())[:120]}), expected one written by terratorch "
        "fit: check the path, or take an earlier one."
    )
