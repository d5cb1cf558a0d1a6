"""Vision transformers of torchvision: ``vit_b_16`` to ``vit_h_14``, or a ``VisionTransformer`` of any size."""

from __future__ import annotations

from typing import Any

from torchvision.models import VisionTransformer

from terratorch_simpler.encoders.stack import StackSpec


class TorchvisionViTSpec(StackSpec):
    """``VisionTransformer``: blocks in ``encoder.layers``, a class token first; nothing else describes its depth."""

    family = "torchvision ViT"

    def __init__(self) -> None:
        super().__init__("encoder.layers")

    def matches(self, encoder: Any) -> bool:
        """Any VisionTransformer of torchvision."""
        return isinstance(encoder, VisionTransformer)
