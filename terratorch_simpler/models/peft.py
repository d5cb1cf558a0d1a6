"""Adapters (PEFT, such as LoRA) that are limited to some blocks of an encoder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from terratorch_simpler.errors import ConfigurationError

if TYPE_CHECKING:
    from terratorch_simpler.models.backbone import SimplerBackbone

PROMPTS = "vpt_prompt_embeddings"
"""What TerraTorch calls the visual prompts of an encoder."""


def adapter_names(module: nn.Module) -> set[str]:
    """Parts of the names of parameters that only those of adapters have."""
    names: set[str] = set()
    for part in module.modules():
        names.update(getattr(part, "adapter_layer_names", ()))  # what PEFT's layers call what they add
    return names


def adapter_blocks(backbone: SimplerBackbone) -> set[int]:
    """Blocks that adapters are limited to, numbered as in the intact encoder; empty if there is no limit."""
    stack = next(name for name, part in backbone.named_modules() if part is backbone.blocks).rpartition(".")[2]
    numbers: set[int] = set()
    for config in getattr(backbone, "peft_config", {}).values():
        layers = getattr(config, "layers_to_transform", None)
        numbers |= {layers} if isinstance(layers, int) else set(layers or ())
        targets = getattr(config, "target_modules", None) or ()
        for target in [targets] if isinstance(targets, str) else targets:
            numbers |= {int(number) for number in re.findall(rf"{re.escape(stack)}\\?\.(\d+)", target)}
    return numbers


def check_adapter_blocks(backbone: SimplerBackbone) -> None:
    """Refuse adapters for blocks of a pruned encoder that PEFT would not find under these numbers.

    Raises:
        ConfigurationError: If a block was dropped, or blocks were dropped in between.
    """
    numbers, kept = adapter_blocks(backbone), list(backbone.kept)
    if not numbers or len(kept) == backbone.full_num_blocks:
        return
    # PEFT counts the blocks it finds, which is the numbering of the intact encoder only without gaps.
    if kept != list(range(len(kept))):
        msg = (
            f"Found adapters (LoRA) for blocks {sorted(numbers)} of an encoder pruned to blocks {kept}, expected "
            "no block numbers where blocks in between are gone: remove layers_to_transform."
        )
        raise ConfigurationError(msg)
    if dropped := sorted(numbers - set(kept)):
        msg = (
            f"Found adapters (LoRA) for blocks {dropped}, expected some of {kept}, the blocks this encoder still holds: "
            "change layers_to_transform."
        )
        raise ConfigurationError(msg)
