"""Multiply-accumulate operations of an encoder for one tile."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from terratorch_simpler.encoders import InputShape
from terratorch_simpler.extraction.evaluating import evaluating, no_requires_grad
from terratorch_simpler.models.plain import Encoder


def count_macs(backbone: Encoder, input_shape: InputShape) -> int:
    """Multiply-accumulate operations of the encoder for one tile, counted by PyTorch's own FLOP counter.

    Args:
        backbone: The encoder as it stands now.
        input_shape: Shape of one input, (C, H, W) or (C, T, H, W), or of each modality by name.
    """
    return int(_count(backbone, input_shape).get_total_flops()) // 2  # a multiply and an add are one MAC


def _count(backbone: Encoder, input_shape: InputShape) -> FlopCounterMode:
    # Fused attention kernels are not counted on every device; the plain one is made of products that are.
    counter = FlopCounterMode(display=False)
    with (
        evaluating(backbone),
        no_requires_grad(backbone),
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):
        backbone(_empty_tile(backbone, input_shape))
    return counter


def macs_by_block(backbone: Encoder, input_shape: InputShape) -> tuple[int, list[int]]:
    """MACs of the encoder as it stands, and of each of its blocks.

    Args:
        backbone: The encoder.
        input_shape: As for :func:`count_macs`.
    """
    counter = _count(backbone, input_shape)
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    stack = next(name for name, part in backbone.named_modules() if part is backbone.blocks)

    def of(name: str, part: nn.Module) -> int:
        if name in counts:
            return counts[name]
        # A block that is never called itself (Clay) is the sum of its parts.
        return sum(of(f"{name}.{child}", module) for child, module in part.named_children())

    blocks = [of(f"{stack}.{number}", block) // 2 for number, block in enumerate(backbone.blocks)]
    return int(counter.get_total_flops()) // 2, blocks


def _empty_tile(backbone: Encoder, input_shape: InputShape) -> Tensor | dict[str, Tensor]:
    parameter = next(backbone.parameters())
    if isinstance(input_shape, Mapping):
        return {
            name: torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
            for name, shape in input_shape.items()
        }
    return torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
