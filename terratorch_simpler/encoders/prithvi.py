"""Prithvi-EO 1.0 and 2.0, from tiny to 600M: with time and location (TL), time series, visual prompts, ViT-Adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from terratorch.models.backbones import prithvi_vit_adapter
from terratorch.models.backbones.prithvi_mae import PrithviViT
from torch import nn
from torch.utils.hooks import RemovableHandle

from terratorch_simpler.encoders.base import (
    EncoderSpec,
    TerraTorchArguments,
    prompts_disabled,
    select_modules,
    select_prompts,
)
from terratorch_simpler.errors import DepthError, RecoveryError
from terratorch_simpler.pruning.recovery import LinearRecovery


def _has_vit_adapter(encoder: Any) -> bool:
    # Looked up late: TerraTorch puts a dummy there where the compiled operation it needs is missing.
    return isinstance(encoder, prithvi_vit_adapter.PrithviViTAdapter)


class PrithviSpec(EncoderSpec):
    """TerraTorch's ``PrithviViT``: ``blocks``, final ``norm``, a class token first, VPT prompts per block."""

    family = "Prithvi"

    def matches(self, encoder: Any) -> bool:
        """Any PrithviViT without ViT-Adapter."""
        return isinstance(encoder, PrithviViT) and not _has_vit_adapter(encoder)

    def return_all_features(self, encoder: Any) -> None:
        """Replace TerraTorch's closure, which keeps running the original's weights after a deep copy."""
        # A bound method is re-bound by copy and pickle; the closure is not.
        encoder.forward = encoder.forward_features
        self._return_all_blocks(encoder)

    def blocks(self, encoder: Any) -> nn.ModuleList:
        """The transformer blocks."""
        return encoder.blocks

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Select blocks and their visual prompts."""
        encoder.blocks = nn.ModuleList(select_modules(encoder.blocks, positions))
        select_prompts(encoder, positions)
        encoder.out_channels = encoder.out_channels[:1] * len(positions)
        self._return_all_blocks(encoder)

    def final_norm(self, encoder: Any) -> nn.Module | None:
        """``norm``, which ViT-Adapter takes away."""
        return getattr(encoder, "norm", None)

    def without_prompts(self, encoder: Any) -> AbstractContextManager[object]:
        """Skip VPT prompts."""
        return prompts_disabled(encoder)

    def terratorch_kwargs(self, encoder: Any, positions: Sequence[int]) -> TerraTorchArguments | None:
        """``depth``."""
        depth = len(self.blocks(encoder))
        return TerraTorchArguments({"depth": depth}, depth, list(positions))

    @staticmethod
    def _return_all_blocks(encoder: Any) -> None:
        encoder.out_indices = list(range(len(encoder.blocks)))

    def out_channels(self, encoder: Any) -> list[int]:
        """Width times number of frames, since TerraTorch folds time into channels."""
        return list(encoder.out_channels)

    def prefix_tokens(self, encoder: Any) -> int:
        """The class token, and the prompts that stand behind it inside a block."""
        return 1 + (int(encoder.vpt_n_tokens) if encoder.vpt else 0)

    def patch_size(self, encoder: Any) -> tuple[int, int, int]:
        """Patch of the 3-D patch embedding."""
        frames, rows, columns = encoder.patch_embed.patch_size
        return int(frames), int(rows), int(columns)

    def input_shape(self, encoder: Any) -> tuple[int, ...]:
        """(C, T, H, W) the encoder was built for."""
        return (encoder.in_chans, *encoder.patch_embed.input_size)


class PrithviViTAdapterSpec(PrithviSpec):
    """Prithvi with ``vit_adapter: true``: four feature maps, each after one of four ranges of blocks.

    The ranges are spread over the kept blocks; each ends where the last block of the intact range is mapped to.
    """

    family = "Prithvi with ViT-Adapter"
    fewest_blocks = 4
    why_fewest = "ViT-Adapter interacts with four ranges of at least one block each"

    def matches(self, encoder: Any) -> bool:
        """Prithvi built with ``vit_adapter: true``."""
        return _has_vit_adapter(encoder)

    def return_all_features(self, encoder: Any) -> None:
        """Store the ranges of the intact encoder: they cannot be computed from those of a pruned one."""
        encoder.intact_ends = [indexes[-1] for indexes in encoder.interaction_indexes]

    def feature_blocks(self, encoder: Any, out_indices: Sequence[int] | int | None) -> Sequence[int]:
        """Last block of each range."""
        if out_indices is not None:
            msg = (
                f"Found backbone_out_indices {out_indices} with vit_adapter: true, expected none, since the adapter always "
                "returns four feature maps: remove backbone_out_indices."
            )
            raise DepthError(msg)
        return [indexes[-1] for indexes in encoder.interaction_indexes]

    def features(
        self,
        encoder: Any,
        positions: Sequence[int],  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> list[Any]:
        """The four maps, whatever the depth."""
        return list(encoder(*args, **kwargs))

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Select blocks, and spread the four ranges over them."""
        encoder.blocks = nn.ModuleList(select_modules(encoder.blocks, positions))
        encoder.interaction_indexes = _ranges(encoder.intact_ends, len(positions))
        encoder.num_block = len(positions)
        encoder.out_indices = [indexes[-1] for indexes in encoder.interaction_indexes]

    def terratorch_kwargs(self, encoder: Any, positions: Sequence[int]) -> TerraTorchArguments | None:
        """``depth`` and the ranges."""
        ranges = [list(indexes) for indexes in encoder.interaction_indexes]
        arguments = {"depth": len(self.blocks(encoder)), "interaction_indexes": ranges}
        return TerraTorchArguments(arguments, len(positions), list(range(len(positions))))

    def insert_after_block(self, encoder: Any, position: int, token_map: LinearRecovery) -> RemovableHandle:  # noqa: ARG002
        """Not supported: ViT-Adapter changes the tokens between its ranges of blocks, by what is trained later.

        Raises:
            RecoveryError: Always.
        """
        msg = (
            "Found recovery linear with vit_adapter: true, expected an encoder whose tokens are changed by its blocks only: "
            "set recovery: none."
        )
        raise RecoveryError(msg)

    def out_channels(self, encoder: Any) -> list[int]:
        """The same for all maps."""
        return encoder.out_channels[:1] * len(encoder.blocks)

    def prefix_tokens(self, encoder: Any) -> int:  # noqa: ARG002
        """None: the adapter works without a class token."""
        return 0


def _ranges(ends: Sequence[int], after: int) -> list[list[int]]:
    """Ranges [first, last] over ``after`` blocks, in the proportions that their ``ends`` have in the intact encoder."""
    before = ends[-1] + 1
    ranges: list[list[int]] = []
    first = 0
    for number, end in enumerate(ends):
        last = -(-(end + 1) * after // before) - 1  # the kept block that index ``end`` maps to
        # Every range needs a block, the following ones as well.
        last = min(max(last, first), after - (len(ends) - number))
        ranges.append([first, last])
        first = last + 1
    return ranges
