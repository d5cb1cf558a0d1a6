"""The pruned state of an encoder, as checkpoints hold it.

It is the backbone's extra state, a tensor of bytes that holds JSON: weight averaging does not touch it,
``weights_only=True`` loads it, and a ``state_dict`` consists of tensors only. Earlier checkpoints hold integer buffers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from terratorch_simpler.errors import CheckpointError
from terratorch_simpler.indices import LARGEST_DEPTH, is_width, spans_between
from terratorch_simpler.pruning.recovery import LARGEST_WIDTH

EXTRA_KEY = "_extra_state"
"""What PyTorch calls a module's extra state in a ``state_dict``."""
KEPT_KEY = "kept_blocks"
DEPTH_KEY = "total_blocks"
WIDTHS_KEY = "kept_widths"
RECOVERED_KEY = "repaired"  # the name that files of earlier versions have
STATE_KEYS = (KEPT_KEY, DEPTH_KEY, WIDTHS_KEY, RECOVERED_KEY)
"""Keys of the JSON, and names of the buffers of earlier checkpoints; the last two are there only if needed."""
MOST_WIDTHS = 100
"""Largest number of widths that one encoder is trained at."""
MOST_BYTES = 2**20
"""Largest size of the JSON."""


class PrunedState(NamedTuple):
    """Kept blocks, width and recovery maps of a pruned encoder.

    Attributes:
        kept: Kept blocks, numbered as in the intact encoder.
        full_num_blocks: Number of blocks of the intact encoder.
        width: Kept share of the units of every attention head and MLP.
        trained_widths: Widths at which the same weights were trained; empty after ordinary training.
        recovered: Recovery maps in the place of dropped ranges: the state before the range (0 is the input of the first
            block, l the output of block l), the width of a token, and whether class and register tokens have their own map.
    """

    kept: tuple[int, ...]
    full_num_blocks: int
    width: float = 1.0
    trained_widths: tuple[float, ...] = ()
    recovered: tuple[tuple[int, int, int], ...] = ()

    def as_plain(self) -> dict[str, Any]:
        """As lists and numbers, for JSON."""
        values: dict[str, Any] = {KEPT_KEY: list(self.kept), DEPTH_KEY: self.full_num_blocks}
        if self.width != 1 or self.trained_widths:
            values[WIDTHS_KEY] = list(self.trained_widths or [self.width])
        if self.recovered:
            values[RECOVERED_KEY] = [list(recovery) for recovery in self.recovered]
        return values

    def as_tensor(self) -> Tensor:
        """As JSON in a tensor of bytes, (N,), uint8."""
        return torch.tensor(list(json.dumps(self.as_plain()).encode("ascii")), dtype=torch.uint8)


def state_in(state_dict: Mapping[str, Any], source: str) -> PrunedState:
    """Pruned state of the one pruned encoder in the weights of a model.

    Args:
        state_dict: The weights.
        source: Where they came from, for messages.

    Raises:
        CheckpointError: If there is no SimplerBackbone in it, or its pruned state is damaged.
    """
    prefix = next(prefixes_of_states(state_dict), None)
    if prefix is None:
        msg = (
            f"Checkpoint {source} has no '{KEPT_KEY}', expected one written with a 'simpler_' backbone: to start from its "
            "weights give it as backbone_ckpt_path; to go on with its run remove 'simpler_' and the callback."
        )
        raise CheckpointError(msg)
    keys = [f"{prefix}{key}" for key in (EXTRA_KEY, *STATE_KEYS)]
    state = pop_state({key: state_dict[key] for key in keys if key in state_dict}, prefix, source)
    assert state is not None
    return state


def prefixes_of_states(state_dict: Mapping[str, Any]) -> Iterator[str]:
    """Names of the backbones with a pruned state in the weights of a model, with a dot at the end, or ''."""
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        prefix = f"{prefix}." if prefix else ""
        if (name == EXTRA_KEY and isinstance(_parsed(value), dict)) or (
            name == KEPT_KEY and f"{prefix}{DEPTH_KEY}" in state_dict
        ):
            yield prefix


def pop_state(state_dict: MutableMapping[str, Any], prefix: str, source: str) -> PrunedState | None:
    """Remove the pruned state of one backbone, in its present or its earlier form, from the weights of a model.

    Args:
        state_dict: The weights, changed in place.
        prefix: Name of the backbone in it, with a dot at the end.
        source: Where they came from, for messages.

    Returns:
        The pruned state; None if there is none.

    Raises:
        CheckpointError: If it is damaged.
    """
    extra = state_dict.pop(f"{prefix}{EXTRA_KEY}", None)
    buffers = {key: state_dict.pop(f"{prefix}{key}") for key in STATE_KEYS if f"{prefix}{key}" in state_dict}
    if extra is not None:
        return parse_state(_parsed(extra), source)
    return parse_state(_of_buffers(buffers), source) if buffers else None


