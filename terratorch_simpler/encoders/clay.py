"""Clay 1.0, any bands, with time, place and visual prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from terratorch.models.backbones.clay_v1.embedder import Embedder
from terratorch.registry.timm_registry import TimmBackboneWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from terratorch_simpler.encoders.base import (
    EncoderSpec,
    pair,
    prompts_disabled,
    register_input_hook,
    select_modules,
    select_prompts,
)
from terratorch_simpler.pruning.recovery import LinearRecovery


class ClaySpec(EncoderSpec):
    """``clay_v1_base``: pairs of attention and feed-forward in ``clay_encoder.transformer.layers``, final ``norm``."""

    family = "Clay v1"

    def matches(self, encoder: Any) -> bool:
        """Clay's embedder in TerraTorch's timm wrapper."""
        return isinstance(encoder, TimmBackboneWrapper) and isinstance(_embedder(encoder), Embedder)

    def return_all_features(self, encoder: Any) -> None:
        """Return the features after all blocks."""
        _embedder(encoder).out_indices = tuple(range(len(self.blocks(encoder))))

    def blocks(self, encoder: Any) -> nn.ModuleList:
        """Pairs [attention, feed-forward]; the pair itself is never called."""
        return encoder.clay_encoder.transformer.layers

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Blocks, and with them the visual prompts."""
        transformer: Any = encoder.clay_encoder.transformer
        transformer.layers = nn.ModuleList(select_modules(transformer.layers, positions))
        select_prompts(transformer, positions)
        encoder._out_channels = encoder._out_channels[:1] * len(positions)
        self.return_all_features(encoder)

    def final_norm(self, encoder: Any) -> nn.Module:
        """``norm`` of the transformer."""
        return encoder.clay_encoder.transformer.norm

    def out_channels(self, encoder: Any) -> list[int]:
        """The width of a token, after every block."""
        return [int(encoder.clay_encoder.dim)] * len(self.blocks(encoder))

    def prefix_tokens(self, encoder: Any) -> int:
        """The class token, and the prompts that stand behind it inside a block."""
        transformer: Any = encoder.clay_encoder.transformer
        return 1 + (int(transformer.vpt_n_tokens) if transformer.vpt else 0)

    def patch_size(self, encoder: Any) -> tuple[int, int, int]:
        """Patch of the dynamic patch embedding."""
        return (1, *pair(encoder.clay_encoder.patch_size))

    def input_shape(self, encoder: Any) -> tuple[int, ...]:
        """As many bands as were named; the position encoding takes no other size."""
        embedder = _embedder(encoder)
        return (len(embedder.bands), *pair(embedder.img_size))

    def without_prompts(self, encoder: Any) -> AbstractContextManager[object]:
        """Skip VPT."""
        return prompts_disabled(encoder.clay_encoder.transformer)

    def register_block_hooks(self, encoder: Any, observe: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """A block is no module that is called: its output is that of its feed-forward part plus the residual."""

        def after_feed_forward(_part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            observe(output + args[0])

        layers: Any = self.blocks(encoder)
        return [
            register_input_hook(layers[0][0], observe),
            *(part.register_forward_hook(after_feed_forward) for _, part in layers),
        ]

    def insert_after_block(self, encoder: Any, position: int, token_map: LinearRecovery) -> RemovableHandle:
        """As for hooks: the feed-forward part of a block stands for it, the stack for what enters the first one."""
        if position < 0:
            return encoder.clay_encoder.transformer.register_forward_pre_hook(token_map.before, with_kwargs=True)
        _, feed_forward = encoder.clay_encoder.transformer.layers[position]
        return feed_forward.register_forward_hook(token_map.after_branch)


def _embedder(encoder: Any) -> Any:
    """TerraTorch keeps Clay's embedder only as the object that ``forward`` is bound to."""
    return getattr(encoder.forward, "__self__", None)
