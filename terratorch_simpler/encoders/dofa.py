"""DOFA small, base and large: any bands, by their wavelengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from terratorch.models.backbones.dofa_vit import DOFAEncoderWrapper
from torch import nn

from terratorch_simpler.encoders.base import EncoderSpec, pair, select_modules


class DofaSpec(EncoderSpec):
    """TerraTorch's ``DOFAEncoderWrapper``: ``dofa_model.blocks``, a class token first, no final norm."""

    family = "DOFA"

    def matches(self, encoder: Any) -> bool:
        """Any size."""
        return isinstance(encoder, DOFAEncoderWrapper)

    def feature_blocks(self, encoder: Any, out_indices: Sequence[int] | int | None) -> Sequence[int]:
        """The last block by default; order and repetitions are lost, as in TerraTorch."""
        total = len(self.blocks(encoder))
        wanted = super().feature_blocks(encoder, out_indices or [-1])
        return sorted({i % total if -total <= i < total else i for i in wanted})

    def return_all_features(self, encoder: Any) -> None:
        """Return the features after all blocks."""
        encoder.out_indices = list(range(len(self.blocks(encoder))))

    def blocks(self, encoder: Any) -> nn.ModuleList:
        """The transformer blocks."""
        return encoder.dofa_model.blocks

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Select blocks; nothing else belongs to single ones."""
        encoder.dofa_model.blocks = nn.ModuleList(select_modules(self.blocks(encoder), positions))
        encoder.out_channels = self.out_channels(encoder)
        self.return_all_features(encoder)

    def out_channels(self, encoder: Any) -> list[int]:
        """The width of a token, after every block."""
        return [encoder.dofa_model.patch_embed.embed_dim] * len(self.blocks(encoder))

    def prefix_tokens(self, encoder: Any) -> int:  # noqa: ARG002
        """The class token."""
        return 1

    def patch_size(self, encoder: Any) -> tuple[int, int, int]:
        """Patch of the dynamic patch embedding."""
        return (1, *pair(encoder.dofa_model.patch_embed.kernel_size))

    def input_shape(self, encoder: Any) -> tuple[int, ...]:
        """As many bands as wavelengths."""
        return (len(encoder.wavelengths), *pair(encoder.dofa_model.img_size))
