"""Which tokens show data, and which of them are compared."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from terratorch_simpler.encoders import Layout, PatchGrid
from terratorch_simpler.errors import TilesError
from terratorch_simpler.functional.hsic import full_float32

Tokens = Literal["patch", "cls", "mean", "all"]

ROWS_PER_TILE = 16


class TokenSample(NamedTuple):
    """Which rows of a block's output are compared, for the tiles of a batch."""

    index: Tensor  # (R,) into the tokens of all tiles, laid out one tile after the other
    weights: Tensor | None  # (B, tokens) for the mean over patch tokens
    counts: list[int]  # rows of each tile
    special: int = 0  # how many of them, the last ones, are class and register tokens

    def gather(self, output: Tensor) -> Tensor:
        """Rows (R, D) of a block's output (B * T, N, D), where T > 1 if frames pass as separate images."""
        tiles, width = len(self.counts), output.shape[-1]
        if self.weights is None:
            return output.reshape(-1, width).index_select(0, self.index)
        per_tile = output.reshape(tiles, -1, width)
        with full_float32(), torch.autocast(output.device.type, enabled=False):  # a mean is a matrix product here
            means = torch.einsum("bn,bnd->bd", self.weights, per_tile.to(self.weights.dtype))
        return means.index_select(0, self.index)


def token_masks(valid: Tensor, images: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Which tokens show at least one valid pixel, and which show none by their nature.

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


def sample_tokens(
    valid: Tensor,
    special: Tensor,
    numbers: list[int],
    tokens: Tokens,
    seed: int,
    device: torch.device,
    with_special: bool = False,
) -> TokenSample:
    """Draw rows for every tile from a seed of its own.

    Args:
        valid: Valid patch tokens, (B, images of a tile, N).
        special: Tokens that show no patch, (N,); the first is the class token.
        numbers: Each tile's own number.
        tokens: Which rows to draw.
        seed: Seed of the pass.
        device: Where the rows will be taken.
        with_special: Whether to add, to every tile that has rows, the class and register tokens before its patches.
    """
    if tokens == "cls" and not special[0]:
        msg = "Found tokens 'cls' for an encoder without a class token, expected 'patch', 'mean' or 'all': change tokens."
        raise TilesError(msg)
    usable = valid.any(dim=(1, 2))
    on_its_way = device.type == "cuda"  # others may read the memory after it has been freed here
    if tokens == "mean":
        weights = valid.flatten(1).float()
        weights = (weights / weights.sum(dim=1, keepdim=True).clamp(min=1)).to(device, non_blocking=on_its_way)
        index = usable.nonzero().flatten()
        return TokenSample(index.to(device, non_blocking=on_its_way), weights, usable.int().tolist())
    if tokens == "patch":
        candidates = valid
    else:
        only_class = torch.arange(len(special)) == 0
        candidates = usable[:, None, None] & (only_class if tokens == "cls" else special)
        candidates = candidates.expand_as(valid) | (valid & (tokens == "all"))
    per_tile = candidates.flatten(1).numpy()
    before_patches = special.cumprod(dim=0).bool() & with_special
    extra = np.flatnonzero(before_patches.expand(valid.shape[1:]).flatten().numpy())
    chosen = []
    for tile, (number, row) in enumerate(zip(numbers, per_tile, strict=True)):
        allowed = np.flatnonzero(row)
        picked = np.random.default_rng([seed, number]).permutation(allowed)[:ROWS_PER_TILE]
        added = extra if len(picked) else extra[:0]
        chosen.append(np.concatenate([np.sort(picked), added]) + tile * per_tile.shape[1])
    index = torch.from_numpy(np.concatenate(chosen))
    return TokenSample(index.to(device, non_blocking=on_its_way), None, [len(rows) for rows in chosen], len(extra))
