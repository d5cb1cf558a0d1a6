"""Prithvi-EO 1.0 and 2.0, from tiny to 600M, with and without time and location (TL), single image or time series."""

from __future__ import annotations

from collections.abc import Sequence

from terratorch.models.backbones.prithvi_mae import PrithviViT
from terratorch.models.backbones.prithvi_vit_adapter import PrithviViTAdapter
from torch import nn

from terratorch_simpler.encoders.base import EncoderAdapter, take
from terratorch_simpler.errors import UnsupportedEncoderError


class PrithviAdapter(EncoderAdapter):
    """TerraTorch's ``PrithviViT``: ``blocks``, final ``norm``, a class token first, VPT prompts per block."""

    family = "Prithvi"

    def matches(self, encoder: nn.Module) -> bool:
        """Any PrithviViT without ViT-Adapter."""
        if isinstance(encoder, PrithviViTAdapter):
            msg = (
                "Found a Prithvi with vit_adapter: true, expected a plain Prithvi: its four interaction ranges span all "
                "blocks; remove backbone_vit_adapter, or use the backbone without 'simpler_'."
            )
            raise UnsupportedEncoderError(msg)
        return isinstance(encoder, PrithviViT)

    def prepare(self, encoder: nn.Module) -> None:
        """Replace TerraTorch's closure, which keeps running the original's weights after a deep copy."""
        # A bound method is re-bound by copy and pickle; the closure is not.
        encoder.forward = encoder.forward_features  # type: ignore[method-assign,assignment]
        self._renumber(encoder)

    def blocks(self, encoder: nn.Module) -> nn.ModuleList:
        """The transformer blocks."""
        return encoder.blocks  # type: ignore[return-value]

    def rearrange(self, encoder: nn.Module, positions: Sequence[int]) -> None:
        """Blocks, and with them the visual prompts, which TerraTorch looks up by position."""
        encoder.blocks = nn.ModuleList(take(encoder.blocks, positions))  # type: ignore[arg-type]
        if encoder.vpt:
            prompts = take(encoder.vpt_prompt_embeddings, positions)  # type: ignore[arg-type]
            encoder.vpt_prompt_embeddings = nn.ParameterList(prompts)
            encoder.vpt_dropout_layers = nn.ModuleList(take(encoder.vpt_dropout_layers, positions))  # type: ignore[arg-type]
        encoder.out_channels = encoder.out_channels[:1] * len(positions)  # type: ignore[index,operator]
        self._renumber(encoder)

    @staticmethod
    def _renumber(encoder: nn.Module) -> None:
        encoder.out_indices = list(range(len(encoder.blocks)))  # type: ignore[arg-type,assignment]

    def out_channels(self, encoder: nn.Module) -> list[int]:
        """Width times number of frames, since TerraTorch folds time into channels."""
        return list(encoder.out_channels)  # type: ignore[arg-type]

    def prefix_tokens(self, encoder: nn.Module) -> int:
        """The class token, and the prompts that stand behind it inside a block."""
        return 1 + (int(encoder.vpt_n_tokens) if encoder.vpt else 0)  # type: ignore[arg-type]

    def patch_size(self, encoder: nn.Module) -> tuple[int, int, int]:
        """Patch of the 3-D patch embedding."""
        frames, rows, columns = encoder.patch_embed.patch_size  # type: ignore[union-attr,misc]
        return int(frames), int(rows), int(columns)

    def input_shape(self, encoder: nn.Module) -> tuple[int, ...]:
        """(C, T, H, W) the encoder was built for."""
        return (encoder.in_chans, *encoder.patch_embed.input_size)  # type: ignore[union-attr,return-value]
