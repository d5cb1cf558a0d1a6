"""Mean and standard deviation of every band as it reaches the encoder: raw pixels would make any choice worthless."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import TypeAlias

import torch
from torch import Tensor

from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import ImplausibleInputWarning

LARGEST_MEAN = 3.0
SMALLEST_STD, LARGEST_STD = 0.1, 10.0
PIXELS_ACROSS = 64
"""Rows and columns of a tile that are looked at: every n-th one of larger tiles."""
MOST_NAMED = 12


Sums: TypeAlias = dict[str, Tensor]
"""By modality, "" if there are none; (3, C): number of pixels of every band, their sum, and that of their squares."""


class InputStatistics:
    """Sums over the valid pixels of every band of the tiles that count, whichever batches they came in.

    Sums of a tile stay on the device of the images until it is known whether it counts: nothing waits for them before.

    Attributes:
        names: Names of the bands, of one image or of each modality, where they are known.
        sums: Sums over the tiles that count, float64, on the CPU.
    """

    def __init__(self, names: Sequence[str] | Mapping[str, Sequence[str]] = ()) -> None:
        self.names = names
        self.sums: Sums = {}
        self._of_tiles: dict[int, Sums] = {}  # by position in the stream

    def add(self, images: Tensor | Mapping[str, object], valid: Tensor, positions: Sequence[int]) -> None:
        """Add the images of a batch; a tile that comes again, since memory ran out, is not added twice.

        Args:
            images: What reaches the encoder, (B, C, ...), or that of each modality by name; frames may be images of their
                own, so that there is a multiple of B.
            valid: Valid pixels of the B tiles, (B, H, W) or (B, T, H, W), on the CPU.
            positions: Of the B tiles in the stream.
        """
        for name, image in (images if isinstance(images, Mapping) else {"": images}).items():
            if not isinstance(image, Tensor) or image.ndim < 4 or not image.is_floating_point():
                continue
            pixels, mask = _sampled(image, valid)
            pixels = pixels.double() if pixels.device.type != "mps" else pixels.float()
            mask = mask.to(pixels.device, non_blocking=pixels.is_cuda).to(pixels.dtype)
            seen = torch.where(mask > 0, pixels, 0)  # NaN in nodata times 0 would be NaN
            sums = torch.stack([one.flatten(2).sum(2) for one in (mask.expand_as(pixels), seen, seen.square())], dim=1)
            for position, of_tile in zip(positions, sums, strict=True):
                self._of_tiles.setdefault(position, {})[name] = of_tile

    def take(self, end: float) -> dict[str, tuple[list[int], Tensor]]:
        """Sums of the tiles before a position of the stream, which are no longer held here.

        Returns:
            By modality the positions of the tiles that have it, ascending, and their sums, (N, 3, C), float64, on the CPU.
        """
        positions = sorted(position for position in self._of_tiles if position < end)
        tiles = {position: self._of_tiles.pop(position) for position in positions}
        taken = {}
        for name in dict.fromkeys(name for sums in tiles.values() for name in sums):
            having = [position for position in positions if name in tiles[position]]
            taken[name] = having, torch.stack([tiles[position][name] for position in having]).cpu().double()
        return taken

    def count(self, of_ranks: Sequence[Mapping[str, tuple[list[int], Tensor]]]) -> None:
        """Add tiles that count, of all ranks, in the order of the stream."""
        for name in dict.fromkeys(name for taken in of_ranks for name in taken):
            parts = [taken[name] for taken in of_ranks if name in taken]
            tiles = (tile for positions, sums in parts for tile in zip(positions, sums, strict=True))
            for _, one in sorted(tiles, key=itemgetter(0)):
                self.sums[name] = self.sums[name] + one if name in self.sums else one.clone()

    def warn_implausible(self, processes: Processes) -> str | None:
        """Warn, on rank 0, of bands whose mean or standard deviation no normalized image has.

        Returns:
            The same in a sentence, on all ranks; None if there are no such bands.

        Warns:
            ImplausibleInputWarning: If there are any.
        """
        wrong = []
        for name, (pixels, total, squares) in self.sums.items():
            mean = total / pixels
            std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
            bad = (mean.abs() > LARGEST_MEAN) | (std < SMALLEST_STD) | (std > LARGEST_STD)
            wrong += [
                f"{self._band(name, band, len(mean))} (mean {float(mean[band]):.3g}, std {float(std[band]):.3g})"
                for band in bad.nonzero().flatten().tolist()
            ]
        if not wrong:
            return None
        more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        sentence = (
            f"After normalization the values of {', '.join(wrong[:MOST_NAMED])}{more} are implausible, expected a mean "
            f"within {LARGEST_MEAN:g} of 0 and a standard deviation from {SMALLEST_STD:g} to {LARGEST_STD:g}: check the "
            "means and stds of the data, its scale and its nodata value."
        )
        if processes.first:
            warnings.warn(sentence, ImplausibleInputWarning, stacklevel=3)
        return sentence

    def _band(self, modality: str, band: int, bands: int) -> str:
        names = self.names.get(modality, ()) if isinstance(self.names, Mapping) else self.names
        named = f"band {names[band]}" if len(names) == bands else f"band {band} (0-based)"
        return f"{named} of {modality}" if modality else named


def _sampled(image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Some pixels of the images, (B, C, T, h, w), and which of them are valid, (B, 1, T or 1, h, w)."""
    tiles = len(valid)
    steps = [max(1, size // PIXELS_ACROSS) for size in image.shape[-2:]]
    pixels = image[..., :: steps[0], :: steps[1]]
    frames = len(image) // tiles  # more than one if frames have become images
    if pixels.ndim == 4:
        pixels = pixels.reshape(tiles, frames, *pixels.shape[1:]).transpose(1, 2)
    mask = valid if valid.ndim == 4 else valid[:, None]
    if mask.shape[1] not in (1, pixels.shape[2]):
        mask = mask.all(dim=1, keepdim=True)
    if mask.shape[-2:] != image.shape[-2:]:  # padded or resized: the mask is stretched, which moves it by few pixels
        mask = torch.nn.functional.interpolate(mask.float(), size=image.shape[-2:])
    return pixels, mask[:, None, :, :: steps[0], :: steps[1]]
