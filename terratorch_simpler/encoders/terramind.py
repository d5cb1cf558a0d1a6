"""TerraMind from tiny to large, with one modality or several, and with Thinking-in-Modalities (TiM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from terratorch.models.backbones.terramind.model.encoder_embeddings import ImageEncoderEmbedding
from terratorch.models.backbones.terramind.model.terramind_tim import TerraMindTiM
from terratorch.models.backbones.terramind.model.terramind_vit import TerraMindViT
from torch import Tensor, nn

from terratorch_simpler.encoders.base import EncoderSpec, Layout, PatchGrid, image_size, pair, select_modules
from terratorch_simpler.errors import TilesError


class TerraMindSpec(EncoderSpec):
    """``TerraMindViT`` and ``TerraMindTiM``: blocks in ``encoder``, ``encoder_norm`` before modalities are merged.

    The sampler of TiM, a model of its own that generates the further modalities, is left alone.
    """

    family = "TerraMind"

    def matches(self, encoder: Any) -> bool:
        """With and without TiM."""
        return isinstance(encoder, TerraMindViT | TerraMindTiM)

    def return_all_features(self, encoder: Any) -> None:
        """Nothing: it returns the features after all its blocks."""

    def blocks(self, encoder: Any) -> nn.ModuleList:
        """The transformer blocks."""
        return encoder.encoder

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Select blocks; nothing else belongs to single ones."""
        encoder.encoder = nn.ModuleList(select_modules(encoder.encoder, positions))
        encoder.out_channels = encoder.out_channels[:1] * len(positions)

    def out_channels(self, encoder: Any) -> list[int]:
        """Width, times the number of image modalities where they are concatenated."""
        return list(encoder.out_channels)

    def prefix_tokens(self, encoder: Any) -> int:
        """Register tokens."""
        return int(encoder.num_register_tokens)

    def patch_size(self, encoder: Any) -> tuple[int, int, int]:
        """Patch of the first image modality."""
        return _patch(encoder, encoder.image_modalities[0])

    def input_shape(self, encoder: Any) -> dict[str, tuple[int, ...]] | None:
        """Shape of every modality of pixels that is read, by the name that the data gives it; None if there is none."""
        size = pair(encoder.img_size)
        generated = getattr(encoder, "tim_modalities", ())
        shapes: dict[str, tuple[int, ...]] = {}
        for name, key in encoder.mod_name_mapping.items():
            embedding = encoder.encoder_embeddings[key]
            if isinstance(embedding, ImageEncoderEmbedding) and name not in generated:
                _, height, width = _patch(encoder, key)
                # With some of the bands only, TerraTorch replaces the projection and leaves num_channels.
                shapes[name] = (embedding.proj.in_features // (height * width), *size)
        return shapes or None

    def final_norm(self, encoder: Any) -> nn.Module:
        """``encoder_norm``, before modalities are merged."""
        return encoder.encoder_norm

    def features(
        self,
        encoder: Any,
        positions: Sequence[int],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> list[Any]:
        """Run the encoder on a copy of the dictionary: it deletes modalities it does not know, and adds others."""
        copies = tuple(dict(arg) if isinstance(arg, dict) else arg for arg in args)
        return super().features(encoder, positions, copies, kwargs)

    def layout(self, encoder: Any, inputs: Tensor | Mapping[str, Any], length: int) -> Layout:
        """Tokens of the modalities, in the order of the input; what TiM generates follows at the end."""
        by_name = inputs if isinstance(inputs, Mapping) else {encoder.modalities[0]: inputs}
        parts: list[int | PatchGrid | None] = [self.prefix_tokens(encoder)]
        for name, value in by_name.items():
            key = encoder.mod_name_mapping.get(name)
            if key is None:
                continue  # the encoder ignores it, too
            if key in encoder.image_modalities:
                # Three dimensions are tokens (B, rows, columns) instead of pixels.
                patch = _patch(encoder, key) if value.ndim > 3 else (1, 1, 1)
                parts.append(PatchGrid(image_size(value), patch))
            else:
                tokens = value.get("tensor") if isinstance(value, Mapping) else value
                parts.append(int(tokens.shape[1]) if isinstance(tokens, Tensor) else None)
        known = sum(part if isinstance(part, int) else part.tokens for part in parts if part is not None)
        if parts.count(None) > 1 or (None in parts and hasattr(encoder, "tim_modalities")):
            msg = (
                "Found text among the modalities whose number of tokens cannot be told, expected images or tokens: leave "
                "it out of the data for the selection."
            )
            raise TilesError(msg)
        if None in parts:
            return [length - known if part is None else part for part in parts]
        return [*(part for part in parts if part is not None), length - known]


def _patch(encoder: Any, key: str) -> tuple[int, int, int]:
    return (1, *pair(encoder.encoder_embeddings[key].patch_size))
