"""An encoder of no known family, described by the path of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from terratorch_simpler.encoders.base import EncoderSpec, Layout, PatchGrid, image_size, pair, select_modules
from terratorch_simpler.errors import TilesError, UnsupportedEncoderError


class BlockPathSpec(EncoderSpec):
    """A stack of equal blocks, tokens (B, N, D) in and out, at a path such as ``vit.blocks``.

    The encoder must return a feature for each block it holds, or one for the last, and say the channels of these in
    ``out_channels``; it must not rely on the number of blocks elsewhere.

    Args:
        path: Path of the blocks from the encoder, as in ``encoder.get_submodule``.
        argument: What the user calls the path, for messages.
    """

    family = "described by its block path"

    def __init__(self, path: str, argument: str = "backbone_block_path") -> None:
        self._path = path
        self._argument = argument

    def matches(self, encoder: Any) -> bool:
        """Whether there are equal blocks at the path.

        Raises:
            UnsupportedEncoderError: If there are none, or they differ, or the features do not fit.
        """
        self._check_blocks(encoder)
        blocks = self.blocks(encoder)
        features = len(_channels(encoder))
        if features not in (1, len(blocks)):
            msg = (
                f"Found {features} features (out_channels) of {type(encoder).__name__} with {len(blocks)} blocks at "
                f"'{self._path}', expected one for each block or one for the last: build it so, with all or no out_indices."
            )
            raise UnsupportedEncoderError(msg)
        return True

    def _check_blocks(self, encoder: Any) -> None:
        blocks = self.blocks(encoder)
        shapes = [[(name, tuple(value.shape)) for name, value in block.state_dict().items()] for block in blocks]
        odd = [i for i, shape in enumerate(shapes) if shape != shapes[0]]
        if odd or len(blocks) < 2:
            found = f"block {odd[0]} of other weights than block 0" if odd else f"{len(blocks)} block"
            msg = (
                f"Found {found} at {self._argument} '{self._path}', expected at least two equal blocks: name the list "
                "of transformer blocks."
            )
            raise UnsupportedEncoderError(msg)

    def blocks(self, encoder: Any) -> nn.ModuleList | nn.Sequential:
        """The blocks at the path."""
        try:
            blocks = encoder.get_submodule(self._path)
        except AttributeError:
            blocks = None
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            return blocks
        found = "nothing" if blocks is None else f"a {type(blocks).__name__}"
        stacks = [
            name
            for name, part in encoder.named_modules()
            if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 2
        ]
        msg = (
            f"Found {found} at {self._argument} '{self._path}' of {type(encoder).__name__}, expected its list of blocks: "
            f"name one such as {', '.join(stacks[:5]) or 'blocks'}."
        )
        raise UnsupportedEncoderError(msg)

    def feature_blocks(self, encoder: Any, out_indices: Sequence[int] | int | None) -> Sequence[int]:
        """All blocks, or the last; or those that were asked for."""
        total = len(self.blocks(encoder))
        if out_indices is None and len(_channels(encoder)) == 1:
            return [total - 1]
        return super().feature_blocks(encoder, out_indices)

    def return_all_features(self, encoder: Any) -> None:
        """Nothing to do: it must return one feature for each block, or the last one, by itself."""

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Select blocks; nothing else belongs to single ones."""
        parent, _, name = self._path.rpartition(".")
        blocks = self.blocks(encoder)
        kept = select_modules(blocks, positions)
        stack = nn.Sequential(*kept) if isinstance(blocks, nn.Sequential) else nn.ModuleList(kept)
        setattr(encoder.get_submodule(parent), name, stack)

    def out_channels(self, encoder: Any) -> list[int]:
        """What the encoder says."""
        channels = _channels(encoder)
        return channels * len(self.blocks(encoder)) if len(channels) == 1 else channels

    def features(
        self,
        encoder: Any,
        positions: Sequence[int],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> list[Any]:
        """Features of the encoder, which must follow its present number of blocks."""
        output = encoder(*args, **kwargs)
        features = list(output) if isinstance(output, list | tuple) else [output]
        held = len(self.blocks(encoder))
        if len(features) == 1 and set(positions) == {held - 1}:
            return features * len(positions)
        if len(features) != held:
            msg = (
                f"Found {len(features)} features of {type(encoder).__name__} with {held} blocks, expected one for each: it "
                "cannot be pruned by its block path alone; write an encoder spec for it."
            )
            raise UnsupportedEncoderError(msg)
        return [features[position] for position in positions]

    def prefix_tokens(self, encoder: Any) -> int:
        """Number of class and other tokens; what else there is before the patches shows only in an output."""
        return int(getattr(encoder, "num_prefix_tokens", 0))

    def patch_size(self, encoder: Any) -> tuple[int, int, int]:
        """That of the first part that has one, as TerraTorch looks it up.

        Raises:
            UnsupportedEncoderError: If none has.
        """
        for part in encoder.modules():
            size: Any = getattr(part, "patch_size", None)
            if isinstance(size, int) or (isinstance(size, Sequence) and 2 <= len(size) <= 3):
                rows, columns = pair(size)
                frames = int(size[0]) if not isinstance(size, int) and len(size) == 3 else 1
                return frames, rows, columns
        msg = (
            f"There is no patch_size in {type(encoder).__name__}, expected one that says which pixels a token shows: give "
            "one of its modules the attribute patch_size."
        )
        raise UnsupportedEncoderError(msg)

    def input_shape(self, encoder: Any) -> None:  # noqa: ARG002
        """Not known before tiles pass."""
        return

    def layout(self, encoder: Any, inputs: Tensor | Mapping[str, Any], length: int) -> Layout:
        """Patch tokens are the last ones; what stands before them are class and other tokens."""
        if not isinstance(inputs, Tensor):
            msg = "Found tiles with modalities, expected one image: an encoder of several needs an encoder spec of its own."
            raise TilesError(msg)
        grid = PatchGrid(image_size(inputs), self.patch_size(encoder))
        if length < grid.tokens:
            msg = (
                f"Found {length} tokens at '{self._path}', expected at least the {grid.tokens} patches of "
                f"{grid.patch[1]} x {grid.patch[2]} pixels: the blocks' outputs are no tokens, write an encoder spec."
            )
            raise TilesError(msg)
        return [length - grid.tokens, grid]


def _channels(encoder: Any) -> list[int]:
    channels: Any = getattr(encoder, "out_channels", None)
    if isinstance(channels, int):
        return [channels]
    if not channels:
        msg = (
            f"There is no out_channels in {type(encoder).__name__}, expected the channels of its features: TerraTorch's "
            "factories need it, too."
        )
        raise UnsupportedEncoderError(msg)
    return [int(width) for width in channels]
