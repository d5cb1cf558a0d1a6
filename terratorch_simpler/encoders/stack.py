"""Any PyTorch model with a stack of equal transformer blocks: nothing is asked of it but tokens in and tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from terratorch_simpler.encoders.base import Layout, PatchGrid, image_size, select_modules
from terratorch_simpler.encoders.by_path import BlockPathSpec
from terratorch_simpler.errors import TilesError, UnsupportedEncoderError


class StackSpec(BlockPathSpec):
    """A stack of equal blocks, tokens (B, N, D) in and out, in a model that need not return features.

    The size of a patch is that of the first module with an attribute ``patch_size``. Without one, patches are square and
    divide the image, and as few tokens as possible precede them: 17 tokens of a 64 x 64 image are a class token and 16
    patches of 16 x 16 pixels.

    Args:
        path: Path of the blocks from the model, as in ``model.get_submodule``.
        prefix_tokens: Tokens before the patches; None for what remains beside the patches.
    """

    family = "model with a stack of blocks"

    def __init__(self, path: str, prefix_tokens: int | None = None) -> None:
        super().__init__(path, argument="blocks")
        self._prefix_tokens = prefix_tokens

    def matches(self, encoder: Any) -> bool:
        """Whether there are at least two equal blocks at the path.

        Raises:
            UnsupportedEncoderError: If there are not.
        """
        self._check_blocks(encoder)
        return True

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Blocks; the container stays the same object, and its first names stay in use."""
        stack = self.blocks(encoder)
        kept = select_modules(stack, positions)
        names = list(stack._modules)[: len(kept)]
        stack._modules.clear()
        stack._modules.update(zip(names, kept, strict=True))

    def layout(self, encoder: Any, inputs: Tensor | Mapping[str, Any], length: int) -> Layout:
        """Patch tokens are the last ones.

        Raises:
            TilesError: If there are fewer tokens than patches, or no square patches fit.
        """
        try:
            self.patch_size(encoder)
        except UnsupportedEncoderError:
            assert isinstance(inputs, Tensor)
            return self._square_patches(image_size(inputs), length)
        return super().layout(encoder, inputs, length)

    def _square_patches(self, size: tuple[int, int, int], length: int) -> Layout:
        counts = range(length // 2 + 1) if self._prefix_tokens is None else [self._prefix_tokens]
        sides = [side for side in range(1, min(size[1:]) + 1) if size[1] % side == size[2] % side == 0]
        for prefix in counts:
            for side in sides:
                grid = PatchGrid(size, (1, side, side))
                if grid.tokens == length - prefix:
                    return [prefix, grid]
        msg = (
            f"The blocks return {length} tokens for images of {size[1]} x {size[2]} pixels, which no square patches explain"
            f"{'' if self._prefix_tokens is None else f' with {self._prefix_tokens} prefix_tokens'}: set prefix_tokens, or "
            "give a module of the model the attribute patch_size."
        )
        raise TilesError(msg)
