"""DINOv3 vision transformers from Meta's own code and weights, which the user has downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from terratorch.models.backbones.dinov3.dinov3_wrapper import DinoV3Wrapper
from torch import nn

from terratorch_simpler.encoders.base import EncoderAdapter, pair, take

NATIVE_SIZE = 224


class DinoV3Adapter(EncoderAdapter):
    """TerraTorch's ``DinoV3Wrapper``: ``dinov3.blocks``; every feature is normed, storage tokens are dropped from it."""

    family = "DINOv3"

    def matches(self, encoder: nn.Module) -> bool:
        """The vision transformers; the ConvNeXts have stages instead of blocks."""
        return isinstance(encoder, DinoV3Wrapper) and hasattr(encoder.dinov3, "blocks")

    def prepare(self, encoder: nn.Module) -> None:
        """Return the features after all blocks."""
        encoder.output_indexes = list(range(len(self.blocks(encoder))))  # type: ignore[assignment]

    def blocks(self, encoder: nn.Module) -> nn.ModuleList:
        """The transformer blocks."""
        return encoder.dinov3.blocks  # type: ignore[union-attr,return-value]

    def rearrange(self, encoder: nn.Module, positions: Sequence[int]) -> None:
        """Blocks, and what the model says of its depth."""
        model: Any = encoder.dinov3
        model.blocks = nn.ModuleList(take(model.blocks, positions))
        model.n_blocks = len(positions)
        encoder.out_channels = self.out_channels(encoder)  # type: ignore[assignment]
        self.prepare(encoder)

    def out_channels(self, encoder: nn.Module) -> list[int]:
        """Width."""
        return [int(encoder.dinov3.embed_dim)] * len(self.blocks(encoder))  # type: ignore[union-attr,arg-type]

    def prefix_tokens(self, encoder: nn.Module) -> int:
        """Class and storage tokens."""
        return 1 + int(encoder.dinov3.n_storage_tokens)  # type: ignore[union-attr,arg-type]

    def patch_size(self, encoder: nn.Module) -> tuple[int, int, int]:
        """Patch of the patch embedding."""
        return (1, *pair(encoder.dinov3.patch_size))  # type: ignore[union-attr,arg-type]

    def input_shape(self, encoder: nn.Module) -> tuple[int, ...]:
        """Three bands of any size."""
        channels = encoder.dinov3.patch_embed.proj.in_channels  # type: ignore[union-attr]
        return (int(channels), NATIVE_SIZE, NATIVE_SIZE)  # type: ignore[arg-type]
