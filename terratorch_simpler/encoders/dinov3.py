"""DINOv3 vision transformers from Meta's own code and weights, which the user has downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from terratorch.models.backbones.dinov3.dinov3_wrapper import DinoV3Wrapper
from torch import nn

from terratorch_simpler.encoders.base import EncoderSpec, pair, select_modules

NATIVE_SIZE = 224


class DinoV3Spec(EncoderSpec):
    """TerraTorch's ``DinoV3Wrapper``: ``dinov3.blocks``; every feature is normed, storage tokens are dropped from it."""

    family = "DINOv3"

    def matches(self, encoder: Any) -> bool:
        """The vision transformers; the ConvNeXts have stages instead of blocks."""
        return isinstance(encoder, DinoV3Wrapper) and hasattr(encoder.dinov3, "blocks")

    def return_all_features(self, encoder: Any) -> None:
        """Return the features after all blocks."""
        encoder.output_indexes = list(range(len(self.blocks(encoder))))

    def blocks(self, encoder: Any) -> nn.ModuleList:
        """The transformer blocks."""
        return encoder.dinov3.blocks

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Blocks, and what the model says of its depth."""
        model: Any = encoder.dinov3
        model.blocks = nn.ModuleList(select_modules(model.blocks, positions))
        model.n_blocks = len(positions)
        encoder.out_channels = self.out_channels(encoder)
        self.return_all_features(encoder)

    def final_norm(self, encoder: Any) -> nn.Module:
        """``norm``, which follows every feature."""
        return encoder.dinov3.norm

    def out_channels(self, encoder: Any) -> list[int]:
        """The width of a token, after every block."""
        return [int(encoder.dinov3.embed_dim)] * len(self.blocks(encoder))

    def prefix_tokens(self, encoder: Any) -> int:
        """Class and storage tokens."""
        return 1 + int(encoder.dinov3.n_storage_tokens)

    def patch_size(self, encoder: Any) -> tuple[int, int, int]:
        """Patch of the patch embedding."""
        return (1, *pair(encoder.dinov3.patch_size))

    def input_shape(self, encoder: Any) -> tuple[int, ...]:
        """Three bands of any size."""
        channels = encoder.dinov3.patch_embed.proj.in_channels
        return (int(channels), NATIVE_SIZE, NATIVE_SIZE)
