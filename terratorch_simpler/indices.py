"""What a block number, a depth and a width mean: the one place that says so; reading, pruning and loading all use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeGuard

from terratorch_simpler.errors import ConfigurationError, DepthError

LARGEST_DEPTH = 1024
"""Blocks; no encoder has as many."""

Span = tuple[int, int]
"""States before and after a range of blocks: 0 is the input of the first block, l the output of block l."""


def resolve_keep(keep: int | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Turn "the first n blocks" or a list of block numbers into the kept blocks.

    This is the one place that says what a depth or a block number means; feature extraction, pruning and loading all use it.

    Args:
        keep: A count n of first blocks, or block numbers, 0-based.
        num_blocks: Blocks of the intact encoder.

    Returns:
        Block numbers in ascending order.

    Raises:
        DepthError: If there are none, one does not exist, or one is repeated.

    Example:
        >>> resolve_keep(3, 12), resolve_keep([0, 5], 12)
        ((0, 1, 2), (0, 5))
    """
    if isinstance(keep, bool) or not isinstance(keep, int | Sequence) or isinstance(keep, str):
        msg = f"Found keep {keep!r}, expected a number of first blocks or a list of block numbers: give one of these."
        raise DepthError(msg)
    if isinstance(keep, int):
        if not 1 <= keep <= num_blocks:
            msg = f"Found keep {keep}, expected 1 to {num_blocks}, the number of blocks of this encoder: change keep."
            raise DepthError(msg)
        return tuple(range(keep))
    wrong = [i for i in keep if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_blocks]
    if wrong or not keep:
        msg = (
            f"Found keep {list(keep)}, expected at least one block number and all between 0 and {num_blocks - 1}: "
            "block numbers are 0-based, change keep."
        )
        raise DepthError(msg)
    if len(set(keep)) < len(keep):
        msg = f"Found keep {list(keep)} with a repeated block, expected each block at most once: remove the repetition."
        raise DepthError(msg)
    return tuple(sorted(keep))


def feature_position(index: int, num_kept: int, num_blocks: int) -> int:
    """The kept block that stands for feature ``index`` of the intact encoder: ceil((i + 1) k / L) - 1.

    Args:
        index: Block number in the intact encoder, 0-based; negative counts from the end.
        num_kept: Kept blocks k.
        num_blocks: Blocks L of the intact encoder.

    Returns:
        Position among the kept blocks, 0-based.

    Raises:
        DepthError: If the index is outside the intact encoder.

    Example:
        >>> [feature_position(i, 5, 24) for i in (5, 11, 17, 23)]
        [1, 2, 3, 4]
    """
    if not -num_blocks <= index < num_blocks:
        msg = f"Found feature index {index}, expected {-num_blocks} to {num_blocks - 1}: the encoder has no such block."
        raise DepthError(msg)
    return -(-(index % num_blocks + 1) * num_kept // num_blocks) - 1  # ceil in integers


def spans_between(kept: Sequence[int], num_blocks: int) -> list[Span]:
    """The ranges of dropped blocks, as states before and after.

    Args:
        kept: Kept blocks, 0-based, ascending.
        num_blocks: Blocks of the intact encoder.

    Example:
        >>> spans_between([0, 3, 4], 6)
        [(1, 3), (5, 6)]
    """
    edges = [-1, *kept, num_blocks]
    return [(low + 1, high) for low, high in pairwise(edges) if high - low > 1]


def resolve_width(width: object) -> float:
    """Check a width: the share of the units of every attention head and MLP that is kept.

    Args:
        width: What was given.

    Raises:
        ConfigurationError: If it is no number above 0 and at most 1.
    """
    if is_width(width):
        return float(width)
    why = " (no criterion chooses a width: compare widths in a sweep)" if width == "auto" else ""
    msg = f"Found width {width!r}, expected a number above 0 and at most 1{why}: change the width."
    raise ConfigurationError(msg)


def is_width(width: object) -> TypeGuard[float]:
    """Whether it is a number above 0 and at most 1."""
    return isinstance(width, int | float) and not isinstance(width, bool) and 0 < width <= 1


def units(size: int, width: float) -> int:
    """Units that a layer of another width holds: max(1, floor(width * size)).

    Args:
        size: Hidden units of an MLP, or dimensions of an attention head, when intact.
        width: Kept share of them.

    Example:
        >>> units(768, 0.5), units(64, 0.01), units(10, 0.3)
        (384, 1, 3)
    """
    return max(1, math.floor(width * size + 1e-9))  # a product a rounding error below an integer is that integer