def parse_state(values: object, source: str) -> PrunedState:
    """A pruned state from lists and numbers, checked.

    Args:
        values: What :meth:`PrunedState.as_plain` gives.
        source: Where they came from, for messages.

    Raises:
        CheckpointError: If they are damaged.
    """
    if not isinstance(values, Mapping) or not {KEPT_KEY, DEPTH_KEY} <= values.keys() <= set(STATE_KEYS):
        raise _damaged(KEPT_KEY, values, "kept and total blocks", source)
    kept, total = values[KEPT_KEY], values[DEPTH_KEY]
    if not _integers(kept) or type(total) is not int or not 0 < len(kept) <= LARGEST_DEPTH:
        raise _damaged(KEPT_KEY, kept, "a list of block numbers", source)
    ascending = all(low < high for low, high in zip([-1, *kept], [*kept, total], strict=True))
    if not ascending or total > LARGEST_DEPTH:
        raise _damaged(KEPT_KEY, f"{kept} of {total} blocks", "ascending block numbers of that encoder", source)
    widths = values.get(WIDTHS_KEY, [1.0])
    valid = isinstance(widths, list) and 0 < len(widths) <= MOST_WIDTHS and all(map(is_width, widths))
    if not valid or widths != sorted(set(widths)):
        raise _damaged(WIDTHS_KEY, widths, "ascending numbers above 0 and at most 1", source)
    recovered = values.get(RECOVERED_KEY, [])
    # A map stands for every dropped range, but for the last one if the output of the last kept block is wanted.
    all_befores = [before for before, _ in spans_between(kept, total)]
    befores = [[before for before in all_befores if before <= kept[-1]], all_befores]
    valid = isinstance(recovered, list) and all(_integers(recovery) and len(recovery) == 3 for recovery in recovered)
    if not valid or (recovered and [before for before, _, _ in recovered] not in befores) or not _fit_together(recovered):
        raise _damaged(RECOVERED_KEY, recovered, "a state, a width and a flag for each dropped range", source)
    maps = tuple((before, width, special) for before, width, special in recovered)
    return PrunedState(tuple(kept), total, float(widths[-1]), tuple(map(float, widths)) if len(widths) > 1 else (), maps)


def state_of_callback(state: Mapping[str, Any], source: str) -> PrunedState:
    """Pruned state in that of a SimplerCallback; earlier ones hold the buffers as lists.

    Args:
        state: The state.
        source: Where it came from, for messages.

    Raises:
        CheckpointError: If it is damaged.
    """
    values = {key: state[key] for key in STATE_KEYS if key in state}
    if _integers(values.get(WIDTHS_KEY)):
        values[WIDTHS_KEY] = torch.tensor(values[WIDTHS_KEY], dtype=torch.int64).view(torch.float64).tolist()
    return parse_state(values, source)


def _parsed(extra: Any) -> object:
    """The JSON in a tensor of bytes; the tensor itself if it holds none."""
    if getattr(extra, "ndim", None) != 1 or not 0 < extra.shape[0] <= MOST_BYTES:
        return extra
    # A copy: FSDP passes tensors that are not loaded yet, and users may have cast everything to another type.
    value = torch.clone(extra).detach().double()
    if not bool(((value >= 0) & (value < 128) & (value == value.round())).all()):
        return extra
    try:
        return json.loads(bytes(value.to(torch.uint8).tolist()))
    except ValueError:
        return extra


def _of_buffers(buffers: Mapping[str, Any]) -> dict[str, Any]:
    """Lists and numbers from the integer buffers of earlier checkpoints; other tensors stay, for the message."""
    values: dict[str, Any] = {}
    for key, buffer in buffers.items():
        value = torch.clone(buffer).detach().cpu() if hasattr(buffer, "shape") else torch.as_tensor(buffer)
        if key == WIDTHS_KEY and value.dtype == torch.int64 and value.ndim == 1:
            value = value.view(torch.float64)  # bits, which no precision rounds
        elif value.is_floating_point():
            return {**values, KEPT_KEY: value}
        values[key] = value.tolist()
    return values


def as_widths(widths: Sequence[float]) -> str:
    """Widths in words, for messages."""
    return "widths " + ", ".join(f"{width:g}" for width in widths)


def _integers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _fit_together(recovered: Sequence[Sequence[int]]) -> bool:
    one_width = len({width for _, width, _ in recovered}) <= 1
    return one_width and all(0 < width <= LARGEST_WIDTH and special in (0, 1) for _, width, special in recovered)


def _damaged(key: str, value: object, expected: str, source: str) -> CheckpointError:
    shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:100]
    return CheckpointError(
        f"Checkpoint {source} has '{key}' {shown}, expected {expected}: it is damaged, take an earlier one."
    )
