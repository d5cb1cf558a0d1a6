"""Vision transformers of Hugging Face transformers: ViT, DeiT, BEiT, DINOv2 and 3, I-JEPA, towers of CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from terratorch_simpler.encoders.base import pair
from terratorch_simpler.encoders.stack import StackSpec
from terratorch_simpler.indices import feature_position

PRETRAINED = "transformers.modeling_utils.PreTrainedModel"


class TransformersViTSpec(StackSpec):
    """A ``PreTrainedModel`` for images with one ``ModuleList`` of ``config.num_hidden_layers`` blocks.

    Prefix tokens (class, distillation and register tokens) are what precedes the patches of ``config.patch_size``.
    """

    family = "transformers ViT"

    def __init__(self) -> None:
        super().__init__("")

    def matches(self, encoder: Any) -> bool:
        """A model for images with one stack; a ``config`` with ``depths`` describes stages (Swin, Hiera, SegFormer)."""
        # By name: transformers is imported by those who use it.
        pretrained = any(f"{base.__module__}.{base.__name__}" == PRETRAINED for base in type(encoder).__mro__)
        return (
            pretrained
            and encoder.main_input_name == "pixel_values"
            and not hasattr(encoder.config, "depths")
            and _stack(encoder) is not None
        )

    def blocks(self, encoder: Any) -> nn.ModuleList:
        """The transformer blocks."""
        stack = _stack(encoder)
        assert stack is not None  # it matches
        return stack

    def patch_size(self, encoder: Any) -> tuple[int, int, int]:
        """``config.patch_size``."""
        return 1, *pair(encoder.config.patch_size)

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Blocks, and what the configurations of the model and its parts say of depth; they are saved with the weights."""
        before = encoder.config.num_hidden_layers
        super().select_blocks(encoder, positions)
        for part in list(encoder.modules()):
            config = getattr(part, "config", None)
            if getattr(config, "num_hidden_layers", None) == before:
                _set_depth(config, before, len(positions))
                _renumber_blocks(config, positions)
            if len(getattr(part, "stage_names", None) or ()) == before + 1:  # a backbone of a detector or segmenter
                part.stage_names = part.stage_names[: len(positions) + 1]
                part.num_features = part.num_features[: len(positions) + 1]


def _stack(model: Any) -> nn.ModuleList | None:
    depth = getattr(model.config, "num_hidden_layers", None)
    return next((part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth), None)


def _renumber_blocks(config: Any, positions: Sequence[int]) -> None:
    """Blocks that the configuration names by number, as those with windows in VitDet."""
    for name, blocks in list(vars(config).items()):
        if name.endswith("_block_indices") and isinstance(blocks, list | tuple):
            setattr(config, name, [new for new, old in enumerate(positions) if old in blocks])


def _set_depth(config: Any, before: int, after: int) -> None:
    """Set the number of blocks, and the stages (stem, one for each block) that a backbone returns, in proportion."""
    config.num_hidden_layers = after
    if len(getattr(config, "stage_names", None) or ()) != before + 1:
        return
    stages = [i % (before + 1) for i in config.out_indices]
    stages = [1 + feature_position(stage - 1, after, before) if stage else 0 for stage in stages]
    config.stage_names = config.stage_names[: after + 1]
    config.set_output_features_output_indices(out_features=None, out_indices=sorted(set(stages)))
