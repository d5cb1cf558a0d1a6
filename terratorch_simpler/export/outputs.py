"""Outputs of two models on inputs that can tell them apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from terratorch_simpler.errors import ComparisonError
from terratorch_simpler.extraction import random_state_kept
from terratorch_simpler.functional.hsic import full_float32

SEED = 0
SCALES = (1.0, 3.0, 10.0, 100.0, 1000.0)
"""Standard deviations of the images to try: normalised first, since a model may have been trained on raw pixels."""
ROUNDING = 1e-5
"""Differences below this share of the largest value may be rounding: about a hundred steps of float32."""
MARGIN = 10.0
"""How many times the tolerance the images, and fresh weights, must change the outputs.

The outputs for two images are 10 tolerances apart or more, so a constant output is 5 away from one of them.
"""
ENOUGH = 1e-3
"""Images that change the outputs by this share are not searched further: no tolerance is above a tenth of it."""


@dataclass(frozen=True)
class Comparison:
    """Images to compare a model on.

    Attributes:
        images: A batch, or modalities by name.
        expected: Outputs of the trained model.
        spread: How far its outputs for different images are apart, as a share of the largest value.
    """

    images: Any
    expected: list[Tensor]
    spread: float

    def tolerance(self, largest: float, untrained: Sequence[Tensor] | None = None) -> float:
        """Largest difference that still says "the same", as a share of the largest value.

        Args:
            largest: What rounding may make.
            untrained: Outputs of the same model with fresh weights.

        Raises:
            ComparisonError: If fresh weights give the outputs of the trained ones.
        """
        apart = self.spread
        if untrained is not None:
            distance = difference(untrained, self.expected)
            if distance < ROUNDING:
                msg = (
                    f"Found outputs of freshly initialised weights that differ by {distance:.1g} of the largest value from "
                    f"those of the trained ones, expected at least {ROUNDING:g}: the comparison would show nothing, so "
                    "nothing is written; give the checkpoint of a model that was trained."
                )
                raise ComparisonError(msg)
            apart = min(apart, distance)
        return min(largest, apart / MARGIN)


def find_comparison(model: Callable[[Any], Any], draw: Callable[[float], Any]) -> Comparison:
    """Search for images whose outputs differ.

    Args:
        model: The trained model, in evaluation mode.
        draw: Draws images of a standard deviation.

    Raises:
        ComparisonError: If they are alike for all images, or not finite.
    """
    best: Comparison | None = None
    for scale in SCALES:
        images = draw(scale)
        expected = outputs_of(model, images)
        if not all(bool(part.isfinite().all()) for part in expected):
            continue
        spread = difference(outputs_of(model, flipped(images)), expected)
        if best is None or spread > best.spread:
            best = Comparison(images, expected, spread)
        if spread >= ENOUGH:
            break
    if best is None:
        msg = (
            "Found NaN or infinity in the outputs of the trained model, expected finite values: the comparison would show "
            "nothing, so nothing is written; give an earlier checkpoint."
        )
        raise ComparisonError(msg)
    if best.spread < ROUNDING:
        msg = (
            f"Found outputs of the trained model for different images that differ by {best.spread:.1g} of the largest "
            f"value, expected at least {ROUNDING:g}: the comparison would show nothing, so nothing is written; give the "
            "checkpoint of a model whose outputs depend on the image."
        )
        raise ComparisonError(msg)
    return best


def flipped(images: Any) -> Any:
    """The same images in the opposite order."""
    return {name: part.flip(0) for name, part in images.items()} if isinstance(images, Mapping) else images.flip(0)


def outputs_of(model: Callable[[Any], Any], images: Any) -> list[Tensor]:
    """Output of a model, as a flat list of tensors; of a detector every box, however low its score.

    Args:
        model: The model, in evaluation mode.
        images: A batch, or modalities by name.
    """
    with random_state_kept(SEED), torch.no_grad(), full_float32(), _all_boxes(model):
        return list(_tensors(model(images)))


@contextmanager
def _all_boxes(model: object) -> Iterator[None]:
    """Detectors of torchvision leave out boxes of low scores, and would give nothing on most images."""
    parts = [part for part in model.modules() if hasattr(part, "score_thresh")] if isinstance(model, nn.Module) else []
    before = [part.score_thresh for part in parts]
    for part in parts:
        part.score_thresh = 0.0  # type: ignore[assignment]
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.score_thresh = value


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):  # TerraTorch's ModelOutput, with its auxiliary heads
            yield from _tensors(vars(leaf))


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference between two outputs, as a share of the largest value of its tensor.

    It is infinite if they differ in shape or are not finite.
    """
    if [part.shape for part in found] != [part.shape for part in expected]:
        return math.inf
    gaps = [0.0]
    for one, other in zip(found, expected, strict=True):
        if other.numel():
            a, b = one.double(), other.double()
            gap = float((a - b).abs().max()) / (float(b.abs().max()) or 1.0)
            gaps.append(gap if math.isfinite(gap) else math.inf)
    return max(gaps)
