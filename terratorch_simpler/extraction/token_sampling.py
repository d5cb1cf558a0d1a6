"""Which tokens show data, and which of them are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from terratorch_simpler.data import Batch
from terratorch_simpler.encoders import Layout, PatchGrid
from terratorch_simpler.errors import TilesError
from terratorch_simpler.functional.hsic import full_float32

Tokens = Literal["patch", "cls", "mean", "all"]

ROWS_PER_TILE = 16


class Sample(Protocol):
    """What a sampler has chosen of a batch."""

    def gather(self, output: Tensor) -> Tensor:
        """Rows (R, D) of a block's output (B * T, N, D)."""


class TokenSample(NamedTuple):
    """Which rows of a block's output are sampled, for the tiles of a batch."""

    rows: Tensor  # (R,) into the tokens of all tiles, laid out one tile after the other
    weights: Tensor | None  # (B, tokens) for the mean over patch tokens
    counts: list[int]  # rows of each tile
    special: int = 0  # how many of them, the last ones, are class and register tokens

    def gather(self, output: Tensor) -> Tensor:
        """Rows (R, D) of a block's output (B * T, N, D), where T > 1 if frames pass as separate images."""
        tiles, width = len(self.counts), output.shape[-1]
        if self.weights is None:
            return output.reshape(-1, width).index_select(0, self.rows)
        per_tile = output.reshape(tiles, -1, width)
        with full_float32(), torch.autocast(output.device.type, enabled=False):  # a mean is a matrix product here
            means = torch.einsum("bn,bnd->bd", self.weights, per_tile.to(self.weights.dtype))
        return means.index_select(0, self.rows)


def token_masks(valid: Tensor, images: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Which tokens show at least one valid pixel, and which are no patches (class and register tokens).

    Args:
        valid: Valid pixels of the tiles, (B, H, W) or (B, T, H, W).
        images: Images that the encoder sees at once: B, or B * T if frames have become images.
        layout: What the tokens of an image stand for.

    Returns:
        Bools of shape (B, images of a tile, N) and (N,).
    """
    per_tile = images // valid.shape[0]
    shown: list[Tensor] = []
    special: list[Tensor] = []
    for part in layout:
        if isinstance(part, PatchGrid):
            shown.append(_valid_patches(valid, per_tile, part))
            special.append(torch.zeros(part.tokens, dtype=torch.bool))
        else:
            shown.append(torch.zeros(valid.shape[0], per_tile, part, dtype=torch.bool))
            special.append(torch.ones(part, dtype=torch.bool))
    return torch.cat(shown, dim=2), torch.cat(special)


def _valid_patches(valid: Tensor, images: int, grid: PatchGrid) -> Tensor:
    """Which patches show at least one valid pixel.

    Args:
        valid: Valid pixels of the tiles, (B, H, W) or (B, T, H, W).
        images: Images of a tile.
        grid: Patches of one image. The model may have padded the images evenly on both sides: what is padded mirrors
            pixels that count already.

    Returns:
        Bool of shape (B, images of a tile, patches of an image).
    """
    tiles = valid.shape[0]
    frames_of_image, height, width = grid.size
    frames = frames_of_image * images
    pixels = valid if valid.ndim == 4 else valid[:, None].expand(-1, frames, -1, -1)
    if pixels.shape[1] != frames:
        pixels = pixels.all(dim=1, keepdim=True).expand(-1, frames, -1, -1)
    if pixels.shape[2:] == (1, 1):  # modalities on different grids have no common mask
        pixels = pixels.expand(-1, -1, height, width)
    extra_rows, extra_columns = height - pixels.shape[2], width - pixels.shape[3]
    if min(extra_rows, extra_columns) < 0:  # the model resized the images
        pixels = nn.functional.interpolate(pixels.float(), size=(height, width)) > 0
        extra_rows = extra_columns = 0
    top, left = extra_rows // 2, extra_columns // 2
    pixels = nn.functional.pad(pixels.float(), (left, extra_columns - left, top, extra_rows - top))
    per_image = pixels.reshape(tiles * images, 1, frames_of_image, height, width)
    return nn.functional.max_pool3d(per_image, grid.patch).gt(0).reshape(tiles, images, -1)


@dataclass(frozen=True)
class TokenSampler:
    """Samples rows of every tile from a seed of its own: they depend neither on batches nor on ranks.

    Args:
        tokens: Which rows: patch tokens, the class token, the mean of the patch tokens, or all tokens.
        seed: Seed of the pass.
        with_special: Whether to add, to every tile that has rows, the class and register tokens before its patches.
        rows_per_tile: Most rows of a tile.
    """

    tokens: Tokens = "patch"
    seed: int = 0
    with_special: bool = False
    rows_per_tile: int = ROWS_PER_TILE

    def sample(self, batch: Batch, images: int, layout: Layout, device: torch.device) -> TokenSample:
        """Sample the tiles of a batch.

        Args:
            batch: The batch: ``valid`` pixels and the number (``index``) of each tile.
            images: Images that the encoder sees at once: B, or B * T if frames have become images.
            layout: What the tokens of an image stand for.
            device: Device of the tokens.

        Raises:
            TilesError: If the class token is asked for and there is none.
        """
        valid, special = token_masks(batch["valid"], images, layout)
        return self._draw(valid, special, batch["index"], device)

    def _draw(self, valid: Tensor, special: Tensor, numbers: list[int], device: torch.device) -> TokenSample:
        """Draw from masks as :func:`token_masks` returns them; ``special[0]`` is the class token."""
        if self.tokens == "cls" and not special[0]:
            msg = "This encoder has no class token: set tokens to 'patch', 'mean' or 'all' instead of 'cls'."
            raise TilesError(msg)
        usable = valid.any(dim=(1, 2))
        non_blocking = device.type == "cuda"  # elsewhere memory may be read after it has been freed here
        if self.tokens == "mean":
            weights = valid.flatten(1).float()
            weights = (weights / weights.sum(dim=1, keepdim=True).clamp(min=1)).to(device, non_blocking=non_blocking)
            index = usable.nonzero().flatten()
            return TokenSample(index.to(device, non_blocking=non_blocking), weights, usable.int().tolist())
        if self.tokens == "patch":
            candidates = valid
        else:
            class_token = torch.arange(len(special)) == 0
            candidates = usable[:, None, None] & (class_token if self.tokens == "cls" else special)
            candidates = candidates.expand_as(valid) | (valid & (self.tokens == "all"))
        per_tile = candidates.flatten(1).numpy()
        before_patches = special.cumprod(dim=0).bool() & self.with_special
        extra = np.flatnonzero(before_patches.expand(valid.shape[1:]).flatten().numpy())
        chosen = []
        for tile, (number, row) in enumerate(zip(numbers, per_tile, strict=True)):
            allowed = np.flatnonzero(row)
            picked = np.random.default_rng([self.seed, number]).permutation(allowed)[: self.rows_per_tile]
            added = extra if len(picked) else extra[:0]
            chosen.append(np.concatenate([np.sort(picked), added]) + tile * per_tile.shape[1])
        index = torch.from_numpy(np.concatenate(chosen)).to(device, non_blocking=non_blocking)
        return TokenSample(index, None, [len(rows) for rows in chosen], len(extra))
