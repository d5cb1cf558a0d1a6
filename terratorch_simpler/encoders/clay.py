"""Clay 1.0, any bands, with time, place and visual prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from terratorch.models.backbones.clay_v1.embedder import Embedder
from terratorch.registry.timm_registry import TimmBackboneWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from terratorch_simpler.encoders.base import EncoderAdapter, pair, prompts_off, take, take_prompts


class ClayAdapter(EncoderAdapter):
    """``clay_v1_base``: pairs of attention and feed-forward in ``clay_encoder.transformer.layers``, final ``norm``."""

    family = "Clay v1"

    def matches(self, encoder: nn.Module) -> bool:
        """Clay's embedder in TerraTorch's timm wrapper."""
        return isinstance(encoder, TimmBackboneWrapper) and isinstance(_embedder(encoder), Embedder)

    def prepare(self, encoder: nn.Module) -> None:
        """Return the features after all blocks."""
        _embedder(encoder).out_indices = tuple(range(len(self.blocks(encoder))))

    def blocks(self, encoder: nn.Module) -> nn.ModuleList:
        """Pairs [attention, feed-forward]; the pair itself is never called."""
        return encoder.clay_encoder.transformer.layers  # type: ignore[union-attr,return-value]

    def rearrange(self, encoder: nn.Module, positions: Sequence[int]) -> None:
        """Blocks, and with them the visual prompts."""
        transformer: Any = encoder.clay_encoder.transformer  # type: ignore[union-attr]
        transformer.layers = nn.ModuleList(take(transformer.layers, positions))
        take_prompts(transformer, positions)
        encoder._out_channels = encoder._out_channels[:1] * len(positions)  # type: ignore[index,operator]
        self.prepare(encoder)

    def out_channels(self, encoder: nn.Module) -> list[int]:
        """Width."""
        return [int(encoder.clay_encoder.dim)] * len(self.blocks(encoder))  # type: ignore[union-attr,arg-type]

    def prefix_tokens(self, encoder: nn.Module) -> int:
        """The class token, and the prompts that stand behind it inside a block."""
        transformer: Any = encoder.clay_encoder.transformer  # type: ignore[union-attr]
        return 1 + (int(transformer.vpt_n_tokens) if transformer.vpt else 0)

    def patch_size(self, encoder: nn.Module) -> tuple[int, int, int]:
        """Patch of the dynamic patch embedding."""
        return (1, *pair(encoder.clay_encoder.patch_size))  # type: ignore[union-attr,arg-type]

    def input_shape(self, encoder: nn.Module) -> tuple[int, ...]:
        """As many bands as were named; the position encoding takes no other size."""
        embedder = _embedder(encoder)
        return (len(embedder.bands), *pair(embedder.img_size))

    def without_prompts(self, encoder: nn.Module) -> AbstractContextManager[object]:
        """Skip VPT."""
        return prompts_off(encoder.clay_encoder.transformer)  # type: ignore[union-attr,arg-type]

    def watch(self, encoder: nn.Module, seen: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """A block is no module that is called: its output is that of its feed-forward part plus the residual."""

        def after_feed_forward(_part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen(output + args[0])

        return [pair[1].register_forward_hook(after_feed_forward) for pair in self.blocks(encoder)]  # type: ignore[index]


def _embedder(encoder: nn.Module) -> Any:
    """TerraTorch keeps Clay's embedder only as the object that ``forward`` is bound to."""
    return getattr(encoder.forward, "__self__", None)
